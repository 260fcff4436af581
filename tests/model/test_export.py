"""One plain folder: it answers as the model did, in any engine, and is there whole or not at all."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from manyicl.engine.backend import Sampling
from manyicl.engine.engine import Engine
from manyicl.episodes.budget import DEFAULT_MAX_ANSWER_TOKENS
from manyicl.episodes.chat_template import ChatTemplate
from manyicl.episodes.encoding import Encoder
from manyicl.errors import MachineError, UserError
from manyicl.model import export, prompt_guide
from manyicl.model.export import export_model
from manyicl.model.load import LoadedModel, load_model
from manyicl.model.manifest import Manifest
from manyicl.tasks.files import load_task
from manyicl.tasks.task import Query
from tests.builders import byte_level_bpe, make_task, sentencepiece_bpe, tiny_loaded, unigram
from tests.documents import DOCS
from tests.episodes.chat_templates import FAMILIES
from tests.model.exports import FORMAT, adapter_logits, logits, save_adapter, save_model

# peft 0.21 asks transformers 5.23 for a property by its deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

TOKENS = torch.arange(3, 43)[None]


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("base"), use_cache=False)


@pytest.fixture(name="adapter", scope="module")
def _adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter"), base)


@pytest.fixture(name="exported", scope="module")
def _exported(tmp_path_factory: pytest.TempPathFactory, adapter: Path) -> Path:
    return export_model(str(adapter), tmp_path_factory.mktemp("exported") / "model", merge=True).folder


def plain(folder: Path, attention: str = "eager", dtype: str = "float32") -> PreTrainedModel:
    """Load as somebody without this package would."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, attn_implementation=attention
    )
    model.eval()
    return model


# What it answers


@pytest.mark.parametrize(
    ("tied", "key_heads", "attention"),
    [
        (False, 1, "eager"),
        (True, 1, "sdpa"),
        (True, 2, "eager"),
        (False, 2, "sdpa"),
        (True, 4, "eager"),
        (False, 4, "sdpa"),
    ],
)
def test_plain_transformers_answers_as_the_unmerged_adapter_does(
    tmp_path: Path, tied: bool, key_heads: int, attention: str
) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=tied, num_key_value_heads=key_heads)
    adapter = save_adapter(tmp_path / "adapter", base)
    wanted = adapter_logits(adapter, TOKENS)
    done = export_model(str(adapter), tmp_path / "out", merge=True)
    model = plain(done.folder, attention)
    assert (logits(plain(base), TOKENS) - wanted).abs().max() > 0.1
    torch.testing.assert_close(logits(model, TOKENS), wanted, rtol=0, atol=5e-6)
    assert model.config.tie_word_embeddings is tied
    assert ("lm_head.weight" in load_file(done.folder / "model.safetensors")) is not tied


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "gemma2", "gemma3_text"])
def test_windows_and_caps_stay_as_they_were(tmp_path: Path, architecture: str) -> None:
    adapter = save_adapter(tmp_path / "adapter", save_model(tmp_path / "base", architecture))
    wanted = adapter_logits(adapter, TOKENS)
    export_model(str(adapter), tmp_path / "out", merge=True)
    torch.testing.assert_close(logits(plain(tmp_path / "out"), TOKENS), wanted, rtol=0, atol=3e-5)


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ["q_proj", "embed_tokens"], ["lm_head", "embed_tokens"]])
def test_an_update_of_a_tied_head_does_not_reach_the_embeddings(tmp_path: Path, targets: list[str]) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=targets)
    with pytest.warns(UserWarning, match="ensure_weight_tying"):
        wanted = adapter_logits(adapter, TOKENS)
    done = export_model(str(adapter), tmp_path / "out", merge=True)
    model = plain(done.folder)
    torch.testing.assert_close(logits(model, TOKENS), wanted, rtol=0, atol=5e-6)
    assert model.config.tie_word_embeddings is False
    assert load_model(str(done.folder)).model.config.tie_word_embeddings is False


def test_layers_that_were_trained_whole_are_taken_over(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=False)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    wanted = adapter_logits(adapter, TOKENS)
    export_model(str(adapter), tmp_path / "out", merge=True)
    torch.testing.assert_close(logits(plain(tmp_path / "out"), TOKENS), wanted, rtol=0, atol=5e-6)


