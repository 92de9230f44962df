"""Schemes that flatten or split plain parameters are refused, and what looks like them is not."""

import copy
import pickle
import sys
import types
import warnings
from itertools import accumulate

import pytest
import torch
import torch.distributed as dist
from cases import OPTIMIZERS, bits, parameters, relative_error
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer, _apply_optimizer_in_backward
from torch.nn import LazyLinear, Linear, Parameter, Sequential, Tanh
from torch.nn.parallel import DistributedDataParallel
from torch.utils import swap_tensors

from adamem_fused import AMSGD, AMAdamW

both = pytest.mark.parametrize("cls", OPTIMIZERS)
NORM_OPTIONS = ({"max_grad_norm": 1.0}, {"skip_nonfinite": True})
SCOPES = ("tensor", "row", "global")
# Beta leaves its cap with these within a few steps.
OPTIONS = {
    cls: {"memory_plane": "anchored", "lr": lr} for cls, lr in ((AMAdamW, 0.3), (AMSGD, 1.0))
}


def model_of():
    torch.manual_seed(0)
    return Sequential(Linear(16, 20), Tanh(), Linear(20, 16), Tanh(), Linear(16, 3)).double()


def make(cls, params, scope):
    return cls(params, beta_scope=scope, **OPTIONS[cls])


def decay_groups(model):
    """Weights and biases in groups of their own."""
    return [
        {"params": [p for p in model.parameters() if (p.dim() > 1) == weights]}
        for weights in (True, False)
    ]


def backward(model, step, part=slice(None)):
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)[part]
    model(x).sub(x.sin()[:, :3]).square().mean().backward()


def train(model, optimizer, part=slice(None), steps=6):
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, step, part)
        optimizer.step()


def part_of_rank():
    return slice(dist.get_rank() * 4, dist.get_rank() * 4 + 4)


def assert_as_in_one_process(cls, scope, params):
    model = model_of()
    optimizer = make(cls, model.parameters(), scope)
    train(model, optimizer)
    betas = torch.cat([optimizer.state[p]["beta"].reshape(-1) for p in model.parameters()])
    assert any(0 < beta < 0.88 for beta in betas), f"beta says nothing here: {betas}"
    for ours, theirs in zip(params, model.parameters(), strict=True):
        assert relative_error(ours.detach(), theirs.detach()) <= 1e-12


def assert_refused(optimizer, match):
    """A step raises, and has changed nothing."""
    before = [bits(param.detach().clone()) for param in parameters(optimizer)]
    with pytest.raises(RuntimeError, match=match):
        optimizer.step()
    for param, old in zip(parameters(optimizer), before, strict=True):
        assert torch.equal(bits(param.detach()), old)
    assert not any(optimizer.state.values())


def assert_norm_is_refused(optimizer, maker):
    """Also where it is asked for between steps."""
    for option in NORM_OPTIONS:
        for name, value in option.items():
            usual = getattr(optimizer, name)
            setattr(optimizer, name, value)
            with pytest.raises(RuntimeError, match=rf"^{maker}.* norm of that part"):
                optimizer.step()
            setattr(optimizer, name, usual)


# ---- FSDP1 ------------------------------------------------------------------------


def fsdp1(strategy, use_orig_params):
    options = {}
    if "HYBRID" in strategy:
        options["device_mesh"] = init_device_mesh("cpu", (1, 2), mesh_dim_names=("copy", "shard"))
    return FullyShardedDataParallel(
        model_of(),
        sharding_strategy=ShardingStrategy[strategy],
        use_orig_params=use_orig_params,
        device_id=torch.device("cpu"),
        **options,
    )


def refuses_fsdp1(strategy, use_orig_params):
    model = fsdp1(strategy, use_orig_params)
    for cls in OPTIMIZERS:
        for scope in SCOPES:
            with pytest.raises(RuntimeError, match=r"^FSDP1 .* splits .* Use FSDP2 "):
                make(cls, model.parameters(), scope)
    optimizer = make(AMSGD, [Parameter(torch.ones(2))], "tensor")
    with pytest.raises(RuntimeError, match=r"^FSDP1 "):
        optimizer.add_param_group({"params": list(model.parameters())})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("use_orig_params", [True, False])
