"""Clipping and skipping over several processes, against clip_grad_norm_ and a step in one."""

import math
from collections import Counter

import pytest
import torch
import torch.distributed as dist
from cases import MEMORIES, OPTIMIZERS, backends, bits, parameters, random_tensor, relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Linear, Parameter, ParameterList, Sequential, Tanh
from torch.nn.utils import clip_grad_norm_

from adamem_fused import AMSGD, AMAdamW

STEPS = 100
SCOPES = ("tensor", "row", "global")

both = pytest.mark.parametrize("cls", OPTIMIZERS)


# ---- parameters -------------------------------------------------------------------


def shard(mesh, placements, tensor):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def place_like(param, tensor):
    if not isinstance(param, DTensor):
        return tensor.clone()
    return shard(param.device_mesh, param.placements, tensor)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor.detach()


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def fsdp_parameters(sizes, dtype):
    """By fully_shard on meshes of two ranks: shards that are even, uneven and empty."""
    names = ("replicate", "shard")[-len(sizes) :]
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=names)
    shapes = [(6, 16), (5, 16), (1, 20), (16,)]
    values = [random_tensor(shape, dtype, i) for i, shape in enumerate(shapes)]
    return list(fully_shard(ParameterList(value.clone() for value in values), mesh=mesh)), values


def line_parameters(dtype):
    return fsdp_parameters((2,), dtype)


def hybrid_parameters(dtype):
    return fsdp_parameters((1, 2), dtype)


def copied_parameters(dtype):
    return fsdp_parameters((2, 1), dtype)


def mixed_parameters(dtype):
    """Four ranks: over one mesh dimension, the other, both, another mesh, and over none."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    line = init_device_mesh("cpu", (4,))
    layouts = [
        ((6, 16), mesh, [Shard(0), Replicate()]),
        ((5, 16), mesh, [Replicate(), Shard(0)]),
        ((6, 7), mesh, [Shard(0), Shard(1)]),
        ((1, 20), mesh, [Shard(0), Shard(1)]),
        ((16,), mesh, [Shard(0), Shard(0)]),
        ((9,), mesh, [Replicate(), Replicate()]),
        ((4, 6), mesh["tensor"], [Shard(1)]),
        ((7, 5), line, [Shard(0)]),
        ((4, 3), None, None),
        ((), None, None),
    ]
    values = [random_tensor(shape, dtype, i) for i, (shape, _, _) in enumerate(layouts)]
    params = [
        Parameter(value.clone() if where is None else shard(where, placements, value))
        for value, (_, where, placements) in zip(values, layouts, strict=True)
    ]
    model = model_of(dtype)
    values += [param.detach().clone() for param in model.parameters()]
    params += parallel(model, mesh).parameters()  # FSDP2 over tensor parallelism: _StridedShard
    return params, values


def complex_parameters(dtype):
    """Two ranks: complex ones sharded over either dimension, and plain ones beside them."""
    mesh = init_device_mesh("cpu", (2,))
    values = [random_tensor((4, 7), torch.complex128, i) for i in range(3)]
    values.append(random_tensor((5, 4), dtype, 3))
    placed = [shard(mesh, [Shard(dim)], values[dim]) for dim in range(2)]
    return [Parameter(value.clone()) for value in (*placed, *values[2:])], values


def groups_of(cls, params, **options):
    half = len(params) // 2
    groups = [{"params": params[:half]}, {"params": params[half:], "lr": 0.02}]
    return cls(groups, lr=0.05, weight_decay=0.1, memory_plane="anchored", **options)


LAYOUTS = [line_parameters, hybrid_parameters, copied_parameters, complex_parameters]


class Gradients:
    """Those of the optimizers' parameters, which are the same ones: of two fixed directions."""

    def __init__(self, *optimizers):
        self.pairs = []
        for optimizer in optimizers:
            for i, param in enumerate(parameters(optimizer)):
                whole_ones = [random_tensor(param.shape, param.dtype, 100 * k + i) for k in (1, 2)]
                placed = [place_like(param, tensor) for tensor in whole_ones]
                param.grad = placed[0]
                self.pairs.append((local(placed[0]), *[local(t).clone() for t in placed]))

    def set(self, step):
        first, second = math.cos(0.2 * step), 0.7 + 0.6 * math.sin(0.7 * step)
        for grad, a, b in self.pairs:
            torch.add(first * a, b, alpha=second, out=grad)


