"""Shared by all tests: one thread per process, no network, quiet libraries, and where the optional real data lie."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Before anything imports torch: two test processes on two cores must not fight over threads.
for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(variable, "1")
for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"):
    os.environ.setdefault(variable, "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.update(NO_COLOR="1", COLUMNS="120")  # command-line output is the same on every terminal
os.environ.pop("FORCE_COLOR", None)

# The same examples on every machine, and no clock: a busy core must not fail a test.
settings.register_profile("frugalbert", derandomize=True, deadline=None)
settings.register_profile("torture", deadline=None, database=None)
settings.load_profile("frugalbert")

pytest_plugins = ["tests.faults.plugin"]

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (Wikipedia, GLUE); tests that need it are skipped where it is absent."""
    path = Path(os.environ.get("FRUGALBERT_DATA", ROOT.parent / "shared" / "data"))
    if not path.is_dir():
        pytest.skip(f"no real data at {path} (FRUGALBERT_DATA names another place)")
    return path
