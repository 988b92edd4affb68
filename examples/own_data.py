"""From your own data to a policy: a log in a robot's units, to a file, to training, to an action in those units.

``python own_data.py`` makes a log of a cart that is pushed at random, learns to bring it to the middle, and tries the
policy. Replace ``read_log`` by whatever reads yours.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import vgf_fast as vgf
from vgf_fast.data import files

FORCE = 20.0  # newtons, either way
WALL = 1.0  # metres from the middle


def move(state: np.ndarray, force: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Position [m] and velocity [m/s] [M, 2] and forces [M, 1] -> what follows, rewards [M], and who hit a wall [M]."""
    velocity = 0.95 * state[:, 1] + 0.02 * force[:, 0]
    position = state[:, 0] + 0.1 * velocity
    following = np.stack([position, velocity], axis=1)
    return following, 1.0 - np.abs(position), np.abs(position) > WALL


def read_log(carts: int, seed: int) -> dict[str, np.ndarray]:
    """A log of carts that are pushed at random for 20 steps, or until they hit a wall."""
    rng = np.random.default_rng(seed)
    state = np.stack([rng.uniform(-0.8, 0.8, carts), np.zeros(carts)], axis=1)
    running = np.ones(carts, dtype=bool)
    rows: list[tuple[np.ndarray, ...]] = []
    for _ in range(20):
        force = rng.uniform(-FORCE, FORCE, size=(carts, 1))
        following, reward, hit = move(state, force)
        rows.append(tuple(part[running] for part in (state, force, following, reward, hit)))
        running, state = running & ~hit, following
    observations, actions, next_observations, rewards, hits = map(np.concatenate, zip(*rows, strict=True))
    return {
        "observations": observations,
        "actions": actions,
        "next_observations": next_observations,
        "rewards": rewards,
        # Nothing comes after a wall. What ends by a time limit goes on: its mask is 1.
        "masks": 1.0 - hits,
    }


def main() -> None:
    """Write the log, train from the file, save the policy, and try what was saved."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--updates", type=int, default=3000)
    parser.add_argument("--out", type=Path, default=Path("own_data"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)

    log = options.out / "log.npz"
    np.savez(log, **read_log(carts=1000, seed=0))
    data = files.load(log, action_bounds=(-FORCE, FORCE), progress=False)
    print(data)

    config = vgf.VGFConfig(data.observation_dim, data.action_dim, hidden_dims=(64, 64), behavior_hidden_dims=(64, 64))
    learner = vgf.Learner(vgf.VGFPolicy(config), vgf.TrainConfig(discount=0.95, critic_learning_rate=1e-3))
    learner.fit(data, steps=options.updates, log_interval=1000, on_log=print)
    learner.policy.save_pretrained(options.out / "policy")

    policy = vgf.VGFPolicy.from_pretrained(options.out / "policy")
    state = np.array([[0.7, 0.0]])
    for _ in range(40):
        force, _ = policy.predict(state)  # newtons: the policy knows the bounds from the data
        state = move(state, force)[0]
    print(f"after 40 steps from 0.7 m the cart is at {state[0, 0]:.2f} m")


if __name__ == "__main__":
    main()
