"""Segments join to the sequence, for every kind of tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
from transformers import PreTrainedTokenizerFast

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.text_format import PlainFormat
from manyicl.errors import UserError
from tests.builders import byte_level_bpe, make_example, sentencepiece_bpe, unigram, word_level

TOKENIZERS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": byte_level_bpe,
    "SentencePiece BPE": sentencepiece_bpe,
    "SentencePiece BPE by normalizer": lambda: sentencepiece_bpe(prepend_normalizer=True),
    "Unigram": unigram,
    "words": word_level,
}
EPISODE = Episode(
    "toy",
    "",
    tuple(
        make_example(query, answer)
        for query, answer in [
            ("the film was good", "fine"),
            ("a bad play", "bad and long"),
            ("the red box", "1"),
            ("a long play", "bad"),
            ("the music was fine", "fine and fine"),
        ]
    ),
)


@pytest.fixture(params=TOKENIZERS, name="encoder")
def _encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(TOKENIZERS[request.param]())


def test_every_answer_span_decodes_to_the_answer_and_its_terminator(encoder: Encoder) -> None:
    encoded = encoder.encode_episode(EPISODE)
    assert len(encoded.answer_spans) == len(EPISODE.examples)
    for (start, stop), example in zip(encoded.answer_spans, EPISODE.examples, strict=True):
        assert encoder.decode(encoded.token_ids[start:stop]) == example.answer + "\n\n"


@pytest.mark.parametrize("instruction", ["", "the film and the play"])
def test_pieces_equal_the_encoding_of_the_joined_text(encoder: Encoder, instruction: str) -> None:
    episode = Episode("toy", instruction, EPISODE.examples)
    encoded = encoder.encode_episode(episode).token_ids
    assert encoded == encoder.joined_ids(episode)
    assert encoded == tuple(encoder.tokenizer(encoder.joined_text(episode))["input_ids"])


@pytest.mark.parametrize("num_shots", [0, 1, 3])
@pytest.mark.parametrize("instruction", ["", "the film and the play"])
def test_training_tokens_equal_engine_tokens(encoder: Encoder, instruction: str, num_shots: int) -> None:
    """What the engine puts together from prefix, query and answer is what an episode holds."""
    examples = EPISODE.examples[: num_shots + 1]
    trained = encoder.encode_episode(Episode("toy", instruction, examples)).token_ids
    asked = (
        *encoder.encode_prefix(instruction, examples[:num_shots]),
        *encoder.query_ids(examples[-1].query.text, encoder.preceding(instruction, num_shots)),
        *encoder.answer_ids(examples[-1].answer),
    )
    assert asked == trained


def test_a_shot_costs_as_many_tokens_as_it_adds(encoder: Encoder) -> None:
    for instruction in ("", "the film"):
        counted = encoder.num_preamble_tokens(instruction) + sum(
            encoder.num_shot_tokens(example, encoder.preceding(instruction, shot))
            for shot, example in enumerate(EPISODE.examples)
        )
        assert counted == len(encoder.encode_episode(Episode("toy", instruction, EPISODE.examples)).token_ids)


@pytest.mark.parametrize("text", ["naïve café", "日本語 и русский 🎉", " leading and trailing ", "line\nbreak", "a  b"])
def test_byte_level_answers_survive_unchanged(text: str) -> None:
    encoder = Encoder(byte_level_bpe())
    assert encoder.decode(encoder.answer_ids(text)) == text + "\n\n"


@pytest.mark.parametrize("text", ["naïve café", "日本語 🎉", " leading", "line\nbreak"])
def test_sentencepiece_answers_survive_unchanged(text: str) -> None:
    encoder = Encoder(sentencepiece_bpe())
    assert encoder.decode(encoder.answer_ids(text)) == text + "\n\n"


@pytest.mark.parametrize(
    ("answer", "code"),
    [("first\n\nsecond", "end_inside_answer"), ("line\n", "end_inside_answer"), ("", "empty_answer")],
)
def test_an_answer_that_is_empty_or_would_end_early_is_refused(answer: str, code: str) -> None:
    with pytest.raises(UserError) as raised:
        Encoder(byte_level_bpe()).answer_ids(answer)
    assert raised.value.code == code


def test_a_tokenizer_that_loses_line_breaks_is_refused() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    backend = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(UserError, match="does not keep"):
        Encoder(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>"))


def test_words_replace_labels_only_if_the_tokenizer_knows_them_and_tells_them_apart() -> None:
    tokenizer = word_level(["red", "blue"])
    assert Encoder(tokenizer).usable_labels(["red", "unheard", "blue", "red"]) == ["red", "blue"]
    ends = Encoder(byte_level_bpe(), PlainFormat(end_of_answer="ue"))
    assert ends.usable_labels(["red", "blue"]) == ["red"]


def test_truncation_saved_with_a_tokenizer_cuts_nothing() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.backend_tokenizer.enable_truncation(3)
    assert len(Encoder(tokenizer).query_ids("the film was good and the music was fine")) > 3


@pytest.mark.parametrize("kind", ["byte-level BPE", "SentencePiece BPE"])
def test_a_control_token_spelled_out_in_a_row_stays_text(kind: str) -> None:
    encoder = Encoder(TOKENIZERS[kind]())
    ids = encoder.answer_ids("the end </s> is near")
    assert encoder.tokenizer.eos_token_id not in ids
    assert encoder.decode(ids) == "the end </s> is near\n\n"


def test_other_work_goes_first_after_every_few_characters_of_this_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.episodes.encoding.CHARACTERS_BETWEEN_PAUSES", 10)
    encoder, pauses = Encoder(word_level()), list[str]()

    def encode(number: int, name: str) -> None:
        for position in range(number):
            encoder.query_ids_uncached(f"{name} {position}")

    def pause_within() -> None:
        pauses.append("outer")
        encode(2, "not counted")
        with encoder.pausing(lambda: pauses.append("inner")):
            encode(4, "other")

    with encoder.pausing(pause_within):
        encode(4, "query")
        assert pauses == ["outer", "inner", "inner"] * 2
        with ThreadPoolExecutor(1) as threads:
            threads.submit(encode, 9, "query").result()
        assert len(pauses) == 6
    encode(9, "query")
    assert len(pauses) == 6
