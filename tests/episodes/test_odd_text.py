"""Segments of any script join to the text and give answers back; labels that look alike are pointed out."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from manyicl.episodes.budget import fit_demonstrations
from manyicl.episodes.checks import MOST_NAMED, check_task, look_alikes, unseen_characters
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.sampling import (
    EpisodeSettings,
    draw_episode,
    plain_words,
    require_replacement_words,
    sequence_rng,
)
from manyicl.errors import UserError
from manyicl.tasks.template import compiled
from tests.builders import TEXTS as TRAINING_TEXTS
from tests.builders import byte_level_bpe, make_example, make_task, sentencepiece_bpe, word_level
from tests.odd_text import SCRIPTS, TEXTS, WITH_CARRIAGE_RETURNS

# How Llama 3 splits a text before it merges: a full stop takes the line breaks behind it along.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)


def llama_3_style(compose: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with Llama 3's splitting and merges over line breaks; it may compose letters, as Qwen's does."""
    backend = Tokenizer(models.BPE())
    if compose:
        backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<unk>", "</s>", "<|im_start|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    ended = [f"{text}{end}\n\n" for text in (*TRAINING_TEXTS, *SCRIPTS.values()) for end in (".", "!", "\u3002", "")]
    backend.train_from_iterator(ended * 2, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")


WHOLE: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte-level BPE": byte_level_bpe,
    "Llama 3 style": llama_3_style,
    "SentencePiece BPE with byte fallback": sentencepiece_bpe,
    "SentencePiece BPE by normalizer": lambda: sentencepiece_bpe(prepend_normalizer=True),
}
WRITTEN = {**TEXTS, "carriage returns": WITH_CARRIAGE_RETURNS}


@pytest.fixture(params=WHOLE, name="encoder", scope="module")
def _encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(WHOLE[request.param]())


@pytest.mark.parametrize("text", WRITTEN.values(), ids=WRITTEN)
def test_pieces_decode_to_the_joined_text_and_spans_to_answers(encoder: Encoder, text: str) -> None:
    examples = (make_example(text, f"{text}."), make_example(f"{text}!", text), make_example("plain", "a"))
    for instruction in ("", text):
        episode = Episode("odd", instruction, examples)
        encoded = encoder.encode_episode(episode)
        body = encoded.token_ids[len(encoder.bos_ids) :]
        assert encoder.decode(body).removeprefix(" ") == encoder.joined_text(episode)
        for (start, stop), example in zip(encoded.answer_spans, examples, strict=True):
            assert encoder.decode(encoded.token_ids[start:stop]) == f"{example.answer}\n\n"
    assert not {encoder.tokenizer.eos_token_id, encoder.tokenizer.unk_token_id} & set(encoder.segment_ids(text))


@settings(deadline=None, max_examples=60)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581"), min_size=1))
def test_any_text_comes_back_from_its_tokens(encoder: Encoder, text: str) -> None:
    assert encoder.decode(encoder.segment_ids(text)) == text


def test_a_whole_stop_takes_the_terminator_along_in_llama_3_style() -> None:
    encoder = Encoder(llama_3_style())
    assert not {"\u3002\n\n", ".\n\n"}.isdisjoint(
        map(encoder.decode, ([token] for token in range(len(encoder.tokenizer))))
    )


def test_bytes_that_are_no_character_do_not_swallow_the_line_breaks_behind_them() -> None:
    encoder = Encoder(sentencepiece_bpe())
    broken, *_ = encoder.segment_ids("\u4e00")  # the first of its three bytes
    ends = encoder.segment_ids("\n\n")
    assert encoder.decode([broken, *ends]) == "\ufffd\n\n"
    letters = encoder.segment_ids("\u65e5\u672c")
    assert encoder.decode([*letters[:-1], *ends]) == "\u65e5\ufffd\n\n"
    assert (
        encoder.decode([*encoder.segment_ids(" fine"), broken, *encoder.segment_ids(" good \u65e5")])
        == " fine\ufffd good \u65e5"
    )


def test_a_tokenizer_that_composes_letters_is_told_to_and_refused_for_labels_that_differ_in_that() -> None:
    encoder = Encoder(llama_3_style(compose=True))
    rows = [make_example(f"q{i}", "cafe\u0301") for i in range(40)]
    check = check_task(make_task(train=rows, test=(), labels=None), encoder, 2048)
    assert check.num_altered_answers == check.num_examined == 40
    with pytest.raises(UserError, match="cannot tell the labels"):
        encoder.require_encodable(make_task(labels=("caf\u00e9", "cafe\u0301")))


def test_words_that_a_tokenizer_does_not_know_are_refused_and_not_taught() -> None:
    encoder = Encoder(word_level())
    with pytest.raises(UserError, match="does not know the words"):
        encoder.require_encodable(make_task(train=[make_example("q", text) for text in SCRIPTS.values()], labels=None))


@pytest.mark.parametrize(
    ("first", "second", "template"),
    [
        ("Good", "good", "label | lower"),
        ("not good", "not\u00a0good", "label.split() | join(' ')"),
        ("Not good", "not  good", "label.lower().split() | join(' ')"),
        ("STRASSE", "stra\u00dfe", None),
        ("good", "good\u200b", None),
    ],
)
def test_the_template_that_is_named_makes_one_label_of_two(first: str, second: str, template: str | None) -> None:
    (sentence,) = look_alikes([first, second])
    found = re.search(r'`answer: "\{\{ (.*?) \}\}"`', sentence)
    assert (found and found[1]) == template
    if template is not None:
        source = f"{{{{ {template} }}}}"
        assert len({compiled(source).render({"label": label}) for label in (first, second)}) == 1


