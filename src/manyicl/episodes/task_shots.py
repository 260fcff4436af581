"""The demonstrations of one task as tokens: encoded when they are drawn, or read from the disk (`token_store`)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedShot
from manyicl.episodes.sampling import answers_of, plain_words, rename_answer
from manyicl.episodes.text_format import Preceding
from manyicl.tasks.task import Task


class TaskShots(ABC):
    """What packed sequences are made of: the tokens of one task's training examples, by their positions.

    Attributes:
        task: The task.
    """

    task: Task

    @abstractmethod
    def instruction(self) -> str:
        """Return the rendered instruction, with the task's own label names."""

    @abstractmethod
    def preamble_ids(self, instruction: str) -> Sequence[int]:
        """Return the tokens before the first query, for the task's own instruction or one with other label names."""

    @abstractmethod
    def shot(self, position: int, preceding: Preceding, new_names: Mapping[str, str] | None = None) -> EncodedShot:
        """Return the tokens of a training example.

        Args:
            position: Position of the example in the training side.
            preceding: What comes before its query.
            new_names: Word for each label, where labels are renamed.
        """

    @abstractmethod
    def answers(self) -> Sequence[str]:
        """Return the answers of all training examples, in their order."""

    @abstractmethod
    def plain_words(self) -> set[str]:
        """Return the words of its queries that may replace labels."""

    @abstractmethod
    def fewest_tokens(self, enough: int) -> int:
        """Return the tokens of the shortest episode of one shot; of any, if it has no more than ``enough``."""


class ShotsInMemory(TaskShots):
    """Demonstrations of a task whose rows are in memory, encoded when they are drawn."""

    def __init__(self, task: Task, encoder: Encoder) -> None:
        """Take a task.

        Raises:
            UserError: If these tokens would teach it otherwise than its rows say.
        """
        encoder.require_encodable(task)
        self.task = task
        self._encoder = encoder

    @cached_property
    def _instruction(self) -> str:
        return self.task.instruction()

    @cached_property
    def _answers(self) -> list[str]:
        return answers_of(self.task)

    def instruction(self) -> str:
        """Render the instruction, once."""
        return self._instruction

    def preamble_ids(self, instruction: str) -> Sequence[int]:
        """Encode the tokens before the first query."""
        return self._encoder.preamble_ids(instruction)

    def shot(self, position: int, preceding: Preceding, new_names: Mapping[str, str] | None = None) -> EncodedShot:
        """Encode a training example."""
        example = self.task.train[position]
        return self._encoder.encode_shot(rename_answer(example, new_names) if new_names else example, preceding)

    def answers(self) -> Sequence[str]:
        """Collect the answers, once."""
        return self._answers

    def plain_words(self) -> set[str]:
        """Collect the words of the first queries."""
        return plain_words(self.task)

    def fewest_tokens(self, enough: int) -> int:
        """Count the tokens of examples until one has few enough."""
        instruction = self.instruction()
        preamble, preceding = len(self.preamble_ids(instruction)), self._encoder.preceding(instruction, 0)
        lengths = (preamble + self._encoder.num_shot_tokens(example, preceding) for example in self.task.train)
        fewest = next(lengths)
        while fewest > enough and (length := next(lengths, None)) is not None:
            fewest = min(fewest, length)
        return fewest
