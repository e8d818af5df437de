"""The command `memdb`. Heavy libraries load inside the commands that need them."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from memdb import __version__, cli_copy, cli_keep
from memdb.cli_shared import json_option as _json
from memdb.cli_shared import opened as _open
from memdb.cli_shared import print_json as _print_json
from memdb.cli_shared import store_option as _store
from memdb.schemas.errors import CorruptionError, MemdbError
from memdb.schemas.question import MODES
from memdb.schemas.recipe import PROFILES, STAGES
from memdb.schemas.times import format_time, format_wall_clock

if TYPE_CHECKING:
    from memdb.schemas.answer import Answer

F = TypeVar("F", bound=Callable[..., Any])
EXIT_DAMAGE = 3
EXIT_INTERRUPTED = 130


def main() -> None:
    """Run the command line: errors are one line on stderr, the exit code says of which kind."""
    logging.basicConfig(level=logging.WARNING, format="memdb: %(message)s", stream=sys.stderr)
    try:
        code = cli.main(prog_name="memdb", standalone_mode=False)
    except MemdbError as error:
        click.echo(f"memdb: {_one_line(error)}", err=True)
        code = error.exit_code if not isinstance(error, CorruptionError) else 1
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        code = error.exit_code
    except click.ClickException as error:
        of = getattr(error, "ctx", None)
        hint = f" (see {of.command_path} --help)" if of is not None else ""
        click.echo(f"memdb: {_one_line(error.format_message()).rstrip('.')}{hint}", err=True)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("memdb: interrupted", err=True)
        code = EXIT_INTERRUPTED
    except BrokenPipeError:
        # Nobody reads on. What is still in the buffer goes nowhere, so that there is no complaint at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())


def _model(command: F) -> F:
    for option in (
        click.option("--dtype", help="float32, bfloat16 or float16."),
        click.option("--device", help="cpu, cuda, cuda:0; a GPU where there is one."),
        click.option(
            "--model",
            help="embedded, random:SEED, random-qwen:SEED, a folder or a Hub id; the store remembers its own.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, message="memdb %(version)s")
def cli() -> None:
    """A memory database for streaming Video-LLMs: ingest long recordings, ask about them hours later."""


for _command in (cli_keep.forget, cli_keep.compact, cli_keep.policy, *cli_copy.COMMANDS):
    cli.add_command(_command)


@cli.command()
@click.argument("source")
@_store
@click.option("--recording", help="Its name in the store; by default made from the source's.")
@click.option(
    "--recipe", default="hybrid", show_default=True, help="A name that memdb recipes prints, or a FILE.toml."
)
@click.option(
    "--profile", type=click.Choice(PROFILES), help="Follow the paper or its code where they differ."
)
@click.option("--codec", help="raw, fp16, bf16, int8, int4, oqm or oqm2; by default the recipe's.")
@click.option("--set", "settings", multiple=True, metavar="STAGE.PARAM=VALUE", help="Change the recipe.")
@click.option("--sample-fps", type=float, default=0.5, show_default=True, help="Frames a second to look at.")
@click.option("--fps", type=float, help="Frames a second of an image folder (1 unless said).")
@click.option("--started-at", help="Wall clock at media time 0, ISO 8601.")
@click.option("--track", type=int, help="A video track by number, from 0 on; by default the best.")
@click.option(
    "--reconnect-s",
    type=float,
    default=300.0,
    show_default=True,
    help="How long a lost live source is tried again; 0: not at all, inf: for ever.",
)
@click.option(
    "--seed",
    type=int,
    default=0,
    show_default=True,
    help="Part of the encoding: streamingtom (ctr) draws from it.",
)
@_model
@_json
def ingest(source: str, store: str, as_json: bool, **options: Any) -> None:
    """Put a film, an image folder or an rtsp:// or http:// address into a store.

    Run the same command again after an interruption: it goes on where it was.
    """
    model = {name: options.pop(name) for name in ("model", "device", "dtype")}
    stop = threading.Event()
    with _open(store, create=True, **model) as client, _stopping(stop), _progress(as_json) as progress:
        report = client.ingest(source, progress=progress, stop=stop, **options)
    if as_json:
        _print_json(report)
        return
    click.echo(
        f"{report.recording}: {report.units} units written, everything up to {format_time(report.watermark_s)} is kept"
    )
    for warning in report.warnings:
        click.echo(f"warning: {warning}", err=True)


@contextmanager
def _stopping(stop: threading.Event) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM finishes the batch in hand; the second interrupts that, too."""
    before: dict[int, Any] = {}

    def handle(number: int, frame: object) -> None:
        click.echo("memdb: finishing the batch in hand", err=True)
        stop.set()
        signal.signal(number, before[number])

    for number in (int(signal.SIGINT), int(signal.SIGTERM)):
        before[number] = signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[Any], None] | None]:
    """A progress line on a terminal: media time, times real time, bytes. None in a pipe."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from memdb.progress import IngestBar

    with IngestBar() as bar:
        yield bar.update


@cli.command()
@click.argument("question")
@_store
@click.option("--recording", help="Ask one recording; by default all.")
@click.option("--mode", type=click.Choice(MODES), default="auto", show_default=True)
@click.option("--at", help="As of this media time: seconds, HH:MM:SS or ISO 8601.")
@click.option("--start", "start_s", help="Only what was seen from this media time on.")
@click.option("--end", "end_s", help="Only what was seen up to this media time.")
@click.option("--latency-ms-max", type=float, help="From the question to the last token, model loaded.")
@click.option("--gpu-bytes-max", type=int, help="Keys and values of the context on the device.")
@click.option("--read-bytes-max", type=int, help="What may be read of stored KV.")
@click.option("--context-tokens-max", type=int, help="Everything the model sees, answer included.")
@click.option("--explain", is_flag=True, help="Print the plan.")
@click.option(
    "--save-frames", type=click.Path(file_okay=False), help="A folder for the evidence's key frames."
)
@_model
@_json
def ask(question: str, store: str, explain: bool, as_json: bool, **options: Any) -> None:
    """Answer a question from the store, with evidence and times."""
    model = {name: options.pop(name) for name in ("model", "device", "dtype")}
    stream = None if as_json else _say
    with _open(store, **model) as client:
        answer = client.ask(question, on_text=stream, **options)
    if as_json:
        _print_json(answer.as_json())
        return
    _print_answer(answer, explain)


def _say(piece: str) -> None:
    click.echo(piece, nl=False)


def _print_answer(answer: Answer, explain: bool) -> None:
    click.echo()
    for item in answer.evidence[:5]:
        span = f"{format_time(item.start_s)} - {format_time(item.end_s)}"
        caption = f": {item.caption}" if item.caption else ""
        click.echo(f"  {item.recording} {span} ({item.tier} {item.score:.2f}){caption}")
    if len(answer.evidence) > 5:
        click.echo(f"  and {len(answer.evidence) - 5} more spans (--json gives them all)")
    plan = answer.plan
    click.echo(f"  mode {plan.mode}, {answer.timings_ms['total']:.0f} ms (predicted {plan.predicted_ms:.0f})")
    if explain:
        click.echo(plan.explain())
    for warning in answer.warnings:
        click.echo(f"warning: {warning}", err=True)


@cli.command()
@click.argument("text")
@_store
@click.option("--recording", help="Search one recording; by default all.")
@click.option("--start", help="From this media time on.")
@click.option("--end", help="Up to this media time.")
@click.option("--limit", type=int, default=10, show_default=True)
@_json
def search(text: str, store: str, start: str | None, end: str | None, as_json: bool, **options: Any) -> None:
    """Find captions by meaning and by words. No Video-LLM is loaded."""
    with _open(store) as client:
        hits = client.search(text, start_s=start, end_s=end, **options)
    if as_json:
        _print_json({"hits": [hit.as_json() for hit in hits]})
        return
    for hit in hits:
        span = f"{format_time(hit.start_s)} - {format_time(hit.end_s)}"
        click.echo(f"{hit.recording} {span} ({hit.score:.3f}) {hit.caption}")


@cli.command()
@_store
@_json
def recordings(store: str, as_json: bool) -> None:
    """List the recordings of a store."""
    with _open(store) as client:
        rows = client.recordings()
    if as_json:
        _print_json(
            {
                "recordings": [
                    {
                        "name": row.name,
                        "units": row.units,
                        "watermark_s": row.seen_until_ns / 1e9,
                        "recipe": row.spec.recipe.name,
                        "codec": row.spec.recipe.codec,
                        "sample_fps": row.spec.sample_fps,
                        "started_at": None
                        if row.spec.started_at_ns is None
                        else format_wall_clock(row.spec.started_at_ns),
                        "finished": row.finished,
                        "gaps": [asdict(gap) for gap in row.gaps],
                    }
                    for row in rows
                ]
            }
        )
        return
    for row in rows:
        state = "whole" if row.finished else "open"
        until = format_time(row.seen_until_ns / 1e9)
        click.echo(
            f"{row.name}  {until}  {row.units} units  {row.spec.recipe.name}/{row.spec.recipe.codec}  {state}"
        )


@cli.command()
@_store
@_json
def stats(store: str, as_json: bool) -> None:
    """Recordings, times and bytes by tier."""
    with _open(store) as client:
        found = client.stats()
    if as_json:
        _print_json({**asdict(found), "model": {"spec": found.model, "fingerprint": found.model_fingerprint}})
        return
    click.echo(f"model {found.model}, {found.total_bytes:,} bytes in all")
    for row in found.recordings:
        click.echo(f"{row.name}: {row.units} units, {format_time(row.watermark_s)}, recipe {row.recipe}")
        for tier, size in row.bytes.items():
            hourly = size / row.duration_s * 3600 if row.duration_s else 0.0
            click.echo(f"  {tier:<10} {size:>15,} bytes  {hourly / 2**20:>10.2f} MiB an hour")
        if row.written_ratio is not None:
            click.echo(
                f"  the ingest wrote {row.written_ratio:.2f} bytes for each byte of its units, states included"
            )
    for name, size in found.derived_bytes.items():
        click.echo(f"{name:<12} {size:>15,} bytes")


@cli.command()
@_store
@_json
def verify(store: str, as_json: bool) -> None:
    """Read and check every byte; exit code 3 where something differs from what was written."""
    from memdb.caption_check import check_captions
    from memdb.page_check import check_pages
    from memdb.policy_check import check_policy
    from memdb.verify import verify_path

    report = verify_path(store, checkers=[check_pages, check_captions, check_policy])
    if as_json:
        _print_json(
            {
                "ok": report.ok,
                "checked_bytes": report.checked_bytes,
                "problems": [asdict(problem) for problem in report.problems],
                "notes": report.notes,
            }
        )
    else:
        for problem in report.problems:
            where = f" ({problem.recording}" if problem.recording else ""
            if where and problem.start_s is not None and problem.end_s is not None:
                where += f" {format_time(problem.start_s)} - {format_time(problem.end_s)}"
            click.echo(f"{problem.file}: {problem.what}{where + ')' if where else ''}")
        for note in report.notes:
            click.echo(f"note: {note}")
        verdict = "whole" if report.ok else f"{len(report.problems)} problems"
        click.echo(f"{report.checked_bytes:,} bytes checked: {verdict}")
    if not report.ok:
        sys.exit(EXIT_DAMAGE)


@cli.command()
@_store
@click.option("--recording", help="One recording; by default all.")
@click.option("--tier", type=click.Choice(["all", "kv", "captions"]), default="all", show_default=True)
@_json
def digest(store: str, recording: str | None, tier: str, as_json: bool) -> None:
    """A digest of each recording's content, computed from the bytes on disk."""
    with _open(store) as client:
        found = client.digest(recording, tier=tier)
    if as_json:
        _print_json({"recordings": found})
        return
    for name, value in found.items():
        click.echo(f"{value}  {name}")


