"""Optimal subarchitecture extraction: a space, costs and a judge in; the visited architectures, ranked by W, out.

OSE (de Wynter 2020, arXiv 2010.08512), by which Bort was found (de Wynter and Perry 2020, arXiv 2010.10499). All of the
space is listed by rising parameters p and inference cost i, every `interval`-th architecture is judged by its error e,
and the best is the one with the largest W = (p(T) - p)/p(T) * (i(T) - i)/i(T) / e; T is the maximum point. Prefer it
where architectures are few and training them shortly is cheap. Found is the best of the visited architectures under W
and no more: from interval 2 on the published bound says nothing, and the guarantee around it assumes SGD, smooth losses
and layers that outweigh the embeddings. The sort key and the representative of an interval are our reading.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from frugalbert import config
from frugalbert.model.arch import Arch
from frugalbert.run import say, write_atomic, write_json
from frugalbert.search.candidates import Candidate, Costs, Region, non_dominated_sort
from frugalbert.search.run import Result, summary
from frugalbert.space import Space

LISTED = 100_000  # architectures of the largest space that is listed
RANKING = 20
INFERENCE = {"flops": "flops", "latency": "latency_ms"}


@dataclass(frozen=True)
class Maximum:
    """The maximum point T: the normaliser, not an optimum; its error is never needed."""

    name: str
    parameters: float
    inference: float


@dataclass(frozen=True)
class Errors:
    """What one recipe made of an architecture: an error per seed, and of each the ones that less would have given."""

    final: tuple[float, ...]
    looks: tuple[tuple[float, ...], ...] = ()
    """Of each seed, the error at each look."""
    half: tuple[float, ...] = ()
    """Of each seed, on half of the rows."""


Judge = Callable[[list[Arch]], list[list[Errors | None]]]
"""Of each architecture what each recipe makes of it, None where a training diverged."""


@dataclass(frozen=True)
class Visited:
    """One architecture of the list. Without `error` it was rejected, or every recipe diverged."""

    candidate: Candidate
    trials: tuple[Errors | None, ...] = ()
    rejected: str | None = None
    w: float | None = None
    w_std: float | None = None
    theta: int | None = None

    def to_json(self) -> dict[str, Any]:
        """A row of `candidates.jsonl`."""
        row = self.candidate.to_json()
        about: dict[str, Any] = {"w": self.w, "error": row["score"], "theta": self.theta, "rejected": self.rejected}
        return {**row, **about, **({} if self.w_std is None else {"w_std": self.w_std})}


# ---- W ---------------------------------------------------------------------------------------------------------------


def coefficient(maximum: Maximum, parameters: float, inference: float, error: float, floor: float) -> float:
    """W(T, b), to be maximised. 0 where b costs as much as T in either way. Raises ValueError if it costs more.

    No absolute values: two negative brackets would make a positive W of an architecture that is beyond T twice.
    """
    reason = beyond(maximum, parameters, inference)
    if reason:
        raise ValueError(reason)
    saved = (maximum.parameters - parameters) / maximum.parameters
    return saved * ((maximum.inference - inference) / maximum.inference) / max(error, floor)


def beyond(maximum: Maximum, parameters: float, inference: float) -> str | None:
    """Why an architecture cannot be compared with T, if so."""
    over = [name for name, mine, most in (("parameters", parameters, maximum.parameters),
            ("inference cost", inference, maximum.inference)) if mine > most]  # fmt: skip
    return f"more {' and '.join(over)} than the maximum point" if over else None


# ---- which are visited -----------------------------------------------------------------------------------------------


def ordered(region: Region, inference: str) -> list[Candidate]:
    """All members within the limits by (parameters, inference cost, text). Raises ValueError if they cannot be listed.

    `inference` is the name of a cost.
    """
    space = region.space
    if space.mixed:
        raise ValueError("search.method: extraction lists the space, which space.mixed makes endless; remove mixed")
    if space.size() > LISTED:
        raise ValueError(
            f"search.method: extraction lists the space, and this one has {space.size():,} architectures; give its "
            f"axes fewer values (at most {LISTED:,} in all), or use evolution"
        )
    found = [(arch, *region.look(arch)) for arch in space.enumerate()]
    inside = [Candidate(arch, costs, "extraction") for arch, costs, gap in found if gap == 0.0]
    if not inside:
        raise region.impossible()
    return sorted(inside, key=lambda one: (one.costs["parameters"], one.costs[inference], str(one.arch)))


def every(listed: Sequence[Any], interval: int, representative: str = "first") -> list[Any]:
    """One of each `interval` neighbours: ceil(len / interval) of them."""
    parts = [listed[start : start + interval] for start in range(0, len(listed), interval)]
    place = {"first": lambda part: 0, "middle": lambda part: (len(part) - 1) // 2, "last": lambda part: -1}
    return [part[place[representative](part)] for part in parts]


def largest(listed: Sequence[Candidate], inference: str) -> Maximum:
    """The member that is largest in both costs. Raises ValueError if there is none."""
    by_size = max(listed, key=lambda one: (one.costs["parameters"], one.costs[inference]))
    by_cost = max(listed, key=lambda one: (one.costs[inference], one.costs["parameters"]))
    if by_size.costs[inference] < by_cost.costs[inference]:
        raise ValueError(
            f"no architecture is largest in both parameters ({by_size.arch}) and {inference} ({by_cost.arch}); write "
            "search.extraction.maximum: an architecture that is"
        )
    return Maximum(str(by_size.arch), by_size.costs["parameters"], by_size.costs[inference])


# ---- the method ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extracted:
    """What came of it. `visited` in the order of the list, `size` of the whole list."""

    section: config.Extraction
    maximum: Maximum
    visited: tuple[Visited, ...]
    size: int

    @property
    def ranking(self) -> list[Visited]:
        """Those that have a W, the largest first; of equal ones the cheaper."""
        return sorted((one for one in self.visited if one.w is not None), key=lambda one: -(one.w or 0.0))

    @property
    def cheapest(self) -> Visited:
        """The pick if all errors were the same: by size and inference cost alone."""

        def saved(one: Visited) -> float:
            costs = one.candidate.costs
            return coefficient(self.maximum, costs["parameters"], costs[self.inference], 1.0, 1.0)

        return max(self.ranking, key=saved)

    @property
    def inference(self) -> str:
        return INFERENCE[self.section.inference]


def extract(
    space: Space,
    judge: Judge,
    cost: Callable[[Arch], Costs],
    limit: config.Limit,
    section: config.Extraction,
    maximum: Maximum | None = None,
) -> Extracted:
    """Judge every `section.interval`-th architecture of the space within the limit, in one call of `judge`.

    `cost` gives parameters, flops and perhaps latency_ms; `maximum` is T, by default the largest member. Nothing is
    random: the same judgements give the same result. Raises ValueError for an interval above the number of
    architectures, a space without a largest member, and if nothing that was visited has a W.
    """
    inference = INFERENCE[section.inference]
    listed = ordered(Region(space, cost, limit), inference)
    if section.interval > len(listed):
        raise ValueError(
            f"search.extraction.interval {section.interval} is more than the {len(listed)} architectures of the space "
            f"within search.limit; write 1 to {len(listed)}"
        )
    maximum = maximum or largest(listed, inference)
    chosen = every(listed, section.interval, section.representative)
    say(
        f"search: {len(chosen)} of {len(listed)} architectures (interval {section.interval}); maximum point "
        f"{maximum.name}: {maximum.parameters:,.0f} parameters, {inference} {maximum.inference:,.6g}"
    )
    reasons = [beyond(maximum, one.costs["parameters"], one.costs[inference]) for one in chosen]
    trials = iter(judge([one.arch for one, reason in zip(chosen, reasons, strict=True) if reason is None]))
    visited = [
        Visited(one, rejected=reason) if reason else weigh(Visited(one, tuple(next(trials))), maximum, section)
        for one, reason in zip(chosen, reasons, strict=True)
    ]
    found = Extracted(section, maximum, tuple(visited), len(listed))
    if not found.ranking:
        if all(reasons):
            raise ValueError(
                f"every architecture that was visited is beyond the maximum point {maximum.name}; write a larger "
                "search.extraction.maximum"
            )
        raise ValueError(f"none of {len(visited)} architectures has a finite error; use smaller learning rates")
    if not found.ranking[0].w:
        say("search: all that was visited costs as much as the maximum point, so every W is 0; the cheapest is taken")
    return found


def weigh(
    one: Visited,
    maximum: Maximum,
    section: config.Extraction,
    inference: str | None = None,
    errors: Callable[[Errors], tuple[float, ...]] = lambda trial: trial.final,
) -> Visited:
    """Its W by the recipe that serves it best: the mean over seeds. `errors` chooses among what a trial tells."""
    costs, best = one.candidate.costs, replace(one, w=None)
    sizes = costs["parameters"], costs[inference or INFERENCE[section.inference]]
    for theta, trial in enumerate(one.trials):
        if trial is None:
            continue
        found = errors(trial)
        ws = [coefficient(maximum, *sizes, error, section.floor) for error in found]
        mean, spread = statistics.fmean(ws), statistics.stdev(ws) if len(ws) > 1 else None
        if best.w is None or mean > best.w:
            scored = replace(one.candidate, score=statistics.fmean(found))
            best = replace(one, candidate=scored, w=mean, w_std=spread, theta=theta)
    return best


# ---- how much the pick depends on what -------------------------------------------------------------------------------


def sensitivity(found: Extracted, other: Maximum | None) -> dict[str, Any]:
    """The pick under other settings, from the same judgements: without training anything again.

    `other` is the maximum point by the other inference cost, if that is known.
    """
    section, maximum = found.section, found.maximum
    scaled = {
        str(factor): replace(maximum, parameters=factor * maximum.parameters, inference=factor * maximum.inference)
        for factor in (1, 2, 10)
    }
    kinds = [kind for kind in INFERENCE if kind != section.inference]
    told: dict[str, Any] = {
        "maximum": {factor: _pick(found.visited, point, section) for factor, point in scaled.items()},
        "interval": {
            str(step * section.interval): _pick(every(found.visited, step), maximum, section)
            for step in (1, 2, 4, 8) if step <= len(found.visited)
        },
        "inference": {kind: _pick(found.visited, other, section, INFERENCE[kind]) for kind in kinds if other},
    }  # fmt: skip
    trials = [trial for one in found.visited for trial in one.trials if trial is not None]
    if all(trial.looks for trial in trials):
        looks = len(trials[0].looks[0])
        told["looks"] = {
            str(count): _pick(
                found.visited, maximum, section, errors=lambda trial, count=count: _lowest(trial.looks, count)
            )
            for count in sorted({-(-looks // 4), -(-looks // 2), looks})
        }
        told["half_of_the_rows"] = _pick(found.visited, maximum, section, errors=lambda trial: trial.half)
    return told


def _lowest(looks: tuple[tuple[float, ...], ...], count: int) -> tuple[float, ...]:
    return tuple(min(mine[:count]) for mine in looks)


def _pick(
    visited: Sequence[Visited],
    maximum: Maximum,
    section: config.Extraction,
    inference: str | None = None,
    errors: Callable[[Errors], tuple[float, ...]] = lambda trial: trial.final,
) -> str | None:
    name = inference or INFERENCE[section.inference]
    within = [
        one for one in visited if not beyond(maximum, one.candidate.costs["parameters"], one.candidate.costs[name])
    ]
    known = [one for one in (weigh(one, maximum, section, name, errors) for one in within) if one.w is not None]
    return str(max(known, key=lambda one: one.w or 0.0).candidate.arch) if known else None


# ---- results ---------------------------------------------------------------------------------------------------------


def front(found: Extracted) -> list[Visited]:
    """Those that no other beats in parameters, inference cost and error together, in the order of the list."""
    known = [one for one in found.visited if one.w is not None]
    points = [(one.candidate.costs["parameters"], one.candidate.costs[found.inference], one.candidate.score)
              for one in known]  # fmt: skip
    return [known[index] for index in non_dominated_sort(points)[0]]


def write_result(out: Path, found: Extracted, other: Maximum | None) -> dict[str, Any]:
    """Write `candidates.jsonl`, `pareto.json` and `arch.json` below `out`; returns the summary for `search.json`."""
    best = found.ranking[0]
    lines = [json.dumps(one.to_json(), ensure_ascii=False) for one in found.visited]
    write_atomic(out / "candidates.jsonl", "\n".join(lines) + "\n")
    write_json(out / "pareto.json", [one.to_json() for one in front(found)])
    write_json(out / "arch.json", best.candidate.arch.to_json())
    candidates = tuple(replace(one.candidate, score=_known(one)) for one in found.visited)
    about = summary(Result(candidates, "evaluations", None, False)) | {"best": best.to_json()}
    floored = sum(one.w is not None and one.candidate.score < found.section.floor for one in found.visited)
    extraction = {
        "maximum": found.maximum.name,
        "maximum_parameters": found.maximum.parameters,
        "maximum_inference": found.maximum.inference,
        "inference": found.inference,
        "interval": found.section.interval,
        "representative": found.section.representative,
        "space": found.size,
        "visited": len(found.visited),
        "rejected": sum(one.rejected is not None for one in found.visited),
        "floor": found.section.floor,
        "floored": floored,
        "ranking": [one.to_json() for one in found.ranking[:RANKING]],
        "sensitivity": sensitivity(found, other),
    }
    return {**about, "pareto": len(front(found)), "extraction": extraction}


def _known(one: Visited) -> float:
    return math.inf if one.w is None else one.candidate.score
