"""The foreach backend: without float64, in slices, by row, and what memory it takes."""

import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_lockstep,
    assert_same_bits,
    assert_step_agrees,
    each_pair,
    make_optimizer,
    parameters,
    random_tensor,
    restore,
    set_gradients,
    snapshot,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamem_fused import AMSGD, AMAdamW, clipping
from adamem_fused import optimizer as step_module
from adamem_fused.backends import batch, foreach

both = pytest.mark.parametrize("cls", OPTIMIZERS)
PLANES, SCOPES = ("level", "anchored"), ("tensor", "row", "global")
LRS = (0.01, 0.0, torch.tensor(0.01), torch.tensor(0.0))
planes = pytest.mark.parametrize("plane", PLANES)
scopes = pytest.mark.parametrize("scope", SCOPES)


def pair(cls, groups, **options):
    return [make_optimizer(cls, groups, name, **options) for name in ("reference", "foreach")]


# ---- a device without float64 ------------------------------------------------------


class WithoutFloat64(TorchDispatchMode):
    """Stands in for a device such as Apple's, where a tensor of float64 cannot be made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs, result)):
            assert not (isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64), func
            assert leaf is not torch.float64, func
        return result


def no_float64(monkeypatch):
    for module in (foreach, clipping, step_module):
        monkeypatch.setattr(module, "bookkeeping_dtype", lambda device: torch.float32)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_where_there_may_be_no_float64_scalars_are_float32(device):
    assert batch.bookkeeping_dtype(torch.device(device)) == torch.float32


@each_pair("cls, plane, scope, lr", OPTIMIZERS, PLANES, SCOPES, LRS)
def test_steps_without_float64_agree_with_the_reference(monkeypatch, cls, plane, scope, lr):
    no_float64(monkeypatch)
    groups = [
        Group([(3,), (4, 50), ()], options={"weight_decay": 0.1}),
        Group([(70_000,), (0,)], options={"maximize": True}),
        Group([(30, 40)], torch.bfloat16),
    ]
    options = {"memory_plane": plane, "beta_scope": scope, "lr": lr}
    reference, ours = pair(cls, groups, **options)
    step = ours.step

    def step_without_float64(closure=None):
        with WithoutFloat64():
            step()

    ours.step = step_without_float64
    assert_lockstep(reference, ours, 6, conditioned=True)


@both
def test_a_difference_of_losses_without_float64(monkeypatch, cls):
    no_float64(monkeypatch)
    reference, ours = pair(cls, [Group([(300,), (4, 50)])], beta_scope="global", gap="loss")
    for step in range(6):
        set_gradients(reference, ours, step=step)
        loss = torch.tensor(50.0 * 0.9**step)
        before = snapshot(reference)
        reference.step(lambda loss=loss: loss)
        with WithoutFloat64():
            ours.step(lambda loss=loss: loss)
    losses = [twin.state[parameters(twin)[0]].pop("prev_loss") for twin in (reference, ours)]
    assert losses == [loss, loss]
    assert_step_agrees(ours, reference, before)


@both
def test_clipping_and_skipping_without_float64(monkeypatch, cls):
    no_float64(monkeypatch)
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    reference, ours = pair(cls, [Group([(4, 20), (3,)])], beta_scope="tensor", **options)
    for step in range(4):
        set_gradients(reference, ours, step=step)
        if step == 2:
            parameters(ours)[1].grad[0] = float("inf")
        before = snapshot(reference)
        restore(ours, before)
        reference.step()
        with WithoutFloat64():
            ours.step()
        assert_step_agrees(ours, reference, before)
        assert ours.grad_norm.dtype == torch.float32
        torch.testing.assert_close(ours.grad_norm, reference.grad_norm.float(), rtol=1e-6, atol=0)
    assert ours.skipped_steps.item() == 1


@both
def test_an_idle_step_without_float64_changes_nothing(monkeypatch, cls):
    no_float64(monkeypatch)
    idling = make_optimizer(cls, [Group([(3,), (4,)])], "foreach", lr=torch.tensor(0.0))
    idle, moving = parameters(idling)
    idle.grad, moving.grad = torch.zeros(3), torch.full((4,), 1e-3)
    with WithoutFloat64():
        idling.step()
    assert [idling.state[param]["step"].item() for param in (idle, moving)] == [0, 1]


# ---- slices and small tensors ------------------------------------------------------


@both
@planes
@scopes
def test_slices_and_tensors_together_give_the_step(monkeypatch, cls, plane, scope):
    """Tensors of more than 10 elements by themselves, and of more than 80 in slices."""
    monkeypatch.setattr(foreach, "_most_elements", lambda device: 80)
    shapes = [(), (1, 1, 300), (2,), (0, 3), (3, 7, 11), (81,), (5,), (1,), (40, 3), (80,)]
    groups = [Group(shapes, dtype, {"weight_decay": 0.1}) for dtype in (torch.float32, torch.half)]
    reference, ours = pair(cls, groups, memory_plane=plane, beta_scope=scope)
    for optimizer in (reference, ours):
        strided = parameters(optimizer)[4]
        strided.data = strided.data.transpose(0, 2).contiguous().transpose(0, 2)
    assert_lockstep(reference, ours, 6, conditioned=True)


def peak_bytes(function):
    """What is allocated at most while the function runs, beyond what was before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    now = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    return most


