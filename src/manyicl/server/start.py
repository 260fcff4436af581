"""Put a server together: data folder, database, keys, model, worker, application; and take it apart again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

from manyicl.errors import UserError
from manyicl.server.database import Database, data_folder
from manyicl.server.job_store import JobStore
from manyicl.server.keys import KeyStore
from manyicl.server.logging import log
from manyicl.server.services import Services
from manyicl.server.settings import MIB, ServerSettings
from manyicl.server.task_service import TaskService
from manyicl.server.task_store import TaskStore

if TYPE_CHECKING:
    from manyicl.engine.engine import Engine
    from manyicl.server.prefix_store import PrefixStore

PREFIXES = "prefixes"


@contextmanager
def started(settings: ServerSettings, load_engine: Callable[[], Engine]) -> Iterator[Services]:
    """Start all parts of a server but its listening, and stop them in the end.

    What can be refused is refused before the model is loaded.

    Args:
        settings: Settings of the server.
        load_engine: Loads the model.

    Raises:
        UserError: If another server uses the data folder or database, keys are needed, or the database or the model
            cannot be used.
    """
    with ExitStack() as parts:
        data = parts.enter_context(data_folder(settings.data))
        database = Database.open(data, settings.database)
        parts.callback(database.close)
        parts.enter_context(database.serving())
        parts.callback(database.close)  # before another server may use it
        keys, tasks = KeyStore(database, data), TaskStore(database, limits=settings.store_limits)
        settings = settings.require_safe(has_keys=keys.has_keys())
        log.info("loading_model", model=settings.model)
        engine = load_engine()
        prefixes = parts.enter_context(_prefixes(settings, engine))
        prefixes.forget_others({task.newest.task_id for task in tasks.at_start()})

        from manyicl.server.engine_worker import EngineWorker
        from manyicl.server.prefix_making import model_hash

        service = TaskService(tasks, settings, model_hash(engine))
        worker = EngineWorker(
            engine,
            prefixes,
            service.source,
            service.on_ready,
            service.on_failed,
            max_waiting_rows=settings.max_waiting_rows,
        )
        services = Services(
            settings=settings,
            tasks=tasks,
            jobs=JobStore(database, limits=settings.store_limits),
            keys=keys if settings.require_keys else None,
            worker=worker,
            service=service,
            prefix_bytes=prefixes.num_bytes,
            was_rebuilt=worker.was_rebuilt,
        )
        services.metrics.add_numbers("manyicl_worker", worker.state, _SUMS)
        services.metrics.add_numbers("manyicl_prefixes", prefixes.usage, _SUMS)
        worker.start()
        parts.callback(worker.stop, settings.drain_seconds)
        service.start(worker)
        yield services


# Numbers of the worker and the prefix store that only rise.
_SUMS = (
    *("num_rows_answered", "num_rows_failed", "num_tickets_cancelled", "num_passes", "pass_seconds", "num_compiled"),
    *("num_compile_failures", "num_compiled_again", "compile_seconds"),
    *("num_evicted", "num_loaded", "num_damaged", "num_unwritten"),
)


def _prefixes(settings: ServerSettings, engine: Engine) -> PrefixStore:
    from manyicl.engine.local import LocalBackend
    from manyicl.server.prefix_store import PrefixStore

    if not isinstance(engine.backend, LocalBackend):
        raise UserError("no_local_model", "the server needs a model that runs in this process")
    memory, disk = settings.memory_mib * MIB, settings.disk_mib * MIB
    return PrefixStore(settings.data / PREFIXES, engine.backend, memory_bytes=memory, disk_bytes=disk)
