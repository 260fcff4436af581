"""Metrics, baselines and reports are right for text of any script, or say that they have no score."""

from __future__ import annotations

import html
import io
import json
import re
import string
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import escape
from rich.console import Console
from rouge_score.rouge_scorer import RougeScorer

from manyicl.engine.engine import Engine
from manyicl.engine.linear import MOST_WEIGHTS
from manyicl.evaluation.baselines import nearest_answers, tfidf_level
from manyicl.evaluation.metrics import METRICS, exact_match, numeric_match, squad_normalised
from manyicl.evaluation.numbers import last_number
from manyicl.evaluation.report import plot_shot_curves, print_table, write_report
from manyicl.evaluation.result import ResultStore
from manyicl.evaluation.shot_curve import EvaluationSettings, measure_shot_curves
from manyicl.tasks.words import words
from tests.builders import make_example, make_task
from tests.evaluation.oracle import OracleEngine
from tests.evaluation.test_summary import scored
from tests.odd_text import SCRIPTS, TEXTS

ROUGE = ("rouge1", "rouge2", "rougeL")
OF_ONE = [name for name, metric in METRICS.items() if metric.of_example]
any_text = st.text(min_size=1) | st.sampled_from(sorted(TEXTS.values()))
english = st.text(st.sampled_from(string.ascii_letters + string.digits + " .,'-\n\t!?$%"), max_size=60)
LANGUAGES = [name for name in SCRIPTS if name not in ("emoji", "composed letters", "decomposed letters")]


def score(name: str, prediction: str, reference: str) -> float:
    return METRICS[name].score([prediction], [(reference,)])


@settings(deadline=None, max_examples=200)
@given(any_text)
def test_a_text_is_right_against_itself_in_every_metric(text: str) -> None:
    for name in METRICS:
        enough = {"rouge1": 1, "rougeL": 1, "rouge2": 2}.get(name, 0)
        # As in rouge-score itself, a text without a word, or without a pair of them, has nothing in common with itself.
        assert score(name, text, text) == pytest.approx(float(len(words(text)) >= enough))


@settings(deadline=None, max_examples=200)
@given(any_text, any_text)
def test_scores_are_symmetric_and_lie_between_zero_and_one(one: str, other: str) -> None:
    for name in METRICS:
        value = score(name, one, other)
        assert 0 <= value <= 1
        if name != "numeric_match":  # a solution may state its number last, a reference has it alone
            assert value == pytest.approx(score(name, other, one))


@pytest.mark.parametrize("name", sorted(set(METRICS) - {"numeric_match"}))
@pytest.mark.parametrize("script", LANGUAGES)
def test_texts_of_two_scripts_have_nothing_in_common(name: str, script: str) -> None:
    for other in LANGUAGES:
        if other != script and not set(words(SCRIPTS[script])) & set(words(SCRIPTS[other])):
            assert score(name, SCRIPTS[script], SCRIPTS[other]) == 0.0


@pytest.mark.parametrize("script", ["Chinese", "Japanese", "Thai", "Khmer", "Burmese"])
def test_half_a_text_without_spaces_scores_between(script: str) -> None:
    text = SCRIPTS[script].split()[0]
    half = text[: len(text) // 2]
    for name in ("token_f1", "rouge1", "rougeL"):
        assert 0.3 < score(name, half, text) < 1


@given(english, english)
@settings(deadline=None, max_examples=200)
def test_on_english_rouge_is_that_of_rouge_score(one: str, other: str) -> None:
    expected = RougeScorer([*ROUGE], use_stemmer=False).score(other, one)
    for name in ROUGE:
        assert score(name, one, other) == pytest.approx(expected[name].fmeasure)


def squad_script_normalised(text: str) -> str:
    """The official script's ``normalize_answer``, as it stands there."""
    bare = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())


