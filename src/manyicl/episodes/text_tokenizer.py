"""Pieces of a general text -> token ids, of a long text without encoding all of it."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from manyicl.episodes.general_text import BETWEEN_DOCUMENTS, GeneralText
from manyicl.episodes.segment_tokenizer import SegmentTokenizer, bos_ids
from manyicl.episodes.text_format import Segment
from manyicl.errors import UserError

# Characters that are encoded for each token that is needed; more where these do not suffice.
CHARACTERS_PER_TOKEN = 8
# The end of a piece may be cut within a word, whose tokens are not those of the text.
TOKENS_PASSED_OVER = 32
# Tokens that are looked at for whether a tokenizer knows the words.
NUM_TOKENS_EXAMINED = 1000


class TextTokenizer:
    """Encodes pieces of a general text; what spells out a control token there is characters, as it is in rows.

    Attributes:
        bos_ids: What the tokenizer itself puts before a text, or nothing.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the tokenizer of a model.

        Raises:
            UserError: If it has no `tokenizers` backend.
        """
        self.bos_ids = bos_ids(tokenizer)
        self._segments = SegmentTokenizer(tokenizer, ())
        self._unknown_id = tokenizer.unk_token_id

    def ids_from(self, text: str, start: int, num_tokens: int) -> tuple[int, ...]:
        """Return up to ``num_tokens`` tokens of a text from a position on; after its end comes its beginning.

        Of a long text only a part is encoded.
        """
        num_characters = CHARACTERS_PER_TOKEN * num_tokens
        while True:
            piece = text[start : start + num_characters]
            if start and len(piece) < num_characters:
                piece += BETWEEN_DOCUMENTS + text[: min(start, num_characters - len(piece))]
            token_ids = self._segments.encode(Segment(piece), opens_sequence=True)
            if num_characters >= len(text) or len(token_ids) >= num_tokens + TOKENS_PASSED_OVER:
                return token_ids[:num_tokens]
            num_characters *= 2

    def num_bytes(self, token_ids: Sequence[int]) -> int:
        """Count the bytes in UTF-8 of the text of some tokens."""
        return len(self._segments.decode(token_ids).encode())

    def require_known_words(self, text: GeneralText, field: str | None = None) -> None:
        """Refuse a text of which the tokenizer does not know most words.

        Raises:
            UserError: If half of its first tokens are unknown.
        """
        first = self.ids_from(text.text, 0, NUM_TOKENS_EXAMINED)
        num_unknown = first.count(self._unknown_id) if self._unknown_id is not None else 0
        if 2 * num_unknown > len(first):
            what = "the tokenizer does not know the words of the text"
            found = f"{num_unknown:,} unknown of its first {len(first):,} tokens"
            remedy = "Give a text of the kind that the model was trained on."
            raise UserError("unknown_words", what, found=found, remedy=remedy, file=text.name, field=field)
