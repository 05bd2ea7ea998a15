"""OSE: properties of W, the list and its stride, extraction against brute force, what cannot work."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config
from frugalbert.model.arch import Arch
from frugalbert.model.cost import (
    embedding_parameters,
    encoder_parameters,
    forward_flops,
    head_parameters,
    parameter_count,
)
from frugalbert.search import extraction
from frugalbert.search.candidates import Region
from frugalbert.search.extraction import Errors, Maximum, coefficient, every, extract
from frugalbert.space import Space
from tests.search.toy import LIMIT, cost, loss

SPACE = Space((1, 2, 3), (32, 64), (2, 4), (8, 16, 32), (56, 112, 224), qkv_is_hidden=True)
ANY = config.Limit()
TOP = Maximum("T", 1e6, 1e9)
BORT = Arch.parse("bort")


def judge(archs: list[Arch]) -> list[list[Errors | None]]:
    return [[Errors((loss(arch),))] for arch in archs]


def section(**values: Any) -> config.Extraction:
    return config.Extraction.model_validate(values)


def found(interval: int = 1, space: Space = SPACE, maximum: Maximum | None = None, **values: Any):
    return extract(space, judge, cost, ANY, section(interval=interval, **values), maximum)


# ---- W ---------------------------------------------------------------------------------------------------------------

within = st.floats(1.0, 0.999e6)
faster = st.floats(1.0, 0.999e9)
error = st.floats(1e-2, 1e2)


@settings(derandomize=True)
@given(within, faster, error, st.floats(0.0, 0.99), st.floats(0.0, 0.99), st.floats(0.0, 0.9))
def test_who_dominates_has_the_larger_w(p: float, i: float, e: float, less_p: float, less_i: float, less_e: float):
    """b' weakly better than b everywhere, strictly somewhere, and below T in both costs: W(b') > W(b)."""
    if less_p + less_i + less_e < 1e-3:
        less_e = 0.1
    better = coefficient(TOP, p * (1 - less_p), i * (1 - less_i), e * (1 - less_e), 1e-9)
    assert better >= coefficient(TOP, p, i, e, 1e-9) > 0
    assert coefficient(TOP, p / 2, i / 2, e / 2, 1e-9) > coefficient(TOP, p, i, e, 1e-9)


def test_differing_from_the_maximum_point_is_not_enough():
    """With p(b') = p(T) the better one has no larger W: both are 0."""
    better, worse = coefficient(TOP, 1e6, 1e8, 0.5, 1e-9), coefficient(TOP, 1e6, 1e9, 1.0, 1e-9)
    assert better == worse == 0.0
    assert coefficient(TOP, 1.0, 1e9, 1.0, 1e-9) == 0.0


@settings(derandomize=True)
@given(within, faster, error, st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(0.1, 10.0))
def test_units_do_not_matter_and_errors_divide(p: float, i: float, e: float, a: float, b: float, c: float):
    w = coefficient(TOP, p, i, e, 1e-9)
    other = Maximum("T", a * TOP.parameters, b * TOP.inference)
    assert coefficient(other, a * p, b * i, e, 1e-9) == pytest.approx(w, rel=1e-6)
    assert coefficient(TOP, p, i, c * e, 1e-9) == pytest.approx(w / c)


def test_a_far_maximum_point_leaves_the_error_alone():
    far = Maximum("T", 1e15, 1e18)
    assert coefficient(far, 1e6, 1e9, 4.0, 1e-3) == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize(("p", "i", "what"), [(2e6, 1.0, "parameters"), (1.0, 2e9, "inference"), (2e6, 2e9, "and")])
def test_beyond_the_maximum_point_there_is_no_w(p: float, i: float, what: str):
    """Twice beyond would be positive: two negative brackets."""
    with pytest.raises(ValueError, match=f"more .*{what}.* than the maximum point"):
        coefficient(TOP, p, i, 1.0, 1e-9)


def test_errors_near_zero_count_as_the_floor():
    assert coefficient(TOP, 1.0, 1.0, 0.0, 0.01) == coefficient(TOP, 1.0, 1.0, 0.01, 0.01) < 101


# ---- the list --------------------------------------------------------------------------------------------------------


@settings(derandomize=True)
@given(st.integers(1, 60), st.integers(1, 60), st.sampled_from(["first", "middle", "last"]))
def test_one_of_each_interval(count: int, interval: int, representative: str):
    chosen = every(range(count), interval, representative)
    assert len(chosen) == math.ceil(count / interval)
    assert [value // interval for value in chosen] == list(range(len(chosen)))
    if interval == 1:
        assert chosen == list(range(count))


def test_representatives():
    assert every(range(10), 4, "first") == [0, 4, 8]
    assert every(range(10), 4, "middle") == [1, 5, 8]
    assert every(range(10), 4, "last") == [3, 7, 9]


def test_the_list_rises_in_parameters_then_cost_then_text():
    listed = extraction.ordered(Region(SPACE, cost, ANY), "flops")
    keys = [(one.costs["parameters"], one.costs["flops"], str(one.arch)) for one in listed]
    assert keys == sorted(keys)
    assert len(set(keys)) == SPACE.size() == 36
    assert len(extraction.ordered(Region(SPACE, cost, config.Limit(latency_ms=(1.0,))), "flops")) < 36


# ---- against brute force ---------------------------------------------------------------------------------------------


def brute_force(space: Space, maximum: Maximum) -> list[tuple[float, str]]:
    rows = []
    for arch in space.enumerate():
        p, i = parameter_count(arch, 1000), 64 * forward_flops(arch, 64)
        w = (maximum.parameters - p) / maximum.parameters * (maximum.inference - i) / maximum.inference / loss(arch)
        rows.append((w, str(arch)))
    return sorted(rows, reverse=True)


@pytest.mark.parametrize("scale", [1, 2, 10])
def test_interval_1_is_brute_force(scale: int):
    top = extraction.largest(extraction.ordered(Region(SPACE, cost, ANY), "flops"), "flops")
    top = Maximum("T", scale * top.parameters, scale * top.inference)
    result, expected = found(maximum=top), brute_force(SPACE, top)
    assert [one.w for one in result.ranking] == pytest.approx([w for w, _ in expected], rel=1e-9)
    assert str(result.ranking[0].candidate.arch) == expected[0][1]
    positive = [text for w, text in expected if w > 1e-12]
    assert [str(one.candidate.arch) for one in result.ranking][: len(positive)] == positive
    assert found().maximum.parameters == max(parameter_count(arch, 1000) for arch in SPACE.enumerate())


@pytest.mark.parametrize("interval", [1, 2, 4, 5, 8, 36])
@pytest.mark.parametrize("representative", ["first", "middle", "last"])
def test_every_nth_is_visited_and_no_other(interval: int, representative: str):
    result = found(interval, representative=representative)
    assert len(result.visited) == math.ceil(36 / interval)
    assert result.size == 36
    whole = {str(one.candidate.arch): one.w for one in found().visited}
    assert all(one.w == whole[str(one.candidate.arch)] for one in result.visited)


def test_the_order_of_the_space_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    listing = Space.enumerate

    def shuffled(space: Space):
        archs = list(listing(space))
        random.Random(3).shuffle(archs)
        return iter(archs)

    before = found(4)
    monkeypatch.setattr(Space, "enumerate", shuffled)
    assert found(4) == before


def test_the_winner_is_on_the_front():
    result = found(maximum=Maximum("T", 3e6, 3e9))
    assert result.ranking[0] in extraction.front(result)
    assert 1 < len(extraction.front(result)) < 36


def test_what_is_beyond_the_maximum_point_is_rejected_and_never_judged():
    asked: list[Arch] = []

    def watch(archs: list[Arch]) -> list[list[Errors | None]]:
        asked.extend(archs)
        return judge(archs)

    middle = Arch.parse("bert 2x64 heads=4 ffn=56")
    top = Maximum(str(middle), cost(middle)["parameters"], cost(middle)["flops"])
    result = extract(SPACE, watch, cost, ANY, section(), top)
    rejected = [one for one in result.visited if one.rejected]
    assert len(asked) == 36 - len(rejected) < 36
    assert all(one.w is None and one.to_json()["error"] is None for one in rejected)
    assert {one.rejected for one in rejected} >= {"more parameters and inference cost than the maximum point"}
    assert len(result.ranking) == len(asked)


# ---- recipes and seeds -----------------------------------------------------------------------------------------------


def test_the_best_recipe_counts_and_seeds_are_averaged():
    def two(archs: list[Arch]) -> list[list[Errors | None]]:
        return [[None, Errors((5.0, 5.0)), Errors((4.0, 2.0)), Errors((4.5, 4.5))] for _ in archs]

    one = extract(SPACE, two, cost, ANY, section(), TOP).ranking[0]
    costs = one.candidate.costs
    ws = [coefficient(TOP, costs["parameters"], costs["flops"], e, 1e-3) for e in (4.0, 2.0)]
    assert one.theta == 2
    assert one.w == pytest.approx(sum(ws) / 2)
    assert one.w_std == pytest.approx(abs(ws[0] - ws[1]) / math.sqrt(2))
    assert one.candidate.score == 3.0


def test_what_diverged_has_no_w():
    def half(archs: list[Arch]) -> list[list[Errors | None]]:
        return [[None] if len(arch.layers) > 1 else [Errors((loss(arch),))] for arch in archs]

    result = extract(SPACE, half, cost, ANY, section())
    assert {len(one.candidate.arch.layers) for one in result.ranking} == {1}
    row = next(one for one in result.visited if one.w is None).to_json()
    assert (row["w"], row["error"], row["theta"], row["rejected"]) == (None, None, None, None)


def test_sensitivity_is_what_another_search_would_have_picked():
    result = found(2, maximum=Maximum("T", 1e6, 1e9))
    told = extraction.sensitivity(result, Maximum("T", 1e6, 20.0))
    twice = found(2, maximum=Maximum("T", 2e6, 2e9))
    assert told["maximum"]["2"] == str(twice.ranking[0].candidate.arch)
    assert told["maximum"]["1"] == told["interval"]["2"] == str(result.ranking[0].candidate.arch)
    wider = found(8, maximum=Maximum("T", 1e6, 1e9))
    assert told["interval"]["8"] == str(wider.ranking[0].candidate.arch)
    by_latency = found(2, maximum=Maximum("T", 1e6, 20.0), inference="latency")
    assert told["inference"]["latency"] in {str(one.candidate.arch) for one in by_latency.visited + result.visited}
    assert "looks" not in told


def test_fewer_looks_and_fewer_rows_are_told():
    def looked(archs: list[Arch]) -> list[list[Errors | None]]:
        """At the first look and on half of the rows the deepest is best; in the end the shallowest."""
        return [[Errors((1.0 + d,), ((9.0 - d, 1.0 + d),), (9.0 - d,))] for d in (len(arch.layers) for arch in archs)]

    far = Maximum("T", 1e12, 1e15)
    told = extraction.sensitivity(extract(SPACE, looked, cost, ANY, section(), far), None)
    depths = {key: len(Arch.parse(text).layers) for key, text in told["looks"].items()}
    assert depths == {"1": 3, "2": 1}
    assert len(Arch.parse(told["half_of_the_rows"]).layers) == 3


# ---- what cannot work ------------------------------------------------------------------------------------------------


def opposed(arch: Arch) -> dict[str, float]:
    """The larger the faster."""
    return {"parameters": parameter_count(arch, 1000), "flops": 1e9 / parameter_count(arch, 1000)}


def hopeless(archs: list[Arch]) -> list[list[Errors | None]]:
    return [[None] for _ in archs]


def test_bad_input_is_one_sentence():
    mixed, huge = Space((1, 2), (32,), (2, 4), (16, 8), (56,), mixed=True), Space(
        tuple(range(1, 30)), tuple(range(8, 800, 8)), (2, 4), (16,), tuple(range(8, 800, 8))
    )  # fmt: skip
    for message, call in {
        "interval 37 is more than the 36 architectures .* write 1 to 36": lambda: found(37),
        "largest in both parameters .bert 3x64 .* and flops .bert 1x32.*write search.extraction.maximum": lambda: (
            extract(SPACE, judge, opposed, ANY, section())
        ),
        "within search.limit; the nearest is bert 1x32": lambda: extract(
            SPACE, judge, cost, config.Limit(latency_ms=(0.1,)), section()
        ),
        "space.mixed makes endless": lambda: found(space=mixed),
        "568,458 architectures; give its axes fewer values": lambda: found(space=huge),
        "every architecture that was visited is beyond": lambda: found(maximum=Maximum("bert", 10.0, 10.0)),
        "none of 36 architectures has a finite error": lambda: extract(SPACE, hopeless, cost, ANY, section()),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_if_every_w_is_0_it_is_said(capsys: pytest.CaptureFixture[str]):
    result = found(36, representative="last")
    assert result.ranking[0].w == 0.0
    assert "every W is 0" in capsys.readouterr().err


def test_the_limits_hold_here_too():
    result = extract(SPACE, judge, cost, config.Limit(parameters=(60000.0,)), section())
    assert all(one.candidate.costs["parameters"] <= 60000 for one in result.visited)
    assert len(result.visited) < 36
    assert LIMIT.latency_ms


# ---- Bort ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hidden", "ffn", "depth", "encoder", "embeddings", "head", "share"),
    [
        (1024, 768, 4, 23_108_608, 51_997_696, 1_101_913, 7.6),
        (768, 1024, 4, 15_760_384, 38_998_272, 642_393, 5.2),
        (1024, 512, 2, 10_505_216, 51_997_696, 1_101_913, 3.5),
    ],
)
def test_borts_published_sizes_are_counted(
    hidden: int, ffn: int, depth: int, encoder: int, embeddings: int, head: int, share: float
):
    arch = Arch.parse(f"bert {depth}x{hidden} heads=8 ffn={ffn} token_types=0")
    assert encoder_parameters(arch) == depth * (4 * hidden**2 + 2 * hidden * ffn + 9 * hidden + ffn) == encoder
    assert embedding_parameters(arch, 50265) == (50265 + 512 + 2) * hidden == embeddings
    assert head_parameters(arch, 50265, "mlm") == hidden**2 + 3 * hidden + 50265 == head
    large = encoder_parameters(Arch.parse("bert-large"))
    assert large == 302_309_376
    assert round(100 * encoder / large, 1) == share
    if ffn == 768:
        assert encoder_parameters(BORT) == encoder
        assert round(forward_flops(Arch.parse("bert-large"), 128) / forward_flops(BORT, 128), 1) == 12.8


def test_the_pick_by_size_and_cost_alone():
    """The smallest of all; with a far maximum point the error decides otherwise."""
    assert found().cheapest.candidate.costs.items() >= cost(SPACE.smallest()).items()
    far = found(maximum=Maximum("far", 1e9, 1e12))
    assert far.ranking[0].candidate.score == min(one.candidate.score for one in far.visited)
    assert far.ranking[0] is not far.cheapest
