"""The triton backend: the kernels of triton_kernels/, for tensors on a GPU.

A step is three launches, whatever the number of tensors: prepare, a program a unit (a tensor, or a
row that no program can hold); begin, a program a chunk; finish, for what the guess has missed, and
for units that do not guess. Each further combination of dtypes takes one more of begin and of
finish. Tensors whose rows have betas take one launch in the place of these two, for each
combination of dtypes and each power of two that their rows' length is rounded up to. The squared
norms of the gradients are two launches before all that, and one more for each further dtype of
gradients.

Where num and den are asked for, or a beta is shared by tensors, sums and beta come between begin
and finish. Tensors whose rows have betas are read once in each half, if num and den are asked for.
Where no beta is shared, both ways give the same bits. No program waits for another. Strided tensors
take copies. Nothing is read back from the device, a step can be captured in a CUDA graph, and two
runs give the same bits.

It has run on an H100 (bench/results/nvidia-h100-80gb-hbm3/notes.md; what is stored in few bits
for its results, and not yet for its time), and on no other GPU: for those it was tested under
Triton's interpreter, which TRITON_INTERPRET=1 turns on and which takes tensors on the CPU, and
compiled ahead of time for sm_80, sm_90, sm_100 and gfx942.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

# torch.compiler.disable, but without importing torch._dynamo, which takes seconds, at once.
from torch._compile import _disable_dynamo

from adamem_fused.backends import batch as batches
from adamem_fused.backends import ops
from adamem_fused.backends.batch import AdamWBatch, Batch, SGDBatch, check_rows
from adamem_fused.backends.tables import Bucket, Opened, Tables, is_capturing, open_tables

name = "triton"
fused = True
shares_sums = True
packs = True


def _is_interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def unavailable(device: torch.device) -> str | None:
    """Why this backend cannot be used for tensors on `device`, or None."""
    if device.type != "cuda" and not (device.type == "cpu" and _is_interpreted()):
        return f"it works on tensors on a GPU, and these are on {device}"
    if device.type == "cuda" and _is_interpreted():
        return "TRITON_INTERPRET=1 is set, and Triton's interpreter takes tensors on the CPU"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; pip install triton"
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        if major < 8:
            return f"it needs compute capability 8.0 or newer, and {device} has {major}.{minor}"
    return None


# What is of triton is imported late: it takes its time, and is not there everywhere.


@functools.cache
def _kernel(name: str) -> Any:
    from adamem_fused.triton_kernels import kernels

    return getattr(kernels, name)


@functools.cache
def _config(device: torch.device) -> Any:
    from adamem_fused.triton_kernels.config import config_for

    if device.type == "cpu":
        return config_for("interpreter", 0)
    vendor = "cuda" if torch.version.hip is None else "hip"
    return config_for(vendor, torch.cuda.get_device_capability(device)[0])


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs run at a time."""
    each: int = _config(device).programs
    if device.type == "cpu":
        return each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _names() -> dict[torch.dtype, Any]:
    """What Triton calls the dtypes."""
    import triton.language as tl

    return {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
        torch.int8: tl.int8,
        torch.uint8: tl.uint8,
    }


