"""aarch64's kernels, cross-compiled and run by qemu-user, against AVX2's: the same bits.

Tables and tensors of a case are one piece of memory (tests/neon/runner.cpp). The built library
works on it here, with AVX2's kernels, and the runner on a copy. That AVX2's results are right is
for tests/test_backends.py, test_dispatch.py and test_low_precision.py to say; some of NEON's are
held to the reference here too, so that the two are not wrong together.
"""

from __future__ import annotations

import ast
import ctypes
import itertools
import platform
import random
import shutil
import struct
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import LOW_PRECISION, OPTIMIZERS, largest, relative_error, ulp
from test_dispatch import machine_has

import adamem_fused
from adamem_fused import AMAdamW, formats
from adamem_fused.backends import reference
from adamem_fused.backends.batch import (
    FLOATING,
    AdamWBatch,
    AdamWHyper,
    Packed,
    SGDBatch,
    SGDHyper,
)

ROOT = Path(__file__).parent.parent
COMPILER, QEMU = "aarch64-linux-gnu-g++", "qemu-aarch64"
# It has no instruction beyond Armv8.0-A.
CPU = "cortex-a53"
LIBRARY = Path(adamem_fused.__file__).parent / "_cpu.so"


def why_not():
    if platform.machine() != "x86_64" or not machine_has("avx2"):
        return "this machine has no AVX2 to compare with"
    missing = [tool for tool in (COMPILER, QEMU) if shutil.which(tool) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    return None if LIBRARY.exists() else f"{LIBRARY} is not built"


pytestmark = [
    pytest.mark.neon,
    pytest.mark.skipif(why_not() is not None, reason=str(why_not())),
]

each_optimizer = pytest.mark.parametrize("cls", OPTIMIZERS)
each_dtype = pytest.mark.parametrize("dtype", FLOATING)

# ---- the runner ----------------------------------------------------------------------


def constant_of_setup(name):
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            return ast.literal_eval(node.value)
    raise LookupError(name)


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """The command that runs cases on aarch64; compiled as setup.py compiles the kernels."""
    folder = tmp_path_factory.mktemp("runner")
    flags = [*constant_of_setup("CXX_FLAGS"), "-std=c++17", "-Werror"]
    names = ("kernels", "kernels_neon", "norms", "step", "threads")
    sources = [ROOT / "tests" / "neon" / "runner.cpp"]
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in names]

    def compile_one(source):
        target = folder / f"{source.stem}.o"
        done = subprocess.run(
            [COMPILER, *flags, "-c", source, "-o", target], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    command = folder / "runner"
    subprocess.run([COMPILER, "-static", "-pthread", *objects, "-o", command], check=True)
    return [QEMU, "-cpu", CPU, str(command)]


# ---- cases ---------------------------------------------------------------------------

GUARD = b"\xa5"
ADAMW_BEGIN, ADAMW_FINISH, SGD_BEGIN, SGD_FINISH, SQUARES = range(5)
DTYPES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2, torch.float16: 3}
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2, torch.uint8: 3}


class Place(int):
    """A pointer, in a table: where in the memory what it points to lies."""


@dataclass
class Case:
    """A memory, the places of its pointers, and the calls that work on it."""

    memory: bytearray = field(default_factory=bytearray)
    pointers: list[int] = field(default_factory=list)
    calls: list[tuple[int, ...]] = field(default_factory=list)
    # By id: name, tensor and place.
    tensors: dict[int, tuple[str, torch.Tensor, Place]] = field(default_factory=dict)

    def add(self, data, misaligned=0):
        """Between guards, from a multiple of 64 on or so many bytes behind it."""
        self.memory += GUARD * (128 - len(self.memory) % 64 + misaligned)
        place = Place(len(self.memory))
        self.memory += data
        return place

    def tensor(self, name, tensor):
        if id(tensor) not in self.tensors:
            data = tensor.detach().reshape(-1).view(torch.uint8).numpy().tobytes()
            misaligned = tensor.element_size() * (len(self.tensors) % 3)
            place = self.add(data, misaligned if tensor.dim() > 0 else 0)
            self.tensors[id(tensor)] = name, tensor, place
        return self.tensors[id(tensor)][2]

    def table(self, words):
        place, data = self.add(b""), bytearray()
        for word in words:
            if isinstance(word, Place):
                self.pointers.append(place + len(data))
            data += struct.pack("<d" if isinstance(word, float) else "<q", word or 0)
        self.memory += data
        return place

    def end(self):
        self.memory += GUARD * (128 - len(self.memory) % 64)
        return self

    def results(self, memory):
        """The tensors as a run has left them, in the order in which they were placed."""
        for name, tensor, place in self.tensors.values():
            size = tensor.numel() * tensor.element_size()
            data = bytearray(memory[place : place + size])
            flat = torch.frombuffer(data, dtype=tensor.dtype) if size else tensor.new_empty(0)
            yield name, flat.reshape(tensor.shape), place, size


