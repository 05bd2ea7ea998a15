"""A YAML file (and `section.key=value` overrides) in; a validated `Config`, or every mistake with its place, out.

The YAML is the plain part of YAML 1.2: mappings, lists and scalars. Anchors, aliases, tags and several documents are
refused, duplicate keys too; `no` and `12:30` are text, `1e-3` is a number. Mistakes are collected and told at once as
`file:line:column: section.key: what is wrong, what to write`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from frugalbert.config import Config

MAX_BYTES, MAX_DEPTH, MAX_ERRORS = 1 << 20, 50, 20
NULLS, BOOLEANS = {"", "~", "null"}, {"true": True, "false": False}
INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]{0,18})")
FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*([eE][-+]?[0-9]+)?|\.?[0-9]+[eE][-+]?[0-9]+)")
NOT_FINITE = re.compile(r"[-+]?\.(nan|inf)", re.IGNORECASE)
Place = tuple[str | int, ...]
_Section = TypeVar("_Section", bound=BaseModel)
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Document:
    """Plain values, and where each of them stands (`('pretrain', 'budget') -> 'run.yaml:7:11'`)."""

    value: Any
    places: dict[Place, str] = field(default_factory=dict)

    def place(self, path: Place) -> str:
        while path and path not in self.places:
            path = path[:-1]
        return self.places.get(path, "")


class _Builder:
    """Builds a Document from the parser's events, refusing what is not plain as soon as it appears."""

    def __init__(self, text: str, name: str) -> None:
        self.name = name
        self.events: Iterator[Any] = yaml.parse(text, Loader=_Loader)
        self.document = Document(None)

    def build(self) -> Document:
        try:
            self._next()  # the stream's start
            if isinstance(self._next(), yaml.StreamEndEvent):
                raise ValueError(f"{self.name}: the file is empty; write at least `name:` and one section")
            self.document.value = self._node(self._next(), (), 0)
            self._next()  # the document's end
            extra = next(self.events)
            if not isinstance(extra, yaml.StreamEndEvent):
                raise ValueError(f"{self._at(extra)}: a second document starts here; keep one document in one file")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            where = f"{self.name}:{mark.line + 1}:{mark.column + 1}" if mark else self.name
            hint = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
            raise ValueError(f"{where}: this is not YAML: {error.problem or error.context}{hint}") from None
        except (yaml.YAMLError, StopIteration) as error:
            raise ValueError(f"{self.name}: this is not YAML: {str(error)[:200]}") from None
        return self.document

    def _at(self, event: Any) -> str:
        return f"{self.name}:{event.start_mark.line + 1}:{event.start_mark.column + 1}"

    def _next(self) -> Any:
        event = next(self.events)
        if isinstance(event, yaml.StreamStartEvent | yaml.StreamEndEvent | yaml.DocumentStartEvent):
            return event
        if getattr(event, "anchor", None):
            raise ValueError(f"{self._at(event)}: anchors and aliases are not allowed; write the value out")
        if getattr(event, "tag", None) and event.tag != "!":
            raise ValueError(f"{self._at(event)}: the tag {event.tag[:40]!r} is not allowed; write a plain value")
        return event

    def _node(self, event: Any, path: Place, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ValueError(f"{self._at(event)}: nested deeper than {MAX_DEPTH} levels; no setting needs that")
        self.document.places[path] = self._at(event)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event)
        if isinstance(event, yaml.SequenceStartEvent):
            items: list[Any] = []
            while not isinstance(event := self._next(), yaml.SequenceEndEvent):
                items.append(self._node(event, (*path, len(items)), depth + 1))
            return items
        mapping: dict[str, Any] = {}
        while not isinstance(event := self._next(), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent) or not event.value or event.value == "<<":
                raise ValueError(f"{self._at(event)}: a key must be a plain word")
            key, where = event.value, self._at(event)
            if key in mapping:
                raise ValueError(f"{where}: {key} is written twice (first at {self.document.places[(*path, key)]})")
            mapping[key] = self._node(self._next(), (*path, key), depth + 1)
            self.document.places[(*path, key)] = where
        return mapping

    def _scalar(self, event: Any) -> Any:
        text = event.value
        if event.style:  # quoted
            return text
        if text in NULLS:
            return None
        if text in BOOLEANS:
            return BOOLEANS[text]
        if INTEGER.fullmatch(text):
            return int(text)
        if FLOAT.fullmatch(text) or NOT_FINITE.fullmatch(text):
            number = (
                float(text.replace(".nan", "nan").replace(".inf", "inf")) if FLOAT.fullmatch(text) else float("nan")
            )
            if number - number != 0:
                raise ValueError(f"{self._at(event)}: {text[:40]} is not a finite number")
            return number
        return text


