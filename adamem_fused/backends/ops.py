"""The operators torch.ops.adamem_fused.*: declares them, with their fake kernels, and calls them.

With the fake kernels torch.compile and torch.export can trace through a step. The compiled
extension is loaded here, the module adamem_fused._C, of which an installation may have one for each
of several versions of torch. Its operators are for CPU tensors; operators.py has those for CUDA,
and those for the CPU where it is not there.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from adamem_fused.backends.batch import Batch, check_like

# ---- the extension ----------------------------------------------------------------------

PACKAGE = Path(__file__).parents[1]
_NAME = "adamem_fused._C"

# pip keeps what it has compiled against another torch in its cache.
_REINSTALL = "pip install --force-reinstall --no-deps --no-cache-dir <its wheel or source>"


def not_compiled() -> str:
    """What to do where nothing of csrc is there."""
    source = PACKAGE.parent
    if (source / "setup.py").exists():
        return (
            f"this is the package's source in {source}, where the C++ extension was not "
            "compiled; run `pip install --no-build-isolation -e .` there, or, to use an "
            "installed package, start from another folder"
        )
    return (
        "the C++ extension was not compiled; reinstall with a C++ compiler at hand "
        "and without ADAMEM_NO_EXTENSION"
    )


def _load() -> tuple[Any, str | None]:
    """Loads the extension for this torch; returns it, or None and why it is not there."""
    if _NAME in sys.modules:
        return sys.modules[_NAME], None
    if ".abi3.so" not in EXTENSION_SUFFIXES:
        return None, "the C++ extension needs Python's stable ABI, which this Python does not have"
    names = re.findall(r"_C_(\d+)_(\d+)\.abi3\.so", "\n".join(p.name for p in PACKAGE.glob("_C_*")))
    versions = sorted((int(major), int(minor)) for major, minor in names)
    if not versions:
        return None, not_compiled()
    major, minor = torch.__version__.split(".")[:2]
    path = PACKAGE / f"_C_{major}_{minor}.abi3.so"
    if not path.exists():
        there = ", ".join(f"{major}.{minor}" for major, minor in versions)
        return None, (
            f"the C++ extension was compiled against torch {there}, and this is torch "
            f"{torch.__version__}; install a newer adamem_fused, or compile it anew: {_REINSTALL}"
        )
    spec = spec_from_file_location(_NAME, path, loader=ExtensionFileLoader(_NAME, str(path)))
    assert spec is not None and spec.loader is not None
    try:
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
    except ImportError as error:
        return None, (
            f"the C++ extension does not load with torch {torch.__version__} ({error}); "
            f"reinstall it: {_REINSTALL}"
        )
    if module.torch_version.split(".")[:2] != [major, minor]:
        return None, (
            f"{path} was compiled against torch {module.torch_version}, which is not what its name "
            f"says; {_REINSTALL}"
        )
    sys.modules[_NAME] = module
    return module, None


# ---- the operators ----------------------------------------------------------------------

# Lists of tensors hold one entry a tensor, over all parameter groups in order.
# group_sizes: how many of them belong to each group. lrs: [groups] float64, a tensor
# so that a learning rate on the device is never read back. hypers: for each group
#   AM-AdamW  beta_max, beta2, eps, weight_decay, memory_lambda, anchored, loss_gap, maximize,
#             shared
#   AM-SGD    beta_max, weight_decay, memory_lambda, anchored, loss_gap, maximize, shared
# Where a tensor of betas (and of beta_prods) has an element for each row of its parameter, an
# index of the first dimension, each of them has a beta; else it is of one element, for all of the
# tensor. begin: rows, [betas in all, 2] float64, num and den, and what may be updated before beta
# is there. finish: the rest of the step, from these rows, which may have been summed over tensors
# or over ranks. Where nothing is to happen in between, finish without rows does all of the step;
# tensors of groups that are `shared` then take the sums over all such tensors.
#
# packed, rounding: `Packed` of batch.py, where something is stored in few bits: the scales of each
# memory, one entry a tensor, and the remainders behind them. Else nothing.
#
# squared_norms: the sum of each tensor's squares, [tensors] float64.
_OPTIONS = "Tensor lrs, int[] group_sizes, float[] hypers, Tensor? grad_scale, Tensor? found_inf, "
_SCHEMAS = {
    "adamw_begin_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor[] steps, Tensor[] beta_prods, Tensor[] prev_lrs, Tensor[] betas, "
        + _OPTIONS
        + "Tensor(d!)[] packed, Tensor? rounding) -> Tensor"
    ),
    "adamw_finish_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
        "Tensor(d!)[] steps, Tensor(e!)[] beta_prods, Tensor(f!)[] prev_lrs, Tensor(g!)[] betas, "
        + _OPTIONS
        + "Tensor(h!)[] packed, Tensor? rounding, Tensor? rows) -> ()"
    ),
    "sgd_begin": (
        "(Tensor[] params, Tensor[] grads, Tensor[] momentum_buffers, Tensor[] steps, "
        "Tensor[] prev_lrs, Tensor[] betas, "
        + _OPTIONS
        + "Tensor[] packed, Tensor? rounding) -> Tensor"
    ),
    "sgd_finish_": (
        "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, "
        "Tensor(c!)[] steps, Tensor(d!)[] prev_lrs, Tensor(e!)[] betas, "
        + _OPTIONS
        + "Tensor(h!)[] packed, Tensor? rounding, Tensor? rows) -> ()"
    ),
    "squared_norms": "(Tensor[] grads) -> Tensor",
}


def flat_hypers(batch: Batch) -> list[float]:
    """The groups' hyperparameters other than lr, as the operators take them."""
    return [
        float(value)
        for h, shared in zip(batch.hypers, batch.shared, strict=True)
        for value in (*h[1:], shared)
    ]


