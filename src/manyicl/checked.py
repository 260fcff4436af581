"""Parse files that users write into checked objects, or raise an error that names the file, line or key, and why."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, NoReturn, TypeVar, get_args

import yaml
from annotated_types import Le
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from manyicl.errors import UserError, did_you_mean, located, quoted
from manyicl.library_errors import lower_case_start, reason

# No recipe or task file comes near these; a few lines of aliases of aliases amount to billions of values.
MOST_YAML_VALUES = 100_000
MOST_YAML_LEVELS = 50
SAVE_AS_UTF8 = "Save it as UTF-8."
GZIP_START = b"\x1f\x8b"
# Longer beginnings first: the mark of UTF-16 begins that of UTF-32.
_NO_UTF8 = (
    (b"\xff\xfe\0\0", "UTF-32", SAVE_AS_UTF8),
    (b"\0\0\xfe\xff", "UTF-32", SAVE_AS_UTF8),
    (b"\xff\xfe", "UTF-16", SAVE_AS_UTF8),
    (b"\xfe\xff", "UTF-16", SAVE_AS_UTF8),
    (GZIP_START, "packed with gzip", "Unpack it, or let the name of a packed table end in .gz."),
    (b"PK\x03\x04", "a ZIP archive or a spreadsheet", "Unpack it, or let the name of an Excel workbook end in .xlsx."),
    (b"\xd0\xcf\x11\xe0", "an old or a protected Office file", "Save it as .xlsx without a password, or as CSV."),
)
# Encodings in which hardly any text is valid UTF-8 by chance: accents are among plain letters, or the letters of an
# alphabet beside each other.
_ALPHABETS = re.compile(r"cp125\d|iso8859-(?!11)\d+|koi8-[rtu]")
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
            raise ValueError(f"expected a number of at most {MOST_COUNTED:,}; found {quoted(value)}")
        return value


def _kinds_in(annotation: Any) -> Iterable[Any]:
    """Yield the types that an annotation is made of, such as those of ``tuple[int, int] | None``."""
    yield annotation
    for part in get_args(annotation):
        yield from _kinds_in(part)


def read_text(path: Path) -> str:
    """Read a text whole; see `text_lines`.

    Raises:
        UserError: As `text_lines`.
    """
    return "".join(text_lines(path))


def require_whole_characters(text: str) -> None:
    """Refuse half characters: JSON may hold lone surrogates, which no tokenizer or file can.

    Raises:
        UserError: With the half.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start : error.end]
        raise UserError("half_a_character", f"a text holds half a character, {half!r}") from error


def text_lines(path: Path, encoding: str | None = None) -> Iterator[str]:
    """Yield the lines of a text, with or without a byte order mark, with any line ends, as they are needed.

    Args:
        path: The file.
        encoding: Encoding that the user named; by default UTF-8.

    Raises:
        UserError: If the file cannot be opened, is packed or not in that encoding, or holds NUL bytes, which no text
            does.
    """
    try:
        with path.open("rb") as file:
            yield from decoded_lines(file, path, encoding)
    except OSError as error:
        raise UserError("unreadable_file", f"cannot be read, {reason(error)}", file=path) from error


