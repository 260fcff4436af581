"""Rows -> encoded queries that fit the context after a prefix, or why one cannot be answered."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from manyicl.engine.queries import AnswerOptions, EncodedQuery, Numbered, Retrieve, Row, StreamedRow, checked_query
from manyicl.engine.task_prefix import TaskPrefix
from manyicl.episodes.budget import longest_answer, max_answer_tokens
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.text_format import Preceding
from manyicl.errors import UserError
from manyicl.tasks.task import Query, Task


class QueryEncoder:
    """Encodes the queries of tasks for one text format and context."""

    def __init__(self, encoder: Encoder, max_context_tokens: int) -> None:
        """Take the encoder, and the limit for prefix, query and answer together."""
        self._encoder = encoder
        self._max_context_tokens = max_context_tokens

    def encoded(
        self, task: Task, numbered: Iterable[tuple[int, StreamedRow]], after_shots: bool, options: AnswerOptions
    ) -> Iterator[Numbered]:
        """Render and encode queries as `encode_queries` does; bad rows are refused or passed on, as the options say."""
        preceding = self._encoder.preceding("" if after_shots else task.instruction(), int(after_shots))
        label_ids = tuple(self._encoder.answer_ids(label, preceding) for label in task.labels or ())
        for number, row in numbered:
            if isinstance(row, EncodedQuery) and row.preceding is preceding:
                yield number, row
                continue
            try:
                if isinstance(row, UserError):
                    raise row
                query = row.query if isinstance(row, EncodedQuery) else checked_query(row, task)
                option_ids = label_ids or self._option_ids(query.choices, preceding)
                token_ids = self._encoder.query_ids_uncached(query.text, preceding)
            except UserError as error:
                yield number, _refused_or_reported(error, number, options)
                continue
            yield number, EncodedQuery(query, preceding, token_ids, option_ids)

    def after_prefix(
        self,
        prefix: TaskPrefix,
        number: int,
        query: EncodedQuery | UserError,
        retrieve: Retrieve | None,
        options: AnswerOptions,
    ) -> Numbered:
        """Put a query's own examples before it, and make sure that it fits after the prefix."""
        if isinstance(query, UserError):
            return number, query
        own_examples = tuple(retrieve(query.query)) if retrieve else ()
        if retrieve is not None:
            # After a shot the instruction does not matter, and it would be rendered for every query.
            instruction = "" if prefix.num_shots else prefix.task.instruction()
            own_ids: list[int] = []
            for shot, example in enumerate(own_examples, start=prefix.num_shots):
                own_ids += self._encoder.shot_ids(example, self._encoder.preceding(instruction, shot))
            preceding = self._encoder.preceding(instruction, prefix.num_shots + len(own_examples))
            # What opens a sequence, such as bos, is part of a prefix, and of no query.
            if preceding is not query.preceding:
                ids = self._encoder.query_ids_uncached(query.query.text, preceding)
                option_ids = self._option_ids(query.query.choices or prefix.task.labels, preceding)
                query = EncodedQuery(query.query, preceding, ids, option_ids)
            query = replace(query, own_ids=tuple(own_ids))
        needed = prefix.num_tokens + query.num_tokens + self._num_answer_tokens(prefix.task, query)
        if needed > self._max_context_tokens:
            error = self._too_long(needed, prefix.num_shots, len(own_examples))
            return number, _refused_or_reported(error, number, options)
        return number, query

    def alone(self, task: Task, number: int, query: EncodedQuery | UserError) -> Numbered:
        """Return a query that fits the context without any demonstration, or why it cannot be answered."""
        room = self._max_context_tokens - self._encoder.num_preamble_tokens(task.instruction())
        if isinstance(query, UserError) or self.num_reserved_tokens(task, [query]) <= room:
            return number, query
        after_instruction = self._encoder.preceding(task.instruction(), 0)
        num_query_tokens = len(self._encoder.query_ids_uncached(query.query.text, after_instruction))
        needed = self._max_context_tokens - room + num_query_tokens + self._num_answer_tokens(task, query)
        return number, self._too_long(needed, 0, 0) if needed > self._max_context_tokens else query

    def exceed_context(self, prefix: TaskPrefix, queries: Sequence[EncodedQuery], retrieve: Retrieve | None) -> bool:
        """Tell whether one of these queries does not fit after a prefix."""
        return prefix.num_tokens + self.num_reserved_tokens(prefix.task, queries, retrieve) > self._max_context_tokens

    def num_reserved_tokens(
        self, task: Task, queries: Iterable[Row] | None = None, retrieve: Retrieve | None = None
    ) -> int:
        """Count the tokens reserved for the longest query, its retrieved examples and its answer; see `prefill`."""
        if queries is None:
            queries = [example.query for example in task.test or task.train]
        asked = [row if isinstance(row, Query | EncodedQuery) else task.query(row) for row in queries]
        each = [row.query if isinstance(row, EncodedQuery) else row for row in asked]
        of_retrieved = [sum(map(self._encoder.num_shot_tokens, retrieve(query))) for query in each] if retrieve else []
        query = max(map(self._num_query_tokens, asked), default=0)
        return max(of_retrieved, default=0) + query + longest_answer(task, self._encoder, max_answer_tokens(task), each)

    def _num_query_tokens(self, row: Query | EncodedQuery) -> int:
        """Count the tokens of a query; of one not yet encoded, of the longest way to encode it."""
        if isinstance(row, EncodedQuery):
            return row.num_tokens
        return max(len(self._encoder.query_ids(row.text, preceding)) for preceding in Preceding)

    def _option_ids(self, options: Iterable[str] | None, preceding: Preceding) -> tuple[tuple[int, ...], ...]:
        """Encode labels or choices of a query that comes after this."""
        return tuple(self._encoder.answer_ids(option, preceding) for option in options or ())

    def _num_answer_tokens(self, task: Task, query: EncodedQuery) -> int:
        """Count the tokens to keep free for the answer to a query."""
        return max(map(len, query.option_ids), default=max_answer_tokens(task))

    def _too_long(self, num_tokens: int, num_shots: int, num_retrieved: int) -> UserError:
        """Make the error for a query that does not fit the context."""
        own = f" and {num_retrieved} retrieved" if num_retrieved else ""
        what = (
            f"{num_tokens:,} tokens are needed with {num_shots}{own} demonstrations and its answer; "
            f"max_context_tokens is {self._max_context_tokens:,}"
        )
        return UserError("query_too_long", what, remedy="Use fewer demonstrations or a shorter query.")


def _refused_or_reported(error: UserError, number: int, options: AnswerOptions) -> UserError:
    """Return why a row cannot be answered, where bad rows are reported.

    Raises:
        UserError: The error, with the number of the row, where they are refused.
    """
    if options.get("bad_rows", "refuse") == "report":
        return error
    raise (error if error.file else error.at(row=number)) from None
