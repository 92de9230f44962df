"""Numbers to look at: a step's norm and betas, as tensors on their device that nobody waits for."""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterable
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from adamem_fused import clipping, sharding
from adamem_fused.backends import ops
from adamem_fused.backends.batch import bookkeeping_dtype

if TYPE_CHECKING:
    from adamem_fused.flat import Pieces
    from adamem_fused.optimizer import AdaptiveMemoryOptimizer

_OF_BETAS = ("beta_mean", "beta_min", "at_cap")

Named: TypeAlias = "nn.Module | Iterable[tuple[str, Tensor]]"


class Betas(NamedTuple):
    """The last betas of some parameters, those on one device; of DTensors those on this rank.

    A parameter without elements has none.
    """

    values: Tensor  # [betas], new memory, in the order of the parameters
    # Two int64 of each parameter: its elements, and how many of these betas are its, 0 or more.
    structure: bytes

    def numels_and_counts(self) -> tuple[list[int], list[int]]:
        words = memoryview(self.structure).cast("q").tolist()
        return words[::2], words[1::2]


def read_betas(lists: list[list[Tensor]], state: dict[Tensor, Any]) -> list[Betas]:
    """The last betas of the parameters in these lists, by device; nothing where there are none."""
    if ops.extension is not None and not torch.compiler.is_compiling():
        found = ops.extension.betas(lists, state, "beta", sharding.dtensor_class())
        if found is not None:
            values, structure = found
            return [Betas(values.to(bookkeeping_dtype(values.device)), structure)]
    return _read_any(lists, state)


def _read_any(lists: list[list[Tensor]], state: dict[Tensor, Any]) -> list[Betas]:
    """The same in Python, for betas on several devices, and where there is no extension."""
    params = list(chain(*lists))
    betas: dict[torch.device, list[Tensor]] = {}
    structures: dict[torch.device, array[int]] = {}
    for i, param in enumerate(params):
        own = state.get(param)
        beta = own.get("beta") if isinstance(own, dict) else None
        if not isinstance(beta, Tensor) or param.numel() == 0:
            continue
        beta = sharding.local(beta)
        if beta.device not in betas:
            betas[beta.device] = []
            structures[beta.device] = array("q", chain(*((p.numel(), 0) for p in params)))
        betas[beta.device].append(beta.reshape(-1).to(bookkeeping_dtype(beta.device)))
        structures[beta.device][2 * i + 1] = beta.numel()
    return [
        Betas(torch.cat(betas[device]), structure.tobytes())
        for device, structure in structures.items()
    ]


class Elements:
    """What each of `Betas` stands for, on their device.

    A beta is that of the elements of its parameter, shared evenly among the parameter's betas. So
    rows on other ranks are taken to be like those on this one. Of a flat parameter, whose place is
    in `flat`, the elements of each are known.
    """

    def __init__(
        self, betas: Betas, sizes: list[int], caps: list[float], flat: dict[int, Pieces]
    ) -> None:
        numels, counts = betas.numels_and_counts()
        self.key = betas.structure, sizes, caps, flat
        # Before a step has fitted them to it, betas may be of another scope.
        own = {i: p.numels for i, p in flat.items() if sum(p.units) == counts[i]}
        numels = [sum(own.get(i, (numel,))) for i, numel in enumerate(numels)]
        like: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
        repeats = torch.tensor(counts, device="cpu")
        elements = torch.tensor(numels, **like) * (repeats > 0)
        self.total = float(elements.sum())
        weights = elements / repeats.clamp(min=1)
        cap = torch.tensor(caps, **like)
        # A float32 beta at its cap is the cap rounded to float32, a float64 one may be either.
        cap = cap.minimum(cap.to(torch.float32)).repeat_interleave(
            torch.tensor(sizes, device="cpu")
        )
        # [betas], their elements, of which sums are exact, and from where on they are at their cap.
        weights, cap = (values.repeat_interleave(repeats) for values in (weights, cap))
        for i, elements_of in own.items():
            start = sum(counts[:i])
            weights[start : start + counts[i]] = torch.tensor(elements_of, **like)
        self.weights, self.caps = weights.to(betas.values), cap.to(betas.values)

    def summarize(self, values: Tensor) -> list[Tensor]:
        """Mean, smallest, and share at the cap."""
        at_cap = (values >= self.caps).to(values.dtype)
        sums = [values.dot(self.weights), at_cap.dot(self.weights)]
        mean, share = (total / self.total for total in sums)
        return [mean, values.min(), share]


