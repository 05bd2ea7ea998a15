"""Predictions of a fine-tuned run in; the files that test servers take out, or a list of all that is wrong.

GLUE and SuperGLUE zips, SQuAD's `predictions.json` and `null_odds.json`, RACE as JSON lines. A task's chosen trial
leaves `<task>/test/<set>.jsonl` (lines with index, id, prediction) and `model.json`, which says what model made them:
AX must come from MNLI's, AX-b and AX-g from RTE's. Nothing is written unless everything is right.
"""

from __future__ import annotations

import io
import json
import math
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

from frugalbert import run
from frugalbert.finetune.squad_metrics import squad1_evaluate, squad_evaluate
from frugalbert.finetune.submission_forms import BOARDS, HEADER, INDEX, File, check_zip, short, shown

Rows = list[dict[str, Any]]
SQUAD = {"squad1": 10_570, "squad2": 11_873}
RACE = {"race": 4934, "race-middle": 1436, "race-high": 3498}
NAMES = (*BOARDS, "squad", "race")
MOST_PROBLEMS = 200
PREDICT = "predict it with finetune.predict_test: true"


def submit(folder: Path, board: str, partial: bool = False, out: Path | None = None) -> list[Path]:
    """Write what the server of a board takes; returns the files.

    Args:
        folder: a run, or what `frugalbert eval` wrote.
        partial: tasks may be missing.
        out: the zip (GLUE, SuperGLUE), or the directory of the files; by default below `folder`.
    Raises ValueError with one line for everything that is wrong; nothing is written then.
    """
    _known(board)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no directory; name a run, or what `frugalbert eval` wrote")
    root = folder / "finetune" if (folder / "finetune").is_dir() else folder
    build = {"squad": _squad, "race": _race}.get(board)
    if build:
        target = out or folder / f"{board}-submission"
        contents, problems = build(root)
    else:
        target = out or folder / f"{board}-submission.zip"
        members, problems = _members(root, board, partial)
        contents = {"": zipped(members)}
        problems += check_zip(contents[""], board, partial=True) if members else []
    _refuse(problems, f"{board}: nothing is written")
    written = []
    for name, data in contents.items():
        path = target / name if name else target
        path.parent.mkdir(parents=True, exist_ok=True)
        run.write_atomic(path, data)
        written.append(path)
    return written


def check(path: Path, board: str, partial: bool = False, data: Path | None = None) -> str:
    """Validate a file, whoever made it; returns a word on it, or SQuAD's official evaluation if `data` is its set.

    Raises ValueError with one line for everything that is wrong.
    """
    _known(board)
    content = path.read_bytes()
    if board in BOARDS:
        _refuse(check_zip(content, board, partial), f"{path} is not as {board} takes it")
        return f"{path} is as {board} takes it"
    if board == "race":
        _refuse(_race_problems(_lines(content, "line {}")), f"{path} is not as race takes it")
        return f"{path} is as race takes it"
    predictions = _answers(path, str)
    odds = path.with_name("null_odds.json")
    if data is None:
        return f"{path} has {len(predictions):,} predictions"
    return json.dumps(evaluate(data, predictions, _answers(odds, float) if odds.exists() else None), indent=2)


def evaluate(data: Path, predictions: dict[str, Any], null_odds: dict[str, Any] | None = None) -> dict[str, float]:
    """What SQuAD's official script of the set's version prints; 2.0 is one in which a question has no answer."""
    from frugalbert.finetune.squad import examples, read_json

    questions = [example for _, example in examples(read_json(data), "dev", [])]
    if any(question.label is None for question in questions):
        raise ValueError(f"{data} has questions without answers that are not marked is_impossible; it is no dev set")
    if any(not question.answers for question in questions):
        return squad_evaluate(questions, predictions, null_odds)
    return squad1_evaluate(questions, predictions)


def _known(board: str) -> None:
    if board not in NAMES:
        raise ValueError(f"--board {board}: there are {', '.join(NAMES)}")


def _refuse(problems: list[str], what: str) -> None:
    if problems:
        more = [f"and {len(problems) - MOST_PROBLEMS} more"] if len(problems) > MOST_PROBLEMS else []
        raise ValueError("\n  ".join([f"{what}:", *problems[:MOST_PROBLEMS], *more]))


# ---- reading --------------------------------------------------------------------------------------------------------


