"""Tables of what the one model is worth, from the records of `one_model_scores.py`: Markdown on standard output.

    python benchmarks/one_model_table.py RECORDS DATA > tables.md      # needs the extra [benchmarks]

RECORDS holds the records of base and one model (``--base``, ``--model``: the names they were scored under), DATA is as
in recipes/real/README.md. No model runs. What a user would try first answers the same queries from the same
demonstrations, which are drawn by the function that the evaluation uses and compared with those that it kept:
TF-IDF with logistic regression, the answer of the nearest demonstration by BM25, logistic regression on static word
vectors. The majority answer is that of all training rows, which the demonstrations, balanced by label, do not show.

Scores are in percent, with 95 % intervals; differences are paired by query and seed.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from manyicl.errors import UserError
from manyicl.evaluation.baselines import majority_answer, nearest_answers, tfidf_answers
from manyicl.evaluation.metrics import METRICS
from manyicl.evaluation.result import ContextExample, PredictedAnswer, Result, ResultStore, hash_of
from manyicl.evaluation.summary import Summary, summarise
from manyicl.evaluation.uncertainty import (
    Estimate,
    mean_over_families,
    mean_over_seeds_and_queries,
    paired_difference,
    spread,
)
from manyicl.tasks.files import load_task
from manyicl.tasks.task import FAMILIES, Example, Task

FOLDER = Path(__file__).parents[1] / "recipes" / "one_model"
BASE, ONE = "base", "one-model"
MAJORITY, BM25, TFIDF, VECTORS = "majority", "BM25 nearest", "TF-IDF + LR", "word vectors + LR"
BASELINES = (MAJORITY, BM25, TFIDF, VECTORS)
LINEAR = (TFIDF, VECTORS)
SYSTEMS = (BASE, ONE, *BASELINES)
# Linear models go on where the context of the one model ends.
MORE_SHOTS = (256, 512, 1024)
NUM_BINS = 10
COVERAGE = 0.8
NUM_RESAMPLES = 200

Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Confidences:
    """Probability of each answer among its labels, and whether the answer was right; (S, Q) each."""

    confidence: Scores
    correct: Scores


@dataclass(frozen=True)
class Measured:
    """One task: what every system scored on the same queries.

    Attributes:
        task: The task.
        scores: (system, shots) -> scores, (S, Q); one row where demonstrations play no part.
        confidences: (model, shots) -> confidences, where the records hold them.
        notes: What a reader must know of this task.
    """

    task: Task
    scores: dict[tuple[str, int], Scores] = field(default_factory=dict)
    confidences: dict[tuple[str, int], Confidences] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def shots(self) -> tuple[int, ...]:
        """Shot counts of the one model."""
        return tuple(sorted(shots for system, shots in self.scores if system == ONE))

    def estimate(self, system: str, shots: int) -> Estimate | None:
        """Return the mean score; None where there is none."""
        found = self.scores.get((system, shots))
        return None if found is None else mean_over_seeds_and_queries(found)

    def gain(self, over: tuple[str, int], shots: int) -> Estimate | None:
        """Return the one model's score minus another one's, paired; None unless both are there."""
        first, second = self.scores.get(over), self.scores.get((ONE, shots))
        return None if first is None or second is None else difference(first, second)


def difference(first: Scores, second: Scores) -> Estimate:
    """Mean of ``second - first``; a side whose demonstrations play no part is the same after every seed."""
    num_seeds = max(len(first), len(second))
    return paired_difference(
        *(np.broadcast_to(one, (num_seeds, one.shape[1])) if len(one) == 1 else one for one in (first, second))
    )


# --- From records to scores


def load(records: Path, data: Path, base: str, model: str) -> tuple[list[Measured], Summary]:
    """Read the records of two models and answer their queries with every baseline.

    Raises:
        UserError: If a model is missing, or data or demonstrations are not those of the records.
    """
    store = ResultStore(records)
    summary = summarise(store.load())
    for name in (base, model):
        if name not in summary.models:
            raise UserError(
                "unknown_model",
                f"the records hold no model named {name!r}",
                expected=f"one of {', '.join(summary.models)}",
                remedy="Name it with --base or --model.",
                file=records,
            )
    return [measure(store, summary, task, data, {BASE: base, ONE: model}) for task in summary.families], summary


def measure(store: ResultStore, summary: Summary, name: str, data: Path, names: Mapping[str, str]) -> Measured:
    """Collect what both models scored on a task, and score the baselines on what the one model was given."""
    points = {
        (system, shots): summary.by_point[names[system], name, shots]
        for system in (BASE, ONE)
        for shots in summary.shots
        if (names[system], name, shots) in summary.by_point
    }
    of_model: dict[str, list[Result]] = {
        system: [record for key, some in points.items() if key[0] == system for record in some] for system in names
    }
    records = of_model[ONE] or of_model[BASE]
    if not records:  # Of neither model.
        records = [record for record in summary.records if record.task == name]
    task = load_planned(name, data, records[0])
    measured = Measured(task)
    if not of_model[ONE] or not of_model[BASE]:
        measured.notes.append("not measured with both models")
        return measured
    if len({record.queries_hash for some in of_model.values() for record in some}) > 1:
        measured.notes.append("base and one-model answered other queries: left out")
        return measured
    for (system, shots), some in points.items():
        measured.scores[system, shots] = scores_of(some)
        if confidences := confidences_of([store.predictions(record) for record in some]):
            measured.confidences[system, shots] = confidences
        dropped = [record.num_shots_dropped + record.num_shots_missing for record in some]
        if any(dropped):
            missing = ", ".join(map(str, dropped))
            why = "they do not fit, or the task has too few rows"
            measured.notes.append(f"{system} at {shots} shots lacks {missing} of them, by seed: {why}")
    queries = queries_of(records[0], store.predictions(records[0]), task)
    for shots in measured.shots:
        shown = [demonstrations_of(record, store.context(record), task) for record in points[ONE, shots]]
        for baseline, answer in ANSWERS.items():
            add_baseline(measured, baseline, shots, [answer(task, some, queries) for some in shown], queries)
    largest, seeds = max(measured.shots), [record.seed for record in points[ONE, max(measured.shots)]]
    for shots in (count for count in MORE_SHOTS if largest < count <= len(task.train)):
        drawn = [task.demonstrations(shots, seed, sampling_of(records[0])) for seed in seeds]
        for baseline in LINEAR:
            answers = [ANSWERS[baseline](task, some, queries) for some in drawn]
            add_baseline(measured, baseline, shots, answers, queries)
    return measured


def load_planned(name: str, data: Path, record: Result) -> Task:
    """Load the task of a record.

    Raises:
        UserError: If there is no such task, or its data are others.
    """
    files = [path for role in ("validation", "test") if (path := FOLDER / role / name / "task.yaml").is_file()]
    task = load_task(files[0], data) if files else None
    if task is None or task.data_hash != record.data_hash:
        raise UserError(
            "data_changed",
            f"task {name!r} of the records is not a task of the plan with the data in {data}",
            expected=f"hash {record.data_hash[:12]}",
            found=task.data_hash[:12] if task else "no such task",
        )
    return task


def scores_of(records: Sequence[Result]) -> Scores:
    """Return the scores of a point, (S, Q), seeds ascending."""
    assert all(record.query_scores for record in records), "the metrics of the plan score every answer"
    return np.array([record.query_scores for record in records], dtype=float)


def confidences_of(predictions: Sequence[Sequence[PredictedAnswer]]) -> Confidences | None:
    """Return the confidences of a point; None where an answer has none."""
    known = [[line.confidence for line in lines] for lines in predictions]
    if not all(known) or any(value is None for lines in known for value in lines):
        return None
    correct = [[line.scores["accuracy"] for line in lines] for lines in predictions]
    return Confidences(np.array(known, dtype=float), np.array(correct, dtype=float))


def queries_of(record: Result, predictions: Sequence[PredictedAnswer], task: Task) -> tuple[Example, ...]:
    """Find the test rows that a record's queries are, in order.

    Raises:
        UserError: If they cannot be found.
    """
    by_content = {(one.origin, one.query.text): one for one in task.test}
    queries = tuple(by_content[key] for line in predictions if (key := (line.origin, line.query)) in by_content)
    if hash_of(*(text for one in queries for text in (one.query.text, *one.references))) != record.queries_hash:
        raise UserError(
            "queries_changed",
            f"the queries of {record.stem} cannot be found again",
            remedy="Keep the predictions with the records.",
        )
    return queries


def demonstrations_of(record: Result, context: Sequence[ContextExample], task: Task) -> tuple[Example, ...]:
    """Draw the demonstrations of a record as the evaluation did; of those that did not all fit, the ones it kept.

    Raises:
        UserError: If these are not the ones that the record's context holds.
    """
    kept = {(one.origin, one.query, one.answer) for one in context}
    drawn = task.demonstrations(min(record.num_shots, len(task.train)), record.seed, sampling_of(record))
    if record.num_shots_dropped:
        drawn = tuple(one for one in drawn if (one.origin, one.query.text, one.answer) in kept)
    shown = [(one.origin, one.query.text, one.answer) for one in drawn]
    if shown != [(one.origin, one.query, one.answer) for one in context]:
        raise UserError(
            "demonstrations_changed",
            f"the demonstrations of {record.stem} are not those that the evaluation kept",
            expected=f"{len(context)} as in its context file",
            found=f"{len(shown)} drawn",
        )
    return drawn


def sampling_of(record: Result) -> Any:
    """Return how demonstrations were chosen, which records keep as text."""
    return record.sampling


# --- Baselines


Answers = Sequence[str] | None


def majority_answers(task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> Answers:
    """Give the most frequent training answer; undefined where rows have options of their own."""
    return None if task.choices_column else [majority_answer(task)] * len(queries)


def bm25_answers(task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> Answers:
    """Repeat the answer of the nearest demonstration; where none shares a word with the query, the majority's."""
    if task.choices_column or not demonstrations:
        return None
    majority = majority_answer(task)
    return [majority if answer is None else answer for answer in nearest_answers(demonstrations, queries)]


