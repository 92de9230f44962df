"""Triton kernels of the Adaptive Memory optimizers.

`elements` holds the formulas, `kernels` the walk over memory, `config` the block sizes.
"""
