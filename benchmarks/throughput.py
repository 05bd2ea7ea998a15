"""Training throughput: our step against Hugging Face's `BertForMaskedLM` with a Trainer-style step, in one run.

The same architecture, vocabulary, row length, batch and optimizer on the same random rows. Arms:
  ours         the pre-training stage's own step: masking, masked-only head, clipping, fused AdamW, in `--precision`
  hf-fp32      transformers' defaults: the MLM collator, logits for all tokens, dropout 0.1, AdamW, clipping, fp32
  hf-bf16      the same under bf16 autocast
  hf-bf16-best hf-bf16 without dropout: what an attentive user gets
  trainer-fp32, trainer-bf16   the real `transformers.Trainer` around the same model and collator (`--trainer`)
Rounds alternate the arms; a ratio is taken within each round, and reported as min / median / max.

  python benchmarks/throughput.py                        4x256, vocabulary 30,522, length 128 on 2 pinned cores
  python benchmarks/throughput.py --quick --device cuda  a short look
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SPECIAL = {"pad": 0, "unk": 100, "cls": 101, "sep": 102, "mask": 103, "all": [0, 100, 101, 102, 103]}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--arch", default="bert 4x256 heads=4 ffn=1024", help="family bert, so that HF has the same model"
    )
    parser.add_argument("--vocab-size", type=int, default=30522)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, default=0, help="of our arm; 0 = as the stage chooses")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--precision", default="auto", choices=["auto", "fp32", "bf16"])
    parser.add_argument("--compile", action="store_true", help="of our arm's blocks")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=6.0, help="per arm and round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--arms", default="ours,hf-fp32,hf-bf16,hf-bf16-best")
    parser.add_argument("--trainer", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="2 rounds of 2 seconds, no result file")
    parser.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "throughput.json"))
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.seconds = 2, 2.0
    if options.trainer and not options.worker:
        options.arms += ",trainer-fp32,trainer-bf16"
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


# ---- our step --------------------------------------------------------------------------------------------------------


def ours(options: argparse.Namespace, folder: Path) -> tuple[Callable[[], None], dict[str, Any]]:
    """The stage's own step, with everything but validation and checkpoints."""
    from frugalbert import dist
    from frugalbert.budget import Clock
    from frugalbert.config import Machine, Pretrain
    from frugalbert.train import pretrain
    from frugalbert.train.batches import Sampler
    from frugalbert.train.optim import make_optimizer
    from frugalbert.train.state import Run
    from frugalbert.train.step import take_step

    section = Pretrain.model_validate({
        "arch": options.arch, "budget": "1000000steps", "batch_size": options.batch_size, "warmup": 0.0,
        "curve": "constant", "optimizer": options.optimizer, "precision": options.precision,
    })  # fmt: skip
    machine = Machine.model_validate({
        "device": options.device, "threads": options.threads, "micro_batch": options.micro_batch or "auto",
        "compile": options.compile,
    })  # fmt: skip
    device = dist.start(machine)
    words = vocabulary(options).to(device)
    sampler = Sampler(section, folder, [options.length], words, "0" * 64)
    model = pretrain.make_model(section, folder, options.length, words).to(device)
    pretrain.compile_blocks(model, section, machine, device)
    run = Run(
        model=model, parallel=model, optimizer=make_optimizer(model, pretrain.optimizer_settings(section)),
        device=device, precision=dist.pick_precision(section.precision, device),
        recipe=pretrain.make_recipe(section, folder), clock=Clock(), out=folder, draw=sampler.draw,
        objective=pretrain.make_objective(section), write_model=lambda path, weights: None,
        micro_batch=pretrain.first_micro_batch(section, machine, device, model, options.length),
    )  # fmt: skip
    run.state.micro_batch = run.micro_batch
    about = {"precision": run.precision, "micro_batch": run.micro_batch, "costs": run.state.costs}
    return lambda: take_step(run), about


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hf_model(options: argparse.Namespace, dropout: float) -> Any:
    import torch
    from transformers import BertConfig, BertForMaskedLM

    from frugalbert.model.arch import Arch

    arch = Arch.parse(options.arch)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=options.vocab_size, hidden_size=arch.hidden, num_hidden_layers=len(arch.layers),
        num_attention_heads=arch.layers[0].heads, intermediate_size=arch.layers[0].ffn,
        max_position_embeddings=arch.max_length, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout,
    )  # fmt: skip
    return BertForMaskedLM(config).to(options.device).train()


def hf_data(options: argparse.Namespace, folder: Path) -> tuple[Any, Any]:
    """A map-style data set of the same rows, and `run_mlm`'s collator with a tokenizer of the same vocabulary."""
    import numpy as np
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    dtype = "<u2" if options.vocab_size <= 65536 else "<u4"
    path = folder / f"length-{options.length}" / "train-00000.bin"
    rows = np.fromfile(path, dtype).reshape(-1, options.length).astype(np.int64)
    names = {SPECIAL[role]: f"[{role.upper()}]" for role in ("pad", "unk", "cls", "sep", "mask")}
    words = {names.get(number, f"w{number}"): number for number in range(options.vocab_size)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="[UNK]")),
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
    )  # fmt: skip
    masked = [{"input_ids": row.tolist(), "attention_mask": [1] * options.length} for row in rows]
    return masked, DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15)


