"""Fan-out: the journal survives cuts and flips; pools and Dask give the same as a loop; workers may die."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from frugalbert import fanout, run
from frugalbert.fanout import Journal, run_tasks
from tests.faults.rows import chance, often


def square(task):
    with open(task["log"], "a") as log:
        log.write(f"{task['n']}\n")
    return {"n": task["n"], "square": task["n"] ** 2}


def die_once(task):
    """Kills its process the first time it is called with `n` = 3."""
    if task["n"] == 3 and not Path(task["log"]).exists():
        Path(task["log"]).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return task["n"]


def die_always(task):
    if task["n"] == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return task["n"]


def fail(task):
    if task["n"] == 2:
        raise ValueError("the third file is bad; mend it")
    return task["n"]


def forever(task):
    Path(task["log"]).with_suffix(f".{os.getpid()}").touch()
    while True:
        time.sleep(0.05)


def tasks(folder: Path, count: int) -> list[dict]:
    return [{"n": number, "log": str(folder / "log")} for number in range(count)]


# ---- the journal ----------------------------------------------------------------------------------------------------


def filled(path: Path) -> bytes:
    with Journal(path) as journal:
        for number in range(20):
            journal.append({"key": f"k{number}", "result": {"text": "ä\n" * number, "none": None}})
    return path.read_bytes()


@pytest.mark.fault("R16")
def test_a_journal_cut_anywhere_opens_with_the_exact_prefix(tmp_path, case):
    path = tmp_path / "j"
    whole = filled(path)
    entries = Journal(path).entries
    for cut in range(1, 201):
        path.write_bytes(whole[:-cut])
        with case(), Journal(path) as journal:
            lines = whole[:-cut].count(b"\n")
            assert journal.entries == entries[:lines]
            assert journal.damaged == []
            journal.append("after")
        with Journal(path) as journal:
            assert journal.entries == [*entries[:lines], "after"]


@pytest.mark.fault("R16")
def test_a_flipped_bit_loses_only_its_line(tmp_path, case):
    path = tmp_path / "j"
    whole = filled(path)
    entries = Journal(path).entries
    generator = random.Random(chance())
    for _ in range(often(300, 2000)):
        place, bit = generator.randrange(len(whole)), 1 << generator.randrange(8)
        data = bytearray(whole)
        data[place] ^= bit
        path.write_bytes(data)
        line = whole.count(b"\n", 0, place)
        with case(), Journal(path) as journal:
            lost = [number for number, entry in enumerate(entries) if entry not in journal.entries]
            assert set(lost) <= {line, line + 1}  # a lost line end takes the line after it along
            assert line in lost
            if whole[place : place + 1] != b"\n":
                assert journal.damaged


@pytest.mark.fault("R7")
def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "j"
    with Journal(path) as journal:
        journal.append(1)
        write = os.write
        monkeypatch.setattr(fanout.os, "write", lambda descriptor, data: write(descriptor, data[:5]))
        with pytest.raises(OSError, match="No space"):
            journal.append(2)
        monkeypatch.undo()
        journal.append(3)
    assert Journal(path).entries == [1, 3]


# ---- this process and the pool --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_results_in_the_order_of_the_tasks_and_journalled_work_is_not_repeated(tmp_path, workers):
    work = tasks(tmp_path, 9)
    expected = [{"n": number, "square": number**2} for number in range(9)]
    journal = tmp_path / "j"
    assert run_tasks(square, work, journal=journal, workers=workers) == expected
    assert sorted(map(int, (tmp_path / "log").read_text().split())) == list(range(9))
    kept = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(kept[:4]) + kept[4][:-3])
    (tmp_path / "log").unlink()
    assert run_tasks(square, work, journal=journal, workers=workers) == expected
    done = {json.loads(line[9:])["result"]["n"] for line in kept[:4]}
    assert set(map(int, (tmp_path / "log").read_text().split())) == set(range(9)) - done


def test_a_changed_task_is_another_task(tmp_path):
    work = tasks(tmp_path, 2)
    run_tasks(square, work, journal=tmp_path / "j", workers=1)
    assert run_tasks(square, [work[0], {**work[1], "n": 5}], journal=tmp_path / "j", workers=1)[1]["square"] == 25
    same = run_tasks(square, [work[0], work[0]], journal=tmp_path / "j", workers=1)
    assert [result["n"] for result in same] == [0, 0]
    assert (tmp_path / "log").read_text().split() == ["0", "1", "5", "0"]


@pytest.mark.fault("R21")
def test_a_worker_that_dies_is_replaced(tmp_path):
    assert run_tasks(die_once, tasks(tmp_path, 8), journal=tmp_path / "j", workers=2) == list(range(8))
    assert (tmp_path / "log").exists()


@pytest.mark.fault("R21")
def test_a_task_that_always_kills_its_worker_is_found(tmp_path):
    with pytest.raises(ValueError, match=r'worker process died 4 times at the same task \(\{"n": 3.*memory'):
        run_tasks(die_always, tasks(tmp_path, 8), journal=tmp_path / "j", workers=2)
    assert sorted(entry["result"] for entry in Journal(tmp_path / "j").entries) == [0, 1, 2, 4, 5, 6, 7]


@pytest.mark.fault("R21")
@pytest.mark.parametrize("workers", [1, 2])
def test_an_error_of_a_task_is_the_users_error(tmp_path, workers):
    with pytest.raises(ValueError, match="the third file is bad; mend it"):
        run_tasks(fail, tasks(tmp_path, 4), journal=tmp_path / "j", workers=workers)


UNGUARDED = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from frugalbert import fanout
from tests.test_fanout import square, tasks
folder = Path(sys.argv[1])
try:
    fanout.run_tasks(square, tasks(folder, 4), journal=folder / str(len(list(folder.iterdir()))), workers=2)
except ValueError as error:
    print("said:", error)
"""


