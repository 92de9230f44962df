"""Every backend against the reference.

Two kinds of comparison. Free-running: both optimizers keep their own state for 200 steps,
with gradients that do not depend on the parameters. Lockstep: every step starts from the
reference's state. The second is the one that can be exact about parameters of low
precision, whose roundings are discontinuous, and about random small tensors, whose beta
may be badly conditioned: a rounding error then stays in its step instead of being
carried into the next.
"""

import os

import pytest
import torch
from cases import (
    LOW_PRECISION,
    OPTIMIZERS,
    Group,
    assert_lockstep,
    assert_same_bits,
    assert_step_agrees,
    backends,
    bits,
    each_pair,
    make_optimizer,
    parameters,
    random_tensor,
    set_gradients,
    snapshot,
    take_step,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS

STEPS = 200
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SCOPES_AND_GAPS = (("tensor", "gradient"), ("global", "gradient"), ("global", "loss"))


def groups(cls, dtype):
    """Groups that differ in every hyperparameter that may differ between groups."""
    cap = {"betas": (0.95, 0.99)} if cls is AMAdamW else {"beta_max": 0.95}
    return [
        Group([(), (33, 5)], dtype),
        Group([(3, 4, 5)], dtype, {"memory_plane": "anchored", "memory_lambda": 0.0, **cap}),
        Group([], dtype, {"weight_decay": 0.1}),
        Group(
            [(400,), (0, 3)],
            dtype,
            {"memory_plane": "anchored", "weight_decay": 0.1, "maximize": True},
        ),
    ]


def pair(cls, groups, backend, **options):
    return [make_optimizer(cls, groups, name, **options) for name in ("reference", backend)]


def set_lr(optimizers, lr):
    """lr for the first group, 2 lr for the second, and so on."""
    for optimizer in optimizers:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = (i + 1) * lr


def bouncing_lr(step):
    """From 0 up and down to 0 again, four times in 200 steps; 0 twice in a row in between."""
    return 1e-2 * max(0, min(step % 50, 48 - step % 50)) / 24


def test_the_cpu_backend_is_there():
    """Or else most of these tests skip; a build without it is to be asked for."""
    if os.environ.get("ADAMEM_NO_EXTENSION") == "1":
        pytest.skip("ADAMEM_NO_EXTENSION=1")
    assert BACKENDS["cpu"].unavailable(torch.device("cpu")) is None


def run_side_by_side(reference, other, schedule, compare_every=8, **close):
    """STEPS steps, comparing now and then: what goes astray does not come back.

    `schedule(step)` sets what changes before a step. Returns the reference's betas.
    """
    betas = []
    sizes = [param.detach().abs() for param in parameters(reference)]
    for step in range(STEPS):
        schedule(step)
        # The second tensor has a gradient now and then.
        set_gradients(reference, other, step=step, skip=[1] if step % 3 else [])
        compare = step % compare_every == compare_every - 1 or step < 3
        before = snapshot(reference) if compare else None
        take_step(reference, step)
        take_step(other, step)
        # Two that are an ulp apart stay so while they pass through 0, where ulps are smaller.
        sizes = list(map(torch.maximum, sizes, (p.detach().abs() for p in parameters(reference))))
        if compare:
            assert_step_agrees(other, reference, before, low_precision_sizes=sizes, **close)
        betas += [reference.state[p]["beta"].item() for p in parameters(reference)]
    return betas


@pytest.mark.parametrize("backend", backends("reference"))
@each_pair("cls, dtype, shared", OPTIMIZERS, (torch.float32, torch.float64), SCOPES_AND_GAPS)
def test_200_steps_agree_with_the_reference(backend, cls, dtype, shared):
    scope, gap = shared
    twins = pair(cls, groups(cls, dtype), backend, beta_scope=scope, gap=gap)
    betas = run_side_by_side(*twins, lambda step: set_lr(twins, bouncing_lr(step)))
    # Or else beta's agreement would say little.
    assert sum(0.01 < beta < 0.88 for beta in betas) > len(betas) / 20
    assert min(betas) == 0 and max(betas) > 0.88


def warm_up(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 20))


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS - 1)


