"""The run directory: atomic files, stage records, fingerprints, and clean stops.

A run is a directory with one sub-directory per stage. Everything here is small and knows nothing of text or models;
every other module writes and reads through it, so that a kill at any moment leaves the old state or the new one.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import signal
import sys
import tempfile
from collections.abc import Generator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import Any, cast

from frugalbert.progress import Progress, is_main_rank

__all__ = ["Progress", "Stopped", "check_stop", "publish", "read_json", "say", "write_atomic", "write_json"]
RECORD, PART = "stage.json", "stage.part.json"
PACKAGES = ("frugalbert", "torch", "transformers", "tokenizers", "accelerate", "datasets", "numpy")


# ---- files ----------------------------------------------------------------------------------------------------------


def sync_directory(path: Path) -> None:
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path | str, data: bytes | str) -> None:
    """Write `data` to `path` so that a reader or a crash sees the old file or the new one, never a part."""
    path = Path(path)
    descriptor, name = tempfile.mkstemp(prefix=f".tmp-{path.name}-", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    sync_directory(path.parent)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path | str, value: Any) -> None:
    """Write `value` as indented JSON, atomically. NaN and infinity are refused: say `null` or a string instead."""
    write_atomic(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path | str) -> Any:
    """Raises ValueError naming the file if it is damaged, FileNotFoundError if it is absent."""
    data = Path(path).read_bytes()
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); delete its stage's directory to build it again") from None


def write_sealed(path: Path | str, value: dict[str, Any]) -> None:
    """`write_json` of a mapping with a checksum of its own."""
    write_json(path, {**value, "checksum": fingerprint(value)})


def read_sealed(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_sealed` wrote, without the checksum (earlier versions wrote none). Raises ValueError with the
    `remedy` if it is damaged."""
    try:
        found = json.loads(path.read_bytes())
        if isinstance(found, dict):
            told = cast("dict[str, Any]", found)
            if told.pop("checksum", None) in (None, fingerprint(told)):
                return told
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{path} is damaged; {remedy}")


@contextlib.contextmanager
def publish(path: Path | str) -> Generator[Path]:
    """A temporary directory that becomes `path` when the block succeeds (files and directory synced first).

    An older `path` is replaced; a crash leaves it as it was, or, in the instant between two renames, beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    for leftover in path.parent.glob(f".tmp-{path.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
    try:
        yield work
        readable = 0o666 & ~_umask()  # safetensors writes files that only their owner can read
        for file in sorted(work.rglob("*")):
            if file.is_file():
                file.chmod(readable)
                with open(file, "rb") as handle:
                    os.fsync(handle.fileno())
        work.chmod(0o777 & ~_umask())
        sync_directory(work)
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-old-", dir=path.parent))
            os.rename(path, old / path.name)
            os.rename(work, path)
            shutil.rmtree(old, ignore_errors=True)
        else:
            os.rename(work, path)
        sync_directory(path.parent)
    except Exception as error:
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors writes in Rust, with errors of its own
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from None
    finally:
        shutil.rmtree(work, ignore_errors=True)


def sweep(directory: Path) -> None:
    """Remove what killed writers left below `directory`; call it under the run's lock, when nobody writes."""
    for leftover in list(directory.rglob(".tmp-*")):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---- fingerprints and records ---------------------------------------------------------------------------------------


def identify(path: Path, known: dict[str, list[Any]], folder: Path | None = None) -> dict[str, list[Any]]:
    """`{path: [size, mtime_ns, sha256]}` of a file, or of every file below a directory; paths as seen from `folder`.

    `known` is an earlier result: a file of the same size and time is not read again.
    """
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    found: dict[str, list[Any]] = {}
    for file in files:
        status = file.stat()
        name = str(file.relative_to(folder) if folder and file.is_relative_to(folder) else file)
        before = known.get(name)
        if before and before[:2] == [status.st_size, status.st_mtime_ns]:
            found[name] = before
        else:
            found[name] = [status.st_size, status.st_mtime_ns, _digest(file, status.st_size, status.st_mtime_ns)]
    return found


@functools.lru_cache(maxsize=4096)
def _digest(file: Path, size: int, mtime_ns: int) -> str:
    return sha256(file)


