"""Fine-tune one language model once, on many tasks; from then on add a task by giving examples."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from manyicl.client import Client
    from manyicl.engine.engine import Engine
    from manyicl.tasks.files import load_task, load_tasks
    from manyicl.tasks.task import Example, Query, Task, TaskSpec

try:
    __version__ = version("manyicl")
except PackageNotFoundError:  # a checkout that was never installed
    __version__ = "0+unknown"

__all__ = ["Client", "Engine", "Example", "Query", "Task", "TaskSpec", "__version__", "load_task", "load_tasks"]


def __getattr__(name: str) -> Any:
    """Import a name only when it is first used, and torch with the engine alone (PEP 562)."""
    if name == "Engine":
        from manyicl.engine.engine import Engine

        return Engine
    if name == "Client":
        from manyicl.client import Client

        return Client
    if name in __all__:
        from manyicl import tasks

        return getattr(tasks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
