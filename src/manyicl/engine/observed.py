"""How a model does on its own demonstrations, each given those before it, read off the pass that encodes them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from manyicl.engine.label_trie import ROOT, LabelTrie
from manyicl.engine.packing import log_denominators
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.tasks.task import Example, Task

# The logits of every answer are looked at, so demonstrations are read in smaller chunks than for a prefix alone.
OBSERVED_CHUNK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class ObservedAnswer:
    """What the model made of one demonstration's answer, given the demonstrations before it.

    Attributes:
        num_shots: Demonstrations before it.
        log_probability: Of the answer, terminator included, in nats.
        is_right: Whether its every token was the likeliest that the labels or choices allow, or of all tokens where
            answers are free: the answer that the model would have given, chosen token by token.
    """

    num_shots: int
    log_probability: float
    is_right: bool


class DemonstrationWatch:
    """Reads off the logits of a prefill how the model did on each demonstration."""

    def __init__(self, task: Task, demonstrations: Sequence[Example], encoder: Encoder) -> None:
        """Note which tokens of the prefix are answers, and what else could have stood in their place."""
        episode = encoder.encode_episode(Episode(task.name, task.instruction(), tuple(demonstrations)))
        self._answers = [ObservedAnswer(shot, 0.0, True) for shot in range(len(demonstrations))]
        # Place whose logits are wanted -> shot, token that stands there, tokens that could; None for any.
        self._wanted: dict[int, tuple[int, int, list[int] | None]] = {}
        tries: dict[tuple[str, ...], LabelTrie] = {}
        for shot, (example, (start, end)) in enumerate(zip(demonstrations, episode.answer_spans, strict=True)):
            options = example.query.choices or task.labels
            if options and options not in tries:
                tries[options] = LabelTrie.of([encoder.answer_ids(option) for option in options])
            trie, node = tries[options] if options else None, ROOT
            for place in range(start, end):
                token = episode.token_ids[place]
                allowed = None
                if trie is not None:
                    by_token = {trie.tokens[child]: child for child in trie.children[node]}
                    allowed, node = list(by_token), by_token[token]
                self._wanted[place - 1] = (shot, token, allowed)

    @property
    def places(self) -> list[int]:
        """Places of the prefix whose logits are wanted."""
        return list(self._wanted)

    @property
    def answers(self) -> tuple[ObservedAnswer, ...]:
        """What was observed."""
        return tuple(self._answers)

    def observe(self, places: Sequence[int], logits: Tensor) -> None:
        """Take in the logits of some places, (S, V)."""
        wanted = [self._wanted[place] for place in places]
        tokens = torch.tensor([token for _, token, _ in wanted], device=logits.device)
        scores = logits.gather(1, tokens[:, None])[:, 0].float()
        log_probabilities = (scores - log_denominators(logits)).tolist()
        highest = logits.max(dim=-1).values.float()
        for row, (shot, _, allowed) in enumerate(wanted):
            best = highest[row] if allowed is None else logits[row, allowed].float().max()
            before = self._answers[shot]
            self._answers[shot] = ObservedAnswer(
                shot, before.log_probability + log_probabilities[row], before.is_right and bool(scores[row] >= best)
            )


def groups_of_shots(answers: Sequence[ObservedAnswer]) -> Iterator[tuple[int, int, list[ObservedAnswer]]]:
    """Group answers by the shots before them, 0, 1, 2-3, 4-7, 8-15, …; yield first, last and the group."""
    first = 0
    while first < len(answers):
        behind = max(1, 2 * first)
        yield first, min(behind, len(answers)) - 1, list(answers[first:behind])
        first = behind
