"""The ordered table of stages, and what happens when one is asked for: the only file that joins the parts.

A stage is a directory below the run with an identity: its section, its inputs' fingerprints, its own. Nothing there:
build it (continuing what a killed attempt left). The same identity: skip. Another identity: stop and show what changed;
`redo` moves the old directory aside, `keep` accepts it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import yaml

from frugalbert import run as files
from frugalbert.config import (
    FROM_ATTENTION,
    FROM_SEARCH,
    FROM_SUPERNET,
    FROM_TEACHER,
    Attention,
    Config,
    Finetune,
    Importance,
    Pretrain,
    Search,
    Section,
    Supernet,
    Task,
)
from frugalbert.lock import Lock
from frugalbert.plugins import is_plugin, outside
from frugalbert.progress import duration, number

SNAPSHOT = "run.yaml"


@dataclass(frozen=True)
class Stage:
    """One row: its section, the stages whose directories it reads (`later?` = if there), and where its function is."""

    name: str
    inputs: tuple[str, ...]
    function: str
    outside: Callable[[Any], list[str]] = lambda section: []
    derived: bool = False  # rebuilt without asking: nothing in it is worth keeping
    precious: bool = False  # even a half of it is worth a question before it is built again with other settings
    all_ranks: bool = False  # every process of a torchrun launch takes part


def _corpus_paths(section: Any) -> list[str]:
    return [source if isinstance(source, str) else source.path for source in section.sources]


def _pretrain_paths(section: Pretrain | Attention | Importance) -> list[str]:
    plugins = outside(section.optimizer, section.curve)
    arch = [section.arch] if section.arch.endswith(".json") else []
    teacher = section.distill.teacher if isinstance(section, Pretrain) and section.distill else None
    made = (None, FROM_SEARCH, FROM_ATTENTION, FROM_TEACHER, FROM_SUPERNET)
    models = [path for path in (section.start, teacher) if path not in made]
    return [*plugins, *arch, *models]


def _supernet_paths(section: Supernet) -> list[str]:
    plugins = outside(section.optimizer, section.curve)
    return [*plugins, *filter(None, [section.start, section.teacher])]


def _finetune_paths(section: Finetune) -> list[str]:
    tasks = [task for task in section.tasks if isinstance(task, Task)]
    custom = [path for task in tasks for path in (task.train, task.dev, task.test) if path]
    agora = section.agora
    code = [name.split(":")[0] for name in agora.transforms if is_plugin(name)] if agora else []
    models = [agora.teacher, agora.transform_model] if agora else []
    return [*custom, *code, *filter(None, [section.data, section.model, *models])]


def _search_paths(section: Search) -> list[str]:
    maximum = section.extraction.maximum or ""
    return [*([maximum] if maximum.endswith(".json") else []),
            *(_finetune_paths(section.finetune) if section.finetune else [])]  # fmt: skip


STAGES = (
    Stage("corpus", (), "frugalbert.data.corpus:build", _corpus_paths),
    Stage("tokenizer", ("corpus",), "frugalbert.data.tokenizer:build", lambda section: [section.path or ""]),
    Stage("shards", ("corpus", "tokenizer"), "frugalbert.data.shards:build", lambda section: list(section.samples)),
    Stage("space", ("tokenizer",), "frugalbert.selection:write_space", derived=True),
    Stage("supernet", ("shards", "tokenizer", "space"), "frugalbert.train.supernet:build", _supernet_paths,
          all_ranks=True, precious=True),
    Stage("latency", ("space", "tokenizer"), "frugalbert.measure.table:build", precious=True),
    Stage("search", ("space", "supernet", "latency", "shards", "tokenizer"), "frugalbert.selection:search",
          _search_paths, precious=True),
    Stage("attention", ("shards", "tokenizer", "search"), "frugalbert.search.attention:build", _pretrain_paths,
          all_ranks=True, precious=True),
    Stage("importance", ("shards", "tokenizer", "search"), "frugalbert.search.importance:build", _pretrain_paths,
          all_ranks=True, precious=True),
    Stage("pretrain", ("shards", "tokenizer", "supernet", "search", "attention"), "frugalbert.sizing:pretrain",
          _pretrain_paths, all_ranks=True, precious=True),
    Stage("finetune", ("pretrain", "tokenizer", "corpus"), "frugalbert.finetune.runner:build", _finetune_paths,
          precious=True),
    Stage("export", ("pretrain", "tokenizer", "shards", "corpus", "finetune", "space", "supernet", "latency", "search",
                     "attention"), "frugalbert.measure.export:build"),
    Stage("bench", ("export", "tokenizer"), "frugalbert.measure.latency:build"),
    Stage("report", ("corpus", "tokenizer", "shards", "space", "supernet", "latency", "search", "attention",
                     "importance", "pretrain", "finetune", "export", "bench"), "frugalbert.report.page:build",
          derived=True),
)  # fmt: skip
STAGE = {stage.name: stage for stage in STAGES}
NAMES = tuple(STAGE)


@dataclass
class Status:
    """Where one stage stands. `state` is `done`, `kept`, `to do`, `unfinished` or `drifted`."""

    stage: Stage
    section: Section
    state: str
    fingerprint: str
    inputs: dict[str, str]
    outside: dict[str, list[Any]] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    record: dict[str, Any] | None = None


# ---- identity -------------------------------------------------------------------------------------------------------


def _outside_files(paths: Sequence[str], folder: Path, known: dict[str, list[Any]]) -> dict[str, list[Any]]:
    """Identities of the files outside the run that a stage reads; names that are no files stand for themselves."""
    found: dict[str, list[Any]] = {}
    for text in filter(None, paths):
        if text == "python-docs":
            installed = sorted(f"{item.metadata['Name']} {item.version}" for item in distributions())
            found["python-docs"] = [len(installed), 0, files.fingerprint(installed)]
            continue
        path = folder / text
        matches = [path] if path.exists() else sorted(folder.glob(text)) if not Path(text).is_absolute() else []
        if not matches and Path(text).is_absolute() and any(sign in text for sign in "*?["):
            matches = sorted(Path(Path(text).anchor).glob(str(Path(text).relative_to(Path(text).anchor))))
        for match in matches:
            found |= files.identify(match, known, folder)  # seen from there: a run may move with its folder
        if not matches:
            found[text] = [0, 0, text]
    return found


def examine(config: Config, directory: Path, folder: Path, *, read_files: bool = True) -> list[Status]:
    """The state of every stage the configuration asks for, in order.

    `read_files=False` (planning) does not read the outside files of stages that were never built.
    """
    statuses: list[Status] = []
    fingerprints: dict[str, str] = {}
    for stage in STAGES:
        section = getattr(config, stage.name)
        if section is None:
            continue
        out = directory / stage.name
        record = files.read_record(out)
        part = files.read_part(out) if record is None else None
        before = record or part
        outside: dict[str, list[Any]] = {}
        if read_files or before:
            outside = _outside_files(stage.outside(section), folder, (before or {}).get("files", {}))
        inputs = {name: fingerprints[name] for name in stage.inputs if name in fingerprints}
        inputs |= {name: identity[2] for name, identity in outside.items()}
        dump = section.model_dump(mode="json")
        now = files.fingerprint({"section": dump, "inputs": inputs})
        status = Status(stage, section, "to do", now, inputs, outside, record=record)
        if before:
            status.state = "done" if record else "unfinished"
            if before.get("accepted", {}).get("fingerprint") == now:
                status.state = "kept"
            elif before["fingerprint"] != now:
                status.state, status.changes = "drifted", files.drift(before, dump, inputs)
        fingerprints[stage.name] = record["fingerprint"] if record and status.state in ("done", "kept") else now
        statuses.append(status)
    return statuses


# ---- doing ----------------------------------------------------------------------------------------------------------


def prepare(config: Config, directory: Path, folder: Path) -> None:
    """Leave in the run directory what `run DIRECTORY` needs to continue."""
    try:
        text = yaml.safe_dump(config.model_dump(mode="json", exclude_unset=True), sort_keys=False, allow_unicode=True)
        here = os.path.relpath(folder.resolve(), directory.resolve())
        files.write_atomic(directory / SNAPSHOT, f"# folder: {folder.resolve()}\n# from here: {here}\n{text}")
    except OSError as error:
        raise _unwritable(directory, error) from None


def _unwritable(directory: Path, error: OSError) -> ValueError:
    return ValueError(f"cannot write the run directory {directory} ({error.strerror}); choose another with --dir")


def folder_of(directory: Path) -> Path:
    """The folder that the relative paths of a run's snapshot start from, also after both have moved together."""
    first, second, *_ = [*(directory / SNAPSHOT).read_text().split("\n", 2), ""]
    folder = Path(first.removeprefix("# folder: "))
    moved = second.startswith("# from here: ") and not folder.is_dir()
    return directory / second.removeprefix("# from here: ") if moved else folder


