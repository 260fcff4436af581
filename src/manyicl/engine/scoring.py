"""Log-probability of candidate answers after a prefix and a query, each whole answer with its end-of-answer text.

All labels of a query share its keys, and labels that begin alike share their beginning: they are a trie, decoded
after the query. The best label is found exactly without decoding all of it. A log-probability only falls along a path,
so a path that has already fallen below the best finished label is pruned; or below the second best, where the margin
between the two is wanted.
"""

from __future__ import annotations

import bisect
import heapq
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.backend import ScoreScope
from manyicl.engine.label_trie import ROOT, LabelTrie
from manyicl.engine.packing import ActivationBudget, QueriesInFlight, log_probabilities
from manyicl.model.continuation import Block

# A pass costs what so many tokens cost on top of those it reads, measured on a CPU (docs/performance.md): up to so many
# in all, reading every label of all queries at once costs no more than the second round that it may save.
TOKENS_WORTH_A_PASS = 20

Strategy = Literal["best_first", "full_pass"]
# How many of the best labels each scope needs; None for all.
_NUM_BEST: dict[ScoreScope, int | None] = {"best": 1, "best_two": 2, "all": None}
# Log-probability of a path, and whether its every token is the most probable of the whole vocabulary.
NodeScore = tuple[float, bool]
# Log-probabilities of a node's children, and the most probable token after it.
NodeRead = tuple[list[float], int]


