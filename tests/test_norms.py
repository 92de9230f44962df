"""squared_norms: each gradient's sum of squares, of any size, value, dtype and layout."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import random_tensor

from adamem_fused.backends import ops

pytestmark = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))

BLOCK, CHUNK = 1024, 2**14  # of csrc/cpu: what is summed in float32, and by one thread
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (
    *range(71),
    *(size + more for size in (BLOCK, 2 * BLOCK) for more in (-17, -1, 0, 1, 15, 16, 17, 33)),
    *(size + more for size in (CHUNK, 2 * CHUNK, 3 * CHUNK) for more in (-1, 0, 1, 33)),
)
# Rounding of 32 additions in float32, of which each is half an ulp at most.
TOLERANCE = dict.fromkeys(DTYPES, 1e-6) | {torch.float64: 1e-14}


def squared_norms(*grads):
    return ops.call("squared_norms", list(grads))


def exact(grad):
    return float(grad.detach().double().square().sum())


def assert_right(grads):
    for grad, found in zip(grads, squared_norms(*grads).tolist(), strict=True):
        assert found == pytest.approx(exact(grad), rel=TOLERANCE[grad.dtype], abs=0.0), grad.shape


# ---- sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_of_any_size(dtype):
    assert_right([random_tensor((size,), dtype, seed=size) for size in SIZES])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_element_counts_once(dtype):
    for size in (1, 15, 16, 17, 31, 32, 33, 63, 70, BLOCK + 17):
        one_each = [row.clone() for row in torch.eye(size, dtype=dtype)]
        assert squared_norms(*one_each).tolist() == [1.0] * size
    for size in SIZES:
        grad = torch.ones(size, dtype=dtype)
        places = {*range(0, size, CHUNK), *range(CHUNK - 1, size, CHUNK), size - 1}
        grad[sorted(places - {-1})] = 3.0
        assert squared_norms(grad).item() == size + 8 * len(places - {-1})


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_beside_a_tensor_is_read_wherever_it_begins(dtype):
    around = torch.full((CHUNK + 200,), torch.nan, dtype=dtype)
    grads = []
    for size in (1, 2, 7, 15, 16, 17, 31, 33, 64, 70, BLOCK + 5, CHUNK + 3):
        for begin in (*range(1, 18), 31, 33):
            around.fill_(torch.nan)
            around[begin : begin + size] = random_tensor((size,), dtype, seed=begin)
            assert_right([around[begin : begin + size]])
            grads.append(size)
    assert len(grads) == 12 * 19


def test_of_no_tensors_and_of_none_with_elements():
    assert squared_norms().shape == (0,)
    found = squared_norms(torch.empty(0), torch.empty(3, 0), torch.tensor(-2.0))
    assert found.dtype == torch.float64
    assert found.tolist() == [0.0, 0.0, 4.0]


def test_of_thousands_of_tensors_in_all_dtypes():
    sizes = [(37 * i) % 90 for i in range(1500)] + [CHUNK + 5, 5 * CHUNK]
    assert_right(
        [random_tensor((size,), DTYPES[i % 4], seed=i % 50) for i, size in enumerate(sizes)]
    )


# ---- values ---------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 70, CHUNK + 70])
def test_of_any_magnitude(dtype, size):
    values = random_tensor((size,), torch.float64, seed=1)
    scales = [10.0**power for power in range(-38, 37)]
    for scale in scales:
        assert_right([(scale * values).to(dtype)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_and_large_beside_each_other(dtype):
    for small in (1e-38, 1e-30, 1e-20, 1e-13, 1e-12):
        for large in (1e-12, 1e-11, 1.0, 1e18, 1e20, 1e38):
            grad = torch.full((CHUNK + 1000,), small, dtype=dtype)
            assert_right([grad])
            for place in (0, BLOCK + 1, CHUNK - 1, CHUNK, CHUNK + 999):
                grad[place] = large
                assert_right([grad])


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_smallest_and_the_largest_numbers(dtype):
    finfo = torch.finfo(dtype)
    smallest = finfo.smallest_normal * finfo.eps  # subnormal
    values = (smallest, 3 * smallest, finfo.smallest_normal, finfo.max, finfo.min)
    if dtype == torch.float64:
        values = (1e-150, 1e150, -1e150)  # as squares are in float64 too
    for value in values:
        grad = torch.full((40,), value, dtype=dtype)
        assert grad[0] != 0.0
        assert_right([grad])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_is_in_its_tensors_norm_only(dtype, bad):
    for size in (1, 16, 33, 70, BLOCK + 17, 2 * CHUNK + 33):
        for place in {0, size // 2, size - 1}:
            grads = [random_tensor((size,), dtype, seed=i) for i in range(3)]
            grads[1][place] = bad
            found = squared_norms(*grads)
            assert found[[0, 2]].isfinite().all()
            assert found[1].isnan() if bad != bad else found[1] == torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_no_number_outweighs_the_infinite(dtype):
    for size in (2, 70, 2 * CHUNK):
        for first in (0, size - 1):
            grad = torch.ones(size, dtype=dtype)
            grad[first], grad[size - 1 - first] = torch.inf, torch.nan
            assert squared_norms(grad).isnan().all()


# ---- layouts --------------------------------------------------------------------------

LAYOUTS = {
    "transposed": lambda t: t.t(),
    "every other column": lambda t: t[:, ::2],
    "every other row": lambda t: t[::2],
    "expanded": lambda t: t[:, :1].expand(-1, 7),
    "expanded scalar": lambda t: t[0, 0].expand(40, 50),
    "channels last": lambda t: t.view(12, 5, 3, 20).to(memory_format=torch.channels_last),
    "overlapping": lambda t: t.as_strided((30, 40), (1, 1)),
    "negated view": torch._neg_view,
    "with a graph": lambda t: t.requires_grad_() * 1.0,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_any_layout(layout, dtype):
    grad = LAYOUTS[layout](random_tensor((60, 60), dtype))
    found = squared_norms(torch.ones(3), grad)
    assert not found.requires_grad
    assert found.tolist() == pytest.approx([3.0, exact(grad)], rel=TOLERANCE[dtype])


# ---- the same bits --------------------------------------------------------------------


def some_grads():
    sizes = [*range(600), CHUNK - 1, CHUNK, CHUNK + 1, 7 * CHUNK + 33, 20 * CHUNK]
    grads = [random_tensor((size,), dtype, seed=size) for dtype in DTYPES for size in sizes]
    return [*grads, 1e-20 * random_tensor((2 * CHUNK,)), 1e25 * random_tensor((2 * CHUNK,))]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def test_the_same_bits_with_any_number_of_threads(threads):
    grads, found = some_grads(), []
    for count in (1, 2, 3):
        threads(count)
        found.append(squared_norms(*grads))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_instruction_sets_agree_and_those_with_fma_to_the_bit(tmp_path):
    if not torch.cpu._is_avx512_supported():
        pytest.skip("this machine has no avx512")
    torch.save(some_grads(), tmp_path / "grads.pt")  # random numbers differ too
    found = {}
    for capability in ("default", "avx2", "avx512"):
        path = tmp_path / f"{capability}.pt"
        subprocess.run(
            [sys.executable, "-c", f"import test_norms; test_norms.save({str(path)!r})"],
            env=os.environ | {"ATEN_CPU_CAPABILITY": capability},
            cwd=Path(__file__).parent,
            check=True,
        )
        found[capability] = torch.load(path)
    assert torch.equal(found["avx2"], found["avx512"])
    torch.testing.assert_close(found["default"], found["avx2"], rtol=1e-6, atol=0.0)


def save(path):
    assert torch.backends.cpu.get_cpu_capability().lower() == Path(path).stem
    torch.save(squared_norms(*torch.load(Path(path).with_name("grads.pt"))), path)


# ---- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        (torch.ones(3, dtype=torch.int64), TypeError, "grad 1 has dtype Long"),
        (torch.ones(3, dtype=torch.complex64), TypeError, "grad 1 has dtype ComplexFloat"),
        (torch.ones(3, device="meta"), ValueError, "grad of tensor 1 is on meta"),
        (torch.ones(3).to_sparse(), NotImplementedError, "SparseCPU"),
        (3.0, TypeError, "a list of tensors holds a float"),
    ],
)
def test_what_has_no_norm_here_is_an_error(bad, error, message):
    with pytest.raises(error, match=message):
        squared_norms(torch.ones(2), bad)


def test_a_list_of_two_devices_is_an_error_of_the_operator_too():
    with pytest.raises(ValueError, match="grad of tensor 1 is on meta"):
        torch.ops.adamem_fused.squared_norms([torch.ones(2), torch.ones(2, device="meta")])


def test_on_meta_it_has_the_right_shape():
    found = torch.ops.adamem_fused.squared_norms([torch.ones(2, device="meta")] * 3)
    assert (found.shape, found.dtype, found.device.type) == ((3,), torch.float64, "meta")
