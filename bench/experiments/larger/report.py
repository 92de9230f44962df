"""The report of the larger trainings: Markdown and pictures, from the results alone."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence

from bench.experiments.cell import WARMUP_SHARE
from bench.experiments.formatting import markdown, ratio
from bench.experiments.larger import reach
from bench.experiments.larger.plots import steps_needed, title, write_pictures
from bench.experiments.larger.results import Results
from bench.experiments.larger.table import Table
from bench.experiments.larger.training import MAX_NORM
from bench.experiments.larger.verdicts import QUESTIONS, RULE, Verdict, best_adamw, verdicts

REPORT = "report.md"
WHAT = f"""
Everybody trains with gradients clipped at a global norm of {MAX_NORM:g} and a learning rate that
falls to zero as a cosine, with warm-up over {WARMUP_SHARE:.0%} of the steps where it says so; from
the same initial weights, on the same batches. beta2 is 0.999 and AM-AdamW's cap 0.89 with lambda
0.1 where none is named; docs/options.md has what "level", "anchored", "tensor", "row" and "global"
are. "beta at the cap", "drawn" and "of the last step" are AM-AdamW's step
("level") with another beta: the cap at every step; one drawn anew for each segment and step, from
the distribution that AM-AdamW's own betas had in that tensor and fifth of the run (seed 0, the
learning rate found for it), of all its rows together where each has one, those of an embedding that
had no gradient included; and that of the step before. "Muon" takes the layers' matrices and what
is named behind it the rest, both at one learning rate; it is torch.optim.Muon's algorithm in
float32, with `adjust_lr_fn="match_rms_adamw"`. "AM-Muon row" has AM-SGD's momentum, one beta a row
with a cap of 0.95, in place of Muon's before the matrix is orthogonalised.

"Layers only" has one beta a row in the layers' matrices, and one a tensor in embeddings, positions
and head; "embeddings tensor" in the embeddings alone. "Cap without gradient" takes the cap for a
row at a step at which it has no gradient. "Gated" has one beta a row in every matrix, embeddings
and head too: cap - (cap - beta) min(1, s), where beta is adaptive memory's and s the mean over the
row of the squares of the gradient as AdamW scales it, g / (sqrt(v) + eps), v bias-corrected.
"Layers only" was added when the first runs of gpt-bpe showed "row" to be far behind there, and not
before; "gated" when it had been measured how much of a gradient arrives (below), and after trials
on gpt-bpe, gpt-400k and logistic-fashion at seed 0. "Gated by the tensor" has s over its mean over
the tensor's rows in the place of s; it was added when "gated" had fallen behind without warm-up.
A beta2 of 0.95 and a cap of 0.98 with rows in the layers were run on other tasks than gpt-400k, and
both together, when each had done better there.

A row is one of at least 16 elements; where rows are shorter, as in LoRA's second matrices, the
tensor has one beta, without a gate. "Rest at the cap" has no adaptation outside of the layers.
Rounding differs between machines, and training amplifies it: two runs ("layers only, cap 0.95" at
its learning rate, seed 0) were made on two of them, and their losses differed by 0.7 % (gpt-400k)
and 0.15 % (gpt-bpe). The later ones are kept.

CPU time is the model's, the median of all runs of the task, and the optimizer's, the median of the
contestant's. It was taken beside other processes; `python -m bench kernels` measures optimizers.
"""
TASK = """
Held-out loss at the end (the part for comparing; mean over the seeds, and standard deviation), the
learning rate that was found, the share of the steps after which the loss was as low as that of
AdamW 0.9 at the end, and of the elements that have a beta the share at the cap. Steps are read off
the curves in the pictures, which are of fewer held-out examples than the loss.
"""
SEARCHES = """
Every run of a search: the loss on the part for choosing at the end, by learning rate; seed 0. (The
picture of losses by learning rate has the other part.)
"""


def write_report(results: Results) -> None:
    """Writes report.md and its pictures into the results' folder, if there is something to say."""
    table = Table(results, json.loads(results.settings.read_text()))
    if table.conditions():
        pictures = write_pictures(table, results.folder)
        arrived = reach.section(reach.read(results.folder), results.folder)
        (results.folder / REPORT).write_text(report(table, pictures, arrived))


