"""Low-precision state and parameters: options, state, checkpoints, and what changes them."""

import copy
import gc
import io
import math
import pickle
import weakref

import pytest
import torch
from cases import OPTIMIZERS, gradient, parameters
from snapshot import snapshot
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.nn import Parameter

from adamem_fused import AMAdamW, formats, param_groups, release_gradients
from adamem_fused.storage import LEAST_NUMEL

both = pytest.mark.parametrize("cls", OPTIMIZERS)

# 256, 128 and 64 elements in a block, a convolution's in channels_last, a vector; and what has no
# blocks: rows that none divides, a small matrix and a small vector.
SHAPES = [(20, 256), (33, 128), (65, 64), (16, 64, 3, 3), (4096,), (50, 100), (8, 256), (64,)]
HAVE_BLOCKS, ARE_LOW = (0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5)

FORMATS = {
    "plain": {},
    "bfloat16": {"state_dtype": torch.bfloat16},
    "int8": {"state_dtype": "int8"},
    "remainders": {"store_param_remainders": True},
    "bfloat16 and remainders": {"state_dtype": torch.bfloat16, "store_param_remainders": True},
    "all": {"state_dtype": "int8", "stochastic_rounding": True, "store_param_remainders": True},
}
each_format = pytest.mark.parametrize("form", FORMATS)
each_low_format = pytest.mark.parametrize("form", [form for form in FORMATS if form != "plain"])


