"""A user's own function: `file.py:function` beside the YAML, or a name that an installed package registers, in; the
function, and what it adds to a stage's identity, out.

These are the only ways in which a YAML names code. A file lies at or below the YAML's folder, its function is one plain
name, and its hash belongs to the stage's fingerprint. A package registers entry points in the groups
`frugalbert.optimizers` and `frugalbert.curves`; its name and version belong to the fingerprint. Settings must fit the
signature. No torch here.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from frugalbert.run import sha256

FORM = re.compile(r"([^:\0]+\.py):([A-Za-z_][A-Za-z0-9_]*)")
KINDS: dict[Any, tuple[type, ...]] = {bool: (bool,), int: (int,), float: (int, float), str: (str,)}
WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
NAMED: dict[Any, type] = {kind.__name__: kind for kind in (bool, int, float, str)}


def is_plugin(text: str) -> bool:
    """Whether a setting names a file rather than something built in."""
    return ".py:" in text


def is_ini(text: str) -> bool:
    """Whether a setting names a file of settings (`train/ini.py`)."""
    return text.endswith((".ini", ".conf", ".cfg"))


def plugin_path(spec: str, folder: Path) -> tuple[Path, str]:
    """(file, function name) of `file.py:function`. Raises ValueError, FileNotFoundError."""
    match = FORM.fullmatch(spec)
    if not match:
        raise ValueError(f"{spec!r} names no function; write file.py:function with a file beside the YAML")
    path = (folder / match[1]).resolve()
    if Path(match[1]).is_absolute() or folder.resolve() not in path.parents:
        raise ValueError(f"{spec!r} lies outside the YAML's folder {folder}; move the file beside the YAML")
    if not path.is_file():
        raise FileNotFoundError(f"{spec!r}: there is no file {path}")
    return path, match[2]


def plugin_digest(spec: str, folder: Path) -> str:
    """SHA-256 of the plug-in's file, for the fingerprint."""
    return sha256(plugin_path(spec, folder)[0])


def load_plugin(spec: str, folder: Path) -> Callable[..., Any]:
    """Import the file and return the function. Raises ValueError if it cannot be imported or is not there."""
    path, name = plugin_path(spec, folder)
    module_spec = importlib.util.spec_from_file_location(f"frugalbert_plugin_{path.stem}", path)
    assert module_spec is not None
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # the user's code may raise anything
        raise ValueError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    function = vars(module).get(name)
    if not callable(function):
        names = [
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and value.__module__ == module.__name__
        ]
        raise ValueError(f"{path} has no function {name}; it has {', '.join(names) or 'none'}")
    return function


def installed(kind: str) -> dict[str, list[EntryPoint]]:
    """What installed packages register as `kind` (`optimizer` or `curve`), by name; nothing is imported."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=f"frugalbert.{kind}s"):
        found.setdefault(point.name, []).append(point)
    return dict(sorted(found.items()))


def origin(point: EntryPoint) -> str:
    """`PACKAGE VERSION (module:function)` of a registered function."""
    return f"{point.dist.name} {point.dist.version} ({point.value})" if point.dist else point.value


def find(kind: str, name: str, builtin: Mapping[str, Callable[..., Any]], folder: Path) -> Callable[..., Any]:
    """The function called `name`: built in, `file.py:function` below `folder`, or registered. Raises ValueError."""
    if name in builtin:
        return builtin[name]
    if is_plugin(name):
        return load_plugin(name, folder)
    there = installed(kind)
    if name not in there:
        known = [*builtin, *there]
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {close[0]}?" if close else f"write one of {', '.join(known)}, or file.py:function"
        raise ValueError(f"pretrain.{kind}: there is no {kind} {name!r}; {hint}")
    point = there[name][0]
    if len(there[name]) > 1:
        both = " and ".join(map(origin, there[name]))
        raise ValueError(f"pretrain.{kind}: {name} is registered by {both}; uninstall one of them")
    try:
        function = point.load()
    except Exception as error:  # the package's code may raise anything
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ValueError(f"pretrain.{kind}: {name} of {origin(point)} cannot be imported: {why}") from error
    if not callable(function):
        raise ValueError(f"pretrain.{kind}: {name} of {origin(point)} is no function")
    return function


def outside(optimizer: str, curve: str) -> list[str]:
    """What the settings depend on besides the YAML: their files, and registered functions by package and version."""
    found = []
    for kind, name in (("optimizer", optimizer), ("curve", curve)):
        if is_plugin(name):
            found.append(name.rsplit(":", 1)[0])
        elif is_ini(name):
            found.append(name)
        else:
            found += [f"{kind} {name}: {origin(point)}" for point in installed(kind).get(name, ())]
    return found


def check_settings(
    function: Callable[..., Any], settings: Mapping[str, Any], key: str, given: Sequence[str] = ()
) -> None:
    """Settings must fit the function's signature; `given` are parameters filled by us. Raises ValueError for `key`."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [name for name in parameters if name not in given]
    for name, value in settings.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(known) or 'no settings'}"
            raise ValueError(f"{key}: there is no setting {name}; {hint}")
        _check_kind(parameters[name], value, f"{key}.{name}")
    missing = [name for name in known if parameters[name].default is inspect.Parameter.empty and name not in settings]
    if missing:
        raise ValueError(f"{key}: {missing[0]} must be set; write {{{missing[0]}: …}} there")


def _check_kind(parameter: inspect.Parameter, value: Any, key: str) -> None:
    """Compare with the annotation, or with the default's type, when that is one of the four scalar types."""
    kind = NAMED.get(parameter.annotation, parameter.annotation)
    if kind is parameter.empty and parameter.default is not None:
        kind = type(parameter.default)
    if kind not in KINDS:
        return
    if not isinstance(value, KINDS[kind]) or (kind is not bool and isinstance(value, bool)):
        raise ValueError(f"{key} is {value!r}; write {WORDS[kind]}")