@pytest.mark.parametrize(
    "strategy", ["FULL_SHARD", "SHARD_GRAD_OP", "HYBRID_SHARD", "_HYBRID_SHARD_ZERO2"]
)
def test_fsdp1_is_refused(two_ranks, strategy, use_orig_params):
    two_ranks.run(refuses_fsdp1, strategy, use_orig_params)


def refuses_fsdp1_around_its_parameters(cls):
    for scope in SCOPES:
        model = model_of()
        optimizer = make(cls, model.parameters(), scope)
        model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
        backward(model, 0, part_of_rank())
        assert_refused(optimizer, "^FSDP1 .* splits")


@both
def test_fsdp1_around_the_optimizers_parameters_is_refused_at_the_first_step(two_ranks, cls):
    two_ranks.run(refuses_fsdp1_around_its_parameters, cls)


def takes_unsharded_fsdp1(cls):
    for scope in SCOPES:
        model = fsdp1("NO_SHARD", True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer = make(cls, decay_groups(model), scope)
            train(model, optimizer, part_of_rank())
        assert_as_in_one_process(cls, scope, model.module.parameters())

    model = fsdp1("NO_SHARD", False)
    with pytest.raises(RuntimeError, match=r"joins tensors .* use_orig_params=True"):
        make(cls, model.parameters(), "tensor")
    train(model, make(cls, model.parameters(), "global"), part_of_rank())
    with FullyShardedDataParallel.summon_full_params(model):
        assert_as_in_one_process(cls, "global", model.module.parameters())


@both
def test_fsdp1_that_splits_nothing_takes_the_steps_of_one_process(two_ranks, cls):
    two_ranks.run(takes_unsharded_fsdp1, cls)


# ---- one optimizer of several -----------------------------------------------------


def over_ranks(cls):
    model = DistributedDataParallel(model_of())
    with pytest.raises(RuntimeError, match=r'^ZeroRedundancyOptimizer .*Pass beta_scope="tensor"'):
        ZeroRedundancyOptimizer(model.parameters(), cls, beta_scope="global")

    sharded = ZeroRedundancyOptimizer(
        model.parameters(), cls, beta_scope="tensor", parameters_as_bucket_view=True, **OPTIONS[cls]
    )
    train(model, sharded, part_of_rank())
    assert_as_in_one_process(cls, "tensor", model.module.parameters())
    sharded.param_groups[0]["beta_scope"] = "global"
    with pytest.raises(RuntimeError, match=r"^ZeroRedundancyOptimizer"):
        sharded.step()
    sharded.param_groups[0]["beta_scope"] = "tensor"
    assert_norm_is_refused(sharded.optim, "ZeroRedundancyOptimizer")
    for option in NORM_OPTIONS:
        with pytest.raises(RuntimeError, match=r"^ZeroRedundancyOptimizer .* norm of that part"):
            ZeroRedundancyOptimizer(model.parameters(), cls, beta_scope="tensor", **option)
    with pytest.raises(RuntimeError, match=r"^ZeroRedundancyOptimizer"):
        sharded.add_param_group(
            {"params": [Parameter(torch.ones(3).double())], "beta_scope": "global"}
        )

    # Of one rank: nothing is split.
    alone = [dist.new_group([rank]) for rank in range(2)][dist.get_rank()]
    model = model_of()
    whole = ZeroRedundancyOptimizer(
        model.parameters(), cls, process_group=alone, beta_scope="global", **OPTIONS[cls]
    )
    train(model, whole)
    assert_as_in_one_process(cls, "global", model.parameters())
    ZeroRedundancyOptimizer(model.parameters(), cls, process_group=alone, max_grad_norm=1.0)


@both
def test_what_is_of_the_model_is_refused_of_zero_redundancy_optimizer(two_ranks, cls):
    two_ranks.run(over_ranks, cls)


@both
def test_one_beta_for_the_model_is_refused_of_optimizers_for_each_parameter(cls):
    model = model_of()
    with pytest.raises(RuntimeError, match="optimizer for each parameter"):
        _apply_optimizer_in_backward(cls, model.parameters(), {"beta_scope": "global"})
    model = model_of()
    _apply_optimizer_in_backward(cls, model.parameters(), {**OPTIONS[cls], "beta_scope": "tensor"})
    for step in range(6):
        backward(model, step)
    assert_as_in_one_process(cls, "tensor", model.parameters())


@both
@pytest.mark.parametrize("option", NORM_OPTIONS, ids=lambda option: next(iter(option)))
def test_a_norm_of_the_model_is_refused_of_optimizers_for_each_parameter(cls, option):
    options = {"beta_scope": "tensor", **option}
    with pytest.raises(RuntimeError, match="optimizer for each parameter, so max_grad_norm"):
        _apply_optimizer_in_backward(cls, model_of().parameters(), options)


def module_of(monkeypatch, name, source):
    module = types.ModuleType(name)
    exec(source, module.__dict__)
    monkeypatch.setitem(sys.modules, name, module)
    return module


@pytest.mark.parametrize("name", ["torchao.optim.cpu_offload", "fairscale.optim.oss"])
def test_makers_that_are_not_installed_are_told_by_their_modules(monkeypatch, name):
    source = "world_size = 2\ndef make(self, cls, *args, **options): return cls(*args, **options)"
    module = module_of(monkeypatch, name, source)
    with pytest.raises(RuntimeError, match=rf"^{name.split('.')[0]}'s"):
        module.make(module, AMSGD, [Parameter(torch.ones(3))])
    optimizer = module.make(module, AMSGD, [Parameter(torch.ones(3))], beta_scope="tensor")
    assert_norm_is_refused(optimizer, name.split(".")[0])
    AMSGD([Parameter(torch.ones(3))])


# ---- flat buffers in the place of parameters --------------------------------------


def flatten(optimizer, pieces=1, piece=0, parameter=False):
    """Puts a flat buffer in the place of each group's parameters, as ZeRO does, or a piece."""
    for group in optimizer.param_groups:
        flat = torch.cat([param.detach().flatten() for param in group["params"]])
        flat = flat.chunk(pieces)[piece].clone()
        group["params"] = [Parameter(flat) if parameter else flat.requires_grad_()]
        flat = group["params"][0]
        flat.grad = torch.ones_like(flat)


def shards(optimizer, pieces, piece, require_grad):
    """Puts a flat piece of each parameter in its place, as Megatron's distributed optimizer."""
    for group in optimizer.param_groups:
        group["params"] = [
            param.detach().flatten().chunk(pieces)[piece].clone().requires_grad_(require_grad)
            for param in group["params"]
        ]
        for param in group["params"]:
            param.grad = torch.ones_like(param)


def refuses_pieces(cls):
    for scope in SCOPES:
        for parameter in (False, True):
            optimizer = make(cls, model_of().parameters(), scope)
            flatten(optimizer, 2, dist.get_rank(), parameter)
            assert_refused(optimizer, "pieces of flat buffers .* Use FSDP2")
        for require_grad in (False, True):
            optimizer = make(cls, decay_groups(model_of()), scope)
            shards(optimizer, 2, dist.get_rank(), require_grad)
            assert_refused(optimizer, "pieces of flat buffers .* Use FSDP2")


@both
def test_pieces_of_flat_buffers_are_refused(two_ranks, cls):
    two_ranks.run(refuses_pieces, cls)


@both
@pytest.mark.parametrize("parameter", [False, True])
def test_a_flat_buffer_takes_one_beta_for_the_model_or_is_refused(cls, parameter):
    optimizer = make(cls, model_of().parameters(), "tensor")
    flatten(optimizer, parameter=parameter)
    assert_refused(optimizer, "flat buffer .* Use FSDP2")

    model = model_of()
    optimizer = make(cls, model.parameters(), "global")
    flatten(optimizer, parameter=parameter)
    (flat,) = parameters(optimizer)
    sizes = [param.numel() for param in model.parameters()]
    offsets = flat.detach().split(sizes)
    for param, piece in zip(model.parameters(), offsets, strict=True):
        param.data = piece.view_as(param)
    with pytest.warns(UserWarning, match="only if each step has all of it"):
        for step in range(6):
            backward(model, step)
            flat.grad = torch.cat([param.grad.flatten() for param in model.parameters()])
            optimizer.step()
            model.zero_grad()
    assert_as_in_one_process(cls, "global", model.parameters())


@both
@pytest.mark.parametrize(
    "after",
    [
        lambda: [Parameter(torch.randn(7))],
        lambda: [torch.randn(7, requires_grad=True)],
        lambda: list(torch.nn.BatchNorm1d(2).parameters()),
    ],
    ids=["vector", "plain", "norm"],
)
def test_a_small_model_of_vectors_may_take_the_place_of_another(cls, after):
    model = torch.nn.Sequential(torch.nn.Linear(10, 3), torch.nn.BatchNorm1d(3))
    optimizer = cls(model.parameters())
    for params in (list(model.parameters()), after()):
        optimizer.param_groups[0]["params"] = params
        optimizer.state.clear()
        for param in params:
            param.grad = torch.randn_like(param)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())


