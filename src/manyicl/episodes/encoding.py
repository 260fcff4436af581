"""Episode -> token ids and answer spans. Training and engine both ask the model through this file."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from manyicl.episodes.episode import EncodedEpisode, Episode
from manyicl.errors import UserError
from manyicl.tasks.task import Example, Task

NUM_ANSWERS_EXAMINED = 100


class PlainFormat(BaseModel):
    """Where the pieces of an example meet: query, separator, answer, terminator.

    The separator closes the query, the terminator closes the answer. The terminator belongs to the answer:
    it is supervised, generation stops on its text, and a label is scored with it, so that a label which
    begins another label is compared fairly.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["plain"] = "plain"
    separator: str = Field("\n", min_length=1, description="Stands between a query and its answer.")
    terminator: str = Field("\n\n", min_length=1, description="Ends an answer, and an instruction.")

    @field_validator("terminator")
    @classmethod
    def _not_only_spaces(cls, terminator: str) -> str:
        if not terminator.strip(" "):
            raise ValueError("a terminator of spaces alone stands inside most answers; use a blank line")
        return terminator

    def instruction_piece(self, instruction: str) -> str:
        """Return the text that opens an episode; empty when there is no instruction."""
        return f"{instruction}{self.terminator}" if instruction else ""

    def query_piece(self, query: str) -> str:
        """Return the text of a query up to the place where the answer begins."""
        return f"{query}{self.separator}"

    def answer_piece(self, answer: str) -> str:
        """Return the supervised text of an answer.

        Raises:
            UserError: If the answer is empty, or contains or completes the terminator, which would end it early.
        """
        if not answer:
            raise UserError("An answer is empty; every example needs one.")
        if f"{answer}{self.terminator}".index(self.terminator) < len(answer):
            raise UserError(
                f"The answer {_shorten(answer)!r} contains the terminator {self.terminator!r}, which would end it "
                "early. Collapse blank lines in the answer template, for example with "
                "`{{ answer | replace('\\n\\n', '\\n') }}`, or choose another terminator."
            )
        return f"{answer}{self.terminator}"


