"""Records -> tables, plots, one page that needs no network."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import cast

import pytest
from matplotlib.figure import Figure
from rich.console import Console

from manyicl.engine.engine import Engine
from manyicl.errors import UserError
from manyicl.evaluation.report import Part, plot_parts, plot_shot_curves, print_parts, print_table, write_report
from manyicl.evaluation.report.drawing import is_picture, shot_position
from manyicl.evaluation.report.tables import with_interval
from manyicl.evaluation.result import Result, ResultStore
from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves
from manyicl.evaluation.uncertainty import Estimate, mean_over_queries, paired_difference
from manyicl.model.manifest import Manifest
from tests.builders import make_example, make_task
from tests.evaluation.oracle import OracleEngine, small_world
from tests.evaluation.test_summary import RECORDS, scored

EVIL = "<script>alert('x')</script> & [bold]"
VOID = {"meta", "br", "path", "use", "rect", "img", "link", "input", "hr", "line", "circle"}


class WellFormed(HTMLParser):
    """Complains about a tag that is closed out of order, and collects ids and links."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._collect(attrs)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._collect(attrs)
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, f"</{tag}> out of order at {self.getpos()}"

    def _collect(self, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids += [value for name, value in values.items() if name == "id" and value]
        self.links += [value for name, value in values.items() if name in ("href", "src", "xlink:href") and value]


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    settings = EvaluationSettings(shots=(0, 1, 4, 16), num_seeds=2, num_queries=12)
    engines = [OracleEngine("base", 0.3), OracleEngine("tuned", 0.9, manifest=Manifest(max_context_tokens=300))]
    for engine in engines:
        measure_shot_curves(cast(Engine, engine), small_world(), folder, settings)
    return folder


@pytest.fixture(name="records", scope="module")
def _records(folder: Path) -> list[Result]:
    return ResultStore(folder).load()


@pytest.fixture(name="page", scope="module")
def _page(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    place = tmp_path_factory.mktemp("page") / "deep" / "report.html"
    return write_report(folder, place, title="My title").read_text(encoding="utf-8")


def test_the_page_is_well_formed_and_needs_no_network(page: str) -> None:
    parser = WellFormed()
    parser.feed(page)
    assert parser.open == []
    assert all(link.startswith("#") for link in parser.links)
    assert "url(http" not in page
    sections = [name for name in parser.ids if not re.fullmatch(r"[pm][0-9a-f]{10}", name)]
    assert len(sections) == len(set(sections))
    assert {link[1:] for link in parser.links} <= set(parser.ids)


def test_the_page_shows_scores_errors_levels_and_provenance(records: list[Result], page: str) -> None:
    summary = print_table(records, Console(file=io.StringIO()))
    score = summary.score("tuned", "mean over families", 16)
    assert score is not None
    for text in ("My title", f"{score.mean:.3f}", f"±{score.standard_error:.3f}", "majority answer", "TF-IDF"):
        assert text in page
    for text in (records[0].model_fingerprint[:16], records[0].versions["torch"], records[0].data_hash[:12], "NLI"):
        assert text in page


def test_worked_predictions_show_the_context_and_every_models_answer(page: str) -> None:
    worked = page[page.index('id="worked"') : page.index('id="provenance"')]
    task = small_world()[0]
    for example in task.demonstrations(4, seed=0):
        assert f'<div class="text" dir="auto">{example.query.text}</div>' in worked
    assert worked.count('<dt dir="auto">base</dt>') == worked.count('<dt dir="auto">tuned</dt>') == 2 * 5


def test_the_page_shows_the_curve_with_retrieved_rows_beside_the_one_without(tmp_path: Path) -> None:
    pytest.importorskip("bm25s", reason="needs the extra [retrieval]")
    name = "a model with a rather long name"
    settings = EvaluationSettings(shots=(0, 4), num_seeds=1, num_queries=30, num_retrieved=3)
    measure_shot_curves(cast(Engine, OracleEngine()), small_world()[:1], tmp_path, settings, model_name=name)
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    for line in (name, f"{name} + 3 retrieved", f"{name} + 3 retrieved − {name}"):
        assert f"{line}</" in page
    message = " ".join(re.sub("<[^>]+>", "", page[: page.index('id="worked"')]).split())
    assert f"After 4 examples {name} + 3 retrieved answers" in message
    assert "come just before it; the trivial baselines know the demonstrations alone." in page
    # The ends of the curves are told apart, though names are cut.
    assert len({label for label in re.findall(r">([^<>]*…[^<>]*)<", page) if label.strip().startswith("a model")}) == 2


def test_texts_of_tasks_and_names_of_models_cannot_write_markup(tmp_path: Path) -> None:
    rows = [make_example(f"{EVIL} {i}", EVIL if i % 2 else "fine") for i in range(30)]
    task = make_task(EVIL, rows[:20], rows[20:], ("fine", EVIL))
    settings = EvaluationSettings(shots=(0, 2), num_seeds=1, num_queries=4)
    measure_shot_curves(cast(Engine, OracleEngine()), [task], tmp_path, settings, model_name=EVIL)
    page = write_report(tmp_path, tmp_path / "report.html", title=EVIL).read_text(encoding="utf-8")
    assert "<script" not in page
    screen = io.StringIO()
    print_table(ResultStore(tmp_path).load(), Console(file=screen, width=200), per_task=True)
    assert "[bold]" in screen.getvalue()
    plot_shot_curves(ResultStore(tmp_path).load(), tmp_path / "curve.svg")


def test_records_alone_make_a_page_without_worked_predictions(records: list[Result], tmp_path: Path) -> None:
    page = write_report(records, tmp_path / "report.html").read_text(encoding="utf-8")
    assert 'id="worked"' not in page


def test_only_the_records_asked_for_are_shown(folder: Path, records: list[Result], tmp_path: Path) -> None:
    only = [record for record in records if record.model_name == "base"]
    page = write_report(folder, tmp_path / "report.html", parts=[Part("Base", only)]).read_text(encoding="utf-8")
    assert "tuned" not in page.replace("fine-tuned", "")
    assert 'id="worked"' in page


def test_a_page_is_a_function_of_its_records(records: list[Result], tmp_path: Path) -> None:
    pages = [write_report(records, tmp_path / f"{i}.html").read_bytes() for i in range(2)]
    assert pages[0] == pages[1]


@pytest.mark.parametrize("ending", ["svg", "png", "pdf"])
def test_curves_are_written_in_each_format(records: list[Result], tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"curves.{ending}"
    plot_shot_curves(records, path, title="Curves")
    assert path.stat().st_size > 5000


def test_an_unknown_picture_format_is_refused(records: list[Result], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected \.svg or \.png"):
        plot_shot_curves(records, tmp_path / "curves.gif")


def test_one_model_one_task_one_shot_count_is_enough(tmp_path: Path) -> None:
    records = [scored("m", "a", 0, (1.0, 0.0))]
    write_report(records, tmp_path / "report.html")
    plot_shot_curves(records, tmp_path / "curve.png")


def test_models_without_a_common_task_are_shown_task_by_task(tmp_path: Path) -> None:
    records = [scored("m", "a", 0, (1.0, 0.0)), scored("n", "b", 0, (1.0, 0.0))]
    page = write_report(records, tmp_path / "report.html").read_text(encoding="utf-8")
    assert "in no mean" in page
    screen = io.StringIO()
    print_table(records, Console(file=screen, width=120))
    assert "a, b: in no mean. Some model lacks a shot count there." in screen.getvalue()
    with pytest.raises(UserError, match="no curve to compare"):
        plot_shot_curves(records, tmp_path / "curve.png")


def test_the_head_of_the_page_counts_every_task_and_a_model_once(tmp_path: Path) -> None:
    plain = [scored("m", task, 4, (1.0, 0.0), seen_in_training=False) for task in ("a", "b")]
    more = [
        scored("m", task, 4, (1.0, 0.0), seen_in_training=False, num_retrieved=2, key="2") for task in ("b", "c", "d")
    ]
    head = lead(write_report([*plain, *more], tmp_path / "report.html"))
    assert head == (
        "1 model, with and without retrieved rows, on 4 tasks of 1 family that fine-tuning never used, with 4 to 4 "
        "demonstrations in the context. 3 of the tasks are in no mean, for reasons that are below."
    )
    unknown = scored("m", "e", 4, (1.0, 0.0))
    head = lead(write_report([*plain, unknown], tmp_path / "report.html"))
    assert head == "1 model on 3 tasks of 1 family, with 4 to 4 demonstrations in the context."


def lead(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition('<p class="lead">')[2].partition("</p>")[0]


def test_the_table_fits_eighty_columns_with_eight_shot_counts() -> None:
    records = [scored("fine-tuned", "a", shots, (1.0, 0.0)) for shots in (0, 1, 2, 4, 8, 16, 32, 64)]
    screen = io.StringIO()
    print_table(records, Console(file=screen, width=80))
    assert "…" not in screen.getvalue()
    assert screen.getvalue().count("±.500") == 8


def findings(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return text[text.index('<div class="findings">') : text.index('id="provenance')]


def test_paired_is_said_only_of_what_was_paired(tmp_path: Path) -> None:
    twelve, same = (scored(model, "a", 0, (1.0, 0.0) * 6) for model in ("base", "tuned"))
    one = scored("tuned", "a", 0, (1.0,), queries_hash="other")
    assert "paired over the same queries" in findings(write_report([twelve, same], tmp_path / "a.html"))
    text = findings(write_report([twelve, one], tmp_path / "b.html"))
    assert "not paired: other queries or demonstrations, too few queries for an interval" in text
    assert "excludes 0" not in text
    screen = io.StringIO()
    print_table([twelve, one], Console(file=screen, width=120))
    assert screen.getvalue().count("±") == 1, "only of the twelve queries"


def test_a_picture_says_who_made_it(records: list[Result], tmp_path: Path) -> None:
    for ending in (".svg", ".png", ".pdf"):
        plot_shot_curves(records, tmp_path / f"ours{ending}")
        assert is_picture(tmp_path / f"ours{ending}")
        Figure().savefig(tmp_path / f"other{ending}")
        assert not is_picture(tmp_path / f"other{ending}")


def test_flags_are_counted_in_sentences() -> None:
    flagged = [record.model_copy(update={"beyond_training": True, "seen_in_training": True}) for record in RECORDS[:2]]
    screen = io.StringIO()
    print_table([*flagged, *RECORDS[2:]], Console(file=screen, width=200))
    assert "2 of 10 results used more tokens or shots than any training sequence had." in screen.getvalue()
    assert "those are not unseen" in screen.getvalue()


def test_zero_stands_one_doubling_before_the_first_shot() -> None:
    assert [shot_position(shots) for shots in (0, 1, 2, 8)] == [-1, 0, 1, 3]
    assert shot_position(0, smallest=16) == 3


def test_a_page_without_examples_holds_no_text_of_any_row(folder: Path, page: str, tmp_path: Path) -> None:
    texts = {
        text for task in small_world() for one in (*task.train, *task.test) for text in (one.query.text, one.origin)
    }
    texts.discard("")
    assert any(text in page for text in texts)
    without = write_report(folder, tmp_path / "without.html", examples=False).read_text(encoding="utf-8")
    assert not any(text in without for text in texts)
    assert "Worked predictions" not in without


@pytest.fixture(name="parts")
def _parts(records: list[Result]) -> list[Part]:
    """Two comparisons with other models, tasks and shot counts."""
    tables = [
        scored(model, task, shots, (1.0, 0.0, 1.0), family=family)
        for model in ("first", "second")
        for task, family in (("letters", "classification"), ("names", "generation"))
        for shots in (0, 4)
    ]
    return [Part("Tables", tables, by_task=True), Part("World", records)]


def test_parts_with_other_models_and_shots_are_one_table_at_the_shots_they_share(parts: list[Part]) -> None:
    screen = io.StringIO()
    print_parts(parts, Console(file=screen, width=100))
    head = next(line for line in screen.getvalue().splitlines() if line.strip().startswith("shots"))
    assert head.split() == ["shots", "0", "4"]
    for word in ("letters, accuracy", "names", "World, mean over families", "first", "second", "tuned − base"):
        assert word in screen.getvalue()


def test_parts_are_one_page_with_links_that_lead_somewhere(parts: list[Part], folder: Path, tmp_path: Path) -> None:
    page = write_report(folder, tmp_path / "report.html", parts=parts).read_text(encoding="utf-8")
    parser = WellFormed()
    parser.feed(page)
    assert not parser.open
    assert {"#curves1", "#curves2", "#provenance2"} <= set(parser.links)
    assert {link.removeprefix("#") for link in parser.links if link.startswith("#")} <= set(parser.ids)
    assert all(parser.ids.count(f"{name}{number}") == 1 for name in ("curves", "tasks") for number in (1, 2))
    assert 'id="curves1">Tables</h2>' in page
    assert "<h3>Letters</h3>" in page


def test_parts_are_one_picture_with_a_panel_for_each_task_or_mean(parts: list[Part], tmp_path: Path) -> None:
    plot_parts(parts, tmp_path / "curves.svg")
    picture = (tmp_path / "curves.svg").read_text(encoding="utf-8")
    for heading in ("Letters", "Names", "World", "second", "tuned"):
        assert f">{heading}</text>" in picture


@pytest.mark.parametrize(
    ("estimate", "signed", "written"),
    [
        (None, False, "–"),
        (Estimate(0.5, None, 1), False, ".50"),
        (mean_over_queries([1.0, 0.0] * 10), False, ".50\n.28–.72"),
        (mean_over_queries([1.0] * 10), False, "1.00\n.66–1.00"),
        (paired_difference([(1.0,) * 9], [(1.0,) * 9]), True, None),
    ],
)
def test_a_cell_holds_the_mean_and_its_interval(estimate: Estimate | None, signed: bool, written: str | None) -> None:
    cell = with_interval(estimate, signed=signed)
    if written is not None:
        assert cell == written
    else:
        assert re.fullmatch(r"\+\.00\n-\.\d\d to \+\.\d\d", cell)
