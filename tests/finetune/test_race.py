"""RACE as a directory and as the archive it comes in: counts, options, and archives that are none."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config
from frugalbert.finetune import race
from frugalbert.finetune.examples import load
from frugalbert.finetune.runner import hold_out
from frugalbert.finetune.tasks import Data, resolve
from tests.finetune.golden.files import RACE
from tests.finetune.test_superglue import JSON, mutate


def read(name: str, data: Path, **more: Any) -> Data:
    section = config.Finetune(tasks=[name], model="unused", data=str(data), **more)
    return load(resolve([name])[0], section, Path(), None)


def place(folder: Path, archive: str = "", contents: dict[str, str] = RACE) -> Path:
    """Our own files as a directory `RACE`, or as an archive of this name."""
    if archive:
        with tarfile.open(folder / archive, f"w:{archive.split('.')[-1].removesuffix('tar')}") as tar:
            for name, text in contents.items():
                member = tarfile.TarInfo(f"RACE/{name}")
                member.size = len(text.encode())
                tar.addfile(member, io.BytesIO(text.encode()))
    else:
        for name, text in contents.items():
            (folder / "RACE" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "RACE" / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("name", "counts"),
    [("race-middle", (1436, 1436)), ("race-high", (3451, 3498)), ("race", (4887, 4934))],
)
def test_no_question_of_the_real_archive_is_lost(shared_data, name, counts):
    data = read(name, shared_data, train=False, predict_test=True)
    assert (len(data.dev), len(data.sets["test"])) == counts
    for row in data.dev:
        assert (len(row.options), row.names) == (4, ("A", "B", "C", "D"))
        assert isinstance(row.label, tuple)
        assert row.id.startswith(row.group)
    assert {row.group for row in data.dev} == ({"middle", "high"} if name == "race" else {name.removeprefix("race-")})


@pytest.mark.parametrize("archive", ["RACE.tar.gz", "RACE-all.tar.xz", "race.tar"])
def test_the_archive_is_the_directory(tmp_path, archive):
    (tmp_path / "one").mkdir()
    (tmp_path / "two" / "RACE").mkdir(parents=True)
    place(tmp_path / "one")
    place(tmp_path / "two" / "RACE", archive)
    first, second = (read("race", tmp_path / name, predict_test=True) for name in ("one", "two"))
    assert first.sets == second.sets
    assert [row.id for row in first.train][:3] == ["middle9.txt-0", "middle9.txt-1", "middle10.txt-0"]  # by number
    assert len(list((tmp_path / "two").rglob("*"))) == 2  # nothing was extracted


@pytest.mark.parametrize(
    ("question", "option", "text"),
    [
        ("It is _ .", "red", "It is red ."),
        (" What? ", " red ", "What? red"),
        ("_ and _", "a", "a and a"),
        ("", "a", "a"),
    ],
)
def test_the_option_completes_the_question(question, option, text):
    assert race.fill(question, option) == text


def test_select_holds_out_whole_passages_of_both_parts(tmp_path):
    """`group` says the part, which is half of the data, not what belongs together."""
    contents = {**RACE}
    for part in ("middle", "high"):
        for number in range(40):
            text = RACE[f"train/{part}/9.txt"].replace("old tree", f"tree {number}").replace("9.txt", f"{number}.txt")
            contents[f"train/{part}/{number}.txt"] = text
    data = read("race", place(tmp_path, contents=contents))
    train, held = hold_out(data.task, data.train, 0.3)
    assert {row.group for row in held} == {row.group for row in train} == {"middle", "high"}
    assert not {row.text for row in held} & {row.text for row in train}
    assert 0.1 < len(held) / len(held + train) < 0.5


def member(name: str, content: bytes = b"{}", kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, len(content), "/etc/passwd"
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.mark.fault("S7")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not an archive", "is no whole archive"),
        (member("RACE/train/middle/1.txt", b"x" * 2000)[:900], "is no whole archive"),
        (member("../train/middle/1.txt"), r"the member '\.\./train/middle/1.txt' is unsafe"),
        (member("/train/middle/1.txt"), "is unsafe"),
        (member("train/middle/1.txt", b" " * (race.LARGEST_MEMBER + 1)), "1,048,577 bytes, too many for a passage"),
        (member("train/middle/1.txt", b'{"article": '), "1.txt is no JSON"),
        (member("train/middle/1.txt", b"[1]"), "needs article, and questions, options and answers of one length"),
    ],
)  # fmt: skip
def test_bad_archives_get_one_sentence(tmp_path, content, message):
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "RACE.tar").write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read("race", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("S7")
def test_links_in_an_archive_are_passed_over(tmp_path):
    (tmp_path / "race").mkdir()
    (tmp_path / "race" / "RACE.tar").write_bytes(member("train/middle/1.txt", b"", tarfile.SYMTYPE))
    with pytest.raises(FileNotFoundError, match=r"has no train/middle/\*.txt"):
        read("race", tmp_path)


@pytest.mark.fault("S7")
@settings(derandomize=True, max_examples=60, deadline=None)
@given(st.binary(max_size=80), st.sampled_from(["gz", "xz", "bz2"]))
def test_any_bytes_are_one_sentence(tmp_path_factory, content, kind):
    folder = tmp_path_factory.mktemp("any") / "race"
    folder.mkdir()
    magic = {"gz": b"\x1f\x8b\x08", "xz": b"\xfd7zXZ\0", "bz2": b"BZh9"}[kind]
    (folder / f"RACE.tar.{kind}").write_bytes(magic + content)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read("race", folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"B"', '"E"', "the answer 'E' is none of the letters ABCD"),
        ('["fish", "birds ", "trees", "cats"]', '["fish"]', "a question needs two options or more"),
        (
            '"answers": ["B", "A"]',
            '"answers": ["B"]',
            "needs article, and questions, options and answers of one length",
        ),
    ],
)
def test_bad_passages_get_one_sentence(tmp_path, old, new, message):
    contents = {name: text.replace(old, new) for name, text in RACE.items()}
    assert contents != RACE
    with pytest.raises(ValueError, match=f"/train/middle/9.txt:? {message}"):
        read("race", place(tmp_path, contents=contents))


@settings(derandomize=True, max_examples=100, deadline=None)
@given(path=st.lists(st.integers(0, 9), min_size=1, max_size=4), new=JSON)
def test_any_change_ends_in_examples_or_one_sentence(tmp_path_factory, path, new):
    name = "train/middle/9.txt"
    contents = {**RACE, name: json.dumps(mutate(json.loads(RACE[name]), path, new))}
    try:
        data = read("race", place(tmp_path_factory.mktemp("any"), contents=contents))
    except ValueError as error:
        assert "\n" not in str(error)
        assert "9.txt" in str(error)
    else:
        assert data.train
