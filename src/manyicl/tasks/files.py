"""task.yaml and rows, local or from the Hub -> Task."""

from __future__ import annotations

import glob
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NoReturn

from manyicl.checked import validated
from manyicl.errors import MachineError, UserError, did_you_mean, located, quoted
from manyicl.paths import exists, expanded, files_below, nearest_path
from manyicl.tasks.building import TaskBuilder, require_column
from manyicl.tasks.catalog import CATALOG_PREFIX, catalog_files, catalog_hint
from manyicl.tasks.hub import LoadDataset, find_split, read_hub_rows
from manyicl.tasks.proposal import NUM_ROWS_EXAMINED, are_labels, proposal
from manyicl.tasks.rows import (
    EXCEL,
    SUFFIXES,
    LocatedRow,
    is_fielded,
    is_text,
    iter_rows,
    read_rows,
    require_file,
    suffix_of,
    unknown_suffix,
)
from manyicl.tasks.schema import HubData, Metric, OneFile, TaskFile, TwoFiles, fit_name, read_task_file, row_format
from manyicl.tasks.task import Family, Task
from manyicl.tasks.values import as_written

TASK_FILE = "task.yaml"
# As the error of a text that is not UTF-8 calls what it looks like; a name comes before its own beginning.
ENCODINGS_RECOGNISED = ("cp1252", "utf-16-le", "utf-16")
OnProgress = Callable[[int, int], None]
TABLE = re.compile(rf"(?P<path>.+?(?:{'|'.join(map(re.escape, SUFFIXES))})):(?P<columns>.+)", re.IGNORECASE)
_TABLE_FORM = (
    "PATH:QUERY_COLUMN:ANSWER_COLUMN[,group=COLUMN][,test_fraction=0.2][,seed=0][,family=NAME][,metric=NAME][,name=NAME]"
    "[,delimiter=;][,encoding=cp1252][,sheet=NAME]"
)


class _Table(OneFile):
    """A table in the short form: where it is, and the options that may follow its columns."""

    family: Family | None = None
    metric: Metric | None = None
    name: str | None = None


def load_task(path: str | Path, data_root: Path | None = None, *, load_dataset: LoadDataset | None = None) -> Task:
    """Load one task: a folder with a ``task.yaml``, the file itself, a table, or an entry of the catalogue.

    A table is written ``tickets.csv:text:label``, an entry ``catalog:banking77``. A relative data path in
    ``task.yaml`` is looked for next to that file first, then under ``data_root``. A Hub dataset is looked for in the
    folder with the task's name under ``data_root``, as ``banking77/train.jsonl``, before the Hub is contacted. A data
    path may be absolute or lead out of the folder with ``..``: a task file can name any table that its user can
    read, so check the ``data`` key of files you do not trust.

    Args:
        path: Folder, file, table or entry.
        data_root: Second folder in which to look for data files, and folder for copies of Hub datasets.
        load_dataset: Replacement of ``datasets.load_dataset``.

    Raises:
        UserError: If anything is missing or wrong; it names the file and, if possible, the line.
        MachineError: If the rows are on the Hub and the Hub cannot be reached.
    """
    places = task_places(path)
    if len(places) > 1:
        names = ", ".join(Path(place).parent.name for place in places[:5]) + (", …" if len(places) > 5 else "")
        what, remedy = f"{str(path)!r} is the name of {len(places)} tasks", f"Name one of them: {names}."
        raise UserError("several_tasks", what, remedy=remedy)
    return load_place(places[0], data_root, load_dataset)


def load_place(place: str | Path, data_root: Path | None, load_dataset: LoadDataset | None = None) -> Task:
    """Load the task of one of `task_places`: arguments and errors are those of `load_task`."""
    return load_with_rows(place, data_root, load_dataset).task


@dataclass(frozen=True)
class TaskWithRows:
    """A task, and the rows that it was rendered from.

    Attributes:
        task: The task.
        keys: Keys of its task file, or those that a table in the short form stands for.
        rows: All rows of its files, on both sides, dropped ones included.
    """

    task: Task
    keys: TaskFile
    rows: Sequence[LocatedRow]

    def train_rows(self) -> list[dict[str, Any]]:
        """Return the columns of the rows of ``task.train``, in its order.

        Raises:
            UserError: If two files have the same name, so that the rows of one cannot be told from those of the other.
        """
        by_origin = {row.origin: row for row in self.rows}
        if len(by_origin) < len(self.rows):
            what = f"two data files of task {self.task.name!r} have the same name, in different folders"
            raise UserError("repeated_file_name", what, remedy="Rename one.", field="data")
        return [by_origin[example.origin].columns for example in self.task.train]


