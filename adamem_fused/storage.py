"""How a parameter's state is kept: which of the formats of formats.py its group's options give it.

    state_dtype              None, torch.bfloat16 or "int8", a name in a group: of the memories
    stochastic_rounding      of a bfloat16 parameter
    store_param_remainders   8 further bits of a bfloat16 parameter, `param_remainder`

An int8 memory is two tensors of the state: `exp_avg_codes`, of the parameter's shape, and
`exp_avg_scales`, [rows, blocks of a row], or [blocks] of a vector. A shard of whole rows has whole
blocks, and both are sharded as their parameter is. They have names of their own, as tools that copy
a checkpoint into tensors that are there would make codes of float32 numbers without an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Size, Tensor

from adamem_fused import formats, sharding
from adamem_fused.backends import ops
from adamem_fused.backends.batch import ROUNDS, Batch, check_in_place
from adamem_fused.state import memory_dtype

if TYPE_CHECKING:
    from adamem_fused.seam import Work

# A parameter group, and how many of its tensors are in a batch.
Placed: TypeAlias = "tuple[dict[str, Any], int]"

BFLOAT16 = "bfloat16"
STATE_DTYPES = (None, torch.bfloat16, torch.int8, BFLOAT16, "int8")
REMAINDER = "param_remainder"

# Of the parameters that may have a state_dtype.
PARAM_DTYPES = (torch.float32, torch.bfloat16)

# A smaller parameter keeps float32 memories: there is next to nothing to be saved, and norms and
# biases are among them.
LEAST_NUMEL = 4096

# A memory whose values are never negative, and may have the finer code of these.
_UNSIGNED = ("exp_avg_sq",)


class Storage(NamedTuple):
    """What a parameter's group and kind come to."""

    memory: torch.dtype | None = None  # bfloat16, int8, or as memory_dtype has it
    block: int = 0  # elements that share a scale, of int8
    rounds: bool = False  # the parameter, stochastically
    has_remainder: bool = False


PLAIN = Storage()


# A group's options of this kind, in the order of these names.
OPTIONS = ("state_dtype", "stochastic_rounding", "store_param_remainders")


def options_of(group: dict[str, Any]) -> tuple[Any, ...]:
    return tuple([group[name] for name in OPTIONS])


def is_packed(group: dict[str, Any]) -> bool:
    """Whether a group has any of these options."""
    return any(options_of(group))


def storage_of(param: Tensor, group: dict[str, Any]) -> Storage:
    if not is_packed(group):
        return PLAIN
    is_16bit = param.dtype == torch.bfloat16
    memory, block = None, 0
    # Of other dtypes only what is frozen is in a group with a state_dtype.
    is_low = group["state_dtype"] is not None and param.dtype in PARAM_DTYPES
    if is_low and param.numel() >= LEAST_NUMEL:
        if group["state_dtype"] in (torch.bfloat16, BFLOAT16):
            memory = torch.bfloat16
        else:
            block = formats.block_length(param.shape[min(1, param.dim() - 1) :].numel())
            if block > 0 and sharding.has_whole_blocks(param, block):
                memory = torch.int8
            else:
                block = 0
    return Storage(
        memory,
        block,
        rounds=is_16bit and bool(group["stochastic_rounding"]),
        has_remainder=is_16bit and bool(group["store_param_remainders"]),
    )


def names_of(memory: str, storage: Storage) -> tuple[str, ...]:
    """The names of a memory's tensors in the state."""
    return codes_names(memory) if storage.memory == torch.int8 else (memory,)


def state_names(memories: Iterable[str], storage: Storage) -> frozenset[str]:
    """The names of a parameter's memories in the state, and of its remainder if it has one."""
    remainder = [REMAINDER] if storage.has_remainder else []
    return frozenset([*chain(*(names_of(memory, storage) for memory in memories)), *remainder])


def codes_names(memory: str) -> tuple[str, str]:
    return f"{memory}_codes", f"{memory}_scales"


def all_names(memories: Iterable[str]) -> set[str]:
    """The names that a state may have for these memories, and for a remainder."""
    own = (name for memory in memories for name in (memory, *codes_names(memory)))
    return {REMAINDER, *own}


