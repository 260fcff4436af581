"""The engine asks in turns of a chat as plain transformers would, over the whole text."""

from __future__ import annotations

from pathlib import Path

import pytest

from manyicl.engine import engine as engine_module
from manyicl.engine.answers import AnswerEnd
from manyicl.engine.engine import Engine
from manyicl.episodes.chat_template import ChatTemplate
from manyicl.errors import UserError
from manyicl.model.load import LoadedModel, fingerprint
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Task
from tests.builders import make_task, tiny_model
from tests.engine.parts import model_of, written
from tests.episodes.chat_templates import CHATML, FAMILIES
from tests.reference.slow_engine import plain_copy, slow_greedy, slow_score

LABELS = ("good", "good film", "bad", "a", "long and bad")
QUERIES = ["film 3 was good", " box 3 was </s> good\n", "a"]
NAMES = ["ChatML (Yi, InternLM2)", "Llama 2", "Gemma 2", "Phi-3", "Vicuna", "Mistral v0.1"]


def chat_model(name: str, *, taught: bool = True) -> LoadedModel:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    model = tiny_model("llama", len(tokenizer))
    manifest = None
    if taught:
        manifest = Manifest(max_context_tokens=512, text_format=ChatTemplate(tokenizer, family.arguments).extract())
    return LoadedModel(model, tokenizer, manifest, fingerprint(model), name)


def prompt_ids(engine: Engine, task: Task, num_shots: int, query: str) -> tuple[int, ...]:
    prefix = engine.encoder.encode_prefix(task.instruction(), task.demonstrations(num_shots))
    return (*prefix, *engine.encoder.query_ids(query, engine.encoder.preceding(task.instruction(), num_shots)))


@pytest.mark.parametrize("instruction", [None, "say good or bad"])
@pytest.mark.parametrize("name", NAMES)
def test_every_label_scores_as_in_a_full_pass_over_the_conversation(name: str, instruction: str | None) -> None:
    engine = Engine.local(chat_model(name))
    plain = plain_copy(model_of(engine))
    task = make_task(labels=LABELS, instruction=instruction)
    prefix = None
    for num_shots in (0, 1, 4):
        # Each longer prefix is built on the one before, as a shot curve does.
        prefix = engine.prefill(task, task.demonstrations(num_shots), reuse=prefix)
        for query, prediction in zip(QUERIES, engine.predict(prefix, QUERIES, scores="all"), strict=True):
            before = prompt_ids(engine, task, num_shots, query)
            expected = {label: slow_score(plain, before, engine.encoder.answer_ids(label)) for label in LABELS}
            assert prediction.scores is not None
            assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-5, abs=1e-4)
            assert prediction.answer == max(expected, key=lambda label: expected[label])


