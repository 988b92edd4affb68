"""Launch configurations of the kernels: one fixed table per op, by padded size, and the checks made before a launch.

Its entries are the ones that compile without spilling registers to memory for NVIDIA sm_80, sm_90 and sm_100 and, where
it says so, AMD gfx942. Nothing here looks at a device, or imports Triton, before a kernel is launched.
"""

from __future__ import annotations

import contextlib
import functools
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

MAX_PARTICLES = 128  # of the SVGD kernels, which hold all pairs of particles of one state in registers
MAX_ACTION_DIM = 128
MAX_WIDTH = 1024  # padded, of the kernels that hold whole rows of a hidden layer in registers
MAX_CANDIDATES = 4096  # particles of one state among which a selection kernel chooses
MAX_NEAREST = 32  # tokens of a query
PARTICLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIGNAL_DTYPES = (*PARTICLE_DTYPES, torch.float64, torch.bool)  # of rewards and masks
AGGREGATIONS = ("mean", "min")  # over members
REDUCTIONS = ("mean", "max")  # over particles
SELECTIONS = ("max", "softmax", "random")


def padded(size: int) -> int:
    """The power of two that a block of ``size`` entries takes."""
    return 1 << max(size - 1, 0).bit_length()


class SvgdLaunch(NamedTuple):
    """Configuration of the SVGD kernels: one program a state."""

    block_n: int  # particles, padded
    block_c: int  # action columns whose direction is summed at a time
    unroll: int  # action columns whose loads are in flight together while distances are summed
    paired: bool  # take two columns at a time through shared memory instead; block_c is 2
    num_warps: int


# block_n: (block_c, unroll, paired, num_warps). One warp reduces over all pairs with no barrier; more are taken where
# the block_n * block_n * block_c products of a chunk would not fit a warp's registers.
_SVGD = {
    4: (8, 4, False, 1),
    8: (8, 4, False, 1),
    16: (8, 4, False, 2),
    32: (4, 1, False, 4),
    64: (4, 1, False, 16),
    128: (2, 1, True, 8),
}


# Warps have 64 lanes, and rows of a block that are alike in all of them are held in scalar registers, which are few.
_SVGD_AMD = {**_SVGD, 128: (2, 1, True, 4)}


@functools.cache
def svgd(particles: int, amd: bool = False) -> SvgdLaunch:
    """Configuration for ``particles`` particles a state, from 1 to ``MAX_PARTICLES``."""
    table = _SVGD_AMD if amd else _SVGD
    block_n = max(padded(particles), min(table))
    return SvgdLaunch(block_n, *table[block_n])


class SelectionLaunch(NamedTuple):
    """Configuration of the kernels that reduce over the particles of a state: one program a block of states."""

    block_b: int  # states
    block_n: int  # particles, padded
    num_warps: int


