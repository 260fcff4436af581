"""`manyicl serve` as a process: what it refuses, that it answers, drains, comes back, and keeps to its document."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from typer.testing import CliRunner

from manyicl.cli.main import app
from manyicl.errors import UserError
from manyicl.server.database import data_folder

MODEL = "builtin:nano"
ROOT = Path(__file__).parent.parent.parent
# The packaged model knows few words.
THINGS = {
    "name": "things",
    "task": {"labels": "from_train"},
    "demonstrations": [
        {"query": "a red hat", "answer": "hat"},
        {"query": "the blue lamp", "answer": "lamp"},
        {"query": "a white lamp", "answer": "lamp"},
        {"query": "the pink hat", "answer": "hat"},
    ],
}
START_SECONDS = 120


def refusal(*arguments: str) -> UserError:
    """Run the command in this process, and return why it is refused; no model is loaded before."""
    result = CliRunner().invoke(app, ["serve", "--model", MODEL, "--port", "0", *arguments])
    assert isinstance(result.exception, UserError), result.output
    return result.exception


def test_an_address_that_others_reach_is_refused_without_keys(tmp_path: Path) -> None:
    for options in (("--host", "0.0.0.0"), ("--host", "::"), ("--require-keys",), ("--allow-host", "tasks.example")):
        error = refusal("--data", str(tmp_path / "data"), *options)
        assert (error.code, "manyicl keys create" in str(error)) == ("keys_needed", True)


def test_a_second_server_on_a_data_folder_is_refused(tmp_path: Path) -> None:
    with data_folder(tmp_path / "data"):
        assert refusal("--data", str(tmp_path / "data")).code == "data_in_use"


def test_an_address_that_is_taken_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        error = refusal("--data", str(tmp_path / "data"), "--port", str(taken.getsockname()[1]))
    assert (error.code, error.field) == ("cannot_listen", "--port")
    assert not (tmp_path / "data").exists()


def test_a_model_that_does_not_exist_is_refused_before_the_folder_is_made(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["serve", "--model", "builtin:nothing", "--data", str(tmp_path / "data")])
    assert isinstance(result.exception, UserError)
    assert not (tmp_path / "data").exists()


class Running:
    """A server that runs in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], url: str, log: Path) -> None:
        self.process, self.url, self.log = process, url, log
        self.client = httpx.Client(base_url=url, timeout=120, trust_env=False)

    def stop(self) -> int:
        """Send SIGTERM, and return the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)

    def metric(self, name: str) -> float:
        """Return a number of the metrics."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(line.split()[-1]) for line in lines if line.startswith(f"{name} "))


