"""Model or adapter -> one standard folder that other engines load, with a file that says how to prompt it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manyicl.activity import Activity
from manyicl.atomic import folder_written_atomically
from manyicl.episodes.encoding import Encoder
from manyicl.errors import MachineError, UserError
from manyicl.library_errors import reason
from manyicl.model.load import (
    DTYPES,
    LoadedModel,
    fingerprint,
    load_model,
    max_positions,
    model_config,
    require_dtype,
)
from manyicl.model.manifest import format_to_ask_in
from manyicl.model.merging import merge_adapter
from manyicl.model.prompt_guide import ExportFacts, example_prompt, write_guide
from manyicl.model.reference import resolve_reference
from manyicl.outputs import require_output_folder

NUM_PROBE_TOKENS = 32
# A merge may differ from its adapter by rounding alone: so much of what the adapter does, and of the logits.
MERGE_TOLERANCE, LOGIT_TOLERANCE = 1e-2, 1e-3


@dataclass(frozen=True)
class Exported:
    """What an export wrote, and what it did to the weights.

    Attributes:
        folder: Folder that was written.
        num_parameters: Weights of the model, a tied head counted once.
        dtype: Precision in which they are saved.
        rounded: True if the dtype does not hold all weights exactly.
        logit_change: Largest difference of a logit on a probe, between the exported folder as plain transformers
            reads it and the model that was given, both computed in float32.
        adapter_effect: Largest difference that the adapter makes to a logit of its base; None without one.
    """

    folder: Path
    num_parameters: int
    dtype: str
    rounded: bool
    logit_change: float
    adapter_effect: float | None

    @property
    def precision(self) -> str:
        """Say what happened to the weights, in one or two sentences."""
        done = f"The weights were rounded to {self.dtype}" if self.rounded else "No weight was changed"
        given, effect = "model exported", ""
        if self.adapter_effect is not None:
            after = f"the weights were then rounded to {self.dtype}" if self.rounded else "no weight was rounded after"
            done = f"The adapter was merged into its base in float32; {after}"
            given = "unmerged adapter"
            effect = f", which moves those of its base by up to {self.adapter_effect:.2g}"
        return (
            f"{done}. On a probe of {NUM_PROBE_TOKENS} tokens, computed in float32, logits differ by at most "
            f"{self.logit_change:.2g} from those of the {given}{effect}."
        )


def export_model(
    reference: str,
    output: Path,
    *,
    merge: bool = False,
    dtype: str | None = None,
    end_of_answer: str | None = None,
    activity: Activity | None = None,
) -> Exported:
    """Write a model as one plain folder, an adapter merged into its base, and read it back before it counts.

    The folder is written aside and gets its name last.

    Args:
        reference: A folder, a .gguf file, ``hf:owner/name``, or ``builtin:`` and a name.
        output: A new or empty folder.
        merge: Allow an adapter to be merged; nothing changes for a full model.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for the one the weights, or those of the base, are
            saved in.
        end_of_answer: What ends an answer in the guide of a model that was not fine-tuned with manyicl.
        activity: Shows what is done; None to show nothing.

    Raises:
        UserError: If the output is taken, the dtype is unknown or too narrow, the model cannot be loaded, is an
            adapter and ``merge`` is not given, or is one that cannot be merged exactly.
        MachineError: If the folder cannot be written, or reads back as something else than was written.
    """
    activity = activity or Activity()
    require_output_folder(output, empty=True)
    output = output.resolve()  # A link stays a link.
    require_dtype(dtype)
    if _is_adapter(reference) and not merge:
        remedy = "Give --merge to write it and its base as one model."
        raise UserError("adapter_unmerged", f"{reference!r} is an adapter", remedy=remedy)
    with folder_written_atomically(output) as part:
        written = _write(reference, dtype, end_of_answer, part, activity)
        # Only now, when the model that was written is gone: a large one is not held twice.
        activity.begin("reading back what was written")
        back = _read_back(part, written)
        exported = Exported(
            folder=output,
            num_parameters=sum(weights.numel() for weights in back.model.parameters()),
            dtype=written.dtype,
            rounded=written.rounded,
            logit_change=float((_logits(back.model, written.probe) - written.logits).abs().max()),
            adapter_effect=written.adapter_effect,
        )
        facts = ExportFacts(output.name, exported.dtype, exported.precision, max_positions(back.model))
        write_guide(part, written.encoder, back.manifest, facts)
    return exported


class _Written(NamedTuple):
    """What must be found again in the folder.

    Attributes:
        encoder: Encoder of the model's tokenizer and format.
        fingerprint: Fingerprint of the weights as they are saved.
        probe: Tokens, (1, T).
        logits: Logits of the original model at these tokens, (1, T, V).
        dtype: Precision in which the weights are saved.
        rounded: True if that changed any.
        adapter_effect: Largest difference that the adapter makes to a logit of its base; None without one.
    """

    encoder: Encoder
    fingerprint: str
    probe: Tensor
    logits: Tensor
    dtype: str
    rounded: bool
    adapter_effect: float | None


def _write(reference: str, dtype: str | None, end_of_answer: str | None, part: Path, activity: Activity) -> _Written:
    """Load a model, merge it if it is an adapter, round it, and write it with its tokenizer and manifest."""
    activity.begin(f"loading {reference}")
    loaded = _load(reference)
    text_format = format_to_ask_in(loaded.tokenizer, loaded.manifest, end_of_answer=end_of_answer)
    if text_format.answer_first:
        what = "A model in the channel form scores a query after each label, and PROMPT.md tells how to write answers"
        raise UserError("not_in_channel_form", what, remedy="Use the model with manyicl.")
    encoder = Encoder(loaded.tokenizer, text_format)
    # Tokens from all over the vocabulary.
    num_tokens = min(len(loaded.tokenizer), len(cast(Tensor, loaded.model.get_input_embeddings().weight)))
    probe = torch.linspace(0, num_tokens - 1, NUM_PROBE_TOKENS).long()[None]
    logits = _logits(loaded.model, probe)
    plain, adapter_effect, folder = loaded.model, None, resolve_reference(reference)
    if _is_adapter(reference):
        activity.begin("merging the adapter into its base")
        folder = loaded.model.config._name_or_path
        plain, adapter_effect = _merged(loaded, probe, logits)
    activity.begin("rounding and writing weights")
    saved_in = dtype or _saved_dtype(folder)
    rounded = any(not torch.equal(weights.to(DTYPES[saved_in]).float(), weights) for weights in plain.parameters())
    if rounded and dtype is None and adapter_effect is None:
        # The file holds more than its configuration says.
        saved_in, rounded = "float32", False
    _round(plain, saved_in)
    try:
        _save(plain, loaded.tokenizer, part)
    except SafetensorError as error:
        raise MachineError(f"The weights cannot be written: {reason(error)}.") from error
    if loaded.manifest is not None:
        # All of it stays true: the base is what training began from, merged or not.
        loaded.manifest.write(part)
    return _Written(encoder, fingerprint(plain), probe, logits, saved_in, rounded, adapter_effect)


def _is_adapter(reference: str) -> bool:
    return (Path(resolve_reference(reference)) / "adapter_config.json").is_file()


def _load(reference: str) -> LoadedModel:
    """Load in float32, which holds every narrower weight exactly, and refuse an adapter that cannot be merged."""
    with warnings.catch_warnings():
        # peft warns of what `merge_adapter` takes care of.
        warnings.filterwarnings("ignore", module="peft")
        loaded = load_model(reference, dtype="float32", device="cpu", check_isolation=False)
    model = cast(Any, loaded.model)
    if getattr(model, "_hf_peft_config_loaded", False):
        # So transformers loads an adapter of the Hub: its layers are in the base, and peft does not see them.
        what = f"{loaded.reference!r} is an adapter that is not a local folder"
        raise UserError("adapter_not_local", what, remedy="Download it, and give the folder with --merge.")
    if hasattr(model, "peft_config") and not hasattr(model.base_model, "merge_and_unload"):
        kind = model.peft_config[model.active_adapter].peft_type
        what = (
            f"The adapter {loaded.reference!r} is of the kind {getattr(kind, 'value', kind)}, which has no weights to "
            "merge; only an engine that knows such adapters can serve it"
        )
        raise UserError("adapter_kind", what)
    return loaded


@torch.no_grad()
def _logits(model: PreTrainedModel, probe: Tensor) -> Tensor:
    """Return the logits of a probe, (1, T, V), in float32."""
    logits: Tensor = model(input_ids=probe, use_cache=False).logits
    return logits.float()


def _merged(loaded: LoadedModel, probe: Tensor, unmerged: Tensor) -> tuple[PreTrainedModel, float]:
    """Merge an adapter into its base, and check that the logits stay the same.

    Args:
        loaded: The adapter over its base, in float32; used up.
        probe: Tokens to compare on, (1, T).
        unmerged: Logits of the adapter over its base, (1, T, V).

    Returns:
        The plain model, and how far the adapter moves a logit at most.

    Raises:
        UserError: If peft cannot merge it, or the merged model answers differently.
    """
    adapter = cast(Any, loaded.model)
    with adapter.disable_adapter():
        without = _logits(adapter, probe)
    try:
        plain = merge_adapter(adapter)
    except (ValueError, RuntimeError, TypeError) as error:
        if "memory" in str(error):
            raise
        what = f"The adapter {loaded.reference!r} cannot be merged: {reason(error)}"
        raise UserError("not_mergeable", what) from error
    error_norm = (_logits(plain, probe) - unmerged).norm()
    allowed = MERGE_TOLERANCE * (unmerged - without).norm() + LOGIT_TOLERANCE * unmerged.norm()
    if not error_norm <= allowed:
        what = (
            f"The adapter {loaded.reference!r} answers differently once it is merged, as it does more than add to "
            "weights"
        )
        expected = f"logits of a probe that move by at most {allowed:.2g}, as by rounding"
        found, remedy = f"{error_norm:.2g}", "Serve it unmerged."
        raise UserError("merge_changes_answers", what, expected=expected, found=found, remedy=remedy)
    return plain, float((unmerged - without).abs().max())


def _saved_dtype(path: str) -> str:
    """Return what a configuration says its weights are saved in; float32 if it does not say."""
    reference = path if Path(path).is_dir() else f"hf:{path}"
    saved = model_config(reference).dtype
    return next((name for name, dtype in DTYPES.items() if saved in (dtype, name)), "float32")


@torch.no_grad()
def _round(model: PreTrainedModel, dtype: str) -> None:
    """Cast weights in place; buffers are made anew when the model is loaded.

    Raises:
        UserError: If a weight is too large for the dtype.
    """
    for name, weights in model.named_parameters():
        rounded = weights.data.to(DTYPES[dtype])
        if not torch.isfinite(rounded).all():
            if not torch.isfinite(weights).all():
                raise UserError("weights_not_finite", f"The weight {name!r} is not finite; nothing was written")
            what = f"The weight {name!r} does not fit {dtype}; nothing was written"
            raise UserError("dtype_too_narrow", what, remedy="Use bfloat16.")
        weights.data = rounded


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, part: Path) -> None:
    """Write weights, configuration and tokenizer; generation uses a cache."""
    for config in (model.config, model.config.get_text_config()):
        config.use_cache = True
    model.save_pretrained(str(part))
    tokenizer.save_pretrained(str(part))
    for weights in part.glob("*.safetensors"):
        # They are written for their owner alone; a server may be somebody else.
        weights.chmod((part / "config.json").stat().st_mode)
    generation = part / "generation_config.json"
    if generation.is_file():
        # In the file, because transformers holds a changed object to rules that published ones break.
        settings = json.loads(generation.read_text(encoding="utf-8"))
        generation.write_text(json.dumps({**settings, "use_cache": True}, indent=2) + "\n", encoding="utf-8")


def _read_back(part: Path, written: _Written) -> LoadedModel:
    """Load what was written, with transformers' own attention.

    Raises:
        MachineError: If weights or tokenizer are not those that were written.
    """
    back = load_model(str(part), dtype="float32", device="cpu", check_isolation=False)
    if back.fingerprint != written.fingerprint:
        raise MachineError("The written weights read back as others; nothing was kept. Check the disk.")
    tokenizer = written.encoder.tokenizer
    text, token_ids = example_prompt(written.encoder)
    again = example_prompt(Encoder(back.tokenizer, written.encoder.format))[1]
    if again != token_ids or back.tokenizer(text)["input_ids"] != tokenizer(text)["input_ids"]:
        raise MachineError(
            f"The tokenizer reads back as {type(back.tokenizer).__name__}, which encodes differently from the "
            f"{type(tokenizer).__name__} that was written; nothing was kept."
        )
    back.model.set_attn_implementation("eager")
    return back
