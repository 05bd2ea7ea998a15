"""How the report writes things: figures with sensible precision, foreign text made harmless to read, secrets masked.

In: any JSON value, however odd. Out: short text; HTML escaping is the template's job.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from frugalbert.progress import duration

LONGEST, LARGEST = 20_000, 1e40
MASKED = "••••••"
NONE = "–"
NARROW = "\u00a0"  # keeps a figure and its unit on one line
SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
# Control, bidirectional and other invisible characters that could make a page read differently from its source.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff"
    "\ud800-\udfff]"
)
_SECRET = r"(?:token|secret|password|passwd|passphrase|credentials?|(?:api|access|private|auth)[_-]?key|auth)"
SECRET_NAME = re.compile(rf"(?:.*[_.\- ])?{_SECRET}", re.IGNORECASE)
SECRET_VARIABLE = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|(API|ACCESS|PRIVATE)_?KEY", re.IGNORECASE)
ASSIGNED = re.compile(
    rf"(?<![\w.-])([\"']?(?:[\w.-]*[_.-])?{_SECRET}[\"']?[ \t]*[:=][ \t]*)"
    r"(\"[^\"\n]+\"|'[^'\n]+'|[^\s,}&\[][^\n,}&]*)",
    re.IGNORECASE,
)
SECRET_VALUE = re.compile(
    r"(?<![\w-])(?:hf_\w{16,}|(?:sk|pk|rk)-[\w-]{16,}|gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}"
    r"|xox[abprs]-[\w-]{10,}|AKIA[0-9A-Z]{12,}|AIza[\w-]{30,}|wandb_v1_\w{16,}|eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
    r"|(?=\w*[a-z])(?=\w*[A-Z])(?=\w*\d)[A-Za-z0-9_]{32,}(?!\w))"
    r"|(?<=://)[^\s/@:]+:[^\s/@]+(?=@)|(?<=[Bb]earer )[\w.~+/-]{16,}"
)


# ---- foreign text ---------------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """Invisible characters spelt out (U+202E becomes ⟨U+202E⟩), secrets masked, the length bounded."""
    text = mask(text[: 2 * LONGEST])
    text = INVISIBLE.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)
    return text if len(text) <= LONGEST else text[:LONGEST] + "…"


def mask(text: str) -> str:
    """Replace everything that looks like a token, and every value of a secret environment variable."""
    for value in _secret_values():
        text = text.replace(value, MASKED)
    return SECRET_VALUE.sub(MASKED, ASSIGNED.sub(rf"\1{MASKED}", text))


def _secret_values() -> list[str]:
    values = [value for name, value in os.environ.items() if SECRET_VARIABLE.search(name) and len(value) >= 8]
    return sorted(values, key=len, reverse=True)


def cleaned(value: Any, name: str = "") -> Any:
    """`clean` applied to every text and key of a JSON value; texts under a secret-looking key are masked whole."""
    if isinstance(value, str):
        return MASKED if value and SECRET_NAME.fullmatch(name) else clean(value)
    if isinstance(value, dict):
        return {_key(key): cleaned(item, key) for key, item in value.items()}
    return [cleaned(item, name) for item in value] if isinstance(value, list) else value


def _key(key: str) -> str:
    plain_name = len(key) <= 32 and key.isascii() and key.isidentifier() and key.islower()
    return key if plain_name else clean(key)


def short(value: Any, length: int = 80) -> str:
    """At most `length` characters on one line, cut in the middle so that both ends of a path stay readable."""
    text = " ".join(str(value).split())
    return text if len(text) <= length else f"{text[: length // 2 - 1]} … {text[-(length // 2 - 2) :]}"


# ---- figures --------------------------------------------------------------------------------------------------------


def figure(value: Any) -> float | None:
    """A number of sane size (a run has none beyond 1e40), or None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        value = float(value)
    except OverflowError:
        return None
    if not abs(value) <= LARGEST:
        return None
    return value if abs(value) > 1 / LARGEST else 0.0


def get(mapping: Any, *keys: str) -> Any:
    """`get(a, "b", "c")` is `a["b"]["c"]`, or None where the way ends."""
    for key in keys:
        mapping = mapping.get(key) if isinstance(mapping, Mapping) else None
    return mapping


