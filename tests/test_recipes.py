"""Every recipe of the repository reads, and builds and trains a step at toy size."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from manyicl.evaluation.comparison.budgets import nominal_recipe
from manyicl.evaluation.comparison.settings import Comparison
from manyicl.training.job import ensure_trained
from manyicl.training.recipe import Recipe
from tests.builders import byte_level_bpe, sentencepiece_bpe, tiny_model

ROOT = Path(__file__).parents[1]
RECIPES = [
    *sorted((ROOT / "recipes").glob("*.yaml")),
    *sorted((ROOT / "recipes" / "real").glob("*.yaml")),
    ROOT / "src" / "manyicl" / "cli" / "quickstart.yaml",
]
COMPARISONS = sorted((ROOT / "recipes" / "compare").glob("*.yaml"))
# The others are built and trained with the slow tests.
OFTEN_TRAINED = ("llama3_8b_full", "qwen3_0.6b", "one_model", "nano", "quickstart")
# What stands in for the model that a recipe starts from.
ARCHITECTURE_OF = {
    "mistral_7b_v0.3": "mistral",
    "llama3_8b": "llama",
    "gemma_7b": "gemma",
    "smollm2_135m": "llama",
    "qwen3_0.6b": "qwen3",
}
TOY_CONFIG = {"hidden_size": 48, "intermediate_size": 48, "num_hidden_layers": 2}


def write_toy_tasks(folder: Path) -> None:
    """One task with labels, which a recipe may rename, and one with free answers."""
    closed = "family: classification\nlabels: [good, bad]\n"
    for name, answers, head in (
        ("short", ("good", "bad"), closed),
        ("longer", ("good and long", "bad and red"), "family: generation\n"),
    ):
        (folder / name).mkdir(parents=True)
        rows = [{"text": f"film {i} was fine", "answer": answers[i % 2]} for i in range(30)]
        (folder / name / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        (folder / name / "task.yaml").write_text(
            head + "query: '{{ text }}'\nanswer: '{{ answer }}'\ndata: {train: train.jsonl}\n"
        )


def toy_overrides(recipe: Recipe, name: str, folder: Path) -> list[str]:
    """Say what a toy run changes: tasks, sizes and lengths, and the weights it starts from."""
    overrides = [
        f"tasks.train=['{folder / 'tasks'}']",
        "tasks.evaluate=[]",
        "training.evaluate_every=null",
        "training.evaluate_shots=[0, 8]",
        "training.evaluate_queries=50",
        "training.warmup_steps=0",
        "tasks.data_root=null",
        "tasks.mixture={}",
        "sequences.max_context_tokens=200",
        "sequences.examples_per_episode=[1, 8]",
        "training.num_tokens=null",
        "training.num_steps=1",
        "training.sequences_per_step=2",
        f"output='{folder / 'run'}'",
    ]
    if recipe.model.from_scratch is not None:
        sizes = {**recipe.model.from_scratch.config, **TOY_CONFIG}
        return [
            *overrides,
            f"model.from_scratch.config={json.dumps(sizes)}",
            "model.from_scratch.tokenizer.vocabulary_size=320",
            # Heads of its own size need more than a toy has.
            "model.from_scratch.initialization=default",
        ]
    tokenizer = sentencepiece_bpe() if name == "gemma_7b" else byte_level_bpe()
    base = tiny_model(ARCHITECTURE_OF.get(name, "llama"), len(tokenizer))
    base.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return [*overrides, f"model.base='{folder / 'base'}'"]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem in OFTEN_TRAINED else pytest.mark.slow, id=path.stem)
        for path in RECIPES
    ],
)
def test_a_recipe_builds_and_trains_a_step_at_toy_size(path: Path, tmp_path: Path) -> None:
    text = path.read_text(encoding="utf-8").replace("train: []", "train: [given]")
    recipe = Recipe.parse(text, path.name)
    write_toy_tasks(tmp_path / "tasks")
    toy = Recipe.parse(text, path.name, toy_overrides(recipe, path.stem, tmp_path))
    run = ensure_trained(toy)
    assert run.finished
    assert (tmp_path / "run" / "manyicl.json").is_file()
    assert any((tmp_path / "run").glob("*.safetensors"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_no_recipe_drops_inputs_of_an_adapter_as_long_as_no_measurement_speaks_for_it(path: Path) -> None:
    lora = Recipe.parse(path.read_text(encoding="utf-8").replace("train: []", "train: [given]"), path.name).model.lora
    assert lora is None or lora.dropout == 0


@pytest.mark.parametrize("path", COMPARISONS, ids=lambda path: path.stem)
def test_every_training_of_a_comparison_is_a_recipe(path: Path) -> None:
    settings = Comparison.read(path)
    assert settings.is_tuned
    regimes = [regime for regime in settings.compare.regimes if regime != "base"]
    assert len(regimes) == (2 if path.stem == "metaicl" else 5)
    for regime in regimes:
        nominal_recipe(settings, regime)
    for variant in settings.compare.variants.values():
        nominal_recipe(settings, "all_answers", variant)


def test_the_commands_that_test_the_claims_of_the_paper_are_comparisons() -> None:
    page = (ROOT / "docs" / "sources.md").read_text(encoding="utf-8")
    changes = re.findall(r"--set (compare\.regimes=\[.*?\])", page)
    assert len(changes) == 4
    for change in changes:
        dropped = [] if "dedicated" in change else ["compare.dedicated={}"]
        settings = Comparison.read(ROOT / "recipes" / "compare" / "nano.yaml", [change, *dropped])
        assert f"compare.regimes=[{','.join(settings.compare.regimes)}]" == change


def test_metaicl_is_compared_in_both_forms() -> None:
    direct = Comparison.read(ROOT / "recipes" / "compare" / "metaicl.yaml")
    channel = Comparison.read(ROOT / "recipes" / "compare" / "metaicl.yaml", ["format.kind=channel"])
    assert (direct.format.kind, channel.format.kind) == ("plain", "channel")
    few_shot = nominal_recipe(channel, "few_shot")
    assert (few_shot.sequences.examples_per_episode, few_shot.objective.supervise) == (17, "last_answer")
    assert (direct.compare.num_draws, max(direct.shots)) == (5, 16)


@pytest.mark.parametrize("path", [*RECIPES, *COMPARISONS], ids=lambda path: path.stem)
def test_a_recipe_is_headed_by_its_command(path: Path) -> None:
    head = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    assert any("manyicl " in line for line in head)
