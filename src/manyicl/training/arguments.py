"""Recipe -> the arguments of transformers' Trainer."""

from __future__ import annotations

from typing import Any

import torch
from transformers import TrainingArguments

from manyicl.training.processes import world_size
from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import RunFolder
from manyicl.training.trainer import BEST_METRIC


def training_arguments(recipe: Recipe, folder: RunFolder, *, evaluates: bool) -> TrainingArguments:
    """Translate a recipe into transformers' arguments, for this process of the run; the processes meet here."""
    settings = recipe.training
    num_processes = world_size()
    on_cpu = not torch.cuda.is_available()
    due = settings.evaluate_every if evaluates else settings.save_every
    interval = due if isinstance(due, int) else recipe.num_steps
    arguments = TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=recipe.num_steps,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=settings.sequences_per_step // num_processes,
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup" if settings.schedule == "constant" else settings.schedule,
        lr_scheduler_kwargs=_schedule_arguments(recipe),
        warmup_steps=settings.warmup_steps,
        weight_decay=settings.weight_decay,
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cache=False,
        seed=settings.seed,
        # Without it, torchrun on a CPU would run unrelated trainings side by side.
        use_cpu=on_cpu,
        ddp_backend="gloo" if on_cpu and num_processes > 1 else None,
        ddp_find_unused_parameters=False,
        dataloader_num_workers=0 if on_cpu else 2,
        dataloader_pin_memory=not on_cpu,
        logging_steps=settings.log_every,
        # The default logs a loss that is not a number as zero.
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        eval_strategy="steps" if evaluates else "no",
        eval_steps=interval,
        save_strategy="steps",
        save_steps=interval,
        save_total_limit=settings.keep_checkpoints,
        load_best_model_at_end=evaluates,
        metric_for_best_model=BEST_METRIC if evaluates else None,
        greater_is_better=True if evaluates else None,
    )
    # One process trains on one device; transformers would spread a batch of one sequence over all GPUs it sees.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _schedule_arguments(recipe: Recipe) -> dict[str, Any]:
    if recipe.training.schedule != "warmup_stable_decay":
        return {}
    return {"num_decay_steps": recipe.num_decay_steps}