def fits(param: Tensor, memory: str, state: dict[str, Any], own: Storage) -> bool:
    """Whether a state has this memory as it is to be."""
    values: list[Any] = [state.get(name) for name in names_of(memory, own)]
    if any(value is None for value in values):
        return False
    if not all(isinstance(value, Tensor) for value in values):
        return True  # which a step refuses
    first = values[0]
    if own != PLAIN and not sharding.local(first).is_contiguous():
        return False
    if own.memory == torch.int8:
        return bool(values[1].shape == scales_shape(param.shape, own.block))
    dtypes = {own.memory or memory_dtype(param), *([torch.float64] if own == PLAIN else [])}
    return first.dtype in dtypes


def stale(memories: Iterable[str], state: dict[str, Any], own: Storage) -> set[str]:
    """What a state has of other formats, and is to lose."""
    return all_names(memories) & state.keys() - state_names(memories, own)


def scales_shape(shape: Size, block: int) -> Size:
    """[rows, blocks of a row], or [blocks] of a vector."""
    if len(shape) < 2:
        return Size([shape.numel() // block])
    return Size([shape[0], shape[1:].numel() // block])


def memory_state(
    param: Tensor, memory: str, storage: Storage, value: Tensor | None
) -> dict[str, Tensor]:
    """The tensors of a memory with these values, rounded to nearest; of zeros, if there are none.

    value: of the parameter's shape, and sharded as it is.
    """
    if storage.memory == torch.int8:
        return _codes_state(param, memory, storage.block, value)
    dtype = storage.memory or memory_dtype(param)
    if storage == PLAIN and value is not None:
        dtype = torch.promote_types(value.dtype, dtype)
    like = torch.preserve_format if storage == PLAIN else torch.contiguous_format
    if value is None:
        return {memory: torch.zeros_like(param, dtype=dtype, memory_format=like)}
    return {memory: torch.empty_like(param, dtype=dtype, memory_format=like).copy_(value)}


def _codes_state(param: Tensor, memory: str, block: int, value: Tensor | None) -> dict[str, Tensor]:
    own = sharding.local(param)
    dtype = torch.uint8 if memory in _UNSIGNED else torch.int8
    codes = torch.zeros(own.shape, dtype=dtype, device=param.device)
    scales = torch.zeros(scales_shape(own.shape, block), dtype=torch.float32, device=param.device)
    if value is not None:
        local_value = sharding.local_like(param, value).to(param.device)
        formats.encode(local_value, codes, scales, None)
    codes_name, scales_name = codes_names(memory)
    return {
        codes_name: sharding.like(param, codes, param.shape),
        scales_name: sharding.like(param, scales, scales_shape(param.shape, block)),
    }


def remainder_state(param: Tensor, state: dict[str, Any]) -> dict[str, Tensor]:
    """A remainder, the state's if it has one; zeros are that of what bfloat16 holds.

    Raises:
        TypeError, ValueError: the state's is of another kind or shape.
    """
    own = torch.zeros_like(param, dtype=torch.int8, memory_format=torch.contiguous_format)
    if REMAINDER in state:
        _check_like(param, REMAINDER, state[REMAINDER], torch.int8)
        own.copy_(state[REMAINDER])
    return {REMAINDER: own}


def codes_state(
    param: Tensor, memory: str, own: Storage, state: dict[str, Any]
) -> dict[str, Tensor] | None:
    """A copy of a state's codes and scales; None where it has none with blocks of this length."""
    shape = scales_shape(param.shape, own.block)
    names = codes_names(memory)
    if any(name not in state for name in names):
        return None
    _check_codes(param, memory, state)
    if state[names[1]].shape != shape:
        return None
    copies = memory_state(param, memory, own, None)
    return {name: copies[name].copy_(state[name]) for name in names}


def memory_value(param: Tensor, memory: str, state: dict[str, Any]) -> Any:
    """The values of a memory, in whatever format the state has it; None where it has none.

    Raises:
        TypeError, ValueError: codes without scales that go with them.
    """
    if memory in state or all(name not in state for name in codes_names(memory)):
        return state.get(memory)
    codes, scales = _check_codes(param, memory, state)
    codes, scales = sharding.local_like(param, codes), sharding.local_like(param, scales)
    value = formats.decode(codes.contiguous(), scales).float()
    return sharding.like(param, value, param.shape)


def whole_value(param: Tensor, memory: str, state: dict[str, Any]) -> Any:
    """As `memory_value`, of a state that is whole, whether its parameter is sharded or not."""
    whole = torch.empty(param.shape, dtype=param.dtype, device="meta")
    return memory_value(whole, memory, state)


def as_plain(param: Tensor, memories: Iterable[str], state: dict[str, Any]) -> dict[str, Any]:
    """A state with the values of its memories under their own names, in whatever format it is."""
    plain = {name: value for name, value in state.items() if name not in all_names(memories)}
    values = {memory: memory_value(param, memory, state) for memory in memories}
    return {**plain, **{name: value for name, value in values.items() if value is not None}}


def _check_codes(param: Tensor, memory: str, state: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """A memory's codes and scales, which go together.

    Raises:
        TypeError, ValueError: they do not.
    """
    codes_name, scales_name = codes_names(memory)
    codes, scales = state.get(codes_name), state.get(scales_name)
    _check_like(param, codes_name, codes, torch.uint8 if memory in _UNSIGNED else torch.int8)
    if not isinstance(scales, Tensor):
        raise TypeError(f"state {scales_name} is a {type(scales).__name__}, not a tensor")
    sharding.check_like(param, f"state {scales_name}", scales)
    shapes = [scales_shape(param.shape, block) for block in formats.BLOCKS]
    if scales.dtype != torch.float32 or scales.shape not in shapes:
        raise ValueError(
            f"state {scales_name} is {scales.dtype} of shape {list(scales.shape)}; for a parameter "
            f"of shape {list(param.shape)} it has to be float32, with one for each block of a row"
        )
    assert isinstance(codes, Tensor)
    return codes, scales


def _check_like(param: Tensor, name: str, tensor: Any, dtype: torch.dtype) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"state {name} is a {type(tensor).__name__}, not a tensor")
    if tensor.dtype != dtype or tensor.shape != param.shape:
        raise ValueError(
            f"state {name} is {tensor.dtype} of shape {list(tensor.shape)}; for a parameter of "
            f"shape {list(param.shape)} it has to be {dtype} of that shape"
        )
    sharding.check_like(param, f"state {name}", tensor)


# ---- a batch --------------------------------------------------------------------------


def check_dtype(param: Tensor, group: dict[str, Any]) -> None:
    """Raises TypeError on a parameter that its group's state_dtype is not for."""
    if group["state_dtype"] is not None and param.dtype not in PARAM_DTYPES:
        raise TypeError(
            f"state_dtype={group['state_dtype']!r} is for float32 and bfloat16 parameters, and one "
            f"of shape {list(param.shape)} is {param.dtype}: give it a group with state_dtype=None"
        )


def gather(
    params: list[Tensor],
    memories: Sequence[str],
    states: list[dict[str, Any]],
    found: list[list[Any]],
) -> list[list[Any]]:
    """Lists of states that may be packed: the memories' tensors or codes, the scalars, the scales,
    and the remainders. What a state does not have is a tensor without elements.

    found: the memories and scalars, with None for the memories that are codes, which take its
        place.
    """
    devices = [param.device for param in params]
    empty = {d: torch.empty(0, dtype=torch.float32, device=d) for d in set(devices)}
    nothing = [empty[device] for device in devices]
    scales: list[list[Any]] = []
    for memory, own in zip(memories, found, strict=False):
        codes_name, scales_name = codes_names(memory)
        own_scales: list[Any] = list(nothing)
        for i, value in enumerate(own):
            if value is None:
                own[i], own_scales[i] = states[i][codes_name], states[i][scales_name]
        scales.append(own_scales)
    remainders = [state.get(REMAINDER, none) for state, none in zip(states, nothing, strict=True)]
    return [*found, *scales, remainders]


def packed_names(
    names: tuple[str, ...], memories: Sequence[str], groups: list[dict[str, Any]]
) -> tuple[tuple[str, ...], tuple[str | Tensor | None, ...]]:
    """What the extension gathers of packed groups, and what it takes where a state has it not."""
    first = next((param for group in groups for param in group["params"]), None)
    nothing = torch.empty(0, dtype=torch.float32, device=None if first is None else first.device)
    codes = [codes_names(memory) for memory in memories]
    others = [codes_name for codes_name, _ in codes]
    return (
        (*names, *(scales_name for _, scales_name in codes), REMAINDER),
        (*others, *([None] * (len(names) - len(others))), *([nothing] * (len(codes) + 1))),
    )


def pack(work: Work, groups: list[Placed], all_groups: list[dict[str, Any]]) -> None:
    """Completes a packed batch, whose state is as it is to be.

    That is where its random bits come from, and contiguous tensors.

    groups: those of the batch, each with how many of its tensors are in it.
    """
    key, known = _key(work, groups, all_groups), work.batch.cache.get("rounding")
    own = known[2] if known is not None and known[0] == key else None
    rounding = _rounding(work.params, groups, all_groups) if own is None else own
    work.batch.cache["rounding"] = key, _kinds(work.batch, b""), rounding
    _complete(work, rounding)


def pack_known(work: Work, groups: list[Placed], all_groups: list[dict[str, Any]]) -> bool:
    """As `pack`, if the batch is one that was packed before, and its state still of that kind."""
    known = work.batch.cache.get("rounding")
    if known is None or known[0] != _key(work, groups, all_groups):
        return False
    if _kinds(work.batch, known[1]) != known[1]:
        return False
    _complete(work, known[2])
    return True


def _key(work: Work, groups: list[Placed], all_groups: list[dict[str, Any]]) -> Any:
    return (
        list(map(id, work.params)),
        list(map(sharding.spec_of, work.params)) if work.dtensors else [],
        [param.dtype for param in work.params],
        [(group["seed"], options_of(group), size) for group, size in groups],
        [len(group["params"]) for group in all_groups],  # which move a parameter's place
    )


def _kinds(batch: Batch, last: bytes) -> bytes:
    """The dtypes and shapes of a batch's memories and of what is packed; without the extension,
    which asks for them, nothing."""
    traced = torch.compiler.is_compiling() or ops.is_traced()
    if ops.extension is None or traced or batch.packed is None:
        return b""
    lists = (*batch.memories.values(), *batch.packed.lists())
    structure: bytes = ops.extension.describe(lists, b"", last, False)[1]
    return structure


def _complete(work: Work, rounding: tuple[Tensor, list[bool]]) -> None:
    batch = work.batch
    batch.packed.rounding, batch.packed.rounds = rounding
    if all(map(Tensor.is_contiguous, chain(batch.params, batch.grads))):
        return
    for i, (param, grad) in enumerate(zip(batch.params, batch.grads, strict=True)):
        if param.is_contiguous() and grad.is_contiguous():
            continue
        if not batch.packed.is_low(batch, i):
            continue
        check_in_place(param, f"param {i}")
        batch.grads[i] = grad.contiguous()
        if not param.is_contiguous():
            batch.params[i] = param.contiguous()
            work.copies.append((param, batch.params[i]))


def _rounding(
    params: list[Tensor], groups: list[Placed], all_groups: list[dict[str, Any]]
) -> tuple[Tensor, list[bool]]:
    """`Packed.rounding` and its flags."""
    places = {id(param): i for i, param in enumerate(chain(*(g["params"] for g in all_groups)))}
    owners = [group for group, size in groups for _ in range(size)]
    columns = []
    for param, group in zip(params, owners, strict=True):
        own = storage_of(param, group)
        key = formats.tensor_key(group["seed"], places[id(param)])
        place = (0, 0, 0) if own == PLAIN else sharding.place_of(param)
        columns.append((formats.as_signed(key), *place, int(own.rounds)))
    rounding = torch.tensor(columns, dtype=torch.int64, device="cpu").reshape(-1, 5)
    return rounding.t().contiguous(), [bool(column[ROUNDS]) for column in columns]
