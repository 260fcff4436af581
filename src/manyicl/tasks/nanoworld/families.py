"""The five families of hidden rules: the meaning of coined words differs from task to task."""

from __future__ import annotations

import random
from collections.abc import Callable

from manyicl.tasks.nanoworld.rule import Columns, Rule, dealt, shuffled
from manyicl.tasks.nanoworld.words import COINED, DIGITS, FILLERS, KINDS

ATTITUDES = ("likes", "hates")
NEITHER = "neither"
ASKABLE = ("name", "colour", "animal", "place", "food")
ROLES = ("name", "action", "object", "place", "day")
OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "sum": lambda a, b: (a + b) % 10,  # of which the last digit counts
    "difference": lambda a, b: abs(a - b),
    "larger": max,
    "smaller": min,
    "first": lambda a, b: a,
    "second": lambda a, b: b,
}


def draw_trigger_rule(rng: random.Random) -> Rule:
    """``again near dorik yes`` -> ``saduk``, because ``dorik`` is one of the triggers of ``saduk``.

    There are 3 to 5 labels with 4 to 6 triggers each. With up to 30 triggers, many shots are needed before each has
    been seen.
    """
    num_labels = rng.randint(3, 5)
    words = rng.sample(COINED, num_labels + num_labels * rng.randint(4, 6))
    label_of = dealt(words[num_labels:], words[:num_labels])
    labels = tuple(words[:num_labels])

    def draw_row(rng: random.Random) -> Columns:
        label = rng.choice(labels)
        triggers = [word for word, its_label in label_of.items() if its_label == label]
        words = rng.sample(triggers, rng.randint(1, 2)) + rng.sample(FILLERS, rng.randint(3, 4))
        return {"text": " ".join(shuffled(words, rng))}

    def answer(row: Columns) -> str:
        return next(label_of[word] for word in row["text"].split() if word in label_of)  # all of a row agree

    return Rule("classification", "{{ text }}", draw_row, answer, labels, frozenset(label_of.items()))


def draw_verb_rule(rng: random.Random) -> Rule:
    """``karl vafem dog ; hates ?`` -> the task's word for entailment, if ``vafem`` means hating.

    The premise says what karl does to the dog, the hypothesis asks whether he likes or hates it. It is a
    contradiction under the other attitude, and neutral for verbs that mean neither. There are 6 or 9 verbs, a third
    of them for each meaning.
    """
    words = rng.sample(COINED, 3 + rng.choice([6, 9]))
    entailment, contradiction, neutral, *verbs = words
    meaning_of = dealt(verbs, [*ATTITUDES, NEITHER])

    def draw_row(rng: random.Random) -> Columns:
        name, thing = rng.choice(KINDS["name"]), rng.choice(KINDS["food"] + KINDS["animal"])
        return {"premise": f"{name} {rng.choice(list(meaning_of))} {thing}", "hypothesis": rng.choice(ATTITUDES)}

    def answer(row: Columns) -> str:
        meaning = meaning_of[row["premise"].split()[1]]
        if meaning == NEITHER:
            return neutral
        return entailment if meaning == row["hypothesis"] else contradiction

    labels = (entailment, contradiction, neutral)
    return Rule("nli", "{{ premise }} ; {{ hypothesis }} ?", draw_row, answer, labels, frozenset(meaning_of.items()))


def draw_question_rule(rng: random.Random) -> Rule:
    """``hen lima rice jill . bigus ?`` -> ``lima``, if ``bigus`` asks for the place; 4 to 6 such words, four kinds."""
    kind_of = dealt(rng.sample(COINED, rng.randint(4, 6)), rng.sample(ASKABLE, 4))

    def draw_row(rng: random.Random) -> Columns:
        words = [rng.choice(KINDS[kind]) for kind in dict.fromkeys(kind_of.values())]
        return {"context": " ".join(shuffled(words, rng)), "question": rng.choice(list(kind_of))}

    def answer(row: Columns) -> str:
        return next(word for word in row["context"].split() if word in KINDS[kind_of[row["question"]]])

    return Rule("qa", "{{ context }} . {{ question }} ?", draw_row, answer, None, frozenset(kind_of.items()))


def draw_headline_rule(rng: random.Random) -> Rule:
    """``gumen : ben gave key in athens on sunday`` -> ``key ben``, if the desk ``gumen`` wants object and name.

    There are 2 or 3 desks, each with two roles in an order of its own.
    """
    roles_of = {desk: rng.sample(ROLES, 2) for desk in rng.sample(COINED, rng.randint(2, 3))}

    def draw_row(rng: random.Random) -> Columns:
        name, action, thing, place, day = (rng.choice(KINDS[role]) for role in ROLES)
        return {"desk": rng.choice(list(roles_of)), "article": f"{name} {action} {thing} in {place} on {day}"}

    def answer(row: Columns) -> str:
        words = row["article"].split()
        return " ".join(next(word for word in words if word in KINDS[role]) for role in roles_of[row["desk"]])

    bindings = frozenset((desk, " ".join(roles)) for desk, roles in roles_of.items())
    return Rule("summarization", "{{ desk }} : {{ article }}", draw_row, answer, None, bindings)


def draw_operator_rule(rng: random.Random) -> Rule:
    """``3 gizel 7`` -> ``7``, if ``gizel`` asks for the larger; 3 or 4 such operators."""
    operation_of = dealt(rng.sample(COINED, rng.randint(3, 4)), rng.sample(list(OPERATIONS), len(OPERATIONS)))

    def draw_row(rng: random.Random) -> Columns:
        return {"problem": f"{rng.choice(DIGITS)} {rng.choice(list(operation_of))} {rng.choice(DIGITS)}"}

    def answer(row: Columns) -> str:
        first, operator, second = row["problem"].split()
        return str(OPERATIONS[operation_of[operator]](int(first), int(second)))

    return Rule("math", "{{ problem }}", draw_row, answer, None, frozenset(operation_of.items()))
