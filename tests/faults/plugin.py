"""Counts what the tests of faults tried and lost, bounds their time, and keeps them off the network.

`pytest --faults` ends with the table of tests/faults/rows.py; `--torture SEED --minutes N` does all of it at length.
"""

from __future__ import annotations

import functools
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from frugalbert.run import write_json
from tests.faults import rows
from tests.structure import benchmark

STARTED = time.monotonic()
LONG = {"R1": 1, "R23": 2}

TALLY = pytest.StashKey[rows.Tally]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("faults")
    group.addoption("--faults", action="store_true", help="print what was tried and lost; too few tries of a row fail")
    group.addoption("--faults-json", metavar="FILE", help="write that, too")
    group.addoption("--torture", metavar="SEED", type=int, help="at length, with this seed")
    group.addoption("--minutes", type=float, help="what has not begun by then is left out")


def pytest_configure(config: pytest.Config) -> None:
    rows.seed, rows.minutes = config.getoption("--torture"), config.getoption("--minutes")
    if rows.seed is not None:
        settings.load_profile("torture")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """At length, what may take as long as there is time comes last: no row is left out for it."""
    if rows.seed is not None:
        items.sort(key=lambda item: max((LONG.get(mark.args[0], 0) for mark in item.iter_markers("fault")), default=0))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if rows.minutes is not None and time.monotonic() > STARTED + 60 * rows.minutes:
        pytest.skip(f"the {rows.minutes:g} minutes are over")
    mark = item.get_closest_marker("fault")
    if mark is not None:
        item.stash[TALLY] = rows.Tally(mark.args[0])


@pytest.fixture
def case(request: pytest.FixtureRequest) -> rows.Tally:
    """Counts the cases of a test that has a `fault` mark."""
    return request.node.stash[TALLY]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    tally = item.stash.get(TALLY, None)
    if tally is None:
        return (yield)
    examples = [0]
    handle = getattr(getattr(item, "obj", None), "hypothesis", None)
    if handle is not None:
        inner = handle.inner_test

        @functools.wraps(inner)
        def counted(*arguments: Any, **named: Any) -> Any:
            examples[0] += 1
            with tally.bounded():
                return inner(*arguments, **named)

        handle.inner_test = counted
    whole = handle is None and "case" not in getattr(item, "fixturenames", ())
    lost = 1
    try:
        with tally.bounded() if whole else nullcontext():
            result = yield
        lost = 0
        return result
    except pytest.skip.Exception:
        tally.tried = tally.survived = lost = 0
        tally.skipped = True
        raise
    finally:
        if tally.skipped:
            pass
        elif not tally.tried:
            count = examples[0] if handle is not None else 1
            tally.add(count, max(0, count - lost))
        elif lost and tally.tried == tally.survived:
            tally.add(1, 0)  # what failed lay outside the cases
        item.user_properties.append(("fault", asdict(tally)))


def _faults(config: pytest.Config) -> list[dict[str, Any]]:
    reports = config.pluginmanager.get_plugin("terminalreporter").stats
    return rows.table(
        rows.Tally(**value)
        for kind in ("passed", "failed", "skipped")
        for report in reports.get(kind, [])
        if report.when == "call"
        for name, value in report.user_properties
        if name == "fault"
    )


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.getoption("--faults"):
        return
    terminalreporter.section("fault · tried · survived · lost")
    found = _faults(config)
    hostile = [line for line in found if line["longest_s"]]
    for line in found:
        short = f"   (mark: {line['least']})" if line["tried"] < line["least"] else ""
        short += " not possible here" if line["skipped"] else ""
        terminalreporter.line(
            f"{line['row']:>4} {line['tried']:6} {line['survived']:6} {line['lost']:4}  {line['fault']}{short}"
        )
    if hostile:
        longest, most = (max(hostile, key=lambda line: line[name]) for name in ("longest_s", "most_mb"))
        terminalreporter.line(
            f"hostile input took at most {longest['longest_s']:.1f} s a case ({longest['row']}) and "
            f"{most['most_mb']:,} MB ({most['row']})"
        )
    if config.getoption("--faults-json"):
        environment = benchmark("throughput").environment()
        about = {"seed": rows.seed, "minutes": config.getoption("--minutes"), "environment": environment}
        write_json(Path(config.getoption("--faults-json")), {"rows": found, **about})


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    config = session.config
    if not config.getoption("--faults") or hasattr(config, "workerinput") or session.exitstatus != 0:
        return
    whole = config.getoption("--minutes") is None  # else the table says how often each row was tried, and no more
    if any(
        line["lost"] or (whole and line["tried"] < line["least"] and not line["skipped"]) for line in _faults(config)
    ):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


# ---- no network ------------------------------------------------------------------------------------------------------

LOCAL = ("127.", "::1", "localhost", "0.0.0.0")
refused: list[object] = []
"""Addresses outside this machine that something asked for during the present test."""


def _guard(event: str, arguments: tuple[Any, ...]) -> None:
    if event == "socket.connect":
        family, address = arguments[0].family, arguments[1]
        internet = family in (socket.AF_INET, socket.AF_INET6) and arguments[0].type == socket.SOCK_STREAM
        if internet and not str(address[0]).startswith(LOCAL):
            refused.append(address)
            raise ConnectionRefusedError(f"tests have no network: {address}")


sys.addaudithook(_guard)


@pytest.fixture(autouse=True)
def _no_network() -> Iterator[None]:
    refused.clear()
    yield
    assert not refused, f"the test asked for {refused}; tests have no network"
