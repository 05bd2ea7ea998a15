"""Readers: every format and compression, what is malformed, and that parts join to what was written."""

from __future__ import annotations

import bz2
import contextlib
import csv
import gzip
import io
import json
import lzma
import os
import random
import time
import zlib
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from frugalbert.data import files, readers
from frugalbert.data.cleaning import MAX_DOCUMENT, Counts

COMPRESS = {
    "": lambda data: data,
    ".gz": lambda data: gzip.compress(data, 1),
    ".bz2": lambda data: bz2.compress(data, 1),
    ".xz": lambda data: lzma.compress(data, preset=0),
    ".zst": lambda data: pyarrow.compress(data, "zstd", asbytes=True),
}
PROPERTY = settings(
    derandomize=True, max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
PROSE = "Plain words in a row.\nAnd a second line.\n"


def write(path: Path, data: bytes | str) -> Path:
    path.write_bytes(data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape"))
    return path


def texts(path: Path, form: str = "auto", field: str = "text", counts: Counts | None = None) -> list[str]:
    return [text for _, text in readers.read(path, form, field, counts or Counts())]


def wiki(*articles: tuple[str, str]) -> str:
    return "".join(
        f'<doc id="{number}" url="http://x?curid={number}" title="{title}">\n{title}\n\n{text}\n</doc>\n'
        for number, (title, text) in enumerate(articles)
    )


# ---- formats --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", "one\ntwo\n", ["one\ntwo\n"]),
        ("a.txt", "one\ntwo\n\n \nthree", ["one\ntwo\n", "three"]),
        ("a.txt", "one\r\n\r\ntwo\r\n", ["one\n", "two\n"]),
        ("a.txt", "one\r\rtwo\rthree", ["one\n", "two\nthree"]),
        ("a", wiki(("T &amp; U", "First.\nSecond."), ("V", "V\nThird.")), ["First.\nSecond.\n", "V\nThird.\n"]),
        ("a.json", '{"text": "x"}\n\n{"text": "y\\n\\nz"}', ["x", "y\n\nz"]),
        ("a", '{"text": "x"}\n', ["x"]),
        ("wiki_00", '{"id": "1", "url": "u", "title": "T", "text": "T\\nBody"}\n', ["Body"]),
        ("a.csv", 'id,text\n1,"a, ""b""\nc"\n2,d\n', ['a, "b"\nc', "d"]),
        ("a.tsv", 'text\tid\nsay "hi\t1\n"b\t2\n', ['say "hi', '"b']),
    ],
)
def test_formats_by_name_and_content(tmp_path, name, content, expected):
    assert texts(write(tmp_path / name, content)) == expected


def test_lines_are_documents_on_demand(tmp_path):
    path = write(tmp_path / "a.txt", "one\n\ntwo\r\nthree")
    assert list(readers.read(path, "lines", "text", Counts())) == [(1, "one\n"), (3, "two\n"), (4, "three")]


@pytest.mark.fault("R22")
def test_a_unicode_line_separator_ends_no_line(tmp_path):
    path = write(tmp_path / "a.txt", "a\u2028b\u0085c\x0bd\ne")
    assert texts(path, "lines") == ["a\u2028b\u0085c\x0bd\n", "e"]


@pytest.mark.parametrize("suffix", COMPRESS)
@pytest.mark.parametrize("name, content", [("a.txt", "x\n\ny"), ("a.jsonl", '{"text": "x\\n"}\n{"text": "y"}')])
def test_compressed_in_several_frames(tmp_path, suffix, name, content):
    data = content.encode()
    frames = COMPRESS[suffix](data[:5]) + COMPRESS[suffix](data[5:])
    assert texts(write(tmp_path / (name + suffix), frames)) == ["x\n", "y"]
    if suffix:  # the signature decides, not the name
        assert texts(write(tmp_path / "b.txt", COMPRESS[suffix](b"x\n\ny"))) == ["x\n", "y"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_parquet(tmp_path, suffix):
    column = pyarrow.chunked_array([["a", None, "b\n"], ["c"]])
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"body": column, "n": [1, 2, 3, 4]}), buffer, row_group_size=2)
    counts = Counts()
    path = write(tmp_path / f"a.parquet{suffix}", COMPRESS[suffix](buffer.getvalue()))
    assert texts(path, field="body", counts=counts) == ["a", "b\n", "c"]
    assert counts.dropped == {"field is null": 1}
    with pytest.raises(ValueError, match=r"a\.parquet.* has no column 'text'; write field: with one of body, n"):
        texts(path)
    with pytest.raises(ValueError, match="the column 'n' holds int64, not text"):
        texts(path, field="n")


