"""How well a model answers by position within a sequence, from the one pass that prefills the demonstrations.

Each demonstration is answered before the model has seen its answer, given those before it; see
`manyicl.evaluation.prequential` for what trivial baselines do on the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from scipy.special import logsumexp

from manyicl.engine.observed import ObservedAnswer, groups_of_shots
from manyicl.errors import UserError
from manyicl.evaluation.comparison.records import PositionScore
from manyicl.tasks.demonstrations import ShotSampling
from manyicl.tasks.task import Example, Task

if TYPE_CHECKING:
    from manyicl.engine.engine import Engine


def score_positions(
    engine: Engine,
    task: Task,
    num_examples: int,
    seed: int,
    *,
    num_draws: int = 1,
    sampling: ShotSampling = "random",
) -> list[PositionScore]:
    """Score the demonstrations of one pass by the number of demonstrations before each: 0, 1, 2-3, 4-7, 8-15 and so on.

    Args:
        engine: Engine of the model, whose backend can score while it prefills.
        task: The task; its training rows are the demonstrations, as in a packed sequence of training.
        num_examples: Most demonstrations; fewer where the task has not as many, or the context does not hold them.
        seed: Seed of the draw.
        num_draws: Draws, each one pass, with the seeds ``seed``, ``seed + 1``, …; their answers are pooled.
        sampling: How demonstrations are drawn; in training ``random`` unless a recipe says otherwise.

    Raises:
        UserError: If ``num_examples`` or ``num_draws`` is below 1, or none of the demonstrations fits.
    """
    for name, number in (("num_examples", num_examples), ("num_draws", num_draws)):
        if number < 1:
            raise UserError("out_of_range", f"{name} is too small", expected="1 or more", found=str(number), field=name)
    most = min(num_examples, len(task.train))
    passes = []
    for draw in range(num_draws):
        demonstrations = task.demonstrations(most, seed + draw, sampling)
        # No query follows, so that tokens are kept free for an answer alone.
        passes.append(_answers(engine, task, demonstrations))
    longest = max(passes, key=len)
    if not longest:
        what = f"no demonstration of task {task.name!r} fits the context"
        raise UserError("no_shot_fits", what, remedy="Use a longer context, or leave the task out.")
    ranges = [(first, last) for first, last, _ in groups_of_shots(longest)]
    return [
        _pooled(task, first, last, [answer for one in passes for answer in one[first : last + 1]])
        for first, last in ranges
    ]


def _answers(engine: Engine, task: Task, demonstrations: Sequence[Example]) -> Sequence[ObservedAnswer]:
    """Observe the pass; in the channel form, where it does not show which label is best, score all labels after it.

    That costs a continuation for each label of each demonstration; a label's log-probability is that among the labels.
    """
    prefix = engine.compile(task, demonstrations, ())
    if not engine.is_channel:
        return prefix.answers
    each = engine.scores_before_shown(prefix, range(prefix.num_shots))
    found = []
    for shot, (example, scores) in enumerate(zip(prefix.demonstrations, each, strict=True)):
        total = float(logsumexp(list(scores.values())))
        best = max(scores, key=lambda label: scores[label])
        found.append(ObservedAnswer(shot, scores[example.answer] - total, best == example.answer))
    return found


def _pooled(task: Task, first: int, last: int, answers: Sequence[ObservedAnswer]) -> PositionScore:
    return PositionScore(
        task=task.name,
        first=first,
        last=last,
        num_answers=len(answers),
        accuracy=fmean(answer.is_right for answer in answers) if task.is_closed else None,
        nats_per_answer=-fmean(answer.log_probability for answer in answers),
    )
