"""Complexity has a price: short files, short functions, few parameters, and a line budget for the whole package.

An exception is one line here with its reason; one that is no longer needed fails too.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.structure import path_of, sources

FILE_LINES, FUNCTION_LINES, PARAMETERS = 400, 60, 7
PACKAGE_LINES = 35_000

LONG_FILES = {
    "frugalbert/config.py": "one page with every setting is the point of it; more than half is documentation",
}
LONG_FUNCTIONS: dict[str, str] = {}
MANY_PARAMETERS = {
    "frugalbert/cli.py:grid": "a verb has a parameter per option, and these are the reference's and the formats",
    "frugalbert/model/modeling.py:FrugalForMaskedLM.forward": "inputs have Hugging Face's names, one each",
    "frugalbert/model/modeling.py:FrugalForPairs.forward": "the same",
}


def functions(module: str, source: str) -> Iterator[tuple[str, int, int]]:
    """(`frugalbert/run.py:drift`, lines without docstring and decorators, parameters without self) of each function."""

    def walk(node: ast.AST, prefix: str) -> Iterator[tuple[str, int, int]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                name = f"{prefix}{child.name}"
                yield f"{path_of(module)}:{name}", _lines(child), _parameters(child)
                yield from walk(child, f"{name}.")
            else:
                yield from walk(child, f"{prefix}{child.name}." if isinstance(child, ast.ClassDef) else prefix)

    yield from walk(ast.parse(source), "")


def _lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[0]
    documented = ast.get_docstring(function, clean=False) is not None
    docstring = (first.end_lineno or 0) - first.lineno + 1 if documented else 0
    return (function.end_lineno or 0) - function.lineno + 1 - docstring


def _parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    given = function.args
    names = [argument.arg for argument in given.posonlyargs + given.args + given.kwonlyargs]
    return len(names) - (names[:1] in (["self"], ["cls"])) + bool(given.vararg) + bool(given.kwarg)


def test_files_are_short():
    long = {path_of(module) for module, text in sources().items() if text.count("\n") > FILE_LINES}
    assert long == set(LONG_FILES)


def test_functions_are_short():
    long = {
        name
        for module, text in sources().items()
        for name, lines, _ in functions(module, text)
        if lines > FUNCTION_LINES
    }
    assert long == set(LONG_FUNCTIONS)


def test_functions_have_few_parameters():
    wide = {
        name for module, text in sources().items() for name, _, count in functions(module, text) if count > PARAMETERS
    }
    assert wide == set(MANY_PARAMETERS)


def test_the_package_stays_within_its_line_budget():
    assert sum(text.count("\n") for text in sources().values()) <= PACKAGE_LINES


def test_every_module_says_what_it_is():
    """The first thing in a file is what comes in, what goes out and which paper."""
    silent = {
        path_of(module) for module, text in sources().items() if text.strip() and not ast.get_docstring(ast.parse(text))
    }
    assert silent == set()


def test_the_measure_counts_what_it_says():
    source = (
        'class A:\n    @property\n    def f(self, a, *b, c=1):\n        """One.\n\n        Two."""\n        return 1\n'
    )
    assert list(functions("frugalbert.run", source)) == [("frugalbert/run.py:A.f", 2, 3)]
