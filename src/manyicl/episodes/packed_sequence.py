"""Seed and index -> episodes of many tasks that fill one context: a packed sequence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from manyicl.episodes.budget import whole_shots_within
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedEpisode
from manyicl.episodes.sampling import (
    EpisodeSettings,
    Mixture,
    answers_of,
    draw_episode,
    label_replacement_words,
    require_replacement_words,
    sequence_rng,
)
from manyicl.errors import UserError
from manyicl.tasks.task import Task

# A sequence is full once this many draws in a row did not fit. More would fill it a little better and prefer short
# examples a little more.
NUM_DRAWS_THAT_DO_NOT_FIT = 8


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Isolated episodes that share one context.

    Attributes:
        episodes: Episodes in order; each starts its positions at 0 and sees only itself.
        max_context_tokens: Length of the context that they were drawn to fill.
        num_shots_dropped: Shots that episodes were to hold and that did not fit.
        num_shots_too_long: Shots that were skipped, because not even an empty context would hold them.
    """

    episodes: tuple[EncodedEpisode, ...]
    max_context_tokens: int
    num_shots_dropped: int
    num_shots_too_long: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all episodes."""
        return sum(len(episode.token_ids) for episode in self.episodes)

    @property
    def unused_share(self) -> float:
        """Share of the context that holds no token."""
        return 1 - self.num_tokens / self.max_context_tokens


class PackedSequences(Sequence[PackedSequence]):
    """Packed sequences as a function of seed and index: map-style, without state, so that resuming changes nothing.

    A sequence draws task, demonstrations and order afresh and adds episodes of whole shots until the context is
    full. There is no bin packing, which would make a sequence depend on those before it.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        encoder: Encoder,
        *,
        max_context_tokens: int,
        num_sequences: int,
        seed: int,
        episodes: EpisodeSettings | None = None,
        mixture: Mixture | None = None,
    ) -> None:
        """Check that every sequence can be drawn.

        Raises:
            UserError: If there is no task, a task has no example that fits the context or more labels than there
                are words to rename them, or the mixture names no task.
        """
        if not tasks:
            raise UserError("no_tasks", "no training task was given", remedy="Give at least one.", field="tasks.train")
        self.tasks = tuple(tasks)
        self.encoder = encoder
        self.max_context_tokens = max_context_tokens
        self.num_sequences = num_sequences
        self.seed = seed
        self.episodes = episodes or EpisodeSettings()
        self._task_weights = (mixture or Mixture()).task_weights(self.tasks)
        self._instructions = [task.instruction() for task in self.tasks]
        is_balanced = self.episodes.sampling == "balanced"
        self._answers = [answers_of(task) if is_balanced else None for task in self.tasks]
        self._replacement_words: list[str] = []
        if self.episodes.rename_labels:
            self._replacement_words = label_replacement_words(tasks)
            require_replacement_words(tasks, self._replacement_words)
        for task, instruction in zip(self.tasks, self._instructions, strict=True):
            encoder.require_encodable(task)
            _require_one_shot_fits(task, instruction, encoder, max_context_tokens)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> PackedSequence:  # type: ignore[override]
        """Build sequence ``index``.

        Raises:
            IndexError: If the index is out of range.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"packed sequence {index} of {self.num_sequences}")
        rng = sequence_rng(self.seed, index)
        budget = self.max_context_tokens
        episodes: list[EncodedEpisode] = []
        num_dropped = num_too_long = num_draws_that_do_not_fit = 0
        while budget > 0 and num_draws_that_do_not_fit < NUM_DRAWS_THAT_DO_NOT_FIT:
            number = rng.choices(range(len(self.tasks)), self._task_weights)[0]
            drawn = draw_episode(
                self.tasks[number],
                self.episodes,
                rng,
                self._replacement_words,
                self._instructions[number],
                self._answers[number],
            )
            fitting = whole_shots_within(drawn, self.encoder, budget, self.max_context_tokens)
            num_too_long += fitting.num_too_long
            if fitting.episode.examples:
                encoded = self.encoder.encode_episode(fitting.episode)
                episodes.append(encoded)
                budget -= len(encoded.token_ids)
                num_dropped += fitting.num_left_out
                num_draws_that_do_not_fit = 0
            else:
                num_draws_that_do_not_fit += 1
        return PackedSequence(tuple(episodes), self.max_context_tokens, num_dropped, num_too_long)


def _require_one_shot_fits(task: Task, instruction: str, encoder: Encoder, max_context_tokens: int) -> None:
    """Refuse a task of which no example fits the context together with its instruction."""
    if not task.train:
        raise UserError("no_training_rows", f"task {task.name!r} has no training example")
    opening = encoder.num_preamble_tokens(instruction)
    shortest = sys.maxsize
    for example in task.train:
        num_tokens = opening + encoder.num_shot_tokens(example, encoder.preceding(instruction, 0))
        if num_tokens <= max_context_tokens:
            return
        shortest = min(shortest, num_tokens)
    what = f"the shortest example of task {task.name!r} does not fit the context with its instruction"
    expected, remedy = f"at most {max_context_tokens:,} tokens (max_context_tokens)", "Raise it, or leave the task out."
    field = "sequences.max_context_tokens"
    raise UserError("no_shot_fits", what, expected=expected, found=f"{shortest:,}", remedy=remedy, field=field)
