"""What follows from the log-probabilities of all labels: probabilities, margin, and corrected comparisons."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from manyicl.errors import UserError

# Up to so many labels all of them are scored by default where probabilities are of use.
MOST_LABELS_SCORED = 32


@dataclass(frozen=True)
class LabelScores:
    """Scores of every label or choice of a query.

    Attributes:
        log_probabilities: Label -> log-probability in nats, its end included, in the order of the task's labels.
        num_tokens: Label -> number of its tokens, its end included.
    """

    log_probabilities: Mapping[str, float]
    num_tokens: Mapping[str, int]

    @property
    def best(self) -> str:
        """The label with the highest score; the first of equals."""
        return max(self.log_probabilities, key=lambda label: self.log_probabilities[label])

    @property
    def second(self) -> str | None:
        """The label with the highest score but the best, the first of equals; None where there is one label."""
        others = [label for label in self.log_probabilities if label != self.best]
        return max(others, key=lambda label: self.log_probabilities[label], default=None)

    @cached_property
    def probabilities(self) -> dict[str, float]:
        """Label -> probability among the labels; they sum to 1."""
        highest = max(self.log_probabilities.values())
        weights = {label: math.exp(score - highest) for label, score in self.log_probabilities.items()}
        total = sum(weights.values())
        return {label: weight / total for label, weight in weights.items()}

    @property
    def margin(self) -> float:
        """Nats between the best label and the next; infinite where there is one label."""
        best, *others = sorted(self.log_probabilities.values(), reverse=True)
        return best - others[0] if others else math.inf

    def per_token(self) -> LabelScores:
        """Divide each score by the label's tokens, so that long labels are not held back by their length.

        Source: Brown et al. 2020, arXiv:2005.14165, section 2.4.
        """
        scores = {label: score / self.num_tokens[label] for label, score in self.log_probabilities.items()}
        return LabelScores(scores, self.num_tokens)

    def corrected(self, prior: LabelScores) -> LabelScores:
        """Take away what each label scores without a query, from `manyicl.engine.engine.Engine.prior`.

        Raises:
            UserError: If the prior is of other labels.

        Source: Zhao et al. 2021, *Calibrate Before Use*, arXiv:2102.09690, in log space; Holtzman et al. 2021,
        arXiv:2104.08315.
        """
        if set(prior.log_probabilities) != set(self.log_probabilities):
            raise UserError("foreign_prior", "the prior is of other labels", remedy="Compute it after the same prefix.")
        scores = {label: score - prior.log_probabilities[label] for label, score in self.log_probabilities.items()}
        return LabelScores(scores, self.num_tokens)


def mean_scores(scores: Sequence[LabelScores]) -> LabelScores:
    """Average the probability of each label over several queries, as the log of the mean.

    Raises:
        UserError: If there are none, or they are of different labels.
    """
    if not scores or any(set(one.log_probabilities) != set(scores[0].log_probabilities) for one in scores):
        raise UserError("foreign_prior", "a prior is the mean of one label set over at least one query")
    means = {}
    for label in scores[0].log_probabilities:
        values = [one.log_probabilities[label] for one in scores]
        highest = max(values)
        means[label] = highest + math.log(sum(math.exp(value - highest) for value in values) / len(values))
    return LabelScores(means, scores[0].num_tokens)
