"""The foreach backend: torch's own operations, for tensors on any device.

Pure Python, nothing to compile. Reads nothing back from the device, and needs no float64 on it.

A step of AM-AdamW is some 20 operations, each a pass over its operands. Small tensors are worked
on together, as one vector, and large ones in slices, so that on a CPU the operands stay in its
cache: memory is read once for the sums and the update, and twice (44 bytes a float32 parameter)
for tensors of several slices and where betas are shared. Temporaries are of a slice's size.
On two cores a step takes 1.5 to 2.5 times as long as torch.optim.AdamW(foreach=True)'s, one of
AM-SGD as long; on other devices it is not measured.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from adamem_fused.backends.batch import (
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


def unavailable(device: torch.device) -> str | None:
    """None: this backend works everywhere."""
    return None


# AM-SGD's den at a first step with a gradient, by dtype: a number that adds nothing to any other.
_FIRST_DEN = {torch.float64: 1e-300, torch.float32: 1e-37}


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


# Small tensors, or a slice of one: from each of a batch's lists (parameters, gradients, memories).
_Piece = list[list[Tensor]]


class _Part(NamedTuple):
    """Tensors of one group and one dtype of arithmetic."""

    h: Any  # the group's hyperparameters
    dtype: torch.dtype
    chunks: list[list[int]]  # indices in the batch: of small tensors, or of one that is not


def _parts(batch: Batch) -> Iterator[_Part]:
    for group, place in enumerate(group_slices(batch)):
        by_dtype: dict[torch.dtype, list[int]] = {}
        for i in range(place.start, place.stop):
            dtype = torch.float32
            for tensors in (batch.params, *batch.memories.values()):
                dtype = torch.promote_types(dtype, tensors[i].dtype)
            by_dtype.setdefault(dtype, []).append(i)
        for dtype, indices in by_dtype.items():
            yield _Part(_hyper(batch, group), dtype, _chunks(batch.params, indices))


def _hyper(batch: Batch, group: int) -> Any:
    """A group's hyperparameters, with a number lr as a tensor in a step that is being compiled.

    torch 2.13's default compiler keeps the number of an earlier step where it divides.
    """
    h = batch.hypers[group]
    if isinstance(h.lr, Tensor) or not torch.compiler.is_compiling():
        return h
    device = batch.params[0].device
    return h._replace(lr=torch.full((), h.lr, dtype=bookkeeping_dtype(device), device=device))


def _chunks(params: list[Tensor], indices: list[int]) -> list[list[int]]:
    """The indices by chunk, large tensors first."""
    chunks: list[list[int]] = []
    most = _most_small(params[0].device)
    room = -1  # so that an empty tensor, too, begins a chunk
    for i in indices:
        numel = params[i].numel()
        if numel > most:
            chunks.insert(0, [i])
        elif numel > room:
            chunks.append([i])
            room = most - numel
        else:
            chunks[-1].append(i)
            room -= numel
    return chunks


def _pieces(batch: Batch, chunk: list[int]) -> list[_Piece]:
    """All of the chunk's tensors, or the slices of the only one."""
    lists = [_pick(ts, chunk) for ts in (batch.params, batch.grads, *batch.memories.values())]
    if len(chunk) > 1:
        return [lists]
    slices = zip(*(_slices(tensor) for (tensor,) in lists), strict=True)
    return [[[tensor] for tensor in piece] for piece in slices]


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


def _sums(pairs: list[tuple[Tensor, Tensor]], piece: _Piece) -> Tensor:
    """The sums of the pairs' products over each tensor: [tensors, pairs]."""
    if piece[0][0].numel() > _most_small(pairs[0][0].device):
        sums = torch.stack([torch.dot(*pair) for pair in pairs]).unsqueeze(0)
    else:
        products = torch.stack([a * b for a, b in pairs])
        sums = torch.stack([own.sum(1) for own in _by_tensor(products, piece[0])])
    return sums.to(bookkeeping_dtype(sums.device))


def _scale(flat: Tensor, factors: Tensor, piece: _Piece) -> Tensor:
    """Multiplies each tensor's elements by its own factor, in place."""
    torch._foreach_mul_(_by_tensor(flat, piece[0]), factors.to(flat.dtype).unbind())
    return flat


