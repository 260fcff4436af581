"""Which columns `manyicl predict` adds to a row: the answer, how sure it is, and what else was wanted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from manyicl.cli.answers import Row
from manyicl.engine.queries import has_few_labels
from manyicl.errors import UserError

if TYPE_CHECKING:
    from manyicl.engine.backend import ScoreScope
    from manyicl.engine.prediction import Prediction
    from manyicl.engine.queries import AnswerOptions
    from manyicl.tasks.task import Task


@dataclass(frozen=True)
class AnswerColumns:
    """Which columns answers get.

    Attributes:
        has_probability: Probability of the answer, the second best and its probability.
        may_be_blended: Whether answer and probabilities are a blend.
        has_margin: The second best and the margin, where probabilities would need the scores of many labels.
        has_scores: Scores of all labels.
        may_abstain: Whether it abstained, and what it would have answered.
        may_have_problems: Why there is no answer.
        score_labels: Labels of which each gets a column of its own; None for one column with the scores of all.
        has_similar: The demonstrations most like the query.
    """

    has_probability: bool
    may_be_blended: bool
    has_margin: bool
    has_scores: bool
    may_abstain: bool
    may_have_problems: bool
    score_labels: tuple[str, ...] | None
    has_similar: bool

    @classmethod
    def of(cls, task: Task, has_scores: bool, how: AnswerOptions, is_csv: bool) -> Self:
        """Choose the columns for a task; probabilities need the scores of all labels, which many labels make slow.

        Raises:
            UserError: If scores are wanted of free answers.
        """
        may_abstain, may_have_problems = how.get("abstain_below") is not None, how.get("bad_rows") == "report"
        if (has_scores or may_abstain) and not task.is_closed:
            option = "--scores" if has_scores else "--abstain-below"
            what = f"{option} needs labels, and task {task.name!r} has free answers"
            raise UserError("conflicting_options", what, remedy=f"Leave out {option}.", field=option)
        has_probability = has_few_labels(task) or has_scores or may_abstain
        has_margin = task.is_closed and not has_probability
        score_labels = task.labels if is_csv else None
        has_similar = how.get("num_similar", 0) > 0
        return cls(
            has_probability=has_probability,
            may_be_blended=how.get("blend", False),
            has_margin=has_margin,
            has_scores=has_scores,
            may_abstain=may_abstain,
            may_have_problems=may_have_problems,
            score_labels=score_labels,
            has_similar=has_similar,
        )

    @property
    def scope(self) -> ScoreScope:
        """Which labels have to be scored."""
        return "all" if self.has_probability else "best_two" if self.has_margin else "best"

    def columns(self, prediction: Prediction) -> Row:
        """Turn a prediction into the columns of an output row."""
        known = prediction.as_json()
        probabilities = prediction.scores.probabilities if prediction.scores else {}
        columns: Row = {"answer": known["answer"]}
        if self.has_probability:
            second = prediction.second
            columns["probability"] = round(probabilities[prediction.answer], 4) if probabilities else None
            columns["second"] = second
            columns["second_probability"] = None if second is None else round(probabilities[second], 4)
        if self.has_margin:
            columns["second"] = prediction.second
            columns["margin"] = None if prediction.margin is None else round(prediction.margin, 6)
        columns["log_probability"] = None if prediction.problem else round(prediction.log_probability, 6)
        columns["stopped"] = known["stopped"]
        if self.may_be_blended:
            columns["blended"] = known["blended"]
        if self.may_abstain:
            columns["abstained"] = known["abstained"]
            columns["guess"] = prediction.answer if prediction.abstained else None
        if self.has_scores and self.score_labels is not None:
            four_digits = {label: f"{probability:.4f}" for label, probability in probabilities.items()}
            columns |= {f"score:{label}": four_digits.get(label) for label in self.score_labels}
        elif self.has_scores:
            columns |= {name: known.get(name) for name in ("scores", "probabilities")}
        if self.has_similar:
            columns["similar"] = known.get("similar")
        if self.may_have_problems:
            columns["problem"] = known.get("problem")
        return columns
