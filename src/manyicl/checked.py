"""Files that a person writes -> checked objects, or one sentence that names file, line or key, and the mistake."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from manyicl.errors import UserError, did_you_mean

_MOST_SHOWN = 200


class Section(BaseModel):
    """A part of a file: cannot change once read, and knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def read_text(path: Path) -> str:
    """Read UTF-8, with or without a byte order mark, with any line ends.

    The whole file is read into memory, so that the line of a wrong byte can be named.

    Raises:
        UserError: If the file cannot be opened or is not UTF-8.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read, {(error.strerror or str(error)).lower()}.") from error
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{path}: the file is UTF-16; save it as UTF-8.")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}:{line}: not UTF-8, the byte 0x{content[error.start]:02x} cannot be read; save the file as UTF-8."
        ) from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


class UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML in which a key is a text that stands only once; each kind of file adds how it reads values."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping.

        Raises:
            yaml.constructor.ConstructorError: If a key stands twice, or is itself a list or a mapping.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                # Without quotes, {{ text }} is a mapping whose key is a mapping.
                problem = "a key is a list or a mapping; put text that begins with a brace or a bracket in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value!r} stands twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, place: str, loader: type[UniqueKeyLoader]) -> Any:
    """Read YAML; an error begins with ``place`` and, where the text has several lines, the line.

    Raises:
        UserError: If it is no YAML.
    """
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{place}:{mark.line + 1}" if mark is not None and "\n" in text else place
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}: not valid YAML, {problem}.") from error
    except (ValueError, LookupError) as error:  # a value of a tag that it does not fit, such as the date 2024-13-01
        raise UserError(f"{place}: not valid YAML, {error}.") from error
    except RecursionError as error:
        raise UserError(f"{place}: the YAML is nested too deeply.") from error


def read_yaml(path: Path, loader: type[UniqueKeyLoader]) -> Any:
    """Read a YAML file.

    Raises:
        UserError: If it cannot be opened, or is not UTF-8 or no YAML.
    """
    return parse_yaml(read_text(path), str(path), loader)


ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], values: Mapping[Any, Any], place: str) -> ModelT:
    """Validate ``values``; the first thing wrong becomes one sentence that begins with ``place``.

    Raises:
        UserError: If anything is wrong.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(f"{place}: {_sentence(model, error)}") from error


def _sentence(model: type[BaseModel], error: ValidationError) -> str:
    """Say the first thing that is wrong, where, what was found and what was meant."""
    problems = error.errors(include_url=False)
    # A misspelt key says more than the required key that it leaves missing.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    location = _written_location(first["loc"])
    key = ".".join(map(str, location))
    found = _shortened(repr(first["input"]))
    if first["type"] == "extra_forbidden":
        known = list(_innermost_section(model, first["loc"]).model_fields)
        return f"unknown key {key!r}.{did_you_mean(str(location[-1]), known) or f' Known here: {known}.'}"
    if first["type"] == "missing":
        return f"the key {key!r} is missing."
    is_union = len(location) < len(first["loc"])
    if is_union and (description := _description(model, first["loc"])):
        return f"{key}: found {found}; expected: {description}"
    reason = first["msg"].removeprefix("Value error, ")
    reason = reason[:1].lower() + reason[1:]
    if first["type"] != "value_error":
        reason += f"; found {found}"
    hint = ""
    if first["type"] == "literal_error":
        hint = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    return f"{key + ': ' if key else ''}{reason}.{hint}"


def _innermost_section(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """Return the section in which the last part of ``location`` stands."""
    section = model
    for part in location[:-1]:
        field = section.model_fields.get(str(part))
        section = (field is not None and _section_of(field.annotation)) or section
    return section


def _description(model: type[BaseModel], location: Sequence[int | str]) -> str | None:
    """Return what the file's model says about the field that ``location`` runs through."""
    fields = _innermost_section(model, location).model_fields
    return next((fields[str(part)].description for part in location if str(part) in fields), None)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """Find the pydantic model in an annotation such as ``LoraSettings | None``."""
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((c for c in candidates if isinstance(c, type) and issubclass(c, BaseModel)), None)


def _written_location(location: Iterable[int | str]) -> list[int | str]:
    """Leave out the parts that pydantic adds for the branches of a union, such as ``tuple[str, ...]``."""
    return [part for part in location if not (isinstance(part, str) and ("[" in part or part in _BRANCHES))]


_BRANCHES = frozenset({"int", "str", "float", "bool"})


def _shortened(text: str) -> str:
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 1] + "…"
