"""The kernels of csrc/cpu through ctypes, where there is no compiled extension for this torch.

Their library knows no torch, and is tied to no version of it or of Python: it is given tables of
addresses (csrc/cpu/library.h). What is refused, what goes through copies and what autograd is told
is as csrc/torch/step.cpp has it, and so are the bits. But Python takes microseconds with a tensor
where C++ takes a tenth of one.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain, compress
from operator import eq
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamem_fused.backends import ops
from adamem_fused.backends.batch import (
    GRADS,
    KEY,
    OFFSET,
    ROUNDS,
    SKIP,
    STRETCH,
    AdamWBatch,
    Batch,
    Packed,
    SGDBatch,
    check_in_place,
    check_rows,
)
from adamem_fused.backends.tables import Description, describe
from adamem_fused.formats import BLOCKS

LIBRARY = Path(__file__).parents[1] / "_cpu.so"
# kInterface of csrc/cpu/library.h.
INTERFACE = 1


def load(path: Path) -> tuple[ctypes.CDLL | None, str | None]:
    """Loads the library; returns it, or None and why it cannot be used."""
    if not path.exists():
        return None, ops.unavailable or ops.not_compiled()
    try:
        library = ctypes.CDLL(str(path))
        interface = library.adamem_cpu_interface
        interface.restype = ctypes.c_int64
        if interface() != INTERFACE:
            return None, (
                f"its library, {path}, was compiled from another version of this package "
                f"(interface {interface()}, not {INTERFACE}); reinstall, or compile anew in a "
                "source checkout"
            )
        for name, pointers in (
            ("adamw_begin", 3), ("adamw_finish", 3), ("sgd_begin", 2), ("sgd_finish", 3)
        ):  # fmt: skip
            function = getattr(library, f"adamem_cpu_{name}")
            function.argtypes, function.restype = (ctypes.c_void_p,) * pointers, None
        library.adamem_cpu_squares.argtypes = (
            ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p
        )  # fmt: skip
        library.adamem_cpu_squares.restype = None
    except (AttributeError, OSError) as error:
        return None, f"its library does not load ({error}); reinstall"
    # As torch chooses its own kernels, so that ATEN_CPU_CAPABILITY rules these too.
    library.adamem_cpu_choose(torch.backends.cpu.get_cpu_capability().encode())
    return library, None


_library, unavailable = load(LIBRARY)


# ---- the structs of csrc/cpu/library.h --------------------------------------------------
# Of the first two there are tables, each field a word.


class _StepTensor(NamedTuple):
    param: int = 0
    grad: int = 0
    memory: int = 0
    second_memory: int = 0
    step: int = 0
    prev_lr: int = 0
    beta: int = 0
    beta_prod: int = 0
    doubles: int = 0
    numel: int = 0
    rows: int = 0
    dtype: int = 0
    may_guess: int = 0
    packed: int = 0


class _PackedTensor(NamedTuple):
    format: int = 0
    second_format: int = 0
    scales: int = 0
    second_scales: int = 0
    block: int = 0
    second_block: int = 0
    remainder: int = 0
    rounds: int = 0
    key: int = 0
    offset: int = 0
    stretch: int = 0
    skip: int = 0


class _Threads(ctypes.Structure):
    _fields_ = (("count", ctypes.c_int64), ("parallel_for", ctypes.c_void_p))


class _Step(ctypes.Structure):
    _fields_ = (
        ("tensors", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("group_sizes", ctypes.c_void_p),
        ("lrs", ctypes.c_void_p),
        ("hypers", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("grad_scale", ctypes.c_double),
        ("threads", _Threads),
    )


# DType, and the dtype of the memories beside a parameter of it.
_DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
_MEMORY_DTYPES = dict.fromkeys(_DTYPES, torch.float32) | {torch.float64: torch.float64}

# Format; what is none of these is float32.
_FORMATS = {torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}
_SIGNED_CODES, _SQUARE_CODES = 2, 3

_NO_ROWS = -1

# Scalar: the bits of `doubles`.
_SCALARS = ("step", "prev_lr", "beta", "beta_prod")

# Where the addresses of a batch's lists go, and of what it has packed.
_FIELDS = {
    AdamWBatch: (
        "param", "grad", "memory", "second_memory", "step", "beta_prod", "prev_lr", "beta"
    ),
    SGDBatch: ("param", "grad", "memory", "step", "prev_lr", "beta"),
}  # fmt: skip
_PACKED_FIELDS = {
    AdamWBatch: ("scales", "second_scales", "remainder"),
    SGDBatch: ("scales", "remainder"),
}


def _threads() -> _Threads:
    return _Threads(torch.get_num_threads(), None)


def _address(words: array[Any]) -> int:
    return words.buffer_info()[0]


# ---- what is refused --------------------------------------------------------------------


def _check_scalar(t: Tensor, name: str, i: int) -> None:
    _check_scalar_dtype(t, name, i)
    if t.numel() != 1 or not t.is_cpu:
        raise ValueError(
            f"{name} of tensor {i} has shape {list(t.shape)} on {t.device}; it has to be a 0-dim "
            "tensor on the CPU"
        )


def _check_row_scalar(t: Tensor, param: Tensor, name: str, i: int) -> None:
    _check_scalar_dtype(t, name, i)
    fits = t.dim() == 1 and param.dim() > 0 and t.shape[0] == param.shape[0]
    if not fits or not t.is_contiguous() or not t.is_cpu:
        raise ValueError(
            f"{name} of tensor {i} has shape {list(t.shape)} on {t.device}; it has to be "
            "contiguous on the CPU, with an element for each row of its parameter, "
            f"{list(param.shape)}"
        )


def _check_scalar_dtype(t: Tensor, name: str, i: int) -> None:
    if t.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} of tensor {i} has dtype {t.dtype}; it has to be float32 or float64"
        )


def _dtype_of(t: Tensor, name: str, i: int) -> int:
    dtype = _DTYPES.get(t.dtype)
    if dtype is None:
        raise TypeError(
            f"{name} {i} has dtype {t.dtype}; the cpu backend takes float32, float64, bfloat16 "
            "and float16"
        )
    return dtype


def _check_like(t: Tensor, param: Tensor, name: str, i: int) -> None:
    if not t.is_floating_point() or t.layout != torch.strided:
        raise TypeError(
            f"{name} of tensor {i} is {t.layout} {t.dtype}; it has to be a dense real "
            "floating-point tensor"
        )
    _check_shape(t, param, name, i)
    if not t.is_cpu:
        raise ValueError(f"{name} of tensor {i} is on {t.device}, its parameter on the CPU")


def _check_shape(t: Tensor, param: Tensor, name: str, i: int) -> None:
    if t.shape != param.shape:
        raise ValueError(
            f"{name} of tensor {i} has shape {list(t.shape)}, its parameter {list(param.shape)}"
        )


def _check_packed(t: Tensor, param: Tensor, name: str, i: int) -> None:
    _check_shape(t, param, name, i)
    if not t.is_cpu or t.layout != torch.strided or not t.is_contiguous():
        raise ValueError(f"{name} of tensor {i} has to be contiguous on the CPU")


def _check_lengths(batch: Batch) -> None:
    n = len(batch.params)
    if any(len(own) != n for own in batch.all_lists()):
        lengths = ", ".join(str(len(own)) for own in batch.all_lists())
        raise ValueError(f"the lists of tensors differ in length: {lengths}")
    if any(size < 0 for size in batch.group_sizes) or sum(batch.group_sizes) != n:
        raise ValueError(f"group_sizes, {batch.group_sizes}, do not add up to {n} tensors")


def _is_dense(t: Tensor) -> bool:
    """Whether its elements lie without gaps, and none in another's place."""
    if t.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(t.stride(), t.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= max(1, size)
    return True


def _same_layout(a: Tensor, b: Tensor) -> bool:
    """Of two of one shape. Strides of dimensions of size 1 say nothing."""
    return a.stride() == b.stride() or all(
        size == 1 or ours == theirs
        for size, ours, theirs in zip(a.shape, a.stride(), b.stride(), strict=True)
    )


# ---- the tables -------------------------------------------------------------------------


class _Layout:
    """What stays as it is while the tensors' dtypes, shapes and strides do."""

    def __init__(self, batch: Batch) -> None:
        """Raises on what cannot be stepped: TypeError, ValueError."""
        _check_lengths(batch)
        self.tensors = array("q")  # _StepTensor, without addresses
        self.packed = array("q")  # _PackedTensor of each, likewise
        self.low: list[int] = []  # the tensors to which these are given
        # Those that are stepped through copies, and in which dtype.
        self.copied: dict[int, torch.dtype] = {}
        self.segments = 0
        # Held, so that its `id`, by which it is known, is no other's.
        self.rounding = None if batch.packed is None else batch.packed.rounding
        shared = list(
            chain.from_iterable(
                [own] * size for own, size in zip(batch.shared, batch.group_sizes, strict=True)
            )
        )
        rounding = _rounding_of(batch)
        for i, beta in enumerate(batch.betas):
            by_row = beta.dim() > 0
            doubles = _doubles_of(batch, i, by_row)
            if by_row and shared[i]:
                raise ValueError(
                    f"beta of tensor {i} has shape {list(beta.shape)}; where it is shared by all "
                    "tensors it has to be a 0-dim tensor"
                )
            rows = beta.shape[0] if by_row else _NO_ROWS
            self.segments += 1 if rows == _NO_ROWS else rows
            low = _open_packed(batch, batch.packed, i, rounding, by_row)
            if low is not None:
                dtype, may_guess = _DTYPES[batch.params[i].dtype], False
                self.low.append(i)
            else:
                dtype, may_guess = self._open_data(batch, i, by_row)
            if batch.packed is not None:
                self.packed.extend(low or _PackedTensor())
            self.tensors.extend(
                _StepTensor(
                    doubles=doubles,
                    numel=batch.params[i].numel(),
                    rows=rows,
                    dtype=dtype,
                    may_guess=may_guess,
                )
            )

    def _open_data(self, batch: Batch, i: int, by_row: bool) -> tuple[int, bool]:
        """dtype and may_guess of a tensor that has nothing packed."""
        param, grad = batch.params[i], batch.grads[i]
        _dtype_of(param, "param", i)
        _check_like(param, param, "param", i)
        _check_like(grad, param, "grad", i)
        direct = grad.dtype == param.dtype and _is_dense(param) and _same_layout(grad, param)
        if by_row and param.shape[0] > 1:  # they have to lie one behind the other
            direct = direct and param.stride(0) * param.shape[0] == param.numel()
        dtype = own = _MEMORY_DTYPES[param.dtype]
        memories = [tensors[i] for tensors in batch.memories.values()]
        for name, memory in zip(batch.memories, memories, strict=True):
            _check_like(memory, param, name, i)
            direct = direct and memory.dtype == own and _same_layout(memory, param)
            dtype = torch.promote_types(dtype, memory.dtype)
        may_guess = all(t.dtype == dtype for t in (param, *memories))
        if direct:
            return _DTYPES[param.dtype], may_guess
        self.copied[i] = dtype
        return _DTYPES[dtype], may_guess


def _scalars(batch: Batch) -> dict[str, list[Tensor]]:
    own = {"step": batch.steps, "prev_lr": batch.prev_lrs, "beta": batch.betas}
    if isinstance(batch, AdamWBatch):
        own["beta_prod"] = batch.beta_prods
    return own


def _doubles_of(batch: Batch, i: int, by_row: bool) -> int:
    doubles = 0
    for name, tensors in _scalars(batch).items():
        if by_row and name in ("beta", "beta_prod"):
            _check_row_scalar(tensors[i], batch.params[i], name, i)
        else:
            _check_scalar(tensors[i], name, i)
        doubles |= (tensors[i].dtype == torch.float64) << _SCALARS.index(name)
    return doubles


def _rounding_of(batch: Batch) -> list[list[int]]:
    """The rows of `Packed.rounding`."""
    if batch.packed is None:
        return []
    rounding, n = batch.packed.rounding, len(batch.params)
    if not rounding.is_cpu or rounding.dtype != torch.int64 or rounding.shape != (5, n):
        raise ValueError(f"rounding has to be an int64 CPU tensor of shape [5, {n}]")
    rows: list[list[int]] = rounding.tolist()
    return rows


def _open_packed(
    batch: Batch, packed: Packed | None, i: int, rounding: list[list[int]], by_row: bool
) -> _PackedTensor | None:
    """What tensor i has beside; None where all of it is stored as in other batches."""
    if packed is None:
        return None
    param, grad, remainder = batch.params[i], batch.grads[i], packed.remainders[i]
    memories = {name: tensors[i] for name, tensors in batch.memories.items()}
    formats = [_FORMATS.get(memory.dtype, 0) for memory in memories.values()]
    if not any(formats) and remainder.numel() == 0 and not rounding[ROUNDS][i]:
        return None
    if param.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(
            f"param of tensor {i} is {param.dtype}; what is stored in few bits has to be float32 "
            "or bfloat16"
        )
    if grad.dtype != param.dtype:
        raise TypeError(
            f"grad of tensor {i} is {grad.dtype}; where its parameter or state is stored in few "
            f"bits it has to be {param.dtype}, as its parameter is"
        )
    for name, tensor in {"param": param, "grad": grad, **memories}.items():
        _check_packed(tensor, param, name, i)
    blocks = []
    for k, (name, memory) in enumerate(memories.items()):
        if formats[k] == 0 and memory.dtype != torch.float32:
            raise TypeError(
                f"{name} of tensor {i} is {memory.dtype}; where something else of it is stored in "
                "few bits it has to be float32, bfloat16 or int8"
            )
        blocks.append(_block_of(memory, packed.scales[k][i], name, k, by_row, i))
    if remainder.numel() > 0:
        _check_packed(remainder, param, "param_remainder", i)
        if remainder.dtype != torch.int8 or param.dtype != torch.bfloat16:
            raise ValueError(
                f"param_remainder of tensor {i} is {remainder.dtype}; it has to be int8, of a "
                "bfloat16 parameter"
            )
    return _PackedTensor(
        format=formats[0],
        second_format=formats[-1] if len(formats) > 1 else 0,
        block=blocks[0],
        second_block=blocks[-1] if len(blocks) > 1 else 0,
        rounds=rounding[ROUNDS][i],
        key=rounding[KEY][i],
        offset=rounding[OFFSET][i],
        stretch=rounding[STRETCH][i],
        skip=rounding[SKIP][i],
    )


def _block_of(memory: Tensor, scales: Tensor, name: str, k: int, by_row: bool, i: int) -> int:
    """The elements of each of a memory's scales; 0 where it is no codes."""
    format_ = _FORMATS.get(memory.dtype)
    if format_ not in (_SIGNED_CODES, _SQUARE_CODES):
        return 0
    numel, n = memory.numel(), scales.numel()
    block = numel // n if n > 0 and numel % n == 0 else 0
    run = numel // max(1, memory.shape[0]) if by_row else numel
    fits = block in BLOCKS and run % block == 0 and scales.is_contiguous() and scales.is_cpu
    if not fits or format_ != (_SIGNED_CODES if k == 0 else _SQUARE_CODES):
        raise ValueError(
            f"{name}_scales of tensor {i} has {n} elements, and {name}_codes {numel}; it has to "
            "have one for each block, and exp_avg_sq's codes are uint8, others int8"
        )
    if scales.dtype != torch.float32:
        raise TypeError(f"{name}_scales of tensor {i} is {scales.dtype}, not float32")
    return block


class _Kept(NamedTuple):
    """What is kept in a batch's cache."""

    description: Description
    shared: list[bool]
    layout: _Layout


def _layout_of(batch: Batch) -> tuple[_Layout, array[int]]:
    """The layout, made anew if anything in it has changed; and the tensors' addresses."""
    last: _Kept | None = batch.cache.get("cpu_library")
    description = describe(batch, None if last is None else last.description)
    known = last is not None and last.description[1:] == description[1:]
    if last is not None and known and last.shared == batch.shared:
        layout = last.layout
    else:
        layout = _Layout(batch)
    batch.cache["cpu_library"] = _Kept(description, batch.shared, layout)
    addresses = array("q")
    addresses.frombytes(description.addresses)
    return layout, addresses


def _fill(
    words: array[int], row: type[Any], fields: Sequence[str], addresses: array[int], n: int
) -> None:
    """Gives n rows their addresses, which are given list by list."""
    names: tuple[str, ...] = row._fields
    for k, field in enumerate(fields):
        words[names.index(field) :: len(names)] = addresses[k * n : (k + 1) * n]


class _Tables:
    """The tables of one step's tensors, and the copies that they lead to."""

    def __init__(self, batch: Batch) -> None:
        layout, addresses = _layout_of(batch)
        n, fields = len(batch.params), _FIELDS[type(batch)]
        self.tensors, self.packed = layout.tensors[:], layout.packed[:]
        self.segments = layout.segments
        _fill(self.tensors, _StepTensor, fields, addresses, n)
        if layout.low:
            own = addresses[len(fields) * n :]
            _fill(self.packed, _PackedTensor, _PACKED_FIELDS[type(batch)], own, n)
        width, packed = len(_StepTensor._fields), _StepTensor._fields.index("packed")
        for i in layout.low:
            # Rows have as many bytes as they have words of 8.
            place = _address(self.packed) + 8 * len(_PackedTensor._fields) * i
            self.tensors[width * i + packed] = place
        # A guess cannot be repaired where the gradient is overwritten with the parameter.
        may_guess = _StepTensor._fields.index("may_guess")
        for i in compress(range(n), map(eq, addresses[:n], addresses[n : 2 * n])):
            self.tensors[width * i + may_guess] = 0
        self.copies = {i: _copies(batch, i, dtype) for i, dtype in layout.copied.items()}
        for i, copies in self.copies.items():
            for k, copy in enumerate(copies):  # param, grad and the memories are the first words
                self.tensors[width * i + k] = copy.data_ptr()

    def run(self, name: str, batch: Batch, grad_scale: Tensor | None, *places: int | None) -> None:
        """Calls the library's function for these tables."""
        sizes = array("q", batch.group_sizes)
        lrs = array("d", [float(h.lr) for h in batch.hypers])
        hypers = array("d", ops.flat_hypers(batch))
        step = _Step(
            tensors=_address(self.tensors),
            size=len(batch.params),
            group_sizes=_address(sizes),
            lrs=_address(lrs),
            hypers=_address(hypers),
            groups=len(sizes),
            grad_scale=1.0 if grad_scale is None else float(grad_scale),
            threads=_threads(),
        )
        getattr(_library, f"adamem_cpu_{name}")(ctypes.byref(step), *places)

    def store(self, batch: Batch, updated: array[int]) -> None:
        """Writes what was updated in copies back."""
        with torch.no_grad():
            for i, copies in self.copies.items():
                if not updated[i]:
                    continue
                for k, (tensor, copy) in enumerate(zip(_data(batch, i), copies, strict=True)):
                    if k != GRADS and copy is not tensor:
                        tensor.copy_(copy)


def _data(batch: Batch, i: int) -> list[Tensor]:
    """param, grad and the memories."""
    return [tensors[i] for tensors in batch.lists()[: 2 + len(batch.memories)]]


def _copies(batch: Batch, i: int, dtype: torch.dtype) -> list[Tensor]:
    """Tensor i's as the kernels take them, contiguous in one dtype; copies unless they are so.

    Raises RuntimeError where a copy could not be written back.
    """
    with torch.no_grad():
        copies = [t.to(dtype).contiguous() for t in _data(batch, i)]
    names = ("param", "grad", *batch.memories)
    for name, tensor, copy in zip(names, _data(batch, i), copies, strict=True):
        if name != "grad" and copy is not tensor:
            check_in_place(tensor, f"{name} {i}")
    return copies


# ---- begin and finish -------------------------------------------------------------------


def _is_skipped(found_inf: Tensor | None) -> bool:
    return found_inf is not None and float(found_inf) != 0.0


def _flags(batch: Batch) -> array[int]:
    """A byte of each tensor."""
    return array("B", bytes(len(batch.params)))


def _new_rows(tables: _Tables) -> Tensor:
    return torch.zeros(tables.segments, 2, dtype=torch.float64, device="cpu")


def _finish(
    name: str,
    batch: Batch,
    rows: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if _is_skipped(found_inf):
        return
    tables = _Tables(batch)
    if rows is not None:
        check_rows(rows, batch)
        rows = rows.contiguous()
    counted = _flags(batch)
    place = None if rows is None else rows.data_ptr()
    tables.run(name, batch, grad_scale, place, _address(counted))
    tables.store(batch, counted)
    lists = batch.all_lists()
    written = chain(lists[:GRADS], lists[GRADS + 1 :])
    # What autograd does not know of: a graph that needs the old values then raises.
    torch.autograd.graph.increment_version(
        [tensor for tensors in written for tensor in compress(tensors, counted)]
    )


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64; updates where a guess is made."""
    tables = _Tables(batch)
    rows = _new_rows(tables)
    if not _is_skipped(found_inf):
        guessed = _flags(batch)
        tables.run("adamw_begin", batch, grad_scale, rows.data_ptr(), _address(guessed))
        tables.store(batch, guessed)
    return rows


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    _finish("adamw_finish", batch, rows, grad_scale, found_inf)


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64. Writes nothing else."""
    tables = _Tables(batch)
    rows = _new_rows(tables)
    tables.run("sgd_begin", batch, grad_scale, rows.data_ptr())
    return rows


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    _finish("sgd_finish", batch, rows, grad_scale, found_inf)


# ---- norms ------------------------------------------------------------------------------


def squared_norms(grads: list[Tensor]) -> Tensor:
    """The sum of each one's squares, [tensors] float64."""
    result = torch.empty(len(grads), dtype=torch.float64, device="cpu")
    elements = array("q")
    copies = []
    for i, grad in enumerate(grads):
        dtype = _dtype_of(grad, "grad", i)
        if grad.layout != torch.strided:
            raise TypeError(f"grad of tensor {i} is {grad.layout}; it has to be dense")
        if not grad.is_cpu:
            raise ValueError(f"grad of tensor {i} is on {grad.device}, its parameter on the CPU")
        if not _is_dense(grad):
            grad = grad.detach().contiguous()
            copies.append(grad)  # which has to live until the call
        elements.extend((grad.data_ptr(), dtype, grad.numel()))
    threads = ctypes.byref(_threads())
    squares: Any = getattr(_library, "adamem_cpu_squares")  # noqa: B009
    squares(_address(elements), len(grads), threads, result.data_ptr())
    return result
