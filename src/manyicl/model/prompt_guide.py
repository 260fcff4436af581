"""PROMPT.md and prompt.json: how to send prompts in the model's trained format to another engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from manyicl.episodes.chat_template import messages_of
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.text_format import AnyFormat, ChatFormat, text_of
from manyicl.model.load import load_tokenizer
from manyicl.model.manifest import Manifest, library_versions
from manyicl.tasks.task import Example, Query, Task

GUIDE_FILE, PROMPT_FILE = "PROMPT.md", "prompt.json"
# What the engine allows a free answer whose task says nothing; a test holds them equal.
MAX_ANSWER_TOKENS = 64

INSTRUCTION = "Is the review good or bad?"
DEMONSTRATIONS = tuple(
    Example(Query(text), answer, (answer,)) for text, answer in (("a fine film", "good"), ("never again", "bad"))
)
QUERY = "the music was fine"


class ExportFacts(NamedTuple):
    """What prompt.json says of a model in addition to its format.

    Attributes:
        model: Name of the folder.
        dtype: Precision in which the weights are saved.
        precision: What happened to the weights on the way, in a sentence.
        num_positions: Positions that the architecture allows; None if it does not say.
    """

    model: str
    dtype: str
    precision: str
    num_positions: int | None


def write_guide(folder: Path, encoder: Encoder, manifest: Manifest | None, facts: ExportFacts) -> None:
    """Write PROMPT.md, the same for every model, and prompt.json, which a client can read, into an exported folder."""
    page = Path(__file__).with_name("prompt_page.md").read_text(encoding="utf-8")
    (folder / GUIDE_FILE).write_text(page, encoding="utf-8")
    content = json.dumps(prompt_facts(encoder, manifest, facts), indent=2, ensure_ascii=False)
    (folder / PROMPT_FILE).write_text(content + "\n", encoding="utf-8")


def prompt_facts(encoder: Encoder, manifest: Manifest | None, facts: ExportFacts) -> dict[str, Any]:
    """Return the content of prompt.json.

    Args:
        encoder: Encoder of the model's tokenizer and format.
        manifest: What the model remembers of its fine-tuning; None where it was not fine-tuned with manyicl.
        facts: Facts of the folder.
    """
    stop: dict[str, list[str] | list[int]] = {"stop": [encoder.format.end_of_answer]}
    if encoder.answer_end_id is not None:
        stop = {"stop_token_ids": [encoder.answer_end_id]}
    text, token_ids = example_prompt(encoder)
    names = encoder.tokenizer.convert_ids_to_tokens
    plain = encoder.tokenizer("a", add_special_tokens=False)["input_ids"]
    added = [token for token in encoder.tokenizer("a")["input_ids"] if token not in plain]
    asks = encoder.format.query(QUERY)
    segments = [segment.text for segment in (*encoder.episode_segments(_example_episode()), *asks)]
    example: dict[str, Any] = {
        "segments": segments,
        "text": text,
        "token_ids": token_ids,
        "text_token_ids": encoder.tokenizer(text, add_special_tokens=encoder.format.begins_with_bos)["input_ids"],
    }
    request: dict[str, Any] = {"model": facts.model, "prompt": text}
    if isinstance(encoder.format, ChatFormat):
        turns = [(example.query.text, example.answer) for example in DEMONSTRATIONS]
        example["messages"] = messages_of(encoder.format, INSTRUCTION, [*turns, (QUERY, "")])[:-1]
        request = {"model": facts.model, "messages": example["messages"]}
        if encoder.format.template_arguments:
            request["chat_template_kwargs"] = encoder.format.template_arguments
    return {
        "format_version": 1,
        **facts._asdict(),
        "fine_tuned": manifest is not None,
        "text_format": encoder.format.model_dump(),
        "stop": stop,
        "example": example,
        "request": {**request, "max_tokens": MAX_ANSWER_TOKENS, "temperature": 0, **stop},
        "special_tokens": {"tokenizer_adds": names(added), "manyicl_adds": names(list(encoder.bos_ids))},
        "max_context_tokens": manifest.max_context_tokens if manifest else None,
        "max_trained_shots": manifest.max_trained_shots if manifest else None,
        "versions": library_versions(),
    }


def example_prompt(encoder: Encoder) -> tuple[str, tuple[int, ...]]:
    """Return the example up to where its answer begins: the text, and the ids that the engine would use."""
    text = encoder.joined_text(_example_episode()) + text_of(encoder.format.query(QUERY))
    return text, (*encoder.encode_prefix(INSTRUCTION, DEMONSTRATIONS), *encoder.query_ids_uncached(QUERY))


def _example_episode() -> Episode:
    return Episode("", INSTRUCTION, DEMONSTRATIONS)


def completion_request(
    folder: str | Path, task: Task, demonstrations: Sequence[Example], query: Query
) -> dict[str, Any]:
    """Return the body of a request to ``/v1/completions`` with the very token ids that the engine would use.

    Args:
        folder: Exported folder, with its prompt.json.
        task: Task of the query.
        demonstrations: Demonstrations, in their order; how many fit is not checked.
        query: Query to be answered.
    """
    facts = json.loads(Path(folder, PROMPT_FILE).read_text(encoding="utf-8"))
    text_format: AnyFormat = TypeAdapter(AnyFormat).validate_python(facts["text_format"])
    encoder = Encoder(load_tokenizer(str(folder)), text_format)
    instruction = task.instruction()
    preceding = encoder.preceding(instruction, len(demonstrations))
    prefix = encoder.encode_prefix(instruction, demonstrations)
    return {
        "model": facts["model"],
        "prompt": [*prefix, *encoder.query_ids_uncached(query.text, preceding)],
        "max_tokens": task.max_answer_tokens or MAX_ANSWER_TOKENS,
        "temperature": 0,
        **facts["stop"],
    }
