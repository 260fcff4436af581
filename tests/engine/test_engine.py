"""Cached = uncached; labels as one at a time; options and mistakes of the one door in."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from manyicl.engine.backend import Sampling
from manyicl.engine.engine import READ_AHEAD_QUERIES, Engine
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.errors import MachineError, UserError
from manyicl.model.load import LoadedModel
from manyicl.tasks.task import Query, Task
from tests.builders import (
    ARCHITECTURES,
    byte_level_bpe,
    make_example,
    make_task,
    sentencepiece_bpe,
    tiny_loaded,
    tiny_model,
    word_level,
)
from tests.engine.parts import backend_of, blocks_of, model_of, refused
from tests.reference.slow_engine import plain_copy, slow_score

LABELS = ("good", "good film", "bad", "a", "long and bad")


def full_pass_score(engine: Engine, task: Task, num_shots: int, query: str, label: str) -> float:
    """The judge: plain transformers over the whole text, summed over the answer's tokens."""
    demonstrations = task.demonstrations(num_shots)
    prefix = engine.encoder.encode_prefix(task.instruction(), demonstrations)
    place = engine.encoder.preceding(task.instruction(), num_shots)
    before = (*prefix, *engine.encoder.query_ids(query, place))
    return slow_score(plain_copy(model_of(engine)), before, engine.encoder.answer_ids(label))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_shots", [0, 7])
def test_every_label_scores_as_in_a_full_pass(architecture: str, num_shots: int) -> None:
    engine = Engine.local(tiny_loaded(architecture))
    task = make_task(labels=LABELS)
    prefix = engine.prefill(task, task.demonstrations(num_shots))
    queries = ["film 3 was good", "a", "the long red box was by the door"]
    scored, best = engine.predict(prefix, queries, scores="all"), engine.predict(prefix, queries)
    for query, prediction, alone in zip(queries, scored, best, strict=True):
        assert prediction.scores is not None
        expected = {label: full_pass_score(engine, task, num_shots, query, label) for label in LABELS}
        assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert prediction.answer == max(expected, key=lambda label: expected[label]) == alone.answer
        assert prediction.log_probability == prediction.scores.log_probabilities[prediction.answer]
        assert alone.log_probability == pytest.approx(prediction.log_probability, abs=1e-5)
        assert alone.scores is None


def test_a_leading_marker_tokenizer_and_an_instruction_score_as_in_a_full_pass() -> None:
    engine = Engine.local(tiny_loaded("llama", sentencepiece_bpe()))
    for instruction in (None, "say good or bad"):
        task = make_task(labels=LABELS, instruction=instruction)
        for num_shots in (0, 3):
            prefix = engine.prefill(task, task.demonstrations(num_shots))
            (prediction,) = engine.predict(prefix, ["film 3 was good"], scores="all")
            expected = full_pass_score(engine, task, num_shots, "film 3 was good", "bad")
            assert prediction.scores is not None
            assert prediction.scores.log_probabilities["bad"] == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_an_extended_prefix_equals_one_prefilled_at_once(architecture: str) -> None:
    engine = Engine.local(tiny_loaded(architecture))
    task = make_task()
    shots = task.demonstrations(12)
    at_once = engine.prefill(task, shots)
    short = engine.prefill(task, shots[:5])
    before = [keys.clone() for block in blocks_of(short) for keys in block.keys]
    extended = engine.extend(short, shots[5:])
    assert extended.token_ids == at_once.token_ids
    assert extended.demonstrations == at_once.demonstrations
    for layer in range(3):
        for states in ("keys", "values"):
            one = torch.cat([getattr(block, states)[layer] for block in blocks_of(extended)], dim=2)
            other = torch.cat([getattr(block, states)[layer] for block in blocks_of(at_once)], dim=2)
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    after = [keys for block in blocks_of(short) for keys in block.keys]
    assert all(torch.equal(one, other) for one, other in zip(after, before, strict=True))


