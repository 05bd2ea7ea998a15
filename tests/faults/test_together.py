"""Several processes at once: on the same data, and workers that are killed while others wait for them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from frugalbert.fanout import Journal, run_tasks
from tests.faults import rows


@pytest.mark.fault("R15")
def test_the_same_data_are_built_once(root: Path, tmp_path: Path, case: rows.Tally):
    rounds = rows.often(10, 200)
    command = [sys.executable, "-m", "tests.faults.together", str(tmp_path), str(rounds), str(rows.chance())]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    case.add(found["rounds"], found["same"])
    assert found["same"] == rounds, done.stderr


def deadly(task: dict[str, str | int]) -> int:
    """Kills its process the first time it is called with an even number."""
    mark = Path(f"{task['log']}-{task['n']}")
    with mark.open("a") as file:
        file.write("x")
    if int(task["n"]) % 2 == 0 and mark.read_text() == "x":
        os.kill(os.getpid(), signal.SIGKILL)
    return int(task["n"])


@pytest.mark.fault("R21")
def test_every_second_task_kills_its_worker(tmp_path: Path, case: rows.Tally):
    """Each task is done, its result is there once, and none is done again that was journalled."""
    count = rows.often(20, 200)
    tasks = [{"n": number, "log": str(tmp_path / "log")} for number in range(count)]
    assert run_tasks(deadly, tasks, journal=tmp_path / "j", workers=2) == list(range(count))
    with Journal(tmp_path / "j") as journal:
        found = [entry["result"] for entry in journal.entries]
    for number in range(0, count, 2):
        with case():
            assert found.count(number) == 1
            assert len((tmp_path / f"log-{number}").read_text()) >= 2
