"""Learner: one training update of VGF, fitting to a dataset, and checkpoints that resume exactly."""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vgf_fast import batches, loop, reference
from vgf_fast.backends import graphs
from vgf_fast.backends.choice import PolicyBackend
from vgf_fast.backends.graphs import GraphCache, addresses
from vgf_fast.backends.triton import Packed, TritonBackend
from vgf_fast.batches import BATCH_FIELDS
from vgf_fast.checks import results_left
from vgf_fast.common import checkpoints
from vgf_fast.common.ambient import neutral
from vgf_fast.common.devices import device_of
from vgf_fast.common.files import folder_of
from vgf_fast.common.generators import generator_state, restored_generator
from vgf_fast.config import TrainConfig, VGFConfig, integer, integers
from vgf_fast.functional import Backend
from vgf_fast.kernels import ranges
from vgf_fast.loop import LOSSES, Duty, check_losses
from vgf_fast.networks import VelocityField
from vgf_fast.policy import VGFPolicy

if TYPE_CHECKING:
    from vgf_fast.data.dataset import Dataset
    from vgf_fast.kernels.packing import PackedMLP
    from vgf_fast.online import Style

LEARNER_FILE = "learner.safetensors"
BEST = "best"  # folder of a directory of checkpoints
METRICS = ("critic_loss", "bc_loss", "q_mean", "target_mean", "bc_flow_var", "vgf_var")
# Of a CUDA graph: the host's work between replays, and the first batch's particles, which no update hides, are then a
# twentieth an update.
UPDATES_PER_REPLAY = 20

Drawn = tuple[dict[str, Tensor], dict[str, Tensor]]  # a batch and its noise


class _Begun(NamedTuple):
    """An update whose particles are drawn."""

    data: dict[str, Tensor]
    draws: dict[str, Tensor]
    behavior: PackedMLP  # as it was when it drew them
    particles: Tensor  # [B, N, A]