@both
def test_a_flat_buffer_is_refused_before_its_state_is_loaded(cls):
    trained = make(cls, [torch.zeros(139, dtype=torch.float64, requires_grad=True)], "tensor")
    parameters(trained)[0].grad = torch.ones(139, dtype=torch.float64)
    trained.step()
    optimizer = make(cls, model_of().parameters(), "tensor")
    flatten(optimizer)
    with pytest.raises(RuntimeError, match="flat buffer"):
        optimizer.load_state_dict(trained.state_dict())
    assert not optimizer.state


@pytest.mark.parametrize(
    "name",
    [
        "deepspeed.runtime.zero.stage_1_and_2",
        "deepspeed.runtime.zero.stage3",
        "deepspeed.runtime.bf16_optimizer",
    ],
)
def test_zero_is_told_by_who_calls_where_a_piece_has_a_parameters_size(monkeypatch, name):
    monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:3]), types.ModuleType(name))
    caller = module_of(monkeypatch, name, "def step(optimizer): optimizer.step()")
    optimizer = make(AMSGD, [Parameter(torch.ones(2, 2)), Parameter(torch.ones(4))], "tensor")
    flatten(optimizer)
    optimizer.param_groups[0]["params"] = [torch.ones(4, requires_grad=True)]
    parameters(optimizer)[0].grad = torch.ones(4)
    with pytest.raises(RuntimeError, match=r"^DeepSpeed's ZeRO .* Use FSDP2"):
        caller.step(optimizer)
    assert not optimizer.state


