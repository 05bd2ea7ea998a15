"""The stage `latency` with fake clocks: what is drawn, read, read again, resumed and refused; once with real ones."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugalbert import run
from frugalbert.config import Latency, Machine
from frugalbert.fanout import Journal
from frugalbert.measure import predictor, table, timing
from frugalbert.model.arch import Arch
from frugalbert.model.cost import forward_flops
from frugalbert.space import Space

SPACE = Space(depth=(1, 2, 4), hidden=(32, 64), heads=(1, 2, 4), head_dim=(16,), ffn=(32, 64, 128))
SECTION = Latency(architectures=20, length=16)


class Device:
    """A machine on which an encoder takes time by its FLOPs, and which `speed(call)` slows down for a while."""

    def __init__(self, speed: Callable[[int], float] = lambda call: 1.0) -> None:
        self.speed, self.asked, self.calls = speed, list[str](), 0
        self.noisy: set[str] = set()
        self.stop_after = 10**9

    def __call__(self, task: dict[str, Any]) -> Iterator[dict[str, Any]]:
        for text in task["archs"]:
            if self.calls == self.stop_after:
                raise run.Stopped(15)
            slow = self.speed(self.calls)
            self.calls += 1
            self.asked.append(text)
            spread = 0.5 if text in self.noisy else 0.01
            yield {"arch": text, "median_ms": slow * true_ms(text), "reference_ms": 2.0 * slow, "spread": spread,
                   "noisy": text in self.noisy, "precision": "float32"}  # fmt: skip


def true_ms(text: str) -> float:
    return 0.1 + 1e-5 * forward_flops(Arch.parse(text), 16)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()
    monkeypatch.setattr(table, "time_apart", found)
    return found


@pytest.fixture(scope="module")
def archs() -> list[Arch]:
    return table.choose(SPACE, 20, 0)


def test_what_is_drawn(archs: list[Arch]):
    assert archs[:2] == [SPACE.largest(), SPACE.smallest()]
    assert len({arch.to_text() for arch in archs}) == 20
    assert set(Counter(len(arch.layers) for arch in archs[2:]).values()) == {6}
    assert table.choose(SPACE, 20, 0) == archs
    assert table.choose(SPACE, 20, 1) != archs
    assert len(table.choose(SPACE, 500, 0)) == SPACE.size() == 54


def test_drift_is_taken_out(archs: list[Arch], device: Device, tmp_path: Path):
    """A machine that becomes slower and slower, and orders that differ: the rows are as on a steady one."""
    device.speed = lambda call: 1.0 + 0.01 * call
    rows = table.measure(archs, SECTION, 256, tmp_path / "table.jsonl")
    assert [row["arch"] for row in rows] == [arch.to_text() for arch in archs]
    usual = 1.0 + 0.01 * 29.5  # the middle of sixty readings
    for row in rows:
        assert row["median_ms"] == pytest.approx(usual * true_ms(row["arch"]), rel=1e-3)
        assert (row["readings"], row["noisy"]) == (3, False)
        assert row["spread"] < 1e-3
    assert len({tuple(device.asked[start : start + 20]) for start in (0, 20, 40)}) == 3
    noise = table.noise(tmp_path / "table.jsonl")
    assert noise["repeat_noise"] == pytest.approx(0.0, abs=1e-3)
    assert (noise["repeat_noise_unscaled"] or 0.0) > 0.1
    again = table.measure(archs[:2], SECTION, 256, tmp_path / "again.jsonl", noise["reference_ms"])
    assert again[0]["median_ms"] == pytest.approx(rows[0]["median_ms"], rel=1e-3)


def test_noisy_ones_are_read_again_but_not_for_ever(archs: list[Arch], device: Device, tmp_path: Path):
    device.noisy = {archs[3].to_text()}
    rows = table.measure(archs, SECTION, 256, tmp_path / "table.jsonl")
    assert [row["readings"] for row in rows] == [5 if arch is archs[3] else 3 for arch in archs]
    assert [row["noisy"] for row in rows] == [arch is archs[3] for arch in archs]


def test_quiet_readings_count_alone():
    def reading(ms: float, noisy: bool) -> dict[str, Any]:
        return {"median_ms": ms, "reference_ms": 2.0, "noisy": noisy}

    row = table.combine("a", [reading(9.0, True), reading(5.0, False), reading(7.0, True), reading(5.5, False)], 2.0)
    assert row == {"arch": "a", "median_ms": 5.25, "readings": 4, "spread": pytest.approx(0.5 / 5.25, 1e-3),
                   "noisy": False}  # fmt: skip


def test_a_killed_measurement_goes_on(archs: list[Arch], device: Device, tmp_path: Path):
    whole = table.measure(archs, SECTION, 256, tmp_path / "whole.jsonl")
    file = tmp_path / "table.jsonl"
    device.asked.clear()
    for stop in (7, 33, 10**9):
        device.calls, device.stop_after = len(device.asked), stop
        if stop < 100:
            with pytest.raises(run.Stopped):
                table.measure(archs, SECTION, 256, file)
            file.write_bytes(file.read_bytes() + b"0badc0de {torn")
        else:
            assert table.measure(archs, SECTION, 256, file) == whole
    assert set(Counter(device.asked).values()) == {3}
    assert table.measure(archs, SECTION, 256, file) == whole
    assert len(device.asked) == 60


def test_another_device_or_setting_is_refused(archs: list[Arch], device: Device, tmp_path: Path, monkeypatch: Any):
    file = tmp_path / "table.jsonl"
    table.measure(archs[:2], SECTION, 256, file)
    for section, vocab_size, words in (
        (SECTION.model_copy(update={"length": 32}), 256, r"latency\.length: 16 -> 32"),
        (SECTION.model_copy(update={"threads": 2}), 256, r"latency\.threads: 1 -> 2"),
        (SECTION, 512, r"latency\.vocab_size: 256 -> 512"),
    ):
        with pytest.raises(ValueError, match=rf"measured under another setting \({words}\); delete it") as caught:
            table.measure(archs[:2], section, vocab_size, file)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(predictor, "processor_name", lambda: "Abacus 3")
    with pytest.raises(ValueError, match=r"was measured on .*, this is Abacus 3; measure here"):
        table.measure(archs[:2], SECTION, 256, file)
    with pytest.raises(ValueError, match="latency.length is 513, but .* reads at most 512 tokens; write a smaller"):
        table.measure(archs[:2], SECTION.model_copy(update={"length": 513}), 256, tmp_path / "other.jsonl")


def test_the_stage(device: Device, tmp_path: Path, tokenizer_dir: Path, capsys: pytest.CaptureFixture[str]):
    device.speed = lambda call: 1.0 + 0.05 * np.random.default_rng(call).random()
    out = tmp_path / "latency"
    out.mkdir()
    (tmp_path / "space.json").write_text(json.dumps(SPACE.to_json()))
    section = Latency(architectures=60, length=16)
    headline = table.build(section, {"space": tmp_path, "tokenizer": tokenizer_dir}, out, Machine())
    assert "the space has only 54 architectures" in capsys.readouterr().err
    assert headline["architectures"] == 54
    assert headline["held_out_mape"] < 0.01
    assert headline["noisy"] == 0
    found = predictor.load(out / "predictor.json")
    assert found.setting["vocab_size"] == 256
    assert found.report["largest"] == SPACE.largest().to_text()
    assert found.predict(SPACE.largest()) == pytest.approx(headline["largest_ms"], rel=0.02)
    rows = table.remeasure([SPACE.smallest()], found, section, tmp_path / "again.jsonl")
    assert rows[0]["median_ms"] == pytest.approx(found.predict(SPACE.smallest()), rel=0.02)


def test_cuda_runs_pytorch_only():
    with pytest.raises(ValueError, match="backend onnx runs on the CPU; write device: cpu, or backend: torch"):
        Latency(backend="onnx", device="cuda")


def test_with_real_clocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a process of its own, two families and layers that differ."""
    monkeypatch.setattr(table, "READINGS", 1)
    monkeypatch.setattr(table, "RETRIES", 0)
    monkeypatch.setattr(table, "REFERENCE", "bert 1x32 heads=2 ffn=64 max_length={}")
    archs = [Arch.parse("bert 2x32 heads=2 head_dim=12,8 ffn=64,48"), Arch.parse("modern 1x32 heads=2 ffn=64")]
    rows = table.measure(archs, SECTION, 64, tmp_path / "table.jsonl")
    assert all(row["median_ms"] > 0 for row in rows)
    with Journal(tmp_path / "table.jsonl") as book:
        head, *readings = book.entries
    assert head["dtype"] == "float32"
    assert {reading["arch"] for reading in readings} == {arch.to_text() for arch in archs}
    for reading in readings:
        assert (reading["precision"], reading["clock"], reading["repeats"]) == ("float32", "cpu", 9)


