"""Tensors that are not contiguous, and gradients that are not laid out as their parameter.

The oracle is the same numbers in contiguous tensors. A sum's order follows the memory's
order for a dense layout, so that results equal the contiguous ones bit for bit only where
the backend walks the elements in the same order; elsewhere to the tolerance.
"""

import pytest
import torch
from cases import (
    OPTIMIZERS,
    Group,
    assert_same_bits,
    assert_step_agrees,
    backends,
    bits,
    gradient,
    make_optimizer,
    parameters,
    random_tensor,
    restore,
    snapshot,
)

from adamem_fused import AMAdamW

STEPS = 5
CHANNELS_LAST = torch.channels_last


def strided_copy(tensor, base_shape, view):
    """The same numbers in the view of a larger or reordered tensor."""
    strided = view(torch.zeros(base_shape, dtype=tensor.dtype))
    assert strided.shape == tensor.shape
    return strided.copy_(tensor)


# name: (shape, how to lay out the same numbers otherwise)
LAYOUTS = {
    "transposed": ((30, 70), lambda t: strided_copy(t, (70, 30), lambda b: b.t())),
    "channels_last": ((6, 5, 4, 3), lambda t: t.clone().contiguous(memory_format=CHANNELS_LAST)),
    "every other column": (
        (30, 70),
        lambda t: strided_copy(t, (30, 140), lambda b: b[:, ::2]),
    ),
    "inner rows": ((30, 70), lambda t: strided_copy(t, (50, 70), lambda b: b[10:40])),
    "odd offset": ((2101,), lambda t: strided_copy(t, (2102,), lambda b: b[1:])),
    "size-1 strides": (
        (8, 1, 7, 1),
        lambda t: strided_copy(t, (56,), lambda b: b.as_strided((8, 1, 7, 1), (7, 3, 1, 99))),
    ),
}
# Walked in the order of their elements: contiguous but for what strides say, or copied.
SAME_ORDER = ("every other column", "inner rows", "odd offset", "size-1 strides")


def two_optimizers(cls, backend, shape, dtype, layout):
    """One over a contiguous parameter, one over the same numbers laid out otherwise."""
    values = random_tensor(shape, dtype)
    return [
        cls([param.requires_grad_()], backend=backend, beta_scope="tensor", weight_decay=0.1)
        for param in (values.clone(), layout(values))
    ]


@pytest.mark.parametrize("backend", backends("reference"))
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("laid_out", ["param", "grad", "both"])
def test_a_layout_does_not_change_the_result(backend, cls, dtype, name, laid_out):
    shape, layout = LAYOUTS[name]
    plain = torch.clone
    dense, strided = two_optimizers(
        cls, backend, shape, dtype, layout if laid_out != "grad" else plain
    )
    (dense_param,), (strided_param,) = parameters(dense), parameters(strided)
    strides = strided_param.stride()
    for step in range(STEPS):
        grad = gradient(dense_param, step)
        dense_param.grad = grad
        strided_param.grad = layout(grad) if laid_out != "param" else grad.clone()
        before = snapshot(dense)
        dense.step()
        strided.step()
        if backend == "cpu" and (name in SAME_ORDER or laid_out != "both"):
            assert_same_bits(strided, dense)
        else:
            assert_step_agrees(strided, dense, before, low_precision_ulps=1)
            restore(strided, snapshot(dense))
    assert strided_param.stride() == strides


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_what_lies_between_a_views_elements_is_left_alone(backend, cls):
    base = random_tensor((30, 40))
    before = base.clone()
    view = base[3:20:2, 1:30:3].requires_grad_()
    optimizer = cls([view], backend=backend)
    for step in range(3):
        view.grad = gradient(view, step)
        optimizer.step()
    changed = base.detach() != before
    assert changed[3:20:2, 1:30:3].all()
    assert changed.sum() == view.numel()


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [15, 1025])
def test_storage_offsets_do_not_change_bits(cls, dtype, numel):
    """No address but an element's own alignment is asked for."""
    if not any(p.values == ("cpu",) and not p.marks for p in backends()):
        pytest.skip("the cpu backend is not there")
    results = []
    for offset in (0, 1, 3):
        values = random_tensor((numel,), dtype)
        place = torch.zeros(numel + offset, dtype=dtype)[offset:].copy_(values)
        optimizer = cls([place.requires_grad_()], backend="cpu", weight_decay=0.1)
        for step in range(STEPS):
            grad = torch.zeros(numel + offset, dtype=dtype)[offset:]
            place.grad = grad.copy_(gradient(place, step))
            optimizer.step()
        results.append(optimizer)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
