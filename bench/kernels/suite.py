"""Runs the contestants on the parameter lists, side by side and in turns."""

from __future__ import annotations

import gc
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.kernels.contestants import COMPILED_TENSORS, Contestant, first_line, known_defect
from bench.kernels.correctness import FirstStep, WrongResult, check_steps
from bench.kernels.devices import Device
from bench.kernels.parameter_lists import WORKING_BYTES, ParameterList
from bench.kernels.results import Row
from bench.kernels.sides import Side, WrongShare, random_tensors
from bench.kernels.traffic import bytes_to_move

GRADIENT_SETS = 2
MAX_STEPS = 300  # of a sample
COLD_STEPS = 3  # of a sample with flushed caches
LARGEST_COPY = 2**30  # a larger one is not faster


@dataclass(frozen=True)
class Plan:
    """What is to be measured, and for how long.

    Attributes:
        lists: parameter lists that fit in memory.
        dtypes: of parameters and gradients.
        caches: of "warm" and "cold"; cold only where the caches could hold the data.
        contestants: all that are there.
        whole_suite: each list keeps to its own choice of contestants and dtypes.
        memory: bytes for the sides of a cell; more of them than fit are measured one by one.
        passes: times that everything is built and measured.
        rounds: samples of a contestant in a pass, at most.
        seconds: of a contestant, list and pass, about.
        seed: of the order.
    """

    lists: Sequence[ParameterList]
    dtypes: Sequence[torch.dtype]
    caches: Sequence[str]
    contestants: Sequence[Contestant]
    whole_suite: bool
    memory: int
    passes: int
    rounds: int
    seconds: float
    seed: int


@dataclass(frozen=True)
class Cell:
    """One parameter list in one dtype: what is measured side by side."""

    parameters: ParameterList
    dtype: torch.dtype
    caches: tuple[str, ...]
    contestants: tuple[Contestant, ...]

    @property
    def bytes(self) -> int:
        """With all sides at once."""
        return cell_bytes(self.parameters.numel, self.dtype, len(self.contestants))


def cell_bytes(numel: int, dtype: torch.dtype, sides: int) -> int:
    """Parameter and two moments of each side, what they start from, three sets of gradients."""
    return (3 * sides + 4) * max(dtype.itemsize, 4) * numel


@dataclass
class Entry:
    """A contestant in a cell: its side while it is being measured, and its rows by cache."""

    contestant: Contestant
    rows: dict[str, Row]
    side: Side | None = None
    rounds: int = 0
    steps: int = 0

    def fail(self, reason: str) -> None:
        self.side = None
        for row in self.rows.values():
            row.reason = reason


def make_cells(plan: Plan, last_level: int) -> list[Cell]:
    """The cells of a plan, the lists in their order for each dtype.

    In the whole suite, contestants that are not of the core take part in the first dtype only.
    """
    cells = []
    for dtype in plan.dtypes:
        for parameters in plan.lists:
            second = plan.whole_suite and dtype != plan.dtypes[0]
            if second and parameters.first_dtype_only:
                continue
            everyone = not plan.whole_suite or (parameters.everyone and not second)
            contestants = tuple(c for c in plan.contestants if c.core or everyone)
            used = parameters.numel * WORKING_BYTES
            caches = tuple(c for c in plan.caches if c == "warm" or used <= 2 * last_level)
            if caches:
                cells.append(Cell(parameters, dtype, caches, contestants))
    return cells


