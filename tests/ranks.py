"""Processes that stay up for a whole test file, and run functions as the ranks of a group."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PRELOAD = ["torch.distributed.checkpoint.state_dict", "torch.distributed.tensor.parallel"]
TIMEOUT = 60  # seconds: a collective that not every rank joins is a failure, not a hang


def _serve(rank: int, size: int, store: str, connection: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=TIMEOUT / 2),
    )
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            function(*args)
            connection.send(None)
        except Exception:
            connection.send(traceback.format_exc())


class Ranks:
    """`size` processes with a gloo process group; they start at the first `run`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.processes: list[tuple[multiprocessing.process.BaseProcess, Connection]] = []
        self.directory: tempfile.TemporaryDirectory[str] | None = None

    def _start(self) -> None:
        # Forked from a process that has done what takes longest: the imports.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.directory = tempfile.TemporaryDirectory()
        store = str(Path(self.directory.name) / "store")
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, self.size, store, theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.processes.append((process, ours))

    def run(self, function: Callable[..., None], *args: Any) -> None:
        """Calls a function of a module, with these arguments, on every rank.

        Raises:
            AssertionError: with the traceback of each rank that raised, ended or took too long.
        """
        if not self.processes:
            self._start()
        for _, connection in self.processes:
            connection.send((function, args))
        failures = []
        stuck = False
        for rank, (_, connection) in enumerate(self.processes):
            failure: str | None = f"no answer in {TIMEOUT} seconds"
            try:
                if connection.poll(TIMEOUT):
                    failure = connection.recv()
                else:
                    stuck = True
            except EOFError:
                failure, stuck = "the process ended", True
            if failure is not None:
                failures.append(f"rank {rank}: {failure}")
        if failures:
            # A rank that raised may have left others in a collective: begin anew.
            self.stop(kill=stuck)
            raise AssertionError("\n".join(failures))

    def stop(self, kill: bool = False) -> None:
        for process, connection in self.processes:
            connection.close()
            if kill:
                process.kill()
        for process, _ in self.processes:
            process.join(TIMEOUT)
            if process.exitcode is None:
                process.kill()
                process.join()
        self.processes = []
        if self.directory is not None:
            self.directory.cleanup()
            self.directory = None