def test_the_engine_scores_every_label_the_same_merged_and_unmerged(adapter: Path, exported: Path) -> None:
    task = make_task(labels=("good", "bad", "good or bad", "a good film"), instruction="good or bad?")
    queries = [example.query for example in task.test]
    found = []
    for folder in (adapter, exported):
        engine = Engine.from_pretrained(str(folder))
        prefix = engine.prefill(task, task.demonstrations(6, seed=0), queries)
        found.append(list(engine.predict(prefix, queries, scores="all")))
    assert [one.answer for one in found[0]] == [one.answer for one in found[1]]
    for one, other in zip(*found, strict=True):
        assert one.scores is not None
        assert other.scores is not None
        wanted = dict(one.scores.log_probabilities)
        assert dict(other.scores.log_probabilities) == pytest.approx(wanted, rel=0, abs=2e-5)


@pytest.mark.parametrize("sampling", [None, Sampling(seed=3)])
def test_the_engine_writes_the_same_free_answers_merged_and_unmerged(
    adapter: Path, exported: Path, sampling: Sampling | None
) -> None:
    task = make_task(labels=None, family="generation", metric="exact_match", max_answer_tokens=8)
    queries = [example.query for example in task.test]
    found = []
    for folder in (adapter, exported):
        engine = Engine.from_pretrained(str(folder))
        prefix = engine.prefill(task, task.demonstrations(6, seed=0), queries)
        found.append(list(engine.predict(prefix, queries, sampling=sampling)))
    for one, other in zip(*found, strict=True):
        assert (one.answer, one.stopped) == (other.answer, other.stopped)
        assert one.log_probability == pytest.approx(other.log_probability, rel=0, abs=5e-5)
    # A random model repeats itself unless it is sampled.
    assert sampling is None or len({one.answer for one in found[0]}) > 10


# What stands in the folder


