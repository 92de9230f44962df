"""max_grad_norm and skip_nonfinite, in one process: as clip_grad_norm_ before a step, or none."""

import copy
import math
import pickle
from fractions import Fraction

import numpy as np
import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_same_bits,
    backends,
    gradient,
    make_optimizer,
    parameters,
    random_tensor,
    relative_error,
    set_gradients,
)
from snapshot import snapshot
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import clip_grad_norm_, get_total_norm

from adamem_fused import AMSGD, clipping
from adamem_fused import optimizer as step_module
from adamem_fused.backends import ops

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", backends())
scopes = pytest.mark.parametrize("beta_scope", ["tensor", "row", "global"])

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
WIDE = [torch.float32, torch.float64, torch.complex64, torch.complex128]

SHAPES = [(6, 20), (), (5,), (3, 4, 5)]
OTHERS = [(2000,), (0,), (1, 1)]


def make(cls, backend, dtype=torch.float32, **options):
    """Of two groups, with gradients of a norm of some 50."""
    groups = [Group(SHAPES, dtype), Group(OTHERS, dtype, {"lr": 0.03, "weight_decay": 0.2})]
    return make_optimizer(cls, groups, backend, lr=0.01, weight_decay=0.1, **options)


def gradients(optimizer):
    return [param.grad for param in parameters(optimizer)]


def copy_gradients(source, target):
    for param, other in zip(parameters(source), parameters(target), strict=True):
        other.grad = param.grad.clone()


def divide_by(optimizer, divisor):
    """Has the next step divide its gradients, as GradScaler does."""
    optimizer.grad_scale, optimizer.found_inf = divisor, None


# ---- clipping -------------------------------------------------------------------------


@both
@every_backend
@scopes
@pytest.mark.parametrize("dtype", WIDE)
def test_steps_are_those_after_clip_grad_norm(cls, backend, beta_scope, dtype):
    steps = 20
    ours = make(cls, backend, dtype, beta_scope=beta_scope, max_grad_norm=30.0)
    torchs = make(cls, backend, dtype, beta_scope=beta_scope)
    clipped = 0
    for step in range(steps):
        set_gradients(ours, step=step)
        copy_gradients(ours, torchs)
        norm = clip_grad_norm_(parameters(torchs), 30.0)
        clipped += norm > 30
        ours.step()
        torchs.step()
        assert relative_error(ours.grad_norm, norm) < 1e-6
    assert 0 < clipped < steps
    for param, other in zip(parameters(ours), parameters(torchs), strict=True):
        assert relative_error(param, other) < 1e-6


@both
@every_backend
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_norm_enters_as_a_scale_in_any_dtype(cls, backend, dtype):
    ours, scaled = make(cls, backend, dtype, max_grad_norm=1.0), make(cls, backend, dtype)
    for step in range(3):
        set_gradients(ours, scaled, step=step)
        ours.step()
        divide_by(scaled, (ours.grad_norm + 1e-6) / 1.0)
        scaled.step()
        total = sum(grad.double().square().sum() for grad in gradients(ours))
        torch.testing.assert_close(ours.grad_norm, total.sqrt(), rtol=1e-6, atol=0)
        assert_same_bits(ours, scaled)


@both
@every_backend
def test_gradients_are_not_written(cls, backend):
    optimizer = make(cls, backend, max_grad_norm=1.0)
    set_gradients(optimizer, step=0)
    before = [(grad.clone(), grad._version) for grad in gradients(optimizer)]
    optimizer.step()
    for grad, (values, version) in zip(gradients(optimizer), before, strict=True):
        assert torch.equal(grad, values)
        assert grad._version == version


@both
@every_backend
@pytest.mark.parametrize("largest", [1e9, math.inf])
def test_below_the_largest_norm_no_bit_changes(cls, backend, largest):
    ours, plain = make(cls, backend, max_grad_norm=largest), make(cls, backend)
    for step in range(3):
        set_gradients(ours, plain, step=step)
        ours.step()
        plain.step()
    assert_same_bits(ours, plain)
    assert ours.grad_norm > 0


