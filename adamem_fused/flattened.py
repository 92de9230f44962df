"""Schemes that flatten or split plain parameters: asked for what their pieces are of, or refused.

Beta belongs to a whole tensor, to a whole row of it, or to the whole model, and the norm by which
gradients are clipped to the whole model. A rank that is given a piece of a flat buffer, or one of
many optimizers, cannot know it. A DTensor says what it is a part of (sharding.py); these do not, so
they are told by what they leave: an attribute, the caller, or a parameter that was not there
before. DeepSpeed's ZeRO 1 and 2 know what is in their buffers, and flat.py does the rest; what does
not is refused, as betas would be other ones.
"""

from __future__ import annotations

import gc
import sys
from collections import Counter
from collections.abc import Iterable
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Size, Tensor
from torch.nn import Parameter
from torch.nn.parameter import is_lazy

from adamem_fused import flat
from adamem_fused.sharding import any_dtensor
from adamem_fused.warn import warn_user

if TYPE_CHECKING:
    from adamem_fused.optimizer import AdaptiveMemoryOptimizer

# How many parameters of each shape an optimizer was given. Not weak references, which would
# keep torch.utils.swap_tensors from working.
Given = Counter[Size]

# Modules whose frames call an optimizer's step for flat partitions.
_ZERO = (
    "deepspeed.runtime.bf16_optimizer",
    "deepspeed.runtime.fp16.fused_optimizer",
    "deepspeed.runtime.superoffload",
    "deepspeed.runtime.zenflow",
    "deepspeed.runtime.zero",
)

# What DeepSpeed's wrappers call, for each parameter group, this rank's part of a flat buffer, the
# tensors in it, and where in the buffer each begins; and whether there are other ranks' parts.
_DEEPSPEED = (
    (
        *("single_partition_of_fp32_groups", "round_robin_bit16_groups"),
        *("round_robin_bit16_offsets", True),
    ),
    ("fp32_groups_flat_partition", "bf16_groups", None, True),
    ("fp32_groups_flat", "fp16_groups", None, False),
)

# Modules that make an optimizer of a class they are given for a part of the parameters.
_OVER_RANKS = {
    "fairscale.optim.oss": "fairscale's OSS",
    "torch.distributed.optim.zero_redundancy_optimizer": "ZeroRedundancyOptimizer",
}
_BY_PARAMETER = {
    "torch.distributed.optim.apply_optimizer_in_backward": "_apply_optimizer_in_backward",
    "torchao.optim.cpu_offload": "torchao's CPUOffloadOptimizer",
}

_INSTEAD = "Use FSDP2 (torch.distributed.fsdp.fully_shard) or DistributedDataParallel"


def _find_caller(modules: Iterable[str]) -> FrameType | None:
    """The nearest frame of these modules, or of modules within them."""
    if not any(module in sys.modules for module in modules):
        return None
    prefixes = tuple(f"{module}." for module in modules)
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if f"{frame.f_globals.get('__name__')}.".startswith(prefixes):
            return frame
        frame = frame.f_back
    return None


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


# ---- one optimizer of several ---------------------------------------------------------


def find_maker() -> str | None:
    """To be called while an optimizer is made: who makes one of several, if so, in a sentence."""
    frame = _find_caller(_OVER_RANKS)
    if frame is not None:
        maker = frame.f_locals.get("self")
        if getattr(maker, "world_size", _world_size()) > 1:
            name = _OVER_RANKS[frame.f_globals["__name__"]]
            return f"{name} gives each rank's optimizer a part of the parameters"
    frame = _find_caller(_BY_PARAMETER)
    if frame is not None:
        return f"{_BY_PARAMETER[frame.f_globals['__name__']]} makes an optimizer for each parameter"
    return None


def check_scope(maker: str | None, group: dict[str, Any]) -> None:
    """Raises RuntimeError on beta_scope="global" where `maker` makes one optimizer of several."""
    if maker is not None and group["beta_scope"] == "global":
        raise RuntimeError(
            f'{maker}, so beta_scope="global" would be a beta for that part, not for the model. '
            'Pass beta_scope="tensor"'
        )


def check_norm(maker: str | None, takes_norm: bool) -> None:
    """Raises RuntimeError where a step of one optimizer of several asks for the norm."""
    if maker is not None and takes_norm:
        raise RuntimeError(
            f"{maker}, so max_grad_norm and skip_nonfinite would go by the norm of that part, not "
            "of the model. Leave them out, or use FSDP2 (torch.distributed.fsdp.fully_shard), "
            "which offloads too (CPUOffloadPolicy)"
        )


# ---- flat parameters ------------------------------------------------------------------


def _has_shape(param: Tensor) -> bool:
    """Not so that of a lazy module, or of symbols, as in make_fx's tracing."""
    return not is_lazy(param) and all(type(size) is int for size in param.shape)


def shapes(params: Iterable[Tensor]) -> Given:
    return Counter(param.shape for param in params if _has_shape(param))


def check_marks(group: dict[str, Any]) -> None:
    """Raises RuntimeError on parameters that FSDP1 has flattened, unless beta is right for them.

    It is where nothing is split, as with NO_SHARD, and nothing joined or beta_scope="global".
    """
    params = [param for param in group["params"] if param.requires_grad]
    flattened = [param for param in params if getattr(param, "_fsdp_flattened", False)]
    views = [param for param in flattened if not getattr(param, "_is_flat_param", False)]
    # The whole tensors of NO_SHARD have their shapes; the pieces of others have one dimension.
    split = any(param.dim() == 1 for param in views) and _any_split(views)
    joined = False
    for param in flattened:
        if getattr(param, "_is_flat_param", False):
            split = split or param.numel() < param._unpadded_unsharded_size.numel()
            joined = joined or param._num_params > 1
    if split:
        raise RuntimeError(
            "FSDP1 (FullyShardedDataParallel) splits flattened parameters over ranks, so each "
            f"rank would take betas of its own for its pieces. {_INSTEAD}"
        )
    if joined and group["beta_scope"] != "global":
        raise RuntimeError(
            "FSDP1 (FullyShardedDataParallel) with use_orig_params=False joins tensors into one, "
            f"which would take one beta for them. {_INSTEAD}, or pass use_orig_params=True"
        )


