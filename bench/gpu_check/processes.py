"""Processes with a time limit."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from adamem_fused.backends import cuda_library

ROOT = Path(__file__).parents[2]
INTERPRETER = [sys.executable]
GRACE = 5.0  # seconds for saying where it was
PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


def module(name: str, *arguments: object) -> list[str]:
    """The command that runs a module."""
    return [*INTERPRETER, "-m", name, *map(str, arguments)]


def _in_a_group() -> None:
    """A group of its own, so that all of it can be ended; and it ends where this process does, as
    the next run's times would suffer from it."""
    os.setpgrp()
    _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Limited:
    """A process and all that it starts, from the root of the checkout.

    Args:
        seconds: its limit. Then it is interrupted, as by Ctrl-C, and soon ended.
        log: what it prints is added there; without one, it prints where this process does.
    """

    def __init__(
        self,
        command: Sequence[str],
        seconds: float,
        log: Path | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._seconds = seconds
        self._start = time.monotonic()
        output = None if log is None else log.open("ab")
        # A compiler at the first step would take its time, and replace a library that was
        # brought along.
        always = {"ADAMEM_CUDA_JIT": "0", "PYTHONUNBUFFERED": "1"}
        self._process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=None if output is None else subprocess.STDOUT,
            env={**os.environ, **always, **(environment or {})},
            preexec_fn=_in_a_group,
        )
        if output is not None:
            output.close()

    def end(self) -> str:
        """Waits for it. "done", or how else it ended."""
        try:
            status = self._process.wait(self._start + self._seconds - time.monotonic())
            if status < 0:
                return f"failed: {signal.Signals(-status).name}"
            return "done" if status == 0 else f"failed: exit status {status}"
        except subprocess.TimeoutExpired:
            self._process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE)
            return f"failed: not done after {self._seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def find_tool(name: str) -> str | None:
    """A program of the CUDA toolkit: on PATH, or beside nvcc."""
    nvcc = cuda_library.find_nvcc()
    beside = Path(nvcc).resolve().with_name(name) if nvcc else None
    return shutil.which(name) or (str(beside) if beside and beside.exists() else None)
