"""What a network does at a batch of states, as sequences of launches: each is one line here.

A critic's step, of L, at D hidden layers: first layer (``rows``), D - 1 products with ``rows`` between them, head, the
same back with transposed weights, and the flow step. With few rows ``small`` takes a product and the rows before it
at once. A behaviour flow is K times D - 1 products and an Euler step.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import launch, ranges
from .arguments import Choice, Flow, Net, Options, Particles, Shape, Step
from .behavior_flow import euler_step
from .checks import check_critic, check_ending, check_rows, check_seed
from .flow_step import FlowFunctions, flow_functions, flow_step, median_scratch
from .formulas import particle_optimizer
from .packing import PackedMLP
from .product import product
from .rows import rows
from .small import small
from .state_share import state_share


class Network:
    """A packed network at the states of a batch: its layers for R = B * N rows, N a state."""

    def __init__(
        self,
        mlp: PackedMLP,
        observations: Tensor,
        particles: int,
        precision: str | None = None,
        layers: launch.Layers | None = None,
    ) -> None:
        """``layers`` says how its products are computed, by default what suits the number of rows."""
        self.mlp = mlp
        self.particles = particles
        self.rows = len(observations) * particles
        self.precision = precision or launch.precision(mlp.dtype)
        self.layers = layers or launch.layers(self.rows)
        self.device = observations.device
        self.pdl = launch.programmatic(self.device)
        share = state_share(mlp, observations, self.precision)
        self.net = Net(mlp.action, mlp.time, mlp.head, mlp.vectors, mlp.head_bias, share)
        whole = min(mlp.hidden_dims) == mlp.padded_width
        self.options = Options(mlp.padded_width, mlp.action.shape[1], mlp.layer_norm, self.precision, self.pdl, whole)
        self.depth = mlp.depth
        # Only narrow actions are worth reading one column at a time.
        self.narrow = self.options.RP == 16

    def shape(self, layer: int) -> Shape:
        """Sizes, and those of a hidden layer."""
        mlp = self.mlp
        return Shape(self.rows, self.particles, mlp.action_dim, mlp.members, self.depth, mlp.hidden_dims[layer])

    def net_at(self, layer: int) -> Net:
        """Pointers, those of the vectors at a hidden layer."""
        return self.net._replace(vectors=self.mlp.vectors[:, layer])

    def buffer(self, slots: int = 1, width: int = 0, dtype: torch.dtype | None = None) -> Tensor:
        """[slots, E, R, width], by default hidden layers in the dtype of the weights."""
        shape = (slots, self.mlp.members, self.rows, width or self.options.HP)
        return torch.empty(shape, dtype=dtype or self.mlp.dtype, device=self.device)

    # --- single launches ---------------------------------------------------------------------------------------------

    def rows_of(self, mode: str, layer: int, **tensors: Any) -> None:
        """``rows`` of a layer."""
        rows(
            mode,
            self.net_at(layer),
            self.shape(layer),
            self.options,
            self.mlp.activation,
            block=self.layers.rows,
            **tensors,
        )

    def small_of(self, mode: str, layer: int, **tensors: Tensor) -> None:
        """``small`` of a layer."""
        w = self.mlp.hidden[:, layer - 1 if mode in ("head", "backward") else layer]
        small(mode, self.net_at(layer), w, self.shape(layer), self.options, self.mlp.activation, **tensors)

    def into(self, layer: int, h: Tensor, out: Tensor, activate: bool = False) -> None:
        """Linear part of a hidden layer but the first, or if it has no LayerNorm its activation."""
        product(
            h,
            self.mlp.hidden[:, layer - 1],
            out,
            self.mlp.vectors[:, layer, 0],
            activation_name=self.mlp.activation if activate else None,
            precision=self.precision,
            pdl=self.pdl,
            tile=self.layers.tile,
        )

    def back(self, w: Tensor, dz: Tensor, out: Tensor) -> None:
        """Gradient with respect to a layer's input from the one of its linear part."""
        product(dz, w, out, transposed=True, precision=self.precision, pdl=self.pdl, tile=self.layers.tile)

    # --- passes ------------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor, z: Tensor, h: Tensor) -> Tensor:
        """Linear parts of all hidden layers from x [B, N, A] float32; returns the last one's.

        ``z`` has a slot [E, R, HP] a layer, or two that take turns; ``h`` is scratch.
        """
        if self.narrow:
            self.rows_of("first", 0, x=x, z=z[0], out=h)
        else:
            flat = x.view(self.rows, -1)
            euler_step(
                self.net,
                self.shape(0),
                self.options,
                self.mlp.activation,
                x=flat,
                new=flat,
                h=None,
                out=z[0],
                time=None,
            )
        for layer in range(1, self.depth):
            before, now = z[(layer - 1) % len(z)], z[layer % len(z)]
            if self.layers.few:
                self.small_of("forward", layer - 1, z=before, out=now)
                continue
            if layer > 1 or not self.narrow:
                self.rows_of("forward", layer - 1, z=before, out=h)
            self.into(layer, h, now)
        return z[(self.depth - 1) % len(z)]

    def backward(self, z: Tensor, q: Tensor, dz: Tensor, dh: Tensor) -> Tensor:
        """Values q [E, R] from the layers' z [D, E, R, HP]; returns their action gradients [E, R, RP] float32.

        ``dz`` and ``dh`` [E, R, HP] are scratch.
        """
        last = self.depth - 1
        if self.layers.few and last > 0:
            self.small_of("head", last, z=z[last], out=dh, q=q)
        else:
            self.rows_of("head", last, z=z[last], out=dz, q=q)
            if last > 0:
                self.back(self.mlp.hidden[:, last - 1], dz, dh)
        for layer in range(last - 1, 0, -1):
            if self.layers.few:
                self.small_of("backward", layer, z=z[layer], grad=dh, out=dz)
                dz, dh = dh, dz
            else:
                self.rows_of("backward", layer, z=z[layer], grad=dh, out=dz)
                self.back(self.mlp.hidden[:, layer - 1], dz, dh)
        gradients = self.buffer(1, self.options.RP, torch.float32)[0]
        if last > 0:
            self.rows_of("backward", 0, z=z[0], grad=dh, out=dz)
        self.back(self.mlp.action, dz, gradients)
        return gradients

    def activations(self, h: Tensor, spare: Tensor) -> tuple[Tensor, Tensor]:
        """The last hidden layer's activation from what an Euler step leaves of the first one; and the free buffer."""
        for layer in range(1, self.depth):
            if self.layers.few:
                self.small_of("forward" if self.mlp.layer_norm else "plain", layer - 1, z=h, out=spare)
            else:
                if self.mlp.layer_norm:
                    self.rows_of("forward", layer - 1, z=h, out=h)
                self.into(layer, h, spare, not self.mlp.layer_norm)
            h, spare = spare, h
        if self.mlp.layer_norm:
            self.rows_of("forward", self.depth - 1, z=h, out=h)
        return h, spare

    def values(self, x: Tensor) -> Tensor:
        """Every member's value [E, B, N] float32 of x [B, N, A] float32."""
        q = torch.empty((self.mlp.members, *x.shape[:2]), dtype=torch.float32, device=self.device)
        if q.numel() > 0:
            last = self.forward(x, self.buffer(min(self.depth, 2)), self.buffer()[0])
            self.rows_of("value", self.depth - 1, z=last, q=q)
        return q


