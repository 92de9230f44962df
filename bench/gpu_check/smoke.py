"""Whether a backend does anything right: minutes of measuring are spared where it does not.

Small steps against the reference backend, clipped or not, in few bits or not, the same steps again
and again bit for bit, and a captured step replayed that clips and leaves out what is not finite.
The first case of each kind takes the time of compiling too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adamem_fused import AMSGD, AMAdamW
from bench import gpu_cases
from bench.gpu_check import gpu
from bench.gpu_check.record import Case, Part

SHAPES: dict[str, tuple[tuple[int, ...], ...]] = {
    "tiny": ((3,), (), (0, 3), (5, 7)),
    "2^20": ((2**20,),),
    # Several chunks, and what is left over.
    "mixed": ((1000, 300), (77,), (), (5, 5, 5)),
    # With blocks of 256 in rows, and of 64 in a vector; a small tensor.
    "low": ((300, 768), (4160,), (77,)),
    # Short ones, several to a warp, and one that no block holds; and tensors without any.
    "rows": ((1000, 300), (64, 3, 3, 3), (50, 2, 768), (2, 50000), (9, 5), (77,)),
}
ALL_BFLOAT16 = gpu_cases.ALL_BFLOAT16.options
INT8: dict[str, Any] = {"state_dtype": "int8"}
CORRECTED: dict[str, Any] = {
    **INT8, "store_param_remainders": True, "stochastic_rounding": True
}  # fmt: skip
REPEATS = 30
STEPS = 3


def make_params(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(gpu.device, dtype).requires_grad_() for tensor in tensors]


def set_grads(params: Sequence[Tensor], step: int) -> None:
    """Noisy gradients that turn around at every step, so that betas are inside of their range.

    In place from the second step on: at the addresses that a graph knows.
    """
    generator = torch.Generator().manual_seed(1 + step)
    slope = -0.6 if step % 2 else 1.0
    for param in params:
        noise = torch.randn(param.shape, generator=generator).to(param)
        grad = slope * param.detach() + 0.5 * noise
        if param.grad is None:
            param.grad = grad
        else:
            param.grad.copy_(grad)


def norm_of(optimizer: AMAdamW | AMSGD) -> Tensor:
    assert optimizer.grad_norm is not None
    return optimizer.grad_norm


def as_ordered(value: Tensor) -> Tensor:
    """bfloat16 numbers counted: neighbours are 1 apart."""
    words = value.view(torch.int16).int()
    return torch.where(words < 0, -(words & 0x7FFF), words)


def is_low_close(name: str, actual: Tensor, expected: Tensor) -> bool:
    """What is stored in few bits: equal but where a rounding falls on the other side.

    A repair that begins with such a number may end further away. That of a number beside another's
    remainder is not looked at: together they are.
    """
    if actual.dtype == torch.bfloat16:
        apart = (as_ordered(actual) - as_ordered(expected)).abs()
        # Where much has cancelled out, float32 and float64 are further apart.
        wrong = (actual - expected).abs()
        near = (apart <= 1) | (wrong < 1e-6)
        if int((~near).sum()) <= 1 + near.numel() // 10_000:
            near |= wrong <= 2.0**-7 * expected.abs().max()
    else:
        apart = (actual.int() - expected.int()).abs()
        near = (apart <= 1) | torch.full_like(apart, name == "param_remainder").bool()
    return bool(near.all()) and bool((apart == 0).double().mean() > 0.98)


def is_close(name: str, actual: Tensor, expected: Tensor, low: bool) -> bool:
    if low and actual.dtype in (torch.bfloat16, torch.int8, torch.uint8):
        return is_low_close(name, actual, expected)
    small = actual.dtype in (torch.bfloat16, torch.float16)
    limit = torch.finfo(actual.dtype).eps if small else 1e-5
    return bool(torch.isclose(actual, expected, rtol=limit, atol=limit).all())


def compare(
    backend: str,
    cls: type[AMAdamW] | type[AMSGD],
    shapes: str,
    dtype: torch.dtype,
    scope: str,
    max_grad_norm: float | None = None,
    options: Mapping[str, Any] = {},
) -> Case:
    """Steps beside the reference's; each begins where the reference's last one ended."""
    ours, theirs = (make_params(SHAPES[shapes], dtype) for _ in range(2))
    optimizer, reference = (
        cls(
            params,
            lr=0.05,
            weight_decay=0.1,
            backend=name,
            beta_scope=scope,
            max_grad_norm=max_grad_norm,
            **options,
        )
        for params, name in ((ours, backend), (theirs, "reference"))
    )
    betas = []
    for step in range(STEPS):
        set_grads(theirs, step)
        for param, other in zip(ours, theirs, strict=True):
            assert other.grad is not None
            param.grad = other.grad.clone()
        optimizer.step()
        reference.step()
        if max_grad_norm is not None:
            norm, right = norm_of(optimizer).item(), norm_of(reference).item()
            if abs(norm - right) > 1e-6 * right or right < max_grad_norm:
                raise AssertionError(f"the norm is {norm:.9g}, and should be {right:.9g}")
        for param, other in zip(ours, theirs, strict=True):
            pairs = {"param": (param.detach(), other.detach())}
            pairs |= {k: (v, reference.state[other][k]) for k, v in optimizer.state[param].items()}
            for name, (actual, expected) in pairs.items():
                if not is_close(name, actual, expected, bool(options)):
                    wrong = (actual.double() - expected.double()).abs().max().item()
                    raise AssertionError(f"{name} is off by {wrong:.2g} after step {step}")
                actual.copy_(expected)
            betas += optimizer.state[param]["beta"].reshape(-1).tolist()
    inside = sum(0.001 < beta < 0.88 for beta in betas)
    # Clipped gradients of AMSGD leave none; the same case unclipped looks at betas.
    if not inside and max_grad_norm is None:
        raise AssertionError(f"no beta was inside of its range, which checks little: {betas[:9]}")
    return {"found": f"as the reference; {inside} of {len(betas)} betas inside"}


def train(
    backend: str, cls: type[AMAdamW] | type[AMSGD], steps: int, captured: bool = False
) -> list[Tensor]:
    """Steps while lr, grad_scale and found_inf change; the parameters and the state.

    Of two groups, the second with a beta a row. Clipped, and one step left out for its norm.
    """
    params = make_params(SHAPES["mixed"] + SHAPES["2^20"] + SHAPES["rows"], torch.float32)
    rows = len(SHAPES["rows"])
    groups: list[dict[str, Any]] = [
        {"params": params[:-rows]},
        {"params": params[-rows:], "beta_scope": "row"},
    ]
    lr = torch.tensor(0.01, device=gpu.device)
    options: dict[str, Any] = {"max_grad_norm": 1.0, "skip_nonfinite": True}
    optimizer = cls(groups, lr=lr, backend=backend, capturable=True, **options)
    optimizer.grad_scale = torch.ones((), device=gpu.device)
    optimizer.found_inf = torch.zeros((), device=gpu.device)
    step: Callable[[], Any] = optimizer.step
    for k in range(steps):
        set_grads(params, k)
        if k == 2:
            assert params[0].grad is not None
            params[0].grad.view(-1)[-1] = torch.nan
        lr.fill_(0.01 * (k % 4))
        optimizer.grad_scale.fill_(2.0**k)
        optimizer.found_inf.fill_(float(k == 3))
        step()
        if captured and k == 0:
            step = gpu.capture(optimizer.step)
    state = [value for param in params for value in optimizer.state[param].values()]
    # NaN, where the last step was one, is not equal to itself.
    readings = [norm_of(optimizer).nan_to_num(-1.0), optimizer.skipped_steps]
    return [*(param.detach() for param in params), *state, *readings]


def same_bits(first: Sequence[Tensor], others: Iterable[Sequence[Tensor]]) -> Case:
    same = [all(map(torch.equal, first, other)) for other in others]
    if not all(same):
        raise AssertionError(f"other bits in {same.count(False)} of {len(same)}")
    return {"found": f"the same bits, {len(same)} more times"}


def replayed(backend: str, cls: type[AMAdamW] | type[AMSGD]) -> Case:
    steps = 2 * STEPS  # one of them with found_inf
    return same_bits(train(backend, cls, steps), [train(backend, cls, steps, captured=True)])


def repeated(backend: str, cls: type[AMAdamW] | type[AMSGD]) -> Case:
    others = (train(backend, cls, STEPS) for _ in range(REPEATS))
    return same_bits(train(backend, cls, STEPS), others)


def run(part: Part, backend: str) -> None:
    compared = (
        ("tiny", torch.float32, "tensor", None),
        ("2^20", torch.float32, "tensor", None),
        ("mixed", torch.bfloat16, "tensor", None),
        ("rows", torch.float32, "row", None),
        ("rows", torch.bfloat16, "row", None),
        ("mixed", torch.bfloat16, "tensor", 0.5),
        ("rows", torch.float32, "row", 0.5),
    )
    for cls in (AMAdamW, AMSGD):
        for shapes, dtype, scope, max_norm in compared:
            clipped = "" if max_norm is None else " clipped"
            name = f"{cls.__name__} {shapes} {dtype}{clipped}".replace("torch.", "")
            part.case(name, partial(compare, backend, cls, shapes, dtype, scope, max_norm))
    low = (
        (AMAdamW, torch.bfloat16, "tensor", ALL_BFLOAT16),
        (AMAdamW, torch.bfloat16, "row", ALL_BFLOAT16),
        (AMAdamW, torch.float32, "tensor", INT8),
        (AMAdamW, torch.bfloat16, "row", CORRECTED),
        (AMSGD, torch.bfloat16, "row", CORRECTED),
    )
    for cls, dtype, scope, options in low:
        state = " corrected, int8" if options == CORRECTED else f", {options['state_dtype']}"
        name = f"{cls.__name__} {scope} {dtype}{state}".replace("torch.", "")
        part.case(name, partial(compare, backend, cls, "low", dtype, scope, None, options))
    for cls in (AMAdamW, AMSGD):
        part.case(f"{cls.__name__} graph replay", partial(replayed, backend, cls))
        part.case(f"{cls.__name__} repeated", partial(repeated, backend, cls))
