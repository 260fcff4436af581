"""Engine, the one door in: demonstrations -> prefix cache -> answers to queries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Self, TypeVar

from pydantic import BaseModel

from manyicl.engine.compiled import CompiledTask, identity_of, load_compiled, save_compiled
from manyicl.engine.decoding import Generation, Sampling, generate
from manyicl.engine.label_scores import LabelScores, mean_scores
from manyicl.engine.label_trie import NODES_READ_TOGETHER, num_shared_tokens, tries_of
from manyicl.engine.observed import OBSERVED_CHUNK_TOKENS, DemonstrationWatch
from manyicl.engine.packing import WorkingMemory, require_bounds
from manyicl.engine.prefix_cache import PrefixCache, encode_behind, shared_beginning
from manyicl.engine.scoring import LabelSearch, Wanted, score_labels
from manyicl.episodes.budget import fit_demonstrations, num_tokens_for_asking
from manyicl.episodes.chat_template import ChatTemplate
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.text_format import AnyFormat, ChatFormat, FormatKind
from manyicl.errors import QueryError, UserError, shown
from manyicl.model.continuation import Block
from manyicl.model.load import LoadedModel, load_model, max_positions
from manyicl.model.manifest import format_to_ask_in
from manyicl.tasks.task import Columns, Example, Query, Task

DEFAULT_MAX_ANSWER_TOKENS = 64
# Queries are read ahead so many at a time, so that those of like length can advance together.
READ_AHEAD_QUERIES = 256
# Content-free queries whose label scores are the labels' prior (Zhao et al. 2021, arXiv:2102.09690, section 5).
NEUTRAL_QUERIES = ("N/A", "[MASK]", "?")

Nearest = Callable[[Query], Sequence[Example]]
AnsweredT = TypeVar("AnsweredT")


@dataclass(frozen=True, slots=True)
class Prediction:
    """An answer to one query.

    Attributes:
        answer: The best label or choice, or the generated text without its terminator.
        log_probability: Of the answer, terminator included, in nats.
        scores: Of every label or choice, where all were asked for; None otherwise, and for free answers.
        stopped: False if a generated answer was cut at the limit.
        abstained: True if the answer's probability among the labels was below the threshold asked for.
    """

    answer: str
    log_probability: float
    scores: LabelScores | None = None
    stopped: bool = True
    abstained: bool = False


class Engine:
    """Answers queries of any task after examples of it, without training."""

    def __init__(
        self,
        loaded: LoadedModel,
        *,
        text_format: AnyFormat | FormatKind | None = None,
        end_of_answer: str | None = None,
        max_context_tokens: int | None = None,
        working_memory_mib: int | None = None,
    ) -> None:
        """Take a loaded model.

        Args:
            loaded: From `manyicl.model.load.load_model`.
            text_format: How examples become text; None for the format saved with the model, else plain. ``"chat"``
                takes the turns of an instruct model's chat template.
            end_of_answer: Text that ends an answer, or a control token of the tokenizer, for a model that was not
                fine-tuned here; None for the one it was taught, else a blank line.
            max_context_tokens: Longest prefix and query together; None for what the architecture allows.
            working_memory_mib: Bound on what queries in flight use beside model and prefix, in MiB; it decides how
                many advance together, never a result. None for half of what the prefix uses, and at least 64.

        Raises:
            UserError: If the model was taught another kind of format, or its chat template cannot be used; if it
                allows fewer positions than ``max_context_tokens``, or a bound is below 1.
        """
        self.loaded = loaded
        self.model = loaded.model
        self.manifest = loaded.manifest
        self.fingerprint = loaded.fingerprint
        self.reference = loaded.reference
        self.identity = identity_of(loaded)
        # Turns cut just now are compared with the rows of every task; those of a manifest are what was taught.
        self._template: ChatTemplate | None = None
        self._compared: set[tuple[str, str]] = set()
        if not isinstance(text_format, BaseModel):
            if text_format == "chat" and loaded.manifest is None:
                self._template = ChatTemplate(loaded.tokenizer)
            text_format = format_to_ask_in(loaded.tokenizer, loaded.manifest, text_format, end_of_answer)
        self.encoder = Encoder(loaded.tokenizer, text_format)
        self.trained_context_tokens = loaded.manifest.max_context_tokens if loaded.manifest else None
        require_bounds(loaded, max_context_tokens, working_memory_mib)
        limit = max_context_tokens or max_positions(loaded.model) or self.trained_context_tokens
        if limit is None:
            raise UserError(f"{loaded.reference!r} does not say how long its context is; give max_context_tokens.")
        self.max_context_tokens: int = limit
        self.working_memory_mib = working_memory_mib
        # Label sets of tasks; choices per row seldom come again.
        self._tries = lru_cache(maxsize=8)(tries_of)

    @classmethod
    def from_pretrained(
        cls,
        reference: str,
        *,
        dtype: str | None = None,
        device: str | None = None,
        text_format: FormatKind | None = None,
        end_of_answer: str | None = None,
        max_context_tokens: int | None = None,
        working_memory_mib: int | None = None,
    ) -> Self:
        """Load a model folder, ``hf:owner/name`` or ``builtin:nano``, with the format it was taught.

        Raises:
            UserError: If it cannot be loaded, or mixes the episodes of a packed row.
        """
        return cls(
            load_model(reference, dtype=dtype, device=device),
            text_format=text_format,
            end_of_answer=end_of_answer,
            max_context_tokens=max_context_tokens,
            working_memory_mib=working_memory_mib,
        )

    def prefill(
        self,
        task: Task,
        demonstrations: Iterable[Example] = (),
        queries: Iterable[Query] | None = None,
        *,
        nearest: Nearest | None = None,
        reuse: PrefixCache | None = None,
    ) -> PrefixCache:
        """Encode an instruction and demonstrations once.

        Demonstrations that do not fit the context together with the longest query are left out, balanced by
        label, and counted in ``num_left_out``.

        Args:
            task: What is asked.
            demonstrations: Shown in this order.
            queries: What will be asked, so that the longest fits; None for the task's test rows, or its training
                rows if it has none.
            nearest: Gives each query examples of its own, for which room is kept too.
            reuse: Another prefix of this engine; the tokens that both begin with are shared, not encoded again.

        Raises:
            UserError: If the tokenizer cannot tell the task's labels apart, a demonstration is of another task, or
                ``reuse`` is of another engine.
        """
        if reuse is not None:
            self._require_own(reuse)
        fitting, num_left_out = self._fitting(task, demonstrations, queries, nearest)
        token_ids = self.encoder.encode_prefix(task.instruction(), fitting)
        shared: tuple[Block, ...] = ()
        if reuse is not None:
            shared = shared_beginning(reuse.blocks, num_shared_tokens(token_ids, reuse.token_ids))
        blocks = encode_behind(self.model, shared, token_ids[shared[-1].end if shared else 0 :])
        return self._prefix(task, fitting, num_left_out, token_ids, blocks)

    def compile(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        queries: Iterable[Query] | None = None,
        *,
        nearest: Nearest | None = None,
    ) -> CompiledTask:
        """Encode demonstrations once, and tell from the same pass how the model did on each given those before it.

        Arguments and errors are those of `prefill`; `save` and `load` keep the result on disk.
        """
        fitting, num_left_out = self._fitting(task, demonstrations, queries, nearest)
        token_ids = self.encoder.encode_prefix(task.instruction(), fitting)
        watch = DemonstrationWatch(task, fitting, self.encoder)
        blocks = encode_behind(
            self.model,
            (),
            token_ids,
            chunk_tokens=OBSERVED_CHUNK_TOKENS,
            keep=watch.places,
            on_logits=watch.observe,
        )
        return CompiledTask(self._prefix(task, fitting, num_left_out, token_ids, blocks), watch.answers)

    def save(self, compiled: CompiledTask, path: str | Path) -> None:
        """Write a compiled task to one file, which holds its demonstrations in recoverable form.

        Raises:
            UserError: If the file cannot stand there, or another engine compiled the task.
        """
        self._require_own(compiled.prefix)
        save_compiled(compiled, Path(path))

    def load(self, path: str | Path) -> CompiledTask:
        """Read a task that this model compiled, in a fraction of the time it took.

        Raises:
            UserError: If the file is not whole, or belongs to another model, adapter, precision, format or version.
        """
        compiled = load_compiled(Path(path), self.loaded, self.encoder)
        if compiled.prefix.num_tokens > self.max_context_tokens:
            raise UserError(
                f"{str(path)!r} holds {compiled.prefix.num_tokens:,} tokens; max_context_tokens is "
                f"{self.max_context_tokens:,}. Raise it, or compile the task with fewer demonstrations."
            )
        return compiled

    def _prefix(
        self,
        task: Task,
        demonstrations: tuple[Example, ...],
        num_left_out: int,
        token_ids: tuple[int, ...],
        blocks: tuple[Block, ...],
    ) -> PrefixCache:
        return PrefixCache(self.identity, self.encoder.format, task, demonstrations, num_left_out, token_ids, blocks)

    def _require_own(self, prefix: PrefixCache) -> None:
        """Refuse a prefix that another engine made: its keys and values would give wrong answers without a word."""
        difference = self.identity.difference(prefix.identity)
        if difference is None and prefix.text_format != self.encoder.format:
            difference = "another text format"
        if difference is not None:
            raise UserError(
                "foreign_prefix",
                f"the prefix of task {prefix.task.name!r} was made with {difference}",
                expected=f"one of {self.reference!r}",
                found=f"one of {prefix.identity.reference!r}",
                remedy="Prefill the task with this engine.",
            )

    def _fitting(
        self,
        task: Task,
        demonstrations: Iterable[Example],
        queries: Iterable[Query] | None,
        nearest: Nearest | None,
    ) -> tuple[tuple[Example, ...], int]:
        """Choose the demonstrations that fit the context with the longest query; see `prefill`."""
        demonstrations = tuple(demonstrations)
        require_demonstrations(demonstrations, task)
        self.encoder.require_encodable(task)
        identity = task.name, task.data_hash
        if (
            self._template is not None
            and isinstance(self.encoder.format, ChatFormat)
            and identity not in self._compared
        ):
            self._template.require_same_rows(self.encoder.format, task)
            # A shot curve prefills the same task for every draw.
            self._compared.add(identity)
        reserve = self.num_reserved_tokens(task, queries, nearest)
        return fit_demonstrations(task, demonstrations, self.encoder, self.max_context_tokens, reserve)

    def extend(
        self,
        prefix: PrefixCache,
        demonstrations: Iterable[Example],
        queries: Iterable[Query] | None = None,
        *,
        nearest: Nearest | None = None,
    ) -> PrefixCache:
        """Return a longer prefix; what is there is not encoded again, and ``prefix`` stays as it is.

        Args:
            prefix: Of this engine.
            demonstrations: Shown behind those that are there.
            queries: What will be asked, as for `prefill`; a loaded prefix knows no other rows than its demonstrations.
            nearest: As for `prefill`.

        Raises:
            UserError: If the demonstrations do not all fit, one is of another task, or another engine made ``prefix``.
        """
        self._require_own(prefix)
        added = tuple(demonstrations)
        require_demonstrations(added, prefix.task)
        demonstrations = (*prefix.demonstrations, *added)
        token_ids = self.encoder.encode_prefix(prefix.task.instruction(), demonstrations)
        room = self.max_context_tokens - self.num_reserved_tokens(prefix.task, queries, nearest)
        if len(token_ids) > room:
            raise UserError(
                f"{len(demonstrations)} demonstrations of {prefix.task.name!r} need {len(token_ids):,} tokens; "
                f"{room:,} of max_context_tokens {self.max_context_tokens:,} are free before the longest query. "
                "Extend by fewer."
            )
        blocks = encode_behind(self.model, prefix.blocks, token_ids[prefix.num_tokens :])
        return self._prefix(prefix.task, demonstrations, prefix.num_left_out, token_ids, blocks)

    def num_reserved_tokens(
        self, task: Task, queries: Iterable[Query] | None = None, nearest: Nearest | None = None
    ) -> int:
        """Count the tokens kept free for the longest query, its own examples and its answer; see `prefill`."""
        queries = [example.query for example in task.test or task.train] if queries is None else list(queries)
        own_examples = (
            max((sum(map(self.encoder.num_shot_tokens, nearest(query))) for query in queries), default=0)
            if nearest
            else 0
        )
        return own_examples + num_tokens_for_asking(task, self.encoder, self.max_answer_tokens(task), queries)

    @property
    def dtype(self) -> str:
        """What the model computes in, such as ``bfloat16``."""
        return str(self.model.dtype).removeprefix("torch.")

    def max_answer_tokens(self, task: Task) -> int:
        """Return where a free answer of this task is cut: the task's own limit, or a default."""
        return task.max_answer_tokens or DEFAULT_MAX_ANSWER_TOKENS

    def predict(
        self,
        prefix: PrefixCache,
        rows: Iterable[Columns | str | Query],
        *,
        scores: Wanted = "best",
        abstain_below: float | None = None,
        sampling: Sampling | None = None,
        nearest: Nearest | None = None,
    ) -> Iterator[Prediction]:
        """Answer queries in order, in bounded memory.

        Args:
            prefix: From `prefill` or `extend`.
            rows: Mappings with the task's columns, plain strings where it has one column, or queries.
            scores: ``best`` finds the best label alone; ``all`` scores every label, at the cost of reading them all.
            abstain_below: Mark answers whose probability among the labels is below this; needs ``scores="all"``.
            sampling: Draw free answers; None for the likeliest tokens.
            nearest: Gives each query examples of its own, shown between the prefix and the query.

        Raises:
            UserError: If a row lacks a column, or a query does not fit behind the prefix, then the row is numbered;
                or if the options contradict each other or the task, or another engine made the prefix.
        """
        self._require_own(prefix)
        if isinstance(rows, str | Mapping | Query):
            raise UserError(f"predict answers a list of rows; found one {type(rows).__name__}. Put it in a list.")
        if scores not in ("best", "all"):
            raise UserError(f"scores is 'best' or 'all'; found {scores!r}.")
        if abstain_below is not None and (scores != "all" or not 0 <= abstain_below <= 1):
            raise UserError(
                f"abstain_below is a probability among all labels, from 0 to 1, and needs scores='all'; found "
                f"{abstain_below} with scores={scores!r}."
            )
        is_closed = _is_closed(prefix.task)
        if scores == "all" and not is_closed:
            raise UserError(f"Task {prefix.task.name!r} has free answers; scores='all' needs labels to score.")
        if sampling is not None and is_closed:
            raise UserError(f"Task {prefix.task.name!r} has a closed answer set, which is scored; sampling draws none.")
        return self._predict(prefix, rows, scores, abstain_below, sampling, nearest)

    def prior(self, prefix: PrefixCache, neutral_queries: Sequence[str] = NEUTRAL_QUERIES) -> LabelScores:
        """Score the labels behind queries that say nothing, for `LabelScores.corrected`.

        Every column of the query template holds the neutral text.

        Raises:
            UserError: If the task has no labels of its own.

        Source: Zhao et al. 2021, arXiv:2102.09690.
        """
        if not prefix.task.labels:
            raise UserError(f"Task {prefix.task.name!r} has no closed label set; there is no prior to take.")
        neutral = [prefix.task.query(dict.fromkeys(prefix.task.columns, text)) for text in neutral_queries]
        return mean_scores([one.scores for one in self.predict(prefix, neutral, scores="all") if one.scores])

    def working_memory(self, prefix: PrefixCache) -> WorkingMemory:
        """Return the bound on what queries in flight use, and what their tokens cost."""
        return WorkingMemory.behind(self.model, prefix.blocks, self.working_memory_mib)

    def _predict(
        self,
        prefix: PrefixCache,
        rows: Iterable[Columns | str | Query],
        wanted: Wanted,
        abstain_below: float | None,
        sampling: Sampling | None,
        nearest: Nearest | None,
    ) -> Iterator[Prediction]:
        labels = prefix.task.labels
        label_ids = tuple(self.encoder.answer_ids(label) for label in labels) if labels else None
        asked = (self._asked(prefix, row, number, nearest, label_ids) for number, row in enumerate(rows, start=1))
        while True:
            chunk, failure = _read_ahead(asked, READ_AHEAD_QUERIES)
            if chunk and _is_closed(prefix.task):
                yield from self._choose(prefix, chunk, wanted, abstain_below)
            elif chunk:
                yield from self._generate(prefix, chunk, sampling)
            if failure is not None:
                raise failure
            if not chunk:
                return

    def _asked(
        self,
        prefix: PrefixCache,
        row: Columns | str | Query,
        number: int,
        nearest: Nearest | None,
        label_ids: tuple[tuple[int, ...], ...] | None,
    ) -> _AskedQuery:
        """Render and encode one row, and make sure that it fits behind the prefix."""
        try:
            query = row if isinstance(row, Query) else prefix.task.query(row)
            require_askable(query, prefix.task)
            own_examples = tuple(nearest(query)) if nearest else ()
            token_ids = self._continuation_ids(prefix, own_examples, query)
            options = query.choices or prefix.task.labels
            option_ids = label_ids or tuple(self.encoder.answer_ids(option) for option in options or ())
        except UserError as error:
            raise QueryError("query_refused", str(error), row=number) from error
        answer_tokens = max(map(len, option_ids)) if option_ids else self.max_answer_tokens(prefix.task)
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
        return _AskedQuery(number, token_ids, options, option_ids)

    def _continuation_ids(self, prefix: PrefixCache, own_examples: Sequence[Example], query: Query) -> tuple[int, ...]:
        """Encode what follows the prefix: a query's own examples, then the query up to its answer."""
        token_ids: list[int] = []
        # Behind a shot the instruction does not matter, and it would be rendered for every query.
        instruction = "" if prefix.num_shots else prefix.task.instruction()
        for shot, example in enumerate(own_examples, start=prefix.num_shots):
            token_ids += self.encoder.shot_ids(example, self.encoder.preceding(instruction, shot))
        place = self.encoder.preceding(instruction, prefix.num_shots + len(own_examples))
        token_ids += self.encoder.query_ids_uncached(query.text, place)
        # What opens a sequence, such as bos, is part of a prefix, and of no query.
        return tuple(token_ids)

    def _choose(
        self, prefix: PrefixCache, asked: Sequence[_AskedQuery], wanted: Wanted, abstain_below: float | None
    ) -> Iterator[Prediction]:
        """Find the best option of each query; the first of equals wins."""
        memory = self.working_memory(prefix)
        most = memory.slots_per_query()
        if wanted == "all":
            most = min(most, NODES_READ_TOGETHER)
        if prefix.task.labels:
            tries = [self._tries(asked[0].option_ids, most)] * len(asked)
        else:
            tries = [tries_of(one.option_ids, most) for one in asked]

        def search(
            blocks: Sequence[Block], queries: Sequence[tuple[int, ...]], places: Sequence[int]
        ) -> list[LabelSearch]:
            return score_labels(self.model, blocks, queries, [tries[i] for i in places], memory, wanted)

        for one, found in zip(asked, self._behind(prefix, asked, memory, search), strict=True):
            assert one.options is not None, "a chunk of queries is closed or free as a whole"
            label_scores = None
            if wanted == "all":
                log_probabilities = {option: found.scores[number] for number, option in enumerate(one.options)}
                num_tokens = {option: len(ids) for option, ids in zip(one.options, one.option_ids, strict=True)}
                label_scores = LabelScores(log_probabilities, num_tokens)
            answer = one.options[found.best]
            abstained = (
                label_scores is not None
                and abstain_below is not None
                and label_scores.probabilities[answer] < abstain_below
            )
            yield Prediction(answer, found.scores[found.best], label_scores, abstained=abstained)

    def _generate(
        self, prefix: PrefixCache, asked: Sequence[_AskedQuery], sampling: Sampling | None
    ) -> Iterator[Prediction]:
        memory = self.working_memory(prefix)
        limit = self.max_answer_tokens(prefix.task)

        def write(
            blocks: Sequence[Block], queries: Sequence[tuple[int, ...]], places: Sequence[int]
        ) -> list[Generation]:
            numbers = [asked[i].number for i in places]
            return generate(self.model, self.encoder, blocks, queries, limit, memory, sampling, numbers)

        for generation in self._behind(prefix, asked, memory, write):
            yield Prediction(generation.answer or "", generation.log_probability, None, generation.stopped)

    def _behind(
        self,
        prefix: PrefixCache,
        asked: Sequence[_AskedQuery],
        memory: WorkingMemory,
        answer: Callable[[Sequence[Block], Sequence[tuple[int, ...]], Sequence[int]], list[AnsweredT]],
    ) -> list[AnsweredT]:
        """Answer queries behind the prefix: those that fit a pass together, each longer one behind a prefix of its own.

        A query that would exceed the working memory is read in chunks as demonstrations are, up to its last token.
        """
        most = memory.tokens_per_pass()
        answered: dict[int, AnsweredT] = {}
        places = [i for i, one in enumerate(asked) if len(one.token_ids) <= most]
        if places:
            together = answer(prefix.blocks, [asked[i].token_ids for i in places], places)
            answered.update(zip(places, together, strict=True))
        for i, one in enumerate(asked):
            if len(one.token_ids) > most:
                blocks = encode_behind(self.model, prefix.blocks, one.token_ids[:-1], chunk_tokens=most)
                answered[i] = answer(blocks, [one.token_ids[-1:]], [i])[0]
        return [answered[i] for i in range(len(asked))]


