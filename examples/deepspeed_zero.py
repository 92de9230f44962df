"""DeepSpeed's ZeRO 1 or 2: each tensor, or row, has its own beta though it lies in a flat buffer.

    torchrun --nproc-per-node 2 examples/deepspeed_zero.py
    torchrun --nproc-per-node 2 examples/deepspeed_zero.py --steps 20 --save build/zero
    torchrun --nproc-per-node 2 examples/deepspeed_zero.py --resume build/zero

The third goes on where the second has stopped, with the bits of the first. On CPUs by gloo, on GPUs
by nccl. Needs deepspeed.
"""

import argparse
import os
from pathlib import Path

import torch
from torch import nn

if not torch.cuda.is_available():
    os.environ["DS_ACCELERATOR"] = "cpu"  # before deepspeed is imported

import deepspeed
import torch.distributed as dist

from adamem_fused import AMAdamW, param_groups

CONTEXT = 8  # bytes that the next one is told from
BATCH = 32  # of a rank


def config(stage: int) -> dict:
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # one that is not DeepSpeed's own
        "gradient_clipping": 1.0,  # DeepSpeed's: it steps one parameter group after the other
        "bf16": {"enabled": True},  # of which ZeRO keeps float32 masters
    }


class Model(nn.Module):
    """Tells the next byte, and gives the loss."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, width // CONTEXT)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(width, 2 * width), nn.GELU())
        self.head = nn.Linear(2 * width, 256)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        logits = self.head(self.layers(self.embedding(text[:, :-1])))
        return nn.functional.cross_entropy(logits.float(), text[:, -1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--stage", type=int, choices=[1, 2], default=2)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--save", metavar="FOLDER")
    parser.add_argument("--resume", metavar="FOLDER")
    args = parser.parse_args()

    if not torch.cuda.is_available():
        # What it would compile to replace gloo's all-reduce.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        dist.init_process_group("gloo")

    torch.manual_seed(0)
    model = Model()
    # beta_scope "tensor" or "row": one for the whole model takes all groups at once.
    groups = param_groups(model, weight_decay=0.1, modules={model.layers: {"beta_scope": "row"}})
    optimizer = AMAdamW(groups, lr=3e-3, betas=(0.95, 0.999))
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config(args.stage))

    start = 0
    if args.resume:
        _, client_state = engine.load_checkpoint(args.resume)
        start = client_state["step"]

    text = torch.frombuffer(bytearray(Path(argparse.__file__).read_bytes()), dtype=torch.uint8)
    windows = text.long().unfold(0, CONTEXT + 1, 1)
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(step * dist.get_world_size() + dist.get_rank())
        rows = torch.randint(len(windows), (BATCH,), generator=generator)
        loss = engine(windows[rows].to(engine.device))
        engine.backward(loss)
        engine.step()
        if (step + 1) % 5 == 0 and dist.get_rank() == 0:
            mean = optimizer.metrics()["beta_mean"].item()  # of this rank's part
            print(f"step {step + 1}  loss {loss.item():.6f}  mean beta {mean:.6f}")

    if args.save:
        engine.save_checkpoint(args.save, client_state={"step": args.steps})
    # A thread of gloo that still holds a tensor when Python ends aborts (pytorch/pytorch#179291).
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
