"""What AMAdamW and AMSGD share: collecting a step's tensors, the seam, state and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from numbers import Real
from operator import attrgetter
from typing import Any, ClassVar, TypeAlias, cast, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamem_fused import backends, checkpoints, flattened, sharding
from adamem_fused.backends import Backend, ops
from adamem_fused.backends.batch import FLOATING, GRADS, Batch, Lr, group_slices
from adamem_fused.state import COMPLEX, memory_dtype, scalar_dtype

ParamsT: TypeAlias = "Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]"


def loss_value(loss: Any) -> Tensor:
    """A closure's loss as a 0-dim float64 tensor, on its device or the CPU, for gap="loss"."""
    if loss is None:
        raise RuntimeError(
            'gap="loss" needs the loss: call step(closure), with a closure that returns it'
        )
    if not isinstance(loss, (Real, Tensor)) or (isinstance(loss, Tensor) and loss.numel() != 1):
        raise ValueError(f'gap="loss" needs a loss of one number, and the closure gave {loss!r}')
    if isinstance(loss, Tensor):
        return loss.detach().double().reshape(())
    return torch.tensor(float(loss), dtype=torch.float64, device="cpu")


def over_lr(value: Lr, lr: Lr) -> Lr:
    """value / lr, and 0 at lr = 0."""
    if isinstance(lr, Tensor):
        return torch.where(lr == 0, 0.0, value / lr)
    return value / lr if lr != 0 else 0.0


def scalar_lr(lr: Lr) -> Lr:
    """A tensor lr as the backends take it: 0-dim."""
    return lr.reshape(()) if isinstance(lr, Tensor) else lr


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor as pairs of reals, a view; a real one as it is."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@dataclass
class Work:
    """A batch, the backend that is to do it, and the parameters that it came from.

    A tensor of the batch is its parameter's shard on this rank where some are `sharded`, and
    else the parameter itself; either way, pairs of reals of a complex one.
    """

    backend: Backend
    batch: Any
    params: list[Tensor] = field(default_factory=list)
    sharded: bool = False

    def here(self, tensor: Tensor | None) -> Tensor | None:
        """A scalar of another device (GradScaler's may be on one) on this batch's."""
        if tensor is None or not self.batch.params:
            return tensor
        device = self.batch.params[0].device
        # A copy to the CPU is read at once, so it is waited for.
        return tensor.to(device, non_blocking=device.type != "cpu")

    def numels(self, place: slice) -> list[int]:
        """Elements of the whole tensors, complex ones as pairs of reals."""
        return [param.numel() * (1 + param.is_complex()) for param in self.params[place]]

    def loss_numel(self) -> int:
        return sum(
            sum(self.numels(place))
            for hyper, place in zip(self.batch.hypers, group_slices(self.batch), strict=True)
            if hyper.loss_gap
        )


def share_sums(works: list[Work], rows: list[Tensor]) -> None:
    """Gives every tensor of a group with beta_scope="global" the sums over all such tensors."""
    places = [
        (work_rows, place)
        for work, work_rows in zip(works, rows, strict=True)
        for shared, place in zip(work.batch.shared, group_slices(work.batch), strict=True)
        if shared
    ]
    if not places:
        return
    device = places[0][0].device
    total = torch.cat([r[place].to(device) for r, place in places]).sum(0)
    for work_rows, place in places:
        work_rows[place] = total.to(work_rows.device)


