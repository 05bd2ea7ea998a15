"""Attention patterns as data: which pairs (query i, key j) of a head may meet. A text in, masks and counts out.

One text says it for all heads of a layer: `window:64`, or for each head: `toeplitz:0..3+17|dense^3` (`^3` repeats). A
head's is one of `KINDS`, followed by `&` and tokens that see all and are seen by all: `window:5&0+64+sep` (positions,
or [SEP] by content), `&row.0` sees all, `&column.0` is seen by all. Names of the papers: `star` (arXiv 1902.09113) is
`window:1&0`, `longformer:W/0+64` (2004.05150) `window:W&0+64`, `strided:L` and `fixed:L/C` (1904.10509) use one L for
both numbers, `bigbird` (2007.14062) is `bigbird:1/2/0/128&0`; LogSparse is arXiv 1907.00235.

Positions count within a document, so a packed row is what its documents are alone; the blocks of `block` and
`block-toeplitz` are those of the row, because these are what hardware can skip. `explicit` and `block` end somewhere:
shorter inputs take the corner, longer ones are refused. A query that is left without any key sees itself (the model
sees to that, `attention.py`).
"""

from __future__ import annotations

import base64
import functools
import math
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

EXAMPLES = "dense, window:64, toeplitz:0..3+17, star, or one for each head joined by |"
GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)
FOREVER = 1 << 40
KINDS = {
    "dense": ("", "dense", "every pair"),
    "nodiag": ("", "nodiag", "every pair but (i, i)"),
    "window": ("n", "window:W", "at most W apart"),
    "strided": ("nN", "strided:W/S", "at most W apart, or a multiple of S"),
    "fixed": ("NNN", "fixed:L/C/P", "i and j in one block of L, or j among the last C of its P"),
    "logsparse": ("", "logsparse", "0 or a power of two apart"),
    "bigbird": (
        "nnnN",
        "bigbird:W/R/SEED/N",
        "at most W apart, or among R random keys of every N for each query, symmetrised",
    ),
    "random": ("pn", "random:P/SEED", "a share P of the pairs, symmetric"),
    "toeplitz": ("r", "toeplitz:0..3+17+128..", "their distance is in the runs"),
    "signed": ("s", "signed:-2..0+5", "i - j is in the runs"),
    "block-toeplitz": ("Nr", "block-toeplitz:B/0..1+4", "their distance in blocks of B is in the runs"),
    "block": ("NNb", "block:B/N/BITS", "N x N blocks of B"),
    "explicit": ("Nb", "explicit:N/BITS", "N x N pairs"),
}
"""Kind -> its parts (n whole number, N from 1, p share, r runs of distances, s runs that may be negative, b bits), how
it is written, and which pairs (i, j) of query and key it allows."""
NUMBER, RUN = re.compile(r"[0-9]{1,7}"), re.compile(r"(-?[0-9]{1,7})(?:(\.\.)(-?[0-9]{1,7})?)?")
GLOBAL = re.compile(r"(?:(row|column)\.)?([0-9]{1,7}|sep)")
Runs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Pattern:
    """Of one head. `parts` are the numbers, runs or bits of its kind; positions (-1 = [SEP]) that see or are seen."""

    kind: str
    parts: tuple[Any, ...] = ()
    rows: tuple[int, ...] = ()
    columns: tuple[int, ...] = ()

    def __str__(self) -> str:
        tail: list[str] = []
        for place in sorted({*self.rows, *self.columns}):
            only = "column." if place not in self.rows else "" if place in self.columns else "row."
            tail.append(only + ("sep" if place < 0 else str(place)))
        text = "/".join(map(_part_text, self.parts))
        return self.kind + (f":{text}" if text else "") + ("&" + "+".join(tail) if tail else "")

    @property
    def reach(self) -> int | None:
        """The longest input that the pattern is defined for; None = any."""
        return {"explicit": lambda n, _: n, "block": lambda b, n, _: b * n}.get(self.kind, lambda *_: None)(*self.parts)

    @property
    def by_distance(self) -> bool:
        """Whether i - j alone decides: then it is the same wherever in a row a document starts."""
        plain = self.kind in ("dense", "nodiag", "window", "strided", "logsparse", "toeplitz", "signed")
        return plain and not self.rows and not self.columns

    @property
    def by_row(self) -> bool:
        """Whether positions are those of the row, not of the document."""
        return self.kind in ("block", "block-toeplitz")

    @property
    def sees_itself(self) -> bool:
        """Whether every query may see its own key, at any length."""
        if self.kind in ("explicit", "block"):
            return bool(bits(self.parts[-1], self.parts[-2]).diagonal().all())
        if self.kind in ("toeplitz", "signed", "block-toeplitz"):
            return bool(_in_runs(0, self.parts[-1]))
        return self.kind not in ("nodiag", "random")

    @property
    def by_content(self) -> bool:
        """Whether it depends on where [SEP] stands."""
        return -1 in (*self.rows, *self.columns)

    def allowed(self, i: Any, j: Any, sep_i: Any = None, sep_j: Any = None) -> Any:
        """Whether queries at positions i may see keys at positions j: arrays of numpy or torch that broadcast.

        `sep_i`, `sep_j`: which of them are [SEP], where that matters.
        """
        found = _ALLOWED[self.kind](i, j, *self.parts)
        for places, x, sep in ((self.rows, i, sep_i), (self.columns, j, sep_j)):
            for place in places:
                special = x == place if place >= 0 else sep
                if special is not None:
                    found = found | special
        return found


