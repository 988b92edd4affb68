"""One gradient step of the critic, with its target, and one of the behaviour model: loss, gradients and Adam."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from profiling.compiled import CompiledAgent
from profiling.eager import EagerAgent
from profiling.ops import work
from profiling.ops.op import Compiler, Inputs, Op, Outputs, Prepared
from profiling.torch_methods import configurations
from profiling.worker import Sizes
from vgf_fast import TrainConfig, reference
from vgf_fast.backends import triton as triton_backend
from vgf_fast.functional import Backend


def _rate(train: TrainConfig, network: str) -> float:
    return train.critic_learning_rate if network == "critic" else train.behavior_learning_rate


def _adam(parameters: Any, rate: float, device: torch.device, fused_step: bool) -> torch.optim.Adam:
    """PyTorch's optimiser; on a GPU one that a CUDA graph can hold."""
    return torch.optim.Adam(parameters, lr=rate, fused=fused_step or None, capturable=device.type == "cuda")


def _state(
    parameters: list[Tensor],
    adam: torch.optim.Adam,
    targets: list[Tensor],
    gather: Callable[[list[Tensor]], list[Tensor]],
) -> Outputs:
    """Moments, parameters and target critic after a step, in the order of a stack's parameters."""
    groups = {
        "first_moment": [adam.state[p]["exp_avg"] for p in parameters],
        "second_moment": [adam.state[p]["exp_avg_sq"] for p in parameters],
        "average": targets,
    }
    outputs = {
        f"{name} {i}": t.detach() for name, group in groups.items() for i, t in enumerate(gather(group)) if group
    }
    # All at once: Adam's first step is the gradient's sign, a matter of luck where the gradient is rounding.
    return {**outputs, "parameters": torch.cat([t.detach().flatten() for t in gather(parameters)])}


def _step(loss_of: Callable[[], Tensor], move_target: Callable[[], None], adam: torch.optim.Adam) -> Outputs:
    loss = loss_of()
    adam.zero_grad(set_to_none=True)
    loss.backward()
    move_target()
    adam.step()
    return {"loss": loss.detach()}


# --- implementations -------------------------------------------------------------------------------------------------


def _loss(inputs: Inputs, network: str) -> Tensor:
    """The loss of the critic or of the behaviour model, by the library's formulas; differentiable."""
    data, weights = inputs.data, getattr(inputs.policy, network).stacked().to(inputs.dtype)
    if network == "critic":
        values = reference.member_values(weights, data["observations"], data["actions"])
        return reference.td_loss(values, data["target"])
    x, velocity = reference.flow_matching_inputs(data["actions"], data["noise"], data["time"])
    rows = torch.cat([data["observations"], x, data["time"]], dim=-1)
    return reference.flow_matching_loss(reference.mlp_forward(weights, rows).squeeze(0).to(x.dtype), velocity)


def _torch(inputs: Inputs, network: str, fused_step: bool = True) -> Prepared:
    _, train = configurations(inputs.sizes)
    parameters: list[Tensor] = list(getattr(inputs.policy, network).parameters())
    targets: list[Tensor] = list(inputs.policy.target_critic.parameters()) if network == "critic" else []
    adam = _adam(parameters, _rate(train, network), inputs.device, fused_step)

    def move_target() -> None:
        if targets:
            reference.polyak_(targets, parameters, train.tau)

    run = functools.partial(_step, lambda: _loss(inputs, network), move_target, adam)
    return Prepared(run, lambda: _state(parameters, adam, targets, list))


def _reference(inputs: Inputs, network: str) -> Outputs:
    prepared = _torch(inputs, network, fused_step=False)
    return prepared.run() | prepared.state()


def _library(inputs: Inputs, backend: Backend, network: str) -> Prepared:
    if backend == "torch":
        return _torch(inputs, network)
    from vgf_fast.kernels.packing import pack_many
    from vgf_fast.kernels.training import Batch, training_step_

    _, train = configurations(inputs.sizes)
    policy, data = inputs.policy, inputs.data
    stack = triton_backend.stack(getattr(policy, network))
    parameters = list(stack.parameters)
    targets: list[Tensor] = []
    if network == "critic":
        targets = list(triton_backend.stack(policy.target_critic).parameters)
        batch = Batch(data["observations"], data["actions"], target=data["target"].unsqueeze(1))
    else:
        batch = Batch(data["observations"], data["actions"], data["time"], data["noise"])
    adam = torch.optim.Adam(parameters, lr=_rate(train, network), fused=True)

    def run() -> Outputs:
        (packed,) = pack_many([stack], inputs.dtype)
        return {"loss": training_step_(stack, packed, batch, adam, targets=targets, tau=train.tau)[0]}

    return Prepared(torch.no_grad()(run), lambda: _state(parameters, adam, targets, list))


