"""Triton kernels of `tpweave.comm`, one module per stem."""
