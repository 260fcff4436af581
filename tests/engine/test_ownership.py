"""A prefix answers only in the engine that made it, and only after demonstrations of its own task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from manyicl.engine.engine import Engine
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.episodes.text_format import PlainFormat
from manyicl.errors import UserError
from manyicl.tasks.task import Example, Task
from tests.builders import make_example, make_task, tiny_loaded


def in_bfloat16() -> Engine:
    loaded = tiny_loaded()
    loaded.model.to(torch.bfloat16)  # type: ignore[arg-type]
    return Engine.local(loaded)


def with_other_positions() -> Engine:
    loaded = tiny_loaded()
    loaded.model.config.rope_parameters = {**loaded.model.config.rope_parameters, "rope_theta": 123.0}
    return Engine.local(loaded)


def with_another_tokenizer() -> Engine:
    loaded = tiny_loaded()
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.add_tokens(["a token that no demonstration holds"])
    return Engine.local(replace(loaded, tokenizer=tokenizer))


def with_an_adapter() -> Engine:
    loaded = tiny_loaded()
    return Engine.local(replace(loaded, fingerprint="of base and adapter", reference="adapter"))


OTHERS: dict[str, Callable[[], Engine]] = {
    "another model": lambda: Engine.local(tiny_loaded(seed=1)),
    "another precision": in_bfloat16,
    "another configuration": with_other_positions,
    "another tokenizer or text format": lambda: Engine.local(tiny_loaded(), text_format=PlainFormat(separator=" -> ")),
    "another tokenizer": with_another_tokenizer,
    "another model ": with_an_adapter,
}


@pytest.mark.parametrize("difference", OTHERS)
def test_a_prefix_of_another_engine_is_refused_wherever_it_could_be_used(difference: str, tmp_path: Path) -> None:
    engine, other, task = Engine.local(tiny_loaded()), OTHERS[difference](), make_task()
    prefix = engine.prefill(task, task.train[:4])
    uses: list[Callable[[TaskPrefix], Any]] = [
        lambda prefix: other.predict(prefix, ["film"]),
        lambda prefix: other.prefill(task, task.train[:4], reuse=prefix),
        lambda prefix: other.extend(prefix, task.train[4:5]),
        lambda prefix: other.prior(prefix),
        lambda prefix: other.save(prefix, tmp_path / "task.prefix"),
    ]
    for use in uses:
        with pytest.raises(UserError) as caught:
            use(prefix)
        assert caught.value.code == "foreign_prefix"
        assert difference.strip() in caught.value.what
    assert not list(tmp_path.iterdir())


def test_a_prefix_of_the_same_model_loaded_again_is_accepted(tmp_path: Path) -> None:
    engine, again, task = (
        Engine.local(tiny_loaded()),
        Engine.local(replace(tiny_loaded(), reference="a copy")),
        make_task(),
    )
    prefix = engine.prefill(task, task.train[:4])
    assert list(again.predict(prefix, ["film"])) == list(engine.predict(prefix, ["film"]))
    again.save(prefix, tmp_path / "task.prefix")
    assert list(engine.predict(engine.load(tmp_path / "task.prefix"), ["film"])) == list(
        engine.predict(prefix, ["film"])
    )


def test_demonstrations_may_come_from_an_iterator() -> None:
    engine, task = Engine.local(tiny_loaded()), make_task()
    expected = engine.prefill(task, task.train[:6])
    assert engine.prefill(task, iter(task.train[:6])).token_ids == expected.token_ids
    compiled = engine.compile(task, (example for example in task.train[:6]))
    assert compiled.token_ids == expected.token_ids
    assert len(compiled.answers) == 6
    extended = engine.extend(engine.prefill(task, task.train[:2]), iter(task.train[2:6]))
    assert extended.demonstrations == task.train[:6]


def test_queries_may_come_from_an_iterator_and_keep_their_room() -> None:
    engine, task = Engine.local(tiny_loaded(), max_context_tokens=300), make_task()
    long = replace(task.train[0].query, text="film " * 40)
    fitting = engine.prefill(task, task.train, iter([long])).num_shots
    assert fitting == engine.prefill(task, task.train, [long]).num_shots < engine.prefill(task, task.train).num_shots


def quiz() -> Task:
    rows = [make_example(f"film {i}", "red", ("red", "long")) for i in range(4)]
    return make_task("quiz", rows, [], labels=None, family="qa", choices_column="options")


@pytest.mark.parametrize(
    ("make", "wrong", "found"),
    [
        (make_task, make_example("film", "wonderful"), "'wonderful'"),
        (make_task, make_example("film", "good", ("good", "bad")), "('good', 'bad')"),
        (quiz, make_example("film", "red"), "nothing"),
        (quiz, make_example("film", "blue", ("red", "long")), "'blue'"),
    ],
)
def test_demonstrations_of_another_task_are_refused(make: Callable[[], Task], wrong: Example, found: str) -> None:
    engine, task = Engine.local(tiny_loaded()), make()
    shown = (task.train[0], wrong)
    prefix = engine.prefill(task, task.train[:1])
    uses: list[Callable[[], Any]] = [
        lambda: engine.prefill(task, shown),
        lambda: engine.compile(task, shown),
        lambda: engine.extend(prefix, shown),
    ]
    for use in uses:
        with pytest.raises(UserError) as caught:
            use()
        assert caught.value.code == "foreign_demonstration"
        assert caught.value.found == found
        assert "demonstration 2" in caught.value.what


def test_what_is_no_example_is_no_demonstration() -> None:
    engine, task = Engine.local(tiny_loaded()), make_task()
    rows: Any = [("film", "good")]
    with pytest.raises(UserError) as caught:
        engine.prefill(task, rows)
    assert caught.value.code == "not_an_example"
