"""The order of a GPU step in one launch, and that no order of its programs can go wrong."""

from __future__ import annotations

import random

import pytest

from adamem_fused.backends.schedule import make_items


def items_of(counts: list[int], ahead: int) -> list[tuple[int, int]]:
    return [tuple(item) for item in make_items([*range(len(counts))], counts, ahead).tolist()]


@pytest.mark.parametrize("ahead", [0, 3, 1000])
@pytest.mark.parametrize("counts", [[4, 0, 9, 1, 30, 2], [0, 0], [1], [0, 3, 0]])
def test_updates_follow_their_sums_backwards(counts, ahead):
    items = items_of(counts, ahead)
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


def test_tensors_go_by_their_names():
    assert make_items([7, 2], [1, 2], ahead=0).tolist() == [
        [7, 0], [7, ~0], [2, 0], [2, 1], [2, ~1], [2, ~0],
    ]  # fmt: skip


class Launch:
    """The words that programs meet at. A program is a generator: one atomic operation a turn."""

    def __init__(self, counts: list[int], items: list[tuple[int, int]]) -> None:
        self.counts, self.items = counts, items
        self.next = 0
        self.summed = [0] * len(counts)
        self.published = [False] * len(counts)
        self.updated: list[tuple[int, int]] = []

    def program(self):
        while True:
            k, self.next = self.next, self.next + 1
            yield
            if k >= len(self.items):
                return
            i, chunk = self.items[k]
            if chunk >= 0:
                self.summed[i] += 1
                is_last = self.summed[i] == max(1, self.counts[i])
                yield
                if is_last:
                    assert not self.published[i]
                    self.published[i] = True
            else:
                while not self.published[i]:
                    yield
                assert self.summed[i] == self.counts[i]
                self.updated.append((i, ~chunk))
            yield


@pytest.mark.parametrize("programs", [1, 2, 7, 132])
@pytest.mark.parametrize("resident", [1, 3, 132])
def test_programs_in_any_order_come_to_the_end(programs, resident):
    """Of which so many run at a time; the others start when one of these is through."""
    generator = random.Random(programs)
    for ahead in (0, 1, programs):
        counts = [generator.choice([0, 1, 2, 5, 40]) for _ in range(12)]
        launch = Launch(counts, items_of(counts, ahead))
        waiting = [launch.program() for _ in range(programs)]
        running = [waiting.pop() for _ in range(min(resident, programs))]
        for _ in range(100_000):
            if not running:
                break
            turn = generator.randrange(len(running))
            if next(running[turn], "through") == "through":
                running.pop(turn)
                if waiting:
                    running.append(waiting.pop())
        assert not running, "a deadlock"
        assert sorted(launch.updated) == [(i, c) for i, n in enumerate(counts) for c in range(n)]
        assert all(launch.published)
