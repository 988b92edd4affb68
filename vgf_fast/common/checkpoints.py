"""Checkpoints: safetensors with a checksum.

A checkpoint is one safetensors file whose metadata holds the configuration as JSON and a digest of the tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vgf_fast.common.files import replacing

_FORMAT = "vgf_fast"
_FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint file is damaged, incomplete, or not what it was taken for."""


def _digest(tensors: Mapping[str, Tensor], header: str) -> str:
    digest = hashlib.sha256(header.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def save_tensors(
    path: str | os.PathLike[str], kind: str, tensors: Mapping[str, Tensor], header: Mapping[str, Any]
) -> None:
    """Write named tensors and a JSON header to one safetensors file, whole or not at all.

    ``kind`` says what the file is ("policy", "learner"); ``load_tensors`` asks for it. Raises ``ArithmeticError`` for
    numbers that are not finite, and ``OSError`` when the file cannot be written; then ``path`` is as it was.
    """
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    for name, tensor in data.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise ArithmeticError(
                f"{path} was not written: {name} has values that are not finite, as after training that diverged"
            )
    text = json.dumps(header, sort_keys=True)
    about = {"version": _FORMAT_VERSION, "kind": kind, "header": text, "sha256": _digest(data, text)}
    # One entry: safetensors writes several in random order, and equal checkpoints would differ in their bytes.
    with replacing(path) as temporary:
        try:
            save_file(data, temporary, metadata={_FORMAT: json.dumps(about)})
        except SafetensorError as error:
            # Its own kind of exception, also for a disk that is full.
            raise OSError(f"{path} could not be written, and is as it was: {error}") from error


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote: (tensors on the CPU, header).

    Raises ``FileNotFoundError`` when there is no such file, another ``OSError`` when it cannot be read, and
    ``CheckpointError`` when it is damaged or another kind.
    """
    path = Path(path)
    with _opened(path) as file:
        text, digest = _about(path, file, kind)
        try:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error
    if digest != _digest(tensors, text):
        raise CheckpointError(f"{path} is damaged: its tensors do not match the checksum it was written with")
    return tensors, json.loads(text)


def load_header(path: str | os.PathLike[str], kind: str) -> dict[str, Any]:
    """The header alone, without a look at the tensors; errors as ``load_tensors``'s."""
    path = Path(path)
    with _opened(path) as file:
        return json.loads(_about(path, file, kind)[0])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    # safetensors' errors do not tell a file that cannot be read from one that is damaged.
    path.open("rb").close()
    try:
        file = safe_open(path, framework="pt", device="cpu")
    except (SafetensorError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error
    with file as opened:
        yield opened


def _about(path: Path, file: Any, kind: str) -> tuple[str, str]:
    """(header as JSON, checksum) of a file that is open."""
    metadata = (file.metadata() or {}).get(_FORMAT)
    if metadata is None:
        raise CheckpointError(f"{path} was not written by vgf_fast: its metadata has no entry {_FORMAT!r}")
    try:
        about = json.loads(metadata)
        version, saved_kind, text, digest = (about[key] for key in ("version", "kind", "header", "sha256"))
        if not isinstance(json.loads(text), dict):
            raise TypeError("its header is no object")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata cannot be read: {error}") from error
    if version != _FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, expected {_FORMAT_VERSION}")
    if saved_kind != kind:
        raise CheckpointError(f"{path} holds a {saved_kind}, expected a {kind}")
    return text, digest


def read_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The object that a JSON file holds. Raises ``CheckpointError`` naming the file for anything else in it."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {json.dumps(values)[:40]}, expected an object of settings")
    return values


def load_module_tensors(module: torch.nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Copy named tensors into a module's parameters in place; names and shapes must match exactly.

    Raises ``CheckpointError`` naming what is missing, unexpected, of another shape or not finite; then nothing was
    copied.
    """
    own = dict(module.named_parameters())
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    if missing or unexpected:
        raise CheckpointError(f"{source} does not fit the configuration: missing {missing}, unexpected {unexpected}")
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                f"{source} does not fit the configuration: {name} has shape {tuple(tensors[name].shape)}, expected "
                f"{tuple(parameter.shape)}"
            )
        if not tensors[name].isfinite().all():
            raise CheckpointError(f"{source}: {name} has values that are not finite, expected finite weights")
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(tensors[name])
