"""GLUE's official files: nothing lost, every trap of the real ones, and files that are another task's."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from frugalbert import config
from frugalbert.finetune.examples import load
from frugalbert.finetune.tasks import GLUE, Data, resolve
from tests.finetune.golden.files import GLUE as OURS
from tests.finetune.golden.files import MRPC, changed

COUNTS = {
    "cola": (8551, 1043, 1063),
    "sst2": (67349, 872, 1821),
    "mrpc": (3668, 408, 1725),
    "stsb": (5749, 1500, 1379),
    "rte": (2490, 277, 3000),
    "wnli": (635, 71, 146),
    "qnli": (0, 5463, 5463),  # the copy at hand has no training file
}
TITLES = {task.name: task.title for task in GLUE}
CELLS = st.text(st.characters(blacklist_characters="\t\n\r\0", blacklist_categories=["Cs"]), max_size=12)


def glue(name: str, data: Path, **more: object) -> Data:
    section = config.Finetune(tasks=[name], model="unused", data=str(data), **more)
    return load(resolve([name])[0], section, Path(), None)


def place(folder: Path, name: str, **contents: str | bytes) -> Path:
    """Our own files of a task, with some of them (`train`, `dev_matched` …) replaced; an empty text removes one."""
    path = folder / TITLES[name]
    path.mkdir(parents=True, exist_ok=True)
    for file, text in OURS.items():
        if file.startswith(f"{TITLES[name]}/"):
            (folder / file).write_text(text)
    for stem, text in contents.items():
        (path / f"{stem}.tsv").write_bytes(text.encode() if isinstance(text, str) else text)
        if not text:
            (path / f"{stem}.tsv").unlink()
    return folder


@pytest.mark.parametrize("name", COUNTS)
def test_no_row_of_the_real_files_is_lost(shared_data, name):
    """Counts of Wang et al. 2019; default CSV quoting would lose rows of QNLI, MRPC and STS-B."""
    data = glue(name, shared_data / "glue", predict_test=True, train=name != "qnli")
    assert tuple(len(part) for part in data.sets.values()) == COUNTS[name]
    rows = [row for part in data.sets.values() for row in part]
    assert all(row.text and row.text_b != "" for row in rows)
    assert (rows[0].text_b is None) == (name in ("cola", "sst2"))
    assert {row.label for row in data.sets["test"]} == {None}
    assert [row.id for row in data.sets["test"]] == [str(number) for number in range(COUNTS[name][2])]
    if data.task.limits:
        assert {type(row.label) for row in data.dev} == {float}
        assert (min(row.label for row in data.dev), max(row.label for row in data.dev)) == (0.0, 5.0)
    else:
        assert {row.label for row in data.dev} == {0, 1}


def test_class_order_is_hugging_faces(shared_data):
    """RTE's file says `not_entailment` first; entailment is class 0 all the same. WNLI's 1 is entailment."""
    rte, wnli = glue("rte", shared_data / "glue"), glue("wnli", shared_data / "glue")
    assert (rte.labels, rte.train[0].label) == (("entailment", "not_entailment"), 1)
    assert (wnli.labels, wnli.train[0].label) == (("not_entailment", "entailment"), 1)


@settings(derandomize=True, max_examples=40, deadline=None)
@given(rows=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=4), end=st.sampled_from(["\n", "\r\n"]))
def test_every_cell_survives(tmp_path_factory, rows, end):
    """Quotes, U+2028, U+0085, form feeds and BOMs inside cells are text; a BOM before the header is none."""
    header = "index\tsentence1\tsentence2\tlabel"
    lines = [
        f"{number}\t{a}\t{b}\t{'entailment' if number else 'not_entailment'}" for number, (a, b) in enumerate(rows)
    ]
    lines.append(f"{len(rows)}\tx\ty\tentailment")
    text = "\ufeff" + end.join([header, *lines]) + end
    data = glue("rte", place(tmp_path_factory.mktemp("glue"), "rte", train=text))
    assert [(row.text, row.text_b) for row in data.train[:-1]] == [(a.strip(), b.strip()) for a, b in rows]


def test_malformed_rows_of_qqp_are_counted_in_training_and_refused_in_tests(tmp_path):
    data = glue("qqp", place(tmp_path, "qqp"), predict_test=True)
    assert [row.id for row in data.train] == ["133", "135"]
    assert data.notes == ("1 malformed rows of train.tsv left out (the first is line 3)",)
    place(tmp_path, "qqp", test="id\tquestion1\tquestion2\n0\tonly one\n")
    with pytest.raises(ValueError, match=r"test.tsv line 2 has 2 columns instead of 3"):
        glue("qqp", tmp_path, predict_test=True)
    good = OURS["QQP/train.tsv"]
    place(tmp_path, "qqp", train=good + "half a row\n" * 3)
    with pytest.raises(ValueError, match=r"train.tsv line 5 has 1 columns instead of 6"):
        glue("qqp", tmp_path)  # too many to be the known ones


def test_a_short_row_of_another_task_is_named(tmp_path):
    place(tmp_path, "sst2", train="sentence\tlabel\nfine\t1\nno label here\n")
    with pytest.raises(ValueError, match=r"train.tsv line 3 has 1 columns instead of 2"):
        glue("sst2", tmp_path)


def test_mrpc_from_the_original_files(tmp_path):
    header = f"Quality\t{MRPC.replace(' | ', chr(9))}\n"
    rows = ["1\t1\t2\ta\tb\n", "0\t3\t4\tc\td\n", "0\t5\t6\te\tf\n"]
    folder = tmp_path / "MRPC"
    folder.mkdir()
    (folder / "msr_paraphrase_train.txt").write_text("\ufeff" + header + "".join(rows))
    (folder / "msr_paraphrase_test.txt").write_text("\ufeff" + header + rows[1])
    (folder / "dev_ids.tsv").write_text("3\t4\n")
    data = glue("mrpc", tmp_path, predict_test=True)
    assert [[row.text for row in data.sets[name]] for name in ("train", "dev", "test")] == [["a", "e"], ["c"], ["c"]]
    assert data.sets["test"][0].label is None  # public there, but hidden in GLUE
    (folder / "dev_ids.tsv").write_text("3\t4\n7\t8\n")
    with pytest.raises(ValueError, match=r"dev_ids.tsv lists 2 pairs, 1 of which are in .*do they belong together"):
        glue("mrpc", tmp_path)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("rte", {"train": OURS["QNLI/train.tsv"]}, "line 1 is .*RTE has the columns .*the header of QNLI"),
        ("rte", {"train": OURS["STS-B/train.tsv"]}, "line 1 is .*it is the header of STS-B"),
        ("rte", {"dev": OURS["MNLI/test_matched.tsv"]}, "dev.tsv line 1 is .*it is the header of MNLI"),
        ("qnli", {"dev": OURS["RTE/dev.tsv"]}, "it is the header of RTE or WNLI or AX"),
        ("sst2", {"train": OURS["CoLA/train.tsv"]}, r"line 1 is \(ours84, 1, .*SST-2 has the columns sentence$"),
        ("cola", {"train": OURS["SST-2/train.tsv"]}, "CoLA has no header and 4 columns; it is the header of CoLA"),
        ("cola", {"train": "one\ttwo\n"}, r"line 1 is \(one, two\), but CoLA has no header and 4 columns$"),
        ("rte", {"train": OURS["WNLI/train.tsv"]}, "line 2: '1' is no label of RTE; its labels are entailment, not"),
        ("rte", {"dev": OURS["RTE/test.tsv"]}, "no column 'label'; a file without labels, .*cannot be the dev set of"),
        ("stsb", {"dev": OURS["STS-B/test.tsv"]}, "no column 'score'; a file without labels"),
        ("qnli", {"train": changed("QNLI/train.tsv", "label", "lable")}, "no column 'label'; did you mean 'lable'"),
        ("rte", {"train": changed("RTE/train.tsv", "\tentailment", "\tneutral")}, "3: 'neutral' is no label of RTE"),
        ("stsb", {"train": changed("STS-B/train.tsv", "4.800", "high")}, 'line 2: the label "high" is no number'),
        ("rte", {"train": "index\tsentence1\tsentence2\tlabel\n"}, "train.tsv has a header but no examples"),
        ("rte", {"train": changed("RTE/train.tsv", "1\tA big", "0\tA big")}, "line 3 has the id '0', as has .* line 2"),
        ("rte", {"train": ""}, r"RTE has no train.tsv \(only dev.tsv, test.tsv\); add the official file, or leave"),
        ("rte", {"train": b"index\tsentence1\tsentence2\tlabel\n0\t\xff\tb\tentailment\n"}, "line 2 is not UTF-8"),
        ("mnli", {"dev_mismatched": ""}, r"MNLI has no dev_mismatched.tsv \(only"),
    ],
)  # fmt: skip
def test_bad_files_get_one_sentence(tmp_path, name, contents, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        glue(name, place(tmp_path, name, **contents))
    assert "\n" not in str(caught.value)


@settings(derandomize=True, max_examples=100, deadline=None)
@given(st.lists(st.sampled_from(["index", "sentence1", "sentence", "label", "\t", "\n", '"', "0", "entailment"])))
def test_any_table_ends_in_examples_or_one_sentence(tmp_path_factory, parts):
    folder = place(tmp_path_factory.mktemp("any"), "rte", train="".join(parts) or " ")
    try:
        data = glue("rte", folder)
    except ValueError as error:
        assert "train" in str(error)
        assert "\n" not in str(error)
    else:
        assert data.train
