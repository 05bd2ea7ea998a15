"""Agora (de Wynter, arXiv 2010.07990) as a loop over functions: settings and scarce examples in, the best student out.

A round: train a fresh student per setting; make new examples from those steering examples that the best one gets wrong;
have the teacher label them; let settings go. Steps 1 to 6 are the author's; step 7 (`survivors`), the transformations,
replay and what counts as a mistake outside binary tasks are our reading (docs/methods.md). The steering examples choose
settings and show mistakes, so what is reported must come from others: this module sees those only as `Sets.forbidden`,
texts that no new example may copy. Every round is a line of a journal, from which a killed run goes on.
"""

from __future__ import annotations

import operator
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from frugalbert import config, run
from frugalbert.fanout import Journal
from frugalbert.finetune.tasks import Example, Label
from frugalbert.finetune.transforms import Transform, copies

Theta = dict[str, Any]
Teach = Callable[[list[Example]], list[Label]]
Right = Callable[[Any, Any], bool]
ALL_GONE = "no setting is left"
NO_MISTAKES = "the best student makes no mistake"
TEACHER = 2 / 3
FAR = 0.05  # a teacher that much above the best student


@dataclass(frozen=True)
class Sets:
    """`train` grows; `steer` (E) chooses and shows mistakes; `forbidden` are dev and test sets."""

    train: list[Example]
    steer: list[Example]
    forbidden: Sequence[Example] = ()


@dataclass(frozen=True)
class Tools:
    """What the loop calls.

    fit: (training examples, settings, number of the round) -> per setting a fresh student's predictions on `steer`.
    transform: (mistakes, generator) -> examples near them, with the label of what each was made from.
    teach: examples -> labels; used with `labels: teacher` alone.
    right: (prediction, gold) -> whether it counts as right.
    identity: of all that these depend on; rounds of others are not continued.
    """

    fit: Callable[[list[Example], list[Theta], int], list[list[Label]]]
    transform: Transform
    teach: Teach | None = None
    right: Right = operator.eq
    identity: str = ""


@dataclass(frozen=True)
class Outcome:
    """`best` = {"round", "setting", "accuracy"} of the best student seen; `rounds` without texts; why it ended."""

    best: dict[str, Any]
    rounds: list[dict[str, Any]]
    stopped: str
    trainings: int
    examples: int
    teacher_calls: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class _State:
    """What the journal's lines add up to."""

    train: list[Example]
    settings: list[Theta]
    rounds: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] = field(default_factory=dict)
    wrong: list[int] = field(default_factory=list)
    """Where the best student seen is wrong."""
    trainings: int = 0
    examples: int = 0
    teacher_calls: int = 0
    stale: int = 0
    seconds: float = 0.0
    stopped: str = ""

    def absorb(self, entry: dict[str, Any]) -> None:
        """Add one round; the same whether it has just been played or was read."""
        accuracy = max(entry["accuracy"])
        self.stale += 1
        if not self.best or accuracy > self.best["accuracy"]:
            first = entry["accuracy"].index(accuracy)
            self.best = {"round": entry["round"], "setting": entry["settings"][first], "accuracy": accuracy}
            self.wrong, self.stale = entry["wrong"], 0
        self.trainings += len(entry["settings"])
        self.train = self.train + [Example(*new[:2], label=new[2]) for new in entry["new"]]
        self.examples += len(entry["new"])
        self.teacher_calls += entry["teacher_calls"]
        self.seconds += entry["seconds"]
        self.settings = entry["survivors"]
        self.stopped = entry["stopped"]
        shown = {name: value for name, value in entry.items() if name not in ("new", "wrong", "survivors")}
        self.rounds.append({**shown, "survivors": len(entry["survivors"])})


def play(settings: config.Agora, sets: Sets, thetas: list[Theta], tools: Tools, log: Path, seed: int) -> Outcome:
    """Agora's loop, continued from the rounds in the journal `log` if they are of these arguments.

    Terminates after at most `len(thetas)` rounds and n (n + 1) / 2 trainings, or at one of the limits of `settings`.
    Raises ValueError if a steering or forbidden text is among the training examples, and for limits that allow nothing.
    """
    _check(settings, sets, thetas)
    examples = [
        [example.digest, example.label] for part in (sets.train, sets.steer, sets.forbidden) for example in part
    ]
    identity = run.fingerprint([settings.model_dump(mode="json"), thetas, seed, examples, tools.identity])
    state = _State(sets.train, thetas)
    with _journal(log, identity) as book:
        for entry in book.entries[1:]:
            state.absorb(entry)
        while not (why := _reason(settings, state)):
            run.check_stop()
            started = time.monotonic()
            entry = _round(settings, sets, state, tools, seed)
            entry["seconds"] = round(time.monotonic() - started, 3)
            book.append(entry)
            state.absorb(entry)
            _tell(state)
    return Outcome(state.best, state.rounds, why, state.trainings, state.examples, state.teacher_calls)


