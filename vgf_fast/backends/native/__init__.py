"""The torch backend's flows on a CPU: ``flow.c``, compiled for this machine when first needed.

One call runs all layers of a network, and another moves the particles, on PyTorch's own threads. Without a C compiler,
or with ``VGF_FAST_NATIVE=0``, PyTorch's operators do the same.
"""

from __future__ import annotations

import contextlib
import contextvars
import ctypes
import functools
import hashlib
import itertools
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from vgf_fast import reference
from vgf_fast.common.arrays import has_memory
from vgf_fast.flow import Flow
from vgf_fast.reference import LAYER_NORM_EPS, MLPWeights

MANY_ROWS = 256  # from which on weights are packed and rows taken in chunks
CHUNK_ROWS = 60
WIDTHS = 16  # hidden widths are multiples of it
MAX_LAYERS = 32
MAX_PARTICLES = 128  # of a state, as many as the kernels take
PRODUCTS_PER_THREAD = 200_000  # multiplications of a layer for every thread that takes part
_CORES = os.cpu_count() or 1  # of the whole machine, which is what counts its threads
_SOURCE = Path(__file__).with_name("flow.c")
_FLAGS = ("-O3", "-march=native", "-std=gnu11", "-fPIC", "-fopenmp")
_ACTIVATIONS = {"relu": 0, "gelu": 1, "swish": 2}
_KERNELS = {"rbf": 0, "imq": 1}  # of particles
_DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger("vgf_fast")


# --- the library -----------------------------------------------------------------------------------------------------


_CONSTANTS = {
    "beta1": reference.ADAM_BETA1,
    "beta2": reference.ADAM_BETA2,
    "adam_eps": reference.ADAM_EPS,
    "bandwidth_min": reference.BANDWIDTH_MIN,
    "gamma_eps": reference.GAMMA_EPS,
}
_POINTERS = ("weight", "packed", "transposed", "bias", "scale", "shift")


class _Network(ctypes.Structure):
    """``struct mlp``."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in ("members", "hidden", "rest", "out", "activation", "half", "first_stride")
        ),
        ("widths", ctypes.POINTER(ctypes.c_int64)),
        *((name, ctypes.POINTER(ctypes.c_void_p)) for name in _POINTERS),
    )


class _Flow(ctypes.Structure):
    """``struct flow``."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("particles", "entries", "step")),
        *((name, ctypes.c_int64) for name in ("bandwidth_gradient", "repulsion", "adam", "kernel")),
        *((name, ctypes.c_float) for name in ("step_size", "temperature", *_CONSTANTS)),
    )


def cache_directory() -> Path:
    """Where compiled libraries are kept: ``$VGF_FAST_CACHE``, else ``vgf_fast`` in the user's cache."""
    chosen = os.environ.get("VGF_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vgf_fast"


def _compiler() -> list[str]:
    try:
        named = shlex.split(os.environ.get("CC", ""))
    except ValueError as error:
        raise RuntimeError(f"CC is {os.environ['CC']!r}, expected a command: {error}") from error
    commands = [named] if named else [["cc"], ["gcc"], ["clang"]]
    for command in commands:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(f"no C compiler: {', '.join(command[0] for command in commands)}")


def _machine() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("model name", "flags", "Features", "CPU "))}))


def build() -> Path:
    """Compile ``flow.c``, unless that is done, and return the library's path. Of several processes one compiles.

    What is in the cache is used without a compiler. Raises ``RuntimeError`` without one or when it fails, and
    ``OSError`` when there is nowhere to write.
    """
    command = os.environ.get("CC", "")
    key = _digest(_SOURCE.read_bytes() + "\n".join((command, *_FLAGS, _machine())).encode())
    folder = cache_directory()
    found = _cached(folder, key)
    if found is not None:
        return found
    compiler = _compiler()
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        found = _cached(folder, key)
        if found is not None:
            return found
        # Seen without any set-up of logging, and not to be mistaken for a hang.
        logger.warning("compiling for this machine, once, which takes some seconds: %s", folder)
        with tempfile.TemporaryDirectory(dir=folder) as aside:
            made = Path(aside) / "flow"
            _run([*compiler, *_FLAGS, "-c", str(_SOURCE), "-o", f"{made}.o"])
            # Linked with no OpenMP runtime: PyTorch has loaded one, and its threads serve here too.
            _run([*compiler, "-shared", f"{made}.o", "-o", f"{made}.so", "-lm"])
            path = folder / f"flow-{key}-{_digest(Path(f'{made}.so').read_bytes())}.so"
            os.replace(f"{made}.so", path)
    return path


