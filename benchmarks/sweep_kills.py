"""Sweeps whose workers and drivers are killed: is every trial in the results exactly once, with the right value?

A real sweep (TPE) with two workers, as a pool of processes and on a Dask cluster. Workers, or the driver, die by
SIGKILL at random moments; a driver is started again. Afterwards the results must be those of a sweep in one process
that nobody disturbed, bit for bit. Through the stage `finetune` trials fine-tune a BERT of one layer, and their
predictions are compared as well; through `sweep` and `fanout` alone they train a logistic regression, so that a process
starts in a second instead of ten and there is more to kill.

    python benchmarks/sweep_kills.py --kills 10 --through stage,fanout
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from frugalbert import run  # noqa: E402
from frugalbert.fanout import Journal, run_tasks  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "sweep_kills.json"
SEEDS, TRIALS, AT_ONCE = 2, 6, 3
PAUSE = 1.0  # seconds
KILLS_PER_SWEEP = 3  # a task that was under way in more breakdowns counts as their cause
WORDS = "red green blue cat dog bird fish runs sleeps eats sings the a very not big small old new".split()


# ---- the sweep ------------------------------------------------------------------------------------------------------


def make_inputs(folder: Path) -> None:
    """A BERT of one layer with random weights, and 160 texts whose class is the animal in them."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertForMaskedLM, PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **dict(zip(names, special, strict=True)))
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    config = BertConfig(vocab_size=len(special) + len(WORDS), max_position_embeddings=32, **sizes)
    BertForMaskedLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    generator = random.Random(0)
    lines = []
    for _ in range(160):
        animal = generator.choice(["cat", "dog"])
        words = [*generator.choices([word for word in WORDS if word not in ("cat", "dog")], k=8), animal]
        generator.shuffle(words)
        label = animal if generator.random() < 0.9 else "cat"
        lines.append(json.dumps({"text": " ".join(words), "label": label}) + "\n")
    (folder / "texts.jsonl").write_text("".join(lines))


def drive(folder: Path, out: Path, workers: int, scheduler: str | None) -> None:
    """The sweep, in this process; `folder` has the inputs of the stage, or none."""
    from frugalbert.config import Finetune, Machine, Sweep, Task
    from frugalbert.finetune import sweep

    tried = Sweep(method="tpe", trials=TRIALS, at_once=AT_ONCE, learning_rate="1e-4..1e-1", batch_size=(8, 16))
    out.mkdir(exist_ok=True)
    if not (folder / "model").exists():
        import sweep_kills  # by this name workers find it

        def evaluate(pairs: list[Any]) -> list[float | None]:
            tasks = [{"setting": setting, "seed": seed} for setting, seed in pairs]
            places: dict[str, Any] = {"journal": out / "journal", "workers": workers, "scheduler": scheduler}
            return run_tasks(sweep_kills.train, tasks, **places)

        base = dict.fromkeys(sweep.AXES, 1.0)
        run.write_json(out / "sweep.json", sweep.run(tried, base, range(SEEDS), 0, evaluate).as_json())
        return
    from frugalbert.finetune.runner import build

    section = Finetune(
        tasks=(Task(name="animals", train="texts.jsonl"),), model="model", epochs=6.0, precision="fp32", select="train",
        seeds=tuple(range(SEEDS)), random_baseline=False, sweep=tried, max_length=16,
    )  # fmt: skip
    build(section, {"yaml": folder}, out, Machine(device="cpu", threads=1, workers=workers, scheduler=scheduler))


def train(task: dict[str, Any]) -> float:
    """A logistic regression by SGD on made-up data of the seed; accuracy on fresh data."""
    import numpy as np

    generator = np.random.default_rng(task["seed"])
    truth = generator.standard_normal(40)
    x = generator.standard_normal((2200, 40))
    y = (x @ truth + generator.standard_normal(2200) > 0).astype(float)
    weights, size = np.zeros(40), task["setting"]["batch_size"]
    for step in range(15_000):
        rows = slice(step * size % 200, step * size % 200 + size)
        weights -= (
            task["setting"]["learning_rate"] * x[rows].T @ (1 / (1 + np.exp(-x[rows] @ weights)) - y[rows]) / size
        )
    return float(((x[200:] @ weights > 0) == y[200:]).mean())


def finished_of(out: Path) -> int:
    """Trials that are done."""
    if (out / "journal").exists():
        return (out / "journal").read_bytes().count(b"\n")
    return len(list(out.glob("animals/*/result.json")))


def outcome(out: Path) -> tuple[list[Any], dict[str, Any]]:
    """What the results say of every trial, in order, and what is on disk of every trial (hashes of predictions)."""
    if (out / "sweep.json").exists():
        found, values = run.read_json(out / "sweep.json"), []
        with Journal(out / "journal") as journal:
            entries = [(entry["key"], entry["result"]) for entry in journal.entries]
        assert len(dict(entries)) == len(entries), "a trial is in the journal twice"
        on_disk = dict(entries)
    else:
        (row,) = run.read_json(out / "results.json")
        found, values = row["sweep"], row["values"]
        on_disk = {path.parent.name: run.read_json(path)["files"] for path in out.glob("animals/*/result.json")}
    trials = [
        [entry["setting"], seed, value]
        for entry in found["rows"]
        for seed, value in zip(entry["seeds"], entry["values"], strict=True)
    ]
    return [trials, found["best"], values], on_disk


