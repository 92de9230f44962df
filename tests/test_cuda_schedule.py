"""The schedule of the cuda backend's one launch, walked by threads in place of blocks."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from cuda_emulator import compile_cpp

HERE = Path(__file__).parent
BLOCKS = [1, 2, 7, 132, 528]


@pytest.fixture(scope="module", params=[[], ["-fsanitize=thread"]], ids=["", "thread-sanitizer"])
def program(request, tmp_path_factory):
    """test_cuda_schedule.cpp; with the sanitizer, which sees what no atomic orders."""
    path = tmp_path_factory.mktemp("schedule") / "schedule"
    return compile_cpp(path, HERE / "test_cuda_schedule.cpp", *request.param)


def walk(
    program: Path, counts: list[int], blocks: int, threads: int, ahead: int, launches: int = 3
) -> list[tuple[int, int]]:
    """The items, after they were walked; 30 s without an end are a deadlock."""
    command = [str(program), *map(str, (blocks, threads, launches, ahead, *counts))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr[-2000:]
    return [tuple(map(int, line.split())) for line in done.stdout.splitlines()]


def random_counts(seed: int) -> list[int]:
    """Numbers of chunks: none, one, a few, and more than the sums are ahead by."""
    generator = random.Random(seed)
    kinds = [(0, 0), (1, 1), (2, 9), (60, 300)]
    return [generator.randint(*generator.choice(kinds)) for _ in range(generator.randint(1, 40))]


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("ahead", [0, 1, 50])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_chunk_is_summed_once_and_then_updated_once(program, blocks, ahead, seed):
    walk(program, random_counts(seed), blocks, min(blocks, 16), ahead)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("ahead", [0, 5])
def test_blocks_that_are_not_running_are_not_waited_for(program, threads, ahead):
    """As where other work has taken a part of the GPU: a cooperative launch would not start."""
    for seed in range(4):
        walk(program, random_counts(seed), 64, threads, ahead)


@pytest.mark.parametrize("ahead", [0, 3, 1000])
def test_updates_follow_their_sums_backwards(program, ahead):
    counts = [4, 0, 9, 1, 30, 2]
    items = walk(program, counts, 2, 2, ahead)
    assert sorted(items) == sorted(
        [(i, c) for i, n in enumerate(counts) for c in range(max(1, n))]
        + [(i, ~c) for i, n in enumerate(counts) for c in range(n)]
    )
    sums = [item for item in items if item[1] >= 0]
    assert sums == [(i, c) for i, n in enumerate(counts) for c in range(max(1, n))]
    updates = [(i, ~c) for i, c in items if c < 0]
    assert updates == [(i, c) for i, n in enumerate(counts) for c in reversed(range(n))]
    for i, n in enumerate(counts):
        if n:
            begin = items.index((i, ~(n - 1)))
            summed = sum(c >= 0 for _, c in items[:begin])
            end = sum(max(1, m) for m in counts[: i + 1])
            assert summed == min(len(sums), end + ahead), "the sums are not ahead as they should be"


def test_a_list_without_elements_has_its_betas_set(program):
    assert walk(program, [0, 0], 3, 3, 1) == [(0, 0), (1, 0)]
