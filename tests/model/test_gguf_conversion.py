"""A .gguf file becomes the model it was made from, tokenizer included; what is not known of it is refused."""

from __future__ import annotations

import random
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from manyicl.errors import MachineError, UserError
from manyicl.model import gguf_conversion
from manyicl.model.gguf_conversion import converted_folder
from manyicl.model.load import load_model, load_tokenizer, model_config
from tests.builders import TEXTS, byte_level_bpe
from tests.model.exports import logits, save_adapter
from tests.model.gguf_files import TEMPLATE, entries, gguf_library, tiny_base, write_gguf

gguf_library()

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(name="kept", autouse=True)
def _kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MANYICL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _theta(value: float) -> dict[str, object]:
    return {"rope_type": "default", "rope_theta": value}


@pytest.mark.parametrize("tied", [True, False], ids=["tied head", "head of its own"])
@pytest.mark.parametrize("architecture", gguf_conversion.ARCHITECTURES)
def test_a_file_in_float32_is_the_model_it_was_made_from(tmp_path: Path, architecture: str, tied: bool) -> None:
    model = tiny_base(architecture, tie_word_embeddings=tied, rms_norm_eps=1e-5, rope_parameters=_theta(50_000.0))
    file = write_gguf(tmp_path / "tiny.gguf", model)
    loaded = load_model(str(file), device="cpu")
    token_ids = torch.randint(3, 90, (1, 40))
    torch.testing.assert_close(logits(loaded.model, token_ids), logits(model, token_ids), rtol=0, atol=1e-5)
    for name, weights in model.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weights), name
    config = model_config(str(file))
    assert (config.rms_norm_eps, config.rope_parameters["rope_theta"]) == (1e-5, 50_000.0)
    assert loaded.reference == str(file)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_1", "Q4_0"])
def test_quantized_weights_are_what_transformers_reads_from_the_file(tmp_path: Path, quantization: str) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base(), quantization=quantization)
    theirs = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name, dtype=torch.float32)
    ours = load_model(str(file), device="cpu").model.state_dict()
    assert all(torch.equal(ours[name], weights) for name, weights in theirs.state_dict().items())


def test_the_tokenizer_writes_the_same_tokens_and_brings_control_tokens_and_chat_template(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base())
    tokenizer, original = load_tokenizer(str(file)), byte_level_bpe()
    for text in [*TEXTS, "\n\n12  3\t x</s>", "a<s>b"]:
        assert tokenizer(text)["input_ids"] == original(text)["input_ids"]
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == ("<s>", "</s>", None)
    assert tokenizer.chat_template == TEMPLATE


def test_a_bos_token_is_added_where_the_file_says_so(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base(), metadata={"tokenizer.ggml.add_bos_token": True})
    assert load_tokenizer(str(file))("a")["input_ids"][0] == 1


@pytest.mark.parametrize(
    ("split", "digits"), [("gpt-2", ["Ċ", "Ċ", "1", "2"]), ("smollm", ["ĊĊ", "1", "2"]), ("qwen2", ["ĊĊ", "1", "2"])]
)
def test_text_is_split_as_the_name_of_the_split_says(tmp_path: Path, split: str, digits: list[str]) -> None:
    backend = byte_level_bpe()
    tokens = backend.convert_ids_to_tokens(list(range(len(backend))))
    merged = {
        "tokenizer.ggml.pre": split,
        # The last tokens of the vocabulary give way to a blank line.
        "tokenizer.ggml.tokens": [*tokens[:-1], "ĊĊ"],
        "tokenizer.ggml.merges": ["Ċ Ċ"],
    }
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base(), metadata=merged)
    tokenizer = load_tokenizer(str(file))
    assert tokenizer.tokenize("\n\n12") == digits


def test_the_split_of_qwen2_is_that_of_transformers(tmp_path: Path) -> None:
    model = tiny_base("qwen2")
    file = write_gguf(tmp_path / "tiny.gguf", model, metadata={"tokenizer.ggml.pre": "qwen2"})
    theirs = AutoTokenizer.from_pretrained(str(tmp_path), gguf_file=file.name, trust_remote_code=False)
    tokenizer = load_tokenizer(str(file))
    for text in [*TEXTS, "\n\n12  3\t x", "don't  DON'T\r\n\r\n  x 1234 ½"]:
        assert tokenizer(text)["input_ids"] == theirs(text)["input_ids"], text


