"""Supervised answers per second against the loop of MetaICL: one supervised answer for all of its demonstrations.

    python -m benchmarks.training_metaicl --data-root DATA                      # 16 demonstrations, float32
    python -m benchmarks.training_metaicl --data-root DATA --shots 4 --bf16
    python -m benchmarks.training_metaicl --episodes 4 --context 512 --shots 4     # to try it out

Needs `manyicl models get smollm2`; without --data-root the starter tables of the package are used. Both sides train the
same LoRA (rank 16, all linear layers, no dropout) on the same episodes of so many demonstrations and one more example,
with the same optimizer. MetaICL's loop is written after Min et al. 2022 (arXiv:2110.15943) with plain transformers: a
batch of concatenated examples, padded to its longest (the original pads to 1,024 always), a padding mask, logits for
every position, and the mean loss over the tokens of the last answers. A second row makes logits for these positions
alone, which the original does not. manyicl packs the episodes into sequences and supervises every answer.

The aim is 0.9 times as many answers per second per demonstration: 14.4 times as many with 16.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from benchmarks.training_tasks import loaded_with_adapter, task_folders
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manyicl.episodes.encoding import Encoder
from manyicl.episodes.episode import EncodedEpisode
from manyicl.episodes.packed_sequence import PackedSequence, PackedSequences
from manyicl.episodes.sampling import EpisodeSettings
from manyicl.model.attention import ATTENTION
from manyicl.model.manifest import library_versions
from manyicl.tasks.files import load_task
from manyicl.training.batch import sequence_tensors
from manyicl.training.loss import sequence_loss
from manyicl.training.recipe import ObjectiveSettings

AIM_PER_SHOT = 0.9
COLUMNS = ("Loop", "Supervised answers/s", "Tokens/s, padding aside", "Padding", "Steps", "Seconds")
Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class Speed:
    """What one loop reached."""

    name: str
    num_answers: int
    num_tokens: int
    num_positions: int
    num_steps: int
    seconds: float

    @property
    def answers_per_second(self) -> float:
        """Supervised answers per second."""
        return self.num_answers / self.seconds

    def row(self) -> str:
        """Return the row of the table."""
        return (
            f"| {self.name} | {self.answers_per_second:.2f} | {self.num_tokens / self.seconds:,.0f} | "
            f"{1 - self.num_tokens / self.num_positions:.0%} | {self.num_steps} | {self.seconds:.1f} |"
        )


def whole_episodes(
    folders: Sequence[Path], arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerBase
) -> list[EncodedEpisode]:
    """Draw episodes that hold all their examples, from every task in turn as chance has it."""
    tasks = [load_task(folder, arguments.data_root) for folder in folders]
    settings = EpisodeSettings(examples_per_episode=arguments.shots + 1)
    size = {"max_context_tokens": arguments.context, "num_sequences": 100 * arguments.episodes}
    sequences = PackedSequences(tasks, Encoder(tokenizer), seed=0, episodes=settings, **size)
    episodes: list[EncodedEpisode] = []
    for sequence in sequences:
        episodes += [episode for episode in sequence.episodes if len(episode.answer_spans) == arguments.shots + 1]
        if len(episodes) >= arguments.episodes:
            return episodes[: arguments.episodes]
    raise SystemExit(f"{arguments.shots + 1} examples do not fit {arguments.context:,} tokens; raise --context.")


def packed(episodes: Sequence[EncodedEpisode], context: int) -> list[PackedSequence]:
    """Fill sequences with whole episodes in their order."""
    sequences: list[list[EncodedEpisode]] = [[]]
    for episode in episodes:
        used = sum(len(each.token_ids) for each in sequences[-1])
        if sequences[-1] and used + len(episode.token_ids) > context:
            sequences.append([])
        sequences[-1].append(episode)
    return [PackedSequence(tuple(each), context, 0, 0) for each in sequences]


def last_answer_loss(model: PreTrainedModel, episodes: Sequence[EncodedEpisode], *, all_logits: bool) -> Tensor:
    """Run a padded batch and return the mean loss over the tokens of the last answers."""
    longest = max(len(episode.token_ids) for episode in episodes)
    ids = torch.zeros(len(episodes), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    supervised = torch.zeros(len(episodes), longest - 1, dtype=torch.bool)
    for row, episode in enumerate(episodes):
        length, (start, end) = len(episode.token_ids), episode.answer_spans[-1]
        ids[row, :length] = torch.tensor(episode.token_ids)
        mask[row, :length] = 1
        supervised[row, start - 1 : end - 1] = True
    targets = ids[:, 1:][supervised]
    if all_logits:
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1][supervised]
    else:
        kept = supervised.any(dim=0).nonzero().flatten()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
        logits = logits[supervised[:, kept]]
    return F.cross_entropy(logits.float(), targets)


class Training:
    """One adapter and its optimizer."""

    def __init__(self, model: PreTrainedModel, *, bf16: bool) -> None:
        self.model, self.bf16 = model, bf16
        self.trained = [weights for weights in model.parameters() if weights.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5, fused=True)

    def seconds(self, losses: Sequence[Loss]) -> float:
        """Take a step per loss; the first has been taken once before, untimed."""
        self._step(losses[0])
        started = time.perf_counter()
        for loss in losses:
            self._step(loss)
        return time.perf_counter() - started

    def _step(self, loss: Loss) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()


def metaicl(training: Training, episodes: Sequence[EncodedEpisode], batch_size: int, *, all_logits: bool) -> Speed:
    """Time MetaICL's loop."""
    training.model.set_attn_implementation("sdpa")
    batches = [episodes[start : start + batch_size] for start in range(0, len(episodes), batch_size)]
    seconds = training.seconds(
        [partial(last_answer_loss, training.model, batch, all_logits=all_logits) for batch in batches]
    )
    num_positions = sum(len(batch) * max(len(each.token_ids) for each in batch) for batch in batches)
    num_tokens = sum(len(each.token_ids) for each in episodes)
    name = f"MetaICL, batch of {batch_size}" + ("" if all_logits else ", logits of the last answers only")
    return Speed(name, len(episodes), num_tokens, num_positions, len(batches), seconds)


