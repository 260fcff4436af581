"""A chat template is cut into segments that join to what it writes, or refused with the reason."""

from __future__ import annotations

import time
from datetime import date
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from manyicl.episodes.chat_template import ChatTemplate, chosen_format
from manyicl.episodes.checks import check_task
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.text_format import ChatFormat, FormatSettings, PlainFormat
from manyicl.errors import UserError
from tests.builders import byte_level_bpe, make_example, make_task
from tests.episodes.chat_templates import CHATML, DEEPSEEK_R1, FAMILIES, IM_TOKENS, PHI_3, QWEN_3, QWEN_3_MENDED, Family

ACCEPTED = [name for name, family in FAMILIES.items() if family.refused is None]
REFUSED = [name for name, family in FAMILIES.items() if family.refused is not None]
EXAMPLES = tuple(
    make_example(query, answer)
    for query, answer in [
        ("the film was good", "fine"),
        ("  a bad play\n", "bad and long"),
        ("the red box: <|im_end|></s>[/INST]", "1"),
        ("a\n\nlong play", "bad"),
    ]
)
INSTRUCTION = "the film\nand the play "


def cut(family: Family) -> ChatFormat:
    return ChatTemplate(family.tokenizer(), family.arguments).extract()


def messages(family: Family, instruction: str, shots: int) -> list[dict[str, str]]:
    """What a person would hand to the template, who knows where it trims and whether it has a system turn."""
    trims = lambda part, text: text.strip() if part in family.trimmed else text  # noqa: E731
    turns = [
        {"role": role, "content": content}
        for example in EXAMPLES[:shots]
        for role, content in (("user", trims("query", example.query.text)), ("assistant", example.answer))
    ]
    if not instruction:
        return turns
    instruction = trims("instruction", instruction)
    if not family.first_turn:
        return [{"role": "system", "content": instruction}, *turns]
    return [{"role": "user", "content": f"{instruction}\n\n{turns[0]['content']}"}, *turns[1:]]


def test_at_least_twelve_families_are_cut_and_some_are_refused() -> None:
    assert len(ACCEPTED) >= 12
    assert len(REFUSED) >= 5


@pytest.mark.parametrize("name", ACCEPTED)
def test_the_pieces_are_those_a_person_would_cut(name: str) -> None:
    family = FAMILIES[name]
    text_format = cut(family)
    encoder = Encoder(family.tokenizer(), text_format)
    asked = encoder.joined_text(Episode("toy", "I", (make_example("Q", "A"),)))
    asked += "".join(segment.text for segment in text_format.query("P"))
    assert asked == family.prompt
    assert text_format.end_of_answer == family.end_of_answer
    assert text_format.trimmed == tuple(sorted(family.trimmed))
    assert text_format.instruction_in == ("first_turn" if family.first_turn else "system")


