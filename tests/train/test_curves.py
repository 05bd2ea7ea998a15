"""Curves against closed forms, and the schedule's identities at every length of budget."""

from __future__ import annotations

import math
import random

import pytest

from frugalbert.budget import Budget, progress
from frugalbert.train.curves import CURVES, curve, rate

BUDGETS = ("30s", "10m", "1h", "24h", "9d")
SETTINGS = {
    "piecewise_constant": {"points": (0.5, 0.8), "factors": (0.5, 0.1)},
    "piecewise_inverse_time": {"points": (0.0, 0.5), "a": (2.0, 4.0), "b": (1.0, 2.0)},
}


@pytest.mark.parametrize("text", BUDGETS)
@pytest.mark.parametrize("name", ["linear", "cosine", "wsd", "poly_remain_time"])
def test_schedule_of_any_length_rises_and_falls_without_a_jump(text: str, name: str):
    """24hBERT's code divides by max(1 hour, T - W): for 30 s its rate falls to 2 % right after warm-up."""
    budget, shape, warmup = Budget.parse(text), curve(name), 0.06

    def at(seconds: float) -> float:
        return rate(progress(budget, seconds=seconds, tokens=0, steps=0, epochs=0.0), warmup, shape)

    total = budget.amount
    assert at(0.0) == 0.0
    assert at(warmup * total) == pytest.approx(1.0, abs=1e-12)
    assert at(warmup * total * (1 - 1e-9)) == pytest.approx(at(warmup * total * (1 + 1e-9)), abs=1e-6)
    assert at(total) == pytest.approx(0.0, abs=1e-12)
    values = [at(total * (warmup + (1 - warmup) * i / 200)) for i in range(201)]
    assert all(after <= before + 1e-12 for before, after in zip(values, values[1:], strict=False))
    assert max(abs(a - b) for a, b in zip(values, values[1:], strict=False)) < 0.2  # 1 - sqrt begins steeply
    if name == "linear":
        assert [at(f * total) for f in (0.1, 0.5, 0.9)] == pytest.approx([(1 - f) / 0.94 for f in (0.1, 0.5, 0.9)])


def test_elastic_step_breaks_where_the_paper_says():
    """ExtremeBERT: parts K cover [1 - a^K, 1 - a^(K+1)); with r = 1.4142, cr_k = 6 the rate falls from 87.5 % on."""
    breaks = [0.2929, 0.5, 0.6464, 0.75, 0.8232, 0.875]
    halves = curve("elastic_step", {"shrink": math.sqrt(2.0), "start": 2.0})
    for part, point in enumerate(breaks, start=1):
        assert halves(point - 2e-4) == pytest.approx(math.sqrt(0.5) ** max(0, part - 1 - 1))
        assert halves(point + 2e-4) == pytest.approx(math.sqrt(0.5) ** max(0, part - 1))
    shape = curve("elastic_step")
    points = (0.87, 0.88, 0.911, 0.913, 0.9375, 0.957, 0.97, 0.979, 1.0)
    powers = (0, 1, 1, 2, 3, 4, 5, 6)
    assert [shape(x) for x in points] == pytest.approx([*(math.sqrt(0.5) ** power for power in powers), 0.0])


def test_closed_forms():
    assert [curve("wsd", {"cooldown": 0.25})(x) for x in (0.0, 0.75, 0.8125, 1.0)] == pytest.approx([1, 1, 0.5, 0])
    assert [curve("exp", {"decay_rate": 0.5, "decay_step": 0.25})(x) for x in (0, 0.25, 1)] == [1, 0.5, 1 / 16]
    assert [curve("inverse_time", {"decay": 9.0})(x) for x in (0, 1)] == pytest.approx([1, 0.1])
    steps = curve("step_decay", {"intervals": 4, "decay_rate": 10.0})
    assert [steps(x) for x in (0, 0.24, 0.25, 0.99)] == pytest.approx([1, 1, 0.1, 1e-3])
    assert [curve("poly_remain_time", {"power": 2.0})(x) for x in (0, 0.5, 1)] == [1, 0.25, 0]
    pieces = curve("piecewise_constant", SETTINGS["piecewise_constant"])
    assert [pieces(x) for x in (0, 0.499, 0.5, 0.79, 0.8, 1.0)] == [1, 1, 0.5, 0.5, 0.1, 0.1]
    pieces = curve("piecewise_inverse_time", SETTINGS["piecewise_inverse_time"])
    assert [pieces(x) for x in (0, 0.25, 0.5, 1.0)] == pytest.approx([1, 1 / 1.5, 0.5, 0.25])
    ending = curve("piecewise_inverse_time", {**SETTINGS["piecewise_inverse_time"], "minimum": 0.1})
    assert [ending(0.0), ending(1.0)] == pytest.approx([1.0, 0.1])
    assert ending(0.5) == pytest.approx(0.1 + (0.5 - 0.25) * 0.9 / 0.75)
    restarted = curve("cosine", {"first": 0.25, "growth": 2.0, "minimum": 0.2, "power": 2.0})
    expected = [1.0, 0.6**2, 1.0, (0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4))) ** 2]
    assert [restarted(x) for x in (0.0, 0.125, 0.25, 0.375)] == pytest.approx(expected)