@given(st.text(st.characters(max_codepoint=127)), st.text(st.characters(max_codepoint=127)))
@settings(deadline=None, max_examples=300)
def test_on_ascii_exact_match_and_token_f1_are_those_of_squad(one: str, other: str) -> None:
    first, second = squad_script_normalised(one), squad_script_normalised(other)
    if not first or not second:
        return
    assert squad_normalised(one) == first
    assert score("exact_match", one, other) == float(first == second)
    shared = sum((Counter(first.split()) & Counter(second.split())).values())
    assert score("token_f1", one, other) == pytest.approx(2 * shared / (len(first.split()) + len(second.split())))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("\u00abПривет\u00bb, мир!", "привет мир"),
        ("caf\u00e9", "cafe\u0301"),
        ("北京。", "北京"),
        ("\uff21\uff22\uff23", "abc"),
        ("STRASSE", "stra\u00dfe"),
        ("\u061fنعم", "نعم"),
        ("हाँ।", "हाँ"),
        ("the\u00a0end", "end"),
        ("good\u200b", "\ufeffgood"),
        ("l\u2019eau", "l'eau"),
        ("\u2764\ufe0f", "\u2764"),
        ("\u200fשלום\u200e", "שלום"),
    ],
)
def test_punctuation_case_and_form_of_any_script_do_not_count_in_an_exact_match(one: str, other: str) -> None:
    assert score("exact_match", one, other) == score("token_f1", one, other) == 1.0
    assert score("accuracy", one, other) == 0.0


def test_a_text_of_which_normalising_leaves_something_equals_none_of_which_it_leaves_nothing() -> None:
    for nothing in ("\u3002", "\u200b", "!"):
        assert score("exact_match", "\u0431", nothing) == score("token_f1", nothing, "\u0431") == 0.0
        assert score("exact_match", "\uff01", nothing) == score("token_f1", nothing, "\uff01") == 1.0
    assert score("exact_match", "a\u0331", "\u0331") == 0.0


def test_white_space_at_the_ends_counts_in_no_metric() -> None:
    for name in METRICS:
        assert METRICS[name].score([" good idea\u00a0", "\u3000bad idea"], [("good idea\n",), ("bad idea ",)]) == 1.0
    assert METRICS["macro_f1"].score(["a ", "b"], [("a",), (" b",)]) == 1.0


@pytest.mark.parametrize(
    ("written", "means"),
    [
        ("\u0661\u0662\u0663", "123"),
        ("\u0967\u0968.\u096b", "12.5"),
        ("\u0661\u066c\u0662\u0663\u0664\u066b\u0665", "1234.5"),
        ("\uff11\uff0c\uff10\uff10\uff10\uff0e\uff15", "1000.5"),
        ("1.234,56", "1234.56"),
        ("1.234.567", "1234567"),
        ("1.234.567,8", "1234567.8"),
        ("1\u00a0234,56", "1234.56"),
        ("1\u202f234\u202f567", "1234567"),
        ("1'234.50", "1234.5"),
        ("1\u2019234", "1234"),
        ("12,34,567", "1234567"),
        ("1\u00bd", "1.5"),
        ("\u00be kg", "0.75"),
        ("1\u20444", "0.25"),
        ("\u22125", "-5"),
        ("\u061c-\u0665", "-5"),
        ("\u20134 \u00b0C", "-4"),
        ("-\u20bd5", "-5"),
        ("一共3个", "3"),
        ("答えは１２です", "12"),
        ("ответ: 7", "7"),
    ],
)
def test_numbers_are_read_in_any_digits_and_marks_that_leave_no_doubt(written: str, means: str) -> None:
    assert score("numeric_match", written, means) == 1.0
    assert score("numeric_match", f"The answer is {written}", means) == 1.0
    assert score("numeric_match", means, written) == 1.0


@pytest.mark.parametrize("written", ["3,14", "0,5", "0,123", "24.11.2026", "1.2.3", "5'11", "1,2345", "1.234,567.8"])
def test_a_number_that_can_be_read_in_two_ways_equals_what_is_written_so_and_nothing_else(written: str) -> None:
    assert last_number(f"so it is {written}") == written
    assert score("numeric_match", f"so it is {written}", written) == 1.0
    for part in re.split(r"\D", written):
        assert score("numeric_match", written, part) == 0.0
    assert score("numeric_match", written, re.sub(r"\D", "", written)) == 0.0


def test_numerals_in_letters_are_text() -> None:
    assert score("numeric_match", "三百", "三百") == 1.0
    assert score("numeric_match", "三百", "300") == 0.0
    assert score("numeric_match", "XII", "12") == 0.0


