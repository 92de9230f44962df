"""State that is not the optimizer's own, and its own where a user has set it, whole or in part."""

import io
import pickle
import re
from copy import deepcopy
from pathlib import Path

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
)
from snapshot import snapshot
from torch.nn import Parameter

from adamem_fused import AMSGD, AMAdamW

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", backends())
# As users put them beside the parameters' state.
ENTRIES = {
    "epoch": 3,
    "empty": {},
    "nothing": None,
    "list": [],
    "false": False,
    "tensor": torch.tensor([1.0, 2.0]),
    ("a", "tuple"): "text",
    "nested": {"values": [torch.tensor(1, dtype=torch.int64)]},
}


def stepped(cls, steps=2, dtype=torch.float32, **options):
    groups = [Group([(3, 20), ()], dtype), Group([(4,)], dtype, {"weight_decay": 0.1})]
    return train(make_optimizer(cls, groups, **options), steps)


def train(optimizer, steps, start=0):
    for step in range(start, start + steps):
        set_gradients(optimizer, step=step)
        optimizer.step(lambda step=step: 1 / (step + 1))
    return optimizer


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file)


def load(optimizer):
    loaded = stepped(type(optimizer), steps=0, dtype=parameters(optimizer)[0].dtype)
    loaded.load_state_dict(through_a_file(optimizer.state_dict()))
    for ours, theirs in zip(parameters(loaded), parameters(optimizer), strict=True):
        ours.data.copy_(theirs.data)
    return loaded


ways = pytest.mark.parametrize(
    "way",
    [load, deepcopy, lambda optimizer: pickle.loads(pickle.dumps(optimizer))],
    ids=["load_state_dict", "deepcopy", "pickle"],
)


