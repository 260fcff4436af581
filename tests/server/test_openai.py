"""OpenAI's official SDK, unchanged, against a server with a fake worker over a real connection."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from manyicl.client import Client
from manyicl.errors import UserError
from manyicl.server.app import create_app
from tests.server.fakes import BROKEN, TOO_LONG, FakeWorker, fake_services
from tests.server.running import running, running_fake


@pytest.fixture(name="served", scope="module")
def _served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, FakeWorker]]:
    with running_fake(tmp_path_factory.mktemp("openai") / "data") as (url, worker):
        with Client(url) as client:
            client.create_task("mood", [("what a film", "good"), ("so dull", "bad")], labels=("good", "bad"))
            client.create_task("so", [("a", "yes"), ("b", "no")], labels=("yes", "no"))
            client.create_task("stars", [("a", "1 star"), ("b", "2 stars"), ("c", "3 stars")], labels="from_train")
            client.create_task("shy", [("a", "x"), ("b", "y")], labels=("x", "y"), abstain_below=0.99)
            client.create_task("echo", [("a b", "A B"), ("c", "C")], max_answer_tokens=20)
            rows = [{"title": "t1", "text": "one", "label": "1"}, {"title": "t2", "text": "two", "label": "2"}]
            columns = {"query": "{{ title }}: {{ text }}", "answer": "{{ label }}"}
            client.create_task("columns", rows, labels=("1", "2"), **columns)  # type: ignore[arg-type]
        yield url, worker


@pytest.fixture(name="sdk")
def _sdk(served: tuple[str, FakeWorker]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served[0]}/v1", api_key="unused", max_retries=0) as sdk:
        yield sdk


def choice(*values: str | bool, name: str | None = None) -> Any:
    named = {} if name is None else {"name": name}
    choices = [{"value": value, "description": "ignored"} for value in values]
    return {"type": "choice", "instructions": "Which?", "choices": choices, **named}


def refusal_of(call: Any) -> openai.APIStatusError:
    with pytest.raises(openai.APIStatusError) as caught:
        call()
    return caught.value


# Decisions


def test_a_choice_is_answered_with_a_label_and_the_probabilities_of_all(sdk: openai.OpenAI) -> None:
    decision = sdk.decisions.create(model="mood", input="so dull", questions=[choice("good", "bad", name="mood")])
    (answer,) = decision.answers
    assert answer.type == "choice"
    assert (answer.choice, answer.name) == ("bad", "mood")
    assert [one.value for one in answer.probabilities] == ["good", "bad"]
    assert sum(one.probability for one in answer.probabilities) == pytest.approx(1)
    assert answer.confidence == max(one.probability for one in answer.probabilities) > 0.9
    assert decision.model == "mood@1"
    assert decision.usage.input_tokens == decision.usage.input_tokens_details.cached_tokens == 20
    assert decision.usage.output_tokens == 0


def test_several_questions_share_one_answer_of_the_model(sdk: openai.OpenAI, served: tuple[str, FakeWorker]) -> None:
    before = len(served[1].options)
    questions = [choice("1 star", "3 stars"), choice("3 stars", "2 stars", "1 star"), choice("2 stars", "1 star")]
    decision = sdk.decisions.create(model="stars", input="c", questions=questions)
    assert [answer.choice for answer in decision.answers if answer.type == "choice"] == [
        "3 stars",
        "3 stars",
        "2 stars",
    ]
    assert [answer.name for answer in decision.answers] == [None] * 3
    last = decision.answers[2]
    assert last.type == "choice"
    assert last.confidence == pytest.approx(0.5)
    assert len(served[1].options) == before + 1


def test_a_predicate_and_booleans_fit_a_task_that_answers_yes_or_no(sdk: openai.OpenAI) -> None:
    questions = [{"type": "predicate", "instructions": "Is it so?", "name": "so"}, choice(False, True)]
    decision = sdk.decisions.create(model="so", input="a", questions=questions)
    predicate, chosen = decision.answers
    assert predicate.type == "predicate"
    assert predicate.probability > 0.9
    assert chosen.type == "choice"
    assert chosen.choice is True


def test_levels_that_are_labels_have_an_expected_score(sdk: openai.OpenAI) -> None:
    levels = [{"label": "1 star"}, {"label": "2 stars"}, {"label": "3 stars", "description": "best"}]
    question: Any = {"type": "score", "instructions": "How good?", "levels": levels}
    (answer,) = sdk.decisions.create(model="stars", input="c", questions=[question]).answers
    assert answer.type == "score"
    assert [one.value for one in answer.probabilities] == [0, 1, 2]
    assert answer.score == pytest.approx(sum(one.value * one.probability for one in answer.probabilities))
    assert answer.score > 1.8
    assert answer.confidence == answer.probabilities[2].probability


def test_where_the_task_abstains_the_answer_is_a_refusal(sdk: openai.OpenAI) -> None:
    (answer,) = sdk.decisions.create(model="shy", input="a", questions=[choice("x", "y", name="q")]).answers
    assert (answer.type, answer.name) == ("refusal", "q")


@pytest.mark.parametrize(
    "content",
    [
        '{"title": "t2", "text": "two"}',
        [{"role": "user", "content": '{"title": "t2", "text": "two"}'}],
        [{"role": "user", "content": [{"type": "input_text", "text": '{"title": "t2", "text": "two"}'}]}],
        [{"role": "user", "content": [{"type": "input_json", "data": {"title": "t2", "text": "two"}}]}],
    ],
)
def test_a_task_of_several_columns_takes_an_object(sdk: openai.OpenAI, content: Any) -> None:
    (answer,) = sdk.decisions.create(model="columns@1", input=content, questions=[choice("1", "2")]).answers
    assert answer.type == "choice"
    assert answer.choice == "2"


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"questions": [choice("good", "superb")]}, "labels_do_not_fit", "questions.0.choices"),
        ({"questions": [choice("good", "bad"), choice("bad", "bad")]}, "labels_do_not_fit", "questions.1.choices"),
        ({"questions": [choice(True, False)]}, "labels_do_not_fit", "questions.0.choices"),
        ({"questions": [{"type": "predicate", "instructions": "?"}]}, "labels_do_not_fit", "questions.0.type"),
        ({"model": "echo"}, "no_labels", "model"),
        ({"model": "mood@one"}, "unknown_version", "model"),
        ({"model": "mood@9"}, "unknown_version", "model"),
        ({"model": "moody"}, "unknown_task", "model"),
        ({"questions": []}, "wrong_value", "questions"),
        ({"input": [{"role": "system", "content": "Be brief."}]}, "one_message_needed", "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "wrong_content",
            "input",
        ),
        ({"input": " "}, "empty_query", "input"),
        ({"input": TOO_LONG}, "query_too_long", "input"),
        ({"model": "columns", "input": "no object"}, "not_an_object", "input"),
        ({"extra_body": {"tools": []}}, "unknown_key", "tools"),
    ],
)
def test_what_does_not_fit_the_task_is_a_bad_request(sdk: openai.OpenAI, changes: Any, code: str, param: str) -> None:
    usual = {"model": "mood", "input": "so dull", "questions": [choice("good", "bad")]}
    error = refusal_of(lambda: sdk.decisions.create(**{**usual, **changes}))
    is_unknown = code.startswith("unknown_") and param == "model"
    assert isinstance(error, openai.NotFoundError if is_unknown else openai.BadRequestError)
    assert (error.code, error.param) == (code, param)
    assert error.type == ("not_found_error" if is_unknown else "invalid_request_error")


# Chat completions


def ask(text: str, **changes: Any) -> Any:
    return {"model": "echo", "messages": [{"role": "user", "content": text}], **changes}


def test_a_free_answer_is_a_completion(sdk: openai.OpenAI) -> None:
    completion = sdk.chat.completions.create(**ask("a b"))
    (answer,) = completion.choices
    assert (answer.message.content, answer.finish_reason, answer.message.role) == ("A B", "stop", "assistant")
    assert completion.model == "echo@1"
    assert completion.id.startswith("chatcmpl-")
    assert completion.usage is None


def test_a_completion_in_parts_adds_up_to_the_whole_one(sdk: openai.OpenAI) -> None:
    chunks = list(sdk.chat.completions.create(**ask("hello"), stream=True))
    assert "".join(one.choices[0].delta.content or "" for one in chunks) == "HELLO"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [one.choices[0].finish_reason for one in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({one.id for one in chunks}) == 1
    assert len(chunks) == 2 + len("HELLO")


def test_a_task_with_labels_answers_a_chat_with_a_label_whole_or_streamed(sdk: openai.OpenAI) -> None:
    asked = ask("so dull", model="mood", temperature=0)
    assert sdk.chat.completions.create(**asked).choices[0].message.content == "bad"
    parts = [one.choices[0].delta.content for one in sdk.chat.completions.create(**asked, stream=True)]
    assert "".join(filter(None, parts)) == "bad"
    message = sdk.chat.completions.create(**ask("a", model="shy")).choices[0].message
    assert message.content is None
    assert message.refusal is not None
    deltas = [one.choices[0].delta for one in sdk.chat.completions.create(**ask("a", model="shy"), stream=True)]
    assert any(delta.refusal for delta in deltas)


@pytest.mark.parametrize(
    ("changes", "sampling"),
    [
        ({}, None),
        ({"temperature": 0, "top_p": 0.5, "seed": 3}, None),
        ({"seed": 3}, None),
        ({"temperature": 0.7, "seed": 3}, (0.7, 3)),
    ],
)
def test_sampling_is_as_the_request_says_and_greedy_otherwise(
    sdk: openai.OpenAI, served: tuple[str, FakeWorker], changes: Any, sampling: tuple[float, int] | None
) -> None:
    sdk.chat.completions.create(**ask("a b", **changes))
    drawn = served[1].options[-1][0].get("sampling")
    assert (None if drawn is None else (drawn.temperature, drawn.seed)) == sampling


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        (
            {"messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "a"}]},
            "one_message_needed",
            "messages",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "unknown_key", "tools"),
        ({"n": 2}, "wrong_value", "n"),
        ({"stop": ["x"]}, "unknown_key", "stop"),
        ({"max_tokens": 19}, "conflicting_options", "max_tokens"),
        ({"max_completion_tokens": 1}, "conflicting_options", "max_completion_tokens"),
        ({"response_format": {"type": "json_object"}}, "wrong_value", "response_format.type"),
        ({"model": "mood", "temperature": 1.0}, "conflicting_options", "sampling"),
        ({"messages": [{"role": "user", "content": TOO_LONG}]}, "query_too_long", "messages"),
    ],
)
def test_what_would_be_lost_in_silence_is_refused(sdk: openai.OpenAI, changes: Any, code: str, param: str) -> None:
    error = refusal_of(lambda: sdk.chat.completions.create(**ask("a", **changes)))
    assert isinstance(error, openai.BadRequestError)
    assert (error.code, error.param) == (code, param)


def test_a_limit_that_the_task_keeps_anyway_is_accepted(sdk: openai.OpenAI) -> None:
    accepted: Any = {"max_tokens": 20, "n": 1, "user": "me", "presence_penalty": 0, "logprobs": False, "store": False}
    assert sdk.chat.completions.create(**ask("c", **accepted)).choices[0].message.content == "C"


def test_an_answer_that_fails_before_its_first_part_has_a_status(sdk: openai.OpenAI) -> None:
    error = refusal_of(lambda: list(sdk.chat.completions.create(**ask(TOO_LONG), stream=True)))
    assert isinstance(error, openai.BadRequestError)
    assert (error.code, error.param) == ("query_too_long", "messages")


# Models and errors


def test_tasks_are_models(sdk: openai.OpenAI) -> None:
    names = [model.id for model in sdk.models.list()]
    assert names == ["mood", "so", "stars", "shy", "echo", "columns"]
    assert sdk.models.retrieve("mood").id == "mood"
    assert sdk.models.retrieve("mood@1").id == "mood@1"
    for unknown in ("moody", "mood@7"):
        assert isinstance(refusal_of(lambda name=unknown: sdk.models.retrieve(name)), openai.NotFoundError)


def test_a_task_that_cannot_be_compiled_is_a_conflict(sdk: openai.OpenAI, served: tuple[str, FakeWorker]) -> None:
    with Client(served[0]) as client:
        task = client.create_task("failing", [("a", BROKEN), ("b", "y")], labels=(BROKEN, "y"))
        # A request that waits for the compilation hears its own mistake instead.
        with pytest.raises(UserError):
            task.wait()
        error = refusal_of(lambda: sdk.decisions.create(model="failing", input="a", questions=[choice(BROKEN, "y")]))
        task.delete()
    assert isinstance(error, openai.ConflictError)
    assert error.code == "version_failed"


def test_errors_have_the_shape_of_the_sdk_whatever_refuses_the_request(served: tuple[str, FakeWorker]) -> None:
    url = served[0]
    with httpx.Client(base_url=url) as http:
        refused = [
            http.post("/v1/decisions", content=b"{", headers={"Content-Type": "application/json"}),
            http.post("/v1/decisions", content=b"a", headers={"Content-Type": "text/plain"}),
            http.get("/v1/models", headers={"Host": "elsewhere.example"}),
            http.get("/v1/models", headers={"Origin": "https://elsewhere.example"}),
            http.get("/v1/decisions"),
            http.get("/v1/models/"),
        ]
        other = http.get("/v1/tasks/unknown")
    for response in refused:
        assert response.is_client_error
        assert response.headers["content-type"] == "application/json"
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    assert other.headers["content-type"] == "application/problem+json"


def test_keys_are_needed_where_the_server_has_keys_and_no_one_sees_tasks_of_others(tmp_path: Path) -> None:
    with fake_services(tmp_path / "data", has_keys=True) as services, running(create_app(services)) as url:
        assert services.keys is not None
        mine, _ = services.keys.create("me", "test", frozenset({"manage", "predict"}))
        others, _ = services.keys.create("other", "test", frozenset({"predict"}))
        with Client(url, mine) as client:
            client.create_task("mood", [("a", "good"), ("b", "bad")], labels=("good", "bad"))
        for key, error in ((others, openai.NotFoundError), ("mk_no_key", openai.AuthenticationError)):
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as sdk, pytest.raises(error):
                sdk.decisions.create(model="mood", input="a", questions=[choice("good", "bad")])
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as sdk, pytest.raises(error):
                sdk.chat.completions.create(model="mood", messages=[{"role": "user", "content": "a"}])
            with openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=0) as sdk, pytest.raises(error):
                sdk.models.retrieve("mood")
        with openai.OpenAI(base_url=f"{url}/v1", api_key=others) as sdk:
            assert not list(sdk.models.list())
