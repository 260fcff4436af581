"""Client of a task server: make tasks by giving examples, and ask them, over HTTP. See `docs/server.md`."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from itertools import tee
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

from manyicl.errors import MachineError, UserError, quoted
from manyicl.served import (
    Change,
    JobInfo,
    Predictions,
    ServedPrediction,
    TaskInfo,
    VersionInfo,
    error_of,
    parsed,
    prediction_of,
    record_of,
)
from manyicl.server_requests import Requests

if TYPE_CHECKING:
    import httpx

DEFAULT_URL = "http://127.0.0.1:8000"
# Environment variables of the address and of the key, so that no key stands on a command line.
URL_VARIABLE, KEY_VARIABLE = "MANYICL_URL", "MANYICL_API_KEY"
NDJSON = "application/x-ndjson"
# Rows of one request where many are sent in portions; fewer where they are long.
ROWS_PER_REQUEST = 256
BYTES_PER_REQUEST = 1_000_000
ROWS_PER_PAGE = 1_000
# While a task is compiled or a job works, its state is looked up at such intervals, in seconds.
FIRST_PAUSE, LONGEST_PAUSE = 0.05, 2.0

InfoT = TypeVar("InfoT", TaskInfo, JobInfo)
Row = Mapping[str, object]
# A row with its answer, or a query and its answer for a task with the default templates.
Demonstration = Row | tuple[str, str]


class TaskKeys(TypedDict, total=False):
    """Keys of a task file without ``data`` and ``name``; the page of task files explains them."""

    family: str
    description: str
    metric: str
    query: str
    answer: str
    instruction: str
    labels: Sequence[str] | Literal["from_train"]
    class_names: Mapping[str, Mapping[str, str]]
    choices: str
    references: str
    source: str
    max_answer_tokens: int
    max_characters: int


class PredictOptions(TypedDict, total=False):
    """How queries are answered, as for `Engine.predict`.

    Attributes:
        scores: ``best``, ``best_two`` or ``all``; by default all of few labels, the best two of many.
        abstain_below: Least probability among the labels, below which there is no answer; None for the task's setting.
        blend: Whether scores are combined with those of a linear classifier on the same demonstrations.
        retrieve: Further demonstrations most like a query to put before it.
        similar: Number of demonstrations most like a query to return with its answer.
        temperature: Of sampling free answers; without it they are decoded greedily.
        top_p: Share of probability among which is sampled.
        seed: Seed of sampling.
    """

    scores: Literal["best", "best_two", "all"]
    abstain_below: float | None
    blend: bool
    retrieve: int
    similar: int
    temperature: float
    top_p: float
    seed: int


class Client:
    """A connection to a task server. Threads may share it.

    A request is sent again while the server is away or too busy, for ``retry_seconds``. A write carries an
    ``Idempotency-Key``, which stays the same then, so that the server carries it out once.

    Examples:
        >>> from manyicl import Client
        >>> with Client("http://127.0.0.1:8000") as client:  # doctest: +SKIP
        ...     task = client.create_task("mood", [("what a film", "good"), ("so dull", "bad")], labels=("good", "bad"))
        ...     [prediction.answer for prediction in task.predict([{"query": "not again"}])]
        ['bad']
    """

    def __init__(
        self,
        url: str | None = None,
        api_key: str | None = None,
        *,
        timeout: float = 600.0,
        retry_seconds: float = 30.0,
    ) -> None:
        """Take the address and the key; the first request connects.

        Args:
            url: Address of the server; by default that in the variable ``MANYICL_URL``, else the one on which
                ``manyicl serve`` listens.
            api_key: API key; by default that in the variable ``MANYICL_API_KEY``, if there is one.
            timeout: Longest wait for an answer, in seconds.
            retry_seconds: How long a request is tried again while the server is away or busy, in seconds; 0 for never.

        Raises:
            UserError: If the address or the key cannot be one, or httpx is not installed.
        """
        url = url or os.environ.get(URL_VARIABLE) or DEFAULT_URL
        api_key = api_key or os.environ.get(KEY_VARIABLE) or None
        self.requests = Requests(url, api_key, timeout=timeout, retry_seconds=retry_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self.requests.close()

    def create_task(
        self,
        name: str,
        demonstrations: Iterable[Demonstration],
        *,
        pinned: bool = False,
        abstain_below: float | None = None,
        blend: bool = False,
        num_shots: int | None = None,
        num_retrieved: int = 0,
        idempotency_key: str | None = None,
        **keys: Unpack[TaskKeys],
    ) -> RemoteTask:
        """Make a task of demonstrations; it is durable when this returns, and compiled after that.

        Args:
            name: Name of the task, unique among those of the key's owner.
            demonstrations: Rows with their answers; or queries and answers, as pairs.
            pinned: Whether its prefix always stays in memory.
            abstain_below: Least probability among the labels below which there is no answer.
            blend: Whether scores are combined with those of a linear classifier on the words.
            num_shots: Most demonstrations in the prefix; None for all that fit.
            num_retrieved: Further demonstrations to put before each query.
            idempotency_key: Names the request where it may be sent again by another process; a new one by default.
            **keys: Keys of a task file. Without templates the columns are ``query`` and ``answer``; with ``labels`` the
                task is a classification, else answers are free.

        Raises:
            UserError: If the server refuses it; ``code`` says why, ``name_taken`` among them.
            MachineError: If the server cannot be reached.
        """
        settings = {"pinned": pinned, "abstain_below": abstain_below, "blend": blend}
        settings |= {"num_shots": num_shots, "num_retrieved": num_retrieved}
        body = {"name": name, "task": dict(keys), "settings": settings, "demonstrations": _rows_of(demonstrations)}
        created = record_of(TaskInfo, self._write("POST", "/v1/tasks", body, idempotency_key=idempotency_key)[0])
        return RemoteTask(self, created.id)

    def task(self, reference: str) -> RemoteTask:
        """Name a task of the server by its name or id; nothing is sent yet."""
        if not reference:
            raise UserError("no_task_named", "No task is named", expected="the name or the id of a task")
        return RemoteTask(self, reference)

    def tasks(self) -> Iterator[TaskInfo]:
        """Yield the tasks of the key's owner."""
        return (record_of(TaskInfo, one) for one in self._pages("/v1/tasks"))

    def job(self, job_id: str) -> RemoteJob:
        """Name a job of the server by its id; nothing is sent yet."""
        return RemoteJob(self, job_id)

    def jobs(self) -> Iterator[JobInfo]:
        """Yield the jobs of the key's owner."""
        return (record_of(JobInfo, one) for one in self._pages("/v1/jobs"))

    # --- Requests

    def _get(self, path: str, **query: Any) -> Any:
        return parsed(self.requests.send("GET", path, params=_known(query)).text)

    def _write(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        idempotency_key: str | None = None,
        if_revision: int | None = None,
    ) -> tuple[Any, bool]:
        """Send a write under an idempotency key; return what came back, and whether it was carried out before."""
        request = _json_body(body)
        request["headers"] |= {"Idempotency-Key": idempotency_key or uuid.uuid4().hex, **_if_match(if_revision)}
        response = self.requests.send(method, path, **request)
        return parsed(response.text), response.headers.get("idempotent-replayed") == "true"

    def _pages(self, path: str, **query: Any) -> Iterator[Any]:
        """Yield what a route lists, page after page."""
        cursor: str | None = None
        while True:
            page = self._get(path, cursor=cursor, **query)
            yield from page["data"]
            cursor = page.get("next_cursor")
            if cursor is None:
                return


