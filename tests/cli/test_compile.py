"""What compile writes, predict answers with; and one sentence for what does not fit together."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from pathlib import Path

import pytest

from manyicl.engine.engine import Engine
from manyicl.engine.task_prefix import TaskPrefix
from tests.builders import tiny_loaded
from tests.cli.test_predict import run


@pytest.fixture(name="queries")
def _queries(tmp_path: Path) -> Path:
    path = tmp_path / "new.jsonl"
    path.write_text("".join(json.dumps({"text": f"play {i} film"}) + "\n" for i in range(30)), encoding="utf-8")
    return path


def answers(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_compiled_task_answers_as_the_task_itself(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    queries: Path,
    tmp_path: Path,
) -> None:
    task, prefix = f"{table}:text:label", tmp_path / "tickets.prefix"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", task, "-o", prefix, "--shots", 12, "--seed", 3) == 0
    printed = capsys.readouterr().out
    assert "12 demonstrations of 'tickets'" in printed
    assert "8–11" in printed
    assert "recoverable form" in printed
    common = ["--model", model_folder, "--input", queries, "--scores"]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    assert run(monkeypatch, "predict", *common, "--prefix", prefix, "--output", one) == 0
    assert run(monkeypatch, "predict", *common, "--task", task, "--shots", 12, "--seed", 3, "--output", other) == 0
    for a, b in zip(answers(one), answers(other), strict=True):
        assert a["answer"] == b["answer"]
        assert a["log_probability"] == pytest.approx(b["log_probability"], abs=1e-4)
        assert sum(a["probabilities"].values()) == pytest.approx(1)  # type: ignore[attr-defined]


def test_it_ends_with_what_to_do_and_only_with_what_it_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    # The last word of a row decides, which a model with random weights does not learn.
    rows = [f"{n} {'yes' if n % 2 else 'no'},{('bad', 'good')[n % 2]}" for n in range(52)]
    arguments = [
        "compile",
        "-m",
        model_folder,
        "-t",
        f"{table}:text:label,test_fraction=0",
        "-o",
        tmp_path / "t.prefix",
    ]

    def printed(num_rows: int, *more: object) -> list[str]:
        table.write_text("\n".join(["text,label", *rows[:num_rows]]) + "\n", encoding="utf-8")
        assert run(monkeypatch, *arguments, "--shots", 32, *more) == 0
        return capsys.readouterr().out.splitlines()

    *_, first, _, third, _ = printed(52)
    assert re.match(r"(TF-IDF|Repeating).* is better than the model: right on .* of the last 16 demonstrations", first)
    assert third.startswith("Measured on 20 rows that the prefix does not hold, in ")
    # Too few rows are left to try retrieval on them; an update does not try it.
    assert "Measured on" not in " ".join(printed(47) + printed(52, "--update"))


def test_nothing_is_measured_for_advice_that_nobody_reads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("manyicl.cli.compile.advice_for", lambda *_, **how: [f"retrieve {how['num_retrieved']}"])
    arguments = ["compile", "-m", model_folder, "-t", f"{table}:text:label", "-o", tmp_path / "t.prefix", "--shots", 4]
    assert run(monkeypatch, *arguments, "--json") == 0
    assert json.loads(capsys.readouterr().out)["advice"] == ["retrieve 4"]
    assert run(monkeypatch, *arguments) == 0
    assert "retrieve 4" in capsys.readouterr().out
    monkeypatch.setattr("manyicl.cli.compile.advice_for", None)
    assert run(monkeypatch, *arguments, "--quiet") == 0
    assert capsys.readouterr().out == ""


def test_the_help_says_that_the_file_contains_the_examples(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "compile", "--help") == 0
    assert "recoverable form" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_answers_below_the_threshold_are_left_empty_and_marked(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, queries: Path, tmp_path: Path
) -> None:
    output = tmp_path / "answers.csv"
    common = ["--model", model_folder, "--task", f"{table}:text:label", "--shots", 4, "--input", queries]
    assert run(monkeypatch, "predict", *common, "--abstain-below", 1, "--output", output) == 0
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    assert {(row["answer"], row["abstained"]) for row in rows} == {("", "true")}
    assert {row["guess"] for row in rows} <= {"good", "bad"}
    assert run(monkeypatch, "predict", *common, "--abstain-below", 0, "--output", output) == 0
    rows = list(csv.DictReader(io.StringIO(output.read_text(encoding="utf-8"))))
    assert {(bool(row["answer"]), row["abstained"], row["guess"]) for row in rows} == {(True, "false", "")}


def test_scores_in_csv_are_a_column_for_each_label(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries, output = tmp_path / "some.jsonl", tmp_path / "answers.csv"
    queries.write_text('{"text": "film", "score:good": "mine"}\n{"text": "", "score:good": 3}\n', encoding="utf-8")
    common = ["--model", model_folder, "--task", f"{table}:text:label", "--shots", 4, "--input", queries]
    assert run(monkeypatch, "predict", *common, "--scores", "--output", output) == 3
    answered, unanswered = csv.DictReader(io.StringIO(output.read_text(encoding="utf-8")))
    assert answered["input_score:good"] == "mine"
    scores = {label: answered[f"score:{label}"] for label in ("good", "bad")}
    assert all(re.fullmatch(r"[01]\.\d{4}", score) for score in scores.values())
    assert sum(map(float, scores.values())) == pytest.approx(1, abs=1e-3)
    assert max(scores, key=lambda label: float(scores[label])) == answered["answer"]
    assert (unanswered["score:good"], unanswered["score:bad"]) == ("", "")
    assert {answered["answer"], answered["second"]} == {"good", "bad"}
    assert [answered["probability"], answered["second_probability"]] == [
        str(float(scores[label])) for label in (answered["answer"], answered["second"])
    ]
    assert (unanswered["probability"], unanswered["second"]) == ("", "")


def test_many_labels_get_a_margin_and_no_probability_unless_every_label_is_scored(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, queries: Path, tmp_path: Path
) -> None:
    monkeypatch.setattr("manyicl.engine.queries.MOST_LABELS_SCORED", 1)
    common = ["--model", model_folder, "--task", f"{table}:text:label", "--shots", 4, "--input", queries]
    rows: dict[str, list[dict[str, object]]] = {}
    for name, more in (("best", []), ("abstain", ["--abstain-below", 0.1]), ("scores", ["--scores"])):
        output = tmp_path / f"{name}.jsonl"
        assert run(monkeypatch, "predict", *common, *more, "--output", output) == 0
        rows[name] = answers(output)
        assert all(("probability" in row, "margin" in row) == (name != "best", name == "best") for row in rows[name])
    for row, scored in zip(rows["best"], rows["scores"], strict=True):
        scores: dict[str, float] = scored["scores"]  # type: ignore[assignment]
        assert (row["answer"], row["second"]) == (scored["answer"], scored["second"])
        assert row["margin"] == pytest.approx(max(scores.values()) - min(scores.values()), abs=1e-4)


def test_a_packed_csv_has_the_score_columns_of_a_plain_one(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, queries: Path, tmp_path: Path
) -> None:
    common = ["--model", model_folder, "--task", f"{table}:text:label", "--shots", 4, "--input", queries, "--scores"]
    plain, packed = tmp_path / "answers.csv", tmp_path / "answers.csv.gz"
    assert run(monkeypatch, "predict", *common, "--output", plain) == 0
    assert run(monkeypatch, "predict", *common, "--output", packed) == 0
    assert "score:good" in plain.read_text(encoding="utf-8").partition("\n")[0]
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()


def test_rows_are_retrieved_for_each_query(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, queries: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    common = ["--model", model_folder, "--task", f"{table}:text:label", "--shots", 4, "--input", queries]
    one, other = tmp_path / "one.jsonl", tmp_path / "other.jsonl"
    assert run(monkeypatch, "predict", *common, "--output", one) == 0
    assert run(monkeypatch, "predict", *common, "--retrieve", 2, "--output", other) == 0
    scores = [[row["log_probability"] for row in answers(path)] for path in (one, other)]
    assert all(a != b for a, b in zip(*scores, strict=True))


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--task, --prefix or both"),
        (["--task", "TABLE", "--prefix", "PREFIX", "--shots", 3], "--shots goes with --task"),
        (["--prefix", "PREFIX", "--shots", 3], "--shots goes with --task"),
        (["--prefix", "PREFIX", "--retrieve", 3], "holds no rows to retrieve. Compile it with --retrieve, or name"),
        (["--prefix", "none.prefix"], "does not exist"),
        (["--prefix", "INPUT"], "no complete compiled task"),
        (["--prefix", "PREFIX", "--max-context-tokens", 20], "max_context_tokens, 20"),
        (["--prefix", "PREFIX", "--temperature", 1], "sampling draws free answers"),
        (["--prefix", "PREFIX", "--temperature", 0], "temperature is out of range"),
        (["--prefix", "PREFIX", "--dtype", "bfloat16"], "another precision"),
        (["--prefix", "PREFIX", "--abstain-below", 2], "less than or equal to 1"),
    ],
)
def test_what_does_not_fit_together_ends_with_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    queries: Path,
    tmp_path: Path,
    arguments: list[object],
    sentence: str,
) -> None:
    prefix = tmp_path / "tickets.prefix"
    task = f"{table}:text:label"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", task, "-o", prefix, "--shots", 4) == 0
    capsys.readouterr()
    places = {"TABLE": task, "PREFIX": prefix, "INPUT": queries}
    given = [places.get(one, one) if isinstance(one, str) else one for one in arguments]
    assert run(monkeypatch, "predict", "--model", model_folder, "--input", queries, *given) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"--output": "."}, "the output is a folder"),
        ({"--output": "nowhere/x.prefix"}, "does not exist"),
        ({"--task": "nowhere.csv:text:label"}, "nowhere.csv"),
        ({"--model": "runs/nowhere"}, "does not exist"),
        ({"--shots": 0}, "neither instruction nor demonstrations"),
        ({"--shots": 4000}, "4000"),
    ],
)
def test_a_task_that_cannot_be_compiled_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    tmp_path: Path,
    change: dict[str, object],
    sentence: str,
) -> None:
    arguments = {"--model": model_folder, "--task": f"{table}:text:label", "--output": tmp_path / "x.prefix"}
    flat = [part for pair in {**arguments, **change}.items() for part in pair]
    assert run(monkeypatch, "compile", *flat) == 2
    printed = capsys.readouterr().err
    assert sentence in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.glob("*.part"))


def test_the_tasks_own_rows_are_never_written_over(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    queries: Path,
    tmp_path: Path,
) -> None:
    before, task = table.read_bytes(), f"{table}:text:label"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", task, "-o", table, "--shots", 4) == 2
    assert "not written by this command" in capsys.readouterr().err
    common = ["predict", "--model", model_folder, "--input", queries]
    assert run(monkeypatch, *common, "--task", task, "--shots", 4, "--output", table) == 2
    assert "not written by this command" in capsys.readouterr().err
    assert table.read_bytes() == before
    prefix = tmp_path / "tickets.csv.jsonl"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", task, "-o", prefix, "--shots", 4) == 0
    assert run(monkeypatch, *common, "--prefix", prefix, "--output", prefix) == 2
    assert "--prefix and the output are the same file" in capsys.readouterr().err


def test_rows_that_did_not_fit_the_prefix_may_still_be_retrieved(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, queries: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    output = tmp_path / "answers.jsonl"
    common = ["predict", "--model", model_folder, "--task", f"{table}:text:label,test_fraction=0", "--input", queries]
    assert run(monkeypatch, *common, "--retrieve", 2, "--max-context-tokens", 300, "--output", output) == 0
    assert len(answers(output)) == 30


def test_a_wrong_row_is_found_before_a_model_is_loaded_and_answers_before_a_late_one_are_named(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    tmp_path: Path,
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "film"}\n{"text": " "}\n', encoding="utf-8")
    common = ["predict", "--task", f"{table}:text:label", "--shots", 2, "--output", tmp_path / "answers.jsonl"]
    common += ["--bad-rows", "refuse"]
    assert run(monkeypatch, *common, "--model", "runs/nowhere", "--input", rows) == 2
    assert "rows.jsonl:2: it is empty" in capsys.readouterr().err
    rows.write_text("", encoding="utf-8")
    assert run(monkeypatch, *common, "--model", "runs/nowhere", "--input", rows) == 2
    assert "row" in capsys.readouterr().err
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "film"}\n{"text": "a \\ud800"}\n'))
    assert run(monkeypatch, *common, "--model", model_folder, "--input", "-") == 2
    printed = capsys.readouterr().err
    assert "standard input:2: it holds" in printed
    assert "answers.jsonl.part" in printed
    monkeypatch.setattr("sys.stdin", io.StringIO('{"text": "film", "note": "\\ud800"}\n'))
    assert run(monkeypatch, *common, "--model", model_folder, "--input", "-") == 0
    assert answers(tmp_path / "answers.jsonl")[0]["note"] == "\ud800"


def test_an_update_encodes_what_follows_the_first_change_and_gives_what_a_new_compilation_gives(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    task, prefix = f"{table}:text:label,test_fraction=0", tmp_path / "t.prefix"
    arguments = ["compile", "-m", model_folder, "-t", task, "-o", prefix, "--update"]
    queries = tmp_path / "new.jsonl"
    queries.write_text('{"text": "film"}\n', encoding="utf-8")
    predict = ["predict", "-m", model_folder, "-t", task, "--prefix", prefix, "--input", queries]
    # The first update finds nothing and compiles everything.
    assert run(monkeypatch, *arguments) == 0
    assert "encoded; the others were kept" not in capsys.readouterr().out
    first = loaded(model_folder, prefix)
    assert run(monkeypatch, *arguments) == 0
    assert f"0 of {first.num_tokens:,} tokens encoded" in capsys.readouterr().out
    again = loaded(model_folder, prefix)
    assert (again.token_ids, again.demonstrations, again.answers) == (
        first.token_ids,
        first.demonstrations,
        first.answers,
    )
    with table.open("a", encoding="utf-8") as file:
        file.write("one more row,good\n")
    assert run(monkeypatch, *predict) == 2
    assert "other rows; 0 demonstrations of 40 no longer among them" in capsys.readouterr().err
    assert run(monkeypatch, *arguments) == 0
    longer = loaded(model_folder, prefix)
    found = re.search(r"(\d+) of (\d+) tokens encoded", capsys.readouterr().out)
    assert found is not None
    # The last tokens before an answer's first are read again for its score.
    assert longer.num_tokens - first.num_tokens <= int(found[1]) + 1 < 30
    assert longer.demonstrations[:40] == first.demonstrations
    assert longer.answers[:40] == first.answers
    assert run(monkeypatch, *predict) == 0
    gone = first.demonstrations[17]
    content = table.read_text(encoding="utf-8")
    assert content.count(f"{gone.query.text},{gone.answer}\n") == 1
    table.write_text(content.replace(f"{gone.query.text},{gone.answer}\n", ""), encoding="utf-8")
    assert run(monkeypatch, *arguments) == 0
    shorter = loaded(model_folder, prefix)
    contents = [(one.query.text, one.answer) for one in longer.demonstrations if one != gone]
    assert [(one.query.text, one.answer) for one in shorter.demonstrations] == contents
    assert shorter.answers[:17] == longer.answers[:17]
    engine = Engine.from_pretrained(model_folder)
    anew = engine.compile(shorter.task, shorter.demonstrations)
    assert anew.token_ids == shorter.token_ids
    for one, other in zip(shorter.answers, anew.answers, strict=True):
        assert (one.num_shots, one.is_right) == (other.num_shots, other.is_right)
        assert one.log_probability == pytest.approx(other.log_probability, abs=1e-4)
    (updated,), (expected,) = (list(engine.predict(some, ["film"], scores="all")) for some in (shorter, anew))
    assert updated.log_probability == pytest.approx(expected.log_probability, abs=1e-4)


def test_an_update_with_so_many_shots_says_which_rows_and_labels_it_does_not_use(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    task = f"{table}:text:label,test_fraction=0"
    arguments = ["compile", "-m", model_folder, "-t", task, "-o", tmp_path / "t.prefix", "--update", "--shots"]
    for _ in range(2):  # nothing has changed in the second
        assert run(monkeypatch, *arguments, 4) == 0
        assert "not among" not in capsys.readouterr().err
    with table.open("a", encoding="utf-8") as file:
        file.write("one more row,good\nanother,unknown\n")
    assert run(monkeypatch, *arguments, 4) == 0
    line = (
        "The rows have changed, and earlier demonstrations come first: 38 of 42 rows are not among the demonstrations, "
        "and no row of 'unknown' is. Raise --shots to add new rows, or drop --update to choose among all anew.\n"
    )
    assert line in capsys.readouterr().err
    table.write_text(table.read_text(encoding="utf-8") + "a third,good\n", encoding="utf-8")
    assert run(monkeypatch, *arguments, 43) == 0
    assert "not among" not in capsys.readouterr().err


def test_an_update_of_another_model_compiles_everything_and_says_why(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    task, prefix = f"{table}:text:label", tmp_path / "t.prefix"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", task, "-o", prefix, "--shots", 4) == 0
    other = tiny_loaded(seed=5)
    other.model.save_pretrained(tmp_path / "other")
    other.tokenizer.save_pretrained(tmp_path / "other")
    arguments = ["compile", "-m", tmp_path / "other", "-t", task, "-o", prefix, "--shots", 4, "--update"]
    assert run(monkeypatch, *arguments) == 0
    assert "Compiling everything: " in capsys.readouterr().err
    assert len(loaded(tmp_path / "other", prefix).answers) == 4


def loaded(model: Path, prefix: Path) -> TaskPrefix:
    return Engine.from_pretrained(model).load(prefix)


@pytest.mark.parametrize("num_shots", [0, 6])
def test_a_compiled_task_retrieves_what_the_task_itself_does(
    num_shots: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    model_folder: Path,
    table: Path,
    queries: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    folder = tmp_path / "task"
    folder.mkdir()
    (folder / "task.yaml").write_text(
        "family: classification\ninstruction: Which?\nquery: '{{ text }}'\nanswer: '{{ label }}'\nlabels: from_train\n"
        f"data: {{file: {table.name}, test_fraction: 0}}\n",
        encoding="utf-8",
    )
    table.rename(folder / table.name)
    prefix, plain = tmp_path / "with.prefix", tmp_path / "plain.prefix"
    compiling = ["compile", "-m", model_folder, "-t", folder, "--shots", num_shots, "-o"]
    assert run(monkeypatch, *compiling, prefix, "--retrieve", 2) == 0
    assert f"recoverable form, and {40 - num_shots} other rows as text." in capsys.readouterr().out
    assert run(monkeypatch, *compiling, plain) == 0
    assert "other rows" not in capsys.readouterr().out
    assert b"film 3 was" in prefix.read_bytes()
    common = ["predict", "-m", model_folder, "--input", queries, "--scores", "--similar", 2, "--retrieve"]
    found = {}
    for name, source in {
        "task": ["-t", folder, "--shots", num_shots],
        "compiled": ["--prefix", prefix],
        "both": ["--prefix", plain, "-t", folder],
    }.items():
        assert run(monkeypatch, *common, 2, *source, "--output", tmp_path / f"{name}.jsonl") == 0
        found[name] = answers(tmp_path / f"{name}.jsonl")
    for one in ("compiled", "both"):
        for a, b in zip(found[one], found["task"], strict=True):
            assert (a["answer"], a["similar"]) == (b["answer"], b["similar"])
            assert a["log_probability"] == pytest.approx(b["log_probability"], abs=1e-4)
    assert run(monkeypatch, *common, 0, "--prefix", prefix, "--output", tmp_path / "without.jsonl") == 0
    without = answers(tmp_path / "without.jsonl")
    assert [row["log_probability"] for row in without] != [row["log_probability"] for row in found["compiled"]]


def test_an_update_keeps_rows_to_retrieve_or_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    task, prefix = f"{table}:text:label,test_fraction=0", tmp_path / "t.prefix"
    arguments = ["compile", "-m", model_folder, "-t", task, "-o", prefix, "--shots", 4, "--update"]
    assert run(monkeypatch, *arguments, "--retrieve", 2) == 0
    before = loaded(model_folder, prefix)
    assert len(before.rows) == 36
    capsys.readouterr()
    assert run(monkeypatch, *arguments) == 2
    assert "--update would lose them" in capsys.readouterr().err
    assert loaded(model_folder, prefix).rows == before.rows
    table.write_text(table.read_text(encoding="utf-8") + "one more row,good\n", encoding="utf-8")
    assert run(monkeypatch, *arguments, "--retrieve", 2) == 0
    after = loaded(model_folder, prefix)
    assert after.demonstrations == before.demonstrations
    assert [row.query.text for row in after.rows if row not in before.rows] == ["one more row"]


def test_a_compiled_task_keeps_room_for_the_rows_to_retrieve(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, queries: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    task, prefix, output = f"{table}:text:label,test_fraction=0", tmp_path / "t.prefix", tmp_path / "answers.jsonl"
    common = ["-m", model_folder, "--max-context-tokens", 300, "--retrieve", 4]
    assert run(monkeypatch, "compile", *common, "-t", task, "-o", prefix) == 0
    compiled = loaded(model_folder, prefix)
    assert compiled.num_dropped > 0
    assert len(compiled.rows) == compiled.num_dropped
    assert run(monkeypatch, "predict", *common, "--prefix", prefix, "--input", queries, "--output", output) == 0


def test_where_every_row_is_a_demonstration_none_is_left_to_retrieve(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model_folder: Path, table: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    table.write_text("".join(table.read_text(encoding="utf-8").splitlines(keepends=True)[:21]), encoding="utf-8")
    task, prefix = f"{table}:text:label,test_fraction=0", tmp_path / "t.prefix"
    assert run(monkeypatch, "compile", "-m", model_folder, "-t", task, "-o", prefix, "--retrieve", 4) == 2
    assert "No example is left to retrieve: 20 were given and 20 excluded" in capsys.readouterr().err
    assert not prefix.exists()


def test_similar_demonstrations_are_written_beside_the_same_answers(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    queries = tmp_path / "some.jsonl"
    queries.write_text('{"text": "film 7 was"}\n{"text": ""}\n{"text": "zebra"}\n', encoding="utf-8")
    common = ["predict", "-m", model_folder, "-t", f"{table}:text:label,test_fraction=0", "--input", queries]
    plain, lines, fields = (tmp_path / name for name in ("plain.jsonl", "similar.jsonl", "similar.csv"))
    assert run(monkeypatch, *common, "--shots", 12, "--output", plain) == 3
    for output in (lines, fields):
        assert run(monkeypatch, *common, "--shots", 12, "--similar", 2, "--output", output) == 3
    written = answers(lines)
    assert [{name: value for name, value in row.items() if name != "similar"} for row in written] == answers(plain)
    found, none, unlike = (row["similar"] for row in written)
    assert isinstance(found, list)
    assert [sorted(one) for one in found] == [["answer", "text"]] * 2
    assert (none, unlike) == (None, [])
    rows = list(csv.DictReader(io.StringIO(fields.read_text(encoding="utf-8"))))
    assert [row["similar"] and json.loads(row["similar"]) for row in rows] == [found, "", []]


def test_a_retrieved_row_is_among_the_similar_ones(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    table.write_text(table.read_text(encoding="utf-8") + "an unheard zebra,good\n", encoding="utf-8")
    queries, output = tmp_path / "some.jsonl", tmp_path / "answers.jsonl"
    queries.write_text('{"text": "unheard zebra film"}\n', encoding="utf-8")
    common = ["predict", "-m", model_folder, "-t", f"{table}:text:label,test_fraction=0", "--input", queries]
    common += ["--shots", 4, "--similar", 3, "--output", output]
    found = {}
    for num_retrieved in (0, 1):
        assert run(monkeypatch, *common, "--retrieve", num_retrieved) == 0
        found[num_retrieved] = [one["text"] for one in answers(output)[0]["similar"]]  # type: ignore[attr-defined]
    assert "an unheard zebra" not in found[0]
    assert found[1][0] == "an unheard zebra"


def test_a_table_without_rows_has_the_column_of_similar_ones(
    monkeypatch: pytest.MonkeyPatch, model_folder: Path, table: Path, tmp_path: Path
) -> None:
    queries, output = tmp_path / "none.csv", tmp_path / "answers.csv"
    queries.write_text("text\n", encoding="utf-8")
    common = ["predict", "-m", model_folder, "-t", f"{table}:text:label", "--input", queries, "--shots", 4]
    assert run(monkeypatch, *common, "--similar", 3, "--output", output) == 0
    assert "similar" in output.read_text(encoding="utf-8").strip().split(",")
