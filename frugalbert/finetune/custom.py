"""A custom task's files in; its examples with class numbers out.

Labels are mapped by name, never by position; class order is alphabetical, numbers by value, `O` first among tags.
Without a dev file, one is held out by a hash of the text: the same for every seed, and stable under reordering.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from frugalbert import config
from frugalbert.finetune import squad
from frugalbert.finetune.conll import read_conll
from frugalbert.finetune.race import fill
from frugalbert.finetune.sources import collect
from frugalbert.finetune.tables import (
    Row,
    class_name,
    class_names,
    did_you_mean,
    option_number,
    read_custom,
    tags,
    target,
)
from frugalbert.finetune.tasks import Data, Example, Task, digest

CONVERT: dict[str, Callable[[Row], Any]] = {
    "classification": class_name,
    "regression": target,
    "multilabel": class_names,
    "multiple-choice": option_number,
    "token-classification": tags,
}
NAMED = ("classification", "multilabel", "token-classification")


def from_files(task: Task, custom: config.Task, folder: Path, predict_test: bool) -> Data:
    """Examples of `train`, `dev` and, if it is to be predicted, `test`; a test file needs no labels.

    Raises ValueError or OSError with one sentence that names the file and the line.
    """
    paths = {"train": custom.train, "dev": custom.dev, "test": custom.test if predict_test else None}
    files = {split: folder / path for split, path in paths.items() if path}
    notes: list[str] = []
    if task.type == "question-answering":
        names: tuple[str, ...] = ()
        sets = _questions(task, custom, files, notes)
    else:
        names, sets = _rows(task, custom, files, notes)
    known = {example.digest for example in sets["train"]}
    shared = sum(example.digest in known for example in sets["dev"])
    if shared:
        dev = len(sets["dev"])
        notes.append(f"{shared} of {dev} dev texts also stand in the training file; the scores are flattered")
    return Data(task, names, sets, notes=tuple(notes))


def _questions(task: Task, custom: config.Task, files: dict[str, Path], notes: list[str]) -> dict[str, list[Example]]:
    """SQuAD's form; the questions of one context are held out together."""
    sets = {split: collect(squad.read_custom(path, split, notes), split, task, notes) for split, path in files.items()}
    if "dev" not in sets:
        held = [_is_held(digest(example.text_b or ""), custom) for example in sets["train"]]
        pool = list(zip(sets["train"], held, strict=True))
        sets |= {"train": [row for row, out in pool if not out], "dev": [row for row, out in pool if out]}
    return sets


def _rows(
    task: Task, custom: config.Task, files: dict[str, Path], notes: list[str]
) -> tuple[tuple[str, ...], dict[str, list[Example]]]:
    """Class names and examples of every other type."""
    convert = CONVERT[task.type]
    if task.type == "multiple-choice" and not custom.columns.options:
        raise ValueError(f"finetune.tasks.{custom.name}: multiple-choice needs columns.options, the options' columns")
    rows: dict[str, list[Row]] = {}
    for split, path in files.items():
        read = read_conll(path, split != "test") if task.type == "token-classification" else None
        rows[split] = read or read_custom(path, custom.columns, split != "test")
    if "dev" not in rows:
        rows["train"], rows["dev"] = _split(rows["train"], custom, convert, notes)
    if any(row.label is None for row in rows.get("test", ())):
        rows["test"] = [_without_label(row) for row in rows["test"]]
    labels = {
        split: [None if row.label is None and split == "test" else convert(row) for row in part]
        for split, part in rows.items()
    }
    names: tuple[str, ...] = ()
    if task.type in NAMED:
        names = _order({name for label in labels["train"] for name in _each(label)}, task.type)
        labels = {split: _numbers(task, rows[split], labels[split], names) for split in labels}
    return names, {
        split: collect(
            ((row.where, _example(row, label)) for row, label in zip(part, labels[split], strict=True)),
            split,
            task,
            notes,
        )
        for split, part in rows.items()
    }


def _without_label(row: Row) -> Row:
    return Row(row.where, row.text, row.text_b, None, row.id, row.options, row.words)


def _example(row: Row, label: Any) -> Example:
    if row.options:
        options = row.options if row.text_b is None else tuple(fill(row.text_b, option) for option in row.options)
        names = tuple(str(number) for number in range(len(options)))
        return Example(row.text, None, label, row.id, options=options, names=names)
    return Example(row.text, row.text_b, label, row.id, words=row.words)


def _numbers(task: Task, rows: list[Row], labels: list[Any], names: tuple[str, ...]) -> list[Any]:
    """Class numbers of names. Raises ValueError for a name that training does not have."""
    numbers = {name: number for number, name in enumerate(names)}
    found: list[Any] = []
    for row, label in zip(rows, labels, strict=True):
        unseen = [name for name in _each(label) if name not in numbers]
        if unseen:
            raise ValueError(
                f"{row.where}: the label {unseen[0]!r} never occurs in training{did_you_mean(unseen[0], numbers)}; "
                f"its labels are {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
            )
        found.append(numbers[label] if isinstance(label, str) else label and tuple(numbers[name] for name in label))
    return found


def _split(
    rows: list[Row], custom: config.Task, convert: Callable[[Row], Any], notes: list[str]
) -> tuple[list[Row], list[Row]]:
    """Hold out `dev_share` by a hash of the text, so equal texts stay together; unseen classes go back to training."""
    keys = [_key(row) for row in rows]
    held = {key for key in keys if _is_held(key, custom)}
    train = [row for row, key in zip(rows, keys, strict=True) if key not in held]
    dev = [row for row, key in zip(rows, keys, strict=True) if key in held]
    if custom.type in NAMED:
        seen = {name for row in train for name in _each(convert(row))}
        back = [row for row in dev if any(name not in seen for name in _each(convert(row)))]
        if back:
            texts = {_key(row) for row in back}
            train += [row for row in dev if _key(row) in texts]
            dev = [row for row in dev if _key(row) not in texts]
            notes.append(f"{len(back)} held-out examples of classes too rare to split were given back to training")
    return train, dev


def _key(row: Row) -> str:
    """What a row is held out by: its texts; of a multiple choice the passage alone, which several questions share."""
    if row.words:
        return digest("\x1e".join(row.words))
    if row.options and row.text:
        return digest(row.text)
    return digest(row.text, row.text_b or "\x1e".join(row.options) or None)


def _is_held(key: str, custom: config.Task) -> bool:
    return int(key, 16) / 2**64 < custom.dev_share


def _each(label: Any) -> tuple[str, ...]:
    return (label,) if isinstance(label, str) else label or ()


def _order(names: set[str], kind: str) -> tuple[str, ...]:
    """Alphabetical; numbers by value; `O`, the tag of words outside any span, first."""
    if kind == "token-classification":
        return tuple(sorted(names, key=lambda name: (name != "O", name)))
    if names and all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))
