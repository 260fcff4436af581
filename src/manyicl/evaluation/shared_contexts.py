"""Find the beginnings that requests of other harnesses share, so that each is prefilled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from manyicl.engine.label_trie import num_shared_tokens

# A beginning that several contexts share is read before them where that spares so many tokens or more; a prefill of
# its own costs a pass over the weights, which fewer tokens do not.
LEAST_SPARED_TOKENS = 256


@dataclass(frozen=True)
class SharedBeginning:
    """What several contexts begin with.

    Attributes:
        num_tokens: Its length, shorter than every context.
        contexts: Numbers of the contexts that begin with it.
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
        Beginnings, every context in one of them; those that begin alike follow each other.
    """
    # At least one token of a context is left to be prefilled after what it shares.
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
