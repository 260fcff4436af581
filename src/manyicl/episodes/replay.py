"""General text among the episodes of packed sequences, so that a model keeps what it could before: replay."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from manyicl.checked import Section
from manyicl.episodes.general_text import GeneralText, next_word, read_general_text
from manyicl.errors import UserError

if TYPE_CHECKING:
    from manyicl.episodes.encoding import Encoder

TEXT_KEY, SHARE_KEY = "sequences.replay.text", "sequences.replay.share"
DEFAULT_SEGMENT_TOKENS = 512


class ReplaySettings(Section):
    """General text that is mixed into the packed sequences of a training."""

    text: Path = Field(
        description="Text in UTF-8 of the kind that the model should not forget: a plain file, or .jsonl with a `text` "
        "in each line. Relative to the working directory."
    )
    share: float = Field(gt=0, lt=1, description="Share of the context that holds text, over all packed sequences.")
    segment_tokens: int | None = Field(
        None,
        ge=2,
        description="Tokens of each piece of text; unset: 512, or the whole context where that is shorter.",
    )
    weight: float = Field(
        1.0, gt=0, le=1, description="Weight of each token of the text in the loss, all but the first of a piece."
    )

    def num_segment_tokens(self, max_context_tokens: int) -> int:
        """Return the tokens of a piece of text."""
        return self.segment_tokens or min(DEFAULT_SEGMENT_TOKENS, max_context_tokens)


@dataclass(frozen=True, slots=True)
class ReplayedSegment:
    """A piece of general text in a packed sequence, isolated from all else as an episode is.

    Attributes:
        token_ids: Its tokens, (T,); every one but the first is a target.
        weight: What each target weighs in the loss.
    """

    token_ids: tuple[int, ...]
    weight: float


class Replay:
    """Pieces of a text as a function of seed and index.

    A sequence holds as many whole pieces as its share asks for; of a fraction of a piece, so large a share of the
    sequences holds one more. They are drawn by random numbers of their own: the episodes of a sequence are the same as
    without text, as far as they fit. A piece begins at a random word; after the end of the text comes its beginning.

    Attributes:
        text: The text.
        segment_tokens: Tokens of a piece.
    """

    def __init__(
        self, settings: ReplaySettings, encoder: Encoder, max_context_tokens: int, text: GeneralText | None = None
    ) -> None:
        """Read the text, unless it is given.

        Raises:
            UserError: If it cannot be read, has fewer tokens than a piece, or the tokenizer does not know its words.
        """
        # A recipe, which has the settings, is read before libraries are loaded.
        from manyicl.episodes.text_tokenizer import TextTokenizer

        self.text = text or read_general_text(settings.text, TEXT_KEY)
        self.segment_tokens = settings.num_segment_tokens(max_context_tokens)
        self._weight = settings.weight
        self._num_segments = settings.share * max_context_tokens / self.segment_tokens
        self._tokenizer = TextTokenizer(encoder.tokenizer)
        self._tokenizer.require_known_words(self.text, TEXT_KEY)
        num_known = len(self._tokenizer.ids_from(self.text.text, 0, self._num_text_tokens))
        if num_known < self._num_text_tokens:
            what = "the text is shorter than a piece of it that is replayed"
            expected = f"at least {self._num_text_tokens:,} tokens"
            remedy = "Give a longer text, or set sequences.replay.segment_tokens."
            found, file = f"{num_known:,}", self.text.name
            raise UserError(
                "text_too_short", what, expected=expected, found=found, remedy=remedy, file=file, field=TEXT_KEY
            )

    @property
    def _num_text_tokens(self) -> int:
        return self.segment_tokens - len(self._tokenizer.bos_ids)

    @property
    def fewest_tokens(self) -> int:
        """Tokens of text in a sequence that holds the fewest."""
        return int(self._num_segments) * self.segment_tokens

    def require_a_piece(self, num_sequences: int) -> None:
        """Refuse a share that leaves room for less than one piece of text in so many packed sequences.

        Raises:
            UserError: With the tokens that it leaves.
        """
        num_tokens = self._num_segments * self.segment_tokens * num_sequences
        if num_tokens < self.segment_tokens:
            what = f"{SHARE_KEY} leaves room for less than one piece of text in the whole run"
            expected, found = f"at least {self.segment_tokens:,} tokens", f"{num_tokens:,.6g}"
            remedy = f"Raise it, or leave out {SHARE_KEY.rpartition('.')[0]}."
            raise UserError("share_too_small", what, expected=expected, found=found, remedy=remedy, field=SHARE_KEY)

    def segments(self, seed: int, index: int) -> tuple[ReplayedSegment, ...]:
        """Draw the pieces of packed sequence ``index``."""
        return tuple(self._drawn(random.Random(f"replay {seed} {index}")))

    def _drawn(self, rng: random.Random) -> Iterator[ReplayedSegment]:
        whole = int(self._num_segments)
        for _ in range(whole + (rng.random() < self._num_segments - whole)):
            text = self.text.text
            start = next_word(text, rng.randrange(len(text)))
            token_ids = self._tokenizer.ids_from(text, start, self._num_text_tokens)
            yield ReplayedSegment((*self._tokenizer.bos_ids, *token_ids), self._weight)