def _part_text(part: Any) -> str:
    if not isinstance(part, tuple):
        return str(part)
    return "+".join(
        str(low) if low == high else f"{low}.." if high == FOREVER else f"{low}..{high}" for low, high in part
    )


# ---- the rules -------------------------------------------------------------------------------------------------------


def _in_runs(value: Any, runs: Runs) -> Any:
    found = value != value
    for low, high in runs:
        found = found | (value >= low) & (value <= high)
    return found


def _look_up(i: Any, j: Any, size: int, text: str) -> Any:
    import numpy as np

    table: Any = bits(text, size)
    if not isinstance(i, np.ndarray):
        import torch

        table = torch.from_numpy(table).to(i.device)
    return table[i, j]


def _hash(value: Any, seed: int) -> Any:
    """53 random bits of each number: the finaliser of splitmix64 in wrapping int64, the same everywhere."""
    value = (value + (seed + 1)) * GOLDEN
    for shift, factor in ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64))):
        value = (value ^ (value >> shift & (1 << 64 - shift) - 1)) * factor
    return (value ^ (value >> 31 & (1 << 33) - 1)) >> 11 & (1 << 53) - 1


def _bigbird(i: Any, j: Any, window: int, count: int, seed: int, size: int) -> Any:
    found = abs(i - j) <= window
    for number in range(count):
        for query, key in ((i, j), (j, i)):
            drawn = _hash(query * 64 + number, seed) % size + query // size * size
            found = found | (key == drawn)
    return found