def params_of(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    return [
        Parameter(value.to(memory_format=torch.channels_last) if value.dim() == 4 else value)
        for value in values
    ]


def new(cls, form, dtype=torch.bfloat16, shapes=SHAPES, **options):
    own = {"lr": 0.03, "weight_decay": 0.1, "backend": "reference", "seed": 3, **FORMATS[form]}
    return cls(params_of(dtype, shapes), **{**own, **options})


def set_gradients(optimizer, step):
    for index, param in enumerate(parameters(optimizer)):
        param.grad = gradient(param.detach(), step, index=index)


def take_steps(optimizer, *steps):
    for step in steps:
        set_gradients(optimizer, step)
        optimizer.step()


def give(optimizer, form):
    """The options of another format, to every group."""
    own = {"state_dtype": None, "stochastic_rounding": False, "store_param_remainders": False}
    own.update(FORMATS[form])
    if own["state_dtype"] == torch.bfloat16:
        own["state_dtype"] = "bfloat16"
    for group in optimizer.param_groups:
        group.update(own)


def memories_of(optimizer, param):
    """The values of a parameter's memories, by name."""
    state = optimizer.state[param]
    return {
        name: state[name]
        if name in state
        else formats.decode(state[f"{name}_codes"], state[f"{name}_scales"])
        for name in type(optimizer).memories
    }


def dtypes_of(optimizer, param):
    state = optimizer.state[param]
    return {name: value.dtype for name, value in state.items() if value.shape == param.shape}


# ---- what state there is ----------------------------------------------------------------


def expected_dtypes(cls, form, index):
    options = FORMATS[form]
    state_dtype = options.get("state_dtype")
    dtypes = {}
    for memory in cls.memories:
        if state_dtype == "int8" and index in HAVE_BLOCKS:
            dtypes[f"{memory}_codes"] = torch.uint8 if memory == "exp_avg_sq" else torch.int8
        else:
            is_16bit = state_dtype == torch.bfloat16 and index in ARE_LOW
            dtypes[memory] = torch.bfloat16 if is_16bit else torch.float32
    if options.get("store_param_remainders"):
        dtypes["param_remainder"] = torch.int8
    return dtypes


@both
@each_format
def test_state_is_of_the_dtypes_of_its_options(cls, form):
    optimizer = new(cls, form)
    take_steps(optimizer, 0)
    for index, param in enumerate(parameters(optimizer)):
        state = optimizer.state[param]
        assert dtypes_of(optimizer, param) == expected_dtypes(cls, form, index)
        for name in (name for name in state if name.endswith("_scales")):
            block = (256, 128, 64, 64, 256)[index]
            rows = param.shape[:1] if param.dim() > 1 else ()
            row = param.numel() // (rows[0] if rows else 1)
            assert state[name].shape == (*rows, row // block)
            assert state[name].dtype == torch.float32
        others = {*dtypes_of(optimizer, param), *(n for n in state if n.endswith("_scales"))}
        assert state.keys() - others == cls.scalars.keys()


def state_bytes(optimizer):
    tensors = (v for state in optimizer.state.values() for v in state.values() if v.dim() > 0)
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@pytest.mark.parametrize(
    ("form", "dtype", "state", "params_and_state"),
    [
        ("bfloat16", torch.float32, 4.0, 8.0),
        ("int8", torch.float32, 2.1, 6.1),
        ("all", torch.bfloat16, 3.1, 5.1),
        ("bfloat16 and remainders", torch.bfloat16, 5.0, 7.0),
    ],
)
def test_state_takes_so_many_bytes_a_parameter(form, dtype, state, params_and_state):
    shapes = [(768, 256), (64, 64, 4, 4), (300, 128), (100_352,)]
    optimizer = new(AMAdamW, form, dtype, shapes)
    take_steps(optimizer, 0)
    numel = sum(map(math.prod, shapes))
    assert state_bytes(optimizer) / numel <= state
    in_params = sum(p.numel() * p.element_size() for p in parameters(optimizer))
    assert (state_bytes(optimizer) + in_params) / numel <= params_and_state


@both
def test_sizes_below_the_least_keep_float32(cls):
    shapes = [(LEAST_NUMEL // 256, 256), (LEAST_NUMEL // 256 - 1, 256), (LEAST_NUMEL,), (4032,)]
    optimizer = new(cls, "int8", torch.float32, shapes)
    take_steps(optimizer, 0)
    low = ["exp_avg_codes" in s or "momentum_buffer_codes" in s for s in optimizer.state.values()]
    assert low == [True, False, True, False]


@both
@pytest.mark.parametrize("form", ["bfloat16", "int8"])
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_memories_are_those_of_float32_but_for_their_rounding(cls, form, scope):
    low, exact = (new(cls, f, torch.float32, beta_scope=scope) for f in (form, "plain"))
    take_steps(low, 0)
    take_steps(exact, 0)
    for param, other in zip(parameters(low), parameters(exact), strict=True):
        for name, value in memories_of(low, param).items():
            wanted = exact.state[other][name].double()
            error = (value.double() - wanted).abs()
            if form == "bfloat16":
                assert (error <= wanted.abs() * 2**-7).all()
            else:  # a code's gap, of the largest in a block
                assert (error <= wanted.abs().max() * (1 - (254 / 255) ** 4)).all()
        assert torch.equal(param, other)  # of a first step


@both
def test_a_memory_in_bfloat16_moves_by_less_than_half_an_ulp(cls):
    param = Parameter(torch.zeros(64, 64))
    optimizer = cls([param], lr=0.0, state_dtype=torch.bfloat16, backend="reference")
    name = cls.memories[-1]
    param.grad = torch.full_like(param, 2.0)
    optimizer.step()
    start = optimizer.state[param][name].double().mean()
    param.grad = torch.full_like(param, 2.02)
    for _ in range(50):
        optimizer.step()
    after = optimizer.state[param][name].double()
    if cls is AMAdamW:
        kept = 0.999**50
        expected = start * kept + (1 - kept) * 2.02**2
        assert after.mean() == pytest.approx(expected.item(), rel=2e-3)
    assert after.mean() > start
    assert after.unique().numel() > 1


@both
def test_bfloat16_parameters_take_updates_of_less_than_half_an_ulp(cls):
    ends = {}
    for form, options in {
        "exact": {},
        "nearest": {},
        "stochastic": {"stochastic_rounding": True},
        "remainders": {"store_param_remainders": True},
        "both": {"stochastic_rounding": True, "store_param_remainders": True},
    }.items():
        dtype = torch.float32 if form == "exact" else torch.bfloat16
        param = Parameter(torch.ones(64, 64, dtype=dtype))
        optimizer = cls([param], lr=1e-4, weight_decay=0.0, backend="reference", **options)
        for _ in range(100):
            param.grad = torch.ones_like(param)
            optimizer.step()
        state = optimizer.state[param]
        value = formats.join(param, state["param_remainder"]) if "param_" in str(state) else param
        ends[form] = value.double().mean().item()
    assert ends["nearest"] == 1.0
    for form in ("stochastic", "remainders", "both"):
        assert ends[form] == pytest.approx(ends["exact"], abs=8e-4), form
    assert ends["both"] == pytest.approx(ends["exact"], abs=2e-5)


# ---- the same bits ------------------------------------------------------------------------


@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_a_seed_gives_its_bits(cls, form):
    one, same, other = (new(cls, form, seed=seed) for seed in (3, 3, 4))
    for optimizer in (one, same, other):
        take_steps(optimizer, 0, 1)
    ours = snapshot(one)
    assert ours == snapshot(same)
    assert [x for x in ours if x != snapshot(other)[ours.index(x)]]
    for param, own in zip(parameters(one), parameters(other), strict=True):
        low = {v for k, v in dtypes_of(one, param).items() if k != "param_remainder"}
        if low & {torch.bfloat16, torch.int8}:
            name = cls.memories[0] if form == "bfloat16" else f"{cls.memories[0]}_codes"
            assert not torch.equal(one.state[param][name], other.state[own][name])


@both
def test_bits_do_not_depend_on_groups_or_on_layouts(cls):
    whole = new(cls, "all")
    params = [Parameter(p.detach().contiguous()) for p in params_of(torch.bfloat16)]
    options = {"lr": 0.03, "weight_decay": 0.1, "seed": 3, "backend": "reference", **FORMATS["all"]}
    split = cls([{"params": params[:2]}, {"params": params[2:3]}], **options)
    split.add_param_group({"params": params[3:]})
    for step in range(2):
        take_steps(whole, step)
        for index, param in enumerate(params):
            grad = gradient(param.detach(), step, index=index)
            # As if the gradient's own layout were another one.
            param.grad = grad.t().contiguous().t() if grad.dim() == 2 else grad
        split.step()
    for param, other in zip(parameters(whole), params, strict=True):
        assert torch.equal(param, other)
        for name, value in whole.state[param].items():
            assert torch.equal(value, split.state[other][name]), name
    assert parameters(whole)[3].stride() != params[3].stride()


@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_idle_and_skipped_steps_leave_every_bit(cls, form):
    optimizer = new(cls, form, lr=0.0)
    for param in parameters(optimizer):
        param.grad = torch.zeros_like(param)
    start = [param.detach().clone() for param in parameters(optimizer)]
    optimizer.step()
    assert all(map(torch.equal, start, parameters(optimizer)))
    for state in optimizer.state.values():
        assert not any(value.any() for name, value in state.items() if name != "beta_prod")

    for group in optimizer.param_groups:
        group["lr"] = 0.03
    take_steps(optimizer, 0, 1)
    before = snapshot(optimizer)
    optimizer.found_inf = torch.ones(())
    take_steps(optimizer, 2)
    assert snapshot(optimizer) == before
    del optimizer.found_inf
    optimizer.skip_nonfinite = True
    parameters(optimizer)[0].grad[0, 0] = torch.inf
    optimizer.step()
    assert snapshot(optimizer) == before
    assert optimizer.skipped_steps == 2


def plain_twin(optimizer, params):
    """An optimizer of float32 parameters and state of the same values, rounded by none."""
    twin = type(optimizer)(params, lr=0.03, weight_decay=0.1, backend="reference")
    twin.load_state_dict(optimizer.state_dict())
    return twin


@both
@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize("remainder", [False, True])
@pytest.mark.parametrize("state_dtype", [torch.bfloat16, "int8"])
def test_what_is_stored_is_rounded_once_by_the_bits_of_its_place(
    cls, rounds, remainder, state_dtype
):
    options = {"stochastic_rounding": rounds, "store_param_remainders": remainder}
    shapes = [(64, 64), (20, 256)]
    low = new(cls, "plain", torch.bfloat16, shapes, state_dtype=state_dtype, **options)

    def is_nearly(ours, theirs):
        # What the twin was given of codes was rounded to float32.
        return (ours != theirs).float().mean() <= (0.002 if state_dtype == "int8" else 0.0)

    for step in range(3):
        values = [
            formats.join(p, low.state[p]["param_remainder"])
            if remainder and step > 0
            else p.detach().float()
            for p in parameters(low)
        ]
        twin = plain_twin(low, [Parameter(value.clone()) for value in values])
        take_steps(low, step)
        for param, other in zip(parameters(low), parameters(twin), strict=True):
            other.grad = param.grad.float()
        twin.step()
        pairs = zip(parameters(low), parameters(twin), strict=True)
        for index, (param, exact) in enumerate(pairs):
            keys = formats.step_keys(formats.tensor_key(3, index), step)
            places = torch.arange(param.numel())
            bits, own = (formats.random_bits(k, places).view(param.shape) for k in keys[:2])
            state = low.state[param]
            for name in cls.memories:
                value = twin.state[exact][name]
                given = bits >> 16 if name == "exp_avg_sq" else bits
                if state_dtype == torch.bfloat16:
                    assert torch.equal(state[name], formats.to_bfloat16(value, given))
                    continue
                codes, scales = (state[f"{name}_{part}"] for part in ("codes", "scales"))
                wanted = torch.zeros_like(codes), torch.zeros_like(scales)
                formats.encode(value, *wanted, given)
                torch.testing.assert_close(scales, wanted[1], rtol=1e-6, atol=0.0)
                assert is_nearly(codes, wanted[0])
            if remainder:
                wanted = formats.split(exact.detach(), own if rounds else None)
                assert is_nearly(param, wanted[0])
                assert is_nearly(state["param_remainder"], wanted[1])
            else:
                value = exact.detach()
                nearest = value.bfloat16()
                assert is_nearly(param, formats.to_bfloat16(value, own) if rounds else nearest)


# ---- changed between steps ----------------------------------------------------------------


@both
@pytest.mark.parametrize("before", FORMATS)
@pytest.mark.parametrize("after", FORMATS)
def test_options_may_change_between_steps(cls, before, after):
    optimizer = new(cls, before)
    take_steps(optimizer, 0)
    expected = new(cls, after)
    expected.load_state_dict(optimizer.state_dict())
    give(optimizer, after)
    for param, other in zip(parameters(optimizer), parameters(expected), strict=True):
        other.data.copy_(param)
    take_steps(optimizer, 1)
    take_steps(expected, 1)
    assert snapshot(optimizer) == snapshot(expected)
    for index, param in enumerate(parameters(optimizer)):
        assert dtypes_of(optimizer, param) == expected_dtypes(cls, after, index)


@both
def test_a_remainder_that_is_given_up_is_not_taken_up_again(cls):
    optimizer = new(cls, "remainders")
    take_steps(optimizer, 0)
    give(optimizer, "plain")
    take_steps(optimizer, 1)
    give(optimizer, "remainders")
    expected = new(cls, "remainders")
    expected.load_state_dict(optimizer.state_dict())
    for param, other in zip(parameters(optimizer), parameters(expected), strict=True):
        other.data.copy_(param)
    for own in (optimizer, expected):
        for group in own.param_groups:
            group["lr"] = 0.0
        take_steps(own, 2)
        assert not any(state["param_remainder"].any() for state in own.state.values())


@both
def test_options_that_change_after_a_load_or_a_copy_convert_too(cls):
    saved = new(cls, "bfloat16")
    take_steps(saved, 0)
    loaded, copied = new(cls, "bfloat16"), copy.deepcopy(saved)
    loaded.load_state_dict(saved.state_dict())
    for optimizer in (loaded, copied, pickle.loads(pickle.dumps(saved))):
        give(optimizer, "plain")
        take_steps(optimizer, 1)
        for param in parameters(optimizer):
            assert set(dtypes_of(optimizer, param).values()) == {torch.float32}


@both
def test_a_step_that_fails_leaves_the_formats_as_they_were(cls):
    for before, after in (("bfloat16", "plain"), ("all", "bfloat16"), ("plain", "int8")):
        optimizer = new(cls, before)
        take_steps(optimizer, 0)
        give(optimizer, after)
        contents = snapshot(optimizer)
        parameters(optimizer)[-1].grad = torch.zeros(64, dtype=torch.bfloat16).to_sparse()
        with pytest.raises(RuntimeError, match="sparse"):
            optimizer.step()
        assert snapshot(optimizer) == contents
        take_steps(optimizer, 1)
        for index, param in enumerate(parameters(optimizer)):
            assert dtypes_of(optimizer, param) == expected_dtypes(cls, after, index)


@both
def test_a_users_own_memory_of_another_dtype_stays_where_no_option_asks(cls):
    param = Parameter(torch.randn(64, 64))
    optimizer = cls([param], backend="reference")
    param.grad = torch.randn(64, 64)
    optimizer.step()
    name = cls.memories[0]
    optimizer.state[param][name] = optimizer.state[param][name].bfloat16()
    optimizer.step()
    assert optimizer.state[param][name].dtype == torch.bfloat16
    optimizer.param_groups[0]["state_dtype"] = "int8"
    optimizer.step()
    assert name not in optimizer.state[param]


# ---- checkpoints ------------------------------------------------------------------------


def through_a_file(state_dict):
    buffer = io.BytesIO()
    torch.save(state_dict, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@both
@each_low_format
def test_a_checkpoint_continues_with_the_same_bits(cls, form):
    optimizer = new(cls, form)
    take_steps(optimizer, 0, 1)
    state = through_a_file(optimizer.state_dict())
    assert all(type(v) is torch.Tensor for own in state["state"].values() for v in own.values())
    resumed = new(cls, form, seed=99)
    for param, other in zip(parameters(optimizer), parameters(resumed), strict=True):
        other.data.copy_(param)
    resumed.load_state_dict(state)
    assert snapshot(resumed) == snapshot(optimizer)
    take_steps(optimizer, 2, 3)
    take_steps(resumed, 2, 3)
    assert snapshot(resumed) == snapshot(optimizer)


@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_copies_and_pickles_continue_with_the_same_bits(cls, form):
    optimizer = new(cls, form)
    take_steps(optimizer, 0)
    copied, pickled = copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    for own in (optimizer, copied, pickled):
        take_steps(own, 1)
    assert snapshot(copied) == snapshot(optimizer)
    assert snapshot(pickled) == snapshot(optimizer)


@both
@pytest.mark.parametrize("saved", FORMATS)
@pytest.mark.parametrize("own", FORMATS)
def test_a_checkpoint_loads_into_any_format(cls, saved, own):
    source = new(cls, saved)
    take_steps(source, 0, 1)
    target = new(cls, own)
    target.load_state_dict(through_a_file(source.state_dict()))
    assert target.param_groups[0]["seed"] == 3
    for index, (param, other) in enumerate(
        zip(parameters(target), parameters(source), strict=True)
    ):
        assert dtypes_of(target, param) == expected_dtypes(cls, own, index)
        wanted = memories_of(source, other)
        for name, value in memories_of(target, param).items():
            known, value = wanted[name].double(), value.double()
            dtype = dtypes_of(target, param).get(name)
            if dtype == torch.float32:
                assert torch.equal(value, known.float().double())
            elif dtype == torch.bfloat16:
                assert torch.equal(value, known.bfloat16().double())
            elif FORMATS[saved].get("state_dtype") == "int8":
                assert torch.equal(value, known)
            else:
                blocks = target.state[param][f"{name}_scales"].numel()
                pairs = zip(value.reshape(blocks, -1), known.reshape(blocks, -1), strict=True)
                for block, known_block in pairs:
                    step = known_block.abs().max() * (1 - (254 / 255) ** 4)
                    assert ((block - known_block).abs() <= step).all()
                assert (value[known > 0] > 0).all() or name != "exp_avg_sq"
        for name in cls.scalars:
            assert torch.equal(target.state[param][name], source.state[other][name])
        if "param_remainder" in target.state[param]:
            remainder = source.state[other].get("param_remainder", torch.zeros(()))
            assert torch.equal(target.state[param]["param_remainder"], remainder.expand_as(param))
    take_steps(target, 2)


@both
@each_low_format
def test_torch_optims_state_loads_into_any_format(cls, form):
    other = torch.optim.AdamW if cls is AMAdamW else torch.optim.SGD
    options = {} if cls is AMAdamW else {"momentum": 0.9}
    source = other(params_of(), lr=0.01, **options)
    take_steps(source, 0, 1)
    target, exact = (new(cls, f, torch.float32) for f in (form, "plain"))
    for optimizer in (target, exact):
        optimizer.load_state_dict(source.state_dict())
    for index, (param, own) in enumerate(zip(parameters(target), parameters(exact), strict=True)):
        dtypes = expected_dtypes(cls, form, index)
        dtypes.pop("param_remainder", None)  # of float32 parameters
        assert dtypes_of(target, param) == dtypes
        for name, value in memories_of(target, param).items():
            wanted = exact.state[own][name].double()
            assert ((value.double() - wanted).abs() <= wanted.abs().max() * 0.016).all()
    take_steps(target, 2)


@both
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s, m: s.pop(f"{m}_scales"), TypeError, "_scales is a NoneType, not a tensor"),
        (lambda s, m: s.pop(f"{m}_codes"), TypeError, "_codes is a NoneType, not a tensor"),
        (lambda s, m: s.update({f"{m}_codes": [1]}), TypeError, "_codes is a list, not a tensor"),
        (lambda s, m: s.update({f"{m}_codes": s[f"{m}_codes"].float()}), ValueError, "float32"),
        (lambda s, m: s.update({f"{m}_codes": s[f"{m}_codes"][1:]}), ValueError, "of that shape"),
        (lambda s, m: s.update({f"{m}_scales": torch.ones(3)}), ValueError, "one for each block"),
        (lambda s, m: s.update({f"{m}_scales": s[f"{m}_scales"].double()}), ValueError, "float32"),
        (lambda s, m: s.update(param_remainder=torch.ones(2)), ValueError, "param_remainder"),
        (lambda s, m: s.update(param_remainder=3), TypeError, "param_remainder is a int"),
    ],
)
@pytest.mark.parametrize("own", ["all", "remainders"])
def test_state_that_does_not_fit_is_refused_and_changes_nothing(cls, change, error, message, own):
    source = new(cls, "all")
    take_steps(source, 0)
    state = source.state_dict()
    state["state"] = {key: dict(value) for key, value in state["state"].items()}
    change(state["state"][1], cls.memories[-1])
    target = new(cls, own)
    take_steps(target, 5)
    before = snapshot(target)
    with pytest.raises(error, match=message):
        target.load_state_dict(state)
    assert snapshot(target) == before


@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_get_and_set_optimizer_state_dict(cls, form):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64)).bfloat16()

    first, second = model(), model()
    optimizer, resumed = (
        cls(m.parameters(), backend="reference", **FORMATS[form]) for m in (first, second)
    )
    take_steps(optimizer, 0, 1)
    second.load_state_dict(first.state_dict())
    set_optimizer_state_dict(second, resumed, get_optimizer_state_dict(first, optimizer))
    take_steps(optimizer, 2)
    take_steps(resumed, 2)
    assert snapshot(resumed) == snapshot(optimizer)


