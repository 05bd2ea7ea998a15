"""Odd values anywhere in the files of a run: what the page must bear."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

VALUES = (
    None, True, 0, -1, 1e308, 1e-300, float("nan"), 10**400, "", "x", "\ud800", [], {}, [1], [[]], {"a": 1}, [None, {}],
)  # fmt: skip
ODD = st.sampled_from(VALUES)


def contents(run: Path, files: tuple[str, ...]) -> dict[str, Any]:
    """What the files hold: JSON values, JSON lines as a list."""
    texts = {name: (run / name).read_text() for name in files}
    lines = {name: [json.loads(line) for line in text.splitlines()] for name, text in texts.items() if name[-1] == "l"}
    return {name: json.loads(text) for name, text in texts.items() if name[-1] == "n"} | lines


def spoil(run: Path, whole: dict[str, Any], data: st.DataObject) -> None:
    """Write some of the files with up to four odd values each."""
    for name in data.draw(st.sets(st.sampled_from(list(whole)), min_size=1, max_size=3)):
        value = whole[name]
        for path in data.draw(st.lists(st.sampled_from(places(value)), max_size=4)):
            value = replaced(value, path, data.draw(ODD))
        rows = value if isinstance(value, list) and name[-1] == "l" else [value]
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every element of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """A copy of `value` with `new` at `path` (as it is, if an earlier replacement cut the way)."""
    if not path:
        return new
    if not isinstance(value, dict | list) or (isinstance(value, dict) and path[0] not in value):
        return value
    if isinstance(value, list) and (not isinstance(path[0], int) or path[0] >= len(value)):
        return value
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy
