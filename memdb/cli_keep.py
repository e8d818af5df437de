"""Commands that decide what a store keeps: forget, compact and policy."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from memdb.cli_shared import json_option, opened, print_json, store_option
from memdb.policy import as_toml
from memdb.schemas.times import format_time

if TYPE_CHECKING:
    from memdb.compact import CompactProgress, CompactReport


@click.command()
@store_option
@click.option("--recording", required=True, help="The recording, by name.")
@click.option("--start", help="From this media time on; by default from its beginning.")
@click.option("--end", help="Up to this media time; by default to its end.")
@json_option
def forget(store: str, recording: str, start: str | None, end: str | None, as_json: bool) -> None:
    """Forget a span of a recording, or all of it where neither --start nor --end is given.

    It is gone from every answer at once. Its bytes go from the disk with memdb compact.
    """
    with opened(store) as client:
        report = client.forget(recording, start_s=start, end_s=end)
    if as_json:
        print_json(report)
        return
    span = f"{format_time(report.start_s)} - {format_time(report.end_s)}"
    what = "all of it" if report.whole else f"{report.captions} captions and {report.blocks} blocks"
    click.echo(f"{report.recording} {span}: forgot {what} in {report.units} units")
    click.echo(f"run memdb compact --store {store} to remove the bytes from the disk")


@click.command()
@store_option
@click.option("--age-now", is_flag=True, help="Age although the clock may have jumped: it is right.")
@json_option
def compact(store: str, age_now: bool, as_json: bool) -> None:
    """Remove from the disk what was forgotten, replaced or left half done, and age what the policy says.

    Questions and ingests may go on meanwhile. Run it again for what it reports as left.
    """
    with opened(store) as client, _progress(as_json) as progress:
        report = client.compact(age_now=age_now, progress=progress)
    if as_json:
        print_json(report)
    else:
        _print_compacted(report)


def _print_compacted(report: CompactReport) -> None:
    for done in report.recordings:
        name = done.recording or "a forgotten recording"
        what = f"{done.freed_bytes:,} bytes freed, {done.segments} segments written anew"
        click.echo(f"{name}: {what}" + (f", {done.aged_units} units aged" if done.aged_units else ""))
        for left in done.left:
            click.echo(f"  left: {left}")
    for left in report.left:
        click.echo(f"left: {left}")
    click.echo(f"{report.freed_bytes:,} bytes freed in all")


@click.command()
@store_option
@click.option("--set", "file", type=click.Path(dir_okay=False), help="A TOML file with the new policy.")
@json_option
def policy(store: str, file: str | None, as_json: bool) -> None:
    """What the store keeps, for how long and in how many bytes; and what is due by now."""
    with opened(store) as client:
        found = client.policy(set=file)
        due = client.due_now()
    if as_json:
        print_json(found.as_table() | {"due": due})
        return
    click.echo(as_toml(found))
    for name, units in due.items():
        click.echo(f"# {name}: {units} units are due: memdb compact --store {store} ages them")


@contextmanager
def _progress(as_json: bool) -> Iterator[Callable[[CompactProgress], None] | None]:
    """A progress line on a terminal, none in a pipe."""
    if as_json or not sys.stderr.isatty():
        yield None
        return
    from memdb.progress import BytesBar

    with BytesBar() as bar:
        yield lambda now: bar.update(now.recording, now.done_bytes, now.total_bytes)
