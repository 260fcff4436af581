"""A chat template -> the constant texts between turns, extracted once from a sentinel conversation and verified.

A sequence of many shots is a long conversation. The engine encodes its beginning once and asks many queries behind it,
so a turn must be the same text wherever it stands. Many templates do not hold that: they leave an empty think block in
the last turn alone, write today's date, or trim some turns and not others. Such templates are refused with the reason.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from manyicl.checked import read_text
from manyicl.episodes.checks import evenly_chosen
from manyicl.episodes.segment_tokenizer import control_tokens
from manyicl.episodes.text_format import AnyFormat, ChatFormat, FormatSettings, Preceding, TextRole, text_of
from manyicl.errors import UserError, shortened
from manyicl.tasks.task import Task

NUM_TURNS = 4
# Templates may change late, or keep the newest turns alone: one conversation is as long as those of many shots.
NUM_TURNS_OF_MANY_SHOTS = 256
NUM_ROWS_COMPARED = 100
SENTINEL_INSTRUCTION = "sentinel of the instruction"
SENTINEL_TURNS = tuple((f"sentinel of query {n:03}", f"sentinel of answer {n:03}") for n in range(1, NUM_TURNS + 1))
# A template must not change what is written in a turn, whatever it is.
AWKWARD_TEXTS = (
    "Is \"A & B\" <b>bold</b>, or 'not'?",
    "TWO\nLINES\twith  spaces",
    "a blank\n\nline {{ and }} {% braces %} \\n",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u4e16\u754c \U0001f389 e\u0301",
    "0" * 3000,
    "[1, 2]",
)
_THINKS = re.compile(r"think|thought|reason|analysis|channel", re.IGNORECASE)
_DATE_VARIABLE = re.compile(r"(\w*date\w*) is (?:not )?defined")

# More than any template puts around a text by itself, so that it cannot be taken for what was trimmed.
WHITE_SPACE = (" " * 7, "\n" * 7)
TEXT_ROLE_OF: Mapping[str, TextRole] = {"system": "instruction", "user": "query", "assistant": "answer"}

Turns = Sequence[tuple[str, str]]
Messages = list[dict[str, str]]


class _UnfitError(Exception):
    """A template whose turns cannot be cut: says why, as the end of a sentence."""


def chosen_format(
    settings: FormatSettings, tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Task] = ()
) -> AnyFormat:
    """Return the format that a recipe asks for; a chat template is cut, and compared with rows of the tasks.

    Args:
        settings: Of the recipe. Its own template becomes that of the tokenizer, so that it is saved with it.
        tokenizer: Of the model.
        tasks: Whose rows the template and its segments must write alike.

    Raises:
        UserError: If there is no chat template, its turns change with their position, or it changes a row.
    """
    if settings.kind == "plain":
        return settings.plain(control_tokens(tokenizer))
    if settings.template is not None:
        tokenizer.chat_template = read_text(settings.template)
        if not tokenizer.chat_template.strip():
            raise UserError(f"format.template: {settings.template} is empty; expected a Jinja template.")
    text_format = ChatTemplate(tokenizer, settings.template_arguments).extract()
    require_rows_as_written(settings, tokenizer, text_format, tasks)
    return text_format


def require_rows_as_written(
    settings: FormatSettings, tokenizer: PreTrainedTokenizerBase, text_format: AnyFormat, tasks: Iterable[Task]
) -> None:
    """Hold rows of tasks to what the chat template writes of them; the plain format has none.

    Raises:
        UserError: If the template changes a row.
    """
    if isinstance(text_format, ChatFormat):
        template = ChatTemplate(tokenizer, settings.template_arguments)
        for task in tasks:
            template.require_same_rows(text_format, task)


class ChatTemplate:
    """The chat template of a tokenizer, with fixed arguments."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        """Take a tokenizer that has one.

        Raises:
            UserError: If it has none.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"The tokenizer {tokenizer.name_or_path!r} has no chat template, as those of instruct models have. Use "
                "format.kind: plain, or name a template with format.template."
            )
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})

    def __str__(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path!r}"

    def render(self, messages: Messages, *, asks: bool, **arguments: Any) -> str:
        """Write a conversation; ``asks`` adds the generation prompt.

        Raises:
            _UnfitError: If the template refuses it.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=asks, **{**self.arguments, **arguments}
            )
        except (
            TemplateError,
            TypeError,
            ValueError,
            LookupError,
            AttributeError,
            ArithmeticError,
            RecursionError,
            MemoryError,
        ) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
            raise _UnfitError(f"it fails on a conversation of {len(messages)} messages: {reason}") from error
        return str(text)

    def extract(self) -> ChatFormat:
        """Cut the constant texts from a sentinel conversation, and verify them on others.

        The instruction is the system turn. Where a template has none, or does not keep it at the beginning, the
        instruction opens the turn of the first query, with a blank line behind it.

        Raises:
            UserError: If turns change with their position; it names the reason.
        """
        try:
            self._require_no_date()
            without = _FixedParts.of(self, None)
            try:
                return self._verified(without, _FixedParts.of(self, SENTINEL_INSTRUCTION))
            except (_UnfitError, UserError):
                return self._verified(without, None)
        except (_UnfitError, UserError) as error:
            raise UserError(
                f"{self} cannot be used: {str(error).rstrip('.')}. Use format.kind: plain, or name a mended template "
                "with format.template."
            ) from error

    def _require_no_date(self) -> None:
        """Refuse a template that reads the date, or chance: tomorrow's prompts would differ from those of training."""
        for instruction in (None, SENTINEL_INSTRUCTION):
            messages = _messages(instruction, SENTINEL_TURNS)
            try:
                today = self.render(messages, asks=False)
            except _UnfitError:
                continue  # no system turn
            if any(self.render(messages, asks=False) != today for _ in range(3)):
                raise _UnfitError("it writes something else each time")
            try:
                # The date comes from a function of this name, which an argument of the same name stands before.
                differs = self.render(messages, asks=False, strftime_now="no date") != today
            except _UnfitError:
                differs = True
            if differs:
                template = self.tokenizer.get_chat_template()
                variable = next(iter(_DATE_VARIABLE.findall(template)), None)
                remedy = f"; fix one with format.template_arguments.{variable}" if variable else ""
                raise _UnfitError(f"it reads today's date{remedy}")

    def _verified(self, without: _FixedParts, with_instruction: _FixedParts | None) -> ChatFormat:
        """Put the format together and hold it to what the template writes.

        Args:
            without: Cut from a conversation without instruction.
            with_instruction: Cut from one with a system turn; None where the instruction opens the first query's turn.
        """
        turn = without.turn
        if with_instruction is not None and with_instruction.turn != turn:
            raise _UnfitError(_difference("".join(turn), "".join(with_instruction.turn)))
        before_instruction, after_instruction = without.opening[0], "\n\n"
        if with_instruction is not None:
            before_instruction, after_instruction = with_instruction.opening
        text_format = ChatFormat(
            preamble_text=without.opening[0],
            before_instruction=before_instruction,
            after_instruction=after_instruction,
            separator=turn.generation_prompt,
            before_answer=turn.before_answer,
            end_of_answer=turn.end_of_answer,
            inter_turn_text=turn.inter_turn,
            trimmed=(),
            instruction_in="system" if with_instruction else "first_turn",
            template_arguments=self.arguments,
        )
        if text_format.ends_early("a"):
            raise _UnfitError(f"{turn.end_of_answer!r} ends an answer and stands before it, too")
        text_format = text_format.model_copy(update={"trimmed": self._trimmed(text_format)})
        for instruction in ("", SENTINEL_INSTRUCTION):
            for turns in _trial_conversations(text_format):
                self._require_same(text_format, instruction, turns)
        for space in WHITE_SPACE:
            self._require_same(text_format, space + SENTINEL_INSTRUCTION + space, SENTINEL_TURNS)
        return text_format

    def _trimmed(self, text_format: ChatFormat) -> tuple[TextRole, ...]:
        """Tell from whose ends the template takes white space, in any turn: there it never comes to stand."""
        has_system = text_format.instruction_in == "system"
        trimmed: set[TextRole] = set()
        for space in WHITE_SPACE:
            instruction = space + SENTINEL_INSTRUCTION + space if has_system else None
            messages = _messages(instruction, _padded(SENTINEL_TURNS, space))
            text = self.render(messages, asks=False) + self.render(messages[:-1], asks=True)
            for message in messages:
                if text.count(message["content"]) < text.count(message["content"].strip()):
                    trimmed.add(TEXT_ROLE_OF[message["role"]])
        if not has_system and "query" in trimmed:
            trimmed.add("instruction")
        return tuple(sorted(trimmed))

    def _require_same(self, text_format: ChatFormat, instruction: str, turns: Turns) -> None:
        """Hold a conversation, and the prompt for its last answer, to what the template writes.

        Raises:
            _UnfitError: If they differ.
        """
        messages = messages_of(text_format, instruction, turns)
        prompt, whole = _assembled(text_format, instruction, turns)
        rendered = self.render(messages[:-1], asks=True)
        if rendered != prompt:
            raise _UnfitError(_difference(prompt, rendered))
        rendered = self.render(messages, asks=False)
        if not rendered.startswith(whole):
            raise _UnfitError(_difference(whole, rendered[: len(whole) + len(text_format.inter_turn_text)]))

    def require_same_rows(self, text_format: ChatFormat, task: Task) -> None:
        """Hold rows of a task, each as the only turn and all as one conversation, to what the template writes of them.

        Raises:
            UserError: If it writes one otherwise, for example because it cuts texts at a think block.
        """
        examples = evenly_chosen((*task.train, *task.test), NUM_ROWS_COMPARED)
        instruction = task.instruction()
        turns = [(example.query.text, example.answer) for example in examples]
        place = f"Task {task.name!r}"
        try:
            for example, turn in zip(examples, turns, strict=True):
                place = f"Task {task.name!r}, {example.origin}" if example.origin else place
                self._require_same(text_format, instruction, [turn])
            place = f"Task {task.name!r}, {len(turns)} rows as one conversation"
            self._require_same(text_format, instruction, turns)
        except _UnfitError as error:
            raise UserError(
                f"{place}: {self} writes this otherwise than the turns cut from it: {error}. Change the row, or use "
                "format.kind: plain."
            ) from error
        except UserError as error:
            raise UserError(f"{place}: {error}") from error


