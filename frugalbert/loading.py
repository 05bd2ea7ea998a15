"""The one way in for weights that others wrote: safetensors alone, no code that lies beside them, no sizes that lie."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from frugalbert.progress import number, reason


def load_weights(owner: Any, place: str | Path, told: str, remedy: str, **options: Any) -> tuple[Any, dict[str, Any]]:
    """(model, Hugging Face's loading report) of `owner.from_pretrained(place, **options)`.

    Args:
        owner: A model class or one of Hugging Face's Auto classes.
        told, remedy: Beginning and end of the sentence about what cannot be loaded.

    Raises ValueError: `told` (why); `remedy`.
    """
    options |= {"output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        _check_sizes(Path(place))
        return owner.from_pretrained(place, **options)
    except Exception as error:  # transformers, safetensors, JSON, shapes and the network share no base class
        raise ValueError(f"{told} ({reason(error)}); {remedy}") from None


def _check_sizes(folder: Path) -> None:
    """Raises ValueError if a directory's configuration speaks of more weights than its files have bytes: what they lack
    would be made, however large."""
    if not (folder / "config.json").is_file():
        return
    told = json.loads((folder / "config.json").read_bytes())
    found = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    if not isinstance(told, dict) or not found:
        return

    def size(name: str) -> int:
        return told[name] if isinstance(told.get(name), int) else 1

    width = size("embedding_size" if "embedding_size" in told else "hidden_size")
    least = max(size("vocab_size") * width, size("hidden_size") * size("intermediate_size"), size("num_hidden_layers"))
    if found < least:
        raise ValueError(f"its config.json speaks of at least {number(least)} weights, its files have {number(found)}B")
