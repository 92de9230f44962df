"""python -m bench phase: the whole optimizer phase, clip + step + zero_grad().

Not yet run on a GPU.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import itertools
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor
from torch.nn.utils import clip_grad_norm_, get_total_norm
from tqdm import tqdm

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS
from adamem_fused.clipping import SquaredNorm
from adamem_fused.seam import Work
from bench import peak
from bench.arguments import COUNT, SEED, add_device, output_folder
from bench.environment import environment, folder_name
from bench.kernels.contestants import (
    ADAMW_BASELINE,
    FUSED,
    SGD_BASELINE,
    Contestant,
    find_contestants,
    known_defect,
)
from bench.kernels.correctness import PROBE_SHAPES, Reference, WrongResult, compare
from bench.kernels.devices import Device, Timed, find_device
from bench.kernels.parameter_lists import ParameterList, Shape, fit, parameter_lists
from bench.kernels.results import Spread
from bench.kernels.sides import Side, WrongShare, in_fifths, random_tensors
from bench.kernels.suite import cell_bytes
from bench.kernels.tables import format_ratio

MAX_NORM = 1.0  # far below the norm of the random gradients: every step clips
UNFUSED = "clip_grad_norm_"
METRICS = "metrics()"
# Of bench kernels' variants: beta at its cap, as in training, and by row.
VARIANTS = ("", "20% missed", "row")
LISTS = (
    ("gpt2-small", torch.float32),
    ("gpt2-small", torch.bfloat16),
    ("5000x100", torch.float32),
    ("decoder-300", torch.float32),
    ("2^24", torch.float32),
)
NORM_LISTS = (
    ("gpt2-small", torch.float32),
    ("gpt2-small", torch.bfloat16),
    ("decoder-300", torch.float32),
)
NORM, TOTAL_NORM, READINGS = "squared_norms", "get_total_norm", ("torch.sum", "torch.dot")

# What was aimed at. A float32 parameter of torch's phase moves 40 bytes: 4 and 8 to clip, 28 to
# step. Of AMAdamW's, 32: 4 for the norm and 28, where beta is at its cap or by row.
PHASE_AT_MOST = {("gpt2-small", "float32"): 0.85}
NORM_AT_LEAST = 0.9  # of the bandwidth of reading, beyond the caches
BEYOND_CACHES = 2  # times the last level

MAX_STEPS = 300  # of a sample
MEMORY_SHARE = 0.8  # of what is free
QUICK = {"passes": 1, "rounds": 2, "seconds": 0.01, "max_parameters": 2**17}

Samples = dict[str, list[list[float]]]  # seconds by side: a list of rounds for each pass


DESCRIPTION = """\
Times what comes after backward in a training loop: clipping by the global norm, step() and
zero_grad(). AMAdamW(max_grad_norm=1.0), with one beta a tensor and one a row, against
clip_grad_norm_(foreach=True) and torch's fused AdamW; AMSGD against torch's fused SGD. The sides
take turns. Each step is given the same gradients, which are set outside of the time that is taken:
clip_grad_norm_ has written them, and zero_grad() has taken them away. A fifth of the elements has
its beta below the cap where it says "20% missed", as in training, as bench kernels has it.

