"""Progress of long work: a bar with rate and time left on a terminal, plain lines every ten seconds elsewhere."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any


def is_main_rank() -> bool:
    """True in the one process that may speak (rank 0 under torchrun, or the only one)."""
    return os.environ.get("RANK", "0") == "0"


def on_terminal() -> bool:
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def reason(error: BaseException) -> str:
    """The first line of what an error says, or its name: why something could not be done."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), type(error).__name__)[:160]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence the libraries' warnings, log lines and bars; exceptions still speak."""
    from transformers.utils import logging as hf

    before, bars = logging.root.manager.disable, hf.is_progress_bar_enabled()
    logging.disable(logging.WARNING)
    hf.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
        if bars:
            hf.enable_progress_bar()


def duration(seconds: float) -> str:
    """`4 s`, `3 min 20 s`, `2 h 05 min`, `9.0 days`."""
    seconds = max(0.0, seconds)
    if seconds < 60:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{minutes / 1440:,.1f} days"


def number(value: Any) -> str:
    """A figure in few characters: `12.7k`, `3.91`, `0.00021`."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return str(value)
    if isinstance(value, int) and abs(value) >= 10**15:  # some are too large for a float
        return f"{'-' * (value < 0)}10^{len(str(abs(value))) - 1}"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return str(value) if isinstance(value, int) else f"{value:.4g}"


class Progress:
    """`with Progress("tokenise", total, "documents") as progress: progress.update(done, loss=3.2)`.

    `done` is absolute. `unit=""` with `total=1.0` shows a share. Only the main rank speaks.
    """

    every = 10.0

    def __init__(self, label: str, total: float | None = None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self._start = self._spoken = time.monotonic()
        self._first: float | None = None
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if is_main_rank() and on_terminal():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=20), TextColumn("{task.fields[figures]}"))
            self._bar = Bar(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self.label, total=self.total, figures="")
            self._bar.start()
        return self

    def update(self, done: float, **figures: Any) -> None:
        """Say that `done` of `total` is reached, with further figures such as `loss=3.2`."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._start = done, now  # neither earlier work nor set-up counts as speed
        if self._bar is not None:
            self._bar.update(self._task, completed=done, figures=self._line(done, figures, now))
        elif is_main_rank() and now - self._spoken >= self.every:
            self._spoken = now
            print(f"{self.label}: {self._line(done, figures, now)}", file=sys.stderr, flush=True)

    def _line(self, done: float, figures: dict[str, Any], now: float) -> str:
        passed = now - self._start
        rate = (done - (self._first or 0)) / passed if passed > 0 else 0.0
        parts = []
        if self.total:
            parts.append(f"{done / self.total:.0%}")
        if self.unit:
            of = f" of {number(self.total)}" if self.total else ""
            parts += [f"{number(done)}{of} {self.unit}", f"{number(rate)}/s"]
        if self.total and rate > 0 and done < self.total:
            parts.append(f"{duration((self.total - done) / rate)} left")
        parts += [f"{name.replace('_', ' ')} {number(value)}" for name, value in figures.items()]
        return " · ".join(parts)

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
