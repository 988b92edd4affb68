"""Checkpoints of the public JAX release, read without JAX and without running anything the file names.

The release writes ``params_N.pkl``: a pickle of nested dicts of JAX arrays. The unpickler here knows how to rebuild
arrays of plain numbers and refuses every other global before anything is called.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from vgf_fast.common.arrays import with_values
from vgf_fast.common.checkpoints import CheckpointError
from vgf_fast.networks import GaussianBehavior, StackedMLP

if TYPE_CHECKING:
    from vgf_fast.policy import VGFPolicy

_PLAIN_DTYPES = {f"{kind}{size}" for kind in "iu" for size in (1, 2, 4, 8)} | {"f2", "f4", "f8", "b1"}


class UnsafePickleError(CheckpointError):
    """A pickle asks for something other than arrays of plain numbers."""


class _DType:
    """Stands for ``numpy.dtype``: a plain number type and its byte order."""

    def __init__(self, name: object) -> None:
        # What is no string is not looked at: hashing or printing it may take for ever.
        if not isinstance(name, str) or name not in _PLAIN_DTYPES:
            found = repr(name) if isinstance(name, str) else type(name).__name__
            raise UnsafePickleError(
                f"array of dtype {found}, expected plain numbers ({', '.join(sorted(_PLAIN_DTYPES))})"
            )
        self.name = name
        self.order = "="

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) >= 2 and isinstance(state[1], str) and state[1] in "<>|="):
            raise UnsafePickleError("unexpected state of a dtype")
        self.order = state[1]


class _Array:
    """Stands for ``numpy.ndarray`` while it is being rebuilt; its state is checked before any byte becomes an array."""

    value: NDArray[Any] | None = None

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise UnsafePickleError("unexpected state of an array")
        _, shape, dtype, fortran, data = state
        if not (
            isinstance(shape, tuple)
            and all(type(n) is int and n >= 0 for n in shape)
            and type(dtype) is _DType
            and type(data) is bytes
        ):
            raise UnsafePickleError("unexpected state of an array")
        number = np.dtype(dtype.order + dtype.name)
        if len(data) != number.itemsize * math.prod(shape):
            raise UnsafePickleError(f"array of shape {shape} and dtype {number} with {len(data)} bytes")
        self.value = np.frombuffer(data, number).reshape(shape, order="F" if fortran else "C")


class _Global:
    """A callable that the pickle may name; nothing of it can be altered from inside the pickle."""

    __slots__ = ("_call",)
    _call: Callable[..., Any]

    def __init__(self, call: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)

    def __call__(self, *args: Any) -> Any:
        return self._call(*args)

    def __setattr__(self, name: str, value: object) -> None:
        raise UnsafePickleError(f"the pickle sets {name!r} on a function")

    def __setstate__(self, state: object) -> None:
        raise UnsafePickleError("the pickle sets the state of a function")


def _reconstruct(subtype: object, *_: object) -> _Array:
    if subtype is not _NDARRAY:
        raise UnsafePickleError("the pickle rebuilds an array subclass")
    return _Array()


def _reconstruct_jax(function: object, args: object, state: object, *_: object) -> _Array:
    if function is not _RECONSTRUCT or not isinstance(args, tuple):
        raise UnsafePickleError("the pickle rebuilds a JAX array from something other than a NumPy array")
    array = _reconstruct(*args)
    array.__setstate__(state)
    return array


def _no_call(*_: object) -> None:
    raise UnsafePickleError("the pickle calls numpy.ndarray")


_NDARRAY = _Global(_no_call)
_RECONSTRUCT = _Global(_reconstruct)
_ADMITTED = {
    ("jax._src.array", "_reconstruct_array"): _Global(_reconstruct_jax),
    ("numpy._core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy.core.multiarray", "_reconstruct"): _RECONSTRUCT,
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Global(lambda name, *_: _DType(name)),
}


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise UnsafePickleError(f"the pickle asks for {module}.{name}, which is not an array: refused") from None

    def persistent_load(self, pid: Any) -> Any:
        raise UnsafePickleError("the pickle refers to an object outside of it: refused")


def _flatten(tree: Mapping[Any, Any], prefix: str) -> dict[str, NDArray[Any]]:
    """The arrays of nested dicts, under the keys that lead to them. Raises ``CheckpointError`` for a dict met twice."""
    found = {}
    seen = {id(tree)}
    left: list[tuple[str, Mapping[Any, Any]]] = [(prefix, tree)]
    while left:
        path, level = left.pop()
        for key, value in level.items():
            if isinstance(value, dict):
                # A dict within itself has no end, and many that share their entries have too many.
                if id(value) in seen:
                    raise CheckpointError(f"{prefix} holds a dict in more than one place, expected a tree of arrays")
                seen.add(id(value))
                left.append((f"{path}/{_key(key)}", value))
            elif isinstance(value, _Array) and value.value is not None:
                found[f"{path}/{_key(key)}"] = value.value
    return found


def _key(key: object) -> str:
    if not isinstance(key, (str, int)):
        raise CheckpointError(f"a dict has a {type(key).__name__} as key, expected names")
    return str(key)


def read_parameters(path: str | os.PathLike[str]) -> dict[str, NDArray[Any]]:
    """Arrays of a release checkpoint ``params_N.pkl`` under flat names.

    Names, as ``VGFPolicy.from_reference_parameters`` takes them: ``critic/value_net/Dense_0/kernel``,
    ``target_critic/...``, ``bc/mlp/Dense_0/kernel``, and of the amortised agent ``q_grad/mlp/Dense_0/kernel``.
    Raises ``FileNotFoundError``; ``UnsafePickleError`` when the pickle asks for anything but arrays, before
    anything of it is executed; ``CheckpointError`` when it is damaged or not a checkpoint of the release; ``OSError``
    when it cannot be read.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}")
    data = path.read_bytes()
    try:
        content = _ArrayUnpickler(io.BytesIO(data)).load()
    except UnsafePickleError as error:
        raise UnsafePickleError(f"{path}: {error}") from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(f"{path} is damaged or not a pickle: {error or type(error).__name__}") from error
    agent = content.get("agent") if isinstance(content, dict) else None
    if not isinstance(agent, dict):
        raise CheckpointError(f"{path} is not a checkpoint of the release: it has no agent")
    arrays: dict[str, NDArray[Any]] = {}
    states = {"critic": "critic", "target_critic": "target_critic", "bc": "actor_bc"}
    if "q_grad" in agent:
        states["q_grad"] = "q_grad"
    for name, state in states.items():
        holder = agent.get(state)
        parameters = holder.get("params") if isinstance(holder, dict) else None
        if not isinstance(parameters, dict):
            raise CheckpointError(f"{path} is not a checkpoint of the release: it has no agent/{state}/params")
        try:
            arrays |= _flatten(parameters, name)
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from None
    return arrays