@dataclass
class Suite:
    """A plan being carried out. `rows` has what was measured so far, whenever one looks.

    Args:
        progress: told what is being done, and of how many parts out of `parts`.
    """

    plan: Plan
    device: Device
    progress: Callable[[str, int], None]
    cells: list[Cell] = field(init=False)
    rows: list[Row] = field(init=False)
    _entries: dict[int, list[Entry]] = field(init=False)
    _failed: dict[tuple[str, torch.dtype], str] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.cells = make_cells(self.plan, self.device.last_level)
        self._entries = {
            index: [Entry(c, self._new_rows(cell, c)) for c in cell.contestants]
            for index, cell in enumerate(self.cells)
        }
        self.rows = [
            row
            for entries in self._entries.values()
            for cache in self.plan.caches
            for entry in entries
            if (row := entry.rows.get(cache)) is not None
        ]

    @staticmethod
    def _new_rows(cell: Cell, contestant: Contestant) -> dict[str, Row]:
        return {
            cache: Row(
                parameters=cell.parameters.label,
                numel=cell.parameters.numel,
                tensors=len(cell.parameters.shapes),
                dtype=str(cell.dtype).removeprefix("torch."),
                cache=cache,
                contestant=contestant.name,
                optimizer=contestant.optimizer,
            )
            for cache in cell.caches
        }

    @property
    def parts(self) -> int:
        """How much there is to do, in the unit that `progress` is told."""
        entries = sum(len(cell.contestants) * (1 + len(cell.caches)) for cell in self.cells)
        return entries * self.plan.passes

    def check(self) -> None:
        """Steps of every contestant on small tensors against its reference.

        Raises:
            WrongResult: one differs. One that raises is a row with the reason instead.
        """
        pairs = {(c.name, cell.dtype): c for cell in self.cells for c in cell.contestants}
        for (name, dtype), contestant in pairs.items():
            self.progress(f"checking {name}", 0)
            defect = known_defect(contestant, dtype, self.device.device)
            if defect is not None:
                self._failed[name, dtype] = defect
                continue
            try:
                check_steps(contestant, dtype, self.device.device)
            except WrongResult:
                raise
            except Exception as error:
                self._failed[name, dtype] = first_line(error)
            torch.compiler.reset()

    def run(self) -> None:
        """Measures everything, pass by pass, in an order made from the seed.

        Raises:
            WrongResult: a first step on the tensors that are timed differs.
        """
        generator = random.Random(self.plan.seed)
        for number in range(1, self.plan.passes + 1):
            for index in generator.sample(range(len(self.cells)), len(self.cells)):
                label = f"pass {number}/{self.plan.passes}, {self.cells[index].parameters.name}"
                self._measure_cell(self.cells[index], self._entries[index], generator, label)
                gc.collect()

    def _measure_cell(
        self, cell: Cell, entries: Sequence[Entry], generator: random.Random, label: str
    ) -> None:
        shapes, dtype, device = cell.parameters.shapes, cell.dtype, self.device.device
        start = random_tensors(shapes, dtype, device, seed=0)
        gradient_sets = [
            random_tensors(shapes, dtype, device, seed) for seed in range(1, GRADIENT_SETS + 1)
        ]
        turned = [-g for g in gradient_sets[0]] if any(c.missed for c in cell.contestants) else []
        if any(c.compiled and self._left_out(cell, c) is None for c in cell.contestants):
            torch.compiler.reset()  # it compiles only so many versions of a step
        for cache in cell.caches:
            # As many bytes as torch's fused AdamW works on.
            held = 4 * dtype.itemsize * cell.parameters.numel
            held = min(held, max(LARGEST_COPY, 8 * self.device.last_level))
            bandwidth = self.device.bandwidth(held, cache == "cold")
            for entry in entries:
                row = entry.rows[cache]
                # The fastest of all passes.
                row.copy_bandwidth = max(row.copy_bandwidth or 0.0, bandwidth)
                for samples in (row.step, row.host, row.kernel):
                    samples.append([])
        order = list(entries)
        generator.shuffle(order)
        together = cell.bytes <= self.plan.memory
        for group in [order] if together else [[entry] for entry in order]:
            for entry in group:
                self.progress(f"{label}, {entry.contestant.name}", 1)
                reason = self._left_out(cell, entry.contestant)
                if reason is not None:
                    entry.fail(reason)
                elif all(row.reason is None for row in entry.rows.values()):
                    self._attempt(entry, self._start, cell, start, gradient_sets, turned)
            for cache in cell.caches:
                self._take_turns(group, cache, generator, label)
            for entry in group:
                entry.side = None

    def _take_turns(
        self, entries: list[Entry], cache: str, generator: random.Random, label: str
    ) -> None:
        for number in range(self.plan.rounds):
            generator.shuffle(entries)
            for entry in entries:
                if entry.side is not None and number < entry.rounds:
                    self.progress(f"{label}, {cache}, {entry.contestant.name}", 0)
                    self._attempt(entry, self._sample, cache)
        self.progress(label, len(entries))

    def _left_out(self, cell: Cell, contestant: Contestant) -> str | None:
        limit = COMPILED_TENSORS[self.device.device.type]
        compiles = contestant.compiled or contestant.compiles_itself
        if compiles and len(cell.parameters.shapes) > limit:
            return f"not tried: compiling for more than {limit} tensors takes minutes"
        return self._failed.get((contestant.name, cell.dtype))

    def _attempt(self, entry: Entry, work: Callable[..., None], *args: Any) -> None:
        """Does some work of a contestant; where it raises, its rows have the reason."""
        try:
            work(entry, *args)
        except WrongResult:
            raise
        except WrongShare as error:
            row = next(iter(entry.rows.values()))
            raise WrongResult(f"{entry.contestant.name}, {row.parameters}: {error}") from error
        except Exception as error:
            entry.fail(first_line(error))
            gc.collect()

    def _start(
        self,
        entry: Entry,
        cell: Cell,
        start: Sequence[Tensor],
        gradient_sets: Sequence[Sequence[Tensor]],
        turned: Sequence[Tensor],
    ) -> None:
        """Makes the side, checks its first step, and finds out what a step takes."""
        contestant = entry.contestant
        side = Side(contestant, start, gradient_sets, turned)
        side.next_gradients()
        first_step = FirstStep(side)
        side.step()
        first_step.check(contestant)
        if contestant.compiled:
            self.device.measure(side, 1, cold=False)  # a second step compiles again
        seconds = self.device.measure(side, 1, cold=False).step
        side.missed()
        self.device.prepare(side)
        entry.side = side
        entry.rounds = min(max(int(self.plan.seconds / (2 * seconds)), 1), self.plan.rounds)
        steps = int(self.plan.seconds / (entry.rounds * seconds)) - 1
        entry.steps = min(max(steps, 3 if seconds < 1 else 1), MAX_STEPS)
        if all(row.state_bytes is None for row in entry.rows.values()):
            self._look_at(entry, side, cell)

    def _look_at(self, entry: Entry, side: Side, cell: Cell) -> None:
        """What does not vary from step to step."""
        state = side.state_bytes()
        to_move = bytes_to_move(
            entry.contestant,
            [param.shape for param in side.params],
            cell.dtype,
            state,
            self.device.last_level,
        )
        temporary = self.device.temporary_bytes(side)
        tensors = 2 * cell.dtype.itemsize * cell.parameters.numel + state
        facts: dict[str, Any] = {
            "state_bytes": state,
            "bytes_to_move": to_move,
            "temporary_bytes": temporary,
            "peak_bytes": None if temporary is None else tensors + temporary,
            "launches": self.device.launches(side),
        }
        for row in entry.rows.values():
            for name, value in facts.items():
                setattr(row, name, value)

    def _sample(self, entry: Entry, cache: str) -> None:
        side, row = entry.side, entry.rows[cache]
        assert side is not None
        if cache == "cold":
            sample = self.device.measure(side, min(entry.steps, COLD_STEPS), cold=True)
        else:
            if entry.rounds > 1:
                # What the other sides left in the caches is not this one's.
                self.device.measure(side, 1, cold=False)
            sample = self.device.measure(side, entry.steps, cold=False)
        row.missed = side.missed()
        row.step[-1].append(sample.step)
        row.host[-1].append(sample.host)
        if sample.kernel is not None:
            row.kernel[-1].append(sample.kernel)