def assert_equal(actual, expected):
    """Of one type, and tensors of one dtype and equal bit for bit."""
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_equal(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            assert_equal(a, b)
    else:
        assert actual == expected


def only_own(optimizer):
    """Drops the entries that are no parameter's."""
    for key in list(optimizer.state):
        if not isinstance(key, torch.Tensor):
            del optimizer.state[key]
    return optimizer


# ---- beside the parameters' state ---------------------------------------------------


@both
@ways
@pytest.mark.parametrize("steps", [0, 2])
def test_entries_that_are_no_parameters_go_wherever_the_state_goes(cls, way, steps):
    optimizer = stepped(cls, steps)
    optimizer.state.update(deepcopy(ENTRIES))
    other = way(optimizer)
    for each in (optimizer, other):
        train(each, 2, start=steps)
        assert_equal({k: v for k, v in each.state.items() if k in ENTRIES}, ENTRIES)
    assert_same_bits(only_own(other), only_own(optimizer))


@both
@every_backend
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_that_raises_leaves_every_entry(cls, backend, steps):
    optimizer = stepped(cls, steps, backend=backend)
    first, second, third = parameters(optimizer)
    optimizer.state.update(deepcopy(ENTRIES))
    if steps == 0:
        optimizer.state[first] = {}
        optimizer.state[second] = {"mine": 0}
    before = dict(optimizer.state)
    contents = deepcopy(list(optimizer.state.values()))
    set_gradients(optimizer, step=steps)
    third.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    assert list(optimizer.state) == list(before)
    assert all(optimizer.state[key] is value for key, value in before.items())
    assert_equal(list(optimizer.state.values()), contents)


@both
@pytest.mark.parametrize("gap", ["gradient", "loss"])
def test_a_parameter_without_a_gradient_gets_no_state(cls, gap):
    optimizer = stepped(cls, 0, gap=gap, beta_scope="global")
    first, _, third = parameters(optimizer)
    set_gradients(optimizer, step=0, skip=[1, 2])
    optimizer.step(lambda: 1.0)
    assert list(optimizer.state) == [first]
    # Nor the first, where the loss is kept, by a step that raises.
    optimizer.state.clear()
    set_gradients(optimizer, step=0, skip=[0, 1])
    third.grad = torch.ones(4).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step(lambda: 1.0)
    assert len(optimizer.state) == 0


# ---- within a parameter's state -----------------------------------------------------


MINE = {
    "number": 3,
    "text": "abc",
    "nothing": None,
    "other shape": torch.arange(7.0, dtype=torch.float64) / 3,
    "nested": {"deep": {"er": [torch.tensor([1 / 3]), (torch.tensor(2**40), "x")]}},
}


@both
@ways
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("steps", [0, 2])
def test_the_users_own_values_go_wherever_the_state_goes(cls, way, dtype, steps):
    optimizer = stepped(cls, steps, dtype)
    for param in parameters(optimizer):
        optimizer.state[param].update(deepcopy(MINE))
    other = way(optimizer)
    for param in parameters(train(other, 1, start=steps)):
        assert_equal({name: other.state[param][name] for name in MINE}, MINE)


@both
def test_loading_copies_the_users_own_tensors(cls):
    optimizer = stepped(cls)
    param = parameters(optimizer)[0]
    optimizer.state[param].update(deepcopy(MINE))
    saved = optimizer.state_dict()
    optimizer.load_state_dict(saved)
    saved["state"][0]["nested"]["deep"]["er"][0].zero_()
    saved["state"][0]["other shape"].zero_()
    assert_equal({name: optimizer.state[param][name] for name in MINE}, MINE)


@both
@every_backend
@pytest.mark.parametrize("value", [3, None, [], torch.ones(2)], ids=str)
def test_a_parameters_state_that_is_no_dict(cls, backend, value):
    """Whoever has no gradient may have any; a step needs a dict."""
    optimizer = stepped(cls, backend=backend)
    last = parameters(optimizer)[-1]
    optimizer.state[last] = value
    for each in (load(optimizer), deepcopy(optimizer), optimizer):
        assert_equal(each.state[parameters(each)[-1]], value)
        set_gradients(each, step=2, skip=[2])
        each.step()
    set_gradients(optimizer, step=3)
    before = snapshot_of_all(optimizer)
    with pytest.raises(TypeError, match=rf"shape \[4\] is a {type(value).__name__}; .* a dict"):
        optimizer.step()
    assert_equal(snapshot_of_all(optimizer), before)


def snapshot_of_all(optimizer):
    return deepcopy([parameters(optimizer), list(optimizer.state.values())])


# ---- loading ------------------------------------------------------------------------


def no_memory(monkeypatch, saved):
    """For the last parameter's memory."""
    empty_like = torch.empty_like

    def empty(tensor, **options):
        if tensor.shape == (4,):
            raise torch.OutOfMemoryError("no memory today")
        return empty_like(tensor, **options)

    monkeypatch.setattr(torch, "empty_like", empty)
    return torch.OutOfMemoryError


def no_data(monkeypatch, saved):
    name = "exp_avg" if "exp_avg" in saved["state"][2] else "momentum_buffer"
    saved["state"][2][name] = saved["state"][2][name].to("meta")
    return NotImplementedError


def wrong_shape(monkeypatch, saved):
    saved["state"][2]["step"] = torch.zeros(3)
    return ValueError


def no_state(monkeypatch, saved):
    del saved["state"]
    return KeyError


@both
@pytest.mark.parametrize("fail", [no_memory, no_data, wrong_shape, no_state])
def test_a_load_that_fails_has_changed_nothing(cls, fail, monkeypatch):
    saved = deepcopy(stepped(cls, steps=3, lr=0.5).state_dict())
    saved["state"]["epoch"] = 4
    optimizer = stepped(cls)
    optimizer.state["epoch"] = 3
    before, state, groups = snapshot(optimizer), optimizer.state, optimizer.param_groups
    contents = dict(state)
    with monkeypatch.context() as patch, pytest.raises(fail(patch, saved)):
        optimizer.load_state_dict(saved)
    assert optimizer.state is state and optimizer.param_groups is groups
    assert all(state[key] is value for key, value in contents.items())
    assert snapshot(optimizer) == before


@both
def test_hooks_see_and_change_what_is_saved_and_loaded(cls):
    def save(optimizer, state_dict):
        state_dict["state"]["epoch"] = 5

    def rename(optimizer, state_dict):
        state = dict(state_dict["state"])
        state["age"] = state.pop("epoch")
        return {**state_dict, "state": state}

    optimizer, loaded = stepped(cls), stepped(cls, steps=0)
    optimizer.register_state_dict_post_hook(save)
    loaded.register_load_state_dict_pre_hook(rename)
    loaded.load_state_dict(optimizer.state_dict())
    assert loaded.state["age"] == 5 and "epoch" not in loaded.state
    del loaded.state["age"]
    train(loaded, 1)


# ---- the optimizer's own, set by a user -----------------------------------------------


COUNTERPARTS = {
    AMAdamW: (torch.optim.AdamW, {}),
    AMSGD: (torch.optim.SGD, {"momentum": 0.9}),
}


@both
@every_backend
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_state_set_as_torchs_optimizer_has_it_is_as_if_it_were_loaded(cls, backend, tensor_lr):
    theirs_cls, theirs_options = COUNTERPARTS[cls]
    lr = torch.tensor(0.05) if tensor_lr else 0.05
    options = {"lr": lr, "weight_decay": 0.1}
    theirs = train(make_optimizer_of(theirs_cls, foreach=False, **options, **theirs_options), 3)
    loaded = make_optimizer_of(cls, backend=backend, **options)
    loaded.load_state_dict(theirs.state_dict())
    own = make_optimizer_of(cls, backend=backend, **options)
    if cls is AMAdamW:
        own.param_groups[0]["betas"] = theirs.param_groups[0]["betas"]
    for param, other in zip(parameters(own), parameters(theirs), strict=True):
        own.state[param] = {name: value.clone() for name, value in theirs.state[other].items()}
    for step in range(3, 6):
        for each in (loaded, own):
            for param, other in zip(parameters(each), parameters(theirs), strict=True):
                param.data.copy_(other.data) if step == 3 else None
        train(loaded, 1, start=step)
        train(own, 1, start=step)
        for ours, expected in zip(parameters(own), parameters(loaded), strict=True):
            assert torch.equal(ours, expected)
            for name in (*cls.memories, "step", "prev_lr"):
                assert torch.equal(own.state[ours][name], loaded.state[expected][name]), name
    assert lr == 0.05


def make_optimizer_of(cls, **options):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]
    return cls(params, **options)


