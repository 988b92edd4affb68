"""The choice between PyTorch and the Triton kernels, and the networks' operations on either. Input is checked already.

Weights are packed for the kernels at every call, so that no stale copy of them can be used. Nothing here waits for a
GPU or builds an autograd graph: ``operators`` has the gradients.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import os
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

from vgf_fast.backends import torch as torch_backend
from vgf_fast.backends.torch import TorchBackend
from vgf_fast.checks import check_weights
from vgf_fast.common.ambient import neutral
from vgf_fast.flow import Flow
from vgf_fast.reference import FlowResult, MLPWeights

if TYPE_CHECKING:
    from vgf_fast.backends.graphs import GraphCache
    from vgf_fast.backends.torch import Target
    from vgf_fast.config import TrainConfig, TransportBudget
    from vgf_fast.kernels.packing import PackedMLP
    from vgf_fast.policy import VGFPolicy

Backend = Literal["auto", "triton", "torch"]
MAX_KERNEL_PARTICLES = 128
MAX_KERNEL_ACTION_DIM = 128
MAX_KERNEL_WIDTH = 1024  # of hidden layers
_PARTICLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHT_DTYPES = (torch.float32, torch.bfloat16)

logger = logging.getLogger("vgf_fast")


# --- the choice ------------------------------------------------------------------------------------------------------


def _find_triton() -> bool:
    try:
        return importlib.util.find_spec("triton") is not None
    except ImportError:
        # Of an import hook that refuses it.
        return False


# Looked for once: torch.compile cannot trace the search.
_TRITON_INSTALLED = _find_triton()


def triton_installed() -> bool:
    """Whether Triton can be imported; does not import it."""
    return _TRITON_INSTALLED


def triton_interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1`` before the first import)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernel_obstacle(
    device: torch.device,
    particles: int,
    action_dim: int,
    dtype: torch.dtype,
    width: int,
    weights_dtype: torch.dtype,
) -> str | None:
    """Why the Triton kernels cannot take such tensors, or None."""
    if not triton_installed():
        return "Triton is not installed: pip install 'vgf_fast[triton]'"
    if device.type != "cuda" and not triton_interpreted():
        return f"the tensors are on {device}: Triton needs a GPU, or its interpreter (TRITON_INTERPRET=1)"
    if particles > MAX_KERNEL_PARTICLES:
        return f"particles is {particles}, the kernels' limit is {MAX_KERNEL_PARTICLES}"
    if action_dim > MAX_KERNEL_ACTION_DIM:
        return f"the action dimension is {action_dim}, the kernels' limit is {MAX_KERNEL_ACTION_DIM}"
    if width > MAX_KERNEL_WIDTH:
        return f"the widest hidden layer has {width} units, the kernels' limit is {MAX_KERNEL_WIDTH}"
    if dtype not in _PARTICLE_DTYPES:
        return f"the particles are {dtype}, the kernels take float32, bfloat16 and float16"
    if weights_dtype not in _WEIGHT_DTYPES:
        return f"the weights are {weights_dtype}, the kernels take float32 and bfloat16"
    return None


@functools.cache
def _say_fallback(obstacle: str) -> None:
    logger.warning("backend='auto' uses torch: %s", obstacle)


def resolve_backend(
    backend: str,
    device: torch.device,
    particles: int,
    action_dim: int,
    dtype: torch.dtype,
    width: int = 0,
    weights_dtype: torch.dtype = torch.float32,
) -> str:
    """ "triton" or "torch" for tensors of this kind, and networks whose widest hidden layer has ``width`` units.

    Raises ``ValueError`` for an unknown backend, and for "triton" where its kernels cannot run, naming the limit.
    """
    if not isinstance(backend, str) or backend not in ("auto", "triton", "torch"):
        raise ValueError(f"backend is {backend!r}, expected 'auto', 'triton' or 'torch'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    obstacle = _kernel_obstacle(device, particles, action_dim, dtype, width, weights_dtype)
    if obstacle is None:
        return "triton"
    if backend == "triton":
        raise ValueError(f"backend='triton' cannot run: {obstacle}")
    if not torch.compiler.is_compiling():
        _say_fallback(obstacle)
    return "torch"


def _runs_kernels(backend: str, mlp: MLPWeights, x: Tensor) -> bool:
    """Whether the kernels run for particles ``x`` [B, N, A] and a network."""
    width = max((weight.shape[2] for weight in mlp.weights[:-1]), default=0)
    dtype = mlp.weights[0].dtype
    chosen = resolve_backend(backend, x.device, x.shape[1], x.shape[2], x.dtype, width, dtype)
    # Products of bfloat16 are wrong in the interpreter.
    return chosen == "triton" and (x.device.type == "cuda" or dtype == torch.float32)


def _pack(name: str, mlp: MLPWeights, observation_dim: int, action_dim: int) -> PackedMLP:
    """A network's weights for the kernels. On a CPU, raises ``ValueError`` if any is not finite."""
    from vgf_fast.kernels.packing import pack

    mlp = mlp.detach()
    if mlp.weights[0].device.type == "cpu":
        check_weights(name, mlp)
    return pack(*mlp, observation_dim, action_dim, mlp.weights[0].dtype)


