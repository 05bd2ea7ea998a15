"""What the loop promises besides resuming: schedule and budget under a fake clock, batches, guards, averages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from frugalbert.budget import Budget
from frugalbert.config import Checkpoints, EarlyStop, Validation
from frugalbert.train import loop, state, step
from frugalbert.train.loop import validation_due
from frugalbert.train.optim import OptimizerSettings, make_optimizer
from tests.train import toy


class Time:
    """A clock that the parts of a run move: so many seconds per step, validation, checkpoint."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def timed(out: Path, time: Time, seconds: str, costs: dict[str, float], **values: Any) -> state.Run:
    """A toy run with a budget in seconds in which every activity takes what `costs` says."""
    recipe = toy.changed(budget=Budget.parse(seconds), **values)
    run = toy.make(out, recipe, now=time)

    def slow(function: Any, kind: str) -> Any:
        def call(*arguments: Any) -> Any:
            time.now += costs.get(kind, 0.0)
            return function(*arguments)

        return call

    run.draw, run.objective = slow(run.draw, "draw"), slow(run.objective, "micro")
    run.validate, run.write_model = slow(run.validate, "validation"), slow(run.write_model, "checkpoint")
    return run


# ---- schedule and budget ---------------------------------------------------------------------------------------------


@pytest.mark.fault("R13")
@pytest.mark.parametrize("seconds", ["30s", "10m", "9d"])
def test_learning_rate_follows_the_wall_clock(seconds: str, tmp_path: Path):
    """Warm-up, then straight down to 0 at the budget's end, whatever the steps, validations and checkpoints take."""
    time, total = Time(), Budget.parse(seconds).amount
    costs = {"draw": total / 100, "validation": total / 50, "checkpoint": total / 80}
    checkpoints = Checkpoints(every=Budget("seconds", total / 4))
    run = timed(tmp_path, time, seconds, costs, checkpoints=checkpoints)
    loop.train(run)
    found = [line for line in toy.lines(tmp_path) if "loss" in line]
    used = np.array([line["seconds"] / total for line in found])
    rates = np.array([line["learning_rate"] / 0.02 for line in found])
    end = 1 - run.state.reserve / total
    late = used > 0.3  # the time that is set aside is known after the first validation
    expected = np.where(used < 0.1 * end, used / 0.1 / end, (end - used) / 0.9 / end)
    np.testing.assert_allclose(rates[late], expected[late], atol=0.02)
    assert np.corrcoef(used[late], rates[late])[0, 1] ** 2 > 0.9999
    assert rates.argmax() < 0.2 * len(rates)
    assert rates[-1] < 0.02


@pytest.mark.fault("R13")
@pytest.mark.parametrize("stop_at", [1.0, 0.4])
def test_overshoot_is_at_most_one_step_and_a_checkpoint(stop_at: float, tmp_path: Path):
    time = Time()
    costs = {"draw": 0.7, "micro": 0.1, "validation": 4.0, "checkpoint": 1.5}
    run = timed(tmp_path, time, "90s", costs, stop_at=stop_at)
    loop.train(run)
    used = time.now - 1000.0
    assert 0.9 * 90 * stop_at < used <= 90 * stop_at + 1.0 + 1.5
    assert run.state.ended == "budget"
    assert toy.lines(tmp_path)[-1]["validation_loss"] == run.state.validation["validation_loss"]
    if stop_at < 1:  # the schedule is made for all of the budget: the rate is still far from 0
        assert [line["learning_rate"] for line in toy.lines(tmp_path) if "loss" in line][-1] > 0.01


