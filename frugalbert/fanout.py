"""Work that fans out: one function, many independent tasks, many processes or machines, and a journal.

Tasks and results are JSON. Every finished task is one line of an append-only journal, so a driver that dies continues
where it stood; a task may run more than once (a worker died) and must therefore be idempotent: write under a temporary
name, rename. By default a pool of spawned processes works; with a Dask scheduler, the machines behind it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, BrokenExecutor, CancelledError, Executor, Future, wait
from pathlib import Path
from typing import Any

from frugalbert.progress import Progress, reason
from frugalbert.run import check_stop, say, versions

Task = dict[str, Any]
Function = Callable[[Task], Any]
BREAKS = 3  # a task that was under way in so many breakdowns runs alone, and at the next one counts as their cause
PATIENCE = 20.0  # seconds for a Dask scheduler to answer


# ---- the journal ----------------------------------------------------------------------------------------------------


class Journal:
    """Append-only JSON lines, each with its CRC-32; one writer. `entries` are the sound lines, in order.

    A torn last line (the writer died) is cut off; a damaged line inside is left out and its number is in `damaged`.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.entries, self.damaged, whole = read_journal(self.path)
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.ftruncate(self._descriptor, whole)
        if self.damaged:
            say(f"{self.path}: line {', '.join(map(str, self.damaged[:5]))} is damaged; that work is done again")

    def append(self, entry: Any) -> None:
        """Write one entry; it is on the disk when this returns."""
        body = json.dumps(entry, separators=(",", ":"), allow_nan=False).encode()
        line = b"%08x %b\n" % (zlib.crc32(body), body)
        written = os.write(self._descriptor, line)
        if written < len(line):  # a full disk: the half line must not spoil the next one
            os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size - written)
            raise OSError(28, "No space left on device", str(self.path))
        os.fsync(self._descriptor)
        self.entries.append(entry)

    def close(self) -> None:
        os.close(self._descriptor)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def read_journal(path: Path) -> tuple[list[Any], list[int], int]:
    """(sound entries, numbers of damaged lines, bytes up to the end of the last whole line) of a file or of none."""
    data = path.read_bytes() if path.exists() else b""
    whole = data.rfind(b"\n") + 1
    lines = [_read_line(line) for line in data[:whole].split(b"\n")[:-1]]
    entries = [entry[0] for entry in lines if entry]
    return entries, [number for number, entry in enumerate(lines, 1) if not entry], whole


def _read_line(line: bytes) -> tuple[Any] | None:
    """`(entry,)`, or None if the line is damaged (an entry may itself be null)."""
    checksum, separator, body = line.partition(b" ")
    if separator and checksum == b"%08x" % zlib.crc32(body):
        with contextlib.suppress(ValueError):
            return (json.loads(body),)
    return None


# ---- tasks ----------------------------------------------------------------------------------------------------------


def run_tasks(
    function: Function,
    tasks: list[Task],
    *,
    journal: Path,
    workers: int,
    scheduler: str | None = None,
    label: str = "tasks",
    observe: Callable[[], dict[str, Any]] | None = None,
) -> list[Any]:
    """`[function(task) for task in tasks]`, done by many, without what `journal` knows already.

    `function` is a module-level function. One worker means: in this process. An error of a task ends the work and is
    raised here; finished tasks stay in the journal. `observe` gives further figures for the progress line.
    """
    keys = _keys(function, tasks)
    with Journal(journal) as book:
        results: dict[str, Any] = {}
        for entry in book.entries:
            results.setdefault(entry["key"], entry["result"])
        todo = [(key, task) for key, task in zip(keys, tasks, strict=True) if key not in results]
        if todo:
            with Progress(label, len(tasks), "tasks") as progress:

                def done() -> None:
                    progress.update(sum(key in results for key in keys), **(observe() if observe else {}))

                for key, result in _work(function, todo, workers, scheduler, book.path.resolve(), done):
                    result = json.loads(json.dumps(result, allow_nan=False))  # the same as after a restart
                    book.append({"key": key, "result": result})
                    results[key] = result
                    done()
    return [results[key] for key in keys]


