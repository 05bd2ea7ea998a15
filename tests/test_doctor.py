"""`frugalbert doctor`: what it says of machines and runs, and that it finds every kind of damage without mending it."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from frugalbert import cli, doctor, lock, stages
from frugalbert.config import Config, Machine
from tests.structure import ROOT
from tests.train import small_run

YAML: dict[str, Any] = {
    "name": "sick", "corpus": {"sources": ["texts.txt"], "held_out": 0.1}, "tokenizer": {"vocab_size": 256},
    "shards": {"length": 32}, "machine": {"device": "cpu", "threads": 1, "micro_batch": 4},
    "pretrain": small_run.SECTION,
}  # fmt: skip


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; `folder/run`, its texts beside it."""
    folder = tmp_path_factory.mktemp("healthy")
    own = (ROOT / "README.md").read_text(encoding="utf-8")
    (folder / "texts.txt").write_text("\n\n".join([*small_run.sentences(400), own]))
    stages.run(Config.model_validate(YAML), folder / "run", folder)
    return folder


@pytest.fixture
def run(healthy: Path, tmp_path: Path) -> Path:
    return shutil.copytree(healthy / "run", tmp_path / "run")


def findings(run: Path, **sections: Any) -> list[doctor.Finding]:
    return list(doctor.examine(Config.model_validate(YAML | sections), run, stages.folder_of(run)))


def bad(run: Path) -> list[str]:
    return [finding.text for finding in findings(run) if finding.state == "bad"]


