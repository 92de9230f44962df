"""Gradients that are freed in the backward pass: how many bytes of them there are at once.

    python examples/gradient_release.py

Trains one model four times: with ordinary steps and with released gradients, with one backward pass
a step and with two. Where a step has several, the gradients of the first ones have to stay, so that
release saves their memory with one alone.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

from adamem_fused import AMAdamW, release_gradients

device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def watch_gradients(model: nn.Module) -> Callable[[], int]:
    """The most bytes of gradients that there have been at once, as soon as each is complete."""
    most = 0

    def look(param: torch.Tensor) -> None:
        nonlocal most
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        most = max(most, sum(grad.nbytes for grad in grads))

    for param in model.parameters():
        param.register_post_accumulate_grad_hook(look)
    return lambda: most


def train(release: bool, passes: int) -> tuple[nn.Module, int, float]:
    torch.manual_seed(0)
    layers = [nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(24)]
    model = nn.Sequential(*layers, nn.Linear(256, 1)).to(device)
    optimizer = AMAdamW(model.parameters(), lr=1e-3, beta_scope="row")
    # Hooks run in the order in which they were added: this one sees gradients before they go.
    most = watch_gradients(model)
    released = release_gradients(model, optimizer) if release else None

    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        batches = torch.randn(64, 256, generator=generator).to(device).chunk(passes)
        for batch in batches:
            is_last = batch is batches[-1]
            with nullcontext() if released is None or is_last else released.accumulate():
                loss = (model(batch) - batch.sin().mean(1, keepdim=True)).square().mean() / passes
                loss.backward()  # the last one takes the steps, where gradients are released
        optimizer.step()  # and then finds nothing to do
        optimizer.zero_grad()
    return model, most(), loss.item() * passes


for passes in (1, 2):
    ordinary, ordinary_most, _ = train(False, passes)
    released, released_most, loss = train(True, passes)
    same = all(map(torch.equal, ordinary.parameters(), released.parameters()))
    print(
        f"{passes} backward passes a step: at most {released_most:,} bytes of gradients, "
        f"{ordinary_most:,} without release; loss {loss:.6f}, "
        f"parameters {'the same bits' if same else 'differ'}"
    )
