"""Several models side by side: `board.json` files or runs in; one HTML page with tables, heat-maps and comparisons out.

`DIR/board.json`, or `DIR/finetune/board.json`, as `frugalbert eval` and the stage write it:

    {"model": name, "parameters": count or null, "settings": {key: value, …},
     "rows": [rows of finetune/results.json: task, title, metric, init, seeds, values, mean, std, interval (over seeds),
              bootstrap (over examples, optional), majority_baseline, dev_examples, selection, trials],
     "blimp": {init: what finetune/blimp.py returns} or that of the pre-trained model alone, or null,
     "scores": [{"init", "board", "value" or null, "mean", "sentence"}, …]}

A run without the file is read from `finetune/results.json`, `finetune/blimp.json` and `pretrain/summary.json`.
Predictions (`TASK/INIT-seedN/predictions.jsonl`, there or below `finetune/`) allow comparisons example by example.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frugalbert.report import errors
from frugalbert.report.collect import Collected, read_mapping, read_rows
from frugalbert.report.heat import heatmap
from frugalbert.report.svg import Plot, finish
from frugalbert.report.tables import Table
from frugalbert.report.verdicts import LOWER_IS_BETTER, Score, Verdict, interval_of, paired, scores
from frugalbert.report.wording import NONE, at, big, clean, count, fixed, get, items_at, list_at, plain, short, text_at

MOST_MODELS, MOST_TASKS = 8, 60
CHANCE = 0.5  # accuracy of a coin on BLiMP's pairs
INITS = {"pretrained": "pre-trained", "random": "random weights"}


@dataclass(frozen=True)
class Column:
    """One model from one initialisation: scores by task, BLiMP's figures, each task's predictions by seed."""

    name: str
    tasks: dict[str, Score]
    blimp: dict[str, Any]
    board: Board
    init: str


@dataclass
class Board:
    """One directory."""

    name: str
    folder: Path
    parameters: float | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    blimp: dict[str, Any] = field(default_factory=dict)
    scores: list[dict[str, Any]] = field(default_factory=list)
    predictions: dict[str, errors.Predictions] = field(default_factory=dict)


def is_board(path: Path) -> bool:
    return (path / "board.json").is_file()


def read(path: Path, found: Collected) -> Board:
    """Never raises for what the files contain; only if `path` is no directory or has no results (ValueError)."""
    if not path.is_dir():
        raise ValueError(f"{path} is no directory; name directories that `frugalbert eval` or `frugalbert run` wrote")
    stage = path / "finetune" if (path / "finetune").is_dir() else path
    told = read_mapping((path if is_board(path) else stage) / "board.json", found)
    summary = read_mapping(path / "pretrain" / "summary.json", found)
    board = Board(text_at(told, "model") or clean(path.resolve().name), path)
    board.name = short(board.name, 40)
    board.parameters = at(told, "parameters") or at(summary, "parameters")
    board.settings = dict(items_at(told, "settings"))
    listed = [row for row in list_at(told, "rows") if isinstance(row, dict)]
    board.rows = listed or read_rows(stage / "results.json", found)
    blimp = get(told, "blimp") or read_mapping(stage / "blimp.json", found)
    if isinstance(blimp, dict):
        board.blimp = {"pretrained": blimp} if at(blimp, "accuracy") is not None else blimp
    board.scores = [row for row in list_at(told, "scores") if isinstance(row, dict)]
    if not board.rows and not board.blimp:
        raise ValueError(f"{path} has no results yet; name a directory with board.json or finetune/results.json")
    board.predictions = {task.folder.name: task for task in errors.read(stage, board.rows, found)}
    return board


def columns(boards: Sequence[Board]) -> list[Column]:
    """Models from every initialisation there is, pre-trained ones first; equal names are numbered."""
    found: list[Column] = []
    names = [board.name for board in boards]
    for number, board in enumerate(boards):
        name = board.name if names.count(board.name) == 1 else f"{board.name} ({number + 1})"
        known = scores(board.rows)
        inits = list(dict.fromkeys([*(score.init for score in known), *board.blimp]))
        for init in inits:
            own = [score for score in reversed(known) if score.init == init and _key(score) != "blimp"]
            tasks = {_key(score): score for score in reversed(own)}
            what = "" if init == "pretrained" else INITS.get(init, init)
            blimp = get(board.blimp, init)
            label = f"{name}, {what}" if what else name
            found.append(Column(label, tasks, blimp if isinstance(blimp, dict) else {}, board, init))
    return sorted(found, key=lambda column: column.init == "random")[:MOST_MODELS]


def _key(score: Score) -> str:
    return text_at(score.row, "task") or score.task


def tasks_of(shown: Sequence[Column]) -> list[str]:
    """In the order in which they come."""
    return list(dict.fromkeys(itertools.chain.from_iterable(column.tasks for column in shown)))[:MOST_TASKS]


# ---- tables ---------------------------------------------------------------------------------------------------------


def results(shown: Sequence[Column]) -> Table:
    """Tasks by models: mean ± deviation over seeds, and the interval over seeds or examples."""
    rows: list[list[str]] = []
    for task in tasks_of(shown):
        known = [column.tasks[task] for column in shown if task in column.tasks]
        cells = [_cell(column.tasks.get(task)) for column in shown]
        rows.append([known[0].task, known[0].metric, count(known[0].row.get("dev_examples")),
                     known[0].show(known[0].majority), *cells])  # fmt: skip
    note = (
        "Mean ± standard deviation over seeds, in points (100 × metric) where the metric is bounded. In brackets the "
        "95\u00a0% interval: e over resampled dev examples, s over seeds (Student’s t)."
    )
    head = ("Task", "Metric", "Dev examples", "Majority", *(column.name for column in shown))
    return Table("Results", head, rows, 2, note)


def _cell(score: Score | None) -> str:
    if score is None:
        return NONE
    text = score.show(score.mean) + (f" ± {score.show(score.std, 2)}" if score.std is not None else "")
    over_examples = interval_of({"interval": get(score.row, "bootstrap")}, 100.0 if score.points else 1.0)
    ends, sort = (over_examples, "e") if over_examples else (score.interval, "s")
    return text if ends is None else f"{text} [{score.show(ends[0])}, {score.show(ends[1])}] {sort}"


def overall(boards: Sequence[Board]) -> Table:
    """Board scores with their definitions: they must not be mixed."""
    rows = []
    for board, row in [(one, row) for one in boards for row in one.scores]:
        init = text_at(row, "init")
        words = [
            board.name,
            text_at(row, "board") or "unnamed",
            INITS.get(init, init) or NONE,
            text_at(row, "sentence"),
        ]
        rows.append([*words, fixed(_points(at(row, "value"))), fixed(_points(at(row, "mean")))])
    head = ("Model", "Board", "Start", "What it is", "Score", "Mean of what is there")
    return Table("Board scores", head, rows[:MOST_TASKS], 4)


def _points(value: float | None) -> float | None:
    """Scores within [-1, 1] as points."""
    return 100 * value if value is not None and abs(value) <= 1 else value


def blimp_terms(shown: Sequence[Column]) -> list[str]:
    return list(dict.fromkeys(term for column in shown for term, _ in items_at(column.blimp, "terms")))[:MOST_TASKS]


def blimp(shown: Sequence[Column]) -> Table:
    """Accuracy overall and per linguistic term."""
    able = [column for column in shown if at(column.blimp, "accuracy") is not None]
    rows = [["overall", *(_accuracy(column.blimp) for column in able)]]
    rows += [[term.replace("_", " "), *(_accuracy(get(column.blimp, "terms", term)) for column in able)]
             for term in blimp_terms(able)]  # fmt: skip
    how = "; ".join(
        dict.fromkeys(f"{text_at(c.blimp, 'method') or 'unnamed'}: {text_at(c.blimp, 'what')}" for c in able)
    )
    note = (
        f"Percent of minimal pairs whose acceptable sentence scores higher, mean over paradigms; 50 is chance. {how}."
    )
    return Table("BLiMP by linguistic term", ("Term", *(column.name for column in able)), rows if able else [], 1, note)


def _accuracy(entry: Any) -> str:
    accuracy, ends = at(entry, "accuracy"), interval_of(entry, 100.0)
    if accuracy is None:
        return NONE
    return fixed(100 * accuracy) + (f" [{fixed(ends[0])}, {fixed(ends[1])}]" if ends else "")


# ---- heat-maps ------------------------------------------------------------------------------------------------------


def maps(shown: Sequence[Column]) -> dict[str, Plot]:
    """`scores` and `blimp`: how far from the majority class, or from a coin, to perfect."""
    drawn: dict[str, Plot] = {}
    wanted = [task for task in tasks_of(shown) if any(c.tasks[task].points for c in shown if task in c.tasks)]
    names = [next(column.tasks[task].task for column in shown if task in column.tasks) for task in wanted]
    cells = [[_shade(column.tasks.get(task)) for column in shown] for task in wanted]
    if wanted:
        what = "; ".join(
            f"{name}: {', '.join(text for _, text in row)}" for name, row in zip(names, cells, strict=True)
        )
        heads = [column.name for column in shown]
        drawn["scores"] = heatmap(names, heads, cells, f"Heat-map of scores in points. {what}."[:2000])
    able = [column for column in shown if at(column.blimp, "accuracy") is not None]
    if able and (terms := blimp_terms(able)):
        rows = [[get(column.blimp, "terms", term) for column in able] for term in terms]
        grid = [[_coin(at(entry, "accuracy")) for entry in row] for row in rows]
        labels = [term.replace("_", " ") for term in terms]
        alt = "Heat-map of BLiMP accuracies by linguistic term; the table has the same figures."
        drawn["blimp"] = heatmap(labels, [column.name for column in able], grid, alt)
    return drawn


def _shade(score: Score | None) -> tuple[float | None, str]:
    if score is None or not score.points:
        return None, NONE
    base = min(score.majority or 0.0, 99.0)
    return (score.mean - base) / (100.0 - base), fixed(score.mean)


def _coin(accuracy: float | None) -> tuple[float | None, str]:
    return (None, NONE) if accuracy is None else ((accuracy - CHANCE) / (1 - CHANCE), fixed(100 * accuracy))


# ---- comparisons ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference:
    """One task, a model less another: means over seeds in points, paired intervals over seeds and over examples."""

    task: str
    score: Score
    gap: float
    over_seeds: tuple[float, float] | None
    over_examples: tuple[float, float, float] | None


def differences(one: Column, other: Column) -> list[Difference]:
    """On the tasks that both have; positive means that `one` is better."""
    found: list[Difference] = []
    for task, score in one.tasks.items():
        base = other.tasks.get(task)
        if base is None or base.metric != score.metric:
            continue
        sign = -1.0 if score.metric in LOWER_IS_BETTER else 1.0
        same = list_at(score.row, "seeds") == list_at(base.row, "seeds") and len(score.values) == len(base.values)
        gaps = [sign * (a - b) for a, b in zip(score.values, base.values, strict=True)] if same else []
        examples = None
        if one.init != "random" and other.init != "random":
            examples = errors.by_example(one.board.predictions.get(task), other.board.predictions.get(task))
        found.append(Difference(score.task, score, sign * (score.mean - base.mean), paired(gaps), examples))
    return found


def compared(one: Column, other: Column) -> Table:
    rows = []
    for item in differences(one, other):
        seeds = NONE if item.over_seeds is None else " to ".join(_signed(item.score, end) for end in item.over_seeds)
        examples = NONE
        if item.over_examples:
            gap, low, high = item.over_examples
            examples = f"{_plus(gap)} [{_plus(low)}, {_plus(high)}]"
        rows.append([item.task, item.score.metric, _signed(item.score, item.gap), seeds, examples])
    head = ("Task", "Metric", "Difference", "95\u00a0% over seeds", "Right answers, 95\u00a0% over examples")
    note = "Paired by seed (Student’s t), and example by example where predictions of both are there."
    return Table(f"{one.name} less {other.name}", head, rows, 2, note)


def _signed(score: Score, value: float) -> str:
    return ("+" if value > 0 else "") + score.show(value)


def _plus(value: float) -> str:
    return ("+" if value > 0 else "") + fixed(value)


def findings(shown: Sequence[Column]) -> list[Verdict]:
    """Each model against the first one, over all tasks; nothing is called better that an interval does not show."""
    found: list[Verdict] = []
    number = 0
    for other in shown[1:]:
        items = differences(shown[0], other)
        decided = [ends for item in items if (ends := _decisive(item))]
        number += len(decided)
        better, worse = sum(ends[0] > 0 for ends in decided), sum(ends[1] < 0 for ends in decided)
        if items:
            text = (
                f"{shown[0].name} beside {other.name}, {len(items)} tasks: shown better on {better}, worse on {worse}"
            )
            gaps = [item.gap for item in items if item.score.points]
            found.append(_over("tasks", gaps, f"{text}, undecided on {len(items) - better - worse}"))
        pairs = (items_at(column.blimp, "paradigms") for column in (shown[0], other))
        one, two = ({name: at(entry, "accuracy") for name, entry in part} for part in pairs)
        if one and one.keys() == two.keys() and get(shown[0].blimp, "method") == get(other.blimp, "method"):
            accuracies = zip(one.values(), map(two.get, one), strict=True)
            gaps = [100 * (a - b) for a, b in accuracies if a is not None and b is not None]
            found.append(_over("paradigms", gaps, f"{shown[0].name} beside {other.name} on BLiMP"))
    if number > 1:
        text = (
            f"{number} comparisons at 95\u00a0% stand here: about {0.05 * number:.2g} would show a difference by chance"
        )
        found.append(Verdict("note", f"{text} alone."))
    return found + [Verdict("note", line) for line in caveats(shown)]


def _decisive(item: Difference) -> tuple[float, float] | None:
    """The interval that decides: over examples where accuracy is the metric, else over seeds."""
    return item.over_examples[1:] if item.over_examples and item.score.metric == "accuracy" else item.over_seeds


def _over(what: str, gaps: Sequence[float], text: str) -> Verdict:
    """The mean of paired differences with its interval, as a sentence."""
    spread = paired(gaps)
    if gaps:
        text += f"; mean difference {_plus(sum(gaps) / len(gaps))} points"
    if spread:
        text += f" (95\u00a0% interval over {what} {_plus(spread[0])} to {_plus(spread[1])})"
    return Verdict("good" if spread and spread[0] > 0 else "bad" if spread and spread[1] < 0 else "note", f"{text}.")


def caveats(shown: Sequence[Column]) -> list[str]:
    """What makes a comparison unfair: other settings, another way of choosing, few dev examples."""
    lines = []
    keys = sorted({key for column in shown for key in column.board.settings} - {"tasks"})
    for key in keys:
        values = {column.board.name: plain(column.board.settings.get(key)) for column in shown}
        if len(set(values.values())) > 1:
            told = "; ".join(f"{name} {value}" for name, value in values.items())
            lines.append(f"The setting {short(key, 40)} differs: {told}.")
    chosen = {text_at(score.row, "selection") for column in shown for score in column.tasks.values()} - {""}
    if len(chosen) > 1 or any("kind" in text for text in chosen):
        lines.append(f"How settings were chosen: {'; '.join(sorted(chosen))}.")
    tried = [at(score.row, "trials") or 0 for column in shown for score in column.tasks.values()]
    if tried and max(tried) > 2 * max(1, min(tried)):
        lines.append(
            f"Trials per task range from {count(min(tried))} to {count(max(tried))}: more tries find better ones."
        )
    small = [
        f"{score.task} ({count(size)})"
        for score in {key: score for column in shown for key, score in column.tasks.items()}.values()
        if (size := at(score.row, "dev_examples")) is not None and size < 300
    ]
    return [*lines[:8], *([f"Too few dev examples to rank small differences: {', '.join(small)}."] if small else [])]


# ---- the page -------------------------------------------------------------------------------------------------------


def render(paths: Sequence[Path], title: str | None = None) -> str:
    """The page about the models in `paths`. Raises ValueError for a directory without results."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    found = Collected("boards", "boards")
    boards = [read(Path(path), found) for path in paths]
    shown = columns(boards)
    drawn = maps(shown)
    finished, rules = finish(list(drawn.values()))
    environment = Environment(
        loader=PackageLoader("frugalbert.report", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = environment.get_template("page.css").render().strip() + "\n" + rules
    rows = [[board.name, clean(board.folder.resolve().name), big(board.parameters)] for board in boards]
    return environment.get_template("boards.html.j2").render(
        title=clean(title) if title else short(" · ".join(board.name for board in boards), 100),
        figures=dict(zip(drawn, finished, strict=True)),
        style=style,
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        models=Table("Models", ("Model", "Directory", "Parameters"), rows, 2),
        verdicts=findings(shown),
        problems=found.problems[:20],
        results=results(shown),
        overall=overall(boards),
        blimp=blimp(shown),
        comparisons=[compared(shown[0], other) for other in shown[1:]] if shown else [],
    )
