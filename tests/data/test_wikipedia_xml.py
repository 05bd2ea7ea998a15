"""Wikipedia's XML dumps: what is kept, what is dropped and why, in any layout; damage costs one page."""

from __future__ import annotations

import json
import random
import sys
import time
from xml.sax.saxutils import escape

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.config import Corpus, Machine, Source
from frugalbert.data import corpus, readers, wikipedia
from frugalbert.data.cleaning import Counts
from tests.data.test_readers import COMPRESS, PROPERTY, texts, write

HEAD = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="2" case="first-letter">Benutzer</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""
END = "</mediawiki>\n"
ARTICLE = """{{Infobox
| name = {{nested|[[a]]}}
}}
'''Anarchism''' ({{lang|el|x}}; {{IPA|y}}) is a [[political philosophy|''philosophy'']] that&nbsp;opposes \
[[state (polity)|state]]s.<ref name="a">{{cite web|url=http://x}} Hidden.</ref> It<ref name="b" /> is \
[http://a.b old &amp; new].

[[Datei:x.jpg|thumb|A [[caption]] here]]
Second <small>paragraph</small> <!-- hidden -->of '''''two''''' [[cat]]s.

== Heading ==
* list [[item]]
: indented
{| class="wikitable"
! head
|-
| cell {{e}} {{!}} || {| inner
| x
|}
|}
<gallery>
File:a.jpg|shown
</gallery>
Third paragraph, H<sub>2</sub>O.__NOTOC__
[[Kategorie:A]][[Category:B]] [[de:Anarchismus]]
"""
PLAIN = (
    "Anarchism is a philosophy that\xa0opposes states. It is old & new.\n"
    "Second paragraph of two cats.\n"
    "Third paragraph, H2O."
)


def page(text: str, title: str = "T", ns: str | None = "0", more: str = "", model: str = "wikitext") -> str:
    space = "" if ns is None else f"    <ns>{ns}</ns>\n"
    return (
        f"  <page>\n    <title>{escape(title)}</title>\n{space}    <id>7</id>\n{more}    <revision>\n"
        f"      <comment>[[not this]]</comment>\n      <model>{model}</model>\n"
        f'      <text bytes="1" xml:space="preserve">{escape(text)}</text>\n    </revision>\n  </page>\n'
    )


def dump(*pages: str) -> str:
    return HEAD + "".join(pages) + END


def test_paragraphs_stay_and_markup_goes(tmp_path):
    assert texts(write(tmp_path / "a.xml", dump(page(ARTICLE)))) == [PLAIN]


@pytest.mark.parametrize(
    "markup, expected",
    [
        ("a {{b|c={{d}}}} e", "a e"),
        ("{| x\n| y\n", ""),  # a table never closed
        ("a [[b", "a b"),
        ("a <ref>b", "a b"),
        ("{{a\n| b = c\n\nd", "d"),
        ("a &lt;b&gt; c", "a <b> c"),
        ("''a'' '''b'''", "a b"),
        ("a<br />b\n<blockquote>c</blockquote>d", "a\nb\nc\nd"),
        ("[[:Datei:a.jpg]] and [[Wikipedia:B]]", "Datei:a.jpg and Wikipedia:B"),
        ("[[Datei:a.jpg|[[b]]|c]]d [http://e] f <math>x</math>", "d f"),
        ("<nowiki>''a''</nowiki> {{{1|x}}} b", "a b"),
        ("a\n\n\n b (, ) c\n", "a\nb c"),
    ],
)
def test_markup(tmp_path, markup, expected):
    assert "\n".join(texts(write(tmp_path / "a.xml", dump(page(markup))))) == expected


def test_what_is_no_article_is_counted_with_its_reason(tmp_path):
    content = dump(
        page("kept one"),
        page("#REDIRECT [[X]]", more='    <redirect title="X" />\n'),
        page("#redirect [[X]]"),
        page("talk", ns="1"),
        page("user", title="Benutzer:A", ns=None),
        page("kept two", title="Film: A", ns=None),
        page("''M'' may be:\n* a\n{{Disambiguation|geo}}"),
        page("{{Human name disambiguation}}"),
        page("M", title="M (Begriffsklärung)"),
        page("kept three{{disambiguation needed|x}}"),
        page(" \n"),
        page("{{only|a template}}"),
        page("{}", model="json"),
    )
    counts = Counts()
    assert texts(write(tmp_path / "a.xml", content), counts=counts) == ["kept one", "kept two", "kept three"]
    assert counts.dropped == {
        "redirect": 2, "other namespace": 2, "disambiguation": 3, "empty": 1, "no running text": 1, "not wikitext": 1
    }  # fmt: skip
    line = content[: content.index("may be")].rindex("<page>")
    assert counts.examples[0] == {
        "where": f"{tmp_path / 'a.xml'}:{content.count(chr(10), 0, line) + 1}",
        "reason": "disambiguation",
    }


