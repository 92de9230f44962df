"""State and parameters in few bits, by every backend that stores them: values, bits, promises."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_same_bits,
    backends,
    bits,
    gradient,
    largest,
    make_optimizer,
    parameters,
    random_tensor,
    relative_error,
    restore,
    set_gradients,
    snapshot,
)
from snapshot import snapshot as everything
from test_dispatch import machine_has

from adamem_fused import AMSGD, AMAdamW, formats
from adamem_fused.backends import BACKENDS, cpu
from adamem_fused.backends.batch import KEY, OFFSET, ROUNDS, SKIP, STRETCH

both = pytest.mark.parametrize("cls", OPTIMIZERS)
scopes = pytest.mark.parametrize("scope", ["tensor", "row", "global"])
UNABLE = [name for name, backend in BACKENDS.items() if not backend.packs]
each_backend = pytest.mark.parametrize("backend", backends(*UNABLE))
each_fused = pytest.mark.parametrize("backend", backends("reference", *UNABLE))
on_cpu = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason=str(cpu.ops.unavailable)
)

SHORT, LONG = torch.bfloat16, torch.float32
# Parameters' dtype, and the options of a group.
FORMATS = {
    "short": (LONG, {"state_dtype": SHORT}),
    "int8": (LONG, {"state_dtype": "int8"}),
    "short_short": (SHORT, {"state_dtype": SHORT}),
    "rounded": (SHORT, {"stochastic_rounding": True}),
    "rounded_int8": (SHORT, {"state_dtype": "int8", "stochastic_rounding": True}),
    "remainder_int8": (SHORT, {"state_dtype": "int8", "store_param_remainders": True}),
    "all_short": (
        SHORT,
        {"state_dtype": SHORT, "store_param_remainders": True, "stochastic_rounding": True},
    ),
}
each_format = pytest.mark.parametrize("kind", FORMATS)

# Blocks of each length, rows and tensors that end within a register, rows too long for a cache,
# and tensors that are stored as in other batches.
SHAPES = ((40, 256), (17, 384), (13, 320), (4099,), (7, 1000), (2, 32_832), (5,), (), (0, 3))
LARGE = ((3, 90_112), (33_024,), (70, 1024))


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def make(cls, kind, shapes=SHAPES, backend="cpu", **options):
    dtype, own = FORMATS[kind]
    return make_optimizer(cls, [Group(shapes, dtype)], backend, **own, **options)


def stepped(cls, kind, steps=3, threads=2, first=0, **options):
    torch.set_num_threads(threads)
    optimizer = make(cls, kind, **options)
    for step in range(first, first + steps):
        set_gradients(optimizer, step=step)
        optimizer.step()
    return optimizer


def work_of(optimizer):
    (work,) = optimizer._collect()
    return work


def halves(cls, backend):
    kind = "adamw" if cls is AMAdamW else "sgd"
    return (getattr(BACKENDS[backend], f"{kind}_{half}") for half in ("begin", "finish"))


# ---- against the reference ----------------------------------------------------------------


def in_order(tensor):
    """Integers that are next to one another where the stored numbers are; of codes themselves."""
    if not tensor.is_floating_point():
        return tensor.long()
    if tensor.dtype == LONG:  # of which 24 bits are stored
        words = tensor.contiguous().view(torch.int32).long() >> 8
        return torch.where(words < 0, -(2**23) - words, words)
    words = tensor.contiguous().view(torch.int16).long()
    return torch.where(words < 0, -(2**15) - words, words)


def assert_close(ours, theirs, name, is_low):
    """The same, but where a rounding falls on the other side."""
    if not is_low:
        assert relative_error(ours, theirs) <= 1e-5, name
        return
    apart = (in_order(ours) - in_order(theirs)).abs()
    # What cancels is a difference of larger numbers.
    tiny = (ours.double() - theirs.double()).abs() <= 1e-6 * largest(theirs)
    assert ((apart <= 1) | tiny).all(), f"{name}: {int(apart.max())} apart"
    assert (apart != 0).sum() <= 2 + 0.01 * apart.numel(), f"{name}: {int((apart != 0).sum())}"


def values(optimizer):
    """By parameter and name; a parameter and its remainder as float32."""
    result = []
    for param in parameters(optimizer):
        own = {"param": param.detach(), **optimizer.state[param]}
        if "param_remainder" in own:
            own["param"] = formats.join(own["param"], own.pop("param_remainder"))
        result.append(own)
    return result


def assert_agree(ours, theirs):
    others = parameters(theirs)
    for i, (own, other) in enumerate(zip(values(ours), values(theirs), strict=True)):
        assert own.keys() == other.keys()
        for name, value in other.items():
            assert own[name].dtype == value.dtype
            is_low = value.dtype not in (LONG, torch.float64)
            is_joined = name == "param" and "param_remainder" in theirs.state[others[i]]
            assert_close(own[name], value, f"{name} of tensor {i}", is_low or is_joined)


def assert_lockstep(ours, reference, steps=3):
    for step in range(steps):
        set_gradients(ours, reference, step=step)
        if step > 0:
            restore(ours, snapshot(reference))
        ours.step()
        reference.step()
        assert_agree(ours, reference)


@each_fused
@both
@scopes
@each_format
def test_a_step_agrees_with_the_reference(backend, cls, scope, kind):
    options = {"beta_scope": scope, "weight_decay": 0.1, "memory_lambda": 0.1}
    assert_lockstep(*(make(cls, kind, backend=b, **options) for b in (backend, "reference")))


@each_fused
@both
@pytest.mark.parametrize("kind", ["int8", "all_short"])
def test_other_options(backend, cls, kind):
    options = {"memory_plane": "anchored", "maximize": True, "max_grad_norm": 0.5}
    assert_lockstep(*(make(cls, kind, backend=b, **options) for b in (backend, "reference")))


@each_fused
@both
@pytest.mark.parametrize("kind", ["short", "remainder_int8"])
def test_tensors_of_all_sizes_agree(backend, cls, kind):
    pair = (make(cls, kind, shapes=LARGE, backend=b) for b in (backend, "reference"))
    assert_lockstep(*pair, steps=2)


@each_fused
@pytest.mark.parametrize("scope", ["tensor", "global"])
@each_format
def test_a_repair_agrees_with_the_reference(backend, scope, kind):
    """Of betas far below the cap and next to it."""
    options = {"beta_scope": scope, "weight_decay": 0.1, "memory_lambda": 0.1}
    pair = [make(AMAdamW, kind, backend=b, **options) for b in (backend, "reference")]
    betas = []
    for factor in (1.0, -0.1, 1.0, -0.5, 1.0):
        set_gradients(*pair, step=0)
        for param in itertools.chain(*map(parameters, pair)):
            param.grad = param.grad * factor
        if betas:
            restore(pair[0], snapshot(pair[1]))
        for optimizer in pair:
            optimizer.step()
        assert_agree(*pair)
        betas.append(float(pair[1].state[parameters(pair[1])[0]]["beta"]))
    assert min(betas) < 0.5 and any(0.5 < beta < 0.89 for beta in betas)


@on_cpu
@pytest.mark.parametrize("scope", ["tensor", "row"])
@each_format
def test_what_the_first_half_updates(scope, kind):
    """Where a repair can begin with what is stored, and only there."""
    optimizer = stepped(AMAdamW, kind, steps=1, shapes=((40, 256), (3, 33_024)), beta_scope=scope)
    set_gradients(optimizer, step=1)
    before = everything(optimizer)
    begin, _ = halves(AMAdamW, "cpu")
    with torch.no_grad():
        begin(work_of(optimizer).batch, None, None)
    guesses = scope == "tensor" and kind != "short_short"  # a parameter rounded to nearest
    assert (everything(optimizer) != before) == guesses


@on_cpu
@pytest.mark.parametrize("scope", ["tensor", "global"])
@each_format
def test_a_gradient_that_is_the_parameter_agrees(scope, kind):
    """It is not there any more when a guess would be repaired."""
    shapes = ((40, 256), (70, 1024))
    pair = [make(AMAdamW, kind, shapes, b, beta_scope=scope) for b in ("cpu", "reference")]
    for sign in (1.0, 1.0, -1.0):
        restore(pair[0], snapshot(pair[1]))
        for optimizer in pair:
            for param in parameters(optimizer):
                param.data.mul_(sign)
                param.grad = param.detach()
            optimizer.step()
        assert_agree(*pair)
    assert float(pair[1].state[parameters(pair[1])[0]]["beta"]) < 0.88


@each_fused
@both
@each_format
def test_scaled_gradients(backend, cls, kind):
    ours, reference = (make(cls, kind, backend=b) for b in (backend, "reference"))
    for optimizer in (ours, reference):
        set_gradients(optimizer, step=0)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.tensor(0.0)
        optimizer.step()
    assert_agree(ours, reference)


# ---- formats.py's conversions, bit for bit ------------------------------------------------


def all_kinds_of_floats(n=8192):
    """Of every exponent, with denormals, zeros and infinities; no NaN."""
    words = torch.randint(-(2**31), 2**31, (n,), generator=torch.Generator().manual_seed(5))
    value = words.to(torch.int32).view(LONG)
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf"), 3.4e38, -3.4e38, 1e-45, -1e-40])
    value[: special.numel()] = special
    return torch.where(value.isnan(), 1.0, value)


def bits_of(work, i, of_param=False):
    """The random bits of a batch's first step."""
    key, offset, stretch, skip, _ = work.batch.packed.rounding[:, i].tolist()
    numel = work.batch.params[i].numel()
    places = formats.places(numel, offset, stretch, skip, torch.device("cpu"))
    return formats.random_bits(formats.step_keys(key, 0)[of_param], places)


