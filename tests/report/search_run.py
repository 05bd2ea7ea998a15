"""A made-up run with an architecture search, as its four stages would leave it."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from tests.report.conftest import VERSIONS, dump, dump_lines

SPACE = {
    "family": "bert", "depth": [1, 2, 3, 4, 5, 6, 7, 8], "hidden": list(range(128, 769, 16)),
    "heads": list(range(1, 13)), "head_dim": [64], "ffn": list(range(128, 3073, 32)), "mixed": False,
    "qkv_at_most_hidden": False, "exportable": False,
}  # fmt: skip
METRICS = {"architectures": 365_952, "smallest_parameters": 4_079_744, "largest_parameters": 81_088_000}
STAGES = ("space", "supernet", "latency", "search")
LARGEST_MS = 120.0
TEXTS = {
    "origin": "design", "arch": "bert 2x256 heads=4 ffn=512", "processor": "AMD EPYC 9B45",
    "maximum": "bert 24x1024 heads=16 ffn=4096",
}  # fmt: skip


def add_search(folder: Path, texts: dict[str, str] | None = None, candidates: int = 240) -> Path:
    """Put the four stages into a run; `texts` replaces some of `TEXTS`."""
    words = {**TEXTS, **(texts or {})}
    folder.mkdir(parents=True, exist_ok=True)
    dump(folder / "space" / "space.json", SPACE)
    _supernet(folder / "supernet", 400 if candidates > 100 else 40)
    _latency(folder / "latency", words)
    _search(folder / "search", words, candidates)
    sections = {"search": {"method": "evolution", "limit": {"latency_ms": None, "speedup": [4.0], "parameters": None},
                           "quality": "loss"}}  # fmt: skip
    for index, stage in enumerate(STAGES):
        dump(folder / stage / "stage.json", {
            "stage": stage, "section": sections.get(stage, {}), "inputs": {}, "fingerprint": f"{index}b3a9c27d1e84b05",
            "seconds": 60.0 * index + 1, "device": "cpu", "versions": VERSIONS,
            "metrics": METRICS if stage == "space" else {}, "finished": f"2026-11-20T13:{10 + index}:31+00:00",
        })  # fmt: skip
    return folder


def _supernet(folder: Path, steps: int) -> None:
    chance, rows = random.Random(1), []
    for step in range(1, steps + 1):
        progress = step / steps
        base = 3.6 + 5.0 * math.exp(-progress * 7)
        about = {"step": step, "progress": progress, "seconds": 600 * progress, "tokens": step * 4096}
        rows.append(about | {"loss": 2.2 * base, "text_loss": base + 0.5 + chance.gauss(0, 0.1), "learning_rate": 1e-3,
                             "mask_rate": 0.15, "tokens_per_second": 2700.0})  # fmt: skip
        if step % (steps // 10) == 0:
            losses = {"": base, "_median": base + 0.3, "_smallest": base + 0.9}
            rows.append(about | {f"validation_loss{end}": loss for end, loss in losses.items()}
                        | {"validation_accuracy": 0.3})  # fmt: skip
        if step == steps // 2:
            rows.append({"step": step, "progress": progress, "event": "the loss jumped from about 4 to 13"})
    dump_lines(folder / "metrics.jsonl", rows)
    final = {key: value for key, value in rows[-1].items() if key.startswith("validation")}
    dump(folder / "summary.json", {
        "arch": "bert 8x768 heads=12 ffn=3072", "parameters": 81_688_000, "tokens": steps * 4096, "steps": steps,
        "seconds": 600.0, "flops_per_token": 9.1e8, "final_validation": final, "final_validation_accuracy": 0.3,
        "unigram_nll": 6.041, "bigram_nll": 4.873,
    })  # fmt: skip


def _latency(folder: Path, words: dict[str, str]) -> None:
    methods = {
        "linear": (0.021, 0.019, 0.9991, 0.034), "trees": (0.017, 0.016, 0.9993, 0.071),
        "flops": (0.142, 0.137, 0.9871, 0.266),
    }  # fmt: skip
    names = ("cross_validated_mape", "held_out_mape", "held_out_spearman", "unseen_depth_mape")
    chance = random.Random(2)
    points = [[ms, ms * (1 + chance.gauss(0, 0.02))] for ms in sorted(chance.uniform(2, LARGEST_MS) for _ in range(24))]
    dump(folder / "predictor.json", {"method": "trees", "setting": {"processor": words["processor"]}, "report": {
        "chosen": "trees", "held_out": 24, "points": points, "architectures": 120, "noisy": 3, "repeat_noise": 0.011,
        "largest": "bert 8x768 heads=12 ffn=3072", "largest_ms": LARGEST_MS,
        "methods": {name: dict(zip(names, values, strict=True)) for name, values in methods.items()},
    }})  # fmt: skip


def _search(folder: Path, words: dict[str, str], number: int) -> None:
    chance, rows = random.Random(3), []
    origins = ("random", "mutation", "crossover", words["origin"])
    for index in range(number):
        ms = chance.uniform(4, 30)
        score = 3.6 + 12 / ms + abs(chance.gauss(0, 0.5)) * (1 - 0.7 * index / number)
        rows.append({
            "arch": words["arch"] if index < 2 else f"bert 2x256 heads=4 ffn={512 + index}", "score": score,
            "latency_ms": ms, "parameters": 2_000_000 + int(5e5 * ms), "flops": 1e9 * ms, "speedup": LARGEST_MS / ms,
            "generation": index // 32, "origin": origins[0 if index < 32 else 1 + index % 3], "parents": [],
        })  # fmt: skip
    dump_lines(folder / "candidates.jsonl", [*rows, {**rows[0], "score": None}])
    front = [row for row in rows if not any(_beats(other, row) for other in rows)]
    dump(folder / "pareto.json", sorted(front, key=lambda row: row["latency_ms"]))
    best = sorted(rows, key=lambda row: row["score"])[:5]
    finalists = [row | {"measured_ms": row["latency_ms"] * 0.98, "noisy": False, "violates": False} for row in best]
    dump(folder / "search.json", {
        "best": best[0], "evaluations": number, "failed": 1, "generations": 8, "stopped": "evaluations",
        "feasible_share": 0.183, "walked": False, "chosen": finalists[0], "finalists": finalists, "violations": 0,
    })  # fmt: skip


def add_extraction(folder: Path, texts: dict[str, str] | None = None, candidates: int = 240, **changes: Any) -> Path:
    """`add_search`, but its search is an extraction; `changes` are of search.json's object `extraction`."""
    words = {**TEXTS, **(texts or {})}
    add_search(folder, texts, candidates)
    chance, rows = random.Random(4), []
    for index in range(candidates):
        ms = 4 + 30 * index / candidates + chance.uniform(0, 8)
        parameters, error = 2_000_000 + int(5e5 * ms), 3.6 + 12 / ms + chance.gauss(0, 0.15)
        rejected = "more inference cost than the maximum point" if ms > 38 else None
        w = None if rejected else (1 - parameters / 4e7) * (1 - ms / 38) / error
        rows.append({
            "arch": words["arch"] if index == 1 else f"bert 2x256 heads=4 ffn={512 + index}",
            "score": None if rejected else error, "error": None if rejected else error, "latency_ms": ms, "w": w,
            "parameters": parameters, "flops": 1e9 * ms, "speedup": LARGEST_MS / ms, "generation": 0,
            "origin": "extraction", "parents": [], "rejected": rejected, "theta": 0, "w_std": 0.002,
        })  # fmt: skip
    dump_lines(folder / "search" / "candidates.jsonl", rows)
    ranked = sorted((row for row in rows if row["w"] is not None), key=lambda row: -row["w"])
    finalists = [row | {"measured_ms": row["latency_ms"], "noisy": False, "violates": False} for row in ranked[:5]]
    told = {
        "maximum": words["maximum"], "maximum_parameters": 4e7, "maximum_inference": 38.0, "inference": "latency_ms",
        "interval": 2, "representative": "first", "space": 2 * candidates, "visited": candidates,
        "rejected": len(rows) - len(ranked), "floor": 1e-3, "floored": 0, "ranking": ranked[:20],
        "sensitivity": {
            "maximum": {"1": ranked[0]["arch"], "2": ranked[0]["arch"], "10": ranked[-1]["arch"]},
            "interval": {"2": ranked[0]["arch"], "4": ranked[-1]["arch"]}, "inference": {"flops": ranked[0]["arch"]},
            "looks": {"1": ranked[-1]["arch"], "2": ranked[0]["arch"]}, "half_of_the_rows": ranked[0]["arch"],
        },
    }  # fmt: skip
    dump(folder / "search" / "search.json", {
        "best": ranked[0], "evaluations": candidates, "failed": len(rows) - len(ranked), "generations": 1,
        "stopped": "evaluations", "feasible_share": None, "walked": False, "chosen": finalists[0],
        "finalists": finalists, "violations": 0, "extraction": {**told, **changes},
    })  # fmt: skip
    return folder


def _beats(one: dict[str, Any], two: dict[str, Any]) -> bool:
    return one["score"] < two["score"] and one["latency_ms"] < two["latency_ms"]
