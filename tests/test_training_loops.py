"""What training loops do with an optimizer, from schedules to hooks, and that it trains."""

import copy

import numpy as np
import pytest
import torch
from cases import LOW_PRECISION, OPTIMIZERS, backends
from snapshot import snapshot
from torch.nn import Linear, Parameter, Sequential, Tanh
from torch.optim import lr_scheduler

from adamem_fused import AMSGD, AMAdamW

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", backends())


def make_model(dtype=torch.float32):
    torch.manual_seed(0)
    return Sequential(Linear(6, 9), Tanh(), Linear(9, 3)).to(dtype)


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 6, generator=generator)
    return x.to(dtype), x[:, :3].sin().to(dtype)


def backward(model, step, dtype=torch.float32):
    x, target = batch(step, dtype)
    loss = torch.nn.functional.mse_loss(model(x), target)
    loss.backward()
    return loss


def fixed_gradients(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator)


def is_finite(optimizer):
    tensors = [p for group in optimizer.param_groups for p in group["params"]]
    tensors += [value for state in optimizer.state.values() for value in state.values()]
    return all(tensor.isfinite().all() for tensor in tensors)


# ---- parameter groups -------------------------------------------------------------


@both
@every_backend
def test_groups_with_their_own_values_train_as_optimizers_of_their_own(cls, backend):
    """With one beta for each tensor, groups have nothing to do with one another."""
    cap = {"betas": (0.5, 0.9)} if cls is AMAdamW else {"beta_max": 0.5}
    options = [
        {"lr": 0.02, "weight_decay": 0.3, "memory_lambda": 0.0},
        {"lr": 0.005, "memory_plane": "anchored", **cap},
        {"lr": 0.01, "maximize": True, "memory_lambda": 0.5},
    ]
    start = [torch.randn(4, 3), torch.randn(7), torch.randn(2, 2)]
    together = [Parameter(value.clone()) for value in start]
    alone = [Parameter(value.clone()) for value in start]
    groups = [{"params": [p], **o} for p, o in zip(together, options, strict=True)]
    common = {"backend": backend, "beta_scope": "tensor"}
    optimizer = cls(groups, **common)
    optimizers = [cls([p], **common, **o) for p, o in zip(alone, options, strict=True)]
    for step in range(8):
        fixed_gradients(together, step)
        fixed_gradients(alone, step)
        optimizer.step()
        for other in optimizers:
            other.step()
        for ours, theirs, other in zip(together, alone, optimizers, strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(optimizer.state[ours]["beta"], other.state[theirs]["beta"])


@both
def test_numbers_from_numpy_are_numbers(cls):
    """As they come from a sweep over hyperparameters."""
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(3))]
    values = {"lr": 0.25, "weight_decay": 0.5, "memory_lambda": 0.125}
    for param, number in zip(params, (float, np.float32), strict=True):
        optimizer = cls([param], **{key: number(value) for key, value in values.items()})
        fixed_gradients([param], 0)
        optimizer.step()
    assert torch.equal(*params)


@both
def test_one_global_beta_spans_the_groups_that_ask_for_it(cls):
    params = [Parameter(torch.randn(4)) for _ in range(4)]
    scopes = ["global", "tensor", "global", "tensor"]
    groups = [{"params": [p], "beta_scope": s} for p, s in zip(params, scopes, strict=True)]
    optimizer = cls(groups, lr=0.01)
    histories = [[] for _ in params]
    for step in range(8):
        fixed_gradients(params, step)
        optimizer.step()
        for param, history in zip(params, histories, strict=True):
            history.append(optimizer.state[param]["beta"].item())
    assert histories[0] == histories[2]
    assert len({tuple(history) for history in histories}) == 3


@both
@every_backend
@pytest.mark.parametrize(
    "options",
    [
        {"beta_scope": "tensor"},
        {"beta_scope": "global"},
        {"beta_scope": "global", "gap": "loss"},
    ],
)
def test_groups_without_parameters_and_without_gradients(cls, backend, options):
    param, idle = Parameter(torch.randn(3)), Parameter(torch.randn(3))
    groups = [{"params": []}, {"params": [idle]}, {"params": [param]}, {"params": []}]
    optimizer = cls(groups, backend=backend, **options)
    kept = idle.detach().clone()
    for step in range(2):
        fixed_gradients([param], step)
        optimizer.step(lambda: 1.0)
    assert torch.equal(idle, kept)
    assert optimizer.state[param]["step"] == 2
    assert "step" not in optimizer.state.get(idle, {})
    param.grad = None
    before = snapshot(optimizer)
    optimizer.step(lambda: 2.0)
    assert snapshot(optimizer) == before
    nothing = cls([{"params": []}], backend=backend, **options)
    assert nothing.step(lambda: 1.0) == 1.0