class RemoteTask:
    """A task of a server, by its name or id; made by `Client.create_task` and `Client.task`."""

    def __init__(self, client: Client, reference: str) -> None:
        """Name the task; nothing is sent."""
        self.client = client
        self.reference = reference
        self._only_column: str | None = None

    def __repr__(self) -> str:
        return f"RemoteTask({self.reference!r})"

    @property
    def _path(self) -> str:
        return f"/v1/tasks/{quote(self.reference, safe='')}"

    def info(self) -> TaskInfo:
        """Return what the server says of the task now.

        Raises:
            UserError: If there is no such task.
        """
        return record_of(TaskInfo, self.client._get(self._path))

    def wait(self, timeout: float = 600.0) -> TaskInfo:
        """Wait until the newest version is compiled.

        Raises:
            UserError: If compiling it failed, with the reason.
            MachineError: If it takes longer than ``timeout`` seconds.
        """
        sentence = f"Task {self.reference!r} was not compiled within {timeout:g} s."
        return _settled(self.info, ("ready",), "version_failed", timeout, sentence)

    # --- Demonstrations

    def demonstrations(self, version: int | None = None) -> Iterator[Mapping[str, Any]]:
        """Yield the demonstrations of a version, by default the newest: ``number``, ``added_in`` and ``columns``."""
        return self.client._pages(f"{self._path}/demonstrations", version=version, limit=ROWS_PER_PAGE)

    def add(
        self,
        demonstrations: Iterable[Demonstration],
        *,
        if_revision: int | None = None,
        idempotency_key: str | None = None,
    ) -> Change:
        """Add demonstrations, after those that are there; makes a version.

        Args:
            demonstrations: Rows with their answers, or pairs, as for `Client.create_task`.
            if_revision: Refuse with ``changed_meanwhile`` if the task has another revision now.
            idempotency_key: As for `Client.create_task`.
        """
        body = {"demonstrations": _rows_of(demonstrations)}
        return self._change("POST", "/demonstrations", body, if_revision, idempotency_key)

    def correct(
        self, number: int, row: Demonstration, *, if_revision: int | None = None, idempotency_key: str | None = None
    ) -> Change:
        """Replace a demonstration; it keeps its number and its place. Arguments are those of `add`."""
        (columns,) = _rows_of([row])
        return self._change("PATCH", f"/demonstrations/{number}", columns, if_revision, idempotency_key)

    def remove(self, number: int, *, if_revision: int | None = None, idempotency_key: str | None = None) -> Change:
        """Remove a demonstration; its number is not given again. Arguments are those of `add`."""
        return self._change("DELETE", f"/demonstrations/{number}", None, if_revision, idempotency_key)

    def versions(self) -> Iterator[VersionInfo]:
        """Yield the versions of the task."""
        return (record_of(VersionInfo, one) for one in self.client._pages(f"{self._path}/versions"))

    def restore(self, version: int, *, if_revision: int | None = None, idempotency_key: str | None = None) -> Change:
        """Make a version with the demonstrations of an earlier one. Arguments are those of `add`."""
        return self._change("POST", f"/versions/{version}/restore", None, if_revision, idempotency_key)

    def _change(
        self, method: str, path: str, body: Any, if_revision: int | None, idempotency_key: str | None
    ) -> Change:
        content, replayed = self.client._write(
            method, self._path + path, body, if_revision=if_revision, idempotency_key=idempotency_key
        )
        task, version = record_of(TaskInfo, content["task"]), record_of(VersionInfo, content["version"])
        numbers = content.get("numbers")
        return Change(task, version, (numbers[0], numbers[-1]) if numbers else None, replayed)

    # --- The task itself

    def update(self, *, if_revision: int | None = None, **changes: Any) -> TaskInfo:
        """Change the name or settings that may change: ``name``, ``pinned``, ``abstain_below``, ``blend``."""
        request = _json_body(changes)
        request["headers"] |= _if_match(if_revision)
        # Sent again after it was carried out, it would be refused: the revision is another one by then.
        response = self.client.requests.send("PATCH", self._path, repeatable=if_revision is None, **request)
        info = record_of(TaskInfo, parsed(response.text))
        if "name" in changes and self.reference != info.id:
            self.reference = info.name
        return info

    def delete(self) -> None:
        """Delete the task, its versions and demonstrations.

        Raises:
            UserError: If there is no such task.
        """
        self.client.requests.send("DELETE", self._path, repeatable=False)

    # --- Answers

    def predict(
        self, rows: Iterable[Row | str], *, version: int | None = None, **options: Unpack[PredictOptions]
    ) -> Predictions:
        """Answer queries in one request; if one row is bad, none is answered.

        Args:
            rows: Mappings with the task's columns, or texts if its query template has one column.
            version: Version that answers; by default the newest that can.
            **options: How they are answered.

        Raises:
            UserError: If a row cannot be answered; ``errors`` has all of them. If there are too many rows for one
                request; `predict_each` sends them in portions.
        """
        body = {"rows": list(self._queries(rows)), **_known({"version": version, **options})}
        content = parsed(self.client.requests.send("POST", f"{self._path}/predict", **_json_body(body)).text)
        predictions = map(prediction_of, content["predictions"])
        return Predictions(predictions, content["task"], content["version"], content.get("model"))

    def predict_each(
        self, rows: Iterable[Row | str], *, version: int | None = None, **options: Unpack[PredictOptions]
    ) -> Iterator[ServedPrediction]:
        """Answer any number of queries in order, in portions; a row that cannot be answered has a ``problem``.

        All are answered by one version: by default the newest that can answer at the beginning.
        """
        query = _known({"version": version, **options})
        headers = {"Content-Type": NDJSON, "Accept": NDJSON}
        for portion in _portions(self._queries(rows)):
            response = self.client.requests.send(
                "POST", f"{self._path}/predict", params=query, headers=headers, content=b"".join(portion)
            )
            query.setdefault("version", response.headers.get("x-task-version"))
            predictions = list(map(prediction_of, _json_lines(response)))
            if len(predictions) != len(portion):
                # Where the server fails after the first answers, its last line says why.
                problem = predictions[-1].problem if predictions else None
                raise problem or MachineError(f"The server answered {len(predictions)} of {len(portion)} rows.")
            yield from predictions

    def predict_file(
        self,
        path: str | Path,
        output: str | Path,
        *,
        version: int | None = None,
        **options: Unpack[PredictOptions],
    ) -> tuple[int, int]:
        """Answer the rows of a table, and write one line of JSON for each, with the columns of the row.

        A column that has the name of a part of an answer, such as ``answer``, becomes ``input_answer``.

        Args:
            path: Rows, as for ``manyicl predict --input``: JSON lines, CSV, Parquet or a workbook.
            output: File to write, in a folder that exists; it appears when all rows are answered.
            version: As for `predict_each`.
            **options: As for `predict_each`.

        Returns:
            Number of rows, and how many of them have a ``problem`` in place of an answer.

        Raises:
            UserError: If the table cannot be read.
        """
        from manyicl.atomic import write_atomically
        from manyicl.tasks.rows import iter_rows, with_other_names

        num_rows = num_problems = 0

        def write(aside: Path) -> None:
            nonlocal num_rows, num_problems
            sent, kept = tee(row.columns for row in iter_rows(Path(path)))
            predictions = self.predict_each(sent, version=version, **options)
            with aside.open("w", encoding="utf-8") as file:
                for columns, prediction in zip(kept, predictions, strict=True):
                    line = {**with_other_names(columns, vars(prediction)), **_as_line(prediction)}
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
                    num_rows += 1
                    num_problems += prediction.problem is not None

        write_atomically(Path(output), write)
        return num_rows, num_problems

    def stream(self, row: Row | str, *, version: int | None = None, **options: Unpack[PredictOptions]) -> AnswerStream:
        """Answer one query of a task with free answers, and give the text as it comes.

        Closing the stream before its end stops the server's work on it.

        Raises:
            UserError: If the row cannot be answered, or the task has labels.
        """
        body = {"rows": list(self._queries([row])), **_known({"version": version, **options})}
        return AnswerStream(self.client.requests, f"{self._path}/predict", body)

    def evaluate(
        self, rows: Iterable[Row], *, version: int | None = None, **options: Unpack[PredictOptions]
    ) -> dict[str, Any]:
        """Answer rows whose answers are known, and compare: the metric, the confusion of labels, the mistakes.

        Args:
            rows: Rows with the columns of query and answer.
            version: Version that answers; by default the newest that can.
            **options: As for `predict`.

        Returns:
            What the server says, as the page of the API explains it.
        """
        body = {"rows": _rows_of(rows), **_known({"version": version, **options})}
        found: dict[str, Any] = parsed(
            self.client.requests.send("POST", f"{self._path}/evaluate", **_json_body(body)).text
        )
        return found

    def submit(
        self,
        rows: Iterable[Row | str],
        *,
        kind: Literal["predict", "evaluate"] = "predict",
        version: int | None = None,
        idempotency_key: str | None = None,
        **options: Unpack[PredictOptions],
    ) -> RemoteJob:
        """Have rows answered or evaluated by a job of the server, which goes through restarts.

        Args:
            rows: Rows with the task's columns, and to be evaluated with those of the answer, too.
            kind: What is done with them.
            version: Version that answers; by default the newest that can.
            idempotency_key: As for `Client.create_task`.
            **options: As for `predict`.
        """
        body = {"kind": kind, "task": self.reference, "rows": list(self._queries(rows)), "options": _known(options)}
        content, _ = self.client._write(
            "POST", "/v1/jobs", body | _known({"version": version}), idempotency_key=idempotency_key
        )
        return RemoteJob(self.client, record_of(JobInfo, content).id)

    def _queries(self, rows: Iterable[Row | str]) -> Iterator[dict[str, Any]]:
        """Yield queries as rows; a text fills the only column that the task reads.

        Raises:
            UserError: If they are one row and no list, or a text comes to a task that reads several columns.
        """
        if isinstance(rows, str | Mapping):
            found, remedy = f"one {type(rows).__name__}", "Put the row in a list."
            raise UserError("not_a_list", "rows are a list", found=found, remedy=remedy)
        for row in rows:
            yield {self._column_of_texts(): row} if isinstance(row, str) else _rows_of([row])[0]

    def _column_of_texts(self) -> str:
        """Return the only column that the task reads; its templates never change, so the server is read once."""
        if self._only_column is None:
            from manyicl.tasks.template import compiled

            keys = self.info().task
            columns = compiled(str(keys.get("query", "{{ query }}"))).columns
            if len(columns) != 1 or keys.get("choices") is not None:
                what, remedy = f"task {self.reference!r} reads several columns", "Give a mapping with these keys."
                raise UserError("query_needs_columns", what, expected=f"the columns {list(columns)}", remedy=remedy)
            (self._only_column,) = columns
        return self._only_column


