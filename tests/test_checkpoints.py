"""Checkpoints: nothing is lost between state_dict and load_state_dict, and torch's own load."""

import io
import math
from copy import deepcopy

import pytest
import torch
from cases import OPTIMIZERS, Group, backends, bits, make_optimizer, parameters, set_gradients
from snapshot import snapshot
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Linear, Parameter

from adamem_fused import AMSGD, AMAdamW

SHAPES = [(3, 2), (5,), ()]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", backends())


def make(cls, dtype=torch.float32, **options):
    groups = [Group(SHAPES, dtype), Group([(4,)], dtype, {"lr": 0.02, "weight_decay": 0.1})]
    return make_optimizer(cls, groups, **options)


def train(optimizer, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(optimizer, step=step)
        optimizer.step(lambda step=step: torch.tensor(1.0 / (step + 1)))
    return optimizer


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def state_tensors(optimizer):
    return [
        {name: (value.dtype, bits(value).tolist()) for name, value in optimizer.state[p].items()}
        for p in parameters(optimizer)
    ]


# ---- its own ----------------------------------------------------------------------


@both
@every_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_training_goes_on_bit_for_bit_after_save_and_load(cls, backend, dtype):
    straight = train(make(cls, dtype, backend=backend), 3)
    resumed = make(cls, dtype, backend=backend)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for ours, theirs in zip(parameters(resumed), parameters(straight), strict=True):
        ours.data.copy_(theirs.data)
    assert snapshot(resumed) == snapshot(straight)
    assert snapshot(train(resumed, 3, start=3)) == snapshot(train(straight, 3, start=3))


@both
@pytest.mark.parametrize("plane", ["level", "anchored"])
def test_training_with_the_gap_of_losses_goes_on_bit_for_bit(cls, plane):
    options = {"gap": "loss", "beta_scope": "global", "memory_plane": plane}
    straight = train(make(cls, **options), 3)
    resumed = make(cls, **options)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for ours, theirs in zip(parameters(resumed), parameters(straight), strict=True):
        ours.data.copy_(theirs.data)
    assert snapshot(train(resumed, 3, start=3)) == snapshot(train(straight, 3, start=3))


@both
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_set_optimizer_state_dict_loads_the_state_of_the_gap_of_losses(cls, tensor_lr):
    """torch makes the state that it loads into by a step at lr 0, without a closure."""
    lr = torch.tensor(0.1) if tensor_lr else 0.1
    model, other = Linear(3, 2), Linear(3, 2)
    straight, resumed = (
        cls(m.parameters(), lr=lr, gap="loss", beta_scope="global") for m in (model, other)
    )
    saved = get_optimizer_state_dict(model, train(straight, 3))
    kept = [param.detach().clone() for param in other.parameters()]
    set_optimizer_state_dict(other, resumed, saved)
    assert state_tensors(resumed) == state_tensors(straight)
    assert all(map(torch.equal, other.parameters(), kept))


@both
def test_the_previous_loss_goes_through_set_optimizer_state_dict_beside_a_frozen_layer(cls):
    """torch drops the state of frozen parameters, so it is not kept with the first if frozen."""
    models = [torch.nn.Sequential(Linear(3, 3), Linear(3, 2)) for _ in "ab"]
    for model in models:
        model[0].requires_grad_(False)
    straight, resumed = (
        cls(model.parameters(), lr=0.1, gap="loss", beta_scope="global") for model in models
    )
    for step in range(2):
        set_gradients(straight, step=step, skip=(0, 1))
        straight.step(lambda step=step: torch.tensor(1.0 / (step + 1)))
    saved = get_optimizer_state_dict(models[0], straight)
    set_optimizer_state_dict(models[1], resumed, saved)
    assert state_tensors(resumed) == state_tensors(straight)
    assert any("prev_loss" in state for state in resumed.state.values())


@both
@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_state_survives_loading_onto_another_dtype(cls, source, target):
    """No value changes: state stays as it is, or is widened for a float64 parameter."""
    saved = train(make(cls, source), 3)
    loaded = make(cls, target)
    loaded.load_state_dict(saved.state_dict())
    wide = torch.float64 in (source, target)
    for ours, theirs in zip(parameters(loaded), parameters(saved), strict=True):
        assert ours.dtype == target
        assert loaded.state[ours].keys() == saved.state[theirs].keys()
        for name, value in loaded.state[ours].items():
            assert value.dtype == (torch.float64 if wide else torch.float32), name
            assert torch.equal(value, saved.state[theirs][name].to(value.dtype)), name
    train(loaded, 1, start=3)

    back = make(cls, source)
    again = make(cls, target)
    again.load_state_dict(saved.state_dict())
    back.load_state_dict(through_a_file(again.state_dict()))
    for ours, theirs in zip(parameters(back), parameters(saved), strict=True):
        for name, value in back.state[ours].items():
            assert torch.equal(value, saved.state[theirs][name].to(value.dtype)), name


@both
def test_loading_copies(cls):
    """Neither the loaded dictionary nor its source changes when training goes on."""
    source = train(make(cls), 2)
    state_dict = source.state_dict()
    kept = deepcopy(state_dict)
    before = snapshot(source)
    loaded = make(cls)
    loaded.load_state_dict(state_dict)
    train(loaded, 2, start=2)
    assert snapshot(source) == before
    torch.testing.assert_close(state_dict["state"], kept["state"], rtol=0, atol=0)
    assert state_dict["param_groups"] == kept["param_groups"]


@both
def test_state_takes_its_parameters_layout(cls):
    """Saved from a contiguous parameter, loaded for a transposed one: same values."""
    value = torch.randn(4, 3)
    plain, transposed = Parameter(value.clone()), Parameter(value.t().contiguous().t())
    grads = [torch.randn(4, 3) for _ in range(2)]
    optimizers = cls([plain]), cls([transposed])
    plain.grad = grads[0]
    optimizers[0].step()
    transposed.data.copy_(plain.data)
    optimizers[1].load_state_dict(optimizers[0].state_dict())
    for name in cls.memories:
        loaded = optimizers[1].state[transposed][name]
        assert loaded.stride() == transposed.stride() == (1, 4)
        assert torch.equal(loaded, optimizers[0].state[plain][name])
    for param, optimizer in zip((plain, transposed), optimizers, strict=True):
        param.grad = grads[1]
        optimizer.step()
    torch.testing.assert_close(plain, transposed)


@both
def test_parameters_that_never_stepped_have_no_state(cls):
    optimizer = make(cls)
    set_gradients(optimizer, step=0, skip=(1, 3))
    optimizer.step()
    state_dict = optimizer.state_dict()
    assert sorted(state_dict["state"]) == [0, 2]
    loaded = make(cls)
    loaded.load_state_dict(through_a_file(state_dict))
    assert sorted(loaded.state_dict()["state"]) == [0, 2]
    set_gradients(loaded, step=1)
    loaded.step()
    steps = [loaded.state[param]["step"].item() for param in parameters(loaded)]
    assert steps == [2, 1, 2, 1]


@both
def test_loaded_options_are_the_saved_ones(cls):
    saved = make(cls, memory_plane="anchored", beta_scope="tensor", memory_lambda=0.3, foreach=True)
    loaded = make(cls, backend="reference")
    loaded.load_state_dict(saved.state_dict())
    for ours, theirs in zip(loaded.param_groups, saved.param_groups, strict=True):
        for key in saved.defaults.keys() - {"backend", "foreach", "fused", "capturable"}:
            assert ours[key] == theirs[key], key


@both
def test_how_to_compute_stays_as_it_is(cls):
    """A checkpoint may come from another machine."""
    saved = make(cls, backend="foreach").state_dict()
    for group in saved["param_groups"]:
        group |= {"backend": "cuda", "fused": True, "capturable": True}
    loaded = make(cls, backend="reference", capturable=False)
    loaded.load_state_dict(saved)
    for group in loaded.param_groups:
        assert group["backend"] == "reference" and group["fused"] is None
        assert group["capturable"] is False
    train(loaded, 1)


@both
def test_the_users_own_state_alone_loads(cls):
    saved = make(cls)
    for param in parameters(saved):
        saved.state[param]["mine"] = 3
    loaded = make(cls)
    loaded.load_state_dict(saved.state_dict())
    assert all(loaded.state[param] == {"mine": 3} for param in parameters(loaded))
    train(loaded, 1)
    assert all(loaded.state[param]["mine"] == 3 for param in parameters(loaded))


@both
@pytest.mark.parametrize("shape", [(), (1,)])
def test_tensor_lr_survives(cls, shape):
    saved = train(make(cls, lr=torch.full(shape, 0.03)), 2)
    loaded = make(cls)
    loaded.load_state_dict(through_a_file(saved.state_dict()))
    lr = loaded.param_groups[0]["lr"]
    assert torch.equal(lr, torch.full(shape, 0.03))
    train(loaded, 1, start=2)


@both
def test_scheduler_and_optimizer_resume_together(cls):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)

    straight, resumed = make(cls), make(cls)
    scheduler = schedule(straight)
    for step in range(3):
        train(straight, 1, start=step)
        scheduler.step()
    other = schedule(resumed)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    other.load_state_dict(scheduler.state_dict())
    for ours, theirs in zip(parameters(resumed), parameters(straight), strict=True):
        ours.data.copy_(theirs.data)
    for step in range(3, 7):
        for optimizer, its in ((straight, scheduler), (resumed, other)):
            train(optimizer, 1, start=step)
            its.step()
    assert snapshot(resumed) == snapshot(straight)


