"""Files that a user writes -> checked objects, or an error that names file, line or key, and the mistake."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar, get_args

import yaml
from annotated_types import Le
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from manyicl.errors import UserError, did_you_mean, shown
from manyicl.library_errors import reason

# No recipe or task file comes near these; a few lines of aliases of aliases amount to billions of values.
MOST_YAML_VALUES = 100_000
MOST_YAML_LEVELS = 50
_SAVE_AS_UTF8 = "Save the file as UTF-8."
# Longer beginnings first: the mark of UTF-16 begins that of UTF-32.
_NO_UTF8 = (
    (b"\xff\xfe\0\0", "UTF-32", _SAVE_AS_UTF8),
    (b"\0\0\xfe\xff", "UTF-32", _SAVE_AS_UTF8),
    (b"\xff\xfe", "UTF-16", _SAVE_AS_UTF8),
    (b"\xfe\xff", "UTF-16", _SAVE_AS_UTF8),
    (b"\x1f\x8b", "packed with gzip", "Unpack it."),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "Unpack it, or export it as CSV."),
)
# What torch takes as a number of threads, rows or steps.
MOST_COUNTED = 2**31 - 1


class Section(BaseModel):
    """A part of a file: cannot change once read, and knows no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _plain_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Refuse ``true`` where a number is meant, which Python counts as 1, and numbers too large to count with."""
        parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else [value]
        numbers = [part for part in parts if isinstance(part, int)]
        field = cls.model_fields[str(info.field_name)]
        kinds = set(_kinds_in(field.annotation)) if numbers else set()
        if any(isinstance(number, bool) for number in numbers) and kinds & {int, float} and bool not in kinds:
            raise ValueError(f"expected a number; found {value!r}")
        has_bound = any(isinstance(rule, Le) for rule in field.metadata)
        if any(abs(number) > MOST_COUNTED for number in numbers) and int in kinds and not has_bound:
            raise ValueError(f"expected a number of at most {MOST_COUNTED:,}; found {shown(value)}")
        return value


def _kinds_in(annotation: Any) -> Iterable[Any]:
    """Yield the types that an annotation is made of, such as those of ``tuple[int, int] | None``."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds_in(part)


def read_text(path: Path) -> str:
    """Read UTF-8, with or without a byte order mark, with any line ends.

    The whole file is read into memory, so that the line of a wrong byte can be named.

    Raises:
        UserError: If the file cannot be opened, is packed or not UTF-8, or holds NUL bytes, which no text does.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError("unreadable_file", f"cannot be read, {reason(error)}", file=path) from error
    return _decoded(content, path).lstrip("\ufeff")


def text_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a text, read as they are needed, each with a line feed at its end; see `read_text`.

    Raises:
        UserError: As `read_text`, once the line is reached.
    """
    try:
        with path.open("rb") as file:
            for number, content in enumerate(file, start=1):
                text = _decoded(content, path, number)
                text = text.lstrip("\ufeff") if number == 1 else text
                yield from (f"{line}\n" for line in text.removesuffix("\n").split("\n"))
    except OSError as error:
        raise UserError("unreadable_file", f"cannot be read, {reason(error)}", file=path) from error


