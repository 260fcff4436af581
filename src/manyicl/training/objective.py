"""Which tokens are targets and what each weighs: all answers, the last one, or every token."""

from __future__ import annotations

from collections.abc import Sequence

from manyicl.episodes.episode import EncodedEpisode
from manyicl.training.recipe import ObjectiveSettings


def target_weights(episode: EncodedEpisode, objective: ObjectiveSettings) -> list[float]:
    """Return each token's weight as a target of the token before it, (T,); 0 where it is not supervised.

    ::

        tokens        <bos> query ⏎  answer ⏎⏎  query ⏎  answer ⏎⏎
        all_answers     0     0   0    1    1     0   0    1    1
        last_answer     0     0   0    0    0     0   0    1    1
        every_token     0     1   1    1    1     1   1    1    1

    The first token has nothing before it in its own episode and is never a target. With weighting by answer, an
    answer's weight of 1 is spread over its tokens, so that long summaries do not drown short labels.

    In the channel form an example is its label and then its query, and what counts as an answer here is the query: the
    loss is that of the query given the label, -log P(query | examples before, label).

    Source: He et al. 2025, arXiv:2506.11103, every answer as a target; last_answer, and the channel form, as in MetaICL
    (Min et al. 2022, arXiv:2110.15943).
    """
    others = 1.0 if objective.supervise == "every_token" else objective.context_weight
    weights = [others] * len(episode.token_ids)
    for start, end in supervised_spans(episode, objective):
        weight = 1 / (end - start) if objective.weighting == "answer" else 1.0
        weights[start:end] = [weight] * (end - start)
    weights[:1] = [0.0] * len(weights[:1])
    return weights


def supervised_spans(episode: EncodedEpisode, objective: ObjectiveSettings) -> Sequence[tuple[int, int]]:
    """Return the token ranges of the answers that count."""
    return episode.answer_spans[-1:] if objective.supervise == "last_answer" else episode.answer_spans
