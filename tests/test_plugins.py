"""Code named in a YAML: only `file.py:function` below the YAML's folder, and its file's hash changes with it."""

from __future__ import annotations

from pathlib import Path

import pytest

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


def test_only_a_file_is_a_plugin():
    assert is_plugin("mine.py:f")
    assert not any(map(is_plugin, ("adamw", "os:system", "linear")))
