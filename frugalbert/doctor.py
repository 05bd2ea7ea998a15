"""`frugalbert doctor [RUN]`: what this machine can do, whether what a run wrote is still whole, and what `run` will do.

Findings come out one by one, in the order in which a person would look; nothing is changed. What the toolkit needs is
tried, not looked up: a kernel is compiled, files are renamed, linked and synced where the run would write them.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from frugalbert import run as files
from frugalbert import stages
from frugalbert.config import Config, Machine
from frugalbert.lock import Lock
from frugalbert.progress import number

State = Literal["ok", "note", "bad"]
SECONDS = 180  # that a trial in a process of its own may take
COMPILED = """
import torch
print(float(torch.compile(lambda x: (x.sin() * 2 + 1).sum())(torch.ones(64, device={device!r}))))
"""
FLEX = """
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
near = create_block_mask(lambda b, h, i, j: (i - j).abs() < 16, None, None, 256, 256, device={device!r})
q, k, v = torch.randn(3, 1, 2, 256, 64, device={device!r}, generator=torch.Generator({device!r}).manual_seed(0))
places = torch.arange(256, device={device!r})
mask = (places[:, None] - places[None]).abs() < 16
there = torch.compile(flex_attention)(q, k, v, block_mask=near)
print(float((there - torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)).abs().max()))
"""
SHARED = ("nfs", "cifs", "smb", "lustre", "gpfs", "ceph", "fuse", "9p")


@dataclass(frozen=True)
class Finding:
    """`bad` has to be mended; a `note` is worth knowing."""

    what: str
    state: State
    text: str


# ---- the machine -----------------------------------------------------------------------------------------------------


def machine(directory: Path, settings: Machine, *, quick: bool = False) -> Iterator[Finding]:
    """What a run in `directory` would find. `quick` compiles nothing."""
    from frugalbert import dist

    yield from _packages()
    device = dist.pick_device(Machine(device="auto"))
    memory = number(dist.free_memory())
    bf16 = "multiplies bf16" if dist.multiplies_bf16(dist.pick_device(Machine(device="cpu"))) else "fp32 only"
    yield Finding("processor", "ok", f"{dist.processor_name()}, {dist.usable_cores()} cores, {bf16}, {memory}B free")
    yield from _gpus(settings)
    if not quick:
        yield _tried("torch.compile", COMPILED, device.type, lambda value: value != 0.0, "it runs without (eager)")
        wrong = "attention patterns are gathered in blocks instead"
        yield _tried("FlexAttention", FLEX, device.type, lambda value: value < 1e-2, wrong)
    yield from _disk(directory)
    offline = [
        name for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE") if os.environ.get(name, "0") not in ("", "0")
    ]
    said = (
        f"offline ({', '.join(offline)}): only what is in the cache" if offline else "used for names that are no path"
    )
    yield Finding("hub", "ok", said)


def _packages() -> Iterator[Finding]:
    from packaging.requirements import Requirement

    here, extras = [], []
    for text in requires("frugalbert") or ():
        wanted = Requirement(text)
        extra = wanted.marker is not None and "extra" in str(wanted.marker)
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            if not extra:
                yield Finding("packages", "bad", f"{wanted.name} is missing; pip install '{wanted.name}'")
            continue
        if found not in wanted.specifier:
            yield Finding("packages", "bad", f"{wanted.name} is {found}; pip install '{wanted.name}{wanted.specifier}'")
        (extras if extra else here).append(f"{wanted.name} {found}")
    yield Finding("packages", "ok", f"Python {sys.version.split()[0]}, {', '.join(here)}")
    yield Finding("extras", "ok", ", ".join(dict.fromkeys(extras)) or "none")


def _gpus(settings: Machine) -> Iterator[Finding]:
    import torch

    if not torch.cuda.is_available():
        state: State = "bad" if settings.device == "cuda" else "ok"
        built = "this PyTorch is built without CUDA" if torch.version.cuda is None else "PyTorch finds none"
        wish = ", but machine.device is cuda; write auto or cpu" if state == "bad" else ""
        yield Finding("GPU", state, built + wish)
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        bf16 = torch.cuda.get_device_capability(index) >= (8, 0)
        kind = "multiplies bf16" if bf16 else "no bf16: precision auto is fp32, fp16 is faster if it is stable"
        name = torch.cuda.get_device_name(index)
        yield Finding(
            f"GPU {index}", "ok" if bf16 else "note", f"{name}, {number(free)} of {number(total)}B free, {kind}"
        )


def _tried(what: str, code: str, device: str, right: Callable[[float], bool], otherwise: str) -> Finding:
    """The code in a process of its own: a compiler that hangs or crashes must not take us along."""
    try:
        command = [sys.executable, "-c", code.format(device=device)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Finding(what, "note", f"takes more than {SECONDS} s on {device}; {otherwise}")
    try:
        value = float(done.stdout.split()[-1])
    except (IndexError, ValueError):
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        return Finding(what, "note", f"does not work on {device} ({last[:160]}); {otherwise}")
    if right(value):
        return Finding(what, "ok", f"works on {device}")
    return Finding(what, "bad", f"computes wrong numbers on {device}; {otherwise} if you do not ask for it")


def _disk(directory: Path) -> Iterator[Finding]:
    """Of the nearest directory that exists: room, kind, and whether what runs rely on works there."""
    place = next(path for path in (directory.resolve(), *directory.resolve().parents) if path.is_dir())
    kind = _file_system(place)
    yield Finding("disk", "ok", f"{number(shutil.disk_usage(place).free)}B free in {place} ({kind})")
    if kind.startswith(SHARED):
        yield Finding("disk", "note", f"{kind} is shared or remote: one process per run is kept by a lock file, but "
                      "syncing is slow; a local disk is better for checkpoints")  # fmt: skip
    try:
        with tempfile.TemporaryDirectory(prefix=".tmp-doctor-", dir=place) as name:
            _try_files(Path(name))
    except OSError as error:
        yield Finding("disk", "bad", f"{place}: {error.strerror or error}; choose another directory with --dir")
    else:
        yield Finding("disk", "ok", "files can be written, synced, replaced, linked and locked")


def _try_files(folder: Path) -> None:
    """Raises OSError where a run would fail."""
    with files.publish(folder / "published") as work:
        (work / "file").write_text("old")
    files.write_atomic(folder / "published" / "file", "new")
    with Lock(folder):
        pass


def _file_system(place: Path) -> str:
    best, kind = "", "unknown file system"
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, mount, found, *_ = line.split()
            if place.is_relative_to(mount) and len(mount) >= len(best):
                best, kind = mount, found
    return kind


# ---- a run -----------------------------------------------------------------------------------------------------------


def examine(config: Config, directory: Path, folder: Path) -> Iterator[Finding]:
    """Whether all that a run has written is as it was, and what `run` does next, stage by stage."""
    yield from _leftovers(directory)
    try:
        statuses = stages.examine(config, directory, folder)
    except (ValueError, OSError) as error:
        yield Finding("run", "bad", str(error))
        return
    for status in statuses:
        out, name = directory / status.stage.name, status.stage.name
        damage = [] if status.stage.derived else list(_damage(out, status.record))
        yield from (Finding(name, "bad", text) for text in damage)
        yield from _checkpoints(out)
        yield Finding(name, "bad" if stages.refused(status, out) else "ok", _next(status, out))


def _leftovers(directory: Path) -> Iterator[Finding]:
    if (directory / "lock").exists():
        try:
            if Lock(directory).is_left():
                yield Finding("lock", "note", "its process is dead; the next run takes it over")
        except ValueError as error:
            yield Finding("lock", "note", str(error))
    for path in sorted(directory.rglob("corrupt-*")):
        yield Finding("damage", "note", f"{path.relative_to(directory)} was set aside earlier; delete it when you like")
    if (directory / "run.log").exists():
        yield Finding("log", "note", f"{directory / 'run.log'} has tracebacks of earlier failures")


def _damage(out: Path, record: dict[str, object] | None) -> Iterator[str]:
    """A sentence for each file that is not what its stage wrote."""
    from frugalbert.data import rows
    from frugalbert.fanout import read_journal

    if record is not None:
        yield from files.altered(out, record)
    if (out / rows.INDEX).exists() and out.name == "shards":
        try:
            index = rows.read_index(out)
            for length, splits in index["sets"].items():
                for split in splits:
                    rows.ShardSet.of(out, index, int(length), split)
        except (ValueError, OSError) as error:
            yield str(error)
    for path in sorted(out.rglob("*.jsonl")):
        if path.name.startswith(("journal", "table")):
            _, damaged, _ = read_journal(path)
            if damaged:
                yield f"{path.relative_to(out.parent)}: line {', '.join(map(str, damaged[:5]))} is damaged; done again"


def _checkpoints(out: Path) -> Iterator[Finding]:
    from frugalbert.train import checkpoint

    found = {path: checkpoint.fault(path) for path in sorted(out.glob("checkpoints/step-*"))}
    sound = [path for path, reason in found.items() if reason is None]
    for path, reason in found.items():
        if reason is not None and path.exists():  # a training under way removes old ones
            before = any(other < path for other in sound)
            then = "the one before it will serve" if before else f"none before it is sound: --redo {out.name}"
            yield Finding(out.name, "bad", f"{path.relative_to(out.parent)}: {reason}; {then}")
    if not sound and not found and any(out.glob("checkpoints/corrupt-*")):
        yield Finding(out.name, "bad", f"all its checkpoints are damaged; --redo {out.name} begins it again")


def _next(status: stages.Status, out: Path) -> str:
    from frugalbert.train import checkpoint

    if status.state in ("done", "kept"):
        return "done; the next run skips it"
    if status.state == "drifted":
        changed = "; ".join(status.changes[:3]) + (" …" if len(status.changes) > 3 else "")
        if not stages.refused(status, out):
            return f"out of date ({changed}); the next run does it again"
        keep = f" or --keep {out.name}" if status.record else ""
        return f"other settings ({changed}): the next run stops until --redo {out.name}{keep} is given"
    if status.state == "unfinished":
        sound = [path for path in sorted(out.glob("checkpoints/step-*")) if checkpoint.fault(path) is None]
        where = f" from step {int(sound[-1].name.removeprefix('step-')):,}" if sound else ""
        return f"begun; the next run goes on{where}"
    return "not begun; the next run does it"
