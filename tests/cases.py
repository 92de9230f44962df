"""What the tests share: optimizers to run side by side, gradients for them, how to compare."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS

OPTIMIZERS = (AMAdamW, AMSGD)
MEMORIES = {AMAdamW: ("exp_avg", "exp_avg_sq"), AMSGD: ("momentum_buffer",)}
LOW_PRECISION = (torch.bfloat16, torch.float16)


def backends(*but: str) -> list[Any]:
    """Every backend's name but these, as pytest parameters; the missing ones skip, saying why."""
    params = []
    for name, backend in BACKENDS.items():
        reason = backend.unavailable(torch.device("cpu"))
        marks = [] if reason is None else [pytest.mark.skip(reason=f"{name}: {reason}")]
        if name not in but:
            params.append(pytest.param(name, marks=marks))
    return params


def each_pair(names: str, *values: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrizes with every combination of the values.

    make test takes so many of them that each value meets each of the others once; the rest are
    marked `thorough`.
    """
    places = [range(len(own)) for own in values]
    pairs = {
        combination: set(itertools.combinations(enumerate(combination), 2))
        for combination in itertools.product(*places)
    }
    left, chosen = set().union(*pairs.values()), set()
    while left:
        best = max(pairs, key=lambda combination: len(pairs[combination] & left))
        chosen.add(best)
        left -= pairs[best]
    return pytest.mark.parametrize(
        names,
        [
            pytest.param(
                *(own[place] for own, place in zip(values, combination, strict=True)),
                marks=() if combination in chosen else pytest.mark.thorough,
            )
            for combination in pairs
        ],
    )


# ---- parameters and optimizers ----------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A parameter group to make: its tensors' shapes and dtype, and its options."""

    shapes: Sequence[tuple[int, ...]]
    dtype: torch.dtype = torch.float32
    options: dict[str, Any] = field(default_factory=dict)


def random_tensor(
    shape: Iterable[int], dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Standard normal, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    if dtype.is_complex:
        return torch.randn(tuple(shape), generator=generator, dtype=dtype)
    return torch.randn(tuple(shape), generator=generator).to(dtype)


def make_optimizer(
    cls: type[Optimizer],
    groups: Sequence[Group],
    backend: str | None = None,
    seed: int = 0,
    **options: Any,
) -> Optimizer:
    """An optimizer over new parameters; the same groups and seed give the same parameters."""
    seeds = itertools.count(1000 * seed)
    param_groups = [
        {
            "params": [
                torch.nn.Parameter(random_tensor(shape, group.dtype, next(seeds)))
                for shape in group.shapes
            ],
            **group.options,
        }
        for group in groups
    ]
    return cls(param_groups, backend=backend, **options)


def parameters(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def snapshot(optimizer: Optimizer) -> list[dict[str, Tensor]]:
    """Copies of each parameter, by the name "param", and of its state."""
    return [
        {
            "param": param.detach().clone(),
            **{name: value.clone() for name, value in optimizer.state[param].items()},
        }
        for param in parameters(optimizer)
    ]


def restore(optimizer: Optimizer, saved: Sequence[dict[str, Tensor]]) -> None:
    """Gives the optimizer's parameters the values and the state of a snapshot, as copies."""
    for param, values in zip(parameters(optimizer), saved, strict=True):
        state = {name: value.clone() for name, value in values.items()}
        param.data.copy_(state.pop("param"))
        optimizer.state[param] = state


def copy_state(source: Optimizer, target: Optimizer) -> None:
    """Gives `target` the parameters' values and the state of `source`, both as copies."""
    restore(target, snapshot(source))


# ---- gradients --------------------------------------------------------------------


def gradient(param: Tensor, step: int, seed: int = 0, index: int = 0) -> Tensor:
    """A gradient that does not depend on the parameter's value.

    A fixed direction, whose sign turns over slowly, under noise: beta then visits both of
    its bounds and what is between. What does not depend on x does not amplify a difference
    in x, so that two runs stay comparable for as long as one likes.
    """
    shape, dtype = param.shape, param.dtype
    noise = random_tensor(shape, dtype, 1_000_003 * seed + 1009 * step + index + 7)
    direction = random_tensor(shape, dtype, 1_000_003 * seed + index + 3)
    return direction * math.cos(0.2 * step) + noise * (0.7 + 0.6 * math.sin(0.7 * step))


def set_gradients(
    *optimizers: Optimizer, step: int, seed: int = 0, skip: Sequence[int] = ()
) -> None:
    """Gives parameter i of every optimizer the same gradient, and those in `skip` none."""
    columns = zip(*(parameters(optimizer) for optimizer in optimizers), strict=True)
    for index, params in enumerate(columns):
        grad = None if index in skip else gradient(params[0], step, seed, index)
        for param in params:
            param.grad = grad


# ---- comparing --------------------------------------------------------------------


def largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0


def relative_error(actual: Tensor, expected: Tensor, *also: Tensor) -> float:
    """The largest difference over the largest value, of `expected` or of a tensor in `also`.

    By tensor and not by element: an element near 0 is a difference of larger ones, and
    keeps their rounding error. `also` holds what `expected` was computed from.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    assert actual.shape == expected.shape
    difference = largest(actual.detach().to(wide) - expected.detach().to(wide))
    scale = max(largest(tensor.detach()) for tensor in (expected, *also))
    if difference == 0:
        return 0.0
    return difference / scale if scale > 0 and not math.isnan(difference) else math.inf


def row_sizes(tensor: Tensor, beta: Tensor) -> Tensor:
    """The largest value of each segment, [segments]: a row for each beta, or the whole tensor."""
    if tensor.numel() == 0:
        return torch.zeros(beta.numel(), dtype=torch.float64)
    return tensor.detach().reshape(beta.numel(), -1).abs().amax(1).double()


def ulp(tensor: Tensor) -> Tensor:
    """The distance from each element to the next number of its dtype, in float64."""
    info = torch.finfo(tensor.dtype)
    _, exponent = torch.frexp(tensor.detach().double())
    smallest = torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64)
    return torch.maximum(torch.exp2(exponent.double() - 1) * info.eps, smallest)


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bytes, in the order of its elements."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_bits(actual: Optimizer, expected: Optimizer) -> None:
    """Parameters and state of the two are equal bit for bit."""
    for i, (ours, theirs) in enumerate(zip(parameters(actual), parameters(expected), strict=True)):
        actual_tensors = {"param": ours, **actual.state[ours]}
        expected_tensors = {"param": theirs, **expected.state[theirs]}
        assert actual_tensors.keys() == expected_tensors.keys()
        for name, tensor in expected_tensors.items():
            other = actual_tensors[name]
            assert (other.shape, other.dtype) == (tensor.shape, tensor.dtype), f"{name} {i}"
            assert torch.equal(bits(other), bits(tensor)), (
                f"{name} of tensor {i} differs by {relative_error(other, tensor)} (relative)"
            )


# ---- against the reference --------------------------------------------------------


def take_step(optimizer: Optimizer, step: int) -> None:
    """A step whose loss, where one is needed, is the same for every optimizer."""
    numel = sum(param.numel() for param in parameters(optimizer))
    optimizer.step(lambda: 0.01 * numel * math.cos(0.5 * step))


def tolerances(optimizer: Optimizer) -> list[float]:
    """What each parameter's state may differ by, relatively: 1e-12 in float64, else 1e-5.

    With a global beta a float64 tensor's step depends on the sums of the others.
    """
    scopes = [group["beta_scope"] for group in optimizer.param_groups for _ in group["params"]]
    own = [
        1e-12 if param.dtype in (torch.float64, torch.complex128) else 1e-5
        for param in parameters(optimizer)
    ]
    shared = max((t for t, scope in zip(own, scopes, strict=True) if scope == "global"), default=0)
    return [shared if scope == "global" else t for t, scope in zip(own, scopes, strict=True)]


def assert_step_agrees(
    actual: Optimizer,
    expected: Optimizer,
    before: Sequence[dict[str, Tensor]],
    beta_slack: Sequence[Tensor] | None = None,
    low_precision_ulps: int = 1,
    low_precision_sizes: Sequence[Tensor] | None = None,
) -> None:
    """Two optimizers that stepped from this snapshot, or nearly this, agree.

    What shares a beta is looked at by itself: a row where each has one, or else the tensor.

    beta and beta_prod to 1e-5 (float64: 1e-12), absolutely, for they are used beside 1. The
    memory to twice that (its own rounding, and beta's), relative to the largest element of
    the old and the new memory and the gradient: it is a mixture of them that may cancel.
    `beta_slack` is added to what beta may differ by, and so to what a beta moves.

    A float32 or float64 parameter likewise, relative to itself and to the step's natural size
    (lr for Adam, lr times gradient or memory for SGD). A bfloat16 or float16 parameter is
    rounded from float32 when it is stored: where the exact value lies close to the middle
    between two neighbours the two may round to different ones, an ulp apart and no further.
    The ulps are those of `low_precision_sizes`, or else of the parameter.
    """
    rtols = tolerances(expected)
    lrs = [float(group["lr"]) for group in expected.param_groups for _ in group["params"]]
    memory = MEMORIES[type(expected)][0]
    for i, (ours, theirs) in enumerate(zip(parameters(actual), parameters(expected), strict=True)):
        where = f"of tensor {i}, {list(theirs.shape)} {theirs.dtype}"
        state, reference = actual.state[ours], expected.state[theirs]
        assert state.keys() == reference.keys()
        # The parameter of a skipped step has no state, and is as it was.
        beta = reference.get("beta", torch.zeros(()))
        beta_tol = torch.full((beta.numel(),), rtols[i], dtype=torch.float64)
        if beta_slack:
            beta_tol += beta_slack[i].double().reshape(-1)
        sources = [t for t in (theirs.grad, before[i].get(memory)) if t is not None]
        source_sizes = torch.zeros_like(beta_tol)
        for source in sources:
            source_sizes = source_sizes.maximum(row_sizes(source, beta))
        for name, value in reference.items():
            assert state[name].shape == value.shape, f"{name} {where}: {list(state[name].shape)}"
            if name in ("beta", "beta_prod"):
                allowed = beta_tol
            elif name == memory:
                allowed = 2 * beta_tol * torch.maximum(row_sizes(value, beta), source_sizes)
            elif name == "exp_avg_sq":
                allowed = rtols[i] * row_sizes(value, beta)
            else:
                assert torch.equal(state[name], value), f"{name} {where}"
                continue
            wide = torch.complex128 if value.is_complex() else torch.float64
            difference = row_sizes(state[name].to(wide) - value.to(wide), beta)
            assert (difference <= allowed).all(), (
                f"{name} {where}: differs by {difference}, allowed {allowed}"
            )
        natural = 1.0 if memory == "exp_avg" else source_sizes
        sizes = torch.maximum(row_sizes(theirs, beta), row_sizes(before[i]["param"], beta))
        scale = sizes.maximum(torch.as_tensor(lrs[i] * natural))
        by_row = [-1, *[1] * (theirs.dim() - 1)] if beta.dim() else []
        allowed = (2 * beta_tol * scale).reshape(by_row).expand(theirs.shape)
        if theirs.dtype in LOW_PRECISION:
            sized = theirs if low_precision_sizes is None else low_precision_sizes[i]
            allowed = allowed + low_precision_ulps * ulp(sized)
        wide = torch.complex128 if theirs.is_complex() else torch.float64
        difference = (ours.detach().to(wide) - theirs.detach().to(wide)).abs()
        assert (difference <= allowed).all(), f"x {where}: differs by {largest(difference)}"


def beta_sensitivity(reference: Optimizer, step: int) -> list[Tensor]:
    """How far each beta of the coming step moves when the memory moves by rounding errors.

    beta is a quotient of sums, of which num may cancel and den may vanish. Where memory and
    gradient nearly agree a change in the memory's last bits is a large change of beta, and
    no implementation can be closer to another than that. The optimizer is set back after.
    """
    before = snapshot(reference)
    betas = []
    for factor in (0, 8, -8):
        for param in parameters(reference):
            memory = reference.state[param].get(MEMORIES[type(reference)][0])
            if memory is not None:
                memory.mul_(1 + factor * torch.finfo(memory.dtype).eps)
        take_step(reference, step)
        states = [reference.state[param] for param in parameters(reference)]
        betas.append([state.get("beta", torch.zeros(())).clone() for state in states])
        restore(reference, before)
    return [(b - a).abs().maximum((c - a).abs()) for a, b, c in zip(*betas, strict=True)]


def assert_lockstep(
    reference: Optimizer,
    other: Optimizer,
    steps: int,
    seed: int = 0,
    skip: Callable[[int], Sequence[int]] = lambda step: (),
    conditioned: bool = False,
) -> None:
    """Every step of the two agrees when both take it from the reference's state.

    With `conditioned`, beta may also differ by 4 times its sensitivity.
    """
    for step in range(steps):
        set_gradients(reference, other, step=step, seed=seed, skip=skip(step))
        slack = None
        if conditioned:
            slack = [4 * sensitivity for sensitivity in beta_sensitivity(reference, step)]
        before = snapshot(reference)
        restore(other, before)
        take_step(reference, step)
        take_step(other, step)
        assert_step_agrees(other, reference, before, slack)
