"""The training experiments: a fair grid, runs that can be repeated, verdicts by their rules."""

import json
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch

from adamem_fused.backends import ops
from bench.experiments import __main__ as experiments
from bench.experiments import data
from bench.experiments.cell import Cell, lr_factor
from bench.experiments.contestants import BY_ROW, CONTESTANTS
from bench.experiments.grid import FULL, ROW, Grid, quick_grid
from bench.experiments.report import REPORT, write_report
from bench.experiments.results import Results, Run, from_json, to_json
from bench.experiments.runner import train
from bench.experiments.table import Table
from bench.experiments.tasks import TASKS
from bench.experiments.verdicts import (
    ADAPTIVE,
    FAILS,
    HOLDS,
    OPEN,
    Interval,
    above,
    below,
    interval,
    sign_test,
    verdicts,
)

pytestmark = pytest.mark.skipif(ops.unavailable is not None, reason=str(ops.unavailable))

AM = "AM-AdamW anchored tensor lambda 0.1"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def short(name, steps=3, **changes):
    """A task with few steps and two learning rates."""
    task = TASKS[name]
    lrs = {family: lrs[1:3] for family, lrs in task.lrs.items()}
    return replace(task, **{"steps": steps, "lrs": lrs, **changes})


def numbers(run):
    """What a run measured, without the times."""
    return (run.cell, run.loss, run.diverged_at, run.curve, run.beta, run.at_cap, run.betas)


# ---- grid -----------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [FULL, quick_grid(), ROW], ids=["full", "quick", "row"])
def test_every_contestant_gets_every_task_seed_and_learning_rate_of_its_family(grid):
    cells = grid.cells()
    assert len(set(cells)) == len(cells)
    runs = Counter((cell.task, cell.contestant) for cell in cells)
    assert set(runs) == {(task, name) for task in grid.tasks for name in grid.contestants}
    for (task, name), count in runs.items():
        lrs = grid.tasks[task].lrs[grid.contestants[name].family]
        assert count == 2 * grid.seeds * len(lrs)
    for task in grid.tasks.values():
        assert len(task.lrs["adam"]) == len(task.lrs["sgd"])


def test_a_block_of_the_grid_is_in_one_piece_and_seeds_come_one_after_the_other():
    blocks = [(cell.seed, cell.task) for cell in FULL.cells()]
    pieces = [b for i, b in enumerate(blocks) if i == 0 or blocks[i - 1] != b]
    assert len(pieces) == FULL.seeds * len(FULL.tasks)
    assert [seed for seed, _ in pieces] == sorted(seed for seed, _ in pieces)


def test_learning_rates_are_half_a_decade_apart():
    for task in FULL.tasks.values():
        for lrs in task.lrs.values():
            decades = math.log10(lrs[-1] / lrs[0])
            assert decades == pytest.approx(0.5 * (len(lrs) - 1), abs=0.03)


# ---- fairness -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet-digits", "gpt-small-python", "shifting-targets"])
def test_all_contestants_have_the_same_initial_weights_and_data_order(name):
    # With a learning rate that moves nothing, losses depend on weights and data alone.
    task = short(name)
    runs = [
        train(task, contestant, Cell(name, contestant.name, 1e-30, False, 0))
        for contestant in CONTESTANTS.values()
    ]
    assert len(set(runs[0].curve)) == 3  # each step has another batch
    for run in runs:
        assert run.curve == pytest.approx(runs[0].curve, rel=1e-5)
        assert run.loss == pytest.approx(runs[0].loss, rel=1e-5)
    other_seed = train(task, CONTESTANTS[AM], Cell(name, AM, 1e-30, False, 1))
    assert other_seed.curve != pytest.approx(runs[0].curve, rel=1e-5)


def test_a_run_can_be_repeated():
    task = short("gpt-small-python", steps=5)
    cell = Cell(task.name, AM, 0.01, True, 1)
    first, second = (train(task, CONTESTANTS[AM], cell) for _ in range(2))
    assert numbers(first) == numbers(second)
    assert math.isfinite(first.loss)


def test_split_holds_out_a_fifth_and_shares_nothing():
    training, held_out = (set(part.tolist()) for part in data.split(1797))
    assert not training & held_out
    assert training | held_out == set(range(1797))
    assert len(held_out) == 1797 // 5


def test_held_out_documentation_is_not_in_the_training_text():
    training, held_out = (text.decode() for text in data.documentation())
    lines = [line.strip() for line in held_out.splitlines() if len(line.strip()) > 60]
    shared = [line for line in lines if line in training]
    assert len(training) > 100_000
    assert len(lines) > 500
    assert len(shared) < 0.02 * len(lines)  # single lines of paragraphs that differ otherwise


