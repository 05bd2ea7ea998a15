"""No way in the package's code to run code from a file: the gate over its syntax trees (design rule S2)."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from tests.structure import path_of, sources

FORBIDDEN_CALLS = {
    "eval", "exec", "compile", "__import__", "os.system", "os.popen", "pickle.load", "pickle.loads", "pickle.Unpickler",
    "cloudpickle.load", "cloudpickle.loads", "dill.load", "dill.loads", "joblib.load", "marshal.load", "marshal.loads",
    "shelve.open", "yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load",
    "torch.hub.load",
    "pandas.read_pickle", "tarfile.TarFile.extractall",
}  # fmt: skip
FORBIDDEN_METHODS = {"extractall", "unpack_archive", "register_for_checkpointing", "save_state", "load_state"}
PARTS = {"AutoConfig", "AutoTokenizer"}
"""What a model's directory has beside weights; those come in through `load_weights` alone."""
# Calls that look forbidden and are not, each with its reason.
EXCEPTIONS = {"frugalbert/loading.py: loads weights by owner.from_pretrained": "the one way in, with its own options"}


def faults(module: str, source: str) -> Iterator[str]:
    tree = ast.parse(source)
    names = dict(_aliases(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            fault = _fault(node, names)
            if fault and f"{path_of(module)}: {fault}" not in EXCEPTIONS:
                yield f"{path_of(module)}:{node.lineno}: {fault}"
        for name in _imported(node):
            if name.split(".")[0] in {"pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}:
                yield f"{path_of(module)}:{node.lineno}: imports {name}"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [name.name for name in node.names]
    return [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []


def _aliases(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """What a local name stands for: `import numpy as np` -> np: numpy; `from torch import load` -> load: torch.load."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((name.asname, name.name) for name in node.names if name.asname)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield from ((name.asname or name.name, f"{node.module}.{name.name}") for name in node.names)


def _dotted(node: ast.AST, names: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, names)}.{node.attr}"
    return names.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def _fault(call: ast.Call, names: dict[str, str]) -> str | None:
    name = _dotted(call.func, names)
    given = {keyword.arg: keyword.value for keyword in call.keywords}

    def is_true(argument: str) -> bool:
        return isinstance(given.get(argument), ast.Constant) and given[argument].value is True

    if name in FORBIDDEN_CALLS or (isinstance(call.func, ast.Attribute) and call.func.attr in FORBIDDEN_METHODS):
        return f"calls {name}"
    if name == "torch.load" and not is_true("weights_only"):
        return "calls torch.load without weights_only=True"
    if "allow_pickle" in given and not (
        isinstance(given["allow_pickle"], ast.Constant) and not given["allow_pickle"].value
    ):
        return f"calls {name} with allow_pickle"
    if "shell" in given and not (isinstance(given["shell"], ast.Constant) and given["shell"].value is False):
        return f"calls {name} with shell"
    if name.endswith(".from_pretrained") and not (call.args and isinstance(call.args[0], ast.Constant)):
        owner = name.split(".")[-2]
        if owner not in PARTS and not (is_true("use_safetensors") and "trust_remote_code" in given):
            return f"loads weights by {name}"
    if is_true("trust_remote_code"):
        return f"calls {name} with trust_remote_code=True written into the code"
    return None


@pytest.mark.fault("S2")
def test_no_way_to_run_code_from_a_file():
    assert "\n".join(fault for module, text in sources().items() for fault in faults(module, text)) == ""


@pytest.mark.fault("S2")
def test_the_gate_can_fail():
    source = """
import pickle
import numpy as np
from torch import load as fetch
import subprocess, torch, yaml, tarfile
eval("1")
fetch("a.pt")
torch.load("a.pt", weights_only=False)
torch.load("a.pt", weights_only=True)
np.load("a.npy", allow_pickle=True)
np.load("a.npy", allow_pickle=False)
yaml.load("a", Loader=yaml.Loader)
subprocess.run("a", shell=True)
tarfile.open("a").extractall("b")
AutoModel.from_pretrained(place, use_safetensors=True, trust_remote_code=True)
AutoModel.from_pretrained(place, trust_remote_code=False)
AutoModel.from_pretrained(None, state_dict=weights)
AutoConfig.from_pretrained(place)
"""
    assert [line.split(": ", 1)[1] for line in faults("frugalbert.run", source)] == [
        "imports pickle",
        "calls eval",
        "calls torch.load without weights_only=True",
        "calls torch.load without weights_only=True",
        "calls numpy.load with allow_pickle",
        "calls yaml.load",
        "calls subprocess.run with shell",
        "calls ?.extractall",
        "calls AutoModel.from_pretrained with trust_remote_code=True written into the code",
        "loads weights by AutoModel.from_pretrained",
    ]
