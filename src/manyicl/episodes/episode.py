"""Ordered examples of one task: the content of one training sequence, or of one prefix and its query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from manyicl.tasks.task import Example


@dataclass(frozen=True, slots=True)
class Episode:
    """Ordered examples of one task. The first answer is shot 0: it is given with no demonstration before it."""

    task_name: str
    instruction: str
    examples: tuple[Example, ...]


class EncodedShot(NamedTuple):
    """A demonstration as tokens.

    Attributes:
        given_ids: Tokens of the query, up to where its answer begins; in the channel form, those of the answer.
        target_ids: Tokens of the answer, with its end-of-answer text; in the channel form, those of the query.
    """

    given_ids: Sequence[int]
    target_ids: Sequence[int]


@dataclass(frozen=True, slots=True)
class EncodedEpisode:
    """An episode as tokens, with the positions of its answers known by construction.

    Attributes:
        task_name: The task it came from.
        token_ids: All tokens of the episode, (T,).
        answer_spans: Half-open token ranges, one per example, each covering an answer and its end-of-answer text; in
            the channel form, a query and the text that ends an example.
    """

    task_name: str
    token_ids: tuple[int, ...]
    answer_spans: tuple[tuple[int, int], ...]