def test_parquet_bytes_and_dictionaries(tmp_path):
    words = pyarrow.array(["x", "y", "x"]).dictionary_encode()
    parquet.write_table(pyarrow.table({"b": pyarrow.array([b"ok", b"\xff", b"z"]), "d": words}), tmp_path / "a.parquet")
    assert texts(tmp_path / "a.parquet", field="b") == ["ok", "\udcff", "z"]
    assert texts(tmp_path / "a.parquet", field="d") == ["x", "y", "x"]


# ---- properties -----------------------------------------------------------------------------------------------------

ANY = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
PRINTED = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"), max_size=30)
WORDS = st.lists(st.sampled_from(["a", "B", "é", "語", "<doc", "x y", "&lt;", '"', "0"]), min_size=1, max_size=6)
LINE = WORDS.map(" ".join).filter(lambda line: not line.startswith("<doc"))


@PROPERTY
@given(st.lists(ANY))
def test_jsonl_gives_back_what_was_written(tmp_path, values):
    ascii_only = len(values) % 2 == 0
    lines = [json.dumps({"text": value, "n": 1}, ensure_ascii=ascii_only) for value in values]
    assert texts(write(tmp_path / "a.jsonl", "\n".join(lines) or "\n")) == values


@PROPERTY
@given(st.lists(st.tuples(PRINTED, PRINTED), min_size=1))
def test_csv_gives_back_what_was_written(tmp_path, rows):
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n", quoting=csv.QUOTE_ALL)
    writer.writerows([("other", "text"), *rows])
    assert texts(write(tmp_path / "a.csv", buffer.getvalue())) == [text for _, text in rows]


@PROPERTY
@given(st.lists(st.tuples(LINE, st.lists(LINE, min_size=1, max_size=4)), min_size=1, max_size=5), st.booleans())
def test_wikiextractor_gives_back_the_articles(tmp_path, articles, crlf):
    content = wiki(*((title.replace('"', ""), "\n\n".join(lines)) for title, lines in articles))
    path = write(tmp_path / "wiki_00", content.replace("\n", "\r\n") if crlf else content)
    found = texts(path, "wikiextractor")
    assert found == ["\n".join(lines) + "\n" for _, lines in articles]


@PROPERTY
@given(st.lists(LINE, max_size=8), st.sampled_from(["\n", "\r\n", "\r"]), st.sampled_from(["utf-8-sig", "utf-16"]))
def test_lines_in_any_encoding_with_a_mark(tmp_path, lines, end, encoding):
    path = write(tmp_path / "a.txt", (end.join(lines) + "z").encode(encoding))
    assert [text.rstrip("\n") for text in texts(path, "lines")] == [*lines[:-1], (lines[-1] if lines else "") + "z"]


@pytest.mark.parametrize("size", range(1, 12))
def test_lines_do_not_depend_on_how_much_is_read_at_once(tmp_path, monkeypatch, size):
    path = write(tmp_path / "a.txt", "one\r\ntwo\r\r\n\nthree é\rfour")
    monkeypatch.setattr(readers, "SEGMENT", size)
    assert [text for _, text in readers.read(path, "lines", "text", Counts())] == [
        "one\n",
        "two\n",
        "three é\n",
        "four",
    ]
    monkeypatch.setattr(readers, "MAX_DOCUMENT", 4)
    assert "".join(texts(path, "text")) == "one\ntwo\n\n\nthree é\nfour"


