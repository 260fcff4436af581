"""First weights that look things up: better than guessing before any training, and only where they fit."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from manyicl.errors import UserError
from manyicl.model.attention import ATTENTION, packed_arguments
from manyicl.model.initialization import structured_initialization

NUM_WORDS, NUM_FILLERS, LINE_BREAK, BLANK_LINE = 200, 30, 200, 201


def new_model(**changes: object) -> PreTrainedModel:
    settings: dict[str, object] = {
        "vocab_size": 202,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e8},
        "bos_token_id": None,
        "eos_token_id": None,
    }
    config = AutoConfig.for_model("llama", **{**settings, **changes})
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config, attn_implementation=ATTENTION)
    model.eval()
    return model


def list_episode(rng: random.Random, num_shots: int) -> tuple[list[int], list[int], list[int]]:
    """Draw shots of a list: a cue among three fillers, then what it is filed under; two cues for each of four answers.

    Returns:
        Tokens, the positions before answers, and the four answers.
    """
    words = rng.sample(range(NUM_FILLERS, NUM_WORDS), 12)
    answers, cues = words[:4], words[4:]
    ids: list[int] = []
    positions: list[int] = []
    for cue in rng.choices(range(8), k=num_shots):
        query = [cues[cue], *rng.sample(range(NUM_FILLERS), 3)]
        ids += [*rng.sample(query, len(query)), LINE_BREAK]
        positions.append(len(ids) - 1)
        ids += [answers[cue % 4], BLANK_LINE]
    return ids, positions, answers


def share_looked_up(model: PreTrainedModel, num_lists: int = 100) -> float:
    """Ask for the answer after 40 shots; guessing gives a quarter."""
    rng = random.Random("asked")
    right = 0
    for _ in range(num_lists):
        ids, positions, answers = list_episode(rng, 41)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[: positions[-1] + 1]]), use_cache=False).logits[0, -1]
        right += answers[int(logits[answers].argmax())] == ids[positions[-1] + 1]
    return right / num_lists


def train_on_lists(model: PreTrainedModel, num_tokens: int) -> None:
    rng = random.Random("trained")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    while num_tokens > 0:
        episodes = [list_episode(rng, 40) for _ in range(7)]
        lengths = [len(ids) for ids, _, _ in episodes]
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        input_ids = torch.tensor([[token for ids, _, _ in episodes for token in ids]])
        positions = torch.tensor([start + p for start, (_, own, _) in zip(starts, episodes, strict=True) for p in own])
        logits = model(
            input_ids=input_ids, use_cache=False, logits_to_keep=positions, **packed_arguments(lengths)
        ).logits[0]
        torch.nn.functional.cross_entropy(logits, input_ids[0, positions + 1]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        num_tokens -= input_ids.shape[1]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_structured_weights_learn_to_look_up_where_the_librarys_own_still_guess() -> None:
    """0.4M tokens of lists each; two minutes a model on one core."""
    shares = {}
    for initialization in ("default", "structured"):
        model = new_model()
        if initialization == "structured":
            structured_initialization(model, seed=0)
        train_on_lists(model, 400_000)
        shares[initialization] = share_looked_up(model)
    print(shares)
    assert shares["structured"] > shares["default"] + 0.2, shares


def test_the_seed_decides_every_weight() -> None:
    one, two, three = new_model(), new_model(), new_model()
    for model, seed in ((one, 0), (two, 0), (three, 1)):
        structured_initialization(model, seed)
    weights = [list(model.parameters()) for model in (one, two, three)]
    assert all(torch.equal(a, b) for a, b in zip(weights[0], weights[1], strict=True))
    assert not torch.equal(weights[0][0], weights[2][0])


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"attention_bias": False}, "attention_bias"),
        ({"num_key_value_heads": 2}, "as many key-value heads"),
        ({"num_attention_heads": 2, "num_key_value_heads": 2}, "at least 4"),
        ({"tie_word_embeddings": False}, "tied"),
        ({"head_dim": 16}, "head_dim"),
    ],
)
def test_a_model_of_another_shape_is_refused_with_what_is_needed(changes: dict[str, object], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        structured_initialization(new_model(**changes), seed=0)
