"""How it scales: loss and tokens/s over sizes and budgets, one process and two, data preparation over cores and text.

sizes      the recipe of time_to_loss.py on Wikipedia, architectures of the `modern` family, budgets in tokens, doubled
           until the largest number of operations; held-out loss at 15 % masks, tokens per second. A cell that is done
           is never trained again (`--work`), so that the table may grow over days. The points are fitted by
           L(N, D) = E + A / N^a + B / D^b (Hoffmann et al. 2022, arXiv 2203.15556, section 3.3), N = parameters of
           the layers, D = tokens; each point is also foretold by a fit to all others
processes  the same training by one process with one thread, by one with two, and by two with one each (torchrun)
data       the stages corpus and shards with one worker and two, 50 to 400 MB of text: seconds and peak memory

python benchmarks/scaling.py --part sizes --work DIR          adds what is missing, up to --most-flops a cell
python benchmarks/scaling.py --part sizes --work DIR --report  the fit to what there is
python benchmarks/scaling.py --part processes data --work DIR
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from evidence import DATA, ROOT, run_on_wikipedia, told
from throughput import environment, save, spread
from time_to_loss import ours

SIZES = ("2x128", "3x192", "4x256", "6x384", "8x512")
PRIOR, SPREAD, NOISE = (1.69, 0.34, 0.28), 0.5, 0.02  # E, a, b of Hoffmann et al. 2022, approach 3
SMALLEST = 2_000_000  # tokens of the shortest training: below, small encoders have not left the unigrams' loss
LENGTH, VOCABULARY = 128, 8192
RECIPE: dict[str, Any] = {key: value for key, value in ours("cpu")["ours"].items() if key != "arch"} | {
    "checkpoints": {"every": "5m"}, "validation": {"every": 0.5, "begin_every": 0.5, "end_every": 0.5, "rows": 1024},
}  # fmt: skip
DATA_YAML = f"""name: scaling
corpus: {{sources: [text], held_out: 0.01}}
tokenizer: {{kind: wordpiece, vocab_size: {VOCABULARY}, lowercase: true}}
shards: {{length: {LENGTH}}}
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", nargs="+", choices=["sizes", "processes", "data"], default=["sizes"])
    parser.add_argument("--work", required=True, type=Path)
    parser.add_argument("--sizes", nargs="+", default=SIZES)
    parser.add_argument("--most-flops", type=float, default=2e14, help="no cell needs more operations")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--report", action="store_true", help="of sizes: train nothing, take what is there")
    parser.add_argument("--busy", action="store_true", help="the machine had other work: keep no speeds")
    parser.add_argument("--rounds", type=int, default=3, help="of processes and data")
    parser.add_argument("--megabytes", type=int, nargs="+", default=[50, 100, 200, 400])
    parser.add_argument("--files", nargs="+", default=[str(path) for path in sorted(DATA.glob("enwiki*.xz"))])
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "scaling.json"))
    return parser.parse_args()


def architecture(size: str) -> str:
    layers, hidden = map(int, size.split("x"))
    return f"modern {layers}x{hidden} heads={hidden // 64} ffn={hidden * 5 // 2}"


# ---- sizes and budgets -----------------------------------------------------------------------------------------------


def shards(options: argparse.Namespace) -> dict[str, Path]:
    folder = run_on_wikipedia(options.work, DATA_YAML, 100)
    return {"shards": folder / "shards", "tokenizer": folder / "tokenizer", "yaml": options.work}


