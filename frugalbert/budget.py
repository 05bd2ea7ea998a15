"""Budget and Clock: hours, tokens, steps or epochs in; progress in [0, 1] out.

Every schedule of a training run (learning rate, masking rate, length phases, validation, checkpoints) is a function
of progress, so one recipe works with any kind of budget (24hBERT, arXiv 2104.07705, section 3: the schedule's length
is the budget's). Pure Python: `plan` uses it without torch.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

SECONDS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
COUNTS = {"tok": "tokens", "tokens": "tokens", "step": "steps", "steps": "steps", "epoch": "epochs", "epochs": "epochs"}
FORM = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][+]?[0-9]+)?)\s*([a-z]+)\s*")
HINT = "write a number and a unit: 90s, 30m, 24h, 9d, 2e9tok, 10000steps or 3epochs"


@dataclass(frozen=True)
class Budget:
    """When training stops. `amount` is in seconds, tokens, optimizer steps or passes over the data (`kind`)."""

    kind: str
    amount: float

    @classmethod
    def parse(cls, text: object) -> Budget:
        """`'24h'` -> `Budget('seconds', 86400.0)`. Raises ValueError with the accepted forms."""
        if isinstance(text, Budget):
            return text
        match = FORM.fullmatch(text) if isinstance(text, str) else None
        if not match:
            raise ValueError(f"{text!r} is no budget; {HINT}")
        number, unit = float(match[1]), match[2]
        if unit not in SECONDS and unit not in COUNTS:
            raise ValueError(f"{unit!r} is no unit of a budget; {HINT}")
        amount = number * SECONDS.get(unit, 1.0)
        if not 0 < amount < 1e18:
            raise ValueError(f"a budget of {text!r} trains nothing sensible; {HINT}")
        return cls("seconds" if unit in SECONDS else COUNTS[unit], amount)

    def __str__(self) -> str:
        if self.kind != "seconds":
            unit = {"tokens": "tok"}.get(self.kind, self.kind)
            return f"{self.amount:g}{unit}" if self.amount >= 1e6 else f"{self.amount:.15g}{unit}"
        for unit in ("d", "h", "m"):
            count = self.amount / SECONDS[unit]
            if count >= 1 and abs(count - round(count)) < 1e-9:
                return f"{round(count)}{unit}"
        return f"{self.amount:.15g}s"


class Clock:
    """Seconds of budget used so far: starts when it is made, survives restarts, never counts pauses between them.

    `now` is any monotonic clock (tests inject one); one that jumps back stands still instead.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._latest = now()
        self._used = 0.0

    def seconds(self) -> float:
        now = self._now()
        self._used += max(0.0, now - self._latest)
        self._latest = now
        return self._used

    def add(self, seconds: float) -> None:
        """Count what an earlier process used (its checkpoint says how much)."""
        self._used += seconds


def progress(budget: Budget, *, seconds: float, tokens: int, steps: int, epochs: float) -> float:
    """How much of the budget is used, in [0, 1]."""
    used = {"seconds": seconds, "tokens": tokens, "steps": steps, "epochs": epochs}[budget.kind]
    return min(1.0, max(0.0, used / budget.amount))
