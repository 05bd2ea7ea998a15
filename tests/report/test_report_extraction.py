"""What the page says of an extraction search: the pick, its list, on what it depends; and of odd ones."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from frugalbert.report import extraction, planes, selection
from frugalbert.report.collect import Collected, collect
from frugalbert.report.page import render
from frugalbert.report.wording import clean
from tests.report.conftest import dump, dump_lines
from tests.report.odd import VALUES, contents, replaced
from tests.report.search_run import TEXTS, add_extraction, add_search
from tests.report.test_report_page import PAYLOADS, read


def words(found: Collected) -> str:
    shown = selection.context(found)
    texts = [*(verdict.text for verdict in selection.verdicts(found)), shown["choice"], *shown["notes"]]
    return " ".join([*texts, shown["captions"]["w"]]).replace("\u00a0", " ")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return add_extraction(tmp_path / "run", candidates=40)


def change(run: Path, **values: Any) -> Collected:
    """The run's `search.json` with other values in its object `extraction`."""
    told = json.loads((run / "search" / "search.json").read_text())
    dump(run / "search" / "search.json", {**told, "extraction": {**told["extraction"], **values}})
    return collect(run)


def test_an_extraction_is_told_whole(run: Path):
    found = collect(run)
    told, text = found.selection.search["extraction"], words(found)
    best = told["ranking"][0]
    assert f"{best['arch']} was chosen: the best of the visited architectures under W (W 0." in text
    assert "40 of 80 architectures were visited. Interval 2: one in 2 of the list" in text
    assert "from interval 2 on the published bound on the error, |1 − interval|, is vacuous" in text
    assert f"T, the maximum point, is {TEXTS['maximum']} with 40.0 M parameters and 38.0 ms" in text
    assert "of 6 other settings 3 give the same pick" in text
    assert f"{told['rejected']} visited ones are larger than T and not judged" in text
    assert "optimal" not in text.lower()
    table = selection.context(found)["ranking"]
    assert len(table.rows) == 10
    assert table.rows[0][0] == f"{best['arch']}, chosen"
    assert [row[1] for row in table.rows] == sorted((row[1] for row in table.rows), reverse=True)
    page = read(render(run))
    assert "The first ten by W" in page.text
    assert "The pick under other settings" in page.text


def test_other_intervals_and_costs(run: Path):
    assert "Interval 1: all of them were" in words(change(run, interval=1))
    assert "vacuous" not in words(change(run, interval=1))
    found = change(run, inference="flops", maximum_inference=3.8e10)
    assert "40.0 M parameters and 38.0 GFLOP" in words(found)
    assert set(extraction.figures(found)) == {"w_parameters", "w_flops"}


def test_the_planes_take_the_place_of_a_steered_search(run: Path, tmp_path: Path):
    found = collect(run)
    drawn = {name: plot for name, plot in planes.figures(found).items() if plot is not None}
    assert set(drawn) == {"w_parameters", "w_latency_ms", "predicted", "slices"}
    plot = drawn["w_latency_ms"]
    assert ">chosen<" in plot.svg
    assert "chosen is" in plot.alt
    other = collect(add_search(tmp_path / "other", candidates=20))
    assert not {"w_parameters", "w_latency_ms"} & set(planes.figures(other))
    assert selection.context(other)["captions"]["w"] == ""
    assert selection.context(other)["ranking"].rows == []


def test_what_is_beyond_the_maximum_is_hollow(run: Path):
    row = json.loads((run / "search" / "candidates.jsonl").read_text().splitlines()[0])
    inside = row | {"rejected": None, "w": 0.2, "error": 4.0}
    beyond = row | {"rejected": "more parameters than the maximum point", "w": None, "error": None}
    dump_lines(run / "search" / "candidates.jsonl", [inside])
    before = extraction.figures(collect(run))["w_parameters"]
    assert before is not None
    assert "beyond T" not in before.alt + extraction.caption(collect(run))
    dump_lines(run / "search" / "candidates.jsonl", [inside, beyond])
    after = extraction.figures(collect(run))["w_parameters"]
    assert after is not None
    assert "; 1 are beyond T" in after.alt
    assert "beyond T, not judged" in extraction.caption(collect(run))
    assert len(after.svg) > len(before.svg)


def test_a_pick_within_the_noise_of_the_seeds_is_no_success(run: Path):
    found = collect(run)
    best = found.selection.search["extraction"]["ranking"][0]
    same = {"maximum": {"1": best["arch"], "2": best["arch"]}}
    ranking = found.selection.search["extraction"]["ranking"]
    firm = [ranking[0] | {"w_std": 1e-9}, *ranking[1:]]
    assert [v.mark for v in extraction.verdicts(change(run, sensitivity=same, ranking=firm))] == ["good"]
    loose = [ranking[0] | {"w_std": 0.5}, *ranking[1:]]
    (verdict,) = extraction.verdicts(change(run, sensitivity=same, ranking=loose))
    assert verdict.mark == "note"
    assert "less than the standard deviation over the seeds" in verdict.text


def test_a_pick_that_size_alone_would_have_made_is_called_so(run: Path):
    lines = (run / "search" / "candidates.jsonl").read_text().splitlines()
    known = [row for row in map(json.loads, lines) if row["w"] is not None]
    best = max(known, key=lambda row: row["w"])
    words = "alone, without the error, would have picked the same"
    dump_lines(run / "search" / "candidates.jsonl", [{**row, "error": 4.0} for row in known])
    assert words in " ".join(extraction.notes(collect(run)))
    dump_lines(run / "search" / "candidates.jsonl", [{**row, "error": 1.0 if row is best else 4.0} for row in known])
    assert words not in " ".join(extraction.notes(collect(run)))


def test_without_a_limit_nothing_is_said_to_keep_one(run: Path):
    record = json.loads((run / "search" / "stage.json").read_text())
    dump(run / "search" / "stage.json", {**record, "section": {"method": "extraction", "limit": {}}})
    assert "the limit" not in words(collect(run)).lower()
    assert {row[1] for row in selection.finalists(collect(run)).rows} == {"no limit, chosen", "no limit"}


@pytest.mark.fault("S6")
@pytest.mark.parametrize("number", range(0, len(PAYLOADS), 9))
def test_payloads_are_text(number: int, tmp_path: Path):
    run = add_extraction(tmp_path / "run", {place: f"{PAYLOADS[number]}~{place}" for place in TEXTS}, candidates=2)
    page = read(render(run))
    for place in ("arch", "maximum"):
        assert " ".join(clean(f"{PAYLOADS[number]}~{place}").split()) in page.text, place


def test_every_value_may_be_odd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """One after the other, all that `search.json` and a candidate hold is replaced by whatever JSON can say."""
    monkeypatch.setattr(extraction.plots, "weighted", lambda *arguments: str(arguments))
    run, files = add_extraction(tmp_path / "run", candidates=3), ("search/search.json", "search/candidates.jsonl")
    shutil.rmtree(run / "supernet")
    told = contents(run, files)[files[0]]
    row = json.loads((run / files[1]).read_text().splitlines()[0])
    for value in VALUES[::2]:
        for place in [(name,) for name in told] + [("extraction", name) for name in told["extraction"]]:
            dump(run / files[0], replaced(told, place, value))
            _use(collect(run))
        dump(run / files[0], told)
        dump_lines(run / files[1], [{**row, name: value} for name in row])
        _use(collect(run))


def _use(found: Collected) -> None:
    selection.context(found)
    selection.verdicts(found)
    extraction.figures(found)
