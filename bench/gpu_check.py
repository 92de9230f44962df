"""Checks and times the GPU backends on a machine with a GPU, in one go.

    python -m bench.gpu_check

Runs from the checkout, with nothing installed but torch, triton, pytest and, for the cuda
backend, nvcc, and without a network: compiles the CUDA kernels; every test marked `gpu`; a
captured step replayed against steps that were not; two runs bit for bit; small steps under
compute-sanitizer where that is installed; and step times against
torch.optim.AdamW(fused=True) on the same tensors. Writes tests.log, the sanitizer's logs,
gpu.json with every sample and, where matplotlib is there, gpu.png to --out, to $OUT, or to
bench/results/<device name>/. The table comes last.

Exit status: 0 if everything that was checked holds, 1 if something does not, 2 without a GPU.
Ratios that miss their target are marked, and fail nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.optim import Optimizer

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS, cuda_library
from bench.arguments import output_folder
from bench.environment import environment
from bench.gpu_cases import Case, cases

ROOT = Path(__file__).parent.parent
TEST_SECONDS = 240
SANITIZER_SECONDS = 90
PAIRS = 7  # of samples, in turns
SAMPLE_SECONDS = 0.5

# Of a float32 parameter and step of AM-AdamW, in two passes from memory; AdamW's one is 28.
BYTES = 44


@dataclass
class Timing:
    """Seconds a step, paired samples: until the device is done, and until step() returned."""

    case: str
    backend: str
    target: float | None
    numel: int
    step: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    torch_step: list[float] = field(default_factory=list)
    torch_host: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.step, self.torch_step, strict=True)]

    @property
    def bandwidth(self) -> float:
        """Bytes a second, counted as two passes from memory."""
        return self.numel * BYTES / statistics.median(self.step)


def gpu_backends(device: torch.device) -> dict[str, str | None]:
    """The fused backends that are not the CPU's, and why one is missing."""
    return {
        name: backend.unavailable(device)
        for name, backend in BACKENDS.items()
        if backend.fused and name != "cpu"
    }


# ---- checks ---------------------------------------------------------------------------


def run_tests(log: Path) -> str:
    """Runs the tests marked gpu; what came of them."""
    tests = (ROOT / "tests").glob("test_*.py")
    files = sorted(str(path) for path in tests if "pytest.mark.gpu" in path.read_text())
    # Without conftest.py, which needs packages that such a machine may not have.
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "--noconftest", "-q", *files]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=TEST_SECONDS
        )
    except subprocess.TimeoutExpired as error:
        log.write_bytes(error.stdout or b"")
        return f"failed: not done after {TEST_SECONDS} s"
    log.write_text(done.stdout + done.stderr)
    last = (done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or [""])[-1]
    return last if done.returncode == 0 else f"failed: {last}"


def sanitizer() -> str | None:
    """compute-sanitizer of PATH, or beside the nvcc that compiles the kernels."""
    nvcc = cuda_library.find_nvcc()
    beside = Path(nvcc).resolve().with_name("compute-sanitizer") if nvcc else None
    found = shutil.which("compute-sanitizer")
    return found or (str(beside) if beside and beside.exists() else None)


def sanitize(folder: Path) -> dict[str, str]:
    """What compute-sanitizer finds in a few small steps of the cuda backend."""
    program = sanitizer()
    if program is None:
        return {"compute-sanitizer": "skipped: it is not installed"}
    results = {}
    for tool in ("memcheck", "racecheck"):
        command = [program, "--tool", tool, "--error-exitcode", "9"]
        command += [sys.executable, "-m", "bench.gpu_sanitize"]
        with (folder / f"{tool}.log").open("w") as log:
            try:
                done = subprocess.run(
                    command, cwd=ROOT, stdout=log, stderr=log, timeout=SANITIZER_SECONDS
                )
                result = "no errors" if done.returncode == 0 else f"failed: see {tool}.log"
            except subprocess.TimeoutExpired:
                result = f"failed: not done after {SANITIZER_SECONDS} s"
        results[f"compute-sanitizer {tool}"] = result
    return results


