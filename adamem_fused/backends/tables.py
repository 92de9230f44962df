"""The tables through which the Triton and the CUDA kernels find a step's tensors.

What has coefficients, and a column of the layout, is a unit: a tensor, or, of one whose rows have
betas and are longer than a block can hold, each of its rows. The elements of an ordinary unit,
which is one segment, are divided into chunks; those of a unit of rows into runs of whole rows, of
about as many elements.

What depends on the tensors' shapes and dtypes (`Layout`) is made once; the addresses are
looked at every step and uploaded when one has changed. Nothing that was uploaded is ever
written to again, so a step that a CUDA graph has captured keeps its own.
"""

from __future__ import annotations

import math
from array import array
from itertools import chain, groupby
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamem_fused.backends import ops
from adamem_fused.backends.batch import (
    GRADS,
    STRETCH,
    AdamWHyper,
    Batch,
    SGDHyper,
    check,
    segment_slices,
)


class Bucket(NamedTuple):
    """Units of one combination of dtypes, and their chunks, which lie side by side."""

    dtypes: tuple[torch.dtype, ...]  # of param, grad and memories
    row: int  # a power of 2 that the longest of their rows has at most; 0: of ordinary units
    low: bool  # something of them is stored in few bits: `Packed.is_low`
    first_chunk: int
    chunks: int


class Run(NamedTuple):
    """Chunks that lie side by side, of buckets whose gradients have one dtype."""

    grad: torch.dtype
    first_chunk: int
    chunks: int


NO_ROWS = -1


