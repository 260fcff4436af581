"""Where `manyicl predict` takes its demonstrations: a task, or one that was compiled."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Self

from manyicl.cli.answers import require_no_rows_of
from manyicl.engine.compiled_file import require_compiled_file
from manyicl.errors import UserError, pluralized
from manyicl.tasks.files import load_task
from manyicl.tasks.retrieval import Retriever

if TYPE_CHECKING:
    from manyicl.engine.engine import Engine
    from manyicl.engine.prediction import Prediction
    from manyicl.engine.queries import AnswerOptions, StreamedRow
    from manyicl.engine.task_prefix import TaskPrefix
    from manyicl.tasks.task import Example, Task


@dataclass
class Demonstrations:
    """Examples that come before every query.

    Attributes:
        task: Task that was named; None where a compiled task is used alone.
        examples: Demonstrations chosen from it, as many as there are or were wanted.
        file: File of the compiled task; None without one.
        compiled: Its content, once a model was loaded.
    """

    task: Task | None
    examples: tuple[Example, ...]
    file: Path | None
    compiled: TaskPrefix | None = None

    @classmethod
    def of(cls, task: str | None, data_root: Path | None, shots: int | None, seed: int, file: Path | None) -> Self:
        """Load the task, if one is named, and choose demonstrations from it.

        Raises:
            UserError: If the task is wrong, or has not so many training examples.
        """
        if file is not None:
            require_compiled_file(file)
        loaded = None if task is None else load_task(task, data_root)
        if loaded is None or file is not None:
            return cls(loaded, (), file)
        return cls(loaded, loaded.demonstrations(len(loaded.train) if shots is None else shots, seed), None)

    @property
    def queried_task(self) -> Task:
        """Task of the queries."""
        if self.compiled is not None:
            return self.compiled.task
        assert self.task is not None, "a task is named, or a compiled one is loaded"
        return self.task

    @property
    def newest_task(self) -> Task:
        """The task as it is named, if it is; a compiled one may be of an earlier version."""
        return self.task or self.queried_task

    @property
    def chosen(self) -> tuple[Example, ...]:
        """Demonstrations that were chosen, before any is dropped because it does not fit."""
        return self.examples if self.compiled is None else self.compiled.demonstrations

    @property
    def retrievable(self) -> Sequence[Example]:
        """Rows to retrieve from: those of the compiled task, or of the task that was named."""
        return (self.compiled.rows if self.compiled else ()) or (self.task.train if self.task else ())

    def load_compiled(self, engine: Engine) -> None:
        """Load the compiled task, if there is one.

        Raises:
            UserError: If it is of another model, or the task has changed since it was compiled.
        """
        if self.file is not None:
            self.compiled = engine.load(self.file)
            if self.task is not None:
                require_same_task(self.compiled, self.task, self.file)

    def require_no_rows_of(self, output: Path) -> None:
        """Refuse an output with the name of a file that some of the examples came from."""
        for task in {id(task): task for task in (self.task, self.compiled and self.compiled.task) if task}.values():
            require_no_rows_of(task.name, chain(task.train, task.test), output)
        if self.compiled is not None:
            require_no_rows_of(self.compiled.task.name, self.compiled.rows, output)

    def content_hash(self) -> str:
        """Hash all that answers depend on, SHA-256 in hex."""
        from manyicl.engine.compiled_file import content_hash

        if self.file is not None:
            return content_hash(self.file)
        task = self.queried_task
        return hashlib.sha256(f"{task.spec.model_dump_json()}\n{task.data_hash}".encode()).hexdigest()

    def answer(
        self,
        engine: Engine,
        rows: Iterable[StreamedRow],
        num_retrieved: int,
        on_prefix: Callable[[TaskPrefix], None],
        how: AnswerOptions,
    ) -> Iterator[Prediction]:
        """Answer queries after the demonstrations; see `manyicl.engine.engine.Engine.answer`."""
        if self.compiled is None:
            return engine.answer(
                self.queried_task, self.examples, rows, num_retrieved=num_retrieved, on_prefix=on_prefix, **how
            )
        retrieve = self._retriever(self.compiled, num_retrieved) if num_retrieved else None
        on_prefix(self.compiled)
        return engine.predict(self.compiled, rows, retrieve=retrieve, **how)

    def _retriever(self, compiled: TaskPrefix, num_retrieved: int) -> Retriever:
        """Retrieve from the rows of the compiled task, or of the task that was named with it.

        Raises:
            UserError: If there are none.
        """
        rows = self.retrievable
        if not rows:
            what = "the compiled task holds no rows to retrieve"
            remedy = "Compile it with --retrieve, or name its task with --task, too."
            raise UserError("no_rows_to_retrieve", what, remedy=remedy, file=self.file, field="--retrieve")
        return Retriever(rows, num_retrieved, exclude=compiled.demonstrations)


def require_same_task(compiled: TaskPrefix, task: Task, file: Path) -> None:
    """Refuse a compiled task whose own task has other rows, labels or templates by now.

    Raises:
        UserError: If so.
    """
    then, now = compiled.task.spec.model_dump(), task.spec.model_dump()
    # Another answer shows in the rows; files that earlier versions compiled do not know the template.
    changed = [name for name in now if now[name] != then[name] and name not in ("answer_template", "references_column")]
    found = f"another {changed[0].replace('_', ' ')}" if changed else None
    if not changed and compiled.task.data_hash != task.data_hash:
        known = {(example.query, example.answer) for example in task.train}
        gone = sum((example.query, example.answer) not in known for example in compiled.demonstrations)
        found = f"other rows; {pluralized(gone, 'demonstration')} of {compiled.num_shots:,} no longer among them"
    if found:
        what = f"task {task.name!r} has changed since it was compiled"
        remedy = "Run `manyicl compile --update` with the same task, or leave --task out."
        raise UserError("compiled_task_outdated", what, found=found, remedy=remedy, file=file)
