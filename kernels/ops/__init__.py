"""Triton kernels of `tpweave.ops`, one module per stem."""
