"""The foreach backend: torch's own operations, for tensors on any device.

Pure Python, nothing to compile. Reads nothing back from the device, and needs no float64 on it.

A step of AM-AdamW is some 20 operations, each a pass over its operands. Small tensors are worked
on together, as one vector, and large ones in slices, so that on a CPU the operands stay in its
cache: memory is read once for the sums and the update, and twice (44 bytes a float32 parameter)
for tensors of several slices and where betas are shared. Where each row has a beta a slice is of
whole rows, and read once. Temporaries are of a slice's size.
On two cores a step takes 1.5 to 2.5 times as long as torch.optim.AdamW(foreach=True)'s, one of
AM-SGD as long; on other devices it is not measured.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamem_fused.backends.batch import (
    GRADS,
    AdamWBatch,
    AdamWHyper,
    Batch,
    Lr,
    SGDBatch,
    SGDHyper,
    bookkeeping_dtype,
    group_slices,
)
from adamem_fused.backends.batch import check as check

name = "foreach"
fused = False
shares_sums = False
packs = False


def unavailable(device: torch.device) -> str | None:
    """None: this backend works everywhere."""
    return None


# AM-SGD's den at a first step with a gradient, by dtype: a number that adds nothing to any other.
_FIRST_DEN = {torch.float64: 1e-300, torch.float32: 1e-37}


def squared_norms(batch: Batch) -> Tensor:
    """The sum of each gradient's squares, [tensors]; float64 where the device has it."""
    norms = torch._foreach_norm(batch.grads, 2, dtype=bookkeeping_dtype(batch.grads[0].device))
    return torch.stack(norms).square()


# ---- what is worked on at once -------------------------------------------------------


def _most_elements(device: torch.device) -> int:
    """Elements of a slice: on a CPU what its cache holds; elsewhere few operations count more.

    All of them where a compiler makes one loop of the operations.
    """
    if torch.compiler.is_compiling():
        return sys.maxsize
    return 2**19 if device.type == "cpu" else 2**21


def _most_small(device: torch.device) -> int:
    """Elements of tensors that are worked on together, for which they are copied."""
    return _most_elements(device) // 32


class _Chunk(NamedTuple):
    """What is worked on at once: small tensors, a large one, or rows of it that fit the cache."""

    tensors: list[int]  # indices in the batch
    rows: tuple[int, int] | None = None  # of the only tensor the first, and how many; None: all


class _Part(NamedTuple):
    """Tensors of one group and one dtype of arithmetic, whose segments are rows or themselves."""

    h: Any  # the group's hyperparameters
    dtype: torch.dtype
    by_row: bool
    chunks: list[_Chunk]
    tensors: list[int]  # indices in the batch, in the order of the chunks
    counts: list[int]  # how many segments each tensor has

    def chunk_counts(self) -> list[int]:
        """How many segments each chunk has."""
        own = dict(zip(self.tensors, self.counts, strict=True))
        return [
            chunk.rows[1] if chunk.rows is not None else sum(own[i] for i in chunk.tensors)
            for chunk in self.chunks
        ]

    def join(self, values: list[Tensor]) -> Tensor:
        """A vector over the segments from what each tensor has of them."""
        return torch.cat(values) if self.by_row else torch.stack(values)

    def split(self, vector: Tensor) -> Sequence[Tensor]:
        """`join`'s inverse."""
        return vector.split_with_sizes(self.counts) if self.by_row else vector.unbind()

    def spread(self, vector: Tensor) -> Tensor:
        """A vector over the segments from one over the tensors."""
        if not self.by_row:
            return vector
        return torch.cat(list(map(Tensor.expand, vector.unbind(), self.counts)))

    def every(self, vector: Tensor) -> Tensor:
        """Of which tensors each segment is true."""
        if not self.by_row:
            return vector
        return torch.stack([own.all() for own in self.split(vector)])


