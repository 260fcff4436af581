"""Generation = one full pass per token; drawn answers are fixed by seed and number; text ends an answer."""

from __future__ import annotations

import math
import random
from collections import Counter

import pytest
import torch

from manyicl.engine.answers import AnswerEnd
from manyicl.engine.backend import Sampling
from manyicl.engine.decoding import _draw
from manyicl.engine.engine import Engine
from manyicl.engine.local import identity_of
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.tasks.task import Task
from tests.builders import ARCHITECTURES, make_task, sentencepiece_bpe, tiny_loaded
from tests.engine.parts import model_of, written
from tests.reference.slow_engine import plain_copy, slow_greedy

QUERIES = ["film 3 was good", "box 3 was good", "a", "the long red box was by the door"]


def free_task() -> Task:
    return make_task(labels=None, family="qa", metric="exact_match", max_answer_tokens=9)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_packed_generation_equals_a_full_pass_per_token_and_generation_alone(architecture: str) -> None:
    engine = Engine.local(tiny_loaded(architecture))
    plain = plain_copy(model_of(engine))
    task = free_task()
    prefix = engine.prefill(task, task.demonstrations(4))
    eos = engine.encoder.tokenizer.eos_token_id
    for query, prediction in zip(QUERIES, engine.predict(prefix, QUERIES), strict=True):
        before = [*prefix.token_ids, *engine.encoder.query_ids(query)]
        answer, log_probability = slow_greedy(
            plain, before, lambda answer: "\n\n" in engine.encoder.decode(answer) or eos in answer, 9
        )
        assert prediction.answer == engine.encoder.decode([t for t in answer if t != eos]).partition("\n\n")[0]
        if eos not in answer:
            assert prediction.log_probability == pytest.approx(log_probability, rel=1e-4, abs=1e-4)
        (alone,) = engine.predict(prefix, [query])
        assert alone.answer == prediction.answer
        assert alone.log_probability == pytest.approx(prediction.log_probability, abs=1e-4)


def test_drawn_answers_are_fixed_by_seed_and_number_and_not_by_what_is_asked_beside() -> None:
    engine = Engine.local(tiny_loaded())
    task = free_task()
    prefix = engine.prefill(task, task.demonstrations(4))
    drawn = [one.answer for one in engine.predict(prefix, QUERIES, sampling=Sampling(seed=3))]
    alone = [one.answer for one in engine.predict(prefix, QUERIES[:2], sampling=Sampling(seed=3))]
    other = [one.answer for one in engine.predict(prefix, QUERIES, sampling=Sampling(seed=4))]
    assert drawn[:2] == alone
    assert drawn != other
    greedy = [one.answer for one in engine.predict(prefix, QUERIES)]
    assert greedy == [one.answer for one in engine.predict(prefix, QUERIES, sampling=Sampling(temperature=1e-4))]
    assert greedy == [one.answer for one in engine.predict(prefix, QUERIES, sampling=Sampling(top_p=1e-9))]


def test_draws_follow_the_probabilities_within_top_p() -> None:
    logits = torch.tensor([0.3, 0.5, 0.05, 0.15]).log()
    chance = random.Random(0)
    counts = Counter(int(_draw(logits, Sampling(top_p=0.7), chance)) for _ in range(4000))
    assert set(counts) == {0, 1}
    assert counts[1] / 4000 == pytest.approx(0.625, abs=0.03)


@pytest.mark.parametrize("text", ["fine.\n\nthe next", "日本語 🎉\n\n", "\n\n"])
def test_the_terminators_text_ends_an_answer_even_inside_a_longer_token(text: str) -> None:
    encoder = Encoder(tiny_loaded().tokenizer)
    _, answer, _ = written(AnswerEnd(encoder), encoder.segment_ids(text))
    assert answer == text.partition("\n\n")[0]


@pytest.mark.parametrize("text", ["日本語です", "สวัสดีครับ", "🎉🎉🎉", "é"])
def test_a_terminator_of_byte_tokens_ends_an_answer_of_byte_tokens(text: str) -> None:
    """Llama-2 style: a line break is a byte, and a tail may begin within a character."""
    encoder = Encoder(sentencepiece_bpe(prepend_normalizer=True))
    tokens = encoder.segment_ids(f"{text}\n\n")
    assert written(AnswerEnd(encoder), tokens)[:2] == (len(tokens), text)


def test_every_token_that_ends_a_text_ends_an_answer() -> None:
    loaded = tiny_loaded()
    loaded.model.generation_config.eos_token_id = [5, 9]
    encoder = Encoder(loaded.tokenizer)
    end = AnswerEnd(encoder, identity_of(loaded).end_token_ids)
    assert end.token_ids == {5, 9, loaded.tokenizer.eos_token_id}
    so = encoder.segment_ids("so")
    assert written(end, (*so, 9)) == (len(so) + 1, "so", -0.5 * len(so))


@pytest.mark.parametrize("wrong", [{"temperature": 0.0}, {"temperature": math.inf}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_sampling_out_of_range_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        Sampling(**wrong)  # type: ignore[arg-type]
