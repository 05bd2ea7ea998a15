"""A run that was killed, stopped or damaged ends as the one that was left alone: bit for bit."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from frugalbert.run import Stopped
from frugalbert.train import checkpoint, loop, state
from tests.faults.test_damage import DAMAGE, FILES, damage
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
    toy.cut_off(run, 14)
    assert sorted(path.name for path in run.folder.iterdir()) == ["step-00000008", "step-00000012"]
    return out


def test_the_result_notices_what_it_should(whole: str, tmp_path: Path):
    assert toy.result(toy.go(tmp_path / "again")) == whole
    assert toy.result(toy.go(tmp_path / "seed", toy.changed(seed=4))) != whole
    assert toy.result(toy.go(tmp_path / "dropout", dropout=0.2)) != whole
    assert toy.result(toy.go(tmp_path / "rate", learning_rate=0.021)) != whole


@pytest.mark.fault("R3")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
@pytest.mark.parametrize("where", ["step", "validation"])
def test_a_signal_leaves_a_checkpoint(
    whole: str, where: str, number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    arrived: list[int] = []
    for module in (loop, state):
        monkeypatch.setattr(module, "stop_requested", lambda: arrived[0] if arrived else None)
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


@pytest.mark.parametrize("file", FILES)
def test_any_damage_is_found(half: Path, file: str, tmp_path: Path):
    for index, how in enumerate(DAMAGE * 4):
        folder = tmp_path / f"{how}-{index}"
        shutil.copytree(half / "checkpoints" / "step-00000012", folder)
        assert checkpoint.fault(folder) is None
        damage(folder / file, how, index)
        assert file in (checkpoint.fault(folder) or "")


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


@pytest.mark.fault("R7")
@pytest.mark.parametrize("at", range(1, 18))
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


def test_only_the_last_checkpoints_are_kept(tmp_path: Path):
    run = toy.go(tmp_path)
    assert [path.name for path in sorted(run.folder.iterdir())] == ["step-00000016", "step-00000020"]


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
