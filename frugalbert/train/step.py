"""One optimizer step: a global batch in, better weights out, or none at all.

The batch is accumulated in micro-batches whose shares of the mean add up to one big batch, over ranks too. Loss and
gradient norm are looked at before the optimizer moves: one number read per step is all that the host waits for. What is
not finite is skipped, then answered by going back to a checkpoint, then by giving up. When memory is full the
micro-batch is halved, when a compiler fails the run goes on without it; the same global batch is tried again.
"""

from __future__ import annotations

import hashlib
import math
import time

import torch
from torch import Tensor

from frugalbert import dist
from frugalbert.run import say
from frugalbert.train.optim import restart_steps, set_rates
from frugalbert.train.state import Drawn, Run, load, resume, write_line

SKIPS_BEFORE_RESTORE, RESTORES, SKIPS_BEFORE_END = 10, 3, 1000
LINES = 1000  # of metrics.jsonl over the whole budget
SPIKE = 3.0  # times the usual loss


def take_step(run: Run) -> None:
    """Draw, accumulate, check, apply. Raises ValueError when the run cannot go on."""
    started, waited = time.perf_counter(), run.state.costs.get("wait", 0.0)
    drawn, figures, norm, tokens = _gradients(run)
    good = math.isfinite(figures["loss"]) and math.isfinite(norm)
    moved = good and _apply(run, drawn, norm, tokens)
    costs = run.state.costs
    costs["train"] = costs.get("train", 0.0) + time.perf_counter() - started - (costs.get("wait", 0.0) - waited)
    if moved:
        rate = max(group["lr"] for group in run.optimizer.param_groups)
        _log(run, figures | {"tokens": float(tokens)}, {"learning_rate": rate, "grad_norm": norm, **drawn.figures})
        _notice_spike(run, figures.get("text_loss", figures["loss"]))  # without what a penalty adds
    elif not good:
        _reject(run, drawn, figures["loss"], norm)


def _gradients(run: Run) -> tuple[Drawn, dict[str, float], float, int]:
    """The batch, the figures of the global batch, the gradient norm and the number of real tokens."""
    while True:
        try:
            with run.cost("wait"):
                drawn = run.draw(run.state.progress, run.state.samples, run.state.micro_batch)
            torch.manual_seed(step_seed(run.recipe.seed, run.state.attempt))
            run.optimizer.zero_grad(set_to_none=True)
            return drawn, *_read(run, drawn, accumulate(run, drawn))
        except Exception as error:
            full, why = is_out_of_memory(error), str(error)
            if not full and not of_compiler(run, error):
                raise
        if full:
            _refuse_among_ranks(_full(run))
            halve(run)  # outside of `except`, whose traceback keeps the tensors alive
        else:
            _refuse_among_ranks("torch.compile fails in the middle of the training; set machine.compile: false")
            without_compiler(run, why)
            run.state.settled["compiled"] = False


def step_seed(seed: int, attempt: int) -> int:
    """Seed of dropout and of plug-ins' random numbers for one batch on one rank."""
    text = f"{seed} {attempt} {dist.rank()}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "little")


def accumulate(run: Run, drawn: Drawn, *, sync: bool = True) -> dict[str, Tensor]:
    """Forward and backward over the micro-batches; sums of their figures. `sync`: the last one averages over ranks."""
    totals: dict[str, Tensor] = {}
    for index, micro in enumerate(drawn.micros):
        with dist.no_sync(run.parallel, last=sync and index == len(drawn.micros) - 1):
            with dist.autocast(run.device, run.precision):
                shares = run.objective(run.parallel, micro, run.state.progress)
            loss = shares["loss"] * dist.world()  # gradients are averaged over ranks, shares add up over them
            (run.scaler.scale(loss) if run.scaler else loss).backward()
        for name, value in shares.items():
            totals[name] = totals[name] + value.detach() if name in totals else value.detach()
    return totals


