"""Triton kernels, installed as tpweave.kernels. Nothing here is imported until a Triton row runs."""
