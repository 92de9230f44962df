"""A step with fake tensors, and recorded by make_fx, as memory trackers and compilers take it."""

import pytest
import torch
from cases import OPTIMIZERS, Group, bits, make_optimizer, parameters, set_gradients
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from adamem_fused.backends import cpu, cuda, triton

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(cpu.unavailable(CPU) is not None, reason=str(cpu.unavailable(CPU)))

both = pytest.mark.parametrize("cls", OPTIMIZERS)
each_option = pytest.mark.parametrize(
    "options",
    [
        {"beta_scope": "tensor"},
        {"beta_scope": "row"},
        {"beta_scope": "global"},
        {"beta_scope": "global", "gap": "loss"},
    ],
    ids=["tensor", "row", "global", "loss"],
)


@pytest.fixture(params=["cpu", "cuda", "foreach"])
def backend(request, monkeypatch):
    # For tensors on the CPU too: its kernels are not to be met here.
    monkeypatch.setattr(cuda, "unavailable", lambda device: None)
    return request.param


def make(cls, backend, **options):
    groups = [Group([(3, 16), (), (5, 4, 4)]), Group([(5,), (2, 17)])]
    return make_optimizer(cls, groups, backend, **options)


def tensors(optimizer):
    """Every parameter, its gradient, and its state by name."""
    return [
        {"param": param.detach(), "grad": param.grad}
        | {name: optimizer.state[param][name] for name in (*optimizer.memories, *optimizer.scalars)}
        for param in parameters(optimizer)
    ]


@both
@each_option
def test_a_step_with_fake_tensors(cls, backend, options):
    with FakeTensorMode():
        optimizer = make(cls, backend, lr=0.1, **options)
        for step in range(2):
            set_gradients(optimizer, step=step)
            optimizer.step(lambda: 1.0)
        for values in tensors(optimizer):
            assert all(isinstance(value, FakeTensor) for value in values.values())


@both
def test_fake_sums_are_by_segment(cls, backend):
    with FakeTensorMode(), torch.no_grad():
        optimizer = make(cls, backend, beta_scope="row")
        set_gradients(optimizer, step=0)
        (work,) = optimizer._collect()
        rows = optimizer._begin(work.backend, work.batch, None, None)
        assert rows.shape == (3 + 1 + 5 + 1 + 2, 2)


@both
def test_a_learning_rate_that_is_a_fake_tensor(cls, backend):
    with FakeTensorMode():
        optimizer = make(cls, backend, lr=torch.tensor(0.1))
        set_gradients(optimizer, step=0)
        optimizer.step()


@both
@each_option
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_a_recorded_step_is_the_step(cls, backend, options, mode):
    # The cuda backend's operators are the cpu backend's for tensors on the CPU.
    expected = make(cls, "foreach" if backend == "foreach" else "cpu", lr=0.1, **options)
    set_gradients(expected, step=0)
    expected.step(lambda: 1.0)
    set_gradients(expected, step=1)
    groups = expected.param_groups

    def step(values):
        """In place, on the parameters, gradients and state that it is given."""
        given = iter(values)
        optimizer = cls(
            [
                {**g, "params": [next(given)["param"] for _ in g["params"]], "backend": backend}
                for g in groups
            ]
        )
        for param, own in zip(parameters(optimizer), values, strict=True):
            param.grad = own["grad"]
            optimizer.state[param] = {k: own[k] for k in own if k not in ("param", "grad")}
        optimizer.step(lambda: 1.0)
        return [own["param"] for own in values]

    values = [{k: t.clone() for k, t in own.items()} for own in tensors(expected)]
    graph = make_fx(step, tracing_mode=mode)(
        [{k: t.clone() for k, t in own.items()} for own in tensors(expected)]
    )
    for param in parameters(expected):
        expected.state[param].pop("prev_loss", None)
    graph(values)
    expected.step(lambda: 1.0)
    for own, theirs in zip(values, tensors(expected), strict=True):
        for name, value in own.items():
            assert torch.equal(bits(value), bits(theirs[name])), name


@both
def test_triton_kernels_are_not_lost_in_silence(monkeypatch, cls):
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(triton, "unavailable", lambda device: None)
    with FakeTensorMode():
        optimizer = make(cls, "triton")
        set_gradients(optimizer, step=0)
        with pytest.raises(RuntimeError, match="triton backend cannot be traced"):
            optimizer.step()
        assert not optimizer.state


@both
def test_fake_tensors_on_a_gpu_that_is_not_there(cls):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with FakeTensorMode():
        param = torch.ones(3, 4, device="cuda", requires_grad=True)
        for name in ("cuda", "triton"):
            with pytest.raises(RuntimeError, match=f"backend='{name}' is not available: there is"):
                cls([param], backend=name)
        optimizer = cls([param], beta_scope="tensor")
        for _ in range(2):
            param.grad = torch.ones_like(param)
            optimizer.step()
        assert optimizer.state[param]["beta"].device == param.device
