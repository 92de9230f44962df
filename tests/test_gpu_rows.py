"""beta_scope="row" of the GPU backends against the reference: on a GPU, or on the CPU.

As test_gpu_cases.py, whose fixtures and helpers these are: test_triton.py runs this file in a
process of its own. By hand: TRITON_INTERPRET=1 pytest tests/test_gpu_rows.py
"""

from __future__ import annotations

import pytest
import torch
from test_gpu_cases import (
    DEVICE,
    INTERPRETED,
    OPTIMIZERS,
    TOLERANCE,
    backend,
    close,
    compare,
    language,
    make_params,
    programs_in_disorder,
    random,
    rounding_cast,
    set_grads,
    small_blocks,
    state_of,
    with_seam,
)
from torch import Tensor

from adamem_fused import AMAdamW
from adamem_fused.backends import BACKENDS

if DEVICE.type == "cuda":
    pytestmark = [
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    ]
# Fixtures.
__all__ = ["backend", "language", "programs_in_disorder", "rounding_cast", "small_blocks"]

# Longer than a program can hold; of several chunks.
LONG = 700 if INTERPRETED else 20_000
# Several to a program, of lengths that allow 16-byte accesses or not; a chunk of many; one to a
# program; none; one that is its tensor; a vector, which is one segment.
SHAPES = [(6, 16), (3, 17), (40, 2, 3, 3), (3, 200), (2, LONG), (1, 40), (0, 20), (7,)]
ROWS = {"beta_scope": "row", "lr": 0.05, "weight_decay": 0.1}


def test_the_shapes_are_what_they_are_said_to_be():
    (cls, *_), params = OPTIMIZERS, make_params(SHAPES)
    set_grads(params, 0)
    optimizer = cls(params, backend="reference", **ROWS)
    optimizer.step()
    shapes = [tuple(optimizer.state[param]["beta"].shape) for param in params]
    assert shapes == [(6,), (3,), (40,), (3,), (2,), (1,), (0,), ()]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_match_the_reference(backend, cls, dtype):
    betas = compare(backend, cls, make_params(SHAPES, dtype), **ROWS)
    inside = [beta for beta in betas if 0.001 < beta < 0.88]
    assert len(inside) > len(betas) // 4, f"betas that are not cut off are few: {betas}"


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_match_the_reference_with_the_anchored_plane(backend, cls):
    options = {**ROWS, "weight_decay": 0.0, "memory_plane": "anchored"}
    betas = compare(backend, cls, make_params(SHAPES), **options)
    assert any(0.001 < beta < 0.88 for beta in betas), betas


def test_rows_with_an_eps_of_zero(backend):
    """Beyond a row's end everything is 0, and so is the denominator."""
    compare(backend, AMAdamW, make_params([(3, 20)]), steps=2, eps=0.0, **ROWS)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_at_learning_rates_that_touch_zero(backend, cls):
    params = make_params([(4, 20), (2, LONG)])
    compare(backend, cls, params, steps=4, lrs=[0.0, 0.1, 0.0, 0.05], beta_scope="row")


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_however_they_lie_in_memory(backend, cls):
    base = random(20, 50)
    rest = base[:, 1::2].clone()
    params = [
        base[:, ::2].requires_grad_(),  # not dense
        random(19, 7).t().requires_grad_(),  # dense, but no row of it
        random(3, 4, 3, 2).contiguous(memory_format=torch.channels_last).requires_grad_(),
        random(4, 2, 20).transpose(0, 1).requires_grad_(),
    ]
    compare(backend, cls, params, **ROWS)
    assert torch.equal(base[:, 1::2], rest), "elements between those of a view were written to"


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_of_complex_numbers(backend, cls):
    def numbers(seed):
        return torch.view_as_complex(random(5, 20, 2, seed=seed))

    def prepare(params, step):
        params[0].grad = params[0].detach() + numbers(seed=1 + step)

    compare(backend, cls, [numbers(seed=0).requires_grad_()], prepare=prepare, **ROWS)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("length, offset", [(64, 0), (64, 1), (50, 0)])
