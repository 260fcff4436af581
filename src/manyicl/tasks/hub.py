"""Rows from the Hugging Face Hub, or from a local copy of its files."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from manyicl.errors import MachineError, UserError, did_you_mean
from manyicl.library_errors import reason
from manyicl.tasks.rows import NARROW_NUMBERS, SUFFIXES, LocatedRow, text_of
from manyicl.tasks.values import with_own_digits

LoadDataset = Callable[..., Any]


def read_hub_rows(
    name: str,
    split: str,
    *,
    config: str | None = None,
    revision: str | None = None,
    class_names: Mapping[str, Mapping[str, str]] | None = None,
    load_dataset: LoadDataset | None = None,
) -> list[LocatedRow]:
    """Read one split of a Hub dataset through `datasets`; numbered classes become their names, CSV stays as written.

    A private or gated dataset needs a token. The Hub's own library takes it from the environment (``HF_TOKEN``);
    it is neither read nor passed on here, and cut out of what that library says.

    Args:
        name: Dataset as ``owner/name``.
        split: Split of it, such as ``train`` or ``validation[:500]``.
        config: Configuration, where the dataset has several.
        revision: Branch, tag or commit, to fix what is read.
        class_names: Columns that a task file names the classes of. Their numbers stay, so that its names are given,
            and are compared with the Hub's: a wrong order would turn every label into another.
        load_dataset: Replacement of ``datasets.load_dataset``.

    Raises:
        UserError: If the dataset, configuration or split does not exist, or its classes are others.
        MachineError: If the Hub cannot be reached.
    """
    if load_dataset is None:
        from datasets import load_dataset as datasets_load_dataset

        load_dataset = datasets_load_dataset
    place = f"hf:{name} {split}"
    try:
        dataset = load_dataset(name, config, split=split, revision=revision)
        if getattr(getattr(dataset, "info", None), "builder_name", None) == "csv":
            # Its reader has made 1 of a label 001, and nothing of NA: read it again, as text.
            as_text = _columns_as_text(dataset.features)
            dataset = load_dataset(
                name, config, split=split, revision=revision, features=as_text, keep_default_na=False
            )
    except Exception as error:
        if _is_unreachable(error):
            offline = ", and HF_HUB_OFFLINE keeps this machine offline" if os.environ.get("HF_HUB_OFFLINE") else ""
            raise MachineError(f"{place}: the Hub cannot be reached{offline} ({reason(error)}).") from error
        if not isinstance(error, ValueError | OSError | RuntimeError):
            raise
        remedy = "Set HF_TOKEN in the environment if it is private or gated." if _wants_token(error) else None
        what = f"cannot be loaded, {reason(error)}"
        raise UserError("dataset_not_loaded", what, remedy=remedy, file=place) from error
    features = getattr(dataset, "features", None) or {}
    hub_names = {column: list(feature.names) for column, feature in features.items() if getattr(feature, "names", None)}
    for column, names in (class_names or {}).items():
        if column in hub_names:
            _require_same_classes(names, hub_names.pop(column), column, place)

    widths = {column: feature.dtype for column, feature in features.items() if _is_narrow(feature)}

    def columns_of(row: Mapping[str, Any], number: int) -> dict[str, Any]:
        read = {
            column: partial(with_own_digits, value, widths[column])
            if column in widths
            else partial(_named, value, hub_names.get(column))
            for column, value in row.items()
        }
        return {column: text_of(value, column, place, number) for column, value in read.items()}

    return [LocatedRow(columns_of(row, number), place, number) for number, row in enumerate(dataset, start=1)]


def _is_narrow(feature: Any) -> bool:
    """Tell whether a column holds numbers of 16 or 32 bits, which `datasets` returns with the digits of 64."""
    return getattr(feature, "dtype", None) in NARROW_NUMBERS.values()


def _columns_as_text(features: Mapping[str, Any]) -> Any:
    """Return features of text, but for columns whose classes the dataset names."""
    from datasets import Features, Value

    return Features(
        {column: one if getattr(one, "names", None) else Value("string") for column, one in features.items()}
    )


def _is_unreachable(error: BaseException) -> bool:
    """Tell a Hub that does not answer from one that says no; `datasets` wraps the one in the other at times."""
    cause: BaseException | None = error
    while cause is not None:
        # httpx, which the Hub's library asks with, derives its errors from none of Python's own.
        if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.startswith("httpx"):
            return True
        cause = cause.__cause__
    return False


def _wants_token(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in ("gated", "private", "authenticat", "401", "403"))


def _require_same_classes(names: Mapping[str, str], hub_names: list[str], column: str, place: str) -> None:
    """Refuse class names of a task file that cannot be the Hub's: other numbers, or the same words in another order."""
    ours = [_letters(names.get(str(number), "")) for number in range(len(hub_names))]
    theirs = [_letters(name) for name in hub_names]
    if set(names) != {str(number) for number in range(len(hub_names))}:
        what, found = f"class_names of {column!r} are others than on the Hub", f"{len(names)} classes"
    elif ours != theirs and sorted(ours) == sorted(theirs):
        what, found = f"class_names of {column!r} are in another order than on the Hub", None
    else:
        return
    expected = f"the {len(hub_names)} classes {hub_names}"
    raise UserError("other_classes", what, expected=expected, found=found, file=place, field="class_names")


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.casefold()))


def _named(value: Any, names: list[str] | None) -> Any:
    """Turn a class number into its name; the Hub marks an unlabelled row with -1, which is no class."""
    if names is None or not isinstance(value, int):
        return value
    return names[value] if 0 <= value < len(names) else None


def find_split(folder: Path, split: str) -> list[Path]:
    """Find the files of one split in a folder: ``test.jsonl`` and the like, or the Hub's numbered Parquet files.

    Raises:
        UserError: If there is none, or several of different kinds.
    """
    whole = [folder / f"{split}{suffix}" for suffix in SUFFIXES if (folder / f"{split}{suffix}").is_file()]
    found = whole or sorted(folder.glob(f"{glob.escape(split)}-*-of-*.parquet"))
    if len(whole) > 1:
        names = " and ".join(path.name for path in whole)
        raise UserError("split_twice", f"the folder holds {names}", remedy="Keep one of them.", file=folder)
    if not found:
        others = ", ".join(suffix for suffix in SUFFIXES if suffix != ".jsonl")
        what, expected = f"the split {split!r} is missing", f"{folder / split}.jsonl, or {others}"
        remedy = did_you_mean(f"{split}.jsonl", sorted(entry.name for entry in folder.iterdir()))
        raise UserError("missing_split", what, expected=expected, remedy=remedy, file=folder)
    return found
