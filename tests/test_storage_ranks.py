"""Low-precision state and parameters of DTensors over several processes, against one process."""

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import OPTIMIZERS, gradient, parameters
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import Linear, Parameter, ParameterList, Sequential

from adamem_fused import formats, sharding

# Blocks of 256, 128 and 64 elements, rows without blocks, a convolution's, and a vector and a
# matrix that are too small. Over 2 to 4 ranks: even and uneven rows, and ranks that have none.
SHAPES = [(18, 256), (33, 128), (65, 64), (3, 2048), (50, 100), (9, 8, 64), (64,), (8, 256)]
VECTOR = (8192,)
HAVE_BLOCKS = (0, 1, 2, 3, 5)

FORMATS = {
    "bfloat16": (torch.float32, {"state_dtype": torch.bfloat16}),
    "int8": (torch.float32, {"state_dtype": "int8"}),
    "rounding": (torch.bfloat16, {"state_dtype": torch.bfloat16, "stochastic_rounding": True}),
    "remainders": (torch.bfloat16, {"state_dtype": "int8", "store_param_remainders": True}),
    "all": (
        torch.bfloat16,
        {"state_dtype": "int8", "stochastic_rounding": True, "store_param_remainders": True},
    ),
}

both = pytest.mark.parametrize("cls", OPTIMIZERS)
each_format = pytest.mark.parametrize("form", FORMATS)
no_dist = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # as it is to be


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def values_of(form, shapes=SHAPES):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(FORMATS[form][0]) for shape in shapes]


def place_like(param, tensor):
    if not isinstance(param, DTensor):
        return tensor
    return distribute_tensor(tensor, param.device_mesh, param.placements, src_data_rank=None)


def take_step(optimizer, step):
    for index, param in enumerate(parameters(optimizer)):
        template = torch.empty(param.shape, dtype=param.dtype)
        param.grad = place_like(param, gradient(template, step, index=index))
    optimizer.step()


def optimizer_of(cls, form, params, **options):
    options = {
        "backend": "reference",
        "beta_scope": "row",
        "seed": 5,
        **FORMATS[form][1],
        **options,
    }
    return cls(params, lr=0.03, weight_decay=0.1, **options)


def model_of(form, sizes=None, shapes=SHAPES):
    """A model of these parameters, sharded by FSDP2 over a mesh of these sizes, or whole."""
    model = ParameterList(map(Parameter, values_of(form, shapes)))
    if sizes is None:
        return model
    names = ("replicate", "shard")[-len(sizes) :]
    return fully_shard(model, mesh=init_device_mesh("cpu", sizes, mesh_dim_names=names))


def content(optimizer):
    """Whole copies of the parameters and their state, by name."""
    return [
        {"param": whole(p).clone(), **{k: whole(v).clone() for k, v in optimizer.state[p].items()}}
        for p in parameters(optimizer)
    ]


def assert_same(ours, theirs):
    for index, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        assert own.keys() == other.keys(), index
        for name, value in own.items():
            assert value.dtype == other[name].dtype, (index, name)
            equal = torch.equal(value, other[name])
            assert equal, (index, name, (value != other[name]).sum(), value.numel())


# ---- steps --------------------------------------------------------------------------


def fsdp_steps(cls, form, sizes, scope):
    sharded = optimizer_of(cls, form, model_of(form, sizes).parameters(), beta_scope=scope)
    alone = optimizer_of(cls, form, model_of(form).parameters(), beta_scope=scope)
    for step in range(3):
        take_step(sharded, step)
        take_step(alone, step)
    for index, param in enumerate(parameters(sharded)):
        state = sharded.state[param]
        names = {name for name, value in state.items() if isinstance(value, DTensor)}
        for name in names - {"beta", "beta_prod"}:
            assert state[name].placements == param.placements
            assert state[name].to_local().shape[0] == param.to_local().shape[0]
        is_int8 = FORMATS[form][1]["state_dtype"] == "int8" and index in HAVE_BLOCKS
        assert any(name.endswith("_codes") for name in names) == is_int8
    assert_same(content(sharded), content(alone))


@both
@each_format
def test_fsdp_takes_the_bits_of_one_process(two_ranks, three_ranks, cls, form):
    two_ranks.run(fsdp_steps, cls, form, (2,), "row")
    three_ranks.run(fsdp_steps, cls, form, (3,), "row")


