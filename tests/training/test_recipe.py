from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.training.recipe import RENAMED_KEYS, Recipe
from tests.training.recipes import TEXT

RECIPE = TEXT + "output: runs/x\n"


def test_a_resolved_recipe_reads_back_as_itself() -> None:
    recipe = Recipe.parse(RECIPE, overrides=["model.from_scratch.config.rms_norm_eps=1e-5"])
    assert Recipe.parse(recipe.to_yaml()) == recipe
    assert recipe.model.from_scratch is not None
    assert recipe.model.from_scratch.config["rms_norm_eps"] == 1e-5


def test_overrides_are_yaml_values_under_dotted_keys() -> None:
    recipe = Recipe.parse(
        RECIPE,
        overrides=[
            "training.learning_rate=1e-4",
            "sequences.examples_per_episode=[2, 8]",
            "objective.supervise=last_answer",
            "output=a=b",
        ],
    )
    assert recipe.training.learning_rate == 1e-4
    assert recipe.sequences.examples_per_episode == (2, 8)
    assert recipe.objective.supervise == "last_answer"
    assert str(recipe.output) == "a=b"


def test_the_length_of_a_run_is_rounded_up_to_whole_steps() -> None:
    recipe = Recipe.parse(RECIPE, overrides=["training.num_steps=null", "training.num_tokens=241"])
    assert recipe.num_steps == 2  # 4 rows of 60 tokens are 240
    assert recipe.num_sequences == 8


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("training.learnig_rate=1", "unknown key 'training.learnig_rate'. Did you mean 'learning_rate'?"),
        ("model.from_scratch.tokeniser={}", "unknown key 'model.from_scratch.tokeniser'. Did you mean 'tokenizer'?"),
        ("format.end_of_anser=x", "Did you mean 'end_of_answer'?"),
        ("nothing=1", "unknown key 'nothing'. Known here: ['model', 'tasks',"),
        ("training.learning_rate=-1", "training.learning_rate: input should be greater than 0; found -1."),
        ("training.learning_rate=null", "training.learning_rate: input should be a valid number; found nothing."),
        ("training.learning_rate=.nan", "training.learning_rate: "),
        (
            "sequences.examples_per_episode=many",
            "sequences.examples_per_episode: wrong value; expected examples in an episode",
        ),
        ("sequences.examples_per_episode=[5, 2]", "1 <= least <= most"),
        ("training.evaluate_every=never", "training.evaluate_every: wrong value; expected a whole number of steps, at"),
        ("training.num_tokens=5", "give either num_tokens or num_steps; found both"),
        ("model.base=x", "give either base or from_scratch; found both"),
        ("model.lora={}", "from_scratch trains all weights"),
        ("model.quantize=4bit", "only an adapter can be trained. Remove quantize"),
        ("model={base: x, quantize: 4bit}", "only an adapter can be trained. Give lora, or remove quantize"),
        ("model={base: x, lora: {}, quantize: 8bit}", "model.quantize: input should be '4bit'; found '8bit'."),
        ("model.attention=flash", "flash computes in 16 bits; found dtype float32. Use dtype: bfloat16, or"),
        ("model.attention=flesh", "Did you mean 'flash'?"),
        ("training.liger=perhaps", "training.liger: "),
        ("objective={supervise: every_token, weighting: answer}", "every_token weighs every token 1"),
        ("training.keep_checkpoints=1", "training.keep_checkpoints: input should be greater than or equal to 2"),
        ("training.adam_betas=[0.9, 1.0]", "training.adam_betas: both must lie in [0, 1)"),
        ("training.evaluate_shots=[0, 0]", "different counts of at least 0"),
        ("model.from_scratch.tokenizer={kind: byte_bpe, vocabulary_size: 100}", "byte_bpe needs at least 300"),
        ("seed", "expected section.key=value"),
        ("sequences.examples_per_episode.more=1", "has no keys of its own"),
        ("tasks=[a: b: c", "not valid YAML"),
    ],
)
def test_a_mistake_in_a_recipe_is_named_in_one_sentence(override: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe.parse(RECIPE, "my.yaml", [override])
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_key_under_its_old_name_is_refused_with_the_new_one(old: str, new: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe.parse(RECIPE, "my.yaml", [f"{old}=1"])
    assert (error.value.code, error.value.field) == ("renamed_key", old)
    assert repr(new) in str(error.value)


def test_checkpoints_that_evaluations_make_in_any_case_are_not_asked_for_twice() -> None:
    both = ["training.evaluate_every=2", "training.save_every=4"]
    assert Recipe.parse(RECIPE, overrides=both[1:]).training.save_every == 4
    with pytest.raises(UserError, match="each evaluation makes a checkpoint already"):
        Recipe.parse(RECIPE, overrides=both)


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["tasks.mixture={weights: {nli: 3}}"], "weights have no effect with kind: uniform; write kind: weights"),
        (["tasks.mixture={kind: weights, temperature: 2, weights: {a: 1}}"], "temperature has no effect"),
        (["tasks.mixture={kind: weights}"], "kind: weights needs weights"),
        (["training.decay_share=0.5"], "decay_share has no effect with schedule: linear"),
        (["tasks.evaluate=[]", "training.evaluate_every=2"], "nothing is evaluated, so training.evaluate_every would"),
        (
            ["tasks.evaluate=[]", "training.evaluate_shots=[1]", "training.evaluate_queries=3"],
            "shots and training.evaluate_queries would",
        ),
        (["training.warmup_steps=4"], "training.warmup_steps is 4, but the run has 4 steps, so the rate never reaches"),
        (
            ["training.schedule=warmup_stable_decay", "training.decay_share=1", "training.warmup_steps=1"],
            "training.warmup_steps is 1 and warmup_stable_decay falls over 4, but the run has 4 steps",
        ),
    ],
)
def test_a_key_without_effect_and_a_rate_that_never_reaches_its_peak_are_refused(
    overrides: list[str], sentence: str
) -> None:
    with pytest.raises(UserError) as error:
        Recipe.parse(RECIPE, overrides=overrides)
    assert sentence in str(error.value)


