"""What a recipe asks of a machine: accepted where it is, refused in one go where it is not, before data is read."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest
from peft import PeftModel
from transformers import AutoConfig
from typer import Typer
from typer.testing import CliRunner

from manyicl.cli.train import train_command
from manyicl.errors import UserError
from manyicl.model.load import load_model
from manyicl.model.machine import Gpu
from manyicl.model.manifest import Manifest
from manyicl.training import estimate
from manyicl.training.dry_run import dry_run
from manyicl.training.job import ensure_trained
from manyicl.training.recipe import Recipe
from manyicl.training.requirements import FLASH_ATTN, GPU_EXTRA, check_recipe, missing_features
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import starting_point
from tests.builders import byte_level_bpe, tiny_model
from tests.machines import GPU_LIBRARIES, H100, T4, pretend
from tests.training.recipes import TEXT, small_recipe, small_tasks

NO_BASE = ("model.from_scratch=null", "model.base=hf:owner/name", "model.lora={}", "model.dtype=bfloat16")
SETTINGS = {
    "model.quantize": ("model.quantize=4bit", "bitsandbytes 0.46.1"),
    "model.attention": ("model.attention=flash", "flash-attn 2.6"),
    "training.liger": ("training.liger=true", "liger-kernel 0.8"),
}

# peft 0.21 asks transformers 5.23 for a property by its deprecated name.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

app = Typer()
app.command()(train_command)


@pytest.fixture(name="base")
def _base(tmp_path: Path) -> Path:
    tokenizer = byte_level_bpe()
    tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def over(base: Path, output: Path, *overrides: str) -> Recipe:
    return small_recipe(output, *NO_BASE, f"model.base={base}", *overrides)


@pytest.mark.parametrize("key", SETTINGS)
@pytest.mark.parametrize(
    ("gpus", "cuda", "installed", "reason", "remedy"),
    [
        ((H100,), "12.8", True, None, None),
        ((H100, H100), "12.8", True, None, None),
        ((), "12.8", True, "torch sees no GPU here", "Train where torch sees such a GPU, or remove"),
        ((), None, True, "is built without CUDA", "Train where torch sees such a GPU, or remove"),
        ((H100,), "12.8", False, "is not installed. Install {library} with `{install}`, or remove", ""),
        ((), None, False, "is built without CUDA and ", "sees such a GPU and install {library} with `{install}`"),
        ((Gpu("Tesla K80", 11.2, (3, 7), False),), "11.8", True, "Tesla K80 has compute capability 3.7, at least", ""),
    ],
)
def test_a_setting_is_accepted_where_library_and_gpu_are_and_refused_with_what_is_missing(
    key: str,
    gpus: tuple[Gpu, ...],
    cuda: str | None,
    installed: bool,
    reason: str | None,
    remedy: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    override, needs = SETTINGS[key]
    pretend(monkeypatch, gpus=gpus, cuda=cuda, libraries=GPU_LIBRARIES if installed else {})
    recipe = small_recipe(tmp_path, *NO_BASE, override)
    if reason is None or remedy is None:
        check_recipe(recipe, with_tasks=False)
        return
    with pytest.raises(UserError) as error:
        check_recipe(recipe, with_tasks=False)
    sentence = str(error.value)
    assert sentence.startswith(key)
    assert f"needs a CUDA GPU and {needs} or later" in sentence
    library = needs.partition(" ")[0]
    install = FLASH_ATTN if library == "flash-attn" else GPU_EXTRA
    assert reason.format(library=library, install=install) in sentence
    assert remedy.format(library=library, install=install) in sentence
    assert sentence.endswith(f"or remove {key}.")


def test_the_weakest_gpu_and_an_old_library_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, gpus=(H100, T4))
    recipe = small_recipe(tmp_path, *NO_BASE, "model.quantize=4bit", "model.attention=flash")
    (sentence,) = map(str, missing_features(recipe))
    assert "Tesla T4 has compute capability 7.5, at least 8.0 is needed" in sentence
    pretend(monkeypatch, libraries={**GPU_LIBRARIES, "bitsandbytes": "0.41.0"})
    (sentence,) = map(str, missing_features(recipe))
    assert "bitsandbytes is 0.41.0. Install bitsandbytes with" in sentence
    pretend(monkeypatch, libraries={**GPU_LIBRARIES, "bitsandbytes": "built by me"})
    assert not list(missing_features(recipe))


def test_all_that_is_missing_is_said_at_once(tmp_path: Path) -> None:
    recipe = small_recipe(tmp_path, *NO_BASE, *(override for override, _ in SETTINGS.values()))
    assert len(list(missing_features(recipe))) == 3
    with pytest.raises(UserError) as error:
        ensure_trained(recipe, small_tasks())
    assert all(key in str(error.value) for key in SETTINGS)


def test_a_recipe_that_asks_for_nothing_looks_at_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("gpus", "cuda_version", "library_version"):
        monkeypatch.setattr(f"manyicl.model.machine.{name}", lambda *names: pytest.fail("looked"))
    assert not list(missing_features(small_recipe(tmp_path)))


@pytest.mark.parametrize("key", SETTINGS)
def test_what_must_be_compared_at_load_is_refused_under_fsdp(
    key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(UserError, match=rf"{key}.* under FSDP.* Start without FSDP, or remove {key}"):
        check_recipe(small_recipe(tmp_path, *NO_BASE, SETTINGS[key][0]), with_tasks=False)


@pytest.mark.parametrize(
    ("environment", "gpus", "problem"),
    [
        ({"PARALLELISM_CONFIG_CP_SIZE": "2"}, (H100,), r"context parallelism .*drops what isolates the episodes"),
        ({"PARALLELISM_CONFIG_SP_SIZE": "2"}, (H100,), r"sequence parallelism .*divides a packed sequence"),
        ({"PARALLELISM_CONFIG_TP_SIZE": "4"}, (H100,), r"tensor parallelism .* is 4\); its processes share a sequence"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, (H100,), r"DeepSpeed was requested .*Start without it; recipes/accel"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, (H100,), "Megatron-LM was requested"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, (H100,), "of version 1 .*only version 2"),
        ({"ACCELERATE_USE_FSDP": "true"}, (H100,), "of version 1 .*only version 2"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, (), "torch sees no GPU here; .*whole copies without"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, (H100,), None),
        ({"PARALLELISM_CONFIG_CP_SIZE": "1", "ACCELERATE_USE_DEEPSPEED": "false"}, (), None),
    ],
)
def test_what_a_launcher_would_do_wrong_in_silence_is_refused(
    environment: dict[str, str],
    gpus: tuple[Gpu, ...],
    problem: str | None,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    pretend(monkeypatch, gpus=gpus)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if problem is None:
        check_recipe(small_recipe(tmp_path), with_tasks=False)
        return
    with pytest.raises(UserError, match=problem) as error:
        ensure_trained(small_recipe(tmp_path / "run"), small_tasks())
    assert error.value.remedy
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", SETTINGS)
def test_the_command_refuses_before_it_looks_for_tasks(key: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(TEXT.replace("train: [unused]", "train: [nowhere]") + f"output: {tmp_path / 'run'}\n")
    changes = [part for override in (*NO_BASE, SETTINGS[key][0]) for part in ("--set", override)]
    result = CliRunner().invoke(app, [str(path), *changes])
    assert isinstance(result.exception, UserError)
    assert str(result.exception).startswith(key)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("key", SETTINGS)
def test_a_dry_run_of_what_is_not_here_says_what_cannot_be_known(key: str, base: Path, tmp_path: Path) -> None:
    text = "\n".join(dry_run(over(base, tmp_path / "run", SETTINGS[key][0]), small_tasks()))
    assert f"Not on this machine: {key}" in text
    assert "supervised answers" in text
    assert "GiB of memory, estimated from the configuration. Hours cannot be known on this machine." in text


def test_a_dry_run_from_scratch_of_what_is_not_here_still_says_its_size(tmp_path: Path) -> None:
    text = "\n".join(dry_run(small_recipe(tmp_path / "run", "training.liger=true"), small_tasks()))
    assert "Not on this machine: training.liger" in text
    assert "weights, " in text
    assert "GiB of memory, estimated from the configuration. Hours cannot be known on this machine." in text


def test_4_bits_are_counted_in_the_estimated_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=2, hidden_size=512, intermediate_size=1024, vocab_size=50, num_attention_heads=8
    )
    monkeypatch.setattr(estimate, "model_config", lambda reference: config)
    memory = {}
    for override in ("model.quantize=null", "model.quantize=4bit"):
        recipe = small_recipe(tmp_path, *NO_BASE, override)
        statistics = estimate.SequenceStatistics(1, 0, 0, 0, 1, 0, 0, 0, 0, ((),))
        memory[override] = estimate.estimated_cost(recipe, statistics).memory_gib * 2**30
    linear = 2 * (4 * 512 * 512 + 3 * 512 * 1024)
    saved = memory["model.quantize=null"] - memory["model.quantize=4bit"]
    assert saved == pytest.approx(linear * (2 - 0.516), rel=1e-3)


@pytest.mark.parametrize("key", SETTINGS)
def test_a_run_is_not_resumed_with_another_of_these_settings(key: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.begin(small_recipe(folder.path, *NO_BASE), Manifest(max_context_tokens=60), overwrite=False)
    assert key.rpartition(".")[2] in (folder.path / "recipe.yaml").read_text(encoding="utf-8")
    with pytest.raises(UserError, match=f"started with another {key}; "):
        folder.require_resumable(small_recipe(folder.path, *NO_BASE, SETTINGS[key][0]))


def test_an_adapter_trained_over_4_bits_belongs_to_the_base_as_it_is_saved(
    monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    asked: list[tuple[str, str, str]] = []

    def load_quantized(reference: str, dtype: str, device: str) -> object:
        asked.append((reference, dtype, device))
        return load_model(reference, dtype=dtype).model

    monkeypatch.setattr("manyicl.training.start.load_quantized", load_quantized)
    recipe = over(base, tmp_path / "run", "model.quantize=4bit", "sequences.max_context_tokens=200")
    ensure_trained(recipe, small_tasks())
    assert asked == [(str(base), "bfloat16", "cpu")]
    loaded = load_model(str(tmp_path / "run"))
    assert loaded.manifest is not None
    assert loaded.manifest.base_fingerprint == load_model(str(base), dtype="bfloat16").fingerprint
    assert loaded.manifest.recipe["model"]["quantize"] == "4bit"
    assert isinstance(cast(object, loaded.model), PeftModel)


def test_an_adapter_in_4_bits_is_refused_as_every_adapter_over_an_adapter_is(
    monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    start = starting_point(over(base, tmp_path / "run"), ())
    start.model.save_pretrained(tmp_path / "adapter")
    start.tokenizer.save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="is an adapter itself"):
        starting_point(over(tmp_path / "adapter", tmp_path / "run", "model.quantize=4bit"), ())


@pytest.mark.parametrize("override", [SETTINGS["model.attention"][0], SETTINGS["training.liger"][0]])
def test_kernels_are_put_into_the_base_before_the_adapter(
    override: str, monkeypatch: pytest.MonkeyPatch, base: Path, tmp_path: Path
) -> None:
    pretend(monkeypatch)
    given: list[tuple[str, object]] = []
    for name in ("use_flash_attention", "use_liger_kernels"):
        monkeypatch.setattr(f"manyicl.training.start.{name}", lambda model, name=name: given.append((name, model)))
    start = starting_point(over(base, tmp_path / "run", override), ())
    ((given_to, model),) = given
    assert given_to == ("use_flash_attention" if "flash" in override else "use_liger_kernels")
    adapted = cast(object, start.model)
    assert isinstance(adapted, PeftModel)
    assert adapted.get_base_model() is model
