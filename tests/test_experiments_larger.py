"""The larger trainings: their optimizers, the search for learning rates, runs, verdicts, report."""

import gzip
import json
import math
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import bench.experiments.__main__ as experiments
from adamem_fused import AMSGD, AMAdamW, param_groups
from bench.demo_model import GPT
from bench.experiments import corpus as corpus_module
from bench.experiments import data
from bench.experiments.cell import Cell
from bench.experiments.corpus import Corpus
from bench.experiments.larger import plain, plan, reach, results, tasks, training
from bench.experiments.larger import report as report_module
from bench.experiments.larger.contestants import (
    ADAMW,
    CONTESTANTS,
    FIXED,
    GATED,
    LEVEL_ROW,
    LEVEL_TENSOR,
    Setting,
)
from bench.experiments.larger.lora import LoRALinear, add_adapters
from bench.experiments.larger.muon import Muon, orthogonalised
from bench.experiments.larger.plain import Blocks, Drawn, Moment, PlainAMAdamW
from bench.experiments.larger.plan import Search, Study, learning_rate, next_cells
from bench.experiments.larger.plots import steps_needed
from bench.experiments.larger.report import REPORT
from bench.experiments.larger.results import Results, Run, from_json, to_json
from bench.experiments.larger.studies import STUDIES
from bench.experiments.larger.table import Table
from bench.experiments.larger.verdicts import (
    BEST_ADAMW,
    BETTER,
    EQUAL,
    LAYERS,
    OPEN,
    QUESTIONS,
    WORSE,
    best_adamw,
    outcome,
    verdicts,
)
from bench.experiments.verdicts import Interval, interval

DRAWN = "beta drawn, tensor"


# ---- optimizers -----------------------------------------------------------------------


def model_of(dtype=torch.float64):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(32, 24), torch.nn.Tanh(), torch.nn.Linear(24, 32, bias=False)
    ).to(dtype)


def trained(make, steps=24, seed=1, dtype=torch.float64):
    """The model after so many steps, and its optimizer."""
    model = model_of(dtype)
    optimizer = make(param_groups(model, 0.1))
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        x = torch.randn(8, 32, generator=generator, dtype=dtype)
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * (1 - step / steps)
        optimizer.zero_grad()
        loss = (model(x) - x.roll(1, 1)).square().mean()
        (0.6 ** (step % 12) * loss).backward()  # gradients far smaller than what is remembered
        optimizer.step()
    return model, optimizer


def assert_same_training(ours, theirs):
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("scope, segments", [("tensor", plain.whole), ("row", plain.rows)])
@pytest.mark.parametrize("memory_lambda", [0.0, 0.1])
def test_plain_am_adamw_is_the_packages(scope, segments, memory_lambda):
    ours, optimizer = trained(
        lambda groups: PlainAMAdamW(groups, 0.02, segments, memory_lambda=memory_lambda)
    )
    theirs, other = trained(
        lambda groups: AMAdamW(
            groups, lr=0.02, beta_scope=scope, memory_lambda=memory_lambda, betas=(0.89, 0.999)
        )
    )
    assert_same_training(ours, theirs)
    betas = [optimizer.state[p]["beta"] for p in ours.parameters()]
    assert min(b.min().item() for b in betas) < 0.8  # it adapts: more than the cap is compared
    for beta, param in zip(betas, theirs.parameters(), strict=True):
        expected = other.state[param]["beta"].double().reshape(-1)
        torch.testing.assert_close(beta, expected, rtol=1e-6, atol=1e-6)


def test_blocks_as_long_as_a_row_are_rows():
    model = torch.nn.Linear(32, 6).double()
    for param in model.parameters():
        grads = torch.randn_like(param)
        cut, rows = Blocks(32)(param), plain.rows(param)
        torch.testing.assert_close(cut.sums(grads), rows.sums(grads))
        torch.testing.assert_close(
            cut.spread(cut.sums(grads)).expand_as(param),
            rows.spread(rows.sums(grads)).expand_as(param),
        )


def test_columns_are_the_rows_of_the_transposed():
    matrix = torch.randn(20, 30)
    columns, rows = plain.columns(matrix), plain.rows(matrix.T)
    sums = columns.sums(matrix)
    torch.testing.assert_close(sums, rows.sums(matrix.T))
    torch.testing.assert_close(
        columns.spread(sums).expand_as(matrix), rows.spread(sums).expand_as(matrix.T).T
    )


def test_at_the_cap_every_beta_is_the_cap():
    _, optimizer = trained(lambda groups: PlainAMAdamW(groups, 0.02, rule=plain.at_cap))
    assert {b["beta"].item() for b in optimizer.state.values()} == {0.89}


def test_beta_of_the_last_step_is_the_closed_forms_a_step_late():
    seen = []

    def rule(moment):
        used = plain.last_step(moment)
        seen.append((moment.tensor, moment.exact.item(), used.item()))
        return used

    trained(lambda groups: PlainAMAdamW(groups, 0.02, rule=rule))
    for tensor in range(3):
        of_tensor = [(exact, used) for place, exact, used in seen if place == tensor]
        assert len(of_tensor) == 24
        assert of_tensor[0][1] == 0.89
        assert [used for _, used in of_tensor[1:]] == [exact for exact, _ in of_tensor[:-1]]
        assert len({exact for exact, _ in of_tensor}) > 3


def test_rows_without_a_gradient_may_keep_the_cap():
    model = torch.nn.Embedding(4, 32).double()
    optimizer = PlainAMAdamW(
        [{"params": [model.weight], "weight_decay": 0.0}], 0.02, plain.rows, plain.cap_when_silent
    )
    adamw = torch.nn.Embedding(4, 32).double()
    adamw.load_state_dict(model.state_dict())
    fixed = torch.optim.AdamW(adamw.parameters(), lr=0.02, betas=(0.89, 0.999), weight_decay=0.0)
    for step in range(6):
        for embedding in (model, adamw):
            embedding.zero_grad()
            # The last row has a gradient at the first step only.
            rows = torch.tensor([0, 1, 2, 3] if step == 0 else [0, 1, 2])
            (0.3**step * embedding(rows).sin().sum()).backward()
        optimizer.step()
        fixed.step()
    beta = optimizer.state[model.weight]["beta"]
    assert beta[3] == 0.89 and beta[:3].max() < 0.8
    moved = model.weight[3] - adamw.weight[3]
    assert moved.abs().max() < 0.02  # on as AdamW goes on, but for lambda


