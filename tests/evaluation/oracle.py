"""An engine that needs no model: it knows the answers and gives them more often after more demonstrations."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from math import log

from manyicl.engine.backend import Identity, ScoreScope
from manyicl.engine.label_scores import LabelScores
from manyicl.engine.prediction import Prediction
from manyicl.engine.queries import Retrieve
from manyicl.episodes.budget import fit_demonstrations, num_tokens_for_asking
from manyicl.episodes.encoding import Encoder
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Example, Query, Task
from tests.builders import byte_level_bpe, make_example, make_task


@cache
def shared_encoder() -> Encoder:
    return Encoder(byte_level_bpe())


@dataclass(frozen=True)
class OraclePrefix:
    task: Task
    demonstrations: tuple[Example, ...]
    token_ids: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        return len(self.token_ids)

    @property
    def num_shots(self) -> int:
        return len(self.demonstrations)


@dataclass
class OracleEngine:
    """Right with probability ``skill * shots / (shots + 8)`` beyond a guess; counts how it is used."""

    reference: str = "oracle"
    skill: float = 0.9
    max_context_tokens: int = 100_000
    manifest: Manifest | None = None
    encoder: Encoder = field(default_factory=shared_encoder)
    calls: list[str] = field(default_factory=list)

    @property
    def identity(self) -> Identity:
        fingerprint = hashlib.sha256(f"{self.reference} {self.skill}".encode()).hexdigest()
        return Identity(fingerprint, "", "float32", reference=self.reference)

    @property
    def trained_context_tokens(self) -> int | None:
        return self.manifest.max_context_tokens if self.manifest else None

    def max_answer_tokens(self, task: Task) -> int:
        return 8

    def num_reserved_tokens(
        self, task: Task, queries: Sequence[Query] | None = None, retrieve: Retrieve | None = None
    ) -> int:
        queries = queries or [example.query for example in task.test or task.train]
        found = [sum(map(self.encoder.num_shot_tokens, retrieve(query))) for query in queries] if retrieve else [0]
        return num_tokens_for_asking(task, self.encoder, 8, queries) + max(found)

    def prefill(
        self,
        task: Task,
        demonstrations: Sequence[Example] = (),
        *,
        retrieve: Retrieve | None = None,
        reuse: OraclePrefix | None = None,
    ) -> OraclePrefix:
        reserved = self.num_reserved_tokens(task, retrieve=retrieve)
        fitting, _ = fit_demonstrations(task, demonstrations, self.encoder, self.max_context_tokens, reserved)
        shared = zip(fitting, reuse.demonstrations if reuse else (), strict=False)
        num_shared = len(list(takewhile(lambda pair: pair[0] == pair[1], shared)))
        self.calls.append(f"encode {len(fitting) - num_shared}")
        return OraclePrefix(task, fitting, self.encoder.encode_prefix(task.instruction(), fitting))

    def predict(
        self,
        prefix: OraclePrefix,
        rows: Iterable[Query],
        *,
        retrieve: Retrieve | None = None,
        scores: ScoreScope = "best",
    ) -> Iterator[Prediction]:
        known = {example.query.text: example.answer for example in prefix.task.test}
        answers = prefix.task.labels or tuple(dict.fromkeys(example.answer for example in prefix.task.train))
        for row in rows:
            draw = _draw(self.reference, row.text, *(e.query.text for e in prefix.demonstrations[:3]))
            # A retrieved example is worth ten others.
            num_shots = prefix.num_shots + 10 * len(retrieve(row) if retrieve else ())
            right = draw < self.skill * num_shots / (num_shots + 8)
            guess = answers[int(_draw("guess", row.text, str(prefix.num_shots)) * len(answers))]
            answer = known[row.text] if right else guess
            label_scores = _scores(row.choices or answers, answer) if scores == "all" else None
            yield Prediction(answer, -0.5, label_scores)


def _scores(labels: Sequence[str], answer: str) -> LabelScores:
    """The answer has half of the probability, the others the rest in equal parts."""
    rest = log(0.5 / max(1, len(labels) - 1))
    return LabelScores({label: log(0.5) if label == answer else rest for label in labels}, dict.fromkeys(labels, 1))


def _draw(*texts: str) -> float:
    return int(hashlib.sha256("\n".join(texts).encode()).hexdigest()[:8], 16) / 0xFFFFFFFF


def small_world(tasks_per_family: int = 1) -> list[Task]:
    """Tasks of all families with answers that a word of the query tells."""
    words = ["amber", "birch", "cedar", "dune", "ember", "fjord"]
    return [
        _world_task(family, number, words)
        for family in ("classification", "nli", "qa", "summarization", "math")
        for number in range(tasks_per_family)
    ]


def _world_task(family: str, number: int, words: list[str]) -> Task:
    closed = family in ("classification", "nli")
    answers = ["red", "green", "blue"] if closed else ["one two", "two three", "four"]
    if family == "math":
        answers = ["1,000", "3/4", "-7"]
    name = f"{family}-{number}"
    rows = [
        make_example(f"{name} {words[i % 6]} {words[i // 6 % 6]} number {i}", answers[(i + i // 6) % 3])
        for i in range(120)
    ]
    metric = {"qa": "exact_match", "summarization": "rougeL", "math": "numeric_match"}.get(family, "accuracy")
    labels = tuple(answers) if closed else None
    return make_task(name, rows[:80], rows[80:], labels, family=family, metric=metric, instruction="Answer.")
