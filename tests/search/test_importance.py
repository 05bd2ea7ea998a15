"""Importance of attention positions: what is counted, what controls drop, the study cut off and continued, refusals."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from frugalbert.config import Config, Importance, Machine
from frugalbert.model import patterns
from frugalbert.model.arch import Arch
from frugalbert.run import Stopped, read_json
from frugalbert.search import importance
from frugalbert.train import short
from tests.train import small_run

ARCH = "modern 2x16 heads=2 ffn=16 max_length=64"
STUDY = {"steps": 4, "looks": 2, "seeds": [0, 1], "recipes": {"optimizer": "adamw", "learning_rate": 5e-3,
                                                             "batch_size": 4}}  # fmt: skip
MACHINE = Machine(device="cpu", threads=1, workers=1, micro_batch=4)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return small_run.prepare(tmp_path_factory.mktemp("importance"))


def section(**values: Any) -> Importance:
    fixed = {"arch": ARCH, "budget": "4steps", "batch_size": 4, "precision": "fp32", "validation": {"rows": 16}}
    return Importance.model_validate(fixed | values)


def build(inputs: dict[str, Path], out: Path, **values: Any) -> dict[str, Any]:
    out.mkdir(exist_ok=True)
    return importance.build(section(**values), inputs, out, MACHINE)


@pytest.fixture(scope="module")
def finished(inputs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    build(inputs, out, study=STUDY, controls=2)
    return out


# ---- controls --------------------------------------------------------------------------------------------------------


def test_a_control_drops_exactly_as_many_pairs_as_the_diagonal_has_and_none_of_it():
    arch = Arch.parse("bert 3x24 heads=3 ffn=24")
    for length in (2, 3, 17, 64):
        heads = [head for layer in importance.control(arch, length, (0, 0)) for head in layer]
        assert len(heads) == 9
        for head in heads:
            mask = patterns.dense(head, length)
            assert mask.diagonal().all()
            assert (~mask).sum() == length == length**2 - patterns.pairs(patterns.Pattern("nodiag"), length)


def test_controls_differ_between_draws_layers_and_heads_and_come_again():
    arch = Arch.parse("bert 3x24 heads=3 ffn=24")
    drawn = [importance.control(arch, 32, key) for key in ((0, 0), (0, 1), (1, 0))]
    assert len({str(head) for one in drawn for layer in one for head in layer}) == 27
    assert drawn[1] == importance.control(arch, 32, (0, 1))


def test_every_pair_off_the_diagonal_is_dropped_equally_often():
    dropped = sum(~patterns.dense(importance.drop(8, np.random.default_rng(seed)), 8) for seed in range(1400))
    outside = dropped[~np.eye(8, dtype=bool)]
    assert abs(outside - 200).max() < 60, "binomial: 1400 draws of 8 among 56, deviation 13"


# ---- kinds of pairs --------------------------------------------------------------------------------------------------


def test_pairs_are_counted_by_kind_as_documents_have_them():
    """Every pair of every document once: by hand for a document of four and one with two [SEP]."""
    counts = importance.count_pairs(Counter({(4, (3,)): 2, (5, (2, 4)): 1}), 6)
    kinds = [["dcccc.", "cdnsr.", "cnds..", "cssd..", "c...d.", "......"], ["dcccc.", "cdsrs.", "csdss.", "crsds.",
             "cssSd.", "......"]]  # fmt: skip
    names = {"d": "diagonal", "c": "cls", "n": "neighbours", "s": "sep", "r": "rest"}
    expected = {name: np.zeros((6, 6), int) for name in importance.KINDS}
    for size, times, rows in ((4, 2, kinds[0]), (5, 1, kinds[1])):
        for i in range(size):
            for j in range(size):
                expected[names[rows[i][j].lower()]][i, j] += times
    for name, found in counts.items():
        np.testing.assert_array_equal(found, expected[name], name)
    assert sum(int(found.sum()) for found in counts.values()) == 2 * 16 + 25


def test_means_by_distance_are_weighted_by_what_documents_have():
    share = np.arange(16.0).reshape(4, 4)
    counts = np.zeros((4, 4), int)
    counts[0, 1], counts[3, 2], counts[2, 2] = 3, 1, 5
    found = importance.by_distance(share, counts)
    assert found[:2].tolist() == [10.0, (3 * 1 + 14) / 4]
    assert np.isnan(found[2:]).all()


def test_differences_are_paired_and_those_that_diverged_left_out():
    found = importance.difference([2.0, 3.0, None, 5.0], [1.0, 1.0, 7.0, 2.0])
    assert found is not None
    assert found["mean"] == 2.0
    assert found["pairs"] == 3
    assert found["interval"] == pytest.approx([2.0 - 4.302653 / 3**0.5, 2.0 + 4.302653 / 3**0.5])
    assert importance.difference([1.0], [2.0]) == {"mean": -1.0, "interval": None, "pairs": 1}
    assert importance.difference([None], [2.0]) is None


# ---- the stage -------------------------------------------------------------------------------------------------------


def test_the_map_says_what_each_kind_of_pair_is_worth(finished: Path):
    found = read_json(finished / "importance.json")
    assert sum(found["pairs"].values()) == pytest.approx(1.0)
    assert found["rows"] == [[0, 1], [0, 1]]
    assert len(found["maps"]) == 2
    assert found["groups"]["diagonal"] == pytest.approx(np.mean([one["diagonal"] for one in found["maps"]]))
    assert all(0.3 < value < 0.7 for value in found["groups"].values())
    assert len(set(found["groups"].values())) == 5
    pictures = np.load(finished / "importance.npz")
    assert pictures["probability"].shape == (2, 32, 32)
    np.testing.assert_allclose(pictures["probability"], pictures["probability"].transpose(0, 2, 1))
    assert pictures["by_distance"].mean(0)[0] == pytest.approx(found["groups"]["diagonal"], abs=1e-5)
    assert not (finished / "model").exists()
    assert not (finished / "arch.json").exists()


def test_the_study_has_all_variants_with_every_seed(finished: Path):
    found = read_json(finished / "results.json")
    assert [row["name"] for row in found["variants"]] == ["full attention", "no diagonal", "random drop 1",
                                                          "random drop 2"]  # fmt: skip
    assert all(len(row["losses"]) == 2 for row in found["variants"])
    assert found["dropped_share"] == 1 / 32
    full, without, one, two = (row["losses"] for row in found["variants"])
    assert len({json.dumps(losses) for losses in (full, without, one, two)}) == 4
    assert found["differences"]["no_diagonal"]["mean"] == pytest.approx(np.mean(np.subtract(without, full)))
    random = np.mean([one, two], 0) - full
    assert found["differences"]["random"]["mean"] == pytest.approx(np.mean(random))
    assert found["differences"]["random"]["pairs"] == 2
    assert found["variants"][0]["dropped"] == 0.0
    diagonal = read_json(finished / "importance.json")["pairs"]["diagonal"]
    assert found["variants"][1]["dropped"] == pytest.approx(diagonal)


def test_one_map_for_each_head_of_each_layer(inputs: dict[str, Path], tmp_path: Path):
    headline = build(inputs, tmp_path, share="none")
    found = read_json(tmp_path / "importance.json")
    assert found["rows"] == [[0, 1], [2, 3]]
    assert len(found["maps"]) == 4
    assert headline["diagonal"] == found["groups"]["diagonal"]
    assert not (tmp_path / "results.json").exists()


def test_a_study_that_was_killed_goes_on(
    inputs: dict[str, Path], finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    real, asked = short.score, []

    def score(task: dict[str, Any]) -> Any:
        asked.append((task["seed"], task["arch"]))
        if len(asked) == 4:
            raise Stopped(15)
        return real(task)

    score.__module__, score.__qualname__ = real.__module__, real.__qualname__
    monkeypatch.setattr(short, "score", score)
    with pytest.raises(Stopped):
        build(inputs, tmp_path, study=STUDY, controls=2)
    assert not (tmp_path / "results.json").exists()
    build(inputs, tmp_path, study=STUDY, controls=2)
    assert len(asked) == 9
    assert asked[3] == asked[4]
    assert len(set(asked)) == 8
    for name in ("results.json", "importance.json"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_sentences_name_the_section_that_was_written(inputs: dict[str, Path], tmp_path: Path):
    with pytest.raises(ValueError, match=r"^importance.arch knows 16 positions"):
        build(inputs, tmp_path, arch="bert 1x16 heads=2 ffn=16 max_length=16")


@pytest.mark.parametrize(("values", "said"), [
    ({"study": STUDY | {"recipes": [{"learning_rate": 0.1}, {"learning_rate": 0.2}]}}, "write one in study.recipes"),
    ({"controls": 3}, "controls belong to study"),
    ({"arch": "from attention"}, "importance looks at dense attention"),
    ({"start": "from search"}, "needs arch: from search"),
])  # fmt: skip
def test_contradictions_are_refused(values: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        section(**values)


def test_it_needs_shards():
    with pytest.raises(ValueError, match="importance needs the section tokenizer"):
        Config.model_validate({"name": "a", "importance": {"budget": "1steps"}})
