"""Who takes part: this package's backends, torch's optimizers and the installed peers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS

MakeOptimizer = Callable[[Sequence[Tensor]], Optimizer]

# First steps are then large enough to be seen in bfloat16: two of its ulps at 1.
LR = 2.0**-6
ADAMW_OPTIONS: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
SGD_OPTIONS: dict[str, Any] = {"lr": LR, "momentum": 0.9}

FUSED = [name for name, backend in BACKENDS.items() if backend.fused]
ADAMW_BASELINE, SGD_BASELINE = "AdamW fused", "SGD fused"
# Of AM-AdamW on the fused backends: what a step costs depends on the share of wrong guesses. With a
# beta a row there are none.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {"missed": 0.0},
    ", 20% missed": {"missed": 0.2},
    ", all missed": {"missed": 1.0},
    ", anchored": {"anchored": True},
    ", row": {"by_row": True},
    ", anchored, row": {"anchored": True, "by_row": True},
}
# Inductor takes seconds a tensor on the CPU and less on a GPU.
COMPILED_TENSORS = {"cpu": 8, "cuda": 400}


@dataclass(frozen=True)
class Contestant:
    """An optimizer that is timed.

    Attributes:
        name: in tables and files.
        optimizer: the kind, "adamw" or "sgd".
        make: the optimizer, from its parameters.
        reference: what its steps are checked against, in float64.
        core: takes part on every list of the suite, see `ParameterList.everyone`.
        adaptive: an Adaptive Memory optimizer: the update waits for sums over the tensor.
        anchored: AM-AdamW with memory_plane="anchored", which cannot guess its beta.
        by_row: AM-AdamW with beta_scope="row".
        missed: of the elements, the share whose beta is kept below its cap (`Side`), so that it
            is guessed wrong; None where nobody looks.
        compiled: its step goes through torch.compile.
        compiles_itself: it compiles its step on its own, for all tensors at once.
        quantized: its state is rounded to few bits, so that only a first step can be checked.
        low: an Adaptive Memory optimizer whose memories or parameters are in few bits.
        low_guesses: and may guess its beta all the same (`Packed.may_guess`).
        tolerance: of a float32 step, relative to the largest change in the tensor.
    """

    name: str
    optimizer: str
    make: MakeOptimizer
    reference: MakeOptimizer
    core: bool = False
    adaptive: bool = False
    anchored: bool = False
    by_row: bool = False
    missed: float | None = None
    compiled: bool = False
    compiles_itself: bool = False
    quantized: bool = False
    low: bool = False
    low_guesses: bool = False
    tolerance: float = 1e-3


def is_ours_fused(name: str) -> bool:
    """Whether a contestant is this package's, on a fused backend."""
    ours, _, backend = name.partition(",")[0].partition(" ")
    return ours in ("AMAdamW", "AMSGD") and backend in FUSED


@dataclass(frozen=True)
class Peer:
    """A class of another package, with the options of `ADAMW_OPTIONS` and its own.

    Attributes:
        package: its distribution, for the version.
        devices: where it works.
        compiles_itself, quantized, tolerance: as the contestant's.
    """

    name: str
    package: str
    module: str
    attribute: str
    options: dict[str, Any]
    devices: tuple[str, ...] = ("cpu", "cuda")
    compiles_itself: bool = False
    quantized: bool = False
    tolerance: float = 1e-3

    def make(self, params: Sequence[Any], **options: Any) -> Optimizer:
        cls = getattr(importlib.import_module(self.module), self.attribute)
        optimizer: Optimizer = cls(params, **{**ADAMW_OPTIONS, **self.options, **options})
        return optimizer

    def missing(self, device: torch.device) -> str | None:
        """Why it cannot take part, or None."""
        if device.type not in self.devices:
            return f"it works on {' and '.join(self.devices)} tensors only"
        try:
            getattr(importlib.import_module(self.module), self.attribute)
        except Exception as error:  # some packages check the machine when imported
            return first_line(error)
        return None


_UNQUANTIZED = {"quantize": False, "master_weight_bits": None, "fused": False}
PEERS = (
    Peer("torchao AdamW8bit", "torchao", "torchao.optim", "AdamW8bit", {}, quantized=True),
    Peer("optimi AdamW", "torch-optimi", "optimi", "AdamW", {}),
    Peer(
        "flashoptim FlashAdamW",
        "flashoptim",
        "flashoptim",
        "FlashAdamW",
        {},
        devices=("cuda",),
        quantized=True,
    ),
    # Of its code only this runs on CPU tensors.
    Peer(
        "flashoptim FlashAdamW, unquantized",
        "flashoptim",
        "flashoptim",
        "FlashAdamW",
        _UNQUANTIZED,
        devices=("cpu",),
    ),
    # Divides by max(sqrt(v), eps) and not by sqrt(v) + eps, which shows at small gradients.
    Peer(
        "heavyball AdamW",
        "heavyball",
        "heavyball",
        "AdamW",
        {},
        compiles_itself=True,
        tolerance=5e-2,
    ),
    Peer("bitsandbytes AdamW", "bitsandbytes", "bitsandbytes.optim", "AdamW", {}),
    Peer(
        "bitsandbytes AdamW8bit",
        "bitsandbytes",
        "bitsandbytes.optim",
        "AdamW8bit",
        {},
        quantized=True,
    ),
    Peer(
        "DeepSpeedCPUAdam",
        "deepspeed",
        "deepspeed.ops.adam",
        "DeepSpeedCPUAdam",
        {"adamw_mode": True},
        devices=("cpu",),
    ),
    Peer(
        "apex FusedAdam",
        "apex",
        "apex.optimizers",
        "FusedAdam",
        {"adam_w_mode": True},
        devices=("cuda",),
    ),
    Peer(
        "TransformerEngine FusedAdam",
        "transformer-engine",
        "transformer_engine.pytorch.optimizers",
        "FusedAdam",
        {"adam_w_mode": True},
        devices=("cuda",),
    ),
)


