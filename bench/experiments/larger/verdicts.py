"""The questions, the rule of their verdicts, and what the runs say by it.

The rule was written before the runs. Convex tasks were set apart, and contestants added, as results
came in; the history of this file has when.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from bench.experiments.larger.contestants import FIXED, TUNED
from bench.experiments.larger.contestants import GATED as GATED_ROWS
from bench.experiments.larger.contestants import GATED_BY_TENSOR as ROWS_GATED_BY_TENSOR
from bench.experiments.larger.contestants import LAYERS as ROWS_IN_LAYERS
from bench.experiments.larger.table import Table
from bench.experiments.larger.tasks import TASKS
from bench.experiments.verdicts import Interval, interval

RULE = """\
Each contestant's learning rate is searched on seed 0, a factor of 2 at a time, until the best has
been tried on both sides; what is best, the held-out part for choosing says. All seeds are then
compared at that learning rate on the other held-out part. The difference of log losses of two
contestants on a task at a seed, with the same initial weights and the same batches, is one number;
a question's numbers are those of all tasks and seeds at which both have been run, networks and
convex tasks apart. The first is
**better** where the 95% t interval of their mean lies below 0 and the mean of every task does,
**worse** where interval and tasks lie above, **equal** where the interval lies within 1% on either
side, and otherwise it is **not decided**. A run that diverged counts as guessing: as a loss of the
log of as many bytes, tokens or classes as there are. The interval is of these tasks' seeds, taken
together; it is not one of other tasks, of which there are few and which share their text, and some
of them their model. Seed 0 is one of those compared, and intervals are not corrected for their
number. Best AdamW is the one with the lowest loss on the part for choosing, of those that were run
on the task: at least two, and how many, its table below has."""

# Questions, and for each the pairs (contestant, against) that answer it. "best AdamW" is the one
# with the lowest loss on the part for choosing, picked for each task and warm-up.
BEST_ADAMW = "best AdamW"
TENSOR, ROW = "AM-AdamW level tensor", "AM-AdamW level row"
LAYERS, GATED = ROWS_IN_LAYERS.name, GATED_ROWS.name
GATED_BY_TENSOR = ROWS_GATED_BY_TENSOR.name
TUNED_BETA2, _, TUNED_BOTH = (contestant.name for contestant in TUNED)
QUESTIONS = {
    "Is it the adaptation?": [
        (TENSOR, "beta at the cap"),
        (TENSOR, "beta drawn, tensor"),
        (TENSOR, "beta of the last step, tensor"),
        (ROW, "beta at the cap"),
        (ROW, "beta drawn, row"),
        (ROW, "beta of the last step, row"),
        (LAYERS, "beta at the cap of 0.95"),
        (LAYERS, "beta drawn, layers only"),
        (LAYERS, "beta of the last step, layers only"),
    ],
    "How much over AdamW?": [
        (ours, against)
        for ours in (
            TENSOR,
            ROW,
            LAYERS,
            TUNED_BETA2,
            TUNED_BOTH,
            GATED,
            "AM-AdamW anchored tensor",
            "AM-AdamW anchored row",
        )
        for against in ("AdamW 0.9", "AdamW 0.9, 0.95", BEST_ADAMW)
    ],
    "One beta a tensor, a row, or one for the model?": [
        (ROW, TENSOR),
        (LAYERS, TENSOR),
        ("AM-AdamW anchored row", "AM-AdamW anchored tensor"),
        ("AM-AdamW level global", TENSOR),
        ("AM-AdamW anchored global", "AM-AdamW anchored tensor"),
    ],
    "Level or anchored?": [
        ("AM-AdamW anchored tensor", TENSOR),
        ("AM-AdamW anchored row", ROW),
        ("AM-AdamW anchored row, layers only, cap 0.95", LAYERS),
    ],
    "Which cap?": [
        ("AM-AdamW level tensor, cap 0.95", TENSOR),
        ("AM-AdamW level row, cap 0.95", ROW),
        (LAYERS, "AM-AdamW level row, layers only"),
        ("AM-AdamW level row, layers only, cap 0.98", LAYERS),
        ("AM-AdamW anchored row, cap 0.95", "AM-AdamW anchored row"),
    ],
    "Which lambda and beta2?": [
        (f"{LAYERS}, lambda 0", LAYERS),
        (f"{LAYERS}, lambda 1", LAYERS),
        (TUNED_BETA2, LAYERS),
        (TUNED_BOTH, LAYERS),
        (TUNED_BOTH, TUNED_BETA2),
        (f"{GATED}, beta2 0.95", GATED),
        ("AM-AdamW level tensor, beta2 0.95", TENSOR),
    ],
    "Rows, or other parts of a tensor?": [
        ("AM-AdamW level columns, layers only, cap 0.95", LAYERS),
        ("AM-AdamW level blocks of 32, layers only, cap 0.95", LAYERS),
        ("AM-AdamW level blocks of 128, layers only, cap 0.95", LAYERS),
    ],
    "And rows that rarely have a gradient?": [
        ("AM-AdamW level row, embeddings tensor", TENSOR),
        ("AM-AdamW level row, layers only", TENSOR),
        ("AM-AdamW level row, layers only", ROW),
        ("AM-AdamW level row, embeddings tensor", ROW),
        ("AM-AdamW level row, cap without gradient", ROW),
        ("AM-AdamW level row, cap without gradient", "AM-AdamW level row, embeddings tensor"),
        (f"{LAYERS}, rest at the cap", LAYERS),
        (GATED, TENSOR),
        (GATED, "AM-AdamW level row, cap 0.95"),
        (GATED, LAYERS),
        (GATED_BY_TENSOR, LAYERS),
        (GATED_BY_TENSOR, GATED),
    ],
    "And Muon?": [
        ("Muon + AdamW 0.9", ROW),
        ("Muon + AdamW 0.9", LAYERS),
        ("Muon + AM-AdamW level row", "Muon + AdamW 0.9"),
        ("AM-Muon row + AM-AdamW level row", "Muon + AM-AdamW level row"),
    ],
}

MARGIN = 0.01
BETTER, WORSE, EQUAL, OPEN = "better", "worse", "equal", "not decided"


@dataclass(frozen=True)
class Verdict:
    """What the runs say of two contestants.

    Attributes:
        question: a key of QUESTIONS.
        contestant, against: who is compared with whom.
        convex: whether of convex tasks, or of networks.
        warmup: of the runs compared.
        per_task: the mean log ratio of losses on each task.
        numbers: how many tasks and seeds it was taken over.
        interval: of the mean over all of them.
        outcome: BETTER, WORSE, EQUAL or OPEN.
    """

    question: str
    contestant: str
    against: str
    convex: bool
    warmup: bool
    per_task: dict[str, float]
    numbers: int
    interval: Interval
    outcome: str


def outcome(found: Interval, means: list[float]) -> str:
    """By the rule, of an interval and of the tasks' means."""
    if found.high < 0 and all(mean < 0 for mean in means):
        return BETTER
    if found.low > 0 and all(mean > 0 for mean in means):
        return WORSE
    margin = math.log1p(MARGIN)
    return EQUAL if -margin < found.low and found.high < margin else OPEN


