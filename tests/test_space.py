"""Space: exact counts, operators that stay inside and reach everything, draws as even as promised."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest
from scipy.stats import chisquare

from frugalbert import config
from frugalbert.model.arch import Arch, LayerArch
from frugalbert.model.cost import encoder_parameters
from frugalbert.space import AXES, Space
from tests.test_imports import loaded

SMALL = Space(depth=(1, 2, 3), hidden=(8, 12, 16), heads=(1, 2, 3), head_dim=(4, 6), ffn=(8, 16, 24, 32))
TIGHT = Space(
    depth=(2, 3), hidden=(6, 8, 12), heads=(1, 2, 3, 4), head_dim=(2, 3, 4), ffn=(8, 9), qkv_at_most_hidden=True
)
STOCK = Space(depth=(1, 2), hidden=(6, 7, 8, 12), heads=(1, 2, 3, 4), head_dim=(2, 3, 4), ffn=(8, 9), exportable=True)
MIXED = Space(depth=(1, 2, 3), hidden=(6, 8), heads=(1, 2, 3), head_dim=(2, 4), ffn=(8, 16), mixed=True)
MIXED_STOCK = Space(
    depth=(1, 2), hidden=(6, 7, 12), heads=(1, 2, 3, 5), head_dim=(2, 3, 4), ffn=(8, 9), mixed=True, exportable=True
)
FILLED = Space(
    depth=(1, 2, 3), hidden=(8, 12, 16, 24), heads=(1, 2, 3, 4), head_dim=(2, 3, 4, 6, 8, 12), ffn=(8, 9, 11),
    qkv_is_hidden=True,
)  # fmt: skip
MIXED_FILLED = Space(
    depth=(1, 2), hidden=(8, 12), heads=(1, 2, 4), head_dim=(2, 3, 4, 6), ffn=(8, 9, 11), mixed=True,
    qkv_is_hidden=True,
)  # fmt: skip
ALL = [SMALL, TIGHT, STOCK, MIXED, MIXED_STOCK, FILLED, MIXED_FILLED]


def grid(first: int, last: int, step: int = 1) -> tuple[int, ...]:
    return tuple(range(first, last + 1, step))


def members(space: Space) -> set[Arch]:
    """By definition: every combination, those that the constraints leave."""
    found = set()
    triples = list(itertools.product(space.heads, space.head_dim, space.ffn))
    for depth, hidden in itertools.product(space.depth, space.hidden):
        shapes = itertools.product(triples, repeat=depth) if space.mixed else ([triple] * depth for triple in triples)
        for shape in shapes:
            heads, head_dim = max(heads for heads, _, _ in shape), max(size for _, size, _ in shape)
            if space.qkv_at_most_hidden and any(heads * size > hidden for heads, size, _ in shape):
                continue
            if space.qkv_is_hidden and any(heads * size != hidden for heads, size, _ in shape):
                continue
            if space.exportable and not any(
                hidden % stock == 0 and hidden // stock >= head_dim for stock in range(heads, hidden + 1)
            ):
                continue
            found.add(Arch.build(space.family, hidden, tuple(LayerArch(hidden, *triple) for triple in shape), {}))
    return found


@pytest.mark.parametrize(
    ("hidden", "heads", "head_dim", "ffn", "count"),
    [
        ("128..768/16", "1..12", 64, "128..3072/32", 366_048),
        ("128..768/16", 12, "15..64", "128..3072/32", 1_525_200),
        ("128..768/4", "1..12", 64, "128..3072/4", 11_391_072),
        ("128..768/4", 12, "15..64", "128..3072/4", 47_462_800),
    ],
)
def test_published_counts(hidden, heads, head_dim, ffn, count):
    axes = {"depth": "1..8", "hidden": hidden, "heads": heads, "head_dim": head_dim, "ffn": ffn}
    space = Space.of(config.Space.model_validate(axes))
    assert space.size() == count
    if count < 1e6:
        assert sum(len(part["depth"]) for part in space.columns()) == count


@pytest.mark.parametrize("space", ALL)
def test_size_is_the_number_of_members(space):
    assert space.size() == len(members(space)) >= 80


@pytest.mark.parametrize("space", ALL)
def test_enumeration_lists_every_uniform_member_once(space):
    listed = list(space.enumerate())
    assert len(set(listed)) == len(listed)
    assert set(listed) == {arch for arch in members(space) if len(set(arch.layers)) == 1}
    rows = [row for part in space.columns(7) for row in zip(*(part[name].tolist() for name in AXES), strict=True)]
    assert [Arch.uniform(space.family, **dict(zip(AXES, row, strict=True))) for row in rows] == listed


@pytest.mark.parametrize("space", ALL)
def test_membership(space):
    inside = members(space)
    assert all(space.contains(arch) for arch in itertools.islice(inside, 500))
    free = Space(**{name: getattr(space, name) for name in AXES}, mixed=True)
    for arch in itertools.islice(free.enumerate(), 300):
        assert space.contains(arch) == (arch in inside)


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("modern 2x8 heads=2 ffn=8", "family bert, not modern"),
        ("bert 4x8 heads=2 ffn=8", "depth 4 is not on the space's axis .1, 2, 3."),
        ("bert 2x9 heads=2 head_dim=4 ffn=8", "hidden 9 is not on"),
        ("bert 2x8 heads=4 head_dim=4 ffn=8", "heads 4 is not on"),
        ("bert 2x8 heads=2 head_dim=5 ffn=8", "head_dim 5 is not on"),
        ("bert 2x8 heads=2 ffn=9", "ffn 9 is not on"),
        ("bert 2x8 heads=2 ffn=8,16", "layers differ"),
        ("bert 2x8 hidden=8,4 heads=2 head_dim=4 ffn=8", "all channels"),
        ("bert 2x8 heads=2 ffn=8 pattern=window:4", "attend densely"),
        ("bert 2x8 heads=2 ffn=8 token_types=0", "settings beside its sizes"),
    ],
)
def test_what_is_outside_is_told_why(line, sentence):
    with pytest.raises(ValueError, match=sentence):
        SMALL.check(Arch.parse(line))
    SMALL.check(Arch.parse("bert 2x8 heads=2 ffn=8 max_length=64"))
    with pytest.raises(ValueError, match="constraint qkv_at_most_hidden"):
        TIGHT.check(Arch.parse("bert 2x6 heads=4 head_dim=4 ffn=8"))


@pytest.mark.parametrize("space", ALL)
def test_smallest_and_largest_bound_everything(space):
    smallest, largest = space.smallest(), space.largest()
    assert space.contains(smallest)

    def sizes(arch):
        return [
            len(arch.layers),
            *(max(getattr(layer, name) for layer in arch.layers) for name in ("hidden", *AXES[2:])),
        ]

    every = np.array([sizes(arch) for arch in members(space)])
    assert sizes(largest) == every.max(0).tolist()
    assert sizes(smallest) == every.min(0).tolist() or space.qkv_is_hidden
    assert encoder_parameters(smallest) == min(encoder_parameters(arch) for arch in members(space))


def test_borts_space_has_the_published_size():
    """300 combinations of (depth, heads, width, ffn): arXiv 2010.10499, as quoted."""
    axes = {"heads": (4, 8, 12, 16), "hidden": (512, 768, 1024), "head_dim": (32, 48, 64, 96, 128, 192, 256)}
    space = Space(depth=grid(2, 12, 2), ffn=(256, 512, 768, 1024, 3072), qkv_is_hidden=True, **axes)
    every = list(space.enumerate())
    assert space.size() == len(set(every)) == 300
    assert len({(arch.hidden, arch.layers[0].heads) for arch in every}) == 10
    assert space.contains(Arch.parse("bert 4x1024 heads=8 ffn=768"))


def test_exportable_means_what_the_export_means():
    from frugalbert.model.interop import why_not_stock

    for space in (STOCK, MIXED_STOCK):
        free = Space(**{name: getattr(space, name) for name in AXES}, mixed=space.mixed)
        rng = np.random.default_rng(0)
        for arch in [free.sample(rng) for _ in range(300)]:
            assert space.contains(arch) == (why_not_stock(arch) is None)


def test_published_architectures_and_their_export():
    axes = {"depth": grid(1, 8), "hidden": grid(128, 768, 4), "ffn": grid(128, 3072, 2)}
    mlm = Space(**axes, heads=grid(1, 12), head_dim=(64,), exportable=True)
    kd = Space(**axes, heads=(12,), head_dim=grid(15, 64), exportable=True)
    names = {
        name: (kd if "kd" in name else mlm) for name in ("s1", "s2", "s3", "s4", "kd-s1", "kd-s2", "kd-s3", "kd-s4")
    }
    exportable = {name: space.contains(Arch.parse(f"autotinybert-{name}")) for name, space in names.items()}
    assert [name for name, can in exportable.items() if not can] == ["s1", "kd-s3"]


# ---- drawing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [SMALL, TIGHT, STOCK, FILLED])
def test_samples_are_even(space):
    rng = np.random.default_rng(1)
    every = sorted(members(space), key=str)
    counts = Counter(space.sample(rng) for _ in range(20 * len(every)))
    assert set(counts) <= set(every)
    assert chisquare([counts[arch] for arch in every]).pvalue > 1e-3


@pytest.mark.parametrize("space", [MIXED, MIXED_STOCK])
def test_mixed_samples_are_even_for_a_given_depth_and_width(space):
    rng = np.random.default_rng(1)
    every = [arch for arch in sorted(members(space), key=str) if len(arch.layers) == 2 and arch.hidden == 6]
    counts = Counter(space.sample(rng) for _ in range(100 * len(every)))
    assert set(counts) <= members(space)
    assert chisquare([counts[arch] for arch in every]).pvalue > 1e-3
    depths = Counter(len(arch.layers) for arch in counts.elements())
    assert chisquare([depths[depth] for depth in space.depth]).pvalue > 1e-3


@pytest.mark.parametrize("space", [SMALL, MIXED, MIXED_STOCK])
def test_stratified_samples_reach_small_and_large_evenly(space):
    rng = np.random.default_rng(2)
    sizes = [encoder_parameters(arch) for arch in space.enumerate()]
    edges = np.geomspace(min(sizes) - 0.5, max(sizes) + 0.5, 6)
    filled = [index for index in range(5) if any(edges[index] <= size < edges[index + 1] for size in sizes)]
    drawn = [space.sample_stratified(rng, 5) for _ in range(2000)]
    assert all(space.contains(arch) for arch in drawn)
    bins = Counter(int(np.searchsorted(edges, encoder_parameters(arch), side="right")) - 1 for arch in drawn)
    assert set(bins) == set(filled)
    assert chisquare([bins[index] for index in filled]).pvalue > 1e-3
    if space.mixed:
        assert sum(len(set(arch.layers)) > 1 for arch in drawn) > 500
    else:  # within a bin every architecture is equally likely
        largest = [arch for arch in space.enumerate() if encoder_parameters(arch) >= edges[4]]
        counts = Counter(arch for arch in drawn if encoder_parameters(arch) >= edges[4])
        assert set(counts) <= set(largest)
        assert chisquare([counts[arch] for arch in largest]).pvalue > 1e-3


def test_stratified_beats_uniform_where_it_matters():
    """In AutoTinyBERT's training space uniform draws hardly ever meet the small ones."""
    axes = {"depth": grid(1, 8), "hidden": grid(128, 768, 4), "ffn": grid(128, 3072, 4)}
    space = Space(**axes, heads=grid(1, 12), head_dim=(64,))
    rng = np.random.default_rng(3)
    even = [encoder_parameters(space.sample(rng)) for _ in range(1000)]
    strata = [encoder_parameters(space.sample_stratified(rng)) for _ in range(1000)]
    assert np.quantile(strata, 0.1) < 0.5 * np.quantile(even, 0.1)
    assert min(strata) < min(even)