def first_sgd_step(param, grad, backend, **options):
    """AM-SGD's, which keeps the gradient and subtracts it, both exactly."""
    param, before = param.clone().requires_grad_(), param.clone()
    param.grad = grad.clone()
    optimizer = AMSGD([param], lr=1.0, backend=backend, **options)
    work = work_of(optimizer)
    optimizer.step()
    return work, optimizer.state[param], param.detach(), before


def same(ours, theirs):
    return (ours == theirs) | (ours.isnan() & theirs.isnan())


@each_backend
def test_bfloat16_memories_are_rounded_as_formats_says(backend):
    grad = all_kinds_of_floats()
    work, state, _, _ = first_sgd_step(torch.zeros(8192), grad, backend, state_dtype=SHORT)
    expected = formats.to_bfloat16(grad, bits_of(work, 0))
    assert same(state["momentum_buffer"], expected).all()
    assert (expected.float() != grad).sum() > 4000


@each_backend
@pytest.mark.parametrize("shape", [(8, 1024), (8, 1152), (8, 1088)])
def test_codes_are_those_of_formats(backend, shape):
    """But for the last bit of the arithmetic."""
    grad = random_tensor(shape) * torch.logspace(-36, 30, shape[0]).unsqueeze(1)
    grad[2] = 0
    grad[3, 5] = 1e20  # one huge value
    work, state, _, _ = first_sgd_step(torch.zeros(shape), grad, backend, state_dtype="int8")
    codes = torch.zeros(shape, dtype=torch.int8)
    scales = torch.zeros_like(state["momentum_buffer_scales"])
    formats.encode(grad, codes, scales, bits_of(work, 0).view(shape))
    assert torch.equal(state["momentum_buffer_scales"], scales)
    apart = (state["momentum_buffer_codes"].long() - codes.long()).abs()
    assert apart.max() <= 1 and (apart != 0).sum() <= 4
    assert (state["momentum_buffer_codes"][2] == 0).all()


