"""The report: Markdown and pictures, from the results alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence

import numpy as np

from bench.experiments.cell import WARMUP_SHARE
from bench.experiments.formatting import markdown, ratio
from bench.experiments.plots import write_pictures
from bench.experiments.results import Results, Run
from bench.experiments.runner import TRACKED
from bench.experiments.table import Table
from bench.experiments.verdicts import (
    BASELINES,
    RULES,
    Interval,
    Verdict,
    best_fixed,
    interval,
    log_ratio,
    sign_test,
    tasks_of_kind,
    verdicts,
    width,
)

REPORT = "report.md"
DEFAULTS = {"adam": "AM-AdamW level tensor lambda 0.1", "sgd": "AM-SGD level global"}


RUNS = """
Initial weights, data and its order are the same for all contestants of a block. The learning rate
falls to zero as a cosine, except for shifting-targets and for schedule-free AdamW, where it is
constant after the warm-up. SGD gets 1 - momentum of the grid's learning rate, so that a point of
the grid means the same size of steps for all of the family.

The images are scikit-learn's digits: no package was found that carries a larger set. Nor was one
found whose pretrained model is light enough to be installed for this alone: gpt-fine-tuning starts
from a GPT that the task itself trains on Python source.

**Each contestant's learning rate is picked on the same loss that it is then compared by**, for all
of them alike. So is the best fixed beta, which favours the larger choice: the best of six values
for AdamW, of four for SGD, against one contestant. The tasks are not independent: several share a
text or a data set. In comparisons a run that diverged, or ended above where it started, counts as
the untrained model, and least squares below a millionth of its start as solved. Intervals are over
tasks, and not corrected for their number. Classification losses differ by more than those of text,
so that one task can widen an interval: the number of tasks on which a contestant is better, and the
p of a sign test on it, stand beside, though no verdict is made of them.
"""
RANKING = """
Ratios of losses to {baseline}'s, each at its best learning rate: geometric mean over the tasks and
95% t interval. Width: decades of learning rates as in claim (d), learning tasks. Edge: of how many
tasks, without warm-up, the best learning rate is at an edge of the grid.
"""
OPTIONS = """
Ratios of losses to that of the package's defaults, learning tasks. The cap is 0.9 - 0.1 lambda
where none is named, and 0.9 in AM-SGD.
"""
BETAS = """
AM-AdamW per tensor, lambda 0.1, at its best learning rate without warm-up, seed 0; and the beta1
of the AdamW that did best on the task.
"""
COST = """
CPU time of optimizer.step() in microseconds, the median of a run and then of all runs of the
contestant; and its share of a whole step. Taken while other processes ran, on models so small that
it is calls more than arithmetic; `python -m bench kernels` measures the kernels.
"""
TASKS = """
Loss at the best learning rate: mean, and standard deviation over the seeds. An asterisk: that
learning rate is at an edge of the grid. Diverged: runs whose loss was not finite, of all learning
rates. Beta: mean over steps and tensors at the best learning rate, without warm-up.
"""
AT_CAP = """
At cap: the share of the parameters whose beta was at its cap, mean over those steps.
"""


def write_report(results: Results) -> None:
    """Writes report.md and its pictures into the results' folder."""
    table = Table(results, json.loads(results.settings.read_text()))
    if table.tasks:
        pictures = write_pictures(table, results.folder)
        (results.folder / REPORT).write_text(report(table, pictures))