def _random(i: Any, j: Any, share: float, seed: int) -> Any:
    low, high = i * (i <= j) + j * (j < i), i * (i > j) + j * (j >= i)
    return _hash(high * (high + 1) // 2 + low, seed) < math.ceil(share * 2**53)


def _powers(i: Any, j: Any) -> Any:
    distance = abs(i - j)
    return (distance & (distance - 1)) == 0  # 0 & -1 is 0 as well


_ALLOWED: dict[str, Any] = {
    "dense": lambda i, j: (i - j) == (i - j),
    "nodiag": lambda i, j: i != j,
    "window": lambda i, j, w: abs(i - j) <= w,
    "strided": lambda i, j, w, s: (abs(i - j) <= w) | (abs(i - j) % s == 0),
    "logsparse": _powers,
    "fixed": lambda i, j, block, c, period: (i // block == j // block) | (j % period >= period - c),
    "bigbird": _bigbird,
    "random": _random,
    "toeplitz": lambda i, j, runs: _in_runs(abs(i - j), runs),
    "signed": lambda i, j, runs: _in_runs(i - j, runs),
    "block-toeplitz": lambda i, j, block, runs: _in_runs(abs(i // block - j // block), runs),
    "block": lambda i, j, block, count, text: _look_up(i // block, j // block, count, text),
    "explicit": _look_up,
}


# ---- texts -----------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def parse(text: str) -> tuple[Pattern, ...]:
    """One Pattern for each head, or a single one that serves all. Raises ValueError with the cure."""
    heads: list[Pattern] = []
    for word in text.split("|"):
        body, repeated, count = word.partition("^")
        if repeated and not NUMBER.fullmatch(count):
            raise ValueError(f"{_short(word)} does not say how many heads; write for example dense^3")
        heads += [_parse_head(body)] * min(int(count or 1), 10_000)
    if not heads:
        raise ValueError(f"{_short(text)} is the pattern of no head; write {EXAMPLES}")
    return (heads[0],) if len(set(heads)) == 1 else tuple(heads)


def join(heads: tuple[Pattern, ...] | list[Pattern]) -> str:
    """The canonical text: the inverse of `parse`."""
    if len(set(heads)) == 1:
        return str(heads[0])
    words: list[tuple[str, int]] = []
    for head in map(str, heads):
        if words and words[-1][0] == head:
            words[-1] = (head, words[-1][1] + 1)
        else:
            words.append((head, 1))
    return "|".join(word + (f"^{count}" if count > 1 else "") for word, count in words)


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:50] + "…")


def _parse_head(text: str) -> Pattern:
    body, _, tail = text.partition("&")
    name, colon, rest = body.partition(":")
    if name in ("star", "longformer"):
        window, _, places = ("1/0" if name == "star" and not colon else rest).partition("/")
        name, rest, tail = "window", window, "+".join(filter(None, [places, tail]))
    if name == "bigbird" and not colon:
        rest, tail = "1/2/0/128", tail or "0"
    if name not in KINDS:
        raise ValueError(f"attention pattern {_short(text)} is unknown; write {EXAMPLES}")
    words = rest.split("/") if rest else []
    if name == "strided" and len(words) == 1:
        words *= 2
    if name == "fixed" and len(words) == 2:
        words.append(words[0])
    kinds = KINDS[name][0]
    if len(words) != len(kinds):
        raise ValueError(
            f"attention pattern {_short(text)}: {name} has {len(kinds)} parts, not {len(words)}; {_say(name)}"
        )
    parts = tuple(_part(kind, word, name) for kind, word in zip(kinds, words, strict=True))
    if name in ("block", "explicit"):
        bits(parts[-1], parts[-2])
    return _with_globals(Pattern(name, parts), tail)


def _say(name: str) -> str:
    return f"write {KINDS[name][1]}"


def _part(kind: str, word: str, name: str) -> Any:
    if kind in "nN" and NUMBER.fullmatch(word) and int(word) >= (kind == "N"):
        return int(word)
    if kind == "p" and re.fullmatch(r"[0-9.e-]{1,20}", word):
        share = float(word)
        if 0.0 < share <= 1.0:
            return share
    if kind in "rs" and word:
        return _runs(word, name, signed=kind == "s")
    if kind == "b" and re.fullmatch(r"[A-Za-z0-9_-]+", word):
        return word
    raise ValueError(f"attention pattern {name}: {_short(word)} does not fit; {_say(name)}")


def _runs(text: str, name: str, *, signed: bool) -> Runs:
    """'0..3+17' -> ((0, 3), (17, 17)), sorted and joined."""
    found: list[tuple[int, int]] = []
    for word in text.split("+"):
        match = RUN.fullmatch(word)
        low = int(match[1]) if match else 0
        high = (int(match[3]) if match[3] else FOREVER if match[2] else low) if match else -1
        if low > high or (low < 0 and not signed):
            raise ValueError(f"attention pattern {name}: {_short(word)} is no run of distances; write 0..3 or 17")
        found.append((low, high))
    return joined(found)


def joined(found: Iterable[tuple[int, int]]) -> Runs:
    """Runs in order, those that touch as one."""
    runs: list[tuple[int, int]] = []
    for low, high in sorted(found):
        if runs and low <= runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], max(high, runs[-1][1]))
        else:
            runs.append((low, high))
    return tuple(runs)


def _with_globals(pattern: Pattern, text: str) -> Pattern:
    rows, columns = set[int](), set[int]()
    for word in filter(None, text.split("+")):
        match = GLOBAL.fullmatch(word)
        if not match:
            raise ValueError(f"attention pattern: {_short(word)} is no token; write a position, sep, row.0 or column.0")
        place = -1 if match[2] == "sep" else int(match[2])
        for kind, places in (("row", rows), ("column", columns)):
            if match[1] in (None, kind):
                places.add(place)
    return replace(pattern, rows=tuple(sorted(rows)), columns=tuple(sorted(columns)))


def pack(mask: np.ndarray) -> str:
    """The bits of a square boolean mask as text."""
    import numpy as np

    packed = np.packbits(mask.astype(bool)).tobytes()
    return base64.urlsafe_b64encode(zlib.compress(packed, 9)).decode().rstrip("=")


@functools.lru_cache(maxsize=256)
def bits(text: str, size: int) -> np.ndarray:
    """The inverse of `pack`: (size, size) bool. Raises ValueError for bits of another size."""
    import numpy as np

    wanted = -(-size * size // 8)
    try:
        unpacker = zlib.decompressobj()
        raw = unpacker.decompress(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)), wanted + 1)
    except (ValueError, zlib.error):
        raw = b""
    if len(raw) != wanted:
        raise ValueError(f"attention pattern: {_short(text)} are not the bits of a {size} x {size} mask")
    return np.unpackbits(np.frombuffer(raw, np.uint8), count=size * size).astype(bool).reshape(size, size)


