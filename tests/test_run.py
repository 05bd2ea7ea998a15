"""The run directory's parts: atomic files, identities, the lock, progress."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from frugalbert import lock, run
from frugalbert.lock import Lock
from frugalbert.progress import Progress, duration, number
from tests.faults.rows import often


@pytest.mark.fault("R7")
def test_write_atomic_replaces_or_leaves(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    run.write_json(path, {"a": 1})
    assert run.read_json(path) == {"a": 1}

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        run.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [item.name for item in tmp_path.iterdir()] == ["file.json"]


def test_nan_is_not_written_and_damage_is_named(tmp_path):
    with pytest.raises(ValueError, match="Out of range"):
        run.write_json(tmp_path / "x.json", {"loss": float("nan")})
    (tmp_path / "x.json").write_text('{"a": 1')
    with pytest.raises(ValueError, match=r"x\.json is damaged"):
        run.read_json(tmp_path / "x.json")


def test_publish_is_all_or_nothing(tmp_path):
    target = tmp_path / "checkpoint"
    with run.publish(target) as work:
        (work / "weights").write_text("1")
    with pytest.raises(RuntimeError), run.publish(target) as work:
        (work / "weights").write_text("half")
        raise RuntimeError
    assert (target / "weights").read_text() == "1"
    with run.publish(target) as work:
        (work / "weights").write_text("2")
    assert (target / "weights").read_text() == "2"
    assert [item.name for item in tmp_path.iterdir()] == ["checkpoint"]


def test_identity_follows_the_content_and_reuses_known_hashes(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text("one")
    first = run.identify(tmp_path, {})
    assert run.identify(tmp_path, first) == first
    marked = {key: [*value[:2], "known"] for key, value in first.items()}
    assert run.identify(tmp_path, marked)[str(file)][2] == "known"
    file.write_text("two!")
    assert run.identify(tmp_path, first)[str(file)][2] != first[str(file)][2]


def test_fingerprint_ignores_key_order_only():
    assert run.fingerprint({"a": 1, "b": 2}) == run.fingerprint({"b": 2, "a": 1})
    assert run.fingerprint({"a": 1, "b": 2}) != run.fingerprint({"a": 2, "b": 1})


def test_drift_names_what_changed():
    record = {"stage": "shards", "section": {"length": [128], "mask": {"rate": 1}}, "inputs": {"corpus": "x", "t": "y"}}
    assert run.drift(record, {"length": [128], "mask": {"rate": 1}}, {"corpus": "x", "t": "y"}) == []
    lines = run.drift(record, {"length": [64], "mask": {"rate": 1}}, {"corpus": "z", "new": "y"})
    assert lines == [
        "shards.length: [128] -> [64]",
        "shards input corpus: changed",
        "shards input new: new",
        "shards input t: gone",
    ]


def test_a_sealed_file_is_what_was_written_or_damaged(tmp_path):
    value = {"stage": "a", "rate": 1e-3, "list": [1, "ü", None], "chosen": "modern 4x256"}
    path = tmp_path / "sealed.json"
    run.write_sealed(path, value)
    assert run.read_sealed(path, "mend it") == value
    data, damaged = path.read_bytes(), 0
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        path.write_bytes(flipped)
        try:
            found = run.read_sealed(path, "mend it")
        except ValueError as error:
            assert str(error) == f"{path} is damaged; mend it"
            damaged += 1
        else:  # white space, or the name of the checksum
            assert {key: found[key] for key in value} == value
    assert damaged > 6 * len(data)
    for text in ("[" * 200_000, "[]", "", '{"checksum": {}}'):
        path.write_text(text)
        with pytest.raises(ValueError, match="is damaged; mend it"):
            run.read_sealed(path, "mend it")


def test_what_trackers_write_is_not_watched(tmp_path):
    (tmp_path / "trackers").mkdir()
    for name in ("trackers/events", "model.json"):
        (tmp_path / name).write_text("1")
    found = run.outputs(tmp_path)
    assert list(found) == ["model.json"]
    (tmp_path / "trackers" / "events").write_text("more")
    assert run.altered(tmp_path, {"outputs": found | {"trackers/events": [1, "of an earlier version"]}}) == []


HOLD = """
import sys, time
from pathlib import Path
from frugalbert.lock import Lock
try:
    with Lock(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except ValueError:
    print("refused", flush=True)
"""


def _holder(directory: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_and_a_dead_one_is_replaced(tmp_path):
    process = _holder(tmp_path)
    with pytest.raises(ValueError, match=f"in use by process {process.pid}"), Lock(tmp_path):
        pass
    process.kill()
    process.wait()
    assert (tmp_path / "lock").exists()
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock").exists()


def test_a_lock_of_another_host_is_respected(tmp_path):
    (tmp_path / "lock").write_text(json.dumps({**lock._myself(), "host": "elsewhere", "pid": 1}))
    with pytest.raises(ValueError, match="on elsewhere"), Lock(tmp_path):
        pass


@pytest.mark.fault("R14")
def test_of_many_starters_one_wins(tmp_path, case):
    for index in range(often(20, 100)):
        command = [sys.executable, "-c", HOLD, str(tmp_path / str(index))]
        (tmp_path / str(index)).mkdir()
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        starters = [subprocess.Popen(command, **pipes) for _ in range(3)]
        words = [starter.stdout.readline().strip() for starter in starters]
        for starter in starters:
            starter.communicate("\n")
        with case():
            assert sorted(words) == ["held", "refused", "refused"]


@pytest.mark.fault("R14")
def test_locks_of_the_dead_are_taken(tmp_path, case):
    """Of a process that is gone, of one whose number another process has now, of one before the machine was started."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    kinds = [{"pid": gone.pid}, {"started": "1"}, {"boot": "another"}]
    for index in range(21):
        with case():
            (tmp_path / "lock").write_text(json.dumps({**lock._myself(), **kinds[index % 3]}))
            with Lock(tmp_path):
                assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
            assert not (tmp_path / "lock").exists()


SIGNALLED = """
import os, signal, sys
from frugalbert import run
run.catch_signals()
assert run.stop_requested() is None
os.kill(os.getpid(), getattr(signal, sys.argv[1]))
try:
    run.check_stop()
except run.Stopped as stop:
    sys.exit(128 + stop.number)
"""


@pytest.mark.fault("R3")
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGUSR1", 138)])
def test_signals_become_a_flag(name, code):
    assert subprocess.run([sys.executable, "-c", SIGNALLED, name], check=False).returncode == code


def test_progress_off_a_terminal_is_plain_lines(capsys):
    progress = Progress("tokenise", 200, "documents")
    progress.every = 0.0
    with progress:
        progress.update(50)
        progress.update(100, loss=3.14159)
    lines = capsys.readouterr().err.strip().split("\n")
    assert len(lines) == 2
    assert lines[1].startswith("tokenise: 50% · 100 of 200 documents · ")
    assert lines[1].endswith("loss 3.142")
    assert "\r" not in lines[1]


@given(st.floats(0, 170_000))
def test_durations_read_back(seconds):
    parts = duration(seconds).split()
    units = {"s": 1, "min": 60, "h": 3600}
    total = sum(float(value) * units[unit] for value, unit in zip(parts[::2], parts[1::2], strict=True))
    assert abs(total - seconds) <= (60 if seconds >= 3600 else 0.51)


def test_numbers_are_short():
    assert [number(value) for value in (12, 12_700, 3.14159, 2.5e9, "x", True)] == [
        "12",
        "12.7k",
        "3.142",
        "2.5G",
        "x",
        "True",
    ]


def test_sweep_removes_what_killed_writers_left(tmp_path):
    (tmp_path / "stage" / ".tmp-model-x").mkdir(parents=True)
    (tmp_path / "stage" / ".tmp-model-x" / "half").write_text("")
    (tmp_path / ".tmp-run.yaml-y").write_text("")
    (tmp_path / "stage" / "kept").write_text("")
    run.sweep(tmp_path)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["stage", "stage/kept"]