def _check(settings: config.Agora, sets: Sets, thetas: list[Theta]) -> None:
    if not thetas or not sets.train or not sets.steer:
        raise ValueError("agora needs settings, training examples and steering examples")
    if settings.max_trainings is not None and settings.max_trainings < len(thetas):
        raise ValueError(
            f"agora.max_trainings is {settings.max_trainings}, but a round trains all {len(thetas)} settings; write at "
            "least that"
        )
    kept = {example.digest: example for example in [*sets.steer, *sets.forbidden]}
    for example in sets.train:
        if example.digest in kept:
            raise ValueError(
                f"agora: the training text {example.text[:60]!r} is also a steering, dev or test text; leave it out"
            )


def _journal(log: Path, identity: str) -> Journal:
    """The journal of rounds, begun anew if it is of other arguments or damaged inside."""
    book = Journal(log)
    if book.entries and (book.damaged or book.entries[0] != {"identity": identity}):
        run.say(f"{log}: rounds of other settings or data, or damaged; begun anew")
        book.close()
        log.unlink()
        book = Journal(log)
    if not book.entries:
        book.append({"identity": identity})
    return book


def _reason(settings: config.Agora, state: _State) -> str:
    """Why no further round begins, or nothing."""
    limits = [
        ("rounds", settings.max_rounds, len(state.rounds) + 1),
        ("trainings", settings.max_trainings, state.trainings + len(state.settings)),
        ("minutes", settings.max_minutes, state.seconds / 60),
    ]
    reached = [f"agora.max_{name}" for name, limit, value in limits if limit is not None and value > limit]
    if settings.patience is not None and state.stale >= settings.patience:
        reached.append("agora.patience")
    return state.stopped or ("" if state.settings else ALL_GONE) or next(iter(reached), "")


# ---- the teacher, and what is right ---------------------------------------------------------------------------------


def assess(settings: config.Agora, sets: Sets, teach: Teach | None, right: Right) -> float | None:
    """The teacher's accuracy on the steering examples; None if it labels nothing. Raises ValueError if it is too low.

    These calls are no part of `max_teacher_calls`.
    """
    if teach is None:
        return None
    told = teach([replace(example, label=None) for example in sets.steer])
    accuracy = sum(right(label, e.label) for label, e in zip(told, sets.steer, strict=True)) / len(told)
    if accuracy <= TEACHER and not settings.weak_teacher:
        raise ValueError(
            f"agora.teacher is right on {accuracy:.1%} of {len(told)} steering examples, but Agora needs more than two "
            "thirds; name a better one, or write agora.weak_teacher: true"
        )
    return accuracy


def about_teacher(teacher: float | None, best: float) -> str:
    """What has to be said beside results: how good the teacher was; learning from a far better one is distillation."""
    if teacher is None:
        return "no teacher: labels for an ablation"
    text = f"the teacher is right on {teacher:.1%} of the steering examples, the best student on {best:.1%}"
    return text + ("; this is distillation" if teacher - best > FAR else "")


def within(tolerance: float, train: Sequence[Example]) -> Right:
    """Regression as right and wrong: within `tolerance` standard deviations of the training labels is right."""
    reach = tolerance * float(np.std([float(cast("float", example.label)) for example in train]))
    return lambda predicted, gold: abs(predicted - gold) <= reach


# ---- a round --------------------------------------------------------------------------------------------------------


def _round(settings: config.Agora, sets: Sets, state: _State, tools: Tools, seed: int) -> dict[str, Any]:
    """Steps 1 to 7. The last round makes no examples, since nobody would be trained on them."""
    number = len(state.rounds) + 1
    predictions = tools.fit(state.train, state.settings, number)  # 1
    right = [[tools.right(p, e.label) for p, e in zip(row, sets.steer, strict=True)] for row in predictions]
    accuracy = [sum(row) / len(row) for row in right]
    best = accuracy.index(max(accuracy))  # 2
    wrong = [place for place, is_right in enumerate(right[best]) if not is_right]  # 3
    left = [state.settings[place] for place in survivors(settings.prune, state.settings, accuracy)]  # 6, 7
    entry = {
        "round": number,
        "settings": state.settings,
        "accuracy": accuracy,
        "train_examples": len(state.train),
        "mistakes": len(wrong),
        "wrong": wrong,
        "survivors": left,
        "new": [],
        "teacher_calls": 0,
        "stopped": "",
    }
    room, limit = _room(settings, state)
    if not left:
        return entry
    if not wrong or room == 0:
        return {**entry, "stopped": limit if wrong else NO_MISTAKES}
    draws = [wrong]
    if settings.replay and number % settings.replay == 0:
        draws.append(wrong if not state.best or accuracy[best] > state.best["accuracy"] else state.wrong)
    return entry | _grow(settings, sets, state, tools, draws, (room, [seed, number]))  # 4, 5