# --- behaviour flow --------------------------------------------------------------------------------------------------


def behavior_flow(
    mlp: PackedMLP,
    observations: Tensor,
    noise: Tensor | None,
    steps: int,
    *,
    particles: int | None = None,
    seed: Tensor | None = None,
    precision: str | None = None,
    layers: launch.Layers | None = None,
) -> Tensor:
    """Particles [B, N, A] float32 of the velocity field: observations [B, O], noise [B, N, A].

    Without ``noise``, ``particles`` says how many a state, and ``seed``, one int64 on the device, fixes the standard
    normal numbers that Philox draws inside.
    Raises ``ValueError`` if neither or both of noise and seed are given, and naming any argument that is wrong.
    """
    if (noise is None) == (seed is None):
        raise ValueError("noise and seed are both given or both None, expected one of them")
    batch, width = observations.shape[0], mlp.action_dim
    if noise is not None:
        particles = noise.shape[1]
    elif particles is None:
        raise ValueError("particles is None, expected a number: without noise it says how many a state")
    if mlp.output_dim != mlp.action_dim or mlp.head.shape[2] != mlp.action.shape[1]:
        raise ValueError(
            f"mlp has {mlp.output_dim} outputs, expected one an action entry, {mlp.action_dim}, and a time"
        )
    x = torch.empty((batch, particles, width), dtype=torch.float32, device=observations.device)
    check_rows(mlp, observations, x if noise is None else noise, "noise")
    steps = launch.check_integer("steps", steps, 1)
    if seed is not None:
        check_seed(seed, observations)
    if x.numel() == 0:
        return x
    field = Network(mlp, observations, particles, precision, layers)
    new, other = x.view(-1, width), torch.empty((batch * particles, width), dtype=torch.float32, device=x.device)
    # What the last step writes is the result.
    if steps % 2 == 0:
        new, other = other, new
    first, spare = field.buffer(2)
    # [B, N, A] as rows of one stride where it can be: a copy otherwise.
    source = seed if noise is None else noise.reshape(batch * particles, width)
    assert source is not None
    arguments = (field.net, field.shape(0), field.options, mlp.activation)
    euler_step(*arguments, x=source, new=other, h=None, out=first, time=0.0)
    if noise is None:
        source = other
    for k in range(1, steps + 1):
        h, free = field.activations(first, spare)
        out = None if k == steps else free
        euler_step(*arguments, x=source, new=new, h=h, out=out, time=k / steps, step=1.0 / steps)
        source, new, other = new, other, new
        first, spare = free, h
    return x


