"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from vgf_fast.common import locks

_PARTIAL = ".partial"  # ends the names of folders of files that are being written


def folder_of(name: str, value: str | os.PathLike[str]) -> Path:
    """The path that an argument gives. Raises ``TypeError`` or ``ValueError`` naming it for what can be no path."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a path")
    path = Path(value)
    if "\0" in str(path):
        raise ValueError(f"{name} is {str(path)!r}, expected a path without null characters")
    return path


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path; on success its file is flushed to disk and renamed to ``path``, else removed.

    Whoever reads ``path`` sees the old file or the new one, never a part, also when the process is killed. The file is
    there, empty, and beside it may be others, which go with it. An ``OSError`` names ``path``.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{glob.escape(target.name)}.*{_PARTIAL}"):
        _remove_abandoned(leftover)
    try:
        with _own_folder(target) as folder:
            temporary = folder / target.name
            temporary.touch()
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            # Some writers make the file private; it gets what the user's umask says.
            umask = os.umask(0)
            os.umask(umask)
            temporary.chmod(0o666 & ~umask)
            os.replace(temporary, target)
    except OSError as error:
        if error.errno is not None and (error.filename is None or _PARTIAL in str(error.filename)):
            error.filename, error.filename2 = str(target), None
        raise
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


@contextlib.contextmanager
def _own_folder(target: Path) -> Iterator[Path]:
    """A folder beside ``target``, locked for as long as its process lives: nobody else removes it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=_PARTIAL, dir=target.parent))
        # Another process may take it for an abandoned one before it is locked.
        with contextlib.suppress(FileNotFoundError):
            handle = os.open(folder, os.O_RDONLY)
            if locks.lock(handle) is not False and folder.is_dir():
                break
            os.close(handle)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(handle)


def _remove_abandoned(leftover: Path) -> None:
    """Remove what a process that is gone was writing."""
    try:
        handle = os.open(leftover, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        if locks.lock(handle):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)
    finally:
        os.close(handle)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all. Raises ``OSError`` where it cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