@pytest.mark.parametrize(("cls", "other"), [(AMAdamW, AMSGD), (AMSGD, AMAdamW)])
def test_state_of_the_other_class_is_refused(cls, other):
    saved = train(make(other), 2).state_dict()
    optimizer = train(make(cls), 2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=cls.memories[0]):
        optimizer.load_state_dict(saved)
    assert snapshot(optimizer) == before


# ---- torch.optim's ----------------------------------------------------------------


def torch_pair(torch_cls, cls, torch_options, steps=3, dtype=torch.float64, **options):
    """A torch optimizer that took some steps, and ours with its checkpoint, over equal values."""
    torch.manual_seed(0)
    source = torch.nn.ParameterList([torch.randn(3, 2, dtype=dtype), torch.randn(4, dtype=dtype)])
    theirs = torch_cls(source.parameters(), **torch_options)
    for _ in range(steps):
        for param in source:
            param.grad = torch.randn_like(param)
        theirs.step()
    target = [Parameter(param.detach().clone()) for param in source]
    ours = cls(target, **options)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    return theirs, ours, list(source), target


def adamw_by_hand(x, g, d, v, t, beta_prod, prev_lr, lr, beta_max, beta2, eps, mu, lam):
    """One step of AM-AdamW ("level"), element by element in Python's floats."""
    sums = [0.0, 0.0, 0.0, 0.0]
    terms = []
    for xi, gi, di, vi in zip(x, g, d, v, strict=True):
        vi = beta2 * vi + (1 - beta2) * gi * gi
        p = (1 - beta_max * beta_prod) * (math.sqrt(vi / (1 - beta2**t)) + eps)
        m = 1 / (p * (1 + lam * p))
        e = di - gi
        for k, term in enumerate(
            (gi * (di / p + mu * xi), e * (gi + lam * p * di) * m, xi * e, e * e * m)
        ):
            sums[k] += term
        terms.append((xi, gi, di, p))
    gap = prev_lr * sums[0]
    num = (1 + mu * lr) * gap / lr - sums[1] - mu * sums[2]
    beta = min(max(num / sums[3], 0.0), beta_max)
    new_x = []
    for xi, gi, di, p in terms:
        di = ((1 - beta) * gi + (beta + lam * p) * di) / (1 + lam * p)
        new_x.append((1 - lr * mu) * xi - lr * di / p)
    return new_x, beta


