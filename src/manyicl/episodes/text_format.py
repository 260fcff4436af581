"""Where the pieces of an example meet: the plain format, and turns of a chat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from datetime import date
from enum import Enum
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, Self

from pydantic import BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from manyicl.checked import Section
from manyicl.errors import UserError, shortened


class Piece(NamedTuple):
    """A text that is encoded by itself.

    Attributes:
        text: What it says.
        is_control: True where ``</s>`` and the like are the control tokens, as between turns; False where they are
            characters that somebody wrote.
    """

    text: str
    is_control: bool = False


class Place(Enum):
    """What stands before a query in its sequence."""

    FIRST = "nothing"
    AFTER_INSTRUCTION = "an instruction"
    AFTER_SHOT = "a demonstration"


class TextFormat(BaseModel, ABC):
    """How instruction, query and answer become one text.

    ::

        opening(instruction)  [query  answer  between]  [query  answer  between]  query

    The separator closes a query, the terminator an answer. The terminator belongs to the answer: it is supervised,
    generation stops on its text, and a label is scored with it, so that a label which begins another label is
    compared fairly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    separator: str
    terminator: str

    @abstractmethod
    def opening(self, instruction: str) -> tuple[Piece, ...]:
        """Return what stands before the first query."""

    @abstractmethod
    def query(self, query: str, place: Place = Place.AFTER_SHOT) -> tuple[Piece, ...]:
        """Return a query up to where its answer begins."""

    @abstractmethod
    def answer(self, answer: str) -> tuple[Piece, ...]:
        """Return the supervised pieces of an answer, terminator included.

        Raises:
            UserError: If the answer is empty, or contains or completes the terminator, which would end it early.
        """

    @property
    @abstractmethod
    def between(self) -> tuple[Piece, ...]:
        """What stands between an answer with its terminator and the next query."""

    @property
    @abstractmethod
    def begins_with_bos(self) -> bool:
        """Whether a sequence begins with the tokens that the tokenizer itself puts before a text."""

    @property
    @abstractmethod
    def constants(self) -> tuple[Piece, ...]:
        """All that the format itself writes, so that a tokenizer which loses some of it is found out."""

    def has_instruction(self, instruction: str) -> bool:
        """Tell whether an instruction leaves a trace in the text."""
        return bool(instruction)

    def _require_unended(self, answer: str, lead: str = "") -> None:
        """Refuse an answer that the terminator would end early; ``lead`` opens it."""
        if not answer:
            raise UserError("An answer is empty; every example needs one.")
        if f"{lead}{answer}{self.terminator}".index(self.terminator) < len(lead) + len(answer):
            raise UserError(
                f"The answer {shortened(answer, 60)!r} contains the terminator {self.terminator!r}, which would end it "
                f"early. {self._remedy}"
            )

    @property
    @abstractmethod
    def _remedy(self) -> str:
        """What to do about an answer that contains the terminator."""


class PlainFormat(TextFormat):
    """Pieces one after the other: query, separator, answer, terminator."""

    kind: Literal["plain"] = "plain"
    separator: str = Field("\n", min_length=1)
    terminator: str = Field("\n\n", min_length=1)

    @field_validator("terminator")
    @classmethod
    def _not_only_spaces(cls, terminator: str) -> str:
        return _checked_terminator(terminator)

    def opening(self, instruction: str) -> tuple[Piece, ...]:
        """Return the instruction and a terminator; nothing where there is no instruction."""
        return (Piece(f"{instruction}{self.terminator}"),) if instruction else ()

    def query(self, query: str, place: Place = Place.AFTER_SHOT) -> tuple[Piece, ...]:
        """Return a query with the separator, one piece."""
        return (Piece(f"{query}{self.separator}"),)

    def answer(self, answer: str) -> tuple[Piece, ...]:
        """Return an answer with the terminator, one piece."""
        self._require_unended(answer)
        return (Piece(f"{answer}{self.terminator}"),)

    @property
    def before_answer(self) -> str:
        """Nothing."""
        return ""

    @property
    def between(self) -> tuple[Piece, ...]:
        """Nothing."""
        return ()

    @property
    def begins_with_bos(self) -> bool:
        """Always."""
        return True

    @property
    def constants(self) -> tuple[Piece, ...]:
        """Separator and terminator."""
        return Piece(self.separator), Piece(self.terminator)

    @property
    def _remedy(self) -> str:
        return (
            "Collapse blank lines in the answer template, for example with "
            "`{{ answer | replace('\\n\\n', '\\n') }}`, or choose another terminator."
        )


FormatKind = Literal["plain", "chat"]
Part = Literal["instruction", "query", "answer"]