@functools.cache
def selection(particles: int) -> SelectionLaunch:
    """Configuration for ``particles`` particles a state, from 1 to ``MAX_CANDIDATES``.

    Small blocks of states: a batch of 256 states with 10 particles still fills 16 programs.
    """
    block_n = padded(particles)
    return SelectionLaunch(min(max(256 // block_n, 1), 32), block_n, 2 if block_n <= 256 else min(block_n // 128, 8))


# --- products and rows of a network ----------------------------------------------------------------------------------


class ProductTile(NamedTuple):
    """Configuration of a product: the tile of a program, and how it is computed."""

    block_m: int
    block_n: int
    block_k: int  # of the sums
    num_warps: int
    num_stages: int


# Rows of all members from which a tile pays, and the tile for 16-bit weights; wider weights take half the columns of a
# sum. Two members of the paper's 2,560 rows fill 80 programs of the first, one of them 80 of the second.
_TILES = ((4096, (256, 128, 64, 8, 3)), (2048, (128, 128, 64, 8, 3)), (0, (64, 64, 64, 4, 3)))
# Of 64 KiB of shared memory a processor.
_TILES_AMD = ((2048, (128, 128, 64, 8, 2)), (0, (64, 64, 64, 4, 2)))
_MIN_ROWS = 16


@functools.cache
def product_tile(rows: int, columns: int, members: int, dtype: torch.dtype, amd: bool = False) -> ProductTile:
    """Configuration of a product of so many rows, columns and members, but for sums shorter than it."""
    # Narrow results take the smallest tile: more programs.
    count = rows * members if columns >= 128 else 0
    tiles = _TILES_AMD if amd else _TILES
    block_m, block_n, block_k, num_warps, num_stages = next(tile for least, tile in tiles if count >= least)
    if dtype.itemsize > 2:
        block_m, block_k = min(block_m, 128), block_k // 2
    return ProductTile(min(block_m, max(padded(rows), _MIN_ROWS)), block_n, block_k, num_warps, num_stages)


class SmallTile(NamedTuple):
    """Configuration of a product of few rows."""

    block_m: int
    block_n: int
    num_warps: int


MANY_ROWS = 2048  # rows from which a program of the backward pass takes more of them
FEW_ROWS = 160  # rows up to which a layer is spread over as many programs as there are


def small_tile(padded_width: int) -> SmallTile:
    """Narrow tiles for many programs; a warp sums 16 products at least."""
    block_m, block_n = (64, padded_width) if interpreted() else (16, 16)
    return SmallTile(block_m, block_n, min(padded_width // 16, 16 if padded_width > 512 else 4))


class EulerTile(NamedTuple):
    """Configuration of an Euler step."""

    block_m: int
    block_n: int  # columns of the first layer at a time
    block_k: int  # of the head's sums
    columns: int  # of the first layer, a program
    num_warps: int


EULER_BYTES = 32 * 1024  # of a turn of the head's sums


@functools.cache
def euler_tile(rows: int, padded_width: int, padded_action: int, dtype: torch.dtype) -> EulerTile:
    """16 rows a program: 160 programs of the paper's 2,560 rows. Of few rows each takes a part of the first layer."""
    block_m = 16
    tile = min(512 // dtype.itemsize, padded_width)
    largest = EULER_BYTES // ((block_m + padded_action) * dtype.itemsize)
    block_k = min(padded_width, 1 << (largest.bit_length() - 1))
    return EulerTile(block_m, tile, block_k, tile if rows <= FEW_ROWS else padded_width, 4)


class Layers(NamedTuple):
    """How a network's layers are computed; for every number of rows by ``layers``, or as a test wants it."""

    few: bool  # a layer is spread over as many programs as there are
    tile: ProductTile | None = None
    rows: int | None = None  # whole rows a program


def layers(rows: int) -> Layers:
    """The configuration for so many rows."""
    return Layers(rows <= FEW_ROWS)


def amd() -> bool:
    """Whether PyTorch is one for AMD's GPUs."""
    return torch.version.hip is not None


def rows_block(padded_width: int, many: bool = False) -> int:
    """Whole rows a program of one warp: so many that a row tile takes 32 registers a thread, or 64 of ``many`` rows."""
    # The interpreter's time is that of its programs.
    return max((32 * 1024 if interpreted() else 2048 if many else 1024) // padded_width, 1)


@functools.cache
def programmatic(device: torch.device) -> bool:
    """Whether a kernel can be launched before the one ahead of it has ended: on NVIDIA GPUs from sm_90 on."""
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (9, 0)


def options(num_warps: int, num_stages: int, pdl: bool = False) -> dict[str, int | bool]:
    """Keyword arguments of a launch."""
    chosen: dict[str, int | bool] = {"num_warps": num_warps, "num_stages": num_stages}
    return {**chosen, "launch_pdl": True} if pdl else chosen


def arguments(config: NamedTuple) -> dict[str, int]:
    """A configuration as keyword arguments of a launch: constants of kernels are in capitals, warps and stages not."""
    fields = config._asdict().items()
    return {name if name.startswith("num_") else name.upper(): value for name, value in fields}


def share_tile(padded_width: int) -> tuple[int, int, int]:
    """States, columns and terms of a sum: small tiles, of which 256 states and two members of 512 columns take 128."""
    return 32, min(64, padded_width), 64


class GradientLaunch(NamedTuple):
    """Configuration of the kernel of weight gradients and optimiser: one program a tile of a gradient."""

    block_m: int
    block_n: int
    block_k: int  # rows of the batch at a time
    num_warps: int
    num_stages: int


GRADIENT_TILE = 64  # columns that the kernel of weight gradients may read past an operand's last


@functools.cache
def weight_gradient(dtype: torch.dtype) -> GradientLaunch:
    """Configuration for layers' inputs of a dtype; the rows of a batch are padded to whole ``block_k``.

    Eight entries a thread: Adam's tensors take two 64-bit addresses and a value for each of them.
    """
    return GradientLaunch(32, GRADIENT_TILE, 64 if dtype.itemsize == 2 else 32, 8, 4)


@functools.cache
def processors(device: torch.device) -> int:
    """How many programs run at once for certain: one a processor of the GPU, and one in the interpreter."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


class NormsLaunch(NamedTuple):
    """Configuration of the kernel of squared norms: one program a block of rows."""

    block_n: int  # rows
    block_d: int  # of the sums
    num_warps: int


@functools.cache
def squared_norms(width: int) -> NormsLaunch:
    """Configuration for rows of ``width`` columns."""
    return NormsLaunch(16, min(max(padded(width), 16), 256), 4)


class NearestLaunch(NamedTuple):
    """Configuration of the kernel of the nearest tokens: one program a block of rows and a part of the vocabulary."""

    block_m: int  # rows
    block_n: int  # tokens of a tile
    block_k: int  # of the sums of the product
    num_warps: int
    num_stages: int
    width: int  # tokens of a row's list
    tokens: int  # of a part of the vocabulary


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


class MergeLaunch(NamedTuple):
    """Configuration of the kernel that merges a row's lists of nearest tokens: one program a row."""

    width: int  # tokens scored anew
    block_l: int  # tokens of all lists, padded
    block_d: int  # of the sums
    num_warps: int


@functools.cache
def nearest_merge(parts: int, width: int) -> MergeLaunch:
    """Configuration for a list of ``width`` tokens of each of so many parts of the vocabulary."""
    return MergeLaunch(width, padded(parts * width), max(1024 // width, 16), 4)


TOKEN_FLOW_CHUNK = 512  # dimensions whose squares are summed by themselves
TOKEN_FLOW_DISTANCES = 2**22  # of all programs together, at most


class TokenFlowLaunch(NamedTuple):
    """Configuration of the SVGD kernels of few particles in very many dimensions."""

    step: SvgdLaunch
    span: int  # dimensions of a program


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
