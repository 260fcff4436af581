"""What every task must satisfy, in rows and in tokens: all that ``manyicl tasks check`` reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from statistics import median_low

from manyicl.episodes.budget import num_tokens_for_asking
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.tasks.building import ON_BOTH_SIDES, normalised
from manyicl.tasks.task import Example, Task

FEW_TEST_ROWS = 30
ONE_SIDED_SHARE = 0.9


@dataclass(frozen=True, slots=True)
class Lengths:
    """The spread of a length, in tokens."""

    shortest: int
    median: int
    longest: int


@dataclass(frozen=True, slots=True)
class LabelCount:
    """How often a label stands on each side."""

    label: str
    num_train: int
    num_test: int


@dataclass(frozen=True, slots=True)
class ShotsThatFit:
    """How many whole shots a context holds before the longest query and its answer.

    Attributes:
        typical: Shots of median length, no more than there are training rows.
        guaranteed: However they are drawn: even the longest ones.
    """

    typical: int
    guaranteed: int


@dataclass(frozen=True, slots=True)
class TaskCheck:
    """What is known of a task before anything is trained.

    Attributes:
        name: Of the task.
        family: Of the task.
        num_train: Rows that may become demonstrations.
        num_test: Rows that are only asked.
        labels: The closed answer set with its balance, most frequent first; empty for free answers.
        majority_share: Share of the most frequent label among test rows, the level that costs nothing.
        query_tokens: Lengths of queries with their separator, both sides.
        answer_tokens: Lengths of answers with their terminator, both sides.
        num_repeated: Training rows whose query stands in training before.
        num_contradictions: Of these, rows with another answer than before.
        num_on_both_sides: Training rows left out because their query stands in test.
        dropped: Reason -> rows left out when the task was read.
        labels_in_labels: Pairs of labels of which the first begins the second, as text.
        labels_in_labels_as_tokens: The same among their tokens, without the terminator.
        joined_share: Share of examined examples whose pieces equal the tokens of the joined text.
        num_altered_answers: Examined answers that their tokens do not give back.
        num_examined: Examples encoded for the two figures above.
        shots_that_fit: For the context asked about.
        problems: What a person should look at, in sentences; empty when all is well.
    """

    name: str
    family: str
    num_train: int
    num_test: int
    labels: tuple[LabelCount, ...]
    majority_share: float | None
    query_tokens: Lengths
    answer_tokens: Lengths
    num_repeated: int
    num_contradictions: int
    num_on_both_sides: int
    dropped: Mapping[str, int]
    labels_in_labels: tuple[tuple[str, str], ...]
    labels_in_labels_as_tokens: tuple[tuple[str, str], ...]
    joined_share: float
    num_altered_answers: int
    num_examined: int
    shots_that_fit: ShotsThatFit
    problems: tuple[str, ...]


def check_task(task: Task, encoder: Encoder, max_context_tokens: int, num_examined: int = 500) -> TaskCheck:
    """Examine a task as one model's tokenizer sees it.

    Args:
        task: The task.
        encoder: Of the model it is meant for.
        max_context_tokens: Context for which fitting shots are counted.
        num_examined: Most examples that are encoded twice, to compare pieces with the joined text.
    """
    everything = (*task.train, *task.test)
    query_lengths = [len(encoder.query_ids(example.query.text)) for example in everything]
    answer_lengths = [len(encoder.answer_ids(example.answer)) for example in everything]
    shot_lengths = [q + a for q, a in zip(query_lengths, answer_lengths, strict=True)][: len(task.train)]
    examined = _evenly_chosen(everything, num_examined)
    num_repeated, num_contradictions = _repeats(task.train)
    labels = task.labels or ()
    check = TaskCheck(
        name=task.name,
        family=task.family,
        num_train=len(task.train),
        num_test=len(task.test),
        labels=_label_counts(task),
        majority_share=_majority_share(task),
        query_tokens=_lengths(query_lengths),
        answer_tokens=_lengths(answer_lengths),
        num_repeated=num_repeated,
        num_contradictions=num_contradictions,
        num_on_both_sides=task.dropped.get(ON_BOTH_SIDES, 0),
        dropped=task.dropped,
        labels_in_labels=_beginnings({label: label for label in labels}),
        labels_in_labels_as_tokens=_beginnings({label: encoder.piece_ids(label) for label in labels}),
        joined_share=_joined_share(task, examined, encoder),
        num_altered_answers=sum(encoder.decode(encoder.piece_ids(e.answer)) != e.answer for e in examined),
        num_examined=len(examined),
        shots_that_fit=_shots_that_fit(task, encoder, max_context_tokens, shot_lengths, max(answer_lengths)),
        problems=(),
    )
    opening = encoder.num_opening_tokens(task.instruction())
    num_too_long = sum(opening + length > max_context_tokens for length in shot_lengths)
    alike = _beginnings({label: encoder.answer_ids(label) for label in labels})
    return replace(check, problems=tuple(_problems(check, max_context_tokens, num_too_long, alike)))


def _problems(
    check: TaskCheck, max_context_tokens: int, num_too_long: int, alike: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Say what a person should look at; ``alike`` are labels whose tokens, terminator included, do not differ."""
    for label in check.labels:
        if label.num_train == 0:
            yield f"The label {label.label!r} stands in no training row, so no demonstration can show it."
    if check.majority_share is not None and check.majority_share >= ONE_SIDED_SHARE:
        yield f"{check.majority_share:.0%} of the test rows have one label; accuracy says little, prefer macro_f1."
    for first, second in alike:
        yield f"The labels {first!r} and {second!r} are the same to this tokenizer; rename one."
    if check.num_test == 0:
        yield "There are no test rows; the task can be used, not evaluated."
    elif check.num_test < FEW_TEST_ROWS:
        yield f"There are only {check.num_test} test rows; scores will have wide intervals."
    if check.num_contradictions:
        yield f"{check.num_contradictions} training rows repeat a query with another answer."
    if check.num_altered_answers:
        yield (
            f"{check.num_altered_answers} of {check.num_examined} answers come back altered from their tokens; "
            "this tokenizer loses characters."
        )
    if num_too_long:
        yield f"{num_too_long} training rows are longer than {max_context_tokens:,} tokens and can never be shown."
    if check.shots_that_fit.guaranteed == 0:
        yield f"In {max_context_tokens:,} tokens, some queries leave no room for the longest demonstration."


