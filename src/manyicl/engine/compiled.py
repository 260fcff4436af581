"""Compiled tasks: a prefix on disk, with what the model made of its own demonstrations.

One safetensors file holds keys, values and tokens, and in its header the task, the demonstrations, the text format and
the model's fingerprint. It holds the demonstrations in recoverable form, as text and as keys and values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.backend import Backend, Identity, backend_cannot_compile
from manyicl.engine.local import LocalBackend
from manyicl.engine.observed import ObservedAnswer
from manyicl.engine.prefix_cache import PrefixCache
from manyicl.engine.task_prefix import CompiledTask, TaskPrefix
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.text_format import AnyFormat
from manyicl.errors import MachineError, UserError
from manyicl.model.continuation import Block, key_shape
from manyicl.model.manifest import library_versions
from manyicl.tasks.task import Example, Family, Query, Task, TaskSpec

FORMAT_VERSION = 2
HEADER_KEY, HASH_KEY = "manyicl_compiled_task", "sha256"


class SavedTemplate(BaseModel):
    """A template as written."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: str
    class_names: Mapping[str, Mapping[str, str]] = {}


class SavedExample(BaseModel):
    """A demonstration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    query: str
    choices: tuple[str, ...] | None
    answer: str
    references: tuple[str, ...]
    origin: str

    @classmethod
    def of(cls, example: Example) -> SavedExample:
        """Take an example's content."""
        return cls(
            query=example.query.text,
            choices=example.query.choices,
            answer=example.answer,
            references=example.references,
            origin=example.origin,
        )

    def example(self) -> Example:
        """Make the example again."""
        return Example(Query(self.query, self.choices), self.answer, self.references, self.origin)


class SavedTask(BaseModel):
    """A task without its rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    family: Family
    metric: str
    labels: tuple[str, ...] | None = Field(min_length=1)
    instruction: SavedTemplate | None
    query: SavedTemplate
    columns: tuple[str, ...]
    choices_column: str | None
    source: str
    data_hash: str
    max_answer_tokens: int | None = Field(ge=1)


class Header(BaseModel):
    """What stands in the header of a compiled task."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
    model: str = Field(description="How the person named the model.")
    model_fingerprint: str = Field(description="Hash of its weights, adapter included.")
    base_fingerprint: str | None = Field(description="Of the base, where the model is an adapter.")
    config_hash: str = Field(description="Hash of the network's configuration, which says how weights are used.")
    dtype: str = Field(description="Of keys and values, as the model computes.")
    text_format: AnyFormat
    task: SavedTask
    demonstrations: tuple[SavedExample, ...]
    num_left_out: int
    answers: tuple[tuple[int, float, bool], ...]
    versions: dict[str, str] = Field(default_factory=library_versions)


def save_compiled(compiled: CompiledTask, path: Path) -> None:
    """Write a compiled task; an earlier file is replaced only once the new one is whole.

    Raises:
        UserError: If the file cannot stand there, or the prefix is empty.
        MachineError: If the disk refuses.
    """
    prefix, cache = compiled.prefix, compiled.prefix.cache
    if not isinstance(cache, PrefixCache) or not cache.blocks:
        raise UserError(f"Task {prefix.task.name!r} has neither instruction nor demonstrations; nothing to compile.")
    require_place(path)
    tensors = {"token_ids": torch.tensor(prefix.token_ids)}
    num_layers = len(cache.blocks[0].keys)
    for layer in range(num_layers):
        tensors[f"keys.{layer}"] = torch.cat([block.keys[layer] for block in cache.blocks], dim=2)
        tensors[f"values.{layer}"] = torch.cat([block.values[layer] for block in cache.blocks], dim=2)
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = Header(
        model=cache.identity.reference,
        model_fingerprint=cache.identity.fingerprint,
        base_fingerprint=cache.identity.base_fingerprint,
        config_hash=cache.identity.config_hash,
        dtype=cache.identity.dtype,
        text_format=prefix.text_format,
        task=_saved_task(prefix.task),
        demonstrations=tuple(map(SavedExample.of, prefix.demonstrations)),
        num_left_out=prefix.num_dropped,
        answers=tuple((one.num_shots, one.log_probability, one.is_right) for one in compiled.answers),
    ).model_dump_json()
    part = path.with_name(path.name + ".part")
    try:
        save_file(tensors, part, {HEADER_KEY: header, HASH_KEY: _digest(header, tensors)})
        part.replace(path)
    except (OSError, SafetensorError) as error:
        part.unlink(missing_ok=True)
        raise MachineError(f"{str(path)!r} could not be written: {error}") from error


