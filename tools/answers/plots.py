"""Two pictures of a run: accuracy against latency, and recall against the age of the evidence."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tools.answers.job import Outcome
from tools.answers.score import by_age, lines

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
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for line in lines(outcomes):
        if line.macro is None:
            continue
        error = 100 * (line.macro_error or 0.0)
        late = max(0.0, line.p95_ms - line.p50_ms)
        axes.errorbar(
            line.p50_ms, 100 * line.macro, yerr=error, xerr=np.array([[0.0], [late]]), fmt="o", capsize=3
        )
        axes.annotate(line.row, (line.p50_ms, 100 * line.macro), textcoords="offset points", xytext=(5, 5))
    axes.set(xlabel="latency, p50 and up to p95 (ms)", ylabel="macro average over kinds (%)", ylim=(0, 100))
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _recall_age(path: Path, outcomes: Sequence[Outcome]) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for row in AGED:
        points = by_age(found for found in outcomes if found.row == row)
        if points:
            ages_s, recalls, _ = zip(*points, strict=True)
            axes.plot([age_s / 60 for age_s in ages_s], [100 * recall for recall in recalls], "o-", label=row)
            drawn = True
    axes.set(
        xlabel="age of the evidence, up to (minutes)", ylabel="true span in the context (%)", ylim=(0, 102)
    )
    axes.set_xscale("log")
    axes.grid(alpha=0.3)
    if drawn:
        axes.legend()
    figure.savefig(path, dpi=150)
