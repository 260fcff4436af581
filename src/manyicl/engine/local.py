"""LocalBackend: the packed engine of this package as a `manyicl.engine.backend.Backend`."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Generator, Iterator, Mapping, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.backend import (
    Backend,
    BetweenChunks,
    GeneratedToken,
    Identity,
    OptionScores,
    Prefix,
    Sampling,
    ScoreScope,
    Stop,
    Target,
    TargetScore,
    TokenIds,
    foreign_prefix,
    require_count,
    require_own,
)
from manyicl.engine.decoding import generate
from manyicl.engine.label_trie import NODES_READ_TOGETHER, LabelTrie, num_shared_tokens, tries_of
from manyicl.engine.packing import ActivationBudget, log_denominators, numbers_of
from manyicl.engine.prefix_cache import PrefixCache, extend_blocks, shared_beginning
from manyicl.engine.scoring import score_continuations, score_labels
from manyicl.errors import pluralized
from manyicl.model.continuation import Block
from manyicl.model.load import LoadedModel, max_positions
from manyicl.model.merging import is_mergeable, merge_adapter

# Longer options are processed straight through, each alone: which token of a trie sees which is a square.
MOST_TRIE_TOKENS = 256
# The logits of every target are looked at, so a prefill that is observed runs in smaller chunks.
OBSERVED_CHUNK_TOKENS = 512
# Configuration keys that change no result here.
NOT_COMPUTED = frozenset(
    {"architectures", "dtype", "torch_dtype", "transformers_version", "use_cache", "bos_token_id", "eos_token_id"}
    | {"pad_token_id", "max_position_embeddings"}
)


class LocalBackend:
    """Runs a loaded model in this process: prefixes as shared keys and values, queries packed after them."""

    def __init__(self, loaded: LoadedModel, *, activation_budget_mib: int | None = None, merge: bool = False) -> None:
        """Take a loaded model.

        Args:
            loaded: From `manyicl.model.load.load_model`.
            activation_budget_mib: Bound on the memory of queries in flight, without model and prefix; it decides how
                many advance together, never a result. None for what `ActivationBudget.after` allows.
            merge: Merge an adapter into its base where `is_mergeable` allows it, which saves a seventh of the time. The
                loaded model is used up.

        Raises:
            UserError: If the bound is no whole number of at least 1.
        """
        require_count("activation_budget_mib", activation_budget_mib)
        self.identity = identity_of(loaded)
        self.model = merge_adapter(loaded.model) if merge and is_mergeable(loaded.model) else loaded.model
        self.activation_budget_mib = activation_budget_mib
        # Told of a prefix, after each chunk, how many of its tokens are encoded, of how many.
        self.on_prefill: BetweenChunks | None = None
        self._tries = lru_cache(maxsize=16)(tries_of)

    def prefill(
        self, token_ids: Sequence[int], reuse: Prefix | None = None, *, between_chunks: BetweenChunks | None = None
    ) -> PrefixCache:
        """Run the tokens through the model once; those that ``reuse`` begins with as well are shared, not copied."""
        shared: tuple[Block, ...] = ()
        if reuse is not None:
            shared = shared_beginning(self._blocks(reuse), num_shared_tokens(token_ids, reuse.token_ids))
        added = token_ids[shared[-1].end if shared else 0 :]
        blocks = extend_blocks(self.model, shared, added, between_chunks=between_chunks, after_chunk=self.on_prefill)
        return PrefixCache(self.identity, tuple(token_ids), blocks)

    def observe(
        self,
        token_ids: Sequence[int],
        targets: Sequence[Target],
        reuse: Prefix | None = None,
        *,
        between_chunks: BetweenChunks | None = None,
    ) -> tuple[PrefixCache, list[TargetScore]]:
        """Prefill, and score some of the tokens in the same pass; see `ObservingBackend.observe`."""
        shared: tuple[Block, ...] = ()
        if reuse is not None:
            # A token is predicted from the one before it, so that is not taken over.
            most = targets[0].position - 1 if targets else len(token_ids)
            shared = shared_beginning(self._blocks(reuse), min(most, num_shared_tokens(token_ids, reuse.token_ids)))
        start = shared[-1].end if shared else 0
        moved = [Target(target.position - start, target.allowed) for target in targets]
        blocks, scores = self._observe(
            shared, token_ids[start:], moved, OBSERVED_CHUNK_TOKENS, self.on_prefill, between_chunks
        )
        return PrefixCache(self.identity, tuple(token_ids), blocks), scores

    def _observe(
        self,
        blocks: Sequence[Block],
        token_ids: Sequence[int],
        targets: Sequence[Target],
        chunk_tokens: int,
        after_chunk: BetweenChunks | None = None,
        between_chunks: BetweenChunks | None = None,
    ) -> tuple[tuple[Block, ...], list[TargetScore]]:
        """Run tokens through the model after what is there, and score some of them by those before."""
        allowed = {target.position - 1: target.allowed for target in targets}
        scores: list[TargetScore] = []

        def score(positions: Sequence[int], logits: Tensor) -> None:
            found = [token_ids[position + 1] for position in positions]
            scores.extend(target_scores(logits, found, [allowed[position] for position in positions]))

        longer = extend_blocks(
            self.model,
            blocks,
            token_ids,
            chunk_tokens=chunk_tokens,
            keep=list(allowed),
            on_logits=score,
            between_chunks=between_chunks,
            after_chunk=after_chunk,
        )
        return longer, scores

    def score(
        self,
        prefix: Prefix,
        queries: Sequence[TokenIds],
        options: Sequence[Sequence[TokenIds]],
        scope: ScoreScope = "all",
    ) -> list[OptionScores]:
        """Score the options of each query exactly; options that begin alike share their beginning."""
        budget = self.activation_budget(prefix)
        alone = [i for i, own in enumerate(options) if len(own) == 1]
        found = self._score_alone(prefix, {i: (queries[i], options[i][0]) for i in alone}, budget)
        others = [i for i, own in enumerate(options) if len(own) != 1]
        own_queries, own_options = [queries[i] for i in others], [options[i] for i in others]
        found |= zip(others, self._score_sets(prefix, own_queries, own_options, scope, budget), strict=True)
        return [found[i] for i in range(len(queries))]

    def _score_alone(
        self, prefix: Prefix, pairs: Mapping[int, tuple[TokenIds, TokenIds]], budget: ActivationBudget
    ) -> dict[int, OptionScores]:
        """Score the only option of each query, numbered; those that would exceed the budget in chunks, one by one."""
        blocks, most = self._blocks(prefix), budget.tokens_per_pass(num_logits_per_token=1)
        together = {i: pair for i, pair in pairs.items() if len(pair[0]) + len(pair[1]) <= most}
        queries, only = [query for query, _ in together.values()], [option for _, option in together.values()]
        scores = dict(zip(together, score_continuations(self.model, blocks, queries, only, budget), strict=True))
        for i in pairs.keys() - together.keys():
            scores[i] = self._score_in_chunks(blocks, *pairs[i], most)
        return {
            i: OptionScores({0: score}, 0, frozenset({0} if greedy else ())) for i, (score, greedy) in scores.items()
        }

    def _score_in_chunks(
        self, blocks: Sequence[Block], query: TokenIds, option: TokenIds, chunk_tokens: int
    ) -> tuple[float, bool]:
        """Score an option straight through, chunk by chunk, and tell whether greedy decoding would write it."""
        targets = [Target(position) for position in range(len(query), len(query) + len(option))]
        _, each = self._observe(blocks, (*query, *option), targets, chunk_tokens)
        return sum(one.log_probability for one in each), all(one.is_best for one in each)

    def _score_sets(
        self,
        prefix: Prefix,
        queries: Sequence[TokenIds],
        options: Sequence[Sequence[TokenIds]],
        scope: ScoreScope,
        budget: ActivationBudget,
    ) -> list[OptionScores]:
        """Score the options of each query in tries."""
        most = min(budget.slots_per_query(), NODES_READ_TOGETHER if scope == "all" else sys.maxsize)
        # Most queries share their options: these are looked at once.
        tries: dict[int, list[LabelTrie]] = {}
        long: dict[int, list[int]] = {}
        for own in {id(own): own for own in options}.values():
            short = tuple(n for n, ids in enumerate(own) if len(ids) <= MOST_TRIE_TOKENS)
            tries[id(own)] = self._tries(tuple(own[n] for n in short), most, short)
            long[id(own)] = [n for n, ids in enumerate(own) if len(ids) > MOST_TRIE_TOKENS]
        found: dict[int, OptionScores] = {}
        for numbers, blocks, batch in self._batches(prefix, queries, budget):
            label_tries = [tries[id(options[i])] for i in numbers]
            searches = score_labels(self.model, blocks, batch, label_tries, budget, scope)
            for i, query, search in zip(numbers, batch, searches, strict=True):
                scores, greedy = search.scores, search.greedy
                for n in long[id(options[i])]:
                    chunk_tokens = budget.tokens_per_pass(num_logits_per_token=1)
                    scores[n], is_greedy = self._score_in_chunks(blocks, query, options[i][n], chunk_tokens)
                    greedy |= {n} if is_greedy else set()
                best = min(scores, key=lambda n: (-scores[n], n))
                found[i] = OptionScores(scores, best, frozenset(greedy))
        return [found[i] for i in range(len(queries))]

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
        numbers = numbers or range(len(queries))
        for batch, blocks, own in self._batches(prefix, queries, budget):
            own_numbers = [numbers[i] for i in batch]
            for token in generate(self.model, blocks, own, stop, max_tokens, budget, sampling, own_numbers):
                yield token._replace(query=batch[token.query])

    def activation_budget(self, prefix: Prefix) -> ActivationBudget:
        """Return the bound on what queries in flight use, and what their tokens cost."""
        return ActivationBudget.after(self.model, self._blocks(prefix), self.activation_budget_mib)

    def _blocks(self, prefix: Prefix) -> tuple[Block, ...]:
        """Return the keys and values of a prefix of this backend, and refuse any other."""
        require_own(prefix.identity, self.identity)
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
    log_scores = numbers_of(scores - log_denominators(logits))
    greedy = (logits.argmax(dim=-1) == tokens).tolist()
    for row, own in enumerate(allowed):
        is_best = greedy[row] if own is None else bool(scores[row] >= logits[row, list(own)].float().max())
        yield TargetScore(log_scores[row], is_best)


def computed_on(backend: Backend) -> str:
    """Say on what the last bits of results depend besides the network: the device, on a CPU the number of threads."""
    if not isinstance(backend, LocalBackend):
        return type(backend).__name__
    device = backend.model.device
    return f"{device}, {pluralized(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else str(device)


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
    relevant = {name: value for name, value in config.items() if name not in NOT_COMPUTED and not name.startswith("_")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True, default=str).encode()).hexdigest()