def call(name: str, *args: Any) -> Any:
    """torch.ops.adamem_fused.<name>, without torch's dispatcher where that has nothing to do.

    It takes 0.35 us for each tensor in a list: with thousands of small tensors most of a step.
    """
    if extension is not None and not torch.compiler.is_compiling():
        result = getattr(extension, name)(*args)
        if result is not NotImplemented:
            return result
    return getattr(torch.ops.adamem_fused, name)(*args)


def any_modes() -> bool:
    """Whether some Python code is to see all operators: fake tensors, make_fx, FLOP counters."""
    if extension is None:
        return bool(_get_current_dispatch_mode_stack())
    modes: bool = extension.any_modes()
    return modes


def is_traced() -> bool:
    """Whether operators are recorded, or tensors fake: kernels launched past them would be lost."""
    return any(mode.is_infra_mode() for mode in _get_current_dispatch_mode_stack())


# ---- the fake kernels -------------------------------------------------------------------
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


# ---- their registration -----------------------------------------------------------------


def _declare() -> None:
    """Declares the operators, once in a process: a second import of this module finds them."""
    fakes = {
        "adamw_begin_": _fake_adamw_begin_,
        "adamw_finish_": _fake_adamw_finish_,
        "sgd_begin": _fake_sgd_begin,
        "sgd_finish_": _fake_sgd_finish_,
        "squared_norms": _fake_squared_norms,
    }
    for name, schema in _SCHEMAS.items():
        if not hasattr(torch.ops.adamem_fused, name):
            torch.library.define(f"adamem_fused::{name}", schema)
            torch.library.register_fake(f"adamem_fused::{name}")(fakes[name])


def register(kernels: Mapping[str, Callable[..., Any]], key: str) -> None:
    """Gives the operators kernels for a dispatch key, where they have none."""
    for name, kernel in kernels.items():
        operator = f"adamem_fused::{name}"
        if not torch._C._dispatch_has_kernel_for_dispatch_key(operator, key):
            torch.library.impl(operator, key.lower(), kernel)


_declare()
extension, unavailable = _load()
