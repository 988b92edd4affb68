"""What a GPU must decide between designs of the kernels, in under a minute: see ``first_minutes``, "questions".

    product   our tiles beside ``torch.bmm`` at the rows of one member and of two
    gap       time between launches of a graph, launched ahead of the end of the one before or not
    branches  two branches of a graph at once against one after the other
    alone     flow step, Euler step, rows of every mode, by themselves
    small     a chain of products of few rows

Every time is the median replay of a graph that holds many launches, divided by their number.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Emit = Callable[..., None]
REPLAYS = 20


class Timer:
    """Microseconds a launch, by graph replays between events; without a GPU the work is done once, untimed."""

    def __init__(self, device: torch.device, tiny: bool) -> None:
        self.device = device
        self.tiny = tiny

    def __call__(self, work: Callable[[], object], launches: int) -> float | None:
        """Microseconds a launch of ``work``, which makes so many."""
        work()
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        times = []
        for _ in range(REPLAYS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
        return statistics.median(times) / launches

    def times(self, number: int) -> int:
        """So many repetitions, or two where they are only tried."""
        return 2 if self.tiny else number


def ask(device: torch.device, dtype: torch.dtype, tiny: bool, emit: Emit) -> None:
    """Answer every question; one that fails says why and leaves the others."""
    timer = Timer(device, tiny)
    for question in (products, gaps, branches, alone, few_rows):
        try:
            question(timer, dtype, emit)
        except Exception as error:
            # The answers are worth more than an early end: what failed is in the record.
            emit(question=question.__name__, error=repr(error).splitlines()[0][:300])


def _sizes(timer: Timer) -> tuple[int, int]:
    """Rows and width."""
    return (12, 16) if timer.tiny else (2560, 512)


def _random(timer: Timer, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, device=timer.device, dtype=torch.float32).mul(0.05).to(dtype)


def products(timer: Timer, dtype: torch.dtype, emit: Emit) -> None:
    """A layer's product by our tiles and by ``torch.bmm``."""
    from vgf_fast.kernels import launch
    from vgf_fast.kernels.product import product

    rows, width = _sizes(timer)
    count = timer.times(40)
    tiles = [(256, 128, 64, 8, 3), (256, 128, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 4, 3), (64, 64, 64, 4, 3)]
    for members in (1, 2):
        a, out = (_random(timer, dtype, members, rows, width) for _ in range(2))
        w = _random(timer, dtype, members, width, width)
        for tile in tiles[-1:] if timer.tiny else tiles:
            for transposed in (False, True):

                def ours(tile: Any = tile, transposed: bool = transposed, a: Tensor = a, out: Tensor = out) -> None:
                    for n in range(count):
                        source, target = (a, out) if n % 2 == 0 else (out, a)
                        product(
                            source,
                            w,  # noqa: B023
                            target,
                            transposed=transposed,
                            precision=launch.precision(dtype),
                            pdl=launch.programmatic(timer.device),
                            tile=launch.ProductTile(*tile),
                        )

                us = timer(ours, count)
                emit(question="product", members=members, tile=tile, transposed=transposed, microseconds=us)

        def theirs(a: Tensor = a, out: Tensor = out, w: Tensor = w) -> None:
            for n in range(count):
                source, target = (a, out) if n % 2 == 0 else (out, a)
                torch.bmm(source, w, out=target)

        emit(question="product", members=members, tile="torch.bmm", microseconds=timer(theirs, count))


def _network(timer: Timer, dtype: torch.dtype, states: int, particles: int, pdl: bool | None = None) -> tuple[Any, Any]:
    """A critic at random states as the kernels see it, and its policy."""
    from vgf_fast.kernels.packing import pack_many
    from vgf_fast.kernels.sequence import Network

    from vgf_fast import VGFConfig, VGFPolicy
    from vgf_fast.backends.triton import stack

    _, width = _sizes(timer)
    policy: Any = VGFPolicy(VGFConfig(29, 8, hidden_dims=(width,) * 4, behavior_hidden_dims=(width,) * 4), timer.device)
    packed = pack_many([stack(policy.critic), stack(policy.behavior)], dtype)
    observations = _random(timer, torch.float32, states, 29)
    network = Network(packed[0], observations, particles)
    if pdl is not None:
        network.options = network.options._replace(PDL=pdl)
        network.pdl = pdl
    return network, packed


def gaps(timer: Timer, dtype: torch.dtype, emit: Emit) -> None:
    """A chain of the cheapest launches, launched ahead and not: what is beyond the kernel's own time is the gap."""
    from vgf_fast.kernels import launch

    count = timer.times(100)
    states = 2 if timer.tiny else 256
    for pdl in sorted({False, launch.programmatic(timer.device)}):
        network, _ = _network(timer, dtype, states, 10, pdl)
        z, out = (network.buffer()[0] for _ in range(2))
        z.normal_()

        def chain(network: Any = network, z: Tensor = z, out: Tensor = out) -> None:
            for n in range(count):
                source, target = (z, out) if n % 2 == 0 else (out, z)
                network.rows_of("forward", 1, z=source, out=target)

        emit(question="gap", dependent_launch=pdl, microseconds=timer(chain, count))


