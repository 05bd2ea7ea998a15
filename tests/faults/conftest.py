"""A short training that died, from which many tests go on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train import toy


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """A kill loses nothing that the system has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`short`: a run that died after its checkpoints of steps 4 and 6 of 8; `expected`: how it ends."""
    folder = tmp_path_factory.mktemp("short")
    (folder / "expected").write_text(toy.result(toy.go(folder / "whole", toy.SHORT)))
    toy.cut_off(toy.make(folder / "short", toy.SHORT), 7)
    return folder