@pytest.mark.parametrize("name", NAMES)
def test_retrieved_examples_stand_as_turns_between_the_prefix_and_the_query(name: str) -> None:
    engine = Engine.local(chat_model(name))
    plain = plain_copy(model_of(engine))
    task = make_task(labels=LABELS)
    near = task.train[7:9]
    for num_shots in (0, 2):
        prefix = engine.prefill(task, task.demonstrations(num_shots), retrieve=lambda _: near)
        (prediction,) = engine.predict(prefix, ["a film"], scores="all", retrieve=lambda _: near)
        shown = (*task.demonstrations(num_shots), *near)
        before = (*engine.encoder.encode_prefix("", shown), *engine.encoder.query_ids("a film"))
        assert prediction.scores is not None
        for label in LABELS:
            expected = slow_score(plain, before, engine.encoder.answer_ids(label))
            assert prediction.scores.log_probabilities[label] == pytest.approx(expected, rel=1e-5, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_generation_stops_at_the_end_of_the_turn_and_counts_its_token(name: str) -> None:
    engine = Engine.local(chat_model(name))
    encoder = engine.encoder
    plain = plain_copy(model_of(engine))
    task = make_task(labels=None, family="qa", metric="exact_match", max_answer_tokens=12)
    prefix = engine.prefill(task, task.demonstrations(3))
    eos, terminator = encoder.tokenizer.eos_token_id, encoder.format.end_of_answer
    for query, prediction in zip(QUERIES, engine.predict(prefix, QUERIES), strict=True):
        answer, log_probability = slow_greedy(
            plain,
            prompt_ids(engine, task, 3, query),
            lambda answer: terminator in encoder.decode(answer) or eos in answer,
            12,
        )
        ended_otherwise = eos in answer and terminator not in encoder.decode(answer)
        assert prediction.answer == encoder.decode_answer(answer[:-1] if ended_otherwise else answer)
        if not ended_otherwise:
            assert prediction.log_probability == pytest.approx(log_probability, rel=1e-4, abs=1e-4)


def test_the_end_of_a_turn_that_is_the_end_of_sequence_token_is_part_of_the_answer() -> None:
    encoder = Engine.local(chat_model("Llama 2")).encoder
    tokens = encoder.answer_ids("fine")
    assert tokens[-1] == encoder.tokenizer.eos_token_id
    assert written(AnswerEnd(encoder), tokens) == (len(tokens), "fine", -0.5 * len(tokens))


def test_a_compiled_task_keeps_its_turns(tmp_path: Path) -> None:
    engine = Engine.local(chat_model("Gemma 2"))
    task = make_task(labels=LABELS, instruction="say good or bad")
    engine.save(engine.compile(task, task.train[:5]), tmp_path / "toy.prefix")
    loaded = engine.load(tmp_path / "toy.prefix")
    fresh = engine.prefill(task, task.train[:5])
    assert loaded.token_ids == fresh.token_ids
    assert [p.answer for p in engine.predict(loaded, QUERIES)] == [p.answer for p in engine.predict(fresh, QUERIES)]


def test_turns_cut_just_now_are_compared_with_the_rows_of_every_task() -> None:
    loaded = chat_model("ChatML (Yi, InternLM2)", taught=False)
    # Cutting behind a word shows in rows alone.
    loaded.tokenizer.chat_template = CHATML.replace("m.content", "m.content.split(' was ')[0]")
    engine = Engine.local(loaded, text_format="chat")
    with pytest.raises(UserError, match=r"Task 'toy'.*writes this otherwise than its turns"):
        engine.prefill(make_task())


def test_an_engine_that_compares_ever_new_tasks_remembers_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "MOST_COMPARED", 3)
    engine = Engine.local(chat_model("Gemma 2", taught=False), text_format="chat")
    sizes = set()
    for number in range(7):
        task = make_task(f"toy {number}")
        engine.prefill(task, task.train[:2])
        sizes.add(len(engine._compared))
    assert sizes == {1, 2, 3}


def test_a_turn_ends_where_the_models_own_token_ends_it() -> None:
    """Its white space before the control token may be missing in what an untaught model writes."""
    encoder = Engine.local(chat_model("Llama 2")).encoder
    assert encoder.answer_end_id == encoder.tokenizer.eos_token_id
    encoder = Engine.local(chat_model("Gemma 2")).encoder
    assert encoder.answer_end_id == encoder.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    assert encoder.answer_end_id in AnswerEnd(encoder).token_ids


def test_a_model_that_was_not_fine_tuned_here_is_asked_in_its_own_turns_on_request() -> None:
    loaded = chat_model("Llama 3", taught=False)
    assert Engine.local(loaded).encoder.format.kind == "plain"
    assert Engine.local(loaded, text_format="chat").encoder.format.end_of_answer == "<|eot_id|>"
    taught = chat_model("Llama 3")
    assert Engine.local(taught).encoder.format.kind == "chat"
    with pytest.raises(UserError, match="fine-tuned in another format; expected chat, found format plain"):
        Engine.local(taught, text_format="plain")
