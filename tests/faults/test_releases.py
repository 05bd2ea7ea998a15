"""What earlier versions wrote is read, or refused with the way to go on; and tests have no network.

`python -m tests.faults.test_releases tests/golden/release-0.1.tar.xz` keeps what a version writes, at its release.
"""

from __future__ import annotations

import json
import shutil
import socket
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pytest

from frugalbert import doctor, stages, yamlfile
from frugalbert.fanout import Journal
from frugalbert.measure.models import load_model
from frugalbert.run import Stopped
from frugalbert.train import loop
from tests.data.test_corpus import documents
from tests.search import toy

GOLDEN = Path(__file__).parents[1] / "golden"
RELEASES = sorted(path.name for path in GOLDEN.glob("release-*.tar.xz"))
YAML = """
name: old
machine: {device: cpu, threads: 1, workers: 1, compile: false, micro_batch: 4}
corpus: {sources: [texts.txt], held_out: 0.05, min_characters: 20}
tokenizer: {vocab_size: 128, min_frequency: 1}
shards: {length: 32}
pretrain:
  arch: modern 1x16 heads=1 ffn=16 max_length=32
  budget: 8steps
  batch_size: 4
  optimizer: muon
  precision: fp32
  checkpoints: {every: 2steps}
  validation: {rows: 4, every: 0, begin_every: 0, end_every: 0}
report: {}
"""


def write(folder: Path) -> None:
    """A finished run, one that was stopped in training, and a search's journal."""
    (folder / "texts.txt").write_text("\n\n".join(f"{text}." for text in documents(120)))
    (folder / "old.yaml").write_text(YAML)
    config = yamlfile.load(folder / "old.yaml")
    stages.run(config, folder / "finished", folder)
    original = loop.take_step

    def stopping(run: Any) -> None:
        if run.state.step == 5:
            raise Stopped(15)
        original(run)

    shutil.copytree(folder / "finished", folder / "stopped", copy_function=shutil.copy2)
    for name in ("pretrain", "report"):
        shutil.rmtree(folder / "stopped" / name)
    loop.take_step = stopping
    try:
        stages.run(config, folder / "stopped", folder)
    except Stopped:
        pass
    finally:
        loop.take_step = original
    for name in ("finished", "stopped"):
        snapshot = folder / name / stages.SNAPSHOT
        snapshot.write_text(snapshot.read_text().replace(str(folder.resolve()), "/elsewhere"))
    toy.run(toy.Settings("evolution", evaluations=20, population=6, journal=folder / "search.jsonl"))


@pytest.fixture
def old(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    with tarfile.open(GOLDEN / request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.mark.fault("R18")
@pytest.mark.parametrize("old", RELEASES, indirect=True)
def test_a_finished_run_is_read(old: Path):
    statuses = stages.run(yamlfile.load(old / "old.yaml"), old / "finished", old)
    assert {status.state for status in statuses} == {"done"}
    assert load_model(old / "finished" / "pretrain" / "model").config.num_hidden_layers == 1
    assert not [
        one for one in doctor.examine(yamlfile.load(old / "old.yaml"), old / "finished", old) if one.state == "bad"
    ]


@pytest.mark.fault("R18")
@pytest.mark.parametrize("old", RELEASES, indirect=True)
def test_a_stopped_training_goes_on(old: Path, capsys: pytest.CaptureFixture[str]):
    stages.run(yamlfile.load(old / "old.yaml"), old / "stopped", old)
    assert "continuing at step 5" in capsys.readouterr().err
    lines = [[json.loads(line) for line in (old / name / "pretrain" / "metrics.jsonl").read_text().splitlines()]
             for name in ("finished", "stopped")]  # fmt: skip
    losses = [[line["loss"] for line in found if "loss" in line] for found in lines]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


@pytest.mark.fault("R18")
@pytest.mark.parametrize("old", RELEASES, indirect=True)
def test_a_journal_is_continued(old: Path):
    with Journal(old / "search.jsonl") as journal:
        known = len(journal.entries)
    settings = toy.Settings("evolution", evaluations=20, population=6, journal=old / "search.jsonl")
    assert toy.run(settings, of=lambda archs: pytest.fail("scored again")).stopped == "evaluations"
    assert known == 21


@pytest.mark.fault("R20")
@pytest.mark.parametrize("address", [("192.0.2.1", 80), ("2001:db8::1", 80)])
def test_there_is_no_network(address: tuple[str, int]):
    from tests.faults import plugin

    family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
    with socket.socket(family) as one, pytest.raises(ConnectionRefusedError, match="no network"):
        one.connect(address)
    assert plugin.refused
    plugin.refused.clear()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made, tarfile.open(sys.argv[1], "w:xz") as made_archive:
        write(Path(made))
        for path in sorted(Path(made).iterdir()):
            made_archive.add(path, path.name)