def test_a_gate_lets_adaptation_through_as_far_as_a_gradient_is_as_large_as_usual():
    exact, size = torch.tensor([0.2, 0.2, 0.2, 0.2, 0.89]), torch.tensor([0.0, 0.5, 1.0, 7.0, 0.5])
    moment = Moment(0, 0.5, exact, None, size < 0, size, 0.89)
    expected = torch.tensor([0.89, 0.89 - 0.5 * 0.69, 0.2, 0.2, 0.89])
    torch.testing.assert_close(plain.gated(moment), expected)
    one = Moment(0, 0.5, exact[:1], None, size[:1] < 0, size[:1], 0.89)
    assert plain.gated(one).tolist() == exact[:1].tolist()


def test_a_gate_by_the_tensor_is_open_where_all_gradients_have_fallen():
    exact, size = torch.tensor([0.2, 0.2, 0.2, 0.89]), torch.tensor([0.01, 0.005, 0.015, 0.01])
    moment = Moment(0, 0.5, exact, None, size < 0, size, 0.89)
    expected = torch.tensor([0.2, 0.89 - 0.5 * 0.69, 0.2, 0.89])
    torch.testing.assert_close(plain.gated_by_tensor(moment), expected)
    nothing = Moment(0, 0.5, exact, None, size > 0, torch.zeros(4), 0.89)
    torch.testing.assert_close(plain.gated_by_tensor(nothing), torch.full((4,), 0.89))
    one = Moment(0, 0.5, exact[:1], None, size[:1] < 0, size[:1], 0.89)
    assert plain.gated_by_tensor(one).tolist() == exact[:1].tolist()


def test_size_is_that_of_a_gradient_against_its_usual_one():
    sizes = []

    def rule(moment):
        sizes.append(moment.size.clone())
        return moment.exact

    weight = torch.nn.Parameter(torch.zeros(3, 32, dtype=torch.float64))
    group = {"params": [weight], "weight_decay": 0.0}
    optimizer = PlainAMAdamW([group], 0.02, plain.rows, rule, betas=(0.89, 0.9))
    generator = torch.Generator().manual_seed(0)
    for step in range(40):
        sign = torch.randint(2, (3, 32), generator=generator) * 2.0 - 1.0
        weight.grad = (sign * torch.tensor([[1e-3], [10.0], [0.0]])).double()
        weight.grad *= 1.0 if step < 39 else 0.1
        optimizer.step()
    for step in (0, 20, 38):
        torch.testing.assert_close(
            sizes[step], torch.tensor([1.0, 1.0, 0.0]).double(), atol=1e-3, rtol=0
        )
    # A hundredth, of a mean square of 0.9 + 0.1 * 0.01 of the usual one.
    expected = torch.tensor([1.0, 1.0, 0.0]).double() * 0.01 / 0.901
    torch.testing.assert_close(sizes[39], expected, atol=1e-3, rtol=0.03)


def test_at_the_cap_and_without_lambda_the_step_is_adamws():
    # So its bias correction follows the betas that were used, not those of the closed form.
    ours, _ = trained(
        lambda groups: PlainAMAdamW(groups, 0.02, rule=plain.at_cap, memory_lambda=0.0)
    )
    theirs, _ = trained(lambda groups: torch.optim.AdamW(groups, lr=0.02, betas=(0.89, 0.999)))
    assert_same_training(ours, theirs)


def test_drawn_betas_have_the_distribution_of_their_tensor_and_part():
    quantiles = torch.stack(
        [
            torch.stack([torch.linspace(0.0, 0.2, 21), torch.full((21,), 0.89)]),
            torch.stack([torch.cat([torch.zeros(11), torch.full((10,), 0.8)]), torch.zeros(21)]),
        ]
    )
    rule = Drawn(quantiles, seed=3)

    def drawn(tensor, progress):
        exact = torch.full((40_000,), 0.5)
        return rule(Moment(tensor, progress, exact, None, exact < 0, exact, 0.89))

    first = drawn(0, 0.49)
    assert 0 <= first.min() < 0.001 and 0.199 < first.max() <= 0.2
    assert first.mean().item() == pytest.approx(0.1, abs=2e-3)
    assert drawn(1, 0.0).unique().tolist() == pytest.approx([0.89])
    late = drawn(0, 0.5)
    assert (late == 0).float().mean().item() == pytest.approx(0.5, abs=0.02)
    assert (late == late.max()).float().mean().item() == pytest.approx(0.45, abs=0.02)
    assert drawn(1, 0.99).unique().tolist() == [0.0]


def test_muon_is_torchs_but_for_its_precision():
    torch.manual_seed(0)
    start, grads = torch.randn(48, 32), [torch.randn(48, 32) for _ in range(4)]
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    mine = Muon([ours], 0.01, weight_decay=0.1)
    torchs = torch.optim.Muon(
        [theirs], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw", momentum=0.95
    )
    for grad in grads:
        ours.grad, theirs.grad = grad.clone(), grad.clone()
        mine.step()
        torchs.step()
    moved = theirs - start
    # bfloat16 has three digits; what is compared is how far it has moved.
    assert (ours - theirs).norm() < 0.02 * moved.norm()


def test_orthogonalised_matrices_have_singular_values_near_one():
    values = torch.linalg.svdvals(orthogonalised(torch.randn(64, 24)))
    assert values.min() > 0.6 and values.max() < 1.3


def test_momentum_of_am_muon_is_that_of_am_sgd_by_row():
    torch.manual_seed(0)
    ours, theirs = (torch.nn.Parameter(torch.zeros(6, 32)) for _ in range(2))
    muon = Muon([ours], 0.01, weight_decay=0.0, adaptive=True)
    sgd = AMSGD([theirs], lr=0.01, beta_max=0.95, beta_scope="row")
    betas = []
    for step in range(8):
        grad = torch.randn(6, 32) + (1.0 if step % 3 else -1.0)
        for optimizer, param in ((muon, ours), (sgd, theirs)):
            optimizer.param_groups[0]["lr"] = 0.01 * (1 + step)
            param.grad = grad.clone()
            optimizer.step()
        a, b = muon.state[ours], sgd.state[theirs]
        torch.testing.assert_close(a["momentum_buffer"], b["momentum_buffer"], rtol=1e-5, atol=1e-6)
        betas.append(b["beta"].clone())
    assert torch.stack(betas).unique().numel() > 10


