"""A few small steps under compute-sanitizer: accesses beside their tensors, and races.

    compute-sanitizer ... python -m bench.gpu_check.sanitizer BACKEND [planted]

takes the steps, clipped: all of a backend's kernels and dtypes, aligned and not, tensors of one
chunk and of several, matrices with a beta a row, and what is stored in few bits. With `planted`
one gradient has less memory than it says, which has to be found: else nothing was looked at.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from adamem_fused import AMSGD, AMAdamW
from bench.gpu_check import gpu
from bench.gpu_check.processes import Limited, find_tool, module
from bench.gpu_check.record import Results

FOUND = 9  # the exit status where the tool has found something
# Of this package's kernels, in their mangled names.
KERNELS = {"cuda": ("am4cuda",), "triton": ("am_", "sum_")}
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def vectors(whole: Tensor) -> list[tuple[Tensor, bool]]:
    return [(whole, True), (whole[1:9000], False), (whole[:7], True)]


def matrices(whole: Tensor) -> list[tuple[Tensor, bool]]:
    """Of short rows, of rows of many, and of one that no block holds."""
    return [
        (whole.view(-1, 16), True),
        (whole[1:9001].view(-1, 500), False),
        (whole.view(1, -1), True),
    ]


def blocks(whole: Tensor) -> list[tuple[Tensor, bool]]:
    """Of rows of one block of 64, which a part of a warp takes, and of rows of three."""
    return [(whole[:19200].view(-1, 64), True), (whole[1:19201].view(-1, 192), False)]


LOW_DTYPES = (torch.float32, torch.bfloat16)
INT8 = {"state_dtype": "int8", "store_param_remainders": True}
BF16 = {"state_dtype": torch.bfloat16, "stochastic_rounding": True}
# beta_scope, what is taken of each dtype's numbers, dtypes, options.
CASES: tuple[tuple[str, Callable[..., Any], Sequence[torch.dtype], dict[str, Any]], ...] = (
    ("tensor", vectors, DTYPES, {}),
    ("global", vectors, DTYPES, {}),
    ("row", matrices, DTYPES, {}),
    ("row", blocks, LOW_DTYPES, INT8),
    ("tensor", blocks, LOW_DTYPES, BF16),
)


def take_steps(backend: str, planted: bool) -> None:
    for cls in (AMAdamW, AMSGD):
        for scope, parts, dtypes, options in CASES:
            base = [torch.randn(20000, device=gpu.device).to(dtype) for dtype in dtypes]
            params = [
                part.clone() if aligned else part
                for whole in base
                for part, aligned in parts(whole)
            ]
            for param in params:
                param.requires_grad_()
            common: dict[str, Any] = {"backend": backend, "beta_scope": scope, "max_grad_norm": 1.0}
            optimizer = cls(params, lr=0.01, **common, **options)
            for _ in range(2):
                grads = [torch.randn_like(param) for param in params]
                if planted:
                    grads[0].untyped_storage().resize_(64)
                for param, grad in zip(params, grads, strict=True):
                    param.grad = grad
                optimizer.step()
            gpu.synchronize()


def command(program: str, tool: str, backend: str, planted: bool) -> list[str]:
    names = (option for name in KERNELS[backend] for option in ("--kernel-name", f"kns={name}"))
    options = ["--tool", tool, "--error-exitcode", str(FOUND), *names]
    options += ["--target-processes", "application-only"]
    if tool == "memcheck":
        # torch asks CUDA for things that may fail.
        options += ["--report-api-errors", "no"]
    steps = module("bench.gpu_check.sanitizer", backend, *(["planted"] if planted else []))
    return [program, *options, *steps]


def run(results: Results, backends: list[str], seconds: float) -> None:
    """All at the same time: most of it is waiting. What they say is kept as sanitizer.log."""
    folder = results.path.parent
    program = find_tool("compute-sanitizer")
    running, logs = [], []
    for backend in backends:
        results.begin("sanitizer", backend)
        for tool, planted in (("memcheck", False), ("racecheck", False), ("memcheck", True)):
            case = f"{tool}{', planted' if planted else ''}"
            if program is None:
                reason = "compute-sanitizer is not installed"
                results.put("sanitizer", backend, case, {"not_done": reason})
                continue
            log = folder / f"sanitizer-{backend}-{tool}{'-planted' if planted else ''}.log"
            log.unlink(missing_ok=True)
            process = Limited(
                command(program, tool, backend, planted),
                seconds,
                log,
                # Else memcheck sees one allocation, torch's, and no end of a tensor.
                {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            )
            running.append((backend, case, planted, process))
            logs.append(log)
    for backend, case, planted, process in running:
        how = process.end()
        if planted:
            found = how == f"failed: exit status {FOUND}"
            how = "done" if found else f"failed: the planted error was not found ({how})"
        result = {"found": "no errors" if not planted else "it is found"}
        results.put("sanitizer", backend, case, result if how == "done" else {"failed": how})
    for backend in backends:
        results.end("sanitizer", backend, "done")
    with (folder / "sanitizer.log").open("w") as file:
        for log in logs:
            file.write(f"---- {log.stem}\n{log.read_text(errors='replace')}\n")
            log.unlink()


if __name__ == "__main__":
    is_planted = "planted" in sys.argv[2:]
    # The tool ends what was on the device when it finds an error, and counts ours otherwise.
    with suppress(RuntimeError) if is_planted else nullcontext():
        take_steps(sys.argv[1], is_planted)
