"""The counting itself: a lost case is lost, one that takes too much is, too, and too few tries fail."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"]
FILE = """
import pytest
from hypothesis import given, strategies
from tests.faults import rows

@pytest.mark.fault("R5")
def test_two_of_three(case):
    for number in range(3):
        with case():
            assert number < 2

@pytest.mark.fault("R8")
@given(strategies.integers())
def test_every_example(number):
    assert isinstance(number, int)

@pytest.mark.fault("S4")
def test_hostile(monkeypatch):
    bytearray(64 << 20)

@pytest.mark.fault("S3")
@pytest.mark.parametrize("least", [0, 1 << 30])
def test_bounds(case, monkeypatch, least):
    monkeypatch.setattr(rows, "MOST", rows.Cost(60.0, 1 << 20 if least else 1 << 30))
    with case():
        held = bytearray(b"x") * (32 << 20)

@pytest.mark.fault("R18")
def test_alone(): pass

@pytest.mark.fault("R7")
def test_not_here():
    pytest.skip("no rights")
"""


def test_what_is_lost_is_counted(root: Path, tmp_path: Path):
    (tmp_path / "test_it.py").write_text(FILE)
    out = tmp_path / "found.json"
    command = [*PYTEST, "-p", "tests.faults.plugin", "--rootdir", str(tmp_path), "-c", str(root / "pyproject.toml")]
    command += ["--faults", "--faults-json", str(out), str(tmp_path / "test_it.py")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    found = {line["row"]: line for line in json.loads(out.read_text())["rows"]}
    counts = {row: (line["tried"], line["survived"], line["lost"]) for row, line in found.items() if line["tried"]}
    assert counts.pop("R8")[2] == 0
    assert counts == {"R5": (3, 2, 1), "S4": (1, 1, 0), "S3": (2, 1, 1), "R18": (1, 1, 0)}
    assert found["R7"]["skipped"]
    assert found["S3"]["most_mb"] >= 30
    assert "due" in done.stdout
    assert " R11      0      0    0" in done.stdout
    assert "(mark: 20)" in done.stdout


def test_too_few_tries_fail(root: Path):
    done = subprocess.run(
        [*PYTEST, "--faults", "tests/test_size.py"], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert "passed" in done.stdout, done.stdout + done.stderr
    assert done.returncode == 1


BOUNDS = """
import time
import numpy, pytest
from tests.faults import rows
with rows.within(rows.Cost(60.0, 256 << 20)) as took:
    numpy.ones(16 << 20)  # 128 MB, given back before the end
assert took.memory > 100 << 20
with pytest.raises(AssertionError, match="MB; at most 32 are due"), rows.within(rows.Cost(60.0, 32 << 20)):
    numpy.ones(16 << 20)
with pytest.raises(AssertionError, match="s; at most"), rows.within(rows.Cost(0.01, 1 << 30)):
    time.sleep(0.02)
"""


def test_time_and_memory_are_bounded(root: Path):
    """In a process of its own: one that has kept what it freed would take nothing."""
    done = subprocess.run([sys.executable, "-c", BOUNDS], cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
