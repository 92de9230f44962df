"""beta_scope="row": a beta for each index of the first dimension."""

import copy
import math
import pickle
from functools import partial

import pytest
import torch
from cases import (
    LOW_PRECISION,
    MEMORIES,
    OPTIMIZERS,
    Group,
    assert_lockstep,
    assert_same_bits,
    assert_step_agrees,
    backends,
    beta_sensitivity,
    bits,
    gradient,
    make_optimizer,
    parameters,
    random_tensor,
    relative_error,
    restore,
    set_gradients,
    snapshot,
    take_step,
)
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import Parameter

from adamem_fused import AMAdamW
from adamem_fused.backends import BACKENDS

DOUBLE = torch.float64
CHANNELS_LAST = torch.channels_last

both = pytest.mark.parametrize("cls", OPTIMIZERS)
planes = pytest.mark.parametrize("plane", ["level", "anchored"])
every_backend = pytest.mark.parametrize("backend", backends())
other_backends = pytest.mark.parametrize("backend", backends("reference"))
fused_backends = pytest.mark.parametrize("backend", backends("reference", "foreach"))
cpu_alone = pytest.mark.parametrize("backend", backends(*(set(BACKENDS) - {"cpu"})))

make = partial(make_optimizer, beta_scope="row")


def halves(optimizer):
    """The two halves of its backend's step."""
    kind = "adamw" if isinstance(optimizer, AMAdamW) else "sgd"
    backend = BACKENDS[optimizer.param_groups[0]["backend"]]
    return getattr(backend, f"{kind}_begin"), getattr(backend, f"{kind}_finish")


def betas_of(optimizer):
    return torch.cat([optimizer.state[p]["beta"].reshape(-1) for p in parameters(optimizer)])


# ---- the reference against a loop over Python's floats -------------------------------


def clip(num, den, cap):
    return 0.0 if den == 0 else min(max(num / den, 0.0), cap)


def adamw_segment(s, gs, t, prev_eta, eta, o):
    """docs/algorithm.md's step t of AM-AdamW for what shares one beta: lists x, d, v in `s`."""
    cap, mu, lam, kappa = o["cap"], o["mu"], o["lam"], o["kappa"]
    gap, num, den, ps = [], [], [], []
    for i, (x, g, d) in enumerate(zip(s["x"], gs, s["d"], strict=True)):
        v = s["v"][i] = o["beta2"] * s["v"][i] + (1 - o["beta2"]) * g * g
        p = (1 - cap * s["beta_prod"]) * (math.sqrt(v / (1 - o["beta2"] ** t)) + o["eps"])
        m, e = 1 / (p * (1 + lam * p)), d - g
        gap.append(prev_eta * (g - kappa * d) * (d / p + mu * x))
        num += [-e * (g + lam * p * d) * m, -mu * x * e]
        den.append(e * e * m)
        ps.append(p)
    weight = (1 + mu * eta) / eta if eta > 0 else 0.0
    total = weight * math.fsum(gap) + math.fsum(num)
    beta = cap if t == 1 else clip(total, math.fsum(den), cap)
    for i, (g, p) in enumerate(zip(gs, ps, strict=True)):
        d = s["d"][i] = ((1 - beta) * g + (beta + lam * p) * s["d"][i]) / (1 + lam * p)
        s["x"][i] = (1 - eta * mu) * s["x"][i] - eta * d / p
    s["beta"], s["beta_prod"] = beta, s["beta_prod"] * beta


def sgd_segment(s, gs, t, prev_eta, eta, o):
    """docs/algorithm.md's step t of AM-SGD likewise."""
    lam, kappa = o["lam"], o["kappa"]
    gs = [g + o["mu"] * x for g, x in zip(gs, s["x"], strict=True)]
    if t == 1:
        s["beta"], s["d"] = 0.0, gs
    else:
        pairs = list(zip(gs, s["d"], strict=True))
        gg = math.fsum(g * g for g, _ in pairs)
        gd = math.fsum(g * d for g, d in pairs)
        dd = math.fsum(d * d for _, d in pairs)
        num = -(gd - gg) - lam * (dd - gd)
        if eta > 0:
            num += (1 + lam) * prev_eta / eta * (gd - kappa * dd)
        beta = s["beta"] = clip(num, math.fsum((d - g) ** 2 for g, d in pairs), o["cap"])
        s["d"] = [((beta + lam) * d + (1 - beta) * g) / (1 + lam) for g, d in pairs]
    s["x"] = [x - eta * d for x, d in zip(s["x"], s["d"], strict=True)]


