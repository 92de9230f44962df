"""The GPU backends against the reference: on a GPU, or on the CPU in place of one.

Triton's interpreter is chosen when triton is imported, and the cuda backend's emulation is a
plugin, so test_triton.py and test_cuda.py run this file in processes of their own. By hand:
TRITON_INTERPRET=1 pytest tests/test_gpu_cases.py
PYTHONPATH=tests pytest -p cuda_emulator tests/test_gpu_cases.py
A program takes the interpreter some 50 ms, so tensors and steps are few.
"""

from __future__ import annotations

import gc
import inspect
import os
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from random import Random

import pytest
import torch
from torch import Tensor
from triton_interpreter import patch_language_once

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS, triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
EMULATED = BACKENDS["cuda"].unavailable(torch.device("cpu")) is None
DEVICE = torch.device("cpu" if INTERPRETED or EMULATED else "cuda")
if DEVICE.type == "cuda":
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(
            not torch.cuda.is_available(),
            reason="needs a GPU; test_triton.py and test_cuda.py run it without one",
        ),
    ]


@pytest.fixture(params=["triton"] if INTERPRETED else ["cuda"] if EMULATED else ["triton", "cuda"])
def backend(request) -> str:
    reason = BACKENDS[request.param].unavailable(DEVICE)
    if reason is not None and DEVICE.type == "cuda":
        pytest.skip(f"{request.param}: {reason}")
    return request.param


OPTIMIZERS = [AMAdamW, AMSGD]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# One whole block, whole blocks and a rest, several chunks, 0-dim, no elements.
SHAPES = [(256,), (24, 40), (5, 7, 11), (), (0, 3)]
if not INTERPRETED:
    SHAPES += [(1024,), (2048,), (16384,), (211, 223)]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Under the interpreter: a tensor of a thousand elements has several blocks and chunks."""
    if INTERPRETED:
        from adamem_fused.triton_kernels.config import Config

        config = Config(chunk=512, block=256, num_warps=1, partials=2, programs=3, longest_row=256)
        monkeypatch.setattr(triton, "_config", lambda device: config)


@pytest.fixture(autouse=True, scope="session")
def language():
    with pytest.MonkeyPatch.context() as patch:
        if INTERPRETED:
            patch_language_once(patch)
        yield


@pytest.fixture(autouse=True)
def rounding_cast(monkeypatch):
    """The interpreter cuts float32 off to bfloat16; a GPU rounds to the nearest even."""
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def to_nearest(value, from_dtype, to_dtype, rounding_mode):
        if from_dtype.is_fp32() and to_dtype.is_bf16():
            # torch views a dtype of another size only where there is a dimension.
            rounded = torch.from_numpy(value.copy().reshape(-1)).to(torch.bfloat16)
            return rounded.view(torch.int16).numpy().reshape(value.shape)
        return convert(value, from_dtype, to_dtype, rounding_mode)

    monkeypatch.setattr(interpreter, "_convert_float", to_nearest)


def random(*shape: int, seed: int = 0) -> Tensor:
    """The same numbers on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def make_params(shapes=SHAPES, dtype=torch.float32, seed=0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()
        for shape in shapes
    ]


def set_grads(params: list[Tensor], step: int, dtype=None) -> None:
    """Noisy gradients that turn around at every step, so that beta is inside of its range."""
    slope = -0.6 if step % 2 else 1.0
    for i, param in enumerate(params):
        grad = slope * param.detach().float() + 0.5 * random(*param.shape, seed=1000 * step + i)
        if dtype is not None:
            param.grad_dtype = dtype
        param.grad = grad.to(dtype or param.dtype)