def cells(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Shortest first, so that an interrupted table is complete as far as it goes."""
    from frugalbert.model.arch import Arch
    from frugalbert.model.cost import training_flops

    found = []
    for size in options.sizes:
        arch = architecture(size)
        flops = training_flops(Arch.parse(arch), VOCABULARY, LENGTH, sum(RECIPE["mask"]["rate"]) / 2)
        tokens = SMALLEST
        while tokens * flops <= options.most_flops:
            found += [
                {"size": size, "arch": arch, "tokens": tokens, "flops": tokens * flops, "seed": seed}
                for seed in range(options.seeds)
            ]
            tokens *= 2
    return sorted(found, key=lambda cell: cell["flops"])


def train(options: argparse.Namespace) -> dict[str, Any]:
    from frugalbert import config, run
    from frugalbert.train import pretrain

    inputs, rows = {} if options.report else shards(options), []
    recipe = run.fingerprint(RECIPE)[:8]
    for cell in cells(options):
        name = f"{cell['size']}-{cell['tokens'] // 1000}k-seed{cell['seed']}-{recipe}"
        out = options.work / "sizes" / name / "pretrain"
        if not (out / "summary.json").exists():
            if options.report:
                continue
            out.mkdir(parents=True, exist_ok=True)
            given = {**RECIPE, "arch": cell["arch"], "budget": f"{cell['tokens']}tok", "seed": cell["seed"]}
            machine = config.Machine(device="auto", compile=False, micro_batch=32)
            pretrain.build(config.Pretrain.model_validate(given), inputs, out, machine)
        about = run.read_json(out / "summary.json")
        rows.append(
            {
                **cell,
                "loss": about["final_validation_loss"],
                "parameters": about["encoder_parameters"],
            }
        )
        if not options.busy:
            rows[-1]["tokens_per_second"] = about["tokens_per_second"]
            rows[-1]["share_of_measured_ceiling"] = about["flop_utilisation_of_measured_ceiling"]
    if not rows:
        raise ValueError(f"{options.work} has no training by this recipe; leave --report out, or name another --work")
    return {"recipe": RECIPE, "vocabulary": VOCABULARY, "length": LENGTH, "rows": rows, "law": law(rows)}


def law(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The fit to all points, and how far off each is from the fit to the others."""
    if len(rows) < 8:
        return {}
    points = [(row["parameters"], row["tokens"], row["loss"]) for row in rows]
    errors = []
    for left in range(len(points)):
        known = fit(points[:left] + points[left + 1 :])
        errors.append(abs(predict(known, *points[left][:2]) - points[left][2]))
    found = dict(zip(("E", "A", "a", "B", "b"), fit(points), strict=True))
    return {**found, "left_out_error": {"mean": statistics.mean(errors), "largest": max(errors)}}


def predict(known: tuple[float, ...], parameters: float, tokens: float) -> float:
    floor, a_size, a, b_tokens, b = known
    return floor + a_size / parameters**a + b_tokens / tokens**b


def fit(points: list[tuple[float, float, float]]) -> tuple[float, ...]:
    """The best of several starts by least squares of the log losses, all numbers positive.

    Small budgets alone cannot tell the floor and the exponents apart, and what they would say of large ones is
    nonsense; so these three are drawn towards PRIOR, by SPREAD in the logarithm where losses are by NOISE.
    """
    import numpy as np
    from scipy.optimize import least_squares

    sizes, tokens, losses = np.array(points, dtype=float).T

    def residuals(x: Any) -> Any:
        floor, a_size, a, b_tokens, b = np.exp(np.clip(x, -50.0, 50.0))
        off = np.log(floor + a_size / sizes**a + b_tokens / tokens**b) - np.log(losses)
        return np.concatenate([off / NOISE, (x[[0, 2, 4]] - np.log(PRIOR)) / SPREAD])

    starts = [[math.log(v) for v in (floor, 100.0, a, 1000.0, b)]
              for floor in (0.5, 2.0) for a in (0.2, 0.5) for b in (0.2, 0.5)]  # fmt: skip
    tries = [least_squares(residuals, start, max_nfev=20_000) for start in starts]
    return tuple(float(value) for value in np.exp(min(tries, key=lambda one: one.cost).x))


# ---- processes -------------------------------------------------------------------------------------------------------

LAUNCH = """
import json, sys
from pathlib import Path
from frugalbert import config, dist
from frugalbert.train import pretrain
section, inputs, out, machine = json.loads(sys.argv[1])
found = pretrain.build(config.Pretrain.model_validate(section), {k: Path(v) for k, v in inputs.items()}, Path(out),
                       config.Machine.model_validate(machine))
if dist.is_main():
    print("answer " + json.dumps(found))
"""


PROCESSES = {"1x1": (1, 1), "1x2": (1, 2), "2x1": (2, 1)}  # processes, threads of each


def processes(options: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of a training of 60 steps, and its loss, by one process and by two; ratios within a round."""
    inputs = {name: str(path) for name, path in shards(options).items()}
    section = {**RECIPE, "arch": architecture("4x256"), "budget": "60steps", "batch_size": 64}
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in PROCESSES}
    for _ in range(options.rounds):
        for name, (count, threads) in PROCESSES.items():
            rounds[name].append(one_training(section, inputs, count, threads))
            print(f"{name} {rounds[name][-1]['tokens_per_second']:,.0f} tokens/s", file=sys.stderr, flush=True)
    speeds = {name: [row["tokens_per_second"] for row in rows] for name, rows in rounds.items()}
    over = {name: spread([two / one for two, one in zip(speeds["2x1"], speeds[name], strict=True)])
            for name in ("1x1", "1x2")}  # fmt: skip
    return {"processes x threads": rounds, "two_over": over}


def one_training(section: dict[str, Any], inputs: dict[str, str], count: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        out = Path(name) / "pretrain"
        out.mkdir()
        machine = {"device": "cpu", "threads": threads, "compile": False, "micro_batch": 32}
        ranks = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        launcher = [sys.executable] if count == 1 else [sys.executable, *ranks]
        script = Path(name) / "launch.py"
        script.write_text(LAUNCH)
        command = [*launcher, str(script), json.dumps([section, inputs, str(out), machine])]
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("answer ")]
        if not lines:
            raise ValueError(f"{count} processes: {(done.stderr.strip() or 'nothing was said').splitlines()[-1]}")
        answer = json.loads(lines[0].removeprefix("answer "))
        return {key: answer[key] for key in ("tokens_per_second", "final_validation_loss")}


# ---- data preparation ------------------------------------------------------------------------------------------------


def data(options: argparse.Namespace) -> list[dict[str, Any]]:
    import memory

    if not options.files:
        raise ValueError("no text: set FRUGALBERT_DATA to a folder with enwiki*.xz, or give --files")
    rows = []
    for megabytes in options.megabytes:
        for workers in (1, 2):
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                row: dict[str, Any] = {"megabytes": megabytes, "workers": workers}
                memory.write_text(options.files, folder, megabytes)
                given = argparse.Namespace(workers=workers, dedup="exact", vocab_size=8192)
                for stage in ("corpus", "tokenizer", "shards"):
                    found = memory.measure(given, folder, stage)
                    row[stage] = {key: found[key] for key in ("seconds", "tree_mb", "process_mb")}
                rows.append(row)
                print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


@told()
def main() -> None:
    from frugalbert.run import read_json

    options = parse()
    result = read_json(options.out) if Path(options.out).exists() else {}
    result["benchmark"] = "scaling over sizes and budgets, processes, cores and text"
    for part in options.part:
        result[part] = {"sizes": train, "processes": processes, "data": data}[part](options)
        result.setdefault("environment", {})[part] = environment()
        save(options.out, result)
    if "sizes" in options.part:
        for row in result["sizes"]["rows"]:
            print(f"{row['size']:>6s} {row['tokens'] / 1e6:6.0f}M tokens  loss {row['loss']:.3f}  "
                  f"{row.get('tokens_per_second', math.nan):8,.0f} tokens/s")  # fmt: skip
        print(json.dumps(result["sizes"]["law"]))


if __name__ == "__main__":
    main()
