"""What a pre-training was and cost: derived sizes before it, summary.json after it, and the hardware's own speed.

Useful FLOPs per token are those of `model/cost.py`; the ceiling is the measured speed of the matrix products of one
layer, forward and backward, in the run's precision, back to back: what a program without any overhead would reach.
"""

from __future__ import annotations

import math
import re
import sys
import time
from typing import Any

import numpy as np
import torch

from frugalbert import dist
from frugalbert.config import Training
from frugalbert.data.masking import IGNORED, documents, restore
from frugalbert.data.ngram import baselines
from frugalbert.model.arch import Arch
from frugalbert.model.cost import attention_summary
from frugalbert.progress import duration, number
from frugalbert.run import say, write_json
from frugalbert.train.batches import HeldOut, Sampler
from frugalbert.train.phases import tokens_per_step
from frugalbert.train.state import Run, as_json

EXPECTED_SHARE = {"cpu fp32": 0.6, "cpu bf16": 0.25}  # of the ceiling, for the estimate before the first step; else:
EXPECTED_OTHERWISE = 0.35
PEAK_FLOPS = {  # dense bf16 and fp16 products, from the vendor's datasheets; CPUs' clocks depend on the load
    "NVIDIA B200": 2250e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L4": 121e12,
}


def gemm_ceiling(arch: Arch, tokens: int, device: torch.device, precision: str, seconds: float = 0.3) -> float:
    """FLOP/s of the products of the first layer on `tokens` tokens: the best of as many rounds as fit the seconds."""
    layer = arch.layers[0]
    inner = 3 if arch.family == "modern" else 2
    shapes = [(layer.hidden, layer.qkv)] * 4 + [(layer.hidden, layer.ffn)] * inner
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    sets = []
    for inputs, outputs in set(shapes):
        sizes = ((tokens, inputs), (outputs, inputs), (tokens, outputs))
        sets += [[torch.randn(size, device=device).to(dtype) for size in sizes]] * shapes.count((inputs, outputs))

    def one_round() -> None:
        for x, weight, gradient in sets:
            torch.matmul(x, weight.T)
            torch.matmul(gradient, weight)
            torch.matmul(gradient.T, x)
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    one_round()
    best, end = math.inf, time.perf_counter() + seconds
    while time.perf_counter() < end or best == math.inf:
        started = time.perf_counter()
        one_round()
        best = min(best, time.perf_counter() - started)
    return 6.0 * tokens * sum(inputs * outputs for inputs, outputs in shapes) / best


def datasheet_share(flops_per_second: float, device: torch.device, precision: str) -> float | None:
    """The part of what the vendors of this launch's GPUs promise; None where there is no such figure."""
    if device.type != "cuda" or precision == "fp32":
        return None
    name = torch.cuda.get_device_name(device)
    known = [start for start in PEAK_FLOPS if re.match(rf"{re.escape(start)}\b", name)]
    return round(flops_per_second / (PEAK_FLOPS[max(known, key=len)] * dist.world()), 4) if known else None


def peak_memory(device: torch.device) -> int:
    """MB: of tensors on a GPU; else of this process since it began, whatever it did before."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 10**6
    import resource  # not on Windows

    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit // 10**6


def attended(section: Training, sampler: Sampler, rows: int = 512) -> float:
    """How many tokens a token may see on average: the rows' length, or sum(len^2) / sum(len) over their documents."""
    found = sampler.sets[sampler.first]
    ids = torch.from_numpy(found.take(np.arange(min(rows, found.rows))).astype(np.int64))
    document_ids = documents(ids, sampler.vocabulary.to("cpu"))[0]
    if not section.isolate_documents:
        return float((document_ids > 0).sum(1).double().mean())
    sizes = torch.nn.functional.one_hot(document_ids)[..., 1:].sum(1).double()
    return float((sizes**2).sum() / sizes.sum())


def measured_ceiling(run: Run, arch: Arch, tokens: int) -> float:
    """FLOP/s of all ranks together, in the run's precision."""
    with run.cost("setup"):
        return dist.world() * gemm_ceiling(arch, tokens, run.device, run.precision)


