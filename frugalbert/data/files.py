"""Source files: found in a fixed order, opened whatever they are compressed with, recognised by name and first bytes.

Compression is recognised by its signature, so a `.txt` that is really gzip is read and a `.gz` that is not is refused.
"""

from __future__ import annotations

import bz2
import contextlib
import glob
import gzip
import io
import json
import lzma
import os
import re
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

HEAD = 1 << 20
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd"}
SIGNATURES = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
FORMS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv"}
FORMS |= {".parquet": "parquet", ".pq": "parquet"}
MARKS = {b"\xff\xfe\x00\x00": "utf-32", b"\x00\x00\xfe\xff": "utf-32", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
BINARY = (
    b"\x89PNG",
    b"\xff\xd8\xff",
    b"GIF8",
    b"%PDF",
    b"PK\x03\x04",
    b"\x7fELF",
    b"SQLite format 3",
    b"RIFF",
    b"MZ\x90",
)
CONTROLS = bytes(set(range(32)) - set(b"\t\n\x0b\f\r\x1b")) + b"\x7f"


# ---- finding --------------------------------------------------------------------------------------------------------


def find(text: str, folder: Path) -> list[Path]:
    """The regular files that a path, a glob or a directory (recursively, hidden names left out) stands for, sorted.

    Raises ValueError if there is none, or if one named explicitly is no regular file.
    """
    path = folder / text
    if not os.path.lexists(path) and glob.has_magic(text):
        matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
        if not matches:
            raise ValueError(f"corpus.sources: no file matches {text} (looked from {folder}); write another pattern")
        found = [file for match in matches for file in (_walk(match) if match.is_dir() else [_regular(match)])]
    else:
        try:
            mode = path.stat().st_mode
        except FileNotFoundError:
            raise ValueError(f"corpus.sources: {path} does not exist; write a path relative to the YAML file") from None
        except OSError as error:
            raise ValueError(f"corpus.sources: {path}: {error.strerror}") from None
        found = list(_walk(path)) if stat.S_ISDIR(mode) else [_regular(path)]
    if not found:
        raise ValueError(f"corpus.sources: {path} holds no files; write a directory with text files")
    return list(dict.fromkeys(found))


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"corpus.sources: {path} is no regular file (a pipe, device or dangling link); leave it out")
    return path


def _walk(top: Path) -> Iterator[Path]:
    """Files below `top`; linked directories are followed, but never into one that is being walked already."""

    def fail(error: OSError) -> None:
        raise ValueError(f"corpus.sources: cannot read the directory {error.filename} ({error.strerror})")

    for name, directories, names in os.walk(top, followlinks=True, onerror=fail):
        here = os.path.realpath(name)
        directories[:] = sorted(
            item
            for item in directories
            if not item.startswith(".") and not _is_above(os.path.realpath(os.path.join(name, item)), here)
        )
        for item in sorted(names):
            if not item.startswith(".") and (file := Path(name, item)).is_file():
                yield file


def _is_above(target: str, here: str) -> bool:
    return (here + os.sep).startswith(target.rstrip(os.sep) + os.sep)


# ---- opening --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[IO[bytes]]:
    """The file's text as UTF-8 bytes without a byte order mark. Raises ValueError if it is binary or damaged."""
    start = head(path)
    refuse_binary(path, start)
    encoding = _encoding(start)
    with decompress(path) as stream:
        if encoding != "utf-8":
            yield _Recoded(stream, encoding)  # type: ignore[misc]
            return
        if start.startswith(b"\xef\xbb\xbf"):
            stream.read(3)
        yield stream


def _encoding(start: bytes) -> str:
    return next((name for mark, name in MARKS.items() if start.startswith(mark)), "utf-8")


