"""The search: a space, a score, costs and limits in; every scored candidate, the best and the Pareto front out.

One signature for every method: `search(space, score, cost, limit, rng, clock, settings)`. The state is the journal of
scores: a search that is run again asks its method the same questions, answers them from the journal as far as it goes,
and so proposes exactly what an uninterrupted one would have, wherever it was killed.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import config, dist
from frugalbert.budget import Clock
from frugalbert.fanout import Journal, run_tasks
from frugalbert.model.arch import Arch
from frugalbert.run import check_stop, fingerprint, flatten, say, write_atomic, write_json
from frugalbert.search.candidates import Candidate, Costs, Region, front
from frugalbert.search.evolution import METHODS, Method, Settings
from frugalbert.space import Space

Score = Callable[[list[Arch]], Sequence[float]]
"""Losses of some architectures, lower is better; NaN or infinite for one that failed. Called once per generation."""


@dataclass(frozen=True)
class Result:
    """What a search found. `stopped`: `evaluations`, `budget` (time) or `exhausted` (no further architecture)."""

    candidates: tuple[Candidate, ...]
    stopped: str
    feasible_share: float | None
    """Share of the space within the limits; None if nothing was drawn from it."""
    walked: bool
    """The limits were so tight that random candidates come from walks and are not evenly drawn."""

    @property
    def best(self) -> Candidate:
        """The lowest score; of equal ones the fastest. Raises ValueError if every candidate failed."""
        found = min(self.candidates, key=lambda c: (c.score, c.costs.get("latency_ms", c.costs["parameters"])))
        if not math.isfinite(found.score):
            raise ValueError(
                f"none of {len(self.candidates)} architectures has a finite score; train the super-network for longer "
                "or with a smaller supernet.learning_rate"
            )
        return found


def fan_out(
    function: Callable[[dict[str, Any]], Any], tasks: list[Any], out: Path, machine: config.Machine, label: str
) -> list[Any]:
    """Results of the tasks, in this process or many; `out`/scores.jsonl is their journal, so that nothing is done
    twice. `task["threads"]` tells a worker process how many it has, 0 = as they are."""
    workers = 1 if machine.workers == "auto" else machine.workers
    alone = workers == 1 and machine.scheduler is None
    if alone:
        dist.set_threads(machine)
    tasks = [{**task, "threads": 0 if alone else 1} for task in tasks]
    places = {"journal": out / "scores.jsonl", "workers": workers, "scheduler": machine.scheduler}
    return run_tasks(function, tasks, **places, label=label)


def search(
    space: Space,
    score: Score,
    cost: Callable[[Arch], Costs],
    limit: config.Limit,
    rng: np.random.Generator,
    clock: Clock,
    settings: Settings,
) -> Result:
    """Score up to `settings.evaluations` architectures within the limit, none twice.

    `cost` gives latency_ms (or not), parameters and flops of an Arch in no time. `rng` must be fresh: it is the seed.
    `clock` is told the seconds that earlier processes used. Raises ValueError for a limit that nothing meets, and for
    a journal of another search.
    """
    region = Region(space, cost, limit)
    identity = _identity(region, rng, settings)
    method = METHODS[settings.method](region, settings, rng)
    if settings.journal is None:
        return drive(method, region, score, clock, settings, _Memory(None))
    with Journal(settings.journal) as journal:
        memory = _Memory(journal)
        memory.open(identity, clock)
        return drive(method, region, score, clock, settings, memory)


def drive(
    method: Method, region: Region, score: Score, clock: Clock, settings: Settings, memory: _Memory | None = None
) -> Result:
    """Ask a method for architectures, score them, tell it, until the evaluations or the time are used up."""
    memory = memory or _Memory(None)
    found: list[Candidate] = []
    stopped = "exhausted"
    batch = next(method, None)
    generation = 0
    while batch:
        check_stop()
        batch = batch[: settings.evaluations - len(found)]
        missing = [candidate.arch for candidate in batch if str(candidate.arch) not in memory.scores]
        if memory.over(len(found), clock, settings.seconds if missing else None):
            stopped = "budget"
            break
        if missing:
            memory.add(missing, score(missing), clock)
        scored = [replace(c, score=memory.scores[str(c.arch)], generation=generation) for c in batch]
        found += scored
        if missing:
            best = min(candidate.score for candidate in found)
            say(f"search: {len(found)} of {settings.evaluations} architectures, best score {best:.4f}")
        if len(found) == settings.evaluations:
            stopped = "evaluations"
            break
        generation += 1
        try:
            batch = method.send(scored)
        except StopIteration:
            break
    if not found:
        raise region.impossible()
    return Result(tuple(found), stopped, region.share(), region.walking)


# ---- the journal -----------------------------------------------------------------------------------------------------


def _identity(region: Region, rng: np.random.Generator, settings: Settings) -> dict[str, Any]:
    """What decides a search's proposals beside its scores."""
    said = {key: value for key, value in asdict(settings).items() if key != "journal"}
    ends = [region.cost(region.space.smallest()), region.cost(region.space.largest())]
    state = fingerprint(json.loads(json.dumps(rng.bit_generator.state, default=str)))
    about = {"space": region.space.to_json(), "limit": region.limit.model_dump(), "settings": said}
    return json.loads(json.dumps(about | {"costs": ends, "seed": state}))