class PolicyBackend(Protocol):
    """What a backend does for a policy."""

    def weights(self, policy: VGFPolicy, target: bool = False) -> Any:
        """The networks as they are now and as the backend takes them, the target critic among them if asked."""

    def draw(self, policy: VGFPolicy, behavior: Any, observations: Tensor, noise: Tensor) -> Tensor:
        """Particles of the behaviour model's weights: observations [B, O], noise [B, N, A] -> [B, N, A]."""

    def act(
        self,
        policy: VGFPolicy,
        observations: Tensor,
        noise: Tensor,
        budget: TransportBudget,
        selection: str,
        generator: torch.Generator,
        recordings: GraphCache | None = None,
    ) -> Tensor:
        """Actions [B, A] at observations [B, O] from noise [B, N, A]; ``recordings`` may be replayed."""

    def td_target(
        self, policy: VGFPolicy, weights: Any, data: dict[str, Tensor], drawn: Tensor, config: TrainConfig
    ) -> Target:
        """Particles ``drawn`` at the next states, moved by the critic in the training budget, valued by the target."""

    def losses(
        self,
        policy: VGFPolicy,
        weights: Any,
        data: dict[str, Tensor],
        draws: dict[str, Tensor],
        target: Tensor,
        config: TrainConfig,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """The losses by network, differentiable, and the critic's values [E, B]."""


def bound(policy: VGFPolicy, dtype: torch.dtype) -> PolicyBackend:
    """The backend of a policy where it is now, with products of operands of ``dtype``.

    Raises ``ValueError`` naming the limit where ``policy.backend`` is "triton" and its kernels cannot run. In the
    interpreter, where products of bfloat16 are wrong, they are PyTorch's.
    """
    from vgf_fast.backends.triton import TritonBackend

    config = policy.config
    width = max(*config.hidden_dims, *config.behavior_hidden_dims)
    chosen = resolve_backend(
        policy.backend, policy.device, config.particles, config.action_dim, policy.particle_dtype, width
    )
    runs_kernels = chosen == "triton" and (policy.device.type == "cuda" or dtype == torch.float32)
    return TritonBackend(dtype) if runs_kernels else TorchBackend(dtype)


# --- the operations --------------------------------------------------------------------------------------------------


@neutral
@torch.no_grad()
def critic_value_and_score(
    critic: MLPWeights, observations: Tensor, actions: Tensor, q_aggregation: str, backend: str
) -> tuple[Tensor, Tensor]:
    """q [E, B, N] and score [B, N, A]: observations [B, O], actions [B, N, A] in float32 at least."""
    if not _runs_kernels(backend, critic, actions):
        at_states = torch_backend.critic_at_states(critic, observations, actions.shape[1])
        return at_states.values_and_score(actions, q_aggregation)
    from vgf_fast.kernels import sequence

    packed = _pack("critic", critic, observations.shape[1], actions.shape[2])
    return sequence.values_and_score(packed, observations.detach(), actions.detach(), q_aggregation)


@neutral
@torch.no_grad()
def behavior_flow(velocity: MLPWeights, observations: Tensor, noise: Tensor, steps: int, backend: str) -> Tensor:
    """Particles [B, N, A]: observations [B, O], noise [B, N, A] in float32 at least."""
    if not _runs_kernels(backend, velocity, noise):
        return torch_backend.behavior_flow(velocity, observations, noise, steps)
    from vgf_fast.kernels import sequence

    packed = _pack("velocity", velocity, observations.shape[1], noise.shape[2])
    return sequence.behavior_flow(packed, observations.detach(), noise.detach(), steps)


@neutral
@torch.no_grad()
def value_gradient_flow(
    critic: MLPWeights,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    flow: Flow,
    return_trajectory: bool,
    evaluate: bool,
    backend: str,
) -> FlowResult:
    """The flow of observations [B, O] and particles [B, N, A] in float32 at least."""
    if not _runs_kernels(backend, critic, particles):
        return torch_backend.value_gradient_flow(
            critic, observations, particles, steps, flow, return_trajectory=return_trajectory, evaluate=evaluate
        )
    from vgf_fast.kernels import sequence

    packed = _pack("critic", critic, observations.shape[1], particles.shape[2])
    result = sequence.value_gradient_flow(
        packed,
        observations.detach(),
        particles.detach(),
        steps,
        *flow[:6],
        return_trajectory,
        evaluate,
        kernel=flow.kernel,
    )
    return FlowResult(result.particles, result.q, result.trajectory)
