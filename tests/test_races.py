"""No kernel reads its scratch without a barrier, and no program another's; and the detector does find what is there."""

import networks
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from races import Race, race_detector
from triton.runtime.errors import InterpreterError
from vgf_fast.kernels import behavior_flow, critic, flow_step, launch, svgd

import vgf_fast as vgf

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of the interpreter")
# Several tiles of rows and columns and several chunks of a sum, as at full size.
CONFIG = launch.BlockLaunch(block_m=16, block_n=32, block_k=16, rows=4, num_warps=4, num_stages=1)
# Three states a block, and one left over.
STATES, ACTIONS = networks.states_and_actions(4, 5, 6, 3)


def critic_of(layer_norm):
    return networks.packed(networks.critic(6, 3, (40, 64, 40), layer_norm=layer_norm, activation="gelu"))


def run_critic(layer_norm):
    critic.values_and_score(critic_of(layer_norm), STATES, ACTIONS, "min", config=CONFIG)


def run_behavior_flow(layer_norm):
    mlp = networks.packed(networks.velocity(6, 3, (40, 64, 40), layer_norm))
    behavior_flow.behavior_flow(mlp, STATES, ACTIONS, 3, config=CONFIG)


def run_flow(layer_norm):
    target = flow_step.TDTarget(STATES[:, 0], STATES[:, 1], 0.9)
    # Two steps, so that moments are read again; what ends them is a kernel of its own.
    for steps, epilogue in ((2, flow_step.Select()), (0, target)):
        flow_step.value_gradient_flow(
            critic_of(layer_norm),
            STATES,
            ACTIONS,
            steps,
            0.1,
            0.5,
            bandwidth_gradient=True,
            return_trajectory=True,
            epilogue=epilogue,
            config=CONFIG,
        )


KERNELS = {"critic": run_critic, "behavior_flow": run_behavior_flow, "flow": run_flow}


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_networks(kernel, layer_norm):
    with race_detector():
        KERNELS[kernel](layer_norm)


@pytest.mark.parametrize("layer_norm", [True, False])
@pytest.mark.parametrize("kernel", KERNELS)
def test_without_barriers_every_one_of_them_races(kernel, layer_norm):
    with race_detector(barriers=False), pytest.raises((Race, InterpreterError), match="Race"):
        KERNELS[kernel](layer_norm)


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
