"""One file of rows -> training and test examples, by fraction and seed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping, Sequence

from manyicl.errors import UserError, pluralized
from manyicl.tasks.example import Example
from manyicl.tasks.leakage import normalised
from manyicl.tasks.schema import OneFile

Sides = tuple[tuple[Example, ...], tuple[Example, ...]]


def split(examples: Sequence[Example], data: OneFile, group_of_row: Mapping[str, str], is_closed: bool) -> Sides:
    """Split examples into training and test; whole groups, where a column ties rows, and no repeat across sides.

    Rows with the same query count as one group, so that a repeat does not fall to the other side. Of closed
    labels, the first row of each stays in training unless groups forbid it: a label never shown cannot be given.

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
    kept: set[str] = set()
    if is_closed and not group_of_row:
        first_of_label: dict[str, str] = {}
        rank = {group: position for position, group in enumerate(order)}
        for example, group in sorted(zip(examples, groups, strict=True), key=lambda pair: rank[pair[1]]):
            first_of_label.setdefault(example.answer, group)
        kept = set(first_of_label.values())
    sizes = Counter(groups)
    num_wanted = max(1, round(len(examples) * data.test_fraction)) if data.test_fraction > 0 else 0
    test_groups: set[str] = set()
    num_test = 0
    for group in order:
        if num_test >= num_wanted:
            break
        if group not in kept:
            test_groups.add(group)
            num_test += sizes[group]
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
