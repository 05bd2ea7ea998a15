"""What several benchmarks stand on: stages run on real Wikipedia text, finished pieces, intervals of differences."""

from __future__ import annotations

import fcntl
import lzma
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import throughput  # noqa: E402

from frugalbert import run, stages  # noqa: E402
from frugalbert.fanout import Journal  # noqa: E402
from frugalbert.finetune.metrics import summary  # noqa: E402
from frugalbert.yamlfile import load  # noqa: E402

DATA = Path(os.environ.get("FRUGALBERT_DATA", ROOT.parent / "shared" / "data"))


def run_on_wikipedia(work: Path, yaml: str, megabytes: int) -> Path:
    """The stages of `yaml`, whose source is text/wiki.txt, below `work`/run; continued where they stood."""
    text = work / "text" / "wiki.txt"
    text.parent.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        with lzma.open(DATA / "enwiki2015-AA.txt.xz", "rb") as file:
            run.write_atomic(text, file.read(megabytes << 20))
    (work / "run.yaml").write_text(yaml)
    stages.run(load(work / "run.yaml", []), work / "run", work)
    return work / "run"


@contextmanager
def told() -> Iterator[None]:
    """A signal or a user's mistake ends the script in a sentence, with the product's exit codes: 128 + number, 2."""
    run.catch_signals()
    try:
        yield
    except run.Stopped as stop:
        print(f"{stop}; what is finished is kept, the same command goes on", file=sys.stderr)
        sys.exit(128 + stop.number)
    except (ValueError, OSError) as error:
        print(f"error: {run.sentence(error)}", file=sys.stderr)
        sys.exit(2)


class Finished(Journal):
    """The finished pieces of a study, known by what was asked: one that is stopped or killed goes on where it was.

    Beside each stand the commit and versions that found it.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._held = path.open("ab")
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path} is being written by another call; wait for it or stop it") from None
        super().__init__(path)
        self.known: dict[str, Any] = {entry["key"]: entry["result"] for entry in self.entries}

    def close(self) -> None:
        super().close()
        self._held.close()

    def get(self, asked: Any) -> Any:
        """What was found; None if it is not there."""
        return self.known.get(run.fingerprint(asked))

    def commits(self, asked: Iterable[Any]) -> list[str]:
        """Those that found these pieces."""
        keys = set(map(run.fingerprint, asked))
        return sorted({entry["by"]["commit"] or "unknown" for entry in self.entries if entry["key"] in keys})

    def result(self, asked: Any, work: Callable[[], Any]) -> Any:
        """What was found, or what `work` finds now."""
        key = run.fingerprint(asked)
        if key not in self.known:
            run.check_stop()
            found = work()
            if not found:  # asked again the next time
                return found
            self.known[key] = found
            about = throughput.environment()
            by = {name: about[name] for name in ("commit", "versions", "date", "load")}
            self.append({"key": key, "task": asked, "result": found, "by": by})
        return self.known[key]


def interval(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Mean of paired differences and its 95 % interval (Student's t), of the pairs that there are."""
    mean, _, (low, high) = summary([one - two for one, two in zip(mine, other, strict=False)])
    return {"mean": round(mean, 4), "low": round(low, 4), "high": round(high, 4)}
