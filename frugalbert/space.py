"""Space: the architectures a search may choose from. Axes in; Archs, counts and arrays of sizes out.

Every combination of the axes' values is a member unless a constraint leaves it out (AutoTinyBERT, arXiv 2107.13686,
table 1: one size for all layers; HAT, arXiv 2005.14187: `mixed`, each layer its own). The operators of evolution live
here because they must know the axes: mutation by steps along them (AutoTinyBERT), crossover gene by gene (HAT).
No torch, and to count no numpy: plans use it.
"""

from __future__ import annotations

import functools
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from frugalbert import config
from frugalbert.model.arch import FAMILIES, Arch, LayerArch
from frugalbert.model.cost import encoder_parameters

if TYPE_CHECKING:  # `plan` counts without it
    import numpy as np

AXES = ("depth", "hidden", "heads", "head_dim", "ffn")
MOVES = {"depth": (0.25, 1), "hidden": (0.5, 1), "heads": (0.25, 2), "head_dim": (0.25, 2), "ffn": (0.5, 2)}
"""Axis -> (probability that a mutation moves the gene, steps along the axis at most): AutoTinyBERT's operators."""
TRIES = 200
Pair = tuple[int, int]
Shape = tuple[int, int, int]
Genes = tuple[int, int, tuple[Shape, ...]]
"""depth, hidden, and (heads, head_dim, ffn): once, or for every layer of a mixed space."""


