"""In the place of the tests marked gpu: one of each outcome."""

import pytest

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_of_a_backend(backend):
    pass


def test_that_is_skipped():
    pytest.skip("needs two GPUs")


@pytest.mark.slow
def test_of_large_tensors():
    pass