def announce(run: Run, section: Training, sampler: Sampler, kept: Any, flops: float) -> float:
    """Say what was derived; returns the measured ceiling of all ranks together in FLOP/s.

    `kept` is the model that will be written, `flops` are the useful operations per token.
    """
    arch, length = kept.config.to_arch(), sampler.first
    parameters, embeddings, _ = _parameters(kept)
    ceiling = measured_ceiling(run, arch, run.micro_batch * length)
    size = sampler.batch_size(length)
    say(f"{run.stage}: {arch.brief()}, {number(parameters)} parameters, {number(embeddings)} of them in embeddings")
    if any(layer.pattern != "dense" for layer in arch.layers):
        settings = {"packed": section.isolate_documents, "dropout": section.dropout > 0.0}
        say(f"{run.stage}: {attention_summary(arch, length, run.device.type, **settings)}")
    pieces = -(-size // (run.micro_batch * dist.world()))
    if section.batch_ramp:
        say(f"{run.stage}: batches of {section.batch_ramp.start} sequences, doubled until they have {size}")
    say(
        f"{run.stage}: {size} x {length} = {number(size * length)} tokens a step in {pieces} micro-batches on "
        f"{dist.world()} {run.device.type}, {torch.get_num_threads()} threads, {run.precision} "
        f"({number(ceiling)} FLOP/s at best); optimizer {section.optimizer}, curve {section.curve}"
    )
    share = EXPECTED_SHARE.get(f"{run.device.type} {run.precision}", EXPECTED_OTHERWISE)
    speed = share * ceiling / flops
    if run.precision == "bf16" and not dist.multiplies_bf16(run.device):
        say(f"{run.stage}: this hardware does not multiply bf16 itself; precision: fp32 is probably faster")
    steps, seconds = _expected(run, sampler, speed)
    say(f"{run.stage}: budget {section.budget}: about {number(round(steps))} steps, {duration(seconds)}")
    return ceiling


def _expected(run: Run, sampler: Sampler, speed: float) -> tuple[float, float]:
    """Steps and seconds to expect at `speed` tokens per second."""
    budget, found = run.recipe.budget, sampler.sets[sampler.first]
    per_step = tokens_per_step(sampler.spans, budget.kind) * found.fill
    steps = {
        "steps": budget.amount,
        "tokens": budget.amount / per_step,
        "epochs": budget.amount * found.rows * found.fill * sampler.first / per_step,
        "seconds": budget.amount * speed / per_step,
    }[budget.kind] * run.recipe.stop_at
    return steps, steps * per_step / speed


def _parameters(model: Any) -> tuple[int, int, int]:
    """(all, embeddings, encoder without embeddings) of the model that is kept."""
    base = model.base_model
    embeddings = sum(parameter.numel() for parameter in base.embeddings.parameters())
    encoder = sum(parameter.numel() for parameter in base.parameters()) - embeddings
    return sum(parameter.numel() for parameter in model.parameters()), embeddings, encoder


def summarise(run: Run, sampler: Sampler, held_out: HeldOut, kept: Any, measured: dict[str, Any]) -> dict[str, Any]:
    """Write summary.json, say what the run cost and what it reached; returns the headline figures (main rank)."""
    if not dist.is_main():
        return {}
    found = _summary(run, kept, measured) | _baselines(sampler, held_out)
    write_json(run.out / "summary.json", found)
    _say(run, found)
    headline = ("final_validation_loss", "unigram_nll", "bigram_nll", "tokens_per_second", "tokens", "steps", "device")
    return {name: found[name] for name in headline}


def _summary(run: Run, model: Any, measured: dict[str, Any]) -> dict[str, Any]:
    state, ceiling = run.state, measured["ceiling_flops"]
    arch = model.config.to_arch()
    parameters, embeddings, encoder = _parameters(model)
    speed = state.tokens / max(state.busy(), 1e-9)
    flops = measured["flops_per_token"]
    costs = {name: round(state.costs.get(name, 0.0), 3) for name in COSTS}
    loss, accuracy = (state.validation.get(f"validation_{name}") for name in ("loss", "accuracy"))
    final = {"final_validation_loss": loss, "final_validation_accuracy": accuracy, "masked_accuracy": accuracy}
    return {
        "arch": arch.to_text(),
        "arch_json": arch.to_json(),
        "parameters": parameters,
        "embedding_parameters": embeddings,
        "encoder_parameters": encoder,
        "tokens": state.tokens,
        "steps": state.step,
        "epochs": state.epochs,
        "seconds": round(state.seconds, 3),
        "cost_seconds": costs,
        "tokens_per_second": round(speed, 1),
        "flop_utilisation_of_measured_ceiling": round(speed * flops / ceiling, 4),
        "flop_utilisation_of_datasheet": datasheet_share(speed * flops, run.device, run.precision),
        **measured,
        "device": torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else dist.processor_name(),
        "cpu": dist.processor_name(),
        "threads": torch.get_num_threads(),
        "ranks": dist.world(),
        "precision": run.precision,
        "micro_batch": state.micro_batch,
        "peak_memory_mb": peak_memory(run.device),
        "ended": state.ended,
        "restores": state.restores,
        "final_validation": as_json(state.validation),
        **as_json(final),
    }


COSTS = ("train", "wait", "validation", "checkpoint", "compile", "probe", "setup")


def _say(run: Run, found: dict[str, Any]) -> None:
    costs = found["cost_seconds"]
    total = max(1e-9, sum(costs.values()))
    spent = ", ".join(f"{name} {seconds / total:.1%}" for name, seconds in costs.items() if seconds / total >= 0.001)
    of_datasheet = found["flop_utilisation_of_datasheet"]
    say(
        f"{run.stage}: {number(found['steps'])} steps, {number(found['tokens'])} tokens in "
        f"{duration(found['seconds'])} ({spent}); {number(found['tokens_per_second'])} tokens/s, "
        f"{found['flop_utilisation_of_measured_ceiling']:.0%} of the matrix products' speed"
        + ("" if of_datasheet is None else f", {of_datasheet:.0%} of the datasheet's")
        + f"; {found['peak_memory_mb']:,} MB of memory at most"
    )
    if costs["validation"] > 0.15 * total:
        say(f"{run.stage}: validation took much of the budget; lower {run.stage}.validation.rows or raise its every")
    if found["ended"].startswith("early"):
        say(f"{run.stage}: {found['ended']}")
    nlls = f"unigram {found['unigram_nll']:.3f}, bigram {found['bigram_nll']:.3f}"
    loss, accuracy = (run.state.validation.get(f"validation_{name}") for name in ("loss", "accuracy"))
    if accuracy is not None:
        say(f"{run.stage}: held-out masked-LM loss {loss or 0.0:.3f}, accuracy {accuracy:.1%} ({nlls})")
    elif loss is not None:  # a super-network with a teacher
        say(f"{run.stage}: held-out distance from the teacher {loss:.4g}")
    pair, right = (run.state.validation.get(f"validation_pair_{name}") for name in ("loss", "accuracy"))
    if right is not None:
        say(f"{run.stage}: held-out loss of the sentence pairs {pair or 0.0:.3f}, accuracy {right:.1%}")


def _baselines(sampler: Sampler, held_out: HeldOut) -> dict[str, float]:
    """Unigram and bigram cross-entropy at the positions that validation masks."""
    length = held_out.set.length
    ids, positions, labels, rows = [], [], [], 0
    count = len(held_out.row_ids)
    for batch in held_out.batches([(start, min(256, count - start)) for start in range(0, count, 256)]):
        ids.append(restore(batch).cpu().numpy())
        positions.append(batch.masked_positions.cpu().numpy() + rows * length)
        labels.append(batch.labels.cpu().numpy())
        rows += len(ids[-1])
    used = np.concatenate(labels) != IGNORED
    return baselines(
        sampler.sets[length], np.concatenate(ids), np.concatenate(positions)[used], np.concatenate(labels)[used]
    )
