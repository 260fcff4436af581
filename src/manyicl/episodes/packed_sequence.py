"""Seed and sequence index -> episodes of many tasks that fill one context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manyicl.episodes.budget import whole_shots_within
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedEpisode
from manyicl.episodes.sampling import (
    EpisodeSettings,
    Mixture,
    draw_episode,
    label_replacement_words,
    sequence_rng,
)
from manyicl.errors import UserError
from manyicl.tasks.task import Task

# A sequence is full once this many draws in a sequence found no room. More would fill a little better and prefer short
# examples a little more.
NUM_DRAWS_WITHOUT_ROOM = 8


@dataclass(frozen=True, slots=True)
class PackedSequence:
    """Isolated episodes that share one context.

    Attributes:
        episodes: In order; each starts its positions at 0 and sees only itself.
        max_context_tokens: The context they were drawn to fill.
        num_shots_left_out: Shots that episodes asked for and that no longer fitted.
        num_shots_too_long: Shots passed over because not even an empty context would hold them.
    """

    episodes: tuple[EncodedEpisode, ...]
    max_context_tokens: int
    num_shots_left_out: int
    num_shots_too_long: int

    @property
    def num_tokens(self) -> int:
        """Tokens of all episodes."""
        return sum(len(episode.token_ids) for episode in self.episodes)

    @property
    def num_answers(self) -> int:
        """Answers of all episodes."""
        return sum(len(episode.answer_spans) for episode in self.episodes)

    @property
    def unused_share(self) -> float:
        """Share of the context that holds no token."""
        return 1 - self.num_tokens / self.max_context_tokens


class PackedSequences(Sequence[PackedSequence]):
    """Sequences as a function of seed and index: map-style, without state, so that resuming changes nothing.

    A sequence draws task, demonstrations and order afresh and adds episodes of whole shots until the context is
    full. There is no bin packing, which would make a sequence depend on the sequences before it.
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
        """Prepare the source.

        Raises:
            UserError: If there is no task, or a task has no example that fits the context.
        """
        if not tasks:
            raise UserError("No training task was given; a sequence needs at least one.")
        self.tasks = tuple(tasks)
        self.encoder = encoder
        self.max_context_tokens = max_context_tokens
        self.num_sequences = num_sequences
        self.seed = seed
        self.episodes = episodes or EpisodeSettings()
        self._task_weights = (mixture or Mixture()).task_weights(self.tasks)
        self._replacement_words = label_replacement_words(tasks) if self.episodes.rename_labels else []
        for task in self.tasks:
            encoder.require_encodable(task)
            _require_one_shot_fits(task, encoder, max_context_tokens)

    def __len__(self) -> int:
        return self.num_sequences

    def __getitem__(self, index: int) -> PackedSequence:  # type: ignore[override]
        """Build sequence ``index``.

        Raises:
            IndexError: If the index lies outside the source.
        """
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} of {self.num_sequences}")
        rng = sequence_rng(self.seed, index)
        room = self.max_context_tokens
        episodes: list[EncodedEpisode] = []
        num_left_out = num_too_long = num_draws_without_room = 0
        while room > 0 and num_draws_without_room < NUM_DRAWS_WITHOUT_ROOM:
            task = rng.choices(self.tasks, self._task_weights)[0]
            drawn = draw_episode(task, self.episodes, rng, self._replacement_words)
            fitting = whole_shots_within(drawn, self.encoder, room, self.max_context_tokens)
            num_too_long += fitting.num_too_long
            if fitting.episode.examples:
                encoded = self.encoder.encode_episode(fitting.episode)
                episodes.append(encoded)
                room -= len(encoded.token_ids)
                num_left_out += fitting.num_left_out
                num_draws_without_room = 0
            else:
                num_draws_without_room += 1
        return PackedSequence(tuple(episodes), self.max_context_tokens, num_left_out, num_too_long)


def _require_one_shot_fits(task: Task, encoder: Encoder, max_context_tokens: int) -> None:
    """Refuse a task of which no example fits the context together with its instruction."""
    if not task.train:
        raise UserError(f"Task {task.name!r} has no training example.")
    instruction = task.instruction()
    opening = encoder.num_preamble_tokens(instruction)
    shortest = None
    for example in task.train:
        num_tokens = opening + encoder.num_shot_tokens(example, encoder.preceding(instruction, 0))
        if num_tokens <= max_context_tokens:
            return
        shortest = min(shortest or num_tokens, num_tokens)
    raise UserError(
        f"The shortest example of task {task.name!r} needs {shortest:,} tokens with its instruction; "
        f"max_context_tokens is {max_context_tokens:,}. Raise it or leave the task out."
    )
