"""Agora's τ (arXiv 2010.07990): examples that a model got wrong in, new ones near them out; and what must not pass.

The paper names neither its transformations nor how near is near; these are ours. All work on words between spaces and
are a function of their arguments and the generator. A pair keeps both sides: one of them, by chance, is changed. What
comes out carries the label of what it was made from. `copies` finds texts that must not be trained on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from frugalbert import plugins
from frugalbert.finetune.tasks import Example
from frugalbert.loading import load_weights
from frugalbert.progress import quiet
from frugalbert.run import check_stop

Generator = np.random.Generator
Transform = Callable[[list[Example], Generator], list[Example]]
"""(mistakes, generator) -> new examples, as a rule one of each. A function of the user's has the same form."""
Words = Callable[[list[list[str]], Generator, float], list[list[str]]]

LONGEST = 64
"""Words of a text that the masked language model sees; a longer one is changed within a window of so many."""
CANDIDATES = 10
"""A replacement is drawn from so many likeliest, or nearest, words."""
BATCH = 32
GRAM = 3


def build(names: Sequence[str], strength: float, model: str | None, folder: Path) -> Transform:
    """The transformation of `agora.transforms`: each example by one of them, in turn.

    Args:
        strength: share of the words that are touched.
        model: directory or hub name for `masked-lm` and `synonym`.
        folder: the YAML's, for `file.py:function`.
    Raises ValueError or OSError with one sentence for unknown names, functions and models.
    """
    parts = [_one(name, strength, model, folder) for name in names]

    def transform(mistakes: list[Example], rng: Generator) -> list[Example]:
        found: list[Example] = []
        for number, part in enumerate(parts):
            found += part(mistakes[number :: len(parts)], rng)
        return found

    return transform


def _one(name: str, strength: float, model: str | None, folder: Path) -> Transform:
    if plugins.is_plugin(name):
        return _checked(plugins.load_plugin(name, folder), name)
    if name == "mix":
        return mix
    if name in WORDS:
        return by_words(WORDS[name], strength)
    if name in MODELS:
        if model is None:
            raise ValueError(f"agora.transforms: {name} needs a masked language model; write agora.transform_model")
        return by_words(MODELS[name](model), strength)
    raise ValueError(
        f"agora.transforms: there is no {name!r}; write {', '.join([*WORDS, 'mix', *MODELS])}, or file.py:function"
    )


def _checked(function: Callable[..., Any], name: str) -> Transform:
    """The user's function, whose result is looked at before it goes on."""

    def transform(mistakes: list[Example], rng: Generator) -> list[Example]:
        found = list(function(mistakes, rng))
        if not all(isinstance(example, Example) for example in found):
            raise ValueError(f"{name} must return a list of examples; make them with dataclasses.replace(example, …)")
        return found

    return transform


def by_words(change: Words, strength: float) -> Transform:
    """Lift a change of word lists to examples. What it leaves as it was is left out."""

    def transform(mistakes: list[Example], rng: Generator) -> list[Example]:
        second = [bool(example.text_b) and bool(rng.integers(2)) for example in mistakes]
        before = [
            (example.text_b if late else example.text) or "" for example, late in zip(mistakes, second, strict=True)
        ]
        after = [" ".join(words) for words in change([text.split() for text in before], rng, strength)]
        return [
            replace(example, text_b=new, id="") if late else replace(example, text=new, id="")
            for example, late, old, new in zip(mistakes, second, before, after, strict=True)
            if new and new != " ".join(old.split())
        ]

    return transform


# ---- words alone ----------------------------------------------------------------------------------------------------


def _touched(num_words: int, strength: float) -> int:
    return min(num_words, max(1, round(strength * num_words)))


def dropout(texts: list[list[str]], rng: Generator, strength: float) -> list[list[str]]:
    """Leave out that share of the words, at least one and never all."""
    found = []
    for words in texts:
        gone = set(rng.permutation(len(words))[: min(_touched(len(words), strength), len(words) - 1)].tolist())
        found.append([word for place, word in enumerate(words) if place not in gone])
    return found


