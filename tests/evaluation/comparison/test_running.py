"""A comparison from its file to its records: interrupted, failed, shared by processes, planned."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from manyicl.atomic import _ASIDE, write_atomically
from manyicl.errors import MachineError, NotFiniteError, UserError
from manyicl.evaluation.comparison import run as running
from manyicl.evaluation.comparison.cells import planned_runs
from manyicl.evaluation.comparison.omissions import omissions
from manyicl.evaluation.comparison.plan import ComparisonPlan, planned
from manyicl.evaluation.comparison.records import CellRecord, ComparisonRecords, is_comparison
from manyicl.evaluation.comparison.run import _Work, _write_files, prepare, run_comparison
from manyicl.evaluation.comparison.settings import Comparison
from manyicl.evaluation.comparison.statistics import statistics_of
from manyicl.evaluation.comparison.summary import as_json, score_rows
from manyicl.evaluation.grid import CellState
from manyicl.evaluation.shot_curve import measure_shot_curves
from manyicl.training.job import ensure_trained
from tests.builders import byte_level_bpe, tiny_model
from tests.evaluation.comparison.cases import comparison_in, write_task
from tests.training.test_train import stop_in_step

PAIR = ("compare.regimes=[base, last_answer, all_answers]", "compare.learning_rates=[1e-3]")
TUNED = ("compare.regimes=[zero_shot, all_answers]", "compare.learning_rates=[1e-3, 3e-3]")


def console() -> Console:
    return Console(file=io.StringIO(), width=300)


def compared(settings: Comparison, **options: Any) -> ComparisonRecords:
    return run_comparison(settings, console=console(), **options)


def timeless(records: ComparisonRecords) -> tuple[list[CellRecord], list[dict[str, Any]]]:
    """What two runs of one comparison have in common: all but times, and the memory that the process used."""
    cells = [cell.model_copy(update={"seconds": 0.0, "peak_memory_gib": None}) for cell in records.cells]
    results = [result.model_dump(exclude={"seconds", "created", "model"}) for result in records.results]
    return cells, sorted(results, key=lambda each: (each["model_name"], each["task"], each["num_shots"]))


@pytest.fixture(autouse=True, scope="module")
def _no_matrix_products() -> Iterator[None]:
    """Leave out what is timed at the start of each training, which takes longer than these trainings."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("manyicl.training.trainer.matrix_rate", lambda dtype, device: 1e12)
        yield


@pytest.fixture(name="whole", scope="module")
def _whole(tmp_path_factory: pytest.TempPathFactory) -> ComparisonRecords:
    """A comparison that nothing interrupted, with a choice of rates and dedicated models."""
    folder = tmp_path_factory.mktemp("whole")
    return compared(comparison_in(folder, *SMALL))


SMALL = (
    "compare.regimes=[base, all_answers, dedicated]",
    "compare.learning_rates=[1e-3, 3e-3]",
    "compare.dedicated={tasks_per_family: 1, num_examples: [4], budget: share}",
    "training.num_tokens=2400",
    "compare.num_seen=0",
)


def test_every_model_is_trained_and_evaluated_under_its_own_name(whole: ComparisonRecords) -> None:
    assert not whole.failures
    assert [cell.name for cell in whole.cells] == [
        "base_seed0",
        "all_answers_seed0",
        "dedicated_classification_unseen_0_4_seed0",
        "dedicated_nli_unseen_0_4_seed0",
    ]
    base, many, *dedicated = whole.cells
    assert (base.num_steps, base.learning_rate) == (0, None)
    assert many.num_tokens == pytest.approx(2400, rel=0.1)
    assert many.num_answers > many.num_steps > 0
    assert many.learning_rate in (1e-3, 3e-3)
    assert all(0 < cell.num_steps <= many.num_steps / 2 + 1 for cell in dedicated)
    assert all(cell.seconds > 0 and cell.peak_memory_gib for cell in whole.cells[1:])
    points = {(result.model_name, result.task, result.num_shots) for result in whole.results}
    tasks = ("classification_unseen_0", "nli_unseen_0")
    curves = {(cell.name, task, shots) for cell in (base, many) for task in tasks for shots in whole.settings.shots}
    assert points == curves | {(cell.name, str(cell.task), 0) for cell in dedicated}
    assert all(result.max_context_tokens == 120 for result in whole.results)
    fingerprints = {result.model_name: result.model_fingerprint for result in whole.results}
    assert fingerprints == {cell.name: cell.model_fingerprint for cell in whole.cells}