def adamw(batch):
    return isinstance(batch, AdamWBatch)


def two(words):
    """Of one memory, or of two."""
    return (*words, None)[:2]


def tensor_row(case, batch, i):
    """A StepTensor of csrc/cpu/library.h."""
    param, grad, beta = batch.params[i], batch.grads[i], batch.betas[i]
    memories = [case.tensor(f"{name} {i}", own[i]) for name, own in batch.memories.items()]
    scalars = {"step": batch.steps[i], "prev_lr": batch.prev_lrs[i], "beta": beta}
    if adamw(batch):
        scalars["beta_prod"] = batch.beta_prods[i]
    places = [case.tensor(f"{name} {i}", own) for name, own in scalars.items()]
    doubles = sum((own.dtype == torch.float64) << k for k, own in enumerate(scalars.values()))
    return [
        case.tensor(f"param {i}", param), case.tensor(f"grad {i}", grad),
        *two(memories), *(*places, None)[:4], doubles, param.numel(),
        beta.shape[0] if beta.dim() > 0 else -1, DTYPES[param.dtype],
        int(param.dtype in (torch.float32, torch.float64)), packed_row(case, batch, i),
    ]  # fmt: skip


def packed_row(case, batch, i):
    """A PackedTensor, or None."""
    packed = batch.packed
    if packed is None or not packed.is_low(batch, i):
        return None
    memories = [own[i] for own in batch.memories.values()]
    scales = [own[i] for own in packed.scales]
    has_codes = [memory.dtype in (torch.int8, torch.uint8) for memory in memories]
    places = [
        case.tensor(f"scales {k} of {i}", own) if has_codes[k] else None
        for k, own in enumerate(scales)
    ]
    blocks = [
        memory.numel() // own.numel() if has else 0
        for memory, own, has in zip(memories, scales, has_codes, strict=True)
    ]
    remainder = packed.remainders[i]
    key, *place, rounds = packed.rounding[:, i].tolist()
    return case.table(
        [
            *two([FORMATS[memory.dtype] for memory in memories]),
            *two(places), *two(blocks),
            case.tensor(f"remainder {i}", remainder) if remainder.numel() > 0 else None,
            rounds, key, *place,
        ]
    )  # fmt: skip


def add_step(case, batch, grad_scale=1.0, threads=1, seam=False):
    """A step of the batch, in one call or by its two halves."""
    hypers = [float(word) for h, own in zip(batch.hypers, batch.shared, strict=True)
              for word in (*h[1:], own)]  # fmt: skip
    rows = [word for i in range(len(batch.params)) for word in tensor_row(case, batch, i)]
    step = case.table(
        [
            case.table(rows), len(batch.params), case.table(batch.group_sizes),
            case.table([h.lr for h in batch.hypers]), case.table(hypers), len(batch.hypers),
            grad_scale, threads, None,
        ]
    )  # fmt: skip
    sums = -1
    if seam:
        segments = sum(beta.numel() for beta in batch.betas)
        sums = case.tensor("rows", torch.full((segments, 2), 7.0, dtype=torch.float64))
    begin, finish = (ADAMW_BEGIN, ADAMW_FINISH) if adamw(batch) else (SGD_BEGIN, SGD_FINISH)
    flags = [case.add(b"\x07" * len(batch.params)) for _ in range(2)]
    if seam:
        case.calls.append((begin, step, sums, flags[0], -1))
    case.calls.append((finish, step, sums, flags[1], -1))