def report(table: Table, pictures: dict[str, str]) -> str:
    with_at_cap = any(run.at_cap is not None for run in table.runs.values())
    sections = [
        "# Training experiments",
        "Made by `python -m bench.experiments report` from runs.jsonl and settings.json in this "
        "folder; nothing in it is written by hand.",
        _what_was_run(table),
        "## Verdicts",
        _verdict_section(verdicts(table)),
        "## All contestants",
        _ranking(table),
        *(f"![{title}]({name})" for name, title in pictures.items() if name.startswith("ratios")),
        "## Options of Adaptive Memory",
        _options(table),
        "## Beta over training and across tensors",
        _beta_table(table),
        *(f"![{title}]({name})" for name, title in pictures.items() if name.startswith("beta")),
        "## Cost",
        _cost(table),
        "## By learning rate",
        *(f"![{title}]({name})" for name, title in pictures.items() if name.startswith("loss")),
        "## Every task",
        TASKS.strip() + (" " + AT_CAP.strip() if with_at_cap else ""),
        *(_task_table(table, task, with_at_cap) for task in table.tasks),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _decades(value: Interval) -> str:
    if not np.isfinite([value.low, value.high]).all():
        return f"{value.mean:+.2f}"
    return f"{value.mean:+.2f} ({value.low:+.2f} to {value.high:+.2f})"


# ---- what was run ---------------------------------------------------------------------


def _what_was_run(table: Table) -> str:
    settings = table.settings
    used = sum(
        2 * len(table.seeds[task]) * len(table.lrs(task, name))
        for task in table.tasks
        for name in table.families
    )
    counts = {len(seeds) for seeds in table.seeds.values()}
    unfinished = [task for task in settings["tasks"] if task not in table.seeds]
    rows = [
        [
            task,
            settings["tasks"][task]["measured"],
            str(settings["tasks"][task]["steps"]),
            str(len(table.seeds[task])),
            *(_span(settings["tasks"][task]["lrs"].get(family)) for family in BASELINES),
        ]
        for task in table.tasks
    ]
    lines = [
        f"{used} runs: {len(table.tasks)} tasks, {len(table.families)} contestants, every learning "
        f"rate of a task's grid for each of them, without and with warm-up (linear, over "
        f"{WARMUP_SHARE:.0%} of the steps), {' or '.join(map(str, sorted(counts)))} "
        f"seed{'s' if max(counts) > 1 else ''} a task as the table says. "
        f"{len(table.runs) - used} runs of blocks (a task at a seed) that are not finished are not "
        "used.",
        f"Not finished at any seed: {', '.join(unfinished)}." if unfinished else "",
        RUNS.strip(),
        "Environment: " + ", ".join(f"{k} {v}" for k, v in settings["environment"].items()) + ".",
        markdown(
            rows,
            ["task", "measured", "steps", "seeds", "learning rates, Adam family", "SGD family"],
        ),
    ]
    return "\n\n".join(line for line in lines if line)


def _span(lrs: Sequence[float] | None) -> str:
    if lrs is None:
        return "-"
    return f"{len(lrs)} from {lrs[0]:g} to {lrs[-1]:g}"


# ---- verdicts -------------------------------------------------------------------------


def _verdict_section(found: Iterable[Verdict]) -> str:
    by_claim: dict[str, list[Verdict]] = {claim: [] for claim in RULES}
    for verdict in found:
        by_claim[verdict.claim].append(verdict)
    sections = []
    for claim, of_claim in by_claim.items():
        decades = claim.startswith("d")
        headers = ["contestant", "against", "tasks", "warm-up", "better on", "sign test"]
        headers += ["decades more" if decades else "ratio of losses", "verdict"]
        rows = [_verdict_row(verdict, decades) for verdict in of_claim]
        sections += [f"**({claim})** {RULES[claim]}", markdown(rows, headers)]
    return "\n\n".join(sections)


def _verdict_row(verdict: Verdict, decades: bool) -> list[str]:
    values = list(verdict.per_task.values())
    better = sum(value > 0 if decades else value < 0 for value in values)
    mean = verdict.interval
    number = _decades(mean) if decades else ratio(mean)
    warmup = {True: "with", False: "without", None: "both"}[verdict.warmup]
    return [
        verdict.contestant,
        verdict.against,
        verdict.tasks,
        warmup,
        f"{better} of {len(values)}",
        f"{sign_test(values):.2g}",
        number,
        f"**{verdict.outcome}**",
    ]


def _of_table(table: Table, by_family: dict[str, str]) -> dict[str, str]:
    """Of a contestant for each family, those that were run."""
    return {family: name for family, name in by_family.items() if name in table.families}


# ---- tables ---------------------------------------------------------------------------


def _ranking(table: Table) -> str:
    """Every contestant against its family's baseline, on learning tasks, best first."""
    learning, convex = (tasks_of_kind(table, kind) for kind in ("learning", "convex"))
    if not learning:
        return ""
    sections = []
    for family, baseline in _of_table(table, BASELINES).items():
        rows = []
        for name in (n for n in table.families if table.families[n] == family):
            ratios = [
                interval([log_ratio(table, task, name, baseline, warmup) for task in tasks])
                for tasks in (learning, convex)
                if tasks
                for warmup in (False, True)
            ]
            widths = [width(table, task, name, literal=False) for task in learning]
            edges = sum(table.at_edge(task, name, False) for task in table.tasks)
            rows.append(
                (ratios[0].mean, [name, *map(ratio, ratios), f"{np.mean(widths):.2f}", edges])
            )
        headers = ["", "learning, no warm-up", "learning, warm-up"]
        headers += ["convex, no warm-up", "convex, warm-up"] if convex else []
        sections += [
            RANKING.strip().format(baseline=baseline),
            markdown(
                [row for _, row in sorted(rows, key=lambda r: r[0])], [*headers, "width", "edge"]
            ),
        ]
    return "\n\n".join(sections)


def _options(table: Table) -> str:
    """Every variant of AM-AdamW and AM-SGD against the package's default."""
    learning = tasks_of_kind(table, "learning")
    if not learning:
        return ""
    rows = []
    for family, default in _of_table(table, DEFAULTS).items():
        for name in table.families:
            if table.families[name] == family and name.startswith("AM-") and name != default:
                values = {
                    warmup: [log_ratio(table, task, name, default, warmup) for task in learning]
                    for warmup in (False, True)
                }
                better = sum(value < 0 for value in values[False])
                rows.append(
                    [
                        name,
                        default,
                        f"{better} of {len(learning)}",
                        *(ratio(interval(values[warmup])) for warmup in (False, True)),
                    ]
                )
    headers = ["variant", "against", "better on", "without warm-up", "with warm-up"]
    return OPTIONS.strip() + "\n\n" + markdown(rows, headers)


def _beta_table(table: Table) -> str:
    rows = []
    for task in table.tasks:
        for name in TRACKED:
            run = table.best_runs(task, name, False)[0]
            if run.betas and not any(value is None for row in run.betas for value in row):
                betas = np.array(run.betas)
                over_time, by_tensor = betas.mean(1), betas.mean(0)
                rows.append(
                    [
                        task,
                        name.split()[1],
                        f"{betas.mean():.2f}",
                        *(f"{over_time[i]:.2f}" for i in (0, len(over_time) // 2, -1)),
                        f"{by_tensor.min():.2f} ({run.tensors[by_tensor.argmin()]})",
                        f"{by_tensor.max():.2f} ({run.tensors[by_tensor.argmax()]})",
                        _best_fixed_beta(table, task),
                    ]
                )
    if not rows:
        return ""
    headers = ["task", "plane", "mean", "first tenth", "sixth tenth", "last tenth"]
    headers += ["lowest tensor", "highest tensor", "best fixed"]
    return BETAS.strip() + "\n\n" + markdown(rows, headers)


def _best_fixed_beta(table: Table, task: str) -> str:
    return best_fixed(table, task, "adam", False).split()[-1]


def _cost(table: Table) -> str:
    names = [*DEFAULTS.values(), "AM-AdamW anchored tensor lambda 0.1", *BASELINES.values()]
    names = [n for n in (*names, "schedule-free AdamW", "Lion") if n in table.families]
    rows = []
    for task in table.tasks:
        of_task = {name: _costs(table, task, name) for name in names}
        shares = [of_task[name] for name in (BASELINES["adam"], DEFAULTS["adam"])]
        rows.append(
            [task]
            + [f"{of_task[name][0]:.0f}" for name in names]
            + [f"{micros / step:.0%}" for micros, step in shares]
        )
    headers = ["task", *names, "share, AdamW", "share, AM-AdamW"]
    return COST.strip() + "\n\n" + markdown(rows, headers)


def _costs(table: Table, task: str, name: str) -> tuple[float, float]:
    """Median microseconds of optimizer.step(), and of a whole step."""
    runs = _all_runs(table, task, name)
    return (
        statistics.median(run.optimizer_us for run in runs),
        statistics.median(run.step_us for run in runs),
    )


def _all_runs(table: Table, task: str, name: str) -> list[Run]:
    return [
        run for warmup in (False, True) for row in table.cells(task, name, warmup) for run in row
    ]


def _task_table(table: Table, task: str, with_at_cap: bool) -> str:
    rows = []
    for name in table.families:
        cells = [_loss_cell(table, task, name, warmup) for warmup in (False, True)]
        diverged = sum(run.diverged_at is not None for run in _all_runs(table, task, name))
        best = table.best_runs(task, name, False)
        betas = [_mean([run.beta for run in best])]
        betas += [_mean([run.at_cap for run in best])] if with_at_cap else []
        order = float(table.best_log_loss(task, name, False).mean())
        rows.append((order, [name, *cells[0], *cells[1], diverged, *betas]))
    headers = ["", "no warm-up", "lr", "warm-up", "lr", "diverged", "beta"]
    headers += ["at cap"] if with_at_cap else []
    ordered = [row for _, row in sorted(rows, key=lambda r: r[0])]
    return f"### {task}\n\n" + markdown(ordered, headers)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{statistics.fmean(known):.2f}" if known else "-"


def _loss_cell(table: Table, task: str, name: str, warmup: bool) -> list[str]:
    """Loss with its spread, and the learning rate."""
    losses = [run.loss for run in table.best_runs(task, name, warmup)]
    spread = f" ± {statistics.stdev(losses):.2g}" if len(losses) > 1 else ""
    edge = "*" if table.at_edge(task, name, warmup) else ""
    lr = table.lrs(task, name)[table.best(task, name, warmup)]
    return [f"{statistics.fmean(losses):.4g}{spread}", f"{lr:g}{edge}"]
