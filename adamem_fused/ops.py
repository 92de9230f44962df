"""The compiled operators: loads them, and gives them their fake kernels.

`torch.ops.adamem_fused.*`, declared in csrc/ops.cpp. With the fake kernels torch.compile
and torch.export can trace through a step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _load() -> str | None:
    """Loads the extension; returns None, or why it is not there."""
    try:
        from adamem_fused import _C
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            return (
                "the C++ extension was not compiled; reinstall with a C++ compiler at hand "
                "and without ADAMEM_NO_EXTENSION"
            )
        return (
            f"the C++ extension does not load with torch {torch.__version__} ({error}); reinstall"
        )
    running = torch.__version__.split("+")[0].split(".")[:2]
    if _C.torch_version.split(".")[:2] != running:
        return (
            f"the C++ extension was compiled against torch {_C.torch_version}, and this is torch "
            f"{torch.__version__}; reinstall"
        )
    return None


unavailable = _load()


def _fake_stats(params: list[Tensor], *args: Any, **kwargs: Any) -> Tensor:
    return params[0].new_empty(len(params), 2, dtype=torch.float64)


def _fake_apply_(*args: Any, **kwargs: Any) -> None:
    return None


if unavailable is None:
    torch.library.register_fake("adamem_fused::adamw_stats")(_fake_stats)
    torch.library.register_fake("adamem_fused::adamw_apply_")(_fake_apply_)
    torch.library.register_fake("adamem_fused::sgd_stats")(_fake_stats)
    torch.library.register_fake("adamem_fused::sgd_apply_")(_fake_apply_)
