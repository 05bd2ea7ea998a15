"""Phases of a budget: lengths, batches and schedules of their own; a run through one is continued bit for bit."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from frugalbert.config import Phase
from frugalbert.train import assemble, loop
from frugalbert.train.batches import Sampler
from frugalbert.train.phases import at, per_token, spans, tokens_per_step
from tests.train import small_run, toy

TWO = [
    {"length": 64, "share": 0.4, "learning_rate": 2e-3, "warmup": 0.2, "batch_size": 6, "max_predictions": 3},
]


def section(**values: Any) -> Any:
    return small_run.section(**values)


def test_the_parts_of_a_budget():
    found = spans(section(batch_size=9, phases=[{"length": 256, "share": 0.2}, {"length": 512, "share": 0.1}]), 128)
    assert [at(found, p).length for p in (0.0, 0.69, 0.7, 0.89, 0.9, 1.0)] == [128, 128, 256, 256, 512, 512]
    assert [part.rows for part in found] == [9, 4, 2], "as many tokens"
    assert {(part.schedule, part.begin, part.finish, part.peak) for part in found} == {(0, 0.0, 1.0, 1.0)}
    own = spans(section(phases=[{"length": 64, "share": 0.5, "batch_size": 3}, {"length": 32, "share": 0.25}]), 32)
    assert [part.rows for part in own] == [8, 3, 6], "as many tokens as the phase before"
    assert tokens_per_step(own, "steps") == pytest.approx(0.25 * 8 * 32 + 0.5 * 3 * 64 + 0.25 * 6 * 32)
    steps = 0.25 / (8 * 32) + 0.5 / (3 * 64) + 0.25 / (6 * 32)  # for each token of the budget
    assert tokens_per_step(own, "tokens") == tokens_per_step(own, "seconds") == pytest.approx(1 / steps)
    assert per_token(own, lambda part: part.length) == pytest.approx((64 * 32 + 96 * 64 + 48 * 32) / (64 + 96 + 48))


def test_a_batch_that_grows():
    """Each doubling begins where the straight line passes it; rates go with the square root; phases come after it."""
    values = section(
        batch_size=48, batch_ramp={"start": 8, "share": 0.5}, warmup=0.0, curve="constant", budget="100steps",
        phases=[{"length": 64, "share": 0.2}],
    )  # fmt: skip
    found = spans(values, 32)
    assert [part.rows for part in found] == [8, 16, 32, 48, 24]
    assert [part.start for part in found] == pytest.approx([0.0, 0.5 * 8 / 40, 0.5 * 24 / 40, 0.5, 0.8])
    assert [low.end for low in found[:-1]] == pytest.approx([high.start for high in found[1:]])
    assert {(part.schedule, part.begin, part.finish) for part in found} == {(0, 0.0, 1.0)}
    recipe = assemble.make_recipe(values, Path())
    assert [recipe.rate(part.start) for part in found] == pytest.approx(
        [math.sqrt(n / 48) for n in (8, 16, 32, 48, 48)]
    )


def test_a_growing_batch_uses_every_row_once(tmp_path: Path):
    """The rows of the steps follow each other, whatever their number, and a step is its batch's rows."""
    inputs = small_run.prepare(tmp_path)
    values = small_run.section(batch_size=12, batch_ramp={"start": 3, "share": 0.6}, budget="20steps")
    rows = assemble.Rows.open(values, inputs["shards"], inputs["tokenizer"], torch.device("cpu"))
    samples: dict[str, int] = {}
    sizes = []
    for step in range(20):
        drawn = rows.sampler.draw(step / 20, samples, 4)
        before, samples = sum(samples.values()), drawn.samples
        sizes.append(sum(len(micro.batch.input_ids) for micro in drawn.micros))
        assert sum(samples.values()) - before == sizes[-1]
    assert sizes == [3] * 4 + [6] * 8 + [12] * 8


