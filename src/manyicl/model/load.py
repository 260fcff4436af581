"""Base model, adapter, tokenizer and saved format, from a folder, the Hub or the package itself."""

from __future__ import annotations

import hashlib
import json
import os
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from manyicl.errors import UserError, quoted, shortened
from manyicl.library_errors import clause, reason
from manyicl.model.attention import ATTENTION
from manyicl.model.isolation import require_isolation
from manyicl.model.known_fingerprints import Origin, remembered_fingerprint
from manyicl.model.manifest import FILE_NAME, Manifest
from manyicl.model.passed_checks import passed_before
from manyicl.model.pretrained import BASES, PretrainedBase
from manyicl.model.reference import (
    BUILTIN_PREFIX,
    DTYPE_NAMES,
    HUB_PREFIX,
    require_dtype_name,
    resolve_reference,
)

if TYPE_CHECKING:
    from peft import PeftModel

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
LFS_POINTER = b"version https://git-lfs"
RESTORE = "Restore the folder."
# Files in which a folder can name Python code of its own, under the key auto_map.
FILES_WITH_CODE = ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json")
# Tensors that published weights hold and their architectures compute or tie: no loss where they are not read.
UNUSED_TENSORS = ("rotary_emb.inv_freq", "attn.masked_bias", "attn.bias", "lm_head.weight")
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_NAMES}


@dataclass(frozen=True)
class LoadedModel:
    """A network ready for packed sequences, with all that it was saved with.

    Attributes:
        model: The causal language model, an adapter over it if there is one.
        tokenizer: Tokenizer of the model.
        manifest: Content of manyicl.json, if the folder holds one.
        fingerprint: Hash of the weights; tells results of different models apart.
        reference: How the user named it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    manifest: Manifest | None
    fingerprint: str
    reference: str


def load_tokenizer(reference: str | Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer that a model was saved with; an adapter of ours that has none uses that of its base.

    Raises:
        UserError: If there is none.
    """
    path = _path_without_code(reference)
    folder = Path(path)
    if folder.is_dir() and not any(folder.glob("tokenizer*")):
        manifest = Manifest.read(folder)
        if manifest and manifest.base:
            return load_tokenizer(manifest.base)
    with _as_user_error(reference, "tokenizer"):
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)


def _path_without_code(reference: str | Path) -> str:
    """Resolve a reference, and refuse a model that wants to run Python code of its own.

    Without ``trust_remote_code=False`` transformers asks on standard input whether to run it, and takes a query for
    the reply.

    Raises:
        UserError: If the model cannot be found, or one of its files is broken or asks for code.
    """
    path = resolve_reference(reference)
    for name in FILES_WITH_CODE:
        with _as_user_error(reference, name):
            file = _file_of(path, name)
            if file and json.loads(file.read_text(encoding="utf-8")).get("auto_map"):
                what = (
                    f"The model {str(reference)!r} asks for Python code of its own to be run, which manyicl never does"
                )
                found = f"auto_map in {name}"
                remedy = "Name another model; where transformers has this architecture itself, remove auto_map."
                raise UserError("asks_for_code", what, found=found, remedy=remedy, file=file, field="auto_map")
    return path


def _file_of(path: str, name: str) -> Path | None:
    """Find a file of a resolved reference, a folder or a Hub id; None where there is none."""
    if Path(path).is_dir():
        return Path(path, name) if Path(path, name).is_file() else None
    file = cached_file(path, name, _raise_exceptions_for_missing_entries=False)
    return Path(file) if file else None


def load_model(
    reference: str | Path,
    *,
    dtype: str | None = None,
    device: str | None = None,
    check_isolation: bool = True,
    use_known_fingerprint: bool = True,
) -> LoadedModel:
    """Load a model for packed sequences and for continuing a prefix.

    Args:
        reference: A folder, a .gguf file, ``hf:owner/name``, or ``builtin:`` and a name.
        dtype: ``float32``, ``bfloat16`` or ``float16``; None for float32 on a CPU and the saved one on a GPU.
        device: Device of the model; None for a GPU if there is one.
        check_isolation: Compare packed with separate episodes; costs two short passes.
        use_known_fingerprint: Take its fingerprint from the cache folder where no file has changed since; False reads
            all weights.

    Returns:
        The model in evaluation mode, with its tokenizer, manifest and fingerprint.

    Raises:
        UserError: If it cannot be found or loaded, or mixes the episodes of a packed sequence.
    """
    path = _path_without_code(reference)
    reference = str(reference)
    device = _checked_device(device)
    network = _load_network(reference, path, require_dtype(dtype) or (torch.float32 if device == "cpu" else "auto"))
    model = network.model
    torch.nn.Module.to(model, device=device)
    model.eval()
    tokenizer = load_tokenizer(reference)
    _require_embeddings(reference, model, tokenizer)
    weights_hash = network.fingerprint() if use_known_fingerprint else fingerprint(model)
    if check_isolation:
        passed_before(_what_isolation_depends_on(model, weights_hash), lambda: require_isolation(model))
    return LoadedModel(model, tokenizer, read_manifest(path), weights_hash, reference)


