"""Training side by side with TRL's SFTTrainer: same model, same adapter, same demonstrations, same precision.

TRL lives in an environment of its own, made once:

    python3.11 -m venv trl-venv
    trl-venv/bin/pip install torch==2.13.0
    trl-venv/bin/pip install 'trl==1.16.*' peft==0.21.2 transformers==5.23.0

Then, with the base in the cache (`manyicl models get smollm2`), from the root of the checkout:

    python -m benchmarks.training_peers --trl trl-venv/bin/python --data-root DATA                   # the mixture
    python -m benchmarks.training_peers --trl trl-venv/bin/python --data-root DATA --workloads cola dialogsum
    python -m benchmarks.training_peers --trl trl-venv/bin/python --data-root DATA --bf16
    python -m benchmarks.training_peers --trl trl-venv/bin/python --data-root DATA --by-default      # see below
    python -m benchmarks.training_peers --trl trl-venv/bin/python --context 512 --steps 1            # to try it out

First the losses: conversations with the tokens that both make of them, through the same base and the same adapter,
whose weights are random so that it has an effect. A difference beyond rounding ends the benchmark with 1.

Then speed. manyicl is `manyicl train` with as many threads as TRL. Its packed sequences are drawn first; the very
episodes in them become conversations for TRL, with the instruction as the system turn, every query a user turn and
every answer an assistant turn, loss on assistant turns. TRL runs with each of the settings named by --settings, its own
default among them, and the best of them counts. Its isolated packing is made for FlashAttention; without it, on a CPU,
transformers isolates the conversations by a dense mask; its loss is printed, and it is measured too. Both sides keep
activations (SFTTrainer would recompute them by default, which is slower and saves memory: --recompute does so on both
sides), and nothing is cut off. Every run is a process of its own and takes a step that is not timed first. Peak memory
is that of all its processes, sampled from outside. Useful tokens are those up to the end of a conversation's last
answer; padding is not counted.

With --by-default no number of threads is given: `manyicl train` starts as many processes as it chooses, and SFTTrainer
runs in one process with the threads that torch takes. A user who knows better would start TRL with torchrun, so it also
runs with one process of one thread per core, whose gradients gloo averages, on the same conversations. A step of
manyicl takes one sequence per core. Conversations that TRL repeats so that its processes have equally many
count as useful. The aim is checked against TRL's fastest row.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
import yaml
from benchmarks.training_tasks import loaded_with_adapter, task_folders
from transformers import PreTrainedModel

from manyicl.episodes.episode import EncodedEpisode
from manyicl.episodes.packed_sequence import PackedSequence
from manyicl.model.load import load_tokenizer
from manyicl.model.manifest import Manifest, library_versions
from manyicl.model.reference import resolve_reference
from manyicl.training.batch import sequence_tensors
from manyicl.training.loss import TOLERANCE, sequence_loss
from manyicl.training.recipe import ObjectiveSettings, Recipe
from manyicl.training.recipe_tasks import load_recipe_tasks
from manyicl.training.train import packed_sequences

ROOT = Path(__file__).parent.parent
NUM_CORES = psutil.cpu_count(logical=False) or 1
SECONDS_BETWEEN_SAMPLES = 0.25
AIM_ON_THE_MIXTURE, AIM_ON_A_TASK = 1.5, 1.0
COLUMNS = ("Run", "Useful tokens/s", "Supervised answers/s", "Padding", "Seconds", "Peak memory, GiB")
TURN = re.compile(r"<\|im_start\|>(system|user|assistant)\n(.*?)<\|im_end\|>", re.DOTALL)
NUM_COMPARED = 3
# The template of ChatML models whose default system turn never appears here, with the marks that TRL asks for around
# what the assistant says. TRL brings such templates for some models; its tokens are compared with ours below.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# SFTTrainer's batch of 8 by default; conversations of similar length together; one at a time, which pads nothing.
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "default": {"per_device_train_batch_size": 8},
    "grouped": {"per_device_train_batch_size": 8, "train_sampling_strategy": "group_by_length"},
    "single": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    "packed": {"per_device_train_batch_size": 1, "packing": True},
}


# DDP would look at each step which weights take part; here all do.
TOGETHER: Mapping[str, Any] = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False}


@dataclass(frozen=True)
class Start:
    """How a side is started.

    Attributes:
        num_threads: CPU threads of each process; None for what it takes by itself.
        num_processes: Processes that torchrun starts; 1 starts none.
    """

    num_threads: int | None
    num_processes: int = 1

    @property
    def environment(self) -> dict[str, str]:
        """What the environment says of threads."""
        return {} if self.num_threads is None else {"OMP_NUM_THREADS": str(self.num_threads)}

    def __str__(self) -> str:
        threads = "as it starts" if self.num_threads is None else f"{self.num_threads} thread(s)"
        return threads if self.num_processes == 1 else f"torchrun, {self.num_processes} processes of {threads}"


@dataclass(frozen=True)
class Conversation:
    """An episode in both forms."""

    messages: list[dict[str, str]]
    encoded: EncodedEpisode

    @property
    def num_useful_tokens(self) -> int:
        """Tokens up to the end of the last answer; what opens the next turn teaches nothing."""
        return self.encoded.answer_spans[-1][1]


@dataclass(frozen=True)
class Speed:
    """What one run reached after its first step."""

    name: str
    seconds: float
    num_tokens: int
    num_answers: int
    padding: float
    peak_gib: float

    @property
    def tokens_per_second(self) -> float:
        """Useful tokens per second."""
        return self.num_tokens / self.seconds

    @property
    def answers_per_second(self) -> float:
        """Supervised answers per second."""
        return self.num_answers / self.seconds


def recipe_of(arguments: argparse.Namespace, folders: Sequence[Path], output: Path) -> Recipe:
    """Describe the run of manyicl: as TRL's in everything that is not the method."""
    training = {
        "num_steps": 1 + arguments.steps,
        "sequences_per_step": arguments.sequences_per_step,
        "learning_rate": 2e-5,  # SFTTrainer's
        "bf16": arguments.bf16,
        "gradient_checkpointing": arguments.recompute,
        "evaluate_every": None,
        "log_every": 1,
    }
    return Recipe.model_validate(
        {
            "model": {"base": arguments.model, "lora": {"rank": 16, "alpha": 32}},
            "tasks": {"train": [str(path) for path in folders], "data_root": arguments.data_root},
            "sequences": {
                "max_context_tokens": arguments.context,
                "examples_per_episode": list(arguments.examples_per_episode),
            },
            "format": {"kind": "chat"},
            "training": training,
            "output": str(output),
        }
    )


