"""Cleaning: one raw text in, the text that is trained on out, with every repair counted.

Unicode NFC; line ends are `\\n`; control characters go; words of more than 1,000 characters are split (WordPiece
training is quadratic in the longest word, and no tokenizer has a use for them); undecodable bytes are replaced, drop
their document, or stop the work. Quick checks first: clean text is read once per rule and copied never.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

MAX_WORD = 1_000
MAX_DOCUMENT = 1_000_000  # characters; longer documents become several
KEPT_EXAMPLES = 1_000

# Undecodable bytes arrive as lone surrogates (PEP 383's surrogateescape, or `"\ud800"` in JSON).
SURROGATES = re.compile("[\ud800-\udfff]")
ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")
SPACING = re.compile("[\x0b\x0c\x1c-\x1f\x85\u2028\u2029]")
LONG_WORD = re.compile(rf"(?<!\S)\S{{{MAX_WORD + 1},}}")
BLANK_LINES = re.compile(r"\n{3,}")


@dataclass
class Counts:
    """What happened to the documents of one unit of work. `where` is `file:line`."""

    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    repaired: Counter[str] = field(default_factory=Counter)
    examples: list[dict[str, str]] = field(default_factory=list)

    def drop(self, where: str, reason: str) -> None:
        self.dropped[reason] += 1
        self._example(where, reason)

    def repair(self, where: str, reason: str, count: int = 1) -> None:
        self.repaired[reason] += count
        self._example(where, reason)

    def _example(self, where: str, reason: str) -> None:
        if len(self.examples) < KEPT_EXAMPLES:
            self.examples.append({"where": where, "reason": reason})


def clean(text: str, where: tuple[str, int], policy: str, counts: Counts) -> tuple[str, bytes] | None:
    """The cleaned text and its UTF-8 bytes; None if `policy` (`replace`, `skip`, `strict`) drops the document.

    `where` is the file and the line that the text starts in. Raises ValueError for `strict`.
    """
    text = tidy(text, where, counts)
    try:
        return text, text.encode()
    except UnicodeEncodeError:
        found = SURROGATES.findall(text)
    line = where[1] + text.count("\n", 0, text.index(found[0]))
    place = f"{where[0]}:{line}"
    if policy == "strict":
        raise ValueError(
            f"{place}: {_describe(found[0])} is not UTF-8; convert the file, or write corpus.encoding_errors: replace"
        )
    if policy == "skip":
        counts.drop(place, "undecodable")
        return None
    counts.repair(place, "undecodable bytes replaced", len(found))
    text = unicodedata.normalize("NFC", SURROGATES.sub("\ufffd", text))
    return text, text.encode()


def _describe(surrogate: str) -> str:
    code = ord(surrogate)
    return f"byte 0x{code - 0xDC00:02X}" if 0xDC80 <= code <= 0xDCFF else f"the surrogate U+{code:04X}"


def tidy(text: str, where: tuple[str, int] = ("", 0), counts: Counts | None = None) -> str:
    """Everything that does not depend on the encoding policy."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if ODD.search(text):
        text = ODD.sub("", SPACING.sub(" ", text))
    if not (text.isascii() or unicodedata.is_normalized("NFC", text)):
        text = unicodedata.normalize("NFC", text)
    if len(text) > MAX_WORD and _may_hold_long_words(text):
        text, number = LONG_WORD.subn(_split_word, text)
        if number and counts is not None:
            counts.repair(f"{where[0]}:{where[1]}", "words over 1,000 characters split", number)
    if "\n\n\n" in text:
        text = BLANK_LINES.sub("\n\n", text)
    return text.strip()


def _may_hold_long_words(text: str) -> bool:
    """Half-word blocks without a space; a longer word covers one wholly."""
    step = MAX_WORD // 2
    for start in range(0, len(text) - step, step):
        block = text[start : start + step]
        if " " not in block and "\n" not in block:
            return True
    return False


def _split_word(match: re.Match[str]) -> str:
    word = match[0]
    return " ".join(word[start : start + MAX_WORD] for start in range(0, len(word), MAX_WORD))


def pieces(text: str) -> Iterator[str]:
    """The text in parts of at most MAX_DOCUMENT characters, cut at white space where there is some."""
    start = 0
    while len(text) - start > MAX_DOCUMENT:
        end = start + MAX_DOCUMENT
        cut = max(text.rfind("\n", start + 1, end), text.rfind(" ", start + 1, end)) + 1 or end
        yield text[start:cut]
        start = cut
    yield text[start:] if start else text
