"""Task files of well-known public datasets, one folder each, by family; their rows are on the Hub.

``catalog:banking77`` names one, ``catalog:tweet_*`` those that match, ``catalog:nli`` a family, ``catalog:*`` all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from manyicl.errors import UserError, did_you_mean
from manyicl.tasks.schema import HubData, TaskFile, read_task_file

CATALOG_PREFIX = "catalog:"
CATALOG_FOLDER = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One dataset of the catalogue, as its task file describes it; nothing is downloaded to know it.

    Attributes:
        name: Name of the task and of its folder.
        spec: Content of its task file.
        data: Place of its rows on the Hub.
    """

    name: str
    spec: TaskFile
    data: HubData

    @property
    def hub(self) -> str:
        """The dataset with its configuration, as in ``hf:nyu-mll/glue cola``."""
        return f"hf:{self.data.hf} {self.data.config or ''}".strip()

    def mentions(self, word: str) -> bool:
        """Tell whether name, family, description or Hub id hold a word, in any case."""
        texts = (self.name, self.spec.family, self.spec.description or "", self.hub)
        return any(word.casefold() in text.casefold() for text in texts)


def catalog_files(reference: str) -> tuple[Path, ...]:
    """List the task files that a name, a family or a pattern matches, with or without ``catalog:``.

    Raises:
        UserError: If it matches nothing; the nearest name is offered.
    """
    pattern = reference.removeprefix(CATALOG_PREFIX) or "*"
    files = sorted(CATALOG_FOLDER.glob("*/*/task.yaml"), key=lambda file: (file.parts[-3], file.parts[-2]))
    names = [file.parent.name for file in files]
    families = sorted({file.parts[-3] for file in files})
    if pattern in names or pattern in families:
        return tuple(file for file in files if pattern in file.parts[-3:-1])
    found = tuple(file for file in files if fnmatchcase(file.parent.name, pattern))
    if not found:
        hint = did_you_mean(pattern, [*names, *families])
        remedy = f"{hint} `manyicl tasks list` shows it."
        raise UserError("unknown_task", f"The catalogue has no task {pattern!r}", remedy=remedy)
    return found


def catalog_entries(reference: str = CATALOG_PREFIX) -> tuple[CatalogEntry, ...]:
    """Read the entries that a name, a family or a pattern matches; by default all.

    Raises:
        UserError: If it matches nothing.
    """
    return tuple(_read_entry(file) for file in catalog_files(reference))


def search_catalog(entries: Sequence[CatalogEntry], word: str) -> tuple[CatalogEntry, ...]:
    """Keep the entries that mention a word.

    Raises:
        UserError: If none does; the nearest name is offered.
    """
    found = tuple(entry for entry in entries if entry.mentions(word))
    if not found:
        names = [entry.name for entry in entries]
        what = f"None of the {len(entries)} tasks of the catalogue that were searched mentions {word!r}"
        raise UserError("no_match", what, remedy=did_you_mean(word, names))
    return found


def catalog_hint(name: str) -> str:
    """Return ``" The catalogue has catalog:trec."`` where a name without the prefix is one, or an empty string."""
    is_entry = any(CATALOG_FOLDER.glob(f"*/{name}/task.yaml")) if name.isidentifier() else False
    return f" The catalogue has {CATALOG_PREFIX}{name}." if is_entry else ""


def _read_entry(file: Path) -> CatalogEntry:
    spec = read_task_file(file)
    assert isinstance(spec.data, HubData), f"{file} names no Hub dataset"
    return CatalogEntry(file.parent.name, spec, spec.data)
