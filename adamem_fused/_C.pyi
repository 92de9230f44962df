from typing import Any, TypeAlias

from torch import Tensor

# Sizes of groups; parameters, gradients and state by name; parameters; DTensors written to.
Gathered: TypeAlias = tuple[list[int], tuple[list[Tensor], ...], list[Tensor], list[Tensor]]

torch_version: str

def gather(
    groups: list[list[Tensor]],
    state: dict[Tensor, Any],
    names: tuple[str, ...],
    others: tuple[str | Tensor | None, ...],
    by_row: list[bool],
    rows: list[bool],
    dtensor: type[Tensor] | None,
    known: list[Any],
    crossing: bytes,
) -> tuple[Gathered | None, Gathered | None] | list[Any] | None: ...
def bump_versions(tensors: list[Tensor]) -> None: ...
def describe(
    lists: tuple[list[Tensor], ...],
    last_addresses: bytes,
    last_structure: bytes,
    updated: bool,
) -> tuple[bytes, bytes]: ...
def any_modes() -> bool: ...
def betas(
    groups: list[list[Tensor]], state: dict[Tensor, Any], name: str, dtensor: type[Tensor] | None
) -> tuple[Tensor, bytes] | None: ...
