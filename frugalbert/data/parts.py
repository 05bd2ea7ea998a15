"""One unit of corpus work: read some source files, clean, and write the documents in files of about 8 MB of text.

A unit's files, and the records beside them (one per document: its hash, place and length; the hashes of its longer
lines), depend on the unit alone, not on who works on it or when. `dedup` decides from the records which documents stay.
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

PART_CHARACTERS = 8_000_000
SHORT_LINE = 32  # bytes; shorter lines (headings, list items) say nothing about copying
PERMUTATIONS = 128
SHINGLE = 5  # words
SPACE = 1 << 64
# Columns of a unit's records (one row per document; HASH is the XXH3-64 of its UTF-8 text) and of its held-out lines.
HASH, CHARACTERS, FILE, PLACE, HELD_OUT = range(5)
LINE_HASH, LINE_DOCUMENT, LINE_BYTES = range(3)


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    """Read, clean and write one unit (see `corpus._tasks`). Returns its files and counts."""
    counts, settings = Counts(), task["settings"]
    stem, threshold = Path(task["work"]) / f"unit-{task['number']:06d}", int(settings["held_out"] * SPACE)
    writer = PartWriter(stem)
    records, train_lines, held_lines = array("Q"), array("Q"), array("Q")
    names: dict[str, int] = {}
    signatures = Signatures() if settings["dedup"] == "near" else None
    for source, name, line, raw in _texts(task, counts):
        check_stop()
        counts.read += 1
        cleaned = clean(raw, (name, line), settings["encoding_errors"], counts)
        if cleaned is None:
            continue
        text, data = cleaned
        if not text or len(text) < settings["min_characters"]:
            counts.drop(f"{name}:{line}", "too short" if text else "empty")
            continue
        number = xxhash.xxh3_64_intdigest(data)
        held_out = number < threshold
        hashes = _line_hashes(data)
        if held_out:
            for value, size in hashes:
                held_lines.extend((value, len(records) // 5, size))
        else:
            train_lines.extend(value for value, _ in hashes)
        if signatures is not None:
            signatures.add(text)
        records.extend((number, len(text), names.setdefault(name, len(names)), line, held_out))
        writer.add(text, source, held_out)
    parts = writer.finish()
    save(stem, "records", np.array(records, np.uint64).reshape(-1, 5))
    save(stem, "train-lines", np.array(train_lines, np.uint64))
    save(stem, "held-lines", np.array(held_lines, np.uint64).reshape(-1, 3))
    if signatures is not None:
        save(stem, "signatures", signatures.array())
    write_json(f"{stem}.notes.json", {"names": list(names), "examples": counts.examples})
    return {"parts": parts, "read": counts.read, "dropped": counts.dropped, "repaired": counts.repaired}


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


def _line_hashes(data: bytes) -> list[tuple[int, int]]:
    """(hash, bytes) of the longer lines, case and margins aside."""
    return [
        (xxhash.xxh3_64_intdigest(line.strip().lower()), len(line))
        for line in data.split(b"\n")
        if len(line) >= SHORT_LINE
    ]


def save(stem: Path, name: str, values: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=False)
    write_atomic(f"{stem}.{name}.npy", buffer.getbuffer())


def load(stem: Path, name: str) -> np.ndarray:
    """What `prepare` saved, mapped rather than read."""
    return np.load(f"{stem}.{name}.npy", mmap_mode="r", allow_pickle=False)


class PartWriter:
    """Documents in, compressed JSON lines of about PART_CHARACTERS each out: `STEM-00000.jsonl.zst`, …"""

    def __init__(self, stem: Path) -> None:
        self.stem = stem
        self.parts: list[dict[str, Any]] = []
        self._lines: list[str] = []
        self._characters = self._held_out = 0

    def add(self, text: str, source: str, held_out: bool) -> None:
        self._lines.append(json.dumps({"text": text, "source": source, "held_out": held_out}, ensure_ascii=False))
        self._characters += len(text)
        self._held_out += held_out
        if self._characters >= PART_CHARACTERS:
            self._flush()

    def finish(self) -> list[dict[str, Any]]:
        """The entry of each file: name, documents, held_out, characters, bytes, sha256."""
        if self._lines:
            self._flush()
        return self.parts

    def _flush(self) -> None:
        path = self.stem.with_name(f"{self.stem.name}-{len(self.parts):05d}.jsonl.zst")
        figures = {"documents": len(self._lines), "held_out": self._held_out, "characters": self._characters}
        self._lines.append("")
        entry = write_documents(path, "\n".join(self._lines).encode())
        self.parts.append({"name": path.name, **figures, **entry})
        self._lines, self._characters, self._held_out = [], 0, 0


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
    lines = read_lines(Path(task["part"]), task["sha256"])
    keep = np.load(task["keep"], mmap_mode="r", allow_pickle=False)[task["first"] : task["first"] + len(lines)]
    kept = [line for line, wanted in zip(lines, keep > task["copy"], strict=True) if wanted]
    return write_documents(Path(task["out"]), b"".join(kept))


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
