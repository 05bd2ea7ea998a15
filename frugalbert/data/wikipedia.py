"""Wikipedia's XML dumps (`*-pages-articles*.xml.bz2`, any MediaWiki's export): lines of one file in, articles out.

Kept is the running text of articles, as for BERT (Devlin et al. 2019, section 3.1: no lists, tables or headings), one
paragraph a line, from the last revision of a page; everything left out is counted with its reason. expat reads the XML
(no DTD, so no entities to expand), mwparserfromhell the markup. A damaged page costs that page: reading goes on at the
next `<page>`. Memory is bounded by one page of MAX_PAGE characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.parsers import expat

from frugalbert.data.cleaning import Counts, pieces

MAX_PAGE = 4_000_000  # characters; MediaWiki's own limit is 2 MB
MAX_DEPTH = 50  # of elements; a dump has five
MAX_WORK = 20_000_000  # unclosed markup times length: each such piece has the parser read the rest of the page again
NESTED = 40  # levels from which mwparserfromhell gives up on markup
# Undecodable bytes as characters that XML may hold (private use), and back.
HIDDEN = {0xDC00 + byte: 0x10FE00 + byte for byte in range(0x80, 0x100)}
SHOWN = {hidden: plain for plain, hidden in HIDDEN.items()}
FIELDS = {("page", "title"), ("page", "ns"), ("revision", "model"), ("revision", "text"), ("namespaces", "namespace")}


def read(path: Path, lines: Iterable[tuple[int, bytes]], counts: Counts) -> Iterator[tuple[int, str]]:
    """(line of its `<page>`, plain text) of each article. Raises ValueError if there is no page at all, or a DTD."""
    parse, failure = _parser()
    seen = False
    for page in _pages(path, lines, counts):
        seen = True
        if reason := page.dismissed():
            if reason in ("redirect", "other namespace"):
                counts.dropped[reason] += 1  # most of a dump, and no loss: not worth an example each
            else:
                counts.drop(f"{path}:{page.line}", reason)
            continue
        try:
            text = plain(parse(LIST.sub(r"\1", page.get("text")), skip_style_tags=True), page.namespaces)
        except failure:
            counts.drop(f"{path}:{page.line}", "wikitext not understood")
            continue
        if not text:
            counts.drop(f"{path}:{page.line}", "no running text")
        for part in pieces(text.translate(SHOWN)):
            if part:
                yield page.line, part
    if not seen:
        raise ValueError(f"{path} holds no <page> of a Wikipedia dump; write the right format: for it, or leave it out")


def _parser() -> tuple[Callable[..., Any], type[Exception]]:
    try:
        import mwparserfromhell
    except ImportError:
        raise ValueError(
            "Wikipedia dumps need mwparserfromhell; install it with `pip install 'frugalbert[wikipedia]'`, or extract "
            "the text with WikiExtractor and write format: wikiextractor"
        ) from None
    return mwparserfromhell.parse, mwparserfromhell.parser.ParserError


# ---- XML to pages ---------------------------------------------------------------------------------------------------


@dataclass
class Page:
    """What a dump says about one page. `namespaces`: lower-case name -> number, from the dump's head."""

    line: int
    namespaces: dict[str, str]
    redirect: bool = False
    size: int = 0
    fields: dict[str, list[str]] = field(default_factory=dict)

    def get(self, name: str) -> str:
        return "".join(self.fields.get(name, ()))

    def dismissed(self) -> str:
        """Why the page is no article; empty if it is one."""
        title, text = self.get("title"), self.get("text")
        space = self.get("ns") or self.namespaces.get(title.partition(":")[0].lower() if ":" in title else "", "0")
        if space != "0":
            return "other namespace"
        if self.redirect or REDIRECT.match(text):
            return "redirect"
        if self.get("model") not in ("", "wikitext"):
            return "not wikitext"
        if self.size > MAX_PAGE:
            return "page over 4 MB"
        if not text or text.isspace():
            return "empty"
        if OTHER_MEANINGS.search(text) or OTHER_MEANINGS_TITLE.search(title):
            return "disambiguation"
        return "markup never closed" if unclosed(text) * len(text) > MAX_WORK else ""


class _Broken(Exception):
    pass


