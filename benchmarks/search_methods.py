"""Search methods against random choice at equal numbers of evaluations, on a table of scored architectures.

The table has a JSON line per architecture: `arch` (one-line form), `score` (lower is better), `latency_ms`; a search's
own `candidates.jsonl` will do. Every method sees the table alone, under the same latency limit, with the same seeds:
  random, fast            as in frugalbert.search.evolution
  evolution               mutation and crossover
  evolution-no-crossover  mutation alone
  local                   first improvement among the neighbours (a step along one axis), random restarts
Regret = best score so far minus the best in the table within the limit. A method's final regret is compared with
random's, seed by seed, by Wilcoxon's signed-rank test (two-sided; Holm over the methods); p >= 0.05 is called a tie.

  python benchmarks/search_methods.py TABLE.jsonl                    writes results/search_methods.json and .png
  python benchmarks/search_methods.py --synthetic /tmp/table.jsonl   a made-up table to try the script with; no evidence
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from frugalbert import config  # noqa: E402  (after the path)
from frugalbert.budget import Clock  # noqa: E402
from frugalbert.model.arch import Arch  # noqa: E402
from frugalbert.run import sha256  # noqa: E402
from frugalbert.search.candidates import Candidate, Region  # noqa: E402
from frugalbert.search.evolution import METHODS, Method, Settings  # noqa: E402
from frugalbert.search.run import drive  # noqa: E402
from frugalbert.space import AXES, Space  # noqa: E402

LEAST = 400
TABLE = ROOT / "benchmarks" / "results" / "search_table.jsonl"
Table = dict[Arch, tuple[float, float]]
"""Arch -> (score, latency_ms)."""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", default=str(TABLE), help=f"JSON lines; default: results/{TABLE.name}")
    parser.add_argument("--synthetic", metavar="PATH", help="write a made-up table there and use it")
    parser.add_argument("--limit-ms", type=float, help="latency limit; default: the median of the table")
    parser.add_argument("--evaluations", type=int, default=60)
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "search_methods.json"))
    options = parser.parse_args()
    if options.seeds < 30:
        parser.error("fewer than 30 seeds prove nothing; write --seeds 30 or more")
    return options


# ---- the table -------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> Table:
    table: Table = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        if entry["score"] is not None:
            table[Arch.parse(entry["arch"])] = (float(entry["score"]), float(entry["latency_ms"]))
    if len(table) < LEAST:
        raise SystemExit(f"{path} has {len(table)} scored architectures; a comparison needs {LEAST}")
    return table


def space_of(table: Table) -> Space:
    """The space whose axes are the table's values. What is on the axes but not in the table is outside every limit."""
    values: dict[str, set[int]] = {name: set() for name in AXES}
    for arch in table:
        values["depth"].add(len(arch.layers))
        for layer in arch.layers:
            for name in AXES[1:]:
                values[name].add(getattr(layer, name))
    mixed = any(len(set(arch.layers)) > 1 for arch in table)
    return Space(**{name: tuple(found) for name, found in values.items()}, family=next(iter(table)).family, mixed=mixed)


def write_synthetic(path: Path) -> None:
    """A power law in the sizes with an interaction, and noise as of a real proxy: only to try the script."""
    space = Space((1, 2, 3, 4), (64, 96, 128, 160), (2, 3, 4, 6), (16, 32), (112, 168, 224, 280, 448))
    rng = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for arch in space.enumerate():
            layer, depth = arch.layers[0], len(arch.layers)
            score = 3 + 0.7 / depth**0.5 + 9 / layer.hidden**0.8 + 0.2 / layer.heads + 4 / layer.ffn**0.7
            score += 0.03 * math.log(layer.qkv / layer.hidden) ** 2 + rng.normal(0, 0.01)
            latency = 0.3 + depth * (0.1 + layer.hidden * (4 * layer.qkv + 2 * layer.ffn) / 4e5)
            file.write(json.dumps({"arch": str(arch), "score": score, "latency_ms": latency}) + "\n")


# ---- methods ---------------------------------------------------------------------------------------------------------


def neighbours(space: Space, arch: Arch) -> Iterator[Arch]:
    """Every member one step along one axis away; uniform spaces."""
    layer = arch.layers[0]
    genes = {"depth": len(arch.layers), **{name: getattr(layer, name) for name in AXES[1:]}}
    for name in AXES:
        axis = getattr(space, name)
        here = axis.index(genes[name])
        for index in (here - 1, here + 1):
            if 0 <= index < len(axis):
                other = Arch.uniform(space.family, **(genes | {name: axis[index]}))
                if space.contains(other):
                    yield other


def local(region: Region, settings: Settings, rng: np.random.Generator) -> Method:
    """First improvement: neighbours in random order, move to the first better one; at an optimum begin elsewhere."""
    seen: set[Arch] = set()
    while found := region.draw(rng, seen):
        seen.add(found[0])
        (here,) = yield [Candidate(*found, "random")]
        moved = True
        while moved:
            moved = False
            around = list(neighbours(region.space, here.arch))
            for index in rng.permutation(len(around)).tolist():
                costs, gap = region.look(around[index])
                if gap == 0.0 and around[index] not in seen:
                    seen.add(around[index])
                    (there,) = yield [Candidate(around[index], costs, "mutation", (str(here.arch),))]
                    if there.score < here.score:
                        here, moved = there, True
                        break


