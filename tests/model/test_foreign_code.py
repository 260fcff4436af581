"""Python code that a model folder brings along never runs."""

from __future__ import annotations

import ast
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.model.attention import ATTENTION
from manyicl.model.load import load_model, load_tokenizer, model_config
from tests.model.exports import save_adapter, save_model

ROOT = Path(__file__).parents[2]
CODE = """
from pathlib import Path
Path({trace!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class OwnConfig(LlamaConfig):
    model_type = "own"
class OwnModel(LlamaForCausalLM):
    config_class = OwnConfig
class OwnTokenizer(PreTrainedTokenizerFast):
    pass
"""
ASKS_FOR_CODE = {
    "config.json": {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnModel"},
    },
    "tokenizer_config.json": {
        "tokenizer_class": "OwnTokenizer",
        "auto_map": {"AutoTokenizer": [None, "own.OwnTokenizer"]},
    },
}
# Loads that name a class of ours, which passes the argument on.
OURS = {"Engine", "HarnessModel"}


def with_code(folder: Path, name: str, trace: Path) -> Path:
    """Let one file of a folder ask for code that would leave a trace."""
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    path.write_text(json.dumps({**content, **ASKS_FOR_CODE[name]}), encoding="utf-8")
    (folder / "own.py").write_text(CODE.format(trace=str(trace)), encoding="utf-8")
    return folder


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("code") / "base")


@pytest.mark.parametrize("name", list(ASKS_FOR_CODE))
@pytest.mark.parametrize("kind", ["base", "adapter", "base of an adapter"])
def test_code_of_a_model_folder_never_runs_even_where_standard_input_says_yes(
    kind: str, name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trace = tmp_path / "trace"
    folder = tmp_path / "model"
    if kind == "base":
        with_code(save_model(folder), name, trace)
    elif kind == "adapter":
        with_code(save_adapter(folder, base), name, trace)
    else:
        save_adapter(folder, save_model(tmp_path / "base"))
        with_code(tmp_path / "base", name, trace)
    monkeypatch.chdir(tmp_path)
    loads: list[Callable[[str], object]] = [load_model, Engine.from_pretrained]
    if kind != "base of an adapter":
        loads += [load_tokenizer] + [model_config] * (kind == "base")
    for load in loads:
        monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 9))
        with pytest.raises(UserError, match="asks for Python code") as raised:
            load(str(folder))
        assert raised.value.code == "asks_for_code"
        assert raised.value.found == f"auto_map in {name}"
    assert not trace.exists()


def test_a_model_is_named_by_text_or_path_and_by_nothing_else(base: Path) -> None:
    assert load_model(base).reference == str(base)
    assert load_tokenizer(base).get_vocab() == load_tokenizer(str(base)).get_vocab()
    with pytest.raises(UserError, match="names no model; expected a folder or hf:owner/name, found 5"):
        load_model(5)  # type: ignore[arg-type]


def test_every_load_of_a_library_refuses_code() -> None:
    calls = [call for path in sources() for call in loads_in(path)]
    assert len(calls) >= 5
    assert [where for where, refuses in calls if not refuses] == []


def sources() -> Iterator[Path]:
    for folder in ("src", "benchmarks"):
        yield from sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("name", ["eager", "sdpa", "flash_attention_2", "someone/kernel"])
def test_the_attention_that_a_model_folder_names_is_never_used(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*arguments: object, **others: object) -> None:
        raise AssertionError(f"attention code was fetched: {arguments}")

    monkeypatch.setattr("transformers.integrations.hub_kernels.load_and_register_attn_kernel", fetched)
    folder = save_model(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "_attn_implementation": name}), encoding="utf-8")
    assert load_model(str(folder), device="cpu").model.config._attn_implementation == ATTENTION
    assert model_config(str(folder))._attn_implementation == ATTENTION


def test_quantized_weights_are_refused_before_kernels_for_them_could_be_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "transformers.modeling_utils.get_hf_quantizer", lambda *_, **__: pytest.fail("it was asked for")
    )
    folder = save_model(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    quantization = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}), encoding="utf-8")
    for load in (load_model, model_config):
        with pytest.raises(UserError) as refused:
            load(str(folder))
        assert (refused.value.code, refused.value.field) == ("quantized_weights", "quantization_config")


def loads_in(path: Path) -> Iterator[tuple[str, bool]]:
    """Find the calls that read a model folder through a library, and whether each says trust_remote_code=False."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function = node.func
        is_load = isinstance(function, ast.Attribute) and (
            function.attr == "from_pretrained" and ast.unparse(function.value) not in OURS
        )
        if is_load or (isinstance(function, ast.Name) and function.id == "HFLM"):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            yield f"{path.name}:{node.lineno}", given.get("trust_remote_code") == "False"
