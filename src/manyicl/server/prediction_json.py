"""Predictions and errors of rows -> the objects that a response holds; every number in them is one of JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from manyicl.errors import UserError
from manyicl.server.row_input import DEMONSTRATIONS

if TYPE_CHECKING:
    from manyicl.engine.prediction import Prediction
    from manyicl.tasks.task import Example


def prediction_json(prediction: Prediction) -> dict[str, Any]:
    """Return one answer as a response holds it.

    ``answer`` is null where the model abstained, and ``guess`` then what it would have answered.
    ``probability`` is that of the answer or the guess. Where the row could not be answered, everything is null but
    ``problem``, which says why.
    """
    found = prediction.as_json()
    if prediction.problem is not None:
        return found | {"problem": error_json(prediction.problem)}
    if prediction.scores is not None:
        probabilities = prediction.scores.probabilities
        found["probability"] = probabilities[prediction.answer]
        found["second_probability"] = None if prediction.second is None else probabilities[prediction.second]
    if prediction.abstained:
        found["guess"] = prediction.answer
    if prediction.similar is not None:
        found["similar"] = [_similar_json(example) for example in prediction.similar]
    plain: dict[str, Any] = _with_plain_numbers(found)
    return plain


def error_json(error: UserError) -> dict[str, Any]:
    """Return why a row cannot be used: which row and column, as far as that is known, a code and a sentence."""
    known = {"row": error.row, "field": error.field, "code": error.code, "detail": sentence(error)}
    return {name: value for name, value in known.items() if value is not None}


def sentence(error: UserError) -> str:
    """Return the sentence of an error without its file, which is none of a caller's business.

    >>> sentence(UserError("empty_answer", "the answer is empty", file="demonstrations", row=3))
    'Demonstration 3: the answer is empty.'
    """
    file, error.file = error.file, None
    try:
        written = str(error)
    finally:
        error.file = file
    if file != DEMONSTRATIONS or error.row is None:
        return written
    return f"Demonstration {error.row}: {written.removeprefix(f'Query {error.row}: ')}"


def json_line(value: Mapping[str, Any]) -> bytes:
    """Write an object as one line of JSON lines.

    Raises:
        ValueError: If a number in it is none of JSON.
    """
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _similar_json(example: Example) -> dict[str, Any]:
    """Return a demonstration like the query: its number in the task, where it has one, its text and its answer."""
    number = example.origin.rpartition(":")[2]
    return {
        "demonstration": int(number) if number.isdecimal() else None,
        "text": example.query.text,
        "answer": example.answer,
    }


def _with_plain_numbers(value: Any) -> Any:
    """Replace numbers that JSON has not, such as the logarithm of nothing, by null."""
    if isinstance(value, dict):
        return {name: _with_plain_numbers(part) for name, part in value.items()}
    if isinstance(value, list):
        return [_with_plain_numbers(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