def run_method(name: str, table: Table, space: Space, seed: int, options: argparse.Namespace) -> list[float]:
    """Best score after each evaluation."""

    def cost(arch: Arch) -> dict[str, float]:
        return {"latency_ms": table[arch][1] if arch in table else math.inf, "parameters": 1.0, "flops": 1.0}

    crossover = 0.0 if name == "evolution-no-crossover" else 0.4
    settings = Settings(evaluations=options.evaluations, population=options.population, crossover=crossover)
    region = Region(space, cost, config.Limit(latency_ms=(options.limit_ms,)))
    make = local if name == "local" else METHODS[name.split("-")[0]]
    method = make(region, settings, np.random.default_rng(seed))
    with contextlib.redirect_stderr(io.StringIO()):
        result = drive(method, region, lambda archs: [table[arch][0] for arch in archs], Clock(), settings)
    best = np.minimum.accumulate([candidate.score for candidate in result.candidates])
    return np.pad(best, (0, options.evaluations - len(best)), mode="edge").tolist()


# ---- judgement -------------------------------------------------------------------------------------------------------


def compare(regrets: dict[str, np.ndarray]) -> dict[str, Any]:
    """Final regret of each method: mean with a 95 % bootstrap interval, and the paired test against random."""
    from scipy.stats import bootstrap, wilcoxon

    found: dict[str, Any] = {}
    base = regrets["random"][:, -1]
    for name, curves in regrets.items():
        final = curves[:, -1]
        spread = final.std() > 0
        low, high = (
            bootstrap((final,), np.mean, rng=np.random.default_rng(0), method="percentile").confidence_interval
            if spread
            else (final.mean(), final.mean())
        )
        found[name] = {"final_regret": float(final.mean()), "interval_95": [float(low), float(high)]}
        found[name] |= {"mean_regret_over_search": float(curves.mean()), "optimum_found": int((final <= 1e-12).sum())}
        if name != "random":
            gain = base - final
            p = float(wilcoxon(gain, zero_method="pratt").pvalue) if np.any(gain) else 1.0
            counts = {"better": int((gain > 0).sum()), "equal": int((gain == 0).sum()), "worse": int((gain < 0).sum())}
            found[name] |= {"seeds_against_random": counts, "median_gain": float(np.median(gain)), "wilcoxon_p": p}
    highest = 0.0
    tested = sorted((name for name in found if name != "random"), key=lambda name: found[name]["wilcoxon_p"])
    for rank, name in enumerate(tested):
        highest = max(highest, min(1.0, found[name]["wilcoxon_p"] * (len(tested) - rank)))
        gain = (base - regrets[name][:, -1]).mean()
        verdict = "tie with random" if highest >= 0.05 else "better than random" if gain > 0 else "worse than random"
        found[name] |= {"holm_p": highest, "verdict": verdict}
    return found


def draw(regrets: dict[str, np.ndarray], path: Path, title: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    steps = np.arange(1, regrets["random"].shape[1] + 1)
    for name, curves in regrets.items():
        mean, error = curves.mean(0), 1.96 * curves.std(0, ddof=1) / math.sqrt(len(curves))
        axes.plot(steps, mean, label=name, linewidth=2.5 if name == "random" else 1.5)
        axes.fill_between(steps, mean - error, mean + error, alpha=0.15)
    axes.set(xlabel="evaluations", ylabel="regret of the best so far", title=title, yscale="symlog")
    smallest = min(curves.mean(0)[curves.mean(0) > 0].min(initial=1.0) for curves in regrets.values())
    axes.set_yscale("symlog", linthresh=smallest)
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main() -> None:
    options = parse()
    if options.synthetic:
        write_synthetic(Path(options.synthetic))
    elif not Path(options.table).exists():
        print(f"nothing done: {options.table} does not exist; a search's candidates.jsonl is such a table")
        return
    path = Path(options.synthetic or options.table)
    table = read_table(path)
    options.limit_ms = options.limit_ms or statistics.median(latency for _, latency in table.values())
    inside = [score for score, latency in table.values() if latency <= options.limit_ms]
    if options.evaluations > len(inside) // 2:
        raise SystemExit(f"{len(inside)} architectures are within the limit; write --evaluations {len(inside) // 2}")
    space = space_of(table)
    names = ["random", "fast", "evolution", "evolution-no-crossover", *([] if space.mixed else ["local"])]
    best = min(inside)
    regrets = {
        name: np.array([run_method(name, table, space, seed, options) for seed in range(options.seeds)]) - best
        for name in names
    }
    about = {
        "file": path.name,
        "sha256": sha256(path),
        "synthetic": bool(options.synthetic),
        "architectures": len(table),
    }
    from throughput import environment, save

    result = {
        "benchmark": "search methods",
        "table": about | {"within_limit": len(inside), "axes": space.to_json(), "score_spread": float(np.std(inside))},
        "options": {name: getattr(options, name) for name in ("limit_ms", "evaluations", "population", "seeds")},
        "methods": compare(regrets),
        "mean_regret": {name: curves.mean(0).tolist() for name, curves in regrets.items()},
        "environment": environment(),
    }
    out = Path(options.out)
    save(out, result)
    draw(regrets, out.with_suffix(".png"), f"{len(inside)} architectures within the limit, {options.seeds} seeds")
    print(json.dumps(result["methods"], indent=1))


if __name__ == "__main__":
    main()
