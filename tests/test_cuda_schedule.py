"""The schedule of the cuda backend's one launch, walked by threads in place of blocks."""

from __future__ import annotations

import random
import subprocess
from pathlib import Path

import pytest
from cuda_emulator import compile_cpp

from adamem_fused.backends.schedule import make_items

HERE = Path(__file__).parent
BLOCKS = [1, 2, 7, 132, 528]


@pytest.fixture(scope="module", params=[[], ["-fsanitize=thread"]], ids=["", "thread-sanitizer"])
def program(request, tmp_path_factory):
    """test_cuda_schedule.cpp; with the sanitizer, which sees what no atomic orders."""
    path = tmp_path_factory.mktemp("schedule") / "schedule"
    return compile_cpp(path, HERE / "test_cuda_schedule.cpp", *request.param)


def walk(program: Path, counts: list[int], blocks: int, threads: int, ahead: int) -> None:
    """Three launches; 30 s without an end are a deadlock."""
    items = make_items([*range(len(counts))], counts, ahead).tolist()
    command = [str(program), *map(str, (blocks, threads, 3, *counts))]
    text = "".join(f"{tensor} {chunk}\n" for tensor, chunk in items)
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr[-2000:]


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


def test_a_list_without_elements_has_its_betas_set(program):
    walk(program, [0, 0], 3, 3, 1)