@pytest.mark.fault("R22")
@settings(PROPERTY, max_examples=300)
@given(st.integers(0, 2**32 - 1))
def test_fuzzed_files_are_read_or_refused_in_one_sentence(tmp_path, seed):
    generator = random.Random(seed)
    sound = [PROSE * 3, wiki(("T", "text\n")) * 2, '{"text": "abc"}\n' * 3, "text,b\nx,y\n" * 3, "text\tb\nx\ty\n"]
    name, data = generator.choice(
        list(zip(["a.txt", "wiki", "a.jsonl", "a.csv", "a.tsv"], map(str.encode, sound), strict=True))
    )
    suffix = generator.choice(list(COMPRESS))
    data = bytearray(COMPRESS[suffix](bytes(data)))
    for _ in range(generator.randrange(6)):
        action, place = generator.randrange(3), generator.randrange(len(data) + 1)
        if action == 0:
            data[place : place + 1] = bytes([generator.randrange(256)])
        elif action == 1:
            del data[place : place + generator.randrange(20)]
        else:
            data[place:place] = generator.randbytes(generator.randrange(20))
    path = write(tmp_path / (name + suffix), bytes(data))
    try:
        found = texts(path)
    except ValueError as error:
        assert "a.txt" in str(error) or path.name in str(error)
        assert len(str(error)) < 600 + len(str(path))
    else:
        assert all(isinstance(text, str) for text in found)


# ---- malformed ------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R22")
@pytest.mark.parametrize("suffix, kind", [(".gz", "gzip"), (".bz2", "bzip2"), (".xz", "xz"), (".zst", "zstd")])
def test_truncated_and_misnamed_compression(tmp_path, suffix, kind):
    data = COMPRESS[suffix](random.Random(0).randbytes(1_500_000).hex().encode())
    path = write(tmp_path / f"a.txt{suffix}", data[: len(data) // 2])
    with pytest.raises(ValueError, match=rf"a\.txt{suffix} is truncated or damaged {kind} data .*fetch it again"):
        texts(path)
    with pytest.raises(ValueError, match=rf"a\.txt{suffix} is named like {kind} data but is none"):
        texts(write(path, PROSE))


@pytest.mark.fault("R22")
def test_a_flipped_bit_in_gzip_is_noticed(tmp_path):
    data = bytearray(gzip.compress(PROSE.encode() * 1000))
    data[len(data) // 2] ^= 8
    with pytest.raises(ValueError, match="truncated or damaged gzip"):
        texts(write(tmp_path / "a.txt.gz", bytes(data)))


@pytest.mark.fault("R22")
@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x89PNG\r\n\x1a\n" + bytes(range(256)), "is a binary file, not text"),
        (b"%PDF-1.7\n" + PROSE.encode(), "is a binary file"),
        (random.Random(1).randbytes(5000), "is a binary file"),
        (bytes(range(256)) * 10, "is a binary file"),
        (PROSE.encode("utf-16-le"), "looks like UTF-16 without a byte order mark; convert it: iconv -f utf-16le"),
        (PROSE.encode("utf-16-be"), "iconv -f utf-16be"),
        (b'[\n {"text": "a"}\n]', "is one JSON array; write one object per line"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, data, message):
    name = "a.json" if data.startswith(b"[") else "a.txt"
    with pytest.raises(ValueError, match=message) as caught:
        texts(write(tmp_path / name, data))
    assert str(tmp_path / name) in str(caught.value)


@pytest.mark.fault("R22")
def test_text_with_odd_bytes_is_text(tmp_path):
    assert texts(write(tmp_path / "a.txt", b"one\x00two\x1b[0m " + PROSE.encode() * 9))[0].startswith("one\x00two")
    latin = "Größe, naïve Wörter, déjà vu. ".encode("latin-1") * 30
    assert texts(write(tmp_path / "b.txt", latin))[0].count("\udcf6") == 60


@pytest.mark.fault("R22")
def test_empty_files(tmp_path):
    counts = Counts()
    for name in ("a.txt", "a.jsonl", "a.parquet", "a.zst", "a.csv"):
        assert texts(write(tmp_path / name, b""), counts=counts) == []
    assert counts.repaired == {"empty files": 5}
    assert "".join(texts(write(tmp_path / "b.txt", b"\n\n\n"))).strip() == ""
    assert texts(write(tmp_path / "b.txt.gz", gzip.compress(b""))) == []


@pytest.mark.fault("R22")
def test_broken_records_are_skipped_with_their_number(tmp_path):
    deep = "[" * 100_000
    lines = ['{"text": "a"}', '{"text": "b"', "[1]", '{"body": "c"}', '{"text": null}', '{"text": 3}', deep, "", "\x00"]
    counts = Counts()
    path = write(tmp_path / "a.jsonl", "\n".join([*lines, '{"text": "z"}']))
    assert texts(path, counts=counts) == ["a", "z"]
    reasons = ["broken JSON", "no JSON object", "no field 'text'", "field is null", "field is not text"]
    found = [(example["where"].rsplit(":", 1)[1], example["reason"]) for example in counts.examples]
    assert found == [*zip("23456", reasons, strict=True), ("7", "broken JSON"), ("9", "broken JSON")]


@pytest.mark.fault("R22")
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", '{"body": "x"}\n' * 3, "none of 3 records has a text .*no field 'text', its keys are body"),
        ("a.jsonl", '{"body": "x"}\n' * 5000, "none of 1000 records"),
        ("a.jsonl", "no json\n", "none of 1 records has a text .*broken JSON"),
        ("a.csv", "a,b\n1,2\n", "has no column 'text'; write field: with one of a, b"),
        ("a.csv", 'text,b\n"x', None),
    ],
)
def test_a_file_without_a_usable_record_is_refused(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    if message is None:
        assert texts(path) == ["x"]
        return
    with pytest.raises(ValueError, match=message):
        texts(path)


@pytest.mark.fault("R22")
def test_csv_with_an_open_quote_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 1000)
    path = write(tmp_path / "a.csv", 'text\nfine\n"open ' + "words\n" * 1000)
    with pytest.raises(ValueError, match=r"a\.csv:3: field larger than field limit .*quotation mark not closed"):
        texts(path)


@pytest.mark.fault("R22")
def test_bad_parquet_is_one_sentence(tmp_path):
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table({"text": ["abc" * 100] * 1000}), buffer)
    for data in (b"PAR1", buffer.getvalue()[:-9], b"x" + buffer.getvalue()[:-1]):
        with pytest.raises(ValueError, match=r"a\.parquet is no sound Parquet file"):
            texts(write(tmp_path / "a.parquet", data))


