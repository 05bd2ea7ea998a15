"""Where fine-tuned models are wrong: predictions of a run in; confusion matrices and the worst errors out.

Reads `finetune/TASK/INIT-seedN/predictions.jsonl` (`gold`, `prediction`, `loss`, `id`, perhaps `text`); without `text`
the tokens of `dev-tokens.jsonl` are put together again. Labels, texts and folder names are others' words: whatever they
hold is shown as text.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frugalbert.report.collect import LARGEST_TOKENIZER, MOST_RECORDS, Collected, read_lines, read_mapping
from frugalbert.report.heat import heatmap
from frugalbert.report.svg import Plot
from frugalbert.report.tables import Table
from frugalbert.report.wording import NONE, at, clean, count, fixed, list_at, percent, short, significant, text_at

MOST_TASKS, MOST_SEEDS, MOST_LABELS, MOST_ERRORS = 12, 5, 12, 10
TRIAL = re.compile(r"(?P<group>.+)-seed(?P<seed>[0-9]{1,9})")


@dataclass
class Predictions:
    """Of one task: each seed's lines."""

    title: str
    folder: Path
    seeds: list[list[dict[str, Any]]]
    labels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Mistakes:
    """What the page shows of a task; `figure` is the name of its confusion matrix, if there is one."""

    title: str
    figure: str
    caption: str
    confusions: Table
    worst: Table


def read(folder: Path, results: Sequence[dict[str, Any]], found: Collected) -> list[Predictions]:
    """The predictions of the stage's folder, of trained models that did not start from random weights."""
    by_task = {text_at(row, "task"): row for row in reversed(results)}
    tasks: list[Predictions] = []
    for place in sorted(path for path in folder.glob("*") if path.is_dir()):
        seeds = [
            list(itertools.islice(read_lines(file, found, _slim), MOST_RECORDS))
            for file in _files(place, found)[:MOST_SEEDS]
        ]
        row = by_task.get(clean(place.name), {})
        labels = [label for label in list_at(row, "labels") if isinstance(label, str)]
        if any(seeds):
            title = text_at(row, "title") or short(clean(place.name), 40)
            tasks.append(Predictions(title, place, [lines for lines in seeds if lines], labels))
    return tasks


def _files(place: Path, found: Collected) -> list[Path]:
    """Predictions of the trials that differ by the seed alone: those of the model that was kept, or the most."""
    groups: dict[str, list[tuple[int, Path]]] = {}
    for path in place.glob("*/predictions.jsonl"):
        match = TRIAL.fullmatch(path.parent.name)
        if match and not match["group"].startswith("random"):
            groups.setdefault(match["group"], []).append((int(match["seed"]), path))
    kept = TRIAL.fullmatch(text_at(read_mapping(place / "model.json", found), "trial"))
    own = groups.get(kept["group"] if kept else "") or max(groups.values(), key=len, default=[])
    return [path for _, path in sorted(own)]


def _slim(line: Any) -> Any:
    """What is used of a line. Classes are cleaned here, and once each; other texts where they are shown."""
    if not isinstance(line, dict):
        return line
    slim = {name: line[name] for name in ("index", "id", "digest", "text", "loss") if name in line}
    for name in ("gold", "prediction"):
        if name in line:
            slim[name] = _class(line[name]) if isinstance(line[name], str) else line[name]
    return slim


@functools.lru_cache(maxsize=4096)
def _class(text: str) -> str:
    return clean(text)


def is_wrong(line: dict[str, Any]) -> bool:
    """Whether a prediction is none of the gold answers; numbers are never right."""
    gold, predicted = line.get("gold"), line.get("prediction")
    if isinstance(gold, list) and not isinstance(predicted, list):
        return predicted not in gold and not (predicted == "" and not gold)
    return gold != predicted


# ---- two models -----------------------------------------------------------------------------------------------------


def by_example(one: Predictions | None, other: Predictions | None) -> tuple[float, float, float] | None:
    """Difference of the shares of right answers in points, and its 95 % interval paired by example (normal).

    None unless both predicted the same examples and their answers can be right or wrong.
    """
    first, second = ({} if task is None else _right(task) for task in (one, other))
    if not first or first.keys() != second.keys() or len(first) < 2:
        return None
    gaps = [100 * (first[key] - second[key]) for key in first]
    mean = sum(gaps) / len(gaps)
    half = 1.96 * math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps))
    return mean, mean - half, mean + half


def _right(task: Predictions) -> dict[tuple[str, str], float]:
    """Share of the seeds that got an example right, by its place and its text's hash or id."""
    found: dict[tuple[str, str], list[bool]] = {}
    for lines in task.seeds:
        for place, line in enumerate(lines):
            if isinstance(line.get("prediction"), float) or "gold" not in line:
                return {}
            key = (text_at(line, "index") or str(place), text_at(line, "digest") or text_at(line, "id"))
            found.setdefault(key, []).append(not is_wrong(line))
    return {key: sum(right) / len(right) for key, right in found.items()}


# ---- the confusion matrix -------------------------------------------------------------------------------------------


def confusion(task: Predictions) -> Counter[tuple[str, str]]:
    """How often (gold, prediction) over all seeds; empty unless both are classes."""
    pairs = [(line.get("gold"), line.get("prediction")) for lines in task.seeds for line in lines]
    if not all(isinstance(gold, str) and isinstance(predicted, str) for gold, predicted in pairs):
        return Counter()
    return Counter((str(gold), str(predicted)) for gold, predicted in pairs)


