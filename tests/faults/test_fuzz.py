"""Random and mutated input of every kind that is read: what it says, or the toolkit's own sentence about it."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from frugalbert.data.rows import INDEX, ShardSet, index_checksum
from frugalbert.fanout import Journal
from frugalbert.model.arch import Arch
from frugalbert.space import Space
from tests.data.small_shards import random_documents, write_shards
from tests.faults.rows import often
from tests.train.super_run import SPACE

FEW = settings(max_examples=often(100, 5000), suppress_health_check=list(HealthCheck))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
LINE = "modern 4x256 heads=4 head_dim=64 ffn=640 max_length=512"


def one_sentence(error: Exception) -> None:
    assert type(error) in (ValueError, FileNotFoundError), repr(error)
    assert str(error).strip()
    assert len(str(error)) < 1000


@pytest.mark.fault("S5")
@FEW
@given(st.integers(0, len(LINE)), st.integers(0, 6), st.text("0123456789x=: modernbert,-[]()heads\n\t-٣", max_size=8))
def test_lines_of_architectures(place: int, length: int, new: str):
    try:
        arch = Arch.parse(LINE[:place] + new + LINE[place + length :])
    except ValueError as error:
        one_sentence(error)
    else:
        assert Arch.parse(str(arch)) == arch


@pytest.mark.fault("S5")
@FEW
@given(st.sampled_from([*SPACE, "mixed", "max_length", "other"]), JSON)
def test_spaces(key: str, value: Any):
    try:
        space = Space.from_json({**SPACE, key: value})
    except ValueError as error:
        one_sentence(error)
    else:
        assert Space.from_json(json.loads(json.dumps(space.to_json()))) == space


@pytest.mark.fault("R16")
@FEW
@given(st.lists(JSON, max_size=6), st.binary(max_size=40), st.floats(0, 1), st.integers(0, 30))
def test_journals(tmp_path: Path, entries: list[Any], new: bytes, place: float, length: int):
    """Bytes of a journal replaced by others: what is read is what was written, line by line, or is left out."""
    path = tmp_path / "journal.jsonl"
    path.unlink(missing_ok=True)
    kept = [entry for entry in entries if "NaN" not in json.dumps(entry) and "Infinity" not in json.dumps(entry)]
    with Journal(path) as journal:
        for entry in kept:
            journal.append(entry)
    data = path.read_bytes()
    at = round(place * len(data))
    path.write_bytes(data[:at] + new + data[at + length :])
    with Journal(path) as journal:
        texts = [json.dumps(entry, sort_keys=True) for entry in kept]
        assert {json.dumps(entry, sort_keys=True) for entry in journal.entries} <= set(texts)
        journal.append("after")
    assert Journal(path).entries[-1] == "after"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_shards(folder, random_documents(np.random.default_rng(0), 60, 100))
    return folder


@pytest.mark.fault("R6")
@FEW
@given(st.integers(0, 2**32 - 1), JSON)
def test_an_index_with_a_right_checksum(shards: Path, tmp_path: Path, seed: int, value: Any):
    """Any value of the index replaced by any other, and the checksum made right again: refused or the same rows."""
    index = json.loads((shards / INDEX).read_text())
    del index["checksum"]
    inner, generator = index, random.Random(seed)
    while True:
        key = generator.choice(list(inner) if isinstance(inner, dict) else range(len(inner)))
        if not isinstance(inner[key], dict | list) or not inner[key] or generator.random() < 0.2:
            break
        inner = inner[key]
    inner[key] = value
    folder = tmp_path / "shards"
    folder.mkdir(exist_ok=True)
    if not (folder / "length-32").exists():
        (folder / "length-32").symlink_to(shards / "length-32")
    try:
        text = json.dumps(index | {"checksum": index_checksum(index)}, allow_nan=False)
    except ValueError:
        return
    (folder / INDEX).write_text(text)
    try:
        opened = ShardSet.open(folder, 32)
    except (ValueError, FileNotFoundError) as error:
        one_sentence(error)
    else:
        assert np.array_equal(opened.ids, ShardSet.open(shards, 32).ids)