def _read(run: Run, drawn: Drawn, totals: dict[str, Tensor]) -> tuple[dict[str, float], float, int]:
    """All numbers of the step in one transfer from the device."""
    if run.scaler:
        run.scaler.unscale_(run.optimizer)
    norm = dist.full(torch.nn.utils.get_total_norm(_gradient_list(run)))
    sums = dist.sum_over_ranks(torch.stack([value.double() for value in totals.values()]))
    *values, size, tokens = torch.cat([sums, torch.stack([norm.double(), drawn.tokens.double()])]).tolist()
    return dict(zip(totals, values, strict=True)), size, int(tokens)


def _gradient_list(run: Run) -> list[Tensor]:
    """Of the weights; what is `apart` (logits of masks) has a clip of its own."""
    weights = (parameter for parameter in run.model.parameters() if not getattr(parameter, "apart", False))
    return [parameter.grad for parameter in weights if parameter.grad is not None]


def _apply(run: Run, drawn: Drawn, norm: float, tokens: int) -> bool:
    """Clip, move the weights, count; False if memory was full, and the run is back at its checkpoint."""
    schedule = run.recipe.schedule(run.state.progress)
    if schedule != run.state.schedule:
        restart_steps(run.optimizer)
        run.state.schedule = schedule
    set_rates(run.optimizer, run.recipe.rate(run.state.progress))
    if 0.0 < run.recipe.clip_norm < norm:
        torch._foreach_mul_(_gradient_list(run), run.recipe.clip_norm / norm)
    full = False
    try:
        run.optimizer.step()
    except (RuntimeError, MemoryError) as error:
        full = is_out_of_memory(error)
        if not full:
            raise
    if full:
        _refuse_among_ranks(_full(run))
        _start_again_smaller(run)
        return False
    state = run.state
    if run.scaler:
        run.scaler.update()
        state.low_scale = state.low_scale + 1 if run.scaler.get_scale() <= 1.0 else 0
    _advance(run, drawn)
    state.step, state.tokens, state.skipped = state.step + 1, state.tokens + tokens, 0
    return True


def _advance(run: Run, drawn: Drawn) -> None:
    run.state.attempt += 1
    run.state.samples, run.state.epochs = drawn.samples, drawn.epochs


def _log(run: Run, summed: dict[str, float], latest: dict[str, float]) -> None:
    """Means since the latest line, and the latest of the others, about LINES times per budget."""
    window = run.state.window
    for name, value in {**summed, "steps": 1.0}.items():
        window[name] = window.get(name, 0.0) + value
    line = int(run.state.progress * LINES)
    if line == run.state.line:
        return
    run.state.line = line
    steps, tokens = window.pop("steps"), window.pop("tokens")
    now = run.state.busy()
    speed = tokens / max(1e-9, now - window.pop("busy", 0.0))
    means = {name: value / steps for name, value in window.items()}
    write_line(run, {**means, **latest, "tokens_per_second": speed})
    run.state.window = {"busy": now}


def _notice_spike(run: Run, loss: float) -> None:
    usual = run.state.usual_loss
    if usual is not None and loss > SPIKE * usual:
        write_line(run, {"event": f"the loss jumped from about {usual:.4g} to {loss:.4g}"})
        say(f"step {run.state.step}: the loss jumped from about {usual:.4g} to {loss:.4g}")
    run.state.usual_loss = loss if usual is None else 0.95 * usual + 0.05 * loss


# ---- what is not finite ----------------------------------------------------------------------------------------------


def _reject(run: Run, drawn: Drawn, loss: float, norm: float) -> None:
    """The step does not happen. fp16 with room below tries the batch again at half the loss scale; else by policy."""
    if run.scaler:
        scale = run.scaler.get_scale()
        run.scaler.update()
        if scale > 1.0:
            run.scaler.update(max(1.0, run.scaler.get_scale()))
            return
        run.scaler.update(1.0)
        run.state.low_scale += 1
    _advance(run, drawn)
    run.state.skipped += 1
    what = f"loss {loss:.4g}, gradient norm {norm:.4g}"
    write_line(run, {"event": f"step skipped: {what}"})
    policy, skipped = run.recipe.non_finite, run.state.skipped
    if policy == "stop" or skipped >= SKIPS_BEFORE_END:
        raise ValueError(_sentence(run, what))
    if skipped == 1:
        say(f"step {run.state.step}: {what}; the batch is skipped")
    if policy == "restore" and skipped >= SKIPS_BEFORE_RESTORE:
        go_back(run, f"{skipped} batches in a row had {what}")