def _trial_conversations(text_format: ChatFormat) -> Iterator[Turns]:
    """Yield conversations that a template must write as its segments say: short, odd, padded, long."""
    for num_turns in range(1, NUM_TURNS + 1):
        yield SENTINEL_TURNS[:num_turns]
    tried = (*SENTINEL_TURNS, *((text, text) for text in AWKWARD_TEXTS))
    for space in ("", *WHITE_SPACE):
        yield _padded(tried, space)
    yield [SENTINEL_TURNS[n % NUM_TURNS] for n in range(NUM_TURNS_OF_MANY_SHOTS)]


class _Turn(NamedTuple):
    """The constant texts of a turn, in their order behind a query."""

    generation_prompt: str
    before_answer: str
    end_of_answer: str
    inter_turn: str


@dataclass(frozen=True, slots=True)
class _FixedParts:
    """The constant texts of one sentinel conversation.

    Attributes:
        opening: Before the first query: one text, or two with the instruction between them.
        turn: Of every turn.
    """

    opening: tuple[str, ...]
    turn: _Turn

    @classmethod
    def of(cls, template: ChatTemplate, instruction: str | None) -> _FixedParts:
        """Cut a conversation and hold that all its turns are alike.

        Raises:
            _UnfitError: If they are not.
        """
        messages = _messages(instruction, SENTINEL_TURNS)
        parts = _split(template.render(messages, asks=False), [message["content"] for message in messages])
        num_opening = len(messages) % 2 + 1
        opening, (*turns, closing) = parts[:num_opening], parts[num_opening:]
        separator, between = (_one_text(turns[start::2]) for start in (0, 1))
        generation_prompt = _generation_prompt(template, messages, separator)
        end_of_answer = _end_of_answer(template.tokenizer, closing, between)
        before_answer = separator.removeprefix(generation_prompt)
        return cls(
            tuple(opening), _Turn(generation_prompt, before_answer, end_of_answer, between.removeprefix(end_of_answer))
        )


