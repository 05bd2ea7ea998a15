"""SuperGLUE's official JSONL files, or the hub's records, in; examples out (arXiv 1905.00537).

Nested records (MultiRC, ReCoRD, WSC) are brought into the hub's flat form first; then each task has one small function.
Texts with spans in them are not stripped: spans count characters.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from frugalbert.finetune.sources import class_number, hub_records, pick, text_of
from frugalbert.finetune.tables import read_jsonl
from frugalbert.finetune.tasks import SUPERGLUE, Example, Task, digest

PATTERNS = ("*.jsonl",)
Record = dict[str, Any]
FIELDS = {
    "wsc": ("text", "span1_text", "span1_index", "span2_text", "span2_index"),
    "wic": ("sentence1", "sentence2", "start1", "end1", "start2", "end2"),
    "copa": ("premise", "choice1", "choice2", "question"),
    "record": ("passage", "query", "entities"),
    "multirc": ("paragraph", "question", "answer"),
    "boolq": ("question", "passage"),
    "cb": ("premise", "hypothesis"),
    "rte": ("premise", "hypothesis"),
    "axg": ("premise", "hypothesis"),
    "axb": ("sentence1", "sentence2"),
}
PLACEHOLDER = "@placeholder"


def read(
    task: Task, source: Path | str, split: str, negatives: int | None, notes: list[str]
) -> Iterator[tuple[str, Example]]:
    """(`file line 2`, example) of `train`, `dev` or `test`; a line of MultiRC and ReCoRD holds many.

    Args:
        negatives: ReCoRD: wrong candidates that a query keeps; None = all.
    Raises Absent for a file that is not there, ValueError for one that is damaged or another task's.
    """
    assert task.layout is not None
    subset = task.layout.subset
    if isinstance(source, Path):
        name = task.layout.folder if task.rides else {"dev": "val"}.get(split, split)
        path = pick(task, source, (f"{name}.jsonl",))
        found = (
            (where, flat) for where, record in read_jsonl(path) for flat in _check(task, _flat(subset, record), where)
        )
    else:
        records = hub_records(task, source, {"dev": "validation"}.get(split, split))
        found = ((where, flat) for where, record in records for flat in _check(task, iter([record]), where))
    convert = _wsc_text if task.name == "wsc-text" else CONVERT[subset]
    oddities: Counter[str] = Counter()
    for row, (where, record) in enumerate(found):
        example = replace(convert(record, where, oddities), id=_key(record["idx"], where))
        if subset == "record":
            example = _label_candidates(example, record.get("answers"), split, negatives, where)
            if split == "train" and not example.label:
                oddities["queries without the answer among their candidates left out"] += 1
                continue
        else:
            label = class_number(task, record.get("label"), where)
            example = replace(example, label=(label,) if subset == "copa" and label is not None else label)
        if subset == "axg":
            example = replace(example, group=str(row // 2))  # `pair_id` does not link the pairs, their order does
        yield where, example
    notes += [f"{split}: {count} {what}" for what, count in oddities.items()]


# ---- flat records ---------------------------------------------------------------------------------------------------


def _flat(subset: str, record: Record) -> Iterator[Record]:
    """The record in the hub's form: one for each answer of MultiRC, for each query of ReCoRD."""
    passage = record.get("passage")
    if subset == "multirc" and isinstance(passage, dict):
        for question in _each(passage.get("questions")):
            for answer in _each(question.get("answers")):
                idx = {"paragraph": record.get("idx"), "question": question.get("idx"), "answer": answer.get("idx")}
                texts = {"question": question.get("question"), "answer": answer.get("text")}
                yield {"paragraph": passage.get("text"), **texts, "idx": idx, "label": answer.get("label")}
    elif subset == "record" and isinstance(passage, dict):
        text = passage.get("text")
        places = [(entity.get("start"), entity.get("end")) for entity in _each(passage.get("entities"))]
        names = [_surface(text, first, last) for first, last in places]
        for query in _each(record.get("qas")):
            answers = query.get("answers")
            golds = None if answers is None else [answer.get("text") for answer in _each(answers)]
            idx = {"passage": record.get("idx"), "query": query.get("idx")}
            yield {"passage": text, "query": query.get("query"), "entities": names, "answers": golds, "idx": idx}
    elif subset == "wsc" and isinstance(record.get("target"), dict):
        yield {**record, **record["target"]}
    else:
        yield record


