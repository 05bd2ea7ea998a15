"""The corpus stage: the same bytes however it is run, stopped and continued; what is dropped and why."""

from __future__ import annotations

import gzip
import json
import lzma
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from frugalbert import run
from frugalbert.config import Corpus, Machine
from frugalbert.data import corpus, dedup, files, parts
from frugalbert.data.corpus import list_files, read_documents

WORDS = "the of and a in that is was for with as his on be at by this had not are but from or have an they".split()


def prose(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) + str(generator.randrange(50)) for _ in range(words))


def documents(count: int, seed: int = 0) -> list[str]:
    generator = random.Random(seed)
    return ["\n".join(prose(generator, 12) for _ in range(generator.randrange(1, 6))) for _ in range(count)]


def build(folder: Path, out: Path, sources: list, workers: int = 1, **settings) -> dict:
    out.mkdir(parents=True, exist_ok=True)
    section = Corpus(sources=tuple(sources), **{"held_out": 0.2, **settings})
    return corpus.build(section, {"yaml": folder}, out, Machine(workers=workers))


def tree(out: Path) -> dict[str, bytes]:
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}


def texts(out: Path, split: str | None = None) -> list[str]:
    return [document.text for document in read_documents(out, split)]


def index(out: Path) -> dict:
    return json.loads((out / "index.json").read_text())


def write_mixed(folder: Path) -> None:
    """Sources in several formats, with duplicates, rubbish and many small files."""
    (folder / "many").mkdir(parents=True)
    texts = documents(120)
    for number in range(30):
        (folder / "many" / f"{number}.txt").write_text(texts[number])
    lines = [json.dumps({"text": text}) for text in texts[25:70]]
    (folder / "a.jsonl.gz").write_bytes(
        gzip.compress("\n".join([*lines, "broken", '{"text": "short"}']).encode(), mtime=0)
    )
    (folder / "b.txt").write_bytes(
        "\r\n\r\n".join(texts[60:110]).encode() + b"\n\n\xff\xfe is not UTF-8 but the rest is fine text"
    )


@pytest.fixture
def mixed(tmp_path, monkeypatch) -> Path:
    """These sources in parts of a few documents."""
    monkeypatch.setattr(parts, "PART_CHARACTERS", 2000)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 3000)
    write_mixed(tmp_path / "data")
    return tmp_path / "data"


SOURCES = ["many", "a.jsonl.gz", {"path": "b.txt", "weight": 1.5}]


def as_config(sources: list) -> list:
    from frugalbert.config import Source

    return [Source(**source) if isinstance(source, dict) else source for source in sources]


# ---- identity -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R11")
def test_the_same_bytes_for_one_worker_and_two(tmp_path, mixed, monkeypatch, capsys):
    monkeypatch.setattr(parts, "PART_CHARACTERS", 8_000_000)  # spawned workers know nothing of the smaller size
    first = build(mixed, tmp_path / "one", as_config(SOURCES), workers=1, dedup="near")
    assert build(mixed, tmp_path / "two", as_config(SOURCES), workers=2, dedup="near") == first
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    said = capsys.readouterr().err
    assert "many" in said
    assert "duplicate 10" in said
    assert "documents held out" in said


def test_the_account_adds_up(tmp_path, mixed):
    metrics = build(mixed, tmp_path / "out", as_config(SOURCES))
    found = index(tmp_path / "out")
    assert [source["path"] for source in found["sources"]] == ["many", "a.jsonl.gz", "b.txt"]
    assert [source["read"] for source in found["sources"]] == [30, 46, 51]
    assert found["sources"][1]["dropped"] == {"broken JSON": 1, "duplicate": 5, "too short": 1}
    assert found["sources"][2]["repaired"] == {"undecodable bytes replaced": 2}
    everything = list(read_documents(tmp_path / "out"))
    assert len(everything) == metrics["documents"] == sum(entry["documents"] for entry in found["files"])
    assert sum(len(document.text) for document in everything) == metrics["characters"] == found["characters"]
    assert sum(document.held_out for document in everything) == found["held_out_documents"] > 5
    assert sum(source["documents"] for source in found["sources"]) == metrics["documents"]
    for name, entry in zip(list_files(tmp_path / "out"), found["files"], strict=True):
        own = list(read_documents(tmp_path / "out", None, [name]))
        assert (len(own), sum(item.held_out for item in own)) == (entry["documents"], entry["held_out"])
        assert run.sha256(tmp_path / "out" / name) == entry["sha256"]
    losses = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    assert sum(loss["reason"] == "duplicate" for loss in losses) == sum(
        source["dropped"].get("duplicate", 0) for source in found["sources"]
    )
    assert any(loss["where"].endswith("a.jsonl.gz:46") and loss["reason"] == "broken JSON" for loss in losses)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.json", "identity", "dropped.jsonl", *list_files(tmp_path / "out"),
    }  # fmt: skip