@both
def test_checkpoints_from_before_these_options_load(cls):
    source = new(cls, "plain")
    take_steps(source, 0)
    state = source.state_dict()
    names = ("state_dtype", "stochastic_rounding", "store_param_remainders", "seed")
    for group in state["param_groups"]:
        for name in names:
            del group[name]
    target = new(cls, "int8")
    target.load_state_dict(state)
    assert target.param_groups[0]["state_dtype"] == "int8"
    assert target.param_groups[0]["seed"] == 3
    take_steps(target, 1)


# ---- options ------------------------------------------------------------------------------


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"state_dtype": torch.float16}, r"Invalid state_dtype: torch.float16 \(None, torch.bf"),
        ({"state_dtype": "int4"}, "Invalid state_dtype: 'int4'"),
        ({"state_dtype": torch.int32}, "Invalid state_dtype"),
        ({"stochastic_rounding": 1}, r"Invalid stochastic_rounding: 1 \(True or False\)"),
        ({"store_param_remainders": None}, "Invalid store_param_remainders: None"),
        ({"seed": -1}, r"Invalid seed: -1 \(an integer in \[0, 2\*\*63\)\)"),
        ({"seed": 2**63}, "Invalid seed"),
        ({"seed": 1.0}, "Invalid seed"),
        ({"seed": True}, "Invalid seed"),
    ],
)
def test_bad_options_are_refused(cls, options, message):
    param = Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match=message):
        cls([param], **options)
    optimizer = cls([param], backend="reference")
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(1))], **options})
    optimizer.param_groups[0].update(options)
    param.grad = torch.ones(2, 2)
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@both
def test_a_seed_may_be_numpys(cls):
    np = pytest.importorskip("numpy")
    ours, theirs, changed = (new(cls, "all", seed=seed) for seed in (2**62, np.int64(2**62), 0))
    assert type(theirs.param_groups[0]["seed"]) is int
    changed.param_groups[0]["seed"] = np.int64(2**62)
    for optimizer in (ours, theirs, changed):
        take_steps(optimizer, 0)
    assert snapshot(ours) == snapshot(theirs) == snapshot(changed)


