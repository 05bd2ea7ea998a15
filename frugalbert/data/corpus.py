"""The corpus stage: sources in; cleaned, de-duplicated documents with a held-out split out.

Source files are read, cleaned and hashed by many workers (`parts`), the hashes decide what stays (`dedup`), and one
writer fixes the order: sources as written, files sorted, documents as they stand in them. Whether a document is held
out depends on its text alone. Killed at any moment and run again, with any number of workers, the bytes are the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert import run
from frugalbert.data import dedup, files, hub, parts, python_docs
from frugalbert.data.cleaning import KEPT_EXAMPLES
from frugalbert.dist import usable_cores
from frugalbert.fanout import run_tasks
from frugalbert.progress import number

if TYPE_CHECKING:
    from frugalbert.config import Corpus, Machine

INDEX, WORK = "index.json", "work"
UNIT_BYTES = 16_000_000  # small files of a source are read together up to this size on disk
DEFAULTS = {"path": "", "format": "auto", "field": "text", "weight": 1.0, "subset": None, "split": "train"}
DEFAULTS |= {"revision": None, "max_documents": None}


@dataclass(frozen=True, slots=True)
class Document:
    """One cleaned text. `source` is the source as the YAML names it, or `python-docs/PACKAGE`."""

    text: str
    source: str
    held_out: bool


# ---- reading a finished corpus --------------------------------------------------------------------------------------


def list_files(corpus: Path) -> list[str]:
    """Names of the document files, in corpus order."""
    return [entry["name"] for entry in _index(corpus)["files"]]


def read_documents(corpus: Path, split: str | None = None, names: Sequence[str] | None = None) -> Iterator[Document]:
    """Documents in corpus order: of a split (`train`, `held_out`) or all, of some files or all.

    Raises ValueError if a file is not what the stage wrote (its checksum is compared).
    """
    entries = {entry["name"]: entry for entry in _index(corpus)["files"]}
    for name in entries if names is None else names:
        if split == "held_out" and not entries[name]["held_out"]:
            continue
        for line in parts.read_lines(corpus / name, entries[name]["sha256"]):
            record = json.loads(line)
            if split is None or record["held_out"] == (split == "held_out"):
                yield Document(record["text"], record["source"], record["held_out"])


def _index(corpus: Path) -> dict[str, Any]:
    try:
        return run.read_json(corpus / INDEX)
    except FileNotFoundError:
        raise ValueError(f"{corpus} holds no finished corpus; run the corpus stage first") from None


# ---- the stage ------------------------------------------------------------------------------------------------------


def build(section: Corpus, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Write `out/documents-NNNNN.jsonl.zst`, `dropped.jsonl` and, last, `index.json`. Returns the headline figures.

    Raises ValueError for sources that are absent, not text or damaged, and if no document or no held-out one is left.
    """
    sources = [DEFAULTS | ({"path": item} if isinstance(item, str) else item.model_dump()) for item in section.sources]
    if section.dedup == "near":
        _need_datasketch()
    tasks = _tasks(section, sources, inputs["yaml"], out)
    identity = run.fingerprint([section.model_dump(mode="json"), [{**task, "work": ""} for task in tasks]])
    work = out / WORK
    if (out / INDEX).exists() and (out / "identity").exists() and (out / "identity").read_text() == identity:
        _forget(work)
        return _metrics(run.read_json(out / INDEX))
    work.mkdir(exist_ok=True)
    workers = usable_cores() if machine.workers == "auto" else machine.workers
    prepared = run_tasks(
        parts.prepare,
        tasks,
        journal=work / "prepare.jsonl",
        workers=workers,
        scheduler=machine.scheduler,
        label="corpus",
        observe=lambda: {"MB written": sum(path.stat().st_size for path in work.glob("*.zst")) / 1e6},
    )
    found = _decide(section, sources, tasks, prepared)
    outputs = _outputs(found, out)
    _write(outputs, out, workers, machine.scheduler)
    run.write_atomic(out / "dropped.jsonl", _examples(tasks, found))
    _remove_others(out, outputs)
    index = {
        "format": 1,
        "files": outputs,
        "documents": sum(entry["documents"] for entry in outputs),
        "held_out_documents": sum(entry["held_out"] for entry in outputs),
        "characters": sum(entry["characters"] for entry in outputs),
        "sources": _sum_up(section, tasks, prepared, found),
        "licence": section.licence,
        "held_out": section.held_out,
    }
    run.write_json(out / INDEX, index)
    run.write_atomic(out / "identity", identity)
    _forget(work)
    run.say(_table(index))
    return _metrics(index)


def _metrics(index: dict[str, Any]) -> dict[str, Any]:
    dropped = sum(sum(source["dropped"].values()) for source in index["sources"])
    figures = {name: index[name] for name in ("documents", "held_out_documents", "characters")}
    return figures | {"files": len(index["files"]), "dropped": dropped}


