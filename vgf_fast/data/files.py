"""Transitions of your own from .npz, .hdf5 and .parquet files, a part at a time.

A file has the fields of ``Dataset.from_arrays``: observations and next_observations [M, O], actions [M, A], rewards and
masks [M], and perhaps terminals [M]. In a Parquet file the first three are columns of lists.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike

from vgf_fast.common.arrays import as_tensor
from vgf_fast.common.bounds import ActionBounds
from vgf_fast.common.files import replacing
from vgf_fast.common.memory import total_memory
from vgf_fast.common.progress import progress_bar
from vgf_fast.data.dataset import (
    ACTION_CLIP,
    Dataset,
    allocate,
    check_column,
    check_storage,
    check_widths,
    trajectory_ends,
)
from vgf_fast.data.reading import h5py, named, npy_header, reading
from vgf_fast.data.writing import reserve, waiting_for

FIELDS = ("observations", "actions", "next_observations", "rewards", "masks")
VECTORS = FIELDS[:3]
SUFFIXES = (".npz", ".hdf5", ".h5", ".parquet")
CHUNK_BYTES = 2**26
MEMORY_SHARE = 0.5  # of the machine's memory; what is larger is mapped from a file
MAPPED_SUFFIX = ".transitions"
HASHED_PARTS, HASHED_BYTES = 64, 2**20  # of a file; one that is larger than all of them is hashed in parts


class Column(NamedTuple):
    """A field of a file: rows, width (None of a vector [M]), dtype."""

    rows: int
    width: int | None
    dtype: np.dtype[Any]


class Source(ABC):
    """A file of transitions that is read in order.

    ``keys`` are the parts of observations that are dicts, in the order in which they are put side by side.
    """

    def __init__(self, path: Path, keys: Sequence[str] = ()) -> None:
        self.path = path
        self.keys = tuple(keys)

    def columns(self) -> dict[str, Column]:
        """The known fields that the file has. Raises ``ValueError`` that names the file."""
        with self._reading():
            return self._columns()

    def chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        """A field, about so many rows at a time. Raises ``ValueError`` that names the file."""
        with self._reading():
            yield from self._chunks(name, rows)

    def _reading(self) -> AbstractContextManager[None]:
        return reading(self.path, ", or not what its ending says")

    def _chosen(self, name: str, available: Sequence[str]) -> tuple[str, ...]:
        """The keys to read of a dict field that has the keys ``available``."""
        named = f"{self.path}: {name} is a dict of {', '.join(available)}"
        if name not in ("observations", "next_observations"):
            raise ValueError(f"{named}, expected one array")
        if not self.keys:
            raise ValueError(
                f"{named}: choose what the policy shall see, such as observation_keys={tuple(available)} of "
                "vgf_fast.data.files.load, or write it side by side into one array"
            )
        missing = [key for key in self.keys if key not in available]
        if missing:
            raise ValueError(f"{named}, expected {' and '.join(missing)} among them, from observation_keys")
        return self.keys

    @abstractmethod
    def _columns(self) -> dict[str, Column]: ...

    @abstractmethod
    def _chunks(self, name: str, rows: int) -> Iterator[np.ndarray]: ...


class _Npz(Source):
    """Arrays of an .npz file, compressed or not, read as streams."""

    def _columns(self) -> dict[str, Column]:
        columns = {}
        with zipfile.ZipFile(self.path) as archive:
            for name in (*FIELDS, "terminals"):
                if f"{name}.npy" in archive.namelist():
                    with archive.open(f"{name}.npy") as stream:
                        columns[name] = _column(self.path, name, *npy_header(stream)[::2])
        return columns

    def _chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        with zipfile.ZipFile(self.path) as archive, archive.open(f"{name}.npy") as stream:
            shape, fortran, dtype = npy_header(stream)
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
    """Datasets of an HDF5 file; observations may be groups of them."""

    def _columns(self) -> dict[str, Column]:
        with h5py().File(self.path, "r") as file:
            columns = {}
            for name in (*FIELDS, "terminals"):
                if name in file:
                    parts = self._datasets(file, name)
                    if hasattr(file[name], "keys"):
                        columns[name] = _side_by_side(self.path, name, parts)
                    else:
                        columns[name] = _column(self.path, name, parts[0].shape, parts[0].dtype)
            return columns

    def _chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        with h5py().File(self.path, "r") as file:
            parts = self._datasets(file, name)
            for start in range(0, parts[0].shape[0], rows):
                arrays = [part[start : start + rows] for part in parts]
                yield np.column_stack(arrays) if hasattr(file[name], "keys") else arrays[0]

    def _datasets(self, file: Any, name: str) -> list[Any]:
        stored = file[name]
        parts = [stored[key] for key in self._chosen(name, list(stored))] if hasattr(stored, "keys") else [stored]
        for part in parts:
            if not hasattr(part, "dtype") or part.shape is None:
                raise ValueError(f"{self.path}: {part.name} is no array, expected one of numbers")
        return parts


class _Parquet(Source):
    """Columns of a Parquet file: numbers, or lists of equal length; observations may be structs of lists."""

    def _columns(self) -> dict[str, Column]:
        file = _parquet().ParquetFile(self.path)
        columns = {}
        for name in (*FIELDS, "terminals"):
            if name in file.schema_arrow.names:
                first = next(iter(self._chunks(name, 1)), np.empty((0, 1) if name in VECTORS else (0,), np.float32))
                columns[name] = _column(self.path, name, (file.metadata.num_rows, *first.shape[1:]), first.dtype)
        return columns

    def _chunks(self, name: str, rows: int) -> Iterator[np.ndarray]:
        start = 0
        for batch in _parquet().ParquetFile(self.path).iter_batches(rows, columns=[name]):
            column = batch.column(0)
            if column.null_count:
                row = start + column.is_null().to_pylist().index(True)
                raise ValueError(f"{self.path}: {name} has nothing in row {row}, expected numbers")
            fields = [field.name for field in column.type] if hasattr(column, "field") else []
            if fields:
                parts = [self._array(name, column.field(key), start) for key in self._chosen(name, fields)]
                yield np.column_stack(parts)
            else:
                yield self._array(name, column, start)
            start += len(column)

    def _array(self, name: str, column: Any, start: int) -> np.ndarray:
        """Rows of a column from ``start`` on, as [M] or [M, width]."""
        if name not in VECTORS or not hasattr(column, "flatten") or not hasattr(column.type, "value_type"):
            return column.to_numpy(zero_copy_only=False)
        import pyarrow.compute

        lengths = pyarrow.compute.list_value_length(column).to_numpy(zero_copy_only=False)
        width = lengths[0] if len(lengths) else 0
        other = np.flatnonzero(lengths != width)
        if len(other):
            raise ValueError(
                f"{self.path}: {name} has a list of {lengths[other[0]]} numbers in row {start + other[0]}, expected "
                f"{width} as in row {start}"
            )
        return column.flatten().to_numpy(zero_copy_only=False).reshape(len(column), width)


def _parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError(f"a Parquet file needs pyarrow ({error}): pip install pyarrow") from error
    return pyarrow.parquet


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


def _side_by_side(path: Path, name: str, parts: Sequence[Any]) -> Column:
    """The column of arrays [M] or [M, width] that are put side by side."""
    shapes = [(*part.shape, 1) if len(part.shape) == 1 else part.shape for part in parts]
    columns = [_column(path, name, shape, part.dtype) for shape, part in zip(shapes, parts, strict=True)]
    rows = [column.rows for column in columns]
    if len(set(rows)) > 1:
        raise ValueError(f"{path}: the parts of {name} have {rows} rows, expected equal numbers")
    return Column(rows[0], sum(column.width or 0 for column in columns), np.result_type(*(c.dtype for c in columns)))


def open_source(path: str | os.PathLike[str], keys: Sequence[str] = ()) -> Source:
    """The reader of a file, by its ending. Raises ``FileNotFoundError``, and ``ValueError`` for another ending."""
    file = Path(path).expanduser()
    kinds: Mapping[str, type[Source]] = {".npz": _Npz, ".hdf5": _Hdf5, ".h5": _Hdf5, ".parquet": _Parquet}
    if file.suffix not in kinds:
        raise ValueError(f"{file} ends in {file.suffix!r}, expected one of {', '.join(SUFFIXES)}")
    if not file.is_file():
        raise FileNotFoundError(f"no file of transitions at {file}")
    return kinds[file.suffix](file, keys)


def load(
    path: str | os.PathLike[str],
    *,
    observation_keys: Sequence[str] = (),
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    action_clip: float = ACTION_CLIP,
    memory_share: float = MEMORY_SHARE,
    cache_dir: str | os.PathLike[str] | None = None,
    action_bounds: ActionBounds | tuple[ArrayLike, ArrayLike] | None = None,
    progress: bool = True,
) -> Dataset:
    """Load transitions of your own; their checks are those of ``Dataset.from_arrays``.

    The file is read a part at a time. On the CPU, transitions that take more than ``memory_share`` of the machine's
    memory are written as rows to a file of their own, and mapped from there: only what is sampled is read. A later call
    finds that file again, as long as the first one is the same; a call at the same time waits for it.

    Args:
        path: .npz, .hdf5, .h5 or .parquet (needs pyarrow).
        observation_keys: where observations are dicts (HDF5 groups, Parquet structs), the keys to put side by side.
        device: where the transitions lie; default is the CPU.
        dtype: of the transitions, such as torch.bfloat16 for half the memory; the learner computes in its own.
        action_clip: as in ``Dataset.from_arrays``.
        memory_share: in [0, 1]; 0 maps whatever the size.
        cache_dir: folder of the mapped file; default is the folder of ``path``.
        action_bounds: (low, high) of the actions in their own units, as in ``Dataset.from_arrays``.
        progress: whether a bar is shown on a terminal.

    Raises:
        FileNotFoundError: no file. ImportError: h5py or pyarrow is missing.
        ValueError: a damaged file, missing fields, unequal lengths, integers or images, NaN, actions outside their
            bounds; the message names file, field and row. A device that is not there or too small.
        OSError: the file cannot be read, or the mapped one cannot be written: the disk is full, the folder read-only.
    """
    source = open_source(path, observation_keys)
    place = check_storage(device, dtype)
    if not 0.0 <= memory_share <= 1.0:
        raise ValueError(f"memory_share is {memory_share}, expected a number in [0, 1]")
    if not 0.0 < action_clip <= 1.0:
        raise ValueError(f"action_clip is {action_clip}, expected in (0, 1]")
    columns = _checked_columns(source)
    rows, widths = columns["observations"].rows, (columns["observations"].width or 0, columns["actions"].width or 0)
    with named(source.path):
        bounds = None if action_bounds is None else ActionBounds.of(action_bounds, widths[1])
    shape = (rows, 2 * widths[0] + widths[1] + 2)
    size = shape[0] * shape[1] * dtype.itemsize
    memory = total_memory()
    if place.type != "cpu" or memory is None or size <= memory_share * memory:
        dataset = Dataset(allocate(*shape, dtype, place), _no_ends(rows, place), *widths, bounds)
        _fill(source, columns, dataset, action_clip, progress)
    else:
        folder = source.path.parent if cache_dir is None else Path(cache_dir).expanduser()
        file = folder / f"{source.path.name}.{_key(source, dtype, action_clip, bounds)}{MAPPED_SUFFIX}"
        if not _is_whole(file, size):
            _write_mapped(source, columns, file, shape, widths, bounds, dtype, action_clip, progress)
        # Private pages: nobody can write to the file by way of a batch.
        dataset = Dataset(_mapped(file, shape, dtype, shared=False), _no_ends(rows, place), *widths, bounds)
    dataset.terminals = _ends(source, columns, dataset)
    return dataset


def _checked_columns(source: Source) -> dict[str, Column]:
    columns = source.columns()
    missing = [name for name in FIELDS if name not in columns]
    if missing:
        raise ValueError(f"{source.path} has no {' and no '.join(missing)}; expected {', '.join(FIELDS)}")
    rows = columns["observations"].rows
    for name, column in columns.items():
        if column.rows != rows:
            raise ValueError(f"{source.path}: {name} has {column.rows} rows but observations has {rows}")
    if rows < 1:
        raise ValueError(f"{source.path} is empty: observations has {rows} rows, expected at least 1")
    if columns["next_observations"].width != columns["observations"].width:
        raise ValueError(
            f"{source.path}: next_observations has width {columns['next_observations'].width}, expected "
            f"{columns['observations'].width}: that of observations"
        )
    with named(source.path):
        check_widths(columns["observations"].width or 0, columns["actions"].width or 0)
    return columns


def _key(source: Source, dtype: torch.dtype, action_clip: float, bounds: ActionBounds | None) -> str:
    """What a mapped file is found again by: where its source lies and what it holds, and what was made of it."""
    status = source.path.stat()
    about = (
        str(source.path.resolve()),
        status.st_size,
        status.st_mtime_ns,
        str(dtype),
        action_clip,
        source.keys,
        bounds,
    )
    digest = hashlib.blake2b(repr(about).encode(), digest_size=12)
    with reading(source.path), source.path.open("rb") as file:
        # Evenly spaced, the first and the last bytes among them: the last ones of .npz are its checksums.
        last = max(status.st_size - HASHED_BYTES, 0)
        for part in range(HASHED_PARTS):
            file.seek(last * part // (HASHED_PARTS - 1))
            digest.update(file.read(HASHED_BYTES))
    return digest.hexdigest()


def _write_mapped(
    source: Source,
    columns: Mapping[str, Column],
    file: Path,
    shape: tuple[int, int],
    widths: tuple[int, int],
    bounds: ActionBounds | None,
    dtype: torch.dtype,
    action_clip: float,
    progress: bool,
) -> None:
    """Write the file that is mapped, unless another process does so first."""
    size = shape[0] * shape[1] * dtype.itemsize
    with contextlib.ExitStack() as stack:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(waiting_for(file))
            if _is_whole(file, size):
                return
            part = stack.enter_context(replacing(file))
            with part.open("rb+") as out:
                # Pages of a mapped file that find no room end the process.
                reserve(out, size)
        except OSError as error:
            raise _no_room(error, source.path, file.parent, size) from error
        ends = _no_ends(shape[0], torch.device("cpu"))
        dataset = Dataset(_mapped(part, shape, dtype, shared=True), ends, *widths, bounds)
        _fill(source, columns, dataset, action_clip, progress)


def _no_room(error: OSError, path: Path, folder: Path, size: int) -> OSError:
    reason = error.strerror or str(error)
    if error.errno == errno.ENOSPC:
        free = shutil.disk_usage(folder).free
        reason = f"{free / 2**30:.3g} GiB are free, {max(size - free, 0) / 2**30:.3g} GiB are missing"
    return OSError(
        error.errno,
        f"the mapped copy of {path.name} takes {size / 2**30:.3g} GiB and cannot be written: {reason}; give another "
        "folder as cache_dir, or dtype=torch.bfloat16 for half",
        str(folder),
    )


def _is_whole(file: Path, size: int) -> bool:
    return file.is_file() and file.stat().st_size == size


def _mapped(file: Path, shape: tuple[int, int], dtype: torch.dtype, shared: bool) -> torch.Tensor:
    return torch.from_file(str(file), shared=shared, size=shape[0] * shape[1], dtype=dtype, device="cpu").view(shape)


def _no_ends(rows: int, device: torch.device) -> torch.Tensor:
    return torch.zeros(rows, dtype=torch.bool, device=device)


def _fill(source: Source, columns: Mapping[str, Column], dataset: Dataset, action_clip: float, progress: bool) -> None:
    """Read every field into its columns of the storage, checking it."""
    size = len(dataset)
    rows = max(CHUNK_BYTES // (8 * max(dataset.observation_dim, dataset.action_dim)), 1)
    with progress_bar(f"reading {source.path.name}", total=len(FIELDS) * size, enabled=progress) as advance:
        for name in FIELDS:
            target = getattr(dataset, name)
            start = 0
            for chunk in source.chunks(name, rows):
                with named(source.path):
                    part = as_tensor(name, chunk)
                    part = part.flatten() if columns[name].width is None else part
                    if part.shape[1:] != target.shape[1:] or start + len(part) > size:
                        raise ValueError(f"{name} has shape {tuple(part.shape)} in row {start}, unlike the rows before")
                    if name == "actions" and dataset.action_bounds is not None:
                        part = dataset.action_bounds.from_environment(part, start)
                    check_column(name, part, target[start : start + len(part)].copy_(part), start)
                start += len(part)
                advance(len(part))
            if start != size:
                raise ValueError(f"{source.path}: {name} ends in row {start}, expected {size} rows")
            if name == "actions":
                target.clamp_(-action_clip, action_clip)


def _ends(source: Source, columns: Mapping[str, Column], dataset: Dataset) -> torch.Tensor:
    """[M], bool: where trajectories end, as the file says or as its observations tell."""
    if "terminals" not in columns:
        return trajectory_ends(dataset.observations, dataset.next_observations)
    given = torch.cat([as_tensor("terminals", chunk).flatten() for chunk in source.chunks("terminals", CHUNK_BYTES)])
    bad = (given != 0) & (given != 1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(f"{source.path}: terminals holds {given[row].item():.7g} in row {row}, expected 0 or 1")
    return given.bool().to(dataset.device)
