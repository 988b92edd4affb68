"""The demo: a two-joint arm learns to reach from noisy data, on a CPU, in a minute or two.

Gymnasium's Reacher-v5: observation 10 (cosines and sines of the two joint angles, target [m], joint velocities [rad/s],
fingertip minus target [m]), torques 2 in [-1, 1], 50 steps, dense reward. The data are a controller's whose torques are
drowned in noise; VGF finds better torques than any in the data, the further its particles may move.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vgf_fast.common.files import write_text
from vgf_fast.common.intervals import bootstrap_interval
from vgf_fast.common.progress import progress_bar
from vgf_fast.config import MAX_SEED, TrainConfig, TransportBudget, VGFConfig, integer, integers
from vgf_fast.data.dataset import Dataset
from vgf_fast.envs.evaluation import EvaluationResult, evaluate
from vgf_fast.experiments.presets import preset
from vgf_fast.functional import Backend
from vgf_fast.learner import Learner
from vgf_fast.policy import VGFPolicy

ENVIRONMENT = "Reacher-v5"
PRESET = "demo/reacher"
STEPS = 50  # of an episode: Reacher-v5's own time limit
LINKS = (0.1, 0.11)  # metres, from the shoulder to the elbow and on to the fingertip
GAIN, DAMPING, NOISE = 60.0, 0.06, 0.8  # torque a metre of J^T error; torque a rad/s; standard deviation of the torque
CURVE_MARKS = (0, 1, 2, 3, 4, 6, 8, 12, 16)  # sixteenths of the updates: most is learnt early
CURVE_FLOW_STEPS = (0, 5)
BAR_UPDATES = 20  # between moves of the progress bar
PICTURE_FLOW_STEPS = 10
PICTURE_STATES = 512  # among which the pictured one is looked for
PICTURE_GRID = 61
CONFIDENCE = 0.95

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """How large the demo is; the defaults take a minute or two on two cores."""

    seed: int = 0  # of data, weights, training and evaluation
    episodes: int = 600  # of data
    updates: int = 2_000  # of training
    eval_episodes: int = 60  # for each setting of the table
    curve_episodes: int = 20  # for each point of the learning curve
    flow_steps: tuple[int, ...] = (0, 1, 2, 3, 5, 10)  # L_test of the table

    def checked(self) -> DemoConfig:
        """This, or ``ValueError`` for a field outside its range."""
        values: dict[str, Any] = {"seed": integer("seed", self.seed, 0, MAX_SEED)}
        for field in ("episodes", "updates", "eval_episodes", "curve_episodes"):
            values[field] = integer(field, getattr(self, field), 1)
        values["flow_steps"] = integers("flow_steps", self.flow_steps, 0, least=1)
        return dataclasses.replace(self, **values)


@dataclasses.dataclass(frozen=True)
class CurvePoint:
    """An evaluation along the way."""

    updates: int
    result: EvaluationResult


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found; ``apart`` says whether the intervals of bc, L=0 and the largest of L <= 5 are disjoint."""

    data_mean: float  # return of the data's own controller
    data_low: float
    data_high: float
    results: list[EvaluationResult]
    curve: list[CurvePoint]
    apart: bool
    compared: tuple[str, ...]


def controller(observations: np.ndarray) -> np.ndarray:
    """Torques [M, 2] in [-1, 1] of a Jacobian-transpose controller for observations [M, 10].

    torque = gain J^T (target - fingertip) - damping * joint velocity.
    """
    cos, sin = observations[:, 0:2], observations[:, 2:4]
    # The elbow's direction, and the forearm's: the angle of the second joint is relative to the first.
    upper = LINKS[0] * np.stack([cos[:, 0], sin[:, 0]], axis=1)
    fore = LINKS[1] * np.stack(
        [cos[:, 0] * cos[:, 1] - sin[:, 0] * sin[:, 1], sin[:, 0] * cos[:, 1] + cos[:, 0] * sin[:, 1]], axis=1
    )
    error = -observations[:, 8:10]
    # A joint moves the fingertip at right angles to the arm beyond it.
    torque = np.stack([_cross(upper + fore, error), _cross(fore, error)], axis=1)
    return np.clip(GAIN * torque - DAMPING * observations[:, 6:8], -1.0, 1.0)


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]


