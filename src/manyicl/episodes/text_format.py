"""The text between the segments of an example: the plain format, its channel form, and turns of a chat."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Container, Iterable, Mapping
from datetime import date
from enum import Enum
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, field_validator, model_validator

from manyicl.checked import Section
from manyicl.errors import UserError

# Ends an answer and an instruction unless the settings say otherwise.
BLANK_LINE = "\n\n"


class Segment(NamedTuple):
    """A text that is encoded by itself.

    Attributes:
        text: What it says.
        is_control: True where ``</s>`` and the like are the control tokens, as between turns; False where they are
            characters that somebody wrote.
    """

    text: str
    is_control: bool = False


class Preceding(Enum):
    """What comes before a query in its sequence."""

    NOTHING = "nothing"
    INSTRUCTION = "an instruction"
    DEMONSTRATION = "a demonstration"


def _checked_end(end_of_answer: str) -> str:
    if not end_of_answer.strip(" "):
        raise ValueError("end_of_answer is of spaces alone, which most answers contain; use a blank line")
    return end_of_answer


EndOfAnswer = Annotated[str, Field(min_length=1), AfterValidator(_checked_end)]


class TextFormat(BaseModel, ABC):
    """How instruction, query and answer become one text.

    ::

        preamble(instruction)  [query  answer  inter_turn]  [query  answer  inter_turn]  query

    The separator closes a query, the end-of-answer text an answer. That text belongs to the answer: it is supervised,
    generation stops on it, and a label is scored with it, so that a label which begins another label is compared
    fairly. It is chosen when a model is trained, saved with it, and the same for all of its tasks.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    # Whether a sequence begins with the tokens that the tokenizer itself puts before a text.
    begins_with_bos: ClassVar[bool]
    # Whether an example is its answer and then its query, of which the query is supervised: the channel form.
    answer_first: ClassVar[bool] = False
    separator: str
    end_of_answer: str

    @abstractmethod
    def preamble(self, instruction: str) -> tuple[Segment, ...]:
        """Return what comes before the first query: the instruction, in its turn where there are turns."""

    @abstractmethod
    def query(self, query: str, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[Segment, ...]:
        """Return a query up to where its answer begins."""

    @abstractmethod
    def answer(self, answer: str) -> tuple[Segment, ...]:
        """Return the supervised segments of an answer, the end-of-answer text included."""

    @property
    def inter_turn(self) -> tuple[Segment, ...]:
        """Inter-turn text: from the end of an answer to the next query; nothing in plain text."""
        return ()

    @property
    @abstractmethod
    def constants(self) -> tuple[Segment, ...]:
        """All that the format itself writes, so that a tokenizer which loses some of it is found out."""

    def has_instruction(self, instruction: str) -> bool:
        """Tell whether an instruction leaves a trace in the text."""
        return bool(instruction)

    def preceding(self, instruction: str, num_shots: int) -> Preceding:
        """Tell what comes before a query after this instruction and so many demonstrations."""
        if num_shots:
            return Preceding.DEMONSTRATION
        return Preceding.INSTRUCTION if self.has_instruction(instruction) else Preceding.NOTHING

    def segments(self, instruction: str, shots: Iterable[tuple[str, str]]) -> tuple[Segment, ...]:
        """Return an instruction and demonstrations, each a query and its answer, segment by segment."""
        segments = [*self.preamble(instruction)]
        for number, (query, answer) in enumerate(shots):
            asks, answers = self.query(query, self.preceding(instruction, number)), self.answer(answer)
            segments += (*answers, *asks) if self.answer_first else (*asks, *answers)
            segments += self.inter_turn
        return tuple(segments)

    def ends_early(self, answer: str) -> bool:
        """Tell whether an answer contains or completes the end-of-answer text, so that it would be cut there."""
        written = text_of(self.answer(answer))
        return written.index(self.end_of_answer) < len(written) - len(self.end_of_answer)


class ParagraphFormat(TextFormat):
    """Segments one after the other, without turns: query, separator, answer, end of the answer.

    A blank line ends the instruction, whatever ends an answer: it is a paragraph before the examples, as in the texts
    that a base model has read. A control token there would stand after something that nobody answered, and weaken
    what the model learns of the token.

    Attributes:
        separator: Text between a query and its answer.
        end_of_answer: Text that ends an answer, or one control token of the tokenizer, such as ``<|im_end|>``.
        end_is_control_token: Whether it is that token, which no text contains: a row that spells it out means its
            characters. None until a tokenizer is known; see `decided`.
        end_of_instruction: Text that ends the instruction.
    """

    begins_with_bos: ClassVar[bool] = True
    before_answer: ClassVar[str] = ""
    kind: str
    separator: str = Field("\n", min_length=1)
    end_of_answer: EndOfAnswer = BLANK_LINE
    end_is_control_token: bool | None = None
    end_of_instruction: str = Field(BLANK_LINE, min_length=1)

    def decided(self, control_tokens: Container[str]) -> Self:
        """Return the format for a tokenizer with these control tokens.

        Raises:
            UserError: If a model was trained with a control token that this tokenizer does not have.
        """
        is_control = self.end_of_answer in control_tokens
        if self.end_is_control_token and not is_control:
            what = "The tokenizer does not have the control token in which the answers of this model end"
            remedy = "Restore the tokenizer of the model."
            raise UserError("unknown_control_token", what, found=repr(self.end_of_answer), remedy=remedy)
        decided = is_control if self.end_is_control_token is None else self.end_is_control_token
        return self.model_copy(update={"end_is_control_token": decided})

    def preamble(self, instruction: str) -> tuple[Segment, ...]:
        """Return the instruction and what ends it; nothing where there is no instruction."""
        return (Segment(f"{instruction}{self.end_of_instruction}"),) if instruction else ()

    def query(self, query: str, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[Segment, ...]:
        """Return a query with the separator, one segment."""
        return (Segment(f"{query}{self.separator}"),)

    def answer(self, answer: str) -> tuple[Segment, ...]:
        """Return an answer and its end: one segment, or two where a control token ends it."""
        if self.end_is_control_token:
            return Segment(answer), *_control(self.end_of_answer)
        return (Segment(f"{answer}{self.end_of_answer}"),)

    @property
    def constants(self) -> tuple[Segment, ...]:
        """All that ends a query, an answer or an instruction."""
        end = Segment(self.end_of_answer, is_control=bool(self.end_is_control_token))
        return Segment(self.separator), end, Segment(self.end_of_instruction)


class PlainFormat(ParagraphFormat):
    """Query, separator, answer, end of the answer: the direct form, in which the answer is supervised."""

    kind: Literal["plain"] = "plain"


class ChannelFormat(ParagraphFormat):
    """The channel form: the two parts of an example change places, and the query is supervised after its label.

    ::

        instruction ⏎⏎  label ⏎ query ⏎⏎  label ⏎ query ⏎⏎  label ⏎ query ⏎⏎
                                └─span──┘         └─span──┘

    A label is scored by the log-probability of the query after it, so answers must be of a closed set. What ends an
    answer ends an example here; as nothing is generated, a query may contain it.

    Source: Min et al. 2021, *Noisy Channel Language Model Prompting for Few-Shot Text Classification*,
    arXiv:2108.04106; fine-tuned on several tasks in MetaICL (Min et al. 2022, arXiv:2110.15943).
    """

    answer_first: ClassVar[bool] = True
    kind: Literal["channel"] = "channel"

    def query(self, query: str, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[Segment, ...]:
        """Return the supervised segments of a query, the text that ends an example included."""
        return super().answer(query)

    def answer(self, answer: str) -> tuple[Segment, ...]:
        """Return an answer up to where its query begins, one segment."""
        return super().query(answer)

    def ends_early(self, answer: str) -> bool:
        """Tell that no answer is cut: none is generated."""
        return False


def format_of_this_version(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Rewrite the fields of a format of an earlier version, in which one text ended answer and instruction."""
    text_format = dict(fields)
    if (end := text_format.pop("terminator", None)) is not None:
        text_format["end_of_answer"] = end
    for earlier, name in (("opening_text", "preamble_text"), ("between_text", "inter_turn_text")):
        if earlier in text_format:
            text_format[name] = text_format.pop(earlier)
    if text_format.get("kind", "plain") == "plain":
        text_format.setdefault("end_is_control_token", False)
        text_format |= {} if end is None else {"end_of_instruction": end}
    return text_format


FormatKind = Literal["plain", "channel", "chat"]
TextRole = Literal["instruction", "query", "answer"]


class ChatFormat(TextFormat):
    """Each shot is two turns of a chat; the fixed parts around texts were extracted once from a chat template.

    White space at the end of a constant, as in ``[INST] ``, is kept apart: tokenizers join a space to the word after
    it, so it is encoded with the text that follows.

    Attributes:
        preamble_text: Before the first query where there is no instruction.
        before_instruction: Before an instruction.
        after_instruction: Between an instruction and the first query.
        separator: Between a query and its answer: the generation prompt.
        before_answer: White space that opens an answer.
        end_of_answer: Ends an answer, up to its control token.
        inter_turn_text: Between the end of an answer and the next query.
        trimmed: The texts from whose ends the template takes white space.
        instruction_in: Turn of the instruction: a system turn, or the first query's turn where there is none.
        template_arguments: Arguments of the template; a client that sends messages to a server must give them too.
    """

    # The template itself writes them, where they belong.
    begins_with_bos: ClassVar[bool] = False
    kind: Literal["chat"] = "chat"
    preamble_text: str
    before_instruction: str
    after_instruction: str
    before_answer: str
    inter_turn_text: str
    trimmed: tuple[TextRole, ...]
    instruction_in: Literal["system", "first_turn"]
    template_arguments: dict[str, JsonValue] = Field(default_factory=dict)

    def preamble(self, instruction: str) -> tuple[Segment, ...]:
        """Return all up to the first query, a system turn with the instruction included."""
        if not self.has_instruction(instruction):
            return _control(self.preamble_text.rstrip(" "))
        lead = _spaces_at_the_end(self.before_instruction)
        return (
            *_control(self.before_instruction.rstrip(" ")),
            Segment(lead + self.trim("instruction", instruction)),
            *_control(self.after_instruction.rstrip(" ")),
        )

    def query(self, query: str, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[Segment, ...]:
        """Return a query and the generation prompt."""
        before = {
            Preceding.NOTHING: self.preamble_text,
            Preceding.INSTRUCTION: self.after_instruction,
            Preceding.DEMONSTRATION: self.inter_turn_text,
        }[preceding]
        return Segment(_spaces_at_the_end(before) + self.trim("query", query)), *_control(self.separator)

    def answer(self, answer: str) -> tuple[Segment, ...]:
        """Return an answer, and the end of its turn."""
        return Segment(self.before_answer + self.trim("answer", answer)), *_control(self.end_of_answer)

    @property
    def inter_turn(self) -> tuple[Segment, ...]:
        """The opening of the next query's turn."""
        return _control(self.inter_turn_text.rstrip(" "))

    @property
    def constants(self) -> tuple[Segment, ...]:
        """Openings and endings of all turns."""
        openings = self.preamble_text, self.before_instruction, self.after_instruction, self.inter_turn_text
        texts = (*(text.rstrip(" ") for text in openings), self.separator, self.end_of_answer)
        return tuple(segment for text in texts for segment in _control(text))

    def has_instruction(self, instruction: str) -> bool:
        """Tell whether anything of an instruction is left where the template trims it."""
        return bool(self.trim("instruction", instruction))

    def trim(self, role: TextRole, text: str) -> str:
        """Take white space off where the template does."""
        return text.strip() if role in self.trimmed else text


AnyFormat = Annotated[PlainFormat | ChannelFormat | ChatFormat, Field(discriminator="kind")]


class FormatSettings(Section):
    """Which format a run uses."""

    kind: FormatKind = Field(
        "plain",
        description="plain: texts one after the other; channel: likewise, each label before its query, which is "
        "supervised and scored; chat: turns of the base's chat template.",
    )
    separator: str | None = Field(
        None, min_length=1, description="plain, channel: text between a query and its answer; unset: a line break."
    )
    end_of_answer: EndOfAnswer | None = Field(
        None,
        description="plain: ends an answer: a text that no answer contains, or a control token of the tokenizer such "
        "as </s>; channel: ends a query; unset: a blank line.",
    )
    template: Path | None = Field(
        None, description="chat: a Jinja file in place of the tokenizer's own template; it is saved with the model."
    )
    template_arguments: dict[str, JsonValue] = Field(
        default_factory=dict,
        description="chat: variables for the template, such as a fixed date_string where it would write today's.",
    )

    @model_validator(mode="before")
    @classmethod
    def _earlier_name(cls, settings: object) -> object:
        # Recipes saved with models before the key was renamed.
        if isinstance(settings, dict) and "terminator" in settings and "end_of_answer" not in settings:
            return {"end_of_answer" if key == "terminator" else key: value for key, value in settings.items()}
        return settings

    @field_validator("template_arguments")
    @classmethod
    def _variables_alone(cls, arguments: dict[str, JsonValue]) -> dict[str, JsonValue]:
        from transformers import PreTrainedTokenizerBase

        names = {"messages", "strftime_now", *signature(PreTrainedTokenizerBase.apply_chat_template).parameters}
        taken = sorted(names & set(arguments))
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
        of_plain = {"separator": self.separator, "end_of_answer": self.end_of_answer}
        of_chat = {"template": self.template, "template_arguments": self.template_arguments}
        strangers, other = (of_plain, "plain") if self.kind == "chat" else (of_chat, "chat")
        given = [name for name, value in strangers.items() if value]
        if given:
            raise ValueError(f"{given[0]} belongs to kind: {other}; found kind: {self.kind}. Leave one of them out")
        return self

    def without_turns(self, control_tokens: Container[str]) -> PlainFormat | ChannelFormat:
        """Return the format with these settings, of a kind without turns, for a tokenizer with these control tokens."""
        given = self.model_dump(include={"separator", "end_of_answer"}, exclude_none=True)
        if self.kind == "channel":
            return ChannelFormat.model_validate(given).decided(control_tokens)
        return PlainFormat.model_validate(given).decided(control_tokens)


def text_of(segments: Iterable[Segment]) -> str:
    """Join segments."""
    return "".join(segment.text for segment in segments)


def _control(text: str) -> tuple[Segment, ...]:
    return (Segment(text, is_control=True),) if text else ()


def _spaces_at_the_end(text: str) -> str:
    return text[len(text.rstrip(" ")) :]
