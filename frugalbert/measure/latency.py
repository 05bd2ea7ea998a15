"""An exported encoder in, its latency and throughput out, beside stock BERT-base of the same vocabulary.

`latency.jsonl` has one line per model, device, thread count, batch size and length, `mixed.jsonl` one for real texts in
batches of each kind (`mixed.py`); they grow line by line, so a killed measurement goes on where it stood. Every model
and thread count is timed in a process of its own (`timing.py` has the protocol), because thread pools of one process
disturb each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from frugalbert import run
from frugalbert.config import Bench, Machine
from frugalbert.dist import pick_device, processor_name
from frugalbert.measure.encoder import MAX_LENGTH
from frugalbert.measure.mixed import BATCHINGS
from frugalbert.measure.models import Model, find_models
from frugalbert.progress import duration, number

FILE, MIXED = "latency.jsonl", "mixed.jsonl"
BERT_BASE = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
}
"""Sizes of BERT-base (Devlin et al. 2019)."""
SETTING = ("model", "kind", "device", "processor", "threads", "identity", "asked_precision")
SHAPE = ("batch_size", "length", "batching", "texts")
Middle = Callable[[dict[str, Any]], tuple[str, ...]]


# ---- what there is to time beside it ---------------------------------------------------------------------------------


def beside(section: Bench, models: list[Model]) -> list[Model]:
    """The models, the baseline, and all of these in PyTorch once more to be compiled."""
    if section.baseline != "none":
        vocab = next((model.vocab_size for model in models if model.vocab_size), 30522)
        longest = max(BERT_BASE["max_position_embeddings"], *section.lengths)
        tokenizer = next((model.tokenizer for model in models if model.tokenizer), None)
        name = f"random, vocabulary {vocab}"
        models = [*models, Model("bert-base", "baseline", None, vocab, longest, name, tokenizer)]
    return [
        *models,
        *(replace(m, kind="compiled") for m in models if section.compile and not m.kind.startswith("onnx")),
    ]


def _check_lengths(section: Bench, models: list[Model]) -> None:
    for model in models:
        too_long = [length for length in section.lengths if model.longest and length > model.longest]
        if too_long:
            raise ValueError(
                f"bench.lengths has {too_long[0]}, but {model.name} reads at most {model.longest} tokens; remove it"
            )


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(models: list[Model], section: Bench, machine: Machine, out: Path | None) -> list[dict[str, Any]]:
    """Time every cell that the files in `out` do not hold yet; returns all rows, and keeps the files up to date."""
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
    before = {_key(row): row for row in _read(out)}
    rows: list[dict[str, Any]] = []
    longest = min(model.longest or MAX_LENGTH for model in models)
    cells = {model: _cells(model, section) for model in models}
    with run.Progress("bench", sum(len(cells[model]) for model, _, _ in plan), "cells") as progress:
        for model, device, threads in plan:
            common = {"model": model.name, "kind": model.kind, "device": device, "processor": processor[device],
                      "threads": threads, "identity": model.identity}  # fmt: skip
            known = [_key({**common, **cell}) for cell in cells[model]]
            rows += [before[key] for key in known if key in before]
            progress.update(len(rows))
            left = [cell for key, cell in zip(known, cells[model], strict=True) if key not in before]
            task = {**task_for(model, device, threads, section), "cells": left, "max_length": longest}
            for result in time_apart(task) if left else ():
                rows.append({**common, **_rounded(result)})
                _write(out, rows)
                progress.update(len(rows), model=model.name, threads=threads, median_ms=result["median_ms"])
    return rows


def _cells(model: Model, section: Bench) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [
        {"batch_size": batch, "length": length} for batch in section.batch_sizes for length in section.lengths
    ]
    if section.texts and model.tokenizer is None:
        run.say(f"bench: {model.name} has no tokenizer beside it, so no texts are read; only fixed lengths are timed")
    elif section.texts:
        cells += [{"batching": name, "texts": section.texts} for name in BATCHINGS]
    return [{**cell, "asked_precision": section.precision} for cell in cells]


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(
        row.get(name)
        for name in ("model", "kind", "device", "processor", "threads", "identity", "asked_precision", *SHAPE)
    )


def _rounded(result: dict[str, Any]) -> dict[str, Any]:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in result.items()}


def _write(out: Path | None, rows: list[dict[str, Any]]) -> None:
    for name, mixed in ((FILE, False), (MIXED, True)) if out is not None else ():
        lines = [json.dumps(row) + "\n" for row in rows if ("batching" in row) is mixed]
        if lines:
            run.write_atomic(out / name, "".join(lines))


def _read(out: Path | None) -> Iterator[dict[str, Any]]:
    """The whole lines of an earlier attempt; torn or foreign ones are measured again."""
    for file in (out / FILE, out / MIXED) if out is not None else ():
        for line in file.read_text(errors="replace").splitlines() if file.is_file() else ():
            with contextlib.suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and isinstance(row.get("median_ms"), float):
                    yield row


def _gpu(machine: Machine) -> dict[str, str]:
    import torch

    return {"cuda": torch.cuda.get_device_name()} if pick_device(machine).type == "cuda" else {}


def task_for(model: Model, device: str, threads: int, section: Bench) -> dict[str, Any]:
    """What `time_apart` takes, but for `cells` and `max_length`."""
    sizes = {**BERT_BASE, "vocab_size": model.vocab_size, "max_position_embeddings": model.longest}
    return {
        "kind": model.kind,
        "path": str(model.path or model.name),
        "device": device,
        "threads": threads,
        "repeats": section.repeats,
        "precision": section.precision,
        "rows": max(section.batch_sizes),
        "tokenizer": str(model.tokenizer),
        "vocab_size": model.vocab_size,
        "baseline": sizes if model.path is None else None,
    }


def time_apart(task: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Run `timing.py` in a process with its thread count fixed from the start; yields its results as they come."""
    threads = str(task["threads"])
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    environment |= {"RAYON_NUM_THREADS": threads}  # of the tokenizer
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
                if "note" in result:
                    run.say(result["note"])
                else:
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
    same = ("device", "processor", "threads", *SHAPE)
    base = {tuple(row.get(name) for name in same): row["median_ms"] for row in rows if row["kind"] == "baseline"}
    times = [base.get(tuple(row.get(name) for name in same)) for row in rows]
    return [time / row["median_ms"] if time else None for time, row in zip(times, rows, strict=True)]


