"""A chat template -> the fixed parts of its turns, extracted once from a sentinel conversation and verified.

A sequence of many shots is a long conversation. The engine encodes its beginning once and many queries after it, so a
turn must be the same text wherever it comes. Many templates do not comply: they leave an empty think block in the last
turn alone, write today's date, or trim some turns and not others. Such templates are refused with the difference.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from os.path import commonprefix
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from manyicl.checked import read_text
from manyicl.episodes.segment_tokenizer import control_tokens
from manyicl.episodes.text_format import AnyFormat, ChatFormat, FormatSettings, TextRole, text_of
from manyicl.errors import UserError, differing_parts, shortened
from manyicl.library_errors import reason
from manyicl.tasks.demonstrations import evenly_chosen
from manyicl.tasks.sandbox import Budget, render_chat_template
from manyicl.tasks.task import Task

NUM_TURNS = 4
# Templates may change late, or keep the newest turns alone: one conversation is as long as those of many shots.
NUM_TURNS_OF_MANY_SHOTS = 256
NUM_ROWS_COMPARED = 100
# Of all rows in one conversation, so that the work of a rendering, which is limited, does.
NUM_CHARACTERS_COMPARED = 400_000
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
# More than any template puts around a text by itself, so that it cannot be taken for what was trimmed.
WHITE_SPACE = (" " * 7, "\n" * 7)
TEXT_ROLE_OF: Mapping[str, TextRole] = {"system": "instruction", "user": "query", "assistant": "answer"}
REMEDY = "Use format.kind: plain, or name a patched template with format.template."
_THINKS = re.compile(r"think|thought|reason|analysis|channel", re.IGNORECASE)
_DATE_VARIABLE = re.compile(r"(\w*date\w*) is (?:not )?defined")

Turns = Sequence[tuple[str, str]]
Messages = list[dict[str, str]]


class _UnfitError(Exception):
    """A template that cannot be used: says why, as the end of a sentence."""


def chosen_format(
    settings: FormatSettings, tokenizer: PreTrainedTokenizerBase, tasks: Iterable[Task] = ()
) -> AnyFormat:
    """Return the format that a recipe asks for; the parts of a chat template are compared with rows of the tasks.

    Args:
        settings: Settings of the recipe. A template of its own becomes that of the tokenizer, to be saved with it.
        tokenizer: Tokenizer of the model.
        tasks: Tasks whose rows the template and its fixed parts must write alike.

    Raises:
        UserError: If there is no chat template, its turns change with their position, or it changes a row.
    """
    if settings.kind != "chat":
        return settings.without_turns(control_tokens(tokenizer))
    if settings.template is not None:
        tokenizer.chat_template = read_text(settings.template)
        if not tokenizer.chat_template.strip():
            file, field = settings.template, "format.template"
            raise UserError("empty_template", "The file is empty", expected="a Jinja template", file=file, field=field)
    text_format = ChatTemplate(tokenizer, settings.template_arguments).extract()
    require_rows_as_written(settings, tokenizer, text_format, tasks)
    return text_format


def require_rows_as_written(
    settings: FormatSettings, tokenizer: PreTrainedTokenizerBase, text_format: AnyFormat, tasks: Iterable[Task]
) -> None:
    """Verify rows of tasks against what the chat template writes of them; the plain format has none.

    Raises:
        UserError: If the template changes a row.
    """
    if isinstance(text_format, ChatFormat):
        template = ChatTemplate(tokenizer, settings.template_arguments)
        for task in tasks:
            template.require_same_rows(text_format, task)


def template_identity(settings: FormatSettings, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return all that decides whether `require_rows_as_written` accepts a row, beside the fixed parts; as JSON."""
    if settings.kind != "chat":
        return ""
    parts = [tokenizer.chat_template, settings.template_arguments, tokenizer.special_tokens_map]
    return json.dumps(parts, default=str)


