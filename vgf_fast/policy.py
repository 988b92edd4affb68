"""VGFPolicy: draw particles from the behaviour model, move them along the critic's value gradient, act with one."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor, nn

from vgf_fast import functional, reference
from vgf_fast.backends import choice as backends
from vgf_fast.backends import torch as torch_backend
from vgf_fast.backends.graphs import GraphCache
from vgf_fast.checks import check_finite
from vgf_fast.common import checkpoints, memory
from vgf_fast.common.ambient import neutral
from vgf_fast.common.arrays import as_tensor, check_generator
from vgf_fast.common.bounds import ActionBounds
from vgf_fast.common.devices import device_of
from vgf_fast.common.files import folder_of, write_text
from vgf_fast.common.generators import GeneratorState, generator_state, restored_generator
from vgf_fast.common.spaces import policy_fields
from vgf_fast.config import MAX_SEED, Selection, TransportBudget, VGFConfig, choice, config_from_reference, integer
from vgf_fast.functional import Backend
from vgf_fast.kernels import ranges
from vgf_fast.networks import VelocityField, networks_of
from vgf_fast.reference import FlowResult, MLPWeights

if TYPE_CHECKING:
    from vgf_fast.backends.choice import PolicyBackend

MODEL_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


class VGFPolicy(nn.Module):
    """The particles are the policy: ``policy.critic`` moves what ``policy.behavior`` draws.

    ``config`` says what is computed, ``device`` where (default: the CPU), ``backend`` how (``vgf_fast.functional``).
    ``seed`` fixes the initial weights and the policy's own random numbers. Move and cast it as any ``nn.Module``;
    particles stay float32 at least. ``cuda_graph`` replays acting as a CUDA graph where the kernels run on a GPU;
    ``one_launch`` says whether a layer's product of few rows takes the rows before it into its launch, over as many
    programs as there are, or leaves them to one of their own; None leaves the choice to ``kernels.launch``. Raises
    ``TypeError`` for a ``config`` that is none, and ``ValueError`` for a seed out of range.
    """

    @neutral
    def __init__(
        self,
        config: VGFConfig,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        seed: int = 0,
        *,
        cuda_graph: bool = True,
        one_launch: bool | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(config, VGFConfig):
            raise TypeError(f"config is a {type(config).__name__}, expected a VGFConfig")
        self.config = config
        choice("backend", backend, get_args(Backend))
        self.backend: Backend = backend
        self.seed = integer("seed", seed, -MAX_SEED, MAX_SEED)
        self.cuda_graph = cuda_graph
        self.one_launch = one_launch
        self._graphs = GraphCache("acting")
        self._bound: dict[Hashable, PolicyBackend] = {}
        networks = networks_of(config, torch.Generator("cpu").manual_seed(self.seed))
        self.critic, self.target_critic, self.behavior, self.score_field = networks
        self._generator: torch.Generator | None = None
        self._generator_state: GeneratorState | None = None  # of the generator that is yet to be made
        if device is not None:
            self.to(device_of(device))
        self.bound(self.dtype)

    # --- what a caller may ask --------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.critic.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""
        return self.critic.dtype

    @property
    def particle_dtype(self) -> torch.dtype:
        """Dtype of particles and actions: float32, or float64 when the weights are."""
        return torch.promote_types(self.dtype, torch.float32)

    def bound(self, dtype: torch.dtype) -> PolicyBackend:
        """The backend that computes for the policy where it is now, with products of operands of ``dtype``.

        It is chosen once for a device and a ``backend``. Raises ``ValueError`` naming the limit where that is "triton"
        and its kernels cannot run.
        """
        key = (self.backend, self.device, self.dtype, dtype)
        if key not in self._bound:
            self._bound[key] = backends.bound(self, dtype)
        return self._bound[key]

    @property
    def generator(self) -> torch.Generator:
        """Random numbers of acting, on the policy's device; seeded with ``seed`` when first used there."""
        if self._generator is None or self._generator.device != self.device:
            self._generator = restored_generator(self._generator_state, self.device, self.seed)
            self._generator_state = None
        return self._generator

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy, a file or another process can take: not a generator, but its state."""
        state = generator_state(self._generator) if self._generator is not None else self._generator_state
        return {**self.__dict__, "_generator": None, "_generator_state": state}

    @property
    def action_bounds(self) -> ActionBounds | None:
        """What -1 and 1 stand for in the environment's units: ``config.action_low`` and ``action_high``.

        None where these are not known. Raises ``ValueError`` when they are no bounds.
        """
        if self.config.action_low is None or self.config.action_high is None:
            return None
        return ActionBounds(self.config.action_low, self.config.action_high)

    def take_action_bounds(self, bounds: ActionBounds | None) -> None:
        """Keep in ``config`` the bounds of what the policy learns from, if it has none; None changes nothing.

        Raises ``ValueError`` when it has others: its [-1, 1] would stand for two things.
        """
        known = self.action_bounds
        if bounds is None or (known is not None and known.is_close(bounds)):
            return
        if known is not None:
            raise ValueError(f"the data's actions go from {bounds}, expected from {known}: the policy's action_bounds")
        self.config = dataclasses.replace(self.config, action_low=bounds.low, action_high=bounds.high)

    # --- acting -----------------------------------------------------------------------------------------------------

    @neutral
    @torch.no_grad()
    def sample_actions(
        self,
        observations: Tensor | ArrayLike,
        flow_steps: int | None = None,
        noise: Tensor | ArrayLike | None = None,
        generator: torch.Generator | None = None,
        *,
        selection: str | None = None,
    ) -> Tensor:
        """Actions in [-1, 1] for an observation [O] -> [A] or a batch [B, O] -> [B, A], on the policy's device.

        They stay in [-1, 1] whatever the environment's units are; ``predict`` and ``select_action`` return those, and
        ``action_bounds.to_environment`` translates.
        ``flow_steps`` overrides the number of steps of ``config.test_budget`` (0 is best-of-N), ``selection`` how a
        particle is chosen. ``noise`` [N, A] or [B, N, A] are the standard normal numbers the particles start from; else
        they come from ``generator``, else from the policy's own. Acting is the paper's, with its test-time budget.
        Raises ``ValueError`` or ``TypeError`` for wrong shapes or dtypes and, on a CPU, for observations, noise or
        weights that are not finite in the dtype they are used in; a GPU is not waited for, and acts on them.
        """
        states, single = self._states(observations)
        budget = self._test_budget(flow_steps)
        self.check_memory(len(states), budget)
        if generator is None:
            generator = self.generator
        check_generator(generator, self.device)
        selection = self.config.selection if selection is None else choice("selection", selection, get_args(Selection))
        start = self._noise(noise, len(states), single, generator)
        with ranges.span("vgf/act"):
            action = self.bound(self.dtype).act(
                self, states, start, budget, selection, generator, self._graphs if self._can_capture() else None
            )
        return action.squeeze(0) if single else action

    def _can_capture(self) -> bool:
        return self.cuda_graph and self.device.type == "cuda"

    @neutral
    def predict(
        self,
        observation: NDArray[Any] | Tensor,
        state: tuple[NDArray[Any], ...] | None = None,
        episode_start: NDArray[Any] | None = None,
        deterministic: bool = True,
    ) -> tuple[NDArray[Any], tuple[NDArray[Any], ...] | None]:
        """Stable-Baselines3's signature: observation [O] or [B, O] -> (NumPy action [A] or [B, A], state).

        The action is in the environment's units where the policy knows its bounds (``action_bounds``), else in [-1, 1].
        ``deterministic=True`` starts the particles of every observation from the same numbers and takes the best one:
        equal observations get equal actions. ``state`` is returned as it came: the policy has
        no memory. Raises what ``sample_actions`` raises.
        """
        if not deterministic:
            return self._in_units(self.sample_actions(observation)).cpu().numpy(), state
        states, single = self._states(observation)
        self.check_memory(len(states), self.config.test_budget)
        shape = (self.config.particles, self.config.action_dim)
        # Drawn on the CPU: a GPU's numbers are others.
        fixed = torch.Generator("cpu").manual_seed(self.seed)
        noise = torch.randn(shape, generator=fixed, device="cpu", dtype=torch.float32).to(self.device)
        noise = noise.expand(len(states), -1, -1)
        action = self._in_units(self.sample_actions(states, noise=noise, selection="max")).cpu().numpy()
        return action[0] if single else action, state

    @neutral
    def select_action(self, observation: Mapping[str, Any] | Tensor | NDArray[Any]) -> Tensor:
        """LeRobot's: an observation [O] or [B, O], or a dict with it under "observation.state" -> action [A] or [B, A].

        The action is in the environment's units where the policy knows its bounds (``action_bounds``), else in [-1, 1].
        Raises ``ValueError`` for a dict without that key, and what ``sample_actions`` raises.
        """
        if not isinstance(observation, Mapping):
            return self._in_units(self.sample_actions(observation))
        if "observation.state" not in observation:
            raise ValueError(
                f"observation has keys {sorted(map(str, observation))}, expected 'observation.state' among them"
            )
        return self._in_units(self.sample_actions(observation["observation.state"]))

    def _in_units(self, action: Tensor) -> Tensor:
        """Actions [..., A] in [-1, 1] in the environment's units, if they are known."""
        bounds = self.action_bounds
        return action if bounds is None else bounds.to_environment(action)

    def reset(self) -> None:
        """LeRobot's, called when an episode begins: the policy has no memory, so nothing changes."""

    def check_memory(self, states: int, budget: TransportBudget) -> None:
        """Raise ``ValueError`` where so many states, with their particles, take more memory than the device has."""
        config = self.config
        moving = budget.steps > 0 and not config.amortized
        units = sum(config.hidden_dims) if moving else max(config.hidden_dims)
        memory.check_flow(
            (states, config.particles, config.action_dim),
            self.particle_dtype,
            self.device,
            members=config.members,
            units=units,
            pairs=moving,
        )

    @neutral
    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VGFPolicy:
        return super()._apply(fn, recurse)

    # --- the parts of acting and of learning ------------------------------------------------------------------------

    @neutral
    def draw_particles(self, observations: Tensor, noise: Tensor, weights: MLPWeights | None = None) -> Tensor:
        """Particles of the behaviour model: observations [B, O], noise [B, N, A] -> [B, N, A] in [-1, 1].

        ``weights`` replaces the behaviour model's, for instance by a copy in bfloat16. The flow is drawn from by
        ``functional.behavior_flow``, a Gaussian as in the public release: mean + exp(log_std) * noise, squashed or not.
        Raises ``ValueError`` or ``TypeError`` naming the argument whose shape, dtype or device is wrong.
        """
        behavior = self.behavior
        with ranges.span("vgf/behavior_flow"):
            if isinstance(behavior, VelocityField):
                steps = self.config.behavior_steps
                return functional.behavior_flow(weights or behavior, observations, noise, steps, backend=self.backend)
            return torch_backend.gaussian_particles(behavior, weights or behavior.stacked(), observations, noise)

    @neutral
    def flow_particles(
        self,
        observations: Tensor,
        particles: Tensor,
        budget: TransportBudget,
        weights: MLPWeights | None = None,
        *,
        evaluate: bool = True,
        return_trajectory: bool = False,
        field: MLPWeights | None = None,
        per_state: bool = True,
    ) -> FlowResult:
        """Move particles [B, N, A] within a budget by the critic; ``weights`` replaces the critic's.

        Where the configuration is amortised, the score field moves them, which ``field`` replaces, and ``per_state``
        says whether its direction is clipped state by state or over the batch; the critic only values them. Else it is
        ``functional.value_gradient_flow``, the paper's. q [E, B, N] is left out without ``evaluate``; the trajectory is
        [L + 1, B, N, A]. Raises ``ValueError`` or ``TypeError`` naming the argument that is wrong.
        """
        if self.score_field is not None:
            with torch.no_grad():
                at_states = reference.FieldAtStates(field or self.score_field.stacked(), observations)
                moved = torch_backend.amortized_flow(
                    at_states, particles, budget.steps, budget.step_size, per_state, return_trajectory
                )
            if not evaluate:
                return moved
            q, _ = functional.critic_value_and_score(
                weights or self.critic, observations, moved.particles, backend=self.backend
            )
            return moved._replace(q=q)
        return functional.value_gradient_flow(
            weights or self.critic,
            observations,
            particles,
            budget,
            self.config.flow_q_aggregation,
            self.config.bandwidth_gradient,
            self.config.repulsion,
            self.config.particle_optimizer,
            return_trajectory,
            kernel=self.config.kernel,
            evaluate=evaluate,
            backend=self.backend,
        )

    # --- input ------------------------------------------------------------------------------------------------------

    def _as_tensor(self, name: str, value: Tensor | ArrayLike, dtype: torch.dtype) -> Tensor:
        tensor = as_tensor(name, value)
        if not isinstance(value, Tensor):
            tensor = tensor.to(self.device)
        elif tensor.device != self.device:
            raise ValueError(f"{name} is on {tensor.device}, but the policy is on {self.device}: move one of them")
        if not tensor.is_floating_point():
            raise TypeError(f"{name} has dtype {tensor.dtype}, expected a floating dtype")
        return tensor.to(dtype)

    def _states(self, observations: Tensor | ArrayLike) -> tuple[Tensor, bool]:
        if isinstance(observations, tuple) and len(observations) == 2 and isinstance(observations[1], Mapping):
            raise TypeError(
                "observations is the pair (observation, info) that env.reset() returns, expected the observation "
                "alone: observation, info = env.reset()"
            )
        states = self._as_tensor("observations", observations, self.particle_dtype)
        width = self.config.observation_dim
        if states.ndim not in (1, 2) or states.shape[-1] != width:
            raise ValueError(
                f"observations has shape {tuple(states.shape)}, expected ({width},) or (*, {width}): "
                "config.observation_dim"
            )
        single = states.ndim == 1
        states = states.unsqueeze(0) if single else states
        # On a GPU the check would stall the launch queue for every action.
        check_finite("observations", states, self.dtype)
        return states, single

    def _noise(self, noise: Tensor | ArrayLike | None, batch: int, single: bool, generator: torch.Generator) -> Tensor:
        shape = (batch, self.config.particles, self.config.action_dim)
        if noise is None:
            with ranges.span("vgf/noise"):
                return torch.randn(shape, generator=generator, device=self.device, dtype=self.particle_dtype)
        tensor = self._as_tensor("noise", noise, self.particle_dtype)
        if single and tensor.ndim == 2:
            tensor = tensor.unsqueeze(0)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"noise has shape {tuple(tensor.shape)}, expected {shape}: (B, particles, action_dim)")
        check_finite("noise", tensor, self.dtype)
        return tensor

    def _test_budget(self, flow_steps: int | None) -> TransportBudget:
        budget = self.config.test_budget
        return budget if flow_steps is None else dataclasses.replace(budget, steps=integer("flow_steps", flow_steps, 0))

    # --- making, saving, loading ------------------------------------------------------------------------------------

    @classmethod
    def for_env(
        cls,
        env: Any,
        *,
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        seed: int = 0,
        **overrides: Any,
    ) -> VGFPolicy:
        """A new policy for a Gymnasium environment, vector environments too; ``overrides`` are fields of VGFConfig.

        The bounds of the action space are kept with the policy, so that ``predict`` and ``select_action`` act in the
        environment's units; ``action_low`` and ``action_high`` among the overrides are for a space without bounds.

        Raises ``ValueError`` for spaces it cannot act in, saying which wrapper mends it; ``TypeError`` if it is none.
        """
        are_bounded = "action_low" in overrides or "action_high" in overrides
        config = VGFConfig.from_dict({**policy_fields(env, with_bounds=not are_bounded), **overrides})
        return cls(config, device=device, backend=backend, seed=seed)

    @neutral
    def save_pretrained(self, directory: str | os.PathLike[str]) -> Path:
        """Write ``model.safetensors`` and ``config.json`` to a directory, each whole or not at all; returns it.

        Raises ``OSError`` where it cannot be written; then the old files are as they were.
        """
        path = folder_of("directory", directory)
        tensors = dict(self.named_parameters())
        checkpoints.save_tensors(path / MODEL_FILE, "policy", tensors, {"config": self.config.to_dict()})
        write_text(path / CONFIG_FILE, json.dumps(self.config.to_dict(), indent=2) + "\n")
        return path

    @classmethod
    @neutral
    def from_pretrained(
        cls,
        directory: str | os.PathLike[str],
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        seed: int = 0,
    ) -> VGFPolicy:
        """Read what ``save_pretrained`` wrote. ``config.json`` may be edited, the test budget for instance.

        Raises ``FileNotFoundError`` or ``checkpoints.CheckpointError`` (damaged, or weights that do not fit the
        configuration).
        """
        path = folder_of("directory", directory)
        if not path.is_dir():
            raise FileNotFoundError(f"no policy at {path}: expected a directory with {MODEL_FILE}")
        tensors, header = checkpoints.load_tensors(path / MODEL_FILE, "policy")
        values = header["config"]
        if (path / CONFIG_FILE).is_file():
            values = checkpoints.read_object(path / CONFIG_FILE)
        try:
            config = VGFConfig.from_dict(values)
        except (TypeError, ValueError) as error:
            raise checkpoints.CheckpointError(f"{path / CONFIG_FILE}: {error}") from error
        policy = cls(config, backend=backend, seed=seed)
        policy.to(next(iter(tensors.values())).dtype)
        checkpoints.load_module_tensors(policy, tensors, str(path / MODEL_FILE))
        return policy.to(device_of(device)) if device is not None else policy

    @classmethod
    @neutral
    def from_reference_parameters(
        cls,
        arrays: Mapping[str, Any],
        config: Mapping[str, Any] | str | os.PathLike[str],
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        seed: int = 0,
    ) -> VGFPolicy:
        """A policy with the weights of the public release.

        ``arrays``: flat names to arrays, ``critic/value_net/Dense_0/kernel`` [E, in, out] and so on, ``target_critic/``
        and ``bc/`` likewise; ``config``: the release's configuration, a dict or a path to its JSON. The policy has
        ``bandwidth_gradient=True``, so that it acts as it did, and as many critics as the arrays have. A missing target
        critic becomes a copy of the critic.
        Raises ``checkpoints.CheckpointError`` naming an array that is missing, left over, or of another shape.
        """
        from vgf_fast.reference_checkpoint import count_members, load_networks, read_config

        policy_config, _ = config_from_reference(read_config(config))
        # The release's configuration does not say how many critics there are; its arrays do.
        policy_config = dataclasses.replace(policy_config, members=count_members(arrays))
        policy = cls(policy_config, backend=backend, seed=seed)
        load_networks(policy, arrays)
        return policy.to(device_of(device)) if device is not None else policy

    @classmethod
    def from_reference_checkpoint(
        cls,
        path: str | os.PathLike[str],
        config: Mapping[str, Any] | str | os.PathLike[str],
        device: str | torch.device | None = None,
        backend: Backend = "auto",
        seed: int = 0,
    ) -> VGFPolicy:
        """A policy from a checkpoint ``params_N.pkl`` of the public release; needs no JAX and runs nothing of the file.

        Raises ``reference_checkpoint.UnsafePickleError`` when the pickle asks for anything but arrays, and otherwise as
        ``from_reference_parameters``.
        """
        from vgf_fast.reference_checkpoint import read_parameters

        return cls.from_reference_parameters(read_parameters(path), config, device, backend, seed)