@contextmanager
def serving(data: Path, *options: str, key: str | None = None) -> Iterator[Running]:
    """Run a server on a free port of loopback."""
    log = data.parent / "log"
    command = [sys.executable, "-m", "manyicl", "serve", "--model", MODEL, "--data", str(data), "--port", "0", *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    with log.open("a") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert "answers on" in line, log.read_text()
        server = Running(process, line.split()[-1], log)
        if key is not None:
            server.client.headers["Authorization"] = f"Bearer {key}"
        with server.client:
            yield server
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def predicted(server: Running, texts: list[str], **options: Any) -> list[dict[str, Any]]:
    body = {"rows": [{"query": text} for text in texts], "scores": "all", **options}
    answer = server.client.post("/v1/tasks/things/predict", json=body)
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["predictions"]
    return found


@pytest.mark.server
def test_a_server_drains_at_sigterm_and_answers_alike_when_it_comes_back(tmp_path: Path) -> None:
    data = tmp_path / "data"
    texts = ["a blue hat", "the red lamp"]
    lines = "".join(json.dumps({"query": f"a {color} hat"}) + "\n" for color in ("red", "blue", "pink") * 200)
    with serving(data, "--drain-seconds", "60") as server:
        assert server.client.post("/v1/tasks", json=THINGS).status_code == 201
        first = predicted(server, texts)
        assert [one["answer"] for one in first] == ["hat", "lamp"]
        answers: list[httpx.Response] = []

        def ask() -> None:
            headers = {"Content-Type": "application/x-ndjson"}
            answers.append(server.client.post("/v1/tasks/things/predict", content=lines, headers=headers))

        asking = threading.Thread(target=ask)
        asking.start()
        while server.metric("manyicl_worker_num_waiting_rows") == 0 and asking.is_alive():
            time.sleep(0.005)
        assert server.stop() == 0
        asking.join()
        found = [json.loads(line) for line in answers[0].text.splitlines()]
        assert [one["answer"] for one in found] == ["hat"] * 600, "the request in progress was answered whole"
        with pytest.raises(httpx.TransportError):
            server.client.get("/healthz")
    with serving(data) as server:
        task = server.client.get("/v1/tasks/things").json()
        assert (task["state"], task["ready_version"]) == ("ready", 1)
        again = predicted(server, texts)
        assert [one["scores"] for one in again] == [pytest.approx(one["scores"], abs=1e-4) for one in first]
        assert server.metric("manyicl_prefixes_num_loaded_total") == 1, "its prefix came from the disk"


@pytest.mark.server
def test_a_task_says_that_its_prefix_was_damaged_and_computed_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(data) as server:
        assert server.client.post("/v1/tasks", json=THINGS).status_code == 201
        first = predicted(server, ["a blue hat"])
        assert not server.client.get("/v1/tasks/things").json()["prefix"]["rebuilt"]
        assert server.stop() == 0
    (file,) = (data / "prefixes").rglob("*.segment")
    content = bytearray(file.read_bytes())
    content[-1] ^= 255
    file.write_bytes(content)
    with serving(data) as server:
        again = predicted(server, ["a blue hat"])
        assert server.client.get("/v1/tasks/things").json()["prefix"]["rebuilt"]
        assert server.metric("manyicl_prefixes_num_damaged_total") == 1
    assert again[0]["scores"] == pytest.approx(first[0]["scores"], abs=1e-4)


@pytest.mark.server
def test_what_a_server_has_no_time_for_at_sigterm_is_not_written_after_it_gave_the_folder_up(tmp_path: Path) -> None:
    data = tmp_path / "data"
    # A quarter of a second a row.
    slow = "{{ ('<>' * 30000) | striptags }}{{ query }}"
    with serving(data, "--drain-seconds", "1") as server:
        rows = [{"query": str(number), "answer": "hat"} for number in range(8)]
        body = {"name": "slow", "task": {"query": slow}, "demonstrations": rows}
        assert server.client.post("/v1/tasks", json=body).status_code == 201

        def add() -> None:
            with suppress(httpx.HTTPError), httpx.Client(base_url=server.url, timeout=60) as client:
                client.post("/v1/tasks/slow/demonstrations", json={"demonstrations": [{"query": "x", "answer": "y"}]})

        adding = [threading.Thread(target=add) for _ in range(20)]
        for thread in adding:
            thread.start()
        while server.client.get("/v1/tasks/slow").json()["version"] < 2:
            time.sleep(0.05)
        started = time.monotonic()
        assert server.stop() == 0
        assert time.monotonic() - started < 30
        for thread in adding:
            thread.join()


@pytest.mark.server
def test_versions_of_another_model_are_compiled_again_and_readyz_says_how_many(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(data) as server:
        assert server.client.post("/v1/tasks", json=THINGS).status_code == 201
        predicted(server, ["a hat"])
        model = server.client.get("/v1/tasks/things").json()["model"]
        assert server.stop() == 0
    with serving(data, "--max-context-tokens", "200") as server:
        assert predicted(server, ["a hat"])[0]["answer"] == "hat"
        readiness = server.client.get("/readyz")
        assert (readiness.status_code, readiness.json()["status"]) == (200, "ready")
        assert (readiness.json()["num_versions_to_compile"], readiness.json()["num_versions_compiled"]) == (1, 1)
        assert server.client.get("/v1/tasks/things").json()["model"] not in (None, model)


@pytest.mark.server
def test_a_client_that_goes_away_leaves_no_rows_to_answer(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        assert server.client.post("/v1/tasks", json=THINGS).status_code == 201
        predicted(server, ["a hat"])
        address = server.url.removeprefix("http://").split(":")
        body = json.dumps({"rows": [{"query": "a hat"}] * 5000}).encode()
        head = f"POST /v1/tasks/things/predict HTTP/1.1\r\nHost: {':'.join(address)}\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        with socket.create_connection((address[0], int(address[1]))) as connection:
            connection.sendall(head.encode() + body)
            while server.metric("manyicl_worker_num_waiting_rows") == 0:
                time.sleep(0.005)
        deadline = time.monotonic() + 20
        while server.metric("manyicl_worker_num_waiting_rows") or server.metric("manyicl_requests_in_flight") > 1:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert server.metric("manyicl_worker_num_rows_answered_total") < 5000
        assert '"status": 499' in server.log.read_text()


@pytest.mark.server
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("knows_a_task", [False, True])
def test_schemathesis_finds_no_failure_and_nothing_undocumented(tmp_path: Path, knows_a_task: bool) -> None:
    """With names that it makes up, and with those of a task and a job that exist."""
    data, checks = (
        tmp_path / "data",
        (
            *(
                "not_a_server_error",
                "status_code_conformance",
                "content_type_conformance",
                "response_headers_conformance",
            ),
            *(
                "response_schema_conformance",
                "allow_header_conformance",
                "unsupported_method",
                "missing_required_header",
            ),
            "ignored_auth",
        ),
    )
    keys = [sys.executable, "-m", "manyicl", "keys", "create", "--data", str(data), "--owner", "ann", "--name", "all"]
    output = subprocess.run(keys, check=True, capture_output=True, text=True).stdout
    key = next(word for word in output.split() if word.startswith("mk_"))
    with serving(data, key=key) as server:
        task = server.client.post("/v1/tasks", json=THINGS).json()["id"]
        job = server.client.post("/v1/jobs", json={"task": task, "rows": [{"query": "a hat"}]}).json()["id"]
        known = {"task": task, "model": task, "job": job, "number": 1, "version": 1} if knows_a_task else {}
        settings = "".join(f"{name} = {json.dumps(value)}\n" for name, value in known.items())
        (tmp_path / "schemathesis.toml").write_text(f"[parameters]\n{settings}")
        command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(tmp_path / "schemathesis.toml")]
        command += ["run", f"{server.url}/openapi.json", "--no-color", "--header", f"Authorization: Bearer {key}"]
        command += ["--checks", ",".join(checks), "--max-examples", "20", "--seed", "1", "--continue-on-failure"]
        command += ["--suppress-health-check", "all", "--warnings", "off"]
        if knows_a_task:
            command += ["--exclude-name", "DELETE /v1/tasks/{task}"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert result.returncode == 0, result.stdout[-20_000:]
        assert server.client.get("/healthz").status_code == 200
        assert "unexpected_error" not in server.log.read_text()