def test_the_same_seed_draws_the_same():
    def run(space: Space) -> list[Arch]:
        rng = np.random.default_rng(5)
        found = [space.sample(rng), space.sample_stratified(rng)]
        return [*found, space.mutate(found[0], rng), space.cross(found[0], found[1], rng)]

    for space in ALL:
        assert run(space) == run(Space.from_json(space.to_json()))


# ---- evolution -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ALL)
def test_mutations_change_something_and_stay_inside(space):
    rng = np.random.default_rng(4)
    arch = space.sample(rng)
    for _ in range(1000):
        child = space.mutate(arch, rng)
        assert child != arch
        assert space.contains(child)
        arch = child


@pytest.mark.parametrize("place", ["smallest", "largest"])
def test_support_of_mutation(place):
    """Steps of at most 1 in depth and hidden, 2 in the others, all of them, also at the ends of the axes."""
    space = Space(grid(1, 6), grid(8, 48, 8), grid(1, 6), grid(2, 12, 2), grid(8, 48, 8))
    parent = getattr(space, place)()
    rng = np.random.default_rng(5)
    moves: dict[str, set[int]] = {name: set() for name in AXES}
    for _ in range(3000):
        child = space.mutate(parent, rng)
        for name in AXES:
            values = [(len(a.layers) if name == "depth" else getattr(a.layers[0], name)) for a in (parent, child)]
            moves[name].add(abs(getattr(space, name).index(values[1]) - getattr(space, name).index(values[0])))
    assert moves == {"depth": {0, 1}, "hidden": {0, 1}, "heads": {0, 1, 2}, "head_dim": {0, 1, 2}, "ffn": {0, 1, 2}}


