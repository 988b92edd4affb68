"""The tables of the Triton kernels: the names of the reference, and no other."""

import networks
import pytest
import torch

pytest.importorskip("triton")

from vgf_fast.kernels import activations, formulas

import vgf_fast as vgf
from vgf_fast import reference


def test_names_are_the_references():
    assert set(activations.ACTIVATIONS) == set(reference.ACTIVATIONS)
    assert set(formulas.PARTICLE_KERNELS) == set(reference.PARTICLE_KERNELS)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="activation is 'tanh', expected 'relu' or 'gelu' or 'swish'"):
        activations.activation("tanh")
    with pytest.raises(ValueError, match="kernel is 'laplace', expected 'rbf' or 'imq'"):
        formulas.particle_kernel("laplace")
    with pytest.raises(ValueError, match="optimizer is 'sgd', expected 'adam' or 'ascent'"):
        formulas.particle_optimizer("sgd")


@pytest.mark.parametrize("particles", [5, 17])
def test_flows_by_either_particle_kernel(particles):
    """In one flow's launches as in PyTorch; the two kernels lead elsewhere."""
    module, budget = networks.critic(3, 2, (16,), activation="swish"), vgf.TransportBudget(2, 0.05, 0.3)
    generator = torch.Generator().manual_seed(0)
    states, x = torch.randn(2, 3, generator=generator), torch.rand(2, particles, 2, generator=generator) - 0.5
    inputs = module, states.to(networks.DEVICE), x.to(networks.DEVICE), budget
    moved = {}
    for kernel in formulas.PARTICLE_KERNELS:
        ours, theirs = (
            vgf.value_gradient_flow(*inputs, optimizer="ascent", kernel=kernel, backend=backend).particles
            for backend in ("triton", "torch")
        )
        torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-5)
        moved[kernel] = ours
    assert (moved["rbf"] - moved["imq"]).abs().max() > 1e-3
