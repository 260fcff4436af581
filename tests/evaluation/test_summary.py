"""Records -> means with errors."""

from __future__ import annotations

from datetime import UTC, datetime

import numpy as np
import pytest

from manyicl.errors import UserError
from manyicl.evaluation.report.lines import notes
from manyicl.evaluation.result import Result, ResultStore
from manyicl.evaluation.scores_json import scores_as_json
from manyicl.evaluation.summary import OVERALL, summarise
from tests.evaluation.test_result import make_result


def scored(model: str, task: str, shots: int, scores: tuple[float, ...], **changes: object) -> Result:
    fields: dict[str, object] = {
        "model_name": model,
        "model_fingerprint": model * 8,
        "task": task,
        "num_shots": shots,
        "num_shots_used": shots,
        "query_scores": scores,
        "score": sum(scores) / len(scores),
        "num_queries": len(scores),
        **changes,
    }
    return make_result(**fields)


RECORDS = [
    scored("base", "a", 0, (0.0, 0.0), majority=0.5),
    scored("base", "a", 4, (1.0, 0.0), majority=0.5),
    scored("base", "a", 4, (0.0, 0.0), seed=1, majority=0.5),
    scored("base", "b", 0, (0.0, 1.0), family="qa", majority=0.1),
    scored("base", "b", 4, (0.0, 1.0), family="qa", majority=0.1),
    scored("tuned", "a", 0, (0.0, 0.0), majority=0.5),
    scored("tuned", "a", 4, (1.0, 1.0), majority=0.5),
    scored("tuned", "a", 4, (1.0, 0.0), seed=1, majority=0.5),
    scored("tuned", "b", 0, (1.0, 1.0), family="qa", majority=0.1),
    scored("tuned", "b", 4, (1.0, 1.0), family="qa", majority=0.1),
]


def mean(estimate: object) -> float:
    return estimate.mean  # type: ignore[attr-defined, no-any-return]


def test_scores_are_averaged_over_seeds_then_tasks_then_families() -> None:
    summary = summarise(RECORDS)
    assert summary.models == ("base", "tuned")
    assert summary.groups == ("classification", "qa")
    assert mean(summary.score("base", "classification", 4)) == 0.25
    assert mean(summary.score("base", OVERALL, 4)) == pytest.approx((0.25 + 0.5) / 2)
    assert mean(summary.baseline("majority", OVERALL, 4)) == pytest.approx(0.3)
    assert summary.baseline("tfidf", OVERALL, 4) is None


def test_a_baseline_is_a_mean_of_draws_whichever_models_share_them() -> None:
    draws = [scored("base", "a", 4, (1.0, 0.0), seed=seed, tfidf=0.2 * seed) for seed in range(3)]
    assert mean(summarise(draws).baseline("tfidf", OVERALL, 4)) == pytest.approx(0.2)
    again = scored("tuned", "a", 4, (1.0, 0.0), seed=2, tfidf=0.4)
    assert mean(summarise([*draws, again]).baseline("tfidf", OVERALL, 4)) == pytest.approx(0.2)


def test_differences_are_paired_over_seeds_and_queries() -> None:
    summary = summarise(RECORDS)
    difference = summary.difference("base", "tuned", "classification", 4)
    assert difference is not None
    # Each seed gained one of two answers; which one differs, so seeds agree and queries do not.
    assert difference.mean == pytest.approx(0.5)
    assert mean(summary.difference("base", "tuned", OVERALL, 4)) == pytest.approx(0.5)


def test_a_difference_is_paired_only_over_the_same_seeds_and_queries() -> None:
    twelve = scored("base", "a", 4, (1.0, 0.0) * 6)
    for other in (
        scored("tuned", "a", 4, (1.0,), queries_hash="other"),
        scored("tuned", "a", 4, (1.0, 0.0) * 6, seed=1),
        scored("tuned", "a", 4, (1.0, 0.0) * 6, queries_hash="other"),
    ):
        difference = summarise([twelve, other]).difference("base", "tuned", OVERALL, 4)
        assert difference is not None
        assert difference.pairing == "independent"
        assert (difference.interval is None) == (other.num_queries == 1)