def as_segments(tensor):
    """A tensor's segments as lists of floats; the numbers of a complex one are pairs of them."""
    by_row = tensor.dim() > 1 and math.prod(tensor.shape[1:]) >= 16
    parts = list(tensor.detach()) if by_row else [tensor.detach()]
    return [
        (torch.view_as_real(p) if p.is_complex() else p).reshape(-1).double().tolist()
        for p in parts
    ]


ORACLE_SHAPES = [(3, 16), (2, 4, 5), (1, 17), (4, 15), (9,), ()]


@both
@planes
@pytest.mark.parametrize(
    "mu, lam, maximize", [(0.0, 0.0, False), (0.2, 0.1, False), (0.1, 1.0, True)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_the_reference_is_a_loop_over_floats_row_by_row(cls, plane, mu, lam, maximize, dtype):
    o = {"mu": mu, "lam": lam, "kappa": float(plane == "anchored"), "cap": 0.89}
    options = {"betas": (0.89, 0.95), "eps": 1e-6} if cls is AMAdamW else {"beta_max": 0.89}
    o |= {"beta2": 0.95, "eps": 1e-6}
    optimizer = make(
        cls,
        [Group(ORACLE_SHAPES, dtype)],
        "reference",
        weight_decay=mu,
        memory_lambda=lam,
        memory_plane=plane,
        maximize=maximize,
        **options,
    )
    params = parameters(optimizer)
    oracle = [
        [
            {"x": x, "d": [0.0] * len(x), "v": [0.0] * len(x), "beta_prod": 1.0}
            for x in as_segments(param)
        ]
        for param in params
    ]
    segment_step = adamw_segment if cls is AMAdamW else sgd_segment
    prev_eta, seen = 0.0, []
    for t in range(1, 21):
        eta = optimizer.param_groups[0]["lr"] = 0.0 if t % 7 == 0 else 0.02 * (1 + math.sin(t))
        set_gradients(optimizer, step=t)
        optimizer.step()
        for param, segments in zip(params, oracle, strict=True):
            sign = -1.0 if maximize else 1.0
            for s, gs in zip(segments, as_segments(param.grad), strict=True):
                segment_step(s, [sign * g for g in gs], t, prev_eta, eta, o)
            state = optimizer.state[param]
            names = {"beta": "beta", **({"beta_prod": "beta_prod"} if cls is AMAdamW else {})}
            for name in names:
                expected = torch.tensor([s[name] for s in segments], dtype=DOUBLE)
                assert (state[name].reshape(-1) - expected).abs().max() <= 1e-12
            tensors = {"x": param, "d": state[MEMORIES[cls][0]]}
            for name, tensor in tensors.items():
                for ours, s, gs in zip(
                    as_segments(tensor), segments, as_segments(param.grad), strict=True
                ):
                    ours, theirs, g = (torch.tensor(v, dtype=DOUBLE) for v in (ours, s[name], gs))
                    assert relative_error(ours, theirs, g) <= 1e-12, name
            if cls is AMAdamW:
                for ours, s in zip(as_segments(state["exp_avg_sq"].real), segments, strict=True):
                    # v of a complex number is that of each of its parts.
                    theirs = s["v"][::2] if param.is_complex() else s["v"]
                    assert ours == pytest.approx(theirs, rel=1e-12)
            assert state["step"] == t and state["prev_lr"] == eta
            seen += [s["beta"] for s in segments]
        prev_eta = eta
    assert sum(0.01 < beta < 0.88 for beta in seen) > 20


# ---- what has rows ------------------------------------------------------------------


@both
@every_backend
@pytest.mark.parametrize(
    ("shape", "beta_shape"),
    [
        ((), ()),
        ((40,), ()),
        ((1,), ()),
        ((0,), ()),
        ((4, 16), (4,)),
        ((4, 15), ()),
        ((50, 1), ()),
        ((1, 16), (1,)),
        ((0, 16), (0,)),
        ((0, 3), ()),
        ((3, 0), ()),
        ((32, 1, 3, 3), ()),
        ((64, 3, 7, 7), (64,)),
        ((5, 2, 2, 2, 2), (5,)),
    ],
)
def test_which_tensors_have_rows(cls, backend, shape, beta_shape):
    """Those of two dimensions and more, with 16 elements a row and more."""
    optimizer = make(cls, [Group([shape])], backend)
    set_gradients(optimizer, step=0)
    optimizer.step()
    (param,) = parameters(optimizer)
    state = optimizer.state[param]
    scalars = {"step": (), "prev_lr": (), "beta": beta_shape}
    if cls is AMAdamW:
        scalars["beta_prod"] = beta_shape
    assert set(scalars) | set(MEMORIES[cls]) == set(state)
    assert {name: state[name].shape for name in scalars} == scalars
    assert all(state[name].shape == param.shape for name in MEMORIES[cls])
    set_gradients(optimizer, step=1)
    optimizer.step()
    assert state["step"] == 2


@both
@pytest.mark.parametrize(
    ("dtype", "state_dtype"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.complex64, torch.float32),
        (torch.complex128, torch.float64),
    ],
)
def test_the_state_of_rows_has_the_dtype_of_a_tensors(cls, dtype, state_dtype):
    optimizer = make(cls, [Group([(3, 16)], dtype)], "reference")
    set_gradients(optimizer, step=0)
    optimizer.step()
    (param,) = parameters(optimizer)
    for name in cls.scalars:
        assert optimizer.state[param][name].dtype == state_dtype, name


@both
@every_backend
def test_groups_may_differ_in_scope(cls, backend):
    """Each group is as by itself; what shares a global beta is not touched by the others."""
    scopes = ("row", "tensor", "global", "row", "global")
    shapes = [(4, 20), (17,)]
    options = [
        {"beta_scope": scope, "lr": 0.01 * (i + 1), "weight_decay": 0.05 * i}
        for i, scope in enumerate(scopes)
    ]
    mixed = make_optimizer(cls, [Group(shapes, DOUBLE, o) for o in options], backend)
    params = parameters(mixed)
    copies = [Parameter(param.detach().clone()) for param in params]
    groups = [{"params": copies[2 * i : 2 * i + 2], **o} for i, o in enumerate(options)]
    alone = [cls([groups[i]], backend=backend) for i in (0, 1, 3)]
    alone.append(cls([groups[2], groups[4]], backend=backend))
    for step in range(4):
        set_gradients(mixed, step=step)
        for param, other in zip(params, copies, strict=True):
            other.grad = param.grad
        mixed.step()
        for optimizer in alone:
            optimizer.step()
    states = {p: optimizer.state[p] for optimizer in alone for p in parameters(optimizer)}
    for param, other in zip(params, copies, strict=True):
        # Sums of all tensors may be added up in another order.
        torch.testing.assert_close(param, other, rtol=1e-12, atol=1e-13)
        for name, value in states[other].items():
            torch.testing.assert_close(mixed.state[param][name], value, rtol=1e-11, atol=1e-13)
    shapes = [mixed.state[param]["beta"].shape for param in params]
    assert shapes == [(4,), (), (), (), (), (), (4,), (), (), ()]


@both
def test_the_gap_of_losses_is_refused_with_rows(cls):
    params = [Parameter(torch.ones(3, 16))]
    message = 'gap="loss" needs beta_scope="global", not \'row\': a loss belongs to the whole model'
    with pytest.raises(ValueError, match=message):
        cls(params, gap="loss", beta_scope="row")
    optimizer = cls(params, gap="loss", beta_scope="global")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.ones(3))], "beta_scope": "row"})
    optimizer.param_groups[0]["beta_scope"] = "row"
    params[0].grad = torch.ones(3, 16)
    with pytest.raises(ValueError, match=message):
        optimizer.step(lambda: 1.0)
    assert not optimizer.state


