"""Minutes of coverage-guided fuzzing of what reads files of others; in `make torture`."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.faults import rows

TARGETS = ("wikiextractor", "jsonl", "csv", "text", "wikipedia-xml", "submissions")


@pytest.mark.slow
@pytest.mark.fault("R23")
@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed (pip install 'frugalbert[fuzz]')")
@pytest.mark.parametrize("target", TARGETS)
def test_any_input_is_read_or_refused(target: str, root: Path, tmp_path: Path, case: rows.Tally):
    command = [sys.executable, "-m", "tests.faults.fuzz_targets", target, "120", str(rows.chance() + 1), str(tmp_path)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=900)
    said = done.stdout + done.stderr
    count = re.search(r"stat::number_of_executed_units:\s*(\d+)", said)
    tried = int(count[1]) if count else 1
    case.add(tried, tried - (done.returncode != 0))
    assert done.returncode == 0, said[-3000:]
