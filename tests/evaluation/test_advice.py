"""Numbers of one pass -> what to do, and nothing about what was not measured."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from manyicl.evaluation.advice import Retrieval, advice, first_compared

TFIDF, MAJORITY = "TF-IDF with logistic regression", "Always giving the most frequent answer"


def scores(share: float, number: int) -> list[float]:
    """Right answers spread evenly, so many in a hundred."""
    return [float(int((n + 1) * share + 1e-9) > int(n * share + 1e-9)) for n in range(number)]


def by_doubling(*shares: float, last: int | None = None) -> list[float]:
    """Right answers after 0, 1, 2-3, 4-7, … shots; the last group may be shorter."""
    found: list[float] = []
    for group, share in enumerate(shares):
        size = 1 if group == 0 else 2 ** (group - 1)
        found += scores(share, last if last is not None and group == len(shares) - 1 else size)
    return found


def said(
    right: Sequence[float],
    baselines: dict[str, Sequence[float]] | None = None,
    nats: Sequence[float] | None = None,
    retrieval: Retrieval | None = None,
) -> list[str]:
    return advice(right, [1.0] * len(right) if nats is None else nats, baselines or {}, retrieval)


def test_a_baseline_that_beats_the_model_comes_first() -> None:
    right = scores(0.5, 120)
    first, *others = said(right, {MAJORITY: scores(0.2, 60), TFIDF: scores(0.9, 60)})
    assert first.startswith(f"{TFIDF} is better than the model: right on 0.90 of the last 60 demonstrations")
    assert "the model on 0.50 (+0.40 ± " in first
    assert not any("better than" in sentence for sentence in others)


def test_a_difference_within_the_noise_is_a_tie() -> None:
    right = scores(0.8, 120)
    first, *_ = said(right, {TFIDF: scores(0.75, 60), MAJORITY: scores(0.2, 60)})
    assert first.startswith(f"{TFIDF} ties with the model within the noise: right on 0.75")


def test_a_model_that_is_better_says_how_good_the_best_baseline_is() -> None:
    first, *_ = said(scores(0.9, 120), {MAJORITY: scores(0.2, 60), TFIDF: scores(0.4, 60)})
    assert first.startswith("The model is better than trivial baselines: right on 0.90")
    assert first.endswith("The best of them is right on 0.40: TF-IDF with logistic regression.")
    first, *_ = said(scores(0.9, 120), {MAJORITY: scores(0.2, 60)})
    assert first.endswith("right on 0.20: always giving the most frequent answer.")


def test_what_must_be_known_of_the_baselines_follows_the_comparison() -> None:
    right = scores(0.5, 120)
    note = "TF-IDF was not measured."
    found = advice(right, [1.0] * 120, {MAJORITY: scores(0.2, 60)}, notes=[note])
    assert found[1] == note
    assert note not in advice(right[:8], [1.0] * 8, {}, notes=[note])


@pytest.mark.parametrize("number", [0, 1, 2, 3, 14, 15])
def test_a_few_demonstrations_are_compared_with_nothing(number: int) -> None:
    half = number - first_compared(number)
    assert half < 8
    assert said(scores(0.0, number), {TFIDF: scores(1.0, half)}) == [
        "Too few demonstrations to say whether more would help."
    ]


def test_the_last_half_is_compared_and_never_the_first_demonstration() -> None:
    assert [(n, first_compared(n)) for n in (1, 2, 3, 16, 239)] == [(1, 1), (2, 1), (3, 2), (16, 8), (239, 120)]


def test_fewer_shots_that_are_as_good_are_advised_with_both_scores() -> None:
    right = by_doubling(0, 0, 0.5, 0.5, 0.75, 0.8, 0.81, 0.8, 0.79, last=111)
    assert len(right) == 239
    (sentence,) = said(right)
    assert sentence.startswith("32–63 shots give 0.78, 128–238 give 0.78, a tie within the noise (")
    assert sentence.endswith("`--shots 64` is 3.7 times smaller and, as far as this shows, as good.")


def test_where_the_smallest_prefix_is_worse_the_next_is_advised() -> None:
    right = by_doubling(0, 0, 0.5, 0.5, 0.5, 0.5, 0.3, 0.9, 0.9)
    (sentence,) = said(right)
    assert len(right) == 256
    assert "64–127 shots give" in sentence
    assert "`--shots 128` is 2 times smaller" in sentence


def test_fewer_shots_are_not_called_as_good_where_answers_get_surer() -> None:
    right = by_doubling(0, 0, 0.5, 0.5, 0.75, 0.8, 0.8, 0.8, 0.8)
    (sentence,) = said(right, nats=[1.0 - n / 300 for n in range(256)])
    assert "--shots" not in sentence
    assert sentence.startswith("No clear rise")


def test_where_fewer_shots_are_better_the_best_are_advised() -> None:
    right = by_doubling(0, 0, 0.5, 0.5, 0.75, 0.8, 0.7, 0.95, 0.3)
    (sentence,) = said(right)
    assert sentence.startswith("64–127 shots give 0.94, 128–255 give 0.30 (-0.64 ± ")
    assert sentence.endswith("`--shots 128` is better, and 2 times smaller.")


@pytest.mark.parametrize("number", [63, 64, 95])
def test_too_few_answers_are_no_reason_for_fewer_shots(number: int) -> None:
    assert "--shots" not in " ".join(said(scores(0.8, number)))


def test_a_rise_at_the_last_doubling_asks_for_more_examples() -> None:
    (sentence,) = said(by_doubling(0, 0, 0, 0, 0.2, 0.2, 0.2, 0.9))
    assert sentence.startswith("Still rising at the last doubling (+0.")
    assert sentence.endswith("more examples should help.")


def test_a_few_answers_after_a_doubling_do_not_hide_its_rise() -> None:
    right = by_doubling(0, 0, 0, 0, 0.2, 0.2, 0.2, 0.9)
    for number in (1, 7, 20):
        assert said([*right, *scores(0.9, number)])[0].startswith("Still rising at the last doubling (+0.")


def test_no_rise_and_nothing_left_to_gain_are_said() -> None:
    assert said(by_doubling(0, 0, 0.5, 0.5, 0.5, 0.5))[0].startswith("No clear rise at the last doubling (")
    assert said(by_doubling(0, 0, 0.5, 0.5, 0.5, 1.0)) == ["Every one of the last was right."]


@pytest.mark.parametrize(
    ("without", "with_retrieved", "end"),
    [
        (0.4, 0.9, "compile and answer with `--retrieve 4`."),
        (0.9, 0.4, "do not retrieve."),
        (0.5, 0.525, "(+0.03 ± 0.11)."),
    ],
)
def test_retrieval_is_advised_only_where_it_was_measured(without: float, with_retrieved: float, end: str) -> None:
    right = scores(0.5, 40)
    measured = Retrieval(4, scores(without, 40), scores(with_retrieved, 40), seconds=6.4)
    *_, sentence = said(right, retrieval=measured)
    assert sentence.startswith("Measured on 40 rows that the prefix does not hold, in 6 s: ")
    assert sentence.endswith(end)
    assert ("a tie within the noise" in sentence) == (end == "(+0.03 ± 0.11).")
    assert "--retrieve" not in " ".join(said(right))
    few = Retrieval(4, scores(0.0, 15), scores(1.0, 15), num_too_long=25)
    assert said(right, retrieval=few)[:-1] == said(right)
    assert said(right, retrieval=few)[-1].endswith(
        "was not measured: 25 of 40 rows did not fit the context after the prefix, with them or without."
    )
