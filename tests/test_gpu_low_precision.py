"""What is stored in few bits, on the GPU backends and in the reference: on a GPU, or on the CPU.

As test_gpu_cases.py, whose helpers these are: test_triton.py and test_cuda.py run this file in
processes of their own. By hand: TRITON_INTERPRET=1 pytest tests/test_gpu_low_precision.py
"""

from __future__ import annotations

import pytest
import torch
from test_gpu_cases import (
    DEVICE,
    INTERPRETED,
    OPTIMIZERS,
    backend,
    close,
    language,
    make_params,
    programs_in_disorder,
    random,
    rounding_cast,
    set_grads,
    with_seam,
)
from torch import Tensor

from adamem_fused import AMAdamW, formats, storage
from adamem_fused.backends import triton

if DEVICE.type == "cuda":
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ]
__all__ = ["backend", "language", "programs_in_disorder", "rounding_cast"]  # fixtures

BF16, INT8 = {"state_dtype": torch.bfloat16}, {"state_dtype": "int8"}
ROUNDED, CORRECTED = {"stochastic_rounding": True}, {"store_param_remainders": True}
# The parameter's dtype, and the options.
FORMATS = {
    "float32, bfloat16": (torch.float32, BF16),
    "float32, int8": (torch.float32, INT8),
    "rounded": (torch.bfloat16, ROUNDED),
    "corrected": (torch.bfloat16, CORRECTED),
    "rounded, bfloat16": (torch.bfloat16, BF16 | ROUNDED),
    "nearest, int8": (torch.bfloat16, INT8),
    "corrected and rounded, int8": (torch.bfloat16, INT8 | CORRECTED | ROUNDED),
}
# Of a tensor whose gradients keep their direction, and so its beta is at the cap.
AT_CAP = (65, 64)
# By scope. Rows with blocks of 256, 128 and 64; without blocks, of a length that allows no 16-byte
# access; that no program holds. Tensors of one chunk, and of several; a small one.
SHAPES = {
    "row": [(17, 256), (33, 128), (90, 50)],
    "tensor": [(4096,), AT_CAP],
    "global": [(24, 192), (9, 5)],
}
SHAPES["row"].append((2, 64 * 33) if INTERPRETED else (3, 64 * 300))
SHAPES["tensor"].append((4160,) if INTERPRETED else (8256,))


@pytest.fixture(autouse=True)
def blocks(monkeypatch):
    """Under the interpreter: a tensor has several chunks."""
    if INTERPRETED:
        from adamem_fused.triton_kernels.config import Config

        config = Config(
            chunk=4096, block=4096, num_warps=1, partials=2, programs=3, longest_row=512
        )
        monkeypatch.setattr(triton, "_config", lambda device: config)


def make(cls, name, formats, shapes=SHAPES, **options):
    """A group for each format and scope. shapes: by scope."""
    groups = [
        {"params": make_params(own_shapes, dtype, seed=i), "beta_scope": scope, **own}
        for i, (dtype, own) in enumerate(formats)
        for scope, own_shapes in shapes.items()
    ]
    return cls(groups, backend=name, **{"lr": 0.05, "weight_decay": 0.1, **options})


def params_of(optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def values_of(optimizer, param: Tensor) -> dict[str, Tensor]:
    return {"param": param.detach(), **optimizer.state[param]}


def all_values(optimizer) -> list[Tensor]:
    return [v.clone() for p in params_of(optimizer) for v in values_of(optimizer, p).values()]


def same_bits(one: list[Tensor], other: list[Tensor]) -> bool:
    """NaN too."""
    pairs = zip(one, other, strict=True)
    return all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in pairs if a.dim())


def as_ordered(value: Tensor) -> Tensor:
    """bfloat16 numbers counted: neighbours are 1 apart."""
    words = value.view(torch.int16).int()
    return torch.where(words < 0, -(words & 0x7FFF), words)


