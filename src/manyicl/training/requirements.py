"""What a recipe needs from a machine: everything that is missing, reported before any data is read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

from huggingface_hub import constants
from packaging.version import InvalidVersion, Version

from manyicl.episodes.general_text import require_text_file
from manyicl.episodes.replay import TEXT_KEY
from manyicl.errors import UserError
from manyicl.model import machine
from manyicl.model.load import model_config
from manyicl.model.manifest import Manifest
from manyicl.model.reference import HUB_PREFIX, config_folder, resolve_reference
from manyicl.tasks.files import task_places
from manyicl.training.processes import is_launched, is_sharded, world_size
from manyicl.training.recipe import Recipe

GPU_EXTRA = "pip install 'manyicl[gpu]'"
# It is compiled against the torch that is installed, and so cannot be part of an extra.
FLASH_ATTN = "pip install flash-attn --no-build-isolation"


class _Feature(NamedTuple):
    """A setting that works only with a library on a CUDA GPU.

    Attributes:
        key: Key of the recipe; removing it gives the setting up.
        setting: Key and value that ask for the feature.
        is_asked: Tells whether a recipe asks for it.
        library: Library that provides it.
        least_version: Oldest version of the library.
        least_capability: Lowest compute capability of the GPU, as the library documents it.
        install: Command that installs the library.
    """

    key: str
    setting: str
    is_asked: Callable[[Recipe], bool]
    library: str
    least_version: str
    least_capability: tuple[int, int]
    install: str


# bitsandbytes: the version that transformers 5.23 asks for; flash-attn: soft caps came with 2.6; liger-kernel: 0.8.5 is
# the version that was looked at.
# fmt: off
_FEATURES = (
    _Feature("model.quantize", "model.quantize: 4bit", lambda recipe: recipe.model.quantize is not None,
             "bitsandbytes", "0.46.1", (6, 0), GPU_EXTRA),
    _Feature("model.attention", "model.attention: flash", lambda recipe: recipe.model.attention == "flash",
             "flash-attn", "2.6", (8, 0), FLASH_ATTN),
    _Feature("training.liger", "training.liger", lambda recipe: recipe.training.liger,
             "liger-kernel", "0.8", (8, 0), GPU_EXTRA),
)
# fmt: on


# What accelerate can be told to do: the environment variable that says so, and why it is refused.
_REFUSED_PARALLELISM = {
    "context parallelism (cp_size)": (
        "PARALLELISM_CONFIG_CP_SIZE",
        "it drops what isolates the episodes of a packed sequence, so that each would see the others",
    ),
    "sequence parallelism (sp_size)": (
        "PARALLELISM_CONFIG_SP_SIZE",
        "it divides a packed sequence over processes, and the ends of its episodes are those of the whole",
    ),
    "tensor parallelism (tp_size)": (
        "PARALLELISM_CONFIG_TP_SIZE",
        "its processes share a sequence, and here each takes sequences of its own",
    ),
    "DeepSpeed": (
        "ACCELERATE_USE_DEEPSPEED",
        "gradients that it sums up were never compared with those of one process",
    ),
    "Megatron-LM": ("ACCELERATE_USE_MEGATRON_LM", "its models are not those of transformers"),
}


def check_recipe(recipe: Recipe, *, with_tasks: bool = True) -> None:
    """Refuse a recipe that cannot be run on this machine as it says. A run does this once, before all else.

    Raises:
        UserError: With everything that is missing, as far as `problems` can tell.
    """
    found = list(problems(recipe, with_tasks=with_tasks))
    if len(found) == 1:
        raise found[0]
    if found:
        raise UserError(found[0].code, " ".join(map(str, found)), field=found[0].field)


def problems(recipe: Recipe, *, with_tasks: bool = True) -> Iterator[UserError]:
    """Yield why a recipe cannot be run on this machine, as far as that shows without reading weights and rows.

    No network is used. The output folder is not looked at, because that depends on whether a run resumes.

    Args:
        recipe: The run.
        with_tasks: False where its tasks are loaded already, from wherever.
    """
    yield from launch_problems()
    yield from missing_features(recipe)
    yield from _base_problems(recipe)
    for key, patterns in (("tasks.train", recipe.tasks.train), ("tasks.evaluate", recipe.tasks.evaluate)):
        for pattern in patterns if with_tasks else ():
            try:
                task_places(pattern)
            except UserError as error:
                yield error.at(field=key)
    if recipe.sequences.replay is not None:
        try:
            require_text_file(recipe.sequences.replay.text, TEXT_KEY)
        except UserError as error:
            yield error
    yield from _process_problems(recipe)
    num_sequences, num_processes = recipe.training.sequences_per_step, world_size()
    if num_sequences % num_processes:
        key, remedy = "training.sequences_per_step", f"Use a multiple of {num_processes}."
        what = f"{key} is {num_sequences} and {num_processes} processes share them"
        yield UserError("sequences_not_shared_evenly", what, remedy=remedy, field=key)


def launch_problems() -> Iterator[UserError]:
    """Yield what was requested of a launcher that would train something else, or not as it says, in silence."""
    for parallelism, (name, reason) in _REFUSED_PARALLELISM.items():
        requested = os.environ.get(name, "")
        if requested.lower() == "true" or (requested.isdecimal() and int(requested) > 1):
            what = f"{parallelism} was requested ({name} is {requested}); {reason}"
            remedy = "Start without it; recipes/accelerate/fsdp2.yaml shares out weights that are too large for a GPU."
            yield UserError("parallelism_not_supported", what, remedy=remedy, field=name)
    if not is_sharded():
        return
    if not machine.gpus():
        what = "FSDP was requested and torch sees no GPU here; accelerate would train whole copies without a word"
        remedy = "Start with torchrun, or without a launcher, or train where torch sees GPUs."
        yield UserError("sharding_without_gpus", what, remedy=remedy, field="ACCELERATE_USE_FSDP")
    if (version := os.environ.get("FSDP_VERSION", "1")) != "2":
        what = f"FSDP of version {version} was requested; only version 2 is supported"
        remedy = "Use `fsdp_version: 2`, as recipes/accelerate/fsdp2.yaml does."
        yield UserError("parallelism_not_supported", what, remedy=remedy, field="FSDP_VERSION")


def _process_problems(recipe: Recipe) -> Iterator[UserError]:
    key, number = "training.num_processes", recipe.training.num_processes
    if number is None:
        return
    if is_launched() and number != world_size():
        what = f"{key} is {number} and a launcher started {world_size()}"
        yield UserError("conflicting_processes", what, remedy=f"Remove {key} or the launcher.", field=key)
    if not is_launched() and number > 1 and machine.gpus():
        what = f"{key} is {number}; it starts processes on a CPU, and torch sees a GPU here"
        command = f"torchrun --nproc-per-node {number} -m manyicl train …"
        remedy = f"Remove it, or start one process per GPU with `{command}`."
        yield UserError("conflicting_processes", what, remedy=remedy, field=key)


def missing_features(recipe: Recipe) -> Iterator[UserError]:
    """Yield which settings this machine cannot give; looks only at what the recipe asks for.

    The libraries would fall back to something slower or start on a CPU in some of these cases.
    """
    for feature in _FEATURES:
        if not feature.is_asked(recipe):
            continue
        gpu, library = _missing_gpu(feature), _missing_library(feature)
        if gpu or library:
            needed = f"a CUDA GPU and {feature.library} {feature.least_version} or later"
            what = f"{feature.setting} needs {needed}; {' and '.join(filter(None, (gpu, library)))}"
            remedies = ["train where torch sees such a GPU"] if gpu else []
            remedies += [f"install {feature.library} with `{feature.install}`"] if library else []
            remedy = " and ".join(remedies)
        elif is_sharded():
            compared = "is compared with the plain model when a run starts, which cannot be done under FSDP"
            what = f"{feature.setting} {compared}, where the weights have no device yet"
            remedy = "Start without FSDP"
        else:
            continue
        remedy = f"{remedy[0].upper()}{remedy[1:]}, or remove {feature.key}."
        yield UserError("missing_requirement", what, remedy=remedy, field=feature.key)


def too_few_positions(recipe: Recipe, positions: int | None) -> UserError | None:
    """Compare the length of packed sequences with the positions of a model; None where they fit or are not known."""
    length = recipe.sequences.max_context_tokens
    if positions is None or length <= positions:
        return None
    what = f"sequences.max_context_tokens is {length:,}; the model has {positions:,} positions"
    remedy = "Use shorter sequences, or a model with a longer context."
    return UserError("context_too_long", what, remedy=remedy, field="sequences.max_context_tokens")


def remark_on_precision(recipe: Recipe) -> str | None:
    """Warn of weights that AdamW updates in bfloat16, where small updates are rounded away."""
    if recipe.model.dtype != "bfloat16" or recipe.model.lora is not None:
        return None
    return (
        "All weights are held and updated in bfloat16, without float32 copies: an update of less than 1/256 of a "
        "weight is rounded away. For exact updates use model.dtype: float32 with training.bf16: true, or an adapter."
    )


def _base_problems(recipe: Recipe) -> Iterator[UserError]:
    base = recipe.model.base
    if base is None:
        return
    try:
        resolve_reference(base)
    except UserError as error:
        yield error.at(field="model.base")
    if must_be_fetched(recipe) and constants.HF_HUB_OFFLINE:
        what = f"model.base: {base!r} is not in the Hub cache and HF_HUB_OFFLINE keeps this machine from the Hub"
        remedy = "Unset it for one run, or copy the model and give its folder."
        yield UserError("model_not_cached", what, remedy=remedy, field="model.base")
    if too_few := too_few_positions(recipe, _known_positions(recipe)):
        yield too_few


def must_be_fetched(recipe: Recipe) -> bool:
    """Tell whether the base is one of the Hub of which this machine has no copy."""
    base = recipe.model.base
    return base is not None and base.startswith(HUB_PREFIX) and config_folder(base) is None


def base_files(base: str | None) -> str | None:
    """List, as JSON, size and modification time of each file of a base: equal lists mean equal weights.

    The list of an adapter is followed by that of its own base. None for a new model, and where one is not on this
    machine.
    """
    folder = config_folder(base)
    below: str | None = ""
    if folder is not None and (folder / "adapter_config.json").is_file():
        manifest = Manifest.read(folder)
        below = base_files(manifest.base if manifest else None)
    if folder is None or below is None:
        return None
    stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.is_file()}
    return json.dumps({name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}, indent=2) + below


def _known_positions(recipe: Recipe) -> int | None:
    """Read from the configuration how many positions the base has; None where it is not here or does not say."""
    folder = config_folder(recipe.model.base)
    if folder is None or not (folder / "config.json").is_file():
        return None
    with suppress(UserError):
        return getattr(model_config(str(folder)).get_text_config(), "max_position_embeddings", None) or None
    return None


def _missing_gpu(feature: _Feature) -> str | None:
    if machine.cuda_version() is None:
        return f"torch {machine.library_version('torch')} is built without CUDA"
    found = machine.gpus()
    if not found:
        return "torch sees no GPU here"
    weakest = min(found, key=lambda gpu: gpu.compute_capability)
    if weakest.compute_capability >= feature.least_capability:
        return None
    has, needed = (".".join(map(str, pair)) for pair in (weakest.compute_capability, feature.least_capability))
    return f"{weakest.name} has compute capability {has}, at least {needed} is needed"


def _missing_library(feature: _Feature) -> str | None:
    found = machine.library_version(feature.library)
    if found is None:
        return f"{feature.library} is not installed"
    # A version that cannot be compared is one that somebody built for themselves.
    with suppress(InvalidVersion):
        if Version(found) < Version(feature.least_version):
            return f"{feature.library} is {found}"
    return None