def run(config: Config, directory: Path, folder: Path, *, only: str | None = None, redo: Sequence[str] = (),
        keep: Sequence[str] = ()) -> list[Status]:  # fmt: skip
    """Bring every stage (or `only` one) up to date. Raises ValueError for the user to mend, Stopped on a signal."""
    for name in filter(None, [only, *redo, *keep]):
        if getattr(config, name, None) is None or name not in NAMES:
            there = [stage for stage in NAMES if getattr(config, stage) is not None]
            raise ValueError(f"there is no stage {name!r} in this run; its stages are {', '.join(there)}")
    main = files.is_main_rank()
    if redo and os.environ.get("WORLD_SIZE", "1") != "1":
        raise ValueError("--redo moves directories while other ranks look at them; call it once without torchrun")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = Lock(directory) if main else contextlib.nullcontext()
    except OSError as error:
        raise _unwritable(directory, error) from None
    with lock:
        if main:
            files.sweep(directory)
            prepare(config, directory, folder)
        for name in redo if main else ():
            _move_aside(config, directory, name)
        for position, status in enumerate(examine(config, directory, folder)):
            if only is None or status.stage.name == only:
                current = examine(config, directory, folder)[position] if position else status
                _one(current, config, directory, folder, accept=status.stage.name in keep)
        return examine(config, directory, folder)


