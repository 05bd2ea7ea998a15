"""Candidates: architectures within the limits, drawn at random, and the Pareto front of those that were scored.

`Region` is what a space and its limits leave. Drawing from it is rejection from the space, so every architecture within
is equally likely (AutoTinyBERT, arXiv 2107.13686; HAT, arXiv 2005.14187); where the limits leave less than one in
`TRIES`, a walk by mutations from the smallest architecture up, which is not uniform and says so (`Region.walking`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import config
from frugalbert.model.arch import Arch
from frugalbert.space import Space

Costs = dict[str, float]
"""What one encoder costs: `latency_ms`, `parameters`, `flops`, and `speedup` over the space's largest."""
Rule = Callable[[Arch], bool]

TRIES = 2000  # draws for one architecture before the limits count as tight
POOL = 5000  # spaces up to this size are listed then, and drawing stays exact
WALKS, STEPS = 12, 2000


@dataclass(frozen=True)
class Candidate:
    """An architecture that a search proposed; `score` (lower is better) is NaN until it is known, inf if it failed."""

    arch: Arch
    costs: Costs
    origin: str
    """`random`, `fast`, `design`, `mutation` or `crossover`."""
    parents: tuple[str, ...] = ()
    score: float = math.nan
    generation: int = 0

    def to_json(self) -> dict[str, Any]:
        """One line of `candidates.jsonl`."""
        score = self.score if math.isfinite(self.score) else None
        about = {"generation": self.generation, "origin": self.origin, "parents": list(self.parents)}
        return {"arch": str(self.arch), "score": score, **self.costs, **about}


def windows(limit: config.Limit) -> dict[str, tuple[float, float]]:
    """`{"latency_ms": (least, most)}` of every limit that is set: costs have a most, a speed-up has a least."""
    found: dict[str, tuple[float, float]] = {}
    for name in type(limit).model_fields:
        value: tuple[float, ...] | None = getattr(limit, name)
        if value is not None and len(value) == 2:
            found[name] = (value[0], value[1])
        elif value is not None:
            found[name] = (value[0], math.inf) if name == "speedup" else (0.0, value[0])
    return found