def assert_agree(optimizer, expected, tolerance):
    """Parameters and memories agree relatively, betas absolutely."""
    for i, (ours, theirs) in enumerate(
        zip(parameters(optimizer), parameters(expected), strict=True)
    ):
        state, reference = optimizer.state[ours], expected.state[theirs]
        pairs = {"x": (ours, theirs), "beta": (state["beta"], reference["beta"])}
        pairs.update({name: (state[name], reference[name]) for name in MEMORIES[type(expected)]})
        for name, (actual, wanted) in pairs.items():
            also = [torch.ones(())] if name == "beta" else []
            error = relative_error(whole(actual), whole(wanted), *also)
            assert error <= tolerance, f"{name} {i}: {error}"


def assert_same_on_every_rank(tensor):
    gathered = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, tensor)
    assert all(torch.equal(bits(other), bits(tensor)) for other in gathered)


# ---- the same steps ---------------------------------------------------------------


def clipped_steps(cls, layout, dtype, tolerance, scopes, backend=None):
    for scope in scopes:
        params, values = layout(dtype)
        whole_ones = [Parameter(value.clone()) for value in values]
        optimizer, expected = (
            groups_of(cls, given, beta_scope=scope, backend=backend)
            for given in (params, whole_ones)
        )
        gradients = Gradients(optimizer, expected)
        gradients.set(0)
        # Some steps are clipped, and some are not.
        max_norm = clip_grad_norm_(parameters(expected), math.inf).item()
        optimizer.max_grad_norm = max_norm
        norms, expected_norms, betas = [], [], []
        for step in range(STEPS):
            gradients.set(step)
            optimizer.step()
            norms.append(optimizer.grad_norm)
            expected_norms.append(clip_grad_norm_(parameters(expected), max_norm))
            expected.step()
            betas += [b for s in expected.state.values() for b in s["beta"].reshape(-1).tolist()]
        assert_agree(optimizer, expected, tolerance)
        norms, expected_norms = torch.stack(norms), torch.stack(expected_norms)
        assert relative_error(norms, expected_norms) <= tolerance
        assert_same_on_every_rank(norms)
        clipped = (expected_norms > max_norm).sum()
        assert STEPS / 10 < clipped < STEPS * 9 / 10
        assert any(0 < beta < 0.88 for beta in betas), f"beta says nothing here: {betas}"
        assert optimizer.skipped_steps == 0


@both
@pytest.mark.parametrize("layout", LAYOUTS)
def test_shards_are_clipped_as_in_one_process(two_ranks, cls, layout):
    two_ranks.run(clipped_steps, cls, layout, torch.float64, 1e-10, SCOPES)


@both
@pytest.mark.parametrize("backend", backends("cpu", "reference", "cuda", "triton"))
def test_other_backends_clip_shards_as_in_one_process(two_ranks, cls, backend):
    two_ranks.run(clipped_steps, cls, line_parameters, torch.float64, 1e-10, SCOPES, backend)


@pytest.mark.parametrize(
    ("cls", "dtype", "tolerance", "scopes"),
    [
        (AMAdamW, torch.float64, 1e-10, ("tensor", "row")),
        (AMSGD, torch.float64, 1e-10, ("global",)),
        (AMAdamW, torch.float32, 1e-6, ("tensor",)),
        (AMSGD, torch.float32, 1e-6, ("row",)),
    ],
)
def test_shards_of_any_kind_are_clipped_as_in_one_process(
    four_ranks, cls, dtype, tolerance, scopes
):
    four_ranks.run(clipped_steps, cls, mixed_parameters, dtype, tolerance, scopes)


def gradient_in_terms():
    """The sum of what the ranks have is clipped; its norm counts once."""
    mesh = init_device_mesh("cpu", (2,))
    optimizer = AMSGD([Parameter(shard(mesh, [Replicate()], torch.ones(3, 4)))], max_grad_norm=0.5)
    term = torch.full((3, 4), 1.0 + dist.get_rank())
    parameters(optimizer)[0].grad = DTensor.from_local(term, mesh, [Partial()])
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(3 * math.sqrt(12), rel=1e-12)


def test_a_gradient_in_terms_is_summed_and_counts_once(two_ranks):
    two_ranks.run(gradient_in_terms)


