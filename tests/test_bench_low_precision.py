"""State and parameters in few bits: the experiments, their verdicts, and what a step takes."""

import argparse
import json
import math
import random
from functools import partial

import pytest
import torch
from tqdm import tqdm

from adamem_fused import AMAdamW, storage
from bench import __main__ as commands
from bench import gpu_cases
from bench.experiments import __main__ as experiments
from bench.experiments import data
from bench.experiments.results import Results
from bench.experiments.table import Table
from bench.experiments.tasks import new_gpt, text
from bench.kernels.correctness import WrongResult
from bench.kernels.devices import Cpu
from bench.kernels.parameter_lists import ParameterList
from bench.kernels.results import Report, Row
from bench.kernels.traffic import bytes_to_move
from bench.low_precision import contestants, steps, training
from bench.low_precision.adamw import AdamW
from bench.low_precision.contestants import FORMATS, OPTIMIZERS, STATES, low_share, new_optimizer
from bench.low_precision.report import report
from bench.low_precision.results import SAME_GRADIENTS, Trainings, Verdict
from bench.low_precision.training import TASKS, Cell, Task, cells, train
from bench.readme import ROOT, performance

CPU = torch.device("cpu")
SHAPE = (64, 64)
TINY = Task(
    "tiny",
    "gpt-large-python",
    steps=4,
    lr=1e-2,
    weight_decay=0.1,
    make=partial(text, data.python_source, partial(new_gpt, 64, 2, 1)),
)


@pytest.fixture(autouse=True)
def on_the_reference(monkeypatch):
    monkeypatch.setattr(contestants, "BACKEND", {"backend": "reference"})


def new_params(dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = (SHAPE, (64,))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def take_steps(optimizer, count, scale=1.0):
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for step in range(count):
        generator = torch.Generator().manual_seed(step)
        for param in params:
            grad = torch.randn(param.shape, generator=generator) * scale
            param.grad = grad.to(param.dtype)
        optimizer.step()


# ---- the optimizers -------------------------------------------------------------------


def test_adamw_without_formats_is_torchs():
    ours, theirs = new_params(torch.float32), new_params(torch.float32)
    options = {"lr": 0.01, "weight_decay": 0.1}
    take_steps(AdamW(ours, **options), 5)
    take_steps(torch.optim.AdamW(theirs, **options), 5)
    for own, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, expected)


# Of the larger of the two tensors; the smaller one's memories are float32.
F32, BF16 = torch.float32, torch.bfloat16
STORED = {
    "float32": {F32},
    "bfloat16 state": {BF16},
    "bfloat16 state, to nearest": {BF16},
    "int8 state": {torch.int8, torch.uint8, F32},
    "bfloat16 parameters, to nearest": {F32},
    "bfloat16 parameters": {F32},
    "bfloat16 parameters, remainders": {F32},
    "bfloat16 parameters and state": {BF16},
    "bfloat16 parameters, remainders, int8 state": {torch.int8, torch.uint8, F32},
}


