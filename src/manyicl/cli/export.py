"""`manyicl export`: a model, or an adapter with its base -> one folder for other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyicl.activity import Activity
from manyicl.cli.options import EndOfAnswer, require_model
from manyicl.outputs import require_output_folder
from manyicl.printing import new_console


def export_command(
    model: Annotated[str, typer.Option(help="Folder, .gguf file, hf:owner/name or builtin:NAME.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="New or empty folder to write.")],
    merge: Annotated[bool, typer.Option("--merge", help="Merge an adapter into its base; adapters need it.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Save as float32, bfloat16 or float16. [default: that of the saved weights, or of the base's]"
        ),
    ] = None,
    end_of_answer: EndOfAnswer = None,
) -> None:
    """Write a model as one standard folder that transformers and vLLM load, with instructions for prompting it.

    PROMPT.md has the instructions for readers, prompt.json for programs.

    An adapter is merged in float32 and rounded once. The folder is loaded again and the change in logits reported.

    Examples:

        manyicl export --model runs/one-model --output exported/one-model

        manyicl export --model runs/adapter --merge --output exported/one-model --dtype bfloat16
    """
    require_output_folder(output, empty=True)
    require_model(model, dtype)

    with Activity(new_console(stderr=True)) as activity:
        activity.begin("loading libraries")
        from transformers.utils import logging

        from manyicl.model.export import export_model
        from manyicl.model.prompt_guide import GUIDE_FILE

        logging.disable_progress_bar()
        exported = export_model(model, output, merge=merge, dtype=dtype, end_of_answer=end_of_answer, activity=activity)
    typer.echo(f"{exported.num_parameters:,} parameters in {exported.dtype} are in {output}.")
    typer.echo(exported.precision)
    typer.echo(f"How to send a prompt: {output / GUIDE_FILE}")
