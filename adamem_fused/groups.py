"""Parameter groups as they are most often written by hand: which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from adamem_fused.metrics import named_parameters
from adamem_fused.options import check_number

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float | None = None,
    *,
    embeddings: dict[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """A model's trained parameters in groups for an optimizer of torch.optim or of this package.

    Without weight decay are biases, which have "bias" in their own name; whatever has fewer than
    two dimensions; the parameters of norms, which are modules of a class whose name, or a base's,
    ends in "Norm"; and what a model, or a module of it, names in `no_weight_decay()`, as timm's do.
    All others have it. Frozen parameters are left out.

    Args:
        model: a module; or (name, parameter) pairs, in which norms and embeddings are not known as
            such.
        weight_decay: of those that decay; None: the optimizer's.
        embeddings: options for the weights of nn.Embedding and nn.EmbeddingBag, in a group of their
            own: {"weight_decay": 0.0}, or {"beta_scope": "tensor"} beside rows. They decay unless
            it says otherwise, or the model exempts them. A weight that an output layer shares is
            one of them. None: they are as other matrices.

    Returns:
        Groups of which "params" is a list of (name, parameter) pairs, in the model's order, from
        which torch's optimizers keep the names in "param_names": those that decay, embeddings,
        those that do not. None of them is empty.

    Raises:
        TypeError: model or embeddings is something else.
        ValueError: a bad weight_decay; nothing to train; embeddings with pairs, or with "params".
    """
    if weight_decay is not None:
        check_number("weight_decay", weight_decay)
    named = named_parameters(model)
    _check_embeddings(embeddings, model)
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    of_embeddings = {
        id(param)
        for module in modules
        if embeddings is not None and isinstance(module, _EMBEDDINGS)
        for param in _own(module)
    }
    exempt = {
        id(param)
        for module in modules
        for param in (*(_own(module) if _is_norm(module) else ()), *_no_weight_decay(module))
    }

    found: dict[tuple[bool, bool], list[tuple[str, Tensor]]] = {}
    seen: set[int] = set()
    for name, param in named:
        if not param.requires_grad or id(param) in seen:
            continue
        seen.add(id(param))
        is_bias = "bias" in name.rpartition(".")[2]
        decays = param.dim() > 1 and not is_bias and id(param) not in exempt
        found.setdefault((id(param) in of_embeddings, decays), []).append((name, param))
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    groups: list[dict[str, Any]] = [
        {
            "params": found.get((is_embedding, decays), []),
            **(decay if decays else {"weight_decay": 0.0}),
            **((embeddings or {}) if is_embedding else {}),
        }
        for is_embedding, decays in ((False, True), (True, True), (True, False), (False, False))
    ]
    groups = [group for group in groups if group["params"]]
    if not groups:
        raise ValueError(f"no parameter to train: of {len(named)} parameters none requires grad")
    return groups


def _check_embeddings(embeddings: Any, model: Any) -> None:
    if embeddings is None:
        return
    if not isinstance(embeddings, dict):
        raise TypeError(
            "embeddings has to be a dict of a group's options, or None, not a "
            f"{type(embeddings).__name__}"
        )
    if not isinstance(model, nn.Module):
        raise ValueError("embeddings needs the model: its parameters do not say what they are of")
    if "params" in embeddings:
        raise ValueError('embeddings has "params", which are found in the model')


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters(recurse=False)
    if is_parametrized(module):
        yield from cast("nn.ModuleDict", module.parametrizations).parameters()


def _is_norm(module: nn.Module) -> bool:
    # torch's BatchNorm2d and InstanceNorm2d are a _BatchNorm and an _InstanceNorm.
    return any(cls.__name__.endswith("Norm") for cls in type(module).__mro__)


def _no_weight_decay(module: nn.Module) -> Iterator[Tensor]:
    """The parameters that a module exempts, by their names in it, as timm's models do."""
    find = getattr(module, "no_weight_decay", None)
    names = set(find()) if callable(find) else ()
    for name, param in module.named_parameters(remove_duplicate=False) if names else ():
        if name in names:
            yield param
