"""Arch: the sizes of one encoder, layer by layer. Text or JSON in, a validated frozen record out.

One line says it all: `modern 4x256 heads=4 ffn=640` is 4 layers of a 256-channel residual stream. A value may differ
by layer (`ffn=640*3,512`), the size of queries, keys and values is heads x head_dim and need not be the hidden size
(AutoTinyBERT, arXiv 2107.13686), and a layer may read and write only the leading `hidden` channels of the stream.
Pure Python: configuration files are checked with it before torch is imported.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, cast

from .dictionaries import read_value, write_dictionary
from .patterns import join, parse

PRESETS = {
    "tiny-modern": "modern 2x128 heads=2 ffn=320",
    "small-modern": "modern 4x256 heads=4 ffn=640",
    # Shapes of the Ettin suite (arXiv 2507.11412); the names count all parameters at ModernBERT's vocabulary of 50,368.
    "modern-17m": "modern 7x256 heads=4 ffn=384",
    "modern-32m": "modern 10x384 heads=6 ffn=576",
    "modern-68m": "modern 19x512 heads=8 ffn=768",
    "modern-150m": "modern 22x768 heads=12 ffn=1152",
    # Google's BERT sizes (arXiv 1810.04805, 1908.08962).
    "bert-tiny": "bert 2x128 heads=2 ffn=512",
    "bert-mini": "bert 4x256 heads=4 ffn=1024",
    "bert-small": "bert 4x512 heads=8 ffn=2048",
    "bert-medium": "bert 8x512 heads=8 ffn=2048",
    "bert-base": "bert 12x768 heads=12 ffn=3072",
    "bert-large": "bert 24x1024 heads=16 ffn=4096",
    # 24hBERT (arXiv 2104.07705) and Bort as released (arXiv 2010.10499).
    "24hbert": "bert-preln 24x1024 heads=16 ffn=4096",
    "bort": "bert 4x1024 heads=8 ffn=768 token_types=0 norm_epsilon=1e-05",
    # AutoTinyBERT (arXiv 2107.13686), found without (S) and with (KD-S) distillation.
    "autotinybert-s1": "bert 5x564 heads=8 head_dim=64 ffn=1054",
    "autotinybert-s2": "bert 4x396 heads=6 head_dim=64 ffn=624",
    "autotinybert-s3": "bert 4x432 heads=4 head_dim=64 ffn=384",
    "autotinybert-s4": "bert 3x320 heads=4 head_dim=64 ffn=608",
    "autotinybert-kd-s1": "bert 5x564 heads=12 head_dim=44 ffn=1024",
    "autotinybert-kd-s2": "bert 5x324 heads=12 ffn=600",
    "autotinybert-kd-s3": "bert 5x280 heads=12 head_dim=23 ffn=512",
    "autotinybert-kd-s4": "bert 4x256 heads=12 head_dim=16 ffn=480",
}
"""Preset name -> its one-line form."""

FAMILIES: dict[str, dict[str, Any]] = {
    "bert": {"token_types": 2, "embedding_norm": True, "norm_epsilon": 1e-12},
    "bert-preln": {"token_types": 2, "embedding_norm": False, "norm_epsilon": 1e-12},
    "modern": {"token_types": 0, "embedding_norm": True, "norm_epsilon": 1e-5},
}
"""Family -> the settings in which it differs from the others' defaults."""

ACTIVATIONS = ("gelu", "gelu_tanh", "relu", "silu")
LIMIT = 1_000_000
EXAMPLE = "`modern 4x256 heads=4 ffn=640`"
HEAD = re.compile(r"([1-9][0-9]{0,3})x([1-9][0-9]{0,6})")


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LIMIT:
        raise ValueError(f"{name} must be a whole number between {least} and {LIMIT}, not {value!r}")


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"write one of {', '.join(known)}"


@dataclass(frozen=True)
class LayerArch:
    """One layer: channels of the residual stream it uses, attention heads and their size, feed-forward width."""

    hidden: int
    heads: int
    head_dim: int
    ffn: int
    pattern: str = "dense"
    """Who attends to whom, in one text for all heads or one for each (`patterns.py`): `dense`, `window:64`, `star`."""

    def __post_init__(self) -> None:
        for name in ("hidden", "heads", "head_dim", "ffn"):
            _check_count(name, getattr(self, name))
        heads = parse(self.pattern)
        if len(heads) not in (1, self.heads):
            raise ValueError(f"{len(heads)} attention patterns for {self.heads} heads; write one for each head, or one")
        object.__setattr__(self, "pattern", join(heads))

    @property
    def qkv(self) -> int:
        """Width of the queries (= keys = values) of all heads together."""
        return self.heads * self.head_dim

    @property
    def window(self) -> int | None:
        """N of `window:N` in all heads, else None."""
        head = parse(self.pattern)[0]
        return head.parts[0] if self.pattern == f"window:{head.parts[:1] and head.parts[0]}" else None