# ---- schedules --------------------------------------------------------------------

SCHEDULES = {
    "LambdaLR from 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: step / 4),
    "LinearLR to 0": lambda o: lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=6),
    "LinearLR from almost 0": lambda o: lr_scheduler.LinearLR(o, 1e-12, 1.0, total_iters=6),
    "CosineAnnealingLR to 0": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "warm restarts through 0": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "LambdaLR on and off": lambda o: lr_scheduler.LambdaLR(o, lambda step: float(step % 2)),
    "LambdaLR all 0": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.0),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 5)],
        milestones=[3],
    ),
}


@both
@every_backend
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_schedule_that_touches_zero(cls, backend, schedule, tensor_lr):
    """At lr 0 parameters stand still and moments move; after it, training goes on."""
    model = make_model()
    lr = torch.tensor(0.02) if tensor_lr else 0.02
    optimizer = cls(model.parameters(), lr=lr, weight_decay=0.1, backend=backend)
    scheduler = SCHEDULES[schedule](optimizer)
    cap = optimizer.defaults["betas"][0] if cls is AMAdamW else optimizer.defaults["beta_max"]
    for step in range(10):
        optimizer.zero_grad()
        backward(model, step)
        params = [param.detach().clone() for param in model.parameters()]
        memories = [
            state[cls.memories[0]].clone()
            for state in (optimizer.state[param] for param in model.parameters())
            if state
        ]
        lr = float(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
        moved = [not torch.equal(a, b) for a, b in zip(params, model.parameters(), strict=True)]
        if lr == 0:
            assert not any(moved)
        elif lr > 1e-9:
            assert all(moved)
        else:  # so little that rounding decides whether an element moves
            torch.testing.assert_close(list(model.parameters()), params, rtol=1e-6, atol=1e-9)
        for param, memory in zip(model.parameters(), memories, strict=False):
            assert not torch.equal(optimizer.state[param][cls.memories[0]], memory)
        for state in optimizer.state.values():
            assert state["step"] == step + 1
            assert state["prev_lr"].item() == pytest.approx(lr, rel=1e-6)
            assert 0 <= state["beta"] <= cap + 1e-6
        assert is_finite(optimizer)


@every_backend
def test_one_cycle_cycles_the_cap_of_beta(backend):
    """OneCycleLR's cycle_momentum sets betas[0]: here the cap."""
    model = make_model()
    optimizer = AMAdamW(model.parameters(), backend=backend, weight_decay=0.1)
    scheduler = lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.02, total_steps=12, base_momentum=0.2, max_momentum=0.9
    )
    caps, betas = [], []
    for step in range(11):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        caps.append(optimizer.param_groups[0]["betas"][0])
        betas.append([state["beta"].item() for state in optimizer.state.values()])
        scheduler.step()
        assert is_finite(optimizer)
    assert caps[0] == pytest.approx(0.9)
    assert min(caps) < 0.25
    assert all(beta <= cap + 1e-6 for cap, row in zip(caps, betas, strict=True) for beta in row)
    # The cap is not only respected, it binds: betas[0] is what the step reads.
    assert any(beta == pytest.approx(min(caps)) for row in betas for beta in row)
    assert betas[0] == pytest.approx([0.9] * 4)


