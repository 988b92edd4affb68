"""Odd calls of what runs for a while, fitting and evaluation, each held as ``test_hostile`` holds functions."""

import copy
from functools import cache, partial

import hostile
import numpy as np
import pytest
import torch
from hostile import INF, NAN, NO_BOOLEANS, NO_CHOICES, NO_INTEGERS, NO_NUMBERS, Case, named, policy

import vgf_fast as vgf

RANDOM = np.random.default_rng(5)
OBSERVATIONS = RANDOM.standard_normal((8, 4)).astype(np.float32)
ACTIONS = np.tanh(RANDOM.standard_normal((8, 2))).astype(np.float32)


class Environment:
    """Two steps an episode; ``changes`` are what one of its parts says instead."""

    def __init__(self, **changes):
        import gymnasium

        box = gymnasium.spaces.Box
        self.observation_space = changes.pop("observation_space", box(-1.0, 1.0, (4,)))
        self.action_space = changes.pop("action_space", box(-1.0, 1.0, (2,)))
        self.changes = changes
        self.actions = []

    def reset(self, seed=None):
        self.steps = 0
        self.at = np.random.default_rng(seed).normal(size=4)
        return self.changes.get("first", (self.at, {}))

    def step(self, action):
        self.steps += 1
        assert self.action_space.contains(action), action
        plain = {"observation": self.at + self.steps, "reward": float(action.sum()), "end": self.steps == 2, "info": {}}
        plain |= self.changes
        return plain["observation"], plain["reward"], plain["end"], False, plain["info"]

    def close(self):
        pass


def evaluate(make=Environment, made=None, **options):
    small = {"episodes": 3, "flow_steps": (0, 1), "num_envs": 2, "progress": False}
    return vgf.evaluate(policy() if made is None else made, make, **{**small, **options})


def evaluation_calls():
    lists = ((), (-1,), (1.5,), (0, 0), "01", 3, None, {0}, {0: 1}, [True], [NAN], [None], len)
    numbers = [value for value in NO_NUMBERS if value is not None]
    for name, values in {
        "episodes": (0, *NO_INTEGERS),
        "num_envs": (0, *NO_INTEGERS),
        "max_episode_steps": (0, *NO_INTEGERS),
        "seed": NO_INTEGERS,
        "confidence": (0.0, 1.0, -1.0, True, None, *numbers),
        "workers": NO_CHOICES,
        "flow_steps": lists,
        "behavior_cloning": NO_BOOLEANS,
        "score": (
            3,
            "ab",
            (1.0,),
            (1.0, 1.0),
            (2.0, 1.0),
            (NAN, 1.0),
            (0.0, INF),
            ("a", "b"),
            (1, 2, 3),
            {},
            [[0], [1]],
        ),
    }.items():
        for value in values:
            yield Case(f"evaluate: {name}={named(value)}", partial(evaluate, **{name: value}), names=(name,))
    for value in (None, 3, "CartPole-v1", Environment(), lambda: None, lambda: 3, dict):
        yield Case(f"evaluate: make_env={named(value)}", partial(evaluate, value), names=("make_env",))
    for value in (3, {}, policy().config, vgf.VGFPolicy, policy().critic):
        yield Case(f"evaluate: policy={named(value)}", partial(evaluate, made=value), names=("policy",))
    for name, value in {
        "num_envs": np.int32(2),
        "episodes": np.int64(3),
        "seed": np.uint8(0),
        "flow_steps": range(2),
    }.items():
        yield Case(f"evaluate: {name}={value!r}", partial(evaluate, **{name: value}), evaluate)
    for name, value in {"score": lambda x: x, "confidence": np.float32(0.95), "flow_steps": np.array([0, 1])}.items():
        right = evaluate if name == "flow_steps" else partial(evaluate, **{name: 0.95 if name == "confidence" else abs})
        if name != "score":
            yield Case(f"evaluate: {name} of NumPy", partial(evaluate, **{name: value}), right, tolerance=1e-6)


