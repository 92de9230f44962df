"""The foreach backend: without float64, in slices, and what memory it takes."""

import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_lockstep,
    assert_step_agrees,
    make_optimizer,
    parameters,
    random_tensor,
    set_gradients,
    snapshot,
)
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from adamem_fused import AMSGD
from adamem_fused import optimizer as step_module
from adamem_fused.backends import batch, foreach

both = pytest.mark.parametrize("cls", OPTIMIZERS)
planes = pytest.mark.parametrize("plane", ["level", "anchored"])
scopes = pytest.mark.parametrize("scope", ["tensor", "global"])


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
    for module in (foreach, step_module):
        monkeypatch.setattr(module, "bookkeeping_dtype", lambda device: torch.float32)


@pytest.mark.parametrize("device", ["mps", "xpu"])
def test_where_there_may_be_no_float64_scalars_are_float32(device):
    assert batch.bookkeeping_dtype(torch.device(device)) == torch.float32


@both
@planes
@scopes
@pytest.mark.parametrize("lr", [0.01, 0.0, torch.tensor(0.01), torch.tensor(0.0)])
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


@both
@planes
@scopes
@pytest.mark.parametrize(
    "shapes",
    [[(100 + 3 * i,) for i in range(300)], [(192,), (192, 512), (512,)] * 40, [(2**22,)]],
    ids=["small", "decoder", "one"],
)
def test_memory_beside_torch_optims(cls, plane, scope, shapes):
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