def print_table(rows: list[dict[str, Any]], file: TextIO) -> None:
    """Tables for people, of fixed shapes and of real texts; `~` marks a noisy measurement."""
    from rich.console import Console

    console = Console(file=file)
    both = list(zip(rows, speedups(rows), strict=True))
    fixed, mixed = ([pair for pair in both if ("batching" in pair[0]) is wanted] for wanted in (False, True))
    if fixed:
        names = ("threads", "shape", "median ms", "p90 ms", "tokens/s", "faster")
        console.print(_table(fixed, names, lambda row: (
            f"{row['batch_size']}x{row['length']}",
            f"{'~' if row['noisy'] else ''}{_milliseconds(row['median_ms'])}",
            _milliseconds(row["p90_ms"]),
            number(row["tokens_per_second"]),
        )))  # fmt: skip
    if mixed:
        names = ("threads", "batches", "padding", "texts/s", "tokens/s", "faster")
        console.print(_table(mixed, names, lambda row: (
            row["batching"],
            f"{row['padding']:.0%}",
            f"{'~' if row['noisy'] else ''}{number(row['texts_per_second'])}",
            number(row["tokens_per_second"]),
        )))  # fmt: skip
    notes = [_about_texts(row) for row, _ in mixed[:1]]
    if any(row["kind"] == "baseline" for row in rows):
        notes.append("faster: than stock BERT-base in PyTorch, same device, threads and shape")
    if any(row["noisy"] for row in rows):
        notes.append("~: repeats spread by more than a quarter, or the machine was busy")
    compiled = {row["model"]: row["compile_seconds"] for row in rows if row.get("compile_seconds")}
    notes += [f"{name}: compiled in {duration(seconds)}, not in the figures" for name, seconds in compiled.items()]
    for note in [*notes, *sorted({f"{row['device']}: {row['processor']}" for row in rows})]:
        console.print(note, markup=False, highlight=False)


def _about_texts(row: dict[str, Any]) -> str:
    return (
        f"batches: {row['texts']} paragraphs of {row['median_tokens']:.0f} tokens (median; longest {row['longest']}), "
        "tokenised and encoded; by length: as Encoder does it, in order: as they come"
    )


def _table(pairs: list[tuple[dict[str, Any], float | None]], names: Sequence[str], middle: Middle) -> Any:
    """Columns that all rows have around those of `middle`."""
    from rich.box import SIMPLE
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, padding=(0, 0, 0, 1))
    table.add_column("model", min_width=10, overflow="fold")
    table.add_column("kind", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row, factor in pairs:
        kind = {"baseline": "torch", "onnx-int8": "int8"}.get(row["kind"], row["kind"])
        where = str(row["threads"]) if row["device"] == "cpu" else "gpu"
        table.add_row(escape(row["model"]), kind, where, *middle(row), "" if factor is None else f"{factor:.1f} x")
    return table


def _milliseconds(value: float) -> str:
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def headline(rows: list[dict[str, Any]], section: Bench) -> dict[str, Any]:
    """Latency of one sequence (the smallest batch) at the longest length on the fewest threads, and its speed-up.

    Of the PyTorch model where there is one, so that like is compared with like; ONNX files stand beside it.
    """
    found: dict[str, Any] = {}
    cell = (min(section.batch_sizes), max(section.lengths), min(section.threads))
    for row, factor in zip(rows, speedups(rows), strict=True):
        if row["device"] != "cpu" or (row.get("batch_size"), row.get("length"), row["threads"]) != cell:
            continue
        if row["kind"] == "torch" or (row["kind"] == "onnx" and "latency_ms" not in found):
            found["latency_ms"] = row["median_ms"]
            if factor is not None:
                found["speedup_vs_bert_base"] = round(factor, 3)
        if row["kind"].startswith("onnx"):
            found[f"{row['kind'].replace('-', '_')}_latency_ms"] = row["median_ms"]
    return {**found, "batch_size": cell[0], "length": cell[1], "threads": cell[2]}


def build(section: Bench, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `bench`: time all in `inputs["export"]` and the baseline into `out`/latency.jsonl and mixed.jsonl."""
    rows = measure(beside(section, find_models(inputs["export"])), section, machine, out)
    print_table(rows, sys.stderr)
    return headline(rows, section)


def bench_model(path: Path, section: Bench, out: Path | None = None, machine: Machine | None = None) -> dict[str, Any]:
    """`frugalbert bench PATH`: time the model directory, ONNX file, export or run at `path`; the table goes to stdout.

    With `out`, the rows go to files in `out` as well. Returns the headline. Raises ValueError if nothing is there.
    """
    models = find_models(path)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    rows = measure(beside(section, models), section, machine or Machine(), out)
    print_table(rows, sys.stdout)
    return headline(rows, section)