def sgd_by_hand(x, g, d, prev_lr, lr, beta_max, mu, lam):
    """One step of AM-SGD ("level") of one tensor, element by element in Python's floats."""
    g = [gi + mu * xi for xi, gi in zip(x, g, strict=True)]
    gd = sum(gi * di for gi, di in zip(g, d, strict=True))
    gg = sum(gi * gi for gi in g)
    dd = sum(di * di for di in d)
    num = (1 + lam) * (prev_lr / lr) * gd - (gd - gg) - lam * (dd - gd)
    den = sum((di - gi) ** 2 for gi, di in zip(g, d, strict=True))
    beta = min(max(num / den, 0.0), beta_max)
    new_d = [((beta + lam) * di + (1 - beta) * gi) / (1 + lam) for gi, di in zip(g, d, strict=True)]
    return [xi - lr * di for xi, di in zip(x, new_d, strict=True)], beta


ADAMW_VARIANTS = {
    "plain": {},
    "fused": {"fused": True},
    "foreach": {"foreach": True},
    "forloop": {"foreach": False},
    "tensor lr": {"lr": torch.tensor(0.01, dtype=torch.float64), "foreach": False},
    "other betas": {"betas": (0.7, 0.95), "weight_decay": 0.2, "eps": 1e-4},
}