def parse(text: str, name: str) -> Document:
    """Plain values of YAML text. `name` stands before line and column in errors (ValueError)."""
    if "\0" in text:
        raise ValueError(f"{name}: contains NUL characters; this is not a text file")
    return _Builder(text, name).build()


def read_text(path: Path) -> str:
    """The file's text; refuses by name what is no UTF-8 text of sensible size."""
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a YAML file or a run directory")
    if path.is_dir():
        raise ValueError(f"{path} is a directory without a run in it; give a YAML file or a run directory")
    with open(path, "rb") as file:
        data = file.read(MAX_BYTES + 1)
    if len(data) > MAX_BYTES:
        raise ValueError(f"{path} is larger than 1 MiB; this is not a configuration")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; save it as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start}); save it as UTF-8") from None


def override(document: Document, setting: str) -> None:
    """Apply `section.key=value` (the value is YAML; `section=null` removes a section) in place."""
    dotted, equals, text = setting.partition("=")
    if not equals or not dotted:
        raise ValueError(f"{setting!r} is no override; write section.key=value, for example pretrain.budget=30m")
    value = parse(text, f"override {setting!r}").value if text.strip() else None
    path: list[str | int] = []
    parent, parts = document.value, dotted.split(".")
    for part in parts[:-1]:
        child = parent.get(part) if isinstance(parent, dict) else None
        if isinstance(parent, list) and part.isdigit() and int(part) < len(parent):
            child = parent[int(part)]
            part = int(part)
        elif not isinstance(child, dict | list):
            if not isinstance(parent, dict) or child is not None:
                raise ValueError(f"override {setting!r}: {part} has no keys below it")
            child = parent[part] = {}
        path.append(part)
        parent = child
    last: str | int = parts[-1]
    if isinstance(parent, list):
        if not (isinstance(last, str) and last.isdigit() and int(last) < len(parent)):
            raise ValueError(f"override {setting!r}: {'.'.join(map(str, path))} has {len(parent)} items, no {last}")
        last = int(last)
    parent[last] = value
    document.places[(*path, last)] = f"override {setting!r}"


def load(path: Path, overrides: Sequence[str] = ()) -> Config:
    """The validated configuration. Raises ValueError with every mistake, one per line."""
    document = parse(read_text(path), str(path))
    return validate(document, overrides, str(path))


def section_from(model: type[_Section], settings: Sequence[str]) -> _Section:
    """One section from `key=value` settings alone (for the verbs that work on a model directory)."""
    document = Document({})
    for setting in settings:
        override(document, setting)
    try:
        return model.model_validate(document.value)
    except ValidationError as error:
        raise ValueError("\n".join(_messages(error, document, model))) from None


def validate(document: Document, overrides: Sequence[str], name: str) -> Config:
    if not isinstance(document.value, dict):
        raise ValueError(f"{name}: the file must be a mapping of sections such as `corpus:` and `pretrain:`")
    for setting in overrides:
        override(document, setting)
    for section in [key for key, value in document.value.items() if value is None and key in Config.model_fields]:
        if any(document.place((section,)) == f"override {setting!r}" for setting in overrides):
            del document.value[section]  # removed on purpose
        elif section != "name":
            document.value[section] = {}  # `report:` with nothing below means its defaults
    try:
        return Config.model_validate(document.value)
    except ValidationError as error:
        raise ValueError("\n".join(_messages(error, document))) from None


