"""PROMPT.md: how a person sends the prompts that a model was taught to another engine, in plain facts.

Whatever can be known of this model is computed from its own tokenizer and format, not said in general.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from manyicl import __version__
from manyicl.episodes.chat_template import messages_of
from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import Episode
from manyicl.episodes.text_format import AnyFormat, ChatFormat, text_of
from manyicl.model.manifest import Manifest
from manyicl.tasks.task import Example, Query

GUIDE_FILE = "PROMPT.md"
# What the engine allows a free answer whose task says nothing; a test holds them equal.
MAX_ANSWER_TOKENS = 64

INSTRUCTION = "Is the review good or bad?"
DEMONSTRATIONS = tuple(
    Example(Query(text), answer, (answer,)) for text, answer in (("a fine film", "good"), ("never again", "bad"))
)
ASKED = "the music was fine"


@dataclass(frozen=True)
class GuideFacts:
    """What the guide says of a model beside its format.

    Attributes:
        folder_name: Name of the folder that the guide lies in.
        dtype: In which the weights are saved.
        precision: What happened to the weights on the way, one sentence.
        num_positions: How many the architecture allows; None if it does not say.
    """

    folder_name: str
    dtype: str
    precision: str
    num_positions: int | None


def prompt_guide(encoder: Encoder, manifest: Manifest | None, facts: GuideFacts) -> str:
    """Write the guide of one model.

    Args:
        encoder: Of the model's tokenizer and saved format.
        manifest: What the model remembers of its fine-tuning; None where it was not fine-tuned with manyicl.
        facts: Of the folder.
    """
    folder = shlex.quote(facts.folder_name)
    text, token_ids = example_prompt(encoder)
    origin = (
        "The format is the one that this model was fine-tuned with, from `manyicl.json`."
        if manifest
        else "This folder has no `manyicl.json`: the format is the default of `manyicl`, and nothing says that the "
        "model was fine-tuned with it."
    )
    return f"""# How to send a prompt to this model

Written by `manyicl export` {__version__}. {origin}
What is said of vLLM is read from its documentation and source; vLLM itself was not run.

## The text

Instruction, demonstrations and the query follow one another without anything between the pieces:

```text
{_pieces(encoder)}
```

{_meeting_points(encoder.format)}
Queries, answers and labels are spelled as the task's templates render them: `manyicl tasks show TASK` prints an
episode.

{_request(encoder, facts, text)}
- `max_tokens` must be stated, because vLLM's default is 16 here. `manyicl` allows {MAX_ANSWER_TOKENS}, or the task's
  `max_answer_tokens`. An answer with `finish_reason` `length` is cut off.
- `temperature` 0 takes the likeliest token each time, as `manyicl` does unless it is asked to sample. The default is
  what `generation_config.json` says, else 1.

## The server

```bash
vllm serve {folder} --enable-prefix-caching --generation-config vllm --dtype {facts.dtype}
```

- `--enable-prefix-caching` keeps the keys and values of what prompts begin with alike, in whole blocks of tokens.
  Instruction and demonstrations come first and the query last, so only the query is computed anew, as long as the
  demonstrations are the same and in the same order in every request.
- `--generation-config vllm` leaves aside the sampling defaults of `generation_config.json`; a `repetition_penalty`
  there would act at temperature 0, too.
- `--dtype auto`, the default, would serve float32 weights in half precision.
- {_lengths(manifest, facts)}

## Special tokens

{_special_tokens(encoder)}

## Exact token ids

`manyicl` encodes every piece by itself, in training as in its engine. A server encodes the whole text, and its
tokenizer may join characters of two pieces, or place a space marker elsewhere. It also turns a text such as `</s>` in
a query into the control token, where `manyicl` keeps the characters. {_comparison(encoder, text, token_ids)}
`manyicl tasks check TASK --model {folder}` says for how many examples of a task both are the same, in the
column `joined`.

To be exact, send `prompt` as a list of token ids, which vLLM takes as they are:

```python
{_code(facts.folder_name, _stop(encoder))}
```

`prefix` is the same for all queries of a task; only `query` changes.

## Closed label sets

`manyicl predict` scores every label of a closed set up to the end of an answer and returns the likeliest. A greedy
completion does something else: it takes the likeliest token after token, and may end in a text that is no label, or
that is not the likeliest. Holding the server to the labels (`structured_outputs` with `choice` in vLLM) keeps the
answer in the set and still chooses token after token. Abstention, calibration and label scores are not available this
way; this folder also works with `manyicl predict --model {folder}`.

