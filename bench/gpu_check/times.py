"""Step times beside those of torch's fused optimizer of the same kind, on the same tensors; on
float32 ones, where something is stored in few bits.

The sides take turns, and which begins changes from pair to pair. A step's time is that between
two marks in the stream, before and after it: the device's, and where the host is slower, the
host's. Where nothing but steps happens, there is a wall time too, of many steps until the
device is done with them. The host's time is that until step() returned.

What beta is depends on the gradients, and the work may depend on beta. Hence three regimes:

    cap      constant gradients, twice or half as large from sample to sample: beta at its cap
    below    gradients that fall by 0.7 from step to step: beta below it, near 0.47
    mixture  those of tensors with 12% of the elements fall

And one with a beta for each row, whose work does not depend on it:

    row      as cap, with beta_scope="row"

And one that clips by the global norm, torch's by clip_grad_norm_ before its step:

    clip     as cap, with max_grad_norm
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamem_fused import AMSGD, AMAdamW
from bench import gpu_cases
from bench.environment import gpu_clocks
from bench.gpu_cases import ALL_BFLOAT16, BFLOAT16, BFLOAT16_INT8, FLOAT32, INT8_STATE, Format
from bench.gpu_check import gpu
from bench.gpu_check.record import Case, NotDone, Part
from bench.kernels.parameter_lists import some_of

PAIRS = 7  # of samples
SAMPLE_SECONDS = 0.05
MAX_STEPS = 50  # of a sample: gradients that fall stay numbers of full precision
LEAD = 8  # steps of gradients that fall until beta is below its cap
FALL = 0.7
COPIED = 2**28  # numbers
# The work is that of clipping, and the gradients, which both sides share, stay as they are.
MAX_NORM = 1e30

Step = Callable[[], Any]

# The most important first: no time may be left for the rest.
CASES = (
    ("2^28", "AMAdamW", FLOAT32, "cap"),
    ("gpt2-small", "AMAdamW", FLOAT32, "cap"),
    ("gpt2-small", "AMAdamW", ALL_BFLOAT16, "cap"),
    ("gpt2-small", "AMAdamW", ALL_BFLOAT16, "row"),
    ("gpt2-small", "AMAdamW", ALL_BFLOAT16, "mixture"),
    ("32x524288", "AMAdamW", ALL_BFLOAT16, "cap"),
    ("32x524288", "AMAdamW", ALL_BFLOAT16, "row"),
    ("gpt2-small", "AMAdamW", INT8_STATE, "cap"),
    ("gpt2-small", "AMAdamW", INT8_STATE, "row"),
    ("gpt2-small", "AMAdamW", BFLOAT16_INT8, "cap"),
    ("gpt2-small", "AMAdamW", BFLOAT16_INT8, "row"),
    ("gpt2-small", "AMAdamW", FLOAT32, "row"),
    ("llama-2-7b", "AMAdamW", FLOAT32, "row"),
    ("resnet-50", "AMAdamW", FLOAT32, "row"),
    ("gpt2-small", "AMAdamW anchored", FLOAT32, "row"),
    ("gpt2-small", "AMAdamW", BFLOAT16, "row"),
    ("gpt2-small", "AMAdamW", FLOAT32, "below"),
    ("8x2^25", "AMAdamW", FLOAT32, "mixture"),
    ("gpt2-small", "AMAdamW", FLOAT32, "mixture"),
    ("5000x1000", "AMAdamW", FLOAT32, "cap"),
    ("llama-2-7b", "AMAdamW", FLOAT32, "cap"),
    ("resnet-50", "AMAdamW", FLOAT32, "cap"),
    ("gpt2-small", "AMAdamW", FLOAT32, "clip"),
    ("2^28", "AMAdamW", BFLOAT16, "cap"),
    ("gpt2-small", "AMAdamW", BFLOAT16, "cap"),
    ("2^28", "AMSGD", FLOAT32, "cap"),
    ("gpt2-small", "AMSGD", FLOAT32, "cap"),
    ("llama-2-7b", "AMAdamW", FLOAT32, "mixture"),
    ("llama-2-7b", "AMAdamW anchored", FLOAT32, "row"),
    ("resnet-50", "AMAdamW anchored", FLOAT32, "row"),
    ("2^28", "AMAdamW", FLOAT32, "row"),
    ("gpt2-small", "AMSGD", FLOAT32, "row"),
)
# What share of the parameters has its beta at the cap, for the regime to be what it is called.
# "row" is that whatever it is.
AT_CAP = {"cap": (0.999, 1.0), "clip": (0.999, 1.0), "below": (0.0, 0.001), "mixture": (0.86, 0.9)}


class Gradients:
    """What becomes of the gradients from step to step, and from sample to sample."""

    def __init__(self, params: Sequence[Tensor], regime: str) -> None:
        self._grads = [param.grad for param in params if param.grad is not None]
        sizes = [grad.numel() for grad in self._grads]
        falling = some_of(sizes, gpu_cases.MISSED[regime])
        self._falling = [self._grads[place] for place in falling]
        self._factor = 2.0
        self._changes = 0
        self.lead = LEAD if self._falling else 1

    def change(self) -> None:
        if self._falling:
            torch._foreach_mul_(self._falling, FALL)
            self._changes += 1

    def restart(self) -> None:
        """Those that fell are as they were; and all change: with the memory equal to them beta
        would be 0."""
        if self._falling:
            torch._foreach_mul_(self._falling, FALL**-self._changes)
            self._changes = 0
        torch._foreach_mul_(self._grads, self._factor)
        self._factor = 1 / self._factor


def sample(step: Step, gradients: Gradients, steps: int) -> dict[str, float]:
    """Median seconds of a step: the device's and the host's; and of the wall, over all steps."""
    marks, host = [], []
    gpu.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        gradients.change()
        first = gpu.mark()
        called = time.perf_counter()
        step()
        host.append(time.perf_counter() - called)
        marks.append((first, gpu.mark()))
    gpu.synchronize()
    wall = (time.perf_counter() - start) / steps
    device = statistics.median(gpu.seconds_between(*pair) for pair in marks)
    return {"device": device, "host": statistics.median(host), "wall": wall}


def measure(
    sides: dict[str, Step],
    gradients: Gradients,
    pairs: int,
    seconds: float,
    look: Callable[[str], None] = lambda side: None,
) -> Case:
    """Samples of both sides, in turns: {side: {device, host, wall: [seconds of a step]}}.

    look: called with the side before and after its sample.
    """
    found: Case = {}
    for side, step in sides.items():
        sample(step, gradients, 3)  # compiles, makes the state
        gradients.restart()
        taken = sample(step, gradients, 3)["wall"]
        steps = max(3, min(MAX_STEPS, round(seconds / taken)))
        found[side] = {"steps": steps, "device": [], "host": [], "wall": []}
    names = list(sides)
    for pair in range(pairs):
        for side in names if pair % 2 else reversed(names):
            gradients.restart()
            for _ in range(gradients.lead):
                gradients.change()
                sides[side]()
            look(side)
            for kind, value in sample(sides[side], gradients, found[side]["steps"]).items():
                found[side][kind].append(value)
            look(side)
    return found


def make_params(shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
    """Random parameters with random gradients."""
    params = [torch.randn(shape, device=gpu.device, dtype=dtype) for shape in shapes]
    for param in params:
        param.requires_grad_().grad = torch.randn_like(param)
    return params


# Steps so small that the values stay what they are, and a weight decay that hardly counts in beta,
# but is there.


def make_ours(
    optimizer: str,
    params: Sequence[Tensor],
    backend: str,
    regime: str = "cap",
    format: Format = FLOAT32,
) -> AMAdamW | AMSGD:
    """optimizer: "AMAdamW" or "AMSGD", with " anchored" for that plane."""
    options: dict[str, Any] = {"lr": 1e-9, "backend": backend, **format.options}
    if optimizer.endswith(" anchored"):
        options["memory_plane"] = "anchored"
    if regime == "row":
        options["beta_scope"] = "row"
    if regime == "clip":
        options["max_grad_norm"] = MAX_NORM
    if optimizer.startswith("AMAdamW"):
        return AMAdamW(params, weight_decay=1e-9, **options)
    return AMSGD(params, **options)


def make_theirs(optimizer: str, params: Sequence[Tensor]) -> Optimizer:
    if optimizer.startswith("AMAdamW"):
        return torch.optim.AdamW(params, lr=1e-9, weight_decay=1e-9, fused=True)
    return torch.optim.SGD(params, lr=1e-9, momentum=0.9, fused=True)


def time_case(
    backend: str, case: gpu_cases.Case, optimizer: str, format: Format, regime: str
) -> Case:
    needed, free = case.numel * gpu_cases.RESIDENT_BYTES, gpu.free_bytes()
    if needed > free:
        raise NotDone(f"needs {needed / 2**30:.0f} GiB of GPU memory, and {free / 2**30:.0f} are")
    params = make_params(case.shapes, format.dtype)
    others = make_params(case.shapes, torch.float32) if format.is_low else params
    ours = make_ours(optimizer, params, backend, regime, format)
    theirs = make_theirs(optimizer, others)
    shares = []

    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(others, MAX_NORM, foreach=True)
        theirs.step()

    def look(side: str) -> None:
        if side == "ours":
            shares.append(ours.metrics()["at_cap"].item())

    clips = regime == "clip"
    sides: dict[str, Step] = {"ours": ours.step, "torch": clip_and_step if clips else theirs.step}
    gradients = Gradients([*params, *others] if format.is_low else params, regime)
    found = measure(sides, gradients, PAIRS, SAMPLE_SECONDS, look)
    if regime not in ("cap", "row", "clip"):
        for side in sides:
            del found[side]["wall"]  # the gradients' changes are in it
    target = format.target
    if optimizer.startswith("AMAdamW") and format == FLOAT32:
        target = case.targets.get(regime)
    predicted = gpu_cases.predicted_bytes(
        optimizer,
        case.shapes,
        format,
        gpu.l2_bytes(),
        gpu_cases.MISSED[regime],
        gpu_cases.LONGEST_ROW[backend] if regime == "row" else None,
    )
    if clips:
        predicted += format.dtype.itemsize  # the gradients are read for their norm
    found |= {
        "numel": case.numel,
        "target": target,
        "target_seconds": gpu_cases.TARGET_SECONDS.get(case.name),
        "predicted_bytes": round(predicted, 2),
        "at_cap": [round(share, 4) for share in shares],
    }
    least, most = AT_CAP.get(regime, (0.0, 1.0))
    if not all(least <= share <= most for share in shares):
        found["failed"] = f"of the parameters {min(shares):.0%} to {max(shares):.0%} at the cap"
    return found


def copy_bandwidth() -> Case:
    """Bytes a second, read and written, of copies of 1 GiB on the device."""
    source = torch.ones(COPIED, device=gpu.device)
    target = torch.empty_like(source)
    moments = [gpu.mark()]
    for _ in range(20):
        target.copy_(source)
        moments.append(gpu.mark())
    gpu.synchronize()
    seconds = [gpu.seconds_between(*pair) for pair in itertools.pairwise(moments)]
    rate = 2 * source.nbytes / statistics.median(seconds)
    return {"bandwidth": rate, "clocks": gpu_clocks()}


def run(part: Part, backend: str) -> None:
    part.case("copy", copy_bandwidth)
    lists = gpu_cases.cases(gpu.free_bytes())
    for name, optimizer, format, regime in CASES:
        label = f"{lists[name].name}, {optimizer}, {format.name}, {regime}"
        part.case(label, partial(time_case, backend, lists[name], optimizer, format, regime))


# ---- report -----------------------------------------------------------------------------


def ratios(found: Case) -> list[float]:
    sides = found["ours"]["device"], found["torch"]["device"]
    return [a / b for a, b in zip(*sides, strict=True)]


def timed(part: dict[str, Any]) -> dict[str, Case]:
    return {name: found for name, found in part["cases"].items() if "ours" in found}


def table(stage: dict[str, Any]) -> list[str]:
    lines = [
        f"{'':54s} {'ms':>8s} {'predicted':>9s} {'torch':>8s} {'ratio':>6s} {'least':>6s} "
        f"{'most':>6s} {'target':>6s} {'of copy':>7s} {'wall':>8s} {'torch':>8s} {'host':>7s} "
        f"{'torch':>7s} at cap"
    ]
    for backend, part in stage.items():
        copy = part["cases"].get("copy", {}).get("bandwidth")
        if copy is not None:
            lines.append(f"{backend}; a copy: {copy / 1e9:,.0f} GB/s")
        for name, found in timed(part).items():
            ms = {
                (side, kind): 1e3 * statistics.median(found[side][kind])
                for side in ("ours", "torch")
                for kind in ("device", "wall", "host")
                if kind in found[side]
            }
            target, ratio = found["target"], statistics.median(ratios(found))
            missed = target is not None and ratio > target
            seconds = found.get("target_seconds")
            missed |= seconds is not None and ms["ours", "device"] > 1e3 * seconds
            least = None  # ms
            if copy is not None:
                least = 1e3 * found["predicted_bytes"] * found["numel"] / copy
            share = None if least is None else 100 * least / ms["ours", "device"]
            cells = [
                _cell(ms["ours", "device"], 8, 3),
                _cell(least, 9, 3),
                _cell(ms["torch", "device"], 8, 3),
                *(_cell(value, 6, 2) for value in (ratio, min(ratios(found)), max(ratios(found)))),
                _cell(target, 6, 2),
                _cell(share, 6, 0) + ("" if share is None else "%"),
                *(_cell(ms.get((side, "wall")), 8, 3) for side in ("ours", "torch")),
                *(_cell(ms[side, "host"], 7, 3) for side in ("ours", "torch")),
                f"{statistics.mean(found['at_cap']):6.0%}{'  missed' if missed else ''}",
            ]
            lines.append(" ".join([f"{name:54s}", *cells]))
    return lines


def _cell(value: float | None, width: int, digits: int) -> str:
    return f"{'' if value is None else f'{value:.{digits}f}':>{width}s}"


def write_png(stage: dict[str, Any], device: str, path: Path) -> None:
    """Ratios to torch's step times, a dot for each pair, a line for each target."""
    from matplotlib.figure import Figure

    rows = [
        (backend, name, found)
        for backend, part in stage.items()
        for name, found in timed(part).items()
    ][::-1]
    figure = Figure(figsize=(9, 1.5 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for row, (backend, _, found) in enumerate(rows):
        color = {"cuda": "tab:blue", "triton": "tab:orange"}[backend]
        axes.barh(row, statistics.median(ratios(found)), color=color)
        axes.plot(ratios(found), [row] * len(ratios(found)), "k.", markersize=4)
        if found["target"] is not None:
            axes.plot([found["target"]] * 2, [row - 0.4, row + 0.4], "tab:red")
    axes.set_yticks(range(len(rows)), [f"{backend}: {name}" for backend, name, _ in rows])
    axes.margins(y=0.01)
    axes.axvline(1.0, color="gray", linewidth=0.8)
    axes.set_xlabel("step time over torch's fused optimizer's\ndots: pairs; red: the target")
    axes.set_title(device)
    figure.savefig(path, dpi=120)
