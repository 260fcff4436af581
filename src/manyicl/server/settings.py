"""Settings of the server: where it listens, what it accepts, and its limits, each named once."""

from __future__ import annotations

import ipaddress
from pathlib import Path

from pydantic import Field

from manyicl.checked import Section
from manyicl.errors import UserError
from manyicl.server.records import StoreLimits

MIB = 2**20
# Names by which a browser or a command on this machine reaches a server on loopback.
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "[::1]")


class ServerSettings(Section):
    """Settings of one server; they cannot change while it runs."""

    model: str = Field(description="Model that answers: a folder, .gguf file, hf:owner/name or builtin:NAME.")
    data: Path = Field(description="Folder with the database, the prefixes and the secret of the keys.")
    database: str | None = Field(None, description="URL of a PostgreSQL database; by default SQLite in the folder.")
    host: str = Field("127.0.0.1", min_length=1, description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    require_keys: bool = Field(False, description="Whether every request needs an API key, also on loopback.")
    allowed_hosts: tuple[str, ...] = Field((), description="Further names in the header Host, without ports.")
    allowed_origins: tuple[str, ...] = Field(
        (), description="Origins of web pages elsewhere that may use the server, as in https://example.org."
    )
    max_body_bytes: int = Field(32 * MIB, ge=1024, description="Largest body of a request.")
    max_bytes_in_flight: int = Field(128 * MIB, ge=1024, description="Largest sum of the bodies that are in memory.")
    body_seconds: float = Field(60, gt=0, description="Longest time in which a body must arrive.")
    max_rows: int = Field(10_000, ge=1, description="Most rows of one request for predictions.")
    max_job_rows: int = Field(200_000, ge=1, description="Most rows of one job.")
    kept_days: float = Field(30, gt=0, description="Days after which a job that ended is deleted.")
    max_tasks: int = Field(10_000, ge=1, description="Most tasks of one owner.")
    max_pinned_tasks: int = Field(16, ge=0, description="Most tasks of one owner that are pinned in memory.")
    max_versions: int = Field(
        1000, ge=1, description="Newest versions kept of one task; older ones and their texts are deleted."
    )
    max_jobs: int = Field(1000, ge=1, description="Most jobs of one owner, ended ones included.")
    max_kept_job_rows: int = Field(2_000_000, ge=1, description="Most rows of all jobs of one owner.")
    max_idempotency_keys: int = Field(
        100_000, ge=1, description="Most requests of one owner that are remembered by their Idempotency-Key."
    )
    max_demonstrations: int = Field(20_000, ge=1, description="Most demonstrations of one task.")
    max_task_characters: int = Field(
        32_000_000, ge=1, description="Most characters of the demonstrations of one task, all together."
    )
    max_template_characters: int = Field(20_000, ge=1, description="Longest template.")
    render_seconds: float = Field(10, gt=0, description="Longest time that the templates of one request may take.")
    max_waiting_rows: int = Field(4096, ge=1, description="Most rows that wait for the model.")
    request_seconds: float = Field(120, gt=0, description="Longest time that a request waits for its answer.")
    drain_seconds: float = Field(20, ge=0, description="Time that requests have to end when the server is stopped.")
    requests_per_minute: int | None = Field(
        None, ge=1, description="Requests of a caller in a minute; none for no limit. A key may have its own."
    )
    rows_per_minute: int | None = Field(
        None, ge=1, description="Rows of a caller to predict in a minute; none for no limit. A key may have its own."
    )
    memory_mib: int = Field(4096, ge=1, description="Memory for prefixes.")
    disk_mib: int = Field(32_768, ge=0, description="Disk space for prefixes.")

    @property
    def store_limits(self) -> StoreLimits:
        """How much the database keeps."""
        return StoreLimits(
            tasks=self.max_tasks,
            pinned=self.max_pinned_tasks,
            versions=self.max_versions,
            jobs=self.max_jobs,
            job_rows=self.max_kept_job_rows,
            idempotency_keys=self.max_idempotency_keys,
        )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host.strip("[]")).is_loopback
        except ValueError:
            return False

    @property
    def accepted_hosts(self) -> frozenset[str] | None:
        """Names that the header Host may have, in lower case.

        Returns:
            None for any: with keys a page in a browser cannot do anything, whatever name it found the server by.
        """
        if not self.is_loopback and not self.allowed_hosts:
            return None
        own = {f"[{self.host}]" if ":" in self.host else self.host}
        return frozenset(name.lower() for name in (*LOOPBACK_NAMES, *own, *self.allowed_hosts))

    def require_safe(self, *, has_keys: bool) -> ServerSettings:
        """Return the settings with keys required where they must be, or where there are any.

        Raises:
            UserError: If the server could be reached from elsewhere, and there is no key.
        """
        reachable = not self.is_loopback or bool(self.allowed_hosts)
        if (reachable or self.require_keys) and not has_keys:
            what = f"a server on {self.host} can be reached from elsewhere, and there is no API key"
            if self.is_loopback:
                what = "every request is to have an API key, and there is none"
            remedy = f"Make one first: `manyicl keys create --data {self.data} --owner NAME`."
            raise UserError("keys_needed", what, remedy=remedy)
        return self.model_copy(update={"require_keys": has_keys})
