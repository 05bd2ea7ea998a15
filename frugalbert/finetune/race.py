"""RACE's files, as a directory, in the archive they come in, or from the hub, in; examples out (arXiv 1704.04683).

One JSON file a passage, `SPLIT/{middle,high}/*.txt`: `article`, `questions`, `options`, `answers` (letters), `id`.
Every option is a text of its own beside the article: the option in place of the question's `_`, or behind the question.
An archive is read in memory, never extracted.
"""

from __future__ import annotations

import json
import lzma
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from frugalbert.finetune.sources import Absent, hub_records, need, text_of
from frugalbert.finetune.tasks import Example, Task
from frugalbert.progress import reason

ARCHIVES = ("RACE*.tar*", "race*.tar*", "RACE*.tgz")
PATTERNS = ("*/middle/*.txt", "*/high/*.txt", *ARCHIVES)
PARTS = ("middle", "high")
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LARGEST_MEMBER, MOST_MEMBERS = 1 << 20, 200_000


def read(task: Task, source: Path | str, split: str) -> Iterator[tuple[str, Example]]:
    """(where, example) of `train`, `dev` or `test`, sorted by part and file number; `id` = `high132.txt-0`.

    Raises Absent if the split is not there, ValueError for damaged files and archives.
    """
    assert task.layout is not None
    parts = PARTS if task.layout.subset == "all" else (task.layout.subset,)
    if isinstance(source, str):
        counts: Counter[str] = Counter()
        for where, record in hub_records(task, source, {"dev": "validation"}.get(split, split)):
            need(record, ("article", "question", "options", "answer", "example_id"), where, task)
            key = text_of(record, "example_id", where)
            yield (
                where,
                _example(record, where, f"{key}-{counts[key]}", "middle" if key.startswith("middle") else "high"),
            )
            counts[key] += 1
        return
    found = list(_files(source, split, parts))
    if not found:
        raise Absent(f"{source} has no {split}/{parts[0]}/*.txt; add it, or leave {task.title} out of finetune.tasks")
    for part, where, content in sorted(found, key=lambda item: (PARTS.index(item[0]), _number(item[1]), item[1])):
        yield from _passage(content, where, part)


def _number(where: str) -> int:
    stem = PurePosixPath(where).stem
    return int(stem) if stem.isascii() and stem.isdigit() else -1


def _files(folder: Path, split: str, parts: tuple[str, ...]) -> Iterator[tuple[str, str, bytes]]:
    """(part, where, content) of every passage of a split."""
    if any(next((folder / split / part).glob("*.txt"), None) for part in parts):
        for part in parts:
            for path in (folder / split / part).glob("*.txt"):
                yield part, str(path), path.read_bytes()
        return
    for archive in sorted({path for pattern in ARCHIVES for path in folder.glob(pattern)}):
        yield from _members(archive, split, parts)


def _members(archive: Path, split: str, parts: tuple[str, ...]) -> Iterator[tuple[str, str, bytes]]:
    """Passages of a tar archive. Raises ValueError for a damaged one and for members that no RACE file is."""
    try:
        with tarfile.open(archive) as tar:
            for count, member in enumerate(tar):
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or count >= MOST_MEMBERS:
                    raise ValueError(
                        f"{archive}: the member {member.name[:80]!r} is unsafe; is it the official archive?"
                    )
                if member.size > LARGEST_MEMBER:
                    raise ValueError(f"{archive}: {member.name[:80]} has {member.size:,} bytes, too many for a passage")
                if not member.isfile() or path.suffix != ".txt" or path.parts[-3:-1] not in [(split, p) for p in parts]:
                    continue
                content = tar.extractfile(member)
                assert content is not None
                yield path.parts[-2], f"{archive}/{member.name}", content.read()
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError) as error:
        raise ValueError(f"{archive} is no whole archive ({reason(error)}); get it again") from None


def _passage(content: bytes, where: str, part: str) -> Iterator[tuple[str, Example]]:
    try:
        record = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where} is no JSON ({str(error)[:80]}); get it again") from None
    record = record if isinstance(record, dict) else {}
    lists = [record.get(name) for name in ("questions", "options", "answers")]
    if not all(isinstance(items, list) and len(items) == len(lists[0] or ()) for items in lists):
        raise ValueError(f"{where} needs article, and questions, options and answers of one length")
    key = record.get("id") or f"{part}{PurePosixPath(where).name}"
    for number, (question, options, answer) in enumerate(zip(*lists, strict=True)):
        flat = {"article": record.get("article"), "question": question, "options": options, "answer": answer}
        yield where, _example(flat, where, f"{key}-{number}", part)


def _example(record: dict[str, Any], where: str, key: str, part: str) -> Example:
    question, options, answer = text_of(record, "question", where), record["options"], record["answer"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(option, str) for option in options):
        raise ValueError(f"{where}: a question needs two options or more, as texts")
    letters = LETTERS[: len(options)]
    if answer not in (None, *letters):
        raise ValueError(f"{where}: the answer {str(answer)[:20]!r} is none of the letters {letters}")
    return Example(
        text_of(record, "article", where).strip(),
        label=None if answer is None else (letters.index(answer),),
        id=key,
        group=part,
        options=tuple(fill(question, option) for option in options),
        names=tuple(letters),
    )


def fill(question: str, option: str) -> str:
    """The option in place of `_`, or behind the question."""
    question, option = question.strip(), option.strip()
    return question.replace("_", option) if "_" in question else f"{question} {option}".strip()