def drawn(recipe: Recipe) -> list[list[Conversation]]:
    """Draw the packed sequences of a run, episode by episode in both forms."""
    assert recipe.model.base is not None
    sequences = packed_sequences(recipe, load_recipe_tasks(recipe).train, load_tokenizer(recipe.model.base))

    def conversation(episode: EncodedEpisode) -> Conversation:
        turns = TURN.findall(sequences.encoder.decode(episode.token_ids))
        return Conversation([{"role": role, "content": content} for role, content in turns], episode)

    return [[conversation(episode) for episode in sequences[index].episodes] for index in range(recipe.num_sequences)]


def random_adapter(reference: str, folder: Path) -> PreTrainedModel:
    """Save an adapter whose update is not zero, as a fresh one's is, and return the model under it."""
    model, _ = loaded_with_adapter(reference)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weights in model.named_parameters():
            if "lora_B" in name:
                weights.normal_(std=0.02, generator=generator)
    model.save_pretrained(str(folder))
    model.train()
    return model


def peak_of(command: Sequence[str], environment: Mapping[str, str], log: Path) -> float:
    """Run a command to its end and return the peak memory of all its processes together, in GiB."""
    peak = 0
    # A number of threads is given here or not at all.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    with log.open("w", encoding="utf-8") as lines:
        process = psutil.Popen(command, cwd=ROOT, env={**inherited, **environment}, stdout=lines, stderr=lines)
        while process.poll() is None:
            with suppress(psutil.Error):
                peak = max(peak, used_bytes(process))
            time.sleep(SECONDS_BETWEEN_SAMPLES)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read_text(encoding='utf-8')}")
    return peak / 2**30