class _Network(NamedTuple):
    """A network as it was read from files.

    Attributes:
        model: The network.
        origin: What decides its weights; None where that is not known.
    """

    model: PreTrainedModel
    origin: Origin | None

    def fingerprint(self) -> str:
        """Return the fingerprint of its weights, which nobody has changed yet."""
        return remembered_fingerprint(self.origin, lambda: fingerprint(self.model))

    def in_dtype(self, dtype: torch.dtype | str) -> _Network:
        """Cast its weights in place; ``auto`` leaves them as they are."""
        if dtype == "auto" or all(weights.dtype == dtype for weights in self.model.parameters()):
            return self
        cast_weights(self.model, dtype)
        return _Network(self.model, None if self.origin is None else self.origin.then(f"cast to {dtype}"))


def _load_network(reference: str, path: str, torch_dtype: torch.dtype | str) -> _Network:
    """Load a network on the CPU: an adapter over its base, a base whose weights are known, or any other weights."""
    if (Path(path) / "adapter_config.json").is_file():
        return _load_adapter(reference, Path(path)).in_dtype(torch_dtype)
    if (base := _named_base(reference)) is None:
        return _load_plain(reference, path, torch_dtype)
    network = _load_plain(reference, path, torch.float32)
    if (found := network.fingerprint()) != base.fingerprint:
        what, expected = f"The weights of {reference!r} are damaged", f"the fingerprint {base.fingerprint[:12]}"
        raise UserError("damaged_base", what, expected=expected, found=found[:12], remedy=_remedy(reference))
    return network.in_dtype(torch_dtype)


def _load_plain(reference: str, path: str, torch_dtype: torch.dtype | str) -> _Network:
    origin = Origin.of(path, f"weights in {torch_dtype}")
    return _Network(_load_weights(reference, path, torch_dtype), origin)


def _what_isolation_depends_on(model: PreTrainedModel, weights_hash: str) -> dict[str, object]:
    """Describe a model as far as it decides whether packed episodes stay apart in it."""
    adapters = getattr(model, "peft_config", {})
    return {
        "class": [f"{type(part).__module__}.{type(part).__qualname__}" for part in model.modules()],
        "config": model.config.to_dict(),
        "adapters": {name: config.to_dict() for name, config in adapters.items()},
        "fingerprint": weights_hash,
        "dtype": str(model.dtype),
        "device": str(model.device),
    }


def cast_weights(model: PreTrainedModel, dtype: torch.dtype | str) -> None:
    """Cast the weights of a model in place; ``auto`` leaves them as they are.

    Buffers keep their precision: rotary frequencies in bfloat16 would misplace tokens by whole turns in long texts.
    """
    for weights in model.parameters() if isinstance(dtype, torch.dtype) else ():
        weights.data = weights.data.to(dtype)


def _named_base(reference: str | Path) -> PretrainedBase | None:
    name = str(reference)
    return BASES.get(name.removeprefix(BUILTIN_PREFIX)) if name.startswith(BUILTIN_PREFIX) else None


