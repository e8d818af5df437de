"""The table of a run as Markdown, and its data as JSON."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from memdb.world.questions import KINDS
from tools.answers.job import Ingested, Job, Outcome
from tools.answers.marks import marks
from tools.answers.rows import ROWS
from tools.answers.score import Line, chances, lines, pairs


def markdown(job: Job, outcomes: Sequence[Outcome], ingested: Sequence[Ingested]) -> str:
    parts = [_head(job, outcomes), _accuracy(outcomes), _rows(job), _recordings(ingested)]
    if len(job.codecs) > 1:
        parts.append(_pairs(outcomes, job.codecs))
    found = marks(outcomes, job.codecs)
    if found:
        parts.append("\n".join(["Marks of the issue", "", *(f"- {mark}" for mark in found)]))
    return "\n\n".join(parts) + "\n"


def document(job: Job, outcomes: Sequence[Outcome], ingested: Sequence[Ingested]) -> str:
    """Everything but the outcomes, which have a file of their own."""
    return json.dumps(
        {
            "job": {**asdict(job), "folder": ""},
            "machine": machine(job),
            "chance": chances(outcomes),
            "rows": [asdict(line) for line in lines(outcomes)],
            "ingested": [asdict(one) for one in ingested],
            "pairs": [asdict(pair) for pair in pairs(outcomes, job.codecs)],
            "marks": [asdict(mark) for mark in marks(outcomes, job.codecs)],
        },
        indent=1,
    )


def write(out: Path, job: Job, outcomes: Sequence[Outcome], ingested: Sequence[Ingested]) -> None:
    """table.md, summary.json and outcomes.jsonl: a line for each question in each row."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text(markdown(job, outcomes, ingested), encoding="utf-8")
    (out / "summary.json").write_text(document(job, outcomes, ingested) + "\n", encoding="utf-8")
    rows = (json.dumps(asdict(found)) for found in outcomes)
    (out / "outcomes.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")


def machine(job: Job) -> dict[str, object]:
    on_gpu = job.device is not None and job.device.startswith("cuda")
    return {
        "machine": platform.machine(),
        "gpu": torch.cuda.get_device_name() if on_gpu else None,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def _head(job: Job, outcomes: Sequence[Outcome]) -> str:
    seeds = ", ".join(map(str, job.seeds))
    settings = f", {' '.join(job.settings)}" if job.settings else ""
    source = "painted pictures" if job.paint else f"H.264 at {job.fps} frames a second"
    asked = len({(found.seed, found.number) for found in outcomes})
    cache = "cold" if job.cold else "warm"
    return (
        f"Seeds {seeds}, {job.length_s} s each of {source}, {asked} questions, model {job.model or 'embedded'}, "
        f"codec {job.codecs[0]}{settings}, page cache {cache}, "
        + ", ".join(f"{name} {value}" for name, value in machine(job).items() if value is not None)
    )


def _accuracy(outcomes: Sequence[Outcome]) -> str:
    head = ["row", "codec", "macro", "past", *KINDS, "recall", "says absent", "tokens", "p50 ms", "p95 ms"]
    chance = chances(outcomes)
    cells = [["chance", "", "", "", *(_share(chance.get(kind)) for kind in KINDS), "", "", "", "", ""]]
    cells += [_cells(line) for line in lines(outcomes)]
    return _table(head, cells)


def _cells(line: Line) -> list[str]:
    macro = _share(line.macro)
    if line.macro_error is not None:
        macro += f" ± {100 * line.macro_error:.1f}"
    return [
        line.row + (f" ({line.errors} errors)" if line.errors else ""),
        line.codec,
        macro,
        _share(line.past),
        *(_share(line.by_kind.get(kind)) for kind in KINDS),
        _share(line.recall),
        _share(line.called_absent),
        _whole(line.context_tokens),
        _whole(line.p50_ms),
        _whole(line.p95_ms),
    ]


def _rows(job: Job) -> str:
    about = "\n".join(f"- {name}: {ROWS[name].about}" for name in job.rows)
    return (
        f"Accuracies in percent; macro is the mean over kinds, past that without now, with its standard error. "
        f"Recall: true spans in the context, mean over layers, of kinds that have one. Rows:\n\n{about}"
    )


def _recordings(ingested: Sequence[Ingested]) -> str:
    head = ["seed", "codec", "MiB an hour", "MiB by tier", "state MiB", "ingest s", "times real time"]
    cells = [
        [
            str(one.seed),
            one.codec,
            f"{one.bytes_per_hour / 2**20:.1f}",
            ", ".join(
                f"{tier} {size / 2**20:.2f}"
                for tier, size in one.bytes_by_tier.items()
                if size and tier != "state"
            ),
            f"{one.bytes_by_tier.get('state', 0) / 2**20:.1f}",
            f"{one.ingest_s:.1f}" if one.ingest_s else "reused",
            f"{one.times_real_time:.1f}" if one.ingest_s else "",
        ]
        for one in ingested
    ]
    return _table(head, cells)


def _pairs(outcomes: Sequence[Outcome], codecs: Sequence[str]) -> str:
    head = ["row", "codecs", "asked", "both right", "only first", "only second", "neither", "points", "p"]
    cells = [
        [
            pair.row,
            f"{pair.first}, {pair.second}",
            *map(str, (pair.asked, pair.both_right, pair.only_first, pair.only_second, pair.neither)),
            f"{100 * pair.difference:+.2f}",
            f"{pair.p:.3f}",
        ]
        for pair in pairs(outcomes, codecs)
    ]
    return _table(head, cells)


def _table(head: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, rule, *cells))


def _share(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def _whole(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.0f}"