def read_metrics(
    optimizer: AdaptiveMemoryOptimizer, kept: dict[torch.device, Elements]
) -> dict[str, Tensor]:
    """As the optimizer's `metrics`.

    kept: by device, from call to call, so that nothing is copied to a GPU where all is as it was.
    """
    skipped, grad_norm = optimizer.skipped_steps, optimizer.grad_norm
    like: dict[str, Any] = {"dtype": bookkeeping_dtype(skipped.device), "device": skipped.device}
    found: dict[str, Tensor] = {}
    if grad_norm is not None:
        found["grad_norm"] = grad_norm
    lists = [group["params"] for group in optimizer.param_groups]
    parts = [betas for betas in read_betas(lists, optimizer.state) if betas.values.numel() > 0]
    if parts:
        sizes = list(map(len, lists))
        caps = [float(optimizer._hyper(group).beta_max) for group in optimizer.param_groups]
        flat = _flat_pieces(optimizer) if optimizer._flat else {}
        for betas in parts:
            known = kept.get(betas.values.device)
            if known is None or known.key != (betas.structure, sizes, caps, flat):
                kept[betas.values.device] = Elements(betas, sizes, caps, flat)
        numbers = over_devices([(kept[betas.values.device], betas.values) for betas in parts])
    else:
        numbers = [torch.full((), math.nan, **like) for _ in _OF_BETAS]
    return {**found, **dict(zip(_OF_BETAS, numbers, strict=True)), "skipped_steps": skipped}


def _flat_pieces(optimizer: AdaptiveMemoryOptimizer) -> dict[int, Pieces]:
    """Of flat parameters, by their place."""
    scopes = [g["beta_scope"] for g in optimizer.param_groups for _ in g["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return {
        i: known.pieces(scope)
        for i, (param, scope) in enumerate(zip(params, scopes, strict=True))
        if (known := optimizer._flat_of(param)) is not None
    }


def over_devices(parts: list[tuple[Elements, Tensor]]) -> list[Tensor]:
    """Mean, smallest, and share at the cap, of the values of each part's elements."""
    numbers = [elements.summarize(values) for elements, values in parts]
    if len(parts) == 1:
        return numbers[0]
    home = clipping.home_device([values.device for _, values in parts])
    means, smallest, at_cap = (
        [number.to(home, bookkeeping_dtype(home)) for number in of_parts]
        for of_parts in zip(*numbers, strict=True)
    )
    total = sum(elements.total for elements, _ in parts)
    shares = [elements.total / total for elements, _ in parts]
    mean, share = (
        torch.stack([number * share for number, share in zip(terms, shares, strict=True)]).sum()
        for terms in (means, at_cap)
    )
    return [mean, torch.stack(smallest).min(), share]


def read_betas_by_name(
    optimizer: AdaptiveMemoryOptimizer, named: Named | None
) -> dict[str, Tensor]:
    """As the optimizer's `betas_by_name`."""
    pairs = _given_names(optimizer) if named is None else named_parameters(named)
    found: dict[str, Tensor] = {}
    for betas in read_betas([[param for _, param in pairs]], optimizer.state):
        _, counts = betas.numels_and_counts()
        names = [name for (name, _), count in zip(pairs, counts, strict=True) if count > 0]
        found.update(zip(names, _means(betas.values, counts).unbind(), strict=True))
    return {name: found[name] for name, _ in pairs if name in found}


def _means(values: Tensor, counts: list[int]) -> Tensor:
    """Of each parameter that has betas, their mean: [parameters]."""
    counts = [count for count in counts if count > 0]
    if len(counts) == len(values):
        return values
    lengths = torch.tensor(counts, device="cpu")
    owners = torch.arange(len(counts), device="cpu").repeat_interleave(lengths)
    owners, sizes = (t.to(values.device, non_blocking=True) for t in (owners, lengths))
    return values.new_zeros(len(counts)).index_add_(0, owners, values) / sizes


def _given_names(optimizer: AdaptiveMemoryOptimizer) -> list[tuple[str, Tensor]]:
    """The names that torch's groups have where an optimizer was made with (name, parameter)."""
    if any("param_names" not in group for group in optimizer.param_groups):
        raise ValueError(
            "this optimizer was not given its parameters' names: pass the model, or "
            "model.named_parameters(), here or when the optimizer is made"
        )
    if any(len(g["param_names"]) != len(g["params"]) for g in optimizer.param_groups):
        raise ValueError(
            "there are names of other parameters than the optimizer has by now: a scheme such as "
            "DeepSpeed's ZeRO has replaced them, and its flat ones have no names"
        )
    return [
        pair
        for group in optimizer.param_groups
        for pair in zip(group["param_names"], group["params"], strict=True)
    ]


def named_parameters(named: Any) -> list[tuple[str, Tensor]]:
    """(name, parameter) pairs, of a module or as they are given.

    Raises:
        TypeError: they are neither.
    """
    if isinstance(named, nn.Module):
        return list(named.named_parameters())
    pairs = (
        list(named) if isinstance(named, Iterable) and not isinstance(named, Tensor) else [named]
    )
    for pair in pairs:
        match pair:
            case (str(), Tensor()):
                continue
        raise TypeError(
            "a model or (name, parameter) pairs, as of model.named_parameters(), are needed, and "
            f"there is a {type(pair).__name__}"
        )
    return pairs
