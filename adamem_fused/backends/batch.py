"""What a backend is given: the tensors of one step on one device, and their hyperparameters.

Every list holds one entry a tensor, over all parameter groups in order; `hypers`,
`group_sizes` and `shared` (beta_scope="global") hold one a group. Tensors are real and dense
(complex ones come as pairs of reals), and the memory (`exp_avgs`, `exp_avg_sqs`,
`momentum_buffers`) has its parameter's shape. `steps`, `prev_lrs`, `beta_prods` and `betas` are
on the same device, the first two 0-dim.

The elements that share a beta are a segment. Where `betas[i]` and `beta_prods[i]` are 0-dim, that
is the tensor (and, in a group that is `shared`, all such tensors together). Where they have shape
[rows], it is each index of the first dimension, of which the tensor has as many.

`rows` [segments, 2], which the backends' first half gives and their second takes, hold num and den
of each segment, tensor by tensor. `cache` and `opened` are the backend's own: the first is kept
from step to step, the second what it has looked up for this one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from adamem_fused.formats import BLOCKS

Lr: TypeAlias = "float | Tensor"

# The place of the gradients in a batch's lists.
GRADS = 1

# Dtypes of real parameters, gradients and memories.
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def bookkeeping_dtype(device: torch.device) -> torch.dtype:
    """The dtype of rows and losses: float64 where every device of the type has it, else float32."""
    return torch.float64 if device.type in ("cpu", "cuda", "meta") else torch.float32


class AdamWHyper(NamedTuple):
    """Hyperparameters of one parameter group of AM-AdamW."""

    lr: Lr
    beta_max: float
    beta2: float
    eps: float
    weight_decay: float
    memory_lambda: float
    anchored: bool  # kappa = 1
    loss_gap: bool  # the gap's difference of losses is added to rows between the halves
    maximize: bool


class SGDHyper(NamedTuple):
    """Hyperparameters of one parameter group of AM-SGD."""

    lr: Lr
    beta_max: float
    weight_decay: float
    memory_lambda: float
    anchored: bool
    loss_gap: bool
    maximize: bool


@dataclass
class Packed:
    """What a batch has beside where its group's options store something in few bits.

    See adamem_fused/formats.py. Its memories are then plain (float32 or float64), bfloat16, or
    codes, int8 or, of exp_avg_sq, uint8, as their dtypes say; all but the plain ones are rounded
    stochastically. A tensor that has any of it (`is_low`) is contiguous, of float32 or bfloat16,
    and so is its gradient.
    """

    # A list for each memory: float32, one a block, in the order of the blocks; without elements
    # where the memory has none.
    scales: tuple[list[Tensor], ...]
    # int8, of the parameter's shape; without elements where there is none.
    remainders: list[Tensor]
    # [5, tensors] int64, on the CPU; rows KEY ... below.
    rounding: Tensor
    # Its row ROUNDS, where that has been kept: a tensor of FakeTensorMode cannot be read.
    rounds: list[bool] | None = None

    @classmethod
    def of(cls, lists: Sequence[list[Tensor]]) -> Packed:
        """Of a list of scales for each memory and one of remainders; the rounding is to come."""
        *scales, remainders = lists
        return cls(tuple(scales), remainders, torch.empty(5, 0, dtype=torch.int64, device="cpu"))

    @classmethod
    def empty(cls, memories: int) -> Packed:
        """For a batch that is to be filled."""
        return cls.of([[] for _ in range(memories + 1)])

    def lists(self) -> tuple[list[Tensor], ...]:
        return (*self.scales, self.remainders)

    def is_low(self, batch: Batch, i: int) -> bool:
        """Whether anything of tensor i is not stored as in other batches."""
        return (
            any(own[i].dtype in LOW for own in batch.memories.values())
            or self.remainders[i].numel() > 0
            or self.is_rounded(i)
        )

    def is_rounded(self, i: int) -> bool:
        """Whether parameter i is rounded stochastically."""
        return bool(self.rounding[ROUNDS, i]) if self.rounds is None else self.rounds[i]

    def may_guess(self, batch: Batch, i: int) -> bool:
        """Whether tensor i, which is low, may be updated with the cap and repaired.

        A repair begins with what was rounded once and rounds once more: stochastically, as every
        step does, or to 24 bits. Not so where the parameter is rounded to nearest, which loses what
        is less than half an ulp. Rows need no guess.
        """
        param, remainder = batch.params[i], self.remainders[i]
        rounds = self.is_rounded(i) or remainder.numel() > 0
        return (param.dtype != torch.bfloat16 or rounds) and batch.betas[i].dim() == 0


# What a memory in few bits is stored as.
LOW = (torch.bfloat16, torch.int8, torch.uint8)

# Rows of `Packed.rounding`: the tensor's key; where the shard's elements lie in the whole tensor,
# as formats.places takes it; whether the parameter is rounded stochastically, 1 or 0.
KEY, OFFSET, STRETCH, SKIP, ROUNDS = range(5)


@dataclass
class AdamWBatch:
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    exp_avgs: list[Tensor] = field(default_factory=list)
    exp_avg_sqs: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    beta_prods: list[Tensor] = field(default_factory=list)
    prev_lrs: list[Tensor] = field(default_factory=list)
    betas: list[Tensor] = field(default_factory=list)
    hypers: list[AdamWHyper] = field(default_factory=list)
    group_sizes: list[int] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    opened: Any = None
    packed: Packed | None = None

    @property
    def memories(self) -> dict[str, list[Tensor]]:
        return {"exp_avg": self.exp_avgs, "exp_avg_sq": self.exp_avg_sqs}

    @property
    def scalars(self) -> tuple[list[Tensor], ...]:
        """Those that are one a tensor."""
        return self.steps, self.prev_lrs

    @property
    def row_scalars(self) -> tuple[list[Tensor], ...]:
        """Those that are one a segment."""
        return self.beta_prods, self.betas

    def lists(self) -> tuple[list[Tensor], ...]:
        """The lists in the order in which the optimizer's `_init_group` fills them."""
        return (
            self.params,
            self.grads,
            self.exp_avgs,
            self.exp_avg_sqs,
            self.steps,
            self.beta_prods,
            self.prev_lrs,
            self.betas,
        )

    def all_lists(self) -> tuple[list[Tensor], ...]:
        """With those of what is packed behind them."""
        return self.lists() if self.packed is None else (*self.lists(), *self.packed.lists())


