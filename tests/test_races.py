"""No kernel reads its scratch without a barrier, and no program another's; and the detector does find what is there."""

import networks
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from races import Race, race_detector
from triton.runtime.errors import InterpreterError
from vgf_fast.kernels import launch, sequence, svgd

import vgf_fast as vgf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
# Several tiles of rows and columns and several chunks of a sum, as at full size.
LAYERS = {"many": launch.Layers(False, launch.ProductTile(16, 32, 16, 4, 1), 4), "few": launch.Layers(True)}
STATES, ACTIONS = networks.states_and_actions(4, 5, 6, 3)


def critic_of(layer_norm):
    return networks.packed(networks.critic(6, 3, (40, 64, 40), layer_norm=layer_norm, activation="gelu"))


def run_critic(layer_norm, layers):
    sequence.values_and_score(critic_of(layer_norm), STATES, ACTIONS, "min", layers=layers)


def run_behavior_flow(layer_norm, layers):
    mlp = networks.packed(networks.velocity(6, 3, (40, 64, 40), layer_norm))
    sequence.behavior_flow(mlp, STATES, ACTIONS, 3, layers=layers)


def run_flow(layer_norm, layers):
    target = sequence.TDTarget(STATES[:, 0], STATES[:, 1], 0.9)
    # Two steps, so that moments are read again and particles move in place.
    for steps, epilogue, trajectory in ((2, sequence.Select(), False), (1, None, True), (0, target, False)):
        sequence.value_gradient_flow(
            critic_of(layer_norm),
            STATES,
            ACTIONS,
            steps,
            0.1,
            0.5,
            bandwidth_gradient=True,
            return_trajectory=trajectory,
            epilogue=epilogue,
            layers=layers,
        )


KERNELS = {"critic": run_critic, "behavior_flow": run_behavior_flow, "flow": run_flow}


@pytest.mark.parametrize("layers", LAYERS)
@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_networks(kernel, layer_norm, layers):
    with race_detector():
        KERNELS[kernel](layer_norm, LAYERS[layers])


def test_a_flow_races_without_barriers():
    """All other kernels of the networks leave nothing in memory for other threads of their program."""
    with race_detector(barriers=False), pytest.raises((Race, InterpreterError), match="Race"):
        run_flow(True, LAYERS["few"])


def test_particle_step():
    x, moments = ACTIONS.clone(), torch.zeros_like(ACTIONS)
    with race_detector():
        svgd.svgd_step_(x, ACTIONS.clone(), moments, moments.clone(), 1, 0.1, 0.5, True)


def test_whole_update():
    config = vgf.VGFConfig(
        6, 3, hidden_dims=(24, 24), behavior_hidden_dims=(24, 24), particles=5, behavior_steps=2,
        train_budget=vgf.TransportBudget(2),
    )  # fmt: skip
    batch = {
        "observations": STATES,
        "actions": ACTIONS[:, 0],
        "next_observations": STATES,
        "rewards": STATES[:, 0],
        "masks": torch.ones(4),
    }
    learner = vgf.Learner(vgf.VGFPolicy(config, backend="triton"))
    with race_detector():
        learner.update(batch)


@triton.jit
def _neighbour_kernel(x_ptr, BARRIER: tl.constexpr):
    offs = tl.arange(0, 16)
    tl.store(x_ptr + offs, offs.to(tl.float32))
    if BARRIER:
        tl.debug_barrier()
    x = tl.load(x_ptr + 15 - offs)
    if BARRIER:
        tl.debug_barrier()
    tl.store(x_ptr + offs, x)


@triton.jit
def _overlapping_kernel(x_ptr, STEP: tl.constexpr):
    offs = tl.program_id(0) * STEP + tl.arange(0, 16)
    tl.store(x_ptr + offs, offs.to(tl.float32))


class TestDetector:
    def test_a_missing_barrier(self):
        with race_detector():
            _neighbour_kernel[(1,)](torch.zeros(16), BARRIER=True)
            with pytest.raises((Race, InterpreterError), match="a load of shape"):
                _neighbour_kernel[(1,)](torch.zeros(16), BARRIER=False)

    def test_programs_that_overlap(self):
        with race_detector():
            _overlapping_kernel[(2,)](torch.zeros(40), STEP=16)
            with pytest.raises((Race, InterpreterError), match="in program"):
                _overlapping_kernel[(2,)](torch.zeros(40), STEP=8)
