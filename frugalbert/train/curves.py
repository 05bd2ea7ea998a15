"""Learning-rate curves: progress in [0, 1] in, the factor on the peak rate out. Pure functions; no torch.

`x` is the share of the budget after warm-up (of all of it with `poly`), so every curve works for hours, tokens, steps
and epochs alike, in any call order, and across restarts. Points and steps in the settings are shares of x too. Sources:
24hBERT (arXiv 2104.07705) for `linear` and `exp`, `wsd` arXiv 2405.18392, `poly` NVIDIA's BERT, ExtremeBERT (arXiv
2211.17201) for the others.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from frugalbert.plugins import check_settings, find, is_ini
from frugalbert.train.ini import CURVES as THEIRS
from frugalbert.train.ini import curve_settings, did_you_mean

Curve = Callable[[float], float]
Points = tuple[float, ...]


def linear() -> Curve:
    """1 - x: to zero exactly at the end."""
    return lambda x: 1.0 - x


def cosine(first: float = 1.0, growth: float = 1.0, minimum: float = 0.0, power: float = 1.0) -> Curve:
    """Half a cosine from 1 to `minimum`, restarted after `first`; each further segment is `growth` times as long."""
    if not (0.0 < first <= 1.0 and growth >= 1.0):
        raise ValueError("pretrain.curve_options: cosine needs 0 < first <= 1 and growth >= 1")

    def factor(x: float) -> float:
        start, length = 0.0, first
        while x >= start + length and start + length < 1.0:
            start, length = start + length, length * growth
        share = min(1.0, (x - start) / length)
        return (minimum + (1.0 - minimum) * 0.5 * (1.0 + math.cos(math.pi * share))) ** power

    return factor


def wsd(cooldown: float = 0.2) -> Curve:
    """Warm-up, stable, decay: 1, then 1 - sqrt over the last `cooldown`."""
    if not 0.0 < cooldown <= 1.0:
        raise ValueError("pretrain.curve_options: wsd needs a cooldown above 0 and at most 1, for example 0.4")
    return lambda x: 1.0 - math.sqrt(max(0.0, x - (1.0 - cooldown)) / cooldown)


def constant() -> Curve:
    """1 all the way."""
    return lambda x: 1.0


def exp(decay_rate: float = 0.01, decay_step: float = 1.0) -> Curve:
    """decay_rate to the power of x / decay_step; the warm-up before it is quadratic."""
    if not (0.0 < decay_rate <= 1.0 and decay_step > 0.0):
        raise ValueError("pretrain.curve_options: exp needs 0 < decay_rate <= 1 and decay_step > 0")
    return lambda x: decay_rate ** (x / decay_step)


def inverse_time(decay: float = 10.0) -> Curve:
    """1 / (1 + decay x); `decay` is peak rate times lambda times steps of the usual form."""
    return lambda x: 1.0 / (1.0 + decay * x)


def piecewise_constant(points: Points, factors: Points) -> Curve:
    """1 before the first point, then factors[i] from points[i] on."""
    _check_pieces(points, factors=factors)
    return lambda x: factors[index - 1] if (index := bisect_right(points, x)) else 1.0


def piecewise_inverse_time(points: Points, a: Points, b: Points, minimum: float | None = None) -> Curve:
    """1 / (a[i] (x - points[i]) + b[i]) from points[i] on, rescaled to end at `minimum` if that is set."""
    _check_pieces(points, a=a, b=b)
    if points[0] != 0.0:
        raise ValueError("pretrain.curve_options: the first of points must be 0")

    def factor(x: float) -> float:
        index = bisect_right(points, x) - 1
        return 1.0 / (a[index] * (x - points[index]) + b[index])

    return factor if minimum is None else _ending_at(minimum, factor)


def step_decay(intervals: float = 10.0, decay_rate: float = 2.0) -> Curve:
    """Divided by `decay_rate` after each of `intervals` equal parts."""
    if not (intervals >= 1.0 and decay_rate > 1.0):
        raise ValueError("pretrain.curve_options: step_decay needs intervals >= 1 and decay_rate > 1")
    return lambda x: decay_rate ** -math.floor(x * intervals + 1e-9)


def elastic_step(shrink: float = math.sqrt(2.0), start: float = 6.0) -> Curve:
    """ExtremeBERT's: parts end at 1 - shrink^-K; from part `start` on each is shrink/2 (or 1) times the last."""
    if not (shrink > 1.0 and start >= 2.0):
        raise ValueError("pretrain.curve_options: elastic_step needs shrink > 1 and start >= 2")

    def factor(x: float) -> float:
        if x >= 1.0:
            return 0.0
        part = math.floor(-math.log(1.0 - x) / math.log(shrink) + 1e-9)
        return min(1.0, min(1.0, shrink / 2.0) ** (part - start + 1.0))

    return factor