def test_macro_f1_is_paired_over_the_same_resamples() -> None:
    def result(model: str, score: float, *resampled: float) -> Result:
        fields = {"metric": "macro_f1", "query_scores": None, "score": score, "num_queries": 50, "standard_error": 0.1}
        return scored(model, "a", 4, (1.0,), **{**fields, "resampled_scores": resampled or None})

    base, tuned = result("base", 0.5, 0.4, 0.6, 0.5), result("tuned", 0.6, 0.5, 0.7, 0.7)
    paired = summarise([base, tuned]).difference("base", "tuned", OVERALL, 4)
    assert paired is not None
    assert paired.pairing == "paired"
    assert paired.mean == pytest.approx(0.1)
    assert paired.standard_error == pytest.approx(np.std([0.1, 0.1, 0.2], ddof=1))
    # Records of an earlier version hold no resamples.
    unpaired = summarise([base, result("tuned", 0.6)]).difference("base", "tuned", OVERALL, 4)
    assert unpaired is not None
    assert unpaired.pairing == "independent"
    assert unpaired.standard_error == pytest.approx(0.1 * 2**0.5)


def test_a_copied_record_counts_once_and_is_no_older_result() -> None:
    summary = summarise([*RECORDS, *RECORDS])
    assert summary.num_superseded == 0
    assert len(summary.records) == len(RECORDS)


def test_a_task_that_lacks_a_point_is_in_no_mean_and_is_named() -> None:
    summary = summarise([*RECORDS, scored("tuned", "c", 4, (1.0, 1.0), family="math")])
    assert summary.compared == ("a", "b")
    assert summary.not_compared == {"c": "some model lacks a shot count there"}
    assert summary.score("tuned", "math", 4) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"metric": "macro_f1"}, "in different metrics"),
        ({"data_hash": "of one more row"}, "rows, answers, labels or instruction changed"),
    ],
)
def test_a_task_that_changed_between_two_models_is_in_no_mean(change: dict[str, object], reason: str) -> None:
    changed = [
        scored("base", "c", 4, (1.0, 0.0), majority=0.1),
        scored("base", "c", 0, (1.0, 0.0)),
        scored("tuned", "c", 4, (1.0, 1.0), majority=0.9, **change),
        scored("tuned", "c", 0, (1.0, 1.0), **change),
    ]
    summary = summarise([*RECORDS, *changed])
    assert summary.compared == ("a", "b")
    assert reason in summary.not_compared["c"]
    assert mean(summary.score("tuned", "classification", 4)) == 0.75
    # What is shown of the task itself does not claim that what both sides share cancels out.
    assert summary.baseline("majority", ("c",), 4) is None
    assert mean(summary.baseline("majority", ("c",), 4, ("tuned",))) == 0.9
    assert set(summary.metrics("c")) == {"accuracy", change.get("metric", "accuracy")}
    alone = summary.difference("base", "tuned", ("c",), 4)
    assert alone is not None
    assert alone.pairing == "independent"
    assert any(note.startswith("c: in no mean. ") and reason in note for note in notes(summary))


def test_the_growth_of_a_model_from_no_demonstrations_is_paired() -> None:
    records = [scored("base", "a", 0, (0.0, 1.0, 0.0)), scored("base", "a", 4, (1.0, 1.0, 0.0))]
    growth = summarise(records).growth("base", OVERALL, 0, 4)
    assert growth is not None
    assert growth.pairing == "paired"


def test_draws_that_were_chosen_in_another_way_are_not_paired() -> None:
    records = [scored("base", "a", 4, (1.0, 0.0)), scored("tuned", "a", 4, (1.0, 0.0), sampling="random")]
    difference = summarise(records).difference("base", "tuned", OVERALL, 4)
    assert difference is not None
    assert difference.pairing == "independent"
    without = [scored("base", "a", 0, (1.0, 0.0)), scored("tuned", "a", 0, (1.0, 0.0), sampling="random")]
    difference = summarise(without).difference("base", "tuned", OVERALL, 0)
    assert difference is not None
    assert difference.pairing == "paired"


@pytest.mark.parametrize("change", [{"text_format": {"kind": "plain", "delimiter": "\n"}}, {"max_answer_tokens": 7}])
def test_older_records_in_another_format_or_with_another_limit_are_superseded(change: dict[str, object]) -> None:
    older = scored("base", "a", 4, (0.0, 0.0), seed=2, created=datetime(2025, 1, 1, tzinfo=UTC), **change)
    summary = summarise([older, *(record.model_copy(update={"max_answer_tokens": 64}) for record in RECORDS)])
    assert summary.num_superseded == 1
    assert mean(summary.score("base", "classification", 4)) == 0.25


