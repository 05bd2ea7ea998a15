"""Small pictures of attention masks: squares of shares in, a grid of inline PNG images for the page out.

Layers below each other, heads beside each other, each mask once. Images are palettes of fifteen blues and a transparent
one for what is unknown; the page inverts them in the dark. A large model's page stays small: pictures are reduced, and
some layers left out.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from frugalbert.report.wording import figure

LEVELS, UNKNOWN = 15, 15
PALE, DEEP = (244, 247, 252), (12, 52, 122)
MOST_CELLS, FINE_CELLS = 192, 40  # all of a grid; those drawn with 128 x 128 pixels, not 64 x 64
SIDES = ((4, 148), (8, 96), (400, 72))  # heads beside each other -> width on the page


@dataclass(frozen=True)
class Cell:
    """One picture: its address, what it shows in words, and a caption."""

    source: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Grid:
    """`rows`: (layers, cells); `scale` is a strip of all colours from `low` to `high`."""

    title: str = ""
    heads: list[str] = field(default_factory=list)
    rows: list[tuple[str, list[Cell]]] = field(default_factory=list)
    side: int = 0
    scale: str = ""
    low: str = ""
    high: str = ""
    note: str = ""


def png(square: Any, low: float, high: float) -> str:
    """A (s, t) array as the address of an image; NaN is transparent."""
    import numpy as np

    room = (high - low) or 1.0
    shares = np.nan_to_num((square - low) / room, nan=0.0, posinf=1.0, neginf=0.0)
    colours = np.where(np.isnan(square), UNKNOWN, np.clip(np.rint(shares * (LEVELS - 1)), 0, LEVELS - 1)).astype(int)
    height, width = colours.shape
    padded = np.pad(colours, ((0, 0), (0, width % 2)))
    lines = (padded[:, ::2] * 16 + padded[:, 1::2]).astype(np.uint8)
    data = b"".join(b"\0" + line.tobytes() for line in lines)
    steps = [level / (LEVELS - 1) for level in range(LEVELS)]
    palette = [round(a + (b - a) * step) for step in steps for a, b in zip(PALE, DEEP, strict=True)]
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 4, 3, 0, 0, 0)), (b"PLTE", bytes([*palette, 128, 128, 128])),
        (b"tRNS", bytes([255] * LEVELS + [0])), (b"IDAT", zlib.compress(data, 9)), (b"IEND", b""),
    ]  # fmt: skip
    packed = [struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
              for name, body in chunks]  # fmt: skip
    return "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n" + b"".join(packed)).decode()


def grid(
    title: str, squares: Any, rows: list[Any], ends: tuple[float, float, Callable[[float], str]],
    words: Callable[[int], tuple[str, str]],
) -> Grid:  # fmt: skip
    """Of squares (G, s, s) and the mask of each head of each layer. `ends`: what the palest and the deepest colour
    stand for, and how such values are written; `words` gives a mask's description and caption."""
    import numpy as np

    low, high, form = ends
    if not are_squares(squares):
        return Grid()
    layers = _layers(rows, len(squares))
    total = sum(len(masks) for _, masks in layers)
    step = max(1, -(-total // MOST_CELLS))
    shown = [(label, masks[:MOST_CELLS]) for label, masks in layers[::step]]
    drawn = sum(len(masks) for _, masks in shown)
    pixels = 128 if drawn <= FINE_CELLS else 64
    found: list[tuple[str, list[Cell]]] = []
    for label, masks in shown:
        cells: list[Cell] = []
        for number, heads in masks:
            alt, caption = words(number)
            picture = png(reduced(squares[number], pixels), low, high)
            cells.append(Cell(picture, f"{title}, {label}, {heads}: {alt}", caption))
        found.append((label, cells))
    heads = [name for _, name in max((masks for _, masks in shown), key=len, default=[])]
    note = f"{total - drawn} more masks are in the run’s files." if drawn < total else ""
    side = next(width for most, width in SIDES if len(heads) <= most)
    scale = png(np.linspace(low, high, 2 * LEVELS)[None], low, high)
    return Grid(title, heads, found, side, scale, form(low), form(high), note)


def are_squares(value: Any) -> bool:
    """Whether these are (G, s, s) pictures."""
    shape = getattr(value, "shape", ())
    return len(shape) == 3 and shape[1] == shape[2] and min(shape) > 0


def _layers(rows: list[Any], count: int) -> list[tuple[str, list[tuple[int, str]]]]:
    """(name, [(mask, heads)]) of layers with masks of their own; equal neighbours are one."""
    found: list[tuple[list[int], list[tuple[int, str]]]] = []
    for layer, row in enumerate(rows, 1):
        numbers = [figure(value) for value in row] if isinstance(row, list) else []
        masks = [int(value) for value in numbers if value is not None and 0 <= value < count]
        if not masks:
            continue
        one = [(masks[0], "all heads")] if len(set(masks)) == 1 and len(masks) > 1 else [
            (mask, f"head {head}") for head, mask in enumerate(masks, 1)
        ]  # fmt: skip
        if found and found[-1][1] == one:
            found[-1][0].append(layer)
        else:
            found.append(([layer], one))
    names = [f"layer {own[0]}" if len(own) == 1 else f"layers {own[0]}–{own[-1]}" for own, _ in found]
    if len(found) == 1 and len(found[0][0]) > 1:
        names = ["all layers"]
    return [(name, masks) for name, (_, masks) in zip(names, found, strict=True)]


def reduced(square: Any, most: int) -> Any:
    """At most `most` x `most` means of a square; NaN is left out of them."""
    import numpy as np

    size = len(square)
    if size <= most:
        return square
    edges = np.linspace(0, size, most + 1).astype(int)[:-1]
    known = ~np.isnan(square)
    sums, counts = (np.add.reduceat(np.add.reduceat(part.astype(float), edges, 0), edges, 1)
                    for part in (np.where(known, square, 0.0), known))  # fmt: skip
    return np.where(counts > 0, sums / np.maximum(counts, 1.0), np.nan)
