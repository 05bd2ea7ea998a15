"""What importing costs: every module with the core dependencies alone, and the quick verbs without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.structure import ROOT, sources

EXTRAS = (
    "onnx", "onnxscript", "onnxruntime", "optuna", "distributed", "dask", "datasketch", "tensorboard", "wandb",
    "trackio", "mlflow", "pytest", "hypothesis", "zstandard",
)  # fmt: skip
HEAVY = (
    "torch",
    "transformers",
    "tokenizers",
    "accelerate",
    "datasets",
    "sklearn",
    "scipy",
    "matplotlib",
    "numpy",
    "pyarrow",
)
# A module that is None in sys.modules cannot be imported, and packages that only ask whether it is there get "no".
BLOCK = "import sys, importlib\nfor name in {blocked!r}: sys.modules[name] = None\n"


def python(code: str, *arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=cwd, timeout=300
    )


def loaded(code: str, *arguments: str, cwd: Path = ROOT) -> set[str]:
    """Which heavy packages are in memory after `code` has run in a process of its own."""
    tail = f"\nimport json, sys\nprint('\\n' + json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    result = python(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n" + code + tail, *arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return set(json.loads(result.stdout.strip().splitlines()[-1]))


def command(*arguments: str) -> tuple[str, ...]:
    """Code and arguments that run the command line in the same process and then go on."""
    code = "from frugalbert.cli import main\ntry: main()\nexcept SystemExit as end: assert not end.code, end.code\n"
    return (code, *arguments)


def test_every_module_imports_with_the_core_alone():
    code = BLOCK.format(blocked=EXTRAS) + "for name in sys.argv[1:]: importlib.import_module(name)"
    result = python(code, *sources())
    assert result.returncode == 0, result.stderr


def test_importing_the_package_loads_nothing():
    assert loaded("import frugalbert") == set()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("plan", "--help"),
        ("explain",),
        ("explain", "pretrain.mask"),
        ("explain", "arch"),
        ("explain", "curves"),
        ("explain", "--schema"),
        ("plan", str(ROOT / "configs" / "compact-30m-cpu.yaml")),
        ("plan", str(ROOT / "configs" / "academic-24h.yaml"), "pretrain.budget=12h"),
    ],
    ids=" ".join,
)
def test_quick_verbs_load_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path):
    assert loaded(*command(*arguments), cwd=tmp_path) == set()


def test_planning_a_search_counts_with_numpy_alone(tmp_path: Path):
    text = "{name: a, corpus: {sources: [x]}, tokenizer: {}, space: {depth: [1, 2], hidden: 64, heads: 2, head_dim: 32"
    (tmp_path / "a.yaml").write_text(
        f"{text}, ffn: 64..256/64}}, shards: {{}}, supernet: {{budget: 1h}}, latency: {{}}}}"
    )
    assert loaded(*command("plan", "a.yaml"), cwd=tmp_path) == {"numpy"}


def test_the_check_can_fail():
    assert loaded("import numpy") == {"numpy"}
