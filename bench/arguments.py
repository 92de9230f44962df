"""Types of command-line options: numbers in a range, and a folder that can be written to."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

N = TypeVar("N", int, float)


def number(
    kind: Callable[[str], N], allowed: Callable[[N], bool], words: str
) -> Callable[[str], N]:
    """An argparse type: a number of a kind that is `allowed`, which the error says in words."""

    def parse(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            pass
        else:
            if allowed(value):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} is not {words}")

    return parse


COUNT = number(int, lambda n: n >= 1, "a whole number of at least 1")
SEED = number(int, lambda n: 0 <= n < 2**63, "a whole number in [0, 2**63)")
POSITIVE = number(float, lambda x: 0 < x < math.inf, "a finite number above 0")
NOT_NEGATIVE = number(float, lambda x: 0 <= x < math.inf, "a finite number of at least 0")


def output_folder(text: str) -> Path:
    """An argparse type: a folder, made if need be. Fails before the work, not after it."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{path} is not writable")
    return path


def add_device(parser: argparse.ArgumentParser) -> None:
    """Adds --device: the GPU where torch sees one."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where (%(default)s)",
    )
