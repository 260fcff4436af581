"""What `manyicl tasks check` says of a task, in rows and in tokens."""

from __future__ import annotations

import pytest

from manyicl.episodes.budget import DEFAULT_MAX_ANSWER_TOKENS
from manyicl.episodes.checks import Lengths, check_task
from manyicl.episodes.encoding import Encoder
from manyicl.tasks.leakage import ON_BOTH_SIDES
from tests.builders import byte_level_bpe, make_example, make_task, word_level


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(byte_level_bpe())


def said(*problems: str) -> str:
    return " ".join(problems)


def test_a_sound_task_has_its_rows_and_balance_counted(encoder: Encoder) -> None:
    check = check_task(make_task(dropped={ON_BOTH_SIDES: 3, "empty answer": 1}), encoder, 2048)
    assert (check.num_train, check.num_test, check.num_on_both_sides) == (40, 20, 3)
    assert {count.label: (count.num_train, count.num_test) for count in check.labels} == {
        "good": (20, 10),
        "bad": (20, 10),
    }
    assert check.majority_share == 0.5
    assert (check.num_repeated, check.num_contradictions, check.num_altered_answers) == (0, 0, 0)
    assert "There are only 20 test rows" in said(*check.problems)
    assert len(check.problems) == 1


def test_lengths_are_those_the_model_sees(encoder: Encoder) -> None:
    task = make_task()
    lengths = sorted(len(encoder.query_ids(example.query.text)) for example in (*task.train, *task.test))
    assert check_task(task, encoder, 2048).query_tokens == Lengths(lengths[0], lengths[29], lengths[-1])


def test_guaranteed_shots_fit_however_they_are_drawn_and_one_more_does_not(encoder: Encoder) -> None:
    task = make_task(instruction="Judge.")
    context = 200
    fit = check_task(task, encoder, context).shots_that_fit
    longest = sorted((encoder.num_shot_tokens(example) for example in task.train), reverse=True)
    query = max(len(encoder.query_ids(example.query.text)) for example in task.test)
    answer = max(len(encoder.answer_ids(label)) for label in ("good", "bad"))
    needed = encoder.num_preamble_tokens(task.instruction()) + query + answer
    assert needed + sum(longest[: fit.guaranteed]) <= context < needed + sum(longest[: fit.guaranteed + 1])
    assert 0 < fit.guaranteed <= fit.typical < len(task.train)


def test_free_answers_keep_as_many_tokens_free_as_the_engine_does(encoder: Encoder) -> None:
    task = make_task(labels=None, max_answer_tokens=None)
    fit = check_task(task, encoder, 200).shots_that_fit
    query = max(len(encoder.query_ids(example.query.text)) for example in task.test)
    room = 200 - encoder.num_preamble_tokens(task.instruction()) - query - DEFAULT_MAX_ANSWER_TOKENS
    longest = sorted((encoder.num_shot_tokens(example) for example in task.train), reverse=True)
    assert sum(longest[: fit.guaranteed]) <= room < sum(longest[: fit.guaranteed + 1])


def test_more_shots_never_fit_than_there_are_rows(encoder: Encoder) -> None:
    fit = check_task(make_task(), encoder, 100_000).shots_that_fit
    assert (fit.guaranteed, fit.typical) == (40, 40)


def test_repeats_and_contradictions_are_counted(encoder: Encoder) -> None:
    train = [make_example(*pair) for pair in [("a b", "good"), ("A  b", "good"), ("a b", "bad"), ("c", "bad")]]
    check = check_task(make_task(train=train), encoder, 2048)
    assert (check.num_repeated, check.num_contradictions) == (2, 1)
    assert "A query comes again with another answer in 1 training row." in said(*check.problems)
    (found,) = check.contradictions
    assert (found.query, list(found.answers)) == ("a b", ["good", "bad"])
    assert str(found) in check.problems


def test_labels_that_begin_one_another_are_paired_as_text_and_as_tokens(encoder: Encoder) -> None:
    labels = ("card", "card lost", "car", "fine")
    rows = [make_example(f"q{i}", labels[i % 4]) for i in range(8)]
    check = check_task(make_task(train=rows, labels=labels), encoder, 2048)
    assert set(check.labels_in_labels) == {("car", "card"), ("car", "card lost"), ("card", "card lost")}
    ids = {label: encoder.segment_ids(label) for label in labels}
    slow = {(a, b) for a in labels for b in labels if a != b and ids[b][: len(ids[a])] == ids[a]}
    assert set(check.labels_in_labels_as_tokens) == slow


def test_a_label_never_shown_and_a_lopsided_test_side_are_problems(encoder: Encoder) -> None:
    rows = [make_example(f"q{i}", "good") for i in range(40)]
    check = check_task(make_task(train=rows[:8], test=rows[8:], labels=("good", "bad")), encoder, 2048)
    assert "The label 'bad' is in no training row" in said(*check.problems)
    assert "100% of the test rows have one label" in said(*check.problems)


def test_examples_that_a_context_cannot_hold_are_problems(encoder: Encoder) -> None:
    train = [make_example("word " * 200, "good"), *make_task().train]
    check = check_task(make_task(train=train), encoder, 120)
    assert "Too long for 120 tokens, and never shown: 1 training row." in said(*check.problems)
    assert check.shots_that_fit.guaranteed == 0


def test_pieces_that_would_merge_in_the_joined_text_are_counted(encoder: Encoder) -> None:
    """The separator ends inside the word that the answer finishes, for half of the rows."""
    assert check_task(make_task(), encoder, 2048).joined_share == 1.0
    merging = Encoder(encoder.tokenizer, encoder.format.model_copy(update={"separator": "\nth"}))
    rows = [make_example(f"q{i}", "e" if i % 2 else "!") for i in range(20)]
    check = check_task(make_task(train=rows, test=(), labels=None), merging, 2048)
    assert (check.num_examined, check.joined_share, check.num_altered_answers) == (20, 0.5, 0)


def test_a_task_without_test_rows_can_be_checked(encoder: Encoder) -> None:
    check = check_task(make_task(test=()), encoder, 2048)
    assert check.majority_share is None
    assert "can be used, not evaluated" in said(*check.problems)


def test_labels_that_are_the_same_tokens_are_not_said_to_be_kept_apart() -> None:
    rows = [make_example(f"film {i}", ("first", "second")[i % 2]) for i in range(6)]
    task = make_task(train=rows, test=rows, labels=("first", "second"))
    check = check_task(task, Encoder(word_level(["film"])), 1000)
    assert "'first' and 'second' are the same to this tokenizer" in said(*check.problems)
    assert check.labels_in_labels_as_tokens == ()