def vector_answers(task: Task, demonstrations: Sequence[Example], queries: Sequence[Example]) -> Answers:
    """Answer by logistic regression on static word vectors, both with default settings."""
    if task.labels is None or not demonstrations:
        return None
    labels = [example.answer for example in demonstrations]
    if len(set(labels)) == 1:
        return labels[:1] * len(queries)
    from sklearn.linear_model import LogisticRegression

    model = LogisticRegression(max_iter=1000)
    with warnings.catch_warnings():
        # Of labels with one or two demonstrations each, it asks whether they are numbers.
        warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
        model.fit(vectors(tuple(example.query.text for example in demonstrations)), labels)
    return [str(label) for label in model.predict(vectors(tuple(example.query.text for example in queries)))]


@cache
def vectors(texts: tuple[str, ...]) -> NDArray[np.float32]:
    """Embed texts as means of static word vectors, (texts, 256)."""
    return np.asarray(word_vectors().embed(list(texts)), dtype=np.float32)


@cache
def word_vectors() -> Any:
    """Load the vectors that wordllama carries, without asking the network.

    Raises:
        UserError: If it is not installed.
    """
    try:
        import wordllama
    except ImportError as error:
        what = f"word vectors come with wordllama, which cannot be imported: {error}"
        raise UserError("missing_requirement", what, remedy="pip install 'manyicl[benchmarks]'") from error
    return wordllama.WordLlama.load(cache_dir=Path(wordllama.__file__).parent, disable_download=True)


