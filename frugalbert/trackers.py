"""Figures of a training to wandb and its like, which may fail, refuse or hang without an effect on the training."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from frugalbert.run import is_main_rank, say


class Trackers:
    """Sends figures to accelerate's trackers from a thread of its own, behind a circuit breaker.

    The run's metrics.jsonl is the truth; a tracker that fails `failures` times, hangs for `patience` seconds, or lets
    `most` figures wait (it may never start), is given up with one warning and costs nothing. Only the main rank sends.
    """

    failures = 3
    patience = 1.0
    most = 10_000

    def __init__(self, names: Sequence[str], run_name: str, folder: Path) -> None:
        self._broken: str | None = None
        self._calls: queue.SimpleQueue[tuple[str, Any] | None] = queue.SimpleQueue()
        self._busy_since: float | None = None
        self._thread: threading.Thread | None = None
        if names and is_main_rank():
            self._thread = threading.Thread(target=self._work, args=(names, run_name, folder), daemon=True)
            self._thread.start()

    def _work(self, names: Sequence[str], run_name: str, folder: Path) -> None:
        trackers: list[Any] = []
        failed = 0
        try:
            trackers = [_tracker(name, run_name, folder) for name in names]
        except Exception as error:  # a tracker may raise anything, and none of it may stop a training
            self._open(error)
            return
        while (call := self._calls.get()) is not None and self._broken is None:
            kind, (values, step) = call
            self._busy_since = time.monotonic()
            try:
                for tracker in trackers:
                    tracker.log(values, step=step) if kind == "log" else tracker.store_init_configuration(values)
            except Exception as error:
                failed += 1
                if failed >= self.failures:
                    self._open(error)
            self._busy_since = None
        for tracker in trackers if self._broken is None else []:
            try:
                tracker.finish()
            except Exception as error:
                self._open(error)

    def _open(self, reason: object) -> None:
        if self._broken is None:
            self._broken = str(reason)
            say(f"trackers are given up ({str(reason)[:200]}); the run goes on, its figures are in metrics.jsonl")

    def _put(self, kind: str, values: dict[str, Any], step: int) -> None:
        if self._thread is None or self._broken is not None:
            return
        since = self._busy_since
        if since is not None and time.monotonic() - since > self.patience:
            self._open(f"a call did not return within {self.patience:g} s")
        elif self._calls.qsize() >= self.most:
            self._open(f"{self.most} figures wait to be sent")
        else:
            self._calls.put((kind, (values, step)))

    def configuration(self, values: dict[str, Any]) -> None:
        """The settings of the run, once."""
        self._put("configuration", values, 0)

    def log(self, values: dict[str, Any], step: int) -> None:
        """Figures of one step; returns at once."""
        self._put("log", {name: value for name, value in values.items() if isinstance(value, int | float)}, step)

    def finish(self) -> None:
        """Flush, waiting at most `patience` seconds."""
        if self._thread is not None and self._broken is None:
            self._calls.put(None)
            self._thread.join(self.patience)
            if self._thread.is_alive():
                self._open(f"the last figures were not taken within {self.patience:g} s")


def _tracker(name: str, run_name: str, folder: Path) -> Any:
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"there is no tracker {name}; write one of {', '.join(sorted(LOGGER_TYPE_TO_CLASS))}")
    if name not in [str(available) for available in get_available_trackers()]:
        raise ValueError(f"the tracker {name} is not installed; run: pip install frugalbert[{name}]")
    kind = LOGGER_TYPE_TO_CLASS[name]
    tracker = kind(run_name, folder) if kind.requires_logging_directory else kind(run_name)
    tracker.start()
    return tracker
