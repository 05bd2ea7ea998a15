"""Examples and their rows of tokens as text that a person can check; of real data only numbers and digests."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import config
from frugalbert.finetune.examples import load
from frugalbert.finetune.features import Features, Lengths, encode
from frugalbert.finetune.tasks import TABLE, Data, Example, Task, resolve
from tests.finetune.conftest import make_tiny
from tests.finetune.golden import files

FOLDER = Path(__file__).parent
LENGTHS = Lengths(maximum=18, stride=4, question=5)
CUSTOM = (
    config.Task(
        name="choice",
        type="multiple-choice",
        train="custom/choice.csv",
        dev="custom/choice.csv",
        columns=config.Columns(text="passage", text_b="asked", label="right", options=("one", "two"), id="key"),
    ),
    config.Task(
        name="questions", type="question-answering", train="custom/questions.jsonl", dev="custom/questions.jsonl"
    ),
    config.Task(
        name="tags",
        type="token-classification",
        train="custom/tags.conll",
        dev="custom/tags.conll",
        test="custom/untagged.conll",
    ),
)


def everything(work: Path) -> dict[str, str]:
    """{file name: content} of all golden files made of our own files, which are put below `work`."""
    from transformers import AutoTokenizer

    folder = files.write(work / "data")
    families: dict[str, list[Data]] = {"glue": [], "superglue": [], "squad": [], "race": [], "custom": []}
    for task in [*TABLE, *resolve(CUSTOM)]:
        family = task.layout.family if task.layout else "custom"
        if family in families and not task.rides and task.name not in ("python-docs", "race-middle", "race-high"):
            families[family].append(read(task, folder))
    texts = [text for data in itertools.chain(*families.values()) for row in rows(data) for text in texts_of(row)]
    tokenizer = AutoTokenizer.from_pretrained(make_tiny(work / "tiny", texts))
    return {f"{family}.txt": "\n".join(show(data, tokenizer) for data in datas) for family, datas in families.items()}


def read(task: Task, folder: Path) -> Data:
    section = config.Finetune(
        tasks=[task.custom or task.name], model="-", data=str(folder), predict_test=True, negatives=1
    )
    riders = [row for row in TABLE if row.rides == task.name]
    return load(task, section, folder, None, riders)


def rows(data: Data) -> Iterable[Example]:
    return itertools.chain(*data.sets.values())


def texts_of(example: Example) -> tuple[str, ...]:
    return (example.text, example.text_b or "", *example.options, *example.words)


# ---- our own files: in full -----------------------------------------------------------------------------------------


def show(data: Data, tokenizer: Any) -> str:
    """A task: what it is, then every example with its rows of tokens."""
    task = data.task
    metrics = " ".join(task.metrics) + (
        "" if task.headline == task.metrics else f" (headline {' '.join(task.headline)})"
    )
    lines = [f"==== {task.title} · {task.type} · {metrics} · cut {task.cut}"]
    lines += [f"     classes {' '.join(data.labels) or '-'}"] + [f"     note: {note}" for note in data.notes]
    for name, part in data.sets.items():
        lengths = replace(LENGTHS, cut=task.cut)
        features = encode(tokenizer, task.type, part, len(data.labels), lengths, has_types=True)
        for number, example in enumerate(part):
            lines += ["", f"-- {name} {example.id} · label {label(example, data)}", *fields(example)]
            for row in [place for place, owner in enumerate(features.owner) if owner == number]:
                lines += tokens(features, row, tokenizer)
    return "\n".join(lines) + "\n"


def label(example: Example, data: Data) -> str:
    value = example.label
    if not data.labels or value is None:
        return str(value)
    if isinstance(value, tuple):
        return " ".join(data.labels[number] for number in value)
    return f"{value} {data.labels[int(value)]}"


def fields(example: Example) -> list[str]:
    """The texts, quoted, and what else an example has."""
    found = [("text", repr(example.text))] if not example.words else []
    found += [("text_b", repr(example.text_b))] if example.text_b is not None else []
    found += [("words", " ".join(example.words))] if example.words else []
    found += [("group", example.group)] if example.group else []
    for side, first, end in example.spans:
        text = example.text_b if side else example.text
        found.append(("span", f"{'text_b' if side else 'text'} {first}-{end} {(text or '')[first:end]!r}"))
    found += [("option", f"{name}: {option!r}") for name, option in zip(example.names, example.options, strict=True)]
    found += [("answer", f"{answer!r} {start}".strip()) for answer, start in answers(example)]
    return [f"   {name:7}{value}" for name, value in found]


def answers(example: Example) -> list[tuple[str, int | str]]:
    """Answers with their places; ReCoRD's have none."""
    return list(zip(example.answers, example.starts or [""] * len(example.answers), strict=True))


