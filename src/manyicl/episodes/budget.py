"""How many whole shots fit in a context, in training and before a query."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedEpisode, EncodedShot
from manyicl.episodes.sampling import DrawnEpisode
from manyicl.episodes.task_shots import TaskShots
from manyicl.errors import UserError
from manyicl.tasks.task import Example, Query, Task

# Of a free answer, where its task does not say.
DEFAULT_MAX_ANSWER_TOKENS = 64


def max_answer_tokens(task: Task) -> int:
    """Return the limit for free answers of a task: the task's own, or a default."""
    return task.max_answer_tokens or DEFAULT_MAX_ANSWER_TOKENS


class FittingShots(NamedTuple):
    """The beginning of a drawn episode that fits.

    Attributes:
        episode: Whole shots only; None where not even one fits.
        num_left_out: Shots that were drawn and did not fit; 0 where the episode was to fill the context.
        num_too_long: Shots skipped because they are longer than a whole context.
    """

    episode: EncodedEpisode | None
    num_left_out: int
    num_too_long: int


def whole_shots_within(
    drawn: DrawnEpisode, task_shots: TaskShots, encoder: Encoder, budget: int, max_context_tokens: int
) -> FittingShots:
    """Take shots of a drawn episode while they fit in ``budget`` tokens.

    Nothing is truncated: a shot that is longer than the whole context is passed over and counted; the first
    other shot that does not fit ends the episode, so that short examples are not preferred within it.
    """
    preamble_ids = task_shots.preamble_ids(drawn.instruction)
    num_tokens = len(preamble_ids)
    shots: list[EncodedShot] = []
    num_left_out = num_too_long = 0
    for position in drawn.positions:
        if len(shots) == drawn.num_examples:
            break
        shot = task_shots.shot(position, encoder.preceding(drawn.instruction, len(shots)), drawn.new_names)
        num_shot_tokens = encoder.num_tokens_of(shot)
        if len(preamble_ids) + num_shot_tokens > max_context_tokens:
            num_too_long += 1
        elif num_tokens + num_shot_tokens > budget:
            if drawn.num_examples is not None:
                num_left_out = min(drawn.num_examples, len(drawn.task.train) - num_too_long) - len(shots)
            break
        else:
            shots.append(shot)
            num_tokens += num_shot_tokens
    episode = encoder.join(drawn.task.name, preamble_ids, shots) if shots else None
    return FittingShots(episode, num_left_out, num_too_long)


def num_tokens_for_asking(task: Task, encoder: Encoder, max_answer_tokens: int, queries: Sequence[Query]) -> int:
    """Count the tokens to keep free after the demonstrations: the longest query and the longest answer."""
    # The first text of a sequence may be encoded with a leading marker, or differ from one after a shot.
    longest_query = max((encoder.num_query_tokens(query.text) for query in queries), default=0)
    return longest_query + longest_answer(task, encoder, max_answer_tokens, queries)


def longest_answer(task: Task, encoder: Encoder, max_answer_tokens: int, queries: Sequence[Query]) -> int:
    """Count the tokens of the longest label, or the longest choice of these queries; else free answers have a limit."""
    if task.labels:
        return _longest_label(encoder, task.labels)
    choices = {choice for query in queries for choice in query.choices or ()}
    return max(map(encoder.num_answer_tokens, choices), default=max_answer_tokens)


@lru_cache(maxsize=4)
def _longest_label(encoder: Encoder, labels: tuple[str, ...]) -> int:
    """Count the tokens of the longest label; kept, because a task of thousands of labels asks for every test row."""
    return max(map(encoder.num_answer_tokens, labels))


def require_instruction_fits(task: Task, encoder: Encoder, max_context_tokens: int) -> int:
    """Return how many tokens stand before the first query.

    Raises:
        UserError: If they fill the context, as an instruction that lists thousands of labels may.
    """
    num_tokens = encoder.num_preamble_tokens(task.instruction())
    if num_tokens >= max_context_tokens:
        labels = f" (the task has {len(task.labels):,} labels)" if task.labels else ""
        what = f"The instruction of task {task.name!r}{labels} alone fills the context"
        expected = f"fewer than {max_context_tokens:,} tokens, which is max_context_tokens"
        remedy = "Shorten it, or use a longer context."
        raise UserError("instruction_too_long", what, expected=expected, found=f"{num_tokens:,}", remedy=remedy)
    return num_tokens


def fit_demonstrations(
    task: Task, demonstrations: Sequence[Example], encoder: Encoder, max_context_tokens: int, reserve: int
) -> tuple[tuple[Example, ...], int]:
    """Choose the demonstrations that fit, balanced by label, in their given order.

    Demonstrations are considered in rounds: the first of each answer in a closed label set, then the second
    of each, and so on; within free answers simply in order. One that does not fit is dropped and the next is
    tried, so that a long example does not keep out the short ones after it.

    Args:
        task: Gives the instruction and says whether answers form a closed set.
        demonstrations: Candidates, in order.
        encoder: Counts tokens as the engine will see them.
        max_context_tokens: Context of the model.
        reserve: Tokens to keep free for the longest query and its answer.

    Returns:
        The demonstrations that fit, in their given order, and how many were dropped.

    Raises:
        UserError: If the instruction alone fills the context.
    """
    instruction = task.instruction()
    room = max_context_tokens - reserve - require_instruction_fits(task, encoder, max_context_tokens)
    costs = [
        encoder.num_shot_tokens(example, encoder.preceding(instruction, shot))
        for shot, example in enumerate(demonstrations)
    ]
    if sum(costs) <= room:
        return tuple(demonstrations), 0
    rounds: defaultdict[str, int] = defaultdict(int)
    turns: list[tuple[int, int]] = []
    for position, example in enumerate(demonstrations):
        group = example.answer if task.labels else ""
        turns.append((rounds[group] if task.labels else position, position))
        rounds[group] += 1
    chosen = []
    for _, position in sorted(turns):
        # The first shot of a sequence may be encoded with a leading marker, at most one token longer.
        if costs[position] + 1 <= room:
            chosen.append(position)
            room -= costs[position]
    return tuple(demonstrations[position] for position in sorted(chosen)), len(demonstrations) - len(chosen)
