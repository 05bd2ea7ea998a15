"""What is fastest here: micro-batch, precision and compilation, tried for seconds before the first step.

Timed is the step's own forward and backward pass over one micro-batch, without a step; the slowest rank counts. What
was chosen becomes part of the run's state, so that a run which continues computes as it began. Only what the YAML
leaves `auto` is tried, and only where enough training follows to pay for it.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch

from frugalbert import dist
from frugalbert.progress import duration
from frugalbert.run import say
from frugalbert.train.phases import Span
from frugalbert.train.state import Drawn, Run, pause
from frugalbert.train.step import accumulate, clear, compiled, halve, is_out_of_memory, of_compiler, without_compiler

WORTH_SECONDS = 60.0  # of training; a shorter one takes what was estimated
MOST = 0.02  # of the training, after which nothing more is tried
COMPILE_WORTH_SECONDS = {"cpu": 3600.0, "cuda": 600.0}  # compiling takes a minute; on CPUs it saves a few percent
CLEAR = 0.97  # another setting must need less than this share of the time
SMALLER, LARGER = 3, {"cpu": 0, "cuda": 2}  # halvings and doublings of the estimated micro-batch
PASSES = 3
Key = TypeVar("Key")


def settle(run: Run) -> None:
    """Fix the run's micro-batch, precision and compilation, by those of an earlier process or by measuring."""
    settled = run.state.settled
    if settled and "precision" in run.free:
        run.precision = str(settled["precision"])
    if settled and "compile" in run.free:
        compiled(run, bool(settled["compiled"]))
    if run.trial or run.compiled:
        with run.cost("compile" if run.compiled else "probe"):
            _fit(run)
    if run.free and not settled and not run.state.step and (left := _left(run)) >= WORTH_SECONDS:
        _choose(run, MOST * left)
    run.state.settled = {"precision": run.precision, "compiled": run.compiled}


def _choose(run: Run, limit: float) -> None:
    """First what is computed in, then how much at once, then whether to compile just that; none begins after `limit`
    seconds."""
    started, found = time.perf_counter(), []
    for name, choose in (("precision", _precision), ("micro_batch", _micro_batch), ("compile", _compile)):
        if name in run.free and dist.agree([time.perf_counter() - started])[0] < limit:
            with run.cost("compile" if name == "compile" else "probe"):
                found.append(choose(run))
    say(f"{run.stage}: tried for {duration(time.perf_counter() - started)}: {'; '.join(found)}")


def _precision(run: Run) -> str:
    def seconds(name: str) -> float:
        run.precision = name
        return _step_seconds(run, run.state.micro_batch)

    times = {name: seconds(name) for name in ("bf16", "fp32")}
    run.precision = _confirmed(times, seconds)
    return _said("precision", times, run.precision)


