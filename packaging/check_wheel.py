"""What is in a wheel, and whether every torch can use it. A part of `make wheel`."""

import re
import subprocess
import tempfile
import zipfile
from pathlib import Path

LARGEST = 30e6
# What a library may be linked against, the glue also to torch and the kernels.
SYSTEM = r"lib(c|m|dl|rt|pthread|gcc_s|stdc\+\+)\.so|ld-linux"
GLUE_LINKED = rf"_cpu\.so|lib(c10|torch|torch_cpu|torch_python)\.so|{SYSTEM}"
# Symbols of Python and of the OpenMP that torch brings.
ELSEWHERE = r"_?Py|GOMP_|omp_"


def symbols(which: str, *paths: Path) -> set[str]:
    """Of what nm calls "defined" or "undefined", but for what need not be there."""
    command = ["nm", "--dynamic", f"--{which}-only", *paths]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"^[ \da-f]* (\w) (\S+)$", text, re.MULTILINE)
    return {name for kind, name in found if which == "defined" or kind == "U"}


def needed(path: Path) -> set[str]:
    command = ["readelf", "--dynamic", path]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r"NEEDED.*\[(.*)\]", text))


def missing_symbols(glue: Path, torch: Path) -> list[str]:
    """Symbols that its torch does not have. Python would miss them only where they are used."""
    # The C and C++ libraries' have versions, which the linker has seen to.
    wanted = {name for name in symbols("undefined", glue) if "@" not in name}
    there = symbols("defined", glue.with_name("_cpu.so"), *(torch / "lib").glob("*.so"))
    missing = wanted - {name.split("@")[0] for name in there}
    return [
        f"{glue.name}: torch {torch.name} has no {name}"
        for name in sorted(missing)
        if not re.match(ELSEWHERE, name)
    ]


def check(wheel: Path, torches: list[Path]) -> list[str]:
    """Prints what is in the wheel, and returns what is wrong with it."""
    faults = []
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.1f} MB")
    if size > LARGEST:
        faults.append(f"it is larger than {LARGEST / 1e6:.0f} MB")
    if not re.fullmatch(r"adamem_fused-[^-]+-cp310-abi3-manylinux_2_28_\w+\.whl", wheel.name):
        faults.append("its name is not that of a wheel for Python 3.10, glibc 2.28 and newer ones")

    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        others = []
        for info in archive.infolist():
            if info.filename.endswith(".so"):
                packed, whole = info.compress_size / 1e6, info.file_size / 1e6
                print(f"  {info.filename:<30} {packed:6.2f} MB, unpacked {whole:6.2f} MB")
            else:
                others.append(info.compress_size / 1e6)
        print(f"  {f'{len(others)} other files':<30} {sum(others):6.2f} MB")
        archive.extractall(folder)
        libraries = {path.name: path for path in Path(folder, "adamem_fused").glob("*.so")}
        glue = {f"_C_{'_'.join(root.name.split('.')[:2])}.abi3.so": root for root in torches}
        expected = {"_cpu.so", "_cuda.so", *glue}
        for name in sorted(expected ^ libraries.keys()):
            faults.append(f"{name} {'is missing' if name in expected else 'was not expected'}")
        for name, path in sorted(libraries.items()):
            allowed = GLUE_LINKED if name in glue else SYSTEM
            unexpected = [other for other in needed(path) if not re.match(allowed, other)]
            faults += [f"{name} is linked against {other}" for other in sorted(unexpected)]
            if name in glue:
                faults += missing_symbols(path, glue[name])
    return faults