# ---- scalars ------------------------------------------------------------------------

# Vectors with an element for each tensor of a part.
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


def _idle(lr: Lr, is_first: Tensor, rows: Tensor) -> Tensor | None:
    """Which tensors' step is none: at lr 0 and without a gradient, before any other.

    None where no step can be, as the lr is not 0.
    """
    is_zero = _is_zero(lr, rows.device)
    return None if is_zero is None else is_first & is_zero & (rows.select(1, 1) == 0)


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


def _scalars(batch: Batch, part: _Part) -> list[list[Tensor]]:
    """The scalar state in the order of the chunks: steps, maybe beta_prods, prev_lrs, betas."""
    indices = [i for chunk in part.chunks for i in chunk]
    return [_pick(tensors, indices) for tensors in batch.lists()[2 + len(batch.memories) :]]


def _columns(scalars: list[list[Tensor]]) -> list[Tensor]:
    dtype = bookkeeping_dtype(scalars[0][0].device)
    return [torch.stack(tensors).to(dtype) for tensors in scalars]


def _steps(kind: Any, part: _Part, columns: Sequence[Tensor]) -> Iterator[_AdamW | _SGD]:
    """A step for each chunk, of the kind `_AdamW` or `_SGD`."""
    sizes = [len(chunk) for chunk in part.chunks]
    vectors = kind.columns(part.h, *columns[:-1])
    for own in zip(*(vector.split_with_sizes(sizes) for vector in vectors), strict=True):
        yield kind(part.h, part.dtype, *own)


def _begin_chunk(step: _AdamW | _SGD, pieces: list[_Piece]) -> Tensor:
    """num and den of its tensors. Writes nothing."""
    rows = [step.rows(piece, step.terms(piece, in_place=False)) for piece in pieces]
    return torch.stack(rows).sum(0)


def _finish_piece(step: _AdamW | _SGD, piece: _Piece, rows: Tensor | None) -> Tensor:
    """Updates the piece with the rows, its own where none are given, and returns them."""
    terms = step.terms(piece, in_place=True)
    rows = step.rows(piece, terms) if rows is None else rows
    step.update(piece, terms, rows)
    return rows


def _begin(batch: Batch, kind: Any) -> Tensor:
    check(batch)
    rows: dict[int, Tensor] = {}
    for part in _parts(batch):
        steps = _steps(kind, part, _columns(_scalars(batch, part)))
        for step, chunk in zip(steps, part.chunks, strict=True):
            own = _begin_chunk(step, _pieces(batch, chunk))
            rows.update(zip(chunk, own.unbind(), strict=True))
    # An index on the host would make a GPU's step wait.
    return torch.stack([rows[i] for i in range(len(rows))])


def _finish(batch: Batch, rows: Tensor | None, kind: Any) -> None:
    if rows is None:
        check(batch)
    given = None if rows is None else rows.unbind()
    for part in _parts(batch):
        scalars = _scalars(batch, part)
        columns = _columns(scalars)
        betas, used = [], []
        steps = _steps(kind, part, columns)
        for step, chunk in zip(steps, part.chunks, strict=True):
            pieces = _pieces(batch, chunk)
            own = None if given is None else torch.stack(_pick(given, chunk))
            if own is None and len(pieces) > 1:
                own = _begin_chunk(step, pieces)
            own, *_ = [_finish_piece(step, piece, own) for piece in pieces]
            betas.append(step.beta(own))
            used.append(own)
        t, *beta_prod, prev_lr, _ = columns
        beta, lr = torch.cat(betas), torch.zeros_like(prev_lr) + _lr(part.h, prev_lr)
        new = [t + 1, *(prod * beta for prod in beta_prod), lr, beta]
        idle = _idle(part.h.lr, t == 0, torch.cat(used))
        if idle is not None:
            new = [torch.where(idle, *both) for both in zip(columns, new, strict=True)]
        for tensors, column in zip(scalars, new, strict=True):
            torch._foreach_copy_(tensors, column.unbind())


# ---- AM-AdamW ---------------------------------------------------------------------


