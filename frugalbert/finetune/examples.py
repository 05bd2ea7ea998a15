"""A task in; its training and development examples with class numbers out.

Sources: the official GLUE files or the hub's copy of them, files of the user's, or the corpus (`python_docs.py`).
Labels are mapped by name, never by position; class order is Hugging Face's for GLUE and alphabetical otherwise. Splits
and subsets are drawn by a hash of the text: the same for every seed, and stable under reordering.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from frugalbert import config
from frugalbert.finetune.tables import Row, class_name, class_names, did_you_mean, read_custom, read_glue, target
from frugalbert.finetune.tasks import Data, Example, Label, Layout, Task, digest, normal

HUB = "nyu-mll/glue"


def load(task: Task, section: config.Finetune, folder: Path, corpus: Path | None) -> Data:
    """Examples of one task. `folder` = the YAML's, `corpus` = the corpus stage's directory.

    Raises ValueError or OSError with one sentence for files that are absent, damaged or without anything to learn.
    """
    if task.custom:
        data = _from_files(task, task.custom, folder)
    elif task.layout:
        data = _from_glue(task, task.layout, folder / section.data if section.data else None)
    else:
        from frugalbert.finetune.python_docs import examples

        if corpus is None:
            raise ValueError(
                "finetune.tasks: python-docs is made from the run's corpus; add corpus: {sources: [python-docs]}"
            )
        labels, train, dev = examples(corpus, section.max_train_examples)
        data = Data(task, labels, {"train": train, "dev": dev})
    _check(data)
    if task.layout or task.custom:
        data = replace(data, sets={**data.sets, "train": limit(data.train, section.max_train_examples)})
    return data


# ---- GLUE -----------------------------------------------------------------------------------------------------------


def _from_glue(task: Task, layout: Layout, data: Path | None) -> Data:
    if data is not None and not data.is_dir():
        raise FileNotFoundError(f"finetune.data: {data} is no directory; it should hold {layout.folder}/train.tsv")
    folder = _glue_folder(layout, data) if data else None
    numbers = {name: number for number, names in enumerate(task.classes) for name in names}
    sets: list[list[Example]] = []
    for split in ("train", "dev"):
        rows = _glue_rows(folder, split, layout) if folder else _hub_rows(task, layout, split, str(data or HUB))
        labels = [class_name(row) if task.classes else target(row) for row in rows]
        for row, label in zip(rows, labels, strict=True):
            if isinstance(label, str) and label not in numbers:
                expected = ", ".join(written for written, _ in task.classes)
                raise ValueError(f"{row.where}: {label!r} is no label of {task.title}; its labels are {expected}")
        sets.append(_examples(rows, [numbers[label] if isinstance(label, str) else label for label in labels]))
    return Data(task, tuple(name for _, name in task.classes), {"train": sets[0], "dev": sets[1]})


def _glue_folder(layout: Layout, data: Path) -> Path | None:
    """The task's folder below `data`, in any spelling; None if `data` is a copy of the hub's dataset instead."""
    for path in sorted(data.iterdir()):
        if path.is_dir() and normal(path.name) == normal(layout.folder) and any(path.glob("*.tsv")):
            return path
    if (data / layout.subset).is_dir() or any(data.glob("*.parquet")) or (data / "README.md").exists():
        return None
    raise FileNotFoundError(f"finetune.data: {data} has no folder {layout.folder}; put {layout.folder}/train.tsv there")


def _glue_rows(folder: Path, split: str, layout: Layout) -> list[Row]:
    path = folder / f"{split}.tsv"
    if not path.exists():
        there = ", ".join(sorted(file.name for file in folder.glob("*.tsv")))
        raise FileNotFoundError(
            f"{folder} has no {path.name} (only {there}); add the official file, or leave {layout.subset} out of "
            "finetune.tasks"
        )
    return read_glue(path, layout.columns, layout.width, layout.header)


def _hub_rows(task: Task, layout: Layout, split: str, source: str) -> list[Row]:
    """Rows through `datasets`: from the hub's `nyu-mll/glue`, or from a directory that is a copy of it."""
    import datasets

    datasets.disable_progress_bars()
    name = "validation" if split == "dev" else split
    try:
        part = datasets.load_dataset(source, layout.subset, split=name)
    except Exception as error:  # whatever the network, the cache or a broken copy raises
        reason = (str(error).splitlines() or [""])[0][:160]
        raise ValueError(
            f"cannot get {task.title} from {source} ({type(error).__name__}: {reason}); without network put the "
            f"official files below a directory ({layout.folder}/train.tsv) and write it as finetune.data"
        ) from None
    missing = [column for column in (*layout.fields, "label") if column not in part.column_names]
    if missing:
        raise ValueError(f"{source}: {task.title} has no column {missing[0]!r}; it has {', '.join(part.column_names)}")
    names = getattr(part.features["label"], "names", None)
    rows = []
    for number, record in enumerate(part):
        texts = [record[column].strip() for column in layout.fields]
        label = names[record["label"]] if names else record["label"]
        rows.append(Row(f"{source} {name} {number}", texts[0], texts[1] if len(texts) > 1 else None, label))
    return rows


