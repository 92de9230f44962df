"""The GPU backends where only a GPU shows it: graphs, syncs, sizes."""

from __future__ import annotations

import pytest
import torch

from adamem_fused import AMSGD, AMAdamW
from adamem_fused.backends import BACKENDS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]

OPTIMIZERS = [AMAdamW, AMSGD]


@pytest.fixture(params=["triton", "cuda"])
def backend(request) -> str:
    reason = BACKENDS[request.param].unavailable(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"{request.param}: {reason}")
    return request.param


def make(backend, cls, shapes=((300, 70), (5,), ()), **options):
    generator = torch.Generator().manual_seed(0)
    params = [torch.randn(shape, generator=generator).cuda().requires_grad_() for shape in shapes]
    for param in params:
        param.grad = torch.zeros_like(param)
    options.setdefault("lr", torch.tensor(0.05, device="cuda"))
    return params, cls(params, backend=backend, capturable=True, **options)


def set_grads(params, step: int) -> None:
    """In place, at the addresses that a graph knows."""
    for i, param in enumerate(params):
        generator = torch.Generator().manual_seed(100 * step + i)
        noise = torch.randn(param.shape, generator=generator).cuda()
        param.grad.copy_(param.detach() + 0.5 * noise)


def values(params, optimizer) -> list[torch.Tensor]:
    tensors = [param.detach().clone() for param in params]
    for param in params:
        tensors += [value.clone() for value in optimizer.state[param].values()]
    return tensors


def capture(optimizer) -> torch.cuda.CUDAGraph:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
def test_a_captured_step_follows_lr_scale_and_found_inf(backend, cls, scope):
    """Replays give the same bits as steps that were not captured."""
    sides = []
    for captured in (True, False):
        params, optimizer = make(backend, cls, beta_scope=scope)
        optimizer.grad_scale = torch.tensor(1.0, device="cuda")
        optimizer.found_inf = torch.tensor(0.0, device="cuda")
        set_grads(params, 0)
        optimizer.step()
        step = capture(optimizer).replay if captured else optimizer.step
        for k in range(1, 8):
            set_grads(params, k)
            optimizer.param_groups[0]["lr"].fill_(0.0 if k == 3 else 0.05 / k)
            optimizer.grad_scale.fill_(2.0**k)
            optimizer.found_inf.fill_(float(k == 5))
            step()
        sides.append(values(params, optimizer))
    for replayed, stepped in zip(*sides, strict=True):
        assert torch.equal(replayed, stepped)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global", "row"])
def test_a_captured_step_clips_and_skips(backend, cls, scope):
    """By the norm of the gradients that it finds when it is replayed."""
    sides = []
    for captured in (True, False):
        options = {"beta_scope": scope, "max_grad_norm": 0.5, "skip_nonfinite": True}
        params, optimizer = make(backend, cls, ((300, 70), (2, 20_000), (5,), ()), **options)
        optimizer.grad_scale = torch.tensor(1.0, device="cuda")
        set_grads(params, 0)
        optimizer.step()
        norms = []
        step = capture(optimizer).replay if captured else optimizer.step
        for k in range(1, 6):
            set_grads(params, k)
            optimizer.grad_scale.fill_(2.0**k)
            if k == 3:
                params[1].grad[1, -1] = torch.nan
            step()
            norms.append(optimizer.grad_norm)
        assert [norm.isnan().item() for norm in norms] == [k == 3 for k in range(1, 6)]
        assert optimizer.skipped_steps.item() == 1
        sides.append([*values(params, optimizer), *norms])
    for replayed, stepped in zip(*sides, strict=True):
        torch.testing.assert_close(replayed, stepped, rtol=0.0, atol=0.0, equal_nan=True)


def test_steps_between_replays_leave_the_graph_its_addresses(backend):
    params, optimizer = make(backend, AMAdamW)
    twins, twin = make(backend, AMAdamW)
    for side, steps in ((params, optimizer), (twins, twin)):
        set_grads(side, 0)
        steps.step()
    graph = capture(optimizer)
    kept = [param.grad for param in params]
    for step in range(1, 6):
        if step % 2:
            for param, grad in zip(params, kept, strict=True):
                param.grad = grad
            set_grads(params, step)
            graph.replay()
        else:
            for param in params:
                param.grad = torch.empty_like(param)
            set_grads(params, step)
            optimizer.step()
        set_grads(twins, step)
        twin.step()
    for ours, expected in zip(values(params, optimizer), values(twins, twin), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("max_grad_norm", [None, 0.5])
def test_a_graph_that_uploads_its_own_tables_can_be_replayed(backend, max_grad_norm):
    """As when the backward pass is captured too: the gradients are the graph's."""
    params, optimizer = make(backend, AMAdamW, max_grad_norm=max_grad_norm)
    twins, twin = make(backend, AMAdamW, max_grad_norm=max_grad_norm)
    for side, steps in ((params, optimizer), (twins, twin)):
        set_grads(side, 0)
        steps.step()
    source = torch.randn(300, 70, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for param in params:
            param.grad = source.mean() * torch.ones_like(param)
        optimizer.step()
    for step in range(3):
        source.fill_(0.1 * step - 0.1)
        graph.replay()
        for param in twins:
            param.grad = source.mean() * torch.ones_like(param)
        twin.step()
    for ours, expected in zip(values(params, optimizer), values(twins, twin), strict=True):
        assert torch.equal(ours, expected)


def test_capturing_without_a_step_before_says_what_to_do(backend):
    _, optimizer = make(backend, AMAdamW)
    with pytest.raises(RuntimeError, match="take a step with the same parameters"):
        capture(optimizer)


@pytest.mark.parametrize("cls", OPTIMIZERS)
@pytest.mark.parametrize("scope", ["tensor", "global"])
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "skip_nonfinite": True}], ids=str)
def test_a_step_never_waits_for_the_device(backend, cls, scope, options):
    params, optimizer = make(backend, cls, beta_scope=scope, **options)
    set_grads(params, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            optimizer.step()
            # Other addresses: an upload.
            for param in params:
                param.grad = param.grad.clone()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.slow
def test_tensors_beyond_two_to_the_31_elements_are_updated_to_their_end(backend):
    n = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 14 * n:
        pytest.skip(f"needs {14 * n / 2**30:.0f} GiB of free GPU memory")
    param = torch.ones(n, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    param.grad = torch.ones_like(param)
    # Without lambda the first step is AdamW's: lr times the sign of the gradient.
    optimizer = AMAdamW([param], lr=0.5, weight_decay=0.0, memory_lambda=0.0, backend=backend)
    optimizer.max_grad_norm = 1e6  # more than it is
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(n**0.5, rel=1e-6)
    for part in (param[:4096], param[2**31 - 4096 :]):
        assert torch.equal(part, torch.full_like(part, 0.5))
    assert optimizer.state[param]["exp_avg"][-1].item() > 0


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_metrics_wait_for_nothing(backend, scope):
    params, optimizer = make(backend, AMAdamW, beta_scope=scope, skip_nonfinite=True)
    set_grads(params, 0)
    optimizer.step()
    optimizer.metrics()  # makes what is kept
    named = [(str(i), param) for i, param in enumerate(params)]
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found, betas = optimizer.metrics(), optimizer.betas_by_name(named)
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    numbers = [found[name].item() for name in ("beta_mean", "beta_min", "at_cap")]
    assert numbers == pytest.approx([0.89, 0.89, 1.0])
    assert [beta.item() for beta in betas.values()] == pytest.approx([0.89] * 3)
