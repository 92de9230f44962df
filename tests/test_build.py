"""setup.py's decisions about what an earlier build has left, with a compiler that only pretends."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What it "compiles" names the torch that it was compiled against.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  if [ "$1" = -o ]; then cat "$TORCH/version.py" > "$2"; fi
  shift
done
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with what setup.py needs, a torch of which nothing but its version is there, and a
    function that builds in it."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "csrc").symlink_to(ROOT / "csrc")
    (tmp_path / "triton_kernels").symlink_to(ROOT / "triton_kernels")
    package = tmp_path / "adamem_fused"
    for path in (ROOT / "adamem_fused").rglob("*.py*"):
        if path.suffix in (".py", ".pyi", ".typed"):
            copy = package / path.relative_to(ROOT / "adamem_fused")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    (package / "py.typed").touch()
    torch = tmp_path / "site" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").touch()
    compiler = tmp_path / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    for key in ("CC", "CXX"):
        monkeypatch.setenv(key, str(compiler))
    monkeypatch.setenv("TORCH", str(torch))
    monkeypatch.setenv("PYTHONPATH", str(torch.parent))
    monkeypatch.setenv("ADAMEM_CUDA", "0")
    monkeypatch.delenv("ADAMEM_NO_EXTENSION", raising=False)
    return tmp_path


def build(checkout, torch_version, *command):
    """Builds, as with that torch; it may have been unpacked long ago."""
    version = checkout / "site" / "torch" / "version.py"
    version.write_text(torch_version)
    os.utime(version, (1e9, 1e9))
    done = subprocess.run(
        [sys.executable, "setup.py", *command], cwd=checkout, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def found(folder):
    """The libraries of the package under a folder, with what they were compiled against."""
    return {
        path.name.split(".")[0]: path.read_text() for path in folder.glob("**/adamem_fused/*.so")
    }


def test_another_torch_is_compiled_against_anew(checkout):
    for version in ("2.12.0", "2.13.0", "2.12.0"):
        build(checkout, version, "build")
        assert found(checkout / "build") == {"_C": version}


def test_another_torch_is_compiled_against_anew_in_place(checkout):
    for version in ("2.12.0", "2.13.0", "2.12.0"):
        build(checkout, version, "build_ext", "--inplace")
        (library,) = (checkout / "adamem_fused").glob("_C*.so")
        assert library.read_text() == version


def test_cuda_kernels_that_are_left_out_are_not_those_of_an_earlier_build(checkout):
    build(checkout, "2.13.0", "build")
    (library,) = (checkout / "build").glob("lib*/adamem_fused")
    (library / "_cuda.so").write_text("earlier")
    build(checkout, "2.13.0", "build")
    assert found(checkout / "build") == {"_C": "2.13.0"}