def collect(episodes: int, seed: int) -> tuple[Dataset, np.ndarray]:
    """Data of the noisy controller: (transitions, undiscounted return of each episode [episodes]).

    Raises ``ImportError`` without Gymnasium and MuJoCo.
    """
    gymnasium = _gymnasium()
    count = min(20, episodes)
    environments = gymnasium.vector.SyncVectorEnv([make_env] * count)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(0,)))
    seeds = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(episodes + count)
    names = ("observations", "actions", "next_observations", "rewards")
    rounds: list[dict[str, np.ndarray]] = []
    try:
        for start in range(0, episodes, count):
            columns: dict[str, list[np.ndarray]] = {name: [] for name in names}
            observation, _ = environments.reset(seed=[int(one) for one in seeds[start : start + count]])
            for _ in range(STEPS):
                noise = rng.normal(0.0, NOISE, size=(count, 2))
                action = np.clip(controller(observation) + noise, -1.0, 1.0).astype(np.float32)
                next_observation, reward, _, _, _ = environments.step(action)
                for name, value in zip(names, (observation, action, next_observation, reward), strict=True):
                    columns[name].append(np.array(value))
                observation = next_observation
            # [STEPS, count, ...] -> [count, STEPS, ...]: an episode's steps side by side.
            rounds.append({name: np.stack(column).swapaxes(0, 1) for name, column in columns.items()})
    finally:
        environments.close()
    fields = {name: np.concatenate([one[name] for one in rounds])[:episodes] for name in names}
    returns = fields["rewards"].sum(axis=1)
    observations, actions, next_observations, rewards = (
        fields[name].reshape(-1, *fields[name].shape[2:]) for name in names
    )
    # The time limit cuts episodes off; it is no property of a state, so that every value is bootstrapped.
    dataset = Dataset.from_arrays(
        observations=observations,
        actions=actions,
        next_observations=next_observations,
        rewards=rewards,
        masks=np.ones(len(rewards)),
        terminals=np.arange(len(rewards)) % STEPS == STEPS - 1,
    )
    return dataset, returns


def make_env() -> Any:
    """The demo's environment. Raises ``ImportError`` without Gymnasium and MuJoCo."""
    return _gymnasium().make(ENVIRONMENT)


def _gymnasium() -> Any:
    try:
        import gymnasium
        import mujoco  # noqa: F401  (Reacher's simulator, which Gymnasium imports late)
    except ImportError as error:
        raise ImportError(f"the demo's simulator cannot be imported ({error}): pip install 'vgf_fast[envs]'") from error
    return gymnasium


def run(
    config: DemoConfig, out: Path, device: str | None = None, backend: Backend = "auto", say: Say = lambda line: None
) -> DemoResult:
    """The whole demo: collect, train, evaluate; writes pictures, results.json and the policy to ``out``.

    ``say`` is told in a line what is done. On one machine's CPU the same ``config`` gives the same results.json.
    Raises ``ImportError`` when Gymnasium, MuJoCo or matplotlib is not installed.
    """
    from vgf_fast.experiments import plots

    config = config.checked()
    say(f"collecting {config.episodes} episodes of {ENVIRONMENT}")
    dataset, returns = collect(config.episodes, config.seed)
    low, high = bootstrap_interval(returns, CONFIDENCE, config.seed)
    mean = float(returns.mean())
    say(f"  {len(dataset):,} transitions; the noisy controller's own return is {mean:.1f}")

    learner = make_learner(config, device, backend)
    dataset = dataset.to(learner.policy.device)
    say(f"training for {config.updates:,} updates")
    started = time.perf_counter()
    curve = train(learner, dataset, config)
    say(f"  done in {time.perf_counter() - started:.0f} s, evaluations along the way included")

    say(f"evaluating {config.eval_episodes} episodes for each number of flow steps")
    results = evaluate(
        learner.policy,
        make_env,
        episodes=config.eval_episodes,
        flow_steps=config.flow_steps,
        # Not the curve's episodes.
        seed=config.seed + 1,
        num_envs=config.eval_episodes,
        behavior_cloning=True,
        confidence=CONFIDENCE,
    )
    compared, apart = _compare(results)
    outcome = DemoResult(mean, low, high, results, curve, apart, compared)

    out.mkdir(parents=True, exist_ok=True)
    learner.policy.save_pretrained(out / "policy")
    plots.learning_curve(out / "learning_curve.png", *_curve_lines(curve), data_return=mean)
    plots.particles(out / "particles.png", picture(learner.policy, dataset, config.seed))
    write_text(out / "results.json", json.dumps(_record(config, learner, outcome), indent=2) + "\n")
    return outcome


def make_learner(config: DemoConfig, device: str | None = None, backend: Backend = "auto") -> Learner:
    """The preset's policy and learner, seeded. Raises what ``VGFPolicy`` raises."""
    settings = preset(PRESET)
    policy = VGFPolicy(VGFConfig.from_dict(settings.policy), device=device, backend=backend, seed=config.seed)
    return Learner(policy, TrainConfig.from_dict({**settings.train, "seed": config.seed}))


def train(learner: Learner, dataset: Dataset, config: DemoConfig) -> list[CurvePoint]:
    """All updates, with small evaluations before the first and along the way; raises what ``evaluate`` raises."""
    marks = sorted({round(config.updates * mark / 16) for mark in CURVE_MARKS})
    curve: list[CurvePoint] = []
    with progress_bar("training", total=config.updates) as advance:
        for mark in marks:
            while learner.step < mark:
                updates = min(mark - learner.step, BAR_UPDATES)
                learner.fit(dataset, updates, log_interval=config.updates + 1, progress=False)
                for _ in range(updates):
                    advance()
            results = evaluate(
                learner.policy,
                make_env,
                episodes=config.curve_episodes,
                flow_steps=CURVE_FLOW_STEPS,
                seed=config.seed,
                num_envs=config.curve_episodes,
                behavior_cloning=True,
                confidence=CONFIDENCE,
                progress=False,
            )
            curve += [CurvePoint(learner.step, result) for result in results]
    return curve


