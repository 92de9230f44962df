"""AM-AdamW's step in one pass: the update with the cap for beta, repaired where beta is another."""

import os

import pytest
import torch
from cases import (
    Group,
    assert_same_bits,
    assert_step_agrees,
    backends,
    bits,
    make_optimizer,
    parameters,
    random_tensor,
    set_gradients,
    snapshot,
)
from triton_interpreter import patch_fma

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS, cpu

CAP = 0.89
MISSED_FROM, STEPS = 7, 10
# For every way in which the cpu backend schedules a tensor.
SHAPES = ((5,), (33_000,), (70_000,), (300_001,), (), (16_385,), (2, 3))
needs_cpu = pytest.mark.skipif(cpu.unavailable(torch.device("cpu")) is not None, reason="no _C")


def set_hits_and_misses(*optimizers, step, missed):
    """Gradients that are new at every step, or fall: beta at the cap, or, as soon as the memory
    is larger than they are, from MISSED_FROM on, below it for `missed`."""
    for optimizer in optimizers:
        for i, param in enumerate(parameters(optimizer)):
            falls = i in missed
            grad = random_tensor(param.shape, param.dtype, i if falls else 1009 * step + i)
            param.grad = 0.7**step * grad if falls else grad


def are_missed(optimizer):
    """The tensors whose beta was below the cap in the last step."""
    betas = [optimizer.state[param]["beta"].item() for param in parameters(optimizer)]
    return {i for i, beta in enumerate(betas) if beta < CAP - 1e-6}


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("memory_lambda", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("missed", [set(), {1, 2, 4}, set(range(len(SHAPES)))])
def test_hit_or_missed_a_step_is_the_references(dtype, memory_lambda, missed):
    """Free-running: what a repair leaves behind is carried on."""
    reference, ours = (
        make_optimizer(
            AMAdamW, [Group(SHAPES, dtype)], backend, lr=1e-2, memory_lambda=memory_lambda
        )
        for backend in ("reference", "cpu")
    )
    for step in range(STEPS):
        set_hits_and_misses(reference, ours, step=step, missed=missed)
        before = snapshot(reference)
        reference.step()
        ours.step()
        assert_step_agrees(ours, reference, before)
        if step >= MISSED_FROM:
            assert are_missed(ours) >= missed
            # A tensor of few elements may be anywhere.
            assert not (are_missed(ours) - missed) & {1, 2, 3, 5}


def step_in_halves(optimizer):
    with torch.no_grad():
        (work,) = optimizer._collect()
        cpu.adamw_finish(work.batch, cpu.adamw_begin(work.batch, None, None), None, None)


@needs_cpu
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("missed", [set(), {0, 2, 3}, set(range(len(SHAPES)))])
def test_one_call_and_two_halves_give_the_same_bits(threads, missed):
    torch.set_num_threads(threads)
    at_once, in_halves = (make_optimizer(AMAdamW, [Group(SHAPES)], "cpu") for _ in range(2))
    for step in range(STEPS):
        set_hits_and_misses(at_once, in_halves, step=step, missed=missed)
        at_once.step()
        step_in_halves(in_halves)
        assert_same_bits(in_halves, at_once)
    assert are_missed(at_once) & {1, 2, 3, 5} == missed & {1, 2, 3, 5}


@needs_cpu
@pytest.mark.parametrize(
    "shape, strides", [((40, 30), (1, 40)), ((40, 30), (60, 2))], ids=["transposed", "strided"]
)
def test_a_strided_tensor_has_the_bits_of_a_dense_one(shape, strides):
    dense, strided = (torch.nn.Parameter(torch.zeros(shape)) for _ in range(2))
    storage = torch.zeros(3000)
    strided.data = storage.as_strided(shape, strides)
    for param in (dense, strided):
        param.data.copy_(random_tensor(shape))
    optimizers = [AMAdamW([param], backend="cpu") for param in (dense, strided)]
    for step in range(STEPS):
        set_hits_and_misses(*optimizers, step=step, missed={0})
        optimizers[0].step()
        step_in_halves(optimizers[1])
        assert torch.equal(bits(dense), bits(strided))
    assert all(are_missed(optimizer) for optimizer in optimizers)


def begun(backend="cpu", dtype=torch.float32, found_inf=None, steps=2, **options):
    """What of a tensor has changed once a step has begun: parameter and memories."""
    optimizer = make_optimizer(AMAdamW, [Group([(50,)], dtype)], backend, **options)
    for step in range(steps):
        set_gradients(optimizer, step=step)
        optimizer.step()
    set_gradients(optimizer, step=steps)
    if not steps:
        optimizer._collect()  # makes the state
    before = snapshot(optimizer)
    with torch.no_grad():
        (work,) = optimizer._collect()
        BACKENDS[backend].adamw_begin(work.batch, None, found_inf)
    (old,), (new,) = before, snapshot(optimizer)
    return {name for name in old if not torch.equal(old[name], new[name])}


@needs_cpu
def test_what_begin_writes():
    """Memory and parameters of what it may guess; the scalars are finish's."""
    guess = {"param", "exp_avg", "exp_avg_sq"}
    assert begun() == guess
    assert begun(dtype=torch.float64) == guess
    assert begun(steps=0) == guess  # a first step's beta is the cap
    assert begun(beta_scope="global") == guess
    nothing = set()
    assert begun(memory_plane="anchored") == nothing
    assert begun(dtype=torch.bfloat16) == nothing  # x would be rounded twice
    assert begun(betas=(0.0, 0.999)) == nothing
    assert begun(steps=0, lr=0.0) == nothing  # it may be none
    assert begun(found_inf=torch.ones(())) == nothing
    assert begun(found_inf=torch.zeros(())) == guess


@needs_cpu
def test_where_memory_and_gradient_agree_nothing_is_repaired():
    """den is 0 and beta with it, while d and x are what the cap has given."""
    param = torch.nn.Parameter(random_tensor((70_000,)))
    param.grad = random_tensor(param.shape, seed=1)
    optimizer = AMAdamW([param], backend="cpu")
    optimizer.step()
    optimizer.state[param]["exp_avg"].copy_(param.grad)
    with torch.no_grad():
        (work,) = optimizer._collect()
        rows = cpu.adamw_begin(work.batch, None, None)
        (begun,) = snapshot(optimizer)
        cpu.adamw_finish(work.batch, rows, None, None)
    (finished,) = snapshot(optimizer)
    assert finished["beta"] == 0
    for name in ("param", "exp_avg", "exp_avg_sq"):
        assert torch.equal(finished[name], begun[name])


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("memory_plane", ["level", "anchored"])
def test_one_nan_makes_its_tensor_nan_and_no_other(backend, memory_plane):
    optimizer = make_optimizer(
        AMAdamW, [Group([(40,), (50_000,), (7,)])], backend, memory_plane=memory_plane
    )
    for step in range(3):
        set_gradients(optimizer, step=step)
        optimizer.step()
    set_gradients(optimizer, step=3)
    params = parameters(optimizer)
    params[1].grad[12_345] = torch.nan
    optimizer.step()
    assert [bool(param.isnan().all()) for param in params] == [False, True, False]
    assert not params[0].isnan().any() and not params[2].isnan().any()


@needs_cpu
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_several_batches_are_checked_before_one_begins(scope):
    """The first batch's begin would have updated it when the second one is refused."""
    params = [torch.nn.Parameter(random_tensor((50,), seed=i)) for i in range(2)]
    groups = [{"params": params[:1], "backend": "cpu"}, {"params": params[1:], "foreach": True}]
    optimizer = AMAdamW(groups, beta_scope=scope)
    for step in range(2):
        set_gradients(optimizer, step=step)
        optimizer.step()
    for wrong in (0, 1):
        saved = optimizer.state[params[wrong]]["exp_avg_sq"]
        optimizer.state[params[wrong]]["exp_avg_sq"] = torch.zeros(51)
        before = snapshot(optimizer)
        set_gradients(optimizer, step=2)
        with pytest.raises(ValueError, match="exp_avg_sq of tensor 0 has shape"):
            optimizer.step()
        for old, new in zip(before, snapshot(optimizer), strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)
        optimizer.state[params[wrong]]["exp_avg_sq"] = saved
    optimizer.step()


@pytest.mark.parametrize("backend", backends("reference", "foreach"))
def test_am_sgd_keeps_its_digits_beside_a_large_decay(monkeypatch, backend):
    """|mu x| = 10 |g| and d near g + mu x: e is g - (d - mu x), not the difference of two sums."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_fma(monkeypatch)
    rows = []
    for name in ("reference", backend):
        optimizer = make_optimizer(AMSGD, [Group([(20_000,)])], name, weight_decay=10.0)
        (param,) = parameters(optimizer)
        param.grad = random_tensor(param.shape, seed=1)
        optimizer.step()
        near = 1e-2 * random_tensor(param.shape, seed=2)
        state = optimizer.state[param]
        state["momentum_buffer"].copy_(param.detach() * 10 + param.grad + near)
        state["prev_lr"].zero_()  # no gap: what is left of num is e's
        with torch.no_grad():
            (work,) = optimizer._collect()
            rows.append(BACKENDS[name].sgd_begin(work.batch, None, None)[0])
    num, den = (rows[1] - rows[0]).abs() / rows[0][1]
    # What is left is the parenthesis' own rounding, of numbers as large as g; of numbers as large
    # as mu x it would be 10 times that.
    assert num < 6e-5
    assert den < 1e-6


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("wrong", [torch.zeros(3), "0.5", None])
def test_a_bad_prev_loss_is_refused_before_anything_has_changed(backend, wrong):
    optimizer = make_optimizer(AMAdamW, [Group([(5,)])], backend, gap="loss", beta_scope="global")
    (param,) = parameters(optimizer)
    for step in range(2):
        set_gradients(optimizer, step=step)
        optimizer.step(lambda: 1.0)
    optimizer.state[param]["prev_loss"] = wrong
    before = param.detach().clone(), optimizer.state[param]["exp_avg"].clone()
    if wrong is None:
        optimizer.step(lambda: 1.0)  # as on a first step
        return
    with pytest.raises((ValueError, TypeError), match="prev_loss"):
        optimizer.step(lambda: 1.0)
    assert torch.equal(param, before[0])
    assert torch.equal(optimizer.state[param]["exp_avg"], before[1])


@pytest.mark.parametrize("backend", backends("reference"))
def test_a_number_as_prev_loss_is_taken(backend):
    twins = [
        make_optimizer(AMAdamW, [Group([(50,)])], backend, gap="loss", beta_scope="global")
        for _ in range(2)
    ]
    for step in range(3):
        set_gradients(*twins, step=step)
        for twin in twins:
            twin.step(lambda step=step: 0.5**step)
        twins[0].state[parameters(twins[0])[0]]["prev_loss"] = 0.5**step
    torch.testing.assert_close(*(parameters(twin)[0] for twin in twins), rtol=0, atol=0)


@pytest.mark.parametrize("backend", backends("reference"))
def test_a_gradient_that_is_its_parameter(backend):
    """A repair would read it once more, after it was written to."""
    reference, ours = (
        make_optimizer(AMAdamW, [Group([(40,), (20_000,)])], name, lr=0.3, weight_decay=0.0)
        for name in ("reference", backend)
    )
    missed = False
    for _ in range(7):
        for optimizer in (reference, ours):
            for param in parameters(optimizer):
                param.grad = param.detach()
        before = snapshot(reference)
        for param in parameters(reference):
            param.grad = param.detach().clone()
        reference.step()
        ours.step()
        assert_step_agrees(ours, reference, before)
        missed = missed or bool(are_missed(reference))
    assert missed


@needs_cpu
def test_a_skipped_step_leaves_the_version_of_a_strided_parameter():
    param = torch.nn.Parameter(torch.zeros(4, 8)[:, ::2])
    optimizer = AMAdamW([param], gap="loss", beta_scope="global", backend="cpu")
    for step in range(2):
        param.grad = torch.ones(4, 4)
        if step:
            version = param._version
            optimizer.found_inf, optimizer.grad_scale = torch.ones(()), torch.ones(())
        optimizer.step(lambda: 1.0)
    assert param._version == version


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", [AMAdamW, AMSGD])
@pytest.mark.parametrize("memory_plane", ["level", "anchored"])
def test_an_lr_that_falls_by_more_than_float32_holds(backend, cls, memory_plane):
    """A schedule that ends at 1e-51 where 0 was meant."""
    reference, ours = (
        make_optimizer(cls, [Group([(3,)])], name, memory_plane=memory_plane)
        for name in ("reference", backend)
    )
    for step, lr in enumerate((1e-2, 1e-2, 1e-2, 1e-51, 1e-2)):
        set_gradients(reference, ours, step=step)
        for optimizer in (reference, ours):
            for param in parameters(optimizer):
                param.grad[1] = 0.0
            optimizer.param_groups[0]["lr"] = lr
        before = snapshot(reference)
        reference.step()
        ours.step()
        # prev_lr is float32 in state, and the reference's is the same.
        assert_step_agrees(ours, reference, before)


@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_scalars_made_in_inference_mode_are_refused_before_anything_has_changed(backend):
    optimizer = make_optimizer(AMAdamW, [Group([(5,)])], backend)
    (param,) = parameters(optimizer)
    set_gradients(optimizer, step=0)
    optimizer.step()
    with torch.inference_mode():
        optimizer.state[param]["prev_lr"] = torch.zeros(())
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match="inference mode"):
        optimizer.step()
    assert torch.equal(param, before)