Beside it: the norm alone, against what reading as many bytes takes; what optimizer.metrics() takes;
and the peak of memory with release_gradients() and without it. Prints tables, and writes
phase.json. Not yet run on a GPU."""


def add_parser(commands: Any) -> None:
    """Adds the command to those of `python -m bench`."""
    parser = commands.add_parser(
        "phase",
        help="clip + step + zero_grad() against torch's, the norm alone, memory",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_device(parser)
    threads = torch.get_num_threads()
    parser.add_argument(
        "--threads", type=COUNT, default=threads, help="threads of torch (%(default)s)"
    )
    parser.add_argument("--seed", type=SEED, default=0, help="of the order (%(default)s)")
    parser.add_argument(
        "--quick", action="store_true", help="a look in seconds, at models that are scaled down"
    )
    parser.add_argument("--out", type=output_folder, help="folder (bench/results/DEVICE)")
    parser.set_defaults(
        run=run,
        parser=parser,
        quick_defaults=QUICK,
        # Times that all is built and measured; samples a pass; seconds of a side in a pass, about.
        passes=2,
        rounds=10,
        seconds=0.5,
        max_parameters=sys.maxsize,
    )


# ---- what is timed --------------------------------------------------------------------


class Phase(Side):
    """clip + step + zero_grad() of a contestant, on gradients that are the same at each step.

    Args:
        folded: the optimizer clips, by its max_grad_norm.
        grads: tensors like the parameters, to hold a step's gradients; shared with other sides.
    """

    def __init__(
        self,
        contestant: Contestant,
        folded: bool,
        start: Sequence[Tensor],
        gradient_sets: Sequence[Sequence[Tensor]],
        turned: Sequence[Tensor],
        grads: Sequence[Tensor],
    ) -> None:
        super().__init__(contestant, start, gradient_sets, turned)
        self.folded = folded
        self._grads = list(grads) if len(grads) == len(self.params) else in_fifths(grads)
        if folded:
            assert isinstance(self.optimizer, (AMAdamW, AMSGD))
            self.optimizer.max_grad_norm = MAX_NORM
        self.step = self._clip_step_and_zero

    def next_gradients(self) -> None:
        """Gives the parameters the next set of gradients, as a copy that may be written to."""
        super().next_gradients()
        torch._foreach_copy_(self._grads, [p.grad for p in self.params if p.grad is not None])
        for param, grad in zip(self.params, self._grads, strict=True):
            param.grad = grad

    def _clip_step_and_zero(self) -> None:
        if not self.folded:
            clip_grad_norm_(self.params, MAX_NORM, foreach=True)
        self.optimizer.step()
        self.optimizer.zero_grad()


@dataclass
class Plain:
    """Work that needs nothing to be set before it."""

    step: Callable[[], object]
    replays: list[Callable[[], None]] = field(default_factory=list)

    def next_gradients(self) -> None:
        pass


def find_phases(device: torch.device) -> dict[str, tuple[Contestant, bool]]:
    """The contestants by name, and whether they clip themselves."""
    phases = {}
    for contestant in find_contestants(device)[0]:
        ours, _, variant = contestant.name.partition(", ")
        if ours.rpartition(" ")[2] in FUSED and contestant.adaptive and variant in VARIANTS:
            phases[contestant.name] = contestant, True
            if not variant and contestant.optimizer == "adamw":
                phases[f"{ours}, {UNFUSED}"] = contestant, False
        elif contestant.name in (ADAMW_BASELINE, SGD_BASELINE):
            phases[contestant.name] = contestant, False
    return phases


def baseline(name: str) -> str:
    """What a contestant is compared with."""
    return SGD_BASELINE if name.startswith("AMSGD") else ADAMW_BASELINE


def check(contestant: Contestant, folded: bool, dtype: torch.dtype, device: torch.device) -> None:
    """A first phase on small tensors.

    Raises:
        WrongResult: a parameter is not what the reference has with clipped gradients.
    """
    start, *gradient_sets = (random_tensors(PROBE_SHAPES, dtype, device, seed) for seed in range(3))
    grads = [torch.empty_like(tensor) for tensor in start]
    side = Phase(replace(contestant, missed=None), folded, start, gradient_sets, [], grads)
    side.next_gradients()
    expected = Reference(contestant, start)
    first = [grad.double() for grad in gradient_sets[0]]
    expected.step([grad * (MAX_NORM / get_total_norm(first)) for grad in first])
    side.step()
    name = contestant.name if folded else f"{contestant.name} with {UNFUSED}"
    compare(replace(contestant, name=name), expected, side.params, f"a first phase on {dtype}")


def take_turns(
    device: Device, sides: Mapping[str, Timed], rounds: int, seconds: float, order: random.Random
) -> dict[str, list[float]]:
    """Seconds of the work of each side, a median for each round."""
    steps = {}
    for name, side in sides.items():
        device.measure(side, 2, cold=False)  # state, and both sets of gradients
        taken = device.measure(side, 1, cold=False).step
        steps[name] = min(max(int(seconds / (rounds * taken)) - 1, 3), MAX_STEPS)
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name in order.sample(list(sides), len(sides)):
            # What the other sides left in the caches is not this one's.
            device.measure(sides[name], 1, cold=False)
            found[name].append(device.measure(sides[name], steps[name], cold=False).step)
    return found


def measure_phase(
    device: Device,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    rounds: int,
    seconds: float,
    order: random.Random,
) -> dict[str, list[float]]:
    """A pass of the phase on such tensors.

    Raises:
        WrongShare: of some gradients another share keeps beta below its cap than is to.
    """
    start, *gradient_sets = (random_tensors(shapes, dtype, device.device, i) for i in range(3))
    turned = [-grad for grad in gradient_sets[0]]
    grads = [torch.empty_like(tensor) for tensor in start]
    sides: dict[str, Phase] = {
        name: Phase(contestant, folded, start, gradient_sets, turned, grads)
        for name, (contestant, folded) in find_phases(device.device).items()
        if known_defect(contestant, dtype, device.device) is None
    }
    timed: dict[str, Timed] = {**sides}
    ours = next((side.optimizer for side in sides.values() if side.folded), None)
    if isinstance(ours, AMAdamW):
        timed[METRICS] = Plain(ours.metrics)
    found = take_turns(device, timed, rounds, seconds, order)
    for side in sides.values():
        side.missed()
    return found


def works_of(backend: str, grads: Sequence[Tensor]) -> list[Work]:
    """Those of a step with such gradients, of parameters that are these tensors too."""
    params = [torch.nn.Parameter(grad) for grad in grads]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    with torch.no_grad():
        return AMSGD(params, beta_scope="tensor", backend=backend)._collect()


def measure_norm(
    device: Device,
    shapes: Sequence[Shape],
    dtype: torch.dtype,
    rounds: int,
    seconds: float,
    order: random.Random,
) -> dict[str, list[float]]:
    """A pass of the norm alone, and of reading as many bytes."""
    grads = random_tensors(shapes, dtype, device.device, seed=1)
    flat = torch.ones(sum(grad.nbytes for grad in grads) // 4, device=device.device)
    half = flat.numel() // 2

    def norm(works: list[Work]) -> Tensor:
        squares = SquaredNorm()
        for work in works:
            work.batch.opened = None  # as each step has a batch of its own
            squares.add(work)
        return squares.total().sqrt()

    sides: dict[str, Callable[[], object]] = {
        **{
            f"{NORM} {name}": partial(norm, works_of(name, grads))
            for name in FUSED
            if BACKENDS[name].unavailable(device.device) is None
        },
        TOTAL_NORM: partial(get_total_norm, grads, foreach=True),
        READINGS[0]: flat.sum,
        READINGS[1]: partial(torch.dot, flat[:half], flat[half : 2 * half]),
    }
    timed: dict[str, Timed] = {name: Plain(step) for name, step in sides.items()}
    return take_turns(device, timed, rounds, seconds, order)


MeasurePass = Callable[
    [Device, Sequence[Shape], torch.dtype, int, float, random.Random], dict[str, list[float]]
]
KINDS: dict[str, tuple[MeasurePass, tuple[tuple[str, torch.dtype], ...]]] = {
    "phase": (measure_phase, LISTS),
    "norm": (measure_norm, NORM_LISTS),
}


# ---- the command ----------------------------------------------------------------------


def run(args: argparse.Namespace) -> int:
    """Measures, prints tables and writes phase.json.

    Returns:
        0; 1 where a result is wrong.
    """
    if args.device == "cuda" and not torch.cuda.is_available():
        args.parser.error(f"--device cuda: torch {torch.__version__} sees no GPU")
    torch.set_num_threads(args.threads)
    device = find_device(args.device)
    folder = args.out or output_folder(f"bench/results/{folder_name(device.name)}")
    path = folder / "phase.json"
    unfinished = folder / "phase.json.part"
    try:
        result = measure(args, device, unfinished)
    except (WrongResult, WrongShare) as error:
        unfinished.unlink(missing_ok=True)
        print(f"Stopped: a wrong result. {error}", file=sys.stderr)
        return 1
    unfinished.replace(path)
    for text, headers, cells in tables(result):
        print(f"\n{text}:")
        print(tabulate(cells, headers=headers, disable_numparse=True))
    print(f"Wrote {path}")
    return 0


def measure(args: argparse.Namespace, device: Device, path: Path) -> dict[str, Any]:
    """Everything, as phase.json has it; what there is is written after each part.

    Raises:
        WrongResult, WrongShare: see `check` and `measure_phase`.
    """
    phases = find_phases(device.device)
    for dtype in dict.fromkeys(dtype for _, dtype in LISTS):
        for contestant, folded in phases.values():
            if known_defect(contestant, dtype, device.device) is None:
                check(contestant, folded, dtype, device.device)
    # One side more, for the gradients that are written to.
    a_parameter = cell_bytes(1, torch.float32, len(phases) + 1)
    limit = min(args.max_parameters, int(MEMORY_SHARE * device.free_bytes() / a_parameter))
    result = {
        "environment": {
            **environment(),
            "device": device.name,
            "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        },
        "settings": {
            "device": args.device,
            "threads": args.threads,
            "passes": args.passes,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "seed": args.seed,
            "quick": args.quick,
            "last_level_cache_bytes": device.last_level,
        },
        **{kind: [] for kind in KINDS},
    }

    def save() -> None:
        path.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")

    measure_lists(args, device, limit, result, save)
    result["peak"] = peak.measure(device.device)
    save()
    return result


def measure_lists(
    args: argparse.Namespace,
    device: Device,
    limit: int,
    cells: dict[str, Any],
    save: Callable[[], None],
) -> None:
    """All passes of each kind, on its lists of at most so many parameters, added to its cells."""
    lists = parameter_lists(device.l2, device.last_level)
    work = []
    for kind, (measure_pass, chosen) in KINDS.items():
        for name, dtype in chosen:
            parameters = fit(lists[name], limit)
            if parameters is None:
                numel = lists[name].numel
                print(f"without {name}: {numel:,} parameters are more than the limit of {limit:,}")
                continue
            cells[kind].append(new_cell(parameters, dtype))
            work.append((measure_pass, parameters.shapes, dtype, cells[kind][-1]))
    order = random.Random(args.seed)
    with tqdm(total=args.passes * len(work), unit="part") as bar, device.limited_memory():
        for _ in range(args.passes):
            for measure_pass, shapes, dtype, cell in order.sample(work, len(work)):
                bar.set_description_str(f"{cell['parameters']}, {cell['dtype']}")
                found = measure_pass(device, shapes, dtype, args.rounds, args.seconds, order)
                for name, seconds in found.items():
                    cell["seconds"].setdefault(name, []).append(seconds)
                save()
                gc.collect()
                bar.update()


def new_cell(parameters: ParameterList, dtype: torch.dtype) -> dict[str, Any]:
    """Of a list in a dtype: what it is, and no samples yet."""
    return {
        "parameters": parameters.label,
        "numel": parameters.numel,
        "tensors": len(parameters.shapes),
        "dtype": str(dtype).removeprefix("torch."),
        "bytes": parameters.numel * dtype.itemsize,
        "seconds": {},
    }


# ---- tables ---------------------------------------------------------------------------

Table = tuple[str, list[str], list[list[str]]]  # what it is of, headers, rows


def tables(result: dict[str, Any]) -> list[Table]:
    """The phase, the norm, and memory."""
    return [phase_table(result), norm_table(result), peak_table(result)]


def phase_table(result: dict[str, Any]) -> Table:
    cells = result["phase"]
    names = list(dict.fromkeys(name for cell in cells for name in cell["seconds"]))
    names = [name for name in names if name not in (ADAMW_BASELINE, SGD_BASELINE, METRICS)]
    rows = []
    for cell in cells:
        seconds = cell["seconds"]
        at_most = PHASE_AT_MOST.get((cell["parameters"], cell["dtype"]))
        row = [cell["parameters"], cell["dtype"], _ms(seconds.get(ADAMW_BASELINE))]
        for name in names:
            aimed_at = at_most if name.startswith("AMAdamW") and UNFUSED not in name else None
            row.append(format_cell(ratio(seconds, name, baseline(name)), at_most=aimed_at))
        row.append(format_share(ratio(seconds, METRICS, names[0])))
        rows.append(row)
    text = (
        "Clipping by the global norm, step and zero_grad(), caches warm: times over those of "
        f"{UNFUSED}(foreach=True) and torch's fused optimizer of the same kind. These clip by "
        f'max_grad_norm, "{UNFUSED}" by that function. "of 0.85": at most that was aimed at. '
        f"{METRICS}: over the time of {names[0]}"
    )
    headers = ["parameters", "dtype", f"ms with {ADAMW_BASELINE}", *names, METRICS]
    return text, headers, rows


def norm_table(result: dict[str, Any]) -> Table:
    beyond = BEYOND_CACHES * result["settings"]["last_level_cache_bytes"]
    rows = []
    for cell in result["norm"]:
        seconds = cell["seconds"]
        reading = min(READINGS, key=lambda name: _median(seconds[name]))
        at_least = NORM_AT_LEAST if cell["bytes"] >= beyond else None
        for name in (name for name in seconds if name.startswith(NORM)):
            row = [cell["parameters"], cell["dtype"], name.removeprefix(f"{NORM} ")]
            row += [f"{cell['bytes'] / _median(seconds[of]) / 1e9:.1f}" for of in (name, reading)]
            row.append(reading)
            row.append(format_cell(ratio(seconds, reading, name), at_least=at_least))
            row.append(format_cell(ratio(seconds, name, TOTAL_NORM)))
            rows.append(row)
    text = (
        "The norm alone: the bandwidth that it reads with, that of reading as many bytes with "
        f"{' or '.join(READINGS)}, whichever is faster, the first over the second (at least 0.90 "
        f"was aimed at, beyond the caches), and its time over {TOTAL_NORM}'s"
    )
    headers = ["parameters", "dtype", "backend", "GB/s", "GB/s of reading", "by", "of reading"]
    return text, [*headers, f"/ {TOTAL_NORM}"], rows


def peak_table(result: dict[str, Any]) -> Table:
    return (
        "Gradient release in a training: gradients and memory at their peak, and its time, over "
        "that of the ordinary step beside it",
        list(peak.HEADERS),
        peak.table_cells(result["peak"]),
    )


def ratio(seconds: Samples, name: str, against: str) -> Spread | None:
    """A side's time over another's in the same rounds; None where one was not measured."""
    passes = zip(seconds.get(name, []), seconds.get(against, []), strict=False)
    return Spread.of(
        [[a / b for a, b in zip(ours, theirs, strict=True)] for ours, theirs in passes]
    )


def format_cell(
    found: Spread | None, at_most: float | None = None, at_least: float | None = None
) -> str:
    """A ratio with its quartiles, and what was aimed at."""
    if found is None:
        return "-"
    cell = f"{format_ratio(found)} ({found.low:.2f} to {found.high:.2f})"
    aimed_at = at_most if at_least is None else at_least
    if aimed_at is None:
        return cell
    met = found.median <= aimed_at if at_least is None else found.median >= aimed_at
    word = "of" if at_least is None else "of at least"
    return f"{cell} {word} {aimed_at:.2f}{'' if met else ', not met'}"


def format_share(found: Spread | None) -> str:
    """A small ratio, in percent."""
    return f"{found.median:.1%} ({found.low:.1%} to {found.high:.1%})" if found else "-"


def _median(passes: Sequence[Sequence[float]]) -> float:
    return statistics.median(itertools.chain(*passes))


def _ms(passes: Sequence[Sequence[float]] | None) -> str:
    return f"{1e3 * _median(passes):.2f}" if passes else "-"
