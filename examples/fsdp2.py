"""FSDP2 on several ranks; a checkpoint that goes on with another number of them.

    torchrun --nproc-per-node 2 examples/fsdp2.py
    torchrun --nproc-per-node 2 examples/fsdp2.py --steps 20 --save build/fsdp2
    torchrun --nproc-per-node 3 examples/fsdp2.py --resume build/fsdp2

The second stops half way, and the third goes on from there with the losses of the first, which was
never interrupted. On CPUs by gloo, on GPUs by nccl.
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from adamem_fused import AMAdamW, param_groups

CONTEXT = 8  # bytes that the next one is told from
BATCH = 96  # of all ranks together, in equal parts


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--resume", metavar="FOLDER")
    parser.add_argument("--state-dtype", choices=["int8"], help="float32 if not given")
    args = parser.parse_args()

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()

    torch.manual_seed(0)  # the same values on every rank, of which each keeps a shard
    embedding, width = nn.Embedding(256, 16), CONTEXT * 16
    blocks = [Block(width) for _ in range(3)]
    model = nn.Sequential(embedding, nn.Flatten(), *blocks, nn.Linear(width, 256)).to(device)
    mesh = init_device_mesh(device.type, (ranks,))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)

    # After fully_shard, which makes new parameters. The blocks' matrices have one beta a row, and a
    # rank has whole rows: added up over ranks are the sums of all other tensors, and the norm.
    optimizer = AMAdamW(
        param_groups(model, weight_decay=0.1, modules={Block: {"beta_scope": "row"}}),
        lr=3e-3,
        betas=(0.95, 0.999),
        max_grad_norm=1.0,
        state_dtype=args.state_dtype,
    )

    start = 0
    if args.resume:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        checkpoint = {"model": model_state, "optimizer": optimizer_state, "step": start}
        # In place: each rank reads its shards, however many ranks saved.
        dcp.load(checkpoint, checkpoint_id=args.resume)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=checkpoint["model"],
            optim_state_dict=checkpoint["optimizer"],
        )
        start = checkpoint["step"]

    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    windows = text.long().unfold(0, CONTEXT + 1, 1)
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step)
        rows = torch.randint(len(windows), (BATCH,), generator=generator)[rank::ranks]
        batch = windows[rows].to(device)
        loss = nn.functional.cross_entropy(model(batch[:, :-1]), batch[:, -1])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 5 == 0:
            mean = loss.detach() / ranks
            dist.all_reduce(mean)
            numbers = {name: value.item() for name, value in optimizer.metrics().items()}
            if rank == 0:  # whose betas are those of its own rows
                print(
                    f"step {step + 1}  loss {mean.item():.6f}  "
                    f"norm {numbers['grad_norm']:.3f}  mean beta {numbers['beta_mean']:.3f}"
                )

    if args.save:
        model_state, optimizer_state = get_state_dict(model, optimizer)
        checkpoint = {"model": model_state, "optimizer": optimizer_state, "step": args.steps}
        dcp.save(checkpoint, checkpoint_id=args.save)
    # A thread of gloo that still holds a tensor of what was saved when Python ends aborts
    # (pytorch/pytorch#179291).
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
