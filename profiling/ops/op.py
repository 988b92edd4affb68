"""What an operation is: inputs, work, and implementations that are prepared once and then run.

``sizes.batch`` is the number of states. Matrix products are in the inputs' dtype, particles and moments in float32;
bfloat16 is autocast's for the plain implementations.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor

from profiling.compiled import CompiledAgent
from profiling.eager import EagerAgent
from profiling.ops import work
from profiling.torch_methods import configurations
from profiling.worker import Sizes
from vgf_fast import VGFPolicy, functional
from vgf_fast.functional import Backend

GRIDS = {
    "paper": Sizes(),
    "one state": Sizes(batch=1),
    "64k rows": Sizes(batch=8192, particles=8),
    "wide": Sizes(hidden=1024),
    "odd": Sizes(17, 5, batch=37, particles=7, behavior_steps=7, flow_steps=3, hidden=129, layers=3, members=3),
}
IMPLEMENTATIONS = ("triton", "torch", "eager", "compile")
SHAKE = 0.2  # size of the random biases: a fresh network's are zero

Outputs = dict[str, Tensor]
Function = TypeVar("Function", bound=Callable[..., Any])
Compiler = Callable[[Function], Function]


@dataclasses.dataclass
class Inputs:
    """What an operation reads, and for some what it writes: networks and data on one device."""

    sizes: Sizes
    dtype: torch.dtype  # of the matrix products
    policy: VGFPolicy
    data: dict[str, Any]  # tensors; the keys are the arguments' names

    def clone(self) -> Inputs:
        """The same numbers in other memory."""
        data = {name: tensor.clone() for name, tensor in self.data.items()}
        return Inputs(self.sizes, self.dtype, copy.deepcopy(self.policy), data)

    def to(self, dtype: torch.dtype) -> Inputs:
        """A copy with weights and data in another dtype, for the truth."""
        data = {name: tensor.to(dtype) for name, tensor in self.data.items()}
        return Inputs(self.sizes, dtype, copy.deepcopy(self.policy).to(dtype), data)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.policy.device


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An implementation bound to inputs."""

    run: Callable[[], Outputs]
    state: Callable[[], Outputs] = dict  # what ``run`` wrote besides, named and shaped as the reference's


def library(function: Callable[[Inputs, Backend], Outputs]) -> Callable[[Inputs, Backend], Prepared]:
    """An implementation that writes none of its inputs, from the function that computes the outputs."""
    return lambda inputs, backend: Prepared(torch.no_grad()(lambda: function(inputs, backend)))


def plain(function: Callable[..., Outputs]) -> Callable[[Inputs, EagerAgent, Compiler[Any]], Prepared]:
    """An implementation that writes none of its inputs, from a function of an agent and the data by their names."""

    def prepare(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any]) -> Prepared:
        compiled = compiler(function)
        return Prepared(torch.no_grad()(lambda: compiled(agent, **inputs.data)))

    return prepare