LISTS = {
    "small": [(100 + 3 * i,) for i in range(300)],
    "decoder": [(192,), (192, 512), (512,)] * 40,
    "one": [(2**22,)],
    "matrix": [(2**12, 2**10)],
}


@each_pair("cls, plane, scope, name", OPTIMIZERS, PLANES, SCOPES, list(LISTS))
def test_memory_beside_torch_optims(cls, plane, scope, name):
    shapes = LISTS[name]
    optimizers = [
        make_optimizer(cls, [Group(shapes)], "foreach", memory_plane=plane, beta_scope=scope),
        torch.optim.AdamW([random_tensor(s).requires_grad_() for s in shapes], foreach=True),
    ]
    peaks = []
    for optimizer in optimizers:
        for step in range(2):
            set_gradients(optimizer, step=step)
            peaks.append(peak_bytes(optimizer.step))
    _, ours, _, torchs = peaks
    assert torchs >= sum(4 * random_tensor(s).numel() for s in shapes)
    assert ours <= 1.5 * torchs


# ---- rows ------------------------------------------------------------------------

ROWS = [
    (40, 16),
    (3, 17),
    (7, 768),
    (5, 3, 3, 7),
    (2, 5000),
    (),
    (300, 100),
    (1, 40),
    (0, 20),
    (2, 7, 8),
    (30, 2),
]


def by_row(cls, groups=None, **options):
    return pair(cls, groups or [Group(ROWS)], beta_scope="row", **options)


def set_strided(optimizers, index, first, second):
    """Gives a parameter of each optimizer strides that are not those of its shape."""
    for optimizer in optimizers:
        param = parameters(optimizer)[index]
        param.data = param.data.transpose(first, second).contiguous().transpose(first, second)


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64)


@each_pair("cls, plane, dtype, lr", OPTIMIZERS, PLANES, DTYPES, (0.01, torch.tensor(0.01)))
def test_rows_agree_with_the_reference(cls, plane, dtype, lr):
    groups = [Group(ROWS, dtype, {"weight_decay": 0.1}), Group(ROWS[:5], dtype)]
    reference, ours = by_row(cls, groups, memory_plane=plane, lr=lr)
    for index, dims in ((2, (0, 1)), (3, (1, 3)), (9, (0, 2))):
        set_strided((reference, ours), index, *dims)
    assert_lockstep(reference, ours, 5, conditioned=True)
    shapes = [ours.state[param]["beta"].shape for param in parameters(ours)[: len(ROWS)]]
    assert shapes == [s[:1] if len(s) > 1 and s != (30, 2) else () for s in ROWS]


@both
@planes
@pytest.mark.parametrize("most", [80, 2000])
def test_rows_in_slices_and_rows_longer_than_a_slice(monkeypatch, cls, plane, most):
    monkeypatch.setattr(foreach, "_most_elements", lambda device: most)
    reference, ours = by_row(cls, memory_plane=plane, weight_decay=0.1)
    for index, dims in ((2, (0, 1)), (3, (1, 3)), (6, (0, 1))):
        set_strided((reference, ours), index, *dims)
    assert_lockstep(reference, ours, 4, conditioned=True)