def load_with_rows(place: str | Path, data_root: Path | None, load_dataset: LoadDataset | None = None) -> TaskWithRows:
    """Load the task of one of `task_places` together with its rows; arguments and errors are those of `load_task`."""
    data_root = data_root and Path(expanded(data_root))
    if data_root is not None and not (exists(data_root) and data_root.is_dir()):
        raise UserError("not_a_folder", "the data root is no folder", remedy=nearest_path(data_root), file=data_root)
    if isinstance(place, Path):
        return _build_task(read_task_file(place), place, data_root, load_dataset)
    path, columns = TABLE.findall(place)[0]
    with located(file=path):
        return _task_from_table(path, columns)


def load_tasks(
    patterns: str | Path | Sequence[str | Path],
    data_root: Path | None = None,
    load: Callable[[str | Path, Path | None], Task] = load_place,
    on_progress: OnProgress | None = None,
) -> list[Task]:
    """Load tasks from task folders, ``task.yaml`` files, globs, tables and the catalogue; each once.

    Args:
        patterns: Patterns such as ``tasks/banking77``, ``tasks``, ``tasks/tweet_*``, ``tickets.csv:text:label``,
            ``catalog:banking77``, ``catalog:tweet_*``, ``catalog:nli``; or a single one.
        data_root: Second folder in which to look for data files; see ``load_task``.
        load: Loads the task of one place.
        on_progress: Called before each task with how many are loaded, of how many.

    Raises:
        UserError: If a pattern matches nothing, two tasks have the same name, or a task is wrong.
    """
    places: dict[str, str | Path] = {}
    for pattern in [patterns] if isinstance(patterns, str | Path) else patterns:
        for place in task_places(pattern):
            places.setdefault(str(place.resolve()) if isinstance(place, Path) else place, place)
    tasks: list[Task] = []
    place_of: dict[str, str | Path] = {}
    for number, place in enumerate(places.values()):
        if on_progress:
            on_progress(number, len(places))
        task = load(place, data_root)
        if place_of.setdefault(task.name, place) != place:
            what = f"Two tasks are named {task.name!r}: {place_of[task.name]} and {place}"
            raise UserError("duplicate_task", what, remedy="Rename one with `name:` in its task.yaml.")
        tasks.append(task)
    return tasks


def task_places(pattern: str | Path) -> list[str | Path]:
    """List the task files, or the table, that one pattern names; links to folders are followed.

    Raises:
        UserError: If it names nothing.
    """
    if not isinstance(pattern, str | Path) or not str(pattern).strip():  # to Python, "" is the current folder
        found = "an empty name" if isinstance(pattern, str | Path) else quoted(pattern)
        expected = "a folder, a table or an entry of the catalogue"
        raise UserError("no_task_named", "No task is named", expected=expected, found=found)
    pattern = expanded(pattern)
    path = Path(pattern)
    if pattern.startswith(CATALOG_PREFIX):
        return list(catalog_files(pattern))
    if not exists(path):
        if TABLE.fullmatch(pattern):
            return [pattern]
        if glob.has_magic(pattern):
            return _matching_places(pattern)
        _refuse_missing(path)
    if path.is_dir():
        found_below = [path / TASK_FILE] if (path / TASK_FILE).is_file() else _task_files_below(path)
        if not found_below:
            what = f"the folder holds no {TASK_FILE}, nor does any folder in it"
            remedy = did_you_mean(TASK_FILE, sorted(entry.name for entry in path.iterdir() if entry.is_file()))
            raise UserError("no_tasks", what, remedy=remedy, file=path)
        return list(found_below)
    if not path.is_file():
        _refuse_missing(path)
    if suffix_of(path) in SUFFIXES:
        raise _without_columns(path)
    return [path]


def _without_columns(path: Path) -> UserError:
    """Make the error for a table that is named alone: it proposes the columns, and the encoding where it needs one."""
    encoding = None
    try:
        rows = list(islice(iter_rows(path), NUM_ROWS_EXAMINED))
    except UserError as error:
        seems = f"{error.what} {error.remedy}".lower()
        encoding = next((name for name in ENCODINGS_RECOGNISED if error.code == "not_utf8" and name in seems), None)
        if encoding is None:
            raise
        rows = list(islice(iter_rows(path, encoding=encoding), NUM_ROWS_EXAMINED))
    what, found = "a table is no task by itself", f"text that looks like {encoding}" if encoding else None
    remedy = f"Name its columns too, as in {proposal(path, rows, encoding)}"
    return UserError("table_without_columns", what, found=found, remedy=remedy, file=path)


