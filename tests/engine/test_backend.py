"""The engine on a backend that is not ours; what every backend is promised; work that ends or gives way on request."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, OPTConfig, PreTrainedConfig

from manyicl.engine.answers import AnswerEnd
from manyicl.engine.backend import Sampling
from manyicl.engine.engine import READ_AHEAD_QUERIES, Engine
from manyicl.engine.local import LocalBackend
from manyicl.engine.prefix_cache import CHUNK_SECONDS, MOST_CHUNK_TOKENS, PrefixCache
from manyicl.engine.queries import in_batches
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.episodes.encoding import Encoder
from manyicl.errors import UserError
from manyicl.model.load import load_model
from manyicl.tasks.task import Task
from tests.builders import byte_level_bpe, make_example, make_task, tiny_loaded
from tests.engine.parts import model_of, refused
from tests.engine.plain_backend import PlainBackend
from tests.model.exports import save_adapter, save_model
from tests.reference.slow_engine import plain_copy, slow_score

LABELS = ("good", "good film", "bad", "a", "long and bad")
ROWS: list[Any] = [{"text": "film", "options": ["door", "box"]}, {"text": "play 3", "options": ["red", "one", "a"]}]


def quiz() -> Task:
    train = [make_example(f"film {i}", ("red", "long")[i % 2], ("red", "long", "box")) for i in range(6)]
    return make_task("quiz", train, [], labels=None, family="qa", choices_column="options")


def free() -> Task:
    return make_task(labels=None, family="qa", metric="exact_match", max_answer_tokens=7)


def plain_engine(name: str = "plain") -> tuple[Engine, PlainBackend]:
    tokenizer = byte_level_bpe()
    backend = PlainBackend(len(tokenizer), name)
    return Engine(backend, tokenizer), backend


@pytest.mark.parametrize("task", [make_task(labels=LABELS), quiz()], ids=["labels", "choices per row"])
def test_another_backend_serves_closed_answers(task: Task) -> None:
    engine, backend = plain_engine()
    prefix = engine.prefill(task, task.train[:5])
    predictions = list(engine.predict(prefix, ROWS, scores="all"))
    for row, prediction, best in zip(ROWS, predictions, engine.predict(prefix, ROWS), strict=True):
        query = task.query(row)
        before = (*prefix.token_ids, *engine.encoder.query_ids(query.text))
        options = query.choices or LABELS
        expected = {one: backend.log_probability(before, engine.encoder.answer_ids(one)) for one in options}
        assert prediction.scores is not None
        assert prediction.scores.log_probabilities == pytest.approx(expected)
        assert prediction.answer == best.answer == max(expected, key=lambda option: expected[option])
        assert prediction.num_shots == 5


def test_another_backend_serves_free_answers() -> None:
    engine, backend = plain_engine()
    task = free()
    prefix = engine.prefill(task, task.train[:3])
    for row, prediction in zip(ROWS, engine.predict(prefix, ROWS), strict=True):
        before = (*prefix.token_ids, *engine.encoder.query_ids(row["text"]))
        tokens: list[int] = []
        end = AnswerEnd(engine.encoder)
        while len(tokens) < 7 and not (tokens and end.ended(tokens)):
            scores = backend.log_probabilities((*before, *tokens)[-3:])
            tokens.append(scores.index(max(scores)))
        text = [token for token in tokens if token != engine.encoder.tokenizer.eos_token_id]
        assert prediction.answer == engine.encoder.decode_answer(text)
        assert prediction.stopped == end.ended(tokens)


def test_another_backend_extends_answers_streams_and_refuses_what_only_ours_can_do(tmp_path: Path) -> None:
    engine, _ = plain_engine()
    task = make_task()
    prefix = engine.extend(engine.prefill(task, task.train[:2]), task.train[2:4])
    assert prefix.num_reused_tokens > 0
    streamed = list(engine.answer(task, task.train[:4], iter(["film", "play"])))
    assert streamed == list(engine.predict(prefix, ["film", "play"]))
    with refused("backend_cannot_compile"):
        engine.compile(task, task.train[:2])
    with refused("backend_cannot_compile"):
        engine.load(tmp_path / "task.prefix")
    other, _ = plain_engine("another")
    with refused("foreign_prefix"):
        other.predict(prefix, ["film"])


def test_the_engine_and_another_backend_run_where_torch_is_missing(tmp_path: Path) -> None:
    byte_level_bpe().save_pretrained(tmp_path)
    script = """
