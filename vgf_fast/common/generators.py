"""Generators of random numbers, which neither a copy nor a file nor another process can take: by their state."""

from __future__ import annotations

from typing import NamedTuple

import torch


class GeneratorState(NamedTuple):
    """Where random numbers go on."""

    device: str  # its type
    state: bytes


def generator_state(generator: torch.Generator) -> GeneratorState:
    """A generator's state, which ``restored_generator`` takes up."""
    return GeneratorState(generator.device.type, generator.get_state().numpy().tobytes())


def restored_generator(state: GeneratorState | None, device: torch.device, seed: int) -> torch.Generator:
    """A generator on a device that goes on from a state; without one of this kind of device, from ``seed``."""
    generator = torch.Generator(device).manual_seed(seed)
    if state is not None and state.device == device.type:
        generator.set_state(torch.frombuffer(bytearray(state.state), dtype=torch.uint8))
    return generator
