"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from manyicl.episodes.text_format import FormatKind

Model = Annotated[str, typer.Option("--model", "-m", help="Folder, .gguf file, hf:owner/name or builtin:NAME.")]
TASK_OPTION = typer.Option(
    "--task", "-t", help="Task folder, catalog:NAME, or a file with two columns: `tickets.csv:text:label`."
)
Shots = Annotated[int | None, typer.Option(min=0, help="Demonstrations; all training rows that fit if not given.")]
TextFormat = Annotated[
    FormatKind | None,
    typer.Option("--format", help="plain or chat, for a model that was not fine-tuned here. [default: plain]"),
]
EndOfAnswer = Annotated[
    str | None,
    typer.Option(
        "--end-of-answer",
        help="Text that ends an answer, or a control token of the tokenizer such as '<|im_end|>', for a model that was "
        "not fine-tuned here. [default: a blank line]",
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder in which data paths begin that are not found beside their task.yaml, and in which copies of Hub "
        "datasets are, as NAME/train.jsonl."
    ),
]
MaxContextTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest prefix, query and answer. [default: the model's]")
]
ActivationBudgetMib = Annotated[
    int | None, typer.Option(min=1, help="Bound on queries in flight; changes speed and memory, not results.")
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: by device]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: the best there is]")]