def test_the_summary_has_a_row_for_each_kind_of_model(whole: ComparisonRecords) -> None:
    rows = list(score_rows(whole))
    labels = ["base", "many-shot, all answers", "one model per task, 4 examples"]
    assert [row["model"] for row in rows] == labels
    assert rows[2]["cells"] == "2"
    assert rows[2]["unseen, 2 shots"] == ""
    cells = as_json(whole)["cells"]
    assert [cell["state"] for cell in cells] == ["done"] * 4
    assert set(cells[0]["scores"]["unseen"]) == {0, 2}


def stopping(times: int, original: Callable[..., Any]) -> Callable[..., Any]:
    """Call a function so often, and be interrupted by Ctrl-C instead of calling it once more."""
    left = iter(range(times))

    def call(*arguments: Any, **options: Any) -> Any:
        if next(left, None) is None:
            raise KeyboardInterrupt
        return original(*arguments, **options)

    return call


def test_an_interrupted_comparison_in_another_order_ends_as_one_that_was_left_alone(
    whole: ComparisonRecords, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = comparison_in(tmp_path, *SMALL)
    monkeypatch.setattr(running, "planned_runs", lambda *given: _planned_runs(*given)[::-1])
    for name, times in (("ensure_trained", 2), ("measure_shot_curves", 1), ("ensure_trained", 1)):
        with monkeypatch.context() as patch:
            patch.setattr(running, name, stopping(times, getattr(running, name)))
            with pytest.raises(KeyboardInterrupt):
                compared(settings)
    monkeypatch.setattr(running, "planned_runs", _planned_runs)
    assert CellState.INTERRUPTED in {report.state for report in ComparisonRecords.load(settings.output).failures}
    records = compared(settings)
    assert not records.failures
    assert timeless(records) == timeless(whole)
    again = compared(settings)
    assert again.results == records.results


_planned_runs = planned_runs


def test_ctrl_c_in_the_last_step_of_a_training_stops_the_comparison(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = comparison_in(tmp_path, *TUNED, "compare.regimes=[all_answers]")
    with monkeypatch.context() as patch:
        patch.setattr(running, "held_out_measure", lambda tasks, **options: stop_in_step(1))
        with pytest.raises(KeyboardInterrupt):
            compared(settings)
    trial = settings.output / "rates" / "all_answers_rate0"
    assert (trial / "model" / "manyicl.json").is_file()
    assert not (trial / "done.json").exists()
    assert not (settings.output / "rates" / "all_answers_rate1" / "cell.json").exists()
    assert not compared(settings).failures


def test_a_cell_that_fails_is_kept_and_ends_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = comparison_in(tmp_path, *TUNED)
    original = ensure_trained

    def failing(recipe: Any, *arguments: Any, **options: Any) -> Any:
        if recipe.training.learning_rate == 1e-3:
            raise (MachineError if recipe.sequences.examples_per_episode == 1 else NotFiniteError)("It became nan.")
        return original(recipe, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(running, "ensure_trained", failing)
        records = compared(settings)
    assert [(cell.name, cell.learning_rate) for cell in records.cells] == [("all_answers_seed0", 3e-3)]
    (failed,) = records.failures
    assert (failed.cell.name, failed.state) == ("zero_shot_seed0", CellState.FAILED)
    assert failed.failure is not None
    assert failed.failure["code"] == "no_rate"
    # A rate at which training diverges is out; for another failure no rate is chosen without its trial.
    assert "zero_shot_rate0: failed: MachineError: It became nan" in failed.failure["sentence"]
    assert [cell["state"] for cell in as_json(records)["cells"]] == ["done", "failed"]
    assert [trial.cell.name for trial in records.failed_trials] == [
        "all_answers_rate0",
        "zero_shot_rate0",
    ]
    assert as_json(records)["failed_trials"][0]["name"] == "all_answers_rate0"
    missing = omissions(records, statistics_of(records))
    assert "Learning rate all_answers_rate0: failed: NotFiniteError: It became nan." in missing
    assert compared(settings).failures
    shown = console()
    retried = run_comparison(settings, console=shown, retry_failed=True)
    assert not retried.failures
    assert [trial.cell.name for trial in retried.failed_trials] == ["all_answers_rate0"]
    assert isinstance(shown.file, io.StringIO)
    assert "all_answers_rate0 is not tried again: the rate of all_answers was chosen" in shown.file.getvalue()
    # What was chosen stays, although the other rate could be tried by now.
    assert retried.cells[1].learning_rate == 3e-3
    chosen = json.loads((settings.output / "rates" / "chosen.json").read_text(encoding="utf-8"))
    assert {name: choice["learning_rate"] for name, choice in chosen["choices"].items()}["all_answers"] == 3e-3


def test_a_process_waits_for_trials_of_another_one_and_takes_over_what_it_leaves(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, *TUNED, "compare.regimes=[all_answers]")
    place = settings.output / "rates" / "all_answers_rate1"
    place.mkdir(parents=True)
    for name in ("comparison.yaml", "tasks.json", "cells.json"):
        (settings.output / name).touch()
    lock = FileLock(place / ".lock", thread_local=False)
    lock.acquire()
    shown = console()
    timer = threading.Timer(4.0, lock.release)
    timer.start()
    records = run_comparison(settings, console=shown)
    timer.join()
    assert not records.failures
    assert isinstance(shown.file, io.StringIO)
    text = shown.file.getvalue()
    assert text.index("all_answers_rate0: done") < text.index("all_answers_rate1: done")


def test_two_models_with_equal_weights_stay_two(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[base]", "compare.num_training_seeds=2")
    first, second = compared(settings).cells
    assert first.model_fingerprint == second.model_fingerprint
    seeds = {
        (result.model_name, result.seed, result.queries_hash)
        for result in ComparisonRecords.load(settings.output).results
    }
    assert {(name, seed) for name, seed, _ in seeds} == {("base_seed0", 0), ("base_seed1", 1)}
    assert len({queries for _, _, queries in seeds}) <= 4


def test_the_plan_is_made_without_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.training.estimate.SECONDS_MEASURED", 0.1)
    settings = comparison_in(tmp_path, *TUNED)
    plan = planned(prepare(settings))
    lines = "\n".join(plan.lines())
    assert not settings.output.exists()
    assert "4 cells: 4 waiting" in lines
    assert "Left to do: 6 trainings" in lines
    content = plan.as_json()
    assert [cell["name"] for cell in content["cells"]] == ["zero_shot_seed0", "all_answers_seed0"]
    assert content["hours"] > 0
    # Two models, four tasks, two shot counts, four queries.
    assert content["num_answers"] == 2 * 4 * 2 * 4
    compared(settings)
    after = planned(prepare(settings)).as_json()
    assert (after["num_tokens"], after["num_answers"]) == (0, 0)
    assert {cell["state"] for cell in (*after["cells"], *after["trials"])} == {"done"}


def test_cells_may_be_added_and_none_may_change(tmp_path: Path) -> None:
    base = "compare.regimes=[base]"
    compared(comparison_in(tmp_path, base))
    more = compared(comparison_in(tmp_path, base, "compare.num_training_seeds=2"))
    assert len(more.cells) == 2
    with pytest.raises(UserError) as error:
        compared(comparison_in(tmp_path, base, "compare.num_queries=3"))
    assert error.value.code == "another_cell"
    assert "compare.num_queries was 4, is 3. Compare into another output" in str(error.value)
    assert ComparisonRecords.load(tmp_path / "output").settings.compare.num_queries == 4


def test_a_refusal_names_the_budget_as_the_file_does_and_changed_rows(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[all_answers]", "compare.learning_rates=[1e-3]")
    declared = prepare(settings)
    running._write_files(declared)
    (cell,) = declared.models.cells
    (settings.output / "runs" / cell.name).mkdir(parents=True)
    file = settings.output / "runs" / cell.name / "cell.json"
    file.write_text(json.dumps(cell.settings), encoding="utf-8")

    def refused(*overrides: str) -> str:
        with pytest.raises(UserError) as error:
            prepare(
                comparison_in(tmp_path, "compare.regimes=[all_answers]", "compare.learning_rates=[1e-3]", *overrides)
            )
        assert error.value.code == "another_cell"
        return str(error.value)

    assert "training.num_tokens was 1200, is 2400." in refused("training.num_tokens=2400")
    assert "compare.learning_rates was [0.001], is [0.002]." in refused("compare.learning_rates=[2e-3]")
    with (tmp_path / "train" / "nli_train_0" / "train.jsonl").open("a", encoding="utf-8") as rows:
        rows.write(json.dumps({"text": "one more film", "answer": "yes"}) + "\n")
    assert "its training tasks or their rows changed." in refused()


def test_other_weights_of_the_base_at_the_same_place_are_refused(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[base]")
    compared(settings)
    prepare(settings)
    tiny_model(seed=1, vocabulary_size=len(byte_level_bpe())).save_pretrained(str(tmp_path / "base"))
    for again in (prepare, compared):
        with pytest.raises(UserError) as error:
            again(settings)
        assert error.value.code == "another_cell"
        assert "the weights of the base changed" in str(error.value)


def test_a_comparison_that_knew_no_instruction_to_omit_goes_on(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[all_answers]", "compare.learning_rates=[1e-3]")
    (cell,) = prepare(settings).models.cells
    assert "omit_instruction" not in cell.settings["recipe"]["sequences"]


def test_a_comparison_that_knew_nothing_of_the_weights_of_its_base_goes_on(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[base]")
    compared(settings)
    file = settings.output / "runs" / "base_seed0" / "cell.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content.pop("base_weights")
    file.write_text(json.dumps(content), encoding="utf-8")
    assert not compared(settings).failures


def test_a_model_whose_results_are_gone_is_evaluated_again_and_not_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[all_answers]", "compare.learning_rates=[1e-3]")
    first = compared(settings)
    calls: list[str] = []
    measure = measure_shot_curves

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(options["model_name"])
        return measure(*arguments, **options)

    monkeypatch.setattr(running, "measure_shot_curves", counted)
    assert compared(settings).results == first.results
    assert not calls
    gone = next((settings.output / "results").glob("nli_unseen_0*"))
    gone.unlink()
    assert "all_answers_seed0: 2 of 8 results missing" in "\n".join(ComparisonPlan(prepare(settings), None).lines())
    shown = console()
    again = run_comparison(settings, console=shown)
    assert timeless(again) == timeless(first)
    assert calls == ["all_answers_seed0"]
    assert isinstance(shown.file, io.StringIO)
    assert "all_answers_seed0: 2 of 8 results missing" in shown.file.getvalue()


def test_two_processes_that_begin_in_one_folder_with_other_settings_do_not_mix(tmp_path: Path) -> None:
    first, second = (comparison_in(tmp_path, "compare.regimes=[base]", f"compare.num_queries={n}") for n in (4, 3))
    one, other = prepare(first), prepare(second)
    running._write_files(one)
    running._write_files(one)
    with pytest.raises(UserError) as error:
        running._write_files(other)
    assert error.value.code == "another_comparison"
    assert ComparisonRecords.load(first.output).settings.compare.num_queries == 4


@pytest.mark.parametrize(
    ("name", "content"),
    [("rates/all_answers_rate0/done.json", '{"learning_rate": 1e-3}'), ("runs/all_answers_seed0/done.json", "{")],
)
def test_a_damaged_record_is_refused_before_anything_is_trained(tmp_path: Path, name: str, content: str) -> None:
    settings = comparison_in(tmp_path, *TUNED, "compare.regimes=[all_answers]")
    running._write_files(prepare(settings))
    file = settings.output / name
    file.parent.mkdir(parents=True)
    file.write_text(content, encoding="utf-8")
    with pytest.raises(UserError) as error:
        prepare(settings)
    assert (error.value.code, error.value.file) == ("broken_comparison", file)


def test_a_cell_that_failed_before_it_had_a_model_takes_other_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*arguments: Any, **options: Any) -> Any:
        raise MachineError("There is no memory left.")

    with monkeypatch.context() as patch:
        patch.setattr(running, "load_model", failing)
        patch.setattr(running._Work, "exchange_predictions", lambda self: None)
        assert compared(comparison_in(tmp_path, "compare.regimes=[base]")).failures
    changed = comparison_in(tmp_path, "compare.regimes=[base]", "compare.num_queries=3")
    assert not compared(changed).failures
    assert {result.num_queries for result in ComparisonRecords.load(changed.output).results} == {3}


@pytest.fixture(name="besides")
def _besides(tmp_path: Path) -> Comparison:
    """A comparison that measures more than its tasks."""
    text, replayed = tmp_path / "text.txt", tmp_path / "replayed.txt"
    for path, thing in ((text, "film"), (replayed, "play")):
        path.write_text(" ".join(f"The {thing} {number} was good and the music was fine." for number in range(80)))
    write_task(tmp_path / "probe" / "a_probe", "qa", ("red", "blue"))
    forgetting = f"{{text: {text}, num_tokens: 300, probes: [{tmp_path / 'probe'}], probe_shots: [0]}}"
    replay = f"compare.replay={{text: {replayed}, share: 0.3}}"
    return comparison_in(tmp_path, *PAIR, ONE, replay, f"compare.forgetting={forgetting}")


ONE = "compare.regimes=[base, all_answers]"


def test_forgetting_and_positions_are_measured_and_replay_is_a_model_of_its_own(besides: Comparison) -> None:
    records = compared(besides)
    assert not records.failures
    assert records.roles["a_probe"].role == "probe"
    base, plain, replayed = records.cells
    assert [cell.name for cell in records.cells] == ["base_seed0", "all_answers_seed0", "all_answers_replay_seed0"]
    assert [cell.replay for cell in records.cells] == [False, False, True]
    assert replayed.num_answers < plain.num_answers
    assert replayed.num_tokens == pytest.approx(plain.num_tokens, rel=0.3)
    assert [moment.step for moment in base.forgetting] == [0]
    for cell in (plain, replayed):
        assert len(cell.forgetting) > 1
        assert cell.forgetting[-1].step == cell.num_steps
    moments = [moment for cell in records.cells for moment in cell.forgetting]
    assert len({(moment.text_sha256, moment.num_tokens) for moment in moments}) == 1
    assert all(moment.nats_per_token and moment.nats_per_byte for moment in moments)
    assert all(set(moment.probes) == {"a_probe"} for moment in moments)
    tasks = {result.task for result in records.results}
    assert all({score.task for score in cell.positions} == tasks for cell in records.cells)
    assert "a_probe" not in tasks


def test_answers_of_another_system_are_scored_on_the_same_queries(tmp_path: Path) -> None:
    base = "compare.regimes=[base]"
    first = compared(comparison_in(tmp_path, base))
    lines = (tmp_path / "output" / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [{"query_hash": one["query_hash"], "answer": one["options"][0]} for one in map(json.loads, lines)]
    file = tmp_path / "answers.jsonl"
    changes = (base, f"compare.predictions={{first_label: {file}}}")
    file.write_text("".join(f"{json.dumps(answer)}\n" for answer in answers[1:]), encoding="utf-8")
    with pytest.raises(UserError) as error:
        compared(comparison_in(tmp_path, *changes))
    assert error.value.code == "missing_answer"
    file.write_text("".join(f"{json.dumps(answer)}\n" for answer in answers), encoding="utf-8")
    results = compared(comparison_in(tmp_path, *changes)).results
    queries = {result.task: result.queries_hash for result in first.results}
    imported = {result.task: result.queries_hash for result in results if result.model_name == "import_first_label"}
    assert imported == queries
    wrong = [{**answer, "answer": "no label"} for answer in answers]
    scores = []
    for each in (answers, wrong, answers):
        file.write_text("".join(f"{json.dumps(answer)}\n" for answer in each), encoding="utf-8")
        records = compared(comparison_in(tmp_path, *changes))
        (summary,) = as_json(records)["imported"]
        assert summary["name"] == "first_label"
        scores.append(summary["scores"]["unseen"][0])
        assert list(score_rows(records))[-1]["model"] == "imported: first_label"
        assert list(score_rows(records))[-1]["unseen, 0 shots"] == f"{scores[-1]:.3f}"
    assert scores[0] == scores[2] > scores[1] == 0
    records = compared(comparison_in(tmp_path, base))
    assert not [result for result in records.results if result.model_name.startswith("import_")]
    assert as_json(records)["imported"] == []


def test_queries_are_written_again_where_they_would_be_others(tmp_path: Path) -> None:
    file = tmp_path / "output" / "queries.jsonl"
    for number in (4, 3):
        # Trials do not depend on it, so that it may still change.
        settings = comparison_in(tmp_path, "compare.regimes=[base]", f"compare.num_queries={number}")
        prepared = prepare(settings)
        _write_files(prepared)
        work = _Work(prepared, console())
        work.exchange_predictions()
        assert len(file.read_text(encoding="utf-8").splitlines()) == 4 * number
    before = file.stat().st_mtime_ns
    work.exchange_predictions()
    assert file.stat().st_mtime_ns == before


def test_what_a_kill_left_of_the_first_file_does_not_block_the_output(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[base]")
    settings.output.mkdir()
    write_atomically(settings.output / "tasks.json", "{}")
    (settings.output / "tasks.json").rename(settings.output / f"{_ASIDE}1-tasks.json")
    assert prepare(settings).found is None


def test_without_demonstrations_nothing_is_scored_by_position(tmp_path: Path) -> None:
    settings = comparison_in(
        tmp_path, "compare.regimes=[base, zero_shot]", "compare.shots=[0]", "compare.learning_rates=[1e-3]"
    )
    records = compared(settings)
    assert not records.failures
    assert [cell.positions for cell in records.cells] == [(), ()]


def test_an_output_with_other_files_is_refused(tmp_path: Path) -> None:
    settings = comparison_in(tmp_path, "compare.regimes=[base]")
    settings.output.mkdir()
    (settings.output / "thesis.txt").touch()
    with pytest.raises(UserError) as error:
        compared(settings)
    assert error.value.code == "output_exists"
    assert not is_comparison(settings.output)
    with pytest.raises(UserError) as error:
        ComparisonRecords.load(settings.output)
    assert error.value.code == "no_comparison"


def test_all_models_of_a_comparison_in_the_channel_form_are_used_in_it_the_base_too(tmp_path: Path) -> None:
    channel = ("format.kind=channel", "compare.regimes=[base, few_shot]", "compare.learning_rates=[1e-3]")
    settings = comparison_in(tmp_path, *channel, "compare.num_seen=0", "compare.num_draws=2")
    direct = comparison_in(tmp_path, *channel[1:], "compare.num_seen=0", "compare.num_draws=2")
    # Of the base, which has two labels to score for each query.
    plans = [ComparisonPlan(prepare(each), None) for each in (settings, direct)]
    (num_answers, num_tokens), (same_answers, fewer_tokens) = (
        plan._evaluation(plan.prepared.runs[0]) for plan in plans
    )
    assert num_answers == same_answers
    assert fewer_tokens < num_tokens < 2 * fewer_tokens
    records = compared(settings)
    assert not records.failures
    assert {result.model_name for result in records.results} == {"base_seed0", "few_shot_seed0"}
    assert {result.text_format["kind"] for result in records.results} == {"channel"}
    assert {result.seed for result in records.results if result.num_shots} == {0, 1}
