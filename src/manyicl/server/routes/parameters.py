"""Parameters, and names in bodies and headers, that several routes have."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Path, Query

from manyicl.server.schemas import MOST_COUNTED

# Content type of server-sent events.
EVENTS = "text/event-stream"
# Header of an answer to a request that was carried out before.
REPLAYED = "Idempotent-Replayed"
MOST_IN_PAGE = 1000
USUAL_IN_PAGE = 100

TaskName = Annotated[
    str,
    Path(max_length=200, pattern=r"^[^/\x00-\x1f\x7f]+$", description="Id or name of the task; an id goes first."),
]
DemonstrationNumber = Annotated[int, Path(ge=1, le=MOST_COUNTED, description="Number of the demonstration.")]
VersionNumber = Annotated[int, Path(ge=1, le=MOST_COUNTED, description="Number of the version.")]
Version = Annotated[int | None, Query(ge=1, le=MOST_COUNTED, description="Version; by default the newest.")]
Limit = Annotated[int, Query(ge=1, le=MOST_IN_PAGE, description="Most items of a page.")]
Cursor = Annotated[str | None, Query(max_length=200, description="`next_cursor` of the page before.")]
IfMatch = Annotated[
    str | None, Header(alias="If-Match", description="ETag of the task as you know it; another one is refused.")
]
IdempotencyKey = Annotated[
    str | None,
    Header(alias="Idempotency-Key", description="Any text of your own; the same request with it is done once."),
]
