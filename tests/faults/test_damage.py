"""Damaged checkpoints: found, named, put aside, and the one before continues to the same end."""

from __future__ import annotations

import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from frugalbert.train import checkpoint
from tests.faults import rows
from tests.train import toy

DAMAGE = ["flip", "truncate", "empty", "delete", "append"]
FILES = ["model.safetensors", "training.safetensors", "state.json", "config.json", "manifest.json"]


def damage(path: Path, how: str, seed: int) -> None:
    rng, data = random.Random(seed), bytearray(path.read_bytes())
    if how == "flip":
        place = rng.randrange(len(data))
        data[place] ^= 1 << rng.randrange(8)
    elif how == "truncate":
        data = data[: rng.randrange(1, len(data))] if len(data) > 1 else data[:0]
    elif how == "append":
        data += b"\0"
    elif how == "empty":
        data.clear()
    if how == "delete":
        path.unlink()
    else:
        path.write_bytes(data)


def falls_back(out: Path, file: str, how: str, seed: int, said: Any) -> None:
    """With the newest checkpoint damaged, a run continues from the one before, says so once, and ends the same."""
    shutil.copytree(out.parent / "short", out)
    damage(out / "checkpoints" / "step-00000006" / file, how, seed)
    run = toy.go(out, toy.SHORT)
    told = said.readouterr().err
    assert told.count("is not used") == 1
    assert file in told
    assert "continuing at step 4" in told
    assert toy.result(run) == (out.parent / "expected").read_text()
    assert {path.name for path in run.folder.iterdir()} == {"corrupt-step-00000006", "step-00000006", "step-00000008"}
    shutil.rmtree(out)


@pytest.mark.fault("R5")
@pytest.mark.parametrize("how", ["flip", "truncate", "empty", "delete"])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_checkpoint_falls_back(place: Path, how: str, file: str, capsys: pytest.CaptureFixture[str]):
    falls_back(place / "run", file, how, 0, capsys)


@pytest.mark.fault("R4")
def test_a_checkpoint_damaged_at_random_falls_back(place: Path, capsys: pytest.CaptureFixture[str], case: rows.Tally):
    generator = random.Random(rows.chance())
    for seed in range(rows.often(200, 2000)):
        with case():
            falls_back(place / "run", generator.choice(FILES), generator.choice(DAMAGE), seed, capsys)


@pytest.mark.fault("R19")
def test_a_purge_may_be_killed(place: Path, tmp_path: Path, case: rows.Tally):
    """SIGKILL before the n-th file is removed: what is left is whole, and the next purge tidies up."""
    original = os.unlink
    for number in range(20):
        with case():
            folder = tmp_path / str(number)
            for step in (2, 4, 6):
                shutil.copytree(place / "short" / "checkpoints" / "step-00000006", folder / f"step-{step:08d}")
            child = os.fork()
            if child == 0:
                left = [number % 11]

                def unlink(*arguments: Any, left: list[int] = left, **named: Any) -> None:
                    left[0] -= 1
                    if left[0] < 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    original(*arguments, **named)

                os.unlink = unlink
                checkpoint.prune(folder, 1 + number // 11)
                os._exit(0)
            os.waitpid(child, 0)
            assert checkpoint.fault(folder / "step-00000006") is None
            assert all(checkpoint.fault(path) is None for path in folder.glob("step-*"))
            assert checkpoint.find(folder) == 6
            checkpoint.prune(folder, 1)
            assert [path.name for path in folder.iterdir()] == ["step-00000006"]
