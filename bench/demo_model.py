"""A small GPT, byte-level unless asked otherwise: pre-norm, learned positions, no biases."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY = 256  # a token is a byte, unless asked otherwise


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attention_out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp_in = nn.Linear(width, 4 * width, bias=False)
        self.mlp_out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, context, width] to the same."""
        batch, context, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, context, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attention = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.attention_out(attention.transpose(1, 2).reshape(batch, context, width))
        x = x + self.mlp_out(F.gelu(self.mlp_in(self.mlp_norm(x))))
        return x


class GPT(nn.Module):
    """Predicts each next token of windows of `context` tokens.

    With `tied`, its head is its embedding, as GPT-2's.
    """

    def __init__(
        self,
        context: int,
        width: int,
        heads: int,
        layers: int,
        vocabulary: int = VOCABULARY,
        tied: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, windows: Tensor) -> Tensor:
        """Mean cross-entropy, in nats a token, of [batch, context + 1] windows of tokens."""
        windows = windows.long()
        x = self.embedding(windows[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """As GPT-2: normal(0, 0.02), smaller where a layer adds to the residual stream."""
        residual_std = 0.02 / math.sqrt(2 * len(self.blocks))
        for name, param in self.named_parameters():
            if param.dim() == 1:
                param.fill_(1.0)
            else:
                std = residual_std if name.endswith("_out.weight") else 0.02
                param.normal_(0.0, std, generator=generator)


def tensor_label(name: str) -> str:
    """A parameter's name as a reader would say it: "blocks.0.mlp_in.weight" is "1 mlp in"."""
    parts = name.removesuffix(".weight").split(".")
    if parts[0] == "blocks":
        parts = [str(int(parts[1]) + 1), *parts[2:]]
    return " ".join(parts).replace("_", " ")
