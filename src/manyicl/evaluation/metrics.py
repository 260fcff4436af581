"""Prediction, references -> score. Every score lies in [0, 1] and more is better."""

from __future__ import annotations

import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache, partial
from statistics import fmean
from types import SimpleNamespace
from typing import Any

import regex  # type: ignore[import-untyped]

from manyicl.errors import UserError, did_you_mean, quoted
from manyicl.evaluation.numbers import last_number, only_number, same_number
from manyicl.tasks.task import Task
from manyicl.tasks.words import folded, parts, words

References = Sequence[str]

_PUNCTUATION = regex.compile(rf"[\p{{P}}\p{{Sc}}{regex.escape(string.punctuation)}]")
# The Ethiopic mark that separates words, as a space does in other scripts.
_WORD_SPACE = "\u1361"
_ARTICLE = regex.compile(r"(?<![\w\p{M}])(?:a|an|the)(?![\w\p{M}])")


@dataclass(frozen=True, slots=True)
class Metric:
    """A named way to score predictions.

    Attributes:
        name: Name of the metric, as tasks give it.
        of_example: Scores one prediction against its accepted answers; None if only a whole set has a score.
        of_corpus: Scores a whole set; None where that is the mean over examples.
        description: One line for tables and help.
    """

    name: str
    of_example: Callable[[str, References], float] | None
    description: str
    of_corpus: Callable[[Sequence[str], Sequence[References]], float] | None = None

    def score(self, predictions: Sequence[str], references: Sequence[References]) -> float:
        """Score a set of predictions.

        Raises:
            ValueError: If the set is empty or the two sides differ in length.
        """
        if len(predictions) != len(references) or not predictions:
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        if self.of_corpus is not None:
            return self.of_corpus(predictions, references)
        return fmean(self.of_each(predictions, references))

    def of_each(self, predictions: Sequence[str], references: Sequence[References]) -> tuple[float, ...]:
        """Score each prediction; (Q,).

        Raises:
            ValueError: If this metric has no score of one example.
        """
        if self.of_example is None:
            raise ValueError(f"{self.name} has no score of one example")
        return tuple(map(self.of_example, predictions, references))


def accuracy(prediction: str, references: References) -> float:
    """Score 1 if the answer is an accepted one, white space at its ends aside.

    Every other difference counts, one of composition (NFC, NFD) too: labels are compared character by character.

    >>> accuracy("world", ("world",))
    1.0
    """
    return float(prediction.strip() in {reference.strip() for reference in references})


def expected_and_answered(prediction: str, references: References) -> tuple[str, str]:
    """Return the label that was expected and the one that was answered, the same where the answer is accepted.

    >>> expected_and_answered("sport ", ("world", "sport")), expected_and_answered("art", ("world", "sport"))
    (('sport', 'sport'), ('world', 'art'))
    """
    answer, accepted = prediction.strip(), [reference.strip() for reference in references]
    return answer if answer in accepted else accepted[0], answer


def macro_f1(predictions: Sequence[str], references: Sequence[References]) -> float:
    """Mean F1 over all labels that occur among answers or predictions (scikit-learn's default).

    Where several answers are accepted, a prediction that is one of them counts as that label, any other
    against the first. White space at the ends is no part of a label.
    """
    from sklearn.metrics import f1_score

    truth, answered = zip(*map(expected_and_answered, predictions, references), strict=True)
    return float(f1_score(truth, answered, average="macro", zero_division=0.0))


def squad_normalised(text: str) -> str:
    """Lower-case, without punctuation, English articles and extra white space; nothing may be left of a text.

    Source: Rajpurkar et al. 2016, the official SQuAD script; the same on ASCII. In other scripts punctuation is theirs
    too, and letters are folded (see ``manyicl.tasks.words.folded``), where the script takes away ASCII punctuation
    alone. English articles go in every language.
    """
    plain = folded(text).replace(_WORD_SPACE, " ")
    return " ".join(_ARTICLE.sub(" ", _PUNCTUATION.sub("", plain)).split())


def exact_match(prediction: str, references: References) -> float:
    """Score 1 if prediction and an accepted answer are equal in SQuAD's normalisation.

    It drops points and minus signs, and articles even where they are the whole answer: for numbers use
    ``numeric_match``, for option letters ``accuracy``.

    >>> exact_match("The Eiffel Tower.", ("eiffel tower",))
    1.0
    """
    return float(squad_normalised(prediction) in map(squad_normalised, references))


