"""The channel form: a label is scored by the log-probability of the query after it.

::

    direct     prefix │ query ⏎ │ label ⏎⏎      log P(label | examples, query)
    channel    prefix │ label ⏎ │ query ⏎⏎      log P(query | examples, label)

A query costs one continuation for each of its labels, each as long as label and query together: another label changes
how every token of the query is predicted, so nothing but the prefix is shared. All scores of a query are of the same
tokens, so they are compared as sums; there is no length to normalise by. Where labels are equally likely beforehand,
the softmax of the scores is P(label | query), by Bayes' rule.

Source: Min et al. 2021, arXiv:2108.04106; Min et al. 2022, arXiv:2110.15943.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from manyicl.engine.backend import Backend, OptionScores, Prefix, TokenIds
from manyicl.engine.queries import EncodedQuery
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.errors import UserError
from manyicl.tasks.task import Example, Task


def score_channel(backend: Backend, prefix: Prefix, queries: Sequence[EncodedQuery]) -> list[OptionScores]:
    """Score all options of each query by the log-probability of the query after them.

    Args:
        backend: Made the prefix.
        prefix: Instruction and demonstrations, each a label and its query.
        queries: Queries, encoded in the channel form.

    Returns:
        For each query the log-probability of its tokens after each of its options, in nats.
    """
    before = [(*query.own_ids, *option) for query in queries for option in query.option_ids]
    after: list[Sequence[TokenIds]] = []
    for query in queries:
        after += [(query.token_ids,)] * len(query.option_ids)
    each = iter(backend.score(prefix, before, after, "all"))
    found = []
    for query in queries:
        scores = {n: one.log_probabilities[0] for n, one in enumerate(islice(each, len(query.option_ids)))}
        found.append(OptionScores(scores, min(scores, key=lambda n: (-scores[n], n))))
    return found


def scores_before_shown(
    backend: Backend,
    prefix: Prefix,
    encoder: Encoder,
    task: Task,
    demonstrations: Sequence[Example],
    positions: Iterable[int],
) -> list[dict[str, float]]:
    """Score the labels or choices of demonstrations of a prefix, each given those before it, whose keys are reused."""
    instruction = task.instruction()
    spans = encoder.encode_episode(Episode(task.name, instruction, tuple(demonstrations))).answer_spans
    found = []
    for shot in positions:
        example, preceding, (start, end) = demonstrations[shot], encoder.preceding(instruction, shot), spans[shot]
        options = example.query.choices or task.labels or ()
        option_ids = tuple(encoder.answer_ids(option, preceding) for option in options)
        own = encoder.answer_ids(example.answer, preceding)
        before = backend.prefill(prefix.token_ids[: start - len(own)], prefix)
        query = EncodedQuery(example.query, preceding, prefix.token_ids[start:end], option_ids)
        (scores,) = score_channel(backend, before, [query])
        found.append({option: scores.log_probabilities[n] for n, option in enumerate(options)})
    return found


def refused_in_channel_form(what: str, remedy: str | None = None) -> UserError:
    """Make the error for what a model in the channel form does not do; ``what`` begins a sentence."""
    return UserError("not_in_channel_form", f"{what}, and this model is used in the channel form", remedy=remedy)
