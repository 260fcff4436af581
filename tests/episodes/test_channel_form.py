"""The channel form: each label before its query, the spans on the queries, the same tokens in training and engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from pydantic import ValidationError
from transformers import PreTrainedTokenizerFast

from manyicl.episodes.budget import fit_demonstrations, longest_answer, num_tokens_for_asking
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.episodes.sampling import EpisodeSettings
from manyicl.episodes.text_format import ChannelFormat, FormatSettings, PlainFormat, Preceding
from manyicl.episodes.token_store import StoredShots, TokenStore
from manyicl.errors import UserError
from manyicl.tasks.files import load_task
from manyicl.tasks.task_cache import load_known
from tests.builders import byte_level_bpe, make_example, make_task, sentencepiece_bpe
from tests.episodes.test_encoding import TOKENIZERS
from tests.episodes.test_token_store import RENAMED, write_task

# All of these words are known to every tokenizer.
EPISODE = Episode(
    "toy",
    "",
    tuple(
        make_example(query, answer)
        for query, answer in [
            ("the film was good", "fine"),
            ("a bad box", "bad and long"),
            ("the red box", "1"),
            ("the long box", "bad"),
            ("the music was fine", "fine and fine"),
        ]
    ),
)


@pytest.fixture(params=TOKENIZERS, name="encoder")
def _encoder(request: pytest.FixtureRequest) -> Encoder:
    return Encoder(TOKENIZERS[request.param](), ChannelFormat())


def test_a_label_comes_before_its_query_and_the_span_is_the_query_with_the_end_of_the_example(encoder: Encoder) -> None:
    encoded = encoder.encode_episode(EPISODE)
    end = len(encoder.bos_ids)
    for (start, stop), example in zip(encoded.answer_spans, EPISODE.examples, strict=True):
        assert encoder.decode(encoded.token_ids[end:start]).removeprefix(" ") == example.answer + "\n"
        assert encoder.decode(encoded.token_ids[start:stop]) == example.query.text + "\n\n"
        end = stop
    assert end == len(encoded.token_ids)


@pytest.mark.parametrize("instruction", ["", "the film and the music"])
def test_segments_equal_the_encoding_of_the_joined_text(encoder: Encoder, instruction: str) -> None:
    episode = Episode("toy", instruction, EPISODE.examples)
    encoded = encoder.encode_episode(episode).token_ids
    assert encoded == tuple(encoder.tokenizer(encoder.joined_text(episode))["input_ids"])
    shots = "".join(f"{example.answer}\n{example.query.text}\n\n" for example in EPISODE.examples)
    assert encoder.joined_text(episode) == (f"{instruction}\n\n" if instruction else "") + shots


@pytest.mark.parametrize("num_shots", [0, 1, 3])
@pytest.mark.parametrize("instruction", ["", "the film and the music"])
def test_training_tokens_equal_engine_tokens(encoder: Encoder, instruction: str, num_shots: int) -> None:
    examples = EPISODE.examples[: num_shots + 1]
    trained = encoder.encode_episode(Episode("toy", instruction, examples))
    preceding = encoder.preceding(instruction, num_shots)
    prefix_ids = encoder.encode_prefix(instruction, examples[:num_shots])
    label_ids = encoder.answer_ids(examples[-1].answer, preceding)
    query_ids = encoder.query_ids(examples[-1].query.text, preceding)
    assert (*prefix_ids, *label_ids, *query_ids) == trained.token_ids
    assert trained.answer_spans[-1] == (len(prefix_ids) + len(label_ids), len(trained.token_ids))
    assert sum(map(encoder.num_shot_tokens, examples[:1])) <= len(trained.token_ids)


def test_no_example_is_longer_than_what_is_kept_free_for_it(encoder: Encoder) -> None:
    labels = ("a", "the film was good", "bad")
    queries = [example.query for example in EPISODE.examples]
    task = make_task(train=[make_example("the film", "bad")], test=[], labels=labels)
    reserve = num_tokens_for_asking(task, encoder, 0, queries)
    for preceding in Preceding:
        lengths = [len(encoder.query_ids(query.text, preceding)) for query in queries]
        longest_label = max(len(encoder.answer_ids(label, preceding)) for label in labels)
        assert max(lengths) + longest_label <= reserve
        assert longest_label <= longest_answer(task, encoder, 0, queries)


def test_demonstrations_are_dropped_until_label_and_query_fit() -> None:
    encoder = Encoder(byte_level_bpe(), ChannelFormat())
    task = make_task()
    costs = sum(map(encoder.num_shot_tokens, task.train[:5]))
    fitting, num_dropped = fit_demonstrations(task, task.train[:9], encoder, costs + 20, 20)
    assert num_dropped == 9 - len(fitting) > 0
    assert len(encoder.encode_prefix("", fitting)) <= costs


def test_a_query_may_hold_the_end_of_an_example_which_is_never_generated() -> None:
    encoder = Encoder(byte_level_bpe(), ChannelFormat())
    examples = tuple(make_example(f"one\n\ntwo {i}", "good") for i in range(3))
    encoder.require_encodable(make_task(train=examples, test=[]))
    encoded = encoder.encode_episode(Episode("toy", "", examples))
    spans = [encoder.decode(encoded.token_ids[start:stop]) for start, stop in encoded.answer_spans]
    assert spans == [f"one\n\ntwo {i}\n\n" for i in range(3)]


def test_a_control_token_may_end_an_example() -> None:
    encoder = Encoder(byte_level_bpe(), ChannelFormat(end_of_answer="</s>"))
    encoded = encoder.encode_episode(Episode("toy", "", EPISODE.examples[:2]))
    (_, first_end), (_, end) = encoded.answer_spans
    token_id = encoder.tokenizer.convert_tokens_to_ids("</s>")
    assert [encoded.token_ids[first_end - 1], encoded.token_ids[end - 1]] == [token_id] * 2
    assert encoder.answer_end_id is None


def test_a_task_of_free_answers_is_refused_in_one_sentence() -> None:
    encoder = Encoder(byte_level_bpe(), ChannelFormat())
    with pytest.raises(UserError, match="free answers, and the channel form scores a query after each") as error:
        encoder.require_encodable(make_task("letters", labels=None, family="generation"))
    assert error.value.code == "free_answers_in_channel_form"
    encoder.require_encodable(make_task(labels=("good", "bad")))


def test_the_channel_form_has_no_chat_template_and_the_keys_of_the_plain_format() -> None:
    settings = FormatSettings(kind="channel", separator=" :: ", end_of_answer="###")
    expected = ChannelFormat(separator=" :: ", end_of_answer="###", end_is_control_token=False)
    assert settings.without_turns(()) == expected
    with pytest.raises(ValidationError, match="template belongs to kind: chat; found kind: channel"):
        FormatSettings(kind="channel", template=Path("t.jinja"))


def test_the_plain_format_is_described_as_ever() -> None:
    """Its description is part of hashes by which earlier records and tokens are found."""
    assert PlainFormat().model_dump_json() == (
        '{"separator":"\\n","end_of_answer":"\\n\\n","kind":"plain","end_is_control_token":null,'
        '"end_of_instruction":"\\n\\n"}'
    )
    assert list(ChannelFormat().model_dump()) == list(PlainFormat().model_dump())


@pytest.mark.parametrize("make_tokenizer", [byte_level_bpe, sentencepiece_bpe])
@pytest.mark.parametrize("rename", [0.0, 0.5])
def test_sequences_of_stored_tokens_equal_those_of_the_rows(
    tmp_path: Path, cache: Path, make_tokenizer: Callable[[], PreTrainedTokenizerFast], rename: float
) -> None:
    encoder = Encoder(make_tokenizer(), ChannelFormat())
    path = write_task(tmp_path / "renamed", RENAMED)
    settings = EpisodeSettings(examples_per_episode=(1, 7), rename_labels=rename)

    def sequences(shots: list[StoredShots] | None) -> PackedSequences:
        tasks = [load_known(path, None)] if shots else [load_task(path)]
        return PackedSequences(
            tasks, encoder, shots=shots, episodes=settings, max_context_tokens=300, num_sequences=9, seed=3
        )

    expected = list(sequences(None))
    for _ in range(2):  # written, then read
        shots = [one for one in TokenStore(encoder).shots_of([load_known(path, None)]) if isinstance(one, StoredShots)]
        assert len(shots) == 1
        assert list(sequences(shots)) == expected
    assert any(len(sequence.episodes) > 1 for sequence in expected)
