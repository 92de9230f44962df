"""setup.py's decisions: what is compiled against which torch, what becomes of what an earlier build
has left, and what is packed; with a compiler that only pretends."""

import os
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# What it "compiles" says which torches' headers it was compiled with, and what it "links" says
# those of its objects.
COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    -o) output="$2"; shift ;;
    -isystem)
      text="$text $(cat "$2"/torch/version.h "$2"/torch/headeronly/version.h 2>/dev/null)"
      shift ;;
    *.o) text="$text $(cat "$1")" ;;
  esac
  shift
done
echo "$text" > "$output"
"""


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A folder with what setup.py needs, and a compiler."""
    names = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "CHANGELOG.md")
    for name in (*names, "csrc", "docs", "triton_kernels"):
        (tmp_path / name).symlink_to(ROOT / name)
    package = tmp_path / "adamem_fused"
    for path in (ROOT / "adamem_fused").rglob("*.py*"):
        if path.suffix in (".py", ".pyi", ".typed"):
            copy = package / path.relative_to(ROOT / "adamem_fused")
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(path)
    (package / "py.typed").touch()
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    for key in ("CC", "CXX"):
        monkeypatch.setenv(key, str(compiler))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("ADAMEM_CUDA", "0")
    for key in ("ADAMEM_NO_EXTENSION", "ADAMEM_TORCHES"):
        monkeypatch.delenv(key, raising=False)
    return tmp_path


def unpack_torch(folder, version):
    """A torch of which there is nothing but its version; it may have been unpacked long ago."""
    major, minor, _ = version.split(".")
    place = "csrc/api/include/torch" if version.startswith("2.9.") else "headeronly"
    header = folder / "torch" / "include" / "torch" / place / "version.h"
    header.parent.mkdir(parents=True, exist_ok=True)
    (folder / "torch" / "__init__.py").touch()
    header.write_text(
        f"#define TORCH_VERSION_MAJOR {major}\n#define TORCH_VERSION_MINOR {minor}\n// {version}\n"
    )
    os.utime(header, (1e9, 1e9))
    return folder / "torch"


def run(checkout, *command):
    return subprocess.run(
        [sys.executable, "setup.py", *command], cwd=checkout, capture_output=True, text=True
    )


def build(checkout, *command, torch="2.13.0"):
    """Builds, as with that torch."""
    unpack_torch(checkout / "site", torch)
    done = run(checkout, *command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def found(folder):
    """The libraries of the package under a folder, with the torches they were compiled against."""
    return {
        path.name: " ".join(sorted(set(re.findall(r"// (\S+)", path.read_text()))))
        for path in folder.glob("**/adamem_fused/*.so")
    }


@pytest.mark.parametrize("command", [["build"], ["build_ext", "--inplace"]])
def test_another_torch_is_compiled_against_anew(checkout, command):
    folder = checkout / "build" if command == ["build"] else checkout
    for version, name in (("2.12.0", "_C_2_12"), ("2.12.1", "_C_2_12"), ("2.13.0", "_C_2_13")):
        build(checkout, *command, torch=version)
        assert found(folder) == {"_cpu.so": "", f"{name}.abi3.so": version}


def test_cuda_kernels_that_are_left_out_are_not_those_of_an_earlier_build(checkout):
    for name in ("_cuda.so", "_C.cpython-311-x86_64-linux-gnu.so"):
        (checkout / "adamem_fused" / name).write_text("earlier")
    build(checkout, "build_ext", "--inplace")
    assert found(checkout) == {"_cpu.so": "", "_C_2_13.abi3.so": "2.13.0"}


def test_glue_of_several_torches_lies_side_by_side(checkout, monkeypatch):
    torches = [unpack_torch(checkout / version, version) for version in ("2.9.1", "2.10.0")]
    monkeypatch.setenv("ADAMEM_TORCHES", os.pathsep.join(map(str, torches)))
    monkeypatch.setenv("ADAMEM_CUDA", "1")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    build(checkout, "build_ext", "--parallel", "2", "bdist_wheel")
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert "-cp310-abi3-linux_" in wheel.name
    zipfile.ZipFile(wheel).extractall(checkout / "unpacked")
    assert found(checkout / "unpacked") == {
        "_cpu.so": "",
        "_cuda.so": "",
        "_C_2_9.abi3.so": "2.9.1",
        "_C_2_10.abi3.so": "2.10.0",
    }


@pytest.mark.parametrize("has_older", [True, False])
def test_without_a_torch_the_build_says_what_it_needs(checkout, has_older):
    older = checkout / "site" / "torch"
    (older / "include" if has_older else older).mkdir(parents=True)
    (older / "__init__.py").touch()
    done = run(checkout, "build")
    assert done.returncode != 0
    assert "compiled against an installed torch (2.9 or newer)" in done.stderr


def test_without_the_extension_nothing_of_an_earlier_build_is_packed(checkout, monkeypatch):
    build(checkout, "build")
    monkeypatch.setenv("ADAMEM_NO_EXTENSION", "1")
    build(checkout, "bdist_wheel")
    (wheel,) = (checkout / "dist").glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_the_source_archive_holds_all_that_a_build_needs(checkout):
    build(checkout, "sdist")
    (archive,) = (checkout / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(checkout / "unpacked")
    (unpacked,) = (checkout / "unpacked").iterdir()
    build(unpacked, "build")
    assert found(unpacked / "build") == {"_cpu.so": "", "_C_2_13.abi3.so": "2.13.0"}
    headers = [path.relative_to(ROOT) for path in (ROOT / "csrc").rglob("*.h")]
    assert [path for path in headers if not (unpacked / path).exists()] == []


def test_a_build_that_cannot_begin_leaves_what_is_there(checkout, monkeypatch):
    build(checkout, "build_ext", "--inplace")
    before = found(checkout)
    assert before
    monkeypatch.setenv("CXX", "no-such-compiler")
    done = run(checkout, "build_ext", "--inplace")
    assert done.returncode != 0 and "no C++ compiler (no-such-compiler)" in done.stderr
    assert found(checkout) == before
