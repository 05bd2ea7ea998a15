"""Budgets and the clock: every form reads and writes back, nothing else is accepted, progress is a share."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.budget import COUNTS, SECONDS, Budget, Clock, progress

CALM = settings(derandomize=True, deadline=None, max_examples=100)


@pytest.mark.parametrize(
    "text, kind, amount",
    [
        ("24h", "seconds", 86400), ("90m", "seconds", 5400), ("30s", "seconds", 30), ("9d", "seconds", 777600),
        ("1.5h", "seconds", 5400), ("2e9tok", "tokens", 2e9), ("2e9 tokens", "tokens", 2e9),
        ("10000steps", "steps", 10000), ("1step", "steps", 1), ("3epochs", "epochs", 3), ("0.5epoch", "epochs", 0.5),
        (" 5 m ", "seconds", 300), ("1e+3steps", "steps", 1000),
    ],
)  # fmt: skip
def test_forms(text: str, kind: str, amount: float):
    assert Budget.parse(text) == Budget(kind, amount)


@pytest.mark.parametrize(
    "text",
    ["", "24", "h", "-1h", "1 hour", "1H", "1e-3h", "nanh", "infh", "0s", "0steps", "1e99tok", "1h30m", "1_000steps",
     "1,5h", "१h", "24h\n24h", 24, 24.0, None, True, ["24h"]],
)  # fmt: skip
def test_everything_else_is_refused_with_the_forms(text: object):
    with pytest.raises(ValueError, match="write a number and a unit") as error:
        Budget.parse(text)  # type: ignore[arg-type]
    assert "\n" not in str(error.value).replace("\\n", "")


@CALM
@given(st.floats(1e-3, 1e12), st.sampled_from([*SECONDS, *COUNTS]))
def test_written_and_read_again_it_is_the_same(number: float, unit: str):
    budget = (
        Budget.parse(f"{number:.6g}".replace("e-", "e") + unit) if number >= 1 else Budget.parse(f"{number:.6f}{unit}")
    )
    again = Budget.parse(str(budget))
    assert again.kind == budget.kind
    assert math.isclose(again.amount, budget.amount, rel_tol=1e-12)


@CALM
@given(st.text(max_size=12))
def test_any_text_is_a_budget_or_a_sentence(text: str):
    try:
        budget = Budget.parse(text)
    except ValueError as error:
        assert len(str(error)) < 200
    else:
        assert 0 < budget.amount < 1e18


@CALM
@given(st.sampled_from(["seconds", "tokens", "steps", "epochs"]), st.floats(1.0, 1e9), st.floats(0.0, 2e9))
def test_progress_is_a_share_of_its_own_kind(kind: str, amount: float, used: float):
    amounts = {"seconds": 0.0, "tokens": 0, "steps": 0, "epochs": 0.0}
    assert progress(Budget(kind, amount), **amounts) == 0.0
    share = progress(Budget(kind, amount), **{**amounts, kind: used})
    assert share == min(1.0, used / amount)
    assert progress(Budget(kind, amount), **{**amounts, kind: amount}) == 1.0


@pytest.mark.fault("R13")
def test_the_clock_counts_forward_only():
    now = [100.0]
    clock = Clock(lambda: now[0])
    assert clock.seconds() == 0.0
    now[0] = 107.0
    assert clock.seconds() == 7.0
    now[0] = 50.0  # jumps back: stands still, then goes on from there
    assert clock.seconds() == 7.0
    now[0] = 53.0
    assert clock.seconds() == 10.0
    clock.add(1000.0)  # what an earlier process used; pauses between processes are not in it
    now[0] = 54.0
    assert clock.seconds() == 1011.0
