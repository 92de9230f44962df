"""Every Triton kernel compiled ahead of time, with no GPU present, and what came out of it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1 is set: there is no compiler", allow_module_level=True)

import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adamem_fused.triton_kernels import kernels
from adamem_fused.triton_kernels.config import config_for

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
}
ARGUMENTS = {
    "addresses": "*i64",
    "layout": "*i64",
    "hypers": "*fp64",
    "lrs": "*i64",
    "chunk_tensors": "*i32",
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
}


def compile_kernel(name, target, dtypes=DTYPES["float32"], num_warps=None, **constants):
    """The kernel compiled as the backend launches it on such a device."""
    kernel = getattr(kernels, name)
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
        "DECAY": True,
        "CHUNK": config.chunk,
        "BLOCK": config.block,
        "STAGES": config.num_stages,
        "PARTIALS": config.partials,
        "COLUMNS": kernels.ADAMW_HYPERS.value,
        **constants,
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    signature = {
        arg: "constexpr" if arg in constants else ARGUMENTS[arg] for arg in kernel.arg_names
    }
    return triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants),
        target=target,
        options={"num_warps": num_warps or config.num_warps},
    )


def cuobjdump() -> Path:
    (path,) = Path(triton.__file__).parent.rglob("bin/cuobjdump")
    return path


def check_spills(compiled, target, tmp_path) -> None:
    if target.backend == "hip":
        spills = re.findall(r"[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        assert spills and set(spills) == {"0"}, spills
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


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("name", CHUNK_KERNELS)
def test_chunk_kernels_compile_without_spills(name, dtypes, target, tmp_path):
    check_spills(compile_kernel(name, target, dtypes), target, tmp_path)


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize(
    "name, constants",
    [
        ("sum_rows", {}),
        ("adamw_beta", {"rows": None, "grad_scale": None, "found_inf": None}),
        ("adamw_beta", {}),
        ("sgd_beta", {"rows": None, "grad_scale": None, "found_inf": None}),
        ("sgd_beta", {}),
    ],
)
def test_tensor_kernels_compile_without_spills(name, constants, target, tmp_path):
    check_spills(compile_kernel(name, target, num_warps=1, **constants), target, tmp_path)


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
def test_the_shared_sum_compiles_without_spills(target, tmp_path):
    config = config_for(target.backend, 9)
    compiled = compile_kernel("sum_shared", target, PARTIALS=config.shared_partials)
    check_spills(compiled, target, tmp_path)


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
    memories = CHUNK_KERNELS[name]["loads"] - 2
    loaded = elements * (param + grad + memories * memory)
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
