"""Evaluation in a simulator: every number of test steps (L_test) on the same episodes, with bootstrap intervals.

An episode is a function of the policy, the seed of the evaluation and the episode's number: its own seeds start the
environment, and its own normal numbers start the particles, so that all settings meet the same episodes with the same
noise. All ``episodes`` count, however long each takes; only one that would never end is cut off.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vgf_fast.common.bounds import ActionBounds
from vgf_fast.common.intervals import bootstrap_interval
from vgf_fast.common.progress import progress_bar
from vgf_fast.config import MAX_SEED, boolean, integer, integers, real
from vgf_fast.envs.simulators import (
    EpisodeSeed,
    EvaluationError,
    Simulators,
    Spaces,
    Workers,
    make_simulators,
    read_spaces,
)
from vgf_fast.policy import VGFPolicy

__all__ = ["EvaluationError", "EvaluationResult", "Score", "bootstrap_interval", "evaluate"]

Score = Callable[[float], float] | tuple[float, float]
MAX_EPISODE_STEPS = 10_000  # longer than an episode of any task here


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """One setting's episodes. ``low`` and ``high`` bound the mean: a percentile bootstrap over episodes."""

    label: str  # "L=3", or "bc" for the behaviour model alone
    flow_steps: int  # L_test
    episodes: int
    return_mean: float  # of the undiscounted return
    return_low: float
    return_high: float
    success_mean: (
        float | None
    )  # fraction of episodes whose last info has a true "success" or "is_success"; None: neither
    success_low: float | None
    success_high: float | None
    normalized_mean: float | None  # of the normalised return; None without ``score``
    normalized_low: float | None
    normalized_high: float | None
    length_mean: float  # steps an episode
    returns: tuple[float, ...]  # by episode
    successes: tuple[bool, ...] | None
    lengths: tuple[int, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain dict of JSON types."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class _Setting:
    label: str
    flow_steps: int
    selection: str | None


@dataclasses.dataclass
class _Episode:
    """An episode under way in a slot."""

    number: int
    observation: np.ndarray
    noise: torch.Generator
    total: float = 0.0
    length: int = 0
    success: bool | None = None


def evaluate(
    policy: VGFPolicy,
    make_env: Callable[[], Any],
    *,
    episodes: int = 50,
    flow_steps: Sequence[int] = (0, 1, 2, 3),
    seed: int = 0,
    num_envs: int = 10,
    behavior_cloning: bool = False,
    workers: Workers = "sync",
    score: Score | None = None,
    confidence: float = 0.95,
    max_episode_steps: int = MAX_EPISODE_STEPS,
    progress: bool = True,
) -> list[EvaluationResult]:
    """Run ``episodes`` episodes for each number of flow steps; one result each, behaviour cloning first if asked for.

    ``make_env`` makes one Gymnasium environment; ``num_envs`` of them run side by side, with one policy call a step for
    all: in this process (``workers="sync"``), or in one worker a core ("async": the same results, worth the workers'
    start where simulation takes most of the time). L_test = 0 is best-of-N; behaviour cloning takes a random particle
    of the behaviour model. ``score`` normalises a return: a function, or (low, high) for
    100 (return - low) / (high - low).

    Actions reach an environment in its own units: the policy's [-1, 1] is rescaled to the bounds of the action space,
    and to the policy's own ``config.action_low`` and ``action_high`` where that has none. An episode is cut off after
    ``max_episode_steps`` steps, with a warning; environments commonly have a limit of their own.

    The same ``seed`` and ``num_envs`` give the same results; the global generators of NumPy, Python and torch and the
    policy's own are left as they were.

    Raises ``ValueError`` or ``TypeError`` for arguments and spaces that do not fit, ``EvaluationError`` when an
    environment fails, or gives an observation or a reward that is not finite: it names step and episode.
    """
    episodes, num_envs = integer("episodes", episodes, 1), integer("num_envs", num_envs, 1)
    max_episode_steps = integer("max_episode_steps", max_episode_steps, 1)
    seed = integer("seed", seed, 0, 2 * MAX_SEED)
    if not 0.0 < real("confidence", confidence, 0.0, 1.0) < 1.0:
        raise ValueError(f"confidence is {confidence!r}, expected a number in (0, 1)")
    if not isinstance(policy, VGFPolicy):
        raise TypeError(f"policy is a {type(policy).__name__}, expected a VGFPolicy")
    behavior_cloning = boolean("behavior_cloning", behavior_cloning)
    settings = [_Setting("bc", 0, "random")] if behavior_cloning else []
    settings += [_Setting(f"L={steps}", steps, None) for steps in integers("flow_steps", flow_steps, 0)]
    if not settings:
        raise ValueError("flow_steps is empty, expected at least one number of flow steps, or behavior_cloning=True")
    if len(set(settings)) < len(settings):
        raise ValueError(f"flow_steps is {tuple(flow_steps)}, expected different numbers")
    normalize = _normalizer(score)

    results = []
    simulators = make_simulators(make_env, min(num_envs, episodes), workers)
    try:
        bounds = _action_bounds(policy, simulators.spaces)
        with progress_bar("evaluating", total=episodes * len(settings), enabled=progress) as advance:
            for setting in settings:
                done = _run(
                    policy,
                    simulators,
                    bounds,
                    setting,
                    episodes,
                    min(num_envs, episodes),
                    seed,
                    max_episode_steps,
                    advance,
                )
                results.append(_summarize(setting, done, normalize, confidence, seed))
    finally:
        simulators.close()
    return results


def means(results: Sequence[EvaluationResult]) -> dict[str, float]:
    """Mean return, success and normalised return by label, such as "return/L=3", as far as the results have them."""
    record: dict[str, float] = {}
    for result in results:
        kinds = {"return": result.return_mean, "success": result.success_mean, "normalized": result.normalized_mean}
        record |= {f"{kind}/{result.label}": mean for kind, mean in kinds.items() if mean is not None}
    return record


def check_environment(policy: VGFPolicy, make_env: Callable[[], Any]) -> ActionBounds:
    """The bounds that the policy's actions have in an environment.

    Raises ``ValueError`` or ``TypeError`` for an environment that the policy does not fit, as ``evaluate`` does.
    """
    return _action_bounds(policy, read_spaces(make_env))


def _normalizer(score: Score | None) -> Callable[[float], float] | None:
    if score is None or callable(score):
        return score
    if not isinstance(score, (tuple, list, np.ndarray)) or len(score) != 2:
        raise ValueError(f"score is {score!r}, expected a function or (low, high)")
    low, high = (real("score", end, -math.inf) for end in score)
    if not high > low:
        raise ValueError(f"score is {score}, expected (low, high) with high > low")
    return lambda value: 100.0 * (value - low) / (high - low)


def _action_bounds(policy: VGFPolicy, spaces: Spaces) -> ActionBounds:
    """The bounds of an environment with these spaces, which are checked; where they are infinite, the policy's."""
    if spaces.observation_dim != policy.config.observation_dim:
        raise ValueError(
            f"the environment's observations have {spaces.observation_dim} entries, expected "
            f"{policy.config.observation_dim}: the policy's config.observation_dim"
        )
    if len(spaces.action_low) != policy.config.action_dim:
        raise ValueError(
            f"the environment's actions have {len(spaces.action_low)} entries, expected {policy.config.action_dim}: "
            "the policy's config.action_dim"
        )
    known = policy.action_bounds
    ends = [np.asarray(end, np.float64) for end in (spaces.action_low, spaces.action_high)]
    if known is not None:
        ends = [np.where(np.isfinite(end), end, own) for end, own in zip(ends, (known.low, known.high), strict=True)]
    elif not np.isfinite(ends).all():
        raise ValueError(
            f"the environment's action space is [{spaces.action_low}, {spaces.action_high}], expected finite bounds: "
            "give the policy's as config.action_low and action_high (in training, --action-low and --action-high)"
        )
    bounds = ActionBounds(*(tuple(end.tolist()) for end in ends))
    if known is not None and not bounds.is_close(known) and not bounds.is_unit:
        warnings.warn(
            f"the environment's actions go from {bounds}, the policy's from {known}: they are rescaled to the former",
            stacklevel=3,
        )
    return bounds


def _episode_seeds(seed: int, episode: int) -> tuple[EpisodeSeed, int]:
    """Seeds of an episode's environment, and of the normal numbers its particles start from."""
    environment, numpy, python, noise = np.random.SeedSequence((seed, episode)).generate_state(4)
    return EpisodeSeed(int(environment), int(numpy), int(python)), int(noise)


def _run(
    policy: VGFPolicy,
    simulators: Simulators,
    bounds: ActionBounds,
    setting: _Setting,
    episodes: int,
    slots: int,
    seed: int,
    max_episode_steps: int,
    advance: Callable[[], None],
) -> list[_Episode]:
    """All episodes of one setting, in the order of their numbers; a slot that is done takes the next one."""
    chooser = torch.Generator(policy.device).manual_seed(seed)
    waiting = deque(range(episodes))
    running: dict[int, _Episode] = {}
    finished: list[_Episode] = []
    cut = 0
    while waiting or running:
        starting = {slot: waiting.popleft() for slot in range(slots) if slot not in running and waiting}
        if starting:
            seeds = {slot: _episode_seeds(seed, number) for slot, number in starting.items()}
            first = simulators.reset({slot: environment for slot, (environment, _) in seeds.items()})
            for slot, number in starting.items():
                running[slot] = _Episode(number, first[slot], torch.Generator("cpu").manual_seed(seeds[slot][1]))
        actions = bounds.to_environment(_act(policy, [running[slot] for slot in sorted(running)], setting, chooser))
        outcomes = simulators.step(dict(zip(sorted(running), actions, strict=True)))
        for slot, outcome in outcomes.items():
            episode = running[slot]
            episode.observation = outcome.observation
            episode.total += outcome.reward
            episode.length += 1
            episode.success = outcome.success
            if outcome.done or episode.length == max_episode_steps:
                cut += not outcome.done
                finished.append(running.pop(slot))
                advance()
    if cut:
        warnings.warn(
            f"{setting.label}: {cut} of {episodes} episodes were cut off after {max_episode_steps} steps "
            "(max_episode_steps), without an end of their own",
            stacklevel=3,
        )
    return sorted(finished, key=lambda episode: episode.number)


def _act(policy: VGFPolicy, episodes: list[_Episode], setting: _Setting, chooser: torch.Generator) -> np.ndarray:
    """Actions [B, A] in [-1, 1], float64, for the episodes under way, in one call of the policy."""
    shape = (policy.config.particles, policy.config.action_dim)
    noise = torch.stack(
        [torch.randn(shape, generator=episode.noise, device="cpu", dtype=torch.float32) for episode in episodes]
    )
    actions = policy.sample_actions(
        np.stack([episode.observation for episode in episodes]),
        flow_steps=setting.flow_steps,
        noise=noise.to(policy.device),
        generator=chooser,
        selection=setting.selection,
    )
    return actions.cpu().double().numpy()


def _summarize(
    setting: _Setting,
    episodes: list[_Episode],
    normalize: Callable[[float], float] | None,
    confidence: float,
    seed: int,
) -> EvaluationResult:
    def mean_and_interval(name: str, values: Sequence[float] | None) -> dict[str, float | None]:
        if values is None:
            return {f"{name}_{part}": None for part in ("mean", "low", "high")}
        low, high = bootstrap_interval(values, confidence, seed)
        return {f"{name}_mean": float(np.mean(values)), f"{name}_low": low, f"{name}_high": high}

    returns = [episode.total for episode in episodes]
    known = [episode.success for episode in episodes if episode.success is not None]
    successes = tuple(known) if len(known) == len(episodes) else None
    normalized = None if normalize is None else [float(normalize(value)) for value in returns]
    fields: dict[str, Any] = {
        **mean_and_interval("return", returns),
        **mean_and_interval("success", successes),
        **mean_and_interval("normalized", normalized),
    }
    return EvaluationResult(
        label=setting.label,
        flow_steps=setting.flow_steps,
        episodes=len(episodes),
        length_mean=float(np.mean([episode.length for episode in episodes])),
        returns=tuple(returns),
        successes=successes,
        lengths=tuple(episode.length for episode in episodes),
        **fields,
    )
