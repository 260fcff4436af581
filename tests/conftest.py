"""Tests leave the cache folder of the user alone: they see the models in it, and keep records and tokens elsewhere."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from manyicl.paths import CACHE_VARIABLE, cache_folder


@pytest.fixture(autouse=True, scope="session")
def _own_cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    known, own = cache_folder(), tmp_path_factory.mktemp("cache")
    for folder in known.iterdir() if known.is_dir() else ():
        if folder.is_dir() and folder.name not in ("tasks", "tokens", "passed_checks", "fingerprints"):
            (own / folder.name).symlink_to(folder.resolve())
    before = os.environ.get(CACHE_VARIABLE)
    os.environ[CACHE_VARIABLE] = str(own)
    yield
    if before is None:
        del os.environ[CACHE_VARIABLE]
    else:
        os.environ[CACHE_VARIABLE] = before


@pytest.fixture(name="cache")
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of one test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(folder))
    return folder