@each_backend
@pytest.mark.parametrize("rounds", [False, True])
def test_a_parameter_is_split_as_formats_says(backend, rounds):
    param, grad = (all_kinds_of_floats(4100).to(SHORT) for _ in range(2))
    grad = grad[torch.randperm(4100, generator=torch.Generator().manual_seed(1))]
    options = {"store_param_remainders": True, "stochastic_rounding": rounds}
    work, state, new, old = first_sgd_step(param, grad, backend, **options)
    value = (old.double() - grad.double()).float()
    # Of numbers of which one does not reach the other, the least of either is lost otherwise.
    own = bits_of(work, 0, of_param=True) if rounds else None
    expected, remainder = formats.split(value, own)
    assert same(new, expected).all()
    assert torch.equal(state["param_remainder"], remainder)
    assert (remainder != 0).sum() > 100


@each_backend
def test_a_parameter_is_rounded_as_formats_says(backend):
    param = all_kinds_of_floats(4100).to(SHORT)
    grad = (param.float() * random_tensor((4100,)) * 0.01).to(SHORT)
    work, _, new, old = first_sgd_step(param, grad, backend, stochastic_rounding=True)
    value = (old.double() - grad.double()).float()
    expected = formats.to_bfloat16(value, bits_of(work, 0, of_param=True))
    assert same(new, expected).all()
    assert (new != value.to(SHORT)).sum() > 100


