"""The tokenizer stage: train WordPiece, byte-level BPE or Unigram on the corpus, or load one.

Trained vocabularies have [PAD] [UNK] [CLS] [SEP] [MASK] at 0 … 4 and a size that is a multiple of 64. The same text
gives the same bytes: the `tokenizers` library alone does not promise that for WordPiece (issue 1794) and Unigram, so
WordPiece's merges are learned by BPE over marked words (the same algorithm without the unordered step), and Unigram's
scores are estimated once more from its set of pieces. Training runs in a process of its own, so that it can be stopped.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert import run
from frugalbert.dist import usable_cores
from frugalbert.fanout import run_tasks
from frugalbert.progress import reason

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    from frugalbert.config import Machine, Tokenizer

SPECIAL = {"pad": "[PAD]", "unk": "[UNK]", "cls": "[CLS]", "sep": "[SEP]", "mask": "[MASK]"}
FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MULTIPLE = 64
LEAST = 128  # entries that `tokenizer.vocab_size` may ask for
MAX_LENGTH = 512
MAX_ALPHABET = 1000  # characters with pieces of their own, as in BERT; at most a quarter of the vocabulary
START = "\x02"  # marks the beginning of a word while WordPiece is trained; the corpus holds no control characters
UNIGRAM_ROUNDS = 3
UNIGRAM_CHARACTERS = 20_000_000  # enough text to estimate scores on


# ---- the stage ------------------------------------------------------------------------------------------------------


def build(section: Tokenizer, inputs: dict[str, Path], out: Path, machine: Machine) -> dict[str, Any]:
    """Write `out/tokenizer.json` and its configuration. Returns vocab_size, kind and sha256.

    Raises ValueError if the corpus is too small for the vocabulary, or what is to be loaded is no usable tokenizer.
    """
    if section.path is not None:
        tokenizer = _from_path(section, inputs["yaml"])
    else:
        task = section.model_dump(include={"kind", "lowercase", "min_frequency", "max_characters"})
        task |= {"vocab_size": -(-section.vocab_size // MULTIPLE) * MULTIPLE, "asked": section.vocab_size}
        task |= {"corpus": str(inputs["corpus"].resolve()), "index": run.sha256(inputs["corpus"] / "index.json")}
        task |= {"out": str((out / "trained.json").resolve())}
        task["threads"] = usable_cores() if machine.workers == "auto" else machine.workers
        # Two workers for one task: with one it would run in this process, where the library cannot be interrupted.
        run_tasks(train, [task], journal=out / "train.jsonl", workers=2, label="train the tokenizer")
        tokenizer = _wrap(out / "trained.json")
    tokenizer.save_pretrained(out)
    settings = run.read_json(out / CONFIG)
    if settings.get("tokenizer_class") == "TokenizersBackend":  # transformers 4 knows only the older name
        run.write_json(out / CONFIG, settings | {"tokenizer_class": "PreTrainedTokenizerFast"})
    loaded = load(out)
    for name in ("trained.json", "train.jsonl"):
        (out / name).unlink(missing_ok=True)
    size = len(loaded)
    run.say(f"tokenizer: {size} entries, {_sample(loaded)}")
    return {"vocab_size": size, "kind": section.path or section.kind, "sha256": digest(out)}


def _sample(tokenizer: PreTrainedTokenizerFast) -> str:
    text = "Pre-training compact encoders frugally"
    return f"{text!r} becomes {' '.join(tokenizer.tokenize(text))}"


def load(directory: Path | str) -> PreTrainedTokenizerFast:
    """The stage's tokenizer, for which "[CLS]" in a text is text. Raises ValueError if it is damaged or incomplete."""
    from transformers import AutoTokenizer

    directory = Path(directory)
    if not (directory / FILE).is_file():
        raise ValueError(f"{directory} holds no {FILE}; run the tokenizer stage first, or give another directory")
    run.read_json(directory / FILE)
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{directory} is no tokenizer ({reason(error)}); build it again") from None
    _check(tokenizer, str(directory))
    tokenizer.split_special_tokens = tokenizer.backend_tokenizer.encode_special_tokens = True
    return tokenizer


