"""One file of rows -> training and test examples, by fraction and seed."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from manyicl.errors import UserError, pluralized
from manyicl.tasks.example import Example
from manyicl.tasks.leakage import normalised
from manyicl.tasks.schema import OneFile

Sides = tuple[tuple[Example, ...], tuple[Example, ...]]


def split(examples: Sequence[Example], data: OneFile, group_of_row: Mapping[str, str], is_closed: bool) -> Sides:
    """Split examples into training and test; whole groups, where a column ties rows, and no repeat across sides.

    Rows with the same query count as one group, so that a repeat does not fall to the other side. Closed labels are
    stratified unless groups forbid it: each has its share of the test rows, and its first row stays in training, for a
    label never shown cannot be given.

    Args:
        examples: All examples.
        data: Fraction and seed.
        group_of_row: Origin of a row -> its group, where a column says so.
        is_closed: Whether the answers are labels.

    Raises:
        UserError: If no example is left for training, or none for testing.
    """
    groups = [group_of_row.get(example.origin) or normalised(example.query.text) for example in examples]
    order = sorted(set(groups))
    random.Random(f"split {data.seed}").shuffle(order)
    sizes = Counter(groups)
    num_wanted = max(1, round(len(examples) * data.test_fraction)) if data.test_fraction > 0 else 0
    if is_closed and not group_of_row:
        test_groups = _stratified(examples, groups, order, num_wanted)
    else:
        test_groups = _first_groups(order, sizes, num_wanted)
    sides = list(zip(examples, groups, strict=True))
    train = tuple(example for example, group in sides if group not in test_groups)
    test = tuple(example for example, group in sides if group in test_groups)
    if not train or (num_wanted and not test):
        side = "test" if train else "training"
        rows = f"{pluralized(len(examples), 'row')} in {pluralized(len(order), 'group')}"
        what = f"the split leaves no {side} rows: test_fraction is {data.test_fraction:g} of {rows}"
        remedy = "Set test_fraction to 0, or add rows: those with equal queries are a group, which stays on one side"
        remedy += ", and the first row of each label stays in training." if is_closed else "."
        raise UserError(f"no_{side}_rows", what, remedy=remedy)
    return train, test


def _first_groups(order: Sequence[str], sizes: Mapping[str, int], num_wanted: int) -> set[str]:
    """Take groups in their order until they hold the wanted number of rows.

    One with which there would be more than twice as many is passed over; if no other is there, the smallest is taken.
    """
    taken: set[str] = set()
    num_rows = 0
    for group in order:
        if num_rows >= num_wanted:
            break
        if num_rows + sizes[group] <= 2 * num_wanted:
            taken.add(group)
            num_rows += sizes[group]
    if num_wanted and order and not taken:
        taken.add(min(order, key=lambda group: sizes[group]))
    return taken


def _stratified(examples: Sequence[Example], groups: Sequence[str], order: Sequence[str], num_wanted: int) -> set[str]:
    """Take groups of each label, in their order, until they hold the label's share of the wanted rows.

    A group whose rows have several labels is one of its most frequent label. The first row of a label, in that order,
    stays in training with its group.
    """
    answers_of: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for example, group in zip(examples, groups, strict=True):
        answers_of[group][example.answer] += 1
    kept: dict[str, str] = {}
    groups_of: defaultdict[str, list[str]] = defaultdict(list)
    for group in order:
        for label in answers_of[group]:
            kept.setdefault(label, group)
        groups_of[answers_of[group].most_common(1)[0][0]].append(group)
    stays = set(kept.values())
    free = {label: [group for group in members if group not in stays] for label, members in groups_of.items()}
    sizes = {group: answers.total() for group, answers in answers_of.items()}
    num_rows = Counter(example.answer for example in examples)
    most = {label: sum(sizes[group] for group in members) for label, members in free.items()}
    quotas = _quotas({label: num_rows[label] for label in free}, most, num_wanted)
    return set().union(*(_first_groups(free[label], sizes, quota) for label, quota in quotas.items()))


def _quotas(num_rows: Mapping[str, int], most: Mapping[str, int], num_wanted: int) -> dict[str, int]:
    """Share out the wanted test rows in proportion to the rows of each label, as the largest remainders say.

    Labels with equal remainders come in their order; what a label cannot give falls to the others.

    >>> _quotas({"a": 6, "b": 5, "c": 5}, {"a": 5, "b": 4, "c": 4}, 3)
    {'a': 1, 'b': 1, 'c': 1}
    """
    total = sum(num_rows.values())
    ideal = {label: num_wanted * number / total for label, number in num_rows.items()}
    quotas = {label: min(int(ideal[label]), most[label]) for label in num_rows}
    while missing := num_wanted - sum(quotas.values()):
        able = sorted(
            (label for label in quotas if quotas[label] < most[label]), key=lambda label: quotas[label] - ideal[label]
        )
        if not able:
            break
        for label in able[:missing]:
            quotas[label] += 1
    return quotas
