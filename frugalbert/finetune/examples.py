"""A task in; its examples with class numbers out.

Sources: the official files or the hub's copy of them, files of the user's (`custom.py`), or the corpus
(`python_docs.py`). Labels are mapped by name, never by position; class order is Hugging Face's for official tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from frugalbert import config, run
from frugalbert.finetune import glue, race, squad, superglue
from frugalbert.finetune.custom import from_files
from frugalbert.finetune.sources import Absent, collect, locate
from frugalbert.finetune.tasks import Data, Example, Label, Task, resolve


def load_all(section: config.Finetune, folder: Path, corpus: Path | None) -> list[Data]:
    """Every task of `finetune.tasks` that is trained on; minimal pairs, which are only scored, are not among them.

    Members of a group whose files are absent are left out, with a sentence that says which and why.
    Raises as `load` does, and ValueError if no task is left.
    """
    tasks = resolve(section.tasks)
    found: list[Data] = []
    reasons: list[str] = []
    for task in tasks:
        if task.rides or task.type == "minimal-pairs":
            continue
        riders = [rider for rider in tasks if rider.rides == task.name]
        try:
            found.append(load(task, section, folder, corpus, riders))
        except Absent as error:
            if not all(row.optional for row in (task, *riders)):
                raise
            reasons.append(f"{' and '.join(row.title for row in (task, *riders))} left out: {error}")
            run.say(reasons[-1])
    if reasons and not found and not any(task.type == "minimal-pairs" for task in tasks):
        raise ValueError(f"finetune.tasks: no task is left; {reasons[0]}")
    return found


def load(task: Task, section: config.Finetune, folder: Path, corpus: Path | None, riders: Sequence[Task] = ()) -> Data:
    """Examples of one task.

    Args:
        folder: the YAML's. corpus: the corpus stage's directory.
        riders: tasks without a training set that this one's model predicts; each is a set by its name.
    Raises Absent if the files of an official task are not there, ValueError or OSError with one sentence for files that
    are damaged, another task's, or without anything to learn.
    """
    assert task.type != "minimal-pairs", "these are scored by pseudo-log-likelihood, not loaded"
    if task.custom:
        data = from_files(task, task.custom, folder, section.predict_test)
    elif task.layout:
        data = _official(task, section, folder, riders)
    else:
        from frugalbert.finetune.python_docs import examples

        if corpus is None:
            raise ValueError(
                "finetune.tasks: python-docs is made from the run's corpus; add corpus: {sources: [python-docs]}"
            )
        labels, train, dev = examples(corpus, section.max_train_examples)
        data = Data(task, labels, {"train": train, "dev": dev})
    _check(data, section.train)
    if task.layout or task.custom:
        own = section.per_task.get(task.name)
        most = (own and own.max_train_examples) or section.max_train_examples
        data = replace(data, sets={**data.sets, "train": limit(data.train, most)})
    return data


# ---- official files -------------------------------------------------------------------------------------------------


def _official(task: Task, section: config.Finetune, folder: Path, riders: Sequence[Task]) -> Data:
    data = folder / section.data if section.data else None
    source = locate(task, data, patterns(task))
    splits = ["train", "dev", *(["dev-mismatched"] if task.name == "mnli" else [])]
    if section.predict_test and task.type != "question-answering":  # SQuAD's test set was never published
        splits += ["test", *(["test-mismatched"] if task.name == "mnli" else [])]
    notes: list[str] = []
    sets: dict[str, list[Example]] = {}
    for split in splits:
        try:
            sets[split] = collect(_read(task, source, split, section.negatives, notes), split, task, notes)
        except Absent:
            if split != "train" or section.train:
                raise
            sets[split] = []
    present = []
    for rider in riders:
        try:
            pairs = _read(rider, locate(rider, data, patterns(rider)), "test", None, notes)
            sets[rider.name] = collect(pairs, rider.name, rider, notes)
            present.append(rider)
        except Absent as error:
            if not rider.optional:
                raise
            notes.append(f"{rider.title} left out: {error}")
    named = task.type == "classification"
    names = tuple(name for _, name in task.classes) if named else ()
    return Data(task, names, sets, tuple(present), tuple(notes))


def patterns(task: Task) -> Sequence[str]:
    """What the official files of a task are called."""
    assert task.layout is not None
    if task.layout.family in ("glue", "squad"):
        return glue.patterns(task) if task.layout.family == "glue" else squad.patterns(task)
    return {"superglue": superglue.PATTERNS, "race": race.PATTERNS}[task.layout.family]


def _read(
    task: Task, source: Path | str, split: str, negatives: int | None, notes: list[str]
) -> Iterator[tuple[str, Example]]:
    assert task.layout is not None
    if task.layout.family == "glue":
        return glue.read(task, source, split, notes)
    if task.layout.family == "superglue":
        return superglue.read(task, source, split, negatives, notes)
    if task.layout.family == "squad":
        return squad.read(task, source, split, notes)
    return race.read(task, source, split)


# ---- common ---------------------------------------------------------------------------------------------------------


def limit(examples: list[Example], most: int | None) -> list[Example]:
    """At most `most` examples, the same ones for every seed: chosen by hash, every class kept if there is room."""
    if most is None or len(examples) <= most:
        return examples
    order = sorted(range(len(examples)), key=lambda number: (examples[number].digest, number))
    firsts: dict[Label, int] = {}
    for number in order:
        label = examples[number].label
        if isinstance(label, int):
            firsts.setdefault(label, number)
    chosen = list(dict.fromkeys([*firsts.values(), *order]))[:most]
    return [examples[number] for number in sorted(chosen)]


def _check(data: Data, train: bool) -> None:
    """Raises ValueError for data from which nothing can be learned or measured."""
    name = data.task.title
    if (train and not data.train) or not data.dev:
        empty = "dev" if data.train else "training"
        raise ValueError(
            f"task {name} has no {empty} examples ({len(data.train)} train, {len(data.dev)} dev); give more data, a "
            "dev file, or another dev_share"
        )
    if data.task.type == "token-classification" and len(data.labels) < 2:
        raise ValueError(f"task {name}: all words have the tag {''.join(data.labels)!r}; it needs two or more")
    counts = Counter(example.label for example in data.train)
    if train and len(counts) == 1 and data.task.type in ("classification", "regression", "multilabel"):
        label = next(iter(counts))
        shown = data.labels[label] if isinstance(label, int) else label
        raise ValueError(
            f"task {name}: all {len(data.train)} training examples have the label {shown!r}; it needs two or more"
        )
    if data.task.type == "classification" and len(data.labels) > 2 and "f1" in data.task.metrics:
        raise ValueError(
            f"task {name}: f1 is for two classes and there are {len(data.labels)}; write macro_f1 in metrics"
        )
