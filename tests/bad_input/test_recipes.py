"""Mistakes in recipes, in what --set puts over them, and in where a run is to end up."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bad_input.case import Case, accepted, meet, refused, table_of
from tests.bad_input.files import RECIPE, TRAIN, recipe, spoilt, task

TRAINED = "train recipe.yaml"
DRY = "train recipe.yaml --dry-run"
DOCTOR = "doctor recipe.yaml"


def put(override: str) -> str:
    return f"{TRAINED} --set '{override}'"


READING = [
    refused(
        "a recipe that does not exist",
        "train recip.yaml",
        "missing_file",
        file="recip.yaml",
        remedy="Did you mean 'recipe.yaml'?",
        says=("recip.yaml: there is no recipe here. Did you mean 'recipe.yaml'?",),
        files=recipe(),
    ),
    refused("a folder for a recipe", "train t", "not_a_file", file="t", expected="a recipe", files=recipe()),
    refused(
        "a link to itself for a recipe",
        "train recipe.yaml",
        "missing_file",
        file="recipe.yaml",
        remedy="recipe.yaml is a link that leads nowhere",
        prepare=lambda folder: (folder / "recipe.yaml").symlink_to("recipe.yaml"),
    ),
    Case(
        "a task file for a recipe",
        "train t/task.yaml",
        ("t/task.yaml: unknown key 'family'. Known here: ['model', 'tasks'",),
        recipe(),
    ),
    Case("a table for a recipe", "train t/train.jsonl", ("t/train.jsonl:2: not valid YAML",), recipe()),
    refused(
        "an empty recipe",
        TRAINED,
        "no_mapping",
        file="recipe.yaml",
        expected="the keys model, tasks",
        found="nothing",
        files=recipe(""),
    ),
    refused("a recipe of comments", DOCTOR, "no_mapping", found="nothing", files=recipe("# later\n")),
    refused("a list for a recipe", TRAINED, "no_mapping", found="['model']", files=recipe("- model\n")),
    refused("a number for a recipe", TRAINED, "no_mapping", found="5", files=recipe("5\n")),
    Case(
        "a tab in a recipe",
        TRAINED,
        ("recipe.yaml:2: not valid YAML", "Indent with spaces"),
        recipe("model:\n\tbase: x\n"),
    ),
    Case(
        "a section that stands twice",
        TRAINED,
        ("recipe.yaml:10: not valid YAML, the key 'output' occurs twice",),
        recipe(RECIPE + "output: b\n"),
    ),
    Case(
        "an unknown section",
        DOCTOR,
        ("recipe.yaml: unknown key 'trainig'. Did you mean 'training'?",),
        recipe(RECIPE + "trainig: {}\n"),
    ),
    Case(
        "an unknown key in a section",
        DRY,
        ("recipe.yaml: unknown key 'training.learning_rat'. Did you mean 'learning_rate'?",),
        recipe(spoilt("learning_rate", "learning_rat")),
    ),
    Case("a key that is a number", TRAINED, ("recipe.yaml: ", "1"), recipe(RECIPE + "1: 2\n")),
    Case("a key that is true", TRAINED, ("recipe.yaml: ", "True"), recipe(RECIPE + "yes: 2\n")),
    Case("a key that is nothing", TRAINED, ("recipe.yaml: ", "None"), recipe(RECIPE + "~: 2\n")),
    Case(
        "a key that is a date", TRAINED, ("recipe.yaml: unknown key '2024-01-01'",), recipe(RECIPE + "2024-01-01: 2\n")
    ),
    Case(
        "no learning rate",
        TRAINED,
        ("recipe.yaml: the key 'training.learning_rate' is missing, peak rate of AdamW.",),
        recipe(spoilt("learning_rate: 1e-2, ", "")),
    ),
    Case(
        "no output",
        TRAINED,
        ("recipe.yaml: the key 'output' is missing, folder of the finished model",),
        recipe(spoilt("output: run\n", "")),
    ),
    Case(
        "a section that is a word",
        TRAINED,
        ("recipe.yaml: training: ", "found 'fast'"),
        recipe(spoilt("{num_steps: 2, sequences_per_step: 2, learning_rate: 1e-2, num_threads: 1}", "fast")),
    ),
    Case(
        "a section without values",
        TRAINED,
        ("recipe.yaml: training: ", "found nothing"),
        recipe(spoilt("{num_steps: 2, sequences_per_step: 2, learning_rate: 1e-2, num_threads: 1}", "")),
    ),
    Case(
        "aliases of aliases",
        TRAINED,
        ("recipe.yaml:", "more than 100,000 values"),
        recipe(
            "a: &a [x, x, x, x, x, x, x, x, x, x]\n"
            + "".join(f"b{i}: &b{i} [{', '.join(['*a' if i == 0 else f'*b{i - 1}'] * 10)}]\n" for i in range(9))
        ),
    ),
    Case(
        "aliases that are merged",
        TRAINED,
        ("recipe.yaml:", "more than 100,000 values"),
        recipe(
            "a0: &a0 {x: 1}\n"
            + "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
        ),
    ),
    Case(
        "a recipe in UTF-16",
        TRAINED,
        ("recipe.yaml: the file is UTF-16",),
        {**task(), "recipe.yaml": RECIPE.encode("utf-16")},
    ),
    Case(
        "a recipe of NUL bytes",
        TRAINED,
        (
            "recipe.yaml:1: ",
            "a NUL byte",
        ),
        {**task(), "recipe.yaml": bytes(100)},
    ),
    Case(
        "a tag that its value does not fit",
        TRAINED,
        ("recipe.yaml: not valid YAML, invalid literal for int()",),
        recipe(spoilt("output: run", "output: !!int run")),
    ),
    Case(
        "a tag of no value",
        TRAINED,
        ("recipe.yaml:9: not valid YAML", "timestamp", "Leave the tag out"),
        recipe(spoilt("output: run", "output: !!timestamp now")),
    ),
    Case(
        "the number of no character",
        TRAINED,
        ("recipe.yaml: not valid YAML", "too large"),
        recipe(spoilt("output: run", 'output: "\\Uffffffff"')),
    ),
    accepted(
        "a folder of a date, and an equals sign",
        DOCTOR,
        "recipe.yaml",
        files=recipe(spoilt("output: run", "output: 2024-01-01") + "format: {separator: =}\n"),
    ),
    accepted(
        "a byte order mark and CRLF in a recipe",
        DOCTOR,
        "recipe.yaml",
        files={**task(), "recipe.yaml": ("\ufeff" + RECIPE).replace("\n", "\r\n")},
    ),
]

VALUES = [
    Case(
        "a number that is none",
        put("training.learning_rate=.nan"),
        ("training.learning_rate: ", "finite number", "found nan"),
        recipe(),
    ),
    Case(
        "a number without end",
        put("training.learning_rate=.inf"),
        ("training.learning_rate: ", "finite number"),
        recipe(),
    ),
    Case(
        "a number that becomes endless",
        put("training.learning_rate=1e999"),
        ("training.learning_rate: ", "finite number"),
        recipe(),
    ),
    Case(
        "no steps",
        put("training.num_steps=0"),
        ("training.num_steps: input should be greater than or equal to 1; found 0",),
        recipe(),
    ),
    Case("steps below zero", put("training.num_steps=-3"), ("training.num_steps: ", "found -3"), recipe()),
    Case("half a step", put("training.num_steps=2.5"), ("training.num_steps: ", "found 2.5"), recipe()),
    Case("steps in words", put("training.num_steps=many"), ("training.num_steps: ", "found 'many'"), recipe()),
    Case(
        "true for a number of steps",
        put("training.num_steps=true"),
        ("training.num_steps: expected a number; found True",),
        recipe(),
    ),
    Case(
        "true among shots",
        put("training.evaluate_shots=[0, true]"),
        ("training.evaluate_shots: expected a number; found [0, True]",),
        recipe(),
    ),
    Case(
        "true for a weight",
        put("tasks.mixture={kind: weights, weights: {t: true}}"),
        ("tasks.mixture.weights: expected a number",),
        recipe(),
    ),
    Case(
        "more steps than anyone counts",
        put(f"training.num_steps={10**30}"),
        ("training.num_steps: expected a number of at most 2,147,483,647",),
        recipe(),
    ),
    Case(
        "a number of ten thousand digits",
        put(f"training.num_steps={'9' * 10_000}"),
        ("--set training.num_steps=999", "not valid YAML"),
        recipe(),
    ),
    Case(
        "more tokens than anyone counts",
        put(f"training={{num_tokens: {10**40}, learning_rate: 1}}"),
        ("training.num_tokens: ", "less than or equal to"),
        recipe(),
    ),
    Case(
        "a seed that no generator takes",
        put(f"training.seed={2**40}"),
        ("training.seed: ", "less than or equal to"),
        recipe(),
    ),
    Case(
        "a seed below zero",
        f"{TRAINED} --seed -1",
        ("training.seed: ", "greater than or equal to 0; found -1"),
        recipe(),
    ),
    Case(
        "a context wider than any",
        put(f"sequences.max_context_tokens={10**20}"),
        ("sequences.max_context_tokens: expected a number of at most 2,147,483,647",),
        recipe(),
    ),
    Case(
        "a context of seven tokens",
        put("sequences.max_context_tokens=7"),
        ("sequences.max_context_tokens: ", "greater than or equal to 8; found 7"),
        recipe(),
    ),
    Case(
        "an endless temperature",
        put("tasks.mixture={kind: size, temperature: .inf}"),
        ("tasks.mixture.temperature: ", "finite number"),
        recipe(),
    ),
    Case(
        "a weight that is no number",
        put("tasks.mixture={kind: weights, weights: {t: .nan}}"),
        ("tasks.mixture.weights.t: ", "finite number"),
        recipe(),
    ),
    Case(
        "a weight for a task that is not there",
        put("tasks.mixture={kind: weights, weights: {u: 1}}"),
        ("'u'",),
        recipe(),
    ),
    Case("no tasks", put("tasks.train=[]"), ("tasks.train: list should have at least 1 item",), recipe()),
    Case("tasks in one word", put("tasks.train=t"), ("tasks.train: ", "list", "found 't'"), recipe()),
    Case("a task that does not exist", put("tasks.train=[u]"), ("The task 'u' does not exist",), recipe()),
    Case(
        "a held-out task of the same source",
        put("tasks.evaluate=[t]"),
        ("tasks.evaluate: 't' comes from the same source ('t')", "Leave one of them out"),
        recipe(),
    ),
    Case(
        "both lengths of a run",
        put("training.num_tokens=100"),
        ("give either num_tokens or num_steps; found both",),
        recipe(),
    ),
    Case("a base and a new model", put("model.base=x"), ("give either base or from_scratch; found both",), recipe()),
    Case(
        "a task that is broken",
        DRY,
        ("t/train.jsonl:9: the query is empty",),
        recipe(train=[*TRAIN, {"text": "", "label": "good"}]),
    ),
    refused(
        "--set without a value",
        f"{TRAINED} --set training.num_steps",
        "wrong_override",
        file="--set training.num_steps",
        expected="section.key=value",
        files=recipe(),
    ),
    refused("--set without a key", f"{TRAINED} --set =5", "wrong_override", file="--set =5", files=recipe()),
    refused("--set with half a key", f"{TRAINED} --set training.=5", "wrong_override", files=recipe()),
    refused(
        "--set below a value",
        f"{TRAINED} --set output.folder=5",
        "wrong_override",
        field="output.folder",
        what="'output' is 'run', which has no keys of its own",
        files=recipe(),
    ),
    Case(
        "--set of a whole section to nothing", f"{TRAINED} --set training=", ("training: ", "found nothing"), recipe()
    ),
    Case(
        "--set of broken YAML",
        put("training.num_steps=[1, 2"),
        ("--set training.num_steps=[1, 2: not valid YAML",),
        recipe(),
    ),
    Case("--set over two lines", put("training.num_steps=[\n1"), ("not valid YAML",), recipe()),
    Case(
        "--set of a misspelt key",
        f"{TRAINED} --set training.sed=1",
        ("recipe.yaml: unknown key 'training.sed'. Did you mean 'seed'?",),
        recipe(),
    ),
    refused("--set for a doctor without a recipe", "doctor --set training.seed=1", "missing_argument"),
    refused("resuming and starting anew", f"{TRAINED} --resume --overwrite", "conflicting_options", files=recipe()),
    Case("mixture weights without the kind", put("tasks.mixture={weights: {u: 3}}"), ("have no effect",), recipe()),
    Case("evaluations of nothing", put("training.evaluate_every=1"), ("without tasks.evaluate nothing",), recipe()),
    refused(
        "a key under its old name",
        put("rows.max_context_tokens=100"),
        "renamed_key",
        field="rows",
        says=("the key 'rows' is called 'sequences' now. Rename it.",),
        files=recipe(),
    ),
    refused(
        "more labels than words to rename them",
        put("sequences.rename_labels=0.5"),
        "too_few_words",
        field="sequences.rename_labels",
        files=recipe(
            train=[{"text": f"{number} {number}", "label": ["good", "bad"][number % 2]} for number in range(8)]
        ),
    ),
]


@table_of([*READING, *VALUES])
def test_a_mistake_in_a_recipe_is_one_sentence(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(case, tmp_path, monkeypatch, capsys)


def test_processes_that_are_no_number_are_a_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    for command in (TRAINED, DOCTOR, DRY):
        case = refused("a word", command, "wrong_environment", field="WORLD_SIZE", found="'abc'", files=recipe())
        meet(case, tmp_path, monkeypatch, capsys)
