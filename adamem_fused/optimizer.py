"""What AMAdamW and AMSGD share: collecting a step's tensors, the seam, state and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from operator import attrgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Size, Tensor
from torch.optim import Optimizer

from adamem_fused import backends, checkpoints, clipping, flat, flattened, sharding, storage
from adamem_fused.backends import Backend, ops
from adamem_fused.backends.batch import (
    FLOATING,
    GRADS,
    Batch,
    Lr,
    Packed,
    bookkeeping_dtype,
    group_slices,
)
from adamem_fused.backends.tables import is_capturing
from adamem_fused.metrics import Elements, Named, read_betas_by_name, read_metrics
from adamem_fused.options import ROUNDING, plain
from adamem_fused.seam import (
    Work,
    add_over_ranks,
    agree_on_first_steps,
    crossing,
    find_waiting,
    group_rows,
    may_be_zero,
    share_sums,
    sums_cross,
)
from adamem_fused.state import COMPLEX, beta_shape

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from adamem_fused.release import Released

ParamsT: TypeAlias = "Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"


def loss_value(loss: Any, giver: str) -> Tensor:
    """A loss as a 0-dim tensor, on its device or the CPU, for gap="loss"."""
    if not isinstance(loss, (Real, Tensor)) or (isinstance(loss, Tensor) and loss.numel() != 1):
        raise ValueError(f'gap="loss" needs a loss of one number, and {giver} {loss!r}')
    if isinstance(loss, Tensor):
        return loss.detach().to(bookkeeping_dtype(loss.device)).reshape(())
    return torch.tensor(float(loss), dtype=torch.float64, device="cpu")


def over_lr(value: Lr, lr: Lr) -> Lr:
    """value / lr, and 0 at lr = 0 or a scheduler's rounding below."""
    if isinstance(lr, Tensor):
        return torch.where(lr <= 0, 0.0, value / lr)
    return value / lr if lr > 0 else 0.0


def scalar_lr(lr: Lr) -> Lr:
    """lr as the backends take it: a 0-dim tensor, or a number that is no rounding below 0."""
    return lr.reshape(()) if isinstance(lr, Tensor) else max(lr, 0.0)


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, a view; a real one as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


# Of a parameter whose state has not been looked at.
_UNSEEN: tuple[Any, Any, frozenset[str]] = (None, None, frozenset())


@dataclass
class Kept:
    """What is kept from step to step of the same parameters."""

    # A backend's own, by its name, the device, `Work.crosses`, and whether the batch is packed.
    caches: dict[tuple[str, torch.device, bool, bool], dict[str, Any]] = field(default_factory=dict)
    # The specs of the last step's DTensors and of which of them the sums cross ranks, as the
    # extension's `gather` takes it.
    crossing: tuple[list[Any], bytes] = ([], b"")
    # How many parameters were in `_stored`, and in each group, when strangers were last let go.
    stored: list[int] = field(default_factory=list)


