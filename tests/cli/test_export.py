"""The command: what it prints, where it writes, and one sentence for what cannot be exported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM

from manyicl.model import export
from tests.cli.test_predict import run
from tests.model.exports import adapter_logits, logits, save_adapter, save_model

# peft 0.21 asks transformers 5.23 for a property by its deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"))


@pytest.fixture(name="adapter", scope="module")
def _adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


def test_an_adapter_becomes_one_folder_and_the_command_says_what_it_cost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "exported" / "one-model"
    arguments = ["export", "--model", adapter, "--merge", "--output", output, "--dtype", "float32"]
    assert run(monkeypatch, *arguments) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == f"44,384 parameters in float32 are in {output}."
    assert "merged into its base in float32; no weight was rounded after" in printed[1]
    assert printed[2] == f"How to send a prompt: {output / 'PROMPT.md'}"
    token_ids = torch.arange(3, 43)[None]
    model = AutoModelForCausalLM.from_pretrained(str(output))
    torch.testing.assert_close(logits(model, token_ids), adapter_logits(adapter, token_ids), rtol=0, atol=5e-6)


def test_a_full_model_needs_no_merge_and_keeps_its_dtype(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = save_model(tmp_path / "model", dtype=torch.bfloat16)
    assert run(monkeypatch, "export", "--model", model, "-o", tmp_path / "out") == 0
    assert "in bfloat16" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"--merge": None}, "is an adapter. Give --merge"),
        ({"--dtype": "int8"}, "expected float32, bfloat16, float16, found 'int8'"),
        ({"--model": "runs/nowhere"}, "The model folder 'runs/nowhere' does not exist"),
        ({"--model": "builtin:mano"}, "builtin:nano"),
        ({"--output": "taken"}, "the output is not empty. Give a new or an empty folder"),
        ({"--output": "taken/note.txt"}, "the output is a file; expected a folder"),
        ({"--output": None}, "--output"),
    ],
)
def test_a_mistake_ends_with_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    adapter: Path,
    tmp_path: Path,
    changes: dict[str, str | None],
    sentence: str,
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "note.txt").write_text("mine", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    options: dict[str, object] = {"--model": adapter, "--output": "out", "--merge": "", **changes}
    given = {option: value for option, value in options.items() if value is not None}
    flat = [part for option, value in given.items() for part in (option, value) if part != ""]
    assert run(monkeypatch, "export", *flat) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["note.txt", "taken"]


def test_a_full_disk_ends_with_exit_code_1_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_save", fail)
    assert run(monkeypatch, "export", "--model", base, "--output", tmp_path / "out") == 1
    printed = capsys.readouterr().err
    assert "no space left on device" in printed
    assert "Traceback" not in printed
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_weight_writer_is_one_of_the_machine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: Path, tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(export, "_save", fail)
    assert run(monkeypatch, "export", "--model", base, "--output", tmp_path / "out") == 1
    assert "The weights cannot be written" in capsys.readouterr().err
