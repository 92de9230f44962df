"""The claims, the rule of each, and what the table says by that rule.

Everything here is computed from a `Table` and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from bench.experiments.table import Array, Table
from bench.experiments.tasks import CONVEX_GROUPS

CONFIDENCE = 0.95
MARGIN = 0.01  # "at least as good as" allows a loss higher by this share
TOLERANCE = 0.02  # "within 2% of the best"
DECADES_PER_LR = 0.5  # the grid's learning rates are half a decade apart

# What Adaptive Memory would replace, by family, and the contestants that claims are made of.
BASELINES = {"adam": "AdamW 0.9", "sgd": "SGD 0.9"}
ADAPTIVE = (
    "AM-AdamW level tensor lambda 0.1",
    "AM-AdamW anchored tensor lambda 0.1",
    "AM-SGD level global",
    "AM-SGD anchored global",
)

HOLDS, FAILS, OPEN = "holds", "does not hold", "not decided"

RULES = {
    "a": "Better than beta 0.9, each at its best learning rate. The difference of log losses, "
    "averaged over a task's seeds, is one number a task; their mean over the tasks has a 95% t "
    f"interval. {HOLDS.capitalize()} where it lies below 0, {FAILS} where it lies above, "
    f"{OPEN} otherwise.",
    "b": "At least as good as the best fixed beta, which is picked for each task with hindsight. "
    "The same difference and interval, against the fixed beta with the lowest loss on that task. "
    f"{HOLDS.capitalize()} where the interval ends below log {1 + MARGIN:g}, a loss higher by "
    f"{MARGIN:.0%}; {FAILS} where it begins above that; {OPEN} otherwise.",
    "c": "Less need of warm-up. At the learning rate that is best with warm-up: log loss without "
    "warm-up minus log loss with it, and of that difference Adaptive Memory's minus that of beta "
    f"0.9. {HOLDS.capitalize()} where its interval lies below 0, {FAILS} where it lies above.",
    "d": "A wider range of learning rates. Without warm-up, the learning rates whose loss is "
    f"within {TOLERANCE:.0%} of the contestant's own best, where 100% is what training has "
    "gained there (untrained minus best loss): their number times half a decade, minus that of "
    f"beta 0.9. {HOLDS.capitalize()} where the interval lies above 0, {FAILS} where it lies below.",
    "d, literal": "The same with the loss itself as 100%.",
}


@dataclass(frozen=True)
class Interval:
    """A mean and its two-sided t interval; unbounded where there is a single value."""

    mean: float
    low: float
    high: float


def interval(values: Sequence[float] | Array) -> Interval:
    """Mean of independent values and its t interval at CONFIDENCE."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return Interval(mean, -np.inf, np.inf)
    if np.ptp(values) == 0:
        return Interval(mean, mean, mean)
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, mean, stats.sem(values))
    return Interval(mean, float(low), float(high))


def sign_test(values: Sequence[float]) -> float:
    """Two-sided p of as many values on one side of 0, were both sides as likely."""
    signs = [value < 0 for value in values if value != 0]
    return float(stats.binomtest(sum(signs), len(signs)).pvalue) if signs else 1.0


@dataclass(frozen=True)
class Verdict:
    """A claim about a contestant on a group of tasks.

    Attributes:
        claim: a key of RULES.
        contestant, against: who is compared with whom.
        tasks: "learning" or "convex".
        warmup: of the runs compared; None where the claim is about both.
        per_task: the number of each task.
        interval: of their mean. Log ratios of losses, or decades in claim d.
        outcome: HOLDS, FAILS or OPEN.
    """

    claim: str
    contestant: str
    against: str
    tasks: str
    warmup: bool | None
    per_task: dict[str, float]
    interval: Interval
    outcome: str


def below(value: Interval, bound: float) -> str:
    """Whether the mean is below a bound."""
    if value.high < bound:
        return HOLDS
    return FAILS if value.low > bound else OPEN


def above(value: Interval, bound: float) -> str:
    return below(Interval(-value.mean, -value.high, -value.low), -bound)


# ---- a task's number ------------------------------------------------------------------


