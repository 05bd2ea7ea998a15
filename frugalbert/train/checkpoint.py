"""Training checkpoints: folders that a kill, a full disk or a flipped bit cannot turn into a wrong continuation.

`checkpoints/step-00000100/` holds the model as Hugging Face files, `training.safetensors` (optimizer, averages),
`state.json` (every number the run's future depends on) and `manifest.json` (size and SHA-256 of each file, and of
itself). A folder appears whole or not at all; one that does not verify is renamed `corrupt-…` and the one before it
serves. Nothing is pickled. Random numbers need no state: they are derived from (seed, batch) at every step.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from frugalbert.progress import number
from frugalbert.run import publish, read_json, say, sha256, write_json

MANIFEST, STATE, TENSORS = "manifest.json", "state.json", "training.safetensors"


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(
    folder: Path, step: int, write_model: Callable[[Path], None], tensors: dict[str, Tensor], state: dict[str, Any]
) -> None:
    """Write the checkpoint of `step`. Raises OSError.

    `write_model(path)` writes the model's own files; `tensors` is everything else that has a shape.
    """
    from safetensors.torch import save_file

    path = path_of(folder, step)
    with publish(path) as work:
        write_model(work)
        save_file({name: tensor.contiguous().cpu() for name, tensor in tensors.items()}, work / TENSORS)
        write_json(work / STATE, state)
        files = sorted(file for file in work.rglob("*") if file.is_file())
        entries = {str(file.relative_to(work)): [file.stat().st_size, sha256(file)] for file in files}
        manifest = {"format": 1, "step": step, "files": entries}
        write_json(work / MANIFEST, manifest | {"digest": _digest(manifest)})


def check_disk(folder: Path, need: int) -> None:
    """Refuse to begin what needs `need` bytes unless twice that is free. Raises ValueError."""
    free = shutil.disk_usage(folder).free
    if free < 2 * need:
        raise ValueError(
            f"{folder} has {number(free)}B free, a checkpoint takes {number(need)}B and twice that must be free; "
            "free some space and run again"
        )


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def fault(path: Path) -> str | None:
    """Why a checkpoint must not be used: sizes first, then hashes; None if all is as it was written."""
    try:
        manifest = read_json(path / MANIFEST)
        digest = manifest.pop("digest")
        if digest != _digest(manifest):
            return f"{MANIFEST} is damaged"
        for name, (size, _) in manifest["files"].items():
            if not (path / name).is_file():
                return f"{name} is missing"
            if (path / name).stat().st_size != size:
                return f"{name} has {(path / name).stat().st_size} bytes instead of {size}"
        for name, (_, digest) in manifest["files"].items():
            if sha256(path / name) != digest:
                return f"{name} is damaged"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{MANIFEST} is damaged"
    return None


def find(folder: Path) -> int | None:
    """Step of the newest checkpoint that verifies, None if there never was one; damaged ones are renamed, and said.

    Raises ValueError if there are checkpoints but none of them is whole.
    """
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    found = sorted(folder.glob("step-*"), reverse=True)
    for path in found:
        reason = fault(path)
        if reason is None:
            return int(path.name.removeprefix("step-"))
        target = path.with_name(f"corrupt-{path.name}")
        count = 1
        while target.exists():
            count += 1
            target = path.with_name(f"corrupt-{path.name}-{count}")
        path.rename(target)
        say(f"checkpoint {path} is not used: {reason}; it is kept as {target.name}, the one before it serves")
    if found or any(folder.glob("corrupt-*")):
        raise ValueError(f"all checkpoints in {folder} are damaged; `--redo {folder.parent.name}` starts again")
    return None


def load(folder: Path, step: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, state) of a checkpoint that `find` returned."""
    from safetensors.torch import load_file

    path = path_of(folder, step)
    return load_file(path / TENSORS), read_json(path / STATE)


def prune(folder: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints; a removal that is cut short leaves a name nobody reads."""
    for path in sorted(folder.glob("step-*"), reverse=True)[keep:]:
        doomed = path.with_name(f".tmp-{path.name}-old")
        path.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
