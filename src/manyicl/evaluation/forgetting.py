"""What fine-tuning cost elsewhere: the loss on general text that is held out, and scores on probe tasks.

The text is cut into windows that follow each other without overlap. Each is run through the model by itself, as one
episode of a packed sequence is in training, and every token but the first of a window is predicted from those before it
in its window. So a token has half a window before it on average; figures are comparable where text, tokenizer, number
of tokens and length of the windows are the same. Nats per byte are comparable across tokenizers, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

from pydantic import BaseModel, ConfigDict, Field

from manyicl.episodes.general_text import GeneralText, read_general_text
from manyicl.episodes.text_tokenizer import TextTokenizer
from manyicl.errors import UserError
from manyicl.evaluation.comparison.records import Forgetting
from manyicl.evaluation.held_out import ShareOut, held_out_measure, in_this_process
from manyicl.tasks.nanoworld.text import nano_text
from manyicl.tasks.task import Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from manyicl.engine.engine import EngineOptions
    from manyicl.model.load import LoadedModel

NANO = "builtin:nano"
# Names of the figures in the log of a training; that of a probe task is followed by its name.
TOKEN_FIGURE, BYTE_FIGURE, COUNT_FIGURE, PROBE_FIGURE = "nats_per_token", "nats_per_byte", "num_text_tokens", "probe_"

Measure = Callable[["LoadedModel"], Mapping[str, float]]


class ForgettingSettings(BaseModel):
    """How much is measured. The same settings before, along and after training make figures comparable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_tokens: int = Field(20_000, ge=2, description="Most tokens of the text that are looked at, from its beginning.")
    window_tokens: int = Field(2048, ge=2, description="Tokens of a window: those of the trained context.")
    probe_shots: tuple[int, ...] = Field((0, 8), min_length=1, description="Shot counts of the probe tasks.")
    probe_queries: int = Field(100, ge=1, description="Test queries of each probe task.")
    seed: int = Field(0, description="Seed of the choice of queries and demonstrations.")


def held_out_text(path: Path | str | None, base: str | None = NANO, field: str | None = None) -> GeneralText:
    """Return the text that is held out: that of a file, or for the nano base plain text of its own world.

    Args:
        path: A file of text in UTF-8, or ``.jsonl`` with a ``text`` in each line.
        base: The model that training begins from.
        field: The key that names the file, for errors.

    Raises:
        UserError: If the file is missing, empty or not UTF-8, or no file is given for another base.
    """
    if path is not None:
        return read_general_text(path, field)
    if base != NANO:
        what = f"no general text is given, and only {NANO} has one of its own"
        remedy = "Name a file of text in the language of the model, of which it is not trained on any part."
        raise UserError("missing_text", what, found=f"base {base}", remedy=remedy, field=field)
    return GeneralText.of(nano_text("held_out"), "plain text of the nano world")


def measure_forgetting(
    loaded: LoadedModel,
    settings: ForgettingSettings,
    probes: Sequence[Task] = (),
    step: int = 0,
    *,
    text: GeneralText | None = None,
    share_out: ShareOut = in_this_process,
    **options: Unpack[EngineOptions],
) -> Forgetting:
    """Measure a model on general text and on probe tasks.

    Args:
        loaded: The model: the base, one in training, or a fine-tuned one.
        settings: How much is measured.
        probes: Tasks that are neither trained on nor similar to those; their test rows are the queries.
        step: Optimizer steps before this moment.
        text: The text; None to leave it out.
        share_out: Gives each of several processes some windows and tasks; the figures are those of one process.
        **options: How probe tasks are prompted, as for `Engine`: a base must be prompted as what is trained from it. A
            fine-tuned model is given contexts of its training, unless ``max_context_tokens`` says otherwise.

    Raises:
        UserError: If the tokenizer does not know the words of the text, or a probe task cannot be evaluated.
    """
    scored = score_text(loaded, text, settings, share_out=share_out) if text else None
    scores = share_out(probes, lambda own: _probe_scores(loaded, own, settings, options)) if probes else ()
    return Forgetting(
        step=step,
        nats_per_token=scored.nats / scored.num_tokens if scored else None,
        nats_per_byte=scored.nats / scored.num_bytes if scored else None,
        num_tokens=scored.num_tokens if scored else None,
        text_sha256=text.sha256 if text else None,
        probes=dict(sorted(scores)),
    )


