"""A task and the YAML's `finetune.data` in; the place of its files, and the hub's records, out.

A task's folder is told by its name, in any spelling, and by the files in it, so `glue/RTE` (TSV) is never taken for
`superglue/RTE` (JSONL). Without a directory, or with a copy of a hub dataset in it, examples come through `datasets`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from frugalbert.finetune.tables import did_you_mean
from frugalbert.finetune.tasks import Example, Layout, Task, normal, spellings
from frugalbert.progress import reason


class Absent(FileNotFoundError):
    """A task's files are not there: a member of a group is left out, a task asked for by name is refused."""


def locate(task: Task, data: Path | None, patterns: Sequence[str]) -> Path | str:
    """The folder with the official files of a task, or the dataset to ask `datasets` for: a hub name or a copy of it.

    Args:
        data: the directory to look in, at two levels; None = the hub.
        patterns: what the official files are called; the folder is one that has any of them.
    Raises FileNotFoundError if `data` is no directory, Absent if the task is not in it.
    """
    layout = task.layout
    assert layout is not None
    if data is None:
        return layout.hub
    if not data.is_dir():
        raise FileNotFoundError(f"finetune.data: {data} is no directory; it should hold the task folders")
    names = spellings(task) | {normal(layout.folder)}
    names |= {"diagnostic", "mnli"} if task.name == "ax" else set()  # where older copies of GLUE have it
    near = [data, *_folders(data)]
    for folder in [*near, *(inner for outer in near[1:] for inner in _folders(outer))]:
        if normal(folder.name) in names and any(next(folder.glob(pattern), None) for pattern in patterns):
            return folder
    for folder in near:
        if _is_copy(folder, layout) and (folder == data or normal(folder.name) == normal(layout.hub.split("/")[-1])):
            return str(folder)
    raise Absent(
        f"finetune.data: {data} has no folder {layout.folder} with {' or '.join(patterns)}; put the official files of "
        f"{task.title} there"
    )


def _folders(path: Path) -> list[Path]:
    return sorted(inner for inner in path.iterdir() if inner.is_dir())


def _is_copy(folder: Path, layout: Layout) -> bool:
    """Whether it is a copy of the hub's dataset: Parquet files in it, or in the folder of the task."""
    inner = folder / layout.subset
    return any(folder.glob("*.parquet")) or (bool(layout.subset) and any(inner.glob("*.parquet")))


def pick(task: Task, folder: Path, names: Sequence[str]) -> Path:
    """The first of these files (patterns) that exists. Raises Absent, naming what is there instead."""
    for name in names:
        for path in sorted(folder.glob(name)):
            return path
    there = ", ".join(sorted(path.name for path in folder.iterdir())[:8])
    raise Absent(
        f"{folder} has no {names[0]} (only {there}); add the official file, or leave {task.title} out of finetune.tasks"
    )


def hub_records(task: Task, source: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`where`, record) of a split as the hub calls it; class numbers as names, -1 (a hidden label) as None.

    Raises ValueError with one sentence for whatever the network, the cache or a broken copy raises.
    """
    import datasets

    datasets.disable_progress_bars()
    layout = task.layout
    assert layout is not None
    try:
        part = datasets.load_dataset(source, layout.subset, split=split)
    except Exception as error:
        raise ValueError(
            f"cannot get {task.title} from {source} ({type(error).__name__}: {reason(error)}); without network put the "
            f"official files below a directory ({layout.folder}/…) and write it as finetune.data"
        ) from None
    names = {
        column: feature.names for column, feature in part.features.items() if isinstance(feature, datasets.ClassLabel)
    }
    for number, row in enumerate(part):
        record = dict(row)
        for column, classes in names.items():
            value = record[column]
            record[column] = None if value is None or value < 0 else classes[value]
        yield f"{source} {split} {number}", record


def need(record: dict[str, Any], columns: Iterable[str], where: str, task: Task) -> None:
    """Raises ValueError if the record lacks one of the columns."""
    for column in columns:
        if column not in record:
            hint = did_you_mean(column, record)
            raise ValueError(f"{where}: {task.title} needs {column!r}; there is {', '.join(map(repr, record))}{hint}")


def text_of(record: dict[str, Any], column: str, where: str) -> str:
    """A text of a JSON or hub record. Raises ValueError if it is none."""
    value = record.get(column)
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} is no text; every example needs one")
    return value.encode("utf-8", "replace").decode("utf-8")  # halves of surrogate pairs become `?`


def class_number(task: Task, value: Any, where: str) -> int | None:
    """The class of a label as a file or the hub writes it, by name; None stays None (not known)."""
    if value is None:
        return None
    written = str(value).strip()
    for number, names in enumerate(task.classes):
        if written in names or written.lower() in names:
            return number
    expected = ", ".join(written for written, _ in task.classes)
    raise ValueError(f"{where}: {written!r} is no label of {task.title}; its labels are {expected}")


def collect(pairs: Iterable[tuple[str, Example]], split: str, task: Task, notes: list[str]) -> list[Example]:
    """The examples of (where, example). Raises ValueError for ids that occur twice, and for rows of `train` and `dev`
    without a label; questions of a training set may share an id, which is noted.
    """
    places: dict[str, str] = {}
    found: list[Example] = []
    repeated = 0
    for where, example in pairs:
        if example.label is None and split.startswith(("train", "dev")):
            raise ValueError(
                f"{where} has no {'answer' if task.type == 'question-answering' else 'label'}; a file without them, "
                f"such as a test file, cannot be the {split} set of {task.title}"
            )
        if example.id in places:
            if task.type != "question-answering" or split != "train":
                first = places[example.id]
                raise ValueError(f"{where} has the id {example.id!r}, as has {first}; every row needs its own")
            repeated += 1
        places[example.id] = where
        found.append(example)
    if repeated:
        notes.append(f"{split}: {repeated} questions have the id of another one")
    return found
