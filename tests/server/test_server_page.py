"""The page of the server and the container file say what is so: limits, and a command that the command line takes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from typer.main import get_command

from manyicl.cli.main import app
from manyicl.server.connections import HEADER_SECONDS, READ_SECONDS
from manyicl.server.listening import MOST_CONCURRENT
from manyicl.server.routes.parameters import MOST_IN_PAGE
from manyicl.server.settings import MIB, ServerSettings
from tests.documents import DOCS, ROOT


def test_the_limits_on_the_page_are_those_of_the_settings() -> None:
    known = ServerSettings(model="builtin:nano", data=Path())
    in_flight = f"all bodies together {known.max_bytes_in_flight // MIB} MiB"
    at_once = f"on {MOST_CONCURRENT:,} connections at a time; further ones are answered with 503"
    limits = {
        "Headers of a request": f"within {HEADER_SECONDS:g} s, {at_once}",
        "Body of a request": f"{known.max_body_bytes // MIB} MiB, within {known.body_seconds:g} s; {in_flight}",
        "Rows of a request": f"{known.max_rows:,}",
        "Rows of a job": f"{known.max_job_rows:,}",
        "Demonstrations of a task": f"{known.max_demonstrations:,}",
        "Characters of these": f"{known.max_task_characters:,}",
        "A template, a description": f"{known.max_template_characters:,} characters",
        "Rendering the rows of a request": f"{known.render_seconds:g} s",
        "Rows that wait for the model": f"{known.max_waiting_rows:,}",
        "Waiting for an answer": f"{known.request_seconds:g} s",
        "Reading an answer": f"some of it every {READ_SECONDS:g} s",
        "Items of a page of a list": f"{MOST_IN_PAGE:,}",
    }
    text = (DOCS / "server.md").read_text(encoding="utf-8")
    section = text.partition("\n## Limits\n")[2].partition("\n## ")[0]
    written = dict(re.findall(r"^\| (.+?) \| (.+) \|$", section, re.MULTILINE))
    assert limits == {limit: value for limit, value in written.items() if limit in limits}
    assert f"the {known.request_seconds:g} s that a request waits" in text
    assert f"its results stay for {known.kept_days:g} days" in text


def test_the_container_runs_a_command_that_exists() -> None:
    lines = dict(
        re.findall(r"^(ENTRYPOINT|CMD) (\[.*\])$", (ROOT / "Containerfile").read_text(encoding="utf-8"), re.MULTILINE)
    )
    assert json.loads(lines["ENTRYPOINT"]) == ["manyicl"]
    name, *rest = json.loads(lines["CMD"])
    command: Any = get_command(app)
    command.commands[name].make_context(name, rest)


def test_the_container_installs_what_the_project_has() -> None:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE)
    assert copied
    assert all((ROOT / name).exists() for names in copied for name in names.split())
    extras = re.search(r"/source\[([\w,]+)\]", text)
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))