@dataclass
class SGDBatch:
    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    momentum_buffers: list[Tensor] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    prev_lrs: list[Tensor] = field(default_factory=list)
    betas: list[Tensor] = field(default_factory=list)
    hypers: list[SGDHyper] = field(default_factory=list)
    group_sizes: list[int] = field(default_factory=list)
    shared: list[bool] = field(default_factory=list)
    cache: dict[str, Any] = field(default_factory=dict)
    opened: Any = None
    packed: Packed | None = None

    @property
    def memories(self) -> dict[str, list[Tensor]]:
        return {"momentum_buffer": self.momentum_buffers}

    @property
    def scalars(self) -> tuple[list[Tensor], ...]:
        """Those that are one a tensor."""
        return self.steps, self.prev_lrs

    @property
    def row_scalars(self) -> tuple[list[Tensor], ...]:
        """Those that are one a segment."""
        return (self.betas,)

    def lists(self) -> tuple[list[Tensor], ...]:
        """The lists in the order in which the optimizer's `_init_group` fills them."""
        return (
            self.params,
            self.grads,
            self.momentum_buffers,
            self.steps,
            self.prev_lrs,
            self.betas,
        )

    def all_lists(self) -> tuple[list[Tensor], ...]:
        """With those of what is packed behind them."""
        return self.lists() if self.packed is None else (*self.lists(), *self.packed.lists())


Batch: TypeAlias = "AdamWBatch | SGDBatch"


def group_slices(batch: Batch) -> Iterator[slice]:
    """Each group's place in the batch's lists, in the order of `batch.hypers`."""
    start = 0
    for size in batch.group_sizes:
        yield slice(start, start + size)
        start += size


def segment_slices(batch: Batch) -> Iterator[slice]:
    """Each tensor's place in `rows`."""
    start = 0
    for beta in batch.betas:
        yield slice(start, start + beta.numel())
        start += beta.numel()


def check_like(params: list[Tensor], others: dict[str, list[Tensor]]) -> None:
    """Raises ValueError where a gradient or a memory has not its parameter's shape or device."""
    for name, tensors in others.items():
        for i, (tensor, param) in enumerate(zip(tensors, params, strict=True)):
            if tensor.shape != param.shape:
                raise ValueError(
                    f"{name} of tensor {i} has shape {list(tensor.shape)}, "
                    f"its parameter {list(param.shape)}"
                )
            if tensor.device != param.device:
                raise ValueError(
                    f"{name} of tensor {i} is on {tensor.device}, its parameter on {param.device}"
                )


def check(batch: Batch) -> None:
    """Raises on what cannot be stepped, before anything has changed.

    For what is written in Python; the C++ operators check for themselves, at a tenth of
    the cost.

    Raises:
        TypeError: data that is not dense, real and floating-point; a scalar that is no tensor
            of float32 or float64.
        ValueError: a gradient or a memory without its parameter's shape or device; a scalar
            that is not 0-dim, or one a row where the others of its tensor are so.
        RuntimeError: a parameter or a memory that cannot be updated in place.
    """
    updated = {"param": batch.params, **batch.memories}
    codes = set() if batch.packed is None else _check_packed(batch, batch.packed)
    for name, tensors in {**updated, "grad": batch.grads}.items():
        for i, tensor in enumerate(tensors):
            if (name, i) in codes:
                continue
            if tensor.layout != torch.strided or tensor.dtype not in FLOATING:
                raise TypeError(
                    f"{name} of tensor {i} is {tensor.layout} {tensor.dtype}; it has to be a "
                    "dense real floating-point tensor"
                )
    check_like(batch.params, {"grad": batch.grads, **batch.memories})
    for name, tensors in updated.items():
        for i, tensor in enumerate(tensors):
            check_in_place(tensor, f"{name} {i}")
    one = torch.Size([])
    shared = [
        own for own, size in zip(batch.shared, batch.group_sizes, strict=True) for _ in range(size)
    ]
    for scalars in batch.scalars:
        for i, (scalar, param) in enumerate(zip(scalars, batch.params, strict=True)):
            _check_scalar(scalar, one, param.device, i)
    for scalars in batch.row_scalars:
        for i, (scalar, param, beta) in enumerate(
            zip(scalars, batch.params, batch.betas, strict=True)
        ):
            by_row = isinstance(beta, Tensor) and beta.dim() > 0 and not shared[i]
            _check_scalar(scalar, param.shape[:1] if by_row else one, param.device, i)