WEATHER = {"sun": "今天天气很好阳光明媚", "rain": "外面正在下大雨很冷"}
THAI = {"cat": "ฉันรักแมวมาก", "rain": "วันนี้ฝนตกหนัก"}
FACES = {"glad": "\U0001f600\U0001f389", "sad": "\U0001f622\U0001f327\ufe0f"}


@pytest.mark.parametrize("world", [WEATHER, THAI, FACES], ids=["Chinese", "Thai", "emoji"])
def test_baselines_learn_from_texts_without_spaces(world: dict[str, str]) -> None:
    shown = [make_example(f"{text}{i}", label) for label, text in world.items() for i in range(4)]
    asked = [make_example(text[len(text) // 2 :], label) for label, text in world.items()]
    task = make_task(train=shown, test=asked, labels=tuple(world))
    assert tfidf_level(task, shown, asked).score == 1.0
    pytest.importorskip("bm25s")
    assert nearest_answers(shown, asked) == [example.answer for example in asked]


def test_a_query_without_any_known_word_is_answered_all_the_same() -> None:
    shown = [make_example(f"红 {i}", "red") for i in range(3)] + [make_example(f"蓝 {i}", "blue") for i in range(5)]
    task = make_task(train=shown, labels=("red", "blue"))
    queries = [make_example(text, "blue") for text in ("\U0001f389", "!!!", "\u200b", "unknown")]
    assert tfidf_level(task, shown, queries).score in (0.0, 0.25, 0.5, 0.75, 1.0)
    pytest.importorskip("bm25s")
    assert nearest_answers(shown, queries) == [None] * 4


def test_thousands_of_labels_have_levels_or_say_why_not() -> None:
    labels = tuple(f"label {number}" for number in range(10_000))
    shown = [make_example(f"word{i} word{i % 7}", label) for i, label in enumerate(labels)]
    task = make_task(train=shown, test=shown[:100], labels=labels)
    level = tfidf_level(task, shown, shown[:100])
    assert level.score is None
    assert level.note == "10,000 labels x 10,000 terms are too many to fit"
    assert len(labels) ** 2 > MOST_WEIGHTS
    assert tfidf_level(task, shown[:100], shown[:50]).score == 1.0
    answers = [example.answer for example in shown]
    assert METRICS["macro_f1"].score(answers, [(answer,) for answer in answers]) == 1.0


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    rows = [make_example(f"{text} {i}", text.strip()) for i, text in enumerate(TEXTS.values())] * 2
    labels = tuple(dict.fromkeys(row.answer for row in rows))
    half = len(TEXTS)
    task = make_task("задача", rows[:half], rows[half:], labels, source="来源")
    asked = EvaluationSettings(shots=(0, 4), num_seeds=1, num_queries=half)
    measure_shot_curves(cast(Engine, OracleEngine()), [task], folder, asked, model_name="模型 \U0001f389")
    return folder


def test_results_on_disk_hold_every_text_as_it_is(folder: Path) -> None:
    (result, *_) = ResultStore(folder).load()
    predictions = ResultStore(folder).predictions(result)
    assert {one.references[0] for one in predictions} == {text.strip() for text in TEXTS.values()}


def test_the_page_shows_texts_in_their_own_direction_and_unharmed(folder: Path, tmp_path: Path) -> None:
    page = write_report(folder, tmp_path / "report.html").read_text(encoding="utf-8")
    (result,) = [one for one in ResultStore(folder).load() if one.num_shots == 4]
    for shown in ResultStore(folder).context(result):
        pictured = shown.query.replace("\x07", "\u2407").replace("\x1b", "\u241b").replace("\x01", "\u2401")
        assert f'<div class="text" dir="auto">{escape(pictured)}</div>' in page
    assert "<bdi>задача</bdi>" in page
    assert "<bdi>模型 \U0001f389</bdi>" in page
    assert not set(page) & (set(map(chr, range(32))) - {"\n", "\t"})


def test_a_long_text_is_never_cut_within_a_character(tmp_path: Path) -> None:
    family = "\U0001f468\u200d\U0001f469\u200d\U0001f467"
    rows = [make_example(f"{'x' * start}{family * 200}", "good") for start in range(6)]
    task = make_task(train=rows, test=rows)
    asked = EvaluationSettings(shots=(4,), num_seeds=1, num_queries=6)
    measure_shot_curves(cast(Engine, OracleEngine()), [task], tmp_path, asked)
    page = write_report(tmp_path, tmp_path / "report.html").read_text(encoding="utf-8")
    cut = re.findall(r"x*(\S+) … \((\d+) more characters\)", page)
    assert cut
    assert all(shown.strip("x>").split(">")[-1].replace(family, "").strip("x") == "" for shown, _ in cut)


@pytest.mark.parametrize(
    "name", ["模型", "نموذج", "\U0001f389 x", "_hidden", "$x^2$ and $\\frac", "a\u202eb", "100% $", "ไทย"]
)
@pytest.mark.parametrize("ending", ["svg", "png"])
def test_names_that_no_font_here_can_draw_are_drawn_without_a_warning(name: str, ending: str, tmp_path: Path) -> None:
    records = [scored(name, "a", shots, (1.0, 0.0)) for shots in (0, 1)]
    records += [scored("other", "a", shots, (1.0, 0.0)) for shots in (0, 1)]
    path = tmp_path / f"curves.{ending}"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_shot_curves(records, path, title=f"{name} against other")
    if ending == "svg":
        drawn = html.unescape(path.read_text(encoding="utf-8"))
        assert name.replace("\u202e", "\\u202e") in drawn
        assert drawn.count("majority") <= 1


def test_a_table_on_a_terminal_keeps_its_columns_and_lets_no_name_steer_it() -> None:
    from rich.cells import cell_len

    records = [
        scored(name, "a", shots, (1.0, 0.0))
        for name in ("模型", "plain", "\x1b[31mred\u202e", "[bold]x[/nope]")
        for shots in (0, 1)
    ]
    screen = io.StringIO()
    print_table(records, Console(file=screen, width=100), per_task=True)
    shown = screen.getvalue()
    assert not set(shown) & {"\x1b", "\u202e"}
    assert "\\x1b[31mred\\u202e" in shown
    assert "[bold]x[/nope]" in shown
    rows = [line for line in shown.splitlines() if ".500" in line]
    (wide, narrow) = (next(line for line in rows if name in line) for name in ("模型", "plain"))
    assert cell_len(wide[: wide.index(".500")]) == cell_len(narrow[: narrow.index(".500")])


def test_notes_say_which_rouge_a_figure_is() -> None:
    screen = io.StringIO()
    print_table([scored("m", "a", 0, (1.0,), metric="rougeL", family="summarization")], Console(file=screen, width=200))
    assert (
        "rougeL: ROUGE-L F1 without stemming, words of any script, characters where it has no spaces."
        in screen.getvalue()
    )


def test_predictions_survive_as_json_whatever_they_hold() -> None:
    for text in TEXTS.values():
        assert json.loads(json.dumps({"answer": text}, ensure_ascii=False)) == {"answer": text}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Die Antwort \u2013 42", 42),
        ("cost \u2013 5 dollars", 5),
        ("2019 \u2013 2021", 2021),
        ("2019\u20132021", 2021),
        ("\u20135", -5),
        ("x = \u20135", -5),
        ("(\u20135)", -5),
        ("\u2013\u0665", -5),
        ("\u2013\u20ac5", -5),
        ("\u22125", -5),
    ],
)
def test_a_dash_between_words_or_numbers_is_no_minus(text: str, number: int) -> None:
    assert last_number(text) == number


def test_a_number_that_is_not_clear_is_the_same_with_its_currency_before_or_behind() -> None:
    assert numeric_match("\u20ac 3,14", ("3,14",)) == numeric_match("3,14 \u20ac", ("3,14",)) == 1
    assert exact_match("\u20ac5", ("5",)) == exact_match("$5", ("5",)) == 1


def test_a_long_row_of_flag_halves_takes_no_square_of_its_length() -> None:
    halves = "\U0001f1e9" * 50_000
    started = time.process_time()
    assert exact_match(halves, (halves,)) == 1
    assert len(words(halves)) == 25_000
    assert time.process_time() - started < 5
