"""`bench`: what is found, what is measured, what a continued measurement repeats, and what people read."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugalbert import dist, run
from frugalbert.config import Bench, Machine
from frugalbert.measure import latency, mixed, serving, timing
from tests.measure.conftest import SIZES, edit_config

SECTION = Bench(lengths=(8, 16), batch_sizes=(2,), repeats=9, texts=6)
PLAIN = Bench(lengths=(8, 16), batch_sizes=(2,), repeats=9, texts=0)
CPU = Machine(device="cpu")


@pytest.fixture(scope="module")
def measured(stock_export: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A finished stage: the exported stock model beside a baseline as small as itself."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(latency, "BERT_BASE", {**SIZES, "max_position_embeddings": 64})
        return out, latency.build(SECTION, {"export": stock_export}, out, CPU)


def read(out: Path, name: str = "latency.jsonl") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / name).read_text().splitlines()]


def test_every_cell_once(measured: tuple[Path, dict[str, Any]]):
    out, headline = measured
    rows = read(out)
    cells = [(row["model"], row["kind"], row["length"]) for row in rows]
    kinds = [("hf", "torch"), ("onnx", "onnx"), ("onnx-int8", "onnx-int8"), ("bert-base", "baseline")]
    assert cells == [(*kind, length) for kind in kinds for length in (8, 16)]
    for row in rows:
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["tokens_per_second"] == pytest.approx(2 * row["length"] / row["median_ms"] * 1e3, rel=1e-2)
        assert (row["device"], row["threads"], row["batch_size"], row["repeats"]) == ("cpu", 1, 2, 9)
        assert row["clock"] == "cpu"
        assert row["precision"] == ("int8" if row["kind"] == "onnx-int8" else "float32")
    by_cell = {(row["kind"], row["length"]): row["median_ms"] for row in rows}
    assert headline["latency_ms"] == by_cell["torch", 16]
    assert headline["speedup_vs_bert_base"] == pytest.approx(by_cell["baseline", 16] / by_cell["torch", 16], abs=1e-3)
    assert headline["onnx_int8_latency_ms"] == by_cell["onnx-int8", 16]


def test_texts_of_mixed_lengths(measured: tuple[Path, dict[str, Any]]):
    """Every model reads the same texts, sorted and as they come; a table of its own shows it."""
    rows = read(measured[0], "mixed.jsonl")
    kinds = ("torch", "onnx", "onnx-int8", "baseline")
    assert [(row["kind"], row["batching"]) for row in rows] == [
        (kind, how) for kind in kinds for how in mixed.BATCHINGS
    ]
    assert len({(row["texts"], row["tokens"], row["median_tokens"], row["longest"]) for row in rows}) == 1
    for row in rows:
        assert row["texts_per_second"] == pytest.approx(6e3 / row["median_ms"], rel=1e-2)
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] * 1e3 / row["median_ms"], rel=1e-2)
        assert (row["repeats"], row["precision"]) == (3, "int8" if row["kind"] == "onnx-int8" else "fp32")
    paddings = {how: {row["padding"] for row in rows if row["batching"] == how} for how in mixed.BATCHINGS}
    assert max(paddings["by length"]) < min(paddings["in order"])
    assert [len(found) for found in paddings.values()] == [1, 1]
    assert not set(mixed.BATCHINGS) & {row.get("batching") for row in read(measured[0])}
    file = io.StringIO()
    latency.print_table(read(measured[0]) + rows, file)
    assert re.search(r"hf +torch +1 +by length +\d+% ", file.getvalue())
    assert "batches: 6 paragraphs of" in file.getvalue()
    assert latency.speedups(rows)[-2:] == [1.0, 1.0]


def test_paragraphs_are_real_mixed_and_the_same_every_time():
    texts = mixed.paragraphs(64)
    words = [len(text.split()) for text in texts]
    assert texts == mixed.paragraphs(64)
    assert len(set(texts)) > 60
    assert min(words) >= mixed.LEAST_WORDS
    assert max(words) > 3 * np.median(words)
    assert words != sorted(words)


def test_compiled_models_stand_beside(
    stock_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """One more of each PyTorch model; one that cannot be compiled has no rows, and the reason is told."""
    asked = []

    def fake(task: dict[str, Any]) -> Any:
        asked.append((task["kind"], bool(task["baseline"])))
        seconds = {"compile_seconds": 12.0} if task["kind"] == "compiled" else {}
        for cell in task["cells"]:
            yield {**cell, **seconds, "median_ms": 1.5, "noisy": False, "p90_ms": 1.6, "tokens_per_second": 9.0}

    monkeypatch.setattr(latency, "time_apart", fake)
    section = PLAIN.model_copy(update={"compile": True})
    latency.bench_model(stock_export, section, tmp_path, CPU)
    kinds = [("torch", False), ("onnx", False), ("onnx-int8", False), ("baseline", True)]
    assert asked == [*kinds, ("compiled", False), ("compiled", True)]
    assert "hf: compiled in 12 s, not in the figures" in capsys.readouterr().out

    def fail(encoder: Any, forward: Any, threads: Any) -> float:
        raise serving.CannotCompile("torch.compile does not work here (no compiler)")

    monkeypatch.setattr(serving, "compile_blocks", fail)
    monkeypatch.setattr(timing, "_pin_torch", lambda threads: None)
    model = latency.find_models(stock_export / "hf")[0]
    lines: list[dict[str, Any]] = []
    task = latency.task_for(replace(model, kind="compiled"), "cpu", 1, section)
    for cell in ({"batch_size": 1, "length": 8}, {"batching": "in order", "texts": 2}):
        timing.time_task({**task, "cells": [cell], "max_length": 64}, lines.append)
    assert [line["note"] for line in lines] == [
        f"bench: {stock_export / 'hf'}: torch.compile does not work here (no compiler)",
        f"bench: {stock_export / 'hf'}: torch.compile does not work here",
    ]


def test_precision_of_cells(stock_export: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "multiplies_bf16", lambda device: True)
    model = latency.find_models(stock_export / "hf")[0]
    for asked, found in (("fp32", "float32"), ("auto", "bfloat16"), ("bf16", "bfloat16")):
        task = latency.task_for(model, "cpu", 1, Bench(precision=asked))  # type: ignore[arg-type]
        assert timing._torch_call(task, timing._load(task))[1] == {"precision": found}


def test_a_killed_measurement_goes_on(
    measured: tuple[Path, dict[str, Any]], stock_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(latency, "BERT_BASE", {**SIZES, "max_position_embeddings": 64})
    lines = (measured[0] / "latency.jsonl").read_text().splitlines(keepends=True)
    torn = lines[:3] + lines[4:-1] + [lines[-1][:40]]  # one ONNX cell is gone, the last line is half written
    (tmp_path / "latency.jsonl").write_text("".join(torn))
    texts = (measured[0] / "mixed.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "mixed.jsonl").write_text("".join(texts[1:]))
    asked = []

    def fake(task: dict[str, Any]) -> Any:
        asked.append((task["kind"], [tuple(cell.values())[:2] for cell in task["cells"]]))
        for cell in task["cells"]:
            figures = ("p90_ms", "tokens_per_second", "texts_per_second", "padding", "median_tokens", "longest")
            yield {**cell, "median_ms": 1.5, "noisy": False, **dict.fromkeys(figures, 1.0)}

    monkeypatch.setattr(latency, "time_apart", fake)
    latency.build(SECTION, {"export": stock_export}, tmp_path, CPU)
    assert asked == [("torch", [("by length", 6)]), ("onnx", [(2, 16)]), ("baseline", [(2, 16)])]
    again = read(tmp_path)
    assert [row for row in again if row["median_ms"] != 1.5] == [json.loads(line) for line in lines[:3] + lines[4:-1]]
    assert len(again) == len(lines)
    known = [row for row in read(tmp_path, "mixed.jsonl") if row["median_ms"] != 1.5]
    assert known == [json.loads(line) for line in texts[1:]]
    monkeypatch.setattr(latency, "processor_name", lambda: "another")
    asked.clear()
    latency.build(SECTION, {"export": stock_export}, tmp_path, CPU)
    assert len(asked) == 4  # times of another machine do not count


def test_stopped_between_cells(stock_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A signal ends the measurement and its process; what was measured stays."""
    seen = []

    def stop() -> None:
        seen.append(1)
        if (tmp_path / "latency.jsonl").exists():
            raise run.Stopped(15)

    ended = []
    pump = latency._pump

    def watched(stream: Any, lines: Any) -> None:
        pump(stream, lines)
        ended.append(stream.closed)

    monkeypatch.setattr(latency, "_pump", watched)
    monkeypatch.setattr(run, "check_stop", stop)
    models = [model for model in latency.find_models(stock_export) if model.kind == "onnx"]
    with pytest.raises(run.Stopped):
        latency.measure(models, PLAIN, CPU, tmp_path)
    assert 1 <= len(read(tmp_path)) <= 2
    assert ended == [False, False]  # both readers came to their end before the pipes were closed


