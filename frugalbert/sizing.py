"""Which size to train, `pretrain.arch: auto`: a budget in time, this machine and limits in; one architecture out.

Of a ladder of shapes the one with the lowest loss that L(N, D) = E + A / N^a + B / D^b foretells (Hoffmann et al. 2022,
arXiv 2203.15556, section 3.3): N parameters in the layers, D the tokens that the time buys, by steps timed on the spot.
The numbers were fitted to our own trainings, benchmarks/results/scaling.json.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from frugalbert import run
from frugalbert.config import AUTO, Latency, Machine, Pretrain
from frugalbert.model import cost
from frugalbert.model.arch import Arch
from frugalbert.progress import duration, number
from frugalbert.train import phases

if TYPE_CHECKING:
    import torch

LADDER = ("2x128", "3x192", "4x256", "5x320", "6x384", "8x448", "8x512", "12x512", "12x640", "12x768", "16x896",
          "24x1024")  # fmt: skip
"""Layers x hidden of the family `modern`, heads of 64, feed-forward 2.5 times as wide: as the fit's own shapes."""
LAW = {"E": 2.0093, "A": 64.585, "a": 0.34712, "B": 1181.5, "b": 0.41487}
LARGEST_FIT = 100000000000000.0  # operations of the longest training behind the fit
REPEATS_WORTH = 15.0
"""R* of Muennighoff et al. 2023 (arXiv 2305.16264, equation 5), fitted there to causal models: how many repetitions of
a text are worth anything."""
MOST = 0.02  # of the budget, after which only what is about to be chosen is still timed
FILE = "sizing.json"


@dataclass
class Rung:
    """One candidate. `speed`: tokens per second, timed or by the operations of the nearest that was."""

    arch: Arch
    flops: float  # of training, per token
    parameters: int  # with embeddings
    speed: float = 0.0
    timed: bool = False
    tokens: float = 0.0
    loss: float = math.inf
    latency_ms: float | None = None

    def row(self) -> dict[str, Any]:
        return {
            "arch": self.arch.to_text(),
            "parameters": self.parameters,
            "encoder_parameters": cost.encoder_parameters(self.arch),
            "tokens_per_second": round(self.speed, 1),
            "timed": self.timed,
            "tokens": round(self.tokens),
            "foretold_loss": round(self.loss, 4) if math.isfinite(self.loss) else None,
            **({} if self.latency_ms is None else {"latency_ms": self.latency_ms}),
        }


# ---- the law ---------------------------------------------------------------------------------------------------------


def foretold_loss(parameters: float, tokens: float, unique: float = math.inf) -> float:
    """Held-out loss of a training on `tokens`, of which `unique` are different; comparable within one vocabulary.

    Repetitions count less and less: D' = U + U R* (1 - exp(-(D / U - 1) / R*)).
    """
    if tokens <= 0.0:
        return math.inf
    if tokens > unique:
        tokens = unique + unique * REPEATS_WORTH * -math.expm1(-(tokens / unique - 1.0) / REPEATS_WORTH)
    return LAW["E"] + LAW["A"] / parameters ** LAW["a"] + LAW["B"] / tokens ** LAW["b"]


def ladder(section: Pretrain, vocabulary: int, first: int) -> list[Rung]:
    """The candidates that keep `limit.parameters`, smallest first. `first`: row length before the phases.

    Raises ValueError if there is none.
    """
    spans, limit = phases.spans(section, first), section.limit.parameters or math.inf
    served = section.limit.length if section.limit.latency_ms is not None else 0
    longest = max(served, *(span.length for span in spans))
    found = []
    for size in LADDER:
        hidden = int(size.split("x")[1])
        line = f"modern {size} heads={hidden // 64} ffn={hidden * 5 // 2}"
        arch = Arch.parse(line if longest <= Arch.parse(line).max_length else f"{line} max_length={longest}")
        found.append(Rung(arch, _flops(arch, vocabulary, spans, section), cost.parameter_count(arch, vocabulary)))
    kept = [rung for rung in found if rung.parameters <= limit]
    if not kept:
        raise ValueError(
            f"pretrain.limit.parameters {limit:,.0f} is below the smallest of the ladder, {found[0].arch.to_text()} "
            f"with {found[0].parameters:,}; raise it, take a smaller tokenizer.vocab_size, or name pretrain.arch"
        )
    return kept


