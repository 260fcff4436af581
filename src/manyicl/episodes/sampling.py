"""Task, seed, index -> which examples an episode contains, in what order, and with which label names."""

from __future__ import annotations

import random
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Literal, Self

import regex  # type: ignore[import-untyped]
from pydantic import Field, field_validator, model_validator

from manyicl.checked import Section
from manyicl.errors import UserError, did_you_mean
from manyicl.tasks.demonstrations import ShotSampling, demonstrations_in_order
from manyicl.tasks.task import Example, Task

# Queries of a task from which words are taken that may replace labels.
NUM_QUERIES_READ = 200
# Letters and their marks, between white space; without the marks, Hindi would have no words.
_PLAIN_WORD = regex.compile(r"(?<!\S)\p{L}[\p{L}\p{M}]{1,13}(?!\S)")


class EpisodeSettings(Section):
    """How the examples of a training episode are drawn."""

    examples_per_episode: Literal["fill"] | int | tuple[int, int] = Field(
        "fill",
        description="Examples in an episode: a number, a range [least, most] from which a number is drawn uniformly, "
        "or `fill` for as many as the context holds.",
    )
    sampling: ShotSampling = Field("random", description="Order of examples: random, or balanced by answer.")
    rename_labels: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of episodes of closed-label tasks in which each label is replaced by another word.",
    )
    omit_instruction: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of episodes without the instruction, so that the examples alone must show the task.",
    )

    @field_validator("examples_per_episode")
    @classmethod
    def _positive(cls, number: Literal["fill"] | int | tuple[int, int]) -> Literal["fill"] | int | tuple[int, int]:
        if isinstance(number, int) and number < 1:
            raise ValueError(f"an episode needs at least 1 example, found {number}")
        if isinstance(number, tuple) and not 1 <= number[0] <= number[1]:
            raise ValueError(f"a range of examples is [least, most] with 1 <= least <= most, found {list(number)}")
        return number


class Mixture(Section):
    """How often each training task is drawn."""

    kind: Literal["uniform", "weights", "size"] = Field(
        "uniform", description="uniform: all tasks equally; weights: by `weights`; size: by training rows."
    )
    weights: Mapping[str, float] = Field(
        default_factory=dict,
        description="For `weights`: the weight of a task name, a pattern such as `tweet_*`, or a family, shared evenly "
        "by the tasks it matches. A task's own name comes before the first other match; unmatched tasks weigh 1 each.",
    )
    temperature: float = Field(
        1.0, gt=0, description="For `size`: rows to the power 1/temperature; a high value approaches uniform."
    )

    @model_validator(mode="after")
    def _every_key_has_an_effect(self) -> Self:
        if self.kind == "weights" and not self.weights:
            raise ValueError("kind: weights needs weights, one per task, pattern or family")
        if self.kind != "weights" and self.weights:
            raise ValueError(f"weights have no effect with kind: {self.kind}; write kind: weights, or leave them out")
        if self.kind != "size" and self.temperature != 1:
            raise ValueError(f"temperature has no effect with kind: {self.kind}; write kind: size, or leave it out")
        return self

    def task_weights(self, tasks: Sequence[Task]) -> list[float]:
        """Return one weight per task.

        Raises:
            UserError: If a weight is negative or fits no task, or all are zero.
        """
        if self.kind == "size":
            return [len(task.train) ** (1 / self.temperature) for task in tasks]
        if self.kind == "uniform":
            return [1.0] * len(tasks)
        groups = [self._group_of(task) for task in tasks]
        sizes = Counter(groups)
        key = "tasks.mixture.weights"
        for name, weight in self.weights.items():
            if name not in sizes:
                hint = did_you_mean(name, [known for task in tasks for known in (task.name, task.family)])
                raise UserError("unknown_task", f"{key}: {name!r} fits no task", remedy=hint, field=key)
            if weight < 0:
                what, found = f"{key}: the weight of {name!r} is negative", f"{weight:g}"
                raise UserError("wrong_value", what, expected="at least 0", found=found, field=key)
        weights = [1.0 if group is None else self.weights[group] / sizes[group] for group in groups]
        if not any(weights):
            what = f"{key}: every training task has the weight 0"
            raise UserError("wrong_value", what, expected="at least one above 0", field=key)
        return weights

    def _group_of(self, task: Task) -> str | None:
        """Find the entry of ``weights`` that a task shares."""
        if task.name in self.weights:
            return task.name
        fitting = (name for name in self.weights if task.family == name or fnmatchcase(task.name, name))
        return next(fitting, None)