def branches(timer: Timer, dtype: torch.dtype, emit: Emit) -> None:
    """A chain of critic products and one of velocity products: together on two branches, and one after the other."""
    from vgf_fast.kernels import launch
    from vgf_fast.kernels.product import product

    rows, width = _sizes(timer)
    count = timer.times(30)
    chains = [
        (*(_random(timer, dtype, members, rows, width) for _ in range(2)), _random(timer, dtype, members, width, width))
        for members in (2, 1)
    ]

    def chain(a: Tensor, out: Tensor, w: Tensor) -> None:
        for n in range(count):
            source, target = (a, out) if n % 2 == 0 else (out, a)
            pdl = launch.programmatic(timer.device)
            product(source, w, target, precision=launch.precision(dtype), pdl=pdl)

    def serial() -> None:
        for one in chains:
            chain(*one)

    def both() -> None:
        if timer.device.type != "cuda":
            return serial()
        main, side = torch.cuda.current_stream(), torch.cuda.Stream()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            chain(*chains[1])
        chain(*chains[0])
        main.wait_stream(side)
        return None

    emit(question="branches", how="one after the other", microseconds=timer(serial, 1))
    emit(question="branches", how="at once", microseconds=timer(both, 1))


def alone(timer: Timer, dtype: torch.dtype, emit: Emit) -> None:
    """Each phase of a flow by itself, as often as there are launches of it in a chain of twenty."""
    from vgf_fast.kernels import sequence

    count = timer.times(20)
    states, particles = (2, 4) if timer.tiny else (256, 10)
    network, packed = _network(timer, dtype, states, particles)
    x = _random(timer, torch.float32, states, particles, 8).clamp(-1.0, 1.0)
    z, (h, dz, dh) = network.buffer(network.depth), network.buffer(3)
    q = torch.empty((2, states, particles), device=timer.device)
    last = network.depth - 1
    network.forward(x, z, h)

    def repeated(work: Callable[[], object]) -> Callable[[], None]:
        def repeat() -> None:
            for _ in range(count):
                work()

        return repeat

    modes: dict[str, Callable[[], object]] = {
        "rows first": lambda: network.rows_of("first", 0, x=x, z=z[0], out=h),
        "rows forward": lambda: network.rows_of("forward", 1, z=z[1], out=h),
        "rows head": lambda: network.rows_of("head", last, z=z[last], out=dz, q=q),
        "rows value": lambda: network.rows_of("value", last, z=z[last], q=q),
        "rows backward": lambda: network.rows_of("backward", 1, z=z[1], grad=dh, out=dz),
        "product": lambda: network.into(1, h, z[1]),
        "product transposed": lambda: network.back(network.mlp.hidden[:, 0], dz, dh),
        "critic forward": lambda: network.forward(x, z, h),
        "critic backward": lambda: network.backward(z, q, dz, dh),
    }
    for name, work in modes.items():
        emit(question="alone", what=name, microseconds=timer(repeated(work), count))
    observations = _random(timer, torch.float32, states, 29)
    flow = (packed[0], observations, x)
    for steps in (1, 2):
        us = timer(lambda: sequence.value_gradient_flow(*flow, steps, 0.1, 0.1, evaluate=False), 1)  # noqa: B023
        emit(question="alone", what=f"flow of {steps} steps", microseconds=us)
    for steps in (1, 2):
        us = timer(lambda: sequence.behavior_flow(packed[1], observations, x, steps), 1)  # noqa: B023
        emit(question="alone", what=f"behaviour flow of {steps} steps", microseconds=us)


def few_rows(timer: Timer, dtype: torch.dtype, emit: Emit) -> None:
    """Chains of products of ten rows, in every mode."""
    count = timer.times(75)
    network, _ = _network(timer, dtype, 1, 10)
    z, out, grad = (network.buffer()[0] for _ in range(3))
    for one in (z, out, grad):
        one.normal_()
    q = torch.empty((2, 1, 10), device=timer.device)
    for mode, tensors in (("forward", {}), ("plain", {}), ("head", {"q": q}), ("backward", {"grad": grad})):

        def chain(mode: str = mode, tensors: dict[str, Tensor] = tensors) -> None:
            for n in range(count):
                source, target = (z, out) if n % 2 == 0 else (out, z)
                network.small_of(mode, 1, z=source, out=target, **tensors)

        emit(question="small", mode=mode, microseconds=timer(chain, count))