def _cached(folder: Path, key: str) -> Path | None:
    for path in folder.glob(f"flow-{key}-*.so"):
        # Loading a file that was cut short would end the process.
        if path.stem.rpartition("-")[2] == _digest(path.read_bytes()):
            return path
    return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a folder's lock, which ends with its holder; without one where the system or the disk has none."""
    try:
        import fcntl
    except ImportError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise RuntimeError(f"{command[0]} failed: {lines[0]}")


def _load() -> tuple[Path, ctypes.CDLL]:
    """The library's path and the library. Raises ``RuntimeError`` or ``OSError`` saying why there is none."""
    if os.environ.get("VGF_FAST_NATIVE") == "0":
        raise RuntimeError("VGF_FAST_NATIVE is 0")
    if sys.byteorder != "little":
        raise RuntimeError(f"the machine is {sys.byteorder}-endian")
    path = build()
    return path, ctypes.CDLL(str(path))


def state() -> str:
    """Where the compiled library is, or why there is none."""
    try:
        return f"available: {_load()[0]}"
    except (OSError, RuntimeError) as error:
        return f"not available, PyTorch's operators do the same: {error}"


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled library, or None where there cannot be one, which is logged once."""
    try:
        _, found = _load()
    except (OSError, RuntimeError) as error:
        logger.info("acting on the CPU uses PyTorch's operators: %s", error)
        return None
    whole, pointer = ctypes.c_int64, ctypes.c_void_p
    network = ctypes.POINTER(_Network)
    common = (pointer, ctypes.c_float, whole, whole)
    for name, result, arguments in (
        ("workspace", whole, (network, *(whole,) * 4)),
        ("has_bfloat16", whole, ()),
        ("peak", ctypes.c_double, (whole, whole, whole)),
        ("pack", None, (pointer, pointer, *(whole,) * 6)),
        ("critic", None, (network, pointer, pointer, whole, whole, whole, pointer, pointer, *common)),
        ("behavior_flow", None, (network, pointer, pointer, pointer, whole, whole, whole, *common)),
        ("flow_workspace", whole, (ctypes.POINTER(_Flow), whole)),
        ("flow_step", None, (ctypes.POINTER(_Flow), pointer, pointer, pointer, pointer, whole, pointer, whole)),
    ):
        function = getattr(found, f"vgf_{name}")
        function.restype, function.argtypes = result, arguments
    return found


# --- networks --------------------------------------------------------------------------------------------------------


_chosen_off: contextvars.ContextVar[bool] = contextvars.ContextVar("chosen_off", default=False)


@contextlib.contextmanager
def off() -> Iterator[None]:
    """PyTorch's operators inside this block, to compare with."""
    token = _chosen_off.set(True)
    try:
        yield
    finally:
        _chosen_off.reset(token)


# A process that was forked has one thread of PyTorch's: it would wait for ever for those that stayed behind.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=functools.partial(torch.set_num_threads, 1))


def _address(name: str, tensor: Tensor, dtype: torch.dtype, length: int) -> int:
    """Where a tensor lies, for C: the one gate that every buffer passes.

    Raises ``ValueError`` unless it is ``length`` entries of ``dtype``, one after the other, in the CPU's memory.
    """
    if (
        tensor.dtype is not dtype
        or tensor.numel() != length
        or not tensor.is_cpu
        or not tensor.is_contiguous()
        or tensor.is_neg()
    ):
        raise ValueError(
            f"{name} is {tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()} on {tensor.device}, "
            f"expected {length} entries of {dtype}, contiguous, on cpu"
        )
    return tensor.data_ptr()


def supports(mlp: MLPWeights, rows: int, observations: Tensor) -> bool:
    """Whether to take this form for ``rows`` rows: a network it can read, and a library.

    Many rows in bfloat16 are PyTorch's where this is not compiled with the CPU's own products of that type.
    """
    first, hidden = mlp.weights[0], mlp.weights[:-1]
    return (
        rows > 0
        and not _chosen_off.get()
        and first.device.type == "cpu"
        and first.dtype in _DTYPES
        and 0 < len(hidden) <= MAX_LAYERS
        and all(weight.shape[2] % WIDTHS == 0 for weight in hidden)
        and all(weight.is_contiguous() for weight in mlp.weights)
        and all(map(has_memory, (observations, *mlp.weights)))
        and (found := library()) is not None
        and (rows < MANY_ROWS or first.dtype == torch.float32 or bool(found.vgf_has_bfloat16()))
    )


def _running() -> int:
    """Threads of the whole machine that run or could, these included; 0 where it does not say."""
    try:
        file = os.open("/proc/loadavg", os.O_RDONLY)
    except OSError:
        return 0
    try:
        return int(os.read(file, 128).split()[3].partition(b"/")[0])
    finally:
        os.close(file)


