"""The trie = one label at a time; best-first = exhaustive; ties fall to the first label."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedModel

from manyicl.engine.backend import OptionScores, ScoreScope
from manyicl.engine.label_trie import tries_of
from manyicl.engine.packing import ActivationBudget
from manyicl.engine.prefix_cache import extend_blocks
from manyicl.engine.scoring import LabelSearch, Strategy, score_labels
from manyicl.model.continuation import Block
from tests.builders import ARCHITECTURES, tiny_model
from tests.engine.test_label_trie import AWKWARD, random_labels
from tests.reference.slow_engine import plain_copy, slow_greedy, slow_score

QUERIES = [(3, 4, 5), (6,), (7, 8, 9, 10, 11, 12)]
SCOPES: tuple[ScoreScope, ...] = ("best", "best_two", "all")
STRATEGIES: tuple[Strategy, ...] = ("best_first", "full_pass")
BUDGET = ActivationBudget(limit=10**9, per_token=100, per_logits=300, per_slot=40)
PREFIX = [random.Random(0).randrange(97) for _ in range(30)]


def sharpened(architecture: str = "llama", factor: float = 1.0, seed: int = 0) -> tuple[PreTrainedModel, list[int]]:
    """A random model whose predictions are as sharp as ``factor`` says."""
    model = tiny_model(architecture, seed=seed)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(factor)
    return model, PREFIX


def slow_scores(model: PreTrainedModel, labels: Sequence[tuple[int, ...]]) -> list[list[float]]:
    plain = plain_copy(model)
    return [[slow_score(plain, [*PREFIX, *query], label) for label in labels] for query in QUERIES]


def search(
    model: PreTrainedModel,
    blocks: Sequence[Block],
    labels: Sequence[tuple[int, ...]],
    scope: ScoreScope,
    most_inner_nodes: int = 10_000,
    strategy: Strategy | None = None,
    budget: ActivationBudget = BUDGET,
) -> list[LabelSearch]:
    tries = tries_of(labels, most_inner_nodes)
    return score_labels(model, blocks, QUERIES, [tries] * len(QUERIES), budget, scope, strategy)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_label_scores_as_alone_and_the_best_is_found(architecture: str) -> None:
    model, prefix = sharpened(architecture)
    blocks = extend_blocks(model, (), prefix)
    expected = slow_scores(model, AWKWARD)
    everything = search(model, blocks, AWKWARD, "all")
    best_first = search(model, blocks, AWKWARD, "best", strategy="best_first")
    for found, best, slow in zip(everything, best_first, expected, strict=True):
        assert [found.scores[i] for i in range(len(AWKWARD))] == pytest.approx(slow, rel=1e-5, abs=1e-4)
        assert found.best == best.best == slow.index(max(slow))
        assert found.greedy >= best.greedy
        assert best.scores[best.best] == pytest.approx(max(slow), rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("factor", [0.0, 0.02, 0.3, 1.0, 4.0])
@pytest.mark.parametrize("seed", range(4))
def test_best_first_finds_what_reading_everything_finds(seed: int, factor: float) -> None:
    """Over flat and sharp models, 150 labels with shared beginnings, one beginning another, single tokens."""
    model, prefix = sharpened(factor=factor, seed=seed)
    blocks = extend_blocks(model, (), prefix)
    labels = random_labels(seed, 150)
    everything = search(model, blocks, labels, "all")
    for most_inner_nodes in (10_000, 9):
        best_first = search(model, blocks, labels, "best", most_inner_nodes, strategy="best_first")
        full_pass = search(model, blocks, labels, "best", most_inner_nodes, strategy="full_pass")
        for found, best, full in zip(everything, best_first, full_pass, strict=True):
            assert best.best == full.best == found.best
            assert best.scores[best.best] == pytest.approx(found.scores[found.best], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize(("seed", "factor"), [(0, 0.0), (1, 0.3), (2, 1.0), (0, 4.0)])
def test_the_best_two_are_those_of_all_scored_one_at_a_time(seed: int, factor: float) -> None:
    model, prefix = sharpened(factor=factor, seed=seed)
    blocks = extend_blocks(model, (), prefix)
    labels = random_labels(seed, 60)
    for slow, *searches in zip(
        slow_scores(model, labels),
        *(search(model, blocks, labels, "best_two", most, strategy="best_first") for most in (10_000, 9)),
        strict=True,
    ):
        best, second = sorted(slow, reverse=True)[:2]
        for found in searches:
            scores = OptionScores(found.scores, found.best)
            assert scores.second is not None
            # Where several labels score alike, rounding decides between them; their scores are the same.
            assert slow[scores.best] == pytest.approx(best, abs=1e-4)
            assert slow[scores.second] == pytest.approx(second, abs=1e-4)
            margin = found.scores[scores.best] - found.scores[scores.second]
            assert margin == pytest.approx(best - second, abs=2e-4)


def test_the_second_of_equals_is_the_next_and_one_label_has_none() -> None:
    model, prefix = sharpened(factor=0.0)
    blocks = extend_blocks(model, (), prefix)
    for most_inner_nodes, strategy in itertools.product((100, 1), STRATEGIES):
        for found in search(model, blocks, [(1, 2, 3), (9, 4), (2, 4), (3, 4)], "best_two", most_inner_nodes, strategy):
            assert OptionScores(found.scores, found.best).second == 2
        (alone, *_) = search(model, blocks, [(1, 2, 3)], "best_two", most_inner_nodes, strategy)
        assert OptionScores(alone.scores, alone.best).second is None


def test_the_best_two_read_more_than_the_best_and_less_than_all() -> None:
    model, prefix = sharpened(factor=4.0)
    blocks = extend_blocks(model, (), prefix)
    labels = random_labels(3, 150, vocabulary=90)
    best, two, everything = (
        sum(one.num_read for one in search(model, blocks, labels, scope)) for scope in ("best", "best_two", "all")
    )
    assert best <= two < 0.5 * everything


def test_a_sharp_model_reads_a_small_part_of_the_trie() -> None:
    model, prefix = sharpened(factor=4.0)
    blocks = extend_blocks(model, (), prefix)
    labels = random_labels(3, 150, vocabulary=90)
    everything, best_first = search(model, blocks, labels, "all"), search(model, blocks, labels, "best")
    assert sum(one.num_read for one in best_first) < 0.2 * sum(one.num_read for one in everything)


def test_equal_scores_fall_to_the_first_label_however_they_are_searched() -> None:
    model, prefix = sharpened(factor=0.0)
    blocks = extend_blocks(model, (), prefix)
    for labels in ([(9, 4), (2, 4), (3, 4)], [(2, 4), (9, 4), (3, 4)], [(1, 2, 3), (7, 4), (1, 4)]):
        shortest = min(len(label) for label in labels)
        first = next(i for i, label in enumerate(labels) if len(label) == shortest)
        for most_inner_nodes, strategy in itertools.product((100, 1), STRATEGIES):
            for scope in SCOPES:
                found = search(model, blocks, labels, scope, most_inner_nodes, strategy)
                assert [one.best for one in found] == [first] * len(QUERIES)


@pytest.mark.parametrize("limit", [1, 2_000, 20_000])
def test_passes_of_any_size_give_the_same_scores(limit: int) -> None:
    model, prefix = sharpened("gemma2")
    blocks = extend_blocks(model, (), prefix)
    labels = random_labels(5, 40)
    small = ActivationBudget(limit=limit, per_token=100, per_logits=300, per_slot=40)
    for one, other in zip(
        search(model, blocks, labels, "all"), search(model, blocks, labels, "all", budget=small), strict=True
    ):
        assert one.scores == pytest.approx(other.scores, rel=1e-5, abs=1e-4)


def test_each_query_may_have_labels_of_its_own() -> None:
    model, prefix = sharpened("qwen2")
    blocks = extend_blocks(model, (), prefix)
    label_sets: list[list[tuple[int, ...]]] = [[(1, 2), (3,)], [(4, 5, 6)], random_labels(1, 30)]
    found = score_labels(model, blocks, QUERIES, [tries_of(labels, 100) for labels in label_sets], BUDGET)
    plain = plain_copy(model)
    for one, query, labels in zip(found, QUERIES, label_sets, strict=True):
        slow = [slow_score(plain, [*PREFIX, *query], label) for label in labels]
        assert [one.scores[i] for i in range(len(labels))] == pytest.approx(slow, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("number", [3_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_labels_are_searched_in_pieces(number: int) -> None:
    model, prefix = sharpened(factor=2.0)
    blocks = extend_blocks(model, (), prefix)
    labels = random_labels(7, number, vocabulary=90, most_tokens=4)
    (best, *_) = search(model, blocks, labels, "best", 200)
    plain = plain_copy(model)
    expected = slow_score(plain, [*PREFIX, *QUERIES[0]], labels[best.best])
    assert best.scores[best.best] == pytest.approx(expected, rel=1e-5, abs=1e-4)
    (everything, *_) = search(model, blocks, labels, "all", 200)
    assert len(everything.scores) == number
    assert everything.best == best.best


@pytest.mark.parametrize("seed", range(3))
def test_labels_that_greedy_decoding_would_write_are_told(seed: int) -> None:
    model, prefix = sharpened(seed=seed)
    blocks = extend_blocks(model, (), prefix)
    plain = plain_copy(model)
    (query, *_) = QUERIES
    written, _ = slow_greedy(plain, [*prefix, *query], lambda answer: False, 4)
    labels = [tuple(written), tuple(written[:2]), (*written[:3], written[3] + 1), (written[0] + 1,)]
    (found, *_) = search(model, blocks, labels, "all")
    assert found.greedy == {0, 1}


def test_labels_without_any_probability_fall_to_the_first() -> None:
    search = LabelSearch(tries_of([(1,), (2, 3)], 10), True, "best_first")
    search.start({1: float("-inf"), 2: float("-inf")}, argmax_token=7)
    assert search.next_trie()
    while nodes := search.take(1):
        search.learn(nodes, [([float("-inf")] * len(search.trie.children[node]), 7) for node in nodes])
    assert search.best == 0
    assert search.scores[search.best] == float("-inf")