def _room(settings: config.Agora, state: _State) -> tuple[int, str]:
    """How many examples this round may add, and which limit says so."""
    limits = [(settings.max_examples_per_round, "agora.max_examples_per_round")]
    if settings.max_examples is not None:
        limits.append((settings.max_examples - state.examples, "agora.max_examples"))
    if settings.max_teacher_calls is not None and settings.labels == "teacher":
        limits.append((settings.max_teacher_calls - state.teacher_calls, "agora.max_teacher_calls"))
    return min(limits)


def _grow(
    settings: config.Agora, sets: Sets, state: _State, tools: Tools, draws: list[list[int]], room: tuple[int, list[int]]
) -> dict[str, Any]:
    """Steps 4 and 5, once per list of mistakes. `room` = (how many at most, seeds)."""
    known = {example.digest for example in state.train}
    made: list[Example] = []
    counts: Counter[str] = Counter(made=0, duplicates=0, copies=0)
    for draw, wrong in enumerate(draws):
        rng = np.random.default_rng([*room[1], draw])
        sources = [sets.steer[place] for place in wrong for _ in range(settings.per_mistake)]
        offered = tools.transform([sources[place] for place in rng.permutation(len(sources))], rng)
        fresh: dict[str, Example] = {}
        for place in rng.permutation(len(offered)).tolist():
            if offered[place].digest not in known:
                fresh[offered[place].digest] = offered[place]
        known |= fresh.keys()
        candidates = list(fresh.values())
        leaks = copies(candidates, [*sets.steer, *sets.forbidden], settings.max_overlap)
        kept = [example for place, example in enumerate(candidates) if place not in leaks]
        counts.update(made=len(offered), duplicates=len(offered) - len(fresh), copies=len(leaks))
        made += _labelled(settings.labels, kept[: room[0] - len(made)], sets, tools, rng)
    found: dict[str, Any] = dict(counts)
    found["new"] = [[example.text, example.text_b, example.label] for example in made]
    found["added"] = len(made)
    found["replayed"] = len(draws) > 1
    found["teacher_calls"] = len(made) if settings.labels == "teacher" else 0
    return found


def _labelled(labels: str, new: list[Example], sets: Sets, tools: Tools, rng: np.random.Generator) -> list[Example]:
    """Step 5: the teacher's labels; for ablations those of the mistakes (as they are), or any that occur."""
    if labels == "gold" or not new:
        return new
    if labels == "random":
        drawn = rng.integers(len(sets.train), size=len(new))
        return [replace(e, label=sets.train[place].label) for e, place in zip(new, drawn.tolist(), strict=True)]
    assert tools.teach is not None
    return [replace(example, label=label) for example, label in zip(new, tools.teach(new), strict=True)]


# ---- step 7 ---------------------------------------------------------------------------------------------------------


def survivors(rule: str, thetas: Sequence[Theta], accuracy: Sequence[float]) -> list[int]:
    """Which settings stay, in order: never all of them but for the last one, and always the best.

    `lcs`: root = the worst; it goes, and so do those that have the longest common subsequence of values with it, if
    they have any. `worst`: it alone. `halving`: the worse half. Of equally good ones the first is the best.
    """
    ranking = sorted(range(len(thetas)), key=lambda place: (accuracy[place], -place))
    if len(ranking) == 1:
        return []
    gone = ranking[: len(ranking) // 2] if rule == "halving" else ranking[:1]
    if rule == "lcs":
        values = [_values(theta, thetas) for theta in thetas]
        alike = {place: common(values[ranking[0]], values[place]) for place in ranking[1:]}
        most = max(alike.values())
        gone += [place for place, length in alike.items() if length == most and most > 0 and place != ranking[-1]]
    return [place for place in range(len(thetas)) if place not in gone]


def _values(theta: Theta, thetas: Sequence[Theta]) -> list[tuple[str, Any]]:
    """A setting as a sequence, without the keys in which no two of them differ."""
    return [(key, value) for key, value in theta.items() if any(other.get(key) != value for other in thetas)]


def common(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest common subsequence, by the usual dynamic programme."""
    row = [0] * (len(second) + 1)
    for item in first:
        before = row
        row = [0]
        for place, other in enumerate(second):
            row.append(before[place] + 1 if item == other else max(before[place + 1], row[place]))
    return row[-1]


def _tell(state: _State) -> None:
    last = state.rounds[-1]
    where = "" if state.stale else f" ({', '.join(f'{key} {value}' for key, value in state.best['setting'].items())})"
    run.say(
        f"Agora, round {last['round']}: {len(last['settings'])} settings on {last['train_examples']} examples, best "
        f"{max(last['accuracy']):.4f} on the steering examples{where}, {last.get('added', 0)} examples added, "
        f"{last['survivors']} settings left"
    )
