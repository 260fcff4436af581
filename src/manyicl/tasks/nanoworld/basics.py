"""What the tiny base is trained on before it ever sees a task of the five families.

Lists and pairs teach looking things up in the context; the skills teach the steps that the families need (kinds of
words, picking by kind, arithmetic), under fixed English words or a few coined cues, in other surface forms; plain text
keeps the language. Like everything here they are written as ordinary tasks: many small ones, so that what a coined word
stands for must be read from the context.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter

from manyicl.tasks.nanoworld.families import OPERATIONS
from manyicl.tasks.nanoworld.rule import Rule, dealt, shuffled
from manyicl.tasks.nanoworld.words import COINED, DIGITS, EVERY_WORD, FILLERS, KINDS

DrawnRow = tuple[str, str]  # query, answer


def _exercise(draw_example: Callable[[random.Random], DrawnRow]) -> Rule:
    """Make a rule of a function that draws a query with its answer; bindings are not compared, for it is no family."""
    return Rule(
        "generation",
        "{{ text }}",
        lambda rng: dict(zip(("text", "answer"), draw_example(rng), strict=True)),
        itemgetter("answer"),
    )


def draw_list(rng: random.Random) -> Rule:
    """One or two cue words among fillers -> the word they are filed under; 2 to 8 such words, 1 to 4 cues each."""
    num_answers, num_cues = rng.randint(2, 8), rng.randint(1, 4)
    words = rng.sample(_lookup_words(rng), num_answers * (1 + num_cues))
    answer_of = dealt(words[num_answers:], words[:num_answers])
    fillers = [word for word in FILLERS if word not in words]
    most_fillers, often_two = rng.randint(2, 4), rng.random() < 0.4

    def draw_example(rng: random.Random) -> DrawnRow:
        answer = rng.choice(words[:num_answers])
        cues = [cue for cue, its_answer in answer_of.items() if its_answer == answer]
        some = rng.sample(cues, min(num_cues, 2 if often_two and rng.random() < 0.5 else 1))
        return " ".join(shuffled(some + rng.sample(fillers, rng.randint(1, most_fillers)), rng)), answer

    return _exercise(draw_example)


def draw_pair(rng: random.Random) -> Rule:
    """Two cue words among fillers decide together; for some cues the second turns the answer around."""
    num_answers, num_firsts = rng.randint(2, 4), rng.randint(2, 6)
    words = rng.sample(_lookup_words(rng), num_answers + num_firsts + 2)
    answers, firsts, seconds = words[:num_answers], words[num_answers:-2], words[-2:]
    table: dict[DrawnRow, str] = {}
    turns = rng.random() < 0.6
    for first in firsts:
        choice = rng.randrange(num_answers)
        for number, second in enumerate(seconds):
            turned = answers[choice] if choice >= 2 else answers[(choice + number) % 2]
            table[first, second] = turned if turns else rng.choice(answers)
    fillers = [word for word in FILLERS if word not in words]
    most_fillers = rng.randint(2, 3)

    def draw_example(rng: random.Random) -> DrawnRow:
        pair = rng.choice(firsts), rng.choice(seconds)
        terms = list(pair)
        for filler in rng.sample(fillers, rng.randint(1, most_fillers)):
            terms.insert(rng.randint(0, len(terms)), filler)
        return " ".join(terms), table[pair]

    return _exercise(draw_example)


def draw_pick(rng: random.Random, num_picked: int = 1) -> Rule:
    """Words of several kinds in any order -> the ones of the kinds that the task is about, in its order."""
    kinds = rng.sample(list(KINDS), rng.randint(2, 5))
    picked = rng.sample(kinds, num_picked)

    def draw_example(rng: random.Random) -> DrawnRow:
        context, word_of = _words_of(kinds, rng)
        return context, " ".join(word_of[kind] for kind in picked)

    return _exercise(draw_example)


def draw_ask(rng: random.Random) -> Rule:
    """``place of hen lima rice`` -> ``lima``: one or two kinds, requested by their English names."""
    kinds, num_requested = rng.sample(list(KINDS), rng.randint(3, 5)), rng.choice([1, 1, 2])

    def draw_example(rng: random.Random) -> DrawnRow:
        context, word_of = _words_of(kinds, rng)
        requested = rng.sample(kinds, num_requested)
        return f"{' '.join(requested)} of {context}", " ".join(word_of[kind] for kind in requested)

    return _exercise(draw_example)


def draw_cued_pick(rng: random.Random) -> Rule:
    """One of 2 to 4 coined cues, before or after words of several kinds -> the words of its kinds."""
    kinds, cues = rng.sample(list(KINDS), rng.randint(2, 5)), rng.sample(COINED, rng.randint(2, 4))
    num_picked = min(rng.choice([1, 1, 2]), len(kinds))
    picked_by = {cue: rng.sample(kinds, num_picked) for cue in cues}
    cue_first = rng.random() < 0.5

    def draw_example(rng: random.Random) -> DrawnRow:
        context, word_of = _words_of(kinds, rng)
        cue = rng.choice(cues)
        query = f"{cue} {context}" if cue_first else f"{context} {cue}"
        return query, " ".join(word_of[kind] for kind in picked_by[cue])

    return _exercise(draw_example)


def draw_kind(rng: random.Random) -> Rule:
    """``kind of hen lima`` -> ``animal place``."""

    def draw_example(rng: random.Random) -> DrawnRow:
        kinds = [rng.choice(list(KINDS)) for _ in range(rng.randint(1, 3))]
        return "kind of " + " ".join(rng.choice(KINDS[kind]) for kind in kinds), " ".join(kinds)

    return _exercise(draw_example)


def draw_named_operation(rng: random.Random) -> Rule:
    """``sum of 4 8`` -> ``2``: arithmetic under English names."""
    return _operations({f"{name} of": name for name in OPERATIONS})


def draw_one_operation(rng: random.Random) -> Rule:
    """``4 often 8`` -> ``2``: one operation that the whole task is about."""
    name, between = rng.choice(list(OPERATIONS)), rng.choice(FILLERS)

    def draw_example(rng: random.Random) -> DrawnRow:
        first, second = rng.choice(DIGITS), rng.choice(DIGITS)
        return f"{first} {between} {second}", _computed(name, first, second)

    return _exercise(draw_example)


def draw_cued_operation(rng: random.Random) -> Rule:
    """``gizel 4 8`` -> ``2``: two or three coined cues, each for an operation."""
    return _operations({cue: rng.choice(list(OPERATIONS)) for cue in rng.sample(COINED, rng.randint(2, 3))})


def _operations(operation_of: Mapping[str, str]) -> Rule:
    def draw_example(rng: random.Random) -> DrawnRow:
        cue, first, second = rng.choice(list(operation_of)), rng.choice(DIGITS), rng.choice(DIGITS)
        return f"{cue} {first} {second}", _computed(operation_of[cue], first, second)

    return _exercise(draw_example)


def draw_text(rng: random.Random) -> Rule:
    """A sentence, and the sentences that follow it: plain text of this world, every word of it a target."""

    def draw_example(rng: random.Random) -> DrawnRow:
        sentences = [draw_sentence(rng) for _ in range(rng.randint(3, 5))]
        return sentences[0], " ".join(sentences[1:])

    return _exercise(draw_example)


def draw_sentence(rng: random.Random) -> str:
    """Draw a sentence in one of four forms."""
    name = rng.choice(KINDS["name"])
    form = rng.randrange(4)
    if form == 0:
        words = {kind: rng.choice(KINDS[kind]) for kind in ("action", "colour", "object", "place", "day")}
        return "{name} {action} the {colour} {object} in {place} on {day} .".format(name=name, **words)
    if form == 1:
        return f"{name} likes {rng.choice(KINDS['food'])} but hates {rng.choice(KINDS['animal'])} ."
    if form == 2:
        first, second = rng.sample(COINED, 2)
        return f"{name} said : {rng.choice(FILLERS)} {first} {rng.choice(FILLERS)} ; {rng.choice(FILLERS)} {second} ?"
    first, second = rng.choice(DIGITS), rng.choice(DIGITS)
    return f"the sum of {first} {second} is {_computed('sum', first, second)} ."


def _lookup_words(rng: random.Random) -> Sequence[str]:
    """Look up coined words mostly, and words of every sort sometimes."""
    return EVERY_WORD if rng.random() < 0.3 else COINED


def _words_of(kinds: Sequence[str], rng: random.Random) -> tuple[str, dict[str, str]]:
    """Draw a word of each kind; return them in any order as text, and by kind."""
    word_of = {kind: rng.choice(KINDS[kind]) for kind in kinds}
    return " ".join(shuffled(list(word_of.values()), rng)), word_of


def _computed(operation: str, first: str, second: str) -> str:
    return str(OPERATIONS[operation](int(first), int(second)))


@dataclass(frozen=True)
class Exercise:
    """How many tasks of one kind the base gets; with its share in a recipe, how well it comes to know it."""

    draw: Callable[[random.Random], Rule]
    num_tasks: int


BASICS: dict[str, Exercise] = {
    "list": Exercise(draw_list, 1600),
    "pair": Exercise(draw_pair, 1200),
    "pick": Exercise(draw_pick, 400),
    "pick-two": Exercise(partial(draw_pick, num_picked=2), 400),
    "ask": Exercise(draw_ask, 200),
    "cued-pick": Exercise(draw_cued_pick, 800),
    "kind": Exercise(draw_kind, 100),
    "named-operation": Exercise(draw_named_operation, 20),
    "one-operation": Exercise(draw_one_operation, 300),
    "cued-operation": Exercise(draw_cued_operation, 800),
    "text": Exercise(draw_text, 40),
}