def _require_embeddings(reference: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with tokens that the model has no embedding for.

    Of the special ones only those at the beginning of a text and at the end of an answer are used, padding never.
    """
    num_embeddings = len(cast(Tensor, model.get_input_embeddings().weight))
    unused = set(tokenizer.all_special_ids) - {tokenizer.bos_token_id, tokenizer.eos_token_id}
    num_tokens = 1 + max(set(tokenizer.get_vocab().values()) - unused, default=-1)
    if num_tokens > num_embeddings:
        what = f"The tokenizer of {reference!r} has more tokens than the model has embeddings"
        expected, remedy = f"at most {num_embeddings:,}", "Restore the folder, or name another model."
        raise UserError("tokenizer_too_large", what, expected=expected, found=f"{num_tokens:,}", remedy=remedy)


def load_quantized(reference: str, dtype: str, device: str) -> PreTrainedModel:
    """Load a base whose linear layers, the head aside, are held in 4 bits, for an adapter to be trained over it.

    The values are normal-float, their scales quantized a second time, the products in ``dtype``, as in QLoRA
    (Dettmers et al. 2023, arXiv:2305.14314), through bitsandbytes. What the layers stand for is another model than
    the base, by as much as 4 bits round. Ran with bitsandbytes 0.50.2 on a CPU, never on a GPU; packed is compared with
    alone all the same.

    Args:
        reference: As for `load_model`; no adapter.
        dtype: Precision of everything that is not quantized, and of the products.
        device: A GPU.

    Raises:
        UserError: If it cannot be found or loaded, or mixes the episodes of a packed sequence.
    """
    from transformers import BitsAndBytesConfig

    path = _path_without_code(reference)
    with _as_user_error(reference, "4-bit configuration"):
        in_4_bits = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
        quantization = BitsAndBytesConfig(**in_4_bits, bnb_4bit_compute_dtype=DTYPES[dtype])
    placing = {"quantization_config": quantization, "device_map": {"": torch.device(device)}}
    model = _load_weights(reference, path, DTYPES[dtype], **placing)
    require_isolation(model)
    return model


def _load_weights(reference: str, path: str, torch_dtype: torch.dtype | str, **quantization: object) -> PreTrainedModel:
    """Load a whole model with our attention.

    Raises:
        UserError: If it cannot be loaded, or tensors are missing, unexpected or of another shape.
    """
    _require_weights(reference, Path(path))
    with _as_user_error(reference, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            config=_config_of(reference, path),
            trust_remote_code=False,
            dtype=torch_dtype,
            attn_implementation=ATTENTION,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, with the sizes
            **quantization,
        )
    model, report = loaded
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, expected = mismatched[0]
        what = f"The weights of {reference!r} are not those of its config.json: the shape of {name!r}"
        raise UserError("tensor_shape", what, expected=str(tuple(expected)), found=str(tuple(found)), remedy=RESTORE)
    unexpected = [name for name in report["unexpected_keys"] if not name.endswith(UNUSED_TENSORS)]
    _require_same_tensors(reference, "config.json", report["missing_keys"], unexpected)
    return cast(PreTrainedModel, model)


def _require_same_tensors(
    reference: str, description: str, missing: Collection[str], unexpected: Collection[str]
) -> None:
    """Refuse weights that lack tensors or hold others: libraries fill those with random values, and ignore these."""
    for names, code, what in (
        (missing, "missing_tensors", f"lack tensors that its {description} names"),
        (unexpected, "unexpected_tensors", f"hold tensors that its {description} does not name"),
    ):
        if names:
            found = f"{len(names):,} such as {min(names)!r}"
            raise UserError(code, f"The weights of {reference!r} {what}", found=found, remedy=RESTORE)


def _require_weights(reference: str, folder: Path) -> None:
    """Refuse a local folder whose weights are pickles, or were never fetched, and say what to do.

    Raises:
        UserError: If so; what else is wrong with a folder shows when it is loaded.
    """
    files = sorted(folder.glob("*model*"))
    weights = [file for file in files if file.suffix == ".safetensors"]
    for file in weights:
        with file.open("rb") as content:
            if content.read(len(LFS_POINTER)) == LFS_POINTER:
                what = f"{file.name} of {reference!r} is a Git LFS pointer, not the weights"
                raise UserError("weights_not_fetched", what, remedy="Fetch them with `git lfs pull` in that folder.")
    pickled = [file.name for file in files if file.suffix == ".bin"]
    if pickled and not weights:
        is_adapter = pickled[0].startswith("adapter_")
        loader = "peft.AutoPeftModelForCausalLM" if is_adapter else "transformers.AutoModelForCausalLM"
        call = f"{loader}.from_pretrained({reference!r}).save_pretrained({reference!r})"
        what = (
            f"{reference!r} holds its weights in {pickled[0]} alone; pickles are refused, because reading one can run "
            "any program"
        )
        raise UserError("pickled_weights", what, remedy=f"Convert what you trust to safetensors: {call}.")


def read_manifest(path: str) -> Manifest | None:
    """Read manyicl.json of a resolved reference, a folder or a Hub id; None where there is none."""
    file = _file_of(path, FILE_NAME)
    return Manifest.read(file.parent) if file else None


def _load_adapter(reference: str, folder: Path) -> _Network:
    """Load an adapter over the base that its manifest or configuration names, and compare that base's weights."""
    from peft import PeftModel

    origin = Origin.of(folder, "adapter")
    manifest = Manifest.read(folder)
    base_reference = _base_of(reference, folder, manifest)
    _require_weights(reference, folder)
    if not any(folder.glob("adapter_model*.safetensors")):
        raise UserError("no_weights", f"The adapter {reference!r} holds no adapter_model.safetensors", remedy=RESTORE)
    # The base's fingerprint was taken in the precision of the recipe, and rounding changes it.
    trained_in = (manifest.recipe.get("model") or {}).get("dtype") if manifest else None
    base = _load_network(base_reference, _path_without_code(base_reference), require_dtype(trained_in) or torch.float32)
    expected_hash = manifest.base_fingerprint if manifest else None
    if expected_hash and (found := base.fingerprint()) != expected_hash:
        what = f"The adapter {reference!r} was trained over other weights than those of {base_reference!r}"
        expected, remedy = f"a fingerprint {expected_hash[:12]}", "Restore the base it was trained on."
        raise UserError("another_base", what, expected=expected, found=found[:12], remedy=remedy)
    # peft 0.21 asks transformers 5.23 for a property by its deprecated name, and only warns of missing tensors.
    with _as_user_error(reference, "adapter"), warnings.catch_warnings(action="ignore", category=FutureWarning):
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        adapter = PeftModel.from_pretrained(base.model, str(folder), trust_remote_code=False)
        _require_adapter_tensors(reference, folder, adapter)
    network = cast(PreTrainedModel, adapter)
    if base.origin is None or origin is None or not _holds_all_weights(adapter):
        return _Network(network, None)
    return _Network(network, base.origin.with_adapter(origin))


def _holds_all_weights(adapter: PeftModel) -> bool:
    """Tell whether the file of an adapter alone decides its weights and leaves those of the base as they are.

    Some first weights (PiSSA, OLoRA, …) are taken out of the base, in part at random, whenever the adapter is made.
    """
    configs = adapter.peft_config.values()
    return all(one.peft_type == "LORA" and isinstance(getattr(one, "init_lora_weights", None), bool) for one in configs)


def _base_of(reference: str, folder: Path, manifest: Manifest | None) -> str:
    """Return the reference of the base that the manifest or the configuration of an adapter names."""
    adapter_config = folder / "adapter_config.json"
    with _as_user_error(reference, "adapter configuration"):
        named = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    base_reference = (manifest.base if manifest else None) or named
    if not base_reference or not isinstance(base_reference, str):
        what = f"The adapter {reference!r} names no base model, and cannot be loaded without one"
        expected, found = "a folder or hf:owner/name", quoted(base_reference)
        field = "base_model_name_or_path"
        raise UserError("no_base", what, expected=expected, found=found, file=adapter_config, field=field)
    if manifest is None and HUB_ID.fullmatch(base_reference) and not Path(base_reference).is_dir():
        base_reference = HUB_PREFIX + base_reference
    if (Path(base_reference) / "adapter_config.json").is_file():
        what = f"The adapter {reference!r} names {base_reference!r} as its base, which is an adapter itself"
        raise UserError("base_is_adapter", what, remedy="Merge that one first: `manyicl export --merge`.")
    return base_reference


def _require_adapter_tensors(reference: str, folder: Path, adapter: PeftModel) -> None:
    """Compare the tensors of an adapter's file with those that its configuration makes."""
    from peft import get_peft_model_state_dict

    found: set[str] = set()
    for path in folder.glob("adapter_model*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    needed = set(get_peft_model_state_dict(adapter, save_embedding_layers=False))
    known = set(get_peft_model_state_dict(adapter, save_embedding_layers=True))
    _require_same_tensors(reference, "adapter_config.json", needed - found, found - known)


def model_config(reference: str | Path) -> PreTrainedConfig:
    """Load the configuration alone, without weights.

    Raises:
        UserError: If it cannot be found, or is that of quantized weights.
    """
    path = _path_without_code(reference)
    with _as_user_error(reference, "configuration"):
        return _config_of(reference, path)


def _config_of(reference: str | Path, path: str) -> PreTrainedConfig:
    """Read config.json, refuse quantized weights, and put our attention in the place of one that it names.

    A ``quantization_config`` may let transformers fetch kernels, which are code, from the Hub. The key
    ``_attn_implementation`` would overrule the argument, and may name such code, too.
    """
    config: PreTrainedConfig = AutoConfig.from_pretrained(path, trust_remote_code=False)
    for part in (config, config.get_text_config()):
        if (quantization := getattr(part, "quantization_config", None)) is not None:
            remedy = "Take the model that it was made from; model.quantize in a recipe quantizes that for training."
            what, field = f"The weights of {str(reference)!r} are quantized", "quantization_config"
            raise UserError("quantized_weights", what, found=quoted(quantization), remedy=remedy, field=field)
    config._attn_implementation = ATTENTION
    return config


def max_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions the architecture allows; None if it does not say."""
    value = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def max_positions_of(reference: str | Path) -> int | None:
    """Return how many positions a model allows, or the base of an adapter, without loading weights.

    Raises:
        UserError: If its configuration, or that of its base, cannot be read.
    """
    folder = Path(resolve_reference(reference))
    if (folder / "adapter_config.json").is_file():
        reference = _base_of(str(reference), folder, read_manifest(str(folder)))
    value = getattr(model_config(reference).get_text_config(), "max_position_embeddings", None)
    return int(value) if value else None


def fingerprint(model: PreTrainedModel) -> str:
    """Hash names, shapes and values of all weights, in the precision they are held in as float32.

    Large tensors are sampled evenly (4,096 values each), so that a 7B model costs under a second; any training
    step changes far more values than that.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        step = max(1, tensor.numel() // 4096)
        sample = tensor.detach().flatten()[::step].to(device="cpu", dtype=torch.float32)
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _checked_device(device: str | None) -> str:
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        what = f"The device {device!r} is not available: {reason(error)}"
        raise UserError("unknown_device", what, remedy="Use cpu, or leave it out.") from error
    return device


def require_dtype(dtype: str | None) -> torch.dtype | None:
    """Return the dtype of a name; None where none is named.

    Raises:
        UserError: If the name is not one of `DTYPES`.
    """
    require_dtype_name(dtype)
    return DTYPES.get(dtype or "")


@contextmanager
def _as_user_error(reference: str | Path, what: str) -> Iterator[None]:
    """Turn what libraries raise for a model that cannot be had into one sentence."""
    try:
        yield
    except (UserError, MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:
        # Broken weights, configurations and tokenizers end in a dozen kinds of exception.
        problem = f"The {what} of {str(reference)!r} cannot be loaded: {_cause(reference, error)}"
        raise UserError("not_loadable", problem, remedy=_remedy(reference)) from error


def _remedy(reference: str | Path) -> str:
    """Say how to get a model that can be loaded."""
    if _named_base(reference) is not None:
        return f"Run `manyicl models get {str(reference).removeprefix(BUILTIN_PREFIX)}` again."
    remedy = "Restore the folder, or name another model." if Path(reference).is_dir() else "Name another model."
    return remedy + (" This machine is told to stay offline." if os.environ.get("HF_HUB_OFFLINE") else "")


def _cause(reference: str | Path, error: Exception) -> str:
    """Say why a library does not load a folder; a lone key is a name it does not know, or one that is missing."""
    if isinstance(error, TypeError | AttributeError | IndexError):
        return "a value in one of its files is of the wrong kind"
    if not isinstance(error, KeyError):
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # A list of possible reasons follows a colon.
        has_list = bool(lines) and lines[0].endswith(":")
        return clause(shortened(" ".join(lines))) if has_list else reason(error)
    for path in filter(Path.is_file, (Path(reference, name) for name in ("config.json", "adapter_config.json"))):
        content = json.loads(path.read_text(encoding="utf-8"))
        nested = [content, *(value for value in content.values() if isinstance(value, dict))]
        for key, value in (pair for part in nested for pair in part.items()):
            if value == error.args[0]:
                return f"its {path.name} names the {key} {error}, which the libraries installed here do not know"
    return f"the key {error} is missing in a file of it"
