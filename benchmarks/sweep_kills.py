"""Sweeps whose workers and drivers are killed: is every trial in the results exactly once, with the right value?

A real sweep of the stage `finetune` (TPE, a one-layer BERT, a made-up task) with two workers, as a pool of processes
and on a Dask cluster. Workers, or the driver, die by SIGKILL at random moments; a driver is started again. Afterwards
the results, and every trial's predictions, must be those of a sweep in one process that nobody disturbed, bit for bit.

    python benchmarks/sweep_kills.py --kills 10
"""

from __future__ import annotations

import argparse
import contextlib
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from frugalbert import run  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "sweep_kills.json"
SEEDS, TRIALS, AT_ONCE = 2, 6, 3
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
    """The stage, in this process."""
    from frugalbert.config import Finetune, Machine, Sweep, Task
    from frugalbert.finetune.runner import build

    sweep = Sweep(method="tpe", trials=TRIALS, at_once=AT_ONCE, learning_rate="1e-4..1e-1", batch_size=(8, 16))
    section = Finetune(
        tasks=(Task(name="animals", train="texts.jsonl"),), model="model", epochs=6.0, precision="fp32", select="train",
        seeds=tuple(range(SEEDS)), random_baseline=False, sweep=sweep, max_length=16,
    )  # fmt: skip
    out.mkdir(exist_ok=True)
    build(section, {"yaml": folder}, out, Machine(device="cpu", threads=1, workers=workers, scheduler=scheduler))


def outcome(out: Path) -> tuple[list[Any], dict[str, Any]]:
    """What the results say of every trial, in order, and the predictions' hashes of every trial on disk."""
    (row,) = run.read_json(out / "results.json")
    trials = [
        [entry["setting"], seed, value]
        for entry in row["sweep"]["rows"]
        for seed, value in zip(entry["seeds"], entry["values"], strict=True)
    ]
    on_disk = {path.parent.name: run.read_json(path)["files"] for path in out.glob("animals/*/result.json")}
    return [trials, row["sweep"]["best"], row["values"]], on_disk


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

    A kill is due when a random number of trials has finished, and up to two seconds later, so that it also meets what
    is being started, trained and written.
    """
    scheduler = cluster.scheduler_address if cluster else None
    dues = sorted(chance.randrange(SEEDS * TRIALS) for _ in range(KILLS_PER_SWEEP))
    kills: list[int] = []
    driver = start(folder, out, scheduler)
    while driver.poll() is None:
        finished = len(list(out.glob("animals/*/result.json")))
        if not dues or finished < dues[0]:
            time.sleep(0.02)
            continue
        time.sleep(2 * chance.random())
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


def scenario(work: Path, folder: Path, where: str, who: str, kills: int, expected: Any) -> dict[str, Any]:
    """Sweeps until there were `kills` kills; every one of them must end as if nothing had happened."""
    found: list[int] = []
    sweeps = 0
    began = time.monotonic()
    with dask_cluster() if where == "dask" else contextlib.nullcontext() as cluster:
        while len(found) < kills:
            out = work / f"{where}-{who}-{sweeps}"
            found += disturb(folder, out, who, cluster, random.Random(f"{where} {who} {sweeps}"))
            told = outcome(out)
            if told != expected:
                raise RuntimeError(f"{out}: other results than undisturbed: {told}, not {expected}")
            if list(out.rglob(".tmp-*")):
                raise RuntimeError(f"{out}: something half-written is left")
            sweeps += 1
            print(f"{where}, {who}: {sweeps} sweeps, {len(found)} kills", file=sys.stderr, flush=True)
    return {
        "where": where, "killed": who, "sweeps": sweeps, "kills": len(found), "kills_after_trials": found,
        "trials_in_results": sweeps * len(expected[0][0]), "trials_lost": 0, "trials_twice": 0, "values_differ": 0,
        "seconds": round(time.monotonic() - began),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--where", default="pool,dask")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--drive", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    if given.drive:
        folder, out, scheduler = given.drive
        alone = scheduler == "alone"
        drive(Path(folder), Path(out), 1 if alone else 2, None if scheduler in ("none", "alone") else scheduler)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        folder = work / "inputs"
        folder.mkdir()
        make_inputs(folder)
        drive(folder, work / "alone", 1, None)
        expected = outcome(work / "alone")
        pairs = [json.dumps(trial[:2], sort_keys=True) for trial in expected[0][0]]
        assert len(set(pairs)) == len(pairs) == len(expected[1]) == SEEDS * TRIALS
        for where in given.where.split(","):
            for who in ("worker", "driver"):
                rows.append(scenario(work, folder, where, who, given.kills, expected))
                run.write_json(given.out, {"versions": run.versions(), "workers": 2, "method": "tpe",
                               "trials_per_sweep": SEEDS * TRIALS, "scenarios": rows})  # fmt: skip
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