# ---- every backend against the reference ---------------------------------------------


def groups(cls, dtype):
    """Groups that differ in every hyperparameter that may differ between groups."""
    cap = {"betas": (0.95, 0.99)} if cls is AMAdamW else {"beta_max": 0.95}
    anchored = {"memory_plane": "anchored"}
    return [
        Group([(6, 32), (5, 3, 7), (40,), (7, 1)], dtype),
        Group([(3, 700), (1, 16), ()], dtype, {"memory_lambda": 0.0, **anchored, **cap}),
        Group([], dtype, {"weight_decay": 0.1}),
        Group([(33, 17), (0, 20), (8, 3)], dtype, {"weight_decay": 0.1, "maximize": True}),
        Group([(4, 4, 3, 3)], dtype, {"weight_decay": 0.3, **anchored}),
    ]


def pair(cls, groups, backend, **options):
    return [make(cls, groups, name, **options) for name in ("reference", backend)]


@both
@other_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW_PRECISION])
def test_30_steps_agree_with_the_reference(cls, backend, dtype):
    reference, other = pair(cls, groups(cls, dtype), backend)
    seen = []
    for start in range(0, 30, 6):
        for optimizer in (reference, other):
            for i, group in enumerate(optimizer.param_groups):
                group["lr"] = 1e-2 * (i + 1) * (start % 12 != 0)
        # The second tensor has a gradient now and then.
        assert_lockstep(
            reference,
            other,
            6,
            seed=start,
            skip=lambda step: [1] if step % 3 else [],
            conditioned=True,
        )
        seen.append(betas_of(reference))
    betas = torch.cat(seen)
    assert ((betas > 0.01) & (betas < 0.88)).double().mean() > 0.05