def vocabulary_size(directory: Path | str) -> int:
    """The largest id + 1: the rows of an embedding for this tokenizer."""
    return max(load(directory).get_vocab().values()) + 1


def digest(directory: Path | str) -> str:
    """SHA-256 of `tokenizer.json`: what the shards remember."""
    return run.sha256(Path(directory) / FILE)


# ---- loading --------------------------------------------------------------------------------------------------------


def _from_path(section: Tokenizer, folder: Path) -> PreTrainedTokenizerFast:
    """A directory, a `tokenizer.json`, a `vocab.txt`, or a name on the hub."""
    from transformers import AutoTokenizer

    name = str(section.path)
    path = folder / name
    try:
        if path.is_file() and path.suffix == ".txt":
            tokenizer = _from_vocabulary(path, section)
        elif path.is_file():
            tokenizer = _wrap(path)
        elif path.exists() or name.count("/") <= 1 and not name.startswith((".", "/", "~")):
            tokenizer = AutoTokenizer.from_pretrained(path if path.is_dir() else name, trust_remote_code=False)
        else:
            raise ValueError("there is no such file or directory")
    except Exception as error:
        raise ValueError(
            f"tokenizer.path: cannot load {name} ({reason(error)}); give a directory, a tokenizer.json, a BERT "
            "vocab.txt or a hub name (which needs the network, or files downloaded before)"
        ) from None
    _check(tokenizer, name)
    return tokenizer


def _check(tokenizer: Any, name: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{name} is no fast tokenizer; give one with a tokenizer.json")
    missing = [f"{role}_token" for role in SPECIAL if getattr(tokenizer, f"{role}_token_id") is None]
    if missing:
        raise ValueError(f"the tokenizer {name} lacks {', '.join(missing)}; masked language models need all of them")


def _from_vocabulary(path: Path, section: Tokenizer) -> PreTrainedTokenizerFast:
    """BERT's `vocab.txt`, a piece per line. Case is kept if the pieces have it and the YAML does not say otherwise."""
    from tokenizers import models

    pieces = path.read_text(encoding="utf-8").split("\n")
    pieces = [piece.rstrip("\r") for piece in pieces[: -1 if not pieces[-1] else None]]
    missing = [token for token in SPECIAL.values() if token not in pieces]
    if missing or len(set(pieces)) < len(pieces):
        what = f"it lacks {', '.join(missing)}" if missing else "a piece occurs twice"
        raise ValueError(f"this is no BERT vocabulary: {what}")
    cased = any(piece != piece.lower() for piece in pieces if not piece.startswith("["))
    lowercase = section.lowercase if "lowercase" in section.model_fields_set else not cased
    return _wrap(_assemble("wordpiece", models.WordPiece(_ids(pieces), unk_token=SPECIAL["unk"]), lowercase))


def _wrap(source: Path | Backend) -> PreTrainedTokenizerFast:
    """A `tokenizers` tokenizer with the special tokens it has, named as Hugging Face names them."""
    from tokenizers import Tokenizer as Backend
    from transformers import PreTrainedTokenizerFast

    backend = Backend.from_file(str(source)) if isinstance(source, Path) else source
    vocabulary = backend.get_vocab()
    styles = (SPECIAL, {"pad": "<pad>", "unk": "<unk>", "cls": "<s>", "sep": "</s>", "mask": "<mask>"})
    style = max(styles, key=lambda tokens: sum(token in vocabulary for token in tokens.values()))
    named = {f"{role}_token": token for role, token in style.items() if token in vocabulary}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
        **named,
    )