@both
def test_each_group_has_its_own_scope(cls):
    groups = [
        Group([(40, 16), (5,), (3, 17)], dtype, {"beta_scope": scope})
        for scope in ("tensor", "row", "global", "row")
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert_lockstep(*pair(cls, groups), 6, conditioned=True)


@both
@planes
def test_rows_of_one_tensor_do_not_depend_on_one_another(cls, plane):
    """Each is as it would be in a tensor of its own; NaN, too, stays in its row."""
    groups = [Group([(5, 100)])]
    whole = make_optimizer(cls, groups, "foreach", beta_scope="row", memory_plane=plane)
    (param,) = parameters(whole)
    rows = [torch.nn.Parameter(row.detach()[None].clone()) for row in param]
    apart = cls(rows, backend="foreach", beta_scope="row", memory_plane=plane)
    for step in range(4):
        set_gradients(whole, step=step)
        param.grad[3, 7] = torch.nan
        for row, grad in zip(rows, param.grad, strict=True):
            row.grad = grad[None].clone()
        whole.step()
        apart.step()
    for i, row in enumerate(rows):
        torch.testing.assert_close(param[i].detach(), row[0].detach(), equal_nan=True)
        assert param[i].isnan().any() == (i == 3)
        for name in ("beta", whole.memories[0]):
            ours, expected = whole.state[param][name][i], apart.state[row][name][0]
            torch.testing.assert_close(ours, expected, equal_nan=True)


@each_pair("cls, plane, scope, most", OPTIMIZERS, PLANES, ("tensor", "row"), (None, 80, 2000))
def test_the_two_halves_give_the_bits_of_the_step_at_once(monkeypatch, cls, plane, scope, most):
    if most is not None:
        monkeypatch.setattr(foreach, "_most_elements", lambda device: most)
    groups = [Group(ROWS, dtype) for dtype in (torch.float32, torch.float16)]
    options = {"beta_scope": scope, "memory_plane": plane, "weight_decay": 0.1}
    halves, whole = (make_optimizer(cls, groups, "foreach", **options) for _ in range(2))
    begin, finish = (
        getattr(foreach, f"{'adamw' if cls is AMAdamW else 'sgd'}_{half}")
        for half in ("begin", "finish")
    )
    for step in range(3):
        set_gradients(halves, whole, step=step)
        (work,) = halves._collect()
        with torch.no_grad():
            rows = begin(work.batch, None, None)
            assert rows.shape == (sum(beta.numel() for beta in work.batch.betas), 2)
            finish(work.batch, rows, None, None)
        whole.step()
        assert_same_bits(halves, whole)


@both
@planes
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)], ids=["number", "tensor"])
def test_rows_idle_by_themselves(cls, plane, lr):
    """At a first step at lr 0; their tensor's step counts where one of its rows has a gradient."""
    shapes = [(5, 40), (3, 20), (0, 20), (300, 100), ()]
    groups = [Group(shapes, options={"weight_decay": 0.1})]
    reference, ours = by_row(cls, groups, memory_plane=plane, lr=lr)
    before = snapshot(reference)
    set_gradients(reference, ours, step=0)
    idle = ([0, 3], [0, 1, 2], [], [*range(0, 300, 2)], ())
    for index, rows in enumerate(idle):
        for optimizer in (reference, ours):
            parameters(optimizer)[index].grad[rows] = 0
    for optimizer in (reference, ours):
        optimizer.step()
    assert_step_agrees(ours, reference, before)
    states = [ours.state[param] for param in parameters(ours)]
    assert [state["step"].item() for state in states] == [1, 0, 0, 1, 0]
    if cls is AMAdamW:
        assert states[0]["beta_prod"].tolist() == pytest.approx([1, 0.89, 0.89, 1, 0.89])
        assert (states[0]["beta"][[0, 3]] == 0).all()
    # What has idled once begins as the others go on; a tensor without rows counts its steps.
    for step in range(1, 3):
        for group in (*reference.param_groups, *ours.param_groups):
            group["lr"] = 0.01
        set_gradients(reference, ours, step=step)
        before = snapshot(reference)
        restore(ours, before)
        for optimizer in (reference, ours):
            optimizer.step()
        assert_step_agrees(ours, reference, before)
    assert [state["step"].item() for state in map(ours.state.get, parameters(ours))] == [
        3,
        2,
        2,
        3,
        2,
    ]