class _Piece(NamedTuple):
    """A chunk's tensors, or a slice of its only one: from each of a batch's lists.

    The lists are those of parameters, gradients and memories.
    """

    lists: list[list[Tensor]]
    # Where segments are rows: how many and how long, of neighbours with rows of one length.
    matrices: list[tuple[int, int]] | None


def _parts(batch: Batch) -> Iterator[_Part]:
    for group, place in enumerate(group_slices(batch)):
        by_kind: dict[tuple[torch.dtype, bool], list[int]] = {}
        for i in range(place.start, place.stop):
            dtype = torch.float32
            for tensors in (batch.params, *batch.memories.values()):
                dtype = torch.promote_types(dtype, tensors[i].dtype)
            by_kind.setdefault((dtype, batch.betas[i].dim() > 0), []).append(i)
        for (dtype, by_row), indices in by_kind.items():
            chunks = _chunks(batch.params, indices, by_row)
            # Of a tensor's chunks each follows the one before.
            ordered = list(dict.fromkeys(i for chunk in chunks for i in chunk.tensors))
            counts = [batch.betas[i].numel() for i in ordered]
            yield _Part(_hyper(batch, group), dtype, by_row, chunks, ordered, counts)


def _hyper(batch: Batch, group: int) -> Any:
    """A group's hyperparameters, with a number lr as a tensor in a step that is being compiled.

    torch 2.13's default compiler keeps the number of an earlier step where it divides.
    """
    h = batch.hypers[group]
    if isinstance(h.lr, Tensor) or not torch.compiler.is_compiling():
        return h
    device = batch.params[0].device
    return h._replace(lr=torch.full((), h.lr, dtype=bookkeeping_dtype(device), device=device))


def _chunks(params: list[Tensor], indices: list[int], by_row: bool) -> list[_Chunk]:
    """The indices by chunk, large tensors first."""
    chunks: list[_Chunk] = []
    most = _most_small(params[0].device)
    room = -1  # so that an empty tensor, too, begins a chunk
    # Rows of one length beside each other are one matrix.
    for i in sorted(indices, key=lambda i: _row(params[i])) if by_row else indices:
        numel = params[i].numel()
        if numel > most:
            chunks[:0] = _chunks_of_rows(i, params[i]) if by_row else [_Chunk([i])]
        elif numel > room:
            chunks.append(_Chunk([i]))
            room = most - numel
        else:
            chunks[-1].tensors.append(i)
            room -= numel
    return chunks


def _row(tensor: Tensor) -> int:
    """Elements of a row."""
    return math.prod(tensor.shape[1:])