@pytest.mark.parametrize(
    ("first", "second", "difference"),
    [
        ("cafe\u0301", "caf\u00e9", "how letters are composed: U+0065 U+0301 and U+00E9"),
        ("Good", "good", "case: U+0047 and U+0067"),
        ("STRASSE", "stra\u00dfe", "case: U+0053 U+0054 U+0052 U+0041 U+0053 U+0053 U+0045 and"),
        ("good", "good\u200b", "invisible characters: nothing and U+200B"),
        ("good", "go\u200dod", "invisible characters: nothing and U+200D"),
        ("Not good", "not  good", "case and white space: U+004E U+006F U+0074 and U+006E"),
        ("not good", "not\u00a0good", "white space: U+0020 and U+00A0"),
        ("A1", "\uff211", "the form of their characters: U+0041 and U+FF21"),
        ("\u2764", "\u2764\ufe0f", "invisible characters: nothing and U+FE0F"),
    ],
)
def test_labels_that_look_alike_stay_two_and_are_pointed_out(first: str, second: str, difference: str) -> None:
    (sentence,) = look_alikes([first, "other", second])
    assert f"differ only in {difference}" in sentence
    assert all(repr(label) in sentence for label in (first, second))
    rows = [make_example(f"q{i}", (first, second)[i % 2]) for i in range(40)]
    task = make_task(train=rows, test=rows, labels=(first, second))
    check = check_task(task, Encoder(byte_level_bpe()), 2048)
    assert sentence in check.problems
    assert {count.label for count in check.labels} == {first, second}


def test_labels_that_can_be_told_apart_are_not_pointed_out() -> None:
    assert look_alikes(["good", "goods", "re open", "reopen", "\U0001f44d", "\U0001f44d\U0001f3fd"]) == []


def test_characters_of_a_label_that_nobody_sees_are_pointed_out_and_joiners_within_are_not() -> None:
    assert unseen_characters(["plain", SCRIPTS["Persian with a joiner"], SCRIPTS["an emoji family"]]) == []
    (sentence,) = unseen_characters(["\ufeffgood\u200d"])
    assert "'\\ufeffgood\\u200d' holds invisible characters: U+FEFF U+200D" in sentence


def test_what_is_wrong_with_thousands_of_labels_is_said_in_a_few_lines() -> None:
    labels = tuple(f"{word} {number}" for number in range(1_000) for word in ("label", "Label", "la\u200bbel"))
    check = check_task(make_task(labels=labels), Encoder(byte_level_bpe()), 2048)
    assert len(check.problems) < 20
    assert any(problem == f"{3_000 - MOST_NAMED:,} more labels are in no training row." for problem in check.problems)
    assert any(problem == f"{2_000 - MOST_NAMED:,} more labels look like another one." for problem in check.problems)
    assert any(
        problem == f"{1_000 - MOST_NAMED:,} more labels hold invisible characters." for problem in check.problems
    )


def test_an_instruction_that_lists_more_labels_than_the_context_holds_is_refused_and_pointed_out() -> None:
    labels = tuple(f"label {number}" for number in range(10_000))
    rows = [make_example(f"q{i}", labels[i]) for i in range(40)]
    task = make_task(train=rows, test=rows, labels=labels, instruction="One of: {{ labels | join(', ') }}")
    encoder = Encoder(byte_level_bpe())
    with pytest.raises(
        UserError, match=r"instruction of task 'toy' \(the task has 10,000 labels\) alone fills the context"
    ):
        fit_demonstrations(task, rows[:4], encoder, 2048, reserve=10)
    (sentence,) = [one for one in check_task(task, encoder, 2048).problems if one.startswith("The instruction alone")]
    assert "fills the context of 2,048" in sentence


def test_new_names_are_drawn_for_thousands_of_labels_or_refused() -> None:
    labels = tuple(f"label {number}" for number in range(10_000))
    task = make_task(train=[make_example(f"q{i}", label) for i, label in enumerate(labels)], labels=labels)
    settings = EpisodeSettings(rename_labels=1.0, sampling="balanced")
    with pytest.raises(UserError, match=r"labels of task 'toy'; expected at least 10,000 plain words .* found 1\."):
        require_replacement_words([make_task(labels=None), task], ["word", "label 1"])
    with pytest.raises(UserError, match="no training task has a closed set of labels"):
        require_replacement_words([make_task(labels=None)], ["word"])
    drawn = draw_episode(task, settings, sequence_rng(0, 0), [f"word{number}" for number in range(10_000)])
    assert len({next(drawn.examples).answer for _ in range(100)}) == 100


def test_words_of_scripts_with_marks_may_stand_in_for_labels() -> None:
    rows = [make_example("हिन्दी में 12 box. two_words caf\u00e9 cafe\u0301 a", "good")]
    found = sorted(plain_words(make_task(train=rows)))
    assert set(found) == {"हिन्दी", "में", "caf\u00e9", "cafe\u0301"}


def test_composed_and_decomposed_letters_are_other_tokens() -> None:
    encoder = Encoder(byte_level_bpe())
    text = SCRIPTS["composed letters"]
    assert encoder.segment_ids(text) != encoder.segment_ids(unicodedata.normalize("NFD", text))
