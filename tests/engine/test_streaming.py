"""Streamed parts = the predicted answers, for any tokens; a compilation that yields = one that does not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from manyicl.engine import prefix_cache
from manyicl.engine.answers import AnswerEnd, GrowingText
from manyicl.engine.backend import GeneratedToken, Sampling
from manyicl.engine.engine import Engine
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.tasks.task import Task
from tests.builders import byte_level_bpe, make_example, make_task, sentencepiece_bpe, tiny_loaded, unigram, word_level
from tests.engine.parts import blocks_of, refused

QUERIES = ["film 3 was good", "box 3 was good", "a", "the long red box was by the door"]
TOKENIZERS: list[Callable[[], PreTrainedTokenizerFast]] = [byte_level_bpe, sentencepiece_bpe, unigram, word_level]


def free_task() -> Task:
    return make_task(labels=None, family="qa", metric="exact_match", max_answer_tokens=24)


def closed_task() -> Task:
    rows = [make_example(f"film {i} was fine", ("good", "bad", "so so")[i % 3]) for i in range(40)]
    return make_task(labels=("good", "bad", "so so"), train=rows, instruction="Is it {{ labels | join(', ') }}?")


def parts_of(encoder: Encoder, token_ids: list[int]) -> tuple[list[str], str]:
    """Write tokens until the answer ends: the parts as they came, and the whole answer."""
    end = AnswerEnd(encoder)
    text = GrowingText(end)
    parts = []
    for position, token_id in enumerate(token_ids):
        stopped = end.ended([*(token.token_id for token in text.tokens), token_id])
        is_last = stopped or position == len(token_ids) - 1
        parts.append(text.add(GeneratedToken(0, token_id, -0.5, stopped, is_last)))
        if is_last:
            break
    return parts, end.text_of(text.tokens)[0]


@pytest.mark.parametrize("make", TOKENIZERS)
def test_parts_of_any_tokens_join_to_the_answer(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    encoder = Encoder(make())
    draw = random.Random(7)
    ends = 0
    for _ in range(300):
        token_ids = draw.choices(range(len(encoder.tokenizer)), k=draw.randint(1, 12))
        if draw.random() < 0.5:
            token_ids += encoder.segment_ids(draw.choice(["\n\n", "\nit\n\n", " good.\n\n", "日本\n\n"]))
        parts, answer = parts_of(encoder, token_ids)
        assert "".join(parts) == answer
        ends += answer != encoder.decode(token_ids)
    assert ends


def test_half_a_character_and_half_an_end_wait_for_the_next_token() -> None:
    encoder = Encoder(byte_level_bpe())
    given = [
        *encoder.segment_ids("it"),
        *encoder.segment_ids("日"),
        *encoder.segment_ids("\n"),
        *encoder.segment_ids("a"),
    ]
    parts, answer = parts_of(encoder, given)
    assert answer == "it日\na"
    assert "\ufffd" not in "".join(parts)
    assert "日" in parts
    assert parts[-1] == "\na"


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=1.5, seed=3)])
@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_bpe])
def test_a_stream_is_the_prediction_in_parts(
    make: Callable[[], PreTrainedTokenizerFast], sampling: Sampling | None
) -> None:
    engine = Engine.local(tiny_loaded("llama", make()))
    task = free_task()
    prefix = engine.prefill(task, task.demonstrations(4))
    rows: list[Any] = [*QUERIES[:2], {"nothing": 1}, *QUERIES[2:]]
    predicted = list(engine.predict(prefix, rows, sampling=sampling, bad_rows="report", num_similar=2))
    texts = dict.fromkeys(range(1, 6), "")
    whole = {}
    num_parts = 0
    for part in engine.stream(prefix, rows, sampling=sampling, bad_rows="report", num_similar=2):
        assert part.row not in whole
        texts[part.row] += part.text
        num_parts += 1
        if part.prediction is not None:
            whole[part.row] = part.prediction
    assert num_parts > len(rows)
    assert [whole[row].answer for row in sorted(whole)] == [one.answer for one in predicted]
    assert [texts[row] for row in sorted(texts)] == [one.answer for one in predicted]
    assert [whole[row].similar for row in sorted(whole)] == [one.similar for one in predicted]
    assert [whole[row].problem is None for row in sorted(whole)] == [True, True, False, True, True]
    for row, one in enumerate(predicted, start=1):
        if one.problem is None:
            assert whole[row].log_probability == pytest.approx(one.log_probability, abs=1e-5)
            assert (whole[row].stopped, whole[row].num_shots) == (one.stopped, one.num_shots)


def test_numbers_fix_what_is_drawn_whatever_is_answered_together() -> None:
    engine = Engine.local(tiny_loaded())
    task = free_task()
    prefix = engine.prefill(task, task.demonstrations(4))
    drawn = [one.answer for one in engine.predict(prefix, QUERIES, sampling=Sampling(seed=3))]
    mixed = ["a film", QUERIES[3], QUERIES[0]]
    together = [one.answer for one in engine.predict(prefix, mixed, sampling=Sampling(seed=3), numbers=[1, 4, 1])]
    assert together[1:] == [drawn[3], drawn[0]]
    streamed = {}
    for part in engine.stream(prefix, mixed, sampling=Sampling(seed=3), numbers=[1, 4, 1]):
        streamed[part.row] = part.prediction.answer if part.prediction else ""
    assert [streamed[row] for row in (1, 2, 3)] == together
    rows: list[Any] = ["a", {}]
    with pytest.raises(UserError) as caught:
        list(engine.predict(prefix, rows, numbers=[8, 31]))
    assert caught.value.row == 31
    for numbers, found in (([1], "more rows than 1"), ([1, 2, 3], "more numbers than 2")):
        with pytest.raises(UserError, match=f"numbers and rows differ in count; found {found}"):
            list(engine.predict(prefix, ["a", "b"], numbers=numbers))


def test_closing_a_stream_ends_generation_and_closed_answers_are_not_streamed() -> None:
    loaded = tiny_loaded()
    engine = Engine.local(loaded)
    task = free_task()
    prefix = engine.prefill(task, task.demonstrations(4))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    loaded.model.register_forward_pre_hook(count)
    parts = engine.stream(prefix, QUERIES)
    next(parts)
    before = calls
    parts.close()  # type: ignore[attr-defined]
    assert calls == before < 24
    closed = closed_task()
    with refused("closed_answers"):
        engine.stream(engine.prefill(closed, closed.train[:3]), ["film"])


def test_a_compilation_that_yields_between_chunks_is_the_one_that_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "FIRST_TIMED_CHUNK_TOKENS", 5)
    engine = Engine.local(tiny_loaded())
    task = closed_task()
    other = engine.prefill(task, task.train[:2])
    expected = list(engine.predict(other, ["play"]))
    at_once = engine.compile(task, task.train[:30])
    seen: list[tuple[int, int]] = []

    def work(num_done: int, num_tokens: int) -> float:
        seen.append((num_done, num_tokens))
        assert list(engine.predict(other, ["play"])) == expected
        return 1e-9

    compiled = engine.compile(task, task.train[:30], between_chunks=work)
    done = [num_done for num_done, _ in seen]
    # Chunks of 5 tokens, then of the fewest, because the function wants them short.
    assert done == list(range(5, compiled.num_tokens, prefix_cache.FEWEST_CHUNK_TOKENS))
    assert all(num_tokens == compiled.num_tokens for _, num_tokens in seen)
    assert [answer.is_right for answer in compiled.answers] == [answer.is_right for answer in at_once.answers]
    for one, two in zip(compiled.answers, at_once.answers, strict=True):
        assert one.log_probability == pytest.approx(two.log_probability, abs=1e-5)
    for one_, two_ in zip(engine.predict(compiled, QUERIES), engine.predict(at_once, QUERIES), strict=True):
        assert one_.log_probability == pytest.approx(two_.log_probability, abs=1e-5)


def test_an_observed_chunk_never_grows_beyond_what_its_logits_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.engine.local.OBSERVED_CHUNK_TOKENS", 20)
    engine = Engine.local(tiny_loaded())
    task = closed_task()
    done: list[int] = []

    def work(num_done: int, num_tokens: int) -> float:
        done.append(num_done)
        return 100.0

    compiled = engine.compile(task, task.train[:30], between_chunks=work)
    assert done == list(range(20, compiled.num_tokens, 20))


def test_a_fitted_prefix_compiles_as_at_once_and_runs_nothing_that_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_loaded()
    engine = Engine.local(loaded)
    task = closed_task()
    at_once = engine.compile(task, task.train[:20], num_retrieved=2)
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    loaded.model.register_forward_pre_hook(count)
    fitted = engine.fit_prefix(task, task.train[:20], num_retrieved=2)
    assert calls == 0
    assert fitted.token_ids == at_once.token_ids
    assert (fitted.demonstrations, fitted.num_dropped) == (at_once.demonstrations, at_once.num_dropped)
    assert fitted.rows == at_once.rows != ()
    again = engine.compile_fitted(fitted, reuse=at_once)
    assert calls == 0
    assert again.answers == at_once.answers
    assert blocks_of(again) == blocks_of(at_once)
    assert again.num_reused_tokens == again.num_tokens
    # Other work may go first while rows are encoded and others retrieved for them.
    monkeypatch.setattr("manyicl.engine.engine.ROWS_PER_CHUNK", 8)
    monkeypatch.setattr("manyicl.episodes.encoding.CHARACTERS_BETWEEN_PAUSES", 100)
    engine.encoder._use_format(engine.encoder.format)  # which remembers nothing yet
    chunks: list[tuple[int, int]] = []

    def work(num_done: int, num_tokens: int) -> None:
        chunks.append((num_done, num_tokens))

    yielding = engine.fit_prefix(task, iter(task.train[:20]), num_retrieved=2, between_chunks=work)
    assert yielding == fitted
    num_characters = sum(len(example.query.text) + len(example.answer) for example in (*task.train[:20], *task.test))
    assert num_characters // 200 + len(task.test) // 8 <= len(chunks) == chunks.count((0, 0))
    # Keys and values of a part, with all records: what they do not hold is computed and recorded again.
    part = engine.prefill(task, task.train[:7])
    reuse = TaskPrefix(task, at_once.demonstrations, 0, at_once.text_hash, part.cache, answers=at_once.answers)
    calls = 0
    completed = engine.compile_fitted(fitted, reuse=reuse)
    assert calls > 0
    assert completed.answers[:6] == at_once.answers[:6]
    assert 0 < completed.num_reused_tokens <= part.num_tokens
    for one, two in zip(completed.answers, at_once.answers, strict=True):
        assert one.num_shots == two.num_shots
        assert one.log_probability == pytest.approx(two.log_probability, abs=1e-5)
