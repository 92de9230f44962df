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
from cases import each_pair
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import triton as backend
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
SPILLING = ("float32", "bfloat16", "float64")  # whose registers are counted
# Of an element's vectors of g, d, x and v, all on the aligned path: by optimizer, kernel and seam.
# AM-AdamW's begin has the guess and the sums alone, its finish the repair and the update, and
# without the seam begin has both of finish as well.
LOADS = {"adamw": {"am_begin": 8, "am_finish": 8}, "sgd": {"am_begin": 3, "am_finish": 3}}
STORES = {"adamw": {"am_begin": 3, "am_finish": 5}, "sgd": {"am_begin": 0, "am_finish": 2}}
CHUNK_KERNELS = [
    (kind, name, seam)
    for kind in ("adamw", "sgd")
    for name, seam in (("am_begin", False), ("am_begin", True), ("am_finish", False))
]
# Param, grad, memory, square and arithmetic, of what is stored in few bits; how many bytes of
# stack, for scalars, begin may have, finish and rows of up to 1,024 elements, and rows of 4,096.
# Triton 3.6 and 3.7 place registers differently: what the one takes that takes more.
LOW = {
    "float32-bfloat16": ((tl.float32, tl.float32, tl.bfloat16, tl.bfloat16, tl.float32), 0, 0, 160),
    "bfloat16-float32": ((tl.bfloat16, tl.bfloat16, tl.float32, tl.float32, tl.float32), 0, 16, 32),
    "bfloat16": ((tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.float32), 0, 80, 336),
    "float32-int8": ((tl.float32, tl.float32, tl.int8, tl.uint8, tl.float32), 16, 192, 104),
    "bfloat16-int8": ((tl.bfloat16, tl.bfloat16, tl.int8, tl.uint8, tl.float32), 328, 264, 264),
}
ARGUMENTS = {
    "addresses": "*i64",
    "layout": "*i64",
    "hypers": "*fp64",
    "lrs": "*i64",
    "chunk_units": "*i32",
    "arrived": "*i32",
    "partials": "*fp64",
    "totals": "*fp64",
    "tensor_chunks": "*i64",
    "norms": "*fp64",
    "rows": "*fp64",
    "coefficients": "*fp64",
    "found_inf": "*fp32",
    "n": "i32",
    "units": "i32",
    "chunks": "i32",
    "first_chunk": "i32",
    "last_chunk": "i32",
}