def _refuse_missing(path: Path) -> NoReturn:
    table = Path(str(path).partition(":")[0])
    if table != path and table.is_file() and suffix_of(table) not in SUFFIXES:
        raise unknown_suffix(table)
    hints = f"{nearest_path(path)}{catalog_hint(str(path))}"
    remedy = f"{hints} `manyicl tasks list FOLDER` lists those of a folder, `manyicl tasks list` the catalogue."
    raise UserError("unknown_task", f"The task {str(path)!r} does not exist", remedy=remedy)


def _task_files_below(folder: Path) -> list[Path]:
    """Find the task files in a folder and all folders in it."""
    return sorted(path for path in files_below(folder) if path.name == TASK_FILE)


def _matching_places(pattern: str) -> list[str | Path]:
    """List the task files under all that a glob matches; other files that it matches are passed over."""
    places: list[str | Path] = []
    for match in map(Path, sorted(glob.glob(pattern, recursive=True))):  # noqa: PTH207
        if match.is_dir():
            places += _task_files_below(match)
        elif match.suffix in (".yaml", ".yml"):
            places.append(match)
    if not places:
        what = f"No {TASK_FILE} matches {pattern!r}; the pattern is relative to {Path.cwd()}"
        raise UserError("no_tasks", what)
    return places


def table_of_short_form(reference: str) -> tuple[OneFile, str, str]:
    """Return the table that a reference such as ``tickets.csv:text:label`` names, its query and its answer column.

    Raises:
        UserError: If no answer column is named, or an option is wrong.
    """
    return _read_short_form(*TABLE.findall(reference)[0])


def _read_short_form(path: str, columns: str) -> tuple[_Table, str, str]:
    pair, *options = columns.split(",")
    query_column, _, answer_column = map(str.strip, pair.partition("->" if "->" in pair else ":"))
    if not query_column or not answer_column:
        found, remedy = f"{path}:{columns}", "A shell cuts an unquoted `->` off; write a colon instead."
        raise UserError("bad_table", "no answer column is named", expected=_TABLE_FORM, found=found, remedy=remedy)
    settings: dict[str, str] = {}
    for option in options:
        key, _, value = option.partition("=")
        if not value or key in settings:
            what = f"the option {key!r} has no value, or is given twice"
            raise UserError("bad_table", what, expected=_TABLE_FORM)
        settings[key] = value
    table = validated(_Table, {**settings, "file": path}, path)
    return table, query_column, answer_column


def _task_from_table(path: str, columns: str) -> TaskWithRows:
    """Load ``tickets.csv:text:label``, or ``tickets.csv:text->label``, with options such as ``,group=customer``.

    Where no family is given, answers decide it. They are *labels* (classification, labels from the training
    rows) if there are at least two and at most 100 different ones, without line breaks, and each is in
    five rows or more on average; any other answers are *free* (generation). Rows without an answer are
    dropped and counted, because tables of labelled and unlabelled rows are common.
    """
    table, query_column, answer_column = _read_short_form(path, columns)
    file = Path(expanded(path))
    _require_of_use(table, (path,), path)
    rows = read_rows(file, **row_format(table))
    for column in filter(None, (query_column, answer_column, table.group)):
        require_column(rows, column, file)
    kept = [row for row in rows if str(as_written(row.columns[answer_column])).strip()]
    values = {
        "name": table.name or fit_name(file.name[: -len(suffix_of(file))]),
        "family": table.family or _inferred_family([row.columns[answer_column] for row in kept]),
        "metric": table.metric,
        "query": _column_template(query_column),
        "answer": _column_template(answer_column),
        "data": table,
    }
    keys = validated(TaskFile, {key: value for key, value in values.items() if value is not None}, file)
    builder = TaskBuilder(keys, path)
    has_answer = {row.origin for row in kept}
    builder.drop("empty answer", (row.origin for row in rows if row.origin not in has_answer))
    return TaskWithRows(builder.split_task(kept, table), keys, kept)


def _inferred_family(answers: Sequence[object]) -> Literal["classification", "generation"]:
    """Tell labels from free answers; ``_task_from_table`` states the rule."""
    return "classification" if are_labels([str(as_written(answer)).strip() for answer in answers]) else "generation"


def _column_template(column: str) -> str:
    """Write the template of a column alone, whatever its name."""
    escaped = column.replace("\\", "\\\\").replace("'", "\\'")
    return f"{{{{ row['{escaped}'] }}}}"


