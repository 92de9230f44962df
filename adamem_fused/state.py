"""A parameter's state: what dtypes it has, and how it begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

COMPLEX = (torch.complex64, torch.complex128)


def memory_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's memory: float32, and float64 for float64; complex if it is."""
    if param.dtype in COMPLEX:
        return param.dtype
    return torch.float64 if param.dtype == torch.float64 else torch.float32


def scalar_dtype(param: Tensor) -> torch.dtype:
    """The dtype of a parameter's scalar state."""
    double = param.dtype in (torch.float64, torch.complex128)
    return torch.float64 if double else torch.float32


def initial_state(
    param: Tensor, memories: Iterable[str], scalars: Mapping[str, float]
) -> dict[str, Tensor]:
    """The state before the first step: memories of zeros, and 0-dim scalars."""
    return {
        **{
            name: torch.zeros_like(
                param, dtype=memory_dtype(param), memory_format=torch.preserve_format
            )
            for name in memories
        },
        **{
            name: torch.full((), value, dtype=scalar_dtype(param), device=param.device)
            for name, value in scalars.items()
        },
    }
