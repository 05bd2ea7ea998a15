"""Tasks as rows of one table: names from the YAML in, rows out.

A `Task` says what is predicted, how it is measured and where its examples stand: the official files or the hub's copy
of GLUE (arXiv 1804.07461), SuperGLUE (1905.00537), SQuAD (1606.05250, 1806.03822), RACE (1704.04683) and BLiMP
(1912.00582), files of the user's, or the documents of the run's corpus (`python-docs`). An `Example` is one row of its
data.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from frugalbert import config
from frugalbert.finetune import metrics
from frugalbert.finetune.tables import did_you_mean

Label = int | float | tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where an official task stands: whose format its files have, their folder, and its names on the hub."""

    family: str
    """`glue`, `superglue`, `squad`, `race` or `blimp`: which module reads them."""
    folder: str
    hub: str
    subset: str


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
    """The task whose model predicts this one, which has no training set of its own (AX: mnli, AX-b: superglue-rte)."""
    optional: bool = False
    """Asked for by the name of a group: left out with a word where its files are absent."""

    @property
    def metric(self) -> str:
        """What the headline figure is: one metric, or the mean of the leaderboard's."""
        return self.headline[0] if len(self.headline) == 1 else f"({' + '.join(self.headline)}) / {len(self.headline)}"


@dataclass(frozen=True, slots=True)
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
    """Where each of `answers` starts in `text_b`, in characters; -1 = it does not stand there (never in training)."""
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


def normal(name: str) -> str:
    """`'STS-B'` -> `'stsb'`: names are compared without case and punctuation."""
    return "".join(letter for letter in name.lower() if letter.isalnum())


HUBS = {"glue": "nyu-mll/glue", "superglue": "aps/super_glue", "race": "ehovy/race", "blimp": "nyu-mll/blimp"}


def _row(title: str, subset: str, scores: str, classes: str = "", aliases: str = "") -> Task:
    """A classification, as most are.

    Args:
        subset: family and name on the hub, `glue/cola`; the folder is called as the title says.
        classes: `written=name`, in order; one word where both are the same.
    """
    family, subset = subset.split("/")
    layout, leaderboard = Layout(family, title, HUBS[family], subset), tuple(scores.split())
    names = tuple((pair.split("=")[0], pair.split("=")[-1]) for pair in classes.split())
    return Task(
        normal(title), title, "classification", leaderboard, leaderboard, names, None, tuple(aliases.split()), layout
    )


def _squad(version: str, hub: str, subset: str, aliases: str) -> Task:
    layout = Layout("squad", "squad", hub, subset)
    return Task(
        f"squad{version[0]}", f"SQuAD {version}", "question-answering", ("squad_f1", "squad_em"), ("squad_f1",),
        aliases=tuple(aliases.split()), layout=layout,
    )  # fmt: skip


def _race(name: str, title: str, subset: str) -> Task:
    layout, parts = Layout("race", "RACE", HUBS["race"], subset), ("accuracy_middle", "accuracy_high")
    scores = ("accuracy", *(parts if subset == "all" else ()))
    return Task(name, title, "multiple-choice", scores, ("accuracy",), layout=layout, cut="first")