def count_members(arrays: Mapping[str, Any]) -> int:
    """How many critics the release's arrays hold: the first dimension of those of ``critic/``.

    Raises ``CheckpointError`` without them, or when the arrays below ``critic/`` and ``target_critic/`` disagree.
    """
    counts: dict[int, str] = {}
    for name, array in arrays.items():
        if name.startswith(("critic/", "target_critic/")):
            shape = np.shape(array)
            counts.setdefault(shape[0] if shape else 0, name)
    if not counts or 0 in counts:
        raise CheckpointError(f"the release's parameters have no critics: {counts.get(0, 'critic/')} is empty")
    if len(counts) > 1:
        said = ", ".join(f"{count} in {name}" for count, name in counts.items())
        raise CheckpointError(f"the release's parameters disagree about the number of critics: {said}")
    return next(iter(counts))


def _take(arrays: dict[str, Any], name: str, parameter: torch.Tensor, stacked: bool) -> None:
    if name not in arrays:
        raise CheckpointError(f"the release's parameters lack {name!r}")
    value = with_values(name, arrays.pop(name))
    expected = tuple(parameter.shape if stacked else parameter.shape[1:])
    if tuple(value.shape) != expected:
        raise CheckpointError(f"{name} has shape {tuple(value.shape)}, expected {expected}: the configuration")
    parameter.copy_(value if stacked else value.unsqueeze(0))
    if not bool(parameter.isfinite().all()):
        raise CheckpointError(f"{name} has values that are not finite in {parameter.dtype}, expected finite weights")


def load_networks(policy: VGFPolicy, arrays: Mapping[str, Any]) -> None:
    """Copy the release's arrays into a policy's networks; a missing target critic becomes a copy of the critic.

    Raises ``CheckpointError`` naming an array that is missing, left over, or of another shape.
    """
    load_mlp(policy.critic, arrays, "critic")
    if any(name.startswith("target_critic/") for name in arrays):
        load_mlp(policy.target_critic, arrays, "target_critic")
    else:
        policy.target_critic.load_state_dict(policy.critic.state_dict())
    load_mlp(policy.behavior, arrays, "bc")
    if policy.score_field is not None:
        load_mlp(policy.score_field, arrays, "q_grad")


@torch.no_grad()
def load_mlp(module: StackedMLP, arrays: Mapping[str, Any], prefix: str) -> None:
    """Copy the release's arrays below ``prefix`` into a module, in place and in the module's dtype.

    Raises ``CheckpointError`` naming an array that is missing, left over, of another shape or not finite.
    """
    left = {name: a for name, a in arrays.items() if name.startswith(prefix + "/")}
    stacked = prefix.endswith("critic")
    gaussian = isinstance(module, GaussianBehavior)
    body = f"{prefix}/{'value_net' if stacked else 'actor_net' if gaussian else 'mlp'}"
    last = len(module.weights) - 1
    for i in range(last + 1):
        layer = f"{prefix}/mean_net" if gaussian and i == last else f"{body}/Dense_{i}"
        _take(left, f"{layer}/kernel", module.weights[i], stacked)
        _take(left, f"{layer}/bias", module.biases[i], stacked)
    for i in range(len(module.norm_scales)):
        _take(left, f"{body}/LayerNorm_{i}/scale", module.norm_scales[i], stacked)
        _take(left, f"{body}/LayerNorm_{i}/bias", module.norm_biases[i], stacked)
    if isinstance(module, GaussianBehavior):
        _take(left, f"{prefix}/log_stds", module.log_std, stacked=True)
    if left:
        raise CheckpointError(
            f"the release's parameters hold more than the configuration says: {', '.join(sorted(left))}"
        )


def read_config(config: Mapping[str, Any] | str | os.PathLike[str]) -> Mapping[str, Any]:
    """The agent's configuration of the release: a dict as it is, or what is in the JSON file at a path.

    Raises ``FileNotFoundError``, and ``ValueError`` for what is not an object in JSON.
    """
    if isinstance(config, Mapping):
        return config
    path = Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"no configuration at {path}")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected an object of the release's keys")
    # The release writes its flags beside the checkpoint with the agent's configuration below "agent".
    agent = values.get("agent")
    return agent if isinstance(agent, dict) else values
