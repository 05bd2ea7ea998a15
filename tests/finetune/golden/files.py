"""Small files in the official layout of every task, written by us, with the special cases that real files have.

Nothing here is taken from a data set. `write(folder)` puts them below `glue/`, `superglue/`, `squad/` and `race/`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BOM = "\ufeff"


def table(*rows: str, end: str = "\n") -> str:
    """Cells are written with ` | ` between them."""
    return "".join("\t".join(cell.strip(" ") for cell in row.split("|")) + end for row in rows)


def lines(*records: Any) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


NLI = (
    "index | promptID | pairID | genre | sentence1_binary_parse | sentence2_binary_parse | sentence1_parse | "
    "sentence2_parse | sentence1 | sentence2"
)
STS = "index | genre | filename | year | old_index | source1 | source2 | sentence1 | sentence2"
MRPC = "#1 ID | #2 ID | #1 String | #2 String"


def nli(number: int, first: str, second: str, *labels: str) -> str:
    parses = ["( a )", "( b )", "(A a)", "(B b)"]
    return " | ".join([str(number), str(number), f"{number}e", "fiction", *parses, first, second, *labels])


GLUE = {
    "CoLA/train.tsv": table(
        'ours84 | 1 |  | The cat said "no.',
        "ours84 | 0 | * | Cat the sleeps.",
        "ours84 | 1 |  | Form\x0cfeed and U+2028\u2028stay.",
    ),
    "CoLA/dev.tsv": table("ours85 | 1 |  | A dog eats.", "ours85 | 0 | ?* | Eats dog a."),
    "CoLA/test.tsv": table("index | sentence", "0 | The bird sings.", "1 | Sings the bird the."),
    "SST-2/train.tsv": "sentence\tlabel\na very big yellow bird \t1\nnot a bird \t0\n",
    "SST-2/dev.tsv": table("sentence | label", "it sings | 1", "it sleeps | 0", end="\r\n"),
    "SST-2/test.tsv": table("index | sentence", "0 | the fish runs"),
    "MRPC/train.tsv": BOM
    + table(
        f"Quality | {MRPC}", '1 | 11 | 12 | "The cat runs. | The cat is running."', "0 | 13 | 14 | A fish. | A dog."
    ),
    "MRPC/dev.tsv": BOM + table(f"Quality | {MRPC}", "1 | 15 | 16 | Old birds sing. | Birds that are old sing."),
    "MRPC/test.tsv": BOM + table(f"index | {MRPC}", "0 | 17 | 18 | A dog eats. | The dog is eating."),
    "STS-B/train.tsv": table(
        f"{STS} | score",
        "0 | main | ours | 2026 | 0001 | none | none | A cat runs. | A cat is running. | 4.800",
        "1 | main | ours | 2026 | 0002 | none | none | A cat runs. | The fish is blue. | 0.000",
    ),
    "STS-B/dev.tsv": table(
        f"{STS} | score", "0 | main | ours | 2026 | 0003 | none | none | A dog. | A small dog. | 3.25"
    ),
    "STS-B/test.tsv": table(STS, "0 | main | ours | 2026 | 0004 | none | none | A bird. | Two birds."),
    "QQP/train.tsv": table(
        "id | qid1 | qid2 | question1 | question2 | is_duplicate",
        "133 | 1 | 2 | Why do cats sleep? | What makes cats sleep? | 1",
        "134 | 3 | 4 | Half of a row",
        "135 | 5 | 6 | How do fish sing? | Where do dogs run? | 0",
    ),
    "QQP/dev.tsv": table(
        "id | qid1 | qid2 | question1 | question2 | is_duplicate", "7 | 1 | 2 | Is it blue? | Is it red? | 0"
    ),
    "QQP/test.tsv": table("id | question1 | question2", "0 | Is a cat old? | Are cats old?"),
    "MNLI/train.tsv": table(
        f"{NLI} | label1 | gold_label",
        nli(0, "A cat sleeps.", "A cat runs.", *["contradiction"] * 2),
        nli(1, "A cat sleeps.", "An animal sleeps.", *["entailment"] * 2),
        nli(2, "A cat sleeps.", "The cat is old.", *["neutral"] * 2),
    ),
    "MNLI/dev_matched.tsv": table(
        f"{NLI} | label1 | label2 | label3 | label4 | label5 | gold_label",
        nli(0, "Birds sing.", "Birds are blue.", "neutral", "entailment", *["neutral"] * 4),
    ),
    "MNLI/dev_mismatched.tsv": table(
        f"{NLI} | label1 | label2 | label3 | label4 | label5 | gold_label",
        nli(0, "The fish is big.", "The fish is small.", *["contradiction"] * 6),
    ),
    "MNLI/test_matched.tsv": table(NLI, nli(0, "A dog runs.", "It eats.")),
    "MNLI/test_mismatched.tsv": table(NLI, nli(9796, "A new dog.", "An old dog.")),
    "QNLI/train.tsv": table(
        "index | question | sentence | label",
        "0 | What do birds do? | Birds sing. | entailment",
        '1 | Who "runs? | Fish are blue. | not_entailment',
    ),
    "QNLI/dev.tsv": table("index | question | sentence | label", "0 | Who eats? | The dog eats. | entailment"),
    "QNLI/test.tsv": table("index | question | sentence", "0 | Who sleeps? | A cat."),
    "RTE/train.tsv": table(
        "index | sentence1 | sentence2 | label",
        "0 | No cats were found. | Cats were found. | not_entailment",
        "1 | A big cat runs. | A cat runs. | entailment",
    ),
    "RTE/dev.tsv": table("index | sentence1 | sentence2 | label", "0 | Dogs eat. | Something eats. | entailment"),
    "RTE/test.tsv": table("index | sentence1 | sentence2", "0 | Fish. | Birds."),
    "WNLI/train.tsv": table(
        "index | sentence1 | sentence2 | label",
        "0 | The cat saw the dog. It ran. | The dog ran. | 1",
        "1 | The cat saw the dog. It ran. | The cat ran. | 0",
    ),
    "WNLI/dev.tsv": table(
        "index | sentence1 | sentence2 | label", "0 | A bird ate it. It was red. | The bird was red. | 0"
    ),
    "WNLI/test.tsv": table("index | sentence1 | sentence2", "0 | It is it. | It is."),
    "AX/diagnostic.tsv": table(
        "index | sentence1 | sentence2", "0 | The cat sat. | The cat did not sit.", "1 | All birds. | Some birds."
    ),
}


def questions(first: int, answer: int, labelled: bool) -> list[dict[str, Any]]:
    """Two questions of MultiRC with two answers each; the counters run over the whole file."""
    found = []
    for number in range(2):
        texts = [("Birds", 1), ("Red fish", 0)] if number == 0 else [("In the old tree", 0), ("Dogs and cats", 0)]
        answers: list[dict[str, Any]] = []
        for text, label in texts:
            answers.append({"text": text, "idx": answer, **({"label": label} if labelled else {})})
            answer += 1
        found.append({"question": ["Who sings?", "Who eats?"][number], "idx": first + number, "answers": answers})
    return found


PASSAGE = "Birds sing in the old tree. Fish do not."
CLOZE = "Ann Lee met Bob in Oslo.\n@highlight\nBob left Oslo\n@highlight\nAnn Lee stays"
ENTITIES = [{"start": 0, "end": 6}, {"start": 12, "end": 14}, {"start": 19, "end": 22}, {"start": 36, "end": 38}]


def cloze(number: int, query: str, answers: list[tuple[int, int]] | None) -> dict[str, Any]:
    golds = (
        {}
        if answers is None
        else {"answers": [{"start": first, "end": last, "text": CLOZE[first : last + 1]} for first, last in answers]}
    )
    return {"query": query, "idx": number, **golds}


def winograd(idx: int, text: str, one: tuple[int, str], two: tuple[int, str], label: bool | None) -> dict[str, Any]:
    target = {"span1_index": one[0], "span1_text": one[1], "span2_index": two[0], "span2_text": two[1]}
    return {"text": text, "target": target, "idx": idx, **({} if label is None else {"label": label})}


def wic(idx: int, word: str, first: str, second: str, forms: tuple[str, str], label: bool | None) -> dict[str, Any]:
    """Places are found here, where each form occurs once."""
    places = {}
    for number, (text, form) in enumerate(zip((first, second), forms, strict=True), 1):
        places |= {f"start{number}": text.index(form), f"end{number}": text.index(form) + len(form)}
    known = {} if label is None else {"label": label}
    return {"word": word, "sentence1": first, "sentence2": second, "idx": idx, **known, **places, "version": 1.1}


SUPERGLUE = {
    "BoolQ/train.jsonl": lines(
        {"question": "do birds sing", "passage": "Bird -- Birds sing.", "idx": 0, "label": True},
        {"question": "do fish sing", "passage": "Fish -- Fish do not.", "idx": 1, "label": False},
    ),
    "BoolQ/val.jsonl": lines({"question": "is it old", "passage": "Tree -- An old tree.", "idx": 0, "label": True}),
    "BoolQ/test.jsonl": lines({"question": "is it new", "passage": "Tree -- An old tree.", "idx": 0}),
    "CB/train.jsonl": lines(
        {"premise": "I do not think cats sing.", "hypothesis": "cats sing", "label": "contradiction", "idx": 0},
        {"premise": "He knew cats sing.", "hypothesis": "cats sing", "label": "entailment", "idx": 1},
        {"premise": "Do cats sing?", "hypothesis": "cats sing", "label": "neutral", "idx": 2},
    ),
    "CB/val.jsonl": lines({"premise": "They said so.", "hypothesis": "it is so", "label": "neutral", "idx": 0}),
    "CB/test.jsonl": lines({"premise": "They knew.", "hypothesis": "it is so", "idx": 0}),
    "COPA/train.jsonl": lines(
        {
            "premise": "The cat ran.",
            "choice1": "It saw a dog.",
            "choice2": "It slept.",
            "question": "cause",
            "label": 0,
            "idx": 0,
        },
        {
            "premise": "The bird sang.",
            "choice1": "It ate.",
            "choice2": "The cat came.",
            "question": "effect",
            "label": 1,
            "idx": 1,
        },
    ),
    "COPA/val.jsonl": lines(
        {
            "premise": "It was old.",
            "choice1": "It ran.",
            "choice2": "It slept.",
            "question": "effect",
            "label": 1,
            "idx": 0,
        }
    ),
    "COPA/test.jsonl": lines({"premise": "A.", "choice1": "B.", "choice2": "C.", "question": "cause", "idx": 0}),
    "MultiRC/train.jsonl": lines(
        {"idx": 0, "version": 1.1, "passage": {"text": PASSAGE, "questions": questions(0, 0, True)}},
        {"idx": 1, "version": 1.1, "passage": {"text": PASSAGE, "questions": questions(2, 4, True)[:1]}},
    ),
    "MultiRC/val.jsonl": lines(
        {"idx": 0, "version": 1.1, "passage": {"text": PASSAGE, "questions": questions(0, 0, True)}}
    ),
    "MultiRC/test.jsonl": lines(
        {"idx": 0, "version": 1.1, "passage": {"text": PASSAGE, "questions": questions(0, 0, False)}}
    ),
    "ReCoRD/train.jsonl": lines(
        {
            "source": "ours",
            "passage": {"text": CLOZE, "entities": ENTITIES},
            "idx": 0,
            "qas": [
                cloze(0, "@placeholder met Ann Lee", [(12, 14), (36, 38)]),
                cloze(1, "They met in @placeholder.", [(19, 22)]),
            ],
        }
    ),
    "ReCoRD/val.jsonl": lines(
        {
            "source": "ours",
            "passage": {"text": CLOZE, "entities": ENTITIES},
            "idx": 7,
            "qas": [cloze(3, "@placeholder stays", [(0, 6)])],
        }
    ),
    "ReCoRD/test.jsonl": lines(
        {
            "source": "ours",
            "passage": {"text": CLOZE, "entities": ENTITIES},
            "idx": 0,
            "qas": [cloze(0, "@placeholder left", None)],
        }
    ),
    "RTE/train.jsonl": lines(
        {"premise": "No cats were found.", "hypothesis": "Cats were found.", "label": "not_entailment", "idx": 0},
        {"premise": "A big cat runs.", "hypothesis": "A cat runs.", "label": "entailment", "idx": 1},
    ),
    "RTE/val.jsonl": lines({"premise": "Dogs eat.", "hypothesis": "Something eats.", "label": "entailment", "idx": 0}),
    "RTE/test.jsonl": lines({"premise": "Fish.", "hypothesis": "Birds.", "idx": 0}),
    "WiC/train.jsonl": lines(
        wic(0, "water", " A dog drinks water.", "He was watering the tree.", ("water", "watering"), False),
        wic(1, "sing", "Birds sing.", "Sing it again!", ("sing", "Sing"), True),
        wic(2, "old", "The very old tree.", f"{'Birds and fish and ' * 4}old dogs.", ("old", "old"), True),
    ),
    "WiC/val.jsonl": lines(wic(0, "run", "A cat runs.", "The old run.", ("runs", "run"), False)),
    "WiC/test.jsonl": lines(wic(0, "eat", "Dogs eat.", "It ate.", ("eat", "ate"), None)),
    "WSC/train.jsonl": lines(
        winograd(0, "Ann's dog saw the old cat, and it ran.", (0, "Ann"), (7, "it"), False),
        winograd(1, "The red\nbird met a fish. It sang.", (0, "The red\nbird"), (6, "It"), True),
    ),
    "WSC/val.jsonl": lines(
        winograd(0, "It saw a fish, ate it, and then it slept .", (2, "a fish"), (3, "it"), True),  # 3 is `fish,`
    ),
    "WSC/test.jsonl": lines(
        winograd(
            0, "Bob, Ann's old friend, and Lee met them .", (1, "Ann and Lee"), (7, "them"), None
        ),  # not contiguous
    ),
    "AX-b/AX-b.jsonl": lines(
        {
            "idx": "0",
            "label": "not_entailment",
            "sentence1": "The cat sat.",
            "sentence2": "The cat did not sit.",
            "logic": "Negation",
        },
        {"idx": "1", "label": "entailment", "sentence1": "All birds sing.", "sentence2": "Some birds sing."},
    ),
    "AX-g/AX-g.jsonl": lines(
        *(
            {
                "hypothesis": f"The vet saw {who}.",
                "idx": number,
                "label": "entailment",
                "pair_id": 500 - number,
                "premise": f"{who} went to the vet.",
            }
            for number, who in enumerate(["his dog", "her dog", "a man", "a woman"])
        )
    ),
}

CONTEXT = "  Birds sing in the old tree. The tree is old, and birds love it."


def question(key: str, text: str, answers: list[tuple[str, int]], impossible: bool | None = None) -> dict[str, Any]:
    known = {} if impossible is None else {"is_impossible": impossible}
    golds = [{"text": answer, "answer_start": start} for answer, start in answers]
    plausible = {"plausible_answers": [{"text": "Birds", "answer_start": 2}]} if impossible else {}
    return {"id": key, "question": text, "answers": golds, **known, **plausible}


def squad(*qas: dict[str, Any]) -> str:
    return json.dumps(
        {"version": "ours", "data": [{"title": "Birds", "paragraphs": [{"context": CONTEXT, "qas": list(qas)}]}]}
    )


SQUAD = {
    "train-v1.1.json": squad(
        question("a1", "Who sings?", [("Birds", 2)]),
        question("a2", "What is old?", [("tree", 60)]),  # stands at 24 and at 34
        question("a3", "Where do fish sing?", [("sea", 0)]),
    ),
    "dev-v1.1.json": squad(question("b1", " Where?", [("in the old tree", 13), ("the old tree", 16), ("a lake", 0)])),
    "train-v2.0.json": squad(
        question("c1", "Who sings?", [("Birds", 2)], False), question("c2", "Who is blue?", [], True)
    ),
    "dev-v2.0.json": squad(
        question("d1", "Who is red?", [], True), question("d2", "Who sings?", [("Birds", 2)], False)
    ),
}


def passage(key: str, article: str, asked: list[tuple[str, list[str], str]]) -> str:
    names, options, answers = ([row[number] for row in asked] for number in range(3))
    return json.dumps({"id": key, "article": article, "questions": names, "options": options, "answers": answers})


RACE = {
    f"{split}/{part}/{number}.txt": passage(
        f"{part}{number}.txt",
        "Birds sing in the old tree.\nFish do not.",
        [
            ("We learn that   _   sing.", ["fish", "birds ", "trees", "cats"], "B"),
            ("Where do they sing?", ["In a tree.", "In a lake.", "At home.", "Nowhere."], "A"),
        ][: 2 if part == "middle" else 1],
    )
    for split, numbers in (("train", (10, 9)), ("dev", (11,)), ("test", (12,)))
    for part in ("middle", "high")
    for number in numbers
}

CUSTOM = {
    "choice.csv": (
        "key,passage,asked,one,two,right\n"
        'r1,"Birds sing, fish swim.",Who sings?,Birds,Fish,0\nr2,Dogs eat.,The _ eat.,cats,dogs,B\n'
        "r3,Cats sleep.,Who sleeps?,Dogs,Cats,Cats\n"
    ),
    "questions.jsonl": lines(
        {"id": "q1", "question": "Who sings?", "context": CONTEXT, "answers": {"text": ["Birds"], "answer_start": [2]}},
        {"id": "q2", "question": "Who sleeps?", "context": CONTEXT, "answers": []},
        {"id": "q3", "question": "What is old?", "context": CONTEXT, "answers": ["The tree"]},
    ),
    "tags.conll": "-DOCSTART- -X- O\n\nAnn NNP B-PER\nLee NNP I-PER\nsings VBZ O\n\nIn IN O\nOslo NNP B-LOC\n",
    "untagged.conll": "Bob\nsleeps\n\nAnn\n",
}


def write(folder: Path) -> Path:
    """All official files below `folder`, which is returned."""
    for family, files in (
        ("glue", GLUE),
        ("superglue", SUPERGLUE),
        ("squad", SQUAD),
        ("RACE", RACE),
        ("custom", CUSTOM),
    ):
        for name, text in files.items():
            path = folder / family / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
    return folder


def changed(file: str, old: str, new: str) -> str:
    """A file of GLUE or SuperGLUE with the first `old` as `new`, which must be there."""
    text = {**GLUE, **SUPERGLUE}[file]
    assert old in text
    return text.replace(old, new, 1)