def poly_remain_time(power: float = 1.0) -> Curve:
    """(1 - x) to the power of `power`."""
    if power < 0.0:
        raise ValueError("pretrain.curve_options: poly_remain_time needs power >= 0")
    return lambda x: (1.0 - x) ** power


def poly(power: float = 0.5) -> Curve:
    """(1 - p) to the power of `power`, of the whole budget p: it falls at once where warm-up ends (NVIDIA's BERT)."""
    return poly_remain_time(power)


def eigencurve(steps: float = 10000.0, alpha: float = 2.0, kappa: float = 100.0, minimum: float = 0.0) -> Curve:
    """Fitted to a Hessian with eigenvalues of power law `alpha` and condition number `kappa` (arXiv 2110.14109)."""
    if alpha in (1.0, 3.0) or kappa <= 1.0:
        raise ValueError("pretrain.curve_options: eigencurve needs alpha other than 1 and 3, and kappa > 1")
    tail = kappa ** ((1.0 - alpha) / 2.0)

    def factor(x: float) -> float:
        bend = (1.0 - x * (1.0 - tail)) ** (1.0 - 2.0 / (alpha - 1.0))
        return 1.0 / (1.0 + steps / kappa * (alpha - 1.0) / (alpha - 3.0) * (bend - 1.0) / (tail - 1.0))

    return _ending_at(minimum, factor)


CURVES: dict[str, Callable[..., Curve]] = {
    function.__name__: function
    for function in (linear, cosine, wsd, constant, exp, inverse_time, piecewise_constant, piecewise_inverse_time,
                     step_decay, elastic_step, poly_remain_time, poly, eigencurve)
}  # fmt: skip
UNSCALED = ("poly",)
"""Curves of the whole budget instead of what warm-up leaves of it."""


def _check_pieces(points: Points, **values: Points) -> None:
    if list(points) != sorted(points) or not points:
        raise ValueError("pretrain.curve_options: points must be rising shares such as [0.5, 0.8]")
    for name, found in values.items():
        if len(found) != len(points):
            raise ValueError(f"pretrain.curve_options: {len(points)} points need as many {name}, not {len(found)}")


def _points(value: Any) -> Points:
    return tuple(value) if isinstance(value, tuple | list) else (float(value),)


def _ending_at(minimum: float, factor: Curve) -> Curve:
    """The same curve stretched so that its first value stays and its last one is `minimum`."""
    first, last = factor(0.0), factor(1.0)
    return lambda x: minimum + (factor(x) - last) * (first - minimum) / (first - last)


# ---- from the YAML ---------------------------------------------------------------------------------------------------


Scale = tuple[float | None, float]
"""(steps after warm-up if the budget counts them, peak rate): what the units of ExtremeBERT's files are relative to."""


def curve(
    name: str, options: Mapping[str, Any] | None = None, folder: Path = Path(), scale: Scale = (None, 1.0)
) -> Curve:
    """The curve called `name` (built in, registered, or ExtremeBERT's settings file below `folder`), or a user's
    `file.py:function(x, …)` below `folder`. Raises ValueError.

    Two settings go with every curve: `activation_point` A, before which it stays at its start, and `restarting_points`,
    from each of which it begins anew.
    """
    settings, where = dict(options or {}), "pretrain.curve_options"
    if is_ini(name):
        where, (name, found) = name, curve_settings(name, folder, *scale)
        settings = found | settings
        if name not in CURVES:
            raise ValueError(f"{where}: there is no curve {name!r}; {did_you_mean(name, [*THEIRS, *CURVES])}")
    late = float(settings.pop("activation_point", 0.0))
    restarts = _points(settings.pop("restarting_points", ()))
    for key in settings.keys() & {"points", "factors", "a", "b"}:
        settings[key] = _points(settings[key])
    function = find("curve", name, CURVES, folder)
    if name in CURVES:
        check_settings(function, settings, where)
        shape: Curve = function(**settings)
    else:
        check_settings(function, settings, where, given=("x",))
        shape = partial(function, **settings)
    if not late and not restarts:
        return shape

    def moved(x: float) -> float:
        x = max(0.0, x - late)
        return shape(x - max((point for point in restarts if point <= x), default=0.0))

    return moved


def rate(progress: float, warmup: float, shape: Curve, warmup_power: float = 1.0, *, rescaled: bool = True) -> float:
    """Factor on the peak rate at `progress` of the budget: (p / warmup)^power, then the curve over the rest, or, not
    `rescaled`, over p itself."""
    if progress < warmup:
        return (progress / warmup) ** warmup_power
    return max(0.0, shape(min(1.0, (progress - warmup) / (1.0 - warmup) if rescaled else progress)))