def test_an_expanded_gradient_is_its_dense_copy(backend, cls):
    """The gradient of a mean or a sum: stride 0."""
    shape = (20, 30)
    optimizers = [make_optimizer(cls, [Group([shape])], backend) for _ in range(2)]
    (dense_param,), (expanded_param,) = map(parameters, optimizers)
    for step in range(STEPS):
        row = random_tensor((30,), seed=step)
        expanded_param.grad = row.expand(shape)
        dense_param.grad = row.expand(shape).clone()
        for optimizer in optimizers:
            optimizer.step()
        assert_same_bits(*optimizers)
    memory = optimizers[1].state[expanded_param]
    name = "exp_avg" if cls is AMAdamW else "momentum_buffer"
    assert memory[name].is_contiguous()


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_gradient_of_another_dtype(backend, cls, dtype):
    """As param.grad_dtype allows."""
    from adamem_fused.backends import BACKENDS

    optimizers = [make_optimizer(cls, [Group([(17,), (40, 30)], dtype)], backend) for _ in "ab"]
    other = torch.float32 if dtype == torch.bfloat16 else torch.float64
    kind = "adamw" if cls is AMAdamW else "sgd"
    finish = getattr(BACKENDS[backend], f"{kind}_finish")
    for step in range(STEPS):
        for optimizer, grad_dtype in zip(optimizers, (dtype, other), strict=True):
            for i, param in enumerate(parameters(optimizer)):
                param.grad = gradient(param, step, index=i)
            with torch.no_grad():
                (work,) = optimizer._collect()
                work.batch.grads[:] = [grad.to(grad_dtype) for grad in work.batch.grads]
                before = snapshot(optimizer)
                finish(work.batch, None, None, None)
        assert_step_agrees(optimizers[1], optimizers[0], before, low_precision_ulps=3)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", backends())
def test_a_parameter_that_overlaps_itself_raises_and_nothing_changes(backend, cls):
    row = random_tensor((5,))
    good, overlapping = random_tensor((7,)), row.expand(4, 5)
    optimizer = cls([good.requires_grad_()], backend=backend)
    optimizer.add_param_group({"params": [overlapping.requires_grad_()]})
    for param in (good, overlapping):
        param.grad = torch.ones(param.shape)
    before = [bits(good).clone(), bits(row).clone()]
    with pytest.raises(RuntimeError, match=r"unsupported operation|overlap|share memory"):
        optimizer.step()
    assert torch.equal(bits(good), before[0]) and torch.equal(bits(row), before[1])
    assert not optimizer.state.get(good) and not optimizer.state.get(overlapping)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", backends())
def test_a_memory_that_overlaps_itself_raises_and_nothing_changes(backend, cls):
    params = [random_tensor((7,)).requires_grad_(), random_tensor((4, 5)).requires_grad_()]
    optimizer = cls(params, backend=backend)
    for param in params:
        param.grad = torch.ones(param.shape)
    optimizer.step()
    optimizer.state[params[1]][cls.memories[-1]] = torch.zeros(5).expand(4, 5)
    before = [bits(param).clone() for param in params]
    with pytest.raises(RuntimeError, match=r"unsupported operation|overlap|share memory"):
        optimizer.step()
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", ["reference", "foreach"])
def test_a_parameter_made_in_inference_mode_raises_and_nothing_changes(backend, cls):
    """torch refuses it in the middle of a step, where others have been updated already."""
    with torch.inference_mode():
        made_there = torch.nn.Parameter(torch.ones(4))
    params = [random_tensor((7,)).requires_grad_(), made_there]
    optimizer = cls(params, backend=backend)
    before = [bits(param).clone() for param in params]
    for param in params:
        param.grad = torch.ones(param.shape)
    with pytest.raises(RuntimeError, match="param 1 was made in inference mode"):
        optimizer.step()
    assert all(torch.equal(bits(p), b) for p, b in zip(params, before, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", backends("reference"))
def test_a_float64_parameter_of_a_float32_memory_keeps_its_digits(cls, backend):
    """As after model.double() in the middle of a run."""
    param = torch.ones(3, requires_grad=True)
    optimizer = cls([param], lr=0.1, weight_decay=0.0, backend=backend)
    param.grad = torch.zeros(3)
    optimizer.step()
    param.grad = None
    param.data = param.data.double() + 1e-10
    param.grad = torch.zeros(3, dtype=torch.float64)
    optimizer.step()
    assert (param == 1 + 1e-10).all()


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("backend", backends("reference"))
def test_strided_parameters_among_hundreds_of_tensors(cls, backend):
    """Enough of them that the cpu backend's other threads open and store copies too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    strided = [torch.nn.Parameter(random_tensor((4, 4), seed=i)[:, ::2]) for i in range(600)]
    dense = [torch.nn.Parameter(param.detach().clone().contiguous()) for param in strided]
    for params in (strided, dense):
        optimizer = cls(params, backend=backend)
        for step in range(2):
            for i, param in enumerate(params):
                param.grad = gradient(param.detach().contiguous(), step, index=i)
            optimizer.step()
    torch.set_num_threads(threads)
    for ours, theirs in zip(strided, dense, strict=True):
        torch.testing.assert_close(ours, theirs)
        assert not ours.grad_fn