def train(backend: str, cls: type[AMAdamW] | type[AMSGD], captured: bool) -> list[Tensor]:
    """Ten steps on random gradients, while lr, grad_scale and found_inf change; the result."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((1000, 300), (77,), (), (5, 5, 5))
    params = [torch.randn(s, generator=generator).cuda().requires_grad_() for s in shapes]
    lr = torch.tensor(0.01, device="cuda")
    optimizer = cls(params, lr=lr, backend=backend, capturable=True)
    optimizer.grad_scale = torch.ones((), device="cuda")
    optimizer.found_inf = torch.zeros((), device="cuda")
    for param in params:
        param.grad = torch.ones_like(param)
    step: Callable[[], object] = optimizer.step
    for k in range(10):
        for param in params:
            assert param.grad is not None
            noise = torch.randn(param.shape, generator=generator).cuda()
            param.grad.copy_(param.detach() + noise)
        lr.fill_(0.01 * (k % 4))
        optimizer.grad_scale.fill_(2.0**k)
        optimizer.found_inf.fill_(float(k == 6))
        step()
        if captured and k == 0:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                optimizer.step()
            step = graph.replay
    state = [value for param in params for value in optimizer.state[param].values()]
    return [*(param.detach() for param in params), *state]


def check_bits(backend: str) -> dict[str, str]:
    """Whether two runs, and a run and its replay as a graph, give the same bits."""
    results = {}
    for cls in (AMAdamW, AMSGD):
        first = train(backend, cls, captured=False)
        for name, captured in (("two runs", False), ("graph replay", True)):
            second = train(backend, cls, captured)
            same = all(map(torch.equal, first, second))
            results[f"{cls.__name__} {backend}, {name}"] = (
                "same bits" if same else "failed: other bits"
            )
    return results


# ---- times ----------------------------------------------------------------------------


def time_steps(optimizer: Optimizer, steps: int) -> tuple[float, float]:
    """Seconds a step until the device is done, and until step() returned."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        optimizer.step()
    host = time.perf_counter() - start
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / steps, host / steps


