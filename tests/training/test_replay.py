"""Training with replayed text: its part of the loss, its counts, and runs that resume with the same text alone."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean

import pytest
import torch

from manyicl.episodes.episode import EncodedEpisode
from manyicl.episodes.packed_sequence import PackedSequence
from manyicl.episodes.replay import ReplayedSegment
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest
from manyicl.training.batch import sequence_counts, sequence_tensors
from manyicl.training.counts import SequenceCounts
from manyicl.training.estimate import sample_sequences
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import ObjectiveSettings, Recipe
from manyicl.training.requirements import problems
from manyicl.training.start import starting_point
from manyicl.training.train import packed_sequences, prepare_run
from tests.builders import tiny_model
from tests.reference.one_step import slow_loss, slow_weights
from tests.training.recipes import small_recipe, small_tasks
from tests.training.test_job import ensured
from tests.training.test_train import assert_equal_weights

EPISODE = EncodedEpisode("hand", (10, 11, 12, 13, 14), ((2, 4),))
SEGMENTS = (ReplayedSegment((20, 21, 22), 0.5), ReplayedSegment((23, 24), 0.5))
SEQUENCE = PackedSequence((EPISODE,), 20, 0, 0, SEGMENTS)
OBJECTIVES = [ObjectiveSettings(), ObjectiveSettings(supervise="last_answer", weighting="answer", context_weight=0.25)]


def text_file(folder: Path, words: str = "film 1 was song play 2 was book good bad") -> Path:
    path = folder / "text.txt"
    path.write_text(f"{words}\n" * 30, encoding="utf-8")
    return path


def replaying(folder: Path, *changes: str) -> tuple[str, ...]:
    replay = f"sequences.replay={{text: '{text_file(folder)}', share: 0.4, segment_tokens: 15, weight: 0.5}}"
    return replay, *changes


def test_every_token_of_a_piece_but_the_first_is_a_target_of_its_weight() -> None:
    batch = sequence_tensors(SEQUENCE, ObjectiveSettings())
    assert batch["segment_lengths"] == (5, 3, 2)
    assert batch["packed"]["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 0, 1]]
    assert batch["supervised_positions"].tolist() == [1, 2, 5, 6, 8]
    assert batch["targets"].tolist() == [12, 13, 21, 22, 24]
    assert batch["weights"].tolist() == [1, 1, 0.5, 0.5, 0.5]
    assert batch["task_names"] == ("hand",)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_the_loss_is_that_of_each_episode_and_piece_alone(objective: ObjectiveSettings) -> None:
    model = tiny_model()
    every = ObjectiveSettings(supervise="every_token")
    pieces = [EncodedEpisode("text", segment.token_ids, ()) for segment in SEGMENTS]
    of_episode, of_pieces = sum(slow_weights(EPISODE, objective).values()), 0.5 * 3
    expected = (of_episode * slow_loss(model, [EPISODE], objective) + of_pieces * slow_loss(model, pieces, every)) / (
        of_episode + of_pieces
    )
    batch = sequence_tensors(SEQUENCE, objective)
    with torch.no_grad():
        loss = sequence_loss(model, batch, float(batch["weights"].sum()))
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)


def test_replayed_tokens_are_counted_apart_from_answers() -> None:
    counts = sequence_counts(SEQUENCE, ObjectiveSettings())
    assert counts == SequenceCounts(1, 10, 10, 1, 0, 0, 0, num_replayed_tokens=5)
    assert (counts + counts).num_replayed_tokens == 10
    assert counts.sentence().endswith("5 of the tokens were replayed text.")
    assert "replayed" not in SequenceCounts(num_sequences=1, num_tokens=5).sentence()
    only_text = sequence_counts(PackedSequence((), 20, 0, 0, SEGMENTS), ObjectiveSettings())
    assert (only_text.num_answers, only_text.most_shots) == (0, 0)


def test_what_a_run_will_hold_is_said_with_its_share_of_the_loss(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", *replaying(tmp_path))
    tasks = small_tasks()
    sequences = packed_sequences(recipe, tasks.train, starting_point(recipe, tasks.train).tokenizer)
    statistics = sample_sequences(sequences, recipe.objective)
    batches = [sequence_tensors(sequences[index], recipe.objective) for index in range(statistics.num_sampled)]
    replayed = sum(0.5 * 14 * len(sequences[index].replayed) for index in range(statistics.num_sampled))
    share = replayed / sum(float(batch["weights"].sum()) for batch in batches)
    assert statistics.replayed_loss_share == pytest.approx(share)
    of_answers = fmean(float(batch["weights"].eq(1).sum()) for batch in batches)
    assert f"supervised answers ({of_answers:,.0f} tokens)" in statistics.sentence()
    assert f"replayed text, whose targets have {share:.1%}" in statistics.sentence()


@pytest.mark.parametrize(
    ("share", "code", "found"),
    [("0.999999", "no_answers", "text takes 60 of 60 tokens"), ("1e-300", "share_too_small", "e-29")],
)
def test_a_share_that_leaves_no_answers_or_no_text_is_refused_with_tokens(
    tmp_path: Path, share: str, code: str, found: str
) -> None:
    recipe, tasks = (
        small_recipe(tmp_path / "run", *replaying(tmp_path), f"sequences.replay.share={share}"),
        small_tasks(),
    )
    with pytest.raises(UserError, match=r"sequences\.replay\.share") as error:
        prepare_run(recipe, tasks)
    assert (error.value.code, error.value.field) == (code, "sequences.replay.share")
    assert found in str(error.value.found)


def test_a_run_with_text_is_recorded_resumed_and_found(tmp_path: Path) -> None:
    changes = replaying(tmp_path, "training.evaluate_every=1")
    whole, recipe = small_recipe(tmp_path / "whole", *changes), small_recipe(tmp_path / "run", *changes)
    ensured(whole)
    assert not ensured(recipe, stop_in=2).finished
    moved = tmp_path / "moved.txt"
    (tmp_path / "text.txt").rename(moved)
    elsewhere = small_recipe(tmp_path / "run", *changes, f"sequences.replay.text={moved}")
    assert ensured(elsewhere).finished
    assert_equal_weights(tmp_path / "whole", tmp_path / "run")
    assert ensured(elsewhere).was_found
    manifest = Manifest.read(tmp_path / "run")
    assert manifest is not None
    assert manifest.replay_sha256 is not None
    state = json.loads((tmp_path / "run" / "checkpoints" / "checkpoint-4" / "trainer_state.json").read_text())
    total = state["stateful_callbacks"]["RunCounts"]["attributes"]["total"]
    sequences = packed_sequences(elsewhere, small_tasks().train, starting_point(recipe, small_tasks().train).tokenizer)
    assert total["num_replayed_tokens"] == sum(sequence.num_replayed_tokens for sequence in sequences) > 0


def test_a_run_is_not_resumed_or_found_with_another_text(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", *replaying(tmp_path, "training.evaluate_every=1"))
    ensured(recipe, stop_in=1)
    text_file(tmp_path, "another film was good")
    with pytest.raises(UserError, match="the text that is replayed changed") as error:
        ensured(recipe)
    assert error.value.code == "another_run"
    text_file(tmp_path)
    ensured(recipe)
    text_file(tmp_path, "another film was good")
    with pytest.raises(UserError, match="the text that is replayed changed"):
        ensured(recipe)
    for change in ("sequences.replay=null", "sequences.replay.share=0.5", "sequences.replay.weight=1"):
        with pytest.raises(UserError) as error:
            ensured(small_recipe(tmp_path / "run", *replaying(tmp_path), "training.evaluate_every=1", change))
        assert error.value.code == "another_run"
        assert str(error.value.field).startswith("sequences.replay")


def test_a_run_without_text_is_not_resumed_with_one(tmp_path: Path) -> None:
    ensured(small_recipe(tmp_path / "run", "training.evaluate_every=1"), stop_in=1)
    with pytest.raises(UserError) as error:
        ensured(small_recipe(tmp_path / "run", *replaying(tmp_path), "training.evaluate_every=1"))
    assert (error.value.code, error.value.field) == ("another_run", "sequences.replay.share")


def test_a_missing_text_is_said_before_anything_is_read(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", "sequences.replay={text: missing.txt, share: 0.1}")
    (error,) = problems(recipe, with_tasks=False)
    assert (error.code, error.field) == ("missing_file", "sequences.replay.text")
    with pytest.raises(UserError, match="the text does not exist"):
        ensured(recipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("replay", "field"),
    [
        ("{share: 0.1}", "sequences.replay.text"),
        ("{text: a.txt}", "sequences.replay.share"),
        ("{text: a.txt, share: 0}", "sequences.replay.share"),
        ("{text: a.txt, share: 1}", "sequences.replay.share"),
        ("{text: a.txt, share: true}", "sequences.replay.share"),
        ("{text: a.txt, share: 0.1, weight: 0}", "sequences.replay.weight"),
        ("{text: a.txt, share: 0.1, segment_tokens: 1}", "sequences.replay.segment_tokens"),
        ("{text: a.txt, share: 0.1, segment_tokens: 61}", "sequences"),
    ],
)
def test_what_makes_no_sense_is_refused_when_the_recipe_is_read(replay: str, field: str) -> None:
    with pytest.raises(UserError) as error:
        small_recipe(Path("run"), f"sequences.replay={replay}")
    assert error.value.field == field


def test_a_resolved_recipe_reads_back(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", *replaying(tmp_path))
    assert Recipe.parse(recipe.to_yaml()) == recipe
