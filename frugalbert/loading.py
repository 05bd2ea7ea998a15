"""The one way in for weights that others wrote: safetensors alone, no code that lies beside them, no sizes that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frugalbert.progress import number, reason

FILES = ("config.json", "model.safetensors")
LEARNED_POSITIONS = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "albert", "distilbert", "mpnet")


def load_weights(owner: Any, place: str | Path, told: str, remedy: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, Hugging Face's loading report) of `owner.from_pretrained(place, **options)`.

    Args:
        owner: A model class or one of Hugging Face's Auto classes.
        told, remedy: Beginning and end of the sentence about what cannot be loaded.

    Raises ValueError: `told` (why); `remedy`.
    """
    options |= {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        _check_sizes(place)
        return owner.from_pretrained(place, **options)
    except Exception as error:  # transformers, safetensors, JSON, shapes and the network share no base class
        raise ValueError(f"{told} ({reason(error)}); {remedy}") from None


def _check_sizes(place: str | Path) -> None:
    """Raises ValueError if a configuration speaks of more weights than the files have bytes: what they lack would be
    made, however large. Of a hub's model that comes in several files only those know, and nothing is checked."""
    folder = Path(place)
    if not folder.is_dir():
        from transformers.utils.hub import cached_file

        names = [cached_file(str(place), name, _raise_exceptions_for_missing_entries=False) for name in FILES]
        if not all(names):
            return
        folder = Path(str(names[0])).parent
    told = _mapping(folder / "config.json")
    found = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not told or not found:
        return

    def size(name: str) -> int:
        return told[name] if isinstance(told.get(name), int) else 1

    hidden, shared = size("hidden_size"), "num_hidden_groups" in told
    tables = size("max_position_embeddings") if told.get("model_type") in LEARNED_POSITIONS else 1
    width = size("embedding_size") if "embedding_size" in told else hidden
    layers = hidden * (hidden + size("intermediate_size")) + (1 if shared else size("num_hidden_layers")) * hidden
    least = (size("vocab_size") + tables + size("type_vocab_size")) * width + layers
    if found < least:
        raise ValueError(f"its config.json speaks of at least {number(least)} weights, its files have {number(found)}B")


def _mapping(path: Path) -> dict[str, Any]:
    """A JSON file's mapping; empty if there is no file. Raises ValueError for anything else."""
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError(f"{path.name} is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} is no mapping")
    return found
