"""Forgetting: the loss on general text, as the plain model has it, and scores of probe tasks, along a training."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from manyicl.episodes.general_text import GeneralText
from manyicl.episodes.text_tokenizer import TextTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.comparison.records import Forgetting
from manyicl.evaluation.forgetting import (
    ForgettingSettings,
    MeasureWithForgetting,
    figures_of,
    forgetting_of_log,
    held_out_text,
    measure_forgetting,
    read_forgetting,
    score_text,
    text_windows,
)
from manyicl.model.load import LoadedModel, load_model
from manyicl.tasks.nanoworld.text import nano_text, write_nano_text
from manyicl.training import loss
from manyicl.training.job import ensure_trained
from tests.builders import byte_level_bpe, make_example, make_task, sentencepiece_bpe, tiny_loaded, tiny_model
from tests.training.recipes import small_recipe, small_tasks

TEXT = GeneralText.of("the film was good and the music was fine. a bad play!\n" * 30, "a text")


def slow_score(loaded: LoadedModel, num_tokens: int, length: int) -> tuple[float, int]:
    """Run the plain model, with the library's own attention, over each window by itself."""
    plain = tiny_model(vocabulary_size=len(loaded.tokenizer), attention="eager")
    plain.load_state_dict(loaded.model.state_dict())
    bos = [loaded.tokenizer.bos_token_id] if loaded.tokenizer.bos_token_id is not None else []
    ids = loaded.tokenizer(TEXT.text, add_special_tokens=False)["input_ids"][:num_tokens]
    nats, num_scored = 0.0, 0
    for start in range(0, len(ids), length - len(bos)):
        window = bos + ids[start : start + length - len(bos)]
        with torch.no_grad():
            logits = plain(torch.tensor([window])).logits[0]
        for place in range(len(bos) + 1, len(window)):
            nats -= F.log_softmax(logits[place - 1].double(), dim=-1)[window[place]].item()
            num_scored += 1
    return nats, num_scored