def test_records_that_do_not_know_their_limit_of_answers_count_beside_those_that_do() -> None:
    # A folder that an earlier version began, and a later one went on with.
    earlier, later = datetime(2025, 1, 1, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
    unknown = scored("base", "a", 4, (1.0, 0.0), created=earlier)
    known = scored("base", "a", 16, (1.0, 1.0), created=later, max_answer_tokens=64)
    for records in (
        [unknown, known],
        [known, unknown.model_copy(update={"created": datetime(2027, 1, 1, tzinfo=UTC)})],
    ):
        summary = summarise(records)
        assert (summary.shots, summary.num_superseded) == ((4, 16), 0)
    other = known.model_copy(update={"num_shots": 64, "max_answer_tokens": 7, "created": earlier})
    summary = summarise([unknown, known, other])
    assert (summary.shots, summary.num_superseded) == ((4, 16), 1)


def test_fewer_queries_that_are_measured_later_hide_nothing() -> None:
    later = datetime(2027, 1, 1, tzinfo=UTC)
    few = scored("base", "a", 4, (1.0,), queries_hash="fewer", created=later)
    summary = summarise([*RECORDS, few])
    assert (summary.shots, summary.num_superseded) == ((0, 4), 1)
    assert mean(summary.score("base", "classification", 4)) == 0.25
    assert "1 result of the same tasks and models is not shown: older data" in notes(summary)[-1]
    # Of other data they are what there is to say now.
    summary = summarise([*RECORDS, few.model_copy(update={"data_hash": "of one row more"})])
    assert mean(summary.score("base", ("a",), 4)) == 1
    # As many answers: the newest.
    as_many = [one.model_copy(update={"queries_hash": "other", "created": later, "score": 1.0}) for one in RECORDS[:3]]
    assert mean(summarise([*RECORDS, *as_many]).worst("base", ("a",), 4)) == 1


def test_a_curve_with_points_of_fewer_draws_says_how_many_there_are_at_least() -> None:
    assert "over queries and 1 to 2 draws of demonstrations." in notes(summarise(RECORDS))[0]
    assert "over queries and one draw of demonstrations" in notes(summarise(RECORDS[3:5]))[0]


def test_older_records_of_other_queries_are_superseded() -> None:
    older = scored("base", "a", 4, (0.0,), queries_hash="other", created=datetime(2025, 1, 1, tzinfo=UTC))
    summary = summarise([older, *RECORDS])
    assert summary.num_superseded == 1
    assert mean(summary.score("base", "classification", 4)) == 0.25


def test_a_model_that_retrieves_is_a_line_of_its_own_and_compared_in_pairs() -> None:
    records = [
        scored("one", "a", 4, (1.0, 0.0, 0.0)),
        scored("one", "a", 4, (1.0, 1.0, 0.0), num_retrieved=3, key="other", mean_num_retrieved=2.5),
    ]
    summary = summarise(records)
    assert summary.models == ("one", "one + 3 retrieved")
    difference = summary.difference(*summary.models, "classification", 4)
    assert difference is not None
    assert difference.mean == pytest.approx(1 / 3)
    assert difference.pairing == "paired"
    assert [line["retrieved"] for line in scores_as_json(summary, ResultStore("of no answers"))] == [0, 3]
    assert summary.num_superseded == 0
    said = " ".join(notes(summary))
    assert "“+ N retrieved”: the N training rows" in said
    assert "1 of 2 results retrieved fewer rows" in said
    assert "retrieved" not in " ".join(notes(summarise(records[:1])))


def test_models_that_share_a_name_are_told_apart_by_fingerprint() -> None:
    summary = summarise([scored("m", "a", 0, (1.0,)), scored("m", "a", 0, (0.0,), model_fingerprint="z" * 64)])
    assert summary.models == ("m (mmmmmmmm)", "m (zzzzzzzz)")


def test_results_of_one_model_in_several_text_formats_are_told_apart() -> None:
    kinds = ("plain", "channel", "chat")
    summary = summarise([scored("m", "a", 0, (1.0,), key=kind, text_format={"kind": kind}) for kind in kinds])
    assert summary.models == ("m", "m (channel)", "m (chat)")
    assert summary.num_superseded == 0


def test_macro_f1_is_averaged_over_seeds_without_scores_per_query() -> None:
    records = [
        scored(
            "m", "a", 4, (1.0,) * 9, seed=seed, metric="macro_f1", query_scores=None, score=score, standard_error=0.1
        )
        for seed, score in enumerate((0.4, 0.6))
    ]
    estimate = summarise(records).score("m", OVERALL, 4)
    assert estimate is not None
    assert estimate.mean == pytest.approx(0.5)
    assert estimate.standard_error == pytest.approx((0.02 / 2 + 0.01) ** 0.5)


def test_nothing_to_show_is_said() -> None:
    with pytest.raises(UserError, match="no result to show"):
        summarise([])
