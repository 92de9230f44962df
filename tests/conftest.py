"""Settings of the whole test run."""

import os
from collections.abc import Iterator

# Threads that spin while they wait take a shared machine's cores from those that work. To be
# said before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import hypothesis
import pytest
import torch
from ranks import Ranks

from adamem_fused.backends import BACKENDS

# The same examples on every run and every machine; no deadline, since machines differ in speed.
hypothesis.settings.register_profile(
    "tests", derandomize=True, deadline=None, max_examples=20, print_blob=True
)
hypothesis.settings.load_profile("tests")


# Files that take a minute or more. Begun last, one runs while other workers have nothing to do.
LONG = ("test_cuda.py", "test_foreach.py", "test_triton.py", "test_triton_aot.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_report_header() -> list[str]:
    cpu = torch.device("cpu")
    reasons = {name: backend.unavailable(cpu) for name, backend in BACKENDS.items()}
    return [f"backend {name} on the CPU: {reason or 'yes'}" for name, reason in reasons.items()]


@pytest.fixture(autouse=True)
def threads_as_before():
    threads = torch.get_num_threads()
    yield
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


def of_ranks(size: int) -> Iterator[Ranks]:
    """Processes that start with a file's first test that needs them, and end with its last."""
    ranks = Ranks(size)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def two_ranks():
    yield from of_ranks(2)


@pytest.fixture(scope="module")
def three_ranks():
    yield from of_ranks(3)


@pytest.fixture(scope="module")
def four_ranks():
    yield from of_ranks(4)