def decoded_lines(lines: Iterable[bytes], place: str | Path, encoding: str | None = None) -> Iterator[str]:
    """Decode lines as they come; all line ends become line feeds.

    Args:
        lines: Lines of a file or a stream; any other pieces of it do, too.
        place: The file, or what an error names instead.
        encoding: Encoding that the user named; by default UTF-8.

    Raises:
        UserError: If they are packed or not in that encoding, or hold NUL bytes.
    """
    # Only line feeds end a line in JSON: str.splitlines would also cut at U+2028 and others.
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder(encoding or "utf-8")(), translate=True)
    number, rest = 1, ""
    may_be_utf8 = encoding is not None and _ALPHABETS.fullmatch(codecs.lookup(encoding).name) is not None
    for piece, content in enumerate(chain(lines, [b""])):
        if piece == 0:
            _require_text(content, encoding, place)
        if may_be_utf8 and not content.isascii():
            _require_no_utf8(content, str(encoding), place)
            may_be_utf8 = False
        try:
            text = decoder.decode(content, final=not content)
        except UnicodeError as error:
            raise _undecodable(error, content, encoding, place, number) from error
        if "\0" in text:
            # Letters of Latin alone have a NUL byte as every second one there.
            alternates = "\0" not in text[::2] and text[1::2] == "\0" * (len(text) // 2)
            is_utf16 = piece == 0 and encoding is None and alternates
            remedy = f"It looks like UTF-16 (utf-16-le). {SAVE_AS_UTF8}" if is_utf16 else SAVE_AS_UTF8
            what = f"not text in {encoding or 'UTF-8'}"
            raise UserError("not_utf8", what, found="a NUL byte", remedy=remedy, file=place, row=number)
        *ended, rest = (rest + (text.lstrip("\ufeff") if piece == 0 else text)).split("\n")
        for line in ended:
            number += 1
            yield f"{line}\n"
    if rest:
        yield rest


def _require_text(beginning: bytes, encoding: str | None, place: str | Path) -> None:
    """Refuse a file that begins like one of another kind, or of an encoding that was not named."""
    for mark, what, remedy in _NO_UTF8:
        if beginning.startswith(mark) and not (encoding and what.startswith("UTF")):
            raise UserError("not_utf8", f"the file is {what}", expected="text in UTF-8", remedy=remedy, file=place)


def _require_no_utf8(content: bytes, encoding: str, place: str | Path) -> None:
    """Refuse UTF-8 that is named an older encoding: reading might not fail, and make each accent two wrong letters."""
    try:
        content.decode()
    except UnicodeDecodeError:
        return
    remedy = "Name the encoding utf-8, or none."
    raise UserError("not_in_encoding", f"the file is UTF-8, not {encoding}", remedy=remedy, file=place)


def _undecodable(error: UnicodeError, content: bytes, encoding: str | None, place: str | Path, row: int) -> UserError:
    """Make the error for bytes that are no text in an encoding; name another one that they look like."""
    what, other = f"not text in {encoding or 'UTF-8'}", "Name the encoding that it has."
    if encoding is not None or not isinstance(error, UnicodeDecodeError):
        return UserError("not_in_encoding", what, remedy=other, file=place, row=row)
    remedy = SAVE_AS_UTF8
    if word := _word_in_cp1252(content):
        remedy = f"It looks like cp1252, in which a word there is {word!r}. {remedy}"
    found = f"the byte 0x{error.object[error.start]:02x}"
    return UserError("not_utf8", what, found=found, remedy=remedy, file=place, row=row)


def _word_in_cp1252(line: bytes) -> str | None:
    """Return the first word with an accent, or another sign of Western Europe, if a line seems to be in cp1252.

    >>> _word_in_cp1252("Gerät,technical".encode("cp1252"))
    'Gerät'
    """
    high = [byte for byte in line if byte > 127]
    letters = sum(bytes([byte]).isalpha() for byte in line)
    # Alphabets other than Latin have most of their letters above 127.
    if not high or 2 * len(high) > letters:
        return None
    try:
        text = line.decode("cp1252")
    except UnicodeDecodeError:
        return None
    return next((word for word in re.findall(r"[^\W_]+|\S", text) if not word.isascii()), None)


def require_encoding(name: str) -> str:
    """Return the name of an encoding of texts.

    Raises:
        ValueError: If Python knows none of that name.
    """
    try:
        "".encode(name)
    except (LookupError, ValueError) as error:
        hint = did_you_mean(name, ("utf-8", "utf-16", "cp1252", "latin-1", "cp1251", "shift_jis", "gb18030"))
        raise ValueError(f"no encoding of texts has the name {name!r}{'; ' if hint else ''}{hint.strip()}") from error
    return name


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
        """Compose the document, and check all of it before any value is built.

        Raises:
            yaml.constructor.ConstructorError: If it breaks a rule of `_require_plain`.
        """
        node: yaml.Node | None = super().get_single_node()
        if node is not None:
            _require_plain(node, {}, MOST_YAML_LEVELS)
        return node


def _require_plain(node: yaml.Node, sizes: dict[int, int], levels_left: int) -> int:
    """Check a node and all in it, and count its values, an alias as often as it is used.

    Args:
        node: The values, which may be held in several places.
        sizes: Number of values of each node that was counted, by identity.
        levels_left: How deeply it may be nested; aliases may also lead round in a circle.

    Raises:
        yaml.constructor.ConstructorError: If a key occurs twice, or is itself a list or a mapping; if a text holds NUL,
            which no path can, or half a character, which no file or tokenizer can; if values are too many, or nested
            too deeply.
    """
    if id(node) in sizes:
        return sizes[id(node)]
    parts = []
    if levels_left < 0:
        _refuse_yaml(f"values are nested more than {MOST_YAML_LEVELS} deep; no key takes so many levels", node)
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                # Without quotes, {{ text }} is a mapping whose key is a mapping.
                what = "a key is a list or a mapping"
                _refuse_yaml(f"{what}; put text that begins with a brace or a bracket in quotes", key)
            if key.value in seen:
                _refuse_yaml(f"the key {key.value!r} occurs twice; keep one of them", key)
            seen.add(key.value)
        parts = list(chain(*node.value))
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif unfit := _UNFIT.search(node.value):
        _refuse_yaml(f"a text holds {unfit[0]!r}, which is no whole character; leave it out", node)
    sizes[id(node)] = 1 + sum(_require_plain(part, sizes, levels_left - 1) for part in parts)
    if sizes[id(node)] > MOST_YAML_VALUES:
        what = f"aliases and all, it holds more than {MOST_YAML_VALUES:,} values"
        _refuse_yaml(f"{what}; write them out, without aliases", node)
    return sizes[id(node)]


def _refuse_yaml(problem: str, node: yaml.Node) -> NoReturn:
    raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


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
    except (ValueError, LookupError, OverflowError, RecursionError) as error:
        # A value of a tag that it does not fit, as in `!!int one`, or the number of no character, as in "\Uffffffff".
        problem = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        cause = error
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
    with located(file=place):
        try:
            return model.model_validate_json(values) if isinstance(values, str) else model.model_validate(dict(values))
        except ValidationError as error:
            raise _first_error(model, error, key) from error


def _first_error(model: type[BaseModel], error: ValidationError, under: str) -> UserError:
    """Say the first thing that is wrong, where, what was found and what was meant."""
    # A misspelt key says more than the required key that it leaves missing.
    first = min(error.errors(include_url=False), key=lambda problem: problem["type"] != "extra_forbidden")
    kind, location = first["type"], _written_location(first["loc"])
    section, meaning = _section_and_meaning(model, first["loc"])
    if kind == "extra_forbidden":
        name = str(first["loc"][-1])  # any text may be a user's key
        key = ".".join(filter(None, (under, *map(str, _written_location(first["loc"][:-1])), name)))
        remedy = did_you_mean(name, section.model_fields) or f"Known here: {list(section.model_fields)}."
        return UserError("unknown_key", f"unknown key {key!r}", remedy=remedy, field=key)
    key = ".".join(filter(None, (under, *map(str, location))))
    if kind == "missing":
        return UserError("missing_key", f"the key {key!r} is missing{meaning and f', {meaning}'}", field=key)
    found: str | None = quoted(first["input"])
    is_union = len(location) < len(first["loc"])
    if meaning and (is_union or kind == "string_pattern_mismatch"):
        return UserError("wrong_value", f"{key}: wrong value", expected=meaning, found=found, field=key)
    said = lower_case_start(first["msg"].removeprefix("Value error, "))
    for pythons, ours in (("tuple", "list"), ("valid dictionary", "mapping"), (" after validation", "")):
        said = said.replace(pythons, ours)
    said = re.sub(r" or instance of \w+| using _\w+\(\)", "", said)  # names of the code
    hint = None
    if kind == "value_error":
        found = None  # the message says it
    elif kind == "literal_error":
        hint = did_you_mean(str(first["input"]), re.findall(r"'([^']*)'", first["ctx"]["expected"]))
    return UserError("wrong_value", f"{key}: {said}" if key else said, found=found, remedy=hint, field=key or None)


def _section_and_meaning(section: type[BaseModel], location: Iterable[int | str]) -> tuple[type[BaseModel], str]:
    """Return the innermost section that a location leads into, and the description of the last field on its way."""
    meaning = ""
    for part in location:
        field = section.model_fields.get(str(part))
        if field is None:
            continue
        meaning = lower_case_start((field.description or "").rstrip("."))
        inner = (kind for kind in _kinds_in(field.annotation) if isinstance(kind, type) and issubclass(kind, BaseModel))
        if (found := next(inner, None)) is None:
            break
        section = found
    return section, meaning


def _written_location(location: Iterable[int | str]) -> list[int | str]:
    """Leave out the parts that pydantic adds for the branches of a union, such as ``tuple[str, ...]``."""
    return [part for part in location if not (isinstance(part, str) and ("[" in part or part in _BRANCHES))]


_BRANCHES = frozenset({"int", "str", "float", "bool", "constrained-int"})