def token_f1(prediction: str, references: References) -> float:
    """F1 over words in SQuAD's normalisation, the best over accepted answers.

    In scripts without spaces between words, such as Chinese and Thai, each character is a word.

    >>> token_f1("the big red dog", ("red dog",))
    0.8
    """
    return max(_token_f1(squad_normalised(prediction), squad_normalised(one)) for one in references)


def _token_f1(prediction: str, reference: str) -> float:
    predicted, accepted = ([part for word in text.split() for part in parts(word)] for text in (prediction, reference))
    if not predicted or not accepted:
        return float(prediction == reference)
    shared = sum((Counter(predicted) & Counter(accepted)).values())
    return 2 * shared / (len(predicted) + len(accepted))


@lru_cache
def _rouge_scorer(kind: str) -> Any:
    """Build rouge-score's scorer once per kind; importing it costs about a second."""
    from rouge_score.rouge_scorer import RougeScorer

    # The tokenizer is anything with this method.
    return RougeScorer([kind], tokenizer=SimpleNamespace(tokenize=words))


def _rouge(kind: str, prediction: str, references: References) -> float:
    return float(_rouge_scorer(kind).score_multi(list(references), prediction)[kind].fmeasure)


def numeric_match(prediction: str, references: References) -> float:
    """Score 1 if the last number of the prediction is the number an accepted answer means.

    An answer that means no single number ("none of these", "2^11 - 1"), and one that can be read in two ways
    ("3,14"), is compared as text, case and spaces aside. See ``manyicl.evaluation.numbers`` for how numbers are read.

    >>> numeric_match("So she pays $1,000.00", ("1000",))
    1.0
    >>> numeric_match("3/4", ("0.75",))
    1.0
    """
    value = last_number(prediction)
    for reference in references:
        expected = only_number(reference)
        if expected is not None and value is not None and same_number(value, expected):
            return 1.0
        if not isinstance(expected, Fraction) and _without_spaces(prediction) == _without_spaces(reference):
            return 1.0
    return 0.0


def _without_spaces(text: str) -> str:
    return "".join(folded(text).split()) or text


_ROUGE = "F1 without stemming, words of any script, characters where it has no spaces"
_ALL = (
    Metric("accuracy", accuracy, "share of answers that are right"),
    Metric("macro_f1", None, "mean F1 over labels", macro_f1),
    Metric("exact_match", exact_match, "share of answers equal in SQuAD's normalisation, in other scripts Unicode's"),
    Metric("token_f1", token_f1, "F1 over words in SQuAD's normalisation, characters where a script has no spaces"),
    *(Metric(f"rouge{kind}", partial(_rouge, f"rouge{kind}"), f"ROUGE-{kind} {_ROUGE}") for kind in "12L"),
    Metric("numeric_match", numeric_match, "share of answers with the right number, in the digits of any script"),
)
METRICS: dict[str, Metric] = {metric.name: metric for metric in _ALL}

# Companion metrics of free answers, for families in which exact matches are not the usual ones.
_FREE_ANSWERS = {
    "math": ("numeric_match", "exact_match"),
    "summarization": ("rouge1", "rouge2", "rougeL"),
    "generation": ("rouge1", "rouge2", "rougeL"),
}


def metrics_of(task: Task) -> tuple[str, ...]:
    """Return the task's primary metric and, after it, the companions that its results record.

    Raises:
        UserError: If the task names an unknown metric, or macro-F1 without a closed label set.
    """
    if task.metric not in METRICS:
        what, expected = f"unknown metric {quoted(task.metric)}", f"one of {', '.join(METRICS)}"
        raise UserError("unknown_metric", what, expected=expected, remedy=did_you_mean(task.metric, METRICS))
    if task.metric == "macro_f1" and task.labels is None:
        what = f"task {task.name!r} has the metric macro_f1 and no closed label set"
        raise UserError("metric_needs_labels", what, remedy="Use accuracy, or name its labels.")
    companions = _FREE_ANSWERS.get(task.family, ("exact_match", "token_f1"))
    if task.is_closed:
        companions = ("accuracy", "macro_f1") if task.labels is not None else ("accuracy",)
    return tuple(dict.fromkeys((task.metric, *companions)))
