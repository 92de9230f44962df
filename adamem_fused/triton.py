"""The triton backend: the kernels of triton_kernels/, for tensors on a GPU.

A step is three launches, whatever the number of tensors: stats, beta, apply; a fourth adds
up the sums of tensors that share one beta. Each further combination of dtypes takes one more
of stats and of apply, and strided tensors take copies. Nothing is read back from the device,
a step can be captured in a CUDA graph, and two runs give the same bits.

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

from adamem_fused.batch import AdamWBatch, Batch, SGDBatch, check_rows
from adamem_fused.tables import Opened, Tables, open_tables

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
    sum_rows: Any
    sum_shared: Any
    hypers: int  # columns of the table
    coefficients: int  # that beta leaves apply for each tensor


# Imported late: triton takes its time, and is not there everywhere.


@functools.cache
def _adamw() -> _Kernels:
    from adamem_fused.triton_kernels import kernels as k

    return _Kernels(
        stats=k.adamw_stats,
        beta=k.adamw_beta,
        apply=k.adamw_apply,
        sum_rows=k.sum_rows,
        sum_shared=k.sum_shared,
        hypers=k.ADAMW_HYPERS.value,
        coefficients=k.ADAMW_COEFFICIENTS.value,
    )


@functools.cache
def _sgd() -> _Kernels:
    from adamem_fused.triton_kernels import kernels as k

    return _Kernels(
        stats=k.sgd_stats,
        beta=k.sgd_beta,
        apply=k.sgd_apply,
        sum_rows=k.sum_rows,
        sum_shared=k.sum_shared,
        hypers=k.SGD_HYPERS.value,
        coefficients=k.SGD_COEFFICIENTS.value,
    )


@functools.cache
def _config(device: torch.device) -> Any:
    from adamem_fused.triton_kernels.config import config_for

    if device.type == "cpu":
        return config_for("interpreter", 0)
    vendor = "cuda" if torch.version.hip is None else "hip"
    return config_for(vendor, torch.cuda.get_device_capability(device)[0])


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
    param, _, *memories = dtypes
    return (
        *(names[dtype] for dtype in dtypes),
        tl.float64 if torch.float64 in (param, *memories) else tl.float32,
    )


def _launch(kernel: Any, programs: int, *args: Any, **options: Any) -> None:
    kernel[(programs,)](*args, **options)


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device."""
    return nullcontext() if device.type == "cpu" else torch.cuda.device(device)


def _open(batch: Batch, kernels: _Kernels) -> Opened:
    return open_tables(batch, _config(batch.params[0].device).chunk, kernels.coefficients)


def _launch_stats(
    batch: Batch, kernels: _Kernels, tables: Tables, grad_scale: Tensor | None
) -> None:
    layout, config = tables.layout, _config(batch.params[0].device)
    decay = any(h.weight_decay != 0 for h in batch.hypers)
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
            DECAY=decay,
            CHUNK=config.chunk,
            BLOCK=config.block,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
        )


def _stats(batch: Batch, kernels: _Kernels, grad_scale: Tensor | None) -> Tensor:
    device, n = batch.params[0].device, len(batch.params)
    rows = torch.empty(n, 2, dtype=torch.float64, device=device)
    with _on(device):
        # Kept to the end of the launches: it owns the copies that they read.
        opened = _open(batch, kernels)
        tables = opened.tables
        _launch_stats(batch, kernels, tables, grad_scale)
        _launch(
            kernels.sum_rows,
            n,
            tables.layout.table,
            tables.layout.partials,
            rows,
            n,
            tables.layout.chunks,
            CHUNK=_config(device).chunk,
            PARTIALS=_config(device).partials,
            num_warps=1,
        )
    return rows


def _apply(
    batch: Batch,
    kernels: _Kernels,
    rows: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    device, n = batch.params[0].device, len(batch.params)
    if rows is not None:
        check_rows(rows, batch.params)
    config = _config(device)
    with _on(device):
        opened = _open(batch, kernels)
        tables, layout = opened.tables, opened.tables.layout
        if rows is None:
            _launch_stats(batch, kernels, tables, grad_scale)
            if any(batch.shared):
                _launch(
                    kernels.sum_shared,
                    1,
                    layout.table,
                    tables.hypers,
                    layout.chunk_tensors,
                    layout.partials,
                    layout.totals,
                    n,
                    layout.chunks,
                    COLUMNS=kernels.hypers,
                    PARTIALS=config.shared_partials,
                    num_warps=config.num_warps,
                )
        _launch(
            kernels.beta,
            n,
            tables.addresses,
            layout.table,
            tables.hypers,
            tables.lrs,
            layout.partials,
            layout.totals,
            None if rows is None else rows.contiguous(),
            layout.coefficients,
            grad_scale,
            found_inf,
            n,
            layout.chunks,
            CHUNK=config.chunk,
            PARTIALS=config.partials,
            # One warp: no other can read a scalar after this one wrote it.
            num_warps=1,
        )
        # Backwards, as the stats kernel's last chunks are the ones that L2 still holds.
        # Predicted, not measured yet: with a launch of stats before all of apply, that spares
        # the second read of as much as L2 holds (some 40 MB of an H100's 50), at 16 of 44
        # bytes an element. Lists that fit L2 come near the 28 bytes of one pass; of GPT-2
        # small's 2 GB it is 2 in 100.
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
                CHUNK=config.chunk,
                BLOCK=config.block,
                STAGES=config.num_stages,
                num_warps=config.num_warps,
            )
        opened.store(batch)


def adamw_stats(batch: AdamWBatch, grad_scale: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    return _stats(batch, _adamw(), grad_scale)


def adamw_apply(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _apply(batch, _adamw(), rows, grad_scale, found_inf)


def sgd_stats(batch: SGDBatch, grad_scale: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2] float64. Writes nothing else."""
    return _stats(batch, _sgd(), grad_scale)


def sgd_apply(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _apply(batch, _sgd(), rows, grad_scale, found_inf)