def require_place(path: Path) -> None:
    """Refuse a place where a compiled task cannot be written, or would replace something else.

    Raises:
        UserError: If it is a folder, its folder does not exist, or a file that is no compiled task stands there.
    """
    if path.is_dir() or not path.parent.is_dir():
        raise UserError(f"{str(path)!r} cannot be written: expected a file name in a folder that exists.")
    if path.exists():
        try:
            with safe_open(path, framework="pt") as file:
                is_compiled = HEADER_KEY in (file.metadata() or {})
        except (SafetensorError, OSError):
            is_compiled = False
        if not is_compiled:
            raise UserError(f"{str(path)!r} is there and no compiled task; give another name, or remove it.")


def load_compiled(path: Path, backend: Backend, encoder: Encoder) -> CompiledTask:
    """Read a compiled task for the model that it was compiled with.

    Whoever can write the file can make up keys and values, as they could a model; what is checked here is that the
    file is whole, belongs to this model, and says of its own text what the tokenizer says.

    Raises:
        UserError: If the file is no compiled task, is truncated or altered, or belongs to another model, adapter,
            precision, format or version; the sentence says which.
    """
    if not isinstance(backend, LocalBackend):
        raise backend_cannot_compile(backend.identity)
    if path.is_dir():
        raise UserError(f"{str(path)!r} is a folder; expected a file written by `manyicl compile`.")
    if not path.is_file():
        raise UserError(f"The compiled task {str(path)!r} does not exist; make it with `manyicl compile`.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = _checked_header(path, metadata)
            _require_same_model(path, header, backend.identity, encoder.format)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{str(path)!r} is not a whole compiled task: {error}. Compile it again.") from error
    if metadata.get(HASH_KEY) != _digest(metadata[HEADER_KEY], tensors):
        raise UserError(f"{str(path)!r} was altered after it was written: its hash differs. Compile it again.")
    demonstrations = tuple(saved.example() for saved in header.demonstrations)
    task = _task(header.task, demonstrations)
    encoder.require_encodable(task)
    token_ids = encoder.encode_prefix(task.instruction(), demonstrations)
    _require_whole(path, tensors, token_ids, backend.model)
    layers = range(backend.model.config.get_text_config().num_hidden_layers)
    block = Block(
        0,
        tuple(tensors[f"keys.{layer}"].to(backend.model.device) for layer in layers),
        tuple(tensors[f"values.{layer}"].to(backend.model.device) for layer in layers),
    )
    cache = PrefixCache(backend.identity, token_ids, (block,))
    prefix = TaskPrefix(task, demonstrations, header.num_left_out, encoder.format, cache)
    return CompiledTask(prefix, tuple(ObservedAnswer(*answer) for answer in header.answers))


def _require_whole(
    path: Path, tensors: Mapping[str, Tensor], token_ids: tuple[int, ...], model: PreTrainedModel
) -> None:
    """Refuse tensors that are not those of this text in this network."""
    key_heads, head_size = key_shape(model)
    states = (1, key_heads, len(token_ids), head_size)
    layers = range(model.config.get_text_config().num_hidden_layers)
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]]
    expected = {f"{kind}.{layer}": (states, model.dtype) for kind in ("keys", "values") for layer in layers}
    expected["token_ids"] = ((len(token_ids),), torch.int64)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
    if wrong or not token_ids:
        name = wrong[0] if wrong else "token_ids"
        raise UserError(
            f"{str(path)!r} is not a whole compiled task: its tensor {name!r} is {found.get(name, 'missing')}, "
            f"expected {expected.get(name, 'none')}. Compile it again."
        )
    if tuple(tensors["token_ids"].tolist()) != token_ids:
        raise UserError(
            f"{str(path)!r} was compiled with another tokenizer: its demonstrations are other tokens here. Compile it "
            "again."
        )


