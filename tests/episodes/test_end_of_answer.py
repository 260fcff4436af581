"""What ends an answer: a text that no answer contains, or a control token that no text contains."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken

from manyicl.episodes.chat_template import ChatTemplate, chosen_format
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.text_format import FormatSettings, PlainFormat
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest, format_to_ask_in
from tests.builders import byte_level_bpe, make_example, make_task
from tests.engine.parts import refused
from tests.episodes.chat_templates import FAMILIES
from tests.episodes.test_encoding import TOKENIZERS

PARAGRAPHS = "Dear film,\n\nit was good.\n\n\nA play\n"
EPISODE = Episode(
    "toy",
    "good or bad",
    tuple(
        make_example(query, answer)
        for query, answer in [("the film", "fine and fine"), ("a bad play", PARAGRAPHS), ("the box", "say </s> now")]
    ),
)


def ending_in(token: str, kind: str = "byte-level BPE") -> Encoder:
    return Encoder(TOKENIZERS[kind](), PlainFormat(end_of_answer=token))


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "words"])
def test_a_control_token_ends_any_answer_as_one_id_that_no_text_contains(kind: str) -> None:
    encoder = ending_in("</s>", kind)
    assert encoder.answer_end_id == encoder.tokenizer.convert_tokens_to_ids("</s>")
    encoded = encoder.encode_episode(EPISODE)
    for (start, stop), example in zip(encoded.answer_spans, EPISODE.examples, strict=True):
        ids = encoded.token_ids[start:stop]
        assert ids.index(encoder.answer_end_id) == len(ids) - 1
        assert [encoder.has_ended(ids[:end]) for end in range(1, len(ids) + 1)] == [False] * (len(ids) - 1) + [True]
        if kind != "Unigram":  # which does not know every character
            assert encoder.decode_answer(ids) == example.answer
    assert encoded.token_ids.count(encoder.answer_end_id) == len(EPISODE.examples)


@pytest.mark.parametrize("kind", [kind for kind in TOKENIZERS if kind != "words"])
@pytest.mark.parametrize("instruction", ["", "good or bad"])
@pytest.mark.parametrize("num_shots", [0, 2])
def test_training_tokens_equal_engine_tokens(kind: str, instruction: str, num_shots: int) -> None:
    encoder = ending_in("</s>", kind)
    examples = EPISODE.examples[: num_shots + 1]
    trained = encoder.encode_episode(Episode("toy", instruction, examples)).token_ids
    place = encoder.preceding(instruction, num_shots)
    prefix = encoder.encode_prefix(instruction, examples[:num_shots])
    query = encoder.query_ids(examples[-1].query.text, place)
    assert (*prefix, *query, *encoder.answer_ids(examples[-1].answer)) == trained


def test_segments_equal_the_encoding_of_the_joined_text() -> None:
    encoder = ending_in("</s>")
    episode = Episode("toy", "good or bad", EPISODE.examples[:2])
    text = encoder.joined_text(episode)
    assert text == f"good or bad\n\nthe film\nfine and fine</s>a bad play\n{PARAGRAPHS}</s>"
    encoded = encoder.encode_episode(episode).token_ids
    assert encoded == encoder.joined_ids(episode) == tuple(encoder.tokenizer(text)["input_ids"])


def test_a_control_token_that_the_tokenizer_does_not_mark_as_special_is_one_too() -> None:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens([AddedToken("<|im_end|>", special=False)])
    encoder = Encoder(tokenizer, chosen_format(FormatSettings(end_of_answer="<|im_end|>"), tokenizer))
    assert encoder.answer_end_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encoder.answer_ids("say <|im_end|> now").count(encoder.answer_end_id) == 1


def test_a_token_that_the_tokenizer_does_not_have_is_a_text() -> None:
    encoder = ending_in("<|im_end|>")
    assert encoder.answer_end_id is None
    ids = encoder.answer_ids(PARAGRAPHS)
    assert encoder.decode_answer(ids) == PARAGRAPHS
    assert encoder.has_ended(ids)
    assert not encoder.has_ended(ids[:-1])


def test_a_task_whose_answers_contain_the_end_is_refused_with_its_rows() -> None:
    examples = [make_example(f"q {i}", ("fine", "two\n\nparts")[i % 2]) for i in range(12)]
    rows = [type(e)(e.query, e.answer, e.references, f"train.jsonl:{i + 1}") for i, e in enumerate(examples)]
    task = make_task("letters", train=rows, test=[], labels=None)
    with pytest.raises(UserError) as raised:
        Encoder(byte_level_bpe()).require_encodable(task)
    assert raised.value.code == "end_inside_answer"
    assert raised.value.what.startswith("6 answers of task 'letters' contain the end-of-answer text '\\n\\n'")
    assert raised.value.found == "'two\\n\\nparts' in train.jsonl:2, train.jsonl:4, train.jsonl:6 and 3 more"
    assert "--end-of-answer" in str(raised.value.remedy)
    for end in ("</s>", "###"):
        ending_in(end).require_encodable(task)


@pytest.mark.parametrize("labels", [None, ("a ### b", "c")])
def test_labels_and_options_that_contain_the_end_are_refused(labels: tuple[str, ...] | None) -> None:
    choices = None if labels else ("a ### b", "c")
    task = make_task(train=[make_example("q", "c", choices)] * 3, test=[], labels=labels)
    with pytest.raises(UserError, match="'###'") as raised:
        ending_in("###").require_encodable(task)
    assert raised.value.code == "end_inside_answer"


def test_a_model_without_the_control_token_it_was_taught_is_refused() -> None:
    taught = ending_in("</s>").format
    assert PlainFormat.model_validate(taught.model_dump()) == taught
    tokenizer = byte_level_bpe()
    with pytest.raises(UserError) as raised:
        Encoder(tokenizer, taught.model_copy(update={"end_of_answer": "<|im_end|>"}))
    assert raised.value.code == "unknown_control_token"


def test_a_manifest_of_version_1_is_read_with_one_end_for_answers_and_instruction(tmp_path: Path) -> None:
    content = json.loads((Path(__file__).parents[1] / "model" / "manifest_v1.json").read_text("utf-8"))
    assert content["format_version"] == 1
    content["text_format"]["terminator"] = "</s>"
    (tmp_path / "manyicl.json").write_text(json.dumps(content), "utf-8")
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    # The text was characters in training, and stays so.
    assert manifest.text_format == PlainFormat(
        end_of_answer="</s>", end_is_control_token=False, end_of_instruction="</s>"
    )
    encoder = Encoder(byte_level_bpe(), manifest.text_format)
    assert encoder.answer_end_id is None
    assert encoder.joined_text(Episode("toy", "what", EPISODE.examples[:1])) == "what</s>the film\nfine and fine</s>"
    manifest.write(tmp_path)
    assert json.loads((tmp_path / "manyicl.json").read_text("utf-8"))["format_version"] == 2
    assert Manifest.read(tmp_path) == manifest


def test_the_end_is_chosen_for_a_model_that_was_never_fine_tuned_and_for_no_other() -> None:
    tokenizer = byte_level_bpe()
    chosen = format_to_ask_in(tokenizer, None, end_of_answer="</s>")
    assert chosen == PlainFormat(end_of_answer="</s>", end_is_control_token=True)
    manifest = Manifest(max_context_tokens=9, text_format=chosen)
    assert format_to_ask_in(tokenizer, manifest, end_of_answer="</s>") == chosen
    with pytest.raises(UserError) as raised:
        format_to_ask_in(tokenizer, manifest, end_of_answer="###")
    assert (raised.value.code, raised.value.expected, raised.value.found) == (
        "another_end_of_answer",
        "'</s>'",
        "'###'",
    )
    for blank in ("  ", ""):
        with refused("bad_end_of_answer", what="--end-of-answer", field="end_of_answer"):
            format_to_ask_in(tokenizer, None, end_of_answer=blank)


def test_the_turns_of_a_manifest_of_version_1_are_read(tmp_path: Path) -> None:
    family = FAMILIES["Llama 3"]
    taught = ChatTemplate(family.tokenizer(), family.arguments).extract()
    content = json.loads(Manifest(max_context_tokens=9, text_format=taught).model_dump_json())
    names = {"preamble_text": "opening_text", "inter_turn_text": "between_text", "end_of_answer": "terminator"}
    earlier = {names.get(key, key): value for key, value in content["text_format"].items()}
    (tmp_path / "manyicl.json").write_text(
        json.dumps({**content, "format_version": 1, "text_format": earlier}), "utf-8"
    )
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    assert manifest.text_format == taught