@each_backend
def test_a_remainder_is_joined(backend):
    """What a step leaves in it is there for the next one: 24 bits of a sum of small numbers."""
    param = torch.full((64,), 1.0, dtype=SHORT, requires_grad=True)
    param.grad = torch.full_like(param, 2.0**-12)
    optimizer = AMSGD([param], lr=1.0, beta_max=0.0, backend=backend, store_param_remainders=True)
    for _ in range(8):
        optimizer.step()
    value = formats.join(param.detach(), optimizer.state[param]["param_remainder"])
    assert torch.equal(value, torch.full((64,), 1 - 2.0**-9))


# ---- the same bits ------------------------------------------------------------------------


@on_cpu
@both
@scopes
@each_format
def test_any_number_of_threads_gives_the_same_bits(cls, scope, kind):
    shapes = SHAPES + LARGE
    one = stepped(cls, kind, threads=1, shapes=shapes, beta_scope=scope)
    for threads in (2, 3):
        other = stepped(cls, kind, threads=threads, shapes=shapes, beta_scope=scope)
        assert_same_bits(other, one)


@each_backend
@both
@pytest.mark.parametrize("scope", ["tensor", "row"])
@each_format
def test_the_seam_and_the_single_call_give_the_same_bits(backend, cls, scope, kind):
    begin, finish = halves(cls, backend)
    pair = [stepped(cls, kind, steps=1, backend=backend, beta_scope=scope) for _ in range(2)]
    set_gradients(*pair, step=1)
    with torch.no_grad():
        batch = work_of(pair[0]).batch
        finish(batch, begin(batch, None, None), None, None)
    pair[1].step()
    assert_same_bits(*pair)


@each_backend
@both
@each_format
def test_a_tensor_does_not_depend_on_its_neighbours(backend, cls, kind):
    """In groups of their own, and behind others in the list that a backend is given."""
    together = stepped(cls, kind, steps=2, backend=backend, beta_scope="tensor")
    dtype, own = FORMATS[kind]
    groups = [Group([shape], dtype) for shape in SHAPES]
    apart = make_optimizer(cls, groups, backend, beta_scope="tensor", **own)
    order = torch.randperm(len(SHAPES), generator=torch.Generator().manual_seed(2)).tolist()
    begin, finish = halves(cls, backend)
    for step in range(2):
        set_gradients(apart, step=step)
        if step == 0:
            apart.step()
            continue
        batch = work_of(apart).batch
        lists = (*batch.all_lists(), batch.hypers, batch.shared)
        for values in lists:
            values[:] = [values[i] for i in order]
        batch.packed.rounding = batch.packed.rounding[:, order].contiguous()
        with torch.no_grad():
            finish(batch, begin(batch, None, None), None, None)
    assert_same_bits(apart, together)


@each_backend
@both
def test_the_seed_gives_the_bits(backend, cls):
    dtype, options = FORMATS["rounded_int8"]
    runs = []
    for seed in (1, 1, 2):
        groups = [Group([(16, 256)], dtype, {"seed": seed, **options})]
        runs.append(make_optimizer(cls, groups, backend))
        for step in range(2):
            set_gradients(runs[-1], step=step)
            runs[-1].step()
    assert_same_bits(runs[0], runs[1])
    first, _, other = (run.state[parameters(run)[0]] for run in runs)
    memory = "exp_avg_codes" if cls is AMAdamW else "momentum_buffer_codes"
    assert not torch.equal(first[memory], other[memory])
    assert not torch.equal(parameters(runs[0])[0], parameters(runs[2])[0])