@both
@other_backends
@planes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_at_the_edges_agree(cls, backend, plane, dtype):
    """Around packs, blocks of sums, and what a block or a cache may hold; few and many rows."""
    lengths = (16, 17, 31, 32, 33, 63, 65, 127, 129, 255, 257, 1023, 1025, 4095, 4097, 8193, 16385)
    shapes = [(2 + length % 3, length) for length in lengths]
    shapes += [(3, 40_001), (2, 100_000), (1025, 16), (513, 33), (2, 3, 5000)]
    reference, other = pair(cls, [Group(shapes, dtype)], backend, memory_plane=plane, lr=0.01)
    assert_lockstep(reference, other, 3, conditioned=True)


@both
@other_backends
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_rows_agree(cls, backend, dtype):
    groups = [Group([(5, 16), (4, 9), (3, 4, 8), (20,)], dtype)]
    reference, other = pair(cls, groups, backend, weight_decay=0.1)
    assert_lockstep(reference, other, 6, conditioned=True)
    assert [reference.state[p]["beta"].shape for p in parameters(reference)] == [(5,), (), (3,), ()]


@st.composite
def random_groups(draw, cls):
    result = []
    shape = st.tuples(
        st.integers(0, 9), st.sampled_from([0, 1, 5, 15, 16, 17, 40, 130]), st.integers(1, 3)
    )
    shapes = st.lists(st.one_of(shape, shape.map(lambda s: s[:2]), shape.map(lambda s: s[1:2])))
    for _ in range(draw(st.integers(1, 3))):
        cap = draw(st.sampled_from([0.0, 0.5, 0.89, 0.99]))
        options = {
            "lr": draw(st.sampled_from([0.0, 1e-4, 3e-3, 0.1])),
            "weight_decay": draw(st.sampled_from([0.0, 0.01, 0.3])),
            "memory_lambda": draw(st.sampled_from([0.0, 0.1, 2.0])),
            "memory_plane": draw(st.sampled_from(["level", "anchored"])),
            "beta_scope": draw(st.sampled_from(["row", "row", "tensor", "global"])),
            "maximize": draw(st.booleans()),
            **({"betas": (cap, 0.99)} if cls is AMAdamW else {"beta_max": cap}),
        }
        dtype = draw(st.sampled_from([torch.float32, torch.float64, *LOW_PRECISION]))
        result.append(Group(draw(shapes), dtype, options))
    return result


@both
@other_backends
@given(data=st.data())
def test_random_rows_and_hyperparameters_agree(cls, backend, data):
    seed = data.draw(st.integers(0, 1000))
    reference, other = pair(cls, data.draw(random_groups(cls)), backend, seed=seed)
    if parameters(reference):
        missing = data.draw(st.integers(0, 3))
        assert_lockstep(
            reference, other, 4, seed, lambda step: [missing] * (step % 2), conditioned=True
        )


# ---- layouts ------------------------------------------------------------------------


def in_base(tensor, base_shape, view):
    """The same numbers in the view of a larger or reordered tensor."""
    return view(torch.zeros(base_shape, dtype=tensor.dtype)).copy_(tensor)


LAYOUTS = {
    "transposed": ((30, 70), lambda t: in_base(t, (70, 30), lambda b: b.t())),
    "channels_last": ((6, 5, 4, 3), lambda t: t.clone().contiguous(memory_format=CHANNELS_LAST)),
    "every other column": ((30, 70), lambda t: in_base(t, (30, 140), lambda b: b[:, ::2])),
    "every other row": ((30, 70), lambda t: in_base(t, (60, 70), lambda b: b[::2])),
    "rows in reverse dimensions": (
        (6, 5, 4, 3),
        lambda t: in_base(t, (3, 4, 5, 6), lambda b: b.permute(3, 2, 1, 0)),
    ),
    "flat buffer": (
        (30, 70),
        lambda t: in_base(t, (2103,), lambda b: b[3:].view(30, 70)),
    ),
}


