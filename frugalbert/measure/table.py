"""The stage `latency`: a space of architectures in, `table.jsonl` of measured ones and `predictor.json` out.

Each architecture is timed as it would be deployed, extracted, by `timing.py`'s protocol. A shared machine's speed
drifts by several percent within seconds and minutes; so there are three readings in different orders, and each is
scaled by what one small reference encoder took just before and after it. The table is a journal: a killed measurement
goes on where it stood. Its first line says what was measured how and where; a table of another device or setting is
refused.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import run
from frugalbert.config import Latency, Machine
from frugalbert.data.tokenizer import vocabulary_size
from frugalbert.fanout import Journal
from frugalbert.measure import predictor
from frugalbert.measure.latency import time_apart
from frugalbert.measure.timing import NOISY_SPREAD
from frugalbert.model.arch import Arch
from frugalbert.space import Space

TABLE, PREDICTOR = "table.jsonl", "predictor.json"
REFERENCE = "bert 2x256 heads=4 ffn=512 max_length={}"
WARMUP_SECONDS = 0.1
READINGS = 3
RETRIES = 2
"""Further readings of an architecture whose readings all spread: being interrupted alone does not lengthen CPU time."""


def setting_of(section: Latency, vocab_size: int) -> dict[str, Any]:
    """What makes two latencies comparable: device, backend, threads, shape, number format and versions."""
    dtype = "int8" if section.backend == "onnx-int8" else "float32"
    if section.device == "cuda":
        import torch

        dtype = "bfloat16" if torch.cuda.is_bf16_supported() else "float16"
    versions = {}
    for name in ("frugalbert", "torch", *(("onnxruntime",) if section.backend != "torch" else ())):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "unknown"
    return {
        "device": section.device,
        "processor": predictor.device_name(section.device),
        "backend": section.backend,
        "threads": section.threads,
        "batch_size": section.batch_size,
        "length": section.length,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "versions": versions,
    }


# ---- which architectures --------------------------------------------------------------------------------------------


def choose(space: Space, count: int, seed: int) -> list[Arch]:
    """`count` different architectures (fewer if the space has no more): largest, smallest, then all depths in turn."""
    rng = np.random.default_rng(seed)
    chosen = {arch.to_text(): arch for arch in (space.largest(), space.smallest())}
    by_depth: dict[int, dict[str, Arch]] = {}
    for _ in range(8 * count):
        arch = space.sample_stratified(rng)
        if arch.to_text() not in chosen:
            by_depth.setdefault(len(arch.layers), {})[arch.to_text()] = arch
    waiting = [list(by_depth[depth].items()) for depth in sorted(by_depth)]
    while len(chosen) < count and any(waiting):
        for archs in waiting:
            if archs and len(chosen) < count:
                chosen.update([archs.pop(0)])
    return list(chosen.values())


# ---- measuring ------------------------------------------------------------------------------------------------------


def measure(
    archs: Sequence[Arch], section: Latency, vocab_size: int, file: Path, reference_ms: float | None = None
) -> list[dict[str, Any]]:
    """One row per architecture, in order (see `combine`); readings that `file` holds already are not repeated.

    Times are those of a machine on which the reference encoder takes `reference_ms`; None = its median in `file`.
    Raises ValueError if `file` belongs to another device or setting, or an architecture cannot read so many tokens.
    """
    too_short = [arch for arch in archs if arch.max_length < section.length]
    if too_short:
        raise ValueError(
            f"latency.length is {section.length}, but {too_short[0].to_text()} reads at most "
            f"{too_short[0].max_length} tokens; write a smaller length"
        )
    setting = setting_of(section, vocab_size)
    texts = [arch.to_text() for arch in archs]
    with Journal(file) as book:
        _check_setting(book, setting)
        readings: dict[str, list[dict[str, Any]]] = {text: [] for text in texts}
        for entry in book.entries[1:]:
            readings.setdefault(entry["arch"], []).append(entry)
        with run.Progress("latency", READINGS * len(readings), "readings") as progress:
            for turn in range(READINGS + RETRIES):
                left = [text for text in dict.fromkeys(texts) if _wants(readings[text], turn)]
                random.Random(turn).shuffle(left)
                for result in time_apart({**_task(setting, section), "archs": left}) if left else ():
                    book.append({name: round(x, 5) if isinstance(x, float) else x for name, x in result.items()})
                    readings[result["arch"]].append(book.entries[-1])
                    done = sum(min(READINGS, len(found)) for found in readings.values())
                    progress.update(done, median_ms=result["median_ms"], arch=result["arch"])
        usual = reference_ms or usual_reference(book.entries[1:])
    return [combine(text, readings[text], usual) for text in texts]


def usual_reference(readings: Sequence[dict[str, Any]]) -> float:
    """Milliseconds that the reference encoder took: the median over a table's readings."""
    return statistics.median(reading["reference_ms"] for reading in readings)


