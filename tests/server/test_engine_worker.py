"""The worker answers as the engine does, whoever waits; it takes turns, and outlives whatever fails."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from manyicl.engine import prefix_cache
from manyicl.engine.backend import Sampling
from manyicl.engine.engine import Engine
from manyicl.engine.prediction import AnswerPart
from manyicl.errors import MachineError, UserError
from manyicl.server import engine_worker
from manyicl.server.engine_worker import PASS_SECONDS, model_hash
from tests.engine.parts import refused
from tests.server.worker_parts import SECONDS, Bench, Passes, closed_task, free_task, key, tiny_engine

A, B, C = key("a"), key("b"), key("c")
ROWS = ["film 3 was good", "a", "the long red box was by the door", "play 7"]


@pytest.fixture(name="engine", scope="module")
def _engine() -> Engine:
    return tiny_engine()


@pytest.fixture(name="bench")
def _bench(engine: Engine) -> Bench:
    return Bench(engine)


@pytest.fixture(name="short_chunks")
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compilations of a few hundred tokens yield several times."""
    monkeypatch.setattr(prefix_cache, "FIRST_TIMED_CHUNK_TOKENS", 16)
    monkeypatch.setattr(prefix_cache, "MOST_CHUNK_TOKENS", 16)
    monkeypatch.setattr("manyicl.engine.local.OBSERVED_CHUNK_TOKENS", 16)


@pytest.mark.parametrize("options", [{}, {"scores": "all"}, {"scores": "all", "blend": True}, {"num_similar": 2}])
def test_answers_are_those_of_the_engine(bench: Bench, options: dict[str, Any]) -> None:
    task = closed_task()
    expected = list(bench.engine.predict(bench.engine.compile(task, task.train), ROWS, **options))
    with bench.running():
        bench.add(A, task)
        tickets = [bench.worker.predict(A, [row], options) for row in ROWS]  # type: ignore[arg-type]
        alone = [ticket.future.result(SECONDS)[0] for ticket in tickets]
        together = bench.answers(A, ROWS, **options)
    for found in (alone, together):
        for one, other in zip(found, expected, strict=True):
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
            assert one.answer == other.answer
            assert one.similar == other.similar
            assert (one.scores is None) == (other.scores is None)
            if one.scores is not None and other.scores is not None:
                assert one.scores.probabilities == pytest.approx(other.scores.probabilities, abs=1e-4)


def test_a_version_is_compiled_and_reported_as_the_engine_compiles_it(bench: Bench) -> None:
    task = closed_task()
    expected = bench.engine.compile(task, task.train[:11])
    bench.add(A, task, num_shots=11, pinned=True)
    with bench.running():
        compiled = bench.compiled(A)
        bench.worker.compile(A)
        bench.wait_for(lambda: bench.reported == [A, A])
        assert bench.worker.state().num_compiled == 1
    assert (compiled.num_tokens, compiled.num_shots, compiled.num_dropped) == (expected.num_tokens, 11, 0)
    assert compiled.model == model_hash(bench.engine) == bench.worker.model
    assert compiled.seconds > 0
    for (num_shots, log_probability, is_right), answer in zip(compiled.answers, expected.answers, strict=True):
        assert (num_shots, is_right) == (answer.num_shots, int(answer.is_right))
        assert log_probability == pytest.approx(answer.log_probability, abs=1e-4)
    assert bench.prefixes.pinned == {A.task_id: True}
    assert bench.prefixes.in_use == []


def test_the_identity_of_a_model_changes_with_all_that_prefixes_depend_on() -> None:
    engine = tiny_engine()
    shorter = Engine(engine.backend, engine.encoder.tokenizer, max_context_tokens=100)
    ended = Engine(engine.backend, engine.encoder.tokenizer, end_of_answer="\n")
    hashes = {model_hash(one) for one in (engine, tiny_engine(seed=1), shorter, ended)}
    assert len(hashes) == 4
    assert model_hash(tiny_engine()) == model_hash(engine)


