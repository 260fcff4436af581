"""Engine: demonstrations -> prefix -> answers to queries. Knows tasks, text and answers; a backend runs the network."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypedDict, Unpack

from pydantic import BaseModel
from transformers import PreTrainedTokenizerBase

from manyicl.engine.answering import Answering, explanation, merged
from manyicl.engine.answers import AnswerEnd
from manyicl.engine.backend import (
    Backend,
    BetweenChunks,
    ObservingBackend,
    Prefix,
    backend_cannot_compile,
    foreign_prefix,
    require_context,
    require_own,
)
from manyicl.engine.channel import refused_in_channel_form, scores_before_shown
from manyicl.engine.label_scores import LabelScores, mean_scores
from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.observed import ObservedAnswer, answer_targets, observed_answers
from manyicl.engine.prediction import AnswerPart, Prediction
from manyicl.engine.queries import (
    AnswerOptions,
    EncodedQuery,
    Numbered,
    Retrieve,
    Row,
    StreamedRow,
    in_batches,
    is_query,
    numbered_rows,
    queries_of,
    require_blendable,
    require_options,
)
from manyicl.engine.query_encoder import QueryEncoder
from manyicl.engine.task_prefix import FittedPrefix, TaskPrefix, require_demonstrations
from manyicl.episodes.budget import fit_demonstrations
from manyicl.episodes.chat_template import require_rows_as_written
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.text_format import AnyFormat, FormatKind, FormatSettings
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest, format_to_ask_in
from manyicl.paths import required_path
from manyicl.tasks.retrieval import Retriever
from manyicl.tasks.task import Example, Query, Task

if TYPE_CHECKING:
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


class EngineOptions(TypedDict, total=False):
    """Arguments that every way to make an `Engine` passes to its `__init__`, where they are explained."""

    text_format: AnyFormat | FormatKind | None
    end_of_answer: str | None
    max_context_tokens: int | None


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
        self._query_encoder = QueryEncoder(self.encoder, limit)
        self._answering = Answering(self.backend, AnswerEnd(self.encoder, self.identity.end_token_ids))

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
        return self._query_encoder.num_reserved_tokens(task, queries, retrieve)

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
        for _, query in self._query_encoder.encoded(task, numbered_rows(rows, None), after_shots, {}):
            assert isinstance(query, EncodedQuery), "bad rows are refused"
            yield query

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
        return self._query_encoder.encoded(prefix.task, numbered_rows(rows, numbers), after_shots, options)

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
        encoder = self._query_encoder
        numbered = encoder.encoded(task, numbered_rows(rows, None), bool(demonstrations), options)
        if options.get("bad_rows") == "report":
            # Before batches are made, so that these do not depend on them.
            numbered = (encoder.alone(task, number, query) for number, query in numbered)
        most = self.max_context_tokens - self.encoder.num_preamble_tokens(task.instruction())
        for batch in in_batches(numbered, FITTED_QUERIES, is_query):
            earlier, queries = prefix, queries_of(batch)
            while queries:
                # A query that does not fit even alone is refused by its number; it takes no demonstration from others.
                possible = [query for query in queries if encoder.num_reserved_tokens(task, [query], retrieve) <= most]
                if prefix and not (prefix.num_shots and encoder.exceed_context(prefix, possible, retrieve)):
                    break
                # Which rows are left to retrieve is known once demonstrations are chosen, and how many of these fit
                # depends on the retrieved rows: so it is tried until both fit.
                chosen = demonstrations if prefix is None else prefix.demonstrations
                prefix = self.prefill(task, chosen, possible, retrieve=retrieve, reuse=prefix)
                if num_retrieved:
                    retrieve = Retriever(task.train, num_retrieved, exclude=prefix.demonstrations)
            if prefix is None:
                yield from merged(batch, iter(()), options)
                continue
            if prefix is not earlier:
                prefix = replace(prefix, num_dropped=len(demonstrations) - prefix.num_shots)
                if on_prefix is not None:
                    on_prefix(prefix)
                if options.get("blend"):
                    prefix = self.with_blend(prefix)
            after_shots = bool(prefix.num_shots or retrieve)
            yield from self._predict(prefix, encoder.encoded(task, batch, after_shots, options), retrieve, options)

    def _predict(
        self, prefix: TaskPrefix, numbered: Iterable[Numbered], retrieve: Retrieve | None, options: AnswerOptions
    ) -> Iterator[Prediction]:
        """Answer the queries of a stream, in order."""
        blend = self.with_blend(prefix).blend_with_words if options.get("blend") else None
        explain = explanation(prefix, retrieve, options)
        for batch in self._batches(prefix, numbered, retrieve, options):
            if batch[-1][0] > options.get("num_answered", 0):
                yield from self._answering.predictions(prefix, batch, options, blend, explain)

    def _stream(
        self, prefix: TaskPrefix, numbered: Iterable[Numbered], retrieve: Retrieve | None, options: AnswerOptions
    ) -> Iterator[AnswerPart]:
        """Write the answers to the queries of a stream, many together."""
        explain = explanation(prefix, retrieve, options)
        num_before = 0
        for batch in self._batches(prefix, numbered, retrieve, options):
            yield from self._answering.parts(prefix, batch, num_before, options, explain)
            num_before += len(batch)

    def _batches(
        self, prefix: TaskPrefix, numbered: Iterable[Numbered], retrieve: Retrieve | None, options: AnswerOptions
    ) -> Iterator[list[Numbered]]:
        """Read ahead, and yield the queries that advance together."""
        after_prefix = self._query_encoder.after_prefix
        fitting = (after_prefix(prefix, number, query, retrieve, options) for number, query in numbered)
        return in_batches(fitting, READ_AHEAD_QUERIES, is_query)


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
