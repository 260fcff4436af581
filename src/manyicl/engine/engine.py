"""Engine, the one door in: demonstrations -> prefix cache -> answers to queries."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Self

from manyicl.engine.decoding import generate_greedily
from manyicl.engine.prefix_cache import PrefixCache, encode_behind
from manyicl.engine.scoring import Candidate, score_candidates
from manyicl.episodes.budget import fit_demonstrations, num_tokens_for_asking
from manyicl.episodes.encoding import Encoder, PlainFormat
from manyicl.errors import UserError
from manyicl.model.load import LoadedModel, load_model, max_positions
from manyicl.tasks.task import Columns, Example, Query, Task

DEFAULT_MAX_ANSWER_TOKENS = 64
DEFAULT_BATCH_SIZE = 16
# Queries are read ahead this many batches at a time, so that those of like length can share a batch.
BATCHES_READ_AHEAD = 8


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer to one query.

    Attributes:
        answer: The best label or choice, or the generated text without its terminator.
        log_probability: Of the answer, terminator included, in nats.
        scores: Log-probability of every label or choice in nats; None for free answers.
        stopped: False if a generated answer was cut at the limit.
    """

    answer: str
    log_probability: float
    scores: dict[str, float] | None = None
    stopped: bool = True


class Engine:
    """Answers queries of any task after examples of it, without training."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        text_format: PlainFormat | None = None,
        max_context_tokens: int | None = None,
    ) -> None:
        """Take a loaded model.

        Args:
            loaded: From `manyicl.model.load.load_model`.
            text_format: How examples become text; None for the format saved with the model, else plain.
            max_context_tokens: Longest prefix and query together; None for what the architecture allows.

        Raises:
            UserError: If the model allows fewer positions than ``max_context_tokens``.
        """
        self.model = loaded.model
        self.manifest = loaded.manifest
        self.fingerprint = loaded.fingerprint
        self.reference = loaded.reference
        saved_format = loaded.manifest.text_format if loaded.manifest else None
        self.encoder = Encoder(loaded.tokenizer, text_format or saved_format)
        self.trained_context_tokens = loaded.manifest.max_context_tokens if loaded.manifest else None
        allowed = max_positions(loaded.model)
        if max_context_tokens and allowed and max_context_tokens > allowed:
            raise UserError(
                f"max_context_tokens is {max_context_tokens:,}; {loaded.reference!r} allows {allowed:,} positions."
            )
        limit = max_context_tokens or allowed or self.trained_context_tokens
        if limit is None:
            raise UserError(f"{loaded.reference!r} does not say how long its context is; give max_context_tokens.")
        self.max_context_tokens: int = limit

    @classmethod
    def from_pretrained(
        cls,
        reference: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        max_context_tokens: int | None = None,
    ) -> Self:
        """Load a model folder, ``hf:owner/name`` or ``builtin:nano``, with the format it was taught.

        Raises:
            UserError: If it cannot be loaded, or mixes the episodes of a packed row.
        """
        return cls(load_model(reference, dtype=dtype, device=device), max_context_tokens=max_context_tokens)

    def prefill(
        self, task: Task, demonstrations: Sequence[Example] = (), queries: Sequence[Query] | None = None
    ) -> PrefixCache:
        """Encode an instruction and demonstrations once.

        Demonstrations that do not fit the context together with the longest query are left out, balanced by
        label, and counted in ``num_left_out``.

        Args:
            task: What is asked.
            demonstrations: Shown in this order.
            queries: What will be asked, so that the longest fits; None for the task's test rows, or its training
                rows if it has none.

        Raises:
            UserError: If the tokenizer cannot tell the task's labels apart.
        """
        self.encoder.require_distinct(task)
        reserve = self.num_reserved_tokens(task, queries)
        fitting, num_left_out = fit_demonstrations(task, demonstrations, self.encoder, self.max_context_tokens, reserve)
        token_ids = self.encoder.encode_prefix(task.instruction(), fitting)
        keys, values = encode_behind(self.model, token_ids)
        return PrefixCache(task, fitting, num_left_out, token_ids, keys, values)

    def extend(self, prefix: PrefixCache, demonstrations: Sequence[Example]) -> PrefixCache:
        """Return a longer prefix; what is there is not encoded again, and ``prefix`` stays as it is.

        Raises:
            UserError: If the demonstrations do not all fit.
        """
        shown = (*prefix.demonstrations, *demonstrations)
        token_ids = self.encoder.encode_prefix(prefix.task.instruction(), shown)
        room = self.max_context_tokens - self.num_reserved_tokens(prefix.task)
        if len(token_ids) > room:
            raise UserError(
                f"{len(shown)} demonstrations of {prefix.task.name!r} need {len(token_ids):,} tokens; {room:,} of "
                f"max_context_tokens {self.max_context_tokens:,} are free before the longest query. Extend by fewer."
            )
        keys, values = encode_behind(self.model, token_ids[prefix.num_tokens :], prefix.keys, prefix.values)
        return PrefixCache(prefix.task, shown, prefix.num_left_out, token_ids, keys, values)

    def num_reserved_tokens(self, task: Task, queries: Sequence[Query] | None = None) -> int:
        """Count the tokens kept free for the longest query and its answer; see `prefill`."""
        if queries is None:
            queries = [example.query for example in task.test or task.train]
        return num_tokens_for_asking(task, self.encoder, self.max_answer_tokens(task), queries)

    def max_answer_tokens(self, task: Task) -> int:
        """Return where a free answer of this task is cut: the task's own limit, or a default."""
        return task.max_answer_tokens or DEFAULT_MAX_ANSWER_TOKENS

    def predict(
        self, prefix: PrefixCache, rows: Iterable[Columns | str | Query], *, batch_size: int = DEFAULT_BATCH_SIZE
    ) -> Iterator[Prediction]:
        """Answer queries in order, in bounded memory.

        Args:
            prefix: From `prefill` or `extend`.
            rows: Mappings with the task's columns, plain strings where it has one column, or queries.
            batch_size: Rows of one pass through the model. It changes speed and memory, not results.

        Raises:
            UserError: If a row lacks a column, or a query does not fit behind the prefix; the row is numbered.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is at least 1; found {batch_size}.")
        if isinstance(rows, str | Mapping | Query):
            raise UserError(f"predict answers a list of rows; found one {type(rows).__name__}. Put it in a list.")
        return self._predict(prefix, rows, batch_size)

    def _predict(
        self, prefix: PrefixCache, rows: Iterable[Columns | str | Query], batch_size: int
    ) -> Iterator[Prediction]:
        queries = (self._query(prefix, row, number) for number, row in enumerate(rows, start=1))
        while True:
            chunk, failure = _read_ahead(queries, batch_size * BATCHES_READ_AHEAD)
            if chunk:
                yield from self._answer(prefix, chunk, batch_size)
            if failure is not None:
                raise failure
            if not chunk:
                return

    def _query(self, prefix: PrefixCache, row: Columns | str | Query, number: int) -> Query:
        """Render one row and make sure that it fits behind the prefix."""
        try:
            query = row if isinstance(row, Query) else prefix.task.query(row)
        except UserError as error:
            raise UserError(f"Query {number}: {error}") from error
        if not query.text.strip():
            raise UserError(f"Query {number} is empty; expected a text to answer.")
        options = self._options(prefix.task, query)
        query_ids = self.encoder.query_ids(query.text, prefix.opens_sequence)
        answer_tokens = (
            max(len(self.encoder.answer_ids(option)) for option in options)
            if options
            else self.max_answer_tokens(prefix.task)
        )
        needed = prefix.num_tokens + len(query_ids) + answer_tokens
        if needed > self.max_context_tokens:
            raise UserError(
                f"Query {number} needs {needed:,} tokens with {prefix.num_shots} demonstrations and its answer; "
                f"max_context_tokens is {self.max_context_tokens:,}. Use fewer demonstrations or a shorter query."
            )
        return query

    def _options(self, task: Task, query: Query) -> tuple[str, ...] | None:
        """Return the closed answer set of a query; None for free answers."""
        return query.choices or task.labels

    def _answer(self, prefix: PrefixCache, queries: Sequence[Query], batch_size: int) -> Iterator[Prediction]:
        if self._options(prefix.task, queries[0]):
            return self._choose(prefix, queries, batch_size)
        return self._generate(prefix, queries, batch_size)

    def _choose(self, prefix: PrefixCache, queries: Sequence[Query], batch_size: int) -> Iterator[Prediction]:
        """Score every label of every query; the first of equal labels wins."""
        options = [self._options(prefix.task, query) or () for query in queries]
        candidates = [
            Candidate(self.encoder.query_ids(query.text, prefix.opens_sequence), self.encoder.answer_ids(option))
            for query, own in zip(queries, options, strict=True)
            for option in own
        ]
        scores = iter(score_candidates(self.model, prefix, candidates, batch_size))
        for own in options:
            by_option = {option: next(scores) for option in own}
            answer = max(by_option, key=lambda option: by_option[option])
            yield Prediction(answer, by_option[answer], by_option)

    def _generate(self, prefix: PrefixCache, queries: Sequence[Query], batch_size: int) -> Iterator[Prediction]:
        encoded = [self.encoder.query_ids(query.text, prefix.opens_sequence) for query in queries]
        limit = self.max_answer_tokens(prefix.task)
        for generation in generate_greedily(self.model, self.encoder, prefix, encoded, limit, batch_size):
            yield Prediction(generation.answer or "", generation.log_probability, None, generation.stopped)


def _read_ahead(queries: Iterator[Query], most: int) -> tuple[list[Query], UserError | None]:
    """Take up to ``most`` queries; one that is wrong ends them, so that those before it are still answered."""
    chunk: list[Query] = []
    try:
        chunk.extend(islice(queries, most))
    except UserError as failure:
        return chunk, failure
    return chunk, None
