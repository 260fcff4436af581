"""The benchmarks of the server: their checks can fail, and they run."""

from __future__ import annotations

from dataclasses import replace

import pytest
from benchmarks import server_load, server_throughput
from benchmarks.server_load import (
    MODEL,
    Copy,
    Demonstrations,
    Sample,
    check_answers,
    check_memory,
    in_context_order,
    memory_options,
)
from benchmarks.server_process import LABELS, make_pairs, percentile, table

from manyicl.engine.engine import Engine
from manyicl.tasks.task import Task


@pytest.fixture(scope="module", name="engine")
def _engine() -> Engine:
    return Engine.from_pretrained(MODEL)


def answered(engine: Engine, demonstrations: Demonstrations, queries: list[str]) -> list[Sample]:
    copy = Copy("tsk_a", 0, {3: demonstrations})
    task = Task.from_examples("any", [(query, answer) for _, query, answer in demonstrations], labels=LABELS)
    predictions = engine.predict(engine.prefill(task, task.train), queries)
    return [
        Sample(copy, 3, query, prediction.answer, prediction.log_probability)
        for query, prediction in zip(queries, predictions, strict=True)
    ]


def test_answers_are_compared_with_those_of_an_engine_without_a_server(engine: Engine) -> None:
    pairs = make_pairs(1, 24)
    samples = answered(engine, in_context_order(range(1, 25), pairs), [query for query, _ in make_pairs(2, 9)])
    largest, problems = check_answers(engine, samples)
    assert largest < 1e-4
    assert problems == []
    first = samples[0]
    other = next(label for label in LABELS if label != first.answer)
    for wrong in (
        replace(first, log_probability=first.log_probability + 3e-4),
        replace(first, answer=other),
        replace(first, version=4),
    ):
        assert len(check_answers(engine, [*samples[1:], wrong])[1]) == 1


def test_another_order_of_demonstrations_is_noticed(engine: Engine) -> None:
    pairs = make_pairs(1, 24)
    samples = answered(engine, in_context_order(range(1, 25), pairs), [query for query, _ in make_pairs(2, 9)])
    copy = Copy("tsk_a", 0, {3: in_context_order(range(1, 25), pairs)[::-1]})
    assert check_answers(engine, [replace(sample, copy=copy) for sample in samples])[1]


@pytest.mark.parametrize(("late", "is_wrong"), [(104.0, False), (106.0, True), (94.0, True)])
def test_memory_of_the_last_minute_is_that_of_the_second(late: float, is_wrong: bool) -> None:
    memory = [(float(second), 900.0 if second < 60 else 100.0 if second < 500 else late) for second in range(601)]
    sentence, problems = check_memory(memory)
    assert sentence.startswith(f"100 MiB, at the end {late:.0f} MiB")
    assert bool(problems) == is_wrong


def test_there_is_memory_for_ten_prefixes_of_two_hundred(engine: Engine) -> None:
    _, memory, _, disk = memory_options(engine, 200)
    assert 5 < int(memory) < int(disk) < 20 * int(memory)


def test_tables_and_percentiles() -> None:
    assert table([{"a": "1", "b": "2"}]) == "| a | b |\n| --- | ---: |\n| 1 | 2 |"
    assert [percentile(list(range(1, 101)), share) for share in (0.5, 0.95, 1.0)] == [50, 95, 100]


@pytest.mark.server
@pytest.mark.timeout(1200)
def test_the_load_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--minutes", "0.3", "--tasks", "8", "--keys", "3", "--workers", "4", "--checked", "40"]
    code = server_load.main(words)
    output = capsys.readouterr().out
    assert code == 0, output
    assert "40 of" in output
    assert "hang up" in output


@pytest.mark.server
@pytest.mark.timeout(1200)
def test_the_measurement_of_throughput_runs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", MODEL, "--tasks", "1", "3", "--clients", "1", "4", "--seconds", "1", "--threads", "1"]
    server_throughput.main([*words, "--demonstrations", "20", "--many", "200", "--restarts", "1"])
    output = capsys.readouterr().out
    assert output.count("0 of ") == 4, output
    assert "prefixes deleted" in output
