"""Launch configurations of the kernels: one fixed table per op, by padded size, and the checks made before a launch.

Its entries are the ones that compile without spilling registers to memory for NVIDIA sm_80, sm_90 and sm_100 and, where
it says so, AMD gfx942. Nothing here looks at a device, or imports Triton, before a kernel is launched.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import astuple, dataclass

import numpy as np
import torch
from torch import Tensor

MAX_PARTICLES = 128  # of the SVGD kernels, which hold all pairs of particles of one state in registers
MAX_ACTION_DIM = 64
MAX_WIDTH = 1024  # padded, of the kernels that hold whole rows of a hidden layer in registers
MAX_ACTING_STATES = 16  # of the kernel of a whole action
MAX_CANDIDATES = 4096  # particles of one state among which a selection kernel chooses
MAX_NEAREST = 32  # tokens of a query
PARTICLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGNAL_DTYPES = (*PARTICLE_DTYPES, torch.float64, torch.bool)  # of rewards and masks
AGGREGATIONS = ("mean", "min")  # over members
REDUCTIONS = ("mean", "max")  # over particles
OPTIMIZERS = ("adam", "ascent")  # of particles
SELECTIONS = ("max", "softmax", "random")


def padded(size: int) -> int:
    """The power of two that a block of ``size`` entries takes."""
    return 1 << max(size - 1, 0).bit_length()


@dataclass(frozen=True)
class SvgdLaunch:
    """Configuration of the SVGD kernels: one program a state."""

    block_n: int  # particles, padded
    block_c: int  # action columns whose direction is summed at a time
    unroll: int  # action columns whose loads are in flight together while distances are summed
    paired: bool  # take two columns at a time through shared memory instead; block_c is 2
    num_warps: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_N": self.block_n,
            "BLOCK_C": self.block_c,
            "UNROLL": self.unroll,
            "PAIRED": self.paired,
            "num_warps": self.num_warps,
        }


# block_n: (block_c, unroll, paired, num_warps). One warp reduces over all pairs with no barrier; more are taken where
# the block_n * block_n * block_c products of a chunk would not fit a warp's registers.
_SVGD = {
    4: (8, 4, False, 1),
    8: (8, 4, False, 1),
    16: (8, 4, False, 1),
    32: (4, 1, False, 4),
    64: (4, 1, False, 8),
    128: (2, 1, True, 8),
}


# Warps have 64 lanes, and rows of a block that are alike in all of them are held in scalar registers, which are few.
_SVGD_AMD = {**_SVGD, 64: (4, 1, False, 16), 128: (2, 1, True, 4)}


@functools.cache
def svgd(particles: int, amd: bool = False) -> SvgdLaunch:
    """Configuration for ``particles`` particles a state, from 1 to ``MAX_PARTICLES``."""
    table = _SVGD_AMD if amd else _SVGD
    block_n = max(padded(particles), min(table))
    return SvgdLaunch(block_n, *table[block_n])


@dataclass(frozen=True)
class SelectionLaunch:
    """Configuration of the kernels that reduce over the particles of a state: one program a block of states."""

    block_b: int  # states
    block_n: int  # particles, padded
    num_warps: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {"BLOCK_B": self.block_b, "BLOCK_N": self.block_n, "num_warps": self.num_warps}


@functools.cache
def selection(particles: int) -> SelectionLaunch:
    """Configuration for ``particles`` particles a state, from 1 to ``MAX_CANDIDATES``.

    Small blocks of states: a batch of 256 states with 10 particles still fills 16 programs.
    """
    block_n = padded(particles)
    return SelectionLaunch(min(max(256 // block_n, 1), 32), block_n, 2 if block_n <= 256 else min(block_n // 128, 8))


@dataclass(frozen=True)
class BlockLaunch:
    """Configuration of the kernels whose programs walk all layers of a perceptron for a block of rows."""

    block_m: int  # rows a program, whole states
    block_n: int  # columns of a tile of a layer's product
    block_k: int  # of the sums of the product
    rows: int  # whole rows normalised at a time
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "ROWS": self.rows,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


@functools.cache
def rows_block(particles: int, padded_width: int, dtype: torch.dtype) -> BlockLaunch:
    """Configuration of a block of whole states of ``particles`` rows, for weights of a padded width and dtype.

    64 rows balance the matrix unit and the port through which a processor reads the weights.
    """
    block_m = 64 if particles <= 64 else 128
    narrow = dtype.itemsize == 2
    block_n = min((256 if narrow else 128) * 64 // block_m, padded_width)
    block_k = min(64 if narrow else 32, padded_width)
    # With bfloat16 a warp a row: its reductions need no other warp.
    rows = min(block_m, max((4096 if narrow else 8192) // padded_width, 8))
    return BlockLaunch(block_m, block_n, block_k, rows, 8, 2)


@dataclass(frozen=True)
class ShareLaunch:
    """Configuration of the kernel that computes the states' share of the first layer."""

    block_m: int  # states
    block_n: int  # columns
    block_k: int
    num_warps: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
        }