def measure(case: Case, backend: str) -> Timing:
    """Both optimizers on the same tensors, in turns; which begins changes from pair to pair."""
    params = [torch.randn(shape, device="cuda").requires_grad_() for shape in case.shapes]
    for param in params:
        param.grad = torch.randn_like(param)
    # So small that the values stay what they are.
    ours = AMAdamW(params, lr=1e-9, backend=backend)
    theirs = torch.optim.AdamW(params, lr=1e-9, fused=True)
    steps = {}
    for optimizer in (ours, theirs):
        time_steps(optimizer, 3)  # compiles, makes the state
        steps[optimizer] = max(3, round(SAMPLE_SECONDS / time_steps(optimizer, 3)[0]))
    timing = Timing(case.name, backend, case.targets.get(backend), case.numel)
    lists = {ours: (timing.step, timing.host), theirs: (timing.torch_step, timing.torch_host)}
    for pair in range(PAIRS):
        for optimizer in (ours, theirs) if pair % 2 else (theirs, ours):
            for samples, sample in zip(
                lists[optimizer], time_steps(optimizer, steps[optimizer]), strict=True
            ):
                samples.append(sample)
    return timing


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of copies of 1 GiB on the device."""
    source = torch.ones(2**28, device="cuda")
    target = torch.empty_like(source)
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 2 * source.nbytes / statistics.median(times)


# ---- report ---------------------------------------------------------------------------


def write_png(timings: list[Timing], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1.5 + 0.5 * len(timings)), layout="constrained")
    axes = figure.subplots()
    for row, timing in enumerate(timings):
        axes.barh(row, statistics.median(timing.ratios), color="tab:blue")
        axes.plot(timing.ratios, [row] * PAIRS, "k.", markersize=4)
        if timing.target is not None:
            axes.plot([timing.target] * 2, [row - 0.4, row + 0.4], "tab:red")
    axes.set_yticks(range(len(timings)), [f"{t.case}\n{t.backend}" for t in timings])
    axes.set_xlabel("step time over torch.optim.AdamW(fused=True)'s; red: the target")
    axes.set_title(torch.cuda.get_device_name())
    figure.savefig(path, dpi=120)


def format_table(timings: list[Timing], checks: dict[str, str], copy: float) -> str:
    lines = [f"{'':34s} {'ms/step':>9s} {'torch':>9s} {'ratio':>7s} {'target':>7s} {'of copy':>8s}"]
    for t in timings:
        ratio = statistics.median(t.ratios)
        target = "" if t.target is None else f"{t.target:.2f}"
        missed = t.target is not None and ratio > t.target
        lines.append(
            f"{t.case + ', ' + t.backend:34s} {1e3 * statistics.median(t.step):9.3f} "
            f"{1e3 * statistics.median(t.torch_step):9.3f} {ratio:7.2f} {target:>7s} "
            f"{t.bandwidth / copy:8.0%}{'  missed' if missed else ''}"
        )
    lines += [f"{name}: {result}" for name, result in checks.items()]
    lines.append(f"copy bandwidth: {copy / 1e9:,.0f} GB/s on {torch.cuda.get_device_name()}")
    return "\n".join(lines)


def default_folder() -> Path:
    if "OUT" in os.environ:
        return Path(os.environ["OUT"])
    name = re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    return ROOT / "bench" / "results" / name


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=output_folder, help="folder for logs, JSON and PNG")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            f"gpu_check: no GPU: torch {torch.__version__} sees none. It takes a machine with an "
            "NVIDIA GPU, nvcc, and a torch that was built for it (2.11 or newer, Triton 3.6 or "
            "newer).",
            file=sys.stderr,
        )
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    # Here, in the tests and under the sanitizer: the kernels as this checkout has them.
    os.environ.setdefault("ADAMEM_CUDA_JIT", "1")
    folder = options.out or output_folder(str(default_folder()))
    to_time = cases(torch.cuda.mem_get_info()[0])
    missing = {name: reason for name, reason in gpu_backends(device).items() if reason}
    there = [name for name in gpu_backends(device) if name not in missing]
    for name, reason in missing.items():
        print(f"without the {name} backend: {reason}")

    print("Running the tests marked gpu", flush=True)
    checks = {"tests": run_tests(folder / "tests.log")}
    if "cuda" in there:
        print("Running small steps under compute-sanitizer", flush=True)
        checks |= sanitize(folder)
    timings: list[Timing] = []
    for backend in there:
        print(f"Checking {backend}: two runs, graph replay", flush=True)
        try:
            checks |= check_bits(backend)
        except Exception as error:
            checks[f"{backend}, bits and graph"] = f"failed: {error!r}"
        for case in to_time:
            torch.cuda.empty_cache()
            print(f"Timing {backend}: {case.name}", flush=True)
            try:
                timings.append(measure(case, backend))
            except Exception as error:
                checks[f"{backend}, {case.name}"] = f"failed: {error!r}"
    copy = copy_bandwidth()

    results = {
        "environment": environment() | {"device": torch.cuda.get_device_name()},
        "missing": missing,
        "checks": checks,
        "copy_bandwidth": copy,
        "timings": [asdict(timing) for timing in timings],
    }
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    try:
        write_png(timings, folder / "gpu.png")
    except ImportError:
        print("without gpu.png: matplotlib is not installed")
    print(f"Written to {folder}\n\n{format_table(timings, checks, copy)}")
    failed = not there or any(result.startswith("failed") for result in checks.values())
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