class _Recoded(io.RawIOBase):
    """UTF-16 or UTF-32 in, UTF-8 out; what cannot be decoded becomes a byte that is no UTF-8, to be counted later."""

    def __init__(self, stream: IO[bytes], encoding: str) -> None:
        self._text = io.TextIOWrapper(stream, encoding, errors="replace", newline="\n")

    def readline(self, size: int | None = -1) -> bytes:
        line = self._text.readline(-1 if size is None else size)
        return line.replace("\ufffd", "\udcff").encode("utf-8", "surrogateescape")


@contextlib.contextmanager
def decompress(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, decompressed. Raises ValueError, also while it is read, if the compressed data are damaged."""
    kind = _compression(path)
    try:
        with contextlib.ExitStack() as stack:
            if kind == "zstd":
                import pyarrow

                raw = stack.enter_context(pyarrow.input_stream(str(path), compression="zstd"))
            elif kind:
                module = {"gzip": gzip, "bzip2": bz2, "xz": lzma}[kind]
                raw = stack.enter_context(module.open(path, "rb"))
            else:
                raw = stack.enter_context(open(path, "rb", buffering=0))
            yield io.BufferedReader(raw, HEAD)  # type: ignore[arg-type]
    except (EOFError, lzma.LZMAError, zlib.error, OSError) as error:
        if not kind or (isinstance(error, OSError) and error.errno):
            raise
        raise ValueError(
            f"{path} is truncated or damaged {kind} data ({error}); fetch it again or leave it out of corpus.sources"
        ) from None


def _compression(path: Path) -> str | None:
    with open(path, "rb") as file:
        start = file.read(8)
    kind = next((name for signature, name in SIGNATURES.items() if start.startswith(signature)), None)
    named = SUFFIXES.get(path.suffix.lower())
    if named and start and kind != named:
        raise ValueError(f"{path} is named like {named} data but is none; fetch it again or correct its name")
    return kind


def head(path: Path, size: int = HEAD) -> bytes:
    """The first decompressed bytes."""
    with decompress(path) as stream:
        return stream.read(size)


# ---- recognising ----------------------------------------------------------------------------------------------------


def refuse_binary(path: Path, start: bytes) -> None:
    """Raises ValueError if these first bytes are not those of a text."""
    start = start[:65536]
    if _encoding(start) != "utf-8":
        return
    for parity, name in ((1, "utf-16le"), (0, "utf-16be")):
        half = start[parity::2]
        if len(half) > 1 and half.count(0) > 0.3 * len(half):
            raise ValueError(
                f"{path} looks like UTF-16 without a byte order mark; convert it: iconv -f {name} -t utf-8"
            )
    controls = len(start) - len(start.translate(None, CONTROLS))
    if start.startswith(BINARY) or controls > max(8, 0.05 * len(start)):
        raise ValueError(f"{path} is a binary file, not text; leave it out of corpus.sources or convert it")


def detect(path: Path) -> str:
    """The format of a file by its name, else by its first megabyte: one of `config.Source.format` without `auto`."""
    suffixes = [suffix.lower() for suffix in path.suffixes if suffix.lower() not in SUFFIXES]
    form = FORMS.get(suffixes[-1]) if suffixes else None
    if form in ("csv", "tsv", "parquet"):
        return form
    start = head(path)
    encoding = _encoding(start)
    start = start.decode(encoding, "ignore").encode() if encoding != "utf-8" else start.removeprefix(b"\xef\xbb\xbf")
    start = start.lstrip()
    if start.startswith(b"[") and form == "jsonl":
        raise ValueError(f"{path} is one JSON array; write one object per line, for example with jq -c '.[]'")
    if form == "jsonl" or (start.startswith(b"{") and _is_object(start.split(b"\n", 1)[0])):
        return "jsonl"
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"<doc "):
        return "wikiextractor"
    if re.match(rb"(?:<\?xml[^>]*>\s*)?<mediawiki[\s>]", start):
        return "wikipedia-xml"
    return "paragraphs" if re.search(rb"(?:\n|\r\n?)[ \t]*(?:\n|\r)", start) else "text"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