# ---- from pydantic's errors to sentences ----------------------------------------------------------------------------

EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text (in quotes if it looks like a number)",
    "tuple_type": "a list such as [1, 2]",
    "dict_type": "keys with values",
    "model_type": "keys with values",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "letters, digits, `.`, `_` and `-` only, at most 100",
    "too_short": "at least {min_length} values",
    "too_long": "at most {max_length} values",
}


def _messages(error: ValidationError, document: Document, root: type[BaseModel] = Config) -> list[str]:
    """One line per place. The branches of a union (`auto` or a number) become one sentence."""
    grouped: dict[Place, list[dict[str, Any]]] = {}
    for item in error.errors(include_input=False, include_url=False):
        path, value = _path(item["loc"], document.value)
        if item["type"] == "missing":
            path = (*path, str(item["loc"][-1]))
        wrong_branch = {"string_type": dict, "model_type": str, "dict_type": str}.get(item["type"])
        if not (wrong_branch and isinstance(value, wrong_branch) and len(error.errors()) > 1):
            grouped.setdefault(path, []).append(dict(item))
    lines = [_sentence(path, items, document, root) for path, items in grouped.items()]
    hidden = len(lines) - MAX_ERRORS
    return lines[:MAX_ERRORS] + ([f"… and {hidden} more"] if hidden > 0 else [])


def _path(location: tuple[Any, ...], value: Any) -> tuple[Place, Any]:
    """The part of pydantic's location that exists in the document (unions and wrapped scalars add steps)."""
    path: list[str | int] = []
    for step in location:
        listed = isinstance(value, list) and isinstance(step, int) and step < len(value)
        if listed or isinstance(value, dict) and step in value:
            value = value[step]
            path.append(step)
    return tuple(path), value


def _sentence(path: Place, items: list[dict[str, Any]], document: Document, root: type[BaseModel]) -> str:
    dotted = ".".join(map(str, path))
    place = document.place(path)
    prefix = f"{place}: {dotted}: " if dotted else f"{place}: "
    kinds = {item["type"]: item for item in items}
    if "extra_forbidden" in kinds:
        return prefix + f"there is no such key{_did_you_mean(path, root)}"
    if "missing" in kinds:
        return prefix + f"is missing{_example(path)}"
    if "value_error" in kinds:
        return prefix + str(kinds["value_error"]["ctx"]["error"])
    _, value = _path(path, document.value)
    expected = [EXPECTED.get(kind, items[0]["msg"]).format(**(item.get("ctx") or {})) for kind, item in kinds.items()]
    text = repr(value) if isinstance(value, str) else yaml.safe_dump(value, default_flow_style=True).split("\n")[0]
    shown = text if len(text) <= 80 else text[:77] + "…"
    return prefix + f"{shown} is not accepted; write {' or '.join(dict.fromkeys(expected))}"


def _did_you_mean(path: Place, root: type[BaseModel]) -> str:
    models = _models_at(path[:-1], root)
    names = sorted({name for model in models for name in model.model_fields})
    close = difflib.get_close_matches(str(path[-1]), names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]}?"
    owners = [
        section
        for section, info in Config.model_fields.items()
        if any(path[-1] in model.model_fields for model in _models_in(info.annotation))
    ]
    if owners:
        return f"; it belongs into {' or '.join(owners)}"
    return f"; the keys are {', '.join(names)}" if names else ""


def _example(path: Place) -> str:
    examples = {"budget": "write budget: 30m", "name": "write name: my-run", "sources": "write sources: [texts/]"}
    return f"; {examples[str(path[-1])]}" if str(path[-1]) in examples else ""


def _models_at(path: Place, root: type[BaseModel]) -> list[type[BaseModel]]:
    models: list[type[BaseModel]] = [root]
    for step in path:
        if isinstance(step, str):
            infos = [model.model_fields[step] for model in models if step in model.model_fields]
            models = [found for info in infos for found in _models_in(info.annotation)]
    return models


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for argument in get_args(annotation) for model in _models_in(argument)]
