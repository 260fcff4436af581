"""Every command of the tutorial runs, in order, on the files of the page; what no model decides is compared."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from manyicl.model.pretrained import BASES
from tests.builders import byte_level_bpe, tiny_model
from tests.cli.test_predict import run
from tests.documents import DOCS, ROOT, Block, blocks, commands
from tests.test_docs import fits, read

MODEL = "builtin:one"
BAD_ROWS_EXIT_CODE = 3


def edited(text: str, diff: str) -> str:
    """Replace each removed line by the added one that follows it; added lines that follow none go to the end."""
    removed: list[str] = []
    for line in diff.splitlines():
        sign, content = line[0], f"{line[1:]}\n"
        if sign == "-":
            assert text.count(content) == 1, content
            removed.append(content)
        elif removed:
            text = text.replace(removed.pop(0), content)
        else:
            text += content
    assert not removed
    return text


def test_a_diff_replaces_and_appends() -> None:
    assert edited("a\nb\n", "-a\n+c\n+d\n") == "c\nb\nd\n"


class Reader:
    """Does what a page says, in a folder.

    Attributes:
        model: What stands for the page's model; None for that itself, whose answers are compared then.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: Path | None) -> None:
        self.monkeypatch, self.capsys, self.model = monkeypatch, capsys, model
        self.printed, self.is_of_model = "", False
        self.num_commands = self.num_compared = 0
        self.exit_codes: list[int] = []

    def read(self, page: str) -> None:
        for block in blocks(page):
            path = Path(block.title) if block.title else None
            if block.language == "sh":
                self.execute(block.text)
            elif block.language == "diff":
                assert path is not None
                path.write_text(edited(path.read_text(encoding="utf-8"), block.text), encoding="utf-8")
            elif path is None:
                self.compare(block.text, self.printed)
            elif path.exists():
                self.compare_beginning(block, path)
            else:
                path.write_text(block.text, encoding="utf-8")

    def execute(self, lines: str) -> None:
        self.printed, self.is_of_model = "", MODEL in lines
        for words in commands(lines):
            assert words[0] == "manyicl"
            if words[1:3] == ["models", "get"]:
                continue
            shown = [str(self.model) if word == MODEL and self.model else word for word in words[1:]]
            self.exit_codes.append(run(self.monkeypatch, *shown))
            written = self.capsys.readouterr()
            # A slow machine says on the way what it is doing.
            mistakes = [line for line in written.err.splitlines() if line.startswith("error ")]
            self.printed += "\n".join([written.out, *mistakes])
            self.num_commands += 1

    def compare(self, expected: str, printed: str) -> None:
        if self.model is None or not self.is_of_model or expected.startswith("error "):
            assert fits(expected, printed), printed
            self.num_compared += 1

    def compare_beginning(self, block: Block, path: Path) -> None:
        """Compare a file with its first lines on the page; of an answer file, the header alone with another model."""
        lines = path.read_text(encoding="utf-8").splitlines()
        expected = block.text.removesuffix("…\n").splitlines()
        assert lines[0] == expected[0]
        if self.model is None or not self.is_of_model:
            assert lines[: len(expected)] == expected
            self.num_compared += 1


@pytest.fixture(name="folder")
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("COLUMNS", raising=False)
    return folder


@pytest.fixture(name="random_model")
def _random_model(tmp_path: Path) -> Path:
    """A model of the machine that stands for the page's, which knows no words and is there without a base."""
    tokenizer = byte_level_bpe()
    model = tiny_model("llama", len(tokenizer))
    model.config.max_position_embeddings = 8192
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_commands_of_the_tutorial_run_and_print_what_the_page_says(
    folder: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(DOCS / "enquiries.csv", folder)
    reader = Reader(monkeypatch, capsys, random_model)
    reader.read(read(DOCS / "tutorial.md"))
    # The table alone, the empty message, and the compiled task that the added row has made stale.
    assert [code for code in reader.exit_codes if code] == [2, BAD_ROWS_EXIT_CODE, 2]
    assert reader.num_commands == 11
    assert reader.num_compared == 5
    assert "<html" in read(folder / "results" / "report.html")


def test_the_first_answer_comes_from_the_commands_of_its_page(
    folder: Path, random_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reader = Reader(monkeypatch, capsys, random_model)
    reader.read(read(DOCS / "first_answer.md"))
    assert reader.exit_codes == [0, 0]
    assert (folder / "answers.csv").exists()


def test_the_first_answer_of_the_readme_is_that_of_the_site() -> None:
    page, readme = read(DOCS / "first_answer.md"), read(ROOT / "README.md")
    tables = [block.text for block in blocks(page) if block.language == "csv"]
    assert tables == [block.text for block in blocks(readme) if block.language == "csv"][:2]
    (command,) = [words for block in blocks(page) for words in commands(block.text) if words[1:2] == ["predict"]]
    assert command in [words for block in blocks(readme) for words in commands(block.text)]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["first_answer.md", "tutorial.md"])
def test_the_model_answers_as_the_page_shows(
    name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not BASES["smollm2"].is_here:
        pytest.skip("builtin:smollm2 is not on this machine: manyicl models get smollm2")
    if name == "tutorial.md":
        shutil.copy(DOCS / "enquiries.csv", folder)
    page = read(DOCS / name)
    Reader(monkeypatch, capsys, None).read(page)
    if name == "first_answer.md":
        right = re.search(r"(One|Two|Three|None|All) of four (?:is|are) right", page)
        expected = ["delivery", "advice", "billing", "app"]
        answers = [line.split(",")[1] for line in read(folder / "answers.csv").splitlines()[1:]]
        num_right = sum(one == other for one, other in zip(answers, expected, strict=True))
        assert right is not None
        assert right[1] == ("None", "One", "Two", "Three", "All")[num_right]
