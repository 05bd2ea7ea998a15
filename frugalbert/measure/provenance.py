"""Where an encoder comes from, in the words of its card: records of a run in, sentences out."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from frugalbert import config as sections
from frugalbert.progress import number

OWN = (sections.FROM_SEARCH, sections.FROM_SUPERNET)
"""Weights of the run's own super-network."""


def plain(value: Any) -> str:
    """Text of the user's as one line of Markdown that says only itself: no tables, tags, links or code of its own."""
    text = " ".join(str(value).split())[:300]
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", text)


def hub_name(start: Any) -> str | None:
    """`start` if it can be a name on the hub; a path is nobody else's business."""
    return start if isinstance(start, str) and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", start) else None


def start_of(known: dict[str, Any]) -> Any:
    """The weights that were there before any training of the run; None: random ones."""
    start = known["records"]["pretrain"].get("section", {}).get("start")
    if start == sections.FROM_TEACHER:
        start = _teacher(known)
    elif start == sections.FROM_ATTENTION:
        start = known["records"]["attention"].get("section", {}).get("start")
    return known["records"]["supernet"].get("section", {}).get("start") if start in OWN else start


def base_of(known: dict[str, Any]) -> str | None:
    """The model whose weights were there first; None if it is not known whether there was one."""
    start = start_of(known)
    if not known["trained"]:
        return None
    return "none: trained from random weights" if start is None else _short(start)


def _short(name: str) -> str:
    return hub_name(name) or Path(name).name


def _teacher(known: dict[str, Any]) -> Any:
    return (known["records"]["pretrain"].get("section", {}).get("distill") or {}).get("teacher")


def found_by(known: dict[str, Any]) -> str | None:
    """How a search chose the architecture; None if somebody else did."""
    records, search, trained = known["records"], known["search"], known["supernet"]
    pretrain, asked = (records[name].get("section", {}) for name in ("pretrain", "search"))
    source = pretrain.get("arch")
    if source == sections.FROM_ATTENTION:
        source = records["attention"].get("section", {}).get("arch")
    if source != sections.FROM_SEARCH or not search:
        return None
    limits = [
        f"{name.replace('_', ' ')} {'at least' if name == 'speedup' else 'at most'} {number(ends[0])}"
        if len(ends) == 1 else f"{name.replace('_', ' ')} {number(ends[0])} to {number(ends[1])}"
        for name, ends in asked.get("limit", {}).items() if ends
    ]  # fmt: skip
    size = records["space"].get("metrics", {}).get("architectures")
    text = f"search by {plain(asked.get('method', '?'))} over {search['evaluations']:,} of {number(size or '?')} "
    text += f"architectures, {_judged(asked, records, trained)}"
    text += f", within {', '.join(limits)}." if limits else "."
    kept = search["chosen"]
    if "measured_ms" in kept:
        text += f" {kept['latency_ms']:.3g} ms predicted, {kept['measured_ms']:.3g} ms measured"
        text += "; the limit is missed." if kept["violates"] else "."
    if pretrain.get("start") == sections.FROM_SEARCH:
        text += " Training began with the slice's weights."
    return text


def masked_by(known: dict[str, Any]) -> str | None:
    """How sparse the attention is, and where its masks come from; None if they were not learnt in the run."""
    pretrain, masks = known["records"]["pretrain"].get("section", {}), known["masks"]
    if pretrain.get("arch") != sections.FROM_ATTENTION or not masks:
        return None
    text = f"learnt masks ({plain(masks['structure'])}): {masks['density']:.1%} of pairs and "
    text += f"{masks['occupancy']['64']:.0%} of 64 x 64 blocks at {masks['length']:,} tokens. "
    kept = pretrain.get("start") == sections.FROM_ATTENTION
    return text + ("Training went on from the weights that learnt them." if kept else "Training began anew with them.")


def _judged(asked: dict[str, Any], records: dict[str, Any], trained: dict[str, Any]) -> str:
    if asked.get("quality") == "training":
        short = asked.get("training") or {}
        return f"each trained from scratch for {short.get('steps', '?')} steps"
    budget = records["supernet"].get("section", {}).get("budget", "?")
    steps, tokens = trained.get("steps", 0), trained.get("tokens", 0)
    return f"scored as slices of a super-network (budget {budget}: {steps:,} steps, {tokens:,} tokens)"


def taught_by(known: dict[str, Any]) -> str | None:
    """The teacher of a distillation, and what was learnt from it."""
    teacher, asked = _teacher(known), known["records"]["pretrain"].get("section", {}).get("distill")
    if not asked:
        return None
    terms = ("mlm", "logits", "attention", "hidden", "relation")
    weights = ", ".join(f"{name} {asked[name]:g}" for name in terms if asked.get(name))
    who = "the super-network of the run" if teacher == sections.FROM_SUPERNET else _short(teacher)
    return f"{plain(who)} (weights: {weights}; temperature {asked.get('temperature', 1.0):g})"
