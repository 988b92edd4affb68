"""A name that is unknown is refused where it is looked up, and never taken for another."""

import pytest
import torch

import vgf_fast as vgf
from vgf_fast import reference

STATES, PARTICLES = torch.zeros(2, 3), torch.zeros(2, 4, 1)


def test_activation():
    weights = vgf.VGFPolicy(vgf.VGFConfig(3, 1, hidden_dims=(8, 8), behavior_hidden_dims=(8,))).critic.stacked()
    wrong = weights._replace(activation="tanh")
    with pytest.raises(ValueError, match="activation is 'tanh', expected one of 'relu', 'gelu', 'swish'"):
        reference.member_values(wrong, STATES, PARTICLES[:, 0])
    for function in (reference.activate_, lambda name, y: reference.activation_backward(name, y, y)):
        with pytest.raises(ValueError, match="activation is 'Relu'"):
            function("Relu", STATES)


def test_critic_loss():
    with pytest.raises(ValueError, match="critic_loss is 'huber', expected one of 'td', 'expectile', 'sql'"):
        reference.critic_loss("huber", STATES, STATES[0], 0.5)
    # Past the configuration's own check.
    learner = vgf.Learner(vgf.VGFPolicy(vgf.VGFConfig(3, 1, hidden_dims=(8,), behavior_hidden_dims=(8,))))
    object.__setattr__(learner.config, "critic_loss", "huber")
    batch = {"observations": STATES, "actions": PARTICLES[:, 0], "next_observations": STATES}
    with pytest.raises(ValueError, match="critic_loss is 'huber'"):
        learner.update(batch | {"rewards": STATES[:, 0], "masks": STATES[:, 0]})


def test_particle_kernel():
    with pytest.raises(ValueError, match="kernel is 'laplace', expected one of 'rbf', 'imq'"):
        vgf.svgd_direction(PARTICLES, PARTICLES, 0.1, kernel="laplace")
    with pytest.raises(ValueError, match=r"VGFConfig.kernel is 'laplace', expected one of 'rbf', 'imq'"):
        vgf.VGFConfig(3, 1, kernel="laplace")
