"""Where a free answer ends, and how its tokens become text."""

from __future__ import annotations

from collections.abc import Sequence

from manyicl.engine.backend import GeneratedToken
from manyicl.episodes.encoding import Encoder


class AnswerEnd:
    """Ends an answer at the model's end-of-answer text, or at a token that ends a text.

    Attributes:
        encoder: Decodes, and knows the end-of-answer text.
        texts: The end-of-answer text.
        token_ids: Tokens that end a text: the tokenizer's, the model's, and that of a chat turn.
    """

    def __init__(self, encoder: Encoder, model_end_ids: frozenset[int] = frozenset()) -> None:
        """Take the encoder, and the tokens that end a text according to the model's own settings."""
        self.encoder = encoder
        self.texts = (encoder.format.end_of_answer,)
        own_ends = {encoder.tokenizer.eos_token_id, encoder.answer_end_id} - {None}
        self.token_ids = model_end_ids | own_ends

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Tell whether an answer with these tokens has ended."""
        return token_ids[-1] in self.token_ids or self.encoder.has_ended(token_ids)

    def text_of(self, tokens: Sequence[GeneratedToken]) -> tuple[str, float]:
        """Return the text of a whole answer and its log-probability in nats.

        A token that ends a text in place of the end-of-answer text is no part of the answer and adds nothing; in a
        chat the end-of-answer text itself is often such a token.
        """
        token_ids = [token.token_id for token in tokens]
        own = list(tokens)
        if token_ids[-1] in self.token_ids and not self.encoder.has_ended(token_ids):
            own.pop()
            token_ids.pop()
        return self.encoder.decode_answer(token_ids), sum(token.log_probability for token in own)