def config_of(target):
    return config_for(target.backend, target.arch // 10 if target.backend == "cuda" else 9)


@functools.cache
def compile_kernel(
    kind,
    name,
    target,
    dtypes=DTYPES["float32"],
    seam=False,
    absent=(),
    decay=True,
    row=1024,
    half="WHOLE",
    scale="*fp64",
    low=False,
    stretched=False,
):
    """The kernel compiled as the backend launches it on such a device, some arguments None."""
    kernel, config = getattr(kernels, name), config_of(target)
    param, grad, *memories, arithmetic = dtypes
    memories = memories or [arithmetic]
    tile, row_options = config.tile_of(row, arithmetic)
    constants = {
        "PARAM": param,
        "GRAD": grad,
        "MEMORY": memories[0],
        "SQUARE": memories[-1],
        "T": arithmetic,
        "ADAMW": kind == "adamw",
        "LOW": low,
        "STRETCHED": stretched,
        "SEAM": seam,
        "ROWS_SEAM": seam,
        "PASS": getattr(kernels, half),
        "HEIGHT": tile // row,
        "WIDTH": row,
        "DECAY": decay,
        "CHUNK": config.chunk,
        "BLOCK": config.block_of(arithmetic),
        "PARTIALS": config.partials,
        **dict.fromkeys(absent),
    }
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    arguments = {**ARGUMENTS, "grad_scale": scale}
    signature = {
        arg: "constexpr" if arg in constants else arguments[arg] for arg in kernel.arg_names
    }
    options = {"num_warps": 1 if name == "am_prepare" else config.num_warps}
    if name in ("am_begin", "am_finish"):
        options = config.options(arithmetic)
    if name == "am_rows":
        options = row_options
    return triton.compile(
        ASTSource(kernel, signature=signature, constexprs=constants),
        target=target,
        options={**options, "enable_fp_fusion": False},
    )


def cuobjdump() -> Path:
    (path,) = Path(triton.__file__).parent.rglob("bin/cuobjdump")
    return path


def check_spills(compiled, target, tmp_path, stack=0) -> None:
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
    found = re.search(r"STACK:(\d+) .*LOCAL:0", usage)
    assert found is not None and int(found[1]) <= stack, usage


def longest_row(target, memory) -> int:
    longest = config_of(target).longest_row
    return longest // 2 if memory == tl.float64 else longest


def target_name(target) -> str:
    return f"{target.backend}-{target.arch}"


@each_pair("kernel, dtypes, target", CHUNK_KERNELS, SPILLING, [*CUDA, HIP])
def test_chunk_kernels_compile_without_spills(kernel, dtypes, target, tmp_path):
    kind, name, seam = kernel
    check_spills(compile_kernel(kind, name, target, DTYPES[dtypes], seam), target, tmp_path)


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize("dtypes", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("kind, decay", [("adamw", True), ("sgd", False)])
def test_begin_without_a_scaler_compiles_without_spills(kind, decay, dtypes, target, tmp_path):
    """As an optimizer with its default options launches it."""
    absent = ("found_inf",)
    compiled = compile_kernel(kind, "am_begin", target, DTYPES[dtypes], False, absent, decay)
    # One of them, for sm_80, has 8 bytes of stack beside 56 registers, of those that it may take.
    check_spills(compiled, target, tmp_path, stack=8 if dtypes == "float64" else 0)


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize(
    "name, absent",
    [
        ("am_prepare", ()),
        ("sum_squares", ()),
        ("am_beta", ()),
        ("am_beta", ("rows", "found_inf")),
        ("sum_rows", ()),
        ("sum_shared", ()),
    ],
)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_tensor_kernels_compile_without_spills(kind, name, absent, target, tmp_path):
    # Triton 3.6 has 8 bytes of stack in one of these, which is as good: a program is one tensor's.
    check_spills(compile_kernel(kind, name, target, absent=absent), target, tmp_path, stack=8)


@each_pair(
    "kind, row, dtypes, target",
    ("adamw", "sgd"),
    (16, 128, 1024, 2048, None),
    SPILLING,
    (CUDA[1], HIP),
)
def test_rows_that_a_program_holds_are_held_in_registers(kind, row, dtypes, target, tmp_path):
    """From short ones to the longest, of which in float64 some lie in L1."""
    longest = longest_row(target, DTYPES[dtypes][-1])
    compiled = compile_kernel(
        kind, "am_rows", target, DTYPES[dtypes], absent=("rows",), row=row or longest
    )
    check_spills(compiled, target, tmp_path, stack=0 if row or dtypes != "float64" else 136)


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("row, accesses", [(16, 2), (256, 2), (1024, 2), (4096, 4)])
@pytest.mark.parametrize("kind, arrays", [("adamw", 4), ("sgd", 3)])
def test_rows_are_accessed_16_bytes_at_a_time_and_once(kind, arrays, row, accesses, target):
    """A thread's 8 or 16 elements of float32 rows are two or four accesses of 128 bits."""
    ptx = compile_kernel(kind, "am_rows", target, absent=("rows",), row=row).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == accesses * arrays
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == accesses * (arrays - 1)


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("row", [16, 1024])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_rows_in_halves_are_added_in_the_order_of_whole_ones(kind, row, dtypes):
    whole, begin = (
        reductions(kind, "am_rows", dtypes, absent=absent, row=row, half=half)
        for half, absent in (("WHOLE", ("rows",)), ("BEGIN", ()))
    )
    assert len(begin) == 2 and whole[:2] == begin


@pytest.mark.parametrize(
    "kind, name", [*(("adamw", name) for name in LOW), ("sgd", "bfloat16-int8")]
)
def test_kernels_of_few_bits_compile_for_sm_90(kind, name, tmp_path):
    """What lies on the stack is scalars, but in rows that are 16 elements a thread, and where
    memories are codes in begin and finish."""
    dtypes, *stacks = LOW[name]
    for kernel, row, absent, stack in (
        ("am_begin", 1024, ("found_inf",), stacks[0]),
        ("am_finish", 1024, ("found_inf",), stacks[1]),
        ("am_rows", 1024, ("rows", "found_inf"), 0),
        ("am_rows", 4096, ("rows", "found_inf"), stacks[2]),
    ):
        compiled = compile_kernel(kind, kernel, CUDA[1], dtypes, absent=absent, row=row, low=True)
        check_spills(compiled, CUDA[1], tmp_path, stack)


@pytest.mark.parametrize(
    "name, dtypes, loads, stores",
    [
        ("am_begin", "bfloat16", (8, 2), (4, 1)),
        ("am_finish", "bfloat16", (8, 2), (7, 2)),
        ("am_rows", "bfloat16", (4, 1), (4, 1)),
        ("am_begin", "bfloat16-int8", (4, 6), (2, 3)),
        ("am_finish", "bfloat16-int8", (4, 6), (4, 5)),
        ("am_rows", "bfloat16-int8", (2, 3), (2, 3)),
    ],
)
def test_elements_of_few_bits_are_accessed_8_at_a_time(name, dtypes, loads, stores):
    """16 bytes of bfloat16; 8 of codes, and of remainders, with which a parameter is stored or
    without. begin has the guess and the sums alone, finish the repair and the update."""
    absent = ("found_inf", *(("rows",) if name == "am_rows" else ()))
    dtypes = LOW[dtypes][0]
    compiled = compile_kernel("adamw", name, CUDA[1], dtypes, seam=True, absent=absent, low=True)
    for access, expected in (("ld", loads), ("st", stores)):
        found = [re.findall(rf"{access}\.global\.v{n}\.b32", compiled.asm["ptx"]) for n in (4, 2)]
        assert tuple(map(len, found)) == expected, access


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("half, absent", [("WHOLE", ("rows",)), ("FINISH", ())])
def test_a_row_is_written_when_all_of_its_threads_have_read(half, absent, target):
    """Threads of several warps read one beta_prod, and before the elements."""
    ptx = compile_kernel("adamw", "am_rows", target, absent=absent, half=half).asm["ptx"]
    read = ptx.rindex("ld.global.v4")
    assert "bar.sync" in ptx[read : ptx.index("st.global", read)]


@pytest.mark.parametrize("target", [*CUDA, HIP], ids=target_name)
@pytest.mark.parametrize("grad", [tl.float32, tl.bfloat16, tl.float16, tl.float64], ids=str)
def test_squares_compile_without_spills(grad, target, tmp_path):
    dtypes = (grad, grad, grad if grad == tl.float64 else tl.float32)
    compiled = compile_kernel("adamw", "am_squares", target, dtypes)
    check_spills(compiled, target, tmp_path)


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("grad, accesses", [(tl.float32, 2), (tl.bfloat16, 1), (tl.float64, 2)])
def test_squares_are_read_16_bytes_at_a_time(grad, accesses, target):
    """In float32 the loop is there twice: for what is beyond the range of its squares."""
    dtypes = (grad, grad, grad if grad == tl.float64 else tl.float32)
    ptx = compile_kernel("adamw", "am_squares", target, dtypes).asm["ptx"]
    loops = 1 if grad == tl.float64 else 2
    loads = re.findall(r"ld\.global\.v(4\.b32|2\.b64)", ptx)
    assert len(loads) == accesses * loops
    assert not re.search(r"\b(?:atom|red)\.", ptx)


@pytest.mark.parametrize("scale", ["*fp32", "*fp64"])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_scale_is_read_in_the_type_that_it_has(kind, scale):
    """GradScaler's, or one that clips, which float64 parameters do not lose digits of."""
    ptx = compile_kernel(kind, "am_prepare", CUDA[1], scale=scale).asm["ptx"]
    widened = len(re.findall(r"cvt\.f64\.f32", ptx))
    narrow = compile_kernel(kind, "am_prepare", CUDA[1], scale="*fp32").asm["ptx"]
    assert len(re.findall(r"cvt\.f64\.f32", narrow)) - widened == (scale == "*fp64")


def vectors(counts, kind, name, seam) -> int:
    whole = name == "am_begin" and not seam
    return counts[kind][name] + (counts[kind]["am_finish"] if whole else 0)


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("kind, name, seam", CHUNK_KERNELS)
def test_aligned_tensors_are_accessed_16_bytes_at_a_time(kind, name, seam, target):
    """A thread's 8 elements of a float32 tensor are two accesses of 128 bits."""
    ptx = compile_kernel(kind, name, target, seam=seam).asm["ptx"]
    loads, stores = (vectors(counts, kind, name, seam) for counts in (LOADS, STORES))
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == 2 * loads
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == 2 * stores


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("kind, loads, stores", [("adamw", 6 + 6, 5 + 3), ("sgd", 4, 3)])
def test_a_bfloat16_access_is_8_elements(kind, loads, stores, target):
    """In finish: g and x are one access each, a memory two."""
    ptx = compile_kernel(kind, "am_finish", target, DTYPES["bfloat16"]).asm["ptx"]
    assert len(re.findall(r"ld\.global\.v4\.b32", ptx)) == loads
    assert len(re.findall(r"st\.global\.v4\.b32", ptx)) == stores


@pytest.mark.parametrize("kind, name, seam", CHUNK_KERNELS)
def test_the_machine_code_has_128_bit_accesses(kind, name, seam, tmp_path):
    """What the PTX asks for is what the assembler made."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compile_kernel(kind, name, CUDA[1], seam=seam).asm["cubin"])
    nvdisasm = cuobjdump().with_name("nvdisasm")
    sass = subprocess.run(
        [nvdisasm, "-c", cubin], capture_output=True, text=True, check=True
    ).stdout
    # The assembler may unroll a loop.
    assert len(re.findall(r"LDG\.E\.128", sass)) >= 2 * vectors(LOADS, kind, name, seam)
    assert len(re.findall(r"STG\.E\.128", sass)) >= 2 * vectors(STORES, kind, name, seam)


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
    params = [torch.zeros(2000 * (i + 1), 60, requires_grad=True) for i in range(groups)]
    for param in params:
        param.grad = torch.ones_like(param)
    return cls([{"params": param} for param in params], backend="triton", **options)


@pytest.mark.parametrize("cls", [AMAdamW, AMSGD])
@pytest.mark.parametrize("scope, launches", [("tensor", 3), ("global", 5), ("row", 2)])
def test_a_step_is_compiled_once_for_any_tensors_and_groups(compiled, cls, scope, launches):
    """Tables begin where they do: at multiples of 16 bytes, or not."""
    for groups in (1, 2, 3):
        make_optimizer(cls, groups, beta_scope=scope).step()
    assert len(compiled) == 3 * launches
    assert len({kernel.hash for kernel in compiled}) == launches
    assert not any(kernel.metadata.enable_fp_fusion for kernel in compiled)


def test_a_kernel_that_is_not_compiled_is_not_launched_in_a_capture(compiled, monkeypatch):
    """Loading it is not allowed then."""
    optimizer = make_optimizer(AMSGD, 1, beta_scope="tensor")
    optimizer.step()
    monkeypatch.setattr(backend, "is_capturing", lambda device: True)
    optimizer.step()
    assert len(compiled) == 6 and compiled[:3] == compiled[3:]
    optimizer.grad_scale = torch.ones(())
    with pytest.raises(RuntimeError, match=r"am_prepare is not compiled for it: take a step"):
        optimizer.step()
    monkeypatch.setattr(backend, "is_capturing", lambda device: False)
    optimizer.step()
    assert len(compiled) == 9 and triton.knobs.runtime.jit_cache_hook is None


# ---- what programs tell each other -----------------------------------------------------


def position(pattern: str, code: str, begin: int = 0) -> int:
    found = re.compile(pattern).search(code, begin)
    assert found, f"no {pattern}"
    return found.start()


@pytest.mark.parametrize("target", CUDA, ids=target_name)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_chunk_that_arrives_is_ordered(kind, target):
    """One access orders others, and no program waits: the counter of a tensor's chunks.

    All of a program's threads write before it, and read after it.
    """
    ptx = compile_kernel(kind, "am_begin", target).asm["ptx"]
    assert re.findall(r"(?:atom|ld)\.global\.gpu\.\S+", ptx) == ["atom.global.gpu.acq_rel.add.u32"]
    assert len(re.findall(r"\b(?:atom|red)\.", ptx)) == 1
    barrier = r"bar\.sync"
    counted = position(r"atom\.global\.gpu\.acq_rel", ptx)
    partials = max(m.end() for m in re.finditer(r"st\.global\.b64", ptx) if m.end() < counted)
    assert partials < position(barrier, ptx, partials) < counted
    summed = position(r"ld\.global\.cg", ptx, counted)
    assert counted < position(barrier, ptx, counted) < summed
    for name, seam in (("am_begin", True), ("am_finish", False), ("am_prepare", False)):
        assert not re.search(
            r"\b(?:atom|red)\.", compile_kernel(kind, name, target, seam=seam).asm["ptx"]
        )
    rows = compile_kernel(kind, "am_rows", target, absent=("rows",)).asm["ptx"]
    assert not re.search(r"\b(?:atom|red)\.", rows)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_chunk_that_arrives_is_ordered_on_amd(kind):
    """Caches are written back before the counter is, and dropped after it."""
    code = compile_kernel(kind, "am_begin", HIP).asm["amdgcn"]
    instructions = re.findall(r"^\s+(\w+)(.*)", code, re.MULTILINE)
    order = [
        name for name, _ in instructions if re.match(r"buffer_wbl2|buffer_inv|global_atomic", name)
    ]
    assert order == ["buffer_wbl2", "global_atomic_add", "buffer_inv"]


def float_operations(kind, name, dtypes, seam=False, absent=()) -> Counter[str]:
    ptx = compile_kernel(kind, name, CUDA[1], dtypes, seam, absent).asm["ptx"]
    # Not those that only take a scalar's sign to another place.
    return Counter(re.findall(r"\b(?:fma|mul|add|div|sqrt)(?:\.\w+)*\.f(?:32|64)\b", ptx))


def reductions(kind, name, dtypes, seam=False, absent=(), **rows) -> list[str]:
    """The sums over a block, each with how threads share it."""
    ttgir = compile_kernel(kind, name, CUDA[1], dtypes, seam, absent, **rows).asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", ttgir, re.MULTILINE))
    operands = re.findall(r'"tt\.reduce"\(.*?\}\) : \((.*?)\)', ttgir, re.DOTALL)
    return [re.sub(r"#\w+", lambda name: layouts[name.group()], each) for each in operands]


@pytest.mark.parametrize("dtypes", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_both_sides_of_the_seam_have_the_arithmetic_of_a_step_without(kind, dtypes):
    """As many operations of each kind, and sums in one order."""
    sides = [
        ("am_begin", True, ()),
        ("sum_rows", False, ()),
        ("am_beta", False, ()),
        ("am_finish", False, ()),
    ]
    expected = sum(
        (float_operations(kind, name, dtypes, *rest) for name, *rest in sides), Counter()
    )
    expected["add.rn.f64"] -= 1  # am_beta counts the steps of units of rows as well
    assert float_operations(kind, "am_begin", dtypes) == expected
    orders = reductions(kind, "am_begin", dtypes, True) + reductions(kind, "sum_rows", dtypes)
    assert len(orders) == (6 if kind == "adamw" else 4)
    assert reductions(kind, "am_begin", dtypes) == orders