@both
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.complex64, torch.complex128])
def test_a_state_dtype_is_for_float32_and_bfloat16_parameters(cls, dtype):
    param = Parameter(torch.zeros(64, 64, dtype=dtype))
    options = {"backend": "reference", "state_dtype": "int8"}
    with pytest.raises(TypeError, match="is for float32 and bfloat16 parameters"):
        cls([param], **options)
    param.requires_grad_(False)  # a frozen one may be of any dtype, while it is frozen
    other = Parameter(torch.zeros(64, 64))
    optimizer = cls([param, other], **options)
    other.grad = torch.ones(64, 64)
    optimizer.step()
    assert param not in optimizer.state
    param.requires_grad_(True).grad = torch.ones(64, 64, dtype=dtype)
    with pytest.raises(TypeError, match="is for float32 and bfloat16 parameters"):
        optimizer.step()
    assert param not in optimizer.state
    # A group of its own, and options that are about bfloat16 parameters alone.
    options = {"stochastic_rounding": True, "store_param_remainders": True, "backend": "reference"}
    optimizer = cls([param], **options)
    optimizer.step()
    assert "param_remainder" not in optimizer.state[param]


@both
@pytest.mark.parametrize("form", ["int8", "remainders"])
@pytest.mark.parametrize("choice", [{"foreach": True}, {"backend": "foreach"}])
def test_foreach_refuses(cls, form, choice):
    options = {**FORMATS[form], **choice}
    with pytest.raises(RuntimeError, match="are not for the foreach backend, but for"):
        cls([Parameter(torch.zeros(2, 2))], **options)
    param = Parameter(torch.zeros(2, 2))
    optimizer = cls([param], **choice)
    optimizer.param_groups[0].update(FORMATS[form])
    param.grad = torch.ones(2, 2)
    with pytest.raises(RuntimeError, match="are not for the foreach backend, but for"):
        optimizer.step()


