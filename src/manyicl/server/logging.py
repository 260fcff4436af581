"""Structured logs: one JSON object a line on standard error, without any text of a task or a row."""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import structlog
from structlog.typing import Processor

# Names of all that may be logged; a text of a user is in none of them.
log = structlog.stdlib.get_logger("manyicl.server")


def set_up_logging(level: str = "INFO") -> None:
    """Write the server's and uvicorn's logs as JSON lines to standard error."""
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _without_messages,
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    handler = _json_lines(shared)
    for name in ("manyicl.server", "uvicorn.error"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    logging.basicConfig(handlers=[_json_lines([*shared, structlog.stdlib.add_logger_name, _without_event])])
    # Our own line for each request has no path and no query, which hold names.
    logging.getLogger("uvicorn.access").disabled = True


def _json_lines(processors: list[Processor]) -> logging.Handler:
    handler = logging.StreamHandler(sys.stderr)
    formatter = structlog.stdlib.ProcessorFormatter
    last: list[Processor] = [formatter.remove_processors_meta, structlog.processors.JSONRenderer()]
    handler.setFormatter(formatter(foreign_pre_chain=processors, processors=last))
    return handler


def _without_messages(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Say where an exception was raised, in place of its message and traceback."""
    found = event.pop("exc_info", None)
    error = found[1] if isinstance(found, tuple) else found
    if isinstance(error, BaseException):
        event["error"] = place_of(error)
    return event


def _without_event(_logger: Any, _method: str, event: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """Say that a library has something to say, but not what: its message may quote what it was given."""
    event["event"] = "library_message"
    return event


def place_of(error: BaseException) -> str:
    """Say which kind of error it is and where it was raised; its message may hold texts of rows, and is not logged."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames[-4:]]
    return f"{type(error).__name__} at {' > '.join(places)}"
