"""The kernels one by one, with pytest-benchmark: pytest bench --benchmark-only.

A group is one kernel on one parameter list in one dtype, the backends side by side, with one beta a
tensor and one a row: what comes before the sums are there (begin), what is left then (finish), and
both in one call (step), beside torch's fused optimizer. Runs on the GPU where there is one; not yet
run on one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS
from bench.kernels.contestants import find_contestants
from bench.kernels.sides import random_tensors

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
AVAILABLE = [name for name, backend in BACKENDS.items() if backend.unavailable(DEVICE) is None]
SHAPES = {"large": ((2**10, 2**10),), "many": ((20, 50),) * 1000}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
KINDS: dict[str, type[AMAdamW] | type[AMSGD]] = {"adamw": AMAdamW, "sgd": AMSGD}
FUSED = {"adamw": "AdamW fused", "sgd": "SGD fused"}
ROUNDS, WARM_UP_ROUNDS = 15, 2


def new_params(shapes: str, dtype: str) -> list[Tensor]:
    """Parameters with gradients, random both."""
    start, grads = (random_tensors(SHAPES[shapes], DTYPES[dtype], DEVICE, s) for s in (0, 1))
    params = [torch.nn.Parameter(tensor) for tensor in start]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return list(params)


def kernel_of(
    kind: str, kernel: str, backend: str, scope: str, params: list[Tensor]
) -> Callable[[], object]:
    """A kernel's call, on state that has seen two steps."""
    optimizer = KINDS[kind](params, backend=backend, beta_scope=scope)
    for _ in range(2):
        optimizer.step()
    batch = optimizer._collect()[0].batch
    begin: Any = getattr(BACKENDS[backend], f"{kind}_begin")
    finish: Any = getattr(BACKENDS[backend], f"{kind}_finish")
    calls: dict[str, Callable[[], object]] = {
        "begin": partial(begin, batch, None, None),
        "finish": partial(finish, batch, begin(batch, None, None), None, None),
        "step": partial(finish, batch, None, None, None),
    }
    return calls[kernel]


def measure(benchmark: BenchmarkFixture, group: str, call: Callable[[], object]) -> None:
    def finished() -> None:
        call()
        if DEVICE.type == "cuda":
            torch.cuda.synchronize()

    benchmark.group = group
    with torch.no_grad():
        pedantic: Any = benchmark.pedantic  # which has no types
        pedantic(finished, rounds=ROUNDS, warmup_rounds=WARM_UP_ROUNDS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("backend", AVAILABLE)
@pytest.mark.parametrize("kernel", ["begin", "finish", "step"])
@pytest.mark.parametrize("kind", KINDS)
def test_kernel(
    benchmark: BenchmarkFixture,
    kind: str,
    kernel: str,
    backend: str,
    scope: str,
    shapes: str,
    dtype: str,
) -> None:
    call = kernel_of(kind, kernel, backend, scope, new_params(shapes, dtype))
    measure(benchmark, f"{kind} {kernel}, {shapes}, {dtype}", call)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_torch_fused(benchmark: BenchmarkFixture, kind: str, shapes: str, dtype: str) -> None:
    contestants = {c.name: c for c in find_contestants(DEVICE)[0]}
    optimizer = contestants[FUSED[kind]].make(new_params(shapes, dtype))
    measure(benchmark, f"{kind} step, {shapes}, {dtype}", optimizer.step)
