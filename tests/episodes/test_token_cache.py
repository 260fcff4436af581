"""Texts that come again are encoded once, within a bound on memory."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor

from manyicl.episodes.budget import num_tokens_for_asking
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.token_cache import TokenCache
from tests.builders import byte_level_bpe, make_example, make_task


def test_memory_stays_within_the_bound_however_long_the_texts_are() -> None:
    calls: list[str] = []

    def encode(text: str) -> tuple[int, ...]:
        calls.append(text)
        return tuple(range(len(text)))

    cache = TokenCache(encode, 100_000)
    texts = [f"{n}" + "a" * 9_000 for n in range(50)]
    for text in texts:
        assert cache(text) == tuple(range(len(text)))
        assert cache.num_bytes <= 100_000
    assert cache(texts[-1]) == tuple(range(len(texts[-1])))
    assert len(calls) == 50
    cache(texts[0])
    assert len(calls) == 51
    assert TokenCache(encode, 10)("a" * 50) == tuple(range(50))


def test_threads_get_what_each_asks_for() -> None:
    cache = TokenCache(lambda text: (len(text),), 2_000)
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda n: cache("a" * (n % 40)), range(5_000))) == [(n % 40,) for n in range(5_000)]


def test_queries_that_pass_are_never_stored() -> None:
    encoder = Encoder(byte_level_bpe())
    before = encoder._query_ids.num_bytes
    task = make_task()
    num_tokens_for_asking(task, encoder, 9, [example.query for example in task.test])
    for example in task.test:
        encoder.query_ids_uncached(example.query.text)
    assert encoder._query_ids.num_bytes == before == 0
    encoder.query_ids("the film")
    assert encoder._query_ids.num_bytes > 0


def test_an_encoder_pickles_without_what_it_remembers() -> None:
    encoder = Encoder(byte_level_bpe())
    episode = Episode("toy", "good or bad", (make_example("the film", "good"), make_example("a play", "bad")))
    encoded = encoder.encode_episode(episode)
    again = pickle.loads(pickle.dumps(encoder))
    assert again._query_ids.num_bytes == 0
    assert again.encode_episode(episode) == encoded