import sys
sys.modules["torch"] = None  # any import of it fails
from transformers import PreTrainedTokenizerFast
from manyicl.engine.engine import Engine
from manyicl.tasks.task import Example, Query, Task
from tests.engine.plain_backend import PlainBackend
tokenizer = PreTrainedTokenizerFast(tokenizer_file=sys.argv[1])
engine = Engine(PlainBackend(len(tokenizer)), tokenizer)
pairs = [("film", "good"), ("film film", "bad")]
closed = Task.from_examples("mood", pairs, labels=("good", "bad"))
free = Task.from_examples("free", pairs, max_answer_tokens=4)
chosen = closed.with_spec(labels=None, choices_column="options")
shots = [Example(Query("film", ("good", "bad")), "good", ("good",))]
for task, rows, demonstrations in (
    (closed, ["film"], closed.train), (free, ["film"], free.train),
    (chosen, [Query("film", ("bad", "film"))], shots),
):
    (prediction,) = engine.predict(engine.prefill(task, demonstrations, rows), rows)
    print(prediction.as_json())
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "tokenizer.json")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 3


def test_a_query_is_rendered_once_and_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task()
    rendered: Counter[str] = Counter()
    encoded: Counter[str] = Counter()
    render, encode = Task.query, Encoder._encode

    def count_rendered(self: Task, row: Any) -> Any:
        rendered[str(row)] += 1
        return render(self, row)

    def count_encoded(self: Encoder, pieces: Any, opens_sequence: bool = False) -> Any:
        pieces = tuple(pieces)
        encoded["".join(segment.text for segment in pieces).strip()] += 1
        return encode(self, pieces, opens_sequence)

    monkeypatch.setattr(Task, "query", count_rendered)
    monkeypatch.setattr(Encoder, "_encode", count_encoded)
    rows = [f"film number {i}" for i in range(12)]
    assert len(list(engine.answer(task, task.train[:8], rows))) == 12
    queries = list(engine.encode_queries(task, [f"box number {i}" for i in range(12)]))
    assert len(list(engine.predict(engine.prefill(task, task.train[:8], queries), queries))) == 12
    assert len(rendered) == 24
    assert set(rendered.values()) == {1}
    ours = {text: count for text, count in encoded.items() if "number" in text}
    assert len(ours) == 24
    assert set(ours.values()) == {1}


def test_a_longer_query_later_in_a_stream_takes_demonstrations_from_there_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.engine.engine.FITTED_QUERIES", 4)
    engine = Engine.local(tiny_loaded(), max_context_tokens=200)
    task = make_task()
    rows = [*["film"] * 4, "film " * 30, *["play"] * 3]
    prefixes: list[TaskPrefix] = []
    predictions = list(engine.answer(task, task.train, rows, on_prefix=prefixes.append))
    first, second = prefixes
    assert first.num_shots > second.num_shots > 0
    assert second.demonstrations == tuple(one for one in first.demonstrations if one in second.demonstrations)
    assert second.num_dropped == len(task.train) - second.num_shots
    assert [one.num_shots for one in predictions] == [first.num_shots] * 4 + [second.num_shots] * 4
    alone = list(engine.predict(second, rows[4:]))
    assert [one.answer for one in predictions[4:]] == [one.answer for one in alone]


def test_a_query_that_never_fits_takes_no_demonstration_from_the_others() -> None:
    engine = Engine.local(tiny_loaded(), max_context_tokens=200)
    task = make_task()
    answers = engine.answer(task, task.train, ["film", "film " * 300, "play"])
    assert next(answers).num_shots > 3
    with refused("query_too_long", row=2):
        next(answers)


