"""What OpenAI's SDK sends and expects, and what that means for a task: decisions, chat completions, models, errors.

`model` names a task, as ``tickets`` or ``tickets@3`` for a version of it. The demonstrations of the task say what is to
be done: instructions and descriptions change nothing, and are accepted because the SDK requires them. What else would
be lost in silence, such as a system message or a tool, is refused.

Source: openai-python 3.57, `types/decision.py`, `types/decision_create_params.py`, `types/chat/`, `types/model.py`.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Discriminator, Field, StrictBool, StrictStr, Tag

from manyicl.checked import Section
from manyicl.errors import UserError, quoted, shortened
from manyicl.server.records import TaskRecord
from manyicl.server.row_input import InputRow, rows_in_list
from manyicl.server.schemas import MOST_COUNTED, Out
from manyicl.tasks.rows import json_row
from manyicl.tasks.task import Task

if TYPE_CHECKING:
    from manyicl.engine.prediction import Prediction

MOST_QUESTIONS, MOST_CHOICES = 400, 255
INPUT, MESSAGES = "input", "messages"
_ONE_MESSAGE = "one message of the user: the context of a query are the task's demonstrations"
# Labels of a task that answers whether something is so: the one for yes, and the one for no.
_YES_AND_NO = (("true", "false"), ("yes", "no"), ("1", "0"))

Ignored = Annotated[Any, Field(description="Accepted, without effect.")]
Instructions = Annotated[Any, Field(description="Required by the SDK, without effect: the demonstrations say it.")]


def named_model(model: str) -> tuple[str, int | None]:
    """Return the task and the version that a model name stands for.

    Raises:
        UserError: If what follows the ``@`` is no version.

    Examples:
        >>> named_model("tickets@3")
        ('tickets', 3)
    """
    task, at, written = model.partition("@")
    if not at:
        return task, None
    if not (written.isascii() and written.isdecimal() and len(written) < 10 and int(written) > 0):
        expected = "a task, or a task with one of its versions, as in tickets@3"
        raise UserError("unknown_version", "the model has no such version", expected=expected, found=quoted(model))
    return task, int(written)


# --- Decisions


class ChoiceValue(Section):
    """A label that may be chosen."""

    value: StrictStr | StrictBool = Field(description="A label of the task; a boolean for true or yes, false or no.")
    description: Ignored = None


class ChoiceQuestion(Section):
    """A question that one of these labels answers."""

    type: Literal["choice"]
    choices: list[ChoiceValue] = Field(
        min_length=2, max_length=MOST_CHOICES, description="Labels of the task, all of them or some."
    )
    instructions: Instructions
    name: str | None = Field(None, description="Name of the question, for its answer.")


class PredicateQuestion(Section):
    """A question that yes or no answers: for tasks whose two labels are true and false, or yes and no."""

    type: Literal["predicate"]
    instructions: Instructions
    name: str | None = Field(None, description="Name of the question, for its answer.")


class ScoreLevel(Section):
    """A label of the task, as a level of a scale."""

    label: str
    description: Ignored = None


class ScoreQuestion(Section):
    """A question that a level of a scale answers: for tasks whose labels are the levels."""

    type: Literal["score"]
    levels: list[ScoreLevel] = Field(
        min_length=2, max_length=MOST_CHOICES, description="Labels of the task in their order, the lowest first."
    )
    instructions: Instructions
    name: str | None = Field(None, description="Name of the question, for its answer.")


def _kind_of(question: Any) -> str | None:
    return question.get("type") if isinstance(question, Mapping) else getattr(question, "type", None)


Question = Annotated[
    Annotated[ChoiceQuestion, Tag("choice")]
    | Annotated[PredicateQuestion, Tag("predicate")]
    | Annotated[ScoreQuestion, Tag("score")],
    Discriminator(_kind_of),
]


class DecisionIn(Section):
    """A query, and questions on its answer."""

    model: str = Field(min_length=1, max_length=250, description="A task with labels: `name` or `name@version`.")
    input: str | list[dict[str, Any]] = Field(
        description="The query: a text, or one message of the user with a text or with an `input_json` part that holds "
        "the columns of a row. A task that reads several columns takes an object in JSON as the text, too."
    )
    questions: list[Question] = Field(
        min_length=1, max_length=MOST_QUESTIONS, description="Questions, all on one answer."
    )
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    safety_identifier: Ignored = None


class ProbabilityOut(Out):
    """Probability of one choice among those of the question."""

    value: str | bool
    probability: float


class ChoiceAnswer(Out):
    """The most probable choice."""

    type: Literal["choice"] = "choice"
    name: str | None
    choice: str | bool
    confidence: float = Field(description="Its probability among the choices.")
    probabilities: list[ProbabilityOut]


class PredicateAnswer(Out):
    """How probable it is that it is so."""

    type: Literal["predicate"] = "predicate"
    name: str | None
    probability: float


class LevelOut(Out):
    """Probability of one level."""

    label: str
    value: int = Field(description="Its place in the question, from 0.")
    probability: float


class ScoreAnswer(Out):
    """The expected level."""

    type: Literal["score"] = "score"
    name: str | None
    score: float = Field(description="Mean of the levels' places, from 0, weighted by their probabilities.")
    confidence: float = Field(description="Probability of the most probable level.")
    probabilities: list[LevelOut]


class RefusalAnswer(Out):
    """No answer: the most probable one is less probable than the task's `abstain_below`."""

    type: Literal["refusal"] = "refusal"
    name: str | None


