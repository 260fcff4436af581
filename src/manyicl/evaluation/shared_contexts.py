"""Find the beginnings that requests of other harnesses share, so that each is prefilled once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from manyicl.engine.label_trie import num_shared_tokens

# A shared beginning is prefilled separately if that saves at least so many tokens; a separate prefill costs a pass over
# the weights, which is not worth it for fewer.
LEAST_SPARED_TOKENS = 256


@dataclass(frozen=True)
class SharedBeginning:
    """A beginning that several contexts share.

    Attributes:
        num_tokens: Length of the beginning, shorter than every context.
        contexts: Positions of the contexts that begin with it.
    """

    num_tokens: int
    contexts: list[int] = field(default_factory=list)


def shared_beginnings(
    contexts: Sequence[tuple[int, ...]], least_spared: int = LEAST_SPARED_TOKENS
) -> list[SharedBeginning]:
    """Decide which beginnings to prefill separately, and for which contexts.

    In sorted order, contexts that share a beginning are adjacent. It is prefilled separately if that saves at least
    ``least_spared`` tokens compared with prefilling it with each of them; some of them may share a longer one by the
    same rule. This finds a fixed block of examples in every task of a call, and a subject that some queries share.

    Args:
        contexts: Sorted and distinct token sequences, each of at least one token.
        least_spared: Number of saved tokens that justifies a separate prefill.

    Returns:
        Beginnings, with every context in exactly one of them; similar ones are adjacent.
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
