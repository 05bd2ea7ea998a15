"""What the README prints is run: every command at toy size in a folder of its own, in the order of the page.

`make quickstart` itself takes a quarter of an hour; here its recipe is looked at, and the command in it is run on the
shipped YAML with every size cut down, and with a stand-in for the clock that times architectures for minutes.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from frugalbert.cli import app
from frugalbert.measure import table
from frugalbert.yamlfile import parse, validate
from tests.finetune.golden import files
from tests.search_project import fake_timing
from tests.structure import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
# The shipped quickstart at toy size: same sections, same kinds of values.
TINY = {
    "machine": {"device": "cpu", "threads": 1, "workers": 1, "compile": False},
    "corpus": {"sources": [{"path": "python-docs", "max_documents": 1500}]},
    "tokenizer": {"vocab_size": 512},
    "space": {"depth": [1, 2], "hidden": [16, 32], "heads": [1, 2], "head_dim": 8, "ffn": [16, 32, 48]},
    "supernet": {"budget": "6steps", "batch_size": 8, "validation": {"rows": 16}},
    "latency": {"architectures": 12, "length": 16},
    "search": {"limit": {"speedup": 1.2}, "evaluations": 4, "population": 4, "rows": 16},
    "pretrain": {"budget": "6steps", "batch_size": 8, "validation": {"rows": 16}},
    "finetune": {"seeds": [0], "epochs": 1.0, "max_train_examples": 64},
    "bench": {"lengths": [16], "batch_sizes": [1], "repeats": 2, "baseline": "none"},
}


def blocks(language: str, page: str = README) -> list[str]:
    found = re.findall(r"^```(.*?)\n(.*?)^```$", page, flags=re.S | re.M)
    return [text for name, text in found if name == language]


def lines(page: str = README) -> list[list[str]]:
    return [shlex.split(line) for block in blocks("sh", page) for line in block.splitlines() if line.strip()]


def make(*arguments: str) -> str:
    """What make would do (`-n`: nothing is run), with an environment that counts as installed."""
    result = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the shipped quickstart cut down; the commands of the page fill `runs/` in it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").mkdir()
    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    for section, values in TINY.items():
        config[section] = {**(config.get(section) or {}), **values}
    (folder / "configs" / "quickstart.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    predicted = folder / "runs" / "glue" / "finetune" / "wnli" / "test"
    predicted.mkdir(parents=True)
    lines = [{"index": number, "id": str(number), "prediction": "entailment"} for number in range(146)]
    (predicted / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (predicted / "model.json").write_text('{"identity": "a model", "task": "wnli"}')
    files.write(folder / "data")
    (folder / "data" / "blimp").mkdir()
    pair = {"sentence_good": "The cat sleeps.", "sentence_bad": "The cat sleep.", "field": "syntax", "UID": "agreement",
            "linguistics_term": "agreement", "pairID": "0"}  # fmt: skip
    (folder / "data" / "blimp" / "agreement.jsonl").write_text(json.dumps(pair) + "\n")
    shutil.copy(ROOT / "tests" / "golden" / "grid.yaml", folder / "grid.yaml")
    return folder


def frugalbert(words: list[str], folder: Path, patch: pytest.MonkeyPatch) -> str:
    """Run a command line in `folder` and return its output."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)}
    patch.chdir(folder)
    patch.setattr(table, "time_apart", fake_timing)
    try:
        result = CliRunner().invoke(app, words)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert result.exit_code == 0, result.output
    return result.stdout


def at_toy_size(words: list[str]) -> list[str]:
    """The same command for seconds: longer runs planned, a rehearsal without its end, no BERT-base, one GLUE task."""
    if words[0] == "run" and any(word.startswith("pretrain.budget=") for word in words):
        return ["plan", *words[1:]]
    if "--rehearse" in words:
        return [*words, "finetune=null", "export=null", "bench=null", "report=null"]
    if words[0] == "submit":
        return [*words, "--partial"]
    if words[0] == "eval":
        few = ["wnli,superglue,blimp" if "blimp" in word else word for word in words]
        return [*few, "seeds=[0]", "epochs=1.0", "max_length=32", "random_baseline=false", "machine.threads=1"]
    return [*words, "baseline=none"] if words[0] == "bench" and "--profile" not in words else words