@both
@other_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("laid_out", ["param", "grad", "both"])
def test_any_layout_agrees_with_the_reference(cls, backend, dtype, laid_out):
    names = list(LAYOUTS)
    optimizers = []
    for name in ("reference", backend):
        params = []
        for i, (shape, layout) in enumerate(LAYOUTS.values()):
            values = random_tensor(shape, dtype, seed=i)
            params.append(layout(values) if laid_out != "grad" else values)
        params = [param.requires_grad_() for param in params]
        optimizers.append(cls(params, backend=name, beta_scope="row", weight_decay=0.1))
    strides = [param.stride() for param in parameters(optimizers[1])]
    for step in range(4):
        columns = zip(*map(parameters, optimizers), strict=True)
        for i, (name, params) in enumerate(zip(names, columns, strict=True)):
            grad = gradient(params[0].detach().contiguous(), step, index=i)
            for param in params:
                param.grad = LAYOUTS[name][1](grad) if laid_out != "param" else grad.clone()
        assert_one_step_agrees(*optimizers, step)
    assert [param.stride() for param in parameters(optimizers[1])] == strides


def assert_one_step_agrees(reference, other, step):
    """From the reference's state, with the gradients that are there."""
    slack = [4 * sensitivity for sensitivity in beta_sensitivity(reference, step)]
    before = snapshot(reference)
    restore(other, before)
    reference.step()
    other.step()
    assert_step_agrees(other, reference, before, slack)


@both
@cpu_alone
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_whose_elements_lie_in_the_same_order_give_the_same_bits(cls, backend, dtype):
    """Wherever the rows are: strided apart, in a flat buffer, or channels_last."""
    base = random_tensor((12, 4, 3, 10), dtype)
    nhwc = base.clone()  # as channels_last has it, but for the order of the dimensions
    flat = torch.zeros(base.numel() + 5, dtype=dtype)[5:].view(base.shape).copy_(base)
    apart = in_base(base, (24, 4, 3, 10), lambda b: b[::2])
    channels_last = base.permute(0, 3, 1, 2).clone(memory_format=torch.preserve_format)
    assert channels_last.is_contiguous(memory_format=CHANNELS_LAST)
    results = []
    for param in (nhwc, flat, apart, channels_last):
        optimizer = cls([param.requires_grad_()], backend=backend, beta_scope="row")
        for step in range(4):
            grad = gradient(base, step)
            if param is channels_last:
                grad = grad.permute(0, 3, 1, 2)
            param.grad = torch.empty_like(param).copy_(grad)
            optimizer.step()
        tensors = [param, *(optimizer.state[param][name] for name in MEMORIES[cls])]
        if param is channels_last:
            tensors = [tensor.permute(0, 2, 3, 1) for tensor in tensors]
        results.append([bits(t).tolist() for t in (*tensors, optimizer.state[param]["beta"])])
    assert all(result == results[0] for result in results[1:])


@both
@every_backend
def test_an_expanded_gradient_is_its_dense_copy(cls, backend):
    expanded, dense = (make(cls, [Group([(20, 30)])], backend) for _ in "ab")
    for step in range(4):
        for seed, shape in ((step, (30,)), (step + 50, (20, 1)))[step % 2 :]:
            row = random_tensor(shape, seed=seed).expand(20, 30)
            parameters(expanded)[0].grad, parameters(dense)[0].grad = row, row.clone()
            expanded.step()
            dense.step()
            assert_same_bits(expanded, dense)


@both
@every_backend
def test_what_lies_between_a_views_elements_is_left_alone(cls, backend):
    base = random_tensor((30, 60))
    before = base.clone()
    view = base[3:20:2, 1:60:3].requires_grad_()
    optimizer = cls([view], backend=backend, beta_scope="row")
    for step in range(3):
        view.grad = gradient(view, step)
        optimizer.step()
    changed = base.detach() != before
    assert changed[3:20:2, 1:60:3].all() and changed.sum() == view.numel()
    assert optimizer.state[view]["beta"].shape == (9,)


# ---- the same bits -------------------------------------------------------------------


@both
@cpu_alone
@planes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW_PRECISION])
def test_any_number_of_threads_gives_the_same_bits(cls, backend, plane, dtype):
    shapes = [(3, 70_000), (700, 33), (5,), (2, 3, 4), (40, 1100), (1, 20_000), (0, 16), (90_000,)]
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        options = {"weight_decay": 0.1, "memory_plane": plane}
        results.append(make(cls, [Group(shapes, dtype)], backend, **options))
        for step in range(3):
            set_gradients(results[-1], step=step)
            results[-1].step()
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@both
@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_seam_and_the_single_call_give_the_same_bits(cls, backend, dtype):
    through_seam, at_once = (
        make(cls, [*groups(cls, dtype), Group([(2, 40_000), (2, 40_000)], dtype)], backend)
        for _ in "ab"
    )
    for optimizer in (through_seam, at_once):
        strided = parameters(optimizer)[-1]
        strided.data = strided.data.t().contiguous().t()
    begin, finish = halves(at_once)
    for step in range(4):
        for optimizer in (through_seam, at_once):
            for group in optimizer.param_groups:
                group["lr"] = 0.0 if step == 0 else 0.01
        set_gradients(through_seam, at_once, step=step)
        parameters(through_seam)[0].grad[2] = 0.0
        with torch.no_grad():
            (work,) = through_seam._collect()
            rows = begin(work.batch, None, None)
            assert rows.shape == (sum(beta.numel() for beta in work.batch.betas), 2)
            finish(work.batch, rows, None, None)
        at_once.step()
        assert_same_bits(through_seam, at_once)


