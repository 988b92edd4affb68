"""What the readers of files share: errors that name the file, and formats' libraries."""

from __future__ import annotations

import contextlib
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def reading(file: Path, kind: str = "", advice: str = "") -> Iterator[None]:
    """Name ``file`` in what is raised while it is read.

    Raises ``ValueError`` for content that cannot be read: "is damaged", then ``kind``, the cause and ``advice``. What
    the machine refuses, such as permission or memory, stays the ``OSError`` or ``MemoryError`` that it is.
    """
    try:
        with named(file):
            yield
    except OSError as error:
        # Libraries raise OSError of content too, without a number.
        if error.errno is None:
            raise ValueError(f"{file} is damaged{kind} ({error}){advice}") from error
        raise OSError(error.errno, f"cannot be read: {error.strerror}", str(file)) from error
    except (EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
        # RuntimeError is also that of deep recursion and of unknown compression.
        raise ValueError(f"{file} is damaged{kind} ({error}){advice}") from error


@contextlib.contextmanager
def named(source: Path | str) -> Iterator[None]:
    """Put the name of a file or a data set before what a ``ValueError`` says, unless it says it."""
    try:
        yield
    except ValueError as error:
        if str(source) in str(error):
            raise
        raise ValueError(f"{source}: {error}") from error


def h5py() -> Any:
    """The library of HDF5 files. Raises ``ImportError`` with the command that installs it."""
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"h5py cannot be imported ({error}): pip install 'vgf_fast[envs]'") from error
    return h5py


def npy_header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an array in .npy format; the stream is at its first number then."""
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)
