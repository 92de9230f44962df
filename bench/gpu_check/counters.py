"""What the device's own counters say of a step, read by ncu: bytes from and to memory, hits in
L2, and why warps wait.

    ncu ... python -m bench.gpu_check.counters BACKEND...

takes the steps: the backends', with a beta a tensor and with a beta a row, and torch's on the same
tensors, each behind a kernel that is seen to be neither's. ncu runs a kernel several times, with L2
emptied before each, so that what one launch leaves there for the next is counted as read from
memory.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from bench import gpu_cases
from bench.gpu_check import gpu, times
from bench.gpu_check.processes import Limited, find_tool, module
from bench.gpu_check.record import Case, Results

# The list, the format, and the regimes of each backend's steps.
CASES = (
    ("gpt2-small", gpu_cases.FLOAT32, ("cap", "row")),
    ("gpt2-small", gpu_cases.ALL_BFLOAT16, ("cap", "row")),
    ("gpt2-small", gpu_cases.INT8_STATE, ("row",)),
)
MARKER = "neg_kernel"  # in the name of the kernel between the steps

READ, WRITTEN = "dram__bytes_read.sum", "dram__bytes_write.sum"
SECONDS, HITS = "gpu__time_duration.sum", "lts__t_sector_hit_rate.pct"
L2_SECTORS = "lts__t_sectors_srcunit_tex.sum"  # of 32 bytes, between L2 and multiprocessors
STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
STALLS = (
    "barrier",
    "branch_resolving",
    "dispatch_stall",
    "drain",
    "lg_throttle",
    "long_scoreboard",
    "math_pipe_throttle",
    "membar",
    "mio_throttle",
    "no_instruction",
    "not_selected",
    "short_scoreboard",
    "sleeping",
    "wait",
)


def take_steps(backends: Sequence[str]) -> None:
    lists = gpu_cases.cases(gpu.free_bytes())
    marker = torch.ones(1, device=gpu.device)
    for name, format, regimes in CASES:
        params = times.make_params(lists[name].shapes, format.dtype)
        optimizers: list[Optimizer] = [
            times.make_ours("AMAdamW", params, backend, regime, format)
            for backend in backends
            for regime in regimes
        ]
        if not format.is_low:
            optimizers.append(times.make_theirs("AMAdamW", params))
        for optimizer in optimizers:
            for _ in range(3):
                optimizer.step()
            with gpu.profiled():
                marker.neg_()
                optimizer.step()


def command(ncu: str, backends: Sequence[str]) -> list[str]:
    metrics = [READ, WRITTEN, SECONDS, HITS, L2_SECTORS, *map(STALL.format, STALLS)]
    return [
        ncu,
        *["--csv", "--print-units", "base"],
        *["--profile-from-start", "off", "--clock-control", "none"],
        *["--metrics", ",".join(metrics)],
        *module("bench.gpu_check.counters", *backends),
    ]


def read_csv(lines: Sequence[str]) -> list[dict[str, Any]]:
    """The kernels in the order of their launches: a `name`, and each metric that has a value."""
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    kernels: dict[str, dict[str, Any]] = {}
    for row in csv.DictReader(line for line in lines[start:] if line.startswith('"')):
        kernel = kernels.setdefault(row["ID"], {"name": row["Kernel Name"]})
        value = row["Metric Value"].replace(",", "")
        if re.fullmatch(r"-?[\d.]+(e[+-]?\d+)?", value):
            kernel[row["Metric Name"]] = float(value)
    return list(kernels.values())


def steps_of(kernels: Sequence[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The kernels of each step: those behind a marker."""
    steps: list[list[dict[str, Any]]] = []
    for kernel in kernels:
        if MARKER in kernel["name"]:
            steps.append([])
        elif steps:
            steps[-1].append(kernel)
    return steps