def test_rows_that_wait_together_are_answered_in_one_pass_and_versions_take_turns(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.keep_ready(A)
    bench.keep_ready(B)
    with Passes(bench.engine, monkeypatch) as passes:
        sent = [(B, "one"), (A, "two"), (B, "three"), (A, "four")]
        tickets = [bench.worker.predict(version, [row], {}) for version, row in sent]
        other = bench.worker.predict(A, ["five", "six"], {"scores": "all"})
        with bench.running():
            assert all(ticket.future.result(SECONDS) for ticket in [*tickets, other])
        assert passes.rows == [["one", "three"], ["two", "four"], ["five", "six"]]
        assert bench.worker.state().num_passes == 3
        assert bench.worker.state().num_rows_answered == 6


def test_a_ticket_of_many_rows_takes_turns(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench(engine, rows_per_pass=4)
    bench.keep_ready(A)
    bench.keep_ready(B)
    with Passes(engine, monkeypatch) as passes:
        large = bench.worker.predict(A, [f"large {i}" for i in range(9)], {})
        small = bench.worker.predict(A, ["small"], {})
        other = bench.worker.predict(B, ["other"], {})
        with bench.running():
            for ticket, num_rows in ((large, 9), (small, 1), (other, 1)):
                assert len(ticket.future.result(SECONDS)) == num_rows
        names = [[row.split()[0] for row in rows] for rows in passes.rows]
        # The small one joins the second turn of its group, after a turn of the other group.
        assert names == [["large"] * 4, ["other"], ["small", *["large"] * 3], ["large"] * 2]


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [([1] * 70, [64, 6]), ([12], [8, 4]), ([12, 1, 1], [8, 6]), ([99, *[1] * 63], [64, *[8] * 12, 2])],
)
def test_a_slow_pass_has_a_row_of_each_ticket_that_waits_and_few_of_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, sizes: list[int], expected: list[int]
) -> None:
    bench = Bench(engine)
    bench.keep_ready(A)
    bench.worker._lately.of_version[A] = PASS_SECONDS
    monkeypatch.setattr(bench.worker._lately, "learn", lambda *_: None)
    with Passes(engine, monkeypatch) as passes:
        tickets = [bench.worker.predict(A, [f"row {i}" for i in range(size)], {}) for size in sizes]
        with bench.running():
            assert [len(ticket.future.result(SECONDS)) for ticket in tickets] == sizes
        assert list(map(len, passes.rows)) == expected


def test_clients_that_come_back_soon_after_a_pass_are_in_the_next_one(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_worker, "SHARE_TO_COME_BACK", 1e6)
    bench = Bench(engine, fill_seconds=1e-6)
    bench.keep_ready(A)
    with Passes(engine, monkeypatch) as passes:
        first = [bench.worker.predict(A, [text], {}) for text in ("one", "two", "three")]
        with bench.running():
            assert all(ticket.future.result(SECONDS) for ticket in first)
            second = []
            for text in ("four", "five", "six"):
                second.append(bench.worker.predict(A, [text], {}))
                time.sleep(0.05)
            assert all(ticket.future.result(SECONDS) for ticket in second)
        assert passes.rows == [["one", "two", "three"], ["four", "five", "six"]]


def test_a_single_client_is_not_waited_for_by_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_worker, "SHARE_TO_COME_BACK", 1e6)
    bench = Bench(engine, fill_seconds=1e-6)
    bench.keep_ready(A)
    with bench.running():
        for text in ("one", "two", "three"):
            assert bench.worker.predict(A, [text], {}).future.result(SECONDS)


def test_bad_rows_are_reported_or_fail_their_own_ticket_alone(bench: Bench) -> None:
    bench.add(A)
    broken = UserError("bad_line", "it is no JSON")
    with bench.running():
        reported = bench.worker.predict(A, ["a", " ", broken, "film " * 3000], {"bad_rows": "report"})
        refused_ = bench.worker.predict(A, ["a", " "], {}, first_number=41)
        fine = bench.worker.predict(A, ["a"], {})
        codes = [one.problem.code if one.problem else None for one in reported.future.result(SECONDS)]
        assert codes == [None, "empty_query", "bad_line", "query_too_long"]
        with refused("empty_query", row=42):
            refused_.future.result(SECONDS)
        assert fine.future.result(SECONDS)[0].problem is None
        assert bench.answers(A, []) == []


def test_options_that_do_not_suit_the_task_fail_their_tickets_alone(bench: Bench) -> None:
    bench.add(A)
    with bench.running():
        fine = bench.worker.predict(A, ["a"], {})
        for _ in range(2):
            with refused("conflicting_options", field="abstain_below"):
                bench.answers(A, ["a"], abstain_below=0.5)
        assert fine.future.result(SECONDS)
        assert bench.worker.state().is_alive


