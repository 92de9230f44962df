"""metrics() and betas_by_name(): what they say of the betas, where, and at what cost."""

import copy
import gc
import pickle
import weakref
from types import SimpleNamespace

import pytest
import torch
from cases import OPTIMIZERS, Group, backends, make_optimizer, parameters, set_gradients
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode

from adamem_fused import AMSGD, AMAdamW, metrics
from adamem_fused.backends import ops

both = pytest.mark.parametrize("cls", OPTIMIZERS)
OF_BETAS = ("beta_mean", "beta_min", "at_cap")
META = torch.device("meta")


@pytest.fixture(params=["extension", "python"])
def walk(request, monkeypatch):
    """Both ways to find the betas."""
    if request.param == "python":
        monkeypatch.setattr(metrics, "ops", SimpleNamespace(extension=None))
    elif ops.extension is None:
        pytest.skip(str(ops.unavailable))


def zeros(*shapes, **options):
    return [Parameter(torch.zeros(shape, **options)) for shape in shapes]


def with_betas(optimizer, *betas):
    """Gives the first parameters these as their last betas."""
    for param, beta in zip(parameters(optimizer), betas, strict=False):
        optimizer.state[param]["beta"] = torch.as_tensor(beta)
    return optimizer


def stepped(cls, groups, **options):
    optimizer = make_optimizer(cls, groups, **options)
    set_gradients(optimizer, step=0)
    optimizer.step()
    return optimizer


def values(optimizer):
    """Of its betas: mean, smallest, share at the cap."""
    found = optimizer.metrics()
    return [found[name].item() for name in OF_BETAS]


# ---- what they say ------------------------------------------------------------------


def test_a_tensors_beta_counts_with_its_elements(walk):
    optimizer = with_betas(AMAdamW(zeros(30, 60, 10)), 0.89, 0.5, 0.1)
    assert values(optimizer) == pytest.approx([0.3 * 0.89 + 0.6 * 0.5 + 0.1 * 0.1, 0.1, 0.3])


def test_a_rows_beta_counts_with_the_elements_of_the_row(walk):
    optimizer = AMAdamW(zeros(40, (3, 20)), betas=(0.9, 0.99), beta_scope="row")
    with_betas(optimizer, 0.3, [0.9, 0.0, 0.9])
    assert values(optimizer) == pytest.approx([0.4 * 0.3 + 0.4 * 0.9, 0.0, 0.4])


def test_each_group_has_its_own_cap_and_scope(walk):
    a, b, c = zeros(20, (2, 40), 100)
    groups = [
        {"params": [a], "betas": (0.5, 0.99), "beta_scope": "global"},
        {"params": []},
        {"params": [b], "betas": (0.8, 0.99), "beta_scope": "row"},
        {"params": [c]},
    ]
    optimizer = with_betas(AMAdamW(groups), 0.5, [0.5, 0.8], 0.8)
    assert values(optimizer) == pytest.approx([0.1 * 0.5 + 0.2 * 0.5 + 0.7 * 0.8, 0.5, 0.3])


