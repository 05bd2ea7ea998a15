"""The section about the architecture search: what it says of good, bad, partial and odd searches."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.report import planes, selection, tables
from frugalbert.report.collect import SELECTION, Collected, collect
from frugalbert.report.page import _context, render
from frugalbert.report.wording import clean
from tests.report.conftest import dump, make_run
from tests.report.odd import contents, spoil
from tests.report.search_run import TEXTS, add_extraction, add_search
from tests.report.test_report_page import PAYLOADS, read

FIGURES = ("plane", "progress", "predicted", "slices")


def drawn(run: Path) -> set[str]:
    return {name for name, plot in planes.figures(collect(run)).items() if plot is not None}


def words(run: Path) -> str:
    found = collect(run)
    shown = selection.context(found)
    texts = [*(verdict.text for verdict in selection.verdicts(found)), shown["choice"], *shown["notes"]]
    return " ".join(texts).replace("\u00a0", " ")


def marks(found: Collected) -> list[str]:
    return [verdict.mark for verdict in selection.verdicts(found)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return add_search(tmp_path / "run", candidates=40)


def change(path: Path, **values: Any) -> None:
    dump(path, {**json.loads(path.read_text()), **values})


def test_a_search_is_told_whole(run: Path):
    page = render(run)
    text = read(page).text.replace("\u00a0", " ")
    chosen = json.loads((run / "search" / "search.json").read_text())["chosen"]
    for sentence in (
        f"{chosen['arch']} was chosen: the lowest score ({chosen['score']:.4f}, held-out loss with inherited weights) "
        "of 40 architectures that were scored out of 365,952;",
        "The limit was at least 4 × as fast as the largest. Measured again, all of the 5 best keep it.",
        "18.3 % of the space is within the limits. 1 architecture failed and has no score. The 5 best scores lie",
        "Latency is predicted within 1.6 % on average of 24 held-out architectures (rank correlation 0.999); a "
        "regression on FLOPs is off by 13.7 % (rank correlation 0.987). Two readings of the same one differ by 1.1 %.",
        "Held-out losses of the super-network’s slices: 3.60 (largest) to 4.50 (smallest) nats per masked token, below "
        "the unigram baseline 6.04.",
        "keeps the limit, chosen", "with boosted trees, kept", "128 to 3,072 (93 values)",
        "Step 20: the loss jumped from about 4 to 13.",
    ):  # fmt: skip
        assert sentence in text, sentence
    assert marks(collect(run)) == ["good", "good", "good"]
    assert '<a href="#selection">' in page
    assert page.count("<svg ") == 4 + 1  # and the time of the stages
    alts = [value for _, name, value in read(page).attributes if name == "aria-label" and "plot of" in value]
    assert "40 candidates: scores from" in alts[0]
    assert "the limit is 30.0 ms" in alts[0]


def test_without_a_search_nothing_is_said(tmp_path: Path):
    run = make_run(tmp_path / "run", steps=0)
    assert "Architecture search" not in render(run)
    assert words(run) == ""
    assert drawn(run) == set()


def test_a_missed_limit_is_said(run: Path):
    path = run / "search" / "search.json"
    search = json.loads(path.read_text())
    rows = search["finalists"]
    rows[0] |= {"violates": True, "measured_ms": 31.5}
    change(path, finalists=rows, chosen=rows[1], violations=1)
    text = words(run)
    assert "the lowest score of those that keep the limit when measured" in text
    assert f"Measured again, 1 of the 5 best miss it, among them the best one, {rows[0]['arch']} (31.5 ms)." in text
    assert marks(collect(run))[0] == "good"
    assert selection.finalists(collect(run)).rows[0][1] == "misses the limit"
    change(path, finalists=[row | {"violates": True} for row in rows], chosen=rows[0])
    assert "the chosen encoder misses the limit of at least 4 × as fast as the largest" in words(run).replace(
        "\u00a0", " "
    )
    assert marks(collect(run))[0] == "bad"
    change(path, chosen=rows[1] | {"noisy": True})
    assert marks(collect(run))[0] == "note"
    assert "measured (noisy)" in words(run)


def test_weak_grounds_are_said(run: Path):
    change(run / "supernet" / "summary.json", unigram_nll=4.2)
    assert marks(collect(run))[1] == "note"
    change(run / "supernet" / "summary.json", unigram_nll=3.2)
    assert marks(collect(run))[1] == "bad"
    assert "too little for scores to mean much" in words(run)
    path = run / "latency" / "predictor.json"
    report = json.loads(path.read_text())["report"]
    report["methods"]["trees"]["held_out_mape"] = 0.2
    change(path, report=report)
    assert marks(collect(run))[2] == "bad"
    report["methods"]["trees"]["held_out_mape"] = 0.05
    change(path, report=report)
    assert marks(collect(run))[2] == "note"
    change(path, report=report | {"chosen": "flops"})
    assert "FLOPs alone predict it as well as anything" in words(run)


def test_a_teacher_leaves_distances_without_baselines(run: Path):
    change(run / "supernet" / "summary.json", final_validation_accuracy=None)
    path = run / "supernet" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    dropped = ("text_loss", "validation_accuracy")
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k not in dropped}) + "\n" for row in rows))
    html = render(run)
    assert "Distance from the teacher" in html
    assert "Held-out losses of the super-network" not in html
    assert "unigram" not in html


def test_limits_of_every_kind(run: Path):
    record = json.loads((run / "search" / "stage.json").read_text())

    def plane(**limit: Any) -> str:
        dump(run / "search" / "stage.json", {**record, "section": {"limit": limit, "quality": "finetune"}})
        found = planes.figures(collect(run))["plane"]
        assert found is not None
        return found.alt.replace("\u00a0", " ")

    assert "the limit is 8.00 ms" in plane(latency_ms=[6.8, 8.0])
    assert "The limit was 6.8 to 8 ms." in words(run)
    assert "1 − mean metric" in words(run)
    assert "no independent evidence" in words(run)
    assert "the limit is" not in plane(parameters=[5e6], flops=[2e9])
    assert "The limit was at most 5.00 M parameters and at most 2.00 G operations." in words(run)
    path = run / "search" / "candidates.jsonl"
    path.write_text(path.read_text().replace('"latency_ms"', '"x"'))
    assert "M parameters; " in plane(parameters=[5e6])
    assert "the limit is 5.00 M parameters" in plane(parameters=[5e6])


def test_half_done_stages_are_shown_as_far_as_they_got(run: Path):
    (run / "run.yaml").write_text("name: a\nspace: {}\nsupernet: {}\nlatency: {}\nsearch: {}\n")
    (run / "search" / "candidates.jsonl").unlink()
    for name in ("stage.json", "search.json", "pareto.json"):
        (run / "search" / name).unlink()
    lines = ['0a1b2c3d {"search":{}}', *(f'0a1b2c3d {{"arch":"bert {n}","score":{5 - n / 10}}}' for n in range(12))]
    (run / "search" / "journal.jsonl").write_text("\n".join(lines) + "\n")
    text = read(render(run)).text
    assert "12 architectures are scored so far." in text
    assert "Search has not finished." in text
    assert drawn(run) == {"progress", "predicted", "slices"}
    (run / "supernet" / "stage.json").unlink()
    (run / "supernet" / "summary.json").unlink()
    shutil.rmtree(run / "latency")
    shutil.rmtree(run / "search")
    text = read(render(run)).text.replace("\u00a0", " ")
    assert "Super-network has not finished (100 % of the budget so far)." in text
    assert "Latency table has not run." in text
    assert drawn(run) == {"slices"}
    for stage in SELECTION:
        shutil.rmtree(run / stage, ignore_errors=True)
        read(render(run))


def test_many_stages_share_the_colours(tmp_path: Path):
    run = add_search(make_run(tmp_path / "run", steps=0))
    parts = tables.stage_seconds(collect(run), 7)
    assert len(parts) == 7
    assert parts[-1][0] == "5 others"
    seconds = [json.loads(path.read_text())["seconds"] for path in run.glob("*/stage.json")]
    assert sum(value for _, value in parts) == pytest.approx(sum(seconds))


def test_spaces_beyond_counting(run: Path):
    record = json.loads((run / "space" / "stage.json").read_text())
    dump(run / "space" / "stage.json", {**record, "metrics": {"architectures": 10**60}})
    assert ("Architectures", "about 10^60") in selection.context(collect(run))["facts"]


@pytest.mark.fault("S6")
@pytest.mark.parametrize("number", range(0, len(PAYLOADS), 5))
def test_payloads_are_text_wherever_they_come_from(number: int, tmp_path: Path):
    run = add_search(tmp_path / "run", {place: f"{PAYLOADS[number]}~{place}" for place in TEXTS}, candidates=2)
    page = read(render(run))
    for place in ("arch", "processor"):
        assert " ".join(clean(f"{PAYLOADS[number]}~{place}").split()) in page.text, place


FILES = (
    "space/space.json", "supernet/summary.json", "latency/predictor.json", "search/search.json", "search/pareto.json",
    "search/candidates.jsonl", "supernet/metrics.jsonl", "search/stage.json", "space/stage.json",
)  # fmt: skip


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_content_breaks_the_section(data: st.DataObject, odd: tuple[Path, dict[str, Any]]):
    """Odd values anywhere in the files are shown as such or left out; nothing raises."""
    run, whole = odd
    spoil(run, whole, data)
    found = collect(run)
    _context(found)
    if data.draw(st.integers(0, 9)) == 9:  # drawing takes long
        planes.figures(found)


@pytest.fixture(scope="module", params=[add_search, add_extraction])
def odd(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = request.param(tmp_path_factory.mktemp("odd") / "run", candidates=4)
    return run, contents(run, FILES)