class InputTokensDetails(Out):
    """Tokens of the input that were computed before."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Out):
    """Tokens that nobody reads."""

    reasoning_tokens: int = 0


class DecisionUsage(Out):
    """Tokens. Those of the task's prefix are counted; those of the query are not."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int = 0
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class DecisionOut(Out):
    """Answers in the order of the questions."""

    model: str = Field(description="Task and version that answered.")
    answers: list[ChoiceAnswer | PredicateAnswer | ScoreAnswer | RefusalAnswer]
    usage: DecisionUsage


def decision_usage(num_prefix_tokens: int | None) -> DecisionUsage:
    """Return the usage, which the SDK requires."""
    known = num_prefix_tokens or 0
    return DecisionUsage(
        input_tokens=known, input_tokens_details=InputTokensDetails(cached_tokens=known), total_tokens=known
    )


def labels_of(question: Question, labels: Sequence[str], number: int) -> list[str]:
    """Return the labels that a question is about, in its order.

    Args:
        question: The question.
        labels: Labels of the task, or the row's own options.
        number: Number of the question, from 1, for the error.

    Raises:
        UserError: If the task's labels do not fit the question.
    """
    if isinstance(question, ChoiceQuestion):
        named = [_label_of(choice.value, labels) for choice in question.choices]
        values: Sequence[object] = [choice.value for choice in question.choices]
        field = f"questions.{number - 1}.choices"
    elif isinstance(question, ScoreQuestion):
        named = [_label_of(level.label, labels) for level in question.levels]
        values = [level.label for level in question.levels]
        field = f"questions.{number - 1}.levels"
    else:
        named, values = _yes_and_no(labels), [question.type]
        field = f"questions.{number - 1}.type"
    found = [label for label in named if label is not None]
    if len(found) < len(named) or len(set(found)) < len(found):
        wrong = values[named.index(None)] if None in named else "one twice"
        what = f"question {number} does not fit the labels of the task"
        expected = f"labels among {shortened(repr(list(labels)))}"
        if isinstance(question, PredicateQuestion):
            expected = "a task with the two labels true and false, or yes and no"
        raise UserError("labels_do_not_fit", what, expected=expected, found=quoted(wrong), field=field)
    return found


def _label_of(value: str | bool, labels: Sequence[str]) -> str | None:
    """Return the label that a value stands for; None where there is none."""
    if isinstance(value, str):
        return value if value in labels else None
    return _yes_and_no(labels)[0 if value else 1]


def _yes_and_no(labels: Sequence[str]) -> list[str | None]:
    """Return the label for yes and the one for no, of a task that has these two alone."""
    written = {label.casefold(): label for label in labels}
    for yes, no in _YES_AND_NO:
        if written.keys() == {yes, no}:
            return [written[yes], written[no]]
    return [None, None]


