"""The triton backend: the kernels of triton_kernels/, for tensors on a GPU.

Where no tensor's beta waits for another's, a step is one launch, whatever the number of tensors,
made to read most tensors from memory once (schedule.py; config.py has what was predicted of it).
With rows, or a beta that tensors share, it is four: stats, the sums of rows or those that are
shared, beta, apply. Both ways give the same bits. Each further combination of dtypes takes one
more of step, of stats and of apply, and strided tensors take copies. Nothing is read back from
the device, a step can be captured in a CUDA graph, and two runs give the same bits.

Not yet run on a GPU. It was tested under Triton's interpreter, which TRITON_INTERPRET=1 turns
on and which takes tensors on the CPU, and compiled ahead of time for sm_80, sm_90, sm_100 and
gfx942.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

# torch.compiler.disable, but without importing torch._dynamo, which takes seconds, at once.
from torch._compile import _disable_dynamo

from adamem_fused.backends import ops, schedule
from adamem_fused.backends.batch import AdamWBatch, Batch, SGDBatch, check_rows
from adamem_fused.backends.batch import check as check
from adamem_fused.backends.schedule import Plan
from adamem_fused.backends.tables import Bucket, Layout, Opened, Tables, is_capturing, open_tables

name = "triton"
fused = True
shares_sums = True


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


class _Kernels(NamedTuple):
    """An optimizer's kernels. The sums of partial sums are the same for both."""

    stats: Any
    beta: Any
    apply: Any
    step: Any
    sum_rows: Any
    sum_shared: Any
    hypers: int  # columns of the table
    coefficients: int  # that beta leaves apply for each tensor


# Imported late: triton takes its time, and is not there everywhere.


@functools.cache
def _adamw() -> _Kernels:
    from adamem_fused.triton_kernels import adamw, sums, tables

    return _Kernels(
        stats=adamw.adamw_stats,
        beta=adamw.adamw_beta,
        apply=adamw.adamw_apply,
        step=adamw.adamw_step,
        sum_rows=sums.sum_rows,
        sum_shared=sums.sum_shared,
        hypers=tables.ADAMW_HYPERS.value,
        coefficients=adamw.COEFFICIENTS.value,
    )


@functools.cache
def _sgd() -> _Kernels:
    from adamem_fused.triton_kernels import sgd, sums, tables

    return _Kernels(
        stats=sgd.sgd_stats,
        beta=sgd.sgd_beta,
        apply=sgd.sgd_apply,
        step=sgd.sgd_step,
        sum_rows=sums.sum_rows,
        sum_shared=sums.sum_shared,
        hypers=tables.SGD_HYPERS.value,
        coefficients=sgd.COEFFICIENTS.value,
    )


@functools.cache
def _config(device: torch.device) -> Any:
    from adamem_fused.triton_kernels.config import config_for

    if device.type == "cpu":
        return config_for("interpreter", 0)
    vendor = "cuda" if torch.version.hip is None else "hip"
    return config_for(vendor, torch.cuda.get_device_capability(device)[0])


@functools.cache
def _programs(device: torch.device) -> int:
    """How many programs of the step kernel are to run at a time."""
    each: int = _config(device).programs
    if device.type == "cpu":
        return each
    return each * torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _arithmetic(dtypes: tuple[torch.dtype, ...]) -> tuple[Any, ...]:
    """Triton's names for a bucket's dtypes, and that of the arithmetic."""
    import triton.language as tl

    names = {
        torch.float32: tl.float32,
        torch.float64: tl.float64,
        torch.bfloat16: tl.bfloat16,
        torch.float16: tl.float16,
    }
    return (*(names[dtype] for dtype in dtypes), tl.float64 if _float64(dtypes) else tl.float32)


def _float64(dtypes: tuple[torch.dtype, ...]) -> bool:
    param, _, *memories = dtypes
    return torch.float64 in (param, *memories)


def _refuse(*args: Any, fn: Any, **kwargs: Any) -> bool:
    """In the place of Triton's hook before it compiles."""
    raise RuntimeError(
        f"a step is being captured in a CUDA graph, and {fn.name} is not compiled for it: take a "
        "step with the same dtypes and options outside of the graph first, with weight decay, "
        "grad_scale and found_inf if the captured one has them"
    )


def _launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    """Launches a kernel.

    Raises:
        RuntimeError: in a CUDA graph's capture, where it would have to be compiled and loaded.
    """
    if not is_capturing(args[0].device):
        kernel[(programs,)](*args, **options)
        return
    from triton import knobs

    with knobs.runtime.scope():
        knobs.runtime.jit_cache_hook = _refuse
        kernel[(programs,)](*args, **options)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _open(batch: Batch, kernels: _Kernels, updated: bool, again: bool = False) -> Opened:
    if ops.is_traced():
        raise RuntimeError(
            "a step of the triton backend cannot be traced by make_fx, nor taken with fake "
            'tensors: pass backend="cuda" or backend="foreach"'
        )
    return open_tables(
        batch, _config(batch.params[0].device).chunk, kernels.coefficients, updated, again
    )


def _plan(batch: Batch, layout: Layout) -> Plan | None:
    device = batch.params[0].device

    def ahead(bucket: Bucket) -> int:
        return _programs(device)

    return schedule.find_plan(batch, layout, _config(device).chunk, ahead)