# ---- counts ----------------------------------------------------------------------------------------------------------


def check_length(text: str, length: int) -> None:
    """Raises ValueError if a head's pattern ends before `length`."""
    for pattern in parse(text):
        if pattern.reach is not None and pattern.reach < length:
            raise ValueError(
                f"the attention pattern {str(pattern)[:40]}… is defined for up to {pattern.reach} tokens, the input "
                f"has {length}; cut it, or search a mask at that length"
            )


def dense(pattern: Pattern, length: int) -> np.ndarray:
    """(length, length) bool of one head; [SEP] counts as no token."""
    import numpy as np

    place = np.arange(length)
    return np.broadcast_to(pattern.allowed(place[:, None], place[None, :]), (length, length))


@functools.lru_cache(maxsize=1024)
def pairs(pattern: Pattern, length: int) -> int:
    """How many of length x length pairs one head allows."""
    import numpy as np

    if pattern.by_distance:
        distance = np.arange(1 - length, length)
        return int(((length - abs(distance)) * pattern.allowed(distance, np.zeros_like(distance))).sum())
    return sum(int(found.sum()) for found in _rows(pattern, length, 256))


def _rows(pattern: Pattern, length: int, size: int) -> Any:
    """The mask, so many rows at a time."""
    import numpy as np

    place = np.arange(length)
    for start in range(0, length, size):
        rows = place[start : start + size, None]
        yield np.broadcast_to(pattern.allowed(rows, place[None]), (len(rows), length))


def density(text: str, length: int) -> float:
    """Mean share of the pairs that the heads allow, diagonal and both triangles counted."""
    heads = parse(text)
    check_length(text, length)
    return sum(pairs(head, length) for head in heads) / (len(heads) * length**2)


@functools.lru_cache(maxsize=256)
def blocks(pattern: Pattern, length: int, block: int) -> np.ndarray:
    """(n, n) bool, n = ceil(length / block): which blocks hold an allowed pair."""
    import numpy as np

    starts, plain = np.arange(0, length, block), replace(pattern, rows=(), columns=())
    if not plain.by_distance:
        return np.stack([np.logical_or.reduceat(rows.any(0), starts) for rows in _rows(pattern, length, block)])
    ends, distance = np.minimum(starts + block, length) - 1, np.arange(1 - length, length)
    total = np.concatenate([[0], np.cumsum(plain.allowed(distance, np.zeros_like(distance)))])
    found = total[ends[:, None] - starts + length] > total[starts[:, None] - ends + length - 1]
    for places, lines in ((pattern.rows, found), (pattern.columns, found.T)):
        lines[[place // block for place in places if 0 <= place < length]] = True
    return found


def occupancy(text: str, length: int, block: int) -> float:
    """Mean share of the blocks that hold an allowed pair: what skipping blocks still computes."""
    check_length(text, length)
    heads = parse(text)
    return float(sum(blocks(head, length, block).mean() for head in heads) / len(heads))