def _decoded(content: bytes, path: Path, first_line: int = 1) -> str:
    """Decode a text, or lines of one, and write all line ends as line feeds."""
    for beginning, what, remedy in _NO_UTF8 if first_line == 1 else ():
        if content.startswith(beginning):
            raise UserError("not_utf8", f"the file is {what}", expected="text in UTF-8", remedy=remedy, file=path)
    try:
        text = content.decode("utf-8")
        position = content.find(b"\0")
    except UnicodeDecodeError as error:
        position = error.start
    if position >= 0:
        wrong = "a NUL byte" if content[position] == 0 else f"the byte 0x{content[position]:02x}"
        line = content.count(b"\n", 0, position) + first_line
        raise UserError(
            "not_utf8", "the file is not text in UTF-8", found=wrong, remedy=_SAVE_AS_UTF8, file=path, row=line
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


class UniqueKeyLoader(yaml.SafeLoader):
    """Plain YAML in which a key is a text that occurs only once; each kind of file adds how it reads values.

    Values are what JSON has, too: dates, sets and bytes would not read back as what they were.
    """

    yaml_constructors: ClassVar[dict[Any, Any]] = {
        tag: constructor
        for tag, constructor in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("null", "bool", "int", "float", "str", "seq", "map")
    }

    def get_single_node(self) -> yaml.Node | None:
        """Compose the document.

        Raises:
            yaml.constructor.ConstructorError: If it is nested too deeply, or its aliases amount to too many values.
        """
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _require_bounded(node, {}, MOST_YAML_LEVELS)
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        """Read a text.

        Raises:
            yaml.constructor.ConstructorError: If it holds NUL, which no path can, or half a character, which no
                file or tokenizer can.
        """
        value = super().construct_scalar(node)
        if unfit := _UNFIT.search(str(value)):
            problem = f"a text holds {unfit[0]!r}, which is no whole character; leave it out"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return value

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build a mapping.

        Raises:
            yaml.constructor.ConstructorError: If a key occurs twice, or is itself a list or a mapping.
        """
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                # Without quotes, {{ text }} is a mapping whose key is a mapping.
                problem = "a key is a list or a mapping; put text that begins with a brace or a bracket in quotes"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            if key.value in seen:
                problem = f"the key {key.value!r} occurs twice; keep one of them"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _require_bounded(node: yaml.Node, sizes: dict[int, int], levels_left: int) -> int:
    """Count the values of a node, an alias as often as it is used.

    Args:
        node: The values, which may be held in several places.
        sizes: Of the nodes that were counted, by identity.
        levels_left: How deeply it may be nested; aliases may also lead round in a circle.

    Raises:
        yaml.constructor.ConstructorError: If they are too many, or nested too deeply.
    """
    if id(node) not in sizes:
        if levels_left < 0:
            problem = f"values are nested more than {MOST_YAML_LEVELS} deep; no key takes so many levels"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        parts = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            parts = [part for pair in node.value for part in pair]
        sizes[id(node)] = 1 + sum(_require_bounded(part, sizes, levels_left - 1) for part in parts)
    if sizes[id(node)] > MOST_YAML_VALUES:
        problem = f"aliases and all, it holds more than {MOST_YAML_VALUES:,} values; write them out, without aliases"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return sizes[id(node)]


def parse_yaml(text: str, place: str, loader: type[UniqueKeyLoader]) -> Any:
    """Read YAML.

    Args:
        text: The YAML.
        place: File that holds it, or what an error names instead.
        loader: How values are read.

    Raises:
        UserError: If it is no YAML; it names the line where the text has several.
    """
    line, remedy = None, None
    try:
        return yaml.load(text, loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None and "\n" in text else None
        problem, remedy = _yaml_problem(error)
        cause: Exception = error
    except (ValueError, LookupError, OverflowError) as error:
        # A value of a tag that it does not fit, as in `!!int one`, or the number of no character, as in "\Uffffffff".
        problem, cause = str(error), error
    except RecursionError as error:
        problem, cause = "it is nested too deeply", error
    raise UserError("broken_yaml", f"not valid YAML, {problem}", remedy=remedy, file=place, row=line) from cause


def _yaml_problem(error: yaml.YAMLError) -> tuple[str, str | None]:
    """Say what is wrong with YAML, and what to do about what is wrong most often."""
    problem: str = getattr(error, "problem", None) or reason(error)
    if problem.startswith("but "):
        problem = f"{getattr(error, 'context', '')}, {problem}"
    problem, _, remedy = problem.partition("; ")
    if "'\\t'" in problem:
        remedy = "indent with spaces"
    if "constructor for the tag" in problem:
        remedy = "leave the tag out"
    return problem, f"{remedy[:1].upper()}{remedy[1:]}." if remedy else None


def read_yaml(path: Path, loader: type[UniqueKeyLoader]) -> Any:
    """Read a YAML file.

    Raises:
        UserError: If it cannot be opened, or is not UTF-8 or no YAML.
    """
    return parse_yaml(read_text(path), str(path), loader)


# NUL, and the halves of characters that YAML may write as escapes.
_UNFIT = re.compile("[\\0\\ud800-\\udfff]")
ModelT = TypeVar("ModelT", bound=BaseModel)


def validated(model: type[ModelT], values: Mapping[Any, Any] | str, place: str | Path | None, key: str = "") -> ModelT:
    """Check values, or JSON text, against a model.

    Args:
        model: What the values must be.
        values: Key -> value, or JSON text.
        place: File that holds them, or what an error names instead.
        key: Key of that file under which they are; empty for the whole file.

    Raises:
        UserError: If anything is wrong; it says the first.
    """
    try:
        return model.model_validate_json(values) if isinstance(values, str) else model.model_validate(dict(values))
    except ValidationError as error:
        raise _first_error(model, error, key).at(file=place) from error


def _first_error(model: type[BaseModel], error: ValidationError, under: str) -> UserError:
    """Say the first thing that is wrong, where, what was found and what was meant."""
    problems = error.errors(include_url=False)
    # A misspelt key says more than the required key that it leaves missing.
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    kind, location = first["type"], _written_location(first["loc"])
    if kind == "extra_forbidden":
        location = [*_written_location(first["loc"][:-1]), first["loc"][-1]]  # any text may be a user's key
    key = ".".join(filter(None, (under, *map(str, location))))
    if kind == "extra_forbidden":
        known = list(_innermost_section(model, first["loc"]).model_fields)
        hint = did_you_mean(str(location[-1]), known).strip() or f"Known here: {known}."
        return UserError("unknown_key", f"unknown key {key!r}", remedy=hint, field=key)
    meaning = (_description(model, first["loc"]) or "").rstrip(".")
    meaning = meaning[:1].lower() + meaning[1:]
    if kind == "missing":
        return UserError("missing_key", f"the key {key!r} is missing{meaning and f', {meaning}'}", field=key)
    found: str | None = shown(first["input"])
    is_union = len(location) < len(first["loc"])
    if meaning and (is_union or kind == "string_pattern_mismatch"):
        return UserError("wrong_value", f"{key}: wrong value", expected=meaning, found=found, field=key)
    said = first["msg"].removeprefix("Value error, ")
    said = said[:1].lower() + said[1:]
    for pythons, ours in (("tuple", "list"), ("valid dictionary", "mapping"), (" after validation", "")):
        said = said.replace(pythons, ours)
    hint = ""
    if kind == "value_error":
        found = None  # the message says it
    elif kind == "literal_error":
        hint = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"])).strip()
    what = f"{key}: {said}" if key else said
    return UserError("wrong_value", what, found=found, remedy=hint or None, field=key or None)


def _innermost_section(model: type[BaseModel], location: Sequence[int | str]) -> type[BaseModel]:
    """Return the section that holds the last part of ``location``."""
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