def many_shot(training: Training, episodes: Sequence[EncodedEpisode], context: int) -> Speed:
    """Time packed sequences with all answers supervised."""
    training.model.set_attn_implementation(ATTENTION)
    batches = [sequence_tensors(sequence, ObjectiveSettings()) for sequence in packed(episodes, context)]
    losses = [partial(sequence_loss, training.model, batch, batch["weights"].sum()) for batch in batches]
    seconds = training.seconds(losses)
    num_tokens = sum(batch["input_ids"].shape[1] for batch in batches)
    num_answers = sum(batch["counts"].num_answers for batch in batches)
    return Speed("manyicl, packed, every answer", num_answers, num_tokens, num_tokens, len(batches), seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--model", default="builtin:smollm2")
    parser.add_argument("--shots", type=int, default=16, help="Demonstrations before the last answer.")
    parser.add_argument("--episodes", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--bf16", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = loaded_with_adapter(arguments.model)
    training = Training(model.train(), bf16=arguments.bf16)
    plain, _ = loaded_with_adapter(arguments.model, as_peft_computes=True)
    loop = Training(plain.train(), bf16=arguments.bf16)
    episodes = whole_episodes(task_folders(arguments.data_root)["mixture"], arguments, tokenizer)
    lengths = sorted(len(episode.token_ids) for episode in episodes)
    print(
        f"{arguments.model}, LoRA of rank 16, {'bfloat16 autocast' if arguments.bf16 else 'float32'}, "
        f"{arguments.threads} thread(s), {platform.processor() or platform.machine()}, {len(episodes)} episodes of "
        f"{arguments.shots + 1} examples, {lengths[0]:,} to {lengths[-1]:,} tokens, "
        + ", ".join(f"{name} {version}" for name, version in library_versions().items())
        + "\n"
    )
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}")
    ours = many_shot(training, episodes, arguments.context)
    print(ours.row(), flush=True)
    others = []
    for all_logits in (True, False):
        others.append(metaicl(loop, episodes, arguments.batch_size, all_logits=all_logits))
        print(others[-1].row(), flush=True)
    for other in others:
        ratio, aim = ours.answers_per_second / other.answers_per_second, AIM_PER_SHOT * arguments.shots
        print(f"\n{ratio:.1f} times the answers per second of {other.name} (aim {aim:.1f}: ", end="")
        print("reached)." if ratio >= aim else "MISSED).")


if __name__ == "__main__":
    main()
