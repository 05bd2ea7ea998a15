"""Disks that are full, read-only or broken: the older checkpoint serves, and nothing is left half-written."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from frugalbert.train import checkpoint, loop
from tests.faults import rows
from tests.train import toy

STEP = "step-00000006"


@contextmanager
def small_disk(folder: Path, pages: int) -> Iterator[None]:
    """A file system in memory of so many pages of 4 KiB; the test is skipped where nothing may be mounted."""
    if shutil.which("mount") is None:
        pytest.skip("there is no `mount`")
    folder.mkdir()
    options = f"size={4 * pages}k,nr_inodes=400"
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def pages(folder: Path) -> int:
    """What the files of a folder take there."""
    return sum(-(-path.stat().st_size // 4096) for path in folder.rglob("*") if path.is_file())


@pytest.mark.fault("R7")
def test_small_disks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: rows.Tally):
    """Room for 0 to 1.2 checkpoints more: the run ends with an error of the system, what is there stays whole, and with
    more room it goes on to the same end."""
    there, one = pages(place / "short"), pages(place / "short" / "checkpoints" / STEP)
    room = sorted({round(1.2 * one * number / 19) for number in range(20)})
    monkeypatch.setattr(checkpoint, "check_disk", lambda folder, need: None)  # what it refuses is tested below
    for number in range(20):
        disk = tmp_path / str(number)
        with small_disk(disk, there + 2 + room[number % len(room)]), case():
            shutil.copytree(place / "short", disk / "run")
            try:
                toy.go(disk / "run", toy.SHORT)
            except OSError as error:
                assert "\n" not in str(error)
                newest = checkpoint.find(disk / "run" / "checkpoints")
                assert newest is not None
                assert newest >= 6
                assert not list(disk.rglob(".tmp-*"))
            remount(disk, f"size={4 * (there + 20 * one)}k")
            assert toy.result(toy.go(disk / "run", toy.SHORT)) == (place / "expected").read_text()


@pytest.mark.fault("R7")
@pytest.mark.parametrize("free", [0, 100, 4000])
def test_too_little_room_is_refused_before_the_first_step(free: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=free))
    with pytest.raises(ValueError, match="twice that must be free; free some space") as error:
        toy.go(tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


@pytest.mark.fault("R8")
@pytest.mark.parametrize("what", ["fsync", "rename", "vanished"])
def test_broken_disks(what: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """EIO and EXDEV, and a folder that someone removes: one line of the system's, and no half checkpoint."""
    out = tmp_path / "run"
    shutil.copytree(place / "short", out)
    run = toy.make(out, toy.SHORT)
    draw = run.draw

    def failing(*arguments: Any) -> None:
        raise OSError(5 if what == "fsync" else 18, "broken")

    def vanishing(*arguments: Any) -> Any:
        shutil.rmtree(out)
        return draw(*arguments)

    with monkeypatch.context() as patch:
        if what == "vanished":
            run.draw = vanishing
        else:
            patch.setattr(os, what, failing)
        with pytest.raises(OSError, match="broken|No such file") as error:
            loop.train(run)
    assert "\n" not in str(error.value)
    if what != "vanished":
        assert checkpoint.find(out / "checkpoints") == 6
        assert not list(out.rglob(".tmp-*"))
        assert toy.result(toy.go(out, toy.SHORT)) == (place / "expected").read_text()


@pytest.mark.fault("R8")
def test_a_read_only_folder(place: Path, tmp_path: Path):
    disk = tmp_path / "disk"
    with small_disk(disk, 400):
        shutil.copytree(place / "short", disk / "run")
        remount(disk, "ro")
        with pytest.raises(OSError, match="Read-only") as error:
            toy.go(disk / "run", toy.SHORT)
        assert "\n" not in str(error.value)
        remount(disk, "rw")
        assert toy.result(toy.go(disk / "run", toy.SHORT)) == (place / "expected").read_text()
