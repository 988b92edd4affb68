"""Networks with stacked parameters [E, in, out]: critic ensemble, velocity field, Gaussian behaviour model,
score field.

Initialisation is the public release's: variance scaling 1, fan average, uniform; biases zero.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vgf_fast import reference
from vgf_fast.common import memory
from vgf_fast.config import VGFConfig
from vgf_fast.reference import MLPWeights


def _entries(group: nn.ParameterList) -> tuple[Tensor, ...]:
    """What is in a list, which would look every entry up by its name when walked."""
    return tuple(entry for entry in group._parameters.values() if entry is not None)


class StackedMLP(nn.Module):
    """E multi-layer perceptrons of one shape with stacked parameters.

    Per hidden layer: linear, LayerNorm (eps 1e-6, affine; optional), activation; the last layer is linear.
    Parameters: ``weights[i]`` [E, in, out], ``biases[i]`` [E, out], ``norm_scales[i]`` and ``norm_biases[i]`` [E, out].
    """

    def __init__(
        self,
        input_dim: int,
        hidden_dims: tuple[int, ...],
        output_dim: int,
        members: int = 1,
        layer_norm: bool = False,
        activation: str = "relu",
        output_scale: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        widths = (input_dim, *hidden_dims, output_dim)
        weights = members * sum(fan_in * fan_out for fan_in, fan_out in itertools.pairwise(widths))
        memory.check_fits(f"{members} networks of layers {widths}", 4 * weights, torch.device("cpu"))
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for i, (fan_in, fan_out) in enumerate(itertools.pairwise(widths)):
            scale = output_scale if i + 2 == len(widths) else 1.0
            limit = math.sqrt(6.0 * scale / (fan_in + fan_out))
            weight = torch.empty(members, fan_in, fan_out, dtype=torch.float32, device="cpu")
            self.weights.append(nn.Parameter(weight.uniform_(-limit, limit, generator=generator)))
            bias = torch.zeros(members, fan_out, dtype=torch.float32, device="cpu")
            self.biases.append(nn.Parameter(bias))
        normed = hidden_dims if layer_norm else ()
        ones = [torch.ones(members, width, dtype=torch.float32, device="cpu") for width in normed]
        self.norm_scales = nn.ParameterList(map(nn.Parameter, ones))
        self.norm_biases = nn.ParameterList(nn.Parameter(torch.zeros_like(one)) for one in ones)

    def stacked(self) -> MLPWeights:
        """The parameters as the backends take them; no copy."""
        weights, biases = _entries(self.weights), _entries(self.biases)
        return MLPWeights(weights, biases, _entries(self.norm_scales), _entries(self.norm_biases), self.activation)

    def forward(self, x: Tensor) -> Tensor:
        """x [R, in] -> [E, R, out]; differentiable."""
        return reference.mlp_forward(self.stacked(), x)

    @property
    def input_dim(self) -> int:
        """Length of one input vector."""
        return self.weights[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the parameters."""
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.weights[0].device


class EnsembleMLP(StackedMLP):
    """Critic: E values Q_e(s, a)."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...] = (512, 512, 512, 512),
        members: int = 2,
        layer_norm: bool = True,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            observation_dim + action_dim, hidden_dims, 1, members, layer_norm, activation, generator=generator
        )
        self.observation_dim = observation_dim
        self.action_dim = action_dim

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:  # type: ignore[override]
        """Q of every member: observations [B, O], actions [B, A] -> [E, B]; differentiable."""
        return reference.member_values(self.stacked(), observations, actions)


class ScoreField(StackedMLP):
    """Amortised score f(s, a), trained on the action gradient of the critic's mean (AVGF)."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...] = (512, 512, 512, 512),
        layer_norm: bool = True,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            observation_dim + action_dim, hidden_dims, action_dim, 1, layer_norm, activation, generator=generator
        )
        self.observation_dim = observation_dim
        self.action_dim = action_dim

    def forward(self, observations: Tensor, actions: Tensor) -> Tensor:  # type: ignore[override]
        """Score: observations [B, O], actions [B, A] -> [B, A]; differentiable."""
        return super().forward(torch.cat([observations, actions], dim=-1)).squeeze(0)


class VelocityField(StackedMLP):
    """Flow-matching velocity v(s, x, t) of the behaviour model."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...] = (512, 512, 512, 512),
        layer_norm: bool = False,
        activation: str = "relu",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            observation_dim + action_dim + 1, hidden_dims, action_dim, 1, layer_norm, activation, generator=generator
        )
        self.observation_dim = observation_dim
        self.action_dim = action_dim

    def forward(self, observations: Tensor, x: Tensor, time: Tensor) -> Tensor:  # type: ignore[override]
        """Velocity: observations [B, O], x [B, A], time [B, 1] -> [B, A]; differentiable."""
        return super().forward(torch.cat([observations, x, time], dim=-1)).squeeze(0)


class GaussianBehavior(StackedMLP):
    """Gaussian behaviour model: mean from the state, one log standard deviation an action entry, tanh optional."""

    def __init__(
        self,
        observation_dim: int,
        action_dim: int,
        hidden_dims: tuple[int, ...] = (512, 512, 512, 512),
        layer_norm: bool = False,
        activation: str = "relu",
        tanh: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(
            observation_dim, hidden_dims, action_dim, 1, layer_norm, activation, output_scale=0.01, generator=generator
        )
        self.observation_dim = observation_dim
        self.action_dim = action_dim
        self.tanh = tanh
        self.log_std = nn.Parameter(torch.zeros(action_dim, dtype=torch.float32, device="cpu"))

    def forward(self, observations: Tensor) -> Tensor:
        """Mean before the squash: observations [B, O] -> [B, A]; differentiable."""
        return super().forward(observations).squeeze(0)


class Networks(NamedTuple):
    """A policy's networks."""

    critic: EnsembleMLP
    target_critic: EnsembleMLP
    behavior: VelocityField | GaussianBehavior
    score_field: ScoreField | None


def networks_of(config: VGFConfig, generator: torch.Generator) -> Networks:
    """New networks of a configuration; the target critic is a copy of the critic, without gradients."""
    sizes = (config.observation_dim, config.action_dim)
    ensemble = (*sizes, config.hidden_dims, config.members, config.layer_norm, config.activation)
    critic = EnsembleMLP(*ensemble, generator=generator)
    # Its own draws are overwritten, and stay: the networks after it keep the numbers that a seed gives them.
    target_critic = EnsembleMLP(*ensemble, generator=generator)
    target_critic.load_state_dict(critic.state_dict())
    target_critic.requires_grad_(False)
    mlp = (*sizes, config.behavior_hidden_dims, config.behavior_layer_norm, config.activation)
    behavior: VelocityField | GaussianBehavior
    if config.behavior == "flow":
        behavior = VelocityField(*mlp, generator=generator)
    else:
        behavior = GaussianBehavior(*mlp, config.gaussian_tanh, generator=generator)
    field = None
    if config.amortized:
        field = ScoreField(*sizes, config.hidden_dims, config.layer_norm, config.activation, generator=generator)
    return Networks(critic, target_critic, behavior, field)
