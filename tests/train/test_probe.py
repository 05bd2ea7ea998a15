"""What is measured before the first step: the fastest is taken, remembered, and changes nothing but the speed."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from frugalbert.budget import Budget
from frugalbert.train import loop, probe
from frugalbert.train.state import Run
from tests.train import small_run, toy
from tests.train.test_ranks import launch

LONG = toy.changed(budget=Budget.parse("12steps"))


def trying(folder: Path, *free: str) -> Run:
    run = toy.make(folder, LONG, micro_batch=8, batch_size=16)
    run.free, run.largest_micro_batch, run.micro_batch_fixed = frozenset(free), 16, False
    run.state.micro_batch = 8
    return run


def table(monkeypatch: pytest.MonkeyPatch, seconds: dict[Any, float]) -> list[Any]:
    """Replaces the stop-watch: by (precision, micro-batch, compiled), 1 second if it is not listed."""
    asked: list[Any] = []

    def step_seconds(run: Run, micro_batch: int, passes: int = 3) -> float:
        asked.append((run.precision, micro_batch, run.compiled))
        return seconds.get(asked[-1], 1.0) if passes else 1e4

    monkeypatch.setattr(probe, "_step_seconds", step_seconds)
    return asked


def test_the_fastest_is_taken_and_kept_by_a_run_that_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    table(monkeypatch, {("fp32", 8, False): 0.5, ("fp32", 2, False): 0.6, ("fp32", 4, False): 0.7})
    run = trying(tmp_path, "precision", "micro_batch")
    run.precision = "bf16"
    original = loop.take_step

    def dying(run: Run) -> None:
        if run.state.step == 5:
            raise KeyboardInterrupt
        original(run)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop, "take_step", dying)
        loop.train(run)
    assert (run.precision, run.state.micro_batch) == ("fp32", 8)
    said = capsys.readouterr().err
    assert "precision fp32 (a step's passes: bf16 1,000 ms, fp32 500 ms); micro-batch 8 (" in said
    asked = table(monkeypatch, {("bf16", 1, False): 0.1, ("fp32", 1, False): 0.1})  # another machine, it seems
    again = trying(tmp_path, "precision", "micro_batch")
    again.precision = "bf16"
    loop.train(again)
    assert (again.precision, again.state.micro_batch, asked) == ("fp32", 8, [])


def test_a_little_faster_is_not_enough_and_what_does_not_fit_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    table(monkeypatch, {("fp32", 8, False): math.inf, ("fp32", 4, False): 1.0, ("fp32", 2, False): 0.98})
    run = trying(tmp_path, "micro_batch")
    probe.settle(run)
    assert run.state.micro_batch == 4, "8 is infinite, 2 less than 3 % faster than 4"
    assert run.state.settled == {"precision": "fp32", "compiled": False}


def test_a_validation_is_fitted_into_memory_like_a_step(tmp_path: Path):
    """By its first piece: one that needs more than the step would end the run hours later."""
    run, pieces = trying(tmp_path, "micro_batch"), []

    def validate(pause: Callable[[], None]) -> dict[str, float]:
        for _ in range(3):
            pause()
            if run.state.micro_batch > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            pieces.append(run.state.micro_batch)
        return {"validation_loss": 1.0}

    run.trial, run.validate = True, validate
    probe._fit(run)
    assert (run.state.micro_batch, pieces) == (2, [2])
    assert run.state.validation == {}


def test_a_disturbed_stop_watch_must_err_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """bf16 looks slow once, when something else ran; the second time it does not."""
    for answers, expected in (([3.0, 2.0, 1.0, 2.0], "bf16"), ([3.0, 2.0, 3.0, 2.0], "fp32"), ([1.0, 2.0], "bf16")):
        left = iter(answers)
        monkeypatch.setattr(probe, "_step_seconds", lambda *_, left=left: next(left))
        run = trying(tmp_path, "precision")
        probe._precision(run)
        assert run.precision == expected
        assert next(left, None) is None


def test_short_trainings_try_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked = table(monkeypatch, {})
    monkeypatch.setattr(probe, "_left", lambda run: 59.0)
    run = trying(tmp_path, "micro_batch", "precision", "compile")
    loop.train(run)
    assert (asked, run.state.micro_batch, run.compiled) == ([], 8, False)


def test_a_run_under_way_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also one whose checkpoint does not say what was settled."""
    asked = table(monkeypatch, {})
    run = trying(tmp_path, "micro_batch", "precision")
    run.state.step = 5
    probe.settle(run)
    assert (asked, run.precision, run.state.micro_batch) == ([], "fp32", 8)