def tokens(features: Features, row: int, tokenizer: Any) -> list[str]:
    """One row: its tokens, `/` where the types change, and its marks and target where it has them."""
    names = tokenizer.convert_ids_to_tokens(features.ids[row].tolist())
    types = features.types[row].tolist()
    changes = {place for place in range(1, len(types)) if types[place] != types[place - 1]}
    found = [f"   row    {' '.join(f'/ {name}' if place in changes else name for place, name in enumerate(names))}"]
    marks = features.marks[row] if features.marks else None
    target = features.targets[row] if features.kind == "question-answering" and features.targets is not None else None
    if features.kind == "question-answering":
        inside = [(first, end) for first, end in marks.tolist() if first >= 0]
        found.append(f"          characters {inside[0][0]}-{inside[-1][1]}")
        if target is not None:
            first, last = target.tolist()
            found.append(f"          answer {' '.join(names[first : last + 1])}")
    elif features.kind == "token-classification":
        found.append(f"          words {' '.join(map(str, marks.tolist()))}")
    elif marks is not None:
        found += [f"          reads {' '.join(names[first:end])}" for first, end in marks.tolist()]
    return found


# ---- real data: structure only --------------------------------------------------------------------------------------

SPECIAL = {"wsc": {"dev": ("42",), "test": ("80", "81", "82"), "train": ("234", "380")}}
"""Rows with a special case of their own, beside the first ones of every set."""
FIRST = 3


def real(folder: Path) -> str:
    """The first rows, and the special ones, of every task that is there: numbers and 64-bit digests, never a text.

    Tokens are BERT's (uncased), at 128 a row; questions at 384 with a stride of 128.
    """
    from transformers import BertTokenizerFast

    tokenizer = BertTokenizerFast(str(folder / "vocab" / "bert-base-uncased-vocab.txt"))
    lines = []
    for task in TABLE:
        if not task.layout or task.rides or task.name in ("blimp", "race-middle", "race-high"):
            continue
        section = config.Finetune(tasks=[task.name], model="-", data=str(folder), predict_test=True, train=False)
        try:
            data = load(task, section, folder, None, [row for row in TABLE if row.rides == task.name])
        except FileNotFoundError:
            continue
        lines.append(f"==== {task.title}")
        for name, part in data.sets.items():
            special = SPECIAL.get(task.name, {}).get(name, ())
            lines.append(f"-- {name}: {len(part)} rows {digest(*map(whole, part))}")
            chosen = [row for number, row in enumerate(part) if number < FIRST or row.id in special]
            lengths = Lengths(384 if task.type == "question-answering" else 128, task.cut)
            features = encode(tokenizer, task.type, chosen, len(data.labels), lengths, has_types=True)
            for number, example in enumerate(chosen):
                lines.append(structure(example))
                lines += [numbers(features, row) for row in np.flatnonzero(features.owner == number)]
    return "\n".join(lines) + "\n"


def numbers(features: Features, row: int) -> str:
    """A row of tokens: how many, their digest, how many of the second text, and what the head looks at."""
    assert features.types is not None
    ids, second = features.ids[row], features.types[row].sum()
    found = f"      {len(ids)} tokens {digest(*map(str, ids))} second {second}"
    if features.kind == "question-answering":
        assert features.marks is not None
        inside = features.marks[row][features.marks[row][:, 0] >= 0]
        found += f" characters {inside[0, 0]}-{inside[-1, 1]} answer {'-'.join(map(str, features.targets[row]))}"
    elif features.marks is not None:
        found += " reads " + " ".join(f"{first}-{end}" for first, end in features.marks[row])
    return found


def whole(example: Example) -> str:
    """All that an example has."""
    texts = (example.text, example.text_b, example.options, example.names, example.answers)
    return repr((example.id, example.label, example.group, example.spans, example.starts, texts))


def structure(example: Example) -> str:
    parts = [f"   {example.id} label {example.label} text {len(example.text)}:{digest(example.text)}"]
    parts += [f"text_b {len(example.text_b)}:{digest(example.text_b)}"] if example.text_b is not None else []
    parts += [f"group {example.group}"] if example.group else []
    for side, first, end in example.spans:
        text = example.text_b if side else example.text
        parts.append(f"span {side}:{first}-{end}:{digest((text or '')[first:end])}")
    parts += [f"option {len(option)}:{digest(option)}" for option in example.options]
    parts += [f"answer {len(answer)}:{digest(answer)} {start}" for answer, start in answers(example)]
    return " ".join(parts).rstrip()


def digest(*texts: str) -> str:
    return hashlib.blake2b("\x1f".join(texts).encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