def test_a_file_is_converted_once_and_said_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kept: Path
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base())
    folder = converted_folder(file)
    assert f"tiny.gguf is converted once: 0 MB in {folder}" in capsys.readouterr().err
    assert entries(kept) == [folder.name]
    monkeypatch.setattr(gguf_conversion.GgufFile, "write", lambda *_: pytest.fail("converted again"))
    assert converted_folder(file) == folder
    # The content counts, not the name.
    assert converted_folder(file.rename(tmp_path / "other.gguf")) == folder
    assert capsys.readouterr().err == ""


def test_an_adapter_over_a_gguf_file_loads(tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base(), quantization="Q8_0")
    adapter = save_adapter(tmp_path / "adapter", converted_folder(file))
    manifest = (adapter / "manyicl.json").read_text(encoding="utf-8")
    (adapter / "manyicl.json").write_text(manifest.replace(str(converted_folder(file)), str(file)), encoding="utf-8")
    loaded = load_model(str(adapter), device="cpu")
    assert loaded.manifest is not None
    assert loaded.manifest.base == str(file)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "architecture": ({"architecture": "gemma"}, "unsupported_gguf", "gemma"),
    "experts": ({"metadata": {"llama.expert_count": 4}}, "unsupported_gguf", "llama.expert_count"),
    "rope scaling": ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "unsupported_gguf", "rope.scaling.type"),
    "partial rope": ({"metadata": {"llama.rope.dimension_count": 8}}, "unsupported_gguf", "rope.dimension_count"),
    "heads per layer": ({"metadata": {"llama.attention.head_count": [4, 4, 2]}}, "unsupported_gguf", "head_count"),
    "sentencepiece": ({"metadata": {"tokenizer.ggml.model": "llama"}}, "unsupported_gguf", "tokenizer"),
    "unknown split": ({"metadata": {"tokenizer.ggml.pre": "falcon"}}, "unsupported_gguf", "falcon"),
    "missing tensor": ({"leave_out": "blk.1.attn_q.weight"}, "unsupported_gguf", "blk.1.attn_q.weight"),
    "other shape": ({"metadata": {"llama.feed_forward_length": 128}}, "unsupported_gguf", "(128, 64)"),
    "a tensor too many": ({"metadata": {"llama.block_count": 2}}, "unsupported_gguf", "blk.2."),
    "no context length": ({"metadata": {"llama.context_length": None}}, "broken_gguf", "llama.context_length"),
    "no tokens": ({"metadata": {"tokenizer.ggml.tokens": None}}, "broken_gguf", "tokenizer.ggml.tokens"),
}


@pytest.mark.parametrize(("changes", "code", "part"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_known_of_a_file_is_refused(
    tmp_path: Path, kept: Path, changes: dict[str, Any], code: str, part: str
) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base(), **changes)
    with pytest.raises(UserError) as refused:
        load_tokenizer(str(file))
    assert (refused.value.code, str(refused.value.file)) == (code, str(file))
    assert part in str(refused.value)
    assert entries(kept) == []


def test_damaged_files_end_in_one_sentence(tmp_path: Path, kept: Path) -> None:
    whole = write_gguf(tmp_path / "tiny.gguf", tiny_base()).read_bytes()
    rng = random.Random(0)
    damaged = [b"", b"GGUF", b"no gguf at all, but some text", *(whole[: rng.randrange(len(whole))] for _ in range(12))]
    for _ in range(25):
        place = rng.randrange(3000)
        damaged.append(whole[:place] + rng.randbytes(8) + whole[place + 8 :])
    sentences = []
    for number, content in enumerate(damaged):
        file = tmp_path / f"{number}.gguf"
        file.write_bytes(content)
        with suppress(UserError):
            converted_folder(file)
            continue
        with pytest.raises(UserError) as refused:
            converted_folder(file)
        sentences.append((refused.value.code, str(refused.value)))
    assert {code for code, _ in sentences} <= {"broken_gguf", "unsupported_gguf"}
    assert not any("\n" in sentence for _, sentence in sentences)
    assert len(sentences) >= 15
    assert len(entries(kept)) == len(damaged) - len(sentences)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_model(str(tmp_path / "none.gguf"))
    assert refused.value.code == "file_not_readable"


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", tiny_base())
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1))
    with pytest.raises(MachineError, match="has 0 MB free"):
        converted_folder(file)
    assert entries(kept) == []