@pytest.mark.fault("R22")
def test_wikiextractor_damage_is_counted(tmp_path):
    content = (
        'stray\n<doc id="1" url="u" title="A">\nA\nfirst\n<doc id="2" url="u" title="B">\nB\nsecond\n</doc>\nstray\n'
    )
    counts = Counts()
    path = write(tmp_path / "w", content + '<doc id="3" url="u" title="C">\nC\nthird')
    assert texts(path, "wikiextractor", counts=counts) == ["first\n", "second\n", "third"]
    assert counts.repaired == {"lines outside <doc> left out": 2, "<doc> without </doc>": 2}


@pytest.mark.fault("S12")
@pytest.mark.parametrize(
    "line", ['title="', '">', "&#9", "&", '"', '"",', "\t", "{", '{"a":', "[", "\\", "\r", "\n ", "\n\n", "</doc>", "é"]
)
def test_adversarial_lines_are_quick(tmp_path, line):
    content = f'<doc id="1" title="{line * (400_000 // len(line))}">\n{line * 100_000}\n</doc>\n'
    start = time.process_time()
    for form in ("wikiextractor", "jsonl", "csv", "tsv", "lines", "paragraphs", "auto"):
        with contextlib.suppress(ValueError):
            texts(write(tmp_path / "a", content), form)
    assert time.process_time() - start < 10  # quadratic work would take hours


@pytest.mark.fault("R22")
@pytest.mark.parametrize("form", ["lines", "text", "paragraphs", "jsonl", "wikiextractor"])
def test_a_long_line_comes_in_parts(tmp_path, form):
    line = ("wörd " * 1_200_000).strip()
    content = {"jsonl": json.dumps({"text": line}), "wikiextractor": wiki(("T", line))}.get(form, line)
    found = list(readers.read(write(tmp_path / "a", content), form, "text", Counts()))
    assert "".join(text for _, text in found).strip() == line
    assert len(found) > 5
    assert max(len(text) for _, text in found) <= 2 * MAX_DOCUMENT
    assert all(text.strip().endswith("wörd") for _, text in found)


@pytest.mark.fault("R22")
def test_a_long_line_without_spaces_is_cut_between_characters(tmp_path):
    found = texts(write(tmp_path / "a.txt", "語" * 1_000_000), "lines")
    assert "".join(found) == "語" * 1_000_000
    assert len(found) > 1
    bad = b"\xff\x80" * 1_500_000
    assert len("".join(texts(write(tmp_path / "b.txt", bad), "lines"))) == len(bad)