class TextScore(NamedTuple):
    """The loss on a text.

    Attributes:
        nats: Summed over all tokens that were scored.
        num_tokens: How many these are.
        num_bytes: Bytes in UTF-8 of their text.
    """

    nats: float
    num_tokens: int
    num_bytes: int


def score_text(
    loaded: LoadedModel, text: GeneralText, settings: ForgettingSettings, *, share_out: ShareOut = in_this_process
) -> TextScore:
    """Score the beginning of a text, window by window.

    Raises:
        UserError: If the tokenizer does not know most of its words, or it has fewer than two tokens.
    """
    tokenizer = TextTokenizer(loaded.tokenizer)
    tokenizer.require_known_words(text)
    windows = text_windows(tokenizer, text, settings)
    if not windows:
        what = "the text is too short to be scored"
        raise UserError("text_too_short", what, expected="at least 2 tokens", file=text.name)
    num_bos = len(tokenizer.bos_ids)

    def nats_of(own: Sequence[tuple[int, ...]]) -> list[float]:
        return [window_nats(loaded.model, (*tokenizer.bos_ids, *window), num_bos + 1) for window in own]

    # Summed without rounding, so that the order in which processes report does not matter.
    nats = fsum(share_out(windows, nats_of))
    num_bytes = sum(tokenizer.num_bytes(window) - tokenizer.num_bytes(window[:1]) for window in windows)
    return TextScore(nats, sum(len(window) - 1 for window in windows), num_bytes)


def text_windows(tokenizer: TextTokenizer, text: GeneralText, settings: ForgettingSettings) -> list[tuple[int, ...]]:
    """Cut the first tokens of a text into windows; the last may be shorter, and one of a single token is left off."""
    token_ids = tokenizer.ids_from(text.text, 0, settings.num_tokens)
    length = max(settings.window_tokens - len(tokenizer.bos_ids), 2)
    windows = [token_ids[start : start + length] for start in range(0, len(token_ids), length)]
    return [window for window in windows if len(window) > 1]


def window_nats(model: PreTrainedModel, token_ids: Sequence[int], num_given: int) -> float:
    """Sum the loss of the tokens of one window after the first ``num_given``, in nats.

    Logits are made for a part of the positions at a time, in memory that is bounded; a part needs no later tokens.
    """
    import torch

    from manyicl.model.attention import packed_arguments
    from manyicl.training.loss import most_logits_at_once

    most_logits = most_logits_at_once(model.config.get_text_config().vocab_size)
    ids = torch.tensor([token_ids], device=model.device)
    nats = []
    was_training = model.training
    model.eval()
    try:
        for start in range(num_given, len(token_ids), most_logits):
            end = min(start + most_logits, len(token_ids))
            with torch.no_grad():
                logits = model(
                    input_ids=ids[:, : end - 1],
                    logits_to_keep=torch.arange(start - 1, end - 1, device=model.device),
                    use_cache=False,
                    **packed_arguments((end - 1,), model.device),
                ).logits[0]
            losses = torch.nn.functional.cross_entropy(logits.float(), ids[0, start:end], reduction="none")
            nats.append(losses.double().sum().item())
    finally:
        model.train(was_training)
    return fsum(nats)


def _probe_scores(
    loaded: LoadedModel, probes: Sequence[Task], settings: ForgettingSettings, options: EngineOptions
) -> list[tuple[str, float]]:
    """Score each probe task: the mean over its shot counts."""
    from manyicl.engine.engine import Engine
    from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves

    if not probes:
        return []
    if loaded.manifest is not None:
        options = {"max_context_tokens": loaded.manifest.max_context_tokens, **options}
    evaluation = EvaluationSettings(
        shots=settings.probe_shots,
        num_seeds=1,
        num_queries=settings.probe_queries,
        seed=settings.seed,
        keep_confidence=False,
    )
    with TemporaryDirectory() as folder:
        results = measure_shot_curves(Engine.local(loaded, **options), probes, folder, evaluation).results
    return [(task.name, fmean(one.score for one in results if one.task == task.name)) for task in probes]


