"""Fixed shapes per row: how many of its places are masked, and how many bytes a teacher's predictions at them take.

No torch here: `plan` says the same numbers before anything is run.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def num_slots(rate: float, length: int, most: int | None = None) -> int:
    """Masked slots per row of `length` tokens: round(rate * length), half to even, at least 1 unless the rate is 0, and
    at most `most`."""
    slots = max(1, round(rate * length)) if rate > 0 else 0
    return slots if most is None else min(slots, most)


def record_type(slots: int, count: int, vocab_size: int) -> np.dtype[Any]:
    """The `count` likeliest tokens at each masked slot of one row, as `train/teacher_cache.py` stores them."""
    ids = "<u2" if vocab_size <= 1 << 16 else "<u4"
    count = min(count, vocab_size)
    return np.dtype(
        [("crc", "<u4"), ("rest", "<f4", (slots,)), ("scores", "<f2", (slots, count)), ("ids", ids, (slots, count))]
    )