@pytest.mark.fault("R22")
def test_too_long_json_lines_are_dropped(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_LINE", 3 << 20)
    counts = Counts()
    path = write(tmp_path / "a.jsonl", f'{{"text": "{"x" * (4 << 20)}"}}\n{{"text": "y"}}')
    assert texts(path, counts=counts) == ["y"]
    assert counts.dropped == {"line over 256 MB": 1}
    assert counts.examples[0]["where"].endswith("a.jsonl:1")


# ---- finding --------------------------------------------------------------------------------------------------------


def backwards(walk):
    """A file system that lists names in another order."""

    def call(*arguments, **named):
        for name, directories, names in walk(*arguments, **named):
            directories.sort(reverse=True)
            yield name, directories, names[::-1]

    return call


def test_files_globs_and_directories_in_a_fixed_order(tmp_path, monkeypatch):
    for name in ("x.txt/c", "b/2.txt", "b/10.txt", "a.txt", ".hidden/x.txt", "b/.x.swp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, PROSE)

    def names(text):
        return [str(path.relative_to(tmp_path)) for path in files.find(text, tmp_path)]

    assert names("a.txt") == ["a.txt"]
    assert names(".") == ["a.txt", "b/10.txt", "b/2.txt", "x.txt/c"]
    assert names("*/*.txt") == ["b/10.txt", "b/2.txt"]
    assert names("**/*.txt") == ["a.txt", "b/10.txt", "b/2.txt", "x.txt/c"]
    assert names("x.txt") == ["x.txt/c"]  # a directory, whatever it is called
    assert [path.name for path in files.find(str(tmp_path / "b"), Path("/"))] == ["10.txt", "2.txt"]
    monkeypatch.setattr(os, "walk", backwards(os.walk))
    assert names(".") == ["a.txt", "b/10.txt", "b/2.txt", "x.txt/c"]
    write(tmp_path / "odd[1].txt", PROSE)
    assert names("odd[1].txt") == ["odd[1].txt"]


@pytest.mark.fault("R22")
def test_links_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "data" / "sub").mkdir(parents=True)
    write(tmp_path / "data" / "sub" / "a.txt", PROSE)
    (tmp_path / "data" / "sub" / "loop").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "other").symlink_to(tmp_path / "data" / "sub")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    found = [str(path.relative_to(tmp_path)) for path in files.find("data", tmp_path)]
    assert found == ["data/other/a.txt", "data/sub/a.txt"]


@pytest.mark.fault("R22")
@pytest.mark.parametrize(
    "name, message",
    [
        ("missing.txt", "missing.txt does not exist"),
        ("no*.txt", r"no file matches no\*\.txt"),
        ("empty", "empty holds no files"),
        ("pipe", "pipe is no regular file"),
        ("loop", "loop: Too many levels of symbolic links"),
        ("p*", "pipe is no regular file"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(tmp_path, name, message):
    (tmp_path / "empty").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    with pytest.raises(ValueError, match=message):
        files.find(name, tmp_path)


@pytest.mark.fault("R22")
@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may read everything")
def test_permission_denied_is_one_sentence(tmp_path):
    path = write(tmp_path / "a.txt", PROSE)
    path.chmod(0)
    with pytest.raises(PermissionError, match="a.txt"):
        texts(path)
    (tmp_path / "d").mkdir(mode=0)
    with pytest.raises(ValueError, match="cannot read the directory"):
        files.find("d", tmp_path)


@pytest.mark.fault("R22")
def test_io_errors_are_not_taken_for_damage(tmp_path, monkeypatch):
    path = write(tmp_path / "a.txt.gz", gzip.compress(PROSE.encode()))

    def broken(*_):
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(gzip, "open", broken)
    with pytest.raises(OSError, match="Input/output error"):
        texts(path)
    monkeypatch.setattr(gzip, "open", lambda *_: (_ for _ in ()).throw(zlib.error("bad")))
    with pytest.raises(ValueError, match="truncated or damaged gzip"):
        texts(path)


@pytest.mark.fault("R22")
def test_a_header_of_odd_bytes_is_named_in_a_sentence(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'\x8a,"a\rb\x1b[2J"\n1,2\n')
    with pytest.raises(ValueError, match=r"no column 'text'; write field: with one of \?, a\?b\?\[2J$"):
        list(readers.read(tmp_path / "a.csv", "csv", "text", Counts()))
