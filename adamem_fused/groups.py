"""Parameter groups as they are most often written by hand: which parameters decay."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeAlias, cast

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from adamem_fused.metrics import named_parameters
from adamem_fused.options import check_number

Options: TypeAlias = Mapping[str, Any]


def param_groups(
    model: nn.Module | Iterable[tuple[str, Tensor]],
    weight_decay: float | None = None,
    *,
    # By modules and classes of them: Any, since Mapping is invariant in its keys.
    modules: Mapping[Any, Options] | None = None,
) -> list[dict[str, Any]]:
    """A model's trained parameters in groups for an optimizer of torch.optim or of this package.

    Without weight decay are biases, which have "bias" in their own name; whatever has fewer than
    two dimensions; the parameters of norms, which are modules of a class whose name, or a base's,
    ends in "Norm"; and what a model, or a module of it, names in `no_weight_decay()`, as timm's do.
    All others have it. Frozen parameters are left out.

    Args:
        model: a module; or (name, parameter) pairs, in which norms are not known as such.
        weight_decay: of those that decay; None: the optimizer's.
        modules: options for all parameters in a module of the model, or in every module of a class:
            {model.layers: {"beta_scope": "row"}}, {nn.Embedding: {"weight_decay": 0.0}}. Where a
            parameter is in several, as a weight that an output layer shares with an embedding, it
            has the options of all of them, and of one that several have the last. What does not
            decay, by the above, stays so.

    Returns:
        Groups of which "params" is a list of (name, parameter) pairs, in the model's order, from
        which torch's optimizers keep the names in "param_names": matrices and the like first, then
        what does not decay by the above, with a group for all that have the same options. None of
        them is empty.

    Raises:
        TypeError: model or modules is something else.
        ValueError: a bad weight_decay; nothing to train; modules with pairs, with "params", or
            with one that the model does not have.
    """
    if weight_decay is not None:
        check_number("weight_decay", weight_decay)
    named = named_parameters(model)
    _check_modules(modules, model)
    within = list(model.modules()) if isinstance(model, nn.Module) else []
    entries = [(_parameters_in(key, within), options) for key, options in (modules or {}).items()]
    exempt = {
        id(param)
        for module in within
        for param in (*(_own(module) if _is_norm(module) else ()), *_no_weight_decay(module))
    }

    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    # By whether they decay: options, and what has them.
    found: dict[bool, list[tuple[dict[str, Any], list[tuple[str, Tensor]]]]] = {True: [], False: []}
    seen: set[int] = set()
    for name, param in named:
        if not param.requires_grad or id(param) in seen:
            continue
        seen.add(id(param))
        is_bias = "bias" in name.rpartition(".")[2]
        decays = param.dim() > 1 and not is_bias and id(param) not in exempt
        own: dict[str, Any] = dict(decay)
        for ids, options in entries:
            if id(param) in ids:
                own.update(options)
        if not decays:
            own["weight_decay"] = 0.0
        alike = next((pairs for options, pairs in found[decays] if options == own), None)
        if alike is None:
            alike = []
            found[decays].append((own, alike))
        alike.append((name, param))
    if not seen:
        raise ValueError(f"no parameter to train: of {len(named)} parameters none requires grad")
    return [{"params": pairs, **own} for own, pairs in (*found[True], *found[False])]


def _check_modules(modules: Any, model: Any) -> None:
    if modules is None:
        return
    if not isinstance(modules, Mapping):
        raise TypeError(
            "modules has to be a dict of options by module or class, or None, not a "
            f"{type(modules).__name__}"
        )
    if not isinstance(model, nn.Module):
        raise ValueError("modules needs the model: its parameters do not say what they are of")
    within = {
        *model.modules(),
        *(cls for module in model.modules() for cls in type(module).__mro__),
    }
    for key, options in modules.items():
        if not isinstance(key, nn.Module) and not (
            isinstance(key, type) and issubclass(key, nn.Module)
        ):
            raise TypeError(
                f"modules has options for a {type(key).__name__}, which is neither a module, as "
                "model.layers, nor a class of modules"
            )
        name = key.__name__ if isinstance(key, type) else f"this {type(key).__name__}"
        if not isinstance(options, Mapping):
            raise TypeError(
                f"the options that modules has for {name} have to be a dict, not a "
                f"{type(options).__name__}"
            )
        if "params" in options:
            raise ValueError(f'modules has "params" for {name}: which they are, the model says')
        if key not in within:
            which = (
                "none of that class"
                if isinstance(key, type)
                else "no such module: a slice of its layers, or a copy, is another"
            )
            raise ValueError(f"modules has options for {name}, and the model has {which}")


def _parameters_in(key: nn.Module | type[nn.Module], within: Iterable[nn.Module]) -> set[int]:
    of_key = [key] if isinstance(key, nn.Module) else [m for m in within if isinstance(m, key)]
    return {id(param) for module in of_key for param in module.parameters()}


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
