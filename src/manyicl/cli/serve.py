"""`manyicl serve`: answer tasks over HTTP."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Annotated, Any

import typer

from manyicl.cli import options

if TYPE_CHECKING:
    from types import FrameType

    from manyicl.engine.engine import Engine


def serve_command(
    model: options.Model,
    data: options.DataFolder,
    host: Annotated[
        str, typer.Option(help="Address to listen on; one that others reach needs API keys.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 takes a free one.")] = 8000,
    database: options.DatabaseUrl = None,
    require_keys: Annotated[
        bool, typer.Option("--require-keys", help="Refuse to start without an API key, also on loopback.")
    ] = False,
    allow_host: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="Further name of the server, as a proxy passes it on; repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Origin of a web page that may use it; repeatable.")
    ] = None,
    memory_mib: Annotated[int, typer.Option(min=1, help="Memory for prefixes, besides the model's.")] = 4096,
    disk_mib: Annotated[int, typer.Option(min=0, help="Disk space for prefixes.")] = 32_768,
    max_versions: Annotated[int, typer.Option(min=1, help="Newest versions that are kept of each task.")] = 1000,
    requests_per_minute: Annotated[int | None, typer.Option(min=1, help="Limit of each key. [default: none]")] = None,
    rows_per_minute: Annotated[int | None, typer.Option(min=1, help="Limit of each key. [default: none]")] = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="Time that requests have to end at a stop.")] = 20,
    max_context_tokens: options.MaxContextTokens = None,
    text_format: options.TextFormat = None,
    end_of_answer: options.EndOfAnswer = None,
    activation_budget_mib: options.ActivationBudgetMib = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
) -> None:
    """Serve one model over HTTP: tasks are made of examples and answer rows, as /openapi.json describes.

    Tasks, versions and demonstrations are kept in DATA. Without API keys only this machine can use the server; `manyicl
    keys create --data DATA` makes a key, and as soon as there is one, every request needs one. SIGTERM or Ctrl-C ends
    the server after the requests in progress.

    Examples:

        manyicl serve --model builtin:one --data tasks.data

        curl -s localhost:8000/v1/tasks -H 'Content-Type: application/json' -d '{"name": "mood", "task": {"labels":
        "from_train"}, "demonstrations": [{"query": "what a film", "answer": "good"}, {"query": "so dull", "answer":
        "bad"}]}'
    """
    options.require_server_libraries()
    options.require_model(model, dtype)
    values = {
        **{"model": model, "data": data, "database": database, "host": host, "port": port},
        **{"require_keys": require_keys, "allowed_hosts": allow_host or (), "allowed_origins": allow_origin or ()},
        **{"memory_mib": memory_mib, "disk_mib": disk_mib, "drain_seconds": drain_seconds},
        "max_versions": max_versions,
        **{"requests_per_minute": requests_per_minute, "rows_per_minute": rows_per_minute},
    }

    def load() -> Engine:
        return options.load_engine(
            model, dtype, device, text_format, end_of_answer, max_context_tokens, activation_budget_mib
        )

    _serve(values, load)


def _serve(values: dict[str, Any], load: Any) -> None:
    """Start the parts, listen, and stop them in the end."""
    from contextlib import ExitStack

    from manyicl.checked import validated
    from manyicl.server.app import create_app
    from manyicl.server.listening import listen, reserved
    from manyicl.server.logging import set_up_logging
    from manyicl.server.memory import share_arenas
    from manyicl.server.settings import ServerSettings
    from manyicl.server.start import started

    share_arenas()
    set_up_logging()
    # Whatever it is that runs, the parts that were started are stopped; uvicorn has its own handler while it listens.
    signal.signal(signal.SIGTERM, _end)
    with ExitStack() as parts:
        settings = validated(ServerSettings, values, None)
        address = parts.enter_context(reserved(settings))
        services = parts.enter_context(started(settings, load))
        listen(create_app(services), services, address, lambda url: typer.echo(f"{values['model']} answers on {url}"))


def _end(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(0)
