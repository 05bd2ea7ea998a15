"""`frugalbert grid`: golden files, arguments that arrive as they were written, and files that are refused."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from frugalbert import grid, yamlfile
from frugalbert.cli import app

GOLDEN = Path(__file__).parent / "golden"
OURS = ["--style", "ours", "--init-cmd", "frugalbert run my.yaml", "--job-name", "sweep"]


def called(*arguments):
    return CliRunner().invoke(app, ["grid", *map(str, arguments)])


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text(text, encoding="utf-8")
    return path


# ---- golden files ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, options", [
    ("grid.reference.txt", []),
    ("grid.ours.txt", OURS),
    ("grid.random.json", ["--search", "random", "--trials", 2, "--seed", 3, "--format", "json"]),
    ("grid.sh", ["--init-cmd", "deepspeed --num_gpus 2 run_pretraining.py", "--format", "shell"]),
    ("grid.slurm", [*OURS, "--format", "slurm"]),
])  # fmt: skip
def test_golden(name, options):
    """A change here is a change of what users get; the files are read, then written anew by hand."""
    result = called(GOLDEN / "grid.yaml", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout == (GOLDEN / name).read_text(encoding="utf-8")


def test_the_shell_delivers_the_arguments_and_switches_are_right():
    lines = (GOLDEN / "grid.reference.txt").read_text().splitlines()
    assert len(lines) == len(set(lines)) == 2 * 2 * 2
    for line in lines:
        words = shlex.split(line)
        assert words[words.index("--tokenizer_name") + 1] == "bert-large uncased"
        assert words[words.index("--curve") + 1] in ("linear", "it's; rm -rf $HOME")
        assert "--load_training_checkpoint" not in words  # a false switch
        assert "--do_validation" in words
        assert "True" not in words
    assert sum("--fp16" in shlex.split(line) for line in lines) == 4
    echo = subprocess.run(["sh", "-c", f"printf '%s\\n' {lines[-1]}"], capture_output=True, text=True, check=True)
    assert echo.stdout.splitlines() == shlex.split(lines[-1])


def test_our_style_is_read_back_as_it_was_written():
    read = grid.read(GOLDEN / "grid.yaml")
    for entry in grid.commands(read, grid.settings(read, "grid", 0, 0), grid.Form("ours", "frugalbert run x.yaml")):
        document = yamlfile.Document({})
        for argument in shlex.split(entry["command"])[3:-1]:
            yamlfile.override(document, argument)
        assert document.value == entry["parameters"]
        assert entry["id"] in entry["arguments"][-1]


@given(st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True).filter(lambda name: name not in grid.GENERATED),
                       st.one_of(st.booleans(), st.integers(-10**12, 10**12), st.floats(allow_nan=False,
                       allow_infinity=False), st.text(st.characters(exclude_categories=["C", "Z"]), max_size=20)),
                       min_size=1, max_size=4))  # fmt: skip
def test_any_value_survives_the_shell_and_our_settings(values):
    read = grid.Grid({name: [value] for name, value in values.items()}, {})
    (ours,) = grid.commands(read, grid.settings(read, "grid", 0, 0), grid.Form("ours", "run"))
    document = yamlfile.Document({})
    for argument in shlex.split(ours["command"])[1:-1]:
        yamlfile.override(document, argument)
    assert document.value == values
    (theirs,) = grid.commands(read, grid.settings(read, "grid", 0, 0), grid.Form())
    assert shlex.split(theirs["command"])[2:] == theirs["arguments"]


# ---- ids, search, scripts -------------------------------------------------------------------------------------------


def test_ids_depend_on_the_settings_alone(tmp_path):
    one = json.loads(called(written(tmp_path, "hyperparameters: {a: [1, 2], b: [x]}"), "--format", "json").stdout)
    two = json.loads(called(written(tmp_path, "hyperparameters: {b: [x], a: [2, 3]}"), "--format", "json").stdout)
    assert one[1]["id"] == two[0]["id"]
    assert len({entry["id"] for entry in (*one, *two)}) == 3
    assert list(one[0]["parameters"]) == ["a", "b"]
    assert list(two[0]["parameters"]) == ["b", "a"]  # the file's order


def test_random_search_takes_different_ones_of_the_grid(tmp_path):
    values = ", ".join(map(str, range(40)))
    path = written(tmp_path, "hyperparameters: {" + ", ".join(f"p{number}: [{values}]" for number in range(8)) + "}")
    read = grid.read(path)
    assert read.size == 40**8
    found = grid.settings(read, "random", 500, 1)
    assert len({json.dumps(row) for row in found}) == 500
    assert found == grid.settings(read, "random", 500, 1) != grid.settings(read, "random", 500, 2)
    small = grid.Grid({"a": [1, 2], "b": ["x", "y", "z"]}, {})
    every = grid.settings(small, "random", 99, 0)
    assert sorted(map(str, every)) == sorted(map(str, grid.settings(small, "grid", 0, 0)))
    assert [grid._combination(small, number) for number in range(6)] == grid.settings(small, "grid", 0, 0)


def test_scripts_run_and_tell_of_failures(tmp_path):
    path = written(tmp_path, "hyperparameters: {n: [0, 1, 2]}")
    log = tmp_path / "log"
    body = f"sh -c 'echo $2 >> {log}; exit $2' x"
    result = called(path, "--init-cmd", body, "--format", "shell", "--out", tmp_path / "jobs.sh")
    assert result.stdout.split() == [str(tmp_path / "jobs.sh")]
    assert subprocess.run([tmp_path / "jobs.sh"], check=False).returncode == 1
    assert log.read_text().split() == ["0", "1", "2"]  # a failure does not stop the others
    called(path, "--init-cmd", body, "--format", "slurm", "--out", tmp_path / "jobs.slurm")
    for number, code in (("0", 0), ("2", 2), ("7", 2)):
        done = subprocess.run(
            ["bash", tmp_path / "jobs.slurm"], env={"SLURM_ARRAY_TASK_ID": number, "PATH": "/usr/bin:/bin"},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code
    assert log.read_text().split()[3:] == ["0", "2"]
    assert "#SBATCH --array=0-2\n" in (tmp_path / "jobs.slurm").read_text()


# ---- mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, sentence", [
    ("", "the file is empty"),
    ("[1]", "has no hyperparameters; write"),
    ("default_parameters: {a: 1}", "has no hyperparameters; write"),
    ("hyperparameters: {a: [1]}\nhyperparameters: {b: [1]}", ":2:1: hyperparameters is written twice"),
    ("hyperparameters:\n  a: [1]\n  a: [2]", ":3:3: a is written twice"),
    ("hyperparameters: {a: []}", ":1:19: a needs a list of values; write a: [1, 2]"),
    ("hyperparameters: {a: 1}", "a needs a list of values"),
    ("hyperparameters: {a: [[1]]}", "a, value 1 is nested"),
    ("hyperparameters: {a: [{b: 1}]}", "a, value 1 is nested"),
    ("hyperparameters: {a: [1]}\ndefault_parameters: {b: [1]}", ":2:22: b is nested"),
    ("hyperparameters: {a: [1, 1]}", "a has a value twice"),
    ("hyperparameters: {a: [1]}\ndefault_parameters: {a: 2}", "a is among the hyperparameters too"),
    ("hyperparameters: {a: &x [1], b: *x}", "anchors and aliases are not allowed"),
    ("hyperparameters: {a: [!!python/none 1]}", "is not allowed; write a plain value"),
    ("hyperparameters: {a: [1]}\nextra: 1", ":2:1: there is no section 'extra'"),
    ("hyperparameters: {a: [1]}\ndefault_parameters: [1]", "must be names with values"),
    ("hyperparameters: {'a b': [1]}", "a b is no name of an option"),
    ("hyperparameters: {'a;b': [1]}", "a;b is no name of an option"),
    ("hyperparameters: {current_run_id: [1]}", "is written by this command itself"),
    ('hyperparameters: {a: ["x\\ny"]}', "holds a line break"),
    ("hyperparameters: {a: [null]}", "a has no value; write one"),
    ("hyperparameters: {a: [.nan]}", "is not a finite number"),
    ("hyperparameters: {" + ", ".join(f"p{n}: [{', '.join(map(str, range(9)))}]" for n in range(9)) + "}",
     "387,420,489 combinations are too many"),
    ("hyperparameters: [", "this is not YAML"),
])  # fmt: skip
def test_files_that_are_refused(tmp_path, text, sentence):
    result = called(written(tmp_path, text))
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert sentence in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("options, sentence", [
    (["--style", "ours"], "write --init-cmd 'frugalbert run my.yaml'"),
    (["--job-name", "a b"], "--job-name 'a b': write letters"),
    (["--init-cmd", "a\nb"], "holds a line break"),
])  # fmt: skip
def test_options_that_are_refused(options, sentence):
    result = called(GOLDEN / "grid.yaml", *options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert sentence in result.stderr


def test_words_that_yaml_once_took_for_booleans(tmp_path):
    result = called(written(tmp_path, "hyperparameters: {save_strategy: [no], fp16: [TRUE, False]}"))
    assert "save_strategy, value 1: no is taken as text; a switch is true or false" in result.stderr
    assert [re.sub("--current_run_id [0-9a-f]+ ", "", line).split()[2:-2] for line in result.stdout.splitlines()] == [
        ["--save_strategy", "no", "--fp16"], ["--save_strategy", "no"],
    ]  # fmt: skip
