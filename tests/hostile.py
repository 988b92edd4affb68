"""Odd values for arguments, and what calls with them are held to: right numbers, or errors that name the argument."""

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch

import vgf_fast as vgf
from vgf_fast.common.checkpoints import CheckpointError
from vgf_fast.data.replay import ReplayBuffer
from vgf_fast.envs.evaluation import EvaluationError, EvaluationResult
from vgf_fast.networks import StackedMLP

NAN, INF = float("nan"), float("inf")
# The kinds that docstrings name; an error of another kind, a subclass of these too, is not the library's.
KINDS = (ValueError, TypeError, IndexError, FileNotFoundError, ArithmeticError, CheckpointError, EvaluationError)


CLOSE = 1e-4  # of float32 to float64, through a few steps of the flow
OBSERVATION_DIM, ACTION_DIM = 4, 2
SIZES = {
    "observation_dim": OBSERVATION_DIM,
    "action_dim": ACTION_DIM,
    "hidden_dims": (16, 16),
    "behavior_hidden_dims": (16,),
    "particles": 5,
    "behavior_steps": 3,
    "train_budget": vgf.TransportBudget(2, 0.1, 0.5),
    "test_budget": vgf.TransportBudget(2, 0.1, 0.5),
}
CONFIGURATIONS = {
    "flow": {"selection": "softmax"},
    "gaussian": {"behavior": "gaussian", "gaussian_tanh": True, "target_q_aggregation": "mean"},
    "amortized": {"amortized": True, "activation": "gelu", "layer_norm": False},
    "ascent": {"particle_optimizer": "ascent", "bandwidth_gradient": True, "behavior_layer_norm": True},
}


@cache
def policy(configuration="flow", observation_dim=OBSERVATION_DIM, action_dim=ACTION_DIM, **options):
    """With no parameter at its initial zero or one."""
    sizes = {**SIZES, "observation_dim": observation_dim, "action_dim": action_dim}
    made = vgf.VGFPolicy(vgf.VGFConfig(**{**sizes, **CONFIGURATIONS[configuration], **options}))
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return made


class Case(NamedTuple):
    """One call. It gives the numbers of ``right``, or an error that names one of ``names``; if both, one of the two.

    ``tolerance`` is relative to the largest entry; 0: bit for bit.
    """

    name: str
    call: Callable[[], Any]
    right: Callable[[], Any] | None = None
    names: tuple[str, ...] = ()
    tolerance: float = 0.0


def grouped(cases):
    """The cases by what their names begin with, up to a colon: what is one test, because starting one takes longer."""
    groups = {}
    for case in cases:
        groups.setdefault(case.name.partition(":")[0], []).append(case)
    return groups


def hold_all(cases):
    """Hold every case, and tell of all that failed."""
    failed = {case.name: complaint for case in cases if (complaint := complaint_of(case))}
    assert not failed, "\n".join(f"{name}: {complaint}" for name, complaint in failed.items())


def complaint_of(case):
    """What is wrong with a call, or None."""
    try:
        found = case.call()
    except Exception as error:
        message = f"{type(error).__name__}: {error}"
        named = any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", str(error)) for name in case.names)
        return None if named and type(error) in KINDS else f"refused with {message}"
    if case.right is None:
        return f"accepted, with {found}"
    return _difference(numbers(found), numbers(case.right()), case.tolerance)


def numbers(value):
    """Every number in what a call returned, as float64 where there is no dtype to keep."""
    if value is None or isinstance(value, (str, bool)):
        return []
    if isinstance(value, (vgf.VGFPolicy, StackedMLP)):
        return [parameter.detach() for parameter in value.parameters()]
    if isinstance(value, vgf.Learner):
        moments = [one for optimizer in value._optimizers.values() for one in optimizer.state.values()]
        return [*numbers(value.policy), *numbers(moments), value.generator.get_state(), *numbers(value.step)]
    if isinstance(value, vgf.Dataset):
        return [value._storage, value.terminals, *numbers(value.action_bounds)]
    if isinstance(value, ReplayBuffer):
        return [value._storage, *numbers([value.size, value.cursor])]
    if isinstance(value, EvaluationResult) or dataclasses.is_dataclass(value):
        return numbers(dataclasses.asdict(value))
    if isinstance(value, torch.Tensor):
        return [value.detach()]
    if isinstance(value, np.ndarray):
        return [torch.from_numpy(value)]
    if isinstance(value, Mapping):
        return [number for one in value.values() for number in numbers(one)]
    if isinstance(value, (list, tuple)):
        return [number for one in value for number in numbers(one)]
    return [torch.tensor(value, dtype=torch.float64, device="cpu")]