def _flops(arch: Arch, vocabulary: int, spans: list[phases.Span], section: Pretrain) -> float:
    rate = sum(section.mask.rate) / len(section.mask.rate)
    return phases.per_token(spans, lambda span: cost.training_flops(arch, vocabulary, span.length, rate))


def climb(
    rungs: Sequence[Rung], seconds: float, unique: float, measure: Callable[[Rung], float], in_time: Callable[[], bool]
) -> Rung:
    """The rung with the lowest foretold loss after `seconds`. `measure` gives its tokens per second; what is best, and
    while it is `in_time` its neighbours, are measured, the others foretold from the nearest."""
    while True:
        _estimate(rungs, seconds, unique)
        best = min(range(len(rungs)), key=lambda index: rungs[index].loss)
        near = [index for index in (best, best + 1, best - 1) if 0 <= index < len(rungs)]
        open_ = [rungs[index] for index in near if not rungs[index].timed]
        if not open_ or (rungs[best].timed and not in_time()):
            return rungs[best]
        rung = open_[0]
        rung.speed, rung.timed = measure(rung), True


def _estimate(rungs: Sequence[Rung], seconds: float, unique: float) -> None:
    timed = [rung for rung in rungs if rung.timed and rung.speed]
    for rung in rungs:
        if not rung.timed and timed:
            near = min(timed, key=lambda other: abs(math.log(other.flops / rung.flops)))
            rung.speed = near.speed * near.flops / rung.flops
        rung.tokens = rung.speed * seconds
        rung.loss = foretold_loss(cost.encoder_parameters(rung.arch), rung.tokens, unique)


def rough(section: Pretrain, vocabulary: int, first: int, flops_per_second: float, unique: float) -> Rung:
    """What would be chosen at an assumed pace, without any measurement or limit of latency (`plan`)."""
    rungs = ladder(section, vocabulary, first)
    for rung in rungs:
        rung.speed, rung.timed = flops_per_second / rung.flops, True
    return climb(rungs, section.budget.amount, unique, lambda rung: rung.speed, lambda: False)


# ---- the stage -------------------------------------------------------------------------------------------------------


