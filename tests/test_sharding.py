"""DTensor parameters over several processes, against whole tensors in one."""

import gc
import math
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import MEMORIES, OPTIMIZERS, backends, bits, gradient, parameters, relative_error
from ranks import Ranks
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor._dtensor_spec import DTensorSpec
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn import Linear, Parameter, ParameterList, Sequential, Tanh
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_

from adamem_fused import AMSGD, AMAdamW

# Over two ranks: even; 3 + 2 rows; a shard of no elements on rank 1.
SHAPES = [(6, 3), (5, 3), (1, 4), (16,)]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.complex64: 1e-5}

both = pytest.mark.parametrize("cls", OPTIMIZERS)
each_backend = pytest.mark.parametrize("backend", backends("reference", "cuda", "triton"))
scopes = pytest.mark.parametrize("scope", ["tensor", "global"])


@pytest.fixture(scope="module")
def two_ranks():
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="module")
def four_ranks():
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


# ---- on the ranks -----------------------------------------------------------------


def line(size=2):
    return init_device_mesh("cpu", (size,))


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard(mesh, placements, tensor):
    return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


def place_like(param, tensor):
    return (
        shard(param.device_mesh, param.placements, tensor) if isinstance(param, DTensor) else tensor
    )


def tensors(dtype=torch.float32, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def fsdp_parameters(values, mesh):
    """The values as parameters that fully_shard has sharded."""
    return list(fully_shard(ParameterList(value.clone() for value in values), mesh=mesh))


def whole_parameters(values):
    return [Parameter(value.clone()) for value in values]


def two_groups(cls, params, **options):
    first = {"params": params[:2]}
    second = {"params": params[2:], "lr": 0.02, "weight_decay": 0.1}
    return cls([first, second], lr=0.05, **options)


def take_step(optimizer, step, skip=()):
    for index, param in enumerate(parameters(optimizer)):
        template = torch.empty(param.shape, dtype=param.dtype)
        grad = gradient(template, step, index=index)
        param.grad = None if index in skip else place_like(param, grad)
    optimizer.step(lambda: math.cos(0.5 * step))


def assert_same_on_every_rank(optimizer):
    """What every rank has to hold the same of, it holds bit for bit."""
    scalars = torch.stack(
        [
            value.double()
            for param in parameters(optimizer)
            for value in optimizer.state[param].values()
            if value.ndim == 0 and not isinstance(value, DTensor)
        ]
    )
    gathered = [torch.empty_like(scalars) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, scalars)
    assert all(torch.equal(other, scalars) for other in gathered)


def assert_agree(optimizer, expected, tolerance):
    """Parameters and state agree with those of one process: tensors relatively."""
    memories = MEMORIES[type(expected)]
    pairs = zip(parameters(optimizer), parameters(expected), strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        error = relative_error(whole(ours), theirs)
        assert error <= tolerance, f"parameter {index}: {error}"
        state, reference = optimizer.state[ours], expected.state[theirs]
        assert state.keys() == reference.keys()
        for name, value in reference.items():
            if name in memories and isinstance(ours, DTensor):
                assert state[name].placements == ours.placements
                assert state[name].to_local().shape == ours.to_local().shape
            else:
                assert not isinstance(state[name], DTensor)
            if name in memories:
                error = relative_error(whole(state[name]), value)
            else:
                error = abs(state[name].item() - value.item())
            assert error <= tolerance, f"{name} {index}: {error}"
    assert_same_on_every_rank(optimizer)


def betas(optimizer):
    states = [optimizer.state[param] for param in parameters(optimizer)]
    return [state["beta"].item() for state in states if state]


def assert_steps_agree(optimizer, expected, tolerance, steps=10, skip=lambda step: ()):
    seen = []
    for step in range(steps):
        take_step(optimizer, step, skip(step))
        take_step(expected, step, skip(step))
        assert betas(optimizer) == pytest.approx(betas(expected), rel=0, abs=tolerance)
        seen += betas(expected)
    assert_agree(optimizer, expected, tolerance)
    assert any(0 < beta < 0.88 for beta in seen), f"beta says nothing here: {seen}"


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return Sequential(Linear(5, 8), Tanh(), Linear(8, 3)).to(dtype)


def batch_of(step, rows=8):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(rows, 5, generator=generator, dtype=torch.float64)


def train(model, optimizer, steps, part=slice(None), max_norm=None, start=0):
    for step in range(start, start + steps):
        optimizer.zero_grad()
        model(batch_of(step)[part]).square().mean().backward()
        if max_norm is not None:
            norm = clip_grad_norm_(model.parameters(), max_norm)
            assert whole(norm) > max_norm
        optimizer.step()


def part_of_rank():
    return slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)


def bits_of(optimizer):
    return [
        {name: bits(whole(value)).tolist() for name, value in optimizer.state[param].items()}
        for param in parameters(optimizer)
    ]


# ---- the same steps ---------------------------------------------------------------


def fsdp_steps(cls, dtype, options):
    params = fsdp_parameters(tensors(dtype), line())
    shapes = [tuple(param.to_local().shape) for param in params]
    assert (
        shapes == [[(3, 3), (3, 3), (1, 4), (8,)], [(3, 3), (2, 3), (0, 4), (8,)]][dist.get_rank()]
    )
    assert_steps_agree(
        two_groups(cls, params, **options),
        two_groups(cls, whole_parameters(tensors(dtype)), **options),
        TOLERANCE[dtype],
    )


@both
@scopes
@each_backend
@pytest.mark.parametrize("plane", ["level", "anchored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fsdp_takes_the_steps_of_one_process(two_ranks, cls, scope, backend, plane, dtype):
    options = {"backend": backend, "beta_scope": scope, "memory_plane": plane}
    two_ranks.run(fsdp_steps, cls, dtype, options)


def idle_steps(cls, options):
    """Zero gradients at lr 0, but for a tensor that has a gradient, on one rank alone."""
    params = fsdp_parameters(tensors(torch.float64), line())
    optimizers = [
        two_groups(cls, p, **options) for p in (params, whole_parameters(tensors(torch.float64)))
    ]
    for optimizer in optimizers:
        lrs = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = 0.0
        for _ in range(2):
            for index, param in enumerate(parameters(optimizer)):
                grad = torch.zeros(param.shape, dtype=param.dtype)
                if index == 1:
                    grad[0] = 1.0
                param.grad = place_like(param, grad)
            optimizer.step()
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        steps = [optimizer.state[param]["step"].item() for param in parameters(optimizer)]
        assert steps == [0, 2, 0, 0]
    assert_steps_agree(*optimizers, 1e-12)


@both
@scopes
@each_backend
def test_idle_steps_are_those_of_one_process(two_ranks, cls, scope, backend):
    two_ranks.run(idle_steps, cls, {"backend": backend, "beta_scope": scope})


def state_is_read_first(cls, scope):
    models = [model_of(torch.float64) for _ in range(2)]
    optimizers = []
    for model, read in zip(models, (True, False), strict=True):
        fully_shard(model, mesh=line())
        optimizer = cls(model.parameters(), lr=0.05, weight_decay=0.1, beta_scope=scope)
        if read:
            get_optimizer_state_dict(model, optimizer)
        train(model, optimizer, 3, part_of_rank())
        optimizers.append(optimizer)
    assert bits_of(optimizers[0]) == bits_of(optimizers[1])


@both
@scopes
def test_reading_the_state_of_a_new_optimizer_changes_nothing(two_ranks, cls, scope):
    two_ranks.run(state_is_read_first, cls, scope)


def zero_buffers_from_sgd():
    """As get_optimizer_state_dict makes them for a new SGD."""
    mesh = line()
    params = fsdp_parameters(tensors(), mesh)
    buffers = [torch.zeros(param.shape) for param in params]
    buffers[1][0] = 1.0  # on the first rank alone
    group = {**torch.optim.SGD([torch.zeros(1)], momentum=0.9).state_dict()["param_groups"][0]}
    state = {i: {"momentum_buffer": place_like(params[i], b)} for i, b in enumerate(buffers)}
    optimizer = AMSGD(params)
    optimizer.load_state_dict({"state": state, "param_groups": [{**group, "params": [*state]}]})
    assert [optimizer.state[param]["step"].item() for param in params] == [0, 1, 0, 0]


def test_buffers_of_zeros_from_sgd_are_no_step_on_any_rank(two_ranks):
    two_ranks.run(zero_buffers_from_sgd)


@both
@each_backend
def test_the_gap_of_losses_is_shared_by_the_sizes_of_whole_tensors(two_ranks, cls, backend):
    options = {"backend": backend, "beta_scope": "global", "gap": "loss"}
    two_ranks.run(fsdp_steps, cls, torch.float64, options)


@both
def test_the_gap_of_losses_is_shared_with_complex_tensors_as_pairs_of_reals(cls):
    values = tensors(torch.float64, [(4, 2), (3,), (5,)])
    templates = list(values)
    options = {"beta_scope": "global", "gap": "loss"}
    pairs = two_groups(cls, whole_parameters(values), **options)
    values[0] = torch.view_as_complex(values[0])
    numbers = two_groups(cls, whole_parameters(values), **options)
    for step in range(5):
        for optimizer in (pairs, numbers):
            for index, param in enumerate(parameters(optimizer)):
                grad = gradient(templates[index], step, index=index)
                param.grad = torch.view_as_complex(grad) if param.is_complex() else grad
            optimizer.step(lambda step=step: math.cos(0.5 * step))
        assert betas(numbers) == betas(pairs)


def mixed_steps(cls, options):
    """Sharded over either dimension, complex, replicated and plain parameters in turn."""
    mesh = line()
    shapes = [(6, 3), (), (4, 5), (3,), (2, 2)]
    values = tensors(torch.float64, shapes)
    values[2] = torch.complex(values[2], values[2].flip(0))
    placements = [[Shard(0)], None, [Shard(1)], [Replicate()], None]
    params = [
        Parameter(value.clone() if placed is None else shard(mesh, placed, value))
        for value, placed in zip(values, placements, strict=True)
    ]
    assert_steps_agree(
        two_groups(cls, params, **options),
        two_groups(cls, whole_parameters(values), **options),
        1e-12,
        skip=lambda step: {3: [0], 4: [0, 2], 5: [1]}.get(step, []),
    )


@both
@each_backend
@pytest.mark.parametrize(
    "options",
    [{"beta_scope": "tensor"}, {"beta_scope": "global"}, {"beta_scope": "global", "gap": "loss"}],
    ids=["tensor", "global", "loss"],
)
def test_mixed_parameters_take_the_steps_of_one_process(two_ranks, cls, backend, options):
    two_ranks.run(mixed_steps, cls, {"backend": backend, **options})


def step_of_a_graph(cls, backend):
    param = Parameter(shard(line(), [Shard(0)], tensors()[0]))
    optimizer = cls([param], backend=backend)
    for _ in range(2):
        now, later = (param**2).sum(), (param**3).sum()
        now.backward()
        optimizer.step()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            later.backward()
    for name in MEMORIES[cls]:
        memory = optimizer.state[param][name]
        assert memory._version > 0 and memory._local_tensor._version > 0


@both
@pytest.mark.parametrize("backend", backends("cuda", "triton"))
def test_a_graph_from_before_a_step_raises(two_ranks, cls, backend):
    two_ranks.run(step_of_a_graph, cls, backend)


def partial_gradient_step(cls):
    mesh = line()
    value, grad = tensors(torch.float64, [(4, 3), (4, 3)])
    optimizer = cls([Parameter(shard(mesh, [Replicate()], value))], beta_scope="tensor")
    expected = cls(whole_parameters([value]), beta_scope="tensor")
    for step in range(3):
        term = grad * math.cos(step) * (0.25 + 0.5 * dist.get_rank())
        parameters(optimizer)[0].grad = DTensor.from_local(term, mesh, [Partial()])
        parameters(expected)[0].grad = grad * math.cos(step)
        optimizer.step()
        expected.step()
        assert_agree(optimizer, expected, 1e-12)


@both
def test_a_gradient_in_terms_is_summed(two_ranks, cls):
    two_ranks.run(partial_gradient_step, cls)


def hybrid_steps(cls, sizes, options):
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("replicate", "shard"))
    params = fsdp_parameters(tensors(torch.float64), mesh)
    assert all(param.placements == (Replicate(), Shard(0)) for param in params)
    assert_steps_agree(
        two_groups(cls, params, **options),
        two_groups(cls, whole_parameters(tensors(torch.float64)), **options),
        1e-12,
    )


@both
@scopes
@pytest.mark.parametrize("sizes", [(1, 2), (2, 1)])
def test_hybrid_shards_take_the_steps_of_one_process(two_ranks, cls, scope, sizes):
    two_ranks.run(hybrid_steps, cls, sizes, {"beta_scope": scope})


@both
@scopes
def test_hybrid_shards_of_four_ranks_take_the_steps_of_one_process(four_ranks, cls, scope):
    four_ranks.run(hybrid_steps, cls, (2, 2), {"beta_scope": scope})


# ---- training ---------------------------------------------------------------------


def parallel_training(cls, scope, sizes):
    """Tensor parallel, and FSDP2 over it where the mesh has two dimensions of more than one."""
    mesh = init_device_mesh("cpu", sizes, mesh_dim_names=("data", "tensor"))
    model = parallelize_module(
        model_of(), mesh["tensor"], {"0": ColwiseParallel(), "2": RowwiseParallel()}
    )
    part = slice(None)
    if sizes[0] > 1:
        fully_shard(model, mesh=mesh["data"])
        part = slice(mesh.get_local_rank("data") * 4, mesh.get_local_rank("data") * 4 + 4)
    optimizer = cls(model.parameters(), lr=0.1, beta_scope=scope)
    expected_model = model_of()
    expected = cls(expected_model.parameters(), lr=0.1, beta_scope=scope)
    train(model, optimizer, 10, part)
    train(expected_model, expected, 10)
    assert_agree(optimizer, expected, 1e-10)


@both
@scopes
def test_tensor_parallel_training_is_that_of_one_process(two_ranks, cls, scope):
    two_ranks.run(parallel_training, cls, scope, (1, 2))


@both
@scopes
def test_shards_over_two_mesh_dimensions_train_as_one_process_does(four_ranks, cls, scope):
    four_ranks.run(parallel_training, cls, scope, (2, 2))


def clipped_training(cls, scope):
    model = fully_shard(model_of(), mesh=line())
    optimizer = cls(model.parameters(), lr=0.1, beta_scope=scope)
    expected_model = model_of()
    expected = cls(expected_model.parameters(), lr=0.1, beta_scope=scope)
    train(model, optimizer, 10, part_of_rank(), max_norm=0.01)
    train(expected_model, expected, 10, max_norm=0.01)
    # torch 2.9 adds its 1e-6 to the part that each rank has of the norm.
    assert_agree(optimizer, expected, 1e-5)


@both
@scopes
def test_fsdp_training_with_clipped_gradients_is_that_of_one_process(two_ranks, cls, scope):
    two_ranks.run(clipped_training, cls, scope)


def ddp_training(cls, scope):
    model = DistributedDataParallel(model_of())
    optimizer = cls(model.parameters(), lr=0.1, beta_scope=scope)
    expected_model = model_of()
    expected = cls(expected_model.parameters(), lr=0.1, beta_scope=scope)
    train(model, optimizer, 10, part_of_rank())
    train(expected_model, expected, 10)
    assert_agree(optimizer, expected, 1e-10)


@both
@scopes
def test_ddp_training_is_that_of_one_process(two_ranks, cls, scope):
    two_ranks.run(ddp_training, cls, scope)


def overflow_on_one_rank(cls, scope):
    params = fsdp_parameters(tensors(), line())
    optimizer = two_groups(cls, params, backend="cpu", beta_scope=scope)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.zeros(()))  # the scaler makes its tensors at its first use
    take_step(optimizer, 0)
    before = [param.full_tensor() for param in params], bits_of(optimizer)

    for index, param in enumerate(params):
        param.grad = place_like(param, 8 * gradient(torch.empty(param.shape), 1, index=index))
    if dist.get_rank() == 1:
        params[1].grad.to_local()[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert bits_of(optimizer) == before[1]
    assert all(torch.equal(p.full_tensor(), b) for p, b in zip(params, before[0], strict=True))

    for index, param in enumerate(params):
        param.grad = place_like(param, 4 * gradient(torch.empty(param.shape), 1, index=index))
    scaler.step(optimizer)
    expected = two_groups(cls, whole_parameters(tensors()), backend="cpu", beta_scope=scope)
    take_step(expected, 0)
    take_step(expected, 1)
    assert_agree(optimizer, expected, 1e-5)


@both
@scopes
def test_an_overflow_on_one_rank_skips_the_step_on_all(two_ranks, cls, scope):
    two_ranks.run(overflow_on_one_rank, cls, scope)


# ---- checkpoints ------------------------------------------------------------------


def save_two_ranks(cls, path):
    model = fully_shard(model_of(), mesh=line())
    optimizer = cls(model.parameters())
    train(model, optimizer, 3, part_of_rank())
    dcp.save(get_optimizer_state_dict(model, optimizer), checkpoint_id=path / "state")
    saved = bits_of(optimizer)
    if dist.get_rank() == 0:
        torch.save(saved, path / "bits.pt")

    other = fully_shard(model_of(), mesh=line())
    resumed = cls(other.parameters())
    state = get_optimizer_state_dict(other, resumed)
    dcp.load(state, checkpoint_id=path / "state")
    set_optimizer_state_dict(other, resumed, state)
    assert bits_of(resumed) == saved
    for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
        ours.data.to_local().copy_(theirs.data.to_local())
        assert resumed.state[ours][MEMORIES[cls][0]].placements == ours.placements
    train(model, optimizer, 2, part_of_rank(), start=3)
    train(other, resumed, 2, part_of_rank(), start=3)
    assert bits_of(resumed) == bits_of(optimizer)


@both
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it is to be
def test_a_distributed_checkpoint_keeps_every_bit_and_loads_on_one_process(
    two_ranks, cls, tmp_path
):
    two_ranks.run(save_two_ranks, cls, tmp_path)
    model = model_of()
    optimizer = cls(model.parameters())
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load(state, checkpoint_id=tmp_path / "state", no_dist=True)
    set_optimizer_state_dict(model, optimizer, state)
    assert bits_of(optimizer) == torch.load(tmp_path / "bits.pt")


def full_state_dict(cls):
    model = fully_shard(model_of(), mesh=line())
    optimizer = cls(model.parameters())
    train(model, optimizer, 3, part_of_rank())
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    resumed_model = fully_shard(model_of(), mesh=line())
    resumed = cls(resumed_model.parameters())
    set_optimizer_state_dict(resumed_model, resumed, state, options=options)
    assert bits_of(resumed) == bits_of(optimizer)


@both
def test_a_full_state_dict_of_rank_0_loads_on_every_rank(two_ranks, cls):
    two_ranks.run(full_state_dict, cls)


# ---- errors and costs -------------------------------------------------------------


def errors_on_ranks():
    mesh = line()
    value = torch.ones(4, 3)
    term = DTensor.from_local(value, mesh, [Partial()])
    with pytest.raises(ValueError, match=r"Invalid placements: \(Partial\(sum\),\)"):
        AMAdamW([Parameter(term)])

    param = Parameter(shard(mesh, [Shard(0)], value))
    sharded, plain = AMAdamW([param]), AMAdamW([Parameter(value.clone())])
    take_step(sharded, 0)
    take_step(plain, 0)
    for optimizer, other in ((sharded, plain), (plain, sharded)):
        before = bits_of(optimizer)
        with pytest.raises(ValueError, match="loaded state exp_avg and its parameter have to be"):
            optimizer.load_state_dict(other.state_dict())
        assert bits_of(optimizer) == before

    own = init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "own"))["own"]
    for grad in (value, shard(own, [Replicate()], value)):
        param = Parameter(shard(mesh, [Replicate()], value))
        param.grad = grad
        optimizer = AMSGD([param])
        with pytest.raises(ValueError, match="grad and its parameter have to be"):
            optimizer.step()
        assert not optimizer.state


