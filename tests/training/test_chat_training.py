"""A run in turns of a chat: the format is saved with the model, and the engine asks as training taught."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest
from manyicl.training.estimate import sample_sequences
from manyicl.training.job import ensure_trained
from manyicl.training.recipe import Recipe
from manyicl.training.recipe_tasks import RecipeTasks
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import starting_point
from manyicl.training.train import packed_sequences, run_manifest
from tests.builders import make_example, make_task, tiny_model
from tests.episodes.chat_templates import CHATML, FAMILIES, QWEN_3_MENDED
from tests.training.recipes import small_tasks


def instruct_model(folder: Path, name: str) -> Path:
    tokenizer = FAMILIES[name].tokenizer()
    tiny_model("llama", len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_recipe(base: Path, output: Path, *overrides: str) -> Recipe:
    return Recipe.parse(
        f"""
model: {{base: {base}}}
tasks: {{train: [unused]}}
sequences: {{max_context_tokens: 400}}
format: {{kind: chat}}
training: {{num_steps: 2, sequences_per_step: 2, learning_rate: 1e-3, num_threads: 1}}
output: {output}
""",
        overrides=overrides,
    )


@pytest.mark.parametrize("lora", [False, True])
def test_the_engine_reads_the_turns_back_and_asks_as_training_taught(tmp_path: Path, lora: bool) -> None:
    base = instruct_model(tmp_path / "base", "Llama 3")
    recipe = chat_recipe(base, tmp_path / "run", *(["model.lora.rank=2"] if lora else []))
    tasks = small_tasks()
    assert ensure_trained(recipe, tasks).finished
    manifest = Manifest.read(tmp_path / "run")
    assert manifest is not None
    assert manifest.text_format.end_of_answer == "<|eot_id|>"
    engine = Engine.from_pretrained(str(tmp_path / "run"))
    assert engine.encoder.format == manifest.text_format
    sequences = packed_sequences(recipe, tasks.train, AutoTokenizer.from_pretrained(base))
    episode = sequences[0].episodes[0]
    task = next(task for task in tasks.train if task.name == episode.task_name)
    opening = engine.encoder.encode_prefix(task.instruction(), ())
    assert episode.token_ids[: len(opening)] == opening
    text = engine.encoder.decode(episode.token_ids)
    assert text.count("<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n") == len(episode.answer_spans)
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == FAMILIES["Llama 3"].template


def test_a_mended_template_is_saved_with_the_model(tmp_path: Path) -> None:
    base = instruct_model(tmp_path / "base", "Qwen3")
    with pytest.raises(UserError, match="think block"):
        ensure_trained(chat_recipe(base, tmp_path / "run"), small_tasks())
    assert not (tmp_path / "run").exists()
    mended = tmp_path / "mended.jinja"
    mended.write_text(QWEN_3_MENDED, "utf-8")
    ensure_trained(chat_recipe(base, tmp_path / "run", f"format.template={mended}"), small_tasks())
    assert AutoTokenizer.from_pretrained(tmp_path / "run").chat_template == mended.read_text("utf-8")


def test_a_run_does_not_go_on_with_another_template(tmp_path: Path) -> None:
    base = instruct_model(tmp_path / "base", "ChatML (Yi, InternLM2)")
    template = tmp_path / "turns.jinja"
    template.write_text(CHATML, "utf-8")
    recipe = chat_recipe(base, tmp_path / "run", f"format.template={template}")
    folder = RunFolder(tmp_path / "run")
    tasks = small_tasks()
    start = starting_point(recipe, tasks.train)
    sequences = packed_sequences(recipe, tasks.train, start.tokenizer)
    statistics = sample_sequences(sequences, recipe.objective)
    folder.begin(recipe, run_manifest(recipe, tasks, start, sequences.encoder.format, statistics), overwrite=False)
    template.write_text(CHATML.replace("<|im_start|>", "### "), "utf-8")
    with pytest.raises(UserError, match="the chat template changed since the run started"):
        ensure_trained(recipe, tasks, existing="resume")


def test_rows_of_held_out_tasks_are_compared_too(tmp_path: Path) -> None:
    base = instruct_model(tmp_path / "base", "ChatML (Yi, InternLM2)")
    template = tmp_path / "turns.jinja"
    template.write_text(CHATML.replace("m.content", "m.content.split('</think>')[-1]"), "utf-8")
    thinks = make_task("thinks", train=[make_example("a", "<think>b</think>c"), make_example("d", "c")], labels=None)
    tasks = RecipeTasks(small_tasks().train, (thinks,))
    with pytest.raises(UserError, match=r"Task 'thinks'.*think block"):
        ensure_trained(chat_recipe(base, tmp_path / "run", f"format.template={template}"), tasks)


def test_a_new_model_has_no_chat_template(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"format\.kind: chat takes turns from the chat template"):
        chat_recipe(tmp_path, tmp_path / "run", "model.base=null", "model.from_scratch.architecture=llama")


def test_the_dry_run_says_how_turns_end(tmp_path: Path) -> None:
    from manyicl.training.dry_run import dry_run

    base = instruct_model(tmp_path / "base", "Gemma 2")
    lines = list(dry_run(chat_recipe(base, tmp_path / "run"), small_tasks()))
    assert any("an answer ends in '<end_of_turn>'" in line for line in lines)
    assert any("opens the turn of the first query" in line for line in lines)
