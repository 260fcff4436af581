"""Processor time of answering one row with a compiled task, beside that of importing what it is made of.

    manyicl models get smollm2
    python benchmarks/start_up.py                       # builtin:one and builtin:smollm2, 7 alternations; 3 minutes
    python benchmarks/start_up.py --models builtin:nano --rounds 1

Each round starts, one after another, ``python -c 'import torch, transformers.modeling_utils'`` and, for each model,
``manyicl predict --prefix`` on one row; what counts is user plus system time of that process and its children, the
median over the rounds. Both run in the same Python with the same variables. A round that is not counted comes first, so
that files are in memory and checks that are remembered have passed.
"""

from __future__ import annotations

import argparse
import os
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

IMPORTS = "import torch, transformers.modeling_utils"
PROGRAM = "import sys; from manyicl.cli.main import main; sys.exit(main())"
# Words that every model here knows, those of the tiny one among them.
ROWS = "text,label\n" + "".join(f"hello {n % 7} please again,{('well', 'soon')[n % 2]}\n" for n in range(32))


def processor_seconds(command: Sequence[str], folder: Path) -> float:
    """Run a command and return its user plus system time, that of its children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def manyicl(*words: str) -> list[str]:
    return [sys.executable, "-W", "ignore", "-c", PROGRAM, *words]


def predict(number: int, model: str) -> list[str]:
    return manyicl("predict", "-m", model, "--prefix", f"{number}.prefix", "--input", "new.csv", "--output", "out.csv")


def measured(models: Sequence[str], num_rounds: int, folder: Path) -> dict[str, list[float]]:
    """Compile a task with each model, then let imports and answers take turns."""
    (folder / "table.csv").write_text(ROWS, encoding="utf-8")
    (folder / "new.csv").write_text("text\nhello 3 please again\n", encoding="utf-8")
    commands = {f"`{IMPORTS}`": [sys.executable, "-c", IMPORTS]}
    for number, model in enumerate(models):
        task = ("--task", "table.csv:text:label,test_fraction=0")
        processor_seconds(manyicl("compile", "-m", model, *task, "--output", f"{number}.prefix"), folder)
        commands[f"`manyicl predict --prefix`, {model}"] = predict(number, model)
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for round_number in range(num_rounds + 1):
        for name, command in commands.items():
            taken = processor_seconds(command, folder)
            if round_number:
                seconds[name].append(taken)
    return seconds


def as_table(seconds: dict[str, list[float]]) -> str:
    """Write medians, their difference from the imports, and the least and the most of the rounds."""
    base = statistics.median(next(iter(seconds.values())))
    lines = [
        "| Command | processor seconds, median | more than the imports | least to most |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, taken in seconds.items():
        median = statistics.median(taken)
        spread = f"{min(taken):.2f} to {max(taken):.2f}"
        lines.append(f"| {name} | {median:.2f} | {median - base:+.2f} | {spread} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["builtin:one", "builtin:smollm2"], help="models that answer")
    parser.add_argument("--rounds", type=int, default=7, help="alternations that count")
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        seconds = measured(arguments.models, arguments.rounds, Path(folder))
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    threads = os.environ.get("OMP_NUM_THREADS", "unset")
    print(f"Python {platform.python_version()}, {libraries}; OMP_NUM_THREADS {threads}; {arguments.rounds} rounds\n")
    print(as_table(seconds))


if __name__ == "__main__":
    main()
