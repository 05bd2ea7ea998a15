"""Data, fine-tuning and search, killed anywhere; any work, asked to stop: it ends as if it had been left alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.faults import rows
from tests.faults.test_kills import kill_points, survived, together

WORK = {"corpus": 40, "shards": 40, "pairs": 40, "search": 40, "fine-tuning": 24, "agora": 6}
"""How many of all points in `make test`."""
WHERE = {"adamw": "accumulate,whole_weights,_validation", "pretraining": "settle", "corpus": "clean"}
"""In a step, within a save, in an evaluation; in warm-up; while data are prepared."""


@pytest.mark.fault("R1")
@pytest.mark.parametrize("kinds", together(WORK), ids=lambda kinds: "-".join(kinds))
def test_killed_anywhere_it_ends_the_same(kinds: dict[str, int], root: Path, tmp_path: Path, case: rows.Tally):
    survived(kill_points(root, tmp_path, [(work, points, []) for work, points in kinds.items()]), case)


@pytest.mark.fault("R3")
def test_asked_to_stop_it_goes_on_to_the_same_end(root: Path, tmp_path: Path, case: rows.Tally):
    """SIGTERM, SIGINT and SIGUSR1, once and twice."""
    once = [(work, points, [number]) for work, points in WHERE.items() for number in (15, 2, 10)]
    twice = [("adamw", "accumulate", numbers) for numbers in ([15, 15], [10, 10], [2, 15])]
    survived(kill_points(root, tmp_path, once + twice), case)
