"""The command line as a user meets it: sentences, exit codes, nothing half-written."""

import os
import subprocess
import sys

import pytest

GOOD = "name: t\ncorpus: {sources: [texts]}\n"


def frugalbert(*arguments, folder, **environment):
    return subprocess.run(
        [sys.executable, "-m", "frugalbert.cli", *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        timeout=120,
    )


@pytest.fixture
def yaml_file(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(GOOD)
    return path


def assert_refused(result, *words):
    assert result.returncode == 2, result.stderr
    assert "Traceback" not in result.stderr
    assert result.stderr.startswith("error: ")
    for word in words:
        assert word in result.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: t\ncorpsu: {sources: [x]}\n", ["t.yaml:2:1: corpsu: there is no such key; did you mean corpus?"]),
        (GOOD + "tokenizer: {}\nshards: {}\npretrain: {budget: 5 parsecs}\n", ["'parsecs' is no unit", "30m"]),
        (GOOD + "pretrain: {budget: 30m}\n", ["pretrain needs the section tokenizer; add it"]),
        ("name: t\n\tx: 1\n", ["t.yaml:2:1: this is not YAML"]),
    ],
)
def test_bad_files_are_refused_in_one_sentence(tmp_path, text, words):
    (tmp_path / "t.yaml").write_text(text)
    result = frugalbert("run", "t.yaml", folder=tmp_path)
    assert_refused(result, *words)
    assert [item.name for item in tmp_path.iterdir()] == ["t.yaml"]


def test_a_missing_file_and_an_unknown_stage_are_refused(yaml_file):
    assert_refused(frugalbert("plan", "nowhere.yaml", folder=yaml_file.parent), "nowhere.yaml does not exist")
    assert_refused(frugalbert("run", yaml_file, "--only", "pretrian", folder=yaml_file.parent), "no stage 'pretrian'")
    assert_refused(frugalbert("report", yaml_file, folder=yaml_file.parent), "there is no run in")


def test_an_unwritable_run_directory_is_refused(yaml_file):
    (yaml_file.parent / "file").write_text("")
    result = frugalbert("run", yaml_file, "--dir", "file/run", folder=yaml_file.parent)
    assert_refused(result, "cannot write the run directory", "--dir")


def test_a_run_directory_in_use_is_refused_naming_the_process(yaml_file):
    code = "import sys\nfrom pathlib import Path\nfrom frugalbert.lock import Lock\nPath('r').mkdir()\n"
    code += "with Lock(Path('r')):\n    print('held', flush=True)\n    sys.stdin.readline()\n"
    holder = subprocess.Popen(
        [sys.executable, "-c", code], cwd=yaml_file.parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    result = frugalbert("run", yaml_file, "--dir", "r", folder=yaml_file.parent)
    holder.communicate("\n")
    assert_refused(result, f"in use by process {holder.pid}")
    assert not (yaml_file.parent / "r" / "corpus").exists()


def test_plan_and_show_change_nothing(yaml_file):
    (yaml_file.parent / "texts").mkdir()
    for verb in ("plan", "show"):
        result = frugalbert(verb, yaml_file, folder=yaml_file.parent)
        assert result.returncode == 0, result.stderr
        assert "corpus" in result.stdout
    assert not (yaml_file.parent / "runs").exists()


def test_help_names_every_verb_and_the_exit_codes(tmp_path):
    result = frugalbert("--help", folder=tmp_path)
    for word in ("plan", "run", "show", "explain", "bench", "export", "report", "143"):
        assert word in result.stdout


def test_a_bug_of_ours_is_one_line_and_a_traceback_in_the_log(yaml_file):
    (yaml_file.parent / "texts").mkdir()
    (yaml_file.parent / "texts" / "a.txt").write_text("text " * 100)
    code = (
        "import sys\nfrom frugalbert import run, cli\n"
        "def broken(*arguments): raise KeyError('ours')\n"
        "run.fingerprint = broken\nsys.argv = ['frugalbert', 'run', 't.yaml']\ncli.main()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=yaml_file.parent, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr.startswith("internal error: KeyError")
    assert "Traceback" not in result.stderr
    assert "KeyError" in (yaml_file.parent / "runs" / "t" / "run.log").read_text()
