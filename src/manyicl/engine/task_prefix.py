"""A prefix together with its task: instruction and demonstrations, and how well the model predicted them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from manyicl.engine.backend import Prefix
from manyicl.engine.blend import Blend, BlendWeights
from manyicl.engine.observed import ObservedAnswer
from manyicl.errors import UserError, quoted
from manyicl.tasks.task import Example, Task


@dataclass(frozen=True)
class TaskPrefix:
    """Instruction and demonstrations of a task, prefilled once and reused by every query. Immutable.

    Attributes:
        task: Task of the demonstrations.
        demonstrations: Demonstrations in the prefix, in order.
        num_dropped: Number of demonstrations that were given and did not fit the context.
        text_hash: Hash of the tokenizer and the text format that made the tokens.
        cache: The backend's side of it: tokens with their keys and values.
        num_reused_tokens: Tokens taken over from the prefix it was made from; 0 if it was made anew.
        rebuilt: True if an extension changed the instruction, because it lists the labels and these changed; all
            that follows the first changed token was then encoded anew.
        answers: How the model did on each demonstration; empty where the prefix was not compiled.
        blend: Weights of the model's label scores and those of the words; None before
            `manyicl.engine.engine.Engine.with_blend`.
        rows: The task's other training rows, to retrieve from; empty unless it was compiled to retrieve.
    """

    task: Task
    demonstrations: tuple[Example, ...]
    num_dropped: int
    text_hash: str
    cache: Prefix
    num_reused_tokens: int = 0
    rebuilt: bool = False
    answers: tuple[ObservedAnswer, ...] = ()
    blend: BlendWeights | None = None
    rows: tuple[Example, ...] = ()

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Tokens before a query, (P,)."""
        return self.cache.token_ids

    @property
    def num_tokens(self) -> int:
        """P, the number of tokens before a query."""
        return len(self.cache.token_ids)

    @property
    def num_shots(self) -> int:
        """Number of demonstrations before a query."""
        return len(self.demonstrations)

    @cached_property
    def blend_with_words(self) -> Blend | None:
        """What combines the model's label scores with those of the words, fitted once; None without weights."""
        if self.blend is None:
            return None
        return Blend.of(self.task.labels or (), self.demonstrations, self.blend)


@dataclass(frozen=True)
class FittedPrefix:
    """Demonstrations that fit the context, and the tokens of their prefix, before the network processes them.

    Attributes:
        task: Task of the demonstrations.
        demonstrations: Those that fit, in order.
        num_dropped: Number of demonstrations that were given and do not fit.
        token_ids: Tokens of the prefix, (P,).
        rows: The task's other training rows, to retrieve from; empty where none are retrieved.
    """

    task: Task
    demonstrations: tuple[Example, ...]
    num_dropped: int
    token_ids: tuple[int, ...]
    rows: tuple[Example, ...] = ()


def require_demonstrations(demonstrations: Sequence[Example], task: Task) -> None:
    """Refuse demonstrations that are not of the task, by their number.

    Raises:
        UserError: If one is no example, has an answer outside the labels or its own choices, or has choices where
            the task has none, or none where it has some.
    """
    for number, example in enumerate(demonstrations, start=1):
        if not isinstance(example, Example):
            raise UserError("not_an_example", f"demonstration {number} is no Example", found=type(example).__name__)
        choices = example.query.choices
        options = choices if task.choices_column else task.labels
        if bool(choices) != bool(task.choices_column):
            expected = "choices of its own" if task.choices_column else "no choices of its own"
            found = quoted(choices)
        elif options and example.answer not in options:
            expected, found = f"an answer among {quoted(list(options))}", quoted(example.answer)
        else:
            continue
        what = f"demonstration {number} is not of task {task.name!r}"
        raise UserError("foreign_demonstration", what, expected=expected, found=found)