def environment_calls():
    from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete

    text = {"observation": "observation", "reward": "reward", "first": "reset"}
    bad_vectors = (None, "x", [NAN] * 4, [INF] * 4, [1.0] * 3, [[1.0] * 4], {}, 3.0, ["a"] * 4, [1j] * 4, [None] * 4)
    for part, values in {
        "observation": bad_vectors,
        "reward": (NAN, INF, -INF, None, "1", [1.0, 2.0], {}, 1j, len),
        "first": [None, 3, (), (OBSERVATIONS[0],), *((one, {}) for one in bad_vectors)],
        "info": (None, 3),
    }.items():
        for value in values:
            make = partial(Environment, **{part: value})
            yield Case(
                f"environment: {part}={named(value)}", partial(evaluate, make), names=(text.get(part, part), "step")
            )
    for part, value in {
        "observation": OBSERVATIONS[0].astype(np.float16), "reward": np.float32(1.5), "end": np.bool_(True),
        "first": (OBSERVATIONS[0].tolist(), {}),
    }.items():  # fmt: skip
        same = {
            "observation": lambda v: v.astype(float),
            "reward": float,
            "end": bool,
            "first": lambda v: (OBSERVATIONS[0], {}),
        }
        plain = partial(Environment, **{part: same[part](value)})
        make = partial(Environment, **{part: value})
        yield Case(f"environment: odd {part}", partial(evaluate, make), partial(evaluate, plain))
    ones = np.ones(2, np.float32)
    half_open, integers = Box(-ones, np.float32([1.0, INF])), Box(0, 3, (2,), np.int64)
    boxes = (Box(-1, 1, (3,)), Box(-1, 1, (2, 2)), Box(-INF, INF, (2,)), half_open, integers)
    for space in (*boxes, Discrete(3), MultiDiscrete([2, 2]), Dict({}), None, 3):
        make = partial(Environment, action_space=space)
        yield Case(f"environment: actions {named(space)}", partial(evaluate, make), names=("action", "actions"))
    for space in (Discrete(3), Dict({}), Box(-1, 1, (3,)), Box(-1, 1, (4, 1)), None, 3):
        make = partial(Environment, observation_space=space)
        yield Case(
            f"environment: observations {named(space)}", partial(evaluate, make), names=("observation", "observations")
        )
    for label, space in {
        "locked": Box(ones, ones), "wide": Box(-3 * ones, 5 * ones), "narrow": Box(-0.1 * ones, 0.4 * ones),
        "in float64": Box(-1.0, 1.0, (2,), np.float64), "in float16": Box(-2.0, 2.0, (2,), np.float16),
    }.items():  # fmt: skip
        # The environment itself refuses what lies outside.
        yield Case(
            f"environment: {label} actions",
            lambda s=space: len(evaluate(partial(Environment, action_space=s))),
            lambda: 2,
        )


# --- fitting ---------------------------------------------------------------------------------------------------------


@cache
def dataset(width=4, scale=1.0):
    observations = np.resize(OBSERVATIONS, (8, width))
    return vgf.Dataset.from_arrays(
        observations=observations, actions=ACTIONS, next_observations=observations,
        rewards=scale * OBSERVATIONS[:, 0], masks=np.ones(8, np.float32),
    )  # fmt: skip


def fit(data=None, steps=1, **options):
    learner = vgf.Learner(copy.deepcopy(policy()), vgf.TrainConfig(batch_size=4))
    before = [number.clone() for number in hostile.numbers(learner)]
    try:
        records = learner.fit(dataset() if data is None else data(), steps, **{"progress": False, **options})
    except (TypeError, ValueError):
        assert all(map(torch.equal, hostile.numbers(learner), before)), "an error changed the learner"
        raise
    return [list(record.values()) for record in records], learner


def fit_calls():
    for name in ("steps", "log_interval", "eval_interval", "checkpoint_interval", "eval_episodes", "eval_num_envs"):
        for value in (*(() if name == "steps" else (0,)), *NO_INTEGERS):
            yield Case(f"fit: {name}={named(value)}", partial(fit, **{name: value}), names=(name,))
    for value in ((-1,), (1.5,), "01", 3, None, {0}, [True], [NAN]):
        yield Case(
            f"fit: eval_flow_steps={named(value)}", partial(fit, eval_flow_steps=value), names=("eval_flow_steps",)
        )
    for value in (None, 3, {}, [], "data.npz", ACTIONS, vgf.Dataset, {"observations": OBSERVATIONS}):
        yield Case(f"fit: dataset={named(value)}", partial(fit, lambda value=value: value), names=("dataset",))
    yield Case("fit: data of another width", partial(fit, partial(dataset, 5)), names=("observation_dim",))
    for name in ("eval_env", "on_log"):
        for value in (3, "CartPole-v1", []):
            yield Case(f"fit: {name}={named(value)}", partial(fit, **{name: value}), names=(name,))
    for value in (3, 1.5, b"\x00", [], "\x00", len):
        yield Case(f"fit: checkpoint_dir={named(value)}", partial(fit, checkpoint_dir=value), names=("checkpoint_dir",))
    for scale in (1e20, 1e30, 3e37):
        yield Case(f"fit: rewards times {scale}", partial(fit, partial(dataset, 4, scale), 4), names=("critic_loss",))
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        stored = dataset().to(dtype=dtype)
        plain = partial(stored.to, dtype=torch.float32)
        yield Case(f"fit: data in {dtype}", partial(fit, partial(stored.to)), partial(fit, plain))
    yield Case(
        "fit: NumPy's numbers",
        partial(fit, None, np.int16(2), log_interval=np.uint8(1)),
        partial(fit, None, 2, log_interval=1),
    )


CASES = hostile.grouped([*evaluation_calls(), *environment_calls(), *fit_calls()])


@pytest.mark.parametrize("group", CASES)
def test_calls(group):
    hostile.hold_all(CASES[group])