def test_train_and_held_out_are_disjoint_and_do_not_depend_on_the_order(tmp_path, mixed):
    build(mixed, tmp_path / "a", ["many", "a.jsonl.gz", "b.txt"])
    build(mixed, tmp_path / "b", ["b.txt", "a.jsonl.gz", "many"])
    for split in ("train", "held_out"):
        assert sorted(texts(tmp_path / "a", split)) == sorted(texts(tmp_path / "b", split))
    assert not set(texts(tmp_path / "a", "train")) & set(texts(tmp_path / "a", "held_out"))
    assert texts(tmp_path / "a") != texts(tmp_path / "b")
    # more text, or a larger share, moves no document from held-out to train
    build(mixed, tmp_path / "c", ["many"])
    assert set(texts(tmp_path / "c", "held_out")) <= set(texts(tmp_path / "a", "held_out"))
    build(mixed, tmp_path / "d", ["many", "a.jsonl.gz", "b.txt"], held_out=0.4)
    assert set(texts(tmp_path / "a", "held_out")) < set(texts(tmp_path / "d", "held_out"))


@pytest.mark.fault("R3")
def test_a_signal_stops_it_between_documents_and_it_continues(tmp_path, mixed, monkeypatch):
    build(mixed, tmp_path / "whole", ["many", "a.jsonl.gz", "b.txt"])
    cleaned = parts.clean

    def clean(text, where, policy, counts):
        if where[0].endswith("b.txt"):
            monkeypatch.setattr(run, "_signal", 15)
        return cleaned(text, where, policy, counts)

    monkeypatch.setattr(parts, "clean", clean)
    with pytest.raises(run.Stopped):
        build(mixed, tmp_path / "out", ["many", "a.jsonl.gz", "b.txt"])
    assert not (tmp_path / "out" / "index.json").exists()
    monkeypatch.setattr(run, "_signal", None)
    monkeypatch.setattr(parts, "clean", lambda *a: pytest.fail("read again") if "many" in a[1][0] else cleaned(*a))
    build(mixed, tmp_path / "out", ["many", "a.jsonl.gz", "b.txt"])
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_finished_corpus_is_not_built_again_unless_something_changed(tmp_path, mixed, monkeypatch):
    first = build(mixed, tmp_path / "out", ["many"])
    with monkeypatch.context() as patch:
        patch.setattr(parts, "clean", lambda *_: pytest.fail("read again"))
        assert build(mixed, tmp_path / "out", ["many"]) == first
    (mixed / "many" / "0.txt").write_text(documents(1, seed=9)[0] + " and something else")
    assert build(mixed, tmp_path / "out", ["many"])["characters"] != first["characters"]
    build(mixed, tmp_path / "fresh", ["many"])
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")
    assert build(mixed, tmp_path / "out", ["many"], licence="CC0") == build(mixed, tmp_path / "fresh", ["many"])
    assert index(tmp_path / "out")["licence"] == "CC0"
    smaller = build(mixed, tmp_path / "out", ["many"], held_out=0.4, min_characters=200)
    assert sorted(list_files(tmp_path / "out")) == sorted(p.name for p in (tmp_path / "out").glob("documents-*"))
    assert smaller["documents"] == len(texts(tmp_path / "out"))


class Killed(BaseException):
    pass


def test_what_was_selected_for_other_settings_is_selected_anew(tmp_path, mixed, monkeypatch):
    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(corpus, "_remove_others", killed)
        with pytest.raises(Killed):
            build(mixed, tmp_path / "out", as_config(SOURCES))
    build(mixed, tmp_path / "out", as_config([*SOURCES[:2], {"path": "b.txt", "weight": 0.5}]))
    build(mixed, tmp_path / "fresh", as_config([*SOURCES[:2], {"path": "b.txt", "weight": 0.5}]))
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


# ---- what stays -----------------------------------------------------------------------------------------------------


def lines_source(folder: Path, lines: list[str], **settings) -> list:
    folder.mkdir(exist_ok=True)
    (folder / "l.txt").write_text("\n".join(lines))
    return as_config([{"path": "l.txt", "format": "lines", **settings}])


