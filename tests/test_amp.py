"""torch.amp.GradScaler: a step is unscaled, skipped on overflow, and otherwise as without it."""

from copy import deepcopy

import pytest
import torch
from cases import OPTIMIZERS, backends
from snapshot import snapshot
from torch.nn import Linear, Sequential, Tanh

from adamem_fused import AMAdamW

BATCHES = 6
OVERFLOWS = (2, 3)

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", backends())
UNFUSED = ("foreach", "reference")
fused_backends = pytest.mark.parametrize("backend", backends(*UNFUSED))
scopes = pytest.mark.parametrize("beta_scope", ["tensor", "global"])


def make_model():
    torch.manual_seed(0)
    return Sequential(Linear(6, 9), Tanh(), Linear(9, 3))


def batches():
    generator = torch.Generator().manual_seed(1)
    for _ in range(BATCHES):
        yield torch.randn(8, 6, generator=generator), torch.randn(8, 3, generator=generator)


def train(cls, scaler=None, overflows=(), skip=(), clip=None, unscale=False, **options):
    """Trains on the batches not in `skip`; those in `overflows` get an infinite gradient."""
    model = make_model()
    optimizer = cls(model.parameters(), **options)
    for i, (x, target) in enumerate(batches()):
        if i in skip:
            continue
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), target)
        (loss if scaler is None else scaler.scale(loss)).backward()
        if i in overflows:
            model[2].bias.grad[1] = float("inf")
        if unscale:
            scaler.unscale_(optimizer)
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    return optimizer


def gradients(optimizer):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.ones_like(param)


@both
@pytest.mark.parametrize(
    ("options", "fused"),
    [
        ({}, False),
        ({"fused": True}, True),
        ({"backend": "cpu"}, True),
        ({"foreach": True}, False),
        ({"fused": False}, False),
        ({"backend": "reference"}, False),
    ],
)
def test_fused_backends_that_are_asked_for_alone_take_the_scale(cls, options, fused):
    optimizer = cls(make_model().parameters(), **options)
    assert optimizer._step_supports_amp_scaling is fused


@both
def test_one_group_that_is_not_fused_leaves_unscaling_to_the_scaler(cls):
    model = make_model()
    groups = [
        {"params": model[0].parameters(), "fused": True},
        {"params": model[2].parameters()},
    ]
    optimizer = cls(groups)
    assert not optimizer._step_supports_amp_scaling


@both
def test_a_frozen_group_with_a_gradient_left_counts_as_a_step_takes_it(cls):
    model = make_model()
    groups = [
        {"params": model[0].parameters(), "fused": True},
        {"params": model[2].parameters(), "foreach": True},
    ]
    optimizer = cls(groups)
    gradients(optimizer)
    model[2].requires_grad_(False)
    assert not optimizer._step_supports_amp_scaling
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert all(state["step"] == 1 for state in optimizer.state.values())


@both
@scopes
@every_backend
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**-6])
def test_power_of_two_scale_changes_no_bit(cls, beta_scope, backend, scale):
    options = {"backend": backend, "beta_scope": beta_scope, "weight_decay": 0.1}
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    assert snapshot(train(cls, scaler, **options)) == snapshot(train(cls, **options))
    assert scaler.get_scale() == scale * 8


@both
@scopes
@every_backend
@pytest.mark.parametrize("unscale", [False, True])
def test_overflow_skips_the_step_and_backs_off(cls, beta_scope, backend, unscale):
    options = {"backend": backend, "beta_scope": beta_scope}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=3)
    scaled = train(cls, scaler, overflows=OVERFLOWS, unscale=unscale, **options)
    assert snapshot(scaled) == snapshot(train(cls, skip=OVERFLOWS, **options))
    assert scaler.get_scale() == 2.0**6
    assert all(s["step"] == BATCHES - len(OVERFLOWS) for s in scaled.state.values())


@both
@every_backend
def test_overflow_in_the_first_step_leaves_a_first_step_to_come(cls, backend):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    scaled = train(cls, scaler, overflows=(0,), backend=backend)
    assert snapshot(scaled) == snapshot(train(cls, skip=(0,), backend=backend))


