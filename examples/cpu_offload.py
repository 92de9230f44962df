"""FSDP2 that keeps parameters, gradients and state on the CPU, and steps them there.

    python examples/cpu_offload.py

One process, of one GPU if there is one. Without a GPU nothing is copied, and the rest is the same.
torchao's CPUOffloadOptimizer, which needs a GPU, is in docs/training_loop.md.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

from adamem_fused import AMAdamW

cuda = torch.cuda.is_available()
device = torch.device("cuda" if cuda else "cpu")
# Sums over ranks are of CPU tensors, which nccl does not take. With torchrun the other arguments
# are its own.
backend = "cpu:gloo,cuda:nccl" if cuda else "gloo"
dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU())
model.append(nn.Linear(512, 1))
mesh = init_device_mesh(device.type, (1,))
offload = CPUOffloadPolicy(pin_memory=cuda)  # which pins for copies to a GPU
for layer in (model[0], model[2]):
    fully_shard(layer, mesh=mesh, offload_policy=offload)
fully_shard(model, mesh=mesh, offload_policy=offload)
optimizer = AMAdamW(model.parameters(), lr=1e-3, max_grad_norm=1.0)

for step in range(60):
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(step)).to(device)
    loss = (model(x) - x[:, :8].sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if (step + 1) % 20 == 0:
        numbers = {name: value.item() for name, value in optimizer.metrics().items()}
        print(
            f"step {step + 1}  loss {loss.item():.4f}  norm {numbers['grad_norm']:.3f}  "
            f"mean beta {numbers['beta_mean']:.3f}"
        )

weight = model[0].weight
print(
    f"computed on {loss.device}; parameters on {weight.device}, gradients on {weight.grad.device}, "
    f"state on {optimizer.state[weight]['exp_avg'].device}"
)
dist.destroy_process_group()
