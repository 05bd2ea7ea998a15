"""How well the latency of architectures that were never timed is predicted, on AutoTinyBERT's search space.

The space: 1 to 8 layers, hidden 128..768 in steps of 16, feed-forward 128..3072 in steps of 32, 1 to 12 heads of 64
(arXiv 2107.13686, setting MLM). 260 architectures (all depths, sizes drawn evenly) and the published ones are timed
extracted, one thread, 1 x 128 tokens; 180 train and 80 judge every predictor, over many random splits. Negative
control: training on depths 1 and 8 alone, as the original code does. Bars: held-out error at most 3 %, rank
correlation at least 0.995, and clearly better than the FLOPs regression.

  python benchmarks/latency_predictor.py            measure (about 10 minutes on an idle core) and judge
  python benchmarks/latency_predictor.py --quick    a short look: 40 architectures, no result file

A killed measurement goes on where it stood (`--work`). Keep the machine idle meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from frugalbert.config import Latency  # noqa: E402
from frugalbert.measure import predictor, table  # noqa: E402
from frugalbert.model.arch import Arch  # noqa: E402
from frugalbert.model.cost import forward_flops, parameter_count  # noqa: E402
from frugalbert.space import Space  # noqa: E402

VOCABULARY = 30522
BARS = {"mape": 0.03, "spearman": 0.995}
PUBLISHED = {
    "s1": (29_573_882, 7.2), "s2": (16_874_724, 15.7), "s3": (16_707_024, 20.2), "s4": (12_195_168, 27.2),
    "kd-s1": (29_585_252, 4.6), "kd-s2": (14_222_712, 9.0), "kd-s3": (11_763_620, 10.7), "kd-s4": (9_791_360, 17.0),
}  # fmt: skip
"""Parameters with pooler, and the speed-up over BERT-base in the project's README (a Xeon of 2014)."""


SPACE = Space(
    depth=tuple(range(1, 9)),
    hidden=tuple(range(128, 769, 16)),
    heads=tuple(range(1, 13)),
    head_dim=(64,),
    ffn=tuple(range(128, 3073, 32)),
)


def errors(predicted: np.ndarray, ms: np.ndarray) -> dict[str, float]:
    return {
        "mape": round(predictor.mape(predicted, ms), 5),
        "spearman": round(predictor.spearman(predicted, ms) or 0.0, 5),
    }


def judge(x: np.ndarray, ms: np.ndarray, train: np.ndarray, test: np.ndarray) -> dict[str, Any]:
    """Every method trained on `train` and judged on `test` (indices)."""
    return {
        name: errors(predict(fit(x[train], ms[train], 0), x[test]), ms[test])
        for name, (fit, predict) in predictor.METHODS.items()
    }


