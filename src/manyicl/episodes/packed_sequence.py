"""Seed and index -> episodes of many tasks that fill one context: a packed sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from manyicl.episodes.budget import whole_shots_within
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedEpisode
from manyicl.episodes.replay import Replay, ReplayedSegment
from manyicl.episodes.sampling import (
    DrawnEpisode,
    EpisodeSettings,
    Mixture,
    draw_episode,
    require_replacement_words,
    sequence_rng,
)
from manyicl.episodes.task_shots import ShotsInMemory, TaskShots
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
        replayed: Pieces of general text after the episodes, isolated as these are.
    """

    episodes: tuple[EncodedEpisode, ...]
    max_context_tokens: int
    num_shots_dropped: int
    num_shots_too_long: int
    replayed: tuple[ReplayedSegment, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens of all episodes and pieces of text."""
        return sum(len(episode.token_ids) for episode in self.episodes) + self.num_replayed_tokens

    @property
    def num_replayed_tokens(self) -> int:
        """Tokens of all pieces of text."""
        return sum(len(segment.token_ids) for segment in self.replayed)

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
        shots: Sequence[TaskShots] | None = None,
        replay: Replay | None = None,
    ) -> None:
        """Check that every sequence can be drawn.

        Args:
            tasks: Tasks to draw from.
            encoder: Encoder of the model.
            max_context_tokens: Tokens that a sequence may hold.
            num_sequences: Number of sequences.
            seed: Fixes all sequences, together with their index.
            episodes: How many examples an episode holds, and in what order.
            mixture: How often each task is drawn.
            shots: The tokens of each task's demonstrations; encoded when they are drawn by default.
            replay: General text that is put beside the episodes; by default none.

        Raises:
            UserError: If there is no task, a task has no example that fits the context or more labels than there
                are words to rename them, the mixture names no task, or instructions are omitted and there are none.
        """
        if not tasks:
            raise UserError("no_tasks", "no training task was given", remedy="Give at least one.", field="tasks.train")
        self.tasks = tuple(tasks)
        self.encoder = encoder
        self.max_context_tokens = max_context_tokens
        self.num_sequences = num_sequences
        self.seed = seed
        self.episodes = episodes or EpisodeSettings()
        # Summed once: a draw is then a search, and takes no longer with more tasks.
        self._cumulative_weights = list(accumulate((mixture or Mixture()).task_weights(self.tasks)))
        self._shots = [ShotsInMemory(task, encoder) for task in tasks] if shots is None else list(shots)
        self._replacement_words: list[str] = []
        if self.episodes.rename_labels:
            words: set[str] = set()
            for each in self._shots:  # one at a time: tasks share most of their words
                words |= each.plain_words()
            self._replacement_words = encoder.usable_labels(sorted(words))
            require_replacement_words(tasks, self._replacement_words)
        if self.episodes.omit_instruction and not any(each.instruction() for each in self._shots):
            what = "omit_instruction has no effect, because no training task has an instruction"
            raise UserError("no_effect", what, remedy="Leave it out.", field="sequences.omit_instruction")
        self.replay = replay
        for each in self._shots:
            _require_one_shot_fits(each, max_context_tokens - (replay.fewest_tokens if replay else 0))

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
        replayed = self.replay.segments(self.seed, index) if self.replay else ()
        budget = self.max_context_tokens - sum(len(segment.token_ids) for segment in replayed)
        room = budget
        episodes: list[EncodedEpisode] = []
        num_dropped = num_too_long = num_draws_that_do_not_fit = 0
        while budget > 0 and num_draws_that_do_not_fit < NUM_DRAWS_THAT_DO_NOT_FIT:
            (number,) = rng.choices(range(len(self.tasks)), cum_weights=self._cumulative_weights)
            shots = self._shots[number]
            answers = shots.answers() if self.episodes.sampling == "balanced" else None
            drawn = draw_episode(shots.task, self.episodes, rng, self._replacement_words, shots.instruction(), answers)
            drawn = _with_names_that_fit(drawn, shots, room)
            fitting = whole_shots_within(drawn, shots, self.encoder, budget, self.max_context_tokens)
            num_too_long += fitting.num_too_long
            if fitting.episode:
                episodes.append(fitting.episode)
                budget -= len(fitting.episode.token_ids)
                num_dropped += fitting.num_left_out
                num_draws_that_do_not_fit = 0
            else:
                num_draws_that_do_not_fit += 1
        if not episodes and not replayed:
            what = f"no example that was drawn for packed sequence {index:,} fits the context"
            remedy = "Raise it; or set sequences.rename_labels to 0, where other words make examples longer."
            expected, field = f"at most {self.max_context_tokens:,} tokens", "sequences.max_context_tokens"
            raise UserError("no_shot_fits", what, expected=expected, remedy=remedy, field=field)
        return PackedSequence(tuple(episodes), self.max_context_tokens, num_dropped, num_too_long, replayed)


def _with_names_that_fit(drawn: DrawnEpisode, shots: TaskShots, room: int) -> DrawnEpisode:
    """Keep the task's own label names where an instruction with other names would leave no room for its examples."""
    if drawn.new_names is None or not drawn.instruction:
        return drawn
    own, renamed = (len(shots.preamble_ids(each)) for each in (shots.instruction(), drawn.instruction))
    longer = renamed - own
    if longer <= 0 or shots.fewest_tokens(room - longer) + longer <= room:
        return drawn
    return replace(drawn, instruction=shots.instruction(), new_names=None)


def _require_one_shot_fits(shots: TaskShots, max_context_tokens: int) -> None:
    """Refuse a task of which no example fits the context, less the text in it, together with its instruction."""
    name = shots.task.name
    if not shots.task.train:
        raise UserError("no_training_rows", f"task {name!r} has no training example")
    num_tokens = shots.fewest_tokens(max_context_tokens)
    if num_tokens <= max_context_tokens:
        return
    what = f"the shortest example of task {name!r} does not fit the context with its instruction"
    expected, remedy = f"at most {max_context_tokens:,} tokens (max_context_tokens)", "Raise it, or leave the task out."
    field = "sequences.max_context_tokens"
    raise UserError("no_shot_fits", what, expected=expected, found=f"{num_tokens:,}", remedy=remedy, field=field)
