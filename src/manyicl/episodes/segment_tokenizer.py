"""One segment -> token ids, and back: word-start markers, control tokens, bytes of incomplete characters."""

from __future__ import annotations

import json
import string
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from manyicl.episodes.text_format import Segment
from manyicl.errors import UserError

REPLACEMENT = "\ufffd"


class SegmentTokenizer:
    """Encodes segments by themselves so that their tokens join to those of the whole text.

    SentencePiece-style tokenizers put a leading space marker before every text they are given. Here only the first
    segment of a sequence gets one, which a copy of the backend tokenizer with that marker switched off takes care of.
    Control tokens are recognised in control segments alone: a row that spells out ``</s>`` means these characters.

    Attributes:
        marks_first: Whether a text may have other tokens where it opens a sequence.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, constants: Sequence[Segment]) -> None:
        """Copy the backend of a fast tokenizer.

        Args:
            tokenizer: Tokenizer of the model; stays as it is.
            constants: All that the format itself writes.

        Raises:
            UserError: If the tokenizer has no `tokenizers` backend, or loses characters of the constants.
        """
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            what = f"{type(tokenizer).__name__} has no fast backend"
            raise UserError("slow_tokenizer", what, expected="a tokenizer with a tokenizer.json")
        written = "".join(segment.text for segment in constants if segment.is_control)
        description = _with_special_tokens(json.loads(backend.to_str()), written)
        without_marker = _without_leading_marker(description)
        self.marks_first = without_marker != description
        # Writing and parsing a vocabulary takes tenths of a second, so where there is no marker, one copy is both.
        first = json.dumps(description)
        inner = json.dumps(without_marker) if self.marks_first else first
        self._first = _copy(first)
        self._inner = _copy(inner) if self.marks_first else self._first
        self._added = tuple(token["content"] for token in description["added_tokens"])
        control = [token for token in description["added_tokens"] if token["content"] in written]
        self._control_ids = {token["content"]: token["id"] for token in control}
        self._strips = any(token["lstrip"] or token["rstrip"] for token in control)
        self._byte_of_token = _byte_of_token(backend, description)
        if written:
            self._control_first = _copy(first, with_control_tokens=True)
            self._control_inner = _copy(inner, with_control_tokens=True) if self.marks_first else self._control_first
        for segment in constants:
            self._require_kept(segment)

    def _require_kept(self, segment: Segment) -> None:
        """Refuse a tokenizer that loses a segment of the format."""
        decoded = self.decode(self.encode(segment))
        # Some control tokens absorb the white space next to them, in the template's own text as well.
        ignored = string.whitespace if segment.is_control and self._strips else ""
        without = str.maketrans("", "", ignored)
        if decoded.translate(without) != segment.text.translate(without):
            other = "format.kind: plain" if segment.is_control else "another format.separator or format.end_of_answer"
            what = "The tokenizer does not keep a text that the format needs"
            expected, found = repr(segment.text), repr(decoded)
            remedy = f"Use a tokenizer that keeps line breaks, or {other}."
            raise UserError("lossy_tokenizer", what, expected=expected, found=found, remedy=remedy)

    def encode(self, segment: Segment, opens_sequence: bool = False) -> tuple[int, ...]:
        """Encode one segment; ``opens_sequence`` says that no text comes before it."""
        if segment.is_control:
            # Some tokenizers put their marker after every control token, so they decide what follows one.
            decides = opens_sequence or segment.text.startswith(self._added)
            backend = self._control_first if decides else self._control_inner
            return tuple(backend.encode(segment.text, add_special_tokens=False).ids)
        return self._encode_text(segment.text, self._first if opens_sequence else self._inner)

    def _encode_text(self, text: str, backend: Tokenizer) -> tuple[int, ...]:
        """Encode a text without control tokens; a Unigram vocabulary spells out ``</s>`` with the very token."""
        token_ids = backend.encode(text, add_special_tokens=False).ids
        for token, token_id in self._control_ids.items():
            if token_id in token_ids and token in text:
                middle = text.index(token) + 1
                return *self._encode_text(text[:middle], backend), *self._encode_text(text[middle:], self._inner)
        return tuple(token_ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn tokens back into text, special tokens included.

        The tokens are decoded after a known beginning that is cut off again, because decoders drop a leading
        space at the start of a text.
        """
        token_ids = list(token_ids)
        text = self._decode_after_lead(token_ids)
        if REPLACEMENT not in text or not self._byte_of_token:
            return text
        # The decoder gives up a whole run of byte tokens of which one is wrong, the line breaks after it too.
        runs = ((is_byte, list(run)) for is_byte, run in groupby(token_ids, self._byte_of_token.__contains__))
        return "".join(
            bytes(map(self._byte_of_token.__getitem__, run)).decode(errors="replace")
            if is_byte
            else self._decode_after_lead(run)
            for is_byte, run in runs
        )

    def _decode_after_lead(self, token_ids: list[int]) -> str:
        lead, lead_text = self._lead
        text = self._inner.decode([*lead, *token_ids], skip_special_tokens=False)
        return text[len(lead_text) :]

    @cached_property
    def _lead(self) -> tuple[list[int], str]:
        """Tokens before those that are decoded, and their text; each generated token is decoded by itself."""
        token_ids = self._inner.encode("\n", add_special_tokens=False).ids
        return token_ids, self._inner.decode(token_ids, skip_special_tokens=False)


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """Return the tokens that a tokenizer reads as one id whatever is next to them; runs of white space are none."""
    tokens = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return frozenset(token for token in tokens if token.strip() and token != tokenizer.unk_token)


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the tokens that the tokenizer itself puts before a text: its ``bos``, or nothing."""
    with_special = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return (bos,) if bos is not None and with_special[:1] == [bos] else ()


def _copy(description: str, *, with_control_tokens: bool = False) -> Tokenizer:
    """Make a backend tokenizer from its JSON, without truncation or padding, so that nothing is cut in silence."""
    copy = Tokenizer.from_str(description)
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = not with_control_tokens
    return copy


def _with_special_tokens(description: dict[str, Any], written: str) -> dict[str, Any]:
    """Mark the added tokens that a format writes as special; in other texts they are characters then."""
    tokens = [
        {**token, "special": token["special"] or (bool(token["content"].strip()) and token["content"] in written)}
        for token in description["added_tokens"]
    ]
    return {**description, "added_tokens": tokens}


def _byte_of_token(backend: Tokenizer, description: dict[str, Any]) -> dict[int, int]:
    """Return the byte that each token such as ``<0x0A>`` means; empty where a tokenizer has no such tokens."""
    if '"ByteFallback"' not in json.dumps(description.get("decoder")):
        return {}
    tokens = {byte: backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
    return {token: byte for byte, token in tokens.items() if token is not None}


def _without_leading_marker(description: dict[str, Any]) -> dict[str, Any]:
    """Describe a backend tokenizer that adds no space marker before a text."""
    steps = {name: _never_prepending(description.get(name)) for name in ("normalizer", "pre_tokenizer")}
    return {**description, **steps}


def _never_prepending(step: dict[str, Any] | None) -> dict[str, Any] | None:
    """Describe a normalizer or pre-tokenizer without `Prepend`, `Metaspace` and `ByteLevel` adding no leading space."""
    if step is None or step["type"] == "Prepend":
        return None
    changes: dict[str, Any] = {"prepend_scheme": "never", "add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        changes[name] = [part for part in map(_never_prepending, step.get(name, ())) if part is not None]
    return {name: changes.get(name, value) for name, value in step.items()}
