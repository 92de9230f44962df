"""An optimizer's parameters, state and options as plain values, compared bit for bit."""

from __future__ import annotations

from typing import Any

import torch
from torch.optim import Optimizer


def _plain(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    data = value.detach().contiguous().reshape(-1).view(torch.uint8)
    return value.dtype, value.shape, data.tolist()


def snapshot(optimizer: Optimizer) -> list[Any]:
    """What a step, a load or add_param_group changes. A parameter without state has None."""
    contents: list[Any] = []
    for group in optimizer.param_groups:
        contents.append({k: _plain(v) for k, v in group.items() if k != "params"})
        for param in group["params"]:
            state = optimizer.state.get(param)
            plain = None if state is None else {k: _plain(v) for k, v in state.items()}
            contents.append((_plain(param), plain))
    return contents