# ---- killing --------------------------------------------------------------------------------------------------------


def start(folder: Path, out: Path, scheduler: str | None) -> subprocess.Popen[bytes]:
    command = [sys.executable, __file__, "--drive", str(folder), str(out), scheduler or "none"]
    log = open(out.with_suffix(".log"), "ab")  # noqa: SIM115
    return subprocess.Popen(command, stderr=log, stdout=log)


def children(pid: int) -> list[int]:
    """Worker processes below a process: those that `multiprocessing` spawned."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int((place / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == pid and b"spawn_main" in (place / "cmdline").read_bytes():
                found.append(int(place.name))
    return found


def disturb(folder: Path, out: Path, who: str, cluster: Any, chance: random.Random) -> list[int]:
    """One sweep to its end; returns after how many finished trials each kill came.

    A kill is due when a random number of trials has finished, and up to a second later, so that it also meets what
    is being started, trained and written.
    """
    scheduler = cluster.scheduler_address if cluster else None
    dues = sorted(chance.randrange(SEEDS * TRIALS) for _ in range(KILLS_PER_SWEEP))
    kills: list[int] = []
    driver = start(folder, out, scheduler)
    while driver.poll() is None:
        finished = finished_of(out)
        if not dues or finished < dues[0]:
            time.sleep(0.02)
            continue
        time.sleep(PAUSE * chance.random())
        victims = [driver.pid] if who == "driver" else _workers(driver.pid, cluster)
        if not victims or driver.poll() is not None:
            continue
        dues.pop(0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(victims), signal.SIGKILL)
            kills.append(finished)
        if who == "driver":
            driver.wait()
            driver = start(folder, out, scheduler)
    if driver.returncode:
        raise RuntimeError(f"the driver ended with {driver.returncode}: {out.with_suffix('.log').read_text()[-2000:]}")
    return kills


def _workers(driver: int, cluster: Any) -> list[int]:
    if cluster is None:
        return children(driver)
    return [nanny.pid for nanny in cluster.workers.values() if nanny.pid]


@contextlib.contextmanager
def dask_cluster() -> Iterator[Any]:
    import dask
    import distributed

    settings = {"processes": True, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "3s", "distributed.scheduler.allowed-failures": 6}),
        distributed.LocalCluster(host="127.0.0.1", silence_logs=50, **settings) as cluster,
    ):
        yield cluster


def scenario(folder: Path, where: str, who: str, kills: int, expected: Any) -> Iterator[dict[str, Any]]:
    """The figures after each sweep, until there were `kills` kills; every sweep must end as if nothing had happened."""
    found: list[int] = []
    leftovers = 0
    began = time.monotonic()
    with dask_cluster() if where == "dask" else contextlib.nullcontext() as cluster:
        for sweeps in itertools.count(1):
            out = folder.with_name(f"{folder.name}-{where}-{who}-{sweeps}")
            found += disturb(folder, out, who, cluster, random.Random(f"{where} {who} {sweeps}"))
            told = outcome(out)
            if told != expected:
                raise RuntimeError(f"{out}: other results than undisturbed: {told}, not {expected}")
            leftovers += len(list(out.rglob(".tmp-*")))
            print(f"{folder.name}, {where}, {who}: {sweeps} sweeps, {len(found)} kills", file=sys.stderr, flush=True)
            yield {
                "through": folder.name, "where": where, "killed": who, "sweeps": sweeps, "kills": len(found),
                "kills_after_trials": found, "trials_in_results": sweeps * len(expected[0][0]), "trials_lost": 0,
                "trials_twice": 0, "values_differ": 0, "half_written_files_left": leftovers,
                "seconds": round(time.monotonic() - began),
            }  # fmt: skip
            if len(found) >= kills:
                return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--where", default="pool,dask")
    parser.add_argument("--through", default="stage,fanout")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])])
    if given.drive:
        folder, out, scheduler = given.drive
        drive(Path(folder), Path(out), 2, None if scheduler == "none" else scheduler)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for through in given.through.split(","):
            folder = Path(work) / through
            folder.mkdir()
            if through == "stage":
                make_inputs(folder)
            drive(folder, Path(work) / f"{through}-alone", 1, None)
            expected = outcome(Path(work) / f"{through}-alone")
            pairs = [json.dumps(trial[:2], sort_keys=True) for trial in expected[0][0]]
            assert len(set(pairs)) == len(pairs) == len(expected[1]) == SEEDS * TRIALS
            for where, who in itertools.product(given.where.split(","), ("worker", "driver")):
                rows.append({})
                for rows[-1] in scenario(folder, where, who, given.kills, expected):
                    run.write_json(given.out, {"versions": run.versions(), "workers": 2, "method": "tpe",
                                   "trials_per_sweep": SEEDS * TRIALS, "scenarios": rows})  # fmt: skip
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