def test_the_folder_is_plain(base: Path, exported: Path) -> None:
    assert json.loads((base / "config.json").read_text(encoding="utf-8"))["use_cache"] is False
    assert {path.name for path in exported.iterdir()} == {
        "PROMPT.md",
        "prompt.json",
        "config.json",
        "generation_config.json",
        "manyicl.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    for name in ("config.json", "generation_config.json"):
        text = (exported / name).read_text(encoding="utf-8")
        assert json.loads(text)["use_cache"] is True
        assert "attn" not in text
        assert "manyicl" not in text
        assert "peft" not in text
    assert [path.name for path in exported.parent.iterdir()] == [exported.name]


@pytest.mark.skipif(sys.platform == "win32", reason="permissions are those of POSIX")
def test_whoever_may_read_the_configuration_may_read_the_weights(exported: Path) -> None:
    modes = {stat.S_IMODE(path.stat().st_mode) for path in exported.iterdir()}
    assert len(modes) == 1


def test_the_manifest_is_kept_and_no_base_is_needed(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    kept = Manifest.read(adapter)
    export_model(str(adapter), tmp_path / "out", merge=True)
    shutil.rmtree(base)
    shutil.rmtree(adapter)
    engine = Engine.from_pretrained(str(tmp_path / "out"))
    assert engine.manifest == kept
    assert engine.encoder.format == FORMAT
    assert engine.trained_context_tokens == 256


def test_a_model_without_a_manifest_gets_none(tmp_path: Path, base: Path) -> None:
    export_model(str(base), tmp_path / "out")
    assert load_model(str(tmp_path / "out")).manifest is None
    assert not json.loads((tmp_path / "out" / "prompt.json").read_text(encoding="utf-8"))["fine_tuned"]


# Precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_full_model_is_written_as_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    model = save_model(tmp_path / "model", dtype=dtype)
    done = export_model(str(model), tmp_path / "out", merge=True)
    before, after = load_file(model / "model.safetensors"), load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, weights in before.items():
        assert after[name].dtype == dtype
        assert torch.equal(after[name], weights)
    assert done.adapter_effect is None
    assert not done.rounded
    assert done.logit_change < 1e-5
    assert "No weight was changed" in done.precision
    assert plain(tmp_path / "out", dtype="auto").dtype == dtype


def test_a_file_that_holds_more_than_its_configuration_says_is_not_rounded(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    (model / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    done = export_model(str(model), tmp_path / "out")
    assert done.dtype == "float32"
    assert torch.equal(*(load_file(folder / "model.safetensors")["lm_head.weight"] for folder in (model, done.folder)))
    assert json.loads((done.folder / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_a_full_model_can_be_rounded(tmp_path: Path, base: Path) -> None:
    done = export_model(str(base), tmp_path / "out", dtype="bfloat16")
    exact, rounded = load_file(base / "model.safetensors"), load_file(done.folder / "model.safetensors")
    assert all(torch.equal(rounded[name], weights.bfloat16()) for name, weights in exact.items())
    assert done.rounded
    assert "rounded to bfloat16" in done.precision


def test_a_merge_is_rounded_once_from_float32(tmp_path: Path, adapter: Path, exported: Path) -> None:
    done = export_model(str(adapter), tmp_path / "out", merge=True, dtype="bfloat16")
    exact, rounded = load_file(exported / "model.safetensors"), load_file(done.folder / "model.safetensors")
    assert all(torch.equal(rounded[name], weights.bfloat16()) for name, weights in exact.items())
    model = plain(done.folder, dtype="auto")
    assert model.dtype == torch.bfloat16
    # The change that is told is that of the rounded weights, computed in float32.
    change = (logits(plain(done.folder), TOKENS) - adapter_logits(adapter, TOKENS)).abs().max()
    assert done.rounded
    assert 0.1 * done.logit_change < change < 10 * done.logit_change
    assert "then rounded to bfloat16" in done.precision


def test_an_adapter_is_saved_as_its_base_is(tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", dtype=torch.bfloat16)
    adapter = save_adapter(tmp_path / "adapter", base, dtype="bfloat16")
    done = export_model(str(adapter), tmp_path / "out", merge=True)
    assert (done.dtype, done.rounded) == ("bfloat16", True)
    exact = export_model(str(adapter), tmp_path / "exact", merge=True, dtype="float32")
    assert not exact.rounded
    assert exact.logit_change < 1e-5 < 1e-3 < done.logit_change
    wanted = adapter_logits(adapter, TOKENS)
    torch.testing.assert_close(logits(plain(exact.folder), TOKENS), wanted, rtol=0, atol=5e-6)


def test_weights_that_do_not_fit_a_dtype_are_refused(tmp_path: Path) -> None:
    model = save_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = 1e6
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"'model.norm.weight' does not fit float16; nothing was written. Use bfloat16"):
        export_model(str(model), tmp_path / "out", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


# Whole or not at all


def test_an_empty_folder_is_taken_and_a_link_followed(tmp_path: Path, base: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    (tmp_path / "link").symlink_to(place)
    export_model(str(base), tmp_path / "link")
    assert (place / "model.safetensors").is_file()
    assert (tmp_path / "link").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "place"]


def test_what_stands_in_the_output_is_left_alone(tmp_path: Path, base: Path) -> None:
    (tmp_path / "note.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="not empty"):
        export_model(str(base), tmp_path)
    with pytest.raises(UserError, match="is a file"):
        export_model(str(base), tmp_path / "note.txt")
    with pytest.raises(UserError, match="not empty"):
        export_model(str(base), base)
    assert (tmp_path / "note.txt").read_text(encoding="utf-8") == "mine"


@pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failure_half_way_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path, failure: BaseException
) -> None:
    def fail(*_: object) -> str:
        raise failure

    monkeypatch.setattr(export, "write_guide", fail)
    with pytest.raises(type(failure)):
        export_model(str(base), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_appears_in_the_output_meanwhile_is_not_replaced(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    def meanwhile(*_: object) -> str:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "note.txt").write_text("mine", encoding="utf-8")
        return ""

    monkeypatch.setattr(export, "write_guide", meanwhile)
    with pytest.raises(OSError, match="not empty"):
        export_model(str(base), tmp_path / "out")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "note.txt"]


def test_weights_that_read_back_as_others_are_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    save = export._save

    def damage(model: PreTrainedModel, tokenizer: object, part: Path) -> None:
        save(model, tokenizer, part)  # type: ignore[arg-type]
        weights = load_file(part / "model.safetensors")
        weights["model.norm.weight"][3] += 1e-3
        save_file(weights, part / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(export, "_save", damage)
    with pytest.raises(MachineError, match="read back as others"):
        export_model(str(base), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_that_reads_back_as_another_is_not_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, base: Path
) -> None:
    save = export._save

    def damage(model: PreTrainedModel, tokenizer: object, part: Path) -> None:
        save(model, tokenizer, part)  # type: ignore[arg-type]
        path = part / "tokenizer.json"
        description = json.loads(path.read_text(encoding="utf-8"))
        description["model"]["merges"] = []
        path.write_text(json.dumps(description), encoding="utf-8")

    monkeypatch.setattr(export, "_save", damage)
    with pytest.raises(MachineError, match="encodes differently"):
        export_model(str(base), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# Refusals


def test_an_adapter_is_refused_without_merge(tmp_path: Path, adapter: Path) -> None:
    with pytest.raises(UserError, match=r"is an adapter. Give --merge to write it and its base as one model\."):
        export_model(str(adapter), tmp_path / "out")


def test_an_unknown_dtype_is_refused(tmp_path: Path, base: Path) -> None:
    with pytest.raises(UserError, match=r"float32, bfloat16, float16, found 'bfloat1'\. Did you mean 'bfloat16'"):
        export_model(str(base), tmp_path / "out", dtype="bfloat1")


@pytest.mark.filterwarnings("ignore")  # peft warns of just this
def test_a_merge_that_changes_the_answers_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = save_model(tmp_path / "base", tie_word_embeddings=True)
    adapter = save_adapter(tmp_path / "adapter", base, target_modules=["lm_head"])
    # As peft alone would do it.
    monkeypatch.setattr(export, "merge_adapter", lambda adapter: adapter.merge_and_unload())
    with pytest.raises(UserError, match="answers differently once it is merged"):
        export_model(str(adapter), tmp_path / "out", merge=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]


def test_an_adapter_that_peft_cannot_merge_is_refused(tmp_path: Path, base: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, lora_bias=True, target_modules=["q_proj"])
    with pytest.raises(UserError, match="cannot be merged: impossible to merge LoRA with `lora_bias=True`"):
        export_model(str(adapter), tmp_path / "out", merge=True)


def test_an_adapter_without_weights_of_layers_is_refused(tmp_path: Path, base: Path) -> None:
    tokenizer, model = byte_level_bpe(), plain(base)
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    get_peft_model(model, settings).save_pretrained(str(tmp_path / "adapter"))
    tokenizer.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(UserError, match="is of the kind PROMPT_TUNING, which has no weights to merge"):
        export_model(str(tmp_path / "adapter"), tmp_path / "out", merge=True)


def test_an_adapter_that_transformers_put_into_the_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = tiny_loaded()
    loaded.model.add_adapter(LoraConfig(target_modules=["q_proj"]))  # type: ignore[no-untyped-call,unused-ignore]
    monkeypatch.setattr(export, "load_model", lambda *_, **__: loaded)
    monkeypatch.setattr(export, "resolve_reference", lambda reference: reference)
    with pytest.raises(UserError, match="is an adapter that is not a local folder"):
        export_model("hf:owner/adapter", tmp_path / "out")


def test_a_quantized_model_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path / "base") / "config.json"
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    config = {**json.loads(path.read_text(encoding="utf-8")), "quantization_config": quantization}
    path.write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(UserError, match="are quantized") as refused:
        export_model(str(tmp_path / "base"), tmp_path / "out")
    assert refused.value.code == "quantized_weights"
    assert not (tmp_path / "out").exists()


def test_rotary_frequencies_of_an_adapter_keep_their_precision(adapter: Path) -> None:
    """In bfloat16 they would misplace tokens by whole turns in long texts."""
    loaded = load_model(adapter, dtype="bfloat16", device="cpu").model
    assert {weights.dtype for weights in loaded.parameters()} == {torch.bfloat16}
    assert {values.dtype for name, values in loaded.named_buffers() if "inv_freq" in name} == {torch.float32}


# PROMPT.md and prompt.json


def blocks(page: str, language: str) -> Iterator[str]:
    yield from re.findall(rf"```{language}\n(.*?)\n```", page, flags=re.DOTALL)


def facts_of(loaded: LoadedModel) -> dict[str, Any]:
    text_format = loaded.manifest.text_format if loaded.manifest else None
    facts = prompt_guide.ExportFacts("model", "float32", "Nothing happened.", 512)
    return prompt_guide.prompt_facts(Encoder(loaded.tokenizer, text_format), loaded.manifest, facts)


def test_the_guide_names_the_limit_of_the_engine() -> None:
    assert prompt_guide.MAX_ANSWER_TOKENS == DEFAULT_MAX_ANSWER_TOKENS


def test_the_segments_of_the_guide_are_those_of_the_saved_format(exported: Path) -> None:
    facts = json.loads((exported / "prompt.json").read_text(encoding="utf-8"))
    assert facts["example"]["segments"] == [
        "Is the review good or bad?\n\n",
        "a fine film\n= ",
        "good\n\n",
        "never again\n= ",
        "bad\n\n",
        "the music was fine\n= ",
    ]
    assert facts["request"]["prompt"] == facts["example"]["text"] == "".join(facts["example"]["segments"])
    assert facts["request"]["stop"] == facts["stop"]["stop"] == ["\n\n"]
    assert (facts["request"]["temperature"], facts["request"]["max_tokens"]) == (0, 64)
    assert (facts["max_context_tokens"], facts["max_trained_shots"], facts["num_positions"]) == (256, 7, 512)
    assert (facts["model"], facts["dtype"], facts["fine_tuned"]) == ("model", "float32", True)
    assert facts["precision"].startswith("The adapter was merged")


def test_the_page_names_every_fact_and_no_other(exported: Path) -> None:
    page = (exported / "PROMPT.md").read_text(encoding="utf-8")
    facts = json.loads((exported / "prompt.json").read_text(encoding="utf-8"))
    assert {name for name in facts if f"`{name}`" not in page} == {"format_version", "model", "versions"}
    for name in re.findall(r"`(?:example|special_tokens|text_format)\.(\w+)`", page):
        known = {**facts["example"], **facts["special_tokens"], "messages": 1, "trimmed": 1}
        assert name in known
    [command] = blocks(page, "bash")
    assert shlex.split(command)[:3] == ["vllm", "serve", "."]


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, sentencepiece_bpe, unigram])
@pytest.mark.parametrize("num_shots", [32, 0])
def test_the_code_of_the_guide_makes_the_ids_that_the_engine_uses(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    make_tokenizer: Callable[[], PreTrainedTokenizerFast],
    num_shots: int,
) -> None:
    tokenizer = make_tokenizer()
    base = save_model(tmp_path / "base", tokenizer=tokenizer, max_position_embeddings=1024)
    adapter = save_adapter(tmp_path / "adapter", base, tokenizer)
    export_model(str(adapter), tmp_path / "one-model", merge=True)
    rows = "".join(f"the film {i} was fine,{('good', 'bad')[i % 2]}\n" for i in range(50))
    (tmp_path / "one-model" / "tickets.csv").write_text("text,label\n" + rows, encoding="utf-8")
    [code] = blocks((tmp_path / "one-model" / "PROMPT.md").read_text(encoding="utf-8"), "python")
    # Without demonstrations and instruction the query opens the sequence, and is encoded otherwise.
    asked = code.replace("demonstrations(32,", f"demonstrations({num_shots},")
    assert (asked == code) is (num_shots == 32)
    monkeypatch.chdir(tmp_path / "one-model")
    exec(compile(asked, "PROMPT.md", "exec"), {})
    body = json.loads(capsys.readouterr().out)

    engine = Engine.from_pretrained(str(tmp_path / "one-model"))
    task = load_task("tickets.csv:text:label")
    query = task.query({"text": "I lost my card"})
    prefix = engine.prefill(task, task.demonstrations(num_shots, seed=0), [query])
    assert (prefix.num_shots, prefix.num_dropped) == (num_shots, 0)
    (encoded,) = engine.encode_queries(task, [query], after_shots=num_shots > 0)
    assert body["prompt"] == [*prefix.token_ids, *encoded.token_ids]
    assert body["model"] == "one-model"
    assert body["stop"] == [FORMAT.end_of_answer]


def test_the_code_of_the_page_on_other_engines_answers_as_the_engine(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, exported: Path
) -> None:
    [code] = blocks((DOCS / "other_engines.md").read_text(encoding="utf-8"), "python")
    (tmp_path / "exported").mkdir()
    (tmp_path / "exported" / "one-model").symlink_to(exported)
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "other_engines.md", "exec"), {})
    written = capsys.readouterr().out.strip()

    engine = Engine.from_pretrained(str(exported))
    changes: dict[str, Any] = {"labels": None, "family": "qa", "metric": "exact_match", "max_answer_tokens": 64}
    examples = prompt_guide.DEMONSTRATIONS
    task = make_task(train=examples, test=(), instruction=prompt_guide.INSTRUCTION, **changes)
    (prediction,) = engine.predict(engine.prefill(task, examples), [prompt_guide.QUERY])
    assert written
    assert written == prediction.answer.strip()


def test_the_example_of_the_guide_is_encoded_as_the_engine_does() -> None:
    loaded = tiny_loaded(tokenizer=sentencepiece_bpe())
    encoder = Encoder(loaded.tokenizer)
    examples = prompt_guide.DEMONSTRATIONS
    task = make_task(train=examples, test=(), instruction=prompt_guide.INSTRUCTION)
    engine = Engine.local(loaded)
    query = Query(prompt_guide.QUERY)
    prefix = engine.prefill(task, examples, [query])
    (encoded,) = engine.encode_queries(task, [query])
    wanted = (*prefix.token_ids, *encoded.token_ids)
    assert prompt_guide.example_prompt(encoder)[1] == wanted
    assert facts_of(loaded)["example"]["token_ids"] == wanted


def test_the_guide_says_who_adds_which_special_tokens() -> None:
    assert facts_of(tiny_loaded(tokenizer=sentencepiece_bpe()))["special_tokens"] == {
        "tokenizer_adds": ["<s>"],
        "manyicl_adds": ["<s>"],
    }
    assert facts_of(tiny_loaded())["special_tokens"] == {"tokenizer_adds": [], "manyicl_adds": []}
    tokenizer = sentencepiece_bpe()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    adds = facts_of(tiny_loaded(tokenizer=tokenizer))["special_tokens"]
    assert adds == {"tokenizer_adds": ["<s>", "</s>"], "manyicl_adds": ["<s>"]}


def test_the_guide_says_whether_text_and_segments_give_the_same_ids() -> None:
    example = facts_of(tiny_loaded())["example"]
    assert list(example["token_ids"]) == example["text_token_ids"]
    tokenizer = byte_level_bpe()
    # One token for the two bytes where the end of an answer meets the query after it.
    joined = [*tokenizer.backend_tokenizer.encode("\n").tokens, *tokenizer.backend_tokenizer.encode("n").tokens]
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    description["model"]["vocab"]["".join(joined)] = len(description["model"]["vocab"])
    description["model"]["merges"].insert(0, joined)
    description["pre_tokenizer"]["use_regex"] = False
    seam = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(description)), eos_token="</s>")
    example = facts_of(tiny_loaded(tokenizer=seam))["example"]
    assert list(example["token_ids"]) != example["text_token_ids"] == seam(example["text"])["input_ids"]


@pytest.mark.parametrize("name", ["Llama 3.1 with a fixed date", "Gemma 2", "Llama 2", "Mistral Small 3"])
def test_the_guide_of_a_chat_model_asks_by_messages_that_its_template_turns_into_the_same_text(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    manifest = Manifest(max_context_tokens=256, text_format=ChatTemplate(tokenizer, family.arguments).extract())
    facts = facts_of(replace(tiny_loaded(tokenizer=tokenizer), manifest=manifest))
    body = facts["request"]
    arguments = body.get("chat_template_kwargs", {})
    assert arguments == family.arguments
    served = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True, **arguments)
    assert served == facts["example"]["text"] == "".join(facts["example"]["segments"])
    assert body["stop_token_ids"] == [tokenizer.eos_token_id if "Llama" in name else ids_of_end(tokenizer, manifest)]


def ids_of_end(tokenizer: PreTrainedTokenizerFast, manifest: Manifest) -> int:
    found = tokenizer.convert_tokens_to_ids(manifest.text_format.end_of_answer)
    assert isinstance(found, int)
    return found
