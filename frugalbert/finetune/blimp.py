"""BLiMP without training: minimal pairs and a masked LM in; how often it prefers the acceptable sentence out.

BLiMP (Warstadt et al., arXiv 1912.00582): 67 paradigms of 1,000 pairs. A sentence's score is its pseudo-log-likelihood
(Salazar et al., arXiv 1910.14659): every token, special ones excepted, is masked in turn, and the log-probabilities of
what stood there are added. Accuracies are means over paradigms; a tie is wrong. The one-pass variant reads the sentence
once, unmasked: it is cheap, sees what it scores, and is not comparable with published figures.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from frugalbert import dist, run
from frugalbert.finetune.models import Source
from frugalbert.loading import load_weights
from frugalbert.progress import quiet, reason

if TYPE_CHECKING:
    import torch
    from torch import Tensor

NUM_PARADIGMS = 67
FOLDERS = (".", "data", "blimp", "blimp/data")
HUB = "nyu-mll/blimp"
LABELS = {
    "exact": "pseudo-log-likelihood, every token masked in turn",
    "one-pass": "one pass over the whole sentence, which sees what it scores: not a pseudo-log-likelihood",
}
TOKENS = {"cpu": 8192, "cuda": 131072}  # in a batch
MOST_LOGITS = 1 << 28  # of a batch; stock heads compute the vocabulary at every token
RESAMPLES = 2000


@dataclass(frozen=True)
class Scorer:
    """A masked LM that is ready to score. `identity` changes with whatever changes a score."""

    model: Any
    source: Source
    device: torch.device
    precision: str
    method: str
    identity: str

    @property
    def is_ours(self) -> bool:
        return self.source.config.model_type == "frugalbert"


@dataclass(frozen=True)
class Paradigm:
    """One file: minimal pairs of one kind. `sha256` is the file's."""

    uid: str
    term: str
    field: str
    pairs: list[tuple[str, str, str]]
    """(id, acceptable sentence, unacceptable sentence)."""
    sha256: str


def open_scorer(
    source: Source, init: str, seed: int, method: str, device: torch.device, precision: str = "fp32"
) -> Scorer:
    """The masked LM of `source`; `init` is `pretrained`, or `random`: its configuration with new weights of `seed`.

    Raises ValueError for a model without a masked-LM head or mask token, and for damaged weights.
    """
    import torch
    from transformers import AutoModelForMaskedLM as Owner

    name, settings = source.name, source.config
    wanted = f"{name} has no masked-LM head (it is {(getattr(settings, 'architectures', None) or ['an encoder'])[0]})"
    remedy = "BLiMP scores words; evaluate a masked language model, or leave blimp out"
    if source.tokenizer.mask_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no mask token; {remedy}")
    torch.manual_seed(seed)
    with quiet():
        try:
            if init == "random":
                model, report = Owner.from_config(settings, dtype=torch.float32, trust_remote_code=False), {}
            else:
                again = "copy it again from its origin"
                model, report = load_weights(Owner, name, f"{name} cannot be loaded", again, dtype=torch.float32)
        except ValueError as error:
            if "Unrecognized configuration" not in str(error):
                raise
            raise ValueError(f"{wanted}; {remedy}") from None
    absent = [key for key in report.get("missing_keys", ()) if "pooler" not in key]
    if absent or report.get("mismatched_keys"):
        raise ValueError(f"{wanted}; {remedy}")
    parts = [source.identity, init, seed if init == "random" else None, method, precision, device.type]
    return Scorer(model.to(device).eval(), source, device, precision, method, run.fingerprint(parts))


# ---- pairs ----------------------------------------------------------------------------------------------------------


def read(folder: Path | None, limit: int | None = None) -> list[Paradigm]:
    """The paradigms of a folder with BLiMP's files (`adjunct_island.jsonl` …), by name; `limit` = first pairs of each.

    Without a folder they come from the hub. Raises ValueError with file and line for anything else.
    """
    if folder is None:
        return _from_hub(limit)
    places = [place for part in FOLDERS if (place := folder / part).is_dir() and any(place.glob("*.jsonl"))]
    if not places:
        raise ValueError(f"{folder} has no BLiMP files; name the folder with adjunct_island.jsonl and the others in it")
    return [_paradigm(path, limit) for path in sorted(places[0].glob("*.jsonl"))]


def _from_hub(limit: int | None, source: str = HUB) -> list[Paradigm]:
    """The hub's copy, or a local directory that is one: a configuration per paradigm."""
    import datasets

    datasets.disable_progress_bars()
    found = []
    try:
        for uid in sorted(datasets.get_dataset_config_names(source)):
            run.check_stop()
            part = datasets.load_dataset(source, uid, split="train")
            rows = [{**dict(row), "pairID": str(row["pair_id"])} for row in part]
            found.append(_made(rows, limit, run.fingerprint(rows)))
    except (run.Stopped, MemoryError):
        raise
    except Exception as error:  # whatever the network, the cache or a broken copy raises
        raise ValueError(
            f"cannot get BLiMP from {source} ({type(error).__name__}: {reason(error)}); without network put its files "
            "(adjunct_island.jsonl and the others) below a directory and write it as finetune.data"
        ) from None
    return found


