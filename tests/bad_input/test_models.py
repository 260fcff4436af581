"""Mistakes in models, adapters, compiled tasks, and in what is asked of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyicl.model.manifest import Manifest
from tests.bad_input.case import Case, accepted, meet, table_of
from tests.bad_input.files import RECIPE, TRAIN, lines, recipe, spoilt, task, task_with
from tests.builders import word_level
from tests.model.exports import save_adapter, save_model

QUERIES = {"new.jsonl": lines({"text": "film 3"}, {"text": "play 4"})}
PREDICT = "predict --model m --task t --input new.jsonl --output answers.jsonl"
CHECK = "tasks check t --model m"
COMPILE = "compile --model m --task t --output t.prefix"
BASE = spoilt(RECIPE[: RECIPE.index("tasks:")], "model: {base: m}\n")
TRAINED = "train recipe.yaml"


@pytest.fixture(name="folders", scope="session")
def _folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model `m`, an adapter `a` over it, and `t.prefix`, a task compiled with it."""
    from manyicl.engine.engine import Engine
    from manyicl.tasks.files import load_task

    folder = tmp_path_factory.mktemp("models")
    Manifest(max_context_tokens=256).write(save_model(folder / "m"))
    save_adapter(folder / "a", folder / "m")
    for name, content in task(name="t").items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    engine = Engine.from_pretrained(str(folder / "m"))
    loaded = load_task(folder / "t")
    engine.save(engine.compile(loaded, loaded.demonstrations(4)), folder / "t.prefix")
    return folder


def changed(name: str, **values: Any) -> Callable[[Path], object]:
    """Put values into a JSON file."""

    def change(folder: Path) -> None:
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **values}), encoding="utf-8")

    return change


def written(name: str, content: str | bytes) -> Callable[[Path], object]:
    """Write over a file."""
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def without(*names: str) -> Callable[[Path], object]:
    """Remove files."""

    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def pickled(weights: str, name: str) -> Callable[[Path], object]:
    """Put a pickle in the place of weights."""

    def change(folder: Path) -> None:
        (folder / weights).unlink()
        (folder / name).write_bytes(b"PK")

    return change


def cut(name: str, num_bytes: int) -> Callable[[Path], object]:
    """Cut a file at its end."""

    def shorten(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:-num_bytes])

    return shorten