def test_am_muon_looks_ahead_with_its_rows_betas():
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.zeros(6, 32))
    muon = Muon([param], 0.01, weight_decay=0.0, adaptive=True)
    for scale in (1.0, 0.1, 0.3):
        before, grad = param.detach().clone(), scale * torch.randn(6, 32)
        param.grad = grad
        muon.step()
    state = muon.state[param]
    beta = state["beta"].unsqueeze(1)
    assert beta.min() < 0.8
    ahead = orthogonalised(torch.lerp(grad, state["momentum_buffer"], beta))
    torch.testing.assert_close(before - param, 0.2 * 32**0.5 * 0.01 * ahead)


def test_every_contestant_shares_the_parameters_out_whole():
    model = GPT(8, 32, 2, 1)
    quantiles = torch.full((5, len(list(model.parameters())), 21), 0.5)
    for contestant in CONTESTANTS.values():
        setting = Setting(model, "blocks.", 1e-3, 0.1, 10, 0, quantiles)
        optimizers = contestant.make(setting)
        params = [p for o in optimizers for group in o.param_groups for p in group["params"]]
        assert Counter(map(id, params)) == Counter(map(id, model.parameters())), contestant.name
        decays = {
            id(p): group["weight_decay"]
            for o in optimizers
            for group in o.param_groups
            for p in group["params"]
        }
        assert all(decays[id(p)] == (0.1 if p.dim() > 1 else 0) for p in model.parameters())


def number_after(word, name, otherwise):
    found = re.search(rf"{word} (\d+(\.\d+)?)", name)
    return float(found[1]) if found else otherwise


def expected_betas(name, param_name, param):
    """How many a parameter has, by the contestant's name."""
    in_layers = param_name.startswith("blocks.")
    is_embedding = param_name in ("embedding.weight", "positions.weight")
    if param.dim() < 2 or ("layers only" in name and not in_layers):
        return 1
    if "embeddings tensor" in name and is_embedding:
        return 1
    if "columns" in name:
        return param.shape[1]
    if "blocks of" in name:
        return param.numel() // int(number_after("blocks of", name, None))
    return len(param) if re.search(r"\brow\b|drawn, layers|step, layers", name) else 1


RULES = {
    "at the cap": plain.at_cap,
    "of the last step": plain.last_step,
    "cap without gradient": plain.cap_when_silent,
    "gated by the tensor": plain.gated_by_tensor,
    "gated": plain.gated,
}


@pytest.mark.parametrize("name", [name for name in CONTESTANTS if "Muon" not in name])
def test_a_contestant_is_what_its_name_says(name):
    model = GPT(8, 32, 2, 1)
    model.init_weights(torch.Generator().manual_seed(0))
    quantiles = torch.full((5, len(list(model.parameters())), 21), 0.5)
    (optimizer,) = CONTESTANTS[name].make(Setting(model, "blocks.", 1e-3, 0.1, 10, 0, quantiles))
    beta2 = number_after("beta2", name, 0.999)
    if name.startswith("AdamW"):
        betas = [float(number) for number in re.findall(r"\d\.\d+", name)]
        expected = (betas[0], betas[1] if len(betas) > 1 else 0.999)
    else:
        high = "layers only" in name and name.startswith("beta ")
        expected = (number_after(r"cap(?: of)?", name, 0.95 if high else 0.89), beta2)
    for group in optimizer.param_groups:
        assert group["betas"] == expected
    if name.startswith("AdamW"):
        assert isinstance(optimizer, torch.optim.AdamW)
        return
    scope = "global" if "global" in name else None
    rule = next((rule for word, rule in RULES.items() if f"beta {word}" in name), None)
    rule = rule or next((rule for word, rule in RULES.items() if f", {word}" in name), plain.exact)
    for group in optimizer.param_groups:
        assert group["memory_lambda"] == number_after("lambda", name, 0.1)
        if isinstance(optimizer, AMAdamW):
            assert group["memory_plane"] == ("anchored" if "anchored" in name else "level")
            assert scope is None or group["beta_scope"] == scope
        elif "drawn" in name:
            assert isinstance(group["rule"], Drawn)
        elif "rest at the cap" not in name:
            assert group["rule"] is rule
    model(torch.randint(256, (4, 9), dtype=torch.uint8)).backward()
    optimizer.step()
    for param_name, param in model.named_parameters():
        assert optimizer.state[param]["beta"].numel() == expected_betas(name, param_name, param)


@pytest.mark.parametrize("name", [ADAMW.name, LEVEL_ROW.name, LAYERS])
def test_adapters_are_trained_by_whoever_trains_layers(name):
    model = add_adapters(GPT(8, 32, 2, 1), "blocks.", seed=0)
    (optimizer,) = CONTESTANTS[name].make(Setting(model, "blocks.", 1e-3, 0.0, 10, 0))
    params = {p for group in optimizer.param_groups for p in group["params"]}
    assert params == {p for p in model.parameters() if p.requires_grad}


def test_rows_are_in_the_layers_only():
    model = GPT(8, 32, 2, 1)
    (optimizer,) = CONTESTANTS[LAYERS].make(Setting(model, "blocks.", 1e-3, 0.1, 10, 0))
    names = {id(p): name for name, p in model.named_parameters()}
    for group in optimizer.param_groups:
        assert group["betas"][0] == 0.95
        for param in group["params"]:
            in_layers = names[id(param)].startswith("blocks.")
            assert group["beta_scope"] == ("row" if in_layers else "tensor")


def trained_gpt(name, rule=None):
    """A small GPT after a few steps of a contestant, and its optimizer."""
    model = GPT(8, 32, 2, 1).double()
    model.init_weights(torch.Generator().manual_seed(0))
    quantiles = torch.full((5, len(list(model.parameters())), 21), 0.5)
    setting = Setting(model, "blocks.", 1e-2, 0.1, 8, 0, quantiles)
    (optimizer,) = CONTESTANTS[name].make(setting)
    for group in optimizer.param_groups if rule else ():
        group["rule"] = rule
    generator = torch.Generator().manual_seed(1)
    for step in range(8):
        windows = torch.randint(256, (4, 9), dtype=torch.uint8, generator=generator)
        optimizer.zero_grad()
        (0.6**step * model(windows)).backward()
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("name", ["beta drawn, layers only", "beta of the last step, layers only"])
def test_ablations_of_layers_are_its_step_but_for_the_rule(name):
    ours, optimizer = trained_gpt(name, plain.exact)
    assert_same_training(ours, trained_gpt(LAYERS)[0])
    betas = [optimizer.state[p]["beta"] for p in ours.parameters()]
    assert min(beta.min() for beta in betas) < 0.9  # it adapts: more than the cap is compared
    other, _ = trained_gpt(name)
    assert not torch.equal(other.blocks[0].qkv.weight, ours.blocks[0].qkv.weight)