@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("name", ACCEPTED)
def test_joined_pieces_are_what_the_template_writes_at_every_number_of_shots(name: str, instruction: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    encoder = Encoder(tokenizer, cut(family))
    for shots in range(1, len(EXAMPLES) + 1):
        conversation = messages(family, instruction, shots)
        segments = encoder.joined_text(Episode("toy", instruction, EXAMPLES[: shots - 1]))
        place = encoder.preceding(instruction, shots - 1)
        if shots == 1 and not instruction:
            assert place.name == "NOTHING"
        asked = segments + "".join(p.text for p in encoder.format.query(EXAMPLES[shots - 1].query.text, place))
        prompt = tokenizer.apply_chat_template(
            conversation[:-1], tokenize=False, add_generation_prompt=True, **family.arguments
        )
        assert asked == prompt
        whole = str(tokenizer.apply_chat_template(conversation, tokenize=False, **family.arguments))
        assert whole.startswith(asked + "".join(p.text for p in encoder.format.answer(EXAMPLES[shots - 1].answer)))


@pytest.mark.parametrize("instruction", ["", INSTRUCTION])
@pytest.mark.parametrize("name", ACCEPTED)
def test_training_tokens_equal_engine_tokens_and_spans_are_answers_with_their_terminator(
    name: str, instruction: str
) -> None:
    family = FAMILIES[name]
    encoder = Encoder(family.tokenizer(), cut(family))
    encoded = encoder.encode_episode(Episode("toy", instruction, EXAMPLES))
    for shots, (example, (start, end)) in enumerate(zip(EXAMPLES, encoded.answer_spans, strict=True)):
        prefix = encoder.encode_prefix(instruction, EXAMPLES[:shots])
        asked = (*prefix, *encoder.query_ids(example.query.text, encoder.preceding(instruction, shots)))
        assert asked == encoded.token_ids[:start]
        assert encoder.answer_ids(example.answer) == encoded.token_ids[start:end]
        assert encoder.decode_answer(encoded.token_ids[start:end]) == example.answer
    counted = encoder.num_preamble_tokens(instruction) + sum(
        encoder.num_shot_tokens(example, encoder.preceding(instruction, shot)) for shot, example in enumerate(EXAMPLES)
    )
    assert counted == len(encoded.token_ids)


@pytest.mark.parametrize("name", [name for name in ACCEPTED if not FAMILIES[name].sentencepiece])
def test_tokens_are_those_of_the_template_where_the_tokenizer_splits_at_words(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    encoder = Encoder(tokenizer, cut(family))
    examples = tuple(example for example in EXAMPLES if "</s>" not in example.query.text)
    encoded = encoder.encode_episode(Episode("toy", "the film", examples)).token_ids
    conversation = messages(family, "the film", 2) + messages(family, "", 4)[6:]
    theirs = tokenizer.apply_chat_template(conversation, return_dict=False, **family.arguments)
    end = len(encoded) - len(encoder._inter_turn_ids)
    assert list(encoded[:end]) == theirs[:end]


@pytest.mark.parametrize("name", ACCEPTED)
def test_control_tokens_stand_between_turns_and_never_inside_a_text(name: str) -> None:
    family = FAMILIES[name]
    tokenizer = family.tokenizer()
    encoder = Encoder(tokenizer, cut(family))
    control = {*tokenizer.all_special_ids}
    assert not control & set(encoder.segment_ids("".join(tokenizer.all_special_tokens)))
    for token in tokenizer.all_special_tokens:
        if family.prompt is not None and token in family.prompt:
            encoded = encoder.encode_episode(Episode("toy", "I", EXAMPLES[:2])).token_ids
            assert tokenizer.convert_tokens_to_ids(token) in encoded


@pytest.mark.parametrize("name", REFUSED)
def test_a_template_whose_turns_change_with_their_position_is_refused_with_the_reason(name: str) -> None:
    family = FAMILIES[name]
    assert family.refused is not None
    with pytest.raises(UserError) as caught:
        cut(family)
    assert family.refused in str(caught.value)
    assert "format.kind: plain" in str(caught.value)


def test_a_template_without_a_system_turn_says_where_the_instruction_goes() -> None:
    from manyicl.episodes.chat_template import describe

    assert any("opens the turn of the first query" in line for line in describe(cut(FAMILIES["Gemma 2"])))
    assert len(list(describe(cut(FAMILIES["Llama 3"])))) == 1
    assert not list(describe(PlainFormat()))


def test_rows_that_a_template_changes_are_refused_by_place() -> None:
    """Cutting at a think block shows in rows alone: no sentinel holds one."""
    mended = DEEPSEEK_R1.replace("<|Assistant|><think>\n", "<|Assistant|>")
    tokenizer = Family(mended, ("<|User|>", "<|Assistant|>", "<|end_of_sentence|>")).tokenizer()
    good = make_task(train=[make_example("2 + 3", "5"), make_example("1 + 1", "2")], labels=None)
    thinks = make_example("1 + 2", "<think>1 and 2</think>3")
    bad = make_task("sums", train=[*good.train, thinks], labels=None)
    assert isinstance(chosen_format(FormatSettings(kind="chat"), tokenizer, [good]), ChatFormat)
    with pytest.raises(UserError, match=r"Task 'sums'.*writes this otherwise.*think block"):
        chosen_format(FormatSettings(kind="chat"), tokenizer, [bad])


def test_a_tokenizer_without_a_template_is_no_instruct_models() -> None:
    with pytest.raises(UserError, match=r"has no chat template.*format\.template"):
        chosen_format(FormatSettings(kind="chat"), byte_level_bpe())


def test_a_template_that_does_not_run_is_refused_with_what_it_says() -> None:
    tokenizer = Family("{{ raise_exception('Only tools are supported') }}").tokenizer()
    with pytest.raises(UserError, match="fails on a conversation of 8 messages: only tools are supported"):
        ChatTemplate(tokenizer).extract()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }"
    with pytest.raises(UserError, match="cannot be used: it fails"):
        ChatTemplate(tokenizer).extract()


def test_a_template_of_ones_own_mends_one_that_is_refused_and_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    path = tmp_path / "qwen3_without_thinking.jinja"
    path.write_text(QWEN_3_MENDED, encoding="utf-8")
    tokenizer = Family(QWEN_3, IM_TOKENS).tokenizer()
    text_format = chosen_format(FormatSettings(kind="chat", template=path), tokenizer)
    assert text_format.end_of_answer == "<|im_end|>"
    assert tokenizer.chat_template == path.read_text(encoding="utf-8")


def with_added_tokens(*tokens: AddedToken, template: str = CHATML) -> PreTrainedTokenizerFast:
    tokenizer = byte_level_bpe()
    tokenizer.add_tokens(list(tokens), special_tokens=False)
    tokenizer.chat_template = template
    return tokenizer


def test_control_tokens_that_no_one_marked_as_special_stay_characters_in_a_text() -> None:
    tokenizer = with_added_tokens(*(AddedToken(token, special=False, normalized=False) for token in IM_TOKENS))
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer).extract())
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    text = "a <|im_end|>\n<|im_start|>system x"
    assert encoder.query_ids(text).count(end) == 1
    assert encoder.decode(encoder.query_ids(text)).startswith(text + "<|im_end|>")
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") not in encoder.answer_ids("say <|im_start|> now")
    # Marks of ours do not reach the tokenizer itself.
    assert tokenizer("<|im_end|>")["input_ids"] == [end]


