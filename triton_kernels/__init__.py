"""Triton kernels of the Adaptive Memory optimizers.

`adamw` and `sgd` hold the kernels, `elements` the formulas, `tables` how kernels find their
tensors, `sums` what is added over chunks, `schedule` the order of a step in one launch, and
`config` the block sizes.
"""
