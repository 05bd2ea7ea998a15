"""Hugging Face datasets as a source: a hub name, a `save_to_disk` directory, or a directory of data files.

Streamed, so that nothing is downloaded or converted before it is read; a dataset's own shards are read in parallel.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frugalbert.data.cleaning import Counts
from frugalbert.data.readers import Records, Text

ROWS = 50_000  # of a dataset on disk, per unit of work


def units(name: str, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What one unit of work reads: `{"dataset": name, "part": [number, of]}`; all of it if `options` limit it.

    `options`: subset, split, revision, max_documents (as in the YAML). Raises ValueError if it cannot be opened.
    """
    with _explained(name):
        dataset = _open(name, options)
        if options["max_documents"]:
            parts = 1
        elif _is_saved(name):
            parts = max(1, -(-len(dataset) // ROWS))
        else:
            parts = max(1, dataset.num_shards)
    return [{"dataset": name, "part": [number, parts]} for number in range(parts)]


def read(unit: dict[str, Any], options: dict[str, Any], field: str, counts: Counts) -> Iterator[Text]:
    """(row, text) of one unit; rows count from 1 within it."""
    name, (number, parts) = unit["dataset"], unit["part"]
    label = name if parts == 1 else f"{name}[{number}/{parts}]"
    with _explained(name):
        dataset = _open(name, options)
        columns = dataset.column_names
        if columns is not None and field not in columns:
            raise ValueError(f"{name} has no column {field!r}; write field: with one of {', '.join(columns[:20])}")
        if parts > 1:
            dataset = dataset.shard(num_shards=parts, index=number, contiguous=True)
        records = Records(label, field, counts)
        row = 0
        for batch in dataset.iter(batch_size=256):
            for value in batch.get(field, [None] * len(next(iter(batch.values())))):
                row += 1
                yield from records.text(row, value)
        records.finish()


def _is_saved(name: str) -> bool:
    return any(Path(name, mark).is_file() for mark in ("state.json", "dataset_dict.json"))


def _open(name: str, options: dict[str, Any]) -> Any:
    import datasets

    datasets.disable_progress_bars()
    if not _is_saved(name):
        return datasets.load_dataset(
            name, options["subset"], split=options["split"], revision=options["revision"], streaming=True
        )
    dataset = datasets.load_from_disk(name)
    if isinstance(dataset, datasets.DatasetDict):
        if options["split"] not in dataset:
            raise ValueError(f"{name} has no split {options['split']!r}; write split: with one of {', '.join(dataset)}")
        dataset = dataset[options["split"]]
    return dataset


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Whatever the library raises (network, names, splits, formats) as one sentence about this source."""
    try:
        yield
    except Exception as error:
        message = str(error).strip().split("\n")[0][:300] or type(error).__name__
        if message.startswith((name, f"{name}[")):
            raise
        raise ValueError(
            f"corpus.sources: cannot read the dataset {name} ({message}); check its name, subset, split and the "
            "network, or download it and give its directory with format: dataset"
        ) from None
