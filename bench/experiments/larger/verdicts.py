"""The questions, the rule of their verdicts, and what the runs say by it.

Written before the runs that they are about.
"""

from __future__ import annotations

RULE = """\
Each contestant's learning rate is searched on seed 0, a factor of 2 at a time, until the best has
been tried on both sides; what is best, the held-out part for choosing says. All seeds are then
compared at that learning rate on the other held-out part. The difference of log losses of two
contestants on a task at a seed, with the same initial weights and the same batches, is one number;
a question's numbers are those of all tasks and seeds at which both have been run. The first is
**better** where the 95% t interval of their mean lies below 0 and the mean of every task does,
**worse** where interval and tasks lie above, **level** where the interval lies within 1% on either
side, and otherwise it is **not decided**. A run that diverged counts as a loss of log 256 for text
and of log 10 for images, which is guessing. The interval speaks of other seeds of these tasks; it
is not one of other tasks, of which there are few."""

# Questions, and for each the pairs (contestant, against) that answer it. "best AdamW" is the one
# with the lowest mean loss on the part for choosing, picked for each task and warm-up.
BEST_ADAMW = "best AdamW"
TENSOR, ROW = "AM-AdamW level tensor", "AM-AdamW level row"
QUESTIONS = {
    "Is it the adaptation?": [
        (TENSOR, "beta at the cap"),
        (TENSOR, "beta drawn, tensor"),
        (TENSOR, "beta of the last step, tensor"),
        (ROW, "beta at the cap"),
        (ROW, "beta drawn, row"),
        (ROW, "beta of the last step, row"),
    ],
    "How much over AdamW?": [
        (ours, against)
        for ours in (TENSOR, ROW, "AM-AdamW anchored tensor", "AM-AdamW anchored row")
        for against in ("AdamW 0.9", "AdamW 0.9, 0.95", BEST_ADAMW)
    ],
    "One beta a tensor, a row, or one for the model?": [
        (ROW, TENSOR),
        ("AM-AdamW anchored row", "AM-AdamW anchored tensor"),
        ("AM-AdamW level global", TENSOR),
        ("AM-AdamW anchored global", "AM-AdamW anchored tensor"),
    ],
    "Level or anchored?": [
        ("AM-AdamW anchored tensor", TENSOR),
        ("AM-AdamW anchored row", ROW),
    ],
    "Which cap?": [
        ("AM-AdamW level tensor, cap 0.95", TENSOR),
        ("AM-AdamW level row, cap 0.95", ROW),
        ("AM-AdamW anchored row, cap 0.95", "AM-AdamW anchored row"),
    ],
    "Which lambda and beta2?": [
        ("AM-AdamW level row, lambda 0", ROW),
        ("AM-AdamW level row, lambda 1", ROW),
        ("AM-AdamW level row, beta2 0.95", ROW),
        ("AM-AdamW level tensor, beta2 0.95", TENSOR),
    ],
    "Rows, or other parts of a tensor?": [
        ("AM-AdamW level columns", ROW),
        ("AM-AdamW level blocks of 32", ROW),
        ("AM-AdamW level blocks of 128", ROW),
        ("AM-AdamW level row, embeddings tensor", ROW),
    ],
    "And Muon?": [
        ("Muon + AdamW 0.9", ROW),
        ("Muon + AM-AdamW level row", "Muon + AdamW 0.9"),
        ("AM-Muon row + AM-AdamW level row", "Muon + AM-AdamW level row"),
    ],
}
