"""Gradient release: a parameter is stepped in the backward pass, and its gradient freed there.

A plain parameter, or one that FSDP2 has sharded, has a hook that torch calls once its gradient is
complete. DistributedDataParallel reduces gradients after such hooks, so there a communication hook
steps the parameters of each of its buckets once it is reduced.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakMethod, ref

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Variable
from torch.nn.parallel import DistributedDataParallel

from adamem_fused import clipping
from adamem_fused.optimizer import AdaptiveMemoryOptimizer, Kept
from adamem_fused.sharding import is_dtensor

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket
    from torch.distributed.tensor import DTensor
    from torch.futures import Future
    from torch.utils.hooks import RemovableHandle

    from adamem_fused.seam import Work


def at_end(function: Callable[[], None]) -> None:
    """To be called in a backward pass, for its end; in the order in which functions are given."""
    Variable._execution_engine.queue_callback(function)


def release_gradients(
    model: nn.Module, optimizer: AdaptiveMemoryOptimizer, *, clip_by_last_norm: bool = False
) -> Released:
    """Lets backward passes step each parameter once its gradient is complete, and free that.

    A training loop stays as it is: `step()` takes a step of what still has a gradient, usually
    nothing, and begins anew; it has to be called between two backward passes that are to step.
    Parameters of the optimizer that are not the model's, and those that were frozen or not yet the
    optimizer's before the last `step()`, are stepped there, as without this. Parameters of the
    model that the optimizer does not hold are left alone, for another optimizer.

    Args:
        model: the whole model, after `fully_shard` or in its DistributedDataParallel.
        optimizer: AMAdamW or AMSGD, with one beta for each tensor or row.
        clip_by_last_norm: where `max_grad_norm` is set, gradients are scaled as the norm of those
            before the last `step()` would have it, since their own is known after the last of them;
            the first ones are not clipped. `optimizer.grad_norm` is that of the last `step()`.

    Returns:
        A handle: its `accumulate()` holds the steps back, its `remove()` ends all this. A copy of
        the optimizer, and what is saved of it, are without it.

    Raises:
        TypeError: a model or an optimizer of another kind.
        ValueError: beta_scope="global", gap="loss", skip_nonfinite=True or, without
            clip_by_last_norm, max_grad_norm, which need all gradients before any step; a backward
            pass and `step()` raise it too where an option has become so. A model that has no
            parameter of the optimizer.
        RuntimeError: gradients of the optimizer are released already; a DistributedDataParallel
            with another communication hook, or around the model that was given.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model has to be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(optimizer, AdaptiveMemoryOptimizer):
        raise TypeError(
            f"optimizer has to be AMAdamW or AMSGD, not {type(optimizer).__name__}: a trainer's "
            "own has it within, most often as .optimizer"
        )
    if optimizer._released is not None:
        raise RuntimeError("The gradients of this optimizer are released already: remove() that")
    return Released(model, optimizer, clip_by_last_norm)


