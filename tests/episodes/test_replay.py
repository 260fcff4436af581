"""Replayed text in a packed sequence: a function of seed and index, at the share that was asked for."""

from __future__ import annotations

import hashlib
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import fmean

import pytest

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.general_text import GeneralText
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.episodes.replay import Replay, ReplaySettings
from manyicl.episodes.sampling import EpisodeSettings
from manyicl.errors import UserError
from tests.builders import byte_level_bpe, make_example, make_task, sentencepiece_bpe, word_level

TEXT = GeneralText.of("\n\n".join(f"the film {n} was good and the play {n} was bad" for n in range(90)), "a text")
ENCODER = Encoder(word_level())


def replay_of(
    share: float, segment_tokens: int | None = None, context: int = 200, encoder: Encoder = ENCODER
) -> Replay:
    settings = ReplaySettings(text=Path("unread"), share=share, segment_tokens=segment_tokens, weight=0.5)
    return Replay(settings, encoder, context, TEXT)


def source(
    replay: Replay | None = None, encoder: Encoder = ENCODER, seed: int = 3, context: int = 200
) -> PackedSequences:
    tasks = [make_task("one", instruction="good or bad"), make_task("two")]
    episodes = EpisodeSettings(examples_per_episode=(1, 7), rename_labels=0.5)
    return PackedSequences(
        tasks, encoder, max_context_tokens=context, num_sequences=400, seed=seed, episodes=episodes, replay=replay
    )


def test_without_replay_a_sequence_is_what_it_always_was() -> None:
    digest = hashlib.sha256()
    for sequence in (source()[index] for index in range(20)):
        digest.update(repr([(one.task_name, one.token_ids, one.answer_spans) for one in sequence.episodes]).encode())
        assert sequence.replayed == ()
    # Of the version before there was any, but that no label is replaced by a word that this tokenizer does not know.
    assert digest.hexdigest() == "88ba5b1ab8a079813acccd4da34857aa3b65f65504eaab19b8275d0bab870fbd"


def test_seed_and_index_alone_fix_the_text_of_a_sequence() -> None:
    sequences, again = source(replay_of(0.3, 20)), source(replay_of(0.3, 20))
    backwards = {index: again[index] for index in reversed(range(20))}
    assert all(sequences[index] == backwards[index] for index in range(20))
    assert sequences[0].replayed != sequences[1].replayed
    assert sequences[0].replayed != source(replay_of(0.3, 20), seed=4)[0].replayed


@pytest.mark.parametrize(("share", "segment_tokens"), [(0.3, 20), (0.05, 31), (0.9, 47), (0.5, 200), (0.1, None)])
def test_the_text_has_its_share_of_the_context(share: float, segment_tokens: int | None) -> None:
    sequences = list(source(replay_of(share, segment_tokens)))
    length = segment_tokens or 200
    assert {len(one.token_ids) for sequence in sequences for one in sequence.replayed} == {length}
    assert {one.weight for sequence in sequences for one in sequence.replayed} == {0.5}
    assert max(sequence.num_tokens for sequence in sequences) <= 200
    chance = share * 200 / length % 1  # that a sequence holds one piece more
    error = length * (chance * (1 - chance) / len(sequences)) ** 0.5
    assert abs(fmean(sequence.num_replayed_tokens for sequence in sequences) - share * 200) <= 4 * error + 1e-6
    counts = {len(sequence.replayed) for sequence in sequences}
    assert max(counts) - min(counts) <= 1


def test_episodes_are_drawn_as_they_are_without_text_as_far_as_they_fit() -> None:
    plain, mixed = source(), source(replay_of(0.05, 20))
    for index in range(40):
        before, after = plain[index].episodes, mixed[index].episodes
        if not mixed[index].replayed:
            assert after == before
        # The last episodes may hold fewer shots.
        assert after[0].token_ids[:20] == before[0].token_ids[:20]
    assert any(mixed[index].replayed for index in range(40))


@pytest.mark.parametrize(
    "encoder", [Encoder(byte_level_bpe()), Encoder(sentencepiece_bpe())], ids=["byte-level", "sentencepiece"]
)
def test_a_piece_is_a_stretch_of_the_text_that_begins_with_a_word(encoder: Encoder) -> None:
    circle = f"{TEXT.text}\n\n{TEXT.text}"
    wraps = 0
    for sequence in source(replay_of(0.5, 60, encoder=encoder), encoder):
        for segment in sequence.replayed:
            piece = encoder.decode(segment.token_ids[len(encoder.bos_ids) :]).strip()
            assert piece in circle
            assert circle[circle.index(piece) - 1].isspace() or circle.startswith(piece)
            wraps += piece not in TEXT.text
            assert segment.token_ids[: len(encoder.bos_ids)] == encoder.bos_ids
    assert wraps


def test_workers_draw_the_same_text() -> None:
    sequences = source(replay_of(0.3, 20))
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as workers:
        assert list(workers.map(sequences.__getitem__, range(3))) == [sequences[index] for index in range(3)]


def test_a_text_shorter_than_a_piece_is_refused_with_both_numbers() -> None:
    with pytest.raises(UserError) as error:
        Replay(ReplaySettings(text=Path("unread"), share=0.5), ENCODER, 2048, GeneralText.of("the film was", "a text"))
    assert (error.value.code, error.value.expected, error.value.found) == (
        "text_too_short",
        "at least 512 tokens",
        "3",
    )


def test_a_text_of_unknown_words_is_refused() -> None:
    text = GeneralText.of("lorem ipsum " * 50, "a text")
    with pytest.raises(UserError) as error:
        Replay(ReplaySettings(text=Path("unread"), share=0.5, segment_tokens=20), ENCODER, 200, text)
    assert (error.value.code, error.value.field) == ("unknown_words", "sequences.replay.text")


def test_a_task_must_fit_beside_the_text_that_every_sequence_holds() -> None:
    task = make_task(train=[make_example("the film " * 50, "good")])
    arguments = {"max_context_tokens": 200, "num_sequences": 3, "seed": 0}
    PackedSequences([task], ENCODER, replay=replay_of(0.4, 100), **arguments)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"expected at most 100 tokens"):
        PackedSequences([task], ENCODER, replay=replay_of(0.5, 100), **arguments)  # type: ignore[arg-type]