@pytest.mark.parametrize("tokenizer", [byte_level_bpe(), sentencepiece_bpe()], ids=["no bos", "bos"])
@pytest.mark.parametrize(("num_tokens", "length", "most_logits"), [(100, 31, 1000), (97, 47, 7), (20, 300, 1)])
def test_the_loss_of_a_text_is_that_of_the_plain_model_over_each_window(
    tokenizer: object, num_tokens: int, length: int, most_logits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = tiny_loaded(tokenizer=tokenizer)  # type: ignore[arg-type]
    monkeypatch.setattr(loss, "BYTES_OF_LOGITS", most_logits * 4 * len(loaded.tokenizer))
    score = score_text(loaded, TEXT, ForgettingSettings(num_tokens=num_tokens, window_tokens=length))
    nats, num_scored = slow_score(loaded, num_tokens, length)
    assert score.num_tokens == num_scored
    assert score.nats == pytest.approx(nats, rel=1e-6)


def test_windows_do_not_overlap_and_hold_the_beginning_of_the_text() -> None:
    tokenizer = TextTokenizer(byte_level_bpe())
    ids = tokenizer.ids_from(TEXT.text, 0, 10**6)
    windows = text_windows(tokenizer, TEXT, ForgettingSettings(num_tokens=64, window_tokens=21))
    # Of 64 tokens one is left alone, and nothing would be scored in its window.
    assert windows == [ids[:21], ids[21:42], ids[42:63]]
    score = score_text(tiny_loaded(), TEXT, ForgettingSettings(num_tokens=64, window_tokens=21))
    assert score.num_tokens == 60
    assert score.num_bytes == sum(tokenizer.num_bytes(window[1:]) for window in windows)


def test_several_processes_find_the_figures_of_one() -> None:
    loaded, settings = tiny_loaded(), ForgettingSettings(num_tokens=200, window_tokens=30, probe_queries=4)
    tasks = (make_task("a"), make_task("b", data_hash="1" * 64))

    def in_two(items, work):  # type: ignore[no-untyped-def]
        return [*work(items[1::2]), *work(items[0::2])]

    alone = measure_forgetting(loaded, settings, tasks, 3, text=TEXT)
    assert measure_forgetting(loaded, settings, tasks, 3, text=TEXT, share_out=in_two) == alone
    assert set(alone.probes) == {"a", "b"}
    assert alone.text_sha256 == TEXT.sha256


def test_probe_tasks_are_given_the_trained_context() -> None:
    # The model has 512 positions, and was trained on sequences of 256.
    loaded, settings = tiny_loaded(), ForgettingSettings(probe_shots=(0,))
    probe = make_task(test=[make_example("film " * 150, "good")])
    with pytest.raises(UserError) as error:
        measure_forgetting(loaded, settings, [probe])
    assert error.value.code == "query_too_long"
    assert set(measure_forgetting(loaded, settings, [probe], max_context_tokens=512).probes) == {"toy"}


def test_a_model_in_training_is_measured_without_dropout_and_stays_in_training() -> None:
    model = tiny_model(vocabulary_size=len(byte_level_bpe()), attention_dropout=0.5)
    loaded = replace(tiny_loaded(), model=model)
    settings = ForgettingSettings(num_tokens=60)
    expected = score_text(loaded, TEXT, settings)
    model.train()
    assert score_text(loaded, TEXT, settings) == expected
    assert model.training


def test_a_text_of_a_single_token_is_refused() -> None:
    with pytest.raises(UserError) as error:
        score_text(tiny_loaded(), GeneralText.of("a", "a text"), ForgettingSettings())
    assert error.value.code == "text_too_short"


def test_figures_come_back_from_the_log() -> None:
    whole = Forgetting(
        step=7, nats_per_token=1.5, nats_per_byte=0.4, num_tokens=90, text_sha256="a" * 64, probes={"a b": 0.5}
    )
    probes = Forgetting(step=9, probes={"x": 0.25})
    log = [
        {"step": 5, "loss": 1.0},
        {"step": 6, "eval_score": 0.5, "eval_score_at_0_shots": 0.5},
        *(
            {"step": one.step, "eval_score": 0.1, **{f"eval_{name}": value for name, value in figures_of(one).items()}}
            for one in (whole, probes)
        ),
    ]
    assert forgetting_of_log(log, "a" * 64) == (whole, probes)


def test_what_is_measured_along_a_training_is_in_its_log(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", "training.evaluate_every=2", "training.evaluate_queries=4")
    text = GeneralText.of("film 1 was song play 2 was book good bad " * 20, "a text")
    settings = ForgettingSettings(num_tokens=50, window_tokens=20, probe_shots=(0,), probe_queries=3)
    measure = MeasureWithForgetting(settings, text, (make_task("probe", data_hash="7" * 64),))
    ensure_trained(recipe, small_tasks(), measure, console=Console(file=io.StringIO()))
    found = read_forgetting(recipe.output, text.sha256)
    assert [one.step for one in found] == [2, 4]
    assert all(one.num_tokens and one.nats_per_token and math.isfinite(one.nats_per_token) for one in found)
    assert {one.text_sha256 for one in found} == {text.sha256}
    assert set(found[0].probes) == {"probe"}
    assert read_forgetting(tmp_path / "no run") == ()


def test_without_held_out_scores_the_last_model_is_kept(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path / "run", "training.evaluate_every=1")
    text = GeneralText.of("film 1 was song play 2 was book good bad " * 20, "a text")
    measure = MeasureWithForgetting(ForgettingSettings(num_tokens=50), text, held_out=None)
    run = ensure_trained(recipe, small_tasks(), measure, console=Console(file=io.StringIO()))
    assert (run.best_step, run.num_steps, run.best_score) == (4, 4, 0.0)
    assert [one.step for one in read_forgetting(run.folder)] == [1, 2, 3, 4]


def test_the_nano_base_has_a_text_of_its_own_and_other_bases_need_one() -> None:
    assert held_out_text(None).text == nano_text("held_out")
    with pytest.raises(UserError) as error:
        held_out_text(None, "builtin:smollm2", "compare.forgetting.text")
    assert (error.value.code, error.value.field) == ("missing_text", "compare.forgetting.text")


def test_the_nano_base_has_learned_the_plain_text_of_its_world() -> None:
    loaded = load_model("builtin:nano", check_isolation=False)
    score = score_text(loaded, held_out_text(None), ForgettingSettings(num_tokens=600, window_tokens=300))
    # Of some 500 words.
    assert score.nats / score.num_tokens < 2.3


def test_no_paragraph_of_the_held_out_text_is_in_the_text_for_replay(tmp_path: Path) -> None:
    replayed, held_out = (path.read_text(encoding="utf-8") for path in write_nano_text(tmp_path))
    paragraphs = held_out.strip().split("\n\n")
    assert held_out == nano_text("held_out") != nano_text("held_out", seed=1)
    assert len(paragraphs) > 500
    assert not set(paragraphs) & set(replayed.strip().split("\n\n"))