def flipped(name: str, place: int) -> Callable[[Path], object]:
    """Change one byte, counted from the end."""

    def flip(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[-place] ^= 1
        (folder / name).write_bytes(content)

    return flip


def other_weights(folder: Path) -> None:
    """Put another model in the place of `m`."""
    shutil.rmtree(folder / "m")
    save_model(folder / "m", "qwen2")


def of_words(*words: str) -> Callable[[Path], object]:
    """Give the model a tokenizer that knows these words and few others."""
    return lambda folder: word_level(words).save_pretrained(folder / "m")


def adapter_of(base: str | None) -> Callable[[Path], object]:
    """Let the adapter name another base, or none."""

    def change(folder: Path) -> None:
        changed("a/adapter_config.json", base_model_name_or_path=base)(folder)
        (folder / "a" / "manyicl.json").unlink()

    return change


MODELS = [
    Case(
        "a model folder that does not exist",
        "predict --model mm --task t --input new.jsonl",
        ("The model folder 'mm' does not exist", "builtin:nano", "hf:owner/name"),
        QUERIES,
    ),
    Case(
        "no model at all",
        "predict --model '' --task t --input new.jsonl",
        ("The model folder '' does not exist",),
        QUERIES,
    ),
    Case(
        "a folder that holds no model",
        "predict --model t --task t --input new.jsonl",
        ("'t' holds neither config.json nor adapter_config.json",),
        QUERIES,
    ),
    Case(
        "a file for a model",
        "tasks check t --model new.jsonl",
        ("The model folder 'new.jsonl' does not exist",),
        QUERIES,
    ),
    Case(
        "a model that the package lacks",
        "tasks show t --model builtin:nan",
        ("No model 'builtin:nan'", "builtin:nano"),
        QUERIES,
    ),
    Case(
        "a model without weights",
        PREDICT,
        ("The model of 'm' cannot be loaded",),
        QUERIES,
        without("m/model.safetensors"),
    ),
    Case(
        "a model of pickles",
        PREDICT,
        ("'m' holds its weights in pytorch_model.bin alone; pickles are refused", "save_pretrained('m')"),
        QUERIES,
        pickled("m/model.safetensors", "m/pytorch_model.bin"),
    ),
    Case(
        "an adapter of pickles",
        spoilt("--model m", "--model a", PREDICT),
        ("'a' holds its weights in adapter_model.bin alone; pickles are refused", "peft."),
        QUERIES,
        pickled("a/adapter_model.safetensors", "a/adapter_model.bin"),
    ),
    Case(
        "weights that were never fetched",
        PREDICT,
        ("model.safetensors of 'm' is a Git LFS pointer", "`git lfs pull`"),
        QUERIES,
        written("m/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    Case(
        "weights that are cut",
        PREDICT,
        ("The model of 'm' cannot be loaded",),
        QUERIES,
        cut("m/model.safetensors", 1000),
    ),
    Case(
        "weights that lack tensors",
        PREDICT,
        ("The weights of 'm' lack", "tensors", "Restore the folder"),
        QUERIES,
        changed("m/config.json", num_hidden_layers=4),
    ),
    Case(
        "weights of another size",
        PREDICT,
        ("The weights of 'm' are not those of its config.json", "has the shape", "expected", "Restore the folder"),
        QUERIES,
        changed("m/config.json", hidden_size=64),
    ),
    Case("a configuration that is broken", PREDICT, ("'m' cannot be loaded",), QUERIES, written("m/config.json", "{")),
    Case(
        "a configuration of an unknown model",
        PREDICT,
        ("'m' cannot be loaded",),
        QUERIES,
        written("m/config.json", '{"model_type": "lama"}'),
    ),
    Case(
        "a model without a tokenizer",
        PREDICT,
        ("The tokenizer of 'm' cannot be loaded",),
        QUERIES,
        without("m/tokenizer.json", "m/tokenizer_config.json"),
    ),
    Case(
        "a tokenizer that is broken",
        CHECK,
        ("The tokenizer of 'm' cannot be loaded",),
        QUERIES,
        written("m/tokenizer.json", "{}"),
    ),
    Case(
        "a tokenizer that keeps no line breaks",
        CHECK,
        ("The tokenizer does not keep", "separator and terminator"),
        QUERIES,
        lambda folder: _without_line_breaks(folder / "m"),
    ),
    Case(
        "a tokenizer that does not know the labels",
        PREDICT,
        ("The tokenizer cannot tell the labels 'bad' and 'good'", "apart"),
        {**QUERIES, **task()},
        lambda folder: _of_numbers(folder / "m"),
    ),
    Case(
        "a tokenizer that does not know the answers",
        PREDICT,
        ("The tokenizer does not know the words of task 't': 8 of its first 8 answers", "Use a model whose tokenizer"),
        {
            **QUERIES,
            **task(
                spoilt("classification", "generation", task()["t/task.yaml"]),
                train=[{**row, "label": "zzz"} for row in TRAIN],
            ),
        },
        of_words("film", "play"),
    ),
    Case(
        "a model folder of another version",
        PREDICT,
        (
            "m/manyicl.json is not a manifest of this version",
            "format_version: Input should be 1, found 99",
            "Use the version that wrote the model",
        ),
        QUERIES,
        changed("m/manyicl.json", format_version=99),
    ),
    Case(
        "a model folder of a later version with a new field",
        CHECK,
        ("m/manyicl.json is not a manifest of this version", "retrieval"),
        QUERIES,
        changed("m/manyicl.json", retrieval=True),
    ),
    Case(
        "a manifest that is broken",
        PREDICT,
        ("m/manyicl.json is not a manifest of this version",),
        QUERIES,
        written("m/manyicl.json", '{"format'),
    ),
    Case(
        "a manifest in Latin-1",
        PREDICT,
        ("m/manyicl.json is not a manifest of this version",),
        QUERIES,
        written("m/manyicl.json", b"\xe4"),
    ),
    Case(
        "a context that the model does not have",
        f"{PREDICT} --max-context-tokens 5000",
        ("max_context_tokens is 5,000; 'm' allows 512 positions",),
        QUERIES,
    ),
    Case(
        "a context that no one counts",
        f"{PREDICT} --max-context-tokens {10**30}",
        ("max_context_tokens is 1,000,000", "'m' allows 512 positions"),
        QUERIES,
    ),
    Case(
        "a context too small for the query",
        f"{PREDICT} --max-context-tokens 3",
        ("new.jsonl:1: Query 1: ", "max_context_tokens is 3"),
        QUERIES,
        leaves=("answers.jsonl.part",),
    ),
    Case(
        "a precision that there is not",
        f"{PREDICT} --dtype float8",
        ("dtype is one of float32, bfloat16, float16; found 'float8'",),
        QUERIES,
    ),
    Case(
        "a device that there is not",
        f"{PREDICT} --device quantum",
        ("The device 'quantum' is not to be had here", "Use cpu"),
        QUERIES,
    ),
    Case(
        "an adapter over another base",
        "predict --model a --task t --input new.jsonl",
        ("The adapter 'a' was trained over a base with fingerprint", "Restore the base"),
        QUERIES,
        changed("a/manyicl.json", base_fingerprint="0" * 64),
    ),
    Case(
        "an adapter whose base is gone",
        "predict --model a --task t --input new.jsonl",
        ("The model folder 'gone' does not exist",),
        QUERIES,
        changed("a/manyicl.json", base="gone"),
    ),
    Case(
        "an adapter that names no base",
        "predict --model a --task t --input new.jsonl",
        ("The adapter 'a' names no base model",),
        QUERIES,
        adapter_of(None),
    ),
    Case(
        "an adapter over an adapter",
        "predict --model a --task t --input new.jsonl",
        ("The adapter 'a' names 'a' as its base, which is an adapter itself",),
        QUERIES,
        adapter_of("a"),
    ),
    Case(
        "an adapter without weights",
        "predict --model a --task t --input new.jsonl",
        ("The adapter 'a' holds no adapter_model.safetensors; restore",),
        QUERIES,
        without("a/adapter_model.safetensors"),
    ),
    Case(
        "an adapter whose configuration is broken",
        "predict --model a --task t --input new.jsonl",
        ("The adapter configuration of 'a' cannot be loaded",),
        QUERIES,
        written("a/adapter_config.json", "["),
    ),
    Case(
        "an adapter whose configuration lacks its base",
        "predict --model a --task t --input new.jsonl",
        ("The adapter configuration of 'a' cannot be loaded", "base_model_name_or_path"),
        QUERIES,
        written("a/adapter_config.json", "{}"),
    ),
    Case(
        "an adapter whose weights are cut",
        "predict --model a --task t --input new.jsonl",
        ("The adapter of 'a' cannot be loaded",),
        QUERIES,
        cut("a/adapter_model.safetensors", 100),
    ),
    Case(
        "an export over what is there",
        "export --model m --output t",
        ("The output 't' is not empty; give a new or empty folder",),
    ),
    Case("an export to a file", "export --model m --output new.jsonl", ("The output 'new.jsonl' is a file",), QUERIES),
    Case("an export of an adapter alone", "export --model a --output e", ("'a' is an adapter; give --merge",)),
    Case(
        "an export in a precision that there is not",
        "export --model m --output e --dtype bf16",
        ("dtype is one of", "found 'bf16'. Did you mean 'bfloat16'?"),
    ),
    Case("an export below a file", "export --model m --output new.jsonl/e", ("new.jsonl",), QUERIES),
]

COMPILED = [
    Case(
        "a compiled task that does not exist",
        "predict --model m --prefix u.prefix --input new.jsonl",
        ("The compiled task 'u.prefix' does not exist; make it with `manyicl compile`",),
        QUERIES,
    ),
    Case(
        "a folder for a compiled task",
        "predict --model m --prefix t --input new.jsonl",
        ("'t' is a folder; expected a file written by `manyicl compile`",),
        QUERIES,
    ),
    Case(
        "another file for a compiled task",
        "predict --model m --prefix new.jsonl --input new.jsonl",
        ("'new.jsonl' is not a whole compiled task", "Compile it again"),
        QUERIES,
    ),
    Case(
        "weights for a compiled task",
        "predict --model m --prefix m/model.safetensors --input new.jsonl",
        ("is not a compiled task; expected a file written by `manyicl compile`",),
        QUERIES,
    ),
    Case(
        "an empty compiled task",
        "predict --model m --prefix t.prefix --input new.jsonl",
        ("'t.prefix' is not a whole compiled task", "Compile it again"),
        QUERIES,
        written("t.prefix", ""),
    ),
    Case(
        "a compiled task that is cut",
        "predict --model m --prefix t.prefix --input new.jsonl",
        ("'t.prefix' is not a whole compiled task",),
        QUERIES,
        cut("t.prefix", 10),
    ),
    Case(
        "a compiled task that was changed",
        "predict --model m --prefix t.prefix --input new.jsonl",
        ("'t.prefix' was altered after it was written",),
        QUERIES,
        flipped("t.prefix", 3),
    ),
    Case(
        "a compiled task of another model",
        "predict --model m --prefix t.prefix --input new.jsonl",
        ("'t.prefix' was compiled with another model", "compile the task again"),
        QUERIES,
        other_weights,
    ),
    Case(
        "a compiled task of another precision",
        "predict --model m --prefix t.prefix --input new.jsonl --dtype bfloat16",
        ("'t.prefix' was compiled in float32; the model is loaded in bfloat16",),
        QUERIES,
    ),
    Case(
        "a compiled task for an adapter of its model",
        "predict --model a --prefix t.prefix --input new.jsonl",
        ("'t.prefix' was compiled with another model",),
        QUERIES,
    ),
    Case(
        "a compiled task in a context too small",
        "predict --model m --prefix t.prefix --input new.jsonl --max-context-tokens 20",
        ("'t.prefix' holds", "max_context_tokens is 20", "fewer demonstrations"),
        QUERIES,
    ),
    Case(
        "a compiled task and a task",
        "predict --model m --task t --prefix t.prefix --input new.jsonl",
        ("Give either --task, or --prefix",),
        QUERIES,
    ),
    Case(
        "neither a compiled task nor a task",
        "predict --model m --input new.jsonl",
        ("Give either --task, or --prefix",),
        QUERIES,
    ),
    Case(
        "shots for a compiled task",
        "predict --model m --prefix t.prefix --shots 4 --input new.jsonl",
        ("--shots goes with --task",),
        QUERIES,
    ),
    Case(
        "a compiled task for a folder that is not there",
        "compile --model m --task t --output u/t.prefix",
        ("'u/t.prefix' cannot be written: expected a file name in a folder that exists",),
    ),
    Case(
        "a compiled task in the place of a folder", "compile --model m --task t --output t", ("'t' cannot be written",)
    ),
    Case(
        "a compiled task over another file",
        "compile --model m --task t --output new.jsonl",
        ("'new.jsonl' is there and no compiled task; give another name",),
        QUERIES,
    ),
    Case(
        "a compiled task of nothing",
        "compile --model m --task t --output u.prefix --shots 0",
        ("Task 't' has neither instruction nor demonstrations; nothing to compile",),
    ),
    Case(
        "more demonstrations than there are",
        "compile --model m --task t --output u.prefix --shots 500",
        ("Task 't' has 8 training examples; expected num_shots from 0 to 8, found 500. Use fewer shots or add rows",),
    ),
]

TRAINING = [
    Case(
        "a base that does not exist",
        TRAINED,
        ("The model folder 'mm' does not exist",),
        recipe(spoilt("base: m", "base: mm", BASE)),
    ),
    Case(
        "rows longer than the base can read",
        TRAINED,
        ("sequences.max_context_tokens is 5,000; the model has 512 positions. Use shorter sequences",),
        recipe(spoilt("max_context_tokens: 60", "max_context_tokens: 5000", BASE)),
    ),
    Case(
        "a context too small for one example",
        TRAINED,
        ("The shortest example of task 't' needs", "max_context_tokens is 8. Raise it or leave the task out"),
        recipe(spoilt("max_context_tokens: 60", "max_context_tokens: 8", BASE)),
    ),
    Case(
        "an example longer than the context, of a dry run",
        "train recipe.yaml --dry-run",
        ("The shortest example of task 't' needs",),
        recipe(BASE, train=[{"text": "film " * 900, "label": label} for label in ("good", "bad")]),
    ),
    Case(
        "an adapter over an adapter to be trained",
        TRAINED,
        ("model.base 'a' is an adapter itself", "leave out model.lora"),
        recipe(spoilt("{base: m}", "{base: a, lora: {rank: 2}}", BASE)),
    ),
    Case(
        "an adapter over layers that there are not",
        TRAINED,
        ("model.lora.target_modules: ['query']", "linear layers are ['down_proj'"),
        recipe(spoilt("{base: m}", "{base: m, lora: {target_modules: [query]}}", BASE)),
    ),
    Case(
        "a base of another version",
        TRAINED,
        ("m/manyicl.json is not a manifest of this version",),
        recipe(BASE),
        changed("m/manyicl.json", format_version=0),
    ),
    Case(
        "an architecture that there is not",
        TRAINED,
        ("model.from_scratch", "'lama'", "Did you mean 'llama'?"),
        recipe(spoilt("architecture: llama", "architecture: lama")),
    ),
    Case(
        "a shape that cannot be",
        TRAINED,
        ("model.from_scratch.config",),
        recipe(spoilt("num_attention_heads: 4", "num_attention_heads: 5")),
    ),
    Case(
        "a shape in words",
        TRAINED,
        ("model.from_scratch.config",),
        recipe(spoilt("hidden_size: 32", "hidden_size: large")),
    ),
    Case(
        "a shape of nothing",
        TRAINED,
        ("model.from_scratch: llama cannot be made with this config: ",),
        recipe(spoilt("hidden_size: 32", "hidden_size: 0")),
    ),
    Case(
        "a shape without heads",
        TRAINED,
        ("model.from_scratch", "modulo by zero."),
        recipe(spoilt("num_attention_heads: 4", "num_attention_heads: 0")),
    ),
    Case(
        "a function that there is not",
        TRAINED,
        ("model.from_scratch: llama cannot be made with this config: 'zzz'.",),
        recipe(spoilt("hidden_size: 32", "hidden_act: zzz, hidden_size: 32")),
    ),
    Case(
        "an unknown key of a shape",
        TRAINED,
        ("model.from_scratch.config", "'hiden_size'"),
        recipe(spoilt("hidden_size", "hiden_size")),
    ),
    Case(
        "a vocabulary too small for the words",
        TRAINED,
        ("The tokenizer cannot tell the labels 'bad' and 'good' of task 't' apart",),
        recipe(spoilt("vocabulary_size: 200", "vocabulary_size: 8")),
    ),
    Case(
        "an output that is a file",
        TRAINED,
        ("output 'run' is a file; expected a folder",),
        {**recipe(BASE), "run": "x"},
    ),
    Case(
        "an output that is a file, of a dry run",
        f"{TRAINED} --dry-run",
        ("output 'run' is a file; expected a folder",),
        {**recipe(BASE), "run": "x"},
    ),
    Case(
        "an output that holds something else, of a dry run",
        f"{TRAINED} --dry-run",
        ("output 'run' is not empty. Use another output",),
        {**recipe(BASE), "run/thesis.tex": "x"},
    ),
    Case(
        "this folder as the output of a dry run",
        f"{TRAINED} --dry-run --set output=.",
        ("output '.' is not empty. Use another output",),
        recipe(BASE),
    ),
    Case(
        "an output to be replaced that holds something else, of a dry run",
        f"{TRAINED} --dry-run --overwrite",
        ("output 'run' holds no run of manyicl",),
        {**recipe(BASE), "run/thesis.tex": "x"},
    ),
    accepted(
        "a dry run where a run has begun",
        f"{TRAINED} --dry-run",
        "Run: 2 steps",
        files={**recipe(BASE), "run/recipe.yaml": BASE, "run/manyicl.json": "{}"},
    ),
    Case(
        "an output below a file",
        f"{TRAINED} --set output=recipe.yaml/run",
        ("output 'recipe.yaml' is a file, so 'recipe.yaml/run' cannot stand below it; expected a folder",),
        recipe(BASE),
    ),
    Case(
        "an output with a name longer than any file system takes",
        f"{TRAINED} --set output={'x' * 300}",
        ("cannot be a folder: file name too long",),
        recipe(BASE),
    ),
    Case(
        "an output that holds something else",
        TRAINED,
        ("output 'run' is not empty. Use another output",),
        {**recipe(BASE), "run/thesis.tex": "x"},
    ),
    Case(
        "an output to be replaced that holds something else",
        f"{TRAINED} --overwrite",
        ("output 'run' holds no run of manyicl", "--overwrite leaves it alone"),
        {**recipe(BASE), "run/thesis.tex": "x"},
    ),
    Case(
        "an output that holds another run",
        TRAINED,
        ("output 'run' holds a run already. Use --resume to go on, --overwrite to start anew, or another output",),
        {**recipe(BASE), "run/recipe.yaml": BASE, "run/manyicl.json": "{}"},
    ),
    Case("going on where nothing was begun", f"{TRAINED} --resume", ("run",), recipe(BASE)),
    Case(
        "a held-out task that the base was trained on",
        TRAINED,
        ("tasks.evaluate: 'u' is not unseen: the base", "was trained on"),
        {
            **recipe(spoilt("{train: [t]}", "{train: [t], evaluate: [u]}", BASE)),
            **task(name="u", train=[{**row, "text": f"new {row['text']}"} for row in TRAIN]),
        },
        changed("m/manyicl.json", tasks=[{"name": "u", "family": "classification", "source": "u", "data_hash": "0"}]),
    ),
    Case(
        "a held-out task of one row",
        TRAINED,
        ("tasks.evaluate: 'u' has 1 training row",),
        {
            **recipe(spoilt("{train: [t]}", "{train: [t], evaluate: [u]}", BASE)),
            **task(spoilt("classification", "generation", task()["t/task.yaml"]), name="u", train=TRAIN[:1]),
        },
    ),
    Case(
        "a held-out task of a training task's name",
        TRAINED,
        ("tasks.evaluate: a training task is named 'same'",),
        {
            **recipe(spoilt("{train: [t]}", "{train: [t], evaluate: [u]}", BASE), **{}),
            **task_with("name: same\nsource: one\n"),
            **task(task()["t/task.yaml"] + "name: same\nsource: other\n", name="u"),
        },
    ),
    Case(
        "a weight for a task that is not there",
        f"{TRAINED} --set 'tasks.mixture={{kind: weights, weights: {{u: 1}}}}'",
        ("'u'",),
        recipe(BASE),
    ),
    Case(
        "weights that are all zero",
        f"{TRAINED} --set 'tasks.mixture={{kind: weights, weights: {{t: 0}}}}'",
        ("mixture",),
        recipe(BASE),
    ),
    Case(
        "a weight below zero",
        f"{TRAINED} --set 'tasks.mixture={{kind: weights, weights: {{t: -1}}}}'",
        ("-1",),
        recipe(BASE),
    ),
]


def _without_line_breaks(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1, "bad": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


def _of_numbers(folder: Path) -> None:
    tokenizer = word_level()
    vocabulary = tokenizer.get_vocab()
    path = folder / "tokenizer.json"
    tokenizer.save_pretrained(folder)
    description = json.loads(path.read_text(encoding="utf-8"))
    description["model"]["vocab"] = {
        f"<{word}>" if word in ("good", "bad") else word: number for word, number in vocabulary.items()
    }
    path.write_text(json.dumps(description), encoding="utf-8")


@table_of([*MODELS, *COMPILED, *TRAINING])
def test_a_mistake_about_models_is_one_sentence(
    case: Case, folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folders, tmp_path, dirs_exist_ok=True)
    meet(case, tmp_path, monkeypatch, capsys)
