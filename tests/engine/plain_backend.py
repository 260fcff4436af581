"""A whole backend without torch, in a few lines: a made-up network, recomputed from the tokens alone."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import exp, log

from manyicl.engine.backend import (
    BetweenChunks,
    GeneratedToken,
    Identity,
    OptionScores,
    Prefix,
    Sampling,
    ScoreScope,
    SharedTokens,
    Stop,
    TokenIds,
)


class PlainBackend:
    """The log-probability of a token follows from the three before it."""

    def __init__(self, num_tokens: int, name: str = "plain") -> None:
        self.identity = Identity(name, "", "float64", reference=name, max_context_tokens=400)
        self.num_tokens = num_tokens
        self.log_probabilities = lru_cache(None)(self._log_probabilities)

    def _log_probabilities(self, last: TokenIds) -> list[float]:
        logits = random.Random(f"{self.identity.fingerprint} {last}").choices(range(9), k=self.num_tokens)
        total = log(sum(map(exp, logits)))
        return [logit - total for logit in logits]

    def log_probability(self, before: Sequence[int], answer: Sequence[int]) -> float:
        ids = (*before, *answer)
        return sum(self.log_probabilities(tuple(ids[max(0, i - 3) : i]))[ids[i]] for i in range(len(before), len(ids)))

    def prefill(
        self, token_ids: Sequence[int], reuse: Prefix | None = None, *, between_chunks: BetweenChunks | None = None
    ) -> Prefix:
        return SharedTokens(self.identity, tuple(token_ids))

    def score(
        self, prefix: Prefix, queries: Sequence[TokenIds], options: Sequence[Sequence[TokenIds]], scope: ScoreScope
    ) -> list[OptionScores]:
        found = []
        for query, own in zip(queries, options, strict=True):
            scores = {i: self.log_probability((*prefix.token_ids, *query), option) for i, option in enumerate(own)}
            found.append(OptionScores(scores, max(scores, key=lambda i: (scores[i], -i))))
        return found

    def generate(
        self,
        prefix: Prefix,
        queries: Sequence[TokenIds],
        stop: Stop,
        max_tokens: int,
        sampling: Sampling | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[GeneratedToken]:
        for number, query in enumerate(queries):
            answer: list[int] = []
            while True:
                scores = self.log_probabilities((*prefix.token_ids, *query, *answer)[-3:])
                answer.append(max(range(self.num_tokens), key=scores.__getitem__))
                ended = stop.ended(answer)
                is_last = ended or len(answer) == max_tokens
                yield GeneratedToken(number, answer[-1], scores[answer[-1]], ended, is_last)
                if is_last:
                    break