def test_a_schedule_of_its_own():
    """p counts from where the phase begins; what has no rate of its own goes on with the schedule before it."""
    phases = [{"length": 64, "share": 0.3, "learning_rate": 1e-2, "warmup": 0.5}, {"length": 32, "share": 0.2}]
    values = section(phases=phases, warmup=0.1, curve="poly", learning_rate=5e-3, budget="100steps")
    recipe = assemble.make_recipe(values, Path())
    rates = {step: recipe.rate(step / 100) for step in (0, 4, 5, 49, 50, 60, 75, 90, 99)}
    second = {step: (step / 100 - 0.5) / 0.5 for step in rates}
    assert rates == pytest.approx({
        0: 0.0, 4: 0.08 / 0.1, 5: math.sqrt(1 - 0.1), 49: math.sqrt(1 - 0.98), 50: 0.0, 60: 2 * second[60] / 0.5,
        75: 2 * math.sqrt(0.5), 90: 2 * math.sqrt(1 - second[90]), 99: 2 * math.sqrt(1 - second[99]),
    }, abs=1e-7)  # fmt: skip
    assert [recipe.schedule(step / 100) for step in (0, 49, 50, 99)] == [0, 0, 1, 1]
    plain = assemble.make_recipe(section(phases=[{"length": 64, "share": 0.3}], warmup=0.1), Path())
    assert [plain.rate(p) for p in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert plain.schedule(0.99) == 0


@pytest.mark.parametrize("name", ["lamb", "adamw"])
def test_through_the_change_of_phase_as_if_nothing_had_happened(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
):
    """Killed before, at and after it; the optimizer's steps begin anew once, in whichever process is there."""
    recipe = assemble.make_recipe(section(phases=TWO, budget="20steps", learning_rate=1e-3), Path())
    recipe = toy.changed(rate=recipe.rate, schedule=recipe.schedule)
    whole = toy.go(tmp_path / "whole", recipe, name=name)
    counts = {int(state["step"]) for state in whole.optimizer.state.values()}
    assert counts == {8}, "steps of the second phase"
    plain = toy.go(tmp_path / "plain", toy.changed(rate=recipe.rate), name=name)
    assert toy.result(plain) != toy.result(whole), "the bias correction begins anew"
    original = loop.take_step
    for last in (11, 12, 13, 16):

        def dying(run: Any, last: int = last) -> None:
            if run.state.step == last:
                raise KeyboardInterrupt
            original(run)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(loop, "take_step", dying)
            toy.go(tmp_path / str(last), recipe, name=name)
        assert toy.result(toy.go(tmp_path / str(last), recipe, name=name)) == toy.result(whole), last


def test_the_stage_changes_length_batch_and_masks(tmp_path: Path):
    inputs = small_run.prepare(tmp_path, lengths=(32, 64))
    values = {"phases": TWO, "warmup": 0.3, "mask": {"rate": 0.15, "max_predictions": 2}, "curve": "poly"}
    small_run.run(inputs, tmp_path / "run", **values)
    lines = [line for line in toy.lines(tmp_path / "run") if "loss" in line]
    assert [line["length"] for line in lines] == [32.0] * 12 + [64.0] * 8
    rates = [line["learning_rate"] for line in lines]
    expected = [5e-3 * (step / 12 / 0.3 if step < 4 else math.sqrt(1 - step / 12)) for step in range(12)]
    expected += [2e-3 * (step / 8 / 0.2 if step < 2 else math.sqrt(1 - step / 8)) for step in range(8)]
    assert rates == pytest.approx(expected, abs=1e-8)
    state = (tmp_path / "run" / "checkpoints" / "step-00000020" / "state.json").read_text()
    assert '"64": 48' in state, "eight batches of six"
    sampler = _sampler(inputs, values)
    for progress, rows, slots in ((0.5, 8, 2), (0.7, 6, 3)):
        drawn = sampler.draw(progress, {}, 100).micros[0].batch
        assert (len(drawn.input_ids), len(drawn.labels)) == (rows, rows * slots)


def _sampler(inputs: dict[str, Path], values: dict[str, Any]) -> Sampler:
    from tests.train.test_pretrain import sampler_of

    return sampler_of(inputs, **values)


def test_a_warm_up_needs_a_rate():
    with pytest.raises(ValueError, match="add learning_rate to the phase"):
        Phase(length=64, share=0.1, warmup=0.1)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"batch_ramp": {"start": 8}}, "batch_ramp.start must be below batch_size 8, to which it grows"),
        ({"batch_ramp": {"start": 4, "share": 0.9}, "phases": TWO}, "batch_ramp.share reaches into the phases; lower"),
    ],
)
def test_ramps_that_are_none(values: dict[str, Any], sentence: str):
    with pytest.raises(ValueError, match=sentence):
        section(batch_size=8, **values)
