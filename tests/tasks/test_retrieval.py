"""Examples like a query, by BM25."""

from __future__ import annotations

import logging
import math
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from manyicl.errors import UserError
from manyicl.tasks.retrieval import MostSimilar, Retriever, terms
from manyicl.tasks.task import Example, Query
from tests.builders import make_example

pytest.importorskip("bm25s")

POOL = [
    make_example("where is the red box", "box"),
    make_example("the film was good", "film"),
    make_example("a red door and a red box", "door"),
    make_example("nothing of the kind", "none"),
]


def slow_scores(examples: list[Example], text: str) -> list[float]:
    """BM25 in Lucene's form, as it stands in the book."""
    texts = [terms(example.query.text) for example in examples]
    mean_length = sum(map(len, texts)) / len(texts)
    scores = []
    for one in texts:
        count = Counter(one)
        score = 0.0
        for term in terms(text):
            num_holding = sum(term in other for other in texts)
            idf = math.log(1 + (len(texts) - num_holding + 0.5) / (num_holding + 0.5))
            score += idf * count[term] / (count[term] + 1.5 * (1 - 0.75 + 0.75 * len(one) / mean_length))
        scores.append(score)
    return scores


def test_it_ranks_as_bm25_written_out() -> None:
    rng = random.Random(0)
    words = [f"w{i}" for i in range(40)]
    pool = [make_example(" ".join(rng.choices(words, k=rng.randint(1, 31))), str(i)) for i in range(47)]
    for _ in range(20):
        text = " ".join(rng.choices(words, k=3))
        scores = slow_scores(pool, text)
        found = Retriever(pool, 7)(Query(text))
        assert len(found) == 7
        reached = [scores[int(example.answer)] for example in found]
        assert reached == pytest.approx(sorted(scores)[-7:], rel=1e-5)


def test_the_most_similar_stands_last_beside_the_query() -> None:
    found = Retriever(POOL, 2)(Query("a red door"))
    assert [example.answer for example in found] == ["box", "door"]


def test_a_query_that_shares_few_words_gets_fewer_examples() -> None:
    retrieve = Retriever(POOL, 3)
    assert [example.answer for example in retrieve(Query("good!"))] == ["film"]
    assert retrieve(Query("zebra")) == ()
    assert retrieve(Query("?!")) == ()
    assert retrieve(Query("")) == ()


def test_more_examples_than_there_are_give_all_that_share_a_word() -> None:
    assert len(Retriever(POOL, 100)(Query("the a"))) == 4
    assert len(Retriever(POOL[:1], 3)(Query("red"))) == 1
    assert Retriever(POOL, 0)(Query("red")) == ()


def test_among_equals_the_first_is_most_similar() -> None:
    pool = [make_example("red box", str(i)) for i in range(50)]
    assert [example.answer for example in Retriever(pool, 3)(Query("box"))] == ["2", "1", "0"]


def test_equal_examples_count_once_and_keep_the_place_of_the_first() -> None:
    pool = [make_example("red", "a"), make_example("red", "b"), make_example("red", "a"), make_example("red", "c")]
    assert [example.answer for example in Retriever(pool, 4)(Query("red"))] == ["c", "b", "a"]


def test_examples_of_the_shared_prefix_are_not_shown_again_whatever_row_they_come_from() -> None:
    shared = Example(POOL[2].query, POOL[2].answer, POOL[2].references, origin="other.jsonl:7")
    found = Retriever(POOL, 1, exclude=[shared])(Query("a red door"))
    assert [example.answer for example in found] == ["box"]


def test_texts_without_any_word_are_never_near() -> None:
    assert Retriever([make_example("!!", "a"), make_example("", "b")], 2)(Query("!!")) == ()
    mixed = [make_example("!!", "a"), make_example("red", "b")]
    assert [example.answer for example in Retriever(mixed, 2)(Query("red !!"))] == ["b"]


@pytest.mark.parametrize(
    ("near", "far", "query"),
    [
        ("今天天气很好", "我想吃苹果", "明天天气怎么样"),
        ("赤い箱はどこですか", "映画はよかった", "箱をください"),
        ("тёплый день", "холодная ночь", "День был тёплый"),
        ("ฉันรักแมว", "วันนี้ฝนตก", "แมวของฉัน"),
        ("मुझे हिन्दी पसंद है", "आज बारिश है", "हिन्दी कठिन"),
        ("빨간 상자", "좋은 영화", "상자 어디"),
        ("🎉 party", "🌧 rain", "🎉🎉"),
        ("x", "y", "x + 1"),
    ],
)
def test_every_script_has_its_neighbours(near: str, far: str, query: str) -> None:
    found = Retriever([make_example(far, "far"), make_example(near, "near")], 1)(Query(query))
    assert [example.answer for example in found] == ["near"]


def test_a_pair_of_characters_says_more_than_two_apart() -> None:
    pool = [make_example("学大人生", "apart"), make_example("大学人生", "pair")]
    assert Retriever(pool, 1)(Query("大学"))[0].answer == "pair"


def test_words_of_spaced_scripts_are_whole_and_unspaced_ones_give_characters_and_pairs() -> None:
    assert terms("The red-box, हिन्दी") == ["the", "red", "box", "हिन्दी"]
    assert terms("ok大学") == ["ok", "大", "学", "大学"]


def test_the_result_does_not_depend_on_the_hash_seed() -> None:
    program = (
        "from manyicl.tasks.retrieval import Retriever\n"
        "from manyicl.tasks.task import Example, Query\n"
        "pool = [Example(Query(f'w{i % 7} w{i % 5} w{i % 3}'), str(i), (str(i),)) for i in range(31)]\n"
        "print([e.answer for e in Retriever(pool, 9)(Query('w1 w2 w4'))])\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1


def test_nothing_is_left_to_choose_from() -> None:
    with pytest.raises(UserError, match="4 were given and 4 excluded"):
        Retriever(POOL, 1, exclude=POOL)
    with pytest.raises(UserError, match="expected 0 or more"):
        Retriever(POOL, -1)


def test_the_most_similar_demonstrations_come_first_and_count_retrieved_ones_among_them() -> None:
    similar = MostSimilar(POOL, 2)
    assert [example.answer for example in similar(Query("a red door"))] == ["door", "box"]
    closer = make_example("open a red door", "closer")
    found = similar(Query("open a red door"), [closer])
    assert [example.answer for example in found] == ["closer", "door"]
    assert similar(Query("zebra")) == ()


def test_without_demonstrations_only_retrieved_ones_are_similar() -> None:
    assert MostSimilar((), 2)(Query("red")) == ()
    assert MostSimilar((), 2)(Query("red"), POOL[:1]) == (POOL[0],)


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bm25s", None)
    with pytest.raises(UserError, match=r"pip install 'manyicl\[retrieval\]'"):
        Retriever(POOL, 1)


def test_jax_is_not_started_and_stays_importable(tmp_path: Path) -> None:
    fake = tmp_path / "jax"
    fake.mkdir()
    (fake / "__init__.py").write_text("", encoding="utf-8")
    (fake / "lax.py").write_text("def top_k(scores, k):\n    raise SystemExit('jax was started')\n", encoding="utf-8")
    code = (
        "from manyicl.tasks.retrieval import Retriever; from manyicl.tasks.task import Query; "
        "from tests.builders import make_example; pool = [make_example('red', '1')]; "
        "print(len(Retriever(pool, 1)(Query('red')))); import jax.lax"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    found = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout, found.stderr) == (0, "1\n", "")


def test_it_is_quiet(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        Retriever(POOL, 2)(Query("red"))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