def _move_aside(config: Config, directory: Path, name: str) -> None:
    """Rename the stage's directory and those of the stages that were built from it to `NAME.old-1`, …"""
    moved = {name}
    for stage in STAGES:
        if stage.name in moved or moved & set(stage.inputs):
            moved.add(stage.name)
            out = directory / stage.name
            if out.exists():
                count = 1
                while (directory / f"{stage.name}.old-{count}").exists():
                    count += 1
                out.rename(directory / f"{stage.name}.old-{count}")
                files.say(f"{stage.name}: moved aside to {stage.name}.old-{count}")


def _one(status: Status, config: Config, directory: Path, folder: Path, *, accept: bool) -> None:
    stage, out = status.stage, directory / status.stage.name
    if status.state in ("done", "kept"):
        files.say(f"{stage.name}: done before ({_headline(status.record)})")
        return
    if not files.is_main_rank() and not stage.all_ranks:
        _wait(out)
        return
    if refused(status, out):
        if not accept or status.record is None:
            raise _refusal(status)
        record = {**status.record, "accepted": {"fingerprint": status.fingerprint, "drift": status.changes}}
        files.write_sealed(out / files.RECORD, record)
        files.say(f"{stage.name}: kept although {len(status.changes)} settings or inputs changed")
        return
    if status.state == "drifted":
        shutil.rmtree(out)
    _build(status, config, directory, folder)


def refused(status: Status, out: Path) -> bool:
    """Whether a stage was built, or begun at some cost, with other settings or inputs: its user decides."""
    if status.state != "drifted" or status.stage.derived:
        return False
    begun = status.stage.precious and out.exists() and any(path.name != files.PART for path in out.iterdir())
    return status.record is not None or begun


def _refusal(status: Status) -> ValueError:
    name = status.stage.name
    changes = "\n".join(f"  {line}" for line in status.changes)
    built = "was built" if status.record else "was begun"
    keep = f" `--keep {name}` goes on with it as it is, or" if status.record else ""
    return ValueError(
        f"{name} {built} with other settings or inputs:\n{changes}\n"
        f"`--redo {name}` builds it again (the old one is moved aside),{keep} undo the change."
    )


