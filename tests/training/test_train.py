from __future__ import annotations

import io
import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from rich.console import Console
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyicl.errors import MachineError, UserError
from manyicl.evaluation.held_out import held_out_measure
from manyicl.model.load import LoadedModel, load_model
from manyicl.model.manifest import Manifest, TrainedTask
from manyicl.tasks.files import OnProgress
from manyicl.training.batch import sequence_counts
from manyicl.training.checkpoint import RunInterrupted
from manyicl.training.counts import SequenceCounts
from manyicl.training.job import Existing, TrainedRun, ensure_trained
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks, load_recipe_tasks
from manyicl.training.run_folder import RunFolder, RunState
from manyicl.training.stopping import stopping_signals
from manyicl.training.train import Measure, packed_sequences
from tests.builders import make_task
from tests.training.recipes import measuring, small_recipe, small_tasks


def run(
    recipe: Recipe,
    tasks: RecipeTasks | None = None,
    *,
    evaluation: Measure | None = None,
    resume: bool = False,
    overwrite: bool = False,
    screen: io.StringIO | None = None,
) -> TrainedRun:
    existing: Existing = "resume" if resume else "replace" if overwrite else "refuse"
    console = Console(file=screen or io.StringIO(), width=300)
    return ensure_trained(recipe, tasks or small_tasks(), measuring(evaluation), existing=existing, console=console)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