def decision_answer(
    question: Question, named: Sequence[str], probabilities: Mapping[str, float], abstain_below: float | None
) -> ChoiceAnswer | PredicateAnswer | ScoreAnswer | RefusalAnswer:
    """Answer a question from the probabilities of all labels.

    Args:
        question: The question.
        named: Its labels, from `labels_of`.
        probabilities: Label -> probability among all labels.
        abstain_below: Least probability, among the labels of the question, of an answer.
    """
    total = sum(probabilities[label] for label in named)
    # Where all of them are as good as impossible, nothing says which.
    shares = [probabilities[label] / total if total > 0 else 1 / len(named) for label in named]
    best = max(range(len(named)), key=shares.__getitem__)
    if abstain_below is not None and shares[best] < abstain_below:
        return RefusalAnswer(name=question.name)
    if isinstance(question, PredicateQuestion):
        return PredicateAnswer(name=question.name, probability=shares[0])
    if isinstance(question, ScoreQuestion):
        levels = [
            LevelOut(label=label, value=place, probability=share)
            for place, (label, share) in enumerate(zip(named, shares, strict=True))
        ]
        score = sum(place * share for place, share in enumerate(shares))
        return ScoreAnswer(name=question.name, score=score, confidence=shares[best], probabilities=levels)
    values = [choice.value for choice in question.choices]
    each = [ProbabilityOut(value=value, probability=share) for value, share in zip(values, shares, strict=True)]
    return ChoiceAnswer(name=question.name, choice=values[best], confidence=shares[best], probabilities=each)


# --- Chat completions


class ResponseFormat(Section):
    """Format of the answer."""

    type: Literal["text"]


class ChatIn(Section):
    """A query as a message of a chat."""

    model: str = Field(min_length=1, max_length=250, description="A task: `name` or `name@version`.")
    messages: list[dict[str, Any]] = Field(
        min_length=1,
        description="One message of the user, with a text; the query. A task that reads several columns "
        "takes an object in JSON as the text.",
    )
    stream: bool | None = Field(None, description="Whether the answer comes in parts, as server-sent events.")
    temperature: float | None = Field(None, ge=0, le=100, description="Samples free answers; 0 or null for greedy.")
    top_p: float | None = Field(None, gt=0, le=1, description="Probability that the most probable tokens reach.")
    seed: int | None = Field(None, ge=0, le=MOST_COUNTED, description="Seed of the sampling.")
    max_tokens: int | None = Field(None, ge=1, description="Not below the task's own limit.")
    max_completion_tokens: int | None = Field(None, ge=1, description="Not below the task's own limit.")
    n: Literal[1] | None = Field(None, description="One answer.")
    response_format: ResponseFormat | None = Field(None, description="Text alone.")
    logprobs: Literal[False] | None = Field(None, description="None.")
    frequency_penalty: Literal[0] | None = Field(None, description="None.")
    presence_penalty: Literal[0] | None = Field(None, description="None.")
    stream_options: Ignored = None
    metadata: Ignored = None
    prompt_cache_key: Ignored = None
    safety_identifier: Ignored = None
    service_tier: Ignored = None
    store: Ignored = None
    user: Ignored = None

    def sampling(self) -> dict[str, Any]:
        """Return how tokens are drawn, as a prediction takes it; nothing for the most probable ones.

        A seed alone draws nothing.
        """
        if self.temperature == 0 or (self.temperature is None and self.top_p is None):
            return {}
        given = {"temperature": self.temperature, "top_p": self.top_p, "seed": self.seed}
        return {name: value for name, value in given.items() if value is not None}

    def require_tokens(self, limit: int) -> None:
        """Refuse a limit of tokens below that of the task, which cuts answers where it was made to.

        Raises:
            UserError: If so.
        """
        for field in ("max_tokens", "max_completion_tokens"):
            value = getattr(self, field)
            if value is not None and value < limit:
                what, remedy = "the task has a limit of its own", "Make the task with another `max_answer_tokens`."
                expected = f"at least {limit}, or nothing"
                raise UserError(
                    "conflicting_options", what, expected=expected, found=str(value), remedy=remedy, field=field
                )


class MessageOut(Out):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: str | None = Field(None, description="Why there is no answer, where the task abstained.")


class CompletionChoice(Out):
    """The only answer."""

    index: int = 0
    message: MessageOut
    finish_reason: Literal["stop", "length"] = Field(description="`length` where the answer was cut at its limit.")
    logprobs: None = None