ANSWERS: Mapping[str, Callable[[Task, Sequence[Example], Sequence[Example]], Answers]] = {
    MAJORITY: majority_answers,
    BM25: bm25_answers,
    TFIDF: lambda *arguments: tfidf_answers(*arguments)[0],
    VECTORS: vector_answers,
}


def add_baseline(
    measured: Measured, baseline: str, shots: int, answers: Sequence[Answers], queries: Sequence[Example]
) -> None:
    """Score a baseline's answers of each seed, where it has any."""
    known = [one for one in answers if one is not None]
    if len(known) == len(answers):
        metric = METRICS[measured.task.metric]
        references = [example.references for example in queries]
        measured.scores[baseline, shots] = np.array([metric.of_each(one, references) for one in known])


# --- What is computed of the scores


def members(measured: Iterable[Measured], family: str | None = None) -> list[Measured]:
    """Return the tasks of a family that both models answered, or all of them."""
    return [one for one in measured if one.scores and family in (None, one.task.family)]


def over_tasks(tasks: Sequence[Measured], of_task: Callable[[Measured], Estimate | None]) -> Estimate | None:
    """Mean over tasks within families, then over families; None unless every task has an estimate."""
    found = [(str(one.task.family), of_task(one)) for one in tasks]
    known = [(family, estimate) for family, estimate in found if estimate is not None]
    return mean_over_families(known) if known and len(known) == len(found) else None


