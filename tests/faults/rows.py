"""The rows of docs/reliability.md: what is done to the toolkit, how often at least, and the counting of it.

A test belongs to a row by `@pytest.mark.fault("R5")`: it is one case, and every example of a hypothesis test is one.
With the fixture `case` it counts its cases itself: `with case(): ...` is one, survived if nothing is raised. A row that
was tried less often than its mark fails `pytest --faults`; so does a row that lost a case, by the test that lost it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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


def often(quick: int, long: int) -> int:
    """How often: `quick` in `make test`, `long` in `make torture`."""
    return quick if seed is None else long


def chance() -> int:
    """The seed of what is drawn at random: 0 in `make test`."""
    return seed or 0


@dataclass
class Tally:
    """Cases of one test."""

    row: str
    tried: int = 0
    survived: int = 0
    skipped: bool = False

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self.tried += 1
        yield
        self.survived += 1

    def add(self, tried: int, survived: int) -> None:
        """Cases that another process counted."""
        self.tried += tried
        self.survived += survived


def table(entries: Iterable[tuple[str, int, int, bool]]) -> list[dict[str, Any]]:
    """A line for each row, tried or not, of (row, tried, survived, skipped) of each test."""
    found = {row: Tally(row) for row in ROWS}
    for row, tried, survived, skipped in entries:
        found[row].add(tried, survived)
        found[row].skipped |= skipped
    return [
        {"row": row, "fault": fault, "tried": one.tried, "survived": one.survived, "lost": one.tried - one.survived,
         "least": least, "skipped": one.skipped}
        for (row, (fault, least)), one in zip(ROWS.items(), found.values(), strict=True)
    ]  # fmt: skip
