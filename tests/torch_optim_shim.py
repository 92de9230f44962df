"""torch's own kit for testing optimizers, set up for AMAdamW and AMSGD.

The one place that touches torch.testing._internal, which is private and may change with
any release of torch.
"""

from copy import deepcopy

import torch
from torch.optim import lr_scheduler
from torch.testing._internal.common_device_type import instantiate_device_type_tests
from torch.testing._internal.common_optimizers import (
    ErrorOptimizerInput,
    OptimizerErrorEnum,
    OptimizerInfo,
    OptimizerInput,
    TensorTracker,
    optim_error_inputs_func_adamw,
    optim_error_inputs_func_sgd,
    optim_inputs_func_adamw,
    optim_inputs_func_sgd,
    optims,
)
from torch.testing._internal.common_utils import TestCase, parametrize, subtest

from adamem_fused import AMSGD, AMAdamW

__all__ = [
    "IMPLEMENTATIONS",
    "OptimizerErrorEnum",
    "TensorTracker",
    "TestCase",
    "am_optims",
    "configurations",
    "instantiate_device_type_tests",
    "parametrize",
    "subtest",
]

# The flags that choose an implementation, as torch's tests set them.
IMPLEMENTATIONS = {
    "forloop": {"foreach": False, "fused": False},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
}

# torch's optimizers have these, AMAdamW and AMSGD have not.
_NOT_OURS = {"amsgrad", "dampening", "nesterov"}

_OWN_INPUTS = [
    {"lr": torch.tensor(0.001)},
    {"memory_plane": "anchored", "weight_decay": 0.1},
    {"memory_lambda": 0.0},
    {"beta_scope": "global", "weight_decay": 0.1},
    {"beta_scope": "tensor", "maximize": True},
    {"capturable": True},
]

_SCHEDULERS = (
    [lambda optimizer: lr_scheduler.StepLR(optimizer, gamma=0.9, step_size=10)],
    [lambda optimizer: lr_scheduler.LinearLR(optimizer, start_factor=0.4, total_iters=4)],
    [
        lambda optimizer: lr_scheduler.StepLR(optimizer, gamma=0.99, step_size=10),
        lambda optimizer: lr_scheduler.ExponentialLR(optimizer, gamma=0.99),
        lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer),
    ],
    [lambda optimizer: lr_scheduler.ConstantLR(optimizer, factor=0.4, total_iters=4)],
    [lambda optimizer: lr_scheduler.PolynomialLR(optimizer, power=0.9, total_iters=4)],
)


def _rename(kwargs):
    """SGD's momentum is AMSGD's beta_max."""
    return {"beta_max" if key == "momentum" else key: value for key, value in kwargs.items()}


def _inputs_func(torch_func):
    def optim_inputs(device, dtype=None):
        inputs = [
            OptimizerInput(params=None, kwargs=_rename(given.kwargs), desc=given.desc)
            for given in torch_func(device, dtype)
            if not _NOT_OURS & set(given.kwargs)
        ]
        own = [OptimizerInput(None, deepcopy(kwargs), str(kwargs)) for kwargs in _OWN_INPUTS]
        return inputs + own

    return optim_inputs


def _error_inputs_func(torch_func):
    def error_inputs(device, dtype):
        inputs = []
        for error in torch_func(device, dtype):
            given = error.optimizer_error_input
            # Where the two differ: a tensor lr goes with every backend, a tensor beta with none.
            if isinstance(given.kwargs.get("lr"), torch.Tensor) and given.kwargs.get("foreach"):
                continue
            regex = error.error_regex
            if any(isinstance(beta, torch.Tensor) for beta in given.kwargs.get("betas", ())):
                regex = r"Invalid beta parameter at index [01]: tensor\(0.9"
            inputs.append(
                ErrorOptimizerInput(
                    OptimizerInput(given.params, _rename(given.kwargs), given.desc),
                    error_on=error.error_on,
                    error_type=error.error_type,
                    error_regex=regex.replace("Invalid momentum", "Invalid beta_max"),
                )
            )
        return inputs

    return error_inputs


def _info(optimizer_class, inputs_func, error_inputs_func):
    return OptimizerInfo(
        optimizer_class,
        optim_inputs_func=_inputs_func(inputs_func),
        optim_error_inputs_func=_error_inputs_func(error_inputs_func),
        scheduler_inputs=_SCHEDULERS,
        supported_impls=("foreach", "fused"),
        not_og_supported_flags=(),
        supports_fused_on=("cpu",),
        has_capturable_arg=True,
    )


_INFOS = [
    _info(AMAdamW, optim_inputs_func_adamw, optim_error_inputs_func_adamw),
    _info(AMSGD, optim_inputs_func_sgd, optim_error_inputs_func_sgd),
]


def am_optims(dtypes=(torch.float32,)):
    """Runs a test of a device-type test class for AMAdamW and for AMSGD, and each dtype."""
    return optims(_INFOS, dtypes=list(dtypes))


def configurations(optim_info, device, implementations=tuple(IMPLEMENTATIONS)):
    """Constructor arguments: every optimizer input with the flags of every implementation."""
    for given in optim_info.optim_inputs_func(device=device):
        for implementation in implementations:
            yield {**deepcopy(given.kwargs), **IMPLEMENTATIONS[implementation]}