def one_cycle(optimizer):
    # It cycles betas[0] (AMSGD has no option of that name).
    cycle_momentum = isinstance(optimizer, AMAdamW)
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        max_lr=2e-2,
        total_steps=STEPS,
        cycle_momentum=cycle_momentum,
        final_div_factor=float("inf"),
    )


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "make_scheduler, lr",
    [(warm_up, 1e-2), (cosine, torch.tensor(1e-2, dtype=torch.float64)), (one_cycle, 1e-2)],
)
def test_schedules_agree_with_the_reference(backend, cls, make_scheduler, lr):
    lr = lr.clone() if isinstance(lr, torch.Tensor) else lr  # the scheduler writes into it
    twins = pair(cls, groups(cls, torch.float64), backend, lr=lr)
    for optimizer in twins:
        for group in optimizer.param_groups:
            group["lr"] = lr.clone() if isinstance(lr, torch.Tensor) else lr
    schedulers = [make_scheduler(optimizer) for optimizer in twins]
    lrs = []

    def schedule(step):
        if step > 0:
            for optimizer, scheduler in zip(twins, schedulers, strict=True):
                optimizer._opt_called = True
                scheduler.step()
        lrs.append(float(twins[0].param_groups[0]["lr"]))

    run_side_by_side(*twins, schedule)
    assert 0.0 in (lrs[0], lrs[-1])


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_200_steps_of_low_precision_agree_in_lockstep(backend, cls, dtype):
    assert_lockstep(*pair(cls, groups(cls, dtype), backend), STEPS)


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", LOW_PRECISION)
def test_200_steps_of_low_precision_stay_close(backend, cls, dtype):
    """Without weight decay the state does not depend on x and agrees as in float32.

    x does not: each step rounds it, and where the float32 results of the two backends lie on
    either side of a midpoint the two are an ulp apart from then on. The float32 results
    differ by 1e-7 or so, 1e-4 of an ulp, so that an element meets such a step with a
    probability of some 200 times 1e-4 (bfloat16; less than ten times that in float16), and
    hardly ever three times.
    """
    group = Group([(50, 40), (17,)], dtype)
    reference, other = pair(cls, [group], backend, lr=1e-2, weight_decay=0.0)
    run_side_by_side(reference, other, lambda step: None, low_precision_ulps=3)
    ours, theirs = parameters(other)[0], parameters(reference)[0]
    assert (ours != theirs).double().mean() < (0.1 if dtype == torch.bfloat16 else 0.3)


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope, gap", SCOPES_AND_GAPS)
def test_first_gradients_that_come_late_agree(backend, cls, scope, gap):
    """Beside others that have memory, at steps at which the shared beta is at neither bound."""
    twins = pair(cls, groups(cls, torch.float64), backend, beta_scope=scope, gap=gap)
    first = {1: 4, 3: 5}
    assert_lockstep(*twins, steps=7, skip=lambda step: [i for i in first if step < first[i]])


# Around a pack's lanes, a block of the float32 sums, a chunk, what is small, and a wave.
SIZES = (0, 1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 1023, 1024, 1025, 1039, 1041)
SIZES += (4095, 4096, 4097, 8191, 16383, 16385, 32768, 32769, 65536, 65537, 262144, 262145)


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_at_the_edges_agree(backend, cls, dtype):
    groups = [Group([(), *((size,) for size in SIZES)], dtype)]
    assert_lockstep(*pair(cls, groups, backend, beta_scope="tensor", weight_decay=0.1), steps=3)


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_two_million_elements_agree(backend, cls, dtype):
    groups = [Group([(2000, 1000)], dtype)]
    assert_lockstep(*pair(cls, groups, backend, weight_decay=0.1), steps=2)


shapes = st.lists(st.integers(0, 12), max_size=4).map(tuple)
sizes = st.integers(0, 40_000).map(lambda size: (size,))


@st.composite
def random_groups(draw, cls):
    result = []
    for _ in range(draw(st.integers(1, 3))):
        cap = draw(st.sampled_from([0.0, 0.5, 0.89, 0.99]))
        options = {
            "lr": draw(st.sampled_from([0.0, 1e-4, 3e-3, 0.1])),
            "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
            "memory_lambda": draw(st.sampled_from([0.0, 0.1, 2.0])),
            "memory_plane": draw(st.sampled_from(["level", "anchored"])),
            "maximize": draw(st.booleans()),
        }
        if cls is AMAdamW:
            options["betas"] = (cap, draw(st.sampled_from([0.0, 0.9, 0.999])))
            options["eps"] = draw(st.sampled_from([1e-8, 1e-3]))
        else:
            options["beta_max"] = cap
        tensors = draw(st.lists(st.one_of(shapes, sizes), max_size=4))
        result.append(Group(tensors, draw(st.sampled_from(DTYPES)), options))
    return result


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@given(data=st.data())
def test_random_shapes_and_hyperparameters_agree(backend, cls, data):
    scope, gap = data.draw(st.sampled_from(SCOPES_AND_GAPS))
    seed = data.draw(st.integers(0, 1000))
    reference, other = pair(
        cls, data.draw(random_groups(cls)), backend, seed=seed, beta_scope=scope, gap=gap
    )
    if not parameters(reference):
        return
    missing = data.draw(st.integers(0, 3))
    assert_lockstep(
        reference,
        other,
        steps=4,
        seed=seed,
        skip=lambda step: [missing] if step % 2 else [],
        conditioned=True,
    )


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope, gap", SCOPES_AND_GAPS)
def test_an_empty_group_changes_nothing(backend, cls, scope, gap):
    tensors = Group([(3, 4), ()], torch.float64)
    options = {"beta_scope": scope, "gap": gap}
    plain = make_optimizer(cls, [tensors], backend, **options)
    with_empty = make_optimizer(cls, [Group([]), tensors, Group([])], backend, **options)
    for step in range(3):
        set_gradients(plain, with_empty, step=step)
        take_step(plain, step)
        take_step(with_empty, step)
        assert_same_bits(with_empty, plain)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_leaves_gradients_as_they_were(backend, cls, dtype):
    optimizer = make_optimizer(cls, groups(cls, dtype), backend)
    for step in range(3):
        set_gradients(optimizer, step=step)
        before = [param.grad.clone() for param in parameters(optimizer)]
        take_step(optimizer, step)
        for param, grad in zip(parameters(optimizer), before, strict=True):
            assert torch.equal(bits(param.grad), bits(grad))