# --- critic ----------------------------------------------------------------------------------------------------------


def values_and_score(
    mlp: PackedMLP,
    observations: Tensor,
    actions: Tensor,
    q_aggregation: str = "mean",
    precision: str | None = None,
    layers: launch.Layers | None = None,
) -> tuple[Tensor, Tensor]:
    """q [E, B, N] and the score [B, N, A] of the aggregated value, float32: observations [B, O], actions [B, N, A].

    The score is the gradient of the members' mean, or of the smallest member's value, with respect to the action.
    ``precision`` is that of float32 products: "tf32" (the default on a GPU) or "ieee".
    Raises ``ValueError`` naming the argument that is wrong.
    """
    launch.check_choice("q_aggregation", q_aggregation, launch.AGGREGATIONS)
    check_critic(mlp)
    check_rows(mlp, observations, actions, "actions")
    q = torch.empty((mlp.members, *actions.shape[:2]), dtype=torch.float32, device=actions.device)
    score = torch.empty(actions.shape, dtype=torch.float32, device=actions.device)
    if q.numel() == 0:
        return q, score
    critic = Network(mlp, observations, actions.shape[1], precision, layers)
    z, (h, dz, dh) = critic.buffer(critic.depth), critic.buffer(3)
    x = actions.to(torch.float32).contiguous()
    critic.forward(x, z, h)
    gradient = critic.backward(z, q, dz, dh)
    flow_step(
        Flow("score", MINIMUM=q_aggregation == "min"),
        critic.shape(0),
        flow_functions("rbf", "ascent"),
        Step(),
        Particles(x, score, x, x, x),
        q=q,
        grad=gradient,
        pdl=critic.pdl,
    )
    return q, score


class Select(NamedTuple):
    """Last act of a flow: choose a particle by the aggregated value."""

    mode: str = "max"  # "max", "softmax" or "random"
    temperature: float = 1.0
    uniform: Tensor | None = None  # [B] float32, for "softmax" and "random"
    q_aggregation: str = "min"