@dataclass
class Region:
    """The architectures of a space within the limits. `cost` gives latency_ms, parameters, flops of an Arch."""

    space: Space
    cost: Callable[[Arch], Costs]
    limit: config.Limit
    walking: bool = False
    """The limits are so tight that architectures are found by walking; they are not evenly drawn then."""
    drawn: int = 0
    within: int = 0
    _nearest: tuple[float, Arch, Costs] | None = None
    _pool: list[tuple[Arch, Costs]] | None = None
    _windows: dict[str, tuple[float, float]] = field(default_factory=dict)
    _base: float | None = None

    def __post_init__(self) -> None:
        self._windows = windows(self.limit)
        largest = self.cost(self.space.largest())
        self._base = largest.get("latency_ms")
        for name in self._windows:
            if name not in largest and not (name == "speedup" and self._base):
                raise ValueError(
                    f"search.limit.{name} needs the section latency, which measures this machine; add latency: {{}} "
                    "or limit parameters or flops instead"
                )

    def costs(self, arch: Arch) -> Costs:
        found = self.cost(arch)
        return found if self._base is None else found | {"speedup": self._base / found["latency_ms"]}

    def look(self, arch: Arch) -> tuple[Costs, float]:
        """Costs, and how far outside the limits they are: 0 within, else a sum of log ratios."""
        costs = self.costs(arch)
        gap = 0.0
        for name, (least, most) in self._windows.items():
            if not least <= costs[name] <= most:
                gap += abs(math.log(costs[name] / (least if costs[name] < least else most)))
        if self._nearest is None or gap < self._nearest[0]:
            self._nearest = (gap, arch, costs)
        return costs, gap

    def share(self) -> float | None:
        """Share of the space within the limits, estimated from the draws; exact once the space has been listed."""
        if self._pool is not None:
            return len(self._pool) / self.space.size()
        return self.within / self.drawn if self.drawn else None

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def draw(
        self, rng: np.random.Generator, seen: Collection[Arch], rule: Rule | None = None
    ) -> tuple[Arch, Costs] | None:
        """An architecture within the limits (and the rule) that is not in `seen`; None if none is found."""
        if self._pool is None and not self.walking:
            for _ in range(TRIES if rule is None else 10 * TRIES):  # a rule is looked at before the costs
                found = self._try(rng, seen, rule)
                if found:
                    return found
            if self.space.size() <= POOL and not self.space.mixed:
                every = [(arch, *self.look(arch)) for arch in self.space.enumerate()]
                self._pool = [(arch, costs) for arch, costs, gap in every if gap == 0.0]
            elif rule is None:
                self.walking = True
        if self._pool is not None:
            return _from_pool(self._pool, rng, seen, rule)
        return self._walk(rng, seen) if rule is None else None

    def _try(self, rng: np.random.Generator, seen: Collection[Arch], rule: Rule | None) -> tuple[Arch, Costs] | None:
        arch = self.space.sample(rng)
        if rule is not None and not rule(arch):
            return None
        costs, gap = self.look(arch)
        if rule is None:
            self.drawn += 1
            self.within += gap == 0.0
        return (arch, costs) if gap == 0.0 and arch not in seen else None

    def _walk(self, rng: np.random.Generator, seen: Collection[Arch]) -> tuple[Arch, Costs] | None:
        """By mutations that never lead further outside, then some way about inside."""
        if self.space.size() == 1:
            costs, gap = self.look(self.space.smallest())
            return None if gap or self.space.smallest() in seen else (self.space.smallest(), costs)
        for number in range(WALKS):
            arch = self.space.sample(rng) if number % 2 else self.space.smallest()
            costs, gap = self.look(arch)
            inside = int(rng.integers(STEPS // 10))
            for _ in range(STEPS):
                if gap == 0.0:
                    inside -= 1
                    if inside < 0 and arch not in seen:
                        return arch, costs
                child = self.space.mutate(arch, rng)
                child_costs, child_gap = self.look(child)
                if child_gap <= gap:
                    arch, costs, gap = child, child_costs, child_gap
        return None

    def impossible(self) -> ValueError:
        """The error that names the nearest reachable values. Call after a `draw` without `seen` found nothing."""
        assert self._nearest is not None
        _, arch, costs = self._nearest
        missed = [
            f"{name} {_number(costs[name])} (limit {_window(window)})"
            for name, window in self._windows.items()
            if not window[0] <= costs[name] <= window[1]
        ]
        return ValueError(
            f"no architecture of the space is within search.limit; the nearest is {arch} with {' and '.join(missed)}; "
            "widen the limit or give the space other sizes"
        )


def _from_pool(
    pool: list[tuple[Arch, Costs]], rng: np.random.Generator, seen: Collection[Arch], rule: Rule | None
) -> tuple[Arch, Costs] | None:
    for _ in range(64 if pool else 0):
        arch, costs = pool[int(rng.integers(len(pool)))]
        if (rule is None or rule(arch)) and arch not in seen:
            return arch, costs
    left = [entry for entry in pool if (rule is None or rule(entry[0])) and entry[0] not in seen]
    return left[int(rng.integers(len(left)))] if left else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _window(window: tuple[float, float]) -> str:
    least, most = window
    if not least:
        return f"at most {_number(most)}"
    return f"at least {_number(least)}" if most == math.inf else f"{_number(least)} to {_number(most)}"


# ---- Pareto ----------------------------------------------------------------------------------------------------------


def non_dominated_sort(points: Sequence[Sequence[float]]) -> list[list[int]]:
    """Indices in fronts: the first is dominated by nobody, the next by the first alone, and so on; all are minimised.

    `a` dominates `b` if it is nowhere worse and somewhere better (NSGA-II; Deb et al. 2002, section III-A).
    """
    values = np.asarray(points, dtype=float)
    if not len(values):
        return []
    nowhere_worse = (values[:, None] <= values[None]).all(-1)
    dominates = nowhere_worse & (values[:, None] < values[None]).any(-1)
    left = np.ones(len(values), dtype=bool)
    fronts: list[list[int]] = []
    while left.any():
        front = np.flatnonzero(left & ~dominates[left].any(0))
        fronts.append(front.tolist())
        left[front] = False
    return fronts


def crowding(points: Sequence[Sequence[float]]) -> list[float]:
    """How lonely each point of a front is: the neighbours' distance summed over objectives; inf at the ends."""
    values = np.asarray(points, dtype=float)
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        width = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = math.inf
        if 0 < width < math.inf:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / width
    return distance.tolist()


def objectives(candidate: Candidate) -> tuple[float, float]:
    """(score, latency): parameters where no latency is known."""
    return candidate.score, candidate.costs.get("latency_ms", candidate.costs["parameters"])


def front(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those that no other beats in both score and latency, the fastest first; failed ones are left out."""
    sound = [candidate for candidate in candidates if math.isfinite(candidate.score)]
    fronts = non_dominated_sort([objectives(candidate) for candidate in sound])
    return sorted((sound[index] for index in fronts[0]), key=lambda c: objectives(c)[::-1]) if fronts else []


# ---- files -----------------------------------------------------------------------------------------------------------


def read_archs(path: Path | str) -> list[Arch]:
    """A file with one architecture per line: our line, a preset's name, or AutoTinyBERT's dictionary.

    What follows a tab (AutoTinyBERT's latencies) is left out, empty lines too. Raises ValueError naming the line.
    """
    found: list[Arch] = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        text = line.partition("\t")[0].strip()
        if text:
            try:
                found.append(Arch.parse(text))
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from None
    return found
