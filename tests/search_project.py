"""Runs with a search at toy size through the command line, on a machine that times encoders by their sizes."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from frugalbert import run as files
from frugalbert.cli import app
from frugalbert.measure import table
from frugalbert.model.arch import Arch
from frugalbert.model.cost import forward_flops
from tests.test_pipeline import DATA, _write_project

HEAD = f"""
name: search
machine: {{device: cpu, threads: 1, workers: 1, compile: false, micro_batch: 8}}
{DATA}
shards: {{length: 32}}
"""
"""The first sections of every such run."""


def milliseconds(arch: Arch) -> float:
    return 0.5 + 0.2 * len(arch.layers) + 16 * forward_flops(arch, 16) / 3e5


def fake_timing(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for text in task["archs"]:
        yield {"arch": text, "median_ms": milliseconds(Arch.parse(text)), "reference_ms": 1.0, "spread": 0.0,
               "noisy": False}  # fmt: skip


def call(folder: Path, *words: str) -> tuple[int, str]:
    """Exit code and output of `frugalbert run search.yaml …` in `folder`."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    handlers, here = [signal.getsignal(number) for number in numbers], Path.cwd()
    os.chdir(folder)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(table, "time_apart", fake_timing)
            patch.setattr(files, "_signal", None)
            result = CliRunner().invoke(app, ["run", "search.yaml", *words])
    finally:
        os.chdir(here)
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
    return result.exit_code, result.output


def finished_run(folder: Path, yaml: str) -> Path:
    """`folder` with search.yaml and its finished run; `said` holds what was printed."""
    _write_project(folder)
    (folder / "search.yaml").write_text(yaml)
    code, said = call(folder)
    assert code == 0, said
    (folder / "said").write_text(said)
    return folder


def copy_without_search(finished: Path, folder: Path) -> Path:
    """A copy of the run in which search and what follows have not begun."""
    shutil.copytree(finished, folder, copy_function=shutil.copy2)
    for stage in ("search", "pretrain", "report"):
        shutil.rmtree(run_of(folder) / stage)
    return folder


def run_of(folder: Path) -> Path:
    return folder / "runs" / "search"


def nothing_half_written(folder: Path) -> bool:
    out = run_of(folder) / "search"
    return not (out / "stage.json").exists() and not (out / "model").exists() and not list(out.rglob(".tmp-*"))


def one_sentence(code: int, said: str) -> str:
    assert code == 2, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in said
    return lines[0]
