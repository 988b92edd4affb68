"""Locks of directories: one run at a time, and no lock that outlives its holder."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

LOCK_FILE = ".lock"


class InUseError(OSError):
    """Another process works in a directory, or on a file; the message says which, where and since when."""


def lock(handle: int) -> bool | None:
    """Lock an open file for as long as it is open: False if another has it locked, None where there are no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextlib.contextmanager
def holding(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Have a directory to oneself, which is made if it is not there, and removed again if it then stays empty.

    The kernel frees the lock when its holder ends, however that happens. A file system without locks has none.
    Raises ``InUseError``.
    """
    directory = Path(directory)
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK_FILE
    handle = _open_locked(path, directory)
    inherited = [handle]

    def forget() -> None:
        """Let go in a forked child: one that outlives this process must not keep the lock."""
        while inherited:
            os.close(inherited.pop())

    os.register_at_fork(after_in_child=forget)
    try:
        started = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        os.write(handle, json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}).encode())
        yield
    finally:
        inherited.clear()
        # First the name, then the lock: whoever waits for neither finds a file of its own.
        path.unlink(missing_ok=True)
        os.close(handle)
        if made:
            with contextlib.suppress(OSError):
                directory.rmdir()


def _open_locked(path: Path, directory: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        if lock(handle) is False:
            about = os.read(handle, 4096)
            os.close(handle)
            raise InUseError(f"{directory} is in use by {_holder(about)}: wait, or choose another directory")
        # The last holder may have removed the name between the two calls.
        with contextlib.suppress(FileNotFoundError):
            if os.fstat(handle).st_ino == path.stat().st_ino:
                os.ftruncate(handle, 0)
                return handle
        os.close(handle)


def _holder(about: bytes) -> str:
    try:
        holder = json.loads(about)
        return f"process {holder['pid']} on {holder['host']} since {holder['started']}"
    except (ValueError, KeyError, TypeError):
        # It has the lock, and has not yet said who it is.
        return "another process"
