"""Loading state: this package's own, bit for bit, and torch.optim's, converted."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamem_fused import flattened, sharding
from adamem_fused.state import memory_dtype, scalar_dtype

if TYPE_CHECKING:
    from adamem_fused.optimizer import AdaptiveMemoryOptimizer

# Options that say how to compute and not what: a checkpoint, which may come from another
# machine, does not decide them.
_IMPLEMENTATION = ("foreach", "fused", "backend", "capturable")

# Options of torch.optim's AdamW and SGD that these optimizers do not have.
_FOREIGN = (
    "amsgrad",
    "dampening",
    "decoupled_weight_decay",
    "differentiable",
    "momentum",
    "nesterov",
)


class Kept:
    """A tensor that Optimizer.load_state_dict leaves alone.

    It casts state to the parameter's dtype, by a policy that a subclass cannot override. So
    tensors go through it in this wrapper.
    """

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def wrap(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A checked copy of a state_dict, its tensors wrapped: a load_state_dict pre-hook."""
    saved_groups = state_dict["param_groups"]
    sizes = [len(group["params"]) for group in saved_groups]
    if sizes != [len(group["params"]) for group in optimizer.param_groups]:
        return None  # Optimizer.load_state_dict says what is wrong
    groups = []
    state = dict(state_dict["state"])
    for own, saved in zip(optimizer.param_groups, saved_groups, strict=True):
        options = {
            key: value for key, value in own.items() if key not in saved or key in _IMPLEMENTATION
        }
        # torch.optim's optimizers keep options that are not theirs, and drop state that is not.
        native = "memory_plane" in saved and not any(option in saved for option in _FOREIGN)
        group = {**saved, **options, "params": saved["params"]}
        optimizer._check_group(group)
        flattened.check_new(own, own["params"], optimizer.param_groups, optimizer._given)
        groups.append(group)
        for key, param in zip(saved["params"], own["params"], strict=True):
            if state.get(key):
                state[key] = _wrap_state(optimizer, param, group, state[key], native)
        if not native:
            for option in _FOREIGN:
                group.pop(option, None)
    return {**state_dict, "param_groups": groups, "state": state}


def unwrap(optimizer: AdaptiveMemoryOptimizer) -> None:
    """Puts the tensors of a state that has been wrapped in their places."""
    for param, values in optimizer.state.items():
        for name, value in values.items():
            if isinstance(value, Kept):
                values[name] = _place(optimizer, param, name, value.tensor)


def _wrap_state(
    optimizer: AdaptiveMemoryOptimizer,
    param: Tensor,
    group: dict[str, Any],
    saved: dict[str, Any],
    native: bool,
) -> dict[str, Any]:
    """One parameter's state, checked, converted if it is torch.optim's, and wrapped."""
    state = dict(saved) if native else optimizer._convert_state(param, saved, group)
    names = (*optimizer.memories, *optimizer.scalars)
    if any(name in state for name in names):  # and not the user's own entries alone
        for name in names:
            state[name] = _checked(param, name, state, is_memory=name in optimizer.memories)
    return {k: Kept(v) if isinstance(v, Tensor) else v for k, v in state.items()}


def _checked(param: Tensor, name: str, state: dict[str, Any], is_memory: bool) -> Tensor:
    """A loaded tensor of the right shape. A scalar may be a number, or have one element."""
    if name not in state:
        raise ValueError(f"loaded state has no {name}")
    value = state[name]
    if not is_memory and isinstance(value, Real):
        value = torch.tensor(value, dtype=scalar_dtype(param), device=param.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"loaded state {name} is a {type(value).__name__}, not a tensor")
    shape = param.shape if is_memory else torch.Size([])
    if value.numel() != shape.numel() or (shape and value.shape != shape):
        raise ValueError(
            f"loaded state {name} has shape {list(value.shape)}; "
            f"for a parameter of shape {list(param.shape)} it has to be {list(shape)}"
        )
    if value.is_complex() != (is_memory and param.is_complex()):
        raise ValueError(
            f"loaded state {name} is {value.dtype}, which does not go with {param.dtype}"
        )
    if is_memory:
        sharding.check_like(param, f"loaded state {name}", value)
    return value


def _place(optimizer: AdaptiveMemoryOptimizer, param: Tensor, name: str, value: Tensor) -> Tensor:
    """A copy of a loaded tensor on its parameter's device and, if alike, in its layout."""
    if name in optimizer.memories:
        dtype = torch.promote_types(value.dtype, memory_dtype(param))
        return torch.empty_like(param, dtype=dtype, requires_grad=False).copy_(value)
    if name in optimizer.scalars:
        dtype = torch.promote_types(value.dtype, scalar_dtype(param))
        return value.detach().to(device=param.device, dtype=dtype, copy=True).reshape(())
    return value.detach().clone()


# ---- torch.optim's state ----------------------------------------------------------


def from_adamw(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """AdamW's state as AMAdamW's: as if beta had been betas[0] and lr the group's at every step."""
    if "max_exp_avg_sq" in state:
        raise ValueError(
            "loaded state has max_exp_avg_sq (amsgrad=True), which AMAdamW does not have"
        )
    if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
        raise ValueError(
            f"loaded weight_decay {group['weight_decay']} is Adam's, coupled to the gradient; "
            "AMAdamW's is decoupled"
        )
    if "step" not in state:
        raise ValueError("loaded state has no step")
    like: dict[str, Any] = {"dtype": scalar_dtype(param), "device": param.device}
    step = torch.as_tensor(state["step"], **like)
    beta1 = torch.tensor(group["betas"][0], **like)
    return {
        **{name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state},
        "step": step,
        "beta_prod": beta1**step,
        "prev_lr": torch.as_tensor(group["lr"], **like),
        "beta": beta1,
    }


def from_sgd(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """SGD's state as AMSGD's: the buffer as it is, for -lr times it was the last step.

    SGD has no step count, so what has a buffer counts as one step old. Without momentum SGD
    saves None: such a parameter starts anew.
    """
    if "momentum_buffer" in state and state["momentum_buffer"] is None:
        return {}
    like: dict[str, Any] = {"dtype": scalar_dtype(param), "device": param.device}
    return {
        **state,
        "step": torch.ones((), **like),
        "prev_lr": torch.as_tensor(group["lr"], **like),
        "beta": torch.as_tensor(group.get("momentum", 0.0), **like),
    }