class AdaptiveMemoryOptimizer(Optimizer):
    """Base of AMAdamW and AMSGD. Holds no arithmetic.

    A subclass names its state and makes its batch; the step is then the same: collect the
    tensors that have a gradient, by backend and device; sum; let tensors that share one
    beta share their sums; finish.
    """

    # Names of the state: tensors like the parameter; scalars with their first value, and those of
    # them of which each row has one with beta_scope="row".
    memories: ClassVar[tuple[str, ...]]
    scalars: ClassVar[dict[str, float]]
    row_scalars: ClassVar[tuple[str, ...]]

    # Set by torch.amp.GradScaler for the time of a step.
    grad_scale: Tensor | None
    found_inf: Tensor | None

    # The norm to which all gradients together are clipped, and whether a step whose norm is not
    # finite is left out. May be set between steps.
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False

    _kept: Kept
    _readings: clipping.Readings | None
    _elements: dict[torch.device, Elements]
    # Parameters that were in groups with options of storage when they were last stepped or loaded:
    # the options and the dtype for which their state was seen to be right, and the names that it
    # then has. Such state is looked at again where one of them has changed.
    _stored: dict[Tensor, tuple[Any, Any, frozenset[str]]]
    # In a step: parameters whose state it has made or completed, and what they had before.
    _new_state: list[tuple[Tensor, dict[str, Any] | None]]

    # The shapes of the parameters it was given, and who made it as one of several.
    _given: flattened.Given
    _maker: str | None = None
    # Parameters that are parts of flat buffers.
    _flat: dict[Tensor, flat.Flat]

    # Where release_gradients lets backward passes take the steps.
    _released: Released | None = None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        max_grad_norm: float | None,
        skip_nonfinite: bool,
    ) -> None:
        clipping.check_options(max_grad_norm, skip_nonfinite)
        self.max_grad_norm, self.skip_nonfinite = max_grad_norm, skip_nonfinite
        self._forget()
        self._given = flattened.shapes([])
        self._flat = {}
        self._maker = flattened.find_maker()
        flattened.check_norm(self._maker, self._takes_norm)
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drops what is kept from step to step; the next step makes it anew."""
        self._kept = Kept()
        self._readings = None
        self._elements = {}
        self._new_state = []
        self._stored = {}
        if self._released is not None:
            self._released._forget()

    # ---- what a subclass gives ----------------------------------------------------

    def _check_group(self, group: dict[str, Any], slack: float = 0.0) -> None:
        """Raises ValueError on a bad value in a complete parameter group.

        slack: how far below 0 a number may be that a scheduler has left, see options.ROUNDING.
        """
        raise NotImplementedError

    def _new_batch(self, *lists: Any) -> Batch:
        """A batch without parameter groups; its lists are empty ones where none are given."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _begin(
        self, backend: Backend, batch: Any, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> Tensor:
        raise NotImplementedError

    def _finish(
        self,
        backend: Backend,
        batch: Any,
        rows: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        raise NotImplementedError

    def _loss_factor(self, hyper: Any) -> Lr:
        """What a difference of losses is multiplied with in num: c / eta, 0 at eta = 0."""
        raise NotImplementedError

    @staticmethod
    def _convert_state(
        param: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> dict[str, Any]:
        """A parameter's state as torch.optim's counterpart saves it, as this class's state."""
        raise NotImplementedError

    # ---- parameter groups ---------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a parameter group; nothing is added where a value in it is bad."""
        if isinstance(param_group, dict):
            self._check_group({**self.defaults, **param_group})
            # Wrappers that give an optimizer's options to its groups too mean the same.
            for name in {"max_grad_norm", "skip_nonfinite"} & param_group.keys():
                if param_group[name] != getattr(self, name):
                    raise ValueError(
                        f"{name} is for the whole optimizer, and not for a group of it"
                    )
        known = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            flattened.check_scope(self._maker, group)
            flattened.check_marks(group)
            for param in group["params"]:
                # A frozen one may be of any dtype and anywhere: quantized weights, say.
                if param.requires_grad:
                    self._check_dtype(param)
                    storage.check_dtype(param, group)
                    # Where a meta tensor will be is known at the first step.
                    if not param.is_meta:
                        backend = backends.choose(group, param.device)
                        if storage.is_packed(group):
                            backends.check_packs(backend, param.device)
                sharding.check_param(param)
        except Exception:
            del self.param_groups[known:]
            raise
        group.update(plain({key: group[key] for key in self.defaults}))
        self._given.update(flattened.shapes(group["params"]))

    def register_flat_parameter(
        self,
        param: Tensor,
        shapes: Iterable[Sequence[int]],
        *,
        offsets: Iterable[int] | None = None,
        process_group: ProcessGroup | None = None,
    ) -> None:
        """Says which tensors a parameter holds that is a flat buffer, or this rank's part of one.

        Each of them then has its own betas, or each of its rows, as if it were a parameter. Its
        state stays one of the whole parameter, but for `step` and `prev_lr`, which have one
        element a piece, and `beta` and `beta_prod`, which have one a tensor, or row, that this rank
        holds elements of. It cannot be converted to another number of ranks or `beta_scope`.

        For DeepSpeed's ZeRO 1 and 2 this is done when a step or load_state_dict first finds such
        parameters. To be called anew where a scheme replaces its buffers.

        Args:
            param: of one dimension, in a group with beta_scope "tensor" or "row".
            shapes: of the tensors, in the order of the buffer.
            offsets: the element of the buffer at which each begins; without gaps if None. What is
                in gaps, and behind the last tensor, is not stepped.
            process_group: over whose ranks, in their order, the buffer is split into equal parts,
                of which param is this rank's. None: it is the whole buffer. All ranks have to call
                this, and to step, together.

        Raises:
            ValueError: a param that is not this optimizer's, has several dimensions, is complex or
                a DTensor, or has state of other tensors; tensors that overlap or do not fit into
                the buffer; parts that are not equal.
            RuntimeError: a group with beta_scope="global", or with state or parameters in few bits;
                clipping or skipping by the norm.
        """
        groups = [g for g in self.param_groups if any(p is param for p in g["params"])]
        if not groups:
            raise ValueError("param is in none of the optimizer's parameter groups")
        # First, as ranks whose parts differ may not agree on what fits.
        flat.check_parts(flat.make(param, [], None, process_group), param.device)
        known = flat.make(param, shapes, offsets, process_group)
        flat.check_group(groups[0], self._takes_norm)
        before = self._flat_of(param)
        if before is not None and self.state.get(param) and not before.is_like(known):
            raise ValueError(
                "param has state of the tensors that it was registered with before: delete "
                "optimizer.state[param] first"
            )
        self._keep_flat({param: known})

    def _keep_flat(self, known: dict[Tensor, flat.Flat]) -> None:
        """Adds to the flat parameters, and drops those that are gone: a scheme replaces its own."""
        own = {id(param) for group in self.param_groups for param in group["params"]}
        for param in [p for p in self._flat if id(p) not in own and p not in self.state]:
            del self._flat[param]
        self._flat.update(known)

    def _flat_of(self, param: Tensor) -> flat.Flat | None:
        return self._flat.get(param) if self._flat else None

    def _scalar_shape(self, param: Tensor, name: str, group: dict[str, Any]) -> Size:
        """Of a scalar of the state: 0-dim, or one a segment of the group's scope."""
        by_row = name in self.row_scalars
        known = self._flat_of(param)
        if known is not None:
            return known.pieces(group["beta_scope"]).scalar_shape(by_row)
        return beta_shape(param.shape, group["beta_scope"] if by_row else "tensor")

    def __repr__(self) -> str:
        own = f"max_grad_norm={self.max_grad_norm}, skip_nonfinite={self.skip_nonfinite}"
        return f"{super().__repr__()} {own}"

    def _check_dtype(self, param: Tensor) -> None:
        if param.dtype not in FLOATING + COMPLEX:
            raise TypeError(
                f"{type(self).__name__} optimizes float32, float64, bfloat16, float16, "
                f"complex64 and complex128 tensors, not {param.dtype}"
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler's question: does step() unscale and skip on found_inf, on the device?

        As torch.optim's do, it says so only where that was asked for: trainers then leave the
        gradients scaled, and some refuse to clip them. Where gradients are released it says so
        too: the step that it takes then can say what is wrong, where unscaling finds nothing.
        """
        if self._released is not None:
            return True
        # A step takes what has a gradient, whether it is frozen by now or not.
        trained = [
            group
            for group in self.param_groups
            if any(p.requires_grad or p.grad is not None for p in group["params"])
        ]
        return bool(trained) and all(map(backends.asks_for_fused, trained))

    # ---- a step -------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Performs one optimization step.

        Args:
            closure: reevaluates the model and returns the loss. Needed for gap="loss", where
                all ranks have to return the same.

        Returns:
            The closure's loss, or None without a closure.

        Raises:
            TypeError: a gradient of a parameter of a dtype that is not optimized; state of the
                wrong type.
            RuntimeError: a sparse gradient; gap="loss" without a closure; a backend that
                was asked for and is not there; a parameter or state that cannot be updated
                in place; parameters that a scheme such as FSDP1 or DeepSpeed's ZeRO 3 has
                flattened or split; clipping or skipping by the norm where this is one of
                several optimizers of a model.
            ValueError: a hyperparameter that has become bad; state of the wrong shape; with
                gap="loss", a loss that is not one number.

        Where it raises, parameters and state are as they were. They are not where sharded
        parameters share their sums and a collective fails: a part of the update may be done by
        then.
        """
        released = self._released
        if released is not None:
            released._check()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        find_scaling = self._scaling if released is None else released._find_scaling
        self._step_groups(self.param_groups, self._kept, self._current_loss(loss), find_scaling)
        if released is not None:
            released._end_step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch.optim's; the next backward pass may then step, where gradients are released."""
        super().zero_grad(set_to_none)
        if self._released is not None:
            self._released._begin()

    def _step_groups(
        self,
        groups: list[dict[str, Any]],
        kept: Kept,
        loss: Tensor | None,
        find_scaling: Callable[[list[Work]], clipping.Scaling],
    ) -> None:
        """A step of these groups, which may hold a part of the optimizer's parameters."""
        try:
            self._run(self._collect(groups, kept), loss, find_scaling)
            if self._flat:
                self._agree_on_first_steps(groups)
        except Exception:
            self._drop_new_state()
            raise
        finally:
            # In place: in torch 2.11 a compiled step may set no attribute of its optimizer.
            self._new_state.clear()

    def _agree_on_first_steps(self, groups: list[dict[str, Any]]) -> None:
        """As seam.agree_on_first_steps, of the tensors of flat parameters."""
        for group in groups:
            if group["beta_scope"] == "row" and may_be_zero(group["lr"]):
                for param in group["params"]:
                    known = self._flat_of(param)
                    if known is not None and param.grad is not None:
                        flat.agree_on_first_steps(known, self.state[param]["step"])

    def _drop_new_state(self) -> None:
        """Removes what a step that raised has made."""
        for param, before in self._new_state:
            if before is None:
                del self.state[param]
            else:
                self.state[param].clear()
                self.state[param].update(before)

    def _init_group(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], *lists: Any
    ) -> None:
        """Appends the group's tensors that have a gradient, and their state, to the lists.

        The name and the way of filling lists are torch.optim's: torch.compile knows them
        and takes what is appended here as inputs of the compiled step.
        """
        # Comprehensions: with thousands of tensors this loop is a large part of a step.
        new_grads = [param.grad for param in group["params"]]
        new_params = group["params"]
        if any(grad is None for grad in new_grads):
            new_params = [p for p, g in zip(new_params, new_grads, strict=True) if g is not None]
            new_grads = [grad for grad in new_grads if grad is not None]
        if True in map(attrgetter("is_sparse"), new_grads):
            raise RuntimeError(
                f"{type(self).__name__} does not support sparse gradients: "
                "make the module that gives them with sparse=False"
            )
        if self._stored:
            self._unpack([group])
        states: list[Any] = list(map(self.state.get, new_params))
        packed = storage.is_packed(group)
        if packed:
            new = self._find_misfits(group, new_params, states)
        else:
            needed = {*self.memories, *self.scalars}
            new = [
                i
                for i, state in enumerate(states)
                if not (
                    isinstance(state, dict)
                    and needed <= state.keys()
                    and checkpoints.fits_scope(self, new_params[i], state, group)
                )
            ]
        if new:
            without = [new_params[i] for i in new]
            flattened.check_new(self, group, without)
            for i in new:
                states[i] = self._init_state(new_params[i], group)
        if new_params and (self._takes_norm or getattr(self, "found_inf", None) is not None):
            self._make_readings(clipping.home_device([param.device for param in new_params]))
        params.extend(new_params)
        grads.extend(new_grads)
        names = [*self.memories, *self.scalars]
        found = [[state.get(name) for state in states] for name in names]
        if packed:
            found = storage.gather(new_params, self.memories, states, found)
            names += [*(f"{name}_scales" for name in self.memories), storage.REMAINDER]
        for name, values, own in zip(names, lists, found, strict=True):
            values.extend(own)
            for kind in set(map(type, own)):
                if not issubclass(kind, Tensor):
                    raise TypeError(f"state {name} has to be a tensor, not {kind.__name__}")

    def _init_state(self, param: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Makes a parameter's state, or what is missing in the state that a user has given it.

        Or what does not fit a beta_scope, or an option of storage, that has been changed.
        """
        self._check_dtype(param)
        storage.check_dtype(param, group)
        is_new = param not in self.state
        state: dict[str, Any] = {} if is_new else self.state[param]
        if not isinstance(state, dict):
            raise TypeError(
                f"state of a parameter of shape {list(param.shape)} is a {type(state).__name__}; "
                "it has to be a dict"
            )
        missing = checkpoints.missing_state(self, param, state, group)
        if not torch.compiler.is_compiling():  # where this is called ahead of the step
            self._new_state.append((param, None if is_new else dict(state)))
        # All at once: whole or, where memory runs out, not at all.
        state.update(missing)
        for name in storage.stale(self.memories, state, storage.storage_of(param, group)):
            del state[name]
        self.state[param] = state
        return state

    def _find_misfits(
        self, group: dict[str, Any], params: list[Tensor], states: list[Any]
    ) -> list[int]:
        """Of parameters of a group with options of storage those whose state is not as it is to
        be."""
        options = *storage.options_of(group), group["beta_scope"]
        misfits = []
        for i, (param, state) in enumerate(zip(params, states, strict=True)):
            known, dtype, names = self._stored.get(param, _UNSEEN)
            is_known = known == options and dtype == param.dtype
            if is_known and isinstance(state, dict) and names <= state.keys():
                continue
            self._stored[param] = _UNSEEN
            if isinstance(state, dict) and checkpoints.fits(self, param, state, group):
                names = storage.state_names(self.memories, storage.storage_of(param, group))
                self._stored[param] = options, param.dtype, names.union(self.scalars)
            else:
                misfits.append(i)
        return misfits

    def _unpack(self, groups: list[dict[str, Any]]) -> None:
        """Makes state ordinary again whose group has none of the options of storage any more."""
        for group in groups:
            if storage.is_packed(group):
                continue
            # Not by a set of them: torch.compile would compare the tensors' elements.
            for param in [param for param in group["params"] if param in self._stored]:
                state = self.state.get(param)
                if (
                    isinstance(state, dict)
                    and not storage.all_names(self.memories).isdisjoint(state)
                    and not checkpoints.fits(self, param, state, group)
                ):
                    self._init_state(param, group)
                else:
                    del self._stored[param]

    def _let_go(self, kept: Kept) -> None:
        """Drops parameters that are in no group any more from those whose storage is known, which
        would keep them in memory: some methods replace theirs again and again."""
        sizes = [len(group["params"]) for group in self.param_groups]
        if kept.stored != [len(self._stored), *sizes]:
            own = {id(param) for group in self.param_groups for param in group["params"]}
            for param in [param for param in self._stored if id(param) not in own]:
                del self._stored[param]
            kept.stored = [len(self._stored), *sizes]

    def _collect(
        self, groups: list[dict[str, Any]] | None = None, kept: Kept | None = None
    ) -> list[Work]:
        """The tensors of a step of these groups, all if none are given: a batch for each backend
        and device."""
        groups, kept = groups or self.param_groups, kept or self._kept
        flattened.check_norm(self._maker, self._takes_norm)
        for group in groups:
            self._check_group(group, ROUNDING)
            if self._maker is not None:
                flattened.check_scope(self._maker, group)
        packed = list(filter(storage.is_packed, groups))
        # A compiled step does it in `_init_group`, which torch.compile calls ahead of the rest, and
        # which so would not find what is made here.
        if self._stored and not torch.compiler.is_compiling():
            self._unpack(groups)
            if groups is self.param_groups:
                self._let_go(kept)
        if not packed:
            return self._collect_ordinary(groups, kept) or self._collect_any(groups, kept)
        works: list[Work] = []
        plain = [group for group in groups if not storage.is_packed(group)]
        if plain:
            works += self._collect_ordinary(plain, kept) or self._collect_any(plain, kept)
        return works + (
            self._collect_ordinary(packed, kept, packed=True)
            or self._collect_any(packed, kept, packed=True)
        )

    def _collect_ordinary(
        self, groups: list[dict[str, Any]], kept: Kept, packed: bool = False
    ) -> list[Work]:
        """All in C++: with thousands of tensors it takes Python longer than the update.

        Nothing where the extension is not there, or where a closer look is needed: at tensors
        that are new, sparse, complex, of a subclass, flat or on several devices, at gradients that
        are sharded otherwise than their parameters, at groups that ask for different backends, and
        at what is packed otherwise than at the last step.
        """
        if ops.extension is None or torch.compiler.is_compiling() or self._flat:
            return []
        names: tuple[str, ...] = (*self.memories, *self.scalars)
        others: tuple[str | Tensor | None, ...] = (None,) * len(names)
        if packed:
            names, others = storage.packed_names(names, self.memories, groups)
        tensors = (
            [group["params"] for group in groups],
            self.state,
            names,
            others,
            [name in self.row_scalars for name in names],
            [group["beta_scope"] == "row" for group in groups],
            sharding.dtensor_class(),
        )
        gathered = ops.extension.gather(*tensors, *kept.crossing)
        if isinstance(gathered, list):  # DTensors that the last step did not have
            kept.crossing = gathered, crossing(gathered)
            gathered = ops.extension.gather(*tensors, *kept.crossing)
        works = []
        for crosses, part in enumerate(gathered or ()):
            if part is None:
                continue
            sizes, lists, params, dtensors = part
            device = lists[0][0].device
            present = [g for g, size in zip(groups, sizes, strict=True) if size > 0]
            first, *more = [backends.choose(group, device) for group in present]
            if any(other is not first for other in more):
                return []
            own = lists[: len(lists) - 1 - len(self.memories)] if packed else lists
            batch = self._new_batch(*own)
            work = self._new_work(kept, first, device, batch, bool(crosses), packed)
            placed = list(zip(present, filter(None, sizes), strict=True))
            for group, size in placed:
                self._add_group(work, group, size)
            work.params, work.dtensors, work.ordinary = params, dtensors, True
            if packed:
                backends.check_packs(first, device)
                batch.packed = Packed.of(lists[len(own) :])
                if not storage.pack_known(work, placed, self.param_groups):
                    return []
            works.append(work)
        return works

    def _collect_any(
        self, groups: list[dict[str, Any]], kept: Kept, packed: bool = False
    ) -> list[Work]:
        """packed: groups that store something in few bits."""
        works: dict[tuple[str, torch.device, bool], Work] = {}
        rounding: dict[tuple[str, torch.device, bool], list[storage.Placed]] = {}
        extras = 1 + len(self.memories) if packed else 0
        for group in groups:
            lists: tuple[list[Tensor], ...] = tuple(
                [] for _ in range(2 + len(self.memories) + len(self.scalars) + extras)
            )
            self._init_group(group, *lists)
            cuts = self._split_flat(group, lists) if self._flat else []
            params, written = lists[0], (lists[0], *lists[GRADS + 1 :])
            sharded = sharding.any_dtensor(params)
            lists = self._as_plain(lists)
            # In the order of the parameters: the same on every rank, as collectives need it.
            by_kind: dict[tuple[torch.device, bool], list[int]] = {}
            for i, param in enumerate(params):
                spec = sharding.spec_of(param) if sharded else None
                crosses = spec is not None and sums_cross(spec, group["beta_scope"])
                crosses = crosses or (bool(cuts) and cuts[i] is not None)
                by_kind.setdefault((param.device, crosses), []).append(i)
            for (device, crosses), places in by_kind.items():
                backend = backends.choose(group, device)
                if packed:
                    backends.check_packs(backend, device)
                key = backend.name, device, crosses
                work = works.get(key)
                if work is None:
                    work = self._new_work(kept, backend, device, self._new_batch(), crosses, packed)
                    works[key] = work
                if sharded:
                    work.dtensors += sharding.dtensors(ts[i] for ts in written for i in places)
                if cuts and crosses:
                    first = len(work.params)
                    found = ((first + k, cuts[i]) for k, i in enumerate(places))
                    work.cuts += [(place, cut) for place, cut in found if cut is not None]
                targets = (*work.batch.all_lists(), work.params)
                for values, target in zip((*lists, params), targets, strict=True):
                    target.extend(values if len(by_kind) == 1 else [values[i] for i in places])
                self._add_group(work, group, len(places))
                rounding.setdefault(key, []).append((group, len(places)))
        for key, work in works.items():
            if packed:
                storage.pack(work, rounding[key], self.param_groups)
        # As the extension gathers them, which another rank may have done.
        return sorted(works.values(), key=attrgetter("crosses"))

    def _split_flat(
        self, group: dict[str, Any], lists: tuple[list[Tensor], ...]
    ) -> list[flat.Cut | None]:
        """Puts views of their pieces in the place of flat parameters and what goes with them.

        Returns which of the tensors that are now in the lists are pieces of what is cut.
        """
        n_tensors = 2 + len(self.memories)
        by_unit = [name in self.row_scalars for name in self.scalars]
        cuts: list[flat.Cut | None] = []
        whole = [list(values) for values in lists]
        for values in lists:
            values.clear()
        for own in zip(*whole, strict=True):
            known = self._flat_of(own[0])
            if known is None:
                views: Iterable[Sequence[Tensor]] = ([tensor] for tensor in own)
                cuts.append(None)
            else:
                flat.check_group(group, self._takes_norm)
                scalars = list(zip(own[n_tensors:], by_unit, strict=True))
                views, more = flat.split(known, group["beta_scope"], own[:n_tensors], scalars)
                cuts += more
            for values, view in zip(lists, views, strict=True):
                values.extend(view)
        return cuts

    def _as_plain(self, lists: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
        """The lists with this rank's shards for DTensors, and complex tensors as pairs of reals."""
        tensors = 2 + len(self.memories)
        if sharding.any_dtensor(lists[0]):
            lists = sharding.local_shards(*lists)
        if not torch.compiler.is_compiling() and True in map(Tensor.is_neg, lists[GRADS]):
            lists[GRADS][:] = [grad.resolve_neg() for grad in lists[GRADS]]
        if any(map(Tensor.is_complex, lists[0])):
            lists[GRADS][:] = [grad.resolve_conj() for grad in lists[GRADS]]
            lists = (*([as_real(t) for t in ts] for ts in lists[:tensors]), *lists[tensors:])
        return lists

    @staticmethod
    def _new_work(
        kept: Kept,
        backend: Backend,
        device: torch.device,
        batch: Batch,
        crosses: bool,
        packed: bool = False,
    ) -> Work:
        batch.cache = kept.caches.setdefault((backend.name, device, crosses, packed), {})
        if packed:
            batch.packed = Packed.empty(len(batch.memories))
        return Work(backend, batch, crosses=crosses)

    def _add_group(self, work: Work, group: dict[str, Any], size: int) -> None:
        work.batch.hypers.append(self._hyper(group))
        work.batch.group_sizes.append(size)
        work.batch.shared.append(group["beta_scope"] == "global")

    def _scaling(self, works: list[Work]) -> clipping.Scaling:
        """GradScaler's, with the clipping and skipping that these gradients ask for."""
        clipping.check_options(self.max_grad_norm, self.skip_nonfinite)
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        if not self._takes_norm:
            return clipping.Scaling(grad_scale, found_inf, None)
        squares = clipping.SquaredNorm()
        for work in works:
            squares.add(work)
        norm = squares.total().sqrt()
        return clipping.scaling(
            norm, self.max_grad_norm, self.skip_nonfinite, grad_scale, found_inf
        )

    def _run(
        self,
        works: list[Work],
        loss: Tensor | None,
        find_scaling: Callable[[list[Work]], clipping.Scaling],
    ) -> None:
        if not works:
            return
        if len(works) > 1:
            for work in works:  # whatever raises does so before any batch has changed
                work.check()
        scaling = find_scaling(works)
        readings = self._readings_of(scaling)
        grad_scale, found_inf, _ = scaling
        # Where no segment's beta waits for what is elsewhere, a backend does both halves at once.
        waiting = find_waiting(works)
        rows = [
            self._begin(w.backend, w.batch, w.here(grad_scale), w.here(found_inf)) for w in waiting
        ]
        add_over_ranks(waiting, rows)
        if loss is not None:
            self._add_loss_gap(waiting, rows, loss)
        share_sums(waiting, rows)
        for work in works:
            own = next((r for w, r in zip(waiting, rows, strict=True) if w is work), None)
            self._finish(work.backend, work.batch, own, work.here(grad_scale), work.here(found_inf))
            for param, copy in work.copies:
                param.copy_(copy)
            if work.dtensors and not torch.compiler.is_compiling():
                # The shards were told that they are written to, not what they are shards of.
                # torch's own takes ten times as long.
                if ops.extension is None:
                    torch.autograd.graph.increment_version(work.dtensors)
                else:
                    ops.extension.bump_versions(work.dtensors)
        agree_on_first_steps(works)
        if loss is not None:
            self._keep_loss(loss, found_inf)
        if readings is not None:
            readings.write(scaling)

    # ---- what a step leaves to be looked at -----------------------------------------

    def _readings_of(self, scaling: clipping.Scaling) -> clipping.Readings | None:
        """Those that are to be written; None where the step leaves nothing."""
        written = scaling.found_inf if scaling.grad_norm is None else scaling.grad_norm
        return None if written is None else self._make_readings(written.device)

    def _make_readings(self, device: torch.device) -> clipping.Readings:
        """Those that are there; moved where they are on the CPU and something else is not."""
        known = self._readings
        if known is not None and (known.device.type != "cpu" or device.type == "cpu"):
            return known
        if is_capturing(device):
            raise RuntimeError(
                "a step is being captured in a CUDA graph, and is the first that clips or that may "
                "be skipped: take one such step outside of the graph first"
            )
        self._readings = clipping.Readings(device) if known is None else known.moved(device)
        return self._readings

    @property
    def _takes_norm(self) -> bool:
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def grad_norm(self) -> Tensor | None:
        """The norm of the last step's gradients before clipping, unscaled: a new 0-dim tensor.

        On the gradients' device; float64 where that has it. NaN before the first step that has
        gradients, and None where steps neither clip nor look for what is not finite.
        """
        if not self._takes_norm:
            return None
        readings = self._readings or clipping.Readings(self._first_device)
        return readings.grad_norm.reshape(()).clone()

    @property
    def skipped_steps(self) -> Tensor:
        """How many steps skip_nonfinite, or GradScaler on the device, has left out: int64, 0-dim.

        A new tensor, on the gradients' device. It starts from 0 where an optimizer is made or its
        state is loaded.
        """
        readings = self._readings or clipping.Readings(self._first_device)
        return readings.skipped_steps.reshape(()).clone()

    @property
    def _first_device(self) -> torch.device:
        """The first parameter's, of those that are trained if any are."""
        lists = [group["params"] for group in self.param_groups]
        trained = (param for param in chain(*lists) if param.requires_grad)
        first = next(chain(trained, *lists), None)
        return torch.device("cpu") if first is None else first.device

    @torch.no_grad()
    def metrics(self) -> dict[str, Tensor]:
        """Numbers to look at, for every step: new 0-dim tensors, which nothing was waited for.

        - `grad_norm`: the property; only where steps take it.
        - `beta_mean`, `beta_min`: of the last betas of all parameters. In the mean a beta counts
          with the elements that it is for: those of its parameter, or of its row.
        - `at_cap`: of the elements, the share whose beta was at what is now its group's cap, or
          above.
        - `skipped_steps`: the property.

        float64 where the device has it, skipped_steps int64; on the parameters' device, or, where
        they are on several, the first that is not the CPU. A parameter that has had no gradient has
        no beta, one without elements counts as having none, and one whose first step was skipped
        has 0. What there is nothing to make of yet is NaN.

        There is no collective. A beta for a whole parameter counts with all of it, sharded or not,
        and is the same on all ranks; where sharded rows have betas of their own, this rank's rows
        stand for the others too, so that ranks have numbers of their own.
        """
        return read_metrics(self, self._elements)

    @torch.no_grad()
    def betas_by_name(self, named: Named | None = None) -> dict[str, Tensor]:
        """The last beta of each parameter by its name, the mean of a parameter's rows' betas.

        New 0-dim tensors on the parameters' devices, float64 where these have it. Parameters that
        have no beta are left out, as `metrics` leaves them out. Where sharded rows have betas, the
        mean is over this rank's; there is no collective.

        Args:
            named: a module, or (name, parameter) pairs. None: the names that the optimizer was
                given, as with model.named_parameters() or `adamem_fused.param_groups`.

        Raises:
            ValueError: named is None, and the optimizer was given no names.
            TypeError: named is something else.
        """
        return read_betas_by_name(self, named)

    # ---- gap="loss" ---------------------------------------------------------------

    def _current_loss(self, loss: Any) -> Tensor | None:
        """The closure's loss where a group has gap="loss"; NaN where none is there or needed.

        torch.distributed.checkpoint makes state by a step without a closure at lr 0, where the
        gap is left out.
        """
        lrs = [group["lr"] for group in self.param_groups if group["gap"] == "loss"]
        if not lrs:
            return None
        if loss is None:
            if any(lr > 0 for lr in lrs):
                raise RuntimeError(
                    'gap="loss" needs the loss: call step(closure), with a closure that returns it'
                )
            loss = math.nan
        self._prev_loss()  # raises before anything has changed
        return loss_value(loss, "the closure gave")

    @property
    def _model_param(self) -> Tensor:
        """The parameter whose state also holds `prev_loss`: the first, as with LBFGS.

        The first that is trained: torch.distributed.checkpoint drops the state of frozen ones.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        # Where it is, once it is there: parameters may be frozen for some steps.
        holders = (p for p in params if "prev_loss" in self.state.get(p, {}))
        trained = (p for p in params if p.requires_grad)
        return cast("Tensor", next(chain(holders, trained), params[0]))

    def _prev_loss(self) -> Tensor | None:
        if not any(group["params"] for group in self.param_groups):
            return None
        prev_loss = self.state.get(self._model_param, {}).get("prev_loss")
        return None if prev_loss is None else loss_value(prev_loss, "prev_loss in the state is")

    def _add_loss_gap(self, works: list[Work], rows: list[Tensor], loss: Tensor) -> None:
        """Adds f(x_{t-1}) - f(x_t), times its factor, to num, where gap="loss".

        The difference belongs to the whole model: each tensor takes the share that its
        number of elements is of all of them, with its own group's factor.
        """
        prev_loss = self._prev_loss()
        total = sum(work.loss_numel() for work in works)
        if prev_loss is None or total == 0:
            return
        # Where either loss is infinite or not a number: as on a first step.
        difference = prev_loss.to(loss) - loss
        difference = torch.where(difference.isfinite(), difference, 0.0)
        for work, work_rows in zip(works, rows, strict=True):
            here = difference.to(work_rows.dtype).to(work_rows.device)
            for hyper, place, lines in zip(
                work.batch.hypers, group_slices(work.batch), group_rows(work.batch), strict=True
            ):
                if hyper.loss_gap:
                    share = work.shares(place, work_rows)
                    sign = -1.0 if hyper.maximize else 1.0
                    if isinstance(hyper.lr, Tensor):
                        hyper = hyper._replace(lr=hyper.lr.to(work_rows))
                    factor = self._loss_factor(hyper) * (sign / total)
                    work_rows[lines, 0] += share * factor * here

    def _keep_loss(self, loss: Tensor, found_inf: Tensor | None) -> None:
        current = loss.clone()
        if found_inf is not None:
            prev_loss = self._prev_loss()
            if prev_loss is None:
                prev_loss = torch.full_like(current, torch.nan)
            skipped = found_inf.to(current.device).reshape(()) != 0
            current = torch.where(skipped, prev_loss, current)
        self.state.setdefault(self._model_param, {})["prev_loss"] = current

    def state_dict(self) -> dict[str, Any]:
        """As torch.optim's."""
        # By this option a checkpoint is told to be torch.optim's own (checkpoints.wrap). Tools that
        # copy the groups of one into these bring it along.
        for group in self.param_groups:
            group.pop("differentiable", None)
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, or of its counterpart in torch.optim.

        State keeps its values bit for bit: it takes its parameter's device and layout, but
        not its dtype (float32 state of bfloat16 parameters stays float32, float64 state
        stays float64). Where `state_dtype` or `store_param_remainders` are others than those of
        the checkpoint, it is converted, rounded to nearest.

        A torch.optim.AdamW or SGD state_dict brings its lr, betas, weight decay and the
        like; this optimizer's own options stay as they are, the missing state is made up.
        `foreach`, `fused`, `backend` and `capturable` stay this optimizer's in any case, and so do
        `state_dtype`, `stochastic_rounding` and `store_param_remainders`. `seed` is the
        checkpoint's, so that the random bits go on.

        `beta_scope` is the checkpoint's, as other options are. Where a group is given another one,
        here or between steps, the betas are converted: a tensor's is that of each of its rows, and
        those of rows become their mean.

        Raises:
            ValueError: parameter groups or state that do not fit the parameters, a bad
                hyperparameter, amsgrad state.
            TypeError: state that is not a tensor.

        Where it raises, nothing has changed.
        """
        # After the user's own hooks; what is wrapped is unwrapped in __setstate__.
        handle = self.register_load_state_dict_pre_hook(checkpoints.wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        own = {"max_grad_norm": self.max_grad_norm, "skip_nonfinite": self.skip_nonfinite}
        return {**super().__getstate__(), **own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()  # neither copied nor pickled
        # Optimizer gives every optimizer this option of its own, which a step of this class
        # does not have.
        self.defaults.pop("differentiable", None)
        for group in self.param_groups:
            group.pop("differentiable", None)
            for key, value in self.defaults.items():
                group.setdefault(key, value)
        if "_given" not in vars(self):  # of a copy, for which __init__ was not called
            self._given = flattened.shapes(p for g in self.param_groups for p in g["params"])
            self._flat = {}
        checkpoints.unwrap(self)
        for group in filter(storage.is_packed, self.param_groups):
            self._stored.update(dict.fromkeys(group["params"], _UNSEEN))
