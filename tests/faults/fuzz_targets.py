"""Coverage-guided fuzzing: `python -m tests.faults.fuzz_targets TARGET SECONDS SEED FOLDER` says how many were tried.

Any exception but the toolkit's own sentence is a crash; libFuzzer then leaves the input in FOLDER.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["frugalbert.data", "frugalbert.finetune"]):
    from frugalbert.data import readers, wikipedia
    from frugalbert.data.cleaning import Counts, clean
    from frugalbert.finetune import submission, submission_forms

assert wikipedia

PLACE = Path(sys.argv[4]) / "input"
FORMS = ("wikiextractor", "jsonl", "csv", "text", "wikipedia-xml")


def corpus(form: str) -> Callable[[bytes], None]:
    def one(data: bytes) -> None:
        PLACE.write_bytes(data)
        counts = Counts()
        try:
            for line, text in readers.read(PLACE, form, "text", counts):
                clean(text, (str(PLACE), line), "replace", counts)
        except ValueError as error:
            assert "\n" not in str(error)
            str(error).encode()

    return one


def submissions(data: bytes) -> None:
    """The first byte chooses the file, the second whether the zip itself is what is odd."""
    if len(data) < 2:
        return
    board = ("glue", "superglue")[data[0] % 2]
    files = submission_forms.BOARDS[board]
    archive = data[2:] if data[1] % 8 == 0 else submission.zipped({files[data[0] // 2 % len(files)].name: data[2:]})
    for problem in submission_forms.check_zip(archive, board, partial=True):
        assert problem
        assert "\n" not in problem


TARGETS = {form: corpus(form) for form in FORMS} | {"submissions": submissions}

if __name__ == "__main__":
    target, seconds, seed, folder = sys.argv[1:]
    options = [
        f"-artifact_prefix={folder}/",
        f"-max_total_time={seconds}",
        f"-seed={seed}",
        "-max_len=4096",
        "-timeout=60",
        "-rss_limit_mb=2048",
    ]
    atheris.Setup([sys.argv[0], *options, "-verbosity=0", "-print_final_stats=1"], TARGETS[target])
    atheris.Fuzz()
