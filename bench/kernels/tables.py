"""The terminal's tables of a report."""

from __future__ import annotations

from itertools import groupby

from tabulate import tabulate

from bench.kernels.contestants import ADAMW_BASELINE, SGD_BASELINE, VARIANTS
from bench.kernels.results import TARGETS, Report, Row, Spread, baseline

MB = 1e6
TARGET_HEADERS = ["parameters", "dtype", "time of / time of"]


def format_report(report: Report) -> str:
    """A table for each parameter list, dtype and cache mode; the targets; what is missing."""
    measured = [row for row in report.rows if row.seconds is not None]
    blocks = [""]
    for _, group in groupby(measured, key=lambda row: row.key[:3]):
        blocks += [_format_block(report, list(group)), ""]
    targets = format_targets(report)
    if targets:
        blocks += [targets, ""]
    blocks += format_reasons(report)
    if not measured:
        blocks.append("Interrupted before anything was measured.")
    else:
        blocks += [
            "",
            "ms: median (quartiles). Ratios: medians over rounds in which both took turns; '~': "
            "noisy, another run",
            "may differ by 10%. Floor: the algorithm's bytes at the bandwidth of a copy of as "
            "many (or a change in place,",
            "where that is faster), over the time taken.",
            "missed: of the elements, those whose beta was kept below its cap, so that AMAdamW had "
            "guessed it wrong;",
            "20%: tensors of about that share, or each in fifths where none have it. Of 16-bit "
            "ones nothing is guessed,",
            "nor with a beta a row, which stays in cache until its beta is known.",
            "launches: kernels, on the CPU operators that call no other. peak: parameters, "
            "gradients, state, temporaries.",
        ]
    return "\n".join(blocks)


def format_reasons(report: Report) -> list[str]:
    """A line for each contestant and reason not to have measured it."""
    places: dict[tuple[str, str], dict[str, None]] = {}
    for row in report.rows:
        if row.reason is not None:
            place = places.setdefault((row.contestant, row.reason), {})
            place[f"{row.parameters} ({row.dtype})"] = None
    return [
        f"{contestant}: {reason}. On {', '.join(place)}"
        for (contestant, reason), place in places.items()
    ]


def _format_block(report: Report, rows: list[Row]) -> str:
    first = rows[0]
    on_gpu = any(row.kernel and any(row.kernel) for row in rows)
    copy = f"{first.copy_bandwidth / 1e9:.1f} GB/s" if first.copy_bandwidth else "-"
    title = (
        f"{first.parameters}: {first.numel:,} parameters in {first.tensors:,} tensors, "
        f"{first.dtype}, cache {first.cache}; a copy: {copy}"
    )
    headers = ["", "ms a step", f"/ {ADAMW_BASELINE}", f"/ {SGD_BASELINE}"]
    headers += ["host ms", "kernel ms", "kernel ratio"] if on_gpu else []
    headers += ["missed", "GB/s", "of floor", "launches", "peak MB", "state B/param"]
    return f"{title}\n" + tabulate(
        [_cells(report, row, on_gpu) for row in rows],
        headers=headers,
        colalign=["left"] + ["right"] * (len(headers) - 1),
        disable_numparse=True,
    )


def _cells(report: Report, row: Row, on_gpu: bool) -> list[str]:
    seconds = row.seconds
    assert seconds is not None
    to_sgd = report.ratio(row, SGD_BASELINE) if row.optimizer == "sgd" else None
    cells = [
        row.contestant,
        f"{1e3 * seconds.median:.3f} ({1e3 * seconds.low:.3f} to {1e3 * seconds.high:.3f})",
        format_ratio(report.ratio(row, ADAMW_BASELINE)),
        format_ratio(to_sgd),
    ]
    if on_gpu:
        host, kernel = Spread.of(row.host), Spread.of(row.kernel)
        cells += [
            f"{1e3 * host.median:.3f}" if host else "-",
            f"{1e3 * kernel.median:.3f}" if kernel else "-",
            format_ratio(report.ratio(row, baseline(row), "kernel")),
        ]
    return [
        *cells,
        f"{row.missed:.0%}" if row.missed is not None else "-",
        f"{row.bandwidth / 1e9:.1f}" if row.bandwidth else "-",
        f"{row.of_floor:.0%}" if row.of_floor else "-",
        f"{row.launches:,}" if row.launches is not None else "-",
        f"{row.peak_bytes / MB:.0f}" if row.peak_bytes is not None else "-",
        f"{row.state_bytes / row.numel:.2f}" if row.state_bytes is not None else "-",
    ]


def format_ratio(ratio: Spread | None) -> str:
    """A ratio, with a tilde where it is noisy."""
    if ratio is None:
        return "-"
    return f"{ratio.median:.2f}{'~' if ratio.noisy else ''}"


def format_targets(report: Report) -> str:
    """The targets that were measured, each beside its figure; empty where none was."""
    headers, cells = target_cells(report)
    return tabulate(cells, headers=headers, disable_numparse=True) if cells else ""


def target_cells(report: Report) -> tuple[list[str], list[list[str]]]:
    """The headers; and a row for a list, a dtype and two contestants.

    It has a column for each variant of the first contestant that was measured.
    """
    rows: dict[tuple[str, ...], dict[str, str]] = {}
    for target in TARGETS:
        row = report.row(target.name, target.dtype, "warm", target.contestant)
        ratio = report.ratio(row, target.against) if row else None
        if ratio is not None:
            ours, comma, variant = target.contestant.partition(",")
            key = (target.name, target.dtype, f"{ours} / {target.against}")
            met = "" if ratio.median <= target.at_most else ", not met"
            cell = f"{format_ratio(ratio)} of {target.at_most:.2f}{met}"
            rows.setdefault(key, {})[comma + variant] = cell
    there = [variant for variant in VARIANTS if any(variant in cells for cells in rows.values())]
    headers = [variant.removeprefix(", ") or "nothing missed" for variant in there]
    return [*TARGET_HEADERS, *headers], [
        [*key, *(cells.get(variant, "-") for variant in there)] for key, cells in rows.items()
    ]
