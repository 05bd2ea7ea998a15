"""Training throughput: our step against `run_mlm.py`-style training with transformers' Trainer, in one run.

The same architecture, vocabulary and random rows; where ours and theirs differ (batch, precision, masked-only head) is
what is compared: tokens per second. Arms, each in a process of its own:
  ours         the pre-training stage's own step as the stage assembles it: settings tried, masking, clipping, optimizer
  documented   the Trainer as the documentation has it: fp32, batches of 8
  best         the Trainer with bf16 and the batch size, and torch_compile or not, that a trial shows to be the fastest
Rounds alternate the arms; a ratio is taken within each round, and reported as min / median / max. Useful operations are
those of `model/cost.py` with the masked positions alone in the vocabulary, for all arms the same. Rows of the result
file about other encoders, lengths and processors stay, so that the table may grow over several calls.

  python benchmarks/throughput.py                        4x256, vocabulary 30,522, length 128 on 2 pinned cores
  python benchmarks/throughput.py --sizes 4x256 6x384 12x512 12x768 24x1024 --lengths 128 512 --families bert modern
  python benchmarks/throughput.py --sizes 24x1024 --alone --rounds 1          where memory holds one encoder at a time
  python benchmarks/throughput.py --quick --device cuda  a short look
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from trainer_arms import SPECIAL  # noqa: E402

FFN = {"bert": 4.0, "modern": 2.5}  # times the hidden size; modern's is gated


def encoder_size(text: str) -> str:
    layers, _, hidden = text.partition("x")
    if not (layers.isdecimal() and hidden.isdecimal() and int(layers) and int(hidden) and int(hidden) % 64 == 0):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write layers x hidden size, a multiple of 64, as 4x256")
    return text


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=encoder_size, default=["4x256"],
                        help="layers x hidden size, heads of 64")  # fmt: skip
    parser.add_argument("--families", nargs="+", default=["bert"], choices=["bert", "modern"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128])
    parser.add_argument("--arms", nargs="+", default=["ours", "documented", "best"])
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--batch-tokens", type=int, default=0, help="of our steps; 0 = 4,096, on a GPU 131,072")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--compile", default="auto", choices=["auto", "true", "false"], help="of our blocks")
    parser.add_argument("--no-try-compile", dest="try_compile", action="store_false", help="of the Trainer's best")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="per arm and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="an arm's process ends before the next one begins: where "
                        "memory holds one encoder; each tries its settings in every round")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 seconds, no result file")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "throughput.json"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--arch", help=argparse.SUPPRESS)
    parser.add_argument("--length", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.batch_tokens = options.batch_tokens or (131072 if options.device == "cuda" else 4096)
    if options.quick:
        options.rounds, options.seconds = 2, 2.0
    return options


def pin(threads: int) -> list[int]:
    """Keep this process on its first cores, before torch makes its threads."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    if not hasattr(os, "sched_setaffinity"):
        return []
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.sched_setaffinity(0, cores)
    return cores


def write_rows(folder: Path, options: argparse.Namespace, rows: int = 4096) -> None:
    """A shard directory of full rows with a natural (Zipf) distribution of tokens."""
    import numpy as np

    from frugalbert.data.rows import index_checksum
    from frugalbert.run import sha256, write_json

    generator = np.random.default_rng(0)
    weights = 1.0 / np.arange(10, options.vocab_size - 200 + 10)
    ids = generator.choice(len(weights), (rows, options.length), p=weights / weights.sum()) + 200
    ids[:, 0], ids[:, -1] = SPECIAL["cls"], SPECIAL["sep"]
    entry: dict[str, Any] = {}
    for split, count in (("train", rows), ("held_out", 64)):
        (folder / f"length-{options.length}").mkdir(exist_ok=True)
        path = folder / f"length-{options.length}" / f"{split}-00000.bin"
        path.write_bytes(ids[:count].astype("<u2" if options.vocab_size <= 65536 else "<u4").tobytes())
        tokens = count * options.length
        file = {"name": path.name, "rows": count, "tokens": tokens, "sha256": sha256(path)}
        entry[split] = {"files": [file], "rows": count, "tokens": tokens, "fill": 1.0}
    dtype = "uint16" if options.vocab_size <= 65536 else "uint32"
    index = {"format": 1, "dtype": dtype, "vocab_size": options.vocab_size, "special": SPECIAL}
    index |= {"tokenizer_sha256": "0" * 64, "sets": {str(options.length): entry}}
    write_json(folder / "index.json", index | {"checksum": index_checksum(index)})