def test_the_commands_of_the_page_run(world: Path, monkeypatch: pytest.MonkeyPatch):
    """In order, as a reader would type them: plan, run, what came out, the other verbs."""
    verbs = set()
    for words in lines():
        if words[0] == "frugalbert":
            verbs.add(words[1])
            assert frugalbert(at_toy_size(words[1:]), world, monkeypatch).strip(), words
    assert verbs == {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    _has_what_the_page_lists(world)
    for code in blocks("python"):
        monkeypatch.chdir(world)
        exec(code, {})  # the page's own code
    assert "mask" in frugalbert(["explain", "pretrain.mask"], world, monkeypatch)


def _has_what_the_page_lists(world: Path) -> None:
    listing = next(block for block in blocks("") if block.startswith("runs/quickstart/"))
    directories = re.findall(r"^  ([a-z]+)/ ", listing, flags=re.M)
    assert len(directories) == 12
    for name in directories:
        assert (world / "runs" / "quickstart" / name / "stage.json").is_file(), name
    html = (world / "runs" / "quickstart" / "report" / "report.html").read_text(encoding="utf-8")
    assert "Quickstart" in html


def test_the_yaml_of_the_page_is_valid():
    found = [validate(parse(text, "README"), (), "README") for text in blocks("yaml")]
    assert [config.name for config in found] == [
        "my-encoder",
        "eight-milliseconds",
        "extracted",
        "student",
        "judged",
        "sparse",
    ]


def test_make_commands_do_what_the_page_says(tmp_path: Path):
    (tmp_path / ".installed").touch()
    (tmp_path / "bin").mkdir()
    targets = [
        words[1]
        for page in (README, (ROOT / "CONTRIBUTING.md").read_text())
        for words in lines(page)
        if words[0] == "make"
    ]
    assert set(targets) >= {"quickstart", "test", "bench", "torture"}
    for target in targets:
        assert make(target, f"VENV={tmp_path}").strip(), target
    assert "frugalbert run configs/quickstart.yaml" in make("quickstart", f"VENV={tmp_path}")
    tests = make("test", f"VENV={tmp_path}")
    assert all(tool in tests for tool in ("ruff check", "ruff format --check", "pyright", "pytest"))
    assert make("check", f"VENV={tmp_path}") == tests


def test_make_alone_lists_every_target():
    makefile = (ROOT / "Makefile").read_text()
    shown = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60).stdout
    targets = re.search(r"^\.PHONY: (.*)$", makefile, flags=re.M)
    assert targets is not None
    assert [target for target in targets[1].split() if f"make {target} " not in shown] == []


def test_an_old_python_is_refused_in_one_sentence(tmp_path: Path):
    old = tmp_path / "python2.7"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    arguments = ["make", "install", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "needs Python 3.11 or newer" in result.stderr
    assert not (tmp_path / "venv").exists()


def test_ci_runs_the_command_of_the_page():
    script = (ROOT / ".ci" / "run").read_text()
    assert "make test" in script
    assert ["make", "test"] in lines()


def test_extras_of_the_page_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = set(project["optional-dependencies"])
    assert extras >= {"onnx", "sweeps", "cluster", "dedup", "trackers", "dev"}
    named = {name for extra in re.findall(r"\.\[([a-z,]+)\]", README) for name in extra.split(",")}
    assert named
    assert named <= extras


def test_pinned_versions_fit_the_declared_ranges():
    """constraints.txt pins every direct dependency of the tested installation, within the range of pyproject.toml."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line]
    pinned = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert pinned["torch"] == "2.13.0"
    tested = ("dev", "onnx", "cluster", "dedup", "wikipedia", "hdf5")
    extras = [item for extra in tested for item in project["optional-dependencies"][extra]]
    for text in [*project["dependencies"], *extras]:
        need = Requirement(text)
        if need.name == "frugalbert":
            continue  # an extra that holds another
        assert need.specifier.contains(pinned[canonicalize_name(need.name)]), text