def used_bytes(process: psutil.Process) -> int:
    """Return the resident memory of a process and those that it started.

    Of pages that several share, each counts its part; that is slow to find out, so a single process is not asked.
    """
    processes = [process, *process.children(recursive=True)]
    if len(processes) == 1:
        return int(process.memory_info().rss)
    return sum(getattr(each.memory_full_info(), "pss", 0) or each.memory_info().rss for each in processes)


class Peer:
    """SFTTrainer in its own environment."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.adapter = folder / "adapter"
        self.settings: dict[str, dict[str, str]] = {}

    def call(
        self, kind: str, conversations: Sequence[Conversation], settings: Mapping[str, Any], start: Start
    ) -> dict[str, Any]:
        """Start TRL's side on a job and return its result with its peak memory."""
        job = {
            "kind": kind,
            "base": resolve_reference(self.arguments.model),
            "adapter": str(self.adapter),
            "chat_template": CHAT_TEMPLATE,
            "conversations": [{"messages": each.messages} for each in conversations],
            "settings": {
                "max_length": self.arguments.context,
                "gradient_checkpointing": self.arguments.recompute,
                **settings,
                **(TOGETHER if start.num_processes > 1 else {}),
            },
            "bf16": self.arguments.bf16,
            "threads": start.num_threads,
            "output": str(self.folder / "trl"),
        }
        paths = self.folder / "job.json", self.folder / "result.json"
        paths[0].write_text(json.dumps(job), encoding="utf-8")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(start.num_processes)]
        script = [str(ROOT / "benchmarks" / "training_peers_trl.py"), *map(str, paths)]
        command = [str(self.arguments.trl), *(launcher if start.num_processes > 1 else []), *script]
        # Its environment is its own: nothing of ours is to be found in it.
        environment = {**start.environment, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
        peak = peak_of(command, environment, self.folder / "trl.log")
        return {**json.loads(paths[1].read_text(encoding="utf-8")), "peak_gib": peak}

    def speed(self, name: str, conversations: Sequence[Conversation], start: Start) -> tuple[Speed, dict[str, str]]:
        """Train on conversations once with one of the settings."""
        result = self.call("train", conversations, SETTINGS[name], start)
        expected, num_answers = sum(len(each.encoded.answer_spans) for each in conversations), result["num_answers"]
        # Of several processes, all are given equally many conversations.
        if num_answers < expected or (num_answers > expected and start.num_processes == 1):
            raise SystemExit(f"TRL supervised {num_answers} answers of {expected}.")
        useful = round(sum(each.num_useful_tokens for each in conversations) * num_answers / expected)
        padding = 1 - result["num_tokens"] / result["num_positions"]
        label = f"TRL, {name}, {start}"
        return Speed(label, result["seconds"], useful, num_answers, padding, result["peak_gib"]), result["settings"]


def our_speed(recipe: Recipe, sequences: Sequence[Sequence[Conversation]], start: Start, folder: Path) -> Speed:
    """Let `manyicl train` run a recipe, and read the time of its steps from its log."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_unset=True)), encoding="utf-8")
    command = [str(Path(sys.executable).with_name("manyicl")), "train", str(path), "--overwrite"]
    peak = peak_of(command, start.environment, folder / "manyicl.log")
    (state,) = recipe.output.glob(f"checkpoints/checkpoint-{recipe.num_steps}/trainer_state.json")
    steps = [line for line in json.loads(state.read_text(encoding="utf-8"))["log_history"] if "loss" in line]
    per_step = recipe.training.sequences_per_step
    seconds, timed = 0.0, sequences[per_step:]
    for line in steps[1:]:
        of_step = sequences[(line["step"] - 1) * per_step : line["step"] * per_step]
        num_tokens = sum(len(each.encoded.token_ids) for sequence in of_step for each in sequence)
        seconds += num_tokens / line["tokens_per_second"]
    useful = sum(each.num_useful_tokens for sequence in timed for each in sequence)
    answers = sum(len(each.encoded.answer_spans) for sequence in timed for each in sequence)
    manifest = Manifest.read(recipe.output)
    assert manifest is not None
    chosen = f": {int(manifest.throughput['num_processes'])} process(es)" if start.num_threads is None else ""
    return Speed(f"manyicl, {start}{chosen}", seconds, useful, answers, 0.0, peak)


def our_loss(model: PreTrainedModel, episodes: Sequence[EncodedEpisode], bf16: bool) -> float:
    """Return the loss of some episodes, packed into one sequence."""
    packed = PackedSequence(tuple(episodes), sum(len(episode.token_ids) for episode in episodes), 0, 0)
    batch = sequence_tensors(packed, ObjectiveSettings())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        return float(sequence_loss(model, batch, batch["weights"].sum()))


def same_tokens(conversation: Conversation, row: Mapping[str, list[int]]) -> EncodedEpisode:
    """Return the episode with TRL's tokens, which must be ours up to the end of the last answer, as must the targets.

    After it we already open the next turn.
    """
    ids, spans = conversation.encoded.token_ids, conversation.encoded.answer_spans
    targets = {position for start, end in spans for position in range(start, end)}
    labelled = {position for position, label in enumerate(row["labels"]) if label >= 0}
    end = conversation.num_useful_tokens
    if tuple(row["input_ids"][:end]) != ids[:end] or labelled != targets:
        raise SystemExit("TRL and manyicl make different tokens or targets of a conversation; nothing can be compared.")
    return EncodedEpisode(conversation.encoded.task_name, tuple(row["input_ids"]), spans)


def compare_losses(peer: Peer, model: PreTrainedModel, conversations: Sequence[Conversation]) -> None:
    """Print the losses of both sides; end the benchmark if they differ beyond rounding."""
    bf16 = peer.arguments.bf16
    theirs = peer.call("losses", conversations, SETTINGS["default"], Start(peer.arguments.threads))
    episodes = [same_tokens(each, row) for each, row in zip(conversations, theirs["rows"], strict=True)]
    rows = [
        (f"conversation {number}, {len(episode.token_ids):,} tokens, alone", our_loss(model, [episode], bf16), loss)
        for number, (episode, loss) in enumerate(zip(episodes, theirs["alone"], strict=True), 1)
    ]
    together = our_loss(model, episodes, bf16)
    rows.append(("all of them; TRL: a padded batch", together, theirs["padded"]))
    rows.append(("all of them; TRL: packed", together, theirs["packed"]))
    print("## Losses\n\n| Tokens | manyicl | TRL | Difference |\n| --- | ---: | ---: | ---: |")
    for name, ours, other in rows:
        print(f"| {name} | {ours:.7f} | {other:.7f} | {abs(ours - other):.1e} |")
    tolerance = TOLERANCE[torch.bfloat16 if bf16 else torch.float32]
    if any(abs(ours - other) > tolerance * abs(ours) for _, ours, other in rows[:-1]):
        raise SystemExit("The losses differ by more than rounding.")
    isolated = abs(rows[-1][1] - rows[-1][2]) <= tolerance * rows[-1][1]
    print(
        f"\nTRL's packing {'isolates' if isolated else 'does NOT isolate'} conversations on this device.\n", flush=True
    )


def verdict(name: str, ours: Speed, others: Sequence[Speed]) -> str:
    """Say how the sides compare, and whether the aims are reached."""
    best = max(others, key=lambda speed: speed.tokens_per_second)
    ratio, memory = ours.tokens_per_second / best.tokens_per_second, ours.peak_gib / best.peak_gib
    aim = AIM_ON_THE_MIXTURE if name == "mixture" else AIM_ON_A_TASK
    return (
        f"manyicl: {ratio:.2f} times the useful tokens per second of {best.name} (aim {aim}: "
        f"{'reached' if ratio >= aim else 'MISSED'}), {memory:.2f} of its memory (aim at most 1: "
        f"{'reached' if memory <= 1 else 'MISSED'})."
    )


def measure(name: str, folders: Sequence[Path], peer: Peer, model: PreTrainedModel | None) -> None:
    """Compare losses if a model is given, then the speed on one workload."""
    arguments = peer.arguments
    recipe = recipe_of(arguments, folders, peer.folder / "run")
    sequences = drawn(recipe)
    timed = [each for sequence in sequences[arguments.sequences_per_step :] for each in sequence]
    if model is not None:
        compare_losses(peer, model, timed[:NUM_COMPARED])
    lengths = sorted(each.num_useful_tokens for each in timed)
    print(f"## {name}: {len(timed)} conversations of {lengths[0]:,} to {lengths[-1]:,} tokens\n")
    print(f"| {' | '.join(COLUMNS)} |\n| --- |{' ---: |' * (len(COLUMNS) - 1)}", flush=True)
    ours = our_speed(recipe, sequences, Start(None if arguments.by_default else arguments.threads), peer.folder)
    show(ours)
    others = []
    for start, setting in product(starts_of_trl(arguments), arguments.settings):
        speed, in_force = peer.speed(setting, timed, start)
        peer.settings.setdefault(f"{setting}, {start}", in_force)
        others.append(speed)
        show(speed)
    print(f"\n{verdict(name, ours, others)}\n", flush=True)


def starts_of_trl(arguments: argparse.Namespace) -> list[Start]:
    """List the ways in which TRL is started."""
    if not arguments.by_default:
        return [Start(threads) for threads in arguments.trl_threads or (arguments.threads,)]
    return [Start(None), *([Start(1, NUM_CORES)] if NUM_CORES > 1 else [])]


def show(speed: Speed) -> None:
    """Print one row."""
    print(
        f"| {speed.name} | {speed.tokens_per_second:,.0f} | {speed.answers_per_second:.2f} | {speed.padding:.0%} | "
        f"{speed.seconds:.1f} | {speed.peak_gib:.2f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="Python of TRL's environment.")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--model", default="builtin:smollm2", help="A base whose chat template is ChatML.")
    parser.add_argument("--workloads", nargs="+", default=("mixture",), help="mixture, or names of single tasks.")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS), default=("default", "single", "packed"))
    parser.add_argument("--context", type=int, default=2048, help="Tokens of a packed sequence.")
    parser.add_argument("--examples-per-episode", type=int, nargs=2, default=(4, 16), metavar=("LEAST", "MOST"))
    parser.add_argument("--sequences-per-step", type=int, help="1 by default; with --by-default one per core.")
    parser.add_argument("--steps", type=int, default=3, help="Timed steps of manyicl; TRL gets their conversations.")
    parser.add_argument("--threads", type=int, default=NUM_CORES)
    parser.add_argument("--trl-threads", type=int, nargs="+", help="Try TRL with each of these; default --threads.")
    parser.add_argument("--by-default", action="store_true", help="Start each side as its command does by itself.")
    parser.add_argument("--bf16", action="store_true", help="Compute in bfloat16 (autocast), both sides.")
    parser.add_argument("--recompute", action="store_true", help="Recompute activations, both sides.")
    parser.add_argument("--no-losses", action="store_true", help="Leave out the comparison of losses.")
    arguments = parser.parse_args()
    arguments.sequences_per_step = arguments.sequences_per_step or (NUM_CORES if arguments.by_default else 1)
    torch.set_num_threads(arguments.threads)
    workloads, started = task_folders(arguments.data_root), time.perf_counter()
    for name in arguments.workloads:
        if name not in workloads:
            parser.error(f"--workloads {name}: expected {', '.join(workloads)}")
    print(
        f"{arguments.model}, LoRA of rank 16 on all linear layers without dropout, "
        f"{'bfloat16 autocast' if arguments.bf16 else 'float32'}, sequences of {arguments.context:,} tokens, "
        f"{platform.processor() or platform.machine()}, {NUM_CORES} cores, "
        + ", ".join(f"{name} {version}" for name, version in library_versions().items())
        + "\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        peer = Peer(arguments, Path(folder))
        model: PreTrainedModel | None = random_adapter(arguments.model, peer.adapter)
        for number, name in enumerate(arguments.workloads):
            measure(name, workloads[name], peer, model if number == 0 and not arguments.no_losses else None)
            model = None
    for setting, in_force in peer.settings.items():
        print(f"TRL {setting}: " + ", ".join(f"{key} {value}" for key, value in in_force.items()))
    print(f"\n{(time.perf_counter() - started) / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