def zeros(param, names):
    return {name: torch.zeros_like(param, dtype=torch.float32) for name in names}


@both
@every_backend
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_step", [False, True])
def test_zeros_and_step_0_are_a_beginning(cls, backend, scope, dtype, with_step):
    """For AMSGD zeros alone are one too, as a momentum_buffer of None is."""
    optimizer, expected = (
        stepped(cls, 0, dtype, backend=backend, beta_scope=scope) for _ in range(2)
    )
    for i, param in enumerate(parameters(optimizer)):
        state = optimizer.state[param] = zeros(param, cls.memories)
        if with_step or cls is AMAdamW:
            state["step"] = torch.tensor(0.0)
        elif i == 1:
            state["momentum_buffer"] = None
        state["mine"] = 1
    for step in range(3):
        for each in (optimizer, expected):
            train(each, 1, start=step)
        for param in parameters(optimizer):
            assert optimizer.state[param].pop("mine") == 1
        assert_same_bits(optimizer, expected)
        for param in parameters(optimizer):
            optimizer.state[param]["mine"] = 1


@both
@every_backend
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_a_scalar_that_is_taken_out_is_made_up(cls, backend, scope):
    for name in cls.scalars:
        optimizer = stepped(cls, backend=backend, beta_scope=scope)
        param = parameters(optimizer)[0]
        del optimizer.state[param][name]
        if name == "step" and cls is AMAdamW:
            before = snapshot(optimizer)
            with pytest.raises(ValueError, match="state has no step"):
                optimizer.step()
            assert snapshot(optimizer) == before
            continue
        optimizer.step()
        assert optimizer.state[param].keys() == {*cls.memories, *cls.scalars}
        assert optimizer.state[param]["step"] == (2 if name == "step" else 3)
        for row_name in cls.row_scalars:
            shape = (3,) if scope == "row" else ()
            assert optimizer.state[param][row_name].shape == shape


def other_names(names):
    return [pytest.param(cls, name, id=f"{cls.__name__}-{name}") for cls, name in names]


@every_backend
@pytest.mark.parametrize(
    ("cls", "names", "message"),
    [
        (AMAdamW, ["exp_avg_sq"], r"has exp_avg_sq and no exp_avg;"),
        (AMAdamW, ["step"], r"has step and no exp_avg, exp_avg_sq;"),
        (AMAdamW, ["step", "exp_avg"], r"has exp_avg, step and no exp_avg_sq;"),
        (AMAdamW, ["exp_avg", "exp_avg_sq"], r"state has no step"),
        (AMSGD, ["step"], r"has step and no momentum_buffer;"),
        (AMSGD, ["prev_lr", "beta"], r"has prev_lr, beta and no momentum_buffer;"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_too_little_to_go_by_is_an_error(backend, cls, names, message, steps):
    optimizer = stepped(cls, steps, backend=backend)
    last = parameters(optimizer)[-1]
    whole = stepped(cls)
    kept = whole.state[parameters(whole)[-1]]
    optimizer.state[last] = {name: kept[name] for name in names}
    set_gradients(optimizer, step=steps)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert snapshot(optimizer) == before


@both
@every_backend
@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (torch.zeros(3), ValueError, r"has shape \[3\], its parameter \[4\]"),
        (torch.zeros(4, dtype=torch.int64), TypeError, "has to be a dense real"),
        (torch.zeros(4).to_sparse(), (TypeError, NotImplementedError), "(?i)sparse"),
        (torch.zeros(4, device="meta"), ValueError, "is on meta"),
        ([0.0] * 4, TypeError, "has to be a tensor, not list"),
    ],
    ids=["shape", "dtype", "layout", "device", "list"],
)
@pytest.mark.parametrize("whole", [True, False])
def test_a_memory_that_is_wrong_is_an_error(cls, backend, wrong, error, message, whole):
    optimizer = stepped(cls, backend=backend)
    last = parameters(optimizer)[-1]
    state = optimizer.state[last]
    state[cls.memories[-1]] = wrong
    if not whole:
        del state["prev_lr"]
    set_gradients(optimizer, step=2)
    names = list(state)
    before = snapshot_without(optimizer, last)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert list(state) == names and optimizer.state[last] is state
    assert snapshot_without(optimizer, last) == before


def snapshot_without(optimizer, param):
    """A snapshot, but for this parameter's memories, which may be of any kind."""
    state = optimizer.state[param]
    kept = {name: state.pop(name) for name in optimizer.memories}
    result = snapshot(optimizer)
    rest = dict(state)
    state.clear()
    state.update({name: (kept | rest)[name] for name in (*kept, *rest)})
    return result


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["foreach", "reference"])
def test_a_scalar_of_one_dimension_is_refused_before_anything_has_changed(cls, backend):
    for name in ("step", "prev_lr"):
        param = torch.nn.Parameter(torch.ones(3))
        param.grad = torch.ones(3)
        optimizer = cls([param], backend=backend)
        optimizer.step()
        optimizer.state[param][name] = optimizer.state[param][name].reshape(1)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match="0-dim"):
            optimizer.step()
        assert snapshot(optimizer) == before


