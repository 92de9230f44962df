"""Installs a wheel into environments that have no compiler, and uses it there. `make wheel-test`.

    python tests/wheel dist/NAME.whl 3.10:2.9.1 3.13:2.15.0

Each environment is named by its Python and its torch, which must be one that the wheel has a glue
for. It takes pythonX.Y of PATH, or what PYTHON310, say, names; and torch as pip finds it, which
mostly is a CUDA build and takes 6 GB. Environments are kept in build/wheel-test, and the wheel is
installed anew.

In each the wheel is used as it is, and with the glue removed, as under a torch that it has none
for. The cpu backend has to give the same bits in all of them, and to go on from checkpoints of all.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "wheel-test"
# These need nothing but torch. Triton's interpreter is there where torch brought a triton for it.
ALWAYS = ["cpu", "foreach", "reference"]


@dataclass
class Environment:
    python: str
    torch: str
    digests: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"Python {self.python}, torch {self.torch}"

    @property
    def folder(self) -> Path:
        return FOLDER / f"python-{self.python}-torch-{self.torch}"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self, *arguments: object, **variables: str) -> str:
        """Python's output, in a process that finds no compiler and nothing of the sources."""
        bin_folder = self.folder / "bin"
        env = {"PATH": str(bin_folder), "CC": "/bin/false", "CXX": "/bin/false", **variables}
        env |= {key: os.environ[key] for key in os.environ if key.startswith(("PIP_", "SSL_"))}
        command = [bin_folder / "python", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True)
        if done.returncode != 0:
            sys.exit(f"{self.name}: {arguments}\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout

    def make(self) -> None:
        made = self.folder / "made"
        if made.exists():
            return
        shutil.rmtree(self.folder, ignore_errors=True)
        interpreter = os.environ.get(
            f"PYTHON{self.python.replace('.', '')}", f"python{self.python}"
        )
        subprocess.run([interpreter, "-m", "venv", self.folder], check=True)
        # For Triton's interpreter, of which that of 3.6 knows no newer one.
        self.run("-m", "pip", "install", "--quiet", f"torch=={self.torch}", "numpy<2.4")
        made.touch()

    def install(self, wheel: Path) -> float:
        self.run("-m", "pip", "uninstall", "--quiet", "--yes", "adamem-fused")
        start = time.perf_counter()
        self.run("-m", "pip", "install", "--quiet", "--no-index", wheel)
        return time.perf_counter() - start

    def site_packages(self) -> Path:
        return Path(
            self.run("-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
        )


def example() -> str:
    """The README's first program."""
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1]


def available(report: str) -> set[str]:
    """The backends that `python -m adamem_fused` finds for the CPU."""
    return set(re.findall(r"^  (\w+) +available", report.split("\n\n")[1], re.MULTILINE))


def use(environment: Environment, before: list[Environment], has_glue: bool) -> None:
    """The example, the report, and steps that end with the same bits as `before`."""
    script = environment.folder / "steps.py"
    shutil.copy(ROOT / "tests" / "wheel" / "steps.py", script)
    environment.run("-I", "-c", example())
    report = environment.run("-I", "-m", "adamem_fused")
    for name in ALWAYS:
        assert name in available(report), report
    assert ("called by ctypes" in report) != has_glue, report
    print(re.sub("^", "    ", report.strip(), flags=re.MULTILINE))
    arguments = [script, "--load", *(other.checkpoints for other in before)]
    if has_glue:
        environment.checkpoints.mkdir(exist_ok=True)
        arguments += ["--save", environment.checkpoints]
    interpreted = "triton" in available(environment.run("-m", "adamem_fused", TRITON_INTERPRET="1"))
    names = [*ALWAYS[1:], *(["triton"] if interpreted else [])]
    output = environment.run(
        "-I", *arguments, "--backends", *names, **({"TRITON_INTERPRET": "1"} if interpreted else {})
    )
    found = json.loads(output.splitlines()[-1])
    assert found["glue"] == has_glue, found
    assert found["chosen"] == "cpu", found
    print(f"    steps of cpu, {', '.join(names)}; went on from {len(before)} others' checkpoints")
    environment.digests = environment.digests or found["digests"]
    for other in [environment, *before]:
        differing = {
            case for case in found["digests"] if found["digests"][case] != other.digests[case]
        }
        if differing:
            sys.exit(f"{environment.name} gives other bits than {other.name}: {sorted(differing)}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("wheel", type=Path)
    parser.add_argument("environments", nargs="+", metavar="PYTHON:TORCH")
    options = parser.parse_args()
    environments = [Environment(*each.split(":")) for each in options.environments]
    with tempfile.TemporaryDirectory() as folder:
        # Away from dist, or pip would take its folder for an index.
        wheel = Path(shutil.copy(options.wheel, folder))
        for i, environment in enumerate(environments):
            environment.make()
            seconds = environment.install(wheel)
            print(f"\n{environment.name}: installed in {seconds:.1f} s", flush=True)
            use(environment, environments[:i], has_glue=True)
    for environment in environments:
        print(f"\n{environment.name}, without its glue", flush=True)
        minor = "_".join(environment.torch.split(".")[:2])
        (environment.site_packages() / "adamem_fused" / f"_C_{minor}.abi3.so").unlink()
        use(environment, environments, has_glue=False)
    print("\nthe same bits in all of them")


if __name__ == "__main__":
    main()