@pytest.mark.parametrize("scheduler", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
def test_cycling_the_momentum_of_am_sgd_is_refused(scheduler):
    """It has a cap and no momentum to cycle, and torch says so."""
    optimizer = AMSGD([Parameter(torch.randn(4))])
    own = {"total_steps": 10} if scheduler is lr_scheduler.OneCycleLR else {"base_lr": 0.01}
    with pytest.raises(ValueError, match="cycle_momentum"):
        scheduler(optimizer, max_lr=0.1, **own)
    assert optimizer.param_groups[0]["beta_max"] == optimizer.defaults["beta_max"]


@both
@pytest.mark.parametrize("scheduler", [lr_scheduler.OneCycleLR, lr_scheduler.CyclicLR])
def test_cycling_the_learning_rate_alone(cls, scheduler):
    model = make_model()
    optimizer = cls(model.parameters())
    caps = copy.deepcopy({k: optimizer.defaults.get(k) for k in ("betas", "beta_max")})
    if scheduler is lr_scheduler.OneCycleLR:
        cycle = scheduler(optimizer, max_lr=0.02, total_steps=10, cycle_momentum=False)
    else:
        cycle = scheduler(optimizer, 0.001, 0.02, step_size_up=5, cycle_momentum=False)
    for step in range(8):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        cycle.step()
    assert {k: optimizer.param_groups[0].get(k) for k in caps} == caps
    assert is_finite(optimizer)


@both
def test_reduce_on_plateau(cls):
    model = make_model()
    optimizer = cls(model.parameters(), lr=0.01)
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=1)
    rates = []
    for step in range(6):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        scheduler.step(1.0)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2, 1e-3, 1e-3, 1e-4, 1e-4])
    assert all(s["prev_lr"].item() == pytest.approx(1e-4) for s in optimizer.state.values())


# ---- closures ---------------------------------------------------------------------


@both
@pytest.mark.parametrize("gap", ["gradient", "loss"])
def test_closure_and_plain_step_agree(cls, gap):
    """With gap="gradient" the closure's loss has no part in the step."""
    options = {"gap": gap, "beta_scope": "global"}
    models = make_model(), make_model()
    optimizers = [cls(model.parameters(), **options) for model in models]
    for step in range(5):

        def closure(optimizer, model, step=step):
            optimizer.zero_grad()
            return backward(model, step)

        first, second = zip(optimizers, models, strict=True)
        loss = optimizers[0].step(lambda first=first: closure(*first))
        other = closure(*second)
        optimizers[1].step(None if gap == "gradient" else lambda other=other: other.item())
        assert loss.item() == other.item()
    ours, theirs = (list(model.parameters()) for model in models)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# ---- gradients --------------------------------------------------------------------


@both
@every_backend
def test_clip_grad_norm_before_the_step(cls, backend):
    model, other = make_model(), make_model()
    optimizers = [cls(m.parameters(), backend=backend, lr=0.02) for m in (model, other)]
    for step in range(4):
        for m, optimizer in zip((model, other), optimizers, strict=True):
            optimizer.zero_grad()
            (100 * torch.nn.functional.mse_loss(m(batch(step)[0]), batch(step)[1])).backward()
            norm = torch.nn.utils.get_total_norm([p.grad for p in m.parameters()])
            if m is model:
                torch.nn.utils.clip_grad_norm_(m.parameters(), 0.5)
            else:
                for p in m.parameters():
                    p.grad.mul_(min(1.0, 0.5 / (norm.item() + 1e-6)))
            optimizer.step()
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


@both
@every_backend
def test_parameter_that_gets_a_gradient_now_and_then(cls, backend):
    """It is as if the steps without one had not been: its step count and prev_lr included."""
    rare, dense = Parameter(torch.ones(5)), Parameter(torch.ones(3))
    alone = Parameter(torch.ones(5))
    options = {"backend": backend, "beta_scope": "tensor", "lr": 0.05}
    optimizer, other = cls([rare, dense], **options), cls([alone], **options)
    for step in range(12):
        fixed_gradients([dense], step)
        rare.grad = None
        if step % 3 == 1:
            fixed_gradients([rare], step)
            fixed_gradients([alone], step)
            other.step()
        else:
            alone.grad = None
        optimizer.step()
    assert torch.equal(rare, alone)
    assert optimizer.state[rare]["step"] == 4
    assert optimizer.state[dense]["step"] == 12
    for name, value in other.state[alone].items():
        assert torch.equal(optimizer.state[rare][name], value)


