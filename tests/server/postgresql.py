"""A PostgreSQL server in a temporary folder, from the programs that Debian's package installs."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

USER = "manyicl"


def programs() -> Path:
    """Return the folder of PostgreSQL's programs; skip the test where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    initdb = shutil.which("initdb")
    if initdb is None:
        pytest.skip("PostgreSQL is not installed: there is no `initdb` (Debian's package `postgresql` has it)")
    return Path(initdb).parent


def other_user() -> str:
    """Return a user without rights."""
    return next(one.pw_name for one in pwd.getpwall() if one.pw_name in ("postgres", "nobody"))


@contextmanager
def running_postgresql() -> Iterator[str]:
    """Start a server on a Unix socket, and yield the URL of it, to which the name of a database is added."""
    folder = Path(tempfile.mkdtemp(prefix="manyicl-postgresql-"))
    # PostgreSQL refuses to run as root.
    as_user = {"user": other_user()} if os.geteuid() == 0 else {}
    try:
        for user in as_user.values():
            shutil.chown(folder, user)
        data, bin_folder = folder / "data", programs()
        initialize = [
            bin_folder / "initdb",
            "-D",
            data,
            "-U",
            USER,
            "-A",
            "trust",
            "-E",
            "UTF8",
            "--locale=C",
            "--no-sync",
        ]
        subprocess.run(initialize, check=True, capture_output=True, cwd=folder, **as_user)  # type: ignore[call-overload]
        options = f"-k {folder} -c listen_addresses='' -c fsync=off"
        control = [bin_folder / "pg_ctl", "-D", data, "-w", "-l", folder / "log"]
        subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True, cwd=folder, **as_user)  # type: ignore[call-overload]
        try:
            yield f"postgresql://{USER}@/{{name}}?host={folder}"
        finally:
            stop = [*control, "-m", "immediate", "stop"]
            subprocess.run(stop, check=True, capture_output=True, cwd=folder, **as_user)  # type: ignore[call-overload]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
