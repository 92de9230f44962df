"""Makes the wheel and the source archive that it is built from, in dist. `make wheel`.

The wheel is for every Python from 3.10 on, and holds a glue of each torch minor: for a new one, add
it to TORCHES. It takes a Debian or Ubuntu machine with g++, nvcc 13 and mmdebstrap; what else is
needed is fetched into build, 4 GB. The wheel is of this machine's kind, x86_64 or aarch64.

It is linked against the C library of an old Debian, so that it runs wherever torch's own wheels do.
Where the machine's own is that old, as in an image of manylinux_2_28, --own-libraries takes that.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import check_wheel
import torch_headers

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build"
DIST = ROOT / "dist"
SYSROOT = BUILD / "sysroot"

# A minor's patch releases are alike in what the glue uses.
TORCHES = ["2.9.1", "2.10.0", "2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0"]
# The code of a major version's first minor runs on its later ones; those to come compile the PTX of
# the last. Only machines with aarch64 have 11.
ARCHITECTURES = ["7.5", "8.0", "9.0", "10.0", "12.0"]
if platform.machine() == "aarch64":
    ARCHITECTURES.insert(-1, "11.0")


def run(*command: object, **options: object) -> None:
    subprocess.run([str(part) for part in command], check=True, **options)


def fetch_sysroot() -> None:
    """The headers and libraries of Debian 11's C library, which is glibc 2.31."""
    if SYSROOT.exists():
        return
    unfinished = SYSROOT.with_name("sysroot-unfinished")
    packages = "--include=libc6-dev,linux-libc-dev"
    run("mmdebstrap", "--variant=extract", packages, "bullseye", unfinished)
    # Links to absolute paths would lead out of it.
    for path in unfinished.rglob("*"):
        if path.is_symlink() and path.readlink().is_absolute():
            target = unfinished / path.readlink().relative_to("/")
            path.unlink()
            path.symlink_to(os.path.relpath(target, path.parent))
    unfinished.rename(SYSROOT)


def flags_of_sysroot() -> list[str]:
    """g++'s own folder keeps the C++ library."""
    command = ["g++", "-print-multiarch"]
    triple = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    return [f"--sysroot={SYSROOT}", f"-B{SYSROOT}/usr/lib/{triple}"]


def build(flags: list[str]) -> Path:
    """Builds the source archive, and of what is in it the wheel, which it returns."""
    folder = BUILD / "wheel"
    shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder, cwd=ROOT)
    (archive,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(archive, folder)
    env = {
        **os.environ,
        "CXX": " ".join(["g++", *flags, "-include", str(ROOT / "packaging" / "older_libraries.h")]),
        # Smallest, at the cost of some milliseconds at the first launch.
        "NVCC_APPEND_FLAGS": f"--compress-mode=size -Xcompiler={','.join(['-Wall', *flags])}",
        "ADAMEM_TORCHES": os.pathsep.join(str(torch_headers.FOLDER / each) for each in TORCHES),
        "ADAMEM_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": ";".join(ARCHITECTURES),
    }
    command = ["setup.py", "build_ext", f"--parallel={os.cpu_count()}", "bdist_wheel"]
    sources = folder / archive.name.removesuffix(".tar.gz")
    run(sys.executable, *command, "--dist-dir", folder, cwd=sources, env=env)
    shutil.copy(archive, DIST)
    (wheel,) = folder.glob("*.whl")
    return wheel


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--own-libraries", action="store_true", help="link against this machine's")
    options = parser.parse_args()
    needed = {"g++": True, "nvcc": "CUDA_HOME" not in os.environ}
    needed["mmdebstrap"] = not options.own_libraries
    missing = [tool for tool, asked in needed.items() if asked and shutil.which(tool) is None]
    if missing:
        sys.exit(f"make wheel needs {' and '.join(missing)}: see RELEASING.md")
    for version in TORCHES:
        torch_headers.fetch(version, python="3.11", machine=platform.machine())
    if not options.own_libraries:
        fetch_sysroot()
    shutil.rmtree(DIST, ignore_errors=True)
    DIST.mkdir()
    built = build([] if options.own_libraries else flags_of_sysroot())
    # It finds nothing to repair, but looks whether the wheel may be called by this name.
    tools = Path(sys.executable).parent
    env = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}"}
    command = ["repair", f"--plat=manylinux_2_28_{platform.machine()}", "--only-plat"]
    command += ["--exclude=libc10.so", "--exclude=libtorch*.so", "--wheel-dir", DIST]
    run(tools / "auditwheel", *command, built, env=env)
    (wheel,) = DIST.glob("*.whl")
    run(tools / "abi3audit", "--strict", wheel)
    faults = check_wheel.check(wheel, [torch_headers.FOLDER / version for version in TORCHES])
    for fault in faults:
        print(f"fault: {fault}")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
