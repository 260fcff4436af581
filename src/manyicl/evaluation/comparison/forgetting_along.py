"""What a comparison measures besides its tasks: general text and probe tasks, before, along and after training."""

from __future__ import annotations

from transformers import TrainerState

from manyicl.episodes.general_text import GeneralText
from manyicl.episodes.text_format import AnyFormat
from manyicl.evaluation.comparison.records import Forgetting
from manyicl.evaluation.comparison.roles import ComparisonTasks
from manyicl.evaluation.comparison.settings import Comparison
from manyicl.evaluation.forgetting import (
    ForgettingSettings,
    MeasureWithForgetting,
    forgetting_of_log,
    held_out_text,
    measure_forgetting,
)
from manyicl.model.load import LoadedModel


class ForgettingOfModels:
    """Measures the models of a comparison alike."""

    def __init__(self, settings: Comparison, tasks: ComparisonTasks) -> None:
        """Read the text.

        Raises:
            UserError: If it cannot be read, or is needed and not given.
        """
        compare = settings.compare.forgetting
        assert compare is not None
        self.settings = ForgettingSettings(
            num_tokens=compare.num_tokens,
            window_tokens=settings.sequences.max_context_tokens,
            probe_shots=compare.probe_shots,
            probe_queries=settings.compare.num_queries,
            seed=settings.training.seed,
        )
        self.text: GeneralText = held_out_text(compare.text, settings.model.base, "compare.forgetting.text")
        self.probes = tasks.probes
        self.max_context_tokens = settings.sequences.max_context_tokens

    @property
    def along(self) -> MeasureWithForgetting:
        """What `ensure_trained` is given to measure a model on its way; it keeps the last model."""
        return MeasureWithForgetting(self.settings, self.text, self.probes, held_out=None)

    def of_log(self, history: TrainerState) -> tuple[Forgetting, ...]:
        """Read back what was measured along a training."""
        return forgetting_of_log(history.log_history, self.text.sha256)

    def of_base(self, loaded: LoadedModel, text_format: AnyFormat) -> tuple[Forgetting, ...]:
        """Measure the base, which is prompted as the models that come from it are."""
        found = measure_forgetting(
            loaded,
            self.settings,
            self.probes,
            text=self.text,
            text_format=text_format,
            max_context_tokens=self.max_context_tokens,
        )
        return (found,)
