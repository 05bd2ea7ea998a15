"""Whoever trains says so: messages and errors name the stage that is at work, and keys of its section."""

from __future__ import annotations

from pathlib import Path

import pytest

from frugalbert.config import Machine, Pretrain, Supernet
from frugalbert.train import pretrain, step
from tests.train import toy


@pytest.mark.parametrize("stage", ["pretrain", "supernet"])
def test_the_loop_names_its_stage(stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = toy.go(tmp_path / stage)
    sentence = step._sentence(run, "loss nan")
    assert sentence.startswith(f"{stage} cannot go on at step 20: loss nan; lower {stage}.learning_rate, set {stage}.c")
    run.state.micro_batch = 1
    with pytest.raises(ValueError, match="choose a smaller (space|pretrain.arch)$") as error:
        step.halve(run)
    assert ("space" in str(error.value)) == (stage == "supernet")
    capsys.readouterr()
    toy.go(tmp_path / stage)
    assert f"{stage}: continuing at step 20" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [Pretrain, Supernet])
@pytest.mark.parametrize(
    ("wrong", "key"), [({"curve": "nope"}, "curve:"), ({"optimizer_options": {"x": 1}}, "optimizer_options")]
)
def test_errors_about_settings_name_their_section(
    kind: type[Pretrain | Supernet], wrong: dict[str, object], key: str, tmp_path: Path
):
    section = kind.model_validate({"budget": "4steps", **wrong})
    with pytest.raises(ValueError, match=rf"^{kind.__name__.lower()}\.{key}"), pretrain.keys_of(section):
        pretrain.check(section, Machine(), tmp_path)
    with pytest.raises(ValueError, match=r"^my-pretrain\.py has no f$"), pretrain.keys_of(section):
        raise ValueError("my-pretrain.py has no f")
