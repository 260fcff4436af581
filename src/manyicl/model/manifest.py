"""manyicl.json: what a model folder remembers of its fine-tuning, so that the engine asks as training taught."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from manyicl.episodes.chat_template import chosen_format
from manyicl.episodes.text_format import AnyFormat, FormatKind, FormatSettings, PlainFormat
from manyicl.errors import UserError, shown
from manyicl.tasks.task import Task

FILE_NAME = "manyicl.json"


class TrainedTask(BaseModel):
    """A task that a model was fine-tuned on, named so that "unseen" can be checked."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: str
    source: str
    data_hash: str

    @classmethod
    def of(cls, task: Task) -> TrainedTask:
        """Take a task's identity."""
        return cls(name=task.name, family=task.family, source=task.source, data_hash=task.data_hash)


class Manifest(BaseModel):
    """The content of manyicl.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    text_format: AnyFormat = Field(PlainFormat(), description="How examples become text.")
    max_context_tokens: int = Field(ge=1, description="Longest row in training; the engine flags what exceeds it.")
    max_trained_shots: int | None = Field(None, description="Most demonstrations before an answer in training.")
    tasks: tuple[TrainedTask, ...] = Field((), description="What the model was fine-tuned on.")
    held_out: tuple[TrainedTask, ...] = Field((), description="What picked the best model in training.")
    objective: str | None = Field(None, description="Which answers were supervised.")
    base: str | None = Field(None, description="The model that training began from, as named in the recipe.")
    base_fingerprint: str | None = Field(None, description="Hash of the weights that training began from.")
    recipe: dict[str, Any] = Field(default_factory=dict, description="The resolved recipe.")
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())

    def changed_tasks(self, tasks: Iterable[Task]) -> list[tuple[TrainedTask, Task]]:
        """Pair the tasks that have the name of one in training, and other data, with what they were then."""
        trained = {task.name: task for task in self.tasks}
        named = ((trained[task.name], task) for task in tasks if task.name in trained)
        return [(then, now) for then, now in named if then.data_hash != now.data_hash]

    def write(self, folder: Path) -> None:
        """Write manyicl.json into a model folder."""
        (folder / FILE_NAME).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """Read manyicl.json from a model folder; None where there is none.

        Raises:
            UserError: If the file is not what this version writes.
        """
        path = folder / FILE_NAME
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (ValidationError, UnicodeDecodeError) as error:
            problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            where = ".".join(str(part) for part in problem["loc"])
            found = f", found {shown(problem['input'])}" if where else ""
            raise UserError(
                f"{path} is not a manifest of this version of manyicl: {where or 'the file'}: {problem['msg']}{found}. "
                "Use the version that wrote the model, or fine-tune again."
            ) from error


def format_to_ask_in(
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    kind: FormatKind | None = None,
    tasks: Iterable[Task] = (),
) -> AnyFormat:
    """Return the format that a model was taught; one that was not fine-tuned here may be asked in either kind.

    Args:
        tokenizer: Of the model.
        manifest: What it remembers of its fine-tuning; None where it was not fine-tuned here.
        kind: What is asked for.
        tasks: Whose rows a chat template and the pieces cut from it must write alike.

    Raises:
        UserError: If it was taught another kind, or has no chat template that can be used.
    """
    if manifest is None:
        return chosen_format(FormatSettings(kind=kind or "plain"), tokenizer, tasks)
    taught = manifest.text_format.kind
    if kind not in (None, taught):
        raise UserError(f"The model was fine-tuned in the {taught} format; found format {kind}. Leave it out.")
    return manifest.text_format


def library_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("manyicl", "torch", "transformers", "peft", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