def verdict(results: Sequence[EvaluationResult], name_of: Callable[[str], str]) -> list[str]:
    """A sentence for each step from behaviour cloning over the fewest to the most flow steps up to 5.

    It says which is better, or that the intervals overlap, so that the episodes do not tell; ``name_of`` makes a label
    readable.
    """
    lines = []
    for before, after in itertools.pairwise(_chosen(results)):
        names = name_of(after.label), name_of(before.label)
        if before.return_high < after.return_low:
            lines.append("{} is better than {}: the intervals are apart".format(*names))
        elif after.return_high < before.return_low:
            lines.append("{} is worse than {}, though it should be better: the intervals are apart".format(*names))
        else:
            told = f"the intervals overlap, so that {after.episodes} episodes do not tell which is better"
            lines.append("{} and {}: {}".format(*names, told))
    return lines


def _chosen(results: Sequence[EvaluationResult]) -> list[EvaluationResult]:
    """Behaviour cloning, and the fewest and the most flow steps up to 5."""
    flows = [result for result in results if result.label != "bc" and result.flow_steps <= 5]
    flows.sort(key=lambda result: result.flow_steps)
    return [result for result in results if result.label == "bc"] + flows[:1] + flows[1:][-1:]


def _compare(results: Sequence[EvaluationResult]) -> tuple[tuple[str, ...], bool]:
    """Labels of the chosen results; whether each interval lies above the last."""
    chosen = _chosen(results)
    apart = all(worse.return_high < better.return_low for worse, better in itertools.pairwise(chosen))
    return tuple(one.label for one in chosen), apart


def _curve_lines(curve: Sequence[CurvePoint]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Updates [M], and for each label (mean, low, high) [3, M]."""
    lines: dict[str, list[tuple[float, float, float]]] = {}
    for point in curve:
        result = point.result
        lines.setdefault(result.label, []).append((result.return_mean, result.return_low, result.return_high))
    updates = np.array(sorted({point.updates for point in curve}))
    return updates, {label: np.array(values).T for label, values in lines.items()}


def _record(config: DemoConfig, learner: Learner, outcome: DemoResult) -> dict[str, Any]:
    return {
        "environment": ENVIRONMENT,
        "demo": dataclasses.asdict(config),
        "policy": learner.policy.config.to_dict(),
        "train": learner.config.to_dict(),
        "confidence": CONFIDENCE,
        "data": {"return_mean": outcome.data_mean, "return_low": outcome.data_low, "return_high": outcome.data_high},
        "results": [result.to_dict() for result in outcome.results],
        "curve": [{"updates": point.updates, **point.result.to_dict()} for point in outcome.curve],
        "apart": outcome.apart,
        "compared": list(outcome.compared),
    }


@dataclasses.dataclass(frozen=True)
class Picture:
    """Particles flowing in the action square of one state."""

    grid: np.ndarray  # [G], torques
    q: np.ndarray  # [G, G], value of (second torque, first torque)
    trajectory: np.ndarray  # [L + 1, N, 2]
    chosen: int  # the particle that acts


@torch.no_grad()
def picture(policy: VGFPolicy, dataset: Dataset, seed: int) -> Picture:
    """The flow in that one of ``PICTURE_STATES`` states where particles travel farthest to a best action inside the
    square; in most others it lies in a corner.
    """
    generator = torch.Generator(policy.device).manual_seed(seed)
    states = dataset.sample(PICTURE_STATES, generator)["observations"]
    config = policy.config
    noise = torch.randn(
        len(states), config.particles, config.action_dim, generator=generator, device=policy.device, dtype=states.dtype
    )
    budget = dataclasses.replace(config.test_budget, steps=PICTURE_FLOW_STEPS)
    flow = policy.flow_particles(states, policy.draw_particles(states, noise), budget, return_trajectory=True)
    assert flow.trajectory is not None
    assert flow.q is not None
    best = flow.q.mean(dim=0).argmax(dim=1)
    acting = flow.particles[torch.arange(len(states), device=best.device), best]
    travelled = (flow.trajectory[-1] - flow.trajectory[0]).norm(dim=-1).mean(dim=1)
    inside = acting.abs().amax(dim=1) < 0.8
    state = int(torch.where(inside, travelled, travelled - 10.0).argmax())

    grid = torch.linspace(-1.0, 1.0, PICTURE_GRID, device=policy.device, dtype=states.dtype)
    second, first = torch.meshgrid(grid, grid, indexing="ij")
    actions = torch.stack([first, second], dim=-1).reshape(1, -1, 2)
    still = TransportBudget(0, budget.step_size, budget.temperature)
    values = policy.flow_particles(states[state : state + 1], actions, still).q
    assert values is not None
    return Picture(
        grid.cpu().numpy(),
        values.mean(dim=0).reshape(PICTURE_GRID, PICTURE_GRID).cpu().numpy(),
        flow.trajectory[:, state].cpu().numpy(),
        int(best[state]),
    )