@each_backend
@pytest.mark.parametrize("kind", ["short", "int8"])
def test_a_repair_is_right_in_the_mean(backend, kind):
    """Of blocks that are all alike but for their random bits, beside a step that rounds nothing."""
    blocks, length = 512, 256
    options = {"lr": 1.0, "weight_decay": 0.0, "memory_lambda": 0.1}
    first = random_tensor((length,))
    low = make(AMAdamW, kind, shapes=[(blocks, length)], backend=backend, **options)
    exact = AMAdamW(
        [torch.zeros(blocks, length, requires_grad=True)], backend="reference", **options
    )
    (param,), (other,) = parameters(low), parameters(exact)
    for optimizer, own in ((low, param), (exact, other)):
        with torch.no_grad():
            own.zero_()
        own.grad = first.expand(blocks, length).clone()
        optimizer.step()
    # Both from what the first block has stored, and with a gradient whose beta is far from the cap.
    state, memories = low.state[param], exact.state[other]
    for name in ("exp_avg", "exp_avg_sq"):
        if kind == "int8":
            codes, scales = state[f"{name}_codes"], state[f"{name}_scales"]
            codes.copy_(codes[:1].clone().expand_as(codes))
            scales.copy_(scales[:1].clone().expand_as(scales))
            memories[name].copy_(formats.decode(codes, scales))
        else:
            state[name].copy_(state[name][:1].clone().expand_as(state[name]))
            memories[name].copy_(state[name])
    for optimizer, own in ((low, param), (exact, other)):
        with torch.no_grad():
            own.zero_()
        own.grad = (
            (0.2 * random_tensor((length,), seed=1) - 0.5 * first).expand(blocks, length).clone()
        )
        optimizer.step()
    beta = float(exact.state[other]["beta"])
    assert beta < 0.8 and abs(float(state["beta"]) - beta) < 1e-5
    d = (
        state["exp_avg"].double()
        if kind == "short"
        else formats.decode(state["exp_avg_codes"], state["exp_avg_scales"])
    )
    for ours, theirs, curved in ((param, other, 0.002), (d, memories["exp_avg"], 0.0)):
        ours, theirs = ours.detach().double(), theirs.detach().double()[0]
        error = ours.std(0) / blocks**0.5 + 1e-6 * theirs.abs()
        apart = (ours.mean(0) - theirs).abs()
        assert (ours.std(0) > 0).any()
        # x is not linear in the denominator, whose codes are rounded too.
        assert (apart <= 5 * error + curved * theirs.abs()).all(), float((apart / error).max())


@each_backend
@both
def test_a_step_later_the_bits_are_others(backend, cls):
    param = torch.full((4096,), 1 / 3, dtype=SHORT, requires_grad=True)
    optimizer = cls([param], lr=1e-3, backend=backend, stochastic_rounding=True)
    moved = []
    for _ in range(2):
        before = param.detach().clone()
        param.grad = torch.full_like(param, 1e-3 if cls is AMAdamW else 0.4)
        optimizer.step()
        moved.append(param.detach() != before)
    assert 0.1 < moved[0].double().mean() < 0.9
    assert not torch.equal(*moved)


@on_cpu
def test_avx2_and_avx512_give_the_same_bits(tmp_path):
    if not machine_has("avx512"):
        pytest.skip("this machine has no avx512")
    results = []
    for capability in ("avx2", "avx512"):
        path = tmp_path / f"{capability}.pt"
        run_with(capability, f"test_low_precision.save_runs({str(path)!r})")
        results.append(torch.load(path))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


@on_cpu
def test_the_baseline_agrees():
    run_with("default", "test_low_precision.check_agreement()")


def run_with(capability, code):
    subprocess.run(
        [sys.executable, "-c", f"import test_low_precision; {code}"],
        env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
        cwd=Path(__file__).parent,
        check=True,
    )


def save_runs(path):
    tensors = []
    for cls, kind, scope in itertools.product(OPTIMIZERS, FORMATS, ("tensor", "row")):
        optimizer = stepped(cls, kind, beta_scope=scope, weight_decay=0.1)
        for param in parameters(optimizer):
            tensors += [bits(param), *map(bits, optimizer.state[param].values())]
    torch.save(tensors, path)