def test_items_before_one_that_raises_are_kept_whatever_list_extend_does() -> None:
    def items() -> Any:
        yield from (1, 2, 3, 4, 5)
        raise UserError("wrong", "it is wrong")

    batches = in_batches(items(), 2)
    assert [next(batches), next(batches), next(batches)] == [[1, 2], [3, 4], [5]]
    with refused("wrong"):
        next(batches)
    assert list(in_batches(iter(range(5)), 5)) == [[0, 1, 2, 3, 4]]


def test_tokens_come_as_they_are_written_and_closing_the_iterator_ends_the_work() -> None:
    loaded = tiny_loaded()
    backend = LocalBackend(loaded)
    end = AnswerEnd(Encoder(loaded.tokenizer))
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    prefix = backend.prefill([5, 9, 33])
    loaded.model.register_forward_pre_hook(count)
    tokens = backend.generate(prefix, [(7, 8), (9, 3)], end, 50)
    assert calls == 0
    first = next(tokens)
    assert calls == 1
    assert {first.query, next(tokens).query} == {0, 1}
    next(tokens)
    tokens.close()
    assert calls == 2
    whole = list(backend.generate(prefix, [(7, 8), (9, 3)], end, 5))
    assert sorted(token.query for token in whole if token.is_last) == [0, 1]
    assert max(Counter(token.query for token in whole).values()) <= 5


def test_closing_predictions_ends_generation() -> None:
    loaded = tiny_loaded()
    engine = Engine.local(loaded)
    task = free()
    prefix = engine.prefill(task, task.train[:2])
    calls = 0

    def count(*_: Any) -> None:
        nonlocal calls
        calls += 1

    loaded.model.register_forward_pre_hook(count)
    predictions = engine.predict(prefix, (f"film {i}" for i in range(3 * READ_AHEAD_QUERIES)))
    next(predictions)
    before = calls
    predictions.close()  # type: ignore[attr-defined]
    assert calls == before


class InterruptedPrefillError(Exception):
    """Raised between two chunks."""


def test_a_prefill_gives_way_between_chunks_and_can_be_ended() -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task()
    seen: list[tuple[int, int]] = []
    other = engine.prefill(task, task.train[:2])
    expected = list(engine.predict(other, ["play"]))

    def work(num_done: int, num_tokens: int) -> None:
        seen.append((num_done, num_tokens))
        assert list(engine.predict(other, ["play"])) == expected

    prefix = engine.prefill(task, task.train[:30], between_chunks=work)
    assert seen
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert all(done < total == prefix.num_tokens for done, total in seen)
    at_once = engine.prefill(task, task.train[:30])
    for one, two in zip(engine.predict(prefix, ["film"]), engine.predict(at_once, ["film"]), strict=True):
        assert one.log_probability == pytest.approx(two.log_probability, abs=1e-5)

    def end(num_done: int, num_tokens: int) -> None:
        raise InterruptedPrefillError

    with pytest.raises(InterruptedPrefillError):
        engine.extend(other, task.train[2:30], between_chunks=end)
    assert list(engine.predict(other, ["play"])) == expected
    assert 0 < CHUNK_SECONDS < 1 < MOST_CHUNK_TOKENS


def test_a_prefix_grows_by_labels_it_has_not_seen() -> None:
    """Without labels in the instruction the keys are kept; with them all is rebuilt from the first changed token."""
    rows = [make_example(f"film {i}", ("good", "bad", "fine")[i % 3]) for i in range(9)]
    for instruction, rebuilt in (("How was it?", False), ("Say {{ labels | join(' or ') }}.", True)):
        engine = Engine.local(tiny_loaded())
        task = make_task(labels=("good", "bad"), instruction=instruction)
        prefix = engine.prefill(task, task.train[:4])
        with refused("foreign_demonstration"):
            engine.extend(prefix, rows[2:3])
        extended = engine.extend(prefix, rows, labels=("good", "bad", "fine"))
        assert extended.rebuilt is rebuilt
        assert (extended.num_reused_tokens == prefix.num_tokens) is not rebuilt
        whole = make_task(labels=("good", "bad", "fine"), instruction=instruction)
        at_once = engine.prefill(whole, (*task.train[:4], *rows))
        assert extended.token_ids == at_once.token_ids
        one, two = (next(engine.predict(some, ["box"], scores="all")) for some in (extended, at_once))
        assert one.scores is not None
        assert two.scores is not None
        assert one.scores.log_probabilities == pytest.approx(two.scores.log_probabilities, abs=1e-4)
        with refused("foreign_demonstration"):
            engine.extend(extended, (), labels=("good", "bad"))
        with refused("not_a_list", field="labels"):
            engine.extend(extended, (), labels="hat")


