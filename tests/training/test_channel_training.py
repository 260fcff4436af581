"""Training in the channel form: the loss against a slow reference, and a run whose model is used as it was trained."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manyicl.engine.engine import Engine
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.episodes.sampling import EpisodeSettings
from manyicl.episodes.text_format import ChannelFormat
from manyicl.errors import UserError
from manyicl.evaluation.held_out import held_out_measure
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Task
from manyicl.training.batch import Collator
from manyicl.training.job import ensure_trained
from manyicl.training.loss import sequence_loss
from manyicl.training.objective import target_weights
from manyicl.training.recipe import ObjectiveSettings
from manyicl.training.recipe_tasks import RecipeTasks
from tests.builders import make_example, make_task, tiny_model, word_level
from tests.reference.slow_engine import plain_copy, slow_score
from tests.training.recipes import small_recipe
from tests.training.test_job import ensured
from tests.training.test_train import assert_equal_weights


def test_the_query_is_supervised_and_its_label_is_not() -> None:
    """The tokens written out by hand."""
    encoder = Encoder(word_level(), ChannelFormat())
    episode = encoder.encode_episode(Episode("toy", "", (make_example("film 1", "good"), make_example("a box", "bad"))))
    assert [encoder.decode([token]) for token in episode.token_ids] == [
        *("good", "\n", "film", "1", "\n\n"),
        *("bad", "\n", "a", "box", "\n\n"),
    ]
    assert target_weights(episode, ObjectiveSettings()) == [0, 0, 1, 1, 1, 0, 0, 1, 1, 1]
    assert target_weights(episode, ObjectiveSettings(supervise="last_answer")) == [0, 0, 0, 0, 0, 0, 0, 1, 1, 1]
    assert target_weights(episode, ObjectiveSettings(weighting="answer")) == pytest.approx([0, 0, *[1 / 3] * 3] * 2)


@pytest.mark.parametrize("supervise", ["all_answers", "last_answer"])
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
def test_the_loss_is_that_of_the_query_given_the_label(architecture: str, supervise: str) -> None:
    """The judge scores each query after the text before it, one example at a time, without packing."""
    objective = ObjectiveSettings.model_validate({"supervise": supervise})
    encoder = Encoder(word_level(), ChannelFormat())
    task = make_task(instruction="good and bad")
    episodes = EpisodeSettings(examples_per_episode=(2, 4))
    sequences = PackedSequences([task], encoder, episodes=episodes, max_context_tokens=80, num_sequences=2, seed=1)
    model = tiny_model(architecture, len(encoder.tokenizer))
    plain = plain_copy(model)
    encode = encoder.segment_ids
    total, num_targets, num_queries = 0.0, 0, 0
    for sequence in sequences:
        for episode in sequence.episodes:
            text = encoder.decode(episode.token_ids).removeprefix("good and bad\n\n")
            parts = [shot.split("\n") for shot in text.removesuffix("\n\n").split("\n\n")]
            before = list(encode("good and bad\n\n", True))
            for number, (label, query) in enumerate(parts):
                before += encode(f"{label}\n")
                query_ids = encode(f"{query}\n\n")
                if supervise == "all_answers" or number == len(parts) - 1:
                    total -= slow_score(plain, before, query_ids)
                    num_targets += len(query_ids)
                    num_queries += 1
                before += query_ids
    batches = [Collator(objective)([sequence]) for sequence in sequences]
    assert sum(float(batch["weights"].sum()) for batch in batches) == num_targets
    assert sum(batch["counts"].num_answers for batch in batches) == num_queries > 2
    with torch.no_grad():
        loss = sum(float(sequence_loss(model, batch, num_targets)) for batch in batches)
    assert loss == pytest.approx(total / num_targets, rel=1e-5)


def channel_tasks() -> RecipeTasks:
    """Labels that say which words their queries hold; what they mean is in the rows before."""
    words = {"good": "film", "bad": "play"}
    rows = [make_example(f"{words[label]} {i}", label) for i in range(40) for label in words]
    held_out = [make_example(f"{words[label]} {i}", label) for i in range(20) for label in words]
    other = make_task("other", held_out[:20], held_out[20:], data_hash="3" * 64)
    return RecipeTasks(train=(make_task("one", rows[:60], rows[60:]),), held_out=(other,))


def test_a_model_trained_in_the_channel_form_is_used_in_it(tmp_path: Path) -> None:
    changes = ("format.kind=channel", "training.num_steps=40", "training.evaluate_shots=[4]")
    recipe = small_recipe(tmp_path / "run", *changes)
    tasks = channel_tasks()
    run = ensure_trained(recipe, tasks, held_out_measure)
    assert run.best_score is not None
    assert run.best_score > 0.9
    manifest = Manifest.read(tmp_path / "run")
    assert manifest is not None
    assert isinstance(manifest.text_format, ChannelFormat)
    engine = Engine.from_pretrained(tmp_path / "run")
    assert engine.is_channel
    task = tasks.held_out[0]
    prefix = engine.prefill(task, task.train[:4])
    answers = [prediction.answer for prediction in engine.predict(prefix, [one.query for one in task.test])]
    assert answers == [one.answer for one in task.test]
    with pytest.raises(UserError, match="fine-tuned in another format; expected channel, found format plain"):
        Engine.from_pretrained(tmp_path / "run", text_format="plain")
    plain = small_recipe(tmp_path / "run", *changes[1:])
    with pytest.raises(UserError) as error:
        ensure_trained(plain, tasks, held_out_measure)
    assert error.value.code == "another_run"


def test_a_run_in_the_channel_form_resumes_to_the_same_weights(tmp_path: Path) -> None:
    changes = ("format.kind=channel", "training.evaluate_every=1", "sequences.rename_labels=0.5")
    recipe = small_recipe(tmp_path / "run", *changes)
    assert not ensured(recipe, stop_in=2).finished
    assert ensured(recipe).finished
    assert ensured(small_recipe(tmp_path / "whole", *changes)).finished
    assert_equal_weights(tmp_path / "run", tmp_path / "whole")


def test_a_task_of_free_answers_ends_training_before_it_begins(tmp_path: Path) -> None:
    letters: Task = make_task("letters", labels=None, family="generation")
    for tasks in (RecipeTasks((letters,), ()), RecipeTasks((make_task("one"),), (letters,))):
        recipe = small_recipe(tmp_path / "run", "format.kind=channel")
        with pytest.raises(UserError, match="'letters' has free answers") as error:
            ensure_trained(recipe, tasks, held_out_measure)
        assert error.value.code == "free_answers_in_channel_form"