def case_of(batch, **options):
    case = Case()
    add_step(case, batch, **options)
    return case.end()


def run_on_arm(runner, tmp_path, cases):
    with (tmp_path / "cases").open("wb") as file:
        for case in cases:
            words = [len(case.memory) // 8, len(case.pointers), len(case.calls)]
            file.write(struct.pack("<3q", *words) + case.memory)
            for numbers in (case.pointers, itertools.chain(*case.calls)):
                file.write(np.array(list(numbers), dtype=np.int64).tobytes())
    subprocess.run([*runner, tmp_path / "cases", tmp_path / "results"], check=True)
    results = (tmp_path / "results").read_bytes()
    ends = list(itertools.accumulate(len(case.memory) for case in cases))
    assert len(results) == ends[-1]
    return [results[end - len(case.memory) : end] for end, case in zip(ends, cases, strict=True)]


def run_here(case, capability):
    """By the built library, with the kernels of that name."""
    library = ctypes.CDLL(str(LIBRARY))
    memory = np.frombuffer(bytearray(case.memory), dtype=np.int64)
    base = memory.ctypes.data
    pointers = np.array(case.pointers, dtype=np.int64) // 8
    memory[pointers] += base
    functions = (
        library.adamem_cpu_adamw_begin, library.adamem_cpu_adamw_finish,
        library.adamem_cpu_sgd_begin, library.adamem_cpu_sgd_finish,
    )  # fmt: skip
    at = [[None if word < 0 else ctypes.c_void_p(base + word) for word in c] for c in case.calls]
    library.adamem_cpu_choose(capability.encode())
    try:
        for call, places in zip(case.calls, at, strict=True):
            if call[0] == SQUARES:
                size = ctypes.c_int64(call[2])
                library.adamem_cpu_squares(places[1], size, places[3], places[4])
            else:
                # Without the flags, of the one that has none.
                arguments = places[1:3] if call[0] == SGD_BEGIN else places[1:4]
                functions[call[0]](*arguments)
    finally:
        library.adamem_cpu_choose(torch.backends.cpu.get_cpu_capability().encode())
    memory[pointers] -= base
    return memory.tobytes()


def assert_same_bits(case, ours, theirs, which):
    """NaN is NaN: its sign and payload are those of an instruction set."""
    ours, theirs = bytearray(ours), bytearray(theirs)
    for pair in zip(case.results(ours), case.results(theirs), strict=True):
        (name, a, place, size), (_, b, _, _) = pair
        if ours[place : place + size] != theirs[place : place + size]:
            integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            as_bits = integers[a.element_size()]
            differ = (a.reshape(-1).view(as_bits) != b.reshape(-1).view(as_bits)).view(a.shape)
            if a.is_floating_point():
                differ &= ~(a.isnan() & b.isnan())
            assert not differ.any(), (
                f"{which}, {name} {list(a.shape)}: {int(differ.sum())} differ, "
                f"{a[differ][:4].tolist()} and {b[differ][:4].tolist()}"
            )
        ours[place : place + size] = theirs[place : place + size] = bytes(size)
    assert ours == theirs, f"{which}: what lies between the tensors has changed"


def run_all(runner, tmp_path, cases):
    """Holds NEON's bits to AVX2's, and these to AVX-512's where there are any; returns them."""
    results = run_on_arm(runner, tmp_path, cases)
    for i, (case, result) in enumerate(zip(cases, results, strict=True)):
        avx2 = run_here(case, "AVX2")
        assert_same_bits(case, result, avx2, f"case {i}")
        if machine_has("avx512"):
            assert_same_bits(case, run_here(case, "AVX512"), avx2, f"case {i}, AVX-512")
    return results


# ---- batches -------------------------------------------------------------------------

# Around a register, a pack and a chunk, and more than is done at once.
SHAPES = ((0,), (1,), (15,), (16,), (17,), (4095,), (4097,), (70_000,))
# The last but two are too long for a cache.
ROWS = ((1, 1), (3, 5), (40, 16), (17, 100), (7, 1000), (5, 4097), (2, 33_000), (0, 3), (2, 0))
CAP = 0.89

# What of the memory is in a gradient, and what is noise: beta is at a bound or between them.
MIXTURES = ((0.9, 0.3), (0.2, 1.0), (-0.5, 1.0), (0.6, 0.5), (1.0, 0.0))


def random_batch(
    cls, shapes, dtype, step=0, scope="tensor", seed=0, lr=1e-2, anchored=False, loss_gap=False,
    weight_decay=0.0, maximize=False, cap=CAP,
):  # fmt: skip
    """In two groups, with state as after so many steps."""
    generator = torch.Generator().manual_seed(seed)
    own = torch.float64 if dtype == torch.float64 else torch.float32
    batch = AdamWBatch() if cls is AMAdamW else SGDBatch()
    for i, shape in enumerate(shapes):
        x, d, noise, root = torch.randn((4, *shape), generator=generator, dtype=own)
        kept, amount = MIXTURES[(i + seed) % len(MIXTURES)]
        d = d if step > 0 else torch.zeros(shape, dtype=own)
        batch.params.append(x.to(dtype))
        batch.grads.append((kept * d + amount * noise).to(dtype))
        scalar = {"dtype": (torch.float32, torch.float64)[(i + seed) % 2]}
        segments = shape[:1] if scope == "row" else ()
        if cls is AMAdamW:
            batch.exp_avgs.append(d)
            batch.exp_avg_sqs.append(root.square() if step > 0 else torch.zeros_like(d))
            batch.beta_prods.append(torch.full(segments, 0.6**step, **scalar))
        else:
            batch.momentum_buffers.append(d)
        batch.steps.append(torch.tensor(float(step), **scalar))
        batch.prev_lrs.append(torch.tensor(0.7 * lr if step > 0 else 0.0, **scalar))
        batch.betas.append(torch.full(segments, 0.5, **scalar))
    batch.group_sizes = [len(shapes) // 2, len(shapes) - len(shapes) // 2]
    batch.shared = [scope == "shared"] * 2
    for own_lr in (lr, 2 * lr):
        planes = (anchored, loss_gap, maximize)
        if cls is AMAdamW:
            batch.hypers.append(AdamWHyper(own_lr, cap, 0.999, 1e-8, weight_decay, 0.1, *planes))
        else:
            batch.hypers.append(SGDHyper(own_lr, cap, weight_decay, 0.1, *planes))
    return batch


SCALINGS = ((False, 1.0), (True, 1.0), (False, 128.0), (True, 0.5))
SCOPES = ("tensor", "row", "shared")
RUNS = ((False, 1), (True, 3), (False, 3), (True, 1), (False, 2))


def variants(shapes, rows, steps=(0, 1, 9)):
    """Shapes, options of a batch, and those of its step. What is long is left out of two thirds."""
    everything = itertools.product((False, True), (0.0, 0.1), SCALINGS, steps, SCOPES)
    for i, (anchored, decay, (maximize, scale), step, scope) in enumerate(everything):
        own = rows if scope == "row" else shapes
        if i // (len(steps) * len(SCOPES)) % 3 != 0:
            own = [shape for shape in own if shape[-1] < 30_000]
        seam, threads = RUNS[i % len(RUNS)]
        options = {"anchored": anchored, "weight_decay": decay, "maximize": maximize}
        options |= {"step": step, "scope": scope, "seed": i, "loss_gap": i % 7 == 3}
        yield own, options, {"grad_scale": scale, "seam": seam, "threads": threads}


def betas_of(cases, results):
    tensors = [
        own for case, result in zip(cases, results, strict=True) for own in case.results(result)
    ]
    return torch.cat(
        [t.double().reshape(-1) for name, t, *_ in tensors if name.startswith("beta ")]
    )


def assert_varied(betas):
    """At both bounds and between them: a guess has missed, and not."""
    assert (betas == 0).any() and ((betas - CAP).abs() < 1e-7).any()
    assert ((betas > 0.01) & (betas < CAP - 0.01) & (betas != 0.5)).any()


# ---- tests ---------------------------------------------------------------------------


@each_optimizer
@each_dtype
def test_a_step_has_the_bits_of_avx2(cls, dtype, runner, tmp_path):
    cases = [
        case_of(random_batch(cls, shapes, dtype, **options), **run)
        for shapes, options, run in variants(SHAPES, ROWS)
    ]
    assert_varied(betas_of(cases, run_all(runner, tmp_path, cases)))


@each_optimizer
@each_dtype
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_ten_steps_have_the_bits_of_avx2(cls, dtype, scope, runner, tmp_path):
    shapes = ((5,), (33,), (4097,)) if scope == "tensor" else ((3, 7), (9, 520))
    batch = random_batch(cls, shapes, dtype, scope=scope, weight_decay=0.1)
    case = Case()
    for step in range(10):
        other = random_batch(cls, shapes, dtype, step=1, seed=step + 1)
        add_step(case, replace(batch, grads=other.grads))
    run_all(runner, tmp_path, [case.end()])


# ---- what is stored in few bits ----

SHORT = torch.bfloat16
# Dtypes of parameter and state, whether it is rounded stochastically, and has remainders.
LOW = {
    "short": (torch.float32, SHORT, False, False),
    "int8": (torch.float32, torch.int8, False, False),
    "short_short": (SHORT, SHORT, False, False),
    "rounded": (SHORT, torch.float32, True, False),
    "rounded_int8": (SHORT, torch.int8, True, False),
    "remainder_int8": (SHORT, torch.int8, False, True),
    "all_short": (SHORT, SHORT, True, True),
}
LOW_SHAPES = ((256,), (17,), (66, 64), (4099,), (13, 320), (33_024,), (1,), (0, 3))
LOW_ROWS = ((40, 256), (17, 384), (7, 1000), (2, 33_024), (5, 3), (1, 1), (0, 64), (70, 64))
each_kind = pytest.mark.parametrize("kind", LOW)


def packed_batch(cls, kind, shapes, **options):
    dtype, state, rounds, has_remainders = LOW[kind]
    batch = random_batch(cls, shapes, dtype, **options)
    seed = options.get("seed", 0)
    generator = torch.Generator().manual_seed(seed + 1)

    def integers(shape, low, high, dtype=torch.int64):
        return torch.randint(low, high, shape, generator=generator, dtype=dtype)

    packed, count = Packed.empty(len(batch.memories)), len(shapes)
    for scales, (name, memories) in zip(packed.scales, batch.memories.items(), strict=True):
        for i, memory in enumerate(memories):
            block = formats.block_length(memory.shape[-1]) if memory.numel() > 0 else 0
            scales.append(
                torch.zeros(memory.numel() // block if block and state == torch.int8 else 0)
            )
            if scales[i].numel() > 0:
                codes = torch.uint8 if name == "exp_avg_sq" else torch.int8
                memories[i] = torch.empty(memory.shape, dtype=codes)
                formats.encode(memory, memories[i], scales[i], None)
            elif state == SHORT:
                memories[i] = memory.bfloat16()
    remainders = [p.shape if has_remainders else (0,) for p in batch.params]
    packed.remainders[:] = [integers(shape, -128, 128, torch.int8) for shape in remainders]
    packed.rounding = torch.stack(
        [
            integers((count,), -(2**63), 2**63 - 1),  # KEY
            integers((count,), 0, 2**33) * (seed % 2),  # OFFSET, STRETCH, SKIP
            integers((count,), 1, 100) * (seed % 3 // 2),
            integers((count,), 1, 2**20) * (seed % 3 // 2),
            torch.full((count,), int(rounds)),  # ROUNDS
        ]
    )
    batch.packed = packed
    return batch


@each_optimizer
@each_kind
def test_a_step_of_few_bits_has_the_bits_of_avx2(cls, kind, runner, tmp_path):
    cases = [
        case_of(packed_batch(cls, kind, shapes, **options), **run)
        for shapes, options, run in variants(LOW_SHAPES, LOW_ROWS, steps=(0, 9))
    ]
    assert_varied(betas_of(cases, run_all(runner, tmp_path, cases)))


# ---- values at the edges ----


def any_bits(tensor, generator):
    """Numbers of every exponent, NaN and infinity among them; of a uint8 any codes."""
    count = tensor.numel() * tensor.element_size()
    data = torch.randint(0, 256, (count,), generator=generator, dtype=torch.uint8)
    tensor.reshape(-1).view(torch.uint8).copy_(data)


# A first step's beta needs no sums, and so one NaN does not make all of it NaN.
@each_optimizer
@pytest.mark.parametrize("kind", [*FLOATING, *LOW], ids=str)
def test_a_first_step_of_any_bits_has_the_bits_of_avx2(cls, kind, runner, tmp_path):
    cases = []
    for seed, scope in itertools.product(range(3), ("tensor", "row")):
        options = {"seed": seed, "scope": scope, "lr": 0.5, "weight_decay": 0.1 * (seed % 2)}
        shapes = ((40, 256), (21_003,)) if scope == "tensor" else ((64, 320), (100, 3))
        if kind in FLOATING:
            batch = random_batch(cls, shapes, kind, **options)
        else:
            batch = packed_batch(cls, kind, shapes, **options)
        generator = torch.Generator().manual_seed(seed)
        packed = () if batch.packed is None else batch.packed.lists()
        for tensors in (batch.params, batch.grads, *batch.memories.values(), *packed):
            for tensor in tensors:
                any_bits(tensor, generator)
        if cls is AMAdamW:  # squares have no sign, and their codes are made of them
            for tensor in batch.exp_avg_sqs:
                if tensor.is_floating_point():
                    tensor.abs_()
        cases.append(case_of(batch, seam=seed == 2))
    results = run_all(runner, tmp_path, cases)
    params = [t for c, r in zip(cases, results, strict=True) for name, t, *_ in c.results(r)
              if name.startswith("param")]  # fmt: skip
    flat = torch.cat([param.reshape(-1) for param in params])
    assert flat.isfinite().float().mean() > 0.3 and flat.isnan().any() and flat.isinf().any()


def specials(dtype):
    info = torch.finfo(dtype)
    values = (0.0, info.smallest_normal / 4, 3 * info.smallest_normal, 1.0, info.max)
    return [*values, -0.0, -1.0, -info.max, float("inf"), float("-inf"), float("nan")]


@each_optimizer
@each_dtype
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_special_values_have_the_bits_of_avx2(cls, dtype, scope, runner, tmp_path):
    """All of them with all others, in segments of one element, at a tenth step."""
    own = torch.float64 if dtype == torch.float64 else torch.float32
    grads, memories = (
        torch.tensor(specials(dtype), dtype=dtype),
        torch.tensor(specials(own), dtype=own),
    )
    squares = memories[~memories.signbit()]
    every = [t.reshape(-1) for t in torch.meshgrid(
        torch.arange(len(grads)), torch.arange(len(memories)), torch.arange(len(squares)),
        indexing="ij",
    )]  # fmt: skip
    count = len(every[0])
    shapes = [(1,)] * count if scope == "tensor" else [(count, 1)]
    cases = []
    for anchored, decay in itertools.product((False, True), (0.0, 0.1)):
        batch = random_batch(cls, shapes, dtype, 9, scope, anchored=anchored, weight_decay=decay)
        own_memories = (memories[every[1]], squares[every[2]])[: len(batch.memories)]
        columns = [
            (batch.params, grads[torch.arange(count) % len(grads)]),
            (batch.grads, grads[every[0]]),
            *zip(batch.memories.values(), own_memories, strict=True),
        ]
        for tensors, values in columns:
            for tensor, value in zip(tensors, values.split(count // len(shapes)), strict=True):
                tensor.copy_(value.view(tensor.shape))
        cases.append(case_of(batch))
    betas = betas_of(cases, run_all(runner, tmp_path, cases))
    assert betas.isnan().any() and (betas == 0).any() and (betas.isfinite() & (betas > 0)).any()


@each_optimizer
@each_dtype
def test_sums_at_the_ends_of_a_type_have_the_bits_of_avx2(cls, dtype, runner, tmp_path):
    """Tensors of denormals, of zeros, of what overflows when it is squared or added."""
    info, cases = torch.finfo(torch.float32 if dtype != torch.float64 else dtype), []
    sizes = (0.0, info.smallest_normal, info.smallest_normal**0.5, info.max**0.5, info.max / 4)
    for (grad, memory), step in itertools.product(itertools.product(sizes, sizes), (0, 9)):
        for decay, lr in ((0.0, 1e-2), (0.1, 0.0)):
            batch = random_batch(
                cls, ((37,), (4097,)), dtype, step, seed=step, lr=lr, weight_decay=decay
            )
            for tensor in batch.grads:
                tensor.copy_(tensor.double() * grad)
            for i, own in enumerate(batch.memories.values()):
                for tensor in own:
                    tensor.copy_(tensor.double() * (memory if i == 0 else min(memory, 1.0)))
            cases.append(case_of(batch))
    run_all(runner, tmp_path, cases)


def test_the_bias_corrections_have_the_bits_of_avx2(runner, tmp_path):
    """They take libm's pow, which is built for each processor: in float64, which shows it."""
    rng, cases = random.Random(0), []
    for beta2 in (0.9, 0.95, 0.98, 0.99, 0.995, 0.999, 0.9999, *(rng.random() for _ in range(13))):
        steps = [*range(1, 400), *(rng.randrange(400, 2_000_000) for _ in range(100))]
        batch = random_batch(AMAdamW, [(1,)] * len(steps), torch.float64, 1)
        for tensor, step in zip(batch.steps, steps, strict=True):
            tensor.fill_(step)
        batch.hypers = [h._replace(beta2=beta2) for h in batch.hypers]
        cases.append(case_of(batch))
    run_all(runner, tmp_path, cases)


@each_dtype
def test_squares_have_the_bits_of_avx2(dtype, runner, tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = []
    for n in (0, 1, 2, 3, 7, 15, 16, 17, 63, 64, 65, 1023, 1025, 4095, 4097, 70_000):
        for size in (1.0, 1e-30, 1e30):
            tensors.append(
                (size * torch.randn(n, generator=generator, dtype=torch.float64)).to(dtype)
            )
    for value in specials(dtype):
        tensors.append(torch.tensor([1.0] * 20 + [value], dtype=dtype))
    case = Case()
    elements = case.table(
        itertools.chain(*((case.tensor(f"grad {i}", t), DTYPES[dtype], t.numel())
                          for i, t in enumerate(tensors)))
    )  # fmt: skip
    squares = case.tensor("squares", torch.full((len(tensors),), 7.0, dtype=torch.float64))
    case.calls.append((SQUARES, elements, len(tensors), case.table([2, None]), squares))
    (result,) = run_all(runner, tmp_path, [case.end()])
    exact = torch.stack([t.double().square().sum() for t in tensors])
    own = next(t for name, t, *_ in case.results(result) if name == "squares")
    torch.testing.assert_close(own, exact, rtol=1e-5, atol=0, equal_nan=True)


# ---- against the reference ----


@each_optimizer
@each_dtype
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("anchored", [False, True])
def test_a_step_agrees_with_the_reference(cls, dtype, scope, anchored, runner, tmp_path):
    shapes = ((300,), (4097,)) if scope == "tensor" else ((7, 300), (3, 1000))
    rtol = 1e-12 if dtype == torch.float64 else 1e-5
    for step in (0, 1, 9):
        batch = random_batch(
            cls,
            shapes,
            dtype,
            step,
            scope,
            step,
            anchored=anchored,
            weight_decay=0.1,
            maximize=True,
        )
        case = case_of(batch, grad_scale=2.0)
        (result,) = run_on_arm(runner, tmp_path, [case])
        finish = reference.adamw_finish if cls is AMAdamW else reference.sgd_finish
        before = largest(batch.params[0]), largest(batch.params[1])
        finish(batch, None, torch.tensor(2.0), None)
        # The batch's tensors, by which a case knows the places, now have the reference's results.
        for (name, ours, *_), (_, theirs, _) in zip(
            case.results(result), case.tensors.values(), strict=True
        ):
            if name.startswith("param") and dtype in LOW_PRECISION:
                apart = (ours.double() - theirs.double()).abs()
                assert (apart <= ulp(theirs) + rtol).all(), name
            else:
                assert relative_error(ours, theirs) <= 2 * rtol * max(1.0, *before), name
