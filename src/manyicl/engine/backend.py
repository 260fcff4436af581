"""What an engine needs from whatever runs the network: token ids in, numbers out. Knows no task, imports no torch.

A backend has an identity and three methods: `Backend.prefill` processes the tokens that queries share, `Backend.score`
scores closed answer sets after it, and `Backend.generate` writes free answers after it, token by token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Literal, NamedTuple, Protocol, cast, runtime_checkable

from manyicl.errors import UserError, quoted

# Temperatures below it leave the range of floating point.
LEAST_TEMPERATURE = 1e-4

TokenIds = tuple[int, ...]
# The best option, the best two, or all of them.
ScoreScope = Literal["best", "best_two", "all"]
# Called between two chunks of a long prefill with the tokens that are done and those in all. It may return how many
# seconds the next chunk should take, or None for the usual, and raise to end the prefill.
BetweenChunks = Callable[[int, int], float | None]


@dataclass(frozen=True, slots=True)
class Identity:
    """Which network computes, as far as its numbers depend on it.

    Attributes:
        fingerprint: Hash of all weights, those of an adapter included.
        config_hash: Hash of the configuration, which says how the weights are used.
        dtype: Precision of the computation, such as ``bfloat16``.
        base_fingerprint: Hash of the weights below an adapter; None for a model that is no adapter.
        reference: Name that the user gave the model; takes no part in comparisons, and neither do those below.
        max_context_tokens: Most positions that the network allows; None if it does not say.
        end_token_ids: Tokens that end a text according to the model's own settings.
    """

    fingerprint: str
    config_hash: str
    dtype: str
    base_fingerprint: str | None = None
    reference: str = field(default="", compare=False)
    max_context_tokens: int | None = field(default=None, compare=False)
    end_token_ids: frozenset[int] = field(default=frozenset(), compare=False)

    def difference(self, other: Identity) -> str | None:
        """Say in a few words how another network differs from this one; None where both are the same.

        Examples:
            >>> small = Identity("ab12", "c", "float32", reference="runs/small")
            >>> small.difference(Identity("ab12", "c", "bfloat16"))
            'another precision (bfloat16 against float32)'
            >>> small.difference(Identity("ab12", "c", "float32", reference="/tmp/copy of small"))
        """
        if self.dtype != other.dtype:
            return f"another precision ({other.dtype} against {self.dtype})"
        if self.fingerprint != other.fingerprint:
            if self.base_fingerprint and self.base_fingerprint == other.base_fingerprint:
                return "another adapter of the same base"
            return "another model"
        return None if self == other else "another configuration of the same weights"


class Prefix(Protocol):
    """What a backend keeps of tokens that queries share, such as their keys and values. Immutable."""

    @property
    def identity(self) -> Identity:
        """The network that made it."""

    @property
    def token_ids(self) -> TokenIds:
        """The shared tokens, (P,)."""


@dataclass(frozen=True, slots=True)
class OptionScores:
    """Scores of the options of one query.

    Attributes:
        log_probabilities: Option number -> log-probability of all its tokens, in nats; of every option where all
            were wanted, otherwise at least of the best, or of the best two.
        best: Number of the most probable option; the first among equals.
        greedy: Numbers of the options that greedy decoding would have written.
    """

    log_probabilities: Mapping[int, float]
    best: int
    greedy: frozenset[int] = frozenset()

    @property
    def second(self) -> int | None:
        """Number of the second best option, the first among equals; None where no other one has a score."""
        others = (n for n in self.log_probabilities if n != self.best)
        return min(others, key=lambda n: (-self.log_probabilities[n], n), default=None)


class GeneratedToken(NamedTuple):
    """The next token of one query's answer.

    Attributes:
        query: Position of the query among those given.
        token_id: The token.
        log_probability: Its log-probability under the model, in nats; temperature and top-p leave it as it is.
        stopped: Whether the answer has ended with this token.
        is_last: Whether no further token of this query follows: the answer has ended, or reached the limit.
    """

    query: int
    token_id: int
    log_probability: float
    stopped: bool
    is_last: bool


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the tokens of free answers are drawn, instead of taking the most probable ones.

    Attributes:
        temperature: Divisor of the logits before they become probabilities.
        top_p: Probability that the most probable tokens must reach together; others are never drawn.
        seed: Seed of the draws. With the number of a query it fixes that query's answer, whatever else is answered.

    Raises:
        UserError: If a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not LEAST_TEMPERATURE <= self.temperature < float("inf"):
            expected = f"at least {LEAST_TEMPERATURE}, or none for the most probable tokens"
            raise out_of_range("temperature", self.temperature, expected)
        if not 0 < self.top_p <= 1:
            raise out_of_range("top_p", self.top_p, "above 0 and at most 1")


class Stop(Protocol):
    """Decides where a generated answer ends."""

    @property
    def texts(self) -> tuple[str, ...]:
        """Texts of which each ends an answer; for backends that stop on text themselves."""

    @property
    def token_ids(self) -> frozenset[int]:
        """Tokens of which each ends an answer."""

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Tell whether an answer that has these tokens so far has ended; called after every token."""


