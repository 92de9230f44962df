"""The backends by name, and the choice among them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from adamem_fused.backends import cpu, cuda, foreach, operators, ops, reference, triton
from adamem_fused.backends.batch import AdamWBatch, Batch, SGDBatch
from adamem_fused.warn import warn_user

operators.register()


class Backend(Protocol):
    """Arithmetic without policy: two halves of a step an optimizer, with a seam between them.

    `*_begin` takes each tensor's num and den, and may do a part of the update that does not
    wait for beta; between the two, rows may be summed over tensors or ranks; `*_finish` takes
    beta from the rows and completes the update of parameters and state in place. Without rows it
    does all of the step. `*_begin` is followed by `*_finish` of the same batch, and what can be
    refused is refused before anything is changed: by `check`, and by whichever comes first.

    Gradients are divided by grad_scale, and nothing is changed where found_inf is not 0. Both are
    tensors of one element on the batch's device, or None.
    """

    name: str
    # Whether `fused=True` asks for it.
    fused: bool
    # Whether *_finish without rows takes the sums over all groups that are `shared` together.
    shares_sums: bool
    # Whether it takes batches that are packed.
    packs: bool

    def unavailable(self, device: torch.device) -> str | None:
        """Why this backend cannot be used for tensors on `device`, or None."""

    def check(self, batch: Batch) -> None:
        """Raises what a step of the batch would raise."""

    def squared_norms(self, batch: Batch) -> Tensor:
        """The sum of each gradient's squares, [tensors]; float64 where the device has it."""

    def adamw_begin(
        self, batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor: ...

    def adamw_finish(
        self,
        batch: AdamWBatch,
        rows: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...

    def sgd_begin(
        self, batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor: ...

    def sgd_finish(
        self,
        batch: SGDBatch,
        rows: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None: ...


# From the fastest to the slowest, as backend=None tries them.
BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (cpu, cuda, triton, foreach, reference)
}


def check_choice(options: dict[str, Any]) -> None:
    """Raises where `foreach`, `fused` and `backend` contradict one another or name nothing."""
    backend, use_foreach, use_fused = options["backend"], options["foreach"], options["fused"]
    for key, value in (("foreach", use_foreach), ("fused", use_fused)):
        if not isinstance(value, (int, type(None))) or value not in (None, True, False):
            raise ValueError(f"Invalid {key} value: {value!r} (True, False or None)")
    if use_foreach and use_fused:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")
    if backend is None:
        return
    if not isinstance(backend, str) or backend not in BACKENDS:
        raise ValueError(f"Invalid backend: {backend!r} (one of {', '.join(BACKENDS)}, or None)")
    is_foreach, is_fused = backend == foreach.name, BACKENDS[backend].fused
    for key, asked, given in (
        ("foreach", use_foreach, is_foreach),
        ("fused", use_fused, is_fused),
    ):
        if asked is not None and asked != given:
            raise ValueError(f"backend={backend!r} contradicts {key}={asked}")


def asks_for_fused(options: dict[str, Any]) -> bool:
    """Whether a parameter group asks for a fused backend: by fused=True, or by name."""
    backend = options["backend"]
    return BACKENDS[backend].fused if backend is not None else bool(options["fused"])


def choose(options: dict[str, Any], device: torch.device) -> Backend:
    """The backend that a parameter group asks for, for tensors on `device`.

    Raises:
        RuntimeError: one was asked for, by name or by fused=True, and is not there.

    Warns once for a type of device where none was asked for and foreach, which is slower, is all
    that there is, or where the cpu backend has to do without the compiled extension.
    """
    if options["backend"] is not None:
        backend = BACKENDS[options["backend"]]
        reason = _unavailable(backend, device)
        if reason is not None:
            raise RuntimeError(f"backend={backend.name!r} is not available: {reason}")
        return backend
    if options["foreach"]:
        return foreach
    reasons = []
    if options["fused"] is not False and (options["fused"] or options["foreach"] is None):
        for backend in BACKENDS.values():
            if not backend.fused:
                continue
            reason = _unavailable(backend, device)
            if reason is None:
                if backend is cpu and options["fused"] is None and ops.extension is None:
                    _warn_of_ctypes()
                return backend
            reasons.append(f"{backend.name}: {reason}")
    if options["fused"]:
        raise RuntimeError(f"fused=True: no fused backend is available ({'; '.join(reasons)})")
    if options["foreach"] is None:
        if options["fused"] is None and not torch.compiler.is_compiling():
            _warn_of_foreach(device)
        return foreach
    return reference


def check_packs(backend: Backend, device: torch.device) -> None:
    """Raises RuntimeError where a backend is asked for what it cannot store in few bits."""
    if not backend.packs:
        able = {name: other for name, other in BACKENDS.items() if other.packs}
        missing = [
            f"{name}: {reason}"
            for name, other in able.items()
            if (reason := _unavailable(other, device)) is not None
        ]
        raise RuntimeError(
            f"state_dtype, stochastic_rounding and store_param_remainders are not for the "
            f"{backend.name} backend, but for {', '.join(able)} (not there: {'; '.join(missing)})"
        )


def _unavailable(backend: Backend, device: torch.device) -> str | None:
    """Why the backend cannot be used; also where a fake tensor is on a GPU that is not there."""
    if backend.fused and _is_made_up(device):
        return f"there is no GPU here, and these are on {device}"
    return backend.unavailable(device)


def _is_made_up(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    # The first question is the cheaper one, and comes at every step.
    initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return not (initialized or torch.cuda.is_available())


# By type of device: the fused backends that are made for it.
_MADE_FOR: dict[str, tuple[Backend, ...]] = {
    "cpu": (cpu,),
    "cuda": (cuda, triton) if torch.version.hip is None else (triton,),
}
# Types of devices of which something was said.
_warned: set[str] = set()


def _warn_of_foreach(device: torch.device) -> None:
    """Says once in a process, for a type of device, that a fused backend is missing, and why."""
    if device.type in _warned or device.type not in _MADE_FOR or _is_made_up(device):
        return
    reasons = "; ".join(f"{b.name}: {b.unavailable(device)}" for b in _MADE_FOR[device.type])
    warn_user(
        f"The foreach backend, which is slower, takes the tensors on {device}: no fused "
        f"backend is available ({reasons}). With foreach=True it does so without this warning."
    )
    _warned.add(device.type)


def _warn_of_ctypes() -> None:
    """Says once in a process that the cpu backend goes without the extension, and why."""
    if torch.compiler.is_compiling() or cpu.name in _warned:
        return
    warn_user(
        "The cpu backend calls its kernels through ctypes, which is slower with many small "
        f'tensors: {ops.unavailable}. With backend="cpu" it does so without this warning.'
    )
    _warned.add(cpu.name)