def test_a_script_whose_workers_cannot_begin(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(UNGUARDED.format(root=str(Path(__file__).parents[1])))
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True, timeout=120)
    said = [line for line in done.stdout.splitlines() if line.startswith("said")]
    assert len(said) == 1
    assert "worker processes end before they begin" in said[0]
    assert 'call frugalbert below `if __name__ == "__main__":`' in said[0]
    assert not (tmp_path / "log").exists()


DRIVER = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests import test_fanout
from frugalbert import fanout, run
if __name__ == "__main__":
    run.catch_signals()
    folder = Path(sys.argv[1])
    try:
        fanout.run_tasks(test_fanout.forever, test_fanout.tasks(folder, 5), journal=folder / "j", workers=2)
    except run.Stopped as stop:
        sys.exit(128 + stop.number)
"""


@pytest.mark.fault("R3")
@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_signal_to_the_group_or_the_driver_leaves_no_worker_behind(tmp_path, number, code):
    script = tmp_path / "driver.py"
    script.write_text(DRIVER.format(root=str(Path(__file__).parents[1])))
    driver = subprocess.Popen([sys.executable, script, tmp_path], start_new_session=True)
    while len(pids := [int(path.suffix[1:]) for path in tmp_path.glob("log.*")]) < 2:
        assert driver.poll() is None
        time.sleep(0.02)
    if number == signal.SIGKILL:
        driver.kill()
    else:
        os.killpg(driver.pid, number)
    assert driver.wait(timeout=60) == code
    deadline = time.monotonic() + 60
    while any(map(alive, pids)):
        assert time.monotonic() < deadline, "a worker outlived its driver"
        time.sleep(0.02)


STUCK = """
import multiprocessing, os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests import test_fanout
from frugalbert import fanout

def stop_all():
    if (folder / "j").read_bytes().count(10) == 4:
        for child in multiprocessing.active_children():
            os.kill(child.pid, signal.SIGSTOP)
    return {{}}

if __name__ == "__main__":
    folder = Path(sys.argv[1])
    fanout.run_tasks(
        test_fanout.square, test_fanout.tasks(folder, 4), journal=folder / "j", workers=2, observe=stop_all
    )