def _paradigm(path: Path, limit: int | None) -> Paradigm:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError:
            raise ValueError(f"{path}, line {number}, is no JSON; copy the file again from its origin") from None
        names = ("sentence_good", "sentence_bad", "UID", "linguistics_term", "field", "pairID")
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in names):
            raise ValueError(f"{path}, line {number}, is no BLiMP pair; it needs {', '.join(names)}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path} is empty; copy it again from its origin")
    if stray := {row["UID"] for row in rows} - {path.stem}:
        raise ValueError(f"{path} has pairs of {min(stray)!r}; a file of BLiMP holds the paradigm it is named after")
    return _made(rows, limit, run.sha256(path))


def _made(rows: list[dict[str, Any]], limit: int | None, digest: str) -> Paradigm:
    pairs = [(row["pairID"], row["sentence_good"], row["sentence_bad"]) for row in rows[:limit]]
    # one file of the release writes syntax/semantics, the others syntax_semantics
    field = rows[0]["field"].replace("/", "_")
    return Paradigm(rows[0]["UID"], rows[0]["linguistics_term"], field, pairs, digest)


# ---- scores ---------------------------------------------------------------------------------------------------------


def evaluate(scorer: Scorer, folder: Path | None, out: Path, limit: int | None = None) -> dict[str, Any]:
    """Score every paradigm, each into `out/UID.json` (a finished one is not done again), and sum up.

    Returns and writes to `out/blimp.json`: `accuracy` with `interval` (95 %, bootstrap over pairs within paradigms),
    `terms` and `paradigms` likewise, `num_pairs`, `num_ties`, `method` and what it means, `tokens_per_second`.
    Raises ValueError for data or sentences that cannot be scored, run.Stopped between batches.
    """
    paradigms = read(folder, limit)
    if len(paradigms) < NUM_PARADIGMS:
        run.say(f"BLiMP: {len(paradigms)} of {NUM_PARADIGMS} paradigms in {folder or HUB}; the mean is over these")
    out.mkdir(parents=True, exist_ok=True)
    finished: list[dict[str, Any]] = []
    with run.Progress("BLiMP", sum(len(paradigm.pairs) for paradigm in paradigms), "pairs") as progress:
        done = 0
        for paradigm in paradigms:
            finished.append(_scored(scorer, paradigm, out / f"{paradigm.uid}.json"))
            done += len(paradigm.pairs)
            progress.update(done, paradigm=paradigm.uid)
    result = summary(paradigms, [[(good, bad) for _, good, bad in entry["pairs"]] for entry in finished])
    tokens, seconds = sum(entry["tokens"] for entry in finished), sum(entry["seconds"] for entry in finished)
    result |= {"method": scorer.method, "what": LABELS[scorer.method], "precision": scorer.precision}
    result |= {"tokens": tokens, "seconds": round(seconds, 2), "tokens_per_second": round(tokens / max(seconds, 1e-9))}
    run.write_json(out / "blimp.json", result)
    return result


def _scored(scorer: Scorer, paradigm: Paradigm, path: Path) -> dict[str, Any]:
    """The scores of a paradigm's pairs, from disk if they are there."""
    identity = run.fingerprint([scorer.identity, paradigm.sha256, len(paradigm.pairs)])
    if path.exists():
        try:
            entry = run.read_json(path)
            if entry["identity"] == identity:
                return entry
        except (ValueError, KeyError, TypeError):
            run.say(f"{path}: damaged; done again")
    started = time.monotonic()
    texts = [text for _, *pair in paradigm.pairs for text in pair]
    scores, tokens = score(scorer, texts)
    pairs = [
        [name, *(round(value, 6) for value in scores[2 * row : 2 * row + 2])]
        for row, (name, _, _) in enumerate(paradigm.pairs)
    ]
    entry = {"identity": identity, "uid": paradigm.uid, "method": scorer.method, "tokens": tokens}
    entry |= {"seconds": time.monotonic() - started, "pairs": pairs}
    run.write_json(path, entry)
    return entry