def _difference(found, right, tolerance):
    """What distinguishes numbers from the right ones, or None."""
    if len(found) != len(right):
        return f"{len(found)} tensors, expected {len(right)}"
    for one, other in zip(found, right, strict=True):
        if one.shape != other.shape or not bool(one.isfinite().all()):
            return f"{one}, expected {other}"
        if not tolerance:
            if one.dtype != other.dtype or not torch.equal(one, other):
                return f"{one}, expected {other}"
        elif one.numel():
            error = (one.double() - other.double()).abs().max().item()
            largest = max(other.double().abs().max().item(), 1e-30)
            if not error <= tolerance * largest:
                return f"{one}, expected {other}: an error of {error:.2e} beside {largest:.2e}"
    return None


# --- tensors ---------------------------------------------------------------------------------------------------------


def _in_nan(tensor, offset, stride):
    """The same numbers, ``stride`` apart from ``offset`` on in a buffer of NaN."""
    buffer = torch.full((offset + stride * tensor.numel() + 1,), NAN, dtype=tensor.dtype)
    view = buffer[offset : offset + stride * tensor.numel() : stride].view_as(tensor)
    return view.copy_(tensor)


def _quantised(tensor):
    with warnings.catch_warnings(action="ignore"):
        return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


def _inference(tensor):
    with torch.inference_mode():
        return tensor.clone()


# Odd, and right: a call takes them for the numbers they hold.
TENSORS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "stepped": lambda t: _in_nan(t, 0, 2),
    "misaligned": lambda t: _in_nan(t, 1, 1),
    "a row for all": lambda t: t[:1].expand_as(t),
    "a column for all": lambda t: t[..., :1].expand_as(t),
    "float64": torch.Tensor.double,
    "bfloat16": torch.Tensor.bfloat16,
    "float16": torch.Tensor.half,
    "with a gradient": lambda t: t.clone().requires_grad_(),
    "a parameter": torch.nn.Parameter,
    "a negated view": lambda t: torch._neg_view(-t),
    "of inference mode": _inference,
    "tiny": lambda t: t * 1e-40,
    "minus zero": lambda t: -torch.zeros_like(t),
    "in shared memory": lambda t: t.clone().share_memory_(),
}


def _with(tensor, value):
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


# Wrong: a call names the argument.
NO_TENSORS = {
    "of lower rank": lambda t: t[0],
    "of higher rank": lambda t: t[None],
    "a scalar": lambda t: t.sum(),
    "nothing": lambda t: t.new_empty(0),
    "wider": lambda t: torch.cat([t, t], -1),
    "narrower": lambda t: t[..., :-1],
    "without width": lambda t: t[..., :0],
    "longer": lambda t: torch.cat([t, t], 0),
    "shorter": lambda t: t[1:],
    "integers": torch.Tensor.long,
    "booleans": torch.Tensor.bool,
    "complex": lambda t: t.to(torch.complex64),
    "float8": lambda t: t.to(torch.float8_e4m3fn),
    "quantised": _quantised,
    "without memory": lambda t: t.to("meta"),
    "sparse": torch.Tensor.to_sparse,
    "NaN": lambda t: _with(t, NAN),
    "infinite": lambda t: _with(t, INF),
    "None": lambda t: None,
    "a text": lambda t: "observations",
    "a list": torch.Tensor.tolist,
    "a number": lambda t: 1.0,
    "an array": torch.Tensor.numpy,
    "a function": lambda t: len,
}
MAGNITUDES = (1e-45, 1e-38, 1e-20, 1e5, 1e10, 1e18, 1e20, 1e30, 1e38)


# --- arrays ----------------------------------------------------------------------------------------------------------


def _read_only(array):
    array = array.copy()
    array.flags.writeable = False
    return array