def _wants(readings: list[dict[str, Any]], turn: int) -> bool:
    if len(readings) > turn:
        return False
    return turn < READINGS or all(reading["spread"] > NOISY_SPREAD for reading in readings)


def _task(setting: dict[str, Any], section: Latency) -> dict[str, Any]:
    names = ("device", "threads", "batch_size", "length", "vocab_size")
    fixed = {"reference": REFERENCE.format(max(512, section.length)), "warmup_seconds": WARMUP_SECONDS}
    return {"kind": section.backend, "repeats": section.repeats, **fixed, **{name: setting[name] for name in names}}


def _check_setting(book: Journal, setting: dict[str, Any]) -> None:
    """The first line of a table is its setting. Raises ValueError with the first difference."""
    if not book.entries:
        book.append(setting)
    before = book.entries[0]
    if before.get("processor") != setting["processor"]:
        predictor.check_device(before | {"device": setting["device"]}, book.path)
    changed = run.drift({"stage": "latency", "section": before, "inputs": {}}, setting, {})
    if changed:
        raise ValueError(
            f"{book.path} was measured under another setting ({changed[0]}); delete it to measure again, or restore "
            "the setting"
        )


def combine(text: str, readings: Sequence[dict[str, Any]], reference_ms: float) -> dict[str, Any]:
    """The readings of one architecture as one row: the median of those that are not noisy, if there are any."""
    quiet = [reading for reading in readings if not reading["noisy"]]
    scaled = [_scaled(reading, reference_ms) for reading in quiet or readings]
    middle = statistics.median(scaled)
    return {
        "arch": text,
        "median_ms": round(middle, 5),
        "readings": len(readings),
        "spread": round((max(scaled) - min(scaled)) / middle, 5),
        "noisy": not quiet,
    }


def _scaled(reading: dict[str, Any], reference_ms: float) -> float:
    return reading["median_ms"] * reference_ms / reading["reference_ms"]


def noise(file: Path) -> dict[str, float | None]:
    """How well readings repeat: no predictor can be held to less than the noise of what it is compared with.

    `repeat_noise`: mean relative difference between two readings of one architecture; `repeat_noise_unscaled`: the same
    before the reference corrects them; `reference_ms`: what that took.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    with Journal(file) as book:
        usual = usual_reference(book.entries[1:])
        for entry in book.entries[1:]:
            found.setdefault(entry["arch"], []).append(entry)
    pairs = [readings[:2] for readings in found.values() if len(readings) > 1]
    scaled = [(_scaled(a, usual), _scaled(b, usual)) for a, b in pairs]
    raw = [(a["median_ms"], b["median_ms"]) for a, b in pairs]
    return {"reference_ms": usual, "repeat_noise": _difference(scaled), "repeat_noise_unscaled": _difference(raw)}


def _difference(pairs: Sequence[tuple[float, float]]) -> float | None:
    return round(statistics.fmean(2 * abs(a - b) / (a + b) for a, b in pairs), 5) if pairs else None


def remeasure(archs: Sequence[Arch], found: predictor.Predictor, section: Latency, file: Path) -> list[dict[str, Any]]:
    """Measure chosen architectures again, the same way and on the same scale as the table behind the predictor `found`.

    `file` is a journal of its own. Returns a row per architecture: `arch`, `median_ms`, `readings`, `spread`, `noisy`.
    """
    predictor.check_device(found.setting, file)
    return measure(archs, section, found.setting["vocab_size"], file, found.report["reference_ms"])


# ---- the stage ------------------------------------------------------------------------------------------------------


def build(section: Latency, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `latency`: `inputs["space"]` has space.json, `inputs["tokenizer"]` the vocabulary."""
    space = Space.from_json(run.read_json(inputs["space"] / "space.json"))
    vocab_size = vocabulary_size(inputs["tokenizer"])
    archs = choose(space, section.architectures, section.seed)
    if len(archs) < section.architectures:
        run.say(f"latency: the space has only {len(archs)} architectures; all are measured")
    return learn(archs, section, vocab_size, out)


def learn(archs: Sequence[Arch], section: Latency, vocab_size: int, out: Path) -> dict[str, Any]:
    """Measure `archs` (the first is the largest) into `out`/table.jsonl, fit `out`/predictor.json; the headline."""
    rows = measure(archs, section, vocab_size, out / TABLE)
    found = predictor.train(archs, [row["median_ms"] for row in rows], setting_of(section, vocab_size), section.seed)
    noisy = sum(row["noisy"] for row in rows)
    measured = {
        "architectures": len(rows),
        "largest": rows[0]["arch"],
        "largest_ms": rows[0]["median_ms"],
        "noisy": noisy,
        **noise(out / TABLE),
    }
    found.report.update(measured)
    run.write_json(out / PREDICTOR, found.to_json())
    if noisy:
        run.say(f"latency: {noisy} of {len(rows)} architectures stayed noisy; measure on an idle machine to be sure")
    return {**{name: measured[name] for name in ("architectures", "largest_ms", "repeat_noise", "noisy")},
            **predictor.summary(found.report)}  # fmt: skip
