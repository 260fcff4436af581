"""The file of a comparison: a training recipe, and a section that says what is compared on which tasks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from manyicl.checked import Section
from manyicl.training.recipe import HomePath, Recipe

Regime = Literal["base", "zero_shot", "few_shot", "last_answer", "all_answers", "dedicated"]
REGIMES: tuple[Regime, ...] = get_args(Regime)
# Learning rates that are tried where none are declared, as multiples of training.learning_rate.
DEFAULT_RATES = (1 / 3, 1.0, 3.0)
# What a variant may change: what a packed sequence holds, and which of its answers count.
VARIED_SECTIONS = ("sequences", "objective")
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*", re.ASCII)

Shots = Annotated[tuple[NonNegativeInt, ...], AfterValidator(lambda shots: tuple(sorted(set(shots))))]


class DedicatedSettings(Section):
    """Dedicated models: one for each task, fine-tuned on single examples of it."""

    tasks_per_family: int = Field(
        2, ge=1, description="Seen tasks, and unseen ones, of each family that get dedicated models; drawn by seed."
    )
    num_examples: tuple[PositiveInt, ...] = Field(
        (16, 64, 256),
        min_length=1,
        description="Labelled examples that a dedicated model is trained on; one model each.",
    )
    budget: Literal["each", "share"] = Field(
        "each",
        description="each: every dedicated model may take the whole budget of a regime; share: those of one number of "
        "examples and one seed share it out. Fewer steps are taken where validation tasks are better with fewer.",
    )

    @field_validator("num_examples")
    @classmethod
    def _different(cls, numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(numbers)))


class VariantSettings(Section):
    """An ablation: all_answers with something changed, trained with one seed."""

    set: tuple[str, ...] = Field(
        (),
        description="Changes to the recipe, such as `sequences.examples_per_episode=4`; sequences and objective only.",
    )
    task_share: float = Field(
        1.0, gt=0, le=1, description="Share of the training tasks of each family, at least one of each; drawn by seed."
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Self:
        if not self.set and self.task_share == 1:
            raise ValueError("a variant changes something: give set or task_share")
        for change in self.set:
            if change.partition(".")[0].strip() not in VARIED_SECTIONS:
                sections = " and ".join(VARIED_SECTIONS)
                raise ValueError(f"set: a variant changes keys of {sections}; found {change!r}")
        return self


ReplayedRegime = Literal["zero_shot", "few_shot", "last_answer", "all_answers"]


class ReplaySettings(Section):
    """General text that is mixed into a second training of some regimes."""

    text: HomePath = Field(
        description="Text in UTF-8 of the kind that the model should not forget: a plain file, or .jsonl with a `text` "
        "in each line."
    )
    share: float = Field(0.1, gt=0, lt=1, description="Share of the context that holds text.")
    weight: float = Field(
        1.0, gt=0, le=1, description="Weight of each token of the text in the loss; a lower one where answers are few."
    )
    regimes: tuple[ReplayedRegime, ...] = Field(
        ("all_answers",), min_length=1, description="Regimes that are also trained with it."
    )


class ForgettingSettings(Section):
    """What is measured besides the tasks: before training, along it, and after it."""

    text: HomePath | None = Field(
        None, description="Held-out general text; unset: plain text of the nano world, for builtin:nano alone."
    )
    num_tokens: int = Field(20_000, ge=2, description="Most tokens of the text that are scored, from its beginning.")
    probes: tuple[str, ...] = Field(
        (), description="Tasks of other sources than those that are trained on, and unlike them."
    )
    probe_shots: Shots = Field((0, 8), min_length=1, description="Shot counts of the probe tasks.")


class CompareSettings(Section):
    """What is compared, and how it is evaluated."""

    regimes: tuple[Regime, ...] = Field(
        REGIMES,
        min_length=1,
        description="Ways to adapt the base. base: none; zero_shot: single examples; few_shot: a few demonstrations, "
        "the last answer supervised; last_answer and all_answers: as many examples as fit; dedicated: a model for each "
        "task.",
    )
    unseen: tuple[str, ...] = Field(
        min_length=1, description="Test tasks, of other sources than those in tasks.train and tasks.evaluate."
    )
    num_seen: int | None = Field(
        2, ge=0, description="Training tasks of each family that are evaluated on their test rows; unset: all."
    )
    budget: Literal["tokens", "steps"] = Field(
        "tokens",
        description="tokens: every regime processes training.num_tokens tokens; steps: it takes training.num_steps "
        "optimizer steps.",
    )
    few_shot_demonstrations: int = Field(
        16, ge=1, description="Demonstrations before the supervised answer in few_shot; MetaICL takes 16."
    )
    num_training_seeds: int = Field(
        3, ge=1, le=100, description="Trainings of each regime, with training.seed and the numbers after it."
    )
    learning_rates: tuple[PositiveFloat, ...] | None = Field(
        None,
        min_length=1,
        description="Rates of which the best on the validation tasks is taken, for each regime alone, at a fifth of "
        "its budget; unset: a third of training.learning_rate, it, and three times it. With one, nothing is tuned.",
    )
    shots: Shots = Field((0, 1, 4, 16, 64), min_length=1, description="Shot counts of the curves.")
    num_draws: int = Field(1, ge=1, le=100, description="Draws of demonstrations for each training seed.")
    num_orders: int = Field(1, ge=1, description="Orders in which the demonstrations of each draw are measured.")
    num_queries: int = Field(100, ge=1, description="Test queries for each task; at least 2, for one has no error.")
    dedicated: DedicatedSettings = Field(default_factory=DedicatedSettings, description="The dedicated models.")
    replay: ReplaySettings | None = Field(None, description="A second training of some regimes; unset: none.")
    forgetting: ForgettingSettings | None = Field(None, description="What is measured besides; unset: nothing.")
    predictions: Mapping[str, HomePath] = Field(
        default_factory=dict, description="Answers of other systems by name, each a file of JSON lines."
    )
    variants: Mapping[str, VariantSettings] = Field(
        default_factory=dict,
        description="Ablations of all_answers by name, one training each: `{set: [KEY=VALUE], task_share: 0.5}`.",
    )

    @field_validator("regimes")
    @classmethod
    def _in_their_order(cls, regimes: tuple[Regime, ...]) -> tuple[Regime, ...]:
        return tuple(regime for regime in REGIMES if regime in regimes)

    @field_validator("learning_rates")
    @classmethod
    def _ascending(cls, rates: tuple[float, ...] | None) -> tuple[float, ...] | None:
        return None if rates is None else tuple(sorted(set(rates)))

    @field_validator("variants", "predictions")
    @classmethod
    def _names_of_folders(cls, named: Mapping[str, Any]) -> Mapping[str, Any]:
        for name in named:
            if not _NAME.fullmatch(name):
                raise ValueError(f"a name is of letters, digits, '.', '_' and '-'; found {name!r}")
        return named

    @model_validator(mode="after")
    def _variants_of_a_regime(self) -> Self:
        if self.variants and "all_answers" not in self.regimes:
            raise ValueError("variants change all_answers, which is not among the regimes; add it, or drop them")
        if "dedicated" not in self.regimes and self.dedicated != DedicatedSettings():
            raise ValueError("dedicated has no effect, for it is not among the regimes; leave one of them out")
        for regime in self.replay.regimes if self.replay else ():
            if regime not in self.regimes:
                raise ValueError(f"replay.regimes names {regime}, which is not among the regimes; add it, or drop it")
        return self


class Comparison(Recipe):
    """A training recipe with a section `compare`.

    `tasks.train` are the training tasks, `tasks.evaluate` the validation tasks, on whose training rows learning rates
    are chosen, `compare.unseen` the test tasks. `sequences` and `objective` are those of all_answers; other regimes
    change in them what makes them what they are.
    """

    compare: CompareSettings

    @model_validator(mode="after")
    def _leaves_to_the_regimes_what_is_theirs(self) -> Self:
        training, compare = self.training, self.compare
        if self.model.base is None:
            raise ValueError("a comparison adapts one base in several ways; give model.base, not from_scratch")
        if isinstance(self.sequences.examples_per_episode, int):
            raise ValueError(
                "sequences.examples_per_episode says how many examples the many-shot regimes take: fill, or a range; "
                f"found {self.sequences.examples_per_episode}"
            )
        if self.sequences.replay is not None:
            raise ValueError(
                "sequences.replay would be in all regimes; give compare.replay, which adds to some of them"
            )
        if self.objective.supervise != "all_answers":
            raise ValueError(
                "objective.supervise is what the regimes differ in; leave it out, and choose them with compare.regimes"
            )
        if training.evaluate_every != "end":
            raise ValueError(
                "training.evaluate_every chooses the best model of a run, and a comparison takes the last one of each, "
                "so that none has a choice that another has not; leave it out"
            )
        given, needed = ("num_steps", "num_tokens") if compare.budget == "tokens" else ("num_tokens", "num_steps")
        if getattr(training, needed) is None:
            raise ValueError(
                f"compare.budget is {compare.budget}, so the budget of each regime is training.{needed}; found "
                f"training.{given}"
            )
        if self.is_tuned and not self.tasks.evaluate:
            raise ValueError(
                "learning rates are chosen on tasks.evaluate, which names no task; name some, or give one rate in "
                "compare.learning_rates"
            )
        return self

    @property
    def learning_rates(self) -> tuple[float, ...]:
        """Learning rates that are tried, ascending."""
        default = tuple(factor * self.training.learning_rate for factor in DEFAULT_RATES)
        return self.compare.learning_rates or default

    @property
    def is_tuned(self) -> bool:
        """Whether there is anything to choose, and something to train."""
        return len(self.learning_rates) > 1 and self.compare.regimes != ("base",)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Training seeds."""
        first = self.training.seed
        return tuple(range(first, first + self.compare.num_training_seeds))

    @property
    def shots(self) -> tuple[int, ...]:
        """Shot counts of the curves, with those that the regimes are made for: none, and those of few_shot."""
        compare = self.compare
        made_for = {0} | ({compare.few_shot_demonstrations} if "few_shot" in compare.regimes else set())
        return tuple(sorted(made_for.union(compare.shots)))
