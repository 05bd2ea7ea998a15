"""Several processes prepare the same data at once and one is killed: run as a script, `... FOLDER ROUNDS SEED`.

Each round starts four children on one run directory: one builds, the others are refused; SIGKILL ends the first of them
somewhere in its work; a last one goes on. Prints how many rounds ended with the bytes of a run that was left alone.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

from frugalbert import stages
from frugalbert.yamlfile import load
from tests.data import test_corpus
from tests.faults.kill_points import in_child, say_to
from tests.faults.workloads import digest

YAML = """
name: together
machine: {workers: 1}
corpus: {sources: [many, a.jsonl.gz, b.txt], held_out: 0.2}
"""


def build(folder: Path, run: Path) -> None:
    stages.run(load(folder / "together.yaml", []), run, folder)


def attempt(folder: Path, run: Path, dies: float | None) -> int:
    """The process number of a child that builds: it ends with 0, or 7 if another one is at work."""
    child = os.fork()
    if child == 0:
        say_to(folder / "said")
        if dies is not None:
            signal.setitimer(signal.ITIMER_REAL, dies)
            signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        try:
            build(folder, run)
        except ValueError as error:
            os._exit(7 if "another process" in str(error) or "in use by process" in str(error) else 3)
        except BaseException:
            os._exit(3)
        os._exit(0)
    return child


def main(folder: Path, rounds: int, seed: int) -> dict[str, int]:
    generator = random.Random(seed)
    test_corpus.write_mixed(folder)
    (folder / "together.yaml").write_text(YAML)
    assert in_child(lambda: (say_to(folder / "said"), build(folder, folder / "whole"))) == 0, (
        folder / "said"
    ).read_text()
    expected = digest(folder / "whole" / "corpus", "documents-*", "dropped.jsonl", "identity")
    same = 0
    for number in range(rounds):
        run = folder / f"run-{number}"
        children = [attempt(folder, run, generator.uniform(0.001, 0.3) if index == 0 else None) for index in range(4)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        last = os.waitstatus_to_exitcode(os.waitpid(attempt(folder, run, None), 0)[1])
        found = digest(run / "corpus", "documents-*", "dropped.jsonl", "identity")
        fine = last == 0 and set(codes) <= {0, 7, -signal.SIGKILL} and found == expected
        same += fine
        if not fine:
            print(number, codes, last, file=sys.stderr)
    return {"rounds": rounds, "same": same}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