class TDTarget(NamedTuple):
    """Last act of a flow: the TD target of the values of the last particles."""

    rewards: Tensor  # [B]
    masks: Tensor  # [B]
    discount: float
    q_aggregation: str = "min"
    reduce: str = "mean"


class FlowOutput(NamedTuple):
    """What ``value_gradient_flow`` returns, all float32."""

    particles: Tensor  # [B, N, A]
    q: Tensor | None  # [E, B, N] of the last particles, by the critic or the one asked for
    trajectory: Tensor | None  # [L + 1, B, N, A]
    chosen: Tensor | None  # [B, A] actions of ``Select``, or [B] targets of ``TDTarget``
    chosen_index: Tensor | None  # [B] int64, of ``Select``


def value_gradient_flow(
    mlp: PackedMLP,
    observations: Tensor,
    particles: Tensor,
    steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str = "mean",
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    return_trajectory: bool = False,
    evaluate: bool = True,
    *,
    kernel: str = "rbf",
    evaluator: PackedMLP | None = None,
    epilogue: Select | TDTarget | None = None,
    precision: str | None = None,
    layers: launch.Layers | None = None,
) -> FlowOutput:
    """Move particles [B, N, A] of observations [B, O] ``steps`` times by the critic; then value them, and choose.

    ``evaluator`` is the critic whose values of the last particles are returned, and go into ``epilogue``: of the same
    sizes as ``mlp``, its default. Particles and moments are float32.
    Raises ``ValueError`` naming the argument that is wrong.
    """
    check_critic(mlp)
    check_rows(mlp, observations, particles, "particles")
    if evaluator is not None:
        check_critic(evaluator, "evaluator", mlp)
    launch.check_choice("q_aggregation", q_aggregation, launch.AGGREGATIONS)
    functions = flow_functions(kernel, optimizer)
    launch.check_positive("temperature", temperature)
    steps = launch.check_integer("steps", steps, 0)
    batch, n, width = particles.shape
    device = particles.device
    if epilogue is not None:
        check_ending(epilogue, batch, device)
    start = particles.to(torch.float32, copy=steps == 0).contiguous()
    trajectory = (
        torch.empty((steps + 1, *start.shape), dtype=torch.float32, device=device) if return_trajectory else None
    )
    if trajectory is not None:
        trajectory[0].copy_(start)
    chosen = index = None
    if epilogue is not None:
        size = (batch, width) if isinstance(epilogue, Select) else (batch,)
        chosen = torch.empty(size, dtype=torch.float32, device=device)
        index = torch.empty((batch,), dtype=torch.int64, device=device) if isinstance(epilogue, Select) else None
    evaluate = evaluate or epilogue is not None
    q = torch.empty((mlp.members, batch, n), dtype=torch.float32, device=device)
    if batch == 0 or (steps == 0 and not evaluate):
        return FlowOutput(start, q if evaluate else None, trajectory, chosen, index)

    critic = Network(mlp, observations, n, precision, layers) if steps > 0 or evaluator is None else None
    valuing = critic if evaluator is None else Network(evaluator, observations, n, precision, layers)
    assert valuing is not None
    z, (h, dz, dh) = valuing.buffer(valuing.depth), valuing.buffer(3)
    x = start
    if critic is not None:
        chosen_optimizer = particle_optimizer(optimizer)
        moments = torch.empty((2, *start.shape), dtype=torch.float32, device=device)
        moved = torch.empty(start.shape, dtype=torch.float32, device=device)
        scratch = median_scratch(batch, n, device)
        flow = Flow(
            PART="move",
            MINIMUM=q_aggregation == "min",
            BANDWIDTH_GRADIENT=bandwidth_gradient and repulsion,
            REPULSION=repulsion,
            MOMENTS=chosen_optimizer.moments,
        )
        for number in range(1, steps + 1):
            with ranges.span(f"vgf/flow_step/{number - 1}"):
                critic.forward(x, z, h)
                gradient = critic.backward(z, q, dz, dh)
                new = moved if trajectory is None else trajectory[number]
                correction, v_correction = chosen_optimizer.corrections(number)
                flow_step(
                    flow,
                    critic.shape(0),
                    functions,
                    Step(float(number), math.log(n + 1.0), 1.0 / temperature, step_size / correction, v_correction),
                    Particles(x, new, moments[0], moments[1], scratch),
                    q=q,
                    grad=gradient,
                    pdl=critic.pdl,
                )
                x = new
    with ranges.span("vgf/values"):
        if evaluate:
            last = valuing.forward(x, z, h)
            valuing.rows_of("value", valuing.depth - 1, z=last, q=q)
        if epilogue is not None:
            _end(valuing, epilogue, functions, x, q, chosen, index)
    return FlowOutput(x, q if evaluate else None, trajectory, chosen, index)


