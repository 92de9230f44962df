"""The walk over a step's tensors in C++ against the one in Python, and where it gives way."""

import weakref

import pytest
import torch
from cases import OPTIMIZERS, assert_same_bits, parameters, set_gradients
from torch.utils._python_dispatch import TorchDispatchMode

from adamem_fused import AMAdamW
from adamem_fused.backends import ops, tables

pytestmark = pytest.mark.skipif(ops.extension is None, reason=str(ops.unavailable))


def make_params(n=5, **options):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(3 + i, 4, generator=generator).to(**options).requires_grad_() for i in range(n)
    ]


def stepped(cls, groups, **options):
    """An optimizer that has state of all its parameters."""
    optimizer = cls(groups, **options)
    set_gradients(optimizer, step=0)
    optimizer.step()
    return optimizer


def contents(works):
    """Everything in works, tensors by identity."""
    return [
        (
            work.backend.name,
            [[id(tensor) for tensor in tensors] for tensors in work.batch.lists()],
            [id(param) for param in work.params],
            work.batch.hypers,
            work.batch.group_sizes,
            work.batch.shared,
        )
        for work in works
    ]


def assert_collects_alike(optimizer):
    ordinary = optimizer._collect_ordinary(optimizer.param_groups, optimizer._kept)
    assert ordinary
    assert contents(ordinary) == contents(
        optimizer._collect_any(optimizer.param_groups, optimizer._kept)
    )


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_both_walks_collect_the_same(cls):
    params = make_params(600)  # more than a run
    optimizer = stepped(
        cls,
        [
            {"params": params[:300], "lr": 0.1},
            {"params": []},
            {"params": params[300:], "beta_scope": "global", "weight_decay": 0.1},
        ],
    )
    assert_collects_alike(optimizer)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_parameters_without_a_gradient_are_left_out(cls):
    params = make_params(9)
    optimizer = stepped(cls, params)
    for i in (0, 3, 4, 8):
        params[i].grad = None
    assert_collects_alike(optimizer)
    for param in params:
        param.grad = None
    assert optimizer._collect() == []


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_state_in_another_order_is_found(cls):
    params = make_params(9)
    optimizer = stepped(cls, params)
    for param in params[::2]:
        optimizer.state[param] = dict(reversed(optimizer.state.pop(param).items()))
    assert_collects_alike(optimizer)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_step_sees_what_the_last_one_had_not(cls):
    params = make_params(100)
    optimizer = stepped(cls, params[:90])
    assert_collects_alike(optimizer)

    for name, value in optimizer.state[params[70]].items():
        optimizer.state[params[70]][name] = value.clone()
    assert_collects_alike(optimizer)
    for param in (params[0], params[64], params[89]):  # all later ones move up
        param.grad = None
    assert_collects_alike(optimizer)
    set_gradients(optimizer, step=1)
    assert_collects_alike(optimizer)
    optimizer.add_param_group({"params": params[90:]})
    set_gradients(optimizer, step=2)
    optimizer.step()
    assert_collects_alike(optimizer)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_step_keeps_no_gradient(cls):
    params = make_params()
    optimizer = stepped(cls, params)
    optimizer.step()
    grads = [weakref.ref(param.grad) for param in params]
    optimizer.zero_grad()
    assert [grad() for grad in grads] == [None] * len(params)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_old_state_is_let_go(cls):
    params = make_params()
    optimizer = stepped(cls, params)

    def replace_state(optimizer):
        for state in optimizer.state.values():
            state.update({name: value.clone() for name, value in state.items()})
        optimizer.step()

    def load(optimizer):
        optimizer.load_state_dict(optimizer.state_dict())

    def step_another_way(optimizer):
        params[0].grad = params[0].grad.as_subclass(Subclass)
        replace_state(optimizer)

    for let_go in (replace_state, load, step_another_way):
        optimizer.step()
        old = [weakref.ref(v) for state in optimizer.state.values() for v in state.values()]
        let_go(optimizer)
        assert [value() for value in old] == [None] * len(old), let_go.__name__


class Subclass(torch.Tensor):
    pass


def irregular_steps():
    """What each does to an optimizer's last parameter, or its gradient."""

    def no_state(optimizer, param):
        del optimizer.state[param]

    def partial_state(optimizer, param):
        del optimizer.state[param]["prev_lr"]

    def state_of_a_subclass(optimizer, param):
        state = optimizer.state[param]
        state["prev_lr"] = state["prev_lr"].as_subclass(Subclass)

    def grad_of_a_subclass(optimizer, param):
        param.grad = param.grad.as_subclass(Subclass)

    def sparse_grad(optimizer, param):
        param.grad = None
        param.grad = torch.ones_like(param).to_sparse()

    def lazily_negated_grad(optimizer, param):
        param.grad = torch.randn(param.shape, dtype=torch.complex64).conj().imag

    def another_backend(optimizer, param):
        optimizer.add_param_group({"params": [], "backend": "foreach"})
        optimizer.param_groups[0]["params"].pop()
        optimizer.param_groups[1]["params"].append(param)

    return (
        no_state,
        partial_state,
        state_of_a_subclass,
        grad_of_a_subclass,
        sparse_grad,
        lazily_negated_grad,
        another_backend,
    )