class ChatTemplate:
    """The chat template of a tokenizer, with fixed arguments; it renders with all its work counted."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, arguments: Mapping[str, Any] | None = None) -> None:
        """Take a tokenizer that has one.

        Raises:
            UserError: If it has none.
        """
        if not tokenizer.chat_template:
            what = f"The tokenizer {tokenizer.name_or_path!r} has no chat template, as those of instruct models have"
            remedy = "Use format.kind: plain, or name a template with format.template."
            raise UserError("no_chat_template", what, remedy=remedy)
        self.tokenizer = tokenizer
        self.arguments = dict(arguments or {})
        self._budget: Budget | None = None

    def __str__(self) -> str:
        return f"the chat template of {self.tokenizer.name_or_path!r}"

    def render(self, messages: Messages, *, asks: bool, **arguments: Any) -> str:
        """Write a conversation; ``asks`` adds the generation prompt.

        Raises:
            _UnfitError: If the template fails, refuses it, or does too much.
        """
        variables = {**self.tokenizer.special_tokens_map, "tools": None, "documents": None, **self.arguments}
        variables |= {**arguments, "messages": messages, "add_generation_prompt": asks}
        try:
            return render_chat_template(self.tokenizer.get_chat_template(), variables, self._budget)
        except (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise _UnfitError(f"it fails on a conversation of {len(messages)} messages: {reason(error)}") from error

    def extract(self) -> ChatFormat:
        """Extract the fixed parts from a sentinel conversation, and verify them on others.

        The instruction is the system turn. Where a template has none, or does not keep it at the beginning, the
        instruction opens the turn of the first query, with a blank line after it.

        Raises:
            UserError: If turns change with their position; it names the difference.
        """
        self._budget = Budget()  # some fifty renderings together take no more than one may
        try:
            self._require_no_date()
            with suppress(_UnfitError):
                return self._verified(has_system=True)
            return self._verified(has_system=False)
        except _UnfitError as error:
            raise UserError("unfit_chat_template", f"{self} cannot be used: {error}", remedy=REMEDY) from error
        finally:
            self._budget = None

    def _require_no_date(self) -> None:
        """Refuse a template that reads the date: tomorrow's prompts would differ from those of training."""
        assert self._budget is not None
        for instruction in (None, SENTINEL_INSTRUCTION):
            written: set[str | None] = set()
            # The date comes from a function, which an argument of the same name hides.
            for arguments in ({}, {"strftime_now": "no date"}):
                try:
                    written.add(self.render(_messages(instruction, SENTINEL_TURNS), asks=False, **arguments))
                except _UnfitError:
                    written.add(None)
            if len(written) > 1 and not self._budget.is_spent:
                variable = next(iter(_DATE_VARIABLE.findall(self.tokenizer.get_chat_template())), None)
                remedy = f"; fix one with format.template_arguments.{variable}" if variable else ""
                raise _UnfitError(f"it reads today's date{remedy}")

    def _around_texts(self, instruction: str | None) -> list[str]:
        """Return what is written before, between and after the texts of a sentinel conversation."""
        messages = _messages(instruction, SENTINEL_TURNS)
        return _around(self.render(messages, asks=False), messages)

    def _verified(self, *, has_system: bool) -> ChatFormat:
        """Extract the format from the beginning of a sentinel conversation, and verify it on others.

        Args:
            has_system: True if the instruction is a system turn; False if it opens the first query's turn.
        """
        preamble_text, separator, inter_turn_text, *others, closing = self._around_texts(None)
        for number, text in enumerate(others):
            if text != (expected := (separator, inter_turn_text)[number % 2]):
                raise _UnfitError(_difference(expected, text))
        before_instruction, after_instruction = preamble_text, "\n\n"
        if has_system:
            before_instruction, after_instruction, *_ = self._around_texts(SENTINEL_INSTRUCTION)
        messages = _messages(None, SENTINEL_TURNS)[:-1]
        prompt = _around(self.render(messages, asks=True), messages)[-1]
        if not separator.startswith(prompt):
            raise _UnfitError(_difference(separator, prompt))
        before_answer = separator.removeprefix(prompt)
        if before_answer.strip():
            raise _UnfitError(f"its generation prompt ends before {before_answer!r}, which opens every answer")
        end_of_answer = self._end_of_answer(closing, inter_turn_text)
        text_format = ChatFormat(
            preamble_text=preamble_text,
            before_instruction=before_instruction,
            after_instruction=after_instruction,
            separator=prompt,
            before_answer=before_answer,
            end_of_answer=end_of_answer,
            inter_turn_text=inter_turn_text.removeprefix(end_of_answer),
            trimmed=self._trimmed(has_system=has_system),
            instruction_in="system" if has_system else "first_turn",
            template_arguments=self.arguments,
        )
        if text_format.ends_early("a"):
            raise _UnfitError(f"{end_of_answer!r} ends an answer and opens it, too")
        for instruction in ("", SENTINEL_INSTRUCTION):
            for turns in _trial_conversations():
                self._require_same(text_format, instruction, turns)
        for space in WHITE_SPACE:
            self._require_same(text_format, space + SENTINEL_INSTRUCTION + space, SENTINEL_TURNS)
        return text_format

    def _end_of_answer(self, closing: str, between: str) -> str:
        """Return the text that ends every answer, the last like those before: up to its control token, if any."""
        common = commonprefix([closing, between])  # noqa: RUF071  # characters are what is compared
        tokens = control_tokens(self.tokenizer) | set(self.tokenizer.all_special_tokens)
        # The first of them, and the longest that begins there, as a tokenizer reads it.
        ends = [(common.index(token), -len(token)) for token in tokens if token.strip() and token in common]
        end = common[: min(ends)[0] - min(ends)[1]] if ends else common
        if not end.strip(" ") or (not ends and end != closing):
            raise _UnfitError(
                f"the last answer ends in {closing!r}, those before it in {between!r}, so no text ends every answer"
            )
        return end

    def _trimmed(self, *, has_system: bool) -> tuple[TextRole, ...]:
        """Return the texts from whose ends the template takes white space in some turn: there it is never written."""
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
        """Verify a conversation, and the prompt for its last answer, against what the template writes."""
        messages = messages_of(text_format, instruction, turns)
        prompt, whole = _assembled(text_format, instruction, turns)
        rendered = self.render(messages[:-1], asks=True)
        if rendered != prompt:
            raise _UnfitError(_difference(prompt, rendered))
        rendered = self.render(messages, asks=False)
        if not rendered.startswith(whole):
            raise _UnfitError(_difference(whole, rendered[: len(whole) + len(text_format.inter_turn_text)]))

    def require_same_rows(self, text_format: ChatFormat, task: Task) -> None:
        """Verify rows of a task, each as the only turn and all as one conversation, against what the template writes.

        Raises:
            UserError: If it writes one otherwise, for example because it cuts texts at a think block.
        """
        instruction = task.instruction()
        conversation: list[tuple[str, str]] = []
        num_characters = 0
        where = f"Task {task.name!r}"
        try:
            for example in evenly_chosen(task.train, task.test, NUM_ROWS_COMPARED):
                turn = example.query.text, example.answer
                where = f"Task {task.name!r}, {example.origin}" if example.origin else where
                self._require_same(text_format, instruction, [turn])
                num_characters += len("".join(turn))
                if num_characters <= NUM_CHARACTERS_COMPARED:
                    conversation.append(turn)
            where = f"Task {task.name!r}, {len(conversation)} rows as one conversation"
            if conversation:
                self._require_same(text_format, instruction, conversation)
        except _UnfitError as error:
            what = f"{where}: {self} writes this otherwise than its turns: {error}"
            remedy = "Change the row, or use format.kind: plain."
            raise UserError("row_changed_by_template", what, remedy=remedy) from error


