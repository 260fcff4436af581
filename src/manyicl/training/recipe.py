"""The recipe of a run as one checked object: a YAML file that can be read from top to bottom."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from manyicl.checked import Section, UniqueKeyLoader, parse_yaml, read_text, validated
from manyicl.episodes.replay import ReplaySettings
from manyicl.episodes.sampling import EpisodeSettings, Mixture
from manyicl.episodes.text_format import FormatSettings
from manyicl.errors import UserError, pluralized, quoted, shortened
from manyicl.paths import exists, nearest_path

RENAMED_KEYS = {"rows": "sequences", "training.rows_per_step": "training.sequences_per_step"}


# A leading ~ is the home folder of the user.
HomePath = Annotated[Path, AfterValidator(Path.expanduser)]
HomeText = Annotated[str, AfterValidator(os.path.expanduser)]
DECAY_SHARE = 0.2


class LoraSettings(Section):
    """A low-rank adapter over a base that stays as it is."""

    rank: int = Field(16, ge=1, description="Rank of each update.")
    alpha: int = Field(32, ge=1, description="Updates are scaled by alpha / rank.")
    dropout: float = Field(0.0, ge=0, lt=1, description="Share of its inputs that an update drops in training.")
    target_modules: Literal["all-linear"] | tuple[str, ...] = Field(
        "all-linear", description="Names of the linear layers that get an update; all but the head by default."
    )
    layers: int | None = Field(
        None,
        ge=1,
        description="Number of uppermost decoder layers that get an update; unset: all. Nothing is kept of the layers "
        "below, and no gradient is computed there: less time and memory, another result.",
    )


class TokenizerSettings(Section):
    """A tokenizer trained on the training rows of the tasks."""

    kind: Literal["word", "byte_bpe"] = Field(
        "byte_bpe", description="word: one token per word, for closed vocabularies; byte_bpe: any text, losslessly."
    )
    vocabulary_size: int = Field(
        4096, ge=8, description="Maximum number of entries, with special tokens; byte_bpe needs 300 or more."
    )

    @model_validator(mode="after")
    def _holds_the_byte_alphabet(self) -> Self:
        if self.kind == "byte_bpe" and self.vocabulary_size < 300:
            raise ValueError(f"vocabulary_size is {self.vocabulary_size}; byte_bpe needs at least 300 for all bytes")
        return self


class FromScratchSettings(Section):
    """A new model of any decoder architecture in transformers, with its own tokenizer."""

    architecture: str = Field(description="A model_type of transformers, such as llama, mistral, qwen3.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys of its transformers config; vocabulary, special tokens and context are derived.",
    )
    initialization: Literal["default", "structured"] = Field(
        "default",
        description="default: the library's weights; structured: attention heads that attend back and match.",
    )
    tokenizer: TokenizerSettings = Field(default_factory=TokenizerSettings, description="How its tokenizer is trained.")


class ModelSettings(Section):
    """Which weights are trained, starting from what."""

    base: HomeText | None = Field(
        None, description="A folder, .gguf file, hf:owner/name, or builtin:nano, one, smollm2."
    )
    from_scratch: FromScratchSettings | None = Field(None, description="A new model instead of a base.")
    lora: LoraSettings | None = Field(None, description="Train an adapter; unset trains all weights.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type in which the weights are held; without an adapter, bfloat16 is also what AdamW updates, so "
        "that small updates are rounded away: prefer float32 with training.bf16.",
    )
    quantize: Literal["4bit"] | None = Field(
        None,
        description="4bit: hold the linear layers of the base in 4 bits under an adapter (QLoRA); needs bitsandbytes "
        "and a CUDA GPU.",
    )
    attention: Literal["split", "flash"] = Field(
        "split",
        description="split: each episode of a sequence through torch's own kernels; flash: all in one call of "
        "flash-attn, on a CUDA GPU in bfloat16.",
    )

    @model_validator(mode="after")
    def _keys_go_together(self) -> Self:
        if (self.base is None) == (self.from_scratch is None):
            found = "both" if self.base is not None else "neither"
            raise ValueError(f"give either base or from_scratch; found {found}")
        if self.from_scratch is not None and self.lora is not None:
            raise ValueError("from_scratch trains all weights; an adapter over it would have no base. Remove lora")
        if self.quantize is not None and self.lora is None:
            remedy = "Remove quantize" if self.from_scratch is not None else "Give lora, or remove quantize"
            raise ValueError(f"quantize: {self.quantize} freezes the base, so only an adapter can be trained. {remedy}")
        if self.attention == "flash" and self.dtype != "bfloat16":
            remedy = "Use dtype: bfloat16, or attention: split"
            raise ValueError(f"attention: flash computes in 16 bits; found dtype {self.dtype}. {remedy}")
        return self


class TaskSettings(Section):
    """Which tasks are trained on, and which are only evaluated."""

    train: tuple[str, ...] = Field(
        min_length=1,
        description="Task folders, task.yaml files, catalog:NAME or globs, relative to the working directory.",
    )
    evaluate: tuple[str, ...] = Field(
        (), description="Held-out tasks, evaluated during training; sources other than those of the training tasks."
    )
    data_root: HomePath | None = Field(
        None, description="Folder of the data that is not found next to its task.yaml, and of copies of Hub datasets."
    )
    mixture: Mixture = Field(default_factory=Mixture, description="How often each training task is drawn.")


class SequenceSettings(EpisodeSettings):
    """What one packed sequence holds: episodes of whole shots, until the context is full."""

    max_context_tokens: int = Field(
        2048, ge=8, description="Tokens of a packed sequence, and the model's trained context."
    )
    replay: ReplaySettings | None = Field(None, description="General text among the episodes; unset: none.")

    @model_validator(mode="after")
    def _pieces_of_text_fit(self) -> Self:
        segment_tokens = self.replay and self.replay.segment_tokens
        if segment_tokens and segment_tokens > self.max_context_tokens:
            raise ValueError(
                f"replay.segment_tokens is {segment_tokens:,}, max_context_tokens {self.max_context_tokens:,}; use "
                "shorter pieces, or leave segment_tokens out"
            )
        return self


class ObjectiveSettings(Section):
    """Which tokens are targets, and what each weighs."""

    supervise: Literal["all_answers", "last_answer", "every_token"] = Field(
        "all_answers",
        description="all_answers: the method; last_answer: few-shot tuning; every_token: language modelling.",
    )
    weighting: Literal["token", "answer"] = Field(
        "token", description="token: each target counts 1; answer: each answer does, spread over its tokens."
    )
    context_weight: float = Field(
        0.0, ge=0, le=1, description="Weight of each token that is not a supervised answer; 0 ignores them."
    )

    @model_validator(mode="after")
    def _every_token_counts_the_same(self) -> Self:
        if self.supervise == "every_token" and (self.weighting == "answer" or self.context_weight):
            remedy = "leave out weighting and context_weight, or choose all_answers with a context_weight"
            raise ValueError(f"supervise: every_token weighs every token 1; {remedy}")
        return self


class TrainingSettings(Section):
    """How long and how fast."""

    num_tokens: int | None = Field(
        None, ge=1, le=10**15, description="Length of the run in context tokens, rounded up to whole steps."
    )
    num_steps: int | None = Field(None, ge=1, description="Length of the run in optimizer steps.")
    sequences_per_step: int = Field(
        8, ge=1, description="Packed sequences in one optimizer step, over all processes; each is one micro-batch."
    )
    learning_rate: float = Field(gt=0, description="Peak rate of AdamW.")
    schedule: Literal["linear", "cosine", "constant", "warmup_stable_decay"] = Field(
        "linear", description="How the learning rate falls after the warm-up, if it does."
    )
    warmup_steps: int = Field(0, ge=0, description="Steps over which the rate rises from zero; part of the run.")
    decay_share: float = Field(
        DECAY_SHARE, gt=0, le=1, description="Share of the steps, at the end, in which warmup_stable_decay falls."
    )
    weight_decay: float = Field(0.0, ge=0, description="Weight decay of matrices; biases and norms never decay.")
    adam_betas: tuple[float, float] = Field(
        (0.9, 0.95), description="Decay of the running averages of the gradient and of its square."
    )
    max_grad_norm: float = Field(1.0, ge=0, description="Larger gradients are scaled to this norm; 0 never scales.")
    bf16: bool = Field(False, description="Compute in bfloat16 (autocast) over float32 weights.")
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations in the backward pass: less memory, about a third more time."
    )
    liger: bool = Field(
        False,
        description="Use Liger's kernels for norms, rotary positions and gates, but not its losses. Needs "
        "liger-kernel and a CUDA GPU.",
    )
    log_every: int = Field(10, ge=1, description="Steps between log lines.")
    evaluate_every: Annotated[int, Field(ge=1)] | Literal["end"] | None = Field(
        "end",
        description="A whole number of steps, at least 1, between evaluations on tasks.evaluate; end: only after the "
        "last step; null: never.",
    )
    evaluate_shots: tuple[int, ...] = Field(
        (0, 8),
        min_length=1,
        description="Shot counts at which held-out tasks are evaluated; the mean score picks the best model. "
        "`tasks_below_N_shots` in the log counts those that have, or fit, fewer.",
    )
    evaluate_queries: int = Field(
        50,
        ge=1,
        description="Validation queries per held-out task, at most half of its training rows. They come from the "
        "training side, whose other rows are the demonstrations; test rows stay untouched for `manyicl evaluate`.",
    )
    save_every: int | None = Field(
        None, ge=1, description="Steps between checkpoints; each evaluation and the last step always make one."
    )
    keep_checkpoints: int = Field(
        2, ge=2, description="Number of newest checkpoints to keep; the best one of each is kept, too."
    )
    seed: int = Field(0, ge=0, le=2**32 - 1, description="Seed of the packed sequences, new weights and dropout.")
    num_threads: int | None = Field(None, ge=1, description="CPU threads of each process; unset: torch's choice.")
    num_processes: int | None = Field(
        None,
        ge=1,
        description="Processes that `manyicl train` starts on a CPU to share each step; unset: one per core where that "
        "pays and memory holds them, as below.",
    )

    @field_validator("adam_betas")
    @classmethod
    def _betas_below_one(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"both must lie in [0, 1); found {list(betas)}")
        return betas

    @field_validator("evaluate_shots")
    @classmethod
    def _shots_are_counts(cls, shots: tuple[int, ...]) -> tuple[int, ...]:
        if min(shots) < 0 or len(set(shots)) < len(shots):
            raise ValueError(f"expected different counts of at least 0; found {list(shots)}")
        return shots

    @model_validator(mode="after")
    def _length_and_schedule_are_clear(self) -> Self:
        if (self.num_tokens is None) == (self.num_steps is None):
            found = "both; set the other to null" if self.num_steps is not None else "neither"
            raise ValueError(f"give either num_tokens or num_steps; found {found}")
        if self.num_processes is not None and self.sequences_per_step % self.num_processes:
            raise ValueError(
                f"num_processes is {self.num_processes} and they share the {self.sequences_per_step} sequences of a "
                "step; use a number that divides sequences_per_step"
            )
        if self.schedule != "warmup_stable_decay" and self.decay_share != DECAY_SHARE:
            raise ValueError(f"decay_share has no effect with schedule: {self.schedule}; leave it out")
        return self


class Recipe(Section):
    """One run: which model, which tasks, which packed sequences, which targets, how long, and where it is written.

    Examples:
        >>> recipe = Recipe.parse(
        ...     "{model: {base: 'hf:owner/name', lora: {rank: 8}}, tasks: {train: [tasks/*]}, output: run, "
        ...     "training: {num_tokens: 100_000, learning_rate: 1e-4}}"
        ... )
        >>> recipe.num_steps, recipe.sequences.max_context_tokens, recipe.objective.supervise
        (7, 2048, 'all_answers')
    """

    model: ModelSettings
    tasks: TaskSettings
    sequences: SequenceSettings = Field(default_factory=SequenceSettings)
    format: FormatSettings = Field(default_factory=FormatSettings)
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    training: TrainingSettings
    output: HomePath = Field(description="Folder of the finished model, its logs and checkpoints.")

    @field_validator("format")
    @classmethod
    def _template_at_home(cls, settings: FormatSettings) -> FormatSettings:
        template = settings.template and settings.template.expanduser()
        return settings.model_copy(update={"template": template})

    @model_validator(mode="after")
    def _sections_go_together(self) -> Self:
        training, fields = self.training, TrainingSettings.model_fields
        every, evaluations, warmup = training.save_every, training.evaluate_every, training.warmup_steps
        if self.tasks.evaluate and every and isinstance(evaluations, int) and every % evaluations == 0:
            raise ValueError(
                f"training.save_every is {every}, training.evaluate_every {evaluations}; each evaluation makes a "
                "checkpoint already, so that the best model has one. Use a smaller save_every for more, or leave it out"
            )
        values = {key: getattr(training, key) for key in fields if key.startswith("evaluate_")}
        unused = [f"training.{key}" for key, value in values.items() if value not in (None, fields[key].default)]
        if unused and not self.tasks.evaluate:
            raise ValueError(
                f"without tasks.evaluate nothing is evaluated, so {' and '.join(unused)} would have no effect; name "
                "held-out tasks, or leave that out"
            )
        # The rate of a step is set before it: the first step after warm-up has the peak.
        if warmup + max(self.num_decay_steps, 1) > self.num_steps:
            falls = f" and warmup_stable_decay falls over {self.num_decay_steps:,}" if self.num_decay_steps else ""
            raise ValueError(
                f"training.warmup_steps is {warmup:,}{falls}, but the run has {pluralized(self.num_steps, 'step')}, so "
                "the rate never reaches its peak; use fewer, or a longer run"
            )
        if self.format.kind == "chat" and self.model.from_scratch is not None:
            raise ValueError(
                "format.kind: chat takes turns from the chat template of an instruct model; found model.from_scratch. "
                "Use kind: plain, or a base"
            )
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.training.num_steps is not None:
            return self.training.num_steps
        assert self.training.num_tokens is not None  # one of the two, checked above
        return -(-self.training.num_tokens // (self.training.sequences_per_step * self.sequences.max_context_tokens))

    @property
    def num_sequences(self) -> int:
        """Packed sequences of the run, over all processes."""
        return self.num_steps * self.training.sequences_per_step

    @property
    def num_decay_steps(self) -> int:
        """Steps at the end in which the schedule warmup_stable_decay falls; 0 with another schedule."""
        if self.training.schedule != "warmup_stable_decay":
            return 0
        return max(1, round(self.training.decay_share * self.num_steps))

    @classmethod
    def read(cls, path: Path | str, overrides: Sequence[str] = ()) -> Self:
        """Read a YAML file, and put ``section.key=value`` overrides over it.

        Raises:
            UserError: If the file is missing or does not parse, or a key or value is wrong.
        """
        path = Path(path)
        if not exists(path):
            raise UserError("missing_file", "there is no recipe here", remedy=nearest_path(path).strip(), file=path)
        if not path.is_file():
            raise UserError("not_a_file", "this is no file", expected="a recipe, one YAML file", file=path)
        return cls.parse(read_text(path), str(path), overrides)

    @classmethod
    def parse(cls, text: str, name: str = "recipe", overrides: Sequence[str] = ()) -> Self:
        """Check the text of a recipe; ``name`` is how errors call it.

        Raises:
            UserError: If it does not parse, or a key or value is wrong.
        """
        content = parse_yaml(text, name, _Loader)
        if not isinstance(content, dict):
            keys = f"the keys {', '.join(cls.model_fields)}"
            raise UserError("no_mapping", "this is no recipe", expected=keys, found=quoted(content), file=name)
        for override in overrides:
            content = _override(content, override)
        _require_new_names(content, name)
        return validated(cls, content, name)

    def to_yaml(self) -> str:
        """Write every value out, defaults included, in the order of the fields."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _Loader(UniqueKeyLoader):
    """YAML in which 1e-4 is a number, as in YAML 1.2, and 2024-01-01 and = are texts."""

    yaml_implicit_resolvers: dict[str, Any] = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":timestamp", ":value"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def _require_new_names(content: Mapping[str, Any], name: str) -> None:
    """Refuse keys under names that they no longer have, and say what they are called now."""
    for old, new in RENAMED_KEYS.items():
        section, _, key = old.rpartition(".")
        inner = content.get(section) if section else content
        if isinstance(inner, Mapping) and key in inner:
            what = f"the key {old!r} is called {new!r} now"
            raise UserError("renamed_key", what, remedy="Rename it.", file=name, field=old)


def _override(content: Mapping[str, Any], override: str) -> dict[str, Any]:
    """Return ``content`` with one ``section.key=value`` put over it; the value is YAML."""
    dotted, equals, value = override.partition("=")
    keys = dotted.strip().split(".")
    place = f"--set {shortened(' '.join(override.split()))}"
    if not equals or not all(keys):
        example = "section.key=value, such as training.learning_rate=1e-4"
        raise UserError("wrong_override", "this sets nothing", expected=example, file=place)
    changed = dict(content)
    inner = changed
    for key in keys[:-1]:
        below = inner.get(key)
        if below is not None and not isinstance(below, dict):
            what = f"{key!r} is {quoted(below)}, which has no keys of its own"
            raise UserError("wrong_override", what, file=place, field=dotted)
        inner[key] = dict(below or {})
        inner = inner[key]
    inner[keys[-1]] = parse_yaml(value, place, _Loader)
    return changed