class Released:
    """What `release_gradients` returns: the hooks, and what a backward pass has stepped."""

    def __init__(
        self, model: nn.Module, optimizer: AdaptiveMemoryOptimizer, clip_by_last_norm: bool
    ) -> None:
        self._model = model
        self._ref = ref(optimizer)  # which has this: what is used no more is free at once
        self._clips = clip_by_last_norm
        self._hooks: dict[Tensor, RemovableHandle] = {}
        # Trained parameters of the optimizer that get no hook.
        self._others: set[Tensor] = set()
        self._holds = 0
        # Backward passes of several devices run in threads of their own.
        self._lock = threading.Lock()
        self._wrapping_is_known = False
        self._forget()

        self._check()
        params = {param for group in optimizer.param_groups for param in group["params"]}
        if params.isdisjoint(model.parameters()):
            raise ValueError("The model has no parameter of the optimizer")
        wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        for wrapper in wrappers:
            self._others.update(wrapper.parameters())
        self._check_wrapping()
        for wrapper in wrappers:
            _Buckets.register(wrapper, self)
        self._add_hooks()
        optimizer._released = self

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Backward passes in it add gradients up; the first one outside steps with the sum."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1

    def remove(self) -> None:
        """Ends the release: `step()` takes the whole step again."""
        for handle in self._hooks.values():
            handle.remove()
        self._hooks.clear()
        optimizer = self._ref()
        if optimizer is not None and optimizer._released is self:
            optimizer._released = None

    @property
    def _optimizer(self) -> AdaptiveMemoryOptimizer:
        optimizer = self._ref()
        assert optimizer is not None  # it calls, or holds what calls
        return optimizer

    # ---- what the optimizer calls ---------------------------------------------------

    def _forget(self) -> None:
        """Drops what is kept from step to step."""
        self._kept: dict[Tensor, Kept] = {}
        # By the norm of the last step's gradients, for the next ones.
        self._grad_scale: Tensor | None = None
        self._begin()

    def _begin(self) -> None:
        """Lets every parameter be stepped by the coming backward pass."""
        self._stepped: set[Tensor] = set()
        self._groups: dict[Tensor, dict[str, Any]] | None = None
        self._squares: clipping.SquaredNorm | None = None

    def _check(self) -> None:
        """Raises on options with which no parameter can be stepped before all have a gradient."""
        scaler = vars(self._optimizer).keys() & {"grad_scale", "found_inf"}
        for name in scaler:  # which GradScaler does after a step, unless it raises
            delattr(self._optimizer, name)
        if scaler:
            raise RuntimeError(
                "GradScaler does not go with release_gradients: backward passes have taken their "
                "steps with scaled gradients. Train in bfloat16, or remove() the release"
            )
        for group in self._optimizer.param_groups:
            self._check_options(group)

    def _check_options(self, group: dict[str, Any]) -> None:
        if group["beta_scope"] == "global" or group["gap"] == "loss":
            option = "gap='loss'" if group["gap"] == "loss" else "beta_scope='global'"
            raise ValueError(
                f"{option} needs all gradients before any step, which release_gradients does not "
                "have: use beta_scope='tensor' or 'row'"
            )
        if self._optimizer.skip_nonfinite:
            raise ValueError(
                "skip_nonfinite=True needs the norm of all gradients before any step, which "
                "release_gradients does not have"
            )
        if self._optimizer.max_grad_norm is not None and not self._clips:
            raise ValueError(
                "max_grad_norm needs the norm of all gradients before any step, which "
                "release_gradients does not have: pass clip_by_last_norm=True to it to take that "
                "of the step before"
            )

    def _find_scaling(self, works: list[Work]) -> clipping.Scaling:
        """Clipping by the last norm; takes the gradients' part of the present one."""
        optimizer = self._optimizer
        clipping.check_options(optimizer.max_grad_norm, optimizer.skip_nonfinite)
        if optimizer.max_grad_norm is None:
            return clipping.Scaling(None, None, None)
        if self._squares is None:
            self._squares = clipping.SquaredNorm()
        for work in works:
            self._squares.add(work)
        return clipping.Scaling(self._grad_scale, None, None)

    def _end_step(self) -> None:
        """After a step of what still had a gradient."""
        limit = self._optimizer.max_grad_norm
        if limit is None:
            self._grad_scale = None
        elif self._squares is not None:
            norm = self._squares.total().sqrt()
            scaling = clipping.scaling(norm, limit, False, None, None)
            if self._grad_scale is None or scaling.grad_scale is None:
                self._grad_scale = scaling.grad_scale
            else:  # in place, as a CUDA graph that has captured a backward pass reads it there
                self._grad_scale.copy_(scaling.grad_scale)
            self._optimizer._make_readings(norm.device).write(scaling)
        self._begin()
        self._add_hooks()

    # ---- a parameter's step ---------------------------------------------------------

    def _add_hooks(self) -> None:
        """Gives one to each trained parameter of the model that has none."""
        new = {
            param
            for group in self._optimizer.param_groups
            for param in group["params"]
            if param.requires_grad and param not in self._hooks and param not in self._others
        }
        if not new:
            return
        method = WeakMethod(self._complete)  # it lives as long as the optimizer does

        def hook(param: Tensor) -> None:
            complete = method()
            if complete is not None:
                complete(param)

        for param in new.intersection(self._model.parameters()):
            self._hooks[param] = param.register_post_accumulate_grad_hook(hook)
        self._others.update(new.difference(self._hooks))

    def _complete(self, param: Tensor) -> None:
        """A parameter has its gradient."""
        if self._holds:
            return
        if not self._wrapping_is_known and not is_dtensor(param):
            self._check_wrapping()
            self._wrapping_is_known = True
        if is_dtensor(param):
            _wait_for_offload(param)
        if self._step_one(param):
            param.grad = None

    def _step_one(self, param: Tensor) -> bool:
        """A step of one parameter. False if the optimizer does not hold it."""
        with self._lock, torch.no_grad():
            group = self._known_groups().get(param)
            if group is None:
                return False
            self._check_options(group)
            if param in self._stepped:
                param.grad = None  # step() would take it
                raise RuntimeError(
                    f"{self._name(param)} has a second gradient since optimizer.step(), and its "
                    "step is taken. Call the optimizer's step(), or its zero_grad(), after each "
                    "backward pass, and those before the last one of a step under the handle's "
                    "accumulate(). Where the model is checkpointed: with use_reentrant=False"
                )
            self._optimizer._step_groups(
                [{**group, "params": [param]}], self._kept[param], None, self._find_scaling
            )
            self._stepped.add(param)
        return True

    def _name(self, param: Tensor) -> str:
        names = (name for name, own in self._model.named_parameters() if own is param)
        return next(names, f"A parameter of shape {list(param.shape)}")

    def _known_groups(self) -> dict[Tensor, dict[str, Any]]:
        """The optimizer's, by parameter: found once a step, as others may be loaded between."""
        if self._groups is None:
            self._groups = {p: g for g in self._optimizer.param_groups for p in g["params"]}
            self._kept = {param: self._kept.get(param) or Kept() for param in self._groups}
        return self._groups

    @property
    def _is_active(self) -> bool:
        """Whether gradients that are complete are to be stepped with."""
        return self._holds == 0 and self._optimizer._released is self

    def _check_wrapping(self) -> None:
        """Raises RuntimeError where a DistributedDataParallel is around the model, not in it.

        The hooks would take the gradients of this rank alone, without an error.
        """
        if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
            return
        hooked = set(self._model.parameters()) - self._others
        if _is_wrapped(hooked):
            gc.collect()  # it may be an old one
            if _is_wrapped(hooked):
                raise RuntimeError(
                    "The model is in a DistributedDataParallel, which reduces gradients after "
                    "they are complete: pass that to release_gradients, once it is made"
                )


