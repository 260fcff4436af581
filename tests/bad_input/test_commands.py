"""Mistakes in queries, in options, and in folders of results."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import pytest

from manyicl.evaluation.report import plot_shot_curves
from manyicl.evaluation.result import ResultStore
from tests.bad_input.case import Case, accepted, meet, refused, run, table_of
from tests.bad_input.files import DATA, KEYS, lines, spoilt, task

PREDICT = "predict --model MODEL --task t --input new.jsonl --output answers.jsonl"
EVALUATE = "evaluate --model MODEL --tasks t --output results"
QUERIES = lines({"text": "film 3"}, {"text": "play 4"})
FREE = spoilt("classification", "generation", KEYS) + DATA
ANSWERED = ("answers.jsonl.part", "answers.jsonl.part.json")


def asking(queries: str | bytes, name: str = "new.jsonl") -> dict[str, str | bytes]:
    """The task and a file of queries."""
    return {**task(), name: queries}


BAD_ROWS: dict[str, tuple[list[dict[str, object]], int, str, str]] = {
    "a query without its column": (
        [{"text": "a"}, {"txt": "b"}],
        2,
        "missing_column",
        "Template '{{ text }}' names the column 'text', which is missing; found the columns ['txt']. Did you mean",
    ),
    "an empty query among others": ([{"text": "a"}, {"text": " "}], 2, "empty_query", "it is empty"),
    "a query that is null": ([{"text": None}], 1, "empty_query", "it is empty"),
    "a query of half a character": (
        [{"text": "a"}, {"text": "\ud83d"}, {"text": "c"}],
        2,
        "half_a_character",
        "it holds '\\ud83d'",
    ),
    "a query of a megabyte": (
        [{"text": "a"}, {"text": "film " * 200_000}, {"text": "c"}],
        2,
        "query_too_long",
        " tokens are needed with 0 demonstrations and its answer; max_context_tokens is 512.",
    ),
    "a query of ten megabytes": (
        [{"text": "film " * 2_000_000}, {"text": "b"}],
        1,
        "template_fails",
        "Template '{{ text | trim }}' fails: ",
    ),
}


def bad_row(name: str) -> dict[str, str | bytes]:
    """The task and a file of queries, one of which cannot be answered."""
    files = asking(lines(*BAD_ROWS[name][0]))
    if name == "a query of ten megabytes":
        files["t/task.yaml"] = spoilt("{{ text }}", "{{ text | trim }}", KEYS) + DATA
    return files


ASKED = [
    Case("queries that do not exist", PREDICT, ("new.jsonl: the file does not exist",), task()),
    Case(
        "misspelt queries",
        PREDICT,
        ("new.jsonl: the file does not exist. Did you mean 'news.jsonl'?",),
        asking(QUERIES, "news.jsonl"),
    ),
    Case(
        "a folder for queries",
        spoilt("new.jsonl", "t", PREDICT),
        ("t: this is a folder; expected a file",),
        task(),
    ),
    refused("no queries", PREDICT, "no_rows", file="new.jsonl", files=asking("\n\n")),
    *(
        refused(
            name,
            f"{PREDICT} --bad-rows refuse",
            code,
            file="new.jsonl",
            row=row,
            files=bad_row(name),
            leaves=ANSWERED,
        )
        for name, (_, row, code, _) in BAD_ROWS.items()
    ),
    Case("queries of broken JSON", PREDICT, ("new.jsonl:2: broken JSON",), asking('{"text": "a"}\n{"text": \n')),
    Case(
        "queries with a key twice",
        PREDICT,
        ("new.jsonl:1: the key 'text' occurs twice",),
        asking('{"text": "a", "text": "b"}\n'),
    ),
    Case(
        "queries in Latin-1",
        PREDICT,
        ("new.jsonl:1: not text",),
        asking('{"text": "é"}\n'.encode("latin-1")),
    ),
    Case(
        "queries between semicolons",
        "predict --model MODEL --task t --input new.csv --delimiter ,",
        ("new.csv:1: ", "expected fields between ','", "It is ';', so it seems.", "`--delimiter` for queries"),
        asking("id;text\n1;a\n", "new.csv"),
    ),
    Case(
        "a query with a field too many",
        "predict --model MODEL --task t --input new.csv",
        ("new.csv:3: the row does not fit the header; expected 2 fields, found 3",),
        asking("id,text\n1,a\n2,b,c\n", "new.csv"),
    ),
    Case(
        "queries in an old spreadsheet",
        "predict --model MODEL --task t --input new.xls",
        ("found the suffix '.xls'",),
        asking("", "new.xls"),
    ),
    Case(
        "a list on standard input",
        "predict --model MODEL --task t --input -",
        ("standard input:1: not a row; expected one JSON object a line", "found [1]"),
        task(),
        stdin="[1]\n",
    ),
    Case(
        "broken JSON on standard input",
        "predict --model MODEL --task t --input -",
        ("standard input:3: broken JSON",),
        task(),
        stdin=QUERIES + "{\n",
    ),
    Case(
        "a query without its column on standard input",
        "predict --model MODEL --task t --input - --bad-rows refuse",
        ("standard input:2: Template", "'text'"),
        task(),
        stdin='\n{"txt": "a"}\n',
    ),
    refused(
        "a delimiter of two characters",
        "predict --model MODEL --task t --input new.csv --delimiter '||'",
        "bad_delimiter",
        found="'||'",
        field="--delimiter",
        files=asking("text\na\n", "new.csv"),
    ),
    refused(
        "a delimiter of JSON",
        f"{PREDICT} --delimiter ';'",
        "useless_option",
        found="'new.jsonl'",
        field="--delimiter",
        files=asking(QUERIES),
    ),
    refused(
        "answers over a file of somebody",
        PREDICT,
        "output_exists",
        what="the output exists and was not written by this command",
        remedy="Give another name",
        file="answers.jsonl",
        files={**asking(QUERIES), "answers.jsonl": lines({"text": "a", "label": "good"})},
    ),
    refused(
        "answers over a table of somebody",
        spoilt("answers.jsonl", "answers.csv", PREDICT),
        "output_exists",
        file="answers.csv",
        files={**asking(QUERIES), "answers.csv": "text,label\na,good\n"},
    ),
    accepted(
        "answers where an interrupted run left some, of an earlier version",
        PREDICT,
        "Starting anew: answers.jsonl.part is of an interrupted run with nothing that says what it was made of.",
        files={**asking(QUERIES), "answers.jsonl.part": lines({"text": "a", "answer": "good", "log_probability": -1})},
        leaves=("answers.jsonl.part.old",),
    ),
    refused(
        "a file of somebody where answers are kept until they are complete",
        PREDICT,
        "output_exists",
        remedy="Give another name",
        file="answers.jsonl.part",
        files={**asking(QUERIES), "answers.jsonl.part": lines({"text": "a", "label": "good"})},
    ),
    refused(
        "a folder where answers are kept until they are complete",
        PREDICT,
        "output_exists",
        file="answers.jsonl.part",
        files={**asking(QUERIES), "answers.jsonl.part/x": ""},
    ),
    refused(
        "answers below a file",
        spoilt("answers.jsonl", "new.jsonl/answers.jsonl", PREDICT),
        "output_below_file",
        file="new.jsonl/answers.jsonl",
        files=asking(QUERIES),
    ),
    refused(
        "an answer file of another kind",
        spoilt("answers.jsonl", "answers.txt", PREDICT),
        "wrong_ending",
        expected=".jsonl or .csv",
        found="'answers.txt'",
        files=asking(QUERIES),
    ),
    refused(
        "an answer file in a folder that is not there",
        spoilt("answers.jsonl", "out/answers.jsonl", PREDICT),
        "output_folder_missing",
        file="out/answers.jsonl",
        what="the folder 'out'",
        files=asking(QUERIES),
    ),
    refused(
        "a folder for the answers",
        spoilt("answers.jsonl", "out.jsonl", PREDICT),
        "output_is_folder",
        file="out.jsonl",
        files={**asking(QUERIES), "out.jsonl/x": ""},
    ),
    refused(
        "answers over the queries",
        spoilt("answers.jsonl", "./new.jsonl", PREDICT),
        "output_is_input",
        what="--input and the output are the same file",
        files=asking(QUERIES),
    ),
    refused(
        "answers over the rows of the task",
        spoilt("answers.jsonl", "t/train.jsonl", PREDICT),
        "output_exists",
        file="t/train.jsonl",
        files=asking(QUERIES),
    ),
    refused(
        "rows of other columns in a CSV of answers",
        spoilt("answers.jsonl", "answers.csv", PREDICT),
        "other_columns",
        row=2,
        found="no 'note', 'id'",
        remedy="Write to .jsonl, where rows may differ.",
        files=asking(lines({"text": "a", "note": "c"}, {"text": "b", "id": 1})),
        leaves=("answers.csv.part", "answers.csv.part.json"),
    ),
    Case(
        "more shots than rows",
        f"{PREDICT} --shots 9",
        ("Task 't' has 8 training examples; expected num_shots from 0 to 8, found 9",),
        asking(QUERIES),
    ),
    refused(
        "a threshold for free answers",
        f"{PREDICT} --abstain-below 0.5",
        "conflicting_options",
        field="--abstain-below",
        files={**task(FREE), "new.jsonl": QUERIES},
    ),
    refused(
        "a draw among labels",
        f"{PREDICT} --temperature 1",
        "conflicting_options",
        field="sampling",
        files=asking(QUERIES),
    ),
    refused(
        "a temperature of nothing",
        f"{PREDICT} --temperature 0",
        "out_of_range",
        found="0.0",
        field="temperature",
        files={**task(FREE), "new.jsonl": QUERIES},
    ),
    refused(
        "a temperature that is no number",
        f"{PREDICT} --temperature nan",
        "out_of_range",
        found="nan",
        field="temperature",
        files={**task(FREE), "new.jsonl": QUERIES},
    ),
    refused(
        "a share above one",
        f"{PREDICT} --top-p 1.5",
        "out_of_range",
        found="1.5",
        field="top_p",
        files={**task(FREE), "new.jsonl": QUERIES},
    ),
    Case(
        "a task that is broken",
        PREDICT,
        ("t/task.yaml:2: not valid YAML",),
        {**task(spoilt("'{{ text }}'", "{{ text }}", KEYS) + DATA), "new.jsonl": QUERIES},
    ),
]

OPTIONS = [
    *(
        refused(
            name,
            f"{EVALUATE} --shots={shots}",
            "not_whole_numbers",
            expected="whole numbers from 0",
            found=found,
            field="--shots",
            files=task(),
        )
        for name, shots, found in (
            ("shots below zero", "-1", "'-1'"),
            ("shots in letters", "a", "'a'"),
            ("no shots", "''", "''"),
            ("shots of commas", ",,", "',,'"),
            ("half a shot", "0,1.5", "'1.5'"),
            ("shots between semicolons", "'0;4'", "'0;4'"),
            ("shots in other digits", "²", "'²'"),
            ("shots of five thousand digits", "9" * 5000, "'9999"),
        )
    ),
    Case("no seeds", f"{EVALUATE} --seeds 0", ("--seeds", "Invalid value"), task(), is_option=True),
    Case(
        "no queries asked",
        f"{EVALUATE} --queries 0",
        ("--queries", "Invalid value"),
        task(),
        is_option=True,
    ),
    Case(
        "seeds in letters",
        f"{EVALUATE} --seeds three",
        ("--seeds", "Invalid value"),
        task(),
        is_option=True,
    ),
    Case("an option that there is not", f"{EVALUATE} --sede 1", ("No such option: --sede",), task(), is_option=True),
    Case("a command that there is not", "evalute", ("No such command 'evalute'",), is_option=True),
    Case(
        "a model left out", "evaluate --tasks t --output results", ("Missing option '--model'",), task(), is_option=True
    ),
    Case(
        "a context of a few tokens",
        "tasks check t --model MODEL --context 4",
        ("--context", "Invalid value"),
        task(),
        is_option=True,
    ),
    Case(
        "an episode of nothing",
        "tasks show t --shots 0",
        ("--shots", "Invalid value"),
        task(),
        is_option=True,
    ),
    refused(
        "an episode longer than the task",
        "tasks show t --shots 9",
        "num_shots_out_of_range",
        expected="num_shots from 0 to 8",
        found="9",
        files=task(),
    ),
    Case(
        "a nano world that there is not",
        "tasks nano world --split test",
        ("split", "'test'", "base"),
        is_option=True,
    ),
]

RESULTS = [
    refused(
        "a task without a test side",
        EVALUATE,
        "no_test_rows",
        what="task 't' has no test rows",
        files=task(f"{KEYS}data: {{train: train.jsonl}}\n"),
    ),
    refused(
        "results in the place of a file",
        EVALUATE,
        "output_is_file",
        expected="a folder",
        file="results",
        files={**task(), "results": "x"},
    ),
    refused(
        "results below a file",
        spoilt("results", "results/new", EVALUATE),
        "output_below_file",
        what="'results' above it is a file",
        file="results/new",
        files={**task(), "results": "x"},
    ),
    refused(
        "test rows longer than the context",
        f"{EVALUATE} --max-context-tokens 5",
        "query_too_long",
        what="no test row of task 't' fits: all 4 are too long",
        expected="at most 5 tokens",
        files=task(),
    ),
    Case(
        "two tasks of one name to be measured",
        "evaluate --model MODEL --tasks a --tasks b --output results",
        ("Two tasks are named 'same'",),
        {**task(KEYS + DATA + "name: same\n", name="a"), **task(KEYS + DATA + "name: same\n", name="b")},
    ),
    refused("a report of no folder", "report results", "not_a_folder", file="results"),
    refused("a report of a file", "report results", "not_a_folder", file="results", files={"results": "x"}),
    refused(
        "a report of an empty folder",
        "report results",
        "no_results",
        remedy="Run `manyicl evaluate --output results` first",
        file="results",
        files={"results/README.md": "x"},
    ),
    *(
        refused(
            name,
            "report results",
            "broken_record",
            what=f"not a complete record of this version, {what}",
            remedy="Delete the result and evaluate again",
            file="results/a.result.json",
            files={"results/a.result.json": content},
        )
        for name, content, what in (
            ("a record that is cut", '{"record_version": 1, "ta', "invalid JSON: EOF while parsing"),
            ("a record that is empty", "", "invalid JSON"),
            ("a record of bytes", b"\xff\xfe\x00", "invalid JSON"),
            ("a record that is a list", "[1]", "input should be an object"),
            ("a record of another version", '{"record_version": 7}', "record_version: input should be 2, found 7"),
        )
    ),
]


@pytest.fixture(name="measured", scope="session")
def _measured(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task and the results of a model on it."""
    folder = tmp_path_factory.mktemp("measured")
    for name, content in task().items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")
    words = ["evaluate", "--model", model_folder, "--tasks", folder / "t", "--output", folder / "results"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["manyicl", *map(str, words), "--shots", "0,2", "--seeds", "1"])
        assert run() == 0
    return folder


