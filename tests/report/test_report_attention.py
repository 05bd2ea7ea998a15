"""What the page says and shows of learned masks and of the importance of positions; and of odd ones."""

from __future__ import annotations

import base64
import json
import struct
import warnings
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.report import attention, importance, pictures
from frugalbert.report.collect import Collected, collect
from frugalbert.report.page import render
from frugalbert.report.wording import fixed
from tests.report.conftest import dump, make_run
from tests.report.masks_run import KINDS, add_attention, add_importance, study
from tests.report.odd import contents, spoil
from tests.report.test_report_page import PAYLOADS, read

FILES = ("attention/masks.json", "attention/metrics.jsonl", "importance/importance.json", "importance/results.json")


class Images(HTMLParser):
    """Sources and descriptions of the pictures of masks."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[dict[str, str]] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        about = {name: value or "" for name, value in attrs}
        if tag == "img" and "scale" not in about["alt"] and about["height"] != "10":
            self.found.append(about)


def said(verdicts: list[Any]) -> str:
    return " ".join(verdict.text for verdict in verdicts).replace("\u00a0", " ")


def pixels(source: str) -> tuple[np.ndarray, bytes, bytes]:
    """Colour numbers (s, t), the palette and its opacities, of one of our images: every checksum is verified."""
    data = base64.b64decode(source.removeprefix("data:image/png;base64,"))
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, place = {}, 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        name, body = data[place + 4 : place + 8], data[place + 8 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size)[0] == zlib.crc32(name + body)
        chunks[name], place = body, place + 12 + size
    width, height = struct.unpack_from(">II", chunks[b"IHDR"])
    lines = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    assert not lines[:, 0].any()
    both = np.stack([lines[:, 1:] >> 4, lines[:, 1:] & 15], -1).reshape(height, -1)
    return both[:, :width], chunks[b"PLTE"], chunks[b"tRNS"]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return add_importance(add_attention(tmp_path / "run"), share="layers")


def change(run: Path, file: str = "attention/masks.json", **values: Any) -> Collected:
    dump(run / file, json.loads((run / file).read_text()) | values)
    return collect(run)


# ---- masks -----------------------------------------------------------------------------------------------------------


def test_no_speed_is_promised_where_none_is_possible(run: Path):
    """At 128 tokens attention is a small part; where blocks are full nothing is skipped; else the bound is named."""
    short = said(attention.verdicts(collect(run)))
    assert "Attention is 6 % of the dense encoder’s work" in short
    assert "at most 1.06 times as fast. No speed-up is to be expected" in short
    long = {"attention_share": 0.5, "bound": 2.0}
    full = said(attention.verdicts(change(run, **long, occupancy={"64": 0.9})))
    assert "90 % of the 64 × 64 blocks hold a kept pair" in full
    assert "no speed-up is to be expected" in full
    half = said(attention.verdicts(change(run, **long, occupancy={"64": 0.2})))
    assert "at most 2.00 times as fast. With 20 % of the 64 × 64 blocks left it is at most 1.67 times" in half
    assert "no speed-up" not in half.lower()


def test_masks_that_were_not_settled_are_called_so(run: Path):
    assert [verdict.mark for verdict in attention.verdicts(collect(run))] == ["note"]
    found = attention.verdicts(change(run, undecided=0.6))
    assert [verdict.mark for verdict in found] == ["note", "bad"]
    assert "60 % of the masks’ logits are undecided" in said(found)
    apart = said(attention.verdicts(change(run, undecided=0.1, expected_density=0.5, threshold_density=0.1)))
    assert "expected and thresholded density differ by 40.0 %" in apart


def test_the_section_has_its_figures(run: Path):
    text = read(render(run)).text.replace("\u00a0", " ")
    for words in ("Block occupancy", "64 × 64 41.0 % 2", "Undecided logits 7.0 %", "Repaired rows 2", "Attention masks",
                  "2 logits were added for queries that would have seen nothing", "asked for: 10.0 %"):  # fmt: skip
        assert words in text, words
    drawn = attention.figures(collect(run))
    assert all(drawn.values())
    assert ">asked for 0.10<" in drawn["mask_density"].svg  # type: ignore[union-attr]
    assert ">undecided<" in drawn["mask_density"].svg  # type: ignore[union-attr]


def test_every_mask_is_shown_once_with_words(run: Path, tmp_path: Path):
    shared = [image["alt"] for image in Images(render(run)).found]
    assert len([alt for alt in shared if alt.startswith("Pairs that are kept, all layers, head")]) == 4
    assert len(shared) == 12
    assert all("of the pairs kept" in alt for alt in shared[:8])
    own = [image["alt"] for image in Images(render(add_attention(tmp_path / "own", "none", 3, 2))).found]
    assert len(own) == 12
    assert own[-1].startswith("Pairs that are kept, layer 3, head 2: ")
    heads = [image["alt"] for image in Images(render(add_attention(tmp_path / "heads", "heads", 3, 2))).found]
    assert [alt.split(":")[0] for alt in heads[3:]] == [f"Pairs that are kept, layer {n}, all heads" for n in (1, 2, 3)]


def test_a_large_model_makes_no_large_page(tmp_path: Path):
    """24 layers of 16 heads with masks of their own: some layers are shown, and the page says so."""
    page = render(add_attention(tmp_path / "run", "none", 24, 16))
    assert len(page) < 2_500_000
    assert len(Images(page).found) <= 2 * pictures.MOST_CELLS
    assert "192 more masks are in the run’s files" in page


def test_curves_by_distance_are_means_over_the_diagonals(run: Path):
    square = np.random.default_rng(0).random((9, 9)).astype(np.float32)
    square[8, 0] = square[0, 8] = np.nan
    found = attention.means_by_distance(square)
    for distance in range(8):
        both = [*square.diagonal(distance), *square.diagonal(-distance)]
        assert found[distance] == pytest.approx(np.mean(both))
    assert np.isnan(found[8])
    curves = attention.curves_of([np.arange(4.0), np.arange(4.0) + 2], 8.0)
    assert [curve.label for curve in curves] == ["mask 1", "mask 2", "mean"]
    assert curves[-1].x == [0.0, 2.0, 4.0, 6.0]
    assert curves[-1].y == [1.0, 2.0, 3.0, 4.0]


# ---- pictures --------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000))
def test_an_image_holds_what_was_drawn(height: int, width: int, seed: int):
    square = np.random.default_rng(seed).random((height, width))
    square[0, 0] = np.nan
    numbers, palette, opacity = pixels(pictures.png(square, 0.0, 1.0))
    assert numbers.shape == (height, width)
    assert numbers[0, 0] == 15
    assert list(opacity) == [255] * 15 + [0]
    np.testing.assert_allclose(numbers.ravel()[1:] / 14, square.ravel()[1:], atol=0.5 / 14 + 1e-9)
    assert tuple(palette[:3]) == pictures.PALE
    assert tuple(palette[42:45]) == pictures.DEEP


def test_a_reduced_picture_has_the_means():
    square = np.arange(64.0).reshape(8, 8)
    square[7, 7] = np.nan
    small = pictures.reduced(square, 4)
    assert small.shape == (4, 4)
    assert small[0, 0] == np.mean([0, 1, 8, 9])
    assert small[3, 3] == np.mean([54, 55, 62])
    assert np.isnan(pictures.reduced(np.full((8, 8), np.nan), 4)).all()
    assert pictures.reduced(square, 8) is square


# ---- importance ------------------------------------------------------------------------------------------------------


def test_kinds_are_ranked(run: Path):
    table = importance.context(collect(run))["ranking"]
    names = [importance.KINDS[name] for name in sorted(KINDS, key=lambda name: -KINDS[name])]
    assert [row[0] for row in table.rows] == names
    assert table.rows[-1][3] == "4 of 4", "the diagonal is the lowest in every map"
    text = said(importance.verdicts(collect(run)))
    found = json.loads((run / "importance" / "importance.json").read_text())
    assert f"a token and itself {fixed(found['groups']['diagonal'], 3)}." in text


@pytest.mark.parametrize(("gap", "words"), [
    (-0.004, "The diagonal matters less than other pairs do."),
    (0.004, "The diagonal matters more than other pairs do."),
    (0.001, "It is not shown that the diagonal matters less, or more, than other pairs."),
])  # fmt: skip
def test_the_study_says_what_it_shows(run: Path, gap: float, words: str):
    differences = study()["differences"]
    differences["no_diagonal_to_random"] = {"mean": gap, "interval": [gap - 0.002, gap + 0.002], "pairs": 3}
    found = change(run, "importance/results.json", differences=differences)
    text = said(importance.verdicts(found))
    assert words in text
    assert "changes by +0.0010 (95 % interval −0.0010 to +0.0030): no difference is shown; with as many" in text
    assert "changes by +0.0050 (95 % interval +0.0030 to +0.0070). " in text
    table = importance.context(found)["study"]
    assert [row[0] for row in table.rows] == ["full attention", "no diagonal", "random drop 1", "random drop 2"]
    assert table.rows[0][2:4] == ["–", "–"]
    assert table.rows[3][3] == "+0.0040 to +0.0080"


def test_one_seed_shows_nothing(run: Path):
    found = change(run, "importance/results.json", **study(seeds=1))
    text = said(importance.verdicts(found))
    assert "(one seed, no interval)" in text
    assert "One seed shows nothing" in text
    assert "matters" not in text


def test_controls_that_dropped_less_are_owned_up_to(run: Path):
    assert "In documents shorter than a row fewer" in importance.context(collect(run))["notes"]
    rows = study()["variants"]
    even = [row | {"dropped": 0.0078} for row in rows]
    assert importance.context(change(run, "importance/results.json", variants=even))["notes"] == ""


# ---- what there may be ----------------------------------------------------------------------------------------------


def test_a_page_without_these_stages_does_not_mention_them(tmp_path: Path):
    page = read(render(make_run(tmp_path / "run", steps=0)))
    assert "img" not in page.tags
    assert "Attention masks" not in page.text
    assert "Importance" not in page.text


def test_stages_that_are_at_work_are_shown_as_far_as_they_are(run: Path):
    for file in ("attention/masks.json", "attention/masks.npz", "attention/stage.json", "importance/results.json"):
        (run / file).unlink()
    text = read(render(run)).text
    assert "Attention masks" in text
    assert "Share of pairs" in text
    assert "With and without the diagonal" not in text


@pytest.mark.parametrize("data", [b"", b"PK", b"PK\x03\x04" + bytes(100)])
def test_damaged_pictures_are_reported_and_left_out(run: Path, data: bytes):
    (run / "attention" / "masks.npz").write_bytes(data)
    page = render(run)
    assert "attention/masks.npz cannot be read" in page
    assert len(Images(page).found) == 4


@pytest.mark.parametrize("shape", [(0, 4, 4), (2, 4, 5), (4,), (2, 0, 0)])
def test_pictures_of_other_shapes_are_left_out(run: Path, shape: tuple[int, ...]):
    for name in ("attention/masks", "importance/importance"):
        kinds = {kind: np.zeros(shape, np.float16) for kind in ("probability", "kept", "by_distance")}
        with open(run / f"{name}.npz", "wb") as file:
            np.savez_compressed(file, **kinds)  # type: ignore[arg-type]
    assert Images(render(run)).found == []


@pytest.mark.fault("S6")
@pytest.mark.parametrize("payload", PAYLOADS[:6])
def test_payloads_are_text(run: Path, payload: str):
    change(run, structure=payload, share=payload, occupancy={payload: 0.5}, most_blocks={payload: 3})
    change(run, "importance/importance.json", groups={payload: 0.5}, pairs={payload: 0.1})
    variants = [row | {"name": payload} for row in study()["variants"]]
    change(run, "importance/results.json", variants=variants)
    read(render(run))


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = add_importance(add_attention(tmp_path_factory.mktemp("odd") / "run", layers=2, heads=2), "layers", 2, 2)
    for file in ("attention/metrics.jsonl", "importance/metrics.jsonl"):
        lines = (run / file).read_text().splitlines(keepends=True)
        (run / file).write_text("".join(lines[:4]))
    return run, contents(run, FILES)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_content_breaks_the_sections(data: st.DataObject, odd: tuple[Path, dict[str, Any]]):
    run, whole = odd
    spoil(run, whole, data)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = collect(run)
            for part in (attention, importance):
                part.context(found)
                part.verdicts(found)
    finally:
        for name, value in whole.items():
            rows = value if isinstance(value, list) and name[-1] == "l" else [value]
            (run / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("value", [None, 0, -1, 1e308, "x", [1]])
def test_odd_figures_are_drawn_all_the_same(run: Path, value: Any):
    found = change(run, length=value, target=value)
    assert attention.figures(found)["mask_distances"] is not None
