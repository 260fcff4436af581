"""Rows made for every task of the catalogue, in the columns and value types of its Hub dataset.

``python -m tests.tasks.catalog_rows`` writes ``catalog_first_examples.txt``, which a test compares: read the change.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from manyicl.tasks.catalog import CatalogEntry, catalog_entries
from manyicl.tasks.files import load_task
from manyicl.tasks.task import Task

Row = dict[str, Any]
FIRST_EXAMPLES = Path(__file__).with_name("catalog_first_examples.txt")


def sides(train: Sequence[Row], test: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    return list(train), list(test)


def classified(
    values: Sequence[Any], text: str = "text", label: str = "label", of_value: Callable[[Any], Row] = lambda value: {}
) -> tuple[list[Row], list[Row]]:
    """Two training rows and one test row, of texts that differ, with the given classes by turns."""
    rows = [
        {text: f"Made-up text number {number}.", label: values[number % len(values)], **of_value(values[number % 2])}
        for number in range(3)
    ]
    return rows[:2], rows[2:]


def numbered_with_text(*names: str) -> tuple[list[Row], list[Row]]:
    """Rows of the form text, label, label_text."""
    rows = [
        {"text": f"Made-up text number {number}.", "label": number % 2, "label_text": names[number % 2]}
        for number in range(3)
    ]
    return rows[:2], rows[2:]


def pairs(first: str, second: str, values: Sequence[Any], label: str = "label", **more: Any) -> Any:
    rows = [
        {first: f"Bird {number} sings in a tree.", second: f"Animal {number} makes a sound.", label: value, **more}
        for number, value in enumerate(values)
    ]
    return rows[:2], rows[2:]


def keyed(question: str = "question", **more: Any) -> tuple[list[Row], list[Row]]:
    """Rows whose options stand in ``choices`` as texts and letters, their key in ``answerKey``."""
    rows = [
        {
            "id": f"made-{number}",
            question: f"What floats on pond {number}?",
            "choices": {"text": ["a brick", "a leaf", "an anvil"], "label": list(letters)},
            "answerKey": letters[1],
            **more,
        }
        for number, letters in enumerate(["ABC", "123", "ABC"])
    ]
    return rows[:2], rows[2:]


def optioned(columns: Sequence[str], label: str, values: Sequence[Any], more: Callable[[int], Row]) -> Any:
    """Rows with one option in each column and a label that points at one."""
    rows = [
        {
            **{column: f"option {place} of {number}" for place, column in enumerate(columns)},
            label: value,
            **more(number),
        }
        for number, value in enumerate(values)
    ]
    return rows[:2], rows[2:]


def spans(*texts: Sequence[str]) -> tuple[list[Row], list[Row]]:
    """Rows in the form of SQuAD."""
    rows = [
        {
            "id": f"made-{number}",
            "title": "Mills",
            "context": f"Mill {number} was built by Ada Bly.",
            "question": f"Who built mill {number}?",
            "answers": {"text": list(accepted), "answer_start": [20] * len(accepted)},
        }
        for number, accepted in enumerate(texts)
    ]
    return rows[:2], rows[2:]


def texts(*columns: str, **more: Any) -> tuple[list[Row], list[Row]]:
    """Rows of free text in every column."""
    rows = [
        {**{column: f"{column.capitalize()} {number}: rain fell on the hill." for column in columns}, **more}
        for number in range(3)
    ]
    return rows[:2], rows[2:]


RACE = sides(
    [
        {
            "example_id": f"high{number}.txt",
            "article": f"Ann walked {number} miles to the lake.",
            "question": f"Where did Ann go on day {number}?",
            "options": ["to the lake", "to town", "home", "to school"],
            "answer": "A",
        }
        for number in (1, 2)
    ],
    [
        {
            "example_id": "high3.txt",
            "article": "Bob stayed in.",
            "question": "Bob   _  .",
            "options": ["left", "sang", "slept", "stayed in"],
            "answer": "D",
        }
    ],
)
MASSIVE = sides(
    [
        {"id": "1", "label": "alarm_set", "label_text": "alarm_set", "text": "wake me at six", "lang": "en"},
        {"id": "2", "label": "play_music", "label_text": "play_music", "text": "play some jazz", "lang": "en"},
    ],
    [{"id": "3", "label": "play_music", "label_text": "play_music", "text": "put a song on", "lang": "en"}],
)
SCENARIO = tuple(
    [{**row, "label": row["label"].split("_")[0], "label_text": row["label"].split("_")[0]} for row in side]
    for side in MASSIVE
)
BINARY = classified([0, 1])
SENTENCE = classified([0, 1], text="sentence", of_value=lambda value: {"idx": value})
NLI = pairs("premise", "hypothesis", [0, 2, 1])
GLUE_PAIR = pairs("sentence1", "sentence2", [0, 1, 1], idx=0)

ROWS: Mapping[str, tuple[list[Row], list[Row]]] = {
    "ag_news": classified([3, 0]),
    "banking77": classified([51, 53]),
    "bbc_news": numbered_with_text("tech", "sport"),
    "cola": SENTENCE,
    "customer_reviews": numbered_with_text("negative", "positive"),
    "dbpedia_14": sides(
        [
            {"label": 11, "title": "Blue Hill", "content": " Blue Hill is an album."},
            {"label": 7, "title": "Lake Orr", "content": " Lake Orr is a lake."},
        ],
        [{"label": 13, "title": "The Mill", "content": " The Mill is a novel."}],
    ),
    "emotion": classified([5, 0]),
    "enron_spam": sides(
        [
            {"message_id": 1, "text": "lunch at noon", "label": 0, "label_text": "ham", "subject": "lunch"},
            {"message_id": 2, "text": "win a prize", "label": 1, "label_text": "spam", "subject": "win"},
        ],
        [{"message_id": 3, "text": "cheap pills", "label": 1, "label_text": "spam", "subject": "cheap"}],
    ),
    "imdb": sides(
        [{"text": "Dull.<br /><br />Very dull.", "label": 0}, {"text": "A joy.", "label": 1}],
        [{"text": "Fine.", "label": 1}],
    ),
    "language_identification": sides(
        [{"labels": "de", "text": "Guten Tag."}, {"labels": "sw", "text": "Habari."}],
        [{"labels": "en", "text": "Good day."}],
    ),
    "massive_intent": MASSIVE,
    "massive_scenario": (SCENARIO[0], SCENARIO[1]),
    "newsgroups_20": sides(
        [
            {"text": "The rotor\nis worn.", "label": 7, "label_text": "rec.autos"},
            {"text": "\n", "label": 7, "label_text": "rec.autos"},
            {"text": "It orbits.", "label": 14, "label_text": "sci.space"},
        ],
        [{"text": "New tyres.", "label": 7, "label_text": "rec.autos"}],
    ),
    "poem_sentiment": sides(
        [
            {"id": 0, "verse_text": "the rose is glad", "label": 1},
            {"id": 1, "verse_text": "the night is deep", "label": 2},
        ],
        [{"id": 2, "verse_text": "she wept and laughed", "label": 3}],
    ),
    "rotten_tomatoes": BINARY,
    "sst2": SENTENCE,
    "sst5": numbered_with_text("very negative", "neutral"),
    "subj": numbered_with_text("objective", "subjective"),
    "toxic_conversations": numbered_with_text("not toxic", "toxic"),
    "trec": sides(
        [
            {
                "text": f"Who swam lake {number}?",
                "label": 4,
                "label_text": "individual",
                "label_original": "HUM:ind",
                "label_coarse": 3,
                "label_coarse_text": "human beings",
                "label_coarse_original": "HUM",
            }
            for number in (1, 2)
        ],
        [
            {
                "text": "How deep is lake 3?",
                "label": 30,
                "label_text": "other numbers",
                "label_original": "NUM:other",
                "label_coarse": 5,
                "label_coarse_text": "numeric values",
                "label_coarse_original": "NUM",
            }
        ],
    ),
    "tweet_emoji": classified([17, 0]),
    "tweet_emotion": classified([2, 3]),
    "tweet_hate": BINARY,
    "tweet_irony": BINARY,
    "tweet_offensive": BINARY,
    "tweet_sentiment": classified([1, 2]),
    **{
        f"tweet_stance_{topic}": classified([2, 1])
        for topic in ("abortion", "atheism", "climate", "feminist", "hillary")
    },
    "twitter_financial_news": classified([0, 2]),
    "yelp_polarity": BINARY,
    "yelp_review_full": classified([0, 4]),
    "anli_r1": pairs("premise", "hypothesis", [0, 2, 1], uid="made", reason=""),
    "anli_r2": pairs("premise", "hypothesis", [1, 2, 0], uid="made", reason=""),
    "anli_r3": pairs("premise", "hypothesis", [2, 1, 0], uid="made", reason=""),
    "cb": pairs("premise", "hypothesis", [1, 2, 0], idx=0),
    "mnli": pairs("premise", "hypothesis", [0, 2, 1], idx=0),
    "xnli_de": NLI,
    "xnli_es": NLI,
    "xnli_fr": NLI,
    "snli": sides(
        [
            {"premise": "A dog runs.", "hypothesis": "A dog moves.", "label": 0},
            {"premise": "A cat sits.", "hypothesis": "Nobody knows.", "label": -1},
            {"premise": "A man eats.", "hypothesis": "He sleeps.", "label": 2},
        ],
        [{"premise": "A girl sings.", "hypothesis": "She is glad.", "label": 1}],
    ),
    "scitail": pairs(
        "sentence1", "sentence2", ["neutral", "entailment", "neutral"], label="gold_label", annotator_labels=[]
    ),
    "rte": GLUE_PAIR,
    "wnli": GLUE_PAIR,
    "qnli": pairs("question", "sentence", [0, 1, 1], idx=0),
    "mrpc": GLUE_PAIR,
    "paws": pairs("sentence1", "sentence2", [1, 0, 1], id=1),
    "qqp": pairs("question1", "question2", [1, 0, 1], idx=0),
    "wic": pairs("sentence1", "sentence2", [1, 0, 1], word="bank", start1=0, end1=4, start2=0, end2=4, idx=0),
    "arc_easy": keyed(),
    "arc_challenge": keyed(),
    "commonsense_qa": keyed(question_concept="float"),
    "qasc": keyed(fact1="", fact2="", combinedfact="", formatted_question=""),
    "openbookqa": keyed("question_stem"),
    "sciq": optioned(
        ["distractor3", "distractor1", "distractor2"],
        "correct_answer",
        ["cells", "option 9", "atoms"],
        lambda number: {"question": f"What is thing {number} made of?", "support": ""},
    ),
    "hellaswag": sides(
        [
            {
                "ind": number,
                "ctx": f"She lifts lid {number}. She",
                "endings": ["looks in.", "flies off.", "is a lid.", "melts."],
                "label": "0",
            }
            for number in (1, 2)
        ],
        [
            {
                "ind": 3,
                "ctx": "He picks up the ball. He",
                "endings": ["is red.", "throws it.", "rains.", "ends."],
                "label": "1",
            }
        ],
    ),
    "swag": optioned(
        ["ending0", "ending1", "ending2", "ending3"],
        "label",
        [2, 0, 3],
        lambda number: {"sent1": "She stops.", "sent2": "She", "startphrase": f"She stops at door {number}. She"},
    ),
    "piqa": optioned(["sol1", "sol2"], "label", [1, 0, 1], lambda number: {"goal": f"To dry shirt {number},"}),
    "social_iqa": optioned(
        ["answerA", "answerB", "answerC"],
        "label",
        ["1", "3", "2"],
        lambda number: {"context": f"Kim lent Lee {number} pens.", "question": "How does Lee feel?"},
    ),
    "winogrande": optioned(
        ["option1", "option2"],
        "answer",
        ["2", "1", "2"],
        lambda number: {"sentence": f"The cup did not fit box {number}, as the _ was too large."},
    ),
    "copa": optioned(
        ["choice1", "choice2"],
        "label",
        [1, 0, 0],
        lambda number: {
            "premise": f"Road {number} was wet.",
            "question": ("cause", "effect")[number % 2],
            "idx": number,
        },
    ),
    "race_middle": RACE,
    "race_high": RACE,
    "mmlu": sides(
        [
            {
                "question": f"What is {number} + 1?",
                "subject": "arithmetic",
                "choices": ["1", "2", "3", "4"],
                "answer": number,
            }
            for number in (1, 2)
        ],
        [{"question": "What is 3 + 1?", "subject": "arithmetic", "choices": ["1", "2", "3", "4"], "answer": 3}],
    ),
    "medqa": optioned(
        ["ending0", "ending1", "ending2", "ending3"],
        "label",
        [3, 0, 1],
        lambda number: {"id": f"made-{number}", "sent1": f"Patient {number} coughs. What helps?", "sent2": ""},
    ),
    "medmcqa": optioned(
        ["opa", "opb", "opc", "opd"],
        "cop",
        [2, 0, 3],
        lambda number: {"id": "made", "question": f"Which bone is number {number}?", "choice_type": "single"},
    ),
    "boolq": sides(
        [
            {"question": "is the moon a star", "answer": False, "passage": "The moon is no star."},
            {"question": "do owls fly", "answer": True, "passage": "Owls fly at night."},
        ],
        [{"question": "do fish swim", "answer": True, "passage": "Fish swim."}],
    ),
    "strategyqa": sides(
        [
            {"qid": "a", "term": "owl", "question": "Could an owl read a map?", "answer": False, "facts": ""},
            {"qid": "b", "term": "fish", "question": "Would a fish like a pond?", "answer": True, "facts": ""},
        ],
        [{"qid": "c", "term": "ox", "question": "Can an ox pull a cart?", "answer": True, "facts": ""}],
    ),
    "squad": spans(["Ada Bly"], ["Ada Bly"], ["Ada Bly", "Bly"]),
    "squad_v2": spans(["Ada Bly"], [], ["Ada Bly", "Bly"]),
    "adversarial_qa": spans(["Ada Bly"], ["Bly"], ["Ada Bly"]),
    "triviaqa_closed_book": sides(
        [
            {
                "question": f"Which mountain has {number} peaks?",
                "question_id": f"made-{number}",
                "answer": {"value": "Mount Orr", "aliases": ["Orr", "Mt Orr"], "normalized_value": "mount orr"},
            }
            for number in (1, 2)
        ],
        [{"question": "Who wrote it?", "question_id": "made-3", "answer": {"value": "Bly", "aliases": []}}],
    ),
    "nq_open": sides(
        [
            {"question": "who made the mill", "answer": ["Ada Bly", "Bly"]},
            {"question": "when was it made", "answer": ["1901"]},
        ],
        [{"question": "where is it", "answer": ["in Orr"]}],
    ),
    "web_questions": sides(
        [
            {"url": "http://example.org/1", "question": "who made the mill?", "answers": ["Ada Bly", "Bly"]},
            {"url": "http://example.org/2", "question": "when was it made?", "answers": ["1901"]},
        ],
        [{"url": "http://example.org/3", "question": "where is it?", "answers": ["Orr"]}],
    ),
    "cnn_dailymail": sides(
        [
            {
                "article": f"It rained for {number} days.",
                "highlights": "Rain fell .\nIt stopped .",
                "id": f"made-{number}",
            }
            for number in (1, 2)
        ],
        [{"article": "Snow fell.", "highlights": "Snow .", "id": "made-3"}],
    ),
    "xsum": sides(
        [
            {"document": "", "summary": "Nothing.", "id": "1"},
            {"document": "It rained.\nIt stopped.", "summary": "Rain came and went.", "id": "2"},
        ],
        [{"document": "Snow fell.", "summary": "It snowed.", "id": "3"}],
    ),
    "samsum": sides(
        [
            {"id": "1", "dialogue": "Ann: Lunch?\r\nBob: Yes", "summary": "Ann and Bob\r\nwill have lunch."},
            {"id": "2", "dialogue": "", "summary": "Nothing is said."},
        ],
        [{"id": "3", "dialogue": "Ann: Hi", "summary": "Ann says hi."}],
    ),
    "dialogsum": texts("dialogue", "summary", id="made", topic="weather"),
    "billsum": texts("text", "summary", "title"),
    "aeslc": texts("email_body", "subject_line"),
    "common_gen": sides(
        [
            {"concept_set_idx": 0, "concepts": ["ski", "hill"], "target": "We ski down the hill."},
            {"concept_set_idx": 1, "concepts": ["boat", "row"], "target": "They row a boat."},
        ],
        [{"concept_set_idx": 2, "concepts": ["sun", "rise"], "target": "The sun will rise."}],
    ),
    "jfleg_grammar": sides(
        [
            {"sentence": "He go home . ", "corrections": ["He goes home . ", "He went home . "]},
            {"sentence": "I likes it . ", "corrections": ["I like it . "]},
        ],
        [
            {"sentence": "She run . ", "corrections": ["She runs . ", ""]},
            {"sentence": "We is . ", "corrections": ["We are . "]},
        ],
    ),
    "asset_simplification": sides(
        [
            {"original": "He ascended it.", "simplifications": ["He climbed it.", "He went up."]},
            {"original": "It commenced.", "simplifications": ["It began.", "It started."]},
        ],
        [{"original": "She resides there.", "simplifications": ["She lives there."]}],
    ),
    "squad_question_generation": spans(["Ada Bly"], ["Bly"], ["Ada Bly", "Bly"]),
    "gsm8k": sides(
        [
            {
                "question": f"Ann has {number} boxes of 600 pens. How many?",
                "answer": f"{number} boxes.\n#### {number},200",
            }
            for number in (1, 2)
        ],
        [{"question": "Half of 8?", "answer": "8/2 = <<8/2=4>>4\n#### 4"}],
    ),
    "gsm8k_explain": sides(
        [
            {"question": "Two and 3 pens?", "answer": "She has 2+3 = <<2+3=5>>5 pens.\nThat is all.\n#### 5"},
            {"question": "Half of 8?", "answer": "8/2 = <<8/2=4>>4\n#### 4"},
        ],
        [{"question": "Half of 6?", "answer": "6/2 = <<6/2=3>>3\n#### 3"}],
    ),
    "svamp": sides(
        [
            {
                "ID": f"made-{number}",
                "Body": f"Ann had {number} pens and got 3 more.",
                "Question": "How many has she now?",
                "Equation": f"( {number}.0 + 3.0 )",
                "Answer": str(number + 3),
                "Type": "Addition",
                "question_concat": "",
            }
            for number in (1, 2)
        ],
        [
            {
                "ID": "made-3",
                "Body": "Bob ate 2 of 9 nuts.",
                "Question": "How many are left?",
                "Equation": "( 9.0 - 2.0 )",
                "Answer": "7",
                "Type": "Subtraction",
                "question_concat": "",
            }
        ],
    ),
    "multiarith": sides(
        [
            {"question": f" Ann packs {number} boxes of 4. How many in all? ", "final_ans": str(4 * number)}
            for number in (2, 3)
        ],
        [{"question": " Bob has 2 and 2. How many? ", "final_ans": "4"}],
    ),
    "aqua_rat": sides(
        [
            {
                "question": f"What is {number} times 7?",
                "options": ["A)7", "B)14", "C)21", "D)28", "E)35"],
                "rationale": "",
                "correct": "ABCDE"[number - 1],
            }
            for number in (1, 3)
        ],
        [
            {
                "question": "What is 5 times 7?",
                "options": ["A)7", "B)14", "C)21", "D)28", "E)35"],
                "rationale": "",
                "correct": "E",
            }
        ],
    ),
    "competition_math": sides(
        [
            {
                "problem": f"Find ${number}+1$.",
                "solution": "",
                "answer": str(number + 1),
                "subject": "Prealgebra",
                "level": 1,
                "unique_id": f"made-{number}",
            }
            for number in (1, 2)
        ],
        [
            {
                "problem": "Halve 1.",
                "solution": "",
                "answer": "\\frac{1}{2}",
                "subject": "Prealgebra",
                "level": 1,
                "unique_id": "made-3",
            }
        ],
    ),
}


@cache
def _entry(name: str) -> CatalogEntry:
    (entry,) = catalog_entries(name)
    return entry


def write_rows(name: str, data_root: Path) -> Path:
    """Write the rows of one task where --data-root finds them, under the names of its Hub splits."""
    entry = _entry(name)
    folder = data_root / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, rows in zip((entry.data.train, entry.data.test), ROWS[name], strict=True):
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
    return folder


def shown(task: Task) -> str:
    """The first training example as a person checks it: the answer in «», then what else is accepted or offered."""
    example = task.train[0]
    lines = [
        f"=== {task.name} ({task.family}, {task.metric})",
        task.instruction(),
        f"{example.query.text} «{example.answer}»",
    ]
    if len(example.references) > 1:
        lines.append(f"accepted: {list(example.references)}")
    if example.query.choices is not None:
        lines.append(f"options: {list(example.query.choices)}")
    return "\n".join(lines) + "\n"


def shown_all() -> str:
    """The first examples of all tasks, in the order of the catalogue."""
    with TemporaryDirectory() as folder:
        for entry in catalog_entries():
            write_rows(entry.name, Path(folder))
        return "\n".join(shown(load_task(f"catalog:{entry.name}", Path(folder))) for entry in catalog_entries())


if __name__ == "__main__":
    FIRST_EXAMPLES.write_text(shown_all(), encoding="utf-8")
