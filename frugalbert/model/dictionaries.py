"""AutoTinyBERT's written forms of an architecture: text in, the JSON value of `Arch.from_json` out, and back.

Its scripts pass Python dictionaries of five keys, one per line; its released `config.json` has BERT's keys and
`qkv_size` (arXiv 2107.13686). There they went through `eval`; here nothing is run: only plain keys, whole numbers and
lists of them are read. This module knows no Arch, so that `arch.py` can use it.
"""

from __future__ import annotations

import json
import re
from typing import Any, cast

SIZES = ("sample_intermediate_sizes", "sample_num_attention_heads", "sample_qkv_sizes")
KEYS = ("sample_layer_num", "sample_hidden_size", *SIZES)
QUOTED = re.compile(r"'([a-z_]{1,40})'")
CONFIG = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads")
EXAMPLE = (
    "{'sample_layer_num': 2, 'sample_num_attention_heads': [4, 4], 'sample_qkv_sizes': [256, 256], "
    "'sample_hidden_size': 320, 'sample_intermediate_sizes': [608, 608]}"
)


def read_value(text: str) -> Any:
    """The JSON value of a text; a dictionary of AutoTinyBERT's or its released config becomes what Arch reads.

    Raises ValueError, for a dictionary with an example.
    """
    ours = "sample_layer_num" not in text
    try:
        value = json.loads(text) if ours else json.loads(QUOTED.sub(r'"\1"', text), object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("lists and mappings are nested too deeply for an architecture") from None
    except ValueError as error:
        if ours:
            raise
        raise ValueError(f"{text.strip():.60} … is no dictionary ({error}); write {EXAMPLE}") from None
    if not isinstance(value, dict):
        return value
    found = cast("dict[str, Any]", value)
    if not ours:
        return _from_dictionary(found)
    return _from_config(found) if "qkv_size" in found else found


def write_dictionary(value: dict[str, Any]) -> str:
    """`Arch.to_json()` as AutoTinyBERT's one-line dictionary. Raises ValueError for what it cannot say."""
    layers = value["layers"]
    if any(layer["hidden"] != value["hidden"] or layer["pattern"] != "dense" for layer in layers):
        raise ValueError("AutoTinyBERT's dictionaries know dense layers over all channels only; write JSON instead")
    return str({
        "sample_layer_num": len(layers),
        "sample_num_attention_heads": [layer["heads"] for layer in layers],
        "sample_qkv_sizes": [layer["heads"] * layer["head_dim"] for layer in layers],
        "sample_hidden_size": value["hidden"],
        "sample_intermediate_sizes": [layer["ffn"] for layer in layers],
    })  # fmt: skip


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _count(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number from 1 on, not {value!r:.40}")
    return value


def _from_dictionary(value: dict[str, Any]) -> dict[str, Any]:
    if sorted(value) != sorted(KEYS):
        raise ValueError(f"an AutoTinyBERT dictionary has the keys {', '.join(KEYS)}, not {', '.join(sorted(value))}")
    depth, hidden = (_count(name, value[name]) for name in KEYS[:2])
    lists: list[list[int]] = []
    for name in SIZES:
        sizes = value[name]
        if not isinstance(sizes, list) or len(cast("list[Any]", sizes)) != depth:
            raise ValueError(f"{name} must list {depth} numbers, one per layer, not {sizes!r:.60}")
        lists.append([_count(name, size) for size in cast("list[Any]", sizes)])
    return _json(hidden, lists)


def _from_config(value: dict[str, Any]) -> dict[str, Any]:
    missing = [name for name in CONFIG if name not in value]
    if missing:
        raise ValueError(f"a configuration with qkv_size also needs {missing[0]}")
    if value.get("hidden_act", "gelu") != "gelu":
        raise ValueError(f"hidden_act {value['hidden_act']!r:.40} is not AutoTinyBERT's gelu")
    depth, hidden, ffn, heads = (_count(name, value[name]) for name in CONFIG)
    if depth > 9999:
        raise ValueError(f"num_hidden_layers must be 9999 or less, not {depth}")
    sizes = [[size] * depth for size in (ffn, heads, _count("qkv_size", value["qkv_size"]))]
    names = {"max_position_embeddings": "max_length", "type_vocab_size": "token_types"}
    return _json(hidden, sizes) | {ours: value[theirs] for theirs, ours in names.items() if theirs in value}


def _json(hidden: int, sizes: list[list[int]]) -> dict[str, Any]:
    layers: list[dict[str, int]] = []
    for ffn, heads, qkv in zip(*sizes, strict=True):
        if qkv % heads:
            raise ValueError(f"{qkv} query channels cannot be shared by {heads} heads; write a multiple of {heads}")
        layers.append({"hidden": hidden, "heads": heads, "head_dim": qkv // heads, "ffn": ffn})
    return {"family": "bert", "hidden": hidden, "layers": layers}
