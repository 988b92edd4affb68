"""Random networks for the kernels' tests: every parameter away from its initial zero or one, packed and in float64."""

import torch
from oracle import nan_filled_empty
from vgf_fast.kernels import launch, packing

from vgf_fast.networks import EnsembleMLP, VelocityField

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Ways to compute a network's layers: what suits the rows; many tiles and blocks of each; and each layer by itself.
LAYERS = (
    None,
    launch.Layers(False, launch.ProductTile(16, 32, 16, 4, 1), 4),
    launch.Layers(True),
    launch.Layers(False),
)


def shake(module, seed):
    """Biases and LayerNorm parameters drawn at random, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "weights" not in name:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return module.to(DEVICE)


def critic(observation_dim, action_dim, widths, members=2, layer_norm=True, activation="relu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    net = EnsembleMLP(observation_dim, action_dim, widths, members, layer_norm, activation, generator=generator)
    return shake(net, seed + 1)


def velocity(observation_dim, action_dim, widths, layer_norm=False, activation="relu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return shake(
        VelocityField(observation_dim, action_dim, widths, layer_norm, activation, generator=generator), seed + 1
    )


def packed(module, dtype=torch.float32):
    """The module's weights as the kernels read them."""
    groups = [[tensor.detach() for tensor in group] for group in module.stacked()[:4]]
    with nan_filled_empty():
        return packing.pack(*groups, module.activation, module.observation_dim, module.action_dim, dtype)


def exact(module):
    """The module's weights in float64."""
    return module.stacked().detach().to(torch.float64)


def states_and_actions(batch, particles, observation_dim, action_dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(batch, observation_dim, generator=generator)
    actions = torch.rand(batch, particles, action_dim, generator=generator) * 2.0 - 1.0
    return states.to(DEVICE), actions.to(DEVICE)