def test_what_cannot_be_done_with_shards_is_an_error(two_ranks):
    two_ranks.run(errors_on_ranks)


def objects_over_steps(cls):
    optimizer = two_groups(cls, fsdp_parameters(tensors(), line()))
    counts = []
    for step in range(12):
        take_step(optimizer, step)
        optimizer.zero_grad()
        if step in (3, 11):
            gc.collect()
            kinds = list(map(type, gc.get_objects()))
            counts.append([kinds.count(kind) for kind in (DTensorSpec, DTensor, torch.Tensor)])
    assert counts[0] == counts[1] and all(counts[0][:2]), counts


@both
def test_a_step_leaves_no_objects_behind(two_ranks, cls):
    two_ranks.run(objects_over_steps, cls)


def collectives_of_a_step(cls):
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("replicate", "shard"))
    own = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
    sharded = fsdp_parameters(tensors(), mesh) + fsdp_parameters(tensors(), mesh["shard"])
    unsharded = [
        *fsdp_parameters(tensors(), own),
        Parameter(shard(mesh["shard"], [Replicate()], torch.ones(3))),
        *whole_parameters(tensors()),
    ]
    calls = []
    all_reduce = dist.all_reduce
    dist.all_reduce = lambda *args, **kwargs: calls.append(args) or all_reduce(*args, **kwargs)
    try:
        take_step(two_groups(cls, sharded + unsharded), 0)
        assert len(calls) == 1
        calls.clear()
        take_step(two_groups(cls, unsharded), 0)
        assert calls == []
    finally:
        dist.all_reduce = all_reduce


@both
def test_a_step_needs_one_collective_for_all_its_tensors(two_ranks, cls):
    two_ranks.run(collectives_of_a_step, cls)


def test_the_package_does_not_import_dtensor():
    code = "import sys, adamem_fused; sys.exit('torch.distributed.tensor' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