def splits(judged: list[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and greatest error over random splits, and how often each method beats the FLOPs regression.

    `chosen` is what cross-validation on the training part alone chose in each split: the error that a user meets.
    """
    found = {}
    for name in (*predictor.METHODS, "chosen"):
        rows = [split["methods"][split["chosen"] if name == "chosen" else name] for split in judged]
        flops = [split["methods"]["flops"]["held_out_mape"] for split in judged]
        found[name] = {"better_than_flops": sum(a["held_out_mape"] < b for a, b in zip(rows, flops, strict=True))}
        for metric in ("mape", "spearman"):
            values = [round(row[f"held_out_{metric}"], 5) for row in rows]
            found[name][metric] = {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
    return found


def published(rows: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """AutoTinyBERT's models: measured speed-up over BERT-base beside the published one."""
    base = rows[Arch.parse("bert-base").to_text()]["median_ms"]
    lines = []
    for name, (parameters, speedup) in PUBLISHED.items():
        arch = Arch.parse(f"autotinybert-{name}")
        assert parameter_count(arch, VOCABULARY) == parameters, f"{name} has {parameter_count(arch, VOCABULARY)}"
        row = rows[arch.to_text()]
        lines.append(
            {"model": name, "arch": arch.to_text(), "parameters": parameters, "median_ms": row["median_ms"],
             "speedup": round(base / row["median_ms"], 2), "published_speedup": speedup, "noisy": row["noisy"],
             "gflop": round(128e-9 * forward_flops(arch, 128), 3)}
        )  # fmt: skip
    return [{"model": "bert-base", "median_ms": base, "speedup": 1.0, "published_speedup": 1.0}, *lines]


def plot(points: dict[str, list[tuple[float, float]]], path: Path) -> None:
    """Predicted against measured milliseconds of the held-out architectures, and the relative error of both."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    for (name, pairs), marker in zip(points.items(), "o^", strict=True):
        measured, predicted = np.array(pairs).T
        left.loglog(measured, predicted, marker, markersize=4, alpha=0.7, label=name)
        right.semilogx(measured, 100 * (predicted / measured - 1), marker, markersize=4, alpha=0.7, label=name)
    ends = left.get_xlim()
    left.plot(ends, ends, color="grey", linewidth=0.8)
    left.set(xlabel="measured, ms", ylabel="predicted, ms", title="architectures never timed in training")
    right.axhline(0, color="grey", linewidth=0.8)
    right.set(xlabel="measured, ms", ylabel="relative error, %")
    right.legend()
    figure.savefig(path, dpi=110)


def show(result: dict[str, Any]) -> None:
    print(f"{result['architectures']} architectures, {result['splits']} splits; two readings differ by "
          f"{result['repeat_noise']:.2%} (unscaled {result['repeat_noise_unscaled']:.2%})")  # fmt: skip
    for name, values in sorted(result["methods"].items(), key=lambda item: item[1]["mape"]["median"]):
        if name == "chosen":
            continue
        only = result["trained_on_depths_1_and_8"][name]["mape"]
        print(
            f"  {name:9} error {values['mape']['median']:.2%} ({values['mape']['least']:.2%} to "
            f"{values['mape']['greatest']:.2%}), rank correlation {values['spearman']['median']:.4f}, better than "
            f"flops in {values['better_than_flops']}; unseen depth {result['unseen_depth'][name]:.2%}, depths 1 and 8 "
            f"alone {only:.2%}"
        )
    values = result["methods"]["chosen"]
    print(f"  as chosen by cross-validation ({result['chosen']}): {values}; bars met: {result['bars_met']}")
    for line in result["published"]:
        print(f"  {line['model']:9} {line['median_ms']:8.2f} ms  {line['speedup']:5.1f} x  published "
              f"{line['published_speedup']} x")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", type=int, default=260)
    parser.add_argument("--train", type=int, default=180)
    parser.add_argument("--splits", type=int, default=20)
    parser.add_argument("--work", type=Path, help="where the table grows; default: a temporary directory")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "latency_predictor.json")
    options = parser.parse_args()
    if options.quick:
        options.architectures, options.train, options.splits = 40, 28, 5
    work = options.work or Path(tempfile.mkdtemp(prefix="latency-predictor-"))
    section = Latency(architectures=options.architectures)
    archs = table.choose(SPACE, options.architectures, section.seed)
    presets = [Arch.parse(name) for name in ("bert-base", *(f"autotinybert-{name}" for name in PUBLISHED))]
    found = table.measure([*archs, *presets], section, VOCABULARY, work / table.TABLE)
    rows = {row["arch"]: row for row in found}
    ms = np.array([row["median_ms"] for row in found[: len(archs)]])
    x = predictor.features(archs, section.length)
    depths = np.array([len(arch.layers) for arch in archs])
    ends = np.isin(depths, (1, 8))
    share = 1 - options.train / len(archs)
    judged = [predictor.judge(archs, ms.tolist(), section.length, seed, share) for seed in range(options.splits)]
    methods, first = splits(judged), judged[0]
    best, flops = methods["chosen"], methods["flops"]
    order = np.random.default_rng(0).permutation(len(ms))
    train, test = order[: options.train], order[options.train :]
    points = {
        name: list(zip(ms[test], predict(fit(x[train], ms[train], 0), x[test]), strict=True))
        for name, (fit, predict) in predictor.METHODS.items() if name in (first["chosen"], "flops")
    }  # fmt: skip
    from throughput import environment, save

    result = {
        "setting": table.setting_of(section, VOCABULARY),
        "environment": environment(),
        "architectures": len(archs),
        "train": options.train,
        "splits": options.splits,
        **table.noise(work / table.TABLE),
        "noisy": sum(row["noisy"] for row in found),
        "range_ms": [float(ms.min()), float(ms.max())],
        "chosen": {name: sum(split["chosen"] == name for split in judged) for name in predictor.METHODS},
        "methods": methods,
        "unseen_depth": {name: round(values["unseen_depth_mape"], 5) for name, values in first["methods"].items()},
        "trained_on_depths_1_and_8": judge(x, ms, np.flatnonzero(ends), np.flatnonzero(~ends)),
        "bars": BARS,
        "bars_met": {
            "mape": best["mape"]["median"] <= BARS["mape"],
            "spearman": best["spearman"]["median"] >= BARS["spearman"],
            "better_than_flops_in_every_split": best["better_than_flops"] == options.splits,
            "flops_mape_over_chosen": round(flops["mape"]["median"] / best["mape"]["median"], 2),
        },
        "published": published(rows),
        "rows": [[row["arch"], row["median_ms"]] for row in found],
    }
    show(result)
    if not options.quick:
        save(options.out, result)
        plot(points, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