class ChatFormat(TextFormat):
    """Each shot is two turns of a chat; all that stands between texts was cut once from a chat template.

    White space at the end of a constant, as in ``[INST] ``, is kept apart: tokenizers join a space to the word behind
    it, so it is encoded with the text that follows.

    Attributes:
        opening_text: Before the first query where there is no instruction.
        before_instruction: Before an instruction.
        after_instruction: Between an instruction and the first query.
        separator: Between a query and its answer: the generation prompt.
        before_answer: White space that opens an answer.
        terminator: Ends an answer, up to its control token.
        between_text: Between the terminator and the next query.
        trimmed: The texts from whose ends the template takes white space.
        instruction_in: Where an instruction stands: a system turn, or the first query's turn where there is none.
        template_arguments: That the template was given; whoever sends messages to a server must give them too.
    """

    kind: Literal["chat"] = "chat"
    opening_text: str
    before_instruction: str
    after_instruction: str
    before_answer: str
    between_text: str
    trimmed: tuple[Part, ...]
    instruction_in: Literal["system", "first_turn"]
    template_arguments: dict[str, JsonValue] = Field(default_factory=dict)

    def opening(self, instruction: str) -> tuple[Piece, ...]:
        """Return all up to the first query, a system turn with the instruction included."""
        if not self.has_instruction(instruction):
            return _control(self.opening_text.rstrip(" "))
        lead = _spaces_at_the_end(self.before_instruction)
        return (
            *_control(self.before_instruction.rstrip(" ")),
            Piece(lead + self.trim("instruction", instruction)),
            *_control(self.after_instruction.rstrip(" ")),
        )

    def query(self, query: str, place: Place = Place.AFTER_SHOT) -> tuple[Piece, ...]:
        """Return a query and the generation prompt."""
        before = {
            Place.FIRST: self.opening_text,
            Place.AFTER_INSTRUCTION: self.after_instruction,
            Place.AFTER_SHOT: self.between_text,
        }[place]
        return Piece(_spaces_at_the_end(before) + self.trim("query", query)), *_control(self.separator)

    def answer(self, answer: str) -> tuple[Piece, ...]:
        """Return an answer, and the end of its turn."""
        answer = self.trim("answer", answer)
        self._require_unended(answer, self.before_answer)
        return Piece(self.before_answer + answer), *_control(self.terminator)

    @property
    def between(self) -> tuple[Piece, ...]:
        """The opening of the next query's turn."""
        return _control(self.between_text.rstrip(" "))

    @property
    def begins_with_bos(self) -> bool:
        """Never: the template itself writes it, if it stands there."""
        return False

    @property
    def constants(self) -> tuple[Piece, ...]:
        """Openings and endings of all turns."""
        openings = self.opening_text, self.before_instruction, self.after_instruction, self.between_text
        texts = (*(text.rstrip(" ") for text in openings), self.separator, self.terminator)
        return tuple(piece for text in texts for piece in _control(text))

    def has_instruction(self, instruction: str) -> bool:
        """Tell whether anything of an instruction is left where the template trims it."""
        return bool(self.trim("instruction", instruction))

    def trim(self, part: Part, text: str) -> str:
        """Take white space off where the template does."""
        return text.strip() if part in self.trimmed else text

    @property
    def _remedy(self) -> str:
        return "Replace it in the answer template."


AnyFormat = Annotated[PlainFormat | ChatFormat, Field(discriminator="kind")]


class FormatSettings(Section):
    """Which format a run uses."""

    kind: FormatKind = Field(
        "plain", description="plain: texts one after the other; chat: turns of the base's chat template."
    )
    separator: str | None = Field(
        None, min_length=1, description="plain: stands between a query and its answer; unset: a line break."
    )
    terminator: str | None = Field(
        None, min_length=1, description="plain: ends an answer, and an instruction; unset: a blank line."
    )
    template: Path | None = Field(
        None, description="chat: a Jinja file in place of the tokenizer's own template; it is saved with the model."
    )
    template_arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="chat: variables for the template, such as a fixed date_string where it would write today's.",
    )

    @field_validator("terminator")
    @classmethod
    def _not_only_spaces(cls, terminator: str | None) -> str | None:
        return None if terminator is None else _checked_terminator(terminator)

    @field_validator("template_arguments")
    @classmethod
    def _variables_alone(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        taken = sorted(_NAMES_TAKEN & set(arguments))
        if taken:
            raise ValueError(f"{taken[0]!r} is no variable of a template but what it is called with. Leave it out")
        return arguments

    @field_validator("template_arguments", mode="before")
    @classmethod
    def _dates_as_written(cls, arguments: object) -> object:
        if not isinstance(arguments, dict):
            return arguments
        return {name: str(value) if isinstance(value, date) else value for name, value in arguments.items()}

    @model_validator(mode="after")
    def _keys_of_one_kind(self) -> Self:
        of_plain = {"separator": self.separator, "terminator": self.terminator}
        of_chat = {"template": self.template, "template_arguments": self.template_arguments}
        strangers, other = (of_chat, "chat") if self.kind == "plain" else (of_plain, "plain")
        given = [name for name, value in strangers.items() if value]
        if given:
            raise ValueError(f"{given[0]} belongs to kind: {other}; found kind: {self.kind}. Leave one of them out")
        return self

    def plain(self) -> PlainFormat:
        """Return the plain format with these settings."""
        given = {"separator": self.separator, "terminator": self.terminator}
        return PlainFormat(**{name: value for name, value in given.items() if value is not None})


# What transformers hands to a chat template, or takes for itself.
_NAMES_TAKEN = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)


def text_of(pieces: Iterable[Piece]) -> str:
    """Join pieces."""
    return "".join(piece.text for piece in pieces)


def _control(text: str) -> tuple[Piece, ...]:
    return (Piece(text, is_control=True),) if text else ()


def _spaces_at_the_end(text: str) -> str:
    return text[len(text.rstrip(" ")) :]


def _checked_terminator(terminator: str) -> str:
    if not terminator.strip(" "):
        raise ValueError("a terminator of spaces alone stands inside most answers; use a blank line")
    return terminator