@both
@every_backend
def test_a_row_does_not_depend_on_the_others(cls, backend):
    """Nor does what is NaN in one: it stays there."""
    plain, poisoned = (make(cls, [Group([(5, 40), (3, 700), (9,)])], backend) for _ in "ab")
    for step in range(4):
        set_gradients(plain, poisoned, step=step)
        if step > 0:
            for param, row in zip(parameters(poisoned)[:2], (3, 1), strict=True):
                param.grad = param.grad.clone()
                param.grad[row, 7] = torch.nan
        plain.step()
        poisoned.step()
    rows = ([0, 1, 2, 4], [0, 2])
    columns = zip(parameters(poisoned), parameters(plain), (*rows, slice(None)), strict=True)
    for ours, theirs, kept in columns:
        names = (*MEMORIES[cls], *cls.row_scalars)
        for name in names:
            ours_, theirs_ = poisoned.state[ours][name], plain.state[theirs][name]
            if theirs_.dim() > 0:
                ours_, theirs_ = ours_[kept], theirs_[kept]
            assert torch.equal(bits(ours_), bits(theirs_)), name
        assert torch.equal(bits(ours[kept]), bits(theirs[kept]))
    assert parameters(poisoned)[0][3].isnan().any()


@both
@every_backend
@pytest.mark.parametrize("is_known", [False, True])
def test_betas_that_do_not_lie_one_behind_the_other_are_refused(cls, backend, is_known):
    """Also where the backend knows the tensors but for these, by whose addresses kernels write."""
    optimizer = make(cls, [Group([(5, 16), (7,)])], backend)
    set_gradients(optimizer, step=0)
    optimizer.step()
    if not is_known:
        optimizer._forget()
    state = optimizer.state[parameters(optimizer)[0]]
    wide = torch.full((10,), 0.25)
    for betas in (wide[::2], torch.full((1,), 0.25).expand(5)):
        state["beta"] = betas
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="contiguous"):
            optimizer.step()
        for param, values in zip(parameters(optimizer), before, strict=True):
            assert torch.equal(param, values.pop("param"))
            assert all(torch.equal(optimizer.state[param][k], v) for k, v in values.items())
    assert (wide == 0.25).all()


@both
@every_backend
def test_rows_of_the_seam_may_lie_in_any_way(cls, backend):
    expected, ours = (make(cls, [Group([(5, 40), (9,)])], backend) for _ in "ab")
    begin, finish = halves(ours)
    for step in range(3):
        set_gradients(expected, ours, step=step)
        expected.step()
        with torch.no_grad():
            (work,) = ours._collect()
            rows = begin(work.batch, None, None)
            finish(work.batch, rows.t().contiguous().t(), None, None)
        assert_same_bits(ours, expected)


@both
@every_backend
def test_shared_betas_of_rows_are_refused(cls, backend):
    """An optimizer makes no such batch; nobody's memory is to be written to where one does."""
    optimizer = make(cls, [Group([(5, 40)])], backend)
    set_gradients(optimizer, step=0)
    optimizer.step()
    (work,) = optimizer._collect()
    work.batch.shared[:] = [True]
    work.batch.cache = {}
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"0-dim|shape \[5\]"), torch.no_grad():
        halves(optimizer)[1](work.batch, None, None, None)
    assert torch.equal(parameters(optimizer)[0], before[0]["param"])


@every_backend
@planes
def test_a_memory_that_is_dropped_without_lambda_leaves_nothing(backend, plane):
    """What is left of it by rounding would decide the next beta, with weight decay."""
    options = {"memory_lambda": 0.0, "weight_decay": 0.1, "memory_plane": plane}
    optimizers = [
        make(AMAdamW, [Group([(20, 64)])], name, **options) for name in ("reference", backend)
    ]
    for step in range(8):
        set_gradients(*optimizers, step=step)
        for optimizer in optimizers:
            if step > 4:
                parameters(optimizer)[0].grad = torch.zeros(20, 64)
            optimizer.step()
        expected, ours = map(betas_of, optimizers)
        assert (ours - expected).abs().max() <= 1e-5


