"""Kill a kind of work at a step or file operation, continue it, compare the end: run as a script.

`python -m tests.faults.kill_points FOLDER SEED SECONDS '[[WORK, POINTS, SIGNALS], ...]'` prints a line of JSON for
each. A forked child counts the calls of the hooks, and at one of them it dies of SIGKILL; or the numbers of SIGNALS
arrive there, one after the other. A second child continues to the end. POINTS are so many drawn from all calls of an
uninterrupted run, fewer (LEAST) if SECONDS are over, or names of hooks: the middle call of each. The parent imports
everything but never runs a backward pass: autograd does not survive a fork after one.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from frugalbert import run as files
from tests.faults.workloads import WORKLOADS, Workload

FILE_CALLS: list[tuple[Any, str]] = [
    (os, name) for name in ("fsync", "rename", "replace", "link", "unlink", "write")
] + [(shutil, "rmtree")]

LEAST = 40

os.fsync = lambda descriptor: None  # a kill loses nothing that the system has; waiting for the disk would be all we do


def hook(work: Workload, at_call: Callable[[int, str], None]) -> list[str]:
    """Call `at_call(number, name)` before every call of a hook, from 1; the names so far."""
    names: list[str] = []

    def one(module: Any, name: str) -> None:
        original: Callable[..., Any] = getattr(module, name)

        def call(*arguments: Any, **named: Any) -> Any:
            if os.getpid() == mine and arguments[:1] not in ((1,), (2,)):  # neither workers nor what is said
                names.append(name)
                at_call(len(names), name)
            return original(*arguments, **named)

        setattr(module, name, call)

    mine = os.getpid()
    for module, name in FILE_CALLS + work.hooks:
        one(module, name)
    return names


def in_child(work: Callable[[], Any]) -> int:
    """Exit status of a forked child that does `work`; that of the command line if a signal stops it."""
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except files.Stopped as stop:
            os._exit(128 + stop.number)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(3)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def say_to(path: Path) -> None:
    """What this process says goes to the end of a file."""
    os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)


class Place:
    """A kind of work, what its runs have in common, and how it ends if it is left alone."""

    def __init__(self, name: str, folder: Path) -> None:
        self.work, self.folder = WORKLOADS[name], folder
        self.common = folder / "common"
        self.common.mkdir(parents=True)
        loaded = set(sys.modules)
        self.said = folder / "said"
        assert in_child(lambda: (say_to(self.said), self.work.prepare(self.common))) == 0, self.said.read_text()

        def whole() -> None:
            say_to(self.said)
            names = hook(self.work, lambda number, name: None)
            self.finish(folder / "whole")
            calls = {"calls": list(names), "modules": sorted(set(sys.modules) - loaded)}
            (folder / "calls.json").write_text(json.dumps(calls))

        status = in_child(whole)
        assert status == 0, self.said.read_text()
        found = json.loads((folder / "calls.json").read_text())
        self.calls: list[str] = found["calls"]
        self.expected = (folder / "whole" / "result").read_text()
        for name in found["modules"]:  # once, here: not in every child
            try:
                importlib.import_module(name)
            except Exception:
                continue

    def finish(self, out: Path) -> None:
        out.mkdir(exist_ok=True)
        found = self.work.run(self.common, out)
        (out / "result").write_text(found)

    def broken(self, point: int, signals: list[int]) -> tuple[int, bool]:
        """(exit status of a run that was broken at a call, whether the continued one ends as the whole one)."""
        out = self.folder / f"at-{point}"

        def at_call(number: int, name: str) -> None:
            if number == point:
                for sent in signals or [signal.SIGKILL]:
                    os.kill(os.getpid(), sent)

        def broken() -> None:
            say_to(self.said)
            if signals:
                files.catch_signals()
            hook(self.work, at_call)
            self.finish(out)

        status = in_child(broken)
        same = in_child(lambda: (say_to(self.said), self.finish(out))) == 0
        same = same and (out / "result").read_text() == self.expected
        shutil.rmtree(out)
        return status, same


def chosen_points(calls: list[str], points: str, seed: int) -> list[int]:
    if points.isdigit():
        return random.Random(seed).sample(range(1, len(calls) + 1), min(int(points), len(calls)))
    found = []
    for name in points.split(","):
        places = [number for number, call in enumerate(calls, 1) if call == name]
        found.append(places[len(places) // 2])
    return found


def main(work: str, folder: Path, points: str, signals: list[int], seed: int, seconds: float) -> dict[str, Any]:
    place, started = Place(work, folder), time.monotonic()
    tried, lost = 0, []
    for point in chosen_points(place.calls, points, seed):
        status, same = place.broken(point, signals)
        wanted = {128 + sent for sent in signals} if signals else {-signal.SIGKILL}
        tried += 1
        if not same or status not in wanted:
            lost.append([place.calls[point - 1], point, status, same])
        if tried >= LEAST and time.monotonic() - started > seconds:
            break
    return {"points": tried, "same": tried - len(lost), "calls": len(place.calls), "lost": lost}


if __name__ == "__main__":
    place, seed, seconds = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    for number, (work, points, signals) in enumerate(json.loads(sys.argv[4])):
        print(json.dumps([work, main(work, place / str(number), points, signals, seed, seconds)]), flush=True)