def test_the_last_revision_counts(tmp_path):
    two = page("old text").replace("  </page>", "    <revision><text>new text</text></revision>\n  </page>")
    assert texts(write(tmp_path / "a.xml", dump(two))) == ["new text"]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_recognised_by_its_first_bytes_in_any_layout(tmp_path, suffix):
    content = dump(page("one é"), page("two"))
    for number, variant in enumerate([content, content.replace("\n", ""), '<?xml version="1.0"?>\n' + content]):
        data = COMPRESS[suffix](variant.encode()[:300]) + COMPRESS[suffix](variant.encode()[300:])
        assert texts(write(tmp_path / f"{number}.xml-p1p9{suffix}", data)) == ["one é", "two"]
    assert texts(write(tmp_path / "b.xml", content.encode("utf-16")), "wikipedia-xml") == ["one é", "two"]
    assert texts(write(tmp_path / "c.xml", "<rss>\n\n</rss>")) == ["<rss>\n", "</rss>"]


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R22")
@pytest.mark.parametrize(
    "damaged",
    [
        page("lost").replace("</text>", ""),
        page("lost").replace("  </page>\n", ""),
        page("lost &amp; gone").replace("&amp;", "&nbsp;"),
        page("lost").replace("lost", "lo\0st"),
        page("lost").replace("lost", "lo<st"),
        page("lost").replace("lost", "<a>" * 100 + "</a>" * 100),
        page("lost")[:200],
    ],
)
@pytest.mark.parametrize("joined", [False, True])
def test_a_damaged_page_costs_that_page(tmp_path, damaged, joined):
    content = dump(page("one"), damaged, page("two"), page("three"))
    counts = Counts()
    path = write(tmp_path / "a.xml", content.replace("\n", "") if joined else content)
    assert texts(path, counts=counts) == ["one", "two", "three"]
    assert counts.dropped == {"broken XML": 1}