def groups_of_collectives(optimizer):
    """How many all-reduces a step has over each process group."""
    calls = Counter()
    all_reduce = dist.all_reduce

    def record(tensor, *args, group=None, **more):
        calls[group] += 1
        return all_reduce(tensor, *args, group=group, **more)

    dist.all_reduce = record
    try:
        optimizer.step()
    finally:
        dist.all_reduce = all_reduce
    return calls


def collectives():
    for cls in OPTIMIZERS:
        optimizer = groups_of(cls, mixed_parameters(torch.float32)[0])
        gradients = Gradients(optimizer)
        gradients.set(0)
        before = groups_of_collectives(optimizer)
        optimizer.max_grad_norm = 1.0
        clipped = groups_of_collectives(optimizer)
        groups = {
            param.device_mesh.get_group(dim)
            for param in parameters(optimizer)
            if isinstance(param, DTensor)
            for dim in range(param.device_mesh.ndim)
        }
        assert len(groups) == 3
        assert clipped - before == dict.fromkeys(groups, 1)


def test_the_norm_takes_one_collective_for_a_process_group(four_ranks):
    four_ranks.run(collectives)


def no_collectives():
    mesh = init_device_mesh("cpu", (2,))
    for cls in OPTIMIZERS:
        params, _ = copied_parameters(torch.float32)
        params += [Parameter(shard(mesh, [Replicate()], torch.ones(3))), Parameter(torch.ones(4))]
        optimizer = groups_of(cls, params, max_grad_norm=1.0, skip_nonfinite=True)
        Gradients(optimizer).set(0)
        assert not groups_of_collectives(optimizer)


def test_the_norm_of_what_is_whole_on_each_rank_takes_no_collective(two_ranks):
    two_ranks.run(no_collectives)


# ---- bad gradients ----------------------------------------------------------------


def local_bits(optimizer):
    """Of this rank's parameters and state."""
    return [
        {
            "param": bits(local(param)).tolist(),
            **{name: bits(local(v)).tolist() for name, v in optimizer.state[param].items()},
        }
        for param in parameters(optimizer)
    ]


def skips(cls, layout, place, bad_step, bad, options):
    optimizer, twin = (
        groups_of(cls, layout(torch.float32)[0], skip_nonfinite=True, **options) for _ in range(2)
    )
    gradients = Gradients(optimizer, twin)
    for step in range(4):
        loss = torch.tensor(math.cos(0.5 * step))
        gradients.set(step)
        if step == bad_step:
            before = local_bits(optimizer)
            if dist.get_rank() == dist.get_world_size() - 1:
                local(parameters(optimizer)[place].grad).view(-1)[0] = bad
            optimizer.step(lambda: torch.tensor(math.nan))
            after = local_bits(optimizer)
            if step > 0:
                assert after == before
            else:  # state may have been made, but has seen no step
                assert [p["param"] for p in after] == [p["param"] for p in before]
                assert all(state["step"] == 0 for state in optimizer.state.values())
            assert optimizer.skipped_steps == 1
            assert not optimizer.grad_norm.isfinite()
            gradients.set(step)
        optimizer.step(lambda loss=loss: loss)
        twin.step(lambda loss=loss: loss)
        assert local_bits(optimizer) == local_bits(twin)
    assert optimizer.skipped_steps == 1
    assert twin.skipped_steps == 0
    assert_same_on_every_rank(optimizer.grad_norm)


def skips_each_way(layout, place, cases):
    for cls in OPTIMIZERS:
        for options in (
            {"beta_scope": "tensor", "max_grad_norm": 1.0},
            {"beta_scope": "row"},
            {"beta_scope": "global", "gap": "loss"},
        ):
            for bad_step, bad in cases:
                skips(cls, layout, place, bad_step, bad, options)


@pytest.mark.parametrize("layout", [line_parameters, hybrid_parameters])
def test_a_bad_shard_on_one_rank_skips_the_step_on_all(two_ranks, layout):
    two_ranks.run(skips_each_way, layout, 1, [(0, math.nan), (2, math.nan), (2, -math.inf)])


def test_a_bad_shard_over_two_mesh_dimensions_skips_the_step_on_all(four_ranks):
    four_ranks.run(skips_each_way, mixed_parameters, 2, [(1, math.nan)])


# ---- training ---------------------------------------------------------------------


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return Sequential(Linear(16, 20), Tanh(), Linear(20, 6)).to(dtype)


