"""AdamW that stores as AMAdamW can, in plain torch: what the formats do to an ordinary optimizer.

For experiments alone, as it takes many times what a fused step takes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamem_fused import formats, storage

MEMORIES = ("exp_avg", "exp_avg_sq")


class AdamW(Optimizer):
    """torch's AdamW, whose arithmetic is float32, and AMAdamW's options of what is stored how."""

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        store_param_remainders: bool = False,
        seed: int = 0,
    ) -> None:
        defaults: dict[str, Any] = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "store_param_remainders": store_param_remainders,
            "seed": seed,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        pairs = [(group, param) for group in self.param_groups for param in group["params"]]
        for index, (group, param) in enumerate(pairs):
            if param.grad is not None:
                key = formats.tensor_key(group["seed"], index)
                _step(param, param.grad.float(), self.state[param], group, key)


def _step(
    param: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any], key: int
) -> None:
    own = storage.storage_of(param, group)
    if not state:
        state["step"] = 0
        for name in MEMORIES:
            state |= storage.memory_state(param, name, own, None)
        if own.has_remainder:
            state |= storage.remainder_state(param, state)
    memory_key, param_key, *_ = formats.step_keys(key, state["step"])
    state["step"] += 1
    t, lr, (beta1, beta2) = state["step"], group["lr"], group["betas"]

    x = formats.join(param, state[storage.REMAINDER]) if own.has_remainder else param.float()
    m, v = (storage.memory_value(param, name, state).float() for name in MEMORIES)
    m = m.lerp(grad, 1 - beta1)
    v = v * beta2 + (1 - beta2) * grad**2
    x = x * (1 - lr * group["weight_decay"])
    x = x - lr * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + group["eps"])

    places = torch.arange(param.numel(), device=param.device).view(param.shape)
    bits = formats.random_bits(memory_key, places) if own.memory is not None else None
    _store_memory(state, "exp_avg", m, bits)
    _store_memory(state, "exp_avg_sq", v, bits if bits is None else bits >> 16)
    bits = formats.random_bits(param_key, places) if own.rounds else None
    if own.has_remainder:
        new, rest = formats.split(x, bits)
        state[storage.REMAINDER].copy_(rest)
        param.copy_(new)
    else:
        param.copy_(x if bits is None else formats.to_bfloat16(x, bits))


def _store_memory(state: dict[str, Any], name: str, value: Tensor, bits: Tensor | None) -> None:
    """bits: None for a memory that is rounded to nearest, if it is rounded."""
    if bits is None:
        state[name].copy_(value)
    elif name in state:
        state[name].copy_(formats.to_bfloat16(value, bits))
    else:
        formats.encode(value, state[f"{name}_codes"], state[f"{name}_scales"], bits)


def nearest_bfloat16(optimizer: Optimizer) -> Optimizer:
    """The optimizer with its larger parameters' memories in bfloat16 from its first step on.

    It rounds them to nearest from then on, as it does with state of a dtype that a user gives it.
    """

    def as_bfloat16(*_: Any) -> None:
        for param, state in optimizer.state.items():
            for name in MEMORIES if param.numel() >= storage.LEAST_NUMEL else ():
                state[name] = state[name].bfloat16()

    optimizer.register_step_post_hook(as_bfloat16)
    return optimizer