def report(table: Table, pictures: dict[str, str], arrived: Sequence[str] = ()) -> str:
    """The report. arrived: its section of how much of a gradient arrives, if there is one."""
    sections = [
        "# Larger trainings",
        "Made by `python -m bench.experiments report --larger` from runs.jsonl and settings.json "
        "in this folder; nothing in it is written by hand.",
        _what_was_run(table),
        "## The rule of verdicts",
        RULE,
        "## Verdicts",
        *_verdict_sections(verdicts(table)),
        "## Pictures",
        *(f"![{what}]({name})" for name, what in pictures.items()),
        *arrived,
        "## Every task",
        TASK.strip(),
        *(_task_section(table, *condition) for condition in table.conditions()),
        "## Every search",
        SEARCHES.strip(),
        *(_search_section(table, *condition) for condition in table.conditions()),
    ]
    return "\n\n".join(sections) + "\n"


def _what_was_run(table: Table) -> str:
    rows = [
        [task, table.settings["tasks"][task]["about"], *_counts(table, task)]
        for task in table.tasks
    ]
    headers = ["task", "what it is", "steps", "weight decay", "runs", "seeds"]
    environments = [
        "- " + ", ".join(f"{k} {v}" for k, v in environment.items())
        for environment in table.settings["environments"]
    ]
    return "\n\n".join(
        [
            f"{len(table.runs)} runs.",
            WHAT.strip(),
            markdown(rows, headers),
            "Made with:",
            "\n".join(environments),
        ]
    )


def _counts(table: Table, task: str) -> list[str]:
    settings = table.settings["tasks"][task]
    cells = [cell for cell in table.runs if cell.task == task]
    seeds = 1 + max(cell.seed for cell in cells)
    return [str(settings["steps"]), f"{settings['weight_decay']:g}", str(len(cells)), str(seeds)]


def _verdict_sections(found: Sequence[Verdict]) -> list[str]:
    sections = []
    for question in QUESTIONS:
        of_question = [verdict for verdict in found if verdict.question == question]
        if of_question:
            rows = [
                [
                    verdict.contestant,
                    verdict.against,
                    "convex" if verdict.convex else "networks",
                    "with" if verdict.warmup else "without",
                    str(verdict.numbers),
                    ratio(verdict.interval),
                    ", ".join(f"{task} {math.exp(v):.3f}" for task, v in verdict.per_task.items()),
                    f"**{verdict.outcome}**",
                ]
                for verdict in of_question
            ]
            headers = [
                "",
                "against",
                "tasks",
                "warm-up",
                "runs",
                "ratio of losses",
                "each",
                "verdict",
            ]
            sections += [f"### {question}", markdown(rows, headers)]
    return sections


def _task_section(table: Table, task: str, warmup: bool) -> str:
    names = table.finished(task, warmup)
    best = best_adamw(table, task, warmup)
    rows = []
    for name in names:
        runs = list(table.found(task, warmup, name).values())
        losses = [table.loss(run) for run in runs]
        spread = f" ± {statistics.stdev(losses):.2g}" if len(losses) > 1 else ""
        share = steps_needed(table, (task, warmup), name)
        mean = statistics.fmean(losses)
        row = [
            f"{name} (best AdamW)" if name == best else name,
            f"{mean:.4f}{spread}",
            str(len(runs)),
            f"{runs[0].cell.lr:g}",
            "-" if share is None else f"{share:.0%}",
            _mean([value for run in runs for value in run.at_cap]),
        ]
        rows.append((mean, row))
    headers = ["", "loss", "seeds", "lr", "steps", "at cap"]
    ordered = [row for _, row in sorted(rows, key=lambda item: item[0])]
    return f"### {title((task, warmup))}\n\n" + markdown(ordered, headers)


def _mean(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.0%}" if values else "-"


def _search_section(table: Table, task: str, warmup: bool) -> str:
    by_name = {name: table.search_runs(task, warmup, name) for name in table.names(task, warmup)}
    lrs = sorted({run.cell.lr for runs in by_name.values() for run in runs})
    rows = []
    for name, runs in by_name.items():
        losses = {run.cell.lr: run.choosing for run in runs}
        rows.append([name, *(f"{losses[lr]:.4f}" if lr in losses else "" for lr in lrs)])
    headers = ["", *(f"{lr:g}" for lr in lrs)]
    return f"### {title((task, warmup))}\n\n" + markdown(rows, headers)
