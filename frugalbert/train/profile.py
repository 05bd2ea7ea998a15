"""Where one training step's time goes: a run's pre-training in; shares of the step, a sentence, a trace out.

The steps are those of the stage (its model, rows, micro-batch, precision), traced by torch.profiler: on a CPU the time
of each operator alone, on a GPU that of its kernels. `trace.json.gz` opens in https://ui.perfetto.dev.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from frugalbert import dist
from frugalbert.config import Machine, Pretrain
from frugalbert.run import say, write_json
from frugalbert.train import pretrain, probe
from frugalbert.train.batches import mask_rate
from frugalbert.train.state import Run
from frugalbert.train.step import take_step
from frugalbert.train.summary import attended, measured_ceiling

WARM, STEPS = 3, 5
DATA, OPTIMIZER, HEAD, IDLE = "data and masks", "optimizer", "vocabulary and loss", "waiting for the CPU"
PRODUCTS, ATTENTION, REST = "matrix products", "attention", "everything else"
PARTS: dict[str, tuple[str, ...]] = {  # by words in an operator's name, within the forward and backward pass
    HEAD: ("CrossEntropy", "cross_entropy", "log_softmax", "nll_loss"),
    ATTENTION: ("scaled_dot_product", "flash", "efficient_attention", "_softmax"),
    PRODUCTS: ("mm", "matmul", "linear", "bmm"),
}
ADVICE = (
    (
        IDLE,
        0.2,
        "the GPU waits for the CPU: larger micro-batches, machine.compile: true or a larger pretrain.arch help",
    ),
    (OPTIMIZER, 0.2, "the optimizer's share falls with a larger pretrain.batch_size, or with optimizer: adamw"),
    (DATA, 0.1, "drawing and masking: fewer and larger micro-batches help, or mask.whole_words: false"),
    (HEAD, 0.25, "the vocabulary's scores: a smaller tokenizer.vocab_size or fewer masks (mask.rate) help"),
    (ATTENTION, 0.25, "attention: shorter rows (shards.length) or sparse patterns (`explain patterns`) help"),
    (REST, 0.4, "operations that only move memory: machine.compile: true joins them, where it works"),
)


def build(section: Pretrain, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Train a few steps from the first weights under the profiler, and write `profile.json` and the trace to `out`."""
    section = pretrain.resolved(section, inputs)
    with dist.ranks(machine) as device:
        run, rows, method = pretrain.prepare(section, inputs, out, machine, pretrain.maker(section, inputs), device)
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.jsonl").unlink(missing_ok=True)
        run.state.micro_batch = run.micro_batch
        probe.settle(run)
        for _ in range(WARM):
            take_step(run)
        before = run.state.tokens
        seconds, events = _traced(run, out / "trace.json.gz")
        rate = mask_rate(section.mask, run.state.progress)
        flops = method.objective.flops(run.model, attended(section, rows.sampler), rate)
        ceiling = measured_ceiling(run, method.kept.config.to_arch(), run.state.micro_batch * rows.sampler.first)
    speed = (run.state.tokens - before) / seconds
    shares = _shares(events, seconds, device)
    found = {
        "tokens_per_second": round(speed, 1),
        "share_of_measured_ceiling": round(speed * flops / ceiling, 4),
        "seconds_per_step": round(seconds / STEPS, 5),
        "micro_batch": run.state.micro_batch,
        "precision": run.precision,
        "compile": run.compiled,
        "device": device.type,
        "shares": {name: round(share, 4) for name, share in shares.items()},
        "bottleneck": bottleneck(shares, speed * flops / ceiling),
    }
    write_json(out / "profile.json", found)
    return found


def _traced(run: Run, file: Path) -> tuple[float, list[Any]]:
    """Seconds of the steps without the profiler, and what it saw of as many more."""
    _wait(run)
    started = time.perf_counter()
    for _ in range(STEPS):
        take_step(run)
    _wait(run)
    seconds = time.perf_counter() - started
    run.draw = _labelled(DATA, run.draw)
    run.optimizer.step = _labelled(OPTIMIZER, run.optimizer.step)  # type: ignore[method-assign]
    gpu = [ProfilerActivity.CUDA] if run.device.type == "cuda" else []
    with profile(activities=[ProfilerActivity.CPU, *gpu]) as seen:
        for _ in range(STEPS):
            take_step(run)
        _wait(run)
    seen.export_chrome_trace(str(file))
    return seconds, list(seen.events())


def _wait(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)


def _labelled(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        with record_function(name):
            return function(*arguments, **named)

    return call


def _shares(events: list[Any], seconds: float, device: torch.device) -> dict[str, float]:
    """Share of the time by part, the largest first; on a GPU the rest of the wall clock is waiting."""
    kind = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    sums: dict[str, float] = {}
    for event in events:
        if event.device_type != DeviceType.CPU:  # a kernel: its time is with the operator that started it
            continue
        part = _part(event)
        sums[part] = sums.get(part, 0.0) + getattr(event, kind) / 1e6
    total = sum(sums.values())
    if device.type == "cuda" and total < seconds:
        sums[IDLE] = seconds - total
        total = seconds
    return dict(sorted(((name, value / max(total, 1e-12)) for name, value in sums.items()), key=lambda pair: -pair[1]))


def _part(event: Any) -> str:
    """By the innermost name that says it, an enclosing label or loss first."""
    names, at = [], event
    while at is not None:
        names.append(at.name)
        at = at.cpu_parent
    for label in (DATA, OPTIMIZER):
        if label in names:
            return label
    for part, words in PARTS.items():
        if any(word in name for name in names for word in words):
            return part
    return REST


def bottleneck(shares: dict[str, float], of_ceiling: float) -> str:
    """One sentence: what costs most beyond the matrix products, and what to change; or that little is left."""
    excess = {name: shares.get(name, 0.0) / most for name, most, _ in ADVICE}
    worst = max(excess, key=lambda name: excess[name])
    if excess[worst] < 1.0:
        return (
            f"matrix products take {shares.get(PRODUCTS, 0.0):.0%} of a step, which runs at {of_ceiling:.0%} of their "
            "speed alone: a smaller pretrain.arch or fewer masks are what is left"
        )
    advice = next(text for name, _, text in ADVICE if name == worst)
    return f"{shares[worst]:.0%} of a step is {worst}; {advice}"


def show(found: dict[str, Any], out: Path) -> None:
    """Say the figures."""
    parts = ", ".join(f"{name} {share:.0%}" for name, share in found["shares"].items() if share >= 0.005)
    say(f"a step of {found['seconds_per_step'] * 1e3:,.1f} ms: {parts}")
    speed = f"{found['tokens_per_second']:,.0f} tokens/s, {found['share_of_measured_ceiling']:.0%}"
    say(
        f"{speed} of the matrix products' speed alone; micro-batch {found['micro_batch']}, {found['precision']}; "
        f"trace: {out / 'trace.json.gz'}"
    )
    print(found["bottleneck"])