@pytest.mark.parametrize("space", [SMALL, TIGHT, MIXED, FILLED])
def test_mutations_reach_everything(space):
    rng = np.random.default_rng(6)
    every = {arch for arch in members(space) if not space.mixed or len(arch.layers) < 3}
    arch, reached = space.smallest(), set()
    for _ in range(60 * len(every)):
        arch = space.mutate(arch, rng)
        reached.add(arch)
    assert every <= reached


@pytest.mark.parametrize("space", ALL)
def test_children_take_each_gene_from_a_parent(space):
    rng = np.random.default_rng(7)
    mixtures = 0
    for _ in range(300):
        one, two = space.sample(rng), space.sample(rng)
        child = space.cross(one, two, rng)
        assert space.contains(child)
        assert len(child.layers) in (len(one.layers), len(two.layers))
        assert child.hidden in (one.hidden, two.hidden)
        for index, layer in enumerate(child.layers):
            parents = [arch.layers[min(index, len(arch.layers) - 1)] for arch in (one, two)]
            for name in AXES[2:]:
                if name == "head_dim" and space.qkv_is_hidden:  # follows from the others
                    continue
                assert getattr(layer, name) in {getattr(parent, name) for parent in parents}
        mixtures += child not in (one, two)
    assert mixtures > (50 if space.qkv_is_hidden else 100)


