"""A .gguf file -> one standard folder with float32 weights, tokenizer and chat template.

GGUF is llama.cpp's format: one file with the network's shape, its tokenizer and its weights, mostly quantized. What the
weights stand for is written in float32, which holds all of it. Anything in a file that is not known here is refused: a
factor of the rotary positions that is ignored gives a model that still answers, only worse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manyicl.errors import UserError, quoted
from manyicl.library_errors import reason
from manyicl.model.cache import MB, cached_folder
from manyicl.paths import cache_folder, sha256_of_file

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

ENDING = ".gguf"
# Part of the folder's name: raise it when the same file would be converted to something else.
CONVERSION = 1
ARCHITECTURES = ("llama", "qwen2", "qwen3")
# Metadata, whose keys begin with the architecture, and the key of transformers' configuration.
CONFIG_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
# Each states the width of a head again; only files in which they agree are converted.
HEAD_WIDTHS = ("attention.key_length", "attention.value_length", "rope.dimension_count")
OTHER_KEYS = ("rope.freq_base", "vocab_size")
TOKEN_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
CONTROL_TOKEN, USER_DEFINED_TOKEN = 3, 4
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
FETCH_AGAIN = "Fetch the file again."
SPLITS = ("gpt-2", "smollm", "qwen2")


def converted_folder(file: Path) -> Path:
    """Return the standard folder of a .gguf file, which is converted into the cache the first time.

    Raises:
        UserError: If the file is missing, broken, or of a kind that is not converted here.
        MachineError: If the folder cannot be written.
    """
    sha256 = sha256_of(file)
    folder = cache_folder() / folder_name(sha256)
    if folder.is_dir():
        return folder
    content = GgufFile(file)
    num_bytes = content.num_converted_bytes
    # Library code is silent elsewhere; this much is not written to a disk without a word.
    print(f"{file.name} is converted once: {num_bytes / MB:,.0f} MB in {folder}", file=sys.stderr)
    return cached_folder(folder.name, num_bytes, content.write)


def folder_name(sha256: str) -> str:
    """Name the folder in the cache that holds the conversion of a .gguf file."""
    return f"gguf-{sha256[:32]}-{CONVERSION}"


def sha256_of(file: Path) -> str:
    """Hash a file; once per command for the same size and time.

    Raises:
        UserError: If it cannot be read.
    """
    try:
        state = file.stat()
        return _sha256(file.resolve(), state.st_size, state.st_mtime_ns)
    except OSError as error:
        raise UserError("file_not_readable", f"the file cannot be read, {reason(error)}", file=file) from error


@lru_cache
def _sha256(file: Path, _num_bytes: int, _changed_at: int) -> str:
    return sha256_of_file(file)


@dataclass(frozen=True)
class GgufFile:
    """A .gguf file, opened and not yet converted."""

    path: Path

    @cached_property
    def _reader(self) -> Any:
        with self._as_broken():
            from gguf import GGUFReader

            return GGUFReader(str(self.path))

    @property
    def num_converted_bytes(self) -> int:
        """Size of the converted weights."""
        return 4 * sum(int(tensor.n_elements) for tensor in self._reader.tensors)

    def write(self, folder: Path) -> None:
        """Write configuration, tokenizer and weights into an empty folder.

        Raises:
            UserError: If the file holds anything that is not known here, or lacks something.
        """
        import torch
        from safetensors.torch import save_file
        from transformers import AutoModelForCausalLM

        with self._as_broken():
            config, tokenizer = self._config(), self._tokenizer()
            with torch.device("meta"):
                model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            config.architectures, config.dtype = [type(model).__name__], "float32"
            weights = self._weights(config, model)
        config.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        save_file(weights, str(folder / "model.safetensors"), {"format": "pt"})
        # safetensors makes files that only their owner reads; a cache may be shared.
        (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)

    @cached_property
    def _metadata(self) -> Mapping[str, Any]:
        return {name: field.contents() for name, field in self._reader.fields.items()}

    def _value(self, key: str) -> Any:
        """Return a value of the metadata that must be there."""
        if key not in self._metadata:
            raise UserError("broken_gguf", f"the metadata lacks {key!r}", remedy=FETCH_AGAIN, file=self.path)
        return self._metadata[key]

    def _unsupported(self, what: str, expected: str | None, found: object) -> UserError:
        remedy = "Take the model's own folder instead."
        return UserError(
            "unsupported_gguf", what, expected=expected, found=quoted(found), remedy=remedy, file=self.path
        )

    @contextmanager
    def _as_broken(self) -> Iterator[None]:
        """Turn what libraries raise over damaged content, a dozen kinds of exception, into one sentence."""
        try:
            yield
        except (UserError, MemoryError):
            raise
        except ModuleNotFoundError as error:
            what = "the package gguf, which reads such files, is not installed"
            raise UserError("library_missing", what, remedy="Run `pip install gguf`.", file=self.path) from error
        except Exception as error:
            what = f"this is no complete GGUF file, {reason(error)}"
            raise UserError("broken_gguf", what, remedy=FETCH_AGAIN, file=self.path) from error

    @property
    def _architecture(self) -> str:
        return str(self._value("general.architecture"))

    def _config(self) -> PreTrainedConfig:
        from transformers import AutoConfig

        if self._architecture not in ARCHITECTURES:
            raise self._unsupported("the architecture is not supported", " or ".join(ARCHITECTURES), self._architecture)
        prefix = f"{self._architecture}."
        shape = {name.removeprefix(prefix): value for name, value in self._metadata.items() if name.startswith(prefix)}
        # Older files omit these and mean:
        shape.setdefault("rope.freq_base", 10_000.0)
        shape.setdefault("attention.head_count_kv", shape.get("attention.head_count"))
        for key, value in shape.items():
            if key not in {*CONFIG_KEYS, *HEAD_WIDTHS, *OTHER_KEYS} or isinstance(value, list):
                raise self._unsupported(f"the network has {prefix}{key}, which is not supported", None, value)
        values = {name: _shortest(shape.get(key) or self._value(prefix + key)) for key, name in CONFIG_KEYS.items()}
        head_width = shape.get("attention.key_length", values["hidden_size"] // values["num_attention_heads"])
        for key in HEAD_WIDTHS:
            if shape.get(key, head_width) != head_width:
                raise self._unsupported(f"{prefix}{key} is not the width of a head", str(head_width), shape[key])
        config: PreTrainedConfig = AutoConfig.for_model(
            self._architecture,
            **values,
            head_dim=head_width,
            rope_parameters={"rope_type": "default", "rope_theta": _shortest(shape["rope.freq_base"])},
            vocab_size=len(self._value("tokenizer.ggml.tokens")),
            tie_word_embeddings=all(tensor.name != "output.weight" for tensor in self._reader.tensors),
            **{f"{name}_token_id": token_id for name, token_id in self._token_ids().items()},
        )
        return config

    def _weights(self, config: PreTrainedConfig, model: PreTrainedModel) -> dict[str, Tensor]:
        """Dequantize all tensors of a model.

        Args:
            config: Its configuration.
            model: The network without weights, which says what they are called and what shapes they have.
        """
        import numpy as np
        import torch
        from gguf import MODEL_ARCH, dequantize, get_tensor_name_map

        names = get_tensor_name_map(MODEL_ARCH[self._architecture.upper()], config.num_hidden_layers)
        present = {tensor.name: tensor for tensor in self._reader.tensors}
        weights: dict[str, Tensor] = {}
        for name, expected in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue
            stored_as = names.get_name(name, (".weight", ".bias"))
            tensor = present.pop(stored_as, None)
            found = None if tensor is None else tuple(int(size) for size in reversed(tensor.shape))
            if found != tuple(expected.shape):
                raise self._unsupported(f"the tensor {stored_as} does not fit", str(tuple(expected.shape)), found)
            try:
                values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            except NotImplementedError as error:
                raise self._unsupported("the quantization is not supported", None, tensor.tensor_type.name) from error
            if self._architecture == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
                values = _rows_in_halves(values, config.head_dim)
            weights[name] = torch.from_numpy(np.ascontiguousarray(values))
        if present:
            raise self._unsupported("the network has a tensor that is not supported", None, min(present))
        return weights

    def _token_ids(self) -> dict[str, int]:
        ids = {name: self._metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in TOKEN_KEYS.items()}
        return {name: token_id for name, token_id in ids.items() if token_id is not None}

    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from tokenizers import AddedToken, Tokenizer, models, processors
        from transformers import PreTrainedTokenizerFast

        kind, split = self._value("tokenizer.ggml.model"), self._metadata.get("tokenizer.ggml.pre")
        if kind != "gpt2" or split not in SPLITS:
            expected = f"byte-level BPE (gpt2) that splits like {' or '.join(SPLITS)}"
            raise self._unsupported("the tokenizer is not supported", expected, f"{kind}, {split}")
        tokens, merges = self._value("tokenizer.ggml.tokens"), self._value("tokenizer.ggml.merges")
        vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
        backend = Tokenizer(models.BPE(vocabulary, [tuple(merge.split(" ")) for merge in merges]))
        _split_like(backend, split)
        kinds = self._value("tokenizer.ggml.token_type")
        for token, kind in zip(tokens, kinds, strict=True):
            if kind == CONTROL_TOKEN:
                backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            elif kind == USER_DEFINED_TOKEN:
                backend.add_tokens([AddedToken(token, special=False, normalized=False)])
        ids = self._token_ids()
        named = {f"{name}_token": tokens[token_id] for name, token_id in ids.items()}
        if self._metadata.get("tokenizer.ggml.add_bos_token"):
            bos = named["bos_token"]
            texts = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
            backend.post_processor = processors.TemplateProcessing(**texts, special_tokens=[(bos, ids["bos"])])
        return PreTrainedTokenizerFast(
            tokenizer_object=backend, chat_template=self._metadata.get("tokenizer.chat_template"), **named
        )


def _shortest(value: Any) -> Any:
    """Return the shortest number that is the same in float32, in which GGUF holds 1e-05 as 9.99999974e-06."""
    import numpy as np

    return float(str(np.float32(value))) if isinstance(value, float) else value


def _rows_in_halves(values: Any, head_width: int) -> Any:
    """Undo llama.cpp's order of rows: it puts the two numbers that RoPE turns together next to each other."""
    pairs = values.reshape(-1, head_width // 2, 2, *values.shape[1:])
    return pairs.swapaxes(2, 1).reshape(values.shape)


def _split_like(backend: Any, split: str) -> None:
    """Split text into words as the tokenizer was trained to, from its name in llama.cpp."""
    from tokenizers import Regex, decoders, normalizers, pre_tokenizers

    bytes_of_words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if split == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, bytes_of_words])
    elif split == "qwen2":
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN2_WORDS), "isolated")
        whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, whole])
    else:
        backend.pre_tokenizer = bytes_of_words
    backend.decoder = decoders.ByteLevel()