def threads_for(products: int) -> int:
    """How many threads take part in layers of so many multiplications: fewer by those that lack a core of their own.

    On a busy machine a layer would last until all of them have had their turn. Results are the same for any number.
    """
    wanted = min(torch.get_num_threads(), products // PRODUCTS_PER_THREAD)
    return max(1, wanted - max(0, _running() - _CORES)) if wanted > 1 else 1


class StackAtStates:
    """A stack of perceptrons on [state, rest] bound to B states, whose share of the first layer is computed once.

    ``backward``: whether gradients are wanted.
    """

    def __init__(self, mlp: MLPWeights, observations: Tensor, particles: int, backward: bool) -> None:
        mlp = mlp.detach()
        found = library()
        assert found is not None
        self.library = found
        first = mlp.weights[0]
        members, inputs, _ = first.shape
        states, width = observations.shape
        self.sizes = (states, particles)
        hidden = [weight.shape[2] for weight in mlp.weights[:-1]]
        widths = [inputs, *hidden, mlp.weights[-1].shape[2]]
        vectors = [[tensor.float().contiguous() for tensor in group] for group in mlp[1:4]]
        x = observations.detach().float()
        self.share = torch.empty(members, states, hidden[0], dtype=torch.float32, device="cpu")
        # One by one: as a batch MKL gives every member a thread, however little there is to do.
        for out, bias, weight in zip(self.share, vectors[0][0], first[:, :width].float(), strict=True):
            torch.addmm(bias, x, weight, out=out)
        rows = states * particles
        products = members * rows * max(a * b for a, b in zip(hidden, hidden[1:] or [1], strict=False))
        self.threads = threads_for(products)
        # Whole states, as many as make full tiles and stay in the cache.
        self.chunk = max(1, CHUNK_ROWS // particles) if rows >= MANY_ROWS else 0
        packed: list[list[Tensor]] = [[], []]
        if self.chunk:
            packed = [self._pack(mlp, transpose) if wanted else [] for transpose, wanted in ((0, True), (1, backward))]
        matrices = [members * a * b for a, b in itertools.pairwise(widths)]
        addresses = _addresses("weights", mlp.weights, first.dtype, matrices)
        addresses[0] += width * hidden[0] * first.element_size()
        rows_of = {"biases": widths[1:], "norm_scales": hidden, "norm_biases": hidden}
        self.network = _Network(
            *(members, len(hidden), inputs - width, widths[-1], _ACTIVATIONS[mlp.activation]),
            *(first.dtype == torch.bfloat16, inputs * hidden[0], (ctypes.c_int64 * len(hidden))(*hidden)),
            _pointers(addresses),
            *(
                _pointers([0, *_addresses("packed weights", group, first.dtype, matrices[1:-1])]) if group else None
                for group in packed
            ),
            *(
                _pointers(_addresses(name, group, torch.float32, [members * size for size in rows_of[name]]))
                if group
                else None
                for name, group in zip(rows_of, vectors, strict=True)
            ),
        )
        # The structure holds addresses; these hold the memory.
        self._alive = (mlp, vectors, packed)
        count = found.vgf_workspace(self.network, *self.sizes, self.chunk, self.threads)
        self.workspace = torch.empty(count, dtype=torch.float32, device="cpu")
        self._common = (
            _address("workspace", self.workspace, torch.float32, count), LAYER_NORM_EPS, self.chunk, self.threads
        )  # fmt: skip
        self._share = _address("state_share", self.share, torch.float32, members * states * hidden[0])

    def _pack(self, mlp: MLPWeights, transpose: int) -> list[Tensor]:
        """The hidden layers' weights after the first, laid out for products with many rows."""
        packed = []
        for weight in mlp.weights[1:-1]:
            members, inputs, outputs = weight.shape
            sizes = (members, outputs, inputs) if transpose else (members, inputs, outputs)
            out = torch.empty_like(weight)
            half = weight.dtype == torch.bfloat16
            both = (_address("a weight", tensor, weight.dtype, weight.numel()) for tensor in (weight, out))
            self.library.vgf_pack(*both, *sizes, transpose, half, self.threads)
            packed.append(out)
        return packed


class NativeCriticAtStates(StackAtStates):
    """``reference.CriticAtStates`` for B states with N particles each; ``backward`` if scores are wanted."""

    def __init__(self, mlp: MLPWeights, observations: Tensor, particles: int, backward: bool = True) -> None:
        super().__init__(mlp, observations, particles, backward)

    def values(self, actions: Tensor) -> Tensor:
        """Q of every member: actions [B, N, A] -> [E, B, N], in float32."""
        q = torch.empty(self.network.members, *self.sizes, dtype=torch.float32, device="cpu")
        self._run(actions, "mean", q, None)
        return q

    def score(self, actions: Tensor, aggregation: str = "mean") -> Tensor:
        """grad_a of the members' mean or minimum: [B, N, A]."""
        score = torch.empty(actions.shape, dtype=torch.float32, device="cpu")
        self._run(actions, aggregation, None, score)
        return score.to(actions.dtype)

    def values_and_score(self, actions: Tensor, aggregation: str = "mean") -> tuple[Tensor, Tensor]:
        """Both."""
        q = torch.empty(self.network.members, *self.sizes, dtype=torch.float32, device="cpu")
        score = torch.empty(actions.shape, dtype=torch.float32, device="cpu")
        self._run(actions, aggregation, q, score)
        return q, score.to(actions.dtype)

    def _run(self, actions: Tensor, aggregation: str, q: Tensor | None, score: Tensor | None) -> None:
        x = actions.detach().float().contiguous().resolve_neg()
        states, particles = self.sizes
        rows = states * particles
        lengths = (self.network.members * rows, rows * self.network.rest)
        self.library.vgf_critic(
            *(self.network, self._share, _address("actions", x, torch.float32, lengths[1])),
            *(*self.sizes, aggregation == "min"),
            *(
                None if out is None else _address("a result", out, torch.float32, length)
                for out, length in zip((q, score), lengths, strict=True)
            ),
            *self._common,
        )


def behavior_flow(velocity: MLPWeights, observations: Tensor, noise: Tensor, steps: int) -> Tensor:
    """``reference.behavior_flow``: observations [B, O], noise [B, N, A] -> particles [B, N, A]."""
    field = StackAtStates(velocity, observations, noise.shape[1], backward=False)
    x = noise.detach().to(torch.float32, memory_format=torch.contiguous_format, copy=True)
    x = x.resolve_neg()
    head = velocity.weights[-1][0].detach().float().t().contiguous()
    last, width = velocity.weights[-1].shape[1:]
    states, particles = field.sizes
    field.library.vgf_behavior_flow(
        *(field.network, field._share, _address("the last weight", head, torch.float32, width * last)),
        *(_address("noise", x, torch.float32, states * particles * width), *field.sizes, steps, *field._common),
    )
    return x.to(noise.dtype)


# --- particles -------------------------------------------------------------------------------------------------------


class FlowSteps:
    """Steps of particles x [B, N, A], which are written: ``reference.svgd_step_``, from the first step on."""

    def __init__(self, x: Tensor, flow: Flow) -> None:
        found = library()
        assert found is not None
        self.library = found
        self.x = x
        particles, entries = x.shape[1:]
        adam = flow.optimizer == "adam"
        self.flow = _Flow(
            *(particles, entries, 0, flow.bandwidth_gradient, flow.repulsion, adam, _KERNELS[flow.kernel]),
            *(flow.step_size, flow.temperature, *_CONSTANTS.values()),
        )
        self.moments = torch.zeros(2 if adam else 0, *x.shape, dtype=torch.float32, device="cpu")
        self.threads = threads_for(x.numel() * particles)
        count = found.vgf_flow_workspace(self.flow, self.threads)
        self.workspace = torch.empty(count, dtype=torch.float32, device="cpu")
        self._x = _address("particles", x, torch.float32, x.numel())
        moments = [_address("a moment", m, torch.float32, x.numel()) for m in self.moments]
        self._moments: Sequence[int | None] = moments or (None, None)
        self._common = (len(x), _address("workspace", self.workspace, torch.float32, count), self.threads)

    def step(self, score: Tensor) -> None:
        """Move along the direction of a score [B, N, A]."""
        self.flow.step += 1
        score = score.contiguous().resolve_neg()
        given = _address("score", score, torch.float32, self.x.numel())
        self.library.vgf_flow_step(self.flow, self._x, given, *self._moments, *self._common)


def supports_particles(x: Tensor) -> bool:
    """Whether ``FlowSteps`` takes particles [B, N, A]."""
    return (
        x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.is_contiguous()
        and x.numel() > 0
        and x.shape[1] <= MAX_PARTICLES
        and not _chosen_off.get()
        and has_memory(x)
        and library() is not None
    )


def _addresses(name: str, tensors: Sequence[Tensor], dtype: torch.dtype, lengths: Sequence[int]) -> list[int]:
    """``_address`` of one tensor a layer."""
    return [
        _address(f"{name}[{i}]", tensor, dtype, length)
        for i, (tensor, length) in enumerate(zip(tensors, lengths, strict=True))
    ]


def _pointers(addresses: Sequence[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(addresses))(*addresses)
