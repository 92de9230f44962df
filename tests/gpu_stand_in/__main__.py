"""bench.gpu_check without a GPU:

    TRITON_INTERPRET=1 PYTHONPATH=.:tests python tests/gpu_stand_in -m bench.gpu_check ...

The emulated cuda backend and Triton's interpreter work on the CPU in the GPU's place, on short
lists, and everything that the check asks of torch.cuda has something else to ask. ncu and
compute-sanitizer of this folder run what they are given and print what the programs would.

STAND_IN_FAULT=STAGE:BACKEND:KIND makes that process fail at its second case: KIND is "hangs", or
"wrong", of steps that do nothing.
"""

from __future__ import annotations

import os
import runpy
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import cuda_emulator
import pytest
import torch
from triton_interpreter import patch_language_once

from adamem_fused.backends import BACKENDS, cuda_library
from bench import gpu_cases
from bench.gpu_check import gpu, processes, record, smoke, suite, sweep, times

HERE = Path(__file__).parent
# One of each kind.
CASES = (
    ("gpt2-small", "AMAdamW", gpu_cases.FLOAT32, "below"),
    ("5000x1000", "AMAdamW", gpu_cases.BFLOAT16, "mixture"),
    ("gpt2-small", "AMAdamW anchored", gpu_cases.FLOAT32, "row"),
    ("gpt2-small", "AMSGD", gpu_cases.FLOAT32, "cap"),
    ("32x524288", "AMAdamW", gpu_cases.ALL_BFLOAT16, "row"),
)


def stand_in(patch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(1)
    patch_language_once(patch)
    cuda_emulator.emulate(patch)
    patch.setattr(cuda_library, "find_nvcc", lambda: None)  # nothing is compiled here
    patch.setattr(processes, "INTERPRETER", [sys.executable, str(HERE)])
    patch.setenv("PATH", f"{HERE}:{os.environ['PATH']}")

    patch.setattr(gpu, "device", torch.device("cpu"))
    patch.setattr(gpu, "is_available", lambda: True)
    patch.setattr(gpu, "describe", lambda: {"name": "Stand-in"})
    patch.setattr(gpu, "l2_bytes", lambda: 50 * 2**20)
    patch.setattr(gpu, "multiprocessors", lambda: 1)
    patch.setattr(gpu, "free_bytes", lambda: 2**30)
    patch.setattr(gpu, "synchronize", lambda: None)
    patch.setattr(gpu, "mark", time.perf_counter)
    patch.setattr(gpu, "seconds_between", lambda first, second: second - first)
    patch.setattr(gpu, "capture", lambda work: work)
    patch.setattr(gpu, "profiled", nullcontext)

    # A program takes the interpreter some 50 ms: few tensors, steps and cases.
    lists = {"2^28": ((300,),), "gpt2-small": ((5, 40), (30,)), "5000x1000": ((14,), (2,))}
    lists["32x524288"] = ((16, 256),)
    patch.setattr(
        gpu_cases,
        "cases",
        lambda free_bytes: {
            name: gpu_cases.Case(name, shapes, gpu_cases.TARGETS[name])
            for name, shapes in lists.items()
        },
    )
    patch.setattr(smoke, "STEPS", 2)
    patch.setattr(smoke, "REPEATS", 1)
    shapes = {"tiny": ((3,), ()), "2^20": ((300,),), "mixed": ((77,),), "rows": ((4, 20), (5, 3))}
    shapes["low"] = ((16, 256), (5,))
    patch.setattr(smoke, "SHAPES", shapes)
    patch.setattr(times, "CASES", CASES)
    patch.setattr(times, "PAIRS", 2)
    patch.setattr(times, "SAMPLE_SECONDS", 0.0)
    patch.setattr(times, "COPIED", 2**10)
    patch.setattr(sweep, "LISTS", ("2^28",))
    patch.setattr(sweep, "PAIRS", 1)
    patch.setattr(sweep, "SAMPLE_SECONDS", 0.0)
    patch.setattr(sweep, "TRITON_SIZES", ({"chunk": 128, "block": 64},))
    patch.setattr(sweep, "LIBRARIES", HERE / "none")
    patch.setattr(suite, "find_files", lambda: [HERE / "outcomes.py"])


def fail(kind: str, backend: str, patch: pytest.MonkeyPatch) -> None:
    case = record.Part.case

    def second(self, name, work):
        if kind == "hangs":
            time.sleep(600)
        patch.setattr(BACKENDS[backend], "adamw_finish", lambda *args: None)
        case(self, name, work)

    def first(self, name, work):
        case(self, name, work)
        patch.setattr(record.Part, "case", second)

    patch.setattr(record.Part, "case", first)


def main() -> None:
    patch = pytest.MonkeyPatch()
    stand_in(patch)
    _, module, *arguments = sys.argv[1:]
    stage, backend, kind = os.environ.get("STAND_IN_FAULT", "::").split(":")
    if module == "bench.gpu_check.process" and arguments[1:3] == [stage, backend]:
        fail(kind, backend, patch)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
