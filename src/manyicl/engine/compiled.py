"""Compiled tasks: a prefix on disk, with how well the model predicted its own demonstrations.

One safetensors file holds keys, values and tokens, and in its header the task, the demonstrations, the text format and
the identity of the model. It holds the demonstrations in recoverable form, as text and as keys and values; compiled to
retrieve, it holds the other training rows as text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.atomic import write_atomically
from manyicl.engine.backend import Backend, Identity, backend_cannot_compile, foreign_prefix, require_own
from manyicl.engine.blend import BlendWeights
from manyicl.engine.compiled_file import HASH_KEY, HEADER_KEY, not_compiled, require_compiled_file, require_output
from manyicl.engine.local import LocalBackend
from manyicl.engine.observed import ObservedAnswer
from manyicl.engine.prefix_cache import PrefixCache
from manyicl.engine.task_prefix import TaskPrefix, require_demonstrations
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.text_format import BLANK_LINE, AnyFormat, ParagraphFormat
from manyicl.errors import MachineError, UserError, located
from manyicl.library_errors import reason
from manyicl.model.continuation import Block, key_shape
from manyicl.model.manifest import library_versions
from manyicl.tasks.task import Example, Task, TaskSpec

# Version 2 had no blend; all else is the same.
READ_VERSIONS = (2, 3)
_ROWS = TypeAdapter(tuple[Example, ...])
COMPILE_AGAIN = "Compile the task again."


class Header(BaseModel):
    """Content of the header of a compiled task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2, 3] = 3
    identity: Identity = Field(description="Network that made the keys and values.")
    text_format: AnyFormat = Field(description="How examples became text.")
    task: TaskSpec
    data_hash: str = Field(description="Hash of the task's examples when it was compiled.")
    demonstrations: tuple[Example, ...] = Field(description="Demonstrations in the prefix, in order.")
    num_dropped: int = Field(description="Demonstrations that did not fit the context.")
    answers: tuple[ObservedAnswer, ...] = Field(description="How the model did on each demonstration.")
    blend: BlendWeights | None = Field(None, description="How its label scores are combined with those of the words.")
    versions: dict[str, str] = Field(default_factory=library_versions)


def save_compiled(prefix: TaskPrefix, path: Path, text_format: AnyFormat) -> None:
    """Write a compiled task; an earlier file is replaced only once the new one is complete.

    Raises:
        UserError: If the file cannot be there, or the prefix is empty.
        MachineError: If the disk refuses.
    """
    cache = prefix.cache
    if not isinstance(cache, PrefixCache) or not cache.blocks:
        what = f"Task {prefix.task.name!r} has neither instruction nor demonstrations, which queries could share"
        raise UserError("nothing_to_compile", what)
    require_output(path)
    tensors = {"token_ids": torch.tensor(prefix.token_ids)}
    for layer in range(len(cache.blocks[0].keys)):
        tensors[f"keys.{layer}"] = torch.cat([block.keys[layer] for block in cache.blocks], dim=2)
        tensors[f"values.{layer}"] = torch.cat([block.values[layer] for block in cache.blocks], dim=2)
    if prefix.rows:
        # Not in the header, whose length the format limits.
        tensors["rows"] = torch.frombuffer(bytearray(_ROWS.dump_json(prefix.rows)), dtype=torch.uint8)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = Header(
        identity=cache.identity,
        text_format=text_format,
        task=prefix.task.spec,
        data_hash=prefix.task.data_hash,
        demonstrations=prefix.demonstrations,
        num_dropped=prefix.num_dropped,
        answers=prefix.answers,
        blend=prefix.blend,
    ).model_dump_json()
    metadata = {HEADER_KEY: header, HASH_KEY: content_digest(header, tensors)}
    try:
        write_atomically(path, lambda aside: save_file(tensors, aside, metadata))
    except (OSError, SafetensorError) as error:
        raise MachineError(f"{path} could not be written: {reason(error)}.") from error


