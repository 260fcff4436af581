"""The worked example of docs/server.md, run as it stands there against a server with the tiny model."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.documents import DOCS, ROOT, blocks

pytestmark = pytest.mark.server
PAGE = (DOCS / "server.md").read_text(encoding="utf-8")
EXAMPLE = PAGE.partition("\n## A worked example\n")[2].partition("\n## ")[0]
URL = "http://127.0.0.1:8000"
SCRIPTS = f'manyicl() {{ {sys.executable} -m manyicl "$@"; }}\n'


@pytest.fixture(name="url")
def _url(tmp_path: Path) -> Iterator[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [
        sys.executable,
        "-m",
        "manyicl",
        "serve",
        "--model",
        "builtin:nano",
        "--data",
        "server-data",
        "--port",
        "0",
    ]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    assert server.stdout is not None
    try:
        found = re.fullmatch(r"builtin:nano answers on (http://\S+)\n", server.stdout.readline())
        assert found is not None, (tmp_path / "log").read_text()
        yield found[1]
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
        server.stdout.close()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_worked_example_works_as_it_is_written(url: str, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    outputs = []
    for block in blocks(EXAMPLE):
        text = block.text.replace(URL, url)
        if block.language == "sh":
            command = ["bash", "-euc", SCRIPTS + text]
        elif block.language == "python":
            command = [sys.executable, "-W", "error", "-c", text]
        else:
            continue
        ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
        assert ran.returncode == 0, ran.stderr
        assert "urn:manyicl:error" not in ran.stdout, ran.stdout
        outputs.append(ran.stdout)
    assert len(outputs) > 8
    everything = "\n".join(outputs)
    for expected in (
        '"answer":"romin"',
        '"change":"restored"',
        '"accuracy":',
        '"kind":"predict"',
        "'corrected'",
        "romin 0.",
    ):
        assert expected in everything, everything