def test_a_space_of_one_has_no_mutations():
    space = Space((2,), (8,), (2,), (4,), (16,))
    assert space.size() == 1
    assert space.smallest() == space.largest() == space.sample_stratified(np.random.default_rng(0))
    with pytest.raises(ValueError, match="no architecture beside"):
        space.mutate(space.smallest(), np.random.default_rng(0))


# ---- making one ------------------------------------------------------------------------------------------------------


def test_json_and_section_give_the_same():
    section = config.Space(depth=(2, 1), hidden=(8, 8, 16), heads=(2,), head_dim=(4,), ffn=(16,), exportable=True)
    space = Space.of(section)
    assert (space.depth, space.hidden) == ((1, 2), (8, 16))
    assert Space.from_json(space.to_json()) == space
    with pytest.raises(ValueError, match="a space has the keys depth"):
        Space.from_json({"depth": [1]})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"depth": ()}, "space.depth must list"),
        ({"ffn": (0, 4)}, "space.ffn must list"),
        ({"family": "brt"}, "space.family 'brt' is unknown"),
        ({"family": "modern", "head_dim": (4, 5)}, "head_dim has 5"),
        ({"family": "modern", "exportable": True}, "belongs to family bert"),
        ({"heads": (12,), "qkv_at_most_hidden": True}, "the space is empty.*qkv_at_most_hidden.*than 12 and 4"),
        ({"hidden": (7,), "qkv_is_hidden": True}, "the space is empty.*qkv_is_hidden; give heads or head_dim others"),
        ({"hidden": (7,), "heads": (2, 3), "exportable": True}, "the space is empty.*exportable"),
        ({"hidden": (7,), "heads": (2, 3), "exportable": True, "mixed": True}, "the space is empty.*exportable"),
    ],
)
def test_bad_spaces(change, sentence):
    axes = {"depth": (1, 2), "hidden": (8, 16), "heads": (2,), "head_dim": (4,), "ffn": (16,)}
    with pytest.raises(ValueError, match=sentence):
        Space(**(axes | change))


def test_counting_loads_nothing_heavy():
    code = "from frugalbert.space import Space\nassert Space(tuple(range(1, 9)), (8,), (2,), (4,), (8,)).size() == 8\n"
    assert loaded(code) == set()
