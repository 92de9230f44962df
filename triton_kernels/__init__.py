"""Triton kernels of the Adaptive Memory optimizers: none yet."""