@dataclass(frozen=True)
class Arch:
    """One encoder without vocabulary and task head. Build it with `Arch.parse`, `Arch.uniform` or `Arch.from_json`.

    Families: `bert` (post-norm, learned positions), `bert-preln` (24hBERT: pre-norm and a final norm, otherwise BERT),
    `modern` (pre-norm, rotary positions, gated feed-forward, no biases; ModernBERT, arXiv 2412.13663).
    """

    family: str
    hidden: int
    """Channels of the residual stream = embedding width."""
    layers: tuple[LayerArch, ...]
    max_length: int
    """Longest input in tokens (size of the table of learned positions)."""
    token_types: int
    """Segment embeddings; 0 = none."""
    embedding_norm: bool
    """LayerNorm after the embeddings. In family `modern` the first layer then has none of its own before attention."""
    norm_epsilon: float
    activation: str = "gelu"
    """`gelu` (exact), `gelu_tanh`, `relu` or `silu`; the gate's activation in family `modern`."""
    qk_norm: bool = False
    """RMSNorm of every query and key over its head (family `modern`)."""
    rope_theta: float = 10_000.0
    """Base of the rotary frequencies (family `modern`) of dense layers."""
    local_rope_theta: float = 10_000.0
    """The same for `window:N` layers."""

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"family {self.family!r} is unknown; {_suggest(str(self.family), list(FAMILIES))}")
        _check_count("hidden", self.hidden)
        _check_count("max_length", self.max_length)
        _check_count("token_types", self.token_types, least=0)
        if not 1 <= len(self.layers) <= 9999:
            raise ValueError(f"an encoder has 1 to 9999 layers, not {len(self.layers)}")
        for name in ("norm_epsilon", "rope_theta", "local_rope_theta"):
            if not 0.0 < getattr(self, name) < 1e12:
                raise ValueError(f"{name} must be a positive number, not {getattr(self, name)!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is unknown; {_suggest(self.activation, ACTIVATIONS)}")
        self._check_layers()

    def _check_layers(self) -> None:
        for index, layer in enumerate(self.layers):
            if layer.hidden > self.hidden:
                raise ValueError(
                    f"layer {index} uses {layer.hidden} channels of a stream of {self.hidden}; "
                    f"write hidden={self.hidden} or less for it"
                )
            if self.family == "modern" and layer.head_dim % 2:
                raise ValueError(
                    f"layer {index} has head_dim {layer.head_dim}, but rotary positions turn pairs of channels; "
                    "write an even head_dim"
                )
        if self.qk_norm and self.family != "modern":
            raise ValueError(f"qk_norm belongs to family modern, not {self.family}; remove it or change the family")

    # ---- making one --------------------------------------------------------------------------------------------------

    @classmethod
    def build(cls, family: str, hidden: int, layers: tuple[LayerArch, ...], options: Mapping[str, Any]) -> Arch:
        """An Arch with the family's defaults for every field that `options` leaves out."""
        if family not in FAMILIES:
            raise ValueError(f"family {family!r} is unknown; {_suggest(family, list(FAMILIES))}")
        settings: dict[str, Any] = {"max_length": 512, **FAMILIES[family], **options}
        return cls(family=family, hidden=hidden, layers=layers, **settings)

    @classmethod
    def uniform(cls, family: str, depth: int, hidden: int, heads: int, ffn: int, head_dim: int | None = None) -> Arch:
        """`depth` equal layers; head_dim defaults to hidden / heads. Raises ValueError if that is not whole."""
        layer = LayerArch(hidden, heads, _default_head_dim(hidden, heads) if head_dim is None else head_dim, ffn)
        return cls.build(family, hidden, (layer,) * depth, {})

    @classmethod
    def parse(cls, text: str) -> Arch:
        """A preset's name, the one-line form or AutoTinyBERT's dictionary -> Arch. Raises ValueError with the cure."""
        if text.lstrip().startswith("{"):
            return cls.from_json(read_value(text))
        words = text.split()
        if not words:
            raise ValueError(f"an empty text is no architecture; write a preset's name or a line such as {EXAMPLE}")
        if len(words) == 1:
            if words[0].lower() not in PRESETS:
                raise ValueError(
                    f"{text!r} is no architecture; {_suggest(words[0], list(PRESETS))} (a whole line is {EXAMPLE})"
                )
            words = PRESETS[words[0].lower()].split()
        return _parse_line(words)

    @classmethod
    def parse_or_path(cls, text: str) -> Arch | None:
        """As `parse`, but a path to a JSON file is accepted unread and gives None."""
        return None if text.endswith(".json") else cls.parse(text)

    @classmethod
    def load(cls, text: str, folder: Path | str = ".") -> Arch:
        """As `parse`, and a path ending in `.json` (relative to `folder`) is read. Raises ValueError, OSError."""
        if not text.endswith(".json"):
            return cls.parse(text)
        path = Path(folder) / text
        try:
            return cls.from_json(read_value(path.read_text(encoding="utf-8")))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path} is no architecture file: {error}") from error

    @classmethod
    def from_json(cls, value: Any) -> Arch:
        """The inverse of `to_json`; fields left out take the family's defaults. Raises ValueError."""
        options = _mapping(value, "an architecture")
        _check_keys(options, [field.name for field in fields(cls)], ("family", "hidden", "layers"), "an architecture")
        family, hidden, layers = options.pop("family"), options.pop("hidden"), options.pop("layers")
        if not isinstance(layers, list):
            raise ValueError("layers must be a list of mappings with hidden, heads, head_dim and ffn")
        options = {name: _check_type(name, item, MODEL_KEYS[name]) for name, item in options.items()}
        return cls.build(str(family), hidden, tuple(map(_layer_from_json, cast(list[Any], layers))), options)

    # ---- writing it --------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """All fields as plain JSON values."""
        value = asdict(self)
        value["layers"] = [asdict(layer) for layer in self.layers]
        return value

    def to_text(self) -> str:
        """The canonical one-line form: `Arch.parse(arch.to_text()) == arch`; defaults are left out."""
        words = [self.family, f"{len(self.layers)}x{self.hidden}"]
        if any(layer.hidden != self.hidden for layer in self.layers):
            words.append("hidden=" + _runs([layer.hidden for layer in self.layers]))
        words.append("heads=" + _runs([layer.heads for layer in self.layers]))
        if any(layer.qkv != layer.hidden for layer in self.layers):
            words.append("head_dim=" + _runs([layer.head_dim for layer in self.layers]))
        words.append("ffn=" + _runs([layer.ffn for layer in self.layers]))
        if any(layer.pattern != "dense" for layer in self.layers):
            words.append("pattern=" + _runs([layer.pattern for layer in self.layers]))
        default = Arch.build(self.family, self.hidden, self.layers, {})
        for name in MODEL_KEYS:
            value = getattr(self, name)
            if value != getattr(default, name):
                words.append(f"{name}=" + (("yes" if value else "no") if isinstance(value, bool) else str(value)))
        return " ".join(words)

    def to_dictionary(self) -> str:
        """AutoTinyBERT's one-line dictionary (sizes only). Raises ValueError for what it cannot say."""
        if self != Arch.build("bert", self.hidden, self.layers, {"max_length": self.max_length}):
            raise ValueError(f"{self} is no plain BERT, and AutoTinyBERT's dictionaries know only that; write JSON")
        return write_dictionary(self.to_json())

    def __str__(self) -> str:
        return self.to_text()

    def brief(self) -> str:
        """The one-line form with long attention patterns cut: for people."""
        return re.sub(r"(?<=pattern=)\S{60,}", lambda match: match[0][:50] + "…", self.to_text())