class ChatOut(Out):
    """The answer to a query. It says nothing of tokens."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str = Field(description="Task and version that answered.")
    choices: list[CompletionChoice]


def chat_out(prediction: Prediction, model: str, created: int) -> ChatOut:
    """Return a prediction as a chat completion."""
    message = MessageOut(content=prediction.answer)
    if prediction.abstained:
        refusal = "The most probable answer is less probable than the task's abstain_below."
        message = MessageOut(content=None, refusal=refusal)
    choice = CompletionChoice(message=message, finish_reason=finish_reason(prediction))
    return ChatOut(id=new_id(), created=created, model=model, choices=[choice])


def finish_reason(prediction: Prediction) -> Literal["stop", "length"]:
    """Say why an answer ended."""
    return "stop" if prediction.stopped else "length"


def new_id() -> str:
    """Return a name for a completion; nothing can be found by it later."""
    return f"chatcmpl-{secrets.token_hex(12)}"


def chunk(completion_id: str, model: str, created: int, delta: Mapping[str, Any], finish: str | None = None) -> bytes:
    """Return one server-sent event of a completion that comes in parts."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    known = {"id": completion_id, "object": "chat.completion.chunk", "created": created, "model": model}
    return event({**known, "choices": [choice]})


def event(content: Mapping[str, Any]) -> bytes:
    """Return a server-sent event without a name, as the SDK reads them."""
    return f"data: {json.dumps(content, ensure_ascii=False, allow_nan=False)}\n\n".encode()


END_OF_EVENTS = b"data: [DONE]\n\n"


# --- Queries


def row_of(content: str | Sequence[Mapping[str, Any]], task: Task, field: str) -> InputRow:
    """Return the row that the input of a decision or the messages of a chat stand for, or why it cannot be used.

    Raises:
        UserError: If they are something else than one text or one row.
    """
    query = content if isinstance(content, str) else _content_of_message(content, field)
    if isinstance(query, str):
        query = _columns_of(query, task, field)
    (row,) = rows_in_list([query], field)
    return row


def _columns_of(text: str, task: Task, field: str) -> Mapping[str, Any]:
    """Return a text as the only column that a task reads, or the columns that it holds as JSON.

    Raises:
        UserError: If the task reads several, and the text is no JSON object.
    """
    if len(task.columns) == 1 and task.choices_column is None:
        return {task.columns[0]: text}
    try:
        return json_row(text, field, 1).columns
    except UserError as error:
        columns = ", ".join(map(repr, task.columns))
        what, expected = f"task {task.name!r} reads several columns", f"a JSON object with {columns}"
        raise UserError("not_an_object", what, expected=expected, found=quoted(text), field=field) from error


def _content_of_message(messages: Sequence[Mapping[str, Any]], field: str) -> str | Mapping[str, Any]:
    """Return the text or the row of the only message."""
    roles = [message.get("role", message.get("type")) for message in messages]
    if roles != ["user"]:
        what, found = "the messages are something else than one query", quoted(roles)
        raise UserError("one_message_needed", what, expected=_ONE_MESSAGE, found=found, field=field)
    content = messages[0].get("content")
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else [content]
    part = parts[0] if len(parts) == 1 and isinstance(parts[0], Mapping) else {}
    kind = part.get("type")
    text, data = part.get("text"), part.get("data")
    if kind in ("text", "input_text") and isinstance(text, str):
        return text
    if kind == "input_json" and isinstance(data, Mapping):
        return data
    expected = "a text, or one part that is a text or, in decisions, an input_json with one object"
    found = quoted([one.get("type") if isinstance(one, Mapping) else type(one).__name__ for one in parts])
    raise UserError("wrong_content", "the message holds something else", expected=expected, found=found, field=field)


# --- Models


class ModelOut(Out):
    """A task, as a model."""

    id: str = Field(description="Name of the task.")
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "manyicl"


class ModelsOut(Out):
    """All tasks, as models."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


def model_out(task: TaskRecord) -> ModelOut:
    """Return a task as a model."""
    return ModelOut(id=task.name, created=seconds(task.created_at))


def seconds(time: datetime) -> int:
    """Return a time as the SDK expects it."""
    return int(time.timestamp())


# --- Errors


class ErrorFields(Out):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorOut(Out):
    """An error in OpenAI's shape."""

    error: ErrorFields


_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


def openai_status(status: int) -> int:
    """Return the status of an error for the SDK, which knows no other than 400 for a mistake in a request."""
    return 400 if status == 422 else status


def openai_error(problem: Mapping[str, Any], status: int) -> dict[str, Any]:
    """Return a problem document as an error in OpenAI's shape."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    message, field = problem.get("detail") or problem.get("title") or "refused", problem.get("field")
    return {"error": {"message": message, "type": kind, "param": field, "code": problem.get("code")}}
