"""The cuda backend: the kernels of csrc/cuda, for tensors on an NVIDIA GPU.

A step is three launches: prepare, begin, finish, where begin's blocks take beta too. Through the
seam, prepare and begin leave the rows, and prepare, beta and finish go on from them; where tensors
share a beta, share_rows and beta are in between. Where they share none, all ways give the same
bits. Each further combination of dtypes takes one more of begin and of finish, and strided tensors
take copies. Tensors whose rows have betas of their own are done when begin is, and take one more
launch of it for each power of 2 of elements that their rows may have.
The squared norms of the gradients are two launches before all that, and one more for each further
dtype of gradients.
Nothing is read back from the device, a step can be captured in a CUDA graph, and two runs give the
same bits.

It has run on an H100 (bench/results/nvidia-h100-80gb-hbm3/notes.md), and on no other GPU: for
those the kernels were compiled for sm_75, sm_80, sm_90 and sm_100, and their source was tested on
the CPU, compiled by g++ with threads in place of CUDA's (tests/cuda_emulation/).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

# torch.compiler.disable, but without importing torch._dynamo, which takes seconds, at once.
from torch._compile import _disable_dynamo

from adamem_fused.backends import cpu, cuda_library, ops
from adamem_fused.backends.batch import AdamWBatch, Batch, SGDBatch, check_rows
from adamem_fused.backends.batch import check as check
from adamem_fused.backends.tables import Bucket, Opened, Tables, open_tables, tagged_address

name = "cuda"
fused = True
shares_sums = True
packs = True


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot be used for tensors on `device`, or None."""
    if device.type != "cuda" or torch.version.hip is not None:
        where = "an AMD GPU" if device.type == "cuda" else str(device)
        return f"it works on tensors on an NVIDIA GPU, and these are on {where}"
    if device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    if device not in _reasons:
        _reasons[device] = _find_reason(device)
    return _reasons[device]


# By device. A dict, and filled when parameters are given to an optimizer: torch.compile can trace
# a look at it, and neither one at a file nor a call of the library.
_reasons: dict[torch.device, str | None] = {}


@_disable_dynamo
def _find_reason(device: torch.device) -> str | None:
    """Why the library does not run on this device, or None."""
    reason = cuda_library.unavailable()
    if reason is not None:
        return reason
    try:
        check = _library().adamem_check
    except (AttributeError, OSError) as error:
        return f"its library does not load ({error}); reinstall"
    compiled, driver = ctypes.c_int(), ctypes.c_int()
    with _on(device):
        code = check(device.index, ctypes.byref(compiled), ctypes.byref(driver))
    if code == 0:
        return None
    ours, theirs = (f"{v.value // 1000}.{v.value % 1000 // 10}" for v in (compiled, driver))
    return (
        f"its library, compiled with CUDA {ours}, does not run on {device} with a driver of CUDA "
        f"{theirs} ({_error_text(code)}); update the driver, or compile the library with CUDA "
        f"{theirs} or older and on this machine, or with its GPU in TORCH_CUDA_ARCH_LIST"
    )


# ---- the structs of csrc/cuda ---------------------------------------------------------


class _Step(ctypes.Structure):
    """Step of csrc/cuda/tables.h."""

    _fields_ = (
        ("addresses", ctypes.c_void_p),
        ("layout", ctypes.c_void_p),
        ("hypers", ctypes.c_void_p),
        ("lrs", ctypes.c_void_p),
        ("chunk_units", ctypes.c_void_p),
        ("partials", ctypes.c_void_p),
        ("arrived", ctypes.c_void_p),
        ("rows", ctypes.c_void_p),
        ("coefficients", ctypes.c_void_p),
        ("grad_scale", ctypes.c_int64),
        ("found_inf", ctypes.c_void_p),
        ("tensors", ctypes.c_int64),
        ("units", ctypes.c_int64),
        ("device", ctypes.c_int64),
        ("part", ctypes.c_int64),
    )


class _Bucket(ctypes.Structure):
    """Bucket of csrc/cuda/tables.h."""

    _fields_ = (
        ("first_chunk", ctypes.c_int64),
        ("chunks", ctypes.c_int64),
        ("row", ctypes.c_int64),
        ("low", ctypes.c_int64),
        ("dtypes", ctypes.c_int32 * 4),
    )


# Part of csrc/cuda/tables.h.
_WHOLE, _BEGIN, _FINISH = range(3)

# DType of csrc/cuda/tables.h.
_DTYPES = {
    torch.float32: 0,
    torch.float64: 1,
    torch.bfloat16: 2,
    torch.float16: 3,
    torch.int8: 4,
    torch.uint8: 4,
}