class Convertible:
    """Says its numbers through NumPy's protocol alone."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array if dtype is None else self.array.astype(dtype)


# The same float32 numbers.
ARRAYS = {
    "Fortran's order": np.asfortranarray,
    "backwards": lambda a: np.ascontiguousarray(a[::-1])[::-1],
    "columns backwards": lambda a: np.ascontiguousarray(a[..., ::-1])[..., ::-1],
    "stepped": lambda a: np.stack([a, np.full_like(a, NAN)], axis=-1).reshape(*a.shape[:-1], -1)[..., ::2],
    "big-endian": lambda a: a.astype(">f4"),
    "float64": lambda a: a.astype(np.float64),
    "big-endian float64": lambda a: a.astype(">f8"),
    "long double": lambda a: a.astype(np.longdouble),
    "read-only": _read_only,
    "masked nowhere": lambda a: np.ma.masked_array(a, mask=False),
    "one field of a record": lambda a: np.rec.fromarrays([a, a], names="x,y")["x"],
    "unaligned": lambda a: np.frombuffer(b"x" + a.tobytes(), dtype="<f4", offset=1).reshape(a.shape),
    "a tensor": torch.from_numpy,
    "a tensor of float64": lambda a: torch.from_numpy(a).double(),
    "a stepped tensor": lambda a: _in_nan(torch.from_numpy(a), 3, 2),
}
# The same numbers, where anything that NumPy takes is taken.
LISTS = {
    "a list": np.ndarray.tolist,
    "nested tuples": lambda a: tuple(map(tuple, a.tolist())) if a.ndim == 2 else tuple(a.tolist()),
    "a list of arrays": list,
    "memory": lambda a: memoryview(np.ascontiguousarray(a)),
    "NumPy's protocol": Convertible,
}
NO_ARRAYS = {
    "of another rank": lambda a: a[None, None],
    "a scalar": lambda a: a.sum(),
    "without width": lambda a: a[..., :0],
    "complex": lambda a: a.astype(np.complex64),
    "texts": lambda a: a.astype(str),
    "objects": lambda a: a.astype(object),
    "bytes": lambda a: a.tobytes(),
    "records": lambda a: np.rec.fromarrays([a, a], names="x,y"),
    "dates": lambda a: a.astype("datetime64[s]"),
    "masked": lambda a: np.ma.masked_array(a, mask=np.arange(a.size).reshape(a.shape) == 1),
    "NaN": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 1, np.float32(NAN), a),
    "minus infinity": lambda a: np.where(np.arange(a.size).reshape(a.shape) == 1, np.float32(-INF), a),
    "None": lambda a: None,
    "a mapping": lambda a: {"x": a},
    "a set": lambda a: {1.0, 2.0},
    "a generator": lambda a: (one for one in a),
    "ragged": lambda a: [[1.0], [1.0, 2.0]],
    "a text": lambda a: "numbers",
    "without memory": lambda a: torch.tensor(a).to("meta"),
    "a sparse tensor": lambda a: torch.tensor(a).to_sparse(),
    "a complex tensor": lambda a: torch.tensor(a).to(torch.complex64),
    "a quantised tensor": lambda a: _quantised(torch.tensor(a)),
}

# --- single values ---------------------------------------------------------------------------------------------------

NO_NUMBERS = (NAN, INF, -INF, None, "3", b"3", [], [1], (1, 2), {}, 1j, len, object, 10**400, torch.ones(2))
NO_INTEGERS = (*NO_NUMBERS, -1, 1.5, 2.0, np.float32(2.0), np.array([2, 3]), "", True, -(2**70))
NO_CHOICES = (
    "",
    "MAX",
    "means",
    None,
    1,
    0.5,
    b"mean",
    [],
    ["mean"],
    {},
    len,
    ("mean", "min"),
    np.array(["min", "max"]),
)
NO_BOOLEANS = (None, 0, 1, 2.0, "yes", "False", [], NAN, np.array([True, False]))


def named(value):
    """A short text for an odd value, the same in every process."""
    text = getattr(value, "__name__", None) or repr(value)
    return re.sub(r" at 0x\w+|\s+", " ", text)[:24]
