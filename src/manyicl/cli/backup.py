"""`manyicl backup` and `manyicl restore`: the data folder of a task server as one file, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyicl.cli import options
from manyicl.errors import pluralized


def backup_command(
    data: options.DataFolder,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to write, such as `monday.tar.gz`.")],
    database: options.DatabaseUrl = None,
) -> None:
    """Write tasks, jobs and API keys of a server to one file, while it runs.

    The file holds one moment of the database, checked, and the secret without which no API key is valid: anyone
    with it can read all texts. Compiled prefixes are not in it; the server makes them again. PostgreSQL has tools of
    its own (`pg_dump`); keep the file `hmac.key` of the data folder with its dump.

    Examples:

        manyicl backup --data tasks --output monday.tar.gz
    """
    options.require_server_libraries()
    from manyicl.server.backup import backup

    num_tasks = backup(data, database, output)
    typer.echo(f"{output}: {pluralized(num_tasks, 'task')}")


def restore_command(
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="File that `manyicl backup` wrote.")],
    data: Annotated[Path, typer.Option("--data", metavar="DIR", help="Folder to restore into, without a database.")],
) -> None:
    """Make a data folder of a backup, from which `manyicl serve --data DIR` starts.

    Examples:

        manyicl restore monday.tar.gz --data restored
    """
    options.require_server_libraries()
    from manyicl.server.backup import has_keys_without_secret, restore

    num_tasks = restore(archive, data)
    typer.echo(f"{data}: {pluralized(num_tasks, 'task')}")
    if has_keys_without_secret(data):
        typer.echo("The backup holds API keys without the secret that checks them: none is valid.", err=True)