@every_backend
@pytest.mark.parametrize("variant", ADAMW_VARIANTS)
@pytest.mark.parametrize("step_as_number", [False, True])
def test_adamw_checkpoint_continues_as_the_formulas_say(backend, variant, step_as_number):
    torch_options = {"lr": 0.01, **ADAMW_VARIANTS[variant]}
    theirs, ours, source, target = torch_pair(torch.optim.AdamW, AMAdamW, torch_options)
    ours.param_groups[0]["backend"] = backend
    if step_as_number:
        state_dict = theirs.state_dict()
        for state in state_dict["state"].values():
            state["step"] = int(state["step"].item())
        ours.load_state_dict(state_dict)
    group = ours.param_groups[0]
    lr = float(torch_options["lr"])
    beta1, beta2 = theirs.param_groups[0]["betas"]
    assert group["betas"] == (beta1, beta2)
    by_hand = []
    for param, other in zip(target, source, strict=True):
        state, torch_state = ours.state[param], theirs.state[other]
        assert state["step"].item() == 3
        assert state["beta_prod"].item() == pytest.approx(beta1**3, rel=1e-15)
        assert state["prev_lr"].item() == lr
        for name in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(state[name], torch_state[name])
        param.grad = torch.randn_like(param)
        before = [
            t.flatten().tolist() for t in (param, param.grad, state["exp_avg"], state["exp_avg_sq"])
        ]
        expected, beta = adamw_by_hand(
            *before, 4, beta1**3, lr, lr, beta1, beta2, group["eps"], group["weight_decay"], 0.1
        )
        by_hand.append((expected, beta))
    ours.step()
    for param, (expected, beta) in zip(target, by_hand, strict=True):
        assert param.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert ours.state[param]["beta"].item() == pytest.approx(beta, rel=1e-11)
        assert ours.state[param]["step"].item() == 4


SGD_VARIANTS = {
    "momentum": {"momentum": 0.9},
    "fused": {"momentum": 0.9, "fused": True},
    "foreach": {"momentum": 0.9, "foreach": True},
    "tensor lr": {"momentum": 0.9, "lr": torch.tensor(0.05, dtype=torch.float64), "foreach": False},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
}


@every_backend
@pytest.mark.parametrize("variant", SGD_VARIANTS)
def test_sgd_checkpoint_continues_as_the_formulas_say(backend, variant):
    torch_options = {"lr": 0.05, **SGD_VARIANTS[variant]}
    options = {"backend": backend, "beta_scope": "tensor"}
    theirs, ours, source, target = torch_pair(torch.optim.SGD, AMSGD, torch_options, **options)
    lr, group = float(torch_options["lr"]), ours.param_groups[0]
    assert group["beta_max"] == 0.9
    assert group["backend"] == backend
    by_hand = []
    for param, other in zip(target, source, strict=True):
        state = ours.state[param]
        assert torch.equal(state["momentum_buffer"], theirs.state[other]["momentum_buffer"])
        assert state["prev_lr"].item() == lr
        assert state["step"].item() >= 1
        param.grad = torch.randn_like(param)
        before = [t.flatten().tolist() for t in (param, param.grad, state["momentum_buffer"])]
        by_hand.append(sgd_by_hand(*before, lr, lr, 0.9, group["weight_decay"], 0.1))
    ours.step()
    for param, (expected, beta) in zip(target, by_hand, strict=True):
        assert param.flatten().tolist() == pytest.approx(expected, rel=1e-12, abs=1e-14)
        assert ours.state[param]["beta"].item() == pytest.approx(beta, rel=1e-11)