@both
def test_gradient_accumulation(cls):
    """Halves of a batch, each with half the loss, add up to the whole batch."""
    models = make_model(torch.float64), make_model(torch.float64)
    optimizers = [cls(model.parameters(), lr=0.02) for model in models]
    for step in range(4):
        x, target = batch(step, torch.float64)
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.nn.functional.mse_loss(models[0](x), target).backward()
        for part in (slice(0, 4), slice(4, 8)):
            (torch.nn.functional.mse_loss(models[1](x[part]), target[part]) / 2).backward()
        for optimizer in optimizers:
            optimizer.step()
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@both
@every_backend
def test_zero_grad_that_does_not_set_to_none(cls, backend):
    """A gradient of zeros is a gradient: moments decay and the step counts."""
    param = Parameter(torch.ones(4))
    optimizer = cls([param], backend=backend, lr=0.1)
    fixed_gradients([param], 0)
    grad = param.grad
    optimizer.step()
    optimizer.zero_grad(set_to_none=False)
    assert param.grad is grad
    memory = optimizer.state[param][cls.memories[0]].clone()
    optimizer.step()
    assert optimizer.state[param]["step"] == 2
    assert optimizer.state[param][cls.memories[0]].norm() < memory.norm()
    assert is_finite(optimizer)
    optimizer.zero_grad()
    assert param.grad is None


@both
@every_backend
@pytest.mark.parametrize("options", [{}, {"gap": "loss", "beta_scope": "global"}])
def test_default_device_is_not_that_of_a_step(cls, backend, options):
    """torch.set_default_device says where new tensors go; a step's are where its parameters are."""
    trained = []
    for device in ("cpu", "meta"):
        param = Parameter(torch.linspace(-1, 1, 5))
        optimizer = cls([param], backend=backend, **options)
        for step in range(3):
            fixed_gradients([param], step)
            with torch.device(device):
                optimizer.step(lambda step=step: 1.0 / (1 + step))
        trained.append(snapshot(optimizer))
    with torch.device("meta"):
        optimizer.load_state_dict(optimizer.state_dict())
    trained.append(snapshot(optimizer))
    assert trained[0] == trained[1] == trained[2]


@both
def test_step_does_not_change_gradients(cls):
    model = make_model()
    for backend in ("cpu", "foreach", "reference"):
        optimizer = cls(model.parameters(), backend=backend, weight_decay=0.1, maximize=True)
        backward(model, 0)
        grads = [param.grad.clone() for param in model.parameters()]
        optimizer.step()
        for param, grad in zip(model.parameters(), grads, strict=True):
            assert torch.equal(param.grad, grad)


@both
def test_optimizer_in_backward(cls):
    """One optimizer for each parameter, stepped as soon as its gradient is there."""
    models = make_model(), make_model()
    whole = cls(models[0].parameters(), beta_scope="tensor", lr=0.02)
    each = {p: cls([p], beta_scope="tensor", lr=0.02) for p in models[1].parameters()}

    def step_now(param):
        each[param].step()
        each[param].zero_grad()

    for param in each:
        param.register_post_accumulate_grad_hook(step_now)
    for step in range(4):
        whole.zero_grad()
        backward(models[0], step)
        whole.step()
        backward(models[1], step)
        assert all(param.grad is None for param in each)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, theirs)


# ---- models -----------------------------------------------------------------------


@both
@every_backend
def test_frozen_parameters_that_are_unfrozen_later(cls, backend):
    model = make_model()
    optimizer = cls(model.parameters(), backend=backend, weight_decay=0.1)
    model[0].requires_grad_(False)
    frozen = [param.detach().clone() for param in model[0].parameters()]
    for step in range(6):
        if step == 3:
            assert all(map(torch.equal, model[0].parameters(), frozen))
            assert all(param not in optimizer.state for param in model[0].parameters())
            model[0].requires_grad_(True)
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
    assert not any(map(torch.equal, model[0].parameters(), frozen))
    steps = [optimizer.state[param]["step"].item() for param in model.parameters()]
    assert steps == [3, 3, 6, 6]


@both
def test_tied_weights_are_one_parameter(cls):
    torch.manual_seed(0)
    embedding, head = torch.nn.Embedding(7, 5), Linear(5, 7, bias=False)
    head.weight = embedding.weight
    model = Sequential(embedding, head)
    optimizer = cls(model.parameters())
    assert len(optimizer.param_groups[0]["params"]) == 1
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.arange(7)).square().mean().backward()
        optimizer.step()
    assert optimizer.state[head.weight]["step"] == 2
    assert head.weight is embedding.weight


@both
def test_parametrized_weights(cls):
    """torch.nn.utils.parametrize: the originals are what is optimized."""
    model = make_model()
    torch.nn.utils.parametrizations.weight_norm(model[0])
    optimizer = cls(model.parameters(), lr=0.02)
    before = model[0].weight.detach().clone()
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(backward(model, 0).item())
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(model[0].weight, before)
    originals = model[0].parametrizations.weight
    assert {originals.original0, originals.original1} <= set(optimizer.state)