@pytest.mark.fault("R22")
def test_a_truncated_dump_gives_what_was_read(tmp_path):
    content = dump(page("one"), page("two"))
    counts = Counts()
    assert texts(write(tmp_path / "a.xml", content[: content.index("two") + 2]), counts=counts) == ["one"]
    assert counts.dropped == {"broken XML": 1}
    counts = Counts()
    assert texts(write(tmp_path / "a.xml", content[: -len(END)]), counts=counts) == ["one", "two"]
    assert (counts.dropped, counts.repaired) == ({}, {"broken XML": 1})
    data = COMPRESS[".bz2"](content.encode())
    with pytest.raises(ValueError, match="truncated or damaged bzip2"):
        texts(write(tmp_path / "a.xml.bz2", data[: len(data) // 2]))


@pytest.mark.fault("R22")
def test_undecodable_bytes_reach_the_cleaning(tmp_path):
    data = dump(page("caf@ au lait"), page("two")).encode().replace(b"@", b"\xe9")
    assert texts(write(tmp_path / "a.xml", data)) == ["caf\udce9 au lait", "two"]


@pytest.mark.fault("R22")
@pytest.mark.parametrize("content", ["plain text", "<rss><item/></rss>", HEAD + END, "<mediawiki><pag"])
def test_what_is_no_dump_is_refused_in_one_sentence(tmp_path, content):
    with pytest.raises(ValueError, match=r"a\.xml holds no <page> of a Wikipedia dump; write the right format"):
        texts(write(tmp_path / "a.xml", content), "wikipedia-xml")


@pytest.mark.fault("S12")
def test_entities_are_never_expanded(tmp_path):
    bomb = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 20))
    path = write(
        tmp_path / "a.xml", f'<!DOCTYPE m [<!ENTITY l0 "lol">{bomb}]><mediawiki><page>&l19;</page></mediawiki>'
    )
    with pytest.raises(ValueError, match=r"a\.xml has a DOCTYPE, which no Wikipedia dump has"):
        texts(path, "wikipedia-xml")
    content = dump("<page>\n<!DOCTYPE m>\n</page>\n", page("one"))  # where it may not stand it is damage
    assert texts(write(tmp_path / "a.xml", content)) == ["one"]


def test_without_the_library_it_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    with pytest.raises(ValueError, match=r"pip install 'frugalbert\[wikipedia\]'.*format: wikiextractor"):
        texts(write(tmp_path / "a.xml", dump(page("x"))))


@pytest.mark.fault("R22")
def test_what_the_library_cannot_parse_is_dropped(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise KeyError

    monkeypatch.setattr(wikipedia, "_parser", lambda: (fail, KeyError))
    counts = Counts()
    assert texts(write(tmp_path / "a.xml", dump(page("x"))), counts=counts) == []
    assert counts.dropped == {"wikitext not understood": 1}


@pytest.mark.fault("R22")
def test_pages_too_long_are_dropped_and_never_held(tmp_path, monkeypatch):
    monkeypatch.setattr(wikipedia, "MAX_PAGE", 50_000)
    counts = Counts()
    comment = "<!--" + "x\n" * 100_000 + "-->"
    content = dump(page("a " * 60_000), page("two"), page("lost").replace("    <id>", comment + "<id>"), page("three"))
    assert texts(write(tmp_path / "a.xml", content), counts=counts) == ["two", "three"]
    assert counts.dropped == {"page over 4 MB": 1, "broken XML": 1}


# ---- properties -----------------------------------------------------------------------------------------------------

WORDS = st.lists(st.sampled_from(["a", "B.", "é", "語", "<", "&", "x y", "(c)", "1-2"]), min_size=1, max_size=6)
PARAGRAPHS = st.lists(WORDS.map(" ".join), min_size=1, max_size=4)
NOISE = st.lists(
    st.sampled_from(["{{t|a={{b}}|[[c]]}}", "{|\n|-\n| a || b\n|}", "== h ==", "* l", "[[File:a.jpg|b]]", "<!-- c -->",
                     "<ref>d\n\ne</ref>", "[[Category:x]]", "<gallery>\na\n</gallery>", "----", "__TOC__"]),
    max_size=4,
)  # fmt: skip


@PROPERTY
@given(st.lists(st.tuples(PARAGRAPHS, NOISE), min_size=1, max_size=4), st.integers(5, 400))
def test_paragraphs_come_back_whatever_stands_between(tmp_path, articles, segment):
    pages = []
    for paragraphs, noise in articles:
        blocks = [block for pair in zip(paragraphs, noise, strict=False) for block in pair]
        pages.append(page("\n\n".join([*noise, *blocks, *paragraphs[len(noise) :]])))
    path = write(tmp_path / "a.xml", dump(*pages))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "SEGMENT", max(segment, 200))
        assert texts(path) == ["\n".join(paragraphs) for paragraphs, _ in articles]


@pytest.mark.fault("R22")
@settings(PROPERTY, max_examples=200)
@given(st.integers(0, 2**32 - 1))
def test_fuzzed_dumps_lose_little(tmp_path, seed):
    """Damage within one page leaves the others; nothing but a sentence of ours is ever raised."""
    generator = random.Random(seed)
    first, last = page("first article"), page("last article")
    middle = bytearray(page(ARTICLE).encode()[8:])
    for _ in range(generator.randrange(1, 6)):
        place = generator.randrange(len(middle))
        middle[place : place + generator.randrange(9)] = generator.randbytes(generator.randrange(9))
    content = (HEAD + first + "  <page>").encode() + bytes(middle) + (last + END).encode()
    found = texts(write(tmp_path / "a.xml", content))
    assert found[0] == "first article"
    assert found[-1] == "last article"
    assert len(found) in (2, 3)


@pytest.mark.fault("S12")
@pytest.mark.parametrize(
    "markup",
    ["{{", "[[", "{|\n", "{|\n|\n", "<ref>", "<ref ", "[http://a", "{{a|", "<b>", "<b a='", "[[a|", "[[{{a|", "<!--",
     "{{a|b=", "*", "'''", "&", "==", "(", "<nowiki>", "}}{{a|", "{{[[a|}}", "{|\n!a\n|-\n", "{{dab ", "[[a]]"],
)  # fmt: skip
def test_adversarial_markup_is_quick(tmp_path, markup):
    path = write(tmp_path / "a.xml", dump(page("x " + markup * (200_000 // len(markup)))))
    started = time.process_time()
    texts(path)
    assert time.process_time() - started < 20  # the library alone takes minutes on some


def test_unclosed_markup_is_counted():
    assert wikipedia.unclosed(ARTICLE) == 0
    assert wikipedia.unclosed("{{a [[b]] {| <b>c</b> <br> [http://d e] <e/>") == 1
    assert wikipedia.unclosed("{{ [[ <ref> }} ]] <!--") == 3
    assert wikipedia.unclosed("{{" * 100 + "}}" * 100) == 100 - wikipedia.NESTED


# ---- end to end -----------------------------------------------------------------------------------------------------


def test_a_dump_becomes_a_corpus(tmp_path):
    articles = [
        page(f"'''Number {n}''' is a [[number]] of some size, as the reader knows.{{{{x}}}}") for n in range(60)
    ]
    data = dump(*articles, page("#REDIRECT [[X]]"), page("short"), page("lost").replace("</text>", ""))
    write(tmp_path / "wiki-pages-articles.xml.bz2", COMPRESS[".bz2"](data.encode()))
    section = Corpus(sources=(Source(path="wiki-pages-articles.xml.bz2"),), held_out=0.2)
    trees = []
    for workers in (1, 2):
        out = tmp_path / str(workers)
        out.mkdir()
        metrics = corpus.build(section, {"yaml": tmp_path}, out, Machine(workers=workers))
        trees.append({path.name: path.read_bytes() for path in sorted(out.iterdir())})
    assert trees[0] == trees[1]
    assert metrics["documents"] == 60
    source = json.loads(trees[0]["index.json"])["sources"][0]
    assert source["dropped"] == {"redirect": 1, "too short": 1, "broken XML": 1}
    found = [document.text for document in corpus.read_documents(tmp_path / "1")]
    assert found == [f"Number {n} is a number of some size, as the reader knows." for n in range(60)]