def test_exact_duplicates_go_or_stay(tmp_path):
    lines = [prose(random.Random(number % 40), 20) for number in range(100)]
    sources = lines_source(tmp_path, lines)
    build(tmp_path, tmp_path / "exact", sources)
    assert texts(tmp_path / "exact") == lines[:40]
    build(tmp_path, tmp_path / "none", sources, dedup="none")
    assert texts(tmp_path / "none") == lines


def test_slices_of_the_hashes_find_the_same_duplicates(tmp_path, monkeypatch):
    lines = [prose(random.Random(number % 57), 20) for number in range(300)]
    sources = lines_source(tmp_path, lines)
    build(tmp_path, tmp_path / "a", sources)
    monkeypatch.setattr(dedup, "SLICE", 20)
    build(tmp_path, tmp_path / "b", sources)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert len(texts(tmp_path / "a")) == 57


def test_near_duplicates(tmp_path):
    generator = random.Random(3)
    base = [prose(generator, 200) for _ in range(60)]
    changed = [text.replace(text.split()[100], "changed", 1) for text in base[:30]]
    other = [" ".join(text.split()[:100]) + " " + prose(generator, 100) for text in base[30:]]
    build(tmp_path, tmp_path / "out", lines_source(tmp_path, base + changed + other), dedup="near")
    assert texts(tmp_path / "out") == base + other
    assert index(tmp_path / "out")["sources"][0]["dropped"] == {"near duplicate": 30}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9, 0.95])
def test_bands_catch_what_passes_the_threshold_and_little_else(threshold):
    bands, rows = dedup.bands_for(threshold)
    assert bands * rows <= parts.PERMUTATIONS

    def chance(similarity):
        return 1 - (1 - similarity**rows) ** bands

    assert chance(threshold + 0.05) > 0.9
    assert chance(threshold - 0.25) < 0.7


def test_near_without_the_extra_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with pytest.raises(ValueError, match=r"pip install 'frugalbert\[dedup\]'. or write exact"):
        build(tmp_path, tmp_path / "out", lines_source(tmp_path, documents(9)), dedup="near")


@pytest.mark.parametrize("mode", ["exact", "none"])
def test_held_out_text_that_training_repeats_is_dropped(tmp_path, mode):
    generator = random.Random(1)
    articles = ["\n".join(prose(generator, 30) for _ in range(10)) for _ in range(200)]
    copies = [
        f"{text.upper() if number % 2 else text}\n{prose(generator, 8)}" for number, text in enumerate(articles[:50])
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in articles + copies))
    build(tmp_path, tmp_path / "out", ["a.jsonl"], dedup=mode)
    train, held_out = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "held_out")
    trained = {line.lower() for text in train for line in text.split("\n")}
    assert max(np.mean([line.lower() in trained for line in text.split("\n")]) for text in held_out) < 0.8
    dropped = index(tmp_path / "out")["sources"][0]["dropped"]["held-out text repeated in training"]
    assert dropped + len(train) + len(held_out) == 250
    assert 5 <= dropped <= 25  # a pair is torn apart with chance 2 * 0.2 * 0.8: 16 of 50 expected