"""


@pytest.mark.fault("R21")
def test_workers_that_are_stuck_when_all_is_done_are_not_waited_for(tmp_path):
    """As one is that waits for a lock which a killed worker took with it."""
    script = tmp_path / "driver.py"
    script.write_text(STUCK.format(root=str(Path(__file__).parents[1])))
    subprocess.run([sys.executable, script, tmp_path], timeout=60, check=True)
    assert len(fanout.Journal(tmp_path / "j").entries) == 4


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except OSError:
        return False


# ---- Dask -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster():
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    import dask

    settings = {"processes": True, "n_workers": 2, "threads_per_worker": 1, "dashboard_address": None}
    with (
        dask.config.set({"distributed.comm.timeouts.connect": "3s"}),  # how long results of dead workers are asked for
        distributed.LocalCluster(host="127.0.0.1", **settings) as found,
    ):
        yield found.scheduler_address


def test_dask_gives_the_same_and_continues_the_journal(tmp_path, cluster):
    work = tasks(tmp_path, 7)
    expected = run_tasks(square, work, journal=tmp_path / "a", workers=1)
    assert run_tasks(square, work, journal=tmp_path / "b", workers=1, scheduler=cluster) == expected
    (tmp_path / "log").unlink()
    assert run_tasks(square, work, journal=tmp_path / "b", workers=1, scheduler=cluster) == expected
    assert not (tmp_path / "log").exists()


def test_dask_repeats_equal_calls(tmp_path, cluster):
    run_tasks(square, tasks(tmp_path, 1) * 3, journal=tmp_path / "j", workers=1, scheduler=cluster)
    assert (tmp_path / "log").read_text().split() == ["0", "0", "0"]


@pytest.mark.fault("R21")
def test_dask_errors_and_dead_workers(tmp_path, cluster):
    with pytest.raises(ValueError, match="the third file is bad; mend it"):
        run_tasks(fail, tasks(tmp_path, 4), journal=tmp_path / "a", workers=1, scheduler=cluster)
    assert run_tasks(die_once, tasks(tmp_path, 6), journal=tmp_path / "b", workers=1, scheduler=cluster) == list(
        range(6)
    )


@pytest.mark.fault("S13")
def test_no_scheduler_and_other_versions_are_one_sentence(tmp_path, cluster, monkeypatch):
    with pytest.raises(ValueError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:1 "):
        monkeypatch.setattr(fanout, "PATIENCE", 1)
        run_tasks(square, tasks(tmp_path, 1), journal=tmp_path / "j", workers=1, scheduler="tcp://127.0.0.1:1")
    with pytest.raises(ValueError, match="has numpy .*, here it is 0.0; install the same"):
        monkeypatch.setattr(fanout, "versions", lambda: run.versions() | {"numpy": "0.0"})
        run_tasks(square, tasks(tmp_path, 1), journal=tmp_path / "j", workers=1, scheduler=cluster)


@pytest.mark.fault("S13")
def test_workers_that_are_on_their_way_are_waited_for(tmp_path, monkeypatch):
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")
    settings = {"processes": False, "protocol": "tcp://", "n_workers": 0, "dashboard_address": ":0"}
    with distributed.LocalCluster(host="127.0.0.1", **settings) as empty:
        places = {"journal": tmp_path / "j", "workers": 1, "scheduler": empty.scheduler_address}
        with monkeypatch.context() as patch:
            patch.setattr(fanout, "PATIENCE", 1)
            with pytest.raises(ValueError, match="has no workers; start some with `dask worker`"):
                run_tasks(square, tasks(tmp_path, 2), **places)
        wait = distributed.Client.wait_for_workers

        def start_and_wait(client, count, timeout):
            empty.scale(1)
            wait(client, count, timeout)

        monkeypatch.setattr(distributed.Client, "wait_for_workers", start_and_wait)
        assert [found["square"] for found in run_tasks(square, tasks(tmp_path, 2), **places)] == [0, 1]


def test_a_missing_extra_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(ValueError, match=r"pip install 'frugalbert\[cluster\]'"):
        run_tasks(square, tasks(tmp_path, 1), journal=tmp_path / "j", workers=1, scheduler="tcp://127.0.0.1:1")


@pytest.mark.fault("S13")
@pytest.mark.parametrize(
    ("scheduler", "warned"),
    [("tcp://10.1.2.3:8786", 1), ("host:8786", 1), ("tls://10.1.2.3:8786", 0), ("tcp://127.0.0.1:8786", 0)],
)
def test_an_open_scheduler_is_warned_of(scheduler, warned, tmp_path, monkeypatch, capsys):
    distributed = pytest.importorskip("distributed", reason="the extra `cluster` is not installed")

    def refused(*arguments, **options):
        raise OSError("nobody there")

    monkeypatch.setattr(distributed, "Client", refused)
    with pytest.raises(ValueError, match="no Dask scheduler answers"):
        run_tasks(square, tasks(tmp_path, 1), journal=tmp_path / "j", workers=1, scheduler=scheduler)
    assert capsys.readouterr().err.count("is not encrypted and runs the code of whoever reaches it") == warned


@pytest.mark.fault("R21")
def test_workers_that_are_gone_are_noticed(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(fanout.time, "monotonic", lambda: now[0])
    there = {"tcp://a": 1}
    watch = fanout._watch(lambda: there, "tcp://s")
    for _ in range(100):
        now[0] += 11.0
        watch()
    there.clear()
    with pytest.raises(ValueError, match="all workers .* are gone"):
        for _ in range(100):
            now[0] += 11.0
            watch()
    assert 1100 + 300 < now[0] < 1100 + 340