## Weights

Saved in {facts.dtype}. {facts.precision}
"""


def example_prompt(encoder: Encoder) -> tuple[str, tuple[int, ...]]:
    """Return the guide's example up to where its answer begins: the text, and the ids that the engine would use."""
    asked = text_of(encoder.format.query(ASKED))
    text = encoder.joined_text(Episode("", INSTRUCTION, DEMONSTRATIONS)) + asked
    return text, (*encoder.encode_prefix(INSTRUCTION, DEMONSTRATIONS), *encoder.query_ids(ASKED))


def _pieces(encoder: Encoder) -> str:
    text_format = encoder.format
    opening, turn = ("instruction, blank line", "query, separator")
    if isinstance(text_format, ChatFormat):
        opening, turn = ("opening, instruction", "query, its turn's end")
    pieces = [(opening, text_of(text_format.preamble(INSTRUCTION)))]
    for shot, example in enumerate(DEMONSTRATIONS):
        query = text_format.query(example.query.text, encoder.preceding(INSTRUCTION, shot))
        pieces.append((turn, text_of(query)))
        pieces.append(("answer, its end", text_of(text_format.answer(example.answer))))
        if text_format.inter_turn:
            pieces.append(("opening of a turn", text_of(text_format.inter_turn)))
    pieces.append((turn, text_of(text_format.query(ASKED))))
    return "\n".join(f"{name:<25}{json.dumps(piece)}" for name, piece in pieces)


def _meeting_points(text_format: AnyFormat) -> str:
    """Say what stands where two pieces meet."""
    end = json.dumps(text_format.end_of_answer)
    if not isinstance(text_format, ChatFormat):
        return (
            f"The strings are JSON literals. After a query stands the separator `{json.dumps(text_format.separator)}`, "
            f"after an\nanswer its end `{end}`, after the instruction `{json.dumps(text_format.end_of_instruction)}`. "
            "A task without instruction begins with its first query. The prompt ends with the separator; the model\n"
            "writes the answer, then its end."
        )
    given = f", given {json.dumps(text_format.template_arguments)}" if text_format.template_arguments else ""
    place = "the system turn"
    if text_format.instruction_in == "first_turn":
        place = "the beginning of the first user turn, with a blank line behind it"
    return (
        f"The strings are JSON literals: what the chat template of this folder writes{given}, cut into pieces. Each\n"
        f"demonstration is a turn of the user and one of the assistant; the instruction is {place}.\nAn answer ends in "
        f"`{end}`."
    )


def _stop(encoder: Encoder) -> dict[str, list[str] | list[int]]:
    """Return where a server stops: at the text that ends an answer, or at its control token."""
    if encoder.answer_end_id is not None:
        return {"stop_token_ids": [encoder.answer_end_id]}
    return {"stop": [encoder.format.end_of_answer]}


def _why_this_stop(encoder: Encoder) -> str:
    if encoder.answer_end_id is not None:
        return f"- The stop is the control token `{encoder.format.end_of_answer}`, in which every answer ends."
    return (
        "- `stop` is the text that ends an answer; the text that comes back is the answer without it. Token ids would "
        "not do: a\n  tokenizer may write the last characters of an answer and its end as one token."
    )


def _request(encoder: Encoder, facts: GuideFacts, text: str) -> str:
    """Write the example as a request, and say why it is written so."""
    text_format = encoder.format
    limits = {"max_tokens": MAX_ANSWER_TOKENS, "temperature": 0, **_stop(encoder)}
    if not isinstance(text_format, ChatFormat):
        body = {"model": facts.folder_name, "prompt": text, **limits}
        return f"""The same as a request to `/v1/completions`:

```json
{json.dumps(body, indent=2)}
```

- `/v1/completions`, not `/v1/chat/completions`: the latter would wrap the text in a chat template.
{_why_this_stop(encoder)}"""
    turns = [(example.query.text, example.answer) for example in DEMONSTRATIONS]
    messages = messages_of(text_format, INSTRUCTION, [*turns, (ASKED, "")])[:-1]
    chat: dict[str, Any] = {"model": facts.folder_name, "messages": messages, **limits}
    if text_format.template_arguments:
        chat["chat_template_kwargs"] = text_format.template_arguments
    trimmed = ""
    if text_format.trimmed:
        trimmed = (
            f"\n- The template takes white space off the ends of {', '.join(text_format.trimmed)}, in some turns at "
            "least;\n  `manyicl` does so in all."
        )
    return f"""The same as a request to `/v1/chat/completions`:

```json
{json.dumps(chat, indent=2)}
```

- The stop in it is the end of a turn. The text that comes back is the answer; white space around it is none of
  it.{trimmed}"""


