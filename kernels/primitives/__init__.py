"""What kernels share: `@triton.jit` functions of one meaning each, and tile sizes."""