def _trial_conversations() -> Iterator[Turns]:
    """Yield conversations that a template must write as its fixed parts say: short, odd, padded, long."""
    for num_turns in range(1, NUM_TURNS + 1):
        yield SENTINEL_TURNS[:num_turns]
    for space in ("", *WHITE_SPACE):
        yield _padded((*SENTINEL_TURNS, *((text, text) for text in AWKWARD_TEXTS)), space)
    yield SENTINEL_TURNS * (NUM_TURNS_OF_MANY_SHOTS // NUM_TURNS)


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
    *shots, (query, answer) = turns
    asks = text_format.query(query, text_format.preceding(instruction, len(shots)))
    prompt = text_of((*text_format.segments(instruction, shots), *asks))
    return prompt, prompt + text_of(text_format.answer(answer))


def _around(text: str, messages: Messages) -> list[str]:
    """Return the texts before, between and after contents that must appear once each, in order."""
    parts = []
    for content in (message["content"] for message in messages):
        part, found, text = text.partition(content)
        if not found or content in text:
            raise _UnfitError(f"it leaves out, repeats or moves the {content}")
        parts.append(part)
    return [*parts, text]


def _difference(first: str, second: str) -> str:
    """Say how two texts differ that should be the same, with the likely cause."""
    one, other = differing_parts(first, second)
    cause = "what it writes in a turn changes with its place or its text"
    if _THINKS.search(one + other):
        cause = "a think block is in some turns and not in others"
    elif not (one + other).strip():
        cause = "white space is in some turns and not in others"
    return f"{cause} ({shortened(one, 60)!r} against {shortened(other, 60)!r})"


def describe(text_format: AnyFormat) -> Iterator[str]:
    """Say what a user should know of a format before training with it."""
    if not isinstance(text_format, ChatFormat):
        if text_format.answer_first:
            yield "Each example is its label and then its query, which is supervised: the channel form."
        elif text_format.end_is_control_token:
            yield f"An answer ends in {text_format.end_of_answer!r}, a control token of the tokenizer."
        return
    yield f"Turns are those of the chat template; an answer ends in {text_format.end_of_answer!r}."
    if text_format.instruction_in == "first_turn":
        yield "The template keeps no system turn at the beginning: the instruction opens the turn of the first query."