# ---- the one-line form ---------------------------------------------------------------------------------------------


LAYER_KEYS: dict[str, type] = {"hidden": int, "heads": int, "head_dim": int, "ffn": int, "pattern": str}
MODEL_KEYS: dict[str, type] = {
    "max_length": int,
    "token_types": int,
    "embedding_norm": bool,
    "norm_epsilon": float,
    "activation": str,
    "qk_norm": bool,
    "rope_theta": float,
    "local_rope_theta": float,
}


def _read(kind: type, text: str) -> Any:
    """A value of the one-line form. Raises ValueError."""
    if kind is bool:
        if text not in ("yes", "no"):
            raise ValueError(f"{text!r} is neither yes nor no")
        return text == "yes"
    if kind is int:
        if not re.fullmatch(r"[0-9]{1,7}", text):
            raise ValueError(f"{text!r} is no whole number")
        return int(text)
    if kind is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError(f"{text!r} is no number") from None
    return text


def _default_head_dim(hidden: int, heads: int) -> int:
    if heads < 1 or hidden % heads:
        raise ValueError(
            f"{heads} heads do not divide {hidden} channels; write head_dim as well, for example head_dim=64"
        )
    return hidden // heads


def _runs(values: Sequence[object]) -> str:
    """[8, 8, 4] -> '8*2,4'; equal values -> one."""
    if all(value == values[0] for value in values):
        return str(values[0])
    parts: list[str] = []
    start = 0
    for index in range(1, len(values) + 1):
        if index == len(values) or values[index] != values[start]:
            parts.append(str(values[start]) + (f"*{index - start}" if index - start > 1 else ""))
            start = index
    return ",".join(parts)


