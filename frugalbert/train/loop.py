"""The one loop. In: a Run (model, optimizer, batches, objective, recipe); out: the trained model and its state.

    observe -> validate? -> marker? -> snapshot? -> checkpoint? -> end? -> step

Everything is driven by progress in [0, 1] of the budget (24hBERT, arXiv 2104.07705). `observe` is where time and
signals come in, agreed among the ranks; every decision is a pure function of what it leaves in the state, so all ranks
take the same one, and a run that was killed takes it again. Stops happen between steps, and leave a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from frugalbert import dist
from frugalbert.budget import progress
from frugalbert.config import Validation
from frugalbert.run import Progress, Stopped, say, stop_requested
from frugalbert.train import checkpoint, probe
from frugalbert.train.state import (
    Run,
    estimate,
    healthy,
    keep_time,
    named_weights,
    pause,
    resume,
    save,
    set_weights,
    whole_weights,
    write_line,
    write_weights,
)
from frugalbert.train.step import go_back, take_step

SCALE_STUCK = 100  # steps at loss scale 1 before an early stop (24hBERT)


def train(run: Run) -> None:
    """Train until the budget ends or an early stop, and leave the best weights in `run.model`.

    Continues from the newest checkpoint. Raises Stopped on a signal, after a checkpoint; ValueError if the run cannot
    go on; OSError, ValueError if the disk is full.
    """
    setup = run.state.costs
    if resume(run):
        run.clock.add(run.state.seconds)
        for name, seconds in setup.items():
            run.state.costs[name] = run.state.costs.get(name, 0.0) + seconds
        say(f"{run.stage}: continuing at step {run.state.step}, {run.state.progress:.1%} of the budget")
    if run.micro_batch_fixed or not run.state.micro_batch:
        run.state.micro_batch = run.micro_batch
    try:
        with Progress(run.stage, 1.0) as bar:
            _begin(run)
            while not run.state.ended:
                observe(run)
                over = _over(run)
                if _validate_if_due(run, at_end=bool(over)):
                    over = over or _over(run)
                _keep_markers(run)
                _keep_snapshot(run)
                if (over or _checkpoint_due(run)) and not _save_healthy(run):
                    continue
                run.state.ended = over
                if not over:
                    take_step(run)
                    bar.update(run.state.progress, **_figures(run))
    except Stopped:
        if healthy(run):
            save(run)
        raise
    finally:
        if run.trackers is not None:
            run.trackers.finish()
    _take_average(run)


def _begin(run: Run) -> None:
    """Before the first step: enough disk, the settings that are fastest here, and a checkpoint with them."""
    observe(run)
    if not run.state.saved:
        if not healthy(run):
            raise ValueError(f"the weights to start from are not finite; give another {run.stage}.start")
        if dist.is_main():
            run.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.check_disk(run.folder, estimate(run))
    probe.settle(run)
    observe(run)
    if not run.state.step:  # what was tried and compiled before must not be taken out of the warm-up
        run.state.begun, run.state.progress = run.state.seconds, 0.0
        save(run)


def observe(run: Run) -> None:
    """Take the time and signals, the same on all ranks, into the state. Raises Stopped if any rank got a signal."""
    state, mine = run.state, (-math.inf, -math.inf)
    if dist.is_main():
        mine = (run.clock.seconds(), state.reserve)
    state.seconds, state.reserve, signal = dist.agree([*mine, float(stop_requested() or 0)])
    if signal:
        raise Stopped(int(signal))
    state.progress = max(state.progress, _share(run))


def _share(run: Run) -> float:
    """Progress now; of a budget in seconds the time before the first step does not count, and that for the last
    validation and checkpoint is set aside: it comes to `stop_at` when what is left is needed for them."""
    state, budget, end = run.state, run.recipe.budget, run.recipe.stop_at
    if budget.kind == "seconds":
        last = end * budget.amount
        whole = last - min(state.reserve, last / 2) - state.begun
        return min(1.0, end * (state.seconds - state.begun) / whole) if whole > 0 else 1.0
    return progress(budget, seconds=0.0, tokens=state.tokens, steps=state.step, epochs=state.epochs)


def _over(run: Run) -> str:
    """Why the run ends now, or an empty text."""
    state, recipe = run.state, run.recipe
    if state.progress >= recipe.stop_at:
        return "budget"
    stop, loss = recipe.early_stop, state.validation.get("validation_loss")
    if stop is None:
        return ""
    if loss is not None and not math.isfinite(loss):
        return f"early stop: the validation loss is {loss}"
    if state.low_scale >= SCALE_STUCK:
        return f"early stop: the loss scale is stuck at 1 for {SCALE_STUCK} steps"
    if loss is not None and loss > stop.loss and state.used()[stop.after.kind] >= stop.after.amount:
        return f"early stop: the validation loss {loss:.4g} is above {stop.loss:g} after {stop.after}"
    return ""


# ---- validation ------------------------------------------------------------------------------------------------------


def validation_due(settings: Validation, before: float, now: float, end: float = 1.0) -> bool:
    """Whether a multiple of the interval that holds at progress `now` lies in (before, now]."""
    every = settings.every
    if now < settings.begin_share * end:
        every = settings.begin_every
    elif now > (1.0 - settings.end_share) * end:
        every = settings.end_every
    return every > 0.0 and math.floor(now / every + 1e-9) > math.floor(before / every + 1e-9)


def _validate_if_due(run: Run, *, at_end: bool) -> bool:
    state, recipe = run.state, run.recipe
    due = validation_due(recipe.validation, state.validated, state.progress, recipe.stop_at) or at_end
    if run.validate is None or not due or state.validated >= state.progress:
        return False
    figures = _validation(run)
    state.validated, state.validation = state.progress, figures
    write_line(run, figures)
    return True


def _validation(run: Run) -> dict[str, float]:
    assert run.validate is not None

    started = run.clock.seconds()
    with run.cost("validation"):
        figures = run.validate(pause)
    keep_time(run, "validation", run.clock.seconds() - started)
    return figures


# ---- checkpoints, markers, averages ----------------------------------------------------------------------------------


def _checkpoint_due(run: Run) -> bool:
    every = run.recipe.checkpoints.every
    return run.state.used()[every.kind] - run.state.saved[every.kind] >= every.amount


def _save_healthy(run: Run) -> bool:
    """A checkpoint, or, if a weight is not finite, back to the one before: then the loop goes round again."""
    if healthy(run):
        save(run)
        return True
    go_back(run, "a weight is nan or infinite")
    return False


def _keep_markers(run: Run) -> None:
    """A fine-tuning checkpoint the first time that progress passes a marker."""
    for marker in run.recipe.checkpoints.markers:
        if run.state.progress >= marker and marker not in run.state.markers:
            path = run.out / "markers" / f"progress-{marker:.2f}"
            there = dist.agree([float(path.exists()) if dist.is_main() else -math.inf])[0]
            if not there:  # a killed attempt may have been here before
                with run.cost("checkpoint"):
                    write_weights(run, path)
            run.state.markers.append(marker)


def _snapshots(run: Run) -> Iterator[float]:
    """Progress at which weights enter the average: equally spaced over the last tenth."""
    count = run.recipe.checkpoints.average
    return (run.recipe.stop_at * (0.9 + 0.1 * (index + 1) / count) for index in range(count))


def _keep_snapshot(run: Run) -> None:
    due = sum(point <= run.state.progress + 1e-9 for point in _snapshots(run))
    if due <= run.state.snapshots or not healthy(run):
        return
    run.state.snapshots = due
    run.state.averaged += 1
    for name, tensor in named_weights(run.model).items():
        if name in run.average and tensor.is_floating_point():
            run.average[name].lerp_(tensor, 1.0 / run.state.averaged)
        else:
            run.average[name] = tensor.clone()


def _take_average(run: Run) -> None:
    """Keep the average of the last snapshots if its validation loss is lower than that of the last weights."""
    before = run.state.validation.get("validation_loss")
    if run.state.averaged < 2 or run.validate is None or before is None:
        return
    last = {name: tensor.clone() for name, tensor in whole_weights(run.model).items()}
    set_weights(run.model, {name: dist.full(tensor) for name, tensor in run.average.items()})
    figures = _validation(run)
    loss, count = figures["validation_loss"], run.state.averaged
    say(f"the average of {count} snapshots has validation loss {loss:.4f}, the last weights {before:.4f}")
    if loss < before:
        run.state.validation = figures
        write_line(run, figures | {"event": "the average of the last snapshots is kept"})
    else:
        set_weights(run.model, last)


def _figures(run: Run) -> dict[str, float]:
    """What the progress line shows."""
    state = run.state
    shown = {"step": state.step, "tokens_per_second": state.tokens / max(state.busy(), 1e-9)}
    if state.usual_loss is not None:
        shown["loss"] = state.usual_loss
    if "validation_loss" in state.validation:
        shown["validation"] = state.validation["validation_loss"]
    return shown