@pytest.mark.parametrize("backend", backends("cuda", "triton"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("cap", [0.89, 0.9, 0.7, 0.1])  # float32 rounds it up, and down
def test_a_first_step_is_at_the_cap(backend, dtype, cap):
    groups = [Group([(4, 20), (5,), ()], dtype)]
    optimizer = stepped(AMAdamW, groups, backend=backend, betas=(cap, 0.999), beta_scope="row")
    assert values(optimizer) == pytest.approx([cap, cap, 1.0], rel=1e-6)


def test_the_next_float32_below_the_cap_is_not_at_it(walk):
    caps = torch.tensor([0.89, 0.9, 0.7, 0.1])
    below = caps.nextafter(torch.tensor(0.0))
    groups = [{"params": zeros(1), "betas": (cap, 0.99)} for cap in (0.89, 0.9, 0.7, 0.1)]
    assert values(with_betas(AMAdamW(groups), *below))[2] == 0.0


def test_a_cap_in_float64_that_was_reached_in_float32_counts(walk):
    """float64 state of float32 parameters, whose betas are rounded to float32."""
    betas = [torch.tensor(cap).double() for cap in (0.89, 0.9, 0.7)]
    groups = [{"params": zeros(1), "betas": (cap, 0.99)} for cap in (0.89, 0.9, 0.7)]
    assert values(with_betas(AMAdamW(groups), *betas))[2] == pytest.approx(1.0)


def test_a_cap_that_was_changed_counts_from_then_on(walk):
    optimizer = with_betas(AMAdamW(zeros(3, 1)), 0.89, 0.5)
    assert values(optimizer)[2] == pytest.approx(0.75)
    optimizer.param_groups[0]["betas"] = (0.95, 0.999)
    assert values(optimizer)[2] == 0.0
    optimizer.param_groups[0]["betas"] = (0.5, 0.999)
    assert values(optimizer)[2] == pytest.approx(1.0)


def test_parameters_that_change_change_the_weights(walk):
    optimizer = with_betas(AMAdamW(zeros(3, (2, 16))), 0.8, 0.2)
    assert values(optimizer)[0] == pytest.approx((3 * 0.8 + 32 * 0.2) / 35)
    with_betas(optimizer, 0.8, [0.2, 0.4])
    assert values(optimizer)[0] == pytest.approx((3 * 0.8 + 32 * 0.3) / 35)
    optimizer.add_param_group({"params": zeros(5)})
    with_betas(optimizer, 0.8, [0.2, 0.4], 0.0)
    assert values(optimizer)[0] == pytest.approx((3 * 0.8 + 32 * 0.3) / 40)
    parameters(optimizer)[0].data = torch.zeros(13)
    assert values(optimizer)[0] == pytest.approx((13 * 0.8 + 32 * 0.3) / 50)
    parameters(optimizer)[1].data = torch.zeros(2, 17)
    with_betas(optimizer, 0.8, 0.2, 0.0)
    assert values(optimizer)[0] == pytest.approx((13 * 0.8 + 34 * 0.2) / 52)


def test_a_parameter_that_moves_to_another_group_takes_that_ones_cap(walk):
    a, b = zeros(1, 3)
    groups = [{"params": [a]}, {"params": [b], "betas": (0.5, 0.99)}]
    optimizer = with_betas(AMAdamW(groups), 0.6, 0.6)
    assert values(optimizer)[2] == pytest.approx(0.75)
    first, second = optimizer.param_groups
    second["params"].insert(0, first["params"].pop())
    assert values(optimizer)[2] == pytest.approx(1.0)


@both
def test_parameters_without_a_beta_or_without_elements_do_not_count(walk, cls):
    optimizer = cls(zeros(3, (0, 20), (0,), 4, 9), beta_scope="row")
    a, rows, empty, own, _ = parameters(optimizer)
    optimizer.state[a]["beta"] = torch.tensor(0.5)
    optimizer.state[rows]["beta"] = torch.empty(0)
    optimizer.state[empty]["beta"] = torch.tensor(0.0)
    optimizer.state[own]["of the user"] = 3
    assert values(optimizer) == pytest.approx([0.5, 0.5, 0.0])
    assert list(optimizer.betas_by_name([("rows", rows), ("a", a), ("empty", empty)])) == ["a"]


@both
@pytest.mark.parametrize("scope", ["tensor", "row", "global"])
def test_they_are_those_of_a_loop_over_the_state(walk, cls, scope):
    groups = [
        Group([(5, 20), (7,), (3, 4, 5)]),
        Group([(6, 16), ()], torch.float64, {"weight_decay": 0.1}),
        Group([(4, 18)], torch.complex64),
    ]
    optimizer = make_optimizer(cls, groups, beta_scope=scope)
    names = [(f"p{i}", param) for i, param in enumerate(parameters(optimizer))]
    for step in range(4):
        set_gradients(optimizer, step=step, skip=[1])
        optimizer.step()
        total = mean = at_cap = 0.0
        least, expected = 1.0, {}
        for name, param in names:
            if param not in optimizer.state:
                continue
            betas = optimizer.state[param]["beta"].double().reshape(-1)
            total += param.numel()
            mean += param.numel() * betas.mean().item()
            at_cap += (
                param.numel() * (betas > (0.89 if cls is AMAdamW else 0.9) - 1e-6).double().mean()
            )
            least = min(least, betas.min().item())
            expected[name] = betas.mean().item()
        assert values(optimizer) == pytest.approx([mean / total, least, at_cap / total])
        found = optimizer.betas_by_name(names)
        assert {name: beta.item() for name, beta in found.items()} == pytest.approx(expected)
        assert "p1" not in found


def test_a_beta_that_is_not_a_number_is_seen(walk):
    mean, least, _ = values(with_betas(AMAdamW(zeros(3, 2)), 0.5, float("nan")))
    assert mean != mean and least != least


@pytest.mark.skipif(ops.extension is None, reason=str(ops.unavailable))
@both
def test_both_walks_find_the_same(cls):
    """Also of state in another order, of another kind, or missing."""
    optimizer = cls(zeros(*[(i % 5, 16 + i % 3) for i in range(600)]), beta_scope="row")
    params = parameters(optimizer)
    generator = torch.Generator().manual_seed(0)
    for i in torch.randperm(600, generator=generator).tolist():
        shape, dtype = [(i % 5,), ()][i % 2], [torch.float32, torch.float64][i % 3 == 0]
        beta = torch.rand(shape, generator=generator, dtype=dtype)
        optimizer.state[params[i]] = [{"exp_avg": 1, "beta": beta}, {"mine": 1}, 3][i % 7 % 3]
    lists = [params[:100], [], params[100:]]
    found = ops.extension.betas(lists, optimizer.state, "beta", None)
    assert found is not None
    ((values, structure),) = metrics._read_any(lists, optimizer.state)
    assert torch.equal(found[0], values) and found[1] == structure


def test_betas_that_do_not_lie_one_beside_the_other_are_read_all_the_same(walk):
    optimizer = AMAdamW(zeros((3, 20)), beta_scope="row")
    optimizer.state[parameters(optimizer)[0]]["beta"] = torch.arange(6.0)[::2]
    assert values(optimizer)[0] == pytest.approx(2.0)


# ---- when ---------------------------------------------------------------------------


@both
def test_before_the_first_step_there_are_no_betas(walk, cls):
    optimizer = cls(zeros(3, 2), max_grad_norm=1.0)
    found = optimizer.metrics()
    assert list(found) == ["grad_norm", *OF_BETAS, "skipped_steps"]
    assert found.pop("skipped_steps").item() == 0
    assert all(value.isnan() and value.dim() == 0 for value in found.values())
    assert optimizer.betas_by_name([("a", parameters(optimizer)[0])]) == {}
    assert len(optimizer.state) == 0
    assert list(cls([{"params": []}]).metrics()) == [*OF_BETAS, "skipped_steps"]


@both
def test_the_norm_and_skipped_steps_are_there_where_they_are_taken(cls):
    optimizer = stepped(cls, [Group([(3, 4)])])
    assert list(optimizer.metrics()) == [*OF_BETAS, "skipped_steps"]
    optimizer.skip_nonfinite = True
    parameters(optimizer)[0].grad = torch.full((3, 4), 2.0)
    optimizer.step()
    found = optimizer.metrics()
    assert list(found) == ["grad_norm", *OF_BETAS, "skipped_steps"]
    assert found["grad_norm"].item() == pytest.approx(2 * 12**0.5)
    parameters(optimizer)[0].grad[0, 0] = torch.nan
    optimizer.step()
    later = optimizer.metrics()
    assert (later["skipped_steps"].item(), found["skipped_steps"].item()) == (1, 0)
    assert later["beta_mean"] == found["beta_mean"]  # of the last step that was one


@both
def test_a_restored_optimizer_says_what_the_saved_one_said(walk, cls):
    groups = [Group([(5, 20), (7,)]), Group([(3, 30)], torch.float64)]
    saved = make_optimizer(cls, groups, beta_scope="row")
    for step in range(3):
        set_gradients(saved, step=step)
        saved.step()
    loaded = make_optimizer(cls, groups, beta_scope="row")
    loaded.load_state_dict(saved.state_dict())
    assert values(loaded) == values(saved)
    assert values(copy.deepcopy(saved)) == values(saved)
    assert values(pickle.loads(pickle.dumps(saved))) == values(saved)


# ---- what they are ------------------------------------------------------------------


@both
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_they_are_new_scalars_each_time(walk, cls, scope):
    optimizer = stepped(cls, [Group([(5, 20)]), Group([(7,)])], beta_scope=scope, max_grad_norm=1.0)
    names = [(str(i), param) for i, param in enumerate(parameters(optimizer))]
    kept, before = [], []
    for step in range(1, 5):
        kept += [*optimizer.metrics().values(), *optimizer.betas_by_name(names).values()]
        before += [value.item() for value in kept[len(before) :]]
        set_gradients(optimizer, step=step)
        optimizer.step()
    assert [value.item() for value in kept] == before
    assert all(value.shape == () and not value.requires_grad for value in kept)
    addresses = [value.data_ptr() for value in kept]
    assert len(set(addresses)) == len(addresses)


def test_they_stay_where_one_beta_is_all_there_is(walk):
    """A single 0-dim beta is not handed out itself."""
    optimizer = with_betas(AMAdamW(zeros(2)), torch.tensor(0.5, dtype=torch.float64))
    (param,) = parameters(optimizer)
    kept = [*optimizer.metrics().values(), *optimizer.betas_by_name([("a", param)]).values()]
    optimizer.state[param]["beta"].fill_(0.1)
    assert [value.item() for value in kept] == [0.5, 0.5, 0.0, 0, 0.5]


class Reads(TorchDispatchMode):
    """Fails where a value is read back, or a tensor made or copied on the CPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        assert func is not torch.ops.aten._local_scalar_dense.default
        if isinstance(result, torch.Tensor):
            assert result.device == META, func
        return result


def test_on_a_device_nothing_is_read_nor_copied_to_it(walk):
    a, b = zeros((3, 20), 7, device="meta")
    optimizer = AMAdamW([{"params": [a], "beta_scope": "row"}, {"params": [b]}])
    optimizer.state[a]["beta"] = torch.zeros(3, device="meta")
    optimizer.state[b]["beta"] = torch.zeros((), device="meta")
    optimizer.metrics()  # makes what is kept
    with Reads():
        found = optimizer.metrics()
    assert list(found) == [*OF_BETAS, "skipped_steps"]
    named = optimizer.betas_by_name([("a", a), ("b", b)])
    assert list(named) == ["a", "b"]
    for value in (*found.values(), *named.values()):
        assert (value.device, value.shape) == (META, ())


def test_on_several_devices_they_are_on_the_first_that_is_not_the_cpu(walk):
    (near,), (far, farther) = zeros(3), zeros(5, 7, device="meta")
    optimizer = AMAdamW([far, near, farther])
    beta = torch.zeros((), device="meta")
    with_betas(optimizer, beta, 0.5, beta)
    found = optimizer.metrics()
    assert all(found[name].device == META and found[name].shape == () for name in OF_BETAS)
    named = optimizer.betas_by_name([("far", far), ("near", near), ("farther", farther)])
    assert [(name, beta.device.type) for name, beta in named.items()] == [
        ("far", "meta"),
        ("near", "cpu"),
        ("farther", "meta"),
    ]


def test_devices_count_with_their_elements():
    """The parts of two devices, on one here, are put together as one device would have them."""
    one = with_betas(AMAdamW(zeros(30, 10)), 0.89, 0.5)
    other = with_betas(AMAdamW(zeros(40, 20)), 0.2, 0.89)
    parts = []
    for optimizer in (one, other):
        params = parameters(optimizer)
        (betas,) = metrics.read_betas([params], optimizer.state)
        parts.append((metrics.Elements(betas, [len(params)], [0.89], {}), betas.values))
    found = [value.item() for value in metrics.over_devices(parts)]
    assert found == pytest.approx([0.5 * 0.89 + 0.1 * 0.5 + 0.4 * 0.2, 0.2, 0.5])


def test_what_is_kept_keeps_no_parameter_alive():
    optimizer = with_betas(AMAdamW(zeros(3, 2)), 0.5, 0.5)
    optimizer.metrics()
    (_, last) = parameters(optimizer)
    gone = weakref.ref(optimizer.state.pop(last)["beta"])
    gc.collect()
    assert gone() is None


# ---- by name ------------------------------------------------------------------------


def model_of():
    return nn.Sequential(nn.Linear(20, 4), nn.LayerNorm(4), nn.Linear(4, 2, bias=False))


def trained(optimizer, model):
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(5, 20)).square().sum().backward()
        optimizer.step()


@both
def test_a_model_gives_the_names(cls):
    model = model_of()
    frozen = model[1].weight.requires_grad_(False)
    optimizer = cls(model.parameters(), beta_scope="tensor")
    trained(optimizer, model)
    found = optimizer.betas_by_name(model)
    expected = {
        name: optimizer.state[param]["beta"].item()
        for name, param in model.named_parameters()
        if param is not frozen
    }
    assert {name: beta.item() for name, beta in found.items()} == expected
    assert optimizer.betas_by_name(model.named_parameters()) == found
    assert list(optimizer.betas_by_name([("x", model[0].weight)])) == ["x"]


@both
def test_the_optimizers_own_names_are_taken_where_none_are_given(cls):
    model = model_of()
    names = [*model.named_parameters()]
    optimizer = cls([{"params": names[3:]}, {"params": names[:3]}])
    trained(optimizer, model)
    found = optimizer.betas_by_name()
    assert found == optimizer.betas_by_name(model)
    assert list(found) == [name for name, _ in (*names[3:], *names[:3])]


@both
def test_without_names_the_error_says_what_to_pass(cls):
    optimizer = cls(model_of().parameters())
    with pytest.raises(ValueError, match=r"names: pass the model, or model.named_parameters\(\)"):
        optimizer.betas_by_name()


@pytest.mark.parametrize(
    ("named", "kind"),
    [
        (torch.zeros(3), "Tensor"),
        ([torch.zeros(3)], "Tensor"),
        ({"a": torch.zeros(3)}, "str"),
        ([("a", torch.zeros(3)), (torch.zeros(3), "a")], "tuple"),
        (3, "int"),
    ],
)
def test_what_is_no_name_and_parameter_is_refused(named, kind):
    with pytest.raises(TypeError, match=f"pairs.* there is a {kind}"):
        AMSGD(zeros(3)).betas_by_name(named)


# ---- over ranks -----------------------------------------------------------------------


def wide_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(20, 5), nn.Linear(5, 3)).double()


def sharded_metrics(cls, scope):
    expected_model = wide_model()
    expected = cls(expected_model.named_parameters(), lr=0.1, beta_scope=scope)
    model = fully_shard(wide_model(), mesh=init_device_mesh("cpu", (2,)))
    optimizer = cls(model.named_parameters(), lr=0.1, beta_scope=scope)
    for step in range(3):
        torch.manual_seed(step)
        batch = torch.randn(6, 20, dtype=torch.float64)
        for m, o in ((model, optimizer), (expected_model, expected)):
            m(batch).square().sum().backward()
            o.step()
            o.zero_grad()
    with CommDebugMode() as comm:
        found, named = values(optimizer), optimizer.betas_by_name()
    assert comm.get_total_counts() == 0
    assert list(named) == list(expected.betas_by_name())
    if scope == "row":
        # 3 rows on the first rank and 2 on the second; the other matrix' rows are too short.
        rank = torch.distributed.get_rank()
        rows = slice(0, 3) if rank == 0 else slice(3, 5)
        weight = expected_model[0].weight
        whole = expected.state[weight]["beta"]
        expected.state[weight]["beta"] = whole[rows]
    assert found == pytest.approx(values(expected), rel=1e-9)
    for name, beta in expected.betas_by_name().items():
        assert named[name].item() == pytest.approx(beta.item(), rel=1e-9)


@both
@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_ranks_say_what_one_process_says_of_whole_betas_and_of_their_rows(two_ranks, cls, scope):
    two_ranks.run(sharded_metrics, cls, scope)


def metrics_on_one_rank():
    model = fully_shard(nn.Linear(20, 1, bias=False), mesh=init_device_mesh("cpu", (2,)))
    optimizer = AMAdamW(model.named_parameters(), beta_scope="row")
    model(torch.ones(2, 20)).sum().backward()
    optimizer.step()
    # Of one row, the second rank has none.
    if torch.distributed.get_rank() == 1:
        assert all(torch.isnan(optimizer.metrics()[name]) for name in OF_BETAS)
        assert optimizer.betas_by_name() == {}
    else:
        assert values(optimizer) == pytest.approx([0.89, 0.89, 1.0])


def test_a_rank_without_rows_has_no_betas_and_is_not_waited_for(two_ranks):
    two_ranks.run(metrics_on_one_rank)