def slope(measured: Measured) -> Estimate | None:
    """Least-squares slope of the one model's score over log2(shots), from 1 shot on: score per doubling.

    It is linear in the scores, so that every seed and query has a slope of its own.
    """
    shots = [count for count in measured.shots if count > 0]
    if len(shots) < 2:
        return None
    x = np.log2(shots)
    weights = (x - x.mean()) / ((x - x.mean()) ** 2).sum()
    doublings = float(x[-1] - x[0])
    table = sum(weight * measured.scores[ONE, count] for weight, count in zip(weights, shots, strict=True))
    # The rise over all doublings has the range of a difference of scores, which the smallest honest error is for.
    rise = mean_over_seeds_and_queries(np.asarray(table) * doublings, pairing="paired")
    error = None if rise.standard_error is None else rise.standard_error / doublings
    return replace(rise, mean=rise.mean / doublings, standard_error=error)


def best_base_shots(tasks: Sequence[Measured]) -> int:
    """Return the shot count at which the base is best in the mean over tasks."""
    counts = set.intersection(*({shots for system, shots in one.scores if system == BASE} for one in tasks))
    return max(sorted(counts), key=lambda shots: np.mean([one.scores[BASE, shots].mean() for one in tasks]))


def best_reference(measured: Measured) -> tuple[str, int]:
    """Return what is better on a task: the majority answer, or the base at one of its shot counts."""
    known = [key for key in measured.scores if key[0] in (BASE, MAJORITY)]
    return max(known, key=lambda key: measured.scores[key].mean())


@dataclass(frozen=True)
class Crossing:
    """From how many examples on a linear model is better at every count, and whether more than its interval."""

    shots: int | None
    is_clear: bool = False


def crossing(measured: Measured, linear: str) -> Crossing | None:
    """Find where a linear model becomes the better choice; None where it is not defined.

    Beyond the one model's largest shot count the linear model has more examples, the one model that many.
    """
    largest = max(measured.shots)
    counts = sorted(shots for system, shots in measured.scores if system == linear)
    if not counts:
        return None
    gains = [measured.gain((linear, shots), min(shots, largest)) for shots in counts]
    better = [gain is not None and gain.mean < 0 for gain in gains]
    start = next((n for n in range(len(counts)) if all(better[n:])), None)
    if start is None:
        return Crossing(None)
    intervals = [gain.interval for gain in gains[start:] if gain is not None]
    return Crossing(counts[start], any(interval is not None and interval[1] < 0 for interval in intervals))


def calibration_error(confidence: Scores, correct: Scores) -> float:
    """Expected calibration error over bins of equal width: how far confidence is from accuracy.

    Source: Guo et al. 2017, arXiv:1706.04599.
    """
    bins = np.minimum((confidence * NUM_BINS).astype(int), NUM_BINS - 1)
    gaps = [abs((confidence - correct)[bins == number].sum()) for number in range(NUM_BINS)]
    return float(sum(gaps) / confidence.size)


def covered_accuracy(confidence: Scores, correct: Scores) -> float:
    """Accuracy on the share of answers that the model is most confident of."""
    order = np.argsort(-confidence.ravel(), kind="stable")
    return float(correct.ravel()[order[: math.ceil(COVERAGE * confidence.size)]].mean())


@dataclass(frozen=True)
class Calibration:
    """Means over tasks with standard errors over queries, except the error, which is over all answers together."""

    num_tasks: int
    accuracy: float
    confidence: float
    error: tuple[float, float]
    covered: tuple[float, float]


def calibration(answers: Sequence[Confidences]) -> Calibration:
    """Compute calibration, and resample the queries of every task for its standard errors."""
    rng = np.random.default_rng(0)

    def figures(some: Sequence[Confidences]) -> tuple[float, float]:
        confidence, correct = (
            np.concatenate([getattr(one, of).ravel() for one in some]) for of in ("confidence", "correct")
        )
        covered = float(np.mean([covered_accuracy(one.confidence, one.correct) for one in some]))
        return calibration_error(confidence, correct), covered

    resampled = []
    for _ in range(NUM_RESAMPLES):
        drawn = [rng.integers(one.correct.shape[1], size=one.correct.shape[1]) for one in answers]
        resampled.append(
            figures([Confidences(a.confidence[:, i], a.correct[:, i]) for a, i in zip(answers, drawn, strict=True)])
        )
    error, covered = figures(answers)
    errors = [spread(values) for values in zip(*resampled, strict=True)]
    return Calibration(
        len(answers),
        float(np.mean([one.correct.mean() for one in answers])),
        float(np.mean([one.confidence.mean() for one in answers])),
        (error, errors[0]),
        (covered, errors[1]),
    )


# --- The aims


