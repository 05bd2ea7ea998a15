"""ExtremeBERT's files in (arXiv 2211.17201: `[general] type = …`, `[hyperparams] …`), our names and settings out.

Their curves count steps after warm-up and know absolute rates; ours are functions of the share of the budget after
warm-up and of the peak rate. `num_iter`, or a budget in steps, says how many steps the whole is. Our own types and
settings may stand in such a file as well. No torch.
"""

from __future__ import annotations

import configparser
import difflib
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# Their type -> ours, and their settings -> ours.
CURVES: dict[str, tuple[str, dict[str, str]]] = {
    "linear_decay": ("linear", {}),
    "cosine_decay": ("cosine", {"t_0": "first", "t_mul": "growth", "min_lr": "minimum", "power": "power"}),
    "exponential_decay": ("exp", {"decay_step": "decay_step", "decay_rate": "decay_rate"}),
    "step_decay": ("step_decay", {"num_interval": "intervals", "decay_rate": "decay_rate"}),
    "elastic_step_decay": ("elastic_step", {"interval_shrink_rate": "shrink", "cr_k": "start"}),
    "inverse_time_decay": ("inverse_time", {"lambda": "decay"}),
    "piecewise_constant": ("piecewise_constant", {"starting_points": "points", "factors": "factors"}),
    "piecewise_inverse_time": (
        "piecewise_inverse_time", {"starting_points": "points", "a": "a", "b": "b", "min_lr": "minimum"},
    ),
    "poly_remain_time_decay": ("poly_remain_time", {"decay_rate": "power"}),
    "continuous_eigencurve": ("eigencurve", {"alpha": "alpha", "kappa": "kappa", "min_lr": "minimum"}),
}  # fmt: skip
COMMON = {"activation_point": "activation_point", "restarting_points": "restarting_points"}
IN_STEPS = {"t_0", "decay_step", "starting_points", "activation_point", "restarting_points"}
PER_STEP = {"lambda", "a"}
WORDS = {"yes": True, "true": True, "on": True, "no": False, "false": False, "off": False}


def read_ini(name: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """(type, settings) of the file `name`, relative to `folder`. Raises ValueError, FileNotFoundError."""
    path = folder / name
    if not path.is_file():
        raise FileNotFoundError(f"{name}: there is no file {path}")
    parser = configparser.ConfigParser(interpolation=None, default_section="")
    try:
        parser.read_string(path.read_text(encoding="utf-8-sig"))
    except (configparser.Error, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{name} is no settings file ({reason}); write [general] with type, and [hyperparams]"
        ) from None
    wrong = [section for section in parser.sections() if section not in ("general", "hyperparams")]
    if wrong:
        raise ValueError(f"{name} has a section {wrong[0]!r}; write [general] and [hyperparams] only")
    kind = parser.get("general", "type", fallback="").strip()
    if not kind:
        raise ValueError(f"{name} names no type; write for example type = cosine_decay below [general]")
    given = dict(parser["hyperparams"]) if parser.has_section("hyperparams") else {}
    return kind, {key: _value(text, f"{name}: {key}") for key, text in given.items()}


def _value(text: str, where: str) -> Any:
    """`yes`, a number, several numbers (a tuple), or else the text."""
    text = text.strip().strip("\"'")
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    parts = [part for part in re.split(r"[\s,\[\]()]+", text) if part]
    try:
        numbers: tuple[int | float, ...] = tuple(
            float(part) if re.search(r"[^\d+-]", part) else int(part) for part in parts
        )
    except ValueError:
        return text
    if not numbers or not all(map(math.isfinite, numbers)):
        raise ValueError(f"{where} is {text!r}; write a number")
    several = len(numbers) > 1 or "," in text or "[" in text
    return numbers if several else next(iter(numbers))


def curve_settings(name: str, folder: Path, steps: float | None, peak: float) -> tuple[str, dict[str, Any]]:
    """(our curve, our settings) of a curve's file.

    `steps`: of the budget after warm-up, if it counts them; `peak`: the peak rate. Raises ValueError or OSError.
    """
    kind, given = read_ini(name, folder)
    if kind not in CURVES:
        return kind, given
    ours, theirs = CURVES[kind]
    keys = {own: own for own in theirs.values()} | COMMON | theirs
    steps = _number(given.pop("num_iter", steps), f"{name}: num_iter")
    found: dict[str, Any] = {"steps": steps} if ours == "eigencurve" and steps else {}
    for key, value in given.items():
        if key not in keys:
            raise ValueError(f"{name}: {kind} has no setting {key}; {did_you_mean(key, [*keys, 'num_iter'])}")
        values = [_number(item, f"{name}: {key}") for item in (value if isinstance(value, tuple) else (value,))]
        if (key in IN_STEPS or key in PER_STEP) and not steps and any(values):
            raise ValueError(f"{name}: {key} counts steps; add num_iter, the number of steps after warm-up")
        scaled = tuple(_in_our_units(key, item, steps or 1.0, peak) for item in values)
        found[keys[key]] = scaled if isinstance(value, tuple) else scaled[0]
    return ours, found


def _in_our_units(key: str, value: float, steps: float, peak: float) -> float:
    """From steps and absolute rates to shares of the steps and of the peak rate."""
    if key in IN_STEPS:
        return value / steps
    if key in PER_STEP:
        return value * steps * (peak if key == "lambda" else 1.0)
    return value / peak if key == "min_lr" else value


def _number(value: Any, where: str) -> Any:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{where} is {value!r}; write a number")
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The half of a sentence that repairs a wrong name."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"it has {', '.join(known)}"
