"""timm: an optimizer by its name, with timm's own weight decay, layer decay and scheduler.

    python examples/timm_training.py

A small vision transformer learns to tell stripes from rings, and their three widths, in noise.
"""

import torch
from timm import create_model
from timm.optim import OptimInfo, create_optimizer_v2
from timm.optim._optim_factory import default_registry
from timm.scheduler import create_scheduler_v2

from adamem_fused import AMAdamW

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPOCHS, BATCHES, BATCH, SIZE = 6, 16, 32, 32

# timm takes names only. With this, its train.py takes --opt amadamw as well.
default_registry.register(OptimInfo(name="amadamw", opt_class=AMAdamW, has_betas=True))


def images(generator):
    """[BATCH, 3, SIZE, SIZE] and their classes."""
    classes = torch.randint(6, (BATCH,), generator=generator)
    y, x = torch.meshgrid(*2 * [torch.arange(SIZE) - SIZE / 2], indexing="ij")
    distance = torch.where((classes < 3)[:, None, None], x + y, torch.hypot(x, y))
    frequency = 0.4 * (1 + classes % 3)[:, None, None]
    waves = torch.sin(frequency * distance + 6 * torch.rand(BATCH, 1, 1, generator=generator))
    noise = torch.randn(BATCH, 3, SIZE, SIZE, generator=generator)
    return (waves[:, None] + 0.5 * noise).to(DEVICE), classes.to(DEVICE)


torch.manual_seed(0)
model = create_model(
    "vit_tiny_patch16_224", img_size=SIZE, patch_size=4, embed_dim=64, depth=3, num_heads=4,
    num_classes=6,
).to(DEVICE)  # fmt: skip
# Biases, norms and what the model names do not decay; each block has 0.8 of the next one's lr.
optimizer = create_optimizer_v2(
    model, "amadamw", lr=2e-3, weight_decay=0.05, layer_decay=0.8, max_grad_norm=1.0
)
scheduler, _ = create_scheduler_v2(
    optimizer, "cosine", num_epochs=EPOCHS, warmup_epochs=1, warmup_lr=1e-4
)

generator = torch.Generator().manual_seed(0)
for epoch in range(EPOCHS):
    total = 0.0
    for _ in range(BATCHES):
        x, classes = images(generator)
        loss = torch.nn.functional.cross_entropy(model(x), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total += loss.detach()
    scheduler.step(epoch + 1)
    metrics = optimizer.metrics()
    print(
        f"epoch {epoch}: loss {total.item() / BATCHES:.3f}, "
        f"mean beta {metrics['beta_mean']:.3f}, at the cap {metrics['at_cap']:.0%}"
    )
