"""Low-precision state and parameters of DTensors over several processes, against one process."""

import math

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases import OPTIMIZERS, gradient, parameters
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

from adamem_fused import AMAdamW

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
    options = {"backend": "reference", "beta_scope": "row", "seed": 5, **FORMATS[form][1], **options}
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
