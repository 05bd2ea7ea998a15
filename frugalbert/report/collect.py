"""Read what a run directory holds, however little or damaged.

In: the run directory (stage records, indices, metrics, results, tables; see docs/tour.md). Out: `Collected`, in which
every text is already clean (`wording.clean`), everything absent is empty, and every damage is a sentence in `problems`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from frugalbert.report.wording import clean, cleaned, figure
from frugalbert.run import PART, RECORD

SELECTION = ("space", "supernet", "latency", "search")
POSITIONS = {"attention": "masks", "importance": "importance"}  # stage -> its file of figures and of pictures
STAGES = ("corpus", "tokenizer", "shards", *SELECTION, *POSITIONS, "pretrain", "finetune", "export", "bench")
MOST_RECORDS = 20_000
MOST_EXAMPLES = 8
LARGEST_TOKENIZER = LARGEST_ARRAY = 50_000_000
JOURNAL_CHECK = re.compile(rb"[0-9a-f]{8} (?=\{)")
SAMPLE = "Returns the number of tokens in a batch, or raises ValueError if the input is empty."


@dataclass
class Training:
    """Records, events and summary of a training."""

    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)


@dataclass
class Selection:
    """How the architecture was found. `candidates`: those of a search that is not finished have scores alone."""

    space: dict[str, Any] = field(default_factory=dict)
    supernet: Training = field(default_factory=Training)
    predictor: dict[str, Any] = field(default_factory=dict)
    candidates: list[dict[str, Any]] = field(default_factory=list)
    front: list[dict[str, Any]] = field(default_factory=list)
    search: dict[str, Any] = field(default_factory=dict)


@dataclass
class Positions:
    """What a stage says of attention positions. `arrays`: (G, s, s) pictures and (G, n) curves by name, NaN = unknown;
    `study`: with and without the diagonal."""

    facts: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, Any] = field(default_factory=dict)
    training: Training = field(default_factory=Training)
    study: dict[str, Any] = field(default_factory=dict)


@dataclass
class Collected:
    """Everything the page shows. `wanted` are the stages the configuration asks for, in order."""

    name: str
    folder: str
    config: str = ""
    wanted: tuple[str, ...] = ()
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()
    corpus: dict[str, Any] = field(default_factory=dict)
    dropped: list[dict[str, Any]] = field(default_factory=list)
    vocabulary: int | None = None
    pieces: list[str] = field(default_factory=list)
    shards: dict[str, Any] = field(default_factory=dict)
    selection: Selection = field(default_factory=Selection)
    attention: Positions = field(default_factory=Positions)
    importance: Positions = field(default_factory=Positions)
    train: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    sizing: dict[str, Any] = field(default_factory=dict)
    results: list[dict[str, Any]] = field(default_factory=list)
    trials: int = 0
    export: dict[str, Any] = field(default_factory=dict)
    latency: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def collect(run: Path) -> Collected:
    """Never raises for what the files contain; only if `run` is no directory (ValueError)."""
    if not run.is_dir():
        raise ValueError(f"{run} is no run directory; name the directory that `frugalbert run` printed")
    folder = clean(run.resolve().name)
    found = Collected(folder, folder)
    _read_config(run, found)
    _read_stages(run, found)
    found.corpus = read_mapping(run / "corpus" / "index.json", found)
    found.dropped = list(itertools.islice(read_lines(run / "corpus" / "dropped.jsonl", found), MOST_EXAMPLES))
    _read_tokenizer(run / "tokenizer", found)
    found.shards = read_mapping(run / "shards" / "index.json", found)
    _read_selection(run, found)
    for stage, into in (("attention", found.attention), ("importance", found.importance)):
        _read_positions(run / stage, POSITIONS[stage], into, found)
    _read_metrics(run / "pretrain" / "metrics.jsonl", found, found)
    found.summary = read_mapping(run / "pretrain" / "summary.json", found)
    found.sizing = read_mapping(run / "pretrain" / "sizing.json", found)
    found.results = read_rows(run / "finetune" / "results.json", found)
    found.trials = sum(1 for _ in run.glob("finetune/*/*/result.json"))
    found.export = read_mapping(run / "export" / "export.json", found)
    found.latency = list(read_lines(run / "bench" / "latency.jsonl", found))
    return found


# ---- parts ----------------------------------------------------------------------------------------------------------


def _read_config(run: Path, found: Collected) -> None:
    """The configuration is shown as it stands; nothing is interpreted but its sections and its name."""
    with contextlib.suppress(OSError):
        text = (run / "run.yaml").read_bytes()[:1_000_000].decode("utf-8", errors="replace")
        lines = [line for line in text.splitlines() if not line.startswith(("# folder:", "# from here:"))]
        found.config = clean("\n".join(lines))
        sections = {match[1] for match in re.finditer(r"^([a-z_]+):", found.config, re.MULTILINE)}
        found.wanted = tuple(stage for stage in STAGES if stage in sections)
        if name := re.search(r"^name:[ \t]*(\S.*)$", found.config, re.MULTILINE):
            found.name = name[1].strip().strip("'\"") or found.folder


def _read_stages(run: Path, found: Collected) -> None:
    names = [*STAGES, *sorted(path.parent.name for path in run.glob(f"*/{RECORD}"))]
    unfinished: list[str] = []
    for name in dict.fromkeys(names):
        if name == "report" or ".old-" in name or name.startswith("."):
            continue
        if record := read_mapping(run / name / RECORD, found):
            found.stages[clean(name)] = record
        elif (run / name / PART).exists() or any(run.glob(f"{name}/*")):
            unfinished.append(clean(name))
    found.unfinished = tuple(unfinished)


def _read_tokenizer(folder: Path, found: Collected) -> None:
    path = folder / "tokenizer.json"
    try:
        if not path.is_file() or path.stat().st_size > LARGEST_TOKENIZER:
            return
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(path))
        found.vocabulary = tokenizer.get_vocab_size()
        found.pieces = [clean(piece) for piece in tokenizer.encode(SAMPLE, add_special_tokens=False).tokens]
    except Exception as error:  # the library raises bare Exception for damaged files
        found.problems.append(f"tokenizer/tokenizer.json cannot be read ({clean(str(error))[:200]})")


def _read_selection(run: Path, found: Collected) -> None:
    selection = found.selection
    selection.space = read_mapping(run / "space" / "space.json", found)
    _read_metrics(run / "supernet" / "metrics.jsonl", found, selection.supernet)
    selection.supernet.summary = read_mapping(run / "supernet" / "summary.json", found)
    selection.predictor = read_mapping(run / "latency" / "predictor.json", found)
    scored = run / "search" / "candidates.jsonl"
    if not scored.exists():
        scored = run / "search" / "journal.jsonl"
    rows = itertools.islice(read_lines(scored, found), MOST_RECORDS)
    selection.candidates = [row for row in rows if "arch" in row]
    selection.front = read_rows(run / "search" / "pareto.json", found)
    selection.search = read_mapping(run / "search" / "search.json", found)


def _read_positions(folder: Path, name: str, into: Positions, found: Collected) -> None:
    into.facts = read_mapping(folder / f"{name}.json", found)
    into.arrays = _arrays(folder / f"{name}.npz", ("probability", "kept", "by_distance"), found)
    _read_metrics(folder / "metrics.jsonl", found, into.training)
    into.study = read_mapping(folder / "results.json", found)


def _read_metrics(path: Path, found: Collected, into: Collected | Training) -> None:
    """Events, training and validation records; steps repeated after a restart replace the earlier ones."""
    for record in read_lines(path, found):
        step = figure(record.get("step"))
        if step is None:
            continue
        if "event" in record:
            into.events.append(f"Step {step:,.0f}: {record['event']}.")
            continue
        records = into.validation if "validation_loss" in record else into.train
        while records and records[-1]["step"] >= step:
            records.pop()
        records.append(record)
        if len(records) > MOST_RECORDS:
            del records[1:-1:2]


# ---- files ----------------------------------------------------------------------------------------------------------


def _json(path: Path, found: Collected) -> Any:
    try:
        return cleaned(json.loads(path.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, RecursionError) as error:
        found.problems.append(f"{_place(path)} cannot be read ({_reason(error)})")
        return None


def read_mapping(path: Path, found: Collected) -> dict[str, Any]:
    value = _json(path, found)
    if value is not None and not isinstance(value, dict):
        found.problems.append(f"{_place(path)} does not hold what it should")
    return value if isinstance(value, dict) else {}


def read_rows(path: Path, found: Collected) -> list[dict[str, Any]]:
    value = _json(path, found)
    rows = [row for row in value if isinstance(row, dict)] if isinstance(value, list) else []
    if value is not None and (not isinstance(value, list) or len(rows) < len(value)):
        found.problems.append(f"{_place(path)} does not hold what it should")
    return rows


def _arrays(path: Path, names: tuple[str, ...], found: Collected) -> dict[str, Any]:
    """The arrays of these names in an .npz file that are of sane size, as float32."""
    import numpy as np

    try:
        with zipfile.ZipFile(path) as archive:
            sizes = {item.filename: item.file_size for item in archive.infolist()}
        wanted = [name for name in names if sizes.get(f"{name}.npy", LARGEST_ARRAY) < LARGEST_ARRAY]
        with np.load(path, allow_pickle=False) as file:
            return {name: np.asarray(file[name], np.float32) for name in wanted}
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except Exception as error:  # zipfile, zlib and numpy raise what they like for damaged files
        found.problems.append(f"{_place(path)} cannot be read ({clean(str(error))[:200]})")
        return {}


def read_lines(path: Path, found: Collected, tidy: Callable[[Any], Any] = cleaned) -> Iterator[dict[str, Any]]:
    """The objects of a JSON-lines file, each after `tidy`. A torn last line is normal (the run may be writing); others
    are reported."""
    bad: list[int] = []
    torn, number = False, 0
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                torn = not line.endswith(b"\n")
                check = JOURNAL_CHECK.match(line)
                try:
                    row = tidy(json.loads(line[check.end() :] if check else line))
                except (ValueError, RecursionError):
                    row = None
                if isinstance(row, dict):
                    yield row
                elif line.strip():
                    bad.append(number)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        found.problems.append(f"{_place(path)} cannot be read ({_reason(error)})")
    if bad and torn and bad[-1] == number:
        bad.pop()
    if bad:
        lines = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        found.problems.append(f"{_place(path)}: {len(bad)} damaged line{'s' * (len(bad) > 1)} left out ({lines})")


def _place(path: Path) -> str:
    return clean(f"{path.parent.name}/{path.name}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return "nested too deeply" if isinstance(error, RecursionError) else clean(str(error))[:200]