def test_prefixes_that_begin_alike_share_their_keys_and_answer_as_if_alone() -> None:
    engine = Engine.local(tiny_loaded("mistral"))
    task = make_task()
    queries = [example.query for example in task.test[:5]]
    first = engine.prefill(task, task.train[:20])
    other = (*task.train[:16], *task.train[20:24])
    shared, alone = engine.prefill(task, other, reuse=first), engine.prefill(task, other)
    assert shared.token_ids == alone.token_ids
    assert blocks_of(shared)[0].keys[0].data_ptr() == blocks_of(first)[0].keys[0].data_ptr()
    for one, two in zip(engine.predict(shared, queries), engine.predict(alone, queries), strict=True):
        assert one.log_probability == pytest.approx(two.log_probability, abs=1e-5)
    assert blocks_of(engine.prefill(task, task.train[:20], reuse=first)) == blocks_of(first)


def test_examples_of_its_own_stand_between_prefix_and_query() -> None:
    engine = Engine.local(tiny_loaded("llama", sentencepiece_bpe()))
    task = make_task(labels=LABELS)
    own = (task.train[7], task.train[3])
    for num_shots in (0, 4):
        shown = task.train[10 : 10 + num_shots]
        prefix = engine.prefill(task, shown, retrieve=lambda query: own)
        (with_own,) = engine.predict(prefix, ["film"], scores="all", retrieve=lambda query: own)
        (plain,) = engine.predict(engine.prefill(task, (*shown, *own)), ["film"], scores="all")
        assert with_own.scores is not None
        assert plain.scores is not None
        assert with_own.scores.log_probabilities == pytest.approx(plain.scores.log_probabilities, abs=1e-4)


def test_predictions_come_in_order_from_an_iterator_that_is_read_little_ahead() -> None:
    engine = Engine.local(tiny_loaded())
    prefix = engine.prefill(make_task())
    read = 0

    def rows() -> Iterator[Query]:
        nonlocal read
        for i in range(1000):
            read += 1
            yield Query(f"film {i} " + "was good " * (i % 7))

    predictions = engine.predict(prefix, rows())
    first = next(predictions)
    assert read <= READ_AHEAD_QUERIES
    together = [first, *predictions]
    assert len(together) == 1000
    for number in (0, 1, 255, 256, 999):
        (alone,) = engine.predict(prefix, [Query(f"film {number} " + "was good " * (number % 7))])
        assert together[number].log_probability == pytest.approx(alone.log_probability, abs=1e-4)


