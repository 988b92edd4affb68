"""CUDA graphs: a sequence of launches recorded once and replayed as one, at fixed addresses."""

from __future__ import annotations

import contextlib
import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

Function = Callable[..., tuple[Tensor, ...]]
Result = TypeVar("Result")


class Capture(NamedTuple):
    """A recorded function: write its ``inputs``, ``replay``, read its ``outputs``, which the next replay overwrites."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    replay: Callable[[], None]


def capture(function: Function, inputs: tuple[Tensor, ...], generators: Sequence[torch.Generator]) -> Capture:
    """Record ``function(*inputs)`` without running it; what it draws from ``generators`` every replay draws anew.

    Other threads may use the GPU meanwhile. Whatever the function or the driver raises is raised again, with current
    stream and generators as they were: a failed recording leaves both its own.
    """
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    # States of their own: the generator's is tied to the graph as soon as it is registered.
    states = [generator.clone_state() for generator in generators]
    try:
        for generator in generators:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            outputs = function(*inputs)
    except BaseException:
        torch.cuda.set_stream(stream)
        for generator, state in zip(generators, states, strict=True):
            generator.graphsafe_set_state(state)
        # What has not been recorded to its end cannot always be taken back either.
        with contextlib.suppress(RuntimeError):
            graph.reset()
        raise
    return Capture(inputs, outputs, graph.replay)


def fork(device: torch.device, work: Callable[[], Result]) -> Callable[[], Result]:
    """Issue ``work`` beside what the caller issues next; what is returned waits for it and gives its result.

    On a GPU it goes to a stream of its own, behind all that the current one has been given, and the current one waits
    for it when the result is asked for: while a graph is recorded, both are branches of it. Whoever calls keeps every
    tensor that crosses from one to the other until then, for its memory may be used anew in either.
    Elsewhere the work is done at once.
    """
    if device.type != "cuda":
        result = work()
        return lambda: result
    side = torch.cuda.Stream(device)
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        result = work()

    def join() -> Result:
        torch.cuda.current_stream(device).wait_stream(side)
        return result

    return join


class GraphCache:
    """The captures of one piece of work, by key: whatever the recorded launches depend on besides their inputs.

    A key must hold the addresses of all tensors that are read but are no inputs, and all numbers baked into launches.
    The first call of a key runs the function itself, which compiles kernels and fills caches; the second records it. A
    function that cannot be recorded is run as it is from then on, and one line says so.
    """

    def __init__(self, work: str, limit: int = 16) -> None:
        self.work = work
        self.limit = limit
        self.impossible = False
        self._captures: OrderedDict[Hashable, Capture | None] = OrderedDict()

    def __deepcopy__(self, memo: dict[int, object]) -> GraphCache:
        """Of no use to a copy, whose tensors lie elsewhere: an empty cache."""
        return GraphCache(self.work, self.limit)

    def __reduce__(self) -> tuple[type[GraphCache], tuple[str, int]]:
        return GraphCache, (self.work, self.limit)

    def run(
        self,
        key: Hashable,
        function: Function,
        inputs: tuple[Tensor, ...],
        rows: int | None = None,
        generators: Sequence[torch.Generator] = (),
    ) -> tuple[Tensor, ...]:
        """``function(*inputs)`` by a replay where there is one; its results are the caller's to keep.

        Inputs are copied to fixed memory, with ``rows`` padded by zeros to so many rows. What is recorded was run on
        memory of the same shapes before: nothing is left to compile while recording.
        """

        def make_inputs() -> tuple[Tensor, ...]:
            return tuple(
                torch.zeros((len(t) if rows is None else rows, *t.shape[1:]), dtype=t.dtype, device=t.device)
                for t in inputs
            )

        def fill(targets: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            for target, source in zip(targets, inputs, strict=True):
                target[: len(source)].copy_(source)
            return targets

        found = self.get(key, function, make_inputs, generators)
        if found is None:
            return function(*fill(make_inputs()))
        fill(found.inputs)
        found.replay()
        return tuple(output.clone() for output in found.outputs)

    def get(
        self,
        key: Hashable,
        function: Function,
        make_inputs: Callable[[], tuple[Tensor, ...]],
        generators: Sequence[torch.Generator] = (),
    ) -> Capture | None:
        """The capture for ``key``, or None: then call the function itself, this time.

        ``make_inputs`` allocates the inputs' fixed memory.
        """
        if self.impossible:
            return None
        if key not in self._captures:
            self._captures[key] = None
            while len(self._captures) > self.limit:
                self._captures.popitem(last=False)
            return None
        self._captures.move_to_end(key)
        found = self._captures[key]
        if found is None:
            try:
                found = self._captures[key] = capture(function, make_inputs(), generators)
            except Exception as error:
                # Whatever the driver or a library objects to, the work itself can be done without a graph.
                self.impossible = True
                self._captures.clear()
                logger.warning("%s runs without a CUDA graph: %s", self.work, repr(error).splitlines()[0])
        return found


def addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Where tensors lie, as part of a key."""
    return tuple(tensor.data_ptr() for tensor in tensors)