@dataclass(frozen=True)
class Aim:
    """An aim of the plan: a value, in points, that is to be at least or above a threshold."""

    text: str
    estimate: Estimate | None
    threshold: float = 0.0

    @property
    def verdict(self) -> str:
        """Say whether it was reached, and whether the interval leaves that open."""
        if self.estimate is None:
            return "not measured"
        low, high = self.estimate.interval or (-math.inf, math.inf)
        reached = self.estimate.mean >= self.threshold if self.threshold else self.estimate.mean > 0
        is_open = low <= self.threshold <= high
        return ("reached" if reached else "missed") + (", the interval holds the threshold" if is_open else "")


def aims(measured: Sequence[Measured]) -> list[Aim]:
    """Return the aims for the mean over unseen classification tasks."""
    tasks = members(measured, "classification")
    if not tasks:
        return []

    def gain(system: str, shots: int, own_shots: int | None = None) -> Estimate | None:
        return over_tasks(tasks, lambda one: one.gain((system, shots), shots if own_shots is None else own_shots))

    majority = over_tasks(tasks, lambda one: one.estimate(MAJORITY, 16))
    shots = best_base_shots(tasks)
    base = over_tasks(tasks, lambda one: one.estimate(BASE, shots))
    is_base = majority is None or (base is not None and base.mean > majority.mean)
    better, better_shots, name = (BASE, shots, f"base at {shots} shots") if is_base else (MAJORITY, 16, MAJORITY)
    return [
        Aim("at 16 shots, at least 25 points above the base", gain(BASE, 16), 0.25),
        Aim(
            "at 16 shots, at least 15 above the better of majority and base at its best number of shots "
            f"(in the mean: {name})",
            gain(better, better_shots, 16),
            0.15,
        ),
        Aim(
            "the same where each task has its own best",
            over_tasks(tasks, lambda one: one.gain(best_reference(one), 16)),
            0.15,
        ),
        *(Aim(f"at {count} shots, above {system}", gain(system, count)) for count in (4, 16) for system in BASELINES),
        Aim(f"at 32 shots, above {TFIDF}", gain(TFIDF, 32)),
        Aim("slope over log2(shots) above zero, points per doubling", over_tasks(tasks, slope)),
    ]


# --- Tables


def shown(estimate: Estimate | None, sign: str = "", digits: int = 1) -> str:
    """Write a mean and its interval in percent."""
    if estimate is None:
        return "–"
    ends = estimate.interval
    interval = f" [{', '.join(f'{100 * end:{sign}.{digits}f}' for end in ends)}]" if ends else ""
    return f"{100 * estimate.mean:{sign}.{digits}f}{interval}"


def print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


def print_header(*cells: str) -> None:
    print()
    print_row(*cells)
    print_row("---", *["---:"] * (len(cells) - 1))


def print_group(title: str, tasks: Sequence[Measured]) -> None:
    """Print the scores of a group of tasks at each shot count, then what the one model is above each."""
    at = {
        shots: [one for one in tasks if shots in one.shots] for shots in sorted({n for one in tasks for n in one.shots})
    }
    others = [system for system in SYSTEMS if system != ONE]

    def score(system: str, shots: int) -> str:
        return shown(over_tasks(at[shots], lambda one: one.estimate(system, shots)))

    def gain(system: str, shots: int) -> str:
        return shown(over_tasks(at[shots], lambda one: one.gain((system, shots), shots)), "+")

    print(f"\n### {title}")
    print_header("Shots", "Tasks", "Answers", *SYSTEMS)
    for shots, some in at.items():
        num_answers = sum(one.scores[ONE, shots].size for one in some)
        print_row(shots, len(some), f"{num_answers:,}", *(score(system, shots) for system in SYSTEMS))
    print_header("one-model minus, shots", *others)
    for shots in at:
        print_row(shots, *(gain(system, shots) for system in others))


def print_task(measured: Measured) -> None:
    """Print one task: scores, and in brackets the interval of what the one model is above them."""
    task = measured.task
    print(f"\n#### {task.name} ({task.family}, {task.metric})")
    for note in measured.notes:
        print(f"\n{note[0].upper()}{note[1:]}.")
    if not measured.scores:
        return
    others = [system for system in SYSTEMS if system != ONE]
    print_header("Shots", "Seeds × queries", ONE, *(f"{system}; one-model minus it" for system in others))
    for shots in measured.shots:
        num_seeds, num_queries = measured.scores[ONE, shots].shape
        cells = []
        for system in others:
            score, gain = measured.estimate(system, shots), measured.gain((system, shots), shots)
            cells.append(f"{100 * score.mean:.1f}; {shown(gain, '+')}" if score and gain else "–")
        print_row(shots, f"{num_seeds} × {num_queries}", shown(measured.estimate(ONE, shots)), *cells)


