"""Log-probability of candidate answers behind a prefix and a query, each whole answer with its terminator.

All labels of a query share its keys, and labels that begin alike share their beginning: they are a trie, read behind
the query. The best label is found exactly without reading all of it. A log-probability only falls along a path, so a
path that has already fallen below the best finished label is left alone.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.label_trie import ROOT, LabelTrie
from manyicl.engine.packing import QueriesInFlight, WorkingMemory, log_probabilities
from manyicl.model.continuation import Block

# Up to so many inner nodes, all are read at once: a round more costs a pass over the weights, which these few tokens
# do not. docs/performance.md has the measurement.
FEW_INNER_NODES = 4

Wanted = Literal["best", "all"]
Strategy = Literal["best_first", "full_pass"]


@dataclass
class LabelSearch:
    """The search for one query's labels, through one trie after another.

    Attributes:
        tries: The label set, cut so that each trie fits in memory.
        prune: Whether only the best label is wanted, so that what cannot beat it is left alone.
        strategy: Read the likeliest nodes first, twice as many each round; or all of a trie at once.
        trie: The trie under way.
        scores: Label number -> log-probability in nats, of the labels that were finished.
        num_read: Tokens of labels that went through the model.
    """

    tries: Sequence[LabelTrie]
    prune: bool
    strategy: Strategy
    trie: LabelTrie = field(default_factory=LabelTrie)
    scores: dict[int, float] = field(default_factory=dict)
    num_read: int = 0
    _best: tuple[float, int] = (float("-inf"), 0)
    _node_scores: dict[int, float] = field(default_factory=dict)
    _open: list[tuple[float, int, int]] = field(default_factory=list)
    _num_rounds: int = 0
    _waiting: list[tuple[float, int, dict[int, float]]] = field(default_factory=list)

    def start(self, first_tokens: dict[int, float]) -> None:
        """Begin with the log-probability of every first token of a label."""
        for number, trie in enumerate(self.tries):
            scores = {node: first_tokens[trie.tokens[node]] for node in trie.children[ROOT]}
            self._waiting.append((max(scores.values()), number, scores))
        # The likeliest trie comes last, where it is taken from.
        self._waiting.sort(key=lambda entry: (entry[0], -entry[1]))

    @property
    def best(self) -> int:
        """Number of the best label; the first of equals."""
        return -self._best[1]

    def next_trie(self) -> bool:
        """Go on to the next trie; False if there is none."""
        if not self._waiting:
            return False
        _, number, scores = self._waiting.pop()
        self.trie = self.tries[number]
        self._node_scores = {}
        self._open = []
        self._num_rounds = 0
        for node, score in scores.items():
            self._reach(node, score)
        return True

    def take(self) -> list[int]:
        """Return the nodes to read in the next round, parents before children; none if this trie is done."""
        taken: list[int] = []
        if self.strategy == "full_pass":
            if self._open and self._worth(self._open[0]):
                taken = self.trie.inner_nodes
            self._open = []
            return taken
        for _ in range(2**self._num_rounds):
            if not self._open or not self._worth(self._open[0]):
                self._open = []
                break
            node = heapq.heappop(self._open)[2]
            # Where there is no choice, what follows is read in the same pass: the whole rest of most labels.
            taken.extend(self.trie.chain(node))
        self._num_rounds += 1
        return taken

    def learn(self, nodes: Sequence[int], child_scores: Sequence[Sequence[float]]) -> None:
        """Take in the log-probabilities of the children of nodes that were read, in the order of `take`."""
        read = set(nodes)
        self.num_read += len(nodes)
        for node, scores in zip(nodes, child_scores, strict=True):
            for child, score in zip(self.trie.children[node], scores, strict=True):
                self._reach(child, self._node_scores[node] + score, is_read=child in read)

    def _reach(self, node: int, score: float, is_read: bool = False) -> None:
        """Note the score of a path, finish the labels that end there, and open it if it goes on."""
        self._node_scores[node] = score
        for label in self.trie.labels[node]:
            self.scores[label] = score
            self._best = max(self._best, (score, -label))
        if self.trie.children[node] and not is_read:
            heapq.heappush(self._open, (-score, self.trie.first_label[node], node))

    def _worth(self, entry: tuple[float, int, int]) -> bool:
        """Tell whether a path may still hold the best label."""
        negative_score, first_label, _ = entry
        return not self.prune or not self.scores or (-negative_score, -first_label) > self._best


def strategy_for(tries: Sequence[LabelTrie], wanted: Wanted) -> Strategy:
    """Choose how a label set is searched: all of it at once where all is wanted or it is small."""
    few = len(tries) == 1 and len(tries[0].inner_nodes) <= FEW_INNER_NODES
    return "full_pass" if wanted == "all" or few else "best_first"


@torch.no_grad()
def score_labels(
    model: PreTrainedModel,
    prefix: Sequence[Block],
    queries: Sequence[tuple[int, ...]],
    label_tries: Sequence[Sequence[LabelTrie]],
    memory: WorkingMemory,
    wanted: Wanted = "all",
    strategy: Strategy | None = None,
) -> list[LabelSearch]:
    """Score the labels of queries behind a prefix.

    Args:
        model: In evaluation mode.
        prefix: Shared by all queries.
        queries: Encoded, up to where the answer begins.
        label_tries: Of each query, from `tries_of`.
        memory: Bounds how many queries advance together.
        wanted: Only the best label, or the scores of all.
        strategy: Overrules the choice between the two ways to search; the results are the same.

    Returns:
        One finished search per query.
    """
    searches = [LabelSearch(tries, wanted == "best", strategy or strategy_for(tries, wanted)) for tries in label_tries]
    most_inner = [max(len(trie.inner_nodes) for trie in tries) for tries in label_tries]
    for chunk in memory.chunks([len(query) for query in queries], most_inner):
        _search_together(
            QueriesInFlight(model, prefix, [queries[i] for i in chunk], max(most_inner[i] for i in chunk)),
            [searches[i] for i in chunk],
            memory,
        )
    return searches


def _search_together(flight: QueriesInFlight, searches: Sequence[LabelSearch], memory: WorkingMemory) -> None:
    """Read the queries, then round after round the nodes that their searches ask for."""
    firsts = [sorted({trie.tokens[n] for trie in search.tries for n in trie.children[ROOT]}) for search in searches]
    rows = [row for row, tokens in enumerate(firsts) for _ in tokens]
    scores = iter(log_probabilities(flight.read(), rows, [token for tokens in firsts for token in tokens]))
    for search, tokens in zip(searches, firsts, strict=True):
        search.start({token: next(scores) for token in tokens})
    waiting = list(range(len(searches)))
    numbers: list[dict[int, int]] = [{ROOT: -1} for _ in searches]  # node -> its number among a query's later tokens
    taken: dict[int, list[int]] = {}
    while waiting or taken:
        for query in waiting:
            # A trie that cannot hold the best label asks for nothing, and the next one is looked at.
            while searches[query].next_trie():
                flight.forget(query)
                numbers[query] = {ROOT: -1}
                if nodes := searches[query].take():
                    taken[query] = nodes
                    break
        _read_nodes(flight, searches, taken, numbers, memory)
        waiting = []
        for query in list(taken):
            taken[query] = searches[query].take()
            if not taken[query]:
                del taken[query]
                waiting.append(query)


def _read_nodes(
    flight: QueriesInFlight,
    searches: Sequence[LabelSearch],
    taken: dict[int, list[int]],
    numbers: list[dict[int, int]],
    memory: WorkingMemory,
) -> None:
    """Read one round of nodes, in as many passes as memory asks for, and tell the searches what follows them."""
    step = memory.tokens_per_pass(num_logits_per_token=1)
    asked = [(query, node) for query in sorted(taken) for node in taken[query]]
    learned: dict[int, list[list[float]]] = {query: [] for query in taken}
    for start in range(0, len(asked), step):
        part = asked[start : start + step]
        parents = []
        for query, node in part:
            parents.append(numbers[query][searches[query].trie.parents[node]])
            numbers[query][node] = len(numbers[query]) - 1
        logits = flight.follow(
            [query for query, _ in part],
            [searches[query].trie.tokens[node] for query, node in part],
            parents,
        )
        _collect(logits, part, searches, learned)
    for query, child_scores in learned.items():
        searches[query].learn(taken[query], child_scores)


def _collect(
    logits: Tensor,
    part: Sequence[tuple[int, int]],
    searches: Sequence[LabelSearch],
    learned: dict[int, list[list[float]]],
) -> None:
    """Pick the log-probabilities of the children of each node that was read."""
    children = [
        [searches[query].trie.tokens[child] for child in searches[query].trie.children[node]] for query, node in part
    ]
    rows = [row for row, tokens in enumerate(children) for _ in tokens]
    scores = iter(log_probabilities(logits, rows, [token for tokens in children for token in tokens]))
    for (query, _), tokens in zip(part, children, strict=True):
        learned[query].append([next(scores) for _ in tokens])