def test_rows_where_16_bytes_are_no_access(backend, cls, length, offset, monkeypatch):
    """One element past an aligned address, or with rows that end beside one: a GPU would fault."""
    hinted = []
    if INTERPRETED:
        from triton.runtime import interpreter

        def set_attr(handle, key, value):
            hinted.append(handle.data.reshape(-1)[0])

        monkeypatch.setattr(interpreter.TensorHandle, "set_attr", set_attr)
    buffer = random(5 * length + 2)
    edges = buffer[:offset].clone(), buffer[5 * length + offset :].clone()
    param = buffer[offset : 5 * length + offset].view(5, length).requires_grad_()
    compare(backend, cls, [param], steps=2, **ROWS)
    assert torch.equal(buffer[:offset], edges[0])
    assert torch.equal(buffer[5 * length + offset :], edges[1])
    assert all(address % 16 == 0 for address in hinted)
    if INTERPRETED:
        assert bool(hinted) == (length % 8 == 0 and offset == 0)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_row_without_a_gradient_has_beta_0(backend, cls):
    """A token that is not in the batch: its memory is dropped."""
    params = make_params([(6, 20), (3, LONG)])

    def prepare(params, step):
        set_grads(params, step)
        if step > 0:
            for param in params:
                param.grad[1:3] = 0.0

    compare(backend, cls, params, prepare=prepare, beta_scope="row", lr=0.05)
    optimizer = cls(params, backend=backend, beta_scope="row", lr=0.05)
    for step in range(2):
        prepare(params, step)
        optimizer.step()
    for param in params:
        assert not optimizer.state[param]["beta"][1:3].any()


def run(cls, name, **options) -> list[Tensor]:
    """Parameters and state after some steps, with one that found_inf leaves out."""
    params = [param for dtype in TOLERANCE for param in make_params(SHAPES, dtype)]
    params.append(random(20, 50)[:, ::2].requires_grad_())  # goes through copies
    optimizer = cls(params, backend=name, **ROWS, **options)
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    optimizer.grad_scale = torch.full((), 2.0, device=DEVICE)
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
    return state_of(optimizer)


@pytest.mark.parametrize(
    "cls, plane", [(AMAdamW, "level"), (AMAdamW, "anchored"), (OPTIMIZERS[1], "level")]
)
def test_rows_in_halves_have_the_bits_of_whole_ones(backend, cls, plane, monkeypatch):
    whole = run(cls, backend, memory_plane=plane)
    with_seam(backend, monkeypatch)
    halves = run(cls, backend, memory_plane=plane)
    assert all(map(torch.equal, whole, halves))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("skipped", [False, True])
def test_begin_only_reads_rows(backend, cls, skipped):
    params = make_params([(6, 20), (5, 17), (0, 20)])
    optimizer = cls(params, backend=backend, **ROWS)
    reference = cls(
        [param.detach().clone().requires_grad_() for param in params], backend="reference", **ROWS
    )
    for own in (optimizer, reference):
        for step in (0, 1):
            set_grads(own.param_groups[0]["params"], step)
            if step == 0:
                own.step()
    before = [value.clone() for value in state_of(optimizer)]
    found_inf = torch.tensor(float(skipped), device=DEVICE)
    rows = []
    for own in (optimizer, reference):
        (work,) = own._collect()
        with torch.no_grad():
            rows.append(own._begin(work.backend, work.batch, None, found_inf))
    assert all(map(torch.equal, state_of(optimizer), before))
    assert rows[0].shape == (11, 2)
    close(rows[0], torch.zeros_like(rows[1]) if skipped else rows[1], 1e-4)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("halves", [False, True])
