"""Offline to online: learn from a fixed data set, then go on in the simulator, with half of each batch offline.

``python offline_to_online.py`` swings up Gymnasium's pendulum from data of random torques. It needs the extra ``envs``.
"""

from __future__ import annotations

import argparse

import gymnasium
import numpy as np

import vgf_fast as vgf


def make_env() -> gymnasium.Env:
    """One environment."""
    return gymnasium.make("Pendulum-v1")


def random_data(steps: int, seed: int) -> vgf.Dataset:
    """Transitions of random torques."""
    env, rows = make_env(), []
    env.action_space.seed(seed)
    observation, _ = env.reset(seed=seed)
    for _ in range(steps):
        action = env.action_space.sample()
        following, reward, terminated, truncated, _ = env.step(action)
        rows.append((observation, action, following, reward, not terminated))
        observation = env.reset()[0] if terminated or truncated else following
    names = ("observations", "actions", "next_observations", "rewards", "masks")
    fields = dict(zip(names, map(np.array, zip(*rows, strict=True)), strict=True))
    return vgf.Dataset.from_arrays(**fields, action_bounds=(env.action_space.low, env.action_space.high))


def main() -> None:
    """Train offline, evaluate, go online, evaluate again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=int, default=10_000, help="offline transitions")
    parser.add_argument("--updates", type=int, default=5_000, help="offline updates")
    parser.add_argument("--steps", type=int, default=5_000, help="steps in the simulator")
    parser.add_argument("--episodes", type=int, default=20, help="episodes of an evaluation")
    options = parser.parse_args()

    data = random_data(options.data, seed=0)
    policy = vgf.VGFPolicy.for_env(make_env(), hidden_dims=(128, 128), behavior_hidden_dims=(128, 128))
    learner = vgf.Learner(policy, vgf.TrainConfig(discount=0.98))

    def evaluate(when: str) -> None:
        for result in vgf.evaluate(policy, make_env, episodes=options.episodes, flow_steps=(0, 5), progress=False):
            interval = f"{result.return_low:.0f} to {result.return_high:.0f}"
            print(f"{when}, {result.label}: return {result.return_mean:.0f} ({interval})")

    learner.fit(data, options.updates)
    evaluate("offline")
    learner.finetune_online(
        data, make_env, options.steps, style="half_and_half", warm_up=min(500, options.steps), eval_interval=0
    )
    evaluate("online")


if __name__ == "__main__":
    main()
