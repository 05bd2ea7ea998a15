"""Several processes train as one: same losses, same weights, one clock, stops together. Gloo on this machine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.train import ranks, toy

ROOT = Path(__file__).resolve().parents[2]


def start(folder: Path, world: int, **options: Any) -> list[subprocess.Popen[str]]:
    """A process for every rank."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = options.pop("command", [sys.executable, "-m", "tests.train.ranks", str(folder), json.dumps(options)])
    processes = []
    for rank in range(world):
        places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": port}
        variables = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in places.items()}}
        processes.append(
            subprocess.Popen(
                command, cwd=ROOT, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        )
    return processes


def launch(folder: Path, world: int, **options: Any) -> list[dict[str, Any]]:
    """What every rank ended with. One that fails ends the others, which would wait for it."""
    processes = start(folder, world, **options)

    def end(process: subprocess.Popen[str]) -> tuple[str, str]:
        try:
            return process.communicate(timeout=600)
        finally:
            if process.returncode:
                for other in processes:
                    other.kill()

    with ThreadPoolExecutor(world) as pool:
        try:
            ends = list(pool.map(end, processes))
        finally:
            for process in processes:
                process.kill()
    assert not any(process.returncode for process in processes), "\n".join(error for _, error in ends)
    return [json.loads(out.splitlines()[-1]) for out, _ in ends if out]


def alone(folder: Path, **options: Any) -> dict[str, Any]:
    """The same in this process."""
    return ranks.main(folder, options)


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in toy.lines(folder) if "loss" in line]


def assert_equal(one: dict[str, Any], other: dict[str, Any], atol: float) -> None:
    for name, weights in one["weights"].items():
        np.testing.assert_allclose(weights, other["weights"][name], rtol=0, atol=atol)


def test_stage_after_stage_while_rank_0_is_late(tmp_path: Path):
    """Rank 1 begins the next group while rank 0 still closes the last one."""
    code = (
        "import os, time; from frugalbert import dist; from frugalbert.config import Machine;"
        "machine = Machine(device='cpu', threads=1); ends = []\n"
        "for stage in range(4):\n"
        "    with dist.ranks(machine):\n"
        "        ends += dist.agree([10.0 * stage + dist.rank()])\n"
        "        collect = dist.gc.collect\n"
        "        dist.gc.collect = lambda: dist.is_main() and time.sleep(0.3)\n"
        "    dist.gc.collect = collect\n"
        "print(ends)"
    )
    assert launch(tmp_path, 2, command=[sys.executable, "-c", code]) == [[1.0, 11.0, 21.0, 31.0]] * 2


@pytest.mark.fault("R12")
def test_two_ranks_equal_one(tmp_path: Path):
    """The same global batches, unequal counts on the ranks, clocks that run at different speeds."""
    one = alone(tmp_path / "one")
    pair = launch(tmp_path / "two", 2)
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=1e-9)
    assert len(losses(tmp_path / "one")) == 20
    for rank in pair:
        assert (rank["step"], rank["samples"], rank["tokens"]) == (20, one["samples"], one["tokens"])
        assert_equal(rank, one, 1e-9)
    assert pair[0]["seconds"] == pair[1]["seconds"]


@pytest.mark.fault("R13")
def test_rank_0_decides_when_the_time_is_over(tmp_path: Path):
    first, second = launch(tmp_path, 2, budget="120s")
    assert first["step"] == second["step"] > 20
    assert_equal(first, second, 0.0)


@pytest.mark.fault("R12")
def test_a_signal_to_one_rank_stops_all_and_another_number_goes_on(tmp_path: Path):
    """SIGTERM reaches rank 1 only; both stop after that step with a checkpoint, which one rank finishes."""
    one = alone(tmp_path / "one")
    pair = launch(tmp_path / "run", 2, signal_rank_1_at=7)
    assert [(rank["stopped"], rank["step"]) for rank in pair] == [(True, 8)] * 2
    resumed = alone(tmp_path / "run")
    assert (resumed["stopped"], resumed["step"]) == (False, 20)
    assert_equal(resumed, one, 1e-9)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=0, atol=1e-9)


@pytest.mark.fault("R12")
@pytest.mark.parametrize(("first", "then"), [(2, 4), (4, 2)])
def test_other_numbers_of_ranks_go_on(first: int, then: int, tmp_path: Path):
    one = alone(tmp_path / "one")
    stopped = launch(tmp_path / "run", first, signal_rank_1_at=7)
    assert [(rank["stopped"], rank["step"]) for rank in stopped] == [(True, 8)] * first
    for rank in launch(tmp_path / "run", then):
        assert (rank["stopped"], rank["step"], rank["samples"]) == (False, 20, one["samples"])
        assert_equal(rank, one, 1e-9)
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(tmp_path / "one"), rtol=0, atol=1e-9)


@pytest.mark.fault("R12")
def test_a_rank_that_is_killed_ends_the_others_and_the_run_goes_on(tmp_path: Path):
    one = alone(tmp_path / "one")
    processes = start(tmp_path / "run", 2, kill_rank_1_at=7)
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL)
    resumed = alone(tmp_path / "run")
    assert resumed["step"] == 20
    assert_equal(resumed, one, 1e-9)


@pytest.mark.fault("R12")
@pytest.mark.parametrize("name", ["adamw", "muon", pytest.param("lamb", marks=pytest.mark.slow)])
def test_spread_parameters_equal_replicas(name: str, tmp_path: Path):
    """FSDP2 over two gloo ranks, its checkpoints read by one rank."""
    one = alone(tmp_path / "one", name=name, dtype="float32")
    pair = launch(tmp_path / "two", 2, name=name, dtype="float32", strategy="fsdp")
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(tmp_path / "one"), rtol=0, atol=2e-5)
    for rank in pair:
        assert_equal(rank, one, 1e-4)
