"""Loading state: this package's own, bit for bit, and torch.optim's, converted."""

from __future__ import annotations

from copy import copy
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from adamem_fused import flattened, sharding, storage
from adamem_fused.backends.batch import bookkeeping_dtype
from adamem_fused.options import ROUNDING
from adamem_fused.state import beta_shape, full, scalar_dtype
from adamem_fused.warn import warn_user

if TYPE_CHECKING:
    from adamem_fused.backends.batch import Lr
    from adamem_fused.optimizer import AdaptiveMemoryOptimizer

# Options that say how to compute and how to store, and not what: a checkpoint, which may come from
# another machine, does not decide them.
_IMPLEMENTATION = (
    *("foreach", "fused", "backend", "capturable"),
    *storage.OPTIONS,
)

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
    """A parameter's loaded state, on its way through Optimizer.load_state_dict.

    That casts tensors to the parameter's dtype, which a subclass cannot prevent; other objects
    pass as they are.
    """

    def __init__(self, state: Any) -> None:
        self.state = state


def wrap(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """A checked copy of a state_dict, with the state as it will be: a load_state_dict pre-hook.

    All that can fail is done here, where nothing has changed yet.
    """
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
        # torch.optim's optimizers keep options that are not theirs, and drop state that is not. All
        # of them have this option, and it is none that a user would give a group of his own.
        native = "memory_plane" in saved and "differentiable" not in saved
        group = {**saved, **options, "params": saved["params"]}
        optimizer._check_group(group, ROUNDING)
        flattened.check_new(optimizer, own, own["params"])
        groups.append(group)
        for key, param in zip(saved["params"], own["params"], strict=True):
            if key in state:
                if native:
                    _check_lost(optimizer, param, group, saved, state[key])
                state[key] = Kept(_loaded(optimizer, param, group, state[key], native))
        if not native:
            for option in _FOREIGN:
                group.pop(option, None)
    return {**state_dict, "param_groups": groups, "state": state}


def unwrap(optimizer: AdaptiveMemoryOptimizer) -> None:
    """Puts state that has been wrapped in its place."""
    for key, value in optimizer.state.items():
        if isinstance(value, Kept):
            optimizer.state[key] = value.state


def _of_one_format(
    optimizer: AdaptiveMemoryOptimizer, param: Tensor, own: storage.Storage, state: dict[str, Any]
) -> dict[str, Any]:
    """A state without what is not the checkpoint's, where memories are in two formats.

    torch's set_optimizer_state_dict with full_state_dict=True puts what has a name that the
    optimizer's new state has in its place, and adds all else, whole, to what is left there.
    """
    for memory in optimizer.memories:
        names = storage.names_of(memory, own)
        others = {memory, *storage.codes_names(memory)}.difference(names)
        if not state.keys() >= others.union(names):
            continue
        state = {name: value for name, value in state.items() if name not in names}
        value = storage.whole_value(param, memory, state)
        state = {name: value for name, value in state.items() if name not in others}
        state[memory] = sharding.of_whole(param, value) if isinstance(value, Tensor) else value
    return state


def _check_lost(
    optimizer: AdaptiveMemoryOptimizer,
    param: Tensor,
    group: dict[str, Any],
    saved: dict[str, Any],
    state: Any,
) -> None:
    """Raises ValueError where a sharded parameter's memories were lost on their way.

    With broadcast_from_rank0=True too, that function gives what it adds to rank 0 alone, and the
    others keep the zeros of a new state.
    """
    step = state.get("step") if isinstance(state, dict) else None
    if not sharding.is_dtensor(param) or not isinstance(step, Tensor) or step == 0:
        return
    plain = dict.fromkeys(storage.OPTIONS)
    own = storage.storage_of(param, group)
    whole = torch.empty(param.shape, dtype=param.dtype, device="meta")
    other = storage.storage_of(whole, {**plain, **saved})
    names = {name for memory in optimizer.memories for name in storage.names_of(memory, own)}
    others = {name for memory in optimizer.memories for name in storage.names_of(memory, other)}
    if names == others or not others.isdisjoint(state) or not names <= state.keys():
        return
    values = [sharding.local(state[name]) for name in names if isinstance(state[name], Tensor)]
    if any(value.any() for value in values) or sharding.local(param).numel() == 0:
        return
    message = (
        f"loaded state of a parameter of shape {list(param.shape)} is of zeros after step "
        f"{step.item():.0f}: set_optimizer_state_dict with broadcast_from_rank0=True loses "
        "memories that are kept in another format. Load with the checkpoint's state_dtype, and set "
        "the other one in optimizer.param_groups after"
    )
    if group["state_dtype"] == saved.get("state_dtype"):
        warn_user(message)  # of a shard that may have had no other gradients
    else:
        raise ValueError(message)


def _loaded(
    optimizer: AdaptiveMemoryOptimizer,
    param: Tensor,
    group: dict[str, Any],
    saved: Any,
    native: bool,
) -> Any:
    """A copy of one parameter's state, checked, and converted if it is torch.optim's."""
    if not native and _is_foreign(optimizer, saved):
        raise ValueError(
            f"loaded state has {', '.join(saved)} and no {', '.join(optimizer.memories)}: it is "
            f"another optimizer's; {type(optimizer).__name__} loads its own and that of its "
            "counterpart in torch.optim"
        )
    # The user's own, alone.
    names = {*optimizer.scalars, *storage.all_names(optimizer.memories)}
    if not isinstance(saved, dict) or not any(name in saved for name in names):
        return _copy(saved)
    state = saved if native else optimizer._convert_state(param, saved, group)
    loaded = {name: _copy(value) for name, value in state.items() if name not in names}
    if any(name in state for name in names):
        own = storage.storage_of(param, group)
        state = _of_one_format(optimizer, param, own, state)
        for memory in optimizer.memories:
            loaded.update(_loaded_memory(param, memory, own, state))
        for name in optimizer.scalars:
            value = _checked(optimizer, param, name, state, group)
            loaded[name] = _place(optimizer, param, name, value, group)
        if own.has_remainder:
            loaded.update(storage.remainder_state(param, state))
    return loaded


def _loaded_memory(
    param: Tensor, memory: str, own: storage.Storage, state: dict[str, Any]
) -> dict[str, Tensor]:
    """A memory in the format that it is to have: bit for bit, where that is the saved one's."""
    if own.memory == torch.int8:
        codes = storage.codes_state(param, memory, own, state)
        if codes is not None:
            return codes
    value = _checked_memory(param, memory, storage.memory_value(param, memory, state))
    return storage.memory_state(param, memory, own, value)


def _is_foreign(optimizer: AdaptiveMemoryOptimizer, saved: Any) -> bool:
    """Whether a parameter's state is neither this class's nor its counterpart's."""
    return (
        isinstance(saved, dict)
        and any(isinstance(value, Tensor) for value in saved.values())
        and not any(name in saved for name in storage.all_names(optimizer.memories))
    )


def _copy(value: Any) -> Any:
    """The user's own state with copies of its tensors; Optimizer's cast would change them."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        copied = copy(value)
        copied.update({key: _copy(item) for key, item in value.items()})
        return copied
    if type(value) in (list, tuple, set):
        return type(value)(map(_copy, value))
    return value


def missing_state(
    optimizer: AdaptiveMemoryOptimizer, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> dict[str, Tensor]:
    """What a parameter's state is to have beside what it has: all of it, or what goes with it.

    With memories and, for AMAdamW, a step, it is as of torch.optim's counterpart.

    Raises:
        ValueError: there is some of the state, and not enough to know the rest.
    """
    own = storage.storage_of(param, group)
    plain = storage.as_plain(param, optimizer.memories, state)
    names = (*optimizer.memories, *optimizer.scalars)
    known = [name for name in names if plain.get(name) is not None]
    missing = storage.remainder_state(param, state) if own.has_remainder else {}
    if not known:
        for memory in optimizer.memories:
            missing.update(storage.memory_state(param, memory, own, None))
        for name, first in optimizer.scalars.items():
            missing[name] = full(param, optimizer._scalar_shape(param, name, group), first)
        return missing
    needed = [name for name in optimizer.memories if name not in known]
    if needed:
        raise ValueError(
            f"state of a parameter of shape {list(param.shape)} has {', '.join(known)} and no "
            f"{', '.join(needed)}; it has to have these too, or none of its own"
        )
    whole = {
        **optimizer._convert_state(param, plain, group),
        **{name: plain[name] for name in known},
    }
    # In an ordinary group a user's own memory may be of any dtype.
    are_users = param not in optimizer._stored
    for memory in optimizer.memories:
        if not (are_users and memory in state) and not storage.fits(param, memory, state, own):
            value = _checked_memory(param, memory, whole[memory])
            missing.update(storage.memory_state(param, memory, own, value))
    misfits = _misfits(optimizer, param, state, group)
    for name in optimizer.scalars:
        if name not in known or name in misfits:
            value = _checked(optimizer, param, name, whole, group)
            missing[name] = _place(optimizer, param, name, value, group)
    return missing


def fits(
    optimizer: AdaptiveMemoryOptimizer, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> bool:
    """Whether a parameter's state is complete and of its group's options."""
    if not (optimizer.scalars.keys() <= state.keys()):
        return False
    own = storage.storage_of(param, group)
    return (
        all(storage.fits(param, memory, state, own) for memory in optimizer.memories)
        and own.has_remainder == (storage.REMAINDER in state)
        and fits_scope(optimizer, param, state, group)
    )


def fits_scope(
    optimizer: AdaptiveMemoryOptimizer, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> bool:
    """Whether beta and beta_prod of a parameter's state are one a segment of its group's scope."""
    return not _misfits(optimizer, param, state, group)


def _misfits(
    optimizer: AdaptiveMemoryOptimizer, param: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> list[str]:
    flat = optimizer._flat_of(param)
    misfits = []
    for name in optimizer.row_scalars if flat is None else optimizer.scalars:
        shape = optimizer._scalar_shape(param, name, group)
        if getattr(state.get(name), "shape", shape) != shape:
            misfits.append(name)
    return misfits


def _checked_memory(param: Tensor, name: str, value: Any) -> Tensor:
    """A memory of its parameter's shape and kind."""
    if value is None:
        raise ValueError(f"loaded state has no {name}")
    if not isinstance(value, Tensor):
        raise TypeError(f"loaded state {name} is a {type(value).__name__}, not a tensor")
    if value.shape != param.shape:
        raise ValueError(
            f"loaded state {name} has shape {list(value.shape)}; "
            f"for a parameter of shape {list(param.shape)} it has to be {list(param.shape)}"
        )
    _check_complex(param, name, value, param.is_complex())
    sharding.check_like(param, f"loaded state {name}", value)
    return value


def _check_complex(param: Tensor, name: str, value: Tensor, allowed: bool) -> None:
    if value.is_complex() != allowed:
        raise ValueError(
            f"loaded state {name} is {value.dtype}, which does not go with {param.dtype}"
        )


def _checked(
    optimizer: AdaptiveMemoryOptimizer,
    param: Tensor,
    name: str,
    state: dict[str, Any],
    group: dict[str, Any],
) -> Tensor:
    """A scalar of the right shape. It may be a number, or have one element."""
    if name not in state:
        raise ValueError(f"loaded state has no {name}")
    value = state[name]
    if isinstance(value, Real):
        value = torch.tensor(value, dtype=scalar_dtype(param), device=param.device)
    if not isinstance(value, Tensor):
        raise TypeError(f"loaded state {name} is a {type(value).__name__}, not a tensor")
    one = torch.Size([])
    if optimizer._flat_of(param) is not None:
        shape = optimizer._scalar_shape(param, name, group)
        if value.dim() > 0 and value.shape != shape:
            raise ValueError(
                f"state {name} of a flat parameter has shape {list(value.shape)}; for the tensors "
                f"that it was registered with and this beta_scope it has to be {list(shape)}: it "
                "cannot be converted to another scope, number of ranks or order of tensors"
            )
        return value
    rows = beta_shape(param.shape, "row") if name in optimizer.row_scalars else one
    by_row = rows != one and value.shape == rows
    if not by_row and value.numel() != 1:
        allowed = "[]" if rows == one else f"[] or {list(rows)}"
        raise ValueError(
            f"loaded state {name} has shape {list(value.shape)}; "
            f"for a parameter of shape {list(param.shape)} it has to be {allowed}"
        )
    _check_complex(param, name, value, False)
    scalar: Tensor = value
    if by_row and sharding.is_dtensor(scalar):
        sharding.check_like(param, f"loaded state {name}", scalar)
    return scalar


def _place(
    optimizer: AdaptiveMemoryOptimizer,
    param: Tensor,
    name: str,
    value: Tensor,
    group: dict[str, Any],
) -> Tensor:
    """A copy of a scalar of the state on its parameter's device.

    A beta or beta_prod of another scope is converted: a tensor's is that of each of its rows, and
    rows' is the tensor's by their mean, so that AM-AdamW's bias correction, which is linear in
    beta_prod, is the mean of theirs too. Without rows it is as at the beginning.
    """
    dtype = torch.promote_types(value.dtype, scalar_dtype(param))
    value = value.detach().to(device=param.device, dtype=dtype, copy=True)
    shape = optimizer._scalar_shape(param, name, group)
    if not shape:
        value = sharding.whole(value)
        if value.numel() == 0:
            return full(param, shape, optimizer.scalars[name]).to(dtype)
        wide = bookkeeping_dtype(value.device)
        return value.reshape(()) if value.numel() == 1 else value.to(wide).mean().to(dtype)
    if value.shape != shape:
        return full(param, shape, sharding.whole(value).reshape(())).to(dtype)
    return full(param, shape, 0.0).to(dtype).copy_(sharding.of_all_rows(param, value))


# ---- torch.optim's state ----------------------------------------------------------


def from_adamw(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """AdamW's state as AMAdamW's: as if beta had been betas[0] and lr the group's at every step."""
    if "max_exp_avg_sq" in state:
        raise ValueError("state has max_exp_avg_sq (amsgrad=True), which AMAdamW does not have")
    if group.get("decoupled_weight_decay") is False and group["weight_decay"] != 0:
        raise ValueError(
            f"weight_decay {group['weight_decay']} is Adam's, coupled to the gradient; "
            "AMAdamW's is decoupled"
        )
    if "step" not in state:
        raise ValueError("state has no step")
    like: dict[str, Any] = {"dtype": scalar_dtype(param), "device": param.device}
    step = torch.as_tensor(state["step"], **like)
    beta1 = torch.tensor(group["betas"][0], **like)
    return {
        **{name: state[name] for name in ("exp_avg", "exp_avg_sq") if name in state},
        "step": step,
        "beta_prod": beta1**step,
        **_last_step(step, group["lr"], beta1),
    }


def from_sgd(param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """SGD's state as AMSGD's: the buffer as it is, for -lr times it was the last step.

    SGD has no step count, so what has a buffer counts as one step old, unless it is of zeros, as
    checkpoint tools make them. Without momentum SGD saves None: such a parameter starts anew.
    """
    buffer = state.get("momentum_buffer")
    if buffer is None:
        return {name: value for name, value in state.items() if name != "momentum_buffer"}
    like: dict[str, Any] = {"dtype": scalar_dtype(param), "device": param.device}
    step = state.get("step")
    if step is None:
        step = sharding.whole((buffer != 0).any()) if isinstance(buffer, Tensor) else 1.0
    step = torch.as_tensor(step, **like)
    beta = torch.as_tensor(group.get("momentum", 0.0), **like)
    return {**state, "step": step, **_last_step(step, group["lr"], beta)}


def _last_step(step: Tensor, lr: Lr, beta: Tensor) -> dict[str, Tensor]:
    """What a step with this lr and beta leaves; where there was none, a beginning."""
    lr = torch.as_tensor(lr, dtype=step.dtype, device=step.device).reshape(())
    return {"prev_lr": torch.where(step == 0, 0.0, lr), "beta": torch.where(step == 0, 0.0, beta)}
