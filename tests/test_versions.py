"""A step tells autograd that it has written to parameters and state, whatever the backend.

Else a graph that still needs their old values gives wrong gradients. test_triton.py and
test_cuda.py run this file too, in processes in which their backends take tensors on the CPU.
"""

import pytest
import torch
from cases import OPTIMIZERS, Group, backends, make_optimizer, parameters, random_tensor, take_step
from torch.utils._python_dispatch import TorchDispatchMode

from adamem_fused.backends import cpu, ops

both = pytest.mark.parametrize("cls", OPTIMIZERS)
each_backend = pytest.mark.parametrize("backend", backends())
# Backends without kernels of their own tell it through torch's operators.
KERNELS = {"cpu", "cuda", "triton"}
each_with_kernels = pytest.mark.parametrize(
    "backend", [param for param in backends() if param.values[0] in KERNELS]
)


def versions(optimizer):
    """Of each parameter and its state; prev_loss is a new tensor at every step."""
    return [
        {"param": param._version}
        | {k: t._version for k, t in optimizer.state[param].items() if k != "prev_loss"}
        for param in parameters(optimizer)
    ]


def set_gradients(optimizer):
    for param in parameters(optimizer):
        param.grad = torch.ones_like(param)


def assert_all_rise(optimizer, step=None):
    """In two steps: the first, which makes state, and the next."""
    for _ in range(2):
        set_gradients(optimizer)
        before = versions(optimizer)
        (step or optimizer.step)()
        for old, new in zip(before, versions(optimizer), strict=True):
            assert len(new) > 4
            for name in new:
                assert new[name] > old.get(name, 0), name


@both
@each_backend
def test_a_graph_from_before_a_step_raises(cls, backend):
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = cls([x], lr=0.1, backend=backend)
    for _ in range(2):
        a, b = (x**2).sum(), (x**3).sum()
        a.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            b.backward()


@both
@each_backend
@pytest.mark.parametrize(
    "options", [{"beta_scope": "tensor"}, {"beta_scope": "global"}, {"gap": "loss"}], ids=str
)
def test_all_that_a_step_changes_rises(cls, backend, options):
    if "gap" in options:
        options = {**options, "beta_scope": "global"}
    optimizer = make_optimizer(cls, [Group([(3, 4), ()]), Group([(7,)])], backend, **options)
    assert_all_rise(optimizer, lambda: take_step(optimizer, 0))


@both
@each_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64], ids=str)
def test_whatever_the_dtype(cls, backend, dtype):
    assert_all_rise(make_optimizer(cls, [Group([(3, 4)], dtype)], backend))


@both
@each_backend
def test_a_strided_parameter_and_the_tensor_it_is_a_view_of(cls, backend):
    base = random_tensor((4, 6))
    optimizer = cls([base[:, ::2].requires_grad_()], backend=backend)
    before = base._version
    assert_all_rise(optimizer)
    assert base._version >= before + 2


@both
@each_backend
def test_what_is_not_in_the_step_stays(cls, backend):
    optimizer = make_optimizer(cls, [Group([(3,), (4,), (5,)])], backend)
    set_gradients(optimizer)
    optimizer.step()
    _, without, with_grad = parameters(optimizer)
    without.grad = None
    before = versions(optimizer)[1], with_grad.grad._version
    optimizer.step()
    assert (versions(optimizer)[1], with_grad.grad._version) == before


@both
@each_with_kernels
def test_a_step_in_inference_mode(cls, backend):
    """Its tensors have no versions. Enough of them for the cpu backend's other threads."""
    torch.set_num_threads(2)  # which conftest.py sets back
    count = 600 if backend == "cpu" else 3
    with torch.inference_mode():
        params = [torch.ones(2) for _ in range(count)]
        optimizer = cls(params, backend=backend)
        for _ in range(2):
            set_gradients(optimizer)
            optimizer.step()
        assert all((param != 1).all() for param in params)


@both
@each_with_kernels
def test_ordinary_parameters_are_stepped_in_inference_mode(cls, backend):
    optimizer = make_optimizer(cls, [Group([(3, 4)])], backend)
    set_gradients(optimizer)
    optimizer.step()
    before = versions(optimizer)
    with torch.inference_mode():
        optimizer.step()
    assert all(
        new[name] > old[name]
        for old, new in zip(before, versions(optimizer), strict=True)
        for name in old
    )


@both
def test_a_step_that_found_inf_skips_leaves_graphs_as_they_are(cls):
    """Where it is known on the host that nothing is written; on a GPU it is not."""
    if (reason := cpu.unavailable(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    optimizer = cls([x], lr=0.1, backend="cpu")
    a, b = (x**2).sum(), (x**3).sum()
    a.backward()
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(1.0), torch.tensor(1.0)
    optimizer.step()
    b.backward()
    assert x.grad.tolist() == [5.0, 16.0]


class Seen(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


@both
@each_with_kernels
def test_under_a_dispatch_mode(cls, backend):
    optimizer = make_optimizer(cls, [Group([(3, 4)])], backend)

    def step():
        with Seen():
            optimizer.step()

    assert_all_rise(optimizer, step)


@both
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_step(cls, compiler):
    if (reason := cpu.unavailable(torch.device("cpu"))) is not None:
        pytest.skip(reason)
    torch._dynamo.reset()
    optimizer = make_optimizer(cls, [Group([(3, 4), (5,)])], "cpu")
    assert_all_rise(optimizer, torch.compile(optimizer.step, backend=compiler))


@both
@pytest.mark.parametrize("backend", [p for p in backends() if p.values[0] in ("cuda", "triton")])
def test_without_the_extension(monkeypatch, cls, backend):
    monkeypatch.setattr(ops, "extension", None)
    assert_all_rise(make_optimizer(cls, [Group([(3, 4), (5,)])], backend))