def test_eigencurve_ends_where_it_should_and_follows_its_definition():
    steps, alpha, kappa = 1000.0, 2.0, 100.0
    raw = []
    for x in (0.0, 0.3, 1.0):
        tail = kappa ** ((1 - alpha) / 2)
        f = (alpha - 1) / (alpha - 3) * ((1 - x * (1 - tail)) ** (1 - 2 / (alpha - 1)) - 1) / (tail - 1)
        raw.append(1 / (1 + steps * f / kappa))
    shape = curve("eigencurve", {"steps": steps, "alpha": alpha, "kappa": kappa, "minimum": 0.05})
    assert shape(0.0) == pytest.approx(1.0)
    assert shape(1.0) == pytest.approx(0.05)
    assert shape(0.3) == pytest.approx(0.05 + (raw[1] - raw[2]) * 0.95 / (raw[0] - raw[2]))


@pytest.mark.parametrize("name", list(CURVES))
def test_curves_keep_no_memory(name: str):
    """The reference cosine counts its calls and breaks on resume; ours give the same in any order."""
    options = SETTINGS.get(name, {})
    points = [i / 97 for i in range(98)]
    in_order = curve(name, options)
    expected = {x: in_order(x) for x in points}
    shuffled = points * 2
    random.Random(0).shuffle(shuffled)
    shape = curve(name, options)
    assert all(shape(x) == expected[x] for x in shuffled)
    assert all(0.0 <= value <= 1.0 + 1e-12 for value in expected.values())


def test_common_modifiers():
    late = curve("linear", {"activation_point": 0.5})
    assert [late(x) for x in (0.0, 0.5, 0.75)] == pytest.approx([1.0, 1.0, 0.75])
    again = curve("linear", {"restarting_points": (0.5, 0.8)})
    assert [again(x) for x in (0.4, 0.5, 0.7, 0.9)] == pytest.approx([0.6, 1.0, 0.8, 0.9])
    both = curve("linear", {"restarting_points": 0.5, "activation_point": 0.1})
    assert [both(x) for x in (0.1, 0.5, 0.6)] == pytest.approx([1.0, 0.6, 1.0])


def test_warmup():
    assert [rate(p, 0.2, curve("linear")) for p in (0.0, 0.1, 0.2, 0.6)] == pytest.approx([0, 0.5, 1, 0.5])
    assert rate(0.1, 0.2, curve("exp"), warmup_power=2.0) == pytest.approx(0.25)
    assert rate(0.0, 0.0, curve("linear")) == 1.0


@pytest.mark.parametrize(
    "name, options, sentence",
    [
        ("linaer", {}, "did you mean linear"),
        ("spiral", {}, "write one of linear"),
        ("wsd", {"coldown": 0.5}, "there is no setting coldown; did you mean cooldown"),
        ("wsd", {"cooldown": 0.0}, "above 0"),
        ("linear", {"slope": 1.0}, "it has no settings"),
        ("piecewise_constant", {}, "points must be set"),
        ("piecewise_constant", {"points": (0.5, 0.2), "factors": (1.0, 1.0)}, "rising"),
        ("piecewise_constant", {"points": (0.5,), "factors": (1.0, 1.0)}, "1 points need as many factors, not 2"),
        ("eigencurve", {"alpha": 3.0}, "other than 1 and 3"),
        ("elastic_step", {"shrink": 1.0}, "shrink > 1"),
    ],
)
def test_wrong_settings_get_a_sentence(name: str, options: dict[str, object], sentence: str):
    with pytest.raises(ValueError, match=r"pretrain\.curve") as error:
        curve(name, options)
    assert sentence in str(error.value)