def hugging_face(options: argparse.Namespace, folder: Path, arm: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """The loop of `run_mlm` / Trainer written out: collate, forward, backward, clip, step, schedule, zero."""
    import torch
    from torch.utils.data import DataLoader

    model = hf_model(options, 0.0 if arm.endswith("best") else 0.1)
    data, collator = hf_data(options, folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    precision = torch.bfloat16 if "bf16" in arm else torch.float32

    def forever() -> Iterator[Any]:
        while True:
            yield from DataLoader(data, options.batch_size, shuffle=True, collate_fn=collator, drop_last=True)

    batches = forever()

    def step() -> None:
        batch = {name: tensor.to(options.device) for name, tensor in next(batches).items()}
        with torch.autocast(options.device, precision, enabled=precision == torch.bfloat16):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return step, {"precision": "bf16" if "bf16" in arm else "fp32", "dropout": model.config.hidden_dropout_prob}


def trainer(options: argparse.Namespace, folder: Path, arm: str) -> tuple[Callable[[], None], dict[str, Any]]:
    """The real Trainer; one call of what is returned trains 10 steps."""
    from transformers import Trainer, TrainingArguments

    data, collator = hf_data(options, folder)
    arguments = TrainingArguments(
        str(folder / arm), max_steps=10, per_device_train_batch_size=options.batch_size, learning_rate=1e-3,
        bf16="bf16" in arm, use_cpu=options.device == "cpu", report_to=[], save_strategy="no", disable_tqdm=True,
        logging_strategy="no",
    )  # fmt: skip
    model = hf_model(options, 0.1)

    def ten_steps() -> None:
        Trainer(model=model, args=arguments, train_dataset=data, data_collator=collator).train()  # type: ignore[arg-type]

    return ten_steps, {"precision": "bf16" if "bf16" in arm else "fp32", "dropout": 0.1, "steps_per_call": 10}


# ---- measuring -------------------------------------------------------------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """A worker: makes one arm, then answers each line of seconds with the tokens per second it reached."""
    import torch

    arm = options.worker
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(folder, options)
        make = ours if arm == "ours" else trainer if arm.startswith("trainer") else hugging_face
        step, about = make(options, folder) if arm == "ours" else make(options, folder, arm)  # type: ignore[call-arg]
        tokens = about.get("steps_per_call", 1) * options.batch_size * options.length
        for line in sys.stdin:
            calls, started = 0, time.perf_counter()
            while calls < 2 or time.perf_counter() - started < float(line):
                step()
                calls += 1
            if options.device == "cuda":
                torch.cuda.synchronize()
            answer = {"speed": calls * tokens / (time.perf_counter() - started), "about": about}
            print("answer " + json.dumps(answer), flush=True)


class Worker:
    """An arm in a process of its own, so that no arm lives with another one's allocator, threads or memory."""

    def __init__(self, options: argparse.Namespace, arm: str) -> None:
        command = [sys.executable, __file__, *sys.argv[1:], "--worker", arm]
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
    workers = {arm: Worker(options, arm) for arm in options.arms.split(",")}
    for worker in workers.values():
        worker.run(0.5)  # makes everything, warms up
    speeds: dict[str, list[float]] = {arm: [] for arm in workers}
    for number in range(options.rounds):
        for arm, worker in workers.items():
            speeds[arm].append(worker.run(options.seconds))
            print(f"round {number + 1}: {arm:14s} {speeds[arm][-1]:10,.0f} tokens/s", file=sys.stderr, flush=True)
    for worker in workers.values():
        worker.close()
    return speeds, {arm: worker.about for arm, worker in workers.items()}


def spread(values: list[float]) -> dict[str, float]:
    return {"min": round(min(values), 3), "median": round(statistics.median(values), 3), "max": round(max(values), 3)}


def environment(cores: list[int] | None = None) -> dict[str, Any]:
    """Where and with what a benchmark ran; `cores` default: those this process may use."""
    import torch

    from frugalbert.run import versions

    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    cpu = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "cpu": cpu[0] if cpu else platform.processor(),
        "bf16": [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags],
        "cores": cores or sorted(os.sched_getaffinity(0)),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": os.getloadavg()[0],
        "versions": versions(),
        "commit": commit.stdout.strip() or None,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def save(path: Path | str, result: dict[str, Any]) -> None:
    """A benchmark's result as JSON."""
    from frugalbert.run import write_json

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def main() -> None:
    options = parse()
    cores = pin(options.threads)
    if options.worker:
        work(options)
        return
    speeds, about = measure(options)
    found = environment(cores)
    costs = about.get("ours", {}).pop("costs", {})
    ratios = {
        arm: spread([mine / theirs for mine, theirs in zip(speeds["ours"], speeds[arm], strict=True)])
        for arm in speeds
        if arm != "ours" and "ours" in speeds
    }
    settings = {key: value for key, value in vars(options).items() if key not in ("out", "worker")}
    result = {
        "benchmark": "training throughput", "options": settings, "arms": about, "environment": found,
        "tokens_per_second": {arm: spread(values) for arm, values in speeds.items()}, "ours_over": ratios,
        "loader_wait_share": round(costs.get("wait", 0.0) / max(1e-9, sum(costs.values())), 4),
    }  # fmt: skip
    print(json.dumps({key: result[key] for key in ("tokens_per_second", "ours_over", "loader_wait_share")}, indent=1))
    if not options.quick:
        save(options.out, result)


if __name__ == "__main__":
    main()