def test_trying_changes_nothing_but_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "WORTH_SECONDS", 0.0)
    monkeypatch.setattr(probe, "MOST", 1e9)
    run = trying(tmp_path / "tried", "micro_batch")
    loop.train(run)
    fixed = toy.make(tmp_path / "fixed", LONG, micro_batch=run.state.micro_batch, batch_size=16)
    loop.train(fixed)
    for mine, theirs in zip(run.model.parameters(), fixed.model.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert run.state.costs["probe"] > 0.0


@pytest.mark.parametrize("faster", [True, False])
def test_compiled_only_if_that_is_faster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faster: bool):
    table(monkeypatch, {("fp32", 8, True): 0.5 if faster else 1.0})
    run = trying(tmp_path, "compile")
    run.blocks = [run.model]
    block_compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: block_compile(self, backend="eager"))
    probe.settle(run)
    assert run.compiled == run.state.settled["compiled"] == faster
    assert (run.model._compiled_call_impl is not None) == faster


def test_without_a_compiler_it_stays_eager_and_says_why_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from torch._inductor import config

    inputs = small_run.prepare(tmp_path)
    plain = small_run.run(inputs, tmp_path / "plain" / "pretrain", {"compile": False}, budget="3steps")
    with config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        found = small_run.run(inputs, tmp_path / "failed" / "pretrain", {"compile": True}, budget="3steps")
    said = capsys.readouterr().err
    assert said.count("torch.compile does not work here and is left out: ") == 1
    assert found["final_validation_loss"] == plain["final_validation_loss"]
    torch._dynamo.reset()


def test_a_compiler_that_fails_at_a_later_length_is_left_out(tmp_path: Path, monkeypatch, capsys):
    """The rows of the second phase are longer: their graphs are other ones."""
    inputs = small_run.prepare(tmp_path, lengths=(32, 64))
    phases = [{"length": 64, "share": 0.4}]

    def backend(graph: torch.fx.GraphModule, given: list[torch.Tensor]) -> Any:
        if any(x.requires_grad and x.shape[1:] == (64, 32) for x in given if isinstance(x, torch.Tensor)):
            raise RuntimeError("no registers are left")
        return graph.forward

    inductor = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **_: inductor(self, backend=backend, dynamic=False))
    plain, found = (
        small_run.run(inputs, tmp_path / str(wanted) / "pretrain", {"compile": wanted}, phases=phases)
        for wanted in (False, True)
    )
    said = capsys.readouterr().err
    assert said.count("torch.compile does not work here and is left out: ") == 1
    assert "no registers are left" in said
    # Traced, the first phase may round once otherwise; a step lost or taken twice would show in the third digit.
    assert found["final_validation_loss"] == pytest.approx(plain["final_validation_loss"], rel=1e-6)
    assert '"compiled": false' in next((tmp_path / "True").rglob("step-00000020/state.json")).read_text()
    torch._dynamo.reset()


@pytest.mark.parametrize(("budget", "seconds"), [("100steps", 200.0), ("600tok", 25.0), ("10epochs", 40.0)])
def test_how_much_follows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget: str, seconds: float):
    """From one step's rows, tokens and epochs, at two seconds a step."""
    run = toy.make(tmp_path, toy.changed(budget=Budget.parse(budget)), batch_size=16)
    run.state.micro_batch = 8
    monkeypatch.setattr(probe, "_step_seconds", lambda *_, passes: 2.0)
    drawn = run.draw(0.0, {}, 16)
    expected = {"100steps": 200.0, "600tok": 1200 / float(drawn.tokens), "10epochs": 20 / drawn.epochs}[budget]
    assert probe._left(run) == pytest.approx(expected)
    run.recipe = toy.changed(budget=Budget.parse("300s"))
    run.state.seconds = 100.0
    assert probe._left(run) == pytest.approx(200.0)


BOTH = """
import json, sys
from pathlib import Path
from frugalbert.train import probe
from tests.train import small_run
probe.WORTH_SECONDS, probe.MOST = 0.0, 1e9
place, out = map(Path, sys.argv[1:])
read = {name: place / name for name in ("shards", "tokenizer")} | {"yaml": place}
small_run.run(read, out, {"micro_batch": "auto", "compile": False}, batch_size=8, budget="4steps")
"""


def test_two_ranks_agree_and_train_as_one(tmp_path: Path):
    """Each has a stop-watch of its own; the weights are those of one process, whatever they chose."""
    inputs = small_run.prepare(tmp_path)
    one = small_run.run(inputs, tmp_path / "one" / "pretrain", batch_size=8, budget="4steps", precision="fp32")
    command = [sys.executable, "-c", BOTH, str(tmp_path), str(tmp_path / "two" / "pretrain")]
    launch(tmp_path, 2, command=command)
    two = json.loads((tmp_path / "two" / "pretrain" / "summary.json").read_text())
    assert two["cost_seconds"]["probe"] > 0.0
    assert two["ranks"] == 2
    assert two["final_validation_loss"] == pytest.approx(one["final_validation_loss"], rel=1e-2)
