"""Running totals of a run, saved in its checkpoints: packed sequences, dropped examples, losses."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.trainer_callback import ExportableState


@dataclass(frozen=True, slots=True)
class SequenceCounts:
    """Counts over some packed sequences.

    Attributes:
        num_sequences: Number of sequences.
        num_tokens: Tokens of all their episodes, and of replayed text.
        num_unused_tokens: Positions of their contexts that hold no token.
        num_answers: Supervised answers.
        num_shots_dropped: Shots that were drawn and did not fit.
        num_shots_too_long: Shots that were skipped, because not even an empty context would hold them.
        most_shots: Most demonstrations before an answer.
        num_replayed_tokens: Tokens of replayed text.
    """

    num_sequences: int = 0
    num_tokens: int = 0
    num_unused_tokens: int = 0
    num_answers: int = 0
    num_shots_dropped: int = 0
    num_shots_too_long: int = 0
    most_shots: int = 0
    num_replayed_tokens: int = 0

    def __add__(self, other: SequenceCounts) -> SequenceCounts:
        """Count both."""
        sums = {field.name: getattr(self, field.name) + getattr(other, field.name) for field in fields(self)}
        return SequenceCounts(**{**sums, "most_shots": max(self.most_shots, other.most_shots)})

    def sentence(self) -> str:
        """Say what the sequences held, and what was dropped."""
        replayed = (
            f" {self.num_replayed_tokens:,} of the tokens were replayed text." if self.num_replayed_tokens else ""
        )
        unused_share = self.num_unused_tokens / max(self.num_tokens + self.num_unused_tokens, 1)
        return (
            f"Trained on {self.num_sequences:,} sequences with {self.num_tokens:,} tokens and {self.num_answers:,} "
            f"supervised answers, after up to {self.most_shots:,} shots. {self.num_shots_dropped:,} shots were dropped "
            f"(did not fit) and {self.num_shots_too_long:,} skipped (longer than a whole sequence); {unused_share:.1%} "
            f"of the context stayed unused.{replayed}"
        )


class RunCounts(TrainerCallback, ExportableState):
    """The counts of a whole run, kept in its checkpoints, so that a resumed run knows those of before."""

    def __init__(self) -> None:
        self.total = SequenceCounts()

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": {"total": asdict(self.total)}}

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Continue from the counts of the checkpoint; transformers leaves reading them to us."""
        # In a new run these are our own zeros. The entry must exist, or saving a checkpoint fails.
        saved: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        self.total = SequenceCounts(**saved.setdefault(type(self).__name__, self.state())["attributes"]["total"])


class RunLoss(TrainerCallback, ExportableState):
    """Sums of the logged losses, kept in checkpoints, so that a resumed run logs what another one does.

    Attributes:
        since_log: Summed loss of the steps since the last log line.
        logged_step: Step after which that line was written.
        before_log: Summed loss of all steps up to that line.
    """

    def __init__(self) -> None:
        self.since_log = 0.0
        self.logged_step = 0
        self.before_log = 0.0

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"args": {}, "attributes": dict(vars(self))}

    def restore(self, state: TrainerState) -> None:
        """Restore what the checkpoint kept; without one, or with one of an older version, start at its step."""
        saved: dict[str, Any] = state.stateful_callbacks  # type: ignore[assignment]
        self.logged_step = state.global_step
        vars(self).update(saved.setdefault(type(self).__name__, self.state())["attributes"])