@both
@every_backend
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_one_number_of_any_shape_is_a_beta(cls, backend, scope):
    """As a checkpoint may have it: of each row, where these have theirs."""
    for name in cls.row_scalars:
        optimizer, expected = (stepped(cls, backend=backend, beta_scope=scope) for _ in "ab")
        for each, shape in ((optimizer, (1, 1)), (expected, ())):
            for param in parameters(each):
                each.state[param][name] = torch.full(shape, 0.25)
        train(optimizer, 1, start=2)
        train(expected, 1, start=2)
        assert_same_bits(optimizer, expected)


@both
@every_backend
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("shape", [(2,), (4,), (20,), (3, 1), (3, 20), (0,)])
def test_betas_of_neither_one_a_row_nor_one_are_refused(cls, backend, scope, shape):
    for name in cls.row_scalars:
        optimizer = stepped(cls, backend=backend, beta_scope=scope)
        param = parameters(optimizer)[0]
        optimizer.state[param][name] = torch.zeros(shape)
        set_gradients(optimizer, step=2)
        before = snapshot(optimizer)
        with pytest.raises(ValueError, match=rf"{name} has shape .* it has to be \[\] or \[3\]"):
            optimizer.step()
        assert snapshot(optimizer) == before


@every_backend
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_betas_of_a_vectors_elements_are_refused(backend, scope):
    """It has one, whatever the scope."""
    optimizer = stepped(AMAdamW, backend=backend, beta_scope=scope)
    vector = parameters(optimizer)[-1]
    optimizer.state[vector]["beta"] = torch.zeros(4)
    set_gradients(optimizer, step=2)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"beta has shape \[4\]; .* it has to be \[\]"):
        optimizer.step()
    assert snapshot(optimizer) == before


# ---- rows taken out of a parameter and added to it ------------------------------------


def replace_parameter():
    """docs/trainers.md's."""
    page = (Path(__file__).parent.parent / "docs" / "trainers.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (block,) = [block for block in blocks if "def replace_parameter" in block]
    names = {}
    exec(block, names)
    return names["replace_parameter"]


@both
@every_backend
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_rows_are_taken_out_and_added_as_the_documents_do(cls, backend, scope):
    replace = replace_parameter()
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8, 20, generator=generator)
    param = Parameter(torch.randn(8, 20, generator=generator))
    optimizer = cls([param], backend=backend, beta_scope=scope)

    def step(param, grad):
        param.grad = grad.clone()
        optimizer.step()

    for _ in range(2):
        step(param, grad)
    kept = torch.tensor([True, False] * 4)
    before = deepcopy(optimizer.state[param])
    fewer = Parameter(param.detach()[kept])
    replace(optimizer, param, fewer, lambda entry: entry[kept])
    assert list(optimizer.state) == [fewer]
    for name, value in optimizer.state[fewer].items():
        assert torch.equal(value, before[name][kept] if before[name].dim() else before[name])
    step(fewer, grad[kept])
    more = Parameter(torch.cat([fewer.detach(), torch.zeros(2, 20)]))
    replace(
        optimizer,
        fewer,
        more,
        lambda entry: torch.cat([entry, entry.new_zeros(2, *entry.shape[1:])]),
    )
    step(more, torch.cat([grad[kept], torch.ones(2, 20)]))
    assert optimizer.state[more]["step"] == 4
    assert more.isfinite().all() and more[4:].ne(0).all()