@every_backend
def test_sgd_checkpoint_without_momentum_starts_anew(backend):
    _, ours, _, target = torch_pair(torch.optim.SGD, AMSGD, {"lr": 0.05}, backend=backend)
    assert ours.param_groups[0]["lr"] == 0.05
    before = [param.detach().clone() for param in target]
    for param in target:
        param.grad = torch.randn_like(param)
    ours.step()
    for param, start in zip(target, before, strict=True):  # d = g
        torch.testing.assert_close(param.detach(), start - 0.05 * param.grad)
        assert ours.state[param]["step"].item() == 1


def test_sgd_state_of_none_starts_anew():
    """As older releases of torch save SGD without momentum."""
    saved = torch.optim.SGD([Parameter(torch.ones(3))], lr=0.1).state_dict()
    saved["state"] = {0: {"momentum_buffer": None}}
    param = Parameter(torch.ones(3))
    optimizer = AMSGD([param])
    optimizer.load_state_dict(saved)
    param.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[param]["step"].item() == 1


@pytest.mark.parametrize("steps", [1, 3])
def test_adamw_checkpoint_with_amsgrad_is_refused(steps):
    param = Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([param], amsgrad=True)
    for _ in range(steps):
        param.grad = torch.ones(3)
        theirs.step()
    ours = AMAdamW([Parameter(torch.ones(3))])
    before = snapshot(ours)
    with pytest.raises(ValueError, match=r"amsgrad=True.*AMAdamW does not have"):
        ours.load_state_dict(theirs.state_dict())
    assert snapshot(ours) == before


def test_adam_checkpoint_with_coupled_weight_decay_is_refused():
    param = Parameter(torch.ones(3))
    theirs = torch.optim.Adam([param], weight_decay=0.1)
    param.grad = torch.ones(3)
    theirs.step()
    ours = AMAdamW([Parameter(torch.ones(3))])
    before = snapshot(ours)
    with pytest.raises(ValueError, match=r"weight_decay 0\.1 is Adam's, coupled"):
        ours.load_state_dict(theirs.state_dict())
    assert snapshot(ours) == before


def test_state_that_amadamw_does_not_have_is_left_out():
    param = Parameter(torch.ones(3))
    theirs = torch.optim.NAdam([param])
    param.grad = torch.ones(3)
    theirs.step()
    ours = AMAdamW([Parameter(torch.ones(3))])
    ours.load_state_dict(theirs.state_dict())
    names = {*AMAdamW.memories, *AMAdamW.scalars}
    assert set(ours.state_dict()["state"][0]) == names


@pytest.mark.parametrize(
    ("torch_cls", "cls", "torch_options"),
    [(torch.optim.AdamW, AMAdamW, {}), (torch.optim.SGD, AMSGD, {"momentum": 0.9})],
)
def test_torch_checkpoint_keeps_this_optimizers_own_options(torch_cls, cls, torch_options):
    torch_options = {"lr": 0.02, "weight_decay": 0.3, "foreach": True, **torch_options}
    options = {"memory_plane": "anchored", "memory_lambda": 0.2}
    options |= {"backend": "reference", "fused": False, "capturable": True}
    theirs, ours, _, _ = torch_pair(torch_cls, cls, torch_options, **options)
    group = ours.param_groups[0]
    assert group["lr"] == 0.02
    assert group["weight_decay"] == 0.3
    for key, value in options.items():
        assert group[key] == value
    assert group["foreach"] is None
    # What was loaded is now a checkpoint of this class, and loads as one.
    again = cls([Parameter(torch.zeros_like(p)) for p in parameters(theirs)])
    again.load_state_dict(through_a_file(ours.state_dict()))
    assert state_tensors(again) == state_tensors(ours)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_adamw_state_is_widened(dtype):
    """torch keeps its state in the parameter's dtype: the values stay, in float32."""
    theirs, ours, source, target = torch_pair(torch.optim.AdamW, AMAdamW, {}, dtype=dtype)
    for param, other in zip(target, source, strict=True):
        for name in AMAdamW.memories:
            value = ours.state[param][name]
            assert value.dtype == torch.float32
            assert torch.equal(value, theirs.state[other][name].float())
        param.grad = torch.randn_like(param)
    ours.step()


