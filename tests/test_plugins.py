"""Code named in a YAML: `file.py:function` below the YAML's folder, or what an installed package registers; no other.

Both belong to the identity of the stage that uses them.
"""

from __future__ import annotations

import importlib
import json
import random
import re
import sys
from pathlib import Path

import pytest

from frugalbert import explain, stages
from frugalbert.plugins import is_plugin, load_plugin, plugin_digest
from frugalbert.train.curves import curve


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    inside = tmp_path / "configs"
    (inside / "deep").mkdir(parents=True)
    (inside / "mine.py").write_text("def half(x, low: float = 0.5): return max(low, 1 - x)\nvalue = 3\n")
    (inside / "deep" / "mine.py").write_text("def f(x): return 1.0\n")
    (inside / "broken.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "outside.py").write_text("raise SystemExit('imported')\n")
    (inside / "link.py").symlink_to(tmp_path / "outside.py")
    return inside


def test_a_users_own_curve(folder: Path):
    assert curve("mine.py:half", {}, folder)(0.9) == 0.5
    assert curve("mine.py:half", {"low": 0.2}, folder)(0.7) == pytest.approx(0.3)
    assert curve("deep/mine.py:f", None, folder)(0.7) == 1.0
    with pytest.raises(ValueError, match="did you mean low"):
        curve("mine.py:half", {"lov": 0.2}, folder)


def test_the_digest_follows_the_file(folder: Path):
    before = plugin_digest("mine.py:half", folder)
    assert plugin_digest("mine.py:value", folder) == before
    (folder / "mine.py").write_text("def half(x): return 1.0\n")
    assert plugin_digest("mine.py:half", folder) != before


@pytest.mark.fault("S9")
@pytest.mark.parametrize(
    "spec",
    [
        "../outside.py:f", "/etc/passwd.py:f", "link.py:f", "deep/../../outside.py:f", "mine.py:os.system",
        "mine.py:f()", "mine.py:__import__('os')", "mine.py:", "mine.py:1f", "mine.py: f", "mine.py:value",
        "mine.py:absent", "broken.py:f", "absent.py:f", "deep:f", "os:system", "mine:f", "logging.os.system",
        "mine.pyc:f", "m\0.py:f",
    ],
)  # fmt: skip
def test_nothing_else_is_code(folder: Path, spec: str):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        load_plugin(spec, folder)
    assert "\n" not in str(error.value)


@pytest.mark.fault("S9")
def test_only_a_file_is_a_plugin():
    assert is_plugin("mine.py:f")
    assert not any(map(is_plugin, ("adamw", "os:system", "linear")))


# ---- registered by an installed package ------------------------------------------------------------------------------

LIBRARY = """
import torch

def signs(groups, learning_rate, strength: float = 1.0):
    return torch.optim.SGD([{**group, "lr": learning_rate * strength} for group in groups])

def stairs(x, height: float = 0.5):
    return 1.0 if x < 0.5 else height
"""
POINTS = """
[frugalbert.optimizers]
signs = signlib:signs

[frugalbert.curves]
stairs = signlib:stairs
linear = signlib:stairs
gone = signlib:absent
"""


def install(site: Path, package: str = "signlib", version: str = "1.2", points: str = POINTS) -> None:
    (site / "signlib.py").write_text(LIBRARY)
    folder = site / f"{package}-{version}.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
    (folder / "entry_points.txt").write_text(points)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A place on sys.path with a package that registers an optimizer and curves."""
    place = tmp_path / "site"
    place.mkdir()
    install(place)
    monkeypatch.syspath_prepend(place)
    monkeypatch.delitem(sys.modules, "signlib", raising=False)
    return place


def test_registered_curves(site: Path):
    assert curve("stairs", {"height": 0.25})(0.7) == 0.25
    assert curve("linear")(0.25) == 0.75  # what is built in cannot be replaced
    for name, options, words in (
        ("stairs", {"hight": 0.2}, "did you mean height"),
        ("stair", {}, "did you mean stairs"),
        ("nothing_like_it", {}, "eigencurve, gone, linear, stairs, or file.py:function"),
        ("gone", {}, "gone of signlib 1.2 (signlib:absent) cannot be imported"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            curve(name, options)
    install(site, "other")
    with pytest.raises(ValueError, match="signlib 1.2 .* and other 1.2|other 1.2 .* and signlib 1.2"):
        curve("stairs")


def test_registered_curves_are_explained_but_not_documented(site: Path):
    assert "Registered by signlib 1.2 (signlib:stairs)." in explain.explain("curves")
    assert "signlib" not in str(explain.curves().rows)


YAML = """
name: own
machine: {device: cpu, threads: 1, workers: 1, micro_batch: 8}
corpus: {sources: [texts.txt], held_out: 0.1}
tokenizer: {vocab_size: 128, min_frequency: 1}
shards: {length: 32}
pretrain:
  arch: modern 1x16 heads=1 ffn=16 max_length=32
  budget: 10steps
  batch_size: 4
  warmup: 0.0
  learning_rate: 0.01
  optimizer: signs
  optimizer_options: {strength: 2}
  curve: mine.conf
  validation: {rows: 4, every: 0, begin_every: 0, end_every: 0}
"""


def documents() -> list[str]:
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 7))) for _ in range(150)]
    return [" ".join(rng.choices(words, k=30)) for _ in range(60)]


def test_from_the_yaml_to_the_learning_rate(site: Path, tmp_path: Path):
    """A registered optimizer and ExtremeBERT's file drive a training; both belong to the stage's identity."""
    (tmp_path / "texts.txt").write_text("\n\n".join(documents()))
    (tmp_path / "mine.conf").write_text(
        "[general]\ntype=exponential_decay\n[hyperparams]\ndecay_step=2\ndecay_rate=0.5"
    )
    (tmp_path / "own.yaml").write_text(YAML)
    stages.run_file(tmp_path / "own.yaml", directory=tmp_path / "run")
    lines = [json.loads(line) for line in (tmp_path / "run" / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    rates = [line["learning_rate"] for line in lines if "learning_rate" in line]
    assert rates == pytest.approx([0.02 * 0.5 ** (step / 2) for step in range(10)])
    assert "0.02" in (tmp_path / "run" / "pretrain" / "parameters.txt").read_text()
    assert stages.run_file(tmp_path / "own.yaml", directory=tmp_path / "run")  # skipped: nothing has changed
    (site / "signlib-1.2.dist-info").rename(site / "signlib-1.3.dist-info")
    metadata = site / "signlib-1.3.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.2", "1.3"))
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"signlib 1\.2"):
        stages.run_file(tmp_path / "own.yaml", directory=tmp_path / "run")
    (site / "signlib-1.3.dist-info").rename(site / "signlib-1.2.dist-info")
    (site / "signlib-1.2.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: signlib\nVersion: 1.2\n")
    (tmp_path / "mine.conf").write_text("[general]\ntype = linear_decay\n")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match=r"mine\.conf"):
        stages.run_file(tmp_path / "own.yaml", directory=tmp_path / "run")