@both
def test_hybrid_shards_take_the_bits_of_one_process(four_ranks, cls):
    four_ranks.run(fsdp_steps, cls, "all", (2, 2), "row")
    four_ranks.run(fsdp_steps, cls, "all", (4,), "tensor")


def a_vector_that_is_sharded(cls):
    param, alone = (next(model_of("int8", sizes, [VECTOR]).parameters()) for sizes in ((2,), None))
    sharded, plain = optimizer_of(cls, "int8", [param]), optimizer_of(cls, "int8", [alone])
    take_step(sharded, 0)
    take_step(plain, 0)
    memories = {name for name in sharded.state[param] if name in cls.memories}
    assert memories == set(cls.memories)
    assert all(sharded.state[param][name].dtype == torch.float32 for name in memories)
    assert {f"{name}_codes" for name in memories} < plain.state[alone].keys()


@both
def test_a_sharded_vector_keeps_its_int8_memories_in_float32(two_ranks, cls):
    two_ranks.run(a_vector_that_is_sharded, cls)


def parallel_model(form, data, tensor):
    """Linear layers, of which the first has split rows and the second split columns."""
    torch.manual_seed(0)
    model = Sequential(Linear(256, 128, bias=False), Linear(512, 64, bias=False))
    model.append(Linear(192, 64, bias=False))  # its halves cut its blocks of 64
    model.to(FORMATS[form][0])
    if tensor > 1:
        mesh = init_device_mesh("cpu", (data, tensor), mesh_dim_names=("data", "tensor"))
        plan = {"0": ColwiseParallel(), "1": RowwiseParallel(), "2": RowwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
        if data > 1:
            fully_shard(model, mesh=mesh["data"])
    return model


def parallel_steps(cls, form, data, path=None):
    model, whole_model = parallel_model(form, data, 2), parallel_model(form, 1, 1)
    sharded = optimizer_of(cls, form, model.parameters())
    alone = optimizer_of(cls, form, whole_model.parameters())
    for step in range(3):
        take_step(sharded, step)
        take_step(alone, step)
    ours, theirs = content(sharded), content(alone)
    if FORMATS[form][1]["state_dtype"] == "int8":
        assert {f"{name}_codes" for name in cls.memories} < theirs[2].keys()
        assert set(cls.memories) < ours[2].keys()  # in float32
        assert all(ours[2][name].dtype == torch.float32 for name in cls.memories)
        del ours[2], theirs[2]
    # Of split rows the sums are other ones in their last bits, from which nothing follows here.
    for own, other in zip(ours, theirs, strict=True):
        for values in (own, other):
            del values["beta"]
            values.pop("beta_prod", None)
    assert_same(ours, theirs)


@both
def test_tensor_parallelism_takes_the_bits_of_one_process(two_ranks, cls):
    for form in FORMATS:
        two_ranks.run(parallel_steps, cls, form, 1)


@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_fsdp_over_tensor_parallelism_takes_the_bits_of_one_process(four_ranks, cls, form):
    four_ranks.run(parallel_steps, cls, form, 2)


def parts_in_two_dimensions(cls):
    mesh = init_device_mesh("cpu", (2, 2))
    value = torch.randn(8, 16, 64)
    param = Parameter(distribute_tensor(value, mesh, [Shard(1), Shard(2)]))
    optimizer = optimizer_of(cls, "int8", [param])
    take_step(optimizer, 0)
    assert optimizer.state[param][cls.memories[0]].dtype == torch.float32
    # Whose elements' places are more than a stretch and what is skipped.
    with pytest.raises(ValueError, match=r"split along dimensions \[1, 2\]"):
        take_step(optimizer_of(cls, "bfloat16", [param]), 0)


@both
def test_what_is_split_along_two_inner_dimensions_is_not_rounded_stochastically(four_ranks, cls):
    four_ranks.run(parts_in_two_dimensions, cls)


# ---- checkpoints ----------------------------------------------------------------------


def save(cls, form, path, shapes=SHAPES):
    model = model_of(form, (dist.get_world_size(),), shapes)
    optimizer = optimizer_of(cls, form, model.parameters())
    for step in range(2):
        take_step(optimizer, step)
    state = get_optimizer_state_dict(model, optimizer)
    dcp.save({"model": model.state_dict(), "optimizer": state}, checkpoint_id=path / "checkpoint")
    saved = content(optimizer)
    take_step(optimizer, 2)
    continued = content(optimizer)
    if dist.get_rank() == 0:
        torch.save((saved, continued), path / "content.pt")


def load(cls, form, path, sizes, shapes=SHAPES):
    model = model_of(form, sizes, shapes)
    with torch.no_grad():
        for param in model.parameters():
            param.zero_()
    optimizer = optimizer_of(cls, form, model.parameters(), seed=0)
    state = {"model": model.state_dict(), "optimizer": get_optimizer_state_dict(model, optimizer)}
    dcp.load(state, checkpoint_id=path / "checkpoint", no_dist=sizes is None)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optimizer"])
    saved, continued = torch.load(path / "content.pt")
    assert_same(content(optimizer), saved)
    assert optimizer.param_groups[0]["seed"] == 5
    take_step(optimizer, 2)
    assert_same(content(optimizer), continued)


@no_dist
@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_a_distributed_checkpoint_continues_on_any_number_of_ranks(
    two_ranks, three_ranks, four_ranks, cls, form, tmp_path
):
    two_ranks.run(save, cls, form, tmp_path)
    load(cls, form, tmp_path, None)
    three_ranks.run(load, cls, form, tmp_path, (3,))
    four_ranks.run(load, cls, form, tmp_path, (2, 2))


@both
def test_a_distributed_checkpoint_of_a_vector_continues_where_its_parts_are_uneven(
    two_ranks, three_ranks, cls, tmp_path
):
    two_ranks.run(save, cls, "int8", tmp_path, [VECTOR])
    three_ranks.run(load, cls, "int8", tmp_path, (3,), [VECTOR])


def load_other_format(cls, saved, own, path):
    model = model_of(own, (2,))
    optimizer = optimizer_of(cls, own, model.parameters())
    state = get_optimizer_state_dict(model, optimizer)
    before = content(optimizer)
    with pytest.raises(CheckpointException, match="Missing key in checkpoint state_dict"):
        dcp.load({"optimizer": state}, checkpoint_id=path / "checkpoint")
    assert_same(content(optimizer), before)

    # By way of the format that was saved.
    for name, value in FORMATS[saved][1].items():
        optimizer.param_groups[0][name] = value
    optimizer.state.clear()
    state = get_optimizer_state_dict(model, optimizer)
    dcp.load({"optimizer": state}, checkpoint_id=path / "checkpoint")
    set_optimizer_state_dict(model, optimizer, state)
    known = [values_of_memories(cls, state) for state in content(optimizer)]
    for name, value in FORMATS[own][1].items():
        optimizer.param_groups[0][name] = value
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    take_step(optimizer, 2)
    for state, memories in zip(content(optimizer), known, strict=True):
        assert state["step"] == 3
        assert all(value.any() for value in memories.values())


@both
@pytest.mark.parametrize(("saved", "own"), [("bfloat16", "int8"), ("int8", "bfloat16")])
def test_a_distributed_checkpoint_is_never_taken_for_another_format(
    two_ranks, cls, saved, own, tmp_path
):
    two_ranks.run(save, cls, saved, tmp_path)
    two_ranks.run(load_other_format, cls, saved, own, tmp_path)


def full_state(cls, form):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    model = model_of(form, (2,))
    optimizer = optimizer_of(cls, form, model.parameters())
    take_step(optimizer, 0)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    other = model_of(form, (2,))
    resumed = optimizer_of(cls, form, other.parameters())
    set_optimizer_state_dict(other, resumed, state, options=options)
    for own, theirs in zip(other.parameters(), model.parameters(), strict=True):
        own.data.to_local().copy_(theirs.data.to_local())
    assert_same(content(resumed), content(optimizer))
    take_step(resumed, 1)
    take_step(optimizer, 1)
    assert_same(content(resumed), content(optimizer))


@both
@pytest.mark.parametrize("form", ["bfloat16", "all"])
def test_a_full_state_dict_loads_on_every_rank(two_ranks, cls, form):
    two_ranks.run(full_state, cls, form)


def values_of_memories(cls, state):
    return {
        name: state[name].double()
        if name in state
        else formats.decode(state[f"{name}_codes"], state[f"{name}_scales"])
        for name in cls.memories
    }


def full_state_of_another_format(cls, saved, own, shapes, saved_sizes, sizes):
    model = model_of(saved, saved_sizes, shapes)
    optimizer = optimizer_of(cls, saved, model.parameters())
    take_step(optimizer, 0)
    state = get_optimizer_state_dict(
        model, optimizer, options=StateDictOptions(full_state_dict=True)
    )
    other = model_of(own, sizes, shapes)
    resumed = optimizer_of(cls, own, other.parameters())
    options = StateDictOptions(full_state_dict=True)
    set_optimizer_state_dict(other, resumed, state, options=options)
    expected = optimizer_of(cls, own, model_of(own, None, shapes).parameters())
    expected.load_state_dict(
        {**expected.state_dict(), "state": dict(enumerate(content(optimizer)))}
    )
    pairs = zip(content(resumed), content(expected), strict=True)
    for index, (ours, theirs) in enumerate(pairs):
        wanted = values_of_memories(cls, theirs)
        for name, value in values_of_memories(cls, ours).items():
            assert value.any()
            if dist.get_rank() == 0:
                assert torch.equal(value, wanted[name]) or shapes[index] == VECTOR, (index, name)
            assert (value - wanted[name]).abs().max() <= 0.02 * wanted[name].abs().max()
    take_step(resumed, 1)


@both
@pytest.mark.parametrize(("saved", "own"), [("bfloat16", "int8"), ("int8", "bfloat16")])
def test_a_full_state_dict_of_another_format_is_converted(two_ranks, cls, saved, own):
    shapes = [(64,), (18, 256), VECTOR, (50, 100)]
    for sizes in ((2,), None):
        two_ranks.run(full_state_of_another_format, cls, saved, own, shapes, (2,), sizes)


@both
def test_a_vector_goes_from_whole_to_sharded_and_back(two_ranks, cls):
    for sizes in ((None, (2,)), ((2,), None)):
        two_ranks.run(full_state_of_another_format, cls, "int8", "int8", [VECTOR], *sizes)


def full_state_that_is_lost(cls, saved, own):
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=True)
    shapes = [(64,), (18, 256)]
    model, other = model_of(saved, (2,), shapes), model_of(own, (2,), shapes)
    optimizer, resumed = (
        optimizer_of(cls, form, m.parameters()) for form, m in ((saved, model), (own, other))
    )
    take_step(optimizer, 0)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        set_optimizer_state_dict(other, resumed, state, options=options)
    else:
        with pytest.raises(ValueError, match="is of zeros after step 1"):
            set_optimizer_state_dict(other, resumed, state, options=options)