def _any_split(views: list[Tensor]) -> bool:
    """Whether FSDP1 has split one of its views, or may have, where it cannot be found.

    A view does not know its FSDP unit.
    """
    module = sys.modules["torch.distributed.fsdp._flat_param"]
    whole: set[int] = set()
    for handle in gc.get_objects():
        if type(handle) is module.FlatParamHandle and not handle.uses_sharded_strategy:
            flat = handle.flat_param
            whole.update(map(id, (*(flat._params or ()), *(flat._shared_params or ()))))
    return any(param.dim() == 1 and id(param) not in whole for param in views)


def check_new(optimizer: AdaptiveMemoryOptimizer, group: dict[str, Any], new: list[Tensor]) -> None:
    """Raises RuntimeError on flat parameters among those of a group that have no state yet.

    Not where it is known what they hold: that is kept. With one rank and beta_scope="global" it
    warns: beta is right if a step has the whole model.
    """
    check_marks(group)
    new = [param for param in new if optimizer._flat_of(param) is None]
    if any(getattr(param, "tensor_model_parallel", False) for param in new) and _world_size() > 1:
        warn_user(
            "Parameters marked tensor_model_parallel (Megatron, DeepSpeed's AutoTP) are pieces of "
            "tensors unless there is one such rank: each rank then takes betas of its own. Use "
            "DTensors (torch.distributed.tensor.parallel)"
        )
    caller = _find_caller(_ZERO) if new else None
    if caller is not None:
        scheme, instead = "DeepSpeed's ZeRO", f"{_INSTEAD}, or stage 1 or 2"
        found = [_ask_deepspeed(caller.f_locals.get("self"), param) for param in new]
        known = {param: own for param, own in zip(new, found, strict=True) if own is not None}
        if len(known) == len(new) and (group["beta_scope"] != "global" or _world_size() > 1):
            flat.check_group(group, optimizer._takes_norm)
            optimizer._keep_flat(known)
            return
    elif _any_flat(new, optimizer.param_groups, optimizer._given):
        scheme = "A scheme like Megatron's distributed optimizer"
        instead = f"{_INSTEAD}, or say what they hold (register_flat_parameter)"
    else:
        return
    if _world_size() > 1:
        raise RuntimeError(
            f"{scheme} has put pieces of flat buffers in the place of parameters, so each rank "
            f"would take betas of its own for its pieces. {instead}"
        )
    if group["beta_scope"] != "global":
        raise RuntimeError(
            f"{scheme} has put a flat buffer in the place of parameters, which would take one "
            f"beta for them. {instead}"
        )
    warn_user(
        f"{scheme} has put a flat buffer in the place of parameters: beta is the model's only if "
        f"each step has all of it. {instead}"
    )


def _ask_deepspeed(wrapper: Any, param: Tensor) -> flat.Flat | None:
    """What a parameter holds that a wrapper of DeepSpeed's has made; None where it is not known."""
    if getattr(wrapper, "zenflow", False):
        return None  # which steps some columns before others
    for parts_name, tensors_name, offsets_name, is_split in _DEEPSPEED:
        for i, part in enumerate(getattr(wrapper, parts_name, ())):
            if part is not param:
                continue
            tensors = getattr(wrapper, tensors_name)[i]
            # One that tensor parallelism has split is not whole in the buffer either.
            if any(getattr(tensor, "tensor_model_parallel", False) for tensor in tensors):
                return None
            offsets = getattr(wrapper, offsets_name, None) if offsets_name else None
            process_group = wrapper.real_dp_process_group[i] if is_split else None
            return flat.make(
                param, [t.shape for t in tensors], offsets and offsets[i], process_group
            )
    return None


def _any_flat(new: list[Tensor], groups: list[dict[str, Any]], given: Given) -> bool:
    """Whether a parameter is a flat buffer or a piece of one, in the place of others.

    Such a one has one dimension, a size that no parameter had which the optimizer was given, and
    is no Parameter, or no matrix is left beside it. All of them hold what they stand for: over
    the ranks, of which one may have less, as much as what is gone. In one process nothing is
    split: there one has to stand for several. What a user has pruned or grown is not meant.
    """

    def is_flat(param: Tensor) -> bool:
        # Master copies are trained by a gradient that they are given, and do not require one.
        is_trained = param.requires_grad or param.grad is not None
        return (
            is_trained
            and _has_shape(param)
            and param.dim() == 1
            and param.shape not in given
            and not any_dtensor([param])
        )

    if not any(map(is_flat, new)):
        return False
    params = [param for group in groups for param in group["params"] if _has_shape(param)]
    flat = list(filter(is_flat, params))
    gone = given - shapes(params)
    held = _world_size() * sum(param.numel() for param in flat)
    if 2 * held < sum(shape.numel() * count for shape, count in gone.items()):
        return False
    if _world_size() == 1 and len(params) >= given.total():
        return False
    if not all(isinstance(param, Parameter) for param in flat):
        return True
    return any(len(shape) > 1 for shape in given) and all(param.dim() < 2 for param in params)