def _lines(content: bytes, where: str) -> tuple[Rows, list[str]]:
    """JSON objects, one a line, up to the first damaged one, which is the problem."""
    rows: Rows = []
    for number, line in enumerate(content.decode("utf-8", "replace").removesuffix("\n").split("\n"), start=1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            return rows, [f"{where.format(number)} is damaged ({str(error)[:60]})"]
        if not isinstance(row, dict):
            return rows, [f"{where.format(number)} is no JSON object"]
        rows.append(row)
    return rows, []


def _predictions(path: Path) -> tuple[Rows, list[str]]:
    rows, problems = _lines(path.read_bytes(), f"{path} line {{}}")
    for number, row in enumerate(rows, start=1):
        missing = [name for name in ("index", "id", "prediction") if name not in row]
        if missing:
            return rows[: number - 1], [*problems, f"{path} line {number} has no {missing[0]}"]
    return rows, problems


def _model(root: Path, task: str, sets: list[str]) -> list[str]:
    """What speaks against these predictions being the chosen model's own."""
    path, kept = root / task / "test" / "model.json", root / task / "model.json"
    about = _about(path)
    if not about.get("identity"):
        return [f"{path} does not say what model predicted {', '.join(sets)} (identity)"]
    problems = []
    if about.get("task", task) != task:
        problems.append(f"{path} is of the task {shown(about['task'])}, not of {task}")
    if kept.exists() and _about(kept).get("identity") != about["identity"]:
        problems.append(f"{path} names another model than {kept}; predict again ({', '.join(sets)})")
    digests = about.get("files")
    for name in sets if isinstance(digests, dict) else []:
        file = path.with_name(f"{name}.jsonl")
        if digests.get(file.name) != run.sha256(file):
            problems.append(f"{file} is not the file that the model of {path.name} wrote")
    return problems


def _about(path: Path) -> dict[str, Any]:
    """What a `model.json` says; nothing if it is absent or damaged."""
    try:
        found = run.read_json(path)
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


# ---- GLUE and SuperGLUE ---------------------------------------------------------------------------------------------


def _members(root: Path, board: str, partial: bool) -> tuple[dict[str, bytes], list[str]]:
    """{file name: bytes} of a zip, and all problems."""
    contents: dict[str, bytes] = {}
    problems: list[str] = []
    sets: dict[str, list[str]] = {}
    for file in BOARDS[board]:
        path = root / file.task / "test" / f"{file.set}.jsonl"
        if not path.exists():
            if not partial:
                problems.append(f"{file.name}: there is no {path} ({PREDICT}, or --partial)")
            continue
        sets.setdefault(file.task, []).append(file.set)
        rows, damage = _predictions(path)
        problems += [f"{file.name}: {text}" for text in damage]
        if not damage:
            contents[file.name] = render(file, rows)
    for task, names in sets.items():
        problems += _model(root, task, names)
    if partial and not sets:
        problems.append(f"{root} has no predictions for {board} ({BOARDS[board][0].task}/test/test.jsonl …); {PREDICT}")
    return contents, problems


def render(file: File, rows: Rows) -> bytes:
    """A file as its server takes it. What cannot be translated is left as it is, for `check_file` to name."""
    if file.name.endswith(".tsv"):
        lines = [HEADER, *(f"{_shown_index(row['index'])}\t{_label(file, row['prediction'])}" for row in rows)]
        return ("\n".join(lines) + "\n").encode("utf-8", "replace")
    if file.name == "MultiRC.jsonl":
        records: Any = _multirc(file, rows)
    else:
        records = ({"idx": _number(row["id"]), "label": _label(file, row["prediction"])} for row in rows)
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _label(file: File, prediction: Any) -> Any:
    if file.labels:
        return file.labels.get(str(prediction), prediction)
    if file.name == "STS-B.tsv" and isinstance(prediction, int | float) and math.isfinite(prediction):
        return f"{min(5.0, max(0.0, float(prediction))):.3f}"
    return prediction


def _shown_index(index: Any) -> Any:
    return index if isinstance(index, int) else shown(index)


def _number(key: Any) -> Any:
    """`"17"` -> 17: keys are text in our files and numbers in the servers'."""
    return int(key) if INDEX.fullmatch(str(key)) else key


def _multirc(file: File, rows: Rows) -> list[dict[str, Any]]:
    """Answers inside questions inside passages, by ids like `0.3.17`."""
    passages: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in rows:
        passage, question, answer = [*str(row["id"]).split("."), "", ""][:3]
        answers = passages.setdefault(passage, {}).setdefault(question, [])
        answers.append({"idx": _number(answer), "label": _label(file, row["prediction"])})
    return [
        {
            "idx": _number(passage),
            "passage": {"questions": [{"idx": _number(q), "answers": answers} for q, answers in questions.items()]},
        }
        for passage, questions in passages.items()
    ]


def zipped(contents: dict[str, bytes]) -> bytes:
    """A zip that is the same bytes for the same contents: fixed times and rights, files at the root."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in contents.items():
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr, entry.create_system = zipfile.ZIP_DEFLATED, 0o644 << 16, 3
            archive.writestr(entry, data)
    return buffer.getvalue()


# ---- SQuAD and RACE -------------------------------------------------------------------------------------------------


def _squad(root: Path) -> tuple[dict[str, bytes], list[str]]:
    """`squad1/predictions.json`, `squad2/predictions.json` with `null_odds.json`: of the test set, else of dev."""
    contents: dict[str, bytes] = {}
    problems: list[str] = []
    for task, count in SQUAD.items():
        name = next((name for name in ("test", "dev") if (root / task / "test" / f"{name}.jsonl").exists()), None)
        if name is None:
            continue
        path = root / task / "test" / f"{name}.jsonl"
        rows, damage = _predictions(path)
        found = [("rows", f"has {len(rows):,} rows, not {count:,}")] if name == "dev" and len(rows) != count else []
        found += _twice(rows)
        found += [("text", f"question {r['id']}: no text") for r in rows if not isinstance(r["prediction"], str)]
        problems += [
            *damage,
            *(f"{path}: {text}" for text in ([] if damage else short(found))),
            *_model(root, task, [name]),
        ]
        contents[f"{task}/predictions.json"] = _json({str(row["id"]): row["prediction"] for row in rows})
        if task == "squad2":
            odds = {str(row["id"]): row.get("null_odds") for row in rows}
            bad = [("odds", f"question {key} has no null_odds") for key, value in odds.items() if not _finite(value)]
            problems += [f"{path}: {text}" for text in short(bad)]
            contents["squad2/null_odds.json"] = b"" if bad else _json(odds)
    if not contents:
        problems.append(f"{root} has neither squad1/test/dev.jsonl nor squad2/test/dev.jsonl; {PREDICT}")
    return contents, problems


def _race(root: Path) -> tuple[dict[str, bytes], list[str]]:
    """`race-middle.jsonl` …: lines with a question's id and the letter of its answer."""
    contents: dict[str, bytes] = {}
    problems: list[str] = []
    for task, count in RACE.items():
        path = root / task / "test" / "test.jsonl"
        if not path.exists():
            continue
        rows, damage = _predictions(path)
        answers = [{"id": row["id"], "answer": row["prediction"]} for row in rows]
        found = damage or _race_problems((answers, []), count)
        problems += [*(f"{path}: {text}" for text in found), *_model(root, task, ["test"])]
        contents[f"{task}.jsonl"] = "".join(json.dumps(row) + "\n" for row in answers).encode()
    if not contents:
        problems.append(f"{root} has none of {', '.join(f'{task}/test/test.jsonl' for task in RACE)}; {PREDICT}")
    return contents, problems


def _race_problems(read: tuple[Rows, list[str]], count: int | None = None) -> list[str]:
    rows, problems = read
    if problems:
        return problems
    counts = RACE.values() if count is None else [count]
    found = []
    if len(rows) not in counts:
        found.append(("rows", f"has {len(rows):,} rows, not {' or '.join(f'{count:,}' for count in counts)}"))
    for number, row in enumerate(rows, start=1):
        if set(row) != {"id", "answer"}:
            found.append(("keys", f"line {number} needs id and answer, it has {', '.join(map(repr, list(row)[:5]))}"))
        elif row["answer"] not in ("A", "B", "C", "D"):
            found.append(("letter", f"line {number}: the answer {shown(row['answer'])} is no letter from A to D"))
    return short([*found, *_twice(rows)])


def _twice(rows: Rows) -> list[tuple[str, str]]:
    counts = Counter(shown(row.get("id")) for row in rows)
    return [("twice", f"the id {key} is there {count} times") for key, count in counts.items() if count > 1]


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _json(value: Any) -> bytes:
    return (json.dumps(value) + "\n").encode()


def _answers(path: Path, kind: type) -> dict[str, Any]:
    """`{id: text}` or `{id: number}`. Raises ValueError for anything else."""
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({str(error)[:80]})") from None
    right = _finite if kind is float else lambda value: isinstance(value, str)
    if not isinstance(found, dict) or not all(right(value) for value in found.values()):
        raise ValueError(f"{path} is no JSON object from question ids to {'numbers' if kind is float else 'texts'}")
    return found