class _Memory:
    """The scores known so far; with a journal, also after this process. The journal's first line says whose it is."""

    def __init__(self, journal: Journal | None) -> None:
        self.journal = journal
        self.scores: dict[str, float] = {}
        self.ended: int | None = None

    def open(self, identity: dict[str, Any], clock: Clock) -> None:
        """Read what an earlier process wrote. Raises ValueError if it belongs to another search."""
        assert self.journal is not None
        entries = self.journal.entries
        if not entries and not self.journal.damaged:
            self.journal.append({"search": identity})
            return
        theirs = entries[0].get("search") if entries else None
        if theirs != identity:
            before, now = flatten(theirs or {}), flatten(identity)
            keys = {key.split(".")[0] for key in before.keys() | now.keys() if before.get(key) != now.get(key)}
            what = f"other {', '.join(sorted(keys))}" if theirs else "its first line is damaged"
            raise ValueError(f"{self.journal.path} belongs to another search ({what}); delete it to begin anew")
        for entry in entries[1:]:
            if "arch" in entry:
                self.scores.setdefault(entry["arch"], math.inf if entry["score"] is None else entry["score"])
            self.ended = entry.get("end", self.ended)
        clock.add(max((entry["seconds"] for entry in entries[1:] if "seconds" in entry), default=0.0))

    def add(self, archs: list[Arch], scores: Sequence[float], clock: Clock) -> None:
        assert len(archs) == len(scores), f"{len(scores)} scores for {len(archs)} architectures"
        for arch, value in zip(archs, scores, strict=True):
            number = float(value) if math.isfinite(value) else math.inf
            self.scores[str(arch)] = number
            if self.journal is not None:
                known = number if number < math.inf else None
                self.journal.append({"arch": str(arch), "score": known, "seconds": clock.seconds()})

    def over(self, count: int, clock: Clock, seconds: float | None) -> bool:
        """Whether time is up after `count` candidates; written down, so that a later look finds the same."""
        if self.ended is None and count and seconds is not None and clock.seconds() >= seconds:
            self.ended = count
            if self.journal is not None:
                self.journal.append({"end": count})
        return self.ended is not None and count >= self.ended


# ---- results ---------------------------------------------------------------------------------------------------------


def write_result(out: Path, result: Result) -> dict[str, Any]:
    """Write `candidates.jsonl`, `pareto.json` and `arch.json` below `out`; returns `summary(result)`.

    Raises ValueError if every candidate failed; the candidates are written nevertheless.
    """
    lines = [json.dumps(candidate.to_json(), ensure_ascii=False) for candidate in result.candidates]
    write_atomic(out / "candidates.jsonl", "\n".join(lines) + "\n")
    write_json(out / "pareto.json", [candidate.to_json() for candidate in front(result.candidates)])
    write_json(out / "arch.json", result.best.arch.to_json())
    return summary(result)


def summary(result: Result) -> dict[str, Any]:
    """Figures for the record and the report; `progress` is the best score after each evaluation."""
    lowest = math.inf
    progress: list[float | None] = []
    for candidate in result.candidates:
        lowest = min(lowest, candidate.score)
        progress.append(lowest if lowest < math.inf else None)
    return {
        "best": result.best.to_json(),
        "evaluations": len(result.candidates),
        "failed": sum(not math.isfinite(candidate.score) for candidate in result.candidates),
        "generations": result.candidates[-1].generation + 1,
        "origins": dict(Counter(candidate.origin for candidate in result.candidates)),
        "stopped": result.stopped,
        "feasible_share": result.feasible_share,
        "walked": result.walked,
        "pareto": len(front(result.candidates)),
        "progress": progress,
    }