def test_rest_at_the_cap_has_rows_in_the_layers_all_the_same():
    model, optimizer = trained_gpt(f"{LAYERS}, rest at the cap")
    for name, param in model.named_parameters():
        beta = optimizer.state[param]["beta"]
        in_layers = name.startswith("blocks.")
        assert len(beta) == (len(param) if in_layers and param.dim() > 1 else 1)
        assert (beta.min() < 0.95) == in_layers, name


def test_a_beta_at_the_cap_of_layers_is_that_cap():
    _, optimizer = trained_gpt("beta at the cap of 0.95")
    assert {beta for s in optimizer.state.values() for beta in s["beta"].tolist()} == {0.95}


def test_muon_takes_the_layers_matrices_only():
    model = GPT(8, 32, 2, 1)
    setting = Setting(model, "blocks.", 1e-3, 0.1, 10, 0)
    muon, others = CONTESTANTS["Muon + AdamW 0.9"].make(setting)
    names = {id(p): name for name, p in model.named_parameters()}
    taken = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    expected = ("qkv", "attention_out", "mlp_in", "mlp_out")
    assert taken == {f"blocks.0.{name}.weight" for name in expected}
    assert isinstance(others, torch.optim.AdamW)


def test_adapters_add_nothing_at_the_start_and_are_all_that_is_trained():
    model = GPT(8, 32, 2, 2)
    model.init_weights(torch.Generator().manual_seed(0))
    windows = torch.randint(256, (4, 9), dtype=torch.uint8)
    before = model(windows).item()
    add_adapters(model, "blocks.", seed=0)
    assert model(windows).item() == before
    trained_names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained_names) == 2 * 4 * 2
    assert all(name.endswith((".down", ".up")) for name in trained_names)
    layer = model.blocks[0].qkv
    assert isinstance(layer, LoRALinear)
    with torch.no_grad():
        layer.up.normal_()
    x = torch.randn(3, 32)
    merged = layer.linear.weight + 2.0 * layer.up @ layer.down
    torch.testing.assert_close(layer(x), x @ merged.T)


# ---- data -----------------------------------------------------------------------------


def test_no_file_of_the_corpus_is_in_two_parts(tmp_path, monkeypatch):
    paths = []
    for i in range(300):
        # Every file a second time under another name, and three that are left out.
        for copy in range(2):
            paths.append(tmp_path / f"{i}-{copy}.py")
            paths[-1].write_text(f"<{i}>")
    for name, size in (("large.py", corpus_module.LARGEST + 1), ("code.so", 10), ("x.json", 10)):
        paths.append(tmp_path / name)
        paths[-1].write_bytes(b"!" * size)
    monkeypatch.setattr(corpus_module, "_paths", lambda: iter(paths))
    corpus_module.corpus.cache_clear()
    try:
        text = corpus_module.corpus()
    finally:
        corpus_module.corpus.cache_clear()
    parts = [part.split(b"\n") for part in (text.training, text.choosing, text.comparing)]
    found = Counter(file for part in parts for file in part)
    assert found == {f"<{i}>".encode(): 1 for i in range(300)}
    assert len(parts[0]) > 250 and len(parts[1]) > 0 and len(parts[2]) > 0


def test_corpus_reads_the_library_and_the_pinned_packages_but_not_what_else_is_installed():
    paths = list(corpus_module._paths())
    names = {path.as_posix() for path in paths}
    assert any(name.endswith("/argparse.py") for name in names)
    assert any(name.endswith("/torch/optim/adamw.py") for name in names)
    assert not any("site-packages/ruff" in name or "_sysconfigdata" in name for name in names)


def idx(header, values):
    return gzip.compress(b"\0" * header + bytes(values))


def test_fashion_mnist_is_read_from_its_files_or_asked_for(tmp_path, monkeypatch):
    for part, count in (("train", 3), ("t10k", 2)):
        pixels = [i % 256 for i in range(count * 784)]
        (tmp_path / f"{part}-images-idx3-ubyte.gz").write_bytes(idx(16, pixels))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(idx(8, range(count)))
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    data.fashion_mnist.cache_clear()
    try:
        (images, labels), (tests, _) = data.fashion_mnist()
        assert images.shape == (3, 1, 28, 28) and tests.shape == (2, 1, 28, 28)
        assert images.flatten()[255].item() == 1.0 and images.flatten()[256].item() == 0.0
        assert labels.tolist() == [0, 1, 2]
        data.fashion_mnist.cache_clear()
        monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "nowhere"))
        with pytest.raises(RuntimeError, match="dataset-fashion-mnist"):
            data.fashion_mnist()
    finally:
        data.fashion_mnist.cache_clear()


# ---- the search -----------------------------------------------------------------------

GPT_TASK = tasks.TASKS["gpt-400k"]


def run_of(cell, choosing, comparing=None, **values):
    comparing = choosing if comparing is None else comparing
    defaults = {"training": [], "curve": [], "optimizer_us": 1.0, "step_us": 1.0}
    return Run(cell, 0, choosing, comparing, **(defaults | values))


def followed(loss, start=0, warmup=True):
    """The octaves that a search tries, in order, with `loss` of an octave."""
    contestant = replace(ADAMW, start=start)
    losses, tried = {}, []
    while True:
        octave = Search(GPT_TASK, contestant, warmup, losses).next_octave()
        if octave is None:
            return tried
        losses[octave] = loss(octave)
        tried.append(octave)


@pytest.mark.parametrize("best", range(-3, 4))
def test_search_ends_with_the_best_learning_rate_tried_on_both_sides(best):
    tried = followed(lambda octave: abs(octave - best))
    assert {best - 1, best, best + 1} <= set(tried)
    assert len(tried) == len(set(tried)) <= abs(best) + 4


def test_search_turns_to_lower_learning_rates_where_runs_diverge():
    tried = followed(lambda octave: math.inf if octave > -2 else abs(octave + 3))
    assert tried == [0, -1, -2, -3, -4]


