"""An exported encoder in, its latency and throughput out, beside stock BERT-base of the same vocabulary.

`latency.jsonl` has one line per model, device, thread count, batch size and length; it grows line by line, so a killed
measurement goes on where it stood. Every model and thread count is timed in a process of its own (`timing.py` has the
protocol), because thread pools of one process disturb each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from frugalbert import run
from frugalbert.config import Bench, Machine
from frugalbert.dist import pick_device, processor_name
from frugalbert.measure.models import Model, find_models
from frugalbert.progress import number

FILE = "latency.jsonl"
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
"""Sizes of BERT-base (Devlin et al. 2019)."""


# ---- what there is to time beside it ---------------------------------------------------------------------------------


def _baseline(section: Bench, models: list[Model]) -> list[Model]:
    if section.baseline == "none":
        return []
    vocab = next((model.vocab_size for model in models if model.vocab_size), 30522)
    longest = max(BERT_BASE["max_position_embeddings"], *section.lengths)
    return [Model("bert-base", "baseline", None, vocab, longest, f"random, vocabulary {vocab}")]


def _check_lengths(section: Bench, models: list[Model]) -> None:
    for model in models:
        too_long = [length for length in section.lengths if model.longest and length > model.longest]
        if too_long:
            raise ValueError(
                f"bench.lengths has {too_long[0]}, but {model.name} reads at most {model.longest} tokens; remove it"
            )


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(models: list[Model], section: Bench, machine: Machine, file: Path | None) -> list[dict[str, Any]]:
    """Time every cell that `file` does not hold yet; returns all rows, and keeps `file` up to date with them."""
    _check_lengths(section, models)
    processor = {"cpu": processor_name()}
    if any(model.path is None or model.kind == "torch" for model in models):
        processor |= _gpu(machine)
    plan = [
        (model, device, threads)
        for threads in section.threads
        for model in models
        for device in processor
        if device == "cpu" or (not model.kind.startswith("onnx") and threads == section.threads[0])
    ]
    shapes = [(batch, length) for batch in section.batch_sizes for length in section.lengths]
    before = {_key(row): row for row in _read(file)}
    rows: list[dict[str, Any]] = []
    with run.Progress("bench", len(plan) * len(shapes), "shapes") as progress:
        for model, device, threads in plan:
            common = {"model": model.name, "kind": model.kind, "device": device, "processor": processor[device],
                      "threads": threads, "identity": model.identity}  # fmt: skip
            cells = {shape: {**common, "batch_size": shape[0], "length": shape[1]} for shape in shapes}
            known = [before[_key(cell)] for cell in cells.values() if _key(cell) in before]
            rows += known
            if known:
                progress.update(len(rows))
            left = [shape for shape, cell in cells.items() if _key(cell) not in before]
            for result in time_apart(_task(model, device, threads, section, left)) if left else ():
                median = result["median_ms"]
                speed = result["batch_size"] * result["length"] / (median / 1e3)
                rows.append({**common, **_rounded(result), "tokens_per_second": round(speed, 1)})
                if file is not None:
                    run.write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))
                progress.update(len(rows), model=model.name, threads=threads, median_ms=median)
    return rows


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    names = ("model", "kind", "device", "processor", "threads", "identity", "batch_size", "length")
    return tuple(row.get(name) for name in names)


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}


def _read(file: Path | None) -> Iterator[dict[str, Any]]:
    """The whole lines of an earlier attempt; torn or foreign ones are measured again."""
    if file is None or not file.is_file():
        return
    for line in file.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and isinstance(row.get("median_ms"), float):
                yield row


def _gpu(machine: Machine) -> dict[str, str]:
    import torch

    return {"cuda": torch.cuda.get_device_name()} if pick_device(machine).type == "cuda" else {}


def _task(model: Model, device: str, threads: int, section: Bench, cells: list[tuple[int, int]]) -> dict[str, Any]:
    sizes = {**BERT_BASE, "vocab_size": model.vocab_size, "max_position_embeddings": model.longest}
    return {
        "kind": model.kind,
        "path": str(model.path or model.name),
        "device": device,
        "threads": threads,
        "cells": cells,
        "repeats": section.repeats,
        "vocab_size": model.vocab_size,
        "baseline": sizes if model.path is None else None,
    }


def time_apart(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run `timing.py` in a process with its thread count fixed from the start; yields its results as they come."""
    threads = str(task["threads"])
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    command = [sys.executable, "-m", "frugalbert.measure.timing"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, text=True, **pipes) as process:
        results: queue.Queue[str | None] = queue.Queue()
        errors: queue.Queue[str | None] = queue.Queue()
        ends = ((process.stdout, results), (process.stderr, errors))
        pumps = [threading.Thread(target=_pump, args=pair, daemon=True) for pair in ends]
        for pump in pumps:
            pump.start()
        try:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write(json.dumps(task))
                process.stdin.close()
            for line in _lines(results):
                result = json.loads(line)
                if "error" in result:
                    raise ValueError(result["error"])
                yield result
            if process.wait() != 0:
                last = [line for line in iter(errors.get, None) if line.strip()][-1:]
                raise RuntimeError(
                    f"timing {task.get('path', task['kind'])} failed: {''.join(last).strip() or process.returncode}"
                )
        finally:
            process.kill()
            for pump in pumps:  # before the pipes are closed under them
                pump.join()