def assert_equal_weights(one: Path, other: Path) -> None:
    first, second = weights_in(one), weights_in(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def stop_in_step(step: int) -> Callable[[LoadedModel], Mapping[str, float]]:
    """An evaluation that sends Ctrl-C, as a person would, while that step's work is under way."""
    calls = 0

    def evaluation(loaded: LoadedModel) -> Mapping[str, float]:
        nonlocal calls
        calls += 1
        if calls == step:
            os.kill(os.getpid(), signal.SIGINT)
        return {"score": 0.0}

    return evaluation


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run") / "scratch"
    run(small_recipe(output))
    return output


def test_the_output_loads_in_plain_transformers_and_holds_no_pickle(finished: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(finished)
    tokenizer = AutoTokenizer.from_pretrained(finished)
    assert model.config.use_cache
    assert tokenizer.decode(tokenizer("film 1 was film\ngood\n\n")["input_ids"]) == "film 1 was film\ngood\n\n"
    assert not [path.name for path in finished.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    assert Recipe.read(finished / "recipe.yaml").output == finished
    assert any((finished / "logs").iterdir())


def test_the_manifest_remembers_format_tasks_and_objective(finished: Path) -> None:
    manifest = Manifest.read(finished)
    assert manifest is not None
    assert [task.name for task in manifest.tasks] == ["one", "two"]
    assert manifest.max_context_tokens == 60
    assert manifest.max_trained_shots == 5
    assert manifest.objective == "all_answers"
    assert manifest.base is None


def test_the_same_recipe_gives_the_same_weights(finished: Path, tmp_path: Path) -> None:
    run(small_recipe(tmp_path / "again"))
    assert_equal_weights(finished, tmp_path / "again")


def test_a_run_stopped_by_ctrl_c_and_resumed_equals_one_without_interruption(tmp_path: Path) -> None:
    changes = ("training.evaluate_every=1", "training.num_steps=6")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    best_is_last = iter(range(100))
    run(small_recipe(whole, *changes), evaluation=lambda loaded: {"score": float(next(best_is_last))})
    stopped = run(small_recipe(parts, *changes), evaluation=stop_in_step(2))
    assert not stopped.finished
    assert stopped.num_steps == 2
    assert not (parts / "manyicl.json").exists()
    resumed = run(
        small_recipe(parts, *changes), evaluation=lambda loaded: {"score": float(next(best_is_last))}, resume=True
    )
    assert resumed.finished
    assert resumed.num_steps == 6
    assert_equal_weights(whole, parts)


@contextmanager
def at_row(monkeypatch: pytest.MonkeyPatch, number: int, act: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Change the loss of one sequence of a run, four to a step."""
    calls = 0

    def changed(*arguments: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return act(sequence_loss(*arguments)) if calls == number else sequence_loss(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr("manyicl.training.trainer.sequence_loss", changed)
        yield


def with_signal(loss: Tensor) -> Tensor:
    os.kill(os.getpid(), signal.SIGTERM)
    return loss


def test_a_signal_in_a_step_that_is_to_be_evaluated_lets_it_be_evaluated_and_says_what_it_waits_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    changes = ("training.evaluate_every=2", "training.num_steps=6")
    scores = iter([0.7, 0.2, 0.1])
    with at_row(monkeypatch, 6, with_signal):
        stopped = run(small_recipe(tmp_path / "run", *changes), evaluation=lambda loaded: {"score": next(scores)})
    assert (stopped.finished, stopped.num_steps, stopped.best_step) == (False, 2, 2)
    assert "Stopping once this step, and its evaluation if one is due, is saved." in capfd.readouterr().err
    done = run(small_recipe(tmp_path / "run", *changes), evaluation=lambda loaded: {"score": next(scores)}, resume=True)
    assert (done.finished, done.best_score, done.best_step) == (True, 0.7, 2)


def test_a_second_signal_ends_a_run_at_once_and_names_the_last_good_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manyicl.training.trainer.SECONDS_OF_ONE_REQUEST", -1.0)
    recipe = small_recipe(tmp_path / "run", "training.save_every=1")
    with at_row(monkeypatch, 6, lambda loss: with_signal(with_signal(loss))), pytest.raises(RunInterrupted) as ended:
        run(recipe)
    assert ended.value.checkpoint == recipe.output / "checkpoints" / "checkpoint-1"
    assert run(recipe, resume=True).finished


@pytest.mark.parametrize(
    ("act", "problem"),
    [
        (lambda loss: loss * float("nan"), "The loss became nan in step 2, in a sequence with tasks"),
        (
            # Nothing is added to the loss, and what is not a number to its gradient.
            lambda loss: loss + (loss - loss.detach()).sqrt(),
            "The norm of the gradient became (nan|inf) in step 2, in sequences with tasks one, two",
        ),
    ],
)
def test_what_is_not_a_number_ends_the_run_before_it_is_in_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[Tensor], Tensor], problem: str
) -> None:
    recipe = small_recipe(tmp_path / "run", "training.save_every=1", "training.log_every=1")
    expected = rf"^{problem}.*\. The last good checkpoint is .*/run/checkpoints/checkpoint-1\. Resuming would meet"
    with at_row(monkeypatch, 6, act), pytest.raises(MachineError, match=expected):
        run(recipe)
    assert [path.name for path in recipe.output.glob("checkpoints/checkpoint-*")] == ["checkpoint-1"]
    saved = weights_in(recipe.output / "checkpoints" / "checkpoint-1")
    assert all(torch.isfinite(weights).all() for weights in saved.values())


def test_weights_that_are_not_numbers_are_not_saved(tmp_path: Path) -> None:
    def spoiling(loaded: LoadedModel) -> Mapping[str, float]:
        with torch.no_grad():
            next(loaded.model.parameters()).fill_(float("inf"))
        return {"score": 0.0}

    with pytest.raises(MachineError, match=r"not a finite number after step 4, so no .* There is no checkpoint yet"):
        run(small_recipe(tmp_path / "run"), evaluation=spoiling)


def test_intervals_that_change_when_a_run_is_resumed_hold(tmp_path: Path) -> None:
    changes = ("training.num_steps=8", "training.keep_checkpoints=9")
    run(small_recipe(tmp_path / "run", *changes, "training.evaluate_every=1"), evaluation=stop_in_step(2))
    seen: list[int] = []
    changed = small_recipe(tmp_path / "run", *changes, "training.evaluate_every=3", "training.log_every=1")

    def evaluation(loaded: LoadedModel) -> Mapping[str, float]:
        seen.append(len(seen))
        return {"score": 0.0}

    run(changed, evaluation=evaluation, resume=True)
    assert len(seen) == 3, "after the steps 3, 6 and 8"


def test_a_run_that_is_resumed_without_evaluations_has_no_best_score(tmp_path: Path) -> None:
    changes = ("training.num_steps=4", "training.keep_checkpoints=9")
    run(small_recipe(tmp_path / "run", *changes, "training.evaluate_every=1"), evaluation=stop_in_step(2))
    last = small_recipe(tmp_path / "run", *changes, "training.evaluate_every=null")
    resumed = run(last, resume=True)
    found = ensure_trained(last, small_tasks(), measuring(None), console=Console(file=io.StringIO()))
    assert [(done.was_found, done.best_score, done.best_step) for done in (resumed, found)] == [
        (False, None, None),
        (True, None, None),
    ]


def test_a_folder_that_was_moved_is_resumed_with_its_best_model(tmp_path: Path) -> None:
    changes = ("training.evaluate_every=1", "training.num_steps=6")
    scores = iter([0.5, 0.9, 0.1, 0.1, 0.1, 0.1])
    run(small_recipe(tmp_path / "whole", *changes), evaluation=lambda loaded: {"score": next(scores)})
    scores = iter([0.5, 0.9])

    def two_steps(loaded: LoadedModel) -> Mapping[str, float]:
        score = next(scores)
        if score == 0.9:
            os.kill(os.getpid(), signal.SIGINT)
        return {"score": score}

    run(small_recipe(tmp_path / "parts", *changes), evaluation=two_steps)
    (tmp_path / "parts").rename(tmp_path / "moved")
    done = run(small_recipe(tmp_path / "moved", *changes), evaluation=lambda loaded: {"score": 0.1}, resume=True)
    assert (done.best_score, done.best_step) == (0.9, 2)
    assert_equal_weights(tmp_path / "whole", tmp_path / "moved")


def test_a_best_model_that_was_damaged_during_the_run_is_not_replaced_by_the_last_one(tmp_path: Path) -> None:
    calls = 0
    recipe = small_recipe(tmp_path / "run", "training.evaluate_every=1")

    def damaging(loaded: LoadedModel) -> Mapping[str, float]:
        nonlocal calls
        calls += 1
        if calls == 4:
            (recipe.output / "checkpoints" / "checkpoint-1" / "model.safetensors").write_bytes(b"")
        return {"score": -float(calls)}

    with pytest.raises(
        MachineError, match=r"that of checkpoint-1, which differs from its manifest in the size of model"
    ):
        run(recipe, evaluation=damaging)


def test_checkpoints_are_saved_between_evaluations(tmp_path: Path) -> None:
    changes = ("training.evaluate_every=2", "training.save_every=3", "training.keep_checkpoints=9")
    run(small_recipe(tmp_path / "run", *changes), evaluation=lambda loaded: {"score": 0.0})
    names = {path.name for path in (tmp_path / "run" / "checkpoints").glob("checkpoint-*")}
    assert names == {"checkpoint-2", "checkpoint-3", "checkpoint-4"}


def test_what_was_left_out_of_the_whole_run_is_counted_also_when_it_is_resumed(tmp_path: Path) -> None:
    # 40 sequences in the run, more than are looked at before it.
    changes = ("training.num_steps=10", "training.evaluate_every=1", "sequences.examples_per_episode=[2, 9]")
    recipe = small_recipe(tmp_path / "run", *changes)
    run(recipe, evaluation=stop_in_step(4))
    screen = io.StringIO()
    run(recipe, evaluation=stop_in_step(0), resume=True, screen=screen)
    tasks = small_tasks()
    sequences = packed_sequences(recipe, tasks.train, AutoTokenizer.from_pretrained(recipe.output))
    counts = sum((sequence_counts(sequence, recipe.objective) for sequence in sequences), SequenceCounts())
    assert counts.num_sequences == 40
    assert counts.num_tokens + counts.num_unused_tokens == 40 * 60
    assert counts.num_shots_dropped == sum(sequence.num_shots_dropped for sequence in sequences) > 0
    assert counts.sentence() in screen.getvalue()
    assert (
        f"{counts.num_shots_dropped} shots were dropped (did not fit) and 0 skipped (longer than" in counts.sentence()
    )
    manifest = Manifest.read(recipe.output)
    assert manifest is not None
    assert manifest.max_trained_shots == counts.most_shots
    events = EventAccumulator(str(recipe.output / "logs"))
    events.Reload()
    assert events.Scalars("train/num_shots_dropped")[-1].value == counts.num_shots_dropped


def test_the_best_model_on_held_out_tasks_is_kept(tmp_path: Path) -> None:
    scores = iter([0.2, 0.9, 0.4, 0.3])
    seen: list[dict[str, torch.Tensor]] = []

    def evaluation(loaded: LoadedModel) -> Mapping[str, float]:
        assert not loaded.model.training
        seen.append({name: value.clone() for name, value in loaded.model.state_dict().items()})
        return {"score": next(scores), "other": 1.0}

    done = run(small_recipe(tmp_path / "run", "training.evaluate_every=1"), evaluation=evaluation)
    assert (done.best_score, done.best_step) == (0.9, 2)
    saved = weights_in(tmp_path / "run")
    assert all(torch.equal(saved[name], seen[1][name]) for name in saved)
    assert not all(torch.equal(saved[name], seen[3][name]) for name in saved)


def test_held_out_tasks_are_evaluated_once_after_the_last_step_by_default(tmp_path: Path) -> None:
    scores = iter([0.5])
    done = run(small_recipe(tmp_path / "run"), evaluation=lambda loaded: {"score": next(scores)})
    assert (done.best_score, done.best_step) == (0.5, 4)


def test_of_models_with_equal_scores_the_last_one_is_kept(tmp_path: Path) -> None:
    done = run(small_recipe(tmp_path / "run", "training.evaluate_every=1"), evaluation=lambda loaded: {"score": 0.0})
    assert (done.best_score, done.best_step) == (0.0, 4)


def test_evaluation_can_be_switched_off(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", "training.evaluate_every=null")
    done = run(recipe, evaluation=lambda loaded: pytest.fail("evaluated"))
    assert (done.finished, done.best_score, done.best_step) == (True, None, None)


def test_an_evaluation_says_how_far_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.activity.SECONDS_BETWEEN_LINES", 0.02)

    def slow_measure(*tasks: object, on_progress: OnProgress, **settings: object) -> Measure:
        def measure(loaded: LoadedModel) -> dict[str, float]:
            for num_done in range(3):
                on_progress(num_done, 2)
                time.sleep(0.2)
            return {"score": 0.5}

        return measure

    recipe, screen = small_recipe(tmp_path / "run"), io.StringIO()
    ensure_trained(recipe, small_tasks(), slow_measure, console=Console(file=screen, width=300))
    lines = screen.getvalue().splitlines()
    assert "evaluating on held-out tasks: 0/2 scores" in lines
    for num_done in range(3):
        shown = f"training: 4 of 4, evaluating on held-out tasks: {num_done}/2 scores; "
        assert any(line.startswith(shown) for line in lines)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_an_adapter_loads_over_its_base_and_leaves_it_alone(finished: Path, tmp_path: Path) -> None:
    before = weights_in(finished)
    output = tmp_path / "adapter"
    recipe = small_recipe(
        output, "model.from_scratch=null", f"model.base={finished}", "model.lora={rank: 4, dropout: 0.1}"
    )
    run(recipe)
    model = AutoPeftModelForCausalLM.from_pretrained(output)
    loaded = load_model(str(output))
    assert any(value.any() for name, value in weights_in(output).items() if "lora_B" in name)
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        expected, found = model(input_ids=ids).logits, loaded.model(input_ids=ids, use_cache=False).logits
    assert (expected - found).abs().max() < 1e-5
    manifest = Manifest.read(output)
    assert manifest is not None
    assert manifest.base == str(finished)
    assert manifest.base_fingerprint == load_model(str(finished)).fingerprint
    assert all(torch.equal(before[name], value) for name, value in weights_in(finished).items())
    assert not [path.name for path in output.iterdir() if path.suffix in (".bin", ".pt", ".pth")]
    over_itself = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": str(output)})})
    with pytest.raises(UserError, match=r"--overwrite would delete the base of the run"):
        run(over_itself, overwrite=True)
    with pytest.raises(UserError, match="is an adapter itself"):
        run(over_itself.model_copy(update={"output": tmp_path / "other"}))


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21
def test_an_adapter_trained_in_bfloat16_from_a_relative_path_loads_from_anywhere(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "adapter"
    monkeypatch.chdir(finished.parent)
    base = ["model.from_scratch=null", f"model.base={finished.name}", "model.lora={rank: 4}", "model.dtype=bfloat16"]
    run(small_recipe(output, *base))
    monkeypatch.chdir(tmp_path)
    named = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert named == str(finished)
    AutoPeftModelForCausalLM.from_pretrained(output)
    manifest = Manifest.read(output)
    assert manifest is not None
    assert manifest.base == str(finished)
    assert manifest.base_fingerprint == load_model(str(finished), dtype="bfloat16").fingerprint
    assert load_model(str(output)).manifest == manifest


def test_held_out_tasks_that_the_base_was_trained_on_are_refused(finished: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", "model.from_scratch=null", f"model.base={finished}")
    for seen in (make_task("six", source="one", data_hash="6" * 64), make_task("six", data_hash="0" * 64)):
        tasks = RecipeTasks((make_task("five"),), (seen,))
        with pytest.raises(UserError, match=r"'six' is not unseen: the base .* was trained on 'one'"):
            run(recipe, tasks)
    assert not recipe.output.exists()


@pytest.mark.parametrize("lora", ["null", "{rank: 4}"])
def test_bfloat16_and_gradient_checkpointing_work_on_a_cpu(finished: Path, tmp_path: Path, lora: str) -> None:
    changes = ["training.bf16=true", "training.gradient_checkpointing=true", f"model.lora={lora}"]
    base = ["model.from_scratch=null", f"model.base={finished}"]
    assert run(small_recipe(tmp_path / "run", *base, *changes)).finished


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "warmup_stable_decay"])
def test_every_schedule_warms_up(tmp_path: Path, schedule: str) -> None:
    changes = [f"training.schedule={schedule}", "training.warmup_steps=2", "training.num_steps=5"]
    assert run(small_recipe(tmp_path / "run", *changes)).finished


def test_the_loss_of_a_tiny_model_falls_and_its_speed_is_shown(tmp_path: Path) -> None:
    screen = io.StringIO()
    recipe = small_recipe(tmp_path / "run", "training.num_steps=30", "training.log_every=10")
    run(recipe, screen=screen)
    losses = [float(loss) for loss in re.findall(r"loss (\d+\.\d+)", screen.getvalue())]
    assert len(losses) == 3
    # Two labels and a terminator leave ln(2) / 2 = 0.35 nats a token to one who knows no rule.
    assert losses[0] > 1.5 > 0.75 > losses[-1]
    assert re.search(r"[\d,]+ answers/s", screen.getvalue())
    assert "supervised answers" in screen.getvalue()


def test_a_taken_output_folder_is_refused_unless_said_otherwise(finished: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds a run already\. Use --resume to continue it, --overwrite to start"):
        run(small_recipe(finished))
    with pytest.raises(UserError, match="the run is finished"):
        run(small_recipe(finished), resume=True)
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    (tmp_path / "recipe.yaml").write_text("mine, too", encoding="utf-8")
    with pytest.raises(UserError, match="is not empty"):
        run(small_recipe(tmp_path))
    with pytest.raises(UserError, match="is not empty"):
        run(small_recipe(tmp_path), overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        run(small_recipe(tmp_path / "thesis.txt"))
    with pytest.raises(UserError, match="holds no run"):
        run(small_recipe(tmp_path / "new"), resume=True)
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"


def test_tasks_in_the_folder_of_a_run_outlive_its_replacement(tmp_path: Path) -> None:
    output = tmp_path / "run"
    folder = RunFolder(output)
    folder.begin(small_recipe(output), Manifest(max_context_tokens=60), overwrite=False)
    task = write_task(output / "a", "reviews")
    folder.begin(small_recipe(output, f"tasks.train=[{task}]"), Manifest(max_context_tokens=60), overwrite=True)
    assert (task / "task.yaml").is_file()
    assert folder.state() is RunState.STARTED


def test_a_taken_output_is_found_before_a_model_is_made(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.training.train.starting_point", lambda recipe, tasks: pytest.fail("made a model"))
    for resume in (False, True):
        with pytest.raises(UserError):
            run(small_recipe(finished), resume=resume)


def test_a_run_is_not_resumed_as_another_one(tmp_path: Path) -> None:
    changes = ("training.evaluate_every=1",)
    run(small_recipe(tmp_path / "run", *changes), evaluation=stop_in_step(1))
    with pytest.raises(UserError, match=r"started with another training\.learning_rate; expected 0\.01, found 0\.1"):
        run(small_recipe(tmp_path / "run", *changes, "training.learning_rate=0.1"), resume=True)
    tasks = small_tasks()
    with pytest.raises(UserError, match="started with task 'two' where now is no task"):
        run(small_recipe(tmp_path / "run", *changes), RecipeTasks(tasks.train[:1], ()), resume=True)
    with pytest.raises(UserError, match="started with task 'one' where now is task 'two'"):
        run(small_recipe(tmp_path / "run", *changes), RecipeTasks(tasks.train[::-1], ()), resume=True)
    added = (*tasks.train, make_task("four"))
    with pytest.raises(UserError, match="started with no task where now is task 'four'"):
        run(small_recipe(tmp_path / "run", *changes), RecipeTasks(added, ()), resume=True)
    changed = (tasks.train[0], replace(tasks.train[1], data_hash="1" * 64))
    with pytest.raises(UserError, match="the data of task 'two' changed"):
        run(small_recipe(tmp_path / "run", *changes), RecipeTasks(changed, ()), resume=True)
    for question in ("training.evaluate_shots=[1]", "training.evaluate_queries=7", "tasks.evaluate=[other]"):
        with pytest.raises(UserError, match=question.partition("=")[0]):
            run(small_recipe(tmp_path / "run", *changes, question), resume=True)


def test_rows_longer_than_the_positions_of_the_model_are_refused(finished: Path, tmp_path: Path) -> None:
    changes = ["model.from_scratch=null", f"model.base={finished}", "sequences.max_context_tokens=61"]
    with pytest.raises(UserError, match=r"sequences\.max_context_tokens is 61; the model has 60 positions"):
        run(small_recipe(tmp_path / "run", *changes))


def write_task(folder: Path, source: str) -> Path:
    folder.mkdir()
    rows = "".join(f'{{"text": "a {i}", "label": "{"xy"[i % 2]}"}}\n' for i in range(6))
    for side in ("train", "test"):
        (folder / f"{side}.jsonl").write_text(rows.replace("a ", f"{side} "), encoding="utf-8")
    (folder / "task.yaml").write_text(
        f"name: {folder.name}\nfamily: classification\nmetric: accuracy\nsource: {source}\n"
        "data: {train: train.jsonl, test: test.jsonl}\nquery: '{{ text }}'\nanswer: '{{ label }}'\nlabels: [x, y]\n",
        encoding="utf-8",
    )
    return folder


def test_held_out_tasks_of_a_training_source_are_refused(tmp_path: Path) -> None:
    one, sibling, other = (
        write_task(tmp_path / name, source) for name, source in (("a", "reviews"), ("b", "reviews"), ("c", "news"))
    )
    recipe = small_recipe(tmp_path / "run", f"tasks.train=[{one}]", f"tasks.evaluate=[{other}]")
    assert [task.name for task in load_recipe_tasks(recipe).held_out] == ["c"]
    recipe = small_recipe(tmp_path / "run", f"tasks.train=[{one}]", f"tasks.evaluate=[{sibling}]")
    with pytest.raises(UserError, match="'b' comes from the same source"):
        load_recipe_tasks(recipe)


def test_a_folder_in_which_a_run_goes_on_takes_no_second_one(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run")
    with (
        RunFolder(tmp_path / "run").held(),
        pytest.raises(UserError, match="another process is training in this output"),
    ):
        run(recipe)
    assert run(recipe).finished
    assert not (tmp_path / "run" / ".lock").exists()


def test_replacing_a_run_removes_nothing_that_no_run_writes(finished: Path, tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run")
    run(recipe)
    own = [tmp_path / "run" / name for name in ("README.md", "notes/a.txt", "checkpoints/why.txt", "logs/plot.svg")]
    for path in own:
        path.parent.mkdir(exist_ok=True)
        path.write_text("mine", encoding="utf-8")
    before = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    run(recipe, overwrite=True)
    assert all(path.read_text(encoding="utf-8") == "mine" for path in own)
    after = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert before & after == {"plot.svg"}, "what the first run logged is gone"
    assert_equal_weights(finished, tmp_path / "run")


def test_a_run_does_not_go_on_with_other_data_of_held_out_tasks(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    began, now = (
        Manifest(max_context_tokens=60, held_out=(TrainedTask.of(make_task("three", data_hash=data_hash * 64)),))
        for data_hash in "34"
    )
    folder.begin(small_recipe(tmp_path / "run"), began, overwrite=False)
    folder.require_same_start(began)
    with pytest.raises(UserError, match="the data of task 'three' changed since the run started"):
        folder.require_same_start(now)


def test_a_task_that_the_base_saw_with_other_data_is_compared_by_the_runs_own(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    of_base, began, now = (TrainedTask.of(make_task("one", data_hash=data_hash * 64)) for data_hash in "012")
    folder.begin(
        small_recipe(tmp_path / "run"), Manifest(max_context_tokens=60, tasks=(began, of_base)), overwrite=False
    )
    with pytest.raises(UserError, match="the data of task 'one' changed since the run started"):
        folder.require_same_start(Manifest(max_context_tokens=60, tasks=(now, of_base)))


def test_a_closed_terminal_stops_a_run_as_ctrl_c_does_unless_it_was_told_not_to() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        assert {signal.SIGINT, signal.SIGTERM, signal.SIGHUP} == set(stopping_signals())
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        assert {signal.SIGINT, signal.SIGTERM} == set(stopping_signals())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_held_out_tasks_are_asked_while_training_computes_in_bfloat16(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", "training.bf16=true", "training.evaluate_every=2")
    assert run(
        recipe, evaluation=held_out_measure(small_tasks().held_out, shots=(0, 2), num_queries=5, seed=0)
    ).finished
