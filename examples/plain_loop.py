"""A plain loop: clipping, warm-up and cosine, metrics, a checkpoint and going on from it.

    python examples/plain_loop.py

A small Transformer learns to predict the next byte of a file of Python's standard library.
"""

import argparse
import tempfile
from pathlib import Path

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from adamem_fused import AMAdamW, param_groups

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STEPS, WARM_UP = 100, 10
BATCH, CONTEXT, WIDTH = 16, 64, 64
TEXT = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)


class ByteModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.positions = nn.Embedding(CONTEXT, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, dropout=0.0, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(WIDTH, 256)

    def forward(self, windows):
        x = self.embedding(windows[:, :-1]) + self.positions.weight
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=x.device)
        logits = self.head(self.layers(x, mask=mask, is_causal=True))
        return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def batch(step):
    # Of the step's number alone: whoever goes on from a checkpoint sees the batches that are left.
    generator = torch.Generator().manual_seed(step)
    starts = torch.randint(len(TEXT) - CONTEXT, (BATCH,), generator=generator)
    return torch.stack([TEXT[i : i + CONTEXT + 1] for i in starts]).long().to(DEVICE)


def make():
    model = ByteModel().to(DEVICE)
    # Biases and norms do not decay; gradients are clipped in the step, without being written.
    optimizer = AMAdamW(param_groups(model, weight_decay=0.1), lr=3e-3, max_grad_norm=1.0)
    warm_up = LinearLR(optimizer, 0.1, total_iters=WARM_UP)
    cosine = CosineAnnealingLR(optimizer, STEPS - WARM_UP)
    return model, optimizer, SequentialLR(optimizer, [warm_up, cosine], [WARM_UP])


def train(model, optimizer, scheduler, steps):
    for step in steps:
        loss = model(batch(step))
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == STEPS - 1:  # reading a number waits for a GPU
            metrics = optimizer.metrics()
            print(
                f"step {step}: loss {loss:.3f}, norm {metrics['grad_norm']:.3f}, "
                f"mean beta {metrics['beta_mean']:.3f}, at the cap {metrics['at_cap']:.0%}"
            )


torch.manual_seed(0)
model, optimizer, scheduler = make()
train(model, optimizer, scheduler, range(STEPS // 2))

with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "checkpoint.pt"
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    torch.save({name: part.state_dict() for name, part in parts.items()}, path)

    model, optimizer, scheduler = make()  # as in another process
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    scheduler.load_state_dict(saved["scheduler"])
print(f"going on from {sum(p.numel() for p in model.parameters())} parameters and their state")
train(model, optimizer, scheduler, range(STEPS // 2, STEPS))