class _Dump:
    """expat's handlers: the elements that are open, and the pages that were closed and not yet taken."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.namespaces: dict[str, str] = {}
        self.restart()

    def restart(self, start: str = "") -> None:
        """A new parser, after `start`."""
        self.open: list[str] = []
        self.page: Page | None = None
        self.closed: list[Page] = []
        self.line = self.idle = 0
        self._into: list[str] | None = None
        self._key = ""
        self._parser = expat.ParserCreate()
        self._parser.buffer_text = True
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._text
        self._parser.StartDoctypeDeclHandler = self._refuse
        self._parser.Parse(start)

    def feed(self, text: str, line: int, last: bool = False) -> list[Page]:
        """The pages that end in `text`. Raises ExpatError or _Broken."""
        self.line = line
        self.idle += len(text)
        try:
            self._parser.Parse(text, last)
        except UnicodeEncodeError:
            self._parser.Parse(text.translate(HIDDEN), last)
        if self.idle > MAX_PAGE:
            raise _Broken  # a tag or comment without end, which expat would hold in memory
        pages, self.closed = self.closed, []
        return pages

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        parent = self.open[-1] if self.open else ""
        self.open.append(name)
        self.idle = 0
        if len(self.open) > MAX_DEPTH:
            raise _Broken
        self._into = None
        if name == "page":
            self.page = Page(self.line, self.namespaces)
        elif name == "redirect" and self.page:
            self.page.redirect = True
        elif (parent, name) in FIELDS:
            self._key, self._into = attributes.get("key", ""), []
            if self.page:
                self.page.fields[name] = self._into
                self.page.size = 0  # of this revision

    def _text(self, text: str) -> None:
        self.idle = 0
        if self._into is not None:
            if self.page:
                self.page.size += len(text)
            if self.page is None or self.page.size <= MAX_PAGE:
                self._into.append(text)

    def _end(self, name: str) -> None:
        self.open.pop()
        self.idle = 0
        if name == "namespace" and self._into is not None:
            self.namespaces["".join(self._into).lower()] = self._key
        self._into = None
        if name == "page" and self.page:
            self.closed.append(self.page)
            self.page = None

    def _refuse(self, *_: Any) -> None:
        raise ValueError(f"{self.path} has a DOCTYPE, which no Wikipedia dump has; leave it out of corpus.sources")


def _pages(path: Path, lines: Iterable[tuple[int, bytes]], counts: Counts) -> Iterator[Page]:
    dump, lost, number = _Dump(path), False, 0
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")

    def damaged() -> None:
        (counts.drop if dump.page else counts.repair)(f"{path}:{number}", "broken XML")

    for number, line in lines:
        for data in re.split(rb"(?=<page>)", line) if b"<page>" in line else (line,):
            if data.startswith(b"<page>") and (lost or dump.page):
                if not lost:
                    damaged()
                decoder.reset()
                dump.restart("<mediawiki>")
            elif lost:
                continue
            try:
                pages, lost = dump.feed(decoder.decode(data), number), False
            except (expat.ExpatError, _Broken):
                pages, lost = dump.closed, True
                damaged()
            yield from pages
    try:
        yield from dump.feed("", number, last=True) if not lost else ()
    except expat.ExpatError:
        yield from dump.closed
        damaged()


# ---- wikitext to text -----------------------------------------------------------------------------------------------

_WORDS = (
    "disambig(?:uation)?|disamb|dab|hndis|geodis|begriffsklärung|homonymie|desambiguaci[oó]n|desambiguação|disambigua"
)
OTHER_MEANINGS = re.compile(
    rf"__DISAMBIG__|\{{\{{\s*(?:[^{{}}|\n]*[ -])?(?:{_WORDS})(?: page| cleanup)?\s*(?:\||\}}\}})", re.IGNORECASE
)
OTHER_MEANINGS_TITLE = re.compile(rf"\((?:{_WORDS})\)$", re.IGNORECASE)
REDIRECT = re.compile(r"\s*#REDIRECT\b", re.IGNORECASE)
SILENT = set(
    "ce chem code dd dl dt gallery graph hiero imagemap includeonly indicator inputbox li mapframe maplink math ol pre "
    "ref references score section source style syntaxhighlight table templatedata templatestyles timeline tr ul".split()
)
BREAKS = {"blockquote", "br", "center", "div", "hr", "p", "poem"}
MEDIA = {"file": "6", "image": "6", "media": "-2", "category": "14"}
LANGUAGE = re.compile(r"[a-z]{2,3}(?:-[a-z]+)*")
LIST = re.compile(r"^([*#:;])[*#:;]+", re.MULTILINE)
MARKUP = re.compile(r"\{\{|\}\}|\[\[|\]\]|^[ :]*\{\||^\s*\|\}|<!--|-->|</?[a-zA-Z]+|/>|\[(?=\w+:)|\]", re.MULTILINE)
CLOSES = {"}}": "{{", "]]": "[[", "|}": "{|", "-->": "<!--", "]": "["}
ALONE = {"<br", "<hr", "<wbr", "<img", "<li", "<dt", "<dd", "<td", "<th", "<tr"}
STRAY_TAG = re.compile(r"</?[a-zA-Z][^<>]{0,200}>")
STRAY = re.compile(r"'{2,}|\[\[|\]\]|\{\{+|\}\}+|\{\||\|\}|__[A-Z]+__")
EMPTY = re.compile(r" ?\([\s,;:–-]*\)")
SPACES = re.compile(r"[ \t\xa0]{2,}")
NO_PARAGRAPH = ("*", "#", ":", ";", "|", "!", "=", "{{", "}}", "{|")


def unclosed(text: str) -> int:
    """Pieces of markup that open and never close, or nest too deep to be understood."""
    open_: list[str] = []
    there: dict[str, int] = {}
    count = 0
    for match in MARKUP.finditer(text):
        token = match[0].lstrip(" :\n\t").lower()
        opener = f"<{token[2:]}" if token.startswith("</") else CLOSES.get(token, "")
        if token == "/>" and open_ and open_[-1][0] == "<":
            opener = open_[-1]
        if opener and there.get(opener):
            while True:
                last = open_.pop()
                there[last] -= 1
                if last == opener:
                    break
                count += 1
        elif not opener and token != "/>" and token not in ALONE:
            count += len(open_) >= NESTED
            open_.append(token)
            there[token] = there.get(token, 0) + 1
    return count + len(open_)


def plain(code: Any, namespaces: dict[str, str]) -> str:
    """Parsed wikitext as its paragraphs, one a line."""
    media = {name for name, key in (MEDIA | namespaces).items() if key in ("6", "14", "-2")}
    kept = [line for line in "".join(_words(code.nodes, media)).split("\n") if not line.startswith(NO_PARAGRAPH)]
    lines = (SPACES.sub(" ", EMPTY.sub("", STRAY.sub("", line))).strip() for line in kept)
    return "\n".join(line for line in lines if line)


def _words(nodes: Iterable[Any], media: set[str]) -> Iterator[str]:
    """The visible text. Templates, arguments and comments have none."""
    for node in nodes:
        kind = type(node).__name__
        if kind == "Text":
            yield STRAY_TAG.sub("", node.value)
        elif kind == "Wikilink":
            yield from _link(node, media)
        elif kind == "ExternalLink":
            if node.title is not None:
                yield from _words(node.title.nodes, media)
            elif not node.brackets:
                yield str(node.url)
        elif kind == "HTMLEntity":
            yield node.normalize()
        elif kind == "Heading":
            yield "\n"
        elif kind == "Tag":
            yield from _tag(node, media)


def _link(node: Any, media: set[str]) -> Iterator[str]:
    title = str(node.title)
    prefix, colon, _ = title.partition(":")
    name = prefix.strip().lower()
    if colon and name and (name in media or (node.text is None and LANGUAGE.fullmatch(prefix))):
        return
    if node.text is None:
        yield title.removeprefix(":")
    else:
        yield from _words(node.text.nodes, media)


def _tag(node: Any, media: set[str]) -> Iterator[str]:
    name = str(node.tag).strip().lower()
    if node.wiki_markup and name not in ("table", "hr"):
        yield str(node.wiki_markup)  # a list's, by which its line is left out
    elif name not in SILENT:
        around = "\n" if name in BREAKS else ""
        yield around
        yield from _words(node.contents.nodes, media) if node.contents else ()
        yield around