@dataclass
class LabelSearch:
    """The search for one query's labels, through one trie after another.

    Attributes:
        tries: Tries of the label set, split so that each fits in memory.
        num_best: Number of the best labels that are needed, so that what cannot be among them is pruned; None for all.
        strategy: Decode the most probable nodes first, each round twice as many; or all of a trie at once.
        trie: Trie that is being searched.
        scores: Label number -> log-probability in nats, of the labels that were finished.
        greedy: Numbers of the finished labels whose every token is the most probable of the whole vocabulary.
        num_read: Tokens of labels that went through the model.
        number_of: Node of this trie -> its number among the tokens that follow the query; -1 for the root.
    """

    tries: Sequence[LabelTrie]
    num_best: int | None
    strategy: Strategy
    trie: LabelTrie = field(default_factory=LabelTrie)
    scores: dict[int, float] = field(default_factory=dict)
    greedy: set[int] = field(default_factory=set)
    num_read: int = 0
    number_of: dict[int, int] = field(default_factory=dict)
    _best: list[tuple[float, int]] = field(default_factory=list)
    _reached: dict[int, NodeScore] = field(default_factory=dict)
    _open: list[tuple[float, int, int]] = field(default_factory=list)
    _num_rounds: int = 0
    _waiting: list[tuple[float, int, dict[int, NodeScore]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._best = [(math.inf, sys.maxsize)] * (self.num_best or 1)

    def start(self, first_tokens: Mapping[int, float], argmax_token: int) -> None:
        """Begin with the log-probability of every first token of a label, and the most probable token of all."""
        for number, trie in enumerate(self.tries):
            firsts = trie.children[ROOT].items()
            scores = {node: (first_tokens[token], token == argmax_token) for token, node in firsts}
            best = max((score for score, _ in scores.values()), default=float("-inf"))
            self._waiting.append((best, number, scores))
        # The most probable trie comes last, where it is taken from.
        self._waiting.sort(key=lambda entry: (entry[0], -entry[1]))

    @property
    def best(self) -> int:
        """Number of the best label; the first of equals."""
        return self._best[0][1]

    def next_trie(self) -> bool:
        """Go on to the next trie; False if there is none."""
        if not self._waiting:
            return False
        _, number, scores = self._waiting.pop()
        self.trie = self.tries[number]
        self.number_of, self._reached, self._open, self._num_rounds = {ROOT: -1}, {}, [], 0
        for node, (score, is_greedy) in scores.items():
            self._reach(node, score, is_greedy)
        return True

    def take(self, first_width: int) -> list[int]:
        """Return the nodes to read in the next round, parents before children; none if this trie is done.

        Args:
            first_width: Tokens to read in the first round of a trie; each later one reads twice as many.
        """
        if self.strategy == "full_pass":
            taken = self.trie.inner_nodes if self._may_improve() else []
            self._open = []
            return taken
        taken = []
        while self._may_improve() and len(taken) < first_width * 2**self._num_rounds:
            # Where there is no choice, what follows is read in the same pass: the whole rest of most labels.
            taken.extend(self.trie.chain(heapq.heappop(self._open)[2]))
        self._num_rounds += 1
        return taken

    def learn(self, nodes: Sequence[int], read: Sequence[NodeRead]) -> None:
        """Take in what follows nodes that were read, in the order of `take`."""
        taken = set(nodes)
        self.num_read += len(nodes)
        for node, (child_scores, argmax_token) in zip(nodes, read, strict=True):
            before, was_greedy = self._reached[node]
            for (token, child), score in zip(self.trie.children[node].items(), child_scores, strict=True):
                is_greedy = was_greedy and token == argmax_token
                self._reach(child, before + score, is_greedy, is_read=child in taken)

    def _reach(self, node: int, score: float, is_greedy: bool, is_read: bool = False) -> None:
        """Note the score of a path, finish the labels that end there, and open it if it has children."""
        self._reached[node] = score, is_greedy
        for label in self.trie.labels[node]:
            self.scores[label] = score
            if (-score, label) < self._best[-1]:
                bisect.insort(self._best, (-score, label))
                self._best.pop()
            if is_greedy:
                self.greedy.add(label)
        if self.trie.children[node] and not is_read:
            heapq.heappush(self._open, (-score, self.trie.first_label[node], node))

    def _may_improve(self) -> bool:
        """Tell whether an open path may hold a label that is needed: any, or one better than the last of the best."""
        return bool(self._open) and (self.num_best is None or self._open[0][:2] < self._best[-1])


@torch.no_grad()
def score_labels(
    model: PreTrainedModel,
    prefix: Sequence[Block],
    queries: Sequence[tuple[int, ...]],
    label_tries: Sequence[Sequence[LabelTrie]],
    budget: ActivationBudget,
    scope: ScoreScope = "all",
    strategy: Strategy | None = None,
) -> list[LabelSearch]:
    """Score the labels of queries after a prefix.

    Args:
        model: Model in evaluation mode.
        prefix: Shared by all queries.
        queries: Encoded, up to where the answer begins.
        label_tries: Of each query, from `tries_of`.
        budget: Bounds how many queries advance together.
        scope: Only the best label, the best two, or the scores of all.
        strategy: Overrules the choice between the two ways to search; the results are the same.

    Returns:
        One finished search per query.
    """
    sizes_of = {id(tries): [len(trie.inner_nodes) for trie in tries] for tries in label_tries}
    sizes = [sizes_of[id(tries)] for tries in label_tries]
    found: dict[int, LabelSearch] = {}
    for chunk in budget.chunks([len(query) for query in queries], [max(own) for own in sizes]):
        reads_all = scope == "all" or sum(sum(sizes[i]) for i in chunk) <= TOKENS_WORTH_A_PASS
        chosen = strategy or ("full_pass" if reads_all else "best_first")
        searches = [LabelSearch(label_tries[i], _NUM_BEST[scope], chosen) for i in chunk]
        flight = QueriesInFlight(model, prefix, [queries[i] for i in chunk], max(max(sizes[i]) for i in chunk))
        _search_together(flight, searches, budget)
        found.update(zip(chunk, searches, strict=True))
    return [found[i] for i in range(len(queries))]


@torch.no_grad()
def score_continuations(
    model: PreTrainedModel,
    prefix: Sequence[Block],
    queries: Sequence[tuple[int, ...]],
    continuations: Sequence[tuple[int, ...]],
    budget: ActivationBudget,
) -> list[NodeScore]:
    """Score one continuation of each query: read with it in one pass, where a trie of one label would take two.

    Args:
        model: Model in evaluation mode.
        prefix: Shared by all queries.
        queries: Each at least one token.
        continuations: One for each query, at least one token.
        budget: Bounds how many queries advance together, and with them the logits of their continuations.

    Returns:
        For each query the log-probability of its continuation, and whether greedy decoding would have written it.
    """
    # The last token is predicted, never read.
    lines = [(*query, *ids[:-1]) for query, ids in zip(queries, continuations, strict=True)]
    num_logits = [len(ids) for ids in continuations]
    found: dict[int, NodeScore] = {}
    for chunk in budget.chunks([len(line) for line in lines], [0] * len(lines), num_logits=num_logits):
        flight = QueriesInFlight(model, prefix, [lines[i] for i in chunk])
        ends = flight.lengths.cumsum().tolist()
        keep = [place for i, end in zip(chunk, ends, strict=True) for place in range(end - num_logits[i], end)]
        tokens = [token for i in chunk for token in continuations[i]]
        logits = flight.read(keep)
        scores = iter(log_probabilities(logits, range(len(tokens)), tokens))
        argmax_tokens = iter(logits.argmax(dim=-1).tolist())
        for i in chunk:
            log_probability = sum(islice(scores, num_logits[i]))
            found[i] = log_probability, list(islice(argmax_tokens, num_logits[i])) == list(continuations[i])
    return [found[i] for i in range(len(queries))]


def _search_together(flight: QueriesInFlight, searches: Sequence[LabelSearch], budget: ActivationBudget) -> None:
    """Prefill the queries, then decode round after round the nodes that their searches take."""
    # Most queries share their labels, and with them a list of thousands of tries.
    of_tries = {id(search.tries): search.tries for search in searches}
    first_of = {key: sorted({t for trie in tries for t in trie.children[ROOT]}) for key, tries in of_tries.items()}
    firsts = [first_of[id(search.tries)] for search in searches]
    for search, tokens, (scores, argmax_token) in zip(searches, firsts, _read_off(flight.read(), firsts), strict=True):
        search.start(dict(zip(tokens, scores, strict=True)), argmax_token)
    waiting = set(range(len(searches)))
    taken: dict[int, list[int]] = {}
    while waiting or taken:
        # With few queries in flight each reads more of its trie at a time, at little cost compared with the pass.
        width = max(1, TOKENS_WORTH_A_PASS // (len(waiting) + len(taken)))
        for query in sorted(waiting):
            # A trie that cannot hold the best label asks for nothing, and the next one is looked at.
            while searches[query].next_trie():
                flight.forget(query)
                if nodes := searches[query].take(width):
                    taken[query] = nodes
                    break
        _read_nodes(flight, searches, taken, budget)
        taken = {query: searches[query].take(width) for query in taken}
        waiting = {query for query, nodes in taken.items() if not nodes}
        taken = {query: nodes for query, nodes in taken.items() if nodes}


def _read_nodes(
    flight: QueriesInFlight, searches: Sequence[LabelSearch], taken: Mapping[int, list[int]], budget: ActivationBudget
) -> None:
    """Decode one round of nodes, in as many passes as the budget requires, and pass on to the searches what follows."""
    step = budget.tokens_per_pass(num_logits_per_token=1)
    pairs = [(query, node) for query in sorted(taken) for node in taken[query]]
    learned: dict[int, list[NodeRead]] = {query: [] for query in taken}
    for start in range(0, len(pairs), step):
        part = pairs[start : start + step]
        tokens, parents, children = [], [], []
        for query, node in part:
            trie, number_of = searches[query].trie, searches[query].number_of
            tokens.append(trie.tokens[node])
            parents.append(number_of[trie.parents[node]])
            children.append(list(trie.children[node]))
            number_of[node] = len(number_of) - 1
        logits = flight.follow([query for query, _ in part], tokens, parents)
        for (query, _), read in zip(part, _read_off(logits, children), strict=True):
            learned[query].append(read)
    for query, reads in learned.items():
        searches[query].learn(taken[query], reads)


def _read_off(logits: Tensor, tokens: Sequence[Sequence[int]]) -> list[NodeRead]:
    """Return the log-probabilities of some tokens of each row of logits, (S, V), and each row's most probable token."""
    rows = [row for row, some in enumerate(tokens) for _ in some]
    scores = iter(log_probabilities(logits, rows, [token for some in tokens for token in some]))
    argmax_token = logits.argmax(dim=-1).tolist()
    return [([next(scores) for _ in some], best) for some, best in zip(tokens, argmax_token, strict=True)]