def _critic_loss(agent: EagerAgent, observations: Tensor, actions: Tensor, target: Tensor) -> Tensor:
    return (target - agent.critic(observations, actions)).square().sum(dim=0).mean()


def _behavior_loss(agent: EagerAgent, observations: Tensor, actions: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    velocity = agent.behavior(observations, (1.0 - time) * noise + time * actions, time)
    return (velocity - (actions - noise)).square().mean()


def _plain(inputs: Inputs, agent: EagerAgent, compiler: Compiler[Any], network: str) -> Prepared:
    function = compiler(_critic_loss if network == "critic" else _behavior_loss)
    members = list(agent.critic.members) if network == "critic" else [agent.behavior]
    parameters: list[Tensor] = [parameter for member in members for parameter in member.parameters()]
    targets: list[Tensor] = list(agent.target_critic.parameters()) if network == "critic" else []
    adam = _adam(parameters, _rate(agent.train, network), inputs.device, isinstance(agent, CompiledAgent))
    loss = functools.partial(function, agent, **inputs.data)
    run = functools.partial(_step, loss, agent.move_target if targets else lambda: None, adam)

    def gather(tensors: list[Tensor]) -> list[Tensor]:
        """Modules' parameters, or tensors of their shapes, in the order and layout of a stack's."""
        if not tensors:
            return []
        each = len(tensors) // len(members)
        by_member = [tensors[e * each : (e + 1) * each] for e in range(len(members))]
        stacked = [torch.stack(group) for group in zip(*by_member, strict=True)]
        weights = [t.transpose(1, 2) for t in stacked if t.ndim == 3]
        vectors = [t for t in stacked if t.ndim == 2]
        # Of every hidden layer: linear bias, then LayerNorm's scale and shift where there is one.
        hidden = len(weights) - 1
        per_layer = (len(vectors) - 1) // hidden
        layers = [vectors[i * per_layer : (i + 1) * per_layer] for i in range(hidden)]
        groups = [[layer[k] for layer in layers] for k in range(per_layer)]
        return [*weights, *groups[0], vectors[-1], *itertools.chain(*groups[1:])]

    return Prepared(run, lambda: _state(parameters, adam, targets, gather))


# --- operations ------------------------------------------------------------------------------------------------------


def _rows(sizes: Sizes, **columns: int) -> work.Shapes:
    return {name: (sizes.batch, width) for name, width in columns.items()}


def _op(network: str, shapes: Callable[[Sizes], work.Shapes], networks: Mapping[str, int]) -> Op:
    return Op(
        name=f"{network}_training_step",
        shapes=shapes,
        uniform=("actions",),
        networks=networks,
        trains=True,
        reference=functools.partial(_reference, network=network),
        library=functools.partial(_library, network=network),
        plain=functools.partial(_plain, network=network),
        bounds={
            "loss": "training_loss",
            "first_moment": "training_gradient",
            "second_moment": "update_moments",
            "parameters": "update_parameters",
            "average": "update_parameters",
        },
        matmul_flops=lambda sizes, needed: work.NETWORKS[network](sizes).training(sizes),
        written=lambda sizes: 1,
    )


def _critic_shapes(sizes: Sizes) -> work.Shapes:
    return {**_rows(sizes, observations=sizes.observation_dim, actions=sizes.action_dim), "target": (sizes.batch,)}


def _behavior_shapes(sizes: Sizes) -> work.Shapes:
    action = sizes.action_dim
    return _rows(sizes, observations=sizes.observation_dim, actions=action, noise=action, time=1)


# Parameters and both moments are read and written, and so is the target critic.
CRITIC = _op("critic", _critic_shapes, {"critic": 6, "target_critic": 2})
BEHAVIOR = _op("behavior", _behavior_shapes, {"behavior": 6})
