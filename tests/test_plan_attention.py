"""What a plan says of sparse attention and of importance, before and after the stages have run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from frugalbert import plan
from frugalbert.config import Config
from frugalbert.model.arch import Arch
from frugalbert.model.backends import LEAST_LENGTH, choose
from frugalbert.model.cost import attention_share
from frugalbert.model.patterns import density, occupancy
from frugalbert.run import write_json

DENSE = "modern 3x64 heads=2 ffn=128 max_length=1024"
YAML: dict[str, Any] = {
    "name": "sparse", "machine": {"device": "cpu"}, "corpus": {"sources": ["a.txt"]}, "tokenizer": {"vocab_size": 2048},
    "shards": {"length": 1024},
    "attention": {"arch": DENSE, "budget": "1e6tok", "density": 0.12, "structure": "block-toeplitz"},
    "pretrain": {"budget": "1e6tok", "arch": "from attention"},
}  # fmt: skip


def said(folder: Path, **sections: Any) -> dict[str, str]:
    rows = plan.rows(Config.model_validate(YAML | sections), folder / "run", folder)
    return {name: text for name, _, text in rows}


def ran(folder: Path, *patterns: str) -> None:
    """As if the stage attention had found these patterns."""
    arch = Arch.parse(DENSE.replace(" max", f" pattern={','.join(patterns)} max"))
    out = folder / "run" / "attention"
    out.mkdir(parents=True)
    write_json(out / "arch.json", arch.to_json())
    record = {"stage": "attention", "section": {}, "inputs": {}, "fingerprint": "x", "seconds": 1.0}
    write_json(out / "stage.json", record | {"metrics": {"density": 0.1}})


def test_before_the_stage_only_the_target_is_known(tmp_path: Path):
    rows = said(tmp_path)
    share = attention_share(Arch.parse(DENSE), 1024)
    assert "block-toeplitz masks for 12.0% of pairs, known when the stage has run" in rows["attention"]
    bound = (
        f"attention is {share:.0%} of a dense encoder's work at 1024 tokens, so leaving out all of it makes it at most "
    )
    assert bound + f"{1 / (1 - share):.2f} times as fast" in rows["attention"]
    assert rows["pretrain"].startswith(f"from attention, {DENSE}, ")
    assert "of pairs" not in rows["pretrain"]
    priced = YAML["attention"] | {"structure": "toeplitz-priced"}
    assert "masks for 12.0% of blocks" in said(tmp_path, attention=priced)["attention"]
    free = {key: value for key, value in YAML["attention"].items() if key != "density"} | {"penalty": 0.1}
    assert "masks for a density that the penalty decides" in said(tmp_path, attention=free)["attention"]


def test_with_patterns_the_figures_are_theirs(tmp_path: Path):
    """Written in the YAML, and as the stage has left them: the same sentence."""
    texts = ["window:64", "toeplitz:0..3+900", "window:64"]
    arch = DENSE.replace(" max", f" pattern={','.join(texts)} max")
    own = said(tmp_path, pretrain={"budget": "1e6tok", "arch": arch})["pretrain"]
    kept, blocks = (sum(found) / 3 for found in (
        [density(text, 1024) for text in texts], [occupancy(text, 1024, 64) for text in texts]))  # fmt: skip
    share = attention_share(Arch.parse(DENSE), 1024)
    assert f"attention {kept:.1%} of pairs, {blocks:.0%} of 64 x 64 blocks; " in own
    assert f"with these blocks {1 / (1 - share + share * blocks):.2f}; on cpu it runs as " in own
    for text, layers in (("window:64", 2), ("toeplitz:0..3+900", 1)):
        backend, why = choose(text, 1024, "cpu", training=True, packed=True)
        assert f"{backend} ({why}) in {layers} layers" in own
    ran(tmp_path, *texts)
    found = said(tmp_path)["pretrain"]
    assert found.startswith(arch.split(" pattern")[0])
    assert found.split("; ")[1:] == own.split("; ")[1:]


def test_short_rows_are_not_promised_anything(tmp_path: Path):
    arch = DENSE.replace(" max", " pattern=window:8 max")
    sections = {"shards": {"length": 128}, "attention": YAML["attention"] | {"structure": "toeplitz"}}
    text = said(tmp_path, **sections, pretrain={"budget": "1e6tok", "arch": arch})["pretrain"]
    assert f"on cpu it runs as sdpa (skipping pays from {LEAST_LENGTH['cpu']} tokens on)" in text


def test_dropout_and_documents_decide_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[dict[str, bool]] = []
    monkeypatch.setattr("frugalbert.model.cost.choose", lambda *_, **given: asked.append(given) or ("sdpa", "so"))
    arch = DENSE.replace(" max", " pattern=window:8 max")
    for values in ({}, {"dropout": 0.1}, {"isolate_documents": False}):
        said(tmp_path, pretrain={"budget": "1e6tok", "arch": arch} | values)
    fields = ("packed", "dropout")
    assert [tuple(one[name] for name in fields) for one in asked[::3]] == [(True, False), (True, True), (False, False)]


def test_patterns_that_end_before_the_rows_are_refused_at_once(tmp_path: Path):
    arch = DENSE.replace(" max", " pattern=block:64/2/eJxrAAAAgQCB max")
    with pytest.raises(ValueError, match="defined for up to 128 tokens"):
        said(tmp_path, pretrain={"budget": "1e6tok", "arch": arch})


def test_the_study_is_counted(tmp_path: Path):
    study = {"steps": 100, "seeds": [0, 1], "recipes": {"learning_rate": 1e-3, "batch_size": 16}}
    section = {"arch": DENSE, "budget": "1e6tok"}
    without = said(tmp_path, importance=section)["importance"]
    assert without.startswith(DENSE)
    assert "soft masks" in without
    assert "study" not in without
    with_it = said(tmp_path, importance=section | {"study": study, "controls": 3})["importance"]
    assert with_it.startswith(without)
    assert "study of full, no diagonal and 3 random drops with 2 seeds: 10 trainings of 100 steps, 16.4M tok" in with_it
