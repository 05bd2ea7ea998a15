"""One unit of corpus work: read some source files, clean, and write the documents in parts of about 8 MB of text.

A part is a compressed JSON-lines file and, beside it, its records: of each document the hash, place and length; the
hashes of its longer lines. Parts depend on the unit alone, not on who works on it or when, and are all that is held in
memory. `dedup` decides from the records which documents stay.
"""

from __future__ import annotations

import hashlib
import io
import json
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from frugalbert.data import hub, python_docs, readers
from frugalbert.data.cleaning import Counts, clean
from frugalbert.run import check_stop, write_atomic, write_json

PART_CHARACTERS, PART_DOCUMENTS = 8_000_000, 200_000
SHORT_LINE = 32  # bytes; shorter lines (headings, list items) say nothing about copying
PERMUTATIONS = 128
SHINGLE = 5  # words
SPACE = 1 << 64
# Columns of a part's records (one row per document; HASH is the XXH3-64 of its UTF-8 text) and of its held-out lines.
HASH, CHARACTERS, FILE, PLACE, HELD_OUT = range(5)
LINE_HASH, LINE_DOCUMENT, LINE_BYTES = range(3)
QUOTE = json.JSONEncoder(ensure_ascii=False).encode


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    """Read, clean and write one unit (see `corpus._tasks`). Returns its parts and counts."""
    counts, settings = Counts(), task["settings"]
    stem, policy, shortest = unit_stem(task), settings["encoding_errors"], max(1, settings["min_characters"])
    writer = PartWriter(stem, settings["held_out"], near=settings["dedup"] == "near")
    names: dict[str, int] = {}
    for source, name, line, raw in _texts(task, counts):
        check_stop()
        counts.read += 1
        cleaned = clean(raw, (name, line), policy, counts)
        if cleaned is None:
            continue
        text, data = cleaned
        if len(text) < shortest:
            counts.drop(f"{name}:{line}", "too short" if text else "empty")
            continue
        writer.add(text, data, source, (names.setdefault(name, len(names)), line))
    parts = writer.finish()
    write_json(f"{stem}.notes.json", {"names": list(names), "examples": counts.examples})
    return {"parts": parts, "read": counts.read, "dropped": counts.dropped, "repaired": counts.repaired}


def unit_stem(task: dict[str, Any]) -> Path:
    return Path(task["work"]) / f"unit-{task['number']:06d}"


def _texts(task: dict[str, Any], counts: Counts) -> Iterator[tuple[str, str, int, str]]:
    """(source, file, line, raw text) of the unit's documents, no more than its limit."""
    for found in _unlimited(task, counts):
        if task["limit"] is not None and counts.read >= task["limit"]:
            return
        yield found


def _unlimited(task: dict[str, Any], counts: Counts) -> Iterator[tuple[str, str, int, str]]:
    unit, options, label = task["unit"], task["options"], task["label"]
    if "modules" in unit:
        yield from python_docs.read(unit, counts)
    elif "dataset" in unit:
        for row, text in hub.read(unit, options, options["field"], counts):
            yield label, unit["dataset"], row, text
    else:
        for name, size, changed in unit["files"]:
            path = Path(name)
            for line, text in readers.read(path, options["format"], options["field"], counts):
                yield label, name, line, text
            status = path.stat()
            if [status.st_size, status.st_mtime_ns] != [size, changed]:
                raise ValueError(f"{path} changed while it was read; run again when nothing writes to it any more")


def load(part: Path, name: str) -> np.ndarray:
    """What lies beside a part: `records`, `train`, `held`, `signatures`; later also `copies` (see `corpus`)."""
    with np.load(part.with_suffix(f".{name}.npz" if name == "copies" else ".npz"), allow_pickle=False) as arrays:
        return arrays[name]


