"""A figure of matplotlib in, SVG that takes its colours and fonts from the page out.

`Plot.svg` is the inside of an <svg> element without any style attribute, link or identifier of its own kind: colours
are classes (`finish` has their rules, in variables that the page sets for light, dark and print), so that the page's
content security policy can forbid every other style.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from xml.etree import ElementTree

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours by name; the file that matplotlib writes carries these stand-ins, the page the variables --ink, --blue, …
COLOURS = {
    "ink": "#010101", "muted": "#020202", "grid": "#030303", "blue": "#0000b1", "orange": "#b10000", "green": "#00b100",
    "purple": "#b100b1", "grey": "#0b0b0b", "teal": "#00b1b1", "red": "#b10001",
}  # fmt: skip
POINTS = 72  # units of the drawing in an inch
KEPT = {"fill", "stroke", "stroke-width", "stroke-dasharray", "fill-opacity", "stroke-opacity", "opacity",
        "text-anchor", "font-size", "stroke-linecap", "stroke-linejoin"}  # fmt: skip
NAMES = {value: f"var(--{name})" for name, value in COLOURS.items()}


@dataclass(frozen=True)
class Plot:
    """One figure: the inside of its <svg>, its size, what it shows in words, and its caption."""

    svg: str
    width: int
    height: int
    alt: str
    caption: str = ""


def plot_of(figure: Figure, alt: str) -> Plot:
    """What matplotlib drew."""
    file = io.BytesIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    width, height = (round(side * POINTS) for side in figure.get_size_inches())
    return Plot(file.getvalue().decode(), width, height, alt)


def finish(plots: Sequence[Plot]) -> tuple[list[Plot], str]:
    """The plots with classes instead of styles and identifiers that are unique on the page, and the classes' rules."""
    classes: dict[str, str] = {}
    done = [
        Plot(_inside(plot.svg, f"p{index}-", classes), plot.width, plot.height, plot.alt, plot.caption)
        for index, plot in enumerate(plots)
    ]
    return done, "\n".join(f".{name}{{{rule}}}" for rule, name in classes.items())


def _inside(svg: str, prefix: str, classes: dict[str, str]) -> str:
    """What stands inside the root element: no metadata, no styles, no namespaces, every identifier prefixed."""
    root = ElementTree.fromstring(svg)
    used = set(re.findall(r"(?:url\(#|href=\"#)([\w.-]+)", svg))
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.split("}")[-1]
        attributes: dict[str, str] = {}
        for name, value in element.attrib.items():
            name = name.split("}")[-1]
            if name == "style" and (rule := _rule(value)):
                attributes["class"] = classes.setdefault(rule, f"m{len(classes)}")
            elif name == "id" and value == "on":
                attributes["class"] = "on"
            elif name == "id" and value in used:
                attributes["id"] = prefix + value
            elif name == "href":
                attributes["href"] = f"#{prefix}{value[1:]}"
            elif name == "clip-path":
                attributes["clip-path"] = value.replace("url(#", f"url(#{prefix}")
            elif name not in ("style", "id") and not value.startswith("rotate(-0 "):
                attributes[name] = value
        element.attrib.clear()
        element.attrib.update(attributes)
        element.tail = None
        if element.tag != "text":
            element.text = None
    return "".join(ElementTree.tostring(child, encoding="unicode") for child in root)


def _rule(style: str) -> str:
    pairs = [part.split(":", 1) for part in style.split(";") if ":" in part]
    kept = {name.strip(): value.strip() for name, value in pairs if name.strip() in KEPT}
    return ";".join(f"{name}:{NAMES.get(value, value)}" for name, value in kept.items())