@both
@every_backend
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_norm_that_is_not_finite_does_what_clip_grad_norm_does(cls, backend, bad):
    """Gradients become 0 by an infinite norm, and NaN where they are infinite or the norm NaN."""
    options = {"beta_scope": "tensor", "max_grad_norm": 1.0}
    ours = make_optimizer(cls, [Group([(20,), (3, 4)])], backend, **options)
    torchs = make_optimizer(cls, [Group([(20,), (3, 4)])], backend, beta_scope="tensor")
    for step in range(2):
        set_gradients(ours, step=step)
        if step == 1:
            parameters(ours)[0].grad[3] = bad
        copy_gradients(ours, torchs)
        clip_grad_norm_(parameters(torchs), 1.0)
        ours.step()
        torchs.step()
    for param, other in zip(parameters(ours), parameters(torchs), strict=True):
        torch.testing.assert_close(param, other, rtol=1e-6, atol=1e-7, equal_nan=True)
    assert not math.isfinite(ours.grad_norm)


@both
@every_backend
def test_squares_beyond_float32(cls, backend):
    """clip_grad_norm_ itself finds inf, or 0, for these."""
    for size in (1e-30, 1e25):
        optimizer = make_optimizer(cls, [Group([(40, 3)])], backend, max_grad_norm=1.0)
        (param,) = parameters(optimizer)
        param.grad = torch.full_like(param, size)
        optimizer.step()
        expected = torch.tensor(size * math.sqrt(120), dtype=torch.float64)
        torch.testing.assert_close(optimizer.grad_norm, expected, rtol=1e-6, atol=0)
        assert param.isfinite().all()


@both
@every_backend
def test_a_norm_as_small_as_what_clip_grad_norm_adds_to_it(cls, backend):
    ours = make_optimizer(cls, [Group([(4, 5)])], backend, max_grad_norm=1e-6)
    torchs = make_optimizer(cls, [Group([(4, 5)])], backend)
    for optimizer in (ours, torchs):
        (param,) = parameters(optimizer)
        param.grad = 2e-6 * gradient(param, 0) / gradient(param, 0).norm()
    clip_grad_norm_(parameters(torchs), 1e-6)
    ours.step()
    torchs.step()
    memories = [opt.state[parameters(opt)[0]][cls.memories[0]] for opt in (ours, torchs)]
    assert relative_error(*memories) < 1e-6


@both
def test_one_norm_for_groups_on_several_backends(cls):
    groups = [
        Group([(4, 20)], options={"backend": name, "beta_scope": "tensor"})
        for name in ("cpu", "foreach", "reference")
        if name != "cpu" or ops.extension is not None
    ]
    ours = make_optimizer(cls, groups, max_grad_norm=2.0)
    torchs = make_optimizer(cls, groups)
    for step in range(3):
        set_gradients(ours, step=step)
        copy_gradients(ours, torchs)
        norm = clip_grad_norm_(parameters(torchs), 2.0)
        ours.step()
        torchs.step()
        assert relative_error(ours.grad_norm, norm) < 1e-6
    for param, other in zip(parameters(ours), parameters(torchs), strict=True):
        assert relative_error(param, other) < 1e-6


@both
@every_backend
def test_only_what_has_a_gradient_counts(cls, backend):
    optimizer = make(cls, backend, max_grad_norm=1.0)
    set_gradients(optimizer, step=0, skip=(0, 4))
    norm = get_total_norm([grad for grad in gradients(optimizer) if grad is not None])
    optimizer.step()
    assert relative_error(optimizer.grad_norm, norm) < 1e-6


