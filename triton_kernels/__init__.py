"""Triton kernels of the Adaptive Memory optimizers.

`kernels` holds the kernels, `elements` the formulas, `tables` how kernels find their tensors,
`storage` how elements are loaded and stored, `formats` what is stored in few bits, `sums` what is
added over chunks, and `config` the block sizes.
"""