class Backend(Protocol):
    """Runs a network for an `manyicl.engine.engine.Engine`: ours in this process, or another one anywhere.

    A backend of a few lines is enough for every kind of task:

    Examples:
        >>> class Uniform:
        ...     "Every token of a vocabulary of ten is as probable as any other."
        ...     identity = Identity("uniform", "", "float32", max_context_tokens=100)
        ...
        ...     def prefill(self, token_ids, reuse=None, *, between_chunks=None):
        ...         return SharedTokens(self.identity, tuple(token_ids))
        ...
        ...     def score(self, prefix, queries, options, scope):
        ...         scores = [{i: -2.303 * len(ids) for i, ids in enumerate(some)} for some in options]
        ...         return [OptionScores(own, max(own, key=own.get)) for own in scores]
        ...
        ...     def generate(self, prefix, queries, stop, max_tokens, sampling=None, numbers=None):
        ...         for query in range(len(queries)):
        ...             yield GeneratedToken(query, 7, -2.303, stopped=False, is_last=True)
        >>> backend: Backend = Uniform()
        >>> backend.score(backend.prefill([1, 2]), [(3,)], [[(4, 5), (6,)]], "best")[0].best
        1
    """

    @property
    def identity(self) -> Identity:
        """Which network this is."""

    def prefill(
        self, token_ids: Sequence[int], reuse: Prefix | None = None, *, between_chunks: BetweenChunks | None = None
    ) -> Prefix:
        """Process tokens that queries share.

        Args:
            token_ids: The whole prefix, (P,); may be empty.
            reuse: Another prefix; what both begin with is taken over. It stays as it is.
            between_chunks: Called between chunks of a long prefix, so that other work can go first; chunks are then
                sized by time, which it may return. If it raises, the prefill ends there and nothing of it stays.
        """

    def score(
        self, prefix: Prefix, queries: Sequence[TokenIds], options: Sequence[Sequence[TokenIds]], scope: ScoreScope
    ) -> list[OptionScores]:
        """Score the options of each query after the prefix and the query.

        Args:
            prefix: From `prefill` of this backend.
            queries: Tokens of each query up to where its answer begins, at least one; any number of queries.
            options: Options of each query, each at least one token; the same object where queries share them.
            scope: ``best`` needs the best option only, ``best_two`` the two best, ``all`` the scores of all.
        """

    def generate(
        self,
        prefix: Prefix,
        queries: Sequence[TokenIds],
        stop: Stop,
        max_tokens: int,
        sampling: Sampling | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[GeneratedToken]:
        """Write an answer to each query, and yield its tokens as they come; closing the iterator ends the work.

        The tokens of one query come in order, those of different queries in any.

        Args:
            prefix: From `prefill` of this backend.
            queries: As for `score`.
            stop: Decides after every token whether the answer has ended.
            max_tokens: Limit for answers that do not end before.
            sampling: How tokens are drawn; None for the most probable ones.
            numbers: Number of each query, which fixes its draws together with the seed; None for 0, 1, 2, …
        """


@dataclass(frozen=True, slots=True)
class Target:
    """A token of a prefix whose prediction is wanted.

    Attributes:
        position: Its position in the prefix; at least 1.
        allowed: Tokens it is compared with, itself among them; None for the whole vocabulary.
    """

    position: int
    allowed: TokenIds | None = None


@dataclass(frozen=True, slots=True)
class TargetScore:
    """How a token of a prefix was predicted from those before it.

    Attributes:
        log_probability: Log-probability of the token, in nats.
        is_best: Whether it was the most probable of those allowed.
    """

    log_probability: float
    is_best: bool


@runtime_checkable
class ObservingBackend(Backend, Protocol):
    """A backend that can tell from a prefill how it predicted some of the tokens; `Engine.compile` needs one."""

    def observe(
        self,
        token_ids: Sequence[int],
        targets: Sequence[Target],
        reuse: Prefix | None = None,
        *,
        between_chunks: BetweenChunks | None = None,
    ) -> tuple[Prefix, list[TargetScore]]:
        """Prefill, and score some of the tokens in the same pass.

        Args:
            token_ids: The whole prefix, (P,).
            targets: Tokens of it, by rising position.
            reuse: Another prefix; what both begin with before the first target is taken over. It stays as it is.
            between_chunks: As for `Backend.prefill`.
        """


@dataclass(frozen=True, slots=True)
class SharedTokens:
    """The tokens alone: the prefix of a backend that keeps nothing else of them, such as a server with its own cache.

    Attributes:
        identity: The network that it belongs to.
        token_ids: The shared tokens, (P,).
    """

    identity: Identity
    token_ids: TokenIds


def require_own(maker: Identity, identity: Identity) -> None:
    """Refuse a prefix that another network made: its keys and values would give wrong answers without a word.

    Raises:
        UserError: If so.
    """
    if difference := identity.difference(maker):
        raise foreign_prefix(difference, maker, identity)


def foreign_prefix(difference: str, found: Identity, expected: Identity) -> UserError:
    """Make the error for a prefix that belongs elsewhere; models are named where their weights differ."""
    error = UserError("foreign_prefix", f"the prefix was made with {difference}")
    error.remedy = "Use the model, precision and text format that it was made with, or make it again."
    if expected.fingerprint != found.fingerprint:
        error.expected = f"one of {expected.reference!r}, weights {expected.fingerprint[:12]}"
        error.found = f"one of {found.reference!r}, weights {found.fingerprint[:12]}"
    return error


def out_of_range(field: str, found: object, expected: str) -> UserError:
    """Make the error for an argument or option that is too small or too large, or no number."""
    number = f"{found:,}" if isinstance(found, int | float) else quoted(found)
    return UserError("out_of_range", f"{field} is out of range", expected=expected, found=number, field=field)


def require_count(field: str, number: int | None, expected: str = "at least 1", most: float = math.inf) -> None:
    """Refuse what is no whole number from 1 to ``most``; None asks for no bound.

    Raises:
        UserError: If so.
    """
    is_whole = isinstance(cast(object, number), Integral) and type(number) is not bool
    if number is not None and not (is_whole and 1 <= number <= most):
        raise out_of_range(field, number, expected)


def backend_cannot_compile(identity: Identity) -> UserError:
    """Make the error for a backend that keeps no keys and values which could go to a file."""
    what = f"the backend of {identity.reference!r} keeps no keys and values of its own"
    return UserError("backend_cannot_compile", what, remedy="Load the model in this process to compile tasks.")


def require_context(max_context_tokens: int | None, identity: Identity) -> None:
    """Refuse a longest context that is no number from 1 to what the network allows; None asks for no bound.

    Raises:
        UserError: If so.
    """
    allowed = identity.max_context_tokens
    expected = f"1 to {allowed:,}, the positions of {identity.reference!r}" if allowed else "at least 1"
    require_count("max_context_tokens", max_context_tokens, expected, allowed or math.inf)