@dataclass(frozen=True)
class DrawnEpisode:
    """An episode before it is known how much of it fits.

    Attributes:
        task: Task from whose training side it is drawn.
        instruction: Rendered instruction, with the episode's own label names; empty where it is omitted.
        num_examples: Number of examples it should hold; None to fill the context.
        positions: Positions of its examples in the training side, drawn lazily, without repetition.
        new_names: The label -> the word that replaces it in this episode; None where labels keep their names.
    """

    task: Task
    instruction: str
    num_examples: int | None
    positions: Iterator[int]
    new_names: Mapping[str, str] | None = None

    @property
    def examples(self) -> Iterator[Example]:
        """The examples at these positions, under the episode's own label names; drawn when they are taken."""
        examples = (self.task.train[position] for position in self.positions)
        if (names := self.new_names) is None:
            return examples
        return (rename_answer(example, names) for example in examples)


def sequence_rng(seed: int, index: int) -> random.Random:
    """Return the generator of one packed sequence: seed and index alone decide, so no state needs saving."""
    return random.Random(f"row {seed} {index}")


def draw_episode(
    task: Task,
    settings: EpisodeSettings,
    rng: random.Random,
    replacement_words: Sequence[str] = (),
    instruction: str | None = None,
    answers: Sequence[str] | None = None,
) -> DrawnEpisode:
    """Draw the examples of one episode from the task's training side.

    Args:
        task: Task to draw from.
        settings: How many examples, and in what order.
        rng: Generator of the packed sequence.
        replacement_words: Words that may replace labels, sorted and distinct.
        instruction: Rendered instruction of the task, if the caller has it already.
        answers: Answers of its training examples, if the caller has them already; they balance.
    """
    number = settings.examples_per_episode
    num_examples = rng.randint(*number) if isinstance(number, tuple) else None if number == "fill" else number
    positions: Iterator[int]
    if settings.sampling == "balanced":
        if answers is None:
            answers = answers_of(task)
        positions = demonstrations_in_order(answers, rng.getrandbits(32), "balanced")
    else:
        positions = shuffled_lazily(len(task.train), rng)
    new_names = None
    if task.labels and settings.rename_labels and rng.random() < settings.rename_labels:
        new_names = draw_label_names(task.labels, replacement_words, rng)
        instruction = task.instruction(tuple(new_names[label] for label in task.labels))
    elif instruction is None:
        instruction = task.instruction()
    if settings.omit_instruction and rng.random() < settings.omit_instruction:
        instruction = ""
    return DrawnEpisode(task, instruction, num_examples, positions, new_names)


def answers_of(task: Task) -> list[str]:
    """Return the answers of a task's training examples, in their order."""
    return [example.answer for example in task.train]


def shuffled_lazily(length: int, rng: random.Random) -> Iterator[int]:
    """Yield 0..length-1 in random order, at a cost per number drawn (Fisher-Yates over a sparse list)."""
    moved: dict[int, int] = {}
    for last in range(length - 1, -1, -1):
        chosen = rng.randint(0, last)
        yield moved.get(chosen, chosen)
        moved[chosen] = moved.pop(last, last)


def plain_words(task: Task) -> set[str]:
    """Return the plain words of a task's first training queries, which may replace labels."""
    return {word for example in task.train[:NUM_QUERIES_READ] for word in _PLAIN_WORD.findall(example.query.text)}


def require_replacement_words(tasks: Sequence[Task], replacement_words: Sequence[str]) -> None:
    """Check that the labels of every task can be renamed.

    Raises:
        UserError: If a task has more labels than there are words, or no task has labels.
    """
    field = "sequences.rename_labels"
    if not any(task.labels for task in tasks):
        what = "rename_labels has no effect, because no training task has a closed set of labels"
        raise UserError("no_effect", what, remedy="Leave it out.", field=field)
    known = set(replacement_words)
    for task in tasks:
        labels = task.labels or ()
        num_words = len(known) - len(known.intersection(labels))
        if num_words < len(labels):
            what = f"rename_labels cannot rename the labels of task {task.name!r}"
            expected, remedy = (
                f"at least {len(labels):,} plain words in the training queries",
                "Set rename_labels to 0.",
            )
            raise UserError(
                "too_few_words", what, expected=expected, found=f"{num_words:,}", remedy=remedy, field=field
            )


def draw_label_names(labels: Sequence[str], replacement_words: Sequence[str], rng: random.Random) -> dict[str, str]:
    """Give each label another word, none of them a label of the task.

    Args:
        labels: Labels of the task.
        replacement_words: Words that may replace labels, sorted and distinct; not copied, for there may be many.
        rng: Generator of the packed sequence.
    """
    found = ((label, bisect_left(replacement_words, label)) for label in labels)
    taken = sorted(place for label, place in found if replacement_words[place : place + 1] == [label])
    # How many words before each label may be drawn; the others are numbered without the labels.
    num_before = [place - rank for rank, place in enumerate(taken)]
    numbers = rng.sample(range(len(replacement_words) - len(taken)), len(labels))
    return {
        label: replacement_words[number + bisect_right(num_before, number)]
        for label, number in zip(labels, numbers, strict=True)
    }


def rename_answer(example: Example, new_names: Mapping[str, str]) -> Example:
    """Return the example with its label under its new name."""
    answer = new_names[example.answer]
    return replace(example, answer=answer, references=(answer,))
