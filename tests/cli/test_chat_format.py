"""--format asks a model in turns of its own chat template, and is refused where it means nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from manyicl.evaluation.result import ResultStore
from manyicl.model.manifest import Manifest
from tests.cli.test_predict import run
from tests.episodes.chat_templates import FAMILIES
from tests.training.test_chat_training import instruct_model


@pytest.fixture(name="instruct", scope="module")
def _instruct(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return instruct_model(tmp_path_factory.mktemp("instruct"), "Llama 3")


def test_show_draws_the_turns_with_the_end_of_each_answer_supervised(
    monkeypatch: pytest.MonkeyPatch, instruct: Path, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["tasks", "show", f"{table}:text:label", "--shots", "2", "--model", str(instruct), "--format", "chat"]
    assert run(monkeypatch, *argv) == 0
    shown = capsys.readouterr().out
    assert shown.count("<|start_header_id|>user<|end_header_id|>") == 3
    assert "«good<|eot_id|>»" in shown or "«bad<|eot_id|>»" in shown


def test_an_instruct_model_is_evaluated_in_its_turns_and_the_record_says_so(
    monkeypatch: pytest.MonkeyPatch, instruct: Path, table: Path, tmp_path: Path
) -> None:
    argv = ["evaluate", "--model", str(instruct), "--tasks", f"{table}:text:label", "--queries", "2", "--seeds", "1"]
    for kind in ("plain", "chat"):
        out = tmp_path / kind
        assert run(monkeypatch, *argv, "--shots", "0,2", "--output", str(out), "--format", kind) == 0
        assert {result.text_format["kind"] for result in ResultStore(out).load()} == {kind}
    plain, chat = (ResultStore(tmp_path / kind).load()[0].prompt_hash for kind in ("plain", "chat"))
    assert plain != chat


def test_a_compiled_task_is_asked_in_the_format_it_was_compiled_in(
    monkeypatch: pytest.MonkeyPatch, instruct: Path, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, out = tmp_path / "t.prefix", tmp_path / "out.jsonl"
    task = f"{table}:text:label"
    model = ["--model", str(instruct)]
    assert (
        run(monkeypatch, "compile", *model, "--task", task, "--shots", "4", "--output", str(prefix), "--format", "chat")
        == 0
    )
    ask = ["predict", *model, "--prefix", str(prefix), "--input", str(table), "--output", str(out)]
    capsys.readouterr()
    assert run(monkeypatch, *ask) == 2
    error = capsys.readouterr().err
    assert "the prefix was made with another text format; expected plain, found chat. Give --format chat, or" in error
    assert run(monkeypatch, *ask, "--format", "chat") == 0
    assert len([json.loads(line) for line in out.read_text("utf-8").splitlines()]) == 40


def test_a_fine_tuned_model_is_asked_as_it_was_taught(
    monkeypatch: pytest.MonkeyPatch, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    taught = instruct_model(tmp_path / "taught", "Llama 3")
    Manifest(max_context_tokens=300).write(taught)
    argv = ["tasks", "check", f"{table}:text:label", "--model", str(taught), "--format"]
    assert run(monkeypatch, *argv, "chat") == 2
    assert "fine-tuned in another format; expected plain, found format chat. Leave it out." in capsys.readouterr().err
    assert run(monkeypatch, *argv, "plain") == 0


def test_a_template_that_cannot_be_used_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch, table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    thinking = instruct_model(tmp_path / "thinking", "Qwen3")
    argv = ["tasks", "check", f"{table}:text:label", "--model", str(thinking), "--format", "chat"]
    assert run(monkeypatch, *argv) == 2
    error = capsys.readouterr().err
    assert "think block is in some turns and not in others" in error
    assert "Traceback" not in error


def test_a_format_without_a_model_means_nothing(
    monkeypatch: pytest.MonkeyPatch, table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("show", "check"):
        assert run(monkeypatch, "tasks", command, f"{table}:text:label", "--format", "chat") == 2
        assert "--format and --end-of-answer belong to a model" in capsys.readouterr().err


def test_families_are_named_in_the_documentation_as_the_tests_find_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "method.md").read_text("utf-8")
    section = page[page.index("### Turns of a chat") : page.index("### Inspecting it")]
    refused = section[: section.index("Two things are resolved")]
    for name in ("Qwen3", "DeepSeek-R1", "Granite 3", "Llama 3.1"):
        assert FAMILIES[name].refused is not None
        assert name in refused
    for name in ("Gemma 2", "Mistral v0.1"):
        assert FAMILIES[name].first_turn
        assert name in section[section.index("Two things are resolved") :]


def test_the_end_of_an_answer_is_taken_from_the_command_line_by_all_commands_that_ask_a_model(
    monkeypatch: pytest.MonkeyPatch, instruct: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"text": f"film {i}", "label": ("good", "not\n\ngood")[i % 2]} for i in range(30)]
    table = tmp_path / "t.jsonl"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    task, end = f"{table}:text:label", ["--end-of-answer", "<|eot_id|>"]
    model = ["--model", str(instruct)]
    prefix, results, answers = tmp_path / "t.prefix", tmp_path / "results", tmp_path / "answers.jsonl"
    commands = [
        ["tasks", "check", task, *model],
        ["tasks", "show", task, *model],
        ["compile", *model, "--task", task, "--shots", "4", "--output", str(prefix)],
        ["predict", *model, "--prefix", str(prefix), "--input", str(table), "--output", str(answers)],
        [
            "evaluate",
            *model,
            "--tasks",
            task,
            "--queries",
            "2",
            "--seeds",
            "1",
            "--shots",
            "2",
            "--output",
            str(results),
        ],
        ["export", *model, "--output", str(tmp_path / "exported")],
    ]
    for command in commands:
        if command[0] not in ("predict", "export"):
            assert run(monkeypatch, *command) == 2
            assert "contain the end-of-answer text" in capsys.readouterr().err
        assert run(monkeypatch, *command, *end) == 0, command
    assert ResultStore(results).load()[0].text_format["end_of_answer"] == "<|eot_id|>"
    assert "<|eot_id|>" in (tmp_path / "exported" / "prompt.json").read_text("utf-8")
    assert len(answers.read_text("utf-8").splitlines()) == 30
    assert run(monkeypatch, "tasks", "show", task, *end) == 2
    assert "--end-of-answer belong to a model" in capsys.readouterr().err
