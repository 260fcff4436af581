"""Cached = uncached; labels as one at a time; generation as transformers' own."""

from __future__ import annotations

import math

import pytest
import torch

from manyicl.engine.engine import Engine
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.tasks.task import Query, Task
from tests.builders import ARCHITECTURES, make_example, make_task, sentencepiece_bpe, tiny_loaded, word_level

LABELS = ("good", "good film", "bad", "a", "long and bad")


def full_pass_score(engine: Engine, task: Task, num_shots: int, query: str, label: str) -> float:
    """The judge: one uncached pass of the model over the whole text, summed over the answer's tokens."""
    demonstrations = task.demonstrations(num_shots)
    prefix = engine.encoder.encode_prefix(task.instruction(), demonstrations)
    opens = engine.encoder.opens_sequence(task.instruction(), num_shots)
    before = (*prefix, *engine.encoder.query_ids(query, opens))
    answer = engine.encoder.answer_ids(label)
    with torch.no_grad():
        logits = engine.model(input_ids=torch.tensor([[*before, *answer]]), use_cache=False).logits[0].float()
    log_probabilities = logits.log_softmax(-1)
    return sum(float(log_probabilities[len(before) - 1 + i, token]) for i, token in enumerate(answer))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_shots", [0, 7])
def test_every_label_scores_as_in_a_full_pass(architecture: str, num_shots: int) -> None:
    engine = Engine(tiny_loaded(architecture))
    task = make_task(labels=LABELS)
    prefix = engine.prefill(task, task.demonstrations(num_shots))
    queries = ["film 3 was good", "a", "the long red box was by the door"]
    for query, prediction in zip(queries, engine.predict(prefix, queries, batch_size=4), strict=True):
        assert prediction.scores is not None
        expected = {label: full_pass_score(engine, task, num_shots, query, label) for label in LABELS}
        assert prediction.scores == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert prediction.answer == max(expected, key=lambda label: expected[label])
        assert prediction.log_probability == prediction.scores[prediction.answer]


def test_a_leading_marker_tokenizer_and_an_instruction_score_as_in_a_full_pass() -> None:
    engine = Engine(tiny_loaded("llama", sentencepiece_bpe()))
    for instruction in (None, "say good or bad"):
        task = make_task(labels=LABELS, instruction=instruction)
        for num_shots in (0, 3):
            prefix = engine.prefill(task, task.demonstrations(num_shots))
            (prediction,) = engine.predict(prefix, ["film 3 was good"])
            expected = full_pass_score(engine, task, num_shots, "film 3 was good", "bad")
            assert prediction.scores is not None
            assert prediction.scores["bad"] == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "qwen2"])
def test_an_extended_prefix_equals_one_prefilled_at_once(architecture: str) -> None:
    engine = Engine(tiny_loaded(architecture))
    task = make_task()
    shots = task.demonstrations(12)
    at_once = engine.prefill(task, shots)
    short = engine.prefill(task, shots[:5])
    before = [keys.clone() for keys in short.keys]
    extended = engine.extend(short, shots[5:])
    assert extended.token_ids == at_once.token_ids
    assert extended.demonstrations == at_once.demonstrations
    for one, other in zip(extended.keys, at_once.keys, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, other) for one, other in zip(short.keys, before, strict=True))


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    from manyicl.engine import prefix_cache

    engine = Engine(tiny_loaded("gemma2"))
    ids = engine.encoder.encode_prefix("", make_task().train)
    whole, _ = prefix_cache.encode_behind(engine.model, ids)
    parts, _ = prefix_cache.encode_behind(engine.model, ids, chunk_tokens=13)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma3_text"])
def test_generation_equals_a_full_pass_per_token_and_batches_change_nothing(architecture: str) -> None:
    engine = Engine(tiny_loaded(architecture))
    task = make_task(labels=None, family="qa", metric="exact_match", max_answer_tokens=9)
    prefix = engine.prefill(task, task.demonstrations(4))
    queries = ["film 3 was good", "box 3 was good", "a", "the long red box was by the door"]
    together = list(engine.predict(prefix, queries, batch_size=3))
    for query, prediction in zip(queries, together, strict=True):
        ids = [*prefix.token_ids, *engine.encoder.query_ids(query)]
        start = len(ids)
        log_probability = 0.0
        while len(ids) < start + 9 and "\n\n" not in engine.encoder.decode(ids[start:]):
            with torch.no_grad():
                logits = engine.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            if int(logits.argmax()) == engine.encoder.tokenizer.eos_token_id:
                break
            log_probability += float(logits.float().log_softmax(-1).max())
            ids.append(int(logits.argmax()))
        assert prediction.answer == engine.encoder.decode(ids[start:]).partition("\n\n")[0]
        assert prediction.log_probability == pytest.approx(log_probability, rel=1e-4, abs=1e-4)
        assert next(iter(engine.predict(prefix, [query]))).answer == prediction.answer