def fingerprint(value: Any) -> str:
    """Hash of a JSON value, independent of key order."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def outputs(stage: Path) -> dict[str, list[Any]]:
    """`{file: [size, sha256]}` of what a stage has written, but for what verifies itself (checkpoints, token rows) and
    what others write: trackers may still be at it."""
    found: dict[str, list[Any]] = {}
    for file in sorted(stage.rglob("*")):
        name = file.relative_to(stage)
        own = name.parts[0] in ("checkpoints", "trackers") or name.parts[0].startswith("length-")
        if file.is_file() and not own and file.name not in (RECORD, PART) and not file.name.startswith(".tmp-"):
            found[name.as_posix()] = [file.stat().st_size, sha256(file)]
    return found


def altered(stage: Path, record: dict[str, Any]) -> list[str]:
    """A sentence for each file of a finished stage that is not what the record says; sizes first, then hashes."""
    found: list[str] = []
    for name, (size, digest) in record.get("outputs", {}).items():
        path = stage / name
        if name.startswith("trackers/"):  # recorded by an earlier version
            continue
        if not path.is_file():
            found.append(f"{stage.name}/{name} is missing")
        elif path.stat().st_size != size:
            found.append(f"{stage.name}/{name} has {path.stat().st_size} bytes instead of {size}")
        elif _digest(path, size, path.stat().st_mtime_ns) != digest:
            found.append(f"{stage.name}/{name} is not what was written")
    return found


def read_record(stage: Path) -> dict[str, Any] | None:
    """The stage's record, or None while it has not finished."""
    return _record(stage / RECORD)


def read_part(stage: Path) -> dict[str, Any] | None:
    """What a stage that has begun was begun with, or None."""
    return _record(stage / PART)


def _record(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    found = read_sealed(path, f"restore it, or write --redo {path.parent.name}")
    if absent := {"stage", "section", "inputs", "fingerprint"} - found.keys():
        raise ValueError(f"{path} is damaged (it has no {min(absent)}); restore it, or write --redo {path.parent.name}")
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` -> `{"a.b": 1}`; lists stay whole."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, item in cast("dict[str, Any]", value).items():
        flat |= flatten(item, f"{prefix}.{key}" if prefix else str(key))
    return flat


def drift(record: dict[str, Any], section: dict[str, Any], inputs: dict[str, str]) -> list[str]:
    """What differs between a finished stage and what is asked for now, one line per key or input; empty = the same."""
    before, now = flatten(record["section"]), flatten(section)
    lines = [
        f"{record['stage']}.{key}: {_short(before.get(key))} -> {_short(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    for name in sorted(record["inputs"].keys() | inputs.keys()):
        if record["inputs"].get(name) != inputs.get(name):
            what = "changed" if name in inputs and name in record["inputs"] else "new" if name in inputs else "gone"
            lines.append(f"{record['stage']} input {name}: {what}")
    return lines


def _short(value: Any) -> str:
    text = "unset" if value is None else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "…"


def versions() -> dict[str, str]:
    """Versions of Python and the packages that decide a result; imports none of them."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


# ---- clean stops ----------------------------------------------------------------------------------------------------

_signal: int | None = None


class Stopped(Exception):
    """A signal asked the run to stop; everything worth keeping is on disk."""

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def catch_signals() -> None:
    """SIGTERM, SIGINT and SIGUSR1 set a flag that work looks at between steps; a second SIGINT interrupts at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        global _signal
        if number == signal.SIGINT and _signal == signal.SIGINT:
            raise KeyboardInterrupt
        _signal = number

    for name in ("SIGTERM", "SIGINT", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), handle)


def stop_requested() -> int | None:
    """The number of the signal that asked to stop, or None."""
    return _signal


def check_stop() -> None:
    """Raises Stopped if a signal has arrived. Call between units of work of about a second."""
    if _signal is not None:
        raise Stopped(_signal)


def sentence(error: ValueError | OSError) -> str:
    """What went wrong, for people, without the numbers of the system's errors."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    if error.errno == errno.ENOSPC:
        return f"the disk is full{f' at {error.filename}' if error.filename else ''}; free some space and run again"
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


def say(text: str) -> None:
    """One line to standard error, from the main rank."""
    if is_main_rank():
        print(text, file=sys.stderr, flush=True)