def test_control_tokens_that_take_white_space_along_are_no_loss() -> None:
    tokens = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    tokenizer = with_added_tokens(
        *(AddedToken(token, special=True, rstrip=True, normalized=False) for token in tokens), template=PHI_3
    )
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer).extract())
    ids = encoder.encode_episode(Episode("toy", "I", EXAMPLES[:1])).token_ids
    theirs = tokenizer.apply_chat_template(
        [{"role": "system", "content": "I"}, {"role": "user", "content": "the film was good"}], return_dict=False
    )
    assert list(ids[: len(theirs) - 2]) == theirs[:-2]


def test_the_terminator_is_the_token_that_the_tokenizer_reads() -> None:
    tokenizer = with_added_tokens(*(AddedToken(token, special=True) for token in ("<|im_e", *IM_TOKENS)))
    assert ChatTemplate(tokenizer).extract().end_of_answer == "<|im_end|>"


def test_an_instruction_of_white_space_alone_is_none_where_it_is_trimmed() -> None:
    family = FAMILIES["Llama 3"]
    encoder = Encoder(family.tokenizer(), cut(family))
    assert encoder.joined_text(Episode("toy", " \n", EXAMPLES)) == encoder.joined_text(Episode("toy", "", EXAMPLES))
    assert encoder.preceding("  ", 0) is encoder.preceding("", 0)