def test_generation_stops_on_the_terminators_text_even_inside_a_longer_token() -> None:
    """A token that holds the end of the answer and the blank line together ends the answer."""
    from manyicl.engine.decoding import Generation, _append

    encoder = Encoder(tiny_loaded().tokenizer)
    generation = Generation()
    for token in encoder.piece_ids("fine.\n\nthe next"):
        if not generation.stopped:
            _append(generation, token, -0.5, encoder)
    assert generation.answer == "fine."
    assert generation.stopped


def test_choices_per_row_are_the_options_of_that_row() -> None:
    engine = Engine(tiny_loaded())
    train = [make_example(f"film {i}", ("red", "long")[i % 2], ("red", "long", "box")) for i in range(6)]
    task = make_task("quiz", train, [], labels=None, family="qa", choices_column="options")
    prefix = engine.prefill(task, train[:3])
    rows = [{"text": "film", "options": ["door", "box"]}, {"text": "play", "options": ["red", "fine", "one"]}]
    first, second = engine.predict(prefix, rows)
    assert first.scores is not None
    assert second.scores is not None
    assert set(first.scores) == {"door", "box"}
    assert second.answer in {"red", "fine", "one"}


def test_demonstrations_beyond_the_context_are_left_out_and_counted() -> None:
    engine = Engine(tiny_loaded(), max_context_tokens=200)
    task = make_task()
    prefix = engine.prefill(task, task.train)
    assert 0 < prefix.num_shots < len(task.train)
    assert prefix.num_left_out == len(task.train) - prefix.num_shots
    assert prefix.num_tokens <= 200
    assert len(list(engine.predict(prefix, [example.query for example in task.test]))) == len(task.test)


def test_extending_beyond_the_context_is_refused_with_the_numbers() -> None:
    engine = Engine(tiny_loaded(), max_context_tokens=120)
    task = make_task()
    with pytest.raises(UserError, match=r"40 demonstrations of 'toy' need [\d,]+ tokens"):
        engine.extend(engine.prefill(task), task.train)


def test_a_query_that_does_not_fit_is_refused_by_number() -> None:
    engine = Engine(tiny_loaded(), max_context_tokens=120)
    prefix = engine.prefill(make_task())
    with pytest.raises(UserError, match="Query 2 needs"):
        list(engine.predict(prefix, ["film", "film " * 200]))


def test_a_missing_column_is_refused_by_number() -> None:
    engine = Engine(tiny_loaded())
    with pytest.raises(UserError, match=r"Query 1: .*'text'"):
        list(engine.predict(engine.prefill(make_task()), [{"body": "film"}]))


def test_predictions_come_in_order_from_an_iterator_that_is_read_little_ahead() -> None:
    engine = Engine(tiny_loaded())
    prefix = engine.prefill(make_task())
    read = 0

    def rows() -> object:
        nonlocal read
        for i in range(100):
            read += 1
            yield Query(f"film {i}")

    predictions = engine.predict(prefix, rows(), batch_size=2)  # type: ignore[arg-type]
    next(predictions)
    assert read <= 16
    assert len(list(predictions)) == 99


def test_scores_are_log_probabilities() -> None:
    engine = Engine(tiny_loaded())
    (prediction,) = engine.predict(engine.prefill(make_task()), ["film"])
    assert prediction.scores is not None
    assert sum(math.exp(score) for score in prediction.scores.values()) < 1


def test_labels_that_the_tokenizer_cannot_tell_apart_are_refused() -> None:
    engine = Engine(tiny_loaded("llama", word_level()))
    task = make_task(labels=("good", "wug", "dax"))
    with pytest.raises(UserError, match="cannot tell the labels 'wug' and 'dax'"):
        engine.prefill(task)


def test_queries_before_a_wrong_one_are_still_answered() -> None:
    engine = Engine(tiny_loaded())
    predictions = engine.predict(engine.prefill(make_task()), ["film", "play", {"body": "box"}, "song"])
    assert [next(predictions).answer for _ in range(2)]
    with pytest.raises(UserError, match="Query 3"):
        next(predictions)