def figures(tasks: Sequence[Predictions]) -> dict[str, Plot]:
    """`confusion0` … of the tasks with few classes."""
    drawn: dict[str, Plot] = {}
    for number, task in enumerate(tasks[:MOST_TASKS]):
        counts = confusion(task)
        labels = _labels(task, counts)
        if not 2 <= len(labels) <= MOST_LABELS:
            continue
        sums = {gold: sum(counts[gold, other] for other in labels) for gold in labels}
        cells = [
            [
                (counts[gold, predicted] / sums[gold] if sums[gold] else None, count(counts[gold, predicted]))
                for predicted in labels
            ]
            for gold in labels
        ]
        right = sum(counts[label, label] for label in labels) / max(1, counts.total())
        alt = f"Confusion matrix of {task.title}: {percent(right)} of {count(counts.total())} predictions are right."
        drawn[f"confusion{number}"] = heatmap(labels, labels, cells, alt)
    return drawn


def _labels(task: Predictions, counts: Counter[tuple[str, str]]) -> list[str]:
    """The task's classes in their order, then those that only the predictions have."""
    seen = sorted({label for pair in counts for label in pair})
    return [label for label in task.labels if label in seen] + [label for label in seen if label not in task.labels]


# ---- tables ---------------------------------------------------------------------------------------------------------


def context(tasks: Sequence[Predictions], drawn: dict[str, Plot]) -> list[Mistakes]:
    """One per task, for the template."""
    shown: list[Mistakes] = []
    for number, task in enumerate(tasks[:MOST_TASKS]):
        name = f"confusion{number}"
        over = f"{len(task.seeds)} seeds" if len(task.seeds) > 1 else "one seed"
        caption = f"Rows are what is right, columns what was predicted, {over} added up; shades are shares of a row."
        mistakes = Mistakes(task.title, name if name in drawn else "", caption, _confusions(task), worst(task))
        if mistakes.figure or mistakes.confusions.rows or mistakes.worst.rows:
            shown.append(mistakes)
    return shown


def _confusions(task: Predictions) -> Table:
    """The commonest wrong answers, where there are too many classes for a picture."""
    counts = confusion(task)
    wrong = [(pair, number) for pair, number in counts.most_common() if pair[0] != pair[1]]
    many = len(_labels(task, counts)) > MOST_LABELS
    rows = [[short(gold, 40), short(other, 40), count(number)] for (gold, other), number in wrong[:MOST_ERRORS] if many]
    return Table(f"{task.title}: what was taken for what", ("Right", "Predicted", "Times"), rows, 2)


def worst(task: Predictions) -> Table:
    """The examples with the highest loss, a mean over seeds, that at least one seed got wrong."""
    lines: dict[str, list[dict[str, Any]]] = {}
    for seed in task.seeds:
        for place, line in enumerate(seed):
            lines.setdefault(text_at(line, "index") or str(place), []).append(line)
    losses = {
        key: sum(known) / len(known)
        for key, own in lines.items()
        if any(map(is_wrong, own)) and (known := [loss for line in own if (loss := at(line, "loss")) is not None])
    }
    hardest = sorted(losses, key=lambda key: -losses[key])[:MOST_ERRORS]
    texts = _texts(task, hardest, len(lines))
    rows = []
    for key in hardest:
        wrong = [line for line in lines[key] if is_wrong(line)]
        given = lines[key][0].get("text")
        text = given if isinstance(given, str) else f"example {text_at(lines[key][0], 'id') or key}"
        answers = (_shown(wrong[0].get("gold")), _shown(wrong[0].get("prediction")))
        text = texts.get(key) or short(clean(text), 240)
        rows.append([*answers, f"{len(wrong)} of {len(lines[key])}", text, significant(losses[key])])
    head = ("Right", "Predicted", "Wrong in", "Text", "Loss")
    return Table(f"{task.title}: worst errors", head, rows, 4, "Highest loss, a mean over seeds." if rows else "")


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return short(", ".join(_shown(item) for item in value[:6]), 80) or NONE
    number = at({"value": value}, "value")
    if number is not None and not isinstance(value, int):
        return fixed(number, 3)
    return NONE if value is None else short(clean(str(value)), 60) or NONE


def _texts(task: Predictions, wanted: Sequence[str], size: int) -> dict[str, str]:
    """Examples as the model read them, by index, if `dev-tokens.jsonl` has a line for each and there is a tokenizer."""
    path = task.folder / "model" / "tokenizer.json"
    try:
        if not wanted or path.stat().st_size > LARGEST_TOKENIZER:
            return {}
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        lines = (task.folder / "dev-tokens.jsonl").read_bytes().splitlines()
        if len(lines) != size:
            return {}
        ids = {key: json.loads(lines[int(key.replace(",", ""))])["input_ids"] for key in wanted}
        special = [token.content for token in tokenizer.get_added_tokens_decoder().values() if token.special]
        marks = {token for token in special if "unk" not in token.lower()}
        return {key: _text(tokenizer, rows, marks) for key, rows in ids.items()}
    except Exception:  # the library raises bare Exception for damaged files; a page without texts is still a page
        return {}


def _text(tokenizer: Any, ids: list[int], marks: set[str]) -> str:
    """The texts between special tokens, joined by a bar."""
    parts: list[list[int]] = [[]]
    for token in ids:
        if tokenizer.id_to_token(token) in marks:
            parts.append([])
        else:
            parts[-1].append(token)
    words = " | ".join(tokenizer.decode(part) for part in parts if part)
    return short(clean(words.replace(" ##", "")), 240)
