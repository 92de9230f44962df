"""Checks of the options that both optimizers have."""

from __future__ import annotations

from numbers import Real
from typing import Any

import torch
from torch import Tensor

from adamem_fused import backends

MEMORY_PLANES = ("level", "anchored")
GAPS = ("gradient", "loss")
BETA_SCOPES = ("tensor", "global")


def check_number(name: str, value: Any, low: float, high: float = float("inf")) -> None:
    """Raises ValueError unless low <= value < high. NaN is not in any range."""
    if type(value) is float and low <= value < high:
        return  # asked several times a step, and isinstance with Real is slow
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not low <= value < high:
        allowed = f">= {low}" if high == float("inf") else f"in [{low}, {high})"
        raise ValueError(f"Invalid {name}: {value!r} (a finite number {allowed})")


def check_lr(lr: Any) -> None:
    """Raises ValueError unless lr is a finite number >= 0, or a tensor of one element.

    The value of a tensor is looked at on the CPU alone: a GPU would have to be waited for.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                "Invalid learning rate: Tensor lr must be 1-element, "
                f"and this one has shape {list(lr.shape)}"
            )
        if lr.device.type == "cpu" and not torch.compiler.is_compiling():
            check_number("learning rate", lr.item(), 0.0)
    else:
        check_number("learning rate", lr, 0.0)


def check_options(group: dict[str, Any]) -> None:
    """Raises on a bad value of the options that both optimizers have."""
    check_number("weight_decay value", group["weight_decay"], 0.0)
    check_number("memory_lambda value", group["memory_lambda"], 0.0)
    for key, allowed in (
        ("memory_plane", MEMORY_PLANES),
        ("gap", GAPS),
        ("beta_scope", BETA_SCOPES),
        ("maximize", (True, False)),
        ("capturable", (True, False)),
    ):
        if group[key] not in allowed:
            choices = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"Invalid {key}: {group[key]!r} ({choices})")
    if group["gap"] == "loss" and group["beta_scope"] != "global":
        raise ValueError(
            'gap="loss" needs beta_scope="global", not '
            f"{group['beta_scope']!r}: a loss belongs to the whole model"
        )
    backends.check_choice(group)