def _each(value: Any) -> list[Record]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _surface(text: Any, first: Any, last: Any) -> str | None:
    """The entity at these characters; ReCoRD's `end` is the last character itself."""
    whole = (
        isinstance(text, str) and isinstance(first, int) and isinstance(last, int) and 0 <= first <= last < len(text)
    )
    return text[first : last + 1] if whole else None


def _check(task: Task, records: Iterator[Record], where: str) -> Iterator[Record]:
    """The same records. Raises ValueError if there are none, or fields are missing, naming the task whose they are."""
    assert task.layout is not None
    fields = (*FIELDS[task.layout.subset], "idx")
    empty = True
    for record in records:
        empty = False
        missing = [field for field in fields if field not in record]
        if missing:
            owners = [name for name, wanted in FIELDS.items() if set(wanted) <= set(next(_flat(name, record), ()))]
            titles = [row.title for row in SUPERGLUE if row.layout and row.layout.subset in owners[:1]]
            whose = f"; they are those of {titles[0]}" if titles else ""
            there = ", ".join(map(repr, list(record)[:12]))
            raise ValueError(f"{where}: {task.title} needs the field {missing[0]!r}, there are {there}{whose}")
        yield record
    if empty:
        raise ValueError(f"{where} has no questions; is it the official file of {task.title}?")


def _key(idx: Any, where: str) -> str:
    """The row's key: a number, also as text (AX-b); `passage.question.answer` (MultiRC); the query's (ReCoRD)."""
    numbers = list(idx.values()) if isinstance(idx, dict) else [idx]
    if isinstance(idx, dict):
        numbers = [idx[name] for name in ("paragraph", "question", "answer") if name in idx] or [idx.get("query")]
    try:
        return ".".join(str(int(number)) for number in numbers)
    except (TypeError, ValueError):
        raise ValueError(f"{where}: the idx {str(idx)[:60]!r} is no number") from None


# ---- one function a task: (record, where, oddities to count) -> the example without its label -----------------------


def _pair(first: str, second: str) -> Callable[[Record, str, Counter[str]], Example]:
    def convert(record: Record, where: str, oddities: Counter[str]) -> Example:
        return Example(text_of(record, first, where).strip(), text_of(record, second, where).strip())

    return convert


def _copa(record: Record, where: str, oddities: Counter[str]) -> Example:
    question = text_of(record, "question", where)
    joint = {"cause": " because", "effect": " so"}.get(question)
    if joint is None:
        raise ValueError(f"{where}: the question is {question[:40]!r}; COPA asks for 'cause' or 'effect'")
    options = tuple(text_of(record, name, where).strip() for name in ("choice1", "choice2"))
    return Example(text_of(record, "premise", where).strip() + joint, options=options, names=("0", "1"))


def _multirc(record: Record, where: str, oddities: Counter[str]) -> Example:
    question, answer = (text_of(record, name, where).strip() for name in ("question", "answer"))
    group = ".".join(_key(record["idx"], where).split(".")[:-1])
    return Example(text_of(record, "paragraph", where).strip(), f"{question} {answer}", group=group)


def _record(record: Record, where: str, oddities: Counter[str]) -> Example:
    query, names = text_of(record, "query", where), record["entities"]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"{where}: a query needs entities, as places inside the passage")
    if PLACEHOLDER not in query:
        raise ValueError(f"{where}: the query has no {PLACEHOLDER}")
    distinct = tuple(dict.fromkeys(names))
    options = tuple(query.replace(PLACEHOLDER, name) for name in distinct)
    return Example(text_of(record, "passage", where).strip(), options=options, names=distinct)


def _label_candidates(example: Example, golds: Any, split: str, negatives: int | None, where: str) -> Example:
    """Right is every candidate that is written as a gold answer. In training wrong ones are drawn by hash."""
    if golds is None or (split == "test" and not golds):
        return example
    if not isinstance(golds, list) or not all(isinstance(gold, str) for gold in golds):
        raise ValueError(f"{where}: the answers are no texts")
    answers, names = tuple(dict.fromkeys(golds)), example.names
    keep = range(len(names))
    if split == "train" and negatives is not None:
        wrong = [number for number in keep if names[number] not in answers]
        wrong = sorted(wrong, key=lambda number: digest(example.id, names[number]))[:negatives]
        keep = [number for number in keep if names[number] in answers or number in wrong]
    names = tuple(names[number] for number in keep)
    return replace(
        example,
        options=tuple(example.options[number] for number in keep),
        names=names,
        answers=answers,
        label=tuple(number for number, name in enumerate(names) if name in answers),
    )