@pytest.mark.parametrize("labels", [LABELS, None])
def test_a_query_longer_than_the_activation_budget_scores_the_same_in_chunks(
    labels: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = Engine.local(tiny_loaded("mistral"))
    family, metric = ("classification", "accuracy") if labels else ("qa", "exact_match")
    task = make_task(labels=labels, family=family, metric=metric, max_answer_tokens=8)
    prefix = engine.prefill(task, task.demonstrations(3))
    queries = ["film", "play " * 40, "song"]
    expected = list(engine.predict(prefix, queries))
    memory = replace(backend_of(engine).activation_budget(prefix.cache), limit=20_000)
    assert memory.tokens_per_pass() < 40
    monkeypatch.setattr(engine.backend, "activation_budget", lambda prefix: memory)
    for one, other in zip(engine.predict(prefix, queries), expected, strict=True):
        assert one.answer == other.answer
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_an_interrupted_call_leaves_the_prefix_as_it_was() -> None:
    engine = Engine.local(tiny_loaded("gemma2"))
    task = make_task(labels=LABELS)
    queries = [example.query for example in task.test]
    prefix = engine.prefill(task, task.demonstrations(5))
    expected = [one.log_probability for one in engine.predict(prefix, queries)]
    calls = 0

    def interrupt(module: torch.nn.Module, arguments: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt

    hook = model_of(engine).get_submodule("model.layers.1").register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        list(engine.predict(prefix, queries))
    calls = 1
    with pytest.raises(KeyboardInterrupt):
        engine.extend(prefix, task.train[5:8])
    hook.remove()
    assert [one.log_probability for one in engine.predict(prefix, queries)] == expected


def test_an_answer_below_the_threshold_is_marked() -> None:
    engine = Engine.local(tiny_loaded())
    prefix = engine.prefill(make_task())
    (plain,) = engine.predict(prefix, ["film"], scores="all")
    assert not plain.abstained
    assert plain.scores is not None
    highest = plain.scores.probabilities[plain.answer]
    for threshold, abstained in ((highest + 1e-4, True), (highest - 1e-4, False)):
        (one,) = engine.predict(prefix, ["film"], scores="all", abstain_below=threshold)
        assert one.abstained == abstained


def test_the_prior_is_the_mean_over_neutral_queries() -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task(labels=LABELS)
    prefix = engine.prefill(task, task.demonstrations(5))
    slow = [full_pass_score(engine, task, 5, query, "bad") for query in ("N/A", "?")]
    expected = torch.tensor(slow).exp().mean().log()
    prior = engine.prior(prefix, ["N/A", "?"])
    assert prior.log_probabilities["bad"] == pytest.approx(float(expected), abs=1e-4)
    framed = make_task(labels=LABELS, query_template="Review: {{ text }}")
    prefix = engine.prefill(framed, task.demonstrations(5))
    (asked,) = engine.predict(prefix, [{"text": "N/A"}], scores="all")
    assert asked.scores is not None
    assert engine.prior(prefix, ["N/A"]).log_probabilities == pytest.approx(asked.scores.log_probabilities, abs=1e-5)
    with refused("no_labels"):
        engine.prior(engine.prefill(make_task(labels=None)))


@pytest.mark.parametrize(
    ("labels", "options", "code", "field"),
    [
        (LABELS, {"scores": "some"}, "unknown_value", "scores"),
        (LABELS, {"abstain_below": 0.5}, "conflicting_options", "abstain_below"),
        (LABELS, {"abstain_below": 1.5, "scores": "all"}, "out_of_range", "abstain_below"),
        (LABELS, {"sampling": Sampling()}, "conflicting_options", "sampling"),
        (None, {"abstain_below": 0.5, "scores": "all"}, "conflicting_options", "scores"),
        (None, {"scores": "all"}, "conflicting_options", "scores"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    labels: tuple[str, ...] | None, options: dict[str, Any], code: str, field: str
) -> None:
    engine = Engine.local(tiny_loaded())
    with refused(code, field=field):
        engine.predict(engine.prefill(make_task(labels=labels)), ["film"], **options)


def test_activation_budget_below_one_is_refused() -> None:
    with refused("out_of_range", field="activation_budget_mib"):
        Engine.local(tiny_loaded(), activation_budget_mib=0)


@pytest.mark.parametrize("labels", [LABELS, LABELS[:2], LABELS[:1]])
def test_the_second_best_is_the_same_with_all_scores_as_with_the_best_two(labels: tuple[str, ...]) -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task(labels=labels)
    prefix = engine.prefill(task)
    queries = ["film 3 was good", "a", "the long red box was by the door"]
    every, two, best = (list(engine.predict(prefix, queries, scores=scope)) for scope in ("all", "best_two", "best"))
    for one, other, alone in zip(every, two, best, strict=True):
        assert one.scores is not None
        assert (one.second, other.second, alone.second) == (one.scores.second, one.scores.second, None)
        assert alone.margin is None
        if len(labels) == 1:
            assert one.margin is other.margin is None
            continue
        assert one.margin == pytest.approx(other.margin, abs=1e-5) == pytest.approx(one.scores.margin)
        assert one.as_json()["second"] == one.second


def test_choices_per_row_are_the_options_of_that_row() -> None:
    engine = Engine.local(tiny_loaded())
    train = [make_example(f"film {i}", ("red", "long")[i % 2], ("red", "long", "box")) for i in range(6)]
    task = make_task("quiz", train, [], labels=None, family="qa", choices_column="options")
    prefix = engine.prefill(task, train[:3])
    rows = [{"text": "film", "options": ["door", "box"]}, {"text": "play", "options": ["red", "fine", "one"]}]
    first, second = engine.predict(prefix, rows, scores="all")
    assert first.scores is not None
    assert set(first.scores.log_probabilities) == {"door", "box"}
    assert second.answer in {"red", "fine", "one"}


def test_demonstrations_beyond_the_context_are_left_out_and_counted() -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=200)
    task = make_task()
    prefix = engine.prefill(task, task.train)
    assert 0 < prefix.num_shots < len(task.train)
    assert prefix.num_dropped == len(task.train) - prefix.num_shots
    assert prefix.num_tokens <= 200
    assert len(list(engine.predict(prefix, [example.query for example in task.test]))) == len(task.test)


def test_extending_beyond_the_context_is_refused_with_the_numbers() -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=120)
    task = make_task()
    with refused("too_many_demonstrations", what="40 demonstrations of task 'toy'", expected="of 120 tokens"):
        engine.extend(engine.prefill(task), task.train)


def test_a_query_that_does_not_fit_is_refused_by_number() -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=120)
    prefix = engine.prefill(make_task())
    with refused("query_too_long", row=2):
        list(engine.predict(prefix, ["film", "film " * 200]))


def test_a_missing_column_is_refused_by_number() -> None:
    engine = Engine.local(tiny_loaded())
    with pytest.raises(UserError, match=r"Query 1: .*'text'"):
        list(engine.predict(engine.prefill(make_task()), [{"body": "film"}]))


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused() -> None:
    engine = Engine.local(tiny_loaded("llama", word_level()))
    task = make_task(labels=("good", "wug", "dax"))
    with pytest.raises(UserError, match="cannot tell the labels 'wug' and 'dax'"):
        engine.prefill(task)


def test_queries_before_a_wrong_one_are_still_answered() -> None:
    engine = Engine.local(tiny_loaded())
    predictions = engine.predict(engine.prefill(make_task()), ["film", "play", {"body": "box"}, "song"])
    assert [next(predictions).answer for _ in range(2)]
    with pytest.raises(UserError, match="Query 3"):
        next(predictions)


def test_the_order_of_queries_and_the_activation_budget_change_no_answer() -> None:
    task = make_task(labels=LABELS)
    shots = task.demonstrations(9)
    queries = [Query("film " * (1 + i * i % 11) + str(i)) for i in range(40)]
    engine = Engine.local(tiny_loaded("gemma3_text"))
    together = engine.predict(engine.prefill(task, shots), queries, scores="all")
    expected = [one.scores.log_probabilities for one in together if one.scores]
    order = random.Random(0).sample(range(40), 40)
    for mib in (None, 1):
        other = Engine.local(tiny_loaded("gemma3_text"), activation_budget_mib=mib)
        shuffled = other.predict(other.prefill(task, shots), [queries[i] for i in order], scores="all")
        for i, prediction in zip(order, shuffled, strict=True):
            assert prediction.scores is not None
            assert prediction.answer == prediction.scores.best
            assert prediction.scores.log_probabilities == pytest.approx(expected[i], rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("tied", [True, False])
def test_bfloat16_stays_as_near_to_float32_as_plain_transformers_does(architecture: str, tied: bool) -> None:
    """Rounding differs from way to way; behind a prefix it must not be worse than over the whole text."""
    labels = ("good", "bad", "long and bad")
    task = make_task(labels=labels)
    tokenizer = byte_level_bpe()
    errors: dict[str, list[float]] = {"ours": [], "theirs": []}
    model = tiny_model(architecture, len(tokenizer), tie_word_embeddings=tied)
    exact = Engine.local(LoadedModel(model, tokenizer, None, "exact", "exact"))
    prefix = exact.prefill(task, task.train[:9])
    queries = [example.query for example in task.test[:8]]
    truth = [one.scores.log_probabilities for one in exact.predict(prefix, queries, scores="all") if one.scores]
    rounded = copy.deepcopy(model).to(torch.bfloat16)  # type: ignore[arg-type]
    engine = Engine.local(LoadedModel(rounded, tokenizer, None, "rounded", "rounded"))
    plain = plain_copy(rounded)
    for query, right, one in zip(
        queries, truth, engine.predict(engine.prefill(task, task.train[:9]), queries, scores="all"), strict=True
    ):
        assert one.scores is not None
        before = [*prefix.token_ids, *engine.encoder.query_ids(query.text)]
        for label in labels:
            theirs = slow_score(plain, before, engine.encoder.answer_ids(label))
            errors["ours"].append(abs(one.scores.log_probabilities[label] - right[label]))
            errors["theirs"].append(abs(theirs - right[label]))
    ours, theirs = (sum(values) / len(values) for values in errors.values())
    assert ours < 1.5 * theirs + 0.05


def test_queries_that_the_task_cannot_ask_are_refused_by_number() -> None:
    engine = Engine.local(tiny_loaded())
    train = [make_example(f"film {i}", ("red", "long")[i % 2], ("red", "long", "box")) for i in range(6)]
    quiz = engine.prefill(make_task("quiz", train, [], labels=None, family="qa", choices_column="options"), train[:2])
    closed = engine.prefill(make_task())
    queries: list[tuple[TaskPrefix, Any, str, int]] = [
        (quiz, [Query("b"), Query("a", ("red", "long"))], "choices_mismatch", 1),
        (quiz, [Query("a", ("red", "long")), Query("b")], "choices_mismatch", 2),
        (closed, [Query("a", ("red",))], "choices_mismatch", 1),
        (closed, ["film", "a \ud800"], "half_a_character", 2),
        (closed, ["film", " "], "empty_query", 2),
    ]
    for prefix, rows, code, number in queries:
        with refused(code, row=number):
            list(engine.predict(prefix, rows))
    others: list[tuple[TaskPrefix, Any, str]] = [
        (quiz, [{"text": "a", "options": ["red", ""]}], "Query 1: An option .* is empty"),
        (quiz, [{"text": "a", "options": ["red", None]}], "Query 1: An option .* is empty"),
        (quiz, [Query("a", ("red", "x\n\ny"))], "Query 1: The answer .* contains the end-of-answer text"),
        (closed, [5], "Query 1: .*mapping"),
    ]
    for prefix, rows, sentence in others:
        with pytest.raises(UserError, match=sentence):
            list(engine.predict(prefix, rows))


def test_scores_that_are_no_numbers_end_the_call() -> None:
    engine = Engine.local(tiny_loaded())
    for task in (make_task(), make_task(labels=None, family="qa", metric="exact_match")):
        prefix = engine.prefill(task, task.train[:2])
        norm = model_of(engine).get_parameter("model.norm.weight")
        kept = norm.detach().clone()
        with torch.no_grad():
            norm.fill_(float("nan"))
        with pytest.raises(MachineError, match="not numbers"):
            list(engine.predict(prefix, ["film"]))
        with torch.no_grad():
            norm.copy_(kept)


def test_a_stream_leaves_nothing_behind_in_the_encoder() -> None:
    engine = Engine.local(tiny_loaded())
    prefix = engine.prefill(make_task())
    before = engine.encoder._query_ids.num_bytes
    assert len(list(engine.predict(prefix, (f"film number {i}" for i in range(300))))) == 300
    assert engine.encoder._query_ids.num_bytes == before
