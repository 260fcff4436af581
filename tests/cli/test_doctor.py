"""What the doctor says, for people and for programs, here and on machines that are not here."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from manyicl.cli.main import main
from tests.machines import H100, T4, pretend
from tests.training.recipes import TEXT

ROOT = Path(__file__).parents[2]
RECIPES = [*sorted((ROOT / "recipes").glob("*.yaml")), *sorted((ROOT / "recipes" / "real").glob("*.yaml"))]
LLAMA = ROOT / "recipes" / "llama3_8b.yaml"
NANO = ROOT / "recipes" / "nano.yaml"
EVERYTHING = ("--set", "model.quantize=4bit", "--set", "model.attention=flash", "--set", "training.liger=true")


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*arguments: object) -> None:
        pytest.fail("the doctor uses no network")

    monkeypatch.setattr(socket.socket, "connect", connect)


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run the command as a shell would, and return its exit code."""
    monkeypatch.setattr("sys.argv", ["manyicl", "doctor", *map(str, arguments)])
    try:
        main()
    except SystemExit as leave:
        return int(leave.code or 0)
    return 0


def doctored(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert run(monkeypatch, *arguments, "--json") == 0
    return json.loads(capsys.readouterr().out)


def test_the_machine_is_described_in_lines_that_can_be_pasted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert run(monkeypatch) == 0
    text = capsys.readouterr().out
    for name in ("system", "cores", "memory", "GPU", "CUDA", "bfloat16", "libraries", "optional", "Hub"):
        assert f"\n  {name} " in text
    assert "token set" in text
    assert "secret" not in text
    assert text.isascii()


def test_json_parses_and_holds_no_token(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = doctored(monkeypatch, capsys)
    assert found["recipe"] is None
    assert found["machine"]["hub_token"] is True
    assert found["machine"]["libraries"]["transformers"]
    assert "secret" not in json.dumps(found)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_can_be_doctored(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    here = doctored(monkeypatch, capsys, path)["recipe"]
    assert here["device"]
    assert here["num_threads"] >= 1


def test_all_that_stands_in_the_way_is_said_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretend(monkeypatch, gpus=(), cuda=None, libraries={})
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("WORLD_SIZE", "3")
    (tmp_path / "runs" / "llama3_8b").mkdir(parents=True)
    (tmp_path / "runs" / "llama3_8b" / "thesis.txt").touch()
    refusals = doctored(monkeypatch, capsys, LLAMA, *EVERYTHING)["recipe"]["refusals"]
    for reason in (
        "model.quantize: 4bit needs",
        "model.attention: flash needs",
        "training.liger needs",
        "HF_HUB_OFFLINE",
        "recipes/real/train",
        "recipes/real/unseen",
        "3 processes share them",
        "is not empty",
    ):
        assert any(reason in refusal for refusal in refusals), reason


def test_where_everything_is_at_hand_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretend(monkeypatch, gpus=(H100, H100))
    monkeypatch.chdir(ROOT)
    changes = [*EVERYTHING, "--set", f"output={tmp_path / 'run'}"]
    here = doctored(monkeypatch, capsys, LLAMA, *changes)["recipe"]
    assert here["refusals"] == []
    assert here["device"] == "GPU, NVIDIA H100"
    assert here["adapter"] == "an adapter of rank 16 over the base in 4 bits"
    assert here["attention"].startswith("flash-attn")
    assert here["kernels"].startswith("Liger")
    assert any("One process uses one of 2 GPUs" in remark for remark in here["remarks"])
    assert run(monkeypatch, LLAMA, *changes) == 0
    assert "Nothing is known to be missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "refusal"),
    [
        (["model.base=nowhere"], "The model folder 'nowhere' does not exist"),
        (
            ["model.base=builtin:nan"],
            "No such model comes with manyicl; expected builtin:nano, "
            "builtin:one, builtin:smollm2, found 'builtin:nan'",
        ),
        (
            ["sequences.max_context_tokens=100000", "training.warmup_steps=0"],
            "sequences.max_context_tokens is 100,000; the model has",
        ),
    ],
)
def test_what_shows_without_reading_weights_is_refused(
    changes: list[str], refusal: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [part for change in changes for part in ("--set", change)]
    assert run(monkeypatch, NANO, *arguments) == 0
    assert refusal in capsys.readouterr().out


def test_slow_bfloat16_and_too_many_threads_are_remarked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretend(monkeypatch, gpus=(), cuda=None)
    monkeypatch.setattr("manyicl.model.machine.PROC", tmp_path)
    (tmp_path / "cpuinfo").write_text("flags : avx2\n", encoding="utf-8")
    changes = ("--set", "training.bf16=true", "--set", "training.num_threads=10000")
    remarks = doctored(monkeypatch, capsys, NANO, *changes)["recipe"]["remarks"]
    assert any("float32 is likely faster" in remark for remark in remarks)
    assert any("training.num_threads is 10000" in remark for remark in remarks)
    pretend(monkeypatch, gpus=(T4,))
    remarks = doctored(monkeypatch, capsys, NANO, *changes)["recipe"]["remarks"]
    assert any("emulates bfloat16" in remark for remark in remarks)


def test_a_driver_beside_a_torch_without_cuda_is_remarked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pretend(monkeypatch, gpus=(), cuda=None)
    monkeypatch.setattr("manyicl.model.machine.PROC", tmp_path)
    (tmp_path / "driver" / "nvidia").mkdir(parents=True)
    version = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  560.35  Fri Aug 16\n"
    (tmp_path / "driver" / "nvidia" / "version").write_text(version, encoding="utf-8")
    remarks = doctored(monkeypatch, capsys, NANO)["recipe"]["remarks"]
    assert any("driver (560.35) is here, but this torch is built without CUDA" in remark for remark in remarks)


def test_a_wrong_recipe_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT + "output: run\nlearning: 1\n", encoding="utf-8")
    assert run(monkeypatch, path) == 2
    assert "unknown key 'learning'" in capsys.readouterr().err
    assert run(monkeypatch, tmp_path / "nowhere.yaml") == 2
    assert run(monkeypatch, "--set", "output=x") == 2
    assert "Name the recipe" in capsys.readouterr().err
