"""manyicl.json: how a model was fine-tuned, so that the engine prompts it as in training."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from transformers import PreTrainedTokenizerBase

from manyicl.episodes.chat_template import chosen_format
from manyicl.episodes.text_format import AnyFormat, FormatKind, FormatSettings, PlainFormat, format_of_this_version
from manyicl.errors import UserError, quoted
from manyicl.library_errors import reason
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

    format_version: Literal[2] = 2
    text_format: AnyFormat = Field(PlainFormat(), description="How examples become text.")
    max_context_tokens: int = Field(ge=1, description="Longest row in training; the engine flags what exceeds it.")
    max_trained_shots: int | None = Field(None, description="Most demonstrations before an answer in training.")
    tasks: tuple[TrainedTask, ...] = Field((), description="What the model was fine-tuned on.")
    held_out: tuple[TrainedTask, ...] = Field((), description="What picked the best model in training.")
    objective: str | None = Field(None, description="Which answers were supervised.")
    base: str | None = Field(None, description="The model that training began from, as named in the recipe.")
    base_fingerprint: str | None = Field(None, description="Hash of the weights that training began from.")
    replay_sha256: str | None = Field(None, description="Hash of the general text that was replayed in training.")
    recipe: dict[str, Any] = Field(default_factory=dict, description="The resolved recipe.")
    throughput: dict[str, float] = Field(
        default_factory=dict, description="Speed, utilisation and peak memory since the start or last resume."
    )
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
            return cls.model_validate(_of_this_version(json.loads(path.read_text(encoding="utf-8"))))
        except (ValidationError, ValueError, RecursionError) as error:
            problem = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": reason(error)}
            field = ".".join(map(str, problem["loc"])) or None
            what = f"This is not a manifest of this version of manyicl: {field or 'the file'}: {problem['msg']}"
            found, remedy = (
                quoted(problem["input"]) if field else None,
                "Use the version that wrote it, or fine-tune again.",
            )
            raise UserError("not_a_manifest", what, found=found, remedy=remedy, file=path, field=field) from error


def _of_this_version(content: Any) -> Any:
    """Rewrite a manifest of version 1, in which one text ended answer and instruction, as one of this version."""
    if not isinstance(content, dict) or content.get("format_version", 1) != 1:
        return content
    text_format = format_of_this_version(content.get("text_format") or {})
    return {**content, "format_version": 2, "text_format": text_format}


def format_to_ask_in(
    tokenizer: PreTrainedTokenizerBase,
    manifest: Manifest | None,
    kind: FormatKind | None = None,
    end_of_answer: str | None = None,
    tasks: Iterable[Task] = (),
) -> AnyFormat:
    """Return the format that a model was taught; for one that was not fine-tuned here it can be chosen.

    Args:
        tokenizer: Tokenizer of the model.
        manifest: What the model remembers of its fine-tuning; None where it was not fine-tuned here.
        kind: Kind of format that the user asks for.
        end_of_answer: End-of-answer text, or control token, that the user asks for.
        tasks: Tasks whose rows a chat template and the segments cut from it must write alike.

    Raises:
        UserError: If the model was taught another format, its chat template cannot be used, or in a chat another end
            is wanted than that of its turns.
    """
    if kind not in (None, *get_args(FormatKind)):
        raise UserError("unknown_value", "there is no such format", expected="plain, channel or chat", found=repr(kind))
    if manifest is not None:
        taught = manifest.text_format
        if kind not in (None, taught.kind):
            what, found = "The model was fine-tuned in another format", f"format {kind}"
            raise UserError("another_format", what, expected=taught.kind, found=found, remedy="Leave it out.")
        _require_same_end(taught, end_of_answer, "The model was fine-tuned with another end of an answer")
        return taught
    if kind != "chat":
        try:
            settings = FormatSettings(kind=kind or "plain", end_of_answer=end_of_answer)
        except ValidationError as error:
            what = f"--end-of-answer cannot be used, {reason(error)}"
            raise UserError("bad_end_of_answer", what, field="end_of_answer") from error
        return chosen_format(settings, tokenizer, tasks)
    text_format = chosen_format(FormatSettings(kind="chat"), tokenizer, tasks)
    _require_same_end(text_format, end_of_answer, "The chat template ends an answer otherwise")
    return text_format


def _require_same_end(text_format: AnyFormat, end_of_answer: str | None, what: str) -> None:
    if end_of_answer not in (None, text_format.end_of_answer):
        expected, found = repr(text_format.end_of_answer), repr(end_of_answer)
        raise UserError(
            "another_end_of_answer", what, expected=expected, found=found, remedy="Leave --end-of-answer out."
        )


def library_versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    names = ("manyicl", "torch", "transformers", "peft", "tokenizers")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
