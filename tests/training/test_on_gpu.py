"""For a machine with a CUDA GPU: `pytest -m gpu`. Not part of continuous integration; the plain case ran on an H200."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from manyicl.model.load import load_model
from manyicl.training.job import ensure_trained
from manyicl.training.requirements import missing_features
from tests.builders import byte_level_bpe, tiny_model
from tests.training.recipes import measuring, small_recipe, small_tasks

SETTINGS = {
    "plain": (),
    "4 bits": ("model.quantize=4bit",),
    "flash": ("model.attention=flash",),
    "liger": ("training.liger=true",),
    "everything": ("model.quantize=4bit", "model.attention=flash", "training.liger=true", "training.bf16=true"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("name", SETTINGS)
def test_an_adapter_is_trained_on_a_gpu_and_loads_over_its_base(name: str, tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    tokenizer = byte_level_bpe()
    tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    recipe = small_recipe(
        tmp_path / "run",
        "model.from_scratch=null",
        f"model.base={tmp_path / 'base'}",
        "model.lora={rank: 4}",
        "model.dtype=bfloat16",
        "sequences.max_context_tokens=200",
        *SETTINGS[name],
    )
    if missing := list(map(str, missing_features(recipe))):
        pytest.skip(" ".join(missing))
    assert ensure_trained(recipe, small_tasks(), measuring(lambda loaded: {"score": 0.0})).finished
    assert load_model(str(tmp_path / "run")).manifest is not None