@both
def test_groups_have_options_of_their_own(cls):
    params = params_of(torch.bfloat16, [(64, 64)] * 4)
    options = [{}, FORMATS["int8"], {"state_dtype": torch.bfloat16}, FORMATS["all"]]
    groups = [{"params": [p], **own} for p, own in zip(params, options, strict=True)]
    optimizer = cls(groups, backend="reference", max_grad_norm=1.0)
    take_steps(optimizer, 0, 1)
    kinds = [set(dtypes_of(optimizer, param).values()) for param in params]
    codes = {torch.int8, torch.uint8} if cls is AMAdamW else {torch.int8}
    assert kinds == [{torch.float32}, codes, {torch.bfloat16}, codes]
    assert "state_dtype: int8" in repr(optimizer)
    assert optimizer.param_groups[2]["state_dtype"] == "bfloat16"
    alone = cls([params_of(torch.bfloat16, [(64, 64)] * 4)[0]], backend="reference")
    assert alone.param_groups[0]["state_dtype"] is None


@both
def test_param_groups_pass_options_on(cls):
    model = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64))
    groups = param_groups(model, 0.1, modules={torch.nn.Embedding: {"state_dtype": torch.bfloat16}})
    optimizer = cls(groups, backend="reference", state_dtype="int8")
    take_steps(optimizer, 0)
    assert set(dtypes_of(optimizer, model[0].weight).values()) == {torch.bfloat16}
    assert torch.int8 in dtypes_of(optimizer, model[1].weight).values()
    assert set(dtypes_of(optimizer, model[1].bias).values()) == {torch.float32}
    betas = optimizer.betas_by_name()
    assert betas.keys() == dict(model.named_parameters()).keys()


