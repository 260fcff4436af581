"""`manyicl doctor`: what this machine offers, and what a recipe would use here."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.model.machine import Gpu, Machine, Processor
    from manyicl.training.requirements import RecipeHere

NAME_WIDTH = 14


def doctor_command(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe; say what it would use here.")] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Replace a value of the recipe; may stand several times."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Say what this machine offers, and with a recipe, what it would use here and all that stands in its way.

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
    from manyicl.training.requirements import recipe_here

    if recipe is None and overrides:
        raise UserError("--set replaces a value of a recipe; name the recipe as well.")
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
        console.print("  Nothing is known to stand in its way; --dry-run of `manyicl train` reads tasks and model too.")


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
