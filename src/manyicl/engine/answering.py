"""Answers to a batch of encoded queries after a prefix: a label is chosen, a free answer is written."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from manyicl.engine.answers import AnswerEnd, GrowingText
from manyicl.engine.backend import Backend, GeneratedToken, OptionScores, ScoreScope
from manyicl.engine.channel import score_channel
from manyicl.engine.label_scores import LabelScores
from manyicl.engine.prediction import AnswerPart, Prediction
from manyicl.engine.queries import AnswerOptions, EncodedQuery, Numbered, Retrieve, is_query, queries_of
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.episodes.budget import max_answer_tokens
from manyicl.errors import UserError
from manyicl.tasks.retrieval import MostSimilar
from manyicl.tasks.task import Example, Query

if TYPE_CHECKING:
    from manyicl.engine.blend import Blend

Explain = Callable[[Query], tuple[Example, ...]]


class Answering:
    """Answers batches of queries with one model, in one text format."""

    def __init__(self, backend: Backend, end: AnswerEnd) -> None:
        """Take what runs the network, and what ends an answer."""
        self._backend = backend
        self._end = end
        self._is_channel = end.encoder.format.answer_first

    def predictions(
        self,
        prefix: TaskPrefix,
        batch: Sequence[Numbered],
        options: AnswerOptions,
        blend: Blend | None = None,
        explain: Explain | None = None,
    ) -> Iterator[Prediction]:
        """Answer the queries of a batch in order, and say of its other rows why they have no answer.

        Args:
            prefix: What comes before every query.
            batch: Queries, and why other rows cannot be answered.
            options: Of `Engine.predict`; rows that it says were answered before are omitted.
            blend: Combines the scores of all labels with those of a linear classifier; None to take the model's.
            explain: Finds the demonstrations most like a query; None where none are wanted.
        """
        answer = self._choose if prefix.task.is_closed else self._generate
        with closing(answer(prefix, batch, options)) as answers:
            predictions = _blended(blend, queries_of(batch), answers, options) if blend else answers
            yield from merged(batch, predictions, options, explain)

    def parts(
        self,
        prefix: TaskPrefix,
        batch: Sequence[Numbered],
        num_before: int,
        options: AnswerOptions,
        explain: Explain | None = None,
    ) -> Iterator[AnswerPart]:
        """Write free answers to the queries of a batch together; its first row follows ``num_before`` others."""
        rows = {row: query for row, (_, query) in enumerate(batch, start=num_before + 1)}
        for row, query in rows.items():
            if isinstance(query, UserError):
                yield AnswerPart(row, "", _unanswered(query))
        row_of = [row for row, query in rows.items() if isinstance(query, EncodedQuery)]
        texts = [GrowingText(self._end) for _ in row_of]
        for token in self._tokens(prefix, batch, options):
            text, row = texts[token.query], row_of[token.query]
            added = text.add(token)
            if not token.is_last:
                if added:
                    yield AnswerPart(row, added)
                continue
            prediction = self._whole_answer(prefix, text.tokens)
            query = rows[row]
            if explain is not None and isinstance(query, EncodedQuery):
                prediction = replace(prediction, similar=explain(query.query))
            yield AnswerPart(row, added, prediction)

    def _choose(self, prefix: TaskPrefix, batch: Sequence[Numbered], options: AnswerOptions) -> Generator[Prediction]:
        """Find the best option of each query; the first among equals."""
        queries = queries_of(batch)
        scope, abstain_below = options.get("scores", "best"), options.get("abstain_below") or 0
        for query, scores in zip(queries, self._scores(prefix, queries, scope), strict=True):
            names = query.query.choices or prefix.task.labels or ()
            answer, log_probability = names[scores.best], scores.log_probabilities[scores.best]
            label_scores, second, margin, abstained = None, None, None, False
            if scope == "all" or self._is_channel:
                log_probabilities = {name: scores.log_probabilities[n] for n, name in enumerate(names)}
                # In the channel form the tokens that are scored are those of the query, after every label.
                scored = [query.token_ids] * len(names) if self._is_channel else query.option_ids
                num_tokens = {name: len(ids) for name, ids in zip(names, scored, strict=True)}
                label_scores = LabelScores(log_probabilities, num_tokens)
            if scope == "all" and label_scores is not None:
                abstained = label_scores.probabilities[answer] < abstain_below
            if scope != "best" and scores.second is not None:
                second, margin = names[scores.second], log_probability - scores.log_probabilities[scores.second]
            num_shots = prefix.num_shots
            yield Prediction(
                answer, log_probability, label_scores, second, margin, abstained=abstained, num_shots=num_shots
            )

    def _scores(self, prefix: TaskPrefix, queries: Sequence[EncodedQuery], scope: ScoreScope) -> list[OptionScores]:
        """Score the options of queries after a prefix, in the form in which the model is used."""
        if self._is_channel:
            return score_channel(self._backend, prefix.cache, queries)
        token_ids = [(*query.own_ids, *query.token_ids) for query in queries]
        return self._backend.score(prefix.cache, token_ids, [query.option_ids for query in queries], scope)

    def _generate(self, prefix: TaskPrefix, batch: Sequence[Numbered], options: AnswerOptions) -> Generator[Prediction]:
        """Write the answer of each query; those that end early wait for the ones before them."""
        written: list[list[GeneratedToken]] = [[] for _ in queries_of(batch)]
        next_query = 0
        for token in self._tokens(prefix, batch, options):
            written[token.query].append(token)
            while next_query < len(written) and written[next_query] and written[next_query][-1].is_last:
                tokens, written[next_query] = written[next_query], []
                yield self._whole_answer(prefix, tokens)
                next_query += 1

    def _tokens(
        self, prefix: TaskPrefix, batch: Sequence[Numbered], options: AnswerOptions
    ) -> Iterator[GeneratedToken]:
        """Write the answers of the queries of a batch, token by token."""
        numbers, queries = [number for number, _ in filter(is_query, batch)], queries_of(batch)
        limit, sampling = max_answer_tokens(prefix.task), options.get("sampling")
        ids = [(*query.own_ids, *query.token_ids) for query in queries]
        return self._backend.generate(prefix.cache, ids, self._end, limit, sampling, numbers)

    def _whole_answer(self, prefix: TaskPrefix, tokens: Sequence[GeneratedToken]) -> Prediction:
        text, log_probability = self._end.text_of(tokens)
        return Prediction(text, log_probability, stopped=tokens[-1].stopped, num_shots=prefix.num_shots)


def explanation(prefix: TaskPrefix, retrieve: Retrieve | None, options: AnswerOptions) -> Explain | None:
    """Return what finds the demonstrations most like a query; None where none are wanted."""
    if not (num_similar := options.get("num_similar", 0)):
        return None
    similar = MostSimilar(prefix.demonstrations, num_similar)
    return lambda query: similar(query, retrieve(query) if retrieve else ())


def merged(
    batch: Iterable[Numbered],
    predictions: Iterator[Prediction],
    options: AnswerOptions,
    explain: Explain | None = None,
) -> Iterator[Prediction]:
    """Yield the predictions of a batch and, between them, what its other rows have; rows answered before are omitted.

    Args:
        batch: Queries, and why other rows cannot be answered.
        predictions: One for each query.
        options: Say how many rows have their answers.
        explain: Finds the demonstrations most like a query.
    """
    for number, query in batch:
        prediction = _unanswered(query) if isinstance(query, UserError) else next(predictions)
        if number <= options.get("num_answered", 0):
            continue
        if explain is not None and isinstance(query, EncodedQuery):
            prediction = replace(prediction, similar=explain(query.query))
        yield prediction


def _blended(
    blend: Blend, queries: Sequence[EncodedQuery], predictions: Iterable[Prediction], options: AnswerOptions
) -> Iterator[Prediction]:
    """Combine the label scores of predictions with those of the words, and choose the best label by both."""
    abstain_below = options.get("abstain_below") or 0
    of_model = [(one, one.scores) for one in predictions if one.scores is not None]
    texts = [query.query.text for query in queries]
    blended = blend.scores(texts, [scores for _, scores in of_model])
    for (prediction, model_scores), scores in zip(of_model, blended, strict=True):
        yield replace(
            prediction,
            answer=scores.best,
            log_probability=model_scores.log_probabilities[scores.best],
            scores=scores,
            second=scores.second,
            margin=None if scores.second is None else scores.margin,
            abstained=scores.probabilities[scores.best] < abstain_below,
            blended=True,
        )


def _unanswered(problem: UserError) -> Prediction:
    return Prediction("", math.nan, problem=problem)
