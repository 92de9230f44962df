"""Hyperparameters as schedulers, configuration files and NumPy leave them."""

import copy
import io
from collections import UserList

import numpy as np
import pytest
import torch
from cases import OPTIMIZERS
from snapshot import snapshot
from torch.nn import Parameter
from torch.optim.lr_scheduler import LinearLR

from adamem_fused import AMSGD, AMAdamW

both = pytest.mark.parametrize("cls", OPTIMIZERS)
every_backend = pytest.mark.parametrize("backend", ["cpu", "foreach", "reference"])

# LinearLR from its default start to an end_factor of 0 in so many steps ends below it.
STEPS = 7


def make(cls, lr=1e-3, shapes=((3, 2), (4,)), **options):
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = cls(params, lr=lr, **options)
    step(optimizer, generator)
    step(optimizer, generator)
    return optimizer, generator


def step(optimizer, generator):
    for group in optimizer.param_groups:
        for param in group["params"]:
            param.grad = torch.randn(param.shape, generator=generator)
    optimizer.step()


def reload(optimizer):
    """Saved and loaded as with a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    params = [Parameter(p.detach().clone()) for g in optimizer.param_groups for p in g["params"]]
    loaded = type(optimizer)(params, backend=optimizer.param_groups[0]["backend"])
    loaded.load_state_dict(torch.load(file))
    return loaded


@both
@every_backend
@pytest.mark.parametrize("lr", [1e-3, 0.1, torch.tensor(1e-3), torch.tensor(0.1).double()])
def test_a_schedule_that_ends_a_rounding_below_zero_goes_on(cls, backend, lr):
    optimizer, generator = make(cls, copy.deepcopy(lr), backend=backend)
    scheduler = LinearLR(optimizer, 1 / 3, 0.0, STEPS)
    for _ in range(STEPS):
        step(optimizer, generator)
        scheduler.step()
    assert -1e-6 < optimizer.param_groups[0]["lr"] < 0
    loaded = reload(optimizer)
    at_zero, rest = copy.deepcopy(optimizer), generator.get_state()
    at_zero.param_groups[0]["lr"] = 0.0
    results = []
    for each in (optimizer, loaded, at_zero):
        step(each, generator.set_state(rest))
        params = each.param_groups[0]["params"]
        results.append([(p.detach(), each.state[p]["beta"]) for p in params])
    torch.testing.assert_close(results[0], results[2], rtol=0, atol=0)
    torch.testing.assert_close(results[1], results[2], rtol=0, atol=0)


SCHEDULED = [
    (AMAdamW, "weight_decay", 0.0),
    (AMAdamW, "memory_lambda", 0.0),
    (AMAdamW, "betas", (0.0, 0.99)),
    (AMAdamW, "betas", (0.89, 0.0)),
    (AMSGD, "weight_decay", 0.0),
    (AMSGD, "memory_lambda", 0.0),
    (AMSGD, "beta_max", 0.0),
]


@pytest.mark.parametrize(("cls", "option", "end"), SCHEDULED)
@every_backend
def test_an_option_that_ends_a_rounding_below_zero_does_what_zero_does(cls, option, end, backend):
    below = tuple(b or -1e-20 for b in end) if isinstance(end, tuple) else -1e-20
    results = []
    for value in (below, end):
        optimizer, generator = make(cls, backend=backend)
        optimizer.param_groups[0][option] = value
        step(optimizer, generator)
        loaded = reload(optimizer)
        assert snapshot(loaded) == snapshot(optimizer)
        step(loaded, generator)
        results.append([p.detach() for p in loaded.param_groups[0]["params"]])
    torch.testing.assert_close(*results, rtol=0, atol=0)


@pytest.mark.parametrize(("cls", "option", "end"), [*SCHEDULED, (AMSGD, "lr", 0.0)])
def test_a_user_s_number_below_zero_is_refused_however_small(cls, option, end):
    below = tuple(b or -1e-20 for b in end) if isinstance(end, tuple) else -1e-20
    with pytest.raises(ValueError, match="-1e-20"):
        cls([Parameter(torch.zeros(2))], **{option: below})
    optimizer = cls([Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="-1e-20"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], option: below})
    assert len(optimizer.param_groups) == 1


@both
def test_a_number_clearly_below_zero_is_refused_in_a_step(cls):
    optimizer, _ = make(cls)
    before = snapshot(optimizer)
    for option in ("lr", "weight_decay", "memory_lambda"):
        kept = optimizer.param_groups[0][option]
        optimizer.param_groups[0][option] = -1e-5
        with pytest.raises(ValueError, match="-1e-05"):
            optimizer.step()
        optimizer.param_groups[0][option] = kept
    assert snapshot(optimizer) == before


# ---- kinds of numbers and of sequences --------------------------------------------


@every_backend
@pytest.mark.parametrize("kind", [list, np.array, UserList, lambda b: np.float32(b)])
@pytest.mark.parametrize("place", ["default", "group", "later"])
def test_betas_may_be_any_sequence_of_two_numbers(kind, place, backend):
    betas = (0.5, 0.75)  # the same in float32
    expected, _ = make(AMAdamW, betas=betas, backend=backend)
    generator = torch.Generator().manual_seed(0)
    params = [Parameter(torch.randn(shape, generator=generator)) for shape in ((3, 2), (4,))]
    options = {"lr": 1e-3, "backend": backend}
    if place == "default":
        optimizer = AMAdamW(params, betas=kind(betas), **options)
    else:
        group = {"params": params, "betas": kind(betas)}
        optimizer = AMAdamW([group], **options)
    if place == "later":
        optimizer.param_groups[0]["betas"] = kind(betas)
    else:
        assert optimizer.param_groups[0]["betas"] == betas
        reload(optimizer)
    step(optimizer, generator)
    step(optimizer, generator)
    torch.testing.assert_close(
        params, expected.param_groups[0]["params"], rtol=0, atol=0, check_device=False
    )


@both
@every_backend
@pytest.mark.parametrize("number", [np.float64, np.float32])
def test_numbers_may_be_numpy_s(cls, backend, number):
    values = {"lr": 0.5, "weight_decay": 0.125, "memory_lambda": 0.25}
    expected, _ = make(cls, backend=backend, **values)
    optimizer, _ = make(cls, backend=backend, **{k: number(v) for k, v in values.items()})
    for a, b in zip(optimizer.state.values(), expected.state.values(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    reload(optimizer)  # by torch.load, which takes no numbers of NumPy's


@pytest.mark.parametrize(
    ("cls", "option", "value"),
    [
        (AMAdamW, "betas", torch.tensor([0.9, 0.99])),
        (AMAdamW, "betas", (0.9, torch.tensor(0.99))),
        (AMAdamW, "eps", torch.tensor(1e-8)),
        (AMAdamW, "weight_decay", torch.tensor(0.1)),
        (AMSGD, "memory_lambda", torch.tensor(0.1)),
        (AMSGD, "beta_max", torch.tensor(0.9)),
    ],
)
def test_a_tensor_is_taken_for_lr_alone_and_the_error_says_what_to_pass(cls, option, value):
    with pytest.raises(ValueError, match=r"tensor\(.*not a tensor: pass its item\(\)"):
        cls([Parameter(torch.zeros(2))], **{option: value})


@pytest.mark.parametrize("betas", [0.9, np.array(0.9), torch.tensor(0.9), {0.9, 0.99}, "0.9", None])
def test_betas_that_are_no_pair_are_refused(betas):
    with pytest.raises(ValueError, match="betas"):
        AMAdamW([Parameter(torch.zeros(2))], betas=betas)


@both
@pytest.mark.parametrize("option", ["maximize", "capturable", "foreach", "fused", "memory_plane"])
@pytest.mark.parametrize("value", [torch.tensor([0.1, 0.2]), np.array([True, False])])
def test_an_array_is_no_choice_and_the_error_says_what_is(cls, option, value):
    with pytest.raises(ValueError, match=rf"Invalid {option}.*(True|'level')"):
        cls([Parameter(torch.zeros(2))], **{option: value})


@both
@every_backend
def test_a_learning_rate_a_rounding_below_zero_leaves_what_zero_leaves(cls, backend):
    """Nor is the next one divided by it, so to speak: it is not kept as the last one."""
    results = []
    for lr in (-9e-7, 0.0):
        optimizer, generator = make(cls, backend=backend)
        for each in (lr, 1e-6):
            optimizer.param_groups[0]["lr"] = each
            step(optimizer, generator)
        results.append(snapshot(optimizer))
    assert results[0] == results[1]
