"""GLUE's official TSV files, or the hub's records, in; examples out (arXiv 1804.07461).

Quoting is switched off and `\\n` alone ends a line: default CSV quoting silently loses rows of QNLI, MRPC and STS-B.
Columns are found by the names of the header, and a header of another task is told; CoLA's files have none. MRPC is also
made from Microsoft's original file and GLUE's list of development pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from frugalbert.finetune.sources import class_number, hub_records, need, pick, text_of
from frugalbert.finetune.tables import Row, did_you_mean, read_text, split_lines, target
from frugalbert.finetune.tasks import TABLE, Example, Task

PATTERNS = ("*.tsv", "msr_paraphrase_train.txt")
MALFORMED_SHARE = 0.01


@dataclass(frozen=True)
class Form:
    """Columns that every file of a task has, its texts, its label (absent in test files), and the texts on the hub."""

    columns: tuple[str, ...]
    texts: tuple[str, ...]
    label: str
    hub: tuple[str, ...]


PAIR, NLI = ("sentence1", "sentence2"), ("premise", "hypothesis")
_QUESTIONS, _STRINGS, _SENTENCE = ("question1", "question2"), ("#1 String", "#2 String"), ("sentence",)
_SOURCES = ("genre", "filename", "year", "old_index", "source1", "source2")
FORMS = {
    "cola": Form(_SENTENCE, _SENTENCE, "label", _SENTENCE),
    "sst2": Form(_SENTENCE, _SENTENCE, "label", _SENTENCE),
    "mrpc": Form(("#1 ID", "#2 ID", *_STRINGS), _STRINGS, "Quality", PAIR),
    "stsb": Form(("index", *_SOURCES, *PAIR), PAIR, "score", PAIR),
    "qqp": Form(("id", *_QUESTIONS), _QUESTIONS, "is_duplicate", _QUESTIONS),
    "mnli": Form(("index", "promptID", "pairID", "genre", *PAIR), PAIR, "gold_label", NLI),
    "qnli": Form(("index", "question", "sentence"), ("question", "sentence"), "label", ("question", "sentence")),
    "rte": Form(("index", *PAIR), PAIR, "label", PAIR),
    "wnli": Form(("index", *PAIR), PAIR, "label", PAIR),
    "ax": Form(("index", *PAIR), PAIR, "label", NLI),
}
COLA = ["source", "label", "mark", "sentence"]
"""The columns of CoLA's training and development files, which have no header."""
STEMS = {"dev-mismatched": "dev_mismatched", "test-mismatched": "test_mismatched"}


def read(task: Task, source: Path | str, split: str, notes: list[str]) -> Iterator[tuple[str, Example]]:
    """(`file line 2`, example) of `train`, `dev`, `test`, or MNLI's `dev-mismatched` and `test-mismatched`.

    Raises Absent for a file that is not there, ValueError for one that is damaged or another task's.
    """
    form = FORMS[task.name]
    if isinstance(source, str):
        yield from _from_hub(task, form, source, split)
        return
    stem = {"mnli": STEMS.get(split, f"{split}_matched"), "ax": "diagnostic"}.get(task.name, split)
    if task.name == "mnli" and split == "train":
        stem = "train"
    original = source / "msr_paraphrase_train.txt"
    if task.name == "mrpc" and split != "test" and not (source / f"{stem}.tsv").exists() and original.exists():
        rows = _microsoft(task, form, original, split)
    elif task.name == "mrpc" and split == "test" and not (source / "test.tsv").exists():
        rows = read_table(task, form, pick(task, source, ("test.tsv", "msr_paraphrase_test.txt")), split, notes)
    else:
        rows = read_table(task, form, pick(task, source, (f"{stem}.tsv",)), split, notes)
    for row, _ in rows:
        label = target(row) if row.label is not None and not task.classes else class_number(task, row.label, row.where)
        yield row.where, Example(row.text, row.text_b, label, row.id)