# ---- what is found --------------------------------------------------------------------------------------------------


def test_what_can_be_timed(stock_export: Path, stock_dir: Path, tmp_path: Path):
    def found(path: Path) -> list[tuple[str, str, int | None, int | None]]:
        return [(model.name, model.kind, model.vocab_size, model.longest) for model in latency.find_models(path)]

    everything = [("hf", "torch", 256, 64), ("onnx", "onnx", 256, 64), ("onnx-int8", "onnx-int8", 256, 64)]
    assert found(stock_export) == everything
    (tmp_path / "a-run").mkdir()
    (tmp_path / "a-run" / "export").symlink_to(stock_export)
    assert found(tmp_path / "a-run") == everything
    assert found(stock_dir) == [("stock", "torch", 256, 64)]
    bare = tmp_path / "bare.onnx"
    bare.write_bytes((stock_export / "onnx-int8" / "model.onnx").read_bytes())
    assert found(bare) == [("bare.onnx", "onnx-int8", None, None)]


def test_what_cannot(tmp_path: Path, broken_model: Path, stock_export: Path):
    (tmp_path / "text.onnx").write_text("not a graph")
    (tmp_path / "empty").mkdir()
    (broken_model / "model.safetensors").write_bytes(b"cut")
    too_long = Bench(lengths=(8, 65), baseline="none", texts=0)
    for path, section, words in (
        (tmp_path / "text.onnx", None, "text.onnx is no ONNX file that can run"),
        (tmp_path / "absent.onnx", None, "absent.onnx does not exist"),
        (tmp_path / "absent", None, "absent does not exist; name a model directory"),
        (tmp_path / "empty", None, "empty is not a model: it has no config.json"),
        (broken_model, None, "model.safetensors is damaged"),
        (stock_export, too_long, "bench.lengths has 65, but hf reads at most 64 tokens; remove it"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)) as caught:
            latency.bench_model(path, section or Bench(lengths=(8,), baseline="none", repeats=1), tmp_path / "out", CPU)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "latency.jsonl").exists()


