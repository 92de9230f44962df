"""Step times with other sizes over those with the sizes as they are, in turns.

The triton backend's sizes are those of triton_kernels/config.py, set from here. The cuda
backend's are set when its kernels are compiled (csrc/cuda/config.h): each library that
`make gpu-bundle` has left in build/gpu-bundle/sizes is one.
"""

from __future__ import annotations

import ctypes
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

from adamem_fused.backends import cuda, triton
from bench import gpu_cases
from bench.gpu_check import gpu, times
from bench.gpu_check.processes import ROOT
from bench.gpu_check.record import Case, NotDone, Part
from bench.gpu_check.times import Step

LIBRARIES = ROOT / "build" / "gpu-bundle" / "sizes"
LISTS = ("2^28", "gpt2-small")
PAIRS = 3
SAMPLE_SECONDS = 0.05
TRITON_SIZES: tuple[dict[str, int], ...] = (
    {"programs": 3, "registers": 168},
    {"programs": 6, "registers": 80},
    {"num_warps": 8, "programs": 2},
    {"chunk": 4096},
    {"chunk": 16384},
    {"block": 2048, "num_warps": 8, "programs": 2},
    {"block": 512},
    {"block": 2048, "programs": 2, "registers": 255},
    {"programs": 8, "registers": 64},
    {"partials": 512},
    {"num_warps": 2, "programs": 8},
)

MakeStep = Callable[[Optimizer], Step]  # a step with some sizes


def triton_step(**sizes: int) -> MakeStep:
    config = triton._config(gpu.device)._replace(**sizes)
    programs = config.programs * gpu.multiprocessors()

    def make(optimizer: Optimizer) -> Step:
        def step() -> None:
            vars(triton).update(_config=lambda device: config, _programs=lambda device: programs)
            optimizer.step()

        return step

    return make


def cuda_step(library: ctypes.CDLL) -> MakeStep:
    vars(cuda).update(_library=lambda: library)
    kernels = KERNELS("adamw")

    def make(optimizer: Optimizer) -> Step:
        def step() -> None:
            vars(cuda).update(_library=lambda: library, _kernels=lambda optimizer: kernels)
            optimizer.step()

        return step

    return make


KERNELS = cuda._kernels.__wrapped__


def time_sizes(backend: str, name: str, base: MakeStep, other: MakeStep) -> Case:
    params = times.make_params(gpu_cases.cases(gpu.free_bytes())[name].shapes, torch.float32)
    sides = {
        side: make(times.make_ours("AMAdamW", params, backend))
        for side, make in (("other", other), ("base", base))
    }
    gradients = times.Gradients(params, "cap")
    found = times.measure(sides, gradients, PAIRS, SAMPLE_SECONDS)
    return {side: found[side]["device"] for side in sides}


def run(part: Part, backend: str) -> None:
    if backend == "triton":
        base = triton_step()
        others = {
            " ".join(f"{key}={value}" for key, value in sizes.items()): triton_step(**sizes)
            for sizes in TRITON_SIZES
        }
    else:
        base = cuda_step(cuda._library())
        paths = sorted(LIBRARIES.glob("*.so"))
        others = {path.stem: cuda_step(ctypes.CDLL(str(path))) for path in paths}
        if not others:
            part.case("sizes", no_libraries)
    for sizes, other in others.items():
        for name in LISTS:
            part.case(f"{name}, {sizes}", partial(time_sizes, backend, name, base, other))


def no_libraries() -> Case:
    raise NotDone(f"set when compiled, and no libraries are in {LIBRARIES}: make gpu-bundle")


def table(stage: dict[str, Any]) -> list[str]:
    lines = [f"{'':52s} {'ms':>8s} {'as it is':>8s} {'ratio':>6s}"]
    for backend, part in stage.items():
        for case, found in part["cases"].items():
            if "other" in found:
                other, base = (1e3 * statistics.median(found[side]) for side in ("other", "base"))
                lines.append(
                    f"{backend:7s} {case:44s} {other:8.3f} {base:8.3f} {other / base:6.3f}"
                )
    return lines
