"""The tests marked gpu: side by side in processes where pytest-xdist is installed, and then, alone,
those that are marked slow too, whose tensors have more than 2^31 elements.

Without tests/conftest.py, which needs packages that such a machine may not have.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu_check.processes import ROOT, Limited
from bench.gpu_check.record import Case, Results

WORKERS = 8
TEST_SECONDS = 60
RUNS = {"side by side": ("gpu and not slow", WORKERS), "alone": ("gpu and slow", 0)}
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED"


def find_files() -> list[Path]:
    tests = (ROOT / "tests").glob("test_*.py")
    return sorted(path for path in tests if "pytest.mark.gpu" in path.read_text())


def command(marks: str, workers: int, without: Sequence[str]) -> list[str]:
    options = ["--noconftest", "-p", "no:cacheprovider", "-v", "-rfEs"]
    if workers and importlib.util.find_spec("xdist") is not None:
        options += ["-n", str(workers)]
    if importlib.util.find_spec("pytest_timeout") is not None:
        # By a thread: a test that waits for the device hears no signal.
        options += [f"--timeout={TEST_SECONDS}", "--timeout-method=thread"]
    if without:
        options += ["-k", " and ".join(f"not {backend}" for backend in without)]
    return [sys.executable, "-m", "pytest", "-m", marks, *options, *map(str, find_files())]


def read_log(text: str) -> Case:
    """Counts of outcomes, what failed and why something was skipped, as far as a log goes."""
    outcomes = re.findall(rf"^\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (\S+::.+?) *$", text, re.MULTILINE)
    alone = re.findall(rf"^(\S+::.+?) ({OUTCOMES})\b", text, re.MULTILINE)
    outcomes += [(outcome, test) for test, outcome in alone]
    counts = Counter(outcome for outcome, _ in outcomes)
    found: Case = {"counts": {outcome: counts[outcome] for outcome in OUTCOMES.split("|")}}
    found["skips"] = re.findall(r"^SKIPPED (\[\d+\] .+)$", text, re.MULTILINE)
    wrong = [test for outcome, test in outcomes if outcome in ("FAILED", "ERROR")]
    if wrong:
        found["failed"] = f"{len(wrong)}: {', '.join(wrong)}"
    elif not counts["PASSED"]:
        found["failed"] = "no test has passed"
    return found


def run(results: Results, without: Sequence[str], seconds: float) -> None:
    """Runs them; what pytest says is kept as tests-RUN.log.

    Args:
        without: backends whose tests are left out.
    """
    for part, (marks, workers) in RUNS.items():
        results.begin("tests", part)
        log = results.path.parent / f"tests-{part.replace(' ', '-')}.log"
        log.unlink(missing_ok=True)
        share = 0.75 if workers else 0.25
        how = Limited(command(marks, workers, without), share * seconds, log).end()
        found = read_log(log.read_text(errors="replace"))
        results.put("tests", part, "all", found)
        # What pytest's status says is said better by what failed.
        told = "failed" in found and how == "failed: exit status 1"
        results.end("tests", part, "done" if told else how)


def table(stage: dict[str, Any]) -> list[str]:
    lines = []
    for part, entry in stage.items():
        for found in entry["cases"].values():
            counts = (f"{count} {outcome.lower()}" for outcome, count in found["counts"].items())
            lines.append(f"{part}: {', '.join(counts)}")
            lines += [f"  skipped {skip}" for skip in found["skips"]]
    return lines