@both
def test_rows_without_a_gradient_have_beta_0(cls):
    """As the tokens that are not in the batch."""
    reference, ours = by_row(cls, [Group([(30, 40), (600, 50)])], weight_decay=0.0)
    for step in range(4):
        set_gradients(reference, ours, step=step)
        present = torch.arange(600) % 4 != step
        for optimizer in (reference, ours):
            for param in parameters(optimizer):
                param.grad[~present[: len(param)]] = 0
        before = snapshot(reference)
        restore(ours, before)
        for optimizer in (reference, ours):
            optimizer.step()
        assert_step_agrees(ours, reference, before)
        for param in parameters(ours):
            absent = ~present[: len(param)]
            if step > 0:
                assert (ours.state[param]["beta"][absent] == 0).all()
                assert (ours.state[param]["beta"][~absent] > 0).any()


def operations(optimizer):
    """How many operators a step calls, but for those that make views."""
    count = 0

    class Counting(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal count
            count += not func.is_view and func is not torch.ops.aten.promote_types.default
            return func(*args, **(kwargs or {}))

    set_gradients(optimizer, step=0)
    optimizer.step()
    with Counting():
        optimizer.step()
    return count


@both
@pytest.mark.parametrize(
    "shapes, a_tensor",
    [([(20, 30)] * 300, 3), ([(4, 16 + 3 * i) for i in range(300)], 9)],
    ids=["of one length", "of any length"],
)
def test_the_rows_of_small_tensors_are_worked_on_together(cls, shapes, a_tensor):
    """By itself a tensor takes some 50 operations, most of them on its scalars."""
    optimizer = make_optimizer(cls, [Group(shapes)], "foreach", beta_scope="row")
    assert operations(optimizer) <= a_tensor * len(shapes)


@both
@pytest.mark.parametrize(
    "compiler, plane",
    [
        ("aot_eager", "anchored"),
        # Half a minute of compiling C++.
        pytest.param("inductor", "level", marks=pytest.mark.thorough),
    ],
)
def test_a_compiled_step_with_rows_is_the_step(cls, compiler, plane):
    torch._dynamo.reset()
    groups = [Group([(40, 16), (3, 17), (5,), (2, 3, 3, 2), (40, 16), (0, 20)])]
    options = {"beta_scope": "row", "memory_plane": plane, "weight_decay": 0.1}
    compiled, plain = (make_optimizer(cls, groups, "foreach", **options) for _ in range(2))
    step = torch.compile(compiled.step, fullgraph=True, backend=compiler)
    for i, lr in enumerate((0.0, 0.01, 0.02)):
        set_gradients(compiled, plain, step=i)
        for optimizer in (compiled, plain):
            optimizer.param_groups[0]["lr"] = lr
            parameters(optimizer)[0].grad[:7] = 0
        step()
        plain.step()
        for ours, expected in zip(parameters(compiled), parameters(plain), strict=True):
            torch.testing.assert_close(ours, expected)
            torch.testing.assert_close(compiled.state[ours], plain.state[expected])


# ---- conditioning ------------------------------------------------------------------


@pytest.mark.parametrize("shapes", [[(6,)] * 200, [(100_000,)]])
def test_sgds_beta_where_weight_decay_is_larger_than_the_gradient(shapes):
    """|mu x| = 10 |g|: of g + mu x, rounded, less is left in d - g than of the gradient."""
    reference, ours = pair(
        AMSGD, [Group(shapes)], weight_decay=2.0, memory_plane="anchored", beta_scope="tensor"
    )
    set_gradients(reference, ours, step=0)
    for optimizer in (reference, ours):
        optimizer.step()
        for i, param in enumerate(parameters(optimizer)):
            mu_x = 2 * param.detach().double()
            d = mu_x + 0.07 * random_tensor(mu_x.shape, torch.float64, seed=i)
            # So far from being orthogonal to d, e gives a beta near 1/2.
            e = 0.07 * random_tensor(mu_x.shape, torch.float64, seed=1000 + i)
            e -= (e @ d) / (d @ d) * d
            e += 0.25 * (e @ e) / (d @ d) * d
            optimizer.state[param]["momentum_buffer"].copy_(d)
            param.grad = (d - mu_x - e).float()
        optimizer.step()
    betas = [[o.state[p]["beta"].item() for p in parameters(o)] for o in (reference, ours)]
    assert all(0.3 < beta < 0.7 for beta in betas[0])
    assert betas[1] == pytest.approx(betas[0], rel=0, abs=1e-5)
