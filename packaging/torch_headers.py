"""Fetches what the wheel's glue is compiled and linked against: each torch's headers and libraries.

    python packaging/torch_headers.py 2.9.1 2.15.0

puts them into build/torch/<version>/include and lib. They come out of torch's own wheel, which is
one of many hundred MB, mostly CUDA, and is deleted again. What is there already is left as it is.
Any Python's wheel will do, as the glue knows nothing of torch's part that is tied to a Python.
"""

import argparse
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "build" / "torch"
LIBRARIES = [f"torch/lib/lib{name}.so" for name in ("c10", "torch", "torch_cpu", "torch_python")]


def fetch(version: str, python: str, machine: str) -> None:
    target = FOLDER / version
    if target.exists():
        print(f"{target} is there")
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    # Under another name until it is whole.
    with tempfile.TemporaryDirectory(dir=FOLDER) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--only-binary=:all:", f"--platform=manylinux_2_28_{machine}"]
        command += [f"--python-version={python}", f"--dest={folder}", f"torch=={version}"]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if name.startswith("torch/include/") or name in LIBRARIES:
                    archive.extract(name, folder)
        shutil.move(Path(folder) / "torch", target)
    print(f"{target} was fetched")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", metavar="VERSION")
    parser.add_argument("--python", default="3.11", help="whose wheel is taken (3.11)")
    parser.add_argument(
        "--machine", default=platform.machine(), help="x86_64 or aarch64 (this one's)"
    )
    options = parser.parse_args()
    for version in options.versions:
        fetch(version, options.python, options.machine)


if __name__ == "__main__":
    main()