WRAPPERS = {
    "deepspeed.runtime.zero.stage_1_and_2": (
        *("single_partition_of_fp32_groups", "round_robin_bit16_groups"),
        "round_robin_bit16_offsets",
    ),
    "deepspeed.runtime.bf16_optimizer": ("fp32_groups_flat_partition", "bf16_groups", None),
    "deepspeed.runtime.fp16.fused_optimizer": ("fp32_groups_flat", "fp16_groups", None),
}


def wrapped(monkeypatch, name, cls, scope, **attributes):
    """A model, and a wrapper of DeepSpeed's that holds its groups as flat buffers."""
    source = "def step(self, optimizer): optimizer.step()\ndef load(self, f, state): f(state)"
    monkeypatch.setitem(sys.modules, ".".join(name.split(".")[:3]), types.ModuleType(name))
    module = module_of(monkeypatch, name, source)
    flats, tensors, offsets = WRAPPERS[name]
    model = model_of()
    optimizer = make(cls, decay_groups(model), scope)
    wrapper = types.SimpleNamespace(real_dp_process_group=[None, None], **attributes)
    setattr(wrapper, tensors, [group["params"] for group in optimizer.param_groups])
    starts = [
        list(accumulate((p.numel() + 3 * bool(offsets) for p in group["params"]), initial=0))
        for group in optimizer.param_groups
    ]
    if offsets:
        setattr(wrapper, offsets, [places[:-1] for places in starts])
    for group, places in zip(optimizer.param_groups, starts, strict=True):
        flat = torch.zeros(places[-1] + 5, dtype=torch.float64)
        for param, start in zip(group["params"], places, strict=False):
            flat[start : start + param.numel()] = param.detach().flatten()
            param.data = flat[start : start + param.numel()].view_as(param)
        group["params"] = [flat.requires_grad_()]
    setattr(wrapper, flats, parameters(optimizer))
    return model, optimizer, wrapper, module, starts


