"""What every task must satisfy, in rows and in tokens: everything that `manyicl tasks check` reports."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from statistics import median_low

from manyicl.episodes.budget import max_answer_tokens, num_tokens_for_asking
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.errors import differing_parts, pluralized, shortened
from manyicl.tasks.demonstrations import evenly_chosen
from manyicl.tasks.leakage import ON_BOTH_SIDES, normalised
from manyicl.tasks.task import Example, Task
from manyicl.tasks.words import folded, without_invisible

FEW_TEST_ROWS = 30
ONE_SIDED_SHARE = 0.9
# Labels, or pairs of them, that a sentence is made of; what is left is counted.
MOST_NAMED = 5

# Zero-width spaces, direction marks, soft hyphens, byte order marks; joiners, which scripts need, at an end alone.
_UNSEEN = re.compile("[\u00ad\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u2069\ufeff]|^[\u200c\u200d]|[\u200c\u200d]$")


@dataclass(frozen=True, slots=True)
class Lengths:
    """The spread of a length, in tokens."""

    shortest: int
    median: int
    longest: int


@dataclass(frozen=True, slots=True)
class LabelCount:
    """How often a label occurs on each side."""

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
class Contradiction:
    """A query that has several answers.

    Attributes:
        query: Its text where it comes first.
        answers: Each answer, with the origin of the first row that gives it.
    """

    query: str
    answers: Mapping[str, str]

    def __str__(self) -> str:
        """Say it in a sentence."""
        given = " and ".join(f"{shortened(answer, 60)!r} in {origin}" for answer, origin in self.answers.items())
        return f"The query {shortened(self.query, 60)!r} has {len(self.answers)} different answers: {given}."


@dataclass(frozen=True, slots=True)
class TaskCheck:
    """What is known of a task before anything is trained.

    Attributes:
        name: Name of the task.
        family: Family of the task.
        num_train: Rows that may become demonstrations.
        num_test: Rows that are only test queries.
        labels: The closed answer set with its balance, most frequent first; empty for free answers.
        majority_share: Share of the most frequent label among test rows, the trivial baseline.
        query_tokens: Lengths of queries with their separator, both sides.
        answer_tokens: Lengths of answers with their end-of-answer text, both sides.
        num_repeated: Training rows whose query came before in training.
        num_contradictions: Of these, rows with another answer than before.
        contradictions: Queries that have several answers, on either side.
        num_on_both_sides: Training rows dropped because their query is in test.
        dropped: Reason -> number of rows dropped when the task was read.
        dropped_rows: Reason -> origins of the first of these rows.
        labels_in_labels: Pairs of labels of which the first begins the second, as text.
        labels_in_labels_as_tokens: The same among their tokens, which only the end-of-answer text keeps apart.
        joined_share: Share of examined examples whose segments equal the tokens of the joined text.
        num_altered_answers: Examined answers that their tokens do not give back.
        num_examined: Examples encoded for the two figures above.
        shots_that_fit: Number of shots that fit the given context.
        problems: What the user should look at, in sentences; empty when all is well.
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
    contradictions: tuple[Contradiction, ...]
    num_on_both_sides: int
    dropped: Mapping[str, int]
    dropped_rows: Mapping[str, tuple[str, ...]]
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
        encoder: Encoder of the model that the task is meant for.
        max_context_tokens: Context for which fitting shots are counted.
        num_examined: Most examples that are encoded twice, to compare segments with the joined text.

    Raises:
        UserError: If answers contain the end-of-answer text of the model, or are free in the channel form.
    """
    encoder.require_suitable_answers(task)
    everything = (*task.train, *task.test)
    query_lengths = [len(encoder.query_ids_uncached(example.query.text)) for example in everything]
    answer_lengths = [len(encoder.answer_ids(example.answer)) for example in everything]
    between = encoder.num_inter_turn_tokens
    shot_lengths = [q + a + between for q, a in zip(query_lengths, answer_lengths, strict=True)][: len(task.train)]
    examined = evenly_chosen(task.train, task.test, num_examined)
    num_repeated, num_contradictions = _repeats(task.train)
    labels = task.labels or ()
    counts = _label_counts(task)
    alike = _beginnings({label: encoder.answer_ids(label) for label in labels})
    in_tokens = _beginnings({label: encoder.segment_ids(label) for label in labels})
    check = TaskCheck(
        name=task.name,
        family=task.family,
        num_train=len(task.train),
        num_test=len(task.test),
        labels=counts,
        majority_share=counts[0].num_test / len(task.test) if counts and task.test else None,
        query_tokens=_lengths(query_lengths),
        answer_tokens=_lengths(answer_lengths),
        num_repeated=num_repeated,
        num_contradictions=num_contradictions,
        contradictions=_contradictions(everything),
        num_on_both_sides=task.dropped.get(ON_BOTH_SIDES, 0),
        dropped=task.dropped,
        dropped_rows=task.dropped_rows,
        labels_in_labels=_beginnings({label: label for label in labels}),
        labels_in_labels_as_tokens=tuple(sorted(set(in_tokens) - set(alike))),
        joined_share=_joined_share(task, examined, encoder),
        num_altered_answers=sum(encoder.decode(encoder.segment_ids(e.answer)) != e.answer for e in examined),
        num_examined=len(examined),
        shots_that_fit=_shots_that_fit(task, encoder, max_context_tokens, shot_lengths),
        problems=(),
    )
    room = max_context_tokens - encoder.num_preamble_tokens(task.instruction())
    num_too_long = sum(length > room for length in shot_lengths)
    return replace(check, problems=tuple(_problems(check, max_context_tokens, room, num_too_long, alike)))


def _problems(
    check: TaskCheck, max_context_tokens: int, room: int, num_too_long: int, alike: Sequence[tuple[str, str]]
) -> Iterator[str]:
    """Say what the user should look at.

    Args:
        check: All else that is known.
        max_context_tokens: Tokens of the context.
        room: Those that the instruction leaves.
        num_too_long: Training rows that are longer than that.
        alike: Labels whose tokens, with their end, do not differ.
    """
    labels = [count.label for count in check.labels]
    if room <= 0:
        yield (
            f"The instruction alone needs {max_context_tokens - room:,} tokens and fills the context of "
            f"{max_context_tokens:,}; no query fits after it."
        )
    never_shown = [count.label for count in check.labels if count.num_train == 0]
    sentences = [
        f"The label {label!r} is in no training row, so no demonstration can show it." for label in never_shown
    ]
    yield from _first_of(sentences, "labels are in no training row")
    if check.majority_share is not None and check.majority_share >= ONE_SIDED_SHARE:
        yield f"{check.majority_share:.0%} of the test rows have one label; accuracy says little, prefer macro_f1."
    sentences = [
        f"The labels {one!r} and {other!r} are the same to this tokenizer; rename one." for one, other in alike
    ]
    yield from _first_of(sentences, "pairs of labels are the same to this tokenizer")
    yield from _first_of(look_alikes(labels), "labels look like another one")
    yield from _first_of(unseen_characters(labels), "labels hold invisible characters")
    if check.num_test == 0:
        yield "There are no test rows; the task can be used, not evaluated."
    elif check.num_test < FEW_TEST_ROWS:
        verb = "is" if check.num_test == 1 else "are"
        yield f"There {verb} only {pluralized(check.num_test, 'test row')}; scores will have wide intervals."
    if check.num_contradictions:
        yield f"A query comes again with another answer in {pluralized(check.num_contradictions, 'training row')}."
    yield from _first_of(list(map(str, check.contradictions)), "queries have several answers")
    if check.num_altered_answers:
        yield (
            f"Of {pluralized(check.num_examined, 'answer')}, {check.num_altered_answers} would come back altered from "
            "their tokens; this tokenizer loses characters."
        )
    if num_too_long and room > 0:
        rows = pluralized(num_too_long, "training row")
        yield f"Too long for {max_context_tokens:,} tokens, and never shown: {rows}."
    if check.shots_that_fit.guaranteed == 0:
        yield f"In {max_context_tokens:,} tokens, some queries leave no room for the longest demonstration."


def look_alikes(labels: Iterable[str]) -> list[str]:
    """Say which labels are easily confused: two that differ in nothing that is easily seen.

    They stay two labels; only the user knows which is meant, and how to write them as one.
    """
    groups: defaultdict[str, list[str]] = defaultdict(list)
    for label in labels:
        groups[" ".join(folded(label).split())].append(label)
    return [
        f"The labels {first!r} and {second!r} are two, and differ only in {_difference(first, second)}."
        f"{_one_label(first, second)}"
        for group in groups.values()
        for first, second in pairwise(sorted(group))
    ]


# Answer templates that unite labels, and what they do.
_UNITING: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("label | lower", str.lower),
    ("label.split() | join(' ')", lambda label: " ".join(label.split())),
    ("label.lower().split() | join(' ')", lambda label: " ".join(label.lower().split())),
)


def _one_label(first: str, second: str) -> str:
    """Name the answer template that makes two labels one, if one of a few does."""
    template = next((source for source, unite in _UNITING if unite(first) == unite(second)), None)
    if template is None:
        return ""
    return f' If they are one, write `answer: "{{{{ {template} }}}}"` in a task.yaml, with your column for `label`.'


def _difference(first: str, second: str) -> str:
    """Name what two labels that look alike differ in, and the code points where they do."""
    kinds = {
        "case": (first.casefold(), second.casefold()),
        "how letters are composed": (unicodedata.normalize("NFC", first), unicodedata.normalize("NFC", second)),
        "invisible characters": (without_invisible(first), without_invisible(second)),
        "white space": (" ".join(first.split()), " ".join(second.split())),
        "case and white space": (" ".join(first.casefold().split()), " ".join(second.casefold().split())),
    }
    kind = next((name for name, (one, other) in kinds.items() if one == other), "the form of their characters")
    one, other = map(_code_points, differing_parts(first, second))
    return f"{kind}: {one} and {other}"


def unseen_characters(labels: Iterable[str]) -> list[str]:
    """Say which labels hold invisible characters, which are lost when the label is typed."""
    return [
        f"The label {label!r} holds invisible characters: {_code_points(found)}."
        for label in labels
        if (found := "".join(_UNSEEN.findall(label)))
    ]


def _code_points(text: str) -> str:
    return " ".join(f"U+{ord(character):04X}" for character in text) or "nothing"


def _first_of(sentences: Sequence[str], what: str) -> Iterator[str]:
    """Yield the first sentences, and one that counts the others."""
    yield from sentences[:MOST_NAMED]
    if len(sentences) > MOST_NAMED:
        yield f"{len(sentences) - MOST_NAMED:,} more {what}."


def _lengths(lengths: Sequence[int]) -> Lengths:
    return Lengths(min(lengths), median_low(lengths), max(lengths))


def _label_counts(task: Task) -> tuple[LabelCount, ...]:
    train = Counter(example.answer for example in task.train)
    test = Counter(example.answer for example in task.test)
    counts = [LabelCount(label, train[label], test[label]) for label in task.labels or ()]
    return tuple(sorted(counts, key=lambda count: -count.num_train))


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


def _contradictions(examples: Iterable[Example]) -> tuple[Contradiction, ...]:
    """Find queries with several answers, in the order in which they come first."""
    first_of: dict[str, Example] = {}
    answers_of: dict[str, dict[str, str]] = {}
    for example in examples:
        key = normalised(example.query.text)
        first = first_of.setdefault(key, example)
        if example.answer != first.answer:
            answers_of.setdefault(key, {first.answer: first.origin}).setdefault(example.answer, example.origin)
    return tuple(Contradiction(first_of[key].query.text, answers) for key, answers in answers_of.items())


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
    """Share of examples whose segments, as second shot of an episode, equal the tokens of the joined text.

    Instruction and first shot are the same for all and are compared once: an instruction may list 10,000 labels.
    """
    opening = task.train[0]
    beginning = Episode(task.name, task.instruction(), (opening,))
    if encoder.encode_episode(beginning).token_ids != encoder.joined_ids(beginning):
        return 0.0
    num_equal = 0
    for example in examples:
        episode = Episode(task.name, "", (opening, example))
        num_equal += encoder.encode_episode(episode).token_ids == encoder.joined_ids(episode)
    return num_equal / len(examples)


def _shots_that_fit(task: Task, encoder: Encoder, max_context_tokens: int, shot_lengths: Sequence[int]) -> ShotsThatFit:
    """Count shots of median length, and shots at their longest, that leave room to ask."""
    queries = [example.query for example in task.test or task.train]
    reserve = num_tokens_for_asking(task, encoder, max_answer_tokens(task), queries)
    room = max_context_tokens - encoder.num_preamble_tokens(task.instruction()) - reserve
    filled = accumulate(sorted(shot_lengths, reverse=True))
    return ShotsThatFit(
        typical=max(0, min(len(shot_lengths), room // median_low(shot_lengths))),
        guaranteed=sum(num_tokens <= room for num_tokens in filled),
    )
