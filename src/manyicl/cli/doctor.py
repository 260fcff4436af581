"""`manyicl doctor`: what this machine offers, and what a recipe would use here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.errors import UserError
    from manyicl.model.machine import Gpu, Machine, Processor
    from manyicl.training.recipe import Recipe

NAME_WIDTH = 14


@dataclass(frozen=True)
class RecipeHere:
    """What a recipe would use on this machine.

    Attributes:
        base: Weights that it starts from, and whether they are on this machine.
        device: Device on which each process trains.
        num_processes: Number of processes that share the sequences of a step.
        num_threads: CPU threads of each process.
        precision: Types of weights and products.
        attention: Kernels of attention.
        adapter: What is trained, and over what.
        kernels: Kernels of other libraries, beside attention.
        refusals: Reasons why `manyicl train` would not start; empty if none is known.
        remarks: What is worth knowing before a start.
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


def doctor_command(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; say what it would use here.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; repeatable."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what this machine offers, and with a recipe, what it would use here and everything that is in its way.

    No network is used, and neither weights nor rows are read; `manyicl train RECIPE --dry-run` does that.

    Examples:

        manyicl doctor

        manyicl doctor recipes/llama3_8b.yaml --set model.quantize=4bit

        manyicl doctor --json
    """
    from rich.console import Console

    from manyicl.errors import UserError
    from manyicl.model.machine import this_machine
    from manyicl.training.recipe import Recipe

    if recipe is None and overrides:
        raise UserError("missing_argument", "--set replaces a value of a recipe", remedy="Name the recipe as well.")
    read = None if recipe is None else Recipe.read(recipe, overrides or ())
    machine = this_machine()
    here = None if read is None else recipe_here(read, machine)
    if as_json:
        typer.echo(json.dumps({"machine": asdict(machine), "recipe": asdict(here) if here else None}, indent=2))
        return
    console = Console(soft_wrap=True, highlight=False, emoji=False)
    _print_section(console, "This machine", machine_lines(machine))
    if here is not None:
        console.print()
        _print_section(console, str(recipe), recipe_lines(here))
        _print_verdict(console, here)


def machine_lines(machine: Machine) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe a machine, one line each."""
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "processor", machine.processor.name
    yield "cores", _cores(machine.processor)
    yield "instructions", ", ".join(machine.processor.features) or "not listed by this system"
    yield "memory", f"{machine.memory_gib:.1f} GiB, {machine.available_memory_gib:.1f} available"
    yield "threads", f"{machine.num_torch_threads}, unless a recipe says otherwise"
    for gpu in machine.gpus:
        yield "GPU", _gpu(gpu)
    if not machine.gpus:
        yield "GPU", "none that torch can use"
    yield "CUDA", f"{machine.cuda or 'torch is built without it'}; driver {machine.gpu_driver or 'not found'}"
    yield "float32", "yes"
    yield "bfloat16", _bfloat16(machine)
    yield "libraries", _versions(machine.libraries)
    yield "optional", _versions(machine.optional_libraries)
    yield "Hub", f"{'offline by HF_HUB_OFFLINE' if machine.hub_offline else 'allowed'}; token {_yes(machine.hub_token)}"


def recipe_here(recipe: Recipe, here: Machine) -> RecipeHere:
    """Say what a recipe would use on this machine, and all reasons for which it would be refused.

    Weights and rows are not read and no network is used: what only they can tell, ``--dry-run`` tells.
    """
    from manyicl.training.processes import world_size

    model, training = recipe.model, recipe.training
    products = "bfloat16" if training.bf16 or model.dtype == "bfloat16" else "float32"
    in_4_bits = " in 4 bits" if model.quantize else ""
    return RecipeHere(
        base=_base_sentence(recipe),
        device=f"GPU, {here.gpus[0].name}" if here.gpus else "CPU",
        num_processes=world_size(),
        num_threads=training.num_threads or here.num_torch_threads,
        precision=f"weights in {model.dtype}, products in {products}",
        attention="flash-attn, a sequence at once" if model.attention == "flash" else "torch, one episode at a time",
        adapter=f"an adapter of rank {model.lora.rank} over the base{in_4_bits}" if model.lora else "all weights",
        kernels="Liger: norms, rotary positions, gates" if training.liger else "torch",
        refusals=tuple(map(str, _refusals(recipe))),
        remarks=tuple(_remarks(recipe, here, world_size())),
    )


def _refusals(recipe: Recipe) -> Iterator[UserError]:
    from manyicl.errors import UserError
    from manyicl.training.requirements import problems
    from manyicl.training.run_folder import RunFolder

    yield from problems(recipe)
    try:
        RunFolder(recipe.output).require_free(recipe, overwrite=False)
    except UserError as error:
        yield error


def _remarks(recipe: Recipe, here: Machine, num_processes: int) -> Iterator[str]:
    from manyicl.training.requirements import must_be_fetched, remark_on_precision

    model, training = recipe.model, recipe.training
    if training.bf16 or model.dtype == "bfloat16":
        if not here.gpus and here.processor.fast_bfloat16 is False:
            yield "This processor lists no instructions for bfloat16; float32 is likely faster, at twice the memory."
        if any(not gpu.bfloat16 for gpu in here.gpus):
            yield "A GPU here emulates bfloat16, which is slow; float32 may be faster."
    if remark := remark_on_precision(recipe):
        yield remark
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
            "The whole base is first read into CPU memory, for its fingerprint; the finished adapter is loaded over "
            "the base as it is, not in 4 bits."
        )
    if must_be_fetched(recipe) and not here.hub_offline and not here.hub_token:
        yield "No Hub token is set; a model whose licence must be accepted needs one (`hf auth login`)."
    if recipe.tasks.data_root is not None and not recipe.tasks.data_root.is_dir():
        yield f"tasks.data_root {str(recipe.tasks.data_root)!r} is no folder here; give one with --set."