class Encoder:
    """Encodes the pieces of an example one by one, so that an answer's tokens are known by construction.

    The pieces are instruction, query with separator, and answer with terminator. The concatenation of their
    tokens is the sequence, in training as in the engine. SentencePiece-style tokenizers put a leading space
    marker before every text they are given; here only the first piece of a sequence gets one, which a copy
    of the backend tokenizer with that marker switched off takes care of.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_format: PlainFormat | None = None) -> None:
        """Wrap a fast tokenizer.

        Raises:
            UserError: If the tokenizer has no `tokenizers` backend, or deletes characters of the format itself.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise UserError(
                f"{type(tokenizer).__name__} has no fast backend; expected a tokenizer with a tokenizer.json."
            )
        self.tokenizer = tokenizer
        self.format = text_format or PlainFormat()
        self._first = _plain_copy(backend)
        self._inner = _without_leading_marker(self._first)
        self.opening_ids: tuple[int, ...] = _opening_ids(tokenizer)
        self._piece_ids = lru_cache(maxsize=200_000)(self._encode_piece)
        for piece in (self.format.separator, self.format.terminator):
            if self.decode(self.piece_ids(piece)) != piece:
                raise UserError(
                    f"The tokenizer does not keep {piece!r}, which the format needs: it decodes to "
                    f"{self.decode(self.piece_ids(piece))!r}. Use a tokenizer that keeps line breaks, or another "
                    "separator and terminator."
                )

    def _encode_piece(self, text: str, opens_sequence: bool) -> tuple[int, ...]:
        backend = self._first if opens_sequence else self._inner
        return tuple(backend.encode(text, add_special_tokens=False).ids)

    def piece_ids(self, text: str, opens_sequence: bool = False) -> tuple[int, ...]:
        """Encode one piece; ``opens_sequence`` says that no text stands before it."""
        return self._piece_ids(text, opens_sequence)

    def query_ids(self, query: str, opens_sequence: bool = False) -> tuple[int, ...]:
        """Encode a query and the separator after it."""
        return self.piece_ids(self.format.query_piece(query), opens_sequence)

    def passing_query_ids(self, query: str, opens_sequence: bool = False) -> tuple[int, ...]:
        """Encode a query that will not come again, as `query_ids` without remembering it; streams have no end."""
        return self._encode_piece(self.format.query_piece(query), opens_sequence)

    def answer_ids(self, answer: str) -> tuple[int, ...]:
        """Encode an answer and the terminator after it."""
        return self.piece_ids(self.format.answer_piece(answer))

    def require_distinct(self, task: Task) -> None:
        """Refuse labels that the tokenizer cannot tell apart, and answers that it mostly does not know.

        Raises:
            UserError: If so; the model would be taught, and asked, something else than the task says.
        """
        by_ids: dict[tuple[int, ...], str] = {}
        for label in task.labels or ():
            other = by_ids.setdefault(self.answer_ids(label), label)
            if other != label:
                raise UserError(
                    f"The tokenizer cannot tell the labels {other!r} and {label!r} of task {task.name!r} apart: both "
                    f"become {self.decode(self.answer_ids(label))!r}. Use a model whose tokenizer knows them."
                )
        unknown = self.tokenizer.unk_token_id
        answers = [example.answer for example in task.train[:NUM_ANSWERS_EXAMINED]]
        num_unknown = sum(unknown is not None and unknown in self.answer_ids(answer) for answer in answers)
        if 2 * num_unknown > len(answers):
            raise UserError(
                f"The tokenizer does not know the words of task {task.name!r}: {num_unknown} of its first "
                f"{len(answers)} answers hold unknown tokens. Use a model whose tokenizer knows them."
            )

    def encode_prefix(self, instruction: str, examples: Iterable[Example]) -> tuple[int, ...]:
        """Encode an instruction and demonstrations: all that queries share."""
        return self.encode_episode(Episode("", instruction, tuple(examples))).token_ids

    def opens_sequence(self, instruction: str, num_shots: int) -> bool:
        """Tell whether a query after this instruction and so many demonstrations is the first text."""
        return not instruction and num_shots == 0

    def encode_episode(self, episode: Episode) -> EncodedEpisode:
        """Encode an episode piece by piece.

        ::

            <bos> instruction ⏎⏎ query ⏎ answer ⏎⏎ query ⏎ answer ⏎⏎
                                         └───span──┘         └───span──┘
        """
        token_ids = list(self.opening_ids)
        if episode.instruction:
            token_ids += self.piece_ids(self.format.instruction_piece(episode.instruction), True)
        spans = []
        for shot, example in enumerate(episode.examples):
            token_ids += self.query_ids(example.query.text, self.opens_sequence(episode.instruction, shot))
            start = len(token_ids)
            token_ids += self.answer_ids(example.answer)
            spans.append((start, len(token_ids)))
        return EncodedEpisode(episode.task_name, tuple(token_ids), tuple(spans))

    def num_opening_tokens(self, instruction: str) -> int:
        """Count the tokens that stand before the first query."""
        return len(self.encode_prefix(instruction, ()))

    def num_shot_tokens(self, example: Example, opens_sequence: bool = False) -> int:
        """Count the tokens of one demonstration."""
        return len(self.query_ids(example.query.text, opens_sequence)) + len(self.answer_ids(example.answer))

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn tokens back into text, special tokens included.

        The tokens are decoded behind a known beginning that is cut off again, because decoders drop a leading
        space at the start of a text.
        """
        lead = self._inner.encode("\n", add_special_tokens=False).ids
        lead_text = self._inner.decode(lead, skip_special_tokens=False)
        text = self._inner.decode([*lead, *token_ids], skip_special_tokens=False)
        return text[len(lead_text) :]

    def joined_text(self, episode: Episode) -> str:
        """Return the text of an episode, its pieces joined."""
        shots = (
            self.format.query_piece(example.query.text) + self.format.answer_piece(example.answer)
            for example in episode.examples
        )
        return self.format.instruction_piece(episode.instruction) + "".join(shots)

    def joined_ids(self, episode: Episode) -> tuple[int, ...]:
        """Encode the joined text in one go: what a user of the plain tokenizer would feed the model."""
        ids = self._first.encode(self.joined_text(episode), add_special_tokens=False).ids
        return (*self.opening_ids, *ids)


def _opening_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that the tokenizer itself puts before a text: its ``bos``, or nothing."""
    with_special = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and with_special[:1] == [bos] else ()


def _plain_copy(backend: Tokenizer) -> Tokenizer:
    """Copy a backend tokenizer without truncation or padding, so that nothing is cut in silence."""
    copy = Tokenizer.from_str(backend.to_str())
    copy.no_truncation()
    copy.no_padding()
    # A row that spells out `</s>` means these characters, not the control token.
    copy.encode_special_tokens = True
    return copy


def _without_leading_marker(backend: Tokenizer) -> Tokenizer:
    """Copy a backend tokenizer so that it adds no space marker before a text."""
    description = json.loads(backend.to_str())
    normalizer = _drop_prepend(description.get("normalizer"))
    description["normalizer"] = normalizer
    _never_prepend(description.get("pre_tokenizer"))
    return _plain_copy(Tokenizer.from_str(json.dumps(description)))


def _drop_prepend(normalizer: dict | None) -> dict | None:  # type: ignore[type-arg]
    """Remove `Prepend` (Llama-2's way to add the marker) from a normalizer's description."""
    if normalizer is None or normalizer["type"] == "Prepend":
        return None
    if normalizer["type"] == "Sequence":
        kept = [part for part in map(_drop_prepend, normalizer["normalizers"]) if part is not None]
        return {**normalizer, "normalizers": kept}
    return normalizer


def _never_prepend(pre_tokenizer: dict | None) -> None:  # type: ignore[type-arg]
    """Set `Metaspace` and `ByteLevel` in a pre-tokenizer's description to add no leading space."""
    if pre_tokenizer is None:
        return
    if pre_tokenizer["type"] == "Metaspace":
        pre_tokenizer["prepend_scheme"] = "never"
    if pre_tokenizer["type"] == "ByteLevel":
        pre_tokenizer["add_prefix_space"] = False
    for part in pre_tokenizer.get("pretokenizers", ()):
        _never_prepend(part)


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
