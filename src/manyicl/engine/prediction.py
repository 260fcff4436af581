"""What an engine answers to a query, whole or as it is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from manyicl.engine.label_scores import LabelScores
from manyicl.errors import UserError
from manyicl.tasks.task import Example


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer to one query.

    Attributes:
        answer: The best label or choice, or the generated text without its end-of-answer text.
        log_probability: Log-probability of the answer with its end-of-answer text, in nats; in the channel form, of the
            query after the answer.
        scores: Scores of every label or choice, where all were wanted, and always in the channel form; None otherwise,
            and for free answers.
        second: The second best label or choice, where the best two or all scores were wanted; None otherwise, and where
            there is one.
        margin: Log-probability of the answer less that of the second best, in nats; None where that is.
        stopped: False if a generated answer was cut at the limit.
        abstained: True if the answer's probability among the labels was below the given threshold.
        num_shots: Number of demonstrations before the query that all queries share.
        blended: True if ``answer`` and ``scores`` are those of the model's scores and a linear classifier's, combined;
            ``log_probability`` is the model's alone.
        problem: Why there is no answer, where bad rows are reported; ``answer`` is then empty, and
            ``log_probability`` not a number.
        similar: Demonstrations in the context that are most like the query, the most similar first, where they were
            wanted; None otherwise.

    Examples:
        >>> prediction = Prediction("good", -0.25, num_shots=4)
        >>> prediction.answer, prediction.num_shots
        ('good', 4)
        >>> sorted(prediction.as_json())
        ['abstained', 'answer', 'blended', 'log_probability', 'num_shots', 'stopped']
    """

    answer: str
    log_probability: float
    scores: LabelScores | None = None
    second: str | None = None
    margin: float | None = None
    stopped: bool = True
    abstained: bool = False
    num_shots: int = 0
    blended: bool = False
    problem: UserError | None = None
    similar: tuple[Example, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the prediction as JSON holds it; the answer is null where it abstained."""
        names = ("answer", "log_probability", "stopped", "abstained", "num_shots", "blended")
        known: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.problem is not None:
            return {**dict.fromkeys(names), "problem": str(replace(self.problem, file=None, row=None))}
        if self.abstained:
            known["answer"] = None
        if self.second is not None:
            known |= {"second": self.second, "margin": self.margin}
        if self.scores is not None:
            known |= {"scores": dict(self.scores.log_probabilities), "probabilities": self.scores.probabilities}
        if self.similar is not None:
            known["similar"] = [{"text": example.query.text, "answer": example.answer} for example in self.similar]
        return known


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """The next text of a free answer that is being written.

    Attributes:
        row: Number of the row among those given, from 1.
        text: Text that follows the parts before it; the parts of a row together are its answer.
        prediction: The whole answer, with the last part of a row; None before.
    """

    row: int
    text: str
    prediction: Prediction | None = None
