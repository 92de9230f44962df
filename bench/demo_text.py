"""The demo's text: source files of the Python standard library that runs it."""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

# Top-level modules that every CPython from 3.10 to 3.14 has as one file of some length. The
# names are fixed; what is in the files is the running Python's own, hence the digests.
_TRAINING = """
_pydecimal _pyio _strptime argparse ast base64 bdb calendar cmd codecs compileall configparser
contextlib copy csv difflib dis doctest enum filecmp fileinput fractions ftplib functools gettext
gzip hashlib imaplib inspect ipaddress locale mailbox mimetypes modulefinder ntpath optparse os pdb
pickle pickletools pkgutil platform plistlib poplib posixpath pprint pydoc queue random runpy sched
selectors smtplib socket socketserver ssl subprocess tarfile tempfile threading timeit tokenize
trace traceback tracemalloc types typing uuid warnings wave weakref webbrowser zipimport
"""
_HELD_OUT = "dataclasses heapq shlex shutil statistics symtable textwrap"

TRAINING_FILES = tuple(f"{name}.py" for name in _TRAINING.split())
HELD_OUT_FILES = tuple(f"{name}.py" for name in _HELD_OUT.split())


@dataclass(frozen=True)
class Text:
    """Some files, one after the other.

    Attributes:
        files: their names, in that order.
        content: their bytes.
    """

    files: tuple[str, ...]
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def standard_library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def read_text(files: tuple[str, ...], folder: Path) -> Text:
    """Reads the named files of a folder.

    Raises:
        FileNotFoundError: some are not there; the message names them all. With fewer files
            it would be another text, and no numbers to compare.
    """
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"the standard library in {folder} lacks {', '.join(missing)}")
    return Text(files, b"".join((folder / name).read_bytes() for name in files))
