"""`manyicl doctor`: what this machine offers, and what a recipe would use here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyicl.activity import Activity
from manyicl.cli.options import Overrides
from manyicl.printing import new_console

if TYPE_CHECKING:
    from rich.console import Console

    from manyicl.model.machine import Machine
    from manyicl.training.process_choice import ProcessChoice
    from manyicl.training.recipe import Recipe

NAME_WIDTH = 14


def doctor_command(
    recipe: Annotated[Path | None, typer.Argument(help="A recipe, to see what it would use on this machine.")] = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Show what this machine offers and, for a recipe, what it would use here and everything that is missing.

    It uses no network and reads neither weights nor rows; `manyicl train RECIPE --dry-run` does.

    Examples:

        manyicl doctor

        manyicl doctor recipes/llama3_8b.yaml --set model.quantize=4bit

        manyicl doctor --json
    """
    from manyicl.errors import UserError
    from manyicl.training.recipe import Recipe

    if recipe is None and overrides:
        raise UserError("missing_argument", "--set replaces a value of a recipe", remedy="Name the recipe as well.")
    read = None if recipe is None else Recipe.read(recipe, overrides or ())
    with Activity(new_console(stderr=True)) as activity:
        activity.begin("looking at this machine and its libraries")
        from manyicl.model.machine import this_machine

        machine = this_machine()
        here = None if read is None else recipe_here(read, machine)
    if as_json:
        typer.echo(json.dumps({"machine": asdict(machine), "recipe": here}, indent=2))
        return
    console = new_console(soft_wrap=True, highlight=False)
    _print_section(console, "This machine", machine_lines(machine))
    if here is not None:
        remarks, refusals = here.pop("remarks"), here.pop("refusals")
        console.print()
        _print_section(console, str(recipe), ((name.removeprefix("num_"), str(here[name])) for name in here))
        _print_lines(console, (("remark", remark) for remark in remarks), "yellow")
        _print_lines(console, (("refused", refusal) for refusal in refusals), "bold red")
        if not refusals:
            console.print("  Nothing is known to be missing; `manyicl train --dry-run` checks tasks and model as well.")


def machine_lines(machine: Machine) -> Iterator[tuple[str, str]]:
    """Yield names and values that describe a machine, one line each."""
    cpu = machine.processor
    physical = "an unknown number of" if cpu.num_physical_cores is None else cpu.num_physical_cores
    usable = f"{cpu.num_usable_cores} usable by this process"
    yield "system", f"{machine.system}, Python {machine.python}"
    yield "processor", cpu.name
    yield "cores", f"{physical} physical, {cpu.num_logical_cores} logical, {usable}"
    yield "instructions", ", ".join(cpu.features) or "not listed by this system"
    yield "memory", f"{machine.memory_gib:.1f} GiB, {machine.available_memory_gib:.1f} available"
    yield "threads", f"{machine.num_torch_threads}, unless a recipe says otherwise"
    for gpu in machine.gpus:
        capability = ".".join(map(str, gpu.compute_capability))
        yield "GPU", f"{gpu.name}, {gpu.memory_gib:.1f} GiB, compute capability {capability}"
    if not machine.gpus:
        yield "GPU", "none that torch can use"
    yield "CUDA", f"{machine.cuda or 'torch is built without it'}; driver {machine.gpu_driver or 'not found'}"
    yield "float32", "yes"
    if machine.gpus:
        yield "bfloat16", "yes" if all(gpu.bfloat16 for gpu in machine.gpus) else "emulated by a GPU here, slow"
    else:
        speeds = {None: "how fast is not listed by this system", False: "slow without instructions of its own"}
        yield "bfloat16", f"yes, {speeds.get(cpu.fast_bfloat16, 'fast by its instructions (not measured)')}"
    for name, libraries in (("libraries", machine.libraries), ("optional", machine.optional_libraries)):
        yield name, ", ".join(f"{library} {found or 'not installed'}" for library, found in libraries.items())
    hub, token = (
        ("offline by HF_HUB_OFFLINE" if machine.hub_offline else "allowed"),
        "" if machine.hub_token else "not ",
    )
    yield "Hub", f"{hub}; token {token}set"