def check_agreement():
    for cls, kind in itertools.product(OPTIMIZERS, FORMATS):
        assert_lockstep(*(make(cls, kind, backend=b) for b in ("cpu", "reference")), steps=2)
    test_a_parameter_is_split_as_formats_says("cpu", True)
    test_bfloat16_memories_are_rounded_as_formats_says("cpu")
    test_codes_are_those_of_formats("cpu", (8, 1088))


# ---- places -------------------------------------------------------------------------------


# Offset, stretch and skip: on the way to 2^32 and across it, in stretches that end within a
# register, in single elements, and far beyond.
PLACES = [
    (0, 0, 0),
    (2**32 - 1000, 0, 0),
    (2**32 - 77, 24, 40),
    (5, 1, 2**31),
    (2**40 + 3, 256, 2**33 - 7),
    (2**32 - 4096, 64, 64),
]


@each_backend
@both
@pytest.mark.parametrize("places", PLACES)
@pytest.mark.parametrize("kind", ["int8", "all_short"])
def test_the_place_in_the_whole_tensor_gives_the_bits(backend, cls, places, kind):
    """By a batch that is handed in; the gradient is the memory, exactly, in a first step."""
    optimizer = make(cls, kind, shapes=((20, 256), (1040, 4)), backend=backend)
    set_gradients(optimizer, step=0)
    _, finish = halves(cls, backend)
    batch = work_of(optimizer).batch
    for row, value in zip((OFFSET, STRETCH, SKIP), places, strict=True):
        batch.packed.rounding[row] = value
    reference = make(cls, kind, shapes=((20, 256), (1040, 4)), backend="reference")
    set_gradients(reference, step=0)
    _, expect = halves(cls, "reference")
    other = work_of(reference).batch
    for i in range(2):
        key, _, _, _, rounds = other.packed.rounding[:, i].tolist()
        assert batch.packed.rounding[KEY, i] == key and batch.packed.rounding[ROUNDS, i] == rounds
    other.packed.rounding[OFFSET : SKIP + 1] = torch.tensor(places).unsqueeze(1)
    with torch.no_grad():
        finish(batch, None, None, None)
        expect(other, None, None, None)
    assert_agree(optimizer, reference)


@each_backend
@both
@pytest.mark.parametrize("kind", ["int8", "all_short"])
@pytest.mark.parametrize("dim", [0, 1])
def test_shards_have_the_bits_of_the_whole(backend, cls, kind, dim):
    """Two shards, with the sums of the whole tensor, are stepped as it is."""
    begin, finish = halves(cls, backend)
    whole = make(cls, kind, shapes=((32, 512),), backend=backend)
    set_gradients(whole, step=0)
    (param,) = parameters(whole)
    shards = [
        part.detach().clone(memory_format=torch.contiguous_format).requires_grad_()
        for part in param.chunk(2, dim)
    ]
    _, options = FORMATS[kind]
    optimizers = [cls([shard], backend=backend, **options) for shard in shards]
    for shard, grad in zip(shards, param.grad.chunk(2, dim), strict=True):
        shard.grad = grad.contiguous()
    with torch.no_grad():
        batch = work_of(whole).batch
        rows = begin(batch, None, None)
        finish(batch, rows, None, None)
        for i, optimizer in enumerate(optimizers):
            own = work_of(optimizer).batch
            places = (i * 16 * 512, 0, 0) if dim == 0 else (i * 256, 256, 256)
            own.packed.rounding[OFFSET : SKIP + 1, 0] = torch.tensor(places)
            begin(own, None, None)
            finish(own, rows, None, None)
    for name, value in {"param": param.detach(), **whole.state[param]}.items():
        if value.dim() == 0:
            continue
        parts = [
            shard.detach() if name == "param" else optimizer.state[shard][name]
            for shard, optimizer in zip(shards, optimizers, strict=True)
        ]
        assert torch.equal(bits(torch.cat(parts, dim)), bits(value)), name


# ---- what a step leaves as it is -------------------------------------------------------------