def test_first_torch_step_agrees_with_adamw_where_the_memory_is_kept_at_its_cap():
    """With memory_lambda=0 and beta at betas[0], a step after loading is AdamW's own."""
    theirs, ours, source, target = torch_pair(
        torch.optim.AdamW, AMAdamW, {"lr": 1e-3}, memory_lambda=0.0
    )
    # A gradient along the memory: the model keeps as much of it as it may.
    for param, other in zip(target, source, strict=True):
        other.grad = 0.5 * theirs.state[other]["exp_avg"].clone()
        param.grad = other.grad.clone()
    ours.step()
    theirs.step()
    for param, other in zip(target, source, strict=True):
        assert ours.state[param]["beta"].item() == 0.9
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.state[param]["exp_avg"], theirs.state[other]["exp_avg"])


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [(torch.optim.AdamW, {}, AMAdamW), (torch.optim.SGD, {"momentum": 0.9}, AMSGD)],
)
def test_there_and_back_again_is_a_checkpoint_of_torch_s(theirs, options, ours):
    """torch's optimizers keep the options of this package's, which are then no sign of it."""
    first, last = (ours([Parameter(torch.ones(3))]) for _ in "ab")
    between = theirs([Parameter(torch.ones(3))], **options)
    train(first, 1)
    saved = first.state_dict()
    (own,) = between.state_dict()["param_groups"]
    saved["param_groups"] = [own | saved["param_groups"][0]]
    between.load_state_dict(saved)
    train(between, 20, start=1)
    last.load_state_dict(between.state_dict())
    (state,) = last.state.values()
    if ours is AMAdamW:
        assert state["step"] == 21
        assert state["beta_prod"].item() == pytest.approx(last.param_groups[0]["betas"][0] ** 21)
    (group,) = last.param_groups
    assert not {"amsgrad", "momentum", "nesterov", "dampening", "decoupled_weight_decay"} & set(
        group
    )


@both
@pytest.mark.parametrize("entry", ["momentum", "nesterov", "amsgrad", "mine"])
def test_a_user_s_own_entry_in_a_group_makes_no_checkpoint_of_torch_s(cls, entry):
    """A trainer may keep what it likes there, under whatever name."""
    optimizer, loaded = (cls([{"params": [Parameter(torch.ones(3))], entry: 0.5}]) for _ in "ab")
    train(optimizer, 3)
    loaded.load_state_dict(optimizer.state_dict())
    loaded.param_groups[0]["params"][0].data.copy_(optimizer.param_groups[0]["params"][0])
    assert snapshot(loaded) == snapshot(optimizer)


@pytest.mark.parametrize(
    ("theirs", "options", "ours"),
    [
        (torch.optim.SGD, {"momentum": 0.9}, AMAdamW),
        (torch.optim.AdamW, {}, AMSGD),
        (torch.optim.RMSprop, {}, AMAdamW),
        (torch.optim.Adagrad, {}, AMSGD),
        (torch.optim.Rprop, {}, AMAdamW),
    ],
)
def test_state_of_another_kind_of_optimizer_is_refused(theirs, options, ours):
    first = theirs([Parameter(torch.ones(3))], lr=0.01, **options)
    last = ours([Parameter(torch.ones(3))])
    train(first, 2)
    before = snapshot(last)
    with pytest.raises(ValueError, match=f"and no .*another optimizer's; {ours.__name__} loads"):
        last.load_state_dict(first.state_dict())
    assert snapshot(last) == before


# ---- a beta a row -----------------------------------------------------------------


ROW_SHAPES = [(3, 16), (4, 2, 10), (5,), (6, 3), (1, 20), (0, 16)]
ROWS = [(3,), (4,), (), (), (1,), (0,)]


def make_rows(cls, dtype=torch.float32, scope="row", **options):
    groups = [Group(ROW_SHAPES, dtype), Group([(2, 30)], dtype, {"lr": 0.02, "weight_decay": 0.1})]
    return make_optimizer(cls, groups, beta_scope=scope, **options)


def shapes_of(optimizer, name="beta"):
    return [tuple(optimizer.state[param][name].shape) for param in parameters(optimizer)]


def set_scope(optimizer, scope):
    for group in optimizer.param_groups:
        group["beta_scope"] = scope


def with_scope(state_dict, scope):
    groups = [{**group, "beta_scope": scope} for group in state_dict["param_groups"]]
    return {**state_dict, "param_groups": groups}