def _need_datasketch() -> None:
    try:
        import datasketch  # noqa: F401
    except ImportError:
        raise ValueError(
            "corpus.dedup: near needs datasketch; install it with `pip install 'frugalbert[dedup]'` or write exact"
        ) from None


def _tasks(section: Corpus, sources: list[dict[str, Any]], folder: Path, out: Path) -> list[dict[str, Any]]:
    """One task per unit of work, in corpus order; the same for any number of workers."""
    names = ("held_out", "min_characters", "encoding_errors", "dedup")
    settings = {name: getattr(section, name) for name in names}
    tasks: list[dict[str, Any]] = []
    for position, options in enumerate(sources):
        for unit in _units(options, folder):
            task = {"number": len(tasks), "source": position, "label": options["path"], "unit": unit}
            task |= {"options": options, "limit": options["max_documents"], "settings": settings}
            tasks.append(task | {"work": str((out / WORK).resolve())})
    return tasks


def _units(options: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """What the tasks of one source read. A source with a limit is one unit, so that the limit means its beginning."""
    path, limited = options["path"], options["max_documents"] is not None
    if path == python_docs.NAME:
        units = python_docs.units()
        return [{"modules": [item for unit in units for item in unit["modules"]]}] if limited else units
    if path.startswith("hub:") or options["format"] == "dataset":
        name = path.removeprefix("hub:") if path.startswith("hub:") else str(folder / path)
        return hub.units(name, options)
    units: list[dict[str, Any]] = []
    space = 0
    for file in files.find(path, folder):
        status = file.stat()
        if not units or (status.st_size > space and not limited):
            units.append({"files": []})
            space = UNIT_BYTES
        units[-1]["files"].append([str(file.resolve()), status.st_size, status.st_mtime_ns])
        space -= status.st_size
    return units


# ---- what stays -----------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """A part with what happens to its documents: `codes` of `dedup`, and how often each enters the corpus."""

    path: Path
    entry: dict[str, Any]
    task: dict[str, Any]
    codes: np.ndarray
    copies: np.ndarray


def _decide(
    section: Corpus, sources: list[dict[str, Any]], tasks: list[dict[str, Any]], prepared: list[dict[str, Any]]
) -> list[Part]:
    """All parts in corpus order. Raises ValueError if nothing is left to train on or to hold out."""
    found = [(task, entry) for task, result in zip(tasks, prepared, strict=True) for entry in result["parts"]]
    paths = [Path(task["work"]) / entry["name"] for task, entry in found]
    sizes = [entry["documents"] for _, entry in found]
    decided = dedup.decide(paths, sizes, section.dedup, section.near_threshold)
    held_out = train = 0
    result: list[Part] = []
    for path, (task, entry), codes in zip(paths, found, decided, strict=True):
        records = parts.load(path, "records")
        held = records[:, parts.HELD_OUT] == 1
        copies = dedup.copies(records[:, parts.HASH], held, sources[task["source"]]["weight"])
        copies[codes != dedup.KEPT] = 0
        codes[(codes == dedup.KEPT) & (copies == 0)] = dedup.THINNED
        parts.save(path, ".copies.npz", copies=copies)
        held_out += int((copies[held] > 0).sum())
        train += int((copies[~held] > 0).sum())
        result.append(Part(path, entry, task, codes, copies))
    if not held_out + train:
        dropped = Counter(reason for found in prepared for reason in found["dropped"])
        why = f" (dropped as: {', '.join(dropped)})" if dropped else ""
        raise ValueError(f"corpus.sources hold no document{why}; look at the sources, min_characters and field")
    if not held_out or not train:
        raise ValueError(
            f"corpus.held_out: {section.held_out} leaves {train} documents to train on and {held_out} to validate "
            f"with; write held_out: {min(0.4, max(20 / (train + held_out), section.held_out)):.2g}, or give more "
            "documents (format: lines or paragraphs makes several of one file)"
        )
    return result


def _outputs(found: list[Part], out: Path) -> list[dict[str, Any]]:
    """The entry of each document file to be written: all parts in order, then the second copies of those that weigh
    more, and so on. `select` is the task for `parts.select`, `whole` the part if it is taken as it is."""
    outputs: list[dict[str, Any]] = []
    for copy in range(max(int(part.copies.max()) for part in found)):
        for part in found:
            chosen = part.copies > copy
            if not chosen.any():
                continue
            records = parts.load(part.path, "records")[chosen]
            entry = {
                "name": f"documents-{len(outputs):05d}.jsonl.zst",
                "documents": len(records),
                "held_out": int(records[:, parts.HELD_OUT].sum()),
                "characters": int(records[:, parts.CHARACTERS].sum()),
                "bytes": part.entry["bytes"],
                "sha256": part.entry["sha256"],
            }
            if chosen.all():
                entry["whole"] = str(part.path)
            else:
                task = {"part": str(part.path), "sha256": part.entry["sha256"], "copy": copy}
                entry["select"] = task | {"out": str((out / entry["name"]).resolve())}
            outputs.append(entry)
    return outputs


def _write(outputs: list[dict[str, Any]], out: Path, workers: int, scheduler: str | None) -> None:
    """Bring every document file to its final name, and its size and checksum into its entry."""
    wanted = [entry for entry in outputs if "select" in entry]
    tasks = [entry.pop("select") for entry in wanted]
    # Quick, and decided by what is in the parts rather than in the tasks: done anew after a kill.
    journal = out / WORK / "select.jsonl"
    journal.unlink(missing_ok=True)
    results = run_tasks(
        parts.select, tasks, journal=journal, workers=workers, scheduler=scheduler, label="corpus: duplicates"
    )
    for entry, result in zip(wanted, results, strict=True):
        entry |= result
    for entry in outputs:
        run.check_stop()
        if whole := entry.pop("whole", None):
            target = out / entry["name"]
            target.unlink(missing_ok=True)
            try:
                os.link(whole, target)
            except OSError:  # a file system without links
                run.write_atomic(target, Path(whole).read_bytes())


def _remove_others(out: Path, outputs: list[dict[str, Any]]) -> None:
    """Remove document files of an earlier build with other settings."""
    for path in set(out.glob("documents-*.jsonl.zst")) - {out / entry["name"] for entry in outputs}:
        path.unlink()


def _forget(work: Path) -> None:
    """Remove the working files, in a way that a kill leaves either all of them or none under their name."""
    old = work.with_name(f".{WORK}.old")
    shutil.rmtree(old, ignore_errors=True)
    with contextlib.suppress(FileNotFoundError):
        work.rename(old)
    shutil.rmtree(old, ignore_errors=True)


# ---- the account ----------------------------------------------------------------------------------------------------


def _sum_up(
    section: Corpus, tasks: list[dict[str, Any]], prepared: list[dict[str, Any]], found: list[Part]
) -> list[dict[str, Any]]:
    """What was read, repaired, dropped and kept of each source."""
    sources = [item if isinstance(item, str) else item.path for item in section.sources]
    accounts: list[dict[str, Any]] = [
        {"path": path, "read": 0, "documents": 0, "characters": 0, "dropped": Counter(), "repaired": Counter()}
        for path in sources
    ]
    for task, result in zip(tasks, prepared, strict=True):
        account = accounts[task["source"]]
        account["read"] += result["read"]
        account["dropped"].update(result["dropped"])
        account["repaired"].update(result["repaired"])
    for part in found:
        account, copies = accounts[part.task["source"]], part.copies.astype(np.int64)
        characters = parts.load(part.path, "records")[:, parts.CHARACTERS].astype(np.int64)
        account["documents"] += int(copies.sum())
        account["characters"] += int((copies * characters).sum())
        counts = np.bincount(part.codes)
        account["dropped"].update({dedup.REASONS[code]: int(counts[code]) for code in np.flatnonzero(counts) if code})
    return accounts


def _examples(tasks: list[dict[str, Any]], found: list[Part]) -> str:
    """The first KEPT_EXAMPLES losses as JSON lines: where, and why."""
    lines: list[dict[str, str]] = []
    for task in tasks:
        notes = run.read_json(f"{parts.unit_stem(task)}.notes.json")
        lines += notes["examples"]
        for part in found:
            rows = np.flatnonzero(part.codes) if part.task is task and len(lines) < KEPT_EXAMPLES else ()
            for row, record in zip(rows, parts.load(part.path, "records")[rows] if len(rows) else (), strict=True):
                where = f"{notes['names'][int(record[parts.FILE])]}:{record[parts.PLACE]}"
                lines.append({"where": where, "reason": dedup.REASONS[part.codes[row]]})
        if len(lines) >= KEPT_EXAMPLES:
            break
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines[:KEPT_EXAMPLES])


def _table(index: dict[str, Any]) -> str:
    """What was read, kept, repaired and dropped, and why, one line per source."""
    lines = [f"{'source':<28} {'read':>9} {'kept':>9} {'characters':>10}  dropped"]
    for source in index["sources"]:
        path = source["path"] if len(source["path"]) <= 28 else "…" + source["path"][-27:]
        dropped = ", ".join(f"{reason} {count}" for reason, count in sorted(source["dropped"].items())) or "none"
        repaired = "".join(f"; {reason}: {count}" for reason, count in sorted(source["repaired"].items()))
        figures = f"{source['read']:>9} {source['documents']:>9} {number(source['characters']):>10}"
        lines.append(f"{path:<28} {figures}  {dropped}{repaired}")
    held, total = index["held_out_documents"], index["documents"]
    lines.append(f"{total} documents, {number(index['characters'])} characters, {held} documents held out")
    return "\n".join(lines)