def close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Within the tolerance, and for the small dtypes within the rounding of one result."""
    if actual.dtype in (torch.bfloat16, torch.float16):
        tolerance = torch.finfo(actual.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def compare(
    backend: str, cls, params: list[Tensor], steps=3, prepare=set_grads, lrs=None, **options
) -> list[float]:
    """Steps with the backend and the reference; returns all betas.

    The state is compared after each step and then made the same, so that one rounding in
    float32 that falls the other way is not carried on.
    """
    others = [param.detach().clone().requires_grad_() for param in params]
    ours = cls(params, backend=backend, **options)
    reference = cls(others, backend="reference", **options)
    betas = []
    for step in range(steps):
        prepare(params, step)
        for param, other in zip(params, others, strict=True):
            if param.grad is not None and param.grad.dtype != param.dtype:
                other.grad_dtype = param.grad.dtype
            other.grad = None if param.grad is None else param.grad.clone()
        if lrs is not None:
            for optimizer in (ours, reference):
                optimizer.param_groups[0]["lr"] = lrs[step]
        ours.step()
        reference.step()
        for param, other in zip(params, others, strict=True):
            tolerance = TOLERANCE[param.dtype if not param.is_complex() else torch.float32]
            close(param.detach(), other.detach(), tolerance)
            state, expected = ours.state[param], reference.state[other]
            assert state.keys() == expected.keys()
            for name in state:
                close(state[name], expected[name], tolerance)
            if expected:
                betas += expected["beta"].flatten().tolist()
            with torch.no_grad():
                param.copy_(other)
                for name in state:
                    state[name].copy_(expected[name])
    return betas


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_matches_the_reference(backend, cls, dtype):
    betas = compare(backend, cls, make_params(dtype=dtype), lr=0.05, weight_decay=0.1)
    inside = [beta for beta in betas if 0.001 < beta < 0.88]
    assert len(inside) > len(SHAPES) - 2, f"betas that are not cut off are few: {betas}"


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("plane", ["level", "anchored"])
def test_matches_the_reference_for_both_planes_and_scopes(backend, cls, scope, plane):
    params = make_params([(600,), (3,)])
    options = {"beta_scope": scope, "memory_plane": plane, "weight_decay": 0.0}
    betas = compare(backend, cls, params, lr=0.05, **options)
    assert any(0.001 < beta < 0.88 for beta in betas), betas


# Rows that lie several to a warp, rows that fill one and that no block holds; one row; no row; and
# tensors that are one segment.
ROW_SHAPES = [(6, 20), (5, 3, 9), (3, 300), (1, 40), (0, 16), (6, 15), (33,)]
if not INTERPRETED:
    ROW_SHAPES += [(3, 5000), (2, 40000)]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("plane", ["level", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_matches_the_reference_with_a_beta_a_row(backend, cls, plane, dtype):
    params = make_params(ROW_SHAPES, dtype)
    options = {"beta_scope": "row", "memory_plane": plane, "weight_decay": 0.1}
    betas = compare(backend, cls, params, lr=0.05, **options)
    rows = [6, 5, 3, 1, 0, 1, 1, *([] if INTERPRETED else [3, 2])]
    assert len(betas) == 3 * sum(rows)
    inside = {beta for beta in betas if 0.001 < beta < 0.88}
    assert len(inside) > 4, f"betas that are not cut off are few: {betas}"


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_that_do_not_lie_in_one_piece(backend, cls):
    params = [
        tensor.requires_grad_()
        for tensor in (random(20, 4).t(), random(3, 40)[:, ::2], random(4, 2, 3, 3)[1:])
    ]
    params.append(random(4, 2, 3, 3).to(memory_format=torch.channels_last).requires_grad_())
    compare(backend, cls, params, steps=2, lr=0.05, beta_scope="row")


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_beta_a_row_beside_one_a_tensor_and_one_for_all(backend, cls):
    params = make_params([(4, 30)] * 4)
    others = [param.detach().clone().requires_grad_() for param in params]
    scopes = ("row", "global", "tensor", "row")
    ours, reference = (
        cls(
            [
                {"params": [param], "beta_scope": scope}
                for param, scope in zip(own, scopes, strict=True)
            ],
            backend=name,
        )
        for own, name in ((params, backend), (others, "reference"))
    )
    for step in range(2):
        set_grads(params, step)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.clone()
        ours.step()
        reference.step()
    for param, other in zip(params, others, strict=True):
        close(param.detach(), other.detach(), 1e-5)
        close(ours.state[param]["beta"], reference.state[other]["beta"], 1e-5)
    assert [ours.state[param]["beta"].numel() for param in params] == [4, 1, 1, 4]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "scope, gap, tensor_lr",
    [("tensor", "gradient", False), ("global", "gradient", True), ("global", "loss", False)],
)
def test_zero_gradients_at_lr_0_are_without_effect(backend, cls, scope, gap, tensor_lr):
    """Before any other step, as checkpoint tools make state; also beside a tensor that has one."""
    lr = torch.zeros((), device=DEVICE) if tensor_lr else 0.0
    options = {"beta_scope": scope, "gap": gap, "weight_decay": 0.1, "backend": backend}
    late, early, expected = (
        cls(make_params([(600,), (3,), (0, 3)]), lr=lr, **options) for _ in range(3)
    )
    for optimizer, zeros in ((late, (0, 1, 2)), (early, (0, 2)), (expected, ())):
        params = optimizer.param_groups[0]["params"]
        set_grads(params, 0)
        for i, param in enumerate(params):
            if i in zeros:
                param.grad.zero_()
            elif optimizer is expected:
                param.grad = None
        optimizer.step(lambda: 1.0)
        counts = [
            optimizer.state[param]["step"].item() if optimizer.state[param] else 0
            for param in params
        ]
        assert counts == [0, int(optimizer is early), 0]
        optimizer.param_groups[0]["lr"] = 0.05
        # The tensor that had a gradient is another from here on.
        if optimizer is early:
            assert optimizer.state[params[1]][cls.memories[0]].count_nonzero() == 3
            continue
        for step in (1, 2):
            set_grads(params, step)
            optimizer.step(lambda step=step: 1 / step)
    for param, other in zip(*(o.param_groups[0]["params"] for o in (late, expected)), strict=True):
        assert torch.equal(param, other)
        for name, value in expected.state[other].items():
            assert torch.equal(late.state[param][name], value), name


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_several_groups_with_their_own_values_and_maximize(backend, cls):
    params = make_params([(300,), (7,), (5,)])
    cap = {"betas": (0.7, 0.9)} if cls is AMAdamW else {"beta_max": 0.5}
    groups = [
        {"params": params[:1], "lr": 0.1, "weight_decay": 0.0, "memory_lambda": 0.0},
        {"params": params[1:2], "maximize": True, "memory_plane": "anchored", **cap},
        {"params": params[2:], "lr": torch.tensor(0.02, dtype=torch.float64, device=DEVICE)},
    ]
    others = [param.detach().clone().requires_grad_() for param in params]
    twins = [{**group, "params": [others[i]]} for i, group in enumerate(groups)]
    ours, reference = cls(groups, backend=backend), cls(twins, backend="reference")
    for step in range(3):
        set_grads(params, step)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.clone()
        ours.step()
        reference.step()
    for param, other in zip(params, others, strict=True):
        close(param.detach(), other.detach(), 1e-5)
        close(ours.state[param]["beta"], reference.state[other]["beta"], 1e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("last", [None, "reference"])
def test_groups_with_a_shared_beta_beside_one_without(backend, cls, last):
    """With a second backend the sums are shared between begin and finish, outside of both."""
    scopes = ("global", "tensor", "global")
    backends = (backend, backend, last or backend)
    params = make_params([(700,), (30,), (40,)])
    others = [param.detach().clone().requires_grad_() for param in params]
    ours = cls(
        [
            {"params": [param], "beta_scope": scope, "backend": own}
            for param, scope, own in zip(params, scopes, backends, strict=True)
        ]
    )
    reference = cls(
        [
            {"params": [param], "beta_scope": scope}
            for param, scope in zip(others, scopes, strict=True)
        ],
        backend="reference",
    )
    for step in range(2):
        set_grads(params, step)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.clone()
        ours.step()
        reference.step()
    betas = [ours.state[param]["beta"].item() for param in params]
    assert betas[0] == betas[2] != betas[1]
    for param, other in zip(params, others, strict=True):
        close(param.detach(), other.detach(), 1e-5)
        close(ours.state[param]["beta"], reference.state[other]["beta"], 1e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_learning_rates_that_touch_zero(backend, cls):
    compare(backend, cls, make_params([(300,)]), steps=4, lrs=[0.0, 0.1, 0.0, 0.05])


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_lr_is_read_at_its_address(backend, cls, dtype):
    lr = torch.tensor(0.1, dtype=dtype, device=DEVICE)
    params = make_params([(300,)])

    def prepare(params, step):
        lr.fill_([0.1, 0.0, 0.05][step])
        set_grads(params, step)

    compare(backend, cls, params, prepare=prepare, lr=lr)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("plane", ["level", "anchored"])
def test_the_gap_from_losses(backend, cls, plane):
    params = make_params([(300,), (4,)])
    others = [param.detach().clone().requires_grad_() for param in params]
    options = {"gap": "loss", "beta_scope": "global", "memory_plane": plane, "lr": 0.05}
    ours = cls(params, backend=backend, **options)
    reference = cls(others, backend="reference", **options)
    for step in range(3):
        set_grads(params, step)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.clone()
        loss = torch.tensor(3.0 - 0.1 * step, device=DEVICE)
        ours.step(lambda loss=loss: loss)
        reference.step(lambda loss=loss: loss)
    for param, other in zip(params, others, strict=True):
        close(param.detach(), other.detach(), 1e-5)
        close(ours.state[param]["beta"], reference.state[other]["beta"], 1e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_mixed_dtypes_in_one_step(backend, cls):
    params = [
        param
        for dtype in (torch.float32, torch.bfloat16, torch.float64)
        for param in make_params([(300,)], dtype)
    ]
    # A beta of its own each: one over float32 sums would not be good to float64's tolerance.
    compare(backend, cls, params, steps=2, lr=0.05, beta_scope="tensor")


@pytest.mark.skipif(not hasattr(Tensor, "grad_dtype"), reason="this torch has no grad_dtype")
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_gradient_of_another_dtype(backend, cls):
    params = make_params([(700,)], torch.bfloat16)
    compare(
        backend, cls, params, prepare=lambda ps, step: set_grads(ps, step, torch.float32), lr=0.05
    )


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_float64_state_of_float32_parameters(backend, cls):
    (param,) = make_params([(300,)])
    optimizer = cls([param], backend=backend, lr=0.05)
    set_grads([param], 0)
    optimizer.step()
    for name in (*cls.memories, *cls.scalars):
        optimizer.state[param][name] = optimizer.state[param][name].double()
    other = param.detach().clone().requires_grad_()
    reference = cls([other], backend="reference", lr=0.05)
    reference.state[other] = {k: v.clone() for k, v in optimizer.state[param].items()}
    set_grads([param], 1)
    other.grad = param.grad.clone()
    optimizer.step()
    reference.step()
    for name, expected in reference.state[other].items():
        close(optimizer.state[param][name], expected, 1e-12)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("offset", [0, 1])
def test_unaligned_tensors(backend, cls, offset, monkeypatch):
    """One element past an aligned address no 16-byte access is possible: a GPU would fault."""
    hinted = []
    if INTERPRETED:
        from triton.runtime import interpreter

        def set_attr(handle, key, value):
            hinted.append(handle.data.reshape(-1)[0])

        monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    param = random(1024 + offset)[offset:].requires_grad_()
    assert (param.data_ptr() % 16 != 0) == bool(offset)
    compare(backend, cls, [param], steps=2, lr=0.05)
    assert all(address % 16 == 0 for address in hinted)
    if INTERPRETED:
        assert bool(hinted) != bool(offset)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_beta_where_the_memory_is_near_the_gradient(backend, cls):
    """num is then a sum of terms that cancel, a thousand times as large as den."""
    generator = torch.Generator().manual_seed(0)
    # Of one size, so that P is the same for all elements, and M a common factor.
    g, noise = torch.randn(2, 1000, generator=generator, dtype=torch.float64)
    g, ratio = g.sign(), 0.013 / 0.0117
    # With e this far from being orthogonal to g, beta is 1/2.
    e = 1e-3 * noise
    e -= (e @ g + (0.5 + ratio) / (1 + ratio) * (e @ e)) / (g @ g) * g
    betas = []
    for name in ("reference", backend):
        param = torch.zeros(1000, device=DEVICE, requires_grad=True)
        options = {"memory_plane": "anchored", "memory_lambda": 0.0, "beta_scope": "tensor"}
        optimizer = cls([param], lr=0.013, weight_decay=0.0, backend=name, **options)
        param.grad = g.to(param)
        optimizer.step()
        optimizer.param_groups[0]["lr"] = 0.0117
        optimizer.state[param][cls.memories[0]].copy_((g + e).to(param))
        optimizer.step()
        betas.append(optimizer.state[param]["beta"].item())
    assert 0.4 < betas[0] < 0.6
    assert betas[1] == pytest.approx(betas[0], rel=0, abs=5e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_gradient_whose_square_overflows_float32_leaves_all_finite(backend, cls):
    (param,) = make_params([(300,)])
    optimizer = cls([param], lr=0.05, backend=backend)
    for step in range(3):
        set_grads([param], step)
        if step == 1:
            param.grad[7] = 2e19
        optimizer.step()
        assert param.isfinite().all()
        assert all(value.isfinite().all() for value in optimizer.state[param].values())


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_infinite_gradient_goes_where_it_goes_in_the_reference(backend, weight_decay):
    results = []
    for name in ("reference", backend):
        (param,) = make_params([(300,)])
        optimizer = AMSGD([param], lr=0.05, weight_decay=weight_decay, backend=name)
        for step in range(3):
            set_grads([param], step)
            if step == 1:
                param.grad[7] = float("inf")
            optimizer.step()
        results.append(param.detach())
    if weight_decay == 0.0:
        assert results[0].isfinite().sum() == 299
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_a_cap_near_1(backend):
    """1 - beta is rounded once, not the difference of a rounded beta."""
    memories = []
    for name in ("reference", backend):
        param = torch.zeros(300, device=DEVICE, requires_grad=True)
        optimizer = AMAdamW([param], betas=(0.9999, 0.999), memory_lambda=0.0, backend=name)
        param.grad = torch.randn(300, generator=torch.Generator().manual_seed(0)).to(DEVICE)
        optimizer.step()
        memories.append(optimizer.state[param]["exp_avg"])
    torch.testing.assert_close(memories[1], memories[0], rtol=2e-6, atol=0.0)


def test_an_eps_of_zero(backend):
    """Beyond a tensor's end everything is 0, and so is the denominator."""
    compare(backend, AMAdamW, make_params([(300,)]), lr=0.05, eps=0.0)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_strided_parameters_and_gradients(backend, cls):
    base = random(20, 30)
    rest = base[:, 1::2].clone()
    params = [
        base[:, ::2].requires_grad_(),  # not dense
        random(6, 7).t().requires_grad_(),  # dense, gradient contiguous
        random(2, 3, 4, 5).contiguous(memory_format=torch.channels_last).requires_grad_(),
    ]
    compare(backend, cls, params, lr=0.05)
    assert torch.equal(base[:, 1::2], rest), "elements between those of a view were written to"


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_complex_parameters(backend, cls):
    def numbers(seed):
        return torch.view_as_complex(random(30, 2, seed=seed))

    def prepare(params, step):
        params[0].grad = params[0].detach() + numbers(seed=1 + step)

    compare(backend, cls, [numbers(seed=0).requires_grad_()], prepare=prepare, lr=0.05)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_parameters_that_get_a_gradient_now_and_then(backend, cls):
    def prepare(params, step):
        set_grads(params, step)
        params[step % 2].grad = None

    compare(backend, cls, make_params([(40,), (300,), (8,)]), prepare=prepare, lr=0.05)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_found_inf_leaves_everything_as_it_was(backend, cls, scope):
    params = make_params([(300,), ()])
    optimizer = cls(params, backend=backend, lr=0.05, beta_scope=scope)
    set_grads(params, 0)
    optimizer.step()
    before = [
        {"param": param.detach().clone()}
        | {k: v.clone() for k, v in optimizer.state[param].items()}
        for param in params
    ]
    for param in params:
        param.grad = torch.full_like(param, torch.inf)
    optimizer.grad_scale = torch.tensor(1024.0, device=DEVICE)
    optimizer.found_inf = torch.tensor(1.0, device=DEVICE)
    optimizer.step()
    for param, saved in zip(params, before, strict=True):
        after = {"param": param.detach(), **optimizer.state[param]}
        for name, value in saved.items():
            assert torch.equal(after[name], value), name


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_grad_scale_is_divided_out(backend, cls):
    params, others = make_params([(300,)]), make_params([(300,)])
    ours, reference = cls(params, backend=backend), cls(others, backend="reference")
    ours.grad_scale = torch.tensor(1024.0, device=DEVICE)
    ours.found_inf = torch.tensor(0.0, device=DEVICE)
    for step in range(2):
        set_grads(others, step)
        params[0].grad = others[0].grad * 1024
        ours.step()
        reference.step()
    close(params[0].detach(), others[0].detach(), 1e-5)
    close(ours.state[params[0]]["beta"], reference.state[others[0]]["beta"], 1e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_two_runs_give_the_same_bits(backend, cls):
    def run():
        params = make_params([(1300,), (40,)])
        optimizer = cls(params, backend=backend, lr=0.05)
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        return params

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def beta_of(optimizer, param) -> float:
    return optimizer.state[param]["beta"].item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_runs_beside_the_reference(backend, cls, dtype):
    """With a state of its own, and with guesses that hold and that miss, in one chunk and in many.

    A repair starts from what the guess has left, and errors would add up.
    """
    params, others = (make_params([*SHAPES, (1300,)], dtype) for _ in range(2))
    options = {"lr": 0.02, "weight_decay": 0.1, "beta_scope": "tensor"}
    ours, reference = (
        cls(params, backend=backend, **options),
        cls(others, backend="reference", **options),
    )
    caps, insides = 0, 0
    for step in range(4):
        set_grads(others, step // 2)
        for param, other in zip(params, others, strict=True):
            param.grad = other.grad.clone()
        ours.step()
        reference.step()
        for param, other in zip(params, others, strict=True):
            close(param.detach(), other.detach(), TOLERANCE[dtype])
            for name, expected in reference.state[other].items():
                close(ours.state[param][name], expected, TOLERANCE[dtype])
        betas = [beta_of(reference, other) for other in others if other.numel() > 100]
        caps += sum(beta > 0.88 for beta in betas)
        insides += sum(beta < 0.88 for beta in betas)
    assert caps > 1 and insides > 1


def state_of(optimizer) -> list[Tensor]:
    params = optimizer.param_groups[0]["params"]
    return [t for p in params for t in (p.detach(), *optimizer.state[p].values())]


def with_seam(backend: str, monkeypatch) -> None:
    """Every step in two halves, with rows between them."""
    module = BACKENDS[backend]
    for kind in ("adamw", "sgd"):
        begin, finish = getattr(module, f"{kind}_begin"), getattr(module, f"{kind}_finish")

        def both(batch, rows, *scaler, begin=begin, finish=finish):
            finish(batch, begin(batch, *scaler) if rows is None else rows, *scaler)

        monkeypatch.setattr(module, f"{kind}_finish", both)


@pytest.mark.parametrize(
    "cls, plane", [(AMAdamW, "level"), (AMAdamW, "anchored"), (AMSGD, "level")]
)
def test_a_step_with_a_seam_gives_the_bits_of_one_without(backend, cls, plane, monkeypatch):
    """With a step in between that found_inf leaves out: the next one finds all in order."""
    shapes = [(1300,), (300,), (0, 3)]

    def run():
        params = [param for dtype in TOLERANCE for param in make_params(shapes, dtype)]
        params.append(random(60, 30)[:, ::2].requires_grad_())  # goes through copies
        options = {"lr": 0.05, "weight_decay": 0.1, "beta_scope": "tensor", "memory_plane": plane}
        optimizer = cls(params, backend=backend, **options)
        optimizer.found_inf = torch.zeros((), device=DEVICE)
        optimizer.grad_scale = torch.ones((), device=DEVICE)
        for step, skipped in ((0, False), (0, True), (1, False)):
            set_grads(params, step)
            optimizer.found_inf.fill_(float(skipped))
            before = [value.clone() for value in state_of(optimizer)]
            optimizer.step()
            assert not skipped or all(map(torch.equal, state_of(optimizer), before))
            (cache,) = optimizer._kept.caches.values()
            layout = cache["tables"].layout
            assert not layout.arrived.any()
            # No step reads what another has left there.
            layout.partials.fill_(float("nan"))
            layout.coefficients.fill_(2.0)
        assert {optimizer.state[param]["step"].item() for param in params} == {2}
        assert any(0.001 < beta_of(optimizer, param) < 0.88 for param in params)
        return state_of(optimizer)

    whole = run()
    with_seam(backend, monkeypatch)
    for first, second in zip(whole, run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("skipped", [False, True])
def test_begin_writes_what_guesses_and_nothing_else(backend, skipped):
    """The "level" plane, where the types hold what the arithmetic gives; AM-SGD never."""
    found_inf = torch.tensor(float(skipped), device=DEVICE)
    strided = random(60, 30)[:, ::2].requires_grad_()
    for cls, plane, guesses in (
        (AMAdamW, "level", True),
        (AMAdamW, "anchored", False),
        (AMSGD, "level", False),
    ):
        params = [*make_params([(1300,), (5,)]), strided, *make_params([(300,)], torch.bfloat16)]
        optimizer = cls(params, lr=0.05, memory_plane=plane, backend=backend)
        set_grads(params, 0)
        optimizer.step()
        set_grads(params, 1)
        before = [value.clone() for value in state_of(optimizer)]
        (work,) = optimizer._collect()
        with torch.no_grad():
            rows = optimizer._begin(BACKENDS[backend], work.batch, None, found_inf)
        assert rows.isfinite().all()
        same = [torch.equal(a, b) for a, b in zip(state_of(optimizer), before, strict=True)]
        names = ["param", *optimizer.state[params[0]]]
        changed = guesses and not skipped
        expected = [
            name not in ("param", *cls.memories) or not changed or param.dtype == torch.bfloat16
            for param in params
            for name in names
        ]
        assert same == expected


@pytest.fixture
def programs_in_disorder(monkeypatch):
    """Triton's interpreter runs a launch's programs one after the other; this, on threads."""
    from triton.runtime import interpreter

    builder, local = interpreter.interpreter_builder, threading.local()
    place = property(lambda self: local.place, lambda self, at: setattr(local, "place", at))
    monkeypatch.setattr(interpreter.InterpreterBuilder, "grid_idx", place, raising=False)
    shuffle = Random(0).shuffle

    def run(executor, *args, **kwargs):
        constants = {k: v for k, v in kwargs.items() if k in executor.arg_names}
        scope = interpreter._patch_lang(executor.fn)
        values = {
            name: value if name in executor.constexprs else interpreter._implicit_cvt(value)
            for name, value in inspect.getcallargs(executor.fn, *args, **constants).items()
        }

        def program(at):
            builder.set_grid_idx(at, 0, 0)
            executor.fn(**values)

        (programs,) = executor.grid
        builder.set_grid_dim(programs, 1, 1)
        places = [*range(programs)]
        shuffle(places)
        with ThreadPoolExecutor(4) as pool:
            done = [pool.submit(program, at) for at in places]
        scope.restore()
        for each in done:
            each.result()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", run)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.skipif(not INTERPRETED, reason="elsewhere programs run side by side in every test")
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_programs_in_any_order_give_the_same_bits(cls, request):
    def run():
        params = make_params([(1300,), (5,), (0,), (2700,), (3,)])
        optimizer = cls(params, backend="triton", lr=0.05, beta_scope="tensor")
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        return state_of(optimizer)

    one = run()
    request.getfixturevalue("programs_in_disorder")
    for first, second in zip(one, run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_state_that_was_set_to_a_wrong_shape_is_refused(backend, cls):
    params = make_params([(8,), (40,)])
    optimizer = cls(params, backend=backend)
    set_grads(params, 0)
    optimizer.step()
    before = [param.detach().clone() for param in params]
    memory = cls.memories[0]
    optimizer.state[params[0]][memory] = torch.zeros(3, device=DEVICE)
    with pytest.raises(ValueError, match=rf"{memory} of tensor 0 has shape \[3\]"):
        optimizer.step()
    assert all(map(torch.equal, params, before))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_default_device_is_not_that_of_a_step(backend, cls):
    """torch.set_default_device("cuda"), say: what is uploaded is still made on the CPU."""

    def train(context):
        params = make_params([(300,), (4,)])
        optimizer = cls(params, backend=backend, lr=0.05)
        for step in range(2):
            set_grads(params, step)
            with context:
                optimizer.step()
        return params

    for here, elsewhere in zip(train(nullcontext()), train(torch.device("meta")), strict=True):
        assert torch.equal(here, elsewhere)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_nothing_is_kept_alive(backend, cls, scope):
    params = make_params([(8,), (4, 2)])
    params[1].data = params[1].data.t().contiguous().t()  # goes through copies
    optimizer = cls(params, backend=backend, beta_scope=scope)
    set_grads(params, 0)
    optimizer.step()
    tensors = [param.grad for param in params]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    kept = [weakref.ref(tensor.untyped_storage()) for tensor in tensors]
    kept += [weakref.ref(tensor) for tensor in tensors]
    del tensors
    optimizer.zero_grad()
    optimizer.state.clear()
    gc.collect()
    assert [reference() for reference in kept] == [None] * len(kept)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_compiled_step_is_the_step(backend, cls):
    if backend == "cuda" and DEVICE.type == "cpu":
        pytest.skip("the operators have the cuda backend's kernels for CUDA tensors alone")
    models = [make_params(SHAPES[:2]) for _ in range(2)]
    optimizers = [cls(params, lr=0.1, backend=backend) for params in models]
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]
    for i in range(3):
        for params, step in zip(models, steps, strict=True):
            set_grads(params, i)
            step()
    for a, b in zip(*models, strict=True):
        assert torch.equal(a, b)
