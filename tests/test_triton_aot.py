"""Every Triton kernel compiled ahead of time, with no GPU present, and what came out of it."""

from __future__ import annotations

import functools
import os
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: there is no compiler", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import triton as backend
from adamem_fused.triton_kernels import adamw, sgd, sums
from adamem_fused.triton_kernels.config import config_for
from adamem_fused.triton_kernels.tables import ADAMW_HYPERS

CUDA = [GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)]
HIP = GPUTarget("hip", "gfx942", 64)

# param, grad, memories and arithmetic.
DTYPES = {
    "float32": (tl.float32, tl.float32, tl.float32),
    "bfloat16": (tl.bfloat16, tl.bfloat16, tl.float32),
    "float16": (tl.float16, tl.float16, tl.float32),
    "bfloat16-float32": (tl.bfloat16, tl.float32, tl.float32),
    "float64": (tl.float64, tl.float64, tl.float64),
}
CHUNK_KERNELS = {
    "adamw_stats": {"loads": 4, "stores": 0},
    "adamw_apply": {"loads": 4, "stores": 3},
    "sgd_stats": {"loads": 3, "stores": 0},
    "sgd_apply": {"loads": 3, "stores": 2},
    # Of stats and of apply.
    "adamw_step": {"loads": 4 + 4, "stores": 3},
    "sgd_step": {"loads": 3 + 3, "stores": 2},
}
STEPS = ["adamw_step", "sgd_step"]
ARGUMENTS = {
    "addresses": "*i64",
    "layout": "*i64",
    "hypers": "*fp64",
    "lrs": "*i64",
    "chunk_tensors": "*i32",
    "items": "*i32",
    "control": "*i32",
    "partials": "*fp64",
    "totals": "*fp64",
    "rows": "*fp64",
    "coefficients": "*fp64",
    "grad_scale": "*fp32",
    "found_inf": "*fp32",
    "n": "i32",
    "chunks": "i32",
    "first_chunk": "i32",
    "last_chunk": "i32",
    "count": "i32",
}


def kernel_named(name):
    module = {"adamw": adamw, "sgd": sgd, "sum": sums}[name.split("_")[0]]
    return getattr(module, name)


@functools.cache
def compile_kernel(name, target, dtypes=DTYPES["float32"], absent=(), decay=True):
    """The kernel compiled as the backend launches it on such a device, some arguments None."""
    kernel = kernel_named(name)
    major = target.arch // 10 if target.backend == "cuda" else 9
    config = config_for(target.backend, major)
    param, grad, memory = dtypes
    constants = {
        "PARAM": param,
        "GRAD": grad,
        "EXP_AVG": memory,
        "EXP_AVG_SQ": memory,
        "MOMENTUM": memory,
        "T": memory,
        "DECAY": decay,
        **config.walk(memory is tl.float64),
        "PARTIALS": config.partials,
        "COLUMNS": ADAMW_HYPERS.value,
        **dict.fromkeys(absent),
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        arg: "constexpr" if arg in constants else ARGUMENTS[arg] for arg in kernel.arg_names
    }
    return triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants),
        target=target,
        options=(
            config.step_options(memory is tl.float64)
            if name in STEPS
            else {"num_warps": config.num_warps}
        ),
    )


def cuobjdump() -> Path:
    (path,) = Path(triton.__file__).parent.rglob("bin/cuobjdump")
    return path


