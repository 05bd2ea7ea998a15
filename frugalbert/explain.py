"""The configuration explains itself: its models in; a terminal page, `docs/config.md` and a JSON Schema out.

Everything shown is read from `config.py`: a key's type, bounds and default from its annotation, its meaning from the
text below it. `explain arch` lists the presets of `model/arch.py`, `explain patterns` the attention patterns of
`model/patterns.py`, `explain curves` the curves of `train/curves.py`. No torch here.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import shutil
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from frugalbert.config import Config
from frugalbert.model.arch import PRESETS, Arch
from frugalbert.plugins import installed, origin
from frugalbert.progress import number

VOCABULARY = 30522  # for the parameter counts of presets: BERT's


@dataclass(frozen=True)
class Key:
    """One key of the configuration: `pretrain.mask.rate`, what it takes, its default and what it means."""

    path: str
    kind: str
    default: str
    text: str
    nested: bool  # a mapping whose own keys follow

    @property
    def name(self) -> str:
        return self.path.rsplit(".", 1)[-1]


# ---- JSON Schema ----------------------------------------------------------------------------------------------------


def schema() -> str:
    """JSON Schema of the YAML file, for editors. Where a list is expected it also takes a single value, or a range."""
    return json.dumps(_with_single_values(_schema()), indent=1, ensure_ascii=False)


def _schema() -> dict[str, Any]:
    return {"title": "frugalbert run", **Config.model_json_schema(by_alias=True)}


def _with_single_values(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_single_values(item) for item in value]
    if not isinstance(value, dict):
        return value
    value = {key: _with_single_values(item) for key, item in value.items()}
    if isinstance(value.get("default"), dict) and value.get("type") == "string":
        value["default"] = _default(value)
    if value.get("type") != "array" or "items" not in value or value.get("minItems", 0) > 1:
        return value
    about = {key: value.pop(key) for key in ("default", "description", "title") if key in value}
    text = [{"type": "string", "pattern": value.pop("pattern")}] if "pattern" in value else []
    return {**about, "anyOf": [value, value["items"], *text]}


# ---- from the schema to keys ----------------------------------------------------------------------------------------


def all_keys() -> Iterator[Key]:
    """Every key in the order of the file; a mapping comes before its own keys (`corpus.sources[].path` for lists)."""
    whole = _schema()
    yield from _keys(whole, whole["$defs"], "")


def _keys(model: dict[str, Any], models: dict[str, Any], prefix: str) -> Iterator[Key]:
    for name, info in model["properties"].items():
        inner = _model_in(info, models)
        is_list = "items" in info or "patternProperties" in info  # of mappings, or mappings by name
        default = "required" if name in model.get("required", ()) else _default(info)
        text = " ".join(str(info.get("description", "")).split())
        if inner is not None and not is_list:
            optional = any(part.get("type") == "null" for part in info.get("anyOf", ()))
            default = "absent" if optional else ""
            text = " ".join(str(inner.get("description", text)).split())
        yield Key(prefix + name, _kind(info), default, text, inner is not None and not is_list)
        if inner is not None:
            more = ".NAME" if "patternProperties" in info else "[]" if is_list else ""
            yield from _keys(inner, models, f"{prefix}{name}{more}.")


def _model_in(info: dict[str, Any], models: dict[str, Any]) -> dict[str, Any] | None:
    """The model that a key's value (or the items of its list) is an instance of, if any."""
    for part in (
        info,
        *info.get("patternProperties", {}).values(),
        info.get("items", {}),
        *info.get("anyOf", ()),
        *info.get("items", {}).get("anyOf", ()),
    ):
        if "$ref" in part:
            return models[part["$ref"].rsplit("/", 1)[-1]]
    return None


def _kind(info: dict[str, Any]) -> str:
    """What a key takes, in words: `whole number, 1 or more`."""
    if "$ref" in info:
        return "mapping"
    if "anyOf" in info:
        return " or ".join(_kind(part) for part in info["anyOf"] if part.get("type") != "null")
    if "const" in info:
        return f"`{info['const']}`"
    if "enum" in info:
        return ", ".join(f"`{item}`" for item in info["enum"])
    if info.get("type") == "array":
        if "prefixItems" in info:
            return f"list of {len(info['prefixItems'])}: {_kind(info['prefixItems'][0])}"
        return f"list: {_kind(info['items'])}"
    if info.get("type") == "string" and "24h" in info.get("examples", ()):
        return "budget"
    names = {"string": "text", "integer": "whole number", "number": "number", "boolean": "`true` or `false`"}
    return names.get(info.get("type", ""), "mapping") + _bounds(info)


def _bounds(info: dict[str, Any]) -> str:
    limits = {name: f"{info[name]:.10g}" for name in info if "imum" in name}
    if "minimum" in limits and "maximum" in limits:
        return f", {limits['minimum']} to {limits['maximum']}"
    words = {
        "minimum": "{} or more",
        "exclusiveMinimum": "above {}",
        "maximum": "at most {}",
        "exclusiveMaximum": "below {}",
    }
    found = [text.format(limits[name]) for name, text in words.items() if name in limits]
    return f", {' and '.join(found)}" if found else ""


