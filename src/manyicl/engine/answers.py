"""Where a free answer ends, and how its tokens become text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from manyicl.engine.backend import GeneratedToken
from manyicl.episodes.encoding import Encoder


@dataclass(frozen=True)
class AnswerEnd:
    """Ends an answer at the model's end-of-answer text, or at a token that ends a text.

    Attributes:
        encoder: Decodes, and knows the end-of-answer text.
        model_end_ids: Tokens that end a text according to the model's own settings.
    """

    encoder: Encoder
    model_end_ids: frozenset[int] = frozenset()

    @cached_property
    def texts(self) -> tuple[str, ...]:
        """The end-of-answer text."""
        return (self.encoder.format.end_of_answer,)

    @cached_property
    def token_ids(self) -> frozenset[int]:
        """Tokens that end a text: the tokenizer's, the model's, and that of a chat turn."""
        ends = {self.encoder.tokenizer.eos_token_id, self.encoder.answer_end_id, *self.model_end_ids}
        return frozenset(token for token in ends if token is not None)

    def ended(self, token_ids: Sequence[int]) -> bool:
        """Tell whether an answer with these tokens has ended."""
        return token_ids[-1] in self.token_ids or self.encoder.has_ended(token_ids)

    def text_of(self, tokens: Sequence[GeneratedToken]) -> tuple[str, float]:
        """Return the text of a whole answer and its log-probability in nats.

        A token that ends a text in place of the end-of-answer text is no part of the answer and adds nothing; in a
        chat the end-of-answer text itself is often such a token.
        """
        token_ids = [token.token_id for token in tokens]
        counted = list(tokens)
        if token_ids[-1] in self.token_ids and not self.encoder.has_ended(token_ids):
            counted.pop()
            token_ids.pop()
        return self.encoder.decode_answer(token_ids), sum(token.log_probability for token in counted)
