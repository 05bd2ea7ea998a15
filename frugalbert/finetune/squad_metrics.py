"""Questions with gold answers and predicted texts in; exact match and F1 as SQuAD's official scripts compute them out.

SQuAD 1.1 (arXiv 1606.05250), SQuAD 2.0 (arXiv 1806.03822) with its threshold on null odds, and ReCoRD (arXiv
1810.12885), which takes 1.1's rules. The two differ only where a text is empty once it is normalised: 1.1 gives an
exact match but no F1, 2.0 leaves such gold answers out.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from frugalbert.finetune.tasks import Example

ARTICLES = re.compile(r"\b(a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, without a / an / the, single spaces."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def one_text(gold: str, predicted: str, both_empty: float = 0.0) -> tuple[float, float]:
    """(exact match, F1 over words) of two texts; `both_empty`: F1 when neither has a word (2.0: 1)."""
    gold, predicted = normalise(gold), normalise(predicted)
    gold_words, words = gold.split(), predicted.split()
    same = sum((Counter(gold_words) & Counter(words)).values())
    exact = float(gold == predicted)
    if same == 0:
        return exact, both_empty if not gold_words and not words else 0.0
    precision, recall = same / len(words), same / len(gold_words)
    return exact, 2 * precision * recall / (precision + recall)


def answer_scores(answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> list[tuple[float, float]]:
    """(exact match, F1) of every question: the best over its gold answers. A set in which a question has no answer is
    scored by 2.0's rules, any other by 1.1's.
    """
    null = any(not golds for golds in answers)
    return [
        _best([gold for gold in golds if not null or normalise(gold)] or [""], text, float(null))
        for golds, text in zip(answers, predicted, strict=True)
    ]


def _best(golds: Sequence[str], text: str, both_empty: float) -> tuple[float, float]:
    pairs = [one_text(gold, text, both_empty) for gold in golds]
    return max(exact for exact, _ in pairs), max(f1 for _, f1 in pairs)


def record_scores(answers: Sequence[Sequence[str]], predicted: Sequence[str]) -> list[tuple[float, float]]:
    """(exact match, F1) of every query of ReCoRD; one without a gold answer counts 0."""
    return [_best(golds, text, 0.0) if golds else (0.0, 0.0) for golds, text in zip(answers, predicted, strict=True)]


def squad_evaluate(
    examples: Sequence[Example],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float] | None = None,
    threshold: float = 1.0,
) -> dict[str, float]:
    """What SQuAD 2.0's `evaluate-v2.0.py` prints, in percent, with its keys in its order.

    `null_odds` above `threshold` turn a prediction into "no answer"; with them the best thresholds are added. Raises
    ValueError if a question has no prediction or no odds.
    """
    missing = [example.id for example in examples if example.id not in predictions]
    if missing:
        raise ValueError(f"{len(missing)} questions have no prediction, the first is {missing[0]}")
    if null_odds is not None and (missing := [example.id for example in examples if example.id not in null_odds]):
        raise ValueError(f"{len(missing)} questions have no null odds, the first is {missing[0]}")
    exact, f1 = {}, {}
    for example in examples:
        golds = [gold for gold in example.answers if normalise(gold)] or [""]
        exact[example.id], f1[example.id] = _best(golds, predictions[example.id], 1.0)
    answered = {example.id: bool(example.answers) for example in examples}
    found: dict[str, float] = {}
    for prefix, chosen in (
        ("", list(answered)),
        ("HasAns_", [key for key, has in answered.items() if has]),
        ("NoAns_", [key for key, has in answered.items() if not has]),
    ):
        if chosen or not prefix:
            cut = {key for key in chosen if null_odds is not None and null_odds[key] > threshold}
            for name, scores in (("exact", exact), ("f1", f1)):
                total = sum(float(not answered[key]) if key in cut else scores[key] for key in chosen)
                found[prefix + name] = 100.0 * total / len(chosen) if chosen else float("nan")
            found[f"{prefix}total"] = len(chosen)
    if null_odds is not None and examples:
        for name, scores in (("exact", exact), ("f1", f1)):
            best, at = _best_threshold(scores, predictions, null_odds, answered)
            found |= {f"best_{name}": best, f"best_{name}_thresh": at}
    return found


def _best_threshold(
    scores: Mapping[str, float],
    predictions: Mapping[str, str],
    null_odds: Mapping[str, float],
    answered: Mapping[str, bool],
) -> tuple[float, float]:
    """(best score in percent, threshold): questions are accepted from the lowest odds on. As in the official script,
    questions of equal odds are accepted one by one.
    """
    score: float = sum(not has for has in answered.values())
    best, threshold = score, 0.0
    for key in sorted(null_odds, key=lambda key: null_odds[key]):
        if key in scores:
            score += scores[key] if answered[key] else (-1 if predictions[key] else 0)
            if score > best:
                best, threshold = score, null_odds[key]
    return 100.0 * best / len(scores), threshold


def squad1_evaluate(examples: Sequence[Example], predictions: Mapping[str, str]) -> dict[str, float]:
    """What SQuAD 1.1's `evaluate-v1.1.py` prints, in percent; a question without a prediction counts 0."""
    given = [example for example in examples if example.id in predictions]
    pairs = [_best(example.answers or [""], predictions[example.id], 0.0) for example in given]
    return {
        "exact_match": 100.0 * sum(exact for exact, _ in pairs) / len(examples),
        "f1": 100.0 * sum(f1 for _, f1 in pairs) / len(examples),
    }