@both
@every_backend
@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64])
def test_rows_go_on_bit_for_bit_after_save_and_load(cls, backend, dtype):
    straight = train(make_rows(cls, dtype, backend=backend), 3)
    resumed = make_rows(cls, dtype, "tensor", backend=backend)
    resumed.load_state_dict(through_a_file(straight.state_dict()))
    for ours, theirs in zip(parameters(resumed), parameters(straight), strict=True):
        ours.data.copy_(theirs.data)
    assert shapes_of(resumed) == [*ROWS, (2,)]
    assert snapshot(resumed) == snapshot(straight)
    assert snapshot(train(resumed, 3, start=3)) == snapshot(train(straight, 3, start=3))


@both
@every_backend
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_tensors_beta_becomes_that_of_each_of_its_rows(cls, backend, scope):
    """By loading into other groups, or by changing the scope between steps: the same."""
    changed = train(make_rows(cls, scope=scope, backend=backend), 3)
    before = [dict(changed.state[param]) for param in parameters(changed)]
    saved = through_a_file(changed.state_dict())
    loaded = make_rows(cls, scope=scope, backend=backend)
    loaded.load_state_dict(with_scope(saved, "row"))
    for ours, theirs in zip(parameters(loaded), parameters(changed), strict=True):
        ours.data.copy_(theirs.data)
    for name in cls.row_scalars:
        assert shapes_of(loaded, name) == [*ROWS, (2,)]
        for param, old in zip(parameters(loaded), before, strict=True):
            assert (loaded.state[param][name] == old[name]).all()
    set_scope(changed, "row")
    for step in range(3, 6):
        assert snapshot(train(changed, 1, start=step)) == snapshot(train(loaded, 1, start=step))
    assert shapes_of(changed) == [*ROWS, (2,)]


@both
@every_backend
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_the_betas_of_rows_become_their_mean(cls, backend, scope):
    changed = train(make_rows(cls, backend=backend), 3)
    # In no row the same, so that the mean is none of them.
    for param in parameters(changed):
        for name in cls.row_scalars:
            value = changed.state[param][name]
            value.copy_((torch.arange(value.numel()).reshape(value.shape) + 1) * 0.2)
    loaded = make_rows(cls, backend=backend)
    loaded.load_state_dict(with_scope(through_a_file(changed.state_dict()), scope))
    for ours, theirs in zip(parameters(loaded), parameters(changed), strict=True):
        ours.data.copy_(theirs.data)
    means = [0.4, 0.5, 0.2, 0.2, 0.2, None, 0.3]
    for name in cls.row_scalars:
        assert shapes_of(loaded, name) == [()] * 7
        for param, mean in zip(parameters(loaded), means, strict=True):
            # That of no rows is as at the beginning.
            expected = cls.scalars[name] if mean is None else mean
            assert loaded.state[param][name].item() == pytest.approx(expected, rel=1e-6)
    set_scope(changed, scope)
    for step in range(3, 6):
        assert snapshot(train(changed, 1, start=step)) == snapshot(train(loaded, 1, start=step))
    assert shapes_of(changed) == [()] * 7


@both
def test_a_step_that_raises_leaves_the_betas_of_the_old_scope(cls):
    optimizer = train(make_rows(cls), 2)
    set_scope(optimizer, "tensor")
    set_gradients(optimizer, step=2)
    parameters(optimizer)[2].grad = torch.ones(5).to_sparse()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    optimizer.add_param_group({"params": [Parameter(torch.ones(2))], "beta_scope": "tensor"})
    set_gradients(optimizer, step=2)
    optimizer.state[parameters(optimizer)[-1]] = {"step": torch.zeros(())}
    with pytest.raises(ValueError, match="has step and no"):
        optimizer.step()
    optimizer.param_groups.pop()
    assert snapshot(optimizer)[: len(before)] == before


