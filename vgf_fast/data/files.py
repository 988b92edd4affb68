"""Transitions of your own from .npz, .hdf5 and .parquet files, a part at a time.

A file has the fields of ``Dataset.from_arrays``: observations and next_observations [M, O], actions [M, A], rewards and
masks [M], and perhaps terminals [M]. In a Parquet file the first three are columns of lists.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from vgf_fast import checkpoints
from vgf_fast.data.dataset import (
    ACTION_CLIP,
    Dataset,
    check_column,
    trajectory_ends,
)
from vgf_fast.progress import progress_bar

FIELDS = ("observations", "actions", "next_observations", "rewards", "masks")
VECTORS = FIELDS[:3]
SUFFIXES = (".npz", ".hdf5", ".h5", ".parquet")
CHUNK_BYTES = 2**26
MEMORY_SHARE = 0.5  # of the machine's memory; what is larger is mapped from a file
MAPPED_SUFFIX = ".transitions"


class Column(NamedTuple):
    """A field of a file: rows, width (None of a vector [M]), dtype."""

    rows: int
    width: int | None
    dtype: np.dtype[Any]


class Source(ABC):
    """A file of transitions that is read in order."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @abstractmethod
    def columns(self) -> dict[str, Column]:
        """The known fields that the file has."""

    @abstractmethod
    def chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """A field, about so many rows at a time."""


class _Npz(Source):
    """Arrays of an .npz file, compressed or not, read as streams."""

    def columns(self) -> dict[str, Column]:
        found = {}
        with zipfile.ZipFile(self.path) as archive:
            for name in (*FIELDS, "terminals"):
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as stream:
                        found[name] = _column(self.path, name, *_header(stream)[::2])
        return found

    def chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
            shape, fortran, dtype = _header(stream)
            if fortran and len(shape) > 1:
                yield np.load(self.path)[name]
                return
            row = dtype.itemsize * int(np.prod(shape[1:]))
            for start in range(0, shape[0], rows):
                count = min(rows, shape[0] - start)
                data = stream.read(count * row)
                if len(data) < count * row:
                    raise EOFError(f"{name} ends in row {start + len(data) // row} of {shape[0]}")
                yield np.frombuffer(data, dtype).reshape(count, *shape[1:])


class _Hdf5(Source):
    """Datasets of an HDF5 file."""

    def columns(self) -> dict[str, Column]:
        with _h5py().File(self.path, "r") as file:
            known = [name for name in (*FIELDS, "terminals") if name in file]
            return {name: _column(self.path, name, file[name].shape, file[name].dtype) for name in known}

    def chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        with _h5py().File(self.path, "r") as file:
            for start in range(0, file[name].shape[0], rows):
                yield file[name][start : start + rows]


class _Parquet(Source):
    """Columns of a Parquet file: numbers, or lists of equal length."""

    def columns(self) -> dict[str, Column]:
        file = _parquet().ParquetFile(self.path)
        found = {}
        for name in (*FIELDS, "terminals"):
            if name in file.schema_arrow.names:
                first = next(iter(self.chunks(name, 1)), np.empty((0, 1) if name in VECTORS else (0,), np.float32))
                found[name] = _column(self.path, name, (file.metadata.num_rows, *first.shape[1:]), first.dtype)
        return found

    def chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        start = 0
        for batch in _parquet().ParquetFile(self.path).iter_batches(rows, columns=[name]):
            column = batch.column(0)
            if column.null_count:
                row = start + column.is_null().to_pylist().index(True)
                raise ValueError(f"{self.path}: {name} has nothing in row {row}, expected numbers")
            if name in VECTORS and hasattr(column, "flatten") and hasattr(column.type, "value_type"):
                flat = column.flatten()
                lengths = {len(one) for one in column.to_pylist()} if len(flat) % max(len(column), 1) else set()
                if len(lengths) > 1:
                    raise ValueError(f"{self.path}: {name} has lists of {sorted(lengths)} numbers, expected one length")
                yield flat.to_numpy(zero_copy_only=False).reshape(len(column), -1)
            else:
                yield column.to_numpy(zero_copy_only=False)
            start += len(column)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise ImportError(f"h5py cannot be imported ({error}): pip install 'vgf_fast[envs]'") from error
    return h5py


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"a Parquet file needs pyarrow ({error}): pip install pyarrow") from error
    return pyarrow.parquet