@both
def test_a_step_without_a_gradient_takes_no_norm(cls):
    optimizer = make(cls, None, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.isnan()
    set_gradients(optimizer, step=0)
    optimizer.step()
    norm = optimizer.grad_norm
    optimizer.zero_grad()
    optimizer.step()
    assert torch.equal(optimizer.grad_norm, norm)


@both
@every_backend
def test_gradients_that_lie_otherwise(cls, backend):
    shape = (6, 4, 5)
    optimizer = make_optimizer(cls, [Group([shape] * 3)], backend, max_grad_norm=1.0)
    given = [gradient(param, 0) for param in parameters(optimizer)]
    laid = [
        given[0].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        torch.stack([given[1], given[1]], -1)[..., 0],
        given[2][:1, :1].expand(shape),
    ]
    for param, grad in zip(parameters(optimizer), laid, strict=True):
        param.grad = grad
    optimizer.step()
    assert relative_error(optimizer.grad_norm, get_total_norm(laid)) < 1e-6


@pytest.mark.skipif(ops.extension is None, reason=str(ops.unavailable))
def test_a_norm_of_many_tensors_has_the_same_bits_with_any_number_of_threads():
    params = [torch.zeros(2, requires_grad=True) for _ in range(50_000)]
    grads = random_tensor((50_000, 2)).unbind()
    norms = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        optimizer = AMSGD(params, max_grad_norm=1.0)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        norms.append(optimizer.grad_norm)
    assert torch.equal(norms[0], norms[1])
    assert torch.equal(norms[0], norms[2])


@both
@every_backend
def test_maximize_and_a_closure(cls, backend):
    ours = make(cls, backend, max_grad_norm=1.0, maximize=True)
    torchs = make(cls, backend, maximize=True)

    def closure():
        set_gradients(ours, step=0)
        return 3.0

    assert ours.step(closure) == 3.0
    copy_gradients(ours, torchs)
    clip_grad_norm_(parameters(torchs), 1.0)
    torchs.step()
    for param, other in zip(parameters(ours), parameters(torchs), strict=True):
        assert relative_error(param, other) < 1e-6


@both
def test_the_largest_norm_may_change_between_steps(cls):
    ours, torchs = make(cls, None), make(cls, None)
    for step, largest in enumerate([None, 1.0, 5.0, None]):
        ours.max_grad_norm = largest
        set_gradients(ours, step=step)
        copy_gradients(ours, torchs)
        if largest is not None:
            clip_grad_norm_(parameters(torchs), largest)
        ours.step()
        torchs.step()
        assert (ours.grad_norm is None) == (largest is None)
    for param, other in zip(parameters(ours), parameters(torchs), strict=True):
        assert relative_error(param, other) < 1e-6


# ---- skipping -------------------------------------------------------------------------


@both
@every_backend
@scopes
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_step_is_as_if_it_had_not_been(cls, backend, beta_scope, bad):
    options = {"beta_scope": beta_scope}
    optimizer = make(cls, backend, skip_nonfinite=True, **options)
    twin = make(cls, backend, **options)
    for step in range(4):
        set_gradients(optimizer, twin, step=step)
        if step == 2:
            before = snapshot(optimizer)
            optimizer.param_groups[0]["params"][2].grad[1] = bad
            optimizer.step()
            assert snapshot(optimizer) == before
            assert not math.isfinite(optimizer.grad_norm)
            set_gradients(optimizer, twin, step=step)
        optimizer.step()
        twin.step()
        assert optimizer.grad_norm.isfinite()
    assert_same_bits(optimizer, twin)
    assert optimizer.skipped_steps.item() == 1
    assert (optimizer.skipped_steps.dtype, optimizer.skipped_steps.dim()) == (torch.int64, 0)


@both
@every_backend
def test_a_bad_first_step(cls, backend):
    optimizer, twin = make(cls, backend, skip_nonfinite=True), make(cls, backend)
    set_gradients(optimizer, step=0)
    parameters(optimizer)[0].grad[0] = math.nan
    optimizer.step()
    assert optimizer.skipped_steps.item() == 1
    set_gradients(optimizer, twin, step=0)
    optimizer.step()
    twin.step()
    assert_same_bits(optimizer, twin)


@both
def test_a_bad_step_keeps_the_loss_of_the_last_one(cls):
    options = {"gap": "loss", "beta_scope": "global"}
    optimizer = make(cls, None, skip_nonfinite=True, **options)
    set_gradients(optimizer, step=0)
    optimizer.step(lambda: 3.0)
    before = snapshot(optimizer)
    parameters(optimizer)[0].grad[0] = math.nan
    optimizer.step(lambda: 5.0)
    assert snapshot(optimizer) == before


@both
@every_backend
def test_clipping_and_skipping_together(cls, backend):
    ours = make(cls, backend, max_grad_norm=1.0, skip_nonfinite=True)
    clipping = make(cls, backend, max_grad_norm=1.0)
    for step in range(4):
        set_gradients(ours, clipping, step=step)
        if step == 1:
            parameters(ours)[0].grad[0] = math.inf
        else:
            clipping.step()
        ours.step()
    assert_same_bits(ours, clipping)
    assert ours.skipped_steps.item() == 1


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scaled_gradients_that_overflow_together_are_finite(cls, dtype):
    """The norm of float16 gradients at their largest is no float16."""
    optimizer = make_optimizer(
        cls, [Group([(1000,)], dtype)], max_grad_norm=1.0, skip_nonfinite=True
    )
    (param,) = parameters(optimizer)
    param.grad = torch.full_like(param, 6e4)
    optimizer.step()
    assert optimizer.skipped_steps.item() == 0
    assert optimizer.state[param]["step"] == 1


@both
def test_steps_that_a_scaler_skips_are_counted(cls):
    optimizer = make(cls, None)
    for step, found_inf in enumerate([0.0, 1.0, 1.0, 0.0]):
        set_gradients(optimizer, step=step)
        optimizer.grad_scale = None
        optimizer.found_inf = torch.full((1,), found_inf)
        optimizer.step()
    assert optimizer.skipped_steps.item() == 2
    assert optimizer.grad_norm is None


@both
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_a_scaler_and_a_norm_decide_together(cls, found_inf):
    ours = make(cls, None, max_grad_norm=1.0, skip_nonfinite=True)
    torchs = make(cls, None)
    set_gradients(ours, step=0)
    copy_gradients(ours, torchs)
    for grad in gradients(ours):
        grad.mul_(2.0**10)
    ours.grad_scale, ours.found_inf = torch.full((1,), 2.0**10), torch.full((1,), found_inf)
    ours.step()
    norm = clip_grad_norm_(parameters(torchs), 1.0)
    torchs.step()
    assert relative_error(ours.grad_norm, norm) < 1e-6
    assert ours.skipped_steps.item() == found_inf
    if found_inf:
        assert all(state["step"] == 0 for state in ours.state.values())
    else:
        for param, other in zip(parameters(ours), parameters(torchs), strict=True):
            assert relative_error(param, other) < 1e-6


# ---- what is read, kept and refused ---------------------------------------------------


@both
def test_readings_are_new_tensors(cls):
    optimizer = make(cls, None, max_grad_norm=1.0, skip_nonfinite=True)
    assert optimizer.skipped_steps.item() == 0
    norms, counts = [], []
    for step in range(3):
        set_gradients(optimizer, step=step)
        if step > 0:
            parameters(optimizer)[0].grad[0] = math.inf
        optimizer.step()
        norms.append(optimizer.grad_norm)
        counts.append(optimizer.skipped_steps)
    assert [bool(norm.isfinite()) for norm in norms] == [True, False, False]
    assert [count.item() for count in counts] == [0, 1, 2]


@both
def test_copies_clip_and_skip_as_well(cls):
    optimizer = make(cls, None, max_grad_norm=1.5, skip_nonfinite=True)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert (other.max_grad_norm, other.skip_nonfinite) == (1.5, True)


@both
def test_one_that_was_pickled_before_there_were_these_options(cls):
    optimizer = make(cls, None)
    old = optimizer.__getstate__()
    del old["max_grad_norm"], old["skip_nonfinite"]
    other = cls.__new__(cls)
    other.__setstate__(copy.deepcopy(old))
    set_gradients(other, step=0)
    other.step()
    assert (other.max_grad_norm, other.skip_nonfinite) == (None, False)


@both
def test_steps_are_counted_from_where_state_is_loaded(cls):
    optimizer = make(cls, None, skip_nonfinite=True)
    set_gradients(optimizer, step=0)
    parameters(optimizer)[0].grad[0] = math.nan
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_steps.item() == 0
    assert optimizer.grad_norm.isnan()


@both
def test_any_number_is_taken(cls):
    for value in (1, Fraction(1, 2), np.float32(0.5)):
        optimizer = make(cls, None, max_grad_norm=value)
        set_gradients(optimizer, step=0)
        optimizer.step()
        assert optimizer.grad_norm > 0


@both
def test_checkpoints_do_not_have_them(cls):
    """They stay as an optimizer was made, and the keys are those of one without."""
    optimizer, plain = make(cls, None, max_grad_norm=1.5, skip_nonfinite=True), make(cls, None)
    set_gradients(optimizer, plain, step=0)
    optimizer.step()
    plain.step()
    saved, expected = optimizer.state_dict(), plain.state_dict()
    assert saved["param_groups"] == expected["param_groups"]
    assert saved["state"][0].keys() == expected["state"][0].keys()
    optimizer.load_state_dict(expected)
    assert (optimizer.max_grad_norm, optimizer.skip_nonfinite) == (1.5, True)


BAD = [
    ("max_grad_norm", 0),
    ("max_grad_norm", -1.0),
    ("max_grad_norm", math.nan),
    ("max_grad_norm", True),
    ("max_grad_norm", "1"),
    ("max_grad_norm", 10**400),
    ("max_grad_norm", torch.tensor(1.0)),
    ("skip_nonfinite", 1),
    ("skip_nonfinite", None),
]


@both
@pytest.mark.parametrize(("name", "value"), BAD)
def test_bad_options(cls, name, value):
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        make(cls, None, **{name: value})
    optimizer = make(cls, None)
    setattr(optimizer, name, value)
    set_gradients(optimizer, step=0)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=f"Invalid {name}"):
        optimizer.step()
    assert snapshot(optimizer) == before


