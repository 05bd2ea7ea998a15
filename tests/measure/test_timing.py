"""The timing protocol on clocks made for the purpose: nothing here depends on how fast the machine is."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.measure import timing


class Clock:
    """A machine whose calls take the given CPU seconds, while the wall runs `busy` times as fast."""

    def __init__(self, seconds: list[float], busy: float = 1.0) -> None:
        self.seconds, self.busy, self.calls = seconds, busy, 0
        self.cpu = self.wall = 0.0

    def call(self) -> None:
        took = self.seconds[self.calls % len(self.seconds)]
        self.calls += 1
        self.cpu += took
        self.wall += took * self.busy

    def time(self, repeats: int = 30) -> timing.Timing:
        return timing.time_callable(self.call, repeats, "cpu", now=lambda: self.cpu, wall=lambda: self.wall)


def test_steady_calls():
    clock = Clock([0.010])
    found = clock.time(30)
    assert found.median_ms == pytest.approx(10.0)
    assert (found.repeats, found.noisy) == (30, False)
    assert found.wall_ratio == pytest.approx(1.0)
    assert clock.calls == 30 + 30  # 0.3 s of warm-up first


def test_first_calls_do_not_count():
    clock = Clock([5.0, 1.0] + [0.010] * 100)
    assert clock.time(30).median_ms == pytest.approx(10.0)
    assert clock.time(30).p90_ms == pytest.approx(10.0)


def test_slow_calls_are_repeated_less_but_nine_times():
    assert Clock([0.5]).time(30).repeats == 20
    assert Clock([4.0]).time(30).repeats == 9
    assert Clock([4.0]).time(3).repeats == 3


def test_spread_and_busy_machines_are_marked():
    assert Clock([0.010, 0.010, 0.014]).time().noisy
    busy = Clock([0.010], busy=1.5).time()
    assert busy.noisy
    assert busy.median_ms == pytest.approx(10.0)  # CPU time is not lengthened by others
    assert busy.wall_ratio == pytest.approx(1.5)


def test_gpu_events(monkeypatch: pytest.MonkeyPatch):
    """CUDA's events speak in milliseconds, and are waited for before they are read."""
    import torch

    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 2.5

    monkeypatch.setattr(torch.cuda, "Event", Event)
    clock = Clock([0.1])
    found = timing.time_callable(lambda: (clock.call(), log.append("call")), 9, "cuda", wall=lambda: clock.wall)
    assert (found.median_ms, found.repeats, found.noisy) == (2.5, 9, False)
    assert log[-8:] == ["record", "call", "record", "wait"] * 2


def test_clock_by_threads_and_device():
    assert timing.pick_clock(1, "cpu") == "cpu"
    assert timing.pick_clock(2, "cpu") == "wall"
    assert timing.pick_clock(1, "cuda") == "cuda"


@settings(derandomize=True, max_examples=50)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.floats(0, 1))
def test_percentile_is_numpys(values: list[float], share: float):
    assert timing.percentile(values, share) == pytest.approx(np.quantile(values, share), abs=1e-9)


def test_a_users_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    task = {
        "kind": "onnx",
        "path": "/nowhere/model.onnx",
        "device": "cpu",
        "threads": 1,
        "cells": [{"batch_size": 1, "length": 8}],
    }
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(task)))
    timing.main()
    line = json.loads(capsys.readouterr().out)
    assert "does not exist" in line["error"]
