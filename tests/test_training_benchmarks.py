"""What the benchmarks of training compare is the same on both sides."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from benchmarks.training_metaicl import last_answer_loss, packed
from benchmarks.training_peers import Conversation, same_tokens
from transformers import LlamaConfig, LlamaForCausalLM

from manyicl.episodes.episode import EncodedEpisode
from manyicl.model.attention import ATTENTION
from manyicl.training.batch import sequence_tensors
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import ObjectiveSettings

EPISODES = (
    EncodedEpisode("a", tuple(range(5, 20)), ((3, 5), (9, 12))),
    EncodedEpisode("b", tuple(range(30, 39)), ((2, 4), (6, 8))),
)


@pytest.mark.parametrize("all_logits", [True, False])
def test_the_loop_of_metaicl_has_the_loss_of_the_objective_last_answer(all_logits: bool) -> None:
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 50}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, num_key_value_heads=1, **shape)).eval()
    model.set_attn_implementation("sdpa")
    theirs = last_answer_loss(model, EPISODES, all_logits=all_logits)
    model.set_attn_implementation(ATTENTION)
    (sequence,) = packed(EPISODES, context=64)
    batch = sequence_tensors(sequence, ObjectiveSettings(supervise="last_answer"))
    ours = sequence_loss(model, batch, batch["weights"].sum())
    assert torch.allclose(ours, theirs, rtol=1e-5)


def test_tokens_are_compared_to_the_end_of_the_last_answer_and_targets_everywhere() -> None:
    episode = EPISODES[0]
    conversation = Conversation([], episode)
    targets = [token if position in (3, 4, 9, 10, 11) else -100 for position, token in enumerate(episode.token_ids)]
    other_end = {"input_ids": [*episode.token_ids[:12], 49], "labels": targets[:13]}
    assert same_tokens(conversation, other_end).token_ids == (*episode.token_ids[:12], 49)
    for wrong in (
        {"input_ids": [*episode.token_ids[:11], 49, 49], "labels": targets[:13]},
        {"input_ids": [*episode.token_ids[:12], 49], "labels": [*targets[:12], 49]},
    ):
        with pytest.raises(SystemExit):
            same_tokens(conversation, wrong)