def vocabulary(options: argparse.Namespace) -> Any:
    import torch

    from frugalbert.data.masking import Vocabulary

    special = torch.zeros(options.vocab_size, dtype=torch.bool)
    special[SPECIAL["all"]] = True
    ids = {name: SPECIAL[name] for name in ("cls", "sep", "pad", "mask")}
    ordinary = torch.nonzero(~special).flatten()
    return Vocabulary(size=options.vocab_size, special=special, ordinary=ordinary, continuation=None, **ids)


# ---- an arm ----------------------------------------------------------------------------------------------------------


def ours(options: argparse.Namespace, folder: Path) -> tuple[Any, dict[str, Any]]:
    """The stage's own run, before its first step."""
    from frugalbert import dist
    from frugalbert.budget import Clock
    from frugalbert.config import Machine, Pretrain
    from frugalbert.train import pretrain, probe
    from frugalbert.train.assemble import Method, Rows, assemble
    from frugalbert.train.batches import HeldOut, Sampler
    from frugalbert.train.objectives import MaskedLM
    from frugalbert.train.summary import gemm_ceiling

    section = Pretrain.model_validate({
        "arch": options.arch, "budget": "1000000steps", "batch_size": max(1, options.batch_tokens // options.length),
        "warmup": 0.0, "curve": "constant", "optimizer": options.optimizer, "mask": {"rate": 0.15},
    })  # fmt: skip
    compiling = {"auto": "auto", "true": True, "false": False}[options.compile]
    machine = Machine.model_validate({"device": options.device, "threads": options.threads, "compile": compiling})
    device = dist.start(machine)
    words = vocabulary(options).to(device)
    sampler = Sampler(section, folder, [options.length], words, "0" * 64)
    rows = Rows(None, sampler, HeldOut(folder, options.length, words, 64), options.length)  # type: ignore[arg-type]
    model = pretrain.make_model(section, folder, options.length, words)
    objective = MaskedLM(section.isolate_documents)
    (folder / "pretrain").mkdir()
    run = assemble(section, machine, folder, folder / "pretrain", rows, Method(model, model, objective), Clock())
    run.state.micro_batch = run.micro_batch
    probe.settle(run)
    tokens = run.state.micro_batch * options.length
    return run, {
        "batch_size": section.batch_size,
        "precision": run.precision,
        "micro_batch": run.state.micro_batch,
        "compile": run.compiled,
        "flops_per_token": objective.flops(model, float(options.length), 0.15),
        "ceiling_flops": gemm_ceiling(model.config.to_arch(), tokens, device, run.precision),
    }


def work(options: argparse.Namespace) -> None:
    """A worker: makes one arm, then answers each line of seconds with the tokens per second it reached."""
    import torch
    from trainer_arms import choose, train

    def wait() -> None:
        if options.device == "cuda":
            torch.cuda.synchronize()

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options, 65536 if options.device == "cuda" else 4096)  # some steps an epoch
        if options.worker == "ours":
            from frugalbert.train.step import take_step

            run, about = ours(options, folder)
            clock = Stopwatch(about, about["batch_size"] * options.length, wait)
            while not clock.step_is_over():
                take_step(run)
        else:
            settings, tried = {"batch_size": 8, "compile": False}, []
            if options.worker == "best":
                settings, tried = choose(options, folder, min(3.0, options.seconds))
            about = {**settings, "precision": "bf16" if options.worker == "best" else "fp32", "tried": tried}
            clock = Stopwatch(about, settings["batch_size"] * options.length, wait)
            train(options, folder, options.worker, settings, clock.step_is_over)


class Stopwatch:
    """Asked after every step; answers on stdout after each period and then waits for the next one on stdin."""

    def __init__(self, about: dict[str, Any], tokens: int, wait: Callable[[], None]) -> None:
        self.about, self.tokens, self.wait = about, tokens, wait
        self.seconds = self.started = -1.0
        self.steps = 0

    def step_is_over(self) -> bool:
        """Whether all is over."""
        self.steps += 1
        if self.seconds >= 0.0:
            if self.steps < 2 or time.perf_counter() - self.started < self.seconds:
                return False
            self.wait()
            speed = self.steps * self.tokens / (time.perf_counter() - self.started)
            print("answer " + json.dumps({"speed": speed, "about": self.about}), flush=True)
        line = sys.stdin.readline()
        if not line:
            return True
        self.seconds, self.steps, self.started = float(line), 0, time.perf_counter()
        return False


# ---- measuring -------------------------------------------------------------------------------------------------------