def _check_packed(batch: Batch, packed: Packed) -> set[tuple[str, int]]:
    """Raises on what kernels that find it by its address would take for something else.

    Returns which tensors are codes: the memory's name, and the tensor's place.
    """
    codes = set()
    for i, param in enumerate(batch.params):
        if not packed.is_low(batch, i):
            continue
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(
                f"param of tensor {i} is {param.dtype}; what is stored in few bits has to be "
                "float32 or bfloat16"
            )
        if batch.grads[i].dtype != param.dtype:
            raise TypeError(
                f"grad of tensor {i} is {batch.grads[i].dtype}; where its parameter or state is "
                f"stored in few bits it has to be {param.dtype}, as its parameter is"
            )
        own = {"param": param, "grad": batch.grads[i], "param_remainder": packed.remainders[i]}
        for (name, memories), scales in zip(batch.memories.items(), packed.scales, strict=True):
            own |= {name: memories[i], f"{name}_scales": scales[i]}
            if memories[i].dtype in (torch.float32, torch.bfloat16):
                continue
            codes.add((name, i))
            dtype = torch.uint8 if name == "exp_avg_sq" else torch.int8
            blocks = [param.numel() // n for n in BLOCKS if param.numel() % n == 0]
            if memories[i].dtype != dtype or scales[i].numel() not in blocks:
                raise ValueError(
                    f"{name}_codes of tensor {i} is {memories[i].dtype}, and {name}_scales has "
                    f"{scales[i].numel()} elements; they have to be {dtype} and one for each block"
                )
            if scales[i].dtype != torch.float32:
                raise TypeError(f"{name}_scales of tensor {i} is {scales[i].dtype}, not float32")
        for name, tensor in own.items():
            if not tensor.is_contiguous() or tensor.device != param.device:
                raise ValueError(
                    f"{name} of tensor {i} has strides {list(tensor.stride())} on {tensor.device}; "
                    f"it has to be contiguous on {param.device}"
                )
        if packed.remainders[i].numel() > 0 and (
            packed.remainders[i].dtype != torch.int8 or packed.remainders[i].shape != param.shape
        ):
            raise ValueError(
                f"param_remainder of tensor {i} is {packed.remainders[i].dtype} of shape "
                f"{list(packed.remainders[i].shape)}; it has to be int8 of shape "
                f"{list(param.shape)}"
            )
    return codes


def check_in_place(tensor: Tensor, name: str) -> None:
    sizes = zip(tensor.stride(), tensor.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in sizes):
        raise RuntimeError(
            f"{name} of shape {list(tensor.shape)} and strides {list(tensor.stride())} has "
            "elements that share memory, which cannot be updated in place"
        )
    _check_inference(tensor, name)


def _check_inference(tensor: Tensor, name: str) -> None:
    if torch.compiler.is_compiling():
        return  # which does not know of inference mode
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was made in inference mode, and cannot be updated in place outside of it"
        )


def _check_scalar(scalar: Any, shape: torch.Size, device: torch.device, i: int) -> None:
    kind = scalar.dtype if isinstance(scalar, Tensor) else type(scalar).__name__
    if kind not in (torch.float32, torch.float64):
        raise TypeError(
            f"scalar state of tensor {i} is {kind}; it has to be a float32 or float64 tensor"
        )
    if scalar.shape != shape or scalar.device != device:
        wanted = f"tensor of shape {list(shape)}" if shape else "0-dim tensor"
        raise ValueError(
            f"scalar state of tensor {i} has shape {list(scalar.shape)} on {scalar.device}; it "
            f"has to be a {wanted} on {device}"
        )
    if scalar.dim() > 0 and not scalar.is_contiguous():
        raise ValueError(f"scalar state of tensor {i} has to be contiguous")
    _check_inference(scalar, f"scalar state of tensor {i}")


def check_rows(rows: Tensor, batch: Batch) -> None:
    """Raises ValueError unless rows are as `*_begin` gives them, for kernels that do not look."""
    n, device = sum(map(Tensor.numel, batch.betas)), batch.params[0].device
    if rows.shape != (n, 2) or rows.dtype != torch.float64 or rows.device != device:
        raise ValueError(
            f"rows has to be a float64 tensor of shape [{n}, 2] on {device}, not "
            f"{rows.dtype} {list(rows.shape)} on {rows.device}"
        )
