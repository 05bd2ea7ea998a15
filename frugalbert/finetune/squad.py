"""SQuAD's JSON, the hub's records, or JSONL rows in; extractive questions out (arXiv 1606.05250, 1806.03822).

Contexts are kept character by character, an answer is `context[answer_start : answer_start + len(text)]`. One that
stands elsewhere is taken where it is nearest; one that is nowhere stays a gold answer of an evaluation, and its
question is left out of training.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from frugalbert.finetune.sources import hub_records, need, pick, text_of
from frugalbert.finetune.tables import read_jsonl, read_text
from frugalbert.finetune.tasks import Example, Task

FORM = '{"data": [{"paragraphs": [{"context", "qas": [{"id", "question", "answers"}]}]}]}'
Record = dict[str, Any]


def patterns(task: Task) -> tuple[str, ...]:
    """What the official files are called; `dev-v1.1.json`, `dev-v1.1.reconstructed.json`."""
    version = {"squad1": "v1.1", "squad2": "v2.0"}[task.name]
    return (f"dev-{version}*.json", f"train-{version}*.json")


def read(task: Task, source: Path | str, split: str, notes: list[str]) -> Iterator[tuple[str, Example]]:
    """(where, example) of the official `train` or `dev`.

    Raises Absent for a file that is not there, ValueError for one that is damaged or of the other version.
    """
    if isinstance(source, Path):
        version = {"squad1": "v1.1", "squad2": "v2.0"}[task.name]
        path = pick(task, source, (f"{split}-{version}.json", f"{split}-{version}*.json"))
        records = read_json(path)
        is_second = any("is_impossible" in record for _, record in records)
        if is_second != (task.name == "squad2"):
            theirs = "SQuAD 2.0" if is_second else "SQuAD 1.1"
            raise ValueError(f"{path} is of {theirs}, not of {task.title}; write squad{theirs[6]} in finetune.tasks")
    else:
        name = {"dev": "validation"}.get(split, split)
        records = [(where, _flat(record, where, task)) for where, record in hub_records(task, source, name)]
    yield from examples(records, split, notes)


def read_custom(path: Path, split: str, notes: list[str]) -> Iterator[tuple[str, Example]]:
    """(where, example) of a `.json` in SQuAD's form, or of `.jsonl` rows with `question`, `context` and `answers`."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; paths are relative to the YAML")
    if path.suffix.lower() == ".jsonl":
        records = [(where, _flat(record, where, None)) for where, record in read_jsonl(path)]
    elif path.suffix.lower() == ".json":
        records = read_json(path)
    else:
        raise ValueError(f"{path}: question answering is read from .json (SQuAD's form) or .jsonl files")
    yield from examples(records, split, notes)


def read_json(path: Path) -> list[tuple[str, Record]]:
    """Questions as flat records. Raises ValueError with the place for a file of another form."""
    try:
        content = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise ValueError(
            f"{path} line {line} is no JSON ({getattr(error, 'msg', error)}); is the file whole?"
        ) from None
    found = []
    for number, article in enumerate(_each(content, "data", str(path))):
        place = f"{path} data[{number}]"
        for at, paragraph in enumerate(_each(article, "paragraphs", place)):
            inner = f"{place}.paragraphs[{at}]"
            for question in _each(paragraph, "qas", inner):
                where = f"{inner} id {question.get('id')}"
                found.append((where, {**question, "context": paragraph.get("context")}))
    if not found:
        raise ValueError(f"{path} has no questions; SQuAD's form is {FORM}")
    return found


def _each(record: Any, key: str, where: str) -> list[Record]:
    items = record.get(key) if isinstance(record, dict) else None
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ValueError(f"{where} has no list {key!r}; SQuAD's form is {FORM}")
    return items


def _flat(record: Record, where: str, task: Task | None) -> Record:
    """A row of the hub or of JSONL as SQuAD has it. `answers`: the hub's lists, SQuAD's objects, or texts."""
    if task:
        need(record, ("id", "question", "context", "answers"), where, task)
    answers = record.get("answers")
    if answers is None:
        return record
    if isinstance(answers, dict):
        texts, starts = answers.get("text"), answers.get("answer_start")
        if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts):
            raise ValueError(f"{where}: the answers' text and answer_start are no lists of one length")
        answers = [{"text": text, "answer_start": start} for text, start in zip(texts, starts, strict=True)]
    elif isinstance(answers, list):
        answers = [{"text": answer} if isinstance(answer, str) else answer for answer in answers]
    return {**record, "answers": answers, "is_impossible": not answers}


def examples(records: Iterable[tuple[str, Record]], split: str, notes: list[str]) -> Iterator[tuple[str, Example]]:
    """Label 1 = has an answer, 0 = has none, None = not known (no answers, and nothing that says there are none)."""
    oddities: Counter[str] = Counter()
    for number, (where, record) in enumerate(records):
        context = text_of(record, "context", where)
        golds, starts = [], []
        for answer in _each({"answers": record.get("answers") or []}, "answers", where):
            text, start = text_of(answer, "text", where), answer.get("answer_start", 0)
            if not isinstance(start, int):
                raise ValueError(f"{where}: the answer_start {start!r} is no number")
            if text.strip() and not record.get("is_impossible"):
                golds.append(text)
                starts.append(_nearest(context, text, start))
                oddities["answers not at their answer_start, the nearest place was taken"] += (
                    "answer_start" in answer and starts[-1] not in (start, -1)
                )
        label = 1 if golds else 0 if record.get("is_impossible") else None
        if split == "train" and -1 in starts:
            oddities["questions whose answer is not in the context left out"] += 1
            continue
        key = record.get("id", number)
        yield (
            where,
            Example(
                text_of(record, "question", where).strip(),
                context,
                label,
                str(key),
                answers=tuple(golds),
                starts=tuple(starts),
            ),
        )
    notes += [f"{split}: {count} {what}" for what, count in oddities.items() if count]


def _nearest(context: str, text: str, start: int) -> int:
    """Where the text stands, nearest to `start`; -1 = nowhere."""
    if context.startswith(text, max(start, 0)):
        return max(start, 0)
    before, behind = context.rfind(text, 0, max(start, 0) + len(text)), context.find(text, max(start, 0))
    places = [place for place in (before, behind) if place >= 0]
    return min(places, key=lambda place: abs(place - start), default=-1)