def _keys(function: Function, tasks: list[Task]) -> list[str]:
    """A name per task from what it is, so that a changed task is never taken for the journalled one."""
    seen: Counter[str] = Counter()
    keys = []
    for task in tasks:
        text = json.dumps([function.__module__, function.__qualname__, task], sort_keys=True, allow_nan=False)
        name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest()
        keys.append(f"{name}-{seen[name]}")
        seen[name] += 1
    return keys


def _work(
    function: Function,
    todo: list[tuple[str, Task]],
    workers: int,
    scheduler: str | None,
    shared: Path,
    tick: Callable[[], object],
) -> Iterator[tuple[str, Any]]:
    """(key, result) of every task, in the order of completion. `shared` is a file every machine must see."""
    if scheduler:
        with _dask(scheduler, shared) as (executor, size, watch):
            yield from _drain(function, deque(todo), executor, size, lambda: (tick(), watch()))
    elif workers == 1:
        for key, task in todo:
            check_stop()
            yield key, function(task)
    else:
        yield from _pool(function, todo, workers, tick)


def _drain(
    function: Function, queue: deque[tuple[str, Task]], executor: Executor, size: int, tick: Callable[[], object]
) -> Iterator[tuple[str, Any]]:
    """Keep `2 * size` tasks under way. On an error, what has not finished is back in `queue`."""
    running: dict[Future[Any], tuple[str, Task]] = {}
    try:
        while queue or running:
            check_stop()
            while queue and len(running) < 2 * size:
                running[executor.submit(function, queue[0][1])] = queue[0]
                queue.popleft()
            finished, _ = wait(running, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in finished:
                result = future.result()
                yield running.pop(future)[0], result
            tick()
    finally:
        for future in running:
            future.cancel()
        queue.extendleft(reversed(running.values()))


# ---- processes of this machine --------------------------------------------------------------------------------------


def _pool(
    function: Function, todo: list[tuple[str, Task]], workers: int, tick: Callable[[], object]
) -> Iterator[tuple[str, Any]]:
    """Spawned processes; a pool that lost one is built again.

    A task that keeps killing its worker is found by running the suspects alone; the others are finished first.
    """
    queue, deadly, broken = deque(todo), list[Task](), 0
    breaks: Counter[str] = Counter()
    begun = multiprocessing.get_context("spawn").Value("b", 0, lock=False)  # a lock could be taken away by a dead one
    while queue:
        suspects = [entry for entry in queue if breaks[entry[0]] >= BREAKS]
        alone = len(suspects) == len(queue)
        part = deque(suspects[:1] if alone else [entry for entry in queue if breaks[entry[0]] < BREAKS])
        rest = [entry for entry in queue if entry not in part]
        try:
            with _processes(1 if alone else min(workers, len(part)), begun) as executor:
                yield from _drain(function, part, executor, 1 if alone else workers, tick)
        except BrokenExecutor:
            check_stop()  # a signal to the whole process group is no breakdown
            broken += 1
            if broken > BREAKS and not begun.value:
                raise ValueError(
                    "worker processes end before they begin: each reads the program's main script first; if that is "
                    'yours, call frugalbert below `if __name__ == "__main__":`, or write machine.workers: 1'
                ) from None
            if alone:
                deadly.append(part.popleft()[1])
            breaks.update(key for key, _ in list(part)[: 2 * workers])
        queue = deque([*part, *rest])
    if deadly:
        raise ValueError(
            f"a worker process died {BREAKS + 1} times at the same task ({_short(deadly[0])}), most likely for lack of "
            "memory; free some, or write a smaller machine.workers"
        )


def _short(task: Task) -> str:
    text = json.dumps(task, ensure_ascii=False)
    return text if len(text) <= 160 else text[:157] + "…"


@contextlib.contextmanager
def _processes(count: int, begun: Any) -> Iterator[Executor]:
    """A process pool whose processes are gone when the block ends: at once, whatever they are doing. `begun` becomes 1
    with the first that works."""
    from concurrent.futures import ProcessPoolExecutor

    before = set(multiprocessing.active_children())
    spawn = multiprocessing.get_context("spawn")
    executor = ProcessPoolExecutor(count, spawn, initializer=_be_a_worker, initargs=(begun,))
    try:
        yield executor
    finally:
        # Tasks are idempotent, and waiting for them could take longer than whoever stops us waits. Idle workers are not
        # asked to end either: they could wait for a lock that a killed one took with it.
        for child in set(multiprocessing.active_children()) - before:
            child.kill()
        executor.shutdown(wait=True, cancel_futures=True)


def _be_a_worker(begun: Any) -> None:
    """Leave signals to the driver, which ends its workers itself; die if the driver is gone."""
    begun.value = 1
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


# ---- Dask -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _dask(scheduler: str, shared: Path) -> Iterator[tuple[Executor, int, Callable[[], None]]]:
    """(executor, worker threads, a check that some are left) of a running cluster.

    Whoever reaches the scheduler's port can run code on it and on us: it is inside the trust boundary.
    """
    try:
        from distributed import Client, KilledWorker
    except ImportError:
        raise ValueError(
            "machine.scheduler needs Dask; install it with `pip install 'frugalbert[cluster]'` or remove the key"
        ) from None
    if not scheduler.startswith(("tls://", "tcp://127.", "tcp://localhost")):
        say(f"{scheduler} is not encrypted and runs the code of whoever reaches it; see Dask's TLS settings (tls://…)")
    try:
        client = Client(scheduler, timeout=PATIENCE, set_as_default=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"no Dask scheduler answers at {scheduler} ({reason(error)}); start one with `dask scheduler`, or "
            "remove machine.scheduler"
        ) from None
    try:
        with contextlib.suppress(TimeoutError):
            client.wait_for_workers(1, timeout=PATIENCE)  # those that died may be on their way back
        found: Any = client.nthreads()
        threads = sum(found.values())
        if not threads:
            raise ValueError(f"the Dask scheduler at {scheduler} has no workers; start some with `dask worker`")
        _check_workers(client.run(_probe, str(shared)), shared)
        yield client.get_executor(pure=False), threads, _watch(client.nthreads, scheduler)
    except KilledWorker as error:
        raise ValueError(
            f"a task killed its Dask worker again and again ({reason(error)}); give the workers more memory"
        ) from None
    except (CancelledError, ConnectionError, ModuleNotFoundError) as error:
        raise ValueError(
            f"the Dask cluster at {scheduler} does not work any more or lacks frugalbert ({reason(error)}); what "
            "is done is kept, run again"
        ) from None
    finally:
        with contextlib.suppress(Exception):
            client.close(timeout=5)


def _probe(shared: str) -> dict[str, str]:
    """What a worker has and sees; runs there."""
    return versions() | {"sees": str(Path(shared).exists())}


def _check_workers(found: dict[str, dict[str, str]], shared: Path) -> None:
    """Refuse workers that do not see the files, or have other packages: results would depend on who did what."""
    mine = versions()
    for worker, theirs in found.items():
        if theirs["sees"] != "True":
            raise ValueError(
                f"the Dask worker {worker} does not see {shared}; put the run on a disk all machines share"
            )
        for name in mine.keys() - {"platform"}:
            if theirs.get(name) != mine[name]:
                raise ValueError(
                    f"the Dask worker {worker} has {name} {theirs.get(name)}, here it is {mine[name]}; install the "
                    "same versions everywhere"
                )


def _watch(workers: Callable[[], Any], scheduler: str, patience: float = 300.0) -> Callable[[], None]:
    """A function that raises once it has seen no worker for `patience` seconds; it asks every ten."""
    asked = seen = time.monotonic()

    def watch() -> None:
        nonlocal asked, seen
        now = time.monotonic()
        if now - asked >= 10.0:
            asked = now
            seen = now if workers() else seen
            if now - seen > patience:
                raise ValueError(f"all workers of the Dask scheduler at {scheduler} are gone; start some and run again")

    return watch
