"""Text in tens of megabytes: Python source and documentation of the standard library and of the
packages that requirements.txt pins."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import distribution
from pathlib import Path

PACKAGES = (
    "hypothesis",
    "matplotlib",
    "numpy",
    "pytest",
    "scikit-learn",
    "scipy",
    "setuptools",
    "torch",
    "triton",
)
SUFFIXES = {".py", ".pyi", ".md", ".rst", ".txt"}
LARGEST = 2**18  # bytes of a file; what is larger are tables, mostly
HELD_OUT_EVERY = 50  # one file in so many, by its digest, for each held-out part


@dataclass(frozen=True)
class Corpus:
    """Text whose files are in one part each.

    Attributes:
        training: what is trained on.
        choosing: held out, for the choice of learning rates.
        comparing: held out, for what contestants are compared by.
    """

    training: bytes
    choosing: bytes
    comparing: bytes

    def digest(self) -> str:
        """SHA-256 of all of it: other versions have other text, and so other numbers."""
        return hashlib.sha256(self.training + self.choosing + self.comparing).hexdigest()


def _paths() -> Iterator[Path]:
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*")):
        # sysconfig's own data differ by machine.
        if "site-packages" not in path.parts and not path.name.startswith("_sysconfigdata"):
            yield path
    for name in PACKAGES:
        for file in sorted(distribution(name).files or [], key=str):
            yield Path(str(file.locate()))


@cache
def corpus() -> Corpus:
    """The files' contents, those that occur twice once."""
    contents: dict[bytes, bytes] = {}
    for path in _paths():
        if path.suffix in SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST:
            content = path.read_bytes()
            contents.setdefault(hashlib.sha256(content).digest(), content)
    parts: dict[str, list[bytes]] = {"training": [], "choosing": [], "comparing": []}
    held_out = {0: "choosing", 1: "comparing"}
    for digest, content in contents.items():
        parts[held_out.get(digest[0] % HELD_OUT_EVERY, "training")].append(content)
    return Corpus(**{name: b"\n".join(part) for name, part in parts.items()})
