"""Whatever a recipe or --set holds: a recipe, or one sentence."""

from __future__ import annotations

from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from manyicl.training.recipe import Recipe
from tests.fuzzing import AWKWARD, efforts, ends_well, spoilt_yaml, values

SOUND: dict[str, Any] = {
    "model": {
        "base": None,
        "from_scratch": {
            "architecture": "llama",
            "config": {"hidden_size": 32},
            "tokenizer": {"kind": "byte_bpe", "vocabulary_size": 400},
        },
        "lora": None,
        "dtype": "float32",
    },
    "tasks": {
        "train": ["t", "u*"],
        "evaluate": [],
        "data_root": "data",
        "mixture": {"kind": "weights", "weights": {"t": 1, "qa": 0.5}},
    },
    "sequences": {"max_context_tokens": 60, "examples_per_episode": [1, 6], "sampling": "balanced"},
    "objective": {"supervise": "all_answers", "weighting": "answer", "context_weight": 0.1},
    "training": {"num_steps": 2, "learning_rate": 0.01, "evaluate_shots": [0, 2], "adam_betas": [0.9, 0.95]},
    "output": "run",
}
KEYS = [
    "model",
    "tasks",
    "sequences",
    "training",
    "output",
    "num_steps",
    "learning_rate",
    "mixture",
    "weights",
    "t",
    "",
    " ",
    "é",
]


def require_sound(recipe: Recipe | None) -> None:
    """Hold of a recipe what the rest of the program takes for granted."""
    if recipe is None:
        return
    assert recipe.num_steps >= 1
    assert 1 <= recipe.num_sequences < 2**63
    assert Recipe.parse(recipe.to_yaml()) == recipe


@efforts
def test_any_recipe_is_a_recipe_or_a_sentence(effort: settings) -> None:
    @effort
    @given(spoilt_yaml(SOUND).filter(lambda content: isinstance(content, str)))
    def holds(content: str) -> None:
        require_sound(ends_well(lambda: Recipe.parse(content)))

    holds()


overrides = st.tuples(
    st.lists(st.sampled_from(KEYS), min_size=1, max_size=4).map(".".join) | st.text(max_size=10),
    values.map(lambda value: yaml.safe_dump(value, default_flow_style=True))
    | st.sampled_from(AWKWARD)
    | st.text(max_size=10),
).map("=".join) | st.text(max_size=10)


@efforts
def test_any_override_is_a_recipe_or_a_sentence(effort: settings) -> None:
    @effort
    @given(st.lists(overrides, min_size=1, max_size=3))
    def holds(overrides: list[str]) -> None:
        require_sound(ends_well(lambda: Recipe.parse(yaml.safe_dump(SOUND), "recipe.yaml", overrides)))

    holds()


@efforts
def test_any_text_is_a_recipe_or_a_sentence(effort: settings) -> None:
    @effort
    @given(st.text(max_size=60) | st.text(alphabet="abc:-[]{}&*!|>'\"#%@`, \n\t?<=~0.2", max_size=80))
    def holds(content: str) -> None:
        require_sound(ends_well(lambda: Recipe.parse(content)))

    holds()