# Of memories beside a parameter and a gradient of this dtype, where something is stored in few
# bits: what there are kernels for.
_LOW_MEMORIES = {
    torch.float32: (torch.bfloat16, torch.int8),
    torch.bfloat16: (torch.float32, torch.bfloat16, torch.int8),
}


class _Kernels(NamedTuple):
    """An optimizer's launches, and the columns of a unit's row of coefficients."""

    prepare: Any
    begin: Any
    beta: Any
    finish: Any
    load: Any
    coefficients: int


@functools.cache
def _library() -> ctypes.CDLL:
    return cuda_library.load()


@functools.cache
def _kernels(optimizer: str) -> _Kernels:
    def function(kind: str) -> Any:
        return getattr(_library(), f"adamem_{optimizer}_{kind}")

    return _Kernels(
        prepare=function("prepare"),
        begin=function("begin"),
        beta=function("beta"),
        finish=function("finish"),
        load=function("load"),
        coefficients=function("columns")(),
    )


def _call(function: Any, *args: Any) -> None:
    """Calls a function of the library; structs go by reference."""
    error = function(*(ctypes.byref(a) if isinstance(a, ctypes.Structure) else a for a in args))
    if error != 0:
        raise RuntimeError(f"{function.__name__}: {_error_text(error)}")


def _error_text(error: int) -> str:
    function = _library().adamem_error
    function.restype = ctypes.c_char_p
    message: bytes = function(error)
    return message.decode()


@contextmanager
def _on(device: torch.device) -> Iterator[ctypes.c_void_p]:
    """Makes the device the current one; gives the stream to launch on."""
    with torch.cuda.device(device):
        yield ctypes.c_void_p(torch.cuda.current_stream(device).cuda_stream)


# ---- begin and finish -----------------------------------------------------------------


def _bucket(bucket: Bucket) -> _Bucket:
    codes = [_DTYPES[dtype] for dtype in bucket.dtypes]
    # AM-SGD has one memory; its kernels do not look at a second.
    codes += codes[-1:] * (4 - len(codes))
    dtypes = (ctypes.c_int32 * 4)(*codes)
    return _Bucket(bucket.first_chunk, bucket.chunks, bucket.row, bucket.low, dtypes)


def _check_low(bucket: Bucket) -> None:
    """Raises TypeError where there are no kernels for what is stored in few bits."""
    param, _, *memories = bucket.dtypes
    known = [_DTYPES[dtype] for dtype in _LOW_MEMORIES.get(param, ())]
    found = {_DTYPES[dtype] for dtype in memories}
    if bucket.low and not (len(found) == 1 and found <= set(known)):
        raise TypeError(
            f"the cuda backend does not take memories of {memories} beside a {param} parameter, "
            "where one of them is stored in few bits"
        )


def _float(scalar: Tensor | None) -> Tensor | None:
    return None if scalar is None else scalar.to(torch.float32)