class RemoteJob:
    """A job of a server, by its id; made by `RemoteTask.submit` and `Client.job`."""

    def __init__(self, client: Client, job_id: str) -> None:
        """Name the job; nothing is sent."""
        self.client = client
        self.id = job_id
        self._path = f"/v1/jobs/{quote(job_id, safe='')}"

    def __repr__(self) -> str:
        return f"RemoteJob({self.id!r})"

    def info(self) -> JobInfo:
        """Return how far the job is.

        Raises:
            UserError: If there is no such job.
        """
        return record_of(JobInfo, self.client._get(self._path))

    def wait(self, timeout: float = 3600.0) -> JobInfo:
        """Wait until the job is done or cancelled.

        Raises:
            UserError: If it failed, with the reason.
            MachineError: If it takes longer than ``timeout`` seconds.
        """
        sentence = f"Job {self.id} did not end within {timeout:g} s."
        return _settled(self.info, ("done", "cancelled"), "job_failed", timeout, sentence)

    def results(self) -> Iterator[ServedPrediction]:
        """Yield the results that there are, in order of the rows."""
        after = 0
        while True:
            response = self.client.requests.send(
                "GET",
                f"{self._path}/results",
                params={"after": after, "limit": ROWS_PER_PAGE},
                headers={"Accept": NDJSON},
            )
            lines = _json_lines(response)
            yield from map(prediction_of, lines)
            if len(lines) < ROWS_PER_PAGE:
                return
            after = lines[-1]["row"]

    def cancel(self) -> None:
        """Cancel the job if it is not done, else forget it and its results."""
        self.client.requests.send("DELETE", self._path, repeatable=False)