def pretrain(section: Pretrain, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """The stage `pretrain`: chooses the architecture if it is `auto`, once, within the budget; then trains."""
    from frugalbert.train import pretrain as stage

    if section.arch == AUTO:
        if not (out / FILE).exists():
            _decide(section, inputs, out, machine)
        section = decided(section, out)
    return stage.build(section, inputs, out, machine)


def decided(section: Pretrain, out: Path) -> Pretrain:
    """The section with what was chosen, and without the time that choosing took. Raises ValueError if nothing was."""
    if section.arch != AUTO:
        return section
    if not (out / FILE).exists():
        raise ValueError("pretrain.arch is auto and nothing has been chosen yet; call `frugalbert run` first")
    told, amount = run.read_sealed(out / FILE, "restore it, or write --redo pretrain"), section.budget.amount
    left = max(amount / 2, amount - told["seconds"])
    return section.model_copy(update={"arch": told["chosen"], "budget": type(section.budget)("seconds", left)})


def _decide(section: Pretrain, inputs: dict[str, Path], out: Path, machine: Machine) -> None:
    from frugalbert import dist
    from frugalbert.train.assemble import Rows
    from frugalbert.train.state import pause

    started = time.monotonic()

    def spent() -> float:
        return dist.agree([time.monotonic() - started])[0]

    with dist.ranks(machine) as device:
        rows = Rows.open(section, inputs["shards"], inputs["tokenizer"], device)
        first, vocabulary = rows.sampler.first, rows.sampler.vocabulary.size
        data = rows.sampler.sets[first]
        unique, seconds = data.rows * data.fill * first, section.stop_at * section.budget.amount
        rungs = ladder(section, vocabulary, first)
        _assume(rungs, device)

        def measure(rung: Rung) -> float:
            pause()
            return _speed(rung, section, inputs, machine, rows)

        def best(among: Sequence[Rung]) -> Rung:
            return climb(among, seconds, unique, measure, lambda: spent() < MOST * seconds)

        chosen = best(rungs)
        if section.limit.latency_ms is not None:
            chosen = best(_quick(rungs[: rungs.index(chosen) + 1], section, vocabulary, dist.is_main()))
        took = spent()
        if dist.is_main():
            _say(section, rungs, chosen, unique, took)
            limit = section.limit.model_dump(mode="json", exclude_none=True)
            table = [rung.row() for rung in rungs]
            found = {"chosen": chosen.arch.to_text(), "rows": table, "unique_tokens": round(unique), "limit": limit}
            run.write_sealed(out / FILE, {**found, "seconds": round(took, 3), "law": LAW})
        dist.agree([0.0])  # it is on the disk before any rank reads it


def _assume(rungs: Sequence[Rung], device: torch.device) -> None:
    """Where to begin: speeds at an assumed pace, replaced by the first measurement."""
    from frugalbert.dist import usable_cores
    from frugalbert.plan_training import CPU_FLOPS_PER_CORE, GPU_FLOPS

    pace = GPU_FLOPS if device.type == "cuda" else usable_cores() * CPU_FLOPS_PER_CORE
    for rung in rungs:
        rung.speed = pace / rung.flops


def _speed(rung: Rung, section: Pretrain, inputs: dict[str, Path], machine: Machine, rows: Any) -> float:
    """Tokens per second of its training over the budget; 0 if it does not fit into memory."""
    from frugalbert import dist
    from frugalbert.budget import Clock
    from frugalbert.train import pretrain as stage
    from frugalbert.train import probe
    from frugalbert.train.assemble import assemble
    from frugalbert.train.step import is_out_of_memory

    named = section.model_copy(update={"arch": rung.arch.to_text()})
    with tempfile.TemporaryDirectory() as folder:
        try:
            method = stage.maker(named, inputs)(rows.longest, rows.sampler.vocabulary)
            trial = assemble(named, machine, inputs["yaml"], Path(folder), rows, method, Clock())
            return probe.tokens_per_second(trial, rows.sampler.spans)
        except (RuntimeError, MemoryError) as error:
            if dist.world() > 1 or not is_out_of_memory(error):  # others may wait for this rank
                raise
            return 0.0
        finally:
            trial = method = None
            dist.free(rows.sampler.device)


def _quick(rungs: list[Rung], section: Pretrain, vocabulary: int, here: bool) -> list[Rung]:
    """Those that keep `limit.latency_ms`, timed as the stage `latency` does, by one process. Raises ValueError if none
    does."""
    from frugalbert import dist
    from frugalbert.measure import table

    limit = section.limit
    assert limit.latency_ms is not None
    times = [-math.inf] * len(rungs)
    if here:
        served = {name: getattr(limit, name) for name in ("backend", "device", "threads", "batch_size", "length")}
        archs = [rung.arch for rung in rungs]
        with tempfile.TemporaryDirectory() as folder:
            measured = table.measure(archs, Latency(**served), vocabulary, Path(folder) / table.TABLE)
        times = [row["median_ms"] for row in measured]
    for rung, time_ms in zip(rungs, dist.agree(times), strict=True):
        rung.latency_ms = time_ms
    kept = [rung for rung in rungs if rung.latency_ms is not None and rung.latency_ms <= limit.latency_ms]
    if not kept:
        raise ValueError(
            f"pretrain.limit.latency_ms {limit.latency_ms:g} is too little for the smallest of the ladder, "
            f"{rungs[0].arch.to_text()}: {rungs[0].latency_ms:.3g} ms; raise it, or name pretrain.arch"
        )
    return kept


def _say(section: Pretrain, rungs: Sequence[Rung], chosen: Rung, unique: float, took: float) -> None:
    for rung in rungs:
        if not rung.timed and rung is not chosen:
            continue
        served = "" if rung.latency_ms is None else f", {rung.latency_ms:.3g} ms"
        run.say(
            f"pretrain: {rung.arch.brief()}: {number(rung.speed)} tokens/s, {number(rung.tokens)} tokens "
            f"({rung.tokens / unique:.2g} epochs){served}, foretold loss {rung.loss - chosen.loss:+.3f}"
        )
    beyond = chosen.tokens * chosen.flops / LARGEST_FIT
    far = f"; the fit's longest training was {beyond:,.0f} times shorter, so this is far from certain"
    run.say(
        f"pretrain: arch auto is {chosen.arch.to_text()}, chosen in {duration(took)} of {section.budget}"
        + (far if beyond > 10.0 else "")
    )
    if took > section.budget.amount / 2:
        run.say(f"pretrain: choosing took most of {section.budget}; the training gets half of it and ends late")
