"""Offline to online: a trained learner goes on learning from what its policy meets in the simulator.

The three ways of the public release to use the offline data: one buffer to which the new transitions are added ("one
buffer", the release's "iql"), batches of both, half and half ("rlpd"), or the new transitions alone ("wsrl").
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from vgf_fast import loop
from vgf_fast.common import checkpoints
from vgf_fast.common.ambient import neutral
from vgf_fast.config import MAX_SEED, integer, integers, real
from vgf_fast.data.replay import ReplayBuffer
from vgf_fast.envs.evaluation import Score, check_environment, evaluate, means
from vgf_fast.envs.simulators import EpisodeSeed, Simulator
from vgf_fast.loop import Duty, check_losses

if TYPE_CHECKING:
    from vgf_fast.data.dataset import Dataset
    from vgf_fast.learner import Learner

Style = Literal["one_buffer", "half_and_half", "online_only"]
REPLAY_FILE = "replay-{step}.safetensors"
Record = dict[str, float]


class OnlineTraining:
    """A learner, an environment, and the transitions that the one met in the other, as in the public release.

    Every step the policy acts once and, after ``warm_up`` steps, the learner does ``updates_per_step`` updates. Random
    numbers come from generators seeded by ``seed``; the same seed gives the same run on the same CPU.
    """

    def __init__(
        self,
        learner: Learner,
        dataset: Dataset | None,
        make_env: Callable[[], Any],
        *,
        style: Style = "one_buffer",
        warm_up: int = 5000,
        updates_per_step: int = 1,
        buffer_size: int = 2_000_000,
        reward_scale: float = 1.0,
        reward_shift: float = 0.0,
        seed: int = 0,
    ) -> None:
        """Make the environment and the buffer.

        Args:
            learner: trained offline, or new.
            dataset: the offline transitions; only "online_only" goes without.
            make_env: makes the environment to act in. The policy's [-1, 1] is rescaled to the bounds of its actions,
                and a policy without ``action_bounds`` keeps the data's, else these.
            style: "one_buffer", "half_and_half" or "online_only".
            warm_up: steps before the first update.
            updates_per_step: updates after each later step.
            buffer_size: most transitions kept, the offline ones of "one_buffer" included.
            reward_scale, reward_shift: new rewards become reward_scale * reward + reward_shift, as the offline ones
                were, such as ``envs.tasks.Task`` has them.
            seed: of the episodes and of acting.

        Raises ``ValueError`` naming an argument out of its range, or an environment whose spaces are not the policy's.
        """
        if style not in get_args(Style):
            raise ValueError(f"style is {style!r}, expected one of {', '.join(map(repr, get_args(Style)))}")
        warm_up = integer("warm_up", warm_up, 0)
        updates_per_step = integer("updates_per_step", updates_per_step, 1)
        buffer_size = integer("buffer_size", buffer_size, 1)
        seed = integer("seed", seed, 0, MAX_SEED)
        reward_scale = real("reward_scale", reward_scale, -math.inf)
        reward_shift = real("reward_shift", reward_shift, -math.inf)
        config = learner.policy.config
        if dataset is None and style != "online_only":
            raise ValueError(f"dataset is None, expected the offline transitions: style is {style!r}")
        if dataset is not None:
            for name in ("observation_dim", "action_dim"):
                width, expected = getattr(dataset, name), getattr(config, name)
                if width != expected:
                    raise ValueError(f"the dataset's {name} is {width}, expected {expected}: the policy's")
            learner.policy.take_action_bounds(dataset.action_bounds)
        self.bounds = check_environment(learner.policy, make_env)  # of the environment's actions
        if learner.policy.action_bounds is None and not self.bounds.is_unit:
            learner.policy.take_action_bounds(self.bounds)
        self.learner = learner
        self.dataset = dataset
        self.style = style
        self.warm_up = warm_up
        self.updates_per_step = updates_per_step
        self.reward_scale, self.reward_shift = float(reward_scale), float(reward_shift)
        self.seed = seed
        if style == "one_buffer" and dataset is not None:
            self.buffer = ReplayBuffer.of(dataset, buffer_size)
        else:
            sizes = (buffer_size, config.observation_dim, config.action_dim)
            device = learner.policy.device if dataset is None else dataset.device
            self.buffer = ReplayBuffer(*sizes, device=device, dtype=torch.float32 if dataset is None else dataset.dtype)
        self.steps = 0  # in the environment
        self.episodes = 0  # begun
        self.returns: list[float] = []  # of the episodes that ended, in the environment's rewards
        self.successes: list[bool] = []  # of those whose environment tells
        self.generator = torch.Generator(learner.policy.device).manual_seed(seed)
        self._draws = torch.Generator(self.buffer.device).manual_seed(seed)
        self._simulator = Simulator(make_env)
        self._observation: np.ndarray | None = None
        self._return = 0.0

    def step(self) -> dict[str, Tensor]:
        """Act once and learn; the metrics of the last update, nothing during the warm-up."""
        if self._observation is None:
            numbers = np.random.SeedSequence((self.seed, self.episodes)).generate_state(3)
            self._observation = self._simulator.reset(EpisodeSeed(*map(int, numbers)))
            self.episodes += 1
            self._return = 0.0
        before = self._observation
        action = self.learner.policy.sample_actions(before, generator=self.generator).cpu().double().numpy()
        action = self.bounds.to_environment(action)
        outcome = self._simulator.step(action)
        reward = self.reward_scale * outcome.reward + self.reward_shift
        # A time limit ends the episode and not the task: the value of what came next is bootstrapped.
        self.buffer.add(
            before,
            self.bounds.from_environment(action),
            outcome.observation,
            reward,
            0.0 if outcome.terminated else 1.0,
        )
        self._return += outcome.reward
        self._observation = outcome.observation
        if outcome.done:
            self.returns.append(self._return)
            if outcome.success is not None:
                self.successes.append(outcome.success)
            self._observation = None
        self.steps += 1
        metrics: dict[str, Tensor] = {}
        if self.steps > self.warm_up:
            for _ in range(self.updates_per_step):
                metrics = self.learner.update(self.sample(self.learner.config.batch_size), check=False)
        return metrics

    @neutral
    def sample(self, batch_size: int) -> dict[str, Tensor]:
        """A batch in the style of this training, on the policy's device."""
        if self.style != "half_and_half":
            batch = self.buffer.sample(batch_size, self._draws)
        else:
            assert self.dataset is not None
            old = batch_size // 2
            parts = [self.dataset.sample(old, self._draws)] if old else []
            parts.append(self.buffer.sample(batch_size - old, self._draws))
            batch = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return {name: value.to(self.learner.policy.device) for name, value in batch.items()}

    def run(
        self,
        steps: int,
        *,
        log_interval: int = 1000,
        on_log: Callable[[Record], None] | None = None,
        eval_interval: int = 0,
        make_eval_env: Callable[[], Any] | None = None,
        eval_episodes: int = 50,
        eval_flow_steps: Sequence[int] = (0, 1, 2, 3),
        eval_num_envs: int = 10,
        score: Score | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        checkpoint_interval: int = 0,
        progress: bool = True,
    ) -> list[Record]:
        """Take ``steps`` more steps in the environment.

        Every ``log_interval`` steps a record is made: the step, the learner's updates, mean return and success of the
        episodes since the last one, and the last update's metrics. Every ``eval_interval`` steps, and before the first
        one, ``eval_episodes`` episodes in ``make_eval_env`` are added to it, for each number of flow steps. With
        ``checkpoint_dir``, ``save`` is called every ``checkpoint_interval`` steps, at the end, and when interrupted by
        Ctrl-C, which takes effect between two steps; a second one does not wait.

        Returns the records; ``on_log`` gets each as it is made. Raises ``ValueError`` for arguments out of range, and
        ``ArithmeticError`` when a loss is no longer a number.
        """
        steps, log_interval = integer("steps", steps, 1), integer("log_interval", log_interval, 1)
        eval_interval = integer("eval_interval", eval_interval, 0)
        checkpoint_interval = integer("checkpoint_interval", checkpoint_interval, 0)
        eval_flow_steps = integers("eval_flow_steps", eval_flow_steps, 0)
        eval_episodes = integer("eval_episodes", eval_episodes, 1)
        eval_num_envs = integer("eval_num_envs", eval_num_envs, 1)
        if eval_interval and make_eval_env is None:
            raise ValueError(f"make_eval_env is None, expected a function: eval_interval is {eval_interval}")
        records: list[Record] = []
        seen = len(self.returns)
        seen_successes = len(self.successes)
        metrics: dict[str, Tensor] = {}
        end = self.steps + steps

        def log(is_evaluated: bool) -> None:
            nonlocal seen, seen_successes
            record: Record = {"step": self.steps, "updates": self.learner.step}
            if self.returns[seen:]:
                record["return"] = float(np.mean(self.returns[seen:]))
            if self.successes[seen_successes:]:
                record["success"] = float(np.mean(self.successes[seen_successes:]))
            seen, seen_successes = len(self.returns), len(self.successes)
            record |= {name: value.item() for name, value in metrics.items()}
            check_losses(self.learner.step, record)
            if is_evaluated:
                assert make_eval_env is not None
                record |= means(
                    evaluate(
                        self.learner.policy, make_eval_env, episodes=eval_episodes, flow_steps=eval_flow_steps,
                        seed=self.seed + 1, num_envs=eval_num_envs, score=score, progress=False,
                    )
                )  # fmt: skip
            records.append(record)
            if on_log is not None:
                on_log(record)

        def work(_: int) -> None:
            nonlocal metrics
            metrics = self.step() or metrics

        def log_if_due() -> None:
            is_evaluated = bool(eval_interval) and self.steps % eval_interval == 0
            if is_evaluated or self.steps % log_interval == 0 or self.steps == end:
                log(is_evaluated)

        def save() -> None:
            assert checkpoint_dir is not None
            self.save(checkpoint_dir)

        if eval_interval and self.steps == 0:
            log(is_evaluated=True)
        loop.run(
            "learning online",
            work,
            lambda: self.steps,
            end,
            [Duty(1, log_if_due)],
            None if checkpoint_dir is None else Duty(checkpoint_interval, save),
            progress=progress,
        )
        return records

    # --- checkpoints ------------------------------------------------------------------------------------------------

    @neutral
    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the learner and what it met to a directory; a kill in between leaves the last whole pair.

        The simulator's state cannot be saved: an episode under way is given up, and its transitions are kept.
        Raises ``OSError`` where it cannot be written.
        """
        path = Path(directory)
        tensors, counts = self.buffer.state()
        tensors = {
            **tensors,
            "generator/acting": self.generator.get_state(),
            "generator/draws": self._draws.get_state(),
        }
        header = {
            **counts, "steps": self.steps, "episodes": self.episodes, "style": self.style, "seed": self.seed,
            "returns": self.returns, "successes": self.successes, "updates": self.learner.step,
        }  # fmt: skip
        name = REPLAY_FILE.format(step=self.learner.step)
        is_new = not (path / name).exists()
        checkpoints.save_tensors(path / name, "replay", tensors, header)
        try:
            self.learner.save(path)
        except BaseException:
            # The old learner goes with the old replay.
            if is_new:
                (path / name).unlink()
            raise
        for old in path.glob(REPLAY_FILE.format(step="*")):
            if old.name != name:
                old.unlink()
        return path

    @neutral
    def restore(self, directory: str | os.PathLike[str]) -> None:
        """Take up what ``save`` wrote beside the learner that this training was made with.

        Raises ``FileNotFoundError`` without it, ``checkpoints.CheckpointError`` when it is damaged, and ``ValueError``
        for another style, seed or buffer size.
        """
        path = Path(directory) / REPLAY_FILE.format(step=self.learner.step)
        tensors, header = checkpoints.load_tensors(path, "replay")
        saved: Mapping[str, Any] = header
        for name in ("style", "seed"):
            if saved[name] != getattr(self, name):
                raise ValueError(f"{name} is {getattr(self, name)!r}, but {path} was saved with {saved[name]!r}")
        self.buffer.restore(tensors, {name: saved[name] for name in ("capacity", "cursor")})
        self.steps, self.episodes = saved["steps"], saved["episodes"]
        self.returns, self.successes = list(saved["returns"]), list(saved["successes"])
        self.generator.set_state(tensors["generator/acting"])
        self._draws.set_state(tensors["generator/draws"])
        self._observation = None

    def close(self) -> None:
        """Free the simulator."""
        self._simulator.close()