def _wait(out: Path) -> None:
    """Other ranks wait for rank 0 to finish a stage that one process builds (torchrun ends them if rank 0 fails)."""
    while not (out / files.RECORD).exists():
        files.check_stop()
        time.sleep(0.2)


def _build(status: Status, config: Config, directory: Path, folder: Path) -> None:
    stage, out, main = status.stage, directory / status.stage.name, files.is_main_rank()
    identity = {
        "stage": stage.name,
        "section": status.section.model_dump(mode="json"),
        "inputs": status.inputs,
        "fingerprint": status.fingerprint,
        "files": status.outside,
    }
    if main:
        out.mkdir(exist_ok=True)
        files.write_sealed(out / files.PART, identity)
        files.say(f"{stage.name}: {'continuing' if status.state == 'unfinished' else 'starting'}")
    inputs = {name: directory / name for name in stage.inputs if (directory / name / files.RECORD).exists()}
    _check_inputs(inputs)
    inputs |= {"yaml": folder, **({"run": directory} if stage.name == "report" else {})}
    started = time.monotonic()
    module, name = stage.function.split(":")
    metrics = getattr(importlib.import_module(module), name)(status.section, inputs, out, config.machine)
    if not main:
        _wait(out)  # the next stage may read what rank 0 is still writing
        return
    seconds = time.monotonic() - started
    finished = datetime.now(UTC).isoformat(timespec="seconds")
    device = metrics.get("device", "cpu")
    record = {**identity, "seconds": round(seconds, 3), "device": device, "versions": files.versions()}
    written = {"metrics": metrics, "finished": finished, "outputs": files.outputs(out)}
    files.write_sealed(out / files.RECORD, {**record, **written})
    (out / files.PART).unlink(missing_ok=True)
    files.say(f"{stage.name}: done in {duration(seconds)} ({_headline({'metrics': metrics})})")


def _check_inputs(inputs: dict[str, Path]) -> None:
    """Raises ValueError if what an earlier stage wrote is no longer what it wrote (rank 0 looks, for all)."""
    if not files.is_main_rank():
        return
    for name, path in inputs.items():
        record = files.read_record(path)
        if record is not None and not STAGE[name].derived and (changed := files.altered(path, record)):
            more = f" and {len(changed) - 1} more" if len(changed) > 1 else ""
            raise ValueError(
                f"{changed[0]}{more}: it was changed or damaged after {name} was done; restore it, or write "
                f"--redo {name}"
            )


def profile(config: Config, directory: Path, folder: Path) -> dict[str, Any]:
    """Trace a few steps of the run's pre-training, in `directory`/profile. Raises ValueError without shards."""
    stage = next(stage for stage in STAGES if stage.name == "pretrain")
    inputs = {name: directory / name for name in stage.inputs if (directory / name / files.RECORD).exists()}
    if config.pretrain is None or "shards" not in inputs:
        raise ValueError(
            f"{directory} has no finished shards to train on; call `frugalbert run` first, with a section pretrain"
        )
    from frugalbert import sizing
    from frugalbert.train import profile as steps

    section = sizing.decided(config.pretrain, directory / "pretrain")
    found = steps.build(section, {**inputs, "yaml": folder}, directory / "profile", config.machine)
    if files.is_main_rank():
        steps.show(found, directory / "profile")
    return found


def _headline(record: dict[str, Any] | None) -> str:
    metrics = (record or {}).get("metrics") or {}
    plain = {name: value for name, value in metrics.items() if isinstance(value, int | float | str)}
    return (
        ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in list(plain.items())[:5]) or "finished"
    )


def log_failure(directory: Path) -> Path:
    """Append the current exception's traceback to the run's log and say where."""
    path = directory / "run.log"
    with contextlib.suppress(OSError), open(path, "a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat()} pid {os.getpid()}\n{traceback.format_exc()}\n")
    return path


def run_file(path: str | Path, *settings: str, directory: str | Path | None = None) -> Path:
    """The Python spelling of `frugalbert run FILE section.key=value …`; returns the run directory."""
    from frugalbert.yamlfile import load

    path = Path(path)
    config = load(path, settings)
    target = Path(directory) if directory else Path("runs") / config.name
    run(config, target, path.parent.resolve())
    return target