def _end(
    critic: Network,
    epilogue: Select | TDTarget,
    functions: FlowFunctions,
    x: Tensor,
    q: Tensor,
    chosen: Tensor | None,
    index: Tensor | None,
) -> None:
    """What is made of the last particles' values."""
    flow, choice = Flow("select", MINIMUM=epilogue.q_aggregation == "min"), Choice(q, q, q, chosen, index)
    if isinstance(epilogue, TDTarget):
        rewards, masks = epilogue.rewards, epilogue.masks
        flow = flow._replace(PART="td", LARGEST=epilogue.reduce == "max")
        strides = {"stride_rewards": rewards.stride(0), "stride_masks": masks.stride(0)}
        step = Step(discount=float(epilogue.discount), **strides)
        choice = choice._replace(rewards=rewards, masks=masks, index=q)
    else:
        flow = flow._replace(SELECTION=epilogue.mode)
        step = Step(inverse_choice_temperature=1.0 / epilogue.temperature)
        if epilogue.uniform is not None:
            choice = choice._replace(uniform=epilogue.uniform.contiguous())
    shape, nothing = critic.shape(0), Particles(x, x, x, x, x)
    flow_step(flow, shape, functions, step, nothing, q=q, choice=choice, pdl=critic.pdl)


# --- acting ----------------------------------------------------------------------------------------------------------


class Acted(NamedTuple):
    """What ``act`` returns."""

    action: Tensor  # [B, A] float32
    chosen_index: Tensor  # [B] int64
    particles: Tensor  # [B, N, A] float32 after the last step
    q: Tensor  # [E, B, N] float32 of every member at ``particles``


def act(
    velocity: PackedMLP,
    critic: PackedMLP,
    observations: Tensor,
    noise: Tensor | None,
    behavior_steps: int,
    flow_steps: int,
    step_size: float,
    temperature: float,
    q_aggregation: str = "mean",
    bandwidth_gradient: bool = False,
    repulsion: bool = True,
    optimizer: str = "adam",
    selection: Select | None = None,
    *,
    kernel: str = "rbf",
    particles: int | None = None,
    seed: Tensor | None = None,
    precision: str | None = None,
    layers: launch.Layers | None = None,
) -> Acted:
    """Actions at observations [B, O] from noise [B, N, A] of any strides: behaviour flow, flow, choice.

    Instead of ``noise``, ``seed`` and ``particles`` as in ``behavior_flow``. Raises as the two flows do.
    """
    drawn = behavior_flow(
        velocity,
        observations,
        noise,
        behavior_steps,
        particles=particles,
        seed=seed,
        precision=precision,
        layers=layers,
    )
    result = value_gradient_flow(
        critic,
        observations,
        drawn,
        flow_steps,
        step_size,
        temperature,
        q_aggregation,
        bandwidth_gradient,
        repulsion,
        optimizer,
        kernel=kernel,
        epilogue=selection or Select(),
        precision=precision,
        layers=layers,
    )
    assert result.chosen is not None
    assert result.chosen_index is not None
    assert result.q is not None
    return Acted(result.chosen, result.chosen_index, result.particles, result.q)