def delete(texts: list[list[str]], rng: Generator, strength: float) -> list[list[str]]:
    """Leave out one run of that share of the words."""
    found = []
    for words in texts:
        size = min(_touched(len(words), strength), len(words) - 1)
        start = int(rng.integers(len(words) - size + 1)) if words else 0
        found.append(words[:start] + words[start + size :])
    return found


def swap(texts: list[list[str]], rng: Generator, strength: float) -> list[list[str]]:
    """Exchange two neighbouring runs, together that share of the words and at least two."""
    found = []
    for words in texts:
        size = max(1, _touched(len(words), strength) // 2)
        if len(words) < 2 * size:
            found.append(words)
            continue
        start = int(rng.integers(len(words) - 2 * size + 1))
        middle, end = start + size, start + 2 * size
        found.append(words[:start] + words[middle:end] + words[start:middle] + words[end:])
    return found


def mix(mistakes: list[Example], rng: Generator) -> list[Example]:
    """The first half of one mistake and the second half of another, side by side for pairs."""
    others = [mistakes[index] for index in rng.permutation(len(mistakes)).tolist()]
    found = []
    for mine, other in zip(mistakes, others, strict=True):
        text_b = None if mine.text_b is None else _halves(mine.text_b, other.text_b or "")
        new = replace(mine, text=_halves(mine.text, other.text), text_b=text_b, id="")
        if other is not mine and new.digest not in (mine.digest, other.digest):
            found.append(new)
    return found


def _halves(first: str, second: str) -> str:
    a, b = first.split(), second.split()
    return " ".join([*a[: -(-len(a) // 2)], *b[-(-len(b) // 2) :]])


# ---- words from a model ---------------------------------------------------------------------------------------------


def masked_lm(model: str) -> Words:
    """Replace words by what a masked language model thinks likely there (as TinyBERT augments, arXiv 1909.10351).

    All chosen words of a text are hidden together, one mask token each; the word itself is never drawn.
    """
    network, tokenizer = _open(model)
    known = _whole_words(tokenizer)

    def change(texts: list[list[str]], rng: Generator, strength: float) -> list[list[str]]:
        found = [list(words) for words in texts]
        chosen = [sorted(rng.permutation(len(words))[: _touched(len(words), strength)].tolist()) for words in texts]
        rows = [row for row, places in enumerate(chosen) if places]
        for first in range(0, len(rows), BATCH):
            check_stop()
            part = rows[first : first + BATCH]
            guesses = _guess(network, tokenizer, [(texts[row], chosen[row]) for row in part])
            for row, likely in zip(part, guesses, strict=True):
                for place, tokens in likely.items():
                    found[row][place] = _draw([known[t] for t in tokens if t in known], texts[row][place], rng)
        return found

    return change


def _guess(network: Any, tokenizer: Any, texts: list[tuple[list[str], list[int]]]) -> list[dict[int, list[int]]]:
    """For each (words, places to hide): the likeliest tokens at these places, as far as they were seen."""
    import torch

    shown, seen = [], []
    for words, places in texts:
        start = max(0, min(places[0], len(words) - LONGEST))
        inside = [place for place in places if place < start + LONGEST]
        mask = tokenizer.mask_token
        line = [mask if place in inside else word.replace(mask, "") for place, word in enumerate(words)]
        shown.append(" ".join(line[start : start + LONGEST]))
        seen.append(inside)
    batch = tokenizer(shown, padding=True, truncation=True, return_tensors="pt")
    hidden = batch["input_ids"] == tokenizer.mask_token_id
    with torch.inference_mode():
        logits = network(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    best = iter(logits[hidden].topk(min(4 * CANDIDATES, logits.shape[-1])).indices.tolist())
    counts = hidden.sum(1).tolist()
    tokens = [[next(best) for _ in range(count)] for count in counts]
    return [dict(zip(inside, found, strict=False)) for inside, found in zip(seen, tokens, strict=True)]  # some were cut


def synonym(model: str) -> Words:
    """Replace words by neighbours in a model's input embeddings (cosine); words of several tokens stay."""
    import torch

    network, tokenizer = _open(model)
    known = _whole_words(tokenizer)
    table = torch.nn.functional.normalize(network.get_input_embeddings().weight.detach().float(), dim=-1)
    nearest: dict[int, list[str]] = {}

    def neighbours(token: int) -> list[str]:
        if token not in nearest:
            order = (table @ table[token]).topk(min(4 * CANDIDATES, len(table))).indices.tolist()
            nearest[token] = [known[other] for other in order if other in known]
        return nearest[token]

    def change(texts: list[list[str]], rng: Generator, strength: float) -> list[list[str]]:
        found = [list(words) for words in texts]
        for words in found:
            check_stop()
            left = _touched(len(words), strength)
            for place in rng.permutation(len(words)).tolist():
                tokens = tokenizer(f" {words[place]}", add_special_tokens=False)["input_ids"]
                if left and len(tokens) == 1 and tokens[0] in known:
                    words[place] = _draw(neighbours(tokens[0]), words[place], rng)
                    left -= 1
        return found

    return change


def _whole_words(tokenizer: Any) -> dict[int, str]:
    """Tokens that are words of their own: neither pieces inside a word, nor punctuation, nor special."""
    vocabulary = tokenizer.get_vocab()
    marked = any(piece.startswith(("Ġ", "▁")) for piece in vocabulary)
    found = {}
    for piece, number in vocabulary.items():
        if not marked or piece.startswith(("Ġ", "▁")):
            text = tokenizer.convert_tokens_to_string([piece]).strip()
            if text.isalpha():
                found[number] = text
    return found


def _draw(candidates: list[str], word: str, rng: Generator) -> str:
    """One of the first candidates other than `word`; `word` if there is none."""
    others = [other for other in candidates if other.lower() != word.lower()][:CANDIDATES]
    return others[int(rng.integers(len(others)))] if others else word


def _open(model: str) -> tuple[Any, Any]:
    """A masked language model and its tokenizer. Raises ValueError."""
    from transformers import AutoModelForMaskedLM

    from frugalbert.finetune.models import open_source
    from frugalbert.model.configuration import FrugalConfig
    from frugalbert.model.modeling import FrugalForMaskedLM

    source = open_source(model, None)
    AutoModelForMaskedLM.register(FrugalConfig, FrugalForMaskedLM, exist_ok=True)
    with quiet():
        told = f"agora.transform_model: {model} is no masked language model"
        network, _ = load_weights(AutoModelForMaskedLM, source.name, told, "name one that is")
    if source.tokenizer.mask_token is None:
        raise ValueError(f"agora.transform_model: the tokenizer of {model} has no mask token")
    source.tokenizer.model_max_length = min(4 * LONGEST, source.max_positions or 4 * LONGEST)
    return network.eval(), source.tokenizer


WORDS: dict[str, Words] = {"dropout": dropout, "delete": delete, "swap": swap}
MODELS: dict[str, Callable[[str], Words]] = {"masked-lm": masked_lm, "synonym": synonym}


# ---- what must not pass ---------------------------------------------------------------------------------------------


def grams(example: Example) -> frozenset[tuple[str, ...]]:
    """Runs of three words, without case and punctuation; a text of fewer words is one run. Both sides of a pair."""
    found: set[tuple[str, ...]] = set()
    for text in (example.text, example.text_b):
        words = re.findall(r"\w+", (text or "").lower())
        found |= {tuple(words[start : start + GRAM]) for start in range(max(1, len(words) - GRAM + 1))}
    return frozenset(found - {()})


def copies(new: Sequence[Example], forbidden: Iterable[Example], max_overlap: float) -> set[int]:
    """Which of `new` are copies of a forbidden example: equal, or with more than `max_overlap` of both texts' runs in
    common (Jaccard). The forbidden are gone through once and not kept, so a test set of any size will do.
    """
    mine = [grams(example) for example in new]
    holders: dict[tuple[str, ...], list[int]] = {}
    for index, runs in enumerate(mine):
        for run in runs:
            holders.setdefault(run, []).append(index)
    found: set[int] = set()
    for example in forbidden:
        runs = grams(example)
        common: dict[int, int] = {}
        for run in runs:
            for index in holders.get(run, ()):
                common[index] = common.get(index, 0) + 1
        found.update(
            index for index, count in common.items()
            if count == len(mine[index]) == len(runs) or count > max_overlap * (len(mine[index]) + len(runs) - count)
        )  # fmt: skip
    return found
