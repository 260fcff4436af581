"""Options that several commands share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from manyicl.activity import Activity
from manyicl.episodes.text_format import FormatKind
from manyicl.errors import UserError

if TYPE_CHECKING:
    from manyicl.engine.engine import Engine

Model = Annotated[str, typer.Option("--model", "-m", help="Folder, .gguf file, hf:owner/name or builtin:NAME.")]
TASK_OPTION = typer.Option(
    "--task", "-t", help="Task folder, catalog:NAME, or a file with two columns: `tickets.csv:text:label`."
)
Shots = Annotated[int | None, typer.Option(min=0, help="Number of demonstrations. [default: all that fit]")]
TextFormat = Annotated[
    FormatKind | None,
    typer.Option("--format", help="plain, channel or chat, for a model that was not fine-tuned here. [default: plain]"),
]
EndOfAnswer = Annotated[
    str | None,
    typer.Option(
        "--end-of-answer",
        help="Text that ends an answer, or a control token of the tokenizer such as '<|im_end|>', for a model that was "
        "not fine-tuned here. [default: a blank line]",
    ),
]
TaskPatterns = Annotated[
    list[str],
    typer.Argument(
        metavar="TASK...",
        help="Task folders, task.yaml files, folders of task folders, globs, catalog:NAME, or a table with its "
        "columns, as in tickets.csv:text:label.",
        show_default=False,
    ),
]
DataRoot = Annotated[
    Path | None,
    typer.Option(
        help="Folder for data files that are not next to their task.yaml, and for copies of Hub datasets, as "
        "NAME/train.jsonl."
    ),
]
MaxContextTokens = Annotated[
    int | None, typer.Option(min=1, help="Limit for prefix, query and answer together. [default: the model's]")
]
ActivationBudgetMib = Annotated[
    int | None, typer.Option(min=1, help="Memory for queries in flight; affects speed, not results.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; repeatable."),
]
DataFolder = Annotated[
    Path, typer.Option("--data", metavar="DIR", help="Data folder of the task server; its user alone can read it.")
]
DatabaseUrl = Annotated[
    str | None,
    typer.Option(
        "--database",
        metavar="URL",
        envvar="MANYICL_DATABASE_URL",
        show_envvar=False,
        help="`postgresql://user@host/name` to keep tasks in PostgreSQL; a password belongs in the environment "
        "variable MANYICL_DATABASE_URL. [default: SQLite in the data folder]",
    ),
]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16. [default: depends on the device]")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: the best available]")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print mistakes only.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
_NEEDED_BY_SERVER = (
    "fastapi",
    "uvicorn",
    "sqlalchemy",
    "alembic",
    "limits",
    "prometheus_client",
    "structlog",
    "python_multipart",
)


def require_model(model: str, dtype: str | None) -> None:
    """Refuse a model that does not exist, and an unknown dtype; torch is not needed.

    Raises:
        UserError: If so.
    """
    from manyicl.model.reference import require_dtype_name, resolve_reference

    require_dtype_name(dtype)
    resolve_reference(model)


def load_engine(
    model: str,
    dtype: str | None,
    device: str | None,
    text_format: FormatKind | None,
    end_of_answer: str | None,
    max_context_tokens: int | None,
    activation_budget_mib: int | None = None,
    activity: Activity | None = None,
) -> Engine:
    """Load a model as the options of a command say; wrong names are found before the libraries are loaded.

    ``activity`` shows that it is loaded, and from then on how many tokens of a prefix are encoded.
    """
    require_model(model, dtype)
    activity = activity or Activity()
    activity.begin(f"loading {model}")
    from transformers.utils import logging

    from manyicl.engine.engine import Engine
    from manyicl.engine.local import LocalBackend

    logging.disable_progress_bar()
    engine = Engine.from_pretrained(
        model,
        dtype=dtype,
        device=device,
        text_format=text_format,
        end_of_answer=end_of_answer,
        max_context_tokens=max_context_tokens,
        activation_budget_mib=activation_budget_mib,
    )
    if isinstance(engine.backend, LocalBackend):
        engine.backend.on_prefill = activity.prefill
    return engine


def require_server_libraries() -> None:
    """Refuse to run a command of the task server without its libraries.

    Raises:
        UserError: If one is missing.
    """
    missing = [name for name in _NEEDED_BY_SERVER if find_spec(name) is None]
    if missing:
        what = f"the task server needs {', '.join(missing)}"
        raise UserError("missing_library", what, remedy='Run `pip install "manyicl[server]"`.')
