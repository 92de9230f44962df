"""The compiled operators: loads them, calls them, and gives them their fake kernels.

`torch.ops.adamem_fused.*`, declared in csrc/ops.cpp. With the fake kernels torch.compile
and torch.export can trace through a step.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from adamem_fused.backends.batch import check_like

# pip keeps what it has compiled against another torch in its cache.
_REINSTALL = "reinstall it (pip install --force-reinstall --no-deps --no-cache-dir)"


def _load() -> tuple[Any, str | None]:
    """Loads the extension; returns it, or None and why it is not there."""
    try:
        from adamem_fused import _C
    except ImportError as error:
        if "_C" in str(error) and "cannot import name" in str(error):
            source = Path(__file__).parents[2]
            if (source / "setup.py").exists():
                return None, (
                    f"this is the package's source in {source}, where the C++ extension was not "
                    "compiled; run `pip install --no-build-isolation -e .` there, or, to use an "
                    "installed package, start from another folder"
                )
            return None, (
                "the C++ extension was not compiled; reinstall with a C++ compiler at hand "
                "and without ADAMEM_NO_EXTENSION"
            )
        return None, (
            f"the C++ extension does not load with torch {torch.__version__} ({error}); "
            f"{_REINSTALL}"
        )
    running = torch.__version__.split("+")[0].split(".")[:2]
    if _C.torch_version.split(".")[:2] != running:
        return None, (
            f"the C++ extension was compiled against torch {_C.torch_version}, and this is torch "
            f"{torch.__version__}; {_REINSTALL}"
        )
    return _C, None


extension, unavailable = _load()


def call(name: str, *args: Any) -> Any:
    """torch.ops.adamem_fused.<name>, without torch's dispatcher where that has nothing to do.

    It takes 0.35 us for each tensor in a list: with thousands of small tensors most of a step.
    """
    if not torch.compiler.is_compiling():
        result = getattr(extension, name)(*args)
        if result is not NotImplemented:
            return result
    return getattr(torch.ops.adamem_fused, name)(*args)


def is_traced() -> bool:
    """Whether operators are recorded, or tensors fake: kernels launched past them would be lost."""
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


# A real tensor list with one meta tensor in it comes here too: hence the checks.


def _new_rows(betas: list[Tensor]) -> Tensor:
    return betas[0].new_empty(sum(map(Tensor.numel, betas)), 2, dtype=torch.float64)


def _fake_adamw_begin_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    beta_prods: list[Tensor],
    prev_lrs: list[Tensor],
    betas: list[Tensor],
    *args: Any,
) -> Tensor:
    check_like(params, {"grad": grads, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs})
    return _new_rows(betas)


def _fake_adamw_finish_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *args: Any,
) -> None:
    check_like(params, {"grad": grads, "exp_avg": exp_avgs, "exp_avg_sq": exp_avg_sqs})


def _fake_sgd_begin(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    steps: list[Tensor],
    prev_lrs: list[Tensor],
    betas: list[Tensor],
    *args: Any,
) -> Tensor:
    check_like(params, {"grad": grads, "momentum_buffer": momentum_buffers})
    return _new_rows(betas)


def _fake_sgd_finish_(
    params: list[Tensor], grads: list[Tensor], momentum_buffers: list[Tensor], *args: Any
) -> None:
    check_like(params, {"grad": grads, "momentum_buffer": momentum_buffers})


def _fake_squared_norms(grads: list[Tensor]) -> Tensor:
    for i, grad in enumerate(grads):
        if grad.device != grads[0].device:
            raise ValueError(
                f"grad of tensor {i} is on {grad.device}, and that of tensor 0 on {grads[0].device}"
            )
    return grads[0].new_empty(len(grads), dtype=torch.float64)


if unavailable is None:
    torch.library.register_fake("adamem_fused::squared_norms")(_fake_squared_norms)
    torch.library.register_fake("adamem_fused::adamw_begin_")(_fake_adamw_begin_)
    torch.library.register_fake("adamem_fused::adamw_finish_")(_fake_adamw_finish_)
    torch.library.register_fake("adamem_fused::sgd_begin")(_fake_sgd_begin)
    torch.library.register_fake("adamem_fused::sgd_finish_")(_fake_sgd_finish_)
