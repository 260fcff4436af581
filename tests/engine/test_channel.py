"""The channel form: every label's score is that of the query after it in plain transformers, over the whole text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from manyicl.engine.backend import OptionScores
from manyicl.engine.engine import Engine
from manyicl.engine.local import MOST_TRIE_TOKENS, LocalBackend
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves
from manyicl.evaluation.summary import summarise
from manyicl.model.export import export_model
from manyicl.model.load import LoadedModel
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Example, Task
from tests.builders import byte_level_bpe, make_example, make_task, sentencepiece_bpe, tiny_loaded
from tests.engine.parts import model_of, refused
from tests.engine.plain_backend import PlainBackend
from tests.reference.slow_engine import plain_copy, slow_score

LABELS = ("good", "good film", "bad", "a", "long and bad")
QUERIES = ("film 3 was good", "a", "the long red box was by the door", "one\n\ntwo paragraphs")


def untrained(architecture: str = "llama", **options: Any) -> LoadedModel:
    return replace(tiny_loaded(architecture, **options), manifest=None)


def channel_engine(architecture: str = "llama", **options: Any) -> Engine:
    return Engine.local(untrained(architecture), text_format="channel", **options)


def slow_scores(
    engine: Engine, task: Task, demonstrations: Sequence[Example], query: str, labels: Sequence[str]
) -> dict[str, float]:
    """The judge: the text written by hand, one label at a time, no cache and no packing."""
    plain, encode = plain_copy(model_of(engine)), engine.encoder.segment_ids
    before = list(engine.encoder.bos_ids)
    opens = True
    texts = [f"{task.instruction()}\n\n"] if task.instruction() else []
    for example in demonstrations:
        texts += [f"{example.answer}\n", f"{example.query.text}\n\n"]
    for text in texts:
        before += encode(text, opens)
        opens = False
    return {
        label: slow_score(plain, [*before, *encode(f"{label}\n", opens)], encode(f"{query}\n\n")) for label in labels
    }


@pytest.mark.parametrize("instruction", [None, "good or bad?"])
@pytest.mark.parametrize("num_shots", [0, 7])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_a_label_scores_as_the_query_after_it_in_a_full_pass(
    architecture: str, num_shots: int, instruction: str | None
) -> None:
    engine = channel_engine(architecture)
    task = make_task(labels=LABELS, instruction=instruction)
    shots = task.demonstrations(num_shots)
    prefix = engine.prefill(task, shots)
    expected_scores = [slow_scores(engine, task, shots, query, LABELS) for query in QUERIES]
    for scope in ("all", "best"):
        predictions = engine.predict(prefix, list(QUERIES), scores=scope)
        for expected, prediction in zip(expected_scores, predictions, strict=True):
            assert prediction.scores is not None
            assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-3)
            assert prediction.answer == max(expected, key=lambda label: expected[label])
            assert prediction.log_probability == prediction.scores.log_probabilities[prediction.answer]
            assert prediction.scores.best == prediction.scores.per_token().best == prediction.answer
            assert sum(prediction.scores.probabilities.values()) == pytest.approx(1)


def test_the_first_label_of_a_sequence_is_encoded_as_in_training() -> None:
    engine = Engine.local(untrained(tokenizer=sentencepiece_bpe()), text_format="channel")
    task = make_task()
    (prediction,) = engine.predict(engine.prefill(task), ["the film"], scores="all")
    assert prediction.scores is not None
    expected = slow_scores(engine, task, (), "the film", ("good", "bad"))
    assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-3)


def test_the_second_best_and_the_margin_come_with_it() -> None:
    engine = channel_engine()
    task = make_task(labels=LABELS)
    (prediction,) = engine.predict(engine.prefill(task, task.train[:4]), ["a film"], scores="best_two")
    assert prediction.scores is not None
    first, second, *_ = sorted(prediction.scores.log_probabilities.values(), reverse=True)
    assert prediction.second == prediction.scores.second
    assert prediction.margin == pytest.approx(first - second)


def test_choices_of_each_row_are_scored_likewise() -> None:
    engine = channel_engine()
    train = [make_example(f"film {i}", ("red", "long")[i % 2], ("red", "long", "box")) for i in range(9)]
    task = make_task("quiz", train, [], labels=None, family="qa", choices_column="options")
    rows: list[Any] = [{"text": "film", "options": ["door", "box"]}, {"text": "play 3", "options": ["red", "one", "a"]}]
    for row, prediction in zip(rows, engine.predict(engine.prefill(task, train[:3]), rows), strict=True):
        expected = slow_scores(engine, task, train[:3], row["text"], row["options"])
        assert prediction.scores is not None
        assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-3)


@pytest.mark.parametrize("activation_budget_mib", [None, 1])
def test_long_queries_are_read_in_chunks_and_score_the_same(activation_budget_mib: int | None) -> None:
    engine = channel_engine(activation_budget_mib=activation_budget_mib)
    task = make_task()
    prefix = engine.prefill(task, task.train[:3])
    query = " ".join(["the film was good and the music was fine"] * 26)
    assert MOST_TRIE_TOKENS < len(engine.encoder.query_ids(query)) < 450
    queries = [query, "a film", query + " box"]
    for text, prediction in zip(queries, engine.predict(prefix, queries), strict=True):
        expected = slow_scores(engine, task, task.train[:3], text, ("good", "bad"))
        assert prediction.scores is not None
        assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-4)


def test_a_query_that_does_not_fit_with_the_longest_label_is_refused_and_shots_are_dropped_for_one_that_does() -> None:
    task = make_task(labels=LABELS)
    engine = channel_engine(max_context_tokens=120)
    longest = max(len(engine.encoder.answer_ids(label)) for label in LABELS)
    fits = "film " * 40
    while len(engine.encoder.query_ids(fits)) + longest > 100:
        fits = fits.removesuffix("film ")
    prefix = engine.prefill(task, task.train[:20], [fits])
    assert 0 < prefix.num_shots < 20
    needed = prefix.num_tokens + len(engine.encoder.query_ids(fits)) + longest
    assert needed <= 120
    assert next(engine.predict(prefix, [fits])).scores is not None
    with refused("query_too_long", row=1):
        list(engine.predict(prefix, [fits * 3]))
    (answer,) = engine.answer(task, task.train[:20], [fits])
    assert answer.num_shots == prefix.num_shots


def test_retrieved_examples_come_between_the_prefix_and_the_label() -> None:
    engine = channel_engine()
    task = make_task(labels=LABELS)
    own = task.train[10:12]
    for shots in (task.train[:3], ()):
        prefix = engine.prefill(task, shots, retrieve=lambda query: own)
        (prediction,) = engine.predict(prefix, ["a film"], retrieve=lambda query: own, scores="all")
        assert prediction.scores is not None
        expected = slow_scores(engine, task, (*shots, *own), "a film", LABELS)
        assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-3)
    (nothing,) = engine.predict(engine.prefill(task), ["a film"], retrieve=lambda query: (), scores="all")
    (without,) = engine.predict(engine.prefill(task), ["a film"], scores="all")
    assert nothing.scores == without.scores


def test_demonstrations_are_scored_before_they_were_shown_and_blends_fitted_on_that() -> None:
    engine = channel_engine()
    rows = [make_example(f"film {i} was fine", LABELS[i % 5]) for i in range(25)]
    task = make_task(labels=LABELS, train=rows, instruction="good?")
    prefix = engine.prefill(task, rows[:18])
    for shot, scores in zip((0, 1, 17), engine.scores_before_shown(prefix, (0, 1, 17)), strict=True):
        expected = slow_scores(engine, task, rows[:shot], rows[shot].query.text, LABELS)
        assert scores == pytest.approx(expected, rel=1e-5, abs=1e-3)
    (blended,) = engine.predict(engine.with_blend(prefix), ["film 20 was fine"], scores="all", blend=True)
    assert blended.blended
    assert blended.scores is not None
    assert sum(blended.scores.probabilities.values()) == pytest.approx(1)


def test_a_compiled_task_answers_as_in_memory_and_records_nothing_of_its_demonstrations(tmp_path: Path) -> None:
    engine = channel_engine()
    task = make_task(labels=LABELS)
    compiled = engine.compile(task, task.train[:9])
    assert compiled.answers == ()
    assert compiled.token_ids == engine.prefill(task, task.train[:9]).token_ids
    longer = engine.compile(task, task.train[:12], reuse=compiled)
    assert longer.num_reused_tokens == compiled.num_tokens
    engine.save(compiled, tmp_path / "t.prefix")
    assert list(engine.predict(engine.load(tmp_path / "t.prefix"), QUERIES)) == list(engine.predict(compiled, QUERIES))
    with refused("foreign_prefix"):
        Engine.local(untrained()).load(tmp_path / "t.prefix")


def test_what_has_no_channel_form_is_refused(tmp_path: Path) -> None:
    engine = channel_engine()
    task = make_task()
    with refused("not_in_channel_form"):
        engine.prior(engine.prefill(task))
    with refused("free_answers_in_channel_form"):
        engine.prefill(make_task(labels=None, family="generation"), ())
    with refused("foreign_prefix"):
        Engine.local(untrained()).predict(engine.prefill(task), ["film"])
    folder = tmp_path / "model"
    loaded = tiny_loaded()
    loaded.model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    Manifest(max_context_tokens=256, text_format=engine.encoder.format).write(folder)
    assert Engine.from_pretrained(folder).is_channel
    with refused("another_format", expected="channel"):
        Engine.from_pretrained(folder, text_format="plain")
    with refused("not_in_channel_form"):
        export_model(str(folder), tmp_path / "out")


def test_another_backend_scores_the_channel_form_without_knowing_it() -> None:
    tokenizer = byte_level_bpe()
    backend = PlainBackend(len(tokenizer))
    engine = Engine(backend, tokenizer, text_format="channel")
    task = make_task(labels=LABELS)
    prefix = engine.prefill(task, task.train[:5])
    for query, prediction in zip(QUERIES, engine.predict(prefix, list(QUERIES)), strict=True):
        encoder = engine.encoder
        expected = {
            label: backend.log_probability((*prefix.token_ids, *encoder.answer_ids(label)), encoder.query_ids(query))
            for label in LABELS
        }
        assert prediction.scores is not None
        assert prediction.scores.log_probabilities == pytest.approx(expected)


def test_a_shot_curve_records_the_form_and_keeps_both_apart(tmp_path: Path) -> None:
    settings = EvaluationSettings(shots=(0, 3), num_seeds=1, num_queries=4)
    task = make_task()
    channel = measure_shot_curves(channel_engine(), [task], tmp_path, settings).results
    direct = measure_shot_curves(Engine.local(untrained()), [task], tmp_path, settings)
    assert direct.num_found == 0
    assert [result.text_format["kind"] for result in (*channel, *direct.results)] == ["channel"] * 2 + ["plain"] * 2
    assert {result.key for result in channel}.isdisjoint(result.key for result in direct.results)
    assert summarise((*channel, *direct.results)).models == ("tiny-llama (channel)", "tiny-llama")


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("activation_budget_mib", [None, 1])
def test_the_only_option_of_a_query_scores_as_in_a_full_pass_whatever_else_is_scored(
    architecture: str, activation_budget_mib: int | None
) -> None:
    loaded = tiny_loaded(architecture)
    backend = LocalBackend(loaded, activation_budget_mib=activation_budget_mib)
    plain = plain_copy(loaded.model)
    for num_before in (0, 31):
        prefix = backend.prefill(range(5, 5 + num_before))
        queries = [tuple(range(40, 40 + length)) for length in (3, 47, 1, 31)]
        greedy = backend.score(prefix, queries, [[(n,) for n in range(len(loaded.tokenizer))]] * 4, "best")
        options = [[tuple(range(9, 9 + length))] for length in (47, 1, 3)] + [[(greedy[3].best,)]]
        found: list[OptionScores] = backend.score(prefix, queries, options, "best")
        mixed = backend.score(prefix, [*queries, (7,)], [*options, [(8,), (9, 9)]], "all")
        for query, (option,), one, other in zip(queries, options, found, mixed, strict=False):
            expected = slow_score(plain, [*prefix.token_ids, *query], option)
            assert one.log_probabilities == pytest.approx({0: expected}, rel=1e-5, abs=1e-3)
            assert other.log_probabilities == pytest.approx({0: expected}, rel=1e-5, abs=1e-3)
            assert (one.best, one.second) == (0, None)
        assert found[3].greedy == {0}
        assert len(mixed[4].log_probabilities) == 2


def test_forms_of_one_model_share_no_prefix_and_the_hash_says_so() -> None:
    tokenizer = byte_level_bpe()
    assert channel_engine().encoder.text_hash != Encoder(tokenizer).text_hash
    with pytest.raises(UserError, match="there is no such format"):
        Engine.local(untrained(), text_format="reversed")  # type: ignore[arg-type]