class Indexing(TorchDispatchMode):
    """Counts indexing with numbers from the host: on a GPU a copy that is waited for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_foreach_step_waits_for_no_copy_of_indices(cls, scope):
    groups = [Group([(3,), (4,)]), Group([(5,)], torch.bfloat16), Group([(2,)], torch.float64)]
    optimizer = make_optimizer(cls, groups, "foreach", beta_scope=scope)
    set_gradients(optimizer, step=0)
    with Indexing() as indexing:
        optimizer.step()
    assert indexing.count == 0


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-3), (torch.float64, 1e-6)])
def test_beta_where_the_memory_is_near_the_gradient(backend, cls, dtype, near):
    """num is then a sum of terms that cancel, 1 / near times as large as den."""
    groups = [Group([(1000,)], dtype)]
    optimizers = pair(cls, groups, backend, memory_plane="anchored", memory_lambda=0.0, lr=0.013)
    # Of one size, so that P is the same for all elements, and M a common factor.
    g = random_tensor((1000,), torch.float64).sign()
    for optimizer in optimizers:
        (param,) = parameters(optimizer)
        param.grad = g.to(dtype)
        optimizer.step()
        c = 0.013 / 0.0117
        optimizer.param_groups[0].update(lr=0.0117, weight_decay=0.0)
        # With e this far from being orthogonal to g, beta is 1/2.
        e = random_tensor((1000,), torch.float64, seed=7) * near
        e -= (e @ g + (0.5 + c) / (1 + c) * (e @ e)) / (g @ g) * g
        optimizer.state[param][cls.memories[0]].copy_(g + e)
        optimizer.step()
    reference, ours = (
        optimizer.state[p]["beta"].item() for optimizer in optimizers for p in parameters(optimizer)
    )
    assert 0.4 < reference < 0.6
    assert ours == pytest.approx(reference, rel=0, abs=5e-5 if dtype == torch.float32 else 1e-10)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize(
    ("cls", "huge"), [(AMAdamW, 2e19), (AMAdamW, 1e20), (AMSGD, 2e19), (AMSGD, 1e30)]
)
def test_a_gradient_whose_square_overflows_float32_leaves_all_finite(cls, backend, huge):
    """As AdamW and SGD do; AdamW's exp_avg_sq, and so AMAdamW, ends at 5e20."""
    optimizer = make_optimizer(cls, [Group([(100,), (5,)])], backend)
    for step in range(4):
        set_gradients(optimizer, step=step)
        if step == 1:
            parameters(optimizer)[0].grad[7] = huge
        optimizer.step()
        for param in parameters(optimizer):
            assert param.isfinite().all()
            assert all(value.isfinite().all() for value in optimizer.state[param].values())


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_difference_of_losses_with_a_tensor_lr_is_that_of_the_number(cls, backend):
    betas, second = [], 0.98 if cls is AMSGD else 1.1
    for lr in (torch.tensor(0.1), torch.tensor(0.1).item()):
        param = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
        optimizer = cls([param], lr=lr, gap="loss", beta_scope="global", backend=backend)
        for grad, loss in (([1.0, 0.5], 1.0), ([0.2, 0.7], second)):
            param.grad = torch.tensor(grad, dtype=torch.float64)
            optimizer.step(lambda loss=loss: loss)
        betas.append(optimizer.state[param]["beta"].item())
    assert 0.01 < betas[1] < 0.88
    assert betas[0] == pytest.approx(betas[1], rel=1e-13)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("loss", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_no_difference(cls, backend, loss):
    """As on a first step; and with a group at lr 0 and an empty tensor, whose factors are 0."""
    groups = [Group([(3,)]), Group([(4,), (0,)], options={"lr": 0.0})]
    optimizer, without = (
        make_optimizer(cls, groups, backend, gap="loss", beta_scope="global") for _ in "ab"
    )
    for step, value in enumerate((1.0, loss, 0.5)):
        set_gradients(optimizer, without, step=step)
        optimizer.step(lambda value=value: value)
        without.state[parameters(without)[0]].pop("prev_loss", None)
        without.step(lambda: 1.0)
        for param, expected in zip(parameters(optimizer), parameters(without), strict=True):
            assert torch.equal(param, expected)
            assert torch.equal(optimizer.state[param]["beta"], without.state[expected]["beta"])


@pytest.mark.parametrize("backend", backends("reference"))
def test_a_cap_near_1(backend):
    """1 - beta is rounded once, not the difference of a rounded beta."""
    optimizers = pair(AMAdamW, [Group([(300,)])], backend, betas=(0.9999, 0.999), memory_lambda=0.0)
    set_gradients(*optimizers, step=0)
    for optimizer in optimizers:
        optimizer.step()
    expected, ours = (o.state[p]["exp_avg"] for o in optimizers for p in parameters(o))
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0.0)