@both
def test_metrics_and_betas_are_those_of_the_steps(cls):
    low, exact = (new(cls, form, torch.float32) for form in ("bfloat16", "plain"))
    for optimizer in (low, exact):
        optimizer.max_grad_norm = 10.0
        take_steps(optimizer, 0, 1, 2)
    ours, theirs = low.metrics(), exact.metrics()
    assert ours.keys() == theirs.keys()
    assert torch.equal(ours["grad_norm"], theirs["grad_norm"])
    assert ours["beta_mean"] == pytest.approx(theirs["beta_mean"].item(), abs=0.02)


# ---- in a training ------------------------------------------------------------------------


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 64)).bfloat16()


@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_released_gradients_take_the_same_bits(cls, form):
    ours, theirs = small_model(), small_model()
    optimizers = [
        cls(model.parameters(), backend="reference", beta_scope="row", **FORMATS[form])
        for model in (ours, theirs)
    ]
    release_gradients(ours, optimizers[0])
    for step in range(3):
        x = gradient(torch.empty(8, 128, dtype=torch.bfloat16), step)
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert snapshot(optimizers[0]) == snapshot(optimizers[1])


@both
def test_a_released_parameters_options_may_change(cls):
    model = small_model()
    options = {"backend": "reference", "beta_scope": "tensor", **FORMATS["bfloat16"]}
    optimizer = cls(model.parameters(), **options)
    release_gradients(model, optimizer)
    for form in ("bfloat16", "plain", "all", "plain"):
        give(optimizer, form)
        model(torch.ones(2, 128, dtype=torch.bfloat16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kinds = set(dtypes_of(optimizer, model[0].weight).values())
        assert (kinds == {torch.float32}) == (form == "plain")


@both
def test_a_scaler_unscales_and_skips(cls):
    optimizers = [new(cls, "all") for _ in range(2)]
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))
    for step in range(3):
        for scale, optimizer in zip((8.0, 1.0), optimizers, strict=True):
            for index, param in enumerate(parameters(optimizer)):
                param.grad = scale * gradient(param.detach(), step, index=index)
        if step == 1:
            parameters(optimizers[0])[0].grad[0, 0] = torch.nan
        scaler.step(optimizers[0])
        scaler.update(8.0)
        if step != 1:
            optimizers[1].step()
    assert snapshot(optimizers[0]) == snapshot(optimizers[1])