def _evenly_chosen(examples: Sequence[Example], most: int) -> tuple[Example, ...]:
    """Choose examples at even distances, so that both sides and all of a sorted file are seen."""
    if len(examples) <= most:
        return tuple(examples)
    return tuple(examples[position * len(examples) // most] for position in range(most))


def _lengths(lengths: Sequence[int]) -> Lengths:
    return Lengths(min(lengths), median_low(lengths), max(lengths))


def _label_counts(task: Task) -> tuple[LabelCount, ...]:
    train = Counter(example.answer for example in task.train)
    test = Counter(example.answer for example in task.test)
    counts = [LabelCount(label, train[label], test[label]) for label in task.labels or ()]
    return tuple(sorted(counts, key=lambda count: -count.num_train))


def _majority_share(task: Task) -> float | None:
    """Share of test rows that have the label most frequent in training."""
    if not task.labels or not task.test:
        return None
    majority = _label_counts(task)[0].label
    return sum(example.answer == majority for example in task.test) / len(task.test)


def _repeats(examples: Iterable[Example]) -> tuple[int, int]:
    """Count examples whose query stood before, and those of them with another answer."""
    answers_of: dict[str, set[str]] = {}
    num_repeated = num_contradictions = 0
    for example in examples:
        key = normalised(example.query.text)
        if key in answers_of:
            num_repeated += 1
            num_contradictions += example.answer not in answers_of[key]
        answers_of.setdefault(key, set()).add(example.answer)
    return num_repeated, num_contradictions


def _beginnings(spelled: Mapping[str, Sequence[object]]) -> tuple[tuple[str, str], ...]:
    """Find pairs of labels of which the first, as spelled, begins the second or equals it.

    Beginnings are looked up by slice, so that hundreds of labels cost no square of comparisons.
    """
    by_spelling: dict[tuple[object, ...], list[str]] = {}
    for label, spelling in spelled.items():
        by_spelling.setdefault(tuple(spelling), []).append(label)
    pairs = []
    for label, spelling in spelled.items():
        for end in range(1, len(spelling) + 1):
            for first in by_spelling.get(tuple(spelling[:end]), ()):
                if first != label and (end < len(spelling) or first < label):
                    pairs.append((first, label))
    return tuple(pairs)


def _joined_share(task: Task, examples: Sequence[Example], encoder: Encoder) -> float:
    """Share of examples whose pieces, as second shot of an episode, equal the tokens of the joined text."""
    opening = task.train[0]
    num_equal = 0
    for example in examples:
        episode = Episode(task.name, task.instruction(), (opening, example))
        num_equal += encoder.encode_episode(episode).token_ids == encoder.joined_ids(episode)
    return num_equal / len(examples)


def _shots_that_fit(
    task: Task, encoder: Encoder, max_context_tokens: int, shot_lengths: Sequence[int], longest_answer: int
) -> ShotsThatFit:
    """Count shots of median length, and shots at their longest, that leave room to ask."""
    queries = [example.query for example in task.test or task.train]
    reserve = num_tokens_for_asking(task, encoder, task.max_answer_tokens or longest_answer, queries)
    room = max_context_tokens - encoder.num_opening_tokens(task.instruction()) - reserve
    filled = accumulate(sorted(shot_lengths, reverse=True))
    return ShotsThatFit(
        typical=max(0, min(len(shot_lengths), room // median_low(shot_lengths))),
        guaranteed=sum(num_tokens <= room for num_tokens in filled),
    )
