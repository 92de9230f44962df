"""Low-rank adapters: fine-tuning that trains a few parameters of a pretrained model."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

RANK = 8
ALPHA = 16.0


class LoRALinear(nn.Module):
    """A frozen linear layer, plus ALPHA / RANK times a trained matrix of rank RANK.

    As by Hu et al., arXiv 2106.09685: what it adds is zero at the start.
    """

    def __init__(self, linear: nn.Linear, generator: torch.Generator) -> None:
        super().__init__()
        self.linear = linear
        bound = math.sqrt(3 / linear.in_features)
        down = torch.empty(RANK, linear.in_features).uniform_(-bound, bound, generator=generator)
        self.down = nn.Parameter(down)
        self.up = nn.Parameter(torch.zeros(linear.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        low: Tensor = x @ self.down.T @ self.up.T
        full: Tensor = self.linear(x)
        return full + ALPHA / RANK * low


def add_adapters(model: nn.Module, inner: str, seed: int) -> nn.Module:
    """Freezes the model, and puts adapters on the linear layers whose names begin with `inner`."""
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.startswith(inner) and isinstance(module, nn.Linear)
    }
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, LoRALinear(layer, generator))
    return model
