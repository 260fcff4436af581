"""How a model is named, and where it is: found without importing the libraries that load it."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import cast

from huggingface_hub import try_to_load_from_cache

from manyicl.errors import UserError, did_you_mean, quoted
from manyicl.model.gguf_conversion import ENDING as GGUF_ENDING
from manyicl.model.gguf_conversion import converted_folder
from manyicl.model.pretrained import named_folder

HUB_PREFIX = "hf:"
BUILTIN_PREFIX = "builtin:"
DTYPE_NAMES = ("float32", "bfloat16", "float16")


def resolve_reference(reference: str | Path) -> str:
    """Turn a model reference into what transformers loads: a folder that exists, or a Hub id.

    Raises:
        UserError: If a local folder does not exist or holds no model; a mistyped folder is never looked for on
            the Hub.
    """
    if not isinstance(cast(object, reference), str | Path):
        expected = "a folder or hf:owner/name"
        raise UserError("not_a_reference", "This names no model", expected=expected, found=quoted(reference))
    name = str(reference)
    if name.startswith(HUB_PREFIX):
        return name.removeprefix(HUB_PREFIX)
    if name.startswith(BUILTIN_PREFIX):
        return str(named_folder(name.removeprefix(BUILTIN_PREFIX)))
    if name.endswith(GGUF_ENDING):
        return str(converted_folder(Path(name)))
    folder = Path(name)
    if not name or not folder.is_dir():
        remedy = f"Give a folder, a .gguf file, {BUILTIN_PREFIX}nano, or {HUB_PREFIX}owner/name for one of the Hub."
        raise UserError("model_not_found", f"The model folder {name!r} does not exist", remedy=remedy)
    if not any((folder / file).is_file() for file in ("config.json", "adapter_config.json")):
        expected = "config.json or adapter_config.json in it"
        raise UserError("no_model_in_folder", f"The folder {name!r} holds no model", expected=expected)
    return name


def config_folder(base: str | None) -> Path | None:
    """Find the folder of a base on this machine, in the Hub cache too; None where there is none."""
    if base is None:
        return None
    with suppress(UserError, ValueError):  # no repository of the Hub can have such a name
        if not base.startswith(HUB_PREFIX):
            return Path(resolve_reference(base))
        cached = try_to_load_from_cache(base.removeprefix(HUB_PREFIX), "config.json")
        return Path(cached).parent if isinstance(cached, str) else None
    return None


def require_dtype_name(dtype: str | None) -> None:
    """Refuse a dtype that is not one of `DTYPE_NAMES`.

    Raises:
        UserError: If so.
    """
    if dtype is not None and dtype not in DTYPE_NAMES:
        expected, remedy = ", ".join(DTYPE_NAMES), did_you_mean(str(dtype), DTYPE_NAMES)
        what = "dtype is not one of those known"
        raise UserError("unknown_dtype", what, expected=expected, found=repr(dtype), remedy=remedy)
