"""Commands that make copies and put stores right: repair, backup, export, import."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from memdb.cli_shared import json_option, opened, print_json, store_option
from memdb.schemas.times import format_time

EXIT_DAMAGE = 3


@click.command()
@store_option
@json_option
def repair(store: str, as_json: bool) -> None:
    """Make the catalog and all derived files anew from the segments. Nobody may write meanwhile.

    For a store that does not open, or of which verify finds the catalog damaged. No segment is changed.
    """
    from memdb.repair import repair as run

    logging.getLogger("memdb.repair").setLevel(logging.ERROR)  # the same is printed
    with _progress("reading segments", as_json) as progress:
        report = run(store, progress=progress)
    if as_json:
        print_json(report)
        return
    for row in report.recordings:
        click.echo(
            f"{row.name}: {row.units} units up to {format_time(row.watermark_s)}, {row.segments} segments"
        )
    for line in (*map(str, report.spans), *(f"left out: {what}" for what in report.dropped)):
        click.echo(line)
    for note in report.notes:
        click.echo(f"note: {note}")
    stay = f"; {report.forgotten} forgotten recordings stay forgotten" if report.forgotten else ""
    click.echo(f"{len(report.recordings)} recordings with {report.units} units are in a new catalog{stay}")


@click.command()
@click.argument("target", type=click.Path())
@store_option
@json_option
def backup(target: str, store: str, as_json: bool) -> None:
    """Copy a store as it is now into the new folder TARGET, while others read and write.

    Exit code 3 where the store is damaged: the copy is made all the same.
    """
    with opened(store) as client, _progress("copying and verifying", as_json) as progress:
        report = client.backup(target, progress=progress)
    if as_json:
        print_json(report)
    else:
        for row in report.recordings:
            click.echo(f"{row.name}: {row.units} units up to {format_time(row.watermark_s)}")
        for problem in report.problems:
            click.echo(f"{problem.file}: {problem.what}")
        for note in report.notes:
            click.echo(f"note: {note}")
        verdict = (
            "whole" if not report.problems else f"{len(report.problems)} problems, which the store has too"
        )
        click.echo(f"{report.bytes:,} bytes copied to {report.path}: {verdict}")
    if report.problems:
        sys.exit(EXIT_DAMAGE)


@click.command()
@store_option
@click.option("--recording", required=True)
@click.option(
    "--format",
    "format_",
    type=click.Choice(["jsonl", "srt", "memdb"]),
    default="jsonl",
    show_default=True,
    help="Captions as JSON lines or subtitles, or all of the recording for memdb import.",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False), help="The file to write.")
@json_option
def export(store: str, recording: str, format_: str, out: str, as_json: bool) -> None:
    """Write a recording's captions, or all of it, into a file."""
    with opened(store) as client:
        count = client.export(recording, out, format=format_)
    what = "units" if format_ == "memdb" else "captions"
    if as_json:
        print_json({what: count, "out": out})
    else:
        click.echo(f"{count} {what} written to {out}")


@click.command("import")
@click.argument("file", type=click.Path())
@store_option
@click.option("--recording", help="Its name in this store; by default the one that it had.")
@json_option
def import_(file: str, store: str, recording: str | None, as_json: bool) -> None:
    """Take in a recording that memdb export --format memdb wrote, bit for bit."""
    from memdb.transfer_file import TransferFile

    TransferFile(Path(file)).close()  # before a store is made for what is none
    with opened(store, create=True) as client, _progress("verifying and writing", as_json) as progress:
        report = client.import_(file, recording=recording, progress=progress)
    if as_json:
        print_json(report)
        return
    for note in report.notes:
        click.echo(f"note: {note}")
    click.echo(f"{report.recording}: {report.units} units up to {format_time(report.watermark_s)} came in")


@contextmanager
def _progress(what: str, as_json: bool) -> Iterator[Callable[[int, int], None] | None]:
    """A progress line on a terminal, none in a pipe."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from memdb.progress import BytesBar

    with BytesBar() as bar:
        yield lambda done_bytes, all_bytes: bar.update(what, done_bytes, all_bytes)


COMMANDS = (repair, backup, export, import_)