def log_ratio(table: Table, task: str, contestant: str, against: str, warmup: bool) -> float:
    """Of the losses, each at its best learning rate: mean over the seeds."""
    ours = table.best_log_loss(task, contestant, warmup)
    theirs = table.best_log_loss(task, against, warmup)
    return float((ours - theirs).mean())


def fixed_betas(table: Table, family: str) -> list[str]:
    """The contestants of a family whose beta is fixed: "AdamW 0.9" and the like."""
    prefix = {"adam": "AdamW ", "sgd": "SGD "}[family]
    return [name for name in table.families if name.startswith(prefix)]


def best_fixed(table: Table, task: str, family: str, warmup: bool) -> str:
    """The fixed beta with the lowest loss at its best learning rate."""
    return min(
        fixed_betas(table, family),
        key=lambda name: float(table.best_log_loss(task, name, warmup).mean()),
    )


def need_of_warmup(table: Table, task: str, contestant: str) -> float:
    """Log loss without warm-up minus with it, at the learning rate that is best with it."""
    best = table.best(task, contestant, True)
    without, with_it = (table.log_losses(task, contestant, w)[best] for w in (False, True))
    return float((without - with_it).mean())


def width(table: Table, task: str, contestant: str, literal: bool) -> float:
    """Decades of learning rates within TOLERANCE of the best, without warm-up."""
    losses = np.exp(table.log_losses(task, contestant, False)).mean(1)
    untrained = np.mean([run.untrained_loss for run in table.best_runs(task, contestant, False)])
    best = losses.min()
    allowed = best + TOLERANCE * (best if literal else max(untrained - best, 0.0))
    return DECADES_PER_LR * int((losses <= allowed).sum())


# ---- verdicts -------------------------------------------------------------------------


def tasks_of_kind(table: Table, kind: str) -> list[str]:
    """The tasks that are "convex", or those that are not: "learning"."""
    convex = kind == "convex"
    return [task for task in table.tasks if (table.group(task) in CONVEX_GROUPS) == convex]


def verdicts(table: Table) -> list[Verdict]:
    """A verdict for each claim, contestant and kind of tasks; none for a kind without tasks."""
    found: list[Verdict] = []
    for contestant in (name for name in ADAPTIVE if name in table.families):
        baseline = BASELINES[table.families[contestant]]
        for kind in ("learning", "convex"):
            tasks = tasks_of_kind(table, kind)
            if tasks:
                found += _verdicts(table, contestant, baseline, kind, tasks)
    return sorted(found, key=lambda v: list(RULES).index(v.claim))


def _verdicts(
    table: Table, contestant: str, baseline: str, kind: str, tasks: list[str]
) -> list[Verdict]:
    def verdict(
        claim: str,
        against: str,
        warmup: bool | None,
        number: Callable[[str], float],
        outcome: Callable[[Interval], str],
    ) -> Verdict:
        per_task = {task: number(task) for task in tasks}
        found = interval(list(per_task.values()))
        return Verdict(claim, contestant, against, kind, warmup, per_task, found, outcome(found))

    family = table.families[contestant]
    found = []
    for warmup in (False, True):

        def against_baseline(task: str, warmup: bool = warmup) -> float:
            return log_ratio(table, task, contestant, baseline, warmup)

        def against_best(task: str, warmup: bool = warmup) -> float:
            best = best_fixed(table, task, family, warmup)
            return log_ratio(table, task, contestant, best, warmup)

        found += [
            verdict("a", baseline, warmup, against_baseline, lambda i: below(i, 0.0)),
            verdict(
                "b", "the best fixed", warmup, against_best, lambda i: below(i, np.log1p(MARGIN))
            ),
        ]

    def less_need(task: str) -> float:
        ours, theirs = (need_of_warmup(table, task, name) for name in (contestant, baseline))
        return ours - theirs

    found.append(verdict("c", baseline, None, less_need, lambda i: below(i, 0.0)))
    for claim, literal in (("d", False), ("d, literal", True)):

        def wider(task: str, literal: bool = literal) -> float:
            ours, theirs = (width(table, task, name, literal) for name in (contestant, baseline))
            return ours - theirs

        found.append(verdict(claim, baseline, False, wider, lambda i: above(i, 0.0)))
    return found
