from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedEpisode, Episode
from manyicl.episodes.packed_sequence import PackedSequence, PackedSequences
from manyicl.episodes.sampling import EpisodeSettings
from manyicl.training.batch import Collator, sequence_tensors
from manyicl.training.loss import answer_loss, sequence_loss
from manyicl.training.objective import target_weights
from manyicl.training.recipe import ObjectiveSettings
from tests.builders import make_example, make_task, tiny_model, word_level
from tests.reference.one_step import slow_loss, slow_weights

#          tokens:  0   1  2   3   4   5  6   7  8
EPISODE = EncodedEpisode("hand", (10, 11, 12, 13, 14, 15, 16, 17, 18), ((2, 4), (6, 9)))
OBJECTIVES = [
    ObjectiveSettings(),
    ObjectiveSettings(supervise="last_answer"),
    ObjectiveSettings(supervise="every_token"),
    ObjectiveSettings(weighting="answer"),
    ObjectiveSettings(supervise="last_answer", weighting="answer", context_weight=0.25),
]


@pytest.mark.parametrize(
    ("objective", "weights"),
    [
        (OBJECTIVES[0], [0, 0, 1, 1, 0, 0, 1, 1, 1]),
        (OBJECTIVES[1], [0, 0, 0, 0, 0, 0, 1, 1, 1]),
        (OBJECTIVES[2], [0, 1, 1, 1, 1, 1, 1, 1, 1]),
        (OBJECTIVES[3], [0, 0, 1 / 2, 1 / 2, 0, 0, 1 / 3, 1 / 3, 1 / 3]),
        (OBJECTIVES[4], [0, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 4, 1 / 3, 1 / 3, 1 / 3]),
    ],
)
def test_each_objective_weighs_the_targets_it_names(objective: ObjectiveSettings, weights: list[float]) -> None:
    assert target_weights(EPISODE, objective) == weights
    assert {place: weight for place, weight in enumerate(weights) if weight} == slow_weights(EPISODE, objective)


def test_an_answer_without_anything_before_it_loses_only_its_first_token() -> None:
    episode = EncodedEpisode("hand", (10, 11, 12), ((0, 3),))
    assert target_weights(episode, ObjectiveSettings()) == [0, 1, 1]


def test_the_supervised_position_stands_just_before_its_target_in_the_same_episode() -> None:
    sequence = PackedSequence((EPISODE, EPISODE), 20, 0, 0)
    batch = sequence_tensors(sequence, ObjectiveSettings(supervise="last_answer"))
    assert batch["supervised_positions"].tolist() == [5, 6, 7, 14, 15, 16]
    assert batch["targets"].tolist() == [16, 17, 18, 16, 17, 18]
    assert batch["counts"].num_answers == 2
    every = sequence_tensors(sequence, ObjectiveSettings(supervise="every_token"))
    assert 8 not in every["supervised_positions"].tolist(), "the last token of an episode predicts no other episode"
    assert batch["input_ids"].shape == batch["packed"]["position_ids"].shape == (1, 18)


def some_sequences() -> list[PackedSequence]:
    tasks = [make_task("one", instruction="good or bad"), make_task("two")]
    encoder = Encoder(word_level())
    source = PackedSequences(
        tasks,
        encoder,
        max_context_tokens=97,
        num_sequences=3,
        seed=1,
        episodes=EpisodeSettings(examples_per_episode=(1, 7)),
    )
    return list(source)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
@pytest.mark.parametrize("architecture", ["llama", "gemma2"])
def test_loss_and_gradients_of_packed_rows_are_those_of_each_episode_alone(
    architecture: str, objective: ObjectiveSettings
) -> None:
    sequences = some_sequences()
    assert all(len(sequence.episodes) > 1 for sequence in sequences)
    model = tiny_model(architecture, len(word_level()))
    expected = slow_loss(model, [episode for sequence in sequences for episode in sequence.episodes], objective)
    expected.backward()
    slow_gradients = [weights.grad.clone() for weights in model.parameters() if weights.grad is not None]
    model.zero_grad()
    batches = [Collator(objective)([sequence]) for sequence in sequences]
    total_weight = sum(float(batch["weights"].sum()) for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        part = sequence_loss(model, batch, total_weight)
        part.backward()
        loss += part.detach()
    assert float(loss) == pytest.approx(expected.item(), rel=1e-5)
    gradients = [weights.grad for weights in model.parameters() if weights.grad is not None]
    # Sums of some hundred float32 terms, in another order.
    scale = max(float(gradient.abs().max()) for gradient in slow_gradients)
    for gradient, slow in zip(gradients, slow_gradients, strict=True):
        assert gradient is not None
        assert (gradient - slow).abs().max() < 1e-5 * scale


@pytest.mark.parametrize("num_positions", [3, 31, 47])
def test_the_loss_is_a_weighted_sum_divided_once(num_positions: int) -> None:
    logits, targets = torch.randn(num_positions, 7), torch.randint(7, (num_positions,))
    weights = torch.rand(num_positions)
    slow = sum(-float(w) * float(F.log_softmax(x, dim=0)[t]) for x, t, w in zip(logits, targets, weights, strict=True))
    assert float(answer_loss(logits, targets, weights, 12.5)) == pytest.approx(slow / 12.5, rel=1e-5)


def test_nothing_supervised_gives_a_zero_that_is_connected_to_the_graph() -> None:
    episode = EncodedEpisode("hand", (1, 2, 3), ())
    batch = sequence_tensors(PackedSequence((episode,), 3, 0, 0), ObjectiveSettings())
    model = tiny_model()
    loss = sequence_loss(model, batch, 0.0)
    loss.backward()
    assert loss.item() == 0
    gradients: list[Tensor] = [weights.grad for weights in model.parameters() if weights.grad is not None]
    assert gradients
    assert not any(gradient.any() for gradient in gradients)


def test_logits_and_targets_of_different_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="logits cover 2 positions, targets 3, weights 3"):
        answer_loss(torch.zeros(2, 5), torch.zeros(3, dtype=torch.long), torch.ones(3), 3.0)


def test_an_answer_counts_the_same_in_a_long_and_a_short_episode() -> None:
    encoder = Encoder(word_level())
    objective = ObjectiveSettings(weighting="answer")
    examples = tuple(make_example(f"film {i}", "good" if i % 2 else "was good and long") for i in range(9))
    weights = target_weights(encoder.encode_episode(Episode("toy", "", examples)), objective)
    assert sum(weights) == pytest.approx(9)
