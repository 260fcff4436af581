"""How well a model predicts its own demonstrations, each given those before it, from the pass that prefills them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

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


def answer_targets(task: Task, demonstrations: Sequence[Example], encoder: Encoder) -> list[list[Target]]:
    """Find the answer of each demonstration in the tokens of the prefix, with the tokens that each could have been."""
    episode = encoder.encode_episode(Episode(task.name, task.instruction(), tuple(demonstrations)))
    targets: list[list[Target]] = []
    tries: dict[tuple[str, ...], LabelTrie] = {}
    for example, (start, end) in zip(demonstrations, episode.answer_spans, strict=True):
        options = example.query.choices or task.labels
        if options and options not in tries:
            tries[options] = LabelTrie.of([encoder.answer_ids(option) for option in options])
        trie, node = tries[options] if options else None, ROOT
        targets.append([])
        for position in range(start, end):
            allowed = None
            if trie is not None:
                children = trie.children[node]
                allowed, node = tuple(children), children[episode.token_ids[position]]
            targets[-1].append(Target(position, allowed))
    return targets


def observed_answers(
    targets: Sequence[Sequence[Target]], scores: Iterable[TargetScore], first_shot: int = 0
) -> tuple[ObservedAnswer, ...]:
    """Put the scores of the tokens together to those of the answers, the first after ``first_shot`` demonstrations."""
    remaining = iter(scores)
    answers = []
    for shot, own in enumerate(targets, start=first_shot):
        of_answer = list(islice(remaining, len(own)))
        log_probability = sum(score.log_probability for score in of_answer)
        answers.append(ObservedAnswer(shot, log_probability, all(score.is_best for score in of_answer)))
    return tuple(answers)


def groups_of_shots(answers: Sequence[ObservedAnswer]) -> Iterator[tuple[int, int, list[ObservedAnswer]]]:
    """Group answers by the shots before them, 0, 1, 2-3, 4-7, 8-15, …; yield first, last and the group."""
    first = 0
    while first < len(answers):
        after = max(1, 2 * first)
        yield first, min(after, len(answers)) - 1, list(answers[first:after])
        first = after