@both
@every_backend
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_low_precision_model_trains_with_float32_state(cls, backend, dtype):
    model = make_model(dtype)
    optimizer = cls(model.parameters(), lr=0.02 if cls is AMAdamW else 0.2, backend=backend)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        losses.append(backward(model, 0, dtype).item())
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(param.dtype == dtype for param in model.parameters())
    for state in optimizer.state.values():
        assert {value.dtype for value in state.values()} == {torch.float32}


@both
@pytest.mark.parametrize("average", ["ema", "swa"])
def test_averaged_models(cls, average):
    model = make_model()
    optimizer = cls(model.parameters(), lr=0.02)
    kind = {"multi_avg_fn": torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)}
    averaged = torch.optim.swa_utils.AveragedModel(model, **(kind if average == "ema" else {}))
    scheduler = torch.optim.swa_utils.SWALR(optimizer, swa_lr=0.005, anneal_epochs=2)
    history = []
    for step in range(4):
        optimizer.zero_grad()
        backward(model, step)
        optimizer.step()
        averaged.update_parameters(model)
        scheduler.step()
        history.append([param.detach().clone() for param in model.parameters()])
    weights = [1 / 4] * 4 if average == "swa" else [1 / 8, 1 / 8, 1 / 4, 1 / 2]
    for i, param in enumerate(averaged.module.parameters()):
        expected = sum(w * values[i] for w, values in zip(weights, history, strict=True))
        torch.testing.assert_close(param.detach(), expected)


# ---- it trains --------------------------------------------------------------------


def logistic_regression():
    """(parameter, loss function, least loss): 200 points, linearly inseparable."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(200, 8, generator=generator, dtype=torch.float64)
    truth = torch.randn(8, generator=generator, dtype=torch.float64)
    noise = torch.randn(200, generator=generator, dtype=torch.float64)
    labels = (x @ truth + noise > 0).double()

    def loss_function(weight):
        return torch.nn.functional.binary_cross_entropy_with_logits(x @ weight, labels)

    def newton(weight):
        for _ in range(8):
            gradient = torch.func.grad(loss_function)(weight)
            weight = weight - torch.linalg.solve(
                torch.func.hessian(loss_function)(weight), gradient
            )
        return loss_function(weight).item()

    start = torch.zeros(8, dtype=torch.float64)
    return Parameter(start.clone()), loss_function, newton(start)


def quadratic():
    """(parameter, loss function, least loss): condition number 100."""
    scales = torch.logspace(-2, 0, 20, dtype=torch.float64)

    def loss_function(x):
        return 0.5 * (scales * x.square()).sum()

    return Parameter(torch.ones(20, dtype=torch.float64)), loss_function, 0.0


@pytest.mark.parametrize("problem", [logistic_regression, quadratic])
@pytest.mark.parametrize("plane", ["level", "anchored"])
@pytest.mark.parametrize("gap", ["gradient", "loss"])
@pytest.mark.parametrize(("cls", "lr"), [(AMAdamW, 0.3), (AMSGD, 10.0)])
def test_converges(problem, plane, gap, cls, lr):
    param, loss_function, least = problem()
    options = {"memory_plane": plane, "gap": gap, "beta_scope": "global", "weight_decay": 0.0}
    optimizer = cls([param], lr=lr, **options)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 200)
    first = loss_function(param).item()

    def closure():
        optimizer.zero_grad()
        loss = loss_function(param)
        loss.backward()
        return loss

    for _ in range(200):
        optimizer.step(closure)
        scheduler.step()
    assert loss_function(param).item() - least < 1e-3 * (first - least)


@both
def test_the_previous_loss_stays_where_it_is_while_its_parameter_is_frozen(cls):
    first, second = Parameter(torch.ones(3)), Parameter(torch.ones(2))
    optimizer = cls([first, second], gap="loss", beta_scope="global")
    for step, loss in enumerate((10.0, 5.0, 4.0, 3.0, 2.9)):
        first.requires_grad_(step not in (2, 3))
        first.grad = torch.ones(3) if first.requires_grad else None
        second.grad = torch.ones(2)
        optimizer.step(lambda loss=loss: loss)
        assert optimizer.state[first]["prev_loss"] == loss
        assert "prev_loss" not in optimizer.state[second]