@functools.cache
def state_share(padded_width: int) -> ShareLaunch:
    """Small tiles: a batch of 256 states and two members of 512 columns fill 128 programs."""
    return ShareLaunch(32, min(64, padded_width), 64, 4)


@dataclass(frozen=True)
class TrainingLaunch(BlockLaunch):
    """Configuration of the kernel of training."""

    gradient_rows: int  # whole rows at a time going backward

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {**super().options(), "GRADIENT_ROWS": self.gradient_rows}


@functools.cache
def training_block(padded_width: int, dtype: torch.dtype, forward: bool = True, amd: bool = False) -> TrainingLaunch:
    """Configuration of a launch of training, with a forward pass or not, for weights of a padded width and dtype.

    32 rows, so that a batch of 256 and two members give 16 programs: fewer rows read the weights more often.
    """
    narrow = dtype.itemsize == 2
    block_n = min(256 if narrow else 64 if amd else 128, padded_width)
    block_k = min(64 if narrow else 32, padded_width)
    # A launch that goes backward alone may be one for the inputs' gradients, which takes more registers.
    gradient_rows = min(32, (4096 if forward and not amd else 2048) // padded_width)
    return TrainingLaunch(32, block_n, block_k, min(32, 8192 // padded_width), 8, 2 if amd else 3, gradient_rows)


@dataclass(frozen=True)
class GradientLaunch:
    """Configuration of the kernel of weight gradients and optimiser: one program a tile of a gradient."""

    block_m: int
    block_n: int
    block_k: int  # rows of the batch at a time
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


GRADIENT_TILE = 64  # columns that the kernel of weight gradients may read past an operand's last


@functools.cache
def weight_gradient(dtype: torch.dtype, rows: int) -> GradientLaunch:
    """Configuration for layers' inputs of a dtype in blocks of ``rows`` rows.

    Eight entries a thread: Adam's tensors take two 64-bit addresses and a value for each of them.
    """
    return GradientLaunch(32, GRADIENT_TILE, min(64 if dtype.itemsize == 2 else 32, rows), 8, 4)


@dataclass(frozen=True)
class ActingLaunch:
    """Configuration of the kernel that computes a whole action: its work items are tiles of a layer."""

    programs: int  # at most one a processor, for they wait for one another
    block_m: int  # rows of an item
    velocity_tile: int  # columns of an item
    critic_tile: int
    num_warps: int  # each takes a part of a product's sum

    def particle_options(self, particles: int) -> dict[str, int]:
        """Keyword arguments of the launch that are the particle step's."""
        step = svgd(particles)
        # More columns at a time would take registers from the layers.
        return {
            "BLOCK_N": step.block_n,
            "BLOCK_C": min(step.block_c, 4),
            "UNROLL": step.unroll,
            "PAIRED": step.paired,
        }

    def entries(self) -> list[int]:
        """The numbers in their order."""
        return list(astuple(self))


@functools.cache
def acting(
    rows: int,
    members: int,
    velocity_width: int,
    critic_width: int,
    dtype: torch.dtype,
    particles: int,
    processors: int,
) -> ActingLaunch:
    """Configuration for so many rows and padded widths on a device with ``processors`` processors.

    Tiles are as narrow as the processors are many, for every item reads whole rows of what is before it.
    """
    block_m = 16
    blocks = -(-rows // block_m)

    def tile(width: int, copies: int) -> int:
        # A tile of weights waits in registers for the barrier: 32 columns of 512 rows in 16 bits are most that fit.
        widest = max(min(32, width, 32 * 1024 // (width * dtype.itemsize)), 16)
        return 16 if copies * blocks * (width // 16) <= processors else widest

    velocity_tile, critic_tile = tile(velocity_width, 1), tile(critic_width, members)
    items = blocks * max(velocity_width // velocity_tile, members * (critic_width // critic_tile))
    widest = max(velocity_width, critic_width)
    # A warp sums 16 products at least; the step of many particles takes more warps than a narrow layer.
    num_warps = max(min(widest // 16, 16 if widest > 512 else 8), svgd(particles).num_warps)
    return ActingLaunch(min(processors, items), block_m, velocity_tile, critic_tile, num_warps)


# Shared memory of the smallest architecture of each kind: sm_80 and gfx942.
ACTING_SHARED_BYTES, ACTING_SHARED_BYTES_AMD = 163 * 1024, 64 * 1024


def acting_fits(width: int, action_dim: int, dtype: torch.dtype, amd: bool = False) -> bool:
    """Whether the kernel of a whole action has room for what it holds of layers of a padded width.

    It is a layer's weights of all action entries and, but for AMD, a block of 16 rows in float32 beside them.
    """
    column_bytes = max(padded(action_dim), 16) * dtype.itemsize + (0 if amd else 16 * 4)
    return width * column_bytes <= (ACTING_SHARED_BYTES_AMD if amd else ACTING_SHARED_BYTES)


# Estimates for an H200, to be measured: a phase of the kernel of a whole action with its barrier, and how fast one
# processor reads weights.
PHASE_US = 2.2
PORT_BYTES_PER_US = 110e3


def acts_in_one_launch(
    batch: int,
    particles: int,
    members: int,
    velocity_width: int,
    critic_width: int,
    dtype: torch.dtype,
    processors: int,
    action_dim: int,
    amd: bool = False,
) -> bool:
    """Whether to spread the layers of a whole action over all processors, rather than walk them in blocks of rows.

    It is where the weights fit, and where a layer takes a program by itself, which reads all its weights, longer than
    the phase that all programs make of it, in as many rounds as they need for its tiles.
    """
    rows = batch * particles
    if not 1 <= batch <= MAX_ACTING_STATES or particles > MAX_PARTICLES:
        return False
    if not acting_fits(max(velocity_width, critic_width), action_dim, dtype, amd):
        return False
    config = acting(rows, members, velocity_width, critic_width, dtype, particles, processors)
    items = -(-rows // config.block_m) * members * (critic_width // config.critic_tile)
    rounds = -(-items // config.programs)
    return rounds * PHASE_US * PORT_BYTES_PER_US < critic_width**2 * dtype.itemsize and config.programs > 1


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at once for certain: one a processor of the GPU, and one in the interpreter."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@dataclass(frozen=True)
class NormsLaunch:
    """Configuration of the kernel of squared norms: one program a block of rows."""

    block_n: int  # rows
    block_d: int  # of the sums
    num_warps: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {"BLOCK_N": self.block_n, "BLOCK_D": self.block_d, "num_warps": self.num_warps}


@functools.cache
def squared_norms(width: int) -> NormsLaunch:
    """Configuration for rows of ``width`` columns."""
    return NormsLaunch(16, min(max(padded(width), 16), 256), 4)


@dataclass(frozen=True)
class NearestLaunch:
    """Configuration of the kernel of the nearest tokens: one program a block of rows and a part of the vocabulary."""

    block_m: int  # rows
    block_n: int  # tokens of a tile
    block_k: int  # of the sums of the product
    num_warps: int
    num_stages: int
    width: int  # tokens of a row's list
    tokens: int  # of a part of the vocabulary

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "BLOCK_M": self.block_m,
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.block_k,
            "WIDTH": self.width,
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
        }


MAX_LISTED = 4096  # tokens of a query's lists, which one program merges


@functools.cache
def nearest_token(
    rows: int, vocabulary: int, k: int, dtype: torch.dtype, processors: int, widest: int, amd: bool = False
) -> NearestLaunch:
    """Configuration for ``k`` tokens, of 1 to ``MAX_NEAREST``, of each of so many rows, multiplied in a dtype.

    A tile is of ``widest`` tokens at most. Lists hold a few tokens more than ``k``: the product's rounding may mistake
    the order of the last ones. As many parts of the vocabulary as fill the processors, each of a tile at least.
    """
    width = padded(k + max(3, k // 4))
    narrow = dtype.itemsize == 2
    block_m = 16 if rows <= 16 else 64 if rows <= 64 or width > 16 else 128
    block_n = min(widest, 256 if narrow and block_m == 128 else 128)
    block_k = 64 if narrow else 32
    num_warps = 8 if block_m == 128 else 4
    blocks = -(-rows // block_m)
    # A tile of few rows does not keep a processor busy by itself.
    parts = min(max((2 if block_m == 16 else 1) * processors // blocks, 1), MAX_LISTED // width)
    tiles = -(-vocabulary // block_n)
    return NearestLaunch(block_m, block_n, block_k, num_warps, 2 if amd else 3, width, -(-tiles // parts) * block_n)


def wide_tiles(device: torch.device) -> bool:
    """Whether the matrix unit reads shared memory and sums in registers: what it does not read leaves room in these."""
    return device.type != "cpu" and torch.version.hip is None and torch.cuda.get_device_capability(device)[0] == 9


@dataclass(frozen=True)
class MergeLaunch:
    """Configuration of the kernel that merges a row's lists of nearest tokens: one program a row."""

    width: int  # tokens scored anew
    block_l: int  # tokens of all lists, padded
    block_d: int  # of the sums
    num_warps: int

    def options(self) -> dict[str, int]:
        """Keyword arguments of the launch."""
        return {
            "WIDTH": self.width,
            "BLOCK_L": self.block_l,
            "BLOCK_D": self.block_d,
            "num_warps": self.num_warps,
        }


@functools.cache
def nearest_merge(parts: int, width: int) -> MergeLaunch:
    """Configuration for a list of ``width`` tokens of each of so many parts of the vocabulary."""
    return MergeLaunch(width, padded(parts * width), max(1024 // width, 16), 4)


TOKEN_FLOW_CHUNK = 512  # dimensions whose squares are summed by themselves
TOKEN_FLOW_DISTANCES = 2**22  # of all programs together, at most


@dataclass(frozen=True)
class TokenFlowLaunch:
    """Configuration of the SVGD kernels of few particles in very many dimensions."""

    step: SvgdLaunch
    span: int  # dimensions of a program

    def distance_options(self) -> dict[str, int]:
        """Keyword arguments of the launch that sums distances."""
        options = self.step.options()
        return {name: options[name] for name in ("BLOCK_N", "UNROLL", "PAIRED", "num_warps")}

    def direction_options(self) -> dict[str, int]:
        """Keyword arguments of the launch that computes the direction."""
        options = self.step.options()
        return {name: options[name] for name in ("BLOCK_N", "BLOCK_C", "PAIRED", "num_warps")}


@functools.cache
def token_flow(particles: int, dimensions: int, processors: int, amd: bool = False) -> TokenFlowLaunch:
    """Configuration for so many particles, from 1 to ``MAX_PARTICLES``, and dimensions.

    Small tiles take many programs a processor; every program finds the median for itself, so none is too short.
    """
    step = svgd(particles, amd)
    programs = processors * max(16 // step.num_warps, 1)
    programs = min(programs, max(TOKEN_FLOW_DISTANCES // particles**2, 1))
    # A multiple of the columns that are summed at a time.
    span = -(-dimensions // programs)
    return TokenFlowLaunch(step, max(-(-span // 64) * 64, 256))


AGGREGATE_BLOCK, AGGREGATE_WARPS = 512, 4  # values a program of the elementwise reduction over members
ACTION_BLOCK = 16  # action columns copied at a time by the selection


def interpreted() -> bool:
    """Whether Triton runs its kernels in the interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    import triton

    return bool(triton.knobs.runtime.interpret)


FLOAT32_PRECISIONS = ("tf32", "ieee")
_float32_precision: str | None = None


def set_float32_precision(value: str | None) -> None:
    """Choose how the kernels multiply float32: "tf32", "ieee" (exact, without the matrix unit), or None, the default.

    The default is tf32, which is also JAX's on a GPU, and "ieee" in the interpreter.
    Raises ``ValueError`` for any other value.
    """
    global _float32_precision
    if value is not None and value not in FLOAT32_PRECISIONS:
        raise ValueError(f"float32 precision is {value!r}, expected 'tf32', 'ieee' or None")
    _float32_precision = value


def precision(dtype: torch.dtype) -> str:
    """``input_precision`` of products of operands of ``dtype``; of no consequence for narrower ones than float32."""
    if dtype != torch.float32:
        return "tf32"
    return _float32_precision or ("ieee" if interpreted() else "tf32")


def check_device(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if Triton cannot run on the tensor's device."""
    if tensor.device.type == "cpu" and not interpreted():
        raise ValueError(
            f"{name} is on cpu, expected a GPU: Triton kernels run on the CPU only in its interpreter, with "
            "TRITON_INTERPRET=1 set before Triton is imported"
        )


def check_same_device(name: str, tensor: Tensor, other: str, device: torch.device) -> None:
    """Raise ``ValueError`` if the tensor is not on the device of ``other``."""
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}, the device of {other}")


def check_dtype(name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    """Raise ``ValueError`` if the tensor's dtype is none of ``dtypes``."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} has dtype {tensor.dtype}, expected {' or '.join(map(str, dtypes))}")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    """Raise ``ValueError`` if the tensor's shape is not ``shape``, which ``meaning`` explains."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}: {meaning}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise ``ValueError`` if the value is none of ``choices``."""
    if value not in choices:
        raise ValueError(f"{name} is {value!r}, expected {' or '.join(map(repr, choices))}")


def check_positive(name: str, value: float) -> None:
    """Raise ``ValueError`` unless the value is a number > 0."""
    if not value > 0.0:
        raise ValueError(f"{name} is {value!r}, expected a number > 0")


def check_integer(name: str, value: object, low: int) -> int:
    """The value, NumPy's integers included, as an int; ``ValueError`` unless it is one and at least ``low``."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < low:
        raise ValueError(f"{name} is {value!r}, expected an integer >= {low}")
    return int(value)


def check_span(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if one state's particles [N, A] do not lie within the kernels' 32-bit offsets."""
    if sum((size - 1) * stride for size, stride in zip(tensor.shape[1:], tensor.stride()[1:], strict=True)) >= 2**31:
        raise ValueError(
            f"{name} has strides {tensor.stride()}, so that one state spans 2**31 elements or more: make it contiguous"
        )


def check_writable(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` if several entries of the tensor are one place in memory, as after ``expand``."""
    if any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ValueError(f"{name} has strides {tensor.stride()}: it is written, and its entries share memory; clone it")


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device the current one, which is where Triton launches."""
    return contextlib.nullcontext() if tensor.device.type == "cpu" else torch.cuda.device(tensor.device)
