"""A model trained with a control token for the end of an answer, through every file that it leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import AutoModelForCausalLM

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.model.export import export_model
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Task
from manyicl.training.job import ensure_trained
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks
from tests.builders import byte_level_bpe, make_example, make_task, tiny_model

END = "<|im_end|>"
LETTERS = ("good film\n\nfine", "bad\n\n\nplay\n")


@pytest.fixture(name="base", scope="module")
def _base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("end") / "base"
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken(END, special=True)])
    config = tiny_model("llama", len(tokenizer)).config
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def letters() -> Task:
    rows = [make_example(f"{('a', 'the')[i % 2]} film {i // 2}", LETTERS[i % 2]) for i in range(40)]
    return make_task("letters", rows[:36], rows[36:], labels=None, family="generation", max_answer_tokens=20)


@pytest.fixture(name="trained", scope="module")
def _trained(base: Path) -> Path:
    output = base.parent / "run"
    recipe = Recipe.parse(
        f"""
model: {{base: {base}}}
tasks: {{train: [unused]}}
sequences: {{max_context_tokens: 256}}
format: {{end_of_answer: "{END}"}}
training: {{num_steps: 150, sequences_per_step: 2, learning_rate: 1e-2, num_threads: 1}}
output: {output}
"""
    )
    assert ensure_trained(recipe, RecipeTasks(train=(letters(),), held_out=())).finished
    return output


def test_answers_of_several_paragraphs_are_learnt_and_end_in_the_token(trained: Path, tmp_path: Path) -> None:
    manifest = Manifest.read(trained)
    assert manifest is not None
    assert manifest.text_format.end_of_answer == END
    engine = Engine.from_pretrained(str(trained))
    task = letters()
    compiled = engine.compile(task, task.train[:3])
    predictions = list(engine.predict(compiled, [example.query for example in task.test]))
    assert all(prediction.stopped for prediction in predictions)
    assert {prediction.answer for prediction in predictions} <= set(LETTERS)
    engine.save(compiled, tmp_path / "letters.prefix")
    loaded = engine.load(tmp_path / "letters.prefix")
    assert list(engine.predict(loaded, [example.query for example in task.test])) == predictions


def test_the_export_says_the_token_and_keeps_it(trained: Path, tmp_path: Path) -> None:
    export_model(str(trained), tmp_path / "out")
    engine = Engine.from_pretrained(str(tmp_path / "out"))
    assert engine.encoder.answer_end_id == engine.encoder.tokenizer.convert_tokens_to_ids(END)
    facts = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert facts["stop"] == {"stop_token_ids": [engine.encoder.answer_end_id]}
    assert facts["fine_tuned"]


def test_lm_eval_stops_at_the_token(trained: Path) -> None:
    pytest.importorskip("lm_eval", reason="the extra 'lm-eval' is not installed")
    from lm_eval.api.instance import Instance

    from manyicl.evaluation.harness import HarnessModel

    engine = Engine.from_pretrained(str(trained))
    task = letters()
    prefix = engine.prefill(task, task.train[:3])
    context = engine.encoder.decode((*prefix.token_ids, *engine.encoder.query_ids(task.test[0].query.text)))
    request = Instance("generate_until", {}, (context, {"until": ["###"], "max_gen_toks": 60}), 0)
    (answer,) = HarnessModel.from_pretrained(str(trained)).generate_until([request], disable_tqdm=True)
    assert answer in LETTERS


def test_a_base_takes_the_end_from_its_caller(base: Path, tmp_path: Path) -> None:
    task = letters()
    with pytest.raises(UserError, match="contain the end-of-answer text"):
        Engine.from_pretrained(str(base)).prefill(task, task.train[:2])
    engine = Engine.from_pretrained(str(base), end_of_answer=END)
    engine.prefill(task, task.train[:2])
    export_model(str(base), tmp_path / "out", end_of_answer=END)
    facts = json.loads((tmp_path / "out" / "prompt.json").read_text())
    assert (facts["text_format"]["end_of_answer"], facts["fine_tuned"]) == (END, False)
    engine.save(engine.compile(task, task.train[:2]), tmp_path / "t.prefix")
    with pytest.raises(UserError, match="another text format"):
        Engine.from_pretrained(str(base)).load(tmp_path / "t.prefix")