@every_backend
def test_adamw_checkpoint_continues_row_by_row_as_the_formulas_say(backend):
    shapes = [(3, 16), (2, 4, 5), (7,)]
    source = [Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]
    theirs = torch.optim.AdamW(source, lr=0.01)
    for step in range(3):
        set_gradients(theirs, step=step)
        theirs.step()
    target = [Parameter(param.detach().clone()) for param in source]
    ours = AMAdamW(target, beta_scope="row", backend=backend)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    set_gradients(ours, step=3)
    expected = []
    for param in target:
        state = ours.state[param]
        rows = 1 if param.dim() == 1 else len(param)
        assert state["beta_prod"].shape == state["beta"].shape == param.shape[: param.dim() > 1]
        assert state["beta_prod"].reshape(-1).tolist() == pytest.approx([0.9**3] * rows, rel=1e-14)
        assert (state["beta"] == 0.9).all() and state["step"] == 3 and state["prev_lr"] == 0.01
        tensors = (param.detach(), param.grad, state["exp_avg"], state["exp_avg_sq"])
        lists = zip(*(t.reshape(rows, -1).tolist() for t in tensors), strict=True)
        expected += [
            adamw_by_hand(*row, 4, 0.9**3, 0.01, 0.01, 0.9, 0.999, 1e-8, 0.01, 0.1) for row in lists
        ]
    ours.step()
    rows = [row for p in target for row in p.detach().reshape(p.shape[0] ** (p.dim() > 1), -1)]
    betas = [beta for p in target for beta in ours.state[p]["beta"].reshape(-1).tolist()]
    assert len(rows) == len(betas) == len(expected) == 6
    for row, beta, (x, by_hand) in zip(rows, betas, expected, strict=True):
        assert row.tolist() == pytest.approx(x, rel=1e-12, abs=1e-14)
        assert beta == pytest.approx(by_hand, rel=1e-11)


@every_backend
def test_sgd_checkpoint_continues_row_by_row_as_the_formulas_say(backend):
    source = [Parameter(torch.randn(3, 16, dtype=torch.float64))]
    theirs = torch.optim.SGD(source, lr=0.05, momentum=0.9)
    for step in range(3):
        set_gradients(theirs, step=step)
        theirs.step()
    (param,) = target = [Parameter(source[0].detach().clone())]
    ours = AMSGD(target, beta_scope="row", backend=backend)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    set_gradients(ours, step=3)
    buffer = ours.state[param]["momentum_buffer"]
    assert ours.state[param]["beta"].tolist() == [0.9] * 3
    rows = zip(param.tolist(), param.grad.tolist(), buffer.tolist(), strict=True)
    expected = [sgd_by_hand(*row, 0.05, 0.05, 0.9, 0.0, 0.1) for row in rows]
    ours.step()
    for row, beta, (x, by_hand) in zip(
        param.tolist(), ours.state[param]["beta"].tolist(), expected, strict=True
    ):
        assert row == pytest.approx(x, rel=1e-12, abs=1e-14)
        assert beta == pytest.approx(by_hand, rel=1e-11)


@both
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize(
    ("index", "shape", "allowed"),
    [
        (0, (2,), r"\[\] or \[3\]"),
        (0, (3, 1), r"\[\] or \[3\]"),
        (0, (3, 16), r"\[\] or \[3\]"),
        (1, (8,), r"\[\] or \[4\]"),
        (2, (5,), r"\[\]"),
        (3, (6,), r"\[\]"),
    ],
)
def test_loaded_betas_of_another_shape_are_refused(cls, scope, index, shape, allowed):
    saved = train(make_rows(cls), 2).state_dict()
    optimizer = train(make_rows(cls), 1)
    before = snapshot(optimizer)
    for name in cls.row_scalars:
        state = {i: dict(values) for i, values in saved["state"].items()}
        state[index][name] = torch.zeros(shape)
        message = rf"{name} has shape .*for a parameter of shape .* it has to be {allowed}$"
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(with_scope({**saved, "state": state}, scope))
        assert snapshot(optimizer) == before


@both
def test_set_optimizer_state_dict_loads_rows(cls):
    models = [torch.nn.Sequential(Linear(16, 3), Linear(3, 2)) for _ in "ab"]
    straight, resumed = (cls(model.parameters(), beta_scope="row") for model in models)
    saved = get_optimizer_state_dict(models[0], train(straight, 3))
    set_optimizer_state_dict(models[1], resumed, saved)
    assert state_tensors(resumed) == state_tensors(straight)
    assert shapes_of(resumed) == [(3,), (), (), ()]
