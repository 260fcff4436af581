"""What each process of a shared run does in tests of several processes; one process does it alone for comparison."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from rich.console import Console
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from manyicl.episodes.packed_sequence import PackedSequences
from manyicl.evaluation.held_out import ShareOut, held_out_measure, in_this_process
from manyicl.model import machine
from manyicl.model.load import LoadedModel
from manyicl.tasks.task import Task
from manyicl.training import loss as loss_module
from manyicl.training import trainer as trainer_module
from manyicl.training.job import Existing, TrainedRun, ensure_trained
from manyicl.training.processes import is_main_process, is_sharded, rank, shared_out, world_size
from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import RunFolder
from manyicl.training.start import starting_point
from manyicl.training.train import Measure, packed_sequences, training_arguments
from manyicl.training.trainer import ManyShotTrainer
from tests.builders import byte_level_bpe, make_task, tiny_loaded, tiny_model
from tests.machines import H100
from tests.training.recipes import small_recipe, small_tasks

# Uneven episodes, some with renamed labels, without dropout and without cutting the gradient.
UNEVEN = (
    "sequences={max_context_tokens: 90, examples_per_episode: [1, 6], rename_labels: 0.5}",
    "training.log_every=1",
    "training.num_steps=2",
    "training.max_grad_norm=0",
    "training.learning_rate=1e-3",
    "model.from_scratch.config.attention_dropout=0",
)


def full_recipe(output: Path, *changes: str) -> Recipe:
    return small_recipe(output, *UNEVEN, *changes)


def adapter_recipe(output: Path, base: Path, *changes: str) -> Recipe:
    over_base = ("model.from_scratch=null", f"model.base={base}", "model.lora={rank: 4}")
    return small_recipe(output, *UNEVEN[:-1], "sequences.max_context_tokens=300", *over_base, *changes)


def save_base(folder: Path) -> Path:
    tokenizer = byte_level_bpe()
    tiny_model(vocabulary_size=len(tokenizer)).save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return folder


def pretend_to_have_gpus() -> None:
    """Let accelerate shard on a CPU as it does on GPUs; by itself it would leave that out."""
    initialize = PartialState.__init__

    def initialized(state: Any, *arguments: Any, **options: Any) -> None:
        initialize(state, *arguments, **options)
        if state._shared_state["distributed_type"] is DistributedType.MULTI_CPU:
            state._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    PartialState.__init__ = initialized
    machine.gpus = lambda: (H100,)


@dataclass
class FewSteps(TrainerCallback):
    """What a run of a few steps does.

    Attributes:
        chunks: What was said of logits in chunks.
        indices: Packed sequences that this process has seen.
        kinds: Types of the weights in training.
        gradients: Just before the first step, by the name of their weights.
        losses: Of each step.
        weights: After the last step, those that are trained.
    """

    chunks: str | None = None
    indices: list[int] = field(default_factory=list)
    kinds: set[str] = field(default_factory=set)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        trained = {name: weights for name, weights in kwargs["model"].named_parameters() if weights.requires_grad}
        self.kinds = {type(weights).__name__ for weights in trained.values()}
        if not self.gradients:
            self.gradients = {name: whole(weights.grad) for name, weights in trained.items()}

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if "loss" in kwargs["logs"]:
            self.losses.append(kwargs["logs"]["loss"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        parameters = kwargs["model"].named_parameters()
        self.weights = {name: whole(weights) for name, weights in parameters if weights.requires_grad}


def whole(tensor: Any) -> Tensor:
    """A copy of a tensor, gathered from all processes if it is sharded."""
    return cast(Tensor, (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone())


def few_steps(recipe: Recipe, bytes_of_logits: int = loss_module.BYTES_OF_LOGITS) -> FewSteps:
    loss_module.BYTES_OF_LOGITS = bytes_of_logits
    tasks = small_tasks()
    start = starting_point(recipe, tasks.train)
    seen = FewSteps()

    class Seen(PackedSequences):
        def __getitem__(self, index: Any) -> Any:
            seen.indices.append(index)
            return super().__getitem__(index)

    sequences = packed_sequences(recipe, tasks.train, start.tokenizer)
    sequences.__class__ = Seen
    arguments = training_arguments(recipe, RunFolder(recipe.output), evaluates=False)
    trainer = ManyShotTrainer(start.model, arguments, sequences, recipe.objective, callbacks=[seen])
    seen.chunks = trainer.chunk_logits()
    seen.indices.clear()
    trainer.train()
    # The trainer holds copies of its own.
    return replace(seen)


def all_few_steps(recipes: Sequence[Recipe], bytes_of_logits: int, sharded: bool = False) -> list[FewSteps]:
    if sharded:
        pretend_to_have_gpus()
    return [few_steps(recipe, bytes_of_logits) for recipe in recipes]


def spoilt_step(recipe: Recipe) -> None:
    """Let the loss of the second process be no number."""
    names: dict[str, Any] = vars(trainer_module)
    loss = names["sequence_loss"]
    names["sequence_loss"] = lambda *arguments: loss(*arguments) * (1 if is_main_process() else float("nan"))
    few_steps(recipe)


@dataclass
class Ended:
    """How a run ended in one process.

    Attributes:
        run: What it gave back; None if it failed.
        error: Why it failed.
        screen: What it printed.
        scores: Scores of its evaluations.
    """

    run: TrainedRun | None = None
    error: Exception | None = None
    screen: str = ""
    scores: list[float] = field(default_factory=list)


def train(recipe: Recipe, existing: Existing = "use", fails_at: int | None = None) -> Ended:
    """Train with evaluations; let one of them fail in the last process alone, and in all that share a model."""
    ended = Ended()
    tasks = small_tasks()._replace(held_out=held_out_tasks())
    console = Console(file=io.StringIO(), width=300, quiet=not is_main_process())

    def make_measure(tasks: Sequence[Task], *, share_out: ShareOut = in_this_process, **settings: Any) -> Measure:
        def shared(tasks: Sequence[Any], work: Callable[[Sequence[Any]], Sequence[Any]], /) -> Sequence[Any]:
            def failing(own_tasks: Sequence[Any]) -> Sequence[Any]:
                if len(ended.scores) + 1 == fails_at and (is_sharded() or rank() + 1 == world_size()):
                    raise ArithmeticError("seven times eight")
                return work(own_tasks)

            return share_out(tasks, failing)

        measure = held_out_measure(tasks, share_out=shared, **settings)

        def measured(loaded: LoadedModel) -> Mapping[str, float]:
            figures = measure(loaded)
            ended.scores.append(figures["score"])
            return figures

        return measured

    try:
        ended.run = ensure_trained(recipe, tasks, make_measure, existing=existing, console=console)
    except Exception as error:
        ended.error = error
    ended.screen = cast(io.StringIO, console.file).getvalue()
    return ended


def held_out_tasks() -> tuple[Task, ...]:
    """Three tasks, which two processes cannot share evenly."""
    return tuple(make_task(f"held out {number}", data_hash=f"{number}" * 64) for number in (3, 4, 5))


def trains(cases: Sequence[tuple[Recipe, Existing, int | None]], sharded: bool = False) -> list[Ended]:
    if sharded:
        pretend_to_have_gpus()
    return [train(*case) for case in cases]


def evaluated() -> tuple[Mapping[str, float], list[tuple[int, int]]]:
    """Measure a tiny model together with the other processes; return the figures and the progress shown."""
    PartialState(cpu=True, backend="gloo")
    progress: list[tuple[int, int]] = []
    measure = held_out_measure(
        held_out_tasks(),
        shots=(0, 2),
        num_queries=5,
        seed=0,
        on_progress=lambda num_done, num_all: progress.append((num_done, num_all)),
        share_out=shared_out,
    )
    return measure(tiny_loaded()), progress
