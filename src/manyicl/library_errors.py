"""Turn an error of a library or of the operating system into a clause of our own messages."""

from __future__ import annotations

import os
import re

from pydantic import ValidationError

from manyicl.errors import quoted

TOKEN_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")


def reason(error: BaseException) -> str:
    r"""Return the first line of an error, ready to stand within a sentence: lower case, no full stop.

    Of an error of the system it is what the system says, without number and file name; of data that pydantic
    refuses, the first thing wrong and where; of an error without text, the name of its class. Access tokens are
    replaced by the names of their variables. The caller names the file.

    >>> reason(PermissionError(13, "Permission denied", "a.txt"))
    'permission denied'
    >>> reason(RuntimeError("Expected 4 tensors.\nTraceback of some C++ code"))
    'expected 4 tensors'
    """
    if isinstance(error, ValidationError):
        return _first_problem(error)
    return clause((isinstance(error, OSError) and error.strerror) or str(error).strip() or type(error).__name__)


def clause(text: str) -> str:
    """Return the first line of what a library says, as `reason` does of an error."""
    line = (text.strip().splitlines() or [""])[0].rstrip(".:; ")
    for variable in TOKEN_VARIABLES:
        if token := os.environ.get(variable):
            line = line.replace(token, f"${variable}")
    return lower_case_start(line)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors(include_url=False)[0]
    message = lower_case_start(problem["msg"].removeprefix("Value error, "))
    place = ".".join(map(str, problem["loc"]))
    return f"{place}: {message}, found {quoted(problem['input'])}" if place else message


def lower_case_start(text: str) -> str:
    """Lower the first letter of an ordinary word; ``CUDA``, ``JSON`` and ``LlamaConfig`` stay."""
    return text[:1].lower() + text[1:] if re.match(r"[A-Z][a-z]*\b", text) else text