@dataclass(frozen=True, slots=True)
class _AskedQuery:
    """A row, ready to be read.

    Attributes:
        number: Of the row in its stream, from 1.
        token_ids: What follows the prefix, up to where the answer begins.
        options: The closed answer set; None for free answers.
        option_ids: Tokens of each option, terminator included.
    """

    number: int
    token_ids: tuple[int, ...]
    options: tuple[str, ...] | None
    option_ids: tuple[tuple[int, ...], ...]


def _is_closed(task: Task) -> bool:
    """Tell whether the answers of a task are chosen from a set, its own or each row's."""
    return bool(task.labels or task.choices_column)


def require_askable(query: Query, task: Task) -> None:
    """Refuse a query without text, of characters that are none, or with options where the task has none.

    Raises:
        UserError: If so.
    """
    if not query.text.strip():
        raise UserError("it is empty; expected a text to answer.")
    try:
        "".join((query.text, *(query.choices or ()))).encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"it holds {error.object[error.start]!r}, half of a character; save the text as UTF-8."
        ) from error
    if bool(query.choices) != bool(task.choices_column):
        expected = "options of its own" if task.choices_column else "no options of its own"
        raise UserError(f"task {task.name!r} expects {expected}; found {query.choices!r}.")


def require_demonstrations(demonstrations: Sequence[Example], task: Task) -> None:
    """Refuse demonstrations that are not of the task, by their number.

    Raises:
        UserError: If one is no example, has an answer outside the labels or its own choices, or has choices where
            the task has none, or none where it has some.
    """
    for number, example in enumerate(demonstrations, start=1):
        if not isinstance(example, Example):
            raise UserError(
                "not_an_example",
                f"demonstration {number} of task {task.name!r} is no example",
                expected="an Example, such as those of task.train",
                found=type(example).__name__,
            )
        choices = example.query.choices
        options = choices if task.choices_column else task.labels
        if bool(choices) != bool(task.choices_column):
            expected = "choices of its own" if task.choices_column else "no choices of its own"
            found = shown(choices)
        elif options and example.answer not in options:
            expected, found = f"an answer among {shown(list(options))}", shown(example.answer)
        else:
            continue
        raise UserError(
            "foreign_demonstration",
            f"demonstration {number} is not of task {task.name!r}",
            expected=expected,
            found=found,
            remedy="Show examples of the task itself.",
        )


def _read_ahead(asked: Iterator[_AskedQuery], most: int) -> tuple[list[_AskedQuery], UserError | None]:
    """Take up to ``most`` queries; one that is wrong ends them, so that those before it are still answered."""
    chunk: list[_AskedQuery] = []
    try:
        chunk.extend(islice(asked, most))
    except UserError as failure:
        return chunk, failure
    return chunk, None