def test_equal_losses_are_won_by_the_lower_learning_rate():
    losses = {-1: 2.0, 0: 1.0, 1: 1.0, 2: 3.0}
    search = Search(GPT_TASK, ADAMW, True, losses)
    assert search.next_octave() is None
    assert search.best_lr() == GPT_TASK.lr


def planted_runs(studies, loss):
    """All runs of studies, with `loss(cell)`, in the order in which they are made."""
    runs = {}
    while True:
        cell = next(next_cells(runs, studies), None)
        if cell is None:
            return runs
        assert cell not in runs
        values = {}
        if any(c.drawn_from == cell.contestant for c in CONTESTANTS.values()):
            values["quantiles"] = [[[0.5] * 21]]
        runs[cell] = run_of(cell, loss(cell), **values)


def valley(cell):
    return 2.0 + abs(math.log2(cell.lr / 0.006))


def test_other_seeds_run_at_the_learning_rate_that_was_found_and_more_octaves_where_asked():
    studies = [Study("gpt-400k", True, [ADAMW.name], seeds=3, octaves=(-2, 3))]
    runs = planted_runs(studies, valley)
    lrs = [(cell.seed, cell.lr) for cell in runs]
    assert lrs == [
        (0, 0.003), (0, 0.006), (0, 0.012), (0, 0.00075), (0, 0.024), (1, 0.006), (2, 0.006),
    ]  # fmt: skip


def test_what_is_next_does_not_depend_on_the_order_in_which_runs_finished():
    names = [ADAMW.name, LEVEL_TENSOR.name]
    studies = [Study("gpt-400k", True, names, seeds=2)]
    runs = planted_runs(studies, valley)
    backwards = dict(reversed(runs.items()))
    for count in range(len(runs)):
        some = dict(list(runs.items())[:count])
        assert next(next_cells(some, studies)) not in some
    assert list(next_cells(backwards, studies)) == []


def test_drawn_betas_wait_for_the_run_that_they_are_drawn_from():
    studies = [Study("gpt-400k", True, [DRAWN, LEVEL_TENSOR.name], seeds=1)]
    assert {cell.contestant for cell in next_cells({}, studies)} == {LEVEL_TENSOR.name}
    runs = planted_runs(studies, valley)
    order = [cell.contestant for cell in runs]
    assert order == [LEVEL_TENSOR.name] * 3 + [DRAWN] * 3


def test_betas_are_drawn_from_the_run_at_the_learning_rate_that_was_found():
    studies = [Study("gpt-400k", True, [LEVEL_TENSOR.name], seeds=2)]
    runs = planted_runs(studies, valley)
    assert plan.source_run(runs, GPT_TASK, LEVEL_TENSOR.name, True).cell.lr == 0.006
    assert next(iter(runs)).lr == 0.003
    assert plan.source_run(runs, GPT_TASK, LEVEL_TENSOR.name, False) is None


def test_a_search_ends_where_nothing_trains():
    studies = [Study("gpt-400k", True, [ADAMW.name], seeds=2)]
    runs = planted_runs(studies, lambda cell: math.inf)
    assert len(runs) <= 2 * len(plan.OCTAVES)


def test_all_studies_name_tasks_and_contestants_that_there_are():
    for study in STUDIES:
        assert study.task in tasks.TASKS
        assert set(study.contestants) <= set(CONTESTANTS)
        for name in study.contestants:
            source = CONTESTANTS[name].drawn_from
            assert source is None or source in study.contestants
    named = {name for pairs in QUESTIONS.values() for pair in pairs for name in pair}
    assert named <= {*CONTESTANTS, BEST_ADAMW}


# ---- runs -----------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """A task of a tiny model on a little text, in the place of gpt-400k."""
    generator = torch.Generator().manual_seed(0)
    words = [bytes([97 + i, 98 + i, 32]) for i in range(20)]
    order = torch.randint(20, (4000,), generator=generator).tolist()
    text = b"".join(words[i] for i in order)
    parts = Corpus(text, text[:3000], text[5000:9000])
    for module in (tasks, results):
        monkeypatch.setattr(module, "corpus", lambda: parts)
    monkeypatch.setattr(tasks, "HELD_OUT", 64)
    monkeypatch.setattr(tasks, "CURVE_HELD_OUT", 16)

    def make(steps, seed):
        return tasks.pretraining(16, 2, 1, 8, 4, steps, seed)

    task = replace(GPT_TASK, steps=40, make=make)
    for module in (tasks, plan, training, reach, experiments):
        name = "LARGER_TASKS" if module is experiments else "TASKS"
        monkeypatch.setattr(module, name, {**tasks.TASKS, task.name: task})
    return task


def numbers(run):
    return replace(run, optimizer_us=0.0, step_us=0.0)


def cell_of(name, lr=0.01, warmup=True, seed=0):
    return Cell("gpt-400k", name, lr, warmup, seed)


def test_a_run_is_the_same_each_time_and_on_disk(small):
    for name in (LEVEL_ROW.name, "AM-Muon row + AM-AdamW level row"):
        run, again = (training.train(small, CONTESTANTS[name], cell_of(name)) for _ in range(2))
        assert numbers(run) == numbers(again)
        read = from_json(to_json(run))
        assert read.cell == run.cell
        assert read.comparing == pytest.approx(run.comparing, rel=1e-5)
        assert read.betas == [[pytest.approx(b, rel=1e-3) for b in row] for row in run.betas]


def test_a_run_keeps_curves_and_betas(small):
    run = training.train(small, LEVEL_TENSOR, cell_of(LEVEL_TENSOR.name))
    assert len(run.curve) == len(run.training) == training.PARTS
    assert run.curve[-1] < run.curve[0] < math.log(256) + 0.1
    tensors = len(list(GPT(8, 16, 2, 1).parameters()))
    assert len(run.tensors) == tensors and {len(row) for row in run.betas} == {tensors}
    assert all(0 <= share <= 1 for share in run.at_cap) and run.at_cap[0] > 0
    assert len(run.quantiles) == training.QUANTILE_PARTS
    for part in run.quantiles:
        assert [len(quantiles) for quantiles in part] == [training.QUANTILES] * tensors
        assert all(quantiles == sorted(quantiles) for quantiles in part)
    other_seed = training.train(small, LEVEL_TENSOR, cell_of(LEVEL_TENSOR.name, seed=1))
    assert other_seed.quantiles == [] and other_seed.betas == [] and other_seed.at_cap


