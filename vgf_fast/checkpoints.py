"""Files: safetensors with a checksum, written whole or not at all.

A checkpoint is one safetensors file whose metadata holds the configuration as JSON and a digest of the tensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "vgf_fast"
_FORMAT_VERSION = 1


class CheckpointError(ValueError):
    """A checkpoint file is damaged, incomplete, or not what it was taken for."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; on success it is flushed to disk and renamed to ``path``, else removed.

    Whoever reads ``path`` sees the old file or the new one, never a part, also when the process is killed.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    for leftover in target.parent.glob(f".{target.name}.*.partial"):
        leftover.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        # mkstemp makes the file private; a checkpoint gets what the user's umask says.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    directory = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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

    ``kind`` says what the file is ("policy", "learner"); ``load_tensors`` asks for it.
    """
    data = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True)
    about = {"version": _FORMAT_VERSION, "kind": kind, "header": text, "sha256": _digest(data, text)}
    # One entry: safetensors writes several in random order, and equal checkpoints would differ in their bytes.
    with replacing(path) as temporary:
        save_file(data, temporary, metadata={_FORMAT: json.dumps(about)})


def load_tensors(path: str | os.PathLike[str], kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``save_tensors`` wrote: (tensors on the CPU, header).

    Raises ``FileNotFoundError`` when there is no such file, ``CheckpointError`` when it is damaged or another kind, and
    ``OSError`` when it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    # safetensors calls what the machine refuses an error of the file.
    with path.open("rb"):
        pass
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            metadata = (file.metadata() or {}).get(_FORMAT)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {error}") from error
    if metadata is None:
        raise CheckpointError(f"{path} was not written by vgf_fast: its metadata has no entry {_FORMAT!r}")
    try:
        about = json.loads(metadata)
        version, found, text, digest = (about[key] for key in ("version", "kind", "header", "sha256"))
        header = json.loads(text)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: its metadata cannot be read: {error}") from error
    if version != _FORMAT_VERSION:
        raise CheckpointError(f"{path} has format version {version}, expected {_FORMAT_VERSION}")
    if found != kind:
        raise CheckpointError(f"{path} holds a {found}, expected a {kind}")
    if digest != _digest(tensors, text):
        raise CheckpointError(f"{path} is damaged: its tensors do not match the checksum it was written with")
    return tensors, header


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