def log_ratios(
    table: Table, task: str, warmup: bool, contestant: str, against: str
) -> dict[int, float]:
    """Of the losses, by seed, of the seeds that both have."""
    if against == BEST_ADAMW:
        best = best_adamw(table, task, warmup)
        if best is None:
            return {}
        against = best
    ours, theirs = (table.log_losses(task, warmup, name) for name in (contestant, against))
    return {seed: ours[seed] - theirs[seed] for seed in ours if seed in theirs}


def best_adamw(table: Table, task: str, warmup: bool) -> str | None:
    """The fixed betas with the lowest loss on the part for choosing, on the searched seed.

    Of those that have been run on the task; None where that is one, or none.
    """
    runs = [table.searched(task, warmup, contestant.name) for contestant in FIXED]
    there = [run for run in runs if run is not None]
    return min(there, key=lambda run: run.choosing).cell.contestant if len(there) > 1 else None


def verdicts(table: Table) -> list[Verdict]:
    """A verdict for each pair of contestants that have been run, by kind of task and warm-up."""
    pairs = [(question, *pair) for question, pairs in QUESTIONS.items() for pair in pairs]
    found = [
        _verdict(table, *pair, convex, warmup)
        for pair in pairs
        for convex, warmup in product((False, True), (True, False))
    ]
    return [verdict for verdict in found if verdict is not None]


def _verdict(
    table: Table, question: str, contestant: str, against: str, convex: bool, warmup: bool
) -> Verdict | None:
    by_task = {
        task: list(log_ratios(table, task, warmup, contestant, against).values())
        for task in table.tasks
        if TASKS[task].convex == convex
    }
    means = {task: fmean(values) for task, values in by_task.items() if values}
    if not means:
        return None
    values = [value for values in by_task.values() for value in values]
    mean = interval(values)
    decided = outcome(mean, list(means.values()))
    pair = question, contestant, against
    return Verdict(*pair, convex, warmup, means, len(values), mean, decided)