def _per_layer(key: str, text: str, depth: int) -> list[Any]:
    """'8*2,4' -> [8, 8, 4]; a single value serves all layers."""
    values: list[Any] = []
    for part in text.split(","):
        value, star, count = part.partition("*")
        try:
            values.extend([_read(LAYER_KEYS[key], value)] * (min(_read(int, count), depth + 1) if star else 1))
        except ValueError as error:
            raise ValueError(f"{key}={text}: {error}; write for example {key}=8 or {key}=8*2,4") from error
    if len(values) == 1 and "*" not in text:
        return values * depth
    if len(values) != depth:
        raise ValueError(
            f"{key}={text} names {len(values)} layers, the encoder has {depth}; write as many values, or one"
        )
    return values


def _parse_line(words: list[str]) -> Arch:
    head = HEAD.fullmatch(words[1])
    if words[0] not in FAMILIES:
        raise ValueError(f"{words[0]!r} is no family; {_suggest(words[0], list(FAMILIES))}")
    if not head:
        raise ValueError(f"{words[1]!r} does not say depth x hidden size; write for example 4x256, as in {EXAMPLE}")
    depth, hidden = int(head[1]), int(head[2])
    given: dict[str, str] = {}
    for word in words[2:]:
        key, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"{word!r} is no setting; write key=value, as in {EXAMPLE}")
        if key in given:
            raise ValueError(f"{key} is written twice; keep one")
        given[key] = value
    _check_keys(given, [*LAYER_KEYS, *MODEL_KEYS], ("heads", "ffn"), f"the line {' '.join(words)!r}")
    per_layer = {key: _per_layer(key, given.pop(key), depth) for key in LAYER_KEYS if key in given}
    hiddens = per_layer.pop("hidden", [hidden] * depth)
    if "head_dim" not in per_layer:
        per_layer["head_dim"] = [
            _default_head_dim(h, heads) for h, heads in zip(hiddens, per_layer["heads"], strict=True)
        ]
    layers = tuple(
        LayerArch(**{"hidden": hiddens[index], **{key: values[index] for key, values in per_layer.items()}})
        for index in range(depth)
    )
    options: dict[str, Any] = {}
    for key, value in given.items():
        try:
            options[key] = _read(MODEL_KEYS[key], value)
        except ValueError as error:
            raise ValueError(f"{key}={value}: {error}") from error
    return Arch.build(words[0], hidden, layers, options)


# ---- JSON ----------------------------------------------------------------------------------------------------------


def _check_keys(given: Mapping[str, Any], known: list[str], needed: tuple[str, ...], where: str) -> None:
    for key in given:
        if key not in known:
            raise ValueError(f"{key!r} is no setting of an architecture; {_suggest(key, known)}")
    for key in needed:
        if key not in given:
            raise ValueError(f"{where} needs {key}; a complete line is {EXAMPLE}")


def _check_type(name: str, value: Any, kind: type) -> Any:
    """A JSON value of the right kind; whole numbers serve as floats. Raises ValueError."""
    if isinstance(value, bool) is not (kind is bool) or not isinstance(value, (int, float) if kind is float else kind):
        wanted = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
        raise ValueError(f"{name} must be {wanted}, not {value!r:.60}")
    return float(value) if kind is float else value


def _mapping(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is a mapping of settings in JSON, not {value!r:.60}")
    return {str(key): item for key, item in cast(Mapping[Any, Any], value).items()}


def _layer_from_json(value: Any) -> LayerArch:
    layer = _mapping(value, "a layer")
    _check_keys(layer, list(LAYER_KEYS), ("hidden", "heads", "head_dim", "ffn"), "a layer")
    return LayerArch(**{key: _check_type(key, item, LAYER_KEYS[key]) for key, item in layer.items()})