def load_compiled(path: Path, backend: Backend, encoder: Encoder) -> TaskPrefix:
    """Read a compiled task for the model that it was compiled with.

    Anyone who can write the file can make up keys and values, as they could a model; what is checked here is that the
    file is complete, belongs to this model, and its text has the tokens that this tokenizer gives it.

    Raises:
        UserError: If the file is no compiled task, is truncated or altered, or belongs to another model, adapter,
            precision, format or version; the error says which.
    """
    if not isinstance(backend, LocalBackend):
        raise backend_cannot_compile(backend.identity)
    require_compiled_file(path)
    with located(file=path):
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                header = _checked_header(metadata)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise _incomplete(reason(error)) from error
        if metadata.get(HASH_KEY) != content_digest(metadata[HEADER_KEY], tensors):
            raise UserError("altered_file", "it was altered after it was written", remedy=COMPILE_AGAIN)
        require_own(header.identity, backend.identity)
        if header.text_format != encoder.format:
            raise _foreign_format(header.text_format, encoder.format)
        rows = _rows(tensors.pop("rows", None))
        require_demonstrations((*header.demonstrations, *rows), Task(header.task, ()))
        encoder.require_encodable(Task(header.task, (*header.demonstrations, *rows)))
        task = Task(header.task, header.demonstrations, (), header.data_hash)
        token_ids = encoder.encode_prefix(task.instruction(), header.demonstrations)
        if tensors.pop("token_ids", torch.empty(0)).tolist() != list(token_ids):
            raise foreign_prefix("another tokenizer", header.identity, backend.identity)
        block = block_of(tensors, 0, len(token_ids), backend.model)
    cache = PrefixCache(backend.identity, token_ids, (block,))
    return TaskPrefix(
        task,
        header.demonstrations,
        header.num_dropped,
        encoder.text_hash,
        cache,
        answers=header.answers,
        rows=rows,
        blend=header.blend,
    )


def _foreign_format(found: AnyFormat, expected: AnyFormat) -> UserError:
    """Make the error for a prefix of another text format: where they differ, and the options to load the model with."""
    options = [f"--format {found.kind}"] if found.kind != expected.kind else []
    if isinstance(found, ParagraphFormat) and found.end_of_answer not in (BLANK_LINE, expected.end_of_answer):
        options.append(f"--end-of-answer {found.end_of_answer!r}")
    how = f"Give {' and '.join(options)}" if options else "Use the text format that it was made with"
    error = UserError("foreign_prefix", "the prefix was made with another text format")
    error.remedy = f"{how}, or compile the task again."
    names = _difference(expected, found), _difference(found, expected)
    if len(set(names)) > 1:
        error.expected, error.found = names
    return error


def _difference(text_format: AnyFormat, other: AnyFormat) -> str:
    """Name a text format, and what sets it apart from another one."""
    parts: list[str] = [text_format.kind]
    if isinstance(text_format, ParagraphFormat) and isinstance(other, ParagraphFormat):
        if text_format.end_of_answer != other.end_of_answer:
            parts.append(f"end of answer {text_format.end_of_answer!r}")
        if text_format.separator != other.separator:
            parts.append(f"separator {text_format.separator!r}")
    return ", ".join(parts)


def _rows(tensor: Tensor | None) -> tuple[Example, ...]:
    """Read the rows to retrieve from; none where the task was not compiled to retrieve."""
    if tensor is None:
        return ()
    try:
        return _ROWS.validate_json(tensor.numpy().tobytes())
    except ValidationError as error:
        raise _incomplete(reason(error)) from error


def block_of(tensors: Mapping[str, Tensor], start: int, num_tokens: int, model: PreTrainedModel) -> Block:
    """Take the keys and values of all layers, and refuse tensors that are not those of so many tokens in this model.

    Args:
        tensors: ``keys.0``, ``values.0``, ``keys.1``, … of a file.
        start: Position of the first token.
        num_tokens: Number of tokens.
        model: The model that made them.

    Raises:
        UserError: If so.
    """
    key_heads, head_size = key_shape(model)
    layers = range(model.config.get_text_config().num_hidden_layers)
    names = [[f"{kind}.{layer}" for layer in layers] for kind in ("keys", "values")]
    expected = dict.fromkeys(chain(*names), ((1, key_heads, num_tokens, head_size), model.dtype))
    if not num_tokens or expected != {name: (tuple(one.shape), one.dtype) for name, one in tensors.items()}:
        raise _incomplete("its keys and values are not those of its text in this model")
    keys, values = (tuple(tensors[name].to(model.device) for name in some) for some in names)
    return Block(start, keys, values)


def _checked_header(metadata: Mapping[str, str]) -> Header:
    """Read the header, version first, so that a file of another version is called that."""
    if HEADER_KEY not in metadata:
        raise not_compiled("it is no compiled task")
    try:
        version = TypeAdapter(dict[str, Any]).validate_json(metadata[HEADER_KEY]).get("format_version")
        if version not in READ_VERSIONS:
            what = "it was compiled by another version of manyicl"
            expected = f"format version {' or '.join(map(str, READ_VERSIONS))}"
            raise UserError("other_version", what, expected=expected, found=repr(version), remedy=COMPILE_AGAIN)
        return Header.model_validate_json(metadata[HEADER_KEY])
    except ValidationError as error:
        raise _incomplete(reason(error)) from error


def _incomplete(why: str) -> UserError:
    return UserError("incomplete_file", f"it is no complete compiled task, {why}", remedy=COMPILE_AGAIN)


def content_digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash the header of a file and the content of every tensor in it, contiguous and on the CPU."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
