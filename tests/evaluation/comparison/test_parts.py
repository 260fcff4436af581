"""What a comparison trains, chooses and refuses, as far as that shows without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.evaluation.comparison.budgets import EQUAL_ANSWERS, Length, _equal_answers, budget_problems, lengths_of
from manyicl.evaluation.comparison.cells import (
    Trial,
    evaluation_of,
    file_name,
    planned_runs,
    planned_trials,
    recipe_of_trial,
    run_tasks,
    trial_tasks,
)
from manyicl.evaluation.comparison.checks import comparison_problems, require_possible, text_problems
from manyicl.evaluation.comparison.choosing import Choice, choose, known_choices, write_choices
from manyicl.evaluation.comparison.regimes import regime_recipe
from manyicl.evaluation.comparison.roles import assigned, limited, remaining, share_of_tasks
from manyicl.evaluation.comparison.settings import CompareSettings, Comparison, Regime
from manyicl.evaluation.grid import Cell, CellReport, CellState
from manyicl.tasks.task import Task
from manyicl.training.recipe import Recipe
from tests.builders import byte_level_bpe, make_example, make_task
from tests.evaluation.comparison.cases import TEXT, comparison, comparison_in, toy_tasks


def recipe_of(settings: Comparison, regime: Regime, **options: object) -> Recipe:
    known = {"num_steps": 5, "learning_rate": 1e-3, "seed": 7, "output": Path("there"), **options}
    return regime_recipe(settings, regime, **known)  # type: ignore[arg-type]


# Regimes


@pytest.mark.parametrize(
    ("regime", "examples", "supervise"),
    [
        ("zero_shot", 1, "all_answers"),
        ("few_shot", 3, "last_answer"),
        ("last_answer", (1, 6), "last_answer"),
        ("all_answers", (1, 6), "all_answers"),
        ("dedicated", 1, "all_answers"),
    ],
)
def test_a_regime_changes_examples_and_supervision_and_nothing_else(
    regime: Regime, examples: object, supervise: str
) -> None:
    settings = comparison("training.warmup_steps=1", "tasks.mixture={kind: size, temperature: 2}")
    recipe = recipe_of(settings, regime)
    assert (recipe.sequences.examples_per_episode, recipe.objective.supervise) == (examples, supervise)
    training = recipe.training
    assert (recipe.num_steps, training.learning_rate, training.seed, str(recipe.output)) == (5, 1e-3, 7, "there")
    assert (training.evaluate_every, training.warmup_steps) == (None, 1)
    same = ("sequences.examples_per_episode", "objective.supervise", "training", "output", "tasks.mixture")
    before, after = (one.model_dump(exclude={"compare"}) for one in (settings, recipe))
    for key in same:
        section, _, name = key.partition(".")
        for content in (before, after):
            content.pop(section) if not name else content[section].pop(name)
    assert before == after


def test_single_examples_keep_their_labels_and_instruction() -> None:
    settings = comparison("sequences.rename_labels=0.5", "sequences.omit_instruction=0.25")
    sequences = [recipe_of(settings, each).sequences for each in ("zero_shot", "dedicated", "all_answers")]
    assert [(each.rename_labels, each.omit_instruction) for each in sequences] == [(0, 0), (0, 0), (0.5, 0.25)]


def test_a_shorter_run_warms_up_over_the_same_share() -> None:
    settings = comparison("training.warmup_steps=2", "training.schedule=warmup_stable_decay")
    assert [recipe_of(settings, "all_answers", num_steps=n).training.warmup_steps for n in (5, 10, 1)] == [2, 4, 0]


def test_a_variant_changes_what_it_names() -> None:
    recipe = recipe_of(comparison(), "all_answers", changes=("sequences.examples_per_episode=4",))
    assert recipe.sequences.examples_per_episode == 4
    with pytest.raises(UserError) as error:
        recipe_of(comparison(), "all_answers", changes=("sequences.examples=4",))
    assert error.value.code == "unknown_key"


def test_replay_adds_text_to_the_sequences_of_a_regime() -> None:
    settings = comparison("compare.replay={text: a.txt, share: 0.3, weight: 0.25}")
    assert recipe_of(settings, "all_answers").sequences.replay is None
    replay = recipe_of(settings, "all_answers", replay=True).sequences.replay
    assert replay is not None
    assert (str(replay.text), replay.share, replay.weight) == ("a.txt", 0.3, 0.25)


# The file


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ("sequences.examples_per_episode=4", "fill, or a range"),
        ("objective.supervise=last_answer", "compare.regimes"),
        ("training.evaluate_every=5", "last one of each"),
        ("compare.budget=steps", "training.num_steps"),
        ("tasks.evaluate=[]", "tasks.evaluate"),
        ("compare.variants={'a/b': {task_share: 0.5}}", "letters"),
        ("compare.predictions={'a/b': answers.jsonl}", "letters"),
        ("compare={regimes: [base], unseen: [a], replay: {text: a.txt}}", "replay.regimes"),
        ("sequences.replay={text: a.txt, share: 0.1}", "compare.replay"),
        ("compare.variants={a: {}}", "changes something"),
        ("compare.variants={a: {set: ['training.seed=1']}}", "sequences and objective"),
        ("compare.regimes=[all_answer]", "all_answers"),
        ("compare.shot=[1]", "shots"),
        ("model={from_scratch: {architecture: llama}}", "model.base"),
    ],
)
def test_what_a_comparison_cannot_be_is_refused_with_what_it_can_be(change: str, word: str) -> None:
    with pytest.raises(UserError, match=word):
        comparison(change)


def test_shots_include_those_that_regimes_are_made_for() -> None:
    assert comparison("compare.shots=[4]").shots == (0, 2, 4)
    assert comparison("compare.shots=[4]", "compare.regimes=[base]").shots == (0, 4)
    assert comparison("training.learning_rate=3e-3").learning_rates == pytest.approx((1e-3, 3e-3, 9e-3))


# Tasks


def names(tasks: Sequence[Task]) -> tuple[str, ...]:
    return tuple(task.name for task in tasks)


def test_tasks_are_drawn_by_the_seed_alone() -> None:
    settings = comparison("compare.num_seen=1", "compare.dedicated.tasks_per_family=1")
    tasks = toy_tasks(settings)
    assert [task.family for task in tasks.seen] == ["classification", "nli"]
    assert {*names(tasks.dedicated)} == {*names(tasks.seen), *names(tasks.unseen)}
    assert tasks.roles()["nli unseen 0"].role == "unseen"
    shuffled = assigned(settings, tasks.train[::-1], tasks.validation[::-1], tasks.unseen[::-1])
    assert (shuffled.seen, shuffled.dedicated) == (tasks.seen, tasks.dedicated)
    drawn = {names(toy_tasks(comparison(f"training.seed={seed}")).seen) for seed in range(8)}
    assert len(drawn) > 1


def test_a_dedicated_model_is_trained_on_what_others_are_given_in_context() -> None:
    task = make_task()
    part, rest = limited(task, 8, 3), remaining(task, 8, 3)
    assert part.train == task.demonstrations(8, 3)
    assert not {example.query for example in part.train} & {example.query for example in rest.train}
    assert len(part.train) + len(rest.train) == len(task.train)
    assert len({task.data_hash, part.data_hash, rest.data_hash, limited(task, 8, 4).data_hash}) == 4


def test_a_smaller_share_of_the_tasks_is_part_of_a_larger_one() -> None:
    tasks = [make_task(f"{family} {number}", family=family) for family in ("qa", "nli") for number in range(8)]
    quarter, half = share_of_tasks(tasks, 0.25, 0), share_of_tasks(tasks, 0.5, 0)
    assert (len(quarter), len(half)) == (4, 8)
    assert {*names(quarter)} < {*names(half)}
    assert len(share_of_tasks(tasks, 0.01, 0)) == 2
    assert share_of_tasks(tasks, 1, 0) == tuple(tasks)


# Cells


def names_of(*overrides: str) -> tuple[list[str], list[str]]:
    settings = comparison(*overrides)
    tasks = toy_tasks(settings)
    return [each.name for each in planned_trials(settings, tasks)], [
        each.name for each in planned_runs(settings, tasks)
    ]


def test_every_regime_has_a_trial_per_rate_and_a_model_per_seed() -> None:
    regimes = "compare.regimes=[base, few_shot, last_answer, all_answers]"
    variant = "compare.variants={half: {task_share: 0.5}}"
    trials, runs = names_of(regimes, variant, "compare.num_training_seeds=2", "training.seed=5")
    assert trials == [f"{each}_rate{n}" for each in ("few_shot", "last_answer", "all_answers") for n in range(3)]
    kinds = ["base", "few_shot", "last_answer", "all_answers", EQUAL_ANSWERS]
    assert runs == [f"{kind}_seed5" for kind in kinds] + ["variant_half_seed5"] + [f"{kind}_seed6" for kind in kinds]
    assert names_of(regimes, "compare.learning_rates=[1e-3]")[0] == []


def test_a_regime_with_replay_has_the_rate_of_the_regime() -> None:
    trials, runs = names_of("compare.regimes=[zero_shot, all_answers]", "compare.replay={text: a.txt}")
    assert len(trials) == 6
    assert runs == ["zero_shot_seed0", "all_answers_seed0", "all_answers_replay_seed0"]


def test_dedicated_models_are_one_for_each_task_and_number_of_examples() -> None:
    trials, runs = names_of("compare.regimes=[dedicated]", "compare.dedicated.num_examples=[8, 4]")
    assert len(trials) == 2 * 2 * 3
    assert len(runs) == 2 * 4
    assert len(set(runs)) == len(runs)
    assert all(name.startswith("dedicated_") and name.endswith("_seed0") for name in runs)


def test_training_seeds_draw_other_demonstrations_for_the_same_queries() -> None:
    settings = comparison("compare.num_training_seeds=2", "compare.num_draws=3", "compare.regimes=[base]")
    first, second = (evaluation_of(run, settings) for run in planned_runs(settings, toy_tasks(settings)))
    assert first.seed == second.seed
    assert [sorted({point.seed for point in each.points()}) for each in (first, second)] == [[0, 1, 2], [3, 4, 5]]


def test_every_draw_is_measured_in_as_many_orders_as_the_comparison_says() -> None:
    settings = comparison("compare.num_orders=3", "compare.regimes=[base]")
    (of_base,) = (evaluation_of(run, settings) for run in planned_runs(settings, toy_tasks(settings)))
    assert {point.order for point in of_base.points() if point.num_shots > 1} == {0, 1, 2}


def test_no_row_that_a_rate_is_chosen_on_was_trained_on_or_is_a_test_row() -> None:
    settings = comparison("compare.regimes=[dedicated]", "compare.dedicated.num_examples=[8]")
    tasks = toy_tasks(settings)
    for trial in planned_trials(settings, tasks):
        (trained,), (held_out,) = trial_tasks(trial, tasks)
        queries = [{example.query for example in rows} for rows in (trained.train, held_out.train, held_out.test)]
        assert not queries[0] & queries[1]
        assert not queries[1] & queries[2]
    for run in planned_runs(settings, tasks):
        (trained,), held_out_of_run = run_tasks(run, settings, tasks)
        assert (len(trained.train), held_out_of_run) == (8, ())


def test_names_of_tasks_become_names_of_folders_that_stay_apart() -> None:
    names = {file_name(name) for name in ("a/b", "a-b", "a b", "ä", "x" * 90, "x" * 91)}
    assert len(names) == 6
    assert file_name("trec-6.x") == "trec-6.x"


# Budgets


def test_budgets_are_equal_in_tokens_and_the_headline_pair_also_in_answers() -> None:
    settings = comparison("training.num_tokens=24_000", "compare.dedicated={num_examples: [8], budget: share}")
    tasks = toy_tasks(settings)
    lengths = lengths_of(settings, tasks, byte_level_bpe())
    for name in ("zero_shot", "few_shot", "last_answer", "all_answers"):
        assert lengths[name].num_tokens == pytest.approx(24_000, rel=0.02), name
    assert lengths["dedicated"].num_tokens == pytest.approx(24_000 / len(tasks.dedicated), rel=0.1)
    assert lengths[EQUAL_ANSWERS].num_answers == pytest.approx(lengths["last_answer"].num_answers, rel=0.05)
    assert lengths[EQUAL_ANSWERS].num_steps < lengths["all_answers"].num_steps
    steps = lengths_of(
        comparison("training.num_tokens=null", "training.num_steps=9", "compare.budget=steps"), tasks, byte_level_bpe()
    )
    assert {name: length.num_steps for name, length in steps.items() if name != EQUAL_ANSWERS} == dict.fromkeys(
        ("zero_shot", "few_shot", "last_answer", "all_answers", "dedicated"), 9
    )


def test_a_budget_of_less_than_a_step_is_a_problem() -> None:
    settings = comparison("training.num_tokens=400", "compare.regimes=[all_answers]")
    (problem,) = budget_problems(settings, lengths_of(settings, toy_tasks(settings), byte_level_bpe()))
    assert problem.code == "budget_too_small"
    alone = comparison("training.num_tokens=400", "compare.regimes=[all_answers]", "compare.learning_rates=[1e-3]")
    assert not budget_problems(alone, lengths_of(alone, toy_tasks(alone), byte_level_bpe()))


def test_a_budget_that_whole_steps_miss_by_far_is_a_problem() -> None:
    def codes(num_tokens: int) -> list[str]:
        settings = comparison(f"training.num_tokens={num_tokens}", *one_rate)
        return [each.code for each in budget_problems(settings, lengths_of(settings, tasks, byte_level_bpe()))]

    one_rate = ("compare.regimes=[all_answers]", "compare.learning_rates=[1e-3]")
    tasks = toy_tasks(comparison(*one_rate))
    assert codes(round(1.45 * 240)) == codes(round(1.55 * 240)) == ["budget_unmet"]
    assert codes(round(1.1 * 240)) == codes(round(4.5 * 240)) == []


@pytest.mark.parametrize(
    ("num_answers", "num_sequences"), [(1440, 12), (1320, 11), (1200, 10), (960, 8), (30, 1), (132, 1), (492, 4)]
)
def test_as_many_answers_are_met_as_nearly_as_whole_steps_can(num_answers: float, num_sequences: int) -> None:
    settings = comparison()
    sampled = lengths_of(settings, toy_tasks(settings), byte_level_bpe())["all_answers"].statistics
    length = _equal_answers(Length(100, 8, sampled._replace(answers=120.0), 100), num_answers)
    assert length.num_sequences == num_sequences
    assert length.sequences_per_step <= 8
    alone = _equal_answers(Length(100, 1, sampled._replace(answers=120.0), 100), num_answers)
    assert (alone.num_sequences, alone.sequences_per_step) == (num_sequences, 1)


# Choosing


def reported(
    scores: dict[float, dict[int, float] | None], num_examples: int | None = None, kind: str = "NotFiniteError"
) -> Choice | UserError:
    """Choose between rates with these scores by step; None failed."""
    trials = [
        Trial(f"{rate}", "all_answers" if num_examples is None else "dedicated", rate, None, num_examples)
        for rate in scores
    ]
    reports = [
        CellReport(Cell(f"{rate}", {}), CellState.FAILED, failure={"kind": kind, "sentence": "the loss became nan"})
        if of_rate is None
        else CellReport(Cell(f"{rate}", {}), CellState.DONE, {"scores": {str(k): v for k, v in of_rate.items()}})
        for rate, of_rate in scores.items()
    ]
    (choice,) = choose(trials, reports).values()
    return choice


def test_the_best_rate_is_taken_and_of_equal_ones_the_middle() -> None:
    def rate(scores: dict[float, dict[int, float] | None]) -> float:
        choice = reported(scores)
        assert isinstance(choice, Choice)
        assert choice.num_steps is None
        return choice.learning_rate

    assert rate({1.0: {5: 0.1}, 2.0: {5: 0.2}, 3.0: {5: 0.3}}) == 3
    assert rate({1.0: {5: 0.3}, 2.0: {5: 0.3}, 3.0: {5: 0.3}}) == 2
    assert rate({1.0: {5: 0.3}, 2.0: {5: 0.1}, 3.0: {5: 0.3}}) == 1
    assert rate({1.0: {5: 0.1}, 2.0: None, 3.0: None}) == 1


def test_nothing_is_chosen_without_a_trial_that_failed_and_did_not_diverge() -> None:
    choice = reported({1.0: {5: 0.1}, 2.0: None, 3.0: {5: 0.3}}, kind="OutOfMemoryError")
    assert isinstance(choice, UserError)
    assert choice.code == "no_rate"
    assert "2.0: failed: the loss became nan" in str(choice)


def test_dedicated_models_choose_the_shortest_of_equally_good_lengths() -> None:
    choice = reported({1.0: {5: 0.1, 10: 0.4, 15: 0.4}, 2.0: {5: 0.2, 10: 0.3, 15: 0.1}}, num_examples=8)
    assert choice == Choice(1.0, 10, {1.0: 0.4, 2.0: 0.3})


def test_a_rate_that_was_chosen_stays_as_long_as_the_same_rates_are_compared(tmp_path: Path) -> None:
    file, rates = tmp_path / "chosen.json", (1e-3, 3e-3)
    assert known_choices(file, rates) == {}
    choices = {"few_shot": Choice(1e-3, None, {1e-3: 0.5, 3e-3: 0.25}), "dedicated_8": Choice(3e-3, 4)}
    write_choices(file, rates, choices)
    assert known_choices(file, rates) == choices
    assert known_choices(file, (1e-3,)) == {}
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError) as error:
        known_choices(file, rates)
    assert error.value.code == "broken_comparison"


def test_where_all_trials_failed_the_reason_is_kept() -> None:
    choice = reported({1.0: None, 2.0: None})
    assert isinstance(choice, UserError)
    assert choice.code == "no_rate"
    assert "the loss became nan" in str(choice)


def test_a_trial_of_dedicated_models_is_scored_on_its_way_and_another_one_at_its_end() -> None:
    settings = comparison("compare.dedicated.num_examples=[8]")
    tasks = toy_tasks(settings)
    statistics = lengths_of(settings, tasks, byte_level_bpe())["dedicated"].statistics
    lengths = {name: Length(40, 2, statistics, 40.0) for name in ("dedicated", "few_shot")}
    known = {trial.regime: trial for trial in planned_trials(settings, tasks)}
    dedicated = recipe_of_trial(known["dedicated"], settings, lengths, Path("there")).training
    assert (dedicated.num_steps, dedicated.evaluate_every, dedicated.evaluate_shots) == (40, 5, (0,))
    few_shot = recipe_of_trial(known["few_shot"], settings, lengths, Path("there")).training
    assert (few_shot.num_steps, few_shot.evaluate_every, few_shot.evaluate_shots) == (8, "end", (2,))


# Checks


def problems_of(settings: Comparison, **changes: list[Task]) -> list[UserError]:
    tasks = toy_tasks(settings)
    sides = {"train": tasks.train, "validation": tasks.validation, "unseen": tasks.unseen, **changes}
    return list(comparison_problems(settings, assigned(settings, *sides.values())))


@pytest.fixture(name="settings", scope="module")
def _settings(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return comparison_in(tmp_path_factory.mktemp("checks"), "compare.dedicated.num_examples=[8]")


def test_a_comparison_that_is_possible_has_no_problem(settings: Comparison) -> None:
    assert not problems_of(settings)


def test_everything_that_is_wrong_is_said_together(settings: Comparison) -> None:
    rows = [make_example(f"film {number}", "good") for number in range(40)]
    few = [make_example(f"film {number}", ("good", "bad")[number % 2]) for number in range(3)]
    trained = toy_tasks(settings).train[0]
    unseen = [
        make_task("one class", train=rows, family="nli", data_hash="1"),
        make_task("small", train=few, family="qa", data_hash="2"),
        make_task("no tests", test=[], family="math", data_hash="3"),
        make_task("one test", test=few[:1], labels=None, family="math", data_hash="8"),
        make_task("sibling", source=trained.source, family="nli", data_hash="4"),
        replace(trained, data_hash="5").with_spec(source="elsewhere"),
    ]
    found = problems_of(settings, unseen=unseen)
    assert {problem.code for problem in found} == {
        "single_class",
        "too_few_rows",
        "no_test_rows",
        "task_not_unseen",
        "duplicate_task",
    }
    with pytest.raises(UserError) as error:
        require_possible(found)
    assert error.value.code == "cannot_compare"
    assert all(str(problem) in str(error.value) for problem in found)


def test_all_tasks_with_free_answers_are_problems_of_the_channel_form_alone(settings: Comparison) -> None:
    tasks = toy_tasks(settings)
    free = [make_task(name, labels=None, family="generation", data_hash=name) for name in ("one", "two")]
    changes = {"train": [*tasks.train, free[0]], "unseen": [*tasks.unseen, free[1]]}
    assert not problems_of(settings, **changes)
    channel = settings.model_copy(update={"format": settings.format.model_copy(update={"kind": "channel"})})
    found = problems_of(channel, **changes)
    assert [problem.code for problem in found] == ["free_answers_in_channel_form"] * 2
    assert [name in str(problem) for name, problem in zip(("'one'", "'two'"), found, strict=True)] == [True, True]
    with_probe = replace(tasks, probes=(free[0],))
    assert "free_answers_in_channel_form" in {problem.code for problem in comparison_problems(channel, with_probe)}
    assert "free_answers_in_channel_form" not in {problem.code for problem in comparison_problems(settings, with_probe)}


def test_files_that_are_not_there_are_problems_together(settings: Comparison, tmp_path: Path) -> None:
    replay, forgetting = ({"text": tmp_path / name} for name in ("replay.txt", "held_out.txt"))
    changes = {"replay": replay, "forgetting": forgetting, "predictions": {"other": tmp_path / "answers.jsonl"}}
    compare = CompareSettings(**{**settings.compare.model_dump(), **changes})
    found = problems_of(settings.model_copy(update={"compare": compare}))
    assert [problem.code for problem in found] == ["missing_file"] * 3
    assert {problem.field for problem in found} == {
        "compare.replay.text",
        "compare.forgetting.text",
        "compare.predictions.other",
    }


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ({"query_hash": "0", "answer": "good"}, "foreign_query"),
        ({"query_hash": "0"}, "no_answer"),
        ({"query_hash": "0", "answer": "\ud83d"}, "half_a_character"),
    ],
)
def test_answers_to_other_queries_are_a_problem_before_a_model_is_loaded(
    settings: Comparison, tmp_path: Path, line: dict[str, str], code: str
) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(json.dumps(line), encoding="utf-8")
    compare = CompareSettings(**{**settings.compare.model_dump(), "predictions": {"other": file}})
    (problem,) = problems_of(settings.model_copy(update={"compare": compare}))
    assert (problem.code, problem.file, problem.row) == (code, file, 1)


def test_one_query_is_a_problem(settings: Comparison) -> None:
    compare = CompareSettings(**{**settings.compare.model_dump(), "num_queries": 1})
    assert [problem.field for problem in problems_of(settings.model_copy(update={"compare": compare}))] == [
        "compare.num_queries"
    ]


def test_one_text_for_replay_and_forgetting_is_a_problem(settings: Comparison, tmp_path: Path) -> None:
    texts = {name: tmp_path / f"{name}.txt" for name in ("replay", "forgetting")}
    compare = CompareSettings(**{**settings.compare.model_dump(), **{name: {"text": at} for name, at in texts.items()}})
    changed = settings.model_copy(update={"compare": compare})
    for other, codes in (("One text.", ["same_text"]), ("Another.", [])):
        for path, content in zip(texts.values(), ("One text.", other), strict=True):
            path.write_text(content, encoding="utf-8")
        assert [problem.code for problem in problems_of(changed)] == codes


def test_variants_that_cannot_be_are_problems_together(settings: Comparison) -> None:
    variants = {
        "long": {"set": ["sequences.max_context_tokens=4096"]},
        "misspelt": {"set": ["sequences.examples=4"]},
        "possible": {"set": ["sequences.rename_labels=0.5"]},
    }
    compare = CompareSettings(**{**settings.compare.model_dump(), "variants": variants})
    found = problems_of(settings.model_copy(update={"compare": compare}))
    assert [problem.code for problem in found] == ["context_too_long", "unknown_key"]


def test_a_validation_task_with_one_label_is_a_problem(settings: Comparison) -> None:
    rows = [make_example(f"film {number}", "good") for number in range(40)]
    found = problems_of(settings, validation=[make_task("one class", train=rows, data_hash="7")])
    assert [problem.code for problem in found] == ["single_class"]


def test_a_text_that_is_not_given_or_not_there_is_one_problem(settings: Comparison, tmp_path: Path) -> None:
    for forgetting, code in ({}, "missing_text"), ({"text": tmp_path / "none.txt"}, "missing_file"):
        compare = CompareSettings(**{**settings.compare.model_dump(), "forgetting": forgetting})
        changed = settings.model_copy(update={"compare": compare})
        found = [*problems_of(changed), *text_problems(changed, byte_level_bpe())]
        assert [problem.code for problem in found] == [code]


def test_a_base_with_a_shorter_context_is_a_problem_before_it_is_loaded(settings: Comparison) -> None:
    longer = settings.sequences.model_copy(update={"max_context_tokens": 4096})
    (problem,) = problems_of(settings.model_copy(update={"sequences": longer}))
    assert problem.code == "context_too_long"


def test_a_validation_task_that_a_dedicated_trial_would_use_up_is_a_problem(settings: Comparison) -> None:
    few = [make_example(f"film {number}", ("good", "bad")[number % 2]) for number in range(12)]
    found = problems_of(settings, validation=[make_task("small", train=few, data_hash="6")])
    assert [problem.code for problem in found] == ["too_few_rows"]
    assert "rows to score them on" in str(found[0])


def test_a_resolved_file_is_read_as_it_was() -> None:
    for regimes in ("[base]", "[base, all_answers, dedicated]"):
        settings = Comparison.parse(TEXT, overrides=[f"compare.regimes={regimes}"])
        assert Comparison.parse(settings.to_yaml()) == settings


@pytest.mark.parametrize(
    ("content", "code"), [(b"\xff\xfe bad", "not_utf8"), (b" \n", "empty_text"), (b"a", "text_too_short")]
)
def test_a_text_on_which_forgetting_cannot_be_measured_is_refused_at_once(
    tmp_path: Path, content: bytes, code: str
) -> None:
    text = tmp_path / "text.txt"
    text.write_bytes(content)
    (error,) = text_problems(comparison(f"compare.forgetting={{text: {text}}}"), byte_level_bpe())
    assert (error.code, str(error.file)) == (code, str(text))


def test_one_rate_is_said_without_scores() -> None:
    assert Choice(8e-4).sentence("zero_shot") == "zero_shot: learning rate 0.0008."


@pytest.mark.parametrize("key", ["num_training_seeds", "num_draws"])
def test_a_comparison_has_an_end(key: str) -> None:
    with pytest.raises(UserError):
        comparison(f"compare.{key}=101")
