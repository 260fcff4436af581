"""`manyicl tasks list | check | show` on small tasks and a tokenizer made in place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import Qwen2Config
from typer.testing import CliRunner, Result

from manyicl.cli.episode_view import draw, spans_of
from manyicl.cli.task_encoder import character_encoder
from manyicl.cli.tasks import app
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.errors import UserError
from manyicl.model.manifest import Manifest
from tests.builders import byte_level_bpe, make_example


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    lines = [f"ticket number {i},{'bill paid' if i % 3 else 'bill'}\n" for i in range(200)]
    (folder / "tickets.csv").write_text("text,label\n" + "".join(lines))
    tokenizer = byte_level_bpe()
    tokenizer.save_pretrained(folder / "model")
    Qwen2Config(vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    return folder


def run(*arguments: object) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result


def test_list_names_family_labels_and_rows(folder: Path) -> None:
    output = run("list", f"{folder}/tickets.csv:text:label").output
    for word in ("tickets", "classification", "accuracy", "160", "40"):
        assert word in output


def test_list_shows_the_catalogue_without_loading_it() -> None:
    output = run("list").output
    for word in ("banking77", "hf:nyu-mll/glue cola", "summarization", "10,003", "3,080", "catalog:ag_news"):
        assert word in output
    assert "svamp" in run("list", "math").output
    assert "banking77" not in run("list", "math", "catalog:anli_*").output
    assert run("list", "anli_*").output.count("facebook/anli") == 3


def test_list_searches_the_catalogue_and_offers_the_nearest() -> None:
    output = run("list", "--search", "Voice Assistant").output
    assert "massive_intent" in output
    assert "2 tasks" in output
    assert "rte" in run("list", "nli", "--search", "entailment").output
    with pytest.raises(UserError, match="Did you mean 'nli'"):
        run("list", "nly")
    with pytest.raises(UserError, match=r"mentions 'bankin77'\. Did you mean 'banking77'"):
        run("list", "--search", "bankin77")


def test_list_says_what_stands_in_a_data_root_and_prefers_folders_to_families(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "svamp").mkdir()
    lines = run("list", "math", "--data-root", tmp_path).output.splitlines()
    assert ["yes" in line for line in lines if "svamp" in line or "gsm8k" in line] == [False, False, True]
    (tmp_path / "math").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"math: the folder holds no task\.yaml"):
        run("list", "math")
    with pytest.raises(UserError, match=r"--search looks through the catalogue\. Leave out 'math'"):
        run("list", "math", "--search", "numbers")


def test_check_reports_balance_lengths_and_shots(folder: Path) -> None:
    table = f"{folder}/tickets.csv:text:label"
    output = run("check", table, "--tokenizer", folder / "model", "--context", 512).output
    for word in ("Balance", "bill paid", "shots in 512", "'bill' begins 'bill paid'", "1 checked"):
        assert word in output


def test_check_counts_shots_in_all_positions_of_a_model_that_was_not_fine_tuned(folder: Path) -> None:
    output = run("check", f"{folder}/tickets.csv:text:label", "--model", folder / "model").output
    assert "shots in 32,768" in output


def test_check_asks_one_place_for_what_a_model_remembers(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("manyicl.model.load.read_manifest", lambda path: Manifest(max_context_tokens=600))
    output = run("check", f"{folder}/tickets.csv:text:label", "--model", folder / "model").output
    assert "shots in 32,768" in output  # as many as predict would use
    assert "The model was fine-tuned with up to 600 tokens, and takes 32,768; --context 600 counts" in output
    inside = run("check", f"{folder}/tickets.csv:text:label", "--model", folder / "model", "--context", 600).output
    assert "shots in 600" in inside
    assert "fine-tuned" not in inside


def test_check_counts_shots_in_the_positions_of_the_base_of_an_adapter(tmp_path: Path, folder: Path) -> None:
    adapter = tmp_path / "adapter"
    byte_level_bpe().save_pretrained(adapter)
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder / "model")}))
    Manifest(max_context_tokens=600, base=str(folder / "model")).write(adapter)
    assert "shots in 32,768" in run("check", f"{folder}/tickets.csv:text:label", "--model", adapter).output
    Manifest(max_context_tokens=600, base=str(tmp_path / "gone")).write(adapter)
    assert "shots in 600" in run("check", f"{folder}/tickets.csv:text:label", "--model", adapter).output


def test_check_names_rows_that_were_dropped_and_texts_with_two_labels(tmp_path: Path) -> None:
    rows = [f"ticket {i},{'billing' if i % 2 else 'login'}" for i in range(40)]
    rows += ["Refund please,billing", "unanswered,", "refund  PLEASE,login", "unanswered too,"]
    (tmp_path / "tickets.csv").write_text("\n".join(["text,label", *rows]))
    output = run("check", f"{tmp_path}/tickets.csv:text:label").output
    assert "Dropped: 2 (empty answer): tickets.csv:43, tickets.csv:45." in output
    sentence = "'Refund please' has 2 different answers: 'billing' in tickets.csv:42 and 'login' in tickets.csv:44."
    assert sentence in " ".join(output.split())
    (check,) = json.loads(run("check", f"{tmp_path}/tickets.csv:text:label", "--json").stdout)
    answers = {"billing": "tickets.csv:42", "login": "tickets.csv:44"}
    assert check["contradictions"] == [{"query": "Refund please", "answers": answers}]
    assert check["dropped_rows"] == {"empty answer": ["tickets.csv:43", "tickets.csv:45"]}


def test_check_of_a_table_alone_proposes_its_columns(tmp_path: Path) -> None:
    rows = [f'{i},c{i // 3},"Ticket {i};\nit is about something",{"ab"[i % 2]},{"xyz"[i % 3]}\n' for i in range(40)]
    table = tmp_path / "my tickets.csv"
    table.write_text("number,customer,body,priority,team\n" + "".join(rows))
    with pytest.raises(UserError) as caught:
        run("check", table)
    assert caught.value.code == "table_without_columns"
    assert f"as in '{table}:body:team', for queries from 'body', which has the longest texts" in str(caught.value)
    assert "the 3 labels of 'team' as answers. Labels are in 'priority', too." in str(caught.value)
    assert "classification" in run("check", f"{table}:body:team").output


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16"])
def test_the_proposal_names_the_encoding_where_it_needs_one(tmp_path: Path, encoding: str) -> None:
    rows = [f"Gerät {i} ist für Zoë kaputt;{('login', 'billing')[i % 2]}\n" for i in range(40)]
    table = tmp_path / "tickets.csv"
    table.write_bytes("".join(["text;team\n", *rows]).encode(encoding))
    with pytest.raises(UserError) as caught:
        run("check", table)
    assert caught.value.found == f"text that looks like {encoding}"
    named = f"{table}:text:team,encoding={encoding}"
    assert f"as in {named}, for queries" in str(caught.value)
    assert "billing" in run("check", named).output


def test_a_table_in_an_encoding_that_is_not_recognised_is_refused_for_that(tmp_path: Path) -> None:
    table = tmp_path / "tickets.csv"
    table.write_bytes("text,team\nпривет мир,x\n".encode("cp1251"))
    with pytest.raises(UserError) as caught:
        run("check", table)
    assert caught.value.code == "not_utf8"


def test_check_as_json_holds_every_figure(folder: Path) -> None:
    output = run("check", f"{folder}/tickets.csv:text:label", "--model", folder / "model", "--json").stdout
    (check,) = json.loads(output)
    assert (check["num_train"], check["num_test"]) == (160, 40)
    assert check["shots_that_fit"]["guaranteed"] > 0


def test_check_without_a_model_counts_characters_and_says_nothing_of_tokens(folder: Path) -> None:
    table = f"{folder}/tickets.csv:text:label"
    output = run("check", table).output
    for word in ("Balance", "bill paid", "query characters", "'bill' begins 'bill paid'", "1 checked", "--model"):
        assert word in output
    for word in ("joined", "shots in", "altered", "As tokens"):
        assert word not in output
    (check,) = json.loads(run("check", table, "--json").stdout)
    assert check["answer_characters"] == {"shortest": 6, "median": 11, "longest": 11}  # with the blank line
    assert check["problems"] == []
    assert not any("token" in key for key in check)
    with pytest.raises(UserError, match=r"--context is in tokens\. Name the model"):
        run("check", table, "--context", 100)


def test_show_marks_what_is_supervised(folder: Path) -> None:
    output = run("show", f"{folder}/tickets.csv:text:label", "--shots", 3, "--model", folder / "model").output
    assert output.count("«bill") == 3
    assert "3 answers" in output


def test_show_needs_no_model(folder: Path) -> None:
    output = run("show", f"{folder}/tickets.csv:text:label", "--shots", 3).output
    assert output.count("«bill") == 3
    assert "3 answers" in output
    assert "--model" in output


def test_help_ends_with_examples() -> None:
    for command in ("list", "check", "show"):
        assert "manyicl tasks" in run(command, "--help").output.split("Examples:")[1]


def test_an_episode_is_drawn_without_loss_and_coloured_where_supervised() -> None:
    encoder = Encoder(byte_level_bpe())
    examples = (make_example("日本語 🎉?", "café"), make_example("two\nlines", "ja"))
    episode = encoder.encode_episode(Episode("t", "Say.", examples))
    drawn = draw(spans_of(episode, encoder, by_token=True), with_marks=True)
    assert drawn.plain.replace("⏎", "").replace("»\n", "").replace("«", "") == encoder.decode(episode.token_ids)
    coloured = "".join(drawn.plain[span.start : span.end] for span in drawn.spans if "green" in str(span.style))
    assert coloured.replace("⏎", "") == "caféja"


def test_segments_and_tokens_of_an_episode_draw_the_same_text() -> None:
    encoder = Encoder(byte_level_bpe())
    episode = Episode("t", "Say.", (make_example("日本語 🎉?", "café"), make_example("two\nlines", "ja")))
    tokens = draw(spans_of(encoder.encode_episode(episode), encoder, by_token=True), with_marks=True)
    characters = character_encoder()
    segments = draw(spans_of(characters.encode_episode(episode), characters, by_token=False), with_marks=True)
    assert segments.plain == tokens.plain
    assert len(segments.spans) < len(tokens.spans)


def test_nano_writes_plain_text_too(tmp_path: Path) -> None:
    output = run("nano", tmp_path / "text", "--split", "text").output
    files = [tmp_path / "text" / name for name in ("replay.txt", "held_out.txt")]
    assert output.splitlines() == [str(file) for file in files]
    assert all(" ." in file.read_text(encoding="utf-8") for file in files)
