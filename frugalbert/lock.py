"""One process per run directory: a lock that the living keep and the dead leave."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows: the link in `Lock` still decides who wins
    fcntl = None


class Lock:
    """One process per run directory. Held by a file with host, process and boot; taken over only from the dead."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "lock"
        self._mine = json.dumps(_myself())

    def __enter__(self) -> Lock:
        with _guard(self.path.parent):
            if self.is_left():
                self.path.unlink(missing_ok=True)
            descriptor, name = tempfile.mkstemp(prefix=".tmp-lock-", dir=self.path.parent)
            with os.fdopen(descriptor, "w") as file:
                file.write(self._mine)
            try:
                os.link(name, self.path)  # unlike a rename, fails if another process was faster
            except FileExistsError:
                raise ValueError(f"{self.path.parent} was just taken by another process; wait for it") from None
            finally:
                os.unlink(name)
        return self

    def is_left(self) -> bool:
        """Whether there is a lock, of a process that is surely dead. Raises ValueError if it may be alive."""
        holder = self._holder()
        if holder is not None and not _is_dead(holder):
            raise ValueError(
                f"{self.path.parent} is in use by process {holder.get('pid')} on {holder.get('host')}; wait for it or "
                f"stop it (if it is surely gone, delete {self.path})"
            )
        return holder is not None

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):
            if self.path.read_text() == self._mine:
                self.path.unlink()

    def _holder(self) -> dict[str, Any] | None:
        try:
            return json.loads(self.path.read_text())
        except FileNotFoundError:
            return None
        except ValueError:
            return {"pid": "unknown", "host": "unknown (the lock file is damaged)"}


@contextlib.contextmanager
def _guard(directory: Path) -> Generator[None]:
    """Keeps two processes of one machine from judging the same stale lock at once."""
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return "unknown"


def _started(pid: int) -> str:
    """Start time of a process in clock ticks since boot; tells a recycled process id from the original."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    except (OSError, IndexError):
        return "unknown"


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot": _boot(), "started": _started(os.getpid())}


def _is_dead(holder: dict[str, Any]) -> bool:
    if holder.get("host") != socket.gethostname() or not isinstance(holder.get("pid"), int):
        return False
    if holder.get("boot") != _boot():
        return True
    try:
        os.kill(holder["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return _started(holder["pid"]) != holder.get("started")