def _one_text(texts: Sequence[str]) -> str:
    """Return the text that all of these are."""
    for text in texts:
        if text != texts[0]:
            raise _UnfitError(_difference(texts[0], text))
    return texts[0]


def _padded(turns: Turns, space: str) -> Turns:
    return [(space + query + space, space + answer + space) for query, answer in turns]


def messages_of(text_format: ChatFormat, instruction: str, turns: Turns) -> Messages:
    """Return a conversation as the template is given it: without the white space that it would trim in some turn."""
    instruction = text_format.trim("instruction", instruction)
    trimmed = [(text_format.trim("query", query), text_format.trim("answer", answer)) for query, answer in turns]
    if not instruction or text_format.instruction_in == "system":
        return _messages(instruction or None, trimmed)
    (query, answer), *others = trimmed
    return _messages(None, [(f"{instruction}\n\n{query}", answer), *others])


def _messages(instruction: str | None, turns: Turns) -> Messages:
    messages = [{"role": "system", "content": instruction}] if instruction is not None else []
    for query, answer in turns:
        messages += [{"role": "user", "content": query}, {"role": "assistant", "content": answer}]
    return messages


def _assembled(text_format: ChatFormat, instruction: str, turns: Turns) -> tuple[str, str]:
    """Put a conversation together from segments: the prompt for its last answer, and the whole up to its end."""
    text = text_of(text_format.preamble(instruction))
    preceding = Preceding.INSTRUCTION if text_format.has_instruction(instruction) else Preceding.NOTHING
    prompt = ""
    for number, (query, answer) in enumerate(turns):
        text += text_of(text_format.inter_turn) if number else ""
        prompt = text + text_of(text_format.query(query, preceding))
        text = prompt + text_of(text_format.answer(answer))
        preceding = Preceding.DEMONSTRATION
    return prompt, text


