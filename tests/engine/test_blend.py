"""The blend of a model's label scores and the words': weights on made-up scores, and what an engine fits them on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from scipy.special import log_softmax

from manyicl.engine import blend
from manyicl.engine.backend import OptionScores, Prefix, ScoreScope, TokenIds
from manyicl.engine.blend import (
    FIXED_WEIGHTS,
    MOST_FITTED,
    Blend,
    BlendWeights,
    Scores,
    blended,
    fit_weights,
    fitted_positions,
    held_out_words,
)
from manyicl.engine.compiled import content_digest
from manyicl.engine.compiled_file import HASH_KEY, HEADER_KEY
from manyicl.engine.engine import Engine
from manyicl.engine.label_scores import MOST_LABELS_SCORED, LabelScores
from manyicl.engine.linear import WordClassifier
from manyicl.tasks.task import Example, Task
from tests.builders import byte_level_bpe, make_example, make_task, tiny_loaded
from tests.engine.parts import refused
from tests.engine.plain_backend import PlainBackend

Numbers = NDArray[np.int64]
THRESHOLD = 0.6
LABELS = ("good", "good film", "bad", "a", "long and bad")


def made_up(seed: int, num_rows: int, signal: float, num_labels: int = 4, scale: float = 1.0) -> tuple[Scores, Numbers]:
    """Log-probabilities of one part of so much signal, with the right answers, which depend on the seed alone."""
    answers = np.random.default_rng(seed).integers(num_labels, size=num_rows)
    scores = np.random.default_rng((seed, int(100 * abs(signal)))).normal(size=(num_rows, num_labels))
    scores[np.arange(num_rows), answers] += signal
    return log_softmax(scale * scores, axis=1), answers


def right(scores: Scores, answers: Numbers) -> float:
    return float((scores.argmax(axis=1) == answers).mean())


@pytest.mark.parametrize("num_fitted", [MOST_FITTED // 2, MOST_FITTED])
@pytest.mark.parametrize("scales", [(1.0, 1.0), (6.0, 0.1), (0.1, 6.0)])
@pytest.mark.parametrize("seed", range(3))
def test_where_one_part_is_noise_the_other_one_decides(seed: int, scales: tuple[float, float], num_fitted: int) -> None:
    """Whatever the scale of each, and on rows that the weights were not fitted on."""
    (good, answers), (noise, _) = made_up(seed, 1000, 3.0, scale=scales[0]), made_up(seed, 1000, 0.0, scale=scales[1])
    fitted, rest = slice(num_fitted), slice(num_fitted, None)
    for model, words in ((good, noise), (noise, good)):
        weights = fit_weights(model[fitted], words[fitted], list(answers[fitted]))
        best = right(good[rest], answers[rest])
        assert right(noise[rest], answers[rest]) < 0.35
        assert right(blended(weights, model[rest], words[rest]), answers[rest]) > best - 0.05


def test_where_each_part_knows_something_the_blend_knows_more() -> None:
    gains = []
    for seed in range(5):
        (model, answers), (words, _) = made_up(seed, 1000, 1.5, scale=3.0), made_up(seed, 1000, 1.6, scale=0.2)
        weights = fit_weights(model[:64], words[:64], list(answers[:64]))
        both = right(blended(weights, model[64:], words[64:]), answers[64:])
        gains.append(both - max(right(model[64:], answers[64:]), right(words[64:], answers[64:])))
    assert min(gains) > 0.03


def test_probabilities_are_calibrated_where_a_part_is_too_sure_of_itself() -> None:
    (model, answers), (words, _) = made_up(0, 2000, 1.0, scale=8.0), made_up(0, 2000, 0.5, scale=0.1)
    combined = blended(fit_weights(model[:64], words[:64], list(answers[:64])), model[64:], words[64:])
    share_right = right(combined, answers[64:])
    assert np.exp(combined.max(axis=1)).mean() == pytest.approx(share_right, abs=0.1)
    assert np.exp(model[64:].max(axis=1)).mean() > share_right + 0.2
    assert np.exp(combined).sum(axis=1) == pytest.approx(1)


def test_the_same_scores_give_the_same_weights() -> None:
    (model, answers), (words, _) = made_up(3, 40, 1.0), made_up(3, 40, 0.7)
    assert fit_weights(model, words, list(answers)) == fit_weights(model, words, list(answers))


def test_few_examples_give_the_fixed_weights() -> None:
    (model, answers), (words, _) = made_up(0, 8, 1.0), made_up(0, 8, 0.5)
    assert fit_weights(model[:7], words[:7], list(answers[:7])) == FIXED_WEIGHTS
    assert fit_weights(model, words, list(answers)).num_fitted == 8


def test_a_part_that_says_the_same_of_every_label_leaves_the_other_one_alone() -> None:
    flat, (words, answers) = np.full((40, 4), np.log(1 / 4)), made_up(0, 40, 2.0)
    weights = fit_weights(flat, words, list(answers))
    assert weights.model == pytest.approx(FIXED_WEIGHTS.model)
    assert (blended(weights, flat, words).argmax(axis=1) == words.argmax(axis=1)).all()


def test_a_part_that_is_always_wrong_gets_no_weight_but_never_a_negative_one() -> None:
    (wrong, answers), (words, _) = made_up(0, 64, -3.0), made_up(0, 64, 1.0)
    weights = fit_weights(wrong, words, list(answers))
    assert 0 < weights.model < 0.1 * weights.words


def test_a_single_label_and_scores_without_bound_survive() -> None:
    assert fit_weights(np.zeros((20, 1)), np.zeros((20, 1)), [0] * 20).num_fitted == 20
    far = np.where(np.eye(2)[[0, 1] * 10] == 1, -1e4, 0.0)
    weights = fit_weights(log_softmax(far, axis=1), np.full((20, 2), np.log(0.5)), [0, 1] * 10)
    assert weights.model < 0.01


def demonstrations(num_examples: int, labels: Sequence[str] = ("good", "bad")) -> list[Example]:
    words = ["film", "play", "song", "book", "box"]
    return [
        make_example(f"{words[i % 5]} {i} was {words[i % 3]}", labels[i % len(labels)]) for i in range(num_examples)
    ]


def test_weights_are_fitted_on_the_last_half_where_texts_come_once() -> None:
    shown = demonstrations(200)
    assert fitted_positions(shown) == list(range(136, 200))
    assert fitted_positions(shown[:100]) == list(range(50, 100))
    assert fitted_positions(shown[:16]) == list(range(8, 16))
    assert fitted_positions(shown[:15]) == []
    again = [*shown[:20], *(make_example(shown[n].query.text, "bad") for n in (3, 12))]
    assert fitted_positions(again) == [n for n in range(11, 20) if n != 12]
    again = [*again, make_example(shown[13].query.text, "good")]
    assert fitted_positions(again) == []


@pytest.mark.parametrize("labels", [("good", "bad"), ("good", "bad", "rare"), ("absent", "good", "bad")])
def test_words_are_never_scored_by_a_classifier_that_saw_them(
    labels: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = demonstrations(40)
    if "rare" in labels:
        shown[7] = make_example(shown[7].query.text, "rare")
    fits: list[set[str]] = []

    class Spy(WordClassifier):
        def log_probabilities(self, texts: Sequence[str], labels: Sequence[str]) -> Scores:
            assert not fits[-1] & set(texts)
            return super().log_probabilities(texts, labels)

        @classmethod
        def fit(cls, examples: Sequence[Example]) -> Any:
            fits.append({example.query.text for example in examples})
            return super().fit(examples)

    monkeypatch.setattr(blend, "WordClassifier", Spy)
    found = held_out_words(shown, labels, range(40))
    assert 1 < len(fits) <= blend.NUM_FOLDS
    assert np.exp(found).sum(axis=1) == pytest.approx(1)


def test_what_is_left_of_balanced_labels_is_balanced(monkeypatch: pytest.MonkeyPatch) -> None:
    fit, fits = WordClassifier.fit, []

    class Spy(WordClassifier):
        @classmethod
        def fit(cls, examples: Sequence[Example]) -> Any:
            fits.append(sum(example.answer == "good" for example in examples) / len(examples))
            return fit(examples)

    monkeypatch.setattr(blend, "WordClassifier", Spy)
    held_out_words(demonstrations(46), ("good", "bad"), range(23, 46))
    assert fits == [0.5] * len(fits)


def test_a_blend_of_scores_is_a_distribution_over_the_labels() -> None:
    shown = demonstrations(20)
    both = Blend.of(("absent", "good", "bad"), shown, BlendWeights(model=0.7, words=1.5, num_fitted=20))
    model = LabelScores({"absent": -9.0, "good": -700.0, "bad": -800.0}, {"absent": 1, "good": 1, "bad": 2})
    (found,) = both.scores(["film 3 was song"], [model])
    assert sum(found.probabilities.values()) == pytest.approx(1)
    assert found.best == "absent"
    assert found.num_tokens == model.num_tokens


def closed(num_examples: int = 24) -> Task:
    rows = demonstrations(num_examples, LABELS)
    return make_task(labels=LABELS, train=rows, instruction="Is it {{ labels | join(', ') }}?")


@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
@pytest.mark.parametrize("instruction", [None, "Is it {{ labels | join(', ') }}?"])
def test_scores_before_a_demonstration_are_those_after_a_prefix_of_the_ones_before(
    architecture: str, instruction: str | None
) -> None:
    engine = Engine.local(tiny_loaded(architecture))
    task = closed().with_spec(instruction_template=instruction)
    prefix = engine.prefill(task, task.train[:12])
    for shot, scores in enumerate(engine.scores_before_shown(prefix, range(12))):
        after = engine.prefill(task, task.train[:shot])
        (slow,) = engine.predict(after, [task.train[shot].query], scores="all")
        assert slow.scores is not None
        assert scores == pytest.approx(dict(slow.scores.log_probabilities), rel=1e-5, abs=1e-4)


def test_the_model_scores_no_demonstration_after_it_was_shown() -> None:
    scored: list[TokenIds] = []

    class Spy(PlainBackend):
        def score(
            self, prefix: Prefix, queries: Sequence[TokenIds], options: Sequence[Sequence[TokenIds]], scope: ScoreScope
        ) -> list[OptionScores]:
            scored.extend((*prefix.token_ids, *query) for query in queries)
            return super().score(prefix, queries, options, scope)

    tokenizer = byte_level_bpe()
    engine = Engine(Spy(len(tokenizer)), tokenizer, max_context_tokens=400)
    task = make_task(train=demonstrations(20))
    prefix = engine.prefill(task, task.train[:18])
    fitted = engine.with_blend(prefix)
    assert fitted.blend is not None
    assert fitted.blend.num_fitted == len(scored) == 9
    for shot, token_ids in enumerate(scored, start=9):
        assert token_ids == prefix.token_ids[: len(token_ids)]
        answer = engine.encoder.answer_ids(task.train[shot].answer)
        assert prefix.token_ids[len(token_ids) : len(token_ids) + len(answer)] == answer


def test_a_blended_prediction_is_the_blend_of_the_models_scores_and_the_words() -> None:
    engine = Engine.local(tiny_loaded())
    task = closed(30)
    prefix = engine.with_blend(engine.prefill(task, task.train[:20]))
    rows = [example.query for example in task.train[20:]]
    alone = list(engine.predict(prefix, rows, scores="all"))
    together = list(engine.predict(prefix, rows, scores="all", blend=True, abstain_below=THRESHOLD))
    assert prefix.blend is not None
    both = Blend.of(LABELS, task.train[:20], prefix.blend)
    assert prefix.blend.num_fitted == 10
    for row, model, one in zip(rows, alone, together, strict=True):
        assert model.scores is not None
        assert one.scores is not None
        (expected,) = both.scores([row.text], [model.scores])
        assert one.scores.log_probabilities == pytest.approx(expected.log_probabilities)
        assert one.answer == expected.best
        assert one.log_probability == model.scores.log_probabilities[one.answer]
        assert sum(one.scores.probabilities.values()) == pytest.approx(1)
        assert one.abstained == (one.scores.probabilities[one.answer] < THRESHOLD)
        assert (model.blended, one.blended) == (False, True)
        assert one.second is not None
        of_second = one.scores.log_probabilities[one.answer] - one.scores.log_probabilities[one.second]
        assert one.margin == pytest.approx(of_second)
        assert one.second == sorted(LABELS, key=lambda label: -expected.probabilities[label])[1]
        assert one.as_json()["blended"] is True
    assert {one.abstained for one in together} == {True, False}
    # Weights that were not fitted before are fitted by the call itself, and a stream gives the same.
    unfitted = engine.prefill(task, task.train[:20])
    assert list(engine.predict(unfitted, rows, scores="all", blend=True, abstain_below=THRESHOLD)) == together
    stream = engine.answer(task, task.train[:20], iter(rows), scores="all", blend=True, abstain_below=THRESHOLD)
    assert [one.answer for one in stream] == [one.answer for one in together]


def test_a_query_that_cannot_be_answered_is_reported_between_blended_ones() -> None:
    engine = Engine.local(tiny_loaded())
    task = closed()
    prefix = engine.prefill(task, task.train[:16])
    found = list(engine.predict(prefix, ["film", "", "play"], scores="all", blend=True, bad_rows="report"))
    assert [one.blended for one in found] == [True, False, True]
    assert found[1].problem is not None


def test_without_demonstrations_nothing_is_blended() -> None:
    engine = Engine.local(tiny_loaded())
    (one,) = engine.predict(engine.prefill(closed()), ["film"], scores="all", blend=True)
    assert not one.blended


def test_what_cannot_be_blended_is_refused() -> None:
    engine = Engine.local(tiny_loaded())
    many = tuple(f"label {i}" for i in range(MOST_LABELS_SCORED + 1))
    for task in (make_task(train=demonstrations(33, many), labels=many), make_task(labels=None)):
        prefix = engine.prefill(task, task.train[:2])
        with refused("not_blendable", expected="at most 32 labels", field="blend"):
            engine.predict(prefix, ["film"], scores="all", blend=True)
        with refused("not_blendable"):
            engine.with_blend(prefix)
    prefix = engine.prefill(closed(), closed().train[:4])
    with refused("conflicting_options", what="scores='all'", field="blend"):
        engine.predict(prefix, ["film"], blend=True)
    with refused("conflicting_options", what="additional examples", field="blend"):
        engine.predict(prefix, ["film"], scores="all", blend=True, retrieve=lambda query: ())


def test_a_compiled_task_carries_its_blend(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    task = closed()
    compiled = engine.with_blend(engine.compile(task, task.train[:18]))
    engine.save(compiled, tmp_path / "task.prefix")
    loaded = engine.load(tmp_path / "task.prefix")
    assert loaded.blend == compiled.blend
    assert loaded.blend is not None
    assert engine.with_blend(loaded) is loaded
    together, again = (list(engine.predict(one, ["film"], scores="all", blend=True)) for one in (compiled, loaded))
    assert together == again


def test_a_compiled_task_of_the_version_without_a_blend_is_read(tmp_path: Path) -> None:
    engine = Engine.local(tiny_loaded())
    task, path = closed(), tmp_path / "task.prefix"
    engine.save(engine.with_blend(engine.compile(task, task.train[:18])), path)
    with safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[HEADER_KEY])
    tensors = load_file(path)
    del header["blend"]
    earlier = json.dumps({**header, "format_version": 2})
    save_file(tensors, path, {HEADER_KEY: earlier, HASH_KEY: content_digest(earlier, tensors)})
    loaded = engine.load(path)
    assert loaded.blend is None
    assert engine.with_blend(loaded).blend is not None
