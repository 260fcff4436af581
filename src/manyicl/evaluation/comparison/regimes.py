"""A regime as a recipe: what makes zero-shot, few-shot, many-shot and dedicated fine-tuning what they are.

::

    regime         examples in an episode     supervised
    zero_shot      1                          its answer
    few_shot       k demonstrations, 1 query  the last answer
    last_answer    those of the recipe        the last answer
    all_answers    those of the recipe        every answer
    dedicated      1, all of one task         its answer

Episodes are isolated and fill a packed sequence in every regime. Everything else is the recipe's own.

Source: He et al. 2025, arXiv:2506.11103; few_shot as in MetaICL (Min et al. 2022, arXiv:2110.15943).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from manyicl.evaluation.comparison.settings import Comparison, Regime
from manyicl.training.recipe import Recipe

# One example shows neither what the task is, nor what a label means that another word replaces.
_SINGLE_EXAMPLES: Mapping[str, Any] = {"examples_per_episode": 1, "rename_labels": 0.0, "omit_instruction": 0.0}


def regime_recipe(
    settings: Comparison,
    regime: Regime,
    *,
    num_steps: int,
    learning_rate: float,
    seed: int,
    output: Path,
    sequences_per_step: int | None = None,
    replay: bool = False,
    changes: tuple[str, ...] = (),
) -> Recipe:
    """Return the recipe of one training.

    Args:
        settings: The comparison.
        regime: Any but the base, which is not trained.
        num_steps: Optimizer steps.
        learning_rate: Peak rate.
        seed: Training seed.
        output: Folder of the model.
        sequences_per_step: Packed sequences in a step; None for those of the recipe.
        replay: True to mix in general text.
        changes: ``section.key=value`` overrides of a variant.

    Raises:
        UserError: If a change names no key, or gives it a wrong value.
    """
    assert regime != "base"
    content = settings.model_dump(mode="json", exclude={"compare"})
    content["sequences"] |= _sequences(settings, regime)
    if replay and settings.compare.replay is not None:
        content["sequences"]["replay"] = settings.compare.replay.model_dump(mode="json", exclude={"regimes"})
    content["objective"] |= {"supervise": "last_answer"} if regime in ("few_shot", "last_answer") else {}
    if regime == "dedicated":
        content["tasks"]["mixture"] = {}
    of_training = settings.training
    content["training"] |= {
        "num_tokens": None,
        "num_steps": num_steps,
        "sequences_per_step": sequences_per_step or of_training.sequences_per_step,
        "learning_rate": learning_rate,
        "warmup_steps": _warmup_steps(settings, num_steps),
        "seed": seed,
        # The last model is compared, not the best of several.
        "evaluate_every": None,
    }
    content["output"] = str(output)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    return Recipe.parse(text, f"compare, {regime}", changes)


def trial_recipe(recipe: Recipe, regime: Regime, settings: Comparison, evaluate_every: int | None = None) -> Recipe:
    """Return the recipe of a trial of a learning rate: its model is scored at the shots that the regime is made for.

    Args:
        recipe: The training.
        regime: Its regime.
        settings: The comparison.
        evaluate_every: Steps between scores; None for one after the last step.
    """
    every = evaluate_every if evaluate_every is not None and evaluate_every < recipe.num_steps else "end"
    training = recipe.training.model_copy(
        update={"evaluate_every": every, "evaluate_shots": made_for_shots(settings, regime), "save_every": None}
    )
    return recipe.model_copy(update={"training": training})


def made_for_shots(settings: Comparison, regime: Regime) -> tuple[int, ...]:
    """Return the shot counts at which a learning rate of a regime is judged: those that it is made for."""
    many = settings.training.evaluate_shots
    return {
        "zero_shot": (0,),
        "dedicated": (0,),
        "few_shot": (settings.compare.few_shot_demonstrations,),
        "last_answer": (max(many),),
        "all_answers": many,
        "base": many,
    }[regime]


def _sequences(settings: Comparison, regime: Regime) -> Mapping[str, Any]:
    if regime in ("zero_shot", "dedicated"):
        return _SINGLE_EXAMPLES
    if regime == "few_shot":
        return {"examples_per_episode": settings.compare.few_shot_demonstrations + 1}
    return {}


def _warmup_steps(settings: Comparison, num_steps: int) -> int:
    """Warm up over the same share of a shorter or longer run."""
    share = settings.training.warmup_steps / settings.num_steps
    # One step at the peak is left, or all those of the decay.
    num_left = 1
    if settings.training.schedule == "warmup_stable_decay":
        num_left = max(1, round(settings.training.decay_share * num_steps))
    return max(0, min(int(share * num_steps), num_steps - num_left))
