"""What requests of other harnesses share, so that it is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from torch import Tensor
from transformers import PreTrainedModel

from manyicl.engine.label_trie import num_shared_tokens
from manyicl.engine.packing import WorkingMemory, log_probabilities
from manyicl.engine.prefix_cache import encode_behind
from manyicl.model.continuation import Block

# A beginning that several contexts share is read before them where that spares so many tokens or more; a prefill of
# its own costs a pass over the weights, which fewer tokens do not.
LEAST_SPARED_TOKENS = 256
# Log-probability in nats, and whether greedy decoding would have written the continuation.
Answer = tuple[float, bool]


@dataclass(frozen=True)
class Pack:
    """Contexts that are read in the same passes.

    Attributes:
        numbers: Which contexts they are.
        blocks: What they begin with.
        queries: What is left of each, at least one token.
        memory: Bounds how many advance together.
    """

    numbers: Sequence[int]
    blocks: Sequence[Block]
    queries: Sequence[tuple[int, ...]]
    memory: WorkingMemory


@dataclass(frozen=True)
class SharedBeginning:
    """What several contexts begin with.

    Attributes:
        num_tokens: Its length, shorter than every context.
        contexts: Numbers of the contexts behind it.
    """

    num_tokens: int
    contexts: list[int] = field(default_factory=list)


def shared_beginnings(
    contexts: Sequence[tuple[int, ...]], least_spared: int = LEAST_SPARED_TOKENS
) -> list[SharedBeginning]:
    """Decide what is read before which contexts.

    Sorted contexts that share a beginning stand side by side. It is read before them if that spares at least
    ``least_spared`` tokens against reading it with each of them; part of them may share a longer one by the same rule.
    A fixed block of examples is found this way in every task of a call, and so is a subject that some queries share.

    Args:
        contexts: Sorted, each once, each at least one token.
        least_spared: Tokens not read twice that are worth a prefill of their own.

    Returns:
        Beginnings, every context behind one of them; those that begin alike follow each other.
    """
    # At least one token of a context is left to be read behind what it shares.
    shared = [min(num_shared_tokens(one, other), len(one) - 1, len(other) - 1) for one, other in pairwise(contexts)]
    root = SharedBeginning(0)
    found = [root]
    waiting = [(0, len(contexts), root)]
    while waiting:
        first, end, beginning = waiting.pop()
        if end - first == 1:
            beginning.contexts.append(first)
        if end - first <= 1:
            continue
        num_tokens = min(shared[first : end - 1])
        if (end - first - 1) * (num_tokens - beginning.num_tokens) >= least_spared:
            beginning = SharedBeginning(num_tokens)
            found.append(beginning)
        cuts = [i + 1 for i in range(first, end - 1) if shared[i] == num_tokens]
        waiting += [(a, b, beginning) for a, b in reversed(list(pairwise([first, *cuts, end])))]
    return [beginning for beginning in found if beginning.contexts]


def score_alone(
    model: PreTrainedModel,
    prefix: Sequence[Block],
    query: tuple[int, ...],
    option: tuple[int, ...],
    memory: WorkingMemory,
) -> Answer:
    """Score one long option, read straight through behind a prefix and a query."""
    begin = len(query) - 1
    scores: list[float] = []
    is_greedy = True

    def take(places: Sequence[int], logits: Tensor) -> None:
        nonlocal is_greedy
        tokens = [option[place - begin] for place in places]
        scores.extend(log_probabilities(logits, range(len(tokens)), tokens))
        is_greedy = is_greedy and logits.argmax(dim=-1).tolist() == tokens

    encode_behind(
        model,
        prefix,
        (*query, *option[:-1]),
        chunk_tokens=memory.tokens_per_pass(num_logits_per_token=1),
        keep=range(begin, begin + len(option)),
        on_logits=take,
    )
    return sum(scores), is_greedy