@both
@every_backend
@planes
def test_a_single_row_takes_the_step_of_a_vector(cls, backend, plane):
    lengths = (16, 700, 50_000)
    options = {"memory_plane": plane, "weight_decay": 0.1}
    rows = make(cls, [Group([(1, n) for n in lengths])], backend, **options)
    vectors = make(cls, [Group([(n,) for n in lengths])], backend, **options)
    for step in range(6):
        set_gradients(rows, step=step)
        for row, vector in zip(parameters(rows), parameters(vectors), strict=True):
            vector.grad = row.grad[0]
        rows.step()
        vectors.step()
    for row, vector in zip(parameters(rows), parameters(vectors), strict=True):
        torch.testing.assert_close(row[0], vector, rtol=1e-5, atol=1e-5)
        for name, value in vectors.state[vector].items():
            ours = rows.state[row][name]
            torch.testing.assert_close(ours.reshape(value.shape), value, rtol=1e-5, atol=1e-5)


# ---- a row without a gradient --------------------------------------------------------


@both
@every_backend
@planes
def test_a_row_without_a_gradient_drops_its_memory(cls, backend, plane):
    """As that of a token which is not in the batch, without weight decay: beta is 0, and the
    parameter moves by what memory_lambda keeps alone."""
    lr, lam, without = 0.02, 0.3, [1, 4]
    options = {"memory_plane": plane, "memory_lambda": lam, "weight_decay": 0.0, "lr": lr}
    optimizer = make(cls, [Group([(6, 50)])], backend, **options)
    (param,) = parameters(optimizer)
    for step in range(4):
        set_gradients(optimizer, step=step)
        optimizer.step()
    before = {name: value.double() for name, value in snapshot(optimizer)[0].items()}
    set_gradients(optimizer, step=4)
    param.grad = param.grad.clone()
    param.grad[without] = 0.0
    optimizer.step()
    state, d = optimizer.state[param], before[MEMORIES[cls][0]]
    P = torch.ones_like(d)
    if cls is AMAdamW:
        v = before["exp_avg_sq"] * 0.999 / (1 - 0.999**5)
        P = (1 - 0.89 * before["beta_prod"].unsqueeze(1)) * (v.sqrt() + 1e-8)
    expected = lam * P * d / (1 + lam * P)
    moved = before["param"] - lr * expected / P
    assert (state["beta"][without] == 0).all()
    assert relative_error(state[MEMORIES[cls][0]][without], expected[without]) < 1e-5
    assert relative_error(param[without], moved[without]) < 1e-6
    if cls is AMAdamW:
        assert (state["beta_prod"][without] == 0).all()
    # From then on, still without one, there is little left to move by.
    for step in range(5, 60):
        set_gradients(optimizer, step=step)
        param.grad[without] = 0.0
        optimizer.step()
    assert (state[MEMORIES[cls][0]][without].abs() <= 1e-6).all()


def first_step(cls, backend, rows, lr, scope="row"):
    """A first step with a gradient in these rows alone."""
    optimizer = make_optimizer(
        cls, [Group([(4, 30), (0, 16), (3, 2)])], backend, beta_scope=scope, weight_decay=0.1
    )
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
    parameters(optimizer)[0].grad[rows] = random_tensor((len(rows), 30))
    lrs = optimizer.param_groups[0]["lr"]
    optimizer.param_groups[0]["lr"] = lr
    before = snapshot(optimizer)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = lrs
    return optimizer, before


@both
@every_backend
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_first_step_at_lr_0_leaves_rows_without_a_gradient_alone(cls, backend, lr):
    optimizer, before = first_step(cls, backend, [0, 2], lr)
    param = parameters(optimizer)[0]
    state = optimizer.state[param]
    cap = 0.89 if cls is AMAdamW else 0.0
    assert state["step"] == 1 and state["prev_lr"] == 0
    torch.testing.assert_close(state["beta"], torch.tensor([cap, 0.0, cap, 0.0]))
    if cls is AMAdamW:
        torch.testing.assert_close(state["beta_prod"], torch.tensor([cap, 1.0, cap, 1.0]))
    assert torch.equal(param, before[0]["param"])
    memory = state[MEMORIES[cls][0]]
    assert (memory[[1, 3]] == 0).all() and (memory[[0, 2]] != 0).any(1).all()
    others = [optimizer.state[p]["step"].item() for p in parameters(optimizer)[1:]]
    assert others == [0, 0]