def set_both_grads(params: list[Tensor], step: int) -> None:
    """Those of tensors whose beta is inside of its range, and of those that have it at the cap."""
    last = [param.grad for param in params]
    set_grads(params, step)
    for param, grad in zip(params, last, strict=True):
        if grad is not None and param.shape == AT_CAP:
            param.grad = 2 * grad


def check_betas(optimizer) -> None:
    """That some guess, of those that are made, holds, and some is repaired."""
    at_cap = set()
    for group in optimizer.param_groups:
        if group["beta_scope"] == "tensor":
            cap = group["betas"][0] if "betas" in group else group["beta_max"]
            at_cap |= {optimizer.state[p]["beta"].item() > 0.999 * cap for p in group["params"]}
    assert at_cap == {False, True}


def check_close(ours: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Equal but where a rounding falls on the other side of what is stored."""
    assert ours.keys() == expected.keys()
    # A repair begins with what was rounded, and so, where that fell on the other side, with others.
    repaired = "exp_avg_sq" in ours and ours["beta"].dim() == 0
    is_low = repaired and ours["exp_avg_sq"].dtype == torch.bfloat16
    for name, value in ours.items():
        other = expected[name]
        assert value.dtype == other.dtype, name
        if name == "param" and "param_remainder" in ours:
            value = formats.join(value, ours["param_remainder"])
            other = formats.join(other, expected["param_remainder"])
            close(value, other, 2.0**-15)
            equal = value == other
        elif value.dtype == torch.bfloat16 or (is_low and name == "param"):
            wrong = (value - other).abs()
            if value.dtype == torch.bfloat16:
                apart = (as_ordered(value) - as_ordered(other)).abs()
                equal = apart == 0
                # Where much has cancelled out, float32 and float64 are further apart.
                near = (apart <= 1) | (wrong < 1e-6)
            else:
                equal = near = wrong <= 1e-5 * (1 + other.abs())
            assert int((~near).sum()) <= (1 + value.numel() // 10_000 if repaired else 0), name
            assert bool((near | (wrong <= 2.0**-7 * other.abs().max())).all()), name
        elif name.endswith("_codes"):
            apart = (value.int() - other.int()).abs()
            assert apart.max() <= 1, name
            equal = apart == 0
        elif name == "param_remainder":
            continue
        else:
            torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-5, equal_nan=True)
            continue
        others = int((~equal).sum())
        assert others <= max(1, equal.numel() // 50), f"{name}: {others} of {equal.numel()}"


def compare(ours, reference, steps=2, prepare=set_both_grads) -> None:
    """Steps of both; the state is compared after each and then made the same."""
    params, others = params_of(ours), params_of(reference)
    for step in range(steps):
        prepare(params, step)
        for param, other in zip(params, others, strict=True):
            other.grad = param.grad.clone()
        ours.step()
        reference.step()
        for param, other in zip(params, others, strict=True):
            own, expected = values_of(ours, param), values_of(reference, other)
            check_close(own, expected)
            with torch.no_grad():
                for name, value in own.items():
                    value.copy_(expected[name])


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("name", FORMATS)
def test_matches_the_reference(backend, cls, name):
    ours, reference = (make(cls, own, [FORMATS[name]]) for own in (backend, "reference"))
    compare(ours, reference)
    betas = torch.cat([ours.state[param]["beta"].flatten() for param in params_of(ours)])
    inside = (betas > 0.001) & (betas < 0.88)
    assert inside.double().mean() > 0.25, f"betas that are not cut off are few: {betas}"
    check_betas(ours)
    low = [param for param in params_of(ours) if param.numel() >= storage.LEAST_NUMEL]
    state = ours.state[low[0]]
    assert ("param_remainder" in state) == ("corrected" in name)
    assert (f"{cls.memories[0]}_codes" in state) == ("int8" in name)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_what_no_16_byte_access_reaches(backend, cls, monkeypatch):
    """Parameters an element past an aligned address, and remainders of rows of 24: a GPU would
    fault."""
    hinted = []
    if INTERPRETED:
        from triton.runtime import interpreter

        def set_attr(handle, key, value):
            hinted.append(handle.data.reshape(-1)[0])

        monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    sides = []
    for name in (backend, "reference"):
        buffer = random(2 * 4608 + 1).bfloat16()
        params = [buffer[1:4609].view(18, 256), buffer[4609:].view(192, 24)]
        options = {**INT8, **CORRECTED, "backend": name, "beta_scope": "row"}
        sides.append(cls([param.requires_grad_() for param in params], **options))
        edge = buffer[0].clone()
    compare(*sides, steps=1)
    assert buffer[0] == edge
    assert all(address % 16 == 0 for address in hinted)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_parameters_set_to_zero_are_zero(backend, cls):
    """The remainder that one has kept would make a NaN of it."""
    shapes = {"row": [(17, 256)], "tensor": [(4096,)]}
    ours, reference = (
        make(cls, name, [FORMATS["corrected"]], shapes) for name in (backend, "reference")
    )
    compare(ours, reference, steps=1)
    with torch.no_grad():
        for param in (*params_of(ours), *params_of(reference)):
            param.zero_()
    compare(ours, reference, steps=1)
    assert all(param.isfinite().all() for param in params_of(ours))


def run(cls, name, steps=2, **options) -> list[Tensor]:
    """Several formats together, after some steps and one that found_inf leaves out."""
    # Halves by themselves do not share a beta.
    names, shapes = FORMATS, {scope: SHAPES[scope] for scope in ("row", "tensor")}
    if INTERPRETED:
        names = ["float32, int8", "rounded, bfloat16", "corrected and rounded, int8"]
        shapes = {"row": [(17, 256)], "tensor": SHAPES["tensor"]}
    optimizer = make(cls, name, [FORMATS[own] for own in names], shapes, **options)
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    optimizer.grad_scale = torch.full((), 2.0, device=DEVICE)
    for step in range(steps):
        set_both_grads(params_of(optimizer), step)
        optimizer.step()
        for cache in optimizer._kept.caches.values():
            layout = cache["tables"].layout
            assert not layout.arrived.any()
            # No step reads what another has left there.
            layout.partials.fill_(float("nan"))
            layout.coefficients.fill_(2.0)
        if step == 0:
            before = all_values(optimizer)
            optimizer.found_inf.fill_(1.0)
            optimizer.step()
            assert all(map(torch.equal, all_values(optimizer), before))
            optimizer.found_inf.fill_(0.0)
    if steps > 1:
        check_betas(optimizer)
    return all_values(optimizer)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_halves_have_the_bits_of_whole_steps(backend, cls, monkeypatch):
    whole = run(cls, backend)
    with_seam(backend, monkeypatch)
    assert same_bits(whole, run(cls, backend))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_two_runs_have_the_same_bits_and_another_seed_has_others(backend, cls):
    values = [run(cls, backend, steps=1, seed=seed) for seed in (3, 3, 4)]
    assert same_bits(*values[:2])
    assert not same_bits(*values[1:])


@pytest.mark.skipif(not INTERPRETED, reason="elsewhere programs run side by side in every test")
def test_programs_in_any_order_give_the_same_bits(request):
    one = run(AMAdamW, "triton", steps=1)
    request.getfixturevalue("programs_in_disorder")
    assert same_bits(one, run(AMAdamW, "triton", steps=1))


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_replays_have_the_bits_of_steps(backend, cls):
    """The bits of the step that it is, not of the one that was captured."""
    sides = []
    for captured in (True, False):
        optimizer = make(cls, backend, FORMATS.values())
        params = params_of(optimizer)
        set_grads(params, 0)
        kept = [param.grad for param in params]
        optimizer.step()
        step = optimizer.step
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
        for k in range(1, 4):
            set_grads(params, k)
            for param, grad in zip(params, kept, strict=True):
                grad.copy_(param.grad)
                param.grad = grad
            step()
        sides.append(all_values(optimizer))
    assert same_bits(*sides)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_many_small_tensors_beside_a_large_one(backend, cls):
    """Norms and biases keep float32 memories, and are rounded as their group says."""
    shapes = [(8,)] * (20 if INTERPRETED else 4000) + [(40, 256)]
    format = (torch.bfloat16, INT8 | ROUNDED)
    sides = (make(cls, name, [format], {"tensor": shapes}) for name in (backend, "reference"))
    ours, reference = sides
    compare(ours, reference)
    state = ours.state[params_of(ours)[0]]
    assert state[cls.memories[0]].dtype == torch.float32


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "offset, stretch, skip",
    [
        (2**32 - 3000, 0, 0),
        (5 * 2**40 + 7, 0, 0),
        (5, 96, 160),
        (2**31, 700, 2**31 + 5),
        (1, 2**33, 2**35),
    ],
)
def test_bits_by_places_in_the_whole_tensor(backend, cls, offset, stretch, skip, monkeypatch):
    """Of a shard: behind 2^32 elements, and with others' elements between its own."""
    monkeypatch.setattr(storage.sharding, "place_of", lambda param: (offset, stretch, skip))
    format = (torch.bfloat16, BF16 | ROUNDED)
    shapes = {"tensor": [(24, 192)], "row": [(24, 192), (9, 500)]}
    ours, reference = (make(cls, name, [format], shapes) for name in (backend, "reference"))
    compare(ours, reference, steps=1)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"])
def test_blocks_of_all_kinds(backend, cls, state_dtype):
    """Of zeros, of numbers that are next to none, with a huge one, with NaN and with infinity."""

    def prepare(params, step):
        set_grads(params, step)
        for param in params:
            param.grad[0] = 0.0
            param.grad[1] *= 1e-16
            param.grad[2, 100] = 1e15
            if step == 1:
                param.grad[3, 7] = float("nan")
                param.grad[4, 200] = float("inf")

    format = (torch.float32, {"state_dtype": state_dtype})
    ours, reference = (
        make(cls, name, [format], {"row": [(17, 256)]}, weight_decay=0.0)
        for name in (backend, "reference")
    )
    compare(ours, reference, prepare=prepare, steps=1)
    (param,), (other,) = params_of(ours), params_of(reference)
    prepare([param], 1)
    other.grad = param.grad.clone()
    for optimizer in (ours, reference):
        optimizer.step()
    for memory in cls.memories:
        value, expected = (
            storage.memory_value(own, memory, optimizer.state[own])
            for own, optimizer in ((param, ours), (other, reference))
        )
        assert torch.equal(value.isnan(), expected.isnan())
        assert torch.equal(value.isinf(), expected.isinf())
        assert value[3, 7].isnan() and not value[4, 200].isfinite()
        assert state_dtype != "int8" or not value[3:5].isfinite().any()
        assert value[[0, 1, 2, 5, 16]].isfinite().all() and not value[0].any()
        if memory == "exp_avg_sq":
            assert (value[2] > 0).all()


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_step_that_is_none_leaves_every_bit(backend, cls):
    """At lr 0, without a gradient and a memory, of the rows that have none."""
    format = (torch.bfloat16, INT8 | CORRECTED | ROUNDED)
    optimizer = make(cls, backend, [format], {"row": [(17, 256)], "tensor": [(17, 256)]}, lr=0.0)
    params = params_of(optimizer)
    set_grads(params, 0)
    optimizer.step()
    for param in params:
        state = optimizer.state[param]
        state["step"].zero_()
        rows = slice(3) if state["beta"].dim() > 0 else slice(None)
        state[f"{cls.memories[0]}_codes"][rows] = 0
        param.grad[rows] = 0.0
    before = [{k: v.clone() for k, v in values_of(optimizer, p).items()} for p in params]
    optimizer.step()
    for param, old, rows in zip(params, before, (slice(3), slice(None)), strict=True):
        for name, value in values_of(optimizer, param).items():
            if value.dim() > 1:
                assert torch.equal(value[rows], old[name][rows]), name
    assert [optimizer.state[param]["step"].item() for param in params] == [1, 0]