def _base_sentence(recipe: Recipe) -> str:
    from manyicl.training.requirements import config_folder, must_be_fetched

    if recipe.model.from_scratch is not None:
        return f"a new {recipe.model.from_scratch.architecture} model"
    if must_be_fetched(recipe):
        return f"{recipe.model.base}, to be fetched from the Hub"
    return f"{recipe.model.base}, {'on this machine' if config_folder(recipe) else 'not found'}"


def recipe_lines(here: RecipeHere) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe what a recipe would use, one line each."""
    yield "base", here.base
    yield "device", here.device
    yield "processes", f"{here.num_processes}, {here.num_threads} CPU threads each"
    yield "precision", here.precision
    yield "attention", here.attention
    yield "trained", here.adapter
    yield "kernels", here.kernels


def _print_section(console: Console, title: str, lines: Iterator[tuple[str, str]]) -> None:
    from rich.text import Text

    console.print(Text(title, "bold"))
    for name, value in lines:
        console.print(Text.assemble((f"  {name:<{NAME_WIDTH}}", "cyan"), value))


def _print_verdict(console: Console, here: RecipeHere) -> None:
    from rich.text import Text

    for remark in here.remarks:
        console.print(Text.assemble((f"  {'remark':<{NAME_WIDTH}}", "yellow"), remark))
    for refusal in here.refusals:
        console.print(Text.assemble((f"  {'refused':<{NAME_WIDTH}}", "bold red"), refusal))
    if not here.refusals:
        console.print("  Nothing is known to be in its way; --dry-run of `manyicl train` reads tasks and model too.")


def _cores(processor: Processor) -> str:
    physical = processor.num_physical_cores
    return (
        f"{'an unknown number of' if physical is None else physical} physical, {processor.num_logical_cores} logical, "
        f"{processor.num_usable_cores} usable by this process"
    )


def _gpu(gpu: Gpu) -> str:
    major, minor = gpu.compute_capability
    return f"{gpu.name}, {gpu.memory_gib:.1f} GiB, compute capability {major}.{minor}"


def _bfloat16(machine: Machine) -> str:
    if machine.gpus:
        return "yes" if all(gpu.bfloat16 for gpu in machine.gpus) else "emulated by a GPU here, slow"
    fast = machine.processor.fast_bfloat16
    if fast is None:
        return "yes; this system does not list whether the processor is fast at it"
    return "yes, fast by its instructions (not measured)" if fast else "yes, without instructions of its own, so slow"


def _versions(libraries: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {found or 'not installed'}" for name, found in libraries.items())


def _yes(is_so: bool) -> str:
    return "set" if is_so else "not set"