def read_table(
    task: Task, form: Form, path: Path, split: str, notes: list[str]
) -> Iterator[tuple[Row, dict[str, str]]]:
    """Rows of one file, and all their cells. Rows of QQP with too few or too many cells are left out, except in tests.

    Raises ValueError with file and line for a header of another task, a missing label column and malformed rows.
    """
    lines = split_lines(read_text(path))
    if task.name == "cola" and split != "test":
        header, first = COLA, 0
        _check_header(task, form, lines[0].split("\t"), path, split, headless=True)
    else:
        header, first = [cell.strip() for cell in lines[0].split("\t")], 1
        _check_header(task, form, header, path, split)
    if len(lines) == first:
        raise ValueError(f"{path} has a header but no examples")
    malformed: list[int] = []
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split("\t")
        if len(cells) != len(header):
            malformed.append(number)
            if task.name == "qqp" and split != "test" and len(malformed) <= max(1, MALFORMED_SHARE * len(lines)):
                continue
            raise ValueError(
                f"{path} line {number} has {len(cells)} columns instead of {len(header)}; is it the official GLUE file?"
            )
        record = dict(zip(header, cells, strict=True))
        texts = [record[column].strip() for column in form.texts]
        key = record.get("index", record.get("id")) or str(number - first - 1)
        label = record.get(form.label)
        yield Row(f"{path} line {number}", texts[0], texts[1] if len(texts) > 1 else None, label, key.strip()), record
    if malformed:
        notes.append(f"{len(malformed)} malformed rows of {path.name} left out (the first is line {malformed[0]})")


def _check_header(task: Task, form: Form, header: list[str], path: Path, split: str, headless: bool = False) -> None:
    """Raises ValueError if the columns are not the task's, naming the task whose they are."""
    fitting = [(len(other.columns), name) for name, other in FORMS.items() if set(other.columns) <= set(header)]
    if headless:
        owner = max(fitting)[1] if fitting else ""
        if len(header) == len(COLA) and not fitting:
            return
    else:
        owner = max(fitting)[1] if fitting and max(fitting)[0] > len(form.columns) else ""
        missing = [column for column in form.columns if column not in header]
        if not owner and not missing:
            if split in ("test", "") or form.label in header:
                return
            raise ValueError(
                f"{path} has no column {form.label!r}{did_you_mean(form.label, header)}; a file without labels, such "
                f"as the test file, cannot be {path.name}"
            )
        owner = owner or (max(fitting)[1] if fitting else "")
    title = next((row.title for row in TABLE if row.name == owner), "")
    whose = f"it is the header of {title}" if title else "is it the official GLUE file?"
    wanted = COLA if headless else [*form.columns, form.label]
    raise ValueError(
        f"{path} line 1 is ({', '.join(header)[:120]}), {task.title} has {'no header and ' if headless else ''}the "
        f"columns {', '.join(wanted)}; {whose}"
    )


def _microsoft(task: Task, form: Form, path: Path, split: str) -> Iterator[tuple[Row, dict[str, str]]]:
    """MRPC from the original distribution: `dev_ids.tsv` says which pairs of the training file are the dev set."""
    listed = pick(task, path.parent, ("dev_ids.tsv",))
    pairs = {tuple(line.split("\t")) for line in split_lines(read_text(listed))}
    found = 0
    for row, record in read_table(task, form, path, "train", []):
        is_dev = (record["#1 ID"], record["#2 ID"]) in pairs
        found += is_dev
        if is_dev == (split == "dev"):
            yield row, record
    if found != len(pairs):
        raise ValueError(f"{listed} lists {len(pairs)} pairs, {found} of which are in {path}; do they belong together?")


def _from_hub(task: Task, form: Form, source: str, split: str) -> Iterator[tuple[str, Example]]:
    if task.name == "mnli" and split != "train":
        split = f"{split}-matched".replace("-mismatched-matched", "-mismatched")
    name = split.replace("dev", "validation").replace("-", "_")
    for number, (where, record) in enumerate(hub_records(task, source, name)):
        need(record, (*form.hub, "label"), where, task)
        texts = [text_of(record, column, where).strip() for column in form.hub]
        row = Row(where, texts[0], texts[1] if len(texts) > 1 else None, record["label"])
        if task.classes:
            label = class_number(task, row.label, where)
        else:
            label = None if split == "test" and row.label == -1.0 else target(row)
        yield where, Example(row.text, row.text_b, label, str(record.get("idx", number)))
