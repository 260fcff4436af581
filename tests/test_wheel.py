"""The built wheel works in an empty environment, without the checkout.

`pytest -m slow tests/test_wheel.py` builds it and installs it with the pinned versions, which takes minutes and needs
what pip needs: a registry, or a full cache.
"""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import httpx
import pytest

from manyicl.model.pretrained import BASES
from tests.documents import ROOT

MINUTES = 60
PREDICT = ["predict", "--model", "builtin:one", "--task", "tables/tickets/train.csv:text:team", "--shots", "8"]
PREDICT += ["--input", "new.csv", "--output", "answers.csv"]


def done(command: list[str | Path], folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command away from the checkout, with nothing of this environment but what pip is told."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run(
        list(map(str, command)), cwd=folder, env={**kept, **environment}, capture_output=True, text=True, check=False
    )


def must(command: list[str | Path], folder: Path, **environment: str) -> str:
    ended = done(command, folder, **environment)
    assert ended.returncode == 0, (command, ended.stdout, ended.stderr)
    return ended.stdout


@pytest.fixture(name="wheel", scope="module")
def _wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy of what is tracked, so that no file that only this checkout has gets into the wheel.
    must(["git", "-C", ROOT, "checkout-index", "--all", f"--prefix={folder}/source/"], folder)
    must([sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, folder / "source"], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(name="scripts", scope="module")
def _scripts(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the commands of an environment that has the wheel and its dependencies, as pinned."""
    folder = tmp_path_factory.mktemp("environment")
    must([sys.executable, "-m", "venv", folder / "venv"], folder)
    scripts = folder / "venv" / "bin"
    must([scripts / "python", "-m", "pip", "install", "--constraint", ROOT / "constraints.txt", wheel], folder)
    return scripts


def write_table_and_queries(scripts: Path, folder: Path) -> None:
    must([scripts / "manyicl", "tasks", "starter", "tables"], folder)
    (folder / "new.csv").write_text("text\nI was charged twice\nThe parcel never came\n", encoding="utf-8")


pytestmark = [pytest.mark.slow, pytest.mark.timeout(30 * MINUTES)]


def test_the_wheel_holds_adapter_card_templates_and_starter_tables(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    wanted = [
        *(f"model/one/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "manyicl.json")),
        "model/one/README.md",
        "model/prompt_page.md",
        *(f"evaluation/report/{name}" for name in ("report.html", "comparison.html", "style.css")),
        "cli/quickstart.yaml",
        "server/migrations/env.py",
        "server/migrations/versions/v0001_first_tables.py",
        "tasks/catalog/classification/trec/task.yaml",
        *(f"tasks/starter/{task}/task.yaml" for task in ("tickets", "titles", "urgency")),
        *(
            f"tasks/starter/{task}/{side}.csv"
            for task in ("tickets", "titles", "urgency")
            for side in ("train", "test")
        ),
    ]
    assert not [name for name in wanted if f"manyicl/{name}" not in names]


def test_without_the_base_each_command_refuses_in_one_sentence(scripts: Path, tmp_path: Path) -> None:
    assert "Fetch a pretrained base" in must([scripts / "manyicl", "models", "get", "--help"], tmp_path)
    write_table_and_queries(scripts, tmp_path)
    # A registry that no machine has, so that the refusal is the same with and without a network.
    nowhere = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    empty = {"MANYICL_CACHE": str(tmp_path / "cache"), "PIP_CONFIG_FILE": os.devnull}
    get = done([scripts / "manyicl", "models", "get", "smollm2"], tmp_path, **nowhere, **empty)
    predict = done([scripts / "manyicl", *PREDICT], tmp_path, **empty)
    for ended, code in ((get, "cannot be downloaded"), (predict, "manyicl models get smollm2")):
        assert ended.returncode == 2
        (sentence,) = [line for line in ended.stderr.splitlines() if line.startswith("error ")]
        assert code in sentence
        assert "Traceback" not in ended.stderr


def test_the_one_model_answers_a_table(scripts: Path, tmp_path: Path) -> None:
    if not BASES["smollm2"].is_here:
        pytest.skip("builtin:smollm2 is not on this machine: manyicl models get smollm2")
    write_table_and_queries(scripts, tmp_path)
    must([scripts / "manyicl", *PREDICT], tmp_path, MANYICL_CACHE=str(BASES["smollm2"].folder.parent))
    with (tmp_path / "answers.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == ["I was charged twice", "The parcel never came"]
    assert {row["answer"] for row in rows} <= {"billing", "delivery", "repairs", "app", "advice"}


def test_the_server_runs_from_the_wheel(scripts: Path, wheel: Path, tmp_path: Path) -> None:
    constraints = ROOT / "constraints.txt"
    must([scripts / "python", "-m", "pip", "install", "--constraint", constraints, f"{wheel}[server]"], tmp_path)
    answer_from_a_new_server(scripts, tmp_path)


def answer_from_a_new_server(scripts: Path, folder: Path) -> None:
    """Start a server, make a task, and let it answer."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    command = [scripts / "manyicl", "serve", "--model", "builtin:nano", "--data", folder / "data", "--port", "0"]
    rows = [{"query": "a red hat", "answer": "hat"}, {"query": "the blue lamp", "answer": "lamp"}]
    task = {"name": "things", "task": {"labels": "from_train"}, "demonstrations": rows}
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            list(map(str, command)), cwd=folder, env=kept, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert server.stdout is not None
    try:
        line = server.stdout.readline()
        assert "answers on" in line, (folder / "log").read_text()
        with httpx.Client(base_url=line.split()[-1], timeout=120, trust_env=False) as client:
            assert client.post("/v1/tasks", json=task).status_code == 201
            found = client.post("/v1/tasks/things/predict", json={"rows": [{"query": "a lamp"}]})
            assert found.json()["predictions"][0]["answer"] == "lamp"
        server.terminate()
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.stdout.close()