@both
def test_what_a_step_writes_to_is_newer_after_it(cls):
    optimizer = new(cls, "all")
    take_steps(optimizer, 0)
    before = {
        (i, name): value._version
        for i, param in enumerate(parameters(optimizer))
        for name, value in {"param": param, **optimizer.state[param]}.items()
    }
    take_steps(optimizer, 1)
    for i, param in enumerate(parameters(optimizer)):
        for name, value in {"param": param, **optimizer.state[param]}.items():
            assert value._version > before[i, name], (i, name)


@both
def test_a_bad_gradient_is_refused_and_changes_nothing(cls):
    optimizer = new(cls, "all", torch.float32)
    take_steps(optimizer, 0)
    before = snapshot(optimizer)
    param = parameters(optimizer)[0]
    param.grad_dtype = None
    param.grad = param.grad.double()
    with pytest.raises(TypeError, match=r"grad of tensor 0 is torch\.float64"):
        optimizer.step()
    assert snapshot(optimizer) == before


@both
def test_a_nan_stays_and_takes_its_block_with_it(cls):
    optimizer = new(cls, "int8", torch.float32, [(16, 512)], beta_scope="row")
    take_steps(optimizer, 0)
    param = parameters(optimizer)[0]
    optimizer.state[param][f"{cls.memories[0]}_scales"][3, 1] = math.nan
    take_steps(optimizer, 1)
    value = memories_of(optimizer, param)[cls.memories[0]]
    assert value[3].isnan().all()  # beta is the row's
    assert value[[0, 1, 2, *range(4, 16)]].isfinite().all()


@both
def test_a_parameter_that_is_set_between_steps_is_what_it_was_set_to(cls):
    optimizer = new(cls, "remainders", torch.bfloat16, [(64, 64)])
    take_steps(optimizer, 0, 1)
    param = parameters(optimizer)[0]
    assert (optimizer.state[param]["param_remainder"] < 0).any()
    with torch.no_grad():
        param.zero_()
    take_steps(optimizer, 2)
    assert param.isfinite().all()
    assert param.abs().max() < 0.2


@both
def test_parameters_that_are_made_later(cls):
    """On the meta device when the optimizer is made, as deferred initialization does."""
    with torch.device("meta"):
        model = nn.Linear(128, 64, dtype=torch.bfloat16)
    optimizer = cls(model.parameters(), backend="reference", **FORMATS["all"])
    assert not optimizer.state
    values = small_model()[0]
    for name, param in list(model.named_parameters()):
        torch.utils.swap_tensors(param, Parameter(getattr(values, name).detach().clone()))
    other = cls(values.parameters(), backend="reference", **FORMATS["all"])
    take_steps(optimizer, 0)
    take_steps(other, 0)
    assert snapshot(optimizer) == snapshot(other)