# ---- training -------------------------------------------------------------------------------------------------------


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Train on the corpus's training split and write `task["out"]`; the same text gives the same file."""
    os.environ |= {"TOKENIZERS_PARALLELISM": "true", "RAYON_NUM_THREADS": str(task["threads"])}
    counts = _count_characters(task)
    if not counts:
        raise ValueError(f"{task['corpus']} has no text to train a tokenizer on; give more in corpus.sources")
    trainer = {"wordpiece": _train_wordpiece, "unigram": _train_unigram, "bpe": _train_bpe}[task["kind"]]
    pieces, make_model = trainer(task, counts)
    found, size = len(pieces), task["vocab_size"]
    if found > size:
        least = -(-found // MULTIPLE) * MULTIPLE
        raise ValueError(f"tokenizer.vocab_size: {size} entries cannot hold the text's alphabet; write {least}")
    if found < task["asked"]:
        most = found // MULTIPLE * MULTIPLE
        fewer = f"write {most} or " if most >= LEAST else ""
        raise ValueError(
            f"tokenizer.vocab_size: the text supports {found} entries, not {task['asked']}; {fewer}give more text in "
            "corpus.sources"
        )
    pieces += [f"[unused{position}]" for position in range(size - found)]  # only what rounding added
    backend = _assemble(task["kind"], make_model(pieces), task["lowercase"])
    run.write_atomic(task["out"], backend.to_str(pretty=True))
    return {"vocab_size": backend.get_vocab_size()}


def _texts(task: dict[str, Any]) -> Iterator[str]:
    """Training documents: all, or from each file of the corpus the same share, so that the limit is kept."""
    from frugalbert.data.corpus import list_files, read_documents

    corpus = Path(task["corpus"])
    entries = run.read_json(corpus / "index.json")["files"]
    share = min(1.0, task["max_characters"] / max(1, sum(entry["characters"] for entry in entries)))
    for name, entry in zip(list_files(corpus), entries, strict=True):
        space = share * entry["characters"]
        for document in read_documents(corpus, "train", [name]):
            if share < 1 and space <= 0:
                break
            space -= len(document.text)
            yield document.text


def _count_characters(task: dict[str, Any]) -> Counter[str]:
    counts = np.zeros(0x110000, np.int64)
    for text in _texts(task):
        codes, numbers = np.unique(np.frombuffer(text.encode("utf-32-le"), np.uint32), return_counts=True)
        counts[codes] += numbers
    return Counter({chr(code): int(counts[code]) for code in np.flatnonzero(counts)})


def _without_rare(task: dict[str, Any], counts: Counter[str]) -> Iterator[str]:
    """The texts with a space for each character too rare for the alphabet (ties by code point)."""
    limit = min(MAX_ALPHABET, task["vocab_size"] // 4)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    rare = dict.fromkeys(map(ord, ranked[limit:]), " ")
    for text in _texts(task):
        yield text.translate(rare) if rare and not text.isascii() else text


# ---- the three kinds ------------------------------------------------------------------------------------------------


def _ids(pieces: list[str]) -> dict[str, int]:
    return {piece: position for position, piece in enumerate(pieces)}


def _bare(kind: str, model: Any, lowercase: bool) -> Backend:
    """Normalisation, splitting into words and the model; no special tokens yet."""
    from tokenizers import Regex, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    backend = Backend(model)
    folding: list[Any] = [normalizers.NFD(), normalizers.Lowercase(), normalizers.StripAccents()] if lowercase else []
    if kind == "wordpiece":
        backend.normalizer = normalizers.BertNormalizer(lowercase=lowercase, strip_accents=lowercase)
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif kind == "unigram":
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), *folding, spaces])
        words = [pre_tokenizers.Metaspace(), pre_tokenizers.Punctuation()]
        backend.pre_tokenizer = pre_tokenizers.Sequence(words)
    else:
        if folding:
            backend.normalizer = normalizers.Sequence(folding)
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return backend


def _assemble(kind: str, model: Any, lowercase: bool) -> Backend:
    """The finished tokenizer: `[CLS] A [SEP]` and `[CLS] A [SEP] B [SEP]`."""
    from tokenizers import decoders, processors

    backend = _bare(kind, model, lowercase)
    backend.decoder = {"wordpiece": decoders.WordPiece, "unigram": decoders.Metaspace, "bpe": decoders.ByteLevel}[
        kind
    ]()
    backend.add_special_tokens(list(SPECIAL.values()))
    cls, sep = SPECIAL["cls"], SPECIAL["sep"]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(token, backend.token_to_id(token)) for token in (cls, sep)],
    )
    return backend