def test_the_rate_may_fall_over_the_whole_run() -> None:
    overrides = ["training.schedule=warmup_stable_decay", "training.decay_share=1"]
    assert Recipe.parse(RECIPE, overrides=overrides).num_decay_steps == 4


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "expected the keys"),
        ("- a", "expected the keys"),
        ("model: {base: x}\nmodel: {base: y}", "2: not valid YAML, the key 'model' occurs twice"),
        ("model: {base: x}\ntasks: {train: [a]}\noutput: x", "my.yaml: the key 'training' is missing."),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=r"my\.yaml") as error:
        Recipe.parse(text, "my.yaml")
    assert sentence in str(error.value)


def test_a_recipe_may_begin_with_a_byte_order_mark_and_must_be_utf8(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text("\ufeff" + RECIPE, encoding="utf-8")
    assert Recipe.read(tmp_path / "my.yaml") == Recipe.parse(RECIPE)
    (tmp_path / "my.yaml").write_bytes(("# für\n" + RECIPE).encode("latin-1"))
    with pytest.raises(UserError, match=r"my\.yaml:1: not text in UTF-8; found the byte 0xfc"):
        Recipe.read(tmp_path / "my.yaml")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("model: {base: x}\n? [a, b]\n: c\n", "my.yaml:2: not valid YAML, a key is a list or a mapping"),
        ("output: !!int 2024-13-45\n", "my.yaml: not valid YAML, invalid literal for int()"),
        ("a: \x00\n", "my.yaml: not valid YAML, "),
        ("[" * 5000, "my.yaml: "),
        (RECIPE + "1: 2\n", "my.yaml: "),
    ],
)
def test_odd_yaml_is_one_sentence_too(text: str, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe.parse(text, "my.yaml")
    assert str(error.value).startswith(sentence)
    assert "\n" not in str(error.value)


def test_a_missing_recipe_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere.yaml: there is no recipe here"):
        Recipe.read("nowhere.yaml")


def test_a_data_root_may_lie_in_the_persons_own_folder() -> None:
    assert Recipe.parse(RECIPE, overrides=["tasks.data_root=~/data"]).tasks.data_root == Path.home() / "data"


def test_output_base_and_template_may_lie_in_the_users_own_folder() -> None:
    changes = ["model={base: ~/base}", "output=~/runs/x", "format={kind: chat, template: ~/turns.jinja}"]
    recipe = Recipe.parse(RECIPE, overrides=changes)
    assert recipe.output == Path.home() / "runs" / "x"
    assert recipe.model.base == str(Path.home() / "base")
    assert recipe.format.template == Path.home() / "turns.jinja"
