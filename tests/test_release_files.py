"""What a release is made of: one version, and a source distribution with all that belongs to it."""

import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from adamem_fused import __version__

ROOT = Path(__file__).parent.parent
# What is in the source distribution, files and folders; the rest is of the checkout alone.
CONTENT = {
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "README.md",
    "adamem_fused",
    "csrc",
    "docs",
    "pyproject.toml",
    "setup.py",
    "triton_kernels",
}


def test_the_version_is_everywhere_the_same():
    citation = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    newest = re.search(r"^## (\S+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert citation and newest
    assert citation[1] == __version__
    assert newest[1] == __version__
    assert newest[2] == "unreleased" or re.fullmatch(r"\d{4}-\d\d-\d\d", newest[2])


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git knows what belongs there")
def test_the_source_distribution_is_complete(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path]
    command += ["sdist", "--dist-dir", tmp_path]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    name = f"adamem_fused-{__version__}"
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        found = {Path(member.name).relative_to(name) for member in archive if member.isfile()}
    made = {path for path in found if path.name in ("PKG-INFO", "setup.cfg")}
    made |= {path for path in found if path.parts[0].endswith(".egg-info")}
    # With what is not committed yet, and without the link to a folder that is there by itself.
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    paths = {Path(text) for text in listed.split("\0") if text}
    expected = {path for path in paths if path.parts[0] in CONTENT and (ROOT / path).is_file()}
    assert found - made == expected