def batch_of(step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(8, 16, generator=generator, dtype=torch.float64)


def part_of_rank(size=2):
    rows = 8 // size
    return slice(dist.get_rank() % size * rows, (dist.get_rank() % size + 1) * rows)


def loss_of(model, step, part=slice(None)):
    return model(batch_of(step)[part]).square().mean()


def parallel(model, mesh):
    """FSDP2 over tensor parallelism."""
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return fully_shard(parallelize_module(model, mesh["tensor"], plan), mesh=mesh["data"])


def two_models(offload=None):
    """One on two ranks by FSDP2, and one that is whole."""
    mesh = init_device_mesh("cpu", (2,))
    return fully_shard(model_of(), mesh=mesh, offload_policy=offload or OffloadPolicy()), model_of()


def clipped_training(cls, offload):
    model, whole_model = two_models(offload)
    optimizer = cls(model.parameters(), lr=0.1, max_grad_norm=0.01)
    expected = cls(whole_model.parameters(), lr=0.1)
    for step in range(10):
        optimizer.zero_grad()
        loss_of(model, step, part_of_rank()).backward()
        optimizer.step()
        expected.zero_grad()
        loss_of(whole_model, step).backward()
        norm = clip_grad_norm_(whole_model.parameters(), 0.01)
        assert norm > 0.01
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-10)
        expected.step()
    assert_agree(optimizer, expected, 1e-10)


@both
@pytest.mark.parametrize("offload", [None, CPUOffloadPolicy(pin_memory=False)], ids=["", "offload"])
def test_fsdp_training_is_clipped_as_in_one_process(two_ranks, cls, offload):
    two_ranks.run(clipped_training, cls, offload)


def parallel_training(cls):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model, whole_model = parallel(model_of(), mesh), model_of()
    assert "_StridedShard" in {type(p).__name__ for x in model.parameters() for p in x.placements}
    optimizer = cls(model.parameters(), lr=0.1, max_grad_norm=0.01)
    expected = cls(whole_model.parameters(), lr=0.1)
    row = mesh.get_local_rank("data")
    for step in range(10):
        optimizer.zero_grad()
        loss_of(model, step, slice(4 * row, 4 * row + 4)).backward()
        optimizer.step()
        expected.zero_grad()
        loss_of(whole_model, step).backward()
        clip_grad_norm_(whole_model.parameters(), 0.01)
        expected.step()
    assert_agree(optimizer, expected, 1e-10)


@both
def test_fsdp_over_tensor_parallelism_is_clipped_as_in_one_process(four_ranks, cls):
    four_ranks.run(parallel_training, cls)


def accumulated_training(cls):
    model, whole_model = two_models()
    optimizer = cls(model.parameters(), lr=0.1, max_grad_norm=0.01)
    expected = cls(whole_model.parameters(), lr=0.1)
    for step in range(0, 12, 3):
        optimizer.zero_grad()
        expected.zero_grad()
        for micro in range(3):
            model.set_requires_gradient_sync(micro == 2)
            loss_of(model, step + micro, part_of_rank()).backward()
            loss_of(whole_model, step + micro).backward()
        optimizer.step()
        norm = clip_grad_norm_(whole_model.parameters(), 0.01)
        assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-10)
        expected.step()
    assert_agree(optimizer, expected, 1e-10)


@both
def test_what_has_been_accumulated_is_clipped_together(two_ranks, cls):
    two_ranks.run(accumulated_training, cls)


def two_optimizers():
    """Each clips by the norm of its own, as clip_grad_norm_ of each one's parameters."""
    models = two_models()
    steps = []
    for model, norms in zip(models, ((0.01, 0.005), (None, None)), strict=True):
        matrices = [p for p in model.parameters() if p.dim() > 1]
        vectors = [p for p in model.parameters() if p.dim() < 2]
        steps.append(
            (
                AMAdamW(matrices, lr=0.1, max_grad_norm=norms[0]),
                AMSGD(vectors, lr=0.1, max_grad_norm=norms[1]),
            )
        )
    for step in range(6):
        for model, optimizers, part in zip(
            models, steps, (part_of_rank(), slice(None)), strict=True
        ):
            model.zero_grad()
            loss_of(model, step, part).backward()
            for optimizer, norm in zip(optimizers, (0.01, 0.005), strict=True):
                if model is models[1]:
                    clip_grad_norm_(parameters(optimizer), norm)
                optimizer.step()
    for optimizer, expected in zip(*steps, strict=True):
        assert_agree(optimizer, expected, 1e-10)


