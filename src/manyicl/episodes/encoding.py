"""Episode -> token ids and answer spans. Training and engine both build the model's input with this module."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import chain, takewhile
from threading import get_ident

from transformers import PreTrainedTokenizerBase

from manyicl.episodes.episode import EncodedEpisode, EncodedShot, Episode
from manyicl.episodes.segment_tokenizer import REPLACEMENT, SegmentTokenizer, bos_ids, control_tokens
from manyicl.episodes.text_format import AnyFormat, ParagraphFormat, PlainFormat, Preceding, Segment, text_of
from manyicl.episodes.token_cache import TokenCache
from manyicl.errors import UserError, pluralized, shortened
from manyicl.tasks.task import Example, Task

NUM_ANSWERS_EXAMINED = 100
NUM_ROWS_NAMED = 3
REMEDY_FOR_END_INSIDE = (
    "Replace it in the answer template, as in `{{ answer | replace('\\n\\n', '\\n') }}`, or use a model whose answers "
    "end in a control token of its tokenizer: format.end_of_answer in a recipe, --end-of-answer for a model that was "
    "not fine-tuned."
)
REMEDY_FOR_UNKNOWN = "Use a model whose tokenizer knows them."
# Texts that come again, as demonstrations do, are encoded once: some 20,000 short ones in each of two caches. A process
# that answers for days meets ever new ones, and its memory grows until the caches are full.
MAX_BYTES_REMEMBERED = 8 * 2**20
# What is encoded between two pauses, some ten milliseconds.
CHARACTERS_BETWEEN_PAUSES = 20_000


class _Pauses:
    """Counts the characters that a thread encodes, and pauses where they are many."""

    def __init__(self, pause: Callable[[], object]) -> None:
        self._pause = pause
        self._num_characters = 0
        self._is_pausing = False

    def encoded(self, num_characters: int) -> None:
        self._num_characters += num_characters
        if self._is_pausing or self._num_characters < CHARACTERS_BETWEEN_PAUSES:
            return
        self._is_pausing = True
        try:
            self._pause()
        finally:
            self._is_pausing, self._num_characters = False, 0


class Encoder:
    r"""Encodes the segments of an example one by one, so that an answer's tokens are known by construction.

    The text format says what the segments are. The concatenation of their tokens is the sequence, in training as in
    the engine.

    >>> from manyicl.model.load import load_tokenizer
    >>> from manyicl.tasks.task import Example, Query
    >>> encoder = Encoder(load_tokenizer("builtin:nano"))
    >>> shot = Example(Query("hen lima"), "rice", ("rice",))
    >>> prefix = encoder.encode_prefix("", [shot])
    >>> encoder.decode((*prefix, *encoder.query_ids("jill")))
    'hen lima\nrice\n\njill\n'
    >>> encoder.decode(encoder.answer_ids("rice"))
    'rice\n\n'
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text_format: AnyFormat | None = None) -> None:
        """Wrap a fast tokenizer.

        Raises:
            UserError: If the tokenizer has no `tokenizers` backend, loses characters of the format itself, or lacks the
                control token in which answers end.
        """
        text_format = text_format or PlainFormat()
        if isinstance(text_format, ParagraphFormat):
            text_format = text_format.decided(control_tokens(tokenizer))
        self.tokenizer = tokenizer
        self._segments = SegmentTokenizer(tokenizer, text_format.constants)
        self._pauses: dict[int, _Pauses] = {}
        self.bos_ids: tuple[int, ...] = bos_ids(tokenizer) if text_format.begins_with_bos else ()
        self._use_format(text_format)

    def _use_format(self, text_format: AnyFormat) -> None:
        self.format: AnyFormat = text_format
        self._query_ids = TokenCache(self.query_ids_uncached, MAX_BYTES_REMEMBERED)
        self._answer_ids = TokenCache(self._encode_answer, MAX_BYTES_REMEMBERED)
        self._inter_turn_ids = self._encode(text_format.inter_turn)
        self.answer_end_id = self._control_end_id()
        self._encodable: deque[Task] = deque(maxlen=8)

    @cached_property
    def text_hash(self) -> str:
        """Hash of tokenizer and text format: where it is the same, the same examples become the same tokens."""
        description = json.loads(self.tokenizer.backend_tokenizer.to_str())
        # Both are left over from the last call, and play no part here.
        del description["truncation"], description["padding"]
        parts = [json.dumps(description, sort_keys=True), self.format.model_dump_json(), repr(self.bos_ids)]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    def _control_end_id(self) -> int | None:
        """Return the id of the control token in which every answer ends; None where answers end in text."""
        *_, end = self.format.answer("a")
        last = self._encode_segment(end, False)[-1] if end.is_control else None
        return last if last is not None and last in self.tokenizer.added_tokens_decoder else None

    def _encode_answer(self, answer: str, preceding: Preceding) -> tuple[int, ...]:
        if not answer:
            raise UserError("empty_answer", "An answer is empty", remedy="Every example needs one.")
        if self._ends_early(answer):
            end = self.format.end_of_answer
            named = shortened(answer, 60)
            what = f"The answer {named!r} contains the end-of-answer text {end!r}, where it would be cut"
            raise UserError("end_inside_answer", what, remedy=REMEDY_FOR_END_INSIDE)
        opens_sequence = self.format.answer_first and self._opens_sequence(preceding)
        return self._encode(self.format.answer(answer), opens_sequence)

    def _ends_early(self, answer: str) -> bool:
        return self.answer_end_id is None and self.format.ends_early(answer)

    def _encode_segment(self, segment: Segment, opens_sequence: bool) -> tuple[int, ...]:
        token_ids = self._segments.encode(segment, opens_sequence)
        if self._pauses and (pauses := self._pauses.get(get_ident())) is not None:
            pauses.encoded(len(segment.text))
        return token_ids

    @contextmanager
    def pausing(self, pause: Callable[[], object]) -> Iterator[None]:
        """Call ``pause`` after every few thousand characters that this thread encodes, so that other work goes first.

        That other work may encode, too: without pauses, or with those of its own.
        """
        thread = get_ident()
        before = self._pauses.get(thread)
        self._pauses[thread] = _Pauses(pause)
        try:
            yield
        finally:
            if before is None:
                del self._pauses[thread]
            else:
                self._pauses[thread] = before

    def _encode(self, segments: Iterable[Segment], opens_sequence: bool = False) -> tuple[int, ...]:
        """Encode segments one by one; ``opens_sequence`` says that no text comes before them."""
        token_ids: list[int] = []
        for segment in segments:
            token_ids += self._encode_segment(segment, opens_sequence)
            opens_sequence = False
        return tuple(token_ids)

    def segment_ids(self, text: str, opens_sequence: bool = False) -> tuple[int, ...]:
        """Encode a text by itself; ``opens_sequence`` says that no text comes before it."""
        return self._encode_segment(Segment(text), opens_sequence)

    def preceding(self, instruction: str, num_shots: int) -> Preceding:
        """Tell what comes before an example after this instruction and so many demonstrations."""
        return self.format.preceding(instruction, num_shots)

    def query_ids(self, query: str, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[int, ...]:
        """Encode a query: up to where its answer begins, or in the channel form with what ends an example."""
        return self._query_ids(query, preceding)

    def query_ids_uncached(self, query: str, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[int, ...]:
        """Encode a query that will not come again, as `query_ids` without remembering it; streams have no end."""
        opens_sequence = not self.format.answer_first and self._opens_sequence(preceding)
        return self._encode(self.format.query(query, preceding), opens_sequence)

    def _opens_sequence(self, preceding: Preceding) -> bool:
        """Tell whether no text comes before an example."""
        return preceding is Preceding.NOTHING and not self.format.preamble("")

    def is_like_later_shot(self, query: str, preceding: Preceding) -> bool:
        """Tell, without encoding it, whether an example has the tokens here that it has after a demonstration."""
        if self._opens_sequence(preceding) and self._segments.marks_first:
            return False
        return self.format.query(query, preceding) == self.format.query(query)

    def answer_ids(self, answer: str, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[int, ...]:
        """Encode an answer: with the end-of-answer text, or in the channel form up to where its query begins.

        Args:
            answer: Text of the answer.
            preceding: What comes before the example; matters in the channel form alone.

        Raises:
            UserError: If the answer is empty or contains the end-of-answer text.
        """
        return self._answer_ids(answer, preceding)

    def num_query_tokens(self, query: str) -> int:
        """Count the tokens of a query that will not come again, at most, wherever it is in a sequence."""
        return max(len(self.query_ids_uncached(query, preceding)) for preceding in Preceding)

    def num_answer_tokens(self, answer: str) -> int:
        """Count the tokens of an answer, at most, wherever it is in a sequence."""
        places = Preceding if self.format.answer_first else (Preceding.DEMONSTRATION,)
        return max(len(self.answer_ids(answer, preceding)) for preceding in places)

    def encode_shot(
        self, example: Example, preceding: Preceding = Preceding.DEMONSTRATION, *, comes_again: bool = True
    ) -> EncodedShot:
        """Encode query and answer of a demonstration, in their order; remember the query only if it comes again."""
        encode_query = self.query_ids if comes_again else self.query_ids_uncached
        query_ids, answer_ids = encode_query(example.query.text, preceding), self.answer_ids(example.answer, preceding)
        return EncodedShot(answer_ids, query_ids) if self.format.answer_first else EncodedShot(query_ids, answer_ids)

    def with_answer(self, shot: EncodedShot, answer: str, preceding: Preceding) -> EncodedShot:
        """Return a demonstration with another answer."""
        answer_ids = self.answer_ids(answer, preceding)
        return shot._replace(given_ids=answer_ids) if self.format.answer_first else shot._replace(target_ids=answer_ids)

    def shot_ids(self, example: Example, preceding: Preceding = Preceding.DEMONSTRATION) -> tuple[int, ...]:
        """Encode a demonstration: its two parts, and the inter-turn text after them."""
        given_ids, target_ids = self.encode_shot(example, preceding)
        return (*given_ids, *target_ids, *self._inter_turn_ids)

    def require_encodable(self, task: Task) -> None:
        """Refuse a task that these tokens would teach otherwise than its rows say; done once for a task.

        Raises:
            UserError: If an answer or option contains the end-of-answer text, the tokenizer cannot tell two labels
                apart, or does not know most answers; in the channel form, if answers are free.
        """
        # Compared by identity: tasks of one name may have other rows, and a shot curve asks for every draw.
        # A copy, as another thread may add to it.
        if any(task is known for known in tuple(self._encodable)):
            return
        self.require_suitable_answers(task)
        self._require_distinct_labels(task)
        self._require_known_answers(task)
        self._encodable.append(task)

    def require_suitable_answers(self, task: Task) -> None:
        """Refuse a task with answers, labels or options that contain the end-of-answer text.

        Raises:
            UserError: If there are any, with the rows; in the channel form, if answers are free.
        """
        if self.format.answer_first and not task.is_closed:
            raise free_answers_in_channel_form(task)
        if self.answer_end_id is not None or self.format.answer_first:
            return
        cut = [label for label in task.labels or () if self._ends_early(label)]
        examples = [
            example
            for example in chain(task.train, task.test)
            if any(map(self._ends_early, {example.answer, *(example.query.choices or ())}))
        ]
        if not cut and not examples:
            return
        origins = [example.origin for example in examples if example.origin]
        more = f" and {len(origins) - NUM_ROWS_NAMED:,} more" if len(origins) > NUM_ROWS_NAMED else ""
        rows = f" in {', '.join(origins[:NUM_ROWS_NAMED])}{more}" if origins else ""
        first = [*cut, *(example.answer for example in examples)][0]
        number = len(cut) + len(examples)
        what = (
            f"{pluralized(number, 'answer')} of task {task.name!r} {'contains' if number == 1 else 'contain'} the "
            f"end-of-answer text {self.format.end_of_answer!r}, where this model would cut them"
        )
        found = f"{shortened(first, 60)!r}{rows}"
        raise UserError("end_inside_answer", what, found=found, remedy=REMEDY_FOR_END_INSIDE)

    def usable_labels(self, words: Iterable[str]) -> list[str]:
        """Keep the words that can replace labels: those that the tokenizer knows and tells apart, in their order.

        A word that contains the end-of-answer text cannot, either.
        """
        known: set[tuple[int, ...]] = set()
        usable = []
        for word in words:
            if self._ends_early(word):
                continue
            token_ids = self.answer_ids(word)
            if token_ids not in known and self.tokenizer.unk_token_id not in token_ids:
                known.add(token_ids)
                usable.append(word)
        return usable

    def _require_distinct_labels(self, task: Task) -> None:
        by_ids: dict[tuple[int, ...], str] = {}
        for label in task.labels or ():
            other = by_ids.setdefault(self.answer_ids(label), label)
            if other != label:
                what = (
                    f"The tokenizer cannot tell the labels {other!r} and {label!r} of task {task.name!r} apart: both "
                    f"become {self.decode(self.answer_ids(label))!r}"
                )
                raise UserError("labels_with_equal_tokens", what, remedy=REMEDY_FOR_UNKNOWN)

    def _require_known_answers(self, task: Task) -> None:
        unknown = self.tokenizer.unk_token_id
        answers = [example.answer for example in task.train[:NUM_ANSWERS_EXAMINED]]
        num_unknown = sum(unknown is not None and unknown in self.answer_ids(answer) for answer in answers)
        if 2 * num_unknown > len(answers):
            what = (
                f"The tokenizer does not know the words of task {task.name!r}: {num_unknown} of its first "
                f"{len(answers)} answers hold unknown tokens"
            )
            raise UserError("unknown_words", what, remedy=REMEDY_FOR_UNKNOWN)

    def encode_prefix(self, instruction: str, examples: Iterable[Example]) -> tuple[int, ...]:
        """Encode an instruction and demonstrations: all that queries share."""
        return self.encode_episode(Episode("", instruction, tuple(examples))).token_ids

    def encode_episode(self, episode: Episode) -> EncodedEpisode:
        """Encode an episode segment by segment.

        ::

            <bos> instruction ⏎⏎ query ⏎ answer ⏎⏎ query ⏎ answer ⏎⏎
                                         └───span──┘         └───span──┘

        In the channel form each answer comes before its query, and the spans are those of the queries.
        """
        shots = (
            self.encode_shot(example, self.preceding(episode.instruction, shot))
            for shot, example in enumerate(episode.examples)
        )
        return self.join(episode.task_name, self.preamble_ids(episode.instruction), shots)

    def join(self, task_name: str, preamble_ids: Sequence[int], shots: Iterable[EncodedShot]) -> EncodedEpisode:
        """Join the tokens of a preamble and of demonstrations to an episode."""
        token_ids = list(preamble_ids)
        spans = []
        for given_ids, target_ids in shots:
            token_ids += given_ids
            start = len(token_ids)
            token_ids += target_ids
            spans.append((start, len(token_ids)))
            token_ids += self._inter_turn_ids
        return EncodedEpisode(task_name, tuple(token_ids), tuple(spans))

    def preamble_ids(self, instruction: str) -> tuple[int, ...]:
        """Encode all that stands before the first query."""
        return (*self.bos_ids, *self._encode(self.format.preamble(instruction), True))

    def num_preamble_tokens(self, instruction: str) -> int:
        """Count the tokens that stand before the first query."""
        return len(self.preamble_ids(instruction))

    @property
    def num_inter_turn_tokens(self) -> int:
        """Tokens between one demonstration and the next; none but in a chat."""
        return len(self._inter_turn_ids)

    def num_tokens_of(self, shot: EncodedShot) -> int:
        """Count the tokens of an encoded demonstration, the inter-turn text after it included."""
        return len(shot.given_ids) + len(shot.target_ids) + self.num_inter_turn_tokens

    def num_shot_tokens(self, example: Example, preceding: Preceding = Preceding.DEMONSTRATION) -> int:
        """Count the tokens of one demonstration."""
        return self.num_tokens_of(self.encode_shot(example, preceding))

    def decode(self, token_ids: Iterable[int]) -> str:
        """Turn tokens back into text, special tokens included."""
        return self._segments.decode(token_ids)

    def has_ended(self, token_ids: Sequence[int]) -> bool:
        """Tell whether the newest token of a generated answer completes the end-of-answer text.

        Where that text is no control token, text decides and not token ids: in Llama-3-style vocabularies ``.`` and
        the blank line after it are one token.
        """
        if self.answer_end_id is not None:
            return token_ids[-1] == self.answer_end_id
        end = self.format.end_of_answer
        # The last character of the end is in the newest token, so only so much is decoded as may hold all of it.
        tail = self.decode(token_ids[-4 * len(end) - 4 :])
        # A tail that begins within a character may decode to nothing but replacements: decode everything then.
        return end in tail or (REPLACEMENT in tail and end in self.decode(token_ids))

    def decode_answer(self, token_ids: Iterable[int]) -> str:
        """Turn generated tokens into the answer: up to its end, without the white space before and after it."""
        if self.answer_end_id is None:
            text, _, _ = self.decode(token_ids).partition(self.format.end_of_answer)
        else:
            text = self.decode(takewhile(lambda token: token != self.answer_end_id, token_ids))
            text = text.removesuffix(self.format.end_of_answer.removesuffix(self.decode([self.answer_end_id])))
        return text.removeprefix(self.format.before_answer)

    def episode_segments(self, episode: Episode) -> tuple[Segment, ...]:
        """Return the segments of an episode in order."""
        shots = ((example.query.text, example.answer) for example in episode.examples)
        return self.format.segments(episode.instruction, shots)

    def joined_text(self, episode: Episode) -> str:
        """Return the text of an episode, its segments joined."""
        return text_of(self.episode_segments(episode))

    def joined_ids(self, episode: Episode) -> tuple[int, ...]:
        """Encode the joined text at once: what a user of the plain tokenizer would feed the model."""
        segments = self.episode_segments(episode)
        joined = Segment(text_of(segments), is_control=any(segment.is_control for segment in segments))
        return (*self.bos_ids, *self._encode_segment(joined, True))


def free_answers_in_channel_form(task: Task) -> UserError:
    """Make the error for a task with free answers, which the channel form cannot hold."""
    what = f"Task {task.name!r} has free answers, and the channel form scores a query after each of its labels"
    remedy = "Use format.kind: plain, or tasks with labels or choices alone."
    return UserError("free_answers_in_channel_form", what, expected="labels or choices", remedy=remedy)