def summarize(kernels: Sequence[dict[str, Any]], numel: int) -> Case:
    """A step's kernels together; hits and stalls are those of the longest."""
    if not kernels:
        return {"not_done": "ncu has counted none of its kernels"}
    try:
        longest = max(kernels, key=lambda kernel: kernel[SECONDS])
        read, written = (sum(kernel[key] for kernel in kernels) for key in (READ, WRITTEN))
    except KeyError as error:
        return {"failed": f"ncu has no number for {error}"}
    seconds = sum(kernel[SECONDS] for kernel in kernels) / 1e9
    stalls = {name: longest.get(STALL.format(name), 0.0) for name in STALLS}
    return {
        "kernels": len(kernels),
        "longest": longest["name"],
        "seconds": seconds,
        "read": round(read / numel, 3),
        "written": round(written / numel, 3),
        "through_l2": round(32 * sum(k.get(L2_SECTORS, 0.0) for k in kernels) / numel, 3),
        "bandwidth": (read + written) / seconds,
        "l2_hits": longest.get(HITS),
        "stalls": dict(sorted(stalls.items(), key=lambda item: -item[1])),
    }


def run(results: Results, backends: Sequence[str], seconds: float) -> None:
    """Runs ncu, whose output is kept as ncu.csv."""
    results.begin("ncu", "all")
    ncu = find_tool("ncu")
    if ncu is None:
        results.put("ncu", "all", "steps", {"not_done": "ncu is not installed"})
        return results.end("ncu", "all", "done")
    log = results.path.with_name("ncu.csv")
    log.unlink(missing_ok=True)
    how = Limited(command(ncu, backends), seconds, log).end()
    lines = log.read_text(errors="replace").splitlines()
    steps = iter(steps_of(read_csv(lines)))
    lists = gpu_cases.cases(gpu.free_bytes())
    for name, format, regimes in CASES:
        case = lists[name]
        sides = [
            (
                f"{backend}{', row' if regime == 'row' else ''}",
                gpu_cases.predicted_bytes(
                    "AMAdamW",
                    case.shapes,
                    format,
                    gpu.l2_bytes(),
                    missed=0.0,
                    longest_row=gpu_cases.LONGEST_ROW[backend] if regime == "row" else None,
                ),
            )
            for backend in backends
            for regime in regimes
        ]
        if not format.is_low:
            sides.append(("torch", 7.0 * format.dtype.itemsize))  # its state is of this dtype
        for side, bytes_predicted in sides:
            found = summarize(next(steps, []), case.numel)
            found["predicted_bytes"] = round(bytes_predicted, 2)
            results.put("ncu", "all", f"{case.name}, {format.name}, {side}", found)
    errors = [line for line in lines if line.startswith("==ERROR==")]
    return results.end("ncu", "all", f"failed: {errors[0]}" if errors else how)


def table(stage: dict[str, Any]) -> list[str]:
    lines = [
        f"{'bytes a parameter':36s} {'counted':>7s} {'predicted':>9s} {'read':>6s} {'written':>7s} "
        f"{'of L2':>6s} {'L2 hits':>7s} {'GB/s':>6s} {'ms':>8s} {'launches':>8s}  warps wait for"
    ]
    for part in stage.values():
        for case, found in part["cases"].items():
            if "bandwidth" not in found:
                continue
            hits = "" if found["l2_hits"] is None else f"{found['l2_hits']:.0f}%"
            stalls = ", ".join(f"{k} {v:.1f}" for k, v in list(found["stalls"].items())[:4])
            lines.append(
                f"{case:36s} {found['read'] + found['written']:7.2f} "
                f"{found['predicted_bytes']:9.2f} {found['read']:6.2f} {found['written']:7.2f} "
                f"{found['through_l2']:6.1f} {hits:>7s} {found['bandwidth'] / 1e9:6.0f} "
                f"{1e3 * found['seconds']:8.3f} {found['kernels']:8d}  {stalls}"
            )
    return lines


if __name__ == "__main__":
    take_steps(sys.argv[1:])
