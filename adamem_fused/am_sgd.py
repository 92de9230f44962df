"""AMSGD: SGD with momentum whose momentum is set anew at every step."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from adamem_fused.backends import Backend
from adamem_fused.backends.batch import Lr, SGDBatch, SGDHyper
from adamem_fused.checkpoints import from_sgd
from adamem_fused.optimizer import AdaptiveMemoryOptimizer, ParamsT, over_lr, scalar_lr
from adamem_fused.options import check_number, check_options, plain


class AMSGD(AdaptiveMemoryOptimizer):
    """SGD with Adaptive Memory momentum, in place of torch.optim.SGD.

    Each step takes as momentum the value in [0, beta_max] that solves the proximal
    problem of a two-plane model of the loss, in closed form from dot products of gradient
    and memory (Topollai & Choromanska, arXiv 2510.04988, AM-SGD). The momentum buffer is
    an average of gradients, (1 - beta) g + beta d, where SGD's is a sum: at a momentum of
    0.9, SGD's lr of 0.1 is this optimizer's lr of 1.

    State of a parameter: `momentum_buffer`, of its shape, float32 (float64 for float64
    parameters, complex for complex ones); and 0-dim tensors on its device: `step`,
    `prev_lr`, and `beta`, the beta of the last step, of shape [rows] where beta_scope="row" gives
    each row its own. With state_dtype="int8" `momentum_buffer_codes` and `momentum_buffer_scales`
    stand for `momentum_buffer`. Nothing of it is read back from the device in a step.

    Args:
        params: parameters, (name, parameter) pairs or parameter groups. float32, float64,
            bfloat16, float16, complex64 or complex128.
        lr: learning rate, a float or a tensor of one element.
        beta_max: the cap of beta, in [0, 1).
        weight_decay: added to the gradient, as in SGD.
        memory_lambda: weight of the change of direction in the proximal problem.
        memory_plane: "level" gives the memory's plane the previous loss at the present
            iterate, "anchored" lets it pass through the previous iterate.
        gap: the difference of losses f(x_{t-1}) - f(x_t), to first order from the
            "gradient", or from the "loss" that step(closure) returns. The latter needs
            beta_scope="global" and suits full-batch training.
        beta_scope: one "global" beta, one for each parameter "tensor", or for each "row" (index
            of the first dimension) of tensors with two dimensions or more. Vectors, scalars and
            tensors whose rows have fewer than 16 elements are one row.
        maximize: maximize the objective.
        foreach: True for the foreach backend. False without fused=True: the reference backend,
            one tensor at a time in float64, for checks.
        fused: True for a fused backend, or an error; False for none. With True, or with a
            fused `backend`, a step under torch.amp.GradScaler unscales by itself.
        capturable: as in torch.optim. State is on the device and is not read back with
            either value.
        backend: "cpu", "cuda", "triton", "foreach" or "reference"; None takes the fastest that is
            there.
        max_grad_norm: the norm of all gradients together, of every group, device and rank, to which
            a step scales them down, as torch.nn.utils.clip_grad_norm_ does before one. Gradients
            are not written. The attribute of this name may be set between steps.
        skip_nonfinite: leave parameters and state as they are where that norm is infinite or NaN,
            as GradScaler does. Decided on the device, on all ranks alike; `skipped_steps` counts.
        state_dtype: how the memories of float32 and bfloat16 parameters with 4,096 elements or
            more are stored: torch.bfloat16, or "int8", in blocks with a scale each; either is
            rounded stochastically (docs/low_precision.md). None: float32, or float64 for float64.
            This and the next three may be set in a group between steps.
        stochastic_rounding: round bfloat16 parameters stochastically, and no others.
        store_param_remainders: keep 8 further bits of a bfloat16 parameter's float32 value in the
            state, `param_remainder`, so that small updates add up: 3 bytes for both together.
        seed: of stochastic rounding, in [0, 2^63). The same seed gives the same bits. A checkpoint
            brings its own.

    Raises:
        ValueError: a hyperparameter out of range.
        TypeError: parameters to train of a dtype that is not optimized, or that state_dtype is not
            for.
        RuntimeError: a backend that was asked for and is not there; parameters that FSDP1 has
            flattened, or one beta for the model in a scheme that splits it (docs/ranks.md).
    """

    memories = ("momentum_buffer",)
    scalars: ClassVar[dict[str, float]] = {"step": 0.0, "prev_lr": 0.0, "beta": 0.0}

    row_scalars = ("beta",)

    _convert_state = staticmethod(from_sgd)

    def __init__(
        self,
        params: ParamsT,
        lr: Lr = 1e-2,
        beta_max: float = 0.9,
        weight_decay: float = 0.0,
        *,
        memory_lambda: float = 0.1,
        memory_plane: str = "level",
        gap: str = "gradient",
        beta_scope: str = "global",
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        backend: str | None = None,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        state_dtype: torch.dtype | str | None = None,
        stochastic_rounding: bool = False,
        store_param_remainders: bool = False,
        seed: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta_max": beta_max,
            "weight_decay": weight_decay,
            "memory_lambda": memory_lambda,
            "memory_plane": memory_plane,
            "gap": gap,
            "beta_scope": beta_scope,
            "maximize": maximize,
            "foreach": foreach,
            "fused": fused,
            "capturable": capturable,
            "backend": backend,
            "state_dtype": state_dtype,
            "stochastic_rounding": stochastic_rounding,
            "store_param_remainders": store_param_remainders,
            "seed": seed,
        }
        self._check_group(defaults)
        super().__init__(params, plain(defaults), max_grad_norm, skip_nonfinite)

    def _check_group(self, group: dict[str, Any], slack: float = 0.0) -> None:
        check_number("beta_max value", group["beta_max"], 1.0, slack)
        check_options(group, slack)

    def _new_batch(self, *lists: Any) -> SGDBatch:
        return SGDBatch(*lists)

    def _hyper(self, group: dict[str, Any]) -> SGDHyper:
        return SGDHyper(
            lr=scalar_lr(group["lr"]),
            beta_max=group["beta_max"],
            weight_decay=group["weight_decay"],
            memory_lambda=group["memory_lambda"],
            anchored=group["memory_plane"] == "anchored",
            loss_gap=group["gap"] == "loss",
            maximize=group["maximize"],
        )

    def _begin(
        self,
        backend: Backend,
        batch: SGDBatch,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor:
        return backend.sgd_begin(batch, grad_scale, found_inf)

    def _finish(
        self,
        backend: Backend,
        batch: SGDBatch,
        rows: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        backend.sgd_finish(batch, rows, grad_scale, found_inf)

    def _loss_factor(self, hyper: SGDHyper) -> Lr:
        return over_lr(1 + hyper.memory_lambda, hyper.lr)
