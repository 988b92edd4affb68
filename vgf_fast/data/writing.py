"""Files that several processes may want to write at once: one does, the others wait and use what it wrote."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


@contextlib.contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Hold the lock of what is written at ``path``, waiting until no other process does; its folder must be there.

    The kernel lets go of it when the process ends, however that happens. A file system without locks has none, and a
    folder that cannot be written to needs none.
    """
    lock = path.with_name(f".{path.name}.lock")
    while True:
        try:
            handle = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            yield
            return
        try:
            wait(handle)
            # Whoever held it has removed the file: another one may hold the lock of a new file by now.
            if is_open_at(handle, lock):
                with removing([lock]):
                    yield
                return
        finally:
            os.close(handle)


def wait(handle: int) -> None:
    """Lock an open file until it is closed, as soon as no other process has it locked."""
    with contextlib.suppress(OSError, ImportError):
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX)


def reserve(file: BinaryIO, size: int) -> None:
    """Give an empty file ``size`` bytes, and room on the disk for them. Raises ``OSError`` where there is none."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    else:
        file.truncate(size)


def is_open_at(handle: int, path: Path) -> bool:
    """Whether an open file is the one that a path leads to."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def removing(files: Iterable[Path]) -> Iterator[None]:
    """Remove what is left of some files at the end, whatever happened."""
    try:
        yield
    finally:
        for file in files:
            file.unlink(missing_ok=True)
