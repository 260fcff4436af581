"""Three small tables that were written for manyicl, to start with: tickets, urgent messages, product titles."""

from __future__ import annotations

from pathlib import Path

from manyicl.atomic import write_atomically
from manyicl.errors import UserError
from manyicl.outputs import require_output_folder

STARTER_TABLES = Path(__file__).parent / "starter"


def write_starter_tables(folder: Path | str) -> list[Path]:
    """Copy the starter tables, a task folder each.

    Args:
        folder: Where the task folders go; created if missing.

    Returns:
        The task folders.

    Raises:
        UserError: If the folder cannot be written, or a file that would be is there with other content.
    """
    folder = Path(folder)
    require_output_folder(folder)
    files = [(path, folder / path.relative_to(STARTER_TABLES)) for path in sorted(STARTER_TABLES.glob("*/*.*"))]
    for source, place in files:
        if place.exists() and not (place.is_file() and place.read_bytes() == source.read_bytes()):
            what = "there is another file already"
            raise UserError("output_exists", what, remedy="Name another folder, or move it away.", file=place)
    for source, place in files:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(place, source.read_bytes())
    return sorted({place.parent for _, place in files})