def at(mapping: Any, *keys: str) -> float | None:
    """As `get`, but only finite numbers."""
    return figure(get(mapping, *keys))


def items_at(mapping: Any, *keys: str) -> list[tuple[str, Any]]:
    """As `get`, but the items of an object."""
    value = get(mapping, *keys)
    return list(value.items()) if isinstance(value, dict) else []


def list_at(mapping: Any, *keys: str) -> list[Any]:
    """As `get`, but the elements of a list."""
    value = get(mapping, *keys)
    return value if isinstance(value, list) else []


def text_at(mapping: Any, *keys: str) -> str:
    """As `get`, but as short text; empty where there is none."""
    value = get(mapping, *keys)
    return "" if value is None or isinstance(value, dict | list) else short(value)


def count(value: Any) -> str:
    """`61465` -> `61,465`."""
    number = figure(value)
    return NONE if number is None else _minus(f"{number:,.0f}")


def big(value: Any) -> str:
    """Three digits and a scale: `30.1 M`, `812 k`, `5,120`."""
    number = figure(value)
    if number is None:
        return NONE
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(number) >= size * 0.9995:
            return f"{significant(number / (1e3 if unit == 'k' else size))}{NARROW}{unit}"
    return _minus(f"{number:,.0f}" if number == round(number) else significant(number))


def significant(value: Any, digits: int = 3) -> str:
    """`digits` significant digits without an exponent for ordinary sizes, thousands separated."""
    number = figure(value)
    if number is None:
        return NONE
    if number == 0:
        return "0"
    base, power = f"{number:.{digits - 1}e}".split("e")  # rounded first: 0.9999 is 1.00
    if int(power) < -4:
        return _minus(f"{base}{NARROW}×{NARROW}10{str(int(power)).translate(SUPERSCRIPT)}")
    places = digits - 1 - int(power)
    return _minus(f"{round(number, places):,.{max(0, places)}f}")


def tick(value: float) -> str:
    """A label of an axis: no more digits than it needs, `25 k`, `0.002`."""
    scale, unit = next(
        ((size, unit) for size, unit in ((1e9, " G"), (1e6, " M"), (1e4, " k")) if abs(value) >= size), (1.0, "")
    )
    return _minus(f"{value / (1e3 if unit == ' k' else scale):.4g}{unit}")


def fixed(value: Any, places: int = 1) -> str:
    number = figure(value)
    return NONE if number is None else _minus(f"{number:,.{places}f}")


def percent(value: Any, places: int = 1) -> str:
    """A share as `99.3 %`."""
    number = figure(value)
    return NONE if number is None else f"{_minus(f'{100 * number:,.{places}f}')}{NARROW}%"


def size(value: Any) -> str:
    """Bytes in decimal units: `12.3 MB`."""
    number = figure(value)
    if number is None:
        return NONE
    for scale, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(number) >= scale * 0.9995:
            return f"{significant(number / scale)}{NARROW}{unit}"
    return f"{number:,.0f} bytes"


def took(value: Any) -> str:
    """Seconds as `3 min 20 s`, on one line."""
    number = figure(value)
    return NONE if number is None else duration(number).replace(" ", NARROW)


def milliseconds(value: Any) -> str:
    """`172`, `25.0`, `1.24`, `0.45`, `0.081`: the unit stands beside it."""
    number = figure(value)
    return NONE if number is None else significant(number, 3 if abs(number) >= 1 else 2)


def flops(value: Any) -> str:
    number = figure(value)
    if number is None:
        return NONE
    for scale, unit in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1e3, "kFLOP")):
        if abs(number) >= scale:
            return f"{significant(number / scale)}{NARROW}{unit}"
    return f"{big(number)}{NARROW}FLOP"


def plain(value: Any) -> str:
    """Any JSON value in a table cell."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no"}.get(value, NONE)
    if isinstance(value, int):
        return count(value)
    if isinstance(value, float):
        return significant(value, 4)
    return short(value, 120)


def _minus(text: str) -> str:
    return text.replace("-", "−") if text.startswith("-") else text