@both
@every_backend
def test_unscale_and_clip_then_step(cls, backend):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled = train(cls, scaler, clip=0.05, unscale=True, backend=backend)
    assert snapshot(scaled) == snapshot(train(cls, clip=0.05, backend=backend))
    assert snapshot(scaled) != snapshot(train(cls, backend=backend))


@both
@every_backend
def test_scaled_step_leaves_gradients_and_optimizer_as_they_were(cls, backend):
    optimizer = cls(make_model().parameters(), backend=backend)
    public = set(vars(optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    gradients(optimizer)
    scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    assert set(vars(optimizer)) == public
    # A fused step unscales as it reads; elsewhere it is the scaler that wrote to them.
    expected = 0.25 if backend in UNFUSED else 1.0
    for group in optimizer.param_groups:
        for param in group["params"]:
            assert torch.equal(param.grad, torch.full_like(param, expected))


@both
@scopes
@fused_backends
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_found_inf_and_grad_scale_set_by_hand(cls, beta_scope, backend, steps, shape):
    """torch's contract: both are tensors, set on the optimizer for the time of a step."""
    optimizer = cls(make_model().parameters(), backend=backend, beta_scope=beta_scope)
    gradients(optimizer)
    for _ in range(steps):
        optimizer.step()
    twin = deepcopy(optimizer)
    before = snapshot(optimizer)

    gradients(optimizer)
    for param in optimizer.param_groups[0]["params"]:
        param.grad.mul_(8)
    param.grad.fill_(float("nan"))
    optimizer.grad_scale = torch.full(shape, 8.0)
    optimizer.found_inf = torch.ones(shape)
    optimizer.step()
    after = snapshot(optimizer)
    if steps:
        assert after == before
    else:  # state may have been made, but has seen no step
        assert [entry[0] for entry in after[1:]] == [entry[0] for entry in before[1:]]
        assert all(state["step"] == 0 for state in optimizer.state.values())

    param.grad.fill_(8.0)
    optimizer.found_inf = torch.zeros(shape)
    optimizer.step()
    del optimizer.grad_scale, optimizer.found_inf
    gradients(twin)
    twin.step()
    assert snapshot(optimizer) == snapshot(twin)


@both
@pytest.mark.parametrize("backend", UNFUSED)
def test_unfused_backends_take_scale_and_skip_where_they_are_given_them(cls, backend):
    optimizer, twin = (cls(make_model().parameters(), backend=backend) for _ in range(2))
    for _ in range(3):
        gradients(optimizer)
        gradients(twin)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.zeros(1)
        for group in optimizer.param_groups:
            for param in group["params"]:
                param.grad.mul_(8.0)
        optimizer.step()
        twin.step()
        assert snapshot(optimizer) == snapshot(twin)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.ones(1)
    optimizer.step()
    assert snapshot(optimizer) == before


@both
def test_overflow_keeps_the_loss_of_the_last_step_taken(cls):
    options = {"gap": "loss", "beta_scope": "global"}
    optimizer = cls(make_model().parameters(), **options)
    gradients(optimizer)
    optimizer.step(lambda: torch.tensor(3.0))
    before = snapshot(optimizer)
    optimizer.grad_scale = None
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step(lambda: torch.tensor(float("inf")))
    assert snapshot(optimizer) == before


@both
def test_float16_gradients_are_unscaled_in_float32(cls):
    """What a scale is for: 2^-30 is no float16, 2^-30 * 2^16 is one."""
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.float16))
    optimizer = cls([param], fused=True, eps=1e-30) if cls is AMAdamW else cls([param], fused=True)
    param.grad = torch.full((4,), 2.0**-14, dtype=torch.float16)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0**16), torch.tensor(0.0)
    optimizer.step()
    memory = optimizer.state[param][cls.memories[0]]
    assert memory.dtype == torch.float32
    expected = 2.0**-30 * (1 - 0.89) if cls is AMAdamW else 2.0**-30
    torch.testing.assert_close(memory, torch.full_like(memory, expected), rtol=1e-6, atol=0)