def _lengths(manifest: Manifest | None, facts: GuideFacts) -> str:
    """Say how long prompts may be, and how long they were in training."""
    allowed = f"The architecture allows {facts.num_positions:,} positions" if facts.num_positions else ""
    if manifest is None:
        return f"{allowed or 'The architecture does not say how many positions it allows'}."
    shots = f" and {manifest.max_trained_shots:,} demonstrations" if manifest.max_trained_shots is not None else ""
    trained = f"Training saw rows of at most {manifest.max_context_tokens:,} tokens{shots}"
    return f"{trained}. {allowed}." if allowed else f"{trained}."


def _special_tokens(encoder: Encoder) -> str:
    """Say what the tokenizer adds to a text by itself, and who adds it when."""
    tokenizer = encoder.tokenizer
    if not encoder.format.begins_with_bos:
        return (
            "The chat template itself writes all of them, and `/v1/chat/completions` adds none. A request to "
            "`/v1/completions` with the\ntext would need `add_special_tokens` false."
        )
    with_special = list(tokenizer("a")["input_ids"])
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    opening = list(encoder.bos_ids)
    if with_special != [*opening, *plain]:
        tokens = " ".join(tokenizer.convert_ids_to_tokens(with_special))
        first = f"`{tokenizer.bos_token}` alone" if opening else "nothing"
        return (
            f"The tokenizer by itself encodes `a` as `{tokens}`, and a server would do the same to a text; `manyicl` "
            f"adds {first}. Send token ids as below."
        )
    if opening:
        return (
            f"The tokenizer puts `{tokenizer.bos_token}` (id {opening[0]}) before a text. The server does so with a "
            f"text prompt (`add_special_tokens`, true by default), so the text must not begin with "
            f"`{tokenizer.bos_token}`: it would stand there twice. A list of ids is taken as it is; the ids made below "
            "begin with it once."
        )
    return (
        "The tokenizer adds no token to a text, and none stood before the rows in training; `add_special_tokens` makes "
        "no difference. The ids made below begin with the first piece."
    )


def _comparison(encoder: Encoder, text: str, token_ids: tuple[int, ...]) -> str:
    """Compare the example's pieces with what a server would make of its text."""
    server_ids = tuple(encoder.tokenizer(text, add_special_tokens=encoder.format.begins_with_bos)["input_ids"])
    if server_ids == token_ids:
        return f"For the example above both give the same {len(token_ids)} ids."
    same = next(
        (i for i, (a, b) in enumerate(zip(server_ids, token_ids, strict=False)) if a != b),
        min(len(server_ids), len(token_ids)),
    )
    return (
        f"For the example above they differ: {len(token_ids)} ids from the pieces, {len(server_ids)} from the text, "
        f"the first {same} of them the same."
    )


def _code(folder_name: str, stop: Mapping[str, object]) -> str:
    return f"""import json

from manyicl import load_task
from manyicl.episodes.encoding import Encoder
from manyicl.model.load import load_tokenizer, read_manifest

folder = {json.dumps(folder_name)}  # this folder, as seen from here
task = load_task("tickets.csv:text:label")  # your task
demonstrations = task.demonstrations(32, seed=0)

manifest = read_manifest(folder)
encoder = Encoder(load_tokenizer(folder), manifest.text_format if manifest else None)
instruction = task.instruction()
prefix = encoder.encode_prefix(instruction, demonstrations)
place = encoder.preceding(instruction, len(demonstrations))
query = encoder.query_ids(task.query({{"text": "I lost my card"}}).text, place)
body = {{
    "model": folder,
    "prompt": [*prefix, *query],
    "max_tokens": task.max_answer_tokens or {MAX_ANSWER_TOKENS},
    "temperature": 0,
    {json.dumps(stop)[1:-1]},
}}
print(json.dumps(body))"""