@pytest.mark.fault("R13")
@pytest.mark.parametrize("stop_at", [1.0, 0.5])
def test_the_schedule_begins_with_the_first_step(stop_at: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Trials and compiling take up to a fifth: not out of the warm-up or the average, nor beyond the budget's end."""
    time = Time()
    settings = {"stop_at": stop_at, "checkpoints": Checkpoints(average=3)}
    run = timed(tmp_path, time, f"{100 / stop_at:g}s", {"draw": 1.0}, **settings)
    monkeypatch.setattr(loop.probe, "settle", lambda run: setattr(time, "now", time.now + 20.0))
    loop.train(run)
    first, *_, last = [line for line in toy.lines(tmp_path) if "loss" in line]
    assert first["seconds"] >= 20
    assert first["progress"] < 0.02
    assert first["learning_rate"] < 0.2 * 0.02
    assert last["progress"] > 0.97 * stop_at
    assert run.state.averaged == 3
    assert 97 <= run.state.seconds <= 101


def until(draw: Any, time: Time, end: float) -> Any:
    """`draw` that dies at a time."""

    def dying(*arguments: Any) -> Any:
        if time.now > end:
            raise KeyboardInterrupt
        return draw(*arguments)

    return dying


@pytest.mark.fault("R13")
def test_charged_time_sums_to_the_budget_over_restarts(tmp_path: Path):
    """Pauses are free; what a killed process used after its last checkpoint is lost with its work."""
    charged = []
    for attempt in range(3):
        time = Time()
        time.now += 1e6 * attempt  # a long pause, and another monotonic origin
        recipe = {"checkpoints": Checkpoints(every=Budget.parse("8s"))}
        run = timed(tmp_path, time, "60s", {"draw": 1.0, "checkpoint": 0.5}, **recipe)
        if attempt < 2:
            run.draw = until(run.draw, time, time.now + 21)
            with pytest.raises(KeyboardInterrupt):
                loop.train(run)
        else:
            loop.train(run)
        charged.append(run.state.saved["seconds"])
    assert charged == sorted(charged)
    assert 58 <= charged[-1] <= 61.5
    assert 12 < charged[0] < 21 < charged[1] < 42


@pytest.mark.fault("R13")
@pytest.mark.parametrize("jump", [-7200.0, -3600.0, -1.0])
@pytest.mark.parametrize("at", [0, 80, 400])
def test_a_clock_that_jumps_only_moves_forward(at: int, jump: float, tmp_path: Path):
    """An hour back (daylight saving, a clock that was set), early, late, and at the first step."""
    time = Time()
    run = timed(tmp_path, time, "60s", {"draw": 1.0})
    inner = run.draw

    def jumping(progress: float, samples: dict[str, int], micro_batch: int) -> Any:
        if samples.get("toy", 0) == at:
            time.now += jump
        return inner(progress, samples, micro_batch)

    run.draw = jumping
    loop.train(run)
    seconds = [line["seconds"] for line in toy.lines(tmp_path)]
    assert seconds == sorted(seconds)
    assert 57 <= run.state.seconds <= 62


def test_a_checkpoint_of_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toy.go(tmp_path, toy.changed(budget=Budget.parse("3steps")))
    tensors, numbers = state.checkpoint.load(tmp_path / "checkpoints", 3)
    monkeypatch.setattr(state.checkpoint, "load", lambda *where: (tensors, numbers | {"unheard_of": 1}))
    with pytest.raises(ValueError, match=r"checkpoints in .* are of a later version of frugalbert; continue with that"):
        toy.go(tmp_path, toy.changed(budget=Budget.parse("5steps")))


@pytest.mark.parametrize("text, steps", [("7steps", 7), ("500tok", 11), ("1.5epochs", 12)])
def test_other_budgets_end_where_they_say(text: str, steps: int, tmp_path: Path):
    run = toy.go(tmp_path, toy.changed(budget=Budget.parse(text)))
    assert (run.state.step, run.state.progress) == (steps, 1.0)


def test_validation_cadence():
    """More often near the beginning and the end, nothing twice, and the same when asked in coarse steps."""
    settings = Validation(every=0.2, begin_every=0.02, begin_share=0.1, end_every=0.05, end_share=0.1)
    for size in (1000, 100):
        points, before = [], 0.0
        for index in range(1, size):
            if validation_due(settings, before, index / size):
                before = index / size
                points.append(before)
        late = 0.91 if size == 100 else 0.901  # 0.9 itself still belongs to the middle
        assert points == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.2, 0.4, 0.6, 0.8, late, 0.95])
    never = Validation(every=0.0, begin_every=0.0, end_every=0.0)
    assert not any(validation_due(never, 0.0, index / 100) for index in range(100))


def test_a_checkpoint_comes_before_the_first_step(tmp_path: Path):
    run = toy.make(tmp_path)

    def dying(progress: float, samples: dict[str, int], micro_batch: int) -> Any:
        raise KeyboardInterrupt

    run.draw = dying
    with pytest.raises(KeyboardInterrupt):
        loop.train(run)
    assert [path.name for path in run.folder.iterdir()] == ["step-00000000"]