def _wait_for_offload(param: DTensor) -> None:
    """FSDP2 with CPUOffloadPolicy() calls the hook beside a copy to pinned memory.

    torch waits for it only from 2.13 on.
    """
    local, mesh = param.to_local(), param.device_mesh
    if local.device.type == "cpu" and mesh.device_type != "cpu":
        torch.get_device_module(mesh.device_type).current_stream().synchronize()


def _is_wrapped(params: set[nn.Parameter]) -> bool:
    """Whether a DistributedDataParallel has one of them. It does not mark its parameters."""
    return any(
        issubclass(type(thing), DistributedDataParallel)
        and not params.isdisjoint(thing.parameters())
        for thing in gc.get_objects()
    )


class _Buckets:
    """A DistributedDataParallel whose buckets are stepped in the backward pass.

    While one is reduced the one before it is stepped, on the thread and stream of the backward
    pass. A gradient that is reduced is a view of its bucket. It has to stay so until the reducer
    has ended: it would make a new one in its place.
    """

    def __init__(self, wrapper: DistributedDataParallel, released: Released) -> None:
        self._wrapper, self._released = ref(wrapper), ref(released)
        self._start()

    @staticmethod
    def register(wrapper: DistributedDataParallel, released: Released) -> None:
        """Raises RuntimeError where there is another communication hook, which are for good."""
        if getattr(wrapper, "_use_python_reducer", False):
            raise RuntimeError("release_gradients does not go with DDP's python_reducer")
        buckets = _Buckets(wrapper, released)
        try:
            # A lambda: DDP compares annotations, which are strings here.
            wrapper.register_comm_hook(None, lambda state, bucket: buckets.reduce(bucket))
        except RuntimeError as error:
            raise RuntimeError(
                "release_gradients needs the communication hook of the DistributedDataParallel, "
                "which has one already, by mixed_precision or by a release that was removed: "
                "make a new DistributedDataParallel without one"
            ) from error

    def _start(self) -> None:
        self._reducing: tuple[Future[Tensor], list[Tensor]] | None = None
        # Parameters that have no gradient here, and may have one of other ranks in the end.
        self._unused: list[Tensor] = []
        self._stepped: list[Tensor] = []
        # Those of which an error has kept the step.
        self._left: list[Tensor] = []
        self._error: Exception | None = None

    def reduce(self, bucket: GradBucket) -> Future[Tensor]:
        """The communication hook: the mean over ranks, with the bits of DDP's own."""
        wrapper, released = self._wrapper(), self._released()
        assert wrapper is not None
        buffer = bucket.buffer().mul_(1 / wrapper.process_group.size())
        work = dist.all_reduce(buffer, group=wrapper.process_group, async_op=True)
        mean: Future[Tensor] = work.get_future().then(lambda future: future.value()[0])
        if released is None or not released._is_active:
            return mean
        if bucket.index() == 0:  # they come in order
            self._start()
            at_end(lambda: self._step_last(released))
            if wrapper._join_config.enable:
                self._error = RuntimeError(
                    "release_gradients does not go with DistributedDataParallel.join()"
                )
        self._step_reduced(released)
        params = []
        for param, grad in zip(bucket.parameters(), bucket.gradients(), strict=True):
            if param not in released._known_groups():
                continue
            if param.grad is None:
                self._unused.append(param)
                continue
            # Frees the one of before the reduction, of which the bucket has a copy. With
            # gradient_as_bucket_view=True it is this already.
            param.grad = grad
            params.append(param)
        self._reducing = mean, params
        return mean

    def _step_reduced(self, released: Released) -> None:
        """Steps the bucket that was given last, once it is reduced."""
        if self._reducing is None:
            return
        (mean, params), self._reducing = self._reducing, None
        mean.wait()
        for param in params:
            self._step(released, param)

    def _step(self, released: Released, param: Tensor) -> None:
        """An error is raised at the end: before, it would leave the reducer halfway."""
        if self._error is None:
            try:
                released._step_one(param)
            except Exception as error:
                self._error = error
        (self._stepped if self._error is None else self._left).append(param)

    def _step_last(self, released: Released) -> None:
        self._step_reduced(released)
        # After the reducer's own, which is given later than this.
        at_end(lambda: self._end(released))

    def _end(self, released: Released) -> None:
        wrapper = self._wrapper()
        assert wrapper is not None
        for param in self._unused:
            if param.grad is not None:
                self._step(released, param)
        for param in self._stepped:
            param.grad = None
        for param in self._left:
            if not wrapper.gradient_as_bucket_view and param.grad is not None:
                param.grad = param.grad.clone()  # the reducer takes no view in the next pass
        error = self._error
        self._start()
        if error is not None:
            raise error