@each_backend
@both
@each_format
def test_found_inf_leaves_every_bit(backend, cls, kind):
    optimizer = stepped(cls, kind, steps=2, backend=backend)
    before = everything(optimizer)
    set_gradients(optimizer, step=2)
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert everything(optimizer) == before


@each_backend
@both
@scopes
@each_format
def test_an_idle_step_leaves_every_bit(backend, cls, scope, kind):
    optimizer = make(cls, kind, backend=backend, beta_scope=scope, lr=0.0)
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
    work_of(optimizer)  # makes the state
    before = everything(optimizer)
    optimizer.step()
    assert everything(optimizer) == before


@each_fused
@both
@pytest.mark.parametrize("kind", ["rounded_int8", "all_short"])
def test_rows_without_a_gradient_at_an_idle_step(backend, cls, kind):
    pair = [make(cls, kind, backend=b, beta_scope="row", lr=0.0) for b in (backend, "reference")]
    set_gradients(*pair, step=0)
    for param in map(parameters, pair):
        param[0].grad[::2] = 0
    for optimizer in pair:
        optimizer.step()
    assert_agree(*pair)


@each_backend
@both
def test_a_block_with_nan_is_nan(backend, cls):
    """And stays it; the other rows are as without it."""
    ours, clean = (
        stepped(cls, "int8", steps=1, shapes=((8, 512),), backend=backend, beta_scope="row")
        for _ in range(2)
    )
    ((param,), (other,)) = map(parameters, (ours, clean))
    for step in (1, 2):
        set_gradients(ours, clean, step=step)
        param.grad = param.grad.clone()
        if step == 1:
            param.grad[3, 300] = float("nan")
        ours.step()
        clean.step()
        for name in ours.memories:
            scales = ours.state[param][f"{name}_scales"]
            assert scales[3, 1].isnan()
            assert scales[torch.arange(8) != 3].isfinite().all()
    for name, value in {"param": param, **ours.state[param]}.items():
        if value.dim() > 0:
            expected = other if name == "param" else clean.state[other][name]
            keep = torch.arange(8) != 3
            assert torch.equal(bits(value[keep]), bits(expected[keep])), name


@each_backend
@pytest.mark.parametrize("kind", ["int8", "short"])
def test_an_infinite_gradient_makes_its_block_nan(backend, kind):
    dtype, options = FORMATS[kind]
    param = torch.zeros(16, 256, dtype=dtype, requires_grad=True)
    param.grad = random_tensor((16, 256))
    param.grad[2, 7] = float("inf")
    optimizer = AMSGD([param], backend=backend, beta_scope="row", **options)
    optimizer.step()
    state = optimizer.state[param]
    if kind == "short":
        assert state["momentum_buffer"][2, 7].isinf()
        assert state["momentum_buffer"].isinf().sum() == 1
    else:
        value = formats.decode(state["momentum_buffer_codes"], state["momentum_buffer_scales"])
        assert torch.equal(value.isfinite().all(1), torch.arange(16) != 2)
        assert value[2].isnan().all()


# ---- tensors of all kinds --------------------------------------------------------------------


@each_backend
@both
@each_format
def test_other_layouts(backend, cls, kind):
    """Parameters that are not contiguous, and gradients that are laid out otherwise."""
    dtype, options = FORMATS[kind]
    made = [random_tensor((64, 64, 3, 3), dtype), random_tensor((256, 40), dtype)]
    plain = [value.clone().requires_grad_() for value in made]
    others = [
        made[0].to(memory_format=torch.channels_last).requires_grad_(),
        made[1].t().contiguous().t().requires_grad_(),
    ]
    first, second = (cls(params, backend=backend, **options) for params in (plain, others))
    for step in range(2):
        for i, (param, other) in enumerate(zip(plain, others, strict=True)):
            param.grad = gradient(param, step, index=i)
            other.grad = torch.empty_like(other).copy_(param.grad)
        second.param_groups[0]["params"][1].grad = plain[1].grad.clone()
        first.step()
        second.step()
    for param, other in zip(plain, others, strict=True):
        assert not other.is_contiguous()
        assert torch.equal(param, other)
        for name, value in first.state[param].items():
            assert torch.equal(bits(value), bits(second.state[other][name])), name