def test_what_fails_in_a_pass_fails_its_ticket_alone(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    predict = bench.engine.predict

    def failing(prefix: Any, rows: Any, **options: Any) -> Any:
        if "boom" in rows:
            raise RuntimeError("".join(rows))
        return predict(prefix, rows, **options)

    monkeypatch.setattr(bench.engine, "predict", failing)
    bench.add(A)
    tickets = [bench.worker.predict(A, [row], {}) for row in ("a", "boom", "b")]
    with bench.running():
        assert tickets[0].future.result(SECONDS)[0].answer
        with pytest.raises(MachineError, match="RuntimeError"):
            tickets[1].future.result(SECONDS)
        assert tickets[2].future.result(SECONDS)[0].answer
        assert bench.answers(A, ["c"])
        assert bench.worker.state().num_rows_failed == 1
    assert "RuntimeError" in caplog.text
    assert "boomb" not in caplog.text


def test_a_cancelled_ticket_leaves_the_queue(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.add(A)
    with Passes(bench.engine, monkeypatch) as passes:
        first, second = bench.worker.predict(A, ["first"], {}), bench.worker.predict(A, ["second"], {})
        assert bench.worker.state().num_waiting_rows == 2
        first.cancel()
        assert bench.worker.state().num_waiting_rows == 1
        with bench.running():
            assert second.future.result(SECONDS)
        with pytest.raises(CancelledError):
            first.future.result(0)
        assert passes.rows == [["second"]]
        assert bench.worker.state().num_tickets_cancelled == 1


def test_a_full_queue_answers_at_once(engine: Engine) -> None:
    bench = Bench(engine, max_waiting_rows=10)
    bench.add(A)
    waiting = bench.worker.predict(A, ["a"] * 7, {})
    with refused("queue_full", found="7"):
        bench.worker.predict(A, ["b"] * 4, {})
    with refused("too_many_rows", found="11", expected="at most 10"):
        bench.worker.predict(A, ["b"] * 11, {})
    bench.worker.predict(A, ["b"] * 3, {})
    waiting.cancel()
    other = bench.worker.predict(A, ["b"] * 7, {})
    with bench.running():
        assert len(other.future.result(SECONDS)) == 7


def test_rows_come_while_a_task_is_compiled_and_are_answered_between_its_chunks(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, short_chunks: None
) -> None:
    task = closed_task(60)
    at_once = bench.engine.compile(task, task.train)
    bench.add(A, task)
    bench.add(B)
    bench.add(C)
    done_after: dict[str, int] = {}
    tickets = []
    longest = bench.prefixes.longest

    def send(token_ids: Any, task_id: str) -> Any:
        """Called in the compilation of A, before its first chunk."""
        if task_id == A.task_id:
            for name, version in (("resident", B), ("not resident", C)):
                ticket = bench.worker.predict(version, ["a"], {})
                ticket.future.add_done_callback(partial(note, name))
                tickets.append(ticket)
        return longest(token_ids, task_id)

    def note(name: str, _: object) -> None:
        state = bench.worker.state()
        done_after[name] = next((num_done for version, num_done, _ in state.compiling if version == A), -1)

    with bench.running():
        bench.compiled(B)
        monkeypatch.setattr(bench.prefixes, "longest", send)
        compiled = bench.compiled(A)
        assert all(ticket.future.result(SECONDS) for ticket in tickets)
    assert done_after["resident"] == 16
    assert done_after["not resident"] == 16
    assert bench.reported == [B, C, A]
    for (_, score, _), answer in zip(compiled.answers, at_once.answers, strict=True):
        assert score == pytest.approx(answer.log_probability, abs=1e-4)


def test_what_rows_wait_for_is_compiled_before_what_later_rows_wait_for(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, short_chunks: None
) -> None:
    """Otherwise each compilation would stop for another one, and none would end."""
    bench.add(A, closed_task(40))
    bench.add(B, closed_task(12, first=50))
    bench.add(C)
    order: list[str] = []
    longest = bench.prefixes.longest

    def note(name: str, _: object) -> None:
        order.append(name)

    def send(token_ids: Any, task_id: str) -> Any:
        if task_id == A.task_id:
            for name, version in (("not stored", B), ("stored", C)):
                bench.worker.predict(version, ["a"], {}).future.add_done_callback(partial(note, name))
            bench.worker.compile(B)
        return longest(token_ids, task_id)

    with bench.running():
        bench.add(C, answers=bench.compiled(C).answers)
        bench.prefixes.memory.clear()
        monkeypatch.setattr(bench.prefixes, "longest", send)
        first = bench.worker.predict(A, ["a"], {})
        first.future.add_done_callback(partial(note, "first"))
        bench.wait_for(lambda: len(order) == 3 and set(bench.reported) == {A, B, C})
    assert order == ["stored", "first", "not stored"]
    assert bench.loaded.count(B) == 2


def test_a_compilation_goes_on_however_many_rows_come(bench: Bench, short_chunks: None) -> None:
    bench.add(A)
    bench.add(B, closed_task(24))
    is_over = threading.Event()

    def ask() -> None:
        while not is_over.is_set():
            bench.answers(A, ["a"])

    clients = [threading.Thread(target=ask) for _ in range(3)]
    with bench.running():
        bench.compiled(A)
        for client in clients:
            client.start()
        try:
            bench.compiled(B)
        finally:
            is_over.set()
            for client in clients:
                client.join()


def test_a_blend_is_fitted_once_with_what_goes_first_in_between(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.keep_ready(A)
    bench.keep_ready(B)
    with_blend, predict = bench.engine.with_blend, bench.engine.predict
    fits: list[int] = []
    order: list[str] = []

    def fit(prefix: Any, **options: Any) -> Any:
        if prefix.blend is None:
            fits.append(0)
        if len(fits) == 1 and not order:
            for name, version in (("other", B), ("same version", A)):
                bench.worker.predict(version, ["a"], {}).future.add_done_callback(partial(note, name))
        return with_blend(prefix, **options)

    def note(name: str, _: object) -> None:
        order.append(name)

    monkeypatch.setattr(bench.engine, "with_blend", fit)
    options: dict[str, Any] = {"scores": "all", "blend": True}
    with bench.running():
        bench.worker.predict(A, ROWS, options).future.add_done_callback(partial(note, "blended"))  # type: ignore[arg-type]
        blended = bench.answers(A, ROWS, **options)
        assert order == ["other", "same version", "blended"]
        # Another prefix of the version, after the first one left memory, has the same weights.
        weights = bench.prefixes.memory[A].blend
        bench.prefixes.memory[A] = replace(bench.prefixes.memory[A], blend=None)
        again = bench.answers(A, ROWS, **options)
        assert bench.prefixes.memory[A].blend is weights
    assert fits == [0]
    monkeypatch.undo()
    task = bench.sources[A].task
    expected = list(predict(bench.engine.compile(task, task.train), ROWS, scores="all", blend=True))
    for found in (blended, again):
        for one, other in zip(found, expected, strict=True):
            assert one.blended
            assert one.scores is not None
            assert other.scores is not None
            assert one.scores.probabilities == pytest.approx(other.scores.probabilities, abs=1e-4)


def test_a_prefix_that_leaves_memory_while_its_blend_is_fitted_is_not_made_a_second_time(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.keep_ready(A)
    with_blend = bench.engine.with_blend
    plain: list[Any] = []

    def fit(prefix: Any, **options: Any) -> Any:
        if not plain:
            bench.prefixes.memory.clear()
            plain.append(bench.worker.predict(A, ["a"], {}))
        return with_blend(prefix, **options)

    monkeypatch.setattr(bench.engine, "with_blend", fit)
    with bench.running():
        assert bench.answers(A, ROWS, scores="all", blend=True)[0].blended
        assert plain[0].future.result(SECONDS)[0].answer
    assert bench.loaded == []
    assert bench.prefixes.memory[A].blend is not None


def test_a_prefix_that_left_memory_comes_back_from_the_disk_without_the_network(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.add(A)
    with bench.running():
        compiled = bench.compiled(A)
        expected = bench.answers(A, ROWS)
        bench.add(A, answers=compiled.answers)
        bench.prefixes.memory.clear()
        observe = bench.engine.backend.observe  # type: ignore[attr-defined]
        targets: list[Any] = []

        def seen(token_ids: Any, wanted: Any, *rest: Any, **options: Any) -> Any:
            targets.append(wanted)
            return observe(token_ids, wanted, *rest, **options)

        monkeypatch.setattr(bench.engine.backend, "observe", seen)
        with Passes(bench.engine, monkeypatch) as passes:
            worker_answers = bench.answers(A, ROWS[:1])
            assert len(passes.rows) == 1
        assert targets == [[]]
        assert worker_answers == expected[:1] or worker_answers[0].log_probability == pytest.approx(
            expected[0].log_probability, abs=1e-4
        )
        # It was ready before: nobody is told, and nothing written.
        assert bench.reported == [A]
        assert bench.worker.state().num_compiled_again == 1
        assert not bench.worker.was_rebuilt(A)
        # Lost on the disk as well, it is compiled again.
        bench.prefixes.memory.clear()
        bench.prefixes.disk.clear()
        assert bench.answers(A, ROWS[:1])[0].answer == expected[0].answer
        assert len(targets[-1]) > 0
        assert bench.worker.was_rebuilt(A)
        assert not bench.worker.was_rebuilt(B)


@pytest.mark.parametrize("is_resident", [True, False])
@pytest.mark.parametrize("names_earlier", [True, False])
def test_a_longer_version_computes_only_what_is_new(bench: Bench, is_resident: bool, names_earlier: bool) -> None:
    task = closed_task(24)
    bench.add(key("a", 2), replace(task, train=task.train[:20]))
    with bench.running():
        first = bench.compiled(key("a", 2))
        bench.add(key("a", 2), replace(task, train=task.train[:20]), answers=first.answers)
        if not is_resident:
            bench.prefixes.memory.clear()
        newer = key("a", 5 if names_earlier else 3)
        bench.add(newer, task, earlier=key("a", 2) if names_earlier else None)
        longer = bench.compiled(newer)
    assert longer.answers[:20] == first.answers
    assert bench.prefixes.memory[newer].num_reused_tokens > 0.9 * first.num_tokens
    expected = bench.engine.compile(task, task.train)
    for (_, score, _), answer in zip(longer.answers, expected.answers, strict=True):
        assert score == pytest.approx(answer.log_probability, abs=1e-4)


def test_a_correction_computes_what_follows_it_and_records_it_anew(bench: Bench) -> None:
    task = closed_task(24)
    corrected = replace(task, train=(*task.train[:10], closed_task(1, first=99).train[0], *task.train[11:]))
    bench.add(key("a", 1), task)
    bench.add(key("a", 2), corrected)
    with bench.running():
        first, second = bench.compiled(key("a", 1)), bench.compiled(key("a", 2))
    assert second.answers[:10] == first.answers[:10]
    for (_, score, _), answer in zip(
        second.answers, bench.engine.compile(corrected, corrected.train).answers, strict=True
    ):
        assert score == pytest.approx(answer.log_probability, abs=1e-4)


def test_a_version_that_cannot_be_compiled_fails_with_what_waits_for_it(bench: Bench) -> None:
    bench.add(A, replace(closed_task(), train=free_task().train))
    with bench.running():
        ticket = bench.worker.predict(A, ["a"], {})
        bench.worker.compile(A)
        with refused("foreign_demonstration"):
            ticket.future.result(SECONDS)
        bench.wait_for(lambda: A in bench.failed)
        with refused("unknown_task"):
            bench.answers(B, ["a"])
        bench.worker.compile(B)
        bench.wait_for(lambda: B in bench.failed)
        bench.add(C)
        assert bench.answers(C, ["a"])
        assert bench.worker.state().num_compile_failures == 1


def test_who_waits_for_a_version_hears_that_it_failed_after_it_is_noted_each_with_an_error_of_its_own(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    were_told: list[bool] = []

    def on_failed(*_: Any) -> None:
        were_told.extend(ticket.future.done() for ticket in tickets)

    monkeypatch.setattr(bench.worker, "_on_failed", on_failed)
    bench.add(A, replace(closed_task(), train=free_task().train))
    tickets = [bench.worker.predict(A, ["a"], {}) for _ in range(2)]
    bench.worker.compile(A)
    with bench.running():
        first, second = (ticket.future.exception(SECONDS) for ticket in tickets)
    assert were_told == [False, False]
    assert isinstance(first, UserError)
    assert str(first.at(field="one")) == str(second)
    assert isinstance(second, UserError)
    assert (first.field, second.field) == ("one", None)


def test_a_failure_of_the_machine_while_compiling_is_reported(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(bench.engine, "compile_fitted", failing)
    bench.add(A)
    with bench.running():
        bench.worker.compile(A)
        bench.wait_for(lambda: A in bench.failed)
        with pytest.raises((MachineError, UserError)):
            bench.answers(A, ["a"])
    assert bench.failed[A].code == "compile_failed"


def test_what_cannot_be_read_or_reported_now_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_worker, "RETRY_SECONDS", 0.01)
    failures: list[str] = []

    def unreliable(name: str, function: Any) -> Any:
        def call(*given: Any) -> Any:
            if failures.count(name) < 2:
                failures.append(name)
                raise OSError("the database is not available")
            return function(*given)

        return call

    monkeypatch.setattr(bench.worker, "_load", unreliable("load", bench.load))
    monkeypatch.setattr(bench.worker, "_on_ready", unreliable("report", bench.on_ready))
    bench.add(A)
    with bench.running():
        bench.compiled(A)
    assert failures == ["load", "load", "report", "report"]
    assert bench.worker.state().num_compiled == 1


def test_newer_versions_are_compiled_before_older_ones(bench: Bench) -> None:
    for version in (1, 2, 3):
        bench.add(key("a", version), closed_task(4 + version))
        bench.worker.compile(key("a", version))
    bench.add(B)
    bench.worker.compile(B)
    bench.worker.compile(key("a", 1))
    with bench.running():
        bench.wait_for(lambda: len(bench.reported) == 4)
    assert bench.reported == [key("a", 3), B, key("a", 1), key("a", 2)]


def test_a_task_that_is_written_faster_than_compiled_has_a_short_queue(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_worker, "MOST_OLD_TO_COMPILE", 2)
    bench.worker.compile(bench.add(B))
    for version in range(1, 8):
        bench.worker.compile(bench.add(key("a", version), closed_task(4 + version)))
        assert bench.worker.state().num_waiting_compiles <= 1 + 3
    with bench.running():
        bench.wait_for(lambda: len(bench.reported) == 4)
        assert bench.reported == [B, key("a", 7), key("a", 5), key("a", 6)]
        bench.answers(key("a", 1), ROWS[:1])  # compiled with its first row
    assert bench.reported[4:] == [key("a", 1)]


def test_retrieved_examples_come_from_what_is_not_in_the_prefix(bench: Bench) -> None:
    task = closed_task()
    bench.add(A, task, num_shots=5, num_retrieved=2)
    bench.add(B, task, num_retrieved=2)
    expected = list(bench.engine.answer(task, task.train[:5], ROWS[:2], num_retrieved=2, num_similar=9))
    everything = list(bench.engine.predict(bench.engine.compile(task, task.train), ROWS[:2]))
    with bench.running():
        found = bench.answers(A, ROWS[:2], 2, num_similar=9)
        # All of its demonstrations fit, so that there are none to retrieve.
        whole = bench.answers(B, ROWS[:2], 2)
    assert [one.similar for one in found] == [one.similar for one in expected]
    for one, other in zip([*found, *whole], [*expected, *everything], strict=True):
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)


def test_a_task_without_demonstrations_and_instruction_answers(bench: Bench) -> None:
    bench.add(A, replace(free_task(), train=()))
    with bench.running():
        assert bench.compiled(A).num_tokens == 0
        assert len(bench.answers(A, ROWS)) == 4


# --- Free answers


def test_free_answers_come_in_parts_that_are_those_of_the_engine(bench: Bench) -> None:
    task = free_task()
    prefix = bench.engine.compile(task, task.train)
    expected = list(bench.engine.predict(prefix, ROWS))
    bench.add(A, task)
    with bench.running():
        streams = [bench.worker.stream(A, row, {}) for row in ROWS]
        whole = bench.answers(A, ROWS)
        for stream, one, other in zip(streams, whole, expected, strict=True):
            parts = list(stream)
            assert "".join(part.text for part in parts) == other.answer == one.answer
            assert parts[-1].prediction == stream.future.result(0)[0]
            assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
        with refused("empty_query"):
            list(bench.worker.stream(A, " ", {}))
        (part,) = bench.worker.stream(A, " ", {"bad_rows": "report"})
        assert part.prediction is not None
        assert part.prediction.problem is not None
    assert bench.prefixes.in_use == []


def test_a_closed_answer_is_streamed_whole(bench: Bench) -> None:
    bench.add(A)
    with bench.running():
        (part,) = bench.worker.stream(A, "a", {})
        assert part.prediction is not None
        assert part.text == part.prediction.answer


def test_draws_follow_from_the_number_of_a_row_in_what_was_sent(bench: Bench) -> None:
    task = free_task()
    sampling = Sampling(temperature=1.5, seed=5)
    rows = [f"film {i}" for i in range(12)]
    expected = [
        one.answer for one in bench.engine.predict(bench.engine.compile(task, task.train), rows, sampling=sampling)
    ]
    bench.add(A, task)
    options: Any = {"sampling": sampling}
    tickets = [bench.worker.predict(A, rows[i : i + 5], options, first_number=i + 1) for i in (5, 0, 10)]
    with bench.running():
        second, first, third = ([one.answer for one in ticket.future.result(SECONDS)] for ticket in tickets)
    assert [*first, *second, *third] == expected


def test_closed_answers_of_others_do_not_wait_for_free_ones_to_be_written(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_worker, "WRITING_SECONDS", 1e-9)
    bench.add(A, free_task())
    bench.add(B)
    order: list[str] = []
    with bench.running():
        bench.compiled(A)
        bench.compiled(B)
        stream = bench.worker.stream(A, "film", {})
        parts = iter(stream)
        next(parts)
        closed = bench.worker.predict(B, ["a"], {})
        closed.future.add_done_callback(lambda _: order.append("closed"))
        stream.future.add_done_callback(lambda _: order.append("free"))
        list(parts)
        closed.future.result(SECONDS)
    assert sorted(order) == ["closed", "free"]


def test_writing_ends_when_nobody_wants_the_answers_any_more(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[str] = []
    stream = bench.engine.stream

    def endless(*given: Any, **options: Any) -> Iterator[Any]:
        try:
            first = next(iter(stream(*given, **options)))
            while True:
                yield replace(first, text="x", prediction=None)
        finally:
            closed.append("closed")

    monkeypatch.setattr(bench.engine, "stream", endless)
    bench.add(A, free_task())
    with bench.running():
        one, other = bench.worker.stream(A, "film", {}), bench.worker.stream(A, "film", {"num_similar": 1})
        next(iter(one))
        next(iter(other))
        one.cancel()
        other.cancel()
        bench.add(B)
        assert bench.answers(B, ["a"])
        bench.wait_for(lambda: closed == ["closed"] * 2)
    assert bench.prefixes.in_use == []


def test_what_fails_while_writing_fails_its_ticket_alone(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = bench.engine.stream

    def failing(prefix: Any, rows: Any, **options: Any) -> Iterator[Any]:
        if "boom" in rows:
            yield AnswerPart(1, "x")
            raise RuntimeError
        yield from stream(prefix, rows, **options)

    monkeypatch.setattr(bench.engine, "stream", failing)
    bench.add(A, free_task())
    has_text = bench.worker.stream(A, "d", {})
    tickets = [bench.worker.predict(A, [row], {}) for row in ("a", "boom", "b")]
    streamed = bench.worker.stream(A, "c", {})
    with bench.running():
        for fine in (tickets[0], tickets[2], streamed):
            assert fine.future.result(SECONDS)
        assert list(streamed)
        for failed in (tickets[1], has_text):
            with pytest.raises(MachineError):
                failed.future.result(SECONDS)
    assert bench.prefixes.in_use == []


# --- Deleting, pinning, ending


def test_a_deleted_task_is_forgotten_wherever_it_is(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, short_chunks: None
) -> None:
    bench.add(A, closed_task(60))
    bench.add(B)
    bench.add(key("a", 2))
    longest = bench.prefixes.longest
    forgotten: list[Future[None]] = []

    def delete(token_ids: Any, task_id: str) -> Any:
        """Called in the compilation of A, before its first chunk."""
        if task_id == A.task_id and not forgotten:
            bench.worker.compile(key("a", 2))
            forgotten.append(bench.worker.forget(A.task_id))
        return longest(token_ids, task_id)

    monkeypatch.setattr(bench.prefixes, "longest", delete)
    with bench.running():
        ticket = bench.worker.predict(A, ["a"], {})
        with refused("unknown_task"):
            ticket.future.result(SECONDS)
        forgotten[0].result(SECONDS)
        assert bench.compiled(B)
        assert bench.reported == [B]
        assert bench.prefixes.forgotten == [A.task_id]
        assert set(bench.prefixes.disk) == {B}
        bench.worker.forget(B.task_id).result(SECONDS)
        assert bench.prefixes.memory == {}


def test_a_task_that_is_deleted_while_it_writes_stops(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_worker, "WRITING_SECONDS", 1e-9)
    bench.add(A, replace(free_task(), spec=free_task().spec.model_copy(update={"max_answer_tokens": 200})))
    with bench.running():
        stream = bench.worker.stream(A, "film", {"sampling": Sampling(temperature=50.0)})
        next(iter(stream))
        bench.worker.forget(A.task_id).result(SECONDS)
        with refused("unknown_task"):
            list(stream)
    assert bench.prefixes.in_use == []


def test_pinning_reaches_a_compilation_in_progress(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    longest = bench.prefixes.longest
    orders = []

    def pin(token_ids: Any, task_id: str) -> Any:
        orders.append(bench.worker.set_pinned(task_id, True))
        return longest(token_ids, task_id)

    monkeypatch.setattr(bench.prefixes, "longest", pin)
    bench.add(A)
    with bench.running():
        bench.compiled(A)
        orders[0].result(SECONDS)
        assert bench.prefixes.pinned == {A.task_id: True}
        bench.worker.set_pinned(A.task_id, False).result(SECONDS)
        assert bench.prefixes.pinned == {A.task_id: False}


def test_stopping_answers_what_waits_and_takes_nothing_more(engine: Engine) -> None:
    bench = Bench(engine)
    bench.add(A)
    bench.add(B, free_task())
    waiting = [bench.worker.predict(A, ["a"] * 20, {}), bench.worker.stream(B, "film", {})]
    bench.worker.compile(C)
    bench.worker.start()
    bench.worker.stop(SECONDS)
    assert [len(ticket.future.result(0)) for ticket in waiting] == [20, 1]
    assert C not in bench.failed
    with refused("stopping"):
        bench.worker.predict(A, ["a"], {})
    state = bench.worker.state()
    assert (state.is_alive, state.is_stopping) == (False, True)
    # Whoever deletes a task afterwards still deletes its prefixes.
    bench.worker.forget(A.task_id).result(0)
    assert A not in bench.prefixes.disk


def test_what_is_not_answered_in_time_fails_and_a_compilation_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, short_chunks: None
) -> None:
    bench.add(A, closed_task(60))
    began = threading.Event()
    longest = bench.prefixes.longest

    def slow(token_ids: Any, task_id: str) -> Any:
        began.set()
        stopping.wait(SECONDS)
        return longest(token_ids, task_id)

    stopping = threading.Event()
    monkeypatch.setattr(bench.prefixes, "longest", slow)
    ticket = bench.worker.predict(A, ["a"], {})
    bench.worker.compile(A)
    bench.worker.start()
    began.wait(SECONDS)
    threading.Timer(0.05, stopping.set).start()
    bench.worker.stop(0)
    with refused("stopping"):
        ticket.future.result(0)
    assert bench.reported == []
    assert bench.prefixes.memory == {}


def test_a_worker_that_never_started_ends_too(bench: Bench) -> None:
    bench.add(A)
    ticket = bench.worker.predict(A, ["a"], {})
    bench.worker.stop(1)
    with refused("stopping"):
        ticket.future.result(0)


def test_a_defect_of_a_turn_does_not_end_the_worker(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    get = bench.prefixes.get
    failures: list[Any] = []

    def failing(version: Any) -> Any:
        if not failures:
            failures.append(version)
            raise ZeroDivisionError
        return get(version)

    monkeypatch.setattr(bench.prefixes, "get", failing)
    bench.add(A)
    with bench.running():
        with pytest.raises(MachineError, match="ZeroDivisionError"):
            bench.answers(A, ["a"])
        assert bench.answers(A, ["a"])