def take_wrapped_steps(model, optimizer, wrapper, module, starts, steps=6):
    for step in range(steps):
        model.zero_grad()
        backward(model, step)
        groups = decay_groups(model)
        for flat, group, places in zip(parameters(optimizer), groups, starts, strict=True):
            flat.grad = torch.zeros_like(flat)
            for param, start in zip(group["params"], places, strict=False):
                flat.grad[start : start + param.numel()] = param.grad.flatten()
        module.step(wrapper, optimizer)


@both
@pytest.mark.parametrize("scope", ["tensor", "row"])
@pytest.mark.parametrize("name", WRAPPERS)
def test_deepspeeds_wrappers_are_asked_what_their_buffers_hold(monkeypatch, name, cls, scope):
    model, optimizer, *rest = wrapped(monkeypatch, name, cls, scope)
    take_wrapped_steps(model, optimizer, *rest)
    assert_as_in_one_process(cls, scope, model.parameters())
    # Also where the first thing is to load state.
    model, other, wrapper, module, _ = wrapped(monkeypatch, name, cls, scope)
    module.load(wrapper, other.load_state_dict, optimizer.state_dict())
    for ours, theirs in zip(parameters(other), parameters(optimizer), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert torch.equal(other.state[ours][key], value)


def test_deepspeeds_wrappers_that_do_not_say_or_step_otherwise_are_refused(monkeypatch):
    for name in WRAPPERS:
        made = wrapped(monkeypatch, name, AMAdamW, "tensor", zenflow=True)
        with pytest.raises(RuntimeError, match=r"^DeepSpeed's ZeRO .* Use FSDP2"):
            take_wrapped_steps(*made, steps=1)
        model, optimizer, *rest = wrapped(monkeypatch, name, AMAdamW, "tensor")
        for param in model.parameters():
            param.tensor_model_parallel = True
        with pytest.raises(RuntimeError, match=r"^DeepSpeed's ZeRO .* Use FSDP2"):
            take_wrapped_steps(model, optimizer, *rest, steps=1)
        assert not optimizer.state


def split_by_tensor_parallelism():
    param = Parameter(torch.ones(4, 3))
    param.tensor_model_parallel = True
    param.grad = torch.ones(4, 3)
    with pytest.warns(UserWarning, match="tensor_model_parallel"):
        AMSGD([param]).step()


def test_tensor_parallelism_of_plain_tensors_is_warned_of(two_ranks):
    two_ranks.run(split_by_tensor_parallelism)


def test_a_compiled_step_refuses_too():
    optimizer = make(AMAdamW, model_of().parameters(), "tensor")
    flatten(optimizer)
    with pytest.raises(Exception, match="flat buffer"):
        torch.compile(optimizer.step, backend="eager")()


# ---- what goes on without a word --------------------------------------------------


def with_grads(params):
    for param in params:
        param.grad = torch.ones_like(param)
    return params


def plain_copies(params):
    """As apex and torch.amp's master parameters: not of the class Parameter, of equal shapes."""
    return [param.detach().clone().requires_grad_() for param in params]


def pruned(params):
    """Half the outputs of every layer, as structured pruning leaves them."""
    return [Parameter(param.detach()[: len(param) // 2].clone()) for param in params]


def grown(params):
    """More rows of everything, as densification of Gaussians does."""
    return [Parameter(torch.cat([param.detach()] * 2)) for param in params]


def fewer(params):
    return params[2:]


def new_head(params):
    return [*params[:-2], Parameter(torch.ones(7, 8).double()), Parameter(torch.ones(7).double())]


def smaller_model(params):
    return list(Sequential(Linear(5, 4), Linear(4, 2)).double().parameters())


def more(params):
    return [*params, Parameter(torch.ones(11).double())]


def scalars(params):
    return [Parameter(param.detach().sum()) for param in params]


CHANGES = [plain_copies, pruned, grown, fewer, new_head, smaller_model, more, scalars]


def goes_on(cls, scope, change, stepped):
    optimizer = make(cls, decay_groups(model_of()), scope)
    if stepped:
        with_grads(parameters(optimizer))
        optimizer.step()
        optimizer.state.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if change in (pruned, grown, plain_copies):
            for group in optimizer.param_groups:
                group["params"] = with_grads(change(group["params"]))
        else:
            del optimizer.param_groups[1]
            optimizer.param_groups[0]["params"] = with_grads(change(list(model_of().parameters())))
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        optimizer.step()


@both
@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_a_user_replaces_are_taken(cls, scope, change):
    for stepped in (False, True):
        goes_on(cls, scope, change, stepped)


def go_on():
    for change in CHANGES:
        for stepped in (False, True):
            goes_on(AMAdamW, "tensor", change, stepped)
            goes_on(AMSGD, "global", change, stepped)
    # Biases alone, as BitFit trains them, and a new head.
    biases = [param for param in model_of().parameters() if param.dim() == 1]
    optimizer = make(AMAdamW, biases, "tensor")
    optimizer.param_groups[0]["params"][-1] = Parameter(torch.ones(7).double())
    with_grads(parameters(optimizer))
    optimizer.step()
    # As accelerate prepares for FSDP2: sharded after the optimizer was made, and replaced in it.
    for cls in OPTIMIZERS:
        for scope in SCOPES:
            model = model_of()
            optimizer = make(cls, decay_groups(model), scope)
            places = {id(param): name for name, param in model.named_parameters()}
            fully_shard(model)
            params = dict(model.named_parameters())
            for group in optimizer.param_groups:
                group["params"] = [params[places[id(param)]] for param in group["params"]]
            train(model, optimizer, part_of_rank())
            whole = [param.full_tensor() for param in model.parameters()]
            assert_as_in_one_process(cls, scope, whole)
            # And data parallelism.
            model = DistributedDataParallel(model_of())
            train(model, make(cls, model.parameters(), scope), part_of_rank())
            assert_as_in_one_process(cls, scope, model.module.parameters())


def test_what_goes_on_in_one_process_does_on_two_ranks(two_ranks):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two_ranks.run(go_on)


@both
def test_frozen_lazy_swapped_copied_and_added_parameters_are_taken(cls):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*flat.*")
        model = Sequential(LazyLinear(8), Linear(8, 3)).double()
        for param in model[1].parameters():
            param.requires_grad_(False)
        optimizer = make(cls, model.parameters(), "tensor")
        train(model, optimizer, steps=2)
        for param in model[1].parameters():
            param.requires_grad_()
        train(model, optimizer, steps=2)
        swap_tensors(model[1].bias, Parameter(torch.ones(3).double()))
        train(model, optimizer, steps=2)
        optimizer.add_param_group({"params": with_grads([Parameter(torch.ones(13).double())])})
        optimizer.step()
        for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
            copied.state.clear()
            with_grads(parameters(copied))
            copied.step()
        # The pieces that it was given are its parameters.
        flat = with_grads([torch.ones(9, requires_grad=True)])
        make(cls, flat, "tensor").step()