@on_cpu
@both
def test_thousands_of_tensors(cls):
    """Of which some are stored in few bits, and all are as in optimizers of a few."""
    shapes = [(16, 256), (3,), (4096,), ()] * 500
    together = make(cls, "remainder_int8", shapes=shapes)
    few = make(cls, "remainder_int8", shapes=shapes[:40])
    set_gradients(together, step=0)
    for param, other in zip(parameters(few), parameters(together), strict=False):
        param.grad = other.grad
    for _ in range(2):
        together.step()
        few.step()
    for param, other in zip(parameters(few), parameters(together), strict=False):
        assert torch.equal(param, other)
        for name, value in few.state[param].items():
            assert torch.equal(bits(value), bits(together.state[other][name])), name


@each_backend
@both
def test_autograd_is_told_what_was_written(backend, cls):
    optimizer = stepped(cls, "remainder_int8", steps=1, shapes=((16, 256),), backend=backend)
    (param,) = parameters(optimizer)
    tensors = [param, *optimizer.state[param].values()]
    before = [tensor._version for tensor in tensors]
    optimizer.step()
    assert all(t._version > v for t, v in zip(tensors, before, strict=True))


@on_cpu
@both
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_step_is_the_step(cls, compiler):
    torch._dynamo.reset()
    kinds = ("int8", "all_short")
    compiled, plain = (
        make_optimizer(
            cls, [Group(SHAPES[:2], FORMATS[kind][0], FORMATS[kind][1]) for kind in kinds], "cpu"
        )
        for _ in range(2)
    )
    step_compiled = torch.compile(compiled.step, backend=compiler)
    for step in range(2):
        set_gradients(compiled, plain, step=step)
        step_compiled()
        plain.step()
    assert_same_bits(compiled, plain)


def is_of_tensors(value):
    return isinstance(value, list) and all(isinstance(item, torch.Tensor) for item in value)


@on_cpu
@both
def test_the_operators_pass_opcheck(cls):
    optimizer = stepped(cls, "remainder_int8", steps=1, shapes=((16, 256), (5,)))
    set_gradients(optimizer, step=1)
    arguments = tuple(
        [tensor.detach().clone() for tensor in value] if is_of_tensors(value) else value
        for value in cpu._arguments(work_of(optimizer).batch, None, None)
    )
    kind, begin = ("adamw", "adamw_begin_") if cls is AMAdamW else ("sgd", "sgd_begin")
    operators = torch.ops.adamem_fused
    rows = getattr(operators, begin)(*arguments)
    torch.library.opcheck(getattr(operators, f"{kind}_finish_").default, (*arguments, rows))
    torch.library.opcheck(getattr(operators, begin).default, arguments)


# ---- what cannot be stored so ----------------------------------------------------------------


@each_backend
@both
@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"grads": torch.zeros(16, 256, dtype=SHORT)}, TypeError, "grad of tensor 0"),
        ({"grads": torch.zeros(16, 512)[:, ::2]}, ValueError, "grad of tensor 0"),
        ({"params": torch.zeros(16, 256, dtype=torch.float64)}, TypeError, "param of tensor 0"),
        ({"scales": torch.zeros(15)}, ValueError, "_scales"),
        ({"scales": torch.zeros(16, dtype=torch.float64)}, TypeError, "_scales"),
        ({"scales": torch.zeros(32)[::2]}, ValueError, "_scales"),
        ({"remainders": torch.zeros(4096, dtype=torch.int8)}, ValueError, "param_remainder"),
    ],
    ids=["grad", "strides", "param", "blocks", "scales", "apart", "remainder"],
)
def test_what_does_not_go_together(backend, cls, change, error, words):
    optimizer = make(cls, "int8", shapes=((16, 256),), backend=backend)
    set_gradients(optimizer, step=0)
    begin, _ = halves(cls, backend)
    batch = work_of(optimizer).batch
    for name, value in change.items():
        lists = {"scales": batch.packed.scales[0], "remainders": batch.packed.remainders}
        lists.get(name, getattr(batch, name, None))[0] = value
    before = everything(optimizer)
    with pytest.raises(error, match=words), torch.no_grad():
        begin(batch, None, None)
    assert everything(optimizer) == before
