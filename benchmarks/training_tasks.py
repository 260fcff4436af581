"""The tasks and the model that the benchmarks of training share: a few real tasks, short and long, and their mixture.

With a data root (recipes/real/README.md says how the data lies in it) these are task files of recipes/real/train.
Without one they are the three starter tables of the package, so that every benchmark runs anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from manyicl.model.load import load_model
from manyicl.tasks.starter_tables import STARTER_TABLES
from manyicl.training.merged_projections import merge_projections
from manyicl.training.recipe import LoraSettings
from manyicl.training.start import with_adapter

REAL_TASKS = Path(__file__).parent.parent / "recipes" / "real" / "train"
# Tokens of a demonstration as a turn of a chat, on average: 22, 26, 44, 65, 78, 57, 252, 206.
MIXTURE = ("cola", "banking77", "subj", "mnli", "gsm8k", "dart_tables", "dialogsum", "xquad_en")
# Two with short labels, and two that generate longer texts, one of them after long documents.
SINGLE = ("cola", "banking77", "dart_tables", "dialogsum")
STARTER_SINGLE = ("tickets", "titles")


def task_folders(data_root: Path | None) -> Mapping[str, tuple[Path, ...]]:
    """Return the task folders of each workload: single tasks by their name, and ``mixture``."""
    if data_root is None:
        single = {name: (STARTER_TABLES / name,) for name in STARTER_SINGLE}
        return {**single, "mixture": tuple(sorted(path.parent for path in STARTER_TABLES.glob("*/task.yaml")))}
    single = {name: (REAL_TASKS / name,) for name in SINGLE}
    return {**single, "mixture": tuple(REAL_TASKS / name for name in MIXTURE)}


def loaded_with_adapter(
    reference: str, *, as_peft_computes: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a base in float32 on the CPU with a fresh adapter on all linear layers, rank 16, without dropout.

    It computes as in `manyicl train` on a CPU, or as peft does.
    """
    loaded = load_model(reference, dtype="float32", device="cpu", check_isolation=False)
    torch.manual_seed(0)
    model = with_adapter(loaded.model, LoraSettings(rank=16, alpha=32))
    if not as_peft_computes:
        merge_projections(model)
    return model, loaded.tokenizer