def test_two_optimizers_of_a_loop_clip_by_their_own_norms(two_ranks):
    two_ranks.run(two_optimizers)


def clipped_twice(cls):
    """By the user too: as clip_grad_norm_ called twice."""
    model, whole_model = two_models()
    optimizer = cls(model.parameters(), lr=0.1, max_grad_norm=0.01)
    expected = cls(whole_model.parameters(), lr=0.1)
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step, part_of_rank()).backward()
        clip_grad_norm_(model.parameters(), 0.01)
        optimizer.step()
        assert optimizer.grad_norm.item() == pytest.approx(0.01, rel=1e-3)
        expected.zero_grad()
        loss_of(whole_model, step).backward()
        for _ in range(2):
            clip_grad_norm_(whole_model.parameters(), 0.01)
        expected.step()
    # torch 2.9 adds its 1e-6 to the part that each rank has of the norm.
    assert_agree(optimizer, expected, 1e-5)


@both
def test_gradients_that_the_user_has_clipped_too_are_clipped_twice(two_ranks, cls):
    two_ranks.run(clipped_twice, cls)


# ---- GradScaler -------------------------------------------------------------------


def scaled_training(cls, fused, skip_nonfinite):
    """The norm is of unscaled gradients; an overflow on one rank skips the step on both."""
    model, whole_model = two_models()
    optimizer = cls(
        model.parameters(), lr=0.1, fused=fused, max_grad_norm=0.01, skip_nonfinite=skip_nonfinite
    )
    expected = cls(whole_model.parameters(), lr=0.1)
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**10) for _ in range(2)]
    for step in range(8):
        optimizer.zero_grad()
        scalers[0].scale(loss_of(model, step, part_of_rank())).backward()
        expected.zero_grad()
        scalers[1].scale(loss_of(whole_model, step)).backward()
        if step == 3:
            if dist.get_rank() == 1:
                local(model[0].weight.grad)[0, 0] = math.inf
            whole_model[0].weight.grad[0, 0] = math.inf
        scalers[1].unscale_(expected)
        norm = clip_grad_norm_(whole_model.parameters(), 0.01)
        for scaler, stepped in zip(scalers, (optimizer, expected), strict=True):
            scaler.step(stepped)
            scaler.update()
        if step != 3:
            assert optimizer.grad_norm.item() == pytest.approx(norm.item(), rel=1e-10)
        assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() == 2.0**9
    assert all(state["step"] == 7 for state in optimizer.state.values())
    # Where the scaler decides, no step is begun that could be skipped.
    assert optimizer.skipped_steps == bool(fused)
    assert_agree(optimizer, expected, 1e-10)


def scaled_each_way(fused, skip_nonfinite):
    for cls in OPTIMIZERS:
        scaled_training(cls, fused, skip_nonfinite)


@pytest.mark.parametrize("fused", [True, None])
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_scaled_gradients_are_clipped_as_unscaled_ones(two_ranks, fused, skip_nonfinite):
    two_ranks.run(scaled_each_way, fused, skip_nonfinite)


# ---- what is whole on each rank ------------------------------------------------------


def a_bad_whole_gradient():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    tensors = [random_tensor((8, 6), seed=i) for i in range(4)]
    placements = [[Shard(0), Shard(1)], [Replicate(), Shard(0)], [Replicate(), Replicate()]]
    params = [
        *(Parameter(shard(mesh, p, t)) for p, t in zip(placements, tensors[:3], strict=True)),
        Parameter(tensors[3]),
    ]
    for bad in (2, 3):  # the replicated, and the plain one
        optimizer = AMAdamW(params, skip_nonfinite=True)
        for param in params:
            param.grad = torch.ones_like(param)
        if dist.get_rank() == 1:
            local(params[bad].grad)[0, 0] = math.nan
        before = [local(param).clone() for param in params]
        optimizer.step()
        assert optimizer.skipped_steps.item() == 1
        assert all(map(torch.equal, before, map(local, params)))


def test_a_bad_whole_gradient_of_one_rank_is_told_with_the_norm_of_shards(four_ranks):
    four_ranks.run(a_bad_whole_gradient)
