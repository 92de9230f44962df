"""The cpu backend gives the same bits, whatever the threads, the call and the neighbours."""

import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_same_bits,
    backends,
    bits,
    make_optimizer,
    parameters,
    set_gradients,
)

from adamem_fused import AMAdamW
from adamem_fused.backends import cpu

pytestmark = pytest.mark.skipif(
    cpu.unavailable(torch.device("cpu")) is not None, reason=str(cpu.ops.unavailable)
)

# Small, medium and large ones for the cpu backend's schedule, many more than threads.
SHAPES = ((300_001,), (5,), (33_000,), (), (0, 2), (70_000,), (16_385,), *((100,),) * 40)
SHAPES += ((65_536,), (65_537,), (12_289,))
STEPS = 4


def optimizer_after(cls, shapes=SHAPES, threads=2, backend="cpu", steps=STEPS, **options):
    torch.set_num_threads(threads)
    optimizer = make_optimizer(cls, [Group(shapes)], backend, weight_decay=0.1, **options)
    for step in range(steps):
        set_gradients(optimizer, step=step)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_any_number_of_threads_gives_the_same_bits(cls, scope):
    one = optimizer_after(cls, threads=1, beta_scope=scope)
    for threads in (2, 3, 16):
        assert_same_bits(optimizer_after(cls, threads=threads, beta_scope=scope), one)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_any_number_of_threads_gives_the_same_bits_in_other_dtypes(cls, dtype):
    results = []
    for threads in (1, 16):
        torch.set_num_threads(threads)
        results.append(make_optimizer(cls, [Group(SHAPES, dtype)], "cpu", weight_decay=0.1))
        for step in range(STEPS):
            set_gradients(results[-1], step=step)
            results[-1].step()
    assert_same_bits(*results)


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_two_runs_give_the_same_bits(backend, cls, scope):
    runs = [optimizer_after(cls, backend=backend, steps=2, beta_scope=scope) for _ in range(2)]
    assert_same_bits(*runs)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("threads", [1, 2])
def test_the_seam_and_the_single_call_give_the_same_bits(cls, threads):
    """Where a tensor's rows are its own, begin and finish give what finish without rows gives."""
    through_seam, at_once = (
        optimizer_after(cls, threads=threads, beta_scope="tensor") for _ in range(2)
    )
    set_gradients(through_seam, at_once, step=STEPS)
    kind = "adamw" if cls is AMAdamW else "sgd"
    begin, finish = getattr(cpu, f"{kind}_begin"), getattr(cpu, f"{kind}_finish")
    with torch.no_grad():
        (work,) = through_seam._collect()
        finish(work.batch, begin(work.batch, None, None), None, None)
    at_once.step()
    assert_same_bits(through_seam, at_once)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_tensor_does_not_depend_on_its_neighbours(cls):
    """Alone, in another order or among others: the same bits, where each has its own beta."""
    together = optimizer_after(cls, beta_scope="tensor")
    for i in (0, 1, 2, 3, 6, 20, 47, 48, 49):
        params = [parameters(make_optimizer(cls, [Group(SHAPES)]))[i]]
        alone = cls(params, backend="cpu", weight_decay=0.1, beta_scope="tensor")
        backwards = make_optimizer(cls, [Group(SHAPES)], "cpu")
        for step in range(STEPS):
            set_gradients(backwards, step=step)
            params[0].grad = parameters(backwards)[i].grad
            alone.step()
        assert torch.equal(bits(params[0]), bits(parameters(together)[i]))

    source = make_optimizer(cls, [Group(SHAPES)])
    reverse = cls(parameters(source)[::-1], backend="cpu", weight_decay=0.1, beta_scope="tensor")
    for step in range(STEPS):
        set_gradients(source, step=step)
        reverse.step()
    for ours, theirs in zip(parameters(reverse)[::-1], parameters(together), strict=True):
        assert torch.equal(bits(ours), bits(theirs))
        for name, value in together.state[theirs].items():
            assert torch.equal(bits(reverse.state[ours][name]), bits(value))