@pytest.mark.parametrize("change", irregular_steps(), ids=lambda change: change.__name__)
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_the_walk_in_cpp_gives_way(cls, change):
    params = make_params()
    optimizer = stepped(cls, params)
    assert optimizer._collect_ordinary(optimizer.param_groups, optimizer._kept)
    change(optimizer, params[-1])
    assert optimizer._collect_ordinary(optimizer.param_groups, optimizer._kept) == []


def test_complex_parameters_and_subclasses_take_the_other_walk():
    for params in (make_params(dtype=torch.complex64), [torch.ones(3).as_subclass(Subclass)]):
        optimizer = stepped(AMAdamW, [p.detach().requires_grad_() for p in params])
        assert optimizer._collect_ordinary(optimizer.param_groups, optimizer._kept) == []


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["reference", "foreach", "cpu"])
def test_a_lazily_negated_gradient_is_read_as_its_values(cls, backend):
    grad = torch.randn(5, 4, dtype=torch.complex64).conj().imag
    assert grad.is_neg()
    optimizers = [cls([torch.ones(5, 4, requires_grad=True)], backend=backend) for _ in range(2)]
    for optimizer, own_grad in zip(optimizers, (grad, grad.clone()), strict=True):
        for _ in range(3):
            parameters(optimizer)[0].grad = own_grad
            optimizer.step()
    assert_same_bits(*optimizers)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["reference", "foreach", "cpu"])
def test_a_lazily_conjugated_gradient_is_read_as_its_values(cls, backend):
    values = torch.randn(5, 4, dtype=torch.complex64)
    grad = values.conj()
    assert grad.is_conj()
    optimizers = [
        cls([torch.ones_like(values).requires_grad_()], backend=backend) for _ in range(2)
    ]
    for optimizer, own_grad in zip(optimizers, (grad, values.conj_physical()), strict=True):
        for _ in range(3):
            parameters(optimizer)[0].grad = own_grad
            optimizer.step()
    assert_same_bits(*optimizers)


# ---- the operators without the dispatcher --------------------------------------------


class Names(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_dispatch_mode_sees_the_operator(cls, scope):
    name = "adamw_finish_" if cls is AMAdamW else "sgd_finish_"
    dispatched, direct = (stepped(cls, make_params(), beta_scope=scope) for _ in range(2))
    set_gradients(dispatched, direct, step=1)
    with Names() as mode:
        dispatched.step()
    assert f"adamem_fused::{name}" in mode.names
    direct.step()
    assert_same_bits(direct, dispatched)


@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_a_step_is_named_in_a_profile(cls):
    params = make_params()
    optimizer = stepped(cls, params)
    with torch.profiler.profile() as profile:
        optimizer.step()
    names = [event.name for event in profile.events()]
    assert names.count("adamem_fused::" + ("adamw" if cls is AMAdamW else "sgd") + "_finish_") == 1


def test_what_is_not_a_tensor_in_a_list_is_refused():
    with pytest.raises(TypeError, match="list of tensors holds a int"):
        ops.call("sgd_begin", [1], [], [], [], [], [], torch.zeros(0), [], [], None, None, [], None)


# ---- descriptions ------------------------------------------------------------------


def batch_of(cls):
    optimizer = stepped(cls, make_params())
    return optimizer._collect()[0].batch


def other_grad(batch):
    batch.grads[1] = batch.grads[1].clone()


def other_strides(batch):
    batch.grads[1] = batch.grads[1].t().contiguous().t()


def other_dtype(batch):
    batch.steps[1] = batch.steps[1].double()


def other_shape(batch):
    batch.params[1] = batch.params[1].detach()[:, :2]


def other_mode(batch):
    with torch.inference_mode():
        batch.grads[1] = batch.grads[1].clone()


def other_groups(batch):
    batch.group_sizes = [2, 3]


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize(
    ("change", "structure_changes"),
    [
        (other_grad, False),
        (other_strides, True),
        (other_dtype, True),
        (other_shape, True),
        (other_mode, True),
        (other_groups, True),
    ],
)
@pytest.mark.parametrize("in_cpp", [True, False])
def test_a_description_tells_what_has_changed(monkeypatch, cls, change, structure_changes, in_cpp):
    batch = batch_of(cls)
    if not in_cpp:
        monkeypatch.setattr(ops, "extension", None)
    first = tables.describe(batch)
    again = tables.describe(batch, first)
    assert again == first
    if in_cpp:
        assert again.addresses is first.addresses and again.structure is first.structure
    pointers = memoryview(first.addresses).cast("q").tolist()
    assert pointers == [tensor.data_ptr() for tensors in batch.lists() for tensor in tensors]
    change(batch)
    changed = tables.describe(batch, first)
    assert (changed[1:] != first[1:]) == structure_changes
    assert changed == tables.describe(batch)
    assert tables.describe(batch, changed) == changed


def test_a_description_refuses_what_is_not_a_tensor():
    batch = batch_of(AMAdamW)
    batch.steps[1] = 1.0
    with pytest.raises(TypeError, match="list of tensors holds a float"):
        tables.describe(batch)