@both
@pytest.mark.parametrize("name", ["max_grad_norm", "skip_nonfinite"])
def test_a_group_of_its_own_norm_is_refused(cls, name):
    with pytest.raises(ValueError, match=f"{name} is for the whole optimizer"):
        cls([{"params": [torch.ones(2, requires_grad=True)], name: 1.0}])
    optimizer = make(cls, None)
    with pytest.raises(ValueError, match=f"{name} is for the whole optimizer"):
        optimizer.add_param_group({"params": [torch.ones(2, requires_grad=True)], name: 1.0})
    assert len(optimizer.param_groups) == 2


@both
def test_it_says_how_it_clips_and_skips(cls):
    text = repr(make(cls, None, max_grad_norm=1.5))
    assert "max_grad_norm=1.5, skip_nonfinite=False" in text
    assert "Parameter Group 1" in text


@both
@every_backend
def test_a_step_that_raises_leaves_no_reading(cls, backend):
    optimizer = make(cls, backend, max_grad_norm=1.0)
    set_gradients(optimizer, step=0)
    optimizer.step()
    norm, before = optimizer.grad_norm, [p.detach().clone() for p in parameters(optimizer)]
    set_gradients(optimizer, step=1)
    param = parameters(optimizer)[1]
    optimizer.state[param][cls.memories[0]] = torch.zeros(9)
    with pytest.raises(ValueError, match="shape"):
        optimizer.step()
    assert torch.equal(optimizer.grad_norm, norm)
    assert all(map(torch.equal, parameters(optimizer), before))


