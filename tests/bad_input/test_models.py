"""Mistakes in models, adapters, compiled tasks, and in what is asked of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from manyicl.model.manifest import Manifest
from tests.bad_input.case import Case, accepted, meet, refused, table_of
from tests.bad_input.files import DATA, KEYS, RECIPE, TRAIN, lines, recipe, spoilt, task, task_with
from tests.builders import byte_level_bpe, word_level
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


def retensored(
    folder: Path, keep: Callable[[str], bool] = lambda name: True, value: tuple[str, float] | None = None
) -> None:
    """Leave tensors out of the weights of a folder, or fill one with a value."""
    (path,) = folder.glob("*.safetensors")
    tensors = {name: tensor for name, tensor in load_file(path).items() if keep(name)}
    if value is not None:
        tensors[value[0]].fill_(value[1])
    save_file(tensors, path, {"format": "pt"})


def adapter_of(base: str | int | None) -> Callable[[Path], object]:
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
    refused(
        "no model at all",
        "predict --model '' --task t --input new.jsonl",
        "model_not_found",
        what="The model folder '' does not exist",
        files=QUERIES,
    ),
    refused(
        "a folder that holds no model",
        "predict --model t --task t --input new.jsonl",
        "no_model_in_folder",
        what="The folder 't' holds no model",
        expected="config.json or adapter_config.json in it",
        files=QUERIES,
    ),
    refused(
        "a file for a model",
        "tasks check t --model new.jsonl",
        "model_not_found",
        what="The model folder 'new.jsonl' does not exist",
        files=QUERIES,
    ),
    refused(
        "a model that the package lacks",
        "tasks show t --model builtin:nan",
        "unknown_model",
        expected="builtin:nano",
        found="'builtin:nan'",
        files=QUERIES,
    ),
    refused(
        "a model without weights",
        PREDICT,
        "not_loadable",
        what="The model of 'm' cannot be loaded",
        files=QUERIES,
        prepare=without("m/model.safetensors"),
    ),
    Case(
        "a model of pickles",
        PREDICT,
        ("'m' holds its weights in pytorch_model.bin alone; pickles are refused", "save_pretrained('m')"),
        QUERIES,
        pickled("m/model.safetensors", "m/pytorch_model.bin"),
    ),
    refused(
        "an adapter of pickles",
        spoilt("--model m", "--model a", PREDICT),
        "pickled_weights",
        what="'a' holds its weights in adapter_model.bin alone; pickles are refused,",
        files=QUERIES,
        prepare=pickled("a/adapter_model.safetensors", "a/adapter_model.bin"),
    ),
    Case(
        "weights that were never fetched",
        PREDICT,
        ("model.safetensors of 'm' is a Git LFS pointer", "`git lfs pull`"),
        QUERIES,
        written("m/model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
    ),
    refused(
        "weights that are cut",
        PREDICT,
        "not_loadable",
        what="The model of 'm' cannot be loaded",
        files=QUERIES,
        prepare=cut("m/model.safetensors", 1000),
    ),
    Case(
        "weights that lack tensors",
        PREDICT,
        ("The weights of 'm' lack tensors that its config.json names; found 9 such as ", ". Restore the folder."),
        QUERIES,
        changed("m/config.json", num_hidden_layers=4),
    ),
    refused(
        "weights of another size",
        PREDICT,
        "tensor_shape",
        expected="(330, 64)",
        found="(330, 32)",
        files=QUERIES,
        prepare=changed("m/config.json", hidden_size=64),
    ),
    refused(
        "a configuration that is broken",
        PREDICT,
        "not_loadable",
        what="The config.json of 'm' cannot be loaded",
        files=QUERIES,
        prepare=written("m/config.json", "{"),
    ),
    refused(
        "a configuration of an unknown model",
        PREDICT,
        "not_loadable",
        what="The model of 'm' cannot be loaded",
        files=QUERIES,
        prepare=written("m/config.json", '{"model_type": "lama"}'),
    ),
    refused(
        "a model without a tokenizer",
        PREDICT,
        "not_loadable",
        what="The tokenizer of 'm' cannot be loaded",
        files=QUERIES,
        prepare=without("m/tokenizer.json", "m/tokenizer_config.json"),
    ),
    refused(
        "a tokenizer that is broken",
        CHECK,
        "not_loadable",
        what="The tokenizer of 'm' cannot be loaded",
        files=QUERIES,
        prepare=written("m/tokenizer.json", "{}"),
    ),
    refused(
        "a tokenizer that keeps no line breaks",
        CHECK,
        "lossy_tokenizer",
        expected="'\\n'",
        found="''",
        files=QUERIES,
        prepare=lambda folder: _without_line_breaks(folder / "m"),
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
    refused(
        "a model folder of another version",
        PREDICT,
        "not_a_manifest",
        file="m/manyicl.json",
        field="format_version",
        found="99",
        files=QUERIES,
        prepare=changed("m/manyicl.json", format_version=99),
    ),
    refused(
        "a model folder of a later version with a new field",
        CHECK,
        "not_a_manifest",
        file="m/manyicl.json",
        field="retrieval",
        found="True",
        files=QUERIES,
        prepare=changed("m/manyicl.json", retrieval=True),
    ),
    refused(
        "a manifest that is broken",
        PREDICT,
        "not_a_manifest",
        what="This is not a manifest of this version of manyicl",
        file="m/manyicl.json",
        files=QUERIES,
        prepare=written("m/manyicl.json", '{"format'),
    ),
    refused(
        "a manifest in Latin-1",
        PREDICT,
        "not_a_manifest",
        what="This is not a manifest of this version of manyicl",
        file="m/manyicl.json",
        files=QUERIES,
        prepare=written("m/manyicl.json", b"\xe4"),
    ),
    refused(
        "a context that the model does not have",
        f"{PREDICT} --max-context-tokens 5000",
        "out_of_range",
        field="max_context_tokens",
        expected="1 to 512, the positions of 'm'",
        found="5,000",
        files=QUERIES,
    ),
    refused(
        "a context that no one counts",
        f"{PREDICT} --max-context-tokens {10**30}",
        "out_of_range",
        field="max_context_tokens",
        expected="1 to 512, the positions of 'm'",
        found="1,000,000,000,000,000,000,000,000,000,000",
        files=QUERIES,
    ),
    refused(
        "a context too small for the query",
        f"{PREDICT} --max-context-tokens 3 --bad-rows refuse",
        "query_too_long",
        what="8 tokens are needed with 0 demonstrations and its answer;",
        file="new.jsonl",
        row=1,
        files=QUERIES,
        leaves=("answers.jsonl.part",),
    ),
    refused(
        "a precision that there is not",
        f"{PREDICT} --dtype float8",
        "unknown_dtype",
        expected="float32, bfloat16, float16",
        found="'float8'",
        files=QUERIES,
    ),
    refused(
        "a device that there is not",
        f"{PREDICT} --device quantum",
        "unknown_device",
        what="The device 'quantum' is not available: expected one of cpu, cuda, ipu,",
        files=QUERIES,
    ),
    refused(
        "an adapter over another base",
        "predict --model a --task t --input new.jsonl",
        "another_base",
        expected="a fingerprint 000000000000",
        found="ae3497460bd2",
        files=QUERIES,
        prepare=changed("a/manyicl.json", base_fingerprint="0" * 64),
    ),
    refused(
        "an adapter whose base is gone",
        "predict --model a --task t --input new.jsonl",
        "model_not_found",
        what="The model folder 'gone' does not exist",
        files=QUERIES,
        prepare=changed("a/manyicl.json", base="gone"),
    ),
    refused(
        "an adapter that names no base",
        "predict --model a --task t --input new.jsonl",
        "no_base",
        file="a/adapter_config.json",
        field="base_model_name_or_path",
        expected="a folder or hf:owner/name",
        found="nothing",
        files=QUERIES,
        prepare=adapter_of(None),
    ),
    refused(
        "an adapter over an adapter",
        "predict --model a --task t --input new.jsonl",
        "base_is_adapter",
        what="The adapter 'a' names 'a' as its base, which is an adapter itself",
        files=QUERIES,
        prepare=adapter_of("a"),
    ),
    refused(
        "an adapter without weights",
        "predict --model a --task t --input new.jsonl",
        "no_weights",
        what="The adapter 'a' holds no adapter_model.safetensors",
        files=QUERIES,
        prepare=without("a/adapter_model.safetensors"),
    ),
    refused(
        "an adapter whose configuration is broken",
        "predict --model a --task t --input new.jsonl",
        "not_loadable",
        what="The adapter configuration of 'a' cannot be loaded",
        files=QUERIES,
        prepare=written("a/adapter_config.json", "["),
    ),
    refused(
        "an adapter whose configuration lacks its base",
        "predict --model a --task t --input new.jsonl",
        "not_loadable",
        what="The adapter configuration of 'a' cannot be loaded",
        files=QUERIES,
        prepare=written("a/adapter_config.json", "{}"),
    ),
    *(
        refused(
            f"an adapter whose configuration {name}",
            "predict --model a --task t --input new.jsonl",
            "not_loadable",
            what=what,
            files=QUERIES,
            prepare=prepare,
        )
        for name, what, prepare in (
            (
                "is a list",
                "The adapter configuration of 'a' cannot be loaded: a value in one of its files is of the wrong kind",
                written("a/adapter_config.json", "[]"),
            ),
            (
                "has a text for a number",
                "The adapter of 'a' cannot be loaded: a value in one of its files is of the wrong kind",
                changed("a/adapter_config.json", r="x"),
            ),
            (
                "names an unknown kind",
                "The adapter of 'a' cannot be loaded: its adapter_config.json names the peft_type 'LORE'",
                changed("a/adapter_config.json", peft_type="LORE"),
            ),
        )
    ),
    refused(
        "an adapter whose weights are cut",
        "predict --model a --task t --input new.jsonl",
        "not_loadable",
        what="The adapter of 'a' cannot be loaded",
        files=QUERIES,
        prepare=cut("a/adapter_model.safetensors", 100),
    ),
    refused(
        "an export over what is there",
        "export --model m --output t",
        "output_exists",
        what="the output is not empty",
        file="t",
    ),
    refused(
        "an export to a file",
        "export --model m --output new.jsonl",
        "output_is_file",
        expected="a folder",
        file="new.jsonl",
        files=QUERIES,
    ),
    Case(
        "an export of an adapter alone",
        "export --model a --output e",
        ("'a' is an adapter. Give --merge to write it and its base as one model.",),
    ),
    refused(
        "an export in a precision that there is not",
        "export --model m --output e --dtype bf16",
        "unknown_dtype",
        expected="float32, bfloat16, float16",
        found="'bf16'",
    ),
    refused(
        "an export below a file",
        "export --model m --output new.jsonl/e",
        "output_below_file",
        what="'new.jsonl' above it is a file",
        file="new.jsonl/e",
        files=QUERIES,
    ),
]

ADAPTER = "predict --model a --task t --input new.jsonl"
MODELS += [
    refused(
        "an adapter that lacks tensors",
        ADAPTER,
        "missing_tensors",
        what="The weights of 'a' lack tensors that its adapter_config.json names",
        found="1 such as 'base_model.model.model.layers.0.mlp.down_proj.lora_A.weight'",
        files=QUERIES,
        prepare=lambda folder: retensored(folder / "a", lambda name: "layers.0.mlp.down_proj.lora_A" not in name),
    ),
    refused(
        "an adapter without any of its tensors",
        ADAPTER,
        "missing_tensors",
        files=QUERIES,
        prepare=lambda folder: retensored(folder / "a", lambda name: False),
    ),
    refused(
        "an adapter with tensors of layers that it does not name",
        ADAPTER,
        "unexpected_tensors",
        what="The weights of 'a' hold tensors that its adapter_config.json does not name",
        files=QUERIES,
        prepare=changed("a/adapter_config.json", target_modules=["q_proj"]),
    ),
    refused(
        "a base with more layers than its configuration names",
        PREDICT,
        "unexpected_tensors",
        what="The weights of 'm' hold tensors that its config.json does not name",
        files=QUERIES,
        prepare=changed("m/config.json", num_hidden_layers=2),
    ),
    refused(
        "a tokenizer with more tokens than the model has embeddings",
        PREDICT,
        "tokenizer_too_large",
        expected="at most 330",
        found="430",
        files=QUERIES,
        prepare=lambda folder: _with_more_tokens(folder / "m"),
    ),
    refused(
        "an end-of-text token without an embedding",
        PREDICT,
        "tokenizer_too_large",
        expected="at most 330",
        found="331",
        files=QUERIES,
        prepare=lambda folder: _with_another_end(folder / "m"),
    ),
    refused(
        "weights that are not numbers",
        PREDICT,
        "weights_not_finite",
        found="32 values that are none in 'model.norm.weight'",
        files=QUERIES,
        prepare=lambda folder: retensored(folder / "m", value=("model.norm.weight", float("nan"))),
    ),
    refused(
        "a number for an adapter's base",
        ADAPTER,
        "no_base",
        found="5",
        field="base_model_name_or_path",
        files=QUERIES,
        prepare=adapter_of(5),
    ),
    refused(
        "rotary positions of an unknown kind",
        PREDICT,
        "not_loadable",
        what="The model of 'm' cannot be loaded: its config.json names the rope_type 'spiral'",
        files=QUERIES,
        prepare=changed("m/config.json", rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0}),
    ),
    refused(
        "an activation of an unknown kind",
        PREDICT,
        "not_loadable",
        what="The model of 'm' cannot be loaded: its config.json names the hidden_act 'zzz'",
        files=QUERIES,
        prepare=changed("m/config.json", hidden_act="zzz"),
    ),
    refused(
        "Python code in a model folder",
        PREDICT,
        "asks_for_code",
        field="auto_map",
        files=QUERIES,
        prepare=changed("m/tokenizer_config.json", auto_map={"AutoTokenizer": ["own.Tokenizer", None]}),
        stdin="y\n",
    ),
]

COMPILED = [
    refused(
        "a compiled task that does not exist",
        "predict --model m --prefix u.prefix --input new.jsonl",
        "not_a_compiled_task",
        what="the compiled task does not exist",
        file="u.prefix",
        expected="a file written by `manyicl compile`",
        files=QUERIES,
    ),
    refused(
        "a folder for a compiled task",
        "predict --model m --prefix t --input new.jsonl",
        "not_a_compiled_task",
        what="the compiled task is a folder",
        file="t",
        expected="a file written by `manyicl compile`",
        files=QUERIES,
    ),
    refused(
        "another file for a compiled task",
        "predict --model m --prefix new.jsonl --input new.jsonl",
        "incomplete_file",
        what="it is no complete compiled task, error while deserializing header: hea",
        file="new.jsonl",
        files=QUERIES,
    ),
    refused(
        "weights for a compiled task",
        "predict --model m --prefix m/model.safetensors --input new.jsonl",
        "not_a_compiled_task",
        what="it is no compiled task",
        file="m/model.safetensors",
        expected="a file written by `manyicl compile`",
        files=QUERIES,
    ),
    refused(
        "an empty compiled task",
        "predict --model m --prefix t.prefix --input new.jsonl",
        "incomplete_file",
        what="it is no complete compiled task, error while deserializing header: hea",
        file="t.prefix",
        files=QUERIES,
        prepare=written("t.prefix", ""),
    ),
    refused(
        "a compiled task that is cut",
        "predict --model m --prefix t.prefix --input new.jsonl",
        "incomplete_file",
        what="it is no complete compiled task, error while deserializing header: inc",
        file="t.prefix",
        files=QUERIES,
        prepare=cut("t.prefix", 10),
    ),
    refused(
        "a compiled task that was changed",
        "predict --model m --prefix t.prefix --input new.jsonl",
        "altered_file",
        what="it was altered after it was written",
        file="t.prefix",
        files=QUERIES,
        prepare=flipped("t.prefix", 3),
    ),
    Case(
        "a compiled task of another model",
        "predict --model m --prefix t.prefix --input new.jsonl",
        ("t.prefix: the prefix was made with another model", "or make it again"),
        QUERIES,
        other_weights,
    ),
    refused(
        "a compiled task of another precision",
        "predict --model m --prefix t.prefix --input new.jsonl --dtype bfloat16",
        "foreign_prefix",
        file="t.prefix",
        what="the prefix was made with another precision (float32 against bfloat16)",
        files=QUERIES,
    ),
    refused(
        "a compiled task for an adapter of its model",
        "predict --model a --prefix t.prefix --input new.jsonl",
        "foreign_prefix",
        file="t.prefix",
        expected="one of 'a', weights a700242bcf75",
        files=QUERIES,
    ),
    refused(
        "a compiled task in a context too small",
        "predict --model m --prefix t.prefix --input new.jsonl --max-context-tokens 20",
        "prefix_too_long",
        what="the prefix has 45 tokens",
        file="t.prefix",
        expected="at most max_context_tokens, 20",
        files=QUERIES,
    ),
    accepted(
        "a compiled task and its task",
        "predict --model m --task t --prefix t.prefix --input new.jsonl",
        files=QUERIES,
    ),
    refused(
        "a compiled task and its task with another row",
        "predict --model m --task t --prefix t.prefix --input new.jsonl",
        "compiled_task_outdated",
        found="other rows; 0 demonstrations of ",
        remedy="Run `manyicl compile --update`",
        file="t.prefix",
        files={**QUERIES, "t/train.jsonl": lines(*TRAIN, {"text": "one more", "label": "good"})},
    ),
    refused(
        "a compiled task and its task with another instruction",
        "predict --model m --task t --prefix t.prefix --input new.jsonl",
        "compiled_task_outdated",
        found="another instruction template",
        file="t.prefix",
        files={**QUERIES, "t/task.yaml": KEYS + DATA + "instruction: Judge.\n"},
    ),
    refused(
        "neither a compiled task nor a task",
        "predict --model m --input new.jsonl",
        "no_task_named",
        what="nothing says where demonstrations come from",
        expected="--task, --prefix or both",
        files=QUERIES,
    ),
    refused(
        "shots for a compiled task",
        "predict --model m --prefix t.prefix --shots 4 --input new.jsonl",
        "conflicting_options",
        field="--shots",
        files=QUERIES,
    ),
    refused(
        "a compiled task for a folder that is not there",
        "compile --model m --task t --output u/t.prefix",
        "output_folder_missing",
        what="the folder 'u' does not exist",
        file="u/t.prefix",
    ),
    refused(
        "a compiled task in the place of a folder",
        "compile --model m --task t --output t",
        "output_is_folder",
        what="the output is a folder",
        file="t",
        expected="a file name",
    ),
    refused(
        "a compiled task over another file",
        "compile --model m --task t --output new.jsonl",
        "output_exists",
        what="the output exists and was not written by this command",
        file="new.jsonl",
        files=QUERIES,
    ),
    refused(
        "a compiled task of nothing",
        "compile --model m --task t --output u.prefix --shots 0",
        "nothing_to_compile",
        what="Task 't' has neither instruction nor demonstrations",
    ),
    Case(
        "more demonstrations than there are",
        "compile --model m --task t --output u.prefix --shots 500",
        ("Task 't' has 8 training examples; expected num_shots from 0 to 8, found 500. Use fewer shots or add rows",),
    ),
]

TRAINING = [
    refused(
        "a base that does not exist",
        TRAINED,
        "model_not_found",
        what="The model folder 'mm' does not exist",
        files=recipe(spoilt("base: m", "base: mm", BASE)),
    ),
    refused(
        "rows longer than the base can read",
        TRAINED,
        "context_too_long",
        field="sequences.max_context_tokens",
        files=recipe(spoilt("max_context_tokens: 60", "max_context_tokens: 5000", BASE)),
    ),
    refused(
        "a context too small for one example",
        TRAINED,
        "no_shot_fits",
        field="sequences.max_context_tokens",
        expected="at most 8 tokens (max_context_tokens)",
        found="11",
        files=recipe(spoilt("max_context_tokens: 60", "max_context_tokens: 8", BASE)),
    ),
    refused(
        "an example longer than the context, of a dry run",
        "train recipe.yaml --dry-run",
        "no_shot_fits",
        field="sequences.max_context_tokens",
        expected="at most 60 tokens (max_context_tokens)",
        found="1,806",
        files=recipe(BASE, train=[{"text": "film " * 900, "label": label} for label in ("good", "bad")]),
    ),
    refused(
        "an adapter over an adapter to be trained",
        TRAINED,
        "base_is_adapter",
        field="model.lora",
        files=recipe(spoilt("{base: m}", "{base: a, lora: {rank: 2}}", BASE)),
    ),
    refused(
        "an adapter over layers that there are not",
        TRAINED,
        "unknown_layer",
        field="model.lora.target_modules",
        expected="names of linear layers, ['down_proj', 'gate_proj', 'k_proj',",
        files=recipe(spoilt("{base: m}", "{base: m, lora: {target_modules: [query]}}", BASE)),
    ),
    refused(
        "a base of another version",
        TRAINED,
        "not_a_manifest",
        file="m/manyicl.json",
        field="format_version",
        found="0",
        files=recipe(BASE),
        prepare=changed("m/manyicl.json", format_version=0),
    ),
    refused(
        "an architecture that there is not",
        TRAINED,
        "unknown_architecture",
        field="model.from_scratch.architecture",
        files=recipe(spoilt("architecture: llama", "architecture: lama")),
    ),
    refused(
        "a shape that cannot be",
        TRAINED,
        "wrong_config",
        field="model.from_scratch.config",
        files=recipe(spoilt("num_attention_heads: 4", "num_attention_heads: 5")),
    ),
    refused(
        "a shape in words",
        TRAINED,
        "wrong_config",
        field="model.from_scratch.config",
        files=recipe(spoilt("hidden_size: 32", "hidden_size: large")),
    ),
    refused(
        "a shape of nothing",
        TRAINED,
        "wrong_config",
        field="model.from_scratch.config",
        files=recipe(spoilt("hidden_size: 32", "hidden_size: 0")),
    ),
    refused(
        "a shape without heads",
        TRAINED,
        "wrong_config",
        field="model.from_scratch.config",
        files=recipe(spoilt("num_attention_heads: 4", "num_attention_heads: 0")),
    ),
    refused(
        "a function that there is not",
        TRAINED,
        "wrong_config",
        field="model.from_scratch.config",
        files=recipe(spoilt("hidden_size: 32", "hidden_act: zzz, hidden_size: 32")),
    ),
    refused(
        "an unknown key of a shape",
        TRAINED,
        "unknown_key",
        field="model.from_scratch.config.hiden_size",
        files=recipe(spoilt("hidden_size", "hiden_size")),
    ),
    refused(
        "a vocabulary too small for the words",
        TRAINED,
        "labels_with_equal_tokens",
        what="The tokenizer cannot tell the labels 'bad' and 'good' of task 't' apar",
        files=recipe(spoilt("vocabulary_size: 200", "vocabulary_size: 8")),
    ),
    refused(
        "an output that is a file",
        TRAINED,
        "output_is_file",
        what="the output is a file",
        file="run",
        expected="a folder",
        files={**recipe(BASE), "run": "x"},
    ),
    refused(
        "an output that is a file, of a dry run",
        f"{TRAINED} --dry-run",
        "output_is_file",
        what="the output is a file",
        file="run",
        expected="a folder",
        files={**recipe(BASE), "run": "x"},
    ),
    refused(
        "an output that holds something else, of a dry run",
        f"{TRAINED} --dry-run",
        "output_exists",
        what="the output is not empty and holds no run of manyicl",
        file="run",
        files={**recipe(BASE), "run/thesis.tex": "x"},
    ),
    refused(
        "this folder as the output of a dry run",
        f"{TRAINED} --dry-run --set output=.",
        "output_exists",
        what="the output is not empty and holds no run of manyicl",
        file=".",
        files=recipe(BASE),
    ),
    refused(
        "an output to be replaced that holds something else, of a dry run",
        f"{TRAINED} --dry-run --overwrite",
        "output_exists",
        what="the output is not empty and holds no run of manyicl",
        file="run",
        files={**recipe(BASE), "run/thesis.tex": "x"},
    ),
    accepted(
        "a dry run where a run has begun",
        f"{TRAINED} --dry-run",
        "Run: 2 steps",
        files={**recipe(BASE), "run/recipe.yaml": BASE, "run/manyicl.json": "{}"},
    ),
    refused(
        "an output below a file",
        f"{TRAINED} --set output=recipe.yaml/run",
        "output_below_file",
        what="'recipe.yaml' above it is a file",
        file="recipe.yaml/run",
        files=recipe(BASE),
    ),
    refused(
        "an output with a name longer than any file system takes",
        f"{TRAINED} --set output={'x' * 300}",
        "output_name_too_long",
        expected="at most 240 bytes",
        found="300",
        files=recipe(BASE),
    ),
    refused(
        "an output that holds something else",
        TRAINED,
        "output_exists",
        what="the output is not empty and holds no run of manyicl",
        file="run",
        files={**recipe(BASE), "run/thesis.tex": "x"},
    ),
    refused(
        "an output to be replaced that holds something else",
        f"{TRAINED} --overwrite",
        "output_exists",
        what="the output is not empty and holds no run of manyicl",
        file="run",
        files={**recipe(BASE), "run/thesis.tex": "x"},
    ),
    refused(
        "an output that holds another run",
        TRAINED,
        "run_exists",
        what="the output holds a run already",
        file="run",
        files={**recipe(BASE), "run/recipe.yaml": BASE, "run/manyicl.json": "{}"},
    ),
    refused(
        "going on where nothing was begun",
        f"{TRAINED} --resume",
        "not_resumable",
        what="--resume: the output holds no run",
        file="run",
        files=recipe(BASE),
    ),
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
    refused(
        "a held-out task of one row",
        TRAINED,
        "too_few_rows",
        field="tasks.evaluate",
        expected="at least 2",
        found="1",
        files={
            **recipe(spoilt("{train: [t]}", "{train: [t], evaluate: [u]}", BASE)),
            **task(spoilt("classification", "generation", task()["t/task.yaml"]), name="u", train=TRAIN[:1]),
        },
    ),
    refused(
        "a held-out task of a training task's name",
        TRAINED,
        "duplicate_task",
        field="tasks.evaluate",
        files={
            **recipe(spoilt("{train: [t]}", "{train: [t], evaluate: [u]}", BASE), **{}),
            **task_with("name: same\nsource: one\n"),
            **task(task()["t/task.yaml"] + "name: same\nsource: other\n", name="u"),
        },
    ),
    refused(
        "a weight for a task that is not there",
        f"{TRAINED} --set 'tasks.mixture={{kind: weights, weights: {{u: 1}}}}'",
        "unknown_task",
        field="tasks.mixture.weights",
        files=recipe(BASE),
    ),
    refused(
        "weights that are all zero",
        f"{TRAINED} --set 'tasks.mixture={{kind: weights, weights: {{t: 0}}}}'",
        "wrong_value",
        field="tasks.mixture.weights",
        expected="at least one above 0",
        files=recipe(BASE),
    ),
    refused(
        "a weight below zero",
        f"{TRAINED} --set 'tasks.mixture={{kind: weights, weights: {{t: -1}}}}'",
        "wrong_value",
        field="tasks.mixture.weights",
        expected="at least 0",
        found="-1",
        files=recipe(BASE),
    ),
]


def _without_line_breaks(folder: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "good": 1, "bad": 2}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>").save_pretrained(folder)


def _with_more_tokens(folder: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([f"<{number}>" for number in range(100)])
    tokenizer.save_pretrained(folder)


def _with_another_end(folder: Path) -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_special_tokens({"eos_token": "<the end>"})
    tokenizer.save_pretrained(folder)


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