def recipe_here(recipe: Recipe, here: Machine) -> dict[str, Any]:
    """Describe, as JSON, what a recipe would use on this machine, and all reasons why it would be refused.

    Weights and rows are not read and no network is used; ``--dry-run`` reports what depends on them.
    """
    from manyicl.errors import UserError
    from manyicl.training.process_choice import choose_processes
    from manyicl.training.requirements import problems
    from manyicl.training.run_folder import RunFolder

    model, training = recipe.model, recipe.training
    refusals = [str(problem) for problem in problems(recipe)]
    try:
        RunFolder(recipe.output).require_free(recipe, overwrite=False)
    except UserError as error:
        refusals.append(str(error))
    choice = choose_processes(recipe)
    products = "bfloat16" if training.bf16 or model.dtype == "bfloat16" else "float32"
    in_4_bits = " in 4 bits" if model.quantize else ""
    adapter = "all weights"
    if model.lora is not None:
        upper = f"the {model.lora.layers} uppermost layers of " if model.lora.layers else ""
        adapter = f"an adapter of rank {model.lora.rank} over {upper}the base{in_4_bits}"
    return {
        "base": _base_sentence(recipe),
        "device": f"GPU, {here.gpus[0].name}" if here.gpus else "CPU",
        "num_processes": choice.num_processes,
        "num_threads": choice.num_threads or here.num_torch_threads,
        "precision": f"weights in {model.dtype}, products in {products}",
        "attention": "flash-attn, a sequence at once" if model.attention == "flash" else "torch, one episode at a time",
        "adapter": adapter,
        "kernels": "Liger: norms, rotary positions, gates" if training.liger else "torch",
        "refusals": refusals,
        "remarks": list(_remarks(recipe, here, choice)),
    }


def _remarks(recipe: Recipe, here: Machine, choice: ProcessChoice) -> Iterator[str]:
    from manyicl.training.requirements import must_be_fetched, remark_on_precision

    model, training = recipe.model, recipe.training
    if choice.is_news:
        yield choice.sentence()
    if training.bf16 or model.dtype == "bfloat16":
        if not here.gpus and here.processor.fast_bfloat16 is False:
            yield "This processor lists no instructions for bfloat16; float32 is likely faster, at twice the memory."
        if any(not gpu.bfloat16 for gpu in here.gpus):
            yield "A GPU here emulates bfloat16, which is slow; float32 may be faster."
    if remark := remark_on_precision(recipe):
        yield remark
    if len(here.gpus) > 1 and choice.num_processes == 1:
        command = f"torchrun --nproc-per-node {len(here.gpus)} -m manyicl train …"
        yield f"One process uses one of {len(here.gpus)} GPUs; `{command}` uses all."
    if here.gpu_driver is not None and here.cuda is None:
        yield f"An NVIDIA driver ({here.gpu_driver}) is here, but this torch is built without CUDA."
    if training.num_threads is not None and training.num_threads > here.processor.num_usable_cores:
        cores = here.processor.num_usable_cores
        yield f"training.num_threads is {training.num_threads}; this process may use {cores} cores."
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
    from manyicl.model.reference import config_folder
    from manyicl.training.requirements import must_be_fetched

    if recipe.model.from_scratch is not None:
        return f"a new {recipe.model.from_scratch.architecture} model"
    here = "on this machine" if config_folder(recipe.model.base) else "not found"
    return f"{recipe.model.base}, {'to be fetched from the Hub' if must_be_fetched(recipe) else here}"


def _print_section(console: Console, title: str, lines: Iterable[tuple[str, str]]) -> None:
    from rich.text import Text

    console.print(Text(title, "bold"))
    _print_lines(console, lines, "cyan")


def _print_lines(console: Console, lines: Iterable[tuple[str, str]], style: str) -> None:
    from rich.text import Text

    for name, value in lines:
        console.print(Text.assemble((f"  {name:<{NAME_WIDTH}}", style), value))
