"""The rows of docs/reliability.md: what is done to the toolkit, how often at least, and the counting of it.

A test belongs to a row by `@pytest.mark.fault("R5")`: it is one case, and every example of a hypothesis test is one.
With the fixture `case` it counts its cases itself: `with case(): ...` is one, survived if nothing is raised. A row that
was tried less often than its mark fails `pytest --faults`; so does a row that lost a case, by the test that lost it. A
case of hostile input is lost, too, if it takes more time or memory than it may.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROWS: dict[str, tuple[str, int]] = {
    "R1": ("killed (SIGKILL) before a step or file operation, in every kind of work; continued to the same bytes", 250),
    "R2": ("the command line killed at random moments of every stage, in chains; continued to the same bytes", 10),
    "R3": ("SIGTERM, SIGINT, SIGUSR1 in a step, a save, an evaluation, data preparation, warm-up; twice", 21),
    "R4": ("the newest checkpoint damaged at random; the one before serves, to the same bytes", 200),
    "R5": ("each file of a checkpoint cut off, emptied, deleted, flipped", 20),
    "R6": ("token shards and their index damaged at random; found, and the file named", 200),
    "R7": ("a full disk: small file systems, ENOSPC at the n-th write; the older checkpoint serves", 40),
    "R8": ("a read-only folder, failing fsync and rename, a folder that vanishes", 4),
    "R9": ("loss, gradient, weights or teacher become NaN or infinite", 24),
    "R10": ("memory full in forward, backward or step, once to four times", 12),
    "R11": ("the order of the data: any workers, ranks and offsets", 20),
    "R12": ("several processes: saved by 2, continued by 1 and 4; a rank killed or terminated", 6),
    "R13": ("clocks that jump, pause or disagree", 10),
    "R14": ("one run directory started several times at once; stale locks", 40),
    "R15": ("the same data prepared by several processes at once, their builder killed", 10),
    "R16": ("journals of searches and sweeps cut off, damaged, continued", 200),
    "R17": ("trackers that fail, refuse or hang", 9),
    "R18": ("runs and checkpoints of every release", 1),
    "R19": ("a purge of old checkpoints killed while it deletes", 20),
    "R20": ("no network: any address outside this machine is refused while the tests run", 1),
    "R21": ("workers, drivers and schedulers killed; tasks that raise or hang", 10),
    "R22": ("malformed corpora, with the file and line of what was lost", 328),
    "R23": ("coverage-guided fuzzing of the readers of corpora and of submissions; in `make torture` alone", 0),
    "S1": ("hostile pickles in every kind of file that is read", 24),
    "S2": ("calls that would run code from a file", 1),
    "S3": ("code that comes with a model or a data set", 6),
    "S4": ("attacks in YAML", 15),
    "S5": ("random and mutated configurations", 500),
    "S6": ("scripts in every text that a report shows", 175),
    "S7": ("hostile archives", 24),
    "S8": ("names that are paths", 12),
    "S9": ("plug-ins that are none", 20),
    "S10": ("secrets in logs, snapshots, reports, checkpoints, exports", 25),
    "S11": ("hostile weights, graphs and tokenizers, in 512 MB and 5 s", 12),
    "S12": ("a megabyte of adversarial text through every splitter and pattern, in 2 s", 6),
    "S13": ("Dask: loopback, TLS advice, other versions", 4),
}
"""What is done, and how often at least: the marks of the specification."""

seed: int | None = None
"""Of `make torture`; None in `make test`."""
minutes: float | None = None
"""How long that may last."""


def often(quick: int, long: int) -> int:
    """How often: `quick` in `make test`, `long` in `make torture`."""
    return quick if seed is None else long


def chance() -> int:
    """The seed of what is drawn at random: 0 in `make test`."""
    return seed or 0


@dataclass
class Cost:
    """Of one case: seconds, and bytes of this process beyond those it had."""

    seconds: float = 0.0
    memory: int = 0


MOST = Cost(60.0, 2 << 30)
"""Of any case of hostile input."""


@contextmanager
def within(most: Cost) -> Iterator[Cost]:
    """What is done takes at most `most`; AssertionError if not. What it took is known at the end."""
    took, before, started = Cost(), _memory("VmRSS"), time.monotonic()
    _forget_peak()
    yield took
    took.seconds, took.memory = time.monotonic() - started, max(0, _memory("VmHWM") - before)
    assert took.seconds <= most.seconds, f"took {took.seconds:.1f} s; at most {most.seconds:g} are due"
    assert took.memory <= most.memory, f"took {took.memory >> 20:,} MB; at most {most.memory >> 20:,} are due"


def _memory(name: str) -> int:
    """Bytes in memory now (VmRSS) or at most since `_forget_peak` (VmHWM); elsewhere the most there ever was."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith(f"{name}:")))
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _forget_peak() -> None:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


@dataclass
class Tally:
    """Cases of one test, or of one row."""

    row: str
    tried: int = 0
    survived: int = 0
    skipped: bool = False
    longest: float = 0.0  # seconds of a case, and the most bytes of one; of hostile input alone
    most: int = 0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.tried += 1
        with self.bounded():
            yield
        self.survived += 1

    @contextmanager
    def bounded(self) -> Iterator[None]:
        """One case in its bounds, if its input is hostile."""
        if not (self.row.startswith("S") or self.row == "R22"):
            yield
            return
        with within(MOST) as took:
            yield
        self.longest, self.most = max(self.longest, took.seconds), max(self.most, took.memory)

    def add(self, tried: int, survived: int) -> None:
        """Cases that another process counted."""
        self.tried += tried
        self.survived += survived


def table(tallies: Iterable[Tally]) -> list[dict[str, Any]]:
    """A line for each row, tried or not, of all tests."""
    found = {row: Tally(row) for row in ROWS}
    for tally in tallies:
        one = found[tally.row]
        one.add(tally.tried, tally.survived)
        one.skipped |= tally.skipped
        one.longest, one.most = max(one.longest, tally.longest), max(one.most, tally.most)
    return [
        {"row": row, "fault": fault, "tried": one.tried, "survived": one.survived, "lost": one.tried - one.survived,
         "least": least, "skipped": one.skipped, "longest_s": round(one.longest, 2), "most_mb": one.most >> 20}
        for (row, (fault, least)), one in zip(ROWS.items(), found.values(), strict=True)
    ]  # fmt: skip