@functools.cache
def _dtypes(dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    """The constants of a bucket's dtypes, and that of the arithmetic."""
    import triton.language as tl

    names = _names()
    param, grad, *memories = (names[dtype] for dtype in dtypes)
    arithmetic = tl.float64 if tl.float64 in (param, *memories) else tl.float32
    return {
        "PARAM": param,
        "GRAD": grad,
        "MEMORY": memories[0],
        "SQUARE": memories[-1],
        "T": arithmetic,
    }


def _refuse(*args: Any, fn: Any, **kwargs: Any) -> bool:
    """In the place of Triton's hook before it compiles."""
    raise RuntimeError(
        f"a step is being captured in a CUDA graph, and {fn.name} is not compiled for it: take a "
        "step with the same dtypes and options outside of the graph first, with weight decay, "
        "max_grad_norm, grad_scale and found_inf if the captured one has them"
    )


def _launch(name: str, programs: int, arguments: dict[str, Any], **options: Any) -> None:
    """Launches a kernel with those of the arguments that it takes.

    Raises:
        RuntimeError: in a CUDA graph's capture, where it would have to be compiled and loaded.
    """
    from triton import knobs

    kernel = _kernel(name)
    own = {key: arguments[key] for key in kernel.arg_names}
    # Multiply-adds are written out: kernels that share formulas give the same bits.
    options["enable_fp_fusion"] = False
    if not is_capturing(arguments["partials"].device):
        kernel[(programs,)](**own, **options)
        return
    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = _refuse
        kernel[(programs,)](**own, **options)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _refuse_tracing() -> None:
    if ops.is_traced():
        raise RuntimeError(
            "a step of the triton backend cannot be traced by make_fx, nor taken with fake "
            'tensors: pass backend="cuda" or backend="foreach"'
        )


def _open(batch: Batch, updated: bool) -> Opened:
    _refuse_tracing()
    config, coefficients = _config(batch.params[0].device), _kernel("COEFFICIENTS").value
    return open_tables(batch, config.chunk, config.longest_row, coefficients, updated)


def _arguments(
    batch: Batch,
    tables: Tables,
    rows: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> dict[str, Any]:
    """What kernels take, by name; `_of_bucket` has the rest."""
    layout, config = tables.layout, _config(batch.params[0].device)
    return {
        "addresses": tables.addresses,
        "layout": layout.table,
        "hypers": tables.hypers,
        "lrs": tables.lrs,
        "chunk_units": layout.chunk_units,
        "arrived": layout.arrived,
        "partials": layout.partials,
        "tensor_chunks": layout.tensor_chunks,
        "totals": layout.totals,
        "rows": rows,
        "coefficients": layout.coefficients,
        "grad_scale": grad_scale,
        "found_inf": found_inf,
        "n": len(batch.params),
        "units": layout.units,
        "chunks": layout.chunks,
        "ADAMW": isinstance(batch, AdamWBatch),
        # Whether beta waits for more than a unit's own sums; whether that of rows does.
        "SEAM": rows is not None or any(batch.shared),
        "ROWS_SEAM": rows is not None,
        # Whether the sums have to read the parameters.
        "DECAY": any(h.weight_decay != 0 for h in batch.hypers),
        "STRETCHED": layout.stretched,
        "CHUNK": config.chunk,
        "PARTIALS": config.partials,
    }


def _of_bucket(bucket: Bucket) -> dict[str, Any]:
    return {
        "first_chunk": bucket.first_chunk,
        "last_chunk": bucket.first_chunk + bucket.chunks - 1,
        "LOW": bucket.low,
        **_dtypes(bucket.dtypes),
    }


def _launch_chunks(
    name: str, batch: Batch, tables: Tables, arguments: dict[str, Any], programs: int | None = None
) -> None:
    """begin or finish, over the chunks of ordinary units."""
    config = _config(batch.params[0].device)
    for bucket in tables.layout.buckets:
        if bucket.row > 0:
            continue
        own = _of_bucket(bucket)
        _launch(
            name,
            min(bucket.chunks, programs or bucket.chunks),
            {**arguments, **own, "BLOCK": config.block_of(own["T"])},
            **config.options(own["T"]),
        )


def _launch_rows(half: str, batch: Batch, tables: Tables, arguments: dict[str, Any]) -> None:
    """Those of WHOLE, BEGIN and FINISH, over the chunks of units of rows."""
    config = _config(batch.params[0].device)
    for bucket in tables.layout.buckets:
        if bucket.row == 0:
            continue
        own = _of_bucket(bucket)
        tile, options = config.tile_of(bucket.row, own["T"])
        own |= {"PASS": _kernel(half).value, "HEIGHT": tile // bucket.row, "WIDTH": bucket.row}
        _launch("am_rows", bucket.chunks, {**arguments, **own}, **options)


def _launch_begin(half: str, batch: Batch, tables: Tables, arguments: dict[str, Any]) -> None:
    _launch("am_prepare", tables.layout.units, arguments, num_warps=1)
    _launch_chunks("am_begin", batch, tables, arguments)
    _launch_rows(half, batch, tables, arguments)


def _begin(batch: Batch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    device, n = batch.params[0].device, sum(map(Tensor.numel, batch.betas))
    rows = torch.empty(n, 2, dtype=torch.float64, device=device)
    with _on(device):
        # Kept to the end of the launches: it owns the copies that they read.
        opened = _open(batch, updated=False)
        tables = opened.tables
        arguments = _arguments(batch, tables, rows, grad_scale, found_inf)
        _launch_begin("BEGIN", batch, tables, arguments)
        _launch("sum_rows", tables.layout.units, arguments, num_warps=_config(device).num_warps)
        if isinstance(batch, AdamWBatch):
            opened.store(batch)  # of tensors that do not guess what they were
    return rows


def _finish(
    batch: Batch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    device = batch.params[0].device
    if rows is not None:
        check_rows(rows, batch)
        rows = rows.contiguous()
    with _on(device):
        opened = _open(batch, updated=True)
        tables = opened.tables
        arguments = _arguments(batch, tables, rows, grad_scale, found_inf)
        if rows is None:
            _launch_begin("WHOLE", batch, tables, arguments)
        num_warps = _config(device).num_warps
        if any(batch.shared) and rows is None:
            _launch("sum_shared", 1, arguments, num_warps=num_warps)
        if arguments["SEAM"]:
            _launch("am_beta", tables.layout.units, arguments, num_warps=num_warps)
        if rows is not None:
            _launch_rows("FINISH", batch, tables, arguments)
        _launch_chunks("am_finish", batch, tables, arguments, _programs(device))
        opened.store(batch)


def _squared_norms(batch: Batch) -> Tensor:
    device = batch.params[0].device
    norms = torch.empty(len(batch.params), dtype=torch.float64, device=device)
    with _on(device):
        opened = _open(batch, updated=False)
        layout, config = opened.tables.layout, _config(device)
        arguments = {**_arguments(batch, opened.tables, None, None, None), "norms": norms}
        for run in reversed(layout.runs):
            dtype = _names()[run.grad]
            own = {"first_chunk": run.first_chunk, "GRAD": dtype, "BLOCK": config.block_of(dtype)}
            _launch("am_squares", run.chunks, {**arguments, **own}, num_warps=config.num_warps)
        _launch("sum_squares", len(batch.params), arguments, num_warps=config.num_warps)
    return norms


# torch.compile breaks its graph at a step of this backend: there is nothing in it to trace.


@_disable_dynamo
def check(batch: Batch) -> None:
    """Raises what a step of the batch would raise."""
    _refuse_tracing()
    batches.check(batch)


@_disable_dynamo
def squared_norms(batch: Batch) -> Tensor:
    """The sum of each gradient's squares, [tensors] float64."""
    return _squared_norms(batch)


@_disable_dynamo
def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64; updates where a guess is made."""
    return _begin(batch, grad_scale, found_inf)


@_disable_dynamo
def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    _finish(batch, rows, grad_scale, found_inf)


@_disable_dynamo
def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2] float64. Writes nothing else."""
    return _begin(batch, grad_scale, found_inf)


@_disable_dynamo
def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows, and the rest of the step; all of the step, if there are none."""
    _finish(batch, rows, grad_scale, found_inf)
