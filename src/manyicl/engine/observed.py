"""How well a model predicts its own demonstrations, each given those before it, from the pass that prefills them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from manyicl.engine.backend import Target, TargetScore
from manyicl.engine.label_trie import ROOT, LabelTrie
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.tasks.task import Example, Task


@dataclass(frozen=True, slots=True)
class ObservedAnswer:
    """How the model predicted one demonstration's answer, given the demonstrations before it.

    Attributes:
        num_shots: Demonstrations before it.
        log_probability: Log-probability of the answer with its end-of-answer text, in nats.
        is_right: Whether each of its tokens was the most probable that the labels or choices allow, or of all tokens
            where answers are free: the answer that the model would have given, chosen token by token.
    """

    num_shots: int
    log_probability: float
    is_right: bool


@dataclass(frozen=True)
class AnswerTargets:
    """The tokens of a prefix that are answers of demonstrations, to be compared with the model's predictions.

    Attributes:
        targets: Every token of every answer, with the tokens that could have been there instead.
        shots: Demonstration that each target belongs to.
        num_demonstrations: Number of demonstrations in the prefix.
    """

    targets: tuple[Target, ...]
    shots: tuple[int, ...]
    num_demonstrations: int

    @classmethod
    def of(cls, task: Task, demonstrations: Sequence[Example], encoder: Encoder) -> AnswerTargets:
        """Find the answers in the tokens of the prefix."""
        episode = encoder.encode_episode(Episode(task.name, task.instruction(), tuple(demonstrations)))
        targets: list[Target] = []
        shots: list[int] = []
        tries: dict[tuple[str, ...], LabelTrie] = {}
        for shot, (example, (start, end)) in enumerate(zip(demonstrations, episode.answer_spans, strict=True)):
            options = example.query.choices or task.labels
            if options and options not in tries:
                tries[options] = LabelTrie.of([encoder.answer_ids(option) for option in options])
            trie, node = tries[options] if options else None, ROOT
            for position in range(start, end):
                allowed = None
                if trie is not None:
                    by_token = {trie.tokens[child]: child for child in trie.children[node]}
                    allowed, node = tuple(by_token), by_token[episode.token_ids[position]]
                targets.append(Target(position, allowed))
                shots.append(shot)
        return cls(tuple(targets), tuple(shots), len(demonstrations))

    def answers(self, scores: Sequence[TargetScore]) -> tuple[ObservedAnswer, ...]:
        """Put the scores of the tokens together to those of the answers."""
        answers = [ObservedAnswer(shot, 0.0, True) for shot in range(self.num_demonstrations)]
        for shot, score in zip(self.shots, scores, strict=True):
            before = answers[shot]
            answers[shot] = ObservedAnswer(
                shot, before.log_probability + score.log_probability, before.is_right and score.is_best
            )
        return tuple(answers)


def groups_of_shots(answers: Sequence[ObservedAnswer]) -> Iterator[tuple[int, int, list[ObservedAnswer]]]:
    """Group answers by the shots before them, 0, 1, 2-3, 4-7, 8-15, …; yield first, last and the group."""
    first = 0
    while first < len(answers):
        after = max(1, 2 * first)
        yield first, min(after, len(answers)) - 1, list(answers[first:after])
        first = after