class _AdamW(NamedTuple):
    """A chunk's step: its hyperparameters, and vectors with an element for each tensor."""

    h: AdamWHyper
    dtype: torch.dtype
    is_first: Tensor
    ratio: Tensor  # (1 + mu eta) prev_lr / eta
    root_scale: Tensor  # bias_correction1 / sqrt(bias_correction2)
    eps: Tensor  # times bias_correction1

    @classmethod
    def columns(cls, h: AdamWHyper, step: Tensor, beta_prod: Tensor, prev_lr: Tensor) -> _Columns:
        # The bias corrections without the difference of two numbers that are near 1.
        bias_correction1 = (1 - beta_prod) * h.beta_max + (1 - h.beta_max)
        log_beta2 = math.log(h.beta2) if h.beta2 > 0 else -math.inf
        bias_correction2 = -torch.expm1((step + 1) * log_beta2)
        return (
            step == 0,
            _over_lr(h.lr, prev_lr) * (1 + h.weight_decay * _lr(h, step)),
            bias_correction1 / bias_correction2.sqrt(),
            bias_correction1 * h.eps,
        )

    def terms(self, piece: _Piece, in_place: bool) -> list[Tensor]:
        """x, g, d, the new v, P, e and e M. in_place: v may replace the old one."""
        x, g, d, v = (_flat(tensors, self.dtype) for tensors in piece)
        g = -g if self.h.maximize else g
        v = v.mul_(self.h.beta2) if in_place else v * self.h.beta2
        v.addcmul_(g, g, value=1 - self.h.beta2)
        # P = bias_correction1 (sqrt(v / bias_correction2) + eps)
        P = _scale(v.sqrt(), self.root_scale, piece)
        torch._foreach_add_(_by_tensor(P, piece[0]), self.eps.to(P.dtype).unbind())
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
        x, _, d, v, P, _, eM = terms
        # d = ((1 - beta) g + (beta + lambda P) d) / (1 + lambda P) = d - (1 - beta) e M P
        d.addcmul_(_scale(eM, 1 - self.beta(rows), piece), P, value=-1)
        # x = (1 - eta mu) x - eta d / P
        if self.h.weight_decay != 0:
            x.mul_(1 - self.h.weight_decay * _lr(self.h, x))
        _step_x(x, d / P, self.h.lr)
        for tensors, flat in zip((piece[0], *piece[2:]), (x, d, v), strict=True):
            _store(tensors, flat)


def adamw_begin(batch: AdamWBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2]. Writes nothing else."""
    return _begin(batch, _AdamW)


def adamw_finish(
    batch: AdamWBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _finish(batch, rows, _AdamW)


# ---- AM-SGD -----------------------------------------------------------------------


class _SGD(NamedTuple):
    """A chunk's step: its hyperparameters, and vectors with an element for each tensor."""

    h: SGDHyper
    dtype: torch.dtype
    is_first: Tensor
    ratio: Tensor  # (1 + lambda) prev_lr / eta

    @classmethod
    def columns(cls, h: SGDHyper, step: Tensor, prev_lr: Tensor) -> _Columns:
        return step == 0, _over_lr(h.lr, prev_lr) * (1 + h.memory_lambda)

    def terms(self, piece: _Piece, in_place: bool) -> list[Tensor]:
        """x, g without and with the weight decay, and d."""
        x, own_g, d = (_flat(tensors, self.dtype) for tensors in piece)
        own_g = -own_g if self.h.maximize else own_g
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
        idle = _idle(self.h.lr, self.is_first, rows)
        if idle is not None:
            keep, take = torch.where(idle, 1.0, keep), torch.where(idle, 0.0, take)
        _scale(d, keep, piece).add_(_scale(g.clone(), take, piece))
        _step_x(x, d, self.h.lr)
        _store(piece[0], x)
        _store(piece[2], d)


def sgd_begin(batch: SGDBatch, grad_scale: Tensor | None, found_inf: Tensor | None) -> Tensor:
    """num and den of every tensor, [tensors, 2]. Writes nothing else."""
    return _begin(batch, _SGD)


def sgd_finish(
    batch: SGDBatch, rows: Tensor | None, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    """Beta from the rows (their own, if None); updates parameters and state in place."""
    _finish(batch, rows, _SGD)
