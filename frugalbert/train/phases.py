"""The parts of a budget: a training's section in; row length, batch, masks and schedule at any progress out.

Pure functions, no torch: `plan` says the same numbers. Two phases with a schedule each are NVIDIA's BERT (128 tokens,
then 512; LAMB, arXiv 1904.00962, section 4.1): the second warms up again to a rate of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from frugalbert.config import Mask, Ramp, Training


@dataclass(frozen=True)
class Span:
    """One part of the budget, from progress `start` to `end`. `rows` of `length` tokens make a global batch; `schedule`
    is the number of the learning-rate schedule it belongs to, which runs from `begin` to `finish`, warms up for the
    share `warmup` of that, and peaks at `peak` times the section's rate."""

    start: float
    end: float
    length: int
    rows: int
    mask: Mask
    schedule: int = 0
    begin: float = 0.0
    finish: float = 1.0
    warmup: float = 0.0
    peak: float = 1.0

    def within(self, progress: float) -> float:
        """Progress within the schedule."""
        return min(1.0, max(0.0, (progress - self.begin) / (self.finish - self.begin)))


def spans(section: Training, first: int) -> list[Span]:
    """The budget's parts in order: rows of `first` tokens, then the phases, which take their shares at its end."""
    start, tokens = 1.0 - sum(phase.share for phase in section.phases), section.batch_size * first
    whole = Span(0.0, start, first, section.batch_size, section.mask, warmup=section.warmup)
    found = _ramp(whole, section.batch_ramp) if section.batch_ramp else [whole]
    for phase in section.phases:
        before, mask = found[-1], section.mask
        if phase.max_predictions is not None:
            mask = mask.model_copy(update={"max_predictions": phase.max_predictions})
        tokens = tokens if phase.batch_size is None else phase.batch_size * phase.length
        rows = max(1, tokens // phase.length)
        here = replace(before, start=start, end=start + phase.share, length=phase.length, rows=rows, mask=mask)
        if phase.learning_rate is not None:
            peak, warmup = phase.learning_rate / section.learning_rate, phase.warmup
            here = replace(here, schedule=here.schedule + 1, begin=start, peak=peak)
            here = replace(here, warmup=section.warmup if warmup is None else warmup)
        found.append(here)
        start += phase.share
    ends = {span.schedule: span.end for span in found[:-1]} | {found[-1].schedule: 1.0}
    return [replace(span, finish=ends[span.schedule]) for span in found]


def _ramp(whole: Span, ramp: Ramp) -> list[Span]:
    """The span in parts of doubling batches, each from where the straight line passes it; rates by the square root."""
    sizes = [ramp.start]
    while 2 * sizes[-1] < whole.rows:
        sizes.append(2 * sizes[-1])
    sizes.append(whole.rows)
    starts = [ramp.share * (size - ramp.start) / (whole.rows - ramp.start) for size in sizes]
    ends = [*starts[1:], whole.end]
    peaks = [(size / whole.rows) ** 0.5 for size in sizes]
    parts = zip(starts, ends, sizes, peaks, strict=True)
    return [replace(whole, start=low, end=high, rows=rows, peak=peak) for low, high, rows, peak in parts]


def at(found: Sequence[Span], progress: float) -> Span:
    """The part that `progress` lies in."""
    return next(span for span in reversed(found) if progress >= span.start - 1e-12 or span is found[0])


def tokens_per_step(found: Sequence[Span], kind: str) -> float:
    """Places of a global batch, the mean over the steps of a budget of this kind; tokens take equal times."""
    if kind == "steps":
        return sum((span.end - span.start) * span.rows * span.length for span in found)
    return 1.0 / sum((span.end - span.start) / (span.rows * span.length) for span in found)


def per_token(found: Sequence[Span], cost: Callable[[Span], float]) -> float:
    """The mean of a cost per token over a budget in steps."""
    places = [(span.end - span.start) * span.rows * span.length for span in found]
    return sum(count * cost(span) for count, span in zip(places, found, strict=True)) / sum(places)
