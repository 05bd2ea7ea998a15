"""Files with texts and labels in; rows with their line numbers out, or one sentence that names the file and the line.

CSV with quotes, TSV without, JSONL; UTF-8 with an optional BOM. Only `\\n` ends a line of TSV and JSONL.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalbert.config import Columns

SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True, slots=True)
class Row:
    """One example as its file has it; `where` is `file line 17` for messages. `label`: None = not known."""

    where: str
    text: str
    text_b: str | None
    label: Any
    id: str = ""
    options: tuple[str, ...] = ()
    words: tuple[str, ...] = ()


def read_text(path: Path) -> str:
    """The whole file. Raises ValueError for an empty, binary or not UTF-8 file, OSError for an unreadable one."""
    if path.is_dir():
        raise ValueError(f"{path} is a directory; name the file in it")
    data = path.read_bytes()
    if not data.strip():
        raise ValueError(f"{path} is empty; it needs one example a line")
    if b"\0" in data:
        raise ValueError(f"{path} is binary or UTF-16, not text; save it as UTF-8 ({', '.join(SUFFIXES)})")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} line {line} is not UTF-8 (byte 0x{data[error.start]:02x}); save it as UTF-8"
        ) from None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'label'?` or nothing."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else ""


def split_lines(text: str) -> list[str]:
    """Lines ended by `\\n` alone (a `\\r` before it is dropped); U+2028, form feeds and lone `\\r` stay inside."""
    lines = text.split("\n")
    if not lines[-1]:
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


# ---- custom files ---------------------------------------------------------------------------------------------------


def read_custom(path: Path, columns: Columns, labelled: bool = True) -> list[Row]:
    """Rows of a `.csv` (quoted), `.tsv` (no quoting) or `.jsonl` file by column names. Raises ValueError, OSError.

    Args:
        labelled: False = a file to predict, whose label column may be absent or have gaps.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; paths are relative to the YAML")
    kind = path.suffix.lower()
    if kind not in SUFFIXES:
        raise ValueError(
            f"{path}: the ending {kind or 'is missing'} says no format; write one of {', '.join(SUFFIXES)}"
        )
    content = read_text(path)
    lines = _jsonl_lines(path, content) if kind == ".jsonl" else _table_lines(path, content, quoted=kind == ".csv")
    wanted = [("text", columns.text), ("text_b", columns.text_b), ("id", columns.id)]
    wanted += [("label", columns.label)] if labelled else []
    wanted += [("options", option) for option in columns.options]
    rows = []
    for number, record in lines:
        where = f"{path} line {number}"
        for column, key in wanted:
            if key is not None and key not in record:
                there = ", ".join(map(repr, list(record)[:20]))
                hint = did_you_mean(key, record)
                raise ValueError(f"{where} has no column {key!r} (columns.{column}); it has {there}{hint}")
        text = _text(record, columns.text, where)
        text_b = _text(record, columns.text_b, where) if columns.text_b else None
        key = str(len(rows)) if columns.id is None else _key(record[columns.id], columns.id, where)
        label = record.get(columns.label)
        if not labelled and (label is None or label == ""):
            label = None
        rows.append(Row(where, text, text_b, label, key, _options(record, columns.options, where)))
    if not rows:
        raise ValueError(f"{path} has a header but no examples")
    return rows


def _text(record: dict[str, Any], column: str, where: str) -> str:
    value = record[column]
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} is no text; every example needs one")
    return _encodable(value).strip()