@dataclass(frozen=True)
class Space:
    """Axes of whole numbers, made ascending; `config.Space` has their meaning. An empty space is a ValueError."""

    depth: tuple[int, ...]
    hidden: tuple[int, ...]
    heads: tuple[int, ...]
    head_dim: tuple[int, ...]
    ffn: tuple[int, ...]
    family: str = "bert"
    mixed: bool = False
    qkv_at_most_hidden: bool = False
    qkv_is_hidden: bool = False
    exportable: bool = False

    def __post_init__(self) -> None:
        for name in AXES:
            values = tuple(sorted(set(getattr(self, name))))
            if not values or values[0] < 1:
                raise ValueError(f"space.{name} must list whole numbers from 1 on, not {list(values)}")
            object.__setattr__(self, name, values)
        if self.family not in FAMILIES:
            raise ValueError(f"space.family {self.family!r} is unknown; write one of {', '.join(FAMILIES)}")
        odd = [size for size in self.head_dim if size % 2]
        if self.family == "modern" and odd:
            raise ValueError(f"space.head_dim has {odd[0]}, but family modern turns pairs of channels; write even ones")
        if self.exportable and self.family != "bert":
            raise ValueError(f"space.exportable belongs to family bert, not {self.family}; remove it")
        if not self.size():
            other = "others" if self.qkv_is_hidden else f"smaller ones than {self.heads[0]} and {self.head_dim[0]}"
            raise ValueError(
                f"the space is empty: no heads x head_dim fits any hidden size under {' and '.join(self._rules())}; "
                f"give heads or head_dim {other}, or remove the constraint"
            )

    # ---- reading and writing -----------------------------------------------------------------------------------------

    @classmethod
    def of(cls, section: config.Space) -> Space:
        """The space of the YAML's section. Raises ValueError if nothing is left of it."""
        return cls(**section.model_dump())

    def to_json(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Space:
        """The inverse of `to_json`. Raises ValueError."""
        known = {field.name for field in fields(cls)}
        if set(value) - known or set(AXES) - set(value):
            raise ValueError(f"a space has the keys {', '.join(AXES)} and perhaps {', '.join(sorted(known - {*AXES}))}")
        for key, item in value.items():
            if key in AXES:
                fits = isinstance(item, list | tuple) and all(type(size) is int for size in item)
            else:
                fits = isinstance(item, str if key == "family" else bool)
            if not fits:
                raise ValueError(f"the {key} of a space is not {item!r:.80}; write the space again")
        return cls(**{key: tuple(item) if isinstance(item, list) else item for key, item in value.items()})

    # ---- what is in it -----------------------------------------------------------------------------------------------

    def size(self) -> int:
        """How many architectures there are, exactly, without listing them."""
        if not self.mixed:
            return len(self.depth) * len(self.ffn) * sum(len(_pairs(self, hidden)) for hidden in self.hidden)
        return sum(
            len(self.ffn) ** depth * _combinations(_blocks(self, hidden), depth)
            for hidden in self.hidden
            for depth in self.depth
        )

    def columns(self, rows: int = 65536) -> Iterator[dict[str, np.ndarray]]:
        """Every uniform architecture as int64 arrays by axis, at most `rows` at a time: for costs of all at once."""
        import numpy as np

        widths = [(hidden, *pair) for hidden in self.hidden for pair in _pairs(self, hidden)]
        table = np.array(widths, dtype=np.int64)
        total = len(self.depth) * len(widths) * len(self.ffn)
        for start in range(0, total, rows):
            index = np.arange(start, min(start + rows, total))
            index, ffn = np.divmod(index, len(self.ffn))
            depth, width = np.divmod(index, len(widths))
            values = (np.array(self.depth)[depth], *table[width].T, np.array(self.ffn)[ffn])
            yield dict(zip(AXES, values, strict=True))

    def enumerate(self) -> Iterator[Arch]:
        """Every uniform architecture, in the order of `columns`."""
        for part in self.columns(4096):
            for depth, hidden, *shape in zip(*(part[name].tolist() for name in AXES), strict=True):
                yield self._build((depth, hidden, (tuple(shape),)))

    def check(self, arch: Arch) -> None:
        """Raises ValueError saying why `arch` is not in the space."""
        if arch.family != self.family:
            raise ValueError(f"the space has architectures of family {self.family}, not {arch.family}")
        if arch != Arch.build(arch.family, arch.hidden, arch.layers, {"max_length": arch.max_length}):
            raise ValueError(
                f"{arch} has settings beside its sizes; the space has the defaults of family {arch.family}"
            )
        if any(layer.hidden != arch.hidden or layer.pattern != "dense" for layer in arch.layers):
            raise ValueError("layers of the space use all channels of the stream and attend densely")
        if not self.mixed and len(set(arch.layers)) > 1:
            raise ValueError("layers differ, but the space has one size for all (mixed: false)")
        values = {"depth": {len(arch.layers)}, "hidden": {arch.hidden}}
        values |= {name: {getattr(layer, name) for layer in arch.layers} for name in AXES[2:]}
        for name, found in values.items():
            for value in sorted(found - set(getattr(self, name))):
                raise ValueError(f"{name} {value} is not on the space's axis ({_short(getattr(self, name))})")
        if not self._allows(arch.hidden, tuple((layer.heads, layer.head_dim, layer.ffn) for layer in arch.layers)):
            raise ValueError(f"{arch} breaks the space's constraint {' or '.join(self._rules())}")

    def contains(self, arch: Arch) -> bool:
        try:
            self.check(arch)
        except ValueError:
            return False
        return True

    def smallest(self) -> Arch:
        """The member of which every other has at least the depth, heads, head_dim and ffn.

        Under `qkv_is_hidden` none has all of them: the one of the smallest width with the fewest heads.
        """
        hidden = next(hidden for hidden in self.hidden if _pairs(self, hidden))
        return self._build((self.depth[0], hidden, ((*_pairs(self, hidden)[0], self.ffn[0]),)))

    def largest(self) -> Arch:
        """The super-network: every member is a slice of it. Constraints may keep it out of the space itself."""
        pairs = [(hidden, *pair) for hidden in self.hidden for pair in _pairs(self, hidden)]
        hidden, heads, head_dim = (max(values) for values in zip(*pairs, strict=True))
        return self._build((self.depth[-1], hidden, ((heads, head_dim, self.ffn[-1]),)))

    # ---- drawing -----------------------------------------------------------------------------------------------------

    def sample(self, rng: np.random.Generator) -> Arch:
        """One at random: every member equally likely; of a mixed space depth and width first, then the layers."""
        if not self.mixed:
            ends = _width_ends(self)
            place = int(rng.integers(ends[-1]))
            index = bisect_right(ends, place)
            hidden = self.hidden[index]
            pair = _pairs(self, hidden)[place - ends[index]]  # counts from the end of this width's pairs
            return self._build((_pick(self.depth, rng), hidden, ((*pair, _pick(self.ffn, rng)),)))
        depth, hidden = _pick(self.depth, rng), _pick([h for h in self.hidden if _pairs(self, h)], rng)
        pairs = _draw_pairs(_blocks(self, hidden), depth, rng)
        return self._build((depth, hidden, tuple((*pair, _pick(self.ffn, rng)) for pair in pairs)))

    def sample_stratified(self, rng: np.random.Generator, strata: int = 10) -> Arch:
        """One at random, evenly over `strata` bins of log(parameters of the layers): small and huge ones too.

        Within a bin every uniform architecture is equally likely; in a mixed space its layers are then re-drawn as far
        as the bin allows. Bins without a uniform architecture are left out.
        """
        cells, bins = _strata(self, strata)
        low, high, first, ends = bins[int(rng.integers(len(bins)))]
        place = int(rng.integers(ends[-1]))
        cell = int(ends.searchsorted(place, side="right"))
        ffn = self.ffn[int(first[cell]) + place - int(ends[cell - 1] if cell else 0)]
        depth, hidden, heads, head_dim = (int(value) for value in cells[cell])
        arch = self._build((depth, hidden, ((heads, head_dim, ffn),)))
        return self._mix(arch, (low, high), rng) if self.mixed else arch

    def _mix(self, arch: Arch, limits: tuple[float, float], rng: np.random.Generator) -> Arch:
        """The same depth and width with layers of their own, its number of parameters within limits."""
        depth, hidden, shapes = self._genes(arch)
        for layer in rng.permutation(depth).tolist():
            shape = (*_pick(_pairs(self, hidden), rng), _pick(self.ffn, rng))
            changed = (*shapes[:layer], shape, *shapes[layer + 1 :])
            if not self._allows(hidden, changed):
                continue
            other = self._build((depth, hidden, changed))
            if limits[0] <= encoder_parameters(other) < limits[1]:
                arch, shapes = other, changed
        return arch

    # ---- evolution ---------------------------------------------------------------------------------------------------

    def mutate(self, arch: Arch, rng: np.random.Generator) -> Arch:
        """Another member near `arch`: at least one gene moved along its axis (`MOVES`), if mixed about two layers'.

        A member without neighbours is answered with a random other one; ValueError if there is no other.
        """
        depth, hidden, shapes = self._genes(arch)
        for _ in range(TRIES):
            new_depth, new_hidden = self._move("depth", depth, rng), self._move("hidden", hidden, rng)
            new = [self._move_shape(shape, rng) if rng.random() * len(shapes) < 2 else shape for shape in shapes]
            if self.mixed:  # a deeper child repeats layers of its parent
                new = new[:new_depth] + [_pick(shapes, rng) for _ in range(new_depth - depth)]
            genes = (new_depth, new_hidden, self._fitted(new_hidden, new))
            if genes != (depth, hidden, shapes) and self._allows(new_hidden, genes[2]):
                return self._build(genes)
        for _ in range(TRIES):
            other = self.sample(rng)
            if other != arch:
                return other
        raise ValueError(f"the space has no architecture beside {arch}; give an axis more values")

    def cross(self, one: Arch, two: Arch, rng: np.random.Generator) -> Arch:
        """A member that takes each gene from either parent; `one` itself if the constraints allow no mixture."""
        (depth, hidden, shapes), (other_depth, other_hidden, other_shapes) = self._genes(one), self._genes(two)
        for _ in range(TRIES):
            child_depth = _pick((depth, other_depth), rng)
            both = [
                (shapes[min(index, len(shapes) - 1)], other_shapes[min(index, len(other_shapes) - 1)])
                for index in range(child_depth if self.mixed else 1)
            ]
            mixture = [_shape(_pick(pair, rng) for pair in zip(a, b, strict=True)) for a, b in both]
            child_hidden = _pick((hidden, other_hidden), rng)
            child = self._fitted(child_hidden, mixture)
            if self._allows(child_hidden, child):
                return self._build((child_depth, child_hidden, child))
        return one

    def _move(self, name: str, value: int, rng: np.random.Generator) -> int:
        probability, reach = MOVES[name]
        axis: tuple[int, ...] = getattr(self, name)
        if len(axis) == 1 or rng.random() >= probability:
            return value
        here = bisect_left(axis, value)
        return _pick(axis[max(0, here - reach) : here] + axis[here + 1 : here + reach + 1], rng)

    def _move_shape(self, shape: Shape, rng: np.random.Generator) -> Shape:
        return _shape(self._move(name, value, rng) for name, value in zip(AXES[2:], shape, strict=True))

    # ---- genes -------------------------------------------------------------------------------------------------------

    def _genes(self, arch: Arch) -> Genes:
        layers = arch.layers if self.mixed else arch.layers[:1]
        return len(arch.layers), arch.hidden, tuple((layer.heads, layer.head_dim, layer.ffn) for layer in layers)

    def _build(self, genes: Genes) -> Arch:
        depth, hidden, shapes = genes
        layers = tuple(LayerArch(hidden, *shape) for shape in shapes)
        return Arch.build(self.family, hidden, layers * depth if len(layers) == 1 else layers, {})

    def _fitted(self, hidden: int, shapes: Iterable[Shape]) -> tuple[Shape, ...]:
        """Under `qkv_is_hidden` the size of a head follows from the others."""
        if not self.qkv_is_hidden:
            return tuple(shapes)
        return tuple((heads, hidden // heads, ffn) for heads, _, ffn in shapes)

    def _rules(self) -> list[str]:
        return [name for name in ("qkv_at_most_hidden", "qkv_is_hidden", "exportable") if getattr(self, name)]

    def _allows(self, hidden: int, shapes: tuple[Shape, ...]) -> bool:
        """Whether the constraints do."""
        if self.qkv_is_hidden and not {shape[:2] for shape in shapes} <= set(_pairs(self, hidden)):
            return False
        if self.qkv_at_most_hidden and any(heads * head_dim > hidden for heads, head_dim, _ in shapes):
            return False
        return not self.exportable or any(
            max(shape[0] for shape in shapes) <= heads and max(shape[1] for shape in shapes) <= hidden // heads
            for heads in _divisors(hidden)
        )


def _pick(values: Any, rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]


def _shape(values: Iterator[int]) -> Shape:
    heads, head_dim, ffn = values
    return heads, head_dim, ffn


def _short(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values)) if len(values) <= 8 else f"{len(values)} values from {values[0]} to {values[-1]}"


@functools.cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(value for value in range(1, number + 1) if number % value == 0)


# ---- heads and head sizes that fit a width --------------------------------------------------------------------------


@functools.lru_cache(maxsize=4096)
def _blocks(space: Space, hidden: int) -> tuple[tuple[Pair, ...], ...]:
    """Sets of (heads, head_dim); layers that take theirs from one set make a member of the space.

    Stock BERT has one number of heads h' for all layers, a divisor of the width, and heads of width / h'; smaller ones
    are padded. So there is a set for each h', and a member is in at least one of them.
    """
    pairs = [(n, d) for n in space.heads for d in space.head_dim if not space.qkv_at_most_hidden or n * d <= hidden]
    pairs = [(n, d) for n, d in pairs if not space.qkv_is_hidden or n * d == hidden]
    if not space.exportable:
        return (tuple(pairs),) if pairs else ()
    sets = [tuple(pair for pair in pairs if pair[0] <= h and pair[1] <= hidden // h) for h in _divisors(hidden)]
    return tuple(found for found in sets if found)


@functools.lru_cache(maxsize=4096)
def _pairs(space: Space, hidden: int) -> tuple[Pair, ...]:
    """Every (heads, head_dim) that fits the width if all layers have it."""
    return tuple(sorted({pair for block in _blocks(space, hidden) for pair in block}))


def _combinations(blocks: tuple[tuple[Pair, ...], ...], depth: int) -> int:
    """Number of `depth`-tuples of pairs that lie within at least one block.

    Inclusion and exclusion. More heads mean smaller ones, so an intersection of blocks depends on the first and the
    last alone; what lies between cancels, and only neighbours remain.
    """
    both = [set(one) & set(two) for one, two in zip(blocks, blocks[1:], strict=False)]
    return sum(len(block) ** depth for block in blocks) - sum(len(pairs) ** depth for pairs in both)


def _draw_pairs(blocks: tuple[tuple[Pair, ...], ...], depth: int, rng: np.random.Generator) -> list[Pair]:
    """A `depth`-tuple within a block, each equally likely: those in several blocks come as often, and are thinned."""
    weights = [float(len(block)) ** depth for block in blocks]
    while True:
        block = blocks[int(rng.choice(len(blocks), p=[weight / sum(weights) for weight in weights]))]
        pairs = [_pick(block, rng) for _ in range(depth)]
        if rng.random() * sum(set(pairs) <= set(other) for other in blocks) < 1.0:
            return pairs


@functools.lru_cache(maxsize=16)
def _width_ends(space: Space) -> list[int]:
    """Running number of (hidden, heads, head_dim) triples, by width."""
    return list(accumulate(len(_pairs(space, hidden)) for hidden in space.hidden))


# ---- bins of sizes ---------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=4)
def _strata(space: Space, strata: int) -> tuple[np.ndarray, list[tuple[float, float, np.ndarray, np.ndarray]]]:
    """Cells (depth, hidden, heads, head_dim), and per bin: its ends, each cell's first ffn in it, running counts.

    The number of parameters is affine in depth and in ffn, so three architectures per width tell all of them.
    """
    import numpy as np

    widths = [(hidden, *pair) for hidden in space.hidden for pair in _pairs(space, hidden)]

    def count(depth: int, hidden: int, heads: int, head_dim: int, ffn: int) -> int:
        return encoder_parameters(space._build((depth, hidden, ((heads, head_dim, ffn),))))

    known = np.array([(count(1, *width, 1), count(2, *width, 1), count(1, *width, 2)) for width in widths], dtype=float)
    layer, slope = known[:, 1] - known[:, 0], known[:, 2] - known[:, 0]
    rest = known[:, 0] - layer
    depths = np.array(space.depth, dtype=float)[:, None]
    cells = np.array([(depth, *width) for depth in space.depth for width in widths], dtype=np.int64)
    sizes = [(rest + depths * (layer + slope * (ffn - 1))) for ffn in (space.ffn[0], space.ffn[-1])]
    edges = np.geomspace(sizes[0].min() - 0.5, sizes[1].max() + 0.5, strata + 1)
    ffn = np.array(space.ffn)
    starts = [np.searchsorted(ffn, (((edge - rest) / depths - layer) / slope + 1).ravel()) for edge in edges]
    bins = [
        (float(edges[index]), float(edges[index + 1]), starts[index], np.cumsum(starts[index + 1] - starts[index]))
        for index in range(strata)
    ]
    return cells, [found for found in bins if found[3][-1] > 0]
