"""Engine: demonstrations -> prefix -> answers to queries. Knows tasks, text and answers; a backend runs the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, cast

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from manyicl.engine.answers import AnswerEnd
from manyicl.engine.backend import (
    Backend,
    BetweenChunks,
    GeneratedToken,
    ObservingBackend,
    Prefix,
    Sampling,
    Wanted,
    backend_cannot_compile,
    foreign_prefix,
    require_context,
    require_own,
)
from manyicl.engine.label_scores import LabelScores, mean_scores
from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.observed import AnswerTargets
from manyicl.engine.queries import (
    AnswerOptions,
    EncodedQuery,
    FittingQuery,
    Row,
    checked_options,
    checked_query,
    in_batches,
    query_error,
)
from manyicl.engine.task_prefix import CompiledTask, TaskPrefix, require_demonstrations
from manyicl.episodes.budget import fit_demonstrations, num_tokens_for_asking
from manyicl.episodes.chat_template import ChatTemplate
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.text_format import AnyFormat, ChatFormat, FormatKind, Preceding
from manyicl.errors import QueryError, UserError
from manyicl.model.manifest import Manifest, format_to_ask_in
from manyicl.tasks.nearest import NearestExamples
from manyicl.tasks.task import Example, Query, Task

if TYPE_CHECKING:
    from manyicl.model.load import LoadedModel

DEFAULT_MAX_ANSWER_TOKENS = 64
# Queries are read ahead so many at a time, so that those of like length can advance together.
READ_AHEAD_QUERIES = 256
# `answer` fits demonstrations to so many queries at once; a longer query after them makes it fit again.
FITTED_QUERIES = 1024
# Content-free queries whose label scores are the labels' prior (Zhao et al. 2021, arXiv:2102.09690, section 5).
NEUTRAL_QUERIES = ("N/A", "[MASK]", "?")

Nearest = Callable[[Query], Sequence[Example]]


class EngineOptions(TypedDict, total=False):
    """Arguments that every way to make an `Engine` passes to its `__init__`, where they are explained."""

    text_format: AnyFormat | FormatKind | None
    end_of_answer: str | None
    max_context_tokens: int | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer to one query.

    Attributes:
        answer: The best label or choice, or the generated text without its end-of-answer text.
        log_probability: Log-probability of the answer with its end-of-answer text, in nats.
        scores: Scores of every label or choice, where all were wanted; None otherwise, and for free answers.
        stopped: False if a generated answer was cut at the limit.
        abstained: True if the answer's probability among the labels was below the given threshold.
        num_shots: Number of demonstrations before the query that all queries share.
    """

    answer: str
    log_probability: float
    scores: LabelScores | None = None
    stopped: bool = True
    abstained: bool = False
    num_shots: int = 0

    def as_json(self) -> dict[str, Any]:
        """Return the prediction as JSON holds it; the answer is null where it abstained.

        >>> Prediction("good", -0.25, num_shots=4).as_json()
        {'answer': 'good', 'log_probability': -0.25, 'stopped': True, 'abstained': False, 'num_shots': 4}
        """
        known: dict[str, Any] = {
            "answer": None if self.abstained else self.answer,
            "log_probability": self.log_probability,
            "stopped": self.stopped,
            "abstained": self.abstained,
            "num_shots": self.num_shots,
        }
        if self.scores is not None:
            known["scores"] = dict(self.scores.log_probabilities)
            known["probabilities"] = self.scores.probabilities
        return known


