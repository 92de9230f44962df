"""Warnings at the user's own line."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

# Where the code is that a user did not write.
_LIBRARIES = tuple(f"{folder}{os.sep}" for folder in (*torch.__path__, Path(__file__).parent))


def warn_user(message: str) -> None:
    """Warns at the line that constructed the optimizer, took a step or loaded state."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)