def test_a_first_step_at_lr_0_is_none_of_rows_without_a_gradient(backend, cls, halves, monkeypatch):
    if halves:
        with_seam(backend, monkeypatch)
    shapes = [(6, 20), (3, LONG), (4, 16), (2, LONG), (0, 20)]
    results = []
    for name in (backend, "reference"):
        params = make_params(shapes)
        optimizer = cls(params, backend=name, **{**ROWS, "lr": 0.0})
        set_grads(params, 0)
        for param, idle in zip(params, ([0, 2], [1], slice(None), slice(None), []), strict=True):
            param.grad[idle] = 0.0
        optimizer.step()
        steps = [optimizer.state[param]["step"].item() for param in params]
        assert steps == [1, 1, 0, 0, 0]
        memories = [optimizer.state[param][cls.memories[0]] for param in params]
        assert not memories[0][0].any() and memories[0][1].any()
        assert not memories[1][1].any() and memories[1][0].any()
        for group in optimizer.param_groups:
            group["lr"] = 0.05
        results.append(state_of(optimizer))
    for ours, expected in zip(*results, strict=True):
        close(ours, expected, 1e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_tensor_without_rows_counts_its_steps(backend, cls):
    params = make_params([(0, 20)])
    optimizer = cls(params, backend=backend, **ROWS)
    for count in (1, 2):
        set_grads(params, 0)
        optimizer.step()
        state = optimizer.state[params[0]]
        assert state["step"].item() == count
        assert state["prev_lr"].item() == pytest.approx(0.05)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_without_elements_take_beta_by_the_formula(backend, cls):
    """As a shard of columns may have them."""
    betas = []
    for name in (backend, "reference"):
        batch = empty_rows(cls)
        kind = "adamw" if cls is AMAdamW else "sgd"
        for _ in range(2):
            getattr(BACKENDS[name], f"{kind}_finish")(batch, None, None, None)
        betas.append([*batch.betas, *batch.steps])
        assert batch.steps[0].item() == 2
    assert all(map(torch.equal, *betas))


def empty_rows(cls):
    """A batch of a parameter of shape [5, 0] with a beta a row."""
    params = make_params([(5, 20)])
    optimizer = cls(params, backend="reference", **ROWS)
    set_grads(params, 0)
    (work,) = optimizer._collect()
    batch = work.batch
    for tensors in (batch.params, batch.grads, *batch.memories.values()):
        tensors[0] = torch.zeros(5, 0, device=DEVICE)
    return batch


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_nan_stays_in_its_row(backend, cls):
    params = make_params([(6, 20), (3, LONG)])
    optimizer = cls(params, backend=backend, **ROWS)
    for step in range(2):
        set_grads(params, step)
        if step == 1:
            for param in params:
                param.grad[1, 3] = float("nan")
        optimizer.step()
    for param in params:
        tensors = [param.detach(), *optimizer.state[param].values()]
        rows = [tensor for tensor in tensors if tensor.dim() > 0]
        assert all(tensor[[0, 2]].isfinite().all() for tensor in rows)
        assert optimizer.state[param]["beta"][1].isnan()
        assert param[1].isnan().all()


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("last", [None, "reference"])
def test_rows_beside_a_shared_beta_and_one_a_tensor(backend, cls, last):
    """With a second backend the sums are shared between begin and finish, outside of both."""
    scopes = ("row", "global", "tensor", "row", "global")
    backends = (backend, backend, backend, backend, last or backend)
    shapes = [(6, 20), (700,), (5, 17), (2, LONG), (40,)]
    params = make_params(shapes)
    others = [param.detach().clone().requires_grad_() for param in params]
    ours, reference = (
        cls(
            [
                {"params": [param], "beta_scope": scope, "backend": own}
                for param, scope, own in zip(tensors, scopes, names, strict=True)
            ]
        )
        for tensors, names in ((params, backends), (others, ("reference",) * 5))
    )
    for step in range(3):
        set_grads(others, step)
        for param, other in zip(params, others, strict=True):
            param.grad = other.grad.clone()
        ours.step()
        reference.step()
    for param, other in zip(params, others, strict=True):
        close(param.detach(), other.detach(), 2e-5)
        close(ours.state[param]["beta"], reference.state[other]["beta"], 2e-5)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_with_a_state_of_float64(backend, cls):
    """Of a float32 parameter: the arithmetic is float64 then."""
    (param,) = make_params([(4, 20)])
    optimizer = cls([param], backend=backend, **ROWS)
    set_grads([param], 0)
    optimizer.step()
    for name in optimizer.state[param]:
        optimizer.state[param][name] = optimizer.state[param][name].double()
    other = param.detach().clone().requires_grad_()
    reference = cls([other], backend="reference", **ROWS)
    reference.state[other] = {k: v.clone() for k, v in optimizer.state[param].items()}
    set_grads([param], 1)
    other.grad = param.grad.clone()
    optimizer.step()
    reference.step()
    for name, expected in reference.state[other].items():
        close(optimizer.state[param][name], expected, 1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_rows_are_rounded_once(backend, dtype):
    """As the reference's, but where the exact value lies between two: far from all would be
    the same after a repair, which starts from what has been rounded."""
    params, others = (make_params([(40, 64)], dtype) for _ in range(2))
    ours, reference = (
        AMAdamW(own, backend=name, lr=1e-3, beta_scope="row")
        for own, name in ((params, backend), (others, "reference"))
    )
    for step in range(3):
        set_grads(others, step)
        params[0].grad = others[0].grad.clone()
        ours.step()
        reference.step()
    same = (params[0] == others[0]).double().mean().item()
    assert same > 0.99


@pytest.mark.skipif(not INTERPRETED, reason="elsewhere programs run side by side in every test")
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("lr", [0.05, 0.0])
def test_programs_in_any_order_give_the_same_bits_of_rows(cls, lr, request):
    """At lr 0 rows count the step of their tensor, each of those with a gradient."""

    def train():
        params = make_params([(100, 20), (4, LONG), (6, 17)])
        optimizer = cls(params, backend="triton", lr=lr, beta_scope="row")
        for step in range(2):
            set_grads(params, step)
            optimizer.step()
        return state_of(optimizer)

    one = train()
    request.getfixturevalue("programs_in_disorder")
    assert all(map(torch.equal, one, train()))
