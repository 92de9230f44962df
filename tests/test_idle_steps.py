"""A step at lr 0 with zero gradients, before any other: so tools make state, without effect."""

import copy

import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_same_bits,
    backends,
    make_optimizer,
    parameters,
    set_gradients,
    snapshot,
)
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from adamem_fused import AMSGD, AMAdamW

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", backends())
scopes = pytest.mark.parametrize("scope", ["tensor", "row", "global"])
GROUPS = (
    Group([(7, 16), (), (0, 20)], options={"weight_decay": 0.1}),
    Group([(7,), (3, 100)], torch.bfloat16, {"memory_plane": "anchored", "maximize": True}),
)


def fresh_pair(cls, backend, groups=GROUPS, **options):
    return [make_optimizer(cls, groups, backend, **options) for _ in range(2)]


def idle(optimizer, tensor_lr=False, closure=None, params=None):
    """What torch.distributed.checkpoint does to make state."""
    for param in params or parameters(optimizer):
        param.grad = torch.zeros_like(param)
    lrs = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.0) if tensor_lr else 0.0
    optimizer.step(closure)
    for group, lr in zip(optimizer.param_groups, lrs, strict=True):
        group["lr"] = lr
    optimizer.zero_grad()


def assert_go_on_alike(optimizer, expected, steps=3, closure=None):
    assert_same_bits(optimizer, expected)
    for step in range(steps):
        set_gradients(optimizer, expected, step=step)
        optimizer.step(closure)
        expected.step(closure)
        assert_same_bits(optimizer, expected)


def with_state(optimizer):
    """Makes the state of an optimizer as its first step would find it, without a step."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            optimizer._init_state(param, group)
    optimizer._new_state = []
    return optimizer


@both
@every_backend
@scopes
@pytest.mark.parametrize("tensor_lr", [False, True])
@pytest.mark.parametrize("times", [1, 3])
def test_zero_gradients_at_lr_0_are_without_effect(cls, backend, scope, tensor_lr, times):
    optimizer, expected = fresh_pair(cls, backend, beta_scope=scope)
    for _ in range(times):
        idle(optimizer, tensor_lr)
    assert all(optimizer.state[param]["step"] == 0 for param in parameters(optimizer))
    assert_go_on_alike(optimizer, with_state(expected))


@both
@every_backend
def test_they_are_without_effect_where_a_difference_of_losses_is_used(cls, backend):
    optimizer, expected = fresh_pair(cls, backend, beta_scope="global", gap="loss")
    idle(optimizer)
    for step in range(3):
        set_gradients(optimizer, expected, step=step)
        for each in (optimizer, expected):
            each.step(lambda step=step: 1 / (step + 1))
        assert_same_bits(optimizer, expected)


@both
@every_backend
@scopes
def test_a_tensor_is_idle_by_itself(cls, backend, scope):
    """Beside one that has a gradient, as at the start of a warm-up from 0."""
    groups = [Group([(5, 16), (4,)], options={"weight_decay": 0.1})]
    optimizer, expected = fresh_pair(cls, backend, groups, beta_scope=scope)
    for each in (optimizer, expected):
        second = parameters(each)[1]
        each.param_groups[0]["lr"] = 0.0
        set_gradients(each, step=0)
        second.grad = torch.zeros_like(second) if each is optimizer else None
        each.step()
        each.param_groups[0]["lr"] = 0.01
    assert optimizer.state[parameters(optimizer)[0]]["step"] == 1
    assert optimizer.state[parameters(optimizer)[1]]["step"] == 0
    expected._init_state(parameters(expected)[1], expected.param_groups[0])
    assert_go_on_alike(optimizer, expected)


@both
@every_backend
@scopes
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_a_gradient_at_lr_0_is_remembered(cls, backend, scope, tensor_lr):
    """A warm-up from 0: x stands still, the moments do not."""
    lr = torch.tensor(0.0) if tensor_lr else 0.0
    groups = [Group([(5, 16), (4,)])]
    optimizer = make_optimizer(cls, groups, backend, beta_scope=scope, lr=lr, weight_decay=0.1)
    before = [param.detach().clone() for param in parameters(optimizer)]
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
        param.grad.view(-1)[-1] = 1e-3
    optimizer.step()
    for param, kept in zip(parameters(optimizer), before, strict=True):
        state = optimizer.state[param]
        assert state["step"] == 1
        assert state[cls.memories[0]].view(-1)[-1] != 0
        assert torch.equal(param, kept)
        if cls is AMAdamW:
            # One at the end of a row is a gradient of no other row.
            assert state["beta_prod"].reshape(-1).tolist()[-1] == pytest.approx(0.89)
            assert (state["beta_prod"].reshape(-1)[:-1] == 1).all()


@both
@every_backend
@scopes
def test_zero_gradients_are_a_step_at_any_other_lr_and_after_any_other_step(cls, backend, scope):
    (optimizer,) = fresh_pair(cls, backend, GROUPS[:1], beta_scope=scope)[:1]
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
    optimizer.step()
    assert [optimizer.state[param]["step"].item() for param in parameters(optimizer)] == [1] * 3
    idle(optimizer)
    assert [optimizer.state[param]["step"].item() for param in parameters(optimizer)] == [2] * 3


@both
@every_backend
def test_a_tensor_that_comes_to_idle_late_changes_no_others_beta(cls, backend):
    """Its gradient at lr 0 is in no sum of AM-SGD's; in AM-AdamW's it is as ever."""
    groups = [Group([(5, 3), (4,)], options={"weight_decay": 0.1})]
    optimizer, expected = fresh_pair(cls, backend, groups, beta_scope="global")
    for each in (optimizer, expected):
        for step in range(3):
            set_gradients(each, step=step, skip=[1])
            each.step()
        each.param_groups[0]["lr"] = 0.0
        late_gradient = (each is optimizer) if cls is AMSGD else False
        set_gradients(each, step=3, skip=[] if late_gradient else [1])
        if cls is AMAdamW and each is optimizer:
            parameters(each)[1].grad = torch.zeros(4)
        each.step()
    (first, _), (other, _) = parameters(optimizer), parameters(expected)
    for name, value in expected.state[other].items():
        assert torch.equal(optimizer.state[first][name], value), name


# ---- by the tools ------------------------------------------------------------------


@both
@every_backend
@scopes
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01)])
def test_reading_the_state_of_a_new_optimizer_changes_nothing(cls, backend, scope, lr):
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(20, 5), torch.nn.Linear(5, 3))]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        cls(m.parameters(), lr=lr, weight_decay=0.1, beta_scope=scope, backend=backend)
        for m in models
    ]
    saved = copy.deepcopy(get_optimizer_state_dict(models[0], optimizers[0]))
    assert_go_on_alike(optimizers[0], with_state(optimizers[1]))
    # What was saved then is a beginning too.
    third = cls(models[1].parameters(), lr=lr, weight_decay=0.1, beta_scope=scope, backend=backend)
    set_optimizer_state_dict(models[1], third, saved)
    before = snapshot(third)
    idle(third)
    for values, kept in zip(snapshot(third), before, strict=True):
        assert all(torch.equal(values[name], kept[name]) for name in kept)
