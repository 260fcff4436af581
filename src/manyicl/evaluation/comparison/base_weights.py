"""What tells the weights of a base from others, although they lie at the same place."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

from manyicl.evaluation.result import hash_of
from manyicl.model.known_fingerprints import Origin, remembered_fingerprint
from manyicl.model.manifest import Manifest
from manyicl.model.reference import HUB_PREFIX, config_folder
from manyicl.paths import sha256_of_file

# Files that decide what a model computes of a text, and not those that describe it.
DECISIVE = (
    "*.safetensors",
    "*.bin",
    "*.index.json",
    "*config.json",
    "tokenizer*",
    "*token*.json",
    "vocab*",
    "merges.txt",
)


def base_weights(base: str | None) -> str | None:
    """Return what identifies the weights and the tokenizer of a base on every machine.

    Of a folder, an adapter and its base, or a file it is a hash of its files, which is remembered as long as none of
    them changes; of a model of the Hub, its revision.

    Returns:
        None for a model of the Hub of which this machine has no copy, and for one that cannot be read.
    """
    folder = config_folder(base)
    if base is None or folder is None:
        return None
    if base.startswith(HUB_PREFIX):
        return f"revision {folder.name}"
    below: str | None = ""
    if (folder / "adapter_config.json").is_file():
        manifest = Manifest.read(folder)
        # An adapter that was trained elsewhere names its base in its own configuration.
        below = base_weights(manifest.base if manifest else _named_base(folder))
    own = remembered_fingerprint(Origin.of(folder, "hash of the files"), lambda: _hash(folder))
    return hash_of(own, below or "")


def _hash(folder: Path) -> str:
    files = sorted({file for pattern in DECISIVE for file in folder.glob(pattern) if file.is_file()})
    return hash_of(*(text for file in files for text in (file.name, sha256_of_file(file))))


def _named_base(folder: Path) -> str | None:
    with suppress(ValueError, AttributeError):  # a broken file is refused where the base is loaded
        named = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")).get("base_model_name_or_path")
        return named if isinstance(named, str) else None
    return None
