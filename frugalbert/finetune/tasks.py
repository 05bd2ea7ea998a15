"""Tasks as rows of one table: names from the YAML in, rows out.

A `Task` says what is predicted, how it is measured and where its examples stand: the official GLUE layout
(arXiv 1804.07461), the hub's copy of it, files of the user's, or the documents of the run's corpus (`python-docs`). An
`Example` is one row of its data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

from frugalbert import config
from frugalbert.finetune import metrics
from frugalbert.finetune.tables import did_you_mean

Label = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where a GLUE task stands: folder and column positions of the official TSV files, names on the hub."""

    folder: str
    columns: tuple[int, int | None, int]
    width: int
    subset: str
    fields: tuple[str, ...]
    header: bool = True


@dataclass(frozen=True)
class Task:
    """One row. `classes` = (as written in the files, name), in class order; empty = taken from the training data."""

    name: str
    title: str
    type: str
    metrics: tuple[str, ...]
    headline: tuple[str, ...]
    classes: tuple[tuple[str, str], ...] = ()
    limits: tuple[float, float] | None = None
    aliases: tuple[str, ...] = ()
    layout: Layout | None = None
    custom: config.Task | None = None
    cut: str = "longest"
    """Which text loses tokens when both are too long: `longest`, `first` or `second`."""
    rides: str = ""
    """The task whose model predicts this one, which has no training set of its own (AX: mnli)."""
    optional: bool = False
    """Asked for by the name of a group: left out with a word where its files are absent."""

    @property
    def metric(self) -> str:
        """What the headline figure is: one metric, or the mean of the leaderboard's."""
        return self.headline[0] if len(self.headline) == 1 else f"({' + '.join(self.headline)}) / {len(self.headline)}"


@dataclass(frozen=True)
class Example:
    """One row of a task, as its file has it; what its type does not use stays empty.

    `label`: a class number, a number to predict, the numbers of the labels that apply, of the right options (any of
    them counts) or of each word's tag; for an extractive question 1 if it has an answer, else 0. None = not known.
    """

    text: str
    """The text or first text; the passage of a multiple choice; the question of an extractive one."""
    text_b: str | None = None
    label: Label | None = None
    id: str = ""
    """The row's key in its file (SuperGLUE's `idx`, SQuAD's `id`, MultiRC: `passage.question.answer`)."""
    group: str = ""
    """Rows with the same one are scored together: a question of MultiRC, a pair of AX-g, a part of RACE."""
    spans: tuple[tuple[int, int, int], ...] = ()
    """Words whose vectors feed the head: (0 in `text` or 1 in `text_b`, first character, behind the last)."""
    options: tuple[str, ...] = ()
    """Second texts, each of which makes an input of its own beside `text`."""
    names: tuple[str, ...] = ()
    """What submissions call the options: letters, entities."""
    answers: tuple[str, ...] = ()
    """Gold answers of extractive questions and cloze queries, as text."""
    starts: tuple[int, ...] = ()
    """Where each of `answers` starts in `text_b`, in characters."""
    words: tuple[str, ...] = ()
    """The words to tag; `text` is then empty."""

    @property
    def digest(self) -> str:
        return digest("\x1e".join((self.text, *self.words)), "\x1e".join((self.text_b or "", *self.options)) or None)


@dataclass(frozen=True)
class Data:
    """A task with its examples: `train`, `dev`, perhaps `dev-mismatched`, `test`, `test-mismatched`, and a set by the
    name of every task in `riders`, which this task's model predicts too. `notes` are sentences worth showing.
    """

    task: Task
    labels: tuple[str, ...]
    sets: dict[str, list[Example]]
    riders: tuple[Task, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def train(self) -> list[Example]:
        return self.sets["train"]

    @property
    def dev(self) -> list[Example]:
        return self.sets["dev"]


def digest(text: str, text_b: str | None = None) -> str:
    """64-bit hash of an example's texts, in hex: its identity in predictions, and what splits are drawn by."""
    joined = text if text_b is None else f"{text}\x1f{text_b}"
    return hashlib.blake2b(joined.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def _glue(title: str, scores: str, classes: str, layout: Layout, aliases: tuple[str, ...] = ()) -> Task:
    """`classes` as `written=name`; a task without classes is a regression from 0 to 5."""
    names = tuple((pair.split("=")[0], pair.split("=")[-1]) for pair in classes.split())
    kind, limits = ("classification", None) if names else ("regression", (0.0, 5.0))
    leaderboard = tuple(scores.split())
    return Task(normal(title), title, kind, leaderboard, leaderboard, names, limits, aliases, layout)


def normal(name: str) -> str:
    """`'STS-B'` -> `'stsb'`: names are compared without case and punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


PAIR, ENTAILMENT = ("sentence1", "sentence2"), "entailment not_entailment"
TABLE = (
    _glue("CoLA", "mcc", "0=unacceptable 1=acceptable",
          Layout("CoLA", (3, None, 1), 4, "cola", ("sentence",), header=False)),
    _glue("SST-2", "accuracy", "0=negative 1=positive",
          Layout("SST-2", (0, None, 1), 2, "sst2", ("sentence",)), ("sst",)),
    _glue("MRPC", "f1 accuracy", "0=not_equivalent 1=equivalent", Layout("MRPC", (3, 4, 0), 5, "mrpc", PAIR)),
    _glue("STS-B", "pearson spearman", "", Layout("STS-B", (7, 8, 9), 10, "stsb", PAIR), ("sts",)),
    _glue("RTE", "accuracy", ENTAILMENT, Layout("RTE", (1, 2, 3), 4, "rte", PAIR)),
    _glue("WNLI", "accuracy", "0=not_entailment 1=entailment", Layout("WNLI", (1, 2, 3), 4, "wnli", PAIR)),
    _glue("QNLI", "accuracy", ENTAILMENT, Layout("QNLI", (1, 2, 3), 4, "qnli", ("question", "sentence"))),
    Task("python-docs", "python-docs", "classification", ("accuracy", "macro_f1", "mcc"), ("accuracy",)),
)  # fmt: skip
GROUPS = {"glue": tuple(task for task in TABLE if task.layout)}
DEFAULT_METRICS = {
    "classification": ("accuracy", "macro_f1", "mcc"),
    "regression": ("pearson", "spearman", "mse"),
    "multilabel": ("micro_f1", "macro_f1", "exact_match"),
}


def resolve(names: Sequence[str | config.Task]) -> list[Task]:
    """The rows that `finetune.tasks` asks for, each once, in order. Raises ValueError for unknown or doubled names."""
    known = {alias: (task,) for task in TABLE for alias in (normal(task.name), *task.aliases)} | GROUPS
    found: dict[str, Task] = {}
    for name in names:
        if isinstance(name, str):
            if normal(name) not in known:
                titles = [*GROUPS, *(task.title for task in TABLE)]
                raise ValueError(
                    f"finetune.tasks: there is no task {name!r}{did_you_mean(name, [*titles, *known])}; "
                    f"there are {', '.join(titles)}, and custom ones (name, train, columns)"
                )
            found |= {task.name: task for task in known[normal(name)]}
            continue
        if name.name in found or normal(name.name) in known:
            raise ValueError(f"finetune.tasks: two tasks are called {name.name!r}; rename the custom one")
        scores = name.metrics or DEFAULT_METRICS[name.type]
        metrics.check(scores, name.type, f"finetune.tasks.{name.name}.metrics")
        found[name.name] = Task(name.name, name.name, name.type, scores, scores[:1], custom=name)
    return list(found.values())