@pytest.mark.parametrize("weight, low, high", [(2.0, 2.0, 2.0), (0.5, 0.4, 0.6), (2.5, 2.4, 2.6), (1.0, 1.0, 1.0)])
def test_weights(tmp_path, weight, low, high):
    lines = [prose(random.Random(number), 20) for number in range(500)]
    build(tmp_path, tmp_path / "out", lines_source(tmp_path, lines, weight=weight))
    held_out, train = texts(tmp_path / "out", "held_out"), texts(tmp_path / "out", "train")
    assert len(held_out) == len(set(held_out))
    assert low <= len(train) / (0.8 * 500) * (0.8 * 500 / (500 - len(held_out) / min(1, weight))) <= high
    counts = {train.count(text) for text in set(train)}
    assert counts <= {int(weight), int(weight) + 1}
    if weight == 2.0:  # copies lie far from each other, not side by side
        assert train[: len(train) // 2] == train[len(train) // 2 :]


def test_a_limit_reads_the_beginning_of_a_source(tmp_path, mixed):
    build(mixed, tmp_path / "out", as_config([{"path": "many", "max_documents": 7}, "b.txt"]))
    found = index(tmp_path / "out")["sources"]
    assert [source["read"] for source in found] == [7, 51]


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.fault("R22")
def test_nothing_left_is_one_sentence(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(ValueError, match="hold no document; look at"):
        build(tmp_path, tmp_path / "a", ["empty.txt"])
    (tmp_path / "newlines.txt").write_text("\n\n\n")
    with pytest.raises(ValueError, match=r"hold no document \(dropped as: empty\)"):
        build(tmp_path, tmp_path / "b", ["newlines.txt"])
    with pytest.raises(ValueError, match=r"hold no document \(dropped as: too short\)"):
        build(tmp_path, tmp_path / "c", lines_source(tmp_path, ["short", "lines"]))
    assert not (tmp_path / "c" / "index.json").exists()


def test_nothing_held_out_names_the_share_to_write(tmp_path):
    (tmp_path / "one.txt").write_text(prose(random.Random(0), 100))
    with pytest.raises(ValueError, match="corpus.held_out: 0.2 leaves 1 documents to train on and 0 to validate"):
        build(tmp_path, tmp_path / "a", ["one.txt"])
    sources = lines_source(tmp_path, [prose(random.Random(number), 20) for number in range(300)])
    with pytest.raises(ValueError, match="0 to validate with; write held_out: 0.067"):
        build(tmp_path, tmp_path / "b", sources, held_out=0.0001)


@pytest.mark.fault("R22")
def test_strict_and_skip_by_file_and_line(tmp_path):
    sources = lines_source(tmp_path, [*documents(20), "x"])
    with open(tmp_path / "l.txt", "ab") as file:
        file.write(b"\nthis line is long enough to be kept \xe9 but it is Latin-1")
    line = (tmp_path / "l.txt").read_bytes().count(b"\n") + 1
    with pytest.raises(ValueError, match=rf"l\.txt:{line}: byte 0xE9 is not UTF-8"):
        build(tmp_path, tmp_path / "a", sources, encoding_errors="strict")
    build(tmp_path, tmp_path / "b", sources, encoding_errors="skip")
    assert index(tmp_path / "b")["sources"][0]["dropped"]["undecodable"] == 1
    build(tmp_path, tmp_path / "c", sources)
    assert sum("\ufffd" in text for text in texts(tmp_path / "c")) == 1


@pytest.mark.fault("R22")
def test_a_file_that_changes_meanwhile(tmp_path, monkeypatch):
    sources = lines_source(tmp_path, documents(20))
    cleaned = parts.clean

    def clean(*arguments):
        (tmp_path / "l.txt").write_text("another text")
        return cleaned(*arguments)

    monkeypatch.setattr(parts, "clean", clean)
    with pytest.raises(ValueError, match=r"l\.txt changed while it was read"):
        build(tmp_path, tmp_path / "out", sources)


def test_a_damaged_or_absent_corpus(tmp_path, mixed):
    build(mixed, tmp_path / "out", ["many"])
    path = tmp_path / "out" / list_files(tmp_path / "out")[1]
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"documents-00001\.jsonl\.zst is damaged; .*--redo corpus"):
        texts(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=r"documents-00001\.jsonl\.zst is gone"):
        texts(tmp_path / "out")
    with pytest.raises(ValueError, match="holds no finished corpus; run the corpus stage first"):
        texts(tmp_path / "other")


# ---- datasets -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    import datasets

    folder = tmp_path_factory.mktemp("datasets")
    rows = datasets.Dataset.from_dict({"body": documents(90), "n": list(range(90))})
    rows.save_to_disk(folder / "plain")
    datasets.DatasetDict({"train": rows, "test": rows.select(range(10))}).save_to_disk(folder / "splits")
    (folder / "files").mkdir()
    for part in range(3):
        lines = [json.dumps({"body": text}) for text in documents(90)[part * 30 : part * 30 + 30]]
        (folder / "files" / f"train-{part}.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize(
    "name, split, count", [("plain", "train", 90), ("splits", "train", 90), ("splits", "test", 10)]
)
def test_saved_datasets(tmp_path, saved, monkeypatch, name, split, count):
    from frugalbert.data import hub

    monkeypatch.setattr(hub, "ROWS", 32)  # three units of work
    source = {"path": name, "format": "dataset", "field": "body", "split": split}
    build(saved, tmp_path / "out", as_config([source]), held_out=0.4)
    assert texts(tmp_path / "out") == documents(90)[:count]


def test_a_directory_of_data_files_is_streamed(tmp_path, saved):
    source = {"path": "files", "format": "dataset", "field": "body"}
    build(saved, tmp_path / "out", as_config([source]))
    assert texts(tmp_path / "out") == documents(90)
    build(saved, tmp_path / "limited", as_config([source | {"max_documents": 40}]))
    assert texts(tmp_path / "limited") == documents(90)[:40]


@pytest.mark.parametrize(
    "source, message",
    [
        ({"path": "plain", "format": "dataset"}, "plain has no column 'text'; write field: with one of body, n"),
        (
            {"path": "splits", "format": "dataset", "split": "dev"},
            "no split 'dev'; write split: with one of train, test",
        ),
        ({"path": "plain", "format": "dataset", "field": "n"}, "field is not text"),
        ({"path": "hub:nobody-here/nothing-there"}, "cannot read the dataset nobody-here/nothing-there .*network"),
        ({"path": "nowhere", "format": "dataset"}, "cannot read the dataset .*nowhere"),
    ],
)
def test_wrong_datasets_are_one_sentence(tmp_path, saved, source, message):
    with pytest.raises(ValueError, match=message) as caught:
        build(saved, tmp_path / "out", as_config([source]))
    assert "\n" not in str(caught.value)


# ---- real text and memory -------------------------------------------------------------------------------------------


def test_real_wikipedia(tmp_path, shared_data):
    with lzma.open(shared_data / "enwiki2015-AA.txt.xz", "rt", encoding="utf-8") as file:
        raw = file.read(9_000_000)
    articles = raw.split("</doc>\n")[:-1]
    (tmp_path / "wiki_00").write_text("</doc>\n".join(articles) + "</doc>\n", encoding="utf-8")
    metrics = build(tmp_path, tmp_path / "one", ["wiki_00"], workers=1)
    build(tmp_path, tmp_path / "two", ["wiki_00"], workers=2)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    found = texts(tmp_path / "one")
    account = index(tmp_path / "one")["sources"][0]
    assert account["read"] == len(articles)
    assert metrics["documents"] + sum(account["dropped"].values()) == len(articles)
    assert len(articles) > 500
    # every word of a kept article is there, in order, but for the title line
    bodies = {" ".join(article.split("\n", 2)[2].split()) for article in articles}
    assert sum(" ".join(text.split()) in bodies for text in found) >= 0.99 * len(found)
    assert 0.1 < metrics["held_out_documents"] / metrics["documents"] < 0.3


MEASURE = """
import resource, sys
from pathlib import Path
from frugalbert.config import Corpus, Machine
from frugalbert.data import corpus
out = Path(sys.argv[1]) / "out"
out.mkdir()
corpus.build(Corpus(sources=(sys.argv[2],)), {"yaml": Path(sys.argv[1])}, out, Machine(workers=1))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(folder: Path, megabytes: int) -> int:
    folder.mkdir()
    generator = random.Random(0)
    block = [prose(generator, 200) for _ in range(800)]  # about 1 MB
    with open(folder / "a.jsonl", "w") as file:
        for number in range(megabytes):
            file.writelines(json.dumps({"text": f"{number} {text}\n{text} {number}"}) + "\n" for text in block[::2])
    result = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, "a.jsonl"], capture_output=True, text=True, check=True
    )
    return int(result.stdout)


def test_what_python_holds_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    """Small parts and buffers: four times the text, and the same peak but for some bytes per document."""
    monkeypatch.setattr(parts, "PART_CHARACTERS", 200_000)
    monkeypatch.setattr(corpus, "UNIT_BYTES", 400_000)
    monkeypatch.setattr(files, "HEAD", 10_000)
    generator = random.Random(0)

    def traced(kilobytes: int) -> int:
        folder = tmp_path / str(kilobytes)
        folder.mkdir()
        for number in range(kilobytes // 100):
            (folder / f"{number:03d}.txt").write_text("\n\n".join(prose(generator, 400) for _ in range(45)))
        tracemalloc.start()
        try:
            build(folder, folder / "out", ["*.txt"])
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    traced(100)  # imports and caches
    large, small = traced(8000), traced(2000)
    assert large < 1.3 * small
    assert large < 2_000_000


def test_memory_does_not_grow_with_the_corpus(tmp_path):
    assert peak(tmp_path / "large", 64) < 1.3 * peak(tmp_path / "small", 16)


@pytest.mark.slow
def test_memory_of_400_mb_is_that_of_100_mb(tmp_path):
    assert peak(tmp_path / "large", 400) < 1.3 * peak(tmp_path / "small", 100)


def test_one_line_of_50_mb(tmp_path):
    line = " ".join(str(number) for number in range(6_000_000))
    (tmp_path / "a.txt").write_text(line)
    assert len(line) > 46_000_000
    metrics = build(tmp_path, tmp_path / "out", ["a.txt"])
    assert metrics["documents"] > 40
    assert "".join(text + " " for text in texts(tmp_path / "out")).strip() == line
