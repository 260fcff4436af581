"""Records of a comparison -> its numbers, finished or not."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from manyicl.evaluation.comparison.arms import (
    ALL_ANSWERS,
    BASE,
    DEDICATED,
    EQUAL_ANSWERS,
    FEW_SHOT,
    LAST_ANSWER,
    Arm,
    Point,
)
from manyicl.evaluation.comparison.omissions import omissions
from manyicl.evaluation.comparison.records import ComparisonRecords
from manyicl.evaluation.comparison.statistics import Difference, Statistics, statistics_of
from manyicl.evaluation.report.comparison_message import replaces
from manyicl.evaluation.summary import OVERALL
from tests.evaluation.comparison.made_up import World


@pytest.fixture(name="records", scope="module")
def _records(tmp_path_factory: pytest.TempPathFactory) -> ComparisonRecords:
    return ComparisonRecords.load(World().write(tmp_path_factory.mktemp("comparison")))


@pytest.fixture(name="numbers", scope="module")
def _numbers(records: ComparisonRecords) -> Statistics:
    return statistics_of(records)


def load(world: World, folder: Path) -> tuple[ComparisonRecords, Statistics]:
    records = ComparisonRecords.load(world.write(folder))
    return records, statistics_of(records)


def between(numbers: Statistics, first: Arm, second: Arm, role: str = "unseen") -> Difference:
    (found,) = (
        d for d in numbers.differences(role) if (d.first, d.second) == (numbers.point(first), numbers.point(second))
    )
    return found


def test_each_regime_has_a_row_at_the_shots_that_it_is_made_for(numbers: Statistics) -> None:
    rows = {row.point.label: row for row in numbers.headline("unseen")}
    assert list(rows) == [
        "base, 0 shots",
        "base, 16 shots",
        "zero-shot, 0 shots",
        "few-shot, 4 shots",
        "many-shot, last answer, 16 shots",
        "many-shot, all answers, 16 shots",
        "many-shot, all answers, equal answers, 16 shots",
        "many-shot, all answers + replay, 16 shots",
        "one model per task, 4 examples",
        "one model per task, 16 examples",
    ]
    row = rows["many-shot, all answers, 16 shots"]
    assert list(row.cells) == [OVERALL, "classification", "qa"]
    overall = row.overall
    assert overall is not None
    assert (overall.num_trainings, overall.num_draws, overall.num_tasks, overall.num_queries) == (3, 3, 4, 160)
    assert overall.interval is not None
    assert row.worst is None  # each training has one draw


def test_seen_and_unseen_tasks_are_never_averaged_together(numbers: Statistics) -> None:
    assert all(task.startswith("unseen") for task in numbers.compared("unseen"))
    assert all(task.startswith("seen") for task in numbers.compared("seen"))
    unseen, seen = (numbers.headline(role)[0].overall for role in ("unseen", "seen"))
    assert unseen is not None
    assert seen is not None
    assert unseen.mean != seen.mean


def test_a_mean_is_that_of_its_results(records: ComparisonRecords, numbers: Statistics) -> None:
    names = {cell.name for cell in records.cells if cell.regime == "few_shot"}
    scores = [
        result.score
        for result in records.results
        if result.model_name in names and result.num_shots == 4 and result.task.startswith("unseen_qa")
    ]
    point = numbers.point(FEW_SHOT)
    assert point is not None
    cell = numbers.row(point, numbers.compared("unseen")).cells["qa"]
    assert cell is not None
    assert cell.mean == pytest.approx(sum(scores) / len(scores))


def test_the_base_is_paired_with_a_training_that_has_the_same_draws(numbers: Statistics) -> None:
    point = numbers.point(BASE)
    assert point == Point(BASE, 16)
    assert numbers.tables[BASE, "unseen_qa_0", 16].rows == (0, 1, 2)  # type: ignore[union-attr]
    assert numbers.tables[BASE, "unseen_qa_0", 0].rows is None  # type: ignore[union-attr]
    assert between(numbers, BASE, ALL_ANSWERS).measured.num_trainings == 3


def test_differences_are_read_with_care(numbers: Statistics) -> None:
    readings = {(d.first.label, d.second.label): d.reading for d in numbers.differences("unseen")}
    assert readings["base, 0 shots", "many-shot, all answers, 16 shots"] == "higher"
    # Made alike, trained apart.
    alike = ("many-shot, all answers, 16 shots", "many-shot, all answers + replay, 16 shots")
    assert readings[alike] == "not distinguishable"
    last = "many-shot, last answer, 16 shots"
    assert (last, "many-shot, all answers, 16 shots") in readings
    assert (last, "many-shot, all answers, equal answers, 16 shots") in readings


def test_with_one_training_nothing_is_claimed(tmp_path: Path) -> None:
    _, numbers = load(World(num_seeds=1), tmp_path)
    differences = numbers.differences("unseen")
    assert differences
    assert {one.reading for one in differences} == {"one training"}
    rows = numbers.headline("unseen")
    # Without demonstrations the base has nothing but queries to vary.
    assert [row.point.label for row in rows if row.overall and row.overall.interval] == ["base, 0 shots"]
    assert all(row.worst is None for row in rows)
    assert all(share.share is None for share in numbers.shares("unseen").values())


def test_the_share_of_the_gap_lies_within_its_interval(numbers: Statistics) -> None:
    shares = numbers.shares("unseen")
    assert [point.shots for point in shares] == [0, 16]
    for one in shares.values():
        assert one.share is not None
        assert one.interval is not None
        low, high = one.interval
        assert low is not None
        assert high is not None
        assert low < one.share < high


def test_one_model_and_one_per_task_are_compared_at_as_many_examples(tmp_path: Path) -> None:
    _, numbers = load(World(shots=(0, 4, 16, 32), num_examples=(4, 16, 64)), tmp_path)
    in_weights, in_context = Point(Arm("dedicated", num_examples=16), 0), Point(ALL_ANSWERS, 16)
    assert numbers.in_weights_and_context == (in_weights, in_context)
    assert (in_weights, in_context) in [(one.first, one.second) for one in numbers.differences("unseen")]
    assert list(numbers.shares("unseen")) == [Point(BASE, 0), Point(BASE, 16)]
    assert "after 16 examples in its context against" in replaces(numbers, "unseen")
    assert "of models trained on 16 examples" in replaces(numbers, "unseen")
    assert "the base with 16 examples" in replaces(numbers, "unseen")


def test_without_a_number_in_common_each_has_its_most(tmp_path: Path) -> None:
    _, numbers = load(World(num_examples=(8, 64)), tmp_path)
    assert numbers.in_weights_and_context == (Point(Arm("dedicated", num_examples=64), 0), Point(ALL_ANSWERS, 16))


@pytest.mark.parametrize("waiting", [["all_answers_seed2"], ["all_answers_seed1", "all_answers_seed2"]])
def test_numbers_stand_where_trainings_of_one_regime_are_missing(tmp_path: Path, waiting: list[str]) -> None:
    _, numbers = load(World(waiting=waiting), tmp_path)
    assert all((one.share is None) == (len(waiting) == 2) for one in numbers.shares("unseen").values())
    found = between(numbers, LAST_ANSWER, ALL_ANSWERS)
    # Levels are those of the trainings that both have, as the difference is.
    assert found.levels[1] - found.levels[0] == pytest.approx(found.measured.mean)
    score = numbers.score(found.first, found.tasks)
    assert score is not None
    assert score.mean != found.levels[0]


def test_what_was_lost_is_not_known_without_the_base(tmp_path: Path) -> None:
    records, numbers = load(World(regimes=("few_shot", "all_answers"), num_seeds=2), tmp_path)
    assert "base is not among the regimes" in " ".join(omissions(records, numbers))


def test_dedicated_models_whose_length_was_not_chosen_are_said(tmp_path: Path) -> None:
    for name, rates in (("one", [1e-3]), ("two", [1e-3, 3e-3])):
        folder = World(num_seeds=2).write(tmp_path / name)
        file = yaml.safe_load((folder / "comparison.yaml").read_text(encoding="utf-8"))
        file["compare"]["learning_rates"] = rates
        (folder / "comparison.yaml").write_text(yaml.safe_dump(file), encoding="utf-8")
        records = ComparisonRecords.load(folder)
        said = " ".join(omissions(records, statistics_of(records)))
        assert ("no number of steps was chosen" in said) == (name == "one")


def test_the_worst_draw_is_one_of_a_training(tmp_path: Path) -> None:
    records, _ = load(World(num_seeds=2), tmp_path)
    point = Point(ALL_ANSWERS, 16)
    chosen = [r for r in records.results if r.model_name.startswith("all_answers_seed") and r.num_shots == 16]
    scores = {"all_answers_seed0": (0.9, 0.7), "all_answers_seed1": (0.5, 0.6)}
    drawn = tuple(
        result.model_copy(update={"score": score, "order": order})
        for result in chosen
        for order, score in enumerate(scores[result.model_name])
    )
    numbers = statistics_of(replace(records, results=drawn))
    assert numbers.worst(point, numbers.tasks_of("unseen")) == pytest.approx((0.7 + 0.5) / 2)


def test_a_baseline_counts_each_draw_once(tmp_path: Path) -> None:
    records, _ = load(World(waiting=["few_shot_seed1", "last_answer_seed1"], num_seeds=2), tmp_path)
    results = tuple(
        result.model_copy(update={"nearest": 0.2 if result.seed == 0 else 0.6})
        for result in records.results
        if result.num_shots == 16
    )
    numbers = statistics_of(replace(records, results=results))
    found = numbers.baseline("nearest", 16, numbers.tasks_of("unseen"))
    assert found is not None
    assert found.mean == pytest.approx(0.4)


def test_there_is_no_share_of_a_gap_that_is_not_there(tmp_path: Path) -> None:
    abilities = dict.fromkeys(World().abilities, (0.0, 0.0))
    _, numbers = load(World(abilities=abilities, num_seeds=2), tmp_path)
    assert [one.share for one in numbers.shares("unseen").values()] == [None, None]


def test_examples_in_context_stand_beside_as_many_examples_in_weights(numbers: Statistics) -> None:
    found = numbers.in_weights("unseen")
    assert found is not None
    assert found.num_examples == (4, 16)
    # A family without labels has no logistic regression, so the mean over families has none.
    assert list(found.lines) == [DEDICATED, ALL_ANSWERS, BASE, "majority", "nearest"]
    assert all(one is not None and one.measured.num_tasks == 4 for one in found.differences)
    assert numbers.baseline("tfidf", 16, [task for task in found.tasks if "classification" in task]) is not None
    nearest = found.lines["nearest"][0]
    assert nearest is not None
    assert nearest.mean == pytest.approx(0.55)
    assert nearest.interval is None


def test_imported_answers_stand_beside_them(tmp_path: Path) -> None:
    _, numbers = load(World(imported={"gpt": 0.9}, num_seeds=2), tmp_path)
    found = numbers.in_weights("unseen")
    assert found is not None
    cells = found.lines[Arm("import", imported="gpt")]
    assert cells[0] == cells[1]
    assert cells[0] is not None
    assert cells[0].mean == pytest.approx(0.9, abs=0.1)
    assert between(numbers, Arm("import", imported="gpt"), ALL_ANSWERS).measured.num_trainings == 2


def test_imported_answers_are_those_of_the_files_that_the_comparison_names_now(tmp_path: Path) -> None:
    world = World(imported={"gpt": 0.9}, num_seeds=1, regimes=["base"], others={})
    folder = world.write(tmp_path)
    name, task = "import_gpt", next(iter(world.tasks))
    file = folder / "results" / f"{task}.results.jsonl"
    (old,) = [line for line in file.read_text(encoding="utf-8").splitlines() if name in line]
    line = json.loads(old)
    line["record"] |= {"key": "f" * 16, "model_fingerprint": "imported new", "created": "2026-01-02T00:00:00Z"}
    file.write_text(file.read_text(encoding="utf-8") + json.dumps(line) + "\n", encoding="utf-8")
    for fingerprint in ("imported new", ""):
        (folder / "imported.json").write_text(json.dumps({"gpt": fingerprint}), encoding="utf-8")
        results = ComparisonRecords.load(folder).results
        found = [one.model_fingerprint for one in results if one.task == task and one.model_name == name]
        assert found == [fingerprint]
    settings = yaml.safe_load((folder / "comparison.yaml").read_text(encoding="utf-8"))
    settings["compare"]["predictions"] = {"other": "gpt.jsonl"}
    (folder / "comparison.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    assert not [one for one in ComparisonRecords.load(folder).results if one.model_name == name]


def test_accuracy_by_position_is_over_the_tasks_that_reach_it(records: ComparisonRecords) -> None:
    cells = []
    for cell in records.cells:
        positions = tuple(
            # One task does not reach far, and one has a demonstration less.
            one.model_copy(update={"last": 14}) if (one.task, one.first) == ("unseen_qa_1", 4) else one
            for one in cell.positions
            if (one.task, one.first) != ("unseen_qa_0", 4)
        )
        cells.append(cell.model_copy(update={"positions": positions}))
    found = statistics_of(replace(records, cells=tuple(cells))).positions()
    assert list(found) == [BASE, LAST_ANSWER, ALL_ANSWERS, EQUAL_ANSWERS, Arm("all_answers", replay=True)]
    means = found[ALL_ANSWERS]
    assert [(one.first, one.last, one.num_tasks) for one in means] == [(0, 0, 3), (1, 3, 3), (4, 15, 3)]
    assert [one.accuracy for one in means] == pytest.approx([0.3, 0.5, 0.7])
    assert found[ALL_ANSWERS][0].num_answers == 3 * 3 * 20


def test_forgetting_is_what_was_lost_since_the_base(numbers: Statistics) -> None:
    found = numbers.forgotten()
    assert BASE not in found
    lost = found[ALL_ANSWERS]
    assert [lost.before, lost.after] == pytest.approx([3.0, 3.42])
    assert lost.rise is not None
    assert lost.rise.mean == pytest.approx(0.42)
    assert lost.rise.interval is not None
    assert lost.probes == pytest.approx((0.6, 0.495))
    assert dict(lost.steps) == pytest.approx({0: 0.0, 50: 0.21, 100: 0.42})
    assert found[Arm("all_answers", replay=True)].rise.mean == pytest.approx(0.1)  # type: ignore[union-attr]
    # One training shows no spread.
    assert found[Arm("all_answers", variant="shots_4")].rise.interval is None  # type: ignore[union-attr]


def test_costs_are_per_training_and_of_dedicated_models_for_all_tasks(numbers: Statistics) -> None:
    costs = numbers.costs()
    assert costs[ALL_ANSWERS].num_tokens == 200_000
    assert costs[ALL_ANSWERS].num_models == 1
    dedicated = costs[Arm("dedicated", num_examples=16)]
    assert (dedicated.num_models, dedicated.num_tokens) == (8, 8 * 200_000)
    assert dedicated.seconds == pytest.approx(8 * 120.5)
    assert (costs[BASE].num_tokens, costs[BASE].learning_rates) == (0, ())


def test_an_ablation_differs_from_all_answers_of_the_same_seed(numbers: Statistics) -> None:
    ((row, difference),) = numbers.ablations()
    assert row.point.arm.variant == "shots_4"
    assert difference is not None
    assert difference.measured.num_trainings == 1
    assert difference.reading == "one training"
    assert difference.measured.interval_of_queries is not None


def test_a_half_finished_comparison_says_what_is_missing(tmp_path: Path) -> None:
    world = World(
        failed={"few_shot_seed1": "The loss is not a number."},
        waiting=[
            "all_answers_seed2",
            *(f"{kind}_seed{seed}" for kind in ("zero_shot", "dedicated_t4_16") for seed in range(3)),
        ],
    )
    records, numbers = load(world, tmp_path)
    lines = "\n".join(omissions(records, numbers))
    assert "few_shot_seed1: failed: The loss is not a number." in lines
    assert "7 cells not started: zero_shot_seed0, " in lines
    assert "all_answers_seed2, dedicated_t4_16_seed0, dedicated_t4_16_seed1 and 1 more." in lines
    assert "1 of 4 unseen tasks without a model per task of every size" in lines
    assert "many-shot, all answers: 2 of 3 seeds done." in lines
    assert "zero-shot: no cell of this regime is done." in lines
    (overall,) = (row.overall for row in numbers.headline("unseen") if row.point.arm == ALL_ANSWERS)
    assert overall is not None
    assert overall.num_trainings == 2
    # Of few-shot, seeds 0 and 2 are there; of all answers, 0 and 1.
    assert between(numbers, FEW_SHOT, ALL_ANSWERS).measured.num_trainings == 1


def test_results_of_a_cell_that_is_not_done_do_not_count(records: ComparisonRecords) -> None:
    cells = tuple(cell for cell in records.cells if cell.name != "all_answers_seed2")
    fewer = replace(records, cells=cells)
    numbers = statistics_of(fewer)
    assert numbers.tables[ALL_ANSWERS, "unseen_qa_0", 16].rows == (0, 1)  # type: ignore[union-attr]
    assert "all_answers_seed2: its results do not count, since the cell is not done." in omissions(fewer, numbers)


def test_a_task_that_a_regime_lacks_or_answered_differently_is_in_no_mean(records: ComparisonRecords) -> None:
    def changed(**changes: object) -> Statistics:
        results = [
            result.model_copy(update=changes)
            if (result.task, result.model_name) == ("unseen_qa_1", "few_shot_seed0")
            else result
            for result in records.results
        ]
        return statistics_of(replace(records, results=tuple(results)))

    for numbers in (changed(queries_hash="other"), changed(query_scores=None)):
        assert "unseen_qa_1" not in numbers.compared("unseen")
        assert "few-shot" in (numbers.why_not_compared("unseen", "unseen_qa_1") or "")
        (line,) = (line for line in omissions(records, numbers) if line.startswith("unseen_qa_1"))
        assert "is in no mean" in line


def test_a_family_may_be_missing_and_a_metric_of_whole_sets_is_compared(tmp_path: Path) -> None:
    tasks = {"unseen_a": ("unseen", "classification"), "unseen_b": ("unseen", "classification")}
    _, numbers = load(World(tasks=tasks, resampled=["unseen_a"], num_seeds=2), tmp_path)
    assert numbers.compared("unseen") == ("unseen_a", "unseen_b")
    assert numbers.compared("seen") == ()
    assert numbers.headline("seen") == []
    assert numbers.differences("seen") == []
    assert numbers.in_weights("seen") is None
    assert between(numbers, BASE, ALL_ANSWERS).measured.interval is not None


def test_an_empty_comparison_has_no_numbers(tmp_path: Path) -> None:
    world = World(num_seeds=1)
    world.waiting = [cell.name for cell in world.cells()]
    records, numbers = load(world, tmp_path)
    assert numbers.arms == ()
    assert numbers.headline("unseen") == []
    assert numbers.differences("unseen") == []
    assert numbers.shares("unseen") == {}
    assert numbers.forgotten() == {}
    waiting, *others = omissions(records, numbers)
    assert waiting.startswith(f"{len(world.waiting)} cells not started: base_seed0, ")
    assert "many-shot, all answers: no cell of this regime is done." in others
