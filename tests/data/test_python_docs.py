"""python-docs: every docstring of prose, at its line, without importing anything."""

from __future__ import annotations

import difflib
import inspect
import sys
import sysconfig
import textwrap
from pathlib import Path

import pytest

from frugalbert.config import Corpus, Machine
from frugalbert.data import corpus, python_docs
from frugalbert.data.cleaning import Counts

SOURCE = '''
    """Module.

      Indented.
    """
    raise SystemExit("importing this would end the process")

    class A:
        """A class."""

        def f(self):
            r"""A method \\d."""

            def inner():
                """Inside."""

        if True:
            async def g(self):
                """Conditional."""
        x = """no docstring"""

    try:
        pass
    except ValueError:
        def h():
            """Handler."""
    else:
        with open("x") as y:
            def i():
                """With."""

    def j():
        f"""{1} is computed"""

    def k():
        b"""bytes"""

    def l():
        """Last."""
    '''


def test_all_docstrings_with_their_lines(tmp_path):
    path = tmp_path / "a.py"
    path.write_text(textwrap.dedent(SOURCE).lstrip())
    found = python_docs.docstrings(path, Counts())
    assert [text for _, text in found] == [
        "Module.\n\nIndented.", "A class.", "A method \\d.", "Inside.", "Conditional.", "Handler.", "With.", "Last.",
    ]  # fmt: skip
    lines = path.read_text().split("\n")
    assert all(text.split("\n")[0] in lines[line - 1] for line, text in found)


@pytest.mark.parametrize("module", [inspect, difflib, textwrap])
def test_the_same_as_asking_the_imported_module(module):
    found = {text for _, text in python_docs.docstrings(Path(module.__file__), Counts())}
    functions = [
        item for _, item in inspect.getmembers(module, inspect.isfunction) if item.__module__ == module.__name__
    ]
    documented = {inspect.cleandoc(item.__doc__) for item in functions if item.__doc__}
    assert len(documented) > 2
    assert documented | {inspect.getdoc(module)} <= found


@pytest.mark.parametrize("data", [b'"""x"""\ndef (', b'"""x"""\x00', b'"""\xff"""', b'"""x"""\n' + b"(" * 5000])
def test_what_does_not_parse_is_counted(tmp_path, data):
    path = tmp_path / "bad.py"
    path.write_bytes(data)
    counts = Counts()
    assert python_docs.docstrings(path, counts) == []
    assert counts.dropped == {"no Python of this version": 1}


@pytest.fixture
def site(tmp_path, monkeypatch) -> Path:
    """A site-packages with two packages, tests, vendored code, a namespace folder and metadata."""
    text = '"""%s, a sentence of more than forty characters for the corpus."""\n'
    names = ["beta/__init__.py", "beta/sub/m.py", "alpha.py", "beta/tests/t.py", "beta/test_x.py", "beta/_vendor/v.py"]
    for name in [*names, "beta-1.0.dist-info/x.py", "gamma/deep/n.py", "beta/data.txt"]:
        path = tmp_path / "site" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text % name)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    return tmp_path


def test_packages_in_order_without_tests_and_vendored_code(site, monkeypatch):
    units = python_docs.units()
    modules = [(package, path.split("/site/")[1]) for unit in units for package, path in unit["modules"]]
    expected = [
        ("alpha", "alpha.py"),
        ("beta", "beta/__init__.py"),
        ("beta", "beta/sub/m.py"),
        ("gamma", "gamma/deep/n.py"),
    ]
    assert modules == expected
    monkeypatch.setattr(python_docs, "UNIT_BYTES", 150)
    units = python_docs.units()
    assert len(units) > 1
    assert [(package, path.split("/site/")[1]) for unit in units for package, path in unit["modules"]] == expected


def test_as_a_source(site):
    out = site / "out"
    out.mkdir()
    corpus.build(Corpus(sources=("python-docs",), held_out=0.49), {"yaml": site}, out, Machine(workers=1))
    found = [(document.source, document.text.split(",")[0]) for document in corpus.read_documents(out)]
    assert found == [
        ("python-docs/alpha", "alpha.py"),
        ("python-docs/beta", "beta/__init__.py"),
        ("python-docs/beta", "beta/sub/m.py"),
        ("python-docs/gamma", "gamma/deep/n.py"),
    ]


def test_this_environment_has_enough_and_imports_nothing():
    before = set(sys.modules)
    units = python_docs.units()
    modules = [module for unit in units for module in unit["modules"]]
    assert len(modules) > 3000
    assert {"torch", "transformers", "numpy", "asyncio"} <= {package for package, _ in modules}
    assert [package for package, _ in modules] == sorted(package for package, _ in modules)
    few = [module for module in modules if module[0] in ("json", "typer", "email")]
    found = list(python_docs.read({"modules": few}, Counts()))
    assert len(found) > 100
    assert all(source.startswith("python-docs/") for source, *_ in found)
    assert set(sys.modules) == before