def each(pattern: str, change: Callable[[str], str | bytes]) -> Callable[[Path], None]:
    """Change the files of the results that match."""

    def act(folder: Path) -> None:
        for path in sorted((folder / "results").glob(pattern)):
            content = change(path.read_text(encoding="utf-8"))
            path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return act


def _with_earlier_page(folder: Path) -> None:
    """Let a page of an earlier version stand there, which says whose it is in its title alone."""
    (folder / "results" / "report.html").write_text("<title>Shot curves · manyicl</title>", encoding="utf-8")


def _with_earlier_curves(folder: Path) -> None:
    """Let the curves of an earlier report stand there."""
    plot_shot_curves(ResultStore(folder / "results").load(), folder / "a.png")


def _changed(change: Mapping[str, object], text: str) -> str:
    points = [json.loads(line) for line in text.split("\n")[:-1]]
    return "".join(json.dumps({**point, "record": {**point["record"], **change}}) + "\n" for point in points)


FILES_OF_RESULTS = "*.results.jsonl"
MEASURED = [
    accepted("a report of whole results", "report results", "Report: results/report.html"),
    *(
        refused(
            name,
            "report results",
            "broken_record",
            what=f"not a complete record of this version, {what}",
            file="results/t.results.jsonl",
            row=1,
            prepare=each(FILES_OF_RESULTS, partial(_changed, change)),
        )
        for name, change, what in (
            ("a record with a field too many", {"colour": 1}, "record.colour: extra inputs are not permitted, found 1"),
            ("a score above one", {"score": 2}, "record.score: input should be less than or equal to 1, found 2"),
            ("a score that is none", {"score": float("nan")}, "record.score: "),
        )
    ),
    refused(
        "half a record where a run is resumed",
        f"{EVALUATE} --shots 0,2 --seeds 1",
        "broken_record",
        remedy="Delete the result and evaluate again",
        file="results/t.results.jsonl",
        row=1,
        prepare=each(FILES_OF_RESULTS, lambda text: text[:200] + "\n"),
    ),
    accepted(
        "a result of which a killed process wrote half",
        f"{EVALUATE} --shots 0,2 --seeds 1",
        "2 results in results, 1 of them found from an earlier run",
        prepare=each(FILES_OF_RESULTS, lambda text: text[:-200]),
    ),
    refused(
        "predictions of another form",
        "report results",
        "broken_record",
        what="not a complete record of this version, predictions.0.references: field required",
        row=2,
        prepare=each(FILES_OF_RESULTS, lambda text: text.replace('"references"', '"reference"')),
    ),
    refused(
        "results of bytes",
        "report results",
        "broken_record",
        row=1,
        prepare=each(FILES_OF_RESULTS, lambda _: b"\xff\xfe\n"),
    ),
    refused(
        "curves in a format that there is not",
        "report results --plot a.bmp",
        "wrong_ending",
        expected=".svg or .png or .pdf",
        found="'a.bmp'",
    ),
    refused("curves without an ending", "report results --plot t", "wrong_ending", found="'t'"),
    refused(
        "a page without an ending", "report results --output t", "wrong_ending", expected=".html or .htm", found="'t'"
    ),
    refused(
        "a page of another ending",
        "report results --output t/task.yaml",
        "wrong_ending",
        expected=".html or .htm",
        found="'t/task.yaml'",
    ),
    refused(
        "a page and curves of one name",
        "report results --output a.png --plot a.png",
        "wrong_ending",
        expected=".html or .htm",
        found="'a.png'",
    ),
    refused(
        "a page over one of somebody",
        "report results --output mine.html",
        "output_exists",
        remedy="Give another name, or remove it",
        file="mine.html",
        files={"mine.html": "<html><title>Mine</title></html>"},
    ),
    refused(
        "a page and curves in the place of folders",
        "report results --output page.html --plot curves.svg",
        "output_is_folder",
        file="curves.svg",
        files={"curves.svg/x": ""},
    ),
    refused(
        "curves over a picture of somebody",
        "report results --plot mine.png",
        "output_exists",
        remedy="Give another name, or remove it",
        file="mine.png",
        files={"mine.png": b"\x89PNG"},
    ),
    refused(
        "curves with a name of 248 characters",
        f"report results --plot {'x' * 244}.svg",
        "output_name_too_long",
        expected="at most 240 bytes",
        found="248",
    ),
    accepted("a page over an earlier one", "report results", "Report:", prepare=_with_earlier_page),
    refused(
        "a page below a file",
        "report results --output t/task.yaml/page.html",
        "output_below_file",
        what="'task.yaml' above it is a file",
        file="t/task.yaml/page.html",
    ),
    accepted("curves over earlier ones", "report results --plot a.png", "Curves: a.png", prepare=_with_earlier_curves),
    accepted(
        "curves and a page in folders that are not there",
        "report results --plot new/a.svg --output new/all/page.html",
        "Curves: new/a.svg",
        "Report: new/all/page.html",
    ),
]


@table_of([*ASKED, *OPTIONS, *RESULTS])
def test_a_mistake_in_a_command_is_one_sentence(
    case: Case, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    meet(case, tmp_path, monkeypatch, capsys, model_folder)


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_row_that_is_refused_is_reported_where_the_file_is_to_be_finished(
    name: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case(name, PREDICT, files=bad_row(name), exit_code=3, leaves=("answers.jsonl",))
    meet(case, tmp_path, monkeypatch, capsys, model_folder)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    rows, bad, _, problem = BAD_ROWS[name]
    assert len(answers) == len(rows)
    for row, answer in enumerate(answers, start=1):
        assert (answer["answer"] is None) == (row == bad)
        assert (problem if row == bad else "") in str(answer["problem"] or "")
        assert bool(answer["problem"]) == (row == bad)


@table_of(MEASURED)
def test_a_mistake_about_results_is_one_sentence(
    case: Case,
    measured: Path,
    model_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(measured, tmp_path, dirs_exist_ok=True)
    meet(case, tmp_path, monkeypatch, capsys, model_folder)
