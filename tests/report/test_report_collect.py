"""Reading run directories that are torn, damaged, resumed or odd."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert.report.collect import MOST_RECORDS, collect
from frugalbert.report.page import _context
from tests.report.conftest import dump, dump_lines, make_run
from tests.report.odd import contents, spoil


def metrics(run: Path, rows: list[dict[str, Any]]) -> None:
    dump_lines(run / "pretrain" / "metrics.jsonl", rows)


def test_steps_repeated_after_a_restart_count_once(tmp_path: Path):
    steps = [*range(1, 8), *range(5, 10)]
    metrics(tmp_path, [{"step": step, "loss": index} for index, step in enumerate(steps)])
    found = collect(tmp_path)
    assert [row["step"] for row in found.train] == list(range(1, 10))
    assert [row["loss"] for row in found.train] == [0, 1, 2, 3, 7, 8, 9, 10, 11]


def test_validation_and_training_are_told_apart(tmp_path: Path):
    metrics(tmp_path, [{"step": 1, "loss": 1.0}, {"step": 1, "validation_loss": 2.0}, {"loss": 3.0}, {"step": "x"}])
    found = collect(tmp_path)
    assert found.train == [{"step": 1, "loss": 1.0}]
    assert found.validation == [{"step": 1, "validation_loss": 2.0}]


def test_long_runs_are_thinned_evenly(tmp_path: Path):
    metrics(tmp_path, [{"step": step} for step in range(2 * MOST_RECORDS)])
    steps = [row["step"] for row in collect(tmp_path).train]
    assert MOST_RECORDS / 2 <= len(steps) <= MOST_RECORDS + 1
    assert steps[0] == 0
    assert steps[-1] == 2 * MOST_RECORDS - 1


def test_a_torn_last_line_is_normal_and_a_bad_one_inside_is_reported(tmp_path: Path):
    path = tmp_path / "bench" / "latency.jsonl"
    dump_lines(path, [{"median_ms": 1.0}, {"median_ms": 2.0}])
    path.write_text(path.read_text() + '{"median_ms": 3')
    found = collect(tmp_path)
    assert [row["median_ms"] for row in found.latency] == [1.0, 2.0]
    assert found.problems == []
    path.write_text('{"median_ms": 1.0}\nnonsense\n\n{"median_ms": 2.0}\n[1]\n')
    found = collect(tmp_path)
    assert [row["median_ms"] for row in found.latency] == [1.0, 2.0]
    assert found.problems == ["bench/latency.jsonl: 2 damaged lines left out (2, 5)"]


def test_lines_of_a_journal_are_read_without_their_check(tmp_path: Path):
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "latency.jsonl").write_text('0a1b2c3d {"median_ms": 1.0}\n')
    assert collect(tmp_path).latency == [{"median_ms": 1.0}]


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b'{"a": "\\ud800"}', b"nul", b"[1, 2]"])
def test_damaged_files_are_named_and_left_out(damage: bytes, tmp_path: Path):
    names = (
        "corpus/index.json", "tokenizer/tokenizer.json", "shards/index.json", "pretrain/summary.json",
        "finetune/results.json", "export/export.json", "bench/stage.json",
    )  # fmt: skip
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(damage)
    found = collect(tmp_path)
    named = {problem.split(" ")[0] for problem in found.problems}
    if damage.startswith(b'{"a"'):
        assert found.corpus == {"a": "⟨U+D800⟩"}
        assert named == {"tokenizer/tokenizer.json", "finetune/results.json"}
    else:
        assert named == set(names)
        assert found.corpus == {}
    json.dumps(_context(found), default=str).encode()


def test_directories_put_aside_are_no_stages(tmp_path: Path):
    for name in ("corpus", "corpus.old-1", "report", ".tmp-x", "search"):
        dump(tmp_path / name / "stage.json", {"stage": name})
    assert list(collect(tmp_path).stages) == ["corpus", "search"]


def test_the_name_comes_from_the_configuration(tmp_path: Path):
    assert collect(tmp_path).name == tmp_path.name
    (tmp_path / "run.yaml").write_text("# folder: /secret\nname: 'small-24h'\nbench: {}\ncorpus:\n  sources: [a]\n")
    found = collect(tmp_path)
    assert found.name == "small-24h"
    assert found.wanted == ("corpus", "bench")
    assert "folder" not in found.config


FILES = (
    "corpus/index.json", "shards/index.json", "pretrain/summary.json", "finetune/results.json", "export/export.json",
    "shards/stage.json", "bench/latency.jsonl", "pretrain/metrics.jsonl", "corpus/dropped.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run = make_run(tmp_path_factory.mktemp("run") / "run", steps=50)
    return run, contents(run, FILES)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_content_breaks_the_words_of_the_page(data: st.DataObject, sound: tuple[Path, dict[str, Any]]):
    """Odd values anywhere in the files of a sound run are shown as such or left out; nothing raises."""
    run, whole = sound
    spoil(run, whole, data)
    _context(collect(run))
