"""The run's corpus in; the built-in task `python-docs` out: which package does a docstring come from?

Documents of the source `python-docs/PACKAGE` (see `data/corpus.py`) are reduced to their beginning, and the names of
all packages in question are replaced by one neutral word, so that the answer does not stand in the text. The corpus's
training documents are the training pool and its held-out documents the dev set: pre-training never saw a dev text.
"""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

from frugalbert.finetune.tasks import Example, digest

SOURCE = "python-docs/"
NUM_CLASSES = 8
TRAIN_PER_CLASS, MIN_TRAIN = 150, 8
DEV_PER_CLASS, MIN_DEV = 100, 3
MAX_CHARACTERS, MIN_WORDS = 300, 5
NEUTRAL = "thing"
ALIASES = {
    "PIL": ("pillow",),
    "bs4": ("beautifulsoup",),
    "cv2": ("opencv",),
    "dateutil": ("python-dateutil",),
    "huggingface_hub": ("huggingface", "hugging face", "hf"),
    "jax": ("jnp",),
    "matplotlib": ("mpl", "plt", "pyplot"),
    "networkx": ("nx",),
    "numpy": ("np",),
    "onnxruntime": ("ort",),
    "pandas": ("pd",),
    "polars": ("pl",),
    "pyarrow": ("arrow", "pa"),
    "seaborn": ("sns",),
    "sklearn": ("scikit-learn", "scikit"),
    "sympy": ("sym",),
    "tensorflow": ("tf",),
    "torch": ("pytorch",),
    "transformers": ("hugging face", "huggingface", "hf"),
    "xarray": ("xr",),
    "yaml": ("pyyaml",),
}
"""What else a package is called in prose, on PyPI or after `import … as`."""


def examples(corpus: Path, max_train: int | None) -> tuple[tuple[str, ...], list[Example], list[Example]]:
    """Class names (packages, alphabetical), balanced training examples and dev examples.

    Args:
        corpus: the corpus stage's directory.
        max_train: training examples in all; None = `TRAIN_PER_CLASS` of each class.
    Raises ValueError if the corpus has fewer than two packages with enough documents.
    """
    pools = {split: _read(corpus, split) for split in ("train", "held_out")}
    labels = _choose(pools)
    mask = pattern(labels)
    sets = {split: [(mask.sub(NEUTRAL, text), package) for text, package in pools[split]] for split in pools}
    sets = {split: [pair for pair in sets[split] if pair[1] in labels and is_usable(pair[0])] for split in sets}
    owners: dict[str, set[str]] = {}
    for text, package in (pair for split in sets for pair in sets[split]):
        owners.setdefault(text, set()).add(package)
    seen = {text for text, _ in sets["train"]}
    sets["held_out"] = [pair for pair in sets["held_out"] if pair[0] not in seen]
    per_class = TRAIN_PER_CLASS if max_train is None else max(1, max_train // len(labels))
    found = []
    for split, most in (("train", per_class), ("held_out", DEV_PER_CLASS)):
        numbered = {text: labels.index(package) for text, package in sets[split] if len(owners[text]) == 1}
        found.append(_balance([Example(text, None, label) for text, label in numbered.items()], most))
    return labels, found[0], found[1]


def beginning(document: str) -> str:
    """First paragraphs of a docstring as one line, up to `MAX_CHARACTERS`; only the first is ever cut."""
    text = ""
    for paragraph in re.split(r"\n\s*\n", document.strip()):
        line = " ".join(paragraph.split())
        if text and len(text) + len(line) >= MAX_CHARACTERS:
            break
        text = f"{text} {line}".strip()
    return text[:MAX_CHARACTERS]


def is_usable(text: str) -> bool:
    """Whether enough words are left to say anything."""
    return len(re.findall(r"[A-Za-z]{2,}", text.replace(NEUTRAL, ""))) >= MIN_WORDS


def pattern(packages: tuple[str, ...]) -> re.Pattern[str]:
    """Matches every name of the packages, in any case.

    Also inside dotted and underscored identifiers; names of five letters and more inside longer words too.
    """
    names = {name for package in packages for name in (package, *ALIASES.get(package, ()))}
    parts = []
    for name in sorted(names, key=lambda name: (-len(name), name)):
        flexible = "[-_. ]?".join(re.escape(part) for part in re.split(r"[-_. ]", name) if part)
        parts.append(flexible if len(name) >= 5 else rf"(?<![A-Za-z0-9]){flexible}(?![A-Za-z0-9])")
    return re.compile("|".join(parts), re.IGNORECASE)


def _read(corpus: Path, split: str) -> list[tuple[str, str]]:
    from frugalbert.data.corpus import read_documents

    found = []
    for document in read_documents(corpus, split):
        if document.source.startswith(SOURCE):
            text = beginning(document.text)
            if is_usable(text):
                found.append((text, document.source.removeprefix(SOURCE)))
    return found


def _choose(pools: dict[str, list[tuple[str, str]]]) -> tuple[str, ...]:
    """The packages with the most training documents among those with enough of both kinds; ties by name."""
    train, dev = (Counter(package for _, package in pools[split]) for split in ("train", "held_out"))
    enough = [package for package in train if train[package] >= MIN_TRAIN and dev[package] >= MIN_DEV]
    if len(enough) < 2:
        raise ValueError(
            f"python-docs: {len(enough)} packages of the corpus have {MIN_TRAIN} training and {MIN_DEV} held-out "
            "docstrings, two are needed; add python-docs to corpus.sources, or raise corpus.held_out (0.05)"
        )
    return tuple(sorted(sorted(enough, key=lambda package: (-train[package], package))[:NUM_CLASSES]))


def _balance(pool: list[Example], most: int) -> list[Example]:
    """At most `most` examples of each class, chosen by hash: the same for every seed and document order."""
    taken: Counter[int] = Counter()
    chosen = []
    for example in sorted(pool, key=lambda example: digest(example.text)):
        label = example.label
        assert isinstance(label, int)
        if taken[label] < most:
            taken[label] += 1
            chosen.append(example)
    return chosen