class Engine:
    """Answers queries of any task, given examples of the task in the context, without training.

    >>> from manyicl import Engine, Task
    >>> engine = Engine.from_pretrained("builtin:nano")
    >>> pairs = [("a red hat", "hat"), ("the blue lamp", "lamp"), ("a red lamp", "lamp"), ("one hat", "hat")]
    >>> task = Task.from_examples("things", pairs, labels=("hat", "lamp"))
    >>> prefix = engine.prefill(task, task.train)
    >>> [prediction.answer for prediction in engine.predict(prefix, ["a white lamp", "a pink hat"])]
    ['lamp', 'hat']
    """

    def __init__(
        self,
        backend: Backend,
        tokenizer: PreTrainedTokenizerBase,
        *,
        manifest: Manifest | None = None,
        text_format: AnyFormat | FormatKind | None = None,
        end_of_answer: str | None = None,
        max_context_tokens: int | None = None,
    ) -> None:
        """Take a backend and its tokenizer.

        Args:
            backend: Runs the network.
            tokenizer: Tokenizer of that network.
            manifest: Record of the model's fine-tuning; None if it was not fine-tuned with this package.
            text_format: How examples become text; None for the format saved with the model, or plain without one.
                ``"chat"`` uses the turns of an instruct model's chat template.
            end_of_answer: Text that ends an answer, or a control token of the tokenizer, for a model that was not
                fine-tuned here; None for the one it was fine-tuned with, else a blank line.
            max_context_tokens: Limit for prefix, query and answer together; None for the architecture's maximum.

        Raises:
            UserError: If the model was fine-tuned in another kind of format, or its chat template cannot be used; if
                ``max_context_tokens`` is below 1 or more than the model allows, or needed and not given.
        """
        self.backend = backend
        self.manifest = manifest
        # Turns that were extracted just now are compared with the rows of every task; a manifest has those of training.
        self._template: ChatTemplate | None = None
        self._compared: set[tuple[str, str]] = set()
        if not isinstance(text_format, BaseModel):
            if text_format == "chat" and manifest is None:
                self._template = ChatTemplate(tokenizer)
            text_format = format_to_ask_in(tokenizer, manifest, text_format, end_of_answer)
        self.encoder = Encoder(tokenizer, text_format)
        self.trained_context_tokens = manifest.max_context_tokens if manifest else None
        require_context(max_context_tokens, backend.identity)
        limit = max_context_tokens or backend.identity.max_context_tokens or self.trained_context_tokens
        if limit is None:
            raise UserError(
                "unknown_context",
                f"{self.reference!r} does not say how long its context is",
                remedy="Give max_context_tokens.",
            )
        self.max_context_tokens: int = limit
        self._end = AnswerEnd(self.encoder, backend.identity.end_token_ids)

    @classmethod
    def local(
        cls,
        loaded: LoadedModel,
        *,
        activation_budget_mib: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Run a loaded model in this process; arguments are those of `__init__` and of `LocalBackend`."""
        from manyicl.engine.local import LocalBackend

        backend = LocalBackend(loaded, activation_budget_mib=activation_budget_mib)
        return cls(backend, loaded.tokenizer, manifest=loaded.manifest, **options)

    @classmethod
    def from_pretrained(
        cls,
        reference: str | Path,
        *,
        dtype: str | None = None,
        device: str | None = None,
        activation_budget_mib: int | None = None,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Load a folder, .gguf file, ``hf:owner/name`` or ``builtin:name``, with the format it was fine-tuned in.

        Raises:
            UserError: If it cannot be loaded, or mixes the episodes of a packed sequence.
        """
        from manyicl.model.load import load_model

        loaded = load_model(str(reference), dtype=dtype, device=device)
        return cls.local(loaded, activation_budget_mib=activation_budget_mib, **options)

    @property
    def reference(self) -> str:
        """Name that the user gave the model."""
        return self.backend.identity.reference

    @property
    def fingerprint(self) -> str:
        """Hash of the weights."""
        return self.backend.identity.fingerprint

    @property
    def dtype(self) -> str:
        """Precision of the computation, such as ``bfloat16``."""
        return self.backend.identity.dtype

    # --- Prefixes

    def prefill(
        self,
        task: Task,
        demonstrations: Iterable[Example] = (),
        queries: Iterable[Row] | None = None,
        *,
        nearest: Nearest | None = None,
        reuse: TaskPrefix | None = None,
        between_chunks: BetweenChunks | None = None,
    ) -> TaskPrefix:
        """Encode an instruction and demonstrations once.

        Demonstrations that do not fit the context together with the longest query are dropped, balanced by label,
        and counted in ``num_dropped``.

        Args:
            task: Task of the demonstrations.
            demonstrations: Examples, in the order in which they will be in the context.
            queries: Queries that will follow, so that the longest fits; None for the task's test rows, or its
                training rows if it has none.
            nearest: Finds additional examples for each query, for which tokens are reserved too.
            reuse: Another prefix of this engine; the tokens that both begin with are shared, not encoded again.
            between_chunks: Called between chunks of a long prefill with the number of tokens done and in total. Chunks
                then take a fraction of a second, so that other work can go first. If it raises, the prefill ends.

        Raises:
            UserError: If the tokenizer cannot tell the task's labels apart, a demonstration is of another task, or
                ``reuse`` is of another engine.
        """
        if reuse is not None:
            self._require_own(reuse)
        fitting, num_dropped = self._fitting(task, demonstrations, queries, nearest)
        token_ids = self.encoder.encode_prefix(task.instruction(), fitting)
        cache = self.backend.prefill(token_ids, reuse.cache if reuse else None, between_chunks=between_chunks)
        return self._prefix(task, fitting, num_dropped, cache, reuse)

    def prepare(
        self, task: Task, demonstrations: Sequence[Example], queries: Iterable[Row] | None = None, *, num_nearest: int
    ) -> tuple[TaskPrefix, Nearest | None]:
        """Prefill demonstrations, and find each query's nearest examples among the rows that did not become any.

        These rows are known only when it is known which demonstrations fit, and that depends on the tokens reserved for
        the nearest examples. So the nearest of all rows are tried first.

        Args:
            task: Task of the demonstrations.
            demonstrations: Examples, in the order in which they will be in the context.
            queries: Queries that will follow, as for `prefill`.
            num_nearest: Number of nearest examples to add for each query; 0 for none.

        Returns:
            The prefix, and the finder of each query's nearest examples, or None.
        """
        if not num_nearest:
            return self.prefill(task, demonstrations, queries), None
        queries = None if queries is None else list(queries)
        nearest = NearestExamples(task.train, num_nearest)
        prefix: TaskPrefix | None = None
        while True:
            earlier, prefix = prefix, self.prefill(task, demonstrations, queries, nearest=nearest, reuse=prefix)
            nearest = NearestExamples(task.train, num_nearest, exclude=prefix.demonstrations)
            needed = prefix.num_tokens + self.num_reserved_tokens(task, queries, nearest)
            if needed <= self.max_context_tokens or (earlier and earlier.num_shots <= prefix.num_shots):
                return prefix, nearest

    def extend(
        self,
        prefix: TaskPrefix,
        demonstrations: Iterable[Example],
        queries: Iterable[Row] | None = None,
        *,
        labels: Iterable[str] | None = None,
        nearest: Nearest | None = None,
        between_chunks: BetweenChunks | None = None,
    ) -> TaskPrefix:
        """Return a longer prefix; ``prefix`` is not changed, and nothing of it is encoded again.

        Args:
            prefix: Prefix of this engine.
            demonstrations: Examples to add after the existing ones.
            queries: Queries that will follow, as for `prefill`; a loaded prefix has no rows but its demonstrations.
            labels: The complete new label set, if it grows; None for the task's. If the instruction lists the labels,
                it changes with them; the prefix is then encoded anew from there, and its ``rebuilt`` is true.
            nearest: As for `prefill`.
            between_chunks: As for `prefill`.

        Raises:
            UserError: If the demonstrations do not all fit, one is of another task, another engine made ``prefix``, or
                ``labels`` is one text.
        """
        self._require_own(prefix)
        task = prefix.task
        if isinstance(labels, str):
            what, remedy = "labels are a list of texts", f"Write labels=({labels!r},) for one label."
            raise UserError("not_a_list", what, found=repr(labels), remedy=remedy, field="labels")
        if labels is not None:
            task = task.with_spec(labels=tuple(dict.fromkeys(labels)))
            self.encoder.require_encodable(task)
        added = tuple(demonstrations)
        require_demonstrations(prefix.demonstrations, task)
        require_demonstrations(added, task)
        together = (*prefix.demonstrations, *added)
        token_ids = self.encoder.encode_prefix(task.instruction(), together)
        most = self.max_context_tokens - self.num_reserved_tokens(task, queries, nearest)
        if len(token_ids) > most:
            raise UserError(
                "too_many_demonstrations",
                f"{len(together)} demonstrations of task {task.name!r} do not fit before the longest query",
                expected=f"at most {most:,} of {self.max_context_tokens:,} tokens",
                found=f"{len(token_ids):,}",
                remedy="Extend by fewer.",
            )
        cache = self.backend.prefill(token_ids, prefix.cache, between_chunks=between_chunks)
        longer = self._prefix(task, together, prefix.num_dropped, cache, prefix)
        return replace(longer, rebuilt=longer.num_reused_tokens < prefix.num_tokens)

    def compile(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        queries: Iterable[Row] | None = None,
        *,
        nearest: Nearest | None = None,
    ) -> CompiledTask:
        """Encode demonstrations once, and record from the same pass how well each is predicted given those before it.

        Arguments and errors are those of `prefill`; `save` and `load` keep the result on disk.
        """
        fitting, num_dropped = self._fitting(task, demonstrations, queries, nearest)
        token_ids = self.encoder.encode_prefix(task.instruction(), fitting)
        answers = AnswerTargets.of(task, fitting, self.encoder)
        if not hasattr(self.backend, "observe"):
            raise backend_cannot_compile(self.backend.identity)
        cache, scores = cast(ObservingBackend, self.backend).observe(token_ids, answers.targets)
        return CompiledTask(self._prefix(task, fitting, num_dropped, cache), answers.answers(scores))

    def save(self, compiled: CompiledTask, path: str | Path) -> None:
        """Write a compiled task to one file, which holds its demonstrations in recoverable form.

        Raises:
            UserError: If the file cannot be written, or another engine compiled the task.
        """
        from manyicl.engine.compiled import save_compiled

        self._require_own(compiled.prefix)
        save_compiled(compiled, Path(path), self.encoder.format)

    def load(self, path: str | Path) -> CompiledTask:
        """Load a task that this model compiled, in a fraction of the time that compiling takes.

        Raises:
            UserError: If the file is incomplete, or belongs to another model, adapter, precision, format or version.
        """
        from manyicl.engine.compiled import load_compiled

        compiled = load_compiled(Path(path), self.backend, self.encoder)
        if compiled.prefix.num_tokens > self.max_context_tokens:
            raise UserError(
                "prefix_too_long",
                f"the prefix has {compiled.prefix.num_tokens:,} tokens",
                expected=f"at most max_context_tokens, {self.max_context_tokens:,}",
                remedy="Raise it, or compile the task with fewer demonstrations.",
                file=path,
            )
        return compiled

    def _prefix(
        self,
        task: Task,
        demonstrations: tuple[Example, ...],
        num_dropped: int,
        cache: Prefix,
        source: TaskPrefix | None = None,
    ) -> TaskPrefix:
        """Put a prefix together, with what it took over from ``source``."""
        num_reused = num_shared_tokens(cache.token_ids, source.token_ids) if source else 0
        return TaskPrefix(task, demonstrations, num_dropped, self.encoder.text_hash, cache, num_reused)

    def _require_own(self, prefix: TaskPrefix) -> None:
        """Refuse a prefix of another network, tokenizer or text format.

        Raises:
            UserError: If it is one.
        """
        if not isinstance(prefix, TaskPrefix):
            raise UserError(
                "not_a_prefix",
                "queries are answered after a prefix",
                expected="what prefill or extend returns, or the prefix of a compiled task",
                found=type(prefix).__name__,
            )
        identity = self.backend.identity
        require_own(prefix.cache, identity)
        if prefix.text_hash != self.encoder.text_hash:
            raise foreign_prefix("another tokenizer or text format", prefix.cache.identity, identity)

    def _fitting(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        queries: Iterable[Row] | None,
        nearest: Nearest | None,
    ) -> tuple[tuple[Example, ...], int]:
        """Choose the demonstrations that fit the context with the longest query; see `prefill`."""
        demonstrations = tuple(demonstrations)
        require_demonstrations(demonstrations, task)
        self.encoder.require_encodable(task)
        identity = task.name, task.data_hash
        text_format = self.encoder.format
        if self._template is not None and isinstance(text_format, ChatFormat) and identity not in self._compared:
            self._template.require_same_rows(text_format, task)
            # A shot curve prefills the same task for every draw.
            self._compared.add(identity)
        reserve = self.num_reserved_tokens(task, queries, nearest)
        return fit_demonstrations(task, demonstrations, self.encoder, self.max_context_tokens, reserve)

    def num_reserved_tokens(
        self, task: Task, queries: Iterable[Row] | None = None, nearest: Nearest | None = None
    ) -> int:
        """Count the tokens reserved for the longest query, its nearest examples and its answer; see `prefill`."""
        if queries is None:
            queries = [example.query for example in task.test or task.train]
        asked = [row if isinstance(row, Query | EncodedQuery) else task.query(row) for row in queries]
        each = [row.query if isinstance(row, EncodedQuery) else row for row in asked]
        own = 0
        if nearest is not None:
            own = max((sum(map(self.encoder.num_shot_tokens, nearest(query))) for query in each), default=0)
        limit = self.max_answer_tokens(task)
        if task.choices_column:
            choices = {choice for query in each for choice in query.choices or ()}
            answer = max((len(self.encoder.answer_ids(choice)) for choice in choices), default=limit)
        else:
            answer = num_tokens_for_asking(task, self.encoder, limit, ())
        return own + max(map(self._num_query_tokens, asked), default=0) + answer

    def _num_query_tokens(self, row: Query | EncodedQuery) -> int:
        """Count the tokens of a query; of one not yet encoded, of the longest way to encode it."""
        if isinstance(row, EncodedQuery):
            return len(row.token_ids)
        return max(len(self.encoder.query_ids(row.text, preceding)) for preceding in Preceding)

    def max_answer_tokens(self, task: Task) -> int:
        """Return the limit for free answers of this task: the task's own, or a default."""
        return task.max_answer_tokens or DEFAULT_MAX_ANSWER_TOKENS

    # --- Queries

    def encode_queries(self, task: Task, rows: Iterable[Row], *, after_shots: bool = True) -> Iterator[EncodedQuery]:
        """Render and encode queries, each once; `prefill` and `predict` accept the result instead of rows.

        Args:
            task: Task of the queries.
            rows: As for `predict`.
            after_shots: Whether demonstrations will come before them.

        Raises:
            UserError: If a row lacks a column, is empty, or does not fit the task; ``row`` is its number.
        """
        preceding = self.encoder.preceding("" if after_shots else task.instruction(), int(after_shots))
        label_ids = tuple(self.encoder.answer_ids(label) for label in task.labels or ())
        for number, row in enumerate(rows, start=1):
            if isinstance(row, EncodedQuery) and row.preceding is preceding:
                yield row
                continue
            try:
                query = row.query if isinstance(row, EncodedQuery) else checked_query(row, task)
                option_ids = label_ids or tuple(self.encoder.answer_ids(choice) for choice in query.choices or ())
                token_ids = self.encoder.query_ids_uncached(query.text, preceding)
            except UserError as error:
                raise query_error(error, number) from error
            yield EncodedQuery(query, preceding, token_ids, option_ids)

    def predict(
        self,
        prefix: TaskPrefix,
        rows: Iterable[Row],
        *,
        scores: Wanted = "best",
        abstain_below: float | None = None,
        sampling: Sampling | None = None,
        nearest: Nearest | None = None,
    ) -> Iterator[Prediction]:
        """Answer queries in order, in bounded memory; closing the iterator ends the work.

        Args:
            prefix: From `prefill` or `extend`.
            rows: Mappings with the task's columns, plain strings if the task has one column, or queries.
            scores: ``best`` finds the best label alone; ``all`` scores every label, at the cost of processing them all.
            abstain_below: Mark answers whose probability among the labels is below this; needs ``scores="all"``.
            sampling: How to sample free answers; None for greedy decoding.
            nearest: Finds additional examples for each query, which come between the prefix and the query.

        Raises:
            UserError: If a row lacks a column, or a query does not fit after the prefix, with the number of the row;
                or if the options contradict each other or the task, or another engine made the prefix.
        """
        self._require_own(prefix)
        options = checked_options(prefix.task, rows, scores, abstain_below, sampling)
        return self._predict(prefix, rows, options, nearest)

    def answer(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        rows: Iterable[Row],
        *,
        num_nearest: int = 0,
        scores: Wanted = "best",
        abstain_below: float | None = None,
        sampling: Sampling | None = None,
        on_prefix: Callable[[TaskPrefix], None] | None = None,
    ) -> Iterator[Prediction]:
        """Choose demonstrations that fit with the queries and answer these, in one pass; streams may be endless.

        As many demonstrations are used as fit with the longest of the first ``FITTED_QUERIES`` queries. If a later one
        needs more tokens, fewer are used from there on; ``num_shots`` of a prediction says how many.

        Args:
            task: Task of demonstrations and queries.
            demonstrations: Examples, in the order in which they will be in the context.
            rows: As for `predict`.
            num_nearest: Number of nearest examples to add for each query, as for `prepare`.
            scores: As for `predict`.
            abstain_below: As for `predict`.
            sampling: As for `predict`.
            on_prefix: Called with every prefix before its answers.

        Raises:
            UserError: As for `prefill` and `predict`.
        """
        options = checked_options(task, rows, scores, abstain_below, sampling)
        return self._answer(task, tuple(demonstrations), rows, num_nearest, options, on_prefix)

    def prior(self, prefix: TaskPrefix, neutral_queries: Sequence[str] = NEUTRAL_QUERIES) -> LabelScores:
        """Score the labels after content-free queries, for `LabelScores.corrected`.

        Every column of the query template holds a neutral text.

        Raises:
            UserError: If the task has no labels of its own.

        Source: Zhao et al. 2021, arXiv:2102.09690.
        """
        if not prefix.task.labels:
            raise UserError(
                "no_labels", f"Task {prefix.task.name!r} has no closed label set; there is no prior to take"
            )
        neutral = [prefix.task.query(dict.fromkeys(prefix.task.columns, text)) for text in neutral_queries]
        return mean_scores([one.scores for one in self.predict(prefix, neutral, scores="all") if one.scores])

    def _answer(
        self,
        task: Task,
        demonstrations: tuple[Example, ...],
        rows: Iterable[Row],
        num_nearest: int,
        options: AnswerOptions,
        on_prefix: Callable[[TaskPrefix], None] | None,
    ) -> Iterator[Prediction]:
        prefix: TaskPrefix | None = None
        nearest: Nearest | None = None
        encoded = self.encode_queries(task, rows, after_shots=bool(demonstrations))
        num_answered = 0
        most = self.max_context_tokens - self.encoder.num_preamble_tokens(task.instruction())
        for batch in in_batches(encoded, FITTED_QUERIES):
            # A query that does not fit even alone is refused by its number; it takes no demonstration from others.
            possible = [query for query in batch if self.num_reserved_tokens(task, [query]) <= most]
            needed = self.num_reserved_tokens(task, possible, nearest)
            if prefix is None or (prefix.num_shots and prefix.num_tokens + needed > self.max_context_tokens):
                shown = prefix.demonstrations if prefix else demonstrations
                prefix, nearest = self.prepare(task, shown, possible, num_nearest=num_nearest)
                prefix = replace(prefix, num_dropped=len(demonstrations) - prefix.num_shots)
                if on_prefix is not None:
                    on_prefix(prefix)
            yield from self._predict(prefix, batch, options, nearest, num_answered)
            num_answered += len(batch)

    def _predict(
        self,
        prefix: TaskPrefix,
        rows: Iterable[Row],
        options: AnswerOptions,
        nearest: Nearest | None,
        num_before: int = 0,
    ) -> Iterator[Prediction]:
        """Answer queries; ``num_before`` others of their stream were answered before."""
        after_shots = bool(prefix.num_shots or nearest)
        encoded = self.encode_queries(prefix.task, rows, after_shots=after_shots)
        numbered = enumerate(encoded, start=num_before + 1)
        fitting = (self._fitting_query(prefix, query, number, nearest) for number, query in numbered)
        for batch in in_batches(fitting, READ_AHEAD_QUERIES):
            answers = self._choose if prefix.task.is_closed else self._generate
            yield from answers(prefix, batch, options)

    def _fitting_query(
        self, prefix: TaskPrefix, encoded: EncodedQuery, number: int, nearest: Nearest | None
    ) -> FittingQuery:
        """Put a query's own examples before it, and make sure that it fits after the prefix."""
        own_examples = tuple(nearest(encoded.query)) if nearest else ()
        token_ids = self._ids_with_own_examples(prefix, own_examples, encoded) if nearest else encoded.token_ids
        options = encoded.query.choices or prefix.task.labels or ()
        answer_tokens = max(map(len, encoded.option_ids), default=self.max_answer_tokens(prefix.task))
        needed = prefix.num_tokens + len(token_ids) + answer_tokens
        if needed > self.max_context_tokens:
            own = f" and {len(own_examples)} nearest" if own_examples else ""
            raise QueryError(
                "query_too_long",
                f"{needed:,} tokens are needed with {prefix.num_shots}{own} demonstrations and its answer; "
                f"max_context_tokens is {self.max_context_tokens:,}",
                remedy="Use fewer demonstrations or a shorter query.",
                row=number,
            )
        return FittingQuery(number, token_ids, options, encoded.option_ids)

    def _ids_with_own_examples(
        self, prefix: TaskPrefix, own_examples: Sequence[Example], encoded: EncodedQuery
    ) -> tuple[int, ...]:
        """Encode what follows the prefix: a query's own examples, then the query up to its answer."""
        # After a shot the instruction does not matter, and it would be rendered for every query.
        instruction = "" if prefix.num_shots else prefix.task.instruction()
        token_ids: list[int] = []
        for shot, example in enumerate(own_examples, start=prefix.num_shots):
            token_ids += self.encoder.shot_ids(example, self.encoder.preceding(instruction, shot))
        preceding = self.encoder.preceding(instruction, prefix.num_shots + len(own_examples))
        if preceding is encoded.preceding:
            return (*token_ids, *encoded.token_ids)
        # What opens a sequence, such as bos, is part of a prefix, and of no query.
        return (*token_ids, *self.encoder.query_ids_uncached(encoded.query.text, preceding))

    def _choose(
        self, prefix: TaskPrefix, queries: Sequence[FittingQuery], options: AnswerOptions
    ) -> Iterator[Prediction]:
        """Find the best option of each query; the first among equals."""
        token_ids, option_ids = [query.token_ids for query in queries], [query.option_ids for query in queries]
        found = self.backend.score(prefix.cache, token_ids, option_ids, options.scores)
        for query, scores in zip(queries, found, strict=True):
            answer, log_probability = query.options[scores.best], scores.log_probabilities[scores.best]
            label_scores, abstained = None, False
            if options.scores == "all":
                log_probabilities = {option: scores.log_probabilities[n] for n, option in enumerate(query.options)}
                num_tokens = {option: len(ids) for option, ids in zip(query.options, query.option_ids, strict=True)}
                label_scores = LabelScores(log_probabilities, num_tokens)
                abstained = label_scores.probabilities[answer] < (options.abstain_below or 0)
            yield Prediction(answer, log_probability, label_scores, abstained=abstained, num_shots=prefix.num_shots)

    def _generate(
        self, prefix: TaskPrefix, queries: Sequence[FittingQuery], options: AnswerOptions
    ) -> Iterator[Prediction]:
        """Write the answer of each query; those that end early wait for the ones before them."""
        limit = self.max_answer_tokens(prefix.task)
        numbers = [query.number for query in queries]
        ids = [query.token_ids for query in queries]
        written: list[list[GeneratedToken]] = [[] for _ in queries]
        finished: set[int] = set()
        next_query = 0
        for token in self.backend.generate(prefix.cache, ids, self._end, limit, options.sampling, numbers):
            written[token.query].append(token)
            if token.is_last:
                finished.add(token.query)
            while next_query in finished:
                text, log_probability = self._end.text_of(written[next_query])
                stopped = written[next_query][-1].stopped
                yield Prediction(text, log_probability, None, stopped, num_shots=prefix.num_shots)
                written[next_query] = []
                next_query += 1
