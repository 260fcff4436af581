"""A closed label set as a trie of tokens, in which labels share their beginnings.

::

    good ⏎⏎            root ── good ──┬── ⏎⏎           the path of "good", its end included
    good film ⏎⏎                      └── film ── ⏎⏎
    bad ⏎⏎             root ── bad ── ⏎⏎

A token is read by the model only where something follows it, so the last tokens of labels are predicted, never read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

ROOT = 0
# Where all labels are scored, the nodes of a trie are read together and each is compared with all of them: past so many
# that costs more than a pass saves. Measured on a CPU with 2,000 labels: 2,048 nodes at once take 7 times as long.
NODES_READ_TOGETHER = 256


@dataclass(frozen=True)
class LabelTrie:
    """Labels as token paths, beginnings shared. Nodes are numbered so that parents come before their children.

    Attributes:
        tokens: Token of each node; the root has none and holds -1.
        parents: Parent of each node; of the root, itself.
        children: Token -> child of each node, in the order of the first label.
        labels: Numbers of the labels that end at each node; several only where labels are the same tokens.
        first_label: Smallest label number at or below each node; decides between equal scores.
    """

    tokens: list[int] = field(default_factory=lambda: [-1])
    parents: list[int] = field(default_factory=lambda: [ROOT])
    children: list[dict[int, int]] = field(default_factory=lambda: [{}])
    labels: list[list[int]] = field(default_factory=lambda: [[]])
    first_label: list[int] = field(default_factory=lambda: [0])

    @classmethod
    def of(cls, label_ids: Sequence[tuple[int, ...]], numbers: Sequence[int] | None = None) -> LabelTrie:
        """Build the trie of labels, each at least one token.

        Args:
            label_ids: Tokens of each label, end-of-answer text included.
            numbers: Number of each label; None for 0, 1, 2, …
        """
        trie = cls()
        for number, ids in sorted(zip(numbers or range(len(label_ids)), label_ids, strict=True)):
            node = ROOT
            for token in ids:
                child = trie.children[node].get(token)
                if child is None:
                    child = trie.children[node][token] = len(trie.tokens)
                    trie.tokens.append(token)
                    trie.parents.append(node)
                    trie.children.append({})
                    trie.labels.append([])
                    trie.first_label.append(number)
                node = child
            trie.labels[node].append(number)
        return trie

    @cached_property
    def inner_nodes(self) -> list[int]:
        """Nodes that the model reads to score all labels: those between the root and the last tokens."""
        return [node for node in range(1, len(self.tokens)) if self.children[node]]

    def chain(self, node: int) -> Iterator[int]:
        """Yield an inner node and the inner nodes below it for as long as there is no choice."""
        yield node
        while len(self.children[node]) == 1 and not self.labels[node]:
            (node,) = self.children[node].values()
            if not self.children[node]:
                break
            yield node


def tries_of(
    label_ids: Sequence[tuple[int, ...]], most_inner_nodes: int, numbers: Sequence[int] | None = None
) -> list[LabelTrie]:
    """Cut a label set into tries of so many inner nodes at most, so that each fits in memory together with its query.

    Labels that begin alike stay together, except across a cut, where their shared beginning is read twice. A single
    label longer than the limit is a trie of its own. ``numbers`` are as for `LabelTrie.of`.
    """
    whole = LabelTrie.of(label_ids, numbers)
    if len(whole.inner_nodes) <= most_inner_nodes:
        return [whole]
    ids_of = dict(zip(numbers or range(len(label_ids)), label_ids, strict=True))
    groups: list[list[int]] = []
    num_inner = most_inner_nodes + 1
    previous: tuple[int, ...] = ()
    for number, ids in sorted(ids_of.items(), key=lambda entry: entry[1]):
        added = len(ids) - 1 - num_shared_tokens(ids[:-1], previous[:-1])
        if num_inner + added > most_inner_nodes:
            groups.append([])
            num_inner, added = 0, len(ids) - 1
        groups[-1].append(number)
        num_inner += added
        previous = ids
    return [LabelTrie.of([ids_of[number] for number in group], group) for group in groups]


def num_shared_tokens(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two sequences begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