def _key(value: Any, column: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{where}: {column!r} (columns.id) is {json.dumps(value)[:60]}; write a number or a text")
    return _encodable(str(value)).strip()


def _options(record: dict[str, Any], columns: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Texts of several columns, or the list in one. Raises ValueError if they are fewer than two texts."""
    if not columns:
        return ()
    values: Any = [record[column] for column in columns]
    if len(columns) == 1:
        values = values[0]
        if isinstance(values, str):
            try:
                values = json.loads(values)
            except ValueError:
                values = None
    if not isinstance(values, list) or len(values) < 2 or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{where}: the options (columns.options) are no two texts or more, nor a JSON list of them")
    return tuple(_encodable(value).strip() for value in values)


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(`file line 3`, object) of a JSONL file. Raises ValueError for a line that is none, such as a truncated one."""
    for number, record in _jsonl_lines(path, read_text(path)):
        yield f"{path} line {number}", record


def _encodable(text: str) -> str:
    """JSON can hold halves of surrogate pairs, which no tokenizer and no file takes: they become `?`."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _table_lines(path: Path, content: str, quoted: bool) -> Iterator[tuple[int, dict[str, str]]]:
    if quoted:
        csv.field_size_limit(1 << 30)  # the default refuses texts over 131,072 characters
        reader = csv.reader(io.StringIO(content, newline=""), strict=True)
        numbered = ((reader.line_num, cells) for cells in reader)
    else:
        numbered = ((number, line.split("\t")) for number, line in enumerate(split_lines(content), 1))
    header: list[str] | None = None
    try:
        for number, cells in numbered:
            if not any(cells):
                continue  # a blank line, as editors leave them at the end
            if header is None:
                header = [cell.strip() for cell in cells]
                continue
            if len(cells) != len(header):
                raise ValueError(
                    f"{path} line {number} has {len(cells)} cells, the header {len(header)}; "
                    + ("quote cells with commas" if quoted else "tabs inside a text must become spaces")
                )
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise ValueError(
            f"{path} line {reader.line_num} is no CSV ({error}); quote cells with commas or quotes"
        ) from None


def _jsonl_lines(path: Path, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(split_lines(content), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", "") or str(error)
            raise ValueError(f"{path} line {number} is no JSON ({reason}); every line is one object") from None
        if not isinstance(record, dict):
            raise ValueError(f'{path} line {number} is no object; write {{"text": "…", "label": "…"}}')
        yield number, record


# ---- labels ---------------------------------------------------------------------------------------------------------


def class_name(row: Row) -> str:
    """The label as the name of a class. Raises ValueError if it is missing, NaN or no single value."""
    value = row.label
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{row.where}: the label is {value}; remove the row or give it a class")
    if isinstance(value, int | float):
        return str(value)
    if not isinstance(value, str):
        raise ValueError(f"{row.where}: the label {json.dumps(value)[:80]} is no class; write a text or a number")
    name = _encodable(value).strip()
    if not name or name in ("nan", "NaN"):  # what pandas writes for a missing value
        raise ValueError(f"{row.where}: the label is {name or 'empty'}; remove the row or give it a class")
    return name


def target(row: Row) -> float:
    """The label of a regression task. Raises ValueError if it is no finite number."""
    try:
        if isinstance(row.label, bool) or not isinstance(row.label, int | float | str):
            raise ValueError
        value = float(row.label)
    except (ValueError, OverflowError):
        shown = json.dumps(row.label, ensure_ascii=False)[:80]
        raise ValueError(
            f"{row.where}: the label {shown} is no number; regression needs one (or type: classification)"
        ) from None
    if not math.isfinite(value):
        raise ValueError(f"{row.where}: the label is {value}; remove the row or write a finite number")
    return value


def class_names(row: Row) -> tuple[str, ...]:
    """The labels of a multi-label example: a list, a JSON list as text, or names separated by `;`. Empty = none."""
    value = row.label
    if isinstance(value, str) and value.strip().startswith("["):
        try:
            value = json.loads(value)
        except ValueError:
            raise ValueError(
                f"{row.where}: the labels {value[:80]!r} are no JSON list; close it, or write a;b"
            ) from None
    if isinstance(value, str):
        value = [part for part in value.split(";") if part.strip()]
    if not isinstance(value, list):
        raise ValueError(f'{row.where}: the labels {json.dumps(value)[:80]} are no list; write a;b or ["a", "b"]')
    return tuple(sorted({class_name(Row(row.where, "", None, part)) for part in value}))


def option_number(row: Row) -> tuple[int]:
    """The right option of a multiple choice: its number from 0, its letter or its text.

    Raises ValueError if the label is none of these, or two of them that disagree.
    """
    value, options = row.label, row.options
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        found = {value} & set(range(len(options)))
    else:
        written = _encodable(value).strip() if isinstance(value, str) else ""
        found = {number for number, option in enumerate(options) if option == written}
        if written.isascii() and written.isdigit():
            found |= {int(written)} & set(range(len(options)))
        if len(written) == 1 and written.isascii() and written.isalpha():
            found |= {ord(written.upper()) - ord("A")} & set(range(len(options)))
    if len(found) != 1:
        problem = "could be several of" if found else "is none of"
        raise ValueError(
            f"{row.where}: the label {json.dumps(row.label, ensure_ascii=False)[:60]} {problem} the {len(options)} "
            "options; write the number of the right one from 0, its letter, or its text"
        )
    return (found.pop(),)


def tags(row: Row) -> tuple[str, ...]:
    """The tags of a sentence, one a word."""
    return row.label