@dataclasses.dataclass(frozen=True, kw_only=True)
class Op:
    """One operation. Functions of sizes count; of inputs, compute."""

    name: str
    shapes: Callable[[Sizes], work.Shapes]  # of the data it reads
    uniform: tuple[str, ...] = ()  # data in [-1, 1]; the others are standard normal
    squared: tuple[str, ...] = ()  # data that are not negative: squares of normal numbers
    networks: Mapping[str, int] = dataclasses.field(default_factory=dict)  # how often each one's parameters are moved
    trains: bool = False  # whether it writes the networks, whose weights are then float32 always
    reference: Callable[[Inputs], Outputs]  # in the dtype of the inputs; in float64 it is the truth
    library: Callable[[Inputs, Backend], Prepared]  # this library on a backend, "triton" or "torch"
    plain: Callable[[Inputs, EagerAgent, Compiler[Any]], Prepared]  # as one writes it in PyTorch, compiled or not
    bounds: Mapping[str, str]  # output, before any number -> its entry in the tests' table of bounds
    matmul_flops: Callable[[Sizes, bool], int] = lambda sizes, needed: 0  # as needed, or as the plain one does it
    other_flops: Callable[[Sizes], int] = lambda sizes: (
        0
    )  # of pairs and sums; LayerNorm, activations, Adam: not counted
    written: Callable[[Sizes], int]  # numbers of float32 that it writes, without networks

    def build(self, sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> Inputs:
        """Random inputs; an operation without networks gets a tiny policy."""
        held = sizes if self.networks else dataclasses.replace(sizes, hidden=1, layers=1)
        policy = _policy(held, torch.float32 if self.trains else dtype, device, generator)
        data = {}
        for name, shape in self.shapes(sizes).items():
            if name in self.uniform:
                drawn = torch.rand(shape, generator=generator, device=generator.device) * 2.0 - 1.0
            else:
                drawn = torch.randn(shape, generator=generator, device=generator.device)
            data[name] = (drawn.square() if name in self.squared else drawn).to(device)
        return Inputs(sizes, dtype, policy, data)

    def flops(self, sizes: Sizes) -> int:
        """Floating-point operations it needs: those of matrix products, of SVGD's pairs and of the TD target."""
        return self.matmul_flops(sizes, True) + self.other_flops(sizes)

    def bytes(self, sizes: Sizes, dtype: torch.dtype) -> int:
        """Bytes it must move with cold caches: what it reads and writes, weights included, once."""
        width = work.FLOAT_BYTES if self.trains else dtype.itemsize
        weights = sum(times * work.NETWORKS[name](sizes).parameters for name, times in self.networks.items())
        return width * weights + work.FLOAT_BYTES * (work.numbers(self.shapes(sizes)) + self.written(sizes))

    def bytes_of(self, inputs: Inputs) -> int:
        """Bytes of the inputs in memory, without those networks it does not read."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors(inputs))

    def tensors(self, inputs: Inputs) -> Iterator[Tensor]:
        """What it reads, or writes in place."""
        yield from inputs.data.values()
        for name in self.networks:
            yield from getattr(inputs.policy, name).parameters()

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Dtypes of the matrix products it may be asked for; without networks everything is float32."""
        return (torch.float32, torch.bfloat16) if self.networks else (torch.float32,)

    def prepare(self, implementation: str, inputs: Inputs, compiler: str = "inductor") -> Prepared:
        """Bind an implementation to inputs, which it may write. ``compiler`` is torch.compile's backend.

        Raises ``ValueError`` for an unknown implementation, and for what cannot run here.
        """
        if implementation == "triton":
            return self.library(inputs, "triton")
        if implementation == "torch":
            return self.library(inputs, "torch")
        if implementation not in IMPLEMENTATIONS:
            raise ValueError(f"implementation is {implementation!r}, expected one of {', '.join(IMPLEMENTATIONS)}")
        _, train = configurations(inputs.sizes)
        if implementation == "eager":
            prepared = self.plain(inputs, EagerAgent(_in_float32(inputs.policy), train), lambda function: function)
        else:
            agent = CompiledAgent(_in_float32(inputs.policy), train)
            prepared = self.plain(inputs, agent, functools.partial(_compile, backend=compiler))
        return Prepared(_with_autocast(prepared.run, inputs), prepared.state)


def obstacle(implementation: str, device: torch.device) -> str | None:
    """Why an implementation cannot run on this machine, or None."""
    if implementation == "triton":
        if not functional.triton_installed():
            return "Triton is not installed"
        if device.type != "cuda" and not functional.triton_interpreted():
            return "Triton needs a GPU"
    if implementation == "compile" and device.type == "cpu" and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler"
    return None


def _policy(sizes: Sizes, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> VGFPolicy:
    """A policy whose biases and LayerNorms are not those of a fresh network."""
    config, _ = configurations(sizes)
    policy = VGFPolicy(config, seed=int(torch.randint(2**31, (), generator=generator, device=generator.device)))
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "weights" not in name:
                noise = torch.randn(parameter.shape, generator=generator, device=generator.device)
                parameter.add_(SHAKE * noise.to(parameter.device))
    return policy.to(device, dtype)


def _in_float32(policy: VGFPolicy) -> VGFPolicy:
    """The policy, its weights widened: autocast narrows them again at every call."""
    return policy if policy.dtype == torch.float32 else copy.deepcopy(policy).float()


def _with_autocast(run: Callable[[], Outputs], inputs: Inputs) -> Callable[[], Outputs]:
    if inputs.dtype == torch.float32:
        return run

    def autocast() -> Outputs:
        with torch.autocast(inputs.device.type, inputs.dtype):
            return run()

    return autocast


@functools.cache
def _compile(function: Callable[..., Any], backend: str) -> Any:
    """One compilation serves all copies of inputs. CUDA graphs are the bench's, the same for all implementations."""
    mode = "max-autotune-no-cudagraphs" if backend == "inductor" else None
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False, mode=mode)
