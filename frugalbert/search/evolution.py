"""The search methods as generators: each yields architectures to score, is sent them scored, and yields the next.

Nothing is stored: all randomness comes from the one generator and all knowledge from the scores, so a method that is
run again with the same scores proposes the same. `random`; `fast` (AutoTinyBERT's rule of thumb, arXiv 2107.13686,
section 4.3); `evolution` (its mutations with HAT's crossover, arXiv 2005.14187, section 3.2); `pareto` (NSGA-II; Deb et
al. 2002). Random is the bar: prefer another only where it has been shown to beat it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from frugalbert import config
from frugalbert.model.arch import Arch
from frugalbert.run import say
from frugalbert.search.candidates import Candidate, Region, Rule, crowding, non_dominated_sort, objectives
from frugalbert.space import AXES

REDRAWS = 50  # children outside the limits or known already are drawn again so often
Method = Generator[list[Candidate], list[Candidate], None]


@dataclass(frozen=True)
class Settings:
    """How to search: `config.Search` explains the values. `seconds`: stop then. `journal`: where scores are kept."""

    method: str = "evolution"
    evaluations: int = 200
    population: int = 32
    crossover: float = 0.4
    seconds: float | None = None
    journal: Path | None = None

    @classmethod
    def of(cls, section: config.Search, journal: Path | None = None) -> Settings:
        seconds = section.budget.amount if section.budget else None
        return cls(section.method, section.evaluations, section.population, section.crossover, seconds, journal)


def random_search(region: Region, settings: Settings, rng: np.random.Generator) -> Method:
    """Architectures within the limits, evenly, none twice."""
    seen: set[Arch] = set()
    while batch := _draw(region, rng, seen, settings.population):
        yield batch


def fast(region: Region, settings: Settings, rng: np.random.Generator) -> Method:
    """Random among those of BERT-like proportions (`proportioned`); when they run out, among all."""
    seen: set[Arch] = set()
    rule: Rule | None = proportioned
    while True:
        batch = _draw(region, rng, seen, settings.population, rule)
        if len(batch) < settings.population and rule is not None:
            rule = None
            say(
                f"search: {len(seen)} architectures within the limit follow the rule of method fast (ffn 1.6 to 1.9 "
                "times hidden, heads * head_dim 0.7 to 1 times); the others are drawn from all"
            )
            batch += _draw(region, rng, seen, settings.population - len(batch))
        if not batch:
            return
        yield batch


def proportioned(arch: Arch) -> bool:
    """AutoTinyBERT's rule: 1.6 d_m <= d_f <= 1.9 d_m and 0.7 d_m <= d_qkv <= d_m, in every layer."""
    return all(
        1.6 * layer.hidden <= layer.ffn <= 1.9 * layer.hidden and 0.7 * layer.hidden <= layer.qkv <= layer.hidden
        for layer in set(arch.layers)
    )


def evolution(region: Region, settings: Settings, rng: np.random.Generator) -> Method:
    """The best quarter of a population, from everything scored so far, are the parents of the other three quarters."""
    seen: set[Arch] = set()
    archive: list[Candidate] = []
    elites = max(2, settings.population // 4)
    batch = _draw(region, rng, seen, settings.population)
    while batch:
        archive = sorted(archive + (yield batch), key=lambda candidate: candidate.score)
        parents = archive[:elites]

        def choose(parents: list[Candidate] = parents) -> Candidate:
            return parents[int(rng.integers(len(parents)))]

        batch = _children(region, replace(settings, population=settings.population - elites), rng, seen, choose)


def pareto(region: Region, settings: Settings, rng: np.random.Generator) -> Method:
    """NSGA-II on (score, latency); the first population has the smallest, largest and middle architecture, if allowed.

    Parents win a tournament of two by front, then by loneliness in it; parents and children compete for the next place.
    """
    seen: set[Arch] = set()
    alive: list[Candidate] = []
    batch = _designed(region, seen)
    batch += _draw(region, rng, seen, settings.population - len(batch))
    while batch:
        alive = _survivors(alive + (yield batch), settings.population)

        def choose(alive: list[Candidate] = alive) -> Candidate:
            return alive[int(rng.integers(len(alive), size=2).min())]  # survivors come in order of merit

        batch = _children(region, settings, rng, seen, choose)


METHODS: dict[str, Callable[[Region, Settings, np.random.Generator], Method]] = {
    "random": random_search,
    "fast": fast,
    "evolution": evolution,
    "pareto": pareto,
}


def _draw(
    region: Region, rng: np.random.Generator, seen: set[Arch], count: int, rule: Rule | None = None
) -> list[Candidate]:
    """Up to `count` new ones; fewer if the limits leave no more."""
    found: list[Candidate] = []
    while len(found) < count and (drawn := region.draw(rng, seen, rule)):
        seen.add(drawn[0])
        found.append(Candidate(*drawn, origin="fast" if rule else "random"))
    return found


def _children(
    region: Region, settings: Settings, rng: np.random.Generator, seen: set[Arch], choose: Callable[[], Candidate]
) -> list[Candidate]:
    """`settings.population` new ones; one that cannot be made within the limits gives way to a random one."""
    found: list[Candidate] = []
    alone = region.space.size() == 1
    while len(found) < settings.population:
        child = None if alone else _child(region, settings, rng, seen, choose)
        if child is None:
            drawn = _draw(region, rng, seen, 1)
            if not drawn:
                break
            child = drawn[0]
        seen.add(child.arch)
        found.append(child)
    return found


def _child(
    region: Region, settings: Settings, rng: np.random.Generator, seen: set[Arch], choose: Callable[[], Candidate]
) -> Candidate | None:
    for _ in range(REDRAWS):
        parents = [choose().arch]
        if rng.random() < settings.crossover:
            parents.append(choose().arch)
            arch, origin = region.space.cross(parents[0], parents[1], rng), "crossover"
        else:
            arch, origin = region.space.mutate(parents[0], rng), "mutation"
        if arch in seen:
            continue
        costs, gap = region.look(arch)
        if gap == 0.0:
            return Candidate(arch, costs, origin, tuple(str(parent) for parent in parents))
    return None


def _designed(region: Region, seen: set[Arch]) -> list[Candidate]:
    space = region.space
    middle = {name: (getattr(space, name)[len(getattr(space, name)) // 2],) for name in AXES}
    archs = [space.smallest(), space.largest()]
    with contextlib.suppress(ValueError):  # the middle of every axis may break a constraint
        archs.append(replace(space, **middle).smallest())
    found: list[Candidate] = []
    for arch in archs:
        costs, gap = region.look(arch)
        if gap == 0.0 and arch not in seen and space.contains(arch):
            seen.add(arch)
            found.append(Candidate(arch, costs, "design"))
    return found


def _survivors(candidates: list[Candidate], count: int) -> list[Candidate]:
    """The best `count`, in order: by front, within a front the loneliest first."""
    points = [objectives(candidate) for candidate in candidates]
    order: list[int] = []
    for indices in non_dominated_sort(points):
        lonely = crowding([points[index] for index in indices])
        order += [index for _, index in sorted(zip([-value for value in lonely], indices, strict=True))]
    return [candidates[index] for index in order[:count]]
