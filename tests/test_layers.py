"""Imports point one way: cli over stages over the working packages over config, run and the architecture.

The table is the design's "who may import whom"; a new row or entry needs a reason in docs/LOG.md.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.structure import imports, path_of, sources

# A unit is a module or sub-package directly below frugalbert; "model.arch" and the like open one module of a package.
ALLOWED = {
    "cli": {
        "config", "doctor", "explain", "finetune", "grid", "measure", "plan", "progress", "rehearsal", "report", "run",
        "stages", "yamlfile",
    },
    "stages": {
        "budget", "config", "data", "dist", "fanout", "finetune", "lock", "measure", "model", "plugins", "progress",
        "report", "run", "search", "sizing", "space", "train", "yamlfile",
    },
    "selection": {
        "budget", "config", "data", "dist", "fanout", "finetune", "measure", "model", "progress", "run", "search",
        "space", "train",
    },
    "rehearsal": {"config", "space"},
    "doctor": {"config", "data", "dist", "fanout", "lock", "progress", "run", "stages", "train"},
    "sizing": {
        "budget", "config", "dist", "measure", "model.arch", "model.cost", "plan_training", "progress", "run", "train",
    },
    "plan": {
        "config", "model.arch", "model.cost", "plan_attention", "plan_teacher", "plan_training", "progress", "run",
        "sizing", "space", "stages", "train.phases", "yamlfile",
    },
    "plan_attention": {
        "config", "model.arch", "model.cost", "plan_training", "progress",
        "train.phases",
    },
    "plan_training": {"budget", "config", "progress", "run", "train.phases"},
    "plan_teacher": {"config", "data.slots", "model.arch", "model.cost", "progress", "run"},
    "explain": {
        "budget", "config", "model.arch", "model.cost", "model.patterns", "plugins", "progress", "train.curves",
    },
    "report": {"progress", "run"},
    "finetune": {
        "budget", "config", "data", "dist", "fanout", "loading", "lock", "model", "plugins", "progress", "run", "train",
    },
    "measure": {"budget", "config", "data", "dist", "fanout", "loading", "model", "progress", "run", "space", "train"},
    "search": {"budget", "config", "data", "dist", "fanout", "model", "progress", "run", "space", "train"},
    "train": {
        "budget", "config", "data", "dist", "loading", "model", "plugins", "progress", "run", "space", "trackers",
    },
    "data": {"config", "dist", "fanout", "progress", "run"},
    "yamlfile": {"config"},
    "grid": {"run", "yamlfile"},
    "space": {"config", "model.arch", "model.cost"},
    "config": {"budget", "model.arch"},
    "dist": {"progress", "run"},
    "fanout": {"progress", "run"},
    "plugins": {"run"},
    "run": {"progress"},
    "lock": set(),
    "loading": {"progress"},
    "trackers": {"run"},
    "progress": set(),
    "budget": set(),
    "model": set(),  # itself only: it ships inside a checkpoint
}  # fmt: skip
# cli and stages join parts whose imports cost seconds: everything but these only inside functions.
QUICK = {
    "budget",
    "config",
    "doctor",
    "explain",
    "lock",
    "plan",
    "plugins",
    "progress",
    "rehearsal",
    "run",
    "selection",
    "sizing",
    "space",
    "stages",
    "yamlfile",
}
# Foreign packages that one module alone may touch.
ONLY_IN = {
    "accelerate": {"dist", "trackers"}, "torch.distributed": {"dist"}, "distributed": {"fanout"},
    "dask": {"fanout"},
}  # fmt: skip
NEVER_IN_REPORT = {"torch", "transformers", "accelerate", "datasets"}


def unit(module: str) -> str:
    return module.split(".")[1] if "." in module else "frugalbert"


def faults(texts: dict[str, str]) -> Iterator[str]:
    modules = set(texts)
    for module, text in texts.items():
        own = unit(module)
        if own == "frugalbert":
            continue  # the lazy __init__ imports nothing of ours; tests/test_imports.py proves it
        for found in imports(module, text, modules):
            where = f"{path_of(module)}:{found.line}"
            yield from _foreign(own, found.module, where)
            if found.module.split(".")[0] != "frugalbert":
                continue
            other = unit(found.module)
            if own == "model" and not found.relative:
                yield f"{where}: model ships inside a checkpoint and imports relatively, not {found.module}"
            if other in (own, "frugalbert"):
                continue
            inner = ".".join(found.module.split(".")[1:3])
            if other not in ALLOWED[own] and inner not in ALLOWED[own]:
                yield f"{where}: {own} may not import {found.module}"
            if own in ("cli", "stages") and not found.in_function and other not in QUICK:
                yield f"{where}: {own} imports {found.module} at its top; put it into the function"


def _foreign(own: str, name: str, where: str) -> Iterator[str]:
    for package, units in ONLY_IN.items():
        if (name == package or name.startswith(package + ".")) and own not in units:
            yield f"{where}: only {', '.join(sorted(units))} touches {package}"
    if own == "report" and name.split(".")[0] in NEVER_IN_REPORT:
        yield f"{where}: report reads files only, never {name}"


def circles(texts: dict[str, str]) -> list[list[str]]:
    """Groups of modules that import each other, also through functions; typing-only imports do not count."""
    modules = set(texts)
    graph = {
        module: {found.module for found in imports(module, text, modules) if not found.typing_only} & modules - {module}
        for module, text in texts.items()
    }
    reach = {module: set(targets) for module, targets in graph.items()}
    changed = True
    while changed:
        changed = False
        for targets in reach.values():
            more = set().union(*(reach[target] for target in targets)) - targets if targets else set()
            targets |= more
            changed = changed or bool(more)
    return sorted({tuple(sorted(m for m in reach[n] if n in reach[m] | {m})) for n in reach if n in reach[n]})


def test_imports_point_one_way():
    assert "\n".join(faults(sources())) == ""


def test_every_unit_has_a_row():
    units = {unit(module) for module in sources()} - {"frugalbert"}
    assert units - set(ALLOWED) == set()


def test_no_import_circle():
    assert circles(sources()) == []


def test_the_checks_can_fail():
    bad = {
        "frugalbert": "",
        "frugalbert.run": "def f():\n    from frugalbert.data import corpus\n",
        "frugalbert.data": "",
        "frugalbert.data.corpus": "import frugalbert.run\nimport accelerate\n",
        "frugalbert.model": "",
        "frugalbert.model.arch": "from frugalbert.model import cost\n",
        "frugalbert.model.cost": "from .arch import Arch\n",
        "frugalbert.config": "from frugalbert.model.cost import parameter_count\n",
        "frugalbert.stages": "from frugalbert.data import corpus\n",
        "frugalbert.report": "import torch\n",
    }
    assert [line.split(": ", 1)[1] for line in faults(bad)] == [
        "run may not import frugalbert.data.corpus",
        "only dist, trackers touches accelerate",
        "model ships inside a checkpoint and imports relatively, not frugalbert.model.cost",
        "config may not import frugalbert.model.cost",
        "stages imports frugalbert.data.corpus at its top; put it into the function",
        "report reads files only, never torch",
    ]
    assert circles(bad) == [
        ("frugalbert.data.corpus", "frugalbert.run"),
        ("frugalbert.model.arch", "frugalbert.model.cost"),
    ]


def test_foreign_imports_are_declared():
    """Every package that is imported stands in pyproject.toml, so that a clean installation has it."""
    declared = {
        "torch", "transformers", "tokenizers", "safetensors", "accelerate", "datasets", "huggingface_hub", "numpy",
        "packaging", "pyarrow", "xxhash", "pydantic", "yaml", "typer", "rich", "sklearn", "scipy", "jinja2",
        "matplotlib", "onnx", "onnxscript", "onnxruntime", "optuna", "distributed", "datasketch", "mwparserfromhell",
        "h5py",
    }  # fmt: skip
    texts = sources()
    modules = set(texts)
    found = {
        (name, path_of(module))
        for module, text in texts.items()
        for name in [item.module.split(".")[0] for item in imports(module, text, modules)]
        if name not in sys.stdlib_module_names | declared | {"frugalbert"}
    }
    assert found == set()
