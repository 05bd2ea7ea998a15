"""What training through views costs against training the extracted encoder, per step, and with torch.compile.

Pairs in one process: forward, backward and AdamW step of the slice inside the super-network, and of the extracted model
of the same architecture on the same batch, in turn. Torch.compile: one compiled block for all architectures, sizes
dynamic; the number of graphs it made is counted. Prints a table and writes benchmarks/results/slicing.json.
    python benchmarks/slicing.py [--pairs 20] [--no-compile]
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from frugalbert import dist
from frugalbert.model import slicing
from frugalbert.model.arch import Arch
from frugalbert.model.configuration import FrugalConfig
from frugalbert.model.modeling import FrugalForMaskedLM
from frugalbert.space import Space

VOCABULARY, ROWS, LENGTH, MASKED = 8192, 16, 128, 19
SPACES = {
    "bert": Space((2, 3, 4), tuple(range(128, 257, 32)), (2, 3, 4), (64,), tuple(range(256, 1025, 128))),
    "bert, parts of every head": Space((2, 3, 4), tuple(range(128, 257, 32)), (4,), (16, 32, 48, 64), (256, 512, 1024)),
    "modern": Space((2, 3, 4), tuple(range(128, 257, 32)), (2, 3, 4), (64,), (256, 384, 640), "modern"),
}


def batch(device: torch.device) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
    chosen = torch.stack([torch.randperm(LENGTH, generator=generator)[:MASKED] for _ in range(ROWS)])
    positions = (chosen + torch.arange(ROWS)[:, None] * LENGTH).flatten()
    labels = ids.flatten()[positions]
    return {name: value.to(device) for name, value in
            {"input_ids": ids, "masked_positions": positions, "labels": labels}.items()}  # fmt: skip


def seconds(step: Any, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def pairs(space: Space, count: int, device: torch.device, precision: str) -> dict[str, Any]:
    """Milliseconds and ratios of `count` random architectures; the first of each is not timed."""
    torch.manual_seed(0)
    big = FrugalForMaskedLM(FrugalConfig.from_arch(space.largest(), VOCABULARY)).to(device).train()
    inputs, rng = batch(device), np.random.default_rng(0)
    optimizer = torch.optim.AdamW(big.parameters(), fused=True)
    rows = []
    for _ in range(count):
        arch = space.sample(rng)
        small = slicing.extract(big, arch)
        other = torch.optim.AdamW(small.parameters(), fused=True)

        def inside(arch: Arch = arch) -> None:
            optimizer.zero_grad()
            with dist.autocast(device, precision):
                loss = slicing.forward(big, arch, **inputs).loss
            loss.backward()

        def outside(small: Any = small, other: Any = other) -> None:
            other.zero_grad()
            with dist.autocast(device, precision):
                loss = small(**inputs).loss
            loss.backward()

        inside(), outside()
        times = [(seconds(inside, device), seconds(outside, device)) for _ in range(5)]
        view, extracted = (statistics.median(column) for column in zip(*times, strict=True))
        rows.append((view, extracted, seconds(optimizer.step, device)))
    ratios = [view / extracted for view, extracted, _ in rows]
    return {
        "architectures": count,
        "view_ms": round(1e3 * statistics.median(row[0] for row in rows), 2),
        "extracted_ms": round(1e3 * statistics.median(row[1] for row in rows), 2),
        "optimizer_step_of_the_whole_ms": round(1e3 * statistics.median(row[2] for row in rows), 2),
        "ratio_min_median_max": [round(f(ratios), 3) for f in (min, statistics.median, max)],
    }


def compiled(space: Space, count: int, device: torch.device, precision: str) -> dict[str, Any]:
    """The same views with compiled blocks: graphs made, and milliseconds once they are there."""
    import torch._dynamo as dynamo
    from torch._dynamo.utils import counters

    dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    big = FrugalForMaskedLM(FrugalConfig.from_arch(space.largest(), VOCABULARY)).to(device).train()
    inputs, rng = batch(device), np.random.default_rng(0)
    archs = [space.sample(rng) for _ in range(count)]

    def step(arch: Arch) -> None:
        big.zero_grad()
        shell = slicing.skeleton(big, arch)
        for block in shell.model.layers:
            if block._compiled_call_impl is None:
                block.compile(dynamic=True)
        with dist.autocast(device, precision):
            loss = slicing.forward(big, arch, **inputs).loss
        loss.backward()

    first = [seconds(lambda arch=arch: step(arch), device) for arch in archs]
    again = [seconds(lambda arch=arch: step(arch), device) for arch in archs]
    return {
        "architectures": len(set(archs)),
        "graphs": counters["stats"]["unique_graphs"],
        "first_pass_seconds": round(sum(first), 2),
        "view_ms": round(1e3 * statistics.median(again), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "slicing.json")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    precision = dist.pick_precision("auto", device)
    if device.type == "cpu":
        torch.set_num_threads(dist.usable_cores())
        dist.keep_heap()
    found: dict[str, Any] = {name: {"eager": pairs(space, options.pairs, device, precision)}
                             for name, space in SPACES.items()}  # fmt: skip
    if not options.no_compile:
        found["bert"]["compiled"] = compiled(SPACES["bert"], options.pairs, device, precision)
    from throughput import environment, save

    save(options.out, {"environment": environment(), "precision": precision, "results": found})
    for name, row in found.items():
        low, middle, high = row["eager"]["ratio_min_median_max"]
        print(f"{name:28} view {row['eager']['view_ms']:8.2f} ms, extracted {row['eager']['extracted_ms']:8.2f} ms, "
              f"ratio {low} {middle} {high}", row.get("compiled", ""))  # fmt: skip


if __name__ == "__main__":
    main()