class AnswerStream:
    """The text of a free answer as it comes; a context manager, and an iterator over parts of the text.

    Attributes:
        prediction: The whole answer, once the iterator has ended; None before.
    """

    def __init__(self, requests: Requests, path: str, body: Mapping[str, Any]) -> None:
        """Send the query.

        Raises:
            UserError: If the server refuses it.
        """
        self.prediction: ServedPrediction | None = None
        self._requests = requests
        self._stack = ExitStack()
        sent = _json_body(body)
        sent["headers"] = {**sent["headers"], "Accept": "text/event-stream"}
        self._response = self._stack.enter_context(requests.stream("POST", path, **sent))
        self._parts = self._read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def __iter__(self) -> Iterator[str]:
        return self._parts

    def __next__(self) -> str:
        return next(self._parts)

    def close(self) -> None:
        """Close the connection; the server stops its work on an answer that is not complete."""
        self._stack.close()

    def _read(self) -> Iterator[str]:
        with closing(self._stack):
            for event, content in _events(self._requests.lines(self._response)):
                if event == "part":
                    yield content["text"]
                elif event == "done":
                    self.prediction = prediction_of(content.get("prediction", content))
                    return
                elif event == "error":
                    raise error_of(content)
        raise MachineError("The answer of the server ended before it was complete.")


