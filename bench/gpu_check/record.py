"""gpu.json: all that is known so far, written anew at every change, so that a run that is cut
off at any moment loses nothing but the case it was at.

    {"environment": {...}, "stages": {STAGE: {PART: {"ended": ..., "cases": {CASE: {...}}}}}}

A part is a backend, or a tool. It has ended as "done", or how else; a case has what was found,
or `failed` or `not_done` with the reason.
"""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.gpu_check import gpu

Case = dict[str, Any]


class NotDone(Exception):
    """A case that cannot be done here, and why."""


class Results:
    """The file. One process at a time has it open."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "gpu.json"
        self.read()

    def read(self) -> None:
        self.data: dict[str, Any] = {"environment": {}, "stages": {}}
        if self.path.exists():
            self.data = json.loads(self.path.read_text())

    def start(self, environment: dict[str, Any]) -> None:
        """Forgets what was found elsewhere."""
        if self.data["environment"] != environment:
            self.data = {"environment": environment, "stages": {}}
        self.write()

    def write(self) -> None:
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        os.replace(unfinished, self.path)

    def stage(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.data["stages"].get(name, {})
        return found

    def begin(self, stage: str, part: str) -> None:
        """Forgets what an earlier run found of a part."""
        entry = {"began": time.strftime("%F %T"), "ended": "cut off", "cases": {}}
        self.data["stages"].setdefault(stage, {})[part] = entry
        self.write()

    def end(self, stage: str, part: str, how: str) -> None:
        self.data["stages"][stage][part]["ended"] = how
        self.write()

    def put(self, stage: str, part: str, case: str, found: Case) -> None:
        self.data["stages"][stage][part]["cases"][case] = found
        self.write()

    def failures(self, stage: str, part: str) -> list[str]:
        entry = self.stage(stage).get(part, {"ended": "done", "cases": {}})
        ended = [] if entry["ended"] == "done" else [f"{stage} {part}: {entry['ended']}"]
        return ended + _reasons(stage, part, entry["cases"], "failed")

    def not_done(self, stage: str, part: str) -> list[str]:
        return _reasons(stage, part, self.stage(stage)[part]["cases"], "not_done")


def _reasons(stage: str, part: str, cases: dict[str, Case], key: str) -> list[str]:
    return [f"{stage} {part}, {case}: {cases[case][key]}" for case in cases if key in cases[case]]


def table(stage: dict[str, Any]) -> list[str]:
    """A line for each case that says in words what was found."""
    return [
        f"{part:8s} {case:28s} {found['found']}"
        for part, entry in stage.items()
        for case, found in entry["cases"].items()
        if "found" in found
    ]


@dataclass
class Part:
    """A part at work, in a process of its own."""

    results: Results
    stage: str
    name: str
    deadline: float  # of time.time(); cases begin before it

    def put(self, case: str, found: Case) -> None:
        self.results.put(self.stage, self.name, case, found)

    def case(self, name: str, work: Callable[[], Case]) -> None:
        """Does a case and writes what it found, or why it found nothing."""
        if time.time() > self.deadline:
            self.put(name, {"not_done": "no time was left"})
            return
        start = time.perf_counter()
        try:
            found = work()
        except NotDone as reason:
            found = {"not_done": str(reason)}
        except Exception as error:
            traceback.print_exc()
            found = {"failed": f"{type(error).__name__}: {error}"}
        self.put(name, found | {"seconds": round(time.perf_counter() - start, 2)})
        # After an access to a wrong address nothing works any more: ends the process.
        gpu.synchronize()