def _split(text: str, contents: Sequence[str]) -> list[str]:
    """Return what stands before, between and behind contents that must appear once each, in order."""
    for content in contents:
        if text.count(content) != 1:
            raise _UnfitError(f"it {'repeats' if content in text else 'leaves out'} the {content}")
    parts = []
    position = 0
    for content in contents:
        start = text.find(content, position)
        if start < 0:
            raise _UnfitError(f"it moves the {content} to another place")
        parts.append(text[position:start])
        position = start + len(content)
    return [*parts, text[position:]]


def _generation_prompt(template: ChatTemplate, messages: Messages, separator: str) -> str:
    """Return what stands between a query and the place where the model begins to write, the same in every turn."""
    found: str | None = None
    for end, message in enumerate(messages, start=1):
        if message["role"] != "user":
            continue
        prompt = template.render(messages[:end], asks=True)
        prompt = _split(prompt, [one["content"] for one in messages[:end]])[-1]
        if not separator.startswith(prompt) or (found is not None and prompt != found):
            raise _UnfitError(_difference(found or separator, prompt))
        found = prompt
    assert found is not None
    rest = separator[len(found) :]
    if rest.strip():
        raise _UnfitError(f"its generation prompt ends before {rest!r}, which stands before every answer")
    return found


def _end_of_answer(tokenizer: PreTrainedTokenizerBase, closing: str, between: str) -> str:
    """Return the text that ends every answer, the last like those before: up to its control token, if it has one."""
    common = _common_start(closing, between)
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    # The first of them, and the longest that begins there, as a tokenizer reads it.
    ends = [(common.index(token), -len(token)) for token in tokens if token.strip() and token in common]
    end = common[: min(ends)[0] - min(ends)[1]] if ends else common
    if not end.strip(" ") or (not ends and end != closing):
        raise _UnfitError(
            f"the last answer ends in {closing!r}, those before it in {between!r}, so no text ends every answer"
        )
    return end


def _difference(first: str, second: str) -> str:
    """Say in what two texts differ that should be the same, by its likely cause."""
    start = len(_common_start(first, second))
    end = len(_common_start(first[start:][::-1], second[start:][::-1]))
    ours, theirs = first[start : len(first) - end], second[start : len(second) - end]
    if _THINKS.search(ours + theirs):
        return f"a think block stands in some turns and not in others ({_shown(ours, theirs)})"
    if not (ours + theirs).strip():
        return f"white space stands in some turns and not in others ({_shown(ours, theirs)})"
    return f"what it writes in a turn changes with its place or its text ({_shown(ours, theirs)})"


def _common_start(first: str, second: str) -> str:
    return os.path.commonprefix([first, second])  # noqa: RUF071  # characters are what is compared


def _shown(*texts: str) -> str:
    return " against ".join(repr(shortened(text, 60)) for text in texts)


def describe(text_format: AnyFormat) -> Iterator[str]:
    """Say what a user should know of a format before training with it."""
    if not isinstance(text_format, ChatFormat):
        if text_format.end_is_control_token:
            yield f"An answer ends in {text_format.end_of_answer!r}, a control token of the tokenizer."
        return
    yield f"Turns are cut from the chat template; an answer ends in {text_format.end_of_answer!r}."
    if text_format.instruction_in == "first_turn":
        yield "The template keeps no system turn at the beginning: the instruction opens the turn of the first query."
