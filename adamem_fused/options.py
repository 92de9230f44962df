"""Checks of options."""

from __future__ import annotations

from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from adamem_fused import backends
from adamem_fused.storage import BFLOAT16, STATE_DTYPES

MEMORY_PLANES = ("level", "anchored")
GAPS = ("gradient", "loss")
BETA_SCOPES = ("tensor", "row", "global")

# Schedulers end a rounding beside their end: LinearLR to 0 at -5e-20, say, and those that
# compute in float32 up to 1e-7 of where they began below 0. So in a step and in a checkpoint a
# number may be this far below 0, which does what 0 does.
ROUNDING = 1e-6


def check_number(name: str, value: Any, high: float = float("inf"), slack: float = 0.0) -> None:
    """Raises ValueError unless value is a number in [0, high), or at most `slack` below 0."""
    if type(value) is float and -slack <= value < high:
        return  # asked several times a step, and isinstance with Real is slow
    number = isinstance(value, Real) and not isinstance(value, bool)
    if not number or not -slack <= value < high:  # NaN is not in any range
        allowed = ">= 0.0" if high == float("inf") else f"in [0.0, {high})"
        hint = ", not a tensor: pass its item()" if isinstance(value, Tensor) else ""
        raise ValueError(f"Invalid {name}: {value!r} (a finite number {allowed}{hint})")


def plain(options: dict[str, Any]) -> dict[str, Any]:
    """The options with NumPy's numbers and sequences of any kind as Python's own, and a dtype by
    its name.

    torch.load takes no others by default, and get_optimizer_state_dict no dtypes.
    """
    numbers = {
        key: float(value)
        for key, value in options.items()
        if isinstance(value, Real) and not isinstance(value, (bool, int))
    }
    integers = {
        key: int(value)
        for key, value in options.items()
        if isinstance(value, Integral) and not isinstance(value, bool)
    }
    betas = {"betas": tuple(map(float, options["betas"]))} if "betas" in options else {}
    names = {torch.bfloat16: BFLOAT16, torch.int8: "int8"}
    dtypes = {k: names[v] for k, v in options.items() if isinstance(v, torch.dtype) and v in names}
    return {**options, **numbers, **integers, **betas, **dtypes}


def check_lr(lr: Any, slack: float) -> None:
    """Raises ValueError unless lr is a number as `check_number` has it, or a tensor of one.

    The value of a tensor is looked at on the CPU alone: a GPU would have to be waited for.
    """
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(
                "Invalid learning rate: Tensor lr must be 1-element, "
                f"and this one has shape {list(lr.shape)}"
            )
        if lr.device.type == "cpu" and not torch.compiler.is_compiling():
            check_number("learning rate", lr.item(), slack=slack)
    else:
        check_number("learning rate", lr, slack=slack)


def check_betas(betas: Any, slack: float) -> None:
    """Raises ValueError unless betas are two numbers in [0, 1), in a sequence of any kind."""
    try:
        first, second = betas
        betas[0]
    except (TypeError, ValueError, LookupError):
        raise ValueError(f"Invalid betas: {betas!r} (two numbers in [0, 1))") from None
    check_number("beta parameter at index 0", first, 1.0, slack)
    check_number("beta parameter at index 1", second, 1.0, slack)


def check_options(group: dict[str, Any], slack: float) -> None:
    """Raises on a bad value of the options that both optimizers have."""
    check_lr(group["lr"], slack)
    check_number("weight_decay value", group["weight_decay"], slack=slack)
    check_number("memory_lambda value", group["memory_lambda"], slack=slack)
    for key, allowed in (
        ("memory_plane", MEMORY_PLANES),
        ("gap", GAPS),
        ("beta_scope", BETA_SCOPES),
        ("maximize", (True, False)),
        ("capturable", (True, False)),
    ):
        if not isinstance(group[key], (str, int)) or group[key] not in allowed:
            choices = " or ".join(repr(value) for value in allowed)
            raise ValueError(f"Invalid {key}: {group[key]!r} ({choices})")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ValueError(
            f"Invalid state_dtype: {group['state_dtype']!r} (None, torch.bfloat16 or 'int8')"
        )
    for key in ("stochastic_rounding", "store_param_remainders"):
        if not isinstance(group[key], bool):
            raise ValueError(f"Invalid {key}: {group[key]!r} (True or False)")
    seed = group["seed"]
    is_integer = isinstance(seed, (int, Integral)) and not isinstance(seed, bool)
    if not is_integer or not 0 <= seed < 2**63:
        raise ValueError(f"Invalid seed: {seed!r} (an integer in [0, 2**63))")
    if group["gap"] == "loss" and group["beta_scope"] != "global":
        raise ValueError(
            'gap="loss" needs beta_scope="global", not '
            f"{group['beta_scope']!r}: a loss belongs to the whole model"
        )
    backends.check_choice(group)