class Worker:
    """An arm in a process of its own, so that no arm lives with another one's allocator, threads or memory."""

    def __init__(self, options: argparse.Namespace, arm: str) -> None:
        chosen = ["--arch", options.arch, "--length", str(options.length)]
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", arm, *chosen]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about: dict[str, Any] = {}

    def run(self, seconds: float) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        for line in self.process.stdout:
            if line.startswith("answer "):
                answer = json.loads(line.removeprefix("answer "))
                self.about = answer["about"]
                return answer["speed"]
        raise SystemExit(f"a worker ended with status {self.process.wait()}")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def measure(options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Tokens per second of every arm and round; one arm works at a time."""
    workers: dict[str, Worker] = {}
    about: dict[str, Any] = {}
    speeds: dict[str, list[float]] = {arm: [] for arm in options.arms}

    def ready(arm: str) -> Worker:
        if arm not in workers:
            workers[arm] = Worker(options, arm)
            workers[arm].run(0.5)  # makes and tries everything alone, warms up
        return workers[arm]

    for arm in () if options.alone else options.arms:
        ready(arm)
    for number, arm in itertools.product(range(options.rounds), options.arms):
        speeds[arm].append(ready(arm).run(options.seconds))
        about[arm] = workers[arm].about
        print(f"round {number + 1}: {arm:14s} {speeds[arm][-1]:10,.0f} tokens/s", file=sys.stderr, flush=True)
        if options.alone or number + 1 == options.rounds:
            workers.pop(arm).close()
    return speeds, about


def spread(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def environment(cores: list[int] | None = None) -> dict[str, Any]:
    """Where and with what a benchmark ran; `cores` default: those this process may use."""
    import torch

    from frugalbert.run import versions

    commit = ""
    asked = ["git", "rev-parse", "HEAD"]
    with contextlib.suppress(OSError):  # no git
        commit = subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "cores": cores or sorted(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "commit": commit or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(path: Path | str, result: dict[str, Any]) -> None:
    """A benchmark's result as JSON."""
    from frugalbert.run import write_json

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def one(options: argparse.Namespace) -> dict[str, Any]:
    """A row of the table: one architecture and length, all arms."""
    import torch

    from frugalbert.train.summary import datasheet_share

    speeds, about = measure(options)
    flops = about["ours"]["flops_per_token"]
    device, precision = torch.device(options.device), about["ours"]["precision"]
    shares = {arm: datasheet_share(statistics.median(v) * flops, device, precision) for arm, v in speeds.items()}
    mine = statistics.median(speeds["ours"]) * flops / about["ours"]["ceiling_flops"]
    return {
        "arch": options.arch, "length": options.length, "arms": about,
        "tokens_per_second": {arm: spread(values) for arm, values in speeds.items()},
        "ours_over": {
            arm: spread([mine / theirs for mine, theirs in zip(speeds["ours"], values, strict=True)])
            for arm, values in speeds.items() if arm != "ours"
        },
        "share_of_measured_ceiling": round(mine, 4), "share_of_datasheet": shares,
    }  # fmt: skip


def about_what(row: dict[str, Any]) -> tuple[Any, ...]:
    """What a newer row takes the place of: the same encoder, length and processor."""
    return row["processor"], *(row["options"][name] for name in ("arch", "length", "device", "threads", "vocab_size"))


def main() -> None:
    options = parse()
    cores = pin(options.threads)
    if options.worker:
        work(options)
        return
    found, rows = environment(cores), {}
    if not options.quick and Path(options.out).exists():
        before = json.loads(Path(options.out).read_text())["rows"]
        rows = {about_what(row): row for row in before}
    for family, size, length in itertools.product(options.families, options.sizes, options.lengths):
        layers, hidden = map(int, size.split("x"))
        ffn = int(FFN[family] * hidden)
        options.arch, options.length = f"{family} {layers}x{hidden} heads={hidden // 64} ffn={ffn}", length
        settings = {key: value for key, value in vars(options).items() if key not in ("out", "worker")}
        processor = found["gpu" if options.device == "cuda" else "cpu"]
        row = {**one(options), "processor": processor, "options": settings, "environment": found}
        rows[about_what(row)] = row
        if not options.quick:
            save(options.out, {"benchmark": "training throughput", "rows": list(rows.values())})
    for row in rows.values():
        times = ", ".join(f"{arm} {ratio['median']:.1f}" for arm, ratio in row["ours_over"].items())
        print(f"{row['arch']:36s} {row['length']:4d}  ours {row['tokens_per_second']['ours']['median']:10,.0f} tokens/s"
              f"  {row['share_of_measured_ceiling']:.0%} of the ceiling  times {times}")  # fmt: skip


if __name__ == "__main__":
    main()
