"""Engine: demonstrations -> prefix -> answers to queries. Knows tasks, text and answers; a backend runs the network."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, count, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TypedDict, Unpack, cast

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from manyicl.engine.answers import AnswerEnd, GrowingText
from manyicl.engine.backend import (
    Backend,
    BetweenChunks,
    GeneratedToken,
    ObservingBackend,
    OptionScores,
    Prefix,
    ScoreScope,
    backend_cannot_compile,
    foreign_prefix,
    require_context,
    require_own,
)
from manyicl.engine.channel import refused_in_channel_form, score_channel, scores_before_shown
from manyicl.engine.label_scores import LabelScores, mean_scores
from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.observed import ObservedAnswer, answer_targets, observed_answers
from manyicl.engine.queries import (
    AnswerOptions,
    EncodedQuery,
    Numbered,
    Row,
    StreamedRow,
    checked_query,
    in_batches,
    is_query,
    require_blendable,
    require_options,
)
from manyicl.engine.task_prefix import FittedPrefix, TaskPrefix, require_demonstrations
from manyicl.episodes.budget import DEFAULT_MAX_ANSWER_TOKENS, fit_demonstrations, longest_answer
from manyicl.episodes.chat_template import require_rows_as_written
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.text_format import AnyFormat, FormatKind, FormatSettings, Preceding
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest, format_to_ask_in
from manyicl.paths import required_path
from manyicl.tasks.retrieval import MostSimilar, Retriever
from manyicl.tasks.task import Example, Query, Task

if TYPE_CHECKING:
    from manyicl.engine.blend import Blend
    from manyicl.model.load import LoadedModel

# Queries are read ahead so many at a time, so that those of like length can advance together.
READ_AHEAD_QUERIES = 256
# `answer` fits demonstrations to so many queries at once; a longer query after them makes it fit again.
FITTED_QUERIES = 1024
# The weights of a blend are fitted on so many queries before other work may go first.
QUERIES_PER_CHUNK = 4
# Rows for which others are retrieved before other work may go first.
ROWS_PER_CHUNK = 64
# Tasks whose rows were compared with the turns of a chat; where there are more, some are compared again.
MOST_COMPARED = 1024
# Content-free queries whose label scores are the labels' prior (Zhao et al. 2021, arXiv:2102.09690, section 5).
NEUTRAL_QUERIES = ("N/A", "[MASK]", "?")

Retrieve = Callable[[Query], Sequence[Example]]
Explain = Callable[[Query], tuple[Example, ...]]


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
        log_probability: Log-probability of the answer with its end-of-answer text, in nats; in the channel form, of the
            query after the answer.
        scores: Scores of every label or choice, where all were wanted, and always in the channel form; None otherwise,
            and for free answers.
        second: The second best label or choice, where the best two or all scores were wanted; None otherwise, and where
            there is one.
        margin: Log-probability of the answer less that of the second best, in nats; None where that is.
        stopped: False if a generated answer was cut at the limit.
        abstained: True if the answer's probability among the labels was below the given threshold.
        num_shots: Number of demonstrations before the query that all queries share.
        blended: True if ``answer`` and ``scores`` are those of the model's scores and a linear classifier's, combined;
            ``log_probability`` is the model's alone.
        problem: Why there is no answer, where bad rows are reported; ``answer`` is then empty, and
            ``log_probability`` not a number.
        similar: Demonstrations in the context that are most like the query, the most similar first, where they were
            wanted; None otherwise.

    Examples:
        >>> prediction = Prediction("good", -0.25, num_shots=4)
        >>> prediction.answer, prediction.num_shots
        ('good', 4)
        >>> sorted(prediction.as_json())
        ['abstained', 'answer', 'blended', 'log_probability', 'num_shots', 'stopped']
    """

    answer: str
    log_probability: float
    scores: LabelScores | None = None
    second: str | None = None
    margin: float | None = None
    stopped: bool = True
    abstained: bool = False
    num_shots: int = 0
    blended: bool = False
    problem: UserError | None = None
    similar: tuple[Example, ...] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the prediction as JSON holds it; the answer is null where it abstained."""
        names = ("answer", "log_probability", "stopped", "abstained", "num_shots", "blended")
        known: dict[str, Any] = {name: getattr(self, name) for name in names}
        if self.problem is not None:
            return {**dict.fromkeys(names), "problem": str(replace(self.problem, file=None, row=None))}
        if self.abstained:
            known["answer"] = None
        if self.second is not None:
            known |= {"second": self.second, "margin": self.margin}
        if self.scores is not None:
            known |= {"scores": dict(self.scores.log_probabilities), "probabilities": self.scores.probabilities}
        if self.similar is not None:
            known["similar"] = [{"text": example.query.text, "answer": example.answer} for example in self.similar]
        return known


@dataclass(frozen=True, slots=True)
class AnswerPart:
    """The next text of a free answer that is being written.

    Attributes:
        row: Number of the row among those given, from 1.
        text: Text that follows the parts before it; the parts of a row together are its answer.
        prediction: The whole answer, with the last part of a row; None before.
    """

    row: int
    text: str
    prediction: Prediction | None = None


class Engine:
    """Answers queries of any task, given examples of the task in the context, without training.

    Examples:
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
                ``"chat"`` uses the turns of an instruct model's chat template; ``"channel"`` scores the query after
                each label.
            end_of_answer: Text that ends an answer, or a control token of the tokenizer, for a model that was not
                fine-tuned here; None for the one it was fine-tuned with, else a blank line.
            max_context_tokens: Limit for prefix, query and answer together; None for the architecture's maximum.

        Raises:
            UserError: If the model was fine-tuned in another kind of format, or its chat template cannot be used; if
                ``max_context_tokens`` is no number from 1 to what the model allows, or needed and not given.
        """
        self.backend = backend
        self.identity = backend.identity
        self.manifest = manifest
        # Turns that are extracted just now are compared with the rows of every task; a manifest has those of training.
        self._compares_rows = text_format == "chat" and manifest is None
        self._compared: set[tuple[str, str]] = set()
        if not isinstance(text_format, BaseModel):
            text_format = format_to_ask_in(tokenizer, manifest, text_format, end_of_answer)
        self.encoder = Encoder(tokenizer, text_format)
        self.trained_context_tokens = manifest.max_context_tokens if manifest else None
        require_context(max_context_tokens, self.identity)
        limit = max_context_tokens or self.identity.max_context_tokens or self.trained_context_tokens
        if limit is None:
            what = f"{self.identity.reference!r} does not say how long its context is"
            raise UserError("unknown_context", what, remedy="Give max_context_tokens.")
        self.max_context_tokens: int = limit
        self._end = AnswerEnd(self.encoder, self.identity.end_token_ids)

    @property
    def is_channel(self) -> bool:
        """Whether queries are scored after each label, and not labels after a query; see `manyicl.engine.channel`."""
        return self.encoder.format.answer_first

    @classmethod
    def local(
        cls,
        loaded: LoadedModel,
        *,
        activation_budget_mib: int | None = None,
        merge: bool = False,
        **options: Unpack[EngineOptions],
    ) -> Self:
        """Run a loaded model in this process; arguments are those of `__init__` and of `LocalBackend`."""
        from manyicl.engine.local import LocalBackend

        backend = LocalBackend(loaded, activation_budget_mib=activation_budget_mib, merge=merge)
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

        loaded = load_model(reference, dtype=dtype, device=device)
        return cls.local(loaded, activation_budget_mib=activation_budget_mib, merge=True, **options)

    # --- Prefixes

    def prefill(
        self,
        task: Task,
        demonstrations: Iterable[Example] = (),
        queries: Iterable[Row] | None = None,
        *,
        retrieve: Retrieve | None = None,
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
            retrieve: Retrieves examples for each query, for which tokens are reserved too.
            reuse: Another prefix of this engine; the tokens that both begin with are shared, not encoded again.
            between_chunks: Called between chunks of a long prefill with the number of tokens done and in total. Chunks
                then take a fraction of a second, so that other work can go first; it may return how many seconds the
                next one should take. If it raises, the prefill ends.

        Raises:
            UserError: If the tokenizer cannot tell the task's labels apart, a demonstration is of another task, or
                ``reuse`` is of another engine.
        """
        if reuse is not None:
            self._require_own(reuse)
        fitting, num_dropped, token_ids = self._fitting(task, demonstrations, queries, retrieve)
        cache = self.backend.prefill(token_ids, reuse.cache if reuse else None, between_chunks=between_chunks)
        return self._prefix(task, fitting, num_dropped, cache, reuse)

    def extend(
        self,
        prefix: TaskPrefix,
        demonstrations: Iterable[Example],
        queries: Iterable[Row] | None = None,
        *,
        labels: Iterable[str] | None = None,
        between_chunks: BetweenChunks | None = None,
    ) -> TaskPrefix:
        """Return a longer prefix; ``prefix`` is not changed, and nothing of it is encoded again.

        Args:
            prefix: Prefix of this engine.
            demonstrations: Examples to add after the existing ones.
            queries: Queries that will follow, as for `prefill`; a loaded prefix has no rows but its demonstrations.
            labels: The complete new label set, if it grows; None for the task's. If the instruction lists the labels,
                it changes with them; the prefix is then encoded anew from there, and its ``rebuilt`` is true.
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
        added = tuple(demonstrations)
        require_demonstrations(added, task)
        together, num_dropped, token_ids = self._fitting(task, (*prefix.demonstrations, *added), queries, None)
        if num_dropped:
            number = len(together) + num_dropped
            what = f"{number} demonstrations of task {task.name!r} do not fit before the longest query"
            expected = f"at most {len(together)}, in a context of {self.max_context_tokens:,} tokens"
            raise UserError("too_many_demonstrations", what, expected=expected)
        cache = self.backend.prefill(token_ids, prefix.cache, between_chunks=between_chunks)
        longer = self._prefix(task, together, prefix.num_dropped, cache, prefix)
        in_prefix = {(example.query, example.answer) for example in together}
        rows = tuple(row for row in prefix.rows if (row.query, row.answer) not in in_prefix)
        return replace(longer, rebuilt=longer.num_reused_tokens < prefix.num_tokens, rows=rows)

    def compile(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        queries: Iterable[Row] | None = None,
        *,
        num_retrieved: int = 0,
        reuse: TaskPrefix | None = None,
        between_chunks: BetweenChunks | None = None,
    ) -> TaskPrefix:
        """Encode demonstrations once, and record from the same pass how well each is predicted given those before it.

        ``num_retrieved`` reserves tokens for so many examples retrieved for each query, and keeps the other training
        rows of the task in ``rows``, to retrieve from; 0 keeps none. ``reuse`` is a compiled task whose first
        demonstrations may be the same: these are taken over with their records and not encoded again. Other arguments
        and errors are those of `prefill`; `save` and `load` keep the result on disk.

        In the channel form nothing is recorded: the pass predicts each demonstration's query after its own label, which
        does not say how it would be after the others.
        """
        if not isinstance(self.backend, ObservingBackend):
            raise backend_cannot_compile(self.identity)
        if reuse is not None:
            self._require_own(reuse)
        fitted = self.fit_prefix(task, demonstrations, queries, num_retrieved=num_retrieved)
        return self.compile_fitted(fitted, reuse=reuse, between_chunks=between_chunks)

    def fit_prefix(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        queries: Iterable[Row] | None = None,
        *,
        num_retrieved: int = 0,
        between_chunks: BetweenChunks | None = None,
    ) -> FittedPrefix:
        """Choose the demonstrations that `compile` would, and encode them, without running the network.

        A prefix that is stored somewhere can be found by the tokens. Arguments and errors are those of `compile`;
        `compile_fitted` does the rest. ``between_chunks`` is called with two zeros, after every few thousand
        characters: thousands of rows take a second or more.
        """
        retrieve: Retrieve | None = Retriever(task.train, num_retrieved) if num_retrieved else None
        with ExitStack() as pauses:
            if between_chunks is not None:
                pauses.enter_context(self.encoder.pausing(partial(between_chunks, 0, 0)))
                retrieve = retrieve and _in_chunks(retrieve, between_chunks)
            fitting, num_dropped, token_ids = self._fitting(task, demonstrations, queries, retrieve)
        rows = Retriever(task.train, num_retrieved, exclude=fitting).candidates if num_retrieved else ()
        return FittedPrefix(task, fitting, num_dropped, token_ids, rows)

    def compile_fitted(
        self, fitted: FittedPrefix, *, reuse: TaskPrefix | None = None, between_chunks: BetweenChunks | None = None
    ) -> TaskPrefix:
        """Compile demonstrations that `fit_prefix` chose.

        Args:
            fitted: From `fit_prefix` of this engine.
            reuse: As for `compile`. Its keys and values may be those of a part of its demonstrations: no more than what
                they hold is taken over.
            between_chunks: As for `prefill`.

        Raises:
            UserError: If the backend keeps no keys and values, or ``reuse`` is of another engine.
        """
        if not isinstance(self.backend, ObservingBackend):
            raise backend_cannot_compile(self.identity)
        if reuse is not None:
            self._require_own(reuse)
        task, fitting, token_ids = fitted.task, fitted.demonstrations, fitted.token_ids
        targets = [] if self.is_channel else answer_targets(task, fitting, self.encoder)
        kept: tuple[ObservedAnswer, ...] = ()
        num_reused = 0
        if reuse is not None:
            num_reused = num_shared_tokens(token_ids, reuse.token_ids)
            kept = _kept_answers(reuse, task, fitting, [tokens[-1].position < num_reused for tokens in targets])
        observed = targets[len(kept) :]
        if observed:
            num_reused = min(num_reused, observed[0][0].position - 1)
        cache, scores = self.backend.observe(
            token_ids, list(chain(*observed)), reuse.cache if reuse else None, between_chunks=between_chunks
        )
        answers = (*kept, *observed_answers(observed, scores, len(kept)))
        prefix = self._prefix(task, fitting, fitted.num_dropped, cache)
        return replace(prefix, num_reused_tokens=num_reused, answers=answers, rows=fitted.rows)

    def with_blend(self, prefix: TaskPrefix, *, between_chunks: BetweenChunks | None = None) -> TaskPrefix:
        """Return the prefix with the weights of its blend, which `predict` with ``blend=True`` uses, fitted once.

        They are fitted on what the model and a linear classifier on the same demonstrations say of up to 64 of these
        before they have seen the answer; that costs as many queries. A prefix without demonstrations has no blend.

        Args:
            prefix: Prefix of this engine.
            between_chunks: Called after every few of these queries, with the number of those done and in all, so that
                other work can go first. If it raises, the fit ends.

        Raises:
            UserError: If the task has no closed label set, or too many labels.
        """
        self._require_own(prefix)
        require_blendable(prefix.task)
        if prefix.blend is not None or not prefix.demonstrations:
            return prefix
        from manyicl.engine.blend import fit_weights, fitted_positions, held_out_words, model_log_probabilities

        labels, positions = prefix.task.labels or (), fitted_positions(prefix.demonstrations)
        scores: list[dict[str, float]] = []
        for some in in_batches(positions, QUERIES_PER_CHUNK):
            scores += self.scores_before_shown(prefix, some)
            if between_chunks is not None:
                between_chunks(len(scores), len(positions))
        model = model_log_probabilities(scores, labels)
        words = held_out_words(prefix.demonstrations, labels, positions)
        answers = [labels.index(prefix.demonstrations[position].answer) for position in positions]
        return replace(prefix, blend=fit_weights(model, words, answers))

    def scores_before_shown(self, prefix: TaskPrefix, positions: Iterable[int]) -> list[dict[str, float]]:
        """Score all labels for some demonstrations, each given those before it, from the keys and values of the prefix.

        The query of a demonstration is in the prefix, too: only its last token goes through the model again.

        Args:
            prefix: Prefix of a task with labels.
            positions: Which of its demonstrations, from 0.

        Returns:
            Label -> log-probability in nats, of each; in the channel form, of its query after the label.
        """
        self._require_own(prefix)
        task, labels = prefix.task, prefix.task.labels or ()
        if self.is_channel:
            return scores_before_shown(self.backend, prefix.cache, self.encoder, task, prefix.demonstrations, positions)
        spans = self.encoder.encode_episode(Episode(task.name, task.instruction(), prefix.demonstrations)).answer_spans
        label_ids = [self.encoder.answer_ids(label) for label in labels]
        found = []
        for shot in positions:
            answer_start, _ = spans[shot]
            before = self.backend.prefill(prefix.token_ids[: answer_start - 1], prefix.cache)
            (scores,) = self.backend.score(
                before, [prefix.token_ids[answer_start - 1 : answer_start]], [label_ids], "all"
            )
            found.append({label: scores.log_probabilities[number] for number, label in enumerate(labels)})
        return found

    def save(self, prefix: TaskPrefix, path: str | Path) -> None:
        """Write a compiled task to one file, which holds its demonstrations in recoverable form.

        Raises:
            UserError: If the file cannot be written, or another engine compiled the task.
        """
        from manyicl.engine.compiled import save_compiled

        self._require_own(prefix)
        save_compiled(prefix, required_path(path, "file"), self.encoder.format)

    def load(self, path: str | Path) -> TaskPrefix:
        """Load a task that this model compiled, in a fraction of the time that compiling takes.

        Raises:
            UserError: If the file is incomplete, or belongs to another model, adapter, precision, format or version.
        """
        from manyicl.engine.compiled import load_compiled

        prefix = load_compiled(required_path(path, "file"), self.backend, self.encoder)
        if prefix.num_tokens > self.max_context_tokens:
            what = f"the prefix has {prefix.num_tokens:,} tokens"
            expected = f"at most max_context_tokens, {self.max_context_tokens:,}"
            remedy = "Raise it, or compile the task with fewer demonstrations."
            raise UserError("prefix_too_long", what, expected=expected, remedy=remedy, file=path)
        return prefix

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
            raise UserError("not_a_prefix", "no prefix from prefill, extend or load", found=type(prefix).__name__)
        require_own(prefix.cache.identity, self.identity)
        if prefix.text_hash != self.encoder.text_hash:
            raise foreign_prefix("another tokenizer or text format", prefix.cache.identity, self.identity)

    def _fitting(
        self, task: Task, demonstrations: Iterable[Example], queries: Iterable[Row] | None, retrieve: Retrieve | None
    ) -> tuple[tuple[Example, ...], int, tuple[int, ...]]:
        """Choose the demonstrations that fit the context with the longest query, and encode them; see `prefill`."""
        demonstrations = tuple(demonstrations)
        require_demonstrations(demonstrations, task)
        self.encoder.require_encodable(task)
        # A shot curve prefills the same task for every draw.
        if self._compares_rows and (task.name, task.data_hash) not in self._compared:
            chat = FormatSettings(kind="chat")
            require_rows_as_written(chat, self.encoder.tokenizer, self.encoder.format, [task])
            if len(self._compared) >= MOST_COMPARED:
                self._compared.clear()
            self._compared.add((task.name, task.data_hash))
        reserve = self.num_reserved_tokens(task, queries, retrieve)
        fitting, num_dropped = fit_demonstrations(task, demonstrations, self.encoder, self.max_context_tokens, reserve)
        return fitting, num_dropped, self.encoder.encode_prefix(task.instruction(), fitting)

    def num_reserved_tokens(
        self, task: Task, queries: Iterable[Row] | None = None, retrieve: Retrieve | None = None
    ) -> int:
        """Count the tokens reserved for the longest query, its retrieved examples and its answer; see `prefill`."""
        if queries is None:
            queries = [example.query for example in task.test or task.train]
        asked = [row if isinstance(row, Query | EncodedQuery) else task.query(row) for row in queries]
        each = [row.query if isinstance(row, EncodedQuery) else row for row in asked]
        of_retrieved = [sum(map(self.encoder.num_shot_tokens, retrieve(query))) for query in each] if retrieve else []
        query = max(map(self._num_query_tokens, asked), default=0)
        return (
            max(of_retrieved, default=0)
            + query
            + longest_answer(task, self.encoder, self.max_answer_tokens(task), each)
        )

    def _num_query_tokens(self, row: Query | EncodedQuery) -> int:
        """Count the tokens of a query; of one not yet encoded, of the longest way to encode it."""
        if isinstance(row, EncodedQuery):
            return row.num_tokens
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
        for _, query in self._encoded(task, enumerate(rows, start=1), after_shots, {}):
            assert isinstance(query, EncodedQuery), "bad rows are refused"
            yield query

    def _encoded(
        self, task: Task, numbered: Iterable[tuple[int, StreamedRow]], after_shots: bool, options: AnswerOptions
    ) -> Iterator[Numbered]:
        """Render and encode queries as `encode_queries` does; bad rows are refused or passed on, as the options say."""
        preceding = self.encoder.preceding("" if after_shots else task.instruction(), int(after_shots))
        label_ids = tuple(self.encoder.answer_ids(label, preceding) for label in task.labels or ())
        for number, row in numbered:
            if isinstance(row, EncodedQuery) and row.preceding is preceding:
                yield number, row
                continue
            try:
                if isinstance(row, UserError):
                    raise row
                query = row.query if isinstance(row, EncodedQuery) else checked_query(row, task)
                option_ids = label_ids or self._option_ids(query.choices, preceding)
                token_ids = self.encoder.query_ids_uncached(query.text, preceding)
            except UserError as error:
                yield number, _refused_or_reported(error, number, options)
                continue
            yield number, EncodedQuery(query, preceding, token_ids, option_ids)

    def _option_ids(self, options: Iterable[str] | None, preceding: Preceding) -> tuple[tuple[int, ...], ...]:
        """Encode labels or choices of a query that comes after this."""
        return tuple(self.encoder.answer_ids(option, preceding) for option in options or ())

    def predict(
        self,
        prefix: TaskPrefix,
        rows: Iterable[StreamedRow],
        *,
        retrieve: Retrieve | None = None,
        numbers: Iterable[int] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[Prediction]:
        """Answer queries in order, in bounded memory; closing the iterator ends the work.

        Args:
            prefix: From `prefill` or `extend`.
            rows: Mappings with the task's columns, plain strings if the task has one column, or queries; an error in
                place of a row that cannot be answered.
            retrieve: Retrieves examples for each query, which come between the prefix and the query.
            numbers: Number of each row, which fixes what is drawn for it and is in its error; None for 1, 2, 3, …
                As many as rows. So rows of several streams can be answered together as they would be alone.
            **options: ``scores="best"`` finds the best label alone, ``"best_two"`` the second best too, and with it the
                margin, for a few more tokens of labels; ``"all"`` scores every label, at the cost of processing them
                all; ``abstain_below`` marks answers whose probability among the labels is below it,
                and needs all scores; ``sampling`` says how to sample free answers in place of greedy decoding.
                ``blend=True`` combines the scores of all labels with those of a linear classifier on the same
                demonstrations, see `with_blend`; not after a prefix without demonstrations.
                ``bad_rows="report"`` gives a row that cannot be answered a prediction with a ``problem``, and all
                others what they get without it; ``"refuse"`` raises. ``num_answered`` first rows have their answers
                from an earlier call that was interrupted: they are prepared as they were then, so that the others get
                the same answers to the last bit, and not answered. ``num_similar`` finds so many demonstrations most
                like each query, to explain its answer, which they do not change.

        Raises:
            UserError: If a row lacks a column, or a query does not fit after the prefix, with the number of the row;
                or if the options contradict each other or the task, or another engine made the prefix.
        """
        self._require_own(prefix)
        require_options(prefix.task, rows, options, retrieves=retrieve is not None)
        return self._predict(prefix, self._numbered(prefix, rows, retrieve, numbers, options), retrieve, options)

    def stream(
        self,
        prefix: TaskPrefix,
        rows: Iterable[StreamedRow],
        *,
        retrieve: Retrieve | None = None,
        numbers: Iterable[int] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[AnswerPart]:
        """Write free answers, and yield their text as it is written; closing the iterator ends the work.

        The parts of one row come in order, those of different rows in any. They make up the answer that `predict`
        gives: text that may be the beginning of the end-of-answer text, and half a character, wait for the next token.
        A row that cannot be answered, where bad rows are reported, has one part with its prediction. Arguments and
        errors are those of `predict`.

        Raises:
            UserError: If the task has no free answers.
        """
        self._require_own(prefix)
        require_options(prefix.task, rows, options, retrieves=retrieve is not None)
        if prefix.task.is_closed:
            what = f"answers of task {prefix.task.name!r} are chosen as a whole, and not written token by token"
            raise UserError("closed_answers", what, expected="a task with free answers", remedy="Use predict.")
        return self._stream(prefix, self._numbered(prefix, rows, retrieve, numbers, options), retrieve, options)

    def _numbered(
        self,
        prefix: TaskPrefix,
        rows: Iterable[StreamedRow],
        retrieve: Retrieve | None,
        numbers: Iterable[int] | None,
        options: AnswerOptions,
    ) -> Iterator[Numbered]:
        """Number rows, render and encode them."""
        after_shots = bool(prefix.num_shots or retrieve)
        numbered = enumerate(rows, start=1) if numbers is None else _paired(numbers, rows)
        return self._encoded(prefix.task, numbered, after_shots, options)

    def answer(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        rows: Iterable[StreamedRow],
        *,
        num_retrieved: int = 0,
        on_prefix: Callable[[TaskPrefix], None] | None = None,
        **options: Unpack[AnswerOptions],
    ) -> Iterator[Prediction]:
        """Choose demonstrations that fit with the queries and answer these, in one pass; streams may be endless.

        As many demonstrations are used as fit with the longest of the first ``FITTED_QUERIES`` queries. If a later one
        needs more tokens, fewer are used from there on; ``num_shots`` of a prediction says how many.

        Args:
            task: Task of demonstrations and queries.
            demonstrations: Examples, in the order in which they will be in the context.
            rows: As for `predict`.
            num_retrieved: Number of examples most like a query to put before it, found among the training rows that are
                no demonstrations; 0 for none.
            on_prefix: Called with every prefix before its answers.
            **options: As for `predict`.

        Raises:
            UserError: As for `prefill` and `predict`.
        """
        require_options(task, rows, options, retrieves=num_retrieved > 0)
        return self._answer(task, tuple(demonstrations), rows, num_retrieved, on_prefix, options)

    def prior(self, prefix: TaskPrefix, neutral_queries: Sequence[str] = NEUTRAL_QUERIES) -> LabelScores:
        """Score the labels after content-free queries, for `LabelScores.corrected`.

        Every column of the query template holds a neutral text.

        Raises:
            UserError: If the task has no labels of its own, or in the channel form, where labels have no prior.

        Source: Zhao et al. 2021, arXiv:2102.09690.
        """
        if self.is_channel:
            raise refused_in_channel_form("A prior is that of labels after content-free queries", "Leave it out.")
        if not prefix.task.labels:
            raise UserError("no_labels", f"Task {prefix.task.name!r} has no closed label set, and so no prior")
        neutral = [prefix.task.query(dict.fromkeys(prefix.task.columns, text)) for text in neutral_queries]
        return mean_scores([one.scores for one in self.predict(prefix, neutral, scores="all") if one.scores])

    def _answer(
        self,
        task: Task,
        demonstrations: tuple[Example, ...],
        rows: Iterable[StreamedRow],
        num_retrieved: int,
        on_prefix: Callable[[TaskPrefix], None] | None,
        options: AnswerOptions,
    ) -> Iterator[Prediction]:
        prefix, retrieve = None, Retriever(task.train, num_retrieved) if num_retrieved else None
        numbered = self._encoded(task, enumerate(rows, start=1), bool(demonstrations), options)
        if options.get("bad_rows") == "report":
            # Before batches are made, so that these do not depend on them.
            numbered = (self._fitting_alone(task, number, query) for number, query in numbered)
        most = self.max_context_tokens - self.encoder.num_preamble_tokens(task.instruction())
        for batch in in_batches(numbered, FITTED_QUERIES, is_query):
            earlier, queries = prefix, _queries_of(batch)
            while queries:
                # A query that does not fit even alone is refused by its number; it takes no demonstration from others.
                possible = [query for query in queries if self.num_reserved_tokens(task, [query], retrieve) <= most]
                if prefix and not (prefix.num_shots and self._exceeds_context(prefix, possible, retrieve)):
                    break
                # Which rows are left to retrieve is known once demonstrations are chosen, and how many of these fit
                # depends on the retrieved rows: so it is tried until both fit.
                chosen = demonstrations if prefix is None else prefix.demonstrations
                prefix = self.prefill(task, chosen, possible, retrieve=retrieve, reuse=prefix)
                if num_retrieved:
                    retrieve = Retriever(task.train, num_retrieved, exclude=prefix.demonstrations)
            if prefix is None:
                yield from _merged(batch, iter(()), options)
                continue
            if prefix is not earlier:
                prefix = replace(prefix, num_dropped=len(demonstrations) - prefix.num_shots)
                if on_prefix is not None:
                    on_prefix(prefix)
                if options.get("blend"):
                    prefix = self.with_blend(prefix)
            after_shots = bool(prefix.num_shots or retrieve)
            yield from self._predict(prefix, self._encoded(task, batch, after_shots, options), retrieve, options)

    def _fitting_alone(self, task: Task, number: int, query: EncodedQuery | UserError) -> Numbered:
        """Return a query that fits the context without any demonstration, or why it cannot be answered."""
        room = self.max_context_tokens - self.encoder.num_preamble_tokens(task.instruction())
        if isinstance(query, UserError) or self.num_reserved_tokens(task, [query]) <= room:
            return number, query
        after_instruction = self.encoder.preceding(task.instruction(), 0)
        num_query_tokens = len(self.encoder.query_ids_uncached(query.query.text, after_instruction))
        needed = self.max_context_tokens - room + num_query_tokens + self._num_answer_tokens(task, query)
        return number, self._too_long(needed, 0, 0) if needed > self.max_context_tokens else query

    def _exceeds_context(self, prefix: TaskPrefix, queries: Sequence[EncodedQuery], retrieve: Retrieve | None) -> bool:
        return prefix.num_tokens + self.num_reserved_tokens(prefix.task, queries, retrieve) > self.max_context_tokens

    def _predict(
        self, prefix: TaskPrefix, numbered: Iterable[Numbered], retrieve: Retrieve | None, options: AnswerOptions
    ) -> Iterator[Prediction]:
        """Answer the queries of a stream, in order."""
        fitting = (self._fitting_query(prefix, number, query, retrieve, options) for number, query in numbered)
        blend = self.with_blend(prefix).blend_with_words if options.get("blend") else None
        answer = self._choose if prefix.task.is_closed else self._generate
        explain = _explanation(prefix, retrieve, options)
        for batch in in_batches(fitting, READ_AHEAD_QUERIES, is_query):
            if batch[-1][0] <= options.get("num_answered", 0):
                continue
            with closing(answer(prefix, batch, options)) as answers:
                predictions = _blended(blend, _queries_of(batch), answers, options) if blend else answers
                yield from _merged(batch, predictions, options, explain)

    def _fitting_query(
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
                own_ids += self.encoder.shot_ids(example, self.encoder.preceding(instruction, shot))
            preceding = self.encoder.preceding(instruction, prefix.num_shots + len(own_examples))
            # What opens a sequence, such as bos, is part of a prefix, and of no query.
            if preceding is not query.preceding:
                ids = self.encoder.query_ids_uncached(query.query.text, preceding)
                option_ids = self._option_ids(query.query.choices or prefix.task.labels, preceding)
                query = EncodedQuery(query.query, preceding, ids, option_ids)
            query = replace(query, own_ids=tuple(own_ids))
        needed = prefix.num_tokens + query.num_tokens + self._num_answer_tokens(prefix.task, query)
        if needed > self.max_context_tokens:
            error = self._too_long(needed, prefix.num_shots, len(own_examples))
            return number, _refused_or_reported(error, number, options)
        return number, query

    def _num_answer_tokens(self, task: Task, query: EncodedQuery) -> int:
        """Count the tokens to keep free for the answer to a query."""
        return max(map(len, query.option_ids), default=self.max_answer_tokens(task))

    def _too_long(self, num_tokens: int, num_shots: int, num_retrieved: int) -> UserError:
        """Make the error for a query that does not fit the context."""
        own = f" and {num_retrieved} retrieved" if num_retrieved else ""
        what = (
            f"{num_tokens:,} tokens are needed with {num_shots}{own} demonstrations and its answer; "
            f"max_context_tokens is {self.max_context_tokens:,}"
        )
        return UserError("query_too_long", what, remedy="Use fewer demonstrations or a shorter query.")

    def _choose(self, prefix: TaskPrefix, batch: Sequence[Numbered], options: AnswerOptions) -> Generator[Prediction]:
        """Find the best option of each query; the first among equals."""
        queries = _queries_of(batch)
        scope, abstain_below = options.get("scores", "best"), options.get("abstain_below") or 0
        for query, scores in zip(queries, self._scores(prefix, queries, scope), strict=True):
            names = query.query.choices or prefix.task.labels or ()
            answer, log_probability = names[scores.best], scores.log_probabilities[scores.best]
            label_scores, second, margin, abstained = None, None, None, False
            if scope == "all" or self.is_channel:
                log_probabilities = {name: scores.log_probabilities[n] for n, name in enumerate(names)}
                # In the channel form the tokens that are scored are those of the query, after every label.
                scored = [query.token_ids] * len(names) if self.is_channel else query.option_ids
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
        if self.is_channel:
            return score_channel(self.backend, prefix.cache, queries)
        token_ids = [(*query.own_ids, *query.token_ids) for query in queries]
        return self.backend.score(prefix.cache, token_ids, [query.option_ids for query in queries], scope)

    def _generate(self, prefix: TaskPrefix, batch: Sequence[Numbered], options: AnswerOptions) -> Generator[Prediction]:
        """Write the answer of each query; those that end early wait for the ones before them."""
        written: list[list[GeneratedToken]] = [[] for _ in _queries_of(batch)]
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
        numbers, queries = [number for number, _ in filter(is_query, batch)], _queries_of(batch)
        limit, sampling = self.max_answer_tokens(prefix.task), options.get("sampling")
        ids = [(*query.own_ids, *query.token_ids) for query in queries]
        return self.backend.generate(prefix.cache, ids, self._end, limit, sampling, numbers)

    def _whole_answer(self, prefix: TaskPrefix, tokens: Sequence[GeneratedToken]) -> Prediction:
        text, log_probability = self._end.text_of(tokens)
        return Prediction(text, log_probability, stopped=tokens[-1].stopped, num_shots=prefix.num_shots)

    def _stream(
        self, prefix: TaskPrefix, numbered: Iterable[Numbered], retrieve: Retrieve | None, options: AnswerOptions
    ) -> Iterator[AnswerPart]:
        """Write the answers to the queries of a stream, many together."""
        fitting = (self._fitting_query(prefix, number, query, retrieve, options) for number, query in numbered)
        explain = _explanation(prefix, retrieve, options)
        num_before = 0
        for batch in in_batches(fitting, READ_AHEAD_QUERIES, is_query):
            rows = {row: query for row, (_, query) in enumerate(batch, start=num_before + 1)}
            num_before += len(batch)
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


def _in_chunks(retrieve: Retrieve, between_chunks: BetweenChunks) -> Retrieve:
    """Let other work go first after every few queries for which examples are retrieved."""
    calls = count(1)

    def retrieve_and_yield(query: Query) -> Sequence[Example]:
        if not next(calls) % ROWS_PER_CHUNK:
            between_chunks(0, 0)
        return retrieve(query)

    return retrieve_and_yield


def _kept_answers(
    reuse: TaskPrefix, task: Task, demonstrations: Sequence[Example], are_shared: Sequence[bool]
) -> tuple[ObservedAnswer, ...]:
    """Take over the records of first demonstrations that are the same, and whose tokens are shared."""
    if reuse.task.labels != task.labels:
        return ()
    kept: list[ObservedAnswer] = []
    for answer, then, now, is_shared in zip(
        reuse.answers, reuse.demonstrations, demonstrations, are_shared, strict=False
    ):
        if (then.query, then.answer) != (now.query, now.answer) or not is_shared:
            break
        kept.append(answer)
    return tuple(kept)


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


def _paired(numbers: Iterable[int], rows: Iterable[StreamedRow]) -> Iterator[tuple[int, StreamedRow]]:
    """Yield each row with its number.

    Raises:
        UserError: If there are more of one than of the other, once the fewer are used up.
    """
    missing = object()
    for num_pairs, (number, row) in enumerate(zip_longest(numbers, rows, fillvalue=missing)):
        if missing in (number, row):
            found = f"more {'rows' if number is missing else 'numbers'} than {num_pairs}"
            raise UserError("other_count_of_numbers", "numbers and rows differ in count", found=found)
        yield cast(int, number), cast(StreamedRow, row)


def _queries_of(batch: Iterable[Numbered]) -> list[EncodedQuery]:
    return [query for _, query in batch if isinstance(query, EncodedQuery)]


def _explanation(prefix: TaskPrefix, retrieve: Retrieve | None, options: AnswerOptions) -> Explain | None:
    """Return what finds the demonstrations most like a query; None where none are wanted."""
    if not (num_similar := options.get("num_similar", 0)):
        return None
    similar = MostSimilar(prefix.demonstrations, num_similar)
    return lambda query: similar(query, retrieve(query) if retrieve else ())


def _refused_or_reported(error: UserError, number: int, options: AnswerOptions) -> UserError:
    """Return why a row cannot be answered, where bad rows are reported.

    Raises:
        UserError: The error, with the number of the row, where they are refused.
    """
    if options.get("bad_rows", "refuse") == "report":
        return error
    raise (error if error.file else error.at(row=number)) from None


def _merged(
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
