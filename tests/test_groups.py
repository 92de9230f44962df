"""param_groups: which parameters decay, and that optimizers take the groups as torch gives them."""

import copy
from types import MappingProxyType

import pytest
import torch
from cases import OPTIMIZERS
from snapshot import snapshot
from torch import nn
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from adamem_fused import AMSGD, AMAdamW, param_groups

both = pytest.mark.parametrize("cls", OPTIMIZERS)


class ScaleNorm(nn.Module):
    """A norm of somebody's own, with a matrix."""

    def __init__(self):
        super().__init__()
        self.scale = Parameter(torch.ones(2, 4))
        self.projection = nn.Linear(4, 4)


class Scaled(ScaleNorm):
    """By its base's name."""


class Model(nn.Module):
    def __init__(self, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(9, 16)
        self.bag = nn.EmbeddingBag(5, 16)
        self.hidden = nn.Linear(16, 16)
        self.attention = nn.MultiheadAttention(16, 2, add_bias_kv=True)
        self.norm = nn.LayerNorm((2, 8))
        self.own = Scaled()
        self.temperature = Parameter(torch.ones(()))
        self.head = nn.Linear(16, 9, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        h = self.hidden(self.embedding(x))
        return self.head(self.norm(h.unflatten(-1, (2, 8))).flatten(-2) * self.temperature)


DECAYED = ["hidden.weight", "attention.in_proj_weight", "attention.out_proj.weight"]
DECAYED += ["own.projection.weight"]


def names(groups):
    """Each group's names, by its weight decay; groups of one decay one after the other."""
    found = {}
    for group in groups:
        found.setdefault(group["weight_decay"], []).extend(name for name, _ in group["params"])
    return found


def train(model, optimizer, steps=2):
    for step in range(steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(step)
        model(torch.randint(9, (4,), generator=generator)).square().sum().backward()
        optimizer.step()


# ---- which decay ----------------------------------------------------------------------


def test_matrices_decay_and_biases_norms_and_scalars_do_not():
    groups = param_groups(Model(), 0.1)
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]
    found = names(groups)
    assert sorted(found[0.1]) == sorted(["embedding.weight", "bag.weight", *DECAYED])
    undecayed = {"temperature", "norm.weight", "norm.bias", "own.scale", "own.projection.bias"}
    undecayed |= {"hidden.bias", "attention.in_proj_bias", "attention.out_proj.bias"}
    assert set(found[0.0]) == undecayed | {"attention.bias_k", "attention.bias_v"}


def test_each_parameter_is_there_once_under_its_name_and_in_the_models_order():
    model = Model(tied=False)
    order = {name: i for i, name in enumerate(dict(model.named_parameters()))}
    pairs = [pair for group in param_groups(model) for pair in group["params"]]
    assert len(pairs) == len(order)
    assert all(param is model.get_parameter(name) for name, param in pairs)
    for group in param_groups(model, modules={nn.Embedding: {}}):
        places = [order[name] for name, _ in group["params"]]
        assert places == sorted(places)


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm3d(4),
        nn.LazyBatchNorm2d(),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        nn.RMSNorm(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_every_norm_of_torch_is_known(norm):
    """Whatever the shape of its parameters."""
    if not isinstance(norm, nn.LazyBatchNorm2d):
        norm.weight = Parameter(torch.ones(2, 2))
    else:
        norm.weight.materialize((2, 2))
        norm.bias.materialize((2, 2))
    model = nn.Sequential(nn.Linear(4, 4), norm)
    assert names(param_groups(model, 0.1))[0.1] == ["0.weight"]


def test_frozen_parameters_are_left_out_and_empty_groups_are_not_made():
    model = Model()
    for name, param in model.named_parameters():
        param.requires_grad = name == "hidden.weight"
    (group,) = param_groups(model, 0.1, modules={nn.Embedding: {"lr": 0.5}})
    assert group == {"params": [("hidden.weight", model.hidden.weight)], "weight_decay": 0.1}
    model.hidden.weight.requires_grad = False
    model.hidden.bias.requires_grad = True
    assert names(param_groups(model, 0.1)) == {0.0: ["hidden.bias"]}


def test_what_the_model_exempts_does_not_decay():
    """As timm's models name position embeddings and class tokens."""

    class Vision(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = Parameter(torch.zeros(1, 5, 4))
            self.block = nn.Linear(4, 4)

        def no_weight_decay(self):
            return {"pos_embed", "dist_token"}

    assert names(param_groups(Vision(), 0.1)) == {
        0.1: ["block.weight"],
        0.0: ["pos_embed", "block.bias"],
    }


def test_a_module_within_exempts_its_own():
    """As where a model is compiled, in a wrapper, or the backbone of another."""

    class Backbone(nn.Module):
        def __init__(self):
            super().__init__()
            self.pos_embed = Parameter(torch.zeros(1, 5, 4))
            self.other = Parameter(torch.zeros(5, 4))

        def no_weight_decay(self):
            return {"pos_embed"}

    for model in (nn.Sequential(Backbone()), torch.compile(Backbone())):
        decayed, exempt = param_groups(model, 0.1)
        assert [name.rpartition(".")[2] for name, _ in decayed["params"]] == ["other"]
        assert [name.rpartition(".")[2] for name, _ in exempt["params"]] == ["pos_embed"]


def test_an_embedding_that_the_model_exempts_stays_so():
    class Exempting(nn.Module):
        def __init__(self):
            super().__init__()
            self.words = nn.Embedding(7, 4)
            self.places = nn.Embedding(5, 4)

        def no_weight_decay(self):
            return {"places.weight"}

    decayed, exempt = param_groups(
        Exempting(), 0.1, modules={nn.Embedding: {"beta_scope": "tensor"}}
    )
    assert [name for name, _ in decayed["params"]] == ["words.weight"]
    assert [name for name, _ in exempt["params"]] == ["places.weight"]
    assert (decayed["weight_decay"], exempt["weight_decay"]) == (0.1, 0.0)
    assert exempt["beta_scope"] == "tensor"
    groups = param_groups(Exempting(), 0.1, modules={nn.Embedding: {"weight_decay": 0.2}})
    assert names(groups) == {0.2: ["words.weight"], 0.0: ["places.weight"]}


def test_parametrized_norms_and_embeddings_are_known():
    class TableNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = Parameter(torch.ones(3, 3))

    model = nn.Sequential(nn.Embedding(5, 4), TableNorm())
    for module in model:
        nn.utils.parametrize.register_parametrization(module, "weight", nn.Identity())
    embedded, others = param_groups(model, 0.1, modules={nn.Embedding: {"lr": 0.5}})
    assert embedded["lr"] == 0.5
    assert [name for name, _ in embedded["params"]] == ["0.parametrizations.weight.original"]
    assert [name for name, _ in others["params"]] == ["1.parametrizations.weight.original"]


def test_a_bias_is_one_by_its_own_name_and_not_by_its_modules():
    class Biased(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias_net = nn.Linear(3, 3, bias=False)
            self.bias_k = Parameter(torch.zeros(1, 3))

    assert names(param_groups(Biased(), 0.1)) == {0.1: ["bias_net.weight"], 0.0: ["bias_k"]}


def test_without_a_weight_decay_it_is_the_optimizers():
    model = Model()
    optimizer = AMAdamW(param_groups(model, modules={nn.Linear: {"lr": 0.5}}), weight_decay=0.3)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.3, 0.3, 0.0, 0.0]


def test_pairs_are_taken_by_dimensions_and_names():
    model = Model()
    found = names(param_groups(model.named_parameters(), 0.1))
    # What is in a norm is not known.
    assert "norm.weight" in found[0.1] and "attention.bias_k" in found[0.0]
    twice = [("a", model.hidden.weight), ("b", model.hidden.weight)]
    assert names(param_groups(twice, 0.1)) == {0.1: ["a"]}


# ---- options of modules ---------------------------------------------------------------


def options_of(groups):
    """Options by name, without the weight decay."""
    return {
        name: {k: v for k, v in group.items() if k not in ("params", "weight_decay")}
        for group in groups
        for name, _ in group["params"]
    }


def test_a_module_and_all_in_it_have_its_options():
    model = Model()
    options = {"beta_scope": "row", "lr": 0.5}
    groups = param_groups(model, 0.1, modules={model.attention: options})
    for name, found in options_of(groups).items():
        assert found == (options if name.startswith("attention.") else {}), name
    decays = {name: decay for decay, found in names(groups).items() for name in found}
    plain = names(param_groups(model, 0.1))
    assert decays == {name: decay for decay, found in plain.items() for name in found}
    assert options == {"beta_scope": "row", "lr": 0.5}


def test_a_class_is_all_its_modules():
    model = Model()
    groups = param_groups(model, 0.1, modules={ScaleNorm: {"lr": 0.5}, nn.Linear: {"lr": 0.2}})
    found = options_of(groups)
    assert found["own.scale"] == {"lr": 0.5}
    assert found["own.projection.weight"] == {"lr": 0.2}  # a Linear in a ScaleNorm
    # A head that is an embedding is a Linear's, and so is attention's projection, by a base.
    assert found["embedding.weight"] == found["attention.out_proj.weight"] == {"lr": 0.2}
    assert found["bag.weight"] == found["attention.in_proj_weight"] == {}


@pytest.mark.parametrize("last", [nn.Linear, nn.Embedding])
def test_of_two_that_have_a_weight_the_later_counts(last):
    first = nn.Embedding if last is nn.Linear else nn.Linear
    modules = {first: {"lr": 0.5, "eps": 1e-6}, last: {"lr": 0.2}}
    found = options_of(param_groups(Model(), 0.1, modules=modules))
    assert found["embedding.weight"] == {"lr": 0.2, "eps": 1e-6}


def test_what_decays_comes_first_and_options_may_say_how_much():
    model = Model()
    modules = {nn.Embedding: {"weight_decay": 0.0}, model.hidden: {"weight_decay": 0.3}}
    groups = param_groups(model, 0.1, modules=modules)
    assert [group["weight_decay"] for group in groups] == [0.0, 0.1, 0.3, 0.0]
    assert names(groups[:1]) == {0.0: ["embedding.weight"]}
    assert names(groups[2:3]) == {0.3: ["hidden.weight"]}
    assert {"hidden.bias", "norm.weight"} <= set(names(groups[3:])[0.0])


def test_what_has_the_same_options_is_in_one_group():
    blocks = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(4, 4)})
    groups = param_groups(model, 0.1, modules={block: {"lr": 0.5} for block in blocks})
    assert [len(group["params"]) for group in groups] == [3, 1, 3, 1]
    assert param_groups(model, 0.1, modules={nn.Linear: {}}) == param_groups(model, 0.1)


def test_a_step_goes_on_from_a_checkpoint_of_groups_with_options():
    models = [Model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())

    def optimizer_of(model):
        modules = {model.attention: {"beta_scope": "row"}, nn.Embedding: {"lr": 0.02}}
        return AMAdamW(param_groups(model, 0.1, modules=modules), lr=0.01)

    optimizers = [optimizer_of(model) for model in models]
    train(models[0], optimizers[0], 2)
    models[1].load_state_dict(models[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
    assert snapshot(optimizers[0]) == snapshot(optimizers[1])


def test_what_is_not_trained_makes_no_group():
    model = Model()
    model.hidden.requires_grad_(False)
    groups = param_groups(model, 0.1, modules={model.hidden: {"lr": 0.5}})
    assert groups == param_groups(model, 0.1)


# ---- what optimizers make of them ------------------------------------------------------


@pytest.mark.parametrize("cls", [*OPTIMIZERS, torch.optim.AdamW, torch.optim.SGD])
def test_optimizers_keep_the_names(cls):
    model = Model()
    optimizer = cls(param_groups(model, 0.1), lr=0.01)
    for group in optimizer.param_groups:
        assert [model.get_parameter(name) for name in group["param_names"]] == group["params"]
    train(model, optimizer)
    if cls in OPTIMIZERS:
        # The rest has had no gradient.
        assert set(optimizer.betas_by_name()) == {
            *("embedding.weight", "hidden.weight", "hidden.bias"),
            *("norm.weight", "norm.bias", "temperature"),
        }


def test_rows_in_the_layers_only():
    model = Model()
    groups = param_groups(model, 0.1, modules={model.hidden: {"beta_scope": "row"}})
    optimizer = AMAdamW(groups, lr=3e-3)
    train(model, optimizer)
    assert optimizer.state[model.embedding.weight]["beta"].shape == ()
    assert optimizer.state[model.hidden.weight]["beta"].shape == (16,)


@both
def test_a_step_is_that_of_groups_without_names(cls):
    models = [Model() for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    named, plain = (param_groups(model, 0.1) for model in models)
    plain = [{**group, "params": [param for _, param in group["params"]]} for group in plain]
    optimizers = [cls(named, lr=0.01), cls(plain, lr=0.01)]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    ours, theirs = ({k: v.tolist() for k, v in model.state_dict().items()} for model in models)
    assert ours == theirs


@both
@pytest.mark.parametrize("names_saved", [True, False])
def test_state_goes_through_a_checkpoint_with_and_without_names(cls, names_saved):
    model = Model()
    groups = param_groups(model, 0.1)
    if not names_saved:
        groups = [{**group, "params": [param for _, param in group["params"]]} for group in groups]
    saved = cls(groups, lr=0.01)
    train(model, saved)
    loaded = cls(param_groups(model, 0.5), lr=0.5)
    expected_names = [group["param_names"] for group in loaded.param_groups]
    loaded.load_state_dict(saved.state_dict())
    assert [group["param_names"] for group in loaded.param_groups] == expected_names
    for group in (*loaded.param_groups, *saved.param_groups):
        group.pop("param_names", None)
    assert snapshot(loaded) == snapshot(saved)
    assert snapshot(copy.deepcopy(loaded)) == snapshot(saved)


@both
def test_groups_are_added_and_scheduled_as_torchs(cls):
    model = Model()
    optimizer = cls(param_groups(model.hidden, 0.1), lr=0.5)
    optimizer.add_param_group({"params": [("norm.weight", model.norm.weight)], "lr": 0.25})
    assert optimizer.param_groups[-1]["param_names"] == ["norm.weight"]
    with pytest.raises(ValueError, match="with/without names"):
        optimizer.add_param_group({"params": [model.norm.bias]})
    assert len(optimizer.param_groups) == 3
    scheduler = LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 0.125]


# ---- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "kind"),
    [
        (torch.zeros(3), "Tensor"),
        (nn.Linear(2, 2).parameters(), "Parameter"),
        ([{"params": []}], "dict"),
        (None, "NoneType"),
    ],
)
def test_what_is_no_model_is_refused(model, kind):
    with pytest.raises(TypeError, match=f"model or .*pairs.* there is a {kind}"):
        param_groups(model)


def test_a_model_with_nothing_to_train_is_refused():
    with pytest.raises(ValueError, match="of 2 parameters none requires grad"):
        param_groups(nn.Linear(2, 2).requires_grad_(False))
    with pytest.raises(ValueError, match="of 0 parameters none"):
        param_groups(nn.Tanh())


@pytest.mark.parametrize("weight_decay", [-0.1, float("nan"), "0.1", True, torch.tensor(0.1)])
def test_a_bad_weight_decay_is_refused(weight_decay):
    with pytest.raises(ValueError, match="Invalid weight_decay"):
        param_groups(nn.Linear(2, 2), weight_decay)


def test_bad_modules_are_refused():
    model = Model()
    with pytest.raises(TypeError, match=r"modules has to be a dict .* not a float"):
        param_groups(model, modules=0.0)
    frozen = MappingProxyType({nn.Embedding: MappingProxyType({"lr": 0.5})})
    assert param_groups(model, modules=frozen)[0]["lr"] == 0.5
    with pytest.raises(ValueError, match="modules needs the model"):
        param_groups(model.named_parameters(), modules={nn.Embedding: {"weight_decay": 0.0}})
    with pytest.raises(TypeError, match="options for a str, which is neither"):
        param_groups(model, modules={"hidden": {"lr": 1.0}})
    with pytest.raises(TypeError, match="options for a type, which is neither"):
        param_groups(model, modules={int: {"lr": 1.0}})
    with pytest.raises(TypeError, match="for Embedding have to be a dict, not a str"):
        param_groups(model, modules={nn.Embedding: "row"})
    with pytest.raises(ValueError, match='"params" for this Linear'):
        param_groups(model, modules={model.hidden: {"params": [], "lr": 1.0}})
    with pytest.raises(ValueError, match="for Conv2d, and the model has none of that class"):
        param_groups(model, modules={nn.Conv2d: {"lr": 1.0}})
    with pytest.raises(ValueError, match="for this Linear, and the model has no such"):
        param_groups(model, modules={nn.Linear(16, 16): {"lr": 1.0}})
    with pytest.raises(ValueError, match="Invalid beta_scope: 'rows'"):  # the optimizer's
        AMSGD(param_groups(model, modules={nn.Embedding: {"beta_scope": "rows"}}))