def test_curve_is_measured_where_parts_end_only(small, monkeypatch):
    evaluated = []
    mean_loss = tasks._mean_loss

    def counted(*args):
        evaluated.append(args)
        return mean_loss(*args)

    monkeypatch.setattr(tasks, "_mean_loss", counted)
    training._problem.cache_clear()
    training.train(small, ADAMW, cell_of(ADAMW.name))
    training._problem.cache_clear()
    assert len(evaluated) == training.PARTS + 2


def test_gradients_are_clipped_and_the_learning_rate_is_scheduled(small, monkeypatch):
    seen = []

    class Spy(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norm = torch.linalg.vector_norm(torch.stack([grad.norm() for grad in grads]))
            seen.append((norm.item(), self.param_groups[0]["lr"]))

    monkeypatch.setattr(training, "MAX_NORM", 1e-3)
    contestant = replace(ADAMW, make=lambda setting: [Spy(setting.groups(), lr=setting.lr)])
    training.train(small, contestant, cell_of(ADAMW.name, lr=0.5))
    assert len(seen) == small.steps
    assert {round(norm, 6) for norm, _ in seen} == {1e-3}
    lrs = [lr for _, lr in seen]
    assert lrs[0] == pytest.approx(0.1) and max(lrs) == lrs[4] == 0.5 and lrs[-1] < 0.01


def test_a_run_that_diverges_is_a_row_and_counts_as_guessing(small):
    def make(setting):
        class Explodes(torch.optim.SGD):
            def step(self, closure=None):
                for group in self.param_groups:
                    for param in group["params"]:
                        param.data.fill_(math.inf)

        return [Explodes(setting.groups(), lr=1.0)]

    run = training.train(small, replace(ADAMW, make=make), cell_of(ADAMW.name))
    assert run.choosing == run.comparing == math.inf
    again = from_json(to_json(run))
    assert again.choosing == again.comparing == math.inf
    assert Table([again], {}).loss(again) == pytest.approx(math.log(256))


NAMES = (ADAMW.name, LEVEL_TENSOR.name, DRAWN)


@pytest.fixture
def short_studies(small, monkeypatch):
    monkeypatch.setattr(experiments, "STUDIES", (Study(small.name, True, NAMES, seeds=2),))


def test_an_interrupted_run_goes_on_where_it_stopped_and_ends_the_same(
    short_studies, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = ["run", "--larger", "--workers", "2", "--out"]
    add = Results.add

    def interrupted(self, run):
        add(self, run)
        if len(list(self)) == 7:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(report_module, "write_pictures", lambda table, folder: {})  # below, once
        assert experiments.main([*arguments, str(whole)]) == 0
        patch.setattr(Results, "add", interrupted)
        assert experiments.main([*arguments, str(cut)]) == 130
    rows = cut / results.ROWS
    assert len(rows.read_text().splitlines()) == 7
    rows.write_text(rows.read_text()[:-20])  # as where it was killed while it wrote
    assert experiments.main([*arguments, str(cut)]) == 0
    first, second = ({run.cell: numbers(run) for run in Results(folder)} for folder in (whole, cut))
    assert first == second
    assert len(rows.read_text().splitlines()) == len(second)
    assert {cell.seed for cell in first} == {0, 1}

    report = (cut / REPORT).read_text()
    assert all(f"| {name} " in report for name in NAMES)
    pictures = sorted(path.name for path in cut.glob("*.png"))
    assert len(pictures) == 6
    assert all(f"({name})" in report for name in pictures)
    content = {path.name: path.read_bytes() for path in cut.iterdir()}
    assert experiments.main(["report", "--larger", "--out", str(cut)]) == 0
    assert {path.name: path.read_bytes() for path in cut.iterdir()} == content


def test_a_run_that_fails_ends_the_others_and_leaves_a_report(short_studies, tmp_path, monkeypatch):
    train = training.train

    def killed(task, contestant, cell, *args):
        if cell.contestant == DRAWN:
            os._exit(9)
        return train(task, contestant, cell, *args)

    monkeypatch.setattr(training, "train", killed)
    with pytest.raises(RuntimeError, match=r"beta drawn.* ended without a result"):
        experiments.main(["run", "--larger", "--workers", "2", "--out", str(tmp_path)])
    assert LEVEL_TENSOR.name in (tmp_path / REPORT).read_text()


def test_a_report_of_nothing_is_refused(tmp_path, capsys):
    assert experiments.main(["report", "--larger", "--out", str(tmp_path)]) == 2
    assert "holds no results" in capsys.readouterr().err


def test_runs_of_another_text_or_task_are_not_added_to(small, tmp_path, capsys):
    folder = Results(tmp_path)
    assert folder.open_for({small.name: small}) == 0
    assert folder.open_for({small.name: small, "gpt-1m": tasks.TASKS["gpt-1m"]}) == 0
    with pytest.raises(ValueError, match="another gpt-400k"):
        folder.open_for({small.name: replace(small, steps=50)})
    settings = json.loads(folder.settings.read_text())
    folder.settings.write_text(json.dumps(settings | {"corpus": "other"}))
    assert experiments.main(["run", "--larger", "--out", str(tmp_path)]) == 2
    assert "another text" in capsys.readouterr().err


def test_runs_say_which_machine_they_were_made_on(small, tmp_path, monkeypatch):
    folder = Results(tmp_path)
    assert folder.open_for({small.name: small}) == 0
    monkeypatch.setattr(results, "environment", lambda: {"cpu": "another"})
    assert folder.open_for({small.name: small}) == 1
    assert folder.open_for({small.name: small}) == 1
    monkeypatch.undo()


# ---- verdicts -------------------------------------------------------------------------

SETTINGS = {"tasks": {}}
PAIR = [LEVEL_TENSOR.name, LEVEL_ROW.name]


def table_of(loss, names, names_of_tasks=("gpt-400k", "gpt-1m"), seeds=3):
    studies = [Study(task, True, names, seeds) for task in names_of_tasks]
    return Table(planted_runs(studies, loss).values(), SETTINGS)


def found(table, contestant, against):
    (verdict,) = (v for v in verdicts(table) if (v.contestant, v.against) == (contestant, against))
    return verdict


@pytest.mark.parametrize(
    "factor, expected", [(0.95, BETTER), (1.05, WORSE), (1.0, EQUAL), (0.995, BETTER)]
)
def test_a_verdict_follows_the_ratio_of_losses(factor, expected):
    def loss(cell):
        noise = 1 + 1e-4 * cell.seed
        return valley(cell) * (factor * noise if cell.contestant == LEVEL_ROW.name else 1.0)

    verdict = found(
        table_of(loss, [LEVEL_TENSOR.name, LEVEL_ROW.name]), LEVEL_ROW.name, LEVEL_TENSOR.name
    )
    assert verdict.numbers == 6
    assert math.exp(verdict.interval.mean) == pytest.approx(factor, rel=1e-3)
    if factor != 1.0:
        assert verdict.outcome == expected
    else:  # the noise is all on one side
        assert verdict.outcome in (EQUAL, WORSE)


def test_tasks_that_disagree_decide_nothing():
    def loss(cell):
        if cell.contestant != LEVEL_ROW.name:
            return valley(cell)
        return valley(cell) * (0.8 if cell.task == "gpt-400k" else 1.01)

    verdict = found(
        table_of(loss, [LEVEL_TENSOR.name, LEVEL_ROW.name]), LEVEL_ROW.name, LEVEL_TENSOR.name
    )
    assert verdict.per_task == pytest.approx({"gpt-400k": math.log(0.8), "gpt-1m": math.log(1.01)})
    assert verdict.outcome == OPEN


def test_outcomes_are_of_interval_and_tasks():
    assert outcome(Interval(-0.02, -0.03, -0.01), [-0.01, -0.03]) == BETTER
    assert outcome(Interval(-0.02, -0.03, -0.01), [0.01, -0.05]) == OPEN
    assert outcome(Interval(0.02, 0.01, 0.03), [0.01, 0.03]) == WORSE
    assert outcome(Interval(0.0, -0.009, 0.009), [0.0]) == EQUAL
    assert outcome(Interval(-0.004, -0.007, -0.001), [0.001, -0.009]) == EQUAL
    assert outcome(Interval(0.0, -0.02, 0.009), [0.0]) == OPEN
    assert outcome(Interval(0.0, -0.009, 0.011), [0.0]) == OPEN
    assert outcome(interval([-0.5]), [-0.5]) == OPEN  # one run decides nothing


def test_learning_rates_are_chosen_on_one_part_and_compared_on_another():
    lr = {ADAMW.name: 0.006, LEVEL_ROW.name: 0.012}

    def loss(cell):
        return abs(math.log2(cell.lr / lr[cell.contestant]))

    def runs():
        studies = [Study("gpt-400k", True, list(lr), seeds=1)]
        for cell, run in planted_runs(studies, loss).items():
            # On the comparing part every other learning rate is better.
            comparing = 2.0 if cell.lr == lr[cell.contestant] else 1.0
            yield replace(run, comparing=comparing)

    table = Table(runs(), SETTINGS)
    for name in lr:
        (run,) = table.found("gpt-400k", True, name).values()
        assert run.cell.lr == lr[name] and run.comparing == 2.0
    assert found(table, LEVEL_ROW.name, ADAMW.name).interval.mean == 0.0


def test_best_adamw_is_picked_on_the_part_for_choosing():
    names = [contestant.name for contestant in FIXED]

    def loss(cell):
        return valley(cell) + (0.0 if cell.contestant == "AdamW 0.8" else 0.3)

    def runs(of):
        studies = [Study("gpt-400k", True, of, seeds=2)]
        for run in planted_runs(studies, loss).values():
            best = run.cell.contestant == "AdamW 0.8"
            yield replace(run, comparing=3.0 if best else 1.0)

    table = Table(runs([*names, LEVEL_ROW.name]), SETTINGS)
    verdict = found(table, LEVEL_ROW.name, BEST_ADAMW)
    assert verdict.interval.mean == pytest.approx(math.log(1.0 / 3.0))
    # Of those that have been run.
    table = Table(runs([ADAMW.name, "AdamW 0.6", LEVEL_ROW.name]), SETTINGS)
    assert best_adamw(table, "gpt-400k", True) in (ADAMW.name, "AdamW 0.6")
    assert found(table, LEVEL_ROW.name, BEST_ADAMW).interval.mean == pytest.approx(0.0)
    assert best_adamw(table, "gpt-400k", False) is None


def test_convex_tasks_and_runs_without_warm_up_have_verdicts_of_their_own():
    def loss(cell):
        factor = 1.1 if cell.task == "logistic-fashion" else 0.9 if cell.warmup else 1.3
        return valley(cell) * (factor if cell.contestant == LEVEL_ROW.name else 1.0)

    studies = [
        Study(task, warmup, PAIR, seeds=3)
        for task, warmup in (("gpt-400k", True), ("gpt-400k", False), ("logistic-fashion", True))
    ]
    table = Table(planted_runs(studies, loss).values(), SETTINGS)
    outcomes = {
        (v.convex, v.warmup): (math.exp(v.interval.mean), v.numbers)
        for v in verdicts(table)
        if (v.contestant, v.against) == (LEVEL_ROW.name, LEVEL_TENSOR.name)
    }
    assert outcomes == {
        (False, True): (pytest.approx(0.9), 3),
        (False, False): (pytest.approx(1.3), 3),
        (True, True): (pytest.approx(1.1), 3),
    }


def test_time_is_the_models_of_all_runs_and_the_optimizers_own():
    runs = [
        run_of(cell_of(ADAMW.name, lr=lr), 1.0, step_us=step, optimizer_us=optimizer)
        for lr, step, optimizer in ((0.1, 100.0, 10.0), (0.2, 120.0, 10.0), (0.3, 170.0, 20.0))
    ]
    table = Table(runs, SETTINGS)
    assert table.step_us("gpt-400k", runs[:1]) == 110.0 + 10.0
    assert table.step_us("gpt-400k", runs[2:]) == 110.0 + 20.0


def test_runs_of_a_contestant_that_is_not_there_are_an_error():
    with pytest.raises(ValueError, match="AdamW 7"):
        Table([run_of(cell_of("AdamW 7"), 1.0)], SETTINGS)


def test_steps_needed_are_read_off_the_curves():
    parts = training.PARTS
    adamw = [4.0 - 2.0 * (i + 1) / parts for i in range(parts)]  # ends at 2
    fast = [4.0 - 4.0 * (i + 1) / parts for i in range(parts)]  # is there at the half
    slow = [3.0] * parts
    runs = []
    for name, curve in ((ADAMW.name, adamw), (LEVEL_ROW.name, fast), ("AdamW 0.6", slow)):
        start = CONTESTANTS[name].start
        for octave in (start - 1, start, start + 1):
            cell = cell_of(name, lr=learning_rate(GPT_TASK, octave))
            choosing = 1.0 if octave == start else 2.0
            runs.append(run_of(cell, choosing, curve=curve))
    table = Table(runs, SETTINGS)
    condition = ("gpt-400k", True)
    assert steps_needed(table, condition, ADAMW.name) == pytest.approx(1.0)
    assert steps_needed(table, condition, LEVEL_ROW.name) == pytest.approx(0.5)
    assert steps_needed(table, condition, "AdamW 0.6") is None
    assert steps_needed(table, condition, LEVEL_TENSOR.name) is None


COMMITTED = Path(__file__).parent.parent / experiments.LARGER_RESULTS


def rows_of_two_kinds(contestant):
    """Shares and cosines of four rows; the last one's gradients are large and rare."""
    embedding = torch.nn.Embedding(4, 32)
    follower = reach.Follower(contestant, embedding, "none.")
    total = torch.zeros(4, 32)
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(4, 32, generator=generator)
    for step in range(reach.FORGOTTEN + reach.SUMMED):
        noise = torch.randn(4, 32, generator=generator)
        gradient = direction + 0.1 * noise
        if step % 20 != 10:
            gradient[3] = 0.01 * noise[3]
        follower.step([gradient])
        total += gradient if step >= reach.FORGOTTEN else 0
    assert torch.equal(follower.params[0], embedding.weight)
    return reach.arrived(follower.momentum[0], total)


def test_with_a_fixed_beta_every_gradient_arrives():
    shares, cosines = rows_of_two_kinds(ADAMW.name)
    torch.testing.assert_close(shares, torch.ones(4), atol=0.05, rtol=0)
    torch.testing.assert_close(cosines, torch.ones(4), atol=0.01, rtol=0)


def test_of_a_row_with_rare_gradients_little_arrives():
    shares, _ = rows_of_two_kinds(LEVEL_ROW.name)
    assert shares[:3].min() > 0.9
    # At the step with the gradient beta is at its cap: 1 - 0.89 of it. At the next it is near 0.
    assert shares[3].item() == pytest.approx(0.11, abs=0.03)


def test_gated_rows_keep_rare_gradients():
    shares, _ = rows_of_two_kinds(GATED.name)
    assert shares[:3].min() > 0.9 and shares[3] > 0.6


def test_rows_without_gradients_are_not_counted():
    gradients = torch.tensor([[3.0, 4.0], [0.0, 0.0], [1.0, 0.0]])
    momentum = torch.tensor([[1.5, 2.0], [1.0, 1.0], [0.0, -1.0]])
    shares, cosines = reach.arrived(momentum, gradients)
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.0]))
    torch.testing.assert_close(cosines, torch.tensor([1.0, 0.0]))