def _chunks_of_rows(i: int, tensor: Tensor) -> list[_Chunk]:
    """As many rows as a slice holds, or else one, which is then read twice."""
    rows = tensor.shape[0]
    count = -(-rows // max(1, _most_elements(tensor.device) // _row(tensor)))
    bounds = [rows * k // count for k in range(count + 1)]
    return [_Chunk([i], (start, stop - start)) for start, stop in itertools.pairwise(bounds)]


def _pieces(batch: Batch, chunk: _Chunk, by_row: bool) -> list[_Piece]:
    """All of the chunk's tensors, or the slices of the only one."""
    tensors = (batch.params, batch.grads, *batch.memories.values())
    lists = [_pick(ts, chunk.tensors) for ts in tensors]
    if chunk.rows is not None:
        lists = [[tensor.narrow(0, *chunk.rows)] for (tensor,) in lists]
    if len(chunk.tensors) > 1:
        pieces = [lists]
    else:
        slices = zip(*(_slices(tensor) for (tensor,) in lists), strict=True)
        pieces = [[[tensor] for tensor in own] for own in slices]
    return [_Piece(lists, _matrices(lists[0]) if by_row else None) for lists in pieces]


def _matrices(tensors: list[Tensor]) -> list[tuple[int, int]]:
    matrices: list[tuple[int, int]] = []
    for tensor in tensors:
        rows, length = tensor.shape[0], _row(tensor)
        if matrices and matrices[-1][1] == length:
            rows += matrices.pop()[0]
        matrices.append((rows, length))
    return matrices


def _slices(tensor: Tensor) -> Sequence[Tensor]:
    """Views along the first dimension that is long enough, or else the longest."""
    count = -(-tensor.numel() // _most_elements(tensor.device))
    if count <= 1:
        return [tensor]
    dim = max(range(tensor.dim()), key=lambda k: min(tensor.shape[k], count))
    return tensor.tensor_split(min(tensor.shape[dim], count), dim)


def _pick(tensors: Sequence[Tensor], indices: list[int]) -> list[Tensor]:
    return [tensors[i] for i in indices]


def _is_in_place(tensors: list[Tensor], dtype: torch.dtype) -> bool:
    return len(tensors) == 1 and tensors[0].dtype == dtype and tensors[0].is_contiguous()


def _flat(tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The tensors' elements as one vector: a view where `_is_in_place`, else a copy."""
    if len(tensors) == 1:
        return tensors[0].contiguous().view(-1).to(dtype)
    return torch.cat([tensor.reshape(-1) for tensor in tensors]).to(dtype)


def _store(tensors: list[Tensor], flat: Tensor) -> None:
    if not _is_in_place(tensors, flat.dtype):
        values = map(Tensor.view_as, _by_tensor(flat, tensors), tensors)
        torch._foreach_copy_(tensors, list(values))


def _by_tensor(flat: Tensor, tensors: list[Tensor]) -> tuple[Tensor, ...]:
    return flat.split_with_sizes([tensor.numel() for tensor in tensors], -1)


def _by_segment(flat: Tensor, piece: _Piece) -> list[Tensor]:
    """Views of what is a segment, or of matrices whose rows are."""
    if piece.matrices is None:
        return list(_by_tensor(flat, piece.lists[0]))
    parts = flat.split_with_sizes([math.prod(shape) for shape in piece.matrices], -1)
    return [p.view(*p.shape[:-1], *shape) for p, shape in zip(parts, piece.matrices, strict=True)]


def _by_factor(values: Tensor, piece: _Piece) -> list[Tensor]:
    """What each of `_by_segment`'s views is to be scaled with."""
    if piece.matrices is None:
        return list(values.unbind())
    return list(values.unsqueeze(1).split_with_sizes([rows for rows, _ in piece.matrices]))


def _sums(pairs: list[tuple[Tensor, Tensor]], piece: _Piece) -> Tensor:
    """The sums of the pairs' products over each segment: [segments, pairs]."""
    if piece.lists[0][0].numel() <= _most_small(pairs[0][0].device):
        products = torch.stack([a * b for a, b in pairs])
        own = [products.sum(-1) for products in _by_segment(products, piece)]
        sums = torch.stack(own) if piece.matrices is None else torch.cat(own, 1).t()
    elif piece.matrices is None:
        sums = torch.stack([torch.dot(*pair) for pair in pairs]).unsqueeze(0)
    else:
        # torch.bmm and einsum take twice as long where rows are long, and sum less exactly.
        (shape,) = piece.matrices
        sums = torch.stack([(a * b).view(shape).sum(1) for a, b in pairs], 1)
    return sums.to(bookkeeping_dtype(sums.device))


def _scale(flat: Tensor, factors: Tensor, piece: _Piece) -> Tensor:
    """Multiplies each segment's elements by its own factor, in place."""
    views = _by_segment(flat, piece)
    torch._foreach_mul_(views, _by_factor(factors.to(flat.dtype), piece))
    return flat


# ---- scalars ------------------------------------------------------------------------

# Vectors with an element for each segment of a part.
_Columns = tuple[Tensor, ...]


def _lr(h: AdamWHyper | SGDHyper, like: Tensor) -> Lr:
    return h.lr.to(like) if isinstance(h.lr, Tensor) else h.lr


def _over_lr(lr: Lr, value: Tensor) -> Tensor:
    """value / lr, and 0 at lr = 0 or a rounding below, where the gap term is left out."""
    if isinstance(lr, Tensor):
        lr = lr.to(value)
        return torch.where(lr <= 0, 0.0, value / lr)
    return value / lr if lr > 0 else torch.zeros_like(value)


def _is_zero(lr: Lr, device: torch.device) -> Tensor | None:
    """Where lr may be 0, whether it is; None where it is not."""
    if isinstance(lr, Tensor):
        return lr.to(device) == 0
    return torch.ones((), dtype=torch.bool, device=device) if lr == 0 else None


def _is_nothing(rows: Tensor) -> Tensor:
    return rows.select(1, 1) == 0


def _idle(lr: Lr, is_first: Tensor, is_nothing: Tensor) -> Tensor | None:
    """Whose step is none: at lr 0 and without a gradient, before any other.

    None where no step can be, as the lr is not 0.
    """
    is_zero = _is_zero(lr, is_nothing.device)
    return None if is_zero is None else is_first & is_zero & is_nothing


def _pairs(
    h: AdamWHyper | SGDHyper, q: Tensor, g: Tensor, e: Tensor, eM: Tensor
) -> list[tuple[Tensor, Tensor]]:
    """What `_rows` takes the sums of products of."""
    # Without g where the gap's slope c_g g - c_d d is none, or a multiple of e.
    return [(q, e), (e, eM), *([(q, g)] if h.anchored == h.loss_gap else [])]


def _rows(sums: Tensor, ratio: Tensor, weight: float, h: AdamWHyper | SGDHyper) -> Tensor:
    """num = <ratio (c_g g - c_d d) - weight e, q> + den, and den, from <q, e>, den and <q, g>.

    The slope is (c_g - c_d) g - c_d e, which does not take the difference of two sums: d may be
    near g, and with the "anchored" plane c_g is c_d.
    """
    qe, den, *qg = sums.unbind(1)
    num = den - (ratio + weight if h.anchored else weight) * qe
    if qg:
        num = num + (-ratio if h.anchored else ratio) * qg[0]
    return torch.stack([num, den], 1)


def _clip_beta(rows: Tensor, beta_max: float) -> Tensor:
    num, den = rows.unbind(1)
    return torch.where((den == 0) | den.isposinf(), 0.0, (num / den).clamp(0, beta_max))


def _step_x(x: Tensor, step: Tensor, lr: Lr) -> None:
    """x = x - lr step."""
    if isinstance(lr, Tensor):
        x.sub_(step * lr.to(x))
    else:
        x.add_(step, alpha=-lr)


# ---- a step -------------------------------------------------------------------------


def _columns(
    part: _Part, lists: Sequence[list[Tensor]], join: Callable[[list[Tensor]], Tensor]
) -> list[Tensor]:
    """The scalars of each list as a vector, over the part's tensors or its segments."""
    dtype = bookkeeping_dtype(lists[0][0].device)
    return [join(_pick(scalars, part.tensors)).to(dtype) for scalars in lists]


def _steps(
    kind: Any,
    part: _Part,
    grad_scale: Tensor | None,
    t: Tensor,
    prev_lr: Tensor,
    *beta_prod: Tensor,
) -> Iterator[_AdamW | _SGD]:
    """A step for each chunk, of the kind `_AdamW` or `_SGD`."""
    vectors = kind.columns(part.h, part.spread(t), part.spread(prev_lr), *beta_prod)
    counts = part.chunk_counts()
    for own in zip(*(vector.split_with_sizes(counts) for vector in vectors), strict=True):
        yield kind(part.h, part.dtype, grad_scale, *own)


def _begin_chunk(step: _AdamW | _SGD, pieces: list[_Piece]) -> Tensor:
    """num and den of its segments. Writes nothing."""
    rows = [step.rows(piece, step.terms(piece, in_place=False)) for piece in pieces]
    return torch.stack(rows).sum(0)


def _finish_piece(
    step: _AdamW | _SGD, piece: _Piece, rows: Tensor | None, skipped: Tensor | None
) -> Tensor:
    """Updates the piece with the rows, its own where none are given, and returns them."""
    written = [tensor for k, ts in enumerate(piece.lists) if k != GRADS for tensor in ts]
    before = [] if skipped is None else list(map(torch.clone, written))
    terms = step.terms(piece, in_place=True)
    rows = step.rows(piece, terms) if rows is None else rows
    step.update(piece, terms, rows)
    if skipped is not None:
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(torch.where(skipped, old, tensor))
    return rows


def _is_skipped(found_inf: Tensor | None) -> Tensor | None:
    return None if found_inf is None else found_inf.reshape(()) != 0


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return b if a is None else a if b is None else a | b


def _gradient(g: Tensor, h: AdamWHyper | SGDHyper, grad_scale: Tensor | None) -> Tensor:
    if grad_scale is None:
        return -g if h.maximize else g
    factor = (-1.0 if h.maximize else 1.0) / grad_scale.to(bookkeeping_dtype(g.device))
    return g * factor.to(g)


def _begin(batch: Batch, kind: Any, grad_scale: Tensor | None) -> Tensor:
    check(batch)
    rows: dict[int, Tensor] = {}
    for part in _parts(batch):
        scalars = _columns(part, batch.scalars, torch.stack)
        *beta_prod, _ = _columns(part, batch.row_scalars, part.join)
        steps = _steps(kind, part, grad_scale, *scalars, *beta_prod)
        own = [
            _begin_chunk(step, _pieces(batch, chunk, part.by_row))
            for step, chunk in zip(steps, part.chunks, strict=True)
        ]
        by_tensor = torch.cat(own).split_with_sizes(part.counts)
        rows.update(zip(part.tensors, by_tensor, strict=True))
    # An index on the host would make a GPU's step wait.
    return torch.cat([rows[i] for i in range(len(rows))])


def _finish(
    batch: Batch,
    rows: Tensor | None,
    kind: Any,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    given = None
    if rows is None:
        check(batch)
    else:
        given = rows.split_with_sizes([beta.numel() for beta in batch.betas])
    for part in _parts(batch):
        own: Sequence[Tensor | None] = [None] * len(part.chunks)
        if given is not None:
            own = torch.cat(_pick(given, part.tensors)).split_with_sizes(part.chunk_counts())
        _finish_part(batch, part, own, kind, grad_scale, _is_skipped(found_inf))


def _finish_part(
    batch: Batch,
    part: _Part,
    rows: Sequence[Tensor | None],
    kind: Any,
    grad_scale: Tensor | None,
    skipped: Tensor | None,
) -> None:
    t, prev_lr = _columns(part, batch.scalars, torch.stack)
    *beta_prod, last_beta = _columns(part, batch.row_scalars, part.join)
    steps = _steps(kind, part, grad_scale, t, prev_lr, *beta_prod)
    betas, used = [], []
    for step, chunk, own in zip(steps, part.chunks, rows, strict=True):
        pieces = _pieces(batch, chunk, part.by_row)
        if own is None and len(pieces) > 1:
            own = _begin_chunk(step, pieces)
        own, *_ = [_finish_piece(step, piece, own, skipped) for piece in pieces]
        betas.append(step.beta(own))
        used.append(own)
    beta, lr = torch.cat(betas), torch.zeros_like(prev_lr) + _lr(part.h, prev_lr)
    is_first, is_nothing = t == 0, _is_nothing(torch.cat(used))
    idle = _either(_idle(part.h.lr, part.spread(is_first), is_nothing), skipped)
    new = [*(prod * beta for prod in beta_prod), beta]
    _store_scalars(part, batch.row_scalars, part.split, [*beta_prod, last_beta], new, idle)
    if idle is not None:
        idle = _either(_idle(part.h.lr, is_first, part.every(is_nothing)), skipped)
    _store_scalars(part, batch.scalars, Tensor.unbind, [t, prev_lr], [t + 1, lr], idle)


def _store_scalars(
    part: _Part,
    lists: Sequence[list[Tensor]],
    split: Callable[[Tensor], Sequence[Tensor]],
    old: list[Tensor],
    new: list[Tensor],
    idle: Tensor | None,
) -> None:
    if idle is not None:
        new = [torch.where(idle, *both) for both in zip(old, new, strict=True)]
    for scalars, vector in zip(lists, new, strict=True):
        torch._foreach_copy_(_pick(scalars, part.tensors), list(split(vector)))


# ---- AM-AdamW ---------------------------------------------------------------------


class _AdamW(NamedTuple):
    """A chunk's step: its hyperparameters, and vectors with an element for each segment."""

    h: AdamWHyper
    dtype: torch.dtype
    grad_scale: Tensor | None
    is_first: Tensor
    ratio: Tensor  # (1 + mu eta) prev_lr / eta
    root_scale: Tensor  # bias_correction1 / sqrt(bias_correction2)
    eps: Tensor  # times bias_correction1

    @classmethod
    def columns(cls, h: AdamWHyper, t: Tensor, prev_lr: Tensor, beta_prod: Tensor) -> _Columns:
        # The bias corrections without the difference of two numbers that are near 1.
        bias_correction1 = (1 - beta_prod) * h.beta_max + (1 - h.beta_max)
        log_beta2 = math.log(h.beta2) if h.beta2 > 0 else -math.inf
        bias_correction2 = -torch.expm1((t + 1) * log_beta2)
        return (
            t == 0,
            _over_lr(h.lr, prev_lr) * (1 + h.weight_decay * _lr(h, t)),
            bias_correction1 / bias_correction2.sqrt(),
            bias_correction1 * h.eps,
        )

    def terms(self, piece: _Piece, in_place: bool) -> list[Tensor]:
        """x, g, d, the new v, P, e and e M. in_place: v may replace the old one."""
        x, g, d, v = (_flat(tensors, self.dtype) for tensors in piece.lists)
        g = _gradient(g, self.h, self.grad_scale)
        v = v.mul_(self.h.beta2) if in_place else v * self.h.beta2
        v.addcmul_(g, g, value=1 - self.h.beta2)
        # P = bias_correction1 (sqrt(v / bias_correction2) + eps)
        P = _scale(v.sqrt(), self.root_scale, piece)
        torch._foreach_add_(_by_segment(P, piece), _by_factor(self.eps.to(P.dtype), piece))
        e = d - g
        # M = 1 / (P (1 + lambda P))
        return [x, g, d, v, P, e, e / torch.addcmul(P, P, P, value=self.h.memory_lambda)]

    def rows(self, piece: _Piece, terms: list[Tensor]) -> Tensor:
        """num = <ratio (c_g g - c_d d) - e, d / P + mu x> + den    den = <e, e M>"""
        x, g, d, _, P, e, eM = terms
        q = d / P
        if self.h.weight_decay != 0:
            q.add_(x, alpha=self.h.weight_decay)
        return _rows(_sums(_pairs(self.h, q, g, e, eM), piece), self.ratio, 1.0, self.h)

    def beta(self, rows: Tensor) -> Tensor:
        return torch.where(self.is_first, self.h.beta_max, _clip_beta(rows, self.h.beta_max))

    def update(self, piece: _Piece, terms: list[Tensor], rows: Tensor) -> None:
        x, _, d, v, P, e, eM = terms
        # d = ((1 - beta) g + (beta + lambda P) d) / (1 + lambda P) = d - (1 - beta) e M P
        take = 1 - self.beta(rows)
        if self.h.memory_lambda == 0:  # M P is 1 without a rounding: a memory that is dropped is 0
            d.sub_(_scale(e, take, piece))
        else:
            d.addcmul_(_scale(eM, take, piece), P, value=-1)
        # x = (1 - eta mu) x - eta d / P
        if self.h.weight_decay != 0:
            x.mul_(1 - self.h.weight_decay * _lr(self.h, x))
        _step_x(x, d / P, self.h.lr)
        params, _, *memories = piece.lists
        for tensors, flat in zip((params, *memories), (x, d, v), strict=True):
            _store(tensors, flat)


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2]. Writes nothing else."""
    return _begin(batch, _AdamW, grad_scale)


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _finish(batch, rows, _AdamW, grad_scale, found_inf)


# ---- AM-SGD -----------------------------------------------------------------------


class _SGD(NamedTuple):
    """A chunk's step: its hyperparameters, and vectors with an element for each segment."""

    h: SGDHyper
    dtype: torch.dtype
    grad_scale: Tensor | None
    is_first: Tensor
    ratio: Tensor  # (1 + lambda) prev_lr / eta

    @classmethod
    def columns(cls, h: SGDHyper, t: Tensor, prev_lr: Tensor) -> _Columns:
        return t == 0, _over_lr(h.lr, prev_lr) * (1 + h.memory_lambda)

    def terms(self, piece: _Piece, in_place: bool) -> list[Tensor]:
        """x, g without and with the weight decay, and d."""
        x, own_g, d = (_flat(tensors, self.dtype) for tensors in piece.lists)
        own_g = _gradient(own_g, self.h, self.grad_scale)
        mu = self.h.weight_decay
        # Not 0 times an x that may be infinite.
        return [x, own_g, own_g.add(x, alpha=mu) if mu != 0 else own_g, d]

    def rows(self, piece: _Piece, terms: list[Tensor]) -> Tensor:
        """num = <ratio (c_g g - c_d d) - (1 + lambda) e, d> + den    den = <e, e>"""
        x, own_g, g, d = terms
        mu = self.h.weight_decay
        # Where mu x is larger than the gradient, g has lost digits that are left in d - g.
        e = d.sub(x, alpha=mu).sub_(own_g) if mu != 0 else d - g
        sums = _sums(_pairs(self.h, d, g, e, e), piece)
        rows = _rows(sums, self.ratio, 1 + self.h.memory_lambda, self.h)
        # A first step has no memory: d = g, and both sums are 0. Where the step may be idle, den
        # tells whether there is a gradient, by a number that adds nothing to any other.
        first = torch.zeros_like(rows)
        is_zero = _is_zero(self.h.lr, rows.device)
        if is_zero is not None:
            own_e = d - own_g
            has_gradient = _sums([(own_e, own_e)], piece).select(1, 0) != 0
            first_den = (is_zero & has_gradient).to(rows.dtype) * _FIRST_DEN[rows.dtype]
            first = torch.stack([torch.zeros_like(first_den), first_den], 1)
        return torch.where(self.is_first.unsqueeze(1), first, rows)

    def beta(self, rows: Tensor) -> Tensor:
        return torch.where(self.is_first, 0.0, _clip_beta(rows, self.h.beta_max))

    def update(self, piece: _Piece, terms: list[Tensor], rows: Tensor) -> None:
        x, _, g, d = terms
        # d = ((beta + lambda) d + (1 - beta) g) / (1 + lambda), and g at the first step
        beta, damping = self.beta(rows), 1 + self.h.memory_lambda
        keep = torch.where(self.is_first, 0.0, (beta + self.h.memory_lambda) / damping)
        take = torch.where(self.is_first, 1.0, (1 - beta) / damping)
        idle = _idle(self.h.lr, self.is_first, _is_nothing(rows))
        if idle is not None:
            keep, take = torch.where(idle, 1.0, keep), torch.where(idle, 0.0, take)
        _scale(d, keep, piece).add_(_scale(g.clone(), take, piece))
        _step_x(x, d, self.h.lr)
        params, _, memory = piece.lists
        _store(params, x)
        _store(memory, d)


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every segment, [segments, 2]. Writes nothing else."""
    return _begin(batch, _SGD, grad_scale)


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _finish(batch, rows, _SGD, grad_scale, found_inf)
