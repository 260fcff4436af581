"""README and docs/ say what is so: links, commands, recipe keys, fields, arithmetic, and the worked examples."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel
from typer.main import get_command
from typer.testing import CliRunner

from manyicl.cli.main import app
from manyicl.evaluation.comparison.settings import CompareSettings, Comparison
from manyicl.model.manifest import Manifest
from manyicl.tasks.schema import Metric, TaskFile, read_task_file
from manyicl.tasks.task import FAMILIES
from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import FREE_TO_CHANGE
from tests.builders import byte_level_bpe, tiny_model
from tests.documents import DOCS, INLINE_CODE, PAGES, ROOT, anchors, blocks, commands, links, prose
from tests.recipe_keys import COMPARE_PAGE, TABLE, sections, table, with_tables
from tests.recipe_keys import PAGE as RECIPE_PAGE

page_of = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
EXTERNAL = ("http://", "https://", "mailto:")
LEFT_OUT = "…"


def read(page: Path) -> str:
    return page.read_text(encoding="utf-8")


# Links


@page_of
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page: Path) -> None:
    wrong = []
    for target in links(read(page)):
        if target.startswith(EXTERNAL):
            continue
        path, _, anchor = target.partition("#")
        place = page.parent / path if path else page
        if not place.exists() or (anchor and anchor not in anchors(read(place))):
            wrong.append(target)
    assert not wrong


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_page_of_docs_links_to_nothing_outside_docs(page: Path) -> None:
    outside = [
        target
        for target in links(read(page))
        if not target.startswith((*EXTERNAL, "#"))
        and not (page.parent / target.partition("#")[0]).resolve().is_relative_to(DOCS)
    ]
    assert not outside


@page_of
def test_no_cell_of_a_table_holds_an_escaped_bar(page: Path) -> None:
    # Within code, GitHub takes the backslash away and mkdocs shows it.
    assert not re.search(r"^\|.*\\\|", prose(read(page)), re.MULTILINE)


# Commands


def mentioned_commands() -> Iterator[tuple[str, list[str], bool]]:
    """Yield every command of manyicl: where it stands, its words, and whether it stands there whole."""
    for page in PAGES:
        text = read(page)
        for block in blocks(text):
            for words in commands(block.text):
                yield from _ours(page.name, words, whole=LEFT_OUT not in words)
        for code in INLINE_CODE.findall(prose(text)):
            for words in commands(code.replace("\n", " ")):
                yield from _ours(page.name, words, whole=False)
    for recipe in sorted((ROOT / "recipes").rglob("*.yaml")):
        lines = [line.lstrip("# ") for line in read(recipe).splitlines() if line.startswith("#   ")]
        for words in commands("\n".join(lines)):
            yield from _ours(f"{recipe.parent.name}/{recipe.name}", words, whole=True)


def _ours(place: str, words: list[str], *, whole: bool) -> Iterator[tuple[str, list[str], bool]]:
    if words[0] == "manyicl" or (words[0] in ("torchrun", "accelerate") and "manyicl" in words):
        yield place, words[words.index("manyicl") + 1 :], whole


@cache
def command_line() -> Any:
    return get_command(app)


def problem_of(words: list[str], *, whole: bool) -> str | None:
    """Say what is wrong with a command; None if the command line knows it."""
    command = command_line()
    names: list[str] = []
    rest = list(words)
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands:
            return f"no command {rest[0]!r} among {sorted(command.commands)}"
        names.append(rest[0])
        command = command.commands[rest.pop(0)]
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    unknown = [word for word in rest if re.match(r"--?[a-z]", word) and word.partition("=")[0] not in options]
    if set(unknown) - {"--help"}:
        return f"{' '.join(names)} has no {unknown}"
    if whole and not hasattr(command, "commands"):
        try:
            command.make_context(" ".join(names), rest)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
    return None


def test_every_command_that_a_page_shows_is_one_that_the_command_line_takes() -> None:
    shown = list(mentioned_commands())
    assert len(shown) > 50
    wrong = [
        f"{place}: manyicl {' '.join(words)}: {problem}"
        for place, words, whole in shown
        if (problem := problem_of(words, whole=whole)) is not None
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["trian", "recipe.yaml"], "no command"),
        (["train", "recipe.yaml", "--dryrun"], "has no"),
        (["predict", "--model", "m"], "input"),
        (["tasks", "show", "t", "--shots", "many"], "integer"),
    ],
)
def test_a_command_that_does_not_exist_would_be_found(words: list[str], problem: str) -> None:
    assert problem in (problem_of(words, whole=True) or "")


def test_every_command_of_the_command_line_stands_on_some_page() -> None:
    top: Any = get_command(app)
    names: set[tuple[str, ...]] = {
        (name,) for name, command in top.commands.items() if not hasattr(command, "commands")
    }
    names |= {(name, inner) for name, group in top.commands.items() for inner in getattr(group, "commands", ())}
    shown = {tuple(words[:length]) for _, words, _ in mentioned_commands() for length in (1, 2)}
    assert names <= shown


def test_every_option_named_in_a_sentence_exists() -> None:
    known = {"--help", "--version"}
    pending: list[Any] = [get_command(app)]
    while pending:
        command = pending.pop()
        pending += getattr(command, "commands", {}).values()
        known |= {option for one in command.params for option in (*one.opts, *one.secondary_opts)}
    for script in (ROOT / "benchmarks").glob("*.py"):
        known |= set(re.findall(r"\"(--[a-z0-9-]+)\"", read(script)))
    for page in PAGES:
        named = [code for code in INLINE_CODE.findall(prose(read(page))) if code.startswith("--")]
        unknown = {word for code in named for word in re.findall(r"(?<!\S)--[a-z][a-z0-9-]*", code)} - known
        assert not unknown, page.name


# Recipes and task files


@pytest.mark.parametrize("path", [RECIPE_PAGE, COMPARE_PAGE], ids=lambda path: path.name)
def test_the_tables_of_keys_are_those_of_the_models(path: Path) -> None:
    page = read(path)
    assert page == with_tables(page), "python -m tests.recipe_keys writes them anew"


@pytest.mark.parametrize(
    ("path", "keys"),
    [
        (RECIPE_PAGE, lambda: _keys(Recipe)),
        (COMPARE_PAGE, lambda: {f"compare.{key}" for key in _keys(CompareSettings)}),
    ],
    ids=["recipes", "compare"],
)
def test_every_key_is_documented_and_none_is_invented(path: Path, keys: Callable[[], set[str]]) -> None:
    page = read(path)
    documented = {found["section"] for found in TABLE.finditer(page)}
    assert documented == set(sections(path))
    # That page has tables of values, too.
    text = "".join(found[0] for found in TABLE.finditer(page)) if path == COMPARE_PAGE else page
    rows = re.findall(r"^\| `([\w.]+)` \|", text, re.MULTILINE)
    assert sorted(rows) == sorted(keys())
    assert len(rows) == len(set(rows))


def _keys(model: type[BaseModel]) -> set[str]:
    """Collect dotted keys by another way than the tables do: from the JSON schema."""
    schema = model.model_json_schema()

    def walk(part: Mapping[str, Any], prefix: str) -> Iterator[str]:
        for name, field in part["properties"].items():
            options = [field, *(one for kind in ("anyOf", "allOf", "oneOf") for one in field.get(kind, ()))]
            references = [one["$ref"].rpartition("/")[2] for one in options if "$ref" in one]
            for reference in references:
                yield from walk(schema["$defs"][reference], f"{prefix}{name}.")
            if not references:
                yield f"{prefix}{name}"

    return set(walk(schema, ""))


def test_the_keys_that_may_change_when_a_run_is_resumed_are_all_named() -> None:
    named = set(INLINE_CODE.findall(read(RECIPE_PAGE).partition("## Resuming a run")[2].partition("--overwrite")[0]))
    assert {name for name in named if "." in name or name == "output"} == FREE_TO_CHANGE


def test_a_table_says_what_a_key_may_hold() -> None:
    lines = table("model.lora").splitlines()
    assert "| `model.lora.rank` | whole number, at least 1 | `16` | Rank of each update. |" in lines


@page_of
def test_every_recipe_key_named_in_a_sentence_exists(page: Path) -> None:
    keys = _keys(Recipe)
    known = keys | {key.rpartition(".")[0] for key in keys} | {"model.from_scratch", "tasks.mixture"}
    known |= {key.rpartition(".")[0].rpartition(".")[0] for key in keys}
    names = "|".join(Recipe.model_fields)
    dotted = re.compile(rf"(?<![\w./-])(?:{names})(?:\.[a-z_]+)+(?![\w/(])")
    named = {name for code in INLINE_CODE.findall(prose(read(page))) for name in dotted.findall(code)}
    named = {name for name in named if not name.endswith((".py", ".md", ".yaml", ".jsonl"))}
    assert not named - known


@page_of
def test_every_whole_recipe_on_a_page_parses(page: Path) -> None:
    for block in blocks(read(page)):
        if block.language == "yaml" and "output:" in block.text:
            kind = Comparison if "\ncompare:" in block.text else Recipe
            kind.parse(block.text, page.name)


@page_of
def test_every_task_file_on_a_page_parses(page: Path, tmp_path: Path) -> None:
    for block in blocks(read(page)):
        if block.language == "yaml" and "\nquery:" in block.text:
            (tmp_path / "task.yaml").write_text(block.text, encoding="utf-8")
            read_task_file(tmp_path / "task.yaml")


def test_every_key_of_a_task_file_is_documented_and_none_is_invented() -> None:
    page = read(DOCS / "tasks.md")
    keys = page.partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", keys, re.MULTILINE)) == sorted(TaskFile.model_fields)
    documented = {path.rpartition(".")[2] for path, _ in documented_fields("tasks.md")}
    assert documented == {data.__name__ for data in get_args(TaskFile.model_fields["data"].annotation)}
    for value in (*FAMILIES, *get_args(Metric)):
        assert f"`{value}`" in page, value


@page_of
def test_every_python_example_imports_what_exists(page: Path) -> None:
    for block in blocks(read(page)):
        if block.language != "python":
            continue
        for statement in ast.walk(ast.parse(block.text)):
            if isinstance(statement, ast.ImportFrom) and statement.module and statement.module.startswith("manyicl"):
                module = importlib.import_module(statement.module)
                assert all(hasattr(module, name.name) for name in statement.names)


# Formats


FIELDS = re.compile(r"<!-- fields of (?P<path>[\w.]+) -->\n\n(?P<table>.*?)\n\n<!-- end -->", re.DOTALL)


def documented_fields(name: str) -> list[tuple[str, list[str]]]:
    page = read(DOCS / name)
    found = [(one["path"], re.findall(r"^\| `(\w+)` \|", one["table"], re.MULTILINE)) for one in FIELDS.finditer(page)]
    assert len(found) == page.count("<!-- fields of")
    return found


@pytest.mark.parametrize(
    ("path", "fields"),
    [*documented_fields("formats.md"), *documented_fields("tasks.md")],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_field_is_documented_in_order_and_none_is_invented(path: str, fields: list[str]) -> None:
    module, _, name = path.rpartition(".")
    model = getattr(importlib.import_module(module), name)
    known = getattr(model, "model_fields", None) or model.__dataclass_fields__
    assert fields == list(known)
    version = next((field for name, field in known.items() if name.endswith("_version")), None)
    if version is not None:
        page = read(DOCS / "formats.md")
        assert f"| `{fields[0]}` | {version.default} |" in page
        assert f"`{fields[0]}: {version.default}`" in page


# Arithmetic


def test_the_table_of_keys_and_values_is_what_the_formula_gives() -> None:
    page = read(DOCS / "choosing.md")
    head, _, *rows = page.partition("<!-- memory -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    contexts = [int(tokens.replace(",", "")) for tokens in re.findall(r"MiB at ([\d,]+)", head)]
    assert len(rows) > 3
    for row in rows:
        shape, *numbers = [cell.strip() for cell in row.strip("|").split("|")]
        layers, heads, width, size = map(int, numbers[:4])
        per_token = 2 * layers * heads * width * size
        assert numbers[4] == f"{per_token / 2**10:,.1f}", shape
        for tokens, cell in zip(contexts, numbers[5:], strict=True):
            assert cell in ("–", f"{per_token * tokens / 2**20:,.0f}"), (shape, tokens)


def test_the_shape_of_the_tiny_base_is_the_one_in_the_table() -> None:
    from manyicl.model.load import model_config

    config = model_config("builtin:nano")
    shape = [config.num_hidden_layers, config.num_key_value_heads, config.head_dim]
    assert f"| builtin:nano | {' | '.join(map(str, shape))} | 4 |" in read(DOCS / "choosing.md")


# What stands on one page because it was measured on another: the words there, and the figures here.
QUOTED = [
    ("performance.md", "| 256 | 13.1 |", "choosing.md", "13.1"),
    ("performance.md", "| 1,024 | 20.2 |", "choosing.md", "20.2"),
    ("performance.md", "| 4,096 | 43.5 |", "choosing.md", "43.5"),
    ("performance.md", "| 16,384 | 137.0 |", "choosing.md", "137.0"),
    ("performance.md", "558 tokens per second", "choosing.md", "558 tokens per second"),
    ("performance.md", "| keys and values of 4,096 tokens | 90.0 |", "choosing.md", "90.0 MiB"),
    ("performance.md", "| peak with 64 queries in flight, prefix included | 128.3 |", "choosing.md", "128.3 MiB"),
    ("log.md", ".950±.023 | .688±.055 |", "choosing.md", "0.95 at 32 shots to 0.69 at 64"),
    ("log.md", "8 nearest 91.6\n± 0.8", "choosing.md", "91.6 ± 0.8"),
    ("log.md", "shared only 81.5 ± 1.3", "choosing.md", "81.5 ± 1.3"),
    ("log.md", "8 random 85.6 ± 1.0", "choosing.md", "85.6 ± 1.0"),
    ("log.md", "47 times as many answers per second", "method.md", "47 times as many supervised answers per second"),
    ("results/nano.md", "+17.5 points on unseen tasks (+0.8 to +34.2)", "method.md", "+17.5 points, +0.8 to +34.2"),
    ("results/nano.md", "all answers, 64 shots** | 87.3", "method.md", "87 % right against 70 at 64 shots"),
    ("results/nano.md", "many-shot, last answer, 64 shots | 69.8", "method.md", "87 % right against 70 at 64 shots"),
    ("results/nano.md", "−25.1 points (−45.1 to −5.1)", "method.md", "it is 25 points lower"),
]


@pytest.mark.parametrize(("source", "measured", "page", "quoted"), QUOTED)
def test_a_figure_is_quoted_as_it_was_measured(source: str, measured: str, page: str, quoted: str) -> None:
    assert " ".join(measured.split()) in " ".join(read(DOCS / source).split())
    assert " ".join(quoted.split()) in " ".join(read(DOCS / page).split())


def test_the_citation_of_the_site_is_that_of_the_file() -> None:
    cited = yaml.safe_load(read(ROOT / "CITATION.cff"))
    (paper,) = cited["references"]
    (block,) = [block.text for block in blocks(read(DOCS / "index.md")) if block.language == "bibtex"]
    authors = " and ".join(author["family-names"] for author in paper["authors"])
    number = paper["url"].rpartition("/")[2]
    for value in (paper["title"], authors, paper["year"], number, cited["title"], cited["version"], cited["license"]):
        assert f"{{{value}}}" in block or f":{value}}}" in block, value
    assert cited["authors"][0]["name"] in block


# Worked examples


@pytest.fixture(name="workplace")
def _workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model that stands for the reader's."""
    tokenizer = byte_level_bpe()
    model = tiny_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 2048
    folder = tmp_path / "runs" / "one-model"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Manifest(max_context_tokens=2048).write(folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    return tmp_path


def test_the_examples_of_your_own_data_run_and_print_what_the_page_says(workplace: Path) -> None:
    printed, num_compared, num_commands = "", 0, 0
    for block in blocks(read(DOCS / "your_data.md")):
        if block.title is not None:
            path = workplace / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            printed = ""
            for words in commands(block.text):
                assert words[0] == "manyicl"
                result = CliRunner().invoke(app, words[1:])
                assert result.exit_code == 0, (words, result.exception, result.output)
                printed += result.stdout
                num_commands += 1
        elif block.language in ("text", "output"):
            assert fits(block.text, printed), printed
            num_compared += 1
    assert num_commands > 10
    assert num_compared > 5
    answers = (workplace / "answers.csv").read_text(encoding="utf-8").splitlines()
    columns = "answer,probability,second,second_probability,log_probability,stopped,abstained,guess,problem"
    assert answers[0] == f"id,subject,body,{columns}"
    assert len(answers) == 3
    assert '"stopped"' in (workplace / "summaries.jsonl").read_text(encoding="utf-8")
    assert "<html" in (workplace / "results" / "report.html").read_text(encoding="utf-8")


def fits(expected: str, printed: str) -> bool:
    """Tell whether a page shows what was printed, `…` standing for anything, white space between words aside."""
    parts = [r"\s+".join(map(re.escape, part.split())) for part in expected.split(LEFT_OUT)]
    return re.fullmatch(r"\s*" + r"[\s\S]*?".join(rf"\s*{part}\s*" for part in parts) + r"\s*", printed) is not None


def test_an_output_that_differs_would_be_found() -> None:
    assert fits("12 demonstrations, … tokens\n…\nfile, … MiB.\n", "12 demonstrations, 7 tokens\na\nb\nfile, 0.1 MiB.\n")
    assert not fits("12 demonstrations, … tokens\n", "13 demonstrations, 7 tokens\n")
    assert not fits("12 demonstrations\n", "12 demonstrations, 7 tokens\n")


# The site


OFFLINE = """
import socket
def refuse(*arguments, **others):
    raise AssertionError("the build asked for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from mkdocs.__main__ import cli
cli()
"""


def test_the_navigation_names_every_page() -> None:
    named: list[str] = []
    pending: list[Any] = [yaml.safe_load(read(ROOT / "mkdocs.yml"))["nav"]]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            named.append(part)
        else:
            pending += part.values() if isinstance(part, dict) else part
    assert sorted(named) == sorted(str(page.relative_to(DOCS)) for page in PAGES if page.is_relative_to(DOCS))


@pytest.mark.slow
def test_the_site_builds_without_a_network_and_without_warnings(tmp_path: Path) -> None:
    if importlib.util.find_spec("material") is None:
        pytest.skip("mkdocs-material is not installed: pip install 'manyicl[docs]'")
    done = subprocess.run(
        [sys.executable, "-c", OFFLINE, "build", "--strict", "--site-dir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    for page in PAGES[1:]:
        html = read(tmp_path / page.relative_to(DOCS).with_suffix(".html"))
        # What a browser would fetch when it opens the page; a link is only followed by a person.
        fetched = re.findall(r"<(?:script|img|iframe)[^>]*\ssrc=\"(?:https?:)?//[^\"]*", html)
        fetched += re.findall(r"<link[^>]*\srel=\"(?:stylesheet|preconnect|preload)\"[^>]*\shref=\"https?:[^\"]*", html)
        fetched += re.findall(
            r"<link[^>]*\shref=\"https?:[^\"]*\"[^>]*\srel=\"(?:stylesheet|preconnect|preload)\"", html
        )
        assert not fetched
