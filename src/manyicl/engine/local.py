"""LocalBackend: the packed engine of this package as a `manyicl.engine.backend.Backend`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Generator, Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.backend import (
    BetweenChunks,
    GeneratedToken,
    Identity,
    OptionScores,
    Prefix,
    Sampling,
    Stop,
    Target,
    TargetScore,
    TokenIds,
    Wanted,
    foreign_prefix,
    require_own,
)
from manyicl.engine.decoding import generate
from manyicl.engine.label_trie import NODES_READ_TOGETHER, num_shared_tokens, tries_of
from manyicl.engine.packing import ActivationBudget, log_denominators, log_probabilities
from manyicl.engine.prefix_cache import PREFILL_CHUNK_TOKENS, PrefixCache, extend_blocks, shared_beginning
from manyicl.engine.scoring import score_labels
from manyicl.errors import UserError
from manyicl.model.continuation import Block
from manyicl.model.load import LoadedModel, max_positions

# Longer options are processed straight through, each alone: which token of a trie sees which is a square.
MOST_TRIE_TOKENS = 256
# The logits of every target are looked at, so a prefill that is observed runs in smaller chunks.
OBSERVED_CHUNK_TOKENS = 512
# The first of the chunks that are sized by time.
FIRST_TIMED_CHUNK_TOKENS = 128
# Configuration keys that change no result here.
NOT_COMPUTED = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"}
    | {"pad_token_id", "max_position_embeddings"}
)


class LocalBackend:
    """Runs a loaded model in this process: prefixes as shared keys and values, queries packed after them."""

    def __init__(self, loaded: LoadedModel, *, activation_budget_mib: int | None = None) -> None:
        """Take a loaded model.

        Args:
            loaded: From `manyicl.model.load.load_model`.
            activation_budget_mib: Bound on what queries in flight use beside model and prefix, in MiB; it decides how
                many advance together, never a result. None for half of what the prefix uses, and at least 64.

        Raises:
            UserError: If the bound is below 1.
        """
        if activation_budget_mib is not None and activation_budget_mib < 1:
            raise UserError(
                "out_of_range",
                "activation_budget_mib is out of range",
                expected="at least 1",
                found=str(activation_budget_mib),
                field="activation_budget_mib",
            )
        self.model = loaded.model
        self.identity = identity_of(loaded)
        self.activation_budget_mib = activation_budget_mib
        self._tries = lru_cache(maxsize=16)(tries_of)

    def prefill(
        self, token_ids: Sequence[int], reuse: Prefix | None = None, *, between_chunks: BetweenChunks | None = None
    ) -> PrefixCache:
        """Run the tokens through the model once; those that ``reuse`` begins with as well are shared, not copied."""
        shared: tuple[Block, ...] = ()
        if reuse is not None:
            shared = shared_beginning(self._blocks(reuse), num_shared_tokens(token_ids, reuse.token_ids))
        added = token_ids[shared[-1].end if shared else 0 :]
        chunk_tokens = FIRST_TIMED_CHUNK_TOKENS if between_chunks else PREFILL_CHUNK_TOKENS
        blocks = extend_blocks(self.model, shared, added, chunk_tokens=chunk_tokens, between_chunks=between_chunks)
        return PrefixCache(self.identity, tuple(token_ids), blocks)

    def observe(self, token_ids: Sequence[int], targets: Sequence[Target]) -> tuple[PrefixCache, list[TargetScore]]:
        """Prefill, and score some of the tokens in the same pass."""
        allowed = {target.position - 1: target.allowed for target in targets}
        scores: list[TargetScore] = []

        def score(positions: Sequence[int], logits: Tensor) -> None:
            found = [token_ids[position + 1] for position in positions]
            scores.extend(target_scores(logits, found, [allowed[position] for position in positions]))

        blocks = extend_blocks(
            self.model, (), token_ids, chunk_tokens=OBSERVED_CHUNK_TOKENS, keep=list(allowed), on_logits=score
        )
        return PrefixCache(self.identity, tuple(token_ids), blocks), scores

    def score(
        self,
        prefix: Prefix,
        queries: Sequence[TokenIds],
        options: Sequence[Sequence[TokenIds]],
        wanted: Wanted = "all",
    ) -> list[OptionScores]:
        """Score the options of each query exactly; options that begin alike share their beginning."""
        budget = self.activation_budget(prefix)
        most = budget.slots_per_query()
        if wanted == "all":
            most = min(most, NODES_READ_TOGETHER)
        short_of = {id(own): [n for n, ids in enumerate(own) if len(ids) <= MOST_TRIE_TOKENS] for own in options}
        tries_by_options = {
            id(own): self._tries(tuple(own[n] for n in short_of[id(own)]), most) if short_of[id(own)] else []
            for own in options
        }
        found: dict[int, OptionScores] = {}
        for numbers, blocks, batch in self._batches(prefix, queries, budget):
            in_tries = [i for i in numbers if short_of[id(options[i])]]
            batch_of = dict(zip(numbers, batch, strict=True))
            in_batch, tries = [batch_of[i] for i in in_tries], [tries_by_options[id(options[i])] for i in in_tries]
            searches = score_labels(self.model, blocks, in_batch, tries, budget, wanted)
            for i, search in zip(in_tries, searches, strict=True):
                short = short_of[id(options[i])]
                greedy = frozenset(short[n] for n in search.greedy)
                scores = {short[n]: score for n, score in search.scores.items()}
                found[i] = OptionScores(scores, short[search.best], greedy)
            for i in numbers:
                if len(short_of[id(options[i])]) < len(options[i]):
                    found[i] = self._with_long_options(found.get(i), blocks, batch_of[i], options[i], budget)
        return [found[i] for i in range(len(queries))]

    def _with_long_options(
        self,
        short: OptionScores | None,
        blocks: Sequence[Block],
        query: TokenIds,
        options: Sequence[TokenIds],
        budget: ActivationBudget,
    ) -> OptionScores:
        """Add the options that are too long for a trie, each processed straight through."""
        scores = dict(short.log_probabilities) if short else {}
        greedy = set(short.greedy) if short else set()
        for number, option in enumerate(options):
            if len(option) > MOST_TRIE_TOKENS:
                scores[number], is_greedy = score_alone(self.model, blocks, query, option, budget)
                greedy |= {number} if is_greedy else set()
        best = max(scores, key=lambda number: (scores[number], -number))
        return OptionScores(scores, best, frozenset(greedy))

    def generate(
        self,
        prefix: Prefix,
        queries: Sequence[TokenIds],
        stop: Stop,
        max_tokens: int,
        sampling: Sampling | None = None,
        numbers: Sequence[int] | None = None,
    ) -> Generator[GeneratedToken]:
        """Write the answers of many queries together, and yield tokens as they come."""
        budget = self.activation_budget(prefix)
        numbers = range(len(queries)) if numbers is None else numbers
        for batch, blocks, batch_queries in self._batches(prefix, queries, budget):
            batch_numbers = [numbers[i] for i in batch]
            yield from generate(
                self.model, blocks, batch_queries, stop, max_tokens, budget, sampling, batch_numbers, batch
            )

    def activation_budget(self, prefix: Prefix) -> ActivationBudget:
        """Return the bound on what queries in flight use, and what their tokens cost."""
        return ActivationBudget.after(self.model, self._blocks(prefix), self.activation_budget_mib)

    def _blocks(self, prefix: Prefix) -> tuple[Block, ...]:
        """Return the keys and values of a prefix of this backend, and refuse any other."""
        require_own(prefix, self.identity)
        if not isinstance(prefix, PrefixCache):
            raise foreign_prefix("another kind of backend", prefix.identity, self.identity)
        return prefix.blocks

    def _batches(
        self, prefix: Prefix, queries: Sequence[TokenIds], budget: ActivationBudget
    ) -> Iterator[tuple[list[int], tuple[Block, ...], list[TokenIds]]]:
        """Yield positions of queries, what they come after and their tokens: first those that fit a forward pass.

        A query that would exceed the activation budget is processed in chunks as a prefix is, up to its last token.
        """
        blocks, most = self._blocks(prefix), budget.tokens_per_pass()
        together = [i for i, query in enumerate(queries) if len(query) <= most]
        if together:
            yield together, blocks, [queries[i] for i in together]
        for i, query in enumerate(queries):
            if len(query) > most:
                own = extend_blocks(self.model, blocks, query[:-1], chunk_tokens=most)
                yield [i], own, [query[-1:]]


def target_scores(
    logits: Tensor, token_ids: Sequence[int], allowed: Sequence[TokenIds | None]
) -> Iterator[TargetScore]:
    """Score the tokens that follow some positions, logits (S, V), against those allowed there."""
    tokens = torch.tensor(token_ids, device=logits.device)
    scores = logits.gather(1, tokens[:, None])[:, 0].float()
    log_scores = (scores - log_denominators(logits)).tolist()
    highest = logits.max(dim=-1).values.float()
    for row, own in enumerate(allowed):
        best = highest[row] if own is None else logits[row, list(own)].float().max()
        yield TargetScore(log_scores[row], bool(scores[row] >= best))


def score_alone(
    model: PreTrainedModel, blocks: Sequence[Block], query: TokenIds, option: TokenIds, budget: ActivationBudget
) -> tuple[float, bool]:
    """Score one long option after a prefix and a query, and tell whether greedy decoding would have written it."""
    begin = len(query) - 1
    scores: list[float] = []
    is_greedy = True

    def take(positions: Sequence[int], logits: Tensor) -> None:
        nonlocal is_greedy
        tokens = [option[position - begin] for position in positions]
        scores.extend(log_probabilities(logits, range(len(tokens)), tokens))
        is_greedy = is_greedy and logits.argmax(dim=-1).tolist() == tokens

    extend_blocks(
        model,
        blocks,
        (*query, *option[:-1]),
        chunk_tokens=budget.tokens_per_pass(num_logits_per_token=1),
        keep=range(begin, begin + len(option)),
        on_logits=take,
    )
    return sum(scores), is_greedy


def identity_of(loaded: LoadedModel) -> Identity:
    """Tell which network this is, as far as keys, values and answers depend on it."""
    is_adapter = loaded.manifest is not None and hasattr(loaded.model, "peft_config")
    ends = getattr(getattr(loaded.model, "generation_config", None), "eos_token_id", None)
    return Identity(
        fingerprint=loaded.fingerprint,
        config_hash=_config_hash(loaded.model),
        dtype=str(loaded.model.dtype).removeprefix("torch."),
        base_fingerprint=loaded.manifest.base_fingerprint if is_adapter and loaded.manifest else None,
        reference=loaded.reference,
        max_context_tokens=max_positions(loaded.model),
        end_token_ids=frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends]),
    )


def _config_hash(model: PreTrainedModel) -> str:
    """Hash what a configuration says about how the network computes."""
    config = model.config.get_text_config().to_dict()
    told = {name: value for name, value in config.items() if name not in NOT_COMPUTED and not name.startswith("_")}
    return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
