"""What a recipe asks of a machine: all that is missing, said before data is read or anything is spent."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from manyicl.errors import UserError
from manyicl.model import machine
from manyicl.model.machine import Machine
from manyicl.tasks.files import task_places
from manyicl.training.recipe import Recipe
from manyicl.training.run_folder import RunFolder

GPU_EXTRA = "pip install 'manyicl[gpu]'"
# It is compiled against the torch that is installed, and so cannot be part of an extra.
FLASH_ATTN = "pip install flash-attn --no-build-isolation"


@dataclass(frozen=True)
class _Feature:
    """A setting that works only with a library on a CUDA GPU.

    Attributes:
        setting: As a recipe writes it.
        key: To be removed by who cannot have it.
        is_asked: Whether a recipe holds it.
        library: That it needs.
        least_version: Of the library.
        least_capability: Compute capability of the GPU, as the library documents it.
        install: The command that installs the library.
    """

    setting: str
    key: str
    is_asked: Callable[[Recipe], bool]
    library: str
    least_version: str
    least_capability: tuple[int, int]
    install: str


_FEATURES = (
    # The version is the one that transformers 5.23 asks for.
    _Feature(
        "model.quantize: 4bit",
        "model.quantize",
        lambda recipe: recipe.model.quantize is not None,
        "bitsandbytes",
        "0.46.1",
        (6, 0),
        GPU_EXTRA,
    ),
    # Soft caps came with 2.6.
    _Feature(
        "model.attention: flash",
        "model.attention",
        lambda recipe: recipe.model.attention == "flash",
        "flash-attn",
        "2.6",
        (8, 0),
        FLASH_ATTN,
    ),
    # 0.8.5 is the version that was looked at.
    _Feature(
        "training.liger",
        "training.liger",
        lambda recipe: recipe.training.liger,
        "liger-kernel",
        "0.8",
        (8, 0),
        GPU_EXTRA,
    ),
)


def missing_here(recipe: Recipe) -> tuple[str, ...]:
    """Say, a sentence each, which settings this machine cannot give; looks only at what is asked.

    The libraries would fall back to something slower or start on a CPU in some of these cases.
    """
    return tuple(_missing_sentences(recipe))


def require_machine(recipe: Recipe) -> None:
    """Refuse a recipe that this machine cannot run as it says.

    Raises:
        UserError: If a library or a GPU is missing, with all that is.
    """
    if missing := missing_here(recipe):
        raise UserError(" ".join(missing))


def _missing_sentences(recipe: Recipe) -> Iterator[str]:
    for feature in _FEATURES:
        if not feature.is_asked(recipe):
            continue
        gpu, library = _missing_gpu(feature), _missing_library(feature)
        if gpu is not None or library is not None:
            found = " and ".join(reason for reason in (gpu, library) if reason is not None)
            remedies = []
            if gpu is not None:
                remedies.append("train where torch sees such a GPU")
            if library is not None:
                remedies.append(f"install {feature.library} with `{feature.install}`")
            remedy = " and ".join(remedies)
            remedy = remedy[0].upper() + remedy[1:]
            yield (
                f"{feature.setting} needs a CUDA GPU and {feature.library} {feature.least_version} or later; {found}. "
                f"{remedy}, or remove {feature.key}."
            )
        elif is_sharded():
            yield (
                f"{feature.setting} is compared with the plain model when a run starts, which cannot be done under "
                f"FSDP, where the weights have no device yet. Start without FSDP, or remove {feature.key}."
            )


def _missing_gpu(feature: _Feature) -> str | None:
    if machine.cuda_version() is None:
        return f"torch {machine.library_version('torch')} is built without CUDA"
    found = machine.gpus()
    if not found:
        return "torch sees no GPU here"
    weakest = min(found, key=lambda gpu: gpu.compute_capability)
    if weakest.compute_capability < feature.least_capability:
        return (
            f"{weakest.name} has compute capability {_dotted(weakest.compute_capability)}, at least "
            f"{_dotted(feature.least_capability)} is needed"
        )
    return None


def _missing_library(feature: _Feature) -> str | None:
    from packaging.version import InvalidVersion, Version

    found = machine.library_version(feature.library)
    if found is None:
        return f"{feature.library} is not installed"
    # A version that cannot be compared is one that somebody built for themselves.
    with suppress(InvalidVersion):
        if Version(found) < Version(feature.least_version):
            return f"{feature.library} is {found}"
    return None


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def is_sharded() -> bool:
    """Tell whether accelerate was told to shard the weights over processes (FSDP)."""
    return os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("1", "true")


@dataclass(frozen=True)
class RecipeHere:
    """What a recipe would use on a machine.

    Attributes:
        base: The weights that it starts from, and whether they are at hand.
        device: Where each process trains.
        num_processes: That share the sequences of a step.
        num_threads: CPU threads of each.
        precision: Of weights and products.
        attention: Which kernels.
        adapter: What is trained, and over what.
        kernels: Of other libraries, beside attention.
        refusals: Why `manyicl train` would not start; empty if nothing is known to be in the way.
        remarks: What a person may want to know.
    """

    base: str
    device: str
    num_processes: int
    num_threads: int
    precision: str
    attention: str
    adapter: str
    kernels: str
    refusals: tuple[str, ...]
    remarks: tuple[str, ...]


def recipe_here(recipe: Recipe, here: Machine) -> RecipeHere:
    """Say what a recipe would use on this machine, and all reasons for which it would be refused.

    Weights and rows are not read and no network is used: what only they can tell, ``--dry-run`` tells.
    """
    model, training = recipe.model, recipe.training
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    products = "bfloat16" if training.bf16 or model.dtype == "bfloat16" else "float32"
    lora = model.lora
    return RecipeHere(
        base=_base_sentence(recipe),
        device=f"GPU, {here.gpus[0].name}" if here.gpus else "CPU",
        num_processes=num_processes,
        num_threads=training.num_threads or here.num_torch_threads,
        precision=f"weights in {model.dtype}, products in {products}",
        attention="flash-attn, a sequence at once"
        if model.attention == "flash"
        else "torch, each episode of a sequence alone",
        adapter=(
            "all weights"
            if lora is None
            else f"an adapter of rank {lora.rank} over the base" + (" in 4 bits" if model.quantize else "")
        ),
        kernels="Liger: norms, rotary positions, gates" if training.liger else "torch",
        refusals=(*missing_here(recipe), *_refusals(recipe, here, num_processes)),
        remarks=tuple(_remarks(recipe, here, num_processes)),
    )


def _refusals(recipe: Recipe, here: Machine, num_processes: int) -> Iterator[str]:
    """Yield what stands in the way beside libraries and GPU, as far as it shows without reading weights or rows."""
    from manyicl.model.load import resolve_reference

    if recipe.model.base is not None:
        try:
            resolve_reference(recipe.model.base)
        except UserError as error:
            yield f"model.base: {error}"
    if _must_be_fetched(recipe) and here.hub_offline:
        yield (
            f"model.base: {recipe.model.base!r} is not in the Hub cache and HF_HUB_OFFLINE keeps this machine from the "
            "Hub. Unset it for one run, or copy the model and give its folder."
        )
    positions = _known_positions(recipe)
    if positions is not None and recipe.sequences.max_context_tokens > positions:
        yield (
            f"sequences.max_context_tokens is {recipe.sequences.max_context_tokens:,}; the model has {positions:,} "
            "positions. Use shorter sequences, or a model with a longer context."
        )
    for key, patterns in (("tasks.train", recipe.tasks.train), ("tasks.evaluate", recipe.tasks.evaluate)):
        for pattern in patterns:
            try:
                task_places(pattern)
            except UserError as error:
                yield f"{key}: {error}"
    if recipe.training.sequences_per_step % num_processes:
        yield (
            f"training.sequences_per_step is {recipe.training.sequences_per_step} and {num_processes} processes share "
            f"them; it must be a multiple of {num_processes}."
        )
    try:
        RunFolder(recipe.output).require_free(recipe, overwrite=False)
    except UserError as error:
        yield str(error)


def _remarks(recipe: Recipe, here: Machine, num_processes: int) -> Iterator[str]:
    model, training = recipe.model, recipe.training
    asks_bfloat16 = training.bf16 or model.dtype == "bfloat16"
    if asks_bfloat16 and not here.gpus and here.processor.fast_bfloat16 is False:
        yield "This processor lists no instructions for bfloat16; float32 is likely faster, at twice the memory."
    if asks_bfloat16 and any(not gpu.bfloat16 for gpu in here.gpus):
        yield "A GPU here emulates bfloat16, which is slow; float32 may be faster."
    if len(here.gpus) > 1 and num_processes == 1:
        yield (
            f"One process uses one of {len(here.gpus)} GPUs; "
            f"`torchrun --nproc-per-node {len(here.gpus)} --no-python manyicl train …` uses all."
        )
    if here.gpu_driver is not None and here.cuda is None:
        yield f"An NVIDIA driver ({here.gpu_driver}) is here, but this torch is built without CUDA."
    if training.num_threads is not None and training.num_threads > here.processor.num_usable_cores:
        yield (
            f"training.num_threads is {training.num_threads}; this process may use "
            f"{here.processor.num_usable_cores} cores."
        )
    if model.quantize is not None:
        yield (
            "The base is first read whole into CPU memory, for its fingerprint; the finished adapter is loaded over "
            "the base as it is, not in 4 bits."
        )
    if _must_be_fetched(recipe) and not here.hub_offline and not here.hub_token:
        yield "No Hub token is set; a model whose licence must be accepted needs one (`hf auth login`)."
    if recipe.tasks.data_root is not None and not recipe.tasks.data_root.is_dir():
        yield f"tasks.data_root {str(recipe.tasks.data_root)!r} is no folder here; give one with --set."


def _base_sentence(recipe: Recipe) -> str:
    base, from_scratch = recipe.model.base, recipe.model.from_scratch
    if from_scratch is not None:
        return f"a new {from_scratch.architecture} model"
    if _must_be_fetched(recipe):
        return f"{base}, to be fetched from the Hub"
    return f"{base}, at hand" if _config_folder(recipe) is not None else f"{base}, not found"


def _must_be_fetched(recipe: Recipe) -> bool:
    from manyicl.model.load import HUB_PREFIX

    base = recipe.model.base
    return base is not None and base.startswith(HUB_PREFIX) and _config_folder(recipe) is None


def _config_folder(recipe: Recipe) -> Path | None:
    """Find the folder of the base on this machine, in the Hub cache too; None where there is none."""
    from huggingface_hub import try_to_load_from_cache

    from manyicl.model.load import HUB_PREFIX, resolve_reference

    base = recipe.model.base
    if base is None:
        return None
    if base.startswith(HUB_PREFIX):
        try:
            cached = try_to_load_from_cache(base.removeprefix(HUB_PREFIX), "config.json")
        except ValueError:  # no repository can have such a name
            return None
        return Path(cached).parent if isinstance(cached, str) else None
    try:
        return Path(resolve_reference(base))
    except UserError:
        return None


def _known_positions(recipe: Recipe) -> int | None:
    """Read from the configuration how many positions the base has; None where it is not at hand or does not say."""
    from manyicl.model.load import model_config

    folder = _config_folder(recipe)
    if folder is None or not (folder / "config.json").is_file():
        return None
    try:
        positions = getattr(model_config(str(folder)).get_text_config(), "max_position_embeddings", None)
    except UserError:
        return None
    return int(positions) if positions else None
