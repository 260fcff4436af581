"""TRL's side of training_peers.py; runs in TRL's own environment, which has no manyicl, and is started by that script.

    python benchmarks/training_peers_trl.py JOB.json RESULT.json

It may also be started by torchrun, and counts what all processes train on then. The job says what to do: ``losses``
compares tokens and returns losses of given conversations, ``train`` trains on conversations and returns how long it
took. `SFTTrainer` is used as it comes: it applies the chat template, makes the labels of assistant turns, pads or
packs, and computes its default loss.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

IGNORED = -100
# What differs from SFTTrainer's defaults because the comparison says so: the same precision, no activations computed
# twice, nothing cut off, the device, and no files.
SAME_FOR_BOTH = {
    "gradient_checkpointing": False,
    "use_cpu": True,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "assistant_only_loss": True,
    "num_train_epochs": 1,
    "seed": 0,
}
PRINTED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "train_sampling_strategy",
    "packing",
    "packing_strategy",
    "padding_free",
    "max_length",
    "loss_type",
    "assistant_only_loss",
    "gradient_checkpointing",
    "bf16",
    "optim",
    "max_grad_norm",
    "learning_rate",
    "torch_compile",
)


class CountingTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer that counts what each micro-batch holds before it is trained on."""

    num_tokens = num_positions = num_answers = num_episodes = 0

    def training_step(self, model: Any, inputs: dict[str, Any], *others: Any, **named: Any) -> Any:
        """Count tokens that are no padding, answers and conversations, and train."""
        self.num_positions += inputs["input_ids"].numel()
        if "attention_mask" in inputs:
            self.num_tokens += int(inputs["attention_mask"].sum())
            self.num_episodes += len(inputs["input_ids"])
        else:
            self.num_tokens += inputs["input_ids"].numel()
            self.num_episodes += int((inputs["position_ids"] == 0).sum())
        is_target = inputs["labels"] != IGNORED
        self.num_answers += int((is_target[:, 1:] & ~is_target[:, :-1]).sum())
        return super().training_step(model, inputs, *others, **named)


class Times(TrainerCallback):
    """Notes when training began and when the last optimizer step ended."""

    began = ended = 0.0

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        """Note the beginning; model and data are prepared by then."""
        self.began = time.perf_counter()

    def on_step_end(self, *arguments: Any, **named: Any) -> None:
        """Note the end of the newest step."""
        self.ended = time.perf_counter()


def trainer_of(job: dict[str, Any], callbacks: list[TrainerCallback]) -> CountingTrainer:
    """Load base, adapter and tokenizer, and let SFTTrainer prepare the conversations."""
    base = AutoModelForCausalLM.from_pretrained(job["base"], dtype=torch.float32, trust_remote_code=False)
    model = PeftModel.from_pretrained(base, job["adapter"], is_trainable=True, trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(job["base"], trust_remote_code=False)
    tokenizer.chat_template = job["chat_template"]
    settings = {**SAME_FOR_BOTH, "bf16": job["bf16"], "output_dir": job["output"], **job["settings"]}
    return CountingTrainer(
        model=model,
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(job["conversations"]),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


def losses(job: dict[str, Any]) -> dict[str, Any]:
    """Return tokens as SFTTrainer makes them, and its losses: each conversation alone, all padded, all packed."""
    trainer = trainer_of(job, [])
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in trainer.train_dataset]
    trainer.model.train()
    collate = trainer.data_collator

    def loss(batch: dict[str, Any]) -> float:
        with trainer.compute_loss_context_manager():
            return float(trainer.compute_loss(trainer.model, batch).detach())

    alone = [loss(collate([row])) for row in rows]
    padded = loss(collate(rows))
    collate.padding_free = True
    return {"rows": rows, "alone": alone, "padded": padded, "packed": loss(collate(rows))}


def train(job: dict[str, Any]) -> dict[str, Any]:
    """Train one epoch, after a pass that is not timed; return what was trained on, the time and the settings."""
    times = Times()
    trainer = trainer_of(job, [times])
    with trainer.compute_loss_context_manager():
        trainer.compute_loss(trainer.model.train(), trainer.data_collator([trainer.train_dataset[0]])).backward()
    trainer.model.zero_grad()
    trainer.train()
    settings = {name: str(getattr(trainer.args, name)) for name in PRINTED}
    settings["processes"] = f"{trainer.args.world_size} of {torch.get_num_threads()} thread(s)"
    settings["attention"] = trainer.model.config._attn_implementation
    settings["versions"] = f"torch {torch.__version__}, trl {trl.__version__}, transformers {transformers.__version__}"
    counted = ("num_tokens", "num_positions", "num_answers", "num_episodes")
    counts = torch.tensor([getattr(trainer, name) for name in counted])
    if torch.distributed.is_initialized():
        torch.distributed.all_reduce(counts)
    return {
        **dict(zip(counted, counts.tolist(), strict=True)),
        "seconds": times.ended - times.began,
        "settings": settings,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    if job["threads"] is not None:
        torch.set_num_threads(job["threads"])
    result = {"losses": losses, "train": train}[job["kind"]](job)
    if os.environ.get("RANK", "0") == "0":
        Path(sys.argv[2]).write_text(json.dumps(result), encoding="utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