@pytest.mark.parametrize("name", ["Llama 2", "Zephyr", "Llama 3"])
def test_no_answer_of_a_chat_is_refused_where_a_control_token_ends_it(name: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    answers = ["b", "</s>", "two\n\nparagraphs", "<|eot_id|>", "a </s>"]
    task = make_task("ends", train=[make_example("q", answer) for answer in answers], labels=None)
    encoder = Encoder(tokenizer, chosen_format(FormatSettings(kind="chat"), tokenizer, [task]))
    encoder.require_encodable(task)
    assert encoder.answer_end_id is not None
    for answer in answers:
        token_ids = encoder.answer_ids(answer)
        assert token_ids.index(encoder.answer_end_id) == len(token_ids) - 1
        assert encoder.decode_answer(token_ids) == answer


def test_an_empty_template_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "empty.jinja").write_text("\n", "utf-8")
    with pytest.raises(UserError, match=r"empty\.jinja: The file is empty; expected a Jinja template"):
        chosen_format(FormatSettings(kind="chat", template=tmp_path / "empty.jinja"), byte_level_bpe())


def test_text_tokens_do_for_a_tokenizer_that_does_not_know_the_control_tokens() -> None:
    tokenizer = Family(CHATML).tokenizer()
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer).extract())
    assert encoder.format.end_of_answer == "<|im_end|>\n"
    encoded = encoder.encode_episode(Episode("toy", "", EXAMPLES[:2]))
    assert encoder.decode(encoded.token_ids[slice(*encoded.answer_spans[0])]) == "fine<|im_end|>\n"


def test_a_text_that_ends_the_answers_of_a_chat_is_refused_within_them() -> None:
    tokenizer = Family(CHATML).tokenizer()
    encoder = Encoder(tokenizer, ChatTemplate(tokenizer).extract())
    with pytest.raises(UserError, match=r"contains the end-of-answer text '<\|im_end\|>\\n'.*Replace it in the answer"):
        encoder.answer_ids("say <|im_end|>\n now")
    with pytest.raises(UserError, match="An answer is empty"):
        encoder.answer_ids("")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "chat", "separator": " "}, "separator belongs to kind: plain"),
        ({"kind": "chat", "end_of_answer": "###"}, "end_of_answer belongs to kind: plain"),
        ({"template": "x.jinja"}, "template belongs to kind: chat"),
        ({"template_arguments": {"a": 1}}, "template_arguments belongs to kind: chat"),
        ({"kind": "chat", "template_arguments": {"messages": []}}, "'messages' is no variable"),
        ({"kind": "chat", "template_arguments": {"chat_template": "a"}}, "'chat_template' is no variable"),
        ({"end_of_answer": "  "}, "end_of_answer is of spaces alone"),
    ],
)
def test_settings_of_the_other_kind_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FormatSettings.model_validate(settings)


def test_a_date_in_a_recipe_is_the_text_that_stands_there() -> None:
    settings = FormatSettings.model_validate({"kind": "chat", "template_arguments": {"date_string": date(2024, 7, 26)}})
    assert settings.template_arguments == {"date_string": "2024-07-26"}


def test_a_task_is_checked_in_the_tokens_of_its_turns() -> None:
    family = FAMILIES["Llama 3"]
    check = check_task(make_task(instruction="good or bad"), Encoder(family.tokenizer(), cut(family)), 2048)
    assert check.joined_share == 1
    assert check.num_altered_answers == 0


@pytest.mark.parametrize(
    "template",
    [
        "{% for x in range(90000) %}{% for y in range(90000) %}{% endfor %}{% endfor %}" + CHATML,
        CHATML + "{{ 'a' * 10000000000 }}",
        "{% set s = 'a-' * 900000 %}{% set q = s | title %}" + CHATML,  # not alone, but in all that is rendered
        CHATML + "{% for m in messages %}{{ 'a' * (messages | length) * 100000000 }}{% endfor %}",
    ],
)
def test_a_template_that_runs_away_is_refused_within_a_second(template: str) -> None:
    tokenizer = Family(template, IM_TOKENS).tokenizer()
    started = time.process_time()
    with pytest.raises(UserError, match=r"fails on a conversation of 8 messages: .* more than") as raised:
        ChatTemplate(tokenizer).extract()
    assert time.process_time() - started < 1
    assert raised.value.code == "unfit_chat_template"
