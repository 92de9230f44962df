"""release_gradients: the bits of ordinary steps, taken in the backward pass, gradients freed."""

import copy
import gc
import io
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from cases import OPTIMIZERS, assert_same_bits, backends, parameters
from snapshot import snapshot
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.checkpoint import checkpoint

from adamem_fused import AMSGD, AMAdamW, release, release_gradients
from bench import peak

both = pytest.mark.parametrize("cls", OPTIMIZERS)
scopes = pytest.mark.parametrize("scope", ["tensor", "row"])
STEPS = 4


class Tied(nn.Module):
    """An embedding that is the head too, and a layer that is used twice."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Parameter(torch.randn(11, 16, generator=generator).to(dtype))
        self.layer = nn.Linear(16, 16, dtype=dtype)
        self.spare = nn.Linear(16, 16, dtype=dtype)
        self.uses = 2
        self.scale = nn.Parameter(torch.ones(1, dtype=dtype))
        with torch.no_grad():
            for param in (*self.layer.parameters(), *self.spare.parameters()):
                param.copy_(0.2 * torch.randn(param.shape, generator=generator))

    def forward(self, tokens, spare=False):
        x = self.embedding[tokens]
        for _ in range(self.uses):
            x = x + self.layer(x).tanh()
        if spare:
            x = self.spare(x)
        logits = self.scale * x @ self.embedding.T
        return nn.functional.cross_entropy(logits.float(), tokens.roll(1))


def batch(step, seed=0):
    return torch.randint(0, 11, (20,), generator=torch.Generator().manual_seed(100 * seed + step))


def new(cls, lr=0.02, dtype=torch.float32, **options):
    model = Tied(dtype)
    named = dict(model.named_parameters())
    second = {"params": [named.pop("scale")], "lr": 0.01, "weight_decay": 0.1}
    return model, cls([{"params": list(named.values())}, second], lr=lr, **options)


def no_gradients(model):
    return all(param.grad is None for param in model.parameters())


def train(model, optimizer, steps=range(STEPS), **options):
    for step in steps:
        model(batch(step), **options).backward()
        optimizer.step()
        optimizer.zero_grad()


# ---- the bits of ordinary steps ---------------------------------------------------------


@both
@scopes
@pytest.mark.parametrize("backend", backends("cuda", "triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_of_ordinary_steps(cls, scope, backend, dtype):
    options = {"dtype": dtype, "backend": backend, "beta_scope": scope}
    model, optimizer = new(cls, **options)
    release_gradients(model, optimizer)
    scheduler = CosineAnnealingLR(optimizer, STEPS)
    expected_model, expected = new(cls, **options)
    expected_scheduler = CosineAnnealingLR(expected, STEPS)
    for step in range(STEPS):
        model(batch(step)).backward()
        assert no_gradients(model)
        taken = snapshot(optimizer)
        optimizer.step()
        assert snapshot(optimizer) == taken
        optimizer.zero_grad()
        scheduler.step()
        train(expected_model, expected, [step])
        expected_scheduler.step()
        assert_same_bits(optimizer, expected)


@both
def test_accumulate_holds_back(cls):
    model, optimizer = new(cls, beta_scope="tensor")
    released = release_gradients(model, optimizer)
    expected_model, expected = new(cls, beta_scope="tensor")
    for step in range(STEPS):
        before = snapshot(optimizer)
        with released.accumulate():
            for part in (1, 2):
                model(batch(step, part)).backward()
        assert snapshot(optimizer) == before and not no_gradients(model)
        model(batch(step)).backward()
        assert no_gradients(model)
        optimizer.step()
        for part in (1, 2, 0):
            expected_model(batch(step, part)).backward()
        expected.step()
        expected.zero_grad()
        assert_same_bits(optimizer, expected)


def test_a_step_takes_what_was_held_back():
    model, optimizer = new(AMAdamW)
    released = release_gradients(model, optimizer)
    with released.accumulate():
        model(batch(0)).backward()
    optimizer.step()
    expected_model, expected = new(AMAdamW)
    train(expected_model, expected, [0])
    assert_same_bits(optimizer, expected)


def test_a_graph_that_is_kept_goes_with_accumulation():
    model, optimizer = new(AMAdamW)
    released = release_gradients(model, optimizer)
    loss = model(batch(0))
    with released.accumulate():
        loss.backward(retain_graph=True)
    loss.backward()
    expected_model, expected = new(AMAdamW)
    loss = expected_model(batch(0))
    loss.backward(retain_graph=True)
    loss.backward()
    expected.step()
    assert_same_bits(optimizer, expected)


def test_a_closure():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)

    def closure():
        optimizer.zero_grad()
        loss = model(batch(0))
        loss.backward()
        return loss

    assert optimizer.step(closure) is not None
    expected_model, expected = new(AMAdamW)
    train(expected_model, expected, [0])
    assert_same_bits(optimizer, expected)


def test_a_compiled_model():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    train(torch.compile(model, backend="aot_eager"), optimizer)
    expected_model, expected = new(AMAdamW)
    train(torch.compile(expected_model, backend="aot_eager"), expected)
    assert_same_bits(optimizer, expected)


# ---- whose parameters -------------------------------------------------------------------


def test_parameters_of_another_optimizer_are_left_alone():
    model = Tied()
    optimizer = AMAdamW(model.layer.parameters())
    release_gradients(model, optimizer)
    model(batch(0)).backward()
    assert no_gradients(model.layer) and model.embedding.grad is not None


@pytest.mark.parametrize("late", [False, True], ids=["at once", "added later"])
def test_parameters_of_no_model_are_stepped_by_step(late):
    def run(release):
        model, optimizer = new(AMAdamW)
        if release and late:
            release_gradients(model, optimizer)
        extra = nn.Parameter(torch.ones(3))
        optimizer.add_param_group({"params": [extra]})
        if release and not late:
            release_gradients(model, optimizer)
        for step in range(STEPS):
            (model(batch(step)) + extra.square().sum()).backward()
            assert extra.grad is not None
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    assert_same_bits(run(True), run(False))


def test_parameters_that_are_unfrozen_or_added_later():
    def run(release):
        model = Tied()
        model.spare.requires_grad_(False)
        optimizer = AMAdamW([model.embedding, *model.spare.parameters()])
        if release:
            release_gradients(model, optimizer)
        train(model, optimizer, spare=True)
        model.spare.requires_grad_(True)
        optimizer.add_param_group({"params": model.layer.parameters(), "lr": 0.01})
        optimizer.zero_grad()
        train(model, optimizer, spare=True)
        if release:  # the step before has found them
            model(batch(0), spare=True).backward()
            assert no_gradients(model.layer) and no_gradients(model.spare)
        else:
            train(model, optimizer, [0], spare=True)
        return optimizer

    assert_same_bits(run(True), run(False))


def test_a_model_without_a_parameter_of_the_optimizer():
    with pytest.raises(ValueError, match="no parameter of the optimizer"):
        release_gradients(Tied(), new(AMAdamW)[1])


# ---- what is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta_scope": "global"}, "beta_scope='global'"),
        ({"beta_scope": "global", "gap": "loss"}, "gap='loss'"),
        ({"skip_nonfinite": True}, "skip_nonfinite"),
        ({"max_grad_norm": 1.0}, "clip_by_last_norm"),
    ],
)
def test_what_needs_all_gradients_is_refused(options, message):
    model, optimizer = new(AMAdamW, **options)
    with pytest.raises(ValueError, match=message):
        release_gradients(model, optimizer)

    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    for key, value in options.items():
        if key in optimizer.defaults:
            for group in optimizer.param_groups:
                group[key] = value
        else:
            setattr(optimizer, key, value)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=message):
        model(batch(0)).backward()
    with pytest.raises(ValueError, match=message):
        optimizer.step()
    assert snapshot(optimizer) == before


def test_other_kinds_are_refused():
    model, optimizer = new(AMAdamW)
    with pytest.raises(TypeError, match="AMAdamW or AMSGD, not SGD"):
        release_gradients(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match="Module, not list"):
        release_gradients(list(model.parameters()), optimizer)


def test_twice_is_refused():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    with pytest.raises(RuntimeError, match="released already"):
        release_gradients(model, optimizer)


@pytest.mark.parametrize("unscale", [False, True])
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_is_refused(unscale, fused):
    model, optimizer = new(AMAdamW, fused=fused)
    release_gradients(model, optimizer)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(model(batch(0))).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="GradScaler does not go with release_gradients"):
        scaler.step(optimizer)
    optimizer.zero_grad()
    train(model, optimizer, [1])


def test_a_graph_of_old_parameters_is_refused():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    loss = model(batch(0))
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_gradient_without_a_step_between_is_refused():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    model(batch(0)).backward()
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match="second gradient since"):
        model(batch(1)).backward()
    assert snapshot(optimizer) == before
    optimizer.zero_grad()
    model(batch(1)).backward()
    assert no_gradients(model)


def test_a_parameter_of_several_reentrant_checkpoints_is_refused():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    x = torch.ones(2, 16, requires_grad=True)
    for _ in range(2):
        x = checkpoint(model.layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.sum().backward()


def test_an_error_in_a_step_reaches_the_user():
    model = nn.Sequential(nn.Embedding(5, 16, sparse=True), nn.Linear(16, 3))
    optimizer = AMAdamW(model.parameters())
    release_gradients(model, optimizer)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="does not support sparse gradients"):
            model(torch.arange(5)).sum().backward()
        assert model[0].weight not in optimizer.state
        optimizer.zero_grad()
    model[0].sparse = False
    model(torch.arange(5)).sum().backward()
    assert no_gradients(model)
    assert optimizer.state[model[0].weight]["step"] == 1


# ---- clipping ---------------------------------------------------------------------------


@both
def test_clipping_by_the_last_norm(cls):
    model, optimizer = new(cls, beta_scope="tensor", max_grad_norm=0.5)
    release_gradients(model, optimizer, clip_by_last_norm=True)
    expected_model, expected = new(cls, beta_scope="tensor")
    last = None
    for step in range(STEPS):
        train(model, optimizer, [step])
        expected_model(batch(step)).backward()
        grads = [param.grad for param in expected_model.parameters() if param.grad is not None]
        norm = torch.linalg.vector_norm(torch.cat([grad.flatten().double() for grad in grads]))
        if last is not None:
            expected.grad_scale = ((last + 1e-6) / 0.5).clamp(min=1)
            assert expected.grad_scale > 1
        expected.step()
        expected.zero_grad()
        last = norm
        torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
        for ours, theirs in zip(parameters(optimizer), parameters(expected), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_a_limit_that_is_set_later_or_taken_away():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer, clip_by_last_norm=True)
    expected_model, expected = new(AMAdamW)
    train(model, optimizer, [0])
    assert optimizer.grad_norm is None  # no limit, no norm
    train(expected_model, expected, [0])
    assert_same_bits(optimizer, expected)
    optimizer.max_grad_norm = 1.0
    train(model, optimizer, [1])
    assert optimizer.grad_norm > 0
    optimizer.max_grad_norm = None
    train(model, optimizer, [2])
    assert optimizer.grad_norm is None


def test_the_last_norm_does_not_outlive_the_state_that_it_belongs_to():
    model, optimizer = new(AMAdamW, max_grad_norm=1e-3)
    release_gradients(model, optimizer, clip_by_last_norm=True)
    train(model, optimizer, [0])
    good = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    optimizer.load_state_dict(good[1])
    train(model, optimizer, [1])
    expected_model, expected = new(AMAdamW)
    expected_model.load_state_dict(good[0])
    expected.load_state_dict(good[1])
    train(expected_model, expected, [1])  # not clipped
    assert_same_bits(optimizer, expected)


# ---- the handle, copies and lifetimes ---------------------------------------------------


def test_what_fsdp_offloads_is_waited_for(monkeypatch):
    """Its copy to the CPU is on its way when the hook is called, up to torch 2.12."""
    waited = []
    stream = SimpleNamespace(synchronize=lambda: waited.append("here"))
    module = SimpleNamespace(current_stream=lambda: stream)
    monkeypatch.setattr(torch, "get_device_module", lambda kind: module)
    for mesh, expected in (("cpu", []), ("cuda", ["here"])):
        param = SimpleNamespace(
            to_local=lambda: torch.ones(2), device_mesh=SimpleNamespace(device_type=mesh)
        )
        release._wait_for_offload(param)
        assert waited == expected


def test_an_old_handle_does_not_end_a_newer_release():
    model, optimizer = new(AMAdamW)
    old = release_gradients(model, optimizer)
    old.remove()
    release_gradients(model, optimizer)
    old.remove()
    model(batch(0)).backward()
    assert all(param.grad is None for param in model.parameters())


def test_what_is_used_no_more_is_free_at_once():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    train(model, optimizer, [0])
    alive = [weakref.ref(optimizer), weakref.ref(model)]
    gc.disable()
    try:
        del model, optimizer
        assert [thing() for thing in alive] == [None, None]
    finally:
        gc.enable()


def test_the_second_gradient_is_not_left_for_the_step():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    model(batch(0)).backward()
    with pytest.raises(RuntimeError, match="has a second gradient since"):
        model(batch(0)).backward()
    optimizer.step()
    assert max(state["step"] for state in optimizer.state.values()) == 1


def test_remove_goes_back_to_ordinary_steps():
    model, optimizer = new(AMAdamW)
    released = release_gradients(model, optimizer)
    train(model, optimizer)
    released.remove()
    model(batch(0)).backward()
    assert model.embedding.grad is not None
    optimizer.step()
    optimizer.zero_grad()
    expected_model, expected = new(AMAdamW)
    train(expected_model, expected, [*range(STEPS), 0])
    assert_same_bits(optimizer, expected)
    release_gradients(model, optimizer)


def test_state_that_is_loaded_goes_on_in_the_backward_pass():
    model, optimizer = new(AMAdamW)
    train(model, optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy(model.state_dict())
    train(model, optimizer)

    other_model, other = new(AMAdamW, lr=0.5)
    release_gradients(other_model, other)
    train(other_model, other, [7])
    other_model.load_state_dict(weights)
    other.load_state_dict(saved)
    for step in range(STEPS):
        other_model(batch(step)).backward()
        assert no_gradients(other_model)
        other.step()
    assert_same_bits(other, optimizer)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_are_ordinary_ones(copied):
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    train(model, optimizer)
    other_model, other = copied((model, optimizer))
    other_model(batch(0)).backward()
    assert other_model.embedding.grad is not None
    other.step()
    model(batch(0)).backward()
    assert_same_bits(other, optimizer)
    torch.save(optimizer.state_dict(), io.BytesIO())


def test_the_hooks_keep_nothing_alive():
    model, optimizer = new(AMAdamW)
    release_gradients(model, optimizer)
    train(model, optimizer, [0])
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    model(batch(0)).backward()
    assert model.embedding.grad is not None


# ---- memory -----------------------------------------------------------------------------


def test_peak_of_gradients_is_at_most_a_tenth():
    ordinary, released = (peak.gradients(release, torch.device("cpu")) for release in (False, True))
    assert ordinary == sum(4 * param.numel() for param in peak.new_model().parameters())
    assert 0 < released <= ordinary / 10


def test_table_of_peaks():
    result = {
        "gradients": {"ordinary": 4e6, "released": 1e6},
        "whole": {"ordinary": 5e6, "released": 4e6},
        "seconds": {"ordinary": [0.1, 0.2, 0.1], "released": [0.11, 0.2, 0.1]},
    }
    assert peak.table_cells(result) == [
        ["gradients at once, MB", "4.0", "1.0", "0.250"],
        ["whole peak, MB", "5.0", "4.0", "0.800"],
        ["backward and step, ms", "100.0", "110.0", "1.00 (1.00 to 1.05)"],
    ]


# ---- DistributedDataParallel ------------------------------------------------------------


def ddp_pair(cls, wrapping, **options):
    """A released optimizer and an ordinary one, each with its model in a DDP."""
    pair = []
    for _ in range(2):
        model, optimizer = new(cls, **options)
        if "find_unused_parameters" not in wrapping and "static_graph" not in wrapping:
            model.spare.requires_grad_(False)
        pair.append((DistributedDataParallel(model, bucket_cap_mb=0.001, **wrapping), optimizer))
    return pair


def assert_same_on_every_rank(optimizer):
    flat = torch.cat([param.detach().flatten() for param in parameters(optimizer)])
    gathered = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, flat)
    assert all(torch.equal(other, flat) for other in gathered)


def check_ddp(cls, scope, wrapping):
    (model, optimizer), (expected_model, expected) = ddp_pair(cls, wrapping, beta_scope=scope)
    release_gradients(model, optimizer)
    rank = dist.get_rank()
    for step in range(STEPS):
        # With find_unused_parameters: one that a rank has no gradient of, and one that none has.
        spare = "find_unused_parameters" in wrapping and rank == 1 and step % 2 == 1
        model(batch(step, rank), spare=spare).backward()
        assert no_gradients(model)
        taken = snapshot(optimizer)
        optimizer.step()
        assert snapshot(optimizer) == taken
        optimizer.zero_grad()
        expected_model(batch(step, rank), spare=spare).backward()
        expected.step()
        expected.zero_grad()
        assert_same_bits(optimizer, expected)
    assert_same_on_every_rank(optimizer)


def check_ddp_accumulates(views, by_no_sync):
    wrapping = {"gradient_as_bucket_view": views}
    (model, optimizer), (expected_model, expected) = ddp_pair(AMAdamW, wrapping)
    released = release_gradients(model, optimizer)
    rank = dist.get_rank()
    for step in range(STEPS):
        before = snapshot(optimizer)
        with model.no_sync() if by_no_sync else released.accumulate():
            model(batch(step, rank + 2)).backward()
        assert snapshot(optimizer) == before
        model(batch(step, rank)).backward()
        assert no_gradients(model)
        optimizer.step()
        if by_no_sync:
            with expected_model.no_sync():
                expected_model(batch(step, rank + 2)).backward()
        else:
            expected_model(batch(step, rank + 2)).backward()
        expected_model(batch(step, rank)).backward()
        expected.step()
        expected.zero_grad()
        assert_same_bits(optimizer, expected)


def check_ddp_error(views):
    wrapping = {"gradient_as_bucket_view": views}
    (model, optimizer), (expected_model, expected) = ddp_pair(AMAdamW, wrapping)
    released = release_gradients(model, optimizer)
    train(model, optimizer, [0])
    before = snapshot(optimizer)
    optimizer.skip_nonfinite = True
    with pytest.raises(ValueError, match="skip_nonfinite"):
        model(batch(1)).backward()
    assert snapshot(optimizer) == before
    optimizer.skip_nonfinite = False
    with released.accumulate():  # onto the gradients that were left
        model(batch(2)).backward()
    optimizer.step()
    optimizer.zero_grad()
    train(model, optimizer, [3])
    train(expected_model, expected, [0])
    expected_model(batch(1)).backward()
    train(expected_model, expected, [2, 3])
    assert_same_bits(optimizer, expected)
    with pytest.raises(RuntimeError, match="join"), model.join():
        model(batch(0)).backward()


def check_ddp_remove():
    (model, optimizer), (expected_model, expected) = ddp_pair(AMAdamW, {})
    released = release_gradients(model, optimizer)
    train(model, optimizer, [0])
    released.remove()
    model(batch(1)).backward()
    assert model.module.embedding.grad is not None
    optimizer.step()
    train(expected_model, expected, range(2))
    assert_same_bits(optimizer, expected)
    with pytest.raises(RuntimeError, match="make a new DistributedDataParallel"):
        release_gradients(model, optimizer)
    del model, released
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None


def check_ddp_that_is_not_given():
    model, optimizer = new(AMAdamW)
    model.spare.requires_grad_(False)
    release_gradients(model, optimizer)
    wrapper = DistributedDataParallel(model)
    with pytest.raises(RuntimeError, match="pass that to release_gradients"):
        wrapper(batch(0)).backward()
    other = AMAdamW(model.parameters())
    with pytest.raises(RuntimeError, match="pass that to release_gradients"):
        release_gradients(model, other)


def check_ddp_clips():
    (model, optimizer), _ = ddp_pair(AMAdamW, {}, max_grad_norm=0.5)
    release_gradients(model, optimizer, clip_by_last_norm=True)
    train(model, optimizer)
    assert_same_on_every_rank(optimizer)
    assert optimizer.grad_norm > 0


@pytest.mark.parametrize(("cls", "scope"), [(AMAdamW, "tensor"), (AMSGD, "row")])
@pytest.mark.parametrize(
    "wrapping",
    [
        {"gradient_as_bucket_view": True},
        {"gradient_as_bucket_view": False},
        {"gradient_as_bucket_view": True, "find_unused_parameters": True},
        {"gradient_as_bucket_view": False, "find_unused_parameters": True},
        {"gradient_as_bucket_view": True, "static_graph": True},
        {"gradient_as_bucket_view": False, "static_graph": True},
    ],
    ids=lambda wrapping: "-".join(key for key, value in wrapping.items() if value) or "copies",
)
def test_ddp_has_the_bits_of_ordinary_steps(two_ranks, cls, scope, wrapping):
    two_ranks.run(check_ddp, cls, scope, wrapping)


def test_ddp_of_three_ranks(three_ranks):
    three_ranks.run(check_ddp, AMAdamW, "tensor", {})


@pytest.mark.parametrize("views", [False, True])
@pytest.mark.parametrize("by_no_sync", [False, True])
def test_ddp_accumulates(two_ranks, views, by_no_sync):
    two_ranks.run(check_ddp_accumulates, views, by_no_sync)


@pytest.mark.parametrize("views", [False, True])
def test_ddp_raises_at_the_end_of_the_backward_pass(two_ranks, views):
    two_ranks.run(check_ddp_error, views)


def test_ddp_remove(two_ranks):
    two_ranks.run(check_ddp_remove)


def test_ddp_around_the_model_that_was_given(two_ranks):
    two_ranks.run(check_ddp_that_is_not_given)


def test_ddp_clips_by_the_last_norm(two_ranks):
    two_ranks.run(check_ddp_clips)


# ---- FSDP2 ------------------------------------------------------------------------------


def fsdp_pair(cls, **options):
    pair = []
    for _ in range(2):
        model = Tied()
        model.spare.requires_grad_(False)
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model.layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        pair.append((model, cls(model.parameters(), **options)))
    return pair


def check_fsdp(cls, scope):
    (model, optimizer), (expected_model, expected) = fsdp_pair(cls, beta_scope=scope)
    release_gradients(model, optimizer)
    rank = dist.get_rank()
    for step in range(STEPS):
        model(batch(step, rank)).backward()
        assert no_gradients(model)
        optimizer.step()
        optimizer.zero_grad()
        expected_model(batch(step, rank)).backward()
        expected.step()
        expected.zero_grad()
        assert_same_shards(optimizer, expected)


def assert_same_shards(optimizer, expected):
    for ours, theirs in zip(parameters(optimizer), parameters(expected), strict=True):
        assert torch.equal(ours.to_local(), theirs.to_local())
        assert optimizer.state[ours].keys() == expected.state[theirs].keys()
        for name, value in expected.state[theirs].items():
            assert torch.equal(local(optimizer.state[ours][name]), local(value)), name


def local(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def check_fsdp_accumulates(by_sync):
    (model, optimizer), (expected_model, expected) = fsdp_pair(AMAdamW)
    released = release_gradients(model, optimizer)
    rank = dist.get_rank()
    if by_sync:  # FSDP2 reduces what it has added up at the first of two uses
        model.uses = expected_model.uses = 1
    for step in range(STEPS):
        if by_sync:
            model.set_requires_gradient_sync(False)
            model(batch(step, rank + 2)).backward()
            model.set_requires_gradient_sync(True)
        else:
            with released.accumulate():
                model(batch(step, rank + 2)).backward()
        model(batch(step, rank)).backward()
        assert no_gradients(model)
        optimizer.step()
        expected_model.set_requires_gradient_sync(not by_sync)
        expected_model(batch(step, rank + 2)).backward()
        expected_model.set_requires_gradient_sync(True)
        expected_model(batch(step, rank)).backward()
        expected.step()
        expected.zero_grad()
        assert_same_shards(optimizer, expected)


def check_fsdp_clips():
    (model, optimizer), (expected_model, _) = fsdp_pair(AMAdamW, max_grad_norm=0.5)
    release_gradients(model, optimizer, clip_by_last_norm=True)
    rank = dist.get_rank()
    model(batch(0, rank)).backward()
    optimizer.step()
    expected_model(batch(0, rank)).backward()
    grads = [p.grad.full_tensor() for p in expected_model.parameters() if p.grad is not None]
    norm = torch.linalg.vector_norm(torch.cat([grad.flatten().double() for grad in grads]))
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)
    train(model, optimizer)


def check_tensor_parallel(scope):
    pair = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16))
        plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
        pair.append((model, AMAdamW(model.parameters(), beta_scope=scope)))
    (model, optimizer), (expected_model, expected) = pair
    release_gradients(model, optimizer)
    for step in range(STEPS):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        assert no_gradients(model)
        optimizer.step()
        expected_model(x).square().mean().backward()
        expected.step()
        expected.zero_grad()
        assert_same_shards(optimizer, expected)


@both
@scopes
def test_fsdp_has_the_bits_of_ordinary_steps(two_ranks, cls, scope):
    two_ranks.run(check_fsdp, cls, scope)


@pytest.mark.parametrize("by_sync", [False, True])
def test_fsdp_accumulates(two_ranks, by_sync):
    two_ranks.run(check_fsdp_accumulates, by_sync)


@scopes
def test_tensor_parallelism(two_ranks, scope):
    two_ranks.run(check_tensor_parallel, scope)


def test_fsdp_clips_by_the_last_norm(two_ranks):
    two_ranks.run(check_fsdp_clips)
