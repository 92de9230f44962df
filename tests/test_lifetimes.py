"""An optimizer keeps nothing alive that its state and its parameter groups do not hold."""

import pickle
import weakref
from copy import deepcopy

import pytest
import torch
from cases import OPTIMIZERS, Group, backends, make_optimizer, parameters, set_gradients

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", backends())
options = pytest.mark.parametrize(
    "options", [{}, {"beta_scope": "global", "gap": "loss"}, {"lr": torch.tensor(0.1)}]
)


def stepped(cls, backend=None, steps=2, dtype=torch.float32, **options):
    groups = [Group([(3, 2), ()], dtype), Group([(4,)], dtype, {"weight_decay": 0.1})]
    optimizer = make_optimizer(cls, groups, backend, **options)
    for step in range(steps):
        set_gradients(optimizer, step=step)
        optimizer.step(lambda step=step: 1 / (step + 1))
    return optimizer


def references(tensors):
    return [weakref.ref(tensor) for tensor in tensors]


def state_of(optimizer):
    return references(value for state in optimizer.state.values() for value in state.values())


def alive(references):
    return [reference() for reference in references if reference() is not None]


@both
@every_backend
@options
@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_state_that_is_cleared_is_free(cls, backend, options, steps, dtype):
    optimizer = stepped(cls, backend, steps, dtype, **options)
    state = state_of(optimizer)
    optimizer.state.clear()
    assert alive(state) == []


@both
@every_backend
@pytest.mark.parametrize("steps", [1, 2])
def test_state_that_is_replaced_is_free(cls, backend, steps):
    optimizer = stepped(cls, backend, steps)
    for one_by_one in (True, False):
        state = state_of(optimizer)
        for param, values in optimizer.state.items():
            copies = {name: value.clone() for name, value in values.items()}
            if one_by_one:
                values.update(copies)
            else:
                optimizer.state[param] = copies
            del values, copies
        assert alive(state) == []
        optimizer.step()


@both
@every_backend
def test_a_parameter_that_is_taken_out_is_free(cls, backend):
    optimizer = stepped(cls, backend)
    params = references(parameters(optimizer))
    optimizer.state.clear()
    del optimizer.param_groups[1:]
    optimizer.param_groups[0]["params"].pop()
    assert alive(params) == parameters(optimizer)


@both
@every_backend
@options
def test_gradients_are_free(cls, backend, options):
    optimizer = stepped(cls, backend, **options)
    grads = references(param.grad for param in parameters(optimizer))
    optimizer.zero_grad()
    assert alive(grads) == []


@both
def test_loading_frees_what_was_there(cls):
    optimizer = stepped(cls)
    state = state_of(optimizer)
    optimizer.load_state_dict(deepcopy(optimizer.state_dict()))
    assert alive(state) == []
    saved = optimizer.state_dict()
    loaded = stepped(cls, steps=0)
    loaded.load_state_dict(saved)
    state = state_of(optimizer)
    del saved
    optimizer.state.clear()
    assert alive(state) == []


@both
def test_copies_hold_nothing_of_the_original(cls):
    optimizer = stepped(cls)
    copies = deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))
    everything = [*state_of(optimizer), *references(parameters(optimizer))]
    del optimizer
    assert alive(everything) == []
    assert all(copy.state for copy in copies)


@both
@every_backend
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_that_raised_keeps_nothing(cls, backend, steps):
    optimizer = stepped(cls, backend, steps)
    params = parameters(optimizer)
    set_gradients(optimizer, step=steps)
    params[0].grad = torch.ones(3, 2)
    optimizer.param_groups[1]["lr"] = -1.0
    for bad in (None, torch.ones(7)):
        if bad is not None:
            optimizer.param_groups[1]["lr"] = 0.1
            optimizer.state.setdefault(params[-1], {})[cls.memories[0]] = bad
        with pytest.raises((ValueError, RuntimeError)) as caught:
            optimizer.step()
        del caught, bad
    everything = [*state_of(optimizer), *references(param.grad for param in params)]
    everything += references(params[1:])
    optimizer.state.clear()
    optimizer.zero_grad()
    del params, optimizer.param_groups[1:]
    optimizer.param_groups[0]["params"].pop()
    assert alive(everything) == []


@both
def test_a_step_of_two_backends_keeps_nothing(cls):
    optimizer = stepped(cls, "reference", steps=0)
    optimizer.param_groups[1]["backend"] = "foreach"
    set_gradients(optimizer, step=0)
    optimizer.step()
    everything = [*state_of(optimizer), *references(p.grad for p in parameters(optimizer))]
    optimizer.zero_grad()
    optimizer.state.clear()
    assert alive(everything) == []


@both
def test_a_compiled_step_keeps_no_state(cls):
    optimizer = stepped(cls, "foreach", steps=0)
    set_gradients(optimizer, step=0)
    step = torch.compile(optimizer.step, backend="eager")
    step()
    assert optimizer._new_state == []