GPT2 = GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, bos_token_id=None, eos_token_id=None)
OPT = OPTConfig(
    hidden_size=32,
    ffn_dim=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
    word_embed_proj_dim=32,
    bos_token_id=None,
    eos_token_id=None,
)


@pytest.mark.parametrize("config", [GPT2, OPT], ids=lambda config: config.model_type)
def test_a_model_whose_configuration_names_its_inner_size_otherwise_answers_like_plain_transformers(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    tokenizer = byte_level_bpe()
    config = type(config)(**{**config.to_dict(), "vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = Engine.local(load_model(tmp_path))
    task = make_task(labels=LABELS)
    prefix = engine.prefill(task, task.train[:3])
    (prediction,) = engine.predict(prefix, ["film"], scores="all")
    plain = plain_copy(model_of(engine))
    before = (*prefix.token_ids, *engine.encoder.query_ids("film"))
    expected = {label: slow_score(plain, before, engine.encoder.answer_ids(label)) for label in LABELS}
    assert prediction.scores is not None
    assert prediction.scores.log_probabilities == pytest.approx(expected, rel=1e-4, abs=1e-4)
    (written,) = engine.predict(engine.prefill(free(), free().train[:2]), ["film"])
    assert written.log_probability < 0


def test_options_longer_than_a_trie_holds_score_like_short_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task(labels=LABELS)
    prefix = engine.prefill(task, task.train[:5])
    expected = list(engine.predict(prefix, ROWS, scores="all"))
    for most in (1, 3):
        monkeypatch.setattr("manyicl.engine.local.MOST_TRIE_TOKENS", most)
        for one, two in zip(engine.predict(prefix, ROWS, scores="all"), expected, strict=True):
            assert one.scores is not None
            assert two.scores is not None
            assert one.scores.log_probabilities == pytest.approx(two.scores.log_probabilities, abs=1e-4)
        assert [one.answer for one in engine.predict(prefix, ROWS)] == [one.answer for one in expected]


def test_a_prediction_becomes_json() -> None:
    engine = Engine.local(tiny_loaded())
    (one,) = engine.predict(engine.prefill(make_task()), ["film"], scores="all", abstain_below=1)
    known = one.as_json()
    assert known["answer"] is None
    assert known["abstained"]
    assert set(known["scores"]) == set(known["probabilities"]) == {"good", "bad"}
    assert replace(one, abstained=False).as_json()["answer"] == one.answer


def test_what_is_no_prefix_and_no_list_is_refused() -> None:
    engine = Engine.local(tiny_loaded())
    task = make_task()
    nothing: Any = None
    with refused("not_a_prefix", found="NoneType"):
        engine.predict(nothing, ["film"])
    compiled = engine.compile(task, task.train[:1])
    for rows in (nothing, "film", {"text": "film"}):
        with refused("not_a_list"):
            engine.predict(compiled, rows)


def test_a_model_folder_may_be_a_path(tmp_path: Path) -> None:
    loaded = tiny_loaded()
    loaded.model.save_pretrained(tmp_path)
    loaded.tokenizer.save_pretrained(tmp_path)
    assert Engine.from_pretrained(tmp_path).identity.reference == str(tmp_path)


def test_draws_depend_on_the_number_of_the_query_in_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.engine.engine.FITTED_QUERIES", 3)
    engine = Engine.local(tiny_loaded())
    task = free()
    rows = [f"film {i % 4}" for i in range(10)]
    sampling = Sampling(seed=3)
    streamed = [one.answer for one in engine.answer(task, task.train[:2], rows, sampling=sampling)]
    prefix = engine.prefill(task, task.train[:2])
    assert streamed == [one.answer for one in engine.predict(prefix, rows, sampling=sampling)]


def test_a_cache_of_another_kind_is_refused() -> None:
    local, (plain, _) = Engine.local(tiny_loaded()), plain_engine()
    task = make_task()
    prefix = plain.prefill(task, task.train[:2])
    disguised = replace(prefix, cache=replace(prefix.cache, identity=local.backend.identity))  # type: ignore[type-var]
    with refused("foreign_prefix"):
        list(local.predict(disguised, ["film"]))
    assert isinstance(local.prefill(task).cache, PrefixCache)


def test_a_merged_adapter_answers_as_the_adapter_over_its_base(tmp_path: Path) -> None:
    task = make_task(labels=LABELS)
    save_adapter(tmp_path / "adapter", save_model(tmp_path / "base"))
    merged = Engine.from_pretrained(tmp_path / "adapter", device="cpu")
    apart = Engine.local(load_model(tmp_path / "adapter", device="cpu"))
    bare = Engine.from_pretrained(tmp_path / "base", device="cpu")
    assert merged.identity == apart.identity
    assert not isinstance(model_of(merged), PeftModel)
    assert isinstance(model_of(apart), PeftModel)
    assert isinstance(model_of(Engine.from_pretrained(tmp_path / "adapter", device="cpu", dtype="bfloat16")), PeftModel)
    scores = [
        [prediction.log_probability for prediction in engine.predict(engine.prefill(task, task.train[:5]), ROWS)]
        for engine in (merged, apart, bare)
    ]
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    assert scores[0] != pytest.approx(scores[2], abs=1e-3)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"alora_invocation_tokens": [5]}])
def test_an_adapter_that_peft_cannot_merge_answers_over_its_base(settings: dict[str, Any], tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", save_model(tmp_path / "base"), target_modules=["q_proj"], **settings)
    engine = Engine.from_pretrained(tmp_path / "adapter", device="cpu")
    assert isinstance(model_of(engine), PeftModel)
    task = make_task(labels=LABELS)
    assert len(list(engine.predict(engine.prefill(task, task.train[:5]), ROWS))) == len(ROWS)


def test_a_misspelt_option_of_predict_is_refused_with_the_nearest() -> None:
    engine, _ = plain_engine()
    task = make_task(labels=LABELS)
    prefix = engine.prefill(task, task.train[:5])
    with refused("unknown_option", field="abstain_bellow", remedy="Did you mean 'abstain_below'?"):
        engine.predict(prefix, ROWS, abstain_bellow=0.9)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"dtype": 5}, "unknown_dtype"),
        ({"text_format": "Chat"}, "unknown_value"),
        ({"max_context_tokens": "a"}, "out_of_range"),
        ({"max_context_tokens": 8.5}, "out_of_range"),
        ({"max_context_tokens": True}, "out_of_range"),
        ({"activation_budget_mib": "a"}, "out_of_range"),
    ],
)
def test_values_that_are_not_known_are_refused(options: dict[str, Any], code: str) -> None:
    with refused(code):
        Engine.from_pretrained("builtin:nano", **options)


@pytest.mark.parametrize("value", [None, 5, [1]])
def test_what_names_no_model_and_no_file_is_refused(value: Any) -> None:
    engine, _ = plain_engine()
    found = "nothing" if value is None else str(value)
    with refused("not_a_reference", found=found):
        Engine.from_pretrained(value)
    with refused("not_a_path", what="this names no file", found=found):
        engine.load(value)
    prefix = engine.prefill(make_task(labels=LABELS))
    with refused("not_a_path", what="this names no file", found=found):
        engine.save(prefix, value)
