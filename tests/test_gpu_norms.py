"""Squared norms of the GPU backends, and steps that they clip: on a GPU, or on the CPU.

As test_gpu_cases.py, whose fixtures and helpers these are: test_triton.py and test_cuda.py run this
file in processes of their own.
"""

from __future__ import annotations

import pytest
import torch
from test_gpu_cases import (
    DEVICE,
    INTERPRETED,
    OPTIMIZERS,
    SHAPES,
    TOLERANCE,
    backend,
    close,
    compare,
    language,
    make_params,
    random,
    rounding_cast,
    set_grads,
    small_blocks,
    state_of,
)
from torch import Tensor

from adamem_fused import AMSGD
from adamem_fused.backends import BACKENDS, tables

if DEVICE.type == "cuda":
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ]
__all__ = ["backend", "language", "rounding_cast", "small_blocks"]  # fixtures

# Longer than a program can hold, and of several chunks.
LONG = 700 if INTERPRETED else 20_000
ROWS = [(6, 16), (3, 17), (40, 2, 3, 3), (3, 200), (2, LONG), (0, 20), (4, 0), (7,), ()]
# A sum of two rounded squares has this error, at most; that of many has less, as they differ.
ROUNDING = 1.5e-7


def squared_norms(backend: str, params: list[Tensor], scope="tensor") -> Tensor:
    optimizer = AMSGD(params, backend=backend, beta_scope=scope)
    (work,) = optimizer._collect()
    return BACKENDS[backend].squared_norms(work.batch)


def assert_norms(actual: Tensor, params: list[Tensor], tolerance=ROUNDING) -> None:
    assert actual.dtype == torch.float64 and actual.shape == (len(params),)
    for one, param in zip(actual, params, strict=True):
        expected = param.grad.double().square().sum()
        torch.testing.assert_close(one, expected, rtol=tolerance, atol=0.0, equal_nan=True)


def give_gradients(params: list[Tensor], dtype=None) -> list[Tensor]:
    set_grads(params, step=0, dtype=dtype)
    return params


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("scope, shapes", [("tensor", SHAPES), ("row", ROWS)])
def test_they_are_the_sums_of_squares(backend, dtype, scope, shapes):
    params = give_gradients(make_params(shapes, dtype))
    tolerance = 1e-14 if dtype == torch.float64 else ROUNDING
    assert_norms(squared_norms(backend, params, scope), params, tolerance)


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_gradients_of_all_dtypes_at_once(backend, scope):
    params = [p for dtype in (*TOLERANCE, *TOLERANCE) for p in make_params([(24, 40)], dtype)]
    assert_norms(squared_norms(backend, give_gradients(params), scope), params)


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_of_another_dtype_than_the_parameters(backend, dtype):
    params = give_gradients(make_params([(24, 40), (5,)], torch.bfloat16), dtype)
    assert_norms(squared_norms(backend, params), params)


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_gradients_that_do_not_lie_densely(backend, scope):
    base = random(24, 90)
    params = make_params([(24, 30), (30, 24), (24, 30)])
    for param, grad in zip(params, (base[:, ::3], base[:, :30].t(), base[:1, :30]), strict=True):
        param.grad = grad.expand(param.shape)
    assert_norms(squared_norms(backend, params, scope), params)


overflows = pytest.mark.filterwarnings("ignore:overflow encountered")  # in the interpreter


@overflows
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [1e-37, 1e-30, 1e-18, 1e-12, 1.0, 1e15, 1e19, 1e30])
@pytest.mark.parametrize("shape", [(1,), (5, 260)])
def test_the_range_is_that_of_doubles(backend, dtype, value, shape):
    """Squares that float32 does not hold, of all of a chunk's or of one element."""
    params = make_params([shape, shape], dtype)
    params[0].grad = (value * (1.5 + random(*shape).abs())).to(dtype)
    params[1].grad = torch.zeros(shape, dtype=dtype, device=DEVICE)
    params[1].grad.view(-1)[-1] = value
    assert_norms(squared_norms(backend, params), params)