# ---- batches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro_batch", [1, 3, 5, 8])
def test_micro_batches_equal_one_big_batch(micro_batch: int, tmp_path: Path):
    """The mean is over all counted tokens of the global batch, not a mean of means: micro-batches count unequally."""
    options: dict[str, Any] = {"dtype": torch.float64, "dropout": 0.0}
    whole = toy.go(tmp_path / "whole", micro_batch=8, **options)
    parts = toy.go(tmp_path / "parts", micro_batch=micro_batch, **options)
    for ours, theirs in zip(parts.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    losses = [[line["loss"] for line in toy.lines(tmp_path / name) if "loss" in line] for name in ("whole", "parts")]
    np.testing.assert_allclose(*losses, atol=1e-12)


@pytest.mark.fault("R10")
@pytest.mark.parametrize("times", [1, 2, 3, 4])
@pytest.mark.parametrize("where", ["forward", "backward", "step"])
def test_full_memory_halves_the_micro_batch(where: str, times: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    options: dict[str, Any] = {"dtype": torch.float64, "dropout": 0.0, "batch_size": 16, "micro_batch": 16}
    whole = toy.go(tmp_path / "whole", **options)
    run = toy.make(tmp_path / "full", **options)
    left = [times]

    def full() -> None:
        if run.state.step == 5 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")

    class FullInBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            full()
            return gradient[0]

    inner, moved = run.objective, run.optimizer.step

    def objective(model: Any, micro: Any, progress: float) -> dict[str, Tensor]:
        if where == "forward":
            full()
        loss = inner(model, micro, progress)["loss"]
        return {"loss": FullInBackward.apply(loss) if where == "backward" else loss}  # type: ignore[dict-item]

    def optimizer_step() -> None:
        if where == "step" and run.state.step == 5 and left[0]:
            run.model.words.weight.data.mul_(2.0)  # half done
        if where == "step":
            full()
        moved()

    run.objective, run.optimizer.step = objective, optimizer_step  # type: ignore[method-assign]
    loop.train(run)
    assert run.state.micro_batch == 16 >> times
    assert not left[0]
    for ours, theirs in zip(run.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


@pytest.mark.fault("R10")
def test_full_memory_in_a_step_whose_gradients_are_unscaled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = toy.make(tmp_path, batch_size=16, micro_batch=16)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    moved, left = run.optimizer.step, [1]

    def optimizer_step() -> None:
        if run.state.step == 5 and left:
            raise torch.OutOfMemoryError("CUDA out of memory", left.pop())
        moved()

    run.optimizer.step = optimizer_step  # type: ignore[method-assign]
    loop.train(run)
    assert (run.state.micro_batch, run.state.ended, run.scaler.get_scale()) == (8, "budget", 8.0)


@pytest.mark.fault("R10")
def test_full_memory_in_the_step_of_one_rank_ends_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The others have moved their weights: halving here would leave the ranks with different ones."""
    run = toy.make(tmp_path, micro_batch=8)

    def optimizer_step() -> None:
        monkeypatch.setattr(step.dist, "world", lambda: 2)
        raise RuntimeError("Triton Error [CUDA]: out of memory")

    run.optimizer.step = optimizer_step  # type: ignore[method-assign]
    with pytest.raises(ValueError, match=r"rank 0: memory is full .*; set machine.micro_batch: 4"):
        loop.train(run)


@pytest.mark.fault("R10")
def test_memory_that_never_suffices_is_one_sentence(tmp_path: Path):
    run = toy.make(tmp_path, micro_batch=8)

    def objective(model: Any, micro: Any, progress: float) -> dict[str, Tensor]:
        raise torch.OutOfMemoryError("CUDA out of memory")

    run.objective, run.trial = objective, True
    with pytest.raises(ValueError, match="memory is full even with one sequence"):
        loop.train(run)
    run.objective = lambda model, micro, progress: [][0]
    with pytest.raises(IndexError):  # other failures stay what they are
        loop.train(run)


def test_a_smaller_micro_batch_is_remembered(tmp_path: Path):
    run = toy.make(tmp_path, toy.changed(budget=Budget.parse("3steps")), micro_batch=8)
    run.micro_batch_fixed = False
    inner, failed = run.objective, []

    def objective(model: Any, micro: Any, progress: float) -> dict[str, Tensor]:
        if not failed:
            failed.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(model, micro, progress)

    run.objective = objective
    loop.train(run)
    for fixed, expected in ((False, 4), (True, 8)):
        again = toy.make(tmp_path, micro_batch=8)
        again.micro_batch_fixed = fixed
        loop.train(again)
        assert again.state.micro_batch == expected


# ---- what is not finite ----------------------------------------------------------------------------------------------


def poison(run: state.Run, what: str, value: float, attempts: range) -> None:
    """Make the loss, a gradient or a weight of the given batches `value`."""
    inner = run.objective

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return gradient[0] * value

    def objective(model: Any, micro: Any, progress: float) -> dict[str, Tensor]:
        bad = run.state.attempt in attempts
        if bad and what == "weight":
            run.model.norm.weight.data[0] = value
        loss = inner(model, micro, progress)["loss"]
        if bad and what == "loss":
            loss = loss * value
        return {"loss": Gradient.apply(loss) if bad and what == "gradient" else loss}  # type: ignore[dict-item]

    run.objective = objective


@pytest.mark.fault("R9")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("at", [0, 9, 19])
@pytest.mark.parametrize("what", ["loss", "gradient", "weight"])
def test_nothing_that_is_not_finite_is_saved(
    what: str, at: int, value: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    run = toy.make(tmp_path)
    poison(run, what, value, range(at, at + 1))
    loop.train(run)
    assert run.state.step == 20
    assert all(parameter.isfinite().all() for parameter in run.model.parameters())
    events = [line["event"] for line in toy.lines(tmp_path) if "event" in line]
    assert any("nan" in event or "inf" in event for event in events)
    assert "nan" in capsys.readouterr().err or value == math.inf
    for path in run.folder.iterdir():
        tensors, _ = state.checkpoint.load(run.folder, int(path.name[5:]))
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert (what == "weight") == (run.state.restores == 1)  # only poisoned weights need the checkpoint


@pytest.mark.fault("R9")
def test_policies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(step, "SKIPS_BEFORE_END", 40)
    stopping = toy.make(tmp_path / "stop", toy.changed(non_finite="stop"))
    poison(stopping, "loss", math.nan, range(7, 8))
    with pytest.raises(ValueError, match=r"at step 7: loss nan.*lower stop\.learning_rate") as error:
        loop.train(stopping)
    assert "\n" not in str(error.value)
    skipping = toy.make(tmp_path / "skip", toy.changed(non_finite="skip"))
    poison(skipping, "gradient", math.nan, range(3, 30))
    loop.train(skipping)
    assert (skipping.state.step, skipping.state.attempt, skipping.state.restores) == (20, 47, 0)
    restoring = toy.make(tmp_path / "restore")
    poison(restoring, "gradient", math.nan, range(9, 19))  # ten batches from step 9: back to step 8
    loop.train(restoring)
    assert (restoring.state.step, restoring.state.attempt, restoring.state.restores) == (20, 31, 1)
    steps = [line["step"] for line in toy.lines(tmp_path / "restore") if "loss" in line]
    assert steps == list(range(1, 21))  # what was taken back has left the metrics too
    hopeless = toy.make(tmp_path / "hopeless")
    poison(hopeless, "loss", math.nan, range(9, 1000))
    with pytest.raises(ValueError, match="10 batches in a row had loss nan"):
        loop.train(hopeless)
    assert hopeless.state.restores == step.RESTORES
    never = toy.make(tmp_path / "never", toy.changed(non_finite="skip"))
    poison(never, "loss", math.nan, range(9, 5000))
    with pytest.raises(ValueError, match="cannot go on"):
        loop.train(never)


@pytest.mark.fault("R9")
def test_weights_that_are_not_finite_to_begin_with(tmp_path: Path):
    run = toy.make(tmp_path)
    run.model.norm.weight.data[0] = math.nan
    with pytest.raises(ValueError, match="weights to start from are not finite"):
        loop.train(run)


@pytest.mark.fault("R9")
def test_a_jump_of_the_loss_is_noticed_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = toy.make(tmp_path, learning_rate=1e-4)
    inner = run.objective
    run.objective = lambda model, micro, progress: {
        "loss": inner(model, micro, progress)["loss"] * (10.0 if run.state.attempt == 12 else 1.0)
    }
    loop.train(run)
    events = [line for line in toy.lines(tmp_path) if "event" in line]
    assert [line["step"] for line in events] == [13]
    assert "the loss jumped" in capsys.readouterr().err


def test_fp16_overflow_advances_nothing(tmp_path: Path):
    """The loss scale halves and the same batch is tried again; counters, data and schedule stand still."""
    run = toy.make(tmp_path, precision="fp16", dropout=0.0)
    seen: list[tuple[int, int, int]] = []
    inner_draw = run.draw

    def draw(progress: float, samples: dict[str, int], micro_batch: int) -> Any:
        assert run.scaler is not None
        seen.append((run.state.step, samples.get("toy", 0), int(run.scaler.get_scale())))
        return inner_draw(progress, samples, micro_batch)

    class Overflow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Tensor) -> Tensor:
            return torch.where(gradient[0].abs() > 20000.0, math.inf, gradient[0])

    inner = run.objective
    run.draw = draw
    run.objective = lambda model, micro, progress: {"loss": Overflow.apply(inner(model, micro, progress)["loss"])}
    loop.train(run)
    assert seen[:4] == [(0, 0, 65536), (0, 0, 32768), (0, 0, 16384), (1, 8, 16384)]
    assert (run.state.step, run.state.attempt, run.state.samples) == (20, 20, {"toy": 160})
    assert [line["step"] for line in toy.lines(tmp_path) if "loss" in line] == list(range(1, 21))
    assert not [line for line in toy.lines(tmp_path) if "event" in line]
    again = toy.make(tmp_path, precision="fp16")
    state.resume(again)
    assert again.scaler is not None
    assert again.scaler.get_scale() == 16384.0


# ---- early stop, averages --------------------------------------------------------------------------------------------


def test_early_stop(tmp_path: Path):
    stop = EarlyStop(after=Budget.parse("8steps"), loss=1.0)
    run = toy.go(tmp_path / "high", toy.changed(early_stop=stop))
    assert run.state.step == 8  # judged by the latest validation, of step 5
    assert "above 1 after 8steps" in run.state.ended
    fine = EarlyStop(after=Budget.parse("8steps"), loss=100.0)
    assert toy.go(tmp_path / "low", toy.changed(early_stop=fine)).state.ended == "budget"
    diverged = toy.make(tmp_path / "nan", toy.changed(early_stop=fine))
    diverged.validate = lambda pause: {"validation_loss": math.nan}
    loop.train(diverged)
    assert "validation loss is nan" in diverged.state.ended
    assert diverged.state.step == 5
    assert '"validation_loss": "nan"' in (tmp_path / "nan" / "metrics.jsonl").read_text()


def test_early_stop_when_the_loss_scale_is_stuck(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loop, "SCALE_STUCK", 5)
    stop = EarlyStop(after=Budget.parse("1000steps"), loss=100.0)
    run = toy.make(tmp_path, toy.changed(early_stop=stop), precision="fp16")
    run.scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=10_000)
    loop.train(run)
    assert "loss scale" in run.state.ended
    assert run.state.step == 5


@pytest.mark.parametrize("better", [True, False])
def test_the_average_is_kept_only_if_it_is_better(better: bool, tmp_path: Path):
    checkpoints = Checkpoints(every=Budget.parse("1000steps"), average=3)
    run = toy.make(tmp_path, toy.changed(budget=Budget.parse("60steps"), checkpoints=checkpoints))
    seen: dict[int, list[Tensor]] = {}
    validate, inner = run.validate, run.draw
    calls: list[float] = []

    def judged(pause: Any) -> dict[str, float]:
        assert validate is not None
        calls.append((0.5 if better else 2.0) if run.state.ended else 1.0)
        return {"validation_loss": calls[-1]}

    def draw(progress: float, samples: dict[str, int], micro_batch: int) -> Any:
        seen[run.state.step] = [parameter.detach().clone() for parameter in run.model.parameters()]
        return inner(progress, samples, micro_batch)

    run.validate, run.draw = judged, draw
    last: list[list[Tensor]] = []
    taken = loop._take_average

    def take(run: state.Run) -> None:
        last.append([parameter.detach().clone() for parameter in run.model.parameters()])
        taken(run)

    loop._take_average = take
    try:
        loop.train(run)
    finally:
        loop._take_average = taken
    snapshots = [seen[56], seen[58], last[0]]  # progress 0.9 + 0.1 (i + 1) / 3
    expected = [torch.stack(group).mean(0) for group in zip(*snapshots, strict=True)] if better else last[0]
    for ours, theirs in zip(run.model.parameters(), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert run.state.averaged == 3


def test_it_learns(tmp_path: Path):
    """One batch, again and again: the loss goes to nothing, with every optimizer."""
    quiet = Validation(every=0, begin_every=0, end_every=0)
    recipe = toy.changed(budget=Budget.parse("150steps"), validation=quiet)
    for name, learning_rate, options in (
        ("adamw", 0.05, {}),
        ("muon", 0.05, {}),
        ("lamb", 0.3, {"maximum_ratio": 10.0}),
    ):
        run = toy.make(tmp_path / name, recipe, dropout=0.0)
        run.optimizer = make_optimizer(run.model, OptimizerSettings(name, learning_rate, options=options))
        inner = run.draw
        run.draw = lambda progress, samples, micro_batch, inner=inner: inner(progress, {}, micro_batch)
        loop.train(run)
        assert [line["loss"] for line in toy.lines(tmp_path / name) if "loss" in line][-1] < 0.05, name