def test_reach_is_measured_written_and_reported(small, tmp_path, monkeypatch):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path))
    monkeypatch.setattr(reach, "TRAINED_FOR", 6)
    monkeypatch.setattr(reach, "FORGOTTEN", 40)
    monkeypatch.setattr(reach, "SUMMED", 80)
    monkeypatch.setattr(reach, "PARTS", {small.name: {"layers": "blocks.", "head": "head."}})
    seen, norms = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def watched(steps, seed):
        problem = tasks.pretraining(16, 2, 1, 8, 4, steps, seed)
        training_loss = problem.training_loss

        def loss(model, step):
            seen.append((step, model.head.weight.detach().clone()))
            return 100.0 * training_loss(model, step)

        return replace(problem, training_loss=loss)

    def clipped(params, most):
        params = list(params)
        total = clip(params, most)
        norms.append(torch.stack([p.grad.norm() for p in params]).norm().item())
        return total

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    monkeypatch.setitem(reach.TASKS, small.name, replace(small, make=watched))
    assert experiments.main(["reach", "--out", str(tmp_path)]) == 0
    assert [step for step, _ in seen] == list(range(6 + 40 + 80))
    weights = [weight for _, weight in seen]
    assert all(not torch.equal(a, b) for a, b in pairwise(weights[:7]))
    assert all(torch.equal(a, weights[6]) for a in weights[6:])
    assert len(norms) == len(seen) and max(norms) < 1.001

    found = reach.read(tmp_path)
    assert [(r.part, r.contestant) for r in found] == [
        (part, name) for part in ("layers", "head") for name in reach.COMPARED
    ]
    words = int((weights[0].abs().sum(1) >= 0).sum())
    rows = {"layers": (3 + 1 + 4 + 1) * 16, "head": words}
    for r in found:
        assert r.rows == rows[r.part] and len(r.shares) == len(r.cosines) == reach.QUANTILES
        assert r.shares == sorted(r.shares)
        if r.contestant == ADAMW.name:
            # Of gradients as of momentum the same steps are summed.
            assert r.shares[reach.QUANTILES // 2] == pytest.approx(1.0, abs=0.1)
    text = re.sub(" +", " ", "\n".join(reach.section(found, tmp_path)))
    for r in found:
        median = f"{r.shares[10]:.2f} ({r.shares[5]:.2f} to {r.shares[15]:.2f})"
        assert f"| {small.name}: {r.part} | {r.contestant} | {r.rows:,} | {median} |" in text
    assert (tmp_path / reach.PICTURE).stat().st_size > 5000
    assert reach.section(reach.read(tmp_path / "nothing"), tmp_path) == []


def test_reach_asks_for_its_images_before_it_measures(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FASHION_MNIST", str(tmp_path / "nowhere"))
    assert experiments.main(["reach", "--out", str(tmp_path)]) == 2
    assert "Fashion-MNIST is not here" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_the_committed_report_is_what_its_results_say(tmp_path):
    for name in (results.ROWS, results.SETTINGS, reach.ROWS):
        (tmp_path / name).write_bytes((COMMITTED / name).read_bytes())
    assert experiments.main(["report", "--larger", "--out", str(tmp_path)]) == 0
    assert (tmp_path / REPORT).read_text() == (COMMITTED / REPORT).read_text()
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in COMMITTED.iterdir()}
