"""A compiled step, and a CUDA graph of the forward pass, the backward pass and the step.

    python examples/compiled.py

The learning rate is a tensor: a compiled step would be compiled anew for each new number, and a
graph would keep the one that it was captured with. The graph needs a GPU.
"""

import torch
from torch import nn

from adamem_fused import AMAdamW

STEPS = 30
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def new() -> tuple[nn.Module, AMAdamW, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 1)).to(device)
    lr = torch.tensor(1e-2, device=device)
    return model, AMAdamW(model.parameters(), lr=lr, max_grad_norm=1.0), lr


def batch_of(step: int) -> torch.Tensor:
    return torch.randn(128, 64, generator=torch.Generator().manual_seed(step)).to(device)


def loss_of(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    return (model(batch) - batch[:, :4].sum(1, keepdim=True)).square().mean()


def train(compile_step: bool) -> tuple[nn.Module, float]:
    model, optimizer, lr = new()
    take_step = torch.compile(optimizer.step) if compile_step else optimizer.step
    for step in range(STEPS):
        lr.fill_(1e-2 * (1 - step / STEPS))  # in place, as torch's schedulers do it
        loss = loss_of(model, batch_of(step))
        loss.backward()
        take_step()
        optimizer.zero_grad()
    return model, loss.item()


def train_in_a_graph() -> tuple[nn.Module, float]:
    model, optimizer, lr = new()
    batch = batch_of(0)  # the graph reads this memory in each replay

    # The first step is an ordinary one, on a stream of its own: it makes what the graph is to find.
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        loss_of(model, batch).backward()
        optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)

    optimizer.zero_grad()  # to None, so that the gradients are in the graph's memory
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
    for step in range(1, STEPS):
        lr.fill_(1e-2 * (1 - step / STEPS))
        batch.copy_(batch_of(step))
        graph.replay()
    return model, loss.item()


def report(name: str, model: nn.Module, loss: float, expected: nn.Module) -> None:
    pairs = zip(model.parameters(), expected.parameters(), strict=True)
    difference = max((ours - theirs).abs().max().item() for ours, theirs in pairs)
    print(f"{name}: loss {loss:.6f}, parameters differ by at most {difference:.1e}")


ordinary, loss = train(compile_step=False)
print(f"ordinary steps on {device}: loss {loss:.6f}")
report("compiled step", *train(compile_step=True), ordinary)
if device.type == "cuda":
    report("CUDA graph", *train_in_a_graph(), ordinary)
else:
    print("CUDA graph: not here, it needs a GPU")