def test_counts_go_along_to_another_device():
    readings = clipping.Readings(torch.device("cpu"))
    readings.write(clipping.Scaling(None, torch.ones(()), torch.tensor(3.0)))
    moved = readings.moved(torch.device("cpu"))
    assert (moved.grad_norm.item(), moved.skipped_steps.item()) == (3.0, 1)


@both
def test_the_first_step_that_clips_is_not_captured(monkeypatch, cls):
    """What a graph makes itself it makes anew at every replay."""
    optimizer = make(cls, None)
    set_gradients(optimizer, step=0)
    optimizer.step()
    before = snapshot(optimizer)
    monkeypatch.setattr(step_module, "is_capturing", lambda device: True)
    optimizer.max_grad_norm = 1.0
    with pytest.raises(RuntimeError, match="take one such step outside of the graph first"):
        optimizer.step()
    assert snapshot(optimizer) == before


# ---- compiled and recorded ------------------------------------------------------------


@both
@pytest.mark.parametrize("backend", ["cpu", "foreach"])
def test_a_compiled_step(cls, backend):
    if backend == "cpu" and ops.extension is None:
        pytest.skip(str(ops.unavailable))
    options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "beta_scope": "tensor"}
    groups = [Group([(4, 20), (3,)])]
    compiled, plain = (make_optimizer(cls, groups, backend, **options) for _ in range(2))
    torch._dynamo.reset()
    step_compiled = torch.compile(compiled.step, fullgraph=True, backend="aot_eager")
    for step in range(4):
        set_gradients(compiled, plain, step=step)
        if step == 2:
            parameters(plain)[0].grad[0] = math.nan  # the same tensor is the other's
        step_compiled()
        plain.step()
        torch.testing.assert_close(compiled.grad_norm, plain.grad_norm, equal_nan=True)
        assert torch.equal(compiled.skipped_steps, plain.skipped_steps)
    assert compiled.skipped_steps.item() == 1
    for param, other in zip(parameters(compiled), parameters(plain), strict=True):
        torch.testing.assert_close(param, other)


@pytest.mark.skipif(ops.extension is None, reason=str(ops.unavailable))
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_the_operator_is_recorded(mode):
    grads = [gradient(torch.zeros(shape), 0) for shape in [(3, 4), (5,)]]
    graph = make_fx(torch.ops.adamem_fused.squared_norms, tracing_mode=mode)(grads)
    expected = torch.stack([grad.double().square().sum() for grad in grads])
    torch.testing.assert_close(graph(grads), expected, rtol=1e-6, atol=0)
