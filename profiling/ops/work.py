"""Work of an operation, counted from sizes: FLOPs of networks and of particles, and numbers that are read or written.

Shapes: B states, N particles, A action, O observation, E members, H hidden width, R = B * N rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from profiling.worker import Sizes

FLOAT_BYTES = 4
Shapes = Mapping[str, tuple[int, ...]]


class Network(NamedTuple):
    """Sizes of an ensemble of perceptrons of a state and what is beside it in a row."""

    members: int
    state: int  # inputs that are equal for all particles of a state
    action: int
    time: int  # inputs whose share of the first layer is a vector, equal for all rows of a pass
    hidden: int
    layers: int
    outputs: int
    layer_norm: bool

    @property
    def first(self) -> int:
        """Weights of a member's first layer."""
        return (self.state + self.action + self.time) * self.hidden

    @property
    def inner(self) -> int:
        """Weights of a member's layers between hidden ones."""
        return (self.layers - 1) * self.hidden**2

    @property
    def last(self) -> int:
        """Weights of a member's last layer."""
        return self.hidden * self.outputs

    @property
    def parameters(self) -> int:
        """Numbers in all members: weights, biases, and scale and shift of the LayerNorms."""
        vectors = (3 if self.layer_norm else 1) * self.layers * self.hidden + self.outputs
        return self.members * (self.first + self.inner + self.last + vectors)

    def at_particles(self, sizes: Sizes, passes: int, scores: int, values: int, needed: bool) -> int:
        """FLOPs of the matrix products of ``passes`` forward and ``scores`` gradients by the action, at every particle.

        Plainly, both are of the concatenated input. What is needed is less: the state's share of the first layer once,
        the action's gradient alone, the last layer for ``values`` of the passes, and no product for the gradient of
        the last layer, which is its weight.
        """
        rows, turns = sizes.batch * sizes.particles, passes + scores
        if not needed:
            return 2 * self.members * rows * turns * (self.first + self.inner + self.last)
        each = turns * (self.action * self.hidden + self.inner) + values * self.last
        return 2 * self.members * (rows * each + sizes.batch * self.state * self.hidden)

    def training(self, sizes: Sizes) -> int:
        """FLOPs of the products of a gradient step: forward, weights, and all layers' inputs but the first's."""
        return 2 * self.members * sizes.batch * (2 * self.first + 3 * (self.inner + self.last))


def critic(sizes: Sizes) -> Network:
    """The ensemble of critics, which has LayerNorm."""
    network = (sizes.observation_dim, sizes.action_dim, 0, sizes.hidden, sizes.layers)
    return Network(sizes.members, *network, outputs=1, layer_norm=True)


def velocity(sizes: Sizes) -> Network:
    """The velocity field of the behaviour model."""
    network = (sizes.observation_dim, sizes.action_dim, 1, sizes.hidden, sizes.layers)
    return Network(1, *network, outputs=sizes.action_dim, layer_norm=False)


NETWORKS = {"critic": critic, "target_critic": critic, "behavior": velocity}


def svgd_products(sizes: Sizes) -> int:
    """FLOPs of the kernel matrix by the score."""
    return 2 * sizes.batch * sizes.particles**2 * sizes.action_dim


def svgd_pairs(sizes: Sizes) -> int:
    """FLOPs of each pair's distance, kernel entry and repulsion; finding the median is comparisons."""
    return sizes.batch * sizes.particles**2 * (3 * sizes.action_dim + 2 + 3 * sizes.action_dim)


def numbers(shapes: Shapes) -> int:
    """How many numbers tensors of these shapes have together."""
    return sum(math.prod(shape) for shape in shapes.values())


def moving(sizes: Sizes, *names: str) -> dict[str, tuple[int, ...]]:
    """Tensors [B, N, A] of these names."""
    return dict.fromkeys(names, (sizes.batch, sizes.particles, sizes.action_dim))


def at_particles(sizes: Sizes, *names: str) -> dict[str, tuple[int, ...]]:
    """Observations [B, O], and tensors [B, N, A] of these names."""
    return {"observations": (sizes.batch, sizes.observation_dim), **moving(sizes, *names)}
