"""A parameter's state: what dtypes it has, and how it begins."""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor

from adamem_fused import sharding

COMPLEX = (torch.complex64, torch.complex128)

# With beta_scope="row" a tensor whose rows have fewer elements than this has one beta: one that is
# taken from a few elements follows their noise, and one an element trains far worse than AdamW.
# gather.cpp has it too.
MIN_ROW = 16


def memory_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's memory: float32, and float64 for float64; complex if it is."""
    if param.dtype in COMPLEX:
        return param.dtype
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def scalar_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's scalar state."""
    double = param.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


def beta_shape(shape: Size, beta_scope: str) -> Size:
    """The shape of beta and beta_prod by a parameter's: [rows] where each row has one, or 0-dim.

    A row is an index of the first dimension. That of a sharded parameter is the whole one's.
    """
    by_row = beta_scope == "row" and len(shape) > 1 and shape[1:].numel() >= MIN_ROW
    return shape[:1] if by_row else Size([])


def full(param: Tensor, shape: Size, value: Any) -> Tensor:
    """A scalar of the state of this shape, as the optimizer's `_scalar_shape` has it: on its
    parameter's device, and sharded as its rows are. value: a number, or a tensor of one element."""
    like: dict[str, Any] = {"dtype": scalar_dtype(param), "device": param.device}
    if not sharding.is_dtensor(param) or not shape:
        return torch.full(shape, value, **like)
    return sharding.as_rows(param, torch.full((sharding.local_rows(param),), value, **like))