def score(scorer: Scorer, texts: list[str]) -> tuple[list[float], int]:
    """Natural-log scores of sentences, and how many tokens the model read. Equal token ids have equal scores.

    Raises ValueError if a sentence is longer than the model's positions or has no token.
    """
    found = scorer.source.tokenizer(texts, return_special_tokens_mask=True, split_special_tokens=True)
    keys = [tuple(ids) for ids in found["input_ids"]]
    words = {
        key: np.flatnonzero(np.array(mask) == 0) for key, mask in zip(keys, found["special_tokens_mask"], strict=True)
    }
    longest, most = max(map(len, keys)), scorer.source.max_positions
    if most and longest > most:
        raise ValueError(
            f"{scorer.source.name} has {most} positions, a sentence of BLiMP {longest} tokens; leave blimp out"
        )
    scores: dict[tuple[int, ...], float] = {}
    num_tokens = 0
    for length in sorted({len(key) for key in words}):  # one length at a time: there is no padding at all
        group = [key for key in words if len(key) == length]
        totals = np.zeros(len(group))
        for ids, places, rows, targets in _batches(scorer, np.array(group), [words[key] for key in group]):
            run.check_stop()
            np.add.at(totals, rows, _log_probabilities(scorer, ids, places, targets))
            num_tokens += ids.size
        scores |= dict(zip(group, totals.tolist(), strict=True))
    return [scores[key] for key in keys], num_tokens


def _batches(
    scorer: Scorer, group: np.ndarray[Any, Any], words: list[np.ndarray[Any, Any]]
) -> Iterator[tuple[np.ndarray[Any, Any], ...]]:
    """Of sentences (N, T) with the places of their words: ids (B, T) to read, places (P,) in the flattened (B * T),
    whose sentence each is (P,), and the token that stood there (P,)."""
    length = group.shape[1]
    room = TOKENS[scorer.device.type]
    size = max(1, (room if scorer.is_ours else min(room, MOST_LOGITS // scorer.source.config.vocab_size)) // length)
    if scorer.method == "one-pass":
        for start in range(0, len(group), size):
            part = words[start : start + size]
            copies = np.repeat(np.arange(len(part)), [len(positions) for positions in part])
            positions = np.concatenate(part)
            ids = group[start : start + size]
            yield ids, copies * length + positions, start + copies, ids[copies, positions]
        return
    sentences, positions = np.repeat(np.arange(len(group)), [len(part) for part in words]), np.concatenate(words)
    for start in range(0, len(sentences), size):
        rows, columns = sentences[start : start + size], positions[start : start + size]
        ids, copies = group[rows], np.arange(len(rows))
        targets = ids[copies, columns]
        ids[copies, columns] = scorer.source.tokenizer.mask_token_id
        yield ids, copies * length + columns, rows, targets


def _log_probabilities(
    scorer: Scorer, ids: np.ndarray[Any, Any], places: np.ndarray[Any, Any], targets: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    """Of `targets` (P,) at `places` (P,) of the flattened ids (B * T)."""
    import torch

    def tensor(array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(scorer.device)

    with torch.inference_mode(), dist.autocast(scorer.device, scorer.precision):
        if scorer.is_ours:  # it computes the vocabulary only where it is asked for
            logits_PV = scorer.model(tensor(ids), masked_positions=tensor(places)).logits
        else:
            logits_PV = scorer.model(tensor(ids)).logits.flatten(0, 1).index_select(0, tensor(places))
        found = logits_PV.float().log_softmax(-1).gather(1, tensor(targets)[:, None])[:, 0]
    return found.cpu().numpy().astype(np.float64)


# ---- figures --------------------------------------------------------------------------------------------------------


def summary(paradigms: list[Paradigm], scores: list[list[tuple[float, float]]]) -> dict[str, Any]:
    """Accuracy per paradigm, per term and overall (means over paradigms) with 95 % bootstrap intervals.

    Resampling the pairs of a paradigm is drawing its number of right answers from a binomial distribution.
    """
    right = np.array([np.mean([good > bad for good, bad in pairs]) for pairs in scores])
    counts = np.array([len(pairs) for pairs in scores])
    ties = [sum(good == bad for good, bad in pairs) for pairs in scores]
    drawn = np.random.default_rng(0).binomial(counts, right, size=(RESAMPLES, len(counts))) / counts

    def figures(rows: list[int]) -> dict[str, Any]:
        interval = np.quantile(drawn[:, rows].mean(axis=1), (0.025, 0.975))
        return {"accuracy": round(float(right[rows].mean()), 6), "interval": [round(float(end), 6) for end in interval]}

    everything = list(range(len(paradigms)))
    terms = {
        term: [row for row in everything if paradigms[row].term == term] for term in sorted({p.term for p in paradigms})
    }
    return {
        **figures(everything),
        "num_pairs": int(counts.sum()),
        "num_ties": int(sum(ties)),
        "ties": "counted as wrong",
        "terms": {term: {**figures(rows), "num_paradigms": len(rows)} for term, rows in terms.items()},
        "paradigms": {
            paradigm.uid: {**figures([row]), "num_pairs": int(counts[row]), "num_ties": int(ties[row]),
                           "term": paradigm.term, "field": paradigm.field}
            for row, paradigm in enumerate(paradigms)
        },
    }  # fmt: skip