def test_a_graph_that_refuses_the_shape(stock_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Without a config.json nobody knows the longest input: the graph itself says no. Nor can it read texts."""
    bare = tmp_path / "bare.onnx"
    bare.write_bytes((stock_export / "onnx" / "model.onnx").read_bytes())
    with pytest.raises(ValueError, match="cannot run 1 sequences of 65 tokens"):
        latency.bench_model(bare, Bench(lengths=(65,), batch_sizes=(1,), baseline="none", repeats=1), None, CPU)
    said = "bench: bare.onnx has no tokenizer beside it, so no texts are read; only fixed lengths are timed\n"
    assert capsys.readouterr().err.startswith(said)


# ---- what people read -----------------------------------------------------------------------------------------------


def make_row(kind: str, median: float, **changes: Any) -> dict[str, Any]:
    common = {"model": kind, "kind": kind, "device": "cpu", "processor": "X [bold]", "threads": 1, "batch_size": 1,
              "length": 128, "median_ms": median, "p90_ms": 1.1 * median, "min_ms": median, "noisy": False,
              "tokens_per_second": 128e3 / median}  # fmt: skip
    return {**common, **changes}


def test_speedups_compare_the_same_cell_only():
    rows = [
        make_row("baseline", 200.0),
        make_row("baseline", 120.0, threads=2),
        make_row("torch", 10.0),
        make_row("torch", 6.0, threads=2),
        make_row("onnx", 5.0, length=64),
        make_row("onnx", 5.0, processor="other"),
    ]
    assert latency.speedups(rows) == [1.0, 1.0, 20.0, 20.0, None, None]


def test_table_fits_and_shows_data_as_it_is():
    rows = [
        make_row("baseline", 2200.0, batch_size=16, length=512),
        make_row("onnx-int8", 0.5, batch_size=16, length=512, noisy=True, model="[red]a-very-long-model-name-indeed"),
    ]
    file = io.StringIO()
    latency.print_table(rows, file)
    text = file.getvalue()
    assert "[red]a-very" in text
    assert "X [bold]" in text
    assert "~0.500" in text
    assert "4400.0 x" in text
    assert "\x1b" not in text


def test_headline_prefers_pytorch_and_falls_back():
    section = Bench(lengths=(64, 128), batch_sizes=(1, 8))
    rows = [
        make_row("torch", 10.0),
        make_row("onnx", 5.0),
        make_row("baseline", 200.0),
        make_row("torch", 1.0, length=64),
    ]
    assert latency.headline(rows, section) == {
        "latency_ms": 10.0, "speedup_vs_bert_base": 20.0, "onnx_latency_ms": 5.0, "batch_size": 1, "length": 128,
        "threads": 1,
    }  # fmt: skip
    assert latency.headline(rows[1:2], section)["latency_ms"] == 5.0


def test_config_without_a_model_length_is_no_limit(broken_model: Path):
    edit_config(broken_model, max_position_embeddings=None)
    assert latency.find_models(broken_model)[0].longest is None
