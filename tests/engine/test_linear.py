"""A classifier of texts by their words: its probabilities, and what it says of labels without an example."""

from __future__ import annotations

import numpy as np
import pytest

from manyicl.engine.linear import WordClassifier
from manyicl.tasks.task import Example
from tests.builders import make_example

RED = [make_example(f"a warm rose number {i}", "red") for i in range(6)]
BLUE = [make_example(f"the cold sea number {i}", "blue") for i in range(4)]
LABELS = ("green", "red", "blue", "grey")


@pytest.mark.parametrize(
    "examples",
    [[*RED, *BLUE], [*RED, *BLUE[:1]], RED, [make_example("!!", "red"), make_example("??", "blue")]],
    ids=["two labels", "a single example", "one label", "no words"],
)
def test_probabilities_sum_to_one_and_labels_without_examples_share_what_counts_as_one_each(
    examples: list[Example],
) -> None:
    found = np.exp(WordClassifier.fit(examples).log_probabilities(["a rose", "", "zebra"], LABELS))
    assert found.sum(axis=1) == pytest.approx(1)
    absent = [n for n, label in enumerate(LABELS) if label not in {example.answer for example in examples}]
    assert found[:, absent] == pytest.approx(1 / (len(examples) + len(absent)))


def test_the_most_probable_label_is_the_answer() -> None:
    classifier = WordClassifier.fit([*RED, *BLUE])
    texts = ["a rose", "cold", "the warm sea number 3", "zebra"]
    best = classifier.log_probabilities(texts, LABELS).argmax(axis=1)
    assert [LABELS[number] for number in best] == classifier.answers(texts)
    assert classifier.answers(["rose", "sea"]) == ["red", "blue"]


def test_without_words_labels_are_counted() -> None:
    blue = [make_example("!!", "red"), make_example("??", "blue"), make_example("..", "blue")]
    assert WordClassifier.fit(blue).answers(["?", "rose"]) == ["blue", "blue"]
    assert WordClassifier.fit(RED).answers(["sea"]) == ["red"]


def test_no_text_gives_no_row() -> None:
    assert WordClassifier.fit([*RED, *BLUE]).log_probabilities([], LABELS).shape == (0, 4)
