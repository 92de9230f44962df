"""The cuda backend without a GPU: its kernels' source run on the CPU (cuda_emulation/)."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import cuda_emulator
import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_lockstep,
    assert_same_bits,
    copy_state,
    make_optimizer,
    parameters,
    set_gradients,
    snapshot,
)

from adamem_fused import __main__ as overview
from adamem_fused import backends
from adamem_fused.backends import cpu, cuda, cuda_library, operators, ops, tables, triton

HERE = Path(__file__).parent
CHUNK = 8192
# Beside a chunk's and a vector's edges: none, a scalar, and several chunks.
SHAPES = [(0,), (), (3,), (CHUNK - 1,), (CHUNK,), (CHUNK + 1,), (3 * CHUNK + 17,), (300,)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
GPU = torch.device("cuda", 0)

is_unavailable = cuda.unavailable  # not the emulation's


@pytest.fixture(autouse=True)
def emulated(monkeypatch):
    cuda_emulator.emulate(monkeypatch)
    yield
    cuda._kernels.cache_clear()


@pytest.mark.parametrize(
    "selection",
    [
        # Without what takes the emulation longest.
        [
            *("test_gpu_cases.py", "test_gpu_norms.py", "test_versions.py"),
            *("test_idle_steps.py", "test_lifetimes.py", "test_backends.py"),
            "-k",
            "test_gpu or cuda and (not test_backends or edges or random_shapes or empty_group "
            "or leaves_gradients or two_million and dtype0)",
        ],
        pytest.param(["test_gpu_low_precision.py", "-k", "not many"], marks=pytest.mark.emulated),
        pytest.param(
            [
                "test_amp.py",
                "test_layouts.py",
                "test_determinism.py",
                "-k",
                "cuda and not hundreds",
            ],
            marks=pytest.mark.emulated,
        ),
        pytest.param(["test_rows.py", "-k", "cuda and not random"], marks=pytest.mark.emulated),
    ],
    ids=lambda selection: selection[0],
)
def test_what_holds_for_all_backends(selection):
    """In a process in which the backend takes tensors on the CPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "cuda_emulator", *selection],
        cwd=HERE,
        env={**os.environ, "PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "failed" not in done.stdout


# ---- the two halves of a step ----------------------------------------------------------


def kind_of(cls) -> str:
    return "adamw" if cls is OPTIMIZERS[0] else "sgd"


class Calls:
    """The calls of the library, by name."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self._call = cuda._call
        patch.setattr(cuda, "_call", self.call)

    def call(self, function, *args) -> None:
        self.names.append(function.__name__.removeprefix("adamem_"))
        self._call(function, *args)

    def of_step(self, optimizer) -> list[str]:
        self.names = []
        optimizer.step()
        return self.names


def begin(optimizer, found_inf=None):
    (work,) = optimizer._collect()
    return work, optimizer._begin(work.backend, work.batch, None, found_inf)


@torch.no_grad()
def step_through_the_seam(optimizer) -> None:
    work, rows = begin(optimizer)
    optimizer._finish(work.backend, work.batch, rows, None, None)


def step_both_ways(cls, groups, scope="tensor", **options) -> list[float]:
    """Steps at once and in two halves, asserts that they give the same bits; returns the betas."""
    whole, halves = (
        make_optimizer(cls, groups, "cuda", beta_scope=scope, **options) for _ in range(2)
    )
    betas = []
    for step in range(4):
        set_gradients(whole, halves, step=4 * step)
        whole.step()
        step_through_the_seam(halves)
        assert_same_bits(whole, halves)
        for optimizer in (whole, halves):
            (cache,) = optimizer._kept.caches.values()
            assert not cache["tables"].layout.arrived.any()
        for param in parameters(whole):
            betas += whole.state[param]["beta"].reshape(-1).tolist() if param.numel() > 1 else []
    return betas


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", ["level", "anchored"])
def test_the_two_halves_give_the_bits_of_the_step(cls, dtype, plane):
    """Whether the guess holds or not, and in whatever order blocks run."""
    groups = [Group(SHAPES, dtype)]
    betas = step_both_ways(cls, groups, lr=0.01, weight_decay=0.1, memory_plane=plane)
    assert {0.0 < beta < 0.8 for beta in betas} == {False, True}


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("resident, running", [(1, 1), (2, 2), (7, 7), (7, 2), (40, 5)])
def test_any_number_of_blocks_gives_the_same_bits(cls, resident, running):
    """Running at a time, on threads of the CPU; the others wait until one of them is through."""
    cuda_emulator.set_blocks(resident, running)
    shapes = [*SHAPES, (20 * CHUNK,), (9 * CHUNK + 5,)]
    groups = [Group(shapes), Group([(4 * CHUNK,), (7,)], torch.bfloat16, {"maximize": True})]
    step_both_ways(cls, groups)
    first, second = (make_optimizer(cls, groups, "cuda", beta_scope="tensor") for _ in range(2))
    for step in range(2):
        set_gradients(first, second, step=step)
        cuda_emulator.set_blocks(resident, running)
        first.step()
        cuda_emulator.set_blocks(resident=3, running=1)
        second.step()
    assert_same_bits(first, second)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_block_finishes_more_chunks_than_it_has_threads(cls):
    cuda_emulator.set_blocks(resident=1, running=1)
    step_both_ways(cls, [Group([(3,)] * 600)], memory_plane="anchored")


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_strided_tensors_keep_what_begin_has_updated(cls):
    """They are updated in copies."""
    whole, halves = (
        cls([torch.linspace(-1, 1, 600)[::2].requires_grad_()], backend="cuda") for _ in range(2)
    )
    for step in range(4):
        set_gradients(whole, halves, step=4 * step)
        whole.step()
        step_through_the_seam(halves)
        assert_same_bits(whole, halves)


@pytest.mark.parametrize("skipped", [False, True])
@pytest.mark.parametrize(
    "dtype, options, guesses",
    [
        (torch.float32, {}, True),
        (torch.float64, {}, True),
        (torch.float32, {"memory_plane": "anchored"}, False),
        (torch.float32, {"betas": (0.0, 0.999)}, False),
        (torch.bfloat16, {}, False),
    ],
)
def test_begin_updates_where_it_may_guess_and_leaves_the_scalars(dtype, options, guesses, skipped):
    shapes = [(3 * CHUNK,), (300,)]
    optimizer = make_optimizer(OPTIMIZERS[0], [Group(shapes, dtype)], "cuda", **options)
    set_gradients(optimizer, step=0)
    optimizer.step()
    before = snapshot(optimizer)
    set_gradients(optimizer, step=1)
    _, rows = begin(optimizer, torch.tensor(float(skipped)))
    for old, new in zip(before, snapshot(optimizer), strict=True):
        changed = {name for name in old if not torch.equal(old[name], new[name])}
        assert changed == ({"param", "exp_avg", "exp_avg_sq"} if guesses and not skipped else set())
    assert bool(rows.any()) != skipped


@pytest.mark.parametrize("guesses", [False, True])
def test_finish_leaves_tensors_whose_guess_has_held(guesses):
    """As it is the cap at the first step: what is put wrong behind begin's back stays so."""
    plane = "level" if guesses else "anchored"
    groups = [Group([(2 * CHUNK,), (300,)])]
    optimizer = make_optimizer(OPTIMIZERS[0], groups, "cuda", memory_plane=plane)
    set_gradients(optimizer, step=0)
    work, rows = begin(optimizer)
    for param in parameters(optimizer):
        param.detach().fill_(7.0)
    optimizer._finish(work.backend, work.batch, rows, None, None)
    for param in parameters(optimizer):
        assert bool((param == 7.0).all()) == guesses
        assert optimizer.state[param]["step"] == 1


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("n", [1, 4000])
def test_the_number_of_launches_does_not_grow_with_the_tensors(monkeypatch, cls, scope, n):
    monkeypatch.setattr(cuda, "_call", lambda *args: None)  # 4,000 blocks take their time
    calls = Calls(monkeypatch)
    shapes = [SHAPES[i % 3 + 1] for i in range(n)]
    groups = [Group(shapes[: n // 2]), Group(shapes[n // 2 :])]
    optimizer = make_optimizer(cls, groups, "cuda", beta_scope=scope)
    kind = kind_of(cls)
    sharing = ["share_rows", f"{kind}_beta"] if scope == "global" else []
    expected = [f"{kind}_prepare", f"{kind}_begin", *sharing, f"{kind}_finish"]
    set_gradients(optimizer, step=0)
    loads = [f"{kind}_load", "squares_load"]
    assert calls.of_step(optimizer) == ["longest_row", *loads, *expected]
    assert calls.of_step(optimizer) == expected
    calls.names = []
    step_through_the_seam(optimizer)
    seam = ("prepare", "begin", "prepare", "beta", "finish")
    assert calls.names == [f"{kind}_{name}" for name in seam]
    optimizer.max_grad_norm = 1.0
    assert calls.of_step(optimizer) == ["squares", "squared_norms", *expected]


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_list_of_empty_tensors_counts_its_steps(cls):
    optimizer = make_optimizer(cls, [Group([(0,), (0, 3)])], "cuda", beta_scope="tensor")
    for step in range(2):
        set_gradients(optimizer, step=step)
        optimizer.step()
    assert [optimizer.state[p]["step"].item() for p in parameters(optimizer)] == [2, 2]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1, 3])
def test_alignment_does_not_change_bits(cls, dtype, offset):
    """Beside an aligned address elements are read one by one, and summed in the same order."""
    aligned = make_optimizer(cls, [Group([(2 * CHUNK + 5,)], dtype)], "cuda", weight_decay=0.1)
    (param,) = parameters(aligned)
    shifted = torch.empty(param.numel() + offset, dtype=dtype)[offset:]
    shifted.copy_(param.detach())
    assert (shifted.data_ptr() - param.data_ptr()) % 16 != 0
    other = cls([shifted.requires_grad_()], backend="cuda", weight_decay=0.1)
    for step in range(3):
        set_gradients(aligned, other, step=step)
        aligned.step()
        other.step()
        assert_same_bits(other, aligned)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_new_list_of_tensors_gets_tables_of_its_own(cls):
    """Steps over other tensors in between, and a state that is loaded, leave none behind."""
    optimizer, expected = (
        make_optimizer(cls, [Group(SHAPES)], backend, beta_scope="tensor")
        for backend in ("cuda", "foreach")
    )
    for step in range(6):
        copy_state(expected, optimizer)
        skip = [[], [3, 6], []][step // 2]
        set_gradients(optimizer, expected, step=step, skip=skip)
        optimizer.step()
        expected.step()
        for ours, theirs in zip(parameters(optimizer), parameters(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            assert optimizer.state[ours]["step"] == expected.state[theirs]["step"]


# ---- rows -------------------------------------------------------------------------------

LONGEST = 700  # of the rows that are held, in place of what fits
# Teams of a few lanes, of a warp, of several; one and many chunks; none and single elements.
ROW_SHAPES = [
    *[(40, 16), (3, 17), (5, 3, 3, 7), (600, 24), (9, 256), (70, 260), (7, 700), (1, 40)],
    *[(0, 20), (4, 5), (50,), ()],
    *[(2, 5000), (3, 701), (1, CHUNK + 1), (2, 2, 9000)],  # ordinary units
]


@pytest.fixture
def short_rows(monkeypatch):
    """Rows are long from LONGEST elements on."""
    monkeypatch.setattr(cuda, "_longest_row", lambda device: LONGEST)


def rows_in_use(optimizer) -> list[int]:
    """The buckets' longest rows; 0: ordinary units."""
    (cache,) = optimizer._kept.caches.values()
    return [bucket.row for bucket in cache["tables"].layout.buckets]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", ["level", "anchored"])
def test_rows_agree_with_the_reference(short_rows, cls, dtype, plane):
    groups = [Group(ROW_SHAPES, dtype)]
    reference, ours = (
        make_optimizer(
            cls, groups, name, beta_scope="row", lr=0.01, weight_decay=0.1, memory_plane=plane
        )
        for name in ("reference", "cuda")
    )
    assert_lockstep(reference, ours, 4, conditioned=True)
    held = {1024} if dtype != torch.float64 else set()
    assert {0, 16, 64, 256, 512, *held} <= set(rows_in_use(ours))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("plane", ["level", "anchored"])
def test_the_two_halves_of_rows_give_the_bits_of_the_step(short_rows, cls, dtype, plane):
    betas = step_both_ways(cls, [Group(ROW_SHAPES, dtype)], "row", lr=0.01, memory_plane=plane)
    assert {0.0 < beta < 0.8 for beta in betas} == {False, True}


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rows_as_long_as_a_block_can_hold_agree_with_the_reference(cls, dtype):
    longest = cuda._longest_row(torch.device("cpu"))
    assert longest == 14336
    longest //= 2 if dtype == torch.float64 else 1
    groups = [Group([(2, longest), (2, longest - 1), (2, 4097), (2, longest + 1)], dtype)]
    reference, ours = (
        make_optimizer(cls, groups, name, beta_scope="row", weight_decay=0.1)
        for name in ("reference", "cuda")
    )
    assert_lockstep(reference, ours, 3, conditioned=True)
    expected = [0, 8192] if dtype == torch.float64 else [0, 8192, 16384]
    assert sorted(rows_in_use(ours)) == expected
    step_both_ways(cls, groups, "row")


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("plane", ["level", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("numel", [32, 256, 768, 4096, 14336])
def test_a_step_reads_and_writes_an_element_of_a_row_once(cls, plane, dtype, numel):
    rows = 3
    optimizer = make_optimizer(
        cls, [Group([(rows, numel)], dtype)], "cuda", beta_scope="row", memory_plane=plane
    )
    memories = 4 * (2 if cls is OPTIMIZERS[0] else 1)
    for step in range(3):
        set_gradients(optimizer, step=step)
        cuda_emulator.traffic()
        optimizer.step()
        each = rows * numel
        written = each * (dtype.itemsize + memories)
        assert cuda_emulator.traffic() == (written + each * dtype.itemsize, written)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("resident, running", [(1, 1), (7, 2), (40, 5)])
def test_any_number_of_blocks_gives_the_same_bits_of_rows(short_rows, cls, resident, running):
    groups = [Group(ROW_SHAPES), Group([(900, 33), (2, 1500)], torch.bfloat16)]
    first, second = (make_optimizer(cls, groups, "cuda", beta_scope="row") for _ in range(2))
    for step in range(3):
        set_gradients(first, second, step=step)
        cuda_emulator.set_blocks(resident, running)
        first.step()
        cuda_emulator.set_blocks(resident=3, running=1)
        second.step()
        assert_same_bits(first, second)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", [24, 200, 768])
def test_alignment_does_not_change_bits_of_rows(cls, dtype, numel):
    aligned = make_optimizer(
        cls, [Group([(30, numel)], dtype)], "cuda", beta_scope="row", weight_decay=0.1
    )
    (param,) = parameters(aligned)
    shifted = torch.empty(param.numel() + 3, dtype=dtype)[3:].view(param.shape)
    shifted.copy_(param.detach())
    other = cls([shifted.requires_grad_()], backend="cuda", beta_scope="row", weight_decay=0.1)
    for step in range(3):
        set_gradients(aligned, other, step=step)
        aligned.step()
        other.step()
        assert_same_bits(other, aligned)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("numel", [16, 200, 700, 3000])
def test_the_bits_of_a_row_are_its_own(short_rows, cls, numel):
    """Whichever of a tensor's rows it is, and whatever the others have."""
    whole = make_optimizer(cls, [Group([(21, numel)])], "cuda", beta_scope="row")
    (param,) = parameters(whole)
    part = param.detach()[13:].clone().requires_grad_()
    other = cls([part], backend="cuda", beta_scope="row")
    for step in range(4):
        set_gradients(whole, step=step)
        part.grad = param.grad[13:].clone()
        param.grad[:13] *= 3
        param.grad[2] = torch.nan
        whole.step()
        other.step()
        assert torch.equal(part, param[13:])
        for name, value in other.state[part].items():
            ours = whole.state[param][name]
            assert torch.equal(value, ours[13:] if ours.dim() else ours), name


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("way", ["whole", "halves"])
@pytest.mark.parametrize("numel", [20, 400, 3000])
@pytest.mark.parametrize("idle", [[1], [0, 2], [0, 1, 2]])
def test_a_first_step_at_lr_0_is_none_for_rows_without_a_gradient(
    short_rows, cls, way, numel, idle
):
    """And for the tensor, where no row has one. The next step is the first of those."""
    groups = [Group([(3, numel), (0, numel)])]
    reference, ours = (
        make_optimizer(cls, groups, name, beta_scope="row", lr=0.0)
        for name in ("reference", "cuda")
    )
    for step in range(4):
        set_gradients(reference, ours, step=step)
        if step == 0:
            for optimizer in (reference, ours):
                parameters(optimizer)[0].grad[idle] = 0.0
        else:
            for optimizer in (reference, ours):
                optimizer.param_groups[0]["lr"] = 0.01
        before = snapshot(ours)
        reference.step()
        if way == "whole":
            ours.step()
        else:
            step_through_the_seam(ours)
        if step == 0:
            after = snapshot(ours)
            for row in idle:
                for name in before[0].keys() & after[0].keys():
                    if after[0][name].dim() > 0 and name in before[0]:
                        assert torch.equal(after[0][name][row], before[0][name][row]), name
            steps = [ours.state[param]["step"].item() for param in parameters(ours)]
            assert steps == [float(len(idle) < 3), 0.0]
        for a, b in zip(parameters(ours), parameters(reference), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert ours.state[a]["step"] == reference.state[b]["step"]
            assert ours.state[a]["prev_lr"] == reference.state[b]["prev_lr"]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("lr", [0.0, 0.01])
@pytest.mark.parametrize("taken", [0, 2])
def test_a_skipped_step_of_rows_writes_nothing(short_rows, cls, lr, taken):
    optimizer = make_optimizer(cls, [Group(ROW_SHAPES)], "cuda", beta_scope="row", lr=lr)
    for step in range(taken):
        set_gradients(optimizer, step=step)
        optimizer.step()
    set_gradients(optimizer, step=5)
    (work,) = optimizer._collect()
    before = snapshot(optimizer)
    found_inf = torch.tensor(1.0)
    optimizer._finish(work.backend, work.batch, None, None, found_inf)
    rows = optimizer._begin(work.backend, work.batch, None, found_inf)
    assert not rows.any()
    optimizer._finish(work.backend, work.batch, rows + 1, None, found_inf)
    for old, new in zip(before, snapshot(optimizer), strict=True):
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_begin_writes_nothing_of_rows_that_are_held(cls):
    optimizer = make_optimizer(cls, [Group([(9, 40), (3, 2000)])], "cuda", beta_scope="row")
    for step in range(2):
        set_gradients(optimizer, step=step)
        before = snapshot(optimizer)
        _, rows = begin(optimizer)
        for old, new in zip(before, snapshot(optimizer), strict=True):
            assert all(torch.equal(old[name], new[name]) for name in old)
        optimizer.step()
    assert (rows[:, 1] > 0).all()


@torch.no_grad()
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("given", [False, True])
def test_rows_whose_elements_are_elsewhere_have_betas_too(cls, given):
    """As where columns are sharded and this rank has none: by the rows, or those of no elements."""
    pair = [
        make_optimizer(cls, [Group([(5, 20), (3,)])], name, beta_scope="row")
        for name in ("reference", "cuda")
    ]
    rows = torch.rand(6, 2, dtype=torch.float64) if given else None
    for step in range(3):
        set_gradients(*pair, step=step)
        for optimizer in pair:
            (work,) = optimizer._collect()
            for tensors in work.batch.lists()[: 2 + len(work.batch.memories)]:
                tensors[0] = tensors[0][:, :0]
            optimizer._finish(work.backend, work.batch, rows, None, None)
        states = [optimizer.state[parameters(optimizer)[0]] for optimizer in pair]
        for name in ("step", "prev_lr", "beta", "beta_prod"):
            if name in states[0]:
                torch.testing.assert_close(states[1][name], states[0][name], rtol=1e-6, atol=0.0)
    assert states[1]["beta"].any() == given


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_scopes_in_one_batch_agree_with_the_reference(short_rows, cls):
    shapes = [(5, 60), (3, 900), (40,)]
    groups = [
        Group(shapes, options={"beta_scope": scope, "weight_decay": 0.1 * i})
        for i, scope in enumerate(["row", "global", "tensor", "row", "global"])
    ]
    reference, ours = (make_optimizer(cls, groups, name) for name in ("reference", "cuda"))
    assert_lockstep(reference, ours, 4, conditioned=True)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("n", [1, 2000])
def test_rows_take_no_second_launch(monkeypatch, cls, n):
    monkeypatch.setattr(cuda, "_call", lambda *args: None)
    monkeypatch.setattr(cuda, "_longest_row", lambda device: LONGEST)
    calls = Calls(monkeypatch)
    optimizer = make_optimizer(cls, [Group([(3, 20), (2, 600)] * n)], "cuda", beta_scope="row")
    kind = kind_of(cls)
    set_gradients(optimizer, step=0)
    optimizer.step()
    assert calls.of_step(optimizer) == [f"{kind}_{name}" for name in ("prepare", "begin", "begin")]
    calls.names = []
    step_through_the_seam(optimizer)
    seam = ("prepare", "begin", "begin", "prepare", "beta", "finish", "finish")
    assert calls.names == [f"{kind}_{name}" for name in seam]


# ---- squared norms ----------------------------------------------------------------------


def squared_norms(optimizer) -> torch.Tensor:
    (work,) = optimizer._collect()
    return cuda.squared_norms(work.batch)


def expected_norms(optimizer) -> torch.Tensor:
    return torch.stack([param.grad.double().square().sum() for param in parameters(optimizer)])


@pytest.mark.parametrize("resident, running", [(1, 1), (7, 2), (40, 5)])
def test_norms_of_a_thousand_tensors(short_rows, resident, running):
    """In whatever order blocks run."""
    shapes = [*([(3,), (4, 6), (0,), ()] * 250), *SHAPES, *ROW_SHAPES]
    optimizer = make_optimizer(OPTIMIZERS[0], [Group(shapes)], "cuda", beta_scope="row")
    set_gradients(optimizer, step=0)
    once = squared_norms(optimizer)
    torch.testing.assert_close(once, expected_norms(optimizer), rtol=1.5e-7, atol=0.0)
    cuda_emulator.set_blocks(resident, running)
    assert torch.equal(once, squared_norms(optimizer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3 * CHUNK,), (11, 512), (2, 5000), (1, 14336)])
@pytest.mark.parametrize("value, readings", [(1.0, 1), (1e-30, 2), (1e30, 2), (0.0, 1)])
def test_norms_read_gradients_once_and_again_where_squares_leave_the_range(
    dtype, shape, value, readings
):
    if dtype == torch.float16 and value not in (0.0, 1.0):
        pytest.skip("float16 does not hold it")
    optimizer = make_optimizer(OPTIMIZERS[1], [Group([shape], dtype)], "cuda", beta_scope="row")
    (param,) = parameters(optimizer)
    param.grad = torch.full_like(param, value)
    squared_norms(optimizer)
    cuda_emulator.traffic()
    norms = squared_norms(optimizer)
    # Where all are the same, so are the roundings of a thread's sums.
    torch.testing.assert_close(norms, expected_norms(optimizer), rtol=1e-6, atol=0.0)
    readings = 1 if dtype == torch.float64 else readings
    assert cuda_emulator.traffic() == (readings * param.numel() * dtype.itemsize, 0)


def test_one_launch_more_for_each_dtype_of_gradients_and_none_for_rows(monkeypatch):
    """Buckets of other rows, and of parameters of other dtypes, share one."""
    shapes = [(4, 20), (3, 60), (7,)]
    groups = [Group(shapes), Group([(5,)], torch.bfloat16), Group(shapes, torch.bfloat16)]
    optimizer = make_optimizer(OPTIMIZERS[0], groups, "cuda", beta_scope="row", max_grad_norm=1.0)
    calls = Calls(monkeypatch)
    for _ in range(2):
        set_gradients(optimizer, step=0)
        names = calls.of_step(optimizer)
    assert len(rows_in_use(optimizer)) == 6
    assert names[:3] == ["squares", "squares", "squared_norms"]
    assert "squared_norms" not in names[3:]


def test_norms_without_elements_are_zeros():
    optimizer = make_optimizer(OPTIMIZERS[0], [Group([(0,), (0, 3), (3, 0)])], "cuda")
    set_gradients(optimizer, step=0)
    assert squared_norms(optimizer).tolist() == [0.0] * 3


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_scale_of_doubles_loses_no_digits(cls):
    """As clipping gives it: float64 parameters see all of it."""
    params, scales = [], (torch.tensor(1.0 + 2.0**-40, dtype=torch.float64), torch.tensor(1.0))
    for scale in scales:
        optimizer = make_optimizer(cls, [Group([(300,)], torch.float64)], "cuda", lr=0.1)
        optimizer.grad_scale = scale
        for step in range(2):
            set_gradients(optimizer, step=step)
            optimizer.step()
        params += parameters(optimizer)
    difference = (params[0] - params[1]).abs().max().item()
    assert 1e-16 < difference < 1e-9


# ---- CUDA graphs ------------------------------------------------------------------------


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
def test_kernels_are_loaded_before_a_capture(monkeypatch, cls, dtype, scope):
    """Those too that no step before has launched: CUDA loads a kernel when it is first wanted."""
    cuda_emulator.library().emulation_unload()
    monkeypatch.setattr(cuda_library, "unavailable", lambda: None)
    assert cuda._find_reason(GPU) is None  # as choosing the backend does
    groups = [Group([(3,), (300,), (2, 40)], dtype)]
    optimizer = make_optimizer(cls, groups, "cuda", beta_scope=scope)
    set_gradients(optimizer, step=0)
    calls = Calls(monkeypatch)
    whole, halves = optimizer.step, partial(step_through_the_seam, optimizer)
    clipped = {"squares", "squared_norms"}
    before, captured = (halves, whole) if scope == "global" else (whole, halves)
    before()
    launched = set(calls.names)
    cuda_emulator.play(is_capturing=True)
    monkeypatch.setattr(tables, "is_capturing", lambda device: True)
    captured()
    assert set(calls.names) - launched == (
        {"share_rows"} if scope == "global" else {f"{kind_of(cls)}_beta"}
    )
    optimizer.max_grad_norm = 1.0
    whole()
    assert clipped <= set(calls.names) and not clipped & launched


# ---- the library ------------------------------------------------------------------------


@pytest.fixture
def gpu(monkeypatch):
    """As if there were a GPU, and the library for it; the triton backend is there in any case."""
    monkeypatch.setattr(cuda, "unavailable", is_unavailable)
    monkeypatch.setattr(cuda, "_reasons", {})
    monkeypatch.setattr(cuda_library, "unavailable", lambda: None)
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    monkeypatch.setattr(backends, "_is_made_up", lambda device: False)
    monkeypatch.setattr(overview, "devices", lambda: [(GPU, "a GPU")])


def choose(device: torch.device):
    return backends.choose({"backend": None, "foreach": None, "fused": None}, device)


def test_the_library_runs_where_it_has_code_and_a_driver(gpu, capsys):
    assert choose(GPU) is cuda
    overview.main()
    assert "cuda       available" in capsys.readouterr().out


@pytest.mark.parametrize(
    "played, why",
    [
        ({"driver": 12040}, "CUDA driver version is insufficient for CUDA runtime version"),
        ({"has_code": False}, "no kernel image is available for execution on the device"),
    ],
)
def test_where_the_library_does_not_run_it_says_why_and_the_next_backend_is_taken(
    gpu, capsys, played, why
):
    cuda_emulator.play(**played)
    assert choose(GPU) is triton
    overview.main()
    driver = "12.4" if "driver" in played else "13.0"
    expected = (
        f"compiled with CUDA 13.0, does not run on cuda:0 with a driver of CUDA {driver} ({why})"
    )
    assert expected in capsys.readouterr().out
    # Looked at once, not at every step.
    cuda_emulator.play()
    assert choose(GPU) is triton


def test_a_library_that_does_not_load_or_is_of_older_sources_is_a_reason(gpu, monkeypatch):
    monkeypatch.setattr(cuda, "_library", cuda_library.load)
    for path, why in ((Path(__file__), "invalid ELF header"), (Path(torch._C.__file__), "symbol")):
        monkeypatch.setattr(cuda, "_reasons", {})
        monkeypatch.setattr(cuda_library, "_find", lambda path=path: path)
        reason = is_unavailable(GPU)
        assert reason.startswith("its library does not load (") and why in reason


def test_torch_compile_traces_the_look_at_the_library(gpu):
    is_unavailable(GPU)

    @torch.compile(fullgraph=True, backend="eager")
    def step(x):
        return x + 1 if is_unavailable(GPU) is None else x

    assert step(torch.zeros(1)) == 1


def test_a_failing_launch_is_an_error_that_says_what_failed(monkeypatch):
    step = cuda._step
    monkeypatch.setattr(cuda, "_step", lambda *args: wrong_device(step(*args)))
    optimizer = make_optimizer(OPTIMIZERS[0], [Group([(3,)])], "cuda")
    set_gradients(optimizer, step=0)
    with pytest.raises(RuntimeError, match=r"adamem_adamw_.*: invalid device ordinal"):
        optimizer.step()


def wrong_device(step):
    step.device = 5
    return step


@pytest.fixture
def nothing_compiled(monkeypatch):
    monkeypatch.setattr(cuda_library, "LIBRARY", Path("missing"))
    cuda_library._compile_if_new.cache_clear()
    yield
    cuda_library._compile_if_new.cache_clear()


def test_without_the_library_it_says_how_to_get_it(monkeypatch, nothing_compiled):
    monkeypatch.delenv("ADAMEM_CUDA_JIT", raising=False)
    assert "ADAMEM_CUDA=1" in cuda_library.unavailable()
    monkeypatch.setenv("ADAMEM_CUDA_JIT", "1")
    monkeypatch.setattr(cuda_library, "find_nvcc", lambda: None)
    assert cuda_library.unavailable() == "ADAMEM_CUDA_JIT=1 is set, and no nvcc was found"
    with pytest.raises(RuntimeError, match="no nvcc was found"):
        cuda_library.load()


def test_a_source_checkout_compiles_the_library_once(monkeypatch, tmp_path, nothing_compiled):
    compiled = []

    def compile_library(nvcc, path, numbers):
        compiled.append(path)
        path.write_bytes(b"")

    monkeypatch.setenv("ADAMEM_CUDA_JIT", "1")
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(cuda_library, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(cuda_library, "architectures", lambda nvcc: [90])
    monkeypatch.setattr(cuda_library, "compile_library", compile_library)
    for _ in range(2):
        cuda_library._compile_if_new.cache_clear()
        assert cuda_library.unavailable() is None
    (path,) = compiled
    assert path.is_relative_to(tmp_path)


# ---- operators --------------------------------------------------------------------------

OPERATORS = ("adamw_begin_", "adamw_finish_", "sgd_begin", "sgd_finish_", "squared_norms")
needs_operators = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))


@needs_operators
@pytest.mark.parametrize("name", OPERATORS)
def test_the_operators_have_cuda_kernels(name):
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adamem_fused::{name}", "CUDA")


@needs_operators
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("lr", [0.01, torch.tensor(0.01, dtype=torch.float64)])
def test_the_operators_kernels_do_what_the_backend_does(monkeypatch, cls, lr):
    """The operators' own CPU kernels give way to those for CUDA, which the emulation runs."""
    groups = [Group([(5,), ()], options={"lr": lr}), Group([(3000,)], options={"maximize": True})]
    plain, through = (make_optimizer(cls, groups, "cuda", beta_scope="tensor") for _ in range(2))
    begin, finish = (getattr(cpu, f"{kind_of(cls)}_{half}") for half in ("begin", "finish"))
    for step in range(3):
        set_gradients(plain, through, step=step)
        plain.step()
        with monkeypatch.context() as patch:
            patch.setattr(ops, "call", lambda name, *args: operators.CUDA[name](*args))
            (work,) = through._collect()
            rows = begin(work.batch, None, None) if step == 1 else None
            finish(work.batch, rows, None, None)
        assert_same_bits(through, plain)


@needs_operators
def test_the_operators_norms_are_those_of_the_backend():
    groups = [Group([(5,), (), (0,)], dtype) for dtype in DTYPES] + [Group([(3000,)])]
    optimizer = make_optimizer(OPTIMIZERS[0], groups, "cuda")
    set_gradients(optimizer, step=0)
    parameters(optimizer)[0].grad[1] = 1e30
    grads = [param.grad for param in parameters(optimizer)]
    actual, expected = operators.CUDA["squared_norms"](grads), squared_norms(optimizer)
    torch.testing.assert_close(actual, expected, rtol=3e-7, atol=0.0)


@needs_operators
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    "options", [{"beta_scope": "tensor"}, {"beta_scope": "global"}, {"max_grad_norm": 0.1}], ids=str
)
def test_a_compiled_step_goes_through_the_operators(cls, options):
    """On the CPU these are the cpu backend's."""
    torch._dynamo.reset()
    compiled, plain = (
        make_optimizer(cls, [Group([(4, 5), (3,)])], backend, **options)
        for backend in ("cuda", "cpu")
    )

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step():
        compiled.step()

    for i in range(3):
        set_gradients(compiled, plain, step=i)
        step()
        plain.step()
        for ours, theirs in zip(parameters(compiled), parameters(plain), strict=True):
            torch.testing.assert_close(ours, theirs)
            torch.testing.assert_close(compiled.state[ours]["beta"], plain.state[theirs]["beta"])