def _float_or_double(scalar: Tensor | None) -> Tensor | None:
    is_double = scalar is not None and scalar.dtype == torch.float64
    return scalar if is_double else _float(scalar)


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _step(
    batch: Batch,
    tables: Tables,
    part: int,
    rows: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> _Step:
    layout = tables.layout
    return _Step(
        addresses=tables.addresses.data_ptr(),
        layout=layout.table.data_ptr(),
        hypers=tables.hypers.data_ptr(),
        lrs=tables.lrs.data_ptr(),
        chunk_units=layout.chunk_units.data_ptr(),
        partials=layout.partials.data_ptr(),
        arrived=layout.arrived.data_ptr(),
        rows=_address(rows),
        coefficients=layout.coefficients.data_ptr(),
        grad_scale=tagged_address(grad_scale),
        found_inf=_address(found_inf),
        tensors=len(batch.params),
        units=layout.units,
        device=batch.params[0].device.index or 0,
        part=part,
    )


@functools.cache
def _longest_row(device: torch.device) -> int:
    """How many elements a row may have that a block takes in one reading."""
    longest = ctypes.c_int()
    _call(_library().adamem_longest_row, device.index or 0, ctypes.byref(longest))
    return longest.value


def _open(batch: Batch, kernels: _Kernels, updated: bool) -> Opened:
    chunk, longest_row = _library().adamem_chunk(), _longest_row(batch.params[0].device)
    opened = open_tables(batch, chunk, longest_row, kernels.coefficients, updated)
    layout = opened.tables.layout
    if batch.cache.get("loaded") is not layout:
        # Before a step is captured in a CUDA graph: a new layout is refused then.
        device = batch.params[0].device.index or 0
        for bucket in layout.buckets:
            _check_low(bucket)
            _call(kernels.load, _bucket(bucket), device)
        for run in layout.runs:
            _call(_library().adamem_squares_load, _DTYPES[run.grad], device)
        batch.cache["loaded"] = layout
    return opened


def _empty_rows(batch: Batch) -> Tensor:
    segments = sum(map(Tensor.numel, batch.betas))
    return torch.empty(segments, 2, dtype=torch.float64, device=batch.params[0].device)


def _begin(
    batch: Batch, kernels: _Kernels, grad_scale: Tensor | None, found_inf: Tensor | None
) -> Tensor:
    device = batch.params[0].device
    rows = _empty_rows(batch)
    grad_scale, found_inf = _float_or_double(grad_scale), _float(found_inf)
    with _on(device) as stream:
        # Kept to the end of the launches: it owns the copies that they read.
        opened = _open(batch, kernels, updated=False)
        step = _step(batch, opened.tables, _BEGIN, rows, grad_scale, found_inf)
        _launch_begin(kernels, step, opened, stream)
        if isinstance(batch, AdamWBatch):
            opened.store(batch)
    return rows


def _launch_begin(kernels: _Kernels, step: _Step, opened: Opened, stream: Any) -> None:
    _call(kernels.prepare, step, stream)
    for bucket in opened.tables.layout.buckets:
        _call(kernels.begin, step, _bucket(bucket), stream)


def _finish(
    batch: Batch,
    kernels: _Kernels,
    rows: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    device = batch.params[0].device
    given = rows is not None
    if rows is not None:
        check_rows(rows, batch)
        rows = rows.contiguous()
    elif any(batch.shared):
        rows = _empty_rows(batch)
    grad_scale, found_inf = _float_or_double(grad_scale), _float(found_inf)
    with _on(device) as stream:
        opened = _open(batch, kernels, updated=True)
        part = _FINISH if given else _WHOLE
        step = _step(batch, opened.tables, part, rows, grad_scale, found_inf)
        if given:
            _call(kernels.prepare, step, stream)
        else:
            _launch_begin(kernels, step, opened, stream)
            if rows is not None:
                lists = 2 + len(batch.memories)
                columns = opened.tables.hypers.numel() // len(batch.hypers)
                _call(_library().adamem_share_rows, step, lists, columns, stream)
        if rows is not None:
            _call(kernels.beta, step, stream)
        for bucket in reversed(opened.tables.layout.buckets):
            if given or bucket.row == 0:
                _call(kernels.finish, step, _bucket(bucket), stream)
        opened.store(batch)


def _squared_norms(batch: Batch) -> Tensor:
    device = batch.params[0].device
    norms = torch.empty(len(batch.params), dtype=torch.float64, device=device)
    kernels = _kernels("adamw" if isinstance(batch, AdamWBatch) else "sgd")
    with _on(device) as stream:
        opened = _open(batch, kernels, updated=False)
        layout = opened.tables.layout
        step = _step(batch, opened.tables, _BEGIN, None, None, None)
        for run in reversed(layout.runs):
            run_chunks = ctypes.c_int64(run.first_chunk), ctypes.c_int64(run.chunks)
            _call(_library().adamem_squares, step, *run_chunks, _DTYPES[run.grad], stream)
        chunks, result = (ctypes.c_void_p(t.data_ptr()) for t in (layout.tensor_chunks, norms))
        _call(_library().adamem_squared_norms, step, chunks, result, stream)
    return norms


# ---- the backend ----------------------------------------------------------------------
# torch.compile and make_fx trace the operators of ops.py, as the cpu backend calls them. Their
# kernels for CUDA tensors are in operators.py.


def squared_norms(batch: Batch) -> Tensor:
    """The sum of each gradient's squares, [tensors] float64."""
    if torch.compiler.is_compiling() or ops.is_traced():
        return cpu.squared_norms(batch)
    return _squared_norms(batch)


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64; updates where it guesses."""
    if torch.compiler.is_compiling() or ops.is_traced():
        return cpu.adamw_begin(batch, grad_scale, found_inf)
    return _begin(batch, _kernels("adamw"), grad_scale, found_inf)


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    if torch.compiler.is_compiling() or ops.is_traced():
        cpu.adamw_finish(batch, rows, grad_scale, found_inf)
    else:
        _finish(batch, _kernels("adamw"), rows, grad_scale, found_inf)


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64. Writes nothing else."""
    if torch.compiler.is_compiling() or ops.is_traced():
        return cpu.sgd_begin(batch, grad_scale, found_inf)
    return _begin(batch, _kernels("sgd"), grad_scale, found_inf)


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    if torch.compiler.is_compiling() or ops.is_traced():
        cpu.sgd_finish(batch, rows, grad_scale, found_inf)
    else:
        _finish(batch, _kernels("sgd"), rows, grad_scale, found_inf)
