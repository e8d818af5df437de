"""What all commands of `memdb` share: options, the open store, JSON on stdout."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from memdb.client import Client

F = TypeVar("F", bound=Callable[..., Any])


def store_option(command: F) -> F:
    return click.option("--store", required=True, type=click.Path(), help="The store's directory.")(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")(command)


@contextmanager
def opened(
    store: str,
    *,
    create: bool = False,
    model: str | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> Iterator[Client]:
    from memdb.client import connect

    with connect(store, model=model, device=device, dtype=dtype, create=create) as client:
        yield client


def print_json(data: object) -> None:
    click.echo(json.dumps(data, ensure_ascii=False, default=_plain))


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"{value!r} is not for JSON")
