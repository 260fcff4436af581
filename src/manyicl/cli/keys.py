"""`manyicl keys`: make, list and revoke the API keys of a task server."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.cli import options
from manyicl.printing import new_console, printable

if TYPE_CHECKING:
    from manyicl.server.keys import KeyStore
    from manyicl.server.records import KeyRecord, Scope

app = typer.Typer(help="Make, list and revoke the API keys of a task server.", no_args_is_help=True)
Limit = Annotated[int | None, typer.Option(min=1, help="[default: the server's]", show_default=False)]


class ScopeName(StrEnum):
    """What a key allows."""

    MANAGE = "manage"
    PREDICT = "predict"


@app.command("create")
def create_command(
    data: options.DataFolder,
    owner: Annotated[
        str,
        typer.Option(
            help="Whose tasks the key opens; those of other owners do not exist for it. Tasks that were made while the "
            "server had no keys are those of `local`."
        ),
    ],
    name: Annotated[str, typer.Option(help="What the key is for.")] = "",
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option(
            help="manage to create, change and delete tasks, predict to read and use them; repeatable. [default: both]"
        ),
    ] = None,
    requests_per_minute: Limit = None,
    rows_per_minute: Limit = None,
    database: options.DatabaseUrl = None,
) -> None:
    """Make an API key and print it, this once: what is kept does not give it again.

    A running server takes the key at once.

    Examples:

        manyicl keys create --data tasks --owner support --name "help desk" --scope predict
    """
    with _opened(data, database) as keys:
        scopes: list[Scope] = [one.value for one in scope or ScopeName]
        limits = {"requests_per_minute": requests_per_minute, "rows_per_minute": rows_per_minute}
        key, record = keys.create(owner, name, scopes, **limits)
    console = new_console(stderr=True, highlight=False)
    console.print(
        f"key {record.id} of {owner!r}, to {' and '.join(sorted(scopes))}; keep it, it is printed once", markup=False
    )
    typer.echo(key)


@app.command("list")
def list_command(data: options.DataFolder, database: options.DatabaseUrl = None) -> None:
    """Print all keys, without their secrets: id, owner, scopes, when they were made and revoked, limits and name.

    Examples:

        manyicl keys list --data tasks
    """
    with _opened(data, database, must_exist=True) as keys:
        for record in keys.list():
            typer.echo("\t".join(map(_in_one_line, _fields(record))))


@app.command("revoke")
def revoke_command(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Id of the key: what is between `mk_` and the next `_`.")],
    data: options.DataFolder,
    database: options.DatabaseUrl = None,
) -> None:
    """Revoke a key. A running server refuses it from the next request on.

    Examples:

        manyicl keys revoke 3f9c1c5f0b7a4d2e --data tasks
    """
    with _opened(data, database, must_exist=True) as keys:
        record = keys.revoke(key_id)
    typer.echo(f"revoked the key {record.id} of {record.owner!r}")


@contextmanager
def _opened(data: Path, url: str | None, *, must_exist: bool = False) -> Iterator[KeyStore]:
    options.require_server_libraries()
    from manyicl.server.database import Database
    from manyicl.server.keys import KeyStore

    database = Database.open(data, url, must_exist=must_exist)
    try:
        yield KeyStore(database, data)
    finally:
        database.close()


def _in_one_line(text: str) -> str:
    """Write what would end a field or steer a terminal as escapes."""
    return printable(text.replace("\t", "\\t").replace("\n", "\\n").replace("\r", "\\r"))


def _fields(record: KeyRecord) -> list[str]:
    made = "" if record.created_at is None else f"{record.created_at:%Y-%m-%d %H:%M}"
    state = "valid" if record.revoked_at is None else f"revoked {record.revoked_at:%Y-%m-%d %H:%M}"
    counts = (("requests", record.requests_per_minute), ("rows", record.rows_per_minute))
    limits = ", ".join(f"{count:,} {what} a minute" for what, count in counts if count is not None)
    return [record.id, record.owner, ",".join(sorted(record.scopes)), made, state, limits, record.name]