@both
@every_backend
@pytest.mark.parametrize("lr", [0.0, torch.tensor(0.0)])
def test_a_first_step_at_lr_0_without_any_gradient_is_none(cls, backend, lr):
    optimizer, before = first_step(cls, backend, [], lr)
    fresh = make(cls, [Group([(4, 30), (0, 16), (3, 2)])], backend, weight_decay=0.1)
    for param, kept in zip(parameters(optimizer), before, strict=True):
        assert torch.equal(param, kept["param"])
        assert optimizer.state[param]["step"] == 0
    for step in range(3):
        set_gradients(optimizer, fresh, step=step)
        optimizer.step()
        fresh.step()
        assert_same_bits(optimizer, fresh)


@both
@every_backend
def test_a_first_step_at_any_other_lr_is_one_for_every_row(cls, backend):
    optimizer, _ = first_step(cls, backend, [0, 2], 0.01)
    steps = [optimizer.state[p]["step"].item() for p in parameters(optimizer)]
    assert steps == [1, 1, 1]
    expected = torch.full((4,), 0.89 if cls is AMAdamW else 0.0)
    torch.testing.assert_close(optimizer.state[parameters(optimizer)[0]]["beta"], expected)


@both
@other_backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_that_come_to_their_first_gradient_late_agree_with_the_reference(cls, backend, dtype):
    """After a first step at lr 0 that was theirs to leave out, or one without their gradient."""
    groups = [Group([(4, 30), (6, 1, 40), (5,)], dtype)]
    reference, other = pair(cls, groups, backend, weight_decay=0.1)
    for step in range(5):
        for optimizer in (reference, other):
            optimizer.param_groups[0]["lr"] = 0.01 * step
        set_gradients(reference, other, step=step)
        for i, (a, b) in enumerate(zip(parameters(reference), parameters(other), strict=True)):
            if a.dim() > 1:
                a.grad = a.grad.clone()
                a.grad[step + i :] = 0.0
                b.grad = a.grad
        assert_one_step_agrees(reference, other, step)


# ---- as any optimizer ----------------------------------------------------------------


@both
@fused_backends
@pytest.mark.parametrize("scale", [1.0, 2.0**10, 2.0**-6])
def test_a_scale_of_gradients_changes_no_bit(cls, backend, scale):
    scaled, plain = (make(cls, groups(cls, torch.float32), backend) for _ in "ab")
    for step in range(4):
        set_gradients(scaled, plain, step=step)
        for param in parameters(scaled):
            param.grad = param.grad * scale
        scaled.grad_scale, scaled.found_inf = torch.tensor(scale), torch.tensor(0.0)
        scaled.step()
        plain.step()
        assert_same_bits(scaled, plain)


@both
@fused_backends
@pytest.mark.parametrize("lr", [0.0, 0.01])
def test_an_overflow_skips_the_step(cls, backend, lr):
    optimizer = make(cls, groups(cls, torch.float32), backend)
    for steps in range(2):
        for group in optimizer.param_groups:
            group["lr"] = lr if steps == 0 else 0.01
        set_gradients(optimizer, step=steps)
        parameters(optimizer)[0].grad[1, 2] = torch.inf
        before = snapshot(optimizer)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(1.0)
        optimizer.step()
        for values, kept in zip(snapshot(optimizer), before, strict=True):
            assert all(torch.equal(bits(values[name]), bits(kept[name])) for name in kept)
            assert values["step"] == steps
        optimizer.found_inf = torch.tensor(0.0)
        set_gradients(optimizer, step=steps)
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        optimizer.step()


@both
@every_backend
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_goes_on_bit_for_bit(cls, backend, way):
    optimizer = make(cls, groups(cls, torch.float32), backend)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
    for step in range(3):
        set_gradients(optimizer, step=step)
        take_step(optimizer, step)
        scheduler.step()
    if way == "state_dict":
        other = make(cls, groups(cls, torch.float32), backend)
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for ours, theirs in zip(parameters(other), parameters(optimizer), strict=True):
            ours.data.copy_(theirs.data)
    else:
        del optimizer.step  # the scheduler's wrapper, which neither of them copies
        other = (
            copy.deepcopy(optimizer) if way == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
        )
    for step in range(3, 6):
        set_gradients(optimizer, other, step=step)
        optimizer.step()
        other.step()
        assert_same_bits(other, optimizer)


@both
@every_backend
def test_a_closure_gives_the_loss(cls, backend):
    optimizer = make(cls, [Group([(3, 20)])], backend)
    (param,) = parameters(optimizer)

    def closure():
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert losses[-1] < losses[0] and optimizer.state[param]["beta"].shape == (3,)
