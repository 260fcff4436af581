"""Tries hold the labels they were made of, and cutting them loses none."""

from __future__ import annotations

import random

import pytest

from manyicl.engine.label_trie import ROOT, LabelTrie, tries_of

AWKWARD = [(5, 9), (5, 6, 9), (5, 6, 6, 9), (7, 9), (7,), (5, 8, 9)]


def paths(trie: LabelTrie) -> dict[int, tuple[int, ...]]:
    """Label number -> tokens, walked from every node to the root."""
    found = {}
    for node, labels in enumerate(trie.labels):
        tokens: tuple[int, ...] = ()
        walk = node
        while walk != ROOT:
            tokens = (trie.tokens[walk], *tokens)
            walk = trie.parents[walk]
        found.update(dict.fromkeys(labels, tokens))
    return found


def random_labels(seed: int, num_labels: int, vocabulary: int = 6, most_tokens: int = 5) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    labels: dict[tuple[int, ...], None] = {}
    while len(labels) < num_labels:
        labels[tuple(rng.randrange(vocabulary) for _ in range(rng.randint(1, most_tokens)))] = None
    return list(labels)


def test_a_trie_holds_every_label_and_shares_beginnings() -> None:
    trie = LabelTrie.of(AWKWARD)
    assert paths(trie) == dict(enumerate(AWKWARD))
    assert len(trie.tokens) == 1 + len({label[: i + 1] for label in AWKWARD for i in range(len(label))})
    assert all(parent < node for node, parent in enumerate(trie.parents) if node)


def test_only_tokens_that_something_follows_are_read() -> None:
    assert [LabelTrie.of([(1,), (2,)]).inner_nodes, LabelTrie.of([(1, 2)]).inner_nodes] == [[], [1]]


def test_a_chain_ends_at_a_choice_a_label_or_before_a_last_token() -> None:
    trie = LabelTrie.of([(1, 2, 3, 4), (5, 6, 7), (5, 6, 8, 9)])
    one, five = trie.children[ROOT].values()
    assert [trie.tokens[node] for node in trie.chain(one)] == [1, 2, 3]
    assert [trie.tokens[node] for node in trie.chain(five)] == [5, 6]


def test_equal_labels_keep_both_numbers() -> None:
    trie = LabelTrie.of([(1, 2), (3,), (1, 2)])
    assert sorted(number for labels in trie.labels for number in labels) == [0, 1, 2]


@pytest.mark.parametrize("most", [4, 7, 23, 1000])
def test_cut_tries_hold_every_label_once_and_stay_within_the_limit(most: int) -> None:
    labels = random_labels(1, 150)
    tries = tries_of(labels, most)
    found: dict[int, tuple[int, ...]] = {}
    for trie in tries:
        assert len(trie.inner_nodes) <= most
        part = paths(trie)
        assert not found.keys() & part.keys()
        found.update(part)
    assert found == dict(enumerate(labels))


def test_a_label_longer_than_the_limit_is_a_trie_of_its_own() -> None:
    long = tuple(range(40))
    tries = tries_of([(1, 2), long, (3, 4)], 8)
    assert sorted(number for trie in tries for number in paths(trie)) == [0, 1, 2]
    assert any(list(paths(trie).values()) == [long] for trie in tries)
