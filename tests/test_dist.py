"""Device, precision, threads; trackers that fail, hang or are missing never touch the training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from frugalbert import dist
from frugalbert import trackers as module
from frugalbert.config import Machine
from frugalbert.trackers import Trackers
from tests.structure import ROOT

CPU = torch.device("cpu")


def test_device(monkeypatch: pytest.MonkeyPatch):
    assert dist.pick_device(Machine(device="cpu")) == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert dist.pick_device(Machine()) == CPU
    with pytest.raises(ValueError, match="write device: auto or cpu"):
        dist.pick_device(Machine(device="cuda"))


@pytest.mark.parametrize("bf16, amx, expected", [(False, False, "fp32"), (True, False, "bf16"), (False, True, "bf16")])
def test_precision_is_what_the_hardware_multiplies(
    bf16: bool, amx: bool, expected: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert dist.pick_precision("auto", CPU) == expected
    assert dist.pick_precision("fp16", CPU) == "fp16"


@pytest.mark.parametrize(
    "precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_autocast(precision: str, dtype: torch.dtype):
    layer = nn.Linear(4, 4)
    with dist.autocast(CPU, precision):
        assert layer(torch.ones(1, 4)).dtype == dtype
    assert layer.weight.dtype == torch.float32


def test_threads(monkeypatch: pytest.MonkeyPatch):
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(dist, "usable_cores", lambda: 12)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert dist.set_threads(Machine()) == 12
    assert dist.set_threads(Machine(threads=3)) == 3
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert dist.set_threads(Machine()) == 5
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")  # torchrun writes OMP_NUM_THREADS=1 itself
    assert dist.set_threads(Machine()) == 3
    assert set_to == [12, 3, 5, 3]


def test_a_container_quota_limits_the_cores(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist.os, "sched_getaffinity", lambda pid: set(range(64)))
    for text, cores in (("max 100000", 64), ("250000 100000", 2), ("50000 100000", 1)):
        monkeypatch.setattr(dist.Path, "read_text", lambda path, text=text: text)
        assert dist.usable_cores() == cores


def test_a_container_limits_the_memory(monkeypatch: pytest.MonkeyPatch):
    files = {"meminfo": "MemTotal: 9 kB\nMemAvailable: 8 kB", "memory.max": "6000", "memory.current": "5000",
             "memory.stat": "anon 1000\ninactive_file 3000"}  # fmt: skip
    monkeypatch.setattr(dist.Path, "read_text", lambda path: files[path.name])
    assert dist.free_memory() == 4000
    files["memory.max"] = "max"
    assert dist.free_memory() == 8192
    files["meminfo"] = "MemTotal: 9 kB"
    assert dist.free_memory() == 0


def test_one_process_needs_no_group():
    assert (dist.rank(), dist.world(), dist.is_main()) == (0, 1, True)
    assert dist.agree([3.0, 1.0]) == [3.0, 1.0]
    tensor = torch.ones(3)
    assert dist.sum_over_ranks(tensor) is tensor
    assert dist.full(tensor) is dist.local(tensor) is dist.split_like(tensor, tensor) is tensor
    model = nn.Linear(2, 2)
    assert dist.wrap(model, CPU, "ddp") is model
    dist.finish()


def test_blocks_are_the_repeated_layers():
    model = nn.Sequential(nn.Linear(2, 2), nn.ModuleList([nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 2))]))
    assert dist.blocks(model) == list(model[1])


# ---- trackers --------------------------------------------------------------------------------------------------------


class Tracker:
    """Records calls; raises at `bad`, hangs at `hangs` until it is released."""

    def __init__(self, bad: str = "", hangs: str = "") -> None:
        self.bad, self.hangs = bad, hangs
        self.calls: list[Any] = []
        self.release = threading.Event()
        self.reached = threading.Event()

    def _do(self, name: str, *values: Any) -> None:
        if name == self.hangs:
            self.reached.set()
            self.release.wait(30)
        if name == self.bad:
            raise RuntimeError(f"{name} is refused")
        self.calls.append((name, *values))

    def log(self, values: dict[str, Any], step: int) -> None:
        self._do("log", values, step)

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("configuration", values)

    def finish(self) -> None:
        self._do("finish")


def follow(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> Trackers:
    monkeypatch.setattr(module, "_tracker", lambda name, run_name, folder: tracker)
    return Trackers(["any"], "run", Path())


def test_a_tracker_gets_every_figure(monkeypatch: pytest.MonkeyPatch):
    tracker = Tracker()
    trackers = follow(tracker, monkeypatch)
    trackers.configuration({"seed": 1})
    trackers.log({"loss": 2.0, "event": "text", "step": 3}, 3)
    trackers.finish()
    assert tracker.calls == [("configuration", {"seed": 1}), ("log", {"loss": 2.0, "step": 3}, 3), ("finish",)]


@pytest.mark.fault("R17")
@pytest.mark.parametrize("bad", ["log", "configuration", "finish"])
def test_a_failing_tracker_is_given_up_with_one_warning(
    bad: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tracker = Tracker(bad=bad)
    trackers = follow(tracker, monkeypatch)
    for step in range(5):
        trackers.configuration({})
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert capsys.readouterr().err.count("trackers are given up") == 1


@pytest.mark.fault("R17")
@pytest.mark.parametrize("hangs", ["log", "finish"])
def test_a_hanging_tracker_costs_a_moment(
    hangs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(Trackers, "patience", 0.01)
    tracker = Tracker(hangs=hangs)
    trackers = follow(tracker, monkeypatch)
    trackers.log({"loss": 1.0}, 0)
    if hangs == "log":
        assert tracker.reached.wait(30)
        tracker.release.wait(0.05)
        for step in range(1000):
            trackers.log({"loss": 1.0}, step)
        assert capsys.readouterr().err.count("did not return within") == 1
    trackers.finish()
    tracker.release.set()
    assert len(tracker.calls) <= 1


@pytest.mark.fault("R17")
@pytest.mark.parametrize("how", ["is refused", "hangs"])
def test_a_tracker_that_does_not_start(how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    release = threading.Event()

    def start(name: str, run_name: str, folder: Path) -> Any:
        if how == "hangs":
            release.wait(30)
        raise RuntimeError("the server is refused")

    monkeypatch.setattr(module, "_tracker", start)
    monkeypatch.setattr(Trackers, "patience", 0.01)
    monkeypatch.setattr(Trackers, "most", 100)
    trackers = Trackers(["any"], "run", Path())
    if how == "is refused":
        assert trackers._thread is not None
        trackers._thread.join(30)
    for step in range(1000):
        trackers.log({"loss": 1.0}, step)
    trackers.finish()
    assert trackers._calls.qsize() <= 100
    assert capsys.readouterr().err.count("trackers are given up") == 1
    release.set()


@pytest.mark.fault("R17")
def test_a_missing_tracker_is_one_warning(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for name, sentence in (("nonsense", "there is no tracker nonsense"), ("swanlab", "pip install")):
        trackers = Trackers([name], "run", tmp_path)
        trackers.log({"loss": 1.0}, 0)
        assert trackers._thread is not None
        trackers._thread.join(600)
        said = capsys.readouterr().err
        assert sentence in said
        assert said.count("\n") == 1


def test_no_trackers_means_no_thread():
    trackers = Trackers((), "run", Path())
    trackers.log({"loss": 1.0}, 0)
    trackers.finish()
    assert trackers._thread is None


AGAIN = """
import json, torch
from frugalbert import dist
from frugalbert import trackers as module
from frugalbert.config import Machine
from frugalbert.trackers import Trackers
sums = []
for number in range(5):
    dist.start(Machine(device="cpu", threads=1))
    sums.append(dist.sum_over_ranks(torch.tensor([float(number + dist.rank())])).item())
    dist.finish()
if dist.is_main():
    print(json.dumps(sums))
"""


def test_stages_of_all_ranks_may_follow_each_other_under_torchrun(tmp_path: Path):
    """Each has a group of its own; torchrun's store still holds what the ranks said for the ones before."""
    (tmp_path / "again.py").write_text(AGAIN)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "again.py"]
    variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [1.0, 3.0, 5.0, 7.0, 9.0]
