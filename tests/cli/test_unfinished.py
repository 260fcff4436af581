"""Whatever ends a run, the next one ends with the answers of an uninterrupted one, and nobody has to clean up."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from manyicl.cli.answers import CsvForm
from manyicl.cli.demonstrations import Demonstrations
from manyicl.cli.main import main
from manyicl.cli.predict import _made_of
from manyicl.cli.queries import Queries, open_queries
from manyicl.cli.unfinished import MadeOf, answers_written
from manyicl.engine import engine as engine_module
from manyicl.engine.backend import Sampling
from manyicl.engine.engine import Engine
from manyicl.engine.local import identity_of
from manyicl.model.manifest import library_versions
from tests.builders import make_task, tiny_loaded
from tests.cli.test_predict import EARLIER, run
from tests.engine.parts import refused
from tests.engine.test_backend import free

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload([__name__])
MADE_OF = MadeOf(
    input="i",
    read_as={"suffix": ".csv"},
    model="m",
    task="t",
    options={"seed": "0"},
    device="cpu, 1 thread",
    max_context_tokens=512,
    versions={"torch": "2"},
)
ODD_ROWS: list[dict[str, Any]] = [
    {"text": text, "answer": answer, "log_probability": -1.5, "problem": None}
    for text, answer in (
        ("plain", "good"),
        ('he said "yes"', "bad"),
        ('two\nlines, "quoted"\r\nand more', "good"),
        ('"', ""),
        ("é 差 \ud83d", "a\rb"),
        ("", 'ends in ""\n'),
    )
]


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("answers*")}


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_answers_that_are_cut_after_any_byte_are_continued_to_the_same_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: str
) -> None:
    monkeypatch.setattr("os.fsync", lambda _: None)  # hundreds of files
    output = tmp_path / f"answers.{ending}"
    with answers_written(output, {}) as answers:
        answers.begin(MADE_OF, print)
        assert answers.write(ODD_ROWS) == len(ODD_ROWS)
    whole = output.read_bytes()
    part, record = tmp_path / f"answers.{ending}.part", tmp_path / f"answers.{ending}.part.json"
    numbers = set()
    for length in range(len(whole) + 1):
        part.write_bytes(whole[:length])
        record.write_text(MADE_OF.model_dump_json(), encoding="utf-8")
        with answers_written(output, {}) as answers:
            earlier = list(answers.begin(MADE_OF, print))
            assert [row["answer"] for row in earlier] == [row["answer"] for row in ODD_ROWS[: len(earlier)]]
            assert answers.write(ODD_ROWS[len(earlier) :]) == len(ODD_ROWS)
        numbers.add(len(earlier))
        assert content_of(tmp_path) == {output.name: whole}
    assert numbers == set(range(len(ODD_ROWS) + 1))


@pytest.mark.parametrize(
    "kind", ["labels", "free", "drawn", "retrieved", "compiled"], ids=lambda kind: f"with {kind} answers"
)
def test_what_is_left_of_a_stream_is_answered_to_the_last_bit_as_in_one_go(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "FITTED_QUERIES", 8)
    monkeypatch.setattr(engine_module, "READ_AHEAD_QUERIES", 4)
    if kind == "retrieved":
        pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    engine = Engine.local(tiny_loaded(), max_context_tokens=200)
    task = free() if kind in ("free", "drawn") else make_task()
    # Later queries are longer, so that demonstrations are dropped on the way.
    rows = [{"text": "film " * (1 + n % 5 + n // 2) if n % 4 else ""} for n in range(32)]
    how: dict[str, Any] = {"bad_rows": "report"}
    if kind == "drawn":
        how["sampling"] = Sampling(temperature=0.9, seed=3)
    compiled = engine.prefill(task, task.train[:2])

    def answers(num_answered: int) -> list[tuple[object, ...]]:
        more = {**how, "num_answered": num_answered}
        if kind == "compiled":
            found = engine.predict(compiled, rows, **more)
        else:
            found = engine.answer(task, task.train, rows, num_retrieved=2 * (kind == "retrieved"), **more)
        return [(one.answer, str(one.log_probability), one.num_shots, str(one.problem)) for one in found]

    whole = answers(0)
    if kind != "compiled":
        assert len({shots for _, _, shots, _ in whole}) > 2
    for num_answered in (1, 3, 4, 7, 11, 16, 21, 31, 32):
        assert answers(num_answered) == whole[num_answered:]


def _predict(arguments: list[str]) -> None:
    engine_module.FITTED_QUERIES, engine_module.READ_AHEAD_QUERIES = 32, 8
    sys.argv = ["manyicl", "predict", *arguments]
    with Path(os.devnull).open("w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        main()


def in_a_process(arguments: list[object], kill_after: int | None = None, part: Path | None = None) -> int:
    """Run predict in a process of its own and return its exit code; kill it once its answers have so many bytes."""
    process = PROCESSES.Process(target=partial(_predict, [str(one) for one in arguments]))
    process.start()
    while kill_after is not None and part is not None and process.is_alive():
        if part.exists() and part.stat().st_size >= kill_after:
            os.kill(process.pid or 0, signal.SIGKILL)
            break
        time.sleep(0.001)
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.fixture(name="arguments")
def _arguments(model_folder: Path, table: Path, tmp_path: Path) -> list[object]:
    queries = tmp_path / "new.csv"
    rows = "".join(f'{n},"film ""{n}""\n{"was " * (n // 8 + n % 9)}fine"\n' if n % 7 else f"{n},\n" for n in range(200))
    queries.write_text("id,text\n" + rows, encoding="utf-8")
    task = f"{table}:text:label,test_fraction=0"
    return ["-m", model_folder, "-t", task, "--input", queries, "--max-context-tokens", 256, "--output"]


def killed_and_continued(
    monkeypatch: pytest.MonkeyPatch, arguments: list[object], folder: Path, moments: list[float]
) -> None:
    """Kill a run at moments, given as shares of its answers, and hold that the last one ends as if nothing had been."""
    whole, output = folder / "whole.csv", folder / "answers.csv"
    monkeypatch.setattr(engine_module, "FITTED_QUERIES", 32)
    monkeypatch.setattr(engine_module, "READ_AHEAD_QUERIES", 8)
    assert run(monkeypatch, "predict", *arguments, whole) == 3
    part, num_kills = folder / "answers.csv.part", 0
    for moment in moments:
        size = int(moment * whole.stat().st_size)
        num_kills += in_a_process([*arguments, output], size, part) == -signal.SIGKILL
        if num_kills:
            assert not output.exists()
            assert part.read_bytes() == whole.read_bytes()[: part.stat().st_size]
    assert num_kills
    assert run(monkeypatch, "predict", *arguments, output) == 3
    assert content_of(folder) == {output.name: whole.read_bytes()}


def test_a_run_that_is_killed_ends_with_the_answers_of_an_uninterrupted_one(
    monkeypatch: pytest.MonkeyPatch, arguments: list[object], tmp_path: Path
) -> None:
    killed_and_continued(monkeypatch, arguments, tmp_path, [0.1 + 0.7 * random.random()])


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_may_be_killed_at_any_moment(
    monkeypatch: pytest.MonkeyPatch, arguments: list[object], tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    killed_and_continued(monkeypatch, arguments, tmp_path, sorted(rng.random() * 0.95 for _ in range(5)))


def interrupted(monkeypatch: pytest.MonkeyPatch, arguments: list[object], num_answers: int) -> int:
    """Run predict and press Ctrl-C after so many answers."""
    answered = Queries.answered

    def cut(self: Queries, *given: Any) -> Iterator[Any]:
        for number, row in enumerate(answered(self, *given)):
            if number == num_answers:
                raise KeyboardInterrupt
            yield row

    with monkeypatch.context() as patch:
        patch.setattr(Queries, "answered", cut)
        return run(patch, "predict", *arguments)


def test_the_same_command_continues_and_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[object], tmp_path: Path
) -> None:
    whole, output = tmp_path / "whole.csv", tmp_path / "answers.csv"
    assert run(monkeypatch, "predict", *arguments, whole) == 3
    assert interrupted(monkeypatch, [*arguments, output], 50) == 130
    assert "answers.csv.part; the same command continues them" in capsys.readouterr().err
    assert run(monkeypatch, "predict", *arguments, output) == 3
    printed = capsys.readouterr().err
    assert "Continuing after 50 answers of an interrupted run." in printed
    assert "200 answers written" in printed
    # 29 of all 200 rows, those of the earlier run among them.
    assert "29 of 200 rows could not be answered" in printed
    assert content_of(tmp_path) == {output.name: whole.read_bytes()}


def other_option(arguments: list[object], **_: Any) -> list[object]:
    return [*arguments[:-1], "--shots", 3, "--output"]


def other_input(arguments: list[object], tmp_path: Path, **_: Any) -> list[object]:
    with (tmp_path / "new.csv").open("a", encoding="utf-8") as file:
        file.write("200,one more\n")
    return arguments


def other_task(arguments: list[object], table: Path, **_: Any) -> list[object]:
    with table.open("a", encoding="utf-8") as file:
        file.write("one more,good\n")
    return arguments


def other_model(arguments: list[object], tmp_path: Path, **_: Any) -> list[object]:
    loaded = tiny_loaded(seed=5)
    loaded.model.save_pretrained(tmp_path / "other")
    loaded.tokenizer.save_pretrained(tmp_path / "other")
    return ["-m", tmp_path / "other", *arguments[2:]]


def other_version(arguments: list[object], tmp_path: Path, **_: Any) -> list[object]:
    record = tmp_path / "answers.csv.part.json"
    text = record.read_text(encoding="utf-8")
    record.write_text(text.replace(library_versions()["torch"], "1.0.0"), encoding="utf-8")
    return arguments


def other_encoding(arguments: list[object], **_: Any) -> list[object]:
    return [f"{one},encoding=cp1252" if "test_fraction" in str(one) else one for one in arguments]


def other_suffix(arguments: list[object], tmp_path: Path, **_: Any) -> list[object]:
    (tmp_path / "new.csv").rename(tmp_path / "new.tsv")
    return [tmp_path / "new.tsv" if one == tmp_path / "new.csv" else one for one in arguments]


def no_record(arguments: list[object], tmp_path: Path, **_: Any) -> list[object]:
    (tmp_path / "answers.csv.part.json").unlink()
    return arguments


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_option, "another --shots"),
        (other_input, "another input"),
        (other_task, "another task"),
        (other_model, "another model"),
        (other_version, "another version of torch"),
        (other_encoding, "another encoding of the queries"),
        (other_suffix, "another suffix of the queries"),
        (no_record, "nothing that says what it was made of"),
    ],
)
def test_answers_that_were_made_otherwise_are_made_anew_with_one_line_that_says_why(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[object],
    table: Path,
    tmp_path: Path,
    change: Any,
    why: str,
) -> None:
    new = tmp_path / "new.csv"
    new.write_text("".join(new.read_text(encoding="utf-8").splitlines(keepends=True)[:121]), encoding="utf-8")
    assert interrupted(monkeypatch, [*arguments, tmp_path / "answers.csv"], 20) == 130
    capsys.readouterr()
    changed = change(arguments, table=table, tmp_path=tmp_path)
    assert run(monkeypatch, "predict", *changed, tmp_path / "answers.csv") == 3
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "anew" in line]
    part, old = tmp_path / "answers.csv.part", tmp_path / "answers.csv.part.old"
    assert line == f"Starting anew: {part} is of an interrupted run with {why}. Its answers are kept in {old}."
    assert old.read_text(encoding="utf-8").count("log_probability") == 1  # the header
    assert len(list(CsvForm().rows(old))) == 20
    assert run(monkeypatch, "predict", *changed, tmp_path / "whole.csv") == 3
    assert (tmp_path / "answers.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert [path.name for path in tmp_path.glob("*.part*")] == [old.name]


def test_what_answers_depend_on_is_put_down(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    queries = tmp_path / "new.csv"
    queries.write_text("text\nfilm\n", encoding="utf-8")
    loaded = tiny_loaded()
    examples = Demonstrations(make_task(), (), None)

    def made_of(delimiter: str | None = None, **engine_options: Any) -> MadeOf:
        engine = Engine.local(loaded, **engine_options)
        return _made_of(engine, examples, open_queries(queries, None, delimiter, None, "report"), {"seed": 0})

    before = made_of(max_context_tokens=200)
    assert made_of(max_context_tokens=200).difference(before) is None
    assert made_of(max_context_tokens=199).difference(before) == "another limit of the context"
    assert made_of(";", max_context_tokens=200).difference(before) == "another delimiter of the queries"
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 77)
        assert made_of(max_context_tokens=200).difference(before) == "another device or number of threads"
    identity = replace(identity_of(loaded), end_token_ids=frozenset({1, 2, 3}))
    monkeypatch.setattr("manyicl.engine.local.identity_of", lambda _: identity)
    assert made_of(max_context_tokens=200).difference(before) == "another model"


def test_the_second_run_on_one_output_is_refused_while_the_first_lives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[object], tmp_path: Path
) -> None:
    output = tmp_path / "answers.csv"
    with answers_written(output, {}) as answers:
        answers.begin(MADE_OF, print)
        assert run(monkeypatch, "predict", *arguments, output) == 2
        assert "answers.csv: another run is writing these answers." in capsys.readouterr().err
        answers.write([{"answer": "good", "log_probability": -1.0}])
    # What a kill leaves of a lock keeps nobody out.
    (tmp_path / "answers.csv.part.lock").touch()
    assert run(monkeypatch, "predict", *arguments, output) == 3


@pytest.mark.parametrize("content", ["text,label\nfilm,good\n", '{"text": "film"}\n'])
def test_a_file_of_the_users_own_under_the_name_of_the_part_is_left_alone(tmp_path: Path, content: str) -> None:
    part = tmp_path / "answers.csv.part"
    part.write_text(content, encoding="utf-8")
    with refused("output_exists", file=str(part)):
        answers_written(tmp_path / "answers.csv", {}).__enter__()
    assert part.read_text(encoding="utf-8") == content


def test_answers_to_standard_input_are_made_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "answers.jsonl"
    (tmp_path / "answers.jsonl.part").write_text(EARLIER, encoding="utf-8")
    with answers_written(output, {}) as answers:
        assert list(answers.begin(None, print)) == []
        answers.write([json.loads(EARLIER)])
    part = tmp_path / "answers.jsonl.part"
    reason = f"the rows that {part} answers cannot be told from those of standard input"
    assert f"Starting anew: {reason}. Its answers are kept in {part}.old.\n" == capsys.readouterr().out
    assert output.read_text(encoding="utf-8") == EARLIER
    assert (tmp_path / "answers.jsonl.part.old").read_text(encoding="utf-8") == EARLIER


def test_answers_are_put_aside_over_earlier_answers_only(tmp_path: Path) -> None:
    part, old = tmp_path / "answers.jsonl.part", tmp_path / "answers.jsonl.part.old"
    row = {"answer": "good", "log_probability": -1.0}
    for number in range(2):
        part.write_text(EARLIER + f'{{"number": {number}}}\n', encoding="utf-8")
        with answers_written(tmp_path / "answers.jsonl", {}) as answers:
            answers.begin(None, print)
            answers.write([row])
        assert old.read_text(encoding="utf-8") == EARLIER + f'{{"number": {number}}}\n'
    old.write_text("notes of a user\n", encoding="utf-8")
    with answers_written(tmp_path / "answers.jsonl", {}) as answers:  # nothing is put aside
        answers.begin(None, print)
        answers.write([row])
    part.write_text(EARLIER, encoding="utf-8")
    with refused("output_exists", file=str(old)):
        answers_written(tmp_path / "answers.jsonl", {}).__enter__()
    assert old.read_text(encoding="utf-8") == "notes of a user\n"
