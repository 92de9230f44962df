"""Times the cpu backend against torch's fused optimizers and against the foreach backend.

    python -m bench.cpu

Both sides of a row run in one process, in turns, on the same random gradients. Prints a
table of ratios with the targets they were built for, and writes cpu.json with every sample.
Nothing fails where a target is missed: it is a benchmark and not a test.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch.optim import Optimizer
from tqdm import tqdm

from adamem_fused import AMSGD, AMAdamW
from bench.arguments import COUNT, POSITIVE, output_folder
from bench.cpu_report import Result, format_table, write_json
from bench.environment import cache_sizes
from bench.timing import Shape, alternate, copy_bandwidth

# Where the system does not say.
USUAL_L2, USUAL_LAST_LEVEL = 2**20, 2**25
# float32 parameter, gradient and moments of AdamW, and what the second gradient set adds.
STATE_BYTES, WORKING_BYTES = 16, 20
INTERRUPTED = 130  # exit status: 128 + SIGINT, as a shell has it


@dataclass(frozen=True)
class Contestant:
    """An optimizer, and what it has to read and write.

    Attributes:
        make: the optimizer, from its parameters.
        moments: tensors of state of a parameter's shape.
        adaptive: the update waits for sums over the tensor; the state is float32.
        reads_param: the sums read the parameter (weight decay).
        whole_model: the update waits for the sums over all tensors.
        passes_known: False where each operation is a pass of its own.
    """

    make: Callable[..., Optimizer]
    moments: int
    adaptive: bool = False
    reads_param: bool = False
    whole_model: bool = False
    passes_known: bool = True


CONTESTANTS = {
    "AMAdamW cpu": Contestant(
        partial(AMAdamW, backend="cpu"), moments=2, adaptive=True, reads_param=True
    ),
    "AMAdamW foreach": Contestant(
        partial(AMAdamW, backend="foreach"), moments=2, adaptive=True, passes_known=False
    ),
    "AdamW fused": Contestant(partial(torch.optim.AdamW, fused=True), moments=2),
    "AMSGD cpu": Contestant(
        partial(AMSGD, backend="cpu"), moments=1, adaptive=True, whole_model=True
    ),
    "SGD fused": Contestant(partial(torch.optim.SGD, lr=1e-2, momentum=0.9, fused=True), moments=1),
}


@dataclass(frozen=True)
class Case:
    """A list of parameter shapes.

    Attributes:
        name: what is particular about it.
        shapes: the tensors.
        target: the ratio of times, AMAdamW's to torch's fused AdamW's, that was aimed at
            for float32, or None.
    """

    name: str
    shapes: tuple[Shape, ...]
    target: float | None = None

    @property
    def numel(self) -> int:
        return sum(math.prod(shape) for shape in self.shapes)


def decoder_shapes(width: int, hidden: int, blocks: int, vocabulary: int) -> tuple[Shape, ...]:
    """The tensors of a Llama-like decoder: 9 a block, and embedding, norm and head."""
    block = (
        *[(width, width)] * 4,  # query, key, value, output
        *[(hidden, width)] * 2,  # gate, up
        (width, hidden),  # down
        *[(width,)] * 2,  # norms
    )
    return ((vocabulary, width), *block * blocks, (width,), (vocabulary, width))


def make_cases(l2: int, last_level: int, width: int, tensors: int) -> dict[str, Case]:
    """The parameter lists.

    Args:
        l2: bytes of the L2 caches of all cores that work.
        last_level: bytes of the last-level cache.
        width: of the decoder.
        tensors: how many there are in the list of small ones.
    """
    decoder = decoder_shapes(width, hidden=8 * width // 3, blocks=33, vocabulary=4096)
    return {
        "large": Case("8 x last-level cache", ((8 * last_level // STATE_BYTES,),), 1.6),
        "last level": Case("1/2 last-level cache", ((last_level // 2 // WORKING_BYTES,),), 1.15),
        "l2": Case("3/4 of the L2s", ((3 * l2 // 4 // WORKING_BYTES,),), 1.15),
        "decoder": Case(f"decoder, {len(decoder)} tensors", decoder),
        "many": Case(f"{tensors:,} tensors of 100", ((100,),) * tensors, 1 / 3),
    }


@dataclass(frozen=True)
class Row:
    """One comparison: the time of a contestant over that of a baseline."""

    case: Case
    dtype: torch.dtype
    contestant: str
    baseline: str
    target: float | None = None


def make_rows(cases: dict[str, Case]) -> list[Row]:
    """The comparisons, those with a target first."""
    f32, bf16 = torch.float32, torch.bfloat16
    adamw, sgd = ("AMAdamW cpu", "AdamW fused"), ("AMSGD cpu", "SGD fused")
    return [
        *[Row(case, f32, *adamw, target=case.target) for case in cases.values()],
        Row(cases["decoder"], f32, "AMAdamW cpu", "AMAdamW foreach", target=1 / 4),
        *[Row(case, bf16, *adamw) for case in cases.values()],
        *[Row(case, dtype, *sgd) for dtype, case in product((f32, bf16), cases.values())],
    ]


def bytes_per_parameter(
    contestant: Contestant, case: Case, dtype: torch.dtype, last_level: int
) -> int | None:
    """Bytes read and written a parameter and step, or None where they are not known.

    One pass reads parameter, gradient and moments and writes parameter and moments. What
    waits for its sums reads gradient and moments (and the parameter, with weight decay)
    twice, unless they stay in cache between the two.
    """
    if not contestant.passes_known:
        return None
    moments = contestant.moments * (
        torch.float32.itemsize if contestant.adaptive else dtype.itemsize
    )
    one_pass = 3 * dtype.itemsize + 2 * moments
    if not contestant.adaptive:
        return one_pass
    between = case.numel if contestant.whole_model else max(map(math.prod, case.shapes))
    if between * (2 * dtype.itemsize + moments) <= last_level:
        return one_pass
    return one_pass + (1 + contestant.reads_param) * dtype.itemsize + moments


def measure(row: Row, pairs: int, seconds: float, last_level: int, bar: Any) -> Result:
    """One comparison; `bar` is told of every pair."""
    first, second = CONTESTANTS[row.contestant], CONTESTANTS[row.baseline]
    dtype = str(row.dtype).removeprefix("torch.")
    bar.set_description_str(f"{row.contestant}, {row.case.name}, {dtype}")
    samples = []
    for pair in alternate(first.make, second.make, row.case.shapes, row.dtype, pairs, seconds):
        samples.append(pair)
        bar.update()
    return Result(
        case=row.case.name,
        dtype=dtype,
        tensors=len(row.case.shapes),
        parameters=row.case.numel,
        contestant=row.contestant,
        baseline=row.baseline,
        target=row.target,
        contestant_seconds=[sample for sample, _ in samples],
        baseline_seconds=[sample for _, sample in samples],
        contestant_bytes=bytes_per_parameter(first, row.case, row.dtype, last_level),
        baseline_bytes=bytes_per_parameter(second, row.case, row.dtype, last_level),
        copy_bandwidth=copy_bandwidth(STATE_BYTES * row.case.numel),
    )


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu",
        description="Times the cpu backend of AMAdamW and AMSGD against torch's fused AdamW "
        "and SGD and against the foreach backend.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--threads", type=COUNT, default=2, help="threads of torch")
    parser.add_argument("--pairs", type=COUNT, default=12, help="samples of each side of a row")
    parser.add_argument(
        "--seconds", type=POSITIVE, default=3.0, help="time of a row, about, large tensors longer"
    )
    parser.add_argument(
        "--out", type=output_folder, default="bench/results/cpu", help="folder for cpu.json"
    )
    parser.add_argument(
        "--quick", action="store_true", help="tiny tensors and two pairs: shows that it works"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark.

    Returns:
        0, or 130 where it was interrupted; the rows finished by then are kept.
    """
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    found = cache_sizes()
    l2 = found.get(2, USUAL_L2 // args.threads) * args.threads
    last_level = found[max(found)] if found else USUAL_LAST_LEVEL
    if args.quick:
        args.pairs, args.seconds = 2, 0.01
        cases = make_cases(l2 // 64, last_level // 64, width=12, tensors=50)
    else:
        cases = make_cases(l2, last_level, width=192, tensors=5000)

    rows = make_rows(cases)
    results: list[Result] = []
    interrupted = False
    with tqdm(total=len(rows) * args.pairs, unit="pair") as bar:
        try:
            for row in rows:
                results.append(measure(row, args.pairs, args.seconds, last_level, bar))
        except KeyboardInterrupt:
            interrupted = True

    print(format_table(results) if results else "\nInterrupted before the first row was measured.")
    settings = {
        "threads": args.threads,
        "pairs": args.pairs,
        "seconds": args.seconds,
        "quick": args.quick,
        "cache_bytes": found,
        "interrupted": interrupted,
    }
    write_json(results, settings, args.out / "cpu.json")
    print(f"Wrote {args.out / 'cpu.json'}")
    return INTERRUPTED if interrupted else 0


if __name__ == "__main__":
    raise SystemExit(main())
