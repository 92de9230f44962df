"""A step where only a GPU shows it: the bits of both halves apart, streams, a busy GPU, devices."""

from __future__ import annotations

import pytest
import torch
from test_gpu_cases import with_seam

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPTIMIZERS = [AMAdamW, AMSGD]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
# With tensors that L2 holds and one that it does not, of many chunks each.
SHAPES = [(0,), (), (3,), (2048,), (2049,), (1000, 1000), (77,), (3000, 6000), (300, 70)]
# Rows that several are held of, of lengths that allow 16-byte accesses or not; longer ones; none.
ROWS = [(7,), (5000, 16), (64, 3, 7, 7), (500, 768), (300, 4608), (100, 8192), (9, 20_000), (0, 20)]
BY_SCOPE = [("tensor", SHAPES), ("row", ROWS)]


@pytest.fixture(params=["triton", "cuda"])
def backend(request) -> str:
    reason = BACKENDS[request.param].unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def make(backend, cls, shapes=SHAPES, dtypes=(torch.float32,), device="cuda", **options):
    generator = torch.Generator().manual_seed(0)
    params = [
        torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()
        for dtype in dtypes
        for shape in shapes
    ]
    options.setdefault("beta_scope", "tensor")
    return params, cls(params, lr=0.05, backend=backend, **options)


def train(params, optimizer, steps=3) -> list[torch.Tensor]:
    for step in range(steps):
        for i, param in enumerate(params):
            generator = torch.Generator(param.device).manual_seed(100 * step + i)
            noise = torch.randn(param.shape, generator=generator, device=param.device)
            param.grad = (param.detach() + noise).to(param.dtype)
        optimizer.step()
    state = [value for param in params for value in optimizer.state[param].values()]
    return [tensor.cpu() for tensor in (*(param.detach() for param in params), *state)]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
@pytest.mark.parametrize("scope, shapes", BY_SCOPE)
def test_a_step_with_a_seam_gives_the_bits_of_one_without(
    backend, cls, dtypes, scope, shapes, monkeypatch
):
    whole = train(*make(backend, cls, shapes, dtypes, beta_scope=scope))
    with_seam(backend, monkeypatch)
    halves = train(*make(backend, cls, shapes, dtypes, beta_scope=scope))
    assert all(map(torch.equal, whole, halves))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope, shapes", BY_SCOPE)
def test_many_steps_give_the_same_bits_again(backend, cls, scope, shapes):
    """A program that reads what another has not finished writing would show here."""
    first = train(*make(backend, cls, shapes, beta_scope=scope), steps=30)
    for _ in range(3):
        again = train(*make(backend, cls, shapes, beta_scope=scope), steps=30)
        assert all(map(torch.equal, first, again))


@pytest.mark.parametrize("dtypes", [*((dtype,) for dtype in DTYPES), DTYPES], ids=str)
@pytest.mark.parametrize("scope, shapes", BY_SCOPE)
def test_squared_norms_are_those_of_doubles_and_the_same_bits_again(backend, dtypes, scope, shapes):
    params, optimizer = make(backend, AMSGD, shapes, dtypes, beta_scope=scope)
    for param in params:
        param.grad = torch.randn_like(param)
    found = []
    for _ in range(5):
        (work,) = optimizer._collect()
        found.append(work.backend.squared_norms(work.batch))
    expected = torch.stack([param.grad.double().square().sum() for param in params])
    torch.testing.assert_close(found[0], expected, rtol=1e-6, atol=0.0)
    assert all(torch.equal(found[0], again) for again in found[1:])


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_rows_give_the_same_bits_wherever_they_begin(backend, cls):
    """With 16-byte accesses and without: the order of a row's sums is one."""
    results = []
    for offset in (0, 1):
        params = []
        for shape in ((30, 64), (3, 4608)):
            numel = shape[0] * shape[1]
            generator = torch.Generator().manual_seed(0)
            buffer = torch.empty(numel + 1, device="cuda")[offset : numel + offset].view(shape)
            params.append(buffer.copy_(torch.randn(shape, generator=generator)).requires_grad_())
        results.append(train(params, cls(params, lr=0.05, backend=backend, beta_scope="row")))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_steps_on_streams_beside_each_other_give_the_same_bits(backend, cls):
    expected = train(*make(backend, cls))
    sides = [make(backend, cls) for _ in range(3)]
    streams = [torch.cuda.Stream() for _ in sides]
    for step in range(3):
        for (params, optimizer), stream in zip(sides, streams, strict=True):
            with torch.cuda.stream(stream):
                for i, param in enumerate(params):
                    generator = torch.Generator("cuda").manual_seed(100 * step + i)
                    noise = torch.randn(param.shape, generator=generator, device="cuda")
                    param.grad = param.detach() + noise
                optimizer.step()
    torch.cuda.synchronize()
    for params, optimizer in sides:
        state = [value for param in params for value in optimizer.state[param].values()]
        actual = [*(param.detach() for param in params), *state]
        assert all(torch.equal(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


def test_a_busy_gpu_does_not_stop_a_step(backend):
    expected = train(*make(backend, AMAdamW))
    matrix = torch.randn(8192, 8192, device="cuda")
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(30):
            matrix = matrix @ matrix * 1e-2
    assert all(map(torch.equal, expected, train(*make(backend, AMAdamW))))


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_every_device_is_its_own(backend, cls):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    first = train(*make(backend, cls, device="cuda:0"))
    # With another device current.
    second = train(*make(backend, cls, device="cuda:1"))
    assert all(map(torch.equal, first, second))
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("backend", ["cuda"], indirect=True)
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("max_grad_norm", [None, 1.0])
def test_a_compiled_step_is_the_step(backend, cls, max_grad_norm):
    params, optimizer = make(backend, cls, max_grad_norm=max_grad_norm)
    twins, twin = make(backend, cls, max_grad_norm=max_grad_norm)
    compiled = torch.compile(optimizer.step, fullgraph=True)
    for step in range(3):
        for i, (param, other) in enumerate(zip(params, twins, strict=True)):
            generator = torch.Generator("cuda").manual_seed(100 * step + i)
            noise = torch.randn(param.shape, generator=generator, device="cuda")
            param.grad, other.grad = noise, noise.clone()
        compiled()
        twin.step()
    for param, other in zip(params, twins, strict=True):
        torch.testing.assert_close(param, other)