def test_a_sound_run(run: Path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert [(finding.what, finding.state) for finding in findings(run)] == [
        (name, "ok") for name in ("corpus", "tokenizer", "shards", "pretrain")
    ]
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_every_file_is_watched(run: Path):
    """One flipped bit in any file that a stage leaves is found, and the file is named."""
    watched = [path for path in sorted(run.rglob("*")) if path.is_file() and path.name != "run.yaml"]
    assert len(watched) > 20
    for path in watched:
        data = path.read_bytes()
        if not data:
            continue
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        stamp = path.stat().st_mtime_ns
        path.write_bytes(flipped)
        os.utime(path, ns=(stamp + 1, stamp + 1))
        said = bad(run)
        assert said, path
        named = path.relative_to(run).as_posix() if "checkpoints" not in path.parts else path.name
        assert any(named in text or path.name in text or "index" in text for text in said), (path, said)
        path.write_bytes(data)
        os.utime(path, ns=(stamp + 2, stamp + 2))
    assert bad(run) == []


def test_missing_and_torn_files(run: Path):
    (run / "pretrain" / "model" / "model.safetensors").unlink()
    (run / "tokenizer" / "tokenizer.json").write_text("{")
    said = bad(run)
    assert "pretrain/model/model.safetensors is missing" in said
    assert any(text.startswith("tokenizer/tokenizer.json has 1 bytes instead of ") for text in said)


def test_a_stage_does_not_begin_on_damaged_inputs(run: Path):
    stages._move_aside(Config.model_validate(YAML), run, "pretrain")
    (run / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizer/tokenizer.json has 2 bytes .* after tokenizer was done; restore it"
    ):
        stages.run(Config.model_validate(YAML), run, stages.folder_of(run))


def test_it_says_what_the_next_run_does(run: Path):
    told = {finding.what: finding.text for finding in findings(run)}
    assert told["pretrain"] == "done; the next run skips it"
    changed = {"pretrain": {**small_run.SECTION, "learning_rate": 1e-3}}
    found = findings(run, **changed)[-1]
    assert (found.state, found.what) == ("bad", "pretrain")
    assert "pretrain.learning_rate: 0.005 -> 0.001" in found.text
    assert "--redo pretrain or --keep pretrain" in found.text

    record = json.loads((run / "pretrain" / "stage.json").read_text())
    (run / "pretrain" / "stage.part.json").write_text(json.dumps(record))
    (run / "pretrain" / "stage.json").unlink()
    newest = max((run / "pretrain" / "checkpoints").glob("step-*"))
    assert findings(run)[-1].text == f"begun; the next run goes on from step {int(newest.name[5:]):,}"
    (newest / "state.json").write_text("{")
    *_, damage, after = findings(run)
    assert "/state.json has 1 bytes instead of " in damage.text.replace(": ", "/")
    assert damage.text.endswith("; the one before it will serve")
    assert "goes on from step" in after.text
    begun = YAML | {"pretrain": {**small_run.SECTION, "learning_rate": 1e-3}}
    found = findings(run, **begun)[-1]
    assert found.state == "bad"
    assert found.text.endswith("the next run stops until --redo pretrain is given")
    for path in (run / "pretrain" / "checkpoints").glob("step-*"):
        (path / "state.json").write_text("{")
    said = bad(run)
    assert said
    assert all(text.endswith("none before it is sound: --redo pretrain") for text in said)
    for path in list((run / "pretrain" / "checkpoints").glob("step-*")):
        path.rename(path.with_name(f"corrupt-{path.name}"))
    assert bad(run) == ["all its checkpoints are damaged; --redo pretrain begins it again"]
    shutil.rmtree(run / "pretrain")
    assert findings(run)[-1].text == "not begun; the next run does it"


def test_half_of_a_cheap_stage_is_done_again_without_asking(run: Path):
    (run / "shards" / "stage.json").rename(run / "shards" / "stage.part.json")
    [found] = [found for found in findings(run, shards={"length": 64}) if found.what == "shards"]
    assert found.state == "ok"
    assert found.text.startswith("out of date (shards.length: ")


def test_looking_changes_nothing(run: Path, healthy: Path):
    """Not the lock of a dead process, and no log of what was found."""
    (run / "lock").write_text(json.dumps({**lock._myself(), "boot": "another"}))
    (run / "tokenizer" / "tokenizer.json").write_text("{")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for _ in range(2):
        done = CliRunner().invoke(cli.app, ["doctor", str(run), "--quick"])
        assert done.exit_code == 2
        assert "error: 1 finding to mend" in done.output
        assert "its process is dead; the next run takes it over" in done.output
        assert "run.log" not in done.output
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_leftovers_are_notes(run: Path):
    (run / "lock").write_text(json.dumps({"host": "elsewhere", "pid": 7}))
    (run / "pretrain" / "checkpoints" / "corrupt-step-00000001").mkdir()
    (run / "run.log").write_text("Traceback")
    notes = [finding for finding in findings(run) if finding.state == "note"]
    assert [finding.what for finding in notes] == ["lock", "damage", "log"]
    assert "in use by process 7 on elsewhere" in notes[0].text


def test_the_machine(tmp_path: Path):
    found = {finding.what: finding for finding in doctor.machine(tmp_path / "not" / "yet", Machine(), quick=True)}
    assert {"packages", "extras", "processor", "GPU", "disk", "hub"} <= {name.split()[0] for name in found}
    assert not [finding for finding in found.values() if finding.state == "bad"]
    assert "torch 2." in found["packages"].text


def test_what_the_machine_lacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch>=99", "nowhere>=1", "pytest>=1; extra == 'dev'"])
    said = [finding.text for finding in doctor._packages()]
    assert said[0].endswith("pip install 'torch>=99'")
    assert said[1] == "nowhere is missing; pip install 'nowhere'"
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "offline (HF_HUB_OFFLINE" in list(doctor.machine(tmp_path, Machine(), quick=True))[-1].text

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    disk = [finding for finding in doctor._disk(tmp_path) if finding.state == "bad"]
    assert "Invalid cross-device link; choose another directory with --dir" in disk[0].text


@pytest.mark.parametrize(
    ("code", "state", "said"),
    [
        ("print(1.0)", "ok", "works on cpu"),
        ("print(0.0)", "bad", "wrong numbers"),
        ("raise ValueError('no compiler')", "note", "does not work on cpu (ValueError: no compiler); slow"),
        ("import os; os._exit(9)", "note", "nothing was said"),
        ("import time; time.sleep(60)", "note", "takes more than 1 s"),
    ],
)
def test_trials_that_fail(code: str, state: str, said: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(doctor, "SECONDS", 1 if "sleep" in code else 60)
    found = doctor._tried("x", code, "cpu", lambda value: value > 0.5, "slow")
    assert found.state == state
    assert said in found.text


def test_the_verb(run: Path):
    call = CliRunner().invoke(cli.app, ["doctor", str(run), "--quick"])
    assert call.exit_code == 0, call.output
    assert "pretrain        done; the next run skips it" in call.output
    (run / "pretrain" / "model" / "model.safetensors").write_bytes(b"")
    call = CliRunner().invoke(cli.app, ["doctor", str(run), "--quick"])
    assert call.exit_code == 2
    assert "error: 1 finding to mend" in call.output
    nowhere = CliRunner().invoke(cli.app, ["doctor", "nowhere.yaml", "--quick"])
    assert nowhere.exit_code == 2