def _default(info: dict[str, Any]) -> str:
    value = info.get("default")
    if isinstance(value, dict) and set(value) == {"kind", "amount"}:
        from frugalbert.budget import Budget

        return str(Budget(**value))
    if value is None:
        return "unset"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- pages ----------------------------------------------------------------------------------------------------------


def explain(section: str | None = None) -> str:
    """The page of a section (`pretrain`), mapping (`pretrain.mask`) or key, of `arch`, `patterns`, `curves`, or of all.

    Raises ValueError for a name that is not there.
    """
    found = list(all_keys())
    tables = {"arch": presets, "patterns": patterns, "curves": functools.partial(curves, registered=True)}
    if section in tables:
        return _terminal_table(tables[section]())
    chosen = [key for key in found if section is None or key.path == section or key.path.startswith(f"{section}.")]
    if not chosen and section is not None:
        known = [*(key.path for key in found), *tables]
        ends = [path for path in known if path.rsplit(".", 1)[-1] == section]
        close = ends or difflib.get_close_matches(section, known, n=3)
        sections = ", ".join([*Config.model_fields, *tables])
        raise ValueError(
            f"there is no {section!r} to explain; "
            + (f"did you mean {', '.join(close)}?" if close else f"write one of {sections}")
        )
    base = min(key.path.count(".") for key in chosen)
    return "\n".join(line for key in chosen for line in _paragraph(key, key.path.count(".") - base))


def _width() -> int:
    return max(60, min(110, shutil.get_terminal_size((100, 24)).columns))


def _paragraph(key: Key, depth: int) -> list[str]:
    indent = "  " * depth
    name = key.path if depth == 0 else key.name
    head = f"{indent}{name}:" if key.nested else f"{indent}{name}: {key.default}"
    if not key.nested:
        head += f"  ({_plain(key.kind)})"
    elif key.default == "absent" and depth:
        head += "  (absent unless written)"
    body = textwrap.wrap(_plain(key.text), _width(), initial_indent=indent + "    ", subsequent_indent=indent + "    ")
    return ([""] if depth == 0 else []) + [head, *body]


def _plain(text: str) -> str:
    return text.replace("`", "")


# ---- presets and curves ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A titled table of texts."""

    text: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]


def presets() -> Table:
    from frugalbert.model.cost import parameter_count

    text = (
        "Values of `pretrain.arch`. A line of your own has the same form; `heads=8*2,4` gives one value per layer. "
        f"Parameters are counted with the masked-LM head at a vocabulary of {VOCABULARY}."
    )
    rows: list[tuple[str, ...]] = []
    for name, line in PRESETS.items():
        count = parameter_count(Arch.parse(line), VOCABULARY, "mlm")
        rows.append((name, f"{count / 1e6:.1f} M", line))
    return Table(text, ("preset", "parameters", "line"), rows)


def patterns() -> Table:
    from frugalbert.model.patterns import KINDS

    text = (
        "Values of `pattern=` in a line of `pretrain.arch`, one for all layers or a list: `pattern=window:64*3,dense`; "
        "one for all heads, or `toeplitz:0..3+17|dense^3` for each. Queries are i, keys j; positions count within a "
        "document. `&0+64+sep` behind it: tokens that see all and are seen by all. Papers' names: `star`, "
        "`longformer:5/0+64`, `strided:4`, `fixed:4/1`, `bigbird`."
    )
    return Table(text, ("pattern", "pairs (i, j) that may meet"), [(form, rule) for _, form, rule in KINDS.values()])


def curves(*, registered: bool = False) -> Table:
    from frugalbert.train.curves import CURVES

    text = (
        "Values of `pretrain.curve`: the factor on the peak rate as a function of x, the share of the budget after "
        "warm-up. Settings go into `pretrain.curve_options`."
    )
    rows: list[tuple[str, ...]] = []
    for name, function in CURVES.items():
        options = ", ".join(
            item.name if item.default is item.empty else f"{item.name}={number(item.default)}"
            for item in inspect.signature(function).parameters.values()
        )
        first = " ".join((inspect.getdoc(function) or "").split("\n\n")[0].split())
        rows.append((name, options or "none", first))
    points = [point for found in installed("curve").values() for point in found] if registered else []
    rows += [(point.name, "its own", f"Registered by {origin(point)}.") for point in points]
    return Table(text, ("curve", "options", "factor"), rows)


def _terminal_table(table: Table) -> str:
    lines = textwrap.wrap(_plain(table.text), _width()) + [""]
    widths = [max(len(row[column]) for row in [table.head, *table.rows]) for column in range(len(table.head) - 1)]
    if sum(widths) > _width() // 2:  # long settings: the explanation goes below
        for row in table.rows:
            lines += [
                f"{row[0]}  ({row[1]})",
                *textwrap.wrap(_plain(row[2]), _width() - 4, initial_indent="    ", subsequent_indent="    "),
            ]
        return "\n".join(lines)
    for row in [table.head, *table.rows]:
        lines.append(
            "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip()
        )
    return "\n".join(lines)