# ---- custom files ---------------------------------------------------------------------------------------------------


def _from_files(task: Task, custom: config.Task, folder: Path) -> Data:
    columns = custom.columns
    train = read_custom(folder / custom.train, columns.text, columns.text_b, columns.label)
    notes: list[str] = []
    convert: Callable[[Row], Any]
    convert = {"classification": class_name, "regression": target, "multilabel": class_names}[task.type]
    if custom.dev:
        dev = read_custom(folder / custom.dev, columns.text, columns.text_b, columns.label)
    else:
        train, dev = _split(train, custom, convert, notes)
    labels = {split: [convert(row) for row in rows] for split, rows in (("train", train), ("dev", dev))}
    if task.type == "regression":
        names: tuple[str, ...] = ()
        sets = [_examples(train, labels["train"]), _examples(dev, labels["dev"])]
    else:
        names = _order({name for label in labels["train"] for name in _each(label)})
        numbers = {name: number for number, name in enumerate(names)}
        for row, label in zip(dev, labels["dev"], strict=True):
            unseen = [name for name in _each(label) if name not in numbers]
            if unseen:
                raise ValueError(
                    f"{row.where}: the label {unseen[0]!r} never occurs in training{did_you_mean(unseen[0], numbers)}; "
                    f"its labels are {', '.join(names[:20])}{' …' if len(names) > 20 else ''}"
                )
        sets = [
            _examples(
                rows, [numbers[x] if isinstance(x, str) else tuple(numbers[name] for name in x) for x in labels[split]]
            )
            for split, rows in (("train", train), ("dev", dev))
        ]
    known = {example.digest for example in sets[0]}
    shared = sum(example.digest in known for example in sets[1])
    if shared:
        notes.append(f"{shared} of {len(sets[1])} dev texts also stand in the training file; the scores are flattered")
    return Data(task, names, {"train": sets[0], "dev": sets[1]}, notes=tuple(notes))


def _split(
    rows: list[Row], custom: config.Task, convert: Callable[[Row], Any], notes: list[str]
) -> tuple[list[Row], list[Row]]:
    """Hold out `dev_share` by a hash of the text, so equal texts stay together; unseen classes go back to training."""
    held = [int(digest(row.text, row.text_b), 16) / 2**64 < custom.dev_share for row in rows]
    train = [row for row, out in zip(rows, held, strict=True) if not out]
    dev = [row for row, out in zip(rows, held, strict=True) if out]
    if custom.type != "regression":
        seen = {name for row in train for name in _each(convert(row))}
        back = [row for row in dev if any(name not in seen for name in _each(convert(row)))]
        if back:
            texts = {digest(row.text, row.text_b) for row in back}
            train += [row for row in dev if digest(row.text, row.text_b) in texts]
            dev = [row for row in dev if digest(row.text, row.text_b) not in texts]
            notes.append(f"{len(back)} held-out examples of classes too rare to split were given back to training")
    return train, dev


def _each(label: Any) -> tuple[str, ...]:
    return (label,) if isinstance(label, str) else label


def _order(names: set[str]) -> tuple[str, ...]:
    """Alphabetical; numbers by value."""
    if names and all(name.isascii() and name.isdigit() for name in names):
        return tuple(sorted(names, key=lambda name: (int(name), name)))
    return tuple(sorted(names))


def _examples(rows: list[Row], labels: list[Any]) -> list[Example]:
    return [Example(row.text, row.text_b, label) for row, label in zip(rows, labels, strict=True)]


# ---- common ---------------------------------------------------------------------------------------------------------


def limit(examples: list[Example], most: int | None) -> list[Example]:
    """At most `most` examples, the same ones for every seed: chosen by hash, every class kept if there is room."""
    if most is None or len(examples) <= most:
        return examples
    order = sorted(range(len(examples)), key=lambda number: (examples[number].digest, number))
    firsts: dict[Label, int] = {}
    for number in order:
        if isinstance(examples[number].label, int):
            firsts.setdefault(examples[number].label, number)
    chosen = list(dict.fromkeys([*firsts.values(), *order]))[:most]
    return [examples[number] for number in sorted(chosen)]


def _check(data: Data) -> None:
    """Raises ValueError for data from which nothing can be learned or measured."""
    name = data.task.title
    if not data.train or not data.dev:
        empty = "training" if not data.train else "dev"
        raise ValueError(
            f"task {name} has no {empty} examples ({len(data.train)} train, {len(data.dev)} dev); give more data, a "
            "dev file, or another dev_share"
        )
    counts = Counter(example.label for example in data.train)
    if len(counts) == 1:
        label = next(iter(counts))
        shown = data.labels[label] if isinstance(label, int) else label
        raise ValueError(
            f"task {name}: all {len(data.train)} training examples have the label {shown!r}; it needs two or more"
        )
    if data.task.type == "classification" and len(data.labels) > 2 and "f1" in data.task.metrics:
        raise ValueError(
            f"task {name}: f1 is for two classes and there are {len(data.labels)}; write macro_f1 in metrics"
        )
