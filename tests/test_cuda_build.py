"""Every CUDA source compiled with nvcc, with no GPU present, and what came out of it."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import setuptools

from adamem_fused.backends import cuda, cuda_library

ROOT = Path(__file__).parent.parent
NVCC = cuda_library.find_nvcc()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

SOURCES = [source.stem for source in cuda_library.sources()]
ARCHITECTURES = cuda_library.DEFAULT_ARCHITECTURES


def targets(*sources: str):
    """norms, which takes seconds to compile, for one architecture in every run; the rest, whose
    sources g++ compiles for test_cuda.py, for make test-nvcc."""
    return pytest.mark.parametrize(
        "source, arch",
        [
            pytest.param(
                source, arch, marks=() if source == "norms" and arch == 90 else pytest.mark.nvcc
            )
            for source in sources
            for arch in ARCHITECTURES
        ],
    )


CONFIG = {
    name: int(value)
    for name, value in re.findall(
        r"\b(k\w+) = (\d+)[,;]", (cuda_library.SOURCES / "config.h").read_text()
    )
}
REGISTERS = 65536  # of a multiprocessor, from 7.5 to 10.0

# Accesses to each optimizer's tensors, by the bytes of param, grad and memory.
MEMORIES = {"AdamW": 2, "SGD": 1}
STORED = {
    "float, float, float, float": (4, 4, 4),
    "double, double, double, double": (8, 8, 8),
    "float, __nv_bfloat16, __nv_bfloat16, float": (2, 2, 4),
    "float, __half, __half, float": (2, 2, 4),
    "float, __nv_bfloat16, float, float": (2, 4, 4),
}
# What is stored in few bits.
LOW = [
    "float, float, float, Rounded",
    "float, float, float, Codes",
    "float, Param16, __nv_bfloat16, float",
    "float, Param16, __nv_bfloat16, Rounded",
    "float, Param16, __nv_bfloat16, Codes",
]


class Kernel(NamedTuple):
    name: str  # demangled
    registers: int
    stack: int
    spills: int


class Built(NamedTuple):
    object: Path
    kernels: list[Kernel]


def demangled(text: str) -> str:
    text = subprocess.run(
        ["c++filt"], input=text, capture_output=True, text=True, check=True
    ).stdout
    return text.replace("am::cuda::", "").replace("(anonymous namespace)::", "")


def read_report(report: str) -> list[Kernel]:
    """The kernels of nvcc's resource report."""
    found = re.findall(
        r"Compiling entry function '(.+?)' for.*?"
        r"Function properties for [^\n]*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads\n.*?Used (\d+) registers",
        demangled(report),
        re.DOTALL,
    )
    return [
        Kernel(name, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in found
    ]


class Objects(dict[tuple[str, int], Built]):
    """Of each source and architecture: all that take long are compiled when one is asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __missing__(self, target: tuple[str, int]) -> Built:
        source, arch = target
        sources = [source] if source == "norms" else [name for name in SOURCES if name != "norms"]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            found = pool.map(lambda source: self.compile(source, arch), sources)
            self.update(zip([(source, arch) for source in sources], found, strict=True))
        return self[target]

    def compile(self, source: str, arch: int) -> Built:
        path = self.folder / f"{source}-{arch}.o"
        # Not a user's flags: another compiler's new warning must not cost the backend.
        flags = [*cuda_library.FLAGS, "-Werror=all-warnings", "-Xcompiler=-Werror"]
        flags += [f"-arch=sm_{arch}", "-c", "-Xptxas=-v"]
        command = [NVCC, *flags, "-o", path, cuda_library.SOURCES / f"{source}.cu"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-4000:]
        return Built(path, read_report(done.stderr))


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Objects:
    return Objects(tmp_path_factory.mktemp("objects"))


def planned_blocks(name: str) -> int:
    """The blocks of a kernel that a multiprocessor is to hold."""
    if "squares_kernel" in name:
        return CONFIG["kBlocksNorm"]
    if "AnyType" in name or "<double" in name or "Codes" in name:
        return CONFIG["kBlocksWide"]
    if "__half" in name or "__nv_bfloat16" in name or "Rounded" in name:
        return CONFIG["kBlocks16Bit"]
    return CONFIG["kBlocksFloat"] if "<float" in name else 1


@needs_nvcc
@targets(*SOURCES)
def test_kernels_compile_without_spills_for_the_planned_occupancy(built, source, arch):
    kernels = built[source, arch].kernels
    # begin, finish and rows for each combination of dtypes and for two that are general; prepare
    # and beta. Squares for each dtype, and their sums.
    optimizers = 3 * (len(STORED) + 2 + len(LOW)) + 2
    assert len(kernels) == {"rows": 1, "norms": 4 + 1}.get(source, optimizers)
    for kernel in kernels:
        # CUDA's power of doubles has a frame of no bytes, and is reported in between.
        assert (kernel.stack, kernel.spills) == (0, 0), kernel
        blocks = planned_blocks(kernel.name)
        threads = CONFIG["kThreads"] * blocks
        if "rows_kernel<" in kernel.name and blocks == CONFIG["kBlocks16Bit"]:
            threads = 640  # see rows_threads in row_kernel.h
        allowed = REGISTERS // threads
        assert 0 < kernel.registers <= allowed, kernel


def cuobjdump() -> Path:
    triton = pytest.importorskip("triton", reason="triton, which has cuobjdump, is not installed")
    (path,) = Path(triton.__file__).parent.rglob("bin/cuobjdump")
    return path


def accesses(optimizer: str, kernel: str, stored: tuple[int, int, int]) -> list[str]:
    """The loads and stores of several elements that a kernel is to have in its machine code.

    A thread's elements are 16 bytes of the smallest type; those that lie side by side, which are
    one access, 16 bytes of the largest.
    """
    spans = max(stored) // min(stored)
    param, grad, memory = ([8 * size * 16 // max(stored)] * spans for size in stored)
    memory *= MEMORIES[optimizer]
    # AM-AdamW's guess and its sums are there twice, with weight decay and without, where the sums
    # leave out the parameter; so are AM-SGD's sums and its update, which reads it in either case.
    # begin has what finish has, too: for tensors of one chunk.
    everything = param + grad + memory
    if kernel == "rows":
        # The sums, alone or with what is held, and the update, alone or of what is held: AM-SGD's
        # is there with weight decay and without.
        updates = 1 if optimizer == "AdamW" else 2
        written = memory[: (MEMORIES[optimizer] - 1) * spans] + memory[:spans] + param
        found = [f"LDG {bits} EF" for bits in (1 + updates) * everything]
        found += [f"LDG {bits} STRONG" for bits in everything]
        found += [f"STG {bits} EF" for bits in updates * (param + memory) + written]
        return sorted(found)
    loads, stores = 2 * everything, 2 * (param + memory)
    if optimizer == "AdamW":
        stores = 2 * param + memory + memory[:spans]  # the update, and the repair
    found = [f"LDG {bits} EF" for bits in loads] + [f"STG {bits} EF" for bits in stores]
    if kernel == "begin":
        found += [f"LDG {bits} STRONG" for bits in 2 * (grad + memory) + param]
        if optimizer == "AdamW":
            found += [f"LDG {bits} EF" for bits in 2 * everything]
            found += [f"STG {bits} EF" for bits in 2 * (param + memory)]
    return sorted(found)


@needs_nvcc
@targets("adamw", "sgd")
def test_aligned_tensors_are_accessed_up_to_16_bytes_at_a_time(built, source, arch):
    """Past L1 where only sums are taken, and evicted first where elements are updated."""
    optimizer = {"adamw": "AdamW", "sgd": "SGD"}[source]
    command = [cuobjdump(), "-sass", built[source, arch].object]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = 0
    for function in demangled(sass).split("Function : ")[1:]:
        match = re.match(rf"void (\w+)_kernel<{optimizer}<(.+?)> >", function)
        if match is None or match[2] not in STORED:
            continue
        found = re.findall(r"(LDG|STG)\.E\.(?:(\d+)\.(STRONG)|(EF)\.(\d+))", function)
        actual = sorted(f"{name} {a or b} {x or y}" for name, a, x, y, b in found)
        assert actual == accesses(optimizer, match[1], STORED[match[2]]), match[0]
        seen += 1
    assert seen == 3 * len(STORED)


@needs_nvcc
@targets("norms")
def test_squares_are_read_16_bytes_at_a_time_and_two_ahead(built, source, arch):
    """Past L1, as the step comes to them next."""
    command = [cuobjdump(), "-sass", built[source, arch].object]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    seen = 0
    for function in demangled(sass).split("Function : ")[1:]:
        match = re.match(r"void squares_kernel<(\w+)>", function)
        if match is None:
            continue
        # Two and one, and again where the squares leave the range.
        loops = 1 if match[1] == "double" else 2
        assert len(re.findall(r"LDG\.E\.128\.STRONG", function)) == 3 * loops, match[0]
        assert re.search(r"LDG\.E\.128\.STRONG[^\n]*\n(?:[^\n]*\n)??[^\n]*LDG\.E\.128", function)
        seen += 1
    assert seen == 4


@needs_nvcc
@pytest.mark.nvcc
def test_the_library_needs_no_torch_and_says_what_goes_wrong(built, tmp_path):
    path = tmp_path / "_cuda.so"
    objects = [built[source, 90].object for source in ("adamw", "norms", "rows", "sgd")]
    subprocess.run([NVCC, "-shared", "-cudart=static", "-o", path, *objects], check=True)
    linked = subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout
    assert "cudart" not in linked and "torch" not in linked and "python" not in linked
    library = ctypes.CDLL(str(path))
    assert library.adamem_chunk() == CONFIG["kChunk"]
    library.adamem_error.restype = ctypes.c_char_p
    step = cuda._Step(tensors=1, units=1, device=1000)
    error = library.adamem_adamw_prepare(ctypes.byref(step), None)
    assert error != 0
    message = library.adamem_error(error).decode()
    assert re.search("device ordinal|driver|no CUDA-capable device", message), message
    # On a device that is not there, or without a driver.
    compiled, driver = ctypes.c_int(), ctypes.c_int()
    assert library.adamem_check(1000, ctypes.byref(compiled), ctypes.byref(driver)) != 0
    assert compiled.value >= 12000


# ---- what to compile for ----------------------------------------------------------------


def fake_nvcc(folder: Path, *architectures: int) -> str:
    path = folder / "nvcc"
    listed = " ".join(f"compute_{a}" for a in architectures)
    path.write_text(f"#!/bin/sh\necho {listed}\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    "asked, numbers",
    [("9.0", [90]), ("8.0;9.0a+PTX", [80, 90]), ("10.0 8.6", [86, 100]), ("12.0+PTX", [120])],
)
def test_architectures_are_those_of_torch_cuda_arch_list(monkeypatch, tmp_path, asked, numbers):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", asked)
    assert cuda_library.architectures(fake_nvcc(tmp_path, 80)) == numbers


def test_a_bad_torch_cuda_arch_list_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Hopper")
    with pytest.raises(ValueError, match="Invalid TORCH_CUDA_ARCH_LIST: 'Hopper'"):
        cuda_library.architectures(fake_nvcc(tmp_path, 80))


@pytest.mark.parametrize(
    "devices, known, numbers",
    [
        ([], [75, 80, 90, 100], [75, 80, 90, 100]),
        ([], [75, 80, 90], [75, 80, 90]),
        ([90, 90], [75, 80, 90, 100], [90]),
        ([70, 75, 80], [70, 75, 80, 90], [75, 80]),
        # Newer than nvcc knows: the PTX of the newest that it does.
        ([120], [75, 80, 90], [90]),
        (["[N/A]"], [75, 80, 90], [75, 80, 90]),
    ],
)
def test_architectures_are_those_of_the_devices_at_hand(
    monkeypatch, tmp_path, devices, known, numbers
):
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    smi = tmp_path / "nvidia-smi"
    lines = [device if isinstance(device, str) else device / 10 for device in devices]
    smi.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert cuda_library.architectures(fake_nvcc(tmp_path, *known)) == numbers


def test_ptx_of_the_newest_is_in_it():
    assert cuda_library.targets([80, 90]) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-gencode=arch=compute_90,code=compute_90",
    ]


# ---- setup.py ---------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch, tmp_path):
    """setup.py, with a torch that is only a version.py, and without nvcc."""
    monkeypatch.setattr(setuptools, "setup", lambda **options: None)
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "find_torch", lambda: tmp_path)
    monkeypatch.setattr(module.cuda_library, "find_nvcc", lambda: None)
    monkeypatch.delenv("ADAMEM_CUDA", raising=False)
    return module


CPU_TORCH = "cuda: Optional[str] = None\nhip: Optional[str] = None\n"
CUDA_TORCH = "cuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"
OLD_CUDA_TORCH = "cuda = '12.8'\nhip = None\n"


@pytest.mark.parametrize(
    "asked, nvcc, torch_version, reason",
    [
        (None, "nvcc", CUDA_TORCH, None),
        (None, "nvcc", OLD_CUDA_TORCH, None),
        (None, "nvcc", CPU_TORCH, "torch is not a CUDA build"),
        (None, None, CUDA_TORCH, "no nvcc was found"),
        ("0", "nvcc", CUDA_TORCH, "ADAMEM_CUDA=0"),
        ("1", "nvcc", CPU_TORCH, None),
    ],
)
def test_cuda_is_compiled_where_nvcc_and_a_cuda_torch_are(
    build, monkeypatch, tmp_path, asked, nvcc, torch_version, reason
):
    (tmp_path / "version.py").write_text(torch_version)
    monkeypatch.setattr(build.cuda_library, "find_nvcc", lambda: nvcc)
    if asked is not None:
        monkeypatch.setenv("ADAMEM_CUDA", asked)
    found = build.why_no_cuda()
    assert found == reason if reason is None else found.startswith(reason)


@pytest.mark.parametrize(
    "asked, message", [("1", "no nvcc was found"), ("yes", "Invalid ADAMEM_CUDA: 'yes'")]
)
def test_insisting_on_cuda_without_nvcc_is_an_error(build, monkeypatch, asked, message):
    monkeypatch.setenv("ADAMEM_CUDA", asked)
    with pytest.raises(SystemExit, match=message):
        build.why_no_cuda()