@pytest.mark.parametrize("backend", ["onnx", "onnx-int8"])
def test_onnx_files_are_what_is_timed(backend: str, monkeypatch: pytest.MonkeyPatch):
    from frugalbert.measure import onnx

    def call(task: dict[str, Any], path: Path) -> Any:
        return path.read_text(), "float32"

    monkeypatch.setattr(onnx, "export_onnx", lambda model, path: path.write_text(model.config.arch))
    monkeypatch.setattr(onnx, "quantize", lambda source, path: path.write_text(f"int8 of {source.read_text()}"))
    monkeypatch.setattr(timing, "_onnx_call", call)
    text = "bert 1x32 heads=2 ffn=64"
    served = timing._serve({"kind": backend, "vocab_size": 64}, text)[0]
    assert served == (f"int8 of {text}" if backend == "onnx-int8" else text)


def test_what_is_timed_is_a_model_of_that_architecture(monkeypatch: pytest.MonkeyPatch):
    """Not a slice of another: its parameters are counted where it is called, before and after stands the reference."""
    from frugalbert.model.cost import parameter_count

    seen = []

    def call(task: dict[str, Any], model: Any) -> Any:
        return lambda batch, length: lambda: seen.append(sum(p.numel() for p in model.parameters())), {
            "precision": "float32"
        }

    monkeypatch.setattr(timing, "_torch_call", call)
    texts = {"reference": "bert 1x32 heads=2 ffn=64", "arch": "bert 2x32 heads=2 head_dim=12,8 ffn=64,48"}
    task = {
        "kind": "torch",
        "device": "cpu",
        "threads": 1,
        "repeats": 9,
        "vocab_size": 64,
        "batch_size": 1,
        "length": 8,
    }
    lines: list[dict[str, Any]] = []
    monkeypatch.setattr(timing, "_pin_torch", lambda threads: None)
    timing.time_archs({**task, "reference": texts["reference"], "archs": [texts["arch"]]}, lines.append)
    small, big = (parameter_count(Arch.parse(texts[name]), 64) for name in ("reference", "arch"))
    assert seen[: 2 + 9] == [small] * 11 == seen[-11:]
    assert set(seen[11:-11]) == {big}
    assert lines[0]["arch"] == texts["arch"]
    assert lines[0]["reference_ms"] > 0
