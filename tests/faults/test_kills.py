"""Every kind of work, killed anywhere, ends as if it had been left alone: bit for bit. Here: trainings."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.faults import rows

TRAININGS = {"adamw": 48, "muon": 32, "pretraining": 16, "distillation": 16, "super-network": 16, "attention masks": 16}
"""How many of all points in `make test`."""
KINDS = 13


def together(kinds: dict[str, int]) -> list[dict[str, int]]:
    """All in one process, which imports once; in `make torture` one after the other, as time allows."""
    return [kinds] if rows.seed is None else [{name: 400} for name in kinds]


def kill_points(root: Path, folder: Path, tasks: list[tuple[str, int | str, list[int]]]) -> dict[str, dict[str, Any]]:
    """What came of each kind of work; its last entry counts if a name comes twice."""
    given = json.dumps([[work, str(points), signals] for work, points, signals in tasks])
    seconds = str(60.0 * (rows.minutes or 600.0) / KINDS)  # half of the time of two cores
    command = [sys.executable, "-m", "tests.faults.kill_points", str(folder), str(rows.chance()), seconds, given]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=7200)
    assert done.returncode == 0, done.stderr
    return {f"{number} {work}": found for number, (work, found) in enumerate(map(json.loads, done.stdout.splitlines()))}


def survived(found: dict[str, dict[str, Any]], case: rows.Tally) -> None:
    for one in found.values():
        case.add(one["points"], one["same"])
    assert not {work: one["lost"] for work, one in found.items() if one["lost"]}


@pytest.mark.fault("R1")
@pytest.mark.parametrize("kinds", together(TRAININGS), ids=lambda kinds: "-".join(kinds))
def test_killed_anywhere_a_training_ends_the_same(kinds: dict[str, int], root: Path, tmp_path: Path, case: rows.Tally):
    survived(kill_points(root, tmp_path, [(work, points, []) for work, points in kinds.items()]), case)


@pytest.mark.fault("R1")
@pytest.mark.slow
def test_killed_anywhere_lamb_ends_the_same(root: Path, tmp_path: Path, case: rows.Tally):
    survived(kill_points(root, tmp_path, [("lamb", 400, [])]), case)
