"""A stage of one backend, in a process of its own: FOLDER STAGE BACKEND SECONDS.

With FOLDER alone, the backends that are there.
"""

from __future__ import annotations

import faulthandler
import signal
import sys
import time
from pathlib import Path

from adamem_fused.backends import BACKENDS
from bench.gpu_check import gpu, smoke, sweep, times
from bench.gpu_check.record import Part, Results

STAGES = {"smoke": smoke, "times": times, "sweep": sweep}
# Of the time a process has: after it, no case begins.
SHARE = 0.85


def find_backends() -> dict[str, str | None]:
    """The fused backends that are not the CPU's, and why one cannot be used."""
    return {
        name: backend.unavailable(gpu.device)
        for name, backend in BACKENDS.items()
        if backend.fused and name != "cpu"
    }


def main() -> None:
    start = time.time()
    # Says where it hangs before it is ended, also inside of a call that takes no interrupts.
    faulthandler.register(signal.SIGINT, chain=True)
    results = Results(Path(sys.argv[1]))
    if len(sys.argv) == 2:
        results.data["backends"] = find_backends()
        results.write()
        return
    stage, backend, seconds = sys.argv[2:]
    part = Part(results, stage, backend, deadline=start + SHARE * float(seconds))
    STAGES[stage].run(part, backend)


if __name__ == "__main__":
    main()