def _decay(batch: Batch) -> bool:
    """Whether the sums have to read the parameters."""
    return any(h.weight_decay != 0 for h in batch.hypers)


def _launch_step(
    batch: Batch,
    kernels: _Kernels,
    tables: Tables,
    plan: Plan,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    layout, device = tables.layout, batch.params[0].device
    config = _config(device)
    for bucket, items in zip(layout.buckets, plan.items, strict=True):
        _launch(
            kernels.step,
            min(len(items), _programs(device)),
            tables.addresses,
            layout.table,
            tables.hypers,
            tables.lrs,
            items,
            plan.control,
            layout.partials,
            layout.coefficients,
            grad_scale,
            found_inf,
            len(batch.params),
            layout.chunks,
            len(items),
            *_arithmetic(bucket.dtypes),
            DECAY=_decay(batch),
            **config.walk(_float64(bucket.dtypes)),
            PARTIALS=config.partials,
            **config.step_options(_float64(bucket.dtypes)),
        )


def _launch_stats(
    batch: Batch, kernels: _Kernels, tables: Tables, grad_scale: Tensor | None
) -> None:
    layout, config = tables.layout, _config(batch.params[0].device)
    for bucket in layout.buckets:
        _launch(
            kernels.stats,
            bucket.chunks,
            tables.addresses,
            layout.table,
            tables.hypers,
            tables.lrs,
            layout.chunk_tensors,
            layout.partials,
            grad_scale,
            len(batch.params),
            layout.chunks,
            bucket.first_chunk,
            *_arithmetic(bucket.dtypes),
            DECAY=_decay(batch),
            **config.walk(_float64(bucket.dtypes)),
            num_warps=config.num_warps,
        )


def _launch_shared(batch: Batch, kernels: _Kernels, tables: Tables) -> None:
    layout, config = tables.layout, _config(batch.params[0].device)
    _launch(
        kernels.sum_shared,
        1,
        layout.table,
        tables.hypers,
        layout.chunk_tensors,
        layout.partials,
        layout.totals,
        len(batch.params),
        layout.chunks,
        COLUMNS=kernels.hypers,
        PARTIALS=config.partials,
        num_warps=config.num_warps,
    )


def _launch_apply(
    batch: Batch,
    kernels: _Kernels,
    tables: Tables,
    rows: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    layout, n = tables.layout, len(batch.params)
    config = _config(batch.params[0].device)
    _launch(
        kernels.beta,
        n,
        tables.addresses,
        layout.table,
        tables.hypers,
        tables.lrs,
        layout.partials,
        layout.totals,
        rows,
        layout.coefficients,
        grad_scale,
        found_inf,
        n,
        layout.chunks,
        CHUNK=config.chunk,
        PARTIALS=config.partials,
        num_warps=config.num_warps,
    )
    # Backwards, as the stats kernel's last chunks are the ones that L2 still holds: it spares
    # the second read of as much as L2 holds.
    for bucket in reversed(layout.buckets):
        _launch(
            kernels.apply,
            bucket.chunks,
            tables.addresses,
            layout.table,
            layout.chunk_tensors,
            layout.coefficients,
            found_inf,
            n,
            bucket.first_chunk + bucket.chunks - 1,
            *_arithmetic(bucket.dtypes),
            **config.walk(_float64(bucket.dtypes)),
            num_warps=config.num_warps,
        )


def _stats(batch: Batch, kernels: _Kernels, grad_scale: Tensor | None) -> Tensor:
    device, n = batch.params[0].device, len(batch.params)
    rows = torch.empty(n, 2, dtype=torch.float64, device=device)
    config = _config(device)
    with _on(device):
        # Kept to the end of the launches: it owns the copies that they read.
        opened = _open(batch, kernels, updated=False)
        layout = opened.tables.layout
        _launch_stats(batch, kernels, opened.tables, grad_scale)
        _launch(
            kernels.sum_rows,
            n,
            layout.table,
            layout.partials,
            rows,
            n,
            layout.chunks,
            CHUNK=config.chunk,
            PARTIALS=config.partials,
            num_warps=config.num_warps,
        )
    return rows


def _apply(
    batch: Batch,
    kernels: _Kernels,
    rows: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    given = rows is not None
    if rows is not None:
        check_rows(rows, batch.params)
        rows = rows.contiguous()
    with _on(batch.params[0].device):
        opened = _open(batch, kernels, updated=True, again=given)
        tables = opened.tables
        alone = rows is None and not any(batch.shared)
        plan = _plan(batch, tables.layout) if alone else None
        if plan is not None:
            _launch_step(batch, kernels, tables, plan, grad_scale, found_inf)
        else:
            if rows is None:
                _launch_stats(batch, kernels, tables, grad_scale)
                if any(batch.shared):
                    _launch_shared(batch, kernels, tables)
            _launch_apply(batch, kernels, tables, rows, grad_scale, found_inf)
        opened.store(batch)


# torch.compile breaks its graph at a step of this backend: there is nothing in it to trace.


@_disable_dynamo
def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    return _stats(batch, _adamw(), grad_scale)


@_disable_dynamo
def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _apply(batch, _adamw(), rows, grad_scale, found_inf)


@_disable_dynamo
def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    return _stats(batch, _sgd(), grad_scale)


@_disable_dynamo
def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _apply(batch, _sgd(), rows, grad_scale, found_inf)
