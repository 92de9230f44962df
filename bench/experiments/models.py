"""The models that the demo does not have: a ResNet and a ViT for small images."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CLASSES = 10


class ResidualBlock(nn.Module):
    """Two normed 3 x 3 convolutions, added to their input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.GroupNorm(4, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.GroupNorm(4, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(x + self.norm2(self.conv2(y)))


class ResNet(nn.Module):
    """Group norm: it has no running statistics, which schedule-free would have to redo."""

    def __init__(self, channels: int, blocks: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, channels, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(4, channels)
        self.blocks = nn.Sequential(*(ResidualBlock(channels) for _ in range(blocks)))
        self.head = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 1, 8, 8] to logits, [batch, 10]."""
        x = F.max_pool2d(F.relu(self.norm(self.stem(images))), 2)
        logits: Tensor = self.head(self.blocks(x).mean((2, 3)))
        return logits


class ViT(nn.Module):
    """Patches, learned positions, pre-norm encoder layers, mean over the patches.

    Args:
        width, heads, layers: of the encoder.
        patch: pixels along each side of a patch.
        patches: how many of them an image has.
    """

    def __init__(
        self, width: int, heads: int, layers: int, patch: int = 2, patches: int = 16
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, patch, stride=patch, bias=False)
        self.positions = nn.Parameter(0.02 * torch.randn(patches, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True, bias=False
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, CLASSES, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """[batch, 1, height, width] to logits, [batch, 10]."""
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits
