"""The norm of a step's gradients, over all tensors, devices and ranks, and what follows of it.

max_grad_norm scales the gradients as torch.nn.utils.clip_grad_norm_ does, but writes none: their
norm takes a reading of them, and the factor enters the step as GradScaler's scale does.
skip_nonfinite leaves the step out where the norm is not finite, as found_inf does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from adamem_fused.backends.batch import bookkeeping_dtype

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from adamem_fused.seam import Work

# As torch.nn.utils.clip_grad_norm_ has it.
EPS = 1e-6


def check_options(max_grad_norm: Any, skip_nonfinite: Any) -> None:
    """Raises ValueError on a bad value of either option."""
    if max_grad_norm is not None and not _is_positive(max_grad_norm):
        hint = ", not a tensor: pass its item()" if isinstance(max_grad_norm, Tensor) else ""
        raise ValueError(
            f"Invalid max_grad_norm: {max_grad_norm!r} (a number > 0.0{hint}, or None not to clip)"
        )
    if not isinstance(skip_nonfinite, bool):
        raise ValueError(f"Invalid skip_nonfinite: {skip_nonfinite!r} (True or False)")


# Of more numbers torch.sum is shared among threads, and its last bit depends on how many.
_MOST = 2**15


def _sum(values: Tensor) -> Tensor:
    if values.numel() <= _MOST:
        return values.sum()
    return torch.stack([part.sum() for part in torch.split(values, _MOST)]).sum()


def _is_positive(value: Any) -> bool:
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and float(value) > 0
    except OverflowError:
        return False


class SquaredNorm:
    """The squared norm of the gradients of all that is added to it."""

    def __init__(self) -> None:
        # By device, and by the process groups over which tensors are sharded. They are added up
        # by `total`: what is added on several streams is there only when it is called.
        self._terms: dict[tuple[torch.device, tuple[ProcessGroup, ...]], list[Tensor]] = {}

    def add(self, work: Work) -> None:
        squares = work.backend.squared_norms(work.batch)
        if not work.dtensors:
            self._add_term(squares.device, (), _sum(squares))
            return
        for groups, tensors in work.parts().shards:
            self._add_term(squares.device, groups, _sum(squares[tensors]))

    def _add_term(
        self, device: torch.device, groups: tuple[ProcessGroup, ...], squares: Tensor
    ) -> None:
        self._terms.setdefault((device, groups), []).append(squares)

    def total(self) -> Tensor:
        """0-dim, the same on all ranks; float64 where the device has it.

        One collective for each process group over which tensors are sharded. What is replicated
        counts once; where it is not finite on one rank alone, these collectives tell the others. On
        the first device that is not the CPU, if there is one.
        """
        totals = {key: _add_up(terms) for key, terms in self._terms.items()}
        for device, group in dict.fromkeys(
            (device, group) for device, groups in totals for group in groups
        ):
            places = [key for key in totals if key[0] == device and group in key[1]]
            # 0, and NaN where one of this rank's is not finite.
            bad = 0 * _add_up([total for key, total in totals.items() if key[0] == device])
            sums = torch.stack([totals[key] for key in places]) + bad
            dist.all_reduce(sums, group=group)
            totals.update(zip(places, sums.unbind(), strict=True))
        home = home_device([device for device, _ in totals])
        return _add_up([total.to(home, bookkeeping_dtype(home)) for total in totals.values()])


def _add_up(terms: list[Tensor]) -> Tensor:
    return terms[0] if len(terms) == 1 else torch.stack(terms).sum()


def home_device(devices: Sequence[torch.device]) -> torch.device:
    """Where what belongs to all of a step is: its first device that is not the CPU, if any."""
    return next((d for d in devices if d.type != "cpu"), devices[0])


class Scaling(NamedTuple):
    """What a step does with its gradients: all 0-dim tensors, on one device, or None.

    grad_scale is what they are divided by; where found_inf is not 0 the step is none.
    """

    grad_scale: Tensor | None
    found_inf: Tensor | None
    grad_norm: Tensor | None  # before clipping


def scaling(
    grad_norm: Tensor,
    max_grad_norm: float | None,
    skip_nonfinite: bool,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> Scaling:
    """Clipping and skipping by a norm, of gradients that are still scaled by grad_scale."""
    if grad_scale is not None:
        grad_scale = grad_scale.to(grad_norm).reshape(())
        grad_norm = grad_norm / grad_scale
    if max_grad_norm is not None and max_grad_norm < math.inf:
        # What the gradients are divided by, where clip_grad_norm_ multiplies with its inverse. An
        # infinite norm makes them 0, or NaN, and a norm that is NaN makes them that, as there.
        clip = ((grad_norm + EPS) / float(max_grad_norm)).clamp(min=1.0)
        grad_scale = clip if grad_scale is None else clip * grad_scale
    if skip_nonfinite:
        is_bad = ~grad_norm.isfinite()
        if found_inf is not None:
            is_bad = is_bad | (found_inf.to(is_bad.device).reshape(()) != 0)
        found_inf = is_bad.to(torch.float32)
    return Scaling(grad_scale, found_inf, grad_norm)


class Readings:
    """What steps leave to be looked at, on one device: `grad_norm` and `skipped_steps`, [1].

    They are written in place, so that the replay of a step that a CUDA graph has captured writes
    them too. Not 0-dim: torch.compile (2.13) loses what is written to such a one of float64 on the
    CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # NaN until a norm is taken.
        self.grad_norm = torch.full((1,), math.nan, dtype=bookkeeping_dtype(device), device=device)
        self.skipped_steps = torch.zeros(1, dtype=torch.int64, device=device)

    def moved(self, device: torch.device) -> Readings:
        """The same on another device."""
        readings = Readings(device)
        readings.grad_norm.copy_(self.grad_norm)
        readings.skipped_steps.copy_(self.skipped_steps)
        return readings

    def write(self, scaling: Scaling) -> None:
        if scaling.grad_norm is not None:
            self.grad_norm.copy_(scaling.grad_norm)
        if scaling.found_inf is not None:
            self.skipped_steps.add_(scaling.found_inf.to(self.device) != 0)