def _events(lines: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Yield server-sent events: name and content.

    Source: WHATWG HTML, Server-sent events, interpreting an event stream.
    """
    event, data = "message", list[str]()
    for line in lines:
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        if not line:
            if data:
                yield event, parsed("\n".join(data))
            event, data = "message", []
        elif name == "event":
            event = value
        elif name == "data":
            data.append(value)


def _json_lines(response: httpx.Response) -> list[Any]:
    """Parse JSON lines; only line feeds end one, and a text may hold other separators of lines."""
    return [parsed(line) for line in response.text.split("\n") if line.strip()]


def _rows_of(rows: Iterable[object]) -> list[dict[str, Any]]:
    """Return demonstrations as rows; a pair of query and answer fills the columns of the default templates.

    Raises:
        UserError: If one is neither a mapping nor a pair.
    """
    if isinstance(rows, str | Mapping):
        raise UserError("not_a_list", "rows are a list", found=f"one {type(rows).__name__}")
    found = []
    for number, row in enumerate(rows, start=1):
        if isinstance(row, Mapping):
            found.append(dict(row))
        elif isinstance(row, tuple | list) and len(row) == 2:
            found.append({"query": row[0], "answer": row[1]})
        else:
            expected = "a mapping of columns, or a demonstration as a pair"
            raise UserError("not_a_row", "this is no row", expected=expected, found=quoted(row), row=number)
    return found


def _portions(rows: Iterable[Row]) -> Iterator[list[bytes]]:
    """Yield rows as lines of JSON, as many together as one request takes."""
    portion: list[bytes] = []
    size = 0
    for row in rows:
        line = _encoded(row) + b"\n"
        if portion and (len(portion) == ROWS_PER_REQUEST or size + len(line) > BYTES_PER_REQUEST):
            yield portion
            portion, size = [], 0
        portion.append(line)
        size += len(line)
    if portion:
        yield portion


def _encoded(content: Any) -> bytes:
    """Write JSON.

    Raises:
        UserError: If a value is none, such as a date, a NaN, or half a character.
    """
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        what, remedy = "a value cannot be sent as JSON", "Write it as text."
        raise UserError("no_json", what, found=str(error), remedy=remedy) from error


def _json_body(content: Any) -> dict[str, Any]:
    """Return the arguments of a request that sends JSON, or nothing."""
    headers = {"Content-Type": "application/json"}  # the server wants it even where nothing follows
    return {"headers": headers} if content is None else {"headers": headers, "content": _encoded(content)}


def _if_match(revision: int | None) -> dict[str, str]:
    """Return the header that refuses a write to a task which has another revision by now."""
    return {} if revision is None else {"If-Match": f'"{revision}"'}


def _known(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that are not None."""
    return {name: value for name, value in values.items() if value is not None}


def _as_line(prediction: ServedPrediction) -> dict[str, Any]:
    """Return a prediction as a line of a file holds it; a problem as its sentence."""
    known = _known(vars(prediction))
    return known | {"answer": prediction.answer} | ({"problem": str(prediction.problem)} if prediction.problem else {})


def _settled(read: Callable[[], InfoT], ends: Collection[str], failure: str, timeout: float, sentence: str) -> InfoT:
    """Read again and again until the state is one of ``ends``.

    Raises:
        UserError: If the state is ``failed``, with the reason; ``failure`` is its code where none is known.
        MachineError: With the sentence, when the time is up.
    """
    for _ in _pauses(timeout, sentence):
        info = read()
        if info.state == "failed":
            raise error_of(info.problem or {"code": failure})
        if info.state in ends:
            return info
    raise AssertionError("pauses end with an error")


def _pauses(timeout: float, sentence: str) -> Iterator[None]:
    """Yield at once and after ever longer pauses.

    Raises:
        MachineError: With the sentence, when the time is up.
    """
    end, pause = time.monotonic() + timeout, FIRST_PAUSE
    while True:
        yield
        if time.monotonic() + pause > end:
            raise MachineError(sentence)
        time.sleep(pause)
        pause = min(1.5 * pause, LONGEST_PAUSE)
