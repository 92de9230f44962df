"""The benchmarks: step times of the optimizers, alone and in training, and what changed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from bench import compare, host, phase, readme, train
from bench.kernels import command as kernels
from bench.low_precision import steps as low_precision


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (kernels, low_precision, train, phase, host, compare, readme):
        module.add_parser(commands)
    args = parser.parse_args(argv)
    if getattr(args, "quick", False):
        # Other defaults, which yield to an option that is given.
        args.parser.set_defaults(**args.quick_defaults)
        args = parser.parse_args(argv)
    status: int = args.run(args)
    return status


if __name__ == "__main__":
    raise SystemExit(main())