def check_spills(compiled, target, tmp_path) -> None:
    if target.backend == "hip":
        # Scalar registers that are too few lie in lanes of vector registers, not in memory.
        found = r"(vgpr_spill_count|private_segment_fixed_size):\s*(\d+)"
        spills = dict(re.findall(found, compiled.asm["amdgcn"]))
        assert spills == {"vgpr_spill_count": "0", "private_segment_fixed_size": "0"}
        return
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [cuobjdump(), "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    # Spilled registers lie in local memory, on the stack.
    assert re.search(r"STACK:0 .*LOCAL:0", usage), usage


def target_name(target) -> str:
    return f"{target.backend}-{target.arch}"


# Compiling a step takes seconds: one combination with 16-bit types stands for all.
STEP_DTYPES = ["float32", "bfloat16", "float64"]


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize(
    "name, dtypes",
    [
        (name, dtypes)
        for name in CHUNK_KERNELS
        for dtypes in (STEP_DTYPES if name in STEPS else DTYPES)
    ],
)
def test_chunk_kernels_compile_without_spills(name, dtypes, target, tmp_path):
    check_spills(compile_kernel(name, target, DTYPES[dtypes]), target, tmp_path)


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize("dtypes", STEP_DTYPES)
@pytest.mark.parametrize("name, decay", [("adamw_step", True), ("sgd_step", False)])
def test_steps_without_a_scaler_compile_without_spills(name, decay, dtypes, target, tmp_path):
    """As an optimizer with its default options launches them."""
    absent = ("grad_scale", "found_inf")
    compiled = compile_kernel(name, target, DTYPES[dtypes], absent, decay)
    check_spills(compiled, target, tmp_path)


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize(
    "name, absent",
    [
        ("adamw_beta", ()),
        ("adamw_beta", ("rows", "grad_scale", "found_inf")),
        ("sgd_beta", ()),
        ("sgd_beta", ("rows", "grad_scale", "found_inf")),
        ("sum_rows", ()),
        ("sum_shared", ()),
    ],
)
def test_tensor_kernels_compile_without_spills(name, absent, target, tmp_path):
    check_spills(compile_kernel(name, target, absent=absent), target, tmp_path)


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("dtypes", [DTYPES["float32"], DTYPES["bfloat16"]], ids=["f32", "bf16"])
@pytest.mark.parametrize("name", CHUNK_KERNELS)
def test_aligned_tensors_are_accessed_16_bytes_at_a_time(name, dtypes, target):
    """Each tensor of the aligned path: a thread's 8 elements in accesses of 128 bits.

    Counted in the PTX: bytes of all 128-bit accesses, against those that the tensors have.
    """
    config = config_for("cuda", target.arch // 10)
    elements = config.block // (32 * config.num_warps)
    param, grad, memory = (dtype.primitive_bitwidth // 8 for dtype in dtypes)
    memories = 2 if name.startswith("adamw") else 1
    passes = CHUNK_KERNELS[name]["loads"] // (2 + memories)
    loaded = passes * elements * (param + grad + memories * memory)
    stored = elements * (param + memories * memory) if CHUNK_KERNELS[name]["stores"] else 0
    ptx = compile_kernel(name, target, dtypes).asm["ptx"]
    assert 16 * len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loaded
    assert 16 * len(re.findall(r"st\.global\.v4\.b32", ptx)) == stored


@pytest.mark.parametrize("name", CHUNK_KERNELS)
def test_the_machine_code_has_128_bit_accesses(name, tmp_path):
    """What the PTX asks for is what the assembler made."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_kernel(name, CUDA[1]).asm["cubin"])
    nvdisasm = cuobjdump().with_name("nvdisasm")
    sass = subprocess.run(
        [nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    # A thread's 8 float32 elements of a tensor are two accesses.
    assert len(re.findall(r"LDG\.E\.128", sass)) == 2 * CHUNK_KERNELS[name]["loads"]
    assert len(re.findall(r"STG\.E\.128", sass)) == 2 * CHUNK_KERNELS[name]["stores"]


# ---- as the backend launches them -----------------------------------------------------


class NoGPU:
    """In the place of Triton's driver, of which a launch that only compiles asks no more."""

    def get_current_target(self):
        return CUDA[1]

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


@pytest.fixture
def compiled(monkeypatch) -> list:
    """What the backend's launches compile; no kernel runs."""
    compiled = []

    def launch(kernel, grid):
        return lambda *args, **options: compiled.append(kernel.warmup(*args, grid=grid, **options))

    monkeypatch.setattr(triton.runtime.driver, "_active", NoGPU())
    monkeypatch.setattr(triton.JITFunction, "__getitem__", launch)
    monkeypatch.setattr(backend, "unavailable", lambda device: None)
    monkeypatch.setattr(backend, "_config", lambda device: config_for("cuda", 9))
    return compiled


def make_optimizer(cls, groups, **options):
    """Each group has one tensor."""
    params = [torch.zeros(2000 * (i + 1), requires_grad=True) for i in range(groups)]
    for param in params:
        param.grad = torch.ones_like(param)
    return cls([{"params": param} for param in params], backend="triton", **options)


@pytest.mark.parametrize("cls", [AMAdamW, AMSGD])
@pytest.mark.parametrize("scope, launches", [("tensor", 1), ("global", 4)])
def test_a_step_is_compiled_once_for_any_tensors_and_groups(compiled, cls, scope, launches):
    """Tables begin where they do: at multiples of 16 bytes, or not."""
    for groups in (1, 2, 3):
        make_optimizer(cls, groups, beta_scope=scope).step()
    assert len(compiled) == 3 * launches
    assert len({kernel.hash for kernel in compiled}) == launches


def test_a_kernel_that_is_not_compiled_is_not_launched_in_a_capture(compiled, monkeypatch):
    """Loading it is not allowed then."""
    optimizer = make_optimizer(AMSGD, 1, beta_scope="tensor")
    optimizer.step()
    monkeypatch.setattr(backend, "is_capturing", lambda device: True)
    optimizer.step()
    assert len(compiled) == 2 and compiled[0] is compiled[1]
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match=r"sgd_step is not compiled for it: take a step"):
        optimizer.step()
    monkeypatch.setattr(backend, "is_capturing", lambda device: False)
    optimizer.step()
    assert len(compiled) == 3 and triton.knobs.runtime.jit_cache_hook is None


# ---- the kernels that do a whole step -------------------------------------------------


def position(pattern: str, ptx: str, begin: int = 0) -> int:
    found = re.compile(pattern).search(ptx, begin)
    assert found, f"no {pattern}"
    return found.start()


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("name", STEPS)
def test_what_programs_tell_each_other_is_ordered(name, target):
    """The only accesses that order others, and the barriers around them.

    All of a program's threads write before the release, and read after the acquire.
    """
    ptx = compile_kernel(name, target).asm["ptx"]
    atomics = re.findall(r"(?:atom|ld)\.global\.gpu\.\w+(?:\.exch|\.add)?", ptx)
    assert sorted(set(atomics)) == [
        "atom.global.gpu.acq_rel.add",  # a chunk's sums, a program that leaves
        "atom.global.gpu.relaxed.add",  # the next item
        "atom.global.gpu.release.exch",  # a tensor's beta
        "ld.global.gpu.acquire",  # whether it is there
    ]
    assert len(re.findall(r"\batom\.", ptx)) + 1 == len(atomics), "others have no scope"
    barrier = r"bar\.sync"
    stored = [m.end() for m in re.finditer(r"st\.global\.b64", ptx)]
    counted = position(r"atom\.global\.gpu\.acq_rel", ptx)
    partials = max(at for at in stored if at < counted)
    assert partials < position(barrier, ptx, partials) < counted
    summed = position(r"ld\.global\.cg", ptx, counted)
    assert counted < position(barrier, ptx, counted) < summed
    published = position(r"atom\.global\.gpu\.release", ptx)
    coefficients = max(at for at in stored if at < published)
    assert coefficients < position(barrier, ptx, coefficients) < published
    acquired = position(r"ld\.global\.gpu\.acquire", ptx)
    read = position(r"ld\.global\.cg", ptx, acquired)
    assert acquired < position(barrier, ptx, acquired) < read


@pytest.mark.parametrize("name", STEPS)
def test_what_programs_tell_each_other_is_ordered_on_amd(name):
    """Caches are written back before a release, and dropped after an acquire."""
    code = compile_kernel(name, HIP).asm["amdgcn"]
    instructions = re.findall(r"^\s+(\w+)(.*)", code, re.MULTILINE)
    kinds = {"buffer_wbl2", "buffer_inv", "global_atomic_add", "global_atomic_swap"}
    order = [kind for kind, _ in instructions if kind in kinds]
    text = " ".join(order)
    acq_rel = "buffer_wbl2 global_atomic_add buffer_inv"
    assert text.count(acq_rel) == 2, "a chunk's sums, a program that leaves"
    assert "buffer_wbl2 global_atomic_swap" in text, "a tensor's beta"
    assert text.replace(acq_rel, "").count("buffer_inv") == 1, "whether it is there"
    # An acquire leaves the scalar cache as it is: nothing is read through it between the first
    # item and the last, but for the kernel's arguments. They lie at what s[0:1] starts with.
    end = code.rindex("global_atomic_add")
    walk = code[code.index("s_barrier") : end]
    assert walk.count("buffer_inv") == 2
    read = set(re.findall(r"s_load_\w+ \S+ (\S+),", walk))
    is_start = not re.search(r"^\s+\w+ s(\[0:1\]|[01]),", code[:end], re.MULTILINE)
    assert read <= ({"s[0:1]"} if is_start else set())


def float_operations(name, dtypes, absent=()) -> Counter[str]:
    ptx = compile_kernel(name, CUDA[1], dtypes, absent).asm["ptx"]
    return Counter(re.findall(r"\b(?:fma|mul|add|sub|div|sqrt)(?:\.\w+)*\.f(?:32|64)\b", ptx))


def reductions(name, dtypes, absent=()) -> list[str]:
    """The sums over a block, each with how threads share it."""
    ttgir = compile_kernel(name, CUDA[1], dtypes, absent).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    operands = re.findall(r'"tt\.reduce"\(.*?\}\) : \((.*?)\)', ttgir, re.DOTALL)
    return [re.sub(r"#\w+", lambda name: layouts[name.group()], each) for each in operands]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_step_has_the_arithmetic_of_the_kernels_that_are_launched_apart(kind, dtypes):
    """As many operations of each kind, products and sums fused or not, and sums in one order."""
    apart = [(f"{kind}_stats", ()), (f"{kind}_beta", ("rows",)), (f"{kind}_apply", ())]
    expected = sum((float_operations(name, dtypes, absent) for name, absent in apart), Counter())
    assert expected and float_operations(f"{kind}_step", dtypes) == expected
    orders = [order for name, absent in apart for order in reductions(name, dtypes, absent)]
    assert len(orders) == 4 and reductions(f"{kind}_step", dtypes) == orders
