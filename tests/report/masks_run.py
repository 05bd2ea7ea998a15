"""Made-up stages attention and importance, as they would leave their folders."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import numpy as np

from tests.report.conftest import VERSIONS, dump, dump_lines


def record(folder: Path, stage: str) -> None:
    dump(folder / stage / "stage.json", {
        "stage": stage, "section": {}, "inputs": {}, "fingerprint": "8b3a9c27d1e84b05", "seconds": 61.0, "metrics": {},
        "device": "cpu", "versions": VERSIONS, "finished": "2026-11-20T13:40:31+00:00",
    })  # fmt: skip


def rows_of(share: str, layers: int, heads: int) -> list[list[int]]:
    """The number of the mask of each head of each layer."""
    if share == "none":
        return [[layer * heads + head for head in range(heads)] for layer in range(layers)]
    return [[layer] * heads if share == "heads" else list(range(heads)) for layer in range(layers)]


def add_attention(
    folder: Path, share: str = "layers", layers: int = 4, heads: int = 4, length: int = 128, **changes: Any
) -> Path:
    """A search of Toeplitz masks; `changes` are of masks.json."""
    rows = rows_of(share, layers, heads)
    chance, size = np.random.default_rng(0), min(length, 128)
    place = np.arange(size)
    distance = abs(place[:, None] - place[None])
    shares = []
    for _ in range(1 + max(max(row) for row in rows)):
        line = 1 / (1 + np.exp(-chance.normal(-2.5, 2.0, size)))
        line[: chance.integers(1, 12)] = 0.97
        shares.append(line[distance])
    probability = np.stack(shares)
    kept = probability > 0.5
    densities = kept.mean((1, 2)).tolist()
    density, share_of_work = float(np.mean(densities)), length / (length + 2000)
    facts = {
        "patterns": ["toeplitz:0..3"] * layers, "density": density, "densities": densities,
        "occupancy": {"32": 0.62, "64": 0.41, "128": 1.0}, "most_blocks": {"32": 4, "64": 2, "128": 1},
        "attention_share": share_of_work, "bound": 1 / (1 - share_of_work), "structure": "toeplitz", "length": length,
        "block": 64, "share": share, "rows": rows, "target": 0.1, "repaired": 2, "soft": False,
        "expected_density": density + 0.01, "threshold_density": density, "undecided": 0.07, "global_positions": [],
    }  # fmt: skip
    dump(folder / "attention" / "masks.json", facts | changes)
    with open(folder / "attention" / "masks.npz", "wb") as file:
        np.savez_compressed(file, probability=probability.astype(np.float16), kept=kept.astype(np.float16))
    lines, noise = [], random.Random(5)
    for step in range(1, 301):
        progress = step / 300
        expected = 0.1 + 0.4 * math.exp(-5 * progress)
        lines.append({
            "step": step, "progress": progress, "seconds": 60 * progress, "tokens": 4096 * step, "loss": 5.0,
            "density_expected": expected, "density_kept": 0.5 * (1 - progress) ** 3 + density + noise.gauss(0, 0.005),
            "undecided": max(0.07, 1 - 3 * progress),
        })  # fmt: skip
    dump_lines(folder / "attention" / "metrics.jsonl", lines)
    record(folder, "attention")
    return folder


KINDS = {"rest": 0.47, "neighbours": 0.58, "sep": 0.53, "cls": 0.55, "diagonal": 0.41}


def add_importance(folder: Path, share: str = "none", layers: int = 4, heads: int = 4, seeds: int = 3) -> Path:
    """Soft maps and a study: without the diagonal a little worse than full attention, after random drops worse."""
    rows = rows_of(share, layers, heads)
    chance, size = np.random.default_rng(1), 128
    place = np.arange(size)
    distance = abs(place[:, None] - place[None])
    maps, pictures, curves = [], [], []
    for _ in range(1 + max(max(row) for row in rows)):
        groups = {name: value + chance.normal(0, 0.02) for name, value in KINDS.items()}
        noise = chance.normal(0, 0.02, (size, size))
        square = (
            groups["rest"] + (groups["neighbours"] - groups["rest"]) / np.maximum(distance, 1) + (noise + noise.T) / 2
        )
        square[0], square[:, 0], square[distance == 0] = groups["cls"], groups["cls"], groups["diagonal"]
        square[120:], square[:, 120:] = np.nan, np.nan
        curve = np.array([square.diagonal(number)[np.isfinite(square.diagonal(number))].mean() if number < 120 else
                          np.nan for number in range(size)])  # fmt: skip
        maps.append(groups)
        pictures.append(square)
        curves.append(curve)
    mean = {name: float(np.mean([one[name] for one in maps])) for name in KINDS}
    dump(folder / "importance" / "importance.json", {
        "length": size, "share": share, "rows": rows, "documents": 1734, "groups": mean, "maps": maps,
        "pairs": {"rest": 0.945, "neighbours": 0.015, "sep": 0.0155, "cls": 0.0158, "diagonal": 0.0087},
        "by_distance": [None if np.isnan(value) else value for value in np.mean(curves, 0).tolist()],
    })  # fmt: skip
    with open(folder / "importance" / "importance.npz", "wb") as file:
        np.savez_compressed(file, probability=np.stack(pictures).astype(np.float16),
                            by_distance=np.stack(curves).astype(np.float32))  # fmt: skip
    dump_lines(folder / "importance" / "metrics.jsonl", [
        {"step": step, "progress": step / 20, "seconds": step, "tokens": 4096 * step, "loss": 6.0}
        for step in range(1, 21)
    ])  # fmt: skip
    dump(folder / "importance" / "results.json", study(seeds))
    record(folder, "importance")
    return folder


def study(seeds: int = 3) -> dict[str, Any]:
    """Two controls beside full attention and no diagonal."""
    gaps = {"full attention": 0.0, "no diagonal": 0.001, "random drop 1": 0.004, "random drop 2": 0.006}
    ends = None if seeds == 1 else 0.002
    variants = [
        {"name": name, "losses": [4.2 + gap + 0.01 * seed for seed in range(seeds)], "mean": 4.2 + gap,
         "difference": {"mean": gap, "interval": ends and [gap - ends, gap + ends], "pairs": seeds},
         "dropped": 0.0 if name == "full attention" else 0.0087 if name == "no diagonal" else 0.0078}
        for name, gap in gaps.items()
    ]  # fmt: skip
    differences = {"no_diagonal": 0.001, "random": 0.005, "no_diagonal_to_random": -0.004}
    return {
        "seeds": list(range(seeds)), "steps": 2000, "recipe": {"optimizer": "adamw"}, "length": 128,
        "dropped_pairs": 128, "dropped_share": 1 / 128, "variants": variants,
        "differences": {name: {"mean": gap, "interval": ends and [gap - ends, gap + ends], "pairs": seeds}
                        for name, gap in differences.items()},
    }  # fmt: skip
