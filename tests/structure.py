"""The package as syntax trees, for the tests that look at its structure rather than at what it does; its benchmarks."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "frugalbert"


def benchmark(name: str) -> Any:
    """The module of benchmarks/NAME.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return importlib.import_module(name)


@dataclass(frozen=True)
class Import:
    """One imported module: `from frugalbert.data import shards` in train/loop.py names frugalbert.data.shards."""

    module: str
    line: int
    in_function: bool
    relative: bool
    typing_only: bool


def sources() -> dict[str, str]:
    """`{"frugalbert.data.corpus": source text}` of every module of the package."""
    found: dict[str, str] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


def path_of(module: str) -> str:
    """`frugalbert.data.corpus` -> `frugalbert/data/corpus.py`, as it is shown in a failure."""
    base = ROOT / Path(*module.split("."))
    return str((base / "__init__.py" if base.is_dir() else base.with_suffix(".py")).relative_to(ROOT))


def imports(module: str, source: str, modules: set[str]) -> Iterator[Import]:
    """Every import statement of a module, also those inside functions; `modules` decides what is a sub-module."""
    package = module if any(other.startswith(module + ".") for other in modules) else module.rpartition(".")[0]
    yield from _walk(ast.parse(source), package, modules, in_function=False, typing_only=False)


def _walk(node: ast.AST, package: str, modules: set[str], *, in_function: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(name.name, child.lineno, in_function, False, typing_only)
        elif isinstance(child, ast.ImportFrom):
            base = child.module or ""
            if child.level:
                parent = package.rsplit(".", child.level - 1)[0] if child.level > 1 else package
                base = f"{parent}.{base}" if base else parent
            for name in child.names:
                full = f"{base}.{name.name}"
                found = full if full in modules else base
                yield Import(found, child.lineno, in_function, bool(child.level), typing_only)
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            typed = typing_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test))
            yield from _walk(child, package, modules, in_function=inside, typing_only=typed)
