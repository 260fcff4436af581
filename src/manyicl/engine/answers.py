"""Where a free answer ends, and how its tokens become text."""

from __future__ import annotations

from collections.abc import Sequence

from manyicl.engine.backend import GeneratedToken
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.segment_tokenizer import REPLACEMENT


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


class GrowingText:
    """The text of an answer while it is written, as far as no later token can change it.

    Held back are what may be the beginning of the end-of-answer text or of the text before an answer, half a character,
    and white space, which some decoders change with the word after it.

    Attributes:
        tokens: The tokens so far.
    """

    def __init__(self, end: AnswerEnd) -> None:
        """Take what ends the answer."""
        self.tokens: list[GeneratedToken] = []
        self._end = end
        self._num_given = 0

    def add(self, token: GeneratedToken) -> str:
        """Add the next token, and return the text that is certain now and was not before; with the last token, all."""
        self.tokens.append(token)
        text = self._end.text_of(self.tokens)[0] if token.is_last else self._certain()
        added = text[self._num_given :]
        self._num_given += len(added)
        return added

    def _certain(self) -> str:
        encoder = self._end.encoder
        text_format = encoder.format
        text = encoder.decode([token.token_id for token in self.tokens])
        if text_format.before_answer.startswith(text):
            return ""
        text = text.removeprefix(text_format.before_answer).rstrip(REPLACEMENT)
        end = text_format.end_of_answer
        num_of_end = next((n for n in range(min(len(end) - 1, len(text)), 0, -1) if text.endswith(end[:n])), 0)
        return text[: len(text) - num_of_end].rstrip()
