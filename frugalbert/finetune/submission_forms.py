"""Bytes of a test server's file in; all that is wrong with them out, as sentences.

GLUE and SuperGLUE as their servers take them (arXiv 1804.07461, 1905.00537; label forms of SuperGLUE as in
nyu-mll/jiant). One table says names, rows and labels; what writes submissions and what checks foreign ones read it.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from frugalbert.finetune.tables import did_you_mean

Problem = tuple[str, str]
"""(rule, sentence): of one rule only the first sentence is shown, with the number of the others."""


@dataclass(frozen=True)
class File:
    """A file of a board. `labels`: {our class: the server's label}; empty = any text, or a number in TSV files."""

    name: str
    task: str
    rows: int
    labels: dict[str, str | int]
    set: str = "test"
    """The set of `task` that it holds; AX, AX-b and AX-g are sets that another task's model predicted."""

    @property
    def known(self) -> list[str | int]:
        return list(dict.fromkeys(self.labels.values()))


def _file(name: str, task: str, rows: int, labels: str = "", number: bool = False) -> File:
    """`labels`: `class=label`, or one word where both are the same."""
    pairs = [(pair.split("=")[0], pair.split("=")[-1]) for pair in labels.split()]
    owner, _, subset = task.partition("/")
    return File(name, owner, rows, {a: int(b) if number else b for a, b in pairs}, subset or "test")


THREE, TWO = "entailment neutral contradiction", "entailment not_entailment"
MOST_BYTES = 1 << 26  # of a file in a zip; the largest honest one, QQP, has 4 MB
HEADER = "index\tprediction"
NUMBER = re.compile(r"[0-9]{1,3}(\.[0-9]+)?")
INDEX = re.compile(r"0|[1-9][0-9]{0,9}")
MULTIRC = {"question": 1820, "answer": 9693}
BOARDS: dict[str, tuple[File, ...]] = {
    "glue": (
        _file("CoLA.tsv", "cola", 1063, "unacceptable=0 acceptable=1"),
        _file("SST-2.tsv", "sst2", 1821, "negative=0 positive=1"),
        _file("MRPC.tsv", "mrpc", 1725, "not_equivalent=0 equivalent=1"),
        _file("STS-B.tsv", "stsb", 1379),
        _file("QQP.tsv", "qqp", 390_965, "not_duplicate=0 duplicate=1"),
        _file("MNLI-m.tsv", "mnli", 9796, THREE),
        _file("MNLI-mm.tsv", "mnli/test-mismatched", 9847, THREE),
        _file("QNLI.tsv", "qnli", 5463, TWO),
        _file("RTE.tsv", "rte", 3000, TWO),
        _file("WNLI.tsv", "wnli", 146, "not_entailment=0 entailment=1"),
        _file("AX.tsv", "mnli/ax", 1104, THREE),
    ),
    "superglue": (
        _file("BoolQ.jsonl", "boolq", 3245, "false true"),
        _file("CB.jsonl", "cb", 250, THREE),
        _file("COPA.jsonl", "copa", 500, "0 1", number=True),
        _file("MultiRC.jsonl", "multirc", 166, "false=0 true=1", number=True),
        _file("ReCoRD.jsonl", "record", 10_000),
        _file("RTE.jsonl", "superglue-rte", 3000, TWO),
        _file("WiC.jsonl", "wic", 1400, "false true"),
        _file("WSC.jsonl", "wsc", 146, "false=False true=True"),
        _file("AX-b.jsonl", "superglue-rte/axb", 1104, TWO),
        _file("AX-g.jsonl", "superglue-rte/axg", 356, TWO),
    ),
}


def short(problems: Iterable[Problem]) -> list[str]:
    """The first sentence of every rule, with how many more there are."""
    counts: Counter[str] = Counter()
    firsts: dict[str, str] = {}
    for rule, sentence in problems:
        counts[rule] += 1
        firsts.setdefault(rule, sentence)
    return [text + (f" (and {counts[rule] - 1:,} more)" if counts[rule] > 1 else "") for rule, text in firsts.items()]


def shown(value: Any) -> str:
    """The beginning of a JSON value."""
    try:
        return json.dumps(value)[:40]
    except RecursionError:
        return "that is nested this deeply"


def check_zip(data: bytes, board: str, partial: bool = False) -> list[str]:
    """Everything that is wrong with a zip for GLUE or SuperGLUE; [] = nothing. `partial`: tasks may be missing."""
    files = {file.name: file for file in BOARDS[board]}
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            entries = [entry for entry in archive.infolist() if not entry.is_dir()]
            names = [PurePosixPath(entry.filename).name for entry in entries]
            problems = _names(archive.namelist(), names, files, partial)
            for entry, name in zip(entries, names, strict=True):
                if name in files:
                    problems += [f"{name}: {text}" for text in _member(archive, entry, files[name])]
    except Exception as error:  # whatever a damaged archive raises: a dozen types
        return [f"this is no zip file that can be read ({type(error).__name__}: {str(error)[:80]})"]
    return problems


def _names(paths: list[str], names: list[str], files: dict[str, File], partial: bool) -> list[str]:
    inside = [
        ("folder", f"{path[:80]!r} is a folder or in one; files stand at the root") for path in paths if "/" in path
    ]
    doubled = [("twice", f"{name} stands in it {count} times") for name, count in Counter(names).items() if count > 1]
    strange = [
        ("name", f"{name[:80]!r} is no file of this board{did_you_mean(name, files)}")
        for name in names
        if name not in files
    ]
    missing = [name for name in files if name not in names]
    lacking = [f"missing: {', '.join(missing)}; --partial allows it"] if missing and not partial else []
    empty = ["there is no file of this board in it"] if len(missing) == len(files) and partial else []
    return [*short([*inside, *doubled, *strange]), *lacking, *empty]


def _member(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, file: File) -> list[str]:
    if entry.file_size > MOST_BYTES:
        return [f"has {entry.file_size:,} bytes, which is too many for {file.rows:,} rows"]
    try:
        with archive.open(entry) as member:
            data = member.read(MOST_BYTES)
    except Exception as error:  # damaged, encrypted, or of an unknown compression
        return [f"cannot be read ({type(error).__name__}: {str(error)[:80]})"]
    return check_file(file, data)


def check_file(file: File, data: bytes) -> list[str]:
    """Everything that is wrong with one file of GLUE or SuperGLUE."""
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        return [f"is not UTF-8 (byte {error.start})"]
    if text.startswith("\ufeff"):
        return ["begins with a byte order mark"]
    lines = text.removesuffix("\n").split("\n") if text else []
    return short(_tsv(file, lines) if file.name.endswith(".tsv") else _jsonl(file, lines))


def _tsv(file: File, lines: Sequence[str]) -> Iterator[Problem]:
    lines = [line.removesuffix("\r") for line in lines]
    if lines[:1] != [HEADER]:
        yield "header", f"the first line is {lines[0][:60] if lines else ''!r}, not 'index<TAB>prediction'"
    keys = []
    for number, line in enumerate(lines[1:], start=2):
        index, *values = line.split("\t")
        keys.append(int(index) if INDEX.fullmatch(index) else index[:40])
        if len(values) != 1:
            yield "columns", f"line {number} has {1 + len(values)} columns; there are two, index and prediction"
        elif '"' in line:
            yield "quotes", f"line {number} is quoted"
        elif file.labels and values[0] not in file.labels.values():
            yield "label", f"line {number}: {values[0][:40]!r} is none of {', '.join(map(str, file.known))}"
        elif not file.labels and (not NUMBER.fullmatch(values[0]) or float(values[0]) > 5):
            yield "label", f"line {number}: {values[0][:40]!r} is no decimal number from 0 to 5"
    yield from _order(keys, file.rows, "index", "rows")
    if file.name == "QNLI.tsv" and len(keys) == 5740:
        yield "old", "5740 rows are those of the old QNLI; the server takes the current one"


def _order(keys: Sequence[Any], rows: int, what: str, of: str) -> Iterator[Problem]:
    """Keys must be 0, 1, … in order."""
    if len(keys) != rows:
        yield f"{of} number", f"has {len(keys):,} {of}, not {rows:,}"
    seen: set[int] = set()
    for key in keys:
        if isinstance(key, bool) or not isinstance(key, int):
            yield f"{what} form", f"the {what} {shown(key)} is no whole number"
        elif key in seen:
            yield f"{what} twice", f"the {what} {key} is there twice"
        elif not 0 <= key < rows:
            yield f"{what} range", f"there is no {what} {key}; they are 0 to {rows - 1}"
        else:
            seen.add(key)
    if (
        len(seen) == rows == len(keys)
        and (wrong := next((n for n, key in enumerate(keys) if n != key), None)) is not None
    ):
        yield (
            f"{what} order",
            f"the {what} {keys[wrong]} stands in the place of {wrong}; they are in the order of the test set",
        )
    if keys and len(seen) < rows:
        yield from ((f"{what} missing", f"the {what} {key} is missing") for key in range(rows) if key not in seen)


def _jsonl(file: File, lines: Sequence[str]) -> Iterator[Problem]:
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield "json", f"line {number} is no JSON ({str(error)[:60]})"
            record = None
        else:
            if not isinstance(record, dict):
                yield "json", f"line {number} is no JSON object"
        records.append(record if isinstance(record, dict) else {})
    if file.name == "MultiRC.jsonl":
        yield from _multirc(file, records)
        return
    for number, record in enumerate(records, start=1):
        if record:
            yield from _keys(record, ("idx", "label"), f"line {number}")
            yield from _label(file, record.get("label"), f"line {number}")
    # some copies of AX-b have their keys as text, and whoever keeps them writes them so
    loose = file.name == "AX-b.jsonl"
    keys = [record.get("idx") for record in records]
    keys = [int(key) if loose and isinstance(key, str) and INDEX.fullmatch(key) else key for key in keys]
    yield from _order(keys, file.rows, "idx", "rows")


def _keys(record: Any, wanted: tuple[str, ...], where: str) -> Iterator[Problem]:
    if not isinstance(record, dict) or set(record) != set(wanted):
        there = ", ".join(map(repr, list(record)[:5])) if isinstance(record, dict) else "no object"
        yield "keys", f"{where} has {there or 'nothing'} instead of {', '.join(wanted)}"


def _label(file: File, label: Any, where: str) -> Iterator[Problem]:
    """Labels have a type too: `true` is not `"true"`, and `1` is not `"1"`."""
    if not file.labels and not (isinstance(label, str) and label.strip()):
        yield "label", f"{where}: the label {shown(label)} is no entity's text"
    elif file.labels and not any(type(label) is type(known) and label == known for known in file.known):
        expected = ", ".join(map(json.dumps, file.known))
        yield "label", f"{where}: the label {shown(label)} is none of {expected}"


def _multirc(file: File, records: Sequence[dict[str, Any]]) -> Iterator[Problem]:
    keys: dict[str, list[Any]] = {name: [] for name in MULTIRC}
    for number, record in enumerate(records, start=1):
        if not record:
            continue
        yield from _keys(record, ("idx", "passage"), f"line {number}")
        for question in _each(record.get("passage"), "questions"):
            yield from _keys(question, ("idx", "answers"), f"line {number}, a question")
            keys["question"].append(question.get("idx") if isinstance(question, dict) else None)
            for answer in _each(question, "answers"):
                yield from _keys(answer, ("idx", "label"), f"line {number}, an answer")
                known = answer if isinstance(answer, dict) else {}
                yield from _label(file, known.get("label"), f"line {number}, answer {known.get('idx')}")
                keys["answer"].append(known.get("idx"))
    yield from _order([record.get("idx") for record in records], file.rows, "passage idx", "passages")
    for name, rows in MULTIRC.items():
        yield from _order(keys[name], rows, f"{name} idx", f"{name}s")


def _each(parent: Any, name: str) -> list[Any]:
    found = parent.get(name) if isinstance(parent, dict) else None
    return found if isinstance(found, list) else []
