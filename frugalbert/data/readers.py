"""Readers: one source file in, raw texts out, each with the line or row that it starts in.

Text is read as bytes and decoded once per document; undecodable bytes become lone surrogates, which `cleaning` counts.
Memory is bounded by one document, and a document by `cleaning.MAX_DOCUMENT` (JSON, CSV: by one record). A line ends at
`\\n`, `\\r\\n` or a lone `\\r`; the further line breaks of Unicode (U+0085, U+2028, vertical tab) end no line here.
"""

from __future__ import annotations

import contextlib
import csv
import html
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import IO, Any

from frugalbert.data import files, wikipedia
from frugalbert.data.cleaning import MAX_DOCUMENT, Counts, pieces

Text = tuple[int, str]  # (line or row it starts in, counted from 1; raw text)
Lines = Iterable[tuple[int, bytes]]
SEGMENT = 1 << 20  # longest part of a line that is held at once where a document may be more or less than a line
MAX_LINE = 1 << 28  # a JSON line or CSV field beyond this is not text
HOPELESS = 1_000  # records without a usable one after which a file is refused rather than read to its end


def read(path: Path, form: str, field: str, counts: Counts) -> Iterator[Text]:
    """Raw texts of one local file in the format `form` (`auto` looks). Raises ValueError for what is not text."""
    if path.stat().st_size == 0:
        counts.repair(str(path), "empty files")
        return
    if form == "auto":
        form = files.detect(path)
    if form == "parquet":
        yield from _parquet(path, field, counts)
        return
    if form == "wikiextractor" and files.head(path, 64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
        form = "jsonl"
    with files.open_stream(path) as stream:
        if form == "jsonl":
            yield from _jsonl(path, _whole_lines(path, _lines(stream), counts), field, counts)
        elif form in ("csv", "tsv"):
            yield from _table(path, _whole_lines(path, _lines(stream), counts), field, form, counts)
        elif form == "wikipedia-xml":
            yield from wikipedia.read(path, _lines(stream), counts)
        else:
            yield from _documents(EVENTS[form](_lines(stream), path, counts))


# ---- bytes to lines -------------------------------------------------------------------------------------------------


def _lines(stream: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of each line with its `\\n`; a long line comes in segments of the same number."""
    number = 1
    while segment := stream.readline(SEGMENT):
        if b"\r" in segment:
            while segment.endswith(b"\r") and (more := stream.readline(1)):
                segment += more  # perhaps the other half of a \r\n
            for line in segment.replace(b"\r\n", b"\n").replace(b"\r", b"\n").splitlines(keepends=True):
                yield number, line
                number += line.endswith(b"\n")
        else:
            yield number, segment
            number += segment.endswith(b"\n")


def _whole_lines(path: Path, lines: Lines, counts: Counts) -> Iterator[tuple[int, bytes]]:
    """The segments of a line joined; a line of more than MAX_LINE bytes is dropped."""
    held: list[bytes] = []
    size = number = 0
    for number, segment in lines:
        if not held and segment.endswith(b"\n"):
            yield number, segment
            continue
        size += len(segment)
        held.append(segment if size <= MAX_LINE else b"")
        if segment.endswith(b"\n"):
            if size > MAX_LINE:
                counts.drop(f"{path}:{number}", "line over 256 MB")
                held.clear()
            else:
                yield number, _take(held)
            size = 0
    if held and size <= MAX_LINE:
        yield number, _take(held)


def _take(held: list[bytes]) -> bytes:
    """The list joined and emptied: a long line is not in memory twice."""
    data = b"".join(held)
    held.clear()
    return data


def decode(data: bytes) -> str:
    """UTF-8; each byte that is none becomes a lone surrogate."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data.decode(errors="surrogateescape")


# ---- lines to documents ---------------------------------------------------------------------------------------------

Events = Iterator[tuple[int, bytes] | None]  # a part of a document, or None: the document ends


def _documents(events: Events) -> Iterator[Text]:
    """Join the parts of each document; one that grows too long is given out in several."""
    held: list[bytes] = []
    size = start = 0
    for event in events:
        if event is None:
            if held:
                yield start, decode(b"".join(held))
            held, size = [], 0
            continue
        line, data = event
        start = start if held else line
        held.append(data)
        size += len(data)
        if size > MAX_DOCUMENT:
            whole = b"".join(held)
            cut = _cut(whole)
            yield start, decode(whole[:cut])
            rest = whole[cut:]
            held, size, start = [rest] if rest.strip() else [], len(rest), line
    if held:
        yield start, decode(b"".join(held))


def _cut(data: bytes) -> int:
    """Where to cut a long document: after its last white space, else between two characters."""
    if cut := max(data.rfind(b"\n"), data.rfind(b" ")) + 1:
        return cut
    cut = len(data)
    while cut > len(data) - 4 and data[cut - 1] & 0xC0 == 0x80:
        cut -= 1
    return cut - 1 if data[cut - 1] >= 0xC0 else len(data)


def _text(lines: Lines, path: Path, counts: Counts) -> Events:
    yield from lines


def _paragraphs(lines: Lines, path: Path, counts: Counts) -> Events:
    for number, data, blank in _blanks(lines):
        yield None if blank else (number, data)


def _each_line(lines: Lines, path: Path, counts: Counts) -> Events:
    for number, data, blank in _blanks(lines):
        if not blank:
            yield number, data
        if data.endswith(b"\n"):
            yield None


def _blanks(lines: Lines) -> Iterator[tuple[int, bytes, bool]]:
    """Each segment with whether it is a blank line, rather than the white end of a long one."""
    before = 0
    for number, data in lines:
        yield number, data, data.isspace() and number != before
        before = number


def _wikiextractor(lines: Lines, path: Path, counts: Counts) -> Events:
    """`<doc id= url= title=>`, the title again, blank lines, text, `</doc>`; the title and blank lines are left out."""
    inside, title, number = False, "", 0
    for number, data, blank in _blanks(lines):
        if data.startswith(b"<doc "):
            if inside:
                counts.repair(f"{path}:{number}", "<doc> without </doc>")
            inside, title = True, _title(data.partition(b'title="')[2].rpartition(b'">')[0])
            yield None
        elif data.startswith(b"</doc>"):
            inside = False
            yield None
        elif blank:
            pass
        elif not inside:
            counts.repair(f"{path}:{number}", "lines outside <doc> left out")
        elif not (title and _title(data) == title):
            title = ""
            yield number, data
        else:
            title = ""
    if inside:
        counts.repair(f"{path}:{number}", "<doc> without </doc>")


def _title(data: bytes) -> str:
    """A title, which some versions of WikiExtractor escape; titles of Wikipedia have at most 255 bytes."""
    return html.unescape(decode(data[:2000])).strip()


EVENTS: dict[str, Callable[[Lines, Path, Counts], Events]] = {
    "text": _text,
    "paragraphs": _paragraphs,
    "lines": _each_line,
    "wikiextractor": _wikiextractor,
}


# ---- records --------------------------------------------------------------------------------------------------------


class Records:
    """Takes the text out of each record of one file, and gives up on a file without a usable one."""

    def __init__(self, name: str, field: str, counts: Counts) -> None:
        self.name, self.field, self.counts = name, field, counts
        self.good = self.bad = 0
        self._last = ""

    def text(self, number: int, value: Any) -> Iterator[Text]:
        """The text, in parts if it is long; nothing, and a count, if the field holds none."""
        if isinstance(value, str):
            self.good += 1
            for part in pieces(value):
                yield number, part
        else:
            self.drop(number, "field is null" if value is None else "field is not text")

    def drop(self, number: int, reason: str, hint: str = "") -> None:
        self.bad += 1
        self.counts.drop(f"{self.name}:{number}", reason)
        self._last = f"the last one: {reason}{hint}"
        if self.bad >= HOPELESS and not self.good:
            self.finish()

    def finish(self) -> None:
        """Raises ValueError if there were records and none was usable."""
        if self.bad and not self.good:
            raise ValueError(
                f"{self.name}: none of {self.bad} records has a text ({self._last}); write the right format: and "
                f"field: for it in corpus.sources (field is {self.field!r} now)"
            )


def _jsonl(path: Path, lines: Lines, field: str, counts: Counts) -> Iterator[Text]:
    records = Records(str(path), field, counts)
    for number, data in lines:
        if data.isspace():
            continue
        text = decode(data)
        data = b""  # a long line is not needed three times
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            records.drop(number, "broken JSON")
            continue
        if not isinstance(record, dict):
            records.drop(number, "no JSON object")
        elif field not in record:
            records.drop(number, f"no field {field!r}", f", its keys are {_named(record)}")
        else:
            text = record[field]
            if isinstance(text, str) and "title" in record and "url" in record:  # WikiExtractor --json
                text = text.removeprefix(f"{record['title']}\n")
            yield from records.text(number, text)
    records.finish()


def _named(names: Iterable[str]) -> str:
    """Some names for a sentence, whatever bytes, line breaks or escapes are in them."""
    return "".join(sign if sign.isprintable() else "?" for sign in ", ".join(islice(names, 20))[:300])


def _table(path: Path, lines: Lines, field: str, form: str, counts: Counts) -> Iterator[Text]:
    """CSV with its usual quoting; TSV, where a quote is a quote and a field never holds a tab or line break."""
    csv.field_size_limit(MAX_LINE)
    texts = (decode(data) for _, data in lines)
    if form == "csv":
        rows = csv.reader(texts)
    else:
        rows = csv.reader(texts, delimiter="\t", quoting=csv.QUOTE_NONE)
    records = Records(str(path), field, counts)
    column = -1
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows, None)
        except csv.Error as error:
            raise ValueError(f"{path}:{number}: {error}; is a quotation mark not closed?") from None
        if row is None:
            break
        if column < 0:
            if field not in row:
                raise ValueError(f"{path} has no column {field!r}; write field: with one of {_named(row)}")
            column = row.index(field)
        elif len(row) > column:
            yield from records.text(number, row[column])
        elif row:
            records.drop(number, "row too short")
    records.finish()


def _parquet(path: Path, field: str, counts: Counts) -> Iterator[Text]:
    """One column, row group by row group."""
    import pyarrow
    from pyarrow import parquet

    with contextlib.ExitStack() as stack:
        source: Any = path
        if files.SUFFIXES.get(path.suffix.lower()):  # Parquet is read from its end: compressed once more, it is copied
            source = stack.enter_context(tempfile.TemporaryFile())
            stream = stack.enter_context(files.decompress(path))
            while block := stream.read(SEGMENT):
                source.write(block)
        try:
            file = stack.enter_context(parquet.ParquetFile(source, pre_buffer=False, buffer_size=SEGMENT))
            if field not in file.schema_arrow.names:
                named = _named(file.schema_arrow.names)
                raise ValueError(f"{path} has no column {field!r}; write field: with one of {named}")
            records = Records(str(path), field, counts)
            number = 0
            for batch in file.iter_batches(batch_size=256, columns=[field]):
                for value in _texts(batch.column(0), path, field):
                    number += 1
                    yield from records.text(number, value)
        except (pyarrow.ArrowException, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            message = str(error).split("\n")[0]
            raise ValueError(f"{path} is no sound Parquet file ({message}); leave it out of corpus.sources") from None
        records.finish()


def _texts(column: Any, path: Path, field: str) -> list[str | None]:
    """A column of text as Python strings; bytes that are no UTF-8 survive as surrogates."""
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    try:
        values = column.cast(pyarrow.large_binary()).to_pylist()
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError):
        raise ValueError(f"{path}: the column {field!r} holds {column.type}, not text; write another field:") from None
    return [None if value is None else decode(value) for value in values]
