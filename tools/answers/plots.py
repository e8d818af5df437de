"""Two pictures of a run: accuracy against latency, and recall against the age of the evidence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tools.answers.job import Outcome
from tools.answers.score import AGES_S, by_age, lines

log = logging.getLogger(__name__)

AGED = ("kv", "both", "captions", "uniform", "random", "last4")


def plots(out: Path, outcomes: Sequence[Outcome], codec: str) -> list[Path]:
    """Written as PNG; none, with a word about it, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        log.warning("no plots without matplotlib: pip install 'memdb-video[dev]'")
        return []
    matplotlib.use("Agg")
    mine = [found for found in outcomes if found.codec == codec]
    files = [out / "accuracy-latency.png", out / "recall-age.png"]
    _accuracy_latency(files[0], mine)
    _recall_age(files[1], mine)
    return files


def _accuracy_latency(path: Path, outcomes: Sequence[Outcome]) -> None:
    figure, axes = _empty()
    for line in lines(outcomes):
        if line.macro is None:
            continue
        error = 100 * (line.macro_error or 0.0)
        late = np.array([[0.0], [max(0.0, line.p95_ms - line.p50_ms)]])
        axes.errorbar(
            line.p50_ms, 100 * line.macro, yerr=error, xerr=late, fmt="o", capsize=3, label=line.row
        )
    axes.set(xlabel="latency, p50 and up to p95 (ms)", ylabel="macro average over kinds (%)")
    _save(path, figure, axes)


def _recall_age(path: Path, outcomes: Sequence[Outcome]) -> None:
    figure, axes = _empty()
    oldest = 0
    for row in AGED:
        points = by_age(found for found in outcomes if found.row == row)
        if points:
            places = [AGES_S.index(round(age_s)) for age_s, _, _ in points]
            axes.plot(places, [100 * recall for _, recall, _ in points], "o-", label=row)
            oldest = max(oldest, *places)
    axes.set(xlabel="age of the evidence, up to (minutes)", ylabel="true span in the context (%)")
    axes.set_xticks(range(oldest + 1), [f"{age_s / 60:g}" for age_s in AGES_S[: oldest + 1]])
    _save(path, figure, axes)


def _empty() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    return figure, figure.subplots()


def _save(path: Path, figure: Any, axes: Any) -> None:
    axes.set_ylim(-3, 103)
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right")  # the search for the best place warns where it is slow
    figure.savefig(path, dpi=150)
