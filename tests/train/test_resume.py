"""A run that was killed, stopped or damaged ends as the one that was left alone: bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from frugalbert.run import Stopped
from frugalbert.train import checkpoint, loop
from tests.train import toy


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Result of the uninterrupted run."""
    return toy.result(toy.go(tmp_path_factory.mktemp("whole")))


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that died after its checkpoints of steps 8 and 12, with later lines in its metrics."""
    out = tmp_path_factory.mktemp("half")
    run = toy.make(out)
    steps = run.draw

    def dying(progress: float, samples: dict[str, int], micro_batch: int) -> Any:
        if samples.get("toy", 0) >= 14 * 8:
            raise KeyboardInterrupt
        return steps(progress, samples, micro_batch)

    run.draw = dying
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    assert sorted(path.name for path in run.folder.iterdir()) == ["step-00000008", "step-00000012"]
    return out


def test_the_result_notices_what_it_should(whole: str, tmp_path: Path):
    assert toy.result(toy.go(tmp_path / "again")) == whole
    assert toy.result(toy.go(tmp_path / "seed", toy.changed(seed=4))) != whole
    assert toy.result(toy.go(tmp_path / "dropout", dropout=0.2)) != whole
    assert toy.result(toy.go(tmp_path / "rate", learning_rate=0.021)) != whole


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_killed_at_any_point(name: str, tmp_path: Path):
    """SIGKILL before step phases and file operations, a dozen here and every one in the slow test."""
    assert _kills(tmp_path, 17, name)["points"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon", "lamb"])
def test_killed_at_every_point(name: str, tmp_path: Path):
    assert _kills(tmp_path, 1, name)["points"] > 150


def _kills(folder: Path, every: int, name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.train.kill_points", str(folder), str(every), name]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["same"] == found["points"], found
    return found


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("where", ["step", "validation"])
def test_a_signal_leaves_a_checkpoint(
    whole: str, where: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arrived: list[int] = []
    monkeypatch.setattr(loop, "stop_requested", lambda: arrived[0] if arrived else None)
    run = toy.make(tmp_path)
    if where == "step":
        original = run.objective

        def objective(model: Any, micro: Any, progress: float) -> Any:
            if run.state.step == 6:
                arrived[:] = [number]
            return original(model, micro, progress)

        run.objective = objective
    else:
        validate = run.validate

        def interrupted(pause: Any) -> dict[str, float]:
            arrived[:] = [number] if run.state.step == 10 else []
            assert validate is not None
            return validate(pause)

        run.validate = interrupted
    with pytest.raises(Stopped) as stop:
        loop.train(run)
    assert stop.value.number == number
    reached = 7 if where == "step" else 10
    assert checkpoint.find(run.folder) == reached
    if where == "validation":  # it was not finished, so it is not in the metrics; the continued run makes it
        assert [line["step"] for line in toy.lines(tmp_path) if "validation_loss" in line] == [5]
    arrived.clear()
    assert toy.result(toy.go(tmp_path)) == whole


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


@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_found(half: Path, file: str, tmp_path: Path):
    for index, how in enumerate(DAMAGE * 4):
        folder = tmp_path / f"{how}-{index}"
        shutil.copytree(half / "checkpoints" / "step-00000012", folder)
        assert checkpoint.fault(folder) is None
        damage(folder / file, how, index)
        assert file in (checkpoint.fault(folder) or "")


@pytest.mark.parametrize(
    "how, file", [("flip", "model.safetensors"), ("delete", "manifest.json"), ("empty", "state.json")]
)
def test_a_damaged_checkpoint_falls_back(
    whole: str, half: Path, how: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "run"
    shutil.copytree(half, out)
    damage(out / "checkpoints" / "step-00000012" / file, how, 0)
    run = toy.go(out)
    said = capsys.readouterr().err
    assert said.count("is not used") == 1
    assert file in said
    assert "continuing at step 8" in said
    assert toy.result(run) == whole
    names = {path.name for path in run.folder.iterdir()}
    assert names == {"corrupt-step-00000012", "step-00000016", "step-00000020"}


def test_no_checkpoint_left_is_one_sentence(half: Path, tmp_path: Path):
    out = tmp_path / "run"
    shutil.copytree(half, out)
    for path in (out / "checkpoints").glob("step-*"):
        damage(path / "model.safetensors", "flip", 1)
    for _ in range(2):  # also when they have been renamed before
        with pytest.raises(ValueError, match="--redo run") as error:
            toy.go(out)
        assert "\n" not in str(error.value)


def test_weights_of_another_model_are_refused(half: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = tmp_path / "run"
    shutil.copytree(half, out)
    monkeypatch.setattr(toy, "WIDTH", 4)
    with pytest.raises(ValueError, match=r"words\.weight should have shape \(23, 4\) but is \(23, 8\)"):
        toy.go(out)


def test_disk_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"free some space") as error:
        toy.go(tmp_path / "full")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("at", [1, 2, 5, 8, 13, 17])
def test_a_write_that_fails_keeps_the_checkpoint_before(
    whole: str, half: Path, at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """ENOSPC at the n-th fsync: the run ends with an OSError, and continues once there is room."""
    out, count = tmp_path / "run", [0]
    shutil.copytree(half, out)

    def failing(descriptor: int) -> None:
        count[0] += 1
        if count[0] >= at:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing)
        with pytest.raises(OSError, match="No space left"):
            toy.go(out)
    newest = checkpoint.find(out / "checkpoints")
    assert newest is not None
    assert newest >= 12
    assert not list((out / "checkpoints").glob(".tmp-*"))
    assert toy.result(toy.go(out)) == whole


def test_only_the_last_checkpoints_are_kept_and_a_purge_may_die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = toy.go(tmp_path)
    assert [path.name for path in sorted(run.folder.iterdir())] == ["step-00000016", "step-00000020"]
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *a, **k: None)  # as if killed while deleting
    checkpoint.prune(run.folder, 1)
    monkeypatch.undo()
    assert checkpoint.find(run.folder) == 20
    assert [path.name for path in run.folder.iterdir()] == ["step-00000020"]


def test_markers_fire_once(half: Path, tmp_path: Path):
    """The marker of a lost branch of time stays as it is; the state remembers those that fired."""
    out = tmp_path / "run"
    shutil.copytree(half, out)
    file = out / "markers" / "progress-0.50" / "model.safetensors"
    before = file.stat().st_mtime_ns
    run = toy.go(out)
    assert file.stat().st_mtime_ns == before
    assert run.state.markers == [0.5, 0.9]
    assert sorted(path.name for path in (out / "markers").iterdir()) == ["progress-0.50", "progress-0.90"]