@both
@pytest.mark.parametrize(("saved", "own"), [("bfloat16", "int8"), ("int8", "bfloat16")])
def test_a_broadcast_of_another_format_is_refused(two_ranks, cls, saved, own):
    two_ranks.run(full_state_that_is_lost, cls, saved, own)


# ---- places -----------------------------------------------------------------------------


def assert_places(param, index):
    """Of a parameter that was given its elements' places as values."""
    local = param.to_local().detach()
    places = formats.places(local.numel(), *sharding.place_of(param), local.device)
    assert torch.equal(places.view(local.shape).to(local.dtype), local), index


def places_of_shards(sizes, layouts):
    mesh = init_device_mesh("cpu", sizes)
    for shape, *placements in layouts:
        value = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(shape)
        param = distribute_tensor(value, mesh, placements, src_data_rank=None)
        assert_places(param, (shape, placements))


def places_over_two_dimensions(rows):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    model = Sequential(Linear(6, rows, bias=False), Linear(6, rows, bias=False)).double()
    for layer in model:
        values = torch.arange(layer.weight.numel(), dtype=torch.float64).view(layer.weight.shape)
        layer.weight.data.copy_(values)
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    for index, param in enumerate(model.parameters()):
        assert_places(param, (rows, index))


def test_places_of_shards_are_those_in_the_whole(three_ranks, four_ranks):
    whole, first, second = Replicate(), Shard(0), Shard(1)
    lines = [(7, 5), (2, 5), (9, 4, 3), (10,), (2,)]
    three_ranks.run(places_of_shards, (3,), [(shape, first) for shape in lines])
    three_ranks.run(places_of_shards, (3,), [(shape, second) for shape in lines[:3]])
    three_ranks.run(places_of_shards, (3,), [((4, 3, 7), Shard(2)), ((5, 1, 8), Shard(2))])
    pairs = [(first, second), (second, first), (first, first), (second, second), (whole, second)]
    grids = [((6, 8), *pair) for pair in pairs] + [((5, 7, 3), *pair) for pair in pairs]
    four_ranks.run(places_of_shards, (2, 2), grids)
    for rows in (4, 6, 7):
        four_ranks.run(places_over_two_dimensions, rows)