@pytest.mark.parametrize("stored", FORMATS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_each_stores_what_it_says(optimizer, stored):
    params = new_params(FORMATS[stored].params)
    made = new_optimizer(optimizer, stored, params, 0.01, seed=0)
    take_steps(made, 2)
    large, small = (made.state[param] for param in params)
    memories = [name for name in large if name.startswith("exp_avg")]
    assert {large[name].dtype for name in memories} == STORED[stored]
    assert (storage.REMAINDER in large) == ("remainders" in stored)
    assert small["exp_avg"].dtype == F32
    assert all(param.isfinite().all() for param in params)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_only_to_nearest_do_memories_stand_still(optimizer):
    found = {}
    for stored in STATES:
        params = new_params(F32)
        made = new_optimizer(optimizer, stored, params, 0.01, seed=0)
        take_steps(made, 1)
        before = storage.memory_value(params[0], "exp_avg_sq", made.state[params[0]]).clone()
        take_steps(made, 30, scale=1e-3)
        after = storage.memory_value(params[0], "exp_avg_sq", made.state[params[0]])
        found[stored] = float(after.sum() / before.sum())
    assert found.pop("bfloat16 state, to nearest") == 1.0
    for ratio in found.values():
        assert ratio == pytest.approx(0.999**30, abs=0.01)


def test_parameters_to_nearest_lose_what_others_keep():
    found = {}
    for stored in ("bfloat16 parameters, to nearest", "bfloat16 parameters"):
        (param,) = [torch.ones(SHAPE, dtype=BF16).requires_grad_()]
        made = new_optimizer("AdamW", stored, [param], 1e-4, seed=0)
        for _ in range(20):
            param.grad = torch.ones_like(param)
            made.step()
        found[stored] = float(param.detach().mean(dtype=F32))
    assert found["bfloat16 parameters, to nearest"] == 1.0
    assert found["bfloat16 parameters"] == pytest.approx(1 - 20e-4, abs=3e-4)


def test_another_seed_rounds_otherwise():
    runs = []
    for seed in (0, 0, 1):
        params = new_params(BF16)
        made = new_optimizer("AdamW", "bfloat16 parameters", params, 0.01, seed)
        take_steps(made, 2)
        runs.append(params[0])
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


def test_the_share_that_may_be_int8():
    assert low_share([(64, 64), (64,), (100, 60), (4096,)]) == (2 * 4096) / (2 * 4096 + 6064)


# ---- trainings ------------------------------------------------------------------------


def test_learning_rates_are_those_that_the_experiments_found():
    results = Results(ROOT / "bench/results/experiments")
    table = Table(results, json.loads(results.settings.read_text()))
    for task in TASKS.values():
        for name in ("AdamW 0.9", "AM-AdamW level tensor lambda 0.1"):
            best = table.best(task.like, name, False)
            assert table.lrs(task.like, name)[best] == task.lr


def test_most_parameters_are_in_tensors_that_formats_are_for():
    for task in TASKS.values():
        assert training._facts(task)["low_share"] > 0.95


def test_every_optimizer_has_every_format_of_every_seed():
    found = cells({"tiny": TINY}, seeds=3)
    pairs = {(cell.optimizer, cell.stored) for cell in found if cell.optimizer in OPTIMIZERS}
    assert len(found) == len(set(found))
    assert pairs == {(o, s) for o in OPTIMIZERS for s in FORMATS} | {
        (o, SAME_GRADIENTS) for o in OPTIMIZERS[1:]
    }


def test_same_gradients_are_those_of_the_float32_training(monkeypatch):
    own = train(TINY, Cell("tiny", "AMAdamW", "float32", 0))
    shadowed = train(TINY, Cell("tiny", "AMAdamW", SAME_GRADIENTS, 0))
    assert shadowed["loss"] == own["loss"]
    assert shadowed["betas"]["float32"]["quantiles"] == own["betas"]["quantiles"]
    for stored in STATES[1:]:
        assert shadowed["betas"][stored]["distance"] > 0
    # A shadow in float32 has the very same betas.
    monkeypatch.setattr(training, "STATES", ["float32", "bfloat16 state", "itself"])
    monkeypatch.setitem(contestants.FORMATS, "itself", FORMATS["float32"])
    shadowed = train(TINY, Cell("tiny", "AMAdamW", SAME_GRADIENTS, 0))
    assert shadowed["betas"]["itself"]["distance"] == 0.0


def test_betas_are_of_the_larger_tensors_and_at_the_cap_at_first():
    found = train(TINY, Cell("tiny", "AMAdamW, row", "float32", 0))["betas"]
    assert len(found["quantiles"]) == 5
    assert found["quantiles"] == sorted(found["quantiles"])
    assert 0 <= found["at_cap"] <= 1
    assert len(found["course"]) == TINY.steps


def test_a_training_in_bfloat16_is_measured_in_float32(monkeypatch):
    seen = []
    problem = training._problem(TINY.make, TINY.steps, 0)
    measure = problem.measure

    def look(model, losses):
        seen.append(next(model.parameters()).dtype)
        return measure(model, losses)

    monkeypatch.setattr(problem, "measure", look)
    found = train(TINY, Cell("tiny", "AdamW", "bfloat16 parameters, remainders", 0))
    assert seen == [F32]
    assert found["loss"] < problem.untrained_loss


def a_run(optimizer, stored, seed, loss):
    betas = {"quantiles": [0.1, 0.2, 0.3, 0.4, 0.5], "at_cap": 0.25, "distance": 0.125}
    betas["course"] = [betas["quantiles"]] * 10
    if stored == SAME_GRADIENTS:
        betas = dict.fromkeys(STATES, betas)
    own = {"betas": betas} if optimizer != "AdamW" else {}
    return {
        "task": "gpt-python", "optimizer": optimizer, "stored": stored, "seed": seed,
        "loss": loss, "curve": [loss], **own,
    }  # fmt: skip


LOSSES = {"float32": (1.0, 1.2), "bfloat16 state": (1.2, 1.4), "int8 state": (1.4, 1.4)}


def made_up():
    runs = [
        a_run(optimizer, stored, seed, loss)
        for optimizer in ("AdamW", "AMAdamW")
        for stored, losses in LOSSES.items()
        for seed, loss in enumerate(losses)
    ]
    runs.append(a_run("AMAdamW", SAME_GRADIENTS, 0, 1.0))
    facts = {"like": "another", "steps": 1, "lr": 0.1, "weight_decay": 0.0}
    facts |= {"parameters": 10, "low_share": 0.9}
    return Trainings({"seeds": 2, "tasks": {"gpt-python": facts}, "runs": runs})


@pytest.mark.parametrize(
    ("difference", "outcome"),
    [(0.2, "within"), (-0.2, "within"), (0.21, "higher"), (-0.21, "lower"), (math.nan, "higher")],
)
def test_the_rule(difference, outcome):
    assert Verdict(difference, spread=0.2).outcome == outcome


def test_a_verdict_is_of_means_and_float32s_spread():
    found = made_up()
    verdict = found.verdict("gpt-python", "AMAdamW", "int8 state")
    assert (verdict.difference, verdict.spread) == (pytest.approx(0.3), pytest.approx(0.2))
    assert found.verdict("gpt-python", "AMAdamW", "float32") is None
    assert found.verdict("gpt-python", "torchao AdamW8bit", "own") is None
    found.content["runs"].append(a_run("torchao AdamW8bit", "own", 0, 1.5))
    of_a_peer = found.verdict("gpt-python", "torchao AdamW8bit", "own")
    assert (of_a_peer.difference, of_a_peer.outcome) == (pytest.approx(0.4), "higher")


def test_the_report_has_verdicts_and_betas():
    text = report(made_up())
    rows = [[c.strip() for c in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["AdamW", "int8 state", "1.4000", "1.4000", "1.4000", "+0.3000", "0.2000", "higher"] in (
        rows
    )
    assert ["bfloat16 state", "2 of 2", ""] in rows
    assert [
        "int8 state",
        "0 of 2",
        "gpt-python, AdamW: higher; gpt-python, AMAdamW: higher",
    ] in rows
    betas = ["AMAdamW", "int8 state", "0.100", "0.200", "0.300", "0.400", "0.500", "25.0%"]
    assert betas in rows
    assert [*betas, "1.2e-01"] in rows


def test_results_are_read_as_they_were_written(tmp_path):
    found = made_up()
    found.content["runs"][0]["loss"] = None  # not finite
    path = found.write(tmp_path)
    assert Trainings.read(tmp_path).content == found.content
    assert len(path.read_text().splitlines()) > len(found.content["runs"])
    assert "nan" in report(found)


def test_quick_trains_all_of_it(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(training, "TASKS", {"tiny": TINY})
    monkeypatch.setattr(training, "QUICK_STEPS", 2)
    monkeypatch.setattr(training, "QUICK_SEEDS", 1)
    monkeypatch.setattr(training, "installed_peers", list)
    options = ["--quick", "--workers", "1", "--out", str(tmp_path)]
    assert experiments.main(["low-precision", *options]) == 0
    found = Trainings.read(tmp_path)
    assert len(found.content["runs"]) == len(OPTIMIZERS) * len(FORMATS) + 2
    assert all(run["loss"] > 0 for run in found.content["runs"])
    assert (tmp_path / "report.md").read_text() == report(found)
    assert {path.name for path in tmp_path.iterdir()} == {
        "runs.json", "report.md", "losses.png", "betas.png"
    }  # fmt: skip


# ---- steps ----------------------------------------------------------------------------

SMALL = ParameterList("small", ((64, 128), (128,), (64, 64)), "made up")
PASS = argparse.Namespace(seconds=0.001, rounds=2)


def measured(sides, monkeypatch):
    """A pass of these sides and torch's."""
    everyone = steps.find_sides(CPU)
    keys = [(steps.ADAMW_BASELINE, "float32"), *sides]
    monkeypatch.setattr(steps, "find_sides", lambda device: {key: everyone[key] for key in keys})
    rows = {
        key: {"optimizer": key[0], "stored": key[1], "dtype": str(everyone[key][1])[6:]}
        for key in keys
    }
    with tqdm(disable=True) as bar:
        steps.measure_pass(Cpu(), SMALL, rows, PASS, random.Random(0), bar)
    return rows


def test_a_pass_measures_times_and_bytes(monkeypatch):
    stored = [s for s in steps.STORED if s != "float32"]
    sides = [(o, s) for o in ("AMAdamW", "AMAdamW, row") for s in stored]
    rows = measured(sides, monkeypatch)
    numel = SMALL.numel
    for key, row in rows.items():
        assert "reason" not in row, key
        assert len(row["own"][0]) == len(row["baseline"][0]) == 2
        assert all(seconds > 0 for seconds in row["own"][0] + row["baseline"][0])
        assert row["peak_bytes"] is None or row["peak_bytes"] >= row["state_bytes"] + 4 * numel
    state = {s: rows["AMAdamW", s]["state_bytes"] / numel for s in stored}
    assert state["bfloat16 state"] == pytest.approx(4, abs=0.1)
    assert state["int8 state"] == pytest.approx(2.1, abs=0.1)
    assert state["bfloat16 parameters, remainders, int8 state"] == pytest.approx(3.1, abs=0.1)


def test_a_wrong_result_stops_it(monkeypatch):
    make = partial(steps.new_optimizer)

    def wrong(optimizer, stored, params, lr, seed):
        return make(optimizer, stored, params, 2 * lr, seed)

    monkeypatch.setattr(steps, "new_optimizer", wrong)
    with pytest.raises(WrongResult, match="AMAdamW, int8 state, first step"):
        measured([("AMAdamW", "int8 state")], monkeypatch)


def test_what_fails_is_a_row_with_the_reason(monkeypatch):
    def refuses(*args, **options):
        raise RuntimeError("no such format")

    monkeypatch.setattr(steps, "new_optimizer", refuses)
    rows = measured([("AMAdamW", "int8 state")], monkeypatch)
    assert rows["AMAdamW", "int8 state"]["reason"] == "RuntimeError: no such format"


@pytest.mark.parametrize(
    ("own", "dtype", "options"),
    [
        *((own, own.params, own.options) for own in FORMATS.values() if not own.nearest),
        *((own, own.dtype, own.options) for own in vars(gpu_cases).values()
          if isinstance(own, gpu_cases.Format)),
    ],
)  # fmt: skip
def test_formats_guess_where_the_backends_do(own, dtype, options):
    params = new_params(dtype)[:1]
    optimizer = AMAdamW(params, backend="reference", **options)
    take_steps(optimizer, 1)
    (work,) = optimizer._collect()
    packed = work.batch.packed
    is_low = packed is not None and packed.is_low(work.batch, 0)
    may_guess = packed.may_guess(work.batch, 0) if is_low else dtype == torch.float32
    assert own.guesses == may_guess


@pytest.mark.parametrize(
    ("optimizer", "stored", "state", "expected"),
    [
        ("AMAdamW", "bfloat16 state", 4, 20),
        ("AMAdamW, row", "bfloat16 state", 4, 20),
        ("AMAdamW", "int8 state", 2, 16),
        ("AMAdamW, row", "int8 state", 2, 16),
        ("AMAdamW", "bfloat16 parameters and state", 4, 14),
        ("AMAdamW, row", "bfloat16 parameters and state", 4, 14),
        ("AMAdamW", "bfloat16 parameters, remainders, int8 state", 3, 12),
        ("AMAdamW, row", "bfloat16 parameters, remainders, int8 state", 3, 12),
    ],
)
def test_bytes_a_parameter_are_those_of_the_formats(optimizer, stored, state, expected):
    contestant, dtype = steps.ours(optimizer, stored), FORMATS[stored].params
    moved = bytes_to_move(contestant, ((1000, 128),), dtype, 128_000 * state, 2**16)
    assert moved == 128_000 * expected


def a_row(optimizer, stored, own, **facts):
    return {
        "optimizer": optimizer, "stored": stored, "dtype": "float32", "own": [[own] * 2] * 2,
        "baseline": [[0.01] * 2] * 2, "state_bytes": 800, "bytes_to_move": 2800,
        "peak_bytes": 2_000_000, **facts,
    }  # fmt: skip


RESULT = {
    "settings": {"device": "cpu"},
    "parameters": "gpt2-small",
    "numel": 100,
    "rows": [
        a_row("AdamW fused", "float32", 0.01),
        a_row("AMAdamW", "bfloat16 state", 0.014, state_bytes=400),
        a_row("AMAdamW, row", "int8 state", 0.012, state_bytes=206),
        a_row("AMAdamW", "bfloat16 parameters and state", 0.01, dtype="bfloat16"),
        {"optimizer": "bitsandbytes AdamW8bit", "stored": "own", "dtype": "float32",
         "reason": "RuntimeError: no"},
    ],
    "missing": {"flashoptim FlashAdamW": "it works on cuda tensors only"},
}  # fmt: skip


def test_a_table_of_time_bytes_and_loss():
    cells = [dict(zip(steps.HEADERS, c, strict=True)) for c in steps.table_cells(RESULT, made_up())]
    torchs, wide, narrow, low = cells
    assert torchs["/ AdamW fused"] == "1.00 (1.00 to 1.00)"
    assert wide["/ AdamW fused"] == "1.40 (1.40 to 1.40) of 1.30, not met"
    assert narrow["/ AdamW fused"] == "1.20 (1.20 to 1.20) of 1.60"
    assert (narrow["ms"], narrow["state"], narrow["with the parameter"]) == ("12.0", "2.06", "6.06")
    assert (low["state"], low["with the parameter"], low["moved"]) == ("8.00", "10.00", "28.0")
    assert torchs["held-out loss"] == "1.100"
    assert wide["held-out loss"] == "1.300 (+0.200: within)"
    assert low["held-out loss"] == "-"
    assert steps.reasons(RESULT) == [
        "flashoptim FlashAdamW: it works on cuda tensors only",
        "bitsandbytes AdamW8bit: RuntimeError: no",
    ]


def test_the_table_is_in_the_readme(tmp_path):
    environment = {"device": "A CPU", "torch": "2.13.0", "date": "2026-11-27"}
    row = Row("2^24", 1, 1, "float32", "warm", "AdamW fused", "adamw", step=[[1.0]])
    folder = tmp_path / "bench" / "results" / "a-cpu"
    folder.mkdir(parents=True)
    Report({"device": "cpu", "threads": 2}, environment, {}, [row]).write(folder / "kernels.json")
    assert "low-precision.json" not in performance(tmp_path)
    (folder / "low-precision.json").write_text(json.dumps(RESULT))
    text = performance(tmp_path)
    assert "([low-precision.json](../bench/results/a-cpu/low-precision.json))" in text
    assert "1.40 (1.40 to 1.40) of 1.30, not met" in text
    assert "- bitsandbytes AdamW8bit: RuntimeError: no\n" in text
    assert "report.md" not in text
    trainings = tmp_path / "bench" / "results" / "low-precision"
    trainings.mkdir()
    made_up().write(trainings)
    text = performance(tmp_path)
    assert "([report.md](../bench/results/low-precision/report.md))" in text
    assert "1.300 (+0.200: within)" in text


def test_the_command_writes_what_it_prints(monkeypatch, tmp_path, capsys):
    sides = steps.find_sides(CPU)
    some = {key: sides[key] for key in list(sides)[:4]}
    monkeypatch.setattr(steps, "find_sides", lambda device: some)
    monkeypatch.setitem(steps.QUICK, "max_parameters", 2**17)
    options = ["--quick", "--device", "cpu", "--threads", "1", "--out", str(tmp_path)]
    assert commands.main(["low-precision", *options]) == 0
    result = json.loads((tmp_path / "low-precision.json").read_text())
    assert [(row["optimizer"], row["stored"]) for row in result["rows"]] == list(some)
    assert result["parameters"].startswith("gpt2-small, dimensions / ")
    assert "flashoptim FlashAdamW" in result["missing"]
    text = capsys.readouterr().out
    assert "AMAdamW" in text and "/ AdamW fused" in text


def test_torchs_own_optimizer_in_bfloat16_is_there():
    contestant, dtype = steps.find_sides(CPU)["AdamW fused", steps.TORCH_BFLOAT16]
    params = new_params(dtype)
    made = contestant.make(params)
    take_steps(made, 1)
    assert made.state[params[0]]["exp_avg"].dtype == BF16
    assert not isinstance(made, AMAdamW)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys, tmp_path):
    with pytest.raises(SystemExit):
        commands.main(["low-precision", "--device", "cuda", "--out", str(tmp_path)])
    assert "--device cuda: torch" in capsys.readouterr().err