@dataclass(frozen=True)
class MeasureWithForgetting:
    """What `ensure_trained` is given to measure a model in training on held-out tasks, and what it forgets.

    The figures are in the log of the run: see `forgetting_of_log`. Held-out tasks pick the model, these figures do not.

    Attributes:
        settings: How much is measured.
        text: The held-out text; None to leave it out.
        probes: Probe tasks.
        held_out: Makes what is measured on held-out tasks; None to measure nothing on them: the score is 0 throughout
            then, so that the model of the last step is kept.
    """

    settings: ForgettingSettings
    text: GeneralText | None = None
    probes: tuple[Task, ...] = ()
    held_out: Callable[..., Measure] | None = field(default=held_out_measure)

    def __call__(self, tasks: Sequence[Task], *, share_out: ShareOut = in_this_process, **options: Any) -> Measure:
        """Return what is measured of a model; arguments are those of `held_out_measure`."""
        of_tasks = self.held_out(tasks, share_out=share_out, **options) if self.held_out else _no_score

        def measure(loaded: LoadedModel) -> Mapping[str, float]:
            found = measure_forgetting(loaded, self.settings, self.probes, text=self.text, share_out=share_out)
            return {**of_tasks(loaded), **figures_of(found)}

        return measure


def _no_score(loaded: LoadedModel) -> Mapping[str, float]:
    return {"score": 0.0}


def figures_of(found: Forgetting) -> dict[str, float]:
    """Return what is logged of a measurement: numbers alone."""
    names = {TOKEN_FIGURE: found.nats_per_token, BYTE_FIGURE: found.nats_per_byte, COUNT_FIGURE: found.num_tokens}
    figures = {name: float(value) for name, value in names.items() if value is not None}
    return figures | {f"{PROBE_FIGURE}{task}": score for task, score in found.probes.items()}


def forgetting_of_log(log: Iterable[Mapping[str, Any]], text_sha256: str | None = None) -> tuple[Forgetting, ...]:
    """Read back what was measured along a training.

    Args:
        log: ``log_history`` of a ``trainer_state.json``.
        text_sha256: Hash of the text, which is not in the log.
    """
    return tuple(found for line in log if (found := _forgetting_of(line, text_sha256)) is not None)


def _forgetting_of(line: Mapping[str, Any], text_sha256: str | None) -> Forgetting | None:
    figures = {name.removeprefix("eval_"): value for name, value in line.items() if name.startswith("eval_")}
    probes = {
        name.removeprefix(PROBE_FIGURE): score for name, score in figures.items() if name.startswith(PROBE_FIGURE)
    }
    if TOKEN_FIGURE not in figures and not probes:
        return None
    has_text = TOKEN_FIGURE in figures
    return Forgetting(
        step=int(line["step"]),
        nats_per_token=figures.get(TOKEN_FIGURE),
        nats_per_byte=figures.get(BYTE_FIGURE),
        num_tokens=int(figures[COUNT_FIGURE]) if has_text else None,
        text_sha256=text_sha256 if has_text else None,
        probes=probes,
    )


def read_forgetting(run: Path | str, text_sha256: str | None = None) -> tuple[Forgetting, ...]:
    """Read what was measured along a training from the newest checkpoint of its run folder; empty where nothing was.

    Args:
        run: Folder of the run.
        text_sha256: Hash of the text, which is not in the log.
    """
    found = {
        int(name[1]): folder / "trainer_state.json"
        for folder in Path(run, "checkpoints").glob("checkpoint-*")
        if (name := re.fullmatch(r"checkpoint-(\d+)", folder.name))
    }
    if not found:
        return ()
    state = json.loads(found[max(found)].read_text(encoding="utf-8"))
    return forgetting_of_log(state["log_history"], text_sha256)