class AdaptiveMemoryOptimizer(Optimizer):
    """Base of AMAdamW and AMSGD. Holds no arithmetic.

    A subclass names its state and makes its batch; the step is then the same: collect the
    tensors that have a gradient, by backend and device; sum; let tensors that share one
    beta share their sums; apply.
    """

    # Names of the state: tensors like the parameter, and 0-dim tensors with their first value.
    memories: ClassVar[tuple[str, ...]]
    scalars: ClassVar[dict[str, float]]

    # Set by torch.amp.GradScaler for the time of a step.
    grad_scale: Tensor | None
    found_inf: Tensor | None

    # What a backend keeps from step to step, by its name and the device.
    _caches: dict[tuple[str, torch.device], dict[str, Any]]
    # The lists of the last ordinary step, without gradients.
    _last: tuple[list[Tensor], ...]
    # Parameters whose state was made in this step.
    _new_state: list[Tensor]

    # The shapes of the parameters it was given, and who made it as one of several.
    _given: flattened.Given
    _maker: str | None = None

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self._forget()
        self._given = flattened.shapes([])
        self._maker = flattened.find_maker()
        super().__init__(params, defaults)

    def _forget(self) -> None:
        """Drops what is kept from step to step, of which a step can do without all."""
        self._caches = {}
        self._new_state = []
        self._last = self._new_batch().lists()

    # ---- what a subclass gives ----------------------------------------------------

    def _check_group(self, group: dict[str, Any]) -> None:
        """Raises ValueError or TypeError on a bad value in a complete parameter group."""
        raise NotImplementedError

    def _new_batch(self, *lists: Any) -> Batch:
        """A batch without parameter groups; its lists are empty ones where none are given."""
        raise NotImplementedError

    def _hyper(self, group: dict[str, Any]) -> Any:
        raise NotImplementedError

    def _stats(self, backend: Backend, batch: Any, grad_scale: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _apply(
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
                    backends.choose(group, param.device)
                sharding.check_param(param)
        except Exception:
            del self.param_groups[known:]
            raise
        self._given.update(flattened.shapes(group["params"]))

    def _check_dtype(self, param: Tensor) -> None:
        if param.dtype not in FLOATING + COMPLEX:
            raise TypeError(
                f"{type(self).__name__} optimizes floating-point and complex tensors, "
                f"not {param.dtype}"
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """GradScaler's question: does step() unscale and skip on found_inf, on the device?"""
        # Of each device once: the scaler asks several times a step.
        return all(
            backends.choose(group, device).fused
            for group in self.param_groups
            for device in {param.device for param in group["params"] if param.requires_grad}
        )

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
            TypeError: a gradient of a parameter that is neither floating-point nor complex;
                state of the wrong type.
            RuntimeError: a sparse gradient; gap="loss" without a closure; a backend that
                was asked for and is not there; `grad_scale` or `found_inf` for one that is
                not fused; a parameter or state that cannot be updated in place; parameters
                that a scheme such as FSDP1 or DeepSpeed's ZeRO has flattened or split.
            ValueError: a hyperparameter that has become bad; state of the wrong shape; with
                gap="loss", a loss that is not one number.

            Parameters and state are then as they were.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        current_loss = self._current_loss(loss)
        try:
            self._run(self._collect(), current_loss)
        except Exception:
            self._drop_new_state()
            raise
        return loss

    def _drop_new_state(self) -> None:
        """Removes what a step that raised has made."""
        for param in self._new_state:
            for name in (*self.memories, *self.scalars):
                self.state[param].pop(name, None)
        for param, state in list(self.state.items()):
            if not state:
                del self.state[param]

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
        states = [self.state[param] for param in new_params]
        first = self.memories[0]
        without = [p for p, s in zip(new_params, states, strict=True) if first not in s]
        if without:
            flattened.check_new(group, without, self.param_groups, self._given)
            for param in without:
                self._init_state(param, self.state[param])
        params.extend(new_params)
        grads.extend(new_grads)
        for name, values in zip((*self.memories, *self.scalars), lists, strict=True):
            values.extend([state[name] for state in states])

    def _init_state(self, param: Tensor, state: dict[str, Any]) -> None:
        self._check_dtype(param)
        memories = {
            name: torch.zeros_like(
                param, dtype=memory_dtype(param), memory_format=torch.preserve_format
            )
            for name in self.memories
        }
        scalars = {
            name: torch.full((), value, dtype=scalar_dtype(param), device=param.device)
            for name, value in self.scalars.items()
        }
        # All at once: whole or, where memory runs out, not at all.
        state.update(memories | scalars)
        self._new_state.append(param)

    def _collect(self) -> list[Work]:
        """This step's tensors, a batch for each backend and device."""
        self._new_state = []
        for group in self.param_groups:
            self._check_group(group)
            if self._maker is not None:
                flattened.check_scope(self._maker, group)
        return self._collect_ordinary() or self._collect_any()

    def _collect_ordinary(self) -> list[Work]:
        """All in C++: with thousands of tensors it takes Python longer than the update.

        Nothing where the extension is not there, or where a closer look is needed: at tensors
        that are new, sparse, complex, of a subclass or on several devices, and at groups that
        ask for different backends.
        """
        if ops.extension is None or torch.compiler.is_compiling():
            return []
        # Into the lists of the last step: thousands of references need not be taken anew.
        lists = list(self._last)
        lists[GRADS] = []
        batch = self._new_batch(*lists)
        sizes = ops.extension.gather(
            [group["params"] for group in self.param_groups],
            self.state,
            (*self.memories, *self.scalars),
            batch.lists(),
        )
        if sizes is None or not batch.params:
            self._last = self._new_batch().lists()
            return []
        device = batch.params[0].device
        groups = [g for g, size in zip(self.param_groups, sizes, strict=True) if size > 0]
        first, *others = [backends.choose(group, device) for group in groups]
        if any(other is not first for other in others):
            return []
        work = self._new_work(first, device, batch)
        for group, size in zip(groups, filter(None, sizes), strict=True):
            self._add_group(work, group, size)
        work.params = batch.params
        return [work]

    def _collect_any(self) -> list[Work]:
        works: dict[tuple[str, torch.device], Work] = {}
        for group in self.param_groups:
            lists: tuple[list[Tensor], ...] = tuple(
                [] for _ in range(2 + len(self.memories) + len(self.scalars))
            )
            self._init_group(group, *lists)
            params = lists[0]
            sharded = sharding.any_dtensor(params)
            lists = self._as_plain(lists)
            # In the order of the parameters: the same on every rank, as collectives need it.
            devices = dict.fromkeys(map(attrgetter("device"), params))
            for device in devices:
                backend = backends.choose(group, device)
                work = works.get((backend.name, device))
                if work is None:
                    work = self._new_work(backend, device, self._new_batch())
                    works[backend.name, device] = work
                work.sharded = work.sharded or sharded
                size = len(work.batch.params)
                targets = (*work.batch.lists(), work.params)
                for values, target in zip((*lists, params), targets, strict=True):
                    if len(devices) == 1:
                        target.extend(values)
                    else:
                        target.extend(
                            v for v, p in zip(values, params, strict=True) if p.device == device
                        )
                self._add_group(work, group, len(work.batch.params) - size)
        return list(works.values())

    def _as_plain(self, lists: tuple[list[Tensor], ...]) -> tuple[list[Tensor], ...]:
        """The lists with this rank's shards for DTensors, and complex tensors as pairs of reals."""
        tensors = 2 + len(self.memories)
        if sharding.any_dtensor(lists[0]):
            lists = (*sharding.local_shards(*lists[:tensors]), *lists[tensors:])
        if not torch.compiler.is_compiling() and True in map(Tensor.is_neg, lists[GRADS]):
            lists[GRADS][:] = [grad.resolve_neg() for grad in lists[GRADS]]
        if True in map(Tensor.is_complex, lists[0]):
            lists[GRADS][:] = [grad.resolve_conj() for grad in lists[GRADS]]
            lists = (*([as_real(t) for t in ts] for ts in lists[:tensors]), *lists[tensors:])
        return lists

    def _new_work(self, backend: Backend, device: torch.device, batch: Batch) -> Work:
        batch.cache = self._caches.setdefault((backend.name, device), {})
        return Work(backend, batch)

    def _add_group(self, work: Work, group: dict[str, Any], size: int) -> None:
        work.batch.hypers.append(self._hyper(group))
        work.batch.group_sizes.append(size)
        work.batch.shared.append(group["beta_scope"] == "global")

    def _run(self, works: list[Work], loss: Tensor | None) -> None:
        grad_scale: Tensor | None = getattr(self, "grad_scale", None)
        found_inf: Tensor | None = getattr(self, "found_inf", None)
        scaled = grad_scale is not None or found_inf is not None
        if scaled and not all(work.backend.fused for work in works):
            raise RuntimeError("grad_scale and found_inf need a fused backend for every parameter")

        # Where no tensor's beta waits for another's, a backend may do both passes at once.
        # With several batches the sums come first all the same: they are where a backend
        # raises, before any batch has been changed.
        rows: list[Tensor] | None = None
        shards = sharding.find_shards(work.params if work.sharded else [] for work in works)
        if (
            len(works) > 1
            or shards
            or any(hyper.loss_gap for work in works for hyper in work.batch.hypers)
            or any(any(work.batch.shared) and not work.backend.shares_sums for work in works)
        ):
            rows = [self._stats(w.backend, w.batch, w.here(grad_scale)) for w in works]
            sharding.add_over_ranks(shards, rows)
            if loss is not None:
                self._add_loss_gap(works, rows, loss)
            share_sums(works, rows)
        for i, work in enumerate(works):
            work_rows = None if rows is None else rows[i]
            self._apply(
                work.backend, work.batch, work_rows, work.here(grad_scale), work.here(found_inf)
            )
        if loss is not None and works:
            self._keep_loss(loss, found_inf)

    # ---- gap="loss" ---------------------------------------------------------------

    def _current_loss(self, loss: Any) -> Tensor | None:
        """The closure's loss where a group has gap="loss"; NaN where none is there or needed.

        torch.distributed.checkpoint makes state by a step without a closure at lr 0, where the
        gap is left out.
        """
        lrs = [group["lr"] for group in self.param_groups if group["gap"] == "loss"]
        if not lrs:
            return None
        return loss_value(math.nan if loss is None and not any(lrs) else loss)

    @property
    def _model_state(self) -> dict[str, Any]:
        """Where state of the whole model is kept: with the first parameter, as LBFGS does.

        The first that is trained: torch.distributed.checkpoint drops the state of frozen ones.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        trained = (param for param in params if param.requires_grad)
        return cast("dict[str, Any]", self.state[next(trained, params[0])])

    def _add_loss_gap(self, works: list[Work], rows: list[Tensor], loss: Tensor) -> None:
        """Adds f(x_{t-1}) - f(x_t), times its factor, to num, where gap="loss".

        The difference belongs to the whole model: each tensor takes the share that its
        number of elements is of all of them, with its own group's factor.
        """
        prev_loss = self._model_state.get("prev_loss")
        total = sum(work.loss_numel() for work in works)
        if prev_loss is None or total == 0:
            return
        # Where either loss is infinite or not a number: as on a first step.
        difference = prev_loss.to(loss.device) - loss
        difference = torch.where(difference.isfinite(), difference, 0.0)
        for work, work_rows in zip(works, rows, strict=True):
            here = difference.to(work_rows.device)
            for hyper, place in zip(work.batch.hypers, group_slices(work.batch), strict=True):
                if hyper.loss_gap:
                    numels = work.numels(place)
                    share = torch.tensor(numels, dtype=torch.float64, device=work_rows.device)
                    sign = -1.0 if hyper.maximize else 1.0
                    if isinstance(hyper.lr, Tensor):
                        hyper = hyper._replace(lr=hyper.lr.double())
                    factor = self._loss_factor(hyper) * (sign / total)
                    if isinstance(factor, Tensor):
                        factor = factor.to(work_rows.device)
                    work_rows[place, 0] += share * factor * here

    def _keep_loss(self, loss: Tensor, found_inf: Tensor | None) -> None:
        current = loss.clone()
        if found_inf is not None:
            prev_loss = self._model_state.get("prev_loss", torch.full_like(current, torch.nan))
            skipped = found_inf.to(current.device).reshape(()) != 0
            current = torch.where(skipped, prev_loss, current)
        self._model_state["prev_loss"] = current

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state_dict of this class, or of its counterpart in torch.optim.

        State keeps its values bit for bit: it takes its parameter's device and layout, but
        not its dtype (float32 state of bfloat16 parameters stays float32, float64 state
        stays float64).

        A torch.optim.AdamW or SGD state_dict brings its lr, betas, weight decay and the
        like; this optimizer's own options stay as they are, the missing state is made up.
        `foreach`, `fused`, `backend` and `capturable` stay this optimizer's in any case.

        Raises:
            ValueError: parameter groups or state that do not fit the parameters, a bad
                hyperparameter, amsgrad state.
            TypeError: state that is not a tensor.

            Nothing has changed then.
        """
        # After the user's own hooks; the tensors are unwrapped in __setstate__.
        handle = self.register_load_state_dict_pre_hook(checkpoints.wrap)
        try:
            super().load_state_dict(state_dict)
        finally:
            handle.remove()

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
        checkpoints.unwrap(self)