def _wic(record: Record, where: str, oddities: Counter[str]) -> Example:
    texts = [text_of(record, f"sentence{number}", where) for number in (1, 2)]
    spans = []
    for number, text in enumerate(texts):
        first, end = record[f"start{number + 1}"], record[f"end{number + 1}"]
        if not isinstance(first, int) or not isinstance(end, int) or not 0 <= first < end <= len(text):
            raise ValueError(
                f"{where}: the word of sentence{number + 1} is at {first}–{end}, the sentence has {len(text)} "
                "characters"
            )
        spans.append((number, first, end))
    return Example(texts[0], texts[1], spans=tuple(spans))


def _wsc(record: Record, where: str, oddities: Counter[str]) -> Example:
    text = text_of(record, "text", where)
    spans = []
    for name in ("span1", "span2"):
        index = record[f"{name}_index"]
        if not isinstance(index, int):
            raise ValueError(f"{where}: {name}_index is {index!r}, no number")
        first, end, oddity = find_span(text, text_of(record, f"{name}_text", where), index, where)
        oddities[oddity] += bool(oddity)
        spans.append((0, first, end))
    oddities.pop("", None)
    return Example(text, spans=tuple(spans))


def find_span(text: str, words: str, index: int, where: str) -> tuple[int, int, str]:
    """Characters of WSC's span `words`, which begins at whitespace token `index`, and what was odd about it.

    Text and index are compared without case, punctuation and possessive endings. Where they disagree the occurrence
    nearest to the index is taken; where there is none, the words that the index names.
    Raises ValueError if the index is behind the text's end.
    """
    tokens = [match.span() for match in re.finditer(r"\S+", text)]
    wanted = words.split()
    there = tokens[index : index + len(wanted)] if index >= 0 else []
    pattern = r"\s+".join(map(re.escape, wanted))
    if wanted and [_bare(text[first:end]) for first, end in there] == [_bare(word) for word in wanted]:
        exact = re.compile(pattern, re.IGNORECASE).search(text, there[0][0], there[-1][1])
        return (*(exact.span() if exact else _trim(text, there[0][0], there[-1][1])), "")
    places = [match.span() for match in re.finditer(rf"(?<!\w){pattern}(?!\w)", text, re.IGNORECASE)] if wanted else []
    if places:
        distances = [abs(sum(end <= first for _, end in tokens) - index) for first, _ in places]
        return (*places[distances.index(min(distances))], "spans not at their index, the nearest occurrence was taken")
    if not there:
        raise ValueError(f"{where}: the span {words!r} is not in the text, which has no word {index}")
    return (*_trim(text, there[0][0], there[-1][1]), "spans not in the text, the words at their index were taken")


def _bare(word: str) -> str:
    stripped = re.sub(r"^\W+|\W+$", "", word.lower().replace("’", "'"))
    return re.sub(r"'s$", "", stripped) or word.lower()


def _trim(text: str, first: int, end: int) -> tuple[int, int]:
    """Without punctuation around it, unless nothing is left."""
    match = re.search(r"\w(?:.*\w)?", text[first:end], re.DOTALL)
    return (first + match.start(), first + match.end()) if match else (first, end)


def _wsc_text(record: Record, where: str, oddities: Counter[str]) -> Example:
    first, second = (" ".join(text_of(record, f"{name}_text", where).split()) for name in ("span1", "span2"))
    return Example(text_of(record, "text", where).strip(), f"{second} means {first}")


CONVERT = {
    "boolq": _pair("question", "passage"),
    "cb": _pair("premise", "hypothesis"),
    "copa": _copa,
    "multirc": _multirc,
    "record": _record,
    "rte": _pair("premise", "hypothesis"),
    "wic": _wic,
    "wsc": _wsc,
    "axb": _pair("sentence1", "sentence2"),
    "axg": _pair("premise", "hypothesis"),
}