def _lines(lines: queue.Queue[str | None]) -> Iterator[str]:
    """JSON lines as they come, looking at the signals in between."""
    while True:
        run.check_stop()
        with contextlib.suppress(queue.Empty):
            line = lines.get(timeout=0.5)
            if line is None:
                return
            if line.startswith("{"):
                yield line


def _pump(stream: TextIO, lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


# ---- showing --------------------------------------------------------------------------------------------------------


def speedups(rows: list[dict[str, Any]]) -> list[float | None]:
    """Median time of the baseline at the same device, threads and shape, over that of each row (None: no baseline)."""
    same = ("device", "processor", "threads", "batch_size", "length")
    base = {tuple(row[name] for name in same): row["median_ms"] for row in rows if row["kind"] == "baseline"}
    times = [base.get(tuple(row[name] for name in same)) for row in rows]
    return [time / row["median_ms"] if time else None for time, row in zip(times, rows, strict=True)]


def print_table(rows: list[dict[str, Any]], file: TextIO) -> None:
    """A table for people; `~` marks a noisy measurement."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("model", min_width=10, overflow="fold")
    table.add_column("kind", no_wrap=True)
    for name in ("threads", "shape", "median ms", "p90 ms", "tokens/s", "faster"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, factor in zip(rows, speedups(rows), strict=True):
        table.add_row(
            escape(row["model"]),
            {"baseline": "torch", "onnx-int8": "int8"}.get(row["kind"], row["kind"]),
            str(row["threads"]) if row["device"] == "cpu" else "gpu",
            f"{row['batch_size']}x{row['length']}",
            f"{'~' if row['noisy'] else ''}{_milliseconds(row['median_ms'])}",
            _milliseconds(row["p90_ms"]),
            number(row["tokens_per_second"]),
            "" if factor is None else f"{factor:.1f} x",
        )
    console = Console(file=file)
    console.print(table)
    if any(row["kind"] == "baseline" for row in rows):
        console.print("faster: than stock BERT-base in PyTorch, same device, threads and shape", highlight=False)
    if any(row["noisy"] for row in rows):
        console.print("~: repeats spread by more than a quarter, or the machine was busy", highlight=False)
    for device, name in sorted({(row["device"], row["processor"]) for row in rows}):
        console.print(f"{device}: {name}", markup=False, highlight=False)


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def headline(rows: list[dict[str, Any]], section: Bench) -> dict[str, Any]:
    """Latency of one sequence (the smallest batch) at the longest length on the fewest threads, and its speed-up.

    Of the PyTorch model where there is one, so that like is compared with like; ONNX files stand beside it.
    """
    found: dict[str, Any] = {}
    cell = (min(section.batch_sizes), max(section.lengths), min(section.threads))
    for row, factor in zip(rows, speedups(rows), strict=True):
        if row["device"] != "cpu" or (row["batch_size"], row["length"], row["threads"]) != cell:
            continue
        if row["kind"] == "torch" or (row["kind"] == "onnx" and "latency_ms" not in found):
            found["latency_ms"] = row["median_ms"]
            if factor is not None:
                found["speedup_vs_bert_base"] = round(factor, 3)
        if row["kind"].startswith("onnx"):
            found[f"{row['kind'].replace('-', '_')}_latency_ms"] = row["median_ms"]
    return {**found, "batch_size": cell[0], "length": cell[1], "threads": cell[2]}


def build(section: Bench, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `bench`: time everything in `inputs["export"]` and the baseline; `out` receives `latency.jsonl`."""
    models = find_models(inputs["export"])
    rows = measure(models + _baseline(section, models), section, machine, out / FILE)
    print_table(rows, sys.stderr)
    return headline(rows, section)


def bench_model(path: Path, section: Bench, out: Path | None = None, machine: Machine | None = None) -> dict[str, Any]:
    """`frugalbert bench PATH`: time the model directory, ONNX file, export or run at `path`; the table goes to stdout.

    With `out`, the rows go to `out`/latency.jsonl as well. Returns the headline. Raises ValueError if nothing is there.
    """
    models = find_models(path)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    rows = measure(
        models + _baseline(section, models), section, machine or Machine(), out / FILE if out is not None else None
    )
    print_table(rows, sys.stdout)
    return headline(rows, section)