Trained = tuple[list[str], Callable[[list[str]], Any]]  # the vocabulary in order; a vocabulary -> the model


def _train_wordpiece(task: dict[str, Any], counts: Counter[str]) -> Trained:
    """Specials, each character alone and as a continuation, then merges by frequency (BPE; Sennrich et al. 2016)."""
    from tokenizers import models, pre_tokenizers, trainers

    backend = _bare("wordpiece", models.BPE(), task["lowercase"])
    marked = pre_tokenizers.Metaspace(replacement=START, prepend_scheme="always", split=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.BertPreTokenizer(), marked])
    trainer = trainers.BpeTrainer(
        vocab_size=task["vocab_size"] + 2 * MAX_ALPHABET,  # some merges only join the mark to a character
        min_frequency=task["min_frequency"],
        special_tokens=[],
        show_progress=False,
    )
    backend.train_from_iterator(_without_rare(task, counts), trainer)
    learned = [piece for piece, _ in sorted(backend.get_vocab().items(), key=lambda item: item[1]) if piece != START]
    alphabet = sorted(piece for piece in learned if len(piece) == 1)
    both = [form for character in alphabet for form in (character, f"##{character}")]
    forms = [piece[1:] if piece.startswith(START) else f"##{piece}" for piece in learned]
    pieces = list(dict.fromkeys([*SPECIAL.values(), *both, *forms]))[: task["vocab_size"]]
    return pieces, lambda pieces: models.WordPiece(_ids(pieces), unk_token=SPECIAL["unk"])


def _train_bpe(task: dict[str, Any], counts: Counter[str]) -> Trained:
    """Over bytes, so that nothing is unknown (Radford et al. 2019); the library's training is deterministic here."""
    from tokenizers import models, pre_tokenizers, trainers

    backend = _bare("bpe", models.BPE(), task["lowercase"])
    trainer = trainers.BpeTrainer(
        vocab_size=task["vocab_size"],
        min_frequency=task["min_frequency"],
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_texts(task), trainer)
    model = json.loads(backend.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    return pieces, lambda pieces: models.BPE(_ids(pieces), [tuple(pair) for pair in model["merges"]])


def _train_unigram(task: dict[str, Any], counts: Counter[str]) -> Trained:
    """The library's set of pieces (Kudo 2018); their scores by hard EM from the segmentation into fewest pieces.

    The library's own scores differ in the third decimal from run to run, its set does not.
    """
    from tokenizers import models, trainers

    size = task["vocab_size"] - len(SPECIAL)
    backend = _bare("unigram", models.Unigram(), task["lowercase"])
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=[], show_progress=False)
    backend.train_from_iterator(_without_rare(task, counts), trainer)
    scores = dict.fromkeys(sorted(set(backend.get_vocab()) - set(SPECIAL.values())), -1.0)

    def model(pieces: list[str]) -> Any:
        return models.Unigram([(piece, scores.get(piece, 0.0)) for piece in pieces], unk_id=1)

    for _ in range(UNIGRAM_ROUNDS):
        pieces = [*SPECIAL.values(), *scores]
        used = np.ones(len(pieces), np.int64)
        counter = _bare("unigram", model(pieces), task["lowercase"])
        sample = task | {"max_characters": min(task["max_characters"], UNIGRAM_CHARACTERS)}
        for batch in _batches(_without_rare(sample, counts)):
            for encoding in counter.encode_batch_fast(batch, add_special_tokens=False):
                used += np.bincount(encoding.ids, minlength=len(pieces))
        total = math.log(used[len(SPECIAL) :].sum())
        found = zip(scores, used[len(SPECIAL) :].tolist(), strict=True)
        scores = {piece: round(math.log(count) - total, 6) for piece, count in found}
    ranked = sorted(scores, key=lambda piece: (-scores[piece], piece))
    return [*SPECIAL.values(), *ranked], model


def _batches(texts: Iterable[str], characters: int = 1_000_000) -> Iterator[list[str]]:
    batch: list[str] = []
    size = 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