@pytest.mark.parametrize("name", ["vit-digits", "gpt-small-python"])
def test_held_out_part_has_no_part_in_training(name, monkeypatch):
    task = short(name)
    cell = Cell(name, AM, 0.01, False, 0)
    before = train(task, CONTESTANTS[AM], cell)

    images, labels = data.digits()
    spoilt = images.clone()
    spoilt[data.split(len(images))[1]] = 1e3
    training, held_out = data.python_source()
    monkeypatch.setattr(data, "digits", lambda: (spoilt, labels))
    spoilt_text = (training, b"\0" * len(held_out))
    make = task.make
    if name == "gpt-small-python":
        make = type(make)(make.func, lambda: spoilt_text, *make.args[1:])
    # Another function than the one whose problem is cached.
    after = train(replace(task, make=lambda steps, seed: make(steps, seed)), CONTESTANTS[AM], cell)
    assert after.curve == before.curve
    assert after.loss != before.loss


def test_warm_up_climbs_to_the_learning_rate_and_the_cosine_falls_to_zero():
    factors = [lr_factor(step, 100, warmup=True, cosine=True) for step in range(100)]
    assert factors[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert factors[10] == max(factors) == 1.0
    assert factors[-1] < 1e-3
    assert lr_factor(0, 100, warmup=False, cosine=True) == 1.0
    assert {lr_factor(step, 100, warmup=False, cosine=False) for step in range(100)} == {1.0}


def test_sgd_at_a_point_of_the_grid_moves_as_far_as_am_sgd():
    for momentum, contestant in ((0.0, "SGD 0"), (0.9, "SGD 0.9"), (0.95, "SGD 0.95")):
        assert CONTESTANTS[contestant].lr_scale == pytest.approx(1 - momentum)
    assert CONTESTANTS["AM-SGD level global"].lr_scale == 1.0


# ---- runs on disk ---------------------------------------------------------------------


def small_grid():
    tasks = [short("least-squares-1e2"), short("shifting-targets")]
    return Grid({task.name: task for task in tasks}, CONTESTANTS, seeds=1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder with all runs of the small grid, and its report."""
    folder = tmp_path_factory.mktemp("experiments")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.experiments.grid.quick_grid", small_grid)
        assert experiments.main(["run", "--quick", "--workers", "2", "--out", str(folder)]) == 0
    return folder


def test_all_runs_of_the_grid_are_in_the_results_once(finished):
    cells = [run.cell for run in Results(finished)]
    assert Counter(cells) == Counter(small_grid().cells())


def test_betas_by_row_have_a_grid_and_a_report_of_their_own(tmp_path, monkeypatch):
    row = replace(ROW, tasks=small_grid().tasks, seeds=1)
    monkeypatch.setattr("bench.experiments.grid.ROW", row)
    assert experiments.main(["run", "--row", "--workers", "1", "--out", str(tmp_path)]) == 0
    runs = list(Results(tmp_path))
    assert Counter(run.cell for run in runs) == Counter(row.cells())
    of_rows = [run for run in runs if run.cell.contestant in BY_ROW]
    assert {run.cell.contestant for run in of_rows} == {
        f"{kind} {plane} row{suffix}"
        for kind, suffix in (("AM-AdamW", " lambda 0.1"), ("AM-SGD", ""))
        for plane in ("level", "anchored")
    }
    assert all(0 <= run.beta <= 0.9 for run in of_rows)
    report = (tmp_path / REPORT).read_text()
    assert all(f"| {name} " in report for name in row.contestants)


def test_interrupted_run_goes_on_where_it_stopped(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("bench.experiments.grid.quick_grid", small_grid)
    arguments = ["run", "--quick", "--workers", "1", "--out", str(tmp_path)]
    add = Results.add

    def interrupted(results, run):
        add(results, run)
        if len(list(results)) == 20:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Results, "add", interrupted)
        assert experiments.main(arguments) == 130
    rows = tmp_path / "runs.jsonl"
    assert len(rows.read_text().splitlines()) == 20
    rows.write_text(rows.read_text()[:-30])  # as where it was killed while it wrote

    assert experiments.main(arguments) == 0
    by_cell = {run.cell: run for run in Results(tmp_path)}
    assert len(rows.read_text().splitlines()) == len(by_cell) == len(small_grid().cells())
    for run in Results(finished):
        assert numbers(by_cell[run.cell]) == numbers(run)


def test_results_of_another_grid_are_not_added_to(finished):
    grid = small_grid()
    with pytest.raises(ValueError, match="other settings \\(seeds\\)"):
        Results(finished).open_for(replace(grid, seeds=2))
    Results(finished).open_for(grid)


def test_report_is_the_same_each_time_it_is_made(finished):
    def content():
        return {path.name: path.read_bytes() for path in finished.iterdir()}

    before = content()
    pictures = [name for name in before if name.endswith(".png")]
    assert len(pictures) >= 6
    assert all(f"({name})" in before[REPORT].decode() for name in pictures)
    assert experiments.main(["report", "--out", str(finished)]) == 0
    assert content() == before


def test_report_has_every_contestant_and_every_claim(finished):
    report = (finished / REPORT).read_text()
    for claim in ("(a)", "(b)", "(c)", "(d)"):
        assert f"**{claim}**" in report
    for name in CONTESTANTS:
        assert report.count(f"| {name} ") >= 3  # ranking, and a table for each task


def test_share_at_the_cap_is_kept_of_am_adamw_and_shown_where_it_is_there(finished, tmp_path):
    runs = list(Results(finished))
    for run in runs:
        assert (run.at_cap is not None) is run.cell.contestant.startswith("AM-AdamW")
        assert run.at_cap is None or 0 < run.at_cap <= 1  # that of the first step is 1
    assert "| at cap" in (finished / REPORT).read_text().replace("   ", " ")

    older = Results(tmp_path)  # as before it was kept
    older.open_for(small_grid())
    for run in runs:
        older.add(replace(run, at_cap=None))
    assert "at_cap" not in older.rows.read_text()
    write_report(older)
    assert "at cap" not in (tmp_path / REPORT).read_text()


def test_diverging_contestant_is_a_row(tmp_path):
    task = short("least-squares-1e2", steps=20)
    cell = Cell(task.name, "SGD 0", 1e30, False, 0)
    run = train(task, CONTESTANTS["SGD 0"], cell)
    assert run.loss == math.inf
    assert 0 < run.diverged_at < 20
    row = json.loads(to_json(run))
    assert "loss" not in row
    again = from_json(to_json(run))
    assert (again.cell, again.loss, again.diverged_at) == (cell, math.inf, run.diverged_at)


# ---- table and verdicts ---------------------------------------------------------------

LRS = [0.001, 0.003, 0.01, 0.03]
UNTRAINED = 5.0


def planted(loss, tasks=4, seeds=2):
    """A table whose losses are `loss(contestant, lr, warmup)`, a little different by task."""
    settings = {
        "contestants": {c.name: c.family for c in CONTESTANTS.values()},
        "seeds": seeds,
        "tasks": {
            f"task-{i}": {"group": "text", "lrs": {"adam": LRS, "sgd": LRS}} for i in range(tasks)
        },
    }
    runs = [
        Run(
            Cell(task, name, lr, warmup, seed),
            loss=loss(name, lr, warmup) * (1 + 0.02 * i + 0.01 * seed),
            diverged_at=None,
            untrained_loss=UNTRAINED,
            curve=[],
            beta=None,
        )
        for i, task in enumerate(settings["tasks"])
        for name in CONTESTANTS
        for lr in LRS
        for warmup in (False, True)
        for seed in range(seeds)
    ]
    return Table(runs, settings)


def outcome(table, claim, contestant=AM, warmup=False):
    """The outcome of a claim."""
    found = [
        v.outcome
        for v in verdicts(table)
        if (v.claim, v.contestant) == (claim, contestant) and v.warmup in (warmup, None)
    ]
    assert len(found) == 1
    return found[0]


def valley(name, lr, warmup):
    """The same for all: best at 0.01."""
    return 2.0 + 0.5 * abs(math.log10(lr / 0.01))


def test_equal_losses_are_no_improvement_but_are_as_good():
    table = planted(valley)
    assert outcome(table, "a") == OPEN
    assert outcome(table, "b") == HOLDS
    assert outcome(table, "c") == OPEN
    assert outcome(table, "d") == OPEN


@pytest.mark.parametrize("factor, expected", [(0.95, HOLDS), (1.05, FAILS)])
@pytest.mark.parametrize("contestant", ADAPTIVE)
def test_claim_a_follows_the_loss_at_the_best_learning_rate(contestant, factor, expected):
    def loss(name, lr, warmup):
        return valley(name, lr, warmup) * (factor if name == contestant else 1.0)

    assert outcome(planted(loss), "a", contestant) == expected
    others = [name for name in ADAPTIVE if name != contestant]
    assert {outcome(planted(loss), "a", name) for name in others} == {OPEN}


def test_claim_a_compares_each_at_its_own_best_learning_rate():
    def loss(name, lr, warmup):
        # Worse at every learning rate but one, which is another than the baseline's best.
        if name == AM:
            return 1.9 if lr == 0.001 else 4.0
        return valley(name, lr, warmup)

    assert outcome(planted(loss), "a") == HOLDS


@pytest.mark.parametrize("factor, expected", [(0.9, HOLDS), (1.005, HOLDS), (1.03, FAILS)])
def test_claim_b_is_about_the_best_fixed_beta_with_a_margin(factor, expected):
    def loss(name, lr, warmup):
        # The baseline of claim a is far worse than the best fixed beta.
        scale = {AM: factor, "AdamW 0.3": 1.0}.get(name, 1.5)
        return scale * valley(name, lr, warmup)

    table = planted(loss)
    assert outcome(table, "a") == HOLDS
    assert outcome(table, "b") == expected


@pytest.mark.parametrize("ours, theirs, expected", [(1.0, 1.2, HOLDS), (1.2, 1.0, FAILS)])
def test_claim_c_is_about_what_is_lost_without_warm_up(ours, theirs, expected):
    def loss(name, lr, warmup):
        scale = {AM: ours, "AdamW 0.9": theirs}.get(name, 1.0)
        return valley(name, lr, warmup) * (1.0 if warmup else scale)

    assert outcome(planted(loss), "c") == expected


@pytest.mark.parametrize("claim", ["d", "d, literal"])
@pytest.mark.parametrize("wide, expected", [(AM, HOLDS), ("AdamW 0.9", FAILS)])
def test_claim_d_counts_learning_rates_near_the_best(claim, wide, expected):
    def loss(name, lr, warmup):
        return 2.02 if name == wide and lr != 0.01 else valley(name, lr, warmup)

    assert outcome(planted(loss), claim) == expected


def test_one_task_decides_nothing():
    def loss(name, lr, warmup):
        return valley(name, lr, warmup) * (0.5 if name == AM else 1.0)

    assert outcome(planted(loss, tasks=1), "a") == OPEN


def test_a_mean_is_held_against_a_bound_by_its_interval():
    assert below(Interval(-1.0, -2.0, -0.1), 0.0) == HOLDS
    assert below(Interval(1.0, 0.1, 2.0), 0.0) == FAILS
    assert below(Interval(-1.0, -2.0, 0.1), 0.0) == OPEN
    assert above(Interval(1.0, 0.1, 2.0), 0.0) == HOLDS
    assert above(Interval(-1.0, -2.0, -0.1), 0.0) == FAILS


def test_interval_is_students():
    # t of 2 degrees of freedom at 97.5%: 4.3027. Standard error of 1, 2, 3: 1 / sqrt(3).
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)
    assert 2.0 - found.low == pytest.approx(4.3027 / math.sqrt(3), rel=1e-4)


def test_sign_test_is_the_binomial_one_without_ties():
    assert sign_test([-1.0, -2.0, -0.1, -0.5, -3.0]) == pytest.approx(2 / 2**5)
    assert sign_test([-1.0, -2.0, -0.1, -0.5, 3.0, 0.0]) == pytest.approx(2 * 6 / 2**5)
    assert sign_test([0.0, 0.0]) == 1.0


def test_diverged_run_counts_as_the_untrained_model():
    def loss(name, lr, warmup):
        return math.inf if lr > 0.005 else valley(name, lr, warmup)

    table = planted(loss)
    logs = table.log_losses("task-0", AM, False)
    assert logs[2:] == pytest.approx(math.log(UNTRAINED))
    assert table.best("task-0", AM, False) == 1
    assert not table.at_edge("task-0", AM, False)


def test_block_that_is_not_finished_is_left_out():
    table = planted(valley)
    runs = [run for run in table.runs.values() if run.cell != Cell("task-1", AM, 0.01, True, 1)]
    runs = [run for run in runs if run.cell.task != "task-2" or run.cell.contestant != "Lion"]
    shorter = Table(runs, table.settings)
    assert shorter.seeds == {"task-0": [0, 1], "task-1": [0], "task-3": [0, 1]}


def test_report_of_nothing_writes_nothing(tmp_path):
    results = Results(tmp_path)
    results.open_for(small_grid())
    write_report(results)
    assert not (tmp_path / REPORT).exists()
