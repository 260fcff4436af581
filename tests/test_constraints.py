"""The pinned versions install on every Python that the package allows."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError, metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parent.parent


def test_the_oldest_python_that_is_allowed_has_every_pinned_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    oldest = f"{project['requires-python'].removeprefix('>=')}.0"
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    refused, num_checked = [], 0
    for pin in pins:
        try:
            installed = metadata(pin.name)
        except PackageNotFoundError:
            continue
        if installed["Version"] in pin.specifier:
            num_checked += 1
            if oldest not in SpecifierSet(installed["Requires-Python"] or ""):
                refused.append(f"{pin}: Python {installed['Requires-Python']}")
    assert not refused
    assert num_checked > 50
