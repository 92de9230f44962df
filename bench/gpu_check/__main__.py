"""Checks and times the GPU backends on a machine with a GPU, in some eight minutes.

    python -m bench.gpu_check

From the checkout, without a network, with torch, triton and pytest; with nvcc where nothing is
compiled yet, and with ncu, compute-sanitizer, pytest-xdist, pytest-timeout and matplotlib where
they are installed. What is not compiled is compiled first, in a minute or two; what is, is taken
as it is. Then come the stages, each in processes of its own with a time limit:

    smoke      a few steps against the reference, 30 times the same, and as a CUDA graph; a
               backend for which something is wrong here is left out of what follows
    times      a copy's bandwidth; step times against torch's fused optimizer
    sweep      step times with other sizes
    ncu        bytes from and to memory, hits in L2, stalls, beside the bytes that are predicted
    tests      all tests that are marked gpu
    sanitizer  small steps under compute-sanitizer: memcheck and racecheck

A table ends each stage. To --out, or to bench/results/<device>/, it writes

    gpu.json       everything, after every case (bench/gpu_check/record.py)
    gpu.png        ratios of step times
    ncu.csv, tests-*.log, sanitizer.log    what other programs said

To go on with a run that was cut off, name the rest with --stages: what other stages have found is
kept, if it was found on the same device with the same versions. Beside these goes notes.md, by
hand: what was predicted, what was measured, why, and what is next. Predictions are printed next to
what was measured: bytes a parameter, and from them and the copy's bandwidth the time of a step.

Exit status: 0 if everything that was checked holds, 1 if something does not, 2 without a GPU.
Ratios that miss their target are marked, and fail nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from adamem_fused.backends import cuda_library, ops
from bench.arguments import POSITIVE, output_folder
from bench.environment import environment, folder_name
from bench.gpu_check import counters, gpu, record, sanitizer, suite, sweep, times
from bench.gpu_check.processes import ROOT, Limited, module
from bench.gpu_check.record import Results


class Check(NamedTuple):
    """What a stage is given: the results so far, and the backends that it is about."""

    results: Results
    there: list[str]  # backends that can be used
    wrong: list[str]  # and of these, those of which something was wrong in smoke

    @property
    def backends(self) -> list[str]:
        return [name for name in self.there if name not in self.wrong]


def build(results: Results) -> bool:
    """Compiles what is not there; what is there is taken as it is. Whether that worked."""
    results.begin("build", "all")
    missing = [] if ops.unavailable is None else [f"the C++ extension ({ops.unavailable})"]
    with_cuda = not cuda_library.LIBRARY.exists() and cuda_library.find_nvcc() is not None
    missing += ["the CUDA kernels"] if with_cuda else []
    print(f"To be compiled: {' and '.join(missing) or 'nothing'}", flush=True)
    how = "done"
    if missing:
        command = [sys.executable, "setup.py", "build_ext", "--inplace", "--parallel", "2"]
        log = results.path.with_name("build.log")
        environment = {"ADAMEM_CUDA": str(int(with_cuda))}
        how = Limited(command, BUILD_SECONDS, log, environment).end()
        print(f"{how}; see {log}", flush=True)
    results.put("build", "all", "compiled", {"found": missing})
    results.end("build", "all", how)
    return how == "done"


def in_processes(stage: str, check: Check, seconds: float) -> None:
    """Runs a stage for each backend, one after the other."""
    end = time.monotonic() + seconds
    for i, backend in enumerate(check.backends):
        check.results.begin(stage, backend)
        limit = (end - time.monotonic()) / (len(check.backends) - i)
        arguments = (check.results.path.parent, stage, backend, limit)
        how = Limited(module("bench.gpu_check.process", *arguments), limit).end()
        check.results.read()
        check.results.end(stage, backend, how)


def run_times(check: Check, seconds: float) -> None:
    in_processes("times", check, seconds)
    results = check.results
    try:
        name = results.data["environment"]["device"]["name"]
        times.write_png(results.stage("times"), name, results.path.with_name("gpu.png"))
    except ImportError:
        print("without gpu.png: matplotlib is not installed")


def run_ncu(check: Check, seconds: float) -> None:
    counters.run(check.results, check.backends, seconds)


def run_tests(check: Check, seconds: float) -> None:
    suite.run(check.results, check.wrong, seconds)


def run_sanitizer(check: Check, seconds: float) -> None:
    sanitizer.run(check.results, check.backends, seconds)


class Stage(NamedTuple):
    seconds: float
    run: Callable[[Check, float], None]
    table: Callable[[dict[str, Any]], list[str]]


BUILD_SECONDS, FIND_SECONDS = 300, 60
STAGES = {
    "smoke": Stage(130, partial(in_processes, "smoke"), record.table),
    "times": Stage(130, run_times, times.table),
    "sweep": Stage(40, partial(in_processes, "sweep"), sweep.table),
    "ncu": Stage(40, run_ncu, counters.table),
    "tests": Stage(110, run_tests, suite.table),
    "sanitizer": Stage(35, run_sanitizer, record.table),
}


def run_stage(name: str, results: Results, seconds: float) -> bool:
    """Runs it and prints its table. Whether all that was checked holds."""
    missing = results.data["backends"]
    there = [backend for backend, reason in missing.items() if reason is None]
    wrong = [b for b in there if name != "smoke" and results.failures("smoke", b)]
    print(f"\n==== {name}, {seconds:.0f} s", flush=True)
    start = time.monotonic()
    lines, failed = [], []
    try:
        STAGES[name].run(Check(results, there, wrong), seconds)
        lines = STAGES[name].table(results.stage(name))
    except Exception as error:  # the next stages are to come all the same
        traceback.print_exc()
        failed.append(f"{name}: {error!r}")
    stage = results.stage(name)
    failed += [reason for part in stage for reason in results.failures(name, part)]
    not_done = [reason for part in stage for reason in results.not_done(name, part)]
    not_done += [f"{name} {backend}: its smoke failed" for backend in wrong]
    not_done += [f"{name} {backend}: {reason}" for backend, reason in missing.items() if reason]
    lines += failed + [f"not done: {reason}" for reason in not_done]
    lines.append(f"{name}: {'failed' if failed else 'done'}, {time.monotonic() - start:.0f} s")
    print("\n".join(lines), flush=True)
    return not failed


def default_folder() -> Path:
    return ROOT / "bench" / "results" / folder_name(gpu.describe()["name"])


def stage_names(text: str) -> list[str]:
    """An argparse type: stages with commas between them, in whatever order."""
    unknown = [name for name in text.split(",") if name not in STAGES]
    if unknown:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(STAGES)}")
    return [name for name in STAGES if name in text.split(",")]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=output_folder, help="folder for what is written")
    parser.add_argument(
        "--stages", type=stage_names, default=list(STAGES), help="with commas between them; all"
    )
    parser.add_argument("--seconds", type=POSITIVE, help="for all of them together; 485")
    options = parser.parse_args(arguments)
    if not gpu.is_available():
        print(
            f"gpu_check: no GPU: torch {torch.__version__} sees none. It takes an NVIDIA GPU and a "
            "CUDA build of torch; --help says what else it uses.",
            file=sys.stderr,
        )
        return 2
    results = Results(options.out or output_folder(str(default_folder())))
    results.start(environment() | {"device": gpu.describe()})
    built = build(results)
    # In a process of its own, as this one has looked before anything was compiled.
    find = Limited(module("bench.gpu_check.process", results.path.parent), FIND_SECONDS)
    how = find.end()
    if how != "done":
        print(f"Looking for the backends: {how}", file=sys.stderr)
        return 1
    results.read()
    usual = sum(STAGES[name].seconds for name in options.stages)
    scale = (options.seconds or usual) / usual
    hold = [run_stage(name, results, scale * STAGES[name].seconds) for name in options.stages]
    print(f"\nWritten to {results.path.parent}")
    nothing = all(reason is not None for reason in results.data["backends"].values())
    return int(nothing or not built or not all(hold))


if __name__ == "__main__":
    sys.exit(main())
