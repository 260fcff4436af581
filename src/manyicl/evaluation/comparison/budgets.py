"""How long each regime trains: as many tokens, steps or supervised answers as the others.

A packed sequence of one regime holds a little more or less than one of another, so tokens and answers of a sequence are
measured on the first sequences of its run. They are a function of tasks, tokenizer and seed, as the run itself is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from manyicl.activity import Activity
from manyicl.errors import UserError, pluralized
from manyicl.evaluation.comparison.regimes import regime_recipe
from manyicl.evaluation.comparison.roles import ComparisonTasks, share_of_tasks
from manyicl.evaluation.comparison.settings import Comparison, Regime, VariantSettings
from manyicl.tasks.task import Task
from manyicl.training.estimate import SequenceStatistics, sample_sequences
from manyicl.training.recipe import Recipe
from manyicl.training.train import packed_sequences

# Learning rates are tried at this share of the budget.
TRIAL_SHARE = 0.2
# A training of whole steps may be so much longer or shorter than its budget.
MOST_MISSED = 0.2
EQUAL_ANSWERS = "all_answers_equal_answers"


@dataclass(frozen=True)
class Length:
    """How long one kind of training is.

    Attributes:
        num_steps: Optimizer steps.
        sequences_per_step: Packed sequences in a step.
        statistics: Means over the first packed sequences.
        exact_steps: Steps that would give exactly the budget, before they are rounded to whole ones.
    """

    num_steps: int
    sequences_per_step: int
    statistics: SequenceStatistics
    exact_steps: float

    @property
    def num_sequences(self) -> int:
        """Packed sequences of the whole training."""
        return self.num_steps * self.sequences_per_step

    @property
    def num_tokens(self) -> float:
        """Tokens of the whole training, about."""
        return self.num_sequences * self.statistics.tokens

    @property
    def num_answers(self) -> float:
        """Supervised answers of the whole training, about."""
        return self.num_sequences * self.statistics.answers

    @property
    def num_trial_steps(self) -> int:
        """Steps of a trial of a learning rate."""
        return max(1, round(TRIAL_SHARE * self.num_steps))

    def sentence(self, name: str) -> str:
        """Say how long it is."""
        steps, sequences = pluralized(self.num_steps, "step"), pluralized(self.sequences_per_step, "sequence")
        return (
            f"{name}: {steps} of {sequences}, about {self.num_tokens:,.0f} tokens and {self.num_answers:,.0f} "
            f"supervised answers, after up to {self.statistics.most_shots:,} demonstrations."
        )


def variant_name(name: str) -> str:
    """Return what an ablation is called among the kinds of training."""
    return f"variant_{name}"


def replay_name(regime: Regime) -> str:
    """Return what a regime with general text is called among the kinds of training."""
    return f"{regime}_replay"


def lengths_of(
    settings: Comparison,
    tasks: ComparisonTasks,
    tokenizer: PreTrainedTokenizerBase,
    activity: Activity | None = None,
) -> dict[str, Length]:
    """Return the length of each kind of training by its name: a regime, it with replay, `EQUAL_ANSWERS`, or a variant.

    Raises:
        UserError: If a packed sequence cannot be drawn, or a variant changes what does not exist.
    """
    regimes = [regime for regime in settings.compare.regimes if regime != "base"]
    found: dict[str, Length] = {}
    for regime in regimes:
        trained = tasks.dedicated if regime == "dedicated" else tasks.train
        if not trained:
            continue
        statistics = _sampled(settings, regime, trained, tokenizer, activity)
        shared = len(tasks.dedicated) if regime == "dedicated" and settings.compare.dedicated.budget == "share" else 1
        found[regime] = _length(settings, statistics, shared)
    if {"last_answer", "all_answers"} <= set(found):
        found[EQUAL_ANSWERS] = _equal_answers(found["all_answers"], found["last_answer"].num_answers)
    for regime in settings.compare.replay.regimes if settings.compare.replay else ():
        statistics = _sampled(settings, regime, tasks.train, tokenizer, activity, replay=True)
        found[replay_name(regime)] = _length(settings, statistics)
    for name, variant in settings.compare.variants.items():
        trained = share_of_tasks(tasks.train, variant.task_share, settings.training.seed)
        statistics = _sampled(settings, "all_answers", trained, tokenizer, activity, variant)
        found[variant_name(name)] = _length(settings, statistics)
    return found


def nominal_recipe(
    settings: Comparison, regime: Regime, variant: VariantSettings | None = None, *, replay: bool = False
) -> Recipe:
    """Return the recipe of a regime with the length and rate that the file gives, to look at its sequences."""
    return regime_recipe(
        settings,
        regime,
        num_steps=settings.num_steps,
        learning_rate=settings.training.learning_rate,
        seed=settings.training.seed,
        output=Path(settings.output),
        replay=replay,
        changes=variant.set if variant else (),
    )


def _sampled(
    settings: Comparison,
    regime: Regime,
    tasks: Sequence[Task],
    tokenizer: PreTrainedTokenizerBase,
    activity: Activity | None,
    variant: VariantSettings | None = None,
    *,
    replay: bool = False,
) -> SequenceStatistics:
    recipe = nominal_recipe(settings, regime, variant, replay=replay)
    return sample_sequences(packed_sequences(recipe, tuple(tasks), tokenizer, activity), recipe.objective)


def _length(settings: Comparison, statistics: SequenceStatistics, num_sharing: int = 1) -> Length:
    per_step = settings.training.sequences_per_step
    if settings.training.num_tokens is not None:
        steps = settings.training.num_tokens / (per_step * statistics.tokens * num_sharing)
    else:
        steps = settings.num_steps / num_sharing
    return Length(max(1, round(steps)), per_step, statistics, steps)


def _equal_answers(all_answers: Length, num_answers: float) -> Length:
    """Return the length at which all_answers has so many supervised answers, as nearly as whole sequences can.

    Of steps of different sizes that come as near, the largest are taken.
    """
    num_sequences = num_answers / all_answers.statistics.answers
    lengths = [
        Length(max(1, round(num_sequences / per_step)), per_step, all_answers.statistics, num_sequences / per_step)
        for per_step in range(all_answers.sequences_per_step, 0, -1)
    ]
    return min(lengths, key=lambda length: abs(length.num_sequences - num_sequences))


def budget_problems(settings: Comparison, lengths: Mapping[str, Length]) -> list[UserError]:
    """List the kinds of training whose budget, or a trial of it, is less than one step, or is far from whole steps."""
    problems = []
    field = "training.num_tokens" if settings.compare.budget == "tokens" else "training.num_steps"
    for name, length in lengths.items():
        if name == EQUAL_ANSWERS:  # as near as it can be, and beside the budget of the others
            continue
        missed = length.num_steps / length.exact_steps - 1
        if length.exact_steps >= 1 and abs(missed) > MOST_MISSED:
            what = f"{name}: whole steps of {pluralized(length.sequences_per_step, 'sequence')} miss its budget"
            expected, found = f"within {MOST_MISSED:.0%}", f"{missed:+.0%}, {length.exact_steps:.2f} steps"
            remedy = f"Raise {field}, or lower training.sequences_per_step."
            problems.append(UserError("budget_unmet", what, expected=expected, found=found, remedy=remedy, field=field))
        # A trial of dedicated models is as long as they may be.
        share = TRIAL_SHARE if settings.is_tuned and name in settings.compare.regimes and name != "dedicated" else 1.0
        if length.exact_steps * share < 1:
            part = "a fifth of its budget, at which rates are tried," if share < 1 else "its budget"
            what = f"{name}: {part} is less than one step of {pluralized(length.sequences_per_step, 'sequence')}"
            found = f"{length.exact_steps * share:.2f} steps"
            remedy = f"Raise {field}, or lower training.sequences_per_step."
            problems.append(UserError("budget_too_small", what, found=found, remedy=remedy, field=field))
    return problems