class _Unit(NamedTuple):
    tensor: int
    row: int  # of an ordinary unit: which of its tensor's rows it is; 0 where it is all of it
    rows: int  # NO_ROWS: an ordinary unit
    numel: int  # elements of the segment, or of a row
    first_segment: int  # in the seam's rows

    def count_chunks(self, chunk: int) -> int:
        if self.rows != NO_ROWS:
            return -(-self.rows // max(1, chunk // max(1, self.numel)))
        return -(-self.numel // chunk)


def _units(batch: Batch, longest_row: int) -> list[_Unit]:
    """longest_row: elements of the longest that a block can hold; half as many in float64."""
    units = []
    for i, (param, beta, place, *memories) in enumerate(
        zip(
            batch.params,
            batch.betas,
            segment_slices(batch),
            *batch.memories.values(),
            strict=True,
        )
    ):
        if beta.dim() == 0:
            units.append(_Unit(i, 0, NO_ROWS, param.numel(), place.start))
            continue
        row = param.numel() // max(1, beta.numel())
        is_wide = any(tensor.dtype == torch.float64 for tensor in (param, *memories))
        if row > (longest_row // 2 if is_wide else longest_row):
            units += [_Unit(i, k, NO_ROWS, row, place.start + k) for k in range(beta.numel())]
        else:
            units.append(_Unit(i, 0, beta.numel(), row, place.start))
    return units


def _data_lists(batch: Batch) -> tuple[list[Tensor], ...]:
    """params, grads and the memories, without the scalars."""
    return batch.lists()[: 2 + len(batch.memories)]


class Description(NamedTuple):
    """What tables are made of, hyperparameters aside."""

    addresses: bytes  # of the tensors, list by list, in words of 64 bits
    structure: Any  # all else about them: dtypes, devices, shapes and strides
    group_sizes: list[int]
    rounding: int | None  # of what is packed: which table of `Packed.rounding` it is


def describe(batch: Batch, last: Description | None = None, updated: bool = False) -> Description:
    """What the batch's tables are made of; in the objects of the last step, where it is the same.

    In C++, where the extension is there, it takes a tenth of the time.

    updated: by kernels that autograd does not know of. It is told by the versions of parameters
    and state, so that a graph that needs their old values raises. It is not where a CUDA graph
    replays the step.
    """
    lists = batch.all_lists()
    rounding = None if batch.packed is None else id(batch.packed.rounding)
    if ops.extension is not None:
        known = (b"", b"") if last is None else last[:2]
        addresses, structure = ops.extension.describe(lists, *known, updated)
        return Description(addresses, structure, batch.group_sizes, rounding)
    if updated:
        _tell_autograd(batch)
    addresses = b"".join(array("q", map(Tensor.data_ptr, tensors)) for tensors in lists)
    # By attribute and not by tensor: thousands of tuples would set off the garbage collector.
    attributes = map(attrgetter, ("dtype", "device", "layout", "shape"))
    others = [[list(map(get, tensors)) for tensors in lists] for get in attributes]
    strides = [list(map(Tensor.stride, tensors)) for tensors in lists]
    inference = [list(map(Tensor.is_inference, tensors)) for tensors in lists]
    return Description(addresses, (others, strides, inference), batch.group_sizes, rounding)


def _tell_autograd(batch: Batch) -> None:
    """Bumps the versions of what a step updates."""
    lists = batch.all_lists()
    updated = [*lists[0], *chain.from_iterable(lists[1 + GRADS :])]
    if ops.extension is not None:
        ops.extension.bump_versions(updated)
    else:
        torch.autograd.graph.increment_version(updated)


def _same_layout(tensor: Tensor, strides: tuple[int, ...]) -> bool:
    """Whether the strides are these. Those of dimensions of size 1 say nothing."""
    return tensor.numel() < 2 or all(
        size == 1 or a == b
        for size, a, b in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def upload(words: Tensor, device: torch.device, pinned: Tensor | None = None) -> Tensor:
    """A copy on the device, made in stream order and without a sync.

    torch does not hand a pinned block out again before the copies from it have run. A copy
    that is captured in a graph runs at every replay: its block has to be given, and kept.
    """
    if device.type == "cpu":
        return words
    if pinned is None:
        return words.pin_memory().to(device, non_blocking=True)
    return pinned.copy_(words).to(device, non_blocking=True)


class Layout:
    """Units, chunks, buckets and scratch memory for tensors of one structure."""

    def __init__(self, batch: Batch, chunk: int, longest_row: int, coefficients: int) -> None:
        check(batch)
        params = batch.params
        device = params[0].device
        data = _data_lists(batch)
        scalars = batch.lists()[len(data) :]
        self.dense = [_dense_strides(*own) for own in zip(params, batch.betas, strict=True)]
        # Tensors that do not lie as their dense parameter would, (list, place in it).
        self.strided = [
            (k, i)
            for k, tensors in enumerate(data)
            for i, tensor in enumerate(tensors)
            if not _same_layout(tensor, self.dense[i])
        ]
        units = _units(batch, longest_row)
        self.units = len(units)
        dtypes = [tuple(t.dtype for t in tensors) for tensors in zip(*data, strict=True)]
        packed = batch.packed
        low = [packed is not None and packed.is_low(batch, i) for i in range(len(params))]
        by_kind: dict[tuple[tuple[torch.dtype, ...], int, bool], list[int]] = {}
        for k, unit in enumerate(units):
            row = 0 if unit.rows == NO_ROWS else 1 << max(0, unit.numel - 1).bit_length()
            kind = dtypes[unit.tensor], row, low[unit.tensor]
            by_kind.setdefault(kind, []).append(k)
        counts = [unit.count_chunks(chunk) for unit in units]
        first_chunk = [0] * len(units)
        chunk_units: list[Tensor] = []
        self.buckets: list[Bucket] = []
        self.chunks = 0
        for (own, row, own_low), places in by_kind.items():
            begin = self.chunks
            for k in places:
                first_chunk[k] = self.chunks
                self.chunks += counts[k]
            # On the CPU whatever torch.set_default_device says, as all that is uploaded.
            repeats = torch.tensor([counts[k] for k in places], device="cpu")
            chunk_units.append(
                torch.tensor(places, dtype=torch.int32, device="cpu").repeat_interleave(repeats)
            )
            if self.chunks > begin:
                self.buckets.append(Bucket(own, row, own_low, begin, self.chunks - begin))
        self.runs = _runs(self.buckets)
        # Those of a tensor's units lie side by side: its first one, and how many it has.
        tensor_chunks = [[0] * len(params) for _ in range(2)]
        for unit, first, count in zip(units, first_chunk, counts, strict=True):
            if tensor_chunks[1][unit.tensor] == 0:
                tensor_chunks[0][unit.tensor] = first
            tensor_chunks[1][unit.tensor] += count
        groups = [g for g, size in enumerate(batch.group_sizes) for _ in range(size)]
        doubles = [
            sum(1 << k for k, scalar in enumerate(own) if scalar.dtype == torch.float64)
            for own in zip(*scalars, strict=True)
        ]
        # Whether parameter and memories are stored in the type of the arithmetic, or, of what is
        # low, so that a guess may be made all the same.
        exact = [
            packed.may_guess(batch, i)
            if packed is not None and low[i]
            else own[0] in (torch.float32, torch.float64) and set(own[GRADS + 1 :]) == {own[0]}
            for i, own in enumerate(dtypes)
        ]
        # Held, so that its `id`, by which it is known, is no other's.
        self.rounding = None if packed is None else packed.rounding
        # Whether some tensor is a shard whose elements do not lie in one piece in the whole.
        self.stretched = packed is not None and bool(packed.rounding[STRETCH].any())
        rounding = _rounding_of(batch)
        columns = [
            (
                unit.numel,
                groups[unit.tensor],
                first,
                doubles[unit.tensor],
                exact[unit.tensor],
                unit.tensor,
                unit.row,
                unit.rows,
                unit.first_segment,
                *rounding[unit.tensor],
            )
            for unit, first in zip(units, first_chunk, strict=True)
        ]
        table = torch.tensor(columns, dtype=torch.int64, device="cpu").reshape(-1, LAYOUT_ROWS)
        self.table = upload(table.t().contiguous(), device)
        chunks_of = torch.tensor(tensor_chunks, dtype=torch.int64, device="cpu")
        self.tensor_chunks = upload(chunks_of, device)  # [2, tensors]
        nothing = torch.empty(0, dtype=torch.int32, device="cpu")
        self.chunk_units = upload(torch.cat([nothing, *chunk_units]), device)
        self.partials = torch.empty(2, self.chunks, dtype=torch.float64, device=device)
        # How many of a unit's chunks have their sums; back at 0 after a step.
        self.arrived = torch.zeros(self.units, dtype=torch.int32, device=device)
        self.totals = torch.empty(2, dtype=torch.float64, device=device)
        self.coefficients = torch.empty(
            self.units, coefficients, dtype=torch.float64, device=device
        )
        # Pinned words for the upload of a step that a graph captures, see `_upload`.
        self.spare: Tensor | None = None


def _runs(buckets: list[Bucket]) -> list[Run]:
    runs = []
    for grad, own in groupby(buckets, key=lambda bucket: bucket.dtypes[GRADS]):
        first, *others = own
        chunks = first.chunks + sum(bucket.chunks for bucket in others)
        runs.append(Run(grad, first.first_chunk, chunks))
    return runs


# Rows of the layout: those of csrc/cuda/tables.h and triton_kernels/tables.py.
LAYOUT_ROWS = 15


def _rounding_of(batch: Batch) -> list[tuple[int, ...]]:
    """Each tensor's column of `Packed.rounding`, and the length of its blocks; 0: it has none."""
    packed = batch.packed
    if packed is None:
        return [(0,) * 6] * len(batch.params)
    blocks = [
        next((param.numel() // own.numel() for own in scales if own.numel() > 0), 0)
        for param, *scales in zip(batch.params, *packed.scales, strict=True)
    ]
    columns = packed.rounding.t().tolist()
    return [(*own, block) for own, block in zip(columns, blocks, strict=True)]


def _dense_strides(param: Tensor, beta: Tensor) -> tuple[int, ...]:
    """How a dense tensor of the parameter's kind lies; by rows, where these have betas."""
    strides = torch.empty_like(param, device="meta").stride()
    if beta.dim() == 0 or param.shape[0] < 2 or strides[0] * param.shape[0] == param.numel():
        return strides
    return torch.empty(param.shape, device="meta").stride()


def _hyper_values(h: AdamWHyper | SGDHyper, shared: bool) -> list[float]:
    """A group's line of the table of hyperparameters, as triton_kernels/elements.py has it."""
    lr = 0.0 if isinstance(h.lr, Tensor) else h.lr
    if isinstance(h, SGDHyper):
        return [lr, *map(float, h[1:]), float(shared)]
    log_beta2 = math.log(h.beta2) if h.beta2 > 0 else -math.inf
    return [lr, h.beta_max, h.beta2, log_beta2, *map(float, h[3:]), float(shared)]


def tagged_address(scalar: Any) -> int:
    """Twice the address of a scalar on the device, plus 1 for float64; 0 for what is no tensor."""
    if not isinstance(scalar, Tensor):
        return 0
    return 2 * scalar.data_ptr() + (scalar.dtype == torch.float64)


def _place_lr(h: Any, device: torch.device) -> Any:
    """The hyperparameters with a tensor lr as the kernels read it: on the device, of floats."""
    lr = h.lr
    if not isinstance(lr, Tensor):
        return h
    if lr.device.type == "cpu" and device.type != "cpu":
        return h._replace(lr=lr.item())  # on the host already: no sync
    dtype = torch.float64 if lr.dtype == torch.float64 else torch.float32
    return h._replace(lr=lr.to(device=device, dtype=dtype, non_blocking=True))


class Tables(NamedTuple):
    """The uploaded tables of one step's tensors."""

    layout: Layout
    description: Description
    content: tuple[bytes, ...]  # what was uploaded, to see whether it has changed
    addresses: Tensor  # [lists, tensors] int64; copies stand in for strided tensors
    lrs: Tensor  # [groups] int64
    hypers: Tensor  # [groups, columns] float64


class Opened(NamedTuple):
    """A step's tables, and the tensors that the kernels find through them."""

    tables: Tables
    lists: tuple[list[Tensor], ...]
    hypers: list[Any]  # an lr that was moved to the device has to live until the launches

    def store(self, batch: Batch) -> None:
        """Writes what was updated in copies back to the batch's tensors."""
        for k, i in self.tables.layout.strided:
            if k != GRADS:
                batch.all_lists()[k][i].copy_(self.lists[k][i])


def is_capturing(device: torch.device) -> bool:
    return device.type != "cpu" and torch.cuda.is_current_stream_capturing()


_NOT_PREPARED = (
    "a step is being captured in a CUDA graph, and its tables are not prepared: take a step with "
    "the same parameters outside of the graph first, one for each captured step whose gradients "
    "or options are others"
)


def open_tables(
    batch: Batch, chunk: int, longest_row: int, coefficients: int, updated: bool
) -> Opened:
    """The tables of this step's tensors, uploaded if anything in them has changed.

    Every tensor is looked at once a step, by whatever of it comes first: gradients are new ones at
    every step, and a parameter or its state may have been given other memory. What follows in the
    same step takes what the first has found, in a CUDA graph's capture too.

    updated: for what completes the step, and so tells autograd of it.
    """
    opened: Opened | None = batch.opened
    if opened is None:
        opened = _open(batch, chunk, longest_row, coefficients, updated)
    elif updated:
        _tell_autograd(batch)
    batch.opened = None if updated else opened
    return opened


def _open(batch: Batch, chunk: int, longest_row: int, coefficients: int, updated: bool) -> Opened:
    device = batch.params[0].device
    capturing = is_capturing(device)
    last: Tables | None = batch.cache.get("tables")
    description = describe(batch, None if last is None else last.description, updated)
    if last is not None and description[1:] == last.description[1:]:
        layout = last.layout
    elif capturing:
        raise RuntimeError(_NOT_PREPARED)
    else:
        layout = Layout(batch, chunk, longest_row, coefficients)
    addresses = description.addresses
    lists = batch.all_lists()
    if layout.strided:
        lists = tuple(map(list, lists))
        own = memoryview(bytearray(addresses)).cast("q")
        for k, i in layout.strided:
            copy = torch.empty_strided(
                batch.params[i].shape, layout.dense[i], dtype=lists[k][i].dtype, device=device
            )
            lists[k][i] = copy.copy_(lists[k][i])
            own[k * len(batch.params) + i] = copy.data_ptr()
        addresses = own.tobytes()
    hypers = [_place_lr(h, device) for h in batch.hypers]
    lrs = array("q", [tagged_address(h.lr) for h in hypers])
    values = array("d", chain.from_iterable(map(_hyper_values, hypers, batch.shared)))
    content = addresses, lrs.tobytes(), values.tobytes()
    tables = last
    if tables is None or tables.layout is not layout or tables.content != content:
        words = _upload(b"".join(content), layout, batch)
        sizes = [len(lists) * len(batch.params), len(lrs), len(values)]
        on_device, lr_words, table = torch.split(words, sizes)
        tables = Tables(
            layout, description, content, on_device, lr_words, table.view(torch.float64)
        )
    if capturing:
        # What the graph is to upload is there once it is replayed: for no step but its own. It
        # reads the tables whenever it is replayed, whatever later steps bring. The tensors
        # that they lead to are the user's to keep, as with torch's optimizers; copies that stand
        # in for some are of the graph's own memory.
        batch.cache.setdefault("captured", []).append(tables)
        return Opened(tables, lists, hypers)
    batch.cache["tables"] = tables
    if device.type != "cpu" and layout.spare is None:
        count = tables.addresses.numel() + tables.lrs.numel() + tables.hypers.numel()
        layout.spare = torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=True)
    return Opened(tables, lists, hypers)


def _upload(content: bytes, layout: Layout, batch: Batch) -> Tensor:
    """One copy of all that changes from step to step, as words of 64 bits.

    Pinning memory is not allowed while a graph is captured, so a step that is not captured
    puts some aside. The graph copies from it at every replay.
    """
    device = batch.params[0].device
    host = torch.frombuffer(bytearray(content), dtype=torch.int64)
    if not is_capturing(device):
        return upload(host, device)
    pinned, layout.spare = layout.spare, None
    if pinned is None:
        raise RuntimeError(_NOT_PREPARED)
    batch.cache.setdefault("captured", []).append(pinned)
    return upload(host, device, pinned)