def first_line(error: BaseException) -> str:
    """An exception in one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def known_defect(contestant: Contestant, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why a contestant is not tried: its result is known to be wrong. None for most."""
    version = tuple(map(int, torch.__version__.split(".")[:2]))
    if (
        contestant.name == SGD_BASELINE
        and dtype.itemsize == 2
        and device.type == "cpu"
        and version <= (2, 13)
    ):
        return "torch's fused SGD on the CPU leaves such parameters as they were (pytorch#191763)"
    return None


def peer_versions() -> dict[str, str]:
    """The versions of the peers' packages that are installed."""
    versions = {}
    for package in dict.fromkeys(peer.package for peer in PEERS):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _reference_adamw(params: Sequence[Tensor]) -> Optimizer:
    return torch.optim.AdamW(params, **ADAMW_OPTIONS, foreach=False, fused=False)


def _reference_sgd(params: Sequence[Tensor]) -> Optimizer:
    return torch.optim.SGD(params, **SGD_OPTIONS, foreach=False, fused=False)


def _ours(optimizer: str, backend: str, variant: str = "", **options: Any) -> Contestant:
    cls = {"adamw": AMAdamW, "sgd": AMSGD}[optimizer]
    make = partial(cls, lr=LR)
    if options.get("anchored"):
        make = partial(make, memory_plane="anchored")
    if options.get("by_row"):
        make = partial(make, beta_scope="row")
    return Contestant(
        name=f"{cls.__name__} {'compiled' if options.get('compiled') else backend}{variant}",
        optimizer=optimizer,
        make=partial(make, backend=backend),
        reference=partial(make, backend="reference"),
        adaptive=True,
        core=BACKENDS[backend].fused,
        **options,
    )


def _torch_optimizers(device: torch.device) -> list[Contestant]:
    # Only then can a step of theirs be captured in a CUDA graph; SGD needs nothing.
    capturable: dict[str, Any] = {"capturable": True} if device.type == "cuda" else {}
    adamw = partial(torch.optim.AdamW, **ADAMW_OPTIONS, **capturable)
    sgd = partial(torch.optim.SGD, **SGD_OPTIONS)
    found = []
    for optimizer, make, reference in (
        ("adamw", adamw, _reference_adamw),
        ("sgd", sgd, _reference_sgd),
    ):
        name = {"adamw": "AdamW", "sgd": "SGD"}[optimizer]
        foreach = partial(make, foreach=True)
        found += [
            Contestant(f"{name} fused", optimizer, partial(make, fused=True), reference, core=True),
            Contestant(f"{name} foreach", optimizer, foreach, reference),
            Contestant(f"{name} compiled", optimizer, foreach, reference, compiled=True),
        ]
    return found


def find_contestants(device: torch.device) -> tuple[list[Contestant], dict[str, str]]:
    """All that can take part on a device, and the others with why they cannot."""
    found: list[Contestant] = []
    missing: dict[str, str] = {}
    for backend in BACKENDS.values():
        reason = backend.unavailable(device)
        if reason is None and backend.fused:
            found += [_ours("adamw", backend.name, v, **o) for v, o in VARIANTS.items()]
        elif reason is None:
            found.append(_ours("adamw", backend.name))
        if reason is None:
            found.append(_ours("sgd", backend.name))
        else:
            missing |= dict.fromkeys((f"AMAdamW {backend.name}", f"AMSGD {backend.name}"), reason)
    # The formulas in Python, through Inductor. The reference backend itself reads scalars
    # back and works in float64; foreach has the same formulas without either.
    found += [
        _ours("adamw", "foreach", compiled=True),
        _ours("sgd", "foreach", compiled=True),
        *_torch_optimizers(device),
    ]
    for peer in PEERS:
        reason = peer.missing(device)
        if reason is None:
            found.append(
                Contestant(
                    peer.name,
                    "adamw",
                    peer.make,
                    _reference_adamw,
                    compiles_itself=peer.compiles_itself,
                    quantized=peer.quantized,
                    tolerance=peer.tolerance,
                )
            )
        else:
            missing[peer.name] = reason
    return found, missing
