"""Labels of any script, of 40 tokens and by the thousand score as one at a time; answers end where the text says."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from manyicl.engine.answers import AnswerEnd
from manyicl.engine.engine import Engine
from manyicl.engine.label_trie import NODES_READ_TOGETHER
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.tasks.task import Task
from tests.builders import byte_level_bpe, make_example, make_task, sentencepiece_bpe, tiny_loaded
from tests.engine.parts import model_of, written
from tests.odd_text import SCRIPTS, TEXTS
from tests.reference.slow_engine import plain_copy, slow_greedy, slow_score

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": byte_level_bpe,
    "SentencePiece BPE with byte fallback": sentencepiece_bpe,
}
WORDS = [first + second for first in "bdfgklmnprst" for second in ("a", "e", "i", "o", "u", "ai", "or")]


def scores_one_at_a_time(engine: Engine, task: Task, num_shots: int, query: str) -> dict[str, float]:
    """The judge: plain transformers over the whole text, each label by itself."""
    shown = task.demonstrations(num_shots)
    encoder, plain = engine.encoder, plain_copy(model_of(engine))
    before = (
        *encoder.encode_prefix(task.instruction(), shown),
        *encoder.query_ids(query, encoder.preceding(task.instruction(), num_shots)),
    )
    return {label: slow_score(plain, before, encoder.answer_ids(label)) for label in task.labels or ()}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_labels_of_every_script_score_as_one_at_a_time(kind: str) -> None:
    engine = Engine.local(tiny_loaded("llama", TOKENIZERS[kind]()), max_context_tokens=512)
    labels = (*(text[:12] for text in SCRIPTS.values()), "caf\u00e9", "cafe\u0301", "good", "good\u200b", "</s>")
    rows = [make_example(f"{text[:20]} {i}", labels[i]) for i, text in enumerate(TEXTS.values()) if i < len(labels)]
    task = make_task(train=rows, test=rows, labels=labels)
    prefix = engine.prefill(task, task.demonstrations(2), [row.query for row in rows])
    assert prefix.num_shots == 2
    queries = [rows[i].query for i in (0, 2, 18, 19)]
    everything = list(engine.predict(prefix, queries, scores="all"))
    best = list(engine.predict(prefix, queries))
    for query, one, alone in zip(queries, everything, best, strict=True):
        expected = scores_one_at_a_time(engine, task, 2, query.text)
        assert one.scores is not None
        assert one.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=2e-4)
        assert one.answer == alone.answer == max(expected, key=lambda label: expected[label])


def long_labels(encoder: Encoder) -> tuple[str, ...]:
    """One token to 40 of them: some begin others, two differ in the last token alone."""
    rng = random.Random(0)
    long = rng.choice(WORDS)
    while len(encoder.segment_ids(f"{long} x")) < 39:
        long += rng.choice(WORDS)
    return (f"{long} x", f"{long} y", long, long[:20], long[:3], "a", "good", f"good {long[:9]}")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_labels_of_forty_tokens_and_of_one_compare_as_one_at_a_time(kind: str) -> None:
    engine = Engine.local(tiny_loaded("llama", TOKENIZERS[kind]()), max_context_tokens=512)
    labels = long_labels(engine.encoder)
    first, second, shortest = (engine.encoder.answer_ids(label) for label in (labels[0], labels[1], "a"))
    assert len(first) >= 40
    assert len(shortest) <= 3
    assert sum(one != other for one, other in zip(first, second, strict=True)) == 1
    rows = [make_example(f"q{i}", labels[i % len(labels)]) for i in range(24)]
    task = make_task(train=rows, test=rows, labels=labels)
    prefix = engine.prefill(task, task.demonstrations(4))
    for query in ("q1", "the red box"):
        (prediction,) = engine.predict(prefix, [query], scores="all")
        expected = scores_one_at_a_time(engine, task, prefix.num_shots, query)
        assert prediction.scores is not None
        assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-3)
        (best,) = engine.predict(prefix, [query])
        assert best.answer == prediction.answer == max(expected, key=lambda label: expected[label])


def test_room_is_kept_for_the_longest_label_of_all() -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=120)
    labels = long_labels(engine.encoder)
    longest = max(len(engine.encoder.answer_ids(label)) for label in labels)
    rows = [make_example(f"q{i}", "good") for i in range(40)]
    task = make_task(train=rows, test=rows, labels=labels)
    prefix = engine.prefill(task, task.train)
    query = max(len(engine.encoder.query_ids(row.query.text)) for row in rows)
    assert engine.num_reserved_tokens(task) == query + longest
    assert 0 < prefix.num_tokens <= 120 - longest - query
    assert len(list(engine.predict(prefix, [row.query for row in rows]))) == 40


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("text", ["日本語", "съешь", "שלום", "\U0001f468\u200d\U0001f467", "हिन्दी"])
def test_an_answer_of_any_script_ends_at_the_terminator_whatever_token_brings_it(kind: str, text: str) -> None:
    engine = Engine.local(tiny_loaded("llama", TOKENIZERS[kind]()))
    encoder = engine.encoder
    for answer in (text, f"{text}.", f"{text}\nx"):
        tokens = encoder.answer_ids(answer)
        assert written(AnswerEnd(encoder), tokens)[:2] == (len(tokens), answer)


def test_an_answer_cut_within_a_character_still_ends_at_the_terminator() -> None:
    for tokenizer in (byte_level_bpe(), sentencepiece_bpe()):
        encoder = Encoder(tokenizer)
        *letters, _ = encoder.segment_ids("good \u1e08")
        tokens = (*letters, *encoder.segment_ids("\n\n"))
        num_needed, answer, _ = written(AnswerEnd(encoder), tokens)
        assert num_needed == len(tokens)
        assert (answer or "").startswith("good ")
        assert set((answer or "").removeprefix("good ")) == {"\ufffd"}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_free_answers_behind_any_script_equal_a_full_pass_per_token(kind: str) -> None:
    engine = Engine.local(tiny_loaded("llama", TOKENIZERS[kind]()), max_context_tokens=512)
    texts = [text[:15] for text in SCRIPTS.values()]
    rows = [make_example(text, other) for text, other in zip(texts, reversed(texts), strict=True)]
    task = make_task(train=rows, test=rows, labels=None, family="qa", metric="exact_match", max_answer_tokens=8)
    prefix = engine.prefill(task, task.demonstrations(2))
    plain, encoder = plain_copy(model_of(engine)), engine.encoder
    eos = encoder.tokenizer.eos_token_id
    for query, prediction in zip(texts[:6], engine.predict(prefix, texts[:6]), strict=True):
        before = [*prefix.token_ids, *encoder.query_ids(query)]
        written, _ = slow_greedy(plain, before, lambda ids: "\n\n" in encoder.decode(ids) or eos in ids, 8)
        expected = encoder.decode([token for token in written if token != eos]).partition("\n\n")[0]
        assert prediction.answer == expected


@pytest.mark.parametrize("number", [3_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_labels_are_asked_in_time_and_the_best_scores_as_alone(number: int) -> None:
    start = time.perf_counter()
    rng = random.Random(1)
    labels = tuple({"".join(rng.choices(WORDS, k=rng.randint(2, 4))): None for _ in range(number * 6 // 5)})[:number]
    assert len(labels) == number
    loaded = tiny_loaded()
    with torch.no_grad():  # as sharp as a trained model is
        loaded.model.get_output_embeddings().weight.mul_(4.0)
    engine = Engine.local(loaded, max_context_tokens=512)
    rows = [make_example(f"q{i}", label) for i, label in enumerate(labels)]
    task = make_task(train=rows, test=rows, labels=labels)
    prefix = engine.prefill(task, task.demonstrations(4), [row.query for row in rows[:100]])
    assert prefix.num_shots == 4
    best = list(engine.predict(prefix, ["q1", "q2"]))
    encoder, plain = engine.encoder, plain_copy(model_of(engine))
    for query, prediction in zip(("q1", "q2"), best, strict=True):
        before = (*prefix.token_ids, *encoder.query_ids(query))
        alone = slow_score(plain, before, encoder.answer_ids(prediction.answer))
        assert prediction.log_probability == pytest.approx(alone, rel=1e-5, abs=1e-3)
        some = rng.sample(labels, 100)
        assert max(slow_score(plain, before, encoder.answer_ids(label)) for label in some) <= alone + 1e-3
    # Some seconds alone; reading 2,048 nodes of a query together took half a minute for every one.
    assert time.perf_counter() - start < number / 100


def test_hundreds_of_labels_score_as_one_at_a_time_where_their_trie_is_cut() -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=512)
    rng = random.Random(2)
    labels = tuple({"".join(rng.choices(WORDS, k=rng.randint(1, 3))): None for _ in range(400)})
    rows = [make_example(f"q{i}", label) for i, label in enumerate(labels)]
    task = make_task(train=rows, test=rows, labels=labels)
    prefix = engine.prefill(task, task.demonstrations(2))
    (prediction,) = engine.predict(prefix, ["q1"], scores="all")
    assert prediction.scores is not None
    assert list(prediction.scores.log_probabilities) == list(labels)
    assert (
        len({ids[:i] for ids in map(engine.encoder.answer_ids, labels) for i in range(1, len(ids))})
        > 2 * NODES_READ_TOGETHER
    )
    expected = scores_one_at_a_time(engine, task, 2, "q1")
    assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-3)
    assert prediction.answer == max(expected, key=lambda label: expected[label])


def test_an_instruction_longer_than_the_context_is_refused_before_it_is_read() -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=200)
    labels = tuple(f"label {number}" for number in range(1_000))
    task = make_task(labels=labels, instruction="One of: {{ labels | join(', ') }}")
    with pytest.raises(
        UserError, match=r"\(the task has 1,000 labels\) alone fills the context; expected fewer than 200 tokens"
    ):
        engine.prefill(task)