def save(part: Path, name: str, **arrays: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_atomic(part.with_suffix(name), buffer.getvalue())


class PartWriter:
    """Documents in, parts out: `STEM-00000.zst` and `STEM-00000.npz`, …"""

    def __init__(self, stem: Path, held_out: float, *, near: bool) -> None:
        self.stem = stem
        self.parts: list[dict[str, Any]] = []
        self._threshold = int(held_out * SPACE)
        self._near = near
        self._clear()

    def _clear(self) -> None:
        self._lines: list[str] = []
        self._characters = self._held_out = 0
        self._records, self._train, self._held = array("Q"), array("Q"), array("Q")
        self._signatures = Signatures() if self._near else None

    def add(self, text: str, data: bytes, source: str, place: tuple[int, int]) -> None:
        """One document, also as UTF-8, and the number of its file and line."""
        number = xxhash.xxh3_64_intdigest(data)
        held_out = number < self._threshold
        for line in data.split(b"\n"):
            if len(line) >= SHORT_LINE:
                value = xxhash.xxh3_64_intdigest(line.strip().lower())
                if held_out:
                    self._held.extend((value, len(self._lines), len(line)))
                else:
                    self._train.append(value)
        if self._signatures is not None:
            self._signatures.add(text)
        self._records.extend((number, len(text), *place, held_out))
        flag = "true" if held_out else "false"
        self._lines.append(f'{{"text": {QUOTE(text)}, "source": {QUOTE(source)}, "held_out": {flag}}}\n')
        self._characters += len(text)
        self._held_out += held_out
        if self._characters >= PART_CHARACTERS or len(self._lines) >= PART_DOCUMENTS:
            self._flush()

    def finish(self) -> list[dict[str, Any]]:
        """The entry of each part: name, documents, held_out, characters, bytes, sha256."""
        if self._lines:
            self._flush()
        return self.parts

    def _flush(self) -> None:
        path = self.stem.with_name(f"{self.stem.name}-{len(self.parts):05d}.zst")
        figures = {"documents": len(self._lines), "held_out": self._held_out, "characters": self._characters}
        arrays = {
            "records": np.array(self._records, np.uint64).reshape(-1, 5),
            "train": np.array(self._train, np.uint64),
            "held": np.array(self._held, np.uint64).reshape(-1, 3),
        }
        if self._signatures is not None:
            arrays["signatures"] = self._signatures.array()
        save(path, ".npz", **arrays)
        self.parts.append({"name": path.name, **figures, **write_documents(path, "".join(self._lines).encode())})
        self._clear()


def write_documents(path: Path, lines: bytes) -> dict[str, Any]:
    """Compress and write; returns the file's size and checksum."""
    import pyarrow

    data = pyarrow.Codec("zstd", compression_level=3).compress(lines, asbytes=True)
    write_atomic(path, data)
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def read_lines(path: Path, sha256: str) -> list[bytes]:
    """The lines of a document file. Raises ValueError if it is absent or not what was written."""
    import pyarrow

    try:
        data = path.read_bytes()
    except FileNotFoundError:
        data = b""
    if hashlib.sha256(data).hexdigest() != sha256:
        raise ValueError(f"{path} is {'damaged' if data else 'gone'}; build the corpus again with --redo corpus")
    with pyarrow.input_stream(pyarrow.py_buffer(data), compression="zstd") as stream:
        return stream.read().splitlines(keepends=True)


def select(task: dict[str, Any]) -> dict[str, Any]:
    """Write those documents of a part that enter the corpus more than `copy` times, under their final name."""
    check_stop()
    part = Path(task["part"])
    chosen = load(part, "copies") > task["copy"]
    lines = zip(read_lines(part, task["sha256"]), chosen, strict=True)
    return write_documents(Path(task["out"]), b"".join(line for line, wanted in lines if wanted))


class Signatures:
    """MinHash signatures of the documents' word 5-grams (Broder 1997), by datasketch."""

    def __init__(self) -> None:
        from datasketch import MinHash

        self._empty = MinHash(PERMUTATIONS, hashfunc=xxhash.xxh32_intdigest)
        self._rows: list[np.ndarray] = []

    def add(self, text: str) -> None:
        words = text.lower().encode().split()
        grams = [b" ".join(words[start : start + SHINGLE]) for start in range(max(1, len(words) - SHINGLE + 1))]
        signature = self._empty.copy()
        for start in range(0, len(grams), 4096):
            signature.update_batch(grams[start : start + 4096])
        self._rows.append(signature.digest().astype(np.uint64))

    def array(self) -> np.ndarray:
        return np.array(self._rows, np.uint64).reshape(-1, PERMUTATIONS)
