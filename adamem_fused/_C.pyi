from typing import Any

from torch import Tensor

torch_version: str

def gather(
    groups: list[list[Tensor]],
    state: dict[Tensor, Any],
    names: tuple[str, ...],
    by_row: list[bool],
    rows: list[bool],
) -> tuple[list[int], tuple[list[Tensor], ...]] | None: ...
def describe(
    lists: tuple[list[Tensor], ...],
    data: int,
    last_addresses: bytes,
    last_structure: bytes,
    updated: bool,
) -> tuple[bytes, bytes]: ...
def any_modes() -> bool: ...