def _checked_header(path: Path, metadata: Mapping[str, str]) -> Header:
    """Read the header, version first, so that a file of another version is called that."""
    if HEADER_KEY not in metadata:
        raise UserError(f"{str(path)!r} is not a compiled task; expected a file written by `manyicl compile`.")
    try:
        version = TypeAdapter(dict[str, Any]).validate_json(metadata[HEADER_KEY]).get("format_version")
        if version != FORMAT_VERSION:
            raise UserError(
                f"{str(path)!r} has format version {version!r}; this version of manyicl reads {FORMAT_VERSION}. "
                "Compile it again."
            )
        return Header.model_validate_json(metadata[HEADER_KEY])
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"])) or "header"
        raise UserError(
            f"{str(path)!r} is not a whole compiled task: {where}: {problem['msg']}. Compile it again."
        ) from error


def _require_same_model(path: Path, header: Header, identity: Identity, text_format: AnyFormat) -> None:
    """Refuse keys and values that another network made."""
    if header.dtype != identity.dtype:
        raise UserError(
            f"{str(path)!r} was compiled in {header.dtype}; the model is loaded in {identity.dtype}. Load it with "
            f"dtype={header.dtype!r}, or compile the task again."
        )
    if header.model_fingerprint != identity.fingerprint:
        base = identity.base_fingerprint
        another = "another adapter of the same base" if base and base == header.base_fingerprint else "another model"
        raise UserError(
            f"{str(path)!r} was compiled with {another}: {header.model!r} with fingerprint "
            f"{header.model_fingerprint[:12]}; {identity.reference!r} has {identity.fingerprint[:12]}. Use the model "
            "it was compiled with, or compile the task again."
        )
    if header.config_hash != identity.config_hash:
        raise UserError(
            f"{str(path)!r} was compiled with another configuration of the same weights, such as other positions or "
            "windows. Compile the task again."
        )
    if header.text_format != text_format:
        raise UserError(
            f"{str(path)!r} was compiled with another text format ({header.text_format.model_dump()}); the engine "
            f"uses {text_format.model_dump()}. Compile the task again."
        )


def _digest(header: str, tensors: Mapping[str, Tensor]) -> str:
    """Hash the header and the content of every tensor."""
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _saved_task(task: Task) -> SavedTask:
    spec = task.spec
    return SavedTask(
        name=spec.name,
        family=spec.family,
        metric=spec.metric,
        labels=spec.labels,
        instruction=SavedTemplate(source=spec.instruction_template) if spec.instruction_template else None,
        query=SavedTemplate(source=spec.query_template, class_names=spec.class_names),
        columns=spec.columns,
        choices_column=spec.choices_column,
        source=spec.source,
        data_hash=task.data_hash,
        max_answer_tokens=spec.max_answer_tokens,
    )


def _task(saved: SavedTask, demonstrations: tuple[Example, ...]) -> Task:
    """Make the task again, with its demonstrations as the training side and no test side."""
    spec = TaskSpec(
        name=saved.name,
        family=saved.family,
        metric=saved.metric,
        labels=saved.labels,
        instruction_template=saved.instruction.source if saved.instruction else None,
        query_template=saved.query.source,
        class_names=saved.query.class_names,
        choices_column=saved.choices_column,
        source=saved.source,
        max_answer_tokens=saved.max_answer_tokens,
    )
    return Task(spec, demonstrations, (), saved.data_hash)
