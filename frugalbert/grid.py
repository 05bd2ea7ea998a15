"""academic-budget-bert's hyper-parameter file in; one command per combination of its values out.

`hyperparameters: {name: [values]}`, `default_parameters: {name: value}` (arXiv 2104.07705). The names are any program's
options, so the same serves pre-training, fine-tuning and slices. Unlike there, a false switch is left out, arguments
are quoted for the shell, and a run's id is a hash of its settings: the same file gives the same ids.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from frugalbert.run import fingerprint, say, write_atomic
from frugalbert.yamlfile import Document, parse, read_text

MOST = 100_000  # commands
LARGEST = 1 << 62  # combinations that random search counts
SECTIONS = ("hyperparameters", "default_parameters")
GENERATED = ("current_run_id", "job_name")
COMMAND = "deepspeed run_pretraining.py"
FORMATS, STYLES, SEARCHES = ("lines", "shell", "slurm", "json"), ("reference", "ours"), ("grid", "random")
WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,80}")
BOOLEANS = {"True": True, "TRUE": True, "False": False, "FALSE": False}
LOOKS_BOOLEAN = {"yes", "no", "on", "off", "y", "n"}
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Grid:
    """What a file says: values to combine and values that are always the same, in its order."""

    varied: dict[str, list[Value]]
    fixed: dict[str, Value]

    @property
    def size(self) -> int:
        return math.prod(len(values) for values in self.varied.values())


@dataclass(frozen=True)
class Form:
    """How commands are written."""

    style: str = "reference"
    command: str | None = None
    job_name: str = "bert_large_experiment"


def read(path: Path) -> Grid:
    """Raises ValueError with one sentence, its place and what to write, for anything but plain names and values."""
    document = parse(read_text(path), str(path))
    value = document.value
    if not isinstance(value, dict) or not isinstance(value.get("hyperparameters"), dict):
        raise ValueError(
            f"{path} has no hyperparameters; write `hyperparameters:` and below it names with lists of values"
        )
    for name in value:
        if name not in SECTIONS:
            raise ValueError(f"{document.place((name,))}: there is no section {name!r}; write {' and '.join(SECTIONS)}")
    fixed = value.get("default_parameters") or {}
    if not isinstance(fixed, dict):
        raise ValueError(f"{document.place(('default_parameters',))}: default_parameters must be names with values")
    grid = Grid({}, {})
    for name, values in value["hyperparameters"].items():
        where = _name(document, ("hyperparameters", name))
        if not isinstance(values, list) or not values:
            raise ValueError(f"{where} needs a list of values; write {name}: [1, 2]")
        grid.varied[name] = [_value(item, f"{where}, value {number}") for number, item in enumerate(values, 1)]
        if len({json.dumps(item) for item in grid.varied[name]}) < len(values):
            raise ValueError(f"{where} has a value twice; its runs would be the same, write it once")
    for name, item in fixed.items():
        where = _name(document, ("default_parameters", name))
        if name in grid.varied:
            raise ValueError(f"{where} is among the hyperparameters too; remove one of them")
        grid.fixed[name] = _value(item, where)
    return grid


def _name(document: Document, path: tuple[str, str]) -> str:
    """`file:line:column: name` of a usable name."""
    where = f"{document.place(path)}: {path[1]}"
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,99}", path[1]):
        raise ValueError(f"{where[:200]} is no name of an option; write letters, digits, `_`, `-` and `.` only")
    if path[1] in GENERATED:
        raise ValueError(f"{where} is written by this command itself; remove it, --job-name sets the name")
    return where


def _value(value: Any, where: str) -> Value:
    if isinstance(value, dict | list):
        raise ValueError(f"{where} is nested; write a plain text, number or boolean")
    if isinstance(value, str):
        if any(ord(letter) < 32 for letter in value):
            raise ValueError(f"{where} holds a line break or a control character; a command is one line")
        if value.lower() in LOOKS_BOOLEAN:
            say(f"{where}: {value} is taken as text; a switch is true or false")
        return BOOLEANS.get(value, value)
    return value


# ---- commands -------------------------------------------------------------------------------------------------------


def settings(grid: Grid, search: str, trials: int, seed: int) -> list[dict[str, Value]]:
    """The combinations: all, the last name changing fastest, or `trials` different ones by chance."""
    number = grid.size if search == "grid" else min(trials, grid.size)
    if number > MOST or grid.size > LARGEST:
        raise ValueError(
            f"{grid.size:,} combinations are too many to list; write fewer values, or --search random --trials 100"
        )
    if search == "grid":
        return [dict(zip(grid.varied, values, strict=True)) for values in itertools.product(*grid.varied.values())]
    return [_combination(grid, place) for place in random.Random(seed).sample(range(grid.size), number)]


def _combination(grid: Grid, number: int) -> dict[str, Value]:
    """The combination of that number in the order of `itertools.product`."""
    found: dict[str, Value] = {}
    for name, values in reversed(grid.varied.items()):
        number, index = divmod(number, len(values))
        found[name] = values[index]
    return {name: found[name] for name in grid.varied}


def commands(grid: Grid, chosen: list[dict[str, Value]], form: Form) -> list[dict[str, Any]]:
    """`{"id", "parameters", "arguments", "command"}` of each; raises ValueError for what the style cannot say."""
    if not WORD.fullmatch(form.job_name):
        raise ValueError(f"--job-name {form.job_name!r}: write letters, digits, `.`, `_` and `-` only, at most 80")
    if form.style == "ours" and not form.command:
        raise ValueError("--style ours needs to know what to run; write --init-cmd 'frugalbert run my.yaml'")
    if form.command and any(ord(letter) < 32 for letter in form.command):
        raise ValueError("--init-cmd holds a line break or a control character; write the command on one line")
    found = []
    for combination in chosen:
        parameters = combination | grid.fixed
        identity = fingerprint(parameters)[:12]
        if form.style == "ours":
            arguments = [f"{name}={_yaml(value)}" for name, value in parameters.items()]
            arguments.append(f"name={form.job_name}-{identity}")
        else:
            arguments = [*_options(combination), "--current_run_id", identity, *_options(grid.fixed)]
            arguments += ["--job_name", form.job_name]
        line = f"{form.command or COMMAND} {shlex.join(arguments)}"
        found.append({"id": identity, "parameters": parameters, "arguments": arguments, "command": line})
    return found


def _options(parameters: dict[str, Value]) -> list[str]:
    """`--name value`; a true switch is `--name`, a false one is left out; text like `--x` is joined by `=`."""
    arguments: list[str] = []
    for name, value in parameters.items():
        if value is None:
            raise ValueError(f"{name} has no value; write one, or --style ours where null means something")
        if isinstance(value, bool):
            arguments += [f"--{name}"] * value
        else:
            text = str(value)
            arguments += [f"--{name}={text}"] if text.startswith("--") else [f"--{name}", text]
    return arguments


def _yaml(value: Value) -> str:
    """The value as `section.key=value` reads it: text that would be something else there is quoted."""
    if not isinstance(value, str):
        return json.dumps(value)
    try:
        plain = bool(value) and parse(value, "").value == value
    except ValueError:
        plain = False
    return value if plain else json.dumps(value, ensure_ascii=False)


# ---- files ----------------------------------------------------------------------------------------------------------


def write(found: list[dict[str, Any]], how: str, job_name: str) -> str:
    """One command a line, a shell script that goes on after a failure, a Slurm array script, or JSON."""
    lines = [entry["command"] for entry in found]
    if how == "json":
        return json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    if how == "shell":
        lines = ["#!/bin/sh", "failed=0", *(f"{line} || failed=1" for line in lines), "exit $failed"]
    elif how == "slurm":
        lines = [
            "#!/bin/bash",
            f"#SBATCH --job-name={job_name}",
            f"#SBATCH --array=0-{len(lines) - 1}",
            f"#SBATCH --output={job_name}-%A_%a.log",
            'case "$SLURM_ARRAY_TASK_ID" in',
            *(f"{number}) {line} ;;" for number, line in enumerate(lines)),
            '*) echo "there is no command $SLURM_ARRAY_TASK_ID; submit this file with sbatch" >&2; exit 2 ;;',
            "esac",
        ]
    return "\n".join(lines) + "\n"


def save(path: Path, text: str, how: str) -> None:
    """Scripts can be executed."""
    write_atomic(path, text)
    if how in ("shell", "slurm"):
        os.chmod(path, path.stat().st_mode | 0o111)