@overflows
def test_small_and_large_values_in_one_tensor(backend):
    (param,) = make_params([(1300,)])
    exponents = 60 * torch.rand(1300, generator=torch.Generator().manual_seed(0)) - 30
    param.grad = (10.0**exponents).to(DEVICE)
    assert_norms(squared_norms(backend, [param]), [param])


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bad", [[torch.inf], [-torch.inf], [torch.nan], [torch.nan, torch.inf]])
def test_what_is_not_finite_stays_in_its_tensor(backend, dtype, bad):
    params = give_gradients(make_params([(1300,), (1300,), (3,)], dtype))
    for k, value in enumerate(bad):
        params[1].grad[-1 - k] = value
    actual = squared_norms(backend, params)
    assert_norms(actual, params)
    assert actual.isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_two_runs_and_any_alignment_give_the_same_bits(backend, scope, dtype):
    shape = (9, 160) if INTERPRETED else (9, 2000)
    (param,) = give_gradients(make_params([shape], dtype))
    first, second = (squared_norms(backend, [param], scope) for _ in range(2))
    assert torch.equal(first, second)
    shifted = torch.empty(param.numel() + 1, dtype=dtype, device=DEVICE)[1:].view(shape)
    param.grad = shifted.copy_(param.grad)
    assert torch.equal(first, squared_norms(backend, [param], scope))


# ---- steps that are clipped, or left out ------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "dtype, scope",
    [
        *((dtype, "tensor") for dtype in TOLERANCE),
        (torch.float32, "global"),
        (torch.float64, "row"),
    ],
)
def test_clipped_steps_match_the_reference(backend, cls, dtype, scope):
    shapes = [(24, 40), (5,), (0, 3)]
    options = {"lr": 0.05, "max_grad_norm": 0.5, "skip_nonfinite": True, "beta_scope": scope}
    compare(backend, cls, make_params(shapes, dtype), **options)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_clipped_steps_with_the_gap_from_losses_and_a_scaler(backend, cls):
    """Norm, begin and finish: each in launches of its own."""
    options = {"beta_scope": "global", "max_grad_norm": 0.3}
    sides = []
    for name in (backend, "reference"):
        params = make_params([(24, 40), (5,)])
        # In copies, whichever part of a step comes first.
        params.append(random(6, 40)[:, ::2].requires_grad_())
        optimizer = cls(params, lr=0.05, backend=name, gap="loss", **options)
        optimizer.grad_scale = torch.tensor(64.0, device=DEVICE)
        for step in range(3):
            for i, param in enumerate(params):
                param.grad = 64 * random(*param.shape, seed=10 * step + i)
            optimizer.step(lambda step=step: torch.tensor(1.0 - 0.1 * step, device=DEVICE))
        sides.append([*(p.detach() for p in params), *state_of(optimizer), optimizer.grad_norm])
    for actual, expected in zip(*sides, strict=True):
        close(actual, expected, 1e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_a_gradient_that_is_not_finite_leaves_the_step_out(backend, cls, scope):
    params, twins = make_params([(24, 40), (5,)]), make_params([(24, 40), (5,)])
    options = {"lr": 0.05, "skip_nonfinite": True, "max_grad_norm": 1.0, "beta_scope": scope}
    optimizer, twin = (cls(side, backend=backend, **options) for side in (params, twins))
    for step in range(2):
        set_grads(twins, step)
        for param, other in zip(params, twins, strict=True):
            param.grad = other.grad.clone()
        good = params[1].grad.clone()
        params[1].grad[2] = torch.nan
        optimizer.step()
        assert optimizer.grad_norm.isnan()
        params[1].grad = good
        optimizer.step()
        twin.step()
    assert optimizer.skipped_steps == 2
    assert all(map(torch.equal, state_of(optimizer), state_of(twin)))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_clipped_step_looks_at_its_tensors_once_and_tells_autograd_once(
    backend, cls, monkeypatch
):
    """Where the addresses of thousands are found is most of a step on the host."""
    looks = []
    describe = tables.describe

    def watched(*args):
        looks.append(args)
        return describe(*args)

    monkeypatch.setattr(tables, "describe", watched)
    params = make_params([(24, 40), (5,)])
    optimizer = cls(params, backend=backend, max_grad_norm=1.0)
    for step in range(3):
        set_grads(params, step)
        state = [t for param in params for t in optimizer.state[param].values()]
        tensors = [*params, *state, *(param.grad for param in params)]
        versions = [tensor._version for tensor in tensors]
        optimizer.step()
        assert len(looks) == step + 1
        told = [new._version - old for new, old in zip(tensors, versions, strict=True)]
        assert told == [1] * (len(tensors) - len(params)) + [0] * len(params)