def _micro_batch(run: Run) -> str:
    """Large pieces first, which are taken unless smaller ones are clearly faster."""
    first = run.state.micro_batch
    most = min(run.largest_micro_batch, first << LARGER[run.device.type])
    sizes = sorted({max(1, min(most, first * 2**power // 2**SMALLER)) for power in range(SMALLER + 3)}, reverse=True)
    times: dict[int, float] = {}
    for size in sizes:
        times[size] = _step_seconds(run, size)
        if times[size] > min(times.values()) < math.inf:
            break  # smaller ones are slower still
    run.state.micro_batch = _confirmed(times, lambda size: _step_seconds(run, size))
    return _said("micro-batch", times, run.state.micro_batch)


def _compile(run: Run) -> str:
    if _left(run) < COMPILE_WORTH_SECONDS[run.device.type]:
        return "not compiled: too little training follows"
    times = {False: _step_seconds(run, run.state.micro_batch)}
    compiled(run, True)
    _fit(run)
    if run.compiled:
        times[True] = _step_seconds(run, run.state.micro_batch)
    if not _best(times):
        compiled(run, False)
    names = {"compiled" if key else "eager": seconds for key, seconds in times.items()}
    return _said("torch.compile", names, "compiled" if run.compiled else "eager")


def tokens_per_second(run: Run, parts: Sequence[Span]) -> float:
    """Of whole steps, the mean over a budget in time with these parts; 0 if not even one row fits into memory. What is
    timed trains nothing that is kept."""
    state = run.state
    state.micro_batch = run.micro_batch
    try:
        _fit(run)
    except ValueError:  # full even with one sequence
        return 0.0
    pause()
    moving, found = _moving_seconds(run), 0.0  # if that is infinite, so is every step, and nothing is found
    for part in parts:
        pause()
        state.progress = (part.start + part.end) / 2.0
        tokens = run.draw(state.progress, state.samples, state.micro_batch).tokens
        found += (part.end - part.start) * float(tokens) / (_step_seconds(run, state.micro_batch, passes=2) + moving)
    return found


def _best(times: dict[Key, float]) -> Key:
    """The first key that is not clearly slower than the quickest."""
    least = min(times.values())
    return next(key for key, seconds in times.items() if CLEAR * seconds <= least)


def _confirmed(times: dict[Key, float], seconds: Callable[[Key], float]) -> Key:
    """The best key; one that is not the first must win twice, for other work on the machine disturbs a stop-watch."""
    first = next(iter(times))
    if _best(times) != first and math.isfinite(times[first]):
        for key in (first, _best(times)):
            times[key] = min(times[key], seconds(key))
    return _best(times)


def _said(what: str, times: dict[Any, float], taken: object) -> str:
    listed = ", ".join(f"{name} {1e3 * seconds:,.0f} ms" for name, seconds in times.items() if seconds < math.inf)
    return f"{what} {taken} (a step's passes: {listed})"


# ---- passes ----------------------------------------------------------------------------------------------------------


def _pass(run: Run, drawn: Drawn) -> None:
    accumulate(run, drawn, sync=_sharded(run))
    for parameter in run.model.parameters():  # those of a second optimizer, too
        parameter.grad = None


def _step_seconds(run: Run, micro_batch: int, passes: int = PASSES) -> float:
    """Seconds of all passes of one step in pieces of `micro_batch`, from its first piece; infinite if none fits."""
    best, full = math.inf, False
    try:
        first, pieces = _first(run, micro_batch)
        for _ in range(1 + passes):
            _wait(run)
            started = time.perf_counter()
            _pass(run, first)
            _wait(run)
            best = min(best, time.perf_counter() - started)
        best *= pieces
    except (RuntimeError, MemoryError) as error:
        full = is_out_of_memory(error)
        if not full:
            raise
    if full:
        clear(run)
    return dist.agree([math.inf if full else best])[0]


def _moving_seconds(run: Run) -> float:
    """Seconds in which the optimizer moves the weights; infinite if memory does not hold its state."""
    first = _first(run, run.state.micro_batch)[0]
    times: list[float] = []
    for _ in range(PASSES):
        seconds = math.inf
        try:
            accumulate(run, first, sync=_sharded(run))
            _wait(run)
            started = time.perf_counter()
            run.optimizer.step()
            _wait(run)
            seconds = time.perf_counter() - started
            run.optimizer.zero_grad(set_to_none=True)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        times += dist.agree([seconds])
        if times[-1] == math.inf:  # on one rank: all end here
            clear(run)
            return math.inf
    return min(times)


def _first(run: Run, micro_batch: int) -> tuple[Drawn, int]:
    """The first piece of the next step, and how many there are."""
    drawn = run.draw(run.state.progress, run.state.samples, micro_batch)
    return Drawn(drawn.micros[:1], drawn.tokens, drawn.samples, drawn.epochs), len(drawn.micros)


def _sharded(run: Run) -> bool:
    """FSDP: before ranks have put their gradients together, they lie where nobody can remove them."""
    return hasattr(run.parallel, "set_requires_gradient_sync")


def _wait(run: Run) -> None:
    if run.device.type == "cuda":
        torch.cuda.synchronize(run.device)


def _left(run: Run) -> float:
    """Seconds of training that follow, about."""
    state, budget = run.state, run.recipe.budget
    if budget.kind == "seconds":
        return run.recipe.stop_at * budget.amount - state.seconds
    drawn = run.draw(state.progress, state.samples, state.micro_batch)
    per_step = {"steps": 1.0, "tokens": float(drawn.tokens), "epochs": drawn.epochs - state.epochs}[budget.kind]
    steps = run.recipe.stop_at * budget.amount * (1.0 - state.progress) / max(per_step, 1e-9)
    return steps * _step_seconds(run, state.micro_batch, passes=0)


def _fit(run: Run) -> None:
    """One pass and a piece of a validation: compiles, and halves the micro-batch until both fit on all ranks. Without a
    compiler it stays eager."""
    full, why = True, "it failed on another rank"
    while full:
        full = failed = False
        try:
            _pass(run, run.draw(run.state.progress, run.state.samples, run.state.micro_batch))
            _validate_once(run)
        except Exception as error:
            full, failed = is_out_of_memory(error), of_compiler(run, error)
            if not full and not failed:
                raise
            why = str(error)
        full, failed = (value == 1.0 for value in dist.agree([float(full), float(failed)]))
        if failed:
            without_compiler(run, why)
            full = True
        elif full:
            halve(run)


def _validate_once(run: Run) -> None:
    """The first piece of a validation, and no figures: the pause before the second one leaves it, as a signal would."""
    pauses = iter([None])
    with contextlib.suppress(StopIteration):
        if run.validate is not None:
            run.validate(lambda: next(pauses))