def go_back(run: Run, why: str) -> None:
    """Return to the last checkpoint's weights, but to later data. Raises ValueError the fourth time."""
    before = run.state
    if before.restores >= RESTORES:
        raise ValueError(_sentence(run, why))
    if not resume(run):
        raise ValueError(_sentence(run, why))
    state = run.state
    state.attempt, state.samples, state.epochs = before.attempt, before.samples, before.epochs
    state.restores, state.costs, state.micro_batch = before.restores + 1, before.costs, before.micro_batch
    state.seconds, state.reserve, state.longest = before.seconds, before.reserve, before.longest
    state.window = {"busy": state.busy()}
    write_line(run, {"event": f"went back to the checkpoint of step {state.step}: {why}"})
    say(f"{why}; the run went back to its checkpoint of step {state.step}")


def _sentence(run: Run, what: str) -> str:
    return (
        f"{run.stage} cannot go on at step {run.state.step}: {what}; lower {run.stage}.learning_rate, set "
        f"{run.stage}.clip_norm or use precision: fp32 (the last good weights are in {run.folder})"
    )


# ---- full memory, and compilers that fail ----------------------------------------------------------------------------


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory is full, by the classes and words of torch, CUDA's libraries and Triton."""
    words = ("can't allocate memory", "out of memory", "ALLOC_FAILED")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(text in str(error) for text in words)


def of_compiler(run: Run, error: BaseException) -> bool:
    """Whether it was torch.compile that failed."""
    ours = type(error).__module__.startswith(("torch._dynamo", "torch._inductor")) or "compiler" in str(error)
    return run.compiled and ours


def compiled(run: Run, wanted: bool) -> None:
    """Have the layers compiled at their next pass, or take that back."""
    if wanted and not run.compiled:
        dist.compile_blocks(run.blocks, dynamic=False)
    elif not wanted:
        dist.eager_blocks(run.blocks)
    run.compiled = wanted


def without_compiler(run: Run, why: str) -> None:
    """Go on eagerly, and say why."""
    first, _, rest = why.strip().partition("\n")
    why = f"{first} {rest.strip().partition(chr(10))[0]}" if first.endswith(":") else first
    say(f"{run.stage}: torch.compile does not work here and is left out: {why}")
    clear(run)
    compiled(run, False)


def clear(run: Run) -> None:
    """Give back the memory of a pass that failed."""
    run.optimizer.zero_grad(set_to_none=True)
    dist.free(run.device)


def halve(run: Run) -> None:
    """Halve the micro-batch: the same samples in more pieces. Raises ValueError if it is 1."""
    clear(run)
    if run.state.micro_batch <= 1:
        large = "space" if run.stage == "supernet" else "pretrain.arch"
        raise ValueError(f"memory is full even with one sequence at a time; choose a smaller {large}")
    run.state.micro_batch = (run.state.micro_batch + 1) // 2
    say(f"memory is full: micro-batches of {run.state.micro_batch} sequences from now on, the same global batch")


def _full(run: Run) -> str:
    smaller = max(1, run.state.micro_batch // 2)
    return f"memory is full with micro-batches of {run.state.micro_batch} sequences; set machine.micro_batch: {smaller}"


def _refuse_among_ranks(sentence: str) -> None:
    """Raises ValueError if there are other ranks: they wait in the middle of the step, or have moved their weights."""
    if dist.world() > 1:
        raise ValueError(f"rank {dist.rank()}: {sentence}")


def _start_again_smaller(run: Run) -> None:
    """An optimizer that ran out of memory may have moved some of the weights: take them from the checkpoint."""
    halve(run)
    if run.scaler:
        run.scaler.update(run.scaler.get_scale())  # it has unscaled gradients that are gone
    before = run.state
    load(run, int(before.saved["steps"]))
    run.state.micro_batch, run.state.costs, run.state.seconds = before.micro_batch, before.costs, before.seconds