ENTAILMENT, YES_NO = "entailment not_entailment", "false true"
GLUE = (
    _row("CoLA", "glue/cola", "mcc", "0=unacceptable 1=acceptable"),
    _row("SST-2", "glue/sst2", "accuracy", "0=negative 1=positive", "sst"),
    _row("MRPC", "glue/mrpc", "f1 accuracy", "0=not_equivalent 1=equivalent"),
    replace(_row("STS-B", "glue/stsb", "pearson spearman", "", "sts"), type="regression", limits=(0.0, 5.0)),
    _row("QQP", "glue/qqp", "f1 accuracy", "0=not_duplicate 1=duplicate"),
    _row("MNLI", "glue/mnli", "accuracy", "entailment neutral contradiction", "mnlim mnlimm"),
    _row("QNLI", "glue/qnli", "accuracy", ENTAILMENT),
    _row("RTE", "glue/rte", "accuracy", ENTAILMENT),
    _row("WNLI", "glue/wnli", "accuracy", "0=not_entailment 1=entailment"),
    replace(_row("AX", "glue/ax", "mcc", "entailment neutral contradiction", "diagnostic"), rides="mnli"),
)
_WSC = _row("WSC", "superglue/wsc", "accuracy", YES_NO)
SUPERGLUE = (
    replace(_row("BoolQ", "superglue/boolq", "accuracy", YES_NO), cut="second"),
    _row("CB", "superglue/cb", "macro_f1 accuracy", "entailment contradiction neutral"),
    replace(_row("COPA", "superglue/copa", "accuracy", "0=choice1 1=choice2"), type="multiple-choice"),
    replace(_row("MultiRC", "superglue/multirc", "f1a em", "0=false 1=true"), cut="first"),
    replace(_row("ReCoRD", "superglue/record", "record_f1 record_em"), type="multiple-choice", cut="first"),
    replace(_row("RTE", "superglue/rte", "accuracy", ENTAILMENT), name="superglue-rte", title="RTE (SuperGLUE)"),
    _row("WiC", "superglue/wic", "accuracy", YES_NO),
    _WSC,
    replace(_row("AX-b", "superglue/axb", "mcc", ENTAILMENT), rides="superglue-rte"),
    replace(_row("AX-g", "superglue/axg", "gender_parity accuracy", ENTAILMENT), rides="superglue-rte"),
)
TABLE = (
    *GLUE,
    *SUPERGLUE,
    replace(_WSC, name="wsc-text", title="WSC (text)"),
    _squad("1.1", "rajpurkar/squad", "plain_text", "squad squad11 squadv1 squadv11"),
    _squad("2.0", "rajpurkar/squad_v2", "squad_v2", "squadv2 squadv20"),
    _race("race", "RACE", "all"),
    _race("race-middle", "RACE-M", "middle"),
    _race("race-high", "RACE-H", "high"),
    Task("blimp", "BLiMP", "minimal-pairs", ("accuracy",), ("accuracy",),
         layout=Layout("blimp", "blimp", HUBS["blimp"], "")),
    Task("python-docs", "python-docs", "classification", ("accuracy", "macro_f1", "mcc"), ("accuracy",)),
)  # fmt: skip
GROUPS = {
    name: tuple(replace(task, optional=True) for task in rows)
    for name, rows in (("glue", GLUE), ("superglue", SUPERGLUE))
}
DEFAULT_METRICS = {
    "classification": ("accuracy", "macro_f1", "mcc"),
    "regression": ("pearson", "spearman", "mse"),
    "multilabel": ("micro_f1", "macro_f1", "exact_match"),
    "multiple-choice": ("accuracy",),
    "question-answering": ("squad_f1", "squad_em"),
    "token-classification": ("span_f1",),
}


def spellings(task: Task) -> set[str]:
    """All that a row answers to, as `normal` has it: `sst2`, `sst`, `gluesst2` (the hub's `glue/sst2`)."""
    layout, found = task.layout, {normal(task.name), normal(task.title), *task.aliases}
    if layout:
        found |= {normal(f"{family}{layout.subset}") for family in (layout.family, layout.hub.split("/")[-1])}
    return found


def resolve(names: Sequence[str | config.Task]) -> list[Task]:
    """The rows that `finetune.tasks` asks for, each once, in order; members of a group are `optional`.

    Raises ValueError for unknown or doubled names, and for a row that another one's model predicts without that other.
    """
    known = {alias: (task,) for task in reversed(TABLE) for alias in spellings(task)} | GROUPS
    found: dict[str, Task] = {}
    for name in names:
        if isinstance(name, str):
            if normal(name) not in known:
                titles = [*GROUPS, *(task.title for task in TABLE)]
                raise ValueError(
                    f"finetune.tasks: there is no task {name!r}{did_you_mean(name, [*titles, *known])}; "
                    f"there are {', '.join(titles)}, and custom ones (name, train, columns)"
                )
            for task in known[normal(name)]:
                if task.name not in found or not task.optional:
                    found[task.name] = task
            continue
        if name.name in found or normal(name.name) in known:
            raise ValueError(f"finetune.tasks: two tasks are called {name.name!r}; rename the custom one")
        if name.metrics:
            metrics.check(name.metrics, name.type, f"finetune.tasks.{name.name}.metrics")
        scores = name.metrics or DEFAULT_METRICS[name.type]
        found[name.name] = Task(name.name, name.name, name.type, scores, scores[:1], custom=name)
    for task in found.values():
        if task.rides and task.rides not in found:
            raise ValueError(
                f"finetune.tasks: {task.title} has no training set, the model of {task.rides} predicts it; add "
                f"{task.rides} to the tasks"
            )
    return list(found.values())
