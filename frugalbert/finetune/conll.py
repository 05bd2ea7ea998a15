"""A file of CoNLL columns in; sentences with a tag a word out (CoNLL 2003, cs/0306050).

One word a line, the word first and its tag last, between tabs or spaces; a blank line ends a sentence, and
`-DOCSTART-` lines are skipped.
"""

from __future__ import annotations

from pathlib import Path

from frugalbert.finetune.tables import Row, read_text, split_lines


def read_conll(path: Path, labelled: bool) -> list[Row]:
    """A row a sentence: `words` and, if the file has them, `label` = a tag for each word; without them None.

    Raises ValueError with file and line for a line without a tag where others have one (or `labelled` asks for them).
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; paths are relative to the YAML")
    rows: list[Row] = []
    words: list[str] = []
    tags: list[str] = []
    begun = 0
    for number, line in enumerate([*split_lines(read_text(path)), ""], 1):
        cells = [cell.strip() for cell in line.split("\t")] if "\t" in line else line.split()
        if not any(cells):
            if words:
                rows.append(
                    Row(f"{path} line {begun}", "", None, tuple(tags) or None, str(len(rows)), (), tuple(words))
                )
            words, tags = [], []
            continue
        if cells[0] == "-DOCSTART-":
            continue
        if not cells[0] or (len(cells) > 1 and not cells[-1]):
            raise ValueError(f"{path} line {number} has an empty {'tag' if cells[0] else 'word'}")
        begun = begun if words else number
        if len(cells) > 1:
            tags.append(cells[-1])
        words.append(cells[0])
        if (tags and len(tags) != len(words)) or (labelled and not tags):
            raise ValueError(f"{path} line {number} has {len(cells)} columns; every line is a word and, last, its tag")
    if not rows:
        raise ValueError(f"{path} has no sentences; write a word and its tag on each line")
    if len({row.label is None for row in rows}) > 1:
        odd = next(row for row in rows if row.label is None)
        raise ValueError(f"{odd.where} begins a sentence without tags, others have them")
    return rows
