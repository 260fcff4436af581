"""What a report says first: levels before models, ties as ties, and only what was measured."""

from __future__ import annotations

from pathlib import Path

from manyicl.evaluation.report import Part, write_report
from manyicl.evaluation.report.lines import sections
from manyicl.evaluation.report.message import message, remarks
from manyicl.evaluation.result import Result
from tests.evaluation.test_summary import scored

RIGHT, WRONG = (1.0,), (0.0,)


def points(model: str, task: str, **scores: float) -> list[Result]:
    """Return results of 100 queries after so many shots, of which so large a share was right."""
    found = []
    for shots, share in scores.items():
        right = round(100 * share)
        found.append(scored(model, task, int(shots[1:]), RIGHT * right + WRONG * (100 - right)))
    return found


def changed(record: Result, **fields: object) -> Result:
    return record.model_copy(update=fields)


def test_it_says_what_is_reached_and_by_whom() -> None:
    records = points("base", "a", s0=0.3, s64=0.4) + points("tuned", "a", s0=0.3, s64=0.85)
    text = message(Part("", records))["a"]
    assert text.startswith("After 64 examples tuned answers 85 % right (77 to 91); base 40 % right.")
    assert "tie" not in text


def test_a_difference_within_the_noise_is_a_tie() -> None:
    records = points("base", "a", s16=0.80) + points("tuned", "a", s16=0.82)
    assert "base 80 % right, a tie within the noise" in message(Part("", records))["a"]


def test_a_trivial_baseline_that_is_better_comes_first() -> None:
    records = [changed(one, tfidf=0.9, majority=0.2) for one in points("tuned", "a", s4=0.3, s16=0.4)]
    text = message(Part("", records))["a"]
    assert text.startswith(
        "TF-IDF with logistic regression is better than the model with 16 examples: 90 % right against 40."
    )
    level = [changed(one, tfidf=0.45, majority=0.2) for one in points("tuned", "a", s4=0.3, s16=0.4)]
    assert "TF-IDF with logistic regression is as good within the noise: 45 % right." in message(Part("", level))["a"]
    nearest = [changed(one, tfidf=0.5, nearest=0.7) for one in points("tuned", "a", s4=0.3, s16=0.4)]
    assert message(Part("", nearest))["a"].startswith("Repeating the answer of the most similar example is better")
    below = [changed(one, tfidf=0.1, majority=0.2) for one in points("tuned", "a", s4=0.3, s16=0.4)]
    assert "TF-IDF" not in message(Part("", below))["a"]


def test_it_says_whether_more_examples_helped() -> None:
    gains, ties, falls = ((0.4, 0.7), (0.5, 0.51), (0.9, 0.6))
    for (fewer, more), expected in (
        (gains, "From 16 to 64 examples it gains 30 points: more may help."),
        (ties, "From 16 to 64 examples it does not change beyond the noise."),
        (falls, "From 16 to 64 examples it loses 30 points: use fewer."),
    ):
        assert message(Part("", points("tuned", "a", s0=0.1, s16=fewer, s64=more)))["a"].endswith(expected)


def test_a_metric_that_is_no_share_of_right_answers_is_named() -> None:
    records = [changed(one, metric="rougeL") for one in points("tuned", "a", s4=0.44)]
    assert message(Part("", records))["a"].startswith("After 4 examples tuned scores 0.44 in rougeL")
    records = [changed(one, metric="rougeL") for one in points("tuned", "a", s0=0.1, s16=0.4, s64=0.7)]
    assert message(Part("", records))["a"].endswith("From 16 to 64 examples it gains 0.30: more may help.")


def test_one_sentence_for_the_mean_or_for_every_task() -> None:
    records = points("tuned", "a", s4=0.4) + points("tuned", "b", s4=0.6)
    assert list(message(Part("", records))) == ["Mean of 2 tasks"]
    assert list(message(Part("", records, by_task=True))) == ["a", "b"]


def test_what_a_reader_would_stumble_over_is_said_at_the_curve(tmp_path: Path) -> None:
    records = points("base", "a", s0=0.0, s16=0.0) + points("tuned", "a", s0=0.9, s16=0.5)
    records = [changed(one, num_cut_answers=40) if one.model_name == "base" else one for one in records]
    part = Part("", records)
    said = remarks(part.summary, sections(part.summary)[0])
    assert said == [
        "base never gave an accepted answer here, with any number of examples.",
        "80 of 200 answers of base were cut at the token limit.",
        "tuned falls by 40 points from 0 to 16 examples.",
    ]
    page = write_report(records, tmp_path / "page.html").read_text(encoding="utf-8")
    assert all(remark in page for remark in said)


def test_one_task_alone_is_drawn_large_and_its_table_printed_once(tmp_path: Path) -> None:
    alone = write_report(points("tuned", "a", s0=0.3, s16=0.4), tmp_path / "a.html").read_text(encoding="utf-8")
    assert alone.count('<th scope="col">16</th>') == 1
    both = points("tuned", "a", s0=0.3, s16=0.4) + points("tuned", "b", s0=0.3, s16=0.4)
    several = write_report(both, tmp_path / "b.html").read_text(encoding="utf-8")
    assert "Every task" in several
    assert "Every task" not in alone