def _build_task(keys: TaskFile, file: Path, data_root: Path | None, load_dataset: LoadDataset | None) -> TaskWithRows:
    builder = TaskBuilder(keys, str(file), default_name=file.resolve().parent.name)
    data = keys.data
    if isinstance(data, HubData):
        train, test = (
            _hub_rows(data, split, keys, builder.name, data_root, load_dataset) for split in (data.train, data.test)
        )
        return TaskWithRows(builder.two_sided_task(train, test), keys, [*train, *test])
    paths = (data.file,) if isinstance(data, OneFile) else (*data.train, *data.test)
    _require_of_use(data, paths, file)
    rows_of = {path: _read_local(path, data, file, data_root) for path in paths}
    rows = [row for rows in rows_of.values() for row in rows]
    if isinstance(data, OneFile):
        return TaskWithRows(builder.split_task(rows, data), keys, rows)
    train, test = ([row for path in side for row in rows_of[path]] for side in (data.train, data.test))
    return TaskWithRows(builder.two_sided_task(train, test), keys, rows)


def _require_of_use(data: TwoFiles | OneFile, paths: Sequence[str], place: str | Path) -> None:
    """Refuse what says how to read a kind of file that is not there."""
    files = [Path(path) for path in paths]
    kinds: tuple[tuple[set[str], str, bool], ...] = (
        ({"delimiter", "quotes"}, "CSV or TSV", any(map(is_fielded, files))),
        ({"encoding"}, "a text", any(map(is_text, files))),
        ({"sheet"}, "an Excel workbook", any(suffix_of(path) in EXCEL for path in files)),
    )
    for keys, kind, is_there in kinds:
        for key in () if is_there else sorted(data.model_fields_set & keys):
            what = f"data: {key} has no effect, for no file is {kind}"
            raise UserError("no_effect", what, remedy="Leave it out.", file=place, field=f"data.{key}")


def _hub_rows(
    data: HubData, split: str, keys: TaskFile, name: str, data_root: Path | None, load_dataset: LoadDataset | None
) -> list[LocatedRow]:
    """Read a split of a Hub dataset: from the folder of the task's name under the data root, else from the Hub."""
    folder = data_root / name if data_root is not None else None
    if folder is not None and folder.is_dir():
        return [row for path in find_split(folder, split) for row in read_rows(path)]
    read = partial(read_hub_rows, config=data.config, revision=data.revision, class_names=keys.class_names)
    try:
        return read(data.hf, split, load_dataset=load_dataset)
    except MachineError as error:
        files = " and ".join(f"{name}/{split}.jsonl" for split in (data.train, data.test))
        copy = f"A copy is read from the folder that --data-root names, as {files}, CSV or Parquet."
        folders = [entry.name for entry in sorted(data_root.iterdir()) if entry.is_dir()] if data_root else []
        raise MachineError(f"{error} {copy}{did_you_mean(name, folders)}") from error


def _candidates(written: str, task_file: Path, data_root: Path | None) -> list[Path]:
    """List where a data path may lead: next to the task file, or else under the data root."""
    return [place / expanded(written) for place in (task_file.parent, *filter(None, [data_root]))]


def source_files(place: str | Path, data_root: Path | None) -> list[Path] | None:
    """List the files and folders that decide which examples a place has, those that are missing included.

    Returns:
        None where the rows come from the Hub.

    Raises:
        UserError: If the task file or a folder of data is not as it should be.
    """
    if isinstance(place, str):
        return [Path(expanded(TABLE.findall(place)[0][0]))]
    data_root = data_root and Path(expanded(data_root))
    keys = read_task_file(place)
    data = keys.data
    if not isinstance(data, HubData):
        paths = (data.file,) if isinstance(data, OneFile) else (*data.train, *data.test)
        return [place, *(candidate for path in paths for candidate in _candidates(path, place, data_root))]
    folder = data_root / (keys.name or fit_name(place.resolve().parent.name)) if data_root else None
    if folder is None or not folder.is_dir():
        return None
    # Another file may be found there once one is added, which changes the time of the folder.
    return [place, folder, *find_split(folder, data.train), *find_split(folder, data.test)]


def _read_local(written: str, data: TwoFiles | OneFile, task_file: Path, data_root: Path | None) -> list[LocatedRow]:
    """Read the rows of a data path: next to the task file, or else under the data root."""
    candidates = _candidates(written, task_file, data_root)
    path = next((candidate for candidate in candidates if exists(candidate)), None)
    if path is None:
        looked = " nor ".join(str(candidate) for candidate in dict.fromkeys(candidates))
        hint = nearest_path(candidates[-1])
        if data_root is None and not hint:
            hint = "If the data is elsewhere, name that folder with --data-root."
        what = f"the data file {looked} does not exist"
        raise UserError("missing_file", what, remedy=hint, file=task_file, field="data")
    require_file(path)
    rows = read_rows(path, **row_format(data))
    if not rows and not (isinstance(data, TwoFiles) and written in data.test):
        remedy = f"Add some, or leave the file out of {task_file}."
        raise UserError("no_rows", "the file holds no rows", remedy=remedy, file=path)
    return rows