def print_aims(measured: Sequence[Measured]) -> None:
    print(f"\n## Aims, mean over {len(members(measured, 'classification'))} classification tasks")
    print_header("Aim", "Value", "Verdict")
    for aim in aims(measured):
        print_row(aim.text, shown(aim.estimate, "+"), aim.verdict)


def print_crossings(measured: Sequence[Measured]) -> None:
    """Print where linear models become better, for the tasks where they are defined."""
    closed = [one for one in members(measured) if one.task.labels]
    print("\n## From how many examples on a linear model is better\n")
    print(
        "The smallest number from which on its mean is higher at every number measured; beyond the one model's most "
        "shots (second column) it is compared with the one model at these. *clear*: somewhere there, by more than "
        "the 95 % interval."
    )
    print_header("Task", "Most shots", "Most examples", *LINEAR)
    for one in closed:
        most = max(shots for system, shots in one.scores if system in LINEAR)
        cells = []
        for linear in LINEAR:
            found = crossing(one, linear)
            number = "–" if found is None else f"none up to {most:,}" if found.shots is None else f"{found.shots:,}"
            cells.append(number + (", clear" if found and found.is_clear else ""))
        print_row(one.task.name, max(one.shots), f"{most:,}", *cells)


def print_calibration(measured: Sequence[Measured]) -> None:
    """Print calibration where both models' records hold confidences."""
    print("\n## Calibration, classification tasks\n")
    tasks = members(measured, "classification")
    shots = sorted({shots for one in tasks for _, shots in one.confidences})
    if not shots:
        print("The records hold no confidences: score with one_model_scores.py, into an empty folder.")
        return
    print(
        "Confidence is the probability of the answer among the labels. Expected calibration error: over all answers of "
        f"the row together, {NUM_BINS} bins. Accuracy at {100 * COVERAGE:.0f} % coverage: on the answers of each task "
        "that the model is most confident of, in the mean over tasks. ± is the standard error over queries."
    )

    def print_line(name: object, count: int, system: str, some: Sequence[Measured]) -> None:
        known = [one.confidences[system, count] for one in some if (system, count) in one.confidences]
        if not known:
            return
        one = calibration(known)
        pairs = (f"{100 * value:.1f} ± {100 * error:.1f}" for value, error in (one.error, one.covered))
        print_row(name, one.num_tasks, system, f"{100 * one.accuracy:.1f}", f"{100 * one.confidence:.1f}", *pairs)

    columns = (
        "Tasks",
        "Model",
        "Accuracy",
        "Confidence",
        "Calibration error",
        f"Accuracy at {100 * COVERAGE:.0f} % coverage",
    )
    print_header("Shots", *columns)
    for count in shots:
        for system in (BASE, ONE):
            print_line(count, count, system, tasks)
    print_header("Task, 16 shots", *columns)
    for task in tasks:
        for system in (BASE, ONE):
            print_line(task.task.name, 16, system, [task])


def print_models(summary: Summary, names: Mapping[str, str]) -> None:
    print_header("", "Name", "Reference", "Fingerprint", "Precision and versions", "Records")
    for system, name in names.items():
        records = [one for key, some in summary.by_point.items() if key[0] == name for one in some]
        versions = {", ".join(f"{k} {v}" for k, v in one.versions.items()) for one in records}
        print_row(
            system,
            name,
            ", ".join(sorted({one.model for one in records})),
            records[0].model_fingerprint[:12],
            "; ".join(sorted(versions)),
            len(records),
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Print all tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--base", default=BASE, help="Name that the base was scored under.")
    parser.add_argument("--model", default=ONE, help="Name that the one model was scored under.")
    options = parser.parse_args(arguments)
    try:
        measured, summary = load(options.records, options.data, options.base, options.model)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    print_models(summary, {BASE: options.base, ONE: options.model})
    print_aims(measured)
    print("\n## Means")
    print_group("Mean over classification tasks", members(measured, "classification"))
    for family in FAMILIES:
        if family != "classification" and members(measured, family):
            print_group(f"Mean over {family} tasks", members(measured, family))
    print_group("Mean over families", members(measured))
    print_crossings(measured)
    print_calibration(measured)
    print("\n## Tasks")
    for one in measured:
        print_task(one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