@both
@pytest.mark.parametrize("empty", [(0, 256), (0,)])
def test_parameters_without_elements(cls, empty):
    optimizer = new(cls, "all", shapes=[empty, (20, 256)])
    take_steps(optimizer, 0, 1)
    alone = new(cls, "all", shapes=[(20, 256)])
    assert optimizer.state[parameters(optimizer)[0]].keys() > {"param_remainder"}
    assert not alone.state


@both
@pytest.mark.parametrize("form", ["remainders", "all"])
def test_a_parameter_of_another_dtype_takes_what_is_for_it(cls, form):
    optimizer = new(cls, form, torch.float32, [(20, 256), (64,)])
    take_steps(optimizer, 0, 1)
    for param in parameters(optimizer):
        param.grad = None
        param.data = param.data.bfloat16()
    resumed = copy.deepcopy(optimizer)
    for own in (optimizer, resumed):
        take_steps(own, 2, 3)
    assert snapshot(optimizer) == snapshot(resumed)
    state = optimizer.state[parameters(optimizer)[0]]
    assert state["param_remainder"].dtype == torch.int8
    assert state["param_remainder"].any()


@both
def test_a_place_that_moves_gives_its_bits_at_once(cls):
    """As it does after a checkpoint."""
    groups = [{"params": params_of(shapes=[(20, 256)] * 2), **own} for own in ({}, FORMATS["all"])]
    optimizer = cls(groups, lr=0.03, backend="reference")
    take_steps(optimizer, 0, 1)
    del optimizer.param_groups[0]["params"][0]
    resumed = copy.deepcopy(optimizer)
    for own in (optimizer, resumed):
        take_steps(own, 2)
    assert snapshot(optimizer) == snapshot(resumed)


@both
@each_format
def test_a_parameter_that_is_replaced_is_let_go(cls, form):
    optimizer = new(cls, form, shapes=[(20, 256), (64,)])
    (group,) = optimizer.param_groups
    take_steps(optimizer, 0, 1)
    old = weakref.ref(group["params"][0])
    state = optimizer.state.pop(old())
    group["params"][0] = Parameter(torch.ones(20, 256, dtype=torch.bfloat16))
    optimizer.state[group["params"][0]] = state
    take_steps(optimizer, 2, 3)
    gc.collect()
    assert old() is None


# ---- compiled steps -----------------------------------------------------------------------


def two_of(cls, groups, **options):
    for _ in range(2):
        own = [{"params": params_of(shapes=shapes), **given} for shapes, given in groups]
        yield cls(own, lr=0.03, backend="cpu", **options)


@both
def test_a_compiled_step_has_groups_with_and_without_options(cls):
    groups = [([(20, 256), (64,)], FORMATS["all"]), ([(33, 128), (64,)], {})]
    torch._dynamo.reset()
    compiled, plain = two_of(cls, groups)
    step = torch.compile(compiled.step, backend="eager")
    for index in range(3):
        take_steps(plain, index)
        set_gradients(compiled, index)
        step()
    assert snapshot(compiled) == snapshot(plain)


@both
def test_compiled_steps_of_several_seeds(cls):
    torch._dynamo.reset()
    for seed in (1, 2, 3):
        compiled, plain = two_of(cls, [([(20, 256)], FORMATS["all"])], seed=seed)
        take_steps(plain, 0)
        set_gradients(compiled, 0)
        torch.compile(compiled.step, backend="eager")()
        assert snapshot(compiled) == snapshot(plain)


@both
def test_options_may_change_between_compiled_steps(cls):
    torch._dynamo.reset()
    compiled, plain = two_of(cls, [([(20, 256), (64,)], FORMATS["all"])])
    step = torch.compile(compiled.step, backend="eager")
    for index, form in enumerate(["all", "bfloat16", "plain", "int8"]):
        for optimizer in (compiled, plain):
            give(optimizer, form)
        take_steps(plain, index)
        set_gradients(compiled, index)
        step()
        assert snapshot(compiled) == snapshot(plain)


@both
def test_a_step_of_fake_tensors(cls):
    """As tools that estimate memory take it."""
    with FakeTensorMode():
        rounded = [Parameter(torch.ones(64, 128, dtype=torch.bfloat16).t())]
        small = [Parameter(torch.ones(64))]
        groups = [
            {"params": rounded, "stochastic_rounding": True},
            {"params": small, "state_dtype": "int8"},
            {"params": [Parameter(torch.ones(64))]},
        ]
        optimizer = cls(groups, backend="cpu")
        for _ in range(2):
            for param in parameters(optimizer):
                param.grad = torch.ones_like(param)
            optimizer.step()
    assert all(map(optimizer.state.get, parameters(optimizer)))