class Learner:
    """Trains a policy in place. Every random number comes from ``learner.generator``, seeded with ``config.seed``.

    On the Triton backend losses, gradients, optimiser and target critic run in its kernels; ``fused_optimizer=False``
    leaves the optimiser's step and the target critic to PyTorch. ``cuda_graph`` replays updates, in ``fit`` with
    batch and noise, as a CUDA graph where the kernels run on a GPU; the numbers are the same without.
    Raises ``TypeError`` for arguments of other types, ``ValueError`` for weights that are not float32 or float64.
    """

    @neutral
    def __init__(
        self,
        policy: VGFPolicy,
        config: TrainConfig | None = None,
        *,
        fused_optimizer: bool = True,
        cuda_graph: bool = True,
    ) -> None:
        config = TrainConfig() if config is None else config
        if not isinstance(policy, VGFPolicy):
            raise TypeError(f"policy is a {type(policy).__name__}, expected a VGFPolicy")
        if not isinstance(config, TrainConfig):
            raise TypeError(f"config is a {type(config).__name__}, expected a TrainConfig")
        if policy.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"the policy's weights are {policy.dtype}, expected float32 or float64: for bfloat16 matrix "
                "products use TrainConfig(precision='bfloat16')"
            )
        self.policy = policy
        self.config = config
        self.fused_optimizer = fused_optimizer
        self.cuda_graph = cuda_graph
        self._graphs = GraphCache("training")
        self.step = 0
        self.generator = torch.Generator(policy.device).manual_seed(config.seed)
        networks: dict[str, tuple[torch.nn.Module, float]] = {
            "critic": (policy.critic, config.critic_learning_rate),
            "behavior": (policy.behavior, config.behavior_learning_rate),
        }
        if policy.score_field is not None:
            networks["score"] = (policy.score_field, config.critic_learning_rate)
        self._optimizers = {
            name: torch.optim.Adam(module.parameters(), lr=rate, eps=1e-8, fused=True)
            for name, (module, rate) in networks.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        """Give what a copy, a file or another process can take: not a generator, but its state."""
        return {**self.__dict__, "generator": generator_state(self.generator)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.generator = restored_generator(state["generator"], self.policy.device, self.config.seed)

    # --- one update -------------------------------------------------------------------------------------------------

    @neutral
    def update(
        self, batch: Mapping[str, Any], noise: Mapping[str, Any] | None = None, *, check: bool = True
    ) -> dict[str, Tensor]:
        """One update of critic, target critic and behaviour model; returns scalar tensors to log.

        ``batch``: observations and next_observations [B, O], actions [B, A], rewards [B], masks [B] (1 = bootstrap).
        ``noise``: particles [B, N, A], bc_x0 [B, A], bc_t [B, 1] instead of numbers drawn from ``generator``.
        The order is the release's: TD target from the online critic's flow and the target critic; the target critic
        moves towards the critic as it was before its gradient step. (ALGORITHM: learning.)
        ``check=False`` skips looking at the values of a batch known to be right, such as a ``Dataset``'s; on a GPU
        nobody looks, since the update would wait for the answer.
        Raises ``ValueError`` or ``TypeError`` naming the field that is wrong; then nothing was changed.
        """
        data = self._batch(batch, check)
        size = len(data["rewards"])
        if noise is not None:
            metrics = self._update(data, self._noise(noise, size, check))
            self.step += 1
            return metrics

        def one(*fields: Tensor) -> dict[str, Tensor]:
            return self._update(dict(zip(BATCH_FIELDS, fields, strict=True)), self._noise(None, size))

        return self._run(one, tuple(data.values()), ("update", size))

    @torch.enable_grad()
    def _update(self, data: dict[str, Tensor], draws: dict[str, Tensor]) -> dict[str, Tensor]:
        """One update from checked tensors; on the Triton backend nothing in it waits for the device."""
        policy, config, backend = self.policy, self.config, self._backend()
        with ranges.span("vgf/update"), results_left():
            weights = backend.weights(policy, target=True)
            drawn = backend.draw(policy, weights.behavior, data["next_observations"], draws["particles"])
            aim = backend.td_target(policy, weights, data, drawn, config)
            if isinstance(backend, TritonBackend) and self._fuses_optimizer():
                critic_metrics = self._critic_step(backend, weights.critic, data, aim.target)
                metrics = _losses(critic_metrics, self._behavior_step(backend, weights.behavior, data, draws))
            else:
                losses, q = backend.losses(policy, weights, data, draws, aim.target, config)
                metrics = self._plain_step(losses, q, aim.target)
            return metrics | _particle_metrics(drawn, aim.moved)

    def _critic_step(
        self, backend: TritonBackend, packed: PackedMLP, data: dict[str, Tensor], target: Tensor
    ) -> Tensor:
        return backend.td_step(self.policy, packed, data, target, self._optimizers["critic"], self.config)

    def _behavior_step(
        self, backend: TritonBackend, packed: PackedMLP | None, data: dict[str, Tensor], draws: dict[str, Tensor]
    ) -> Tensor:
        return backend.behavior_step(self.policy, packed, data, draws, self._optimizers["behavior"])

    @torch.no_grad()
    def _pipelined(self, draw: Callable[[], Drawn], count: int) -> dict[str, Tensor]:
        """``count`` updates in Triton kernels, in two branches, with the numbers of one after another.

        Beside the critic's flow and its step run the behaviour model's step on the same batch and, with what comes of
        it, the flow that draws the next batch's particles: it never sees the critic. ``draw`` draws the batches in
        their order, and none is left over at the end.
        """
        policy, config, backend = self.policy, self.config, self._backend()
        field = policy.behavior
        assert isinstance(field, VelocityField)
        assert isinstance(backend, TritonBackend)

        def begin() -> _Begun:
            data, draws = draw()
            (behavior,) = backend.pack([field])
            particles = backend.draw(policy, behavior, data["next_observations"], draws["particles"])
            return _Begun(data, draws, behavior, particles)

        def go_on(now: _Begun, is_last: bool) -> tuple[Tensor, _Begun | None]:
            return self._behavior_step(backend, now.behavior, now.data, now.draws), None if is_last else begin()

        following: _Begun | None = begin()
        for number in range(1, count + 1):
            # Kept until both branches have met: either reads it.
            now = following
            assert now is not None
            with ranges.span("vgf/update"):
                join = graphs.fork(policy.device, functools.partial(go_on, now, number == count))
                critic, target = backend.pack([policy.critic, policy.target_critic])
                aim = backend.td_target(policy, Packed(critic, None, target), now.data, now.particles, config)
                critic_metrics = self._critic_step(backend, critic, now.data, aim.target)
                particle_metrics = _particle_metrics(now.particles, aim.moved)
                behavior_loss, following = join()
        return _losses(critic_metrics, behavior_loss) | particle_metrics

    def _fuses_optimizer(self) -> bool:
        """Whether one launch does gradients and Adam: not if gradients are clipped between, nor with a score field."""
        plain = self.config.max_gradient_norm is not None or self.policy.score_field is not None
        return self.fused_optimizer and not plain

    def _plain_step(self, losses: dict[str, Tensor], q: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Gradients of the losses, the target critic, then PyTorch's optimiser."""
        for optimizer in self._optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        with ranges.span("vgf/backward"):
            torch.stack(list(losses.values())).sum().backward()
            self._clip_gradients()
        # Before the gradient step: the release blends in the critic the gradient was taken at.
        policy, tau = self.policy, self.config.tau
        with ranges.span("vgf/target_critic"):
            reference.polyak_(list(policy.target_critic.parameters()), list(policy.critic.parameters()), tau)
        with ranges.span("vgf/optimizer"):
            for optimizer in self._optimizers.values():
                optimizer.step()
        names = {"critic": "critic_loss", "behavior": "bc_loss", "score": "score_loss"}
        return {
            **{names[name]: loss.detach() for name, loss in losses.items()},
            "q_mean": q[0].detach().mean(),
            "target_mean": target.mean(),
        }

    @torch.no_grad()
    def _clip_gradients(self) -> None:
        """Shorten each network's gradient to the norm allowed."""
        limit = self.config.max_gradient_norm
        if limit is None:
            return
        for optimizer in self._optimizers.values():
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(one) for one in gradients]))
            factor = torch.where(norm < limit, torch.ones_like(norm), limit / norm)
            for one in gradients:
                one.mul_(factor)

    def _compute_dtype(self) -> torch.dtype:
        """Dtype of the operands of matrix products."""
        return torch.bfloat16 if self.config.precision == "bfloat16" else torch.float32

    def _backend(self) -> PolicyBackend:
        return self.policy.bound(self._compute_dtype())

    def _batch(self, batch: Mapping[str, Any], check: bool) -> dict[str, Tensor]:
        return batches.checked_batch(self.policy, batch, check)

    def _noise(self, noise: Mapping[str, Any] | None, size: int, check: bool = True) -> dict[str, Tensor]:
        self.policy.check_memory(size, self.policy.config.train_budget)
        if noise is not None:
            return batches.checked_noise(self.policy, noise, size, check)
        return batches.drawn_noise(self.policy, size, self.generator)

    # --- many updates -----------------------------------------------------------------------------------------------

    def fit(
        self,
        dataset: Dataset,
        steps: int,
        eval_env: Callable[[], Any] | None = None,
        *,
        eval_interval: int = 100_000,
        eval_episodes: int = 50,
        eval_flow_steps: Sequence[int] = (0, 1, 2, 3),
        eval_num_envs: int = 10,
        log_interval: int = 1_000,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_interval: int = 100_000,
        on_log: Callable[[dict[str, float]], None] | None = None,
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Do ``steps`` more updates on batches drawn from a dataset; returns the logged records.

        ``eval_env`` makes one environment; every ``eval_interval`` updates and at the end it is evaluated for
        each of ``eval_flow_steps`` flow steps (L_test). A record holds ``step`` and the metrics of that update, or an
        evaluation's, and is passed to ``on_log``. ``checkpoint_dir`` is saved to every ``checkpoint_interval`` updates,
        at the end, and when interrupted by Ctrl-C, which takes effect between two updates, so that ``Learner.resume``
        goes on exactly; a second Ctrl-C does not wait. Its folder ``best`` holds the learner of the best evaluation.
        Intervals are counted in ``learner.step``: a resumed run logs, evaluates and saves at the same.
        A policy without ``action_bounds`` keeps the dataset's.
        The update is the paper's, in the public release's order (see ``update``).

        Raises ``ArithmeticError`` when a loss is no longer a number, at the next record or checkpoint: the last
        checkpoint stays. Raises ``ValueError`` or ``TypeError`` for wrong arguments, a dataset of other widths or
        bounds too.
        """
        steps, log_interval = integer("steps", steps, 0), integer("log_interval", log_interval, 1)
        eval_interval = integer("eval_interval", eval_interval, 1)
        checkpoint_interval = integer("checkpoint_interval", checkpoint_interval, 1)
        eval_flow_steps = integers("eval_flow_steps", eval_flow_steps, 0)
        eval_episodes = integer("eval_episodes", eval_episodes, 1)
        eval_num_envs = integer("eval_num_envs", eval_num_envs, 1)
        for name, function in (("eval_env", eval_env), ("on_log", on_log)):
            if function is not None and not callable(function):
                raise TypeError(f"{name} is a {type(function).__name__}, expected a function")
        if checkpoint_dir is not None:
            checkpoint_dir = folder_of("checkpoint_dir", checkpoint_dir)
        records: list[dict[str, float]] = []

        def log(record: dict[str, float]) -> None:
            records.append(record)
            if on_log is not None:
                on_log(record)

        def evaluation() -> None:
            from vgf_fast.envs.evaluation import evaluate, means

            assert eval_env is not None
            scores = means(
                evaluate(
                    self.policy, eval_env, episodes=eval_episodes, flow_steps=eval_flow_steps, seed=self.config.seed,
                    num_envs=eval_num_envs, progress=False,
                )
            )  # fmt: skip
            log({"step": self.step, **scores})
            if checkpoint_dir is not None:
                self.save_best(checkpoint_dir, scores)

        def save() -> None:
            assert checkpoint_dir is not None
            self.save(checkpoint_dir)

        self.loop(
            dataset,
            self.step + steps,
            log_interval,
            log,
            evaluation=None if eval_env is None else Duty(eval_interval, evaluation),
            save=None if checkpoint_dir is None else Duty(checkpoint_interval, save),
            progress=progress,
        )
        return records

    def loop(
        self,
        dataset: Dataset,
        end: int,
        log_interval: int,
        on_log: Callable[[dict[str, float]], None],
        *,
        first: Callable[[], None] | None = None,
        evaluation: Duty | None = None,
        save: Duty | None = None,
        progress: bool = True,
    ) -> None:
        """Update on batches of a dataset until ``step`` is ``end``: what ``fit`` and runs in a directory are made of.

        ``on_log`` gets a record of every ``log_interval``-th update and of the last one. For ``first``, ``save`` and
        duties see ``vgf_fast.loop.run``; the losses are looked at before ``evaluation`` and ``save``. Raises what
        ``fit`` raises.
        """
        if not hasattr(dataset, "sample"):
            kind = type(dataset).__name__
            raise TypeError(f"dataset is a {kind}, expected a Dataset: vgf_fast.data.Dataset.from_arrays makes one")
        for name, size in (("observation_dim", dataset.observation_dim), ("action_dim", dataset.action_dim)):
            if size != getattr(self.policy.config, name):
                raise ValueError(
                    f"the dataset's {name} is {size}, expected {getattr(self.policy.config, name)}: config.{name}"
                )
        self.policy.check_memory(self.config.batch_size, self.policy.config.train_budget)
        self.policy.take_action_bounds(dataset.action_bounds)
        metrics: dict[str, Tensor] = {}

        def work(limit: int) -> None:
            nonlocal metrics
            metrics = self._updates(dataset, limit)

        def log() -> None:
            on_log({"step": self.step, **{name: value.item() for name, value in metrics.items()}})
            check()

        def check() -> None:
            check_losses(self.step, {name: value.item() for name, value in metrics.items() if name in LOSSES})

        others = [duty for duty in (evaluation, save) if duty is not None]
        loop.run(
            "training",
            work,
            lambda: self.step,
            end,
            [
                Duty(log_interval, log, is_held=True),
                *(Duty(duty.interval, check, is_held=True) for duty in others),
                *([] if evaluation is None else [evaluation]),
            ],
            save,
            first=first,
            progress=progress,
        )

    def finetune_online(
        self,
        dataset: Dataset | None,
        make_env: Callable[[], Any],
        steps: int,
        *,
        style: Style = "one_buffer",
        warm_up: int = 5000,
        updates_per_step: int = 1,
        buffer_size: int = 2_000_000,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> list[dict[str, float]]:
        """Go on learning in the simulator for ``steps`` steps; returns the logged records.

        ``style`` is how the offline transitions are used: "one_buffer", "half_and_half" or "online_only". For the other
        arguments see ``vgf_fast.online.OnlineTraining``; ``options`` are those of its ``run``, such as
        ``eval_interval`` and ``make_eval_env``. An ``OnlineTraining`` of your own can also be saved and resumed.
        The styles are the public release's "iql", "rlpd" and "wsrl".

        Raises ``ValueError`` for arguments out of range and spaces that do not fit, ``EvaluationError`` when the
        environment fails, and ``ArithmeticError`` when a loss is no longer a number.
        """
        from vgf_fast.online import OnlineTraining

        training = OnlineTraining(
            self, dataset, make_env, style=style, warm_up=warm_up, updates_per_step=updates_per_step,
            buffer_size=buffer_size, reward_scale=reward_scale, reward_shift=reward_shift, seed=seed,
        )  # fmt: skip
        try:
            return training.run(steps, **options)
        finally:
            training.close()

    @neutral
    def _updates(self, dataset: Dataset, limit: int) -> dict[str, Tensor]:
        """At least one and at most ``limit`` updates on batches of a dataset; the metrics of the last one."""
        size = self.config.batch_size

        def draw() -> Drawn:
            with ranges.span("vgf/sample_batch"):
                if dataset.device.type == self.policy.device.type:
                    drawn = dataset.sample(size, self.generator)
                else:
                    # The generator is on the policy's device, the transitions in the host's memory.
                    index = torch.randint(dataset.size, (size,), generator=self.generator, device=self.policy.device)
                    drawn = {name: field.to(self.policy.device) for name, field in dataset.take(index).items()}
                data = self._batch(drawn, check=False)
            return data, self._noise(None, size)

        if dataset.device != self.policy.device or not self._can_capture():
            metrics = self._update(*draw())
            self.step += 1
            return metrics
        count = UPDATES_PER_REPLAY if limit >= UPDATES_PER_REPLAY else 1
        return self._run(functools.partial(self._pipelined, draw, count), (), ("fit", dataset.fingerprint), count)

    def _run(
        self,
        updates: Callable[..., dict[str, Tensor]],
        inputs: tuple[Tensor, ...],
        work: tuple[Hashable, ...],
        count: int = 1,
    ) -> dict[str, Tensor]:
        """Call ``updates(*inputs)``, ``count`` of them, by a CUDA graph if possible; the metrics of the last.

        ``work`` says what is called.
        """
        if not self._can_capture():
            metrics = updates(*inputs)
            self.step += count
            return metrics

        def stacked(*tensors: Tensor) -> tuple[Tensor, ...]:
            metrics = updates(*tensors)
            return (torch.stack([metrics[name].reshape(()) for name in METRICS]),)

        # Everything that the recorded launches read or write lies where it lay, and no number in them has changed.
        state = [tensor for optimizer in self._optimizers.values() for tensor in _tensors(optimizer)]
        rates = tuple(group["lr"] for optimizer in self._optimizers.values() for group in optimizer.param_groups)
        key = (*work, count, rates, addresses([*self.policy.parameters(), *state]))
        (values,) = self._graphs.run(key, stacked, inputs, generators=[self.generator])
        self.step += count
        return dict(zip(METRICS, values.unbind(), strict=True))

    def _can_capture(self) -> bool:
        return (
            self.cuda_graph
            and self.policy.device.type == "cuda"
            and self._fuses_optimizer()
            and self.policy.config.behavior == "flow"
            and isinstance(self._backend(), TritonBackend)
        )

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @neutral
    def save(self, directory: str | os.PathLike[str], score: float | None = None) -> Path:
        """Write everything a resumed run needs to ``learner.safetensors`` in a directory, whole or not at all.

        ``score`` is noted with it, such as an evaluation's mean return. Raises ``ArithmeticError`` for weights that are
        not finite, and ``OSError``; then the file is as it was.
        """
        tensors: dict[str, Tensor] = {f"policy/{name}": p for name, p in self.policy.named_parameters()}
        for name, optimizer in self._optimizers.items():
            for index, state in optimizer.state_dict()["state"].items():
                tensors |= {f"{name}_optimizer/{index}/{key}": value for key, value in state.items()}
        tensors["generator/learner"] = self.generator.get_state()
        tensors["generator/policy"] = self.policy.generator.get_state()
        header = {
            "policy": self.policy.config.to_dict(),
            "train": self.config.to_dict(),
            "step": self.step,
            "device": self.policy.device.type,
            "policy_seed": self.policy.seed,
            **({} if score is None else {"score": score}),
        }
        path = folder_of("directory", directory)
        checkpoints.save_tensors(path / LEARNER_FILE, "learner", tensors, header)
        return path

    def save_best(self, directory: str | os.PathLike[str], evaluation: Mapping[str, float]) -> None:
        """Save to the folder ``best`` of a directory, if an evaluation beats that of the learner which is there.

        ``evaluation`` is one of ``fit``'s records; the highest of its normalised scores counts, else of its successes,
        else of its returns. Raises what ``save`` raises.
        """
        path = Path(directory) / BEST
        for kind in ("normalized/", "success/", "return/"):
            # Behaviour cloning does not depend on the critic, and is no result of the policy.
            scores = [one for name, one in evaluation.items() if name.startswith(kind) and not name.endswith("/bc")]
            if scores:
                break
        else:
            return
        try:
            held = checkpoints.load_header(path / LEARNER_FILE, "learner").get("score", -math.inf)
        except (FileNotFoundError, checkpoints.CheckpointError):
            held = -math.inf
        if max(scores) > held:
            self.save(path, max(scores))

    @classmethod
    @neutral
    def resume(
        cls, directory: str | os.PathLike[str], device: str | torch.device | None = None, backend: Backend = "auto"
    ) -> Learner:
        """Read what ``save`` wrote, policy included. On the same machine's CPU, bit for bit as if never interrupted.

        On another kind of device than the one it was saved on, the generators start afresh from their seeds.
        Raises ``FileNotFoundError`` or ``checkpoints.CheckpointError``.
        """
        path = folder_of("directory", directory) / LEARNER_FILE
        tensors, header = checkpoints.load_tensors(path, "learner")
        try:
            policy_config, config = VGFConfig.from_dict(header["policy"]), TrainConfig.from_dict(header["train"])
            step, device_type, seed = header["step"], header["device"], header["policy_seed"]
        except (KeyError, TypeError, ValueError) as error:
            raise checkpoints.CheckpointError(f"{path} has a header that cannot be read: {error}") from error
        parameters = {name.removeprefix("policy/"): t for name, t in tensors.items() if name.startswith("policy/")}
        policy = VGFPolicy(policy_config, backend=backend, seed=seed).to(next(iter(parameters.values())).dtype)
        checkpoints.load_module_tensors(policy, parameters, str(path))
        learner = cls(policy.to(device_of(device)) if device is not None else policy, config)
        learner.step = step
        for name, optimizer in learner._optimizers.items():
            state = optimizer.state_dict()
            for key, tensor in tensors.items():
                if key.startswith(f"{name}_optimizer/"):
                    _, index, entry = key.split("/")
                    # A copy, aligned as a fresh tensor is: the file's own buffer need not be.
                    state["state"].setdefault(int(index), {})[entry] = tensor.clone()
            optimizer.load_state_dict(state)
        if device_type == policy.device.type:
            learner.generator.set_state(tensors["generator/learner"])
            policy.generator.set_state(tensors["generator/policy"])
        return learner


def _tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Moments and step counters, in the order of the parameters."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            yield from (value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor))


def _losses(critic_metrics: Tensor, behavior_loss: Tensor) -> dict[str, Tensor]:
    """Metrics by name: of the critic's step [3], and the behaviour model's."""
    critic_loss, q_mean, target_mean = critic_metrics.unbind()
    return {"critic_loss": critic_loss, "bc_loss": behavior_loss, "q_mean": q_mean, "target_mean": target_mean}


def _particle_metrics(drawn: Tensor, moved: Tensor) -> dict[str, Tensor]:
    with ranges.span("vgf/metrics"):
        return {"bc_flow_var": _particle_variance(drawn), "vgf_var": _particle_variance(moved)}


def _particle_variance(particles: Tensor) -> Tensor:
    """Mean over states and action entries of the variance over particles; zero for a single particle."""
    if particles.shape[1] < 2:
        return particles.new_zeros(())
    return particles.var(dim=1, correction=1).mean()
