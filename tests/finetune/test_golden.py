"""Golden files: what the readers and the tokenizer make of every task, for a person to check and for us to keep.

`python -m tests.finetune.golden` writes them anew.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.finetune.golden import dump

NAMES = ("glue.txt", "superglue.txt", "squad.txt", "race.txt", "custom.txt")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return dump.everything(tmp_path_factory.mktemp("golden"))


@pytest.mark.parametrize("name", NAMES)
def test_files_of_our_own_give_the_same_examples_and_tokens(made, name):
    assert set(made) == set(NAMES)
    assert made[name] == (dump.FOLDER / name).read_text(encoding="utf-8")


def test_real_files_give_the_same_examples(shared_data: Path):
    """Every row of every set, as a digest; the first and the special ones field by field."""
    assert dump.real(shared_data) == (dump.FOLDER / "real.txt").read_text(encoding="utf-8")
