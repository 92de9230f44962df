"""accelerate: a loop with gradient accumulation, clipping in the step, and a checkpoint.

    python examples/accelerate_loop.py

A small network learns the classes that another one with random weights gives to random points.
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from adamem_fused import AMAdamW, param_groups

EPOCHS = 4


def network(width):
    return nn.Sequential(nn.Linear(32, width), nn.Tanh(), nn.Linear(width, 10))


torch.manual_seed(0)
points = torch.randn(4096, 32)
with torch.no_grad():
    classes = network(16)(5 * points).argmax(1)

accelerator = Accelerator(gradient_accumulation_steps=2)
model = network(128)
# In place of accelerator.clip_grad_norm_: by the norm of what was accumulated, in the step.
optimizer = AMAdamW(param_groups(model, weight_decay=0.01), lr=1e-2, max_grad_norm=1.0)
scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=EPOCHS * 32)
batches = DataLoader(TensorDataset(points, classes), batch_size=64, shuffle=True)
model, optimizer, scheduler, batches = accelerator.prepare(model, optimizer, scheduler, batches)


def train_epoch(epoch):
    total = 0.0
    for x, target in batches:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(x), target)
            accelerator.backward(loss)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
        total += loss.detach()
    metrics = optimizer.optimizer.metrics()  # within accelerate's wrapper
    accelerator.print(
        f"epoch {epoch}: loss {total.item() / len(batches):.3f}, "
        f"mean beta {metrics['beta_mean']:.3f}, at the cap {metrics['at_cap']:.0%}"
    )


for epoch in range(EPOCHS // 2):
    train_epoch(epoch)
with tempfile.TemporaryDirectory() as folder:
    accelerator.save_state(folder)
    accelerator.load_state(folder)  # as another process would, after its own prepare()
for epoch in range(EPOCHS // 2, EPOCHS):
    train_epoch(epoch)
