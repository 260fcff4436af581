"""Packed = alone, in any order, behind any cut of the prefix; trees = paths."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from manyicl.engine import packing
from manyicl.engine.packing import ActivationBudget, QueriesInFlight, log_probabilities
from manyicl.engine.prefix_cache import extend_blocks, longer, shared_beginning
from manyicl.model.continuation import Block
from tests.builders import ARCHITECTURES, tiny_model
from tests.reference.slow_engine import full_pass_logits, plain_copy

NUM_PREFIX = 40


def assert_close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=5e-5)


def ids(num_tokens: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(97) for _ in range(num_tokens)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("num_prefix", [0, 1, NUM_PREFIX])
def test_packed_queries_score_as_each_alone_in_plain_transformers(architecture: str, num_prefix: int) -> None:
    model = tiny_model(architecture)
    plain = plain_copy(model)
    prefix = ids(num_prefix, 0)
    queries = [ids(length, i) for i, length in enumerate((3, 47, 31, 1, 3))]
    blocks = extend_blocks(model, (), prefix)
    with torch.no_grad():
        packed = QueriesInFlight(model, blocks, queries).read()
    for row, query in zip(packed, queries, strict=True):
        assert_close(row, full_pass_logits(plain, [*prefix, *query])[-1])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_tree_behind_packed_queries_scores_as_each_path_alone(architecture: str) -> None:
    """Nodes come in two passes, from some of the queries, with branches at the query and below."""
    model = tiny_model(architecture)
    plain = plain_copy(model)
    prefix = ids(NUM_PREFIX, 0)
    queries = [ids(length, i) for i, length in enumerate((5, 12, 7))]
    passes = [
        ([0, 0, 0, 2, 2], [11, 12, 13, 21, 22], [-1, 0, 0, -1, 0]),
        ([0, 0, 1, 2], [14, 15, 16, 23], [1, -1, -1, 1]),
        ([1, 1], [17, 18], [0, 0]),
    ]
    with torch.no_grad():
        flight = QueriesInFlight(model, extend_blocks(model, (), prefix), queries, num_later_slots=6)
        flight.read()
        paths: list[list[list[int]]] = [[], [], []]
        for query_numbers, tokens, parents in passes:
            logits = flight.follow(query_numbers, tokens, parents)
            for row, query, token, parent in zip(logits, query_numbers, tokens, parents, strict=True):
                path = [*(paths[query][parent] if parent >= 0 else []), token]
                paths[query].append(path)
                expected = full_pass_logits(plain, [*prefix, *queries[query], *path])[-1]
                assert_close(row, expected)


def test_tokens_that_were_forgotten_leave_no_trace() -> None:
    model = tiny_model("mistral")
    queries = [ids(5, 1), ids(5, 2)]
    with torch.no_grad():
        flight = QueriesInFlight(model, (), queries, num_later_slots=3)
        flight.read()
        flight.follow([0, 0, 0, 1], [1, 2, 3, 4], [-1, 0, 1, -1])
        flight.forget(0)
        again = flight.follow([0, 1], [7, 8], [-1, 0])
    plain = plain_copy(model)
    assert_close(again[0], full_pass_logits(plain, [*queries[0], 7])[-1])
    assert_close(again[1], full_pass_logits(plain, [*queries[1], 4, 8])[-1])


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("cuts", [(), (13,), (1, 2, 3, 30), (20, 39)])
def test_a_prefix_in_any_blocks_and_chunks_scores_as_one(architecture: str, cuts: tuple[int, ...]) -> None:
    model = tiny_model(architecture)
    prefix, query = ids(NUM_PREFIX, 0), ids(6, 1)
    whole = extend_blocks(model, (), prefix)
    blocks: tuple[Block, ...] = ()
    for start, end in zip((0, *cuts), (*cuts, NUM_PREFIX), strict=True):
        blocks = extend_blocks(model, blocks, prefix[start:end], chunk_tokens=7)
    with torch.no_grad():
        one = QueriesInFlight(model, whole, [query]).read()
        other = QueriesInFlight(model, blocks, [query]).read()
    assert_close(one, other)


def test_steps_that_grow_smaller_end_in_few_blocks_too() -> None:
    model = tiny_model()
    blocks: tuple[Block, ...] = ()
    for step in range(20, 0, -1):
        blocks = extend_blocks(model, blocks, ids(step, 0))
    assert blocks[-1].end == 210
    assert len(blocks) <= 8


def test_many_small_steps_end_in_few_blocks() -> None:
    model = tiny_model()
    blocks: tuple[Block, ...] = ()
    for token in ids(100, 0):
        blocks = extend_blocks(model, blocks, [token])
    assert len(blocks) <= 7
    assert [block.start for block in blocks] == [0, *(block.end for block in blocks[:-1])]


def test_a_shared_beginning_is_a_view_of_the_longer_prefix() -> None:
    model = tiny_model()
    blocks = longer(extend_blocks(model, (), ids(30, 0)), extend_blocks(model, (), ids(9, 1))[0])
    shared = shared_beginning(extend_blocks(model, (), ids(30, 0)), 12)
    assert shared[-1].end == 12
    parent = extend_blocks(model, (), ids(30, 0))
    (view,) = shared_beginning(parent, 12)
    assert view.keys[0].data_ptr() == parent[0].keys[0].data_ptr()
    assert shared_beginning(parent, 30) == parent
    assert blocks[0].num_tokens == 30


def test_chunks_hold_every_query_once_within_memory_and_hardly_pad() -> None:
    rng = random.Random(0)
    lengths = [int(rng.lognormvariate(3, 0.8)) + 1 for _ in range(256)]
    assert max(lengths) > 20 * min(lengths)
    later = [rng.choice([0, 3, 9]) for _ in lengths]
    memory = ActivationBudget(limit=60_000, per_token=100, per_logits=300, per_slot=40)
    chunks = list(memory.chunks(lengths, later))
    assert sorted(i for chunk in chunks for i in chunk) == list(range(256))
    padding = columns = 0
    for chunk in chunks:
        longest, deepest = max(lengths[i] for i in chunk), max(later[i] for i in chunk)
        tokens = sum(lengths[i] for i in chunk)
        slots = longest + deepest if deepest else 0
        used = tokens * 100 + len(chunk) * (300 + slots * 40 + deepest**2)
        assert used <= 60_000 or len(chunk) == 1
        padding += len(chunk) * longest - tokens
        columns += len(chunk) * longest
        assert len(chunk) * longest - tokens <= memory.most_padding * len(chunk) * longest
    assert padding < 0.1 * columns
    assert len(chunks) < 64


def test_where_padding_is_cheap_queries_of_many_lengths_advance_together() -> None:
    lengths = [4, 5, 6, 7, 7]
    budget = ActivationBudget(limit=60_000, per_token=100, per_logits=300, per_slot=40, most_padding=0.5)
    assert len(list(budget.chunks(lengths, [0] * 5))) == 1
    assert len(list(replace(budget, most_padding=0.1).chunks(lengths, [0] * 5))) > 1


def test_free_answers_of_queries_of_many_lengths_advance_together() -> None:
    budget = ActivationBudget(limit=60_000, per_token=100, per_logits=300, per_slot=40)
    lengths = [9, 10, 14, 20, 30, 32]
    assert len(list(budget.chunks(lengths, [20] * 6, in_line=True))) == 1
    assert len(list(budget.chunks(lengths, [20] * 6))) > 1


def test_on_a_gpu_queries_in_flight_may_use_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    for free, expected in ((2**30, 2**29), (80 * 2**30, 4 * 2**30), (0, 64 * 2**20)):
        monkeypatch.setattr(packing, "free_gpu_bytes", lambda device, free=free: free)
        monkeypatch.setattr(type(model), "device", torch.device("cuda"))
        budget = ActivationBudget.after(model, ())
        monkeypatch.undo()
        assert (budget.limit, budget.most_padding) == (expected, 0.5)


def test_log_probabilities_are_those_of_a_softmax() -> None:
    logits = torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
    expected = logits.log_softmax(-1)
    picked = log_probabilities(logits, [4, 0, 4], [3, 96, 0])
    assert picked == pytest.approx([float(expected[4, 3]), float(expected[0, 96]), float(expected[4, 0])], abs=1e-6)
