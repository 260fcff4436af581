"""A sequence is a function of seed and index, holds whole shots, and leaves little of its context unused."""

from __future__ import annotations

import multiprocessing
import random
from concurrent.futures import ProcessPoolExecutor

import pytest

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.episodes.sampling import EpisodeSettings
from manyicl.errors import UserError
from manyicl.tasks.task import Task
from tests.builders import byte_level_bpe, make_example, make_task


@pytest.fixture(name="encoder", scope="module")
def _encoder() -> Encoder:
    return Encoder(byte_level_bpe())


def mixed_tasks() -> list[Task]:
    """Short labels, longer answers and long documents together."""
    rng = random.Random(0)
    words = ["the", "film", "was", "good", "and", "a", "bad", "play", "long", "one", "red", "box", "door", "fine"]

    def text(least: int, most: int) -> str:
        return " ".join(rng.choices(words, k=rng.randint(least, most)))

    return [
        make_task("short"),
        make_task("answers", [make_example(text(5, 20), text(3, 9)) for _ in range(50)], [], labels=None),
        make_task("documents", [make_example(text(40, 80), text(5, 12)) for _ in range(50)], [], labels=None),
    ]


def source(encoder: Encoder, tasks: list[Task], **changes: object) -> PackedSequences:
    settings: dict[str, object] = {"max_context_tokens": 1024, "num_sequences": 30, "seed": 0}
    return PackedSequences(tasks, encoder, **{**settings, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("wanted", ["fill", 8, (1, 32)])
def test_rows_fill_their_context_but_for_five_percent(encoder: Encoder, wanted: object) -> None:
    sequences = source(
        encoder, mixed_tasks(), episodes=EpisodeSettings.model_validate({"examples_per_episode": wanted})
    )
    unused = [sequences[i].unused_share for i in range(len(sequences))]
    assert min(unused) >= 0
    assert sum(unused) / len(unused) < 0.05


@pytest.mark.parametrize("max_context_tokens", [150, 200, 250, 400])
def test_labels_keep_their_names_where_longer_ones_would_leave_no_room(
    encoder: Encoder, max_context_tokens: int
) -> None:
    labels = tuple(f"l{number}" for number in range(20))
    rows = [make_example(f"box {number} extraordinarily", labels[number % 20]) for number in range(200)]
    words = [make_example(f"{'incomprehensible'[: 6 + n % 10]}{chr(97 + n % 26)}", "l0") for n in range(150)]
    task = make_task(train=[*words, *rows], labels=labels, instruction="One of: {{ labels | join(', ') }}")
    settings = EpisodeSettings(rename_labels=1.0)
    sequences = source(encoder, [task], episodes=settings, max_context_tokens=max_context_tokens)
    assert all(sequences[index].episodes for index in range(len(sequences)))
    if max_context_tokens == 400:
        answers = {
            encoder.decode(one.token_ids[slice(*span)]) for one in sequences[0].episodes for span in one.answer_spans
        }
        assert not answers & {f"{label}\n\n" for label in labels}


def test_seed_and_index_alone_fix_a_row(encoder: Encoder) -> None:
    sequences, again = source(encoder, mixed_tasks()), source(encoder, mixed_tasks())
    backwards = {i: again[i] for i in reversed(range(10))}
    assert all(sequences[i] == backwards[i] for i in range(10))
    assert sequences[0] != sequences[1]
    assert sequences[0] != source(encoder, mixed_tasks(), seed=1)[0]


def test_a_row_does_not_depend_on_how_many_there_are(encoder: Encoder) -> None:
    assert source(encoder, mixed_tasks(), num_sequences=3)[2] == source(encoder, mixed_tasks(), num_sequences=300)[2]


def test_episodes_hold_whole_shots_that_end_with_the_terminator(encoder: Encoder) -> None:
    sequence = source(encoder, mixed_tasks())[0]
    for episode in sequence.episodes:
        assert episode.answer_spans[-1][1] == len(episode.token_ids)
        assert encoder.decode(episode.token_ids[-1:]).endswith("\n")


def test_fixed_shots_are_kept_and_what_did_not_fit_is_counted(encoder: Encoder) -> None:
    sequences = source(encoder, [make_task()], episodes=EpisodeSettings(examples_per_episode=7), max_context_tokens=300)
    sequence = sequences[0]
    counts = [len(episode.answer_spans) for episode in sequence.episodes]
    assert counts[0] == 7
    assert all(count <= 7 for count in counts)
    assert sequence.num_shots_dropped == sum(7 - count for count in counts)


def test_shots_that_a_task_does_not_have_are_not_dropped(encoder: Encoder) -> None:
    task = make_task(train=make_task().train[:5])
    episodes = EpisodeSettings(examples_per_episode=64)
    sequence = source(encoder, [task], episodes=episodes, max_context_tokens=100)[0]
    kept = [len(episode.answer_spans) for episode in sequence.episodes]
    assert 0 < kept[-1] < 5
    assert sequence.num_shots_dropped == sum(5 - count for count in kept)


def test_an_example_longer_than_the_context_is_passed_over_and_counted(encoder: Encoder) -> None:
    long = make_example("the film " * 200, "good")
    task = make_task(train=[long, *make_task().train[:3]])
    sequence = source(encoder, [task], max_context_tokens=100)[0]
    assert sequence.num_shots_too_long >= 1
    assert sequence.num_tokens <= 100


def test_a_task_of_which_nothing_fits_is_refused_with_both_numbers(encoder: Encoder) -> None:
    task = make_task(train=[make_example("the film " * 200, "good")])
    with pytest.raises(UserError, match=r"expected at most 100 tokens \(max_context_tokens\), found \d+"):
        source(encoder, [task], max_context_tokens=100)


@pytest.mark.parametrize("method", ["spawn", pytest.param("forkserver", marks=pytest.mark.slow)])
def test_workers_build_the_same_sequences_however_they_are_started(encoder: Encoder, method: str) -> None:
    settings = EpisodeSettings(sampling="balanced", rename_labels=0.5)
    sequences = source(encoder, [make_task("a"), make_task("b")], episodes=settings)
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as workers:
        assert list(workers.map(sequences.__getitem__, range(3))) == [sequences[index] for index in range(3)]


def test_a_source_without_tasks_is_refused(encoder: Encoder) -> None:
    with pytest.raises(UserError, match="no training task"):
        source(encoder, [])


def test_indices_outside_the_source_are_refused(encoder: Encoder) -> None:
    with pytest.raises(IndexError):
        source(encoder, mixed_tasks())[30]