def _header(stream: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(stream)


def _column(path: Path, name: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Column:
    if dtype.kind not in "fiub":
        raise ValueError(f"{path}: {name} has dtype {dtype}, expected real numbers")
    if name in VECTORS and (dtype.kind != "f" or len(shape) > 2):
        what = "discrete actions are" if name == "actions" else "pixel and integer observations are"
        raise ValueError(
            f"{path}: {name} has shape {shape} and dtype {dtype}: {what} not supported, because the networks take "
            "vectors of real numbers"
        )
    if len(shape) == 2 and shape[1] == 1 and name not in VECTORS:
        shape = shape[:1]
    if len(shape) != (2 if name in VECTORS else 1):
        raise ValueError(f"{path}: {name} has shape {shape}, expected {'(M, width)' if name in VECTORS else '(M,)'}")
    return Column(shape[0], shape[1] if name in VECTORS else None, dtype)


def open_source(path: str | os.PathLike[str]) -> Source:
    """The reader of a file, by its ending. Raises ``FileNotFoundError``, and ``ValueError`` for another ending."""
    file = Path(path).expanduser()
    kinds: Mapping[str, type[Source]] = {".npz": _Npz, ".hdf5": _Hdf5, ".h5": _Hdf5, ".parquet": _Parquet}
    if file.suffix not in kinds:
        raise ValueError(f"{file} ends in {file.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise FileNotFoundError(f"no file of transitions at {file}")
    return kinds[file.suffix](file)


def load(
    path: str | os.PathLike[str],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    action_clip: float = ACTION_CLIP,
    memory_share: float = MEMORY_SHARE,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Dataset:
    """Load transitions of your own; their checks are those of ``Dataset.from_arrays``.

    The file is read a part at a time. On the CPU, transitions that take more than ``memory_share`` of the machine's
    memory are written as rows to a file of their own, and mapped from there: only what is sampled is read. A later call
    finds that file again, as long as the first one is the same.

    Args:
        path: .npz, .hdf5, .h5 or .parquet (needs pyarrow).
        device: where the transitions lie; default is the CPU.
        dtype: of the transitions, such as torch.bfloat16 for half the memory; the learner computes in its own.
        action_clip: as in ``Dataset.from_arrays``.
        memory_share: in [0, 1]; 0 maps whatever the size.
        cache_dir: folder of the mapped file; default is the folder of ``path``.
        progress: whether a bar is shown on a terminal.

    Raises:
        FileNotFoundError: no file. ImportError: h5py or pyarrow is missing.
        ValueError: a damaged file, missing fields, unequal lengths, integers or images, NaN, actions outside [-1, 1];
            the message names file, field and row.
    """
    source = open_source(path)
    if not 0.0 <= memory_share <= 1.0:
        raise ValueError(f"memory_share is {memory_share}, expected a number in [0, 1]")
    if not 0.0 < action_clip <= 1.0:
        raise ValueError(f"action_clip is {action_clip}, expected in (0, 1]")
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype}, expected a floating dtype of torch such as torch.float32")
    try:
        columns = _checked_columns(source)
        return _load(
            source, columns, torch.device(device or "cpu"), dtype, action_clip, memory_share, cache_dir, progress
        )
    except (OSError, EOFError, zipfile.BadZipFile, zlib.error, KeyError, RuntimeError) as error:
        if isinstance(error, (FileNotFoundError, torch.OutOfMemoryError)):
            raise
        raise ValueError(f"{source.path} is damaged, or not what its ending says ({error})") from error


def _checked_columns(source: Source) -> dict[str, Column]:
    try:
        columns = source.columns()
    except ValueError as error:
        # pyarrow's errors are ValueErrors that do not name the file.
        raise error if str(source.path) in str(error) else ValueError(f"{source.path}: {error}") from error
    missing = [name for name in FIELDS if name not in columns]
    if missing:
        raise ValueError(f"{source.path} has no {' and no '.join(missing)}; expected {', '.join(FIELDS)}")
    rows = columns["observations"].rows
    for name, column in columns.items():
        if column.rows != rows:
            raise ValueError(f"{source.path}: {name} has {column.rows} rows but observations has {rows}")
    if rows == 0:
        raise ValueError(f"{source.path} is empty: observations has 0 rows, expected at least 1")
    if columns["next_observations"].width != columns["observations"].width:
        raise ValueError(
            f"{source.path}: next_observations has width {columns['next_observations'].width}, expected "
            f"{columns['observations'].width}: that of observations"
        )
    return columns


def _load(
    source: Source,
    columns: Mapping[str, Column],
    device: torch.device,
    dtype: torch.dtype,
    action_clip: float,
    memory_share: float,
    cache_dir: str | os.PathLike[str] | None,
    progress: bool,
) -> Dataset:
    observation_dim, action_dim = columns["observations"].width or 0, columns["actions"].width or 0
    shape = (columns["observations"].rows, 2 * observation_dim + action_dim + 2)
    if device.type != "cpu" or shape[0] * shape[1] * dtype.itemsize <= memory_share * total_memory():
        storage = torch.empty(shape, dtype=dtype, device=device)
        return _fill(source, columns, storage, observation_dim, action_dim, action_clip, progress)
    folder = source.path.parent if cache_dir is None else Path(cache_dir).expanduser()
    # What is mapped depends on the file, the dtype and the clip.
    status = source.path.stat()
    key = f"{status.st_size:x}-{status.st_mtime_ns:x}-{str(dtype).removeprefix('torch.')}-{action_clip:.9g}"
    file = folder / f"{source.path.name}.{key}{MAPPED_SUFFIX}"
    if not file.is_file() or file.stat().st_size != shape[0] * shape[1] * dtype.itemsize:
        with checkpoints.replacing(file) as part:
            storage = _mapped(part, shape, dtype, shared=True)
            _fill(source, columns, storage, observation_dim, action_dim, action_clip, progress)
            del storage
    # Private pages: nobody can write to the file by way of a batch.
    storage = _mapped(file, shape, dtype, shared=False)
    return Dataset(storage, _ends(source, columns, storage, observation_dim, action_dim), observation_dim, action_dim)


def _mapped(file: Path, shape: tuple[int, int], dtype: torch.dtype, shared: bool) -> torch.Tensor:
    if shared:
        os.truncate(file, shape[0] * shape[1] * dtype.itemsize)
    return torch.from_file(str(file), shared=shared, size=shape[0] * shape[1], dtype=dtype).view(shape)


def _fill(
    source: Source,
    columns: Mapping[str, Column],
    storage: torch.Tensor,
    observation_dim: int,
    action_dim: int,
    action_clip: float,
    progress: bool,
) -> Dataset:
    """Read every field into its columns of the storage, checking it."""
    dataset = Dataset(storage, torch.zeros(len(storage), dtype=torch.bool), observation_dim, action_dim)
    rows = max(CHUNK_BYTES // (8 * max(observation_dim, action_dim)), 1)
    with progress_bar(f"reading {source.path.name}", total=len(FIELDS) * len(storage), enabled=progress) as advance:
        for name in FIELDS:
            target = getattr(dataset, name)
            start = 0
            for chunk in source.chunks(name, rows):
                part = _tensor(chunk)
                part = part.flatten() if columns[name].width is None else part
                if tuple(part.shape[1:]) != tuple(target.shape[1:]):
                    raise ValueError(f"{source.path}: {name} has width {part.shape[1]} in row {start}")
                rows_of = target[start : start + len(part)]
                rows_of.copy_(part)
                try:
                    check_column(name, part, rows_of, start)
                except ValueError as error:
                    raise ValueError(f"{source.path}: {error}") from error
                start += len(part)
                advance(len(part))
            if name == "actions":
                target.clamp_(-action_clip, action_clip)
    dataset.terminals = _ends(source, columns, storage, observation_dim, action_dim)
    return dataset


def _ends(
    source: Source, columns: Mapping[str, Column], storage: torch.Tensor, observation_dim: int, action_dim: int
) -> torch.Tensor:
    """[M], bool: where trajectories end, as the file says or as its observations tell."""
    if "terminals" not in columns:
        after = storage[:, observation_dim + action_dim : 2 * observation_dim + action_dim]
        return trajectory_ends(storage[:, :observation_dim], after)
    parts = [_tensor(chunk).flatten() for chunk in source.chunks("terminals", CHUNK_BYTES)]
    given = torch.cat(parts)
    bad = (given != 0) & (given != 1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{source.path}: terminals holds {given[row].item():.7g} in row {row}, expected 0 or 1")
    return given.bool().to(storage.device)


def _tensor(chunk: np.ndarray) -> torch.Tensor:
    native = np.ascontiguousarray(chunk.astype(chunk.dtype.newbyteorder("="), copy=False))
    return torch.from_numpy(native if native.flags.writeable else native.copy())


def total_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
