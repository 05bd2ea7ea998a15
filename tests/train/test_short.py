"""Short trainings: what they return, what they share, cut off and continued, diverged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from frugalbert.config import Machine
from frugalbert.progress import Progress
from frugalbert.run import Stopped
from frugalbert.train import loop, pretrain, short
from tests.train import small_run

RECIPE = {"optimizer": "adamw", "learning_rate": 5e-3, "batch_size": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_run.prepare(tmp_path_factory.mktemp("short"))


def task(inputs: dict[str, Path], work: Path, **values: Any) -> dict[str, Any]:
    fixed = {name: str(path) for name, path in inputs.items()} | {"work": str(work), "device": "cpu", "threads": 1}
    about = {"arch": "modern 1x16 heads=2 ffn=16", "steps": 12, "seed": 0, "looks": 3, "rows": 6, "recipe": RECIPE}
    return {**fixed, **about, **values}


def without_time(result: dict[str, Any] | None) -> dict[str, Any]:
    assert result is not None
    return {key: value for key, value in result.items() if key != "seconds"}


def test_the_lowest_look_counts_and_nothing_is_left(inputs: dict[str, Path], tmp_path: Path):
    found = without_time(short.score(task(inputs, tmp_path)))
    assert len(found["errors"]) == 3
    assert found["error"] == min(found["errors"])
    assert found["errors"][2] < found["errors"][0]
    assert found["half_error"] != found["error"]
    assert found["tokens"] > 12 * 8 * 16
    assert list(tmp_path.iterdir()) == []


def test_it_is_the_pre_training_on_rows_that_validation_does_not_use(inputs: dict[str, Path], tmp_path: Path):
    """`pretrain` on as many rows as to use all says the same of the weights; other rows say something else."""
    everything = without_time(short.score(task(inputs, tmp_path, rows=10_000, looks=1, seed=3)))
    section = short.section_of(task(inputs, tmp_path, rows=10_000, looks=1, seed=3))
    (tmp_path / "pretrain").mkdir()
    stage = pretrain.build(section, inputs, tmp_path / "pretrain", Machine(device="cpu", threads=1))
    assert everything["error"] == pytest.approx(stage["final_validation_loss"], abs=1e-6)
    first = section.model_copy(update={"validation": section.validation.model_copy(update={"rows": 6})})
    (tmp_path / "first").mkdir()
    other = pretrain.build(first, inputs, tmp_path / "first", Machine(device="cpu", threads=1))["final_validation_loss"]
    assert abs(without_time(short.score(task(inputs, tmp_path, looks=1, seed=3)))["error"] - other) > 1e-3


def test_everything_but_the_architecture_is_shared(inputs: dict[str, Path], tmp_path: Path):
    """The same task twice is the same; a seed changes it; recipes do not leak into each other through what is kept."""
    found = [
        without_time(short.score(task(inputs, tmp_path, **values)))
        for values in (
            {},
            {"seed": 1},
            {"recipe": {**RECIPE, "batch_size": 4}},
            {"arch": "modern 1x16 heads=1 ffn=16"},
            {},
        )
    ]
    assert found[0] == found[-1]
    assert len({json.dumps(row) for row in found}) == 4
    short._rows.cache_clear()
    assert without_time(short.score(task(inputs, tmp_path, seed=1))) == found[1], (
        "a seed's own data, whatever came before"
    )
    assert found[0]["tokens"] == found[3]["tokens"] != found[2]["tokens"]


def test_plain_sgd_unless_momentum_is_asked_for(inputs: dict[str, Path], tmp_path: Path):
    plain = short.section_of(task(inputs, tmp_path, recipe={"learning_rate": 0.5}))
    assert (plain.optimizer, plain.betas[0]) == ("sgd", 0.0)
    assert short.section_of(task(inputs, tmp_path)).betas == (0.9, 0.98)
    heavy = short.section_of(task(inputs, tmp_path, recipe={"learning_rate": 0.5, "betas": [0.9, 0.9]}))
    assert heavy.betas == (0.9, 0.9)


def test_cut_off_and_continued_is_the_same(inputs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A signal leaves a checkpoint, from which the next attempt goes on."""
    whole, steps, real = without_time(short.score(task(inputs, tmp_path))), [], loop.take_step

    def step(run: Any) -> None:
        if len(steps) == 7:
            steps.append(-1)
            raise Stopped(15)
        steps.append(run.state.step)
        real(run)

    monkeypatch.setattr(loop, "take_step", step)
    with pytest.raises(Stopped):
        short.score(task(inputs, tmp_path))
    assert without_time(short.score(task(inputs, tmp_path))) == whole
    assert steps == [0, 1, 2, 3, 4, 5, 6, -1, 7, 8, 9, 10, 11]


@pytest.mark.parametrize("rate", [1e8, 1e30])
def test_one_that_diverges_is_none(rate: float, inputs: dict[str, Path], tmp_path: Path):
    recipe = {"optimizer": "sgd", "learning_rate": rate, "batch_size": 8}
    found = short.score(task(inputs, tmp_path, recipe=recipe))
    assert found is None or found["error"] > 10
    assert list(tmp_path.iterdir()) == []


def test_it_is_quiet(
    inputs: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Progress, "every", 0.0)
    short.score(task(inputs, tmp_path))
    assert capfd.readouterr() == ("", "")


def test_rows_that_are_too_long_are_refused(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match="knows 16 positions"):
        short.score(task(inputs, tmp_path, arch="bert 1x16 heads=2 ffn=16 max_length=16"))
