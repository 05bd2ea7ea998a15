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
from frugalbert.finetune.tasks import GLUE, Example, Task

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


def patterns(task: Task) -> tuple[str, ...]:
    """What the files of a task are called."""
    return {"mrpc": ("*.tsv", "msr_paraphrase_train.txt"), "ax": ("diagnostic.tsv",)}.get(task.name, ("*.tsv",))


def read(task: Task, source: Path | str, split: str, notes: list[str]) -> Iterator[tuple[str, Example]]:
    """(`file line 2`, example) of `train`, `dev`, `test`, or MNLI's `dev-mismatched` and `test-mismatched`.

    Labels of test sets, which GLUE keeps hidden, are not read where a copy has them (MRPC's on the hub).
    Raises Absent for a file that is not there, ValueError for one that is damaged or another task's.
    """
    form = FORMS[task.name]
    if isinstance(source, str):
        yield from _from_hub(task, form, source, split)
        return
    original = source / "msr_paraphrase_train.txt"
    if task.name == "mrpc" and split != "test" and not (source / f"{split}.tsv").exists() and original.exists():
        rows = _microsoft(task, form, original, split)
    else:
        rows = _table(task, form, pick(task, source, _names(task, split)), split, notes)
    for row, _ in rows:
        label = target(row) if row.label is not None and not task.classes else class_number(task, row.label, row.where)
        yield row.where, Example(row.text, row.text_b, label, row.id)


def _names(task: Task, split: str) -> tuple[str, ...]:
    if task.name == "mnli" and split in ("dev", "test"):
        return (f"{split}_matched.tsv",)
    if task.name == "mrpc" and split == "test":
        return ("test.tsv", "msr_paraphrase_test.txt")
    return ("diagnostic.tsv",) if task.name == "ax" else (f"{split.replace('-', '_')}.tsv",)


def _table(task: Task, form: Form, path: Path, split: str, notes: list[str]) -> Iterator[tuple[Row, dict[str, str]]]:
    """Rows of one file, and all their cells. Rows of QQP with too few or too many cells are left out, except in tests.

    Raises ValueError with file and line for a header of another task, a missing label column and malformed rows.
    """
    lines = split_lines(read_text(path))
    headless = task.name == "cola" and split != "test"
    cells = [cell.strip() for cell in lines[0].split("\t")]
    _check_header(task, form, cells, path, split)
    header, first = (COLA, 0) if headless else (cells, 1)
    if len(lines) == first:
        raise ValueError(f"{path} has a header but no examples")
    malformed: list[int] = []
    for number, line in enumerate(lines[first:], first + 1):
        cells = line.split("\t")
        if len(cells) != len(header):
            malformed.append(number)
            if (
                task.name == "qqp"
                and not split.startswith("test")
                and len(malformed) <= max(1, MALFORMED_SHARE * len(lines))
            ):
                continue
            raise ValueError(
                f"{path} line {number} has {len(cells)} columns instead of {len(header)}; is it the official GLUE file?"
            )
        record = dict(zip(header, cells, strict=True))
        texts = [record[column].strip() for column in form.texts]
        key = record.get("index", record.get("id")) or str(number - first - 1)
        label = None if split.startswith("test") else record[form.label]
        yield Row(f"{path} line {number}", texts[0], texts[1] if len(texts) > 1 else None, label, key.strip()), record
    if malformed:
        notes.append(f"{len(malformed)} malformed rows of {path.name} left out (the first is line {malformed[0]})")


def _check_header(task: Task, form: Form, header: list[str], path: Path, split: str) -> None:
    """Raises ValueError if the first line is not the task's, naming the task whose it is, or if there are no labels."""
    fitting = [name for name, other in FORMS.items() if set(other.columns) <= set(header)]
    most = max((len(FORMS[name].columns) for name in fitting), default=0)
    headless = task.name == "cola" and split != "test"
    if headless:
        fine = not fitting and len(header) == len(COLA)
    else:
        fine = set(form.columns) <= set(header) and most == len(form.columns)
    if not fine:
        owners = [row.title for row in GLUE if row.name in fitting and len(FORMS[row.name].columns) == most]
        whose = f"; it is the header of {' or '.join(owners)}" if owners else ""
        wanted = f"no header and {len(COLA)} columns" if headless else f"the columns {', '.join(form.columns)}"
        raise ValueError(f"{path} line 1 is ({', '.join(header)[:120]}), but {task.title} has {wanted}{whose}")
    if not headless and split.startswith(("train", "dev")) and form.label not in header:
        hint = did_you_mean(form.label, set(header) - set(form.columns))
        raise ValueError(
            f"{path} has no column {form.label!r}{hint}; a file without labels, such as the test file, cannot be the "
            f"{split} set of {task.title}"
        )


def _microsoft(task: Task, form: Form, path: Path, split: str) -> Iterator[tuple[Row, dict[str, str]]]:
    """MRPC from the original distribution: `dev_ids.tsv` says which pairs of the training file are the dev set."""
    listed = pick(task, path.parent, ("dev_ids.tsv",))
    pairs = {tuple(line.split("\t")) for line in split_lines(read_text(listed))}
    found = 0
    for row, record in _table(task, form, path, "train", []):
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
        if split.startswith("test"):
            label = None
        else:
            label = class_number(task, row.label, where) if task.classes else target(row)
        yield where, Example(row.text, row.text_b, label, str(record.get("idx", number)))