@cli.command()
@_json
def recipes(as_json: bool) -> None:
    """The pipeline map: a row a recipe, a column a stage."""
    from memdb.recipes import CONTROLS, PROFILE_CHANGES, RECIPES

    if as_json:
        document: dict[str, object] = {
            part: {name: row.as_json() for name, row in rows.items()}
            for part, rows in (("recipes", RECIPES), ("controls", CONTROLS))
        }
        profiles = {
            name: [*(which for owner, which in PROFILE_CHANGES if owner == name), "fixed"] for name in RECIPES
        }
        _print_json({"stages": list(STAGES), **document, "profiles": profiles})
        return
    table = [["recipe", *STAGES]] + [
        [name, *(row.stage(s).method for s in STAGES)] for name, row in RECIPES.items()
    ]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    for row in table:
        click.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


@cli.command()
@click.option("--seed", type=int, default=0, show_default=True, help="Of the film that is rendered.")
@click.option("--keep", type=click.Path(file_okay=False), help="Keep film and store in this folder.")
def demo(seed: int, keep: str | None) -> None:
    """Render a short film, ingest it, ask about it from another process, and prove the path."""
    from memdb.demo import demo as run

    run(seed, Path(keep) if keep is not None else None, click.echo)


@cli.command()
@_json
def doctor(as_json: bool) -> None:
    """What of this machine memdb sees, and what to type where something is missing."""
    from memdb.doctor import doctor as look

    checks = look()
    if as_json:
        _print_json({"checks": [check.as_json() for check in checks]})
        return
    for check in checks:
        click.echo(
            f"{check.state:<5} {check.name}: {check.detail}" + (f"  -> {check.mend}" if check.mend else "")
        )
