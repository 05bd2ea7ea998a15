"""`python-docs`: the documentation strings of all Python packages installed here, found without importing any.

Every module of the standard library and of site-packages is parsed (`ast`), never run; each docstring of a module,
class or function becomes a document, cleaned like `inspect.cleandoc`. Folders of tests (labels rather than prose) and
of vendored packages (somebody else's prose) are left out. With torch, transformers and friends installed these are
about 80,000 documents and 40 MB.
"""

from __future__ import annotations

import ast
import gc
import inspect
import os
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from frugalbert.data.cleaning import Counts

NAME = "python-docs"
LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "testing", "idle_test"}
LEFT_OUT |= {"_vendor", "_vendored", "vendor", "vendored", "externals", "third_party"}  # other packages' text
UNIT_BYTES = 8_000_000  # source text per unit of work: seconds
MAX_BYTES = 5_000_000  # a longer module is generated data
Body = list[ast.stmt]


def units() -> list[dict[str, Any]]:
    """Units of work: `{"modules": [[package, path], …]}`, in the order of the packages' names."""
    found: dict[str, list[tuple[str, int]]] = {}
    for root in dict.fromkeys(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")):
        for package, path, size in _modules(Path(root)):
            found.setdefault(package, []).append((path, size))
    result: list[dict[str, Any]] = []
    space = 0
    for package in sorted(found):
        for path, size in found[package]:
            if size > space:
                result.append({"modules": []})
                space = UNIT_BYTES
            result[-1]["modules"].append([package, path])
            space -= size
    return result


def _modules(root: Path) -> Iterator[tuple[str, str, int]]:
    """(top-level package, path, bytes) of the `.py` files below a folder of packages, sorted."""
    for name, directories, names in os.walk(root):
        directories[:] = sorted(item for item in directories if item not in LEFT_OUT and item.isidentifier())
        for item in sorted(names):
            if item.endswith(".py") and not item.startswith("test_"):
                path = os.path.join(name, item)
                parts = os.path.relpath(path, root).split(os.sep)
                yield parts[0].removesuffix(".py"), path, os.path.getsize(path)


def read(unit: dict[str, Any], counts: Counts) -> Iterator[tuple[str, str, int, str]]:
    """(source, file, line, text) of every docstring, modules in order, each from its top to its end."""
    for package, path in unit["modules"]:
        for line, text in docstrings(Path(path), counts):
            yield f"{NAME}/{package}", path, line, text


def docstrings(path: Path, counts: Counts) -> list[tuple[int, str]]:
    """(line, text) of the docstrings of one file; a file that does not parse is counted and left out."""
    source = path.read_bytes()
    if (b'"""' not in source and b"'''" not in source) or len(source) > MAX_BYTES:
        return []
    collecting = gc.isenabled()
    gc.disable()  # a syntax tree is millions of objects and no garbage: a third of the time
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
        return sorted(_walk(tree))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        counts.drop(str(path), "no Python of this version")
        return []
    finally:
        if collecting:
            gc.enable()


def _walk(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[tuple[int, str]]:
    first = node.body[0] if node.body else None
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        yield first.lineno, inspect.cleandoc(first.value.value)
    waiting: list[Body] = [node.body]
    while waiting:
        for statement in waiting.pop():
            if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _walk(statement)
            elif isinstance(statement, ast.If):
                waiting += [statement.body, statement.orelse]
            elif isinstance(statement, ast.With):
                waiting.append(statement.body)
            elif isinstance(statement, ast.Try | ast.TryStar):
                waiting += [statement.body, statement.orelse, statement.finalbody]
                waiting += [handler.body for handler in statement.handlers]
